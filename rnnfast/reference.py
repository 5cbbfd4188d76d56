"""The definition: the cells, the time loop and its backward in plain torch, for any dtype, device and derivative.

Letters: T steps, N batch, I input features, H hidden units, P output features (``proj_size``, or H),
D directions, G gates (LSTM 4, GRU 3, RNN 1), R rows of a packed sequence. Gates stand in torch's order.
Sums, gates and c are float32 where the input is of a half type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cells import GATES, HAS_CELL_STATE, MODES, Cell
from .records import Inputs, OutputGradients, Weights


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise RuntimeError(f"rnnfast: no cell is called '{mode}'")


def cell(
    mode: str, x: Tensor, a: Tensor, h: Tensor, c: Tensor | None, w_units: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell of ``cells.py``, by the name that torch has for it.

    Args:
        x, a: ``[N, G*H]``, the input's product ``W_ih x + b_ih`` and the state's ``W_hh h + b_hh``.
        h, c: ``[N, H]``, the state before the step; c is None where the cell has none.
        w_units: ``[U*H]``, the weights of the units' own that the cell declares; None where it declares none.

    Returns:
        h and c after the step, ``[N, H]``; c is None where the cell has none. An h is not projected yet.
    """
    check_mode(mode)
    of = MODES[mode]
    h, *others = of.step(*_arguments(of, x, a, h, c, w_units))
    return h, others[0] if others else None


def gru_reset_before(x: Tensor, h: Tensor, w: Weights) -> Tensor:
    """h after one step of a GRU as Cho et al. have it ("Learning Phrase Representations using RNN Encoder-Decoder",
    2014), whose reset gate multiplies h before the product and not after it. Arguments as of :func:`cell`."""
    sizes = [2 * h.shape[1], h.shape[1]]
    w_rz, w_n = w.w_hh.split(sizes)
    b_rz, b_n = (None, None) if w.b_hh is None else w.b_hh.split(sizes)
    x_rz, x_n = x.split(sizes, 1)
    r, z = torch.sigmoid(x_rz + F.linear(h, w_rz, b_rz)).chunk(2, 1)
    n = torch.tanh(x_n + F.linear((r * h).to(h.dtype), w_n, b_n))
    return n + z * (h - n)


def _arguments(
    of: Cell, x: Tensor, a: Tensor, h: Tensor, c: Tensor | None, w_units: Tensor | None
) -> tuple[Any, Any, Any, Any]:
    """A cell's x, a, states and weights, each by name."""
    weights = () if w_units is None else w_units.chunk(len(of.weights))
    return x.chunk(len(of.gates), 1), a.chunk(len(of.gates), 1), (h, c)[: len(of.states)], weights


def cell_backward(
    mode: str,
    x: Tensor,
    a: Tensor,
    h: Tensor,
    c: Tensor | None,
    dh: Tensor,
    dc: Tensor | None,
    w_units: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of :func:`cell`'s x, a, h and c, from those of its results (None: there is none), and what each row
    adds to that of its w_units, ``[N, U*H]``."""
    check_mode(mode)
    of = MODES[mode]
    values = _arguments(of, x, a, h, c, w_units)
    count = len(of.states)
    d_x, d_a, before, d_w = of.backward(*values[:3], (dh, dc)[:count], values[3])
    of_weights = torch.cat(d_w, 1) if d_w else None
    return torch.cat(d_x, 1), torch.cat(d_a, 1), *before, *[None] * (2 - count), of_weights


class _Steps(NamedTuple):
    """The run of one direction, a list entry a step: the state that entered it, and what came out."""

    entered: list[tuple[Tensor, Tensor | None]]
    y: list[Tensor]
    c: list[Tensor]  # none where the cell has none
    h_n: Tensor
    c_n: Tensor | None


class _Sequence(NamedTuple):
    """Where a padded sequence is valid ``[T, N, 1]`` (None: everywhere) and its borders, seen from one direction."""

    valid: Tensor | None
    resets: Tensor | None
    reverse: bool

    def steps(self, count: int, backward: bool = False) -> list[int]:
        return list(reversed(range(count)) if self.reverse != backward else range(count))

    def where_valid(self, t: int, inside: Tensor, outside: Tensor | None = None) -> Tensor:
        if self.valid is None:
            return inside
        return torch.where(self.valid[t], inside, torch.zeros_like(inside) if outside is None else outside)

    def cut(self, t: int, state: Tensor, initial: float = 0.0) -> Tensor:
        """The state before step t, anew in the rows that have a border there: seen from the end, it lies above t."""
        at = t + 1 if self.reverse else t
        if self.resets is None or at == len(self.resets):
            return state
        border = self.resets[at].unsqueeze(1)
        border = border if self.valid is None else border & self.valid[at]
        return torch.where(border, torch.full_like(state, initial), state)


def _run(
    mode: str, x_gates: Tensor, h: Tensor, c: Tensor | None, w: Weights, sequence: _Sequence, reset_after: bool
) -> _Steps:
    steps = x_gates.shape[0]
    run = _Steps([(h, c)] * steps, [h] * steps, [] if c is None else [c] * steps, h, c)
    for t in sequence.steps(steps):
        h = sequence.cut(t, h)
        c = c if c is None else sequence.cut(t, c)
        run.entered[t] = h, c
        if reset_after:
            a = F.linear(h, w.w_hh, w.b_hh).to(x_gates.dtype)
            h_t, c_t = cell(mode, x_gates[t], a, h.to(x_gates.dtype), c, w.w_units)
        else:
            h_t, c_t = gru_reset_before(x_gates[t], h, w), None
        h_t = h_t.to(h.dtype)
        h_t = h_t if w.w_hr is None else F.linear(h_t, w.w_hr)
        run.y[t], h = sequence.where_valid(t, h_t), sequence.where_valid(t, h_t, h)
        if c_t is not None:
            run.c[t], c = sequence.where_valid(t, c_t), sequence.where_valid(t, c_t, c)
    return run._replace(h_n=h, c_n=c)


def _directions(inputs: Inputs, reset_after: bool = True) -> Iterator[tuple[Weights, _Sequence, Tensor, _Steps]]:
    """Of each direction its weights, sequence, ``W_ih x + b_ih`` and run."""
    mode, x, lengths = inputs.mode, inputs.x, inputs.lengths
    steps, batch = x.shape[:2]
    acc = torch.promote_types(x.dtype, torch.float32)
    valid = None if lengths is None else valid_steps(steps, lengths)
    for d, w in enumerate(inputs.directions()):
        h = x.new_zeros(batch, w.w_hh.shape[1]) if inputs.h0 is None else inputs.h0[d]
        c = None
        if HAS_CELL_STATE[mode]:
            hidden = w.w_hh.shape[0] // GATES[mode]
            c = x.new_zeros(batch, hidden, dtype=acc) if inputs.c0 is None else inputs.c0[d].to(acc)
        sequence = _Sequence(valid, inputs.resets, reverse=d == 1)
        x_gates = F.linear(x, w.w_ih, w.b_ih).to(acc)
        yield w, sequence, x_gates, _run(mode, x_gates, h, c, w, sequence, reset_after)


def layer(inputs: Inputs, reset_after: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer with all its directions; inputs and results as :func:`rnnfast.recurrence.layer`. Of a GRU the reset
    gate may come before the product: :func:`gru_reset_before`."""
    mode, x = inputs.mode, inputs.x
    check_mode(mode)
    if inputs.batch_sizes is not None:
        pad, pack, padded = _padded(inputs, inputs.batch_sizes)
        y, h_n, c_n, c = layer(padded, reset_after)
        return pack(y), h_n, c_n, pack(c) if HAS_CELL_STATE[mode] else c
    inputs = without_padding(inputs)
    runs = [run for *_, run in _directions(inputs, reset_after)]
    y = torch.cat([_stack(run.y, run.h_n) for run in runs], 2)
    h_n = torch.stack([run.h_n for run in runs])
    c_ns = [run.c_n for run in runs if run.c_n is not None]
    if not c_ns:
        return y, h_n, x.new_zeros(0), x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))
    c = torch.cat([_stack(run.c, like) for run, like in zip(runs, c_ns)], 2)
    return y, h_n, torch.stack(c_ns).to(x.dtype), c


def layer_backward(inputs: Inputs, grads: OutputGradients) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`layer`'s x, h0, c0 (None where that is None) and weights, from those of its results."""
    mode = inputs.mode
    check_mode(mode)
    if inputs.batch_sizes is not None:
        pad, pack, padded = _padded(inputs, inputs.batch_sizes)
        dy, dh_n, dc_n, dc = grads
        dy, dc = (None if d is None else pad(d) for d in (dy, dc if HAS_CELL_STATE[mode] else None))
        dx, *others = layer_backward(padded, OutputGradients(dy, dh_n, dc_n, dc))
        assert dx is not None  # as there is an x
        return pack(dx), *others
    # torch's gradient of a complex function is that of the conjugate: the same formulas at conjugate values.
    inputs = Inputs.of_flat([t.conj() if isinstance(t, Tensor) and t.is_complex() else t for t in inputs.flat()])
    inputs = without_padding(inputs)
    x, h0, c0, bidirectional = inputs.x, inputs.h0, inputs.c0, inputs.bidirectional
    dy, dh_n, dc_n, dc = grads
    dx, dh0, dc0, dweights = torch.zeros_like(x), [], [], []
    for d, (w, sequence, x_gates, run) in enumerate(_directions(inputs)):
        steps, acc = x.shape[0], x_gates.dtype
        dh = torch.zeros_like(run.h_n) if dh_n is None else dh_n[d]
        dc_t = run.c_n if run.c_n is None else torch.zeros_like(run.c_n) if dc_n is None else dc_n[d].to(acc)
        d_x, d_a, d_h, m = ([dh] * steps for _ in range(4))
        d_w: list[Tensor] = []
        for t in sequence.steps(steps, backward=True):
            h, c = run.entered[t]
            a = F.linear(h, w.w_hh, w.b_hh).to(acc)
            total = dh if dy is None else dh + dy[t].chunk(1 + bidirectional, 1)[d]
            d_h[t] = total = sequence.where_valid(t, total, torch.zeros_like(total))
            dc_total = dc_t
            if dc_t is not None:
                dc_total = dc_t if dc is None else dc_t + dc[t].chunk(1 + bidirectional, 1)[d]
                dc_total = sequence.where_valid(t, dc_total)
            if w.w_hr is not None:
                m[t] = cell(mode, x_gates[t], a, h, c, w.w_units)[0].to(x.dtype)
                total = total @ w.w_hr
            dx_t, da_t, dh_prev, dc_prev, dw_t = cell_backward(
                mode, x_gates[t], a, h.to(acc), c, total.to(acc), dc_total, w.w_units
            )
            d_x[t], d_a[t] = dx_t.to(x.dtype), da_t.to(x.dtype)
            d_w += [] if dw_t is None else [dw_t.to(x.dtype)]
            through_gates = d_a[t] @ w.w_hh
            dh_prev = through_gates if dh_prev is None else through_gates + dh_prev.to(x.dtype)
            dh = sequence.where_valid(t, sequence.cut(t, dh_prev), dh)
            dc_t = None if dc_prev is None else sequence.where_valid(t, sequence.cut(t, dc_prev), dc_t)
        if steps:
            of_x, of_a, of_h, of_m = (torch.stack(rows).flatten(0, 1) for rows in (d_x, d_a, d_h, m))
            h_prev = torch.stack([h for h, _ in run.entered]).flatten(0, 1)
            dx = dx + (of_x @ w.w_ih).view_as(x)
            of_w = torch.cat(d_w).sum(0) if d_w else None
            of = Weights(of_x.T @ x.flatten(0, 1), of_a.T @ h_prev, of_x.sum(0), of_a.sum(0), of_h.T @ of_m, of_w)
            dweights += [grad for grad, weight in zip(of, w) if weight is not None]
        else:
            dweights += [torch.zeros_like(weight) for weight in w if weight is not None]
        dh0.append(dh)
        dc0 += [] if dc_t is None else [dc_t]
    return (
        dx,
        None if h0 is None else torch.stack(dh0),
        None if c0 is None else torch.stack(dc0).to(x.dtype),
        *dweights,
    )


def without_padding(inputs: Inputs) -> Inputs:
    """With zeros for x beyond each row's end: there may be anything, and NaN times a gradient of zero is NaN."""
    x, lengths = inputs.x, inputs.lengths
    if lengths is None:
        return inputs
    return inputs._replace(x=torch.where(valid_steps(len(x), lengths), x, torch.zeros_like(x)))


def valid_steps(steps: int, lengths: Tensor) -> Tensor:
    """Where a padded sequence is valid, [T, N, 1]."""
    return (torch.arange(steps, device=lengths.device)[:, None] < lengths).unsqueeze(2)


def _stack(steps: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(steps) if steps else like.new_zeros(0, *like.shape)


def _padded(
    inputs: Inputs, batch_sizes: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Inputs]:
    """A packed sequence as a padded one with lengths: how to pad its rows, how to pack them again, and the inputs."""
    sizes = batch_sizes.tolist()

    def pad(packed: Tensor) -> Tensor:
        return torch.stack([F.pad(rows, (0, 0, 0, sizes[0] - len(rows))) for rows in packed.split(sizes)])

    def pack(padded: Tensor) -> Tensor:
        return torch.cat([rows[:size] for rows, size in zip(padded, sizes)])

    lengths = (batch_sizes[:, None] > torch.arange(sizes[0])).sum(0).to(inputs.x.device)
    return pad, pack, inputs._replace(x=pad(inputs.x), batch_sizes=None, lengths=lengths)
