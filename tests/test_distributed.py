"""Training in two processes, by torch's own engines, as in one: what they do is in ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import HANG
from ranks import checks

HERE = Path(__file__).parent
# Of torch's engines, from C++, which Python's filters do not see; others are about the machine.
OF_CPP = ("unused parameters", "Grad strides do not match bucket view strides", " is a view ")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed engines")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What went wrong in each process, by check."""
    directory = tmp_path_factory.mktemp("ranks")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, *launcher, str(HERE / "ranks.py"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment)
    assert done.returncode == 0, done.stderr
    for said in OF_CPP:
        assert said not in done.stderr, done.stderr
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", checks(HERE))
def test_two_processes(results: list[dict[str, str]], check: str) -> None:
    assert [of_rank[check] for of_rank in results] == ["", ""]
