"""The layers and cases of the tests, pairs of torch.nn's module and ours, and the comparison of all they compute."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

LAYERS = ("RNN", "LSTM", "GRU")
CELL_MODULES = ("RNNCell", "LSTMCell", "GRUCell")
CELLS = {  # the class of a layer, and its options
    "tanh": ("RNN", {"nonlinearity": "tanh"}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "projection": ("LSTM", {"proj_size": 1}),  # of which layer() makes half of H
    "gru": ("GRU", {}),
}
FORMS = ("rectangular", "packed", "lengths", "resets")

# The floor of assert_off_by_twice_at_most, relative to the largest value: a few roundings of the dtype (2 of a half
# type, 8 of float32; in float64 the exact result is itself a float64 run, so the floor is all there is: 45).
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
chooser = importlib.import_module("rnnfast.backends")  # the package has a function of that name
HANG = 3600  # seconds after which something hangs, however busy the machine is
LIBRARIES = {"torch": nn, "rnnfast": rnnfast}
ROUNDING = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.complex64: {"rtol": 1e-5, "atol": 1e-5},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


class Case(NamedTuple):
    """Sizes and options of a layer. Odd on purpose: tails of vectors, of row tiles and of thread shares."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    bias: bool = True
    bidirectional: bool = False
    given_hx: bool = True
    layers: int = 1


CASES = {
    "one-step": Case(1, 3, 5, 35, bidirectional=True),
    "one-row": Case(6, 1, 9, 33),
    "one-unit": Case(5, 4, 1, 2, bias=False, given_hx=False),
    "H63": Case(7, 13, 70, 63, bidirectional=True, given_hx=False),
    "H130-no-bias": Case(3, 5, 17, 130, bias=False),
    "stack": Case(5, 6, 3, 4, bidirectional=True, layers=3),
    "many-rows": Case(2, 150, 3, 5, bidirectional=True),  # beyond what a thread takes at once
    "wide": Case(3, 37, 210, 330),  # beyond what one block of the kernels holds, in every direction
}


def load(path: str) -> ModuleType:
    """A file of the project that is no module of a package, by its place in the project's folder."""
    file = Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choose(*args: Any, **kwargs: Any) -> tuple[str, str]:
    """The backend that serves such a layer now, and why."""
    return chooser.choose_backend(chooser.circumstances(), *args, **kwargs)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours of that name, with equal weights."""
    theirs, ours = (getattr(library, name)(*args, **kwargs) for library in (nn, rnnfast))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def states(name: str, *h: int, c: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A random hx of shape ``h`` for the module ``name``; an LSTM's c has the shape ``c`` or ``h``."""
    make = lambda *shape: torch.randn(*shape, dtype=dtype)
    return (make(*h), make(*(c or h))) if name.startswith("LSTM") else make(*h)


def layer(
    cell: str,
    hidden: int = 5,
    inputs: int = 4,
    dtype: torch.dtype = torch.float64,
    device: str | None = None,
    library: ModuleType = rnnfast,
    **options: Any,
) -> nn.Module:
    """A layer with one of CELLS."""
    cls, own = CELLS[cell]
    own = {"proj_size": (hidden + 1) // 2} if cell == "projection" else own
    return getattr(library, cls)(inputs, hidden, dtype=dtype, device=device, **own, **options)


def states_of(module: nn.Module, batch: int) -> Any:
    """A random hx for a layer."""
    count, h = module.num_layers * (1 + module.bidirectional), module.proj_size or module.hidden_size
    return states(module.mode, count, batch, h, c=(count, batch, module.hidden_size))


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


def tensors_of(value: Any) -> list[Tensor]:
    return [t for _, t in flatten(value)]


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
            weight = torch.linspace(-1, 1 + k, t.numel(), dtype=torch.float64, device=t.device).reshape(t.shape)
            total = total + ((t.real + 2 * t.imag if t.is_complex() else t).double() * weight).sum().cpu()
    return total


def computed(module: nn.Module, x: Tensor | PackedSequence, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Every output, and the gradients of the input and the weights."""
    outputs = [t for t in tensors_of(module(x, *args, **kwargs)) if t.is_floating_point()]
    asked = [t for t in tensors_of((x, list(module.parameters()))) if t.requires_grad]
    return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, asked, [t.detach() for t in outputs]))


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


class Problem:
    """Inputs of a case in float64, and what a module makes of them: outputs, and gradients of a random projection."""

    def __init__(self, case: Case, cell: str, form: str, dtype: torch.dtype = torch.float64) -> None:
        """Weights and inputs are of values that ``dtype`` has, so that all see the same problem."""
        self.case, self.form, self.is_lstm = case, form, CELLS[cell][0] == "LSTM"
        options = {"num_layers": case.layers, "bias": case.bias, "bidirectional": case.bidirectional}
        self.make = functools.partial(layer, cell, case.hidden, case.inputs, **options)
        self.exact_module = self.make()
        if cell == "relu" and case.bias:
            # Units that are clearly on or off: at relu's kink rounding picks the gradient, for torch as for us.
            for name, parameter in self.exact_module.named_parameters():
                if name.startswith("bias_ih"):
                    parameter.data.copy_(torch.tensor([3.0, -4.0]).repeat(case.hidden)[: case.hidden])
        self.x = torch.randn(case.steps, case.batch, case.inputs, dtype=torch.float64)
        hx = tensors_of(states_of(self.exact_module, case.batch)) if case.given_hx else []
        self.lengths = torch.randint(0, case.steps + 1, (case.batch,))
        self.lengths[0] = case.steps
        self.resets = torch.rand(case.steps, case.batch) < 0.4
        self.x, *self.hx = (t.to(dtype).double() for t in (self.x, *hx))
        self.exact_module.to(dtype).double()

    def module(self, library: ModuleType, dtype: torch.dtype) -> nn.Module:
        module = self.make(library=library)
        module.load_state_dict(self.exact_module.state_dict())
        return module.to(dtype)

    def exact(self) -> dict[str, Tensor]:
        with rnnfast.use_backend("reference"):
            return self.run(self.exact_module, torch.float64)

    def baseline(self, dtype: torch.dtype, place: Callable = lambda module: module) -> dict[str, Tensor]:
        """What torch makes of it. It knows neither lengths nor resets; the plain-torch loop is what it would do."""
        if self.form in ("rectangular", "packed"):
            return self.run(place(self.module(nn, dtype)), dtype)
        with rnnfast.use_backend("reference"):
            return self.run(place(self.module(rnnfast, dtype)), dtype)

    def run(self, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every output and every gradient by name."""
        x = self.x.to(dtype).requires_grad_()
        hx = [h.to(dtype).requires_grad_() for h in self.hx]
        extra, inputs = {}, x
        if self.form == "packed":
            inputs = pack_padded_sequence(x, self.lengths.clamp(min=1), enforce_sorted=False)
        elif self.form != "rectangular":
            extra = {self.form: getattr(self, self.form)}
        states = None if not hx else tuple(hx) if self.is_lstm else hx[0]
        output, hidden = module(inputs, states, **extra)
        output = output.data if isinstance(output, PackedSequence) else output
        outputs = {"output": output, "h_n": hidden} if not self.is_lstm else {"output": output}
        if self.is_lstm:
            outputs["h_n"], outputs["c_n"] = hidden
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (t * torch.randn(t.shape, dtype=torch.float64, generator=generator).to(dtype)).sum()
            for t in outputs.values()
        )
        leaves = {"x": x, **{f"hx[{k}]": h for k, h in enumerate(hx)}, **dict(module.named_parameters())}
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {**outputs, **{f"d {name}": g for name, g in zip(leaves, grads)}}


def assert_off_by_twice_at_most(
    actual: dict[str, Tensor], baseline: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, floor: float
) -> None:
    """Against float64, ours may be off by twice what torch is in the same dtype, plus the floor."""
    assert actual.keys() == exact.keys() == baseline.keys()
    for name, e in exact.items():
        assert actual[name].dtype == dtype and actual[name].shape == e.shape, name
        if not e.numel():
            continue
        error, of_torch = ((t[name].to("cpu", torch.float64) - e).abs().max().item() for t in (actual, baseline))
        scale = e.abs().max().item()
        allowed = 2 * of_torch + floor * scale
        assert error <= allowed, f"{name}: off by {error:.2e}, torch by {of_torch:.2e}, of {scale:.2e}"
