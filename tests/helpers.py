"""Pairs of torch.nn's module and ours with equal weights, and the comparison of all they compute."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
LIBRARIES = {"torch": nn, "rnnfast": rnnfast}
ROUNDING = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.complex64: {"rtol": 1e-5, "atol": 1e-5},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours of that name, with equal weights."""
    theirs, ours = (getattr(library, name)(*args, **kwargs) for library in (nn, rnnfast))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def states(name: str, *h: int, c: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A random hx of shape ``h`` for the module ``name``; an LSTM's c has the shape ``c`` or ``h``."""
    make = lambda *shape: torch.randn(*shape, dtype=dtype)
    return (make(*h), make(*(c or h))) if name.startswith("LSTM") else make(*h)


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor within tuples, lists and PackedSequences, with its place."""
    if isinstance(value, PackedSequence):
        value = dict(value._asdict())
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from flatten(item, f"{path}[{i}]")


def leaves(value: Any) -> Any:
    """The same structure, its floating tensors detached and asking for gradients (strides stay)."""
    if isinstance(value, PackedSequence):
        return PackedSequence(leaves(value.data), *value[1:])
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.is_floating_point() or value.is_complex() else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(leaves, value))
    return value


def loss_of(outputs: Any) -> Tensor:
    """A scalar that every element of every output enters with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for k, (_, t) in enumerate(flatten(outputs)):
        if t.requires_grad:
            weight = torch.linspace(-1, 1 + k, t.numel(), dtype=torch.float64).reshape(t.shape)
            total = total + ((t.real + 2 * t.imag if t.is_complex() else t).double() * weight).sum()
    return total


def values_and_grads(module: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Every output, and the gradient of every input and parameter, by name. The generator starts from seed 1."""
    inputs = tuple(map(leaves, inputs))
    torch.manual_seed(1)
    outputs = module(*inputs, **kwargs)
    found = {f"output{path}": t.detach() for path, t in flatten(outputs)}
    asked = {f"input{path}": t for path, t in flatten(inputs) if t.requires_grad}
    asked |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss_of(outputs), list(asked.values()), allow_unused=True)
    return found | {f"gradient of {name}": g for name, g in zip(asked, grads) if g is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:
    """The same names, shapes and dtypes, and values equal to the rounding of their dtype."""
    assert list(actual) == list(expected)
    for name, e in expected.items():
        bounds = {**ROUNDING.get(e.dtype, {"rtol": 0, "atol": 0}), "equal_nan": True, **tolerance}
        torch.testing.assert_close(actual[name], e, msg=lambda text, name=name: f"{name}: {text}", **bounds)


def assert_equal_modules(theirs: nn.Module, ours: nn.Module, *inputs: Any) -> None:
    """Both modules give the same outputs and gradients."""
    assert_same(values_and_grads(ours, *inputs), values_and_grads(theirs, *inputs))


def train(module: nn.Module, *inputs: Any, steps: int = 4) -> list[float]:
    """The losses of a few steps of gradient descent."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(t.square().sum() for _, t in flatten(module(*inputs)) if t.requires_grad)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def error_of(call: Any, *args: Any) -> tuple[type, str]:
    """The type and text of what a call raises."""
    try:
        call(*args)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def library_of(module: nn.Module) -> ModuleType:
    return rnnfast if type(module).__module__.startswith("rnnfast") else nn
