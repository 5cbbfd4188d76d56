"""The backends that this machine can run, as one fixture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import interpreter  # before Triton's kernels
import pytest
import torch

import rnnfast
from rnnfast.recurrence import INSTRUCTION_SETS


def _instruction_sets() -> list[str]:
    if not rnnfast.backends()["cpu"].available:
        return []
    best = torch.ops.rnnfast.cpu_isa(None)  # a processor that has one has those before it
    return list(INSTRUCTION_SETS[best::-1])


BACKENDS = ["reference", *(f"cpu-{name}" for name in _instruction_sets())]
if interpreter.ENABLED:
    BACKENDS.append("triton")


def pytest_report_header() -> str:
    return f"rnnfast backends: {', '.join(BACKENDS)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_too_large(item: pytest.Item) -> bool:  # for an interpreter
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        large = {"wide": True, "H63": parameters.get("dtype") == torch.float64}
        large["H130-no-bias"] = large["H63"]
        many_runs = item.originalname == "test_function_transforms" and parameters["cell"] != "lstm"
        return parameters.get("backend") == "triton" and (many_runs or large.get(parameters.get("case"), False))

    config.hook.pytest_deselected(items=list(filter(is_too_large, items)))
    items[:] = itertools.filterfalse(is_too_large, items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
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
