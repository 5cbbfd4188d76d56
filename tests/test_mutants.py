"""The table of mutants.py fits the sources as they are."""

from __future__ import annotations

import shlex

import pytest
from mutants import MUTANTS, ROOT, Mutant, mutated


def test_each_has_a_name() -> None:
    assert len({(mutant.file, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.name}")
def test_mutant(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    changed = mutated(text, mutant)
    assert changed != text
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")
    assert all((ROOT / "tests" / word).exists() for word in shlex.split(mutant.first) if word.endswith(".py"))
