"""What is known of how long calls take on a GPU: measured here, kept in a file, or shipped with the package."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

MOST = 4096  # measurements in a file: the oldest go first
_MOST_BYTES = 1 << 24  # of a file that is read
_FARTHEST = 3  # octaves from an entry of a shipped table to a call that goes by it
NOISE = 0.95  # ours are taken below this share of the time of torch's
Times = dict[str, float]  # of a call, by backend, in milliseconds


class Key(NamedTuple):
    """What decides how long a call takes, beside the GPU. Sizes are those of a call; letters as in ``reference.py``."""

    cell: str
    dtype: str
    tf32: bool  # of float32, in recurrent layers
    products_tf32: bool  # and in other products
    inputs: int
    hidden: int
    outputs: int
    layers: int
    directions: int
    form: str  # "rectangular", "packed" or "cell", and what torch's kernels do not know
    apart: bool  # layer by layer, as with dropout in training
    trained: bool
    steps: int  # rounded up to a power of two
    rows: int  # as steps; of packed rows their mean number

    def __str__(self) -> str:
        """A line for people."""
        tf32 = " TF32" * self.tf32
        more = f" layers={self.layers}" * (self.layers > 1) + " bidirectional" * (self.directions > 1)
        form = f" {self.form}" * (self.form != "rectangular")
        mode = "train" if self.trained else "infer"
        return f"{self.cell} {self.dtype}{tf32} {mode} {self.steps}x{self.rows}x{self.inputs}x{self.hidden}{more}{form}"


def ranked(times: Times) -> list[str]:
    """Those of ours that are clearly faster than torch's kernels, from the fastest on."""
    faster = (name for name in times if name != "torch" and not times[name] >= NOISE * times.get("torch", math.inf))
    return sorted(faster, key=times.__getitem__)


def described(times: Times) -> str:
    return ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))


def shipped_path(gpu: str) -> Path:
    """Of the table that the package has of a GPU, if it has one."""
    return Path(__file__).with_name("tables") / f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}.json"


class Known:
    """Of one GPU, with its driver and versions."""

    def __init__(self, device: torch.device) -> None:
        # On a CPU there are the tests' emulated kernels.
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.fingerprint = _fingerprint(self.name)
        shipped = shipped_path(self.name)
        self.shipped = read(shipped, {"gpu": self.name})
        digest = hashlib.sha256(json.dumps(self.fingerprint).encode()).hexdigest()[:12]
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.path = Path(folder, "rnnfast", f"{shipped.stem}-{digest}.json")
        self.measured = read(self.path, self.fingerprint)

    def times(self, key: Key, nearest: bool) -> Iterator[tuple[Times, str]]:
        """What was measured, and where: here, and if the nearest will do, on such a GPU."""
        if key in self.measured:
            yield dict(self.measured[key]), "measured here"
        if nearest and key.form != "cell":
            alike = [other for other in self.shipped if _kind(other) == _kind(key)]
            found = min(alike, key=lambda other: _distance(key, other), default=None)
            if found is not None and _distance(key, found) <= _FARTHEST:
                yield dict(self.shipped[found]), f"by the table of {self.name}, {found}"

    def add(self, key: Key, times: Times) -> None:
        """Into memory, and if that can be written into the file, with what other processes have put there."""
        self.measured = {**read(self.path, self.fingerprint), **self.measured, key: times}
        for oldest in list(self.measured)[:-MOST]:
            del self.measured[oldest]
        with contextlib.suppress(OSError):
            write(self.path, self.fingerprint, self.measured)


@functools.cache
def known_of(device: torch.device) -> Known:
    return Known(device)


def _fingerprint(gpu: str) -> dict[str, str]:
    """What a measurement holds for."""
    from . import __version__

    try:
        driver = Path("/proc/driver/nvidia/version").read_text(errors="replace").splitlines()[0]
    except (OSError, IndexError):
        driver = ""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    cudnn = str(torch.backends.cudnn.version())
    platform = f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    return {
        "gpu": gpu, "driver": driver, "platform": platform, "cudnn": cudnn, "torch": torch.__version__,
        "triton": triton, "rnnfast": __version__,
    }  # fmt: skip


def _kind(key: Key) -> tuple[Any, ...]:
    """What an entry of a shipped table has to share with a call; half types take the same time, as tanh and relu do."""
    return key.cell.partition("_")[0], key.dtype.replace("bfloat", "float"), key.tf32, key.trained, key.form != "cell"


def _distance(key: Key, other: Key) -> float:
    """In octaves."""
    sizes = [(key.hidden, other.hidden), (key.rows, other.rows), (key.steps, other.steps)]
    sizes += [(key.layers, other.layers), (key.directions, other.directions)]
    exact = (key.dtype, key.cell, key.products_tf32) == (other.dtype, other.cell, other.products_tf32)
    return sum(abs(math.log2(a / b)) for a, b in sizes) + (not exact) / 2


# Files: what they are of, and a line for each key, with its fields and its times.

_TYPES = list(get_type_hints(Key).values())


def read(path: Path, of: dict[str, str]) -> dict[Key, Times]:
    """The times in a file, if it is one of these; else none."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:  # a pipe would be waited for
            return {}
        content, found = json.loads(path.read_text()), {}
        if content["of"] != of:
            return {}
        for *fields, times in content["times"]:
            is_key = list(map(type, fields)) == _TYPES
            if not is_key or not all(isinstance(ms, float) and 0 < ms < math.inf for ms in times.values()):
                return {}
            found[Key(*fields)] = times
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def write(path: Path, of: dict[str, str], times: dict[Key, Times]) -> None:
    """As a whole: who reads meanwhile reads the file of before."""
    lines = ",\n".join(json.dumps([*key, by]) for key, by in times.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        own = Path(file.name)
    try:
        own.write_text(f'{{"of": {json.dumps(of)}, "times": [\n{lines}\n]}}\n')
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
