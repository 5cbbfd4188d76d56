"""The CUDA backend: the recurrence of one layer as a call of its C++ operators, which choose among the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import gpu
from .records import BackwardSteps, ForwardSteps, StepWeights, Switches


def reason(
    device: torch.device, mode: str, dtype: torch.dtype, hidden: int, batch: int, bidirectional: bool, projected: bool,
    backward: bool = False,
) -> str:  # fmt: skip
    """Which kernels run a forward, or a backward, which has a choice of its own."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0
    found: str = torch.ops.rnnfast.cuda_plan(
        mode, dtype, batch, hidden, bidirectional, projected, gpu.allows_tf32(), backward, index
    )
    return found


_forward_steps = torch.ops.rnnfast.cuda_forward_steps.default
_backward_steps = torch.ops.rnnfast.cuda_backward_steps.default
_states_before = torch.ops.rnnfast.cuda_states_before.default


class Layer(gpu.Layer):
    gates_replace_x = True  # each element is read before it is written, by the same thread

    def run(self, operator: Callable[..., None], of: ForwardSteps | BackwardSteps) -> None:
        weights = StepWeights(*(self.of_directions(name) for name in StepWeights._fields))
        switches = Switches(self.form.T, self.allows_tf32, self.stream)
        operator(self.mode, *weights, *of, *self.form.tables, *switches)

    def of_directions(self, name: str) -> list[Tensor]:
        """A weight of all directions; an absent one: none."""
        return [w for of_one in self.directions if (w := getattr(of_one, name)) is not None]

    def forward_steps(self, of: ForwardSteps) -> None:
        self.run(_forward_steps, of)

    def backward_steps(self, of: BackwardSteps) -> None:
        self.run(_backward_steps, of)

    def states_before(self, y: Tensor, h0: Tensor | None, out: Tensor) -> None:
        _states_before(y, h0, out, *self.form.tables, self.form.T, self.stream)


forward, backward = functools.partial(gpu.forward, Layer), functools.partial(gpu.backward, Layer)
gate_gradients = functools.partial(gpu.gate_gradients, Layer)
