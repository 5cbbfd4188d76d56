"""The benchmark runs, writes every column, and its numbers fit together."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]


def _run(script: str, *args: object) -> str:
    command = [sys.executable, str(ROOT / "bench" / script), *map(str, args)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
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
        assert row["best_peer"] == "torch"
        assert row["ours_ran"] == row["ours_tf32_ran"] in ("cuda multiprocessor", "triton fused")
        for kernels in (row["torch_ran"], row["torch_tf32_ran"]):
            assert kernels and not set("<( ") & set(kernels)
