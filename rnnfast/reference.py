"""The definition: the cells, the time loop and its backward in plain torch, for any dtype, device and derivative.

Letters: T steps, N batch, I input features, H hidden units, P output features (``proj_size``, or H),
D directions, G gates (LSTM 4, GRU 3, RNN 1), R rows of a packed sequence. Gates stand in torch's order.
Sums, gates and c are float32 where the input is of a half type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cells import CELLS, GATES, HAS_CELL_STATE


def check_mode(mode: str) -> None:
    if mode not in CELLS:
        raise RuntimeError(f"rnnfast: no cell is called '{mode}'")


def cell(mode: str, x: Tensor, a: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of a cell of ``cells.py``, by the name that torch has for it.

    Args:
        x, a: ``[N, G*H]``, the input's product ``W_ih x + b_ih`` and the state's ``W_hh h + b_hh``.
        h, c: ``[N, H]``, the state before the step; c is None where the cell has none.

    Returns:
        h and c after the step, ``[N, H]``; c is None where the cell has none. An h is not projected yet.
    """
    check_mode(mode)
    of = CELLS[mode]
    h, *others = of.step(*(t.chunk(len(of.gates), 1) for t in (x, a)), (h, c)[: len(of.states)])
    return h, others[0] if others else None


def cell_backward(
    mode: str, x: Tensor, a: Tensor, h: Tensor, c: Tensor | None, dh: Tensor, dc: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of :func:`cell`'s x, a, h and c, from those of its results (None: there is none)."""
    check_mode(mode)
    of = CELLS[mode]
    count = len(of.states)
    d_x, d_a, before = of.backward(*(t.chunk(len(of.gates), 1) for t in (x, a)), (h, c)[:count], (dh, dc)[:count])
    return torch.cat(d_x, 1), torch.cat(d_a, 1), *before, *[None] * (2 - count)


class Weights(NamedTuple):
    """The weights of one direction; None where absent."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


def split_weights(weights: Sequence[Tensor], bidirectional: bool) -> list[Weights]:
    """Torch's flat order by direction."""
    size = len(weights) // (1 + bidirectional)
    directions = (weights[start : start + size] for start in range(0, len(weights), size))
    projected = size in (3, 5)
    return [Weights(*w[: size - projected], w_hr=w[-1] if projected else None) for w in directions]


class _Steps(NamedTuple):
    """The run of one direction, a list entry a step: the state that entered it, and what came out."""

    entered: list[tuple[Tensor, Tensor | None]]
    y: list[Tensor]
    c: list[Tensor | None]
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

    def cut(self, t: int, state: Tensor) -> Tensor:
        """The state before step t, zeroed in the rows that have a border there: seen from the end, it lies above t."""
        at = t + 1 if self.reverse else t
        if self.resets is None or at == len(self.resets):
            return state
        border = self.resets[at].unsqueeze(1)
        border = border if self.valid is None else border & self.valid[at]
        return torch.where(border, torch.zeros_like(state), state)


def _run(mode: str, x_gates: Tensor, h: Tensor, c: Tensor | None, w: Weights, sequence: _Sequence) -> _Steps:
    steps = x_gates.shape[0]
    run = _Steps([(h, c)] * steps, [h] * steps, [c] * steps, h, c)
    for t in sequence.steps(steps):
        h = sequence.cut(t, h)
        c = c if c is None else sequence.cut(t, c)
        run.entered[t] = h, c
        h_t, c_t = cell(mode, x_gates[t], F.linear(h, w.w_hh, w.b_hh).to(x_gates.dtype), h.to(x_gates.dtype), c)
        h_t = h_t.to(h.dtype)
        h_t = h_t if w.w_hr is None else F.linear(h_t, w.w_hr)
        run.y[t], h = sequence.where_valid(t, h_t), sequence.where_valid(t, h_t, h)
        if c is not None:
            run.c[t], c = sequence.where_valid(t, c_t), sequence.where_valid(t, c_t, c)
    return run._replace(h_n=h, c_n=c)


def _directions(mode, x, h0, c0, weights, lengths, resets, bidirectional):
    """Of each direction its weights, sequence, ``W_ih x + b_ih`` and run."""
    steps, batch = x.shape[:2]
    acc = torch.promote_types(x.dtype, torch.float32)
    valid = None if lengths is None else (torch.arange(steps, device=x.device)[:, None] < lengths).unsqueeze(2)
    for d, w in enumerate(split_weights(weights, bidirectional)):
        h = x.new_zeros(batch, w.w_hh.shape[1]) if h0 is None else h0[d]
        c = None
        if HAS_CELL_STATE[mode]:
            c = x.new_zeros(batch, w.w_hh.shape[0] // GATES[mode], dtype=acc) if c0 is None else c0[d].to(acc)
        sequence = _Sequence(valid, resets, reverse=d == 1)
        x_gates = F.linear(x, w.w_ih, w.b_ih).to(acc)
        yield w, sequence, x_gates, _run(mode, x_gates, h, c, w, sequence)


def layer(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer with all its directions; arguments and results as :func:`rnnfast.recurrence.layer`."""
    check_mode(mode)
    if batch_sizes is not None:
        pad, pack, lengths = _packing(batch_sizes, x.device)
        y, h_n, c_n, c = layer(mode, pad(x), h0, c0, weights, None, lengths, None, bidirectional)
        return pack(y), h_n, c_n, pack(c) if HAS_CELL_STATE[mode] else c
    runs = [run for *_, run in _directions(mode, x, h0, c0, weights, lengths, resets, bidirectional)]
    y = torch.cat([_stack(run.y, run.h_n) for run in runs], 2)
    h_n = torch.stack([run.h_n for run in runs])
    if not HAS_CELL_STATE[mode]:
        return y, h_n, x.new_zeros(0), x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))
    c = torch.cat([_stack(run.c, run.c_n) for run in runs], 2)
    return y, h_n, torch.stack([run.c_n for run in runs]).to(x.dtype), c


def layer_backward(
    mode: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`layer`'s x, h0, c0 (None where that is None) and weights, from those of its results."""
    check_mode(mode)
    if batch_sizes is not None:
        pad, pack, lengths = _packing(batch_sizes, x.device)
        dy, dc = (None if d is None else pad(d) for d in (dy, dc if HAS_CELL_STATE[mode] else None))
        dx, *others = layer_backward(
            mode, dy, dh_n, dc_n, dc, pad(x), h0, c0, weights, None, lengths, None, bidirectional
        )
        return pack(dx), *others
    # torch's gradient of a complex function is that of the conjugate: the same formulas at conjugate values.
    x, h0, c0, *weights = (t if t is None else t.conj() for t in (x, h0, c0, *weights))
    dx, dh0, dc0, dweights = torch.zeros_like(x), [], [], []
    for d, (w, sequence, x_gates, run) in enumerate(
        _directions(mode, x, h0, c0, weights, lengths, resets, bidirectional)
    ):
        steps, acc = x.shape[0], x_gates.dtype
        dh = torch.zeros_like(run.h_n) if dh_n is None else dh_n[d]
        dc_t = run.c_n if run.c_n is None else torch.zeros_like(run.c_n) if dc_n is None else dc_n[d].to(acc)
        d_x, d_a, d_h, m = ([dh] * steps for _ in range(4))
        for t in sequence.steps(steps, backward=True):
            h, c = run.entered[t]
            a = F.linear(h, w.w_hh, w.b_hh).to(acc)
            total = dh if dy is None else dh + dy[t].chunk(1 + bidirectional, 1)[d]
            d_h[t] = total = sequence.where_valid(t, total, torch.zeros_like(total))
            dc_total = dc_t
            if c is not None:
                dc_total = dc_t if dc is None else dc_t + dc[t].chunk(1 + bidirectional, 1)[d]
                dc_total = sequence.where_valid(t, dc_total)
            if w.w_hr is not None:
                m[t] = cell(mode, x_gates[t], a, h, c)[0].to(x.dtype)
                total = total @ w.w_hr
            dx_t, da_t, dh_prev, dc_prev = cell_backward(mode, x_gates[t], a, h.to(acc), c, total.to(acc), dc_total)
            d_x[t], d_a[t] = dx_t.to(x.dtype), da_t.to(x.dtype)
            through_gates = d_a[t] @ w.w_hh
            dh_prev = through_gates if dh_prev is None else through_gates + dh_prev.to(x.dtype)
            dh = sequence.where_valid(t, sequence.cut(t, dh_prev), dh)
            if c is not None:
                dc_t = sequence.where_valid(t, sequence.cut(t, dc_prev), dc_t)
        if steps:
            d_x, d_a, d_h, m = (torch.stack(list_).flatten(0, 1) for list_ in (d_x, d_a, d_h, m))
            h_prev = torch.stack([h for h, _ in run.entered]).flatten(0, 1)
            dx = dx + (d_x @ w.w_ih).view_as(x)
            of = Weights(d_x.T @ x.flatten(0, 1), d_a.T @ h_prev, d_x.sum(0), d_a.sum(0), d_h.T @ m)
        else:
            of = Weights(*(t if t is None else torch.zeros_like(t) for t in w))
        dh0.append(dh)
        dc0.append(dc_t)
        dweights += [grad for grad, weight in zip(of, w) if weight is not None]
    return (
        dx,
        None if h0 is None else torch.stack(dh0),
        None if c0 is None else torch.stack(dc0).to(x.dtype),
        *dweights,
    )


def _stack(steps: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(steps) if steps else like.new_zeros(0, *like.shape)


def _packing(
    batch_sizes: Tensor, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """A packed sequence as a padded one with lengths: how to pad it, how to pack it again, and the lengths."""
    sizes = batch_sizes.tolist()

    def pad(packed: Tensor) -> Tensor:
        return torch.stack([F.pad(rows, (0, 0, 0, sizes[0] - len(rows))) for rows in packed.split(sizes)])

    def pack(padded: Tensor) -> Tensor:
        return torch.cat([rows[:size] for rows, size in zip(padded, sizes)])

    lengths = (batch_sizes[:, None] > torch.arange(sizes[0])).sum(0).to(device)
    return pad, pack, lengths
