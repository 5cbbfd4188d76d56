"""Gradients of each sample and ensembles on a CPU, timed in turn with what others do for them: a CSV row for each case.

    python bench/derivatives.py --threads 1 --out derivatives.csv

`what` is "samples", the gradients of a layer's weights for each of N samples by vmap(grad), or "ensemble", the training
of 8 members by vmap over their stacked weights. Times (`ours_ms`, ...) are medians over the rounds, in milliseconds;
`ratio_loop` is the time of our layer called for each sample or member over ours, `ratio_opacus` that of Opacus'
GradSampleModule around its DPLSTM or DPGRU, and `ratio_prepared` that of the same around our layer.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import run
import table
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

COLUMNS = ["what", "name", "T", "N", "H", "ours_ms", "loop_ms", "opacus_ms", "prepared_ms"]
COLUMNS += ["ratio_loop", "ratio_opacus", "ratio_prepared"]
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


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    T = options.steps
    cases = itertools.product((of_samples, of_ensemble), options.names, options.batches, options.hidden)
    for contenders, name, N, H in cases:
        torch.manual_seed(0)
        ms = run.measure(contenders(name, T, N, H), options.rounds, "cpu")
        what = contenders.__name__.removeprefix("of_")
        yield {"what": what, "name": name, "T": T, "N": N, "H": H} | table.against_ours(ms)


def main() -> None:
    names = ("LSTM", "GRU")
    parser = table.parser_of(__doc__, batches=[16, 64], hidden=[32, 128], rounds=7, threads=1, names=names)
    parser.add_argument("--steps", type=int, default=50, metavar="T")
    options = parser.parse_args()
    table.write(COLUMNS, rows_of(options), options)


if __name__ == "__main__":
    main()
