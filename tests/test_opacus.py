"""Gradients of each sample, as Opacus asks for them, of our layers as they are."""

from __future__ import annotations

import copy
import importlib
import re
from typing import Any

import pytest
import torch
from helpers import LAYERS, tensors_of
from torch import Tensor, nn

import rnnfast

opacus = pytest.importorskip("opacus", reason="opacus is not installed: pip install rnnfast[interop]")
prepare = importlib.import_module("rnnfast.interop.opacus").prepare
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Opacus' own
N, T, I, H = 4, 5, 3, 6
OPTIONS = {"one": {}, "stack": {"num_layers": 2, "bidirectional": True}, "no-bias": {"bias": False}}


class Classifier(nn.Module):
    """Opacus pickles it, so it is not local."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer
        self.head = nn.Linear(H * (1 + layer.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def make(name: str, library: Any = rnnfast, **options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(getattr(library, name)(I, H, batch_first=True, **options))


def of_samples(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    model = opacus.GradSampleModule(model, loss_reduction="sum", **options)
    model(x).square().sum().backward()
    return {
        name.removeprefix("_module."): getattr(weight, "grad_sample", None) for name, weight in model.named_parameters()
    }


def row_by_row(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    each = [torch.autograd.grad(model(row[None]).square().sum(), list(model.parameters())) for row in x]
    return {name: torch.stack(of) for (name, _), of in zip(model.named_parameters(), zip(*each))}


@pytest.mark.few(2, "backend", "name", "options")
@pytest.mark.runs(torch.float32, N, H, True)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_samples(name: str, options: str, backend: str) -> None:
    x, model = torch.randn(N, T, I), make(name, **OPTIONS[options])
    expected = row_by_row(model, x)
    torch.testing.assert_close(of_samples(prepare(model), x), expected, rtol=1e-4, atol=1e-5)


def test_as_opacus_own_lstm() -> None:
    layers = importlib.import_module("opacus.layers")
    x, ours = torch.randn(N, T, I), make("LSTM", num_layers=2)
    theirs = Classifier(layers.DPLSTM(I, H, 2, batch_first=True))
    for part in ("rnn", "head"):  # by a load_state_dict of its own
        getattr(theirs, part).load_state_dict(getattr(ours, part).state_dict())
    renamed = {re.sub(r"rnn\.l(\d)\.(.h)\.(\w+)", r"rnn.\3_\2_l\1", k): of for k, of in of_samples(theirs, x).items()}
    found = of_samples(prepare(ours), x)
    assert found.keys() == renamed.keys()
    for key, of in found.items():
        torch.testing.assert_close(of, renamed[key], rtol=1e-4, atol=1e-5)


def test_some_weights_frozen_and_others_tied() -> None:
    model, x = make("RNN", num_layers=2), torch.randn(N, T, I)
    model.rnn.weight_hh_l1 = model.rnn.weight_hh_l0
    model.rnn.bias_ih_l0.requires_grad_(False)
    found = of_samples(prepare(model), x)
    assert found.pop("rnn.bias_ih_l0") is None
    named = {name: of for name, of in model.named_parameters() if of.requires_grad}
    each = [torch.autograd.grad(model(row[None]).square().sum(), list(named.values())) for row in x]
    for name, of in zip(named, zip(*each)):
        torch.testing.assert_close(found[name], torch.stack(of), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_private_training(name: str) -> None:
    """Without noise and with a large bound it is the training of the sums of gradients."""
    data = torch.utils.data.TensorDataset(torch.randn(N, T, I))

    def trained(private: bool) -> dict[str, Tensor]:
        model = make(name)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loader = torch.utils.data.DataLoader(data, batch_size=N)
        if private:
            model, optimizer, loader = opacus.PrivacyEngine().make_private(
                module=prepare(model), optimizer=optimizer, data_loader=loader,
                noise_multiplier=0.0, max_grad_norm=1e6, poisson_sampling=False,
            )  # fmt: skip
        for _ in range(3):
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        return {key.removeprefix("_module."): of for key, of in model.state_dict().items()}

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-4, atol=1e-5)


def test_private_training_by_ghost_clipping() -> None:
    """With a bound that clips, as by the gradients of samples."""
    x, y = torch.randn(N, T, I), torch.tensor([0, 1, 1, 0])
    found = []
    for mode in ("hooks", "ghost"):
        model = make("GRU")
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=N)
        criterion: Any = nn.CrossEntropyLoss()
        more = {"criterion": criterion} if mode == "ghost" else {}
        model, optimizer, *between, _ = opacus.PrivacyEngine().make_private(
            module=prepare(model), optimizer=torch.optim.SGD(model.parameters(), 0.1), data_loader=loader,
            noise_multiplier=0.0, max_grad_norm=0.1, poisson_sampling=False, grad_sample_mode=mode, **more,
        )  # fmt: skip
        (criterion,) = between or (criterion,)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        found.append(dict(model.state_dict()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class OfStates(Classifier):
    def __init__(self, layer: nn.Module, alone: bool) -> None:
        super().__init__(layer)
        self.alone = alone

    def forward(self, x: Tensor) -> Tensor:
        y, h_n = self.rnn(x)
        h = (h_n[0] if isinstance(h_n, tuple) else h_n)[-1]
        return self.head(h if self.alone else h + y[:, -1])


@pytest.mark.parametrize("alone", [False, True], ids=["with the output", "alone"])
@pytest.mark.parametrize("name", LAYERS)
def test_refuses_the_gradient_of_states(name: str, alone: bool) -> None:
    model = prepare(OfStates(make(name).rnn, alone))
    with pytest.raises(RuntimeError, match="take the last step of the output instead"):
        of_samples(model, torch.randn(N, T, I))


class Scaled(rnnfast.LSTM):
    def forward(self, x: Tensor) -> Any:
        return super().forward(2 * x)


def test_only_prepared_layers_are_trained() -> None:
    """What Opacus knows of a class is for all of its instances."""
    prepare(make("LSTM"))
    x = torch.randn(N, T, I)
    with pytest.raises(RuntimeError, match="this LSTM is not prepared"):
        of_samples(make("LSTM"), x)
    model = prepare(make("LSTM", num_layers=2))
    model.rnn.dropout = 0.5  # after it was prepared
    with pytest.raises(ValueError, match="cannot train the layer LSTM with dropout"):
        of_samples(model, x)
    with pytest.raises(ValueError, match="cannot train the layer rnn with its own forward"):
        prepare(Classifier(Scaled(I, H, batch_first=True)))


@pytest.mark.parametrize("name", LAYERS)
def test_watches_trainings_alone_and_goes_with_revert(name: str) -> None:
    model, x = prepare(prepare(make(name))), torch.randn(N, T, I)
    again = copy.deepcopy(model)
    layer = model.rnn
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks
    assert sum(map(len, hooks)) == 2
    for training, grad in ((False, True), (True, False)):
        with torch.set_grad_enabled(grad):
            _, h_n = layer.train(training)(x, None, lengths=torch.tensor([1] * N))
            if grad:
                sum(of.sum() for of in tensors_of(h_n)).backward()
    layer.train()
    with pytest.raises(ValueError, match="takes one batch of tensors and nothing else"):
        layer(x, None)
    rnnfast.revert(model)
    assert not any(hooks)
    assert not any(key.startswith("_rnnfast") for key in vars(layer))
    layer(x, None)
    rnnfast.revert(copy.deepcopy(again)).rnn(x, None)
    of_samples(again, x)  # a copy is prepared as its original was, and has hooks of its own


def test_compares_sizes() -> None:
    layer = prepare(make("LSTM").rnn)
    sampler = opacus.GradSampleModule.GRAD_SAMPLERS[rnnfast.LSTM]
    with pytest.raises(RuntimeError, match=r"inputs of \[4, 5\] samples and steps, and gradients of \[5, 4\]"):
        sampler(layer, [torch.randn(N, T, I)], torch.randn(T, N, H))


def test_refuses() -> None:
    for model, why in (
        (nn.Sequential(rnnfast.LSTM(I, H)), "the layer 0 with batch_first=False"),
        (make("LSTM", num_layers=2, dropout=0.5), "the layer rnn with dropout"),
        (make("GRU", reset_after=False), "reset_after=False"),
        (make("LSTM", proj_size=2), "Opacus' training has no layers with proj_size=2"),
        (make("LSTM", weight_dropout=0.2), "Opacus' training has no layers with weight_dropout=0.2"),
        (rnnfast.convert(make("LSTM", nn)), "a class of torch.nn's"),
    ):
        with pytest.raises(ValueError, match=why):
            prepare(model)
    layer, x = prepare(make("LSTM").rnn), torch.randn(N, T, I)
    nested = torch.nested.as_nested_tensor(x, layout=torch.jagged)
    for args, kwargs in (((x,), {"lengths": torch.tensor([1] * N)}), ((x, None), {}), ((x[0],), {}), ((nested,), {})):
        with pytest.raises(ValueError, match="takes one batch of tensors and nothing else"):
            layer(*args, **kwargs)
