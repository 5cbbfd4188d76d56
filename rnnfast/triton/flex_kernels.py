"""The recurrence around a user's cell, forward and backward, each written once.

A program owns a tile of units and a tile of rows. Fused, all steps are one launch: of a cell without W_hh h, whose
units know nothing of each other; where the tile is a head and its W_hh stays on the chip; and where programs share a
head: all of them have to run at once, hand their units' h, or the gradients of a, to each other through memory, meet
after each step, and read W_hh anew in each, from L2: lengths may not change meanwhile, or some would wait for ever.
Otherwise a launch is one step, whose gates of W_hh h torch has made, or, where programs may not wait, this kernel.
States lie in memory between launches; one that leaves a step is as it enters the next, so is the initial one where an
episode begins there.

The cell comes as two functions that ``flex.py`` has printed, on tuples of tiles [units, rows]: of the gates of x and of
a, the states before the step, the weights of the units' own, and in the backward the gradients of the states after it.

Letters as in ``flex.py``: X gates of x, A of a, S states, U weights of each unit's own, K heads of W units.
"""

import triton
import triton.language as tl

from .kernels import Tile, add, aligned, load, longest, row, store, tile, time, where

# Differ from call to call: neither their values nor what divides them makes another kernel.
VARYING = ("first", "last", "T", "N")


@triton.jit
def tiles_at(pointers, offset, mask):
    """A tile of each of some tensors."""
    found = ()
    for k in tl.static_range(len(pointers)):
        found = found + (tl.load(pointers[k] + offset, mask=mask, other=0.0),)
    return found


@triton.jit
def store_at(pointers, offset, tiles, mask):
    for k in tl.static_range(len(pointers)):
        tl.store(pointers[k] + offset, tiles[k], mask=mask)


@triton.jit
def chosen(condition, tiles, others):
    found = ()
    for k in tl.static_range(len(tiles)):
        found = found + (tl.where(condition, tiles[k], others[k]),)
    return found


@triton.jit
def full(like, numbers: tl.constexpr, count: tl.constexpr):
    """A tile of each number."""
    found = ()
    for k in tl.static_range(count):
        found = found + (tl.full(like.shape, numbers[k], like.dtype),)
    return found


@triton.jit
def gates_at(at, place, p, H, COUNT: tl.constexpr, mask):
    """Of rows [.., COUNT * H]."""
    return load(p + place * (COUNT * H) + at.unit, COUNT, H, mask)


@triton.jit
def of_head(W, programs, BH: tl.constexpr):
    """A program's head and its units there, [BH, 1], their numbers among all of them, and whether there are such."""
    head = tl.program_id(1) // programs
    own = (tl.program_id(1) % programs * BH + tl.arange(0, BH))[:, None]
    return head, own, head * W + own, own < W


@triton.jit
def place_of_a(at, place, H, W, A: tl.constexpr):
    """Where the first gate of a lies, of rows [.., K, A * W]; the others follow W apart."""
    return place * (A * H) + at.unit // W * (A * W) + at.unit % W


@triton.jit
def is_cut(at, t):
    """Whether an episode begins between step t and the one that follows it."""
    border = t + 1 - at.d
    inside = tl.where(border > 0, border, at.T) < at.length
    return tl.load(at.resets + border.to(tl.int64) * at.N + at.n, mask=inside, other=0) != 0


@triton.jit
def meet(p_met, K, times, programs):
    """Waits for all programs of these rows and this head; what each stored before, all of them may load after."""
    tl.debug_barrier()  # the one thread that counts speaks for all
    p_count = p_met + tl.program_id(0) * K + tl.program_id(1) // programs
    met = tl.atomic_add(p_count, 1, sem="acq_rel") + 1
    while met < times * programs:
        met = tl.atomic_add(p_count, 0, sem="acq_rel")
    tl.debug_barrier()


@triton.jit
def product_with_h(
    at,
    p_w,
    p_h,
    own,
    head,
    H,
    W,
    acc: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of each gate the tile's units of W_hh h, of all the head's h in memory, [N, H]."""
    sums = (tl.zeros([own.shape[0], BN], acc),) * A
    for start in range(0, W, BK):
        k = start + tl.arange(0, BK)
        is_k = k < W
        of_row = p_h + at.n * H + head * W
        h = tl.load(of_row + k[:, None], mask=is_k[:, None] & at.is_row, other=0.0)
        w = load(p_w + head.to(tl.int64) * (A * W * W) + own * W + k[None, :], A, W * W, (own < W) & is_k[None, :])
        more = ()
        for j in tl.static_range(A):
            more = more + (tl.dot(w[j], h, sums[j], out_dtype=acc, input_precision=PRECISION),)
        sums = more
    return sums


@triton.jit
def product_with_da(
    at,
    t,
    p_w,
    p_da,
    own,
    head,
    H,
    W,
    acc: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the tile's units of h before step t, through the head's a of that step; of none beyond them 0."""
    through = tl.zeros([own.shape[0], BN], acc)
    of_row, is_there = p_da + row(at, t) * (A * H) + head * (A * W), tl.where(t >= 0, t, at.T) < at.length
    for start in range(0, A * W, BK):
        k = start + tl.arange(0, BK)
        is_k = k < A * W
        da = tl.load(of_row + k[:, None], mask=is_k[:, None] & is_there, other=0.0)
        of_k = p_w + head.to(tl.int64) * (A * W * W) + k[None, :] * W
        w = tl.load(of_k + own, mask=(own < W) & is_k[None, :], other=0.0)
        through = tl.dot(w, da, through, out_dtype=acc, input_precision=PRECISION)
    return through


@triton.jit(do_not_specialize=VARYING)
def forward(
    p_x,  # [T, N, X * H]
    p_a,  # [T, N, K, A * W]; of a step alone, [1, N, K, A * W], where p_before is None
    p_states,  # S of [N, H]: before the first step on entry, after the last one on return
    p_every,  # S of [T, N, H]: after every step
    p_before,  # S of [T, N, H]: before every step; or None
    p_units,  # U of [H]
    p_w,  # [K, A * W, W]; or None, where no products are made here
    p_b,  # [K, A * W]; or None
    p_h,  # [2, N, H], by even and odd steps; or None, if no programs share a head
    p_met,  # [row tiles, K], how often programs have arrived; or None
    p_lengths,
    p_resets,
    first,
    last,
    T,
    N,
    H,
    W,
    CELL: tl.constexpr,
    INITIAL: tl.constexpr,  # of each state
    X: tl.constexpr,
    A: tl.constexpr,
    REVERSE: tl.constexpr,
    FUSED: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,  # of a product over all of a head, where programs share one; or 0
    ALIGN: tl.constexpr,  # divides W
    PRECISION: tl.constexpr,
):
    S: tl.constexpr = len(p_states)
    d, unit, n, is_unit, is_row, inside, length = tile(tl.program_id(0), p_lengths, T, N, H, BH, BN)
    acc: tl.constexpr = p_x.dtype.element_ty
    zeros = tl.zeros([BH, BN], acc)
    if p_w is not None:
        programs = 1
        if BK > 0:
            W, H = aligned(W, ALIGN), aligned(H, ALIGN)
            programs = tl.cdiv(W, BH)
        head, own, unit, is_unit = of_head(W, programs, BH)
        inside = is_unit & is_row
        if BK == 0:
            k = tl.arange(0, BH)[None, :]
            w = load(p_w + head.to(tl.int64) * (A * W * W) + own * W + k, A, W * W, is_unit & (k < W))
        b = (zeros,) * A
        if p_b is not None:
            b = load(p_b + head * (A * W) + own + n * 0, A, W, inside)
    at = Tile(REVERSE, unit, n, is_unit, is_row, inside, length, None, p_resets, T, N)
    steps = T
    if FUSED:  # the launch ends with the tile's longest row
        steps = longest(at, p_lengths)
        last = steps
    u = tiles_at(p_units, unit, is_unit)
    states = tiles_at(p_states, n * H + unit, inside)
    t = time(at, first, steps)
    x = gates_at(at, row(at, t), p_x, H, X, inside & (t < length))
    for s in range(first, last):
        t_ahead = time(at, tl.minimum(s + 1, last - 1), steps)
        ahead = gates_at(at, row(at, t_ahead), p_x, H, X, inside & (t_ahead < length))
        t = time(at, s, steps)
        valid = t < length
        place = row(at, t)
        a = ()
        of_a = place_of_a(at, place if p_before is not None else n, H, W, A)
        if p_w is not None:
            if BK == 0:
                h = tl.where(inside, states[0], 0.0)  # not even a NaN of padded units may enter the product
                for j in tl.static_range(A):
                    a = a + (tl.dot(w[j], h.to(w[j].dtype), zeros, out_dtype=acc, input_precision=PRECISION) + b[j],)
            else:
                a = add(product_with_h(at, p_w, p_h + s % 2 * N * H, own, head, H, W, acc, A, BN, BK, PRECISION), b, A)
            if p_before is not None:
                store(p_a + of_a, a, A, W, inside & valid)
        elif A > 0:
            a = load(p_a + of_a, A, W, inside & valid)
        if p_before is not None:
            store_at(p_before, place * H + unit, states, inside & valid)
        after = CELL(x, a, states, u, is_unit, H)
        store_at(p_every, place * H + unit, after, inside & valid)
        states = chosen(valid, after, states)
        if p_resets is not None:
            states = chosen(is_cut(at, t), full(states[0], INITIAL, S), states)
        if BK > 0:
            tl.store(p_h + (s + 1) % 2 * N * H + n * H + unit, states[0], mask=inside)
            if FUSED:
                meet(p_met, H // W, s + 1 - first, programs)
        x = ahead
    store_at(p_states, n * H + unit, states, inside)


@triton.jit
def load_backward(at, t, p_x, p_a, p_before, p_d_every, H, W, X: tl.constexpr, A: tl.constexpr, EVERY: tl.constexpr):
    """Of step t the gates of x and a, the states before it, and the gradients of its own outputs."""
    mask = at.inside & (t < at.length)
    place = row(at, t)
    a = ()
    if A > 0:
        a = load(p_a + place_of_a(at, place, H, W, A), A, W, mask)
    unit = place * H + at.unit
    d_every = ()
    for k in tl.static_range(len(p_d_every)):
        if EVERY[k]:
            d_every = d_every + (tl.load(p_d_every[k] + unit, mask=mask, other=0.0),)
        else:
            d_every = d_every + (tl.zeros(mask.shape, p_x.dtype.element_ty),)
    return gates_at(at, place, p_x, H, X, mask), a, tiles_at(p_before, unit, mask), d_every


@triton.jit(do_not_specialize=VARYING)
def backward(
    p_x,
    p_a,  # [T, N, K, A * W]
    p_before,
    p_units,
    p_d_every,  # S of [T, N, H], of which EVERY says whether they are read: Triton 3.6 takes no None within a tuple
    p_d_states,  # S of [N, H]: of the state after the last step on entry, before the first on return
    p_dx,  # [T, N, X * H]
    p_da,  # [T, N, K, A * W]
    p_d_units,  # U of [N, H]: what all rows' steps have added so far
    p_w,
    p_met,
    p_lengths,
    p_resets,
    first,
    last,
    T,
    N,
    H,
    W,
    CELL: tl.constexpr,
    X: tl.constexpr,
    A: tl.constexpr,
    EVERY: tl.constexpr,
    REVERSE: tl.constexpr,
    FUSED: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,  # whether the gradients of the states go through the first step's product, too
    PRECISION: tl.constexpr,
):
    S: tl.constexpr = len(p_before)
    U: tl.constexpr = len(p_d_units)
    # Of a shared head there is the product to wait for, and no room to have two steps. Nor is there beside many sums,
    # not even for what Triton would load ahead.
    AHEAD: tl.constexpr = BK == 0 and U < 4
    STAGES: tl.constexpr = 1 if BK == 0 and U >= 4 else None
    acc: tl.constexpr = p_x.dtype.element_ty
    d, unit, n, is_unit, is_row, inside, length = tile(tl.program_id(0), p_lengths, T, N, H, BH, BN)
    if p_w is not None:
        programs = 1
        if BK > 0:
            W, H = aligned(W, ALIGN), aligned(H, ALIGN)
            programs = tl.cdiv(W, BH)
        head, own, unit, is_unit = of_head(W, programs, BH)
        inside = is_unit & is_row
        if BK == 0:
            k = tl.arange(0, BH)[None, :]
            w = load(p_w + head.to(tl.int64) * (A * W * W) + k * W + own, A, W * W, is_unit & (k < W))
    at = Tile(REVERSE, unit, n, is_unit, is_row, inside, length, None, p_resets, T, N)
    steps = T
    if FUSED:
        steps = longest(at, p_lengths)
        last = steps
    u = tiles_at(p_units, unit, is_unit)
    d_units = tiles_at(p_d_units, n * H + unit, inside)
    d_states = tiles_at(p_d_states, n * H + unit, inside)
    if AHEAD:
        values = load_backward(at, time(at, last - 1, steps), p_x, p_a, p_before, p_d_every, H, W, X, A, EVERY)
    for i in tl.range(last - first, num_stages=STAGES):
        s = last - 1 - i
        t = time(at, s, steps)
        if AHEAD:
            t_ahead = time(at, tl.maximum(s - 1, first), steps)
            ahead = load_backward(at, t_ahead, p_x, p_a, p_before, p_d_every, H, W, X, A, EVERY)
            x, a, before, d_every = values
        else:
            x, a, before, d_every = load_backward(at, t, p_x, p_a, p_before, p_d_every, H, W, X, A, EVERY)
        if BK > 0:
            after = time(at, s + 1, steps)  # what the step after this one has left
            through = product_with_da(at, after, p_w, p_da, own, head, H, W, acc, A, BN, 2 * BK, PRECISION)
            d_states = (d_states[0] + through,) + d_states[1:]
        valid = t < length
        place = row(at, t)
        if p_resets is not None:
            d_states = where(is_cut(at, t) == 0, d_states, S)
        dx, da, d_before, of_units = CELL(x, a, before, u, add(d_states, d_every, S), is_unit, H)
        store(p_dx + place * (X * H) + unit, dx, X, H, inside & valid)
        if A > 0:
            store(p_da + place_of_a(at, place, H, W, A), da, A, W, inside & valid)
        if p_w is not None and BK == 0:
            through = tl.zeros([BH, BN], acc)
            for j in tl.static_range(A):
                of_gate = tl.where(inside, da[j], 0.0)
                through = tl.dot(w[j], of_gate.to(w[j].dtype), through, out_dtype=acc, input_precision=PRECISION)
            d_before = (d_before[0] + through,) + d_before[1:]
        d_states = chosen(valid, d_before, d_states)
        d_units = add(d_units, where(valid, of_units, U), U)
        if AHEAD:
            values = ahead
        if BK > 0 and FUSED:
            meet(p_met, H // W, i + 1, programs)
    if ENDS:
        begin = time(at, first, steps)
        through = product_with_da(at, begin, p_w, p_da, own, head, H, W, acc, A, BN, 2 * BK, PRECISION)
        d_states = (d_states[0] + through,) + d_states[1:]
    store_at(p_d_states, n * H + unit, d_states, inside)
    store_at(p_d_units, n * H + unit, d_units, inside)
