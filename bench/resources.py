"""Registers, shared memory and spills of every Triton kernel variant, compiled for GPUs that need not be here.

    python bench/resources.py                          # for every target
    python bench/resources.py --target sm_90 -k LSTM   # for one, and one cell
    python bench/resources.py --largest                # of what is fused the largest tiles only, which need most

The exit code is 1 if a kernel spills more than four registers, or takes more shared memory than its target has.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnnfast.cells import CELLS
from rnnfast.records import BackwardSteps, ForwardSteps
from rnnfast.triton import kernels
from rnnfast.triton.plan import Chip, Plan, plan

KB = 1024
TOLERATED = 16  # bytes of spills: four registers, a read of the L1 cache a step. Fewer rows would double the launch.
TARGETS = {  # and what a program may have there of shared memory, by the vendors' guides
    "sm_80": (GPUTarget("cuda", 80, 32), Chip(163 * KB, 108, 8)),
    "sm_90": (GPUTarget("cuda", 90, 32), Chip(227 * KB, 132, 9)),
    "sm_100": (GPUTarget("cuda", 100, 32), Chip(227 * KB, 148, 10)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Chip(64 * KB, 304, warp_size=64)),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), Chip(64 * KB, 48, warp_size=32)),
}
# bfloat16 stands for float16 also: the same sizes, the same instructions.
DTYPES = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
DTYPES["fp64"] = torch.float64, False
MODES = [mode for mode in CELLS if mode != "RNN_RELU"]  # as RNN_TANH, with less maths
STATES = {"c", "cs", "dcs", "dh", "dc", "p_dh"}  # of the accumulation dtype
TABLES = {"offsets": "*i64", "lengths": "*i64", "resets": "*u8"}
FORMS = {"packed": {"offsets", "lengths"}, "resets": {"lengths", "resets"}}  # each with all it may have

RECORDS = {"forward": ForwardSteps, "backward": BackwardSteps}  # of a kernel's argument `of`
WEIGHTS = ("w", "w_hh", "b_hh", "w_hr", "w_units")  # a pair each, of both directions


class Variant(NamedTuple):
    target: str
    kernel: str
    mode: str
    dtype: str
    form: str
    how: Plan


class Resources(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack; on AMD, registers
    shared: int  # bytes of a program
    seconds: float  # to compile


def variants(target: str, only_largest: bool = False) -> Iterator[Variant]:
    """All that the plan uses on a target; or of each fused kernel, cell, dtype, rows and form the most units only."""
    chip = TARGETS[target][1]
    for mode in MODES:
        for dtype, (torch_dtype, tf32) in DTYPES.items():
            plans = {}
            for hidden, batch in itertools.product((16, 32, 64, 128, 256, 512, 2048), (1, 64, 8 * chip.processors + 1)):
                how = plan(mode, torch_dtype, hidden, batch, False, tf32, chip)
                if how.fused or not only_largest:
                    plans[how.fused, how.rows, None if only_largest else how.units] = how
            for how in plans.values():
                kinds = ["forward", "backward"]
                if CELLS[mode].projects and not how.fused:
                    kinds += ["project_forward", "project_backward", "states_before"]
                for kernel, form in itertools.product(kinds, FORMS):
                    yield Variant(target, kernel, mode, dtype, form, how)


def compile(variant: Variant) -> Resources:
    """Compile a variant in training, with a gradient at every output: what needs most."""
    how, kernel = variant.how, getattr(kernels, variant.kernel)
    dtype = "fp32" if variant.dtype == "tf32" else variant.dtype
    acc = "fp64" if dtype == "fp64" else "fp32"
    constants = {"MODE": variant.mode, "D": 2, "ALIGN": 16, "FUSED": how.fused, "BH": how.units, "BN": how.rows}
    constants["PRECISION"] = how.precision
    absent = TABLES.keys() - FORMS[variant.form]
    if how.fused:
        absent |= {"p_through", "p_da"}
    if not CELLS[variant.mode].saved and variant.kernel == "forward":
        absent |= {"gates"}
    if "c" not in CELLS[variant.mode].states:
        absent |= {"c", "cs", "c0", "dcs", "dc"}
    if not CELLS[variant.mode].weights:
        absent |= {"w_units"}
    if how.fused or not CELLS[variant.mode].projects:
        absent |= {"dprojections"}
    signature: dict[str, Any] = {}
    given: dict[tuple[int, ...], Any] = {}  # by place among the arguments, and within one that is a tuple
    aligned = []

    def kind(name: str, place: tuple[int, ...]) -> str:
        if name in constants or name in absent:
            given[place] = constants.get(name)
            return "constexpr"
        if name not in kernels.VARYING:
            aligned.append(place)
        return TABLES.get(name) or (
            "i32" if name in (*kernels.VARYING, "H", "P") else f"*{acc if name in STATES else dtype}"
        )

    for i, name in enumerate(kernel.arg_names):
        inner = [name] * 2 if name in WEIGHTS else ()
        inner = RECORDS[variant.kernel]._fields if name == "of" else tuple(TABLES) if name == "tables" else inner
        signature[name] = tuple(kind(of, (i, j)) for j, of in enumerate(inner)) or kind(name, (i,))
    source = ASTSource(kernel, signature, given, {place: [["tt.divisibility", 16]] for place in aligned})
    triton.knobs.compilation.always_compile = True  # not what an earlier run left: its time is asked for, too
    start = time.perf_counter()
    compiled = triton.compile(source, target=TARGETS[variant.target][0], options=how.options)
    seconds = time.perf_counter() - start
    return Resources(*_of_binary(compiled), seconds)


def _of_binary(compiled: Any) -> tuple[int, int, int]:
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        counts = dict(re.findall(r"\.(\w+_count): +(\d+)", compiled.asm["amdgcn"]))
        return int(counts["vgpr_count"]), int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"]), shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"], shared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("-k", default="", help="only variants whose line has this")
    parser.add_argument("--largest", action="store_true", help="only the largest fused tiles")
    args = parser.parse_args()
    found = [v for target in args.target for v in variants(target, args.largest) if args.k in " ".join(v[:5])]
    print(f"Triton {triton.__version__}")
    print(
        f"{'target':<8}{'kernel':<17}{'cell':<14}{'dtype':<6}{'form':<8}{'units x rows':>13} {'':<9}{'warps':>6}"
        f"{'registers':>10}{'spilled':>8}{'shared KB':>10}{'compile s':>10}"
    )
    bad = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for v, r in zip(found, pool.map(compile, found)):
            print(
                f"{v.target:<8}{v.kernel:<17}{v.mode:<14}{v.dtype:<6}{v.form:<8}{v.how.units:>8} x {v.how.rows:<2} "
                f"{'fused' if v.how.fused else 'stepwise':<9}{v.how.options['num_warps']:>6}{r.registers:>10}"
                f"{r.spilled:>8}{r.shared / KB:>10.1f}{r.seconds:>10.1f}", flush=True,
            )  # fmt: skip
            bad += r.spilled > TOLERATED or r.shared > TARGETS[v.target][1].shared_memory
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
