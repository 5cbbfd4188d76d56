"""``python -m rnnfast tune``: races on a GPU for a list of shapes, whose results later processes find."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch

import rnnfast

from . import choice, contest, functional
from .backends import USUAL, choose_backend
from .timings import Key, Times, known_of

_SHAPES = [f"256x{rows}x{hidden}" for hidden in (64, 128, 256, 512, 1024) for rows in (1, 16, 64, 256)]
_DTYPES = ("bfloat16", "float32", "float16", "float64")


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    """T, N, I and H."""
    sizes = tuple(map(_count, text.split("x")))
    if len(sizes) not in (3, 4):
        raise ValueError
    return sizes if len(sizes) == 4 else (*sizes, sizes[2])


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cells", nargs="+", default=["LSTM", "GRU", "RNN"], choices=("LSTM", "GRU", "RNN"))
    parser.add_argument("--dtypes", nargs="+", default=_DTYPES[:2], choices=_DTYPES)
    parser.add_argument("--modes", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=[_shape(text) for text in _SHAPES], metavar="TxNxH",
        help="steps, rows and units, or TxNxIxH with input features; by default 256 steps of 64 to 1024 units",
    )  # fmt: skip
    parser.add_argument("--layers", nargs="+", type=_count, default=[1])
    parser.add_argument("--directions", nargs="+", type=int, default=[1], choices=(1, 2))
    parser.add_argument("--device", type=_device, default=torch.device("cuda"))


def tune(args: argparse.Namespace) -> int:
    """Race them all, and print a table; the exit code is 1 if there is no GPU."""
    device = args.device
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index is not None and device.index >= (count := torch.cuda.device_count()):
        print(f"there is no {device}: torch finds {count} GPU(s)", file=sys.stderr)
        return 1
    backend, why = choose_backend(USUAL, "LSTM", device, torch.float32)
    if backend not in choice.RACED:
        print(f"nothing to choose on {device}: {why}", file=sys.stderr)
        return 1
    rnnfast.set_choice("measure")
    calls = list(itertools.product(args.cells, args.dtypes, args.shapes, args.layers, args.directions, args.modes))
    rows = []
    for done, (cell, dtype, (T, N, I, H), layers, directions, mode) in enumerate(calls):
        _show(done, len(calls), f"{cell} {dtype} {mode} {T}x{N}x{I}x{H}")
        options = {"bidirectional": directions == 2, "device": device, "dtype": getattr(torch, dtype)}
        rows.append(_race(cell, (T, N, I, H), layers, mode == "train", options))
    _show(len(calls), len(calls), "")
    _print(rows)
    print(f"\n{choice.known_on(device)}")
    return 0


def _race(
    cell: str, sizes: tuple[int, ...], layers: int, trained: bool, options: dict[str, Any]
) -> tuple[Key, Times, str]:
    T, N, I, H = sizes
    mode, device, bidirectional = "RNN_TANH" if cell == "RNN" else cell, options["device"], options["bidirectional"]
    count = 4 * layers * (1 + bidirectional)
    of_stack = trained, count, layers, bidirectional, "rectangular"
    index = -1 if device.type == "cpu" else device.index
    where = choice.where_of(mode, index, options["dtype"], I, H, H, T, N, *of_stack)
    _, key, *_ = choice.parts_of(where)
    try:
        weights = getattr(rnnfast, cell)(I, H, layers, **options)._flat_weights
        with torch.set_grad_enabled(trained):
            x = weights[0].new_zeros(T, N, I)
            functional.rnn(mode, x, None, weights, num_layers=layers, bidirectional=bidirectional)
    except RuntimeError as error:
        if not contest.is_short_of_memory(error):
            raise
        return key, {}, "out of memory"
    return key, known_of(device).measured.get(key, {}), choice.explained(where, N).backend


def _show(done: int, count: int, what: str, width: int = 30) -> None:
    """A bar on a terminal."""
    if sys.stderr.isatty():
        filled = width * done // count
        end = "" if done < count else "\n"
        text = f"[{'#' * filled}{'.' * (width - filled)}] {done}/{count} {what}"
        columns = shutil.get_terminal_size().columns - 1  # in the last one some terminals go to the next line
        print(f"\r{text:<{columns}.{columns}}", end=end, file=sys.stderr, flush=True)


def _print(rows: Sequence[tuple[Key, Times, str]]) -> None:
    """Milliseconds of each backend, and how many times faster the one that serves is than torch's kernels."""
    names = [name for name in ("torch", *sorted(choice.RACED)) if any(name in times for _, times, _ in rows)]
    width = max(len(str(key)) for key, *_ in rows)
    print(f"{'call':<{width}}" + "".join(f"{name + ' ms':>12}" for name in names) + f"{'speedup':>10}  serves")
    for key, times, backend in rows:
        cells = "".join(f"{times[name]:12.4g}" if name in times else f"{'':>12}" for name in names)
        gain = f"{times['torch'] / times[backend]:10.2f}" if backend in times else f"{'':>10}"
        print(f"{key!s:<{width}}{cells}{gain}  {backend}")
