"""One recurrent layer, with all its directions, as a differentiable operator.

A backend is a pair of ``torch.library`` ops, ``rnnfast::NAME_forward`` and ``rnnfast::NAME_backward``, that nothing
traces into, and the first once more for exported programs, ``rnnfast::NAME_layer``. Around them stand, once for all
backends: the fakes, first and second derivatives, vmap, and the choice of the backend. The backend ``torch`` has none
of this: ``functional`` calls it, as ``aten.py`` has whole stacks. Letters as in ``reference.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from . import border, onnx, reference
from .reference import SAVED_GATES

_FORWARD = (
    "(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
    "Tensor? resets, bool bidirectional, bool keep_c, bool keep_gates) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)"
)
_BACKWARD = (
    "(str mode, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, bool bidirectional, Tensor y, Tensor c, "
    "Tensor gates, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)
# The CUDA library's: the recurrence between the products over the whole sequence. T steps are given; tables of packed
# rows, lengths and resets lie on the device, their values unchecked. Gates may be x_gates itself. For calls under
# no_grad only.
_CUDA = (
    "cuda_forward_steps(str mode, Tensor x_gates, Tensor[] w_hh, Tensor[] b_hh, Tensor[] w_hr, Tensor(a!) h, "
    "Tensor(b!)? c, Tensor(c!) y, Tensor(d!)? cs, Tensor(e!)? gates, Tensor? offsets, Tensor? lengths, "
    "Tensor? resets, int steps, bool tf32, int stream) -> ()",
    "cuda_backward_steps(str mode, Tensor? dy, Tensor? dcs, Tensor gates, Tensor y, Tensor cs, Tensor? h0, Tensor? c0, "
    "Tensor[] w_hh, Tensor[] w_hr, Tensor(a!) dh, Tensor(b!)? dc, Tensor(c!) dgates, Tensor(d!)? dprojections, "
    "Tensor? offsets, Tensor? lengths, Tensor? resets, int steps, bool tf32, int stream) -> ()",
    "cuda_multiply(Tensor a, Tensor b, Tensor(a!) out, bool accumulate, bool tf32, int stream) -> bool",
    "cuda_states_before(Tensor y, Tensor? h0, Tensor(a!) out, Tensor? offsets, Tensor? lengths, Tensor? resets, "
    "int steps, int stream) -> ()",
    "cuda_plan(str mode, ScalarType dtype, int batch, int hidden, bool bidirectional, bool projected, bool tf32, "
    "bool backward, int device) -> str",
    "cuda_regime(int? use) -> int",
)

_OPS: dict[tuple[str, str], torch._ops.OpOverload] = {}  # by backend and direction
_SAVES_GATES: set[str] = set()  # backends whose backward needs what the forward computed
_CONTIGUOUS = torch.contiguous_format
_tracing_state, _is_exporting = torch._C._get_tracing_state, torch.compiler.is_exporting  # asked for at every call
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_library = torch.library.Library("rnnfast", "DEF")


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


# The fakes: what every backend returns. An absent tensor has shape [0].


def _forward_fake(
    mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, keep_c, keep_gates, *, saves_gates
):
    reference.check_mode(mode)
    border.check_devices(x, (h0, c0, *weights, lengths, resets), batch_sizes)
    directions = 1 + bidirectional
    gate_rows, out = weights[1].shape
    hidden = gate_rows // reference.GATES[mode]
    if batch_sizes is None:
        batch = x.shape[1]
    elif h0 is not None:
        batch = h0.shape[1]
    else:  # known only from the values of batch_sizes
        batch = torch.library.get_ctx().new_dynamic_size()
    rows = functools.reduce(lambda a, b: a * b, x.shape[:-1])
    is_lstm, saved = mode == "LSTM", SAVED_GATES[mode]
    acc = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(*x.shape[:-1], directions * out),
        x.new_empty(directions, batch, out),
        x.new_empty(directions, batch, hidden) if is_lstm else x.new_empty(0),
        x.new_empty(*x.shape[:-1], directions * hidden, dtype=acc) if is_lstm and keep_c else x.new_empty(0, dtype=acc),
        x.new_empty(directions, rows, saved * hidden) if saved and keep_gates and saves_gates else x.new_empty(0),
    )


def _backward_fake(mode, dy, dh_n, dc_n, dc, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, *args):
    y, c, gates, need_dx, need_dw = args
    reference.check_mode(mode)
    border.check_devices(x, (dy, dh_n, dc_n, dc, h0, c0, *weights, lengths, resets, y, c, gates), batch_sizes)

    def like(tensor: Tensor | None, needed: bool = True) -> Tensor:
        return x.new_empty(tensor.shape if needed and tensor is not None else 0)

    return like(x, need_dx), like(h0), like(c0), [like(w) for w in weights] if need_dw else []


def _define(backend: str, saves_gates: bool) -> None:
    if saves_gates:
        _SAVES_GATES.add(backend)
    forward_fake = functools.partial(_forward_fake, saves_gates=saves_gates)
    for direction, schema, fake in (
        ("forward", _FORWARD, forward_fake),
        ("layer", _FORWARD, forward_fake),  # the forward once more, as it stands in exported programs
        ("backward", _BACKWARD, _backward_fake),
    ):
        name = f"{backend}_{direction}"
        _define_operator(name + schema)
        torch.library.register_fake(f"rnnfast::{name}", fake, lib=_library)
        _OPS[backend, direction] = getattr(torch.ops.rnnfast, name).default


def _define_operator(schema: str) -> None:
    """Unless a library of ours has defined it: a program that holds the operator runs with the library alone."""
    name = "rnnfast::" + schema.partition("(")[0]
    if not torch._C._jit_get_schemas_for_operator(name):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


# The reference as a backend: the loops of reference.py behind ops.


def _reference_forward(
    mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, keep_c, keep_gates
) -> tuple[Tensor, ...]:
    border.check_layer(mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        outputs = reference.layer(mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional)
    y, h_n, c_n, c = (t.clone() for t in outputs)  # no output may alias an input or another output
    return y, h_n, c_n, c if keep_c else c.new_empty(0), x.new_empty(0)


def _reference_backward(
    mode, dy, dh_n, dc_n, dc, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, y, c, gates, *needs
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    need_dx, need_dw = needs
    sizes = border.check_layer(mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional)
    border.check_backward(sizes, 0, dy, dh_n, dc_n, dc, y, c, gates)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        grads = reference.layer_backward(
            mode, dy, dh_n, dc_n, dc, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional
        )
    dx, dh0, dc0, *dweights = (x.new_empty(0) if g is None else g.clone(memory_format=_CONTIGUOUS) for g in grads)
    return dx if need_dx else x.new_empty(0), dh0, dc0, dweights if need_dw else []


def _checked_lengths(lengths: Tensor, steps: int) -> Tensor:
    """A copy of ``lengths``, int64 and within 0..steps: checked where that needs no synchronisation, else clamped."""
    border.check_lengths(lengths, steps)
    if lengths.device.type == "cpu" and lengths.numel():
        low, high = lengths.min().item(), lengths.max().item()
        if low < 0 or high > steps:
            raise ValueError(f"lengths must be within 0..{steps}, the sequence length, got values in {low}..{high}")
    return lengths.to(torch.int64, copy=True).clamp_(0, steps)


def _on_gpu(backend: str, direction: str, *args: Any) -> tuple:
    from . import gpu

    return getattr(gpu, direction)(_module(backend).Layer, *args)


@functools.cache
def _module(backend: str) -> ModuleType:
    """That of a backend for GPUs. Triton takes time to import, and may be missing."""
    return importlib.import_module(f".{backend}", __package__)


BACKEND_NAMES = ("reference", "cpu", "triton", "cuda")  # that have operators
for _name in BACKEND_NAMES:
    _define(_name, saves_gates=_name != "reference")
for _schema in ("cpu_isa(int? use) -> int", "checked_lengths(Tensor lengths, SymInt steps) -> Tensor", *_CUDA):
    _define_operator(_schema)
for _direction in ("forward", "layer"):
    _library.impl(f"reference_{_direction}", _reference_forward, "CompositeExplicitAutograd")
_library.impl("reference_backward", _reference_backward, "CompositeExplicitAutograd")
for _name, _direction in itertools.product(("triton", "cuda"), ("forward", "layer", "backward")):
    _kernel = functools.partial(_on_gpu, _name, "backward" if _direction == "backward" else "forward")
    _library.impl(f"{_name}_{_direction}", _kernel, "CompositeExplicitAutograd")
_library.impl("checked_lengths", _checked_lengths, "CompositeExplicitAutograd")
torch.library.register_fake(
    "rnnfast::checked_lengths", lambda lengths, steps: torch.empty_like(lengths, dtype=torch.int64), lib=_library
)
torch.library.register_vmap(
    "rnnfast::checked_lengths",
    lambda info, in_dims, lengths, steps: (torch.ops.rnnfast.checked_lengths(lengths, steps), in_dims[0]),
    lib=_library,
)


# The choice of a backend.


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
                return name, _module(name).reason(device, mode, dtype, hidden, batch, bidirectional, projected)
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


# Derivatives, written once over the ops.


def _loop_over_batch(function: type, info, in_dims: tuple, args: tuple):
    """The vmap of an autograd Function, sample by sample: no sum crosses samples, so each gets its own gradients."""
    samples = [
        function.apply(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(tensors) for tensors in zip(*samples))
    return outputs, (0,) * len(outputs)


def _save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Save tensors for the backward, absent ones apart: tools that walk ``saved_tensors`` expect no None there."""
    ctx.absent = [i for i, t in enumerate(tensors) if t is None]
    ctx.save_for_backward(*(t for t in tensors if t is not None))


def _saved(ctx: Any) -> list[Tensor | None]:
    tensors = list(ctx.saved_tensors)
    for i in ctx.absent:
        tensors.insert(i, None)
    return tensors


def _one_by_one(backward: Callable) -> Callable:
    """A backward that also takes a batch of gradients, as ``is_grads_batched`` makes it with the vmap of before
    torch.func: it runs once for each."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not any(g is not None and _is_legacy_batched(g) for g in grads):
            return backward(ctx, *grads)
        # The level of the innermost vmap is to be had by entering another, and its operators apply within it only.
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        batched = [g is not None and _is_legacy_batched(g) for g in grads]
        plain = [torch._remove_batch_dim(g, level, 0, 0) if of_batch else g for g, of_batch in zip(grads, batched)]
        size = next(g.size(0) for g, of_batch in zip(plain, batched) if of_batch)
        torch._C._vmapmode_decrement_nesting()
        try:
            each = [backward(ctx, *(g[i] if b else g for g, b in zip(plain, batched))) for i in range(size)]
            results = [None if of[0] is None else torch.stack(of) for of in zip(*each)]
        finally:
            torch._C._vmapmode_increment_nesting()
        return tuple(None if r is None else torch._add_batch_dim(r, 0, level) for r in results)

    return run


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(backend, mode, bidirectional, recompute, batch_sizes, lengths, resets, x, h0, c0, *weights):
        return _OPS[backend, "forward"](
            mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, True, not recompute
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.mode, ctx.bidirectional, ctx.recompute, *tensors = inputs
        y, _, _, c, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        _save(ctx, (*tensors[:6], y, c, gates, *tensors[6:]))

    @staticmethod
    @_one_by_one
    def backward(ctx, dy, dh_n, dc_n, dc, _):
        needs = ctx.needs_input_grad
        dx, dh0, dc0, *dweights = _layer_backward(ctx, dy, dh_n, dc_n, dc, needs[7], any(needs[10:]))
        grads = (grad if need else None for grad, need in zip((dx, dh0, dc0, *dweights), needs[7:]))
        return (None,) * 7 + (*grads, *[None] * (len(needs) - 10 - len(dweights)))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _loop_over_batch(_Layer, info, in_dims, args)


def _layer_backward(ctx, dy, dh_n, dc_n, dc, need_dx: bool, need_dw: bool) -> tuple[Tensor | None, ...]:
    """dx, dh0, dc0 and, if needed, the weights' gradients, of what ``_Layer.setup_context`` has kept."""
    if all(grad is None for grad in (dy, dh_n, dc_n, dc)):
        return None, None, None
    batch_sizes, lengths, resets, x, h0, c0, y, c, gates, *weights = _saved(ctx)
    if ctx.recompute:
        is_kept = ctx.mode != "LSTM" or c.dim() > 1
        with torch.no_grad():
            *_, again, gates = _OPS[ctx.backend, "forward"](
                ctx.mode, x, h0, c0, weights, batch_sizes, lengths, resets, ctx.bidirectional, not is_kept, True
            )
        c = c if is_kept else again
    # Only a derivative of this backward needs a Function; torch.compile wants none where there is no derivative.
    twice = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    return (_LayerBackward.apply if twice else _LayerBackward.forward)(
        ctx.backend, ctx.mode, ctx.bidirectional, need_dx, need_dw, batch_sizes, lengths, resets,
        dy, dh_n, dc_n, dc, x, h0, c0, y, c, gates, *weights,
    )  # fmt: skip


class _LayerBackward(torch.autograd.Function):
    """Its own derivatives go through plain torch: x and the weights determine y, c and the gates, which get none."""

    @staticmethod
    def forward(
        backend, mode, bidirectional, need_dx, need_dw, batch_sizes, lengths, resets, dy, dh_n, dc_n, dc, x, h0, c0, y,
        c, gates, *weights,
    ):  # fmt: skip
        dx, dh0, dc0, dweights = _OPS[backend, "backward"](
            mode, dy, dh_n, dc_n, dc, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, y, c, gates,
            need_dx, need_dw,
        )  # fmt: skip
        return dx, dh0, dc0, *dweights

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.mode, ctx.bidirectional, _, _, *tensors = inputs
        ctx.set_materialize_grads(False)
        _save(ctx, (*tensors[:10], *tensors[13:]))

    @staticmethod
    @_one_by_one
    def backward(ctx, *grads):
        batch_sizes, lengths, resets, *tensors = _saved(ctx)
        form = (batch_sizes, lengths, resets, ctx.bidirectional)
        # An output that was not asked for has shape [0]; whatever gradient comes for it says nothing.
        live = [i for i, (g, t) in enumerate(zip(grads, tensors[4:])) if None not in (g, t) and g.shape == t.shape]

        if not live:
            return (None,) * len(ctx.needs_input_grad)

        given = [i for i, t in enumerate(tensors) if t is not None]

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            inputs = list(tensors)
            for i, value in zip(given, values):
                inputs[i] = value
            firsts = reference.layer_backward(ctx.mode, *inputs[:7], inputs[7:], *form)
            return tuple(firsts[i] for i in live)

        _, vjp = torch.func.vjp(first_order, *(tensors[i] for i in given))
        seconds: list[Tensor | None] = [None] * len(tensors)
        for i, second in zip(given, vjp(tuple(grads[i] for i in live))):
            seconds[i] = second
        return (None,) * 8 + (*seconds[:7], None, None, None, *seconds[7:])

    @staticmethod
    def vmap(info, in_dims, *args):
        return _loop_over_batch(_LayerBackward, info, in_dims, args)


# The operator that stands in exported programs, ``rnnfast::NAME_layer``, has derivatives of its own: such a program
# can be trained. It keeps no gates, as if to recompute.


def _setup_layer(ctx: Any, inputs: tuple, output: tuple, *, backend: str) -> None:
    mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, _, _ = inputs
    tensors = batch_sizes, lengths, resets, x, h0, c0, *weights
    _Layer.setup_context(ctx, (backend, mode, bidirectional, True, *tensors), output)


def _backward_of_layer(ctx: Any, dy, dh_n, dc_n, dc, _) -> tuple:
    _, *needs, need_dw = ctx.needs_input_grad[:5]
    grads = _layer_backward(ctx, dy, dh_n, dc_n, dc, needs[0], any(need_dw))
    of_operands = (grad if need else None for grad, need in zip(grads, needs))  # x, h0 and c0
    return None, *of_operands, list(grads[3:]) or [None] * len(need_dw), *[None] * (len(ctx.needs_input_grad) - 5)


for _name in BACKEND_NAMES:
    torch.library.register_autograd(
        f"rnnfast::{_name}_layer", _backward_of_layer, lib=_library,
        setup_context=functools.partial(_setup_layer, backend=_name),
    )  # fmt: skip


def layer(
    backend: str,
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
    keep_c: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One recurrent layer over a sequence. Arguments are taken as valid: ``functional`` has checked them.

    Args:
        backend: as :func:`choose_backend` gives it.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"LSTM"`` or ``"GRU"``.
        x: ``[T, N, I]``; with ``batch_sizes`` packed rows ``[R, I]``.
        h0, c0: ``[D, N, P]`` and ``[D, N, H]``; None is zero.
        weights: of each direction w_ih ``[G*H, I]``, w_hh ``[G*H, P]``, then if there are biases b_ih and b_hh
            ``[G*H]``, then if there is a projection w_hr ``[P, H]``.
        batch_sizes: int64 ``[T]`` on the CPU, as in a PackedSequence.
        lengths: int64 ``[N]`` within 0..T on x's device. y and c are zero beyond a row's end.
        resets: bool ``[T, N]``, true at the first step of an episode: the state is zeroed before that step, for the
            reverse direction after it.
        keep_c: whether c is asked for.
        recompute: keep no gates for the backward, which runs the forward once more instead.

    Returns:
        y ``[T, N, D*P]`` (or ``[R, D*P]``), h_n ``[D, N, P]``, and for an LSTM c_n ``[D, N, H]`` and c, the cell state
        at every step, ``[T, N, D*H]`` (or ``[R, D*H]``), in float32 where x is of a half type. Absent: shape ``[0]``.
    """
    form = (batch_sizes, lengths, resets)
    if backend == "reference" and (forward_ad._current_level >= 0 or is_recorded()):
        return reference.layer(mode, x, h0, c0, weights, *form, bidirectional)
    if _is_exporting():
        return _OPS[backend, "layer"](mode, x, h0, c0, weights, *form, bidirectional, keep_c, False)[:4]
    if torch._C._are_functorch_transforms_active():
        return _transformed(backend, mode, bidirectional, *form, x, h0, c0, *weights)[:4]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights)):
        recompute = recompute and SAVED_GATES[mode] > 0 and backend in _SAVES_GATES
        apply = _Layer.apply if torch.compiler.is_compiling() else _apply
        return apply(backend, mode, bidirectional, recompute, *form, x, h0, c0, *weights)[:4]
    return _OPS[backend, "forward"](mode, x, h0, c0, weights, *form, bidirectional, keep_c, False)[:4]


# What Function.apply does where nothing is transformed, without its look at the signature, which takes 15 microseconds.
_apply = super(torch.autograd.Function, _Layer).apply


def _transformed(backend: str, mode: str, bidirectional: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``_Layer`` within transforms of torch.func, which would have to take its recomputation in the backward along.

    Functionalization has no rule for a Function: what changes nothing in place is applied to the values within.
    """
    functorch, interpreter = torch._C._functorch, None
    if torch._C._are_functorch_transforms_active():
        interpreter = retrieve_current_functorch_interpreter()
    if interpreter is None or interpreter.key() != functorch.TransformType.Functionalize:
        return _Layer.apply(backend, mode, bidirectional, False, *tensors)
    values = []
    for t in tensors:
        if t is not None and functorch.is_functionaltensor(t):
            torch._sync(t)
            t = functorch._unwrap_functional_tensor(t, False)
        values.append(t)
    with interpreter.lower():
        outputs = _transformed(backend, mode, bidirectional, *values)
    return tuple(functorch._wrap_functional_tensor(t, interpreter.level()) for t in outputs)
