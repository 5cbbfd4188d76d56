"""The functions that the cells are made of, on tiles of the accumulation dtype."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """To 4 units in the last place: through exp, which near 0 cancels, hence the odd polynomial there."""
    t = tl.exp(-2 * tl.abs(x))
    y = 1 - 2 * t / (1 + t)
    y = tl.where(x < 0, -y, y)
    if x.dtype == tl.float32:
        z = x * x
        p = ((0.01643201 * z - 0.05266803) * z + 0.13320643) * z - 0.33332941
        y = tl.where(tl.abs(x) < 0.55, x + x * z * p, y)
    return y


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays NaN


@triton.jit
def where_positive(y, x):
    """x, but 0 where y is not positive: relu's gradient. At a NaN it is x."""
    return tl.where(y <= 0, 0.0, x)


@triton.jit
def minimum(a, b):
    return tl.where((a < b) | (a != a), a, b)  # NaN of either


@triton.jit
def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def mean(x, is_unit, H):
    """Over the H units of each row, which all are among the tile's; [1, rows].

    Added up in float64: of numbers that lie close together far from zero, the mean has to be as exact as each of them.
    """
    total = tl.sum(tl.where(is_unit, x, 0.0).to(tl.float64), 0, keep_dims=True)
    return (total * (1 / tl.cast(H, tl.float64))).to(x.dtype)


@triton.jit
def log1p(x):
    """What rounding has taken from 1 + x is put right to first order."""
    u = 1 + x
    y = tl.log(u)
    return tl.where((u > 0) & (u < float("inf")), y + (x - (u - 1)) / u, y)
