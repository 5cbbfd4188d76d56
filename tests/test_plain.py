"""Plain calls: inference on a CPU by one operator, and what makes a call another."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from helpers import CELL_MODULES, CELLS, error_of, flatten, layer, pair, states, states_of, values_and_grads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from rnnfast import FlexRNN, cells, modules, ops
from rnnfast.evaluator import programs

pytestmark = pytest.mark.skipif(not rnnfast.backends()["cpu"].available, reason="the native library is not built")


REFUSED = {"PLAIN": (None, None, None), "FLEX_PLAIN": (None, ())}  # what an operator returns that does not serve


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call of the library's operators whether it served."""
    found: list[bool] = []

    def counted(run: Any, *args: Any) -> Any:
        outputs = run(*args)
        found.append(any(isinstance(of, Tensor) for of in outputs))
        return outputs

    for name in REFUSED:
        monkeypatch.setattr(ops, name, functools.partial(counted, getattr(ops, name)))
    return found


def otherwise(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    """What comes without those operators."""
    with monkeypatch.context() as context:
        for name, outputs in REFUSED.items():
            context.setattr(ops, name, lambda *args, outputs=outputs: outputs)
        return call()


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Types, shapes and strides too."""
    assert type(actual) is type(expected)
    pairs = list(zip(flatten(actual), flatten(expected), strict=True))
    for (place, a), (other, e) in pairs:
        assert (place, a.stride()) == (other, e.stride())
        torch.testing.assert_close(a, e, rtol=0, atol=0)


FORMS = {"time first": (5, 3), "batch first": (3, 5), "one row": (1, 5), "one step": (3, 1), "unbatched": (5,)}


@pytest.mark.parametrize("check", ["check_input", "check_forward_args", "check_hidden_size", "permute_hidden"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_checks_of_a_subclass_are_asked(name: str, check: str, served: list[bool]) -> None:
    ours, asked = getattr(rnnfast, name), []

    def overridden(self: nn.Module, *args: Any) -> Any:
        asked.append(check)
        return getattr(ours, check)(self, *args)

    x, h = torch.randn(5, 2, 4), torch.randn(1, 2, 3)
    hx = (h, h) if name == "LSTM" else h
    with torch.no_grad():
        type("Checked", (ours,), {check: overridden})(4, 3)(x, hx)
        assert asked and not served
        type("Named", (ours,), {})(4, 3)(x, hx)
        assert served == [True]


@pytest.mark.few(2, "cell", "form", "given_hx", "options", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given_hx", [False, True], ids=["no hx", "hx"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 3}, {"bidirectional": True, "bias": False}, {"num_layers": 2, "bidirectional": True}],
    ids=["one layer", "three layers", "two directions", "both"],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_layers(
    cell: str, form: str, options: dict, given_hx: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch, served: list[bool],
) -> None:  # fmt: skip
    module = layer(cell, dtype=dtype, batch_first=form != "time first", **options)
    x, hx = torch.randn(*FORMS[form], 4, dtype=dtype), None
    if given_hx:
        hx = states_of(module, {"time first": 3, "batch first": 3, "one step": 3}.get(form, 1))
        cast = lambda t: (t.squeeze(1) if form == "unbatched" else t).to(dtype)
        hx = tuple(map(cast, hx)) if isinstance(hx, tuple) else cast(hx)
    assert_same_bits(module(x, hx), otherwise(monkeypatch, lambda: module(x, hx)))
    assert served == [True]


@pytest.mark.parametrize("given_hx", [False, True], ids=["no hx", "hx"])
@pytest.mark.parametrize("shape", [(3, 4), (4,)], ids=["batch", "unbatched"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", CELL_MODULES)
@torch.no_grad()
def test_cells(
    name: str, bias: bool, shape: tuple[int, ...], given_hx: bool, monkeypatch: pytest.MonkeyPatch, served: list[bool]
) -> None:
    _, module = pair(name, 4, 5, bias=bias, dtype=torch.float64)
    x, hx = torch.randn(shape, dtype=torch.float64), states(name, *shape[:-1], 5) if given_hx else None
    assert_same_bits(module(x, hx), otherwise(monkeypatch, lambda: module(x, hx)))
    assert served == [True]


def test_layouts_of_memory(monkeypatch: pytest.MonkeyPatch, served: list[bool]) -> None:
    module = rnnfast.LSTM(4, 5, 2, batch_first=True).requires_grad_(False)  # gradients are on, but nothing asks for one
    x, hx = torch.randn(4, 7, 3).movedim(0, -1), tuple(torch.randn(7, 2, 5).transpose(0, 1) for _ in range(2))
    assert_same_bits(module(x.mT.mT, [*hx]), otherwise(monkeypatch, lambda: module(x, hx)))
    negative = torch._neg_view(x)
    assert_same_bits(module(negative, hx), otherwise(monkeypatch, lambda: module(-x, hx)))
    module.weight_hh_l1 = nn.Parameter(torch.randn(5, 20).t(), requires_grad=False)
    assert_same_bits(module(x, hx), otherwise(monkeypatch, lambda: module(x, hx)))
    assert served == [True] * 3


def changed_in_place(weight: Tensor) -> None:
    weight.mul_(-1)


def moved(weight: Tensor) -> None:
    weight.data = weight.data * -1


def turned(weight: Tensor) -> None:
    weight.data = weight.data.t()


def replaced_storage(weight: Tensor) -> None:
    weight.set_((weight * -1).detach())


def negated(weight: Tensor) -> None:
    weight.data = torch._neg_view(weight.data)


@pytest.mark.parametrize("change", [changed_in_place, moved, turned, replaced_storage, negated])
@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
@torch.no_grad()
def test_weights_that_change(name: str, change: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = getattr(rnnfast, name)(15, 5), torch.randn(3, 15)
    x = x if name == "GRUCell" else x[:, None]
    before = module(x)
    change(module.weight_ih if name == "GRUCell" else module.weight_ih_l0)
    after = module(x)
    assert_same_bits(after, otherwise(monkeypatch, lambda: module(x)))
    assert not torch.equal(*(dict(flatten(of))[""] if name == "GRUCell" else of[0] for of in (before, after)))


@torch.no_grad()
def test_weights_of_other_shapes_in_the_same_place() -> None:
    theirs, ours = pair("GRUCell", 1, 5)
    x = torch.randn(3, 1)
    ours(x)
    for module in (theirs, ours):
        module.weight_ih.data = module.weight_ih.data.view(1, 15)
    assert error_of(ours, x) == error_of(theirs, x)


def changed(rng: random.Random, t: Tensor) -> Any:
    """Another tensor, which may not fit."""
    how = rng.choice(["as it is"] * 14 + ["longer", "shorter", "flat", "double", "strided", "empty", "none", "sparse"])
    dim = rng.randrange(t.dim())
    if how == "longer":
        return torch.cat([t, t.narrow(dim, 0, 1)], dim)
    if how == "shorter":
        return t.narrow(dim, 0, t.size(dim) - 1)
    made = {
        "flat": lambda: t.flatten(),
        "double": lambda: t.double(),
        "strided": lambda: torch.stack([t, -t], -1)[..., 0],
        "empty": lambda: t[..., :0],
        "none": lambda: None,
        "sparse": lambda: t.to_sparse(),
    }
    return made[how]() if how in made else t


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", *CELL_MODULES])
@torch.no_grad()
def test_any_arguments(name: str, monkeypatch: pytest.MonkeyPatch, served: list[bool]) -> None:
    """Of wrong ones the library must see none."""
    rng = random.Random(name)
    is_cell = name.endswith("Cell")
    for _ in range(150):
        sizes = rng.randint(1, 3), rng.randint(1, 3)
        form = {} if is_cell else {"num_layers": rng.randint(1, 3), "bidirectional": rng.random() < 0.5}
        form |= {} if is_cell else {"batch_first": rng.random() < 0.5}
        module = getattr(rnnfast, name)(*sizes, bias=rng.random() < 0.5, **form)
        rows, batched, steps = rng.randint(1, 3), rng.random() < 0.7, rng.randint(1, 4)
        batch = (rows,) if batched else ()
        lead = batch if is_cell else (*batch, steps) if form["batch_first"] else (steps, *batch)
        layers = () if is_cell else (form["num_layers"] * (1 + form["bidirectional"]),)
        x, hx = changed(rng, torch.randn(*lead, sizes[0])), states(name, *layers, *batch, sizes[1], dtype=torch.float32)
        hx = tuple(changed(rng, h) for h in hx) if isinstance(hx, tuple) else changed(rng, hx)
        outcome = outcome_of(module, x, hx)
        expected = otherwise(monkeypatch, lambda: outcome_of(module, x, hx))  # noqa: B023
        if isinstance(outcome, tuple) and isinstance(outcome[0], type):
            assert outcome == expected
        else:
            assert_same_bits(outcome, expected)
    assert served.count(True) > 20


def outcome_of(module: nn.Module, *args: Any) -> Any:
    """What a call returns, or the type and text of what it raises."""
    try:
        return module(*args)
    except Exception as error:
        return type(error), str(error)


@torch.no_grad()
def test_copies_and_threads() -> None:
    module, x = rnnfast.LSTM(4, 5, 3), torch.randn(7, 2, 4)
    expected = module(x)[0]
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    module.weight_hh_l0.zero_()
    for twin in twins:
        assert torch.equal(twin(x)[0], expected)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda k: twins[k % 2](x)[0], range(200)):
            assert torch.equal(y, expected)


@torch.no_grad()
def test_weights_that_other_threads_replace() -> None:
    """A call reads its weights until it returns: large ones, whose memory is given back to the system at once."""
    module, x = rnnfast.GRU(8, 1000), torch.randn(20, 1, 8)
    done = threading.Event()

    def replace() -> None:
        while not done.wait(0.001):
            module.weight_hh_l0 = nn.Parameter(torch.zeros(3000, 1000))
            module.weight_hh_l0.data = torch.zeros(3000, 1000)

    thread = threading.Thread(target=replace)
    thread.start()
    for _ in range(200):
        assert module(x)[0].isfinite().all()
    done.set()
    thread.join()


@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize("name", ["input", "hx", "weight_hh_l0"])
@torch.no_grad()
def test_memory_that_was_taken_away(name: str, size: int) -> None:
    module, x, h = rnnfast.GRU(4, 5), torch.randn(3, 2, 4), torch.randn(1, 2, 5)
    module(x, h)
    {"input": x, "hx": h, "weight_hh_l0": module.weight_hh_l0}[name].untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match="memory"):
        module(x, h)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_memory_of_a_transposed_weight_that_was_taken_away(is_recorded: bool) -> None:
    """Which torch.nn's modules refuse, too."""
    module, x = rnnfast.GRU(4, 5), torch.randn(3, 2, 4)
    module.weight_hh_l0 = nn.Parameter(torch.randn(5, 15).T)
    module.weight_hh_l0.untyped_storage().resize_(16)
    with torch.set_grad_enabled(is_recorded), pytest.raises(RuntimeError, match="memory"):
        module(x)


def test_sizes_of_zero(monkeypatch: pytest.MonkeyPatch, served: list[bool]) -> None:
    with torch.no_grad():
        module, x = rnnfast.GRU(4, 5, 2), torch.randn(3, 0, 4)
        assert_same_bits(module(x), otherwise(monkeypatch, lambda: module(x)))
    assert served == [True]


# Layers of any cell


@rnnfast.cell(gates="i f g o", states="h c", weights="p", scalars={"k": 1.0})
def own_cell(x: Any, a: Any, s: Any, w: Any) -> Any:
    c = torch.sigmoid(x.f + a.f + w.p * s.c) * s.c + torch.sigmoid(x.i + a.i) * torch.tanh(w.k * x.g + a.g)
    return torch.sigmoid(x.o + a.o) * torch.tanh(c), c


OWN = [own_cell, cells.slstm, cells.mgu, cells.sru, cells.min_gru, cells.leaky_rnn]
RECURRENCES = {
    "dense": {},
    "heads": {"num_heads": 2},
    "diagonal": {"recurrent": "diagonal"},
    "none": {"recurrent": "none"},
}


def flex_of(cell: cells.Cell, recurrence: str, **options: Any) -> FlexRNN:
    """Of H = 6; a cell without a W_hh has no heads."""
    torch.manual_seed(0)
    return FlexRNN(cell, 4, 6, **options, **RECURRENCES["dense" if not cell.gates_of_a else recurrence])


def states_like(module: FlexRNN, *batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Above zero, as those of some cells have to be."""
    layers = module.num_layers * (1 + module.bidirectional)
    return [torch.rand(layers, *batch, module.hidden_size, dtype=dtype) + 0.5 for _ in module.cell.states]


@pytest.mark.few(2, "cell", "recurrence", "form", "given_states", "options", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=["one layer", "more"]
)
@pytest.mark.parametrize("given_states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("cell", OWN, ids=str)
@torch.no_grad()
def test_layers_of_any_cell(
    cell: cells.Cell, recurrence: str, form: str, given_states: bool, options: dict, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch, served: list[bool],
) -> None:  # fmt: skip
    module = flex_of(cell, recurrence, batch_first=form != "time first", dtype=dtype, **options)
    x = torch.randn(*FORMS[form], 4, dtype=dtype)
    batch = {"time first": (3,), "batch first": (3,), "one step": (3,), "one row": (1,)}.get(form, ())
    args = (x, states_like(module, *batch, dtype=dtype)) if given_states else (x,)
    outputs = module(*args)
    assert_same_bits(outputs, otherwise(monkeypatch, lambda: module(*args)))
    assert served == [True]
    with rnnfast.use_backend("reference"):
        expected = module(*args)
    bounds = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(outputs, expected, **bounds)


@pytest.mark.parametrize("cell", [cells.lstm, cells.gru, cells.peephole_lstm], ids=str)
@torch.no_grad()
def test_torchs_cells_by_their_kernels(cell: cells.Cell, monkeypatch: pytest.MonkeyPatch, served: list[bool]) -> None:
    module = flex_of(cell, "dense", num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(3, 5, 4)
    for args in ((x,), (x, states_like(module, 3))):
        assert_same_bits(module(*args), otherwise(monkeypatch, lambda: module(*args)))  # noqa: B023
    assert served == [True, True]


@torch.no_grad()
def test_what_a_layer_of_any_cell_may_change(monkeypatch: pytest.MonkeyPatch, served: list[bool]) -> None:
    """Between calls: nothing of the module is remembered."""
    module, x = flex_of(own_cell, "dense", num_layers=2), torch.randn(3, 3, 4)
    calls = [module(x)]
    module.scalars["k"] = 0.3
    calls.append(module(x))
    module.batch_first = True
    calls.append(module(x))
    module.weight_ih_l0 = nn.Parameter(torch.randn(4, 24).t())
    calls.append(module(torch._neg_view(-x)))
    module.weight_p_l1.mul_(-1)
    calls.append(module(x.mT.contiguous().mT))
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l1")
    calls.append(module(x, [*states_like(module, 3)]))
    assert served == [True] * 6
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(calls, calls[1:]))
    assert_same_bits(module(x), otherwise(monkeypatch, lambda: module(x)))


@pytest.mark.parametrize("cell", OWN, ids=str)
@torch.no_grad()
def test_any_arguments_of_any_cell(cell: cells.Cell, monkeypatch: pytest.MonkeyPatch, served: list[bool]) -> None:
    rng = random.Random(cell.name)
    for _ in range(100):
        options = {"num_layers": rng.randint(1, 2), "bidirectional": rng.random() < 0.5, "bias": rng.random() < 0.7}
        module = flex_of(cell, rng.choice([*RECURRENCES]), batch_first=rng.random() < 0.5, **options)
        batch = (rng.randint(1, 3),) if rng.random() < 0.7 else ()
        lead = (*batch, rng.randint(1, 4)) if module.batch_first else (rng.randint(1, 4), *batch)
        x, states = changed(rng, torch.randn(*lead, 4)), [changed(rng, s) for s in states_like(module, *batch)]
        states = rng.choice([None, states, tuple(states), states, states[:-1], states[0]])
        name = rng.choice(module._all_names)
        weight = changed(rng, getattr(module, name).data)
        setattr(module, name, None if weight is None else nn.Parameter(weight, requires_grad=False))
        outcome = outcome_of(module, x, states)
        expected = otherwise(monkeypatch, lambda: outcome_of(module, x, states))  # noqa: B023
        if isinstance(outcome[0], type):
            assert outcome == expected
        else:
            assert_same_bits(outcome, expected)
    assert served.count(True) > 10


@torch.no_grad()
def test_no_rows_of_any_cell(served: list[bool]) -> None:
    module = flex_of(cells.slstm, "heads", num_layers=2, bidirectional=True)
    y, states = module(torch.randn(3, 0, 4))
    assert y.shape == (3, 0, 12) and [s.shape for s in states] == [(4, 0, 6)] * 4
    assert served == [True]


@torch.no_grad()
def test_memory_of_any_cell_that_was_taken_away() -> None:
    for name, dtype in [("weight_hh_l0", torch.float32), ("weight_ih_l0", torch.bfloat16)]:
        module = flex_of(cells.slstm, "dense", dtype=dtype)
        inputs = module._weights(), [torch.randn(3, 2, 4, dtype=dtype)]
        getattr(module, name).untyped_storage().resize_(16)
        program = programs(module._run_cell, (), 1, 4).plain
        assert ops.FLEX_PLAIN(1 << 8 | 3 << 3, program, inputs[1][0], inputs[0], []) == (None, [])


@torch.no_grad()
def test_malformed_plain_calls_of_any_cell() -> None:
    module, x = flex_of(own_cell, "dense"), torch.randn(3, 2, 4)
    program, weights = programs(own_cell, ((1.0).hex(),), 1, 4).plain, module._weights()
    form, states = 1 << 8 | 3 << 3, states_like(module, 2)
    valid = [form, program, x, weights, states]
    y, _ = ops.FLEX_PLAIN(*valid)
    torch.testing.assert_close(y, module(x, states)[0])
    operations, numbers, results, initial, reads = program
    beyond, elsewhere = results.clone(), operations.clone()
    beyond[0], elsewhere[0, 1] = 10**6, 10**6
    changes = {0: [0, -1, form | 4, form | 1, form & ~8, form & ~16, 2 << 8 | 3 << 3, 2**62, -(2**63)]}
    changes[1] = [[], program[:4], [*program, reads], [operations, numbers, beyond, initial, reads]]
    changes[1] += [
        [elsewhere, *program[1:]],
        [operations[:, :3], *program[1:]],
        [operations, numbers, results[:1], initial, reads],
    ]
    changes[1] += [[*program[:3], initial[:1], reads], [*program[:3], initial.float(), reads]]
    counts = [
        (0, 4, 1),
        (4, 3, 1),
        (4, 0, 1),
        (4, 4, 2),
        (2, 4, 1),
        (8, 4, 1),
        (2**62, 4, 1),
        (4, -1, 1),
        (4, 4, 2**62),
    ]
    changes[1] += [[*program[:4], torch.tensor(count)] for count in counts]
    changes[2] = [x[0, 0], x[None], x[:0], x[..., :3], x.double(), x.long(), x.to_sparse()]
    changes[3] = [[], weights[:-1], [*weights, weights[-1]], weights[::-1], [w.double() for w in weights]]
    changes[3] += [[w[:5] for w in weights], [w[:0] for w in weights]]
    changes[4] = [states[:1], [*states, *states], [s[0] for s in states], [s.double() for s in states]]
    for at, others in changes.items():
        for other in others:
            assert ops.FLEX_PLAIN(*valid[:at], other, *valid[at + 1 :]) == (None, []), (at, other)


# What makes it another call


class Sub(Tensor):
    pass


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


CIRCUMSTANCES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a gradient": nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another backend": lambda: rnnfast.use_backend("reference"),
    "a dispatch mode": Passes,
    "a flop counter": lambda: FlopCounterMode(display=False),
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "forward mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_circumstances(name: str, served: list[bool]) -> None:
    layers, cell = (rnnfast.GRU(4, 5), FlexRNN(cells.janet, 4, 5)), rnnfast.GRUCell(4, 5)
    with torch.set_grad_enabled(name == "a gradient"), CIRCUMSTANCES[name]():
        for module in layers:
            module(torch.randn(3, 2, 4))
        cell(torch.randn(2, 4))
    assert served == []
    with torch.no_grad():
        for module in layers:
            module(torch.randn(3, 2, 4))
        cell(torch.randn(2, 4))
    assert served == [True, True, True]


@torch.no_grad()
def test_harmless_circumstances(served: list[bool]) -> None:
    module = rnnfast.GRU(4, 5)
    with torch.inference_mode(), rnnfast.use_backend("cpu"), torch.device("cpu"), torch.profiler.profile():
        module(torch.randn(3, 2, 4))
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")(torch.randn(3, 2, 4))
    torch.func.functional_call(module, {"weight_ih_l0": torch.randn(15, 4)}, torch.randn(3, 2, 4))
    assert served == [True] * 3


@torch.no_grad()
def test_other_tensors(served: list[bool]) -> None:
    x = torch.randn(3, 2, 4)
    for make in (rnnfast.GRU, functools.partial(FlexRNN, cells.janet)):
        module, h = make(4, 5), torch.zeros(1, 2, 5).as_subclass(Sub)
        module(x.as_subclass(Sub))
        module(x, (h,) if isinstance(module, FlexRNN) else h)
        module(x, lengths=torch.tensor([1, 3]))
        module(x, resets=torch.zeros(3, 2).bool())
        module(x, return_states=True)
        module(nn.utils.rnn.pack_sequence([torch.randn(3, 4)]))
        module.to("meta")(x.to("meta"))
        torch.jit.trace(make(4, 5), (x,), check_trace=False)
        torch.func.vmap(make(4, 5))(x[None])
        torch.compile(make(4, 5), backend="eager", fullgraph=True)(x)
        make(4, 5, 2, dropout=0.5)(x)
        make(4, 5, zoneout=0.5)(x)
        assert served == []
        make(4, 5, 2, dropout=0.5).eval()(x)
        assert served.pop()


@pytest.mark.parametrize("name", ["GRU", "LSTM", "LSTMCell"])
@torch.no_grad()
def test_mistakes_are_told_in_torchs_words(name: str, served: list[bool]) -> None:
    theirs, ours = pair(name, 4, 5)
    x = torch.randn(2, 4) if name == "LSTMCell" else torch.randn(3, 2, 4)
    right = states(name, *([2] if name == "LSTMCell" else [1, 2]), 5, dtype=torch.float32)
    calls = [(x[..., :3], None), (x.double(), None), (x, right[0]), (x, (right, right)), (x[None, None], None), (3,)]
    calls += [(x, torch.randn(2, 2, 5)), (x, (torch.randn(2, 2, 5), torch.randn(2, 2, 4)))]
    for call in calls:
        assert error_of(lambda: ours(*call)) == error_of(lambda: theirs(*call))  # noqa: B023
    ours.to("meta")
    with pytest.raises(RuntimeError, match="device"):
        ours(x)
    assert True not in served


@torch.no_grad()
def test_layers_of_several_sizes_are_refused() -> None:
    """The states of all layers are in one tensor."""
    x, of = torch.randn(3, 2, 4), lambda *sizes: [torch.randn(16, 4), *(torch.randn(*size) for size in sizes)]
    two_lstms = 2 << 8 | modules.NUMBERS["LSTM"] << 3
    y, _, _ = ops.PLAIN(two_lstms, x, of((16, 3), (3, 4), (16, 3), (16, 3), (3, 4)))
    assert y.shape == (3, 2, 3)
    assert ops.PLAIN(two_lstms, x, of((16, 3), (3, 4), (16, 3), (16, 2), (2, 4))) == (None, None, None)


class Mallinfo(ctypes.Structure):
    """What the GNU C library says of its heap."""

    _fields_ = [(f"of_no_interest_{i}", ctypes.c_size_t) for i in range(7)]
    _fields_ += [("in_use", ctypes.c_size_t), ("free", ctypes.c_size_t), ("releasable", ctypes.c_size_t)]


@torch.no_grad()
def test_no_memory_is_lost() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not say how much memory is in use")
    libc.mallinfo2.restype = Mallinfo
    cell, module, x = rnnfast.GRUCell(4, 5), rnnfast.LSTM(4, 5, 2), torch.randn(3, 2, 4)
    step = rnnfast.Stream(cell, 2)
    flex = FlexRNN(cells.slstm, 4, 5, 2, bidirectional=True)
    calls = (lambda: cell(x[0]), lambda: module(x), lambda: module(x, lengths=torch.tensor([1, 3])), lambda: step(x[0]))
    calls += (lambda: flex(x), lambda: flex(x, flex(x)[1]), lambda: ops.FLEX_PLAIN(0, [], x, [x], [x]))
    for call in calls:
        for count in (200, 2000):  # the first ones fill caches
            before = libc.mallinfo2().in_use
            for _ in range(count):
                call()
            used = libc.mallinfo2().in_use - before
        assert used < 16 * 2000


@torch.no_grad()
def test_nothing_is_kept() -> None:
    module, flex, x = rnnfast.LSTM(4, 5, 2), FlexRNN(cells.slstm, 4, 5, 2), torch.randn(3, 2, 4)
    for call in (lambda: module(x), lambda: ops.PLAIN(2 << 8, x, [x] * 8), lambda: flex(x)):
        call(), gc.collect()
        before = len([t for t in gc.get_objects() if isinstance(t, Tensor)])
        for _ in range(3):
            call()
        assert len([t for t in gc.get_objects() if isinstance(t, Tensor)]) == before


# Single steps under autograd


def makers(module: nn.Module, *args: Any) -> set[str]:
    """The kinds of nodes that autograd keeps of a call."""
    nodes, found = [t.grad_fn for _, t in flatten(module(*args))], set()
    while nodes:
        node = nodes.pop()
        found.add(type(node).__name__)
        nodes += [before for before, _ in node.next_functions if before is not None]
    return found


SINGLE = {
    "RNN": ("RNN", (1, 3, 4), 5),
    "unbatched": ("RNN", (1, 4), 5),
    "GRU": ("GRU", (1, 3, 4), 128),
    "RNNCell": ("RNNCell", (3, 4), 5),
    "GRUCell": ("GRUCell", (3, 4), 128),
    "LSTMCell": ("LSTMCell", (4,), 5),
}


@pytest.mark.parametrize("case", SINGLE)
def test_single_steps_are_torchs_under_autograd(case: str) -> None:
    name, shape, hidden = SINGLE[case]
    theirs, ours = pair(name, 4, hidden)
    x = torch.randn(shape)
    for key, value in values_and_grads(theirs, x).items():
        assert torch.equal(values_and_grads(ours, x)[key], value)
    assert not any("_Layer" in kind for kind in makers(ours, x))
    with rnnfast.use_backend("cpu"):
        assert any("_Layer" in kind for kind in makers(ours, x))
    assert "under autograd a single step is quicker by torch's" in rnnfast.explain(ours, x)[0].reason


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bias": False},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "dropout": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", [False, True], ids=["", "hx"])
def test_options_of_single_steps_under_autograd(options: dict[str, Any], given: bool) -> None:
    theirs, ours = pair("RNN", 4, 5, **options)
    x = torch.randn(*((3, 1) if options.get("batch_first") else (1, 3)), 4)
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    inputs = (x, torch.randn(layers, 3, 5)) if given else (x,)
    for key, value in values_and_grads(theirs, *inputs).items():
        assert torch.equal(values_and_grads(ours, *inputs)[key], value)
    assert not any("_Layer" in kind for kind in makers(ours, x))


@pytest.mark.parametrize("name", ["RNN", "RNNCell", "LSTMCell"])
def test_mistakes_of_single_steps_under_autograd(name: str) -> None:
    theirs, ours = pair(name, 4, 5)
    x = torch.randn(3, 4) if name.endswith("Cell") else torch.randn(1, 3, 4)
    h = [torch.randn(*(() if name.endswith("Cell") else (1,)), *sizes) for sizes in [(3, 5), (3, 6), (2, 5)]]
    calls = [(x[..., :3],), (x[None, None],), (x, 3), (x, (h[0], h[1])), (x, h), (x, h[0].double())]
    calls += [(x, h[1]), (x, h[2]), (x, h[0].to("meta")), (x[..., :0],), (x, h[0][..., None])]
    for call in calls:
        assert error_of(ours, *call) == error_of(theirs, *call)


@pytest.mark.parametrize(
    ("name", "shape", "hidden", "dtype"),
    [
        ("RNN", (2, 3, 4), 5, torch.float32),
        ("RNN", (1, 3, 4), 5, torch.float64),
        ("LSTM", (1, 3, 4), 5, torch.float32),
        ("GRU", (1, 3, 4), 127, torch.float32),
        ("GRUCell", (3, 4), 127, torch.float32),
    ],
)
def test_other_steps_are_ours(name: str, shape: tuple[int, ...], hidden: int, dtype: torch.dtype) -> None:
    module = getattr(rnnfast, name)(4, hidden, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    assert any("_Layer" in kind for kind in makers(module, x))
    assert "under autograd" not in rnnfast.explain(module, x)[0].reason
