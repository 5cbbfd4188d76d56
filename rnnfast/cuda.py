"""The CUDA backend: the recurrence of one layer as a call of its C++ operators, which choose among the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu


def reason(
    device: torch.device, mode: str, dtype: torch.dtype, hidden: int, batch: int, bidirectional: bool, projected: bool
) -> str:
    """Of the forward; the backward has a choice of its own."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0
    return torch.ops.rnnfast.cuda_plan(
        mode, dtype, batch, hidden, bidirectional, projected, gpu.allows_tf32(), False, index
    )


class Layer(gpu.Layer):
    gates_replace_x = True  # each element is read before it is written, by the same thread

    def of_directions(self, name: str) -> list[Tensor]:
        """A weight of all directions; an absent one: none."""
        return [w for w in (getattr(of_one, name) for of_one in self.directions) if w is not None]

    def forward_steps(
        self, x_gates: Tensor, h: Tensor, c: Tensor | None, y: Tensor, cs: Tensor | None, gates: Tensor | None
    ) -> None:
        w_hh, b_hh, w_hr = (self.of_directions(name) for name in ("w_hh", "b_hh", "w_hr"))
        _, _, R, *tables = self.form
        y, cs = y.view(R, -1), None if cs is None else cs.view(R, -1)
        torch.ops.rnnfast.cuda_forward_steps(
            self.mode, x_gates, w_hh, b_hh, w_hr, h, c, y, cs, gates, *tables, self.form.T, gpu.allows_tf32(),
            gpu.stream_of(self.x.device),
        )  # fmt: skip

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
        _, _, R, *tables = self.form
        dy, dcs = (None if t is None else t.view(R, -1) for t in (dy, dcs))
        y, cs = y.view(R, -1), cs.view(R, -1) if self.mode == "LSTM" else cs
        torch.ops.rnnfast.cuda_backward_steps(
            self.mode, dy, dcs, gates, y, cs, h0, c0, w_hh, w_hr, dh, dc, dgates, dprojections, *tables, self.form.T,
            gpu.allows_tf32(), gpu.stream_of(self.x.device),
        )  # fmt: skip

    def states_before(self, y: Tensor, h0: Tensor | None, out: Tensor) -> None:
        T, _, R, *tables = self.form
        torch.ops.rnnfast.cuda_states_before(y.view(R, -1), h0, out, *tables, T, gpu.stream_of(self.x.device))
