"""The backends that this machine can run, as one fixture."""

from __future__ import annotations

from collections.abc import Iterator

import importlib.util
import os

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. It has to be told before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import rnnfast
from rnnfast.recurrence import INSTRUCTION_SETS


def _instruction_sets() -> list[str]:
    if not rnnfast.backends()["cpu"].available:
        return []
    best = torch.ops.rnnfast.cpu_isa(None)  # a processor that has one has those before it
    return list(INSTRUCTION_SETS[best::-1])


BACKENDS = ["reference", *(f"cpu-{name}" for name in _instruction_sets())]
if not torch.cuda.is_available() and rnnfast.backends()["triton"].available:
    BACKENDS.append("triton")


def pytest_report_header() -> str:
    return f"rnnfast backends: {', '.join(BACKENDS)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
