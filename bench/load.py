"""Calls per second of rnnfast and of torch.nn while several processes want the same cores.

    python bench/load.py                 # 1 and 4 processes of 2 threads each

A team of threads that waits by spinning can lose a whole time slice at each step when one of them is not running.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time

import torch
from torch import nn

import rnnfast

LIBRARIES = {"rnnfast": rnnfast, "torch.nn": nn}
# Rows enough for each thread to have its own, and a single row, for which threads share every step.
SHAPES = {"100x32x128": (100, 32, 128), "100x1x256": (100, 1, 256)}


def count(library: str, cell: str, shape: str, mode: str, threads: int, start: float, seconds: float) -> int:
    """Calls that one process makes between ``start`` and ``seconds`` later."""
    torch.set_num_threads(threads)
    steps, rows, hidden = SHAPES[shape]
    layer, x = getattr(LIBRARIES[library], cell)(hidden, hidden), torch.randn(steps, rows, hidden)
    calls = 0
    with torch.set_grad_enabled(mode == "train"):
        while (now := time.time()) < start + seconds:
            output, _ = layer(x)
            if mode == "train":
                output.sum().backward()
            calls += now >= start
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--cells", nargs="+", default=["LSTM", "GRU"], choices=["LSTM", "GRU", "RNN"])
    args = parser.parse_args()
    print(f"{'calls per second':28}" + "".join(f"{f'{n} x {args.threads} threads':>26}" for n in args.processes))
    print(f"{'':28}" + f"{'rnnfast':>10}{'torch.nn':>10}{'ratio':>6}" * len(args.processes))
    with multiprocessing.get_context("spawn").Pool(max(args.processes)) as pool:
        pool.starmap(count, [("rnnfast", "RNN", "100x1x256", "infer", 1, 0, 0)] * 2 * max(args.processes))  # imports
        for cell in args.cells:
            for shape in SHAPES:
                for mode in ("infer", "train"):
                    line = f"{cell} {shape} {mode}".ljust(28)
                    for processes in args.processes:
                        rates = []
                        for library in LIBRARIES:
                            task = (library, cell, shape, mode, args.threads, time.time() + 1, args.seconds)
                            rates.append(sum(pool.starmap(count, [task] * processes, chunksize=1)) / args.seconds)
                        line += f"{rates[0]:10.0f}{rates[1]:10.0f}{rates[0] / rates[1]:6.2f}"
                    print(line, flush=True)


if __name__ == "__main__":
    main()
