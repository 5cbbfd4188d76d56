"""Layers with recurrent dropout, zoneout, layer normalisation and clipped gradients of the state, against loops of
their papers' equations that get the same random numbers."""

from __future__ import annotations

import copy
import functools
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS, use
from helpers import LAYERS, assert_same, leaves, states_of, tensors_of, values_and_grads
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast

DOUBLE = torch.float64
T, N, I, H = 5, 3, 4, 6
LENGTHS = torch.tensor([3, 0, 5])
RESETS = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
KERNELS = [n for n in BACKENDS if n in ("reference", "cpu-portable", "cpu-avx2", "cpu-avx512", "triton")]
on_each = pytest.mark.parametrize("kernels", KERNELS)
layers = pytest.mark.parametrize("name", LAYERS)
OPTIONS = {
    "dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "norm": {"layer_norm": True},
    "clip": {"state_clip": 0.05},
    "heads": {"num_heads": 2},
    "all": {"recurrent_dropout": 0.4, "zoneout": 0.3, "layer_norm": True, "state_clip": 0.05, "num_heads": 3},
}


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    module = getattr(rnnfast, name)(I, H, **{"dtype": DOUBLE, **options})
    with torch.no_grad():  # so that no gain is the neutral 1, and no bias of c 0
        for key, weight in module.named_parameters():
            if key.startswith(("gain", "bias_c")):
                weight += 0.5 * torch.randn_like(weight)
    return module


def dense(w_hh: Tensor) -> Tensor:
    """Of heads: the whole matrix."""
    gates = w_hh.unflatten(1, (-1, w_hh.size(2))).unbind(1) if w_hh.dim() == 3 else ()
    return torch.cat([torch.block_diag(*gate) for gate in gates]) if gates else w_hh


class Paper(nn.Module):
    """One layer by its equations, row by row and step by step; a reset ends what comes before it in either direction.

    Its random numbers are drawn as the layer does: of each direction those of zoneout, state by state, [T, N, H], and
    then those of the dropout, [N, H].
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        own = layer._rnnfast_options
        self.mode, self.is_lstm, self.is_gru = layer.mode, layer.mode == "LSTM", layer.mode == "GRU"
        self.directions = 1 + layer.bidirectional
        self.p, self.norm, self.clip = own.recurrent_dropout, own.layer_norm, own.state_clip
        self.zones = own.zoneout if isinstance(own.zoneout, tuple) else (own.zoneout,) * (1 + self.is_lstm)
        self.train(layer.training)
        for name, weight in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))

    def forward(self, x: Tensor, hx: Any, lengths: Tensor | None = None, resets: Tensor | None = None) -> Any:
        steps, rows = x.shape[:2]
        lengths = torch.full((rows,), steps) if lengths is None else lengths
        resets = torch.zeros(steps, rows, dtype=torch.bool) if resets is None else resets
        initial = hx if self.is_lstm else (hx,)
        outputs, finals = [], []
        for d, suffix in enumerate(("_l0", "_l0_reverse")[: self.directions]):
            w = {name.removesuffix(suffix): p for name, p in self.named_parameters() if name.endswith(suffix)}
            zones = [torch.rand(steps, rows, H, dtype=DOUBLE) < p if p and self.training else None for p in self.zones]
            mask = None
            if self.p and self.training:
                mask = (torch.rand(rows, H, dtype=DOUBLE) >= self.p).to(DOUBLE) / (1 - self.p)
            of_rows = []
            for n in range(rows):
                s, y = [state[d, n] for state in initial], [torch.zeros(H, dtype=DOUBLE)] * steps
                valid = range(int(lengths[n]))
                for t in reversed(valid) if d else valid:
                    if t + d < lengths[n] and resets[t + d, n]:
                        s = [torch.zeros_like(state) for state in s]
                    made = self.step(w, x[t, n], s, 1 if mask is None else mask[n])
                    s = [self.zoned(k, *of, zones, t, n) for k, of in enumerate(zip(s, made))]
                    y[t] = s[0]
                of_rows.append((torch.stack(y), s))
            outputs.append(torch.stack([y for y, _ in of_rows], 1))
            finals.append([torch.stack(of) for of in zip(*(s for _, s in of_rows))])
        final = tuple(torch.stack(of) for of in zip(*finals))
        return torch.cat(outputs, 2), final if self.is_lstm else final[0]

    def zoned(self, k: int, old: Tensor, new: Tensor, zones: list, t: int, n: int) -> Tensor:
        if self.zones[k]:
            new = torch.where(zones[k][t, n], old, new) if self.training else old.lerp(new, 1 - self.zones[k])
        if self.clip is not None and new.requires_grad:
            new = new * 1
            new.register_hook(lambda grad: grad.clamp(-self.clip, self.clip))
        return new

    def normalized(self, of: Tensor, gain: Tensor, bias: Any) -> Tensor:
        parts = of.split([2 * H, H] if self.is_gru else [len(of)])
        found = torch.cat([(part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt() for part in parts])
        return found * gain + bias

    def step(self, w: dict[str, Tensor], x: Tensor, s: list[Tensor], mask: Any) -> tuple[Tensor, ...]:
        x, a = w["weight_ih"] @ x, dense(w["weight_hh"]) @ (mask * s[0])
        b_ih, b_hh = w.get("bias_ih", 0), w.get("bias_hh", 0)
        if self.norm:
            x, a = self.normalized(x, w["gain_ih"], b_ih), self.normalized(a, w["gain_hh"], b_hh)
        else:
            x, a = x + b_ih, a + b_hh
        if self.is_lstm:
            i, f, g, o = (x + a).chunk(4)
            c = torch.sigmoid(f) * s[1] + torch.sigmoid(i) * torch.tanh(g)
            seen = self.normalized(c, w["gain_c"], w.get("bias_c", 0)) if self.norm else c
            return torch.sigmoid(o) * torch.tanh(seen), c
        if self.is_gru:
            (x_r, x_z, x_n), (a_r, a_z, a_n) = x.chunk(3), a.chunk(3)
            z = torch.sigmoid(x_z + a_z)
            return ((1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + a_r) * a_n) + z * s[0],)
        return (torch.tanh(x + a) if self.mode == "RNN_TANH" else torch.relu(x + a),)


FORM = {
    "rectangular": {},
    "lengths": {"lengths": LENGTHS},
    "resets": {"resets": RESETS},
    "both": {"lengths": LENGTHS, "resets": RESETS},
}


@on_each
@pytest.mark.parametrize("form", FORM)
@pytest.mark.parametrize("option", OPTIONS)
@layers
@pytest.mark.few(2, "kernels", "form", "option", "name")
def test_is_the_papers(name: str, option: str, form: str, kernels: str) -> None:
    module = make(name, bidirectional=True, **OPTIONS[option])
    inputs = torch.randn(T, N, I, dtype=DOUBLE), states_of(module, N)
    with use(kernels):
        for training in (True, False):
            module.train(training)
            expected = values_and_grads(Paper(module), *inputs, **FORM[form])
            assert_same(values_and_grads(module, *inputs, **FORM[form]), expected)


@pytest.mark.parametrize("zoneout", [(0.5, 0.0), (0.0, 0.4), (1.0, 0.2)], ids=str)
def test_zoneout_of_h_and_c(zoneout: tuple[float, float]) -> None:
    module = make("LSTM", zoneout=zoneout, bias=False)
    inputs = torch.randn(T, N, I, dtype=DOUBLE), states_of(module, N)
    for training in (True, False):
        module.train(training)
        assert_same(values_and_grads(module, *inputs), values_and_grads(Paper(module), *inputs))


@layers
def test_of_certainty(name: str) -> None:
    """A dropout of 1 leaves nothing of h for the product, a zoneout of 1 all of the state where it was."""
    x, weights = torch.randn(T, N, I, dtype=DOUBLE), make(name).state_dict()
    module, without = make(name, recurrent_dropout=1.0), make(name)
    without.load_state_dict({key: w * (not key.startswith("weight_hh")) for key, w in weights.items()})
    found, expected = values_and_grads(module, x), values_and_grads(without, x)
    for key in expected.keys() - {"gradient of weight_hh_l0"}:
        torch.testing.assert_close(found[key], expected[key])
    assert not found["gradient of weight_hh_l0"].any()
    module, hx = make(name, zoneout=1.0), states_of(without, N)
    for training in (True, False):
        assert_same(
            {"final": tensors_of(module.train(training)(x, hx)[1])[0]}, {"final": tensors_of(hx)[0]}, rtol=0, atol=0
        )


@layers
def test_is_torchs_where_nothing_is_random(name: str) -> None:
    """In eval mode without zoneout; and bit by bit, as it is on the same kernels."""
    usual, x = make(name), torch.randn(T, N, I, dtype=DOUBLE)
    module = make(name, recurrent_dropout=0.5).eval()
    assert_same(values_and_grads(module, x), values_and_grads(usual, x), rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(make(name, state_clip=0.1)(x)[0], usual(x)[0])
    assert module.state_dict().keys() == usual.state_dict().keys()


@pytest.mark.parametrize("option", OPTIONS)
@layers
@pytest.mark.few(1, "option", "name")
def test_forms_agree(name: str, option: str) -> None:
    """Of the same rows in the same order the random numbers are the same."""
    module = make(name, num_layers=2, bidirectional=True, **OPTIONS[option])
    x, lengths = torch.randn(T, N, I, dtype=DOUBLE), torch.tensor([5, 3, 1])
    of_first = make(name, num_layers=2, bidirectional=True, batch_first=True, **OPTIONS[option])

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(3)
        return module(*args, **kwargs)

    output, final, states = run(module, x, lengths=lengths, return_states=True)
    with torch.no_grad():
        inferred = run(module, x, lengths=lengths, return_states=True), run(module, x, lengths=lengths)
    for found, of in zip(inferred, ((output, final, states), (output, final))):
        torch.testing.assert_close(tensors_of(found), tensors_of(of))
    packed, of_packed, of_steps = run(module, pack_padded_sequence(x, lengths), return_states=True)
    torch.testing.assert_close(pad_packed_sequence(packed)[0], output)
    torch.testing.assert_close(of_packed, final)
    for of_rows, of_state in zip(tensors_of(of_steps), tensors_of(states)):
        expected = torch.stack([pack_padded_sequence(of_layer, lengths).data for of_layer in of_state])
        torch.testing.assert_close(of_rows, expected)
    torch.testing.assert_close(tensors_of(states)[0][1], output)
    of_first.load_state_dict(module.state_dict())
    found = run(of_first, x.transpose(0, 1), lengths=lengths)
    torch.testing.assert_close(found, (output.transpose(0, 1), final))
    alone, of_alone = run(module, x[:, :1])
    unbatched, of_unbatched = run(module, x[:, 0])
    torch.testing.assert_close(unbatched, alone[:, 0])
    for one, batch in zip(tensors_of(of_unbatched), tensors_of(of_alone)):
        torch.testing.assert_close(one, batch[:, 0])


@pytest.mark.parametrize("option", OPTIONS)
@layers
@pytest.mark.few(1, "option", "name")
def test_recompute_has_the_same_masks(name: str, option: str) -> None:
    x = torch.randn(T, N, I, dtype=DOUBLE)
    stack = {"num_layers": 2, "bidirectional": True, "dropout": 0.3, **OPTIONS[option]}
    found = [values_and_grads(make(name, recompute=recompute, **stack), x) for recompute in (False, True)]
    assert_same(*found, rtol=0, atol=0)
    torch.manual_seed(2)
    assert not torch.equal(make(name, **stack)(x)[0], found[0]["output[0]"]) or option in ("norm", "clip")


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "clip"])
@layers
@pytest.mark.few(1, "option", "name")
def test_gradcheck(name: str, option: str) -> None:
    """Of a clip that holds nothing back: where it does, the gradient is none."""
    options = OPTIONS[option] | ({"state_clip": 1e6} if "state_clip" in OPTIONS[option] else {})
    module = make(name, bidirectional=True, **options)
    inputs = leaves((torch.randn(2, 2, I, dtype=DOUBLE), states_of(module, 2)))

    def run(x: Tensor, *hx: Tensor) -> Any:
        torch.manual_seed(1)
        return tuple(tensors_of(module(x, hx if name == "LSTM" else hx[0], resets=RESETS[2:4, :2])))

    flat = tensors_of(inputs)
    assert torch.autograd.gradcheck(run, flat, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, flat, fast_mode=True)


def test_second_derivatives_of_a_clipped_gradient() -> None:
    """Of an LSTM by its equations, which torch derives twice."""
    module, x = make("LSTM", state_clip=0.05), torch.randn(T, N, I, dtype=DOUBLE, requires_grad=True)
    hx, found = states_of(module, N), []
    for of in (module, Paper(module)):
        (grad,) = torch.autograd.grad(of(x, hx)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_statistics(p: float) -> None:
    """How many numbers are dropped, of which scale the others are; and how many are kept by zoneout, at each step."""
    rows, units = 64, 64
    bound = 5 * (p * (1 - p) / (rows * units)) ** 0.5
    module = rnnfast.RNN(1, units, nonlinearity="relu", bias=False, recurrent_dropout=p)
    nn.init.zeros_(module.weight_ih_l0)
    nn.init.eye_(module.weight_hh_l0)
    ones = torch.ones(1, rows, units)
    output, _ = module(torch.zeros(3, rows, 1), ones)
    dropped = output[0] == 0
    assert abs(dropped.double().mean() - p) < bound
    scale = torch.full_like(output[0], 1 / (1 - p))
    for t in range(3):  # one mask for all steps
        torch.testing.assert_close(output[t], (scale ** (t + 1)).masked_fill(dropped, 0))
    module = rnnfast.RNN(1, units, bias=False, zoneout=p)
    nn.init.zeros_(module.weight_ih_l0)
    nn.init.zeros_(module.weight_hh_l0)
    output, _ = module(torch.zeros(3, rows, 1), ones)
    for before, after in zip((ones[0], *output), output):
        kept = after[before == 1]
        assert abs(kept.double().mean() - p) < bound / (before == 1).double().mean().sqrt()
    assert torch.equal(module.eval()(torch.zeros(1, rows, 1), ones)[0], p * ones)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("option", ["norm", "zoneout", "clip"])
def test_half_types_and_autocast(dtype: torch.dtype, option: str) -> None:
    exact = make("LSTM", **OPTIONS[option]).eval()
    x = torch.randn(T, N, I, dtype=DOUBLE)
    low, bound = copy.deepcopy(exact).to(dtype), 16 * torch.finfo(dtype).eps
    outputs = [low(x.to(dtype))[0]]
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype):
            outputs.append(copy.deepcopy(exact).float()(x.float())[0])
    for output in outputs:
        assert output.dtype == dtype
        assert (output.double() - exact(x)[0]).abs().max() < bound


@pytest.mark.parametrize("option", ["zoneout", "all"])
@layers
@pytest.mark.few(1, "option", "name")
def test_compiled(name: str, option: str) -> None:
    module, x = make(name, **OPTIONS[option]), torch.randn(3, N, I, dtype=DOUBLE)
    torch._dynamo.reset()
    module.recompute = option == "zoneout"
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(values_and_grads(compiled._orig_mod, x), of_compiled(compiled, x))


def of_compiled(compiled: Any, x: Tensor) -> dict[str, Tensor]:
    return {key.replace("_orig_mod.", ""): of for key, of in values_and_grads(compiled, x).items()}


@pytest.mark.parametrize("option", OPTIONS)
def test_exported(option: str) -> None:
    """In eval mode, with the steps that it had."""
    module, x = make("LSTM", **OPTIONS[option]).eval(), torch.randn(3, N, I, dtype=DOUBLE)
    program = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(program(x), module(x))


@pytest.mark.parametrize("option", OPTIONS)
def test_traced(option: str) -> None:
    """In eval mode, with the steps that it had, and no clip: such a graph is to run where rnnfast is not installed."""
    module, x = make("GRU", **OPTIONS[option]).eval(), torch.randn(3, N, I, dtype=DOUBLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a trace holds fast
        traced, file = torch.jit.trace(module, (x,)), io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        found = torch.jit.load(file)(x)
    torch.testing.assert_close(found, module(x))


def seeded(module: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """The output, of the same random numbers in each call."""
    torch.manual_seed(1)
    return torch.func.functional_call(module, weights or {}, x)[0]


def differences(function: Callable[[Tensor], Tensor], x: Tensor, d_x: Tensor, step: float = 1e-6) -> Tensor:
    return (function(x + step * d_x) - function(x - step * d_x)) / (2 * step)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
@layers
@pytest.mark.few(2, "training", "option", "name")
def test_forward_mode(name: str, option: str, training: bool) -> None:
    """The derivatives of what a layer computes, which a clip of gradients leaves as it is."""
    run = functools.partial(seeded, make(name, **OPTIONS[option]).train(training))
    x, d_x = torch.randn(2, 3, N, I, dtype=DOUBLE)
    expected = differences(run, x, d_x)
    torch.testing.assert_close(torch.func.jvp(run, (x,), (d_x,))[1], expected, rtol=0, atol=1e-7)
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(run(forward_ad.make_dual(x, d_x))).tangent
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_forward_mode_of_a_clipped_gradient() -> None:
    """Is that of the gradient with its clips."""
    module, (x, d_x) = make("LSTM", state_clip=0.5), torch.randn(2, T, N, I, dtype=DOUBLE)
    gradient = torch.func.grad(lambda x: seeded(module, x).sum())
    without = torch.func.grad(lambda x: seeded(make("LSTM"), x).sum())
    assert not torch.equal(gradient(x), without(x))
    found = torch.func.jvp(gradient, (x,), (d_x,))[1]
    torch.testing.assert_close(found, differences(gradient, x, d_x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("option", OPTIONS)
@layers
@pytest.mark.few(1, "option", "name")
def test_transforms(name: str, option: str) -> None:
    """In training: Jacobians, and of samples and of stacked weights, with vmap's flag for what is random."""
    module, x = make(name, **OPTIONS[option]), torch.randn(2, 3, N, I, dtype=DOUBLE)
    weights = dict(module.named_parameters())
    expected = torch.autograd.functional.jacobian(lambda x: seeded(module, x), x[0])
    torch.testing.assert_close(torch.func.jacrev(lambda x: seeded(module, x))(x[0]), expected)
    stacked = {key: torch.stack([weight, 2 * weight]) for key, weight in weights.items()}
    members = [{key: of[k] for key, of in stacked.items()} for k in range(2)]
    run = lambda weights, x: seeded(module, x, weights)
    found = torch.func.vmap(run, randomness="same")(stacked, x)
    torch.testing.assert_close(found, torch.stack([run(*of) for of in zip(members, x)]))
    gradients = torch.func.vmap(torch.func.grad(lambda *of: run(*of).square().sum()), (None, 0), randomness="same")
    found = gradients(weights, x)
    each = [torch.autograd.grad(seeded(module, row).square().sum(), list(weights.values())) for row in x]
    for key, of in zip(weights, zip(*each)):
        torch.testing.assert_close(found[key], torch.stack(of))
    if option in ("dropout", "zoneout", "all"):
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(run)(stacked, x)
        both = torch.func.vmap(lambda x: seeded(module, x), randomness="different")(x[:1].expand(2, -1, -1, -1))
        assert not torch.equal(*both)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_of_samples(option: str) -> None:
    """In eval mode, where nothing is random."""
    module = make("GRU", **OPTIONS[option]).eval()
    x, parameters = torch.randn(N, T, I, dtype=DOUBLE), dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, x)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    each = [torch.autograd.grad(loss(parameters, row), list(parameters.values())) for row in x]
    for key, of in zip(parameters, zip(*each)):
        torch.testing.assert_close(found[key], torch.stack(of))


def test_what_lies_beyond_a_row_is_not_looked_at() -> None:
    for options in OPTIONS.values():
        module, x = make("LSTM", bidirectional=True, **options), torch.randn(T, N, I, dtype=DOUBLE)
        finite = values_and_grads(module, x, lengths=LENGTHS)
        x[3:, 0] = math.nan
        found = values_and_grads(module, x, lengths=LENGTHS)
        assert_same(found, finite, rtol=0, atol=0)


@pytest.mark.parametrize("option", OPTIONS)
@layers
@pytest.mark.few(1, "option", "name")
def test_of_nothing(name: str, option: str) -> None:
    """No rows, and no steps."""
    module = make(name, **OPTIONS[option])
    output, _ = module(torch.randn(T, 0, I, dtype=DOUBLE))
    assert output.shape == (T, 0, H)
    hx = states_of(module, N)
    output, final = module(torch.randn(0, N, I, dtype=DOUBLE), hx, lengths=torch.zeros(N, dtype=torch.int64))
    assert output.shape == (0, N, H)
    for found, given in zip(tensors_of(final), tensors_of(hx)):
        assert torch.equal(found, given)


@pytest.mark.parametrize("option", OPTIONS)
@layers
@pytest.mark.few(1, "option", "name")
def test_stays_with_the_module(name: str, option: str) -> None:
    module, file, x = make(name, **OPTIONS[option]), io.BytesIO(), torch.randn(T, N, I, dtype=DOUBLE)
    torch.save(module, file)
    file.seek(0)
    expected = values_and_grads(module, x)
    again = make(name, **OPTIONS[option])
    again.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), again):
        assert_same(values_and_grads(other, x), expected, rtol=0, atol=0)
        assert repr(other).endswith("".join(f", {key}={value!r}" for key, value in OPTIONS[option].items()) + ")")
    reverted = rnnfast.revert(nn.Sequential(module))
    has = ", ".join(f"{key}={value!r}" for key, value in OPTIONS[option].items())
    assert reverted.rnnfast_report.left_alone == {"0": f"torch.nn.{name} has no {has}"}
    with pytest.raises(RuntimeError, match=f"compiles torch.nn.{name}, which has no {has}"):
        torch.jit.script(module)


def test_weights_of_layer_norm() -> None:
    module = rnnfast.LSTM(I, H, 2, bidirectional=True, layer_norm=True, forget_bias=1.5)
    usual = rnnfast.LSTM(I, H, 2, bidirectional=True)
    added = {key: weight for key, weight in module.named_parameters() if key not in usual.state_dict()}
    sizes = {"gain_ih": 4 * H, "gain_hh": 4 * H, "gain_c": H, "bias_c": H}
    assert {key: tuple(weight.shape) for key, weight in added.items()} == {
        f"{key}_l{k}{end}": (size,) for k in (0, 1) for end in ("", "_reverse") for key, size in sizes.items()
    }
    for _ in range(2):
        assert all((weight == key.startswith("gain")).all() for key, weight in added.items())
        assert (module.bias_ih_l1[H : 2 * H] == 1.5).all()
        module.reset_parameters()
    assert len(rnnfast.GRU(I, H, layer_norm=True).state_dict()) == 6
    assert len(rnnfast.LSTM(I, H, bias=False, layer_norm=True).state_dict()) == 5


def test_says_what_serves_it() -> None:
    x, evaluated = torch.randn(T, N, I), "the evaluator of the native library"
    library = rnnfast.backends()["cpu"].available
    for options, training, backend in (
        ({"zoneout": 0.1}, False, "cpu"),
        ({"recurrent_dropout": 0.1}, True, "cpu"),
        ({"state_clip": 1.0}, False, "cpu"),
        ({"num_heads": 2}, False, "cpu"),
        ({"layer_norm": True, "zoneout": 0.1}, True, "cpu"),
    ):
        module = rnnfast.GRU(I, H, **options).train(training)
        for (choice,) in (rnnfast.explain(module, x), rnnfast.explain(module)):
            assert choice.backend == (backend if library else "reference")
            assert choice.reason.startswith(evaluated) or not library
    (choice,) = rnnfast.explain(rnnfast.GRU(I, H, recurrent_dropout=0.1).eval(), x)
    assert not choice.reason.startswith(evaluated)
    with rnnfast.use_backend("torch"), pytest.raises(RuntimeError, match="'torch' cannot serve this call"):
        module(x)


def test_stream() -> None:
    """By the module, in eval mode."""
    for options in ({"zoneout": 0.3}, {"layer_norm": True}, {"recurrent_dropout": 0.5}, {"num_heads": 2}):
        module, x = rnnfast.GRU(I, H, **options), torch.randn(T, N, I)
        step = rnnfast.Stream(module, N)
        for of_step, expected in zip(x, module.eval()(x)[0]):
            torch.testing.assert_close(step(of_step), expected)
    with pytest.raises(ValueError, match="layers have one hidden_size"):
        rnnfast.Stream(rnnfast.GRU(I, [H, H]))


@layers
def test_refuses(name: str) -> None:
    for value in (-0.1, 1.1, math.nan, "0.5", True, None, torch.tensor(0.5), [0.1, 0.1], (0.1,), (0.1, 2.0)):
        with pytest.raises(ValueError, match=r"zoneout should be a number in the range \[0, 1\]"):
            make(name, zoneout=value)
        with pytest.raises(ValueError, match=r"recurrent_dropout should be a number in the range \[0, 1\]"):
            make(name, recurrent_dropout=value)
    if name != "LSTM":
        with pytest.raises(ValueError, match=r"zoneout should be .* got \(0\.1, 0\.1\)"):
            make(name, zoneout=(0.1, 0.1))
    for value in (1, None, "True"):
        with pytest.raises(TypeError, match=f"layer_norm should be of type bool, got: {type(value).__name__}"):
            make(name, layer_norm=value)
    for value in (0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match="state_clip should be None or a finite number above 0"):
            make(name, state_clip=value)
    for options in OPTIONS.values():
        for own in {"LSTM": [{"proj_size": 2}], "GRU": [{"reset_after": False}]}.get(name, []):
            has = next(f"{key}" for key in own)
            with pytest.raises(ValueError, match=f"cannot go with {has}"):
                make(name, **options, **own)
        with pytest.raises(ValueError, match=r"are for real dtypes, got torch\.complex64"):
            make(name, dtype=torch.complex64, **options)(torch.zeros(T, N, I, dtype=torch.complex64))


# A size for each layer


SIZES = [5, 7, 3]


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3}, {"layer_norm": True, "state_clip": 0.05}], ids=str)
@layers
def test_hidden_sizes(name: str, options: dict) -> None:
    """As layers one above the other."""
    module = getattr(rnnfast, name)(I, SIZES, bidirectional=True, dropout=0.2, dtype=DOUBLE, **options)
    parts, below = [], I
    for k, size in enumerate(SIZES):
        parts.append(getattr(rnnfast, name)(below, size, bidirectional=True, dtype=DOUBLE, **options))
        own = {key: weight for key, weight in module.state_dict().items() if f"_l{k}" in key}
        parts[-1].load_state_dict({key.replace(f"_l{k}", "_l0"): weight for key, weight in own.items()})
        below = 2 * size
    x = torch.randn(T, N, I, dtype=DOUBLE)
    hx = tuple(torch.randn(2, N, sum(SIZES), dtype=DOUBLE) for _ in range(1 + (name == "LSTM")))
    torch.manual_seed(1)
    found, final, states = module(x, hx if name == "LSTM" else hx[0], lengths=LENGTHS, return_states=True)
    torch.manual_seed(1)
    y, finals, every = x, [], []
    for part, *own in zip(parts, *(state.split(SIZES, 2) for state in hx)):
        y = y if part is parts[0] else F.dropout(y, 0.2)
        y, *others = part(y, tuple(own) if name == "LSTM" else own[0], lengths=LENGTHS, return_states=True)
        finals.append(tensors_of(others[0]))
        every.append(tensors_of(others[1]))
    torch.testing.assert_close(found, y)
    for k, (of_final, of_states) in enumerate(zip(tensors_of(final), tensors_of(states))):
        torch.testing.assert_close(of_final, torch.cat([of[k] for of in finals], 2))
        torch.testing.assert_close(of_states, torch.cat([of[k] for of in every], 3))


@layers
def test_hidden_sizes_as_a_module(name: str) -> None:
    module = getattr(rnnfast, name)(I, tuple(SIZES), batch_first=True, init="orthogonal")
    assert f"({I}, {SIZES}, num_layers=3" in repr(module)
    for k, size in enumerate(SIZES):
        gate = getattr(module, f"weight_hh_l{k}")[:size].detach()
        torch.testing.assert_close(gate.mT @ gate, torch.eye(size), rtol=0, atol=1e-5)
        assert 0.5 < getattr(module, f"bias_ih_l{k}").abs().max() * size**0.5 <= 1
    x = torch.randn(N, T, I)
    packed = pack_padded_sequence(x, torch.tensor([5, 3, 1]), batch_first=True)
    output, final = module(packed)
    assert output.data.shape == (9, 3)
    assert tensors_of(final)[0].shape == (1, N, sum(SIZES))
    of_packed, of_lengths = module(packed, final)[1], module(x, final, lengths=torch.tensor([5, 3, 1]))[1]
    torch.testing.assert_close(of_packed, of_lengths)
    unbatched, of_row = module(x[0], tuple(f[:, 0] for f in final) if name == "LSTM" else final[:, 0])
    assert unbatched.shape == (T, 3) and tensors_of(of_row)[0].shape == (1, sum(SIZES))
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    (choice,) = rnnfast.explain(module, x)
    assert choice.backend in ("cpu", "torch", "reference")
    left = rnnfast.revert(nn.Sequential(module)).rnnfast_report.left_alone
    assert left == {"0": f"torch.nn.{name} has no hidden_sizes=(5, 7, 3)"}
    with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size \(1, 3, 15\), got \[1, 3, 14\]"):
        module(x, [torch.zeros(1, N, 14)] * 2 if name == "LSTM" else torch.zeros(1, N, 14))


@layers
def test_hidden_sizes_refused(name: str) -> None:
    make = getattr(rnnfast, name)
    for sizes in ([], [4, 0], [4, -1]):
        with pytest.raises(ValueError, match=r"greater than zero|has to have a size for each layer"):
            make(I, sizes)
    for sizes in ([4, 2.0], [4, True], ["4"]):
        with pytest.raises(TypeError, match="hidden_size should be of type int, got: "):
            make(I, sizes)
    with pytest.raises(ValueError, match=r"a size for each layer, got \[4, 5\] and num_layers=3"):
        make(I, [4, 5], 3)
    if name == "LSTM":
        with pytest.raises(ValueError, match="proj_size cannot go with a hidden_size for each layer"):
            make(I, [4, 5], proj_size=2)


# Layers of any cell


@rnnfast.cell(gates="i f g o", states="h c")
def own_lstm(x, a, s):
    h, c = rnnfast.cells.lstm.function(x, a, s)
    return h * 1.0, c


FLEX = {key: of for key, of in OPTIONS.items() if "layer_norm" not in of}
FLEX["all"] = {"recurrent_dropout": 0.4, "zoneout": (0.3, 0.1), "state_clip": 0.05}


@on_each
@pytest.mark.parametrize("option", FLEX)
@pytest.mark.parametrize("cell", [rnnfast.cells.lstm, own_lstm], ids=str)
@pytest.mark.few(1, "kernels", "option", "cell")
def test_of_any_cell(cell: Any, option: str, kernels: str) -> None:
    """An LSTM in the words of FlexRNN, with kernels and without."""
    layer = make("LSTM", bidirectional=True, **FLEX[option])
    for recompute in (False, True):
        net = rnnfast.FlexRNN(cell, I, H, bidirectional=True, dtype=DOUBLE, recompute=recompute, **FLEX[option])
        net.load_state_dict(layer.state_dict())
        inputs = torch.randn(T, N, I, dtype=DOUBLE), states_of(layer, N)
        with use(kernels):
            for training in (True, False):
                expected = values_and_grads(Paper(layer.train(training)), *inputs, resets=RESETS)
                assert_same(values_and_grads(net.train(training), *inputs, resets=RESETS), expected)


@on_each
@pytest.mark.few(1, "kernels")
def test_clips_what_is_made_of_weights_alone_row_by_row(kernels: str) -> None:
    @rnnfast.cell(gates="g", states="h c", weights="u")
    def cell(x: Any, a: Any, s: Any, w: Any) -> Any:
        return s.c * torch.tanh(x.g), torch.tanh(w.u)

    net, x = rnnfast.FlexRNN(cell, I, H, dtype=DOUBLE, state_clip=0.5), torch.randn(1, N, I, dtype=DOUBLE)
    with use(kernels):
        _, (_, c) = net(x)
        (found,) = torch.autograd.grad(c, net.weight_u_l0, torch.ones_like(c))
    torch.testing.assert_close(found, N * 0.5 * (1 - net.weight_u_l0.tanh() ** 2).detach())


def test_of_heads_and_a_diagonal() -> None:
    """Dropout of what heads multiply; and zoneout of what is no matrix. In eval mode a dropout is none."""
    x, indrnn = torch.randn(T, N, I), rnnfast.cells.indrnn
    net = rnnfast.FlexRNN(rnnfast.cells.slstm, I, H, num_heads=2, recurrent_dropout=1.0)
    without = copy.deepcopy(net)
    without.load_state_dict({k: w * (not k.startswith("weight_hh")) for k, w in net.state_dict().items()})
    torch.testing.assert_close(net(x)[0], without.eval()(x)[0])
    assert not torch.equal(net.eval()(x)[0], without(x)[0])
    for options in ({"recurrent": "diagonal"}, {"recurrent": "none"}):
        net = rnnfast.FlexRNN(rnnfast.cells.lstm, I, H, zoneout=1.0, **options)
        assert not net(x)[0].any()
        with pytest.raises(ValueError, match="recurrent_dropout needs a dense recurrence"):
            rnnfast.FlexRNN(rnnfast.cells.lstm, I, H, recurrent_dropout=0.1, **options)
    with pytest.raises(ValueError, match="recurrent_dropout needs a dense recurrence"):
        rnnfast.FlexRNN(indrnn, I, H, recurrent_dropout=0.1)
    for zoneout in (2.0, (0.1, 0.1), [0.1]):
        with pytest.raises(ValueError, match="zoneout should be a number in the range"):
            rnnfast.FlexRNN(indrnn, I, H, zoneout=zoneout)


def test_explains_layers_of_any_cell() -> None:
    net, x = rnnfast.FlexRNN(rnnfast.cells.lstm, I, H, recurrent_dropout=0.2), torch.randn(T, N, I)
    assert repr(net).endswith(", recurrent_dropout=0.2)")
    (training,), (evaluated,) = rnnfast.explain(net, x), rnnfast.explain(net.eval(), x)
    if rnnfast.backends()["cpu"].available:
        assert training.reason.startswith("the evaluator") and evaluated.reason.startswith("native kernels")
    torch._dynamo.reset()
    compiled = torch.compile(net.train(), fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    found = compiled(x)
    torch.manual_seed(2)
    torch.testing.assert_close(found, net(x))


# Heads


@layers
def test_heads_are_those_of_any_cell(name: str) -> None:
    """With FlexRNN's names, shapes and results."""
    stack = {"num_layers": 2, "bidirectional": True, "num_heads": 3}
    module = make(name, **stack)
    cell = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}[name]
    net = rnnfast.FlexRNN(getattr(rnnfast.cells, cell), I, H, **stack, dtype=DOUBLE)
    net.load_state_dict(module.state_dict())
    x, hx = torch.randn(T, N, I, dtype=DOUBLE), states_of(module, N)
    output, states = net(x, hx if name == "LSTM" else (hx,), lengths=LENGTHS)
    found = module(x, hx, lengths=LENGTHS)
    torch.testing.assert_close(tensors_of(found), [output, *states], rtol=0, atol=0)
    bound = 1 / math.sqrt(H)
    assert 0.9 * bound < torch.cat([weight.flatten() for weight in module.parameters()]).abs().max() <= bound
    assert repr(module) == f"{name}(4, 6, num_layers=2, bidirectional=True, num_heads=3)"
    reverted = rnnfast.revert(nn.Sequential(module))
    assert reverted.rnnfast_report.left_alone == {"0": f"torch.nn.{name} has no num_heads=3"}


@layers
def test_heads_with_other_options(name: str) -> None:
    """Sizes of layers, orthogonal blocks, and weight_dropout, which here drops all."""
    module = make(name, init="orthogonal", num_heads=2)
    for block in module.weight_hh_l0.detach().flatten(0, 1).split(H // 2):
        torch.testing.assert_close(block.mT @ block, torch.eye(H // 2, dtype=DOUBLE))
    sized = getattr(rnnfast, name)(I, [4, 8], num_heads=2, weight_dropout=1.0, dtype=DOUBLE)
    gates = {"RNN": 1, "LSTM": 4, "GRU": 3}[name]
    assert [list(sized.get_parameter(f"weight_hh_l{k}").shape) for k in (0, 1)] == [
        [2, 2 * gates, 2],
        [2, 4 * gates, 4],
    ]
    x, without = torch.randn(T, N, I, dtype=DOUBLE), copy.deepcopy(sized).eval()
    for key, weight in without.named_parameters():
        weight.data.mul_(not key.startswith("weight_hh"))
    torch.testing.assert_close(tensors_of(sized(x)), tensors_of(without(x)))


@layers
def test_heads_refused(name: str) -> None:
    for heads in (4, 0, -2):
        with pytest.raises(
            ValueError, match=f"num_heads has to be a divisor of hidden_size, got {heads} heads of 6 units"
        ):
            make(name, num_heads=heads)
    for heads in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match=f"num_heads should be of type int, got: {type(heads).__name__}"):
            make(name, num_heads=heads)
    module = make(name, num_heads=2)
    module.weight_hh_l0 = nn.Parameter(torch.randn(2, 5, 3, dtype=DOUBLE))
    with pytest.raises(RuntimeError, match=r"weight_hh has shape \[10, 6\]"):
        module(torch.randn(T, N, I, dtype=DOUBLE))
