"""The cells: torch's equations in torch's gate order (i f g o; r z n), each once forward and once backward.

Tiles are [units, rows] of the accumulation dtype. Of a step, by gate:
    x   W_ih x + b_ih                  a   W_hh h + b_hh; both come as sums, but for a
    s   what the backward needs            GRU's candidate: x's, and last a's
    d   gradients at these sums
Forward: the sums, h and c before the step -> h, c after it, s.
Backward: dh and dc of the state after the step -> d, what of dh goes straight to the h before it, dc before it.
"""

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
def forward(MODE: tl.constexpr, sums, h, c):
    if MODE == "LSTM":
        return lstm_forward(sums, c)
    elif MODE == "GRU":
        return gru_forward(sums, h, c)
    elif MODE == "RNN_TANH":
        return tanh(sums[0]), c, ()
    else:
        return tl.where(sums[0] <= 0, 0.0, sums[0]), c, ()  # NaN stays NaN


@triton.jit
def backward(MODE: tl.constexpr, s, h, old_h, c, old_c, dh, dc):
    if MODE == "LSTM":
        return lstm_backward(s, c, old_c, dh, dc)
    elif MODE == "GRU":
        return gru_backward(s, old_h, dh, dc)
    elif MODE == "RNN_TANH":
        return (dh * (1 - h * h),), tl.zeros_like(dh), dc
    else:
        return (tl.where(h <= 0, 0.0, dh),), tl.zeros_like(dh), dc


@triton.jit
def lstm_forward(sums, c):
    i = sigmoid(sums[0])
    f = sigmoid(sums[1])
    g = tanh(sums[2])
    o = sigmoid(sums[3])
    c = f * c + i * g
    return o * tanh(c), c, (i, f, g, o)


@triton.jit
def lstm_backward(s, c, old_c, dh, dc):
    i, f, g, o = s[0], s[1], s[2], s[3]
    tanh_c = tanh(c)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    di = dc * g * i * (1 - i)
    df = dc * old_c * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * tanh_c * o * (1 - o)
    return (di, df, dg, do), tl.zeros_like(dh), dc * f


# The reset gate multiplies q, the hidden part of the candidate, so x and a differ in the candidate's gradient.


@triton.jit
def gru_forward(sums, h, c):
    r = sigmoid(sums[0])
    z = sigmoid(sums[1])
    q = sums[3]
    n = tanh(sums[2] + r * q)
    return n + z * (h - n), c, (r, z, n, q)


@triton.jit
def gru_backward(s, old_h, dh, dc):
    r, z, n, q = s[0], s[1], s[2], s[3]
    dz = dh * (old_h - n) * z * (1 - z)
    dn = dh * (1 - z) * (1 - n * n)
    dr = dn * q * r * (1 - r)
    return (dr, dz, dn, dn * r), dh * z, dc
