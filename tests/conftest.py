"""Fixtures, and which tests run: what the markers in pyproject.toml mean."""

from __future__ import annotations

import getpass
import inspect
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import BACKENDS, PERSISTENT, Size, serves, use
from covering import covering
from helpers import chooser
from poison import fill_memory

from rnnfast.backends import Availability

# Inductor keeps precompiled headers, by all but the vectors that they are for: a cache for each kind.
_CAPABILITY = torch.backends.cpu.get_cpu_capability().replace(" ", "-")
_CACHE = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{_CAPABILITY}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE))

# Tests by the reason why they are left out; of several workers each counts all.
_LEFT_OUT = pytest.StashKey[Counter]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT_OUT] = Counter()


def pytest_report_header() -> str:
    return f"rnnfast backends: {', '.join(BACKENDS)}; torch: {torch.backends.cpu.get_cpu_capability()}"


def _parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _size(item: pytest.Item) -> Size:
    """The largest layer that a test runs on its backend, from its marker."""
    marker = item.get_closest_marker("runs")
    if marker is None:
        raise pytest.UsageError(f"{item.nodeid} has a backend, so it needs a marker `runs`: see pyproject.toml")
    if not callable(marker.args[0]):
        return Size(*marker.args, **marker.kwargs)
    of, parameters = marker.args[0], _parameters(item)
    return Size(*of(*(parameters[name] for name in inspect.signature(of).parameters)))


def _why_left_out(item: pytest.Item) -> str | None:
    """What a backend has no kernels for, and what would take minutes in Triton's interpreter."""
    parameters = _parameters(item)
    backend = parameters.get("backend")
    if "backend" not in item.fixturenames or not isinstance(backend, str):  # there may be none
        return None
    size = _size(item)
    if backend == "triton" and size.hidden > (60 if size.dtype == torch.float64 else 200):
        return "too large for Triton's interpreter"
    regime = backend.partition("-")[2]
    cell = parameters.get("cell") or parameters.get("name", "lstm")
    if regime in PERSISTENT and not serves(regime, cell, size):
        return f"the CUDA regime {regime} has no kernels for the layer of their marker"
    return None


def _thin(items: list[pytest.Item]) -> None:
    """Marks as `full` what `full_on` and `few` leave out."""
    tests = defaultdict(list)
    for item in items:
        slow = item.get_closest_marker("full_on")
        if slow and _parameters(item)["backend"] in slow.args:
            item.add_marker("full")
        elif item.get_closest_marker("few"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for of_test in tests.values():
        strength, *names = of_test[0].get_closest_marker("few").args
        if not strength <= len(names) or not set(names) <= set(_parameters(of_test[0])):
            raise pytest.UsageError(f"{of_test[0].nodeid}: its marker `few` does not fit its parameters")
        chosen = covering([[str(_parameters(item)[name]) for name in names] for item in of_test], strength)
        for index, item in enumerate(of_test):
            if index not in chosen:
                item.add_marker("full")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out = [], []
    for item in items:
        why = _why_left_out(item)
        (left_out if why else kept).append(item)
        if why:
            config.stash[_LEFT_OUT][why] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    _thin(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist, which tells the one that reports
        session.config.workeroutput["left_out"] = dict(session.config.stash[_LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: SimpleNamespace) -> None:
    if "left_out" in getattr(node, "workeroutput", {}):  # a worker that died says nothing
        node.config.stash[_LEFT_OUT] = Counter(node.workeroutput["left_out"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for why, count in config.stash[_LEFT_OUT].items():
        terminalreporter.write_line(f"left out of all that were collected: {count} tests: {why}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of this machine in turn: CPU kernels for each instruction set, CUDA kernels in each regime."""
    with use(request.param):
        yield request.param


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there are GPUs of such capabilities, and neither interpreter nor emulation."""

    def pretend(*capabilities: tuple[int, int], library: bool = False) -> None:
        found = [SimpleNamespace(name=f"GPU {i}", major=a, minor=b) for i, (a, b) in enumerate(capabilities)]
        load = lambda name, compiler, detail: Availability(library, detail if library else "no library")
        monkeypatch.setattr(chooser, "_INTERPRETED", False)
        monkeypatch.setattr(chooser, "_is_emulated", lambda: False)
        monkeypatch.setattr(chooser, "_load", load)
        monkeypatch.setattr(chooser, "_RUN_CUDA", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: found[d if isinstance(d, int) else d.index])

    return pretend


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_outputs() -> Iterator[None]:
    """So that a test sees what a kernel has not written."""
    fill_memory()
    yield
    torch.use_deterministic_algorithms(False)
