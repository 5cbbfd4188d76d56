"""The operators: what a backend's kernels are called as, and what torch has to know of them.

A backend is a pair of ``torch.library`` ops, ``rnnfast::NAME_forward`` and ``rnnfast::NAME_backward``, that nothing
traces into, and the first once more for exported programs, ``rnnfast::NAME_layer``. Letters as in ``reference.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import border, reference
from .backends import BACKENDS, WITH_OPERATORS
from .cells import GATES, HAS_CELL_STATE, SAVED_GATES

_FORWARD = (
    "(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
    "Tensor? resets, bool bidirectional, bool keep_c, bool keep_gates) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)"
)
_BACKWARD = (
    "(str mode, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, bool bidirectional, Tensor y, Tensor c, "
    "Tensor gates, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)
# The CUDA library's: the recurrence between the products over the whole sequence. T steps are given; tables of packed
# rows, lengths and resets lie on the device, their values unchecked. Gates may be x_gates itself. For calls under
# no_grad only.
_CUDA = (
    "cuda_forward_steps(str mode, Tensor x_gates, Tensor[] w_hh, Tensor[] b_hh, Tensor[] w_hr, Tensor(a!) h, "
    "Tensor(b!)? c, Tensor(c!) y, Tensor(d!)? cs, Tensor(e!)? gates, Tensor? offsets, Tensor? lengths, "
    "Tensor? resets, int steps, bool tf32, int stream) -> ()",
    "cuda_backward_steps(str mode, Tensor? dy, Tensor? dcs, Tensor gates, Tensor y, Tensor cs, Tensor? h0, Tensor? c0, "
    "Tensor[] w_hh, Tensor[] w_hr, Tensor(a!) dh, Tensor(b!)? dc, Tensor(c!) dgates, Tensor(d!)? dprojections, "
    "Tensor? offsets, Tensor? lengths, Tensor? resets, int steps, bool tf32, int stream) -> ()",
    "cuda_multiply(Tensor a, Tensor b, Tensor(a!) out, bool accumulate, bool tf32, int stream) -> bool",
    "cuda_states_before(Tensor y, Tensor? h0, Tensor(a!) out, Tensor? offsets, Tensor? lengths, Tensor? resets, "
    "int steps, int stream) -> ()",
    "cuda_plan(str mode, ScalarType dtype, int batch, int hidden, bool bidirectional, bool projected, bool tf32, "
    "bool backward, int device) -> str",
    "cuda_regime(int? use) -> int",
)

OPERATORS: dict[tuple[str, str], torch._ops.OpOverload] = {}  # by backend and direction
LIBRARY = torch.library.Library("rnnfast", "DEF")
_CONTIGUOUS = torch.contiguous_format


# The fakes: what every backend returns. An absent tensor has shape [0].


def _forward_fake(
    mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, keep_c, keep_gates, *, saves_gates
):
    reference.check_mode(mode)
    border.check_devices(x, (h0, c0, *weights, lengths, resets), batch_sizes)
    directions = 1 + bidirectional
    gate_rows, out = weights[1].shape
    hidden = gate_rows // GATES[mode]
    if batch_sizes is None:
        batch = x.shape[1]
    elif h0 is not None:
        batch = h0.shape[1]
    else:  # known only from the values of batch_sizes
        batch = torch.library.get_ctx().new_dynamic_size()
    rows = functools.reduce(lambda a, b: a * b, x.shape[:-1])
    has_cell, saved = HAS_CELL_STATE[mode], SAVED_GATES[mode]
    acc = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(*x.shape[:-1], directions * out),
        x.new_empty(directions, batch, out),
        x.new_empty(directions, batch, hidden) if has_cell else x.new_empty(0),
        x.new_empty(*((*x.shape[:-1], directions * hidden) if has_cell and keep_c else (0,)), dtype=acc),
        x.new_empty(directions, rows, saved * hidden) if saved and keep_gates and saves_gates else x.new_empty(0),
    )


def _backward_fake(mode, dy, dh_n, dc_n, dc, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, *args):
    y, c, gates, need_dx, need_dw = args
    reference.check_mode(mode)
    border.check_devices(x, (dy, dh_n, dc_n, dc, h0, c0, *weights, lengths, resets, y, c, gates), batch_sizes)

    def like(tensor: Tensor | None, needed: bool = True) -> Tensor:
        return x.new_empty(tensor.shape if needed and tensor is not None else 0)

    return like(x, need_dx), like(h0), like(c0), [like(w) for w in weights] if need_dw else []


def _define(backend: str) -> None:
    forward_fake = functools.partial(_forward_fake, saves_gates=BACKENDS[backend].saves_gates)
    for direction, schema, fake in (
        ("forward", _FORWARD, forward_fake),
        ("layer", _FORWARD, forward_fake),  # the forward once more, as it stands in exported programs
        ("backward", _BACKWARD, _backward_fake),
    ):
        name = f"{backend}_{direction}"
        _define_operator(name + schema)
        torch.library.register_fake(f"rnnfast::{name}", fake, lib=LIBRARY)
        OPERATORS[backend, direction] = getattr(torch.ops.rnnfast, name).default


def _define_operator(schema: str) -> None:
    """Unless a library of ours has defined it: a program that holds the operator runs with the library alone."""
    name = "rnnfast::" + schema.partition("(")[0]
    if not torch._C._jit_get_schemas_for_operator(name):
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


# The reference as a backend: the loops of reference.py behind ops.


def _reference_forward(
    mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, keep_c, keep_gates
) -> tuple[Tensor, ...]:
    border.check_layer(mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        outputs = reference.layer(mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional)
    y, h_n, c_n, c = (t.clone() for t in outputs)  # no output may alias an input or another output
    return y, h_n, c_n, c if keep_c else c.new_empty(0), x.new_empty(0)


def _reference_backward(
    mode, dy, dh_n, dc_n, dc, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, y, c, gates, *needs
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    need_dx, need_dw = needs
    sizes = border.check_layer(mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional)
    border.check_backward(sizes, 0, dy, dh_n, dc_n, dc, y, c, gates)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        grads = reference.layer_backward(
            mode, dy, dh_n, dc_n, dc, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional
        )
    dx, dh0, dc0, *dweights = (x.new_empty(0) if g is None else g.clone(memory_format=_CONTIGUOUS) for g in grads)
    return dx if need_dx else x.new_empty(0), dh0, dc0, dweights if need_dw else []


def _checked_lengths(lengths: Tensor, steps: int) -> Tensor:
    """A copy of ``lengths``, int64 and within 0..steps: checked where that needs no synchronisation, else clamped."""
    border.check_lengths(lengths, steps)
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = lengths.min().item(), lengths.max().item()
        if low < 0 or high > steps:
            raise ValueError(f"lengths must be within 0..{steps}, the sequence length, got values in {low}..{high}")
    return lengths.to(torch.int64, copy=True).clamp_(0, steps)


def _run(backend: str, direction: str, *args: Any) -> tuple:
    """A kernel in the module of a backend."""
    return getattr(BACKENDS[backend].load(), direction)(*args)


def _implement(backend: str, forward: Callable, backward: Callable) -> None:
    for direction, kernel in (("forward", forward), ("layer", forward), ("backward", backward)):
        LIBRARY.impl(f"{backend}_{direction}", kernel, "CompositeExplicitAutograd")


for _name in WITH_OPERATORS:
    _define(_name)
    if BACKENDS[_name].module:
        _implement(_name, *(functools.partial(_run, _name, direction) for direction in ("forward", "backward")))
_implement("reference", _reference_forward, _reference_backward)
for _schema in ("cpu_isa(int? use) -> int", "checked_lengths(Tensor lengths, SymInt steps) -> Tensor", *_CUDA):
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
