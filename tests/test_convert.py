"""convert, revert, explain, backends and ``python -m rnnfast``."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from abc import ABCMeta
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CELL_MODULES, LAYERS, assert_same, choose, chooser, flatten, states, train, values_and_grads
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
import rnnfast.__main__ as command
from rnnfast import modules

DOUBLE = torch.float64


class Tagger(nn.Module):
    """Every recurrent module: nested, in a list, and one that stands at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Identity())
        self.lstm = nn.LSTM(6, 5, 2, dropout=0.3, bidirectional=True, proj_size=3, batch_first=True)
        self.stack = nn.ModuleList([nn.RNN(6, 6, nonlinearity="relu"), nn.GRU(6, 6), nn.RNN(6, 6)])
        self.shared = self.stack[1]
        self.cells = nn.ModuleDict({"rnn": nn.RNNCell(6, 6, nonlinearity="relu"), "gru": nn.GRUCell(6, 6)})
        self.last = nn.LSTMCell(6, 2, bias=False)

    def forward(self, x: torch.Tensor) -> tuple:
        x, _ = self.lstm(self.encoder(x))
        x = x.transpose(0, 1)
        for layer in self.stack:
            x, _ = layer(x)
        x, h = self.shared(x)
        h = self.cells["gru"](x[-1], self.cells["rnn"](x[0], h[0]))
        return x, self.last(h)


RECURRENT = {
    "lstm": ("LSTM", 0),
    "stack.0": ("RNN", 0),
    "stack.1": ("GRU", 0),
    "stack.2": ("RNN", 0),
    "cells.rnn": ("RNNCell", 0),
    "cells.gru": ("GRUCell", 0),
    "last": ("LSTMCell", 0),
}


class Subclass(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(2 * input, hx)


@pytest.fixture
def model() -> Tagger:
    return Tagger().double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, 4, dtype=DOUBLE)


def _is_converted(module: nn.Module, name: str) -> bool:
    """Whether a module runs our code, and is its class of torch.nn's to whoever asks."""
    ours, theirs = getattr(rnnfast, name), getattr(nn, name)
    return isinstance(module, ours) and isinstance(module, theirs) and type(module) in {theirs} - {ours}


def _classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_convert_and_revert(model: Tagger, x: torch.Tensor, training: bool) -> None:
    model.train(training)
    expected, before = values_and_grads(model, x), _classes(model)
    parameters, modules, keys = list(model.parameters()), list(model.modules()), list(model.state_dict())
    printed = repr(model)

    assert rnnfast.convert(model) is model
    after = _classes(model)
    for name, module in model.named_modules():
        if name in RECURRENT:
            assert _is_converted(module, RECURRENT[name][0])
        else:
            assert type(module) is before[name]
    assert model.rnnfast_report.converted == [name for name in before if name in RECURRENT]
    assert model.rnnfast_report.left_alone == {}
    assert model.shared is model.stack[1]
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert all(module.training is training for module in model.modules())
    assert repr(model) == printed
    assert_same(values_and_grads(model, x), expected)

    rnnfast.convert(model)  # a second time there is nothing left to do
    assert _classes(model) == after
    assert model.rnnfast_report.converted == []
    assert_same(values_and_grads(model, x), expected)

    assert rnnfast.revert(model) is model
    assert all(cls is before[name] for name, cls in _classes(model).items())
    assert model.rnnfast_report.reverted == list(RECURRENT)
    assert model.rnnfast_report.left_alone == {}
    assert b"rnnfast." not in pickle.dumps(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_same(values_and_grads(model, x), expected, rtol=0, atol=0)
    assert_same(values_and_grads(rnnfast.revert(model), x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_the_model_itself(name: str) -> None:
    module = getattr(nn, name)(4, 5, dtype=DOUBLE)
    x = torch.randn(*((7, 3, 4) if name in LAYERS else (3, 4)), dtype=DOUBLE)
    hx = states(name, *((1, 3, 5) if name in LAYERS else (3, 5)))
    expected = values_and_grads(module, x, hx)
    assert _is_converted(rnnfast.convert(module), name)
    assert module.rnnfast_report.converted == [""]
    assert_same(values_and_grads(module, x, hx), expected)
    assert type(rnnfast.revert(module)) is getattr(nn, name)
    assert_same(values_and_grads(module, x, hx), expected, rtol=0, atol=0)


def test_training_goes_on_with_the_same_optimizer(model: Tagger, x: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    losses = []
    for m in (model.eval(), twin.eval()):  # without dropout
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        losses.append([])
        for step in range(6):
            if m is model and step in (2, 4):
                (rnnfast.convert if step == 2 else rnnfast.revert)(m)
            optimizer.zero_grad()
            loss = sum(t.square().sum() for _, t in flatten(m(x)))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0][-1] < losses[0][0]


def test_hooks_flags_and_attributes_stay(model: Tagger, x: torch.Tensor) -> None:
    calls = []
    model.lstm.register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    model.last.register_full_backward_hook(lambda module, d_inputs, d_outputs: calls.append(type(module)))
    model.stack[0].eval()
    model.stack[0].weight_hh_l0.requires_grad_(False)
    model.lstm.note = "kept"
    rnnfast.convert(model)
    flatten_and_sum = sum(t.sum() for _, t in flatten(model(x)))
    flatten_and_sum.backward()
    assert calls == [nn.LSTM, nn.LSTMCell]
    assert not model.stack[0].training
    assert model.stack[2].training
    assert not model.stack[0].weight_hh_l0.requires_grad
    assert model.lstm.note == "kept"


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "state-dict"])
def test_copies_of_a_converted_model(model: Tagger, x: torch.Tensor, way: str) -> None:
    expected = values_and_grads(model.eval(), x)
    rnnfast.convert(model)
    if way == "state-dict":  # from a converted model to one that is not, strictly
        twin = Tagger().double().eval()
        twin.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(twin.state_dict(), strict=True)
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert _classes(twin) == _classes(model)
        assert twin.rnnfast_report == model.rnnfast_report
    assert_same(values_and_grads(twin, x), expected)
    reverted = rnnfast.revert(twin)
    reverted.lstm.weight_hh_l0 = nn.Parameter(reverted.lstm.weight_hh_l0.detach() * 2)
    model.lstm.weight_hh_l0 = nn.Parameter(model.lstm.weight_hh_l0.detach() * 2)
    assert_same(values_and_grads(model, x), values_and_grads(reverted, x))


def test_weights_changed_while_converted_are_seen_after_revert(model: Tagger, x: torch.Tensor) -> None:
    rnnfast.convert(model)
    model.float().double()
    model.lstm.weight_ih_l1 = nn.Parameter(model.lstm.weight_ih_l1.detach() + 1)
    torch.func.functional_call(model, {k: p * 2 for k, p in model.named_parameters()}, x)
    expected = values_and_grads(model, x)
    assert_same(values_and_grads(rnnfast.revert(model), x), expected)


class Helped(nn.LSTM):
    """A constructor and helpers of its own, but torch's computation."""

    def __init__(self, size: int, note: str = "kept") -> None:
        super().__init__(size, size, batch_first=True)
        self.note = note

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)[0][:, -1]

    def extra_repr(self) -> str:
        return "helped"


class Mixin(metaclass=ABCMeta):  # noqa: B024  its metaclass is what counts
    def summed(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)[0].sum(0)


class GRU(Mixin, nn.GRU):
    """Named as torch's."""


class HelpedCell(nn.GRUCell):
    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return self(x, self(x))


@pytest.mark.parametrize(
    "make, call",
    [
        (lambda: Helped(4), lambda m, x: m.last(x)),
        (lambda: GRU(4, 5), lambda m, x: m.summed(x)),
        (lambda: HelpedCell(4, 4), lambda m, x: m.twice(x[0])),
    ],
    ids=["constructor-and-helper", "mixin", "cell"],
)
def test_subclass_without_a_forward(make: Callable, call: Callable) -> None:
    module = make().double()
    x, cls, printed = torch.randn(3, 7, 4, dtype=DOUBLE), type(module), repr(module)
    expected = call(module, x)
    model = rnnfast.convert(nn.Sequential(nn.ModuleList([module])))
    assert model.rnnfast_report == (["0.0"], {})
    assert isinstance(module, modules.OURS)
    assert isinstance(module, cls)
    assert type(module) in {cls}
    assert repr(module) == printed
    assert_same({"": call(module, x)}, {"": expected})
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert_same({"": call(twin, x)}, {"": expected})
    rnnfast.revert(model)
    assert type(module) is cls
    assert model.rnnfast_report.reverted == ["0.0"]
    assert_same({"": call(module, x)}, {"": expected}, rtol=0, atol=0)
    for _ in range(2):
        (reason,) = rnnfast.convert(nn.Sequential(module), compile=True).rnnfast_report.left_alone.values()
        assert reason.endswith(", and compile is set")
        assert type(module) in {cls}
        rnnfast.convert(nn.Sequential(module))


def test_what_is_left_alone_is_named() -> None:
    quantised = torch.ao.nn.quantized.dynamic.LSTM(4, 5)
    model = nn.ModuleList([nn.Sequential(Subclass(4, 5)), nn.GRU(4, 5), torch.jit.script(nn.LSTM(4, 5)), quantised])
    rnnfast.convert(model)
    assert type(model[0][0]) is Subclass
    assert _is_converted(model[1], "GRU")
    assert model.rnnfast_report.converted == ["1"]
    assert model.rnnfast_report.left_alone == {
        "0.0": "Subclass is a subclass of torch.nn.LSTM with its own forward",
        "2": "it is compiled by TorchScript",
        "3": "it is torch.ao.nn.quantized.dynamic.modules.rnn's",
    }


def test_revert_names_what_it_leaves_alone() -> None:
    class Own(rnnfast.LSTM):
        pass

    model = nn.ModuleList([Own(4, 5), rnnfast.GRU(4, 5, recompute=True), rnnfast.RNNCell(4, 5)])
    rnnfast.revert(model)
    assert [type(module) for module in model[1:]] == [nn.GRU, nn.RNNCell]
    assert repr(model[1]) == "GRU(4, 5)"
    assert vars(model[1]).keys() == vars(nn.GRU(4, 5)).keys()
    assert model.rnnfast_report.reverted == ["1", "2"]
    name = Own.__qualname__
    assert model.rnnfast_report.left_alone == {"0": f"{name} is a subclass of rnnfast.LSTM"}


def test_convert_to_compile(model: Tagger, x: torch.Tensor) -> None:
    expected = values_and_grads(model.eval(), x)
    for _ in range(2):
        rnnfast.convert(model, compile=True)
        assert all(type(model.get_submodule(name)) is getattr(rnnfast, cls) for name, (cls, _) in RECURRENT.items())
        assert_same(values_and_grads(model, x), expected)
        rnnfast.convert(rnnfast.revert(model))  # and from what is no good to compile
    assert model.rnnfast_report.converted == list(RECURRENT)


def test_classes_that_cannot_be_derived_from_are_left_alone() -> None:
    class Named(nn.LSTM):
        def __init_subclass__(cls, *, name: str) -> None:
            super().__init_subclass__()

    class Remade(nn.GRU):
        def __reduce__(self) -> tuple:
            return nn.GRU, (4, 5)

    model = rnnfast.convert(nn.ModuleList([Named(4, 5), nn.GRU(4, 5), Remade(4, 5)]))
    assert model.rnnfast_report.converted == ["1", "2"]
    (reason,) = model.rnnfast_report.left_alone.values()
    assert "is a subclass of torch.nn.LSTM, of which there is no other: " in reason
    assert type(model[0]) is Named
    assert type(copy.deepcopy(model[2])) is nn.GRU


def test_reports_of_parts_are_left_to_none() -> None:
    part = rnnfast.convert(nn.Sequential(nn.LSTM(4, 5)))
    model = rnnfast.revert(nn.ModuleDict({"part": part}))
    assert not hasattr(part, "rnnfast_report")
    assert b"rnnfast." not in pickle.dumps(model)


def test_converted_classes_are_pickled() -> None:
    cls = type(rnnfast.convert(nn.LSTM(4, 5)))
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_qconfig_of_a_parametrized_module() -> None:
    module, x = nn.utils.parametrizations.weight_norm(nn.LSTM(4, 5), "weight_hh_l0"), torch.randn(7, 3, 4)
    expected = rnnfast.convert(module)(x)[0]
    module.qconfig = torch.ao.quantization.default_dynamic_qconfig
    assert not isinstance(module, rnnfast.LSTM)
    assert parametrize.is_parametrized(module, "weight_hh_l0")
    assert_same({"": module(x)[0].detach()}, {"": expected.detach()})


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_branches_on_the_class_are_taken(name: str) -> None:
    """As initialisers, validators and forwards of other people take them."""
    theirs = getattr(nn, name)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = theirs(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.rnn(x)
            if isinstance(self.rnn, (nn.LSTM, nn.LSTMCell)):
                out = out[0]
            return out[0] if isinstance(self.rnn, (nn.RNN, nn.GRU)) else out

    def init(module: nn.Module) -> None:
        if isinstance(module, theirs):
            for p in module.parameters():
                nn.init.constant_(p, 0.1)

    model, x = Branching(), torch.randn(*((7, 3, 4) if name in LAYERS else (3, 4)))
    expected = Branching().apply(init)(x)
    assert_same({"": rnnfast.convert(model).apply(init)(x)}, {"": expected})
    counts = {theirs: 1}
    assert sum(counts.get(type(module), 0) for module in model.modules()) == 1


@pytest.mark.parametrize("name", [name for name in LAYERS + CELL_MODULES if name != "RNN"])
def test_dynamic_quantisation(name: str) -> None:
    """By exact type, of torch's layers and cells but nn.RNN, of which torch has none."""
    theirs, x = getattr(nn, name), torch.randn(*((7, 3, 4) if name in LAYERS else (3, 4)))
    model = nn.ModuleList([theirs(4, 5)])
    expected = torch.ao.quantization.quantize_dynamic(model, {theirs})
    found = torch.ao.quantization.quantize_dynamic(rnnfast.convert(model), {theirs})
    assert type(found[0]) is type(expected[0]) is getattr(torch.ao.nn.quantized.dynamic, name)
    assert_same(dict(flatten(found[0](x))), dict(flatten(expected[0](x))), rtol=0, atol=0)
    assert _is_converted(model[0], name)
    left = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert _is_converted(left[0], name)


def test_a_model_without_recurrent_modules() -> None:
    model = rnnfast.convert(nn.Sequential(nn.Linear(4, 5)))
    assert model.rnnfast_report == ([], {})
    assert rnnfast.explain(model, torch.randn(2, 4)) == []


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_parametrized_module(name: str) -> None:
    class Halved(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    module = getattr(nn, name)(4, 5, dtype=DOUBLE)
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
    parametrize.register_parametrization(module, weight, Halved())
    x = torch.randn(*((7, 3, 4) if name in LAYERS else (3, 4)), dtype=DOUBLE)
    hx = states(name, *((1, 3, 5) if name in LAYERS else (3, 5)))
    theirs = copy.deepcopy(module)
    expected = values_and_grads(module, x, hx)
    rnnfast.convert(module)
    assert module.rnnfast_report.converted == [""]
    assert isinstance(module, getattr(rnnfast, name))
    assert parametrize.is_parametrized(module, weight)
    assert_same(values_and_grads(module, x, hx), expected)
    assert train(module, x, hx) == pytest.approx(train(theirs, x, hx), rel=1e-10)
    rnnfast.revert(module)
    assert isinstance(module, getattr(nn, name))
    assert_same(values_and_grads(module, x, hx), values_and_grads(theirs, x, hx))
    rnnfast.convert(module)
    parametrize.remove_parametrizations(module, weight)
    assert _is_converted(module, name)


# explain and backends


@pytest.fixture
def here() -> str:
    """The backend that serves float32 on this machine's CPU."""
    return "cpu" if rnnfast.backends()["cpu"].available else "torch"


def test_explain(model: Tagger, here: str) -> None:
    model = rnnfast.convert(model.float())
    model.stack[0].eval()
    model.encoder.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
    flags = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    found = rnnfast.explain(model, torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.get_rng_state().equal(generator)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    calls = ["lstm", "stack.0", "stack.1", "stack.2", "stack.1", "cells.rnn", "cells.gru", "last"]
    assert [choice.module for choice in found] == calls
    assert {choice.backend for choice in found} == {here}
    assert found[0].layer == "LSTM(6, 5, proj_size=3, num_layers=2, batch_first=True, dropout=0.3, bidirectional=True)"
    assert {choice.input for choice in found} == {"torch.float32 on cpu"}
    lines = str(found).splitlines()
    assert lines[0].startswith("lstm: LSTM(6, 5, ")
    assert lines[-1].startswith(f"last: LSTMCell(6, 2, bias=False), input torch.float32 on cpu -> {here}: ")
    assert repr(found) == str(found)


def test_explain_without_inputs(model: Tagger, here: str) -> None:
    found = rnnfast.explain(rnnfast.convert(model.float()))
    assert [choice.module for choice in found] == list(RECURRENT)
    assert {choice.backend for choice in found} == {here}
    assert str(rnnfast.explain(nn.Linear(2, 2))) == "no rnnfast module was called"


def test_explain_restores_after_an_error(model: Tagger) -> None:
    rnnfast.convert(model)
    with pytest.raises(RuntimeError):
        rnnfast.explain(model, torch.randn(3, 7, 9, dtype=DOUBLE))
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_explain_names_the_modules_of_torch(model: Tagger, x: torch.Tensor) -> None:
    model.last = rnnfast.LSTMCell(6, 2, dtype=DOUBLE)
    found = rnnfast.explain(model, x)
    assert [choice.backend for choice in found[:-1]] == ["torch.nn"] * 7
    assert found[0].reason == "not an rnnfast module; rnnfast.convert would make it one"
    assert found[-1].backend != "torch.nn"


def test_explain_says_what_runs(here: str) -> None:
    module, (backend, reason) = rnnfast.GRU(4, 5), choose("GRU", torch.device("cpu"), torch.float32)
    assert backend == here
    packed = pack_padded_sequence(torch.randn(3, 2, 4), torch.tensor([3, 2]))
    assert rnnfast.explain(module, packed)[0] == ("", "GRU(4, 5)", "torch.float32 on cpu", here, reason)
    assert str(rnnfast.explain(module, input=packed)).startswith("(the model): GRU(4, 5)")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rnnfast.explain(module, torch.randn(3, 2, 4))[0].input == "torch.bfloat16 on cpu"
        assert rnnfast.explain(module.double(), torch.randn(3, 2, 4).double())[0].input == "torch.float64 on cpu"
        assert rnnfast.explain(rnnfast.GRU(4, 5, dtype=torch.complex64))[0].input == "torch.complex64 on cpu"
    choice = rnnfast.explain(rnnfast.LSTMCell(4, 5, dtype=torch.complex64), torch.randn(2, 4, dtype=torch.complex64))[0]
    assert choice[2:] == ("torch.complex64 on cpu", "reference", "no fused backend serves torch.complex64")
    choice = rnnfast.explain(rnnfast.RNN(4, 5, device="meta"))[0]
    assert choice[2:] == ("torch.float32 on meta", "reference", "no fused backend serves device 'meta'")
    with rnnfast.use_backend("reference"):
        assert rnnfast.explain(module)[0][3:] == ("reference", "asked for by use_backend")


def test_the_choice_depends_on_its_arguments() -> None:
    """And on nothing that holds where it is made."""
    layer, usual = ("LSTM", torch.device("cpu"), torch.float32), choose("LSTM", torch.device("cpu"), torch.float32)
    recorded = "a graph is recorded that others run"
    forward_mode = "forward-mode derivatives are taken through plain torch"
    asked = "asked for by use_backend"
    expected = {
        chooser.Circumstances(): usual,
        chooser.Circumstances(forced="torch"): ("torch", asked),
        chooser.Circumstances(forced="reference", recorded=True): ("reference", asked),
        chooser.Circumstances(forced="torch", forward_mode=True): ("reference", forward_mode),
        chooser.Circumstances(recorded=True): ("torch", recorded),
        chooser.Circumstances(recorded=True, compiled=True): ("torch", recorded),
        chooser.Circumstances(recorded=True, transformed=True): ("reference", chooser._NOT_IN_TORCH),
    }
    with rnnfast.use_backend("reference"), torch.autograd.forward_ad.dual_level():
        assert choose(*layer) == ("reference", asked)
        for circumstances, choice in expected.items():
            assert chooser.choose_backend(circumstances, *layer) == choice


def test_backends() -> None:
    found = rnnfast.backends()
    assert list(found) == ["reference", "torch", "cpu", "triton", "cuda"]
    assert found["reference"].available
    assert found["torch"].available
    assert all(isinstance(b.available, bool) and b.detail for b in found.values())
    found.clear()  # a copy
    assert "reference" in rnnfast.backends()


# python -m rnnfast


def test_command() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(rnnfast.__file__).parents[1])}
    environment.pop("TRITON_INTERPRET", None)  # which takes half a minute
    done = subprocess.run([sys.executable, "-m", "rnnfast"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"rnnfast {rnnfast.__version__}, torch {torch.__version__}, Python ")
    for name, backend in rnnfast.backends().items():
        # This process alone has loaded the emulation, and Triton with the interpreter.
        available = backend.available and (name in ("reference", "torch", "cpu") or torch.cuda.is_available())
        assert any(line.split()[:2] == [name, "yes" if available else "no"] for line in lines)
        checks = [line for line in lines if line.startswith(name) and line.endswith(" ok")]
        assert len(checks) == (3 if available else 0)


@pytest.mark.parametrize("wrong", ["off", "nan", "gradient"])
def test_command_fails_without_parity(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forward = rnnfast.LSTM.forward

    def spoilt(self: nn.Module, *args: Any) -> tuple:
        output, hidden = forward(self, *args)
        if wrong == "gradient":
            return output.detach() + (output - output.detach()) * 1.001, hidden
        return output * (1.001 if wrong == "off" else float("nan")), hidden

    monkeypatch.setattr(rnnfast.LSTM, "forward", spoilt)
    found = rnnfast.backends()
    monkeypatch.setattr(rnnfast, "backends", lambda: {name: found[name] for name in ("reference", "cpu")})
    assert command.main([]) == 1
    printed = capsys.readouterr().out
    assert "LSTM  " in printed
    failed = [line for line in printed.splitlines() if line.endswith(" FAILED")]
    assert failed
    assert all(" LSTM " in line for line in failed)
