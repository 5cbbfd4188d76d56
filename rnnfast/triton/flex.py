"""A direction of any cell's recurrence as launches of the kernels, around a cell that is printed when it first runs.

A printed module exists in memory only, by a name that is a hash of its text, where Triton reads it as it would a file.
What takes time is its compilation, whose result Triton keeps in the user's cache folder, by that text and all else that
it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import linecache
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import evaluator, gpu
from ..cells import Cell, Program, Value
from ..codegen import triton_program
from ..evaluator import Plan
from . import flex_kernels
from .layer import _chip
from .plan import Chip

_TILE = 128  # numbers, one a thread: of units that lie side by side, and rows where there are fewer units
_THREADS = 512  # at most, of a program with a whole row: of them each has room for the registers of several units


class Products(NamedTuple):
    """Of W_hh and h, which lie in memory as float32 at least: what both are rounded to, and tl.dot's precision."""

    dtype: torch.dtype
    precision: str = "ieee"

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> Products:
        """Of a layer's dtype: as torch.nn's, which rounds h to it."""
        if _chip(device).is_amd or dtype == torch.float64:
            return cls(torch.promote_types(dtype, torch.float32))
        if dtype.itemsize == 2:
            return cls(dtype)
        return cls(
            dtype, "tf32" if gpu.allows_tf32() else "tf32x3"
        )  # three of TF32 parts are as exact as one of float32


class How(NamedTuple):
    """Which kernels run, on which tiles: those of all steps, or of a step each."""

    fused: bool
    units: int
    rows: int
    products: Products
    options: dict[str, Any]  # of the launch
    depth: int = 0  # of what a program multiplies at once, where programs share a head


@functools.cache
def _module(source: str) -> ModuleType:
    name = f"rnnfast.triton.cell_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    module, file = ModuleType(name), f"<{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # no time: it stays
    sys.modules[name] = module  # where inspect looks for it
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def sources(cell: Cell) -> tuple[str, str]:
    """Of a step and of its backward. Scalars are as weights of the units' own, of which nobody asks for gradients."""
    of = cell.inputs
    x, a = [of["x"][gate] for gate in cell.gates_of_x], [of["a"][gate] for gate in cell.gates_of_a]
    derived, given = [*x, *a, *of["s"], *of["w"]], {"x": x, "a": a, "s": of["s"], "w": [*of["w"], *of["scalars"]]}
    forward = Program.of(cell.after, itertools.chain(*given.values()))
    given["d"] = cell.incoming
    none = Value("add", 0.0, 0.0)
    backward = Program.of([cell.adjoints.get(value, none) for value in derived], itertools.chain(*given.values()))
    sizes = {which: len(values) for which, values in given.items()}
    kinds = len(x), len(a), len(of["s"]), len(of["w"])
    without_d = {which: count for which, count in sizes.items() if which != "d"}
    return triton_program(forward, without_d, kinds[2:3]), triton_program(backward, sizes, kinds)


@functools.lru_cache(maxsize=1024)
def steps_of(cell: Cell) -> tuple[Any, Any]:
    """As functions of Triton's."""
    forward, backward = sources(cell)
    return _module(forward).step, _module(backward).step


def choose(
    gates: int, hidden: int, width: int, rows: int, products: Products, chip: Chip, sees_rows: bool = False
) -> How:
    """How a direction runs that has so many gates of W_hh h, of H units in heads of W, and N rows.

    Where a step sees rows, a program has all units of its rows, for means are made within one.
    """
    dtype, precision = products
    units = max(16, 1 << (width - 1).bit_length())  # as the tensor cores want them
    size = gates * units * units * dtype.itemsize * (2 if precision == "tf32x3" else 1)
    room = min(chip.room, 32 * 1024) if chip.is_amd else chip.room  # beside 48 KB cells spill there
    # What plan.py says of RDNA's cells with weights of the units' own holds for all cells here; and products of float64
    # tiles, which are slow anyway, Triton 3.6 does not compile in the backward.
    options: dict[str, Any] = {"enable_fp_fusion": True}
    is_whole = width == hidden or not sees_rows
    if gates and is_whole and size <= room and not chip.is_rdna and dtype != torch.float64:  # as plan.py has it
        options["num_warps"] = 8 if units * dtype.itemsize > 128 else 4
        options |= {} if chip.is_amd else {"maxnreg": 255}
        return How(True, units, 16 if chip.is_amd else 8, products, options)
    if gates and not sees_rows and (how := _shared(gates, hidden, width, rows, products, chip)):
        return how
    units = 1 << (hidden - 1).bit_length()
    if not sees_rows:
        units = min(_TILE, units)
    options["num_warps"] = min(max(_TILE, units), _THREADS) // chip.warp_size
    products = Products(torch.promote_types(dtype, torch.float32))  # torch's
    return How(not gates, units, max(1, _TILE // units), products, options)


@functools.lru_cache(maxsize=1024)
def _shared(gates: int, hidden: int, width: int, rows: int, products: Products, chip: Chip) -> How | None:
    """By programs that share heads, one a multiprocessor at most, as each waits for others; so that each reads least.

    AMD's launches do not promise that all programs run at once.
    """
    dtype, precision = products
    if chip.is_amd or dtype == torch.float64:
        return None
    depth, found = 128 // dtype.itemsize // (2 if precision == "tf32x3" else 1), []
    for units, of_rows in itertools.product((16, 32, 64), (8, 16, 32, 64)):
        programs = triton.cdiv(width, units) * (hidden // width) * triton.cdiv(rows, of_rows)
        forward, backward = gates * units + of_rows, units + of_rows  # lines of a product's next part
        stages = min(4, (chip.shared_memory - 16 * 1024) // (max(forward, 2 * backward) * depth * dtype.itemsize))
        read = forward + gates * backward
        if programs <= chip.processors and stages > 1 and (units == 16 or gates * units <= 64):  # else registers spill
            options = {"num_warps": 8 if units * of_rows > 512 else 4, "num_stages": stages}
            options["launch_cooperative_grid"] = True
            found.append((read, How(True, units, of_rows, products, options, depth)))
    return min(found, key=lambda of: of[0])[1] if found else None


def reason(cell: Cell, hidden: int, heads: int, dtype: torch.dtype, device: torch.device, rows: int) -> str:
    products = Products.of(dtype, device)
    how = choose(len(cell.gates_of_a), hidden, hidden // heads, rows, products, _chip(device), cell.sees_rows)
    if how.fused:
        return "all steps in one launch"
    return "a launch and a product a step" + ", by programs that have whole rows for their means" * cell.sees_rows


class _Direction:
    """A direction on contiguous tensors; letters as in ``evaluator.py``, and W units of a head."""

    def __init__(self, products: Products, plan: Plan, inputs: Sequence[Any]) -> None:
        x_gates, w_hh, b_hh, lengths, resets, *others = inputs[3:]
        count = len(plan.cell.states)
        self.plan, self.x_gates = plan, x_gates.contiguous()
        self.T, (self.N, self.H) = x_gates.size(0), others[0].shape
        self.states = others[:count]
        self.units = [unit.contiguous() for unit in others[count:]]
        self.units += [x_gates.new_full((self.H,), scalar) for scalar in plan.scalars]
        self.lengths = None if lengths is None else lengths.contiguous()
        self.resets = None if resets is None else resets.contiguous().view(torch.uint8)
        self.w_hh, self.A = w_hh, len(plan.cell.gates_of_a) if w_hh is not None else 0
        self.K: int = 1 if w_hh is None else w_hh.size(0)
        self.W = self.H // self.K
        by_head = None if b_hh is None else b_hh.view(self.A, self.K, 1, self.W).permute(1, 2, 0, 3)
        self.bias = None if by_head is None else by_head.flatten(2).contiguous()  # flat, it may still be a view
        chip = _chip(x_gates.device)
        self.how = choose(self.A, self.H, self.W, self.N, products, chip, plan.cell.sees_rows)
        self.multiplied = self.how.products.dtype
        self.own_w = None  # for products within the kernel
        if self.A and self.how.fused:
            self.own_w = w_hh.to(self.multiplied, memory_format=torch.contiguous_format)
        self.programs = triton.cdiv(self.N, self.how.rows), self.K * triton.cdiv(self.W, self.how.units), 1
        self.met = None
        if self.how.depth:
            self.met = torch.zeros(self.programs[0], self.K, dtype=torch.int32, device=x_gates.device)
        # Zero in steps that the kernels leave out.
        self.new_rows = x_gates.new_empty if lengths is None else x_gates.new_zeros

    def by_head(self, rows: Tensor) -> Tensor:
        """[N, K*columns] as [K, N, columns]."""
        return rows.view(self.N, self.K, -1).transpose(0, 1)

    def launch(self, kernel: Any, cell: Any, *operands: Any, first: int, last: int, **of_kernel: Any) -> None:
        how, (rows, *_) = self.how, self.programs
        grid = self.programs if self.own_w is not None else (rows, triton.cdiv(self.H, how.units), 1)
        kernel[grid](
            *operands, self.met, self.lengths, self.resets, first=first, last=last, T=self.T, N=self.N, H=self.H,
            W=self.W, CELL=cell, X=len(self.plan.cell.gates_of_x), A=self.A, REVERSE=int(self.plan.reverse),
            FUSED=self.at_once, BH=how.units, BN=how.rows, BK=how.depth,
            ALIGN=math.gcd(self.W, 16), PRECISION=how.products.precision, **how.options, **of_kernel,
        )  # fmt: skip

    @property
    def at_once(self) -> bool:
        """All steps. Triton's interpreter runs programs one after another, so none may wait for others there."""
        return self.how.fused and not (self.how.depth and triton.knobs.runtime.interpret)

    @property
    def launches(self) -> range:
        """The first step of each."""
        return range(0, self.T, self.T if self.at_once else 1)


def _forward(products: Products, plan: Plan, inputs: Sequence[Any], keep: bool) -> Any:
    k, (step, _) = _Direction(products, plan, inputs), steps_of(plan.cell)
    T, N, H, A = k.T, k.N, k.H, k.A
    after = tuple(state.clone(memory_format=torch.contiguous_format) for state in k.states)
    every = tuple(k.new_rows(T, N, H) for _ in after)
    before = tuple(k.new_rows(T, N, H) for _ in after) if keep else None
    a_gates = k.new_rows(T if keep else 1, N, A * H)
    if k.x_gates.numel():
        given_h = None if k.met is None else after[0].to(k.multiplied).repeat(2, 1, 1)
        launch = functools.partial(
            k.launch, flex_kernels.forward, step, k.x_gates, a_gates, after, every, before,
            tuple(k.units), k.own_w, None if k.own_w is None else k.bias, given_h, INITIAL=tuple(plan.cell.initial),
        )  # fmt: skip
        for s in k.launches:
            if not k.how.fused:
                out = k.by_head(a_gates[(T - 1 - s if plan.reverse else s) if keep else 0])
                if k.bias is None:
                    torch.bmm(k.by_head(after[0]), k.w_hh.mT, out=out)
                else:
                    torch.baddbmm(k.bias, k.by_head(after[0]), k.w_hh.mT, out=out)
            launch(first=s, last=s + k.launches.step)
    return after, every, () if before is None else (*before, a_gates)


def _backward(
    products: Products, plan: Plan, inputs: Sequence[Any], kept: Sequence[Tensor], needs: Sequence[bool],
    d_every: Sequence[Tensor | None], d_after: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:  # fmt: skip
    k, (_, step) = _Direction(products, plan, inputs), steps_of(plan.cell)
    T, N, H, A = k.T, k.N, k.H, k.A
    *before, a_gates = kept
    d_states = tuple(state.new_zeros(N, H) if grad is None else grad.clone(memory_format=torch.contiguous_format)
                     for state, grad in zip(k.states, d_after))  # fmt: skip
    dx_gates, da_gates = k.new_rows(k.x_gates.shape), k.new_rows(T, N, A * H, dtype=k.multiplied)
    d_units = k.x_gates.new_zeros(len(plan.cell.weights), 1, N, H)
    if k.x_gates.numel():
        launch = functools.partial(
            k.launch, flex_kernels.backward, step, k.x_gates, a_gates, tuple(before), tuple(k.units),
            tuple(k.x_gates if grad is None else grad.contiguous() for grad in d_every), d_states, dx_gates,
            da_gates, tuple(d_units.unbind()), k.own_w, EVERY=tuple(grad is not None for grad in d_every),
        )  # fmt: skip
        is_shared = bool(k.how.depth)
        for s in reversed(k.launches):
            launch(first=s, last=s + k.launches.step, ENDS=is_shared and k.at_once)
            if not k.how.fused:
                t = T - 1 - s if plan.reverse else s
                through = k.by_head(d_states[0])
                torch.baddbmm(through, k.by_head(da_gates[t]), k.w_hh, out=through)
        if is_shared and not k.at_once:
            launch(first=0, last=0, ENDS=True)
    dw_hh = db_hh = None
    if k.w_hh is not None:
        by_head = da_gates.view(T * N, k.K, A * k.W)
        h = before[0].view(T * N, k.K, k.W).transpose(0, 1)
        dw_hh = torch.bmm(by_head.permute(1, 2, 0), h.to(k.multiplied)).to(k.w_hh.dtype)
        if k.bias is not None:
            db_hh = by_head.sum(0, dtype=k.bias.dtype).view(k.K, A, k.W).transpose(0, 1).flatten()
    return None, None, None, dx_gates, dw_hh, db_hh, None, None, *d_states, *d_units.sum((1, 2))


def _on_device(function: Callable[..., Any], products: Products) -> Callable[..., Any]:
    def on_device(plan: Plan, inputs: Sequence[Any], *others: Any) -> Any:
        with gpu._on(inputs[3].device):
            return function(products, plan, inputs, *others)

    return on_device


@functools.cache
def _kernels(products: Products) -> evaluator.Kernels:
    return evaluator.Kernels(_on_device(_forward, products), _on_device(_backward, products))


def run(plan: Plan, *inputs: Any) -> tuple[Tensor, ...]:
    """As ``evaluator.in_plain_torch``, of float32 or float64."""
    x, w_ih, b_ih, z_gates, w_hh, b_hh, lengths, resets, *others = inputs
    if w_hh is not None and w_hh.dim() == 2:
        w_hh = w_hh.unsqueeze(0)
    x_gates = evaluator.gates_of_x(x, w_ih, b_ih, z_gates, others[0].dtype)
    if resets is not None and not plan.reverse and x_gates.size(0):  # the kernels cut what leaves a step
        begins = resets[0] if lengths is None else resets[0] & (lengths > 0)
        count = len(plan.cell.states)
        cut = [torch.where(begins[:, None], value, state) for value, state in zip(plan.cell.initial, others)]
        others = [*cut, *others[count:]]
    kernels = _kernels(Products.of((x_gates if x is None else x).dtype, x_gates.device))
    return evaluator.by_kernels(kernels, plan, [None, None, None, x_gates, w_hh, b_hh, lengths, resets, *others])
