"""Builds the native libraries, rnnfast/_cpu.so and rnnfast/_cuda.so; all else about the package is in pyproject.toml.

They use torch's stable ABI and are loaded by `torch.ops.load_library`, so one build serves every torch from 2.10 on and
every Python: they are no Python modules, and the wheel is tagged py3-none-PLATFORM.

_cuda.so is built where torch is a CUDA build and nvcc is in CUDA_HOME/bin or on PATH; with RNNFAST_CUDA=1 against a CPU
build of torch, too; with RNNFAST_CUDA=0 never. RNNFAST_CUDA_ARCHS="80 90 90+PTX" names the compute capabilities that
it is for.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# The kernels are compiled once per instruction set; the library picks one at run time.
INSTRUCTION_SETS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = "-march=x86-64-v4 -mprefer-vector-width=512"
    INSTRUCTION_SETS |= {"avx2": "-march=x86-64-v3", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}
    INSTRUCTION_SETS |= {"amx": f"{AVX512} -mavx512bf16 -DRNNFAST_AMX"}

# Compiled once, beside the kernels.
CPU_SOURCES = ("recurrence", "flex", "plain", "stream", "instruction_sets", "scratch", "threads")

FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -DTORCH_TARGET_VERSION=0x020a000000000000"
# Not -ffast-math: NaN and infinities are results here.
KERNEL_FLAGS = "-fno-math-errno -fno-trapping-math -ffp-contract=fast"


def _cells():
    spec = importlib.util.spec_from_file_location("cells", ROOT / "rnnfast" / "cells.py")
    sys.modules["cells"] = cells = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cells)
    return [cell.cpp_name for cell in cells.MODES.values()]


CELLS = _cells()  # for each the CUDA kernels with products are two objects

# Of all GPUs since Ampere: code for one runs on later ones of its generation. PTX is for generations to come: their
# driver compiles it, which takes it a minute.
CUDA_ARCHS = ("80", "90", "100", "120", "90+PTX")
# What ptxas says of registers and spills is left beside each object, for bench/cuda_resources.py.
NVCC_FLAGS = "-forward-unknown-to-host-compiler --expt-relaxed-constexpr -Xptxas -v"


def find_nvcc():
    folders = [f"{os.environ.get('CUDA_HOME', '')}/bin", os.environ.get("PATH", os.defpath)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def wants_cuda():
    import torch

    wanted = os.environ.get("RNNFAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"RNNFAST_CUDA has to be 0, 1 or unset, not {wanted!r}")
    if wanted == "1" and not find_nvcc():
        sys.exit("RNNFAST_CUDA=1 needs nvcc, which is neither in CUDA_HOME/bin nor on PATH")
    return wanted == "1" or (wanted == "" and torch.version.cuda is not None and find_nvcc() is not None)


def cuda_archs():
    known = subprocess.check_output([find_nvcc(), "--list-gpu-arch"], text=True).split()
    named = os.environ.get("RNNFAST_CUDA_ARCHS", "").split()
    return named or [arch for arch in CUDA_ARCHS if f"compute_{arch.removesuffix('+PTX')}" in known]


def gencode(arch):
    number = arch.removesuffix("+PTX")
    return f"-gencode=arch=compute_{number},code={'compute' if arch != number else 'sm'}_{number}"


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(cpu=None, cuda=None):
    """The build of these libraries, or of one, as the text of a build.ninja file."""
    from torch.utils.cpp_extension import include_paths, library_paths

    # Messages and debug information name sources from the root on, wherever that is.
    names = shlex.quote(f"-ffile-prefix-map={ROOT}=.")
    headers = shlex.join(word for path in include_paths() for word in ("-isystem", path))
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {FLAGS} {headers}",
        "rule cpp",
        f"  command = $cxx -MMD -MF $out.d $flags {names} {os.environ.get('CXXFLAGS', '')} $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cu",
        "  command = $nvcc -MMD -MF $out.d $flags $extra -c $in -o $out >$out.log 2>&1 || ! cat $out.log",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $linker -shared $in -o $out {shlex.join(libraries)} {os.environ.get('LDFLAGS', '')}",
    ]

    def compile(source, extra="", variant=""):
        stem, rule = source.split(".")
        lines.extend([f"build {stem}{variant}.o: {rule} {escape(ROOT / 'csrc' / source)}", f"  extra = {extra}"])
        return f"{stem}{variant}.o"

    def link(linker, output, objects):
        lines.extend([f"build {escape(output)}: link {' '.join(objects)}", f"  linker = {linker}"])

    ops = compile("ops.cpp")
    if cuda:
        archs = " ".join(map(gencode, cuda_archs()))
        names = shlex.quote(f"-Xcompiler={names}")  # nvcc has a shell of its own read it
        lines.insert(0, f"nvcc = {shlex.quote(find_nvcc())} {NVCC_FLAGS} {names} {archs}")
        objects = [ops, compile("cuda/stepwise.cu"), compile("cuda/recurrence.cu", "-DRNNFAST_DEVICE_KEY=CUDA")]
        for cell in CELLS:
            for name in ("persistent", "joint"):
                defines = f"-DRNNFAST_CELL={cell} -DRNNFAST_TABLE={cell}_{name}"
                objects.append(compile(f"cuda/{name}.cu", defines, f"_{cell}"))
        # nvcc links CUDA's runtime statically. It is not exported: torch has its own.
        link("$nvcc -nodlink -Wl,--exclude-libs,ALL", cuda, objects)
    if cpu:
        objects = [ops, *(compile(f"cpu/{name}.cpp") for name in CPU_SOURCES)]
        for isa, flags in INSTRUCTION_SETS.items():
            extra = f"-DRNNFAST_ISA={isa} {KERNEL_FLAGS} {flags}"
            objects += [compile(f"cpu/{name}.cpp", extra, f"_{isa}") for name in ("kernels", "flex_kernels")]
        link("$cxx", cpu, objects)
    return "\n".join([*lines, ""])


def build(folder, **libraries):
    """Build these libraries, as of ninja_file, again only what has changed since the folder's last build."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(**libraries))
    ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    subprocess.check_call([*ninja, "-C", str(folder)], stdout=sys.stderr)


class BuildLibraries(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        if not wants_cuda():
            self.extensions = [ext for ext in self.extensions if ext.name != "rnnfast._cuda"]
            Path(self.build_lib, "rnnfast", "_cuda.so").unlink(missing_ok=True)  # an earlier build's would be packed
        super().run()

    def build_extensions(self):
        libraries = {e.name.split("_")[-1]: Path(self.get_ext_fullpath(e.name)).resolve() for e in self.extensions}
        build(Path(self.build_temp).resolve(), **libraries)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("rnnfast._cpu", sources=[]), Extension("rnnfast._cuda", sources=[])],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
    )
