"""The definition: the cells and the time loop in plain torch, for any dtype, device and derivative.

Letters: T steps, N batch, I input features, H hidden units, P output features (``proj_size``, or H),
D directions, G gates (LSTM 4, GRU 3, RNN 1), R rows of a packed sequence. Gates stand in torch's order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}


def cell(mode: str, x: Tensor, a: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One step of a cell, as ``torch.nn.LSTMCell``, ``GRUCell`` and ``RNNCell`` define it.

    Args:
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"LSTM"`` or ``"GRU"``.
        x, a: ``[N, G*H]``, the input's product ``W_ih x + b_ih`` and the state's ``W_hh h + b_hh``.
        h, c: ``[N, H]``, the state before the step (h is read by the GRU only, c by the LSTM only).

    Returns:
        h and c after the step, ``[N, H]``; c is None but for the LSTM. An LSTM's h is not projected yet.
    """
    if mode == "LSTM":
        i, f, g, o = (x + a).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "GRU":
        (x_r, x_z, x_n), (a_r, a_z, a_n) = x.chunk(3, 1), a.chunk(3, 1)
        r = (x_r + a_r).sigmoid()
        z = (x_z + a_z).sigmoid()
        n = (x_n + r * a_n).tanh()
        return n + z * (h - n), None
    return (x + a).tanh() if mode == "RNN_TANH" else (x + a).relu(), None


def split_weights(weights: list[Tensor], bidirectional: bool) -> list[tuple[Tensor | None, ...]]:
    """Of each direction (w_ih, w_hh, b_ih, b_hh, w_hr), None where absent, from torch's flat order."""
    per_direction = len(weights) // (1 + bidirectional)
    has_bias, has_projection = per_direction >= 4, per_direction in (3, 5)
    directions = []
    for start in range(0, len(weights), per_direction):
        w = weights[start : start + per_direction]
        biases = (w[2], w[3]) if has_bias else (None, None)
        directions.append((w[0], w[1], *biases, w[-1] if has_projection else None))
    return directions


def layer(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer with all its directions; arguments and results as :func:`rnnfast.recurrence.layer`."""
    if batch_sizes is not None:
        return _packed_layer(mode, x, h0, c0, weights, batch_sizes, bidirectional)
    steps, batch = x.shape[:2]
    w_hh = weights[1]
    hidden = w_hh.shape[0] // GATES[mode]
    acc = torch.promote_types(x.dtype, torch.float32)  # of the gates and of c
    valid = None if lengths is None else (torch.arange(steps, device=x.device)[:, None] < lengths).unsqueeze(2)

    ys, hs, cs, states = [], [], [], []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(split_weights(weights, bidirectional)):
        h = x.new_zeros(batch, w_hh.shape[1]) if h0 is None else h0[d]
        c = None
        if mode == "LSTM":
            c = x.new_zeros(batch, hidden, dtype=acc) if c0 is None else c0[d].to(acc)
        x_gates = F.linear(x, w_ih, b_ih).to(acc)
        y_d, c_d = [x.new_zeros(batch, w_hh.shape[1])] * steps, [c] * steps
        for t in reversed(range(steps)) if d else range(steps):
            if resets is not None:
                border = _border(resets, valid, t, reverse=d == 1)
                if border is not None:
                    h = torch.where(border, torch.zeros_like(h), h)
                    c = c if c is None else torch.where(border, torch.zeros_like(c), c)
            h_new, c_new = cell(mode, x_gates[t], F.linear(h, w_hh, b_hh).to(acc), h.to(acc), c)
            h_new = h_new.to(x.dtype)
            if w_hr is not None:
                h_new = F.linear(h_new, w_hr)
            y_d[t], c_d[t] = h_new, c_new
            if valid is not None:  # beyond its end a sequence yields zeros and keeps its state
                y_d[t] = torch.where(valid[t], h_new, torch.zeros_like(h_new))
                h_new = torch.where(valid[t], h_new, h)
                if c is not None:
                    c_d[t] = torch.where(valid[t], c_new, torch.zeros_like(c_new))
                    c_new = torch.where(valid[t], c_new, c)
            h, c = h_new, c_new
        ys.append(torch.stack(y_d) if steps else x.new_zeros(0, *h.shape))
        hs.append(h)
        if c is not None:
            cs.append(c.to(x.dtype))
            states.append(torch.stack(c_d) if steps else c.new_zeros(0, *c.shape))
    none = x.new_zeros(0)
    c_n, c_all = (torch.stack(cs), torch.cat(states, 2)) if cs else (none, none.to(acc))
    return torch.cat(ys, 2), torch.stack(hs), c_n, c_all


def _border(resets: Tensor, valid: Tensor | None, t: int, reverse: bool) -> Tensor | None:
    """``[N, 1]``: the rows whose state is zeroed before step t. Seen from the end, a border lies above t."""
    if not reverse:
        return resets[t].unsqueeze(1)
    if t + 1 == resets.shape[0]:
        return None
    border = resets[t + 1].unsqueeze(1)
    return border if valid is None else border & valid[t + 1]


def _packed_layer(mode, x, h0, c0, weights, batch_sizes, bidirectional):
    """A packed sequence as a padded one with lengths: one definition of the recurrence for all forms."""
    sizes = batch_sizes.tolist()
    batch, width = sizes[0], x.shape[1:]
    pieces = [F.pad(rows, (0, 0, 0, batch - rows.shape[0])) for rows in x.split(sizes)]
    lengths = (batch_sizes[:, None] > torch.arange(batch)).sum(0).to(x.device)
    padded = torch.stack(pieces).reshape(len(sizes), batch, *width)
    y, h_n, c_n, c_all = layer(mode, padded, h0, c0, weights, None, lengths, None, bidirectional)

    def pack(padded: Tensor) -> Tensor:
        return torch.cat([rows[:size] for rows, size in zip(padded, sizes)])

    return pack(y), h_n, c_n, pack(c_all) if mode == "LSTM" else c_all
