"""Cells with means over the units of a row, and layers with layer_norm, against loops in plain torch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from backends import use
from helpers import LAYERS, assert_same, leaves, states_of, tensors_of, values_and_grads
from test_flex import KERNELS, OF_FORM, Loop, N, T, assert_same_or_zero
from test_flex import states_of as states_of_cell
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast
from rnnfast import FlexRNN, cells
from rnnfast.cells import Cell, cell

DOUBLE, I = torch.float64, 3
on_each = pytest.mark.parametrize("kernels", KERNELS)
# Whose layers test_variants.py runs by Triton's interpreter, on which many steps take long.
natively = pytest.mark.parametrize("kernels", [name for name in KERNELS if name != "triton"])
# Of one unit, less than a vector, vectors and a rest of all lanes, and several strips with a rest.
HIDDEN = (1, 6, 37, 300)


@cell(gates="f g", states="h c", weights="gain", scalars={"scale": 0.7})
def normalized(x, a, s, w):
    f = torch.sigmoid(x.f + cells.normalize(a.f, eps=0.1))
    c = f * s.c + (1 - f) * (x.g + a.g)
    return w.gain * torch.tanh(w.scale * cells.normalize(c)), c


def normalized_in_torch(x: Any, u: Any, s: Any, w: Any) -> Any:
    size = s[1].shape
    f = torch.sigmoid(x[0] + F.layer_norm(u[0], size, eps=0.1))
    c = f * s[1] + (1 - f) * (x[1] + u[1])
    return w[0] * torch.tanh(0.7 * F.layer_norm(c, size)), c


# Means of means' like, of an input, of weights and of what no unit has of its own, and as a state.
@cell(gates="g k", states="h m", weights="u")
def chained(x, a, s, w):
    first = (x.g * x.g).mean(-1, keepdim=True)
    second = torch.mean(torch.tanh(first * a.g - x.k), dim=-1, keepdim=True)
    third = cells.mean(torch.where(x.g > second, s.h * second, w.u / (1 + first)))
    m = cells.mean(s.m + third) + cells.mean(-2.0 * w.u) - cells.mean(cells.mean(a.k) / 3)
    return torch.sigmoid(x.k + third) * (s.h - second) + m, m


def chained_in_torch(x: Any, u: Any, s: Any, w: Any) -> Any:
    first = (x[0] ** 2).mean()
    second = torch.tanh(first * u[0] - x[1]).mean()
    third = torch.where(x[0] > second, s[0] * second, w[0] / (1 + first)).mean()
    m = (s[1] + third).mean() + (-2 * w[0]).mean() - u[1].mean() / 3
    return torch.sigmoid(x[1] + third) * (s[0] - second) + m, m.expand(len(x[0]))


CELLS = {of.name: (of, step) for of, step in ((normalized, normalized_in_torch), (chained, chained_in_torch))}


def make(of: Cell, hidden: int, **options: Any) -> FlexRNN:
    torch.manual_seed(0)
    return FlexRNN(of, I, hidden, **{"dtype": DOUBLE, "bidirectional": True, **options})


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", OF_FORM)
@pytest.mark.parametrize(("hidden", "heads"), [*((hidden, 1) for hidden in HIDDEN), (6, 3), (74, 2)])
@on_each
@pytest.mark.few(2, "kernels", "hidden", "form", "name")
def test_is_the_loop(kernels: str, hidden: int, heads: int, form: str, name: str) -> None:
    of, step = CELLS[name]
    net = make(of, hidden, num_heads=heads)
    inputs = torch.randn(T, N, I, dtype=DOUBLE), states_of_cell(of, hidden)
    loop = values_and_grads(Loop(net, step), *inputs, **OF_FORM[form])
    expected = {key.replace("net.", ""): value for key, value in loop.items()}
    with use(kernels):
        assert_same_or_zero(values_and_grads(net, *inputs, **OF_FORM[form]), expected)


@pytest.mark.parametrize("name", CELLS)
def test_all_derivatives(name: str) -> None:
    net = make(CELLS[name][0], 5)
    inputs = leaves((torch.randn(2, 2, I, dtype=DOUBLE), states_of_cell(net.cell, 5, 2)))
    run = lambda x, *states: tuple(tensors_of(net(x, states)))
    assert torch.autograd.gradcheck(run, tensors_of(inputs), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors_of(inputs), fast_mode=True)
    x, d_x = torch.randn(2, T, N, I, dtype=DOUBLE).unbind()
    step = 1e-5
    _, found = torch.func.jvp(lambda x: net(x)[0], (x,), (d_x,))
    torch.testing.assert_close(found, (net(x + step * d_x)[0] - net(x - step * d_x)[0]) / (2 * step), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", CELLS)
def test_forms_of_calls(name: str) -> None:
    """Of no rows and no steps, compiled, of samples, recomputed, and on two threads, bit by bit."""
    net = make(CELLS[name][0], 37)
    x = torch.randn(T, N, I, dtype=DOUBLE)
    assert net(x[:, :0])[0].shape == (T, 0, 74)
    states = states_of_cell(net.cell, 37)
    y, final = net(x[:0], states, lengths=torch.zeros(N, dtype=torch.int64))
    assert y.shape == (0, N, 74) and all(map(torch.equal, final, states))
    expected = values_and_grads(net, x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = values_and_grads(net, x)
            assert torch.equal(found["output[0]"], expected["output[0]"])
            assert_same(found, expected)
    finally:
        torch.set_num_threads(threads)
    again = copy.deepcopy(net)
    again.recompute = True
    assert_same(values_and_grads(again, x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(x[:2])
    torch.testing.assert_close(compiled, net(x[:2]))
    of_samples = torch.func.vmap(lambda x: net(x)[0])(x[:, :2, None].transpose(0, 1))
    torch.testing.assert_close(of_samples.squeeze(2), net(x[:, :2])[0].transpose(0, 1))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


@on_each
@pytest.mark.parametrize("hidden", [37, 2100])
@pytest.mark.few(1, "kernels", "hidden")
def test_large_means(kernels: str, hidden: int) -> None:
    """In float32 at most twice as far from the exact result as torch's layer_norm is, forward and backward."""

    @cell(gates="g")
    def of(x, a, s):
        return cells.normalize(x.g) + 0.0 * s.h

    net = FlexRNN(of, 1, hidden, bias=False)
    with torch.no_grad():
        net.weight_ih_l0.add_(1000)
    d_y = torch.randn(1, 1, hidden)
    found = {}
    for name, dtype in (("torch", torch.float32), ("exact", DOUBLE), ("ours", torch.float32)):
        weight = net.weight_ih_l0.detach().to(dtype).requires_grad_()
        if name == "ours":
            with use(kernels):
                y = torch.func.functional_call(net, {"weight_ih_l0": weight}, torch.ones(1, 1, 1))[0]
        else:
            y = F.layer_norm(weight[:, 0], (hidden,)).view(1, 1, -1)
        found[name] = y.detach(), torch.autograd.grad(y, weight, d_y.to(dtype))[0]
    for ours, torchs, exact in zip(found["ours"], found["torch"], found["exact"]):
        assert error(ours, exact) <= 2 * error(torchs, exact) + 1e-6 * float(exact.abs().max())


def test_says_what_serves_it() -> None:
    net, x = FlexRNN(normalized, I, 6), torch.randn(T, N, I)
    (choice,) = rnnfast.explain(net, x)
    if rnnfast.backends()["cpu"].available:
        assert choice.reason.startswith("the evaluator of the native library")
    if rnnfast.backends()["triton"].available:
        with rnnfast.use_backend("triton"):
            (choice,) = rnnfast.explain(net, x)
            assert choice.reason == "Triton compiles it: all steps in one launch"
            large = FlexRNN(normalized, I, 5000)
            with pytest.raises(RuntimeError, match=r"a step takes means over a row, .* have 4096 units at most"):
                large(x)


# layer_norm=True, of more units than fit a vector


class Normalized(nn.Module):
    """One layer, batch by batch, by torch's layer_norm."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.mode, self.hidden = layer.mode, layer.hidden_size
        for name, weight in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))

    def normalized(self, of: Tensor, which: str) -> Tensor:
        gain, bias = getattr(self, f"gain_{which}_l0"), getattr(self, f"bias_{which}_l0")
        sizes = [2 * self.hidden, self.hidden] if self.mode == "GRU" and which != "c" else [of.size(1)]
        parts = zip(of.split(sizes, 1), gain.split(sizes), bias.split(sizes))
        return torch.cat([F.layer_norm(part, part.shape[1:], *own) for part, *own in parts], 1)

    def forward(self, x: Tensor, hx: Any) -> Any:
        h, c = (state[0] for state in hx) if isinstance(hx, tuple) else (hx[0], None)
        outputs = []
        for of_step in x:
            of_x = self.normalized(of_step @ self.weight_ih_l0.T, "ih")
            of_h = self.normalized(h @ self.weight_hh_l0.T, "hh")
            if self.mode == "LSTM":
                i, f, g, o = (of_x + of_h).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * self.normalized(c, "c").tanh()
            elif self.mode == "GRU":
                (r, z), (x_n, h_n) = (of_x + of_h).chunk(3, 1)[:2], (of.chunk(3, 1)[2] for of in (of_x, of_h))
                h = torch.lerp((x_n + r.sigmoid() * h_n).tanh(), h, z.sigmoid())
            else:
                h = (of_x + of_h).tanh()
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None]) if self.mode == "LSTM" else h[None]


def layer(name: str, hidden: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    module = getattr(rnnfast, name)(I, hidden, layer_norm=True, **{"dtype": DOUBLE, **options})
    with torch.no_grad():
        for key, weight in module.named_parameters():
            if key.startswith(("gain", "bias_c")):
                weight += 0.3 * torch.randn_like(weight)
    return module


@natively
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.few(1, "kernels", "hidden", "name")
def test_layer_norm(name: str, hidden: int, kernels: str) -> None:
    module = layer(name, hidden)
    steps = 70 if hidden == 6 else 3  # with 70 more than are added up at once
    inputs = torch.randn(steps, 2, I, dtype=DOUBLE), states_of(module, 2)
    expected = values_and_grads(Normalized(module), *inputs)
    with use(kernels):
        assert_same(values_and_grads(module, *inputs), expected)


@on_each
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.few(1, "kernels", "name")
def test_layer_norm_of_large_products(name: str, kernels: str) -> None:
    """Products of which all units have a large part in common: in float32 at most twice torch's own error."""
    exact = layer(name, 37)
    with torch.no_grad():
        for weight in (exact.weight_ih_l0, exact.weight_hh_l0):
            weight.copy_((weight + 100).float())
    inputs = torch.randn(T, 2, I, dtype=DOUBLE), states_of(exact, 2)
    single = [value.float() if isinstance(value, Tensor) else tuple(of.float() for of in value) for value in inputs]
    double = [value.double() if isinstance(value, Tensor) else tuple(of.double() for of in value) for value in single]
    expected = Normalized(exact)(*double)[0]
    torchs = Normalized(copy.deepcopy(exact).float())(*single)[0]
    with use(kernels):
        ours = copy.deepcopy(exact).float()(*single)[0]
    assert error(ours, expected) <= 2 * error(torchs, expected) + 1e-6


def test_layer_norm_of_nothing_but_zeros() -> None:
    """Of products of zero there is no deviation to divide by but epsilon's root."""
    for name in LAYERS:
        module = layer(name, 37)
        y, _ = module(torch.zeros(T, N, I, dtype=DOUBLE))
        assert y.isfinite().all()
        (grad,) = torch.autograd.grad(y.sum(), module.weight_hh_l0)
        assert grad.isfinite().all()


BAD = {  # what is wrong with a call of the operator, whose program is a step of h = mean(x), and what is said
    "more than results": (2, r"the program cannot have 2 results of rows"),
    "negative": (-1, r"the program cannot have -1 results of rows"),
    "a state": (1, r"has 1 results, of 1 states"),
}


@pytest.mark.parametrize("what", BAD)
def test_malformed_calls(what: str) -> None:
    if not rnnfast.backends()["cpu"].available:
        pytest.skip("no native library")
    count, message = BAD[what]
    mean = rnnfast.evaluator.OPERATIONS.index("mean")
    program = torch.tensor([[mean, 0, 0, 0]]), torch.zeros(0, dtype=DOUBLE), torch.tensor([2])
    x = torch.arange(6.0).view(1, 2, 3)
    args = [*program, None, None, None, x, None, None, [torch.zeros(2, 3)], [], torch.zeros(1, dtype=DOUBLE)]
    args += [None, None, False, True]
    after, *_ = torch.ops.rnnfast.cpu_flex_forward(*args)
    assert torch.equal(after[0], torch.tensor([[1.0], [4.0]]).expand(2, 3))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnnfast.cpu_flex_forward(*args, count)


def test_operators_and_their_fakes() -> None:
    """What they return has the shapes that fakes give it, numbers of rows among what is saved."""
    if not rnnfast.backends()["cpu"].available:
        pytest.skip("no native library")
    made = rnnfast.evaluator.programs(normalized, ((0.7).hex(),), 1, 0)
    assert made.of_rows > 0
    states, units, steps = [torch.randn(N, 6)] * 2, [torch.randn(6)], 70
    z_gates, w_hh = torch.randn(steps, N, 12), torch.randn(1, 12, 6)
    call = *made.keeping, None, None, None, z_gates, w_hh, None, states, units, made.initial, None, None, False, True
    forward, backward = torch.ops.rnnfast.cpu_flex_forward.default, torch.ops.rnnfast.cpu_flex_backward.default
    torch.library.opcheck(forward, (*call, made.of_rows), test_utils=("test_schema", "test_faketensor"))
    _, every, saved = forward(*call, made.of_rows)
    of_steps = None, None, w_hh, states, every, units, made.initial, saved, None, None, [torch.zeros(0)] * 2, states
    call = *made.backward, *of_steps, 2, False, False, True, True, made.of_rows
    torch.library.opcheck(backward, call, test_utils=("test_schema", "test_faketensor"))
    assert backward(*call)[-1].shape == (2, N, 6)


def test_rows_of_threads() -> None:
    """So many units that threads would share those of a cell without means: here a thread has all of a row."""
    torch.manual_seed(0)
    net, x = FlexRNN(normalized, 30, 300).double(), torch.randn(T, 2, 30, dtype=DOUBLE)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 8):
            torch.set_num_threads(count)
            y = net(x)[0]
            found.append([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found)


def test_a_nan_stays_in_its_row() -> None:
    net, x = FlexRNN(normalized, I, 6), torch.randn(T, N, I)
    expected = net(x)[0]
    x[0, 1] = math.nan
    found = net(x)[0]
    assert found[:, 1].isnan().all()
    assert torch.equal(found[:, [0, 2, 3]], expected[:, [0, 2, 3]])
