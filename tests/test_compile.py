"""torch.compile without a graph break and torch.export with dynamic sizes: each layer stays one opaque node."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import CELL_MODULES, HANG, LAYERS, assert_same, chooser, flatten, states, values_and_grads
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Around(nn.Module):
    """A recurrent module between two others, called with whatever arguments it takes."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=DOUBLE)
        self.rnn = getattr(rnnfast, name)(4, 5, **kwargs, dtype=DOUBLE)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, torch.Tensor):
            x = self.first(x)
        return [t.sin() for _, t in flatten(self.rnn(x, *args, **kwargs)) if t.is_floating_point()]


def _assert_compiled_is_eager(model: nn.Module, *args: Any, compiler: str = "aot_eager", **kwargs: Any) -> None:
    expected = values_and_grads(model, *args, **kwargs)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    found = values_and_grads(compiled, *args, **kwargs)
    assert_same({key.replace("_orig_mod.", ""): t for key, t in found.items()}, expected)
    with torch.no_grad():
        assert_same(dict(flatten(compiled(*args, **kwargs))), dict(flatten(model(*args, **kwargs))))


STACK = {"num_layers": 2, "bidirectional": True}
LENGTHS = torch.tensor([2, 6, 0])
RESETS = torch.zeros(6, 3, dtype=torch.bool)
RESETS[2, 0] = RESETS[5, 1] = RESETS[0, 2] = RESETS[3, 2] = True


@pytest.mark.few(1, "name", "case")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "case",
    ["plain", "hx", "lengths", "resets", "states", "batch-first", "unbatched", "packed", "packed-hx", "packed-sorted"],
)
def test_compile_layer(name: str, case: str) -> None:
    x, hx = torch.randn(6, 3, 3, dtype=DOUBLE), states(name, 4, 3, 5)
    padded = torch.randn(6, 3, 4, dtype=DOUBLE)
    unsorted = pack_padded_sequence(padded, torch.tensor([2, 6, 4]), enforce_sorted=False)
    args, kwargs = {
        "plain": ((x,), {}),
        "hx": ((x, hx), {}),
        "lengths": ((x, hx), {"lengths": LENGTHS}),
        "resets": ((x, hx), {"resets": RESETS}),
        "states": ((x, hx), {"lengths": LENGTHS, "resets": RESETS, "return_states": True}),
        "batch-first": ((x, states(name, 4, 6, 5)), {"return_states": True}),
        "unbatched": ((x[:, 0],), {}),
        "packed": ((unsorted,), {}),
        "packed-hx": ((unsorted, hx), {"return_states": True}),
        "packed-sorted": ((pack_padded_sequence(padded, torch.tensor([6, 2, 1])), hx), {}),
    }[case]
    model = Around(name, **STACK, batch_first=case == "batch-first")
    _assert_compiled_is_eager(model, *args, **kwargs)


@pytest.mark.parametrize("name", CELL_MODULES)
def test_compile_cell(name: str) -> None:
    for shape in ((3,), ()):
        _assert_compiled_is_eager(Around(name), torch.randn(*shape, 3, dtype=DOUBLE))
        _assert_compiled_is_eager(Around(name), torch.randn(*shape, 3, dtype=DOUBLE), states(name, *shape, 5))


def test_compile_everything_at_once() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(getattr(rnnfast, name)(4, 4, dtype=DOUBLE) for name in LAYERS)
            self.cells = nn.ModuleList(getattr(rnnfast, name)(4, 4, dtype=DOUBLE) for name in CELL_MODULES)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x, lengths=lengths)[0]
            h = x.mean(0)
            for cell in self.cells:
                h = cell(x[0], (h, h) if isinstance(cell, rnnfast.LSTMCell) else h)
                h = h[0] if isinstance(h, tuple) else h
            return h

    _assert_compiled_is_eager(Everything(), torch.randn(6, 3, 4, dtype=DOUBLE), LENGTHS)


def test_compile_draws_dropout_in_training_only() -> None:
    model = Around("LSTM", num_layers=2, dropout=0.5)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(6, 3, 3, dtype=DOUBLE)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    model.eval()
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


def test_compiled_once_for_every_length() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(graph)
        return graph

    model = Around("GRU", **STACK)
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for steps, rows in ((6, 8), (11, 8), (7, 9)):  # of no size that the weights have, which would tie them
        x = torch.randn(steps, rows, 3, dtype=DOUBLE)
        assert_same(dict(flatten(compiled(x))), dict(flatten(model(x))))
    assert len(graphs) == 1


@pytest.mark.skipif(not rnnfast.backends()["cpu"].available, reason="the native library is not built")
def test_compiled_code_sees_use_backend() -> None:
    """Entered around a call, within what is compiled, or in another thread; each choice is compiled once."""
    made, ran, model, x = [], [], rnnfast.GRU(4, 5), torch.randn(3, 2, 4)

    def record(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        names = [str(node.target).split(".")[1] for node in graph.graph.nodes if "rnnfast" in str(node.target)]
        made.append(names)
        return lambda *args: ran.append(names) or graph(*args)

    @torch.no_grad()
    def run(function: Callable) -> list[str]:
        function(x)
        return ran[-1]

    def chosen_within(x: torch.Tensor) -> torch.Tensor:
        with rnnfast.use_backend("reference"):
            y = model(x)[0]
        return y + model(x)[0]

    around, within = (torch.compile(function, backend=record, fullgraph=True) for function in (model, chosen_within))
    found = chooser.choose_backend(chooser.Circumstances(compiled=True), "GRU", x.device, x.dtype)[0]
    usual, reference = f"{found}_forward", "reference_forward"
    of_thread: list[list[str]] = []
    for _ in range(2):
        assert run(around) == [usual]
        with rnnfast.use_backend("reference"):
            assert run(around) == [reference]
            thread = threading.Thread(target=lambda: of_thread.append(run(around)), daemon=True)
            thread.start()
            thread.join(HANG)
            assert run(within) == [reference, reference]
        assert run(around) == [usual]
        assert run(within) == [reference, usual]
    assert of_thread == [[usual], [usual]]
    assert made == [[usual], [reference], [reference, reference], [reference, usual]]


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", LAYERS)
def test_compile_with_inductor(name: str) -> None:
    model = Around(name, **STACK)
    x, hx = torch.randn(6, 3, 3, dtype=DOUBLE), states(name, 4, 3, 5)
    _assert_compiled_is_eager(model, x, hx, compiler="inductor", lengths=LENGTHS)


def test_converted_model_compiles() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5)).double()
    x = torch.randn(6, 3, 3, dtype=DOUBLE)
    expected = values_and_grads(model, x)
    compiled = torch.compile(rnnfast.convert(model, compile=True), backend="aot_eager", fullgraph=True)
    found = values_and_grads(compiled, x)
    assert_same({key.replace("_orig_mod.", ""): t for key, t in found.items()}, expected)


@pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
def test_compile_instances_of_torchs_classes(name: str) -> None:
    """An instance of torch.nn.LSTM breaks the graph; a cell's need not."""
    model = nn.Sequential(nn.Linear(3, 4), getattr(nn, name)(4, 5)).double()
    x = torch.randn(*(6, 3)[name in CELL_MODULES :], 3, dtype=DOUBLE)
    rnnfast.convert(model)
    expected = values_and_grads(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name in CELL_MODULES)
    found = values_and_grads(compiled, x)
    assert_same({key.replace("_orig_mod.", ""): t for key, t in found.items()}, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_compile_with_replaced_flat_weights(name: str) -> None:
    model = getattr(rnnfast, name)(4, 5, dtype=DOUBLE)
    model._flat_weights = [w.detach() * 0.5 for w in model._flat_weights]
    _assert_compiled_is_eager(model, torch.randn(6, 3, 4, dtype=DOUBLE))


# Export


def _nodes(program: torch.export.ExportedProgram) -> list[str]:
    calls = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return [target for target in calls if "getitem" not in target]


@pytest.mark.parametrize("extension", ["none", "lengths", "resets"])
@pytest.mark.parametrize("name", LAYERS)
def test_export_with_dynamic_sizes(name: str, extension: str) -> None:
    steps, rows = torch.export.Dim("steps"), torch.export.Dim("rows")
    model = Around(name, num_layers=3, bidirectional=True).eval()

    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, extra: torch.Tensor) -> Any:
            return self.model(x, **({} if extension == "none" else {extension: extra}))

    def inputs(steps: int, rows: int) -> tuple:
        extra = {
            "none": torch.zeros(rows),
            "lengths": torch.randint(0, steps + 1, (rows,)),
            "resets": torch.rand(steps, rows) < 0.3,
        }[extension]
        return torch.randn(steps, rows, 3, dtype=DOUBLE), extra

    sizes = {0: steps, 1: rows}
    program = torch.export.export(
        Batch(), inputs(6, 3), dynamic_shapes=(sizes, sizes if extension == "resets" else {0: rows})
    )
    nodes = _nodes(program)
    assert len([target for target in nodes if target.startswith("rnnfast.") and "_layer" in target]) == 3
    assert len(nodes) < 20, nodes  # the projection before, sums of states, checks of sizes: no loop over steps
    for size in ((6, 3), (13, 2), (2, 7)):
        args = inputs(*size)
        assert_same(dict(flatten(program.module()(*args))), dict(flatten(Batch()(*args))))


@pytest.mark.parametrize("name", CELL_MODULES)
def test_export_cell(name: str) -> None:
    model, hx = Around(name), states(name, 3, 5)
    rows = torch.export.Dim("rows")
    sizes = {0: rows}, ((({0: rows},) * 2 if name == "LSTMCell" else {0: rows}),)
    program = torch.export.export(model, (torch.randn(3, 3, dtype=DOUBLE), hx), dynamic_shapes=sizes)
    assert sum("_layer" in target for target in _nodes(program)) == 1
    args = torch.randn(8, 3, dtype=DOUBLE), states(name, 8, 5)
    assert_same(dict(flatten(program.module()(*args))), dict(flatten(model(*args))))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_forward_mode_compiles(name: str) -> None:
    """Through plain torch, the cells' functions among it."""
    layer, x = getattr(rnnfast, name)(4, 5), torch.randn(3, 2, 4)

    def tangent(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: layer(x)[0], (x,), (torch.ones_like(x),))[1]

    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager", fullgraph=True)(x), tangent(x))
