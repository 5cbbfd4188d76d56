"""Which tests run: what `make test` does without, and what is left out, is never left out unseen."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from backends import BACKENDS, PERSISTENT
from covering import covering

TESTS = Path(__file__).parent


@pytest.mark.parametrize("strength", (1, 2, 3))
def test_covering_rows_are_few_and_hold_every_combination(strength: int) -> None:
    rows = [row for row in itertools.product("abcdefgh", "klmno", range(4), range(4)) if row[0] != "a" or row[2]]
    random.Random(0).shuffle(rows)
    chosen = covering(rows, strength)
    combinations = lambda rows: {c for row in rows for c in itertools.combinations(enumerate(row), strength)}
    assert combinations([rows[index] for index in chosen]) == combinations(rows)
    least = (8, 8 * 5, 8 * 5 * 4)[strength - 1]  # the values of the longest columns
    assert least <= len(chosen) <= 1.4 * least


def test_covering_nothing() -> None:
    assert covering([], 2) == set()
    assert covering([("a",), ("b",)], 2) == set()


def collect(tmp_path: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What pytest says of a file of tests, with the fixtures and markers of this folder."""
    (tmp_path / "test_it.py").write_text(f"import pytest, torch\n{source}")
    options = (
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "-c",
        TESTS.parent / "pyproject.toml",
        "--collect-only",
        "-q",
    )
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", *options, *arguments, tmp_path / "test_it.py"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def test_it(backend): pass", "has a backend, so it needs a marker `runs`"),
        ("@pytest.mark.few(1, 'a')\ndef test_it(): pass", "its marker `few` does not fit its parameters"),
    ],
    ids=["runs", "few"],
)
def test_wrong_markers_are_refused(tmp_path: Path, source: str, text: str) -> None:
    done = collect(tmp_path, source)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert text in done.stdout + done.stderr


MARKED = """
@pytest.mark.few(2, "a", "b", "c")
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(4))
@pytest.mark.parametrize("c", range(4))
def test_thinned(a, b, c): pass
@pytest.mark.full
def test_long(): pass
@pytest.mark.full_on("reference")
@pytest.mark.runs(torch.float64)
def test_slow(backend): pass
@pytest.mark.runs(lambda dtype: (dtype, 2, 9))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_of_parameters(backend, dtype): pass
"""


def test_markers(tmp_path: Path) -> None:
    everything, quick = (collect(tmp_path, MARKED, *options).stdout for options in ((), ("-m", "not full")))
    count = lambda text, name: text.count(f"::{name}")
    assert count(everything, "test_thinned") == 64 and 16 <= count(quick, "test_thinned") <= 24
    assert count(everything, "test_long") == 1 and count(quick, "test_long") == 0
    persistent = [backend for backend in BACKENDS if backend.partition("-")[2] in PERSISTENT]
    for backend in BACKENDS:
        assert f"test_of_parameters[{backend}-torch.float32]" in quick
        for text in (everything, quick):
            assert (f"test_of_parameters[{backend}-torch.float64]" in text) == (backend not in persistent)
            assert (f"test_slow[{backend}]" in text) == (
                backend not in persistent and (backend != "reference" or text is everything)
            )
    for backend in persistent:
        name = backend.partition("-")[2]
        assert f": 2 tests: the CUDA regime {name} has no kernels for the layer of their marker" in quick
