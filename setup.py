"""Builds the native library, rnnfast/_cpu.so; everything else about the package is in pyproject.toml.

The library uses torch's stable ABI and is loaded by `torch.ops.load_library`, so one build serves every torch from
2.10 on and every Python: it is no Python module, and the wheel is tagged py3-none-PLATFORM.
"""

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

# The kernels are compiled once per instruction set; the library picks one at run time.
INSTRUCTION_SETS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = "-march=x86-64-v4 -mprefer-vector-width=512"
    INSTRUCTION_SETS |= {"avx2": "-march=x86-64-v3", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}
    INSTRUCTION_SETS |= {"amx": f"{AVX512} -mavx512bf16 -DRNNFAST_AMX"}

FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -DTORCH_TARGET_VERSION=0x020a000000000000"
# Not -ffast-math: NaN and infinities are results here.
KERNEL_FLAGS = "-fno-math-errno -fno-trapping-math -ffp-contract=fast"


def quote(words):
    return " ".join(shlex.quote(str(word)) for word in words)


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(root, output):
    """The build as the text of a build.ninja file."""
    from torch.utils.cpp_extension import include_paths, library_paths

    # Messages and debug information name sources from the root on, wherever that is.
    flags = [f"-ffile-prefix-map={root}=.", *(f"-isystem{path}" for path in include_paths())]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {FLAGS} {quote(flags)} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out {quote(libraries)} {os.environ.get('LDFLAGS', '')}",
    ]
    objects = []

    def compile(source, name, extra=""):
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: compile {escape(root / 'csrc' / source)}", f"  extra = {extra}"])

    for isa, flags in INSTRUCTION_SETS.items():
        compile("cpu/kernels.cpp", f"kernels_{isa}", f"-DRNNFAST_ISA={isa} {KERNEL_FLAGS} {flags}")
    compile("ops.cpp", "ops")
    compile("cpu/recurrence.cpp", "recurrence")
    lines += [f"build {escape(output)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        root, build = Path(__file__).resolve().parent, Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(root, output))
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        subprocess.check_call([*ninja, "-C", str(build)])


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def files(pattern):
    """What a source distribution has to hold."""
    root = Path(__file__).resolve().parent
    return sorted(str(path.relative_to(root)) for path in (root / "csrc").rglob(pattern))


setup(
    ext_modules=[Extension("rnnfast._cpu", sources=files("*.cpp"), depends=files("*.h"))],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)
