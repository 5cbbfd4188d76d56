"""The backends that this machine can run, as one fixture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import interpreter  # before Triton's kernels
import pytest
import torch

import rnnfast
from rnnfast import recurrence
from rnnfast.recurrence import INSTRUCTION_SETS, Backend

REGIMES = ("by the table", "multiprocessor", "cluster", "chip", "stepwise")  # as rnnfast::cuda_regime numbers them
PERSISTENT = REGIMES[1:4]  # in one launch
MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "lstm": "LSTM", "projection": "LSTM", "gru": "GRU"}
MODES |= {"RNN": "RNN_TANH", "LSTM": "LSTM", "GRU": "GRU"}


def _emulation() -> Path | None:
    """The CUDA kernels for a CPU, where there is no GPU for them. Without them tests are worth little: no skips."""
    if torch.cuda.is_available():
        return None
    from emulation.build import library

    path = library()
    torch.ops.load_library(path)
    return path


def _instruction_sets() -> list[str]:
    if not rnnfast.backends()["cpu"].available:
        return []
    best = torch.ops.rnnfast.cpu_isa(None)  # a processor that has one has those before it
    return list(INSTRUCTION_SETS[best::-1])


EMULATION = _emulation()
BACKENDS = ["reference", *(f"cpu-{name}" for name in _instruction_sets())]
if interpreter.ENABLED:
    BACKENDS.append("triton")
if EMULATION:
    BACKENDS += [f"cuda-{regime}" for regime in REGIMES[1:]]


@contextmanager
def regime(name: str, precision: str = "ieee") -> Iterator[None]:
    """The CUDA kernels of one regime, and the precision of their float32 products."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.ops.rnnfast.cuda_regime(REGIMES.index(name))
    torch.backends.cudnn.rnn.fp32_precision = precision
    try:
        yield
    finally:
        torch.ops.rnnfast.cuda_regime(0)
        torch.backends.cudnn.rnn.fp32_precision = before


def serves(name: str, cell: str, dtype: torch.dtype, batch: int, hidden: int, bidirectional: bool) -> bool:
    """Whether a regime has kernels, forward and backward, for such a layer."""
    layer = MODES[cell], dtype, batch, hidden, bidirectional, cell == "projection", False
    with regime(name):
        try:
            return all(torch.ops.rnnfast.cuda_plan(*layer, backward, 0) for backward in (False, True))
        except RuntimeError:
            return False


def pytest_report_header() -> str:
    return f"rnnfast backends: {', '.join(BACKENDS)}"


def _is_too_large(item: pytest.Item, parameters: dict) -> bool:
    """For Triton's interpreter."""
    large = {"wide": True, "H63": parameters.get("dtype") == torch.float64}
    large["H130-no-bias"] = large["H63"]
    many_runs = item.originalname == "test_function_transforms" and parameters["cell"] != "lstm"
    return many_runs or large.get(parameters.get("case"), False)


# Tests of layers in float32, and N, H and whether both directions. All others with a backend are in float64.
IN_FLOAT32 = {
    "test_runs_and_thread_counts_give_equal_bits": (7, 40, True),
    "test_recompute_keeps_outputs_only": (13, 63, True),
    "test_not_finite_in_a_wide_layer": (20, 200, False),
}


def _has_no_kernel(item: pytest.Item, parameters: dict) -> bool:
    """In a persistent regime: that of float64 and projections is stepwise, and W_hh has to fit."""
    dtype, sizes = parameters.get("dtype", torch.float32), IN_FLOAT32.get(item.originalname)
    if item.originalname == "test_error_is_at_most_twice_torchs":
        case = item.module.CASES[parameters["case"]]
        sizes = case.batch, case.hidden, case.bidirectional
    name = parameters["backend"].partition("-")[2]
    return sizes is None or not serves(name, parameters.get("cell") or parameters["name"], dtype, *sizes)


def _is_left_out(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend, _, name = parameters.get("backend", "").partition("-")
    if backend == "triton":
        return _is_too_large(item, parameters)
    return backend == "cuda" and name in PERSISTENT and _has_no_kernel(item, parameters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=list(filter(_is_left_out, items)))
    items[:] = itertools.filterfalse(_is_left_out, items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of this machine in turn: CPU kernels for each instruction set, CUDA kernels in each regime."""
    name, _, kind = request.param.partition("-")
    with rnnfast.use_backend(name):
        if name == "cuda":
            with regime(kind):
                yield request.param
        elif name == "cpu":
            best = torch.ops.rnnfast.cpu_isa(None)
            torch.ops.rnnfast.cpu_isa(INSTRUCTION_SETS.index(kind))
            yield request.param
            torch.ops.rnnfast.cpu_isa(best)
        else:
            yield request.param


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there are GPUs of such capabilities, and neither interpreter nor emulation."""

    def pretend(*capabilities: tuple[int, int], library: bool = False) -> None:
        found = [SimpleNamespace(name=f"GPU {i}", major=a, minor=b) for i, (a, b) in enumerate(capabilities)]
        load = lambda name, compiler, detail: Backend(library, detail if library else "no library")
        monkeypatch.setattr(recurrence, "_INTERPRETED", False)
        monkeypatch.setattr(recurrence, "_is_emulated", lambda: False)
        monkeypatch.setattr(recurrence, "_load", load)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: found[d if isinstance(d, int) else d.index])

    return pretend


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
