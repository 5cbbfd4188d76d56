"""The Triton backend without a GPU: what compiles for which, what the plan chooses, what is said where it is missing.

Its numbers are tested with those of every other backend, in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import interpreter
import pytest
import torch
from helpers import choose, chooser
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import gpu
from rnnfast.backends import DTYPES
from rnnfast.cells import CELLS, GATES, UNIT_WEIGHTS
from rnnfast.triton import kernels, plan_on
from rnnfast.triton.plan import Chip, plan

ROOT = Path(__file__).parents[1]
H200 = Chip(shared_memory=227 * 1024, processors=132, generation=9)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


TARGETS = [
    "sm_90",
    *(pytest.param(target, marks=pytest.mark.full) for target in ("sm_80", "sm_100", "gfx942", "gfx1100")),
]


def compiled(*command: str) -> str:
    """What a command says that compiles, for which Triton must not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_calls_compile(target: str) -> None:
    """What layers' calls launch, as Triton specialises it."""
    assert " 0 fail" in compiled("tests/named_gpu.py", target)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target: str) -> None:
    """Of every cell and dtype; the command fails if a fused kernel spills or wants more than there is."""
    lines = compiled("bench/resources.py", "--largest", "--target", target).splitlines()
    found = {tuple(line.split()[1:4]) for line in lines if f"{target} " in line and "fused" in line}
    dtypes = ("bf16", "tf32", "fp32") if target.startswith("gfx") else ("bf16", "tf32", "fp32", "fp64")
    # On RDNA cells with weights of the units' own spill, so they are not fused there.
    cells = [mode for mode in CELLS if mode != "RNN_RELU" and not (target == "gfx1100" and UNIT_WEIGHTS[mode])]
    assert found == {(kernel, cell, d) for kernel in ("forward", "backward") for cell in cells for d in dtypes}


@pytest.mark.parametrize(
    ("mode", "dtype", "largest"),
    [
        ("LSTM", torch.bfloat16, 128),
        ("LSTM", torch.float16, 128),
        ("LSTM", torch.float32, 64),
        ("LSTM", torch.float64, 32),
        ("GRU", torch.bfloat16, 128),
        ("GRU", torch.float32, 64),
        ("RNN_TANH", torch.bfloat16, 256),
        ("RNN_TANH", torch.float32, 128),
    ],
)
@pytest.mark.parametrize("tf32", (True, False))
def test_plan(mode: str, dtype: torch.dtype, largest: int, tf32: bool) -> None:
    """One multiprocessor of an H200 holds layers up to a size, whatever the batch, and none with a projection."""
    for hidden in range(1, 2 * largest):
        for batch in (1, 64, 5000):
            how = plan(mode, dtype, hidden, batch, False, tf32, H200)
            assert how.fused == (hidden <= largest)
            assert how.reason.startswith("fused: " if how.fused else "stepwise: ")
            exact = "ieee" if dtype != torch.float32 else "tf32x3"
            assert how.precision == ("tf32" if tf32 and dtype == torch.float32 else exact)
            assert not how.fused or (hidden <= how.units < max(2 * hidden, 17))
    assert not plan(mode, dtype, 8, 1, True, tf32, H200).fused
    small = Chip(shared_memory=48 * 1024, processors=16, generation=8)
    assert plan(mode, dtype, 16, 1, False, tf32, small).fused
    assert not plan(mode, dtype, largest, 1, False, tf32, small).fused or dtype == torch.float64


@pytest.mark.parametrize("mode", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plan_of_other_chips(mode: str, dtype: torch.dtype) -> None:
    """Blackwell's tensor memory would take tiles of 64 units by 16 rows; RDNA fuses only what does not spill there."""
    blackwell = Chip(shared_memory=227 * 1024, processors=148, generation=10)
    cdna, rdna = (Chip(64 * 1024, 48, warp_size=size) for size in (64, 32))
    for hidden in range(1, 1100, 9):
        for batch in (1, 64, 5000):
            how = plan(mode, dtype, hidden, batch, False, False, blackwell)
            assert how.units < 64 or how.rows < 16
            on_cdna, on_rdna = (plan(mode, dtype, hidden, batch, False, False, chip) for chip in (cdna, rdna))
            assert on_cdna.fused >= on_rdna.fused
            assert not on_rdna.fused or GATES[mode] * on_rdna.units**2 * dtype.itemsize < 8 * 1024
    assert plan(mode, torch.bfloat16, 16, 1, False, False, rdna).fused == (UNIT_WEIGHTS[mode] == 0)
    assert plan(mode, torch.bfloat16, 64, 1, False, False, cdna).fused


def test_batch_and_steps_make_no_new_kernels() -> None:
    """At most two plans for all batch sizes of a layer, and sizes that vary are not compiled in."""
    for hidden, dtype in ((64, torch.bfloat16), (512, torch.bfloat16), (100, torch.float32), (700, torch.float64)):
        plans = {plan("LSTM", dtype, hidden, n, False, True, H200)[1:3] for n in (*range(1, 300), 1056, 1057, 9999)}
        assert len(plans) <= 3
    assert set(kernels.VARYING) == {"step", "T", "N", "R"}


@pytest.mark.skipif(not interpreter.ENABLED, reason="there is a GPU, where test_gpu.py has this test")
def test_explain_names_the_kernel() -> None:
    with rnnfast.use_backend("triton"):
        small, large, projected = (
            rnnfast.explain(layer)[0]
            for layer in (rnnfast.LSTM(4, 5), rnnfast.LSTM(4, 200), rnnfast.LSTM(4, 5, proj_size=3))
        )
    assert small[2:4] == large[2:4] == ("torch.float32 on cpu", "triton")
    assert small.reason == "fused: W_hh, padded to 16 units, is 4 KB a direction and stays on a multiprocessor"
    assert large.reason.startswith("stepwise: W_hh, padded to 256 units, is 1024 KB a direction, more than the ")
    assert projected.reason == "stepwise: a projection makes another product a step"
    assert plan_on(CPU, "LSTM", torch.float32, 200, False).reason == large.reason


@pytest.mark.parametrize("lack", ("gpu", "capability", "triton"))
def test_what_is_missing_is_said(lack: str, gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(*([] if lack == "gpu" else [(9, 0), (7, 5) if lack == "capability" else (8, 0)]))
    if lack == "triton":
        monkeypatch.setattr(chooser, "_HAS_TRITON", False)
    reason = {
        "gpu": "torch finds no GPU that it can use",
        "capability": "GPU 1 has compute capability 7.5, the kernels need 8.0",
        "triton": "Triton is not installed",
    }[lack]
    assert rnnfast.backends()["triton"] == (False, reason)
    with (
        pytest.raises(RuntimeError, match=f"backend 'triton' is missing here: {reason}"),
        rnnfast.use_backend("triton"),
    ):
        pass
    reason = f"no library; {reason}" if lack == "triton" else reason  # what the CUDA kernels lack is said, too
    device = torch.device("cuda", 1)
    assert choose("LSTM", device, torch.float32) == ("torch", reason)


def test_a_gpu_gets_triton(gpus: Callable[..., None]) -> None:
    gpus((9, 0), (7, 5))
    assert choose("LSTM", CUDA, torch.float32) == ("triton", "Triton kernels")
    assert choose("LSTM", CUDA, torch.complex64)[0] == "reference"
    assert choose("LSTM", CPU, torch.float32)[0] != "triton"
    with rnnfast.use_backend("reference"):
        assert choose("LSTM", CUDA, torch.float32)[0] == "reference"
    gpus((9, 0))
    with rnnfast.use_backend("triton"), pytest.raises(RuntimeError, match="does not serve device 'cpu'"):
        choose("LSTM", CPU, torch.float32)
    with rnnfast.use_backend("cpu"), pytest.raises(RuntimeError, match="does not serve device 'cuda'"):
        choose("LSTM", CUDA, torch.float32)


def test_other_backends_leave_the_gpu_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for a GPU would start its driver, which a forked child cannot use."""
    for name in ("triton", "cuda"):
        asleep = chooser.BACKENDS[name]._replace(probe=lambda device: pytest.fail("looked for a GPU"))
        monkeypatch.setitem(chooser.BACKENDS, name, asleep)
    with rnnfast.use_backend("reference"):
        rnnfast.LSTM(4, 5)(torch.randn(3, 2, 4))


@pytest.mark.skipif(not interpreter.ENABLED, reason="counts calls on a CPU")
def test_tables_of_packed_rows_are_made_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all layers and their backward; and anew for other batch sizes, also if they come in the same tensor."""
    made: list[list[int]] = []
    make = gpu._make_tables
    monkeypatch.setattr(gpu, "_last_tables", {})
    monkeypatch.setattr(gpu, "_make_tables", lambda sizes, device: made.append(sizes.tolist()) or make(sizes, device))
    layer = rnnfast.GRU(3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, requires_grad=True)
    sizes = torch.tensor([3, 1, 1])
    found = []
    for backend in ("triton", "reference"):
        with rnnfast.use_backend(backend):
            for values in ([3, 1, 1], [2, 2, 1], [2, 2, 1]):
                sizes.copy_(torch.tensor(values))
                y, h = layer(PackedSequence(x, sizes))
                (dx,) = torch.autograd.grad(y.data.sum() + h.sum(), x)
                found += [y.data, h, dx]
    assert made == [[3, 1, 1], [2, 2, 1]]
    for ours, theirs in zip(found[:9], found[9:]):
        torch.testing.assert_close(ours, theirs)
