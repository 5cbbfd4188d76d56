"""Tracers, exporters, counters and derivatives by other means: what people do to torch.nn's modules, done to ours."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from helpers import (
    CELL_MODULES,
    HANG,
    LAYERS,
    assert_same,
    choose,
    chooser,
    flatten,
    pair,
    states,
    tensors_of,
    values_and_grads,
)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from rnnfast import aten

DOUBLE = torch.float64
STACK = {"num_layers": 2, "bidirectional": True}
DYNAMIC = torch.export.Dim.DYNAMIC
ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "rnnfast" / "_cpu.so"


class Extended(nn.Module):
    """A layer that takes an extension by position."""

    def __init__(self, rnn: nn.Module, extension: str = "lengths") -> None:
        super().__init__()
        self.rnn, self.extension = rnn, extension

    def forward(self, x: Tensor, given: Tensor) -> Any:
        return self.rnn(x, **{self.extension: given})


class Loop(nn.Module):
    """A cell over a few steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        h = self.cell(x[0])
        for t in range(1, 3):
            h = self.cell(x[t], h)
        return h


def _outputs(module: Callable, *inputs: Any) -> dict[str, Tensor]:
    return {path: t.detach() for path, t in flatten(module(*inputs))}


def _module(name: str, converted: bool = False, **kwargs: Any) -> nn.Module:
    """A layer of two layers and two directions, or a cell."""
    kwargs |= STACK if name in LAYERS else {}
    return rnnfast.convert(getattr(nn, name)(4, 5, **kwargs)) if converted else getattr(rnnfast, name)(4, 5, **kwargs)


def _input(name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    steps, rows = sizes or (7, 3)
    return torch.randn(*((steps, rows, 4) if name in LAYERS else (rows, 4)), dtype=dtype)


both = pytest.mark.parametrize("converted", [False, True], ids=["ours", "converted"])
every = pytest.mark.parametrize("name", LAYERS + CELL_MODULES)
layers = pytest.mark.parametrize("name", LAYERS)


# Graphs that others run


@both
@every
def test_trace(name: str, converted: bool) -> None:
    module = _module(name, converted)
    traced = torch.jit.trace(module, _input(name))  # with gradients, checked by a second run without
    for x in (_input(name, 7, 3), _input(name, 9, 5)):
        assert_same(values_and_grads(traced, x), values_and_grads(module, x))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any(kind.startswith("rnnfast") for kind in kinds)
    assert name not in LAYERS or f"aten::{name.lower()}" in kinds or "aten::rnn_tanh" in kinds


@layers
def test_trace_with_states_lengths_and_packing(name: str) -> None:
    module, hx = _module(name), states(name, 4, 3, 5, dtype=torch.float32)
    traced = torch.jit.trace(module, (_input(name), hx))
    x = _input(name, 11, 3)
    assert_same(_outputs(traced, x, hx), _outputs(module, x, hx))
    traced = torch.jit.trace(Extended(module), (_input(name), torch.tensor([3, 7, 0])))
    for lengths in ([4, 9, 0, 2, 9], [0, 0, 0, 0, 0]):
        args = _input(name, 9, 5), torch.tensor(lengths)
        assert_same(_outputs(traced, *args), _outputs(Extended(module), *args))


@layers
def test_trace_of_what_torch_has_not_is_plain_torch(name: str) -> None:
    module, args = Extended(_module(name), "resets"), (_input(name), torch.rand(7, 3) < 0.3)
    traced = torch.jit.trace(module, args)
    assert not any(node.kind().startswith("rnnfast") for node in traced.inlined_graph.nodes())
    assert_same(_outputs(traced, args[0], ~args[1]), _outputs(module, args[0], ~args[1]))


@both
@every
def test_script(name: str, converted: bool) -> None:
    module, x = _module(name, converted), _input(name)
    scripted = torch.jit.script(nn.Sequential(module))
    assert_same(values_and_grads(scripted, x), values_and_grads(nn.Sequential(module), x))
    assert next(scripted.parameters()) is next(module.parameters())
    if name in CELL_MODULES and name != "LSTMCell":
        assert_same(
            _outputs(torch.jit.script(Loop(module)), x[None].expand(3, -1, -1)),
            _outputs(Loop(module), x[None].expand(3, -1, -1)),
        )


def test_script_of_a_subclass_compiles_its_own_forward() -> None:
    class Own(rnnfast.GRU):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Named(nn.GRU):
        pass

    x = torch.randn(7, 3, 4)
    assert torch.equal(torch.jit.script(Own(4, 5))(x), x + 1)
    module = rnnfast.convert(nn.Sequential(Named(4, 5)))
    assert_same(_outputs(torch.jit.script(module), x), _outputs(module, x))


def test_artefacts_run_where_rnnfast_is_not_installed(tmp_path: Path) -> None:
    model = nn.ModuleDict({name: nn.Sequential(_module(name)) for name in LAYERS})
    x, expected = _input("GRU", 9, 2), {}
    for name, module in model.items():
        torch.jit.save(torch.jit.trace(module, _input(name)), tmp_path / f"{name}-traced.pt")
        torch.jit.save(torch.jit.script(module), tmp_path / f"{name}-scripted.pt")
        expected[name] = module(x)[0].detach()
    torch.save(x, tmp_path / "x.pt")
    program = f"""
import sys, torch
x, found = torch.load("x.pt"), {{}}
for name in {LAYERS}:
    for way in ("traced", "scripted"):
        found[f"{{name}} {{way}}"] = torch.jit.load(f"{{name}}-{{way}}.pt")(x)[0].detach()
assert "rnnfast" not in sys.modules
torch.save(found, "found.pt")
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=HANG)
    for name, y in torch.load(tmp_path / "found.pt").items():
        assert_same({name: y}, {name: expected[name.split()[0]]})


@both
@every
def test_fx(name: str, converted: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn = nn.Linear(4, 4), _module(name, converted)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(self.first(x))

    model, x = Model(), _input(name)
    graph = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in graph.graph.nodes][2] == ("call_module", "rnn")
    assert_same(values_and_grads(graph, x), values_and_grads(model, x))
    if name in CELL_MODULES and name != "LSTMCell":
        loop, x = Loop(model.rnn), torch.randn(3, 2, 4)
        graph = torch.fx.symbolic_trace(loop)
        assert sum(node.op == "call_module" for node in graph.graph.nodes) == 3
        assert_same(_outputs(graph, x), _outputs(loop, x))


@both
@every
def test_fx_leaves_hooks_to_the_module(name: str, converted: bool) -> None:
    module, x = _module(name, converted), _input(name)
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    module.register_forward_hook(lambda module, args, output: [t * 3 for t in tensors_of(output)])
    model = nn.Sequential(module)
    assert_same(_outputs(torch.fx.symbolic_trace(model), x), _outputs(model, x))


@every
def test_fx_of_states_alone(name: str) -> None:
    """As of a decoder, whose first input is a constant."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.start = _module(name), _input(name)

        def forward(self, h: Tensor, c: Tensor) -> Any:
            return self.rnn(self.start, (h, c) if name.startswith("LSTM") else h)

    model, sizes = Model(), (4, 3, 5) if name in LAYERS else (3, 5)
    hx = torch.randn(sizes), torch.randn(sizes)
    assert_same(_outputs(torch.fx.symbolic_trace(model), *hx), _outputs(model, *hx))


@every
def test_a_replaced_call_of_modules_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools do that watch all modules."""
    module, called, original = _module(name), [], nn.Module.__call__

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", watched)
    module(_input(name))
    assert called == [module]


@layers
def test_fx_keeps_the_extensions(name: str) -> None:
    module = _module(name)
    graph = torch.fx.symbolic_trace(Extended(module))
    args = _input(name), torch.tensor([3, 7, 0])
    assert_same(_outputs(graph, *args), _outputs(Extended(module), *args))


@layers
def test_fx_quantisation(name: str) -> None:
    from torch.ao.quantization import default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    def quantised(rnn: nn.Module) -> nn.Module:
        model = nn.Sequential(rnn).eval()
        return convert_fx(prepare_fx(model, {"": default_dynamic_qconfig}, (_input(name),)))

    theirs = getattr(nn, name)(4, 5).eval()
    expected, found = quantised(copy.deepcopy(theirs)), quantised(rnnfast.convert(copy.deepcopy(theirs)))
    x = _input(name)
    assert type(getattr(found, "0")) is type(getattr(expected, "0"))
    assert_same(_outputs(found, x), _outputs(expected, x))


# ONNX


def _assert_runs_in_onnxruntime(path: Path, module: nn.Module, *inputs: Tensor) -> None:
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {of.name: t.numpy() for of, t in zip(session.get_inputs(), inputs, strict=True)})
    expected = [t.detach() for t in tensors_of(module(*inputs))]
    for actual, e in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), e, rtol=1e-5, atol=1e-6)


def _nodes(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@both
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True, "dropout": 0.3}], ids=str)
@pytest.mark.few(2, "name", "options", "converted")
@layers
def test_onnx(name: str, options: dict[str, Any], converted: bool, tmp_path: Path) -> None:
    module = _module(name, converted, **options).eval()
    path = tmp_path / "a.onnx"
    sizes = ({0: DYNAMIC, 1: DYNAMIC},)
    torch.onnx.export(module, (_input(name),), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    assert _nodes(path)[name] == 2
    for node in onnx.load(path).graph.node:
        if node.op_type == "GRU":
            assert {a.name: a.i for a in node.attribute}["linear_before_reset"] == 1
    for size in ((7, 3), (11, 2)):
        _assert_runs_in_onnxruntime(path, module, _input(name, *size))


@layers
def test_onnx_with_states(name: str, tmp_path: Path) -> None:
    kwargs = {"nonlinearity": "relu"} if name == "RNN" else {}
    module, hx = getattr(rnnfast, name)(4, 5, **kwargs).eval(), states(name, 1, 3, 5, dtype=torch.float32)
    torch.onnx.export(module, (_input(name), hx), tmp_path / "a.onnx", dynamo=True, verbose=False)

    def call(x: Tensor, *hx: Tensor) -> Any:
        return module(x, hx if name == "LSTM" else hx[0])

    _assert_runs_in_onnxruntime(tmp_path / "a.onnx", call, _input(name), *tensors_of(hx))


@layers
def test_onnx_with_lengths(name: str, tmp_path: Path) -> None:
    module = Extended(_module(name).eval())
    path, sizes = tmp_path / "a.onnx", ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC})
    args = _input(name), torch.tensor([3, 7, 0])
    torch.onnx.export(module, args, path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    assert _nodes(path)[name] == 2
    assert all(node.input[4] for node in onnx.load(path).graph.node if node.op_type == name)  # sequence_lens
    _assert_runs_in_onnxruntime(path, module, *args)
    _assert_runs_in_onnxruntime(path, module, _input(name, 11, 2), torch.tensor([0, 11]))


@layers
def test_onnx_with_lengths_and_states(name: str, tmp_path: Path) -> None:
    module, hx = _module(name).eval(), states(name, 4, 3, 5, dtype=torch.float32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = module

        def forward(self, x: Tensor, lengths: Tensor, *hx: Tensor) -> Any:
            return self.rnn(x, hx if name == "LSTM" else hx[0], lengths=lengths)

    args = _input(name), torch.tensor([3, 0, 7]), *tensors_of(hx)
    torch.onnx.export(Model(), args, tmp_path / "a.onnx", dynamo=True, verbose=False)
    _assert_runs_in_onnxruntime(tmp_path / "a.onnx", Model(), *args)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_of_a_projection(dynamo: bool, tmp_path: Path) -> None:
    """Of which ONNX has no operator: a loop over the steps."""
    module, x = rnnfast.LSTM(4, 5, proj_size=3, bidirectional=True).eval(), torch.randn(7, 3, 4)
    torch.onnx.export(module, (x,), tmp_path / "a.onnx", dynamo=dynamo)
    assert "LSTM" not in _nodes(tmp_path / "a.onnx")
    _assert_runs_in_onnxruntime(tmp_path / "a.onnx", module, x)


@layers
def test_onnx_by_tracing_with_lengths(name: str, tmp_path: Path) -> None:
    module, path = _module(name).eval(), tmp_path / "a.onnx"
    args = _input(name), torch.tensor([3, 7, 1])
    torch.onnx.export(module, (args[0], {"lengths": args[1]}), path, dynamo=False)
    assert _nodes(path)[name] == 2
    _assert_runs_in_onnxruntime(path, Extended(module), *args)


@pytest.mark.parametrize("name", CELL_MODULES)
def test_onnx_of_cells(name: str, tmp_path: Path) -> None:
    module = _module(name).eval()
    sizes = ({0: DYNAMIC},)
    torch.onnx.export(module, (_input(name),), tmp_path / "a.onnx", dynamo=True, dynamic_shapes=sizes, verbose=False)
    for size in ((7, 3), (7, 6)):
        _assert_runs_in_onnxruntime(tmp_path / "a.onnx", module, _input(name, *size))


@both
@layers
def test_onnx_by_tracing(name: str, converted: bool, tmp_path: Path) -> None:
    module, path = _module(name, converted).eval(), tmp_path / "a.onnx"
    axes = {"x": {0: "steps", 1: "rows"}}
    torch.onnx.export(module, (_input(name),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    assert _nodes(path)[name] == 2
    for size in ((7, 3), (11, 3)):
        _assert_runs_in_onnxruntime(path, module, _input(name, *size))


def test_extensions_are_no_positional_arguments() -> None:
    for more in ((None,), (torch.tensor([7, 7, 7]),), (None, None, False)):
        message = f"forward() takes from 2 to 3 positional arguments but {3 + len(more)} were given"
        with pytest.raises(TypeError, match=re.escape(message)):
            rnnfast.GRU(4, 5)(torch.randn(7, 3, 4), None, *more)


# Exported programs


@every
def test_training_an_exported_program(name: str) -> None:
    module, x = _module(name, dtype=DOUBLE), _input(name, dtype=DOUBLE)
    expected = values_and_grads(module, x)
    program = torch.export.export(module, (x,))
    for exported in (program, program.run_decompositions()):
        targets = [str(node.target) for node in exported.graph.nodes]
        assert any("rnnfast.cpu_layer" in target for target in targets)
        assert_same(values_and_grads(exported.module(), x), expected)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        assert_same(_outputs(program.module(), x), _outputs(module, x))
    assert_same(values_and_grads(program.module(), x), expected)


def test_training_an_exported_program_with_lengths_and_states() -> None:
    module = rnnfast.LSTM(4, 5, dtype=DOUBLE)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = module

        def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor) -> Any:
            return self.rnn(x, (h, c), lengths=lengths, return_states=True)

    args = torch.randn(7, 3, 4, dtype=DOUBLE), *states("LSTM", 1, 3, 5), torch.tensor([3, 7, 0])
    program = torch.export.export(Model(), args)
    assert_same(values_and_grads(program.module(), *args), values_and_grads(Model(), *args))
    with pytest.raises(RuntimeError, match="lengths have to be between 0 and 7"):
        program.module()(*args[:3], torch.tensor([3, 8, 0]))


def test_schemas_of_the_library_are_those_of_the_other_backends() -> None:
    for way in ("forward", "layer", "backward"):
        text = {
            str(getattr(torch.ops.rnnfast, f"{backend}_{way}").default._schema).partition("(")[2]
            for backend in ("cpu", "reference")
        }
        assert len(text) == 1


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_packages_run_with_the_library_alone(tmp_path: Path) -> None:
    """An AOTInductor package in C++; the same, and a .pt2, in a Python without rnnfast."""
    model = nn.Sequential(nn.Linear(4, 4), rnnfast.LSTM(4, 5, **STACK)).eval()
    x = torch.arange(9 * 2 * 4).float().div(64).fmod(2).view(9, 2, 4)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(7, 3, 4),), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
        torch.export.save(program, tmp_path / "a.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "b.pt2"))
        expected = [f"{t.sum():.4f}" for t in tensors_of(model(x))]
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    includes = [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    libraries = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{lib}"]
    compiler = ["c++", "-std=c++20", *includes, ROOT / "tests/run_package.cpp", "-o", "run_package", *libraries]
    subprocess.run(compiler, cwd=tmp_path, check=True, timeout=HANG)
    run = [tmp_path / "run_package", "b.pt2", LIBRARY, "9", "2", "4"]
    printed = subprocess.run(run, cwd=tmp_path, check=True, text=True, capture_output=True, timeout=HANG)
    assert [f"{float(line):.4f}" for line in printed.stdout.split()] == expected
    program = f"""
import sys, torch
torch.ops.load_library({str(LIBRARY)!r})
x = torch.arange(9 * 2 * 4).float().div(64).fmod(2).view(9, 2, 4)
with torch.no_grad():
    y, (h, c) = torch.export.load("a.pt2").module()(x)
again, (h2, c2) = torch._inductor.aoti_load_package("b.pt2")(x)
assert "rnnfast" not in sys.modules
print(*(f"{{t.sum():.4f}}" for t in (y, h, c, again, h2, c2)))
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, text=True, capture_output=True, timeout=HANG
    )
    assert printed.stdout.split() == 2 * expected


@every
def test_functionalize(name: str) -> None:
    module, x = _module(name, dtype=DOUBLE), _input(name, dtype=DOUBLE)
    call = lambda x: module(x)
    functional = torch.func.functionalize(call)
    assert_same(values_and_grads(_Call(functional, module), x), values_and_grads(_Call(call, module), x))
    with torch.no_grad():
        assert_same(_outputs(functional, x), _outputs(module, x))
        graph = make_fx(functional)(x)
    assert any("rnnfast.cpu_forward" in str(node.target) for node in graph.graph.nodes)
    assert_same(_outputs(graph, x), _outputs(module, x))
    loss = lambda function: lambda x: tensors_of(function(x))[0].square().sum()
    assert torch.equal(torch.func.grad(loss(functional))(x), torch.func.grad(loss(call))(x))


class _Call(nn.Module):
    """A function of a module's, with the module's parameters."""

    def __init__(self, function: Callable, module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


# Derivatives


@every
def test_saved_tensors_are_tensors(name: str) -> None:
    """As torchviz and others walk them."""
    module, found = _module(name, dtype=DOUBLE), 0  # a single step in float32 may be torch's
    nodes = [t.grad_fn for t in tensors_of(module(_input(name, dtype=DOUBLE)))]
    while nodes:
        node = nodes.pop()
        if "_Layer" in type(node).__name__:
            found += 1
            assert all(isinstance(t, Tensor) for t in node.saved_tensors)
        nodes += [before for before, _ in node.next_functions if before is not None]
    assert found


@every
def test_batches_of_gradients(name: str) -> None:
    module, x = _module(name, dtype=DOUBLE), _input(name, 2, 1, dtype=DOUBLE).requires_grad_()
    first = lambda x: tensors_of(module(x))[0]
    y = first(x).flatten()
    grads = torch.eye(len(y), dtype=DOUBLE)
    found = torch.autograd.grad(y, (x, *module.parameters()), grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, (x, *module.parameters()), g, retain_graph=True) for g in grads]
    for f, e in zip(found, zip(*each), strict=True):
        assert torch.equal(f, torch.stack(e))
    jacobian = torch.autograd.functional.jacobian
    assert torch.equal(jacobian(first, x.detach(), vectorize=True), jacobian(first, x.detach()))
    x = _input(name, 2, 1, dtype=DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(first, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(first, x, check_batched_grad=True)


@layers
def test_recompute_within_transforms(name: str) -> None:
    kept = _module(name, dtype=DOUBLE)
    module = getattr(rnnfast, name)(4, 5, **STACK, recompute=True, dtype=DOUBLE)
    module.load_state_dict(kept.state_dict())
    x = torch.randn(5, 7, 1, 4, dtype=DOUBLE)

    def per_sample(module: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(module, parameters, x)[0].square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(module.named_parameters()), x)

    assert_same(per_sample(module), per_sample(kept))


@layers
def test_reentrant_checkpoint(name: str) -> None:
    """It sees no tensors within tuples: an LSTM's states come without gradients, as torch.nn's do."""
    theirs, ours = pair(name, 4, 5, dtype=DOUBLE)
    x = torch.randn(7, 3, 4, dtype=DOUBLE, requires_grad=True)

    def run(module: nn.Module) -> list[Tensor]:
        outputs = tensors_of(checkpoint(module, x, use_reentrant=True))
        asking = [t for t in outputs if t.requires_grad]
        sum(t.square().sum() for t in asking).backward()
        grads = [x.grad, *(p.grad for p in module.parameters())]
        x.grad = None
        return [*outputs, *grads, torch.tensor([t.requires_grad for t in outputs])]

    assert_same(dict(flatten(run(ours))), dict(flatten(run(theirs))))


# Tools that count and print


@pytest.fixture
def aten_lstm() -> Any:
    """oneDNN's LSTM is one operator, which torch's counter does not know."""
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)


OPTIONS = [{}, {"bidirectional": True}, STACK, {"bias": False}, {"proj_size": 3, "bidirectional": True}]


@pytest.mark.usefixtures("aten_lstm")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@layers
def test_flops_are_those_of_the_aten_path(name: str, options: dict[str, Any]) -> None:
    if name != "LSTM" and "proj_size" in options:
        options = {}
    theirs, ours = pair(name, 4, 5, **options)
    x, count = torch.randn(7, 3, 4), (1 + theirs.bidirectional) * theirs.num_layers
    hx = states(name, count, 3, theirs.proj_size or 5, c=(count, 3, 5), dtype=torch.float32)
    hx = tuple(t.requires_grad_() for t in hx) if name == "LSTM" else hx.requires_grad_()
    packed = pack_padded_sequence(x, torch.tensor([7, 5, 2]))

    def flops(module: nn.Module, *args: Any, backward: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            y = module(*args)[0]
            if backward:
                (y if isinstance(y, Tensor) else y.data).sum().backward()
        return counter.get_total_flops()

    for args in ((x,), (x.clone().requires_grad_(),), (packed,), (x, hx)):
        for backward in (False, True):
            assert flops(ours, *args, backward=backward) == flops(theirs, *args, backward=backward) > 0


def test_flops_of_lengths_are_of_the_steps_that_are_run() -> None:
    module, x = rnnfast.GRU(4, 5), torch.randn(7, 3, 4)

    def flops(x: Tensor, **kwargs: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            module(x, **kwargs)[0].sum().backward()
        return counter.get_total_flops()

    assert flops(x, lengths=torch.tensor([7, 7, 7])) == flops(x)
    assert flops(x, lengths=torch.tensor([0, 7, 0])) == flops(x[:, :1])
    assert flops(x, lengths=torch.tensor([0, 0, 0])) == 0


def test_flops_after_somebody_has_looked_for_the_counter() -> None:
    program = """
import importlib.util, torch, rnnfast
importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    rnnfast.GRU(4, 5)(torch.randn(7, 3, 4))
print(counter.get_total_flops())
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, text=True, capture_output=True, timeout=HANG, env=environment)
    assert int(done.stdout) == 2 * 7 * 3 * 15 * (4 + 5)


def test_flops_of_cells() -> None:
    for name, gates in (("RNNCell", 1), ("GRUCell", 3), ("LSTMCell", 4)):
        with FlopCounterMode(display=False) as counter:
            getattr(rnnfast, name)(4, 5)(torch.randn(3, 4))
        assert counter.get_total_flops() == 2 * 3 * gates * 5 * (4 + 5)


def test_flops_of_any_cell() -> None:
    """The products, of x's gates and a's, of the steps that are run; of each two in a backward, if x has a gradient."""
    net, x = rnnfast.FlexRNN(rnnfast.cells.slstm, 4, 6, num_heads=2), torch.randn(7, 3, 4)
    of_x, of_h = 2 * 24 * 4, 2 * 24 * 6 // 2
    for rows, lengths in ((21, None), (9, torch.tensor([0, 7, 2]))):
        for needs_dx in (False, True):
            with FlopCounterMode(display=False) as counter:
                output = net(x.clone().requires_grad_(needs_dx), lengths=lengths)[0]
                assert counter.get_total_flops() == rows * (of_x + of_h)
                output.sum().backward()
            assert counter.get_total_flops() == rows * ((2 + needs_dx) * of_x + 3 * of_h)


@every
def test_signatures(name: str) -> None:
    """Real parameters, with torch's names, order and defaults; what we add is by keyword alone."""
    parameters = inspect.signature(getattr(rnnfast, name)).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    common = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    expected = {
        "RNN": [*common[:3], "nonlinearity", *common[3:], "device", "dtype"],
        "LSTM": [*common, "proj_size", "device", "dtype"],
        "GRU": [*common, "device", "dtype"],
    }
    if name in LAYERS:
        assert [of for of, _ in positional] == expected[name]
    else:
        theirs = inspect.signature(getattr(nn, name)).parameters.values()
        assert positional == [(p.name, p.default) for p in theirs]
    assert list(inspect.signature(getattr(rnnfast, name).forward).parameters)[:3] == ["self", "input", "hx"]


# _flat_weights, from which torch.nn computes


@both
@layers
def test_replaced_flat_weights(name: str, converted: bool) -> None:
    theirs = getattr(nn, name)(4, 5, **STACK)
    ours = rnnfast.convert(copy.deepcopy(theirs)) if converted else _module(name)
    ours.load_state_dict(theirs.state_dict())
    x = _input(name)
    theirs(x), ours(x)
    for module in (theirs, ours):
        module._flat_weights = [w.detach() * 0.5 for w in module._flat_weights]
    halved = _outputs(theirs, x)
    assert_same(_outputs(ours, x), halved)
    assert_same(_outputs(copy.deepcopy(ours), x), _outputs(copy.deepcopy(theirs), x))
    for module in (theirs, ours):  # a weight that is set counts again, and so do all
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 2)
    assert_same(values_and_grads(ours, x), values_and_grads(theirs, x))


@layers
def test_generated_weights(name: str) -> None:
    """Parameters deleted, and ``_flat_weights`` made by a call, as DropConnect and hypernetworks do."""

    def generated(module: nn.Module) -> nn.Module:
        raw = nn.ParameterList([module._parameters.pop(key) for key in module._flat_weights_names])

        def call(x: Tensor) -> Any:
            module._flat_weights = [p * 0.5 for p in raw]
            return module(x)

        outer = _Call(call, module)
        outer.raw = raw
        return outer

    theirs, ours = pair(name, 4, 5, dtype=DOUBLE)
    theirs, ours, x = generated(theirs), generated(ours), torch.randn(7, 3, 4, dtype=DOUBLE)
    assert_same(values_and_grads(ours, x), values_and_grads(theirs, x))
    module = getattr(rnnfast, name)(4, 5, dtype=DOUBLE)
    module.weight_hh_l0 = None
    with pytest.raises(TypeError, match="weight_hh_l0 must be a Tensor, not None"):
        module(x)


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", CELL_MODULES)
def test_cell_with_one_bias(name: str, missing: str) -> None:
    theirs, ours = pair(name, 4, 5, dtype=DOUBLE)
    setattr(theirs, missing, None)
    setattr(ours, missing, None)
    x = torch.randn(3, 4, dtype=DOUBLE)
    assert_same(values_and_grads(ours, x), values_and_grads(theirs, x))


# torch's kernels as a backend


FORMS = ["plain", "hx", "packed", "lengths", "batch-first"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", [*LAYERS, "projection"])
def test_backend_torch(cell: str, form: str) -> None:
    name = "LSTM" if cell == "projection" else cell
    options = STACK | ({"proj_size": 3} if cell == "projection" else {}) | {"batch_first": form == "batch-first"}
    module = getattr(rnnfast, name)(4, 5, **options, dtype=DOUBLE)
    x, kwargs = torch.randn(7, 3, 4, dtype=DOUBLE), {}
    args = [x]
    if form == "hx" or form == "lengths":
        args.append(states(name, 4, 3, 3 if cell == "projection" else 5, c=(4, 3, 5)))
    if form == "packed":
        args = [pack_padded_sequence(x, torch.tensor([2, 7, 4]), enforce_sorted=False)]
    if form == "lengths":
        kwargs["lengths"] = torch.tensor([3, 0, 7])
    expected = values_and_grads(module, *args, **kwargs)
    with rnnfast.use_backend("torch"):
        assert rnnfast.explain(module, *args, **kwargs)[0][3:] == ("torch", "asked for by use_backend")
        assert_same(values_and_grads(module, *args, **kwargs), expected)
        assert_same(values_and_grads(module.eval(), *args, **kwargs), expected)
        with torch.no_grad():
            found = _outputs(lambda *args: module(*args, **kwargs), *args)
    assert_same(found, {key.removeprefix("output"): t for key, t in expected.items() if key.startswith("output")})


@pytest.mark.parametrize("name", CELL_MODULES)
def test_backend_torch_of_cells(name: str) -> None:
    module, x = _module(name, dtype=DOUBLE), _input(name, dtype=DOUBLE)
    for args in ((x,), (x, states(name, 3, 5)), (x[0], states(name, 5))):
        expected = values_and_grads(module, *args)
        with rnnfast.use_backend("torch"):
            assert_same(values_and_grads(module, *args), expected)


@layers
@pytest.mark.parametrize("of_any_order", [True, False], ids=["as on a CPU", "as on a GPU"])
def test_backend_torch_is_derived_twice(of_any_order: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "_can_derive_twice", lambda x: of_any_order)
    module = getattr(rnnfast, name)(2, 2, **STACK, dtype=DOUBLE)
    x = torch.randn(2, 1, 2, dtype=DOUBLE, requires_grad=True)
    with rnnfast.use_backend("torch"):
        assert torch.autograd.gradgradcheck(lambda x: tensors_of(module(x)), x)
        y = module(x)[0].sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(y, x)[0], first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, x)
        (tangent,) = torch.func.jvp(lambda x: module(x)[0], (x.detach(),), (torch.ones_like(x),))[1:]
        per_sample = torch.func.vmap(torch.func.grad(lambda x: module(x)[0].sum()))(torch.stack([x.detach()] * 2))
    assert_same({"": tangent}, {"": torch.func.jvp(lambda x: module(x)[0], (x.detach(),), (torch.ones_like(x),))[1]})
    assert_same({"": per_sample[1]}, {"": first})


@layers
@pytest.mark.parametrize("of_any_order", [True, False], ids=["as on a CPU", "as on a GPU"])
def test_backend_torch_takes_batched_gradients(of_any_order: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU, where torch's own backward does not: it is not to be seen here."""
    monkeypatch.setattr(aten, "_can_derive_twice", lambda x: of_any_order)
    of_reference = []
    reference = aten._reference
    monkeypatch.setattr(aten, "_reference", lambda *args: of_reference.append(1) or reference(*args))
    module = getattr(rnnfast, name)(2, 3, **STACK, dtype=DOUBLE)
    x, grads = torch.randn(2, 1, 2, dtype=DOUBLE, requires_grad=True), torch.randn(4, 2, 1, 6, dtype=DOUBLE)
    asked = [x, *module.parameters()]
    with rnnfast.use_backend("torch"):
        y = module(x)[0]
        derive = lambda g, **options: torch.autograd.grad(y, asked, g, retain_graph=True, **options)
        expected = [torch.stack(of) for of in zip(*map(derive, grads))]
        for found in (derive(grads, is_grads_batched=True), torch.func.vmap(derive)(grads)):
            torch.testing.assert_close(list(found), expected)
    assert len(of_reference) == (0 if of_any_order else 2)


def test_backend_torch_on_meta() -> None:
    for name in LAYERS + CELL_MODULES:
        module, x = _module(name, device="meta"), _input(name).to("meta")
        shapes = [t.shape for t in tensors_of(module(x))]
        with rnnfast.use_backend("torch"):
            assert [t.shape for t in tensors_of(module(x))] == shapes


def test_backend_torch_draws_dropout_as_the_others_do() -> None:
    module, x = rnnfast.GRU(4, 5, 3, dropout=0.5, dtype=DOUBLE), torch.randn(7, 3, 4, dtype=DOUBLE)
    expected = values_and_grads(module, x)
    with rnnfast.use_backend("torch"):
        assert_same(values_and_grads(module, x), expected)
        assert_same(_outputs(module.eval(), x), _outputs(module, x))


@pytest.mark.parametrize("form", ["plain", "packed", "lengths"])
@layers
def test_backend_torch_compiles(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one operator, with lengths of plain torch: Dynamo and autograd cannot take torch's own apart in every form."""
    torch._dynamo.reset()
    called: list[int] = []
    call = aten._call
    monkeypatch.setattr(aten, "_call", lambda *args: called.append(1) or call(*args))
    module, x = _module(name, dtype=DOUBLE), torch.randn(7, 3, 4, dtype=DOUBLE)
    args = (pack_padded_sequence(x, torch.tensor([7, 4, 2])),) if form == "packed" else (x,)
    kwargs = {"lengths": torch.tensor([3, 0, 7])} if form == "lengths" else {}
    expected = values_and_grads(module, *args, **kwargs)
    with rnnfast.use_backend("torch"):
        found = values_and_grads(torch.compile(module, backend="aot_eager", fullgraph=True), *args, **kwargs)
    assert_same({key.replace("_orig_mod.", ""): t for key, t in found.items()}, expected)
    assert len(called) == (0 if form == "lengths" else 2)  # for real, forward and backward
    torch._dynamo.reset()


@layers
def test_the_operator_of_torchs_stacks(name: str) -> None:
    module, x = getattr(torch.nn, name)(4, 5, 2, bidirectional=True), torch.randn(7, 3, 4, requires_grad=True)
    hx = [torch.randn(4, 3, 5, requires_grad=True) for _ in range(1 + (name == "LSTM"))]
    weights, operator = list(module.parameters()), torch.ops.rnnfast.torch_stack
    arguments = module.mode, 2, True, None, x, hx, weights, True
    torch.library.opcheck(operator.default, arguments)
    y, *finals = operator(*arguments)
    expected = tensors_of(module(x, tuple(hx) if name == "LSTM" else hx[0]))
    torch.testing.assert_close([y, *finals], expected)
    for k in range(len(expected)):  # of one output alone, too
        found = [torch.autograd.grad(of[k].sum(), [x, *hx, *weights], retain_graph=True, allow_unused=True,
                                     materialize_grads=True) for of in ([y, *finals], expected)]  # fmt: skip
        torch.testing.assert_close(*found)


def test_backend_torch_refuses_what_torch_has_not() -> None:
    module, x = rnnfast.GRU(4, 5), torch.randn(7, 3, 4)
    message = "backend 'torch' cannot serve this call: torch's kernels know neither other cells, nor resets"
    for kwargs in ({"resets": torch.zeros(7, 3, dtype=torch.bool)}, {"return_states": True}):
        with rnnfast.use_backend("torch"), pytest.raises(RuntimeError, match=message):
            module(x, **kwargs)
        with rnnfast.use_backend("torch"), pytest.raises(RuntimeError, match=message):
            rnnfast.explain(module, x, **kwargs)


@pytest.mark.parametrize("steps, rows", [(0, 2), (7, 2), (7, 0), (0, 0)])
@layers
def test_backend_torch_without_steps(name: str, steps: int, rows: int) -> None:
    module, args = Extended(_module(name)), (torch.randn(steps, rows, 4), torch.zeros(rows, dtype=torch.int64))
    expected = _outputs(module, *args)
    with rnnfast.use_backend("torch"):
        assert_same(_outputs(module, *args), expected)


class _OnGpu(torch.nn.Parameter):
    """A Parameter that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("name", [*LAYERS, "projection"])
def test_backend_torch_flattens_weights_for_cudnn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.nn does, but when they are used: once, and not under a capture."""
    calls, capturing = [], True

    def flatten(weights: list[torch.Tensor], *form: object) -> None:
        calls.append(form)
        chunk = torch.cat([w.flatten() for w in weights])
        for w, part in zip(weights, chunk.split([w.numel() for w in weights])):
            w.set_(part.view_as(w))

    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda weight: True)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: mode)
    monkeypatch.setattr(torch.cuda, "device_of", lambda weight: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    options = STACK | ({"proj_size": 3} if name == "projection" else {})
    module = getattr(rnnfast, "LSTM" if name == "projection" else name)(4, 5, **options, dtype=DOUBLE)
    x = torch.randn(7, 3, 4, dtype=DOUBLE)
    expected = values_and_grads(module, x)
    for key, parameter in list(module.named_parameters()):
        module._parameters[key] = _OnGpu(parameter.detach())
    module._init_flat_weights()
    with rnnfast.use_backend("torch"):
        assert_same(values_and_grads(module, x), expected)
        assert not calls
        capturing = False
        for _ in range(2):
            assert_same(values_and_grads(module, x), expected)
    count = 5 if name == "projection" else 4
    assert calls == [(count, 4, module.mode, 5, options.get("proj_size", 0), 2, False, True)]
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == 1
    tied = rnnfast.RNN(4, 5, dtype=DOUBLE)
    tied.weight_hh_l0 = _OnGpu(torch.randn(2, 5, 5, dtype=DOUBLE)[0])  # part of a buffer, which would lose it
    tied.weight_ih_l0 = _OnGpu(tied.weight_ih_l0.detach())
    with rnnfast.use_backend("torch"):
        tied(x)
    assert len(calls) == 1


def test_backend_torch_serves_what_no_kernel_of_ours_does(gpus: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((7, 5))
    for device in (torch.device("cuda", 0), torch.device("mps"), torch.device("xpu")):
        assert choose("LSTM", device, torch.float32)[0] == "torch"
        assert choose("LSTM", device, torch.float32, extended=True)[0] == "reference"
        assert choose("LSTM", device, torch.complex64)[0] == "reference"
    monkeypatch.setattr(chooser, "_CPU", chooser.Availability(False, "the native library is not built"))
    assert choose("GRU", torch.device("cpu"), torch.float32) == ("torch", "the native library is not built")
    module, x = rnnfast.GRU(4, 5, dtype=DOUBLE), torch.randn(7, 3, 4, dtype=DOUBLE)
    found = values_and_grads(module, x)
    sizes = ({0: DYNAMIC, 1: DYNAMIC},)
    program = torch.export.export(module, (x,), dynamic_shapes=sizes)
    monkeypatch.undo()
    assert_same(found, values_and_grads(module, x))
    x = torch.randn(9, 2, 4, dtype=DOUBLE)
    assert_same(values_and_grads(program.module(), x), values_and_grads(module, x))
