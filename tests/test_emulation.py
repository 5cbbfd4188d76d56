"""The host emulation under the tests of csrc/cuda: what it computes, and that it reports mistakes as such.

The cases, and the seeds that each runs with, are in emulation/selftest.cpp.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from emulation import build
from helpers import HANG

MISTAKES = {
    "barrier_without_expect": [
        "deadlock: block 1: 64 threads in barrier_wait(shared + 0, parity 0) for -16 bytes and barrier_expect"
    ],
    "poll_without_store": ["deadlock: block 0: 64 threads polling; block 1: 64 threads polling"],
    "sync_without_one": ["deadlock: block 1: 63 threads at sync_block, 1 threads that exited"],
    "mma_without_one": ["deadlock: block 1: 31 threads at mma, 33 threads that exited"],
    "store_into_exited": [
        "block 1 exited before a store_async to it arrived",
        "store_async: block 1 has exited",
    ],
    "exception": ["thrown by a thread"],
}


def run(case: str, sanitize: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run([build.selftest(sanitize), case], capture_output=True, text=True, timeout=HANG)


CASES = ["grid", "cluster", "neighbours", "launches", "mma_bfloat16", "mma_half", "mma_tf32", "mma_double"]


@pytest.mark.parametrize("case", [*CASES, "mma_truncates"])
def test_computes(case: str) -> None:
    done = run(case)
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


@pytest.mark.parametrize("case", MISTAKES)
def test_reports(case: str) -> None:
    assert sorted(run(case).stdout.splitlines()) == MISTAKES[case]


@pytest.mark.full
def test_with_address_sanitizer() -> None:
    """It finds a byte beyond a block's shared memory, and nothing wrong with the fibres."""
    if not build.has_sanitizer():
        pytest.skip("this compiler has no AddressSanitizer")
    assert run("cluster", sanitize=True).stdout == "ok\n"
    assert run("exception", sanitize=True).stdout == "thrown by a thread\n"
    report = run("beyond_shared_memory", sanitize=True).stderr
    assert "0 bytes to the right of 1024-byte region" in report or "0 bytes after 1024-byte region" in report


KERNELS = """
import sys, torch, rnnfast
torch.ops.load_library(sys.argv[1])
torch.manual_seed(0)
torch.backends.cudnn.rnn.fp32_precision = sys.argv[2]
runs = 0
for cell, hidden, dtype in ((c, h, d) for c in ("RNN", "LSTM", "GRU") for h in (5, 40, 67) for d in sys.argv[3:]):
    layer = getattr(rnnfast, cell)(3, hidden, bidirectional=True, dtype=getattr(torch, dtype))
    x = torch.randn(3, 11, 3, dtype=getattr(torch, dtype), requires_grad=True)
    lengths = torch.randint(0, 4, (11,))
    for regime in range(6):
        torch.ops.rnnfast.cuda_regime(regime)
        for beyond in (11, 8, 0):  # all rows, all but a block's, and none at all have steps
            with rnnfast.use_backend("cuda"):
                y, _ = layer(x, lengths=torch.where(torch.arange(11) < beyond, lengths, 0))
                y.backward(y.detach())
            runs += 1
print(runs)
"""


@pytest.mark.full
def test_kernels_with_address_sanitizer() -> None:
    """None reads or writes beyond its block's shared memory, or the tensors."""
    if not build.has_sanitizer():
        pytest.skip("this compiler has no AddressSanitizer")
    library = build.library(sanitize=True)
    # Python never frees all that it has, and neither does the emulation its fibres.
    environment = os.environ | {"LD_PRELOAD": build.preload(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", KERNELS, library, "ieee", "float32", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG)
    assert done.stdout == f"{3 * 3 * 2 * 6 * 3}\n", done.stderr
