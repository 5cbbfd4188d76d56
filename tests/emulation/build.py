"""Builds by a C++ compiler, into build/emulation: the kernels of csrc/cuda with the host emulation of their device, and
those of csrc/cpu with sanitizers.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from rnnfast.cells import MODES

ROOT = Path(__file__).resolve().parents[2]

# Kernels look at the same bytes as several types, which nvcc allows. Products and sums are not contracted, so that
# results do not depend on the host's instruction set; which of them nvcc contracts is its own affair.
FLAGS = "-x c++ -std=c++17 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=off"
FLAGS += " -DTORCH_TARGET_VERSION=0x020a000000000000 -DRNNFAST_DEVICE_KEY=CPU"

# Beside the kernels, as in setup.py.
CPU_SOURCES = ("recurrence", "flex", "plain", "instruction_sets", "scratch", "threads")

# What UndefinedBehaviorSanitizer says of pointers, AddressSanitizer sees as soon as they are used; without it the CPU's
# kernels compile in two minutes of ten. Its checks are calls, not code in place: that halves the time once more.
ADDRESS = "-fsanitize=address --param asan-instrumentation-with-call-threshold=0"
UNDEFINED = "-fsanitize=undefined -fno-sanitize=null,alignment,pointer-overflow,object-size,vptr -fno-sanitize-recover"


def library(sanitize: bool = False) -> Path:
    """The operators of csrc/cuda for CPU tensors. With `sanitize`, Python has to run with LD_PRELOAD=preload()."""
    return _build("library.so", sanitize)


def cpu_library() -> Path:
    """rnnfast/_cpu.so with the portable instruction set alone, sanitized: Python has to run as for library()."""
    return _build("_cpu.so", sanitize=True)


def selftest(sanitize: bool = False) -> Path:
    """The program of selftest.cpp: the emulation by itself, without torch's libraries."""
    return _build("selftest", sanitize)


def has_sanitizer() -> bool:
    """Whether the compiler comes with AddressSanitizer."""
    command = [*shlex.split(_compiler()), "-fsanitize=address", "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"int main() {}", capture_output=True).returncode == 0


def preload() -> str:
    """What a Python needs that loads the sanitized library: the sanitizer, and the exceptions that it watches."""
    find = [[*shlex.split(_compiler()), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    return ":".join(subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in find)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _ninja_file(sanitize: bool) -> str:
    includes = [f"-I{ROOT / 'tests/emulation'}", f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include_paths())]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    lines = [
        f"cxx = {_compiler()} {f'-O1 -g1 {ADDRESS}' if sanitize else '-O2'}",
        f"flags = {FLAGS} {shlex.join(includes)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $extra",
    ]

    def compile(source: str, name: str, extra: str = "") -> str:
        escaped = str(ROOT / source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines.extend([f"build {name}.o: compile {escaped}", f"  extra = {extra}"])
        return f"{name}.o"

    def link(target: str, objects: list[str], extra: str = "") -> None:
        lines.extend([f"build {target}: link {' '.join(objects)}", f"  extra = {extra}"])

    emulation = compile("tests/emulation/emulation.cpp", "emulation", "" if sanitize else "-O3")  # -O3 vectorises
    objects = [compile(f"csrc/cuda/{name}.cu", name) for name in ("stepwise", "recurrence")]
    for cell in MODES.values():
        for name in ("persistent", "joint"):
            defines = f"-DRNNFAST_CELL={cell.cpp_name} -DRNNFAST_TABLE={cell.cpp_name}_{name}"
            objects.append(compile(f"csrc/cuda/{name}.cu", f"{name}_{cell.cpp_name}", defines))
    ops = compile("csrc/ops.cpp", "ops")
    link("library.so", [emulation, ops, *objects], f"-shared {shlex.join(libraries)}")
    if sanitize:
        flags = f"-DRNNFAST_ISA=portable -DRNNFAST_PORTABLE {UNDEFINED}"
        names = *CPU_SOURCES, "kernels", "flex_kernels"
        objects = [compile(f"csrc/cpu/{name}.cpp", f"cpu_{name}", flags) for name in names]
        link("_cpu.so", [ops, *objects], f"-shared -fsanitize=undefined {shlex.join(libraries)}")
    link("selftest", [emulation, compile("tests/emulation/selftest.cpp", "selftest_cases")])
    return "\n".join([*lines, ""])


def _build(target: str, sanitize: bool) -> Path:
    folder = ROOT / "build" / "emulation" / ("sanitized" if sanitize else "plain")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # several pytest workers may want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(_ninja_file(sanitize))
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        done = subprocess.run([*ninja, "-C", str(folder), target], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{target} of the emulation was not built:\n{done.stdout}")
    return folder / target
