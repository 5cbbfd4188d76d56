"""Cases of run.py under pytest-benchmark: ``pytest bench/``. For a table, run run.py."""

import pytest
import run
import torch

pytest.importorskip("pytest_benchmark")

CASES = [
    run.Case(cell, "float32", mode, torch.get_num_threads(), T, N, H, H, form=form)
    for cell in run.GATES
    for mode in ("infer", "train")
    for T, N, H, form in ((20, 8, 64, "rectangular"), (1, 1, 256, "rectangular"), (20, 8, 64, "packed"))
]


@pytest.mark.parametrize("name", ["ours", "torch"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.cell}-{case.mode}-{case.T}x{case.N}x{case.H}-{case.form}"
)
def test_speed(benchmark, case: run.Case, name: str) -> None:
    benchmark.group = f"{case.cell} {case.mode} {case.T}x{case.N}x{case.H} {case.form}"
    benchmark(run.contenders(case)[name])
