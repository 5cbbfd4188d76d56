"""The CUDA backend: the recurrence of one layer as a call of its C++ operators, which choose among the kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import gpu
from .cells import HAS_CELL_STATE


def reason(
    device: torch.device, mode: str, dtype: torch.dtype, hidden: int, batch: int, bidirectional: bool, projected: bool
) -> str:
    """Of the forward; the backward has a choice of its own."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0
    return torch.ops.rnnfast.cuda_plan(
        mode, dtype, batch, hidden, bidirectional, projected, gpu.allows_tf32(), False, index
    )


_forward_steps = torch.ops.rnnfast.cuda_forward_steps.default
_backward_steps = torch.ops.rnnfast.cuda_backward_steps.default
_states_before = torch.ops.rnnfast.cuda_states_before.default


class Layer(gpu.Layer):
    gates_replace_x = True  # each element is read before it is written, by the same thread

    def of_directions(self, name: str) -> list[Tensor]:
        """A weight of all directions; an absent one: none."""
        return [w for of_one in self.directions if (w := getattr(of_one, name)) is not None]

    def forward_steps(
        self, x_gates: Tensor, h: Tensor, c: Tensor | None, y: Tensor, cs: Tensor | None, gates: Tensor | None
    ) -> None:
        w_hh, b_hh, w_hr = self.of_directions("w_hh"), self.of_directions("b_hh"), self.of_directions("w_hr")
        T, _, R, *tables = self.form
        y, cs = y.view(R, -1), None if cs is None else cs.view(R, -1)
        _forward_steps(
            self.mode, x_gates, w_hh, b_hh, w_hr, h, c, y, cs, gates, *tables, T, self.allows_tf32, self.stream
        )

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
        w_hh, w_hr = self.of_directions("w_hh"), self.of_directions("w_hr")
        T, _, R, *tables = self.form
        dy, dcs = None if dy is None else dy.view(R, -1), None if dcs is None else dcs.view(R, -1)
        y, cs = y.view(R, -1), cs.view(R, -1) if HAS_CELL_STATE[self.mode] else cs
        _backward_steps(
            self.mode, dy, dcs, gates, y, cs, h0, c0, w_hh, w_hr, dh, dc, dgates, dprojections, *tables, T,
            self.allows_tf32, self.stream,
        )  # fmt: skip

    def states_before(self, y: Tensor, h0: Tensor | None, out: Tensor) -> None:
        T, _, R, *tables = self.form
        _states_before(y.view(R, -1), h0, out, *tables, T, self.stream)


forward, backward = functools.partial(gpu.forward, Layer), functools.partial(gpu.backward, Layer)
