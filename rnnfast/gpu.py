"""One layer on a GPU: the recurrence is a backend's, the products over the whole sequence are torch's.

A backend for GPUs is a module with a subclass of ``Layer``, and what :class:`rnnfast.backends.Backend` asks for:
``forward``, ``backward`` and ``gate_gradients``, which are those here with that class, and ``reason``.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import border, reference
from .backends import DTYPES, find_cuda
from .cells import GATES, GRADIENTS, HAS_CELL_STATE, MODES, RANGES_OF_A, SAVED_GATES, UNIT_WEIGHTS
from .records import (
    BackwardSteps,
    ForwardSteps,
    GateGradients,
    InputGradients,
    Inputs,
    OutputGradients,
    Outputs,
    Saved,
    Tables,
    Weights,
)


class Form(NamedTuple):
    """The form of a sequence as the kernels see it: its sizes, and its tables on the device."""

    T: int
    N: int
    R: int
    tables: Tables


def _form(inputs: Inputs) -> Form:
    x, batch_sizes, lengths, resets = inputs.x, inputs.batch_sizes, inputs.lengths, inputs.resets
    if batch_sizes is None:
        T, N, _ = x.shape
        resets = None if resets is None else resets.contiguous().view(torch.uint8)
        return Form(T, N, T * N, Tables(None, None if lengths is None else lengths.contiguous(), resets))
    T, tables = len(batch_sizes), _tables(batch_sizes, x.device)
    return Form(T, len(tables) - T, len(x), Tables(tables[:T], tables[T:], None))


# The last tables of each device and stream, and the batch sizes that they are of: the layers of a call, and their
# backward, need the same. Another stream's may still be on their way.
_last_tables: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def _tables(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """Of packed rows: where each step begins, and the length of each row, ``[T + N]``."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # memory of the graph
        return _make_tables(batch_sizes, device)
    where = device, stream_of(device)
    last = _last_tables.get(where)
    if last is None or not torch.equal(last[0], batch_sizes):
        last = _last_tables[where] = batch_sizes.clone(), _make_tables(batch_sizes, device)
    return last[1]


def _make_tables(batch_sizes: Tensor, device: torch.device) -> Tensor:
    ends = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])
    lengths = torch.arange(1, len(ends) + 1).repeat_interleave(batch_sizes - ends).flip(0)
    tables = torch.cat([batch_sizes.cumsum(0) - batch_sizes, lengths])
    return tables.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tables


_rnn_switches: Any = torch.backends.cudnn.rnn  # to find it takes longer than to read it


def allows_tf32() -> bool:
    """Whether the float32 products of the recurrence may be made of TF32: torch's switch for recurrent layers."""
    precision: str = _rnn_switches.fp32_precision
    return precision == "tf32"


def stream_of(device: torch.device) -> int:
    """As the CUDA library takes it. On a CPU there are the tests' emulated kernels."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _multiplies(x: Tensor) -> bool:
    """Whether the CUDA library makes the products: of float32, in a precision for which torch's have no switch."""
    return x.dtype == torch.float32 and x.is_cuda and find_cuda(x.device).available


class Layer(abc.ABC):
    """A layer, forward or backward, on tensors that are checked and contiguous.

    D directions, G gates, H units, P outputs (H, but for a projection); the form has T, N and R.
    """

    def __init__(self, inputs: Inputs) -> None:
        mode, x = inputs.mode, inputs.x
        self.mode, self.x, self.form = mode, x, _form(inputs)
        self.directions = inputs._replace(weights=[w.contiguous() for w in inputs.weights]).directions()
        w = self.directions[0]
        self.D, self.G, self.H, self.P = len(self.directions), GATES[mode], len(w.w_hh) // GATES[mode], w.w_hh.shape[1]
        self.projected = w.w_hr is not None
        self.acc = torch.promote_types(x.dtype, torch.float32)
        self.allows_tf32, self.stream, self.by_library = allows_tf32(), stream_of(x.device), _multiplies(x)
        # A tensor over the rows of the sequence is zero in those that the kernels leave out.
        self.new_rows = x.new_empty if inputs.lengths is None else x.new_zeros

    @property
    @abc.abstractmethod
    def gates_replace_x(self) -> bool:
        """Whether gates may take the place of what they are computed from."""

    @abc.abstractmethod
    def forward_steps(self, of: ForwardSteps) -> None:
        """All steps of all directions."""

    @abc.abstractmethod
    def backward_steps(self, of: BackwardSteps) -> None:
        """All steps of all directions, from the last to the first."""

    @abc.abstractmethod
    def states_before(self, y: Tensor, h0: Tensor | None, out: Tensor) -> None:
        """The state that entered each step, ``[D, R, P]``."""

    def state(self, given: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
        """A state ``[D, N, width]`` of its own, zero or as given."""
        if given is None:
            return self.x.new_zeros((self.D, self.form.N, width), dtype=dtype)
        return given.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, add: Tensor | None = None) -> None:
        """``out = a b + add``; float32 in the precision of recurrent layers."""
        if self.by_library:
            if add is not None and add is not out:
                out.copy_(add)
            if _library_multiply(a, b, out, add is not None, self.allows_tf32, self.stream):
                return
        if add is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(add, a, b, out=out)


_library_multiply = torch.ops.rnnfast.cuda_multiply.default
_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On the device, with operators that neither record nor cast. Mostly all of it holds already, and is only asked."""
    is_elsewhere = device.type == "cuda" and torch.cuda.current_device() != device.index
    if is_elsewhere or torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return _switched(device)
    return _below_autograd()


@contextlib.contextmanager
def _switched(device: torch.device) -> Iterator[None]:
    of_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), of_device, _below_autograd():
        yield


def forward(backend: type[Layer], inputs: Inputs, keep_c: bool, keep_gates: bool) -> Outputs:
    border.check_layer(inputs, DTYPES)
    border.check_values(inputs)
    mode, x = inputs.mode, inputs.x
    with _on(x.device):
        k = backend(inputs)
        has_cell, D, R, S = HAS_CELL_STATE[mode], k.D, k.form.R, SAVED_GATES[mode]
        y = k.new_rows(R, D * k.P)
        h, c = k.state(inputs.h0, k.P, x.dtype), k.state(inputs.c0, k.H, k.acc) if has_cell else None
        cs = k.new_rows(R, D * k.H, dtype=k.acc) if has_cell and keep_c else None
        gates = k.new_rows(D, R, S * k.H) if S and keep_gates else None
        if R:
            in_place = S == k.G and not k.projected and k.gates_replace_x
            x_gates = gates if in_place and gates is not None else x.new_empty(D, R, k.G * k.H)
            x_rows = x.reshape(R, x.shape[-1])
            for w, out in zip(k.directions, x_gates.unbind()):
                k.multiply(x_rows, w.w_ih.t(), out, add=w.b_ih)
            k.forward_steps(ForwardSteps(x_gates, h, c, y, cs, gates))
        rows, absent = x.shape[:-1], x.new_empty(0)
        return Outputs(
            y.view(*rows, D * k.P),
            h,
            absent if c is None else c.to(x.dtype),
            x.new_empty(0, dtype=k.acc) if cs is None else cs.view(*rows, D * k.H),
            x.new_empty(0) if gates is None else gates,
        )


def backward(
    backend: type[Layer], inputs: Inputs, grads: OutputGradients, saved: Saved, need_dx: bool, need_dw: bool
) -> InputGradients:
    _check_backward(inputs, grads, saved)
    x = inputs.x
    with _on(x.device):
        k, of = _sweep(backend, inputs, grads, saved)
        dx = _input_gradient(k, of.dgates) if need_dx else x.new_empty(0)
        dweights = _weight_gradients(k, of, reference.without_padding(inputs).x) if need_dw else []
        return InputGradients(dx, *_state_gradients(x, of), dweights)


def gate_gradients(backend: type[Layer], inputs: Inputs, grads: OutputGradients, saved: Saved) -> GateGradients:
    _check_backward(inputs, grads, saved)
    with _on(inputs.x.device):
        _, of = _sweep(backend, inputs, grads, saved)
        dgates = of.dgates if of.dprojections is None else torch.cat([of.dgates, of.dprojections], 2)
        return GateGradients(dgates, *_state_gradients(inputs.x, of))


def _check_backward(inputs: Inputs, grads: OutputGradients, saved: Saved) -> None:
    sizes = border.check_layer(inputs, DTYPES)
    border.check_backward(sizes, SAVED_GATES[inputs.mode], grads, saved)
    border.check_values(inputs)


def _sweep(backend: type[Layer], inputs: Inputs, grads: OutputGradients, saved: Saved) -> tuple[Layer, BackwardSteps]:
    """All steps of a backward, and what they have read and written."""
    k, x = backend(inputs), inputs.x
    has_cell, R = HAS_CELL_STATE[k.mode], k.form.R

    def rows(t: Tensor, width: int) -> Tensor:
        return t.reshape(R, k.D * width).contiguous()

    y, cs = rows(saved.y, k.P), rows(saved.c, k.H) if has_cell else saved.c
    dy = None if grads.dy is None else rows(grads.dy, k.P)
    dcs = rows(grads.dc, k.H) if has_cell and grads.dc is not None else None  # of an absent c it has shape [0]
    h0, c0 = (None if t is None else t.contiguous() for t in (inputs.h0, inputs.c0))
    gates, dh_n, dc_n = saved.gates.contiguous(), grads.dh_n, grads.dc_n
    dc: Tensor | None
    if has_cell and not k.projected and all(t is None for t in (h0, c0, dh_n, dc_n)):
        dh, dc = x.new_zeros((2, k.D, k.form.N, k.H), dtype=k.acc).unbind()  # one launch: neither is returned
    else:
        dh, dc = k.state(dh_n, k.P, k.acc), k.state(dc_n, k.H, k.acc) if has_cell else None
    dgates = k.new_rows(k.D, R, (GRADIENTS[k.mode] + UNIT_WEIGHTS[k.mode]) * k.H)
    dprojections = k.new_rows(k.D, R, k.P) if k.projected else None
    of = BackwardSteps(dy, dcs, gates, y, cs, h0, c0, dh, dc, dgates, dprojections)
    if R:
        k.backward_steps(of)
    return k, of


def _state_gradients(x: Tensor, of: BackwardSteps) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(0) if of.h0 is None else of.dh.to(x.dtype),
        x.new_empty(0) if of.c0 is None or of.dc is None else of.dc.to(x.dtype),
    )


def _part(rows: Tensor, first: int, count: int) -> Tensor:
    return rows if count == len(rows) else rows[first : first + count]


# What the gate gradients make of x and the weights: products over the whole sequence.


def _input_gradient(k: Layer, dgates: Tensor) -> Tensor:
    dx = k.x.new_empty(k.form.R, k.x.shape[-1])
    for d, w in enumerate(k.directions):
        k.multiply(_part(dgates[d].t(), 0, k.G * k.H).t(), w.w_ih, dx, add=dx if d else None)
    return dx.view(k.x.shape)


def _weight_gradients(k: Layer, of: BackwardSteps, x: Tensor) -> list[Tensor]:
    x, H, R = x.reshape(k.form.R, x.shape[-1]), k.H, k.form.R
    h_before = x.new_empty(k.D, R, k.P)
    if R:
        k.states_before(of.y, of.h0, h_before)
    found: list[Tensor] = []
    for d, w in enumerate(k.directions):
        dw_ih, dw_hh, at_h, before = torch.empty_like(w.w_ih), torch.empty_like(w.w_hh), of.dgates[d].t(), h_before[d]
        k.multiply(_part(at_h, 0, k.G * H), x, dw_ih)
        ranges = RANGES_OF_A[k.mode]
        for gate, at, count in ranges:  # the gradients at W_hh h, of which a candidate's differs from that at W_ih x
            k.multiply(_part(at_h, at * H, count * H), before, _part(dw_hh, gate * H, count * H))
        grads = Weights(dw_ih, dw_hh)
        if w.b_ih is not None or w.w_units is not None:
            sums = at_h.sum(1)
        if w.w_units is not None:
            # not a part of the sums that other gradients have
            grads = grads._replace(w_units=sums[GRADIENTS[k.mode] * H :].clone())
        if w.b_ih is not None:
            of_a = torch.cat([_part(sums, at * H, count * H) for _, at, count in ranges])
            grads = grads._replace(b_ih=_part(sums, 0, k.G * H), b_hh=of_a)
        if w.w_hr is not None and of.dprojections is not None:
            saved = of.gates[d].to(k.acc).view(R, SAVED_GATES[k.mode], H).unbind(1)
            m = MODES[k.mode].output(saved, [of.cs.view(R, k.D, H)[:, d]])
            dw_hr = torch.empty_like(w.w_hr)
            k.multiply(of.dprojections[d].t(), m.to(x.dtype), dw_hr)
            grads = grads._replace(w_hr=dw_hr)
        found += [grad for grad in grads if grad is not None]
    return found
