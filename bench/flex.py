"""FlexRNN on a CPU, float32, one layer, timed in turn: a CSV row for each case.

    python bench/flex.py --compile --out flex.csv

The cell `lstm` is an LSTM that no kernel knows, beside rnnfast.LSTM (`kernels_ms`); `slstm` is the sLSTM of
rnnfast.cells. Times are medians over the rounds in milliseconds: `ours_ms` of the evaluator, `loop_ms` of the loop in
plain torch, which is what one would write by hand, and with --compile `compiled_ms` of torch.compile of that loop,
whose first call takes `compile_s`. `ratio_kernels`, `ratio_loop` and `ratio_compiled` are those times over ours.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import machine
import run
import torch

import rnnfast
from rnnfast import cells

COLUMNS = ["machine", "versions", "commit", "threads", "cell", "mode", "T", "N", "H", "heads", "ours_ms", "kernels_ms"]
COLUMNS += ["loop_ms", "compiled_ms", "compile_s", "ratio_kernels", "ratio_loop", "ratio_compiled"]


@rnnfast.cell(gates="i f g o", states="h c")
def lstm(x, a, s):
    h, c = cells.lstm.function(x, a, s)
    return h * 1.0, c


CELLS = {"lstm": lstm, "slstm": cells.slstm}


def contenders(name: str, mode: str, T: int, N: int, H: int, heads: int, compiled: bool) -> dict[str, Callable]:
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
    if compiled:
        module = torch.compile(net, fullgraph=True)
        found["compiled"] = lambda: by_loop(module)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    add("--modes", nargs="+", default=["infer", "train"], choices=["infer", "train"])
    add("--steps", type=int, default=100, metavar="T")
    add("--batches", nargs="+", type=int, default=[1, 32], metavar="N")
    add("--hidden", nargs="+", type=int, default=[64, 256, 512], metavar="H")
    add("--heads", nargs="+", type=int, default=[1, 4], metavar="K", help="of which more than one are slstm's alone")
    add("--compile", action="store_true", help="also torch.compile of the loop, which takes minutes to compile")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--rounds", type=int, default=9)
    add("--out", type=Path, metavar="FILE", help="where to write the rows; else they are printed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head = machine.describe("cpu") | {"threads": options.threads, "T": options.steps}
    with options.out.open("w", newline="") if options.out else sys.stdout as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        cases = itertools.product(options.cells, options.modes, options.batches, options.hidden, options.heads)
        for cell, mode, N, H, heads in cases:
            if cell == "lstm" and heads > 1:
                continue
            row = head | {"cell": cell, "mode": mode, "N": N, "H": H, "heads": heads}
            with torch.set_grad_enabled(mode == "train"):
                runs = contenders(cell, mode, options.steps, N, H, heads, options.compile)
                if options.compile:
                    start = perf_counter()
                    runs["compiled"]()
                    row["compile_s"] = f"{perf_counter() - start:.1f}"
                ms = run.measure(runs, options.rounds, "cpu")
            row |= {f"{name}_ms": f"{value:.4g}" for name, value in ms.items()}
            row |= {f"ratio_{name}": f"{value / ms['ours']:.4g}" for name, value in ms.items() if name != "ours"}
            writer.writerow(row)
            out.flush()


if __name__ == "__main__":
    main()
