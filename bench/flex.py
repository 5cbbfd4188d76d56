"""FlexRNN on a CPU, float32, one layer, timed in turn: a CSV row for each case.

    python bench/flex.py --compile --scan --out flex.csv

The cell `lstm` is an LSTM that no kernel knows, beside rnnfast.LSTM (`kernels_ms`); `slstm` is the sLSTM of
rnnfast.cells. Times are medians over the rounds in milliseconds: `ours_ms` of the evaluator, `loop_ms` of the loop in
plain torch, which is what one would write by hand, with --compile `compiled_ms` of torch.compile of that loop, and with
--scan `scan_ms` of torch.compile of the step in torch's prototype of a scan. Their first calls take
`compiled_s` and `scan_s`, seconds. `ratio_kernels`, `ratio_loop`, ... are those times over ours.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from time import perf_counter

import run
import table
import torch
from torch import Tensor
from torch._higher_order_ops import scan
from torch.nn import functional as F

import rnnfast
from rnnfast import cells
from rnnfast.evaluator import _recurrent

MODES = ("infer", "train")
COLUMNS = ["cell", "mode", "T", "N", "H", "heads", "ours_ms", "kernels_ms", "loop_ms", "compiled_ms", "compiled_s"]
COLUMNS += ["scan_ms", "scan_s", "ratio_kernels", "ratio_loop", "ratio_compiled", "ratio_scan"]


@rnnfast.cell(gates="i f g o", states="h c")
def lstm(x, a, s):
    h, c = cells.lstm.function(x, a, s)
    return h * 1.0, c


CELLS = {"lstm": lstm, "slstm": cells.slstm}


class Scan(torch.nn.Module):
    """The layer of a FlexRNN as a scan over its steps."""

    def __init__(self, net: rnnfast.FlexRNN) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor]:
        cell, hidden = self.net.cell, self.net.hidden_size
        w_ih, w_hh, b_ih, b_hh = self.net.parameters()
        numbers = cell.program.tensors(x)

        def step(states: tuple[Tensor, ...], of_x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            of_a = _recurrent(states[0], w_hh, b_hh)
            after = cell.program.run([*of_x.split(hidden, 1), *of_a.split(hidden, 1), *states], numbers)
            after = tuple(state.clone() for state in after)  # no result may be another, or an input
            return after, after[0].clone()

        first = tuple(x.new_full((x.size(1), hidden), value) for value in cell.initial)
        return (scan(step, first, F.linear(x, w_ih, b_ih))[1],)


def contenders(
    name: str, mode: str, T: int, N: int, H: int, heads: int, options: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    net, x = rnnfast.FlexRNN(CELLS[name], H, H, num_heads=heads), torch.randn(T, N, H)
    d_output = torch.randn(T, N, H)

    def call(module: torch.nn.Module) -> None:
        output = module(x)[0]
        if mode == "train":
            output.backward(d_output)

    def by_loop(module: torch.nn.Module) -> None:
        with rnnfast.use_backend("reference"):
            call(module)

    found = {"ours": lambda: call(net), "loop": lambda: by_loop(net)}
    if name == "lstm" and heads == 1:
        known = rnnfast.LSTM(H, H)
        known.load_state_dict(net.state_dict())
        found["kernels"] = lambda: call(known)
    if options.compile:
        module = torch.compile(net, fullgraph=True)
        found["compiled"] = lambda: by_loop(module)
    if options.scan:
        assert torch.allclose(Scan(net)(x)[0], net(x)[0], atol=1e-5)
        scanned = torch.compile(Scan(net), fullgraph=True)
        found["scan"] = lambda: call(scanned)
    return found


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    T = options.steps
    cases = itertools.product(options.cells, options.modes, options.batches, options.hidden, options.heads)
    for cell, mode, N, H, heads in cases:
        if cell == "lstm" and heads > 1:
            continue
        row = {"cell": cell, "mode": mode, "T": T, "N": N, "H": H, "heads": heads}
        torch.compiler.reset()
        with torch.set_grad_enabled(mode == "train"):
            calls = contenders(cell, mode, T, N, H, heads, options)
            for name in ("compiled", "scan"):
                if name in calls:
                    start = perf_counter()
                    calls[name]()
                    row[f"{name}_s"] = f"{perf_counter() - start:.1f}"
            yield row | table.against_ours(run.measure(calls, options.rounds, "cpu"))


def main() -> None:
    choices = {"cells": CELLS, "modes": MODES}
    threads = torch.get_num_threads()
    parser = table.parser_of(__doc__, batches=[1, 32], hidden=[64, 256, 512], rounds=9, threads=threads, **choices)
    add = parser.add_argument
    add("--steps", type=int, default=100, metavar="T")
    add("--heads", nargs="+", type=int, default=[1, 4], metavar="K", help="of which more than one are slstm's alone")
    add("--compile", action="store_true", help="also torch.compile of the loop, which takes minutes to compile")
    add("--scan", action="store_true", help="also torch.compile of a scan over the steps")
    options = parser.parse_args()
    table.write(COLUMNS, rows_of(options), options)


if __name__ == "__main__":
    main()
