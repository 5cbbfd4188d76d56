"""The backends that this machine can run, as one fixture."""

from __future__ import annotations


import importlib.util
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. It has to be told before it is imported.
INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime.interpreter import InterpretedFunction

    _call = InterpretedFunction.__call__

    def _call_prepared(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        """A function of ours within a kernel of ours, whose module is prepared: the interpreter would prepare it again
        at every call, for half of its time."""
        if function.fn.__module__.startswith("rnnfast."):
            return function.rewrite()(*args, **kwargs)
        return _call(function, *args, **kwargs)

    InterpretedFunction.__call__ = _call_prepared

import rnnfast
from rnnfast.recurrence import INSTRUCTION_SETS


def _instruction_sets() -> list[str]:
    if not rnnfast.backends()["cpu"].available:
        return []
    best = torch.ops.rnnfast.cpu_isa(None)  # a processor that has one has those before it
    return list(INSTRUCTION_SETS[best::-1])


BACKENDS = ["reference", *(f"cpu-{name}" for name in _instruction_sets())]
if INTERPRETED:
    BACKENDS.append("triton")


def pytest_report_header() -> str:
    return f"rnnfast backends: {', '.join(BACKENDS)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_too_large(item: pytest.Item) -> bool:  # for an interpreter
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return parameters.get("backend") == "triton" and parameters.get("case") == "wide"

    config.hook.pytest_deselected(items=list(filter(is_too_large, items)))
    items[:] = itertools.filterfalse(is_too_large, items)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of this machine in turn, the CPU kernels once for each instruction set."""
    name, _, instruction_set = request.param.partition("-")
    with rnnfast.use_backend(name):
        if not instruction_set:
            yield request.param
            return
        best = torch.ops.rnnfast.cpu_isa(None)
        torch.ops.rnnfast.cpu_isa(INSTRUCTION_SETS.index(instruction_set))
        yield request.param
        torch.ops.rnnfast.cpu_isa(best)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
