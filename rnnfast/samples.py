"""Samples, which vmap has beside the rows of a batch: all run as rows of one batch, with gradients of each one's own.

Letters as in ``reference.py``, and B samples. They lie innermost: a tensor of N rows has N*B, one of R packed rows R*B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backends import BACKENDS
from .cells import GATES, GRADIENTS, MODES, RANGES_OF_A, SAVED_GATES, UNIT_WEIGHTS
from .ops import OPERATORS
from .records import Inputs, OutputGradients, Saved, Weights

_MOST_COPIED = 2**26  # bytes
_OF_STEPS = ("x", "y", "c", "dx", "dy", "dc")  # [T, N, ...], or packed [R, ...]


def share_weights(dims: Inputs, count: int) -> bool:
    """Whether so many samples with these batch dimensions can be rows of one batch."""
    if not count:
        raise ValueError("rnnfast: vmap is over a dimension of size 0")
    return dims.batch_sizes is None and all(dim is None for dim in dims.weights)


def at_once(saved: Saved, dims: Saved) -> int:
    """How many samples a backward folds: what they share, as the rows of a Jacobian do, is there once for each."""
    tensors = zip(saved, dims)
    shared = sum(of.numel() * of.element_size() for of, dim in tensors if of is not None and dim is None)
    return max(1, _MOST_COPIED // max(1, shared))


def fold(record: Any, dims: Any, count: int, packed: bool) -> Any:
    """A record of so many samples, which are at the batch dimensions, or the same for all (None), as one of rows."""

    def folded(name: str, value: Any, dim: Any) -> Any:
        if name == "batch_sizes" and value is not None:
            return value * count
        if not isinstance(value, Tensor):
            return value
        axis = _axis(name, packed)
        if value.dim() - (dim is not None) <= axis:  # it is absent
            return value.new_empty(0)
        if dim is None:
            value = value.unsqueeze(axis + 1).expand(*value.shape[: axis + 1], count, *value.shape[axis + 1 :])
        else:
            value = value.movedim(dim, axis + 1)
        return value.flatten(axis, axis + 1)

    return record._make(map(folded, record._fields, record, dims))


def stack(record: Any, dims: Any, count: int) -> Any:
    """A record of so many members of an ensemble, with batch dimensions as for :func:`fold`: each tensor but
    batch_sizes begins with a dimension of them."""

    def stacked(value: Any, dim: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [stacked(*pair) for pair in zip(value, dim)]
        if not isinstance(value, Tensor):
            return value
        return value.expand(count, *value.shape) if dim is None else value.movedim(dim, 0)

    found = record._make(map(stacked, record, dims))
    return found._replace(batch_sizes=record.batch_sizes) if isinstance(record, Inputs) else found


def unfold(names: Sequence[str], tensors: Sequence[Tensor], count: int, packed: bool) -> tuple[Any, ...]:
    """Results over such rows by sample, and the batch dimension of each; None where it is absent."""
    pairs = [_unfolded(name, tensor, count, packed) for name, tensor in zip(names, tensors)]
    return tuple(zip(*pairs))


def _unfolded(name: str, tensor: Tensor, count: int, packed: bool) -> tuple[Tensor, int | None]:
    if tensor.shape == (0,):
        return tensor, None
    axis = _axis(name, packed)
    return tensor.unflatten(axis, (tensor.size(axis) // count, count)), axis + 1


def _axis(name: str, packed: bool) -> int:
    """Where the rows of a batch are."""
    if name == "lengths":
        return 0
    return 0 if packed and name in _OF_STEPS else 1


def backward(
    backend: str, need_dx: bool, inputs: Inputs, grads: OutputGradients, saved: Saved, count: int
) -> tuple[Tensor, ...]:
    """As a backend's backward, of rows that are those of so many samples: each weight's gradient is ``[B, ...]``.

    The gradients at the gates come from one run over all rows, and those of the weights from a batched product each.
    """
    x = inputs.x
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if not BACKENDS[backend].saves_gates:
            found = reference_backward(count, inputs, grads)
            dx, dh0, dc0, *dweights = (x.new_empty(0) if g is None else g for g in found)
            return dx if need_dx else x.new_empty(0), dh0, dc0, *dweights
        dgates, dh0, dc0 = OPERATORS[backend, "gate_gradients"](*inputs, *grads, *saved)
        dx = _input_gradient(inputs, dgates) if need_dx else x.new_empty(0)
        return dx, dh0, dc0, *_weight_gradients(inputs, saved, dgates, count)


def _input_gradient(inputs: Inputs, dgates: Tensor) -> Tensor:
    parts = [of[:, : len(w.w_ih)] @ w.w_ih for of, w in zip(dgates, inputs.directions())]
    dx: Tensor = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return dx.view(inputs.x.shape)


def _weight_gradients(inputs: Inputs, saved: Saved, dgates: Tensor, count: int) -> Iterator[Tensor]:
    """In the order of the weights, ``[B, ...]``."""
    mode, x, lengths = inputs.mode, inputs.x, inputs.lengths
    D, R = dgates.shape[:2]

    def by_sample(rows: Tensor) -> Tensor:
        return rows.reshape(R // count, count, rows.size(-1))

    def product(of_gates: Tensor, rows: Tensor) -> Tensor:
        if lengths is not None:  # beyond a row's end there may be anything, and NaN times a gradient of zero is NaN
            valid = reference.valid_steps(len(x), lengths)
            rows = torch.where(valid.view(R, 1), rows.reshape(R, rows.size(-1)), 0)
        return by_sample(of_gates).permute(1, 2, 0) @ by_sample(rows).transpose(0, 1)

    for d, (w, at, h) in enumerate(zip(inputs.directions(), dgates, _states_before(inputs, saved.y))):
        H = len(w.w_ih) // GATES[mode]
        units, outputs = GRADIENTS[mode] * H, (GRADIENTS[mode] + UNIT_WEIGHTS[mode]) * H  # where these begin
        of_x = at[:, : len(w.w_ih)]
        of_a = torch.cat([at[:, first * H : (first + size) * H] for _, first, size in RANGES_OF_A[mode]], 1)
        found = Weights(product(of_x, x), product(of_a, h))
        if w.b_ih is not None:
            found = found._replace(b_ih=by_sample(of_x).sum(0), b_hh=by_sample(of_a).sum(0))
        if w.w_hr is not None:
            acc = saved.c.dtype
            gates = saved.gates[d].to(acc).view(R, SAVED_GATES[mode], H).unbind(1)
            m = MODES[mode].output(gates, [saved.c.reshape(R, D, H)[:, d]])
            found = found._replace(w_hr=product(at[:, outputs:], m.to(x.dtype)))
        if w.w_units is not None:
            found = found._replace(w_units=by_sample(at[:, units:outputs]).sum(0))
        yield from (grad for grad in found if grad is not None)


def _states_before(inputs: Inputs, y: Tensor) -> list[Tensor]:
    """Of each direction the state that entered each step, shaped like its part of y; anything beyond a row's end."""
    if inputs.batch_sizes is not None:
        pad, pack, padded = reference._padded(inputs, inputs.batch_sizes)
        return [pack(before) for before in _states_before(padded, pad(y))]
    (T, N), found = y.shape[:2], []
    lengths, resets = inputs.lengths, inputs.resets
    step = torch.arange(T, device=y.device)[:, None]
    for d, h in enumerate(y.chunk(1 + inputs.bidirectional, 2)):
        first = h.new_zeros(1, N, h.size(2)) if inputs.h0 is None else inputs.h0[d : d + 1]
        before = torch.cat([h[1:], first] if d else [first, h[:-1]])[:T]
        if d and lengths is not None:
            before = torch.where((step == lengths - 1).unsqueeze(2), first, before)
        if resets is not None:
            border = resets if not d else torch.cat([resets[1:], torch.zeros_like(resets[:1])])
            border = border & (step + 1 < lengths) if d and lengths is not None else border
            before = torch.where(border.unsqueeze(2), 0, before)
        found.append(before)
    return found


def reference_backward(count: int, inputs: Inputs, grads: OutputGradients) -> list[Tensor | None]:
    """As :func:`rnnfast.reference.layer_backward`, with the gradients of weights as :func:`backward` has them."""
    batch_sizes, packed = inputs.batch_sizes, inputs.batch_sizes is not None
    if batch_sizes is not None:
        inputs = inputs._replace(batch_sizes=batch_sizes.div(count, rounding_mode="floor"))
    names = (*OutputGradients._fields, *Inputs._fields[:-1])
    values: list[Any] = [*grads, *inputs.flat()]
    dims: dict[int, int | None] = {}  # of the tensors by place: the batch dimension
    for i, (name, value) in enumerate(zip((*names, *["weights"] * len(inputs.weights)), values)):
        if isinstance(value, Tensor) and name in ("batch_sizes", "weights"):
            dims[i] = None
        elif isinstance(value, Tensor):
            values[i], dims[i] = _unfolded(name, value, count, packed)
    results = _each_backward(values, dims)
    for i, name in enumerate(("dx", "dh0", "dc0")):
        if (result := results[i]) is not None:
            axis = _axis(name, packed)
            results[i] = result.movedim(0, axis + 1).flatten(axis, axis + 1)
    return results


def members_backward(inputs: Inputs, grads: OutputGradients) -> list[Tensor | None]:
    """As :func:`rnnfast.reference.layer_backward`, of records that are stacked, and so are the gradients."""
    values = [*grads, *inputs.flat()]
    dims = {i: None if of is inputs.batch_sizes else 0 for i, of in enumerate(values) if isinstance(of, Tensor)}
    return _each_backward(values, dims)


def _each_backward(values: list[Any], dims: dict[int, int | None]) -> list[Tensor | None]:
    """The reference's backward by vmap, of the fields of OutputGradients and Inputs, flat. Dims: of those that are
    tensors, by their places."""
    is_there: list[bool] = []

    def of_one(*tensors: Tensor) -> tuple[Tensor, ...]:
        at = list(values)
        for i, tensor in zip(dims, tensors):
            at[i] = tensor
        first = len(OutputGradients._fields)
        found = reference.layer_backward(Inputs.of_flat(at[first:]), OutputGradients(*at[:first]))
        is_there[:] = [grad is not None for grad in found]
        return tuple(grad for grad in found if grad is not None)

    found = iter(torch.func.vmap(of_one, tuple(dims.values()))(*(values[i] for i in dims)))
    return [next(found) if there else None for there in is_there]
