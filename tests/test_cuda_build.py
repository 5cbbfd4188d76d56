"""The CUDA library without a GPU: when it is built, how, and that it loads anywhere."""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import load
from torch.utils.cpp_extension import include_paths

import rnnfast

ROOT = Path(__file__).parents[1]


setup, resources = load("setup.py"), load("bench/cuda_resources.py")
needs_nvcc = pytest.mark.skipif(setup.find_nvcc() is None, reason="no nvcc in CUDA_HOME/bin or on PATH")


def output(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built() -> Path:
    """The folder of a build for one target; the next run finds there what has not changed."""
    (ROOT / "build").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, open(ROOT / "build" / "cuda.lock", "w") as lock:
        patch.setenv("RNNFAST_CUDA_ARCHS", "90")
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of pytest-xdist wait
        return resources.compile()


@pytest.mark.full
@needs_nvcc
def test_persistent_kernels_hardly_spill(built: Path) -> None:
    """At most a dozen registers, which are mostly out of the way before the first step; and the others none."""
    kernels = resources.kernels(built)
    assert {kernel.arch for kernel in kernels} == {"sm_90"}
    persistent = [kernel for kernel in kernels if kernel.persistent]
    for name in ("forward", "backward"):
        for cell in setup.CELLS:
            assert any(name in kernel.name and cell in kernel.arguments for kernel in persistent), (name, cell)
    assert not [kernel for kernel in persistent if kernel.spilled > resources.TOLERATED]
    of_steps = [kernel for kernel in kernels if not kernel.persistent]
    assert sum(kernel.name.startswith("joint") for kernel in of_steps) == len(setup.CELLS) * 5 * 2 * 2
    assert not [kernel for kernel in of_steps if kernel.spilled]
    assert not resources.warnings(built)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
        /*0010*/               @P0 BRA 0x70 ;                  /* 0x0 */
        /*0020*/                   LDS.128 R4, [R2] ;          /* 0x0 */
        /*0030*/                   HMMA.16816.F32 R4, R8 ;     /* 0x0 */
        /*0040*/             @!UP1 UIADD3 UR4, UR4, 0x1, URZ ; /* 0x0 */
        /*0050*/              @!P2 BRA 0x30 ;                  /* 0x0 */
        /*0060*/               @P1 BRA 0x20 ;                  /* 0x0 */
        /*0070*/                   EXIT ;                      /* 0x0 */
        /*0080*/                   BRA 0x10 ;                  /* 0x0 */
        /*0090*/                   BRA 0x90;                   /* 0x0 */
        /*00a0*/                   NOP;                        /* 0x0 */
"""


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("cuda_instructions")


def test_a_step_in_machine_code(instructions: ModuleType) -> None:
    assert instructions.largest_loop(SASS) == ["LDS", "HMMA", "UIADD3", "BRA", "BRA"]
    assert instructions.largest_loop(SASS.replace("0x20 ;", "0x70 ;").replace("0x30 ;", "0x70 ;")) == []
    assert instructions.whole(SASS) == ["LDC", "BRA", "LDS", "HMMA", "UIADD3", "BRA", "BRA", "EXIT", "BRA"]


@pytest.mark.full
@needs_nvcc
def test_steps_have_products(built: Path, instructions: ModuleType) -> None:
    found = list(instructions.kernels(built, "90"))
    assert sorted((name, arguments) for name, arguments, _ in found) == [
        kernel[1:3] for kernel in resources.kernels(built)
    ]
    with_products = {kernel[1:3] for kernel in resources.kernels(built) if kernel.persistent or "joint" in kernel.name}
    for name, arguments, counts in found:
        assert (counts["products"] > 0 and counts["shared"] > 0) == ((name, arguments) in with_products)


@needs_nvcc
def test_the_guard_against_waiting_for_ever_compiles(tmp_path: Path) -> None:
    """Of a debug build what it adds, in the code of every wait."""
    source = tmp_path / "waits.cu"
    source.write_text(
        '#include "exchange.cuh"\n'
        "using namespace rnnfast;\n"
        "__global__ void waits(Geometry g, Member m) { Cluster::wait(g, m, 1), Grid::wait(g, m, 1); }\n"
    )
    headers = [f"-I{path}" for path in include_paths()]
    command = [setup.find_nvcc(), "-std=c++17", "--ptx", "-arch=sm_90", f"-I{ROOT / 'csrc' / 'cuda'}", *headers]
    built = {}
    for name, flags in {"release": [], "debug": ["-DRNNFAST_DEBUG"]}.items():
        target = tmp_path / f"{name}.ptx"
        subprocess.run([*command, *flags, "-o", target, source], check=True)
        built[name] = target.read_text()
    assert "trap;" in built["debug"] and "trap;" not in built["release"]


@pytest.mark.full
@needs_nvcc
def test_library_needs_no_cuda(built: Path) -> None:
    """It brings its runtime along, for itself alone: torch may have another one, or none."""
    needed = [line for line in output("readelf", "--dynamic", built / "_cuda.so").splitlines() if "NEEDED" in line]
    assert any("torch_cpu" in line for line in needed)
    assert not [line for line in needed if "cuda" in line]
    assert "cuda" not in output("nm", "--dynamic", "--defined-only", built / "_cuda.so")


@pytest.mark.full
@needs_nvcc
def test_library_loads(built: Path, tmp_path: Path) -> None:
    """Into a package that has no other."""
    shutil.copytree(Path(rnnfast.__file__).parent, tmp_path / "rnnfast", ignore=shutil.ignore_patterns("*.so"))
    script = """
import sys, torch, rnnfast
torch.ops.load_library(sys.argv[1])
for name in ("cuda_forward_steps", "cuda_backward_steps", "cuda_states_before"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rnnfast::{name}", "CUDA"), name
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert output(sys.executable, "-c", script, built / "_cuda.so", cwd=tmp_path, env=environment) == ""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that knows no Blackwell, on PATH, and nothing else there."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80; echo compute_86; echo compute_90\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    for name in ("CUDA_HOME", "RNNFAST_CUDA", "RNNFAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return nvcc


@pytest.mark.parametrize("of_torch", (None, "12.8"))
@pytest.mark.parametrize("has_nvcc", (True, False))
@pytest.mark.parametrize("wanted", ("", "0", "1"))
def test_when_it_is_built(
    nvcc: Path, wanted: str, has_nvcc: bool, of_torch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setenv("RNNFAST_CUDA", wanted)
    if not has_nvcc:
        nvcc.unlink()
    if wanted == "1" and not has_nvcc:
        with pytest.raises(SystemExit, match="needs nvcc, which is neither in CUDA_HOME/bin nor on PATH"):
            setup.wants_cuda()
    else:
        assert setup.wants_cuda() == (wanted == "1" or (wanted == "" and has_nvcc and of_torch is not None))


def test_settings(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNFAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="RNNFAST_CUDA has to be 0, 1 or unset, not 'yes'"):
        setup.wants_cuda()
    assert setup.cuda_archs() == ["80", "90", "90+PTX"]
    monkeypatch.setenv("RNNFAST_CUDA_ARCHS", "86+PTX 100a")
    assert setup.cuda_archs() == ["86+PTX", "100a"]
    text = setup.ninja_file(cuda=Path("/there/_cuda.so"))
    assert f"nvcc = {nvcc} " in text and "-gencode=arch=compute_100a,code=sm_100a" in text
    assert "-gencode=arch=compute_86,code=compute_86" in text and "cpu/" not in text
    other = shutil.copytree(nvcc.parent, nvcc.parents[1] / "home" / "bin") / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(other.parents[1]))
    assert setup.find_nvcc() == str(other)
