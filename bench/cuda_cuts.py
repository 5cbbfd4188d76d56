"""One layer's recurrence by the CUDA kernels alone, in each of the cuts that csrc/cuda/plan.h chooses from.

T steps, N rows, H units, G gates; one direction.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import machine
import torch
from torch import Tensor

from rnnfast import gpu
from rnnfast.cells import GATES

REGIMES = ("multiprocessor", "cluster", "chip", "stepwise", "joint")  # as rnnfast::cuda_regime numbers them, from 1
CUTS = 16  # that is what it adds to a regime for its first cut, and again for each further one
PASSES = ("forward", "backward")
PLAN = re.compile(r"(\w+): W_hh stays on (\w+) multiproc\w+, (\d+) rows on each, with (\d+) threads and (\d+) KB(.*)")
ROWS = re.compile(r", (\d+) rows in each block")


@contextlib.contextmanager
def asked_for(regime: str, number: int | None = None) -> Iterator[None]:
    """The kernels of one regime, or one of its cuts."""
    torch.ops.rnnfast.cuda_regime(1 + REGIMES.index(regime) + (0 if number is None else CUTS * (1 + number)))
    try:
        yield
    finally:
        torch.ops.rnnfast.cuda_regime(0)


def fields(plan: str) -> dict[str, Any]:
    """Of the reason that a plan gives."""
    found = PLAN.fullmatch(plan)
    if not found:
        rows = {"rows": int(of[1])} if (of := ROWS.search(plan)) else {}
        return {"regime": plan.split(":")[0], **rows}
    regime, members, rows, threads, kb, flags = found.groups()
    found = {"members": 1 if members == "one" else int(members), "rows": int(rows), "threads": int(threads)}
    return {"regime": regime, **found, "kb": int(kb), "flags": bool(flags)}


class Recurrence:
    """Tensors of so many steps, and the operators on them."""

    def __init__(self, cell: str, dtype: torch.dtype, tf32: bool, H: int, N: int, T: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.cell, G = cell, GATES[cell]
        self.x_gates, self.b_hh = normal(1, T * N, G * H), normal(G * H, scale=0.1)
        self.of_call = T, tf32, gpu.stream_of(self.x_gates.device)
        self.w_hh = normal(G * H, H, scale=H**-0.5)
        self.y, self.gates, self.dy = empty(T * N, H), empty(1, T * N, 4 * H), normal(T * N, H)
        self.dgates = empty(1, T * N, 4 * H)
        self.cs = empty(T * N, H, dtype=torch.float32) if cell == "LSTM" else None
        of_c = [normal(1, N, H, dtype=torch.float32)] if cell == "LSTM" else [None]
        # Of each pass, what it turns into the final states or the gradients of the initial ones.
        self.states = {"forward": [normal(1, N, H), *of_c], "backward": [normal(1, N, H, dtype=torch.float32), *of_c]}

    def initial(self, name: str) -> list[Tensor | None]:
        return [None if state is None else state.clone() for state in self.states[name]]

    def forward(self, h: Tensor, c: Tensor | None) -> None:
        out = self.y, self.cs, self.gates
        torch.ops.rnnfast.cuda_forward_steps(
            self.cell, [self.w_hh], [self.b_hh], [], [], self.x_gates, h, c, *out, None, None, None, *self.of_call
        )

    def backward(self, dh: Tensor, dc: Tensor | None) -> None:
        cs = self.y.new_empty(0, dtype=torch.float32) if self.cs is None else self.cs
        saved = self.gates, self.y, cs, None, None
        out = dh, dc, self.dgates, None
        torch.ops.rnnfast.cuda_backward_steps(
            self.cell, [self.w_hh], [self.b_hh], [], [], self.dy, None, *saved, *out, None, None, None, *self.of_call
        )

    def results(self, name: str) -> list[Tensor]:
        states = self.initial(name)
        getattr(self, name)(*states)
        written = (self.y, self.cs, self.gates) if name == "forward" else (self.dgates,)
        return [*(state for state in states if state is not None), *(t.clone() for t in written if t is not None)]

    def call(self, name: str) -> Callable[[], None]:
        return functools.partial(getattr(self, name), *self.initial(name))


class Layer:
    """``steps``: the two lengths that are measured. What calls cost once cancels out of their difference."""

    def __init__(
        self, cell: str, dtype: torch.dtype, tf32: bool, H: int, N: int, steps: tuple[int, int], device: str
    ) -> None:
        self.layer, self.steps, self.device = (cell, dtype, tf32, H, N), steps, device
        self.expected: dict[str, list[Tensor]] = {}

    def cuts(self, name: str) -> Iterator[tuple[str, int | None]]:
        """Regime and number of each that the device can hold."""
        cell, dtype, tf32, H, N = self.layer
        for regime in REGIMES:
            plans = set()
            for number in range(CUTS) if regime != "stepwise" else (None,):
                with asked_for(regime, number):
                    try:
                        plan = torch.ops.rnnfast.cuda_plan(cell, dtype, N, H, False, False, tf32, name == "backward", 0)
                    except RuntimeError as refusal:
                        if "cannot serve" not in str(refusal):
                            raise
                        continue
                # A cluster may have blocks to spare. With more of them it is named alike, and no faster.
                if plan not in plans:
                    plans.add(plan)
                    yield regime, number

    def measure(self, name: str, regime: str, number: int | None) -> dict[str, Any]:
        cell, dtype, tf32, H, N = self.layer
        short, long = self.runs
        if name not in self.expected:
            with asked_for("stepwise"):
                for run in self.runs:  # the backward needs what a forward saved
                    run.forward(*run.initial("forward"))
                self.expected[name] = short.results(name)
        with asked_for(regime, number):
            plan = torch.ops.rnnfast.cuda_plan(cell, dtype, N, H, False, False, tf32, name == "backward", 0)
            off = [(a - e).abs().max() / e.abs().max() for a, e in zip(short.results(name), self.expected[name])]
            us = [1e3 * min(machine.times(run.call(name), 5, self.device)[1:]) for run in self.runs]
        step_us = (us[1] - us[0]) / (self.steps[1] - self.steps[0])
        found = {"cell": cell, "dtype": str(dtype)[6:], "tf32": tf32, "H": H, "N": N, "pass": name, **fields(plan)}
        found |= {"step_us": round(step_us, 3), "launch_us": round(us[0] - step_us * self.steps[0], 1)}
        return found | {"error": float(f"{torch.stack(off).max().item():.2g}")}

    @functools.cached_property
    def runs(self) -> tuple[Recurrence, ...]:
        return tuple(Recurrence(*self.layer, steps, self.device) for steps in self.steps)
