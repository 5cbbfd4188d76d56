"""The operators: what a backend's kernels are called as, and what torch has to know of them.

A backend is a pair of ``torch.library`` ops, ``rnnfast::NAME_forward`` and ``rnnfast::NAME_backward``, that nothing
traces into, and the first once more for exported programs, ``rnnfast::NAME_layer``. Letters as in ``reference.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import border, records, reference
from .backends import BACKENDS, WITH_OPERATORS
from .cells import GATES, GRADIENTS, HAS_CELL_STATE, SAVED_GATES, UNIT_WEIGHTS
from .records import GateGradients, InputGradients, Inputs, OutputGradients, Outputs, Saved

OPERATORS: dict[tuple[str, str], torch._ops.OpOverload] = {}  # by backend and direction
LIBRARY = torch.library.Library("rnnfast", "DEF")
_CONTIGUOUS = torch.contiguous_format


_OF_BACKWARD = (OutputGradients, Saved)


def of_records(function: Callable[..., Any], *more: type[NamedTuple]) -> Callable[..., Any]:
    """A function of Inputs, more records and other arguments, as torch calls it: with their fields one by one."""
    more = (Inputs, *more)
    counts = [(record, len(record._fields)) for record in more]

    def run(*args: Any, **options: Any) -> Any:
        made, first = [], 0
        for record, count in counts:
            made.append(record(*args[first : first + count]))
            first += count
        return function(*made, *args[first:], **options)

    return run


# The fakes: what every backend returns. An absent tensor has shape [0].


def _forward_fake(inputs: Inputs, keep_c: bool, keep_gates: bool, *, saves_gates: bool) -> Outputs:
    mode, x, h0, c0, batch_sizes, lengths, resets, bidirectional, _, weights = inputs
    reference.check_mode(mode)
    border.check_devices(x, (h0, c0, *weights, lengths, resets), batch_sizes)
    directions = 1 + bidirectional
    gate_rows, out = weights[1].shape
    hidden = gate_rows // GATES[mode]
    batch: int | torch.SymInt
    if batch_sizes is None:
        batch = x.shape[1]
    elif h0 is not None:
        batch = h0.shape[1]
    else:  # known only from the values of batch_sizes
        batch = torch.library.get_ctx().new_dynamic_size()
    rows = functools.reduce(lambda a, b: a * b, x.shape[:-1])
    has_cell, saved = HAS_CELL_STATE[mode], SAVED_GATES[mode]
    acc = torch.promote_types(x.dtype, torch.float32)
    return Outputs(
        x.new_empty(*x.shape[:-1], directions * out),
        x.new_empty(directions, batch, out),
        x.new_empty(directions, batch, hidden) if has_cell else x.new_empty(0),
        x.new_empty(*((*x.shape[:-1], directions * hidden) if has_cell and keep_c else (0,)), dtype=acc),
        x.new_empty(directions, rows, saved * hidden) if saved and keep_gates and saves_gates else x.new_empty(0),
    )


def _backward_fake(
    inputs: Inputs, grads: OutputGradients, saved: Saved, need_dx: bool, need_dw: bool
) -> InputGradients:
    _, x, h0, c0, batch_sizes, lengths, resets, _, _, weights = inputs
    reference.check_mode(inputs.mode)
    border.check_devices(x, (*grads, h0, c0, *weights, lengths, resets, *saved), batch_sizes)

    def like(tensor: Tensor | None, needed: bool = True) -> Tensor:
        return x.new_empty(tensor.shape if needed and tensor is not None else 0)

    return InputGradients(like(x, need_dx), like(h0), like(c0), [like(w) for w in weights] if need_dw else [])


def _gate_gradients_fake(inputs: Inputs, grads: OutputGradients, saved: Saved) -> GateGradients:
    _, dh0, dc0, _ = _backward_fake(inputs, grads, saved, False, False)
    mode, x, w = inputs.mode, inputs.x, inputs.directions()[0]
    rows = functools.reduce(lambda a, b: a * b, x.shape[:-1])
    columns = (GRADIENTS[mode] + UNIT_WEIGHTS[mode]) * (w.w_hh.shape[0] // GATES[mode])
    columns += 0 if w.w_hr is None else w.w_hr.shape[0]
    return GateGradients(x.new_empty(1 + inputs.bidirectional, rows, columns), dh0, dc0)


def of_member(function: Callable[..., Any], i: int, inputs: Inputs, *more: Any) -> Any:
    """A function of a layer's records and other arguments, of one member's part of an ensemble's."""

    def part(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [part(of) for of in value]
        return value[i] if isinstance(value, Tensor) and value.shape != (0,) else value

    own = Inputs._make(part(inputs))._replace(batch_sizes=inputs.batch_sizes)
    return function(own, *(type(of)(*part(of)) if isinstance(of, tuple) else of for of in more))


def _members_fake(fake: Callable[..., Any], inputs: Inputs, *more: Any) -> Any:
    def stacked(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape == (0,) else tensor.new_empty(inputs.x.size(0), *tensor.shape)

    found = of_member(fake, 0, inputs, *more)
    return found._make([stacked(t) if isinstance(t, Tensor) else [stacked(of) for of in t] for t in found])


def _define(backend: str) -> None:
    forward_fake: Any = functools.partial(_forward_fake, saves_gates=BACKENDS[backend].saves_gates)
    of_members = functools.partial(_members_fake, forward_fake), functools.partial(_members_fake, _backward_fake)
    for direction, schema, fake, more in (
        ("forward", records.FORWARD, forward_fake, ()),
        ("layer", records.FORWARD, forward_fake, ()),  # the forward once more, as it stands in exported programs
        ("backward", records.BACKWARD, _backward_fake, _OF_BACKWARD),
        ("gate_gradients", records.GATE_GRADIENTS, _gate_gradients_fake, _OF_BACKWARD),
        ("forward_members", records.FORWARD, of_members[0], ()),
        ("backward_members", records.BACKWARD, of_members[1], _OF_BACKWARD),
    ):
        if direction == "gate_gradients" and not BACKENDS[backend].saves_gates:
            continue  # it has the derivatives of the weights in plain torch
        if direction.endswith("_members") and backend != "cpu":
            continue  # they run one after the other
        name = f"{backend}_{direction}"
        _define_operator(name + schema)
        torch.library.register_fake(f"rnnfast::{name}", of_records(fake, *more), lib=LIBRARY)
        OPERATORS[backend, direction] = getattr(torch.ops.rnnfast, name).default


def _define_operator(schema: str) -> None:
    """Unless a library of ours has defined it: a program that holds the operator runs with the library alone."""
    name = "rnnfast::" + schema.partition("(")[0]
    if not torch._C._jit_get_schemas_for_operator(name):
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


# The reference as a backend: the loops of reference.py behind ops.


def _reference_forward(inputs: Inputs, keep_c: bool, keep_gates: bool) -> Outputs:
    border.check_layer(inputs)
    border.check_values(inputs)
    x = inputs.x
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        outputs = reference.layer(inputs)
    y, h_n, c_n, c = (t.clone() for t in outputs)  # no output may alias an input or another output
    return Outputs(y, h_n, c_n, c if keep_c else c.new_empty(0), x.new_empty(0))


def _reference_backward(
    inputs: Inputs, grads: OutputGradients, saved: Saved, need_dx: bool, need_dw: bool
) -> InputGradients:
    border.check_backward(border.check_layer(inputs), 0, grads, saved)
    border.check_values(inputs)
    x = inputs.x
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        found = reference.layer_backward(inputs, grads)
    dx, dh0, dc0, *dweights = (x.new_empty(0) if g is None else g.clone(memory_format=_CONTIGUOUS) for g in found)
    return InputGradients(dx if need_dx else x.new_empty(0), dh0, dc0, dweights if need_dw else [])


def _checked_lengths(lengths: Tensor, steps: int) -> Tensor:
    """A copy of ``lengths``, int64 and within 0..steps: checked where that needs no synchronisation, else clamped."""
    border.check_lengths(lengths, steps)
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = lengths.min().item(), lengths.max().item()
        if low < 0 or high > steps:
            raise ValueError(f"lengths must be within 0..{steps}, the sequence length, got values in {low}..{high}")
    return lengths.to(torch.int64, copy=True).clamp_(0, steps)


def _run(backend: str, direction: str, *args: Any) -> Any:
    """A kernel in the module of a backend."""
    mode = args[0].mode
    reference.check_mode(mode)
    if mode not in BACKENDS[backend].modes:
        raise RuntimeError(f"rnnfast: {backend} has no kernels of {mode}")
    return getattr(BACKENDS[backend].load(), direction)(*args)


def _implement(backend: str, forward: Callable[..., Outputs], **backwards: Callable[..., Any]) -> None:
    for direction in ("forward", "layer"):
        LIBRARY.impl(f"{backend}_{direction}", of_records(forward), "CompositeExplicitAutograd")
    for direction, kernel in backwards.items():
        LIBRARY.impl(f"{backend}_{direction}", of_records(kernel, *_OF_BACKWARD), "CompositeExplicitAutograd")


for _name in WITH_OPERATORS:
    _define(_name)
    if BACKENDS[_name].module:
        _directions = "forward", "backward", "gate_gradients"
        _implement(_name, **{direction: functools.partial(_run, _name, direction) for direction in _directions})
_implement("reference", _reference_forward, backward=_reference_backward)
# Inference on a CPU: y, h_n and c_n, as csrc/cpu/plain.cpp has them, and no h_n of what it does not take. It is called
# without torch's wrapper in Python, which takes a twentieth of a small step.
PLAIN: Callable[..., tuple[Any, Any, Any]] = lambda *args: (None, None, None)
FLEX_PLAIN: Callable[..., tuple[Any, Any]] = lambda *args: (None, ())  # y and the states, as csrc/cpu/flex.cpp has them
if BACKENDS["cpu"].probe(None).available:
    PLAIN, FLEX_PLAIN = torch.ops.rnnfast.cpu_plain.default._op, torch.ops.rnnfast.cpu_flex_plain.default._op
for _schema in ("cpu_isa(int? use) -> int", "checked_lengths(Tensor lengths, SymInt steps) -> Tensor", *records.CUDA):
    _define_operator(_schema)
LIBRARY.impl("checked_lengths", _checked_lengths, "CompositeExplicitAutograd")
torch.library.register_fake(
    "rnnfast::checked_lengths", lambda lengths, steps: torch.empty_like(lengths, dtype=torch.int64), lib=LIBRARY
)
torch.library.register_vmap(
    "rnnfast::checked_lengths",
    lambda info, in_dims, lengths, steps: (torch.ops.rnnfast.checked_lengths(lengths, steps), in_dims[0]),
    lib=LIBRARY,
)
