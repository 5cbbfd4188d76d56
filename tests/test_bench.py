"""The benchmark runs, writes every column, and its numbers fit together."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import backends
import pytest
import torch

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


def test_single_steps(tmp_path):
    sizes = ("--names", "GRUCell", "LSTM", "--batches", "2", "--hidden", "5", "--rounds", "1")
    _run("steps.py", *sizes, "--out", tmp_path / "steps.csv")
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["mode"]) for row in rows] == [
        (name, mode) for mode in ("infer", "train") for name in ("GRUCell", "LSTM")
    ]
    assert all(float(row[key]) > 0 for row in rows for key in ("ratio_torch", "host_us", "torch_host_us"))
    assert [bool(row["stream_us"]) for row in rows] == [True, True, False, False]


def test_flex(tmp_path):
    sizes = ("--steps", "3", "--batches", "2", "--hidden", "8", "--rounds", "1")
    _run("flex.py", *sizes, "--out", tmp_path / "flex.csv")
    with (tmp_path / "flex.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["cell"], row["mode"], row["heads"]) for row in rows] == [
        *(("lstm", mode, "1") for mode in ("infer", "train")),
        *(("slstm", mode, heads) for mode in ("infer", "train") for heads in ("1", "4")),
    ]
    for row in rows:
        assert float(row["ratio_loop"]) == pytest.approx(float(row["loop_ms"]) / float(row["ours_ms"]), rel=2e-3)
        assert bool(row["ratio_kernels"]) == (row["cell"] == "lstm") and not row["ratio_compiled"] + row["ratio_scan"]


@pytest.mark.full
def test_flex_compiled(tmp_path):
    """The loop and the scan, which torch.compile takes its time for."""
    sizes = ("--cells", "slstm", "--steps", "2", "--batches", "2", "--hidden", "8", "--heads", "2", "--rounds", "1")
    _run("flex.py", *sizes, "--compile", "--scan", "--out", tmp_path / "flex.csv")
    with (tmp_path / "flex.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["infer", "train"]
    assert all(
        float(row[f"{name}_{unit}"]) > 0 for row in rows for name in ("compiled", "scan") for unit in ("ms", "s")
    )


def test_derivatives(tmp_path):
    sizes = ("--names", "GRU", "--steps", "3", "--batches", "2", "--hidden", "5", "--rounds", "1")
    _run("derivatives.py", *sizes, "--out", tmp_path / "derivatives.csv")
    with (tmp_path / "derivatives.csv").open() as file:
        samples, ensemble = csv.DictReader(file)
    assert (samples["what"], ensemble["what"]) == ("samples", "ensemble")
    assert float(samples["ratio_loop"]) > 0 < float(ensemble["ratio_loop"])
    has_opacus = importlib.util.find_spec("opacus") is not None
    assert bool(samples["ratio_opacus"]) == bool(samples["ratio_prepared"]) == has_opacus


def test_options(tmp_path):
    sizes = ("--layers", "LSTM", "RNN", "--steps", "3", "--batches", "2", "--hidden", "8", "--rounds", "1")
    _run("options.py", *sizes, "--out", tmp_path / "options.csv")
    with (tmp_path / "options.csv").open() as file:
        rows = list(csv.DictReader(file))
    options = ("recurrent_dropout", "zoneout", "layer_norm", "resets")
    assert [(row["layer"], row["option"], row["mode"]) for row in rows] == [
        (layer, option, mode) for layer in ("LSTM", "RNN") for option in options for mode in ("infer", "train")
    ]
    for row in rows:
        assert float(row["ratio_plain"]) == pytest.approx(float(row["ours_ms"]) / float(row["plain_ms"]), rel=2e-3)
        assert bool(row["ratio_loop"]) == (row["option"] == "resets")


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


COUNT = """
import sys, pytest

class Count:
    def pytest_collection_finish(self, session):
        print("found", len(session.items))

for chosen in sys.argv[2:]:
    pytest.main([sys.argv[1], "--collect-only", "-qq", "-k", chosen], plugins=[Count()])
"""


@pytest.mark.full
def test_each_test_of_a_gpu_is_in_one_set(day):
    chosen = [words for words in day.TESTS.values() if words]  # the one without is of another file
    command = [sys.executable, "-c", COUNT, ROOT / "tests" / "test_gpu.py", "", *chosen]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", check=True).stdout
    all_of_them, *sets = (int(count) for count in re.findall(r"^found (\d+)$", printed, re.MULTILINE))
    assert len(sets) == len(chosen) and sum(sets) == all_of_them > 0


def _rehearse(folder: Path, *args: object, status: int = 0) -> str:
    return _run("gpu_day.py", "--rehearse", "--out", folder, *args, status=status)


def test_rehearsal_of_some_stages(tmp_path):
    stages = ("--stages", "costs,smoke")
    assert "no time is left" in _rehearse(tmp_path, *stages, "--minutes", 0, status=1)
    printed = _rehearse(tmp_path, *stages)
    assert "smoke     5 items: 5 passed" in printed
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert {cost["outcome"] for cost in costs} == {"passed"}
    assert [cost["item"] for cost in costs[:2]] == ["machine", "call GRU train tf32 cuda"]
    cuts = [(cut["pass"], cut["regime"], cut.get("rows"), cut.get("flags")) for cut in costs[2:]]
    for name in ("forward", "backward"):
        assert {cut[1:] for cut in cuts if cut[0] == name} == {
            ("multiprocessor", 8, False),
            *(("cluster", rows, False) for rows in (8, 16, 32)),
            *(("chip", rows, flags) for rows in (8, 16, 32) for flags in (False, True)),
            ("stepwise", None, None),
            *(("joint", rows, None) for rows in (8, 32)),
        }
    assert _rehearse(tmp_path, *stages, "--resume").count("skipped: its results are there") == 2


# The costs of the plan


@pytest.mark.parametrize("off", (0.5, math.nan))
def test_a_wrong_cut_is_recorded_as_wrong(monkeypatch, off):
    monkeypatch.syspath_prepend(ROOT / "bench")
    work = importlib.import_module("gpu_work").Work("cpu")
    layer = SimpleNamespace(measure=lambda *_: {"step_us": 1.0, "error": off})
    found = work.of_cut(layer, "forward", "chip", 0, "bfloat16")
    assert found["outcome"] == "failed" and found["reason"].startswith("off by ")


@pytest.fixture
def costs(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("cuda_costs")


def test_costs_of_the_plan_are_a_fit(costs):
    measured = costs.Measured(json.loads((ROOT / "bench/results/nvidia-h200/costs.json").read_text()))
    text, fit = costs.PLAN.read_text(), measured.fit()
    assert costs.costs_of(text) == pytest.approx(fit, rel=0.05)
    assert costs.costs_of(costs.with_costs(text, fit)) == pytest.approx(fit, rel=0.005)
    assert re.search(r"takes 1\.0[0-3]\d of the best", measured.report(fit))


@pytest.mark.parametrize("tf32", (False, True), ids=("exact", "tf32"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("cell", ("LSTM", "GRU"))
def test_the_model_chooses_as_the_plan_does(costs, cell, dtype, tf32):
    """Where the device holds all blocks at once: of more, the plan knows from the driver how many it holds."""
    if backends.EMULATION is None:
        pytest.skip("the emulated chip is a small one")
    cuts, chip = importlib.import_module("cuda_cuts"), costs.Chip(36, 227 << 10, 1)
    of_plan, of, compared = costs.costs_of(costs.PLAN.read_text()), getattr(torch, dtype), 0
    for H, N, name in itertools.product((16, 40, 64, 128, 200, 256, 400, 512), (3, 12, 30), cuts.PASSES):
        plan = lambda H=H, N=N, name=name: cuts.fields(
            torch.ops.rnnfast.cuda_plan(cell, of, N, H, False, False, tf32, name == "backward", 0)
        )
        layer = {"cell": cell, "dtype": dtype, "tf32": tf32, "H": H, "N": N, "pass": name}
        cycles = []
        for regime, number in cuts.Layer(cell, of, tf32, H, N, (1, 2), "cpu").cuts(name):
            with cuts.asked_for(regime, number):
                cut = plan()
            if "members" in cut:
                of_cut = costs.counts(layer | cut, chip).items()
                cycles.append((sum(of_plan[cost] * count for cost, count in of_cut), cut))
        if cycles and "members" in plan():
            assert plan() == min(cycles, key=lambda of_cut: of_cut[0])[1], (H, N, name)
            compared += 1
    assert compared > 30


@pytest.mark.full
def test_rehearsal(tmp_path):
    assert _rehearse(tmp_path).count("predicted") == 11
    assert (tmp_path / "failures.txt").read_text() == ""
    with (tmp_path / "table.csv").open(newline="") as file:
        assert {row["dtype"] for row in csv.DictReader(file)} == {"bfloat16", "float32", "float16"}
