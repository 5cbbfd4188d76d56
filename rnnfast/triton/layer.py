"""The recurrence of one layer as launches of the kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import gpu
from . import kernels
from .plan import Chip, Plan, plan


@functools.cache
def _chip(device: torch.device) -> Chip:
    if device.type == "cpu":  # the interpreter plays an H200, but a small one: programs run one by one
        return Chip(shared_memory=227 * 1024, processors=1, generation=9)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Chip(64 * 1024, properties.multi_processor_count, warp_size=properties.warp_size)
    return Chip(properties.shared_memory_per_block_optin, properties.multi_processor_count, properties.major)


def plan_on(device: torch.device, mode: str, dtype: torch.dtype, hidden: int, projected: bool, batch: int = 1) -> Plan:
    """The plan of a layer on a device, under torch's switches for recurrent layers."""
    return plan(mode, dtype, hidden, batch, projected, gpu.allows_tf32(), _chip(device))


def reason(
    device: torch.device, mode: str, dtype: torch.dtype, hidden: int, batch: int, bidirectional: bool, projected: bool
) -> str:
    return plan_on(device, mode, dtype, hidden, projected, batch).reason


class Layer(gpu.Layer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plan = plan_on(self.x.device, self.mode, self.x.dtype, self.H, self.projected, self.form.N)

    @property
    def gates_replace_x(self) -> bool:
        return not self.plan.fused  # there x is loaded a step ahead

    def of_directions(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """A weight of both directions; of a single one, twice."""
        found = [getattr(w, name) for w in self.directions]
        return found[0], found[-1]

    def launch(self, kernel: Any, width: int, *pointers: Tensor | None, steps: int = 1, **rest: Any) -> None:
        """A kernel over all rows and directions, and ``width`` units."""
        form, how = self.form, self.plan
        grid = steps * triton.cdiv(form.N, how.rows), triton.cdiv(width, how.units), self.D
        align = math.gcd(self.H, self.P, 16)
        kernel[grid](
            *pointers, p_offsets=form.offsets, p_lengths=form.lengths, p_resets=form.resets, T=form.T, N=form.N,
            R=form.R, **rest, H=width, D=self.D, ALIGN=align, BH=how.units, BN=how.rows,
            **how.options,
        )  # fmt: skip

    def launch_step(self, kernel: Any, width: int, inputs: int, *pointers: Tensor | None, step: int) -> None:
        """A kernel of one step, with a product of ``inputs`` terms."""
        self.launch(kernel, width, *pointers, step=step, P=inputs, PRECISION=self.plan.precision)

    def launch_cells(self, kernel: Any, inputs: int, *pointers: Tensor | None, step: int = 0) -> None:
        how = self.plan
        self.launch(
            kernel, self.H, *pointers, step=step, P=inputs, MODE=self.mode, FUSED=how.fused, PRECISION=how.precision
        )

    def forward_steps(
        self, x_gates: Tensor, h: Tensor, c: Tensor | None, y: Tensor, cs: Tensor | None, gates: Tensor | None
    ) -> None:
        w_hh, w_hr, b_hh = (self.of_directions(name) for name in ("w_hh", "w_hr", "b_hh"))
        if self.plan.fused:
            self.launch_cells(kernels.forward, self.H, x_gates, *w_hh, *b_hh, h, h, c, y, cs, gates)
            return
        T, P = self.form.T, self.P
        m = h.new_empty(self.D, self.form.N, self.H) if self.projected else torch.empty_like(h)
        for step in range(T):
            if self.projected:
                self.launch_cells(kernels.forward, P, x_gates, *w_hh, *b_hh, h, m, c, None, cs, gates, step=step)
                self.launch_step(kernels.project_forward, P, self.H, m, *w_hr, h, y, step=step)
            else:  # programs read all of the old state, and write some of the new one
                states = (h, m) if step % 2 == 0 else (m, h)
                self.launch_cells(kernels.forward, P, x_gates, *w_hh, *b_hh, *states, c, y, cs, gates, step=step)
        if T % 2 and not self.projected:
            h.copy_(m)

    def backward_steps(
        self,
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
        saved = gates, y, cs, h0, c0
        w_hh, w_hr = self.of_directions("w_hh"), self.of_directions("w_hr")
        if self.plan.fused:
            self.launch_cells(kernels.backward, self.H, dy, dcs, *saved, *w_hh, None, None, dh, dc, dgates)
            return
        T, P, inputs = self.form.T, self.P, self.G * self.H
        da = y.new_zeros(self.D, self.form.N, inputs)
        other = torch.empty_like(dh, dtype=y.dtype) if self.projected else torch.empty_like(da)
        for step in reversed(range(T)):
            if self.projected:
                self.launch_step(kernels.project_backward, P, inputs, dy, *w_hh, da, dh, other, dprojections, step=step)
                self.launch_cells(kernels.backward, P, None, dcs, *saved, *w_hr, other, da, None, dc, dgates, step=step)
            else:
                gradients = (da, other) if (T - 1 - step) % 2 == 0 else (other, da)
                self.launch_cells(
                    kernels.backward, inputs, dy, dcs, *saved, *w_hh, *gradients, dh, dc, dgates, step=step
                )
        for d, w in enumerate(self.directions):
            dh[d] += (other if T % 2 and not self.projected else da)[d] @ w.w_hh

    def states_before(self, y: Tensor, h0: Tensor | None, out: Tensor) -> None:
        self.launch(kernels.states_before, self.P, y, h0, out, steps=self.form.T)


forward, backward = functools.partial(gpu.forward, Layer), functools.partial(gpu.backward, Layer)
