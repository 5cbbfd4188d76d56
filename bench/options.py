"""Options of layers on a CPU, float32, one layer, against the layer without, timed in turn: a CSV row for each case.

    python bench/options.py --threads 1 --out options.csv

`recurrent_dropout`, `zoneout` and `layer_norm` are those of the layers' constructors, in eval mode where the mode is
`infer`; `resets` come with the call, at a tenth of the steps. Times are medians over the rounds in milliseconds:
`plain_ms` of the layer without, `ours_ms` with, and for `resets` `loop_ms` of a loop over the steps with torch.nn's
cell, which zeroes the state there. `ratio_plain` is ours over plain, `ratio_loop` the loop's over ours.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import run
import table
import torch
from torch import Tensor, nn

import rnnfast

MODES = ("infer", "train")
COLUMNS = ["layer", "option", "mode", "T", "N", "H"]
COLUMNS += ["ours_ms", "plain_ms", "loop_ms", "ratio_plain", "ratio_loop"]
OPTIONS = {
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "zoneout": {"zoneout": 0.1},
    "layer_norm": {"layer_norm": True},
    "resets": {},
}


def by_cell(cell: nn.Module, x: Tensor, resets: Tensor) -> tuple[Tensor]:
    """The output, by a loop over the steps."""
    kept, state, outputs = 1 - resets.to(x.dtype).unsqueeze(2), None, []
    for of_step, of_rows in zip(x, kept):
        if state is not None:
            state = tuple(s * of_rows for s in state) if isinstance(state, tuple) else state * of_rows
        state = cell(of_step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return (torch.stack(outputs),)


def contenders(layer: str, option: str, mode: str, T: int, N: int, H: int) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    ours, plain = (getattr(rnnfast, layer)(H, H, **given).train(mode == "train") for given in (OPTIONS[option], {}))
    x, resets = torch.randn(T, N, H), torch.rand(T, N) < 0.1
    d_output = torch.randn(T, N, H)

    def call(module: Callable[..., tuple[Tensor, ...]], **given: Tensor) -> None:
        output = module(x, **given)[0]
        if mode == "train":
            output.backward(d_output)

    found = {"plain": lambda: call(plain)}
    if option != "resets":
        return found | {"ours": lambda: call(ours)}
    cell = getattr(nn, f"{layer}Cell")(H, H)
    cell.load_state_dict({key.removesuffix("_l0"): weight for key, weight in ours.state_dict().items()})
    loop = lambda x, resets: by_cell(cell, x, resets)
    with torch.no_grad():
        assert torch.allclose(loop(x, resets)[0], ours(x, resets=resets)[0], atol=1e-5)
    return found | {"ours": lambda: call(ours, resets=resets), "loop": lambda: call(loop, resets=resets)}


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    T = options.steps
    cases = itertools.product(options.layers, options.options, options.modes, options.batches, options.hidden)
    for layer, option, mode, N, H in cases:
        with torch.set_grad_enabled(mode == "train"):
            ms = run.measure(contenders(layer, option, mode, T, N, H), options.rounds, "cpu")
        row = {"layer": layer, "option": option, "mode": mode, "T": T, "N": N, "H": H} | table.against_ours(ms)
        yield row | {"ratio_plain": f"{ms['ours'] / ms['plain']:.4g}"}


def main() -> None:
    choices = {"layers": ("LSTM", "GRU", "RNN"), "options": OPTIONS, "modes": MODES}
    threads = torch.get_num_threads()
    parser = table.parser_of(__doc__, batches=[1, 32], hidden=[64, 256, 512], rounds=9, threads=threads, **choices)
    parser.add_argument("--steps", type=int, default=100, metavar="T")
    parser.set_defaults(layers=["LSTM", "GRU"])
    options = parser.parse_args()
    table.write(COLUMNS, rows_of(options), options)


if __name__ == "__main__":
    main()
