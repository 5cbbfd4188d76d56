"""Machine instructions of a step of every CUDA kernel, by what they do.

    python bench/cuda_instructions.py                 # of an H100's kernels, which it builds first
    python bench/cuda_instructions.py -k Lstm         # of one cell

Of a persistent kernel a step is its loop over the steps, of the others all they have. It needs nvcc, and cuobjdump and
nvdisasm, which Triton brings along where CUDA's are not on PATH. Loops within a step are counted once, however often
they run, and so are paths that few steps take: the numbers are for comparing a kernel with what it was before a change,
not for predicting microseconds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import cuda_resources

# What an instruction begins with, for each column; all others are arithmetic, addresses and predicates.
COLUMNS = {
    "products": ("HMMA", "HGMMA", "UTCHMMA", "DMMA"),
    "shared": ("LDS", "STS"),
    "memory": ("LD", "ST", "LDG", "STG", "LDL", "STL", "LDGSTS", "STAS", "ATOM", "RED"),
    "constants": ("LDC", "ULDC", "LDCU"),
    "barriers": ("BAR", "UCGABAR", "SYNCS", "WARPSYNC", "MEMBAR", "DEPBAR", "LDGDEPBAR", "ERRBAR", "CGAERRBAR", "CCTL"),
    "jumps": ("BRA", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "EXIT"),
}
COLUMN_OF = {opcode: column for column, opcodes in COLUMNS.items() for opcode in opcodes}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9]*)\S*(.*?);", re.MULTILINE)


def tool(name: str) -> str:
    """A program of CUDA's."""
    triton = find_spec("triton")
    brought = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    found = shutil.which(name) or (str(brought) if brought and brought.exists() else None)
    return found or sys.exit(f"there is no {name} on PATH, nor a Triton that has one")


def largest_loop(code: str) -> list[str]:
    """The opcodes between the target of the backward jump that goes furthest and that jump, without padding.

    Rarely taken paths lie behind the end of a kernel and jump back from there: that is no loop.
    """
    instructions = [(int(at, 16), opcode, operands) for at, opcode, operands in INSTRUCTION.findall(code)]
    begin = end = last_exit = 0
    for at, opcode, operands in instructions:
        if opcode == "EXIT":
            last_exit = at
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode == "BRA" else None
        if target and int(target[1], 16) > last_exit and at - int(target[1], 16) > end - begin:
            begin, end = int(target[1], 16), at
    return [opcode for at, opcode, _ in instructions if begin <= at <= end and end and opcode != "NOP"]


def whole(code: str) -> list[str]:
    """All opcodes, without padding: an endless loop behind the end, and what follows it."""
    found = [opcode for _, opcode, _ in INSTRUCTION.findall(code) if opcode != "NOP"]
    return found[:-1] if found[-1:] == ["BRA"] else found


CODE_OF_A_STEP = {"persistent": largest_loop, "joint": whole, "stepwise": whole}  # by source


def kernels(folder: Path, arch: str) -> Iterator[tuple[str, str, Counter[str]]]:
    """Of each kernel of a recurrence its name, its template arguments and a step's instructions by columns."""
    environment = os.environ | {"NVDISASM_PATH": tool("nvdisasm")}
    for log in cuda_resources.logs(folder):
        name = log.name.partition("_")[0].partition(".")[0]
        if name not in CODE_OF_A_STEP:
            continue
        command = [tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", log.with_suffix("")]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        functions = [part.partition("\n") for part in text.split("Function : ")[1:]]
        names = cuda_resources.demangle([name for name, _, _ in functions])
        for (kernel, arguments), (_, _, code) in zip(names, functions):
            step = CODE_OF_A_STEP[name](code)
            yield kernel, arguments, Counter(COLUMN_OF.get(opcode, "other") for opcode in step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="the GPU's compute capability (default: %(default)s)")
    parser.add_argument("-k", default="", help="only kernels whose line has this")
    args = parser.parse_args()
    os.environ["RNNFAST_CUDA_ARCHS"] = args.arch
    columns = [*COLUMNS, "other"]
    print(f"{'kernel':<18}{'template arguments':<46}{'instructions':>13}", *(f"{column:>10}" for column in columns))
    for kernel, arguments, counts in sorted(kernels(cuda_resources.compile(), args.arch), key=lambda of: of[:2]):
        if args.k in f"{kernel} {arguments}":
            print(f"{kernel:<18}{arguments:<46}{counts.total():>13}", *(f"{counts[column]:>10}" for column in columns))


if __name__ == "__main__":
    main()
