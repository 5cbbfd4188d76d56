"""The backends: what of each this machine can use, and which one serves a call."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from . import onnx

_tracing_state = torch._C._get_tracing_state  # asked for at every call


class Backend(NamedTuple):
    """A backend of this machine: whether it can be used, and with what, or why not."""

    available: bool
    detail: str


@functools.cache
def _load(name: str, compiler: str, detail: str) -> Backend:
    path = Path(__file__).with_name(name)
    if not path.exists():
        return Backend(False, f"the native library is not built (no {compiler} at installation?)")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Backend(False, f"the native library does not load: {error}")
    return Backend(True, detail)


_CPU = _load("_cpu.so", "C++ compiler", "C++ with SIMD")  # it defines operators, which are defined here without it


def _gpu(device: torch.device | None, detail: str) -> Backend:
    """Whether kernels for GPUs can run on a device, or on all that torch can use."""
    if device is not None and device.type != "cuda":
        return Backend(False, f"it does not serve device {device.type!r}")
    if not torch.cuda.is_available():
        return Backend(False, "torch finds no GPU that it can use")
    for of in range(torch.cuda.device_count()) if device is None else [device]:
        properties = torch.cuda.get_device_properties(of)
        if torch.version.hip is None and properties.major < 8:
            capability = f"{properties.major}.{properties.minor}"
            return Backend(False, f"{properties.name} has compute capability {capability}, the kernels need 8.0")
    return Backend(True, detail)


# Triton reads this when it is imported, and then interprets every kernel, also on a CPU: a way to test.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _triton(device: torch.device | None = None) -> Backend:
    if not _HAS_TRITON:
        return Backend(False, "Triton is not installed")
    if _INTERPRETED and (device is None or device.type in ("cpu", "cuda")):
        return Backend(True, "Triton's interpreter, for tests")
    return _gpu(device, "Triton kernels")


def _is_emulated() -> bool:
    """Whether the tests have loaded their emulation of the CUDA kernels, for a CPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("rnnfast::cuda_forward_steps", "CPU")


def _cuda(device: torch.device | None = None) -> Backend:
    if (device is None or device.type == "cpu") and _is_emulated():
        return Backend(True, "CUDA kernels under a host emulation, for tests")
    return find_cuda(device)


_cuda._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, which imports the compiler


_RUN_CUDA: dict[torch.device, Backend] = {}  # by devices that do: to ask the driver takes longer than a call's checks


def find_cuda(device: torch.device | None) -> Backend:
    """The CUDA library for a GPU, or for all that there are."""
    if torch.version.hip is not None:
        return Backend(False, "its kernels are for NVIDIA's GPUs")
    if device in _RUN_CUDA:
        return _RUN_CUDA[device]
    found = _gpu(device, "CUDA kernels")
    # Loaded only where there is a GPU: the emulation registers some of the same operators.
    found = _load("_cuda.so", "CUDA compiler", found.detail) if found.available else found
    if found.available and device is not None and device.index is not None:
        _RUN_CUDA[device] = found
    return found


_BACKENDS = {
    "reference": Backend(True, "plain torch, any dtype and device"),
    "torch": Backend(True, "PyTorch's own kernels, those of torch.nn"),
    "cpu": _CPU,
    "triton": None,  # looked for when asked for: that wakes the GPU's driver
    "cuda": None,
}
# Of the CPU backend, as rnnfast::cpu_isa numbers them.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
# By the device's type, the fastest first; ROCm's is also called cuda.
_BACKENDS_OF = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
BACKEND_NAMES = ("reference", "cpu", "triton", "cuda")  # that have operators
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_forced: str | None = None  # by use_backend


def _backend(name: str, device: torch.device | None = None) -> Backend:
    """A backend on a device, or wherever it runs."""
    if name == "triton":
        return _triton(device)
    if name == "cuda":
        return _cuda(device)
    if name == "cpu" and device is not None and device.type != "cpu":
        return Backend(False, f"it does not serve device {device.type!r}")
    return _BACKENDS[name]


def backends() -> dict[str, Backend]:
    """Every backend by name: whether this machine can use it, and with what, or why not."""
    found = {name: _backend(name) for name in _BACKENDS}
    if found["cpu"].available:
        found["cpu"] = Backend(True, f"C++ with SIMD: {INSTRUCTION_SETS[torch.ops.rnnfast.cpu_isa(None)]}")
    return found


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every layer runs on the backend ``name``; where it cannot, the call raises.

    The setting is the process's: threads share it.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: this machine lacks it; or, from a layer's call, it cannot serve the call.
    """
    global _forced
    if name not in _BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(_BACKENDS)}")
    backend = _backend(name)
    if not backend.available:
        raise RuntimeError(f"backend {name!r} is missing here: {backend.detail}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose_backend(
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int | None = None,
    batch: int = 1,
    bidirectional: bool = False,
    projected: bool = False,
    extended: bool = False,
) -> tuple[str, str]:
    """The backend that serves a layer, and why.

    Args:
        mode: torch's name of the cell, such as ``"LSTM"``.
        device, dtype: the input's.
        hidden, batch, bidirectional, projected: H, N, and whether there are two directions and a projection. Backends
            for GPUs have several kernels; with H given, the reason says which one runs a forward, by the tables in
            ``csrc/cuda/plan.h`` and ``triton/plan.py``.
        extended: whether the call has resets, or asks for the states of every step: torch's kernels know neither.
    """
    if _forced == "reference":
        return "reference", "asked for by use_backend"
    if forward_ad._current_level >= 0:  # as second derivatives are, whatever the backend
        return "reference", "forward-mode derivatives are taken through plain torch"
    recorded = is_recorded()
    if _forced == "torch" or (_forced is None and recorded):
        why = "asked for by use_backend" if _forced else "a graph is recorded that others run"
        if extended and _forced:
            raise RuntimeError(f"backend 'torch' cannot serve this call: {_NOT_IN_TORCH}")
        return ("torch", why) if _is_served_by_torch(extended, recorded) else ("reference", _NOT_IN_TORCH)
    names = _BACKENDS_OF.get(device.type, ()) if _forced is None else (_forced,)
    reasons = []
    if not names:
        reasons.append(f"no fused backend serves device {device.type!r}")
    elif dtype not in DTYPES:
        reasons.append(f"no fused backend serves {dtype}")
    else:
        for name in names:
            backend = _backend(name, device)
            if backend.available:
                if name == "cpu":
                    return name, "native kernels serve this dtype on a CPU"
                if hidden is None:
                    return name, backend.detail
                return name, module_of(name).reason(device, mode, dtype, hidden, batch, bidirectional, projected)
            if backend.detail not in reasons:
                reasons.append(backend.detail)
    reason = "; ".join(reasons)
    if _forced is not None:
        raise RuntimeError(f"backend {_forced!r} cannot serve this call: {reason}")
    # A loop in Python is slower than torch's kernels.
    served = dtype in DTYPES and device.type != "meta" and _is_served_by_torch(extended, recorded)
    return "torch" if served else "reference", reason


_NOT_IN_TORCH = "torch's kernels know neither resets nor the states of every step, nor torch.func, nor torch.compile"


def _is_served_by_torch(extended: bool, recorded: bool) -> bool:
    compiled = torch.compiler.is_compiling() and not recorded
    return not (extended or compiled or torch._C._are_functorch_transforms_active())


def is_recorded() -> bool:
    """Whether torch.jit or torch.onnx record a graph, which is to run where rnnfast is not installed."""
    return _tracing_state() is not None or onnx.is_exporting()


@functools.cache
def module_of(backend: str) -> ModuleType:
    """That of a backend for GPUs. Triton takes time to import, and may be missing."""
    return importlib.import_module(f".{backend}", __package__)
