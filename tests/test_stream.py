"""Streams: a step at a time, with the state inside."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from helpers import CELL_MODULES, CELLS, LAYERS, error_of, layer, pair, states_of, tensors_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnfast
from rnnfast import FlexRNN, cells
from rnnfast import stream as streams


def assert_states(actual: Any, expected: Any, **tolerance: float) -> None:
    assert type(actual) is type(expected)
    for a, e in zip(tensors_of(actual), tensors_of(expected), strict=True):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.fixture(params=[True, False], ids=["by the library", "by the module"])
def by_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the library serves the steps, as it does wherever there is one."""
    if not request.param:
        monkeypatch.setattr(streams, "DTYPES", ())
    elif not rnnfast.backends()["cpu"].available:
        pytest.skip("the native library is not built")
    return request.param


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_layers(cell: str, layers: int, dtype: torch.dtype, batch: int, by_library: bool) -> None:
    """Steps give what the whole sequence gives."""
    module = layer(cell, 17, 4, dtype, num_layers=layers, bias=layers > 1, dropout=0.5 if layers > 1 else 0.0)
    x, hx = torch.randn(5, batch, 4, dtype=dtype), states_of(module, batch)
    hx = tuple(t.to(dtype) for t in hx) if isinstance(hx, tuple) else hx.to(dtype)
    step = rnnfast.Stream(module, batch)
    step.state = hx
    outputs = torch.stack([step(of_step).clone() for of_step in x])
    with torch.no_grad(), rnnfast.use_backend("reference"):
        expected, final = module.eval()(x, hx)
    bounds = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(outputs, expected, **bounds)
    assert_states(step.state, final, **bounds)
    assert (step._recurrent[0]._run is not None) == by_library


@pytest.mark.parametrize("library", [nn, rnnfast], ids=["torch.nn", "rnnfast"])
@pytest.mark.parametrize("name", CELL_MODULES)
def test_cells(name: str, library: Any, by_library: bool) -> None:
    module, x = getattr(library, name)(4, 5), torch.randn(4, 2, 4)
    step, hx = rnnfast.Stream(module, 2), None
    for of_step in x:
        output = step(of_step)
        hx = module(of_step, hx)
        torch.testing.assert_close(output, hx[0] if isinstance(hx, tuple) else hx)
        assert_states(step.state, hx)


@pytest.mark.parametrize("name", LAYERS)
def test_torchs_layers(name: str) -> None:
    theirs, _ = pair(name, 4, 5, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    step = rnnfast.Stream(theirs, 2)
    outputs = torch.stack([step(of_step).clone() for of_step in x.unbind(1)], 1)
    torch.testing.assert_close(outputs, theirs(x)[0])


def test_sequences(by_library: bool) -> None:
    """Of modules with and without a state."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Sequential(rnnfast.GRU(4, 5), nn.LayerNorm(5)), rnnfast.LSTMCell(5, 3))
    tokens = torch.randint(9, (6, 2))
    step, hx = rnnfast.Stream(model, 2), None
    h, _ = model[1][0](model[0](tokens))
    for of_step, tokens_of_step in zip(model[1][1](h), tokens):
        hx = model[2](of_step, hx)
        torch.testing.assert_close(step(tokens_of_step), hx[0])
    of_gru, of_cell = step.state
    torch.testing.assert_close(of_gru, h[-1:])
    assert_states(of_cell, hx)
    assert not step(tokens[0]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"recurrent": "none"}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("cell", [cells.slstm, cells.janet, cells.min_gru, cells.lstm, cells.peephole_lstm], ids=str)
def test_layers_of_any_cell(cell: cells.Cell, options: dict, dtype: torch.dtype, by_library: bool) -> None:
    module = FlexRNN(cell, 4, 6, dtype=dtype, **options)
    x, step = torch.randn(5, 2, 4, dtype=dtype), rnnfast.Stream(module, 2)
    outputs = torch.stack([step(of_step).clone() for of_step in x])
    with torch.no_grad(), rnnfast.use_backend("reference"):
        expected, final = module(x.transpose(0, 1) if module.batch_first else x)
    bounds = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(outputs, expected.transpose(0, 1) if module.batch_first else expected, **bounds)
    assert_states(step.state, final, **bounds)
    of_kernels = cell is cells.lstm and "recurrent" not in options
    assert (step._recurrent[0]._run is not None) == (by_library and of_kernels)
    assert step._recurrent[0]._is_served == by_library


def test_a_layer_of_any_cell_is_refreshed() -> None:
    module, x = FlexRNN(cells.slstm, 4, 6, 2, dropout=0.5), torch.randn(2, 4)
    step = rnnfast.Stream(module, 2)
    first = step(x).clone()
    module.weight_ih_l1.data = torch.randn(6, 24).t()
    step.reset()
    assert torch.equal(step(x), first)
    step.refresh()
    step.reset()
    module.train()  # but for dropout
    expected = step(x).clone()
    with torch.no_grad():
        module.weight_ih_l0.mul_(2)
    step.reset()
    assert torch.equal(step(x), expected)  # by its copy of the weights
    step.refresh()
    step.reset()
    torch.testing.assert_close(step(x), module.eval()(x[None])[0][0])
    assert not step(x.requires_grad_()).requires_grad
    with torch.autograd.forward_ad.dual_level():
        step(x.detach())


def test_sequences_with_a_layer_of_any_cell() -> None:
    model = nn.Sequential(nn.Linear(4, 4), FlexRNN(cells.slstm, 4, 6), rnnfast.GRU(6, 5), nn.ReLU(inplace=True))
    x, step = torch.randn(6, 2, 4), rnnfast.Stream(model, 2)
    h, of_slstm = model[1](model[0](x))
    h, of_gru = model[2](h)
    for of_step, expected in zip(x, h.relu()):
        torch.testing.assert_close(step(of_step), expected)
    assert_states(step.state[0], of_slstm)
    assert_states(step.state[1], of_gru)
    twin = copy.deepcopy(step)
    assert torch.equal(twin(x[0]), step(x[0]))


@rnnfast.cell(gates="f g", states="h c", initial={"h": 0.5, "c": -2.0})
def begins_elsewhere(x: Any, a: Any, s: Any) -> Any:
    c = torch.sigmoid(x.f + a.f) * s.c + torch.tanh(x.g + a.g)
    return torch.tanh(c) + s.h / 2, c


def test_resets_give_a_cells_own_states() -> None:
    module, x = FlexRNN(begins_elsewhere, 4, 5, 2), torch.randn(3, 4)
    step = rnnfast.Stream(module, 3)
    first = step(x).clone()
    torch.testing.assert_close(first, module(x[None])[0][0])
    step(x)
    before = [t.clone() for t in step.state]
    step.reset(torch.tensor([True, False, True]))
    for now, old, value in zip(step.state, before, begins_elsewhere.initial):
        assert torch.equal(now[:, 1], old[:, 1])
        assert (now[:, [0, 2]] == value).all()
    step.reset()
    assert torch.equal(step(x), first)
    step.state = module(x[None])[1]
    torch.testing.assert_close(step(x), module(torch.stack([x, x]))[0][1])


def test_layouts_of_input() -> None:
    module = rnnfast.GRU(4, 5)
    x = torch.randn(2, 4)
    expected = rnnfast.Stream(module, 2)(x)
    for same in (x.t().contiguous().t(), torch._neg_view(-x), x.clone().requires_grad_()):
        assert torch.equal(rnnfast.Stream(module, 2)(same), expected)


def test_reset_and_state() -> None:
    module, x = rnnfast.LSTM(4, 5), torch.randn(3, 4)
    step = rnnfast.Stream(module, 3)
    first = step(x).clone()
    step(x)
    before = [t.clone() for t in step.state]
    step.reset(torch.tensor([True, False, True]))
    for now, old in zip(step.state, before):
        assert torch.equal(now[:, 1], old[:, 1])
        assert not now[:, [0, 2]].any()
    step.reset()
    assert torch.equal(step(x), first)
    h, _ = step.state
    assert step(x).data_ptr() == h.data_ptr()  # the output is the state, which stays where it is


def test_refresh() -> None:
    module, x = rnnfast.GRU(4, 5).requires_grad_(False), torch.randn(1, 4)
    step = rnnfast.Stream(module)
    before = module(x)[0].clone()
    module.weight_ih_l0 = nn.Parameter(torch.randn(4, 15).t())
    module.bias_hh_l0.add_(1)
    torch.testing.assert_close(step(x), before)
    step.reset()
    step.refresh()
    torch.testing.assert_close(step(x), module(x)[0])


def test_memory_that_moves() -> None:
    """As share_memory_() moves that of a tensor, also by a queue between processes."""
    module, x = rnnfast.LSTM(4, 64, 2).requires_grad_(False), torch.randn(1, 4)
    step, (expected, _) = rnnfast.Stream(module), module(x.expand(3, 1, 4))
    outputs = [step(x).clone()]
    for state in step.state:
        state.share_memory_()
    outputs.append(step(x).clone())
    module.share_memory()
    outputs.append(step(x).clone())
    torch.testing.assert_close(torch.stack(outputs), expected)
    torch.testing.assert_close(step.state[0][-1], expected[-1])
    step.state[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of the state was taken away"):
        step(x)


def test_who_works_in_place() -> None:
    model, x = nn.Sequential(rnnfast.GRU(4, 5), nn.ReLU(inplace=True)), torch.randn(3, 1, 4)
    step = rnnfast.Stream(model)
    expected, _ = model[0](x)
    for of_step, of_sequence in zip(x, expected):
        torch.testing.assert_close(step(of_step), of_sequence.relu())


def test_eval_mode() -> None:
    model = nn.Sequential(rnnfast.GRU(4, 50), nn.Dropout(0.5))
    assert rnnfast.Stream(model)(torch.randn(1, 4)).count_nonzero() == 50


def test_the_module_stays_what_it_is() -> None:
    module = nn.GRU(4, 5)
    before = dict(module.__dict__)
    rnnfast.Stream(module)(torch.randn(1, 4))
    assert type(module) is nn.GRU
    assert module.__dict__ == before | {"training": False}


class Doubled(nn.GRU):
    def forward(self, *args: Any) -> Any:
        output, hx = super().forward(*args)
        return 2 * output, hx


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_forwards_and_hooks_of_others() -> None:
    hooked = rnnfast.GRU(4, 5)
    hooked.register_forward_hook(lambda *args: None)
    replaced = FlexRNN(cells.slstm, 4, 5)
    replaced.forward = lambda x: x
    for module in (Doubled(4, 5), hooked, replaced):
        with pytest.raises(TypeError, match="a forward or hooks of its own"):
            rnnfast.Stream(module)
    with pytest.raises(TypeError, match="Residual has no recurrent layer"):
        rnnfast.Stream(Residual(rnnfast.GRUCell(4, 4)))


class Sub(Tensor):
    pass


def test_other_kinds_of_calls() -> None:
    """Other tensors, modes and backends are the module's matter."""
    module, x = rnnfast.GRU(4, 5), torch.randn(1, 4)
    expected, step = rnnfast.Stream(module)(x), rnnfast.Stream(module)
    for make in (lambda: step(x.as_subclass(Sub)), lambda: step(x)):
        step.reset()
        torch.testing.assert_close(torch.Tensor(make()), expected)
    step.reset()
    with rnnfast.use_backend("reference"):
        torch.testing.assert_close(step(x), expected)
    with FakeTensorMode() as mode, pytest.raises(Exception, match=r"(?i)fake"):
        step(mode.from_tensor(x))


def test_autograd_sees_that_outputs_change() -> None:
    step, w = rnnfast.Stream(rnnfast.GRU(4, 5)), torch.randn(1, 5, requires_grad=True)
    loss = (step(torch.randn(1, 4)) * w).sum()
    step(torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode() -> None:
    module, x = rnnfast.LSTM(4, 5), torch.randn(1, 4)
    with torch.inference_mode():
        step = rnnfast.Stream(module)
        first = step(x).clone()
    step.reset()
    assert torch.equal(step(x), first)
    step.state = step.state[::-1]


def test_memory_outlives_the_module() -> None:
    module, x = rnnfast.GRU(4, 300), torch.randn(1, 4)
    expected = module(x)[0].detach()
    step = rnnfast.Stream(module)
    del module
    step.module = None
    gc.collect()
    torch.testing.assert_close(step(x), expected)


def test_copies() -> None:
    step, x = rnnfast.Stream(rnnfast.LSTM(4, 5), 2), torch.randn(2, 4)
    step(x)
    others = [copy.deepcopy(step), copy.copy(step), pickle.loads(pickle.dumps(step))]
    expected = step(x).clone()
    for other in others:
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rnnfast.Stream(nn.Linear(3, 4)), "Linear has no recurrent layer or cell"),
        (lambda: rnnfast.Stream(rnnfast.GRU(4, 5, bidirectional=True)), "two directions"),
        (lambda: rnnfast.Stream(FlexRNN(cells.mgu, 4, 5, bidirectional=True)), "two directions"),
        (lambda: setattr(rnnfast.Stream(FlexRNN(cells.slstm, 4, 5)), "state", torch.zeros(1, 1, 5)), "tuple of 4 Tens"),
        (lambda: setattr(rnnfast.Stream(FlexRNN(cells.mgu, 4, 5)), "state", (torch.zeros(1, 2, 5),)), "of shapes"),
        (lambda: rnnfast.Stream(type("Own", (FlexRNN,), {"forward": None})(cells.mgu, 4, 5)), "forward or hooks"),
        (lambda: rnnfast.Stream(rnnfast.GRU(4, 5), 0), "batch has to be 1 or more, got 0"),
        (lambda: rnnfast.Stream(rnnfast.GRU(4, 5), 2)(torch.zeros(1, 4)), r"got torch.float32 \[1, 4\] on cpu"),
        (lambda: rnnfast.Stream(rnnfast.GRU(4, 5))(torch.zeros(1, 4).double()), "got torch.float64"),
        (lambda: rnnfast.Stream(rnnfast.GRU(4, 5))(torch.zeros(1, 4, device="meta")), "on meta, expected"),
        (lambda: rnnfast.Stream(rnnfast.GRU(4, 5)).reset(torch.zeros(1)), "mask must be bool of shape"),
        (lambda: setattr(rnnfast.Stream(rnnfast.GRU(4, 5)), "state", torch.zeros(1, 2, 5)), "states of shapes"),
    ],
)  # fmt: skip
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_wrong_weights_are_told() -> None:
    module = rnnfast.GRU(4, 5)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(15, 4))
    assert "shape" in str(error_of(lambda: rnnfast.Stream(module)))


def test_dtypes_without_kernels() -> None:
    module = rnnfast.RNN(4, 5, dtype=torch.complex64)
    x = torch.randn(1, 4, dtype=torch.complex64)
    torch.testing.assert_close(rnnfast.Stream(module)(x), module(x)[0])


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = rnnfast.LSTM(64, 200), torch.randn(40, 64)
    results: list[Tensor] = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            step = rnnfast.Stream(module, 40)
            step(x)
            results.append(step(x).clone())
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*results)


def test_another_instruction_set() -> None:
    """Packed weights are of the kernels that made them."""
    best = torch.ops.rnnfast.cpu_isa(None)
    module, x = rnnfast.LSTM(70, 40, 2, proj_size=20), torch.randn(4, 9, 70)
    expected, step = module(x)[0], rnnfast.Stream(module, 9)
    try:
        for isa, of_step, of_sequence in zip((best, 0, best, best), x, expected):
            torch.ops.rnnfast.cpu_isa(isa)
            torch.testing.assert_close(step(of_step), of_sequence)
    finally:
        torch.ops.rnnfast.cpu_isa(best)
