"""Gradients of each sample and ensembles on a CPU, timed in turn with what others do for them: a CSV row for each case.

    python bench/derivatives.py --threads 1 --out derivatives.csv

`what` is "samples", the gradients of a layer's weights for each of N samples by vmap(grad), or "ensemble", the training
of 8 members by vmap over their stacked weights. Times (`ours_ms`, ...) are medians over the rounds, in milliseconds;
`ratio_loop` is the time of our layer called for each sample or member over ours, `ratio_opacus` that of Opacus'
GradSampleModule around its DPLSTM or DPGRU, and `ratio_prepared` that of the same around our layer.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import machine
import run
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import rnnfast

try:
    from opacus import GradSampleModule
    from opacus.layers import DPGRU, DPLSTM

    from rnnfast.interop.opacus import prepare

    THEIRS = {"LSTM": DPLSTM, "GRU": DPGRU}
except ImportError:
    THEIRS = {}

COLUMNS = ["machine", "versions", "commit", "threads", "what", "name", "T", "N", "H", "ours_ms", "loop_ms", "opacus_ms"]
COLUMNS += ["prepared_ms", "ratio_loop", "ratio_opacus", "ratio_prepared"]
MEMBERS = 8


def _loss(module: nn.Module) -> Callable[..., torch.Tensor]:
    return lambda weights, x: functional_call(module, weights, (x,))[0].square().sum()


def of_samples(name: str, T: int, N: int, H: int) -> dict[str, Callable[[], object]]:
    ours, x = getattr(rnnfast, name)(H, H, batch_first=True), torch.randn(N, T, H)
    weights = {key: of.detach() for key, of in ours.named_parameters()}
    each = vmap(grad(_loss(ours)), (None, 0))

    def loop() -> object:
        parameters = list(ours.parameters())
        return [torch.autograd.grad(ours(row[None])[0].square().sum(), parameters) for row in x]

    found = {"ours": lambda: each(weights, x), "loop": loop}
    if THEIRS:
        own = prepare(getattr(rnnfast, name)(H, H, batch_first=True))
        for key, layer in (("opacus", THEIRS[name](H, H, batch_first=True)), ("prepared", own)):
            found[key] = _by_opacus(GradSampleModule(layer, loss_reduction="sum"), x)
    return found


def _by_opacus(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def call() -> None:
        module(x)[0].square().sum().backward()
        module.zero_grad()

    return call


def of_ensemble(name: str, T: int, N: int, H: int) -> dict[str, Callable[[], object]]:
    members, x = [getattr(rnnfast, name)(H, H) for _ in range(MEMBERS)], torch.randn(T, N, H)
    weights, _ = stack_module_state(members)
    each = vmap(grad(_loss(members[0])), (0, None))

    def loop() -> object:
        return [torch.autograd.grad(of(x)[0].square().sum(), list(of.parameters())) for of in members]

    return {"ours": lambda: each(weights, x), "loop": loop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--names", nargs="+", default=["LSTM", "GRU"], choices=["LSTM", "GRU"])
    add("--steps", type=int, default=50, metavar="T")
    add("--batches", nargs="+", type=int, default=[16, 64], metavar="N")
    add("--hidden", nargs="+", type=int, default=[32, 128], metavar="H")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=7)
    add("--out", type=Path, metavar="FILE", help="where to write the rows; else they are printed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head = machine.describe("cpu") | {"threads": options.threads}
    with options.out.open("w", newline="") if options.out else sys.stdout as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        cases = itertools.product((of_samples, of_ensemble), options.names, options.batches, options.hidden)
        for contenders, name, N, H in cases:
            torch.manual_seed(0)
            ms = run.measure(contenders(name, options.steps, N, H), options.rounds, "cpu")
            ratios = {f"ratio_{key}": f"{value / ms['ours']:.3g}" for key, value in ms.items() if key != "ours"}
            sizes = {"what": contenders.__name__.removeprefix("of_"), "name": name, "T": options.steps, "N": N, "H": H}
            writer.writerow(head | sizes | {f"{key}_ms": f"{value:.4g}" for key, value in ms.items()} | ratios)
            out.flush()


if __name__ == "__main__":
    main()
