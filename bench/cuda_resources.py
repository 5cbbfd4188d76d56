"""Registers, stack and spills of every CUDA kernel, compiled for GPUs that need not be here; nvcc has to.

    python bench/cuda_resources.py                       # for every target of the library
    python bench/cuda_resources.py --arch 90 -k Lstm     # for one, and one cell

Shared memory is the plan's to give: a second table shows, for an H200, where layers of several sizes run and what their
blocks have of it. The exit code is 1 if a kernel spills more than a dozen registers: with fewer of them for the matrix,
which would then be read from shared memory at each step, persistent kernels are slower. What was compiled stays in
build/cuda-ARCH, with the library of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, BATCHES = (64, 128, 256, 512, 1024, 2048), (8, 64, 256)
TOLERATED = 100  # bytes, of stores and loads
NO_DEVICE = -1  # for which the plan takes an H200's numbers


class Kernel(NamedTuple):
    arch: str
    name: str
    arguments: str  # of the template
    registers: int  # of a thread
    stack: int  # bytes of a thread, in local memory
    spilled: int  # bytes that a thread writes there for want of registers, or reads
    persistent: bool  # its loop over the steps is where the time goes


def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile() -> Path:
    """Build the library and return the folder with it and its objects."""
    how = setup()
    if how.find_nvcc() is None:
        sys.exit("there is no nvcc in CUDA_HOME/bin or on PATH")
    folder = ROOT / "build" / "-".join(["cuda", *how.cuda_archs()])
    how.build(folder, cuda=folder / "_cuda.so")
    return folder


def logs(folder: Path) -> list[Path]:
    """Of its objects, what nvcc said."""
    built = re.findall(r"^build (\S+): cu ", (folder / "build.ninja").read_text(), re.MULTILINE)
    return [folder / f"{name}.log" for name in built]


def kernels(folder: Path) -> list[Kernel]:
    """By what ptxas said of each of the folder's objects."""
    found = []
    for log in logs(folder):
        for entry in log.read_text().split("Compiling entry function ")[1:]:
            mangled, arch = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
            # A function that is not inlined has lines of its own.
            local = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            stack, stores, loads = (sum(map(int, sizes)) for sizes in zip(*local))
            registers = int(re.search(r"Used (\d+) registers", entry)[1])
            persistent = log.name.startswith("persistent")
            found.append(Kernel(arch, mangled, "", registers, stack, stores + loads, persistent))
    names = demangle([kernel.name for kernel in found])
    return sorted(kernel._replace(name=name, arguments=of) for kernel, (name, of) in zip(found, names))


def demangle(names: list[str]) -> Iterator[tuple[str, str]]:
    """Names and template arguments, without namespaces and types of integers."""
    filtered = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    for name in filtered.stdout.splitlines():
        short = re.sub(r"(\w+|\(anonymous namespace\)|<unnamed>)::|\((bool|(unsigned )?(char|int|long))\)", "", name)
        kernel, _, arguments = short.partition("<")
        yield kernel, arguments.removesuffix(">")


def warnings(folder: Path) -> list[str]:
    """What else the compilers said."""
    said = [line for log in logs(folder) for line in log.read_text().splitlines()]
    return [line for line in said if not re.match(r"ptxas info|.* bytes stack frame,", line)]


def plans(folder: Path) -> Iterator[str]:
    """Rows of the second table."""
    import torch

    import rnnfast  # noqa: F401, defines the operators that the library implements

    torch.ops.load_library(folder / "_cuda.so")
    yield "cell      dtype  units  rows  pass      plan"
    dtypes = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True), "fp32": (torch.float32, False)}
    for mode, dtype, hidden, batch in itertools.product(("RNN_TANH", "LSTM", "GRU"), dtypes, HIDDEN, BATCHES):
        for backward in (False, True):
            of, tf32 = dtypes[dtype]
            plan = torch.ops.rnnfast.cuda_plan(mode, of, batch, hidden, False, False, tf32, backward, NO_DEVICE)
            which = "backward" if backward else "forward"
            yield f"{mode:<10}{dtype:<5}{hidden:>7}{batch:>6}  {which:<10}{plan}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=[], help="compute capabilities, such as 90")
    parser.add_argument("-k", default="", help="only kernels whose line has this")
    args = parser.parse_args()
    if args.arch:
        os.environ["RNNFAST_CUDA_ARCHS"] = " ".join(args.arch)
    folder = compile()
    found = [kernel for kernel in kernels(folder) if args.k in " ".join(kernel[:3])]
    header = ("target", "kernel", "template arguments")
    widths = [max(map(len, column)) + 2 for column in zip(header, *(kernel[:3] for kernel in found))]
    row = lambda *cells: "".join(cell.ljust(width) for cell, width in zip(cells, widths))
    print(f"{row(*header)}registers  stack  spilled")
    for kernel in found:
        print(f"{row(*kernel[:3])}{kernel.registers:9}{kernel.stack:7}{kernel.spilled:9}")
    spilling = [kernel for kernel in found if kernel.spilled]
    persistent, most = sum(kernel.persistent for kernel in spilling), max((k.spilled for k in spilling), default=0)
    others = len(spilling) - persistent
    print(f"{len(found)} kernels, {persistent} persistent ones spill and {others} others, {most} bytes at most")
    print(*warnings(folder), sep="\n")
    print(*(row for row in plans(folder) if args.k.lower() in row.lower()), sep="\n")
    return most > TOLERATED


if __name__ == "__main__":
    sys.exit(main())
