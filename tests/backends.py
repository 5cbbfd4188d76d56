"""The backends that this machine can run, and which of them have kernels for a layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import interpreter  # before Triton's kernels
import torch

import rnnfast
from rnnfast import cells
from rnnfast.backends import INSTRUCTION_SETS

# As rnnfast::cuda_regime numbers them.
REGIMES = ("by the table", "multiprocessor", "cluster", "chip", "stepwise", "joint")
PERSISTENT = REGIMES[1:4]  # in one launch
WITH_PRODUCTS = (*PERSISTENT, "joint")  # of their own
MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "lstm": "LSTM", "projection": "LSTM", "gru": "GRU"}
MODES |= {"RNN": "RNN_TANH", "LSTM": "LSTM", "GRU": "GRU"}
MODES |= {"RNNCell": "RNN_TANH", "LSTMCell": "LSTM", "GRUCell": "GRU"}
MODES |= {of.name: mode for mode, of in cells.MODES.items() if mode not in cells.CELLS}


class Size(NamedTuple):
    """What decides whether a regime has kernels for a layer."""

    dtype: torch.dtype
    batch: int = 1
    hidden: int = 1
    bidirectional: bool = False


def _emulation() -> Path | None:
    """The CUDA kernels for a CPU, where there is no GPU for them. Without them tests are worth little: no skips."""
    if torch.cuda.is_available():
        return None
    from emulation.build import library

    path = library()
    torch.ops.load_library(path)
    return path


def _instruction_sets() -> list[str]:
    """Those of this processor, up to the one in RNNFAST_TEST_ISA: the tests then see a processor without the others."""
    if not rnnfast.backends()["cpu"].available:
        return []
    best = torch.ops.rnnfast.cpu_isa(None)  # a processor that has one has those before it
    if limit := os.environ.get("RNNFAST_TEST_ISA"):
        best = torch.ops.rnnfast.cpu_isa(min(best, INSTRUCTION_SETS.index(limit)))
    return list(INSTRUCTION_SETS[best::-1])


EMULATION = _emulation()
BACKENDS = ["reference", *(f"cpu-{name}" for name in _instruction_sets())]
if interpreter.ENABLED:
    BACKENDS.append("triton")
if EMULATION:
    BACKENDS += [f"cuda-{regime}" for regime in REGIMES[1:]]


@contextmanager
def regime(name: str, precision: str = "ieee", cut: int | None = None) -> Iterator[None]:
    """The CUDA kernels of one regime, or of one of its cuts, and the precision of their float32 products."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.ops.rnnfast.cuda_regime(REGIMES.index(name) + (0 if cut is None else 16 * (1 + cut)))
    torch.backends.cudnn.rnn.fp32_precision = precision
    try:
        yield
    finally:
        torch.ops.rnnfast.cuda_regime(0)
        torch.backends.cudnn.rnn.fp32_precision = before


@contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    best = torch.ops.rnnfast.cpu_isa(None)
    torch.ops.rnnfast.cpu_isa(INSTRUCTION_SETS.index(name))
    try:
        yield
    finally:
        torch.ops.rnnfast.cpu_isa(best)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """One of BACKENDS."""
    name, _, kind = backend.partition("-")
    within = {"cuda": regime, "cpu": _instruction_set}.get(name, lambda kind: nullcontext())
    with rnnfast.use_backend(name), within(kind):
        yield


def serves(name: str, cell: str, size: Size) -> bool:
    """Whether a regime has kernels, forward and backward, for such a layer."""
    if name in PERSISTENT and (size.dtype == torch.float64 or cell == "projection"):
        return False
    layer = MODES[cell], *size, cell == "projection", False
    with regime(name):
        try:
            return all(torch.ops.rnnfast.cuda_plan(*layer, backward, 0) for backward in (False, True))
        except RuntimeError:
            return False
