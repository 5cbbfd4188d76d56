"""What the machine is, its clock, and what its matrix products can reach."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import peers
import torch

import rnnfast


def describe(device: str) -> dict[str, str]:
    """The columns that say where and of what the numbers are."""
    versions = [f"torch {torch.__version__}", f"rnnfast {rnnfast.__version__}"]
    if device == "cuda":
        name = torch.cuda.get_device_name()
        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions += [f"driver {output(smi)}", f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = re.search(r"model name\s*: (.*)", info)
        name = re.sub(r"\(R\)|\(TM\)", "", model[1]) if model else platform.processor() or platform.machine()
        name += f", {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        versions += [f"{peer} {importlib.metadata.version(peer)}" for peer in peers.installed()]
    here = ["git", "-C", str(Path(__file__).parent)]
    changed = output([*here, "status", "--porcelain", "--untracked-files=no"])
    commit = output([*here, "rev-parse", "--short", "HEAD"]) + ("+" if changed else "")
    return {"machine": " ".join(name.split()), "versions": ", ".join(versions), "commit": commit}


def output(command: list[str]) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def times(call: Callable, count: int, device: str) -> list[float]:
    """Milliseconds of each of ``count`` calls."""
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def product(dtype: str, device: str) -> tuple[Callable, float]:
    """A product of large squares and its GFLOP: what this machine's own BLAS does best.

    It stands for the limit. The peak of the multiply-add units lies higher.
    """
    n = 1536 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    return lambda: a @ a, 2e-9 * n**3


def peak_mb(call: Callable, device: str) -> float:
    """MB that a call takes beyond what is there before it (on a CPU: resident pages, Linux only; else NaN)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return math.nan
    before = _status_kb("VmRSS")
    call()
    return (_status_kb("VmHWM") - before) / 1e3


def _status_kb(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


class Elsewhere:
    """How many cores, in the mean, all other processes used meanwhile (Linux; else NaN)."""

    def __enter__(self) -> Elsewhere:
        self.start, self.others = time.monotonic(), self._others()
        return self

    def __exit__(self, *_: object) -> None:
        self.cores = max(0.0, self._others() - self.others) / (time.monotonic() - self.start)

    def _others(self) -> float:
        stat = Path("/proc/stat")
        if not stat.exists():
            return math.nan
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time()
