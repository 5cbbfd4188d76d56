"""The benchmark runs, writes every column, and its numbers fit together."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]


def _run(script: str, *args: object, status: int = 0) -> str:
    command = [sys.executable, str(ROOT / "bench" / script), *map(str, args)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_table_plot_and_comparison(tmp_path):
    table, picture = tmp_path / "table.csv", tmp_path / "picture.png"
    sizes = ("--shapes", "5x3x4x6", "--cells", "LSTM", "GRU", "--forms", "rectangular", "lengths", "--repeats", 1)
    printed = _run("run.py", "--quick", "--device", "cpu", "--out", table, *sizes)
    assert str(table) in printed

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        others = {name: float(value) for name, value in row.items() if name.endswith("_ms") and value}
        ours = others.pop("ours_ms")
        assert min(ours, *others.values()) > 0
        assert float(row["ratio_torch"]) == pytest.approx(others["torch_ms"] / ours, rel=2e-3)
        assert float(row["ratio_best"]) == pytest.approx(min(others.values()) / ours, rel=2e-3)
        assert others[f"{row['best_peer']}_ms"] == min(others.values())
        share = float(row["gflops"]) / float(row["ceiling_gflops"])
        assert float(row["share_of_ceiling"]) == pytest.approx(share, rel=2e-3)
        steps = 5 * 3 if row["form"] == "rectangular" else 3 + 4 + 5
        flops = 2 * steps * {"LSTM": 4, "GRU": 3}[row["cell"]] * 6 * (4 + 6) * (3 if row["mode"] == "train" else 1)
        assert float(row["gflops"]) == pytest.approx(flops / ours / 1e6, rel=2e-3)
        assert (row["mode"] == "train") == bool(row["ours_kept_mb"]) == bool(row["torch_kept_mb"])
        assert row["machine"] and "torch" in row["versions"]

    _run("plot.py", table, "-o", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "1.00x" in _run("compare.py", table, table).splitlines()[-1]


@pytest.mark.gpu
def test_columns_of_a_gpu(tmp_path):
    table = tmp_path / "table.csv"
    _run("run.py", "--quick", "--device", "cuda", "--cells", "LSTM", "--out", table)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["infer", "train"]
    for row in rows:
        assert float(row["ratio_tf32"]) == pytest.approx(
            float(row["torch_tf32_ms"]) / float(row["ours_tf32_ms"]), rel=2e-3
        )
        assert float(row["ratio_default"]) > 0 and float(row["ours_gpu_ms"]) > 0 and float(row["torch_gpu_ms"]) > 0
        assert row["best_peer"] == "torch"
        assert row["ours_ran"] == row["ours_tf32_ran"] in ("cuda multiprocessor", "triton fused")
        for kernels in (row["torch_ran"], row["torch_tf32_ran"]):
            assert kernels and not set("<( ") & set(kernels)


# The day on a GPU


STANDS_IN = """
import json, os, pathlib, sys, time
report, done = (pathlib.Path(sys.argv[sys.argv.index(name) + 1]) for name in ("--report", "--done"))
done = done.read_text().split()

def say(**line):
    with report.open("a") as file:
        file.write(json.dumps(line) + "\\n")

for item in sys.argv[1].split(","):
    if item in done:
        continue
    say(start=item)
    if "hangs" in item:
        time.sleep(60)
    if "dies" in item:
        sys.exit("a word of farewell")
    say(item=item, seconds=0, outcome="failed" if "fails" in item else "passed", figure=len(item))
    if "alone" in item:
        sys.exit(3)
    time.sleep(0.3 if "slow" in item else 0)
"""


@pytest.fixture
def day(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("gpu_day")


@pytest.fixture
def ran(day, tmp_path):
    """Runs a stage of such items; what became of them, and its line."""

    def run(items: str, left: float = 60, results=None):
        command = [sys.executable, "-c", STANDS_IN, items]
        stage = day.Stage("stage", 1, 60, 1.5, command, worst=max, figure="longest name")
        results = results or day.Results(tmp_path, ["stage"])
        line = day.perform(stage, results, left, False, None)
        return {record["item"]: record["outcome"] for record in results.of("stage")}, line, results

    return run


def test_a_stage_goes_on_after_hangs_and_deaths(ran, tmp_path):
    outcomes, line, results = ran("good,hangs,alone,dies,fails,alone2,last")
    passed = dict.fromkeys(("good", "alone", "alone2", "last"), "passed")
    assert outcomes == passed | {"hangs": "hang", "dies": "died", "fails": "failed"}
    assert results.has_ended("stage") and "7 items: 4 passed" in line and "longest name 6 (alone2)" in line
    failures = (tmp_path / "failures.txt").read_text()
    assert "hangs: hang: after" in failures and "dies: died: exit status 1: a word of farewell" in failures
    assert (tmp_path / "summary.txt").read_text() == line + "\n"


def test_a_stage_is_given_up(ran):
    outcomes, line, results = ran(",".join(f"dies{i}" for i in range(9)))
    assert set(outcomes.values()) == {"died"} and len(outcomes) < 9
    assert "given up" in line and not results.has_ended("stage")


def test_a_stage_stops_in_time_and_resumes(ran, day, tmp_path):
    items = ",".join(f"slow{i}" for i in range(20))
    begun, line, _ = ran(items, left=2.5)
    assert len(begun) < 20 and "stopped by its time limit" in line
    resumed, line, results = ran(items, results=day.Results(tmp_path, []))
    assert len(resumed) == 20 and results.has_ended("stage") and "20 items: 20 passed" in line
    assert not day.Results(tmp_path, ["stage"]).records


def test_regimes_that_hang_are_left_out(day, tmp_path):
    results = day.Results(tmp_path, [])
    results.add("versions", item="cuda chip", outcome="hang")
    results.add("versions", item="cuda cluster", outcome="failed", reason="AcceleratorError: CUDA error: trap")
    results.add("versions", item="cuda stepwise", outcome="failed", reason="off by 1")
    results.add("versions", item="triton", outcome="died")
    assert day.unusable(results) == ["chip", "cluster"]


@pytest.mark.full
def test_each_test_of_a_gpu_is_in_one_set(day):
    def count(*chosen: str) -> int:
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "--collect-only", "-q", *chosen]
        last = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests").stdout.splitlines()[-1]
        return int(re.match(r"\d+", last)[0])

    assert sum(count("-k", chosen) for chosen in day.TESTS.values()) == count()


def _rehearse(folder: Path, *args: object, status: int = 0) -> str:
    return _run("gpu_day.py", "--rehearse", "--out", folder, *args, status=status)


def test_rehearsal_of_some_stages(tmp_path):
    stages = ("--stages", "costs,smoke")
    assert "no time is left" in _rehearse(tmp_path, *stages, "--minutes", 0, status=1)
    printed = _rehearse(tmp_path, *stages)
    assert "smoke     4 items: 4 passed" in printed
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert {cost["outcome"] for cost in costs} == {"passed"}
    assert {cost.get("regime") for cost in costs} == {None, "multiprocessor", "cluster", "chip", "stepwise"}
    assert _rehearse(tmp_path, *stages, "--resume").count("skipped: its results are there") == 2


@pytest.mark.full
def test_rehearsal(tmp_path):
    assert _rehearse(tmp_path).count("predicted") == 9
    assert (tmp_path / "failures.txt").read_text() == ""
    with (tmp_path / "table.csv").open(newline="") as file:
        assert {row["dtype"] for row in csv.DictReader(file)} == {"bfloat16", "float32", "float16"}
