"""Single steps on a CPU, of layers and cells, against torch.nn and onnxruntime, timed in turn: a CSV row for each case.

    python bench/steps.py --threads 1 --out steps.csv

Times (`ours_us`, ...) are medians over the rounds, in microseconds; `ratio_torch` is torch.nn's over ours,
`ratio_onnxruntime` onnxruntime's over ours, and `ratio_stream` onnxruntime's over that of rnnfast.Stream. Neither of
these two trains, and onnxruntime has no cells. A call of it takes an h_0 of zeros. `host_us` and `torch_host_us` are
what a call costs before it computes: one of a single row and unit, in the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import peers
import run
import table
import torch
from torch import nn

import rnnfast

NAMES = ("RNNCell", "GRUCell", "LSTMCell", "RNN", "GRU", "LSTM")
MODES = ("infer", "train")
COLUMNS = ["name", "mode", "N", "H", "ours_us", "torch_us", "stream_us"]
COLUMNS += ["onnxruntime_us", "host_us", "torch_host_us", "ratio_torch", "ratio_onnxruntime", "ratio_stream"]
BURST = 0.006  # seconds that one contender runs before the next one has its turn


def pair(name: str, N: int, H: int) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Ours and torch.nn's of the same weights, and what they take."""
    torch.manual_seed(0)
    theirs = getattr(nn, name)(H, H)
    ours = getattr(rnnfast, name)(H, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(N, H) if name.endswith("Cell") else torch.randn(1, N, H)
    assert torch.allclose(first(ours(x)), first(theirs(x)), atol=1e-5)
    return ours, theirs, x


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def call(module: nn.Module, x: torch.Tensor, mode: str) -> Callable[[], object]:
    if mode == "infer":
        return lambda: module(x)
    d_output = torch.randn_like(x)
    return lambda: first(module(x)).backward(d_output)


def contenders(name: str, mode: str, N: int, H: int, threads: int) -> dict[str, Callable[[], object]]:
    ours, theirs, x = pair(name, N, H)
    small, torchs_small, of_one = pair(name, 1, 1)
    found = {
        "ours": call(ours, x, mode),
        "torch": call(theirs, x, mode),
        "host": call(small, of_one, mode),
        "torch_host": call(torchs_small, of_one, mode),
    }
    if mode == "infer":
        step, rows = rnnfast.Stream(ours, N), x.view(N, H)
        found["stream"] = lambda: step(rows)
        if not name.endswith("Cell"):
            runners, given = peers.runners(theirs, 1, N, threads), x.numpy()
            if "onnxruntime" in runners:
                found["onnxruntime"] = lambda: runners["onnxruntime"](given)
    return found


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    for mode in options.modes:
        logs = []
        for name, N, H in itertools.product(options.names, options.batches, options.hidden):
            with torch.set_grad_enabled(mode == "train"):
                ms = run.measure(contenders(name, mode, N, H, options.threads), options.rounds, "cpu", BURST)
            ratios = {"ratio_torch": ms["torch"] / ms["ours"]}
            if "onnxruntime" in ms:
                ratios["ratio_onnxruntime"] = ms["onnxruntime"] / ms["ours"]
                ratios["ratio_stream"] = ms["onnxruntime"] / ms["stream"]
            row = {"name": name, "mode": mode, "N": N, "H": H}
            row |= {f"{key}_us": f"{value * 1e3:.1f}" for key, value in ms.items()}
            yield row | {key: f"{value:.3g}" for key, value in ratios.items()}
            logs.append(math.log(ratios["ratio_torch"]))
        mean, least = (math.exp(value) for value in (statistics.fmean(logs), min(logs)))
        print(
            f"{mode}: {mean:.2f} times as fast as torch.nn in the geometric mean, {least:.2f} at least", file=sys.stderr
        )


def main() -> None:
    choices = {"names": NAMES, "modes": MODES}
    parser = table.parser_of(__doc__, batches=[1, 8, 64], hidden=[16, 64, 256], rounds=15, threads=1, **choices)
    options = parser.parse_args()
    table.write(COLUMNS, rows_of(options), options)


if __name__ == "__main__":
    main()
