"""The recurrence around the cells, forward and backward, each written once.

A program owns a tile of units and a tile of rows of one direction. Fused, the tile is all units: W_hh stays on the
chip, the loop over the steps runs inside, and the next step is loaded while this one computes. The tiles of the gates
are one stack, so that a step is one product, and they pass through shared memory together. Stepwise, a launch is one
step of many tiles: a program makes its units' part of the product with W_hh, which it reads anew, and their cells.

Tiles are [units, rows], so that W_hh is the left operand of every product: its rows fill the larger side of the
tensor core and the batch the smaller one, 8 rows at least.

Letters as in reference.py: T steps, N batch, R rows of the sequence, H units, D directions, G gates; S tiles of a step
are saved for the backward, which makes K tiles of gradients, as many as a stack has: of a GRU one more than gates, for
the candidate's parts of x and of h stay apart. Offsets into sequences are 64-bit.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..cells import APART, GATES, GRADIENTS, HAS_CELL_STATE, READS, SAVED_GATES, UNIT_WEIGHTS
from . import cells

# Differ from call to call: neither their values nor what divides them makes another kernel.
VARYING = ("step", "T", "N", "R")


class Tile(NamedTuple):
    """What a program owns, and the form of the sequence."""

    d: tl.tensor  # direction
    unit: tl.tensor  # [units, 1]
    n: tl.tensor  # [1, rows], of the batch
    is_unit: tl.tensor  # [units, 1]
    is_row: tl.tensor  # [1, rows]
    inside: tl.tensor  # [units, rows]
    length: tl.tensor  # [1, rows], steps; beyond the batch 0
    offsets: tl.tensor  # p[T]: where step t begins in packed rows; or None
    resets: tl.tensor  # p[T, N]; or None
    T: tl.tensor
    N: tl.tensor


@triton.jit
def tile(i_rows, p_lengths, T, N, H, BH: tl.constexpr, BN: tl.constexpr):
    """A Tile's tensors. The kernels make it, for Triton 3.6 returns no tuple that holds a None."""
    d = tl.program_id(2)
    unit = (tl.program_id(1) * BH + tl.arange(0, BH))[:, None]
    n = (i_rows.to(tl.int64) * BN + tl.arange(0, BN))[None, :]
    if p_lengths is None:
        length = tl.where(n < N, T, 0)
    else:
        # Nobody has checked the values, which would have to wait for the device: below 0 is no step, above T is T. As
        # 32 bits, for another comparison spills on AMD; what has more wraps, and still leads nowhere outside.
        length = tl.minimum(tl.load(p_lengths + n, mask=n < N, other=0).to(tl.int32), T)
    is_unit, is_row = unit < H, n < N
    return d, unit, n, is_unit, is_row, is_unit & is_row, length


# Of a cell, by torch's name of it.


@triton.constexpr_function
def gates(mode):
    return GATES[mode]


@triton.constexpr_function
def saved_tiles(mode):
    return SAVED_GATES[mode]


@triton.constexpr_function
def gradients(mode):
    return GRADIENTS[mode]


@triton.constexpr_function
def unit_weights(mode):
    return UNIT_WEIGHTS[mode]


@triton.constexpr_function
def has_cell_state(mode):
    return HAS_CELL_STATE[mode]


@triton.constexpr_function
def reads(mode, state):
    return state in READS[mode]


@triton.constexpr_function
def apart(mode):
    """The gate whose x and a are read apart, the candidate; -1 if there is none."""
    return APART[mode]


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """A size that ALIGN divides, so that Triton sees it: of its own it asks for 16 only, and else loads one by one."""
    return size // ALIGN * ALIGN


@triton.jit
def stack(H, MODE: tl.constexpr, K: tl.constexpr, BH: tl.constexpr):
    """Of a stack's units: columns and rows of W_hh; whether they are no padding, have columns of x, have such rows."""
    APART: tl.constexpr = apart(MODE)
    unit = tl.arange(0, K * BH) % BH
    k = tl.arange(0, K * BH) // BH
    is_unit = unit < H
    if APART >= 0:  # x's part of the candidate is loaded apart, and h's comes last
        of_w = tl.where(k == K - 1, APART, k) * H + unit
        return k * H + unit, of_w, is_unit, is_unit & (k != APART) & (k < K - 1), is_unit & (k != APART)
    else:
        return k * H + unit, k * H + unit, is_unit, is_unit, is_unit


@triton.jit
def split(tiles, K: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr):
    """The tiles of a stack."""
    if K == 1:
        return (tiles,)
    else:
        tiles = tl.permute(tl.reshape(tiles, [2, 2, BH, BN]), (2, 3, 1, 0))
        low, high = tl.split(tiles)
        first, second = tl.split(low)
        third, fourth = tl.split(high)
        return first, second, third, fourth


@triton.jit
def join(tiles, K: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr):
    """A stack of tiles."""
    if K == 1:
        return tiles[0]
    else:
        joined = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))
        return tl.reshape(tl.permute(joined, (3, 2, 0, 1)), [4 * BH, BN])


@triton.jit
def load_unit_weights(at, w_units, H, MODE: tl.constexpr, acc: tl.constexpr):
    """The weights of the units' own, [units, 1]."""
    U: tl.constexpr = unit_weights(MODE)
    if U == 0:
        return ()
    else:
        return cast(load(tl.where(at.d == 0, w_units[0], w_units[1]) + at.unit, U, H, at.is_unit), U, acc)


@triton.jit
def longest(at, p_lengths):
    """The steps of the tile's longest row, but one at least: it is loaded before the loop over the steps."""
    if p_lengths is None:
        return at.T
    else:
        return tl.maximum(tl.max(at.length), 1)


@triton.jit
def time(at, s, steps):
    """The s-th step of the tile's direction, of so many."""
    return tl.where(at.d == 0, s, steps - 1 - s)


@triton.jit
def row(at, t):
    """The rows of the sequence that hold step t."""
    if at.offsets is None:
        return t.to(tl.int64) * at.N + at.n
    else:
        return tl.load(at.offsets + t) + at.n


@triton.jit
def keep(at, t):
    """Whether the state enters step t, and is not zeroed: seen from the end, an episode's border lies above t."""
    if at.resets is None:
        return at.n >= 0
    else:
        border = t + at.d
        return tl.load(at.resets + border.to(tl.int64) * at.N + at.n, mask=border < at.length, other=0) == 0


@triton.jit
def before(at, t, p_states, p_initial, H, D: tl.constexpr):
    """The state before step t, from those after every step [R, D*H] and the initial one [D, N, H], kept or not."""
    previous = t - 1 + 2 * at.d
    exists = tl.where(previous >= 0, previous, at.T) < at.length
    previous = tl.minimum(tl.maximum(previous, 0), at.T - 1)
    b = tl.load(p_states + (row(at, previous) * D + at.d) * H + at.unit, mask=at.inside & exists, other=0.0)
    if p_initial is not None:
        initial = tl.load(p_initial + (at.d * at.N + at.n) * H + at.unit, mask=at.inside & (exists == 0), other=0.0)
        b = tl.where(exists, b, initial.to(b.dtype))
    return b


@triton.jit
def after(at, t, p_states, H, D: tl.constexpr):
    """The state after step t, from those after every step."""
    return tl.load(p_states + (row(at, t) * D + at.d) * H + at.unit, mask=at.inside & (t < at.length), other=0.0)


@triton.jit
def load(p, count: tl.constexpr, stride, mask):
    """Tiles that lie side by side."""
    tiles = ()
    for k in tl.static_range(count):
        tiles = tiles + (tl.load(p + k * stride, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store(p, tiles, count: tl.constexpr, stride, mask):
    for k in tl.static_range(count):
        tl.store(p + k * stride, tiles[k].to(p.dtype.element_ty), mask=mask)


@triton.jit
def cast(tiles, count: tl.constexpr, dtype: tl.constexpr):
    out = ()
    for k in tl.static_range(count):
        out = out + (tiles[k].to(dtype),)
    return out


@triton.jit
def add(a, b, count: tl.constexpr):
    out = ()
    for k in tl.static_range(count):
        out = out + (a[k] + b[k],)
    return out


@triton.jit
def where(condition, tiles, count: tl.constexpr):
    """The tiles, zero elsewhere."""
    out = ()
    for k in tl.static_range(count):
        out = out + (tl.where(condition, tiles[k], 0.0),)
    return out


@triton.jit
def products(
    at,
    p_w,  # that of the tile's unit u of gate j and of input k is at (j * units + u) * unit_stride + k * stride
    p_v,  # [D, N, size]
    size,
    units,
    unit_stride,
    stride,
    start,  # [units, rows], zeros
    G: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G tiles of a matrix times the vectors of the tile's rows, both from memory."""
    BK: tl.constexpr = 128 // (p_v.dtype.element_ty.primitive_bitwidth // 8)
    k = tl.arange(0, BK)
    p_v += (at.d * at.N + at.n) * size
    sums = ()
    for _ in tl.static_range(G):
        sums = sums + (start,)
    for first in range(0, size, BK):
        i = first + k
        v = tl.load(p_v + i[:, None], mask=(i[:, None] < size) & at.is_row, other=0.0)
        so_far = sums
        sums = ()
        for j in tl.static_range(G):
            p = p_w + (j * units + at.unit).to(tl.int64) * unit_stride + i[None, :].to(tl.int64) * stride
            w = tl.load(p, mask=at.is_unit & (i[None, :] < size), other=0.0)
            sums = sums + (tl.dot(w, v, so_far[j], out_dtype=start.dtype, input_precision=PRECISION),)
    return sums


# Forward


@triton.jit
def load_forward(at, t, p_x, column, has_x, R, H, MODE: tl.constexpr, G: tl.constexpr):
    """The stack of step t; of a GRU x's part of the candidate; whether the state enters the step."""
    p = p_x + (at.d * R + row(at, t)) * (G * H)
    x = tl.load(p + column, mask=has_x & (t < at.length), other=0.0)
    candidate = x
    if apart(MODE) >= 0:  # no sum with a product, not even of zeros: h may be infinite
        candidate = tl.load(p + apart(MODE) * H + at.unit, mask=at.inside & (t < at.length), other=0.0)
    return x, candidate, keep(at, t)


@triton.jit
def with_candidate(sums, candidate, MODE: tl.constexpr):
    """The sums of a stack, with x's part of the candidate in its place."""
    out = ()
    for k in tl.static_range(gradients(MODE)):
        if k == apart(MODE):
            out = out + (candidate,)
        else:
            out = out + (sums[k],)
    return out


@triton.jit
def sums_of(x, a, MODE: tl.constexpr):
    """A stack's sums, of the gates of x and those of a."""
    G: tl.constexpr = gates(MODE)
    out = ()
    for k in tl.static_range(G):
        if k == apart(MODE):
            out = out + (x[k],)
        else:
            out = out + (x[k] + a[k],)
    if apart(MODE) >= 0:
        out = out + (a[apart(MODE)],)
    return out


@triton.jit
def step_forward(at, t, sums, u, h, c, p_y, p_cs, R, H, MODE: tl.constexpr, D: tl.constexpr):
    """The states after step t, from those that enter it and its sums, and what is saved."""
    acc: tl.constexpr = c.dtype
    new_h, new_c, saved = cells.forward(MODE, sums, u, h.to(acc), c)
    # Padded units are columns of the next product: not even a NaN of theirs may enter it.
    new_h = tl.where(at.inside, new_h, 0.0).to(h.dtype)
    valid = t < at.length
    unit = (row(at, t) * D + at.d) * H + at.unit
    if p_y is not None:
        tl.store(p_y + unit, new_h, mask=at.inside & valid)
    if p_cs is not None:
        tl.store(p_cs + unit, new_c, mask=at.inside & valid)
    return tl.where(valid, new_h, h), tl.where(valid, new_c, c), saved


@triton.jit(do_not_specialize=VARYING)
def forward(
    of,  # ForwardSteps; y is None where h is still to be projected
    p_h_after,  # [D, N, H]: the state after; fused, that before, of.h
    w_hh,  # of each direction, as all weights
    b_hh,
    w_units,
    tables,  # Tables
    step,
    T,
    N,
    R,
    H,
    P,
    MODE: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    FUSED: tl.constexpr,
    BH: tl.constexpr,  # units of a tile
    BN: tl.constexpr,  # rows of a tile
    PRECISION: tl.constexpr,
):
    G: tl.constexpr = gates(MODE)
    S: tl.constexpr = saved_tiles(MODE)
    K: tl.constexpr = gradients(MODE)
    p_x, p_h, p_c, p_y, p_cs, p_gates = of
    acc: tl.constexpr = tl.float64 if p_h.dtype.element_ty == tl.float64 else tl.float32
    H, P = aligned(H, ALIGN), aligned(P, ALIGN)
    p_offsets, p_lengths, p_resets = tables
    at = Tile(*tile(tl.program_id(0), p_lengths, T, N, H, BH, BN), p_offsets, p_resets, T, N)
    p_w = tl.where(at.d == 0, w_hh[0], w_hh[1])
    p_b = None
    if b_hh[0] is not None:
        p_b = tl.where(at.d == 0, b_hh[0], b_hh[1])
    u = load_unit_weights(at, w_units, H, MODE, acc)
    state = (at.d * N + at.n) * H + at.unit
    zeros = tl.zeros([BH, BN], acc)
    h = zeros.to(p_h.dtype.element_ty)
    if p_y is not None:
        h = tl.load(p_h + state, mask=at.inside, other=0.0)
    c = zeros
    if has_cell_state(MODE):
        c = tl.load(p_c + state, mask=at.inside, other=0.0)

    if FUSED:
        column, of_w, is_unit, has_x, has_w = stack(H, MODE, K, BH)
        column, of_w, has_w, inside = column[:, None], of_w[:, None], has_w[:, None], is_unit[:, None] & at.is_row
        has_x = has_x[:, None] & at.is_row
        k = tl.arange(0, BH)[None, :]
        w = tl.load(p_w + of_w * H + k, mask=has_w & (k < H), other=0.0)
        if p_b is not None:
            bias = tl.load(p_b + of_w, mask=has_w, other=0.0).to(acc)
        steps = longest(at, p_lengths)
        x, candidate, is_kept = load_forward(at, time(at, 0, steps), p_x, column, has_x, R, H, MODE, G)
        for s in range(steps):
            t_ahead = time(at, tl.minimum(s + 1, steps - 1), steps)
            ahead = load_forward(at, t_ahead, p_x, column, has_x, R, H, MODE, G)
            t = time(at, s, steps)
            sums = x.to(acc)
            if p_b is not None:
                sums += bias
            if p_resets is not None:
                h = tl.where(is_kept, h, 0.0)
                c = tl.where(is_kept, c, 0.0)
            sums = split(tl.dot(w, h, sums, out_dtype=acc, input_precision=PRECISION), K, BH, BN)
            sums = with_candidate(sums, candidate.to(acc), MODE)
            h, c, saved = step_forward(at, t, sums, u, h, c, p_y, p_cs, R, H, MODE, D)
            if p_gates is not None:
                p = p_gates + (at.d * R + row(at, t)) * (S * H) + column
                tl.store(p, join(saved, S, BH, BN).to(p_gates.dtype.element_ty), mask=inside & (t < at.length))
            x, candidate, is_kept = ahead
    else:
        t = time(at, step, T)
        valid = t < at.length
        x = cast(load(p_x + (at.d * R + row(at, t)) * (G * H) + at.unit, G, H, at.inside & valid), G, acc)
        a = products(at, p_w, p_h, P, H, P, 1, zeros, G, PRECISION)
        if p_resets is not None:
            is_kept = keep(at, t)
            h = tl.where(is_kept, h, 0.0)
            c = tl.where(is_kept, c, 0.0)
            a = where(is_kept, a, G)
        if p_b is not None:
            a = add(a, cast(load(p_b + at.unit, G, H, at.is_unit), G, acc), G)
        sums = sums_of(x, a, MODE)
        h, c, saved = step_forward(at, t, sums, u, h, c, p_y, p_cs, R, H, MODE, D)
        if p_gates is not None:
            store(p_gates + (at.d * R + row(at, t)) * (S * H) + at.unit, saved, S, H, at.inside & valid)

    tl.store(p_h_after + state, h, mask=at.inside)
    if has_cell_state(MODE):
        tl.store(p_c + state, c, mask=at.inside)


@triton.jit(do_not_specialize=VARYING)
def project_forward(
    p_m,  # [D, N, P]: what the cell made of this step. Of the projected state there are H units here, and P inputs
    w_hr,  # [H, P]
    p_h,  # [D, N, H]: the state before on entry, after on return
    p_y,  # [R, D*H]
    tables,
    step,
    T,
    N,
    R,
    H,
    P,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if p_h.dtype.element_ty == tl.float64 else tl.float32
    H, P = aligned(H, ALIGN), aligned(P, ALIGN)
    p_offsets, p_lengths, p_resets = tables
    at = Tile(*tile(tl.program_id(0), p_lengths, T, N, H, BH, BN), p_offsets, p_resets, T, N)
    p_w = tl.where(at.d == 0, w_hr[0], w_hr[1])
    (h,) = products(at, p_w, p_m, P, 0, P, 1, tl.zeros([BH, BN], acc), 1, PRECISION)
    h = h.to(p_h.dtype.element_ty)
    t = time(at, step, T)
    mask = at.inside & (t < at.length)
    tl.store(p_h + (at.d * N + at.n) * H + at.unit, h, mask=mask)
    tl.store(p_y + (row(at, t) * D + at.d) * H + at.unit, h, mask=mask)


# Backward


@triton.jit
def load_backward(at, t, p_dy, p_dcs, p_y, p_cs, p_h0, p_c0, H, MODE: tl.constexpr, D: tl.constexpr):
    """Of step t: h before and after it, c before it, and dy and dc of its own outputs."""
    mask = at.inside & (t < at.length)
    unit = (row(at, t) * D + at.d) * H + at.unit
    none = tl.zeros(mask.shape, p_y.dtype.element_ty)
    h, old_h, old_c, dy, dc = none, none, none, none, none
    if has_cell_state(MODE):
        old_c = before(at, t, p_cs, p_c0, H, D)
    if reads(MODE, "old_h"):
        old_h = before(at, t, p_y, p_h0, H, D)
    if reads(MODE, "h"):
        h = tl.load(p_y + unit, mask=mask, other=0.0)
    if p_dy is not None:
        dy = tl.load(p_dy + unit, mask=mask, other=0.0)
    if p_dcs is not None:
        dc = tl.load(p_dcs + unit, mask=mask, other=0.0)
    return (h, old_h, old_c, dy, dc), keep(at, t)


@triton.jit
def load_saved(at, t, p_gates, column, inside, R, H, S: tl.constexpr):
    """The stack of step t; an RNN saves none."""
    if S == 0:
        return ()
    else:
        return tl.load(p_gates + (at.d * R + row(at, t)) * (S * H) + column, mask=inside & (t < at.length), other=0.0)


@triton.jit
def of_h(d, MODE: tl.constexpr):
    """The gradients at W_hh h: without that of x's part of the candidate."""
    K: tl.constexpr = gradients(MODE)
    out = ()
    for k in tl.static_range(gates(MODE)):
        if k == apart(MODE):
            out = out + (d[K - 1],)
        else:
            out = out + (d[k],)
    return out


@triton.jit
def step_backward(at, t, saved, u, values, is_kept, c, dh, dc, MODE: tl.constexpr):
    """Step t, from c, dh and dc after it: the gradients at its sums, what it adds to those of the units' weights, and
    what of dh and dc goes to the state before it beside what goes through W_hh."""
    acc: tl.constexpr = dh.dtype
    h, old_h, old_c, dy, dc_out = cast(values, 5, acc)
    if at.resets is not None:
        old_h = tl.where(is_kept, old_h, 0.0)
        old_c = tl.where(is_kept, old_c, 0.0)
    d, of_units, direct, new_dc = cells.backward(MODE, saved, u, h, old_h, c, old_c, dh + dy, dc + dc_out)
    if at.resets is not None:
        direct = tl.where(is_kept, direct, 0.0)
        new_dc = tl.where(is_kept, new_dc, 0.0)
    valid = t < at.length
    return d, of_units, tl.where(valid, direct, dh), tl.where(valid, new_dc, dc)


@triton.jit(do_not_specialize=VARYING)
def backward(
    of,  # BackwardSteps; stepwise, dh is without what goes through w. If h is projected, dy and dh are None: nothing
    # but that reaches it
    w,  # [G*H, H]: W_hh of each direction; if h is projected, W_hr [P, H]
    w_units,
    p_through,  # [D, N, P]: the gradients that w takes back to h; stepwise, those at W_hh h of the step done before,
    # G*H of them, or if h is projected, those at W_hr m of this step; fused, None
    p_da,  # [D, N, G*H]: the gradients at W_hh h of this step; fused, None
    tables,  # Tables
    step,
    T,
    N,
    R,
    H,
    P,
    MODE: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    FUSED: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    G: tl.constexpr = gates(MODE)
    S: tl.constexpr = saved_tiles(MODE)
    K: tl.constexpr = gradients(MODE)
    U: tl.constexpr = unit_weights(MODE)
    p_dy, p_dcs, p_gates, p_y, p_cs, p_h0, p_c0, p_dh, p_dc, p_dgates, _ = of
    acc: tl.constexpr = tl.float64 if p_dgates.dtype.element_ty == tl.float64 else tl.float32
    ONE_BY_ONE: tl.constexpr = PRECISION == "tf32x3" or acc == tl.float64  # products of a stack of these spill
    H, P = aligned(H, ALIGN), aligned(P, ALIGN)
    p_offsets, p_lengths, p_resets = tables
    at = Tile(*tile(tl.program_id(0), p_lengths, T, N, H, BH, BN), p_offsets, p_resets, T, N)
    p_w = tl.where(at.d == 0, w[0], w[1])
    u = load_unit_weights(at, w_units, H, MODE, acc)
    state = (at.d * N + at.n) * H + at.unit
    zeros = tl.zeros([BH, BN], acc)
    c, dh, dc = zeros, zeros, zeros
    if p_dh is not None:
        dh = tl.load(p_dh + state, mask=at.inside, other=0.0)
    if has_cell_state(MODE):
        dc = tl.load(p_dc + state, mask=at.inside, other=0.0)

    if FUSED:
        column, of_w, is_unit, _, has_w = stack(H, MODE, K, BH)
        if ONE_BY_ONE:
            k = tl.arange(0, BH)[None, :]
            w = load(p_w + k * H + at.unit, G, H * H, at.is_unit & (k < H))
        else:
            w = tl.load(p_w + of_w[None, :] * H + at.unit, mask=has_w[None, :] & at.is_unit, other=0.0)
        column, inside, has_w = column[:, None], is_unit[:, None] & at.is_row, has_w[:, None] & at.is_row
        steps = longest(at, p_lengths)
        t = time(at, steps - 1, steps)
        saved = load_saved(at, t, p_gates, column, inside, R, H, S)
        values, is_kept = load_backward(at, t, p_dy, p_dcs, p_y, p_cs, p_h0, p_c0, H, MODE, D)
        if has_cell_state(MODE):
            c = after(at, t, p_cs, H, D)
        for i in range(steps):
            t = time(at, steps - 1 - i, steps)
            t_ahead = time(at, tl.maximum(steps - 2 - i, 0), steps)
            saved_ahead = load_saved(at, t_ahead, p_gates, column, inside, R, H, S)
            ahead = load_backward(at, t_ahead, p_dy, p_dcs, p_y, p_cs, p_h0, p_c0, H, MODE, D)
            tiles = ()
            if S > 0:
                tiles = split(saved.to(acc), S, BH, BN)
            d, of_units, dh, dc = step_backward(at, t, tiles, u, values, is_kept, c, dh, dc, MODE)
            stacked = join(d, K, BH, BN).to(p_dgates.dtype.element_ty)
            valid = t < at.length
            through = valid
            if p_resets is not None:
                through = through & is_kept
            p = p_dgates + (at.d * R + row(at, t)) * ((K + U) * H)
            tl.store(p + column, stacked, mask=inside & valid)
            store(p + K * H + at.unit, of_units, U, H, at.inside & valid)
            # An accumulator of their own: Triton for Blackwell fails at one that is carried from step to step.
            if ONE_BY_ONE:
                da = where(at.inside & through, of_h(d, MODE), G)
                sums = zeros
                for j in tl.static_range(G):
                    sums = tl.dot(w[j], da[j], sums, out_dtype=acc, input_precision=PRECISION)
            else:
                da = tl.where(has_w & through, stacked, 0.0)
                sums = tl.dot(w, da, zeros, out_dtype=acc, input_precision=PRECISION)
            dh = tl.where(at.inside, dh + sums, 0.0)
            if has_cell_state(MODE):
                c = values[2]  # what was before this step is after the next one
            saved = saved_ahead
            values, is_kept = ahead
    else:
        t = time(at, step, T)
        valid = t < at.length
        place = at.d * R + row(at, t)
        saved = cast(load(p_gates + place * (S * H) + at.unit, S, H, at.inside & valid), S, acc)
        values, is_kept = load_backward(at, t, p_dy, p_dcs, p_y, p_cs, p_h0, p_c0, H, MODE, D)
        if has_cell_state(MODE):
            c = after(at, t, p_cs, H, D)
        (through_w,) = products(at, p_w, p_through, P, 0, 1, H, zeros, 1, PRECISION)
        d, of_units, dh, dc = step_backward(at, t, saved, u, values, is_kept, c, dh + through_w, dc, MODE)
        p = p_dgates + place * ((K + U) * H) + at.unit
        store(p, d, K, H, at.inside & valid)
        store(p + K * H, of_units, U, H, at.inside & valid)
        through = valid
        if p_resets is not None:
            through = through & is_kept
        store(p_da + (at.d * N + at.n) * (G * H) + at.unit, where(through, of_h(d, MODE), G), G, H, at.inside)

    if p_dh is not None:
        tl.store(p_dh + state, dh, mask=at.inside)
    if has_cell_state(MODE):
        tl.store(p_dc + state, dc, mask=at.inside)


@triton.jit(do_not_specialize=VARYING)
def project_backward(
    p_dy,  # [R, D*H]; or None. Of the projected state there are H units here
    w_hh,  # [P, H]
    p_through,  # [D, N, P]: the gradients at W_hh h of the step done before
    p_dh,  # [D, N, H]: of the state after on entry, before on return, without what goes through w_hh
    p_dprojected,  # [D, N, H]: the gradient at W_hr m of this step
    p_dprojections,  # [D, R, H]: and of every step
    tables,
    step,
    T,
    N,
    R,
    H,
    P,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    acc: tl.constexpr = p_dh.dtype.element_ty
    H, P = aligned(H, ALIGN), aligned(P, ALIGN)
    p_offsets, p_lengths, p_resets = tables
    at = Tile(*tile(tl.program_id(0), p_lengths, T, N, H, BH, BN), p_offsets, p_resets, T, N)
    p_w = tl.where(at.d == 0, w_hh[0], w_hh[1])
    t = time(at, step, T)
    valid = t < at.length
    place = row(at, t)
    state = (at.d * N + at.n) * H + at.unit
    (dh,) = products(at, p_w, p_through, P, 0, 1, H, tl.zeros([BH, BN], acc), 1, PRECISION)
    dh += tl.load(p_dh + state, mask=at.inside, other=0.0)
    tl.store(p_dh + state, tl.where(valid, 0.0, dh), mask=at.inside)
    if p_dy is not None:
        dh += tl.load(p_dy + (place * D + at.d) * H + at.unit, mask=at.inside & valid, other=0.0).to(acc)
    d = tl.where(valid, dh, 0.0).to(p_dprojected.dtype.element_ty)
    tl.store(p_dprojected + state, d, mask=at.inside)
    tl.store(p_dprojections + (at.d * R + place) * H + at.unit, d, mask=at.inside & valid)


@triton.jit(do_not_specialize=VARYING)
def states_before(
    p_y,  # [R, D*H]
    p_h0,  # [D, N, H]; or None
    p_out,  # [D, R, H]: the state that entered each step
    tables,
    T,
    N,
    R,
    H,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
):
    """A program is one step of a tile, in the grid's first dimension: the others end at 65,535."""
    H = aligned(H, ALIGN)
    tiles = tl.cdiv(N, BN)
    p_offsets, p_lengths, p_resets = tables
    at = Tile(*tile(tl.program_id(0) % tiles, p_lengths, T, N, H, BH, BN), p_offsets, p_resets, T, N)
    t = tl.program_id(0) // tiles
    valid = t < at.length
    h = tl.where(valid & keep(at, t), before(at, t, p_y, p_h0, H, D), 0.0)
    mask = at.inside if p_offsets is None else at.inside & valid
    tl.store(p_out + (at.d * R + row(at, t)) * H + at.unit, h, mask=mask)
