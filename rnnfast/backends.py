"""The backends: what of each this machine can use, and which one serves a call."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import onnx
from .cells import CELLS, MODES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of the CPU backend, as rnnfast::cpu_isa numbers them.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


class Availability(NamedTuple):
    """Whether a backend can be used here, and with what, or why not."""

    available: bool
    detail: str


class Backend(NamedTuple):
    """What the rest of the package has to know of a backend."""

    probe: Callable[[torch.device | None], Availability]  # on a device, or wherever it runs
    devices: tuple[str, ...] = ()  # types of those that it serves without being asked for
    dtypes: tuple[torch.dtype, ...] | None = DTYPES  # None: all
    # Of this package, with `forward`, `backward`, `gate_gradients` and `reason`, which says what the first two will
    # run: for GPUs, where choice.py checks and races it. None: the kernels come with the native library, or are plain
    # torch.
    module: str | None = None
    has_operators: bool = True
    modes: frozenset[str] = frozenset(CELLS)  # the cells of which it has kernels
    saves_gates: bool = True  # whether its backward needs what the forward computed

    def load(self) -> ModuleType:
        """The module, when it is first used: Triton takes time to import, and may be missing."""
        return _import(f".{self.module}", __package__)


_import = functools.cache(importlib.import_module)


@functools.cache
def _load(name: str, compiler: str, detail: str) -> Availability:
    path = Path(__file__).with_name(name)
    if not path.exists():
        return Availability(False, f"the native library is not built (no {compiler} at installation?)")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Availability(False, f"the native library does not load: {error}")
    return Availability(True, detail)


# It defines operators, which ops.py does where it is not.
_CPU = _load("_cpu.so", "C++ compiler", "native kernels serve this dtype on a CPU")
_HOST = torch.device("cpu")


def _cpu(device: torch.device | None) -> Availability:
    if device == _HOST:  # in a tenth of the time that it takes to ask for its type
        return _CPU
    if device is None and _CPU.available:
        return Availability(True, f"C++ with SIMD: {INSTRUCTION_SETS[torch.ops.rnnfast.cpu_isa(None)]}")
    if device is None or device.type == "cpu":
        return _CPU
    return Availability(False, f"it does not serve device {device.type!r}")


def _gpu(device: torch.device | None, detail: str) -> Availability:
    """Whether kernels for GPUs can run on a device, or on all that torch can use."""
    if device is not None and device.type != "cuda":
        return Availability(False, f"it does not serve device {device.type!r}")
    if not torch.cuda.is_available():
        return Availability(False, "torch finds no GPU that it can use")
    for of in range(torch.cuda.device_count()) if device is None else [device]:
        properties = torch.cuda.get_device_properties(of)
        if torch.version.hip is None and properties.major < 8:
            capability = f"{properties.major}.{properties.minor}"
            return Availability(False, f"{properties.name} has compute capability {capability}, the kernels need 8.0")
    return Availability(True, detail)


# Triton reads this when it is imported, and then interprets every kernel, also on a CPU: a way to test.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _triton(device: torch.device | None) -> Availability:
    if not _HAS_TRITON:
        return Availability(False, "Triton is not installed")
    if _INTERPRETED and (device is None or device.type in ("cpu", "cuda")):
        return Availability(True, "Triton's interpreter, for tests")
    return _gpu(device, "Triton kernels")


def _is_emulated() -> bool:
    """Whether the tests have loaded their emulation of the CUDA kernels, for a CPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("rnnfast::cuda_forward_steps", "CPU")


def _cuda(device: torch.device | None) -> Availability:
    if (device is None or device.type == "cpu") and _is_emulated():
        return Availability(True, "CUDA kernels under a host emulation, for tests")
    return find_cuda(device)


# By devices that run it: to ask the driver takes longer than the checks of a call.
_RUN_CUDA: dict[torch.device, Availability] = {}


def find_cuda(device: torch.device | None) -> Availability:
    """The CUDA library for a GPU, or for all that there are."""
    if torch.version.hip is not None:
        return Availability(False, "its kernels are for NVIDIA's GPUs")
    if device in _RUN_CUDA:
        return _RUN_CUDA[device]
    found = _gpu(device, "CUDA kernels")
    # Loaded only where there is a GPU: the emulation registers some of the same operators.
    found = _load("_cuda.so", "CUDA compiler", found.detail) if found.available else found
    if found.available and device is not None and device.index is not None:
        _RUN_CUDA[device] = found
    return found


# torch.compile cannot trace what these ask. torch.compiler.assume_constant_result would import the compiler.
_cpu._dynamo_marked_constant = _cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]

# Of those for one type of device the last that can is the one that serves; ROCm's type is also called cuda.
BACKENDS = {
    "reference": Backend(
        lambda device: Availability(True, "plain torch, any dtype and device"),
        dtypes=None,
        modes=frozenset(MODES),
        saves_gates=False,
    ),
    "torch": Backend(
        lambda device: Availability(True, "PyTorch's own kernels, those of torch.nn"), has_operators=False
    ),
    "cpu": Backend(_cpu, ("cpu",)),
    "triton": Backend(_triton, ("cuda",), module="triton"),
    "cuda": Backend(_cuda, ("cuda",), module="cuda", modes=frozenset(MODES)),
}
WITH_OPERATORS = tuple(name for name, backend in BACKENDS.items() if backend.has_operators)
OF_DEVICE = {
    of: tuple(name for name in reversed(BACKENDS) if of in BACKENDS[name].devices)
    for of in {of for backend in BACKENDS.values() for of in backend.devices}
}


def backends() -> dict[str, Availability]:
    """Every backend by name: whether this machine can use it, and with what, or why not."""
    return {name: backend.probe(None) for name, backend in BACKENDS.items()}


# The choice of one.

_tracing_state, _is_compiling = torch._C._get_tracing_state, torch.compiler.is_compiling  # asked for at every call
_is_transformed = torch._C._are_functorch_transforms_active
_asked: ContextVar[Any] = ContextVar("rnnfast.use_backend")


class _AskedFor:
    """The name that use_backend was last given, where torch.compile sees it.

    Dynamo refuses the methods of a ContextVar, and never looks again at a threading.local whose default stands in its
    class. But a property whose getter is written in C it takes for an attribute: compiled code reads it in the thread
    and task that call, and another value makes another graph.
    """

    here = property(_asked.get)  # of this thread and task; as get takes a default, the object itself if there is none

    def __init__(self) -> None:
        self.traced: str | None = None  # by use_backend within the code that is compiled, which also undoes it


_asked_for = _AskedFor()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context every layer runs on the backend ``name``; where it cannot, the call raises.

    The choice holds in this thread and, with asyncio, in this task and those that it starts; as torch.no_grad's, not in
    other threads: not in DataParallel's, nor where a backward on a GPU runs the forward of a checkpoint once more.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: this machine lacks it; or, from a layer's call, it cannot serve the call.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    found = BACKENDS[name].probe(None)
    if not found.available:
        raise RuntimeError(f"backend {name!r} is missing here: {found.detail}")
    is_traced = torch.compiler.is_dynamo_compiling()
    before = _asked_for.traced if is_traced else _asked_for.here
    _ask_for(name, is_traced)
    try:
        yield
    finally:
        _ask_for(before, is_traced)


def _ask_for(name: Any, is_traced: bool) -> None:
    if is_traced:
        _asked_for.traced = name
    else:
        _asked.set(name)


class Circumstances(NamedTuple):
    """What beside a call itself decides which backend serves it."""

    forced: str | None = None  # by use_backend
    forward_mode: bool = False  # forward-mode derivatives are being taken
    recorded: bool = False  # as is_recorded
    compiled: bool = False  # by torch.compile or torch.export
    transformed: bool = False  # by torch.func


USUAL = Circumstances()  # it takes longer to make one than to see that nothing is special


def circumstances() -> Circumstances:
    """Those of a call made now."""
    here = _asked_for.here
    if (
        here is _asked_for
        and forward_ad._current_level < 0
        and _tracing_state() is None
        and not _is_compiling()  # as it says of all that is exported, and traced with a name
        and not _is_transformed()
    ):
        return USUAL
    forced = _asked_for.traced or (None if here is _asked_for else here)
    return Circumstances(forced, forward_ad._current_level >= 0, is_recorded(), _is_compiling(), _is_transformed())


def is_forced() -> bool:
    """Whether use_backend has chosen for a call made now, outside of compiled code."""
    return _asked_for.here is not _asked_for


def is_recorded() -> bool:
    """Whether torch.jit or torch.onnx record a graph, which is to run where rnnfast is not installed."""
    return _tracing_state() is not None or onnx.is_exporting()


def choose_backend(
    circumstances: Circumstances,
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int | None = None,
    batch: int = 1,
    bidirectional: bool = False,
    projected: bool = False,
    extended: bool = False,
    opaque: bool = False,
    reset_after: bool = True,
) -> tuple[str, str]:
    """The backend that serves a layer, and why: a matter of the arguments, and of what this machine has.

    Args:
        mode: torch's name of the cell, such as ``"LSTM"``.
        device, dtype: the input's.
        hidden, batch, bidirectional, projected: H, N, and whether there are two directions and a projection. Backends
            for GPUs have several kernels; with H given, the reason says which one runs a forward, by the tables in
            ``csrc/cuda/plan.h`` and ``triton/plan.py``.
        extended: whether the call has resets, or asks for the states of every step: torch's kernels know neither.
        opaque: whether those can serve it while it is compiled, as an operator that nothing traces into.
        reset_after: false for a GRU that resets h before the product.
    """
    forced, forward_mode, recorded, compiled, transformed = circumstances
    if not reset_after:
        if forced not in (None, "reference"):
            raise RuntimeError(f"backend {forced!r} cannot serve this call: {_RESETS_FIRST}")
        return "reference", _RESETS_FIRST
    extended = extended or mode not in OF_TORCH
    in_torch = not (extended or transformed or (compiled and not recorded and not opaque))
    if forced == "reference":
        return "reference", "asked for by use_backend"
    if forward_mode:  # as second derivatives are, whatever the backend
        return "reference", "forward-mode derivatives are taken through plain torch"
    if forced == "torch" or (forced is None and recorded):
        if extended and forced:
            raise RuntimeError(f"backend 'torch' cannot serve this call: {_NOT_IN_TORCH}")
        why = "asked for by use_backend" if forced else "a graph is recorded that others run"
        return ("torch", why) if in_torch else ("reference", _NOT_IN_TORCH)
    names = OF_DEVICE.get(device.type, ()) if forced is None else (forced,)
    reasons: list[str] = []
    for name in names:
        backend = BACKENDS[name]
        if backend.dtypes is not None and dtype not in backend.dtypes:
            continue
        served = mode in backend.modes
        found = backend.probe(device) if served else Availability(False, f"{name} has no kernels of {mode}")
        if found.available and (hidden is None or backend.module is None):
            return name, found.detail
        if found.available:
            assert hidden is not None
            reason = backend.load().reason(device, mode, dtype, hidden, batch, bidirectional, projected)
            if in_torch and forced is None and launches_steps(name, reason):
                return "torch", f"its launches of single steps take less than Triton's, {reason}"
            return name, reason
        if found.detail not in reasons:
            reasons.append(found.detail)
    reason = "; ".join(reasons) or f"no fused backend serves {dtype if names else f'device {device.type!r}'}"
    if forced is not None:
        raise RuntimeError(f"backend {forced!r} cannot serve this call: {reason}")
    # A loop in Python is slower than torch's kernels.
    in_torch = in_torch and device.type != "meta" and dtype in DTYPES
    return "torch" if in_torch else "reference", reason


def launches_steps(name: str, reason: str) -> bool:
    """Whether a backend launches every step from Python, where cuDNN does it in less than half of the time."""
    return name == "triton" and torch.version.hip is None and reason.startswith("stepwise")


OF_TORCH = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")
_RESETS_FIRST = "with reset_after=False a step has two products, one after the other, which only plain torch has"
_NOT_IN_TORCH = (
    "torch's kernels know neither other cells, nor resets, nor the states of every step, nor torch.func, "
    "nor torch.export, nor lengths or single cells under torch.compile"
)
