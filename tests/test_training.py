"""What people train with, on our layers as on torch.nn's: optimizers, clipping, mixed precision, saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LAYERS, assert_same, pair, tensors_of
from torch import Tensor, nn
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint

import rnnfast

T, N, I, H = 6, 3, 4, 5
STACK = {"num_layers": 2, "bidirectional": True}
SINGLE = torch.float32
layers = pytest.mark.parametrize("name", LAYERS)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
runs = pytest.mark.runs(SINGLE, N, H, True)
interpreted = pytest.mark.full_on("triton")  # seconds each


def loss_of(module: nn.Module, x: Tensor) -> Tensor:
    return sum(t.float().square().mean() for t in tensors_of(module(x)))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters()}


def train(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, after: Callable = lambda: None) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(module, x).backward()
        after()
        optimizer.step()


@pytest.mark.few(1, "backend", "name", "optimizer", "kind")
@interpreted
@runs
@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@layers
def test_optimizers(name: str, optimizer: str, kind: str, backend: str) -> None:
    x = torch.randn(T, N, I)
    modules = pair(name, I, H, **STACK)
    for module in modules:
        train(module, getattr(torch.optim, optimizer)(module.parameters(), 0.05, **{kind: True}), x)
    assert_same(*map(weights, modules[::-1]), rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["foreach", "fused"])
@layers
def test_optimizers_on_a_gpu(name: str, kind: str) -> None:
    x = torch.randn(T, N, I, device="cuda", dtype=torch.float64)
    modules = pair(name, I, H, **STACK, device="cuda", dtype=torch.float64)
    for module in modules:
        train(module, torch.optim.AdamW(module.parameters(), 0.05, **{kind: True}), x)
    assert_same(*map(weights, modules[::-1]))


@pytest.mark.few(1, "backend", "name", "clip")
@runs
@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_], ids=lambda clip: clip.__name__)
@layers
def test_clipping(name: str, clip: Callable, backend: str) -> None:
    x = torch.randn(T, N, I)
    modules = pair(name, I, H, **STACK)
    found = []
    for module in modules:
        loss_of(module, x).backward()
        norm = torch.cat([of.flatten() for of in gradients(module).values()]).norm()
        found.append((norm, clip(module.parameters(), 0.01), gradients(module)))
    (_, of_theirs, theirs), (norm, of_ours, ours) = found
    assert_same(ours, theirs)
    assert max(of.abs().max() for of in ours.values()) <= 0.01
    if of_ours is not None:
        torch.testing.assert_close(of_ours, of_theirs)
        torch.testing.assert_close(of_ours, norm)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@layers
def test_autocast_with_a_scaler(name: str, dtype: torch.dtype, device: str) -> None:
    """Gradients are float32 and unscaled; a step with an infinite one is left out, and the scale halved."""
    torch.manual_seed(1)
    module = getattr(rnnfast, name)(I, H, **STACK, device=device)
    x = torch.randn(T, N, I, device=device)
    optimizer, scaler = torch.optim.SGD(module.parameters(), 0.1), torch.amp.GradScaler(device, init_scale=2.0**10)
    loss_of(module, x).backward()
    exact = {key: of.clone() for key, of in gradients(module).items()}
    for growth in (1.0, float("inf")):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = loss_of(module, x)
        assert loss.dtype == torch.float32
        scaler.scale(loss * growth).backward()
        scaler.unscale_(optimizer)
        before = {key: of.clone() for key, of in weights(module).items()}
        if growth == 1:
            for key, of in gradients(module).items():
                assert of.dtype == torch.float32
                assert (of - exact[key]).abs().max() < 0.1 * exact[key].abs().max(), key
        scaler.step(optimizer)
        scaler.update()
        changed = {key: not torch.equal(of, before[key]) for key, of in weights(module).items()}
        assert set(changed.values()) == {growth == 1}
    assert scaler.get_scale() == 2.0**9


@pytest.mark.few(1, "backend", "name", "recompute")
@interpreted
@runs
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@layers
def test_checkpoint(name: str, recompute: bool, backend: str) -> None:
    """The forward runs again in the backward, with the same masks of dropout."""
    module = getattr(rnnfast, name)(I, H, **STACK, dropout=0.5, recompute=recompute)
    x = torch.randn(T, N, I, requires_grad=True)

    def grads(run: Callable) -> list[Tensor]:
        torch.manual_seed(3)
        loss = sum(t.square().mean() for t in tensors_of(run(x)))
        return list(torch.autograd.grad(loss, [x, *module.parameters()]))

    again = grads(lambda x: checkpoint(module, x, use_reentrant=False))
    for found, expected in zip(again, grads(module), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.few(1, "backend", "name")
@interpreted
@runs
@layers
def test_saved_tensors_elsewhere(name: str, backend: str) -> None:
    """On the CPU, and wherever hooks put them."""
    module = getattr(rnnfast, name)(I, H, **STACK)
    x = torch.randn(T, N, I, requires_grad=True)
    packed: list[Any] = []

    def put(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    def grads() -> list[Tensor]:
        return list(torch.autograd.grad(loss_of(module, x), [x, *module.parameters()]))

    expected = grads()
    for elsewhere in (graph.save_on_cpu(), graph.saved_tensors_hooks(put, packed.__getitem__)):
        with elsewhere:
            found = grads()
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a, e)
    assert packed


@pytest.mark.gpu
@layers
def test_saved_tensors_of_a_gpu_on_the_cpu(name: str) -> None:
    module = getattr(rnnfast, name)(I, H, **STACK, device="cuda")
    x = torch.randn(T, N, I, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(loss_of(module, x), [x, *module.parameters()])
    with graph.save_on_cpu(pin_memory=True):
        found = torch.autograd.grad(loss_of(module, x), [x, *module.parameters()])
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.few(1, "backend", "name")
@interpreted
@runs
@layers
def test_anomaly_mode(name: str, backend: str) -> None:
    """It leaves numbers as they are, and points at the layer whose gradient is no number."""
    module = getattr(rnnfast, name)(I, H, **STACK)
    x = torch.randn(T, N, I)
    expected = torch.autograd.grad(loss_of(module, x), module.parameters())
    with torch.autograd.detect_anomaly():
        found = torch.autograd.grad(loss_of(module, x), module.parameters())
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)
    nn.init.constant_(module.weight_hh_l1, float("nan"))
    points = (
        pytest.warns(UserWarning, match="Error detected in _LayerBackward"),
        pytest.raises(RuntimeError, match="nan"),
    )
    with torch.autograd.detect_anomaly(), points[0], points[1]:
        module(x)[0].nan_to_num().sum().backward()
