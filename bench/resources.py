"""Registers, shared memory and spills of every Triton kernel variant, compiled for GPUs that need not be here.

    python bench/resources.py                        # a table, for every target
    python bench/resources.py --target sm_90 -k LSTM # of one target and cell
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnnfast.triton import kernels
from rnnfast.triton.cells import GATES
from rnnfast.triton.plan import Chip, Plan, plan

KB = 1024
TARGETS = {  # and what a program may have there of shared memory, by the vendors' guides
    "sm_80": (GPUTarget("cuda", 80, 32), Chip(163 * KB, 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Chip(227 * KB, 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Chip(227 * KB, 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Chip(64 * KB, 304, is_amd=True)),
}
# bfloat16 stands for float16 also: the same sizes, the same instructions.
DTYPES = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
DTYPES["fp64"] = torch.float64, False
MODES = [mode for mode in GATES if mode != "RNN_RELU"]  # as RNN_TANH, with less maths
SEQUENCE = {"p_x", "p_y", "p_gates", "p_a", "p_w", "p_w_reverse", "p_b", "p_b_reverse", "p_h", "p_h0", "p_c0", "p_dy"}
SEQUENCE |= {"p_through", "p_da", "p_dgates", "p_projected", "p_dprojected", "p_dprojections", "p_out"}
TABLES = {"p_offsets": "*i64", "p_lengths": "*i64", "p_resets": "*u8"}


class Variant(NamedTuple):
    target: str
    kernel: str
    mode: str
    dtype: str
    hidden: int
    how: Plan


class Resources(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack; on AMD, registers
    shared: int  # bytes of a program
    seconds: float  # to compile


def variants(target: str) -> Iterator[Variant]:
    """Every tile that the plan uses on a target, with full tiles and the largest padded ones."""
    chip = TARGETS[target][1]
    for mode in MODES:
        for dtype, (torch_dtype, tf32) in DTYPES.items():
            for hidden in (16, 32, 64, 128, 256, 512):
                for batch in (1, 8 * chip.processors + 1):
                    how = plan(mode, torch_dtype, hidden, batch, False, tf32, chip)
                    if how.fused or (hidden == 512 and batch == 1):
                        for kernel in ("forward", "backward"):
                            yield Variant(target, kernel, mode, dtype, hidden, how)
        if mode == "RNN_TANH":
            for kernel in ("project_forward", "project_backward", "states_before"):
                yield Variant(target, kernel, "-", "bf16", 512, how)


def compile(variant: Variant) -> Resources:
    """Compile a variant in training, with every sequence form at once: what needs most."""
    how, kernel = variant.how, getattr(kernels, variant.kernel)
    dtype = {"bf16": "bf16", "tf32": "fp32", "fp32": "fp32", "fp64": "fp64"}[variant.dtype]
    acc = "fp64" if dtype == "fp64" else "fp32"
    constants = {"MODE": variant.mode, "D": 2, "BH": how.units, "BN": how.rows, "PRECISION": how.precision}
    absent = {"p_a", "p_through", "p_da"} if how.fused else {"p_w", "p_w_reverse"}
    if variant.mode != "LSTM":
        absent |= {"p_c", "p_cs", "p_c0", "p_dcs", "p_dc"}
    if variant.kernel.startswith("project") or variant.kernel == "states_before":
        absent = set()
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif name.startswith("p_"):
            signature[name] = TABLES.get(name, f"*{dtype if name in SEQUENCE else acc}")
        else:
            signature[name] = "i32"
    constants = {name: value for name, value in constants.items() if name in signature}
    aligned = [i for i, name in enumerate(signature) if signature[name][0] == "*" or name == "H"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    start = time.perf_counter()
    compiled = triton.compile(
        source, target=TARGETS[variant.target][0], options=how.options
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("-k", default="", help="only variants whose line has this")
    args = parser.parse_args()
    found = [v for target in args.target for v in variants(target) if args.k in " ".join(map(str, v[:4]))]
    heads = ("target", "kernel", "cell", "dtype", "H", "tile", "warps", "registers", "spilled", "shared KB", "compile s")
    print("{:<8}{:<17}{:<9}{:<6}{:>4} {:>8}{:>6}{:>10}{:>8}{:>10}{:>10}".format(*heads))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for v, r in zip(found, pool.map(compile, found)):
            tile = f"{v.how.units}x{v.how.rows}{'' if v.how.fused else ' s'}"
            print(
                f"{v.target:<8}{v.kernel:<17}{v.mode:<9}{v.dtype:<6}{v.hidden:>4} {tile:>8}{v.how.options['num_warps']:>6}"
                f"{r.registers:>10}{r.spilled:>8}{r.shared / KB:>10.1f}{r.seconds:>10.1f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
