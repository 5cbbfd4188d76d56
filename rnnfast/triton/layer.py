"""One layer on the kernels: the two functions that make a backend, as ``recurrence.py`` defines them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..recurrence import SAVED_GATES
from ..reference import GATES, split_weights
from . import graphs, kernels
from .cells import GRADIENTS
from .plan import Chip, Plan, plan


class _Form(NamedTuple):
    """The form of a sequence as the kernels see it: its sizes, and its tables on the device."""

    T: int
    N: int
    R: int
    p_offsets: Tensor | None
    p_lengths: Tensor | None
    p_resets: Tensor | None


def _form(x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None) -> _Form:
    if batch_sizes is None:
        T, N, _ = x.shape
        resets = None if resets is None else resets.contiguous().view(torch.uint8)
        return _Form(T, N, T * N, None, None if lengths is None else lengths.contiguous(), resets)
    ends = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])
    lengths = torch.arange(1, len(ends) + 1).repeat_interleave(batch_sizes - ends).flip(0)
    tables = torch.cat([batch_sizes.cumsum(0) - batch_sizes, lengths])
    if x.is_cuda:
        tables = tables.pin_memory().to(x.device, non_blocking=True)
    return _Form(len(ends), len(lengths), len(x), tables[: len(ends)], tables[len(ends) :], None)


@functools.cache
def _chip(device: torch.device) -> Chip:
    if device.type == "cpu":  # the interpreter plays an H200, but a small one: programs run one by one
        return Chip(shared_memory=227 * 1024, processors=1, generation=9)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Chip(64 * 1024, properties.multi_processor_count)
    return Chip(properties.shared_memory_per_block_optin, properties.multi_processor_count, properties.major)


def plan_on(device: torch.device, mode: str, dtype: torch.dtype, hidden: int, projected: bool, batch: int = 1) -> Plan:
    """The plan of a layer on a device, under torch's switches for recurrent layers."""
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    return plan(mode, dtype, hidden, batch, projected, tf32, _chip(device))


class _Layer:
    """What the launches of one layer, forward or backward, have in common."""

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
        self.plan = plan_on(x.device, mode, x.dtype, self.H, self.projected, self.form.N)

    @property
    def key(self) -> tuple:
        """What the launches depend on beside the tensors that they are given."""
        how = self.plan._replace(options=tuple(self.plan.options.items()))
        return self.mode, self.x.dtype, self.D, self.H, self.P, how, *self.form

    def of_rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor over the rows of the sequence: zero in those that the kernels leave out."""
        return (self.x.new_empty if self.form.p_lengths is None else self.x.new_zeros)(shape, dtype=dtype)

    def state(self, initial: Tensor | None, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A state ``[D, N, width]`` of its own, zero or as given."""
        state = self.x.new_zeros(self.D, self.form.N, width, dtype=dtype)
        return state if initial is None else state.copy_(initial)

    def of_directions(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """A weight of both directions; of a single one, twice."""
        found = [getattr(w, name) for w in self.directions]
        return found[0], found[-1]

    def launch(self, kernel: Any, width: int, *pointers: Tensor | None, steps: int = 1, **rest: Any) -> None:
        """A kernel over all rows and directions, and ``width`` units."""
        form, how = self.form, self.plan
        grid = steps * triton.cdiv(form.N, how.rows), triton.cdiv(width, how.units), self.D
        kernel[grid](*pointers, **form._asdict(), **rest, H=width, D=self.D, BH=how.units, BN=how.rows, **how.options)

    def launch_step(self, kernel: Any, width: int, inputs: int, *pointers: Tensor | None, step: int) -> None:
        """A kernel of one step, with a product of ``inputs`` terms."""
        self.launch(kernel, width, *pointers, step=step, P=inputs, PRECISION=self.plan.precision)

    def launch_cells(self, kernel: Any, inputs: int, *pointers: Tensor | None, step: int = 0) -> None:
        how = self.plan
        self.launch(
            kernel, self.H, *pointers, step=step, P=inputs, MODE=self.mode, FUSED=how.fused, PRECISION=how.precision
        )


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """On the device, with operators that neither record nor cast."""
    of_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), of_device:
        yield


def forward(
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
    with _on(x.device):
        k = _Layer(mode, x, weights, batch_sizes, lengths, resets, bidirectional)
        is_lstm, R, S = mode == "LSTM", k.form.R, SAVED_GATES[mode]
        y = k.of_rows(*x.shape[:-1], k.D * k.P)
        h = k.state(h0, k.P)
        c = k.state(c0, k.H, k.acc) if is_lstm else None
        cs = k.of_rows(*x.shape[:-1], k.D * k.H, dtype=k.acc) if is_lstm and keep_c else None
        gates = k.of_rows(k.D, R, S * k.H) if S and keep_gates else None
        if R:
            _forward(k, h, c, y, cs, gates)
        c_n = c.to(x.dtype) if is_lstm else x.new_empty(0)
        return y, h, c_n, x.new_empty(0, dtype=k.acc) if cs is None else cs, x.new_empty(0) if gates is None else gates


def _forward(k: _Layer, h: Tensor, c: Tensor | None, y: Tensor, cs: Tensor | None, gates: Tensor | None) -> None:
    x = k.x.reshape(k.form.R, k.x.shape[-1])
    # An LSTM's gates may take the place of what they are computed from: but not where that is loaded a step ahead.
    shared = gates is not None and k.mode == "LSTM" and not (k.projected or k.plan.fused)
    x_gates = gates if shared else x.new_empty(k.D, k.form.R, k.G * k.H)
    for w, out in zip(k.directions, x_gates):
        if w.b_ih is None:
            torch.mm(x, w.w_ih.t(), out=out)
        else:
            torch.addmm(w.b_ih, x, w.w_ih.t(), out=out)
    w_hh, w_hr, b_hh = (k.of_directions(name) for name in ("w_hh", "w_hr", "b_hh"))
    if k.plan.fused:
        k.launch_cells(kernels.forward, k.H, x_gates, *w_hh, *b_hh, h, h, c, y, cs, gates)
        return
    m = x.new_empty(k.D, k.form.N, k.H) if k.projected else torch.empty_like(h)

    def steps() -> None:
        for step in range(k.form.T):
            if k.projected:
                k.launch_cells(kernels.forward, k.P, x_gates, *w_hh, *b_hh, h, m, c, None, cs, gates, step=step)
                k.launch_step(kernels.project_forward, k.P, k.H, m, *w_hr, h, y, step=step)
            else:  # programs read all of the old state, and write some of the new one
                states = (h, m) if step % 2 == 0 else (m, h)
                k.launch_cells(kernels.forward, k.P, x_gates, *w_hh, *b_hh, *states, c, y, cs, gates, step=step)

    graphs.run(k.x.device, steps, "forward", *k.key, x_gates, *w_hh, *w_hr, *b_hh, h, m, c, y, cs, gates)
    if k.form.T % 2 and not k.projected:
        h.copy_(m)


def backward(
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
    with _on(x.device):
        k = _Layer(mode, x, weights, batch_sizes, lengths, resets, bidirectional)
        dc = dc if mode == "LSTM" else None  # of an absent c it has shape [0]
        dy, dc, h0, c0 = (None if t is None else t.contiguous() for t in (dy, dc, h0, c0))
        dh = k.state(dh_n, k.P, k.acc)
        dc_t = k.state(dc_n, k.H, k.acc) if mode == "LSTM" else None
        dgates = k.of_rows(k.D, k.form.R, GRADIENTS[mode] * k.H)
        dprojections = k.of_rows(k.D, k.form.R, k.P) if k.projected else None
        if k.form.R:
            _backward(k, dy, dc, gates, y, cs, h0, c0, dh, dc_t, dgates, dprojections)
        dx, dweights = _products(k, y, cs, gates, h0, dgates, dprojections, need_dx, need_dw)
        dh0, dc0 = (x.new_empty(0) if initial is None else grad.to(x.dtype) for initial, grad in ((h0, dh), (c0, dc_t)))
        return dx, dh0, dc0, dweights


def _backward(
    k: _Layer,
    dy: Tensor | None,
    dcs: Tensor | None,
    gates: Tensor,
    y: Tensor,
    cs: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    dh: Tensor,
    dc: Tensor | None,
    dgates: Tensor,
    dprojections: Tensor | None,
) -> None:
    """The gate gradients; dh and dc become those of the initial states."""
    saved = gates, y, cs, h0, c0
    w_hh, w_hr = k.of_directions("w_hh"), k.of_directions("w_hr")
    if k.plan.fused:
        k.launch_cells(kernels.backward, k.H, dy, dcs, *saved, *w_hh, None, None, dh, dc, dgates)
        return
    T, inputs = k.form.T, k.G * k.H
    da = y.new_zeros(k.D, k.form.N, inputs)
    other = torch.empty_like(dh, dtype=y.dtype) if k.projected else torch.empty_like(da)

    def steps() -> None:
        for step in reversed(range(T)):
            if k.projected:
                k.launch_step(kernels.project_backward, k.P, inputs, dy, *w_hh, da, dh, other, dprojections, step=step)
                k.launch_cells(kernels.backward, k.P, None, dcs, *saved, *w_hr, other, da, None, dc, dgates, step=step)
            else:
                gradients = (da, other) if (T - 1 - step) % 2 == 0 else (other, da)
                k.launch_cells(kernels.backward, inputs, dy, dcs, *saved, *w_hh, *gradients, dh, dc, dgates, step=step)

    graphs.run(
        k.x.device, steps, "backward", *k.key, dy, dcs, *saved, *w_hh, *w_hr, da, other, dh, dc, dgates, dprojections
    )
    for d, w in enumerate(k.directions):
        dh[d] += (other if T % 2 and not k.projected else da)[d] @ w.w_hh


def _products(
    k: _Layer,
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
    x, H, R = k.x.reshape(k.form.R, k.x.shape[-1]), k.H, k.form.R
    of_x = dgates[:, :, : k.G * H]
    dx = x.new_empty(0)
    if need_dx:
        dx = of_x[0] @ k.directions[0].w_ih
        for d in range(1, k.D):
            dx.addmm_(of_x[d], k.directions[d].w_ih)
        dx = dx.view(k.x.shape)
    dweights: list[Tensor] = []
    if not need_dw:
        return dx, dweights
    h_before = x.new_empty(k.D, R, k.P)
    if R:
        k.launch(kernels.states_before, k.P, y, h0, h_before, steps=k.form.T)
    # Rows of W_hh by the gradients that are theirs: a GRU's last differs from that of W_ih.
    parts = ((0, 0, 2), (2, 3, 1)) if k.mode == "GRU" else ((0, 0, k.G),)
    for d, w in enumerate(k.directions):
        dw_hh = torch.empty_like(w.w_hh)
        sums = dgates[d].sum(0)
        db_hh = torch.empty_like(sums[: k.G * H])
        for to, start, count in parts:
            of_h, rows = slice(start * H, (start + count) * H), slice(to * H, (to + count) * H)
            torch.mm(dgates[d, :, of_h].t(), h_before[d], out=dw_hh[rows])
            db_hh[rows] = sums[of_h]
        dweights += [of_x[d].t() @ x, dw_hh]
        if w.b_ih is not None:
            dweights += [sums[: k.G * H].clone(), db_hh]
        if k.projected:
            o, c = gates[d, :, 3 * H :].to(k.acc), cs.view(R, k.D, H)[:, d]
            dweights.append(dprojections[d].t() @ (o * c.tanh()).to(x.dtype))
    return dx, dweights
