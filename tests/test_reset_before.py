"""GRUs with ``reset_after=False``, which torch does not have, against the equations of Cho et al., 2014."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, flatten, leaves, states_of, tensors_of, values_and_grads
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

DOUBLE = torch.float64
T, N, I, H = 5, 3, 4, 6
LENGTHS = torch.tensor([3, 0, 5])
RESETS = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)


def gru(*args: Any, dtype: torch.dtype = DOUBLE, **options: Any) -> rnnfast.GRU:
    return rnnfast.GRU(I, H, *args, dtype=dtype, reset_after=False, **options)


def step(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    """Of one row."""
    b_ih, b_hh = (x.new_zeros(3 * H) if b is None else b for b in (b_ih, b_hh))
    (x_r, x_z, x_n), (w_r, w_z, w_n), (b_r, b_z, b_n) = (w_ih @ x + b_ih).chunk(3), w_hh.chunk(3), b_hh.chunk(3)
    r, z = torch.sigmoid(x_r + w_r @ h + b_r), torch.sigmoid(x_z + w_z @ h + b_z)
    return (1 - z) * torch.tanh(x_n + w_n @ (r * h) + b_n) + z * h


class Paper(nn.Module):
    """A layer by its equations, row by row; a reset ends what comes before it in either direction."""

    def __init__(self, layer: rnnfast.GRU) -> None:
        super().__init__()
        self.layers, self.directions = layer.num_layers, 1 + layer.bidirectional
        for name, weight in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))

    def forward(self, x: Tensor, h_0: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> Any:
        steps = [x.size(0)] * x.size(1) if lengths is None else lengths.tolist()
        weights, finals = list(self.parameters()), []
        each = len(weights) // (self.layers * self.directions)
        for k in range(self.layers * self.directions):
            d, of = k % self.directions, weights[k * each : (k + 1) * each]
            outputs = outputs if d else []  # noqa: F821  the first direction makes them
            rows = [[torch.zeros_like(h_0[k, n])] * x.size(0) for n in range(x.size(1))]
            for n, length in enumerate(steps):
                h = h_0[k, n]
                for t in reversed(range(length)) if d else range(length):
                    border = t + d
                    if resets is not None and border < length and resets[border, n]:
                        h = torch.zeros_like(h)
                    h = rows[n][t] = step(x[t, n], h, *of)
                finals.append(h)
            outputs.append(torch.stack([torch.stack(row) for row in rows], 1))
            if d == self.directions - 1:
                x = torch.cat(outputs, 2)
        return x, torch.stack(finals).view(-1, len(steps), H)


@pytest.mark.parametrize("form", [{}, {"lengths": LENGTHS}, {"resets": RESETS}, {"lengths": LENGTHS, "resets": RESETS}])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_is_the_papers(options: dict, form: dict) -> None:
    ours = gru(**options)
    inputs = torch.randn(T, N, I, dtype=DOUBLE), states_of(ours, N)
    assert_same(values_and_grads(ours, *inputs, **form), values_and_grads(Paper(ours), *inputs, **form))
    with torch.no_grad():  # for which torch.nn's GRU has a path of its own
        assert_same(dict(flatten(ours(*inputs, **form))), dict(flatten(Paper(ours)(*inputs, **form))))


def test_packed_unbatched_and_batch_first() -> None:
    ours = gru(bidirectional=True, batch_first=True)
    x, lengths = torch.randn(N, T, I, dtype=DOUBLE), torch.tensor([3, 1, 5])
    output, h_n = ours(x, lengths=lengths)
    packed, of_packed = ours(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(of_packed, h_n)
    expected = pack_padded_sequence(output, lengths, batch_first=True, enforce_sorted=False)
    torch.testing.assert_close(packed.data, expected.data)
    row, of_row = ours(x[2])
    torch.testing.assert_close((row, of_row), (output[2], h_n[:, 2]))


def test_states_of_every_step() -> None:
    ours = gru(num_layers=2)
    output, h_n, states = ours(torch.randn(T, N, I, dtype=DOUBLE), return_states=True)
    assert torch.equal(states[1], output)
    assert torch.equal(states[:, -1], h_n)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N,), (1,), (), (0,)], ids=str)
def test_cell(shape: tuple[int, ...], bias: bool) -> None:
    cell = rnnfast.GRUCell(I, H, bias, dtype=DOUBLE, reset_after=False)
    x, h = torch.randn(*shape, I, dtype=DOUBLE), torch.randn(*shape, H, dtype=DOUBLE)
    found = cell(x, h)
    assert found.shape == h.shape
    weights = [weight.detach() for weight in cell.parameters()]
    rows = zip(x.view(-1, I), h.view(-1, H), found.detach().view(-1, H))
    for of_x, of_h, h_n in rows:
        torch.testing.assert_close(h_n, step(of_x, of_h, *weights))
    with torch.no_grad():
        assert torch.equal(cell(x, h), found)


def test_single_steps_in_float32_are_not_torchs() -> None:
    """Of large layers those of a GRU are."""
    layer, cell = rnnfast.GRU(2, 128, reset_after=False), rnnfast.GRUCell(2, 128, reset_after=False)
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in layer.state_dict().items()})
    x, h = torch.randn(1, 3, 2), torch.randn(1, 3, 128)
    exact = copy.deepcopy(layer).double()(x.double(), h.double())[0][0].float()
    torch.testing.assert_close(layer(x, h)[0][0], exact)
    torch.testing.assert_close(cell(x[0], h[0]), exact)


def test_gradcheck() -> None:
    ours = gru(bidirectional=True)
    x, h = leaves((torch.randn(3, 2, I, dtype=DOUBLE), states_of(ours, 2)))
    assert torch.autograd.gradcheck(ours, (x, h), fast_mode=True)
    assert torch.autograd.gradgradcheck(ours, (x, h), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_and_autocast(dtype: torch.dtype) -> None:
    exact = gru()
    x = torch.randn(T, N, I, dtype=DOUBLE)
    low, under = (copy.deepcopy(exact).to(of) for of in (dtype, torch.float32))
    with torch.autocast("cpu", dtype):
        found = under(x.float())[0]
    bound = 8 * torch.finfo(dtype).eps
    for output in (found, low(x.to(dtype))[0]):
        assert output.dtype == dtype
        assert (output.double() - exact(x)[0]).abs().max() < bound


def test_transforms_and_compilation() -> None:
    ours = gru()
    x = torch.randn(N, T, I, dtype=DOUBLE)
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(ours, parameters, x)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    each = [torch.autograd.grad(loss(parameters, row), list(parameters.values())) for row in x]
    for name, of in zip(parameters, zip(*each)):
        torch.testing.assert_close(found[name], torch.stack(of))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))


def test_exported_to_onnx(tmp_path: Path) -> None:
    """As an operator for each layer, for any number of steps and rows."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = gru(2, bidirectional=True, dtype=torch.float32).eval(), tmp_path / "model.onnx"
    dynamic = {"input": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    torch.onnx.export(model, (torch.randn(T, N, I),), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type in ("GRU", "Loop", "Scan")]
    assert [node.op_type for node in nodes] == ["GRU", "GRU"]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(T + 2, N - 1, I)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for a, e in zip(found, model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), e)


def test_exported_to_onnx_by_a_trace(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, x, path = gru(bidirectional=True, dtype=torch.float32).eval(), torch.randn(T, N, I), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, which is old, and of what a trace holds fast
        torch.onnx.export(model, (x,), path, dynamo=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for a, e in zip(found, model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), e)


def test_says_what_serves_it() -> None:
    for module in (gru(dtype=torch.float32), rnnfast.GRUCell(I, H, reset_after=False)):
        assert repr(module).endswith(", reset_after=False)")
        (choice,) = rnnfast.explain(module)
        assert choice.backend == "reference"
        assert choice.reason.startswith("with reset_after=False a step has two products")
        with (
            rnnfast.use_backend("torch"),
            pytest.raises(RuntimeError, match="'torch' cannot serve this call: with reset"),
        ):
            module(torch.randn(1, I))


def test_stream() -> None:
    layer, cell = gru(dtype=torch.float32), rnnfast.GRUCell(I, H, reset_after=False)
    x = torch.randn(T, N, I)
    for module in (layer, cell):
        step, h = rnnfast.Stream(module, N), torch.zeros(N, H)
        for of_step in x:
            h = cell(of_step, h) if module is cell else layer(of_step[None], h[None])[0][0]
            assert torch.equal(step(of_step), h)


def test_stays_where_torch_has_no_such_module() -> None:
    model = nn.ModuleList([gru(), rnnfast.GRU(I, H), rnnfast.GRUCell(I, H, reset_after=False)])
    for module in (model[0], model[2]):
        with pytest.raises(RuntimeError, match=r"compiles torch.nn.GRU(Cell)?, which has no reset_after=False"):
            torch.jit.script(module)
    again = copy.deepcopy(model)
    rnnfast.revert(again)
    assert again.rnnfast_report.reverted == ["1"]
    assert again.rnnfast_report.left_alone == {
        "0": "torch.nn.GRU has no reset_after=False",
        "2": "torch.nn.GRUCell has no reset_after=False",
    }
    x = torch.randn(T, N, I, dtype=DOUBLE)
    for a, b in zip(tensors_of(again[0](x)), tensors_of(model[0](x))):
        assert torch.equal(a, b)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="reset_after=False is for a GRU without recompute"):
        gru(recompute=True)
    weights = [torch.randn(4 * H, I), torch.randn(4 * H, H)]
    for call, x in ((rnnfast.functional.rnn, torch.randn(T, N, I)), (rnnfast.functional.cell, torch.randn(N, I))):
        with pytest.raises(ValueError, match="for a GRU without recompute, got LSTM"):
            call("LSTM", x, None, weights, reset_after=False)
        good = [torch.randn(3 * H, I), torch.randn(3 * H, H), torch.randn(3 * H), torch.randn(3 * H)]
        for size in (1, 2 * H, 2 * H + 1, 3 * H + 1):
            for k, name in ((2, "bias_ih"), (3, "bias_hh")):
                wrong = [torch.randn(size) if k == at else weight for at, weight in enumerate(good)]
                with pytest.raises(RuntimeError, match=rf"{name} has shape \[{size}\], expected \[18\]"):
                    call("GRU", x, None, wrong, reset_after=False)
        with pytest.raises(RuntimeError, match="no kernel for dtype Int"):
            call("GRU", x.int(), None, [weight.int() for weight in good], reset_after=False)
    with pytest.raises(RuntimeError, match="x has 2 dimensions, expected 3"):
        rnnfast.functional.rnn("GRU", torch.randn(T, I), None, good, reset_after=False)
