"""The choice on a GPU: the emulated kernels are checked and raced on a CPU, against a clock that the tests move."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import EMULATION
from helpers import HANG, choose, chooser, load
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
import rnnfast.__main__ as command
import rnnfast.cuda
from rnnfast import aten, choice, contest, functional, ops, recurrence, timings
from rnnfast.modules import OURS

pytestmark = pytest.mark.skipif(EMULATION is None, reason="with a GPU there is no emulation")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Contest:
    """What a clock shows for a call of each contender, in milliseconds, and what has run."""

    def __init__(self) -> None:
        self.cost: dict[str, Any] = {"torch": 2.0, "cuda": 1.0}
        self.now = 0.0
        self.ran: list[tuple[str, int]] = []  # in checks and races: the backend, and how many rows it had
        self.served: list[str] = []  # outside of them

    def races(self) -> int:
        """How many calls torch's kernels had in races, of many rows."""
        return sum(name == "torch" and rows > 9 for name, rows in self.ran)


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Contest]:
    """As if the CPU were a GPU for which there are the CUDA kernels, and no table."""
    of = Contest()
    run, layer, stack, cell = contest.Call.run, recurrence.layer, aten.stack, aten.cell

    def timed(call: contest.Call, backend: str, trained: bool) -> list[Tensor]:
        of.ran.append((backend, call.x.size(-2)))
        found = run(call, backend, trained)
        of.now += of.cost[backend] / 1e3 if backend in of.cost else 0
        return found

    def serve(backend: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not chooser.is_forced():
            of.served.append(backend)
        return function(*args, **kwargs)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(chooser.OF_DEVICE, "cpu", ("cuda",))
    monkeypatch.setattr(choice, "_is_deterministic", lambda: False)  # as conftest.py has it, to fill memory
    monkeypatch.setattr(ops, "PLAIN", lambda *args: (None, None, None))
    for module in OURS:
        monkeypatch.setattr(module, "_quicker_by_torch_from", math.inf)
    monkeypatch.setattr(contest, "_clock", lambda: of.now)
    monkeypatch.setattr(contest.Call, "run", timed)
    monkeypatch.setattr(recurrence, "layer", lambda backend, *args, **kw: serve(backend, layer, backend, *args, **kw))
    monkeypatch.setattr(aten, "stack", lambda *args, **kw: serve("torch", stack, *args, **kw))
    monkeypatch.setattr(aten, "cell", lambda *args: serve("torch", cell, *args))
    monkeypatch.setattr(choice, "_faults", {})
    monkeypatch.setattr(choice, "_told", set())
    rnnfast.set_choice("measure")
    yield of
    rnnfast.set_choice(None)


def problem(rows: int = 16, **options: Any) -> tuple[nn.Module, Tensor]:
    return rnnfast.GRU(4, 20, **options), torch.randn(5, rows, 4)


def unmeasured() -> list[choice.Decision]:
    return [found for found in choice._settled.values() if not found.is_final]


def known() -> dict[timings.Key, timings.Times]:
    return timings.known_of(CPU).measured


def served_by(of: Contest, module: nn.Module, x: Any, **more: Any) -> str:
    """The one backend that serves a call, whose results are torch.nn's."""
    of.served.clear()
    y, h = module(x, **more)
    if not more:
        expected = rnnfast.revert(module)(x)
        rnnfast.convert(module)
        torch.testing.assert_close((y, h), expected, rtol=5e-3, atol=5e-3)  # of TF32, as torch allows it there
    (backend,) = set(of.served)
    return backend


@pytest.mark.parametrize(
    ("ours", "expected"), [(1.0, "cuda"), (1.89, "cuda"), (1.91, "torch"), (2.0, "torch"), (9.0, "torch")]
)
@pytest.mark.parametrize("trained", (False, True))
def test_the_faster_serves_and_a_tie_is_torchs(contenders: Contest, ours: float, expected: str, trained: bool) -> None:
    contenders.cost["cuda"] = ours
    module, x = problem()
    with torch.set_grad_enabled(trained):
        assert served_by(contenders, module, x) == expected
        first = len(contenders.ran)
        assert contenders.races() == 7 and served_by(contenders, module, x) == expected
        assert len(contenders.ran) == first  # nothing runs twice
        ((key, times),) = known().items()
        (found,) = rnnfast.explain(module, x)
    assert found.backend == expected and "measured here: " in found.reason
    assert f"cuda {ours:.3g} ms" in found.reason and "torch 2 ms" in found.reason
    assert key == ("GRU", "float32", True, False, 4, 20, 20, 1, 1, "rectangular", False, trained, 8, 16)
    assert times == pytest.approx({"cuda": ours, "torch": 2.0})


def test_gradients_of_what_serves(contenders: Contest) -> None:
    x = torch.randn(5, 16, 4)
    theirs, ours = nn.LSTM(4, 20, 2, bidirectional=True), rnnfast.LSTM(4, 20, 2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    for cost, backend in ((1.0, "cuda"), (4.0, "torch")):
        contenders.cost["cuda"] = cost
        (timings.known_of(CPU).path).unlink(missing_ok=True)
        choice.forget()
        found = []
        for module in (theirs, ours):
            inputs = x.clone().requires_grad_()
            y, (h, c) = module(inputs)
            found.append(torch.autograd.grad((y**2).sum() + h.sum() + (c**3).sum(), [inputs, *module.parameters()]))
        assert contenders.served[-1] == backend
        torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=2e-2)  # of TF32


def test_time_is_bounded(contenders: Contest) -> None:
    contenders.cost = {"torch": 60.0, "cuda": 50.0}
    module, x = problem()
    assert served_by(contenders, module, x) == "cuda"
    assert contenders.races() == 2  # one that compiles, and one that counts


def test_ours_are_raced_with_each_other(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their times: what is not clearly faster than torch's kernels comes after those."""
    monkeypatch.setitem(chooser.OF_DEVICE, "cpu", ("cuda", "triton"))
    triton = chooser.BACKENDS["triton"]._replace(
        probe=lambda device: chooser.Availability(True, "as another"), module="cuda"
    )
    monkeypatch.setitem(chooser.BACKENDS, "triton", triton)
    operators = {
        ("triton", direction): recurrence.OPERATORS["cuda", direction] for direction in ("forward", "backward")
    }
    monkeypatch.setattr(recurrence, "OPERATORS", recurrence.OPERATORS | operators)
    for layers, (cuda, other, expected) in enumerate(
        ((1.5, 1.0, "triton"), (1.0, 1.5, "cuda"), (3.0, 2.5, "torch")), 1
    ):
        contenders.cost = {"torch": 2.0, "cuda": cuda, "triton": other}
        assert served_by(contenders, *problem(num_layers=layers)) == expected
        assert {name for name, rows in contenders.ran if rows > 9} == {"torch", "cuda", "triton"}


def broken(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    forward = rnnfast.cuda.forward

    def wrong(inputs: Any, *args: Any) -> Any:
        rows = inputs.x.size(-2)
        if how == "exception" or (how == "exception of the real size" and rows > 9):
            raise RuntimeError("no kernel image is available")
        found = forward(inputs, *args)
        if how == "wrong":
            found.y[-1, 0, 0] += 0.1
        if how == "NaN":
            found.y[-1, 0, 0] = math.nan
        return found

    monkeypatch.setattr(rnnfast.cuda, "forward", wrong)


FAULTS = [*itertools.product(("exception", "wrong", "NaN"), ("measure", "table", "ours"))]


@pytest.mark.parametrize("how, mode", [*FAULTS, ("exception of the real size", "measure")])
def test_what_fails_does_not_serve(contenders: Contest, monkeypatch: pytest.MonkeyPatch, how: str, mode: str) -> None:
    rnnfast.set_choice(mode)
    broken(monkeypatch, how)
    module, x = problem()
    with pytest.warns(RuntimeWarning, match="backend 'cuda' is not used for this kind of GRU") as told:
        assert served_by(contenders, module, x) == "torch"
    assert len(told) == 1 and ("no kernel image" if "exc" in how else "off by") in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (5, 9):  # also of another key, which has the same kernels
            assert served_by(contenders, module, torch.randn(steps, 16, 4)) == "torch"
    assert "cuda has failed: " in rnnfast.explain(module, x)[0].reason
    with pytest.warns(RuntimeWarning) if how != "exception of the real size" else warnings.catch_warnings():
        backend = served_by(contenders, module, x[:, :9], lengths=torch.tensor([5, 0, 1, 2, 3, 4, 5, 1, 2]))
    assert backend == ("cuda" if how == "exception of the real size" else "reference")


def test_where_torch_cannot_serve_ours_do_after_a_check(contenders: Contest) -> None:
    module, x = problem()
    forms = {"lengths": torch.tensor([5, 0, 3, 2] * 4), "resets": torch.rand(5, 16) < 0.3, "return_states": True}
    for name, value in forms.items():
        contenders.served.clear()
        module(x, **{name: value})
        assert set(contenders.served) == {"cuda"}
        assert "torch's kernels cannot serve the call" in rnnfast.explain(module, x, **{name: value})[0].reason
    assert served_by(contenders, rnnfast.GRU(4, 20, recompute=True), x) == "cuda"
    assert {rows for _, rows in contenders.ran} == {9} and not known()


def test_packed_rows_and_cells(contenders: Contest) -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 4) for n in (7, 7, 4, 1)])
    cell = rnnfast.LSTMCell(4, 20)
    for cost, backend in ((1.0, "cuda"), (3.0, "torch")):
        contenders.cost["cuda"] = cost
        timings.known_of(CPU).path.unlink(missing_ok=True)
        choice.forget()
        contenders.served.clear()
        module = rnnfast.GRU(4, 20)
        module(packed)
        cell(torch.randn(16, 4))
        assert set(contenders.served) == {backend}
        assert [(key.form, key.steps, key.rows) for key in known()] == [("packed", 8, 4), ("cell", 1, 16)]
        for of, given in ((module, packed), (cell, torch.randn(16, 4))):
            assert rnnfast.explain(of, given)[0].backend == backend


def test_dropout_in_training_draws_the_same_masks(contenders: Contest) -> None:
    """And a race draws none that a caller would miss."""
    outputs = []
    for cost, backend in ((1.0, "cuda"), (3.0, "torch")):
        contenders.cost["cuda"] = cost
        timings.known_of(CPU).path.unlink(missing_ok=True)
        choice.forget()
        torch.manual_seed(0)
        module, x = problem(num_layers=2, dropout=0.5)
        y, _ = module(x)
        assert contenders.served[-2:] == [backend] * 2
        outputs.append((y.detach(), torch.rand(3)))
        assert next(iter(known())).apart
    torch.testing.assert_close(*outputs, rtol=5e-3, atol=5e-3)


def test_nothing_runs_beside_a_capture(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = problem()
    with monkeypatch.context() as patch:
        patch.setattr(choice, "_is_captured", lambda x: True)
        assert served_by(contenders, module, x) == "cuda" and not contenders.ran
    contenders.cost["cuda"] = 3.0
    assert served_by(contenders, module, x) == "torch"  # what was taken in a capture is no decision
    monkeypatch.setattr(choice, "_is_captured", lambda x: True)
    first = len(contenders.ran)
    assert served_by(contenders, module, x) == "torch" and len(contenders.ran) == first


@pytest.mark.parametrize("serving", ("cuda", "torch"))
def test_nothing_runs_within_a_backward(contenders: Contest, monkeypatch: pytest.MonkeyPatch, serving: str) -> None:
    contenders.cost["cuda"] = {"cuda": 1.0, "torch": 3.0}[serving]
    monkeypatch.setattr(aten, "_can_derive_twice", lambda x: False)  # as on a GPU
    module, x = problem()
    asked = [x.requires_grad_(), *module.parameters()]
    with rnnfast.use_backend("reference"):
        expected = torch.autograd.grad(module(x)[0].square().sum(), asked)
    for reentrant in (False, True):
        y = checkpoint(lambda x: module(x)[0], x, use_reentrant=reentrant)
        first = len(contenders.ran)
        y.square().sum().backward()
        assert len(contenders.ran) == first > 0 and contenders.served[-1] == serving
        torch.testing.assert_close([t.grad for t in asked], list(expected), rtol=1e-2, atol=1e-2)  # of TF32
        for t in asked:
            t.grad = None
    timings.known_of(CPU).path.unlink()  # what a backward is the first to call takes what the tables say
    choice.forget()
    y = checkpoint(lambda x: module(x)[0], x, use_reentrant=True)
    first = len(contenders.ran)
    y.sum().backward()
    assert len(contenders.ran) == first and contenders.served[-1] == "cuda" and len(unmeasured()) == 1


def test_nothing_runs_while_compiled_or_transformed(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = problem()
    expected = rnnfast.revert(module)(x)[0]
    rnnfast.convert(module, compile=True)
    calls: list[Callable[[], Tensor]] = [
        lambda: torch.compile(lambda x: module(x)[0], backend="eager", fullgraph=True)(x),
        lambda: torch.func.vmap(lambda x: module(x)[0])(x.unsqueeze(0))[0],
    ]
    for call in calls:
        torch._dynamo.reset()
        torch.testing.assert_close(call(), expected, rtol=5e-3, atol=5e-3)
    with FlopCounterMode(display=False) as counter:
        module(x)
    once = counter.get_total_flops()
    assert not contenders.ran and once
    broken(monkeypatch, "wrong")
    with pytest.warns(RuntimeWarning):
        module(x)
    for call, backend in zip(calls, ("torch", "reference")):
        torch._dynamo.reset()
        contenders.served.clear()
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
        assert set(contenders.served) == {backend}
    rnnfast.set_choice("torch")
    torch._dynamo.reset()
    contenders.served.clear()
    monkeypatch.setattr(choice, "_faults", {})
    torch.testing.assert_close(calls[0](), expected, rtol=1e-4, atol=1e-4)
    assert contenders.served == ["torch"]
    torch._dynamo.reset()


def test_modes_and_hooks_of_the_caller_do_not_hold(contenders: Contest) -> None:
    module, x = problem()
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    with torch.inference_mode():
        module(x)
    kept: list[Tensor] = []
    for _ in range(2):  # with a race, and without
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            module(x)
    assert kept and len(kept) % 2 == 0 and contenders.races() == 3 * 7
    assert [(key.dtype, key.trained) for key in known()] == [("bfloat16", True), ("float32", False), ("float32", True)]
    assert not choice._told


def test_the_first_of_two_threads_measures(contenders: Contest) -> None:
    module, x = problem()
    together, found = threading.Barrier(2), []

    def call() -> None:
        together.wait(HANG)
        found.append(module(x)[0])

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert contenders.races() == 7 and contenders.served == ["cuda", "cuda"]
    assert torch.equal(*found)


def test_deterministic_algorithms_are_not_chosen_by_time(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    contenders.cost["cuda"] = 3.0
    module, x = problem()
    with monkeypatch.context() as patch:
        patch.setattr(choice, "_is_deterministic", torch.are_deterministic_algorithms_enabled)
        assert served_by(contenders, module, x) == "cuda" and not known()
        assert "nothing was measured" in rnnfast.explain(module, x)[0].reason
    assert served_by(contenders, module, x) == "torch"
    torch._C._set_cudnn_enabled(False)  # the times of torch's other kernels say nothing of cuDNN's
    try:
        with torch.no_grad():
            assert served_by(contenders, module, x) == "cuda" and len(known()) == 1
        assert served_by(contenders, module, x) == "cuda"  # what is known is of cuDNN, too
    finally:
        torch._C._set_cudnn_enabled(True)


MEMORY = [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_memory_that_is_short_bans_nothing(
    contenders: Contest, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    module, x = problem()
    with monkeypatch.context() as patch:
        patch.setattr(contest.Call, "twin", lambda call: (_ for _ in ()).throw(error))
        assert served_by(contenders, module, x) == "cuda" and not choice._faults
    contenders.cost["cuda"] = 3.0
    assert served_by(contenders, module, x) == "cuda" and not contenders.ran  # it is not tried at every call
    choice.forget()
    assert served_by(contenders, module, x) == "torch"


@pytest.mark.parametrize("fails_at", (9, 16), ids=("check", "race"))
def test_what_torch_fails_ours_serve(contenders: Contest, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    run = contest.Call.run

    def fail(call: contest.Call, backend: str, trained: bool) -> list[Tensor]:
        if backend == "torch" and call.x.size(-2) >= fails_at:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        return run(call, backend, trained)

    monkeypatch.setattr(contest.Call, "run", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(contenders, *problem()) == "cuda"
    assert list(choice._faults.values()) == [None]


def test_a_module_that_does_not_import_is_banned(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(backend: Any) -> None:
        raise ImportError("libtriton.so")

    monkeypatch.setattr(chooser.Backend, "load", load)
    module, x = problem()
    with pytest.warns(
        RuntimeWarning, match="'cuda' is not used for this kind of GRU in .*: ImportError: libtriton"
    ) as told:
        assert served_by(contenders, module, x) == "torch" == served_by(contenders, module, x[:2])
    assert len(told) == 1 and "cuda has failed" in rnnfast.explain(module, x)[0].reason


WEIGHTS = [torch.randn(60, 4), torch.randn(60, 20), torch.randn(60), torch.randn(60)]
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "bias": (
        lambda: functional.rnn("GRU", torch.randn(5, 16, 4), None, [*WEIGHTS[:3], torch.randn(59)]),
        r"bias_hh has shape \[59\]",
    ),
    "bias of a cell": (
        lambda: functional.cell("GRU", torch.randn(16, 4), None, [*WEIGHTS[:3], torch.randn(59)]),
        r"bias_hh has shape \[59\]",
    ),
    "batch_sizes": (
        lambda: functional.rnn("GRU", torch.randn(40, 4), None, WEIGHTS, batch_sizes=torch.tensor([12, 16, 12])),
        "batch_sizes has to be positive and must not increase",
    ),
    "no batch_sizes": (
        lambda: functional.rnn("GRU", torch.randn(0, 4), None, WEIGHTS, batch_sizes=torch.zeros(0).long()),
        "batch_sizes has to be a vector",
    ),
    "one dimension": (lambda: functional.rnn("GRU", torch.randn(4), None, WEIGHTS), "dimension"),
    "two dimensions": (lambda: functional.rnn("GRU", torch.randn(5, 4), None, WEIGHTS), "x has 2 dimensions"),
    "four dimensions": (lambda: functional.rnn("GRU", torch.randn(5, 1, 9, 4), None, WEIGHTS), "x has 4 dimensions"),
}


@pytest.mark.parametrize("of", WRONG)
def test_a_wrong_call_is_refused_and_bans_nothing(contenders: Contest, of: str) -> None:
    call, text = WRONG[of]
    with pytest.raises((RuntimeError, IndexError), match=text):
        call()
    assert not choice._faults and not contenders.ran


def test_calls_without_elements_are_checked_alone(contenders: Contest) -> None:
    """In either order, with calls of the same units that have some."""
    empty = (0, 20), (4, 20), (0, 20), (4, 0), (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sizes in (empty, empty[1:]):
            choice._faults.clear()
            choice.forget()
            for inputs, hidden in sizes:
                for cell in (rnnfast.GRUCell, rnnfast.LSTMCell):
                    found = cell(inputs, hidden)(torch.randn(16, inputs))
                    assert (found if cell is rnnfast.GRUCell else found[0]).shape == (16, hidden)
        weights = [torch.randn(60, 0), *WEIGHTS[1:]]
        assert functional.rnn("GRU", torch.randn(5, 16, 0), None, weights)[0].shape == (5, 16, 20)
        timings.known_of(CPU).shipped = timings.read(H200, {"gpu": "NVIDIA H200"})
        rnnfast.set_choice("table")
        assert functional.rnn("GRU", torch.randn(5, 16, 0), None, weights)[0].shape == (5, 16, 20)
    assert not any(choice._faults.values()) and {key.inputs for key in known()} == {4}


@pytest.mark.parametrize("given", ("state", "no bias"))
def test_states_and_biases_are_checked(contenders: Contest, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    forward = rnnfast.cuda.forward

    def wrong(inputs: Any, *args: Any) -> Any:
        found = forward(inputs, *args)
        if inputs.h0 is not None if given == "state" else len(inputs.weights) == 2:
            found.y[-1, 0, 0] += 0.1
        return found

    monkeypatch.setattr(rnnfast.cuda, "forward", wrong)
    if given == "no bias":
        assert served_by(contenders, *problem()) == "cuda"
    with pytest.warns(RuntimeWarning, match="'cuda' is not used"):
        assert served_by(contenders, *problem(bias=given == "state")) == "torch"


def test_products_in_tf32_are_checked_anew(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either switch brings the floor of TF32."""
    floors = []
    monkeypatch.setattr(contest, "fault", lambda call, backend, rows, in_torch, tf32: floors.append(tf32))
    rnnfast.set_choice("ours")
    module, x = problem()
    for switches in itertools.product((False, True), repeat=2):
        tf32 = dict(zip(("rnn", "matmul"), switches))
        monkeypatch.setattr(choice, "_precision", lambda device, of, tf32=tf32: "tf32" if tf32[of] else "ieee")
        module(x)
    assert floors == [False, True, True, True] and len(choice._faults) == 4


def test_what_is_banned_serves_nowhere(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = problem()
    with monkeypatch.context() as patch:
        patch.setattr(choice, "_is_captured", lambda x: True)
        assert served_by(contenders, module, x) == "cuda"
    broken(monkeypatch, "wrong")
    with pytest.warns(RuntimeWarning, match="'cuda' is not used"):
        module(torch.randn(20, 16, 4))
    monkeypatch.setattr(choice, "_is_captured", lambda x: True)
    assert served_by(contenders, module, x) == "torch"


def test_where_no_thread_starts_nothing_is_measured(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    module, x = problem()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert served_by(contenders, module, x) == "cuda" and not contenders.ran
    contenders.cost["cuda"] = 3.0
    assert served_by(contenders, module, x) == "torch"


def test_what_is_known_holds_under_modes(contenders: Contest) -> None:
    contenders.cost["cuda"] = 3.0
    module, x = problem()
    module(x)
    first = len(contenders.ran)
    for _ in range(2):  # what is settled, and the tables
        contenders.served.clear()
        with FlopCounterMode(display=False):
            module(x)
        assert contenders.served == ["torch"] and len(contenders.ran) == first
        choice.forget()


def test_contests_leave_the_generator_to_other_threads(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    run, drawn = contest.Call.run, []

    def draw(call: contest.Call, backend: str, trained: bool) -> list[Tensor]:
        drawn.append(torch.rand(1).item())  # as another thread would
        return run(call, backend, trained)

    monkeypatch.setattr(contest.Call, "run", draw)
    module, x = problem()
    for rows in (16, 64):
        module(x.repeat(1, rows // 16, 1))
    assert len(set(drawn)) == len(drawn) > 20


def test_no_rows_are_not_raced(contenders: Contest) -> None:
    module, _ = problem()
    y, _ = module(torch.randn(5, 0, 4))
    assert y.shape == (5, 0, 20) and not known() and contenders.served == ["cuda"]


# Files


def test_a_file_is_read_by_the_next_process(contenders: Contest) -> None:
    contenders.cost["cuda"] = 3.0
    module, x = problem()
    module(x)
    path = timings.known_of(CPU).path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # and no temporary one
    choice.forget()
    contenders.cost["cuda"] = 0.1
    contenders.ran.clear()
    assert served_by(contenders, module, x) == "torch" and not contenders.ran
    assert "measured here: torch 2 ms, cuda 3 ms" in rnnfast.explain(module, x)[0].reason


def test_files_are_merged(contenders: Contest) -> None:
    module, x = problem()
    module(x)
    (mine,) = known()
    other = mine._replace(layers=7)
    of = timings.known_of(CPU)
    timings.write(of.path, of.fingerprint, {other: {"torch": 1.0, "cuda": 2.0}})
    with torch.no_grad():
        module(x)
    assert set(timings.read(of.path, of.fingerprint)) == {mine, other, mine._replace(trained=False)}


CORRUPT = {
    "empty": "",
    "no JSON": "{",
    "no object": "[1]",
    "no times": "{}",
    "of nothing": '{"of": OF}',
    "times are a number": '{"of": OF, "times": 3}',
    "a key is short": '{"of": OF, "times": [["GRU", {"cuda": 1.0}]]}',
    "a key of other types": '{"of": OF, "times": [KEY]}'.replace("KEY", '["GRU", 3, true, KEY]'),
    "a time below zero": '{"of": OF, "times": [[KEY, {"cuda": -1.0, "torch": 1.0}]]}',
    "a time is a word": '{"of": OF, "times": [[KEY, {"cuda": "soon", "torch": 1.0}]]}',
    "times are NaN": '{"of": OF, "times": [[KEY, {"cuda": NaN, "torch": 1.0}]]}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_ignored(contenders: Contest, content: str) -> None:
    module, x = problem()
    of = timings.known_of(CPU)
    of.path.parent.mkdir(parents=True)
    key = '"GRU", "float32", true, false, 4, 20, 20, 1, 1, "rectangular", false, true, 8, 16'
    of.path.write_text(content.replace("OF", json.dumps(of.fingerprint)).replace("KEY", key))
    choice.forget()
    assert served_by(contenders, module, x) == "cuda" and contenders.races()
    assert len(timings.read(of.path, of.fingerprint)) == 1
    of.path.write_bytes(b"\xff\xfe")
    assert timings.read(of.path, of.fingerprint) == {}


def test_a_folder_that_cannot_be_written(contenders: Contest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    choice.forget()
    module, x = problem()
    assert served_by(contenders, module, x) == "cuda" and len(known()) == 1
    assert served_by(contenders, module, x) == "cuda" and contenders.races() == 7


@pytest.mark.parametrize("what", ("pipe", "folder", "link to nothing", "huge"))
def test_what_is_no_file_of_times_is_not_read(contenders: Contest, tmp_path: Path, what: str) -> None:
    path = timings.known_of(CPU).path
    path.parent.mkdir(parents=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        with path.open("w") as file:
            file.truncate(1 << 40)  # which takes no room
    else:
        path.symlink_to(tmp_path / "nothing")
    choice.forget()
    assert served_by(contenders, *problem()) == "cuda" and contenders.races() == 7
    assert [entry.name for entry in path.parent.iterdir()] == [path.name] and path.is_file() == (what != "folder")


def test_writers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    path, of, times = tmp_path / "times.json", {"gpu": "any"}, {"torch": 1.0}
    key = timings.Key("GRU", "float32", True, False, 4, 20, 20, 1, 1, "rectangular", False, True, 8, 16)
    errors: list[Exception] = []

    def write(count: int) -> None:
        try:
            for _ in range(40):
                timings.write(path, of, {key._replace(layers=layers): times for layers in range(count)})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(count,)) for count in (500, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert not errors and len(timings.read(path, of)) in (500, 5) and list(tmp_path.iterdir()) == [path]


def test_a_contender_without_a_time_is_raced(contenders: Contest) -> None:
    module, x = problem()
    module(x)
    of = timings.known_of(CPU)
    ((key, _),) = known().items()
    timings.write(of.path, of.fingerprint, {key: {"torch": 2.0, "triton": 1.0}})
    choice.forget()
    assert served_by(contenders, module, x) == "cuda" and contenders.races() == 14 and "cuda" in known()[key]


def test_another_driver_knows_nothing(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = problem()
    module(x)
    before, fingerprint = timings.known_of(CPU).path, timings._fingerprint
    monkeypatch.setattr(timings, "_fingerprint", lambda gpu: fingerprint(gpu) | {"driver": "another"})
    choice.forget()
    assert not known()
    contenders.cost["cuda"] = 3.0
    assert served_by(contenders, module, x) == "torch"
    assert before.exists() and timings.known_of(CPU).path.exists() and timings.known_of(CPU).path != before


def test_a_driver_may_name_itself_in_any_bytes(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Path(timings.known_of(CPU).path.parent.parent, "version")
    driver.parent.mkdir(parents=True, exist_ok=True)
    driver.write_bytes(b"NVRM \xff 580\nGCC")
    monkeypatch.setattr(timings, "Path", lambda *parts: driver if "nvidia/version" in str(parts[0]) else Path(*parts))
    assert timings._fingerprint("any")["driver"] == "NVRM \ufffd 580"


def test_tables_are_bounded(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_MOST", 3)
    monkeypatch.setattr(timings, "MOST", 3)
    for layers in range(1, 6):
        module, x = problem(num_layers=layers)
        module(x)
    of = timings.known_of(CPU)
    for table in (of.measured, timings.read(of.path, of.fingerprint)):
        assert [key.layers for key in table] == [3, 4, 5]
    assert len(choice._settled) == 3 and len(choice._faults) <= 3


# Several ranks

RANKS = """
import os, sys, torch
sys.path[:0] = PATHS
from backends import EMULATION
from helpers import chooser
import rnnfast
from rnnfast import choice, contest, timings
from torch import distributed
rank = int(sys.argv[1])
os.environ["XDG_CACHE_HOME"] = f"{sys.argv[2]}/{rank}"
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
chooser.OF_DEVICE["cpu"] = ("cuda",)
race = contest.race
contest.race = lambda call, names, trained: (print("raced"), ({"torch": 1.0, "cuda": 2.0}, {}))[1]
rnnfast.set_choice("measure")
module, x = rnnfast.GRU(4, 20), torch.randn(5, 16, 4)
for _ in range(2):
    module(x)
    print(rnnfast.explain(module, x)[0].backend)
    rnnfast.share_choice()
distributed.barrier()
distributed.destroy_process_group()
"""


def test_ranks_take_what_the_first_has_measured(tmp_path: Path) -> None:
    root = Path(__file__).parent
    script = RANKS.replace("PATHS", repr([str(root), str(root.parent)]))
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=HANG) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert [out.split() for out, _ in said] == [["raced", "torch", "torch"], ["cuda", "torch"]]


# Tables


def test_the_mode_and_its_defaults(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown choice 'fastest', expected one of table, measure, torch, ours"):
        rnnfast.set_choice("fastest")
    module, x = problem()
    for mode, expected in (("torch", "torch"), ("ours", "cuda"), ("table", "cuda")):
        rnnfast.set_choice(mode)
        assert served_by(contenders, module, x) == expected
    rnnfast.set_choice(None)
    assert choice.mode_on(CPU) == "measure"
    monkeypatch.setenv("RNNFAST_CHOICE", "torch")
    rnnfast.set_choice(None)
    assert choice.mode_on(CPU) == "torch"
    monkeypatch.delenv("RNNFAST_CHOICE")
    rnnfast.set_choice(None)
    monkeypatch.setattr(timings, "shipped_path", lambda gpu: H200)
    monkeypatch.setattr(timings, "_fingerprint", lambda gpu: {"gpu": gpu})
    monkeypatch.setattr(timings, "read", lambda path, of, read=timings.read: read(path, {"gpu": "NVIDIA H200"}))
    choice.forget()
    assert choice.mode_on(CPU) == "table"


def test_a_wrong_mode_in_the_environment_is_named() -> None:
    environment = {**os.environ, "RNNFAST_CHOICE": "best"}
    done = subprocess.run([sys.executable, "-c", "import rnnfast"], env=environment, capture_output=True, text=True)
    assert done.returncode and "unknown choice 'best', expected one of table, measure" in done.stderr


H200 = Path(rnnfast.__file__).with_name("tables") / "nvidia-h200.json"
MEASURED = Path(__file__).parents[1] / "bench/results/nvidia-h200/table.csv"


def test_the_shipped_table_is_of_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship = load("bench/ship.py")
    monkeypatch.setattr(timings, "shipped_path", lambda gpu: tmp_path / "made.json")
    monkeypatch.setattr(sys, "argv", ["ship.py", str(MEASURED)])
    ship.main()
    assert (tmp_path / "made.json").read_text() == H200.read_text()
    assert len(timings.read(H200, {"gpu": "NVIDIA H200"})) == 128


def test_a_table_is_read_by_the_nearest_entry(contenders: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    rnnfast.set_choice("table")
    of = timings.known_of(CPU)
    of.shipped = timings.read(H200, {"gpu": "NVIDIA H200"})
    key = timings.Key("LSTM", "bfloat16", False, False, 512, 512, 512, 1, 1, "rectangular", False, False, 256, 256)

    def best(**changes: Any) -> list[str]:
        ((times, source),) = of.times(key._replace(**changes), nearest=True)
        assert source.startswith("by the table of CPU, ")
        return timings.ranked(times)

    assert best() == [] and best(rows=64) == ["cuda"]
    assert best(rows=128, inputs=7, steps=512, dtype="float16") in ([], ["cuda"])
    assert best(hidden=600, outputs=600) == [] and best(rows=2, form="packed") == ["cuda"]
    assert best(cell="RNN_RELU", rows=64, hidden=256) == ["cuda"]
    of_gru = {"cell": "GRU", "dtype": "float32", "hidden": 100, "rows": 16}
    assert best(**of_gru) == [] == best(**of_gru, tf32=True) and best(**of_gru | {"cell": "LSTM"}) == ["cuda"]
    assert not list(of.times(key._replace(dtype="float64"), nearest=True))
    assert not list(of.times(key._replace(form="cell", steps=1), nearest=True))
    assert not list(of.times(key, nearest=False))
    assert not list(of.times(key._replace(steps=1), nearest=True))  # all too far


@pytest.mark.parametrize("what", ("ms", "gpu_ms"))
def test_decisions_over_the_bench_are_near_the_best(
    contenders: Contest, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """With the times of an H200 as the contenders': by calls, or by kernels alone."""
    with MEASURED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[f"ours_{what}"]]
    assert len(rows) == 104
    monkeypatch.setattr(contest, "fault", lambda *args: None)
    monkeypatch.setattr(contest.Call, "twin", lambda call: call)
    monkeypatch.setattr(contest.Call, "check", lambda call: None)  # there are weights of one layer alone

    def run(call: contest.Call, backend: str, trained: bool) -> None:
        contenders.now += contenders.cost[backend] / 1e3

    monkeypatch.setattr(contest.Call, "run", run)
    taken = {"torch": 0, "cuda": 0}
    for row in rows:
        times = contenders.cost = {"cuda": float(row[f"ours_{what}"]), "torch": float(row[f"torch_{what}"])}
        T, N, width, H, layers, directions = (int(row[name]) for name in ("T", "N", "I", "H", "layers", "directions"))
        mode, dtype, trained = (
            row["cell"].replace("RNN", "RNN_TANH"),
            getattr(torch, row["dtype"]),
            row["mode"] == "train",
        )
        x = torch.empty(1, dtype=dtype).expand(T, N, width)  # of which nothing is read
        gates = choice.GATES[mode] * H
        weights = [nn.Parameter(torch.empty(1, dtype=dtype).expand(gates, width), requires_grad=trained)] * 2
        weights[1] = nn.Parameter(torch.empty(1, dtype=dtype).expand(gates, H), requires_grad=trained)
        options = {"num_layers": layers, "bidirectional": directions == 2, "dropout": 0.0, "training": trained}
        options |= dict.fromkeys(("batch_sizes", "lengths", "resets", "return_states", "recompute"))
        found = choice.choose(chooser.USUAL, "cuda", mode, x, None, None, weights, **options)
        taken[found] += 1
        assert times[found] * 0.95 <= min(times.values()), row
    assert taken["cuda"] > 80 and taken["torch"] > 5


# What has no choice


def test_on_a_cpu_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda *args, **kwargs: pytest.fail("looked at the choice"))
    x = torch.randn(5, 3, 4)
    module = rnnfast.LSTM(4, 20, 2, dropout=0.5)
    module(x)[0].sum().backward()
    with torch.no_grad():
        module(x)
        module(x, lengths=torch.tensor([1, 2, 3]))
    rnnfast.GRUCell(4, 20)(x[0])
    rnnfast.explain(module, x)


def test_single_steps_of_triton_are_left_to_torch(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """On NVIDIA's GPUs, where those can serve the call."""
    gpus((9, 0))
    chip = SimpleNamespace(plan_on=None)
    monkeypatch.setattr(chooser.Backend, "load", lambda backend: chip)
    chip.reason = lambda *args: "stepwise: of a test"
    where = choice.where_of("LSTM", 0, torch.float32, 512, 512, 512, 9, 8, False, 4, 1, False, "rectangular")
    try:
        for mode, backend in (("table", "torch"), ("measure", "torch"), ("ours", "triton")):
            rnnfast.set_choice(mode)
            assert choice.explained(where, 8).backend == backend
    finally:
        rnnfast.set_choice(None)
    layer = "LSTM", CUDA, torch.float32, 512, 8
    assert choose(*layer) == ("torch", "its launches of single steps take less than Triton's, stepwise: of a test")
    assert choose(*layer, extended=True) == ("triton", "stepwise: of a test")
    assert choose("PEEPHOLE_LSTM", *layer[1:]) == ("triton", "stepwise: of a test")
    with rnnfast.use_backend("triton"):
        assert choose(*layer) == ("triton", "stepwise: of a test")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose(*layer) == ("triton", "stepwise: of a test")
    monkeypatch.setattr(torch.version, "hip", None)
    chip.reason = lambda *args: "fused: of a test"
    assert choose(*layer) == ("triton", "fused: of a test")


# python -m rnnfast tune


def test_tune_fills_the_table_and_prints_it(
    contenders: Contest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    options = "--cells GRU RNN --dtypes float32 --shapes 5x16x20 5x16x4x20 --directions 1 2 --layers 2"
    assert command.main(["tune", "--device", "cpu", *options.split()]) == 0
    assert len(known()) == 2 * 2 * 2 * 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["call", "torch", "ms", "cuda", "ms", "speedup", "serves"]
    row = "GRU float32 TF32 infer 8x16x4x20 layers=2 bidirectional"
    assert next(line for line in lines if line.startswith(row)).split()[-4:] == ["2", "1", "2.00", "cuda"]
    assert lines[-1].startswith("CPU (cpu): 16 times measured here, in ")
    bars = err.split("\r")[1:]
    assert max(len(bar.rstrip("\n")) for bar in bars) < 80
    assert len(bars) == 17 and bars[8].startswith(f"[{'#' * 15}{'.' * 15}] 8/16 RNN float32") and err.endswith("\n")
    first = len(contenders.ran)
    assert command.main(["tune", "--device", "cpu", *options.split()]) == 0
    assert len(contenders.ran) == first and capsys.readouterr().out == out  # all was known


@pytest.mark.parametrize("of, name", [(functional, "rnn"), (rnnfast, "GRU")])
def test_tune_goes_on_where_memory_is_short(
    contenders: Contest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, of: Any, name: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(of, name, full)
    options = "--device cpu --cells GRU --dtypes float32 --modes infer --shapes 5x16x20"
    assert command.main(["tune", *options.split()]) == 0
    assert "GRU float32 TF32 infer 8x16x20x20" in (out := capsys.readouterr().out) and "out of memory" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--shapes 3x4", "invalid _shape value: '3x4'"),
        ("--shapes 3x4x0", "invalid _shape value: '3x4x0'"),
        ("--layers 0", "invalid _count value: '0'"),
        ("--device moon", "argument --device: Expected one of cpu"),
    ],
)
def test_tune_refuses(options: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.main(["tune", *options.split()])
    assert said in capsys.readouterr().err


def test_tune_needs_a_gpu(gpus: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    gpus()
    assert command.main(["tune"]) == 1
    assert capsys.readouterr().err == "nothing to choose on cuda: torch finds no GPU that it can use\n"


def test_tune_names_the_gpus_that_there_are(gpus: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    gpus((9, 0))
    assert command.main(["tune", "--device", "cuda:7"]) == 1
    assert capsys.readouterr().err == "there is no cuda:7: torch finds 1 GPU(s)\n"


def test_what_is_known_of_a_gpu(contenders: Contest) -> None:
    assert choice.known_on(CPU) == (
        "CPU (cpu): no times, `python -m rnnfast tune` measures them; the choice is 'measure'"
    )
    timings.known_of(CPU).shipped = timings.read(H200, {"gpu": "NVIDIA H200"})
    module, x = problem()
    module(x)
    path = timings.known_of(CPU).path
    known_now = f"128 times shipped and 1 times measured here, in {path}"
    assert choice.known_on(CPU) == f"CPU (cpu): {known_now}; the choice is 'measure'"
