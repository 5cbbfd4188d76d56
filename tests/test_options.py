"""Initialisations of ours, and dropout of recurrent weights."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from helpers import CELL_MODULES, LAYERS, assert_same, pair, tensors_of, values_and_grads
from torch import Tensor, nn
from torch.nn import functional as F

import rnnfast

I, H = 4, 6
DOUBLE = torch.float64
everything = pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
layers = pytest.mark.parametrize("name", LAYERS)


def make(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    stack = {"num_layers": 2, "bidirectional": True} if name in LAYERS else {}
    return getattr(rnnfast, name)(I, H, **{"dtype": DOUBLE, **stack, **options})


def assert_orthogonal(gate: Tensor) -> None:
    bound = 2 * gate.size(0) * torch.finfo(gate.dtype).eps  # of Householder's method
    gate = gate.detach().to(DOUBLE)
    torch.testing.assert_close(gate.mT @ gate, torch.eye(gate.size(1), dtype=DOUBLE), rtol=0, atol=bound)


@pytest.mark.parametrize("options", [{}, {"proj_size": 3}, {"dtype": torch.float32}], ids=str)
@everything
def test_orthogonal_gates(name: str, options: dict) -> None:
    if "proj_size" in options and name != "LSTM":
        options = {}
    module, usual = make(name, init="orthogonal", **options), make(name, **options)
    for again in (False, True):
        if again:
            module.reset_parameters()
        for key, weight in module.named_parameters():
            if key.startswith("weight_hh"):
                gates = weight.split(H)
                assert len(gates) == {"R": 1, "L": 4, "G": 3}[name[0]]
                for gate in gates:
                    assert_orthogonal(gate)
                assert not any(torch.equal(gates[0], gate) for gate in gates[1:])
            elif not again:
                assert torch.equal(weight, dict(usual.named_parameters())[key]), key


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_forget_bias(name: str) -> None:
    module, usual = make(name, forget_bias=1.5), make(name)
    for key, weight in usual.named_parameters():
        if key.startswith("bias"):
            weight.data[H : 2 * H] = 1.5 if "_ih" in key else 0
    assert_same(module.state_dict(), usual.state_dict(), rtol=0, atol=0)
    module.reset_parameters()
    biases = {key: weight[H : 2 * H] for key, weight in module.named_parameters() if key.startswith("bias")}
    assert all((of == (1.5 if "_ih" in key else 0)).all() for key, of in biases.items())
    assert not torch.equal(next(module.parameters()), next(usual.parameters()))


def test_half_types_and_the_meta_device() -> None:
    assert_orthogonal(make("GRU", init="orthogonal", dtype=torch.bfloat16).weight_hh_l0[:H])
    on_meta = make("LSTM", init="orthogonal", forget_bias=1.0, device="meta")
    module = on_meta.to_empty(device="cpu")
    module.reset_parameters()
    assert_orthogonal(module.weight_hh_l1_reverse[:H])
    assert (module.bias_ih_l0[H : 2 * H] == 1).all()


@everything
def test_options_stay_with_the_module(name: str) -> None:
    options = {"init": "orthogonal"} | ({"forget_bias": 2.0} if name.startswith("LSTM") else {})
    options |= {"weight_dropout": 0.5} if name in LAYERS else {}
    module = make(name, **options)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (module, copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert other._rnnfast_options == rnnfast.modules.Options(**options)
        assert repr(other).endswith("".join(f", {key}={value!r}" for key, value in options.items()) + ")")
    reverted = rnnfast.revert(nn.Sequential(make(name, **options)))
    if name in LAYERS:
        assert reverted.rnnfast_report.left_alone == {"0": f"torch.nn.{name} has no weight_dropout=0.5"}
    else:
        assert type(reverted[0]) is getattr(nn, name)
        assert "_rnnfast_options" not in vars(reverted[0])


OWN = rnnfast.modules.Options._fields


@pytest.mark.parametrize("library", [rnnfast, nn], ids=["ours", "converted"])
@everything
def test_subclasses_have_the_short_names_for_themselves(name: str, library: object) -> None:
    base = getattr(library, name)

    class WithAttributes(base):
        def __init__(self, flip: bool) -> None:
            super().__init__(I, H)
            for k, key in enumerate(OWN):
                setattr(self, key, nn.Linear(2, 3) if k % 2 == flip else nn.Parameter(torch.ones(2)))

    class WithMethods(base):
        init = reset_after = forget_bias = weight_dropout = recurrent_dropout = zoneout = lambda self: 1
        layer_norm = state_clip = hidden_sizes = num_heads = init

    x, plain = torch.randn(5, 3, I) if name in LAYERS else torch.randn(3, I), base(I, H)
    for module in (WithAttributes(False), WithAttributes(True), WithMethods(I, H)):
        module.load_state_dict(plain.state_dict(), strict=False)
        own = {key: getattr(module, key) for key in OWN}
        parameters = len(list(module.parameters()))
        (module,) = rnnfast.convert(nn.Sequential(module))
        assert isinstance(module, rnnfast.modules._Module)
        assert all(
            getattr(module, key) == of if callable(of) else getattr(module, key) is of for key, of in own.items()
        )
        assert repr(module).startswith("With")
        assert len(list(module.parameters())) == parameters
        torch.testing.assert_close(tensors_of(module(x)), tensors_of(plain(x)))
        assert len(rnnfast.explain(module, x)) == 1
        assert copy.deepcopy(module)._rnnfast_options == rnnfast.modules.Options()


def test_explain_of_a_single_step_without_torchs_forward() -> None:
    """Which reads weights that nothing has dropped out."""
    x, says = torch.randn(1, 3, I), "a single step is quicker by torch's"
    for chance in (0.0, 0.5):
        layer = rnnfast.GRU(I, 256, weight_dropout=chance)
        for training in (True, False):
            (choice,) = rnnfast.explain(layer.train(training), x)
            assert (says in choice.reason) == (choice.backend == "cpu" and not (chance and training))


@everything
def test_refuses(name: str) -> None:
    for init in ("zeros", 1, True):
        with pytest.raises(ValueError, match=f"init should be None or 'orthogonal', got {init!r}"):
            make(name, init=init)
    with pytest.raises(ValueError, match=r"init='orthogonal' is for real dtypes, got torch\.complex64"):
        make(name, init="orthogonal", dtype=torch.complex64)
    if name.startswith("GRU"):
        for value in (None, 0, "False", torch.tensor(True)):
            with pytest.raises(TypeError, match=f"reset_after should be of type bool, got: {type(value).__name__}"):
                make(name, reset_after=value)
    if name.startswith("LSTM"):
        for value in ("1", True, torch.tensor(1.0), float("nan"), float("inf"), 1j):
            with pytest.raises(ValueError, match="forget_bias should be None or a finite number, got"):
                make(name, forget_bias=value)
        with pytest.raises(ValueError, match="forget_bias is the start of a bias"):
            make(name, forget_bias=0.0, bias=False)
    if name in LAYERS:
        for chance in (-0.1, 1.1, float("nan"), "0.5", True, None, torch.tensor(0.5), 0.5j):
            with pytest.raises(ValueError, match="weight_dropout should be a number in the range"):
                make(name, weight_dropout=chance)


# Dropout of recurrent weights


class Dropped(nn.Module):
    """What a layer of torch.nn makes of weights that were dropped out before."""

    def __init__(self, module: nn.Module, chance: float) -> None:
        super().__init__()
        self.module, self.chance = module, chance

    def forward(self, *inputs: Tensor) -> tuple:
        kept = {
            key: F.dropout(weight, self.chance) if key.startswith("weight_hh") else weight
            for key, weight in self.module.named_parameters()
        }
        return torch.func.functional_call(self.module, kept, inputs)


@pytest.mark.few(2, "backend", "name", "recompute")
@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@layers
def test_weight_dropout(name: str, recompute: bool, backend: str) -> None:
    """One mask a call, from torch's generator, for all steps; none in eval mode."""
    stack = {"num_layers": 2, "bidirectional": True, "dtype": DOUBLE}
    theirs, _ = pair(name, I, H, **stack)
    ours = getattr(rnnfast, name)(I, H, **stack, weight_dropout=0.4, recompute=recompute)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3, I, dtype=DOUBLE)
    found, expected = values_and_grads(ours, x), values_and_grads(Dropped(theirs, 0.4), x)
    assert_same({key.replace("of ", "of module.") if "_" in key else key: of for key, of in found.items()}, expected)
    assert_same(values_and_grads(ours.eval(), x), values_and_grads(theirs, x))


@layers
def test_weight_dropout_without_gradients(name: str) -> None:
    """In training mode also, where a call of the library alone would serve; and of a single step of large layers."""
    ours = getattr(rnnfast, name)(I, 128, weight_dropout=1.0)
    x, h = torch.randn(1, 3, I), torch.randn(1, 3, 128)
    hx = (h, h) if name == "LSTM" else h
    without = copy.deepcopy(ours)
    nn.init.zeros_(without.weight_hh_l0)
    expected = tensors_of(without.eval()(x, hx))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(tensors_of(ours(x, hx)), expected)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_weight_dropout_masks_the_gate_that_it_belongs_to(name: str) -> None:
    """Of a single unit with W_hh of ones, whose few masks are told apart by what a step makes of the state."""
    ours = getattr(rnnfast, name)(1, 1, bias=False, weight_dropout=0.5, dtype=DOUBLE)
    nn.init.zeros_(ours.weight_ih_l0)
    gates = ours.weight_hh_l0.size(0)
    nn.init.ones_(ours.weight_hh_l0)
    x, h = torch.zeros(1, 1, 1, dtype=DOUBLE), torch.full((1, 1, 1), 0.7, dtype=DOUBLE)
    hx = (h, h / 2) if name == "LSTM" else h
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        mask = F.dropout(torch.ones(gates, 1, dtype=DOUBLE), 0.5)
        torch.manual_seed(seed)
        found = ours(x, hx)[0].item()
        a = (mask * 0.7).flatten().tolist()
        sigmoid, tanh = (lambda v: 1 / (1 + math.exp(-v))), math.tanh
        if name == "LSTM":
            c = sigmoid(a[1]) * 0.35 + sigmoid(a[0]) * tanh(a[2])
            expected = sigmoid(a[3]) * tanh(c)
        else:
            r, z = sigmoid(a[0]), sigmoid(a[1])
            expected = (1 - z) * tanh(r * a[2]) + z * 0.7
        assert abs(found - expected) < 1e-12
        seen.add(tuple(a))
    assert len(seen) > gates


def test_weight_dropout_statistics() -> None:
    """Of the share of weights that are zero, and of the mean of the others."""
    chance, ours = 0.3, rnnfast.RNN(1, 64, nonlinearity="relu", bias=False, weight_dropout=0.3)
    nn.init.zeros_(ours.weight_ih_l0)
    nn.init.ones_(ours.weight_hh_l0)
    output, _ = ours(torch.zeros(1, 64, 1), torch.eye(64)[None])  # a column of weight_hh for each row
    kept = output[0] != 0
    assert abs(1 - kept.double().mean() - chance) < 5 * (chance * (1 - chance) / kept.numel()) ** 0.5
    torch.testing.assert_close(output[0][kept], torch.full((int(kept.sum()),), 1 / (1 - chance)))
    assert not torch.equal(ours(torch.zeros(1, 64, 1), torch.eye(64)[None])[0], output)
