"""The recurrence of one layer as launches of the kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import gpu
from ..records import BackwardSteps, ForwardSteps, Inputs
from . import kernels
from .plan import Chip, Plan, plan


@functools.cache
def _chip(device: torch.device) -> Chip:
    if device.type == "cpu":  # the interpreter plays an H200, but a small one: programs run one by one
        return Chip(shared_memory=227 * 1024, processors=1, generation=9)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Chip(64 * 1024, properties.multi_processor_count, warp_size=properties.warp_size)
    shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # the stubs lack it
    return Chip(shared_memory, properties.multi_processor_count, properties.major)


def plan_on(device: torch.device, mode: str, dtype: torch.dtype, hidden: int, projected: bool, batch: int = 1) -> Plan:
    """The plan of a layer on a device, under torch's switches for recurrent layers."""
    return plan(mode, dtype, hidden, batch, projected, gpu.allows_tf32(), _chip(device))


def reason(
    device: torch.device, mode: str, dtype: torch.dtype, hidden: int, batch: int, bidirectional: bool, projected: bool,
    backward: bool = False,
) -> str:  # fmt: skip
    return plan_on(device, mode, dtype, hidden, projected, batch).reason


_ABSENT: Any = None  # for a field that a kernel leaves alone


class Layer(gpu.Layer):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.plan = plan_on(self.x.device, self.mode, self.x.dtype, self.H, self.projected, self.form.N)

    @property
    def gates_replace_x(self) -> bool:
        return not self.plan.fused  # there x is loaded a step ahead

    def of_directions(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """A weight of both directions; of a single one, twice."""
        found = [getattr(w, name) for w in self.directions]
        return found[0], found[-1]

    def launch(self, kernel: Any, width: int, *operands: Any, steps: int = 1, **rest: Any) -> None:
        """A kernel over all rows and directions, and ``width`` units."""
        form, how = self.form, self.plan
        grid = steps * triton.cdiv(form.N, how.rows), triton.cdiv(width, how.units), self.D
        align = math.gcd(self.H, self.P, 16)
        kernel[grid](
            *operands, form.tables, T=form.T, N=form.N, R=form.R, **rest, H=width, D=self.D, ALIGN=align, BH=how.units,
            BN=how.rows, **how.options,
        )  # fmt: skip

    def launch_step(self, kernel: Any, width: int, inputs: int, *operands: Any, step: int) -> None:
        """A kernel of one step, with a product of ``inputs`` terms."""
        self.launch(kernel, width, *operands, step=step, P=inputs, PRECISION=self.plan.precision)

    def launch_cells(self, kernel: Any, inputs: int, *operands: Any, step: int = 0) -> None:
        how = self.plan
        self.launch(
            kernel, self.H, *operands, step=step, P=inputs, MODE=self.mode, FUSED=how.fused, PRECISION=how.precision
        )

    def forward_steps(self, of: ForwardSteps) -> None:
        weights = [self.of_directions(name) for name in ("w_hh", "b_hh", "w_units")]
        h, y = of.h, of.y
        if self.plan.fused:
            self.launch_cells(kernels.forward, self.H, of, h, *weights)
            return
        T, P = self.form.T, self.P
        m = h.new_empty(self.D, self.form.N, self.H) if self.projected else torch.empty_like(h)
        unprojected, w_hr = of._replace(y=_ABSENT), self.of_directions("w_hr")
        for step in range(T):
            if self.projected:
                self.launch_cells(kernels.forward, P, unprojected, m, *weights, step=step)
                self.launch_step(kernels.project_forward, P, self.H, m, w_hr, h, y, step=step)
            else:  # programs read all of the old state, and write some of the new one
                before, after = (h, m) if step % 2 == 0 else (m, h)
                self.launch_cells(kernels.forward, P, of._replace(h=before), after, *weights, step=step)
        if T % 2 and not self.projected:
            h.copy_(m)

    def backward_steps(self, of: BackwardSteps) -> None:
        w_hh, w_hr, w_units = (self.of_directions(name) for name in ("w_hh", "w_hr", "w_units"))
        if self.plan.fused:
            self.launch_cells(kernels.backward, self.H, of, w_hh, w_units, None, None)
            return
        T, P, inputs, dh = self.form.T, self.P, self.G * self.H, of.dh
        da = of.y.new_zeros(self.D, self.form.N, inputs)
        other = torch.empty_like(dh, dtype=of.y.dtype) if self.projected else torch.empty_like(da)
        unprojected = of._replace(dy=_ABSENT, dh=_ABSENT)
        for step in reversed(range(T)):
            if self.projected:
                through = of.dy, w_hh, da, dh, other, of.dprojections
                self.launch_step(kernels.project_backward, P, inputs, *through, step=step)
                self.launch_cells(kernels.backward, P, unprojected, w_hr, w_units, other, da, step=step)
            else:
                gradients = (da, other) if (T - 1 - step) % 2 == 0 else (other, da)
                self.launch_cells(kernels.backward, inputs, of, w_hh, w_units, *gradients, step=step)
        for d, w in enumerate(self.directions):
            dh[d] += (other if T % 2 and not self.projected else da)[d] @ w.w_hh

    def states_before(self, y: Tensor, h0: Tensor | None, out: Tensor) -> None:
        self.launch(kernels.states_before, self.P, y, h0, out, steps=self.form.T)


forward, backward = functools.partial(gpu.forward, Layer), functools.partial(gpu.backward, Layer)
gate_gradients = functools.partial(gpu.gate_gradients, Layer)
