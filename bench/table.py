"""What the benches that time contenders in turn on a CPU have in common: how they are called, and what they write."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import machine
import torch

HEAD = ["machine", "versions", "commit", "threads"]


def parser_of(
    doc: str, *, batches: Sequence[int], hidden: Sequence[int], rounds: int, threads: int, **choices: Iterable[str]
) -> argparse.ArgumentParser:
    """Of the options with which all are called; choices are lists of words, all of them by default."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    for name, words in choices.items():
        parser.add_argument(f"--{name}", nargs="+", default=list(words), choices=list(words))
    parser.add_argument("--batches", nargs="+", type=int, default=batches, metavar="N")
    parser.add_argument("--hidden", nargs="+", type=int, default=hidden, metavar="H")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the rows; else they are printed")
    return parser


def write(columns: Sequence[str], rows: Iterable[dict[str, Any]], options: argparse.Namespace) -> None:
    """The table: each row as soon as it is made, after the columns that say where it was."""
    torch.set_num_threads(options.threads)
    head = machine.describe("cpu") | {"threads": options.threads}
    with options.out.open("w", newline="") if options.out else sys.stdout as out:
        writer = csv.DictWriter(out, [*HEAD, *columns], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(head | row)
            out.flush()


def against_ours(ms: dict[str, float]) -> dict[str, str]:
    """The columns of some contenders: the time of each, and that over ours."""
    ratios = {f"ratio_{name}": f"{value / ms['ours']:.4g}" for name, value in ms.items() if name != "ours"}
    return {f"{name}_ms": f"{value:.4g}" for name, value in ms.items()} | ratios
