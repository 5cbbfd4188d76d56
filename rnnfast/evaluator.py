"""A layer of any cell, and a direction of its recurrence: as a loop in plain torch, and by the CPU library, which goes
through the traced operations strip by strip.

Letters as in ``flex.py``; S states, and U weights of each unit's own. Both take, beside a Plan, the inputs

    x_gates           [T, N, X*H], W_ih x + b_ih, of the gates whose x the cell reads
    w_hh, b_hh        [K, A*H/K, H/K] and [A*H], of the gates whose a it reads; or None
    lengths, resets   int64 [N] and bool [T, N]; or None
    states            S of [N, H], before all steps
    units             U of [H]

all of one dtype, and return each state after every step, [T, N, H] and zero beyond a row's end, then those after the
last one, [N, H].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .backends import BACKENDS, DTYPES, USUAL, circumstances
from .cells import PRIMITIVES, Cell, Named, Primitive, Program, Value, _primitive, maximum, minimum
from .recurrence import _one_by_one, _save, _saved
from .reference import _Sequence, _stack, valid_steps

# As csrc/cpu/flex.h numbers them.
OPERATIONS = (
    "add", "subtract", "multiply", "divide", "negate", "sigmoid", "tanh", "relu", "exp", "log", "log1p", "sqrt", "abs",
    "minimum", "maximum", "where", "less", "less_equal", "where_positive",
    "mean",
)  # fmt: skip


class _ClipGradient(torch.autograd.Function):
    """A tensor as it is; its gradient within -bound and bound."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, bound: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (bound,) = ctx.saved_tensors
        return grad.clamp(-bound, bound), None


PRIMITIVES["clip_gradient"] = Primitive(
    lambda a, bound: _ClipGradient.apply(a, bound),  # type: ignore[no-untyped-call]
    lambda d, y, a, bound: (minimum(maximum(d, -bound), bound), None),
)
clip_gradient = functools.partial(_primitive, "clip_gradient")


class Plan(NamedTuple):
    """What of a direction does not change from call to call."""

    cell: Cell
    scalars: tuple[float, ...]
    reverse: bool


@functools.cache
def without_matrix(cell: Cell, recurrent: str, bias: bool) -> Cell:
    """A cell that makes a of its own unit's h, by weights of each unit's own, or of nothing; then its last scalar is
    that: 0."""
    read = [cell.gates[gate] for gate in cell.gates_of_a] if recurrent == "diagonal" else []
    own = [f"{gate} of {which}" for which in ("W_hh", "b_hh")[: 1 + bias] for gate in read]

    def function(x: Any, a: Any, s: Any, w: Any) -> Any:
        of_gates = dict.fromkeys(cell.gates, getattr(w, "0"))
        for gate in read:
            product = getattr(s, cell.states[0]) * getattr(w, f"{gate} of W_hh")
            of_gates[gate] = product + getattr(w, f"{gate} of b_hh") if bias else product
        takes_w = bool(cell.weights or cell.scalars)
        return cell.function(x, Named("a", cell.gates, list(of_gates.values())), s, *[w] * takes_w)

    initial = dict(zip(cell.states, cell.initial))
    assert isinstance(function, FunctionType)
    made = Cell(function, cell.gates, cell.states, [*cell.weights, *own], {**cell.scalars, "0": 0.0}, initial)
    made.check()
    made.origin = without_matrix, (cell, recurrent, bias)
    return made


def in_plain_torch(plan: Plan, x_gates: Tensor, w_hh: Tensor | None, b_hh: Tensor | None, lengths: Tensor | None,
                   resets: Tensor | None, *others: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """The loop: any device, dtype and derivative."""
    cell = plan.cell
    steps, count = x_gates.size(0), len(cell.states)
    sequence = _Sequence(None if lengths is None else valid_steps(steps, lengths), resets, plan.reverse)
    states = others[:count]
    # For each row: what a step makes of them alone has its gradient clipped by row, too.
    units = [unit.expand_as(states[0]) for unit in others[count:]]
    hidden = states[0].size(1)
    scalars = [x_gates.new_full((), scalar) for scalar in plan.scalars]
    numbers = cell.program.tensors(x_gates)
    # What no gate reads is in the places of the program, but nothing looks there.
    unread: Any = None
    of_x, of_a = [unread] * len(cell.gates), [unread] * len(cell.gates)
    every: list[list[Tensor]] = [[state] * steps for state in states]
    for t in sequence.steps(steps):
        states = tuple(sequence.cut(t, state, value) for state, value in zip(states, cell.initial))
        for gate, values in zip(cell.gates_of_x, x_gates[t].split(hidden, 1)):
            of_x[gate] = values
        if w_hh is not None:
            for gate, values in zip(cell.gates_of_a, _recurrent(states[0], w_hh, b_hh).split(hidden, 1)):
                of_a[gate] = values
        found = cell.program.run([*of_x, *of_a, *states, *units, *scalars], numbers)
        after = [new.to(old.dtype).expand_as(old) for new, old in zip(found, states)]
        for k, new in enumerate(after):
            every[k][t] = sequence.where_valid(t, new)
        states = tuple(sequence.where_valid(t, new, old) for new, old in zip(after, states))
    return *(_stack(of, state) for of, state in zip(every, states)), *states


def _recurrent(h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """``W_hh h + b_hh``, [N, A*H], of h [N, H]."""
    if w_hh.size(0) == 1:
        return F.linear(h, w_hh[0], b_hh)
    by_gate = w_hh.unflatten(1, (-1, w_hh.size(2)))  # [K, A, H/K, H/K]
    product = torch.einsum("nkj,kgij->ngki", h.unflatten(1, (w_hh.size(0), -1)), by_gate).flatten(1)
    return product if b_hh is None else product + b_hh


def on_cpu(plan: Plan, *inputs: Any) -> tuple[Tensor, ...]:
    """By the CPU library, of float32 or float64."""
    return by_kernels(_CPU, plan, inputs)


class Kernels(NamedTuple):
    """A backend's, of float32 or float64."""

    # plan, inputs, whether for a backward -> states after, every, and what the backward is given: h before every step,
    # and what else it wants; or nothing
    forward: Callable[[Plan, Sequence[Any], bool], tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]]
    # plan, inputs, that, gradients of every (or None) and of the states after -> those of x_gates, of a_gates (empty
    # where they are those of x_gates), of the states, and what stretches of steps add to those of the units' weights,
    # [stretches, N, U*H]
    backward: Callable[[Plan, Sequence[Any], Sequence[Tensor], Sequence[Any], Sequence[Tensor]], Any]


def by_kernels(kernels: Kernels, plan: Plan, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """With all derivatives."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        found: tuple[Tensor, ...] = _Recurrence.apply(kernels, plan, *inputs)  # type: ignore[no-untyped-call]
        return found
    after, every, _ = kernels.forward(plan, inputs, False)
    return *every, *after


class _Programs(NamedTuple):
    """As the operators take them: operations, numbers, results."""

    forward: tuple[Tensor, Tensor, Tensor]
    keeping: tuple[Tensor, Tensor, Tensor]  # what the backward needs of it, beside the states, too
    backward: tuple[Tensor, Tensor, Tensor]
    initial: Tensor
    of_rows: int  # of what is kept beside the states how many are a number for all units of a row, which are last


@functools.lru_cache(maxsize=1024)
def programs(cell: Cell, scalars: tuple[float, ...], heads: int) -> _Programs:
    of = cell.inputs
    x, a = [of["x"][gate] for gate in cell.gates_of_x], [of["a"][gate] for gate in cell.gates_of_a]
    inputs = [*x, *a, *of["s"], *of["w"]]
    saved = sorted((value for value in cell.saved if value not in of["scalars"]), key=lambda value: value.of_row)
    gradients = [cell.adjoints.get(value, 0.0) for value in inputs]
    # Of gates that are read in sums of x and a alone there is one gradient.
    if heads == 1 and cell.gates_of_x == cell.gates_of_a and gradients[: len(x)] == gradients[len(x) : 2 * len(x)]:
        del gradients[: len(x)]
    # A result has to be made: one that is an input could be written over before it is read.
    results = [of if isinstance(of, Value) and of.op else Value("add", of, 0.0) for of in gradients]

    def encoded(program: Program) -> tuple[Tensor, Tensor, Tensor]:
        # Of the forward a clipped gradient is the value as it is.
        as_it_is = [("where", args[:1] * 3) if op == "clip_gradient" else (op, args) for op, args in program.operations]
        rows = [[OPERATIONS.index(op), *args, *[0] * (3 - len(args))] for op, args in as_it_is]
        return (
            torch.tensor(rows, dtype=torch.int64).view(-1, 4),
            torch.tensor([*scalars, *program.numbers], dtype=torch.float64),
            torch.tensor(program.results, dtype=torch.int64),
        )

    return _Programs(
        encoded(Program.of(cell.after, [*inputs, *of["scalars"]])),
        encoded(Program.of([*cell.after, *saved], [*inputs, *of["scalars"]])),
        encoded(Program.of(results, [*saved, *of["s"], *cell.after, *of["w"], *cell.incoming, *of["scalars"]])),
        torch.tensor(cell.initial, dtype=torch.float64),
        sum(value.of_row for value in saved),
    )


def _programs(plan: Plan, w_hh: Tensor | None) -> _Programs:
    return programs(plan.cell, plan.scalars, 1 if w_hh is None else w_hh.size(0))


def _forward(plan: Plan, inputs: Sequence[Any], keep: bool) -> Any:
    x_gates, w_hh, b_hh, lengths, resets, *others = inputs
    states, units = others[: len(plan.cell.states)], others[len(plan.cell.states) :]
    made = _programs(plan, w_hh)
    program = made.keeping if keep else made.forward
    after, every, before, saved = torch.ops.rnnfast.cpu_flex_forward(
        *program, x_gates, w_hh, b_hh, states, units, made.initial, lengths, resets, plan.reverse, keep,
        made.of_rows if keep else 0,
    )  # fmt: skip
    return after, every, (*before, *every, saved) if keep else ()


def _backward(
    plan: Plan, inputs: Sequence[Any], kept: Sequence[Tensor], d_every: Sequence[Tensor | None],
    d_after: Sequence[Tensor],
) -> Any:  # fmt: skip
    x_gates, w_hh, _, lengths, resets, *others = inputs
    count = len(d_after)
    before, every, units = kept[:count], kept[count : 2 * count], others[count:]
    given = [x_gates.new_empty(0) if grad is None else grad for grad in d_every]
    made = _programs(plan, w_hh)
    return torch.ops.rnnfast.cpu_flex_backward(
        *made.backward, w_hh, before, every, units, kept[-1], lengths, resets, given, d_after,
        len(plan.cell.gates_of_x), plan.reverse, made.of_rows,
    )  # fmt: skip


_CPU = Kernels(_forward, _backward)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, plan: Plan, *inputs: Any) -> Any:
        ctx.kernels, ctx.plan = kernels, plan
        ctx.set_materialize_grads(False)
        after, every, kept = kernels.forward(plan, inputs, True)
        ctx.given = len(inputs)
        _save(ctx, (*inputs, *kept))
        return *every, *after

    @staticmethod
    @_one_by_one
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan, count = ctx.plan, len(ctx.plan.cell.states)
        values = _saved(ctx)
        inputs, kept = values[: ctx.given], values[ctx.given :]
        if torch.is_grad_enabled():
            return None, None, *_derivable_backward(plan, inputs, ctx.needs_input_grad[2:], grads)
        x_gates, w_hh, b_hh, _, _, *others = inputs
        states, units = others[:count], others[count:]
        d_after = [torch.zeros_like(s) if grad is None else grad for s, grad in zip(states, grads[count:])]
        found = ctx.kernels.backward(plan, inputs, kept, grads[:count], d_after)
        dx_gates, da_gates, d_states, d_units = found
        dw_hh = db_hh = None
        if w_hh is not None:
            heads, columns, width = w_hh.shape
            rows = x_gates.size(0) * x_gates.size(1)
            of_a = (da_gates if da_gates.size(2) else dx_gates).view(rows, heads, columns)
            dw_hh = torch.bmm(of_a.permute(1, 2, 0), kept[0].view(rows, heads, width).transpose(0, 1))
            if b_hh is not None:
                db_hh = of_a.sum(0).view(heads, -1, width).transpose(0, 1).flatten()
        of_units = d_units.sum((0, 1)).split(states[0].size(1)) if units else ()
        return None, None, dx_gates, dw_hh, db_hh, None, None, *d_states, *of_units


def _derivable_backward(plan: Plan, inputs: Sequence[Any], needs: Sequence[bool], grads: Sequence[Any]) -> list[Any]:
    """The gradients, through plain torch, by which they can be derived again."""
    at = [t.view_as(t) if need else t for t, need in zip(inputs, needs)]
    wanted = [t for t, need in zip(at, needs) if need]
    pairs = zip(in_plain_torch(plan, *at), grads)
    derived = [(of, grad) for of, grad in pairs if grad is not None and of.requires_grad]
    if not derived:
        return [None] * len(inputs)
    outputs, of_outputs = zip(*derived)
    found = iter(torch.autograd.grad(outputs, wanted, of_outputs, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _by_triton(*inputs: Any) -> tuple[Tensor, ...]:
    """Triton takes time to import, and may be missing."""
    from .triton.flex import run

    return run(*inputs)


RUN: dict[str, Callable[..., tuple[Tensor, ...]]]  # by backend
RUN = {"reference": in_plain_torch, "cpu": on_cpu, "triton": _by_triton}


def choose(device: torch.device, dtype: torch.dtype, cell: Cell, hidden: int, heads: int = 1) -> tuple[str, str]:
    """As ``choose_backend``: which of RUN serves a call, and why."""
    made = circumstances()
    # The CUDA library has torch's cells and the peephole LSTM: of others those who ask for it get Triton's kernels.
    asked = "triton" if made.forced == "cuda" else made.forced
    name = asked or {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    if name == "reference":
        return name, "asked for by use_backend" if asked else f"no kernels for device {device.type!r}"
    if name not in RUN:
        why_not = "its kernels are of torch's cells"
    elif made._replace(forced=None) != USUAL:  # first: torch.compile cannot trace what asks for a GPU
        why_not = "derivatives, graphs and transforms of torch's go through plain torch"
    elif name == "triton" and cell.sees_rows:
        why_not = "a step sees whole rows of units, which Triton's kernels have in pieces"
    elif not (found := BACKENDS[name].probe(device)).available:
        why_not = found.detail
    elif dtype not in DTYPES:
        why_not = f"no kernel for {dtype}"
    else:
        return name, _how(name, device, dtype, cell, hidden, heads)
    if asked:
        raise RuntimeError(f"backend {made.forced!r} cannot serve this call: {why_not}")
    return "reference", why_not


def _how(name: str, device: torch.device, dtype: torch.dtype, cell: Cell, hidden: int, heads: int) -> str:
    """What a backend does."""
    if name == "cpu":
        return "the evaluator of the native library goes through the cell's operations"
    from .triton.flex import reason

    lacks = "" if device.type == "cpu" else "cuda has no kernels of this cell, "
    return f"{lacks}Triton compiles it: {reason(cell, hidden, heads, dtype, device)}"


# Of one direction, by the names that FlexRNN has for its parameters, without what they end in.
_Weights: TypeAlias = Mapping[str, Tensor]


def no_autocast(kind: str) -> AbstractContextManager[Any]:
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def layer(
    run: Callable[..., tuple[Tensor, ...]],
    plans: Sequence[Plan],
    x: Tensor,
    states: Sequence[Tensor] | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    directions: Sequence[_Weights],
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each state what it is after every step, [T, N, D*H], and in the end, [D, N, H]; run is one of RUN."""
    acc = torch.promote_types(x.dtype, torch.float32)
    runs = []
    for d, (plan, weights) in enumerate(zip(plans, directions)):
        x_gates = F.linear(x, weights["weight_ih"], weights.get("bias_ih")).to(acc)
        hidden = weights["weight_ih"].size(0) // len(plan.cell.gates_of_x)
        others = {name: w.to(acc) for name, w in weights.items() if name not in ("weight_ih", "bias_ih")}
        w_hh, b_hh = others.pop("weight_hh", None), others.pop("bias_hh", None)
        units = list(others.values())
        if w_hh is not None and w_hh.dim() == 1:  # of a cell without_matrix
            units += [*w_hh.split(hidden), *(() if b_hh is None else b_hh.split(hidden))]
            w_hh = b_hh = None
        elif w_hh is not None and w_hh.dim() == 2:
            w_hh = w_hh.unsqueeze(0)
        before = (
            [x_gates.new_full((x.size(1), hidden), value) for value in plan.cell.initial]
            if states is None
            else [state[d].to(acc) for state in states]
        )
        found = run(plan, x_gates, w_hh, b_hh, lengths, resets, *before, *units)
        runs.append((found[: len(before)], found[len(before) :]))
    every, final = zip(*runs)
    joined = every[0] if len(runs) == 1 else [torch.cat(of, 2) for of in zip(*every)]
    return [of.to(x.dtype) for of in joined], [torch.stack(of).to(x.dtype) for of in zip(*final)]


def recomputed(layer: Callable[..., Any]) -> Callable[..., Any]:
    """The same, keeping for the backward only what enters it; random numbers are the same when it runs once more."""
    # Within transforms of torch.func there are no hooks to make anew what was kept.
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return layer
    return functools.partial(checkpoint, layer, use_reentrant=False)
