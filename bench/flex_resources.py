"""Registers, spills and compile times of the Triton kernels around cells of FlexRNN, for GPUs that need not be here.

    python bench/flex_resources.py                           # every cell of rnnfast.cells, and layer_norm, everywhere
    python bench/flex_resources.py --target sm_90 -k slstm   # for one, and one cell

The exit code is 1 if a kernel spills more than four registers, or takes more shared memory than its target has.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from resources import KB, TARGETS, TOLERATED, Resources, _of_binary
from triton.compiler import ASTSource

from rnnfast import cells
from rnnfast.evaluator import without_matrix
from rnnfast.triton import flex, flex_kernels
from rnnfast.variants import lstm_of_normalized_c, varied

CELLS = {name: of for name, of in vars(cells).items() if isinstance(of, cells.Cell)}
# As layers with layer_norm=True have them, whose programs have whole rows.
CELLS |= {"lstm_norm": varied(lstm_of_normalized_c, True, False), "gru_norm": varied(cells.gru, True, False)}
# bf16 stands for float16, too. All but W_hh, and on their way to it h and the gradients of a, are float32 then.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Variant(NamedTuple):
    target: str
    kernel: str
    cell: str
    form: str  # fused, stepwise, or without a matrix: apart
    dtype: str
    how: flex.How


def variants(target: str) -> Iterator[Variant]:
    """The largest heads that are fused, a larger one that programs share, a step, and units apart."""
    chip = TARGETS[target][1]
    for kernel, (name, cell), (dtype, of) in itertools.product(("forward", "backward"), CELLS.items(), DTYPES.items()):
        gates, forms = len(cell.gates_of_a), {}
        precision = {"fp32": "tf32x3", "tf32": "tf32"}.get(dtype, "ieee")
        products = flex.Products(of, "ieee" if chip.is_amd else precision)
        for width in (16, 32, 64, 128, 256, 512, 1024) if gates else ():
            how = flex.choose(gates, width, width, 64, products, chip, cell.sees_rows)
            forms["shared" if how.depth else "fused" if how.fused else "stepwise"] = how
        if dtype in ("tf32", "bf16"):
            forms = {} if chip.is_amd else {form: how for form, how in forms.items() if form != "stepwise"}
        else:  # what makes no products is the same in the others, and there are no others on AMD
            large = 1024 if cell.sees_rows else 9999
            forms["stepwise"] = flex.choose(gates, large, large, 9999, products, chip, cell.sees_rows)
            forms["apart"] = flex.choose(0, 256, 256, 64, products, chip, cell.sees_rows)
        yield from (Variant(target, kernel, name, form, dtype, how) for form, how in forms.items())


def compile(variant: Variant) -> Resources:
    """Compile a kernel in training, with lengths, resets and a gradient at every output: what needs most."""
    cell, (target, _) = CELLS[variant.cell], TARGETS[variant.target]
    if variant.form == "apart" and cell.gates_of_a:
        cell = without_matrix(cell, "diagonal", True)
    how, tensor = variant.how, "*fp64" if variant.dtype == "fp64" else "*fp32"
    states, units = (tensor,) * len(cell.states), (tensor,) * len(cell.weights)
    read = units + (tensor,) * len(cell.scalars)
    sizes = dict.fromkeys(("first", "last", "T", "N", "H", "W"), "i32")
    is_shared = variant.form == "shared"
    multiplied = "*bf16" if variant.dtype == "bf16" else tensor
    given: dict[str, Any] = {"p_x": tensor, "p_a": tensor, "p_before": states, "p_units": read}
    given |= {"p_states": states, "p_every": states} if variant.kernel == "forward" else {"p_d_every": states}
    given |= {"p_d_states": states, "p_dx": tensor, "p_da": multiplied, "p_d_units": units}
    w, b = (multiplied, tensor) if is_shared or variant.form == "fused" else (None, None)
    given |= {"p_w": w, "p_b": b, "p_h": w if is_shared else None, "p_met": "*i32" if is_shared else None}
    given |= {"p_lengths": "*i64", "p_resets": "*u8", **sizes}
    step = flex.steps_of(cell)[variant.kernel == "backward"]
    constants = {
        "CELL": step,
        "INITIAL": tuple(cell.initial),
        "EVERY": (True,) * len(states),
        "X": len(cell.gates_of_x),
        "A": len(cell.gates_of_a),
    }
    constants |= {
        "REVERSE": 0,
        "FUSED": how.fused,
        "BH": how.units,
        "BN": how.rows,
        "BK": how.depth,
    }
    constants |= {"ALIGN": 16, "ENDS": is_shared, "PRECISION": how.products.precision}

    kernel = getattr(flex_kernels, variant.kernel)
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(kernel.arg_names):
        kind = None if name in constants else given[name]
        signature[name] = "constexpr" if kind is None else kind
        if kind is None:
            values[(i,)] = constants.get(name)
        elif name not in flex_kernels.VARYING:
            aligned += [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
    source = ASTSource(kernel, signature, values, {place: [["tt.divisibility", 16]] for place in aligned})
    triton.knobs.compilation.always_compile = True  # not what an earlier run left: its time is asked for, too
    start = time.perf_counter()
    compiled = triton.compile(source, target=target, options=how.options)
    return Resources(*_of_binary(compiled), time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("-k", default="", help="only variants whose line has this")
    args = parser.parse_args()
    found = [v for target in args.target for v in variants(target) if args.k in " ".join(v[:5])]
    print(f"Triton {triton.__version__}")
    widths = {"target": 8, "kernel": 10, "cell": 15, "form": 10, "dtype": 6}
    titles = "".join(f"{title:<{width}}" for title, width in widths.items())
    print(f"{titles}units x rows registers spilled shared KB compile s")
    bad = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for v, r in zip(found, pool.map(compile, found)):
            line = "".join(f"{of:<{width}}" for of, width in zip(v, widths.values()))
            tile = f"{v.how.units:>7} x {v.how.rows:<2}"
            print(f"{line}{tile}{r.registers:>10}{r.spilled:>8}{r.shared / KB:>10.1f}{r.seconds:>10.1f}", flush=True)
            bad += r.spilled > TOLERATED or r.shared > TARGETS[v.target][1].shared_memory
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
