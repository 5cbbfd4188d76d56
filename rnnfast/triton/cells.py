"""The cells, printed by rnnfast/codegen.py from rnnfast/cells.py: there they are to be changed.

Tiles are [units, rows] of the accumulation dtype. Of a step:
    sums   W_ih x + b_ih + W_hh h + b_hh by gate; where a cell reads the two apart that of x, and last that of h
    s      what the backward needs
    w      weights of the units' own, [units, 1]
    d      gradients at the sums
Forward: the sums, w, h and c before the step -> h, c after it, s.
Backward: dh and dc of the state after the step -> d, what is to be added up over rows and steps to the gradients of w,
what of dh goes straight to the h before it, dc before it.
"""

import triton
import triton.language as tl

from .maths import relu, sigmoid, tanh, where_positive


@triton.jit
def forward(MODE: tl.constexpr, sums, w, h, c):
    if MODE == "RNN_TANH":
        return rnn_tanh_forward(sums, w, h, c)
    elif MODE == "RNN_RELU":
        return rnn_relu_forward(sums, w, h, c)
    elif MODE == "LSTM":
        return lstm_forward(sums, w, h, c)
    elif MODE == "GRU":
        return gru_forward(sums, w, h, c)
    else:
        return peephole_lstm_forward(sums, w, h, c)


@triton.jit
def backward(MODE: tl.constexpr, s, w, h, old_h, c, old_c, dh, dc):
    if MODE == "RNN_TANH":
        return rnn_tanh_backward(s, w, h, old_h, c, old_c, dh, dc)
    elif MODE == "RNN_RELU":
        return rnn_relu_backward(s, w, h, old_h, c, old_c, dh, dc)
    elif MODE == "LSTM":
        return lstm_backward(s, w, h, old_h, c, old_c, dh, dc)
    elif MODE == "GRU":
        return gru_backward(s, w, h, old_h, c, old_c, dh, dc)
    else:
        return peephole_lstm_backward(s, w, h, old_h, c, old_c, dh, dc)


@triton.jit
def rnn_tanh_forward(sums, w, h, c):
    h = tanh(sums[0])
    return h, c, ()


@triton.jit
def rnn_tanh_backward(s, w, h, old_h, c, old_c, dh, dc):
    dg = dh * (1 - h * h)
    return (dg,), (), tl.zeros_like(dh), dc


@triton.jit
def rnn_relu_forward(sums, w, h, c):
    h = relu(sums[0])
    return h, c, ()


@triton.jit
def rnn_relu_backward(s, w, h, old_h, c, old_c, dh, dc):
    dg = where_positive(h, dh)
    return (dg,), (), tl.zeros_like(dh), dc


@triton.jit
def lstm_forward(sums, w, h, c):
    i = sigmoid(sums[0])
    f = sigmoid(sums[1])
    g = tanh(sums[2])
    o = sigmoid(sums[3])
    c = f * c + i * g
    h = o * tanh(c)
    return h, c, (i, f, g, o)


@triton.jit
def lstm_backward(s, w, h, old_h, c, old_c, dh, dc):
    i, f, g, o = s[0], s[1], s[2], s[3]
    tanh_c = tanh(c)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    di = dc * g * i * (1 - i)
    df = dc * old_c * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do_ = dh * tanh_c * o * (1 - o)
    return (di, df, dg, do_), (), tl.zeros_like(dh), dc * f


@triton.jit
def gru_forward(sums, w, h, c):
    q = sums[3]
    r = sigmoid(sums[0])
    z = sigmoid(sums[1])
    n = tanh(sums[2] + r * q)
    h = n + z * (h - n)
    return h, c, (r, z, n, q)


@triton.jit
def gru_backward(s, w, h, old_h, c, old_c, dh, dc):
    r, z, n, q = s[0], s[1], s[2], s[3]
    dn = dh * (1 - z) * (1 - n * n)
    dr = dn * q * r * (1 - r)
    dz = dh * (old_h - n) * z * (1 - z)
    dq = dn * r
    return (dr, dz, dn, dq), (), dh * z, dc


@triton.jit
def peephole_lstm_forward(sums, w, h, c):
    i = sigmoid(sums[0] + w[0] * c)
    f = sigmoid(sums[1] + w[1] * c)
    g = tanh(sums[2])
    c = f * c + i * g
    o = sigmoid(sums[3] + w[2] * c)
    h = o * tanh(c)
    return h, c, (i, f, g, o)


@triton.jit
def peephole_lstm_backward(s, w, h, old_h, c, old_c, dh, dc):
    i, f, g, o = s[0], s[1], s[2], s[3]
    tanh_c = tanh(c)
    do_ = dh * tanh_c * o * (1 - o)
    dc = dc + dh * o * (1 - tanh_c * tanh_c) + do_ * w[2]
    di = dc * g * i * (1 - i)
    df = dc * old_c * f * (1 - f)
    dg = dc * i * (1 - g * g)
    return (di, df, dg, do_), (di * old_c, df * old_c, do_ * c), tl.zeros_like(dh), dc * f + df * w[1] + di * w[0]
