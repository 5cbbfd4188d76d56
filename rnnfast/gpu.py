"""One layer on a GPU: the recurrence is a backend's, the products over the whole sequence are torch's.

A backend for GPUs is a module with a subclass of ``Layer``, and what :class:`rnnfast.backends.Backend` asks for:
``forward`` and ``backward``, which are those here with that class, and ``reason``.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import border
from .backends import DTYPES, find_cuda
from .cells import CELLS, GATES, GRADIENTS, HAS_CELL_STATE, RANGES_OF_A, SAVED_GATES
from .reference import split_weights


class Form(NamedTuple):
    """The form of a sequence as the kernels see it: its sizes, and its tables on the device."""

    T: int
    N: int
    R: int
    offsets: Tensor | None  # [T]: where step t begins in packed rows
    lengths: Tensor | None  # [N]
    resets: Tensor | None  # [T, N], of bytes


def _form(x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None) -> Form:
    if batch_sizes is None:
        T, N, _ = x.shape
        resets = None if resets is None else resets.contiguous().view(torch.uint8)
        return Form(T, N, T * N, None, None if lengths is None else lengths.contiguous(), resets)
    T, tables = len(batch_sizes), _tables(batch_sizes, x.device)
    return Form(T, len(tables) - T, len(x), tables[:T], tables[T:], None)


# The last tables of each device and stream, and the batch sizes that they are of: the layers of a call, and their
# backward, need the same. Another stream's may still be on their way.
_last_tables: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def _tables(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """Of packed rows: where each step begins, and the length of each row, ``[T + N]``."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # memory of the graph
        return _make_tables(batch_sizes, device)
    where = device, stream_of(device)
    sizes, tables = _last_tables.get(where, (None, None))
    if sizes is None or not torch.equal(sizes, batch_sizes):
        tables = _make_tables(batch_sizes, device)
        _last_tables[where] = batch_sizes.clone(), tables
    return tables


def _make_tables(batch_sizes: Tensor, device: torch.device) -> Tensor:
    ends = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])
    lengths = torch.arange(1, len(ends) + 1).repeat_interleave(batch_sizes - ends).flip(0)
    tables = torch.cat([batch_sizes.cumsum(0) - batch_sizes, lengths])
    return tables.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tables


_rnn_switches = torch.backends.cudnn.rnn  # to find it takes longer than to read it


def allows_tf32() -> bool:
    """Whether the float32 products of the recurrence may be made of TF32: torch's switch for recurrent layers."""
    return _rnn_switches.fp32_precision == "tf32"


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

    def __init__(
        self,
        mode: str,
        x: Tensor,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        bidirectional: bool,
    ) -> None:
        self.mode, self.x, self.form = mode, x, _form(x, batch_sizes, lengths, resets)
        self.directions = split_weights([w.contiguous() for w in weights], bidirectional)
        w = self.directions[0]
        self.D, self.G, self.H, self.P = len(self.directions), GATES[mode], len(w.w_hh) // GATES[mode], w.w_hh.shape[1]
        self.projected = w.w_hr is not None
        self.acc = torch.promote_types(x.dtype, torch.float32)
        self.allows_tf32, self.stream, self.by_library = allows_tf32(), stream_of(x.device), _multiplies(x)
        # A tensor over the rows of the sequence is zero in those that the kernels leave out.
        self.new_rows = x.new_empty if lengths is None else x.new_zeros

    @property
    @abc.abstractmethod
    def gates_replace_x(self) -> bool:
        """Whether gates may take the place of what they are computed from."""

    @abc.abstractmethod
    def forward_steps(
        self,
        x_gates: Tensor,  # [D, R, G*H]: W_ih x + b_ih
        h: Tensor,  # [D, N, P]: before all steps on entry, after them on return
        c: Tensor | None,  # [D, N, H], likewise
        y: Tensor,  # [R, D*P]
        cs: Tensor | None,  # [R, D*H]: c after every step
        gates: Tensor | None,  # [D, R, S*H]: what the backward needs; may be x_gates
    ) -> None:
        """All steps of all directions."""

    @abc.abstractmethod
    def backward_steps(
        self,
        dy: Tensor | None,
        dcs: Tensor | None,
        gates: Tensor,
        y: Tensor,
        cs: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        dh: Tensor,  # [D, N, P]: of the final state on entry, of the initial one on return
        dc: Tensor | None,  # [D, N, H], likewise
        dgates: Tensor,  # [D, R, K*H]: at W_ih x; a GRU's last part is that of the candidate at W_hh h
        dprojections: Tensor | None,  # [D, R, P]: at W_hr m
    ) -> None:
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


def _on(device: torch.device) -> contextlib.AbstractContextManager:
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


def forward(
    backend: type[Layer],
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    bidirectional: bool,
    keep_c: bool,
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    border.check_layer(mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, DTYPES)
    with _on(x.device):
        k = backend(mode, x, weights, batch_sizes, lengths, resets, bidirectional)
        has_cell, R, S, rows = HAS_CELL_STATE[mode], k.form.R, SAVED_GATES[mode], x.shape[:-1]
        y = k.new_rows(*rows, k.D * k.P)
        h, c = k.state(h0, k.P, x.dtype), k.state(c0, k.H, k.acc) if has_cell else None
        cs = k.new_rows(*rows, k.D * k.H, dtype=k.acc) if has_cell and keep_c else None
        gates = k.new_rows(k.D, R, S * k.H) if S and keep_gates else None
        if R:
            in_place = gates is not None and S == k.G and not k.projected and k.gates_replace_x
            x_gates = gates if in_place else x.new_empty(k.D, R, k.G * k.H)
            x_rows = x.reshape(R, x.shape[-1])
            for w, out in zip(k.directions, x_gates.unbind()):
                k.multiply(x_rows, w.w_ih.t(), out, add=w.b_ih)
            k.forward_steps(x_gates, h, c, y, cs, gates)
        if c is None:
            c = x.new_empty(0)
        elif k.acc != x.dtype:
            c = c.to(x.dtype)
        return y, h, c, x.new_empty(0, dtype=k.acc) if cs is None else cs, x.new_empty(0) if gates is None else gates


def backward(
    backend: type[Layer],
    mode: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    bidirectional: bool,
    y: Tensor,
    cs: Tensor,
    gates: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    sizes = border.check_layer(mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, DTYPES)
    border.check_backward(sizes, SAVED_GATES[mode], dy, dh_n, dc_n, dc, y, cs, gates)
    with _on(x.device):
        k = backend(mode, x, weights, batch_sizes, lengths, resets, bidirectional)
        has_cell = HAS_CELL_STATE[mode]
        dcs = dc if has_cell else None  # of an absent c it has shape [0]
        dy, dcs, h0, c0, y, cs, gates = [None if t is None else t.contiguous() for t in (dy, dcs, h0, c0, y, cs, gates)]
        if has_cell and not k.projected and all(t is None for t in (h0, c0, dh_n, dc_n)):
            dh, dc = x.new_zeros((2, k.D, k.form.N, k.H), dtype=k.acc).unbind()  # one launch: neither is returned
        else:
            dh, dc = k.state(dh_n, k.P, k.acc), k.state(dc_n, k.H, k.acc) if has_cell else None
        dgates = k.new_rows(k.D, k.form.R, GRADIENTS[mode] * k.H)
        dprojections = k.new_rows(k.D, k.form.R, k.P) if k.projected else None
        if k.form.R:
            k.backward_steps(dy, dcs, gates, y, cs, h0, c0, dh, dc, dgates, dprojections)
        dx, dweights = _products(k, y, cs, gates, h0, dgates, dprojections, need_dx, need_dw)
        dh0 = x.new_empty(0) if h0 is None else dh.to(x.dtype)
        dc0 = x.new_empty(0) if c0 is None else dc.to(x.dtype)
        return dx, dh0, dc0, dweights


def _part(rows: Tensor, first: int, count: int) -> Tensor:
    return rows if count == len(rows) else rows[first : first + count]


def _products(
    k: Layer,
    y: Tensor,
    cs: Tensor,
    gates: Tensor,
    h0: Tensor | None,
    dgates: Tensor,
    dprojections: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, list[Tensor]]:
    """What the gate gradients make of x and the weights: products over the whole sequence."""
    x, H, R, dgates_of = k.x.reshape(k.form.R, k.x.shape[-1]), k.H, k.form.R, [one.t() for one in dgates.unbind()]
    at_x, ranges = [_part(one, 0, k.G * H) for one in dgates_of], RANGES_OF_A[k.mode]
    dx = x.new_empty(0)
    if need_dx:
        dx = x.new_empty(x.shape)  # contiguous, whatever x is
        for d, w in enumerate(k.directions):
            k.multiply(at_x[d].t(), w.w_ih, dx, add=dx if d else None)
        dx = dx.view(k.x.shape)
    dweights: list[Tensor] = []
    if not need_dw:
        return dx, dweights
    h_before = x.new_empty(k.D, R, k.P)
    if R:
        k.states_before(y, h0, h_before)
    for d, w in enumerate(k.directions):
        dw_ih, dw_hh, at_h, before = torch.empty_like(w.w_ih), torch.empty_like(w.w_hh), dgates_of[d], h_before[d]
        k.multiply(at_x[d], x, dw_ih)
        for gate, at, count in ranges:  # the gradients at W_hh h, of which a candidate's differs from that at W_ih x
            k.multiply(_part(at_h, at * H, count * H), before, _part(dw_hh, gate * H, count * H))
        dweights += [dw_ih, dw_hh]
        if w.b_ih is not None:
            sums = at_h.sum(1)
            dweights += [
                _part(sums, 0, k.G * H),
                torch.cat([_part(sums, at * H, count * H) for _, at, count in ranges]),
            ]
        if k.projected:
            m = CELLS[k.mode].output(
                gates[d].to(k.acc).view(R, SAVED_GATES[k.mode], H).unbind(1), [cs.view(R, k.D, H)[:, d]]
            )
            dw_hr = torch.empty_like(w.w_hr)
            k.multiply(dprojections[d].t(), m.to(x.dtype), dw_hr)
            dweights.append(dw_hr)
    return dx, dweights
