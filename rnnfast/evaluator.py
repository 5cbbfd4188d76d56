"""A layer of any cell, and a direction of its recurrence: as a loop in plain torch, and by the CPU library, which goes
through the traced operations strip by strip.

Letters as in ``flex.py``; S states, and U weights of each unit's own. Both take, beside a Plan, the inputs

    x, w_ih, b_ih     [T, N, I], [X*H, I] and [X*H]: W_ih x + b_ih are the first gates whose x the cell reads; or None
    z_gates           [T, N, Z*H], those that follow; or None
    w_hh, b_hh        [A*H, H], or of heads [K, A*H/K, H/K], and [A*H], of the gates whose a it reads; or None
    lengths, resets   int64 [N] and bool [T, N]; or None
    states            S of [N, H], before all steps
    units             U of [H]

all of one dtype but x, w_ih and b_ih, which may be narrower, and return each state after every step, [T, N, H] and zero
beyond a row's end, or anything where the Plan does not want it, then those after the last one, [N, H].
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .backends import BACKENDS, DTYPES, USUAL, circumstances
from .cells import PRIMITIVES, Cell, Named, Primitive, Program, Value, _primitive, maximum, minimum
from .ops import LIBRARY
from .recurrence import _one_by_one, _save, _saved
from .reference import _Sequence, _stack, valid_steps

_dispatch_modes = torch._C._len_torch_dispatch_stack

# As csrc/cpu/flex.h numbers them.
OPERATIONS = (
    "add", "subtract", "multiply", "divide", "negate", "sigmoid", "tanh", "relu", "exp", "log", "log1p", "sqrt", "abs",
    "minimum", "maximum", "where", "less", "less_equal", "where_positive",
    "mean",
    "sigmoid_of_sum", "tanh_of_sum", "multiply_add", "subtract_product", "multiply_difference", "multiply_twice",
)  # fmt: skip
# Two operations as one, which reads what the first one reads, and then what else the second one does: by the second,
# the place of its argument that the first one makes, and the first.
FUSED = {
    ("sigmoid", 0, "add"): "sigmoid_of_sum",
    ("tanh", 0, "add"): "tanh_of_sum",
    ("add", 0, "multiply"): "multiply_add",
    ("add", 1, "multiply"): "multiply_add",
    ("subtract", 1, "multiply"): "subtract_product",
    ("multiply", 0, "subtract"): "multiply_difference",
    ("multiply", 1, "subtract"): "multiply_difference",
    ("multiply", 0, "multiply"): "multiply_twice",
    ("multiply", 1, "multiply"): "multiply_twice",
}


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


class _ClipGradientAlone(_ClipGradient):
    """With tangents, which are no gradients and stay as they are. torch.compile refuses what has a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.view_as(tangent)


def _clip_gradient(tensor: Tensor, bound: Tensor) -> Tensor:
    function = _ClipGradient if torch.compiler.is_compiling() else _ClipGradientAlone
    found: Tensor = function.apply(tensor, bound)  # type: ignore[no-untyped-call]
    return found


PRIMITIVES["clip_gradient"] = Primitive(
    _clip_gradient,
    lambda d, y, a, bound: (minimum(maximum(d, -bound), bound), None),
)
clip_gradient = functools.partial(_primitive, "clip_gradient")


class Plan(NamedTuple):
    """What of a direction does not change from call to call."""

    cell: Cell
    scalars: tuple[float, ...]
    reverse: bool
    wanted: int | None = None  # how many states, the first ones, are asked for after every step; None: all


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


def gates_of_x(x: Tensor | None, w_ih: Tensor | None, b_ih: Tensor | None, z_gates: Tensor | None,
               dtype: torch.dtype) -> Tensor:  # fmt: skip
    """All gates that are read beside a, [T, N, (X + Z)*H]."""
    given = [] if z_gates is None else [z_gates]
    made = [] if x is None else [F.linear(x, w_ih, b_ih).to(dtype)]  # type: ignore[arg-type]  # then w_ih is there, too
    return torch.cat([*made, *given], 2) if made and given else (made or given)[0]


def in_plain_torch(plan: Plan, x: Tensor | None, w_ih: Tensor | None, b_ih: Tensor | None, z_gates: Tensor | None,
                   w_hh: Tensor | None, b_hh: Tensor | None, lengths: Tensor | None, resets: Tensor | None,
                   *others: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """The loop: any device, dtype and derivative."""
    x_gates = gates_of_x(x, w_ih, b_ih, z_gates, others[0].dtype)
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
    if w_hh.dim() == 2:
        return F.linear(h, w_hh, b_hh)
    by_gate = w_hh.unflatten(1, (-1, w_hh.size(2)))  # [K, A, H/K, H/K]
    product = torch.einsum("nkj,kgij->ngki", h.unflatten(1, (w_hh.size(0), -1)), by_gate).flatten(1)
    return product if b_hh is None else product + b_hh


def on_cpu(plan: Plan, x: Any, w_ih: Any, b_ih: Any, *inputs: Any) -> tuple[Tensor, ...]:
    """By the CPU library, of states in float32 or float64."""
    of_x, dtype = [x, w_ih, b_ih], inputs[5].dtype
    if x is not None and x.dtype != dtype:
        of_x = [t if t is None else t.to(dtype) for t in of_x]
    return by_kernels(_CPU, plan, [*of_x, *inputs])


class Kernels(NamedTuple):
    """A backend's, of float32 or float64."""

    # plan, inputs, whether for a backward -> states after, every, and what the backward is given, if there is one
    forward: Callable[[Plan, Sequence[Any], bool], tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]]
    # plan, inputs, that, which inputs want gradients, gradients of every and of the states after, each or None -> those
    # of the inputs
    backward: Callable[
        [Plan, Sequence[Any], Sequence[Tensor], Sequence[bool], Sequence[Any], Sequence[Any]],
        Sequence[Tensor | None],
    ]


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
    plain: list[Tensor]  # the forward, as cpu_flex_plain takes it


def hexadecimal(scalars: Iterable[float]) -> tuple[str, ...]:
    return tuple(float(scalar).hex() for scalar in scalars)


def programs(cell: Cell, scalars: tuple[str, ...], heads: int, made: int) -> _Programs:
    """Of scalars that are hexadecimal, as 0.0 and -0.0 are the same key; made: X, the gates that W_ih x makes."""
    # What is made within a mode, as FakeTensorMode, is fit for nothing outside of it.
    return (_programs_of.__wrapped__ if _dispatch_modes() else _programs_of)(cell, scalars, heads, made)


@functools.lru_cache(maxsize=1024)
def _programs_of(cell: Cell, scalars: tuple[str, ...], heads: int, made: int) -> _Programs:
    of = cell.inputs
    x, a = [of["x"][gate] for gate in cell.gates_of_x], [of["a"][gate] for gate in cell.gates_of_a]
    inputs = [*x, *a, *of["s"], *of["w"]]
    saved = sorted((value for value in cell.saved if value not in of["scalars"]), key=lambda value: value.of_row)
    gradients = [cell.adjoints.get(value, 0.0) for value in inputs]
    # Of gates that are read in sums of x and a alone there is one gradient.
    of_a = slice(len(x), len(x) + len(a))
    are_first = heads == 1 and made >= len(a) and cell.gates_of_x[: len(a)] == cell.gates_of_a
    if are_first and gradients[: len(a)] == gradients[of_a]:
        del gradients[of_a]
    # A result has to be made: one that is an input could be written over before it is read.
    results = [of if isinstance(of, Value) and of.op else Value("add", of, 0.0) for of in gradients]

    integers = functools.partial(torch.tensor, dtype=torch.int64, device="cpu")  # whatever the default device is
    floats = functools.partial(torch.tensor, dtype=torch.float64, device="cpu")

    def encoded(results: Sequence[Value], *inputs: Value) -> tuple[Tensor, Tensor, Tensor]:
        program = Program.of(results, [*inputs, *of["scalars"]])
        # Of the forward a clipped gradient is the value as it is.
        as_it_is = [("where", args[:1] * 3) if op == "clip_gradient" else (op, args) for op, args in program.operations]
        first = len(inputs) + len(scalars) + len(program.numbers)
        operations, places = _fused(as_it_is, program.results, first)
        rows = [[OPERATIONS.index(op), *args, *[0] * (3 - len(args))] for op, args in operations]
        numbers = [*map(float.fromhex, scalars), *program.numbers]
        return integers(rows).view(-1, 4), floats(numbers), integers(places)

    keeping = encoded([*cell.after, *saved], *inputs)
    # The same operations, so that the states are the same to the bit whether a backward follows or not.
    forward = *keeping[:2], keeping[2][: len(cell.after)]
    backward = encoded(results, *saved, *of["s"], *cell.after, *of["w"], *cell.incoming)
    initial = floats(cell.initial)
    plain = [*forward, initial, integers([len(x), len(a), len(of["w"])])]
    return _Programs(forward, keeping, backward, initial, sum(value.of_row for value in saved), plain)


def _fused(
    operations: Sequence[tuple[str, tuple[int, ...]]], results: Sequence[int], first: int
) -> tuple[list[tuple[str, tuple[int, ...]]], list[int]]:
    """With two operations as one where FUSED has it and nothing else reads what the first one makes; first: the place
    of what the first of all makes."""
    uses = Counter([*(arg for _, args in operations for arg in args), *results])
    found: dict[int, tuple[str, tuple[int, ...]]] = {}  # by the place of what it makes
    for place, (op, args) in enumerate(operations, first):
        found[place] = op, args
        for at, arg in enumerate(args):
            made, read = found.get(arg, ("", ()))
            if uses[arg] == 1 and (both := FUSED.get((op, at, made))):
                found[place] = both, (*read, *args[:at], *args[at + 1 :])
                del found[arg]
                break
    places = list(range(first)) + [0] * len(operations)
    for place, kept in enumerate(found, first):
        places[kept] = place
    return [(op, tuple(places[arg] for arg in args)) for op, args in found.values()], [places[k] for k in results]


def _is_of_heads(w_hh: Tensor | None) -> TypeGuard[Tensor]:
    return w_hh is not None and w_hh.dim() == 3


def _programs(plan: Plan, w_ih: Tensor | None, w_hh: Tensor | None, state: Tensor) -> _Programs:
    made, heads = 0 if w_ih is None else w_ih.size(0) // state.size(-1), w_hh.size(0) if _is_of_heads(w_hh) else 1
    return programs(plan.cell, hexadecimal(plan.scalars), heads, made)


def _forward(plan: Plan, inputs: Sequence[Any], keep: bool) -> Any:
    x, w_ih, b_ih, z_gates, w_hh, b_hh, lengths, resets, *others = inputs
    states, units = others[: len(plan.cell.states)], others[len(plan.cell.states) :]
    made = _programs(plan, w_ih, w_hh, states[0])
    program = made.keeping if keep else made.forward
    after, every, saved = torch.ops.rnnfast.cpu_flex_forward(
        *program, x, w_ih, b_ih, z_gates, w_hh, b_hh, states, units, made.initial, lengths, resets, plan.reverse, keep,
        made.of_rows if keep else 0, -1 if keep or plan.wanted is None else plan.wanted,
    )  # fmt: skip
    return after, every, (*every, saved) if keep else ()


def _backward(
    plan: Plan, inputs: Sequence[Any], kept: Sequence[Tensor], needs: Sequence[bool], d_every: Sequence[Tensor | None],
    d_after: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:  # fmt: skip
    x, w_ih, _, z_gates, w_hh, _, lengths, resets, *others = inputs
    *every, saved = kept
    states, units = others[: len(every)], others[len(every) :]
    absent = saved.new_empty(0)
    given, of_final = ([absent if grad is None else grad for grad in grads] for grads in (d_every, d_after))
    made, hidden = _programs(plan, w_ih, w_hh, others[0]), others[0].size(1)
    dx, dw_ih, db_ih, dz, dw_hh, db_hh, d_states, d_units = torch.ops.rnnfast.cpu_flex_backward(
        *made.backward, x, w_ih, w_hh, states, every, units, made.initial, saved, lengths, resets, given, of_final,
        0 if z_gates is None else z_gates.size(2) // hidden, plan.reverse, needs[0], needs[3],
        any((*needs[1:3], *needs[4:6])), made.of_rows,
    )  # fmt: skip
    if _is_of_heads(w_hh) and needs[5]:
        db_hh = db_hh.view(w_hh.size(0), -1, w_hh.size(2)).transpose(0, 1).flatten()
    of_units = d_units.sum((0, 1)).split(hidden) if units else ()
    found = dx, dw_ih, db_ih, dz, dw_hh, db_hh, None, None, *d_states, *of_units
    return [grad if need else None for grad, need in zip(found, needs)]


_CPU = Kernels(_forward, _backward)


def _forward_fake(
    operations: Tensor, numbers: Tensor, results: Tensor, x: Tensor | None, w_ih: Tensor | None, b_ih: Tensor | None,
    z_gates: Tensor | None, w_hh: Tensor | None, b_hh: Tensor | None, states: Sequence[Tensor],
    units: Sequence[Tensor], initial: Tensor, lengths: Tensor | None, resets: Tensor | None, reverse: bool, keep: bool,
    R: int = 0, wanted: int = -1,
) -> Any:  # fmt: skip
    steps = z_gates if x is None else x
    assert steps is not None
    (rows, hidden), count = states[0].shape, len(states)
    of_steps, made = (steps.size(0), rows, hidden), count if wanted < 0 else wanted
    every = [s.new_empty(of_steps if k < made else 0) for k, s in enumerate(states)]
    saved = (steps.size(0), rows, (results.size(0) - count - R) * hidden + R) if keep else (0,)
    return [s.new_empty(s.shape) for s in states], every, states[0].new_empty(saved)


_UNIT_STEPS = 64  # as kUnitSteps in csrc/cpu/flex.h


def _backward_fake(
    operations: Tensor, numbers: Tensor, results: Tensor, x: Tensor | None, w_ih: Tensor | None, w_hh: Tensor | None,
    states: Sequence[Tensor], every: Sequence[Tensor], units: Sequence[Tensor], initial: Tensor, saved: Tensor,
    lengths: Tensor | None, resets: Tensor | None, d_every: Sequence[Tensor], d_final: Sequence[Tensor], Z: int,
    reverse: bool, need_dx: bool, need_dz: bool, need_dw: bool, R: int = 0,
) -> Any:  # fmt: skip
    steps, rows, hidden = every[0].shape

    def like(tensor: Tensor | None, needed: bool, dims: int | None = None) -> Tensor:
        return saved.new_empty(tensor.shape[:dims] if needed and tensor is not None else 0)

    of_w_ih, of_w_hh = ((like(w, need_dw), like(w, need_dw, -1)) for w in (w_ih, w_hh))
    dz_gates = saved.new_empty((steps, rows, Z * hidden) if need_dz else 0)
    d_units = saved.new_empty(-(-steps // _UNIT_STEPS), rows, len(units) * hidden)
    d_states = [saved.new_empty(rows, hidden) for _ in d_final]
    return like(x, need_dx), *of_w_ih, dz_gates, *of_w_hh, d_states, d_units


if hasattr(torch.ops.rnnfast, "cpu_flex_forward"):  # the library is there
    torch.library.register_fake("rnnfast::cpu_flex_forward", _forward_fake, lib=LIBRARY)
    torch.library.register_fake("rnnfast::cpu_flex_backward", _backward_fake, lib=LIBRARY)


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
        needs = ctx.needs_input_grad[2:]
        return None, None, *ctx.kernels.backward(plan, inputs, kept, needs, grads[:count], grads[count:])


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
_ROW = 4096  # units at most of a row that one of Triton's programs holds, for means; some registers spill from 2048 on
RUN = {"reference": in_plain_torch, "cpu": on_cpu, "triton": _by_triton}


def choose(
    device: torch.device, dtype: torch.dtype, cell: Cell, hidden: int, heads: int = 1, batch: int = 1
) -> tuple[str, str]:
    """As ``choose_backend``: which of RUN serves a call, and why."""
    made = circumstances()
    # Of cells of which the CUDA library has no kernels those who ask for it get Triton's.
    asked = "triton" if made.forced == "cuda" else made.forced
    name = asked or {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    if name == "reference":
        return name, "asked for by use_backend" if asked else f"no kernels for device {device.type!r}"
    if name not in RUN:
        why_not = "its kernels are of torch's cells"
    elif made is not USUAL and made._replace(forced=None) != USUAL:
        # This is asked first: torch.compile cannot trace what asks for a GPU.
        why_not = "derivatives, graphs and transforms of torch's go through plain torch"
    elif name == "triton" and cell.sees_rows and hidden > _ROW:
        why_not = f"a step takes means over a row, of which Triton's kernels have {_ROW} units at most"
    elif not (found := BACKENDS[name].probe(device)).available:
        why_not = found.detail
    elif dtype not in DTYPES:
        why_not = f"no kernel for {dtype}"
    else:
        return name, _how(name, device, dtype, cell, hidden, heads, batch)
    if asked:
        raise RuntimeError(f"backend {made.forced!r} cannot serve this call: {why_not}")
    return "reference", why_not


def _how(name: str, device: torch.device, dtype: torch.dtype, cell: Cell, hidden: int, heads: int, batch: int) -> str:
    """What a backend does."""
    if name == "cpu":
        return "the evaluator of the native library goes through the cell's operations"
    from .triton.flex import reason

    lacks = device.type != "cpu" and circumstances().forced != "triton" and BACKENDS["cuda"].probe(device).available
    why = "cuda has no kernels of such a layer, " if lacks else ""
    return f"{why}Triton compiles it: {reason(cell, hidden, heads, dtype, device, batch)}"


# Of one direction, by the names that FlexRNN has for its parameters, without what they end in.
_Weights: TypeAlias = Mapping[str, Tensor]


def no_autocast(kind: str) -> AbstractContextManager[Any]:
    disables = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if disables else nullcontext()


def layer(
    run: Callable[..., tuple[Tensor, ...]],
    plans: Sequence[Plan],
    x: Tensor,
    states: Sequence[Tensor] | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    directions: Sequence[_Weights],
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each state that the plans want what it is after every step, [T, N, D*H], and of each what it is in the end,
    [D, N, H]; run is one of RUN."""
    acc = torch.promote_types(x.dtype, torch.float32)
    same = x.dtype == acc
    runs = []
    for d, (plan, weights) in enumerate(zip(plans, directions)):
        w_ih, b_ih = weights["weight_ih"], weights.get("bias_ih")
        hidden = w_ih.size(0) // len(plan.cell.gates_of_x)
        of_step = {name: w for name, w in weights.items() if name not in ("weight_ih", "bias_ih")}
        others = of_step if same else {name: w.to(acc) for name, w in of_step.items()}
        w_hh, b_hh = others.pop("weight_hh", None), others.pop("bias_hh", None)
        units = list(others.values())
        if w_hh is not None and not plan.cell.gates_of_a:  # of a cell without_matrix
            units += [*w_hh.split(hidden), *(() if b_hh is None else b_hh.split(hidden))]
            w_hh = b_hh = None
            if len(units) != len(plan.cell.weights):
                raise RuntimeError(f"the cell has {len(plan.cell.weights)} weights of units, got {len(units)}")
        elif w_hh is not None and w_hh.dim() < 2:
            raise RuntimeError(f"weight_hh of a dense recurrence must be 2D or 3D, got {w_hh.dim()}D instead")
        before = (
            [x.new_full((x.size(1), hidden), value, dtype=acc) for value in plan.cell.initial]
            if states is None
            else [state[d] if same else state[d].to(acc) for state in states]
        )
        found = run(plan, x, w_ih, b_ih, None, w_hh, b_hh, lengths, resets, *before, *units)
        runs.append((found[: len(before)], found[len(before) :]))
    is_one = len(runs) == 1
    every, final = ([*zip(*of)] for of in zip(*runs))  # of each state, by direction
    joined = [of[0] if is_one else torch.cat(of, 2) for of in every[: plans[0].wanted]]
    stacked = [of[0].unsqueeze(0) if is_one else torch.stack(of) for of in final]
    return (joined, stacked) if same else ([of.to(x.dtype) for of in joined], [of.to(x.dtype) for of in stacked])


def recomputed(layer: Callable[..., Any]) -> Callable[..., Any]:
    """The same, keeping for the backward only what enters it; random numbers are the same when it runs once more."""
    # Within transforms of torch.func there are no hooks to make anew what was kept.
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return layer
    return functools.partial(checkpoint, layer, use_reentrant=False)
