"""The operators' border: what is malformed is refused in one way by all backends, and sizes of zero are none of it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import border_calls
import pytest
import torch
from backends import BACKENDS, EMULATION, use
from border_calls import GATES, LSTMS, agree
from emulation import build
from helpers import assert_same, error_of, flatten, pair, states, values_and_grads
from torch import Tensor

import rnnfast
from rnnfast import border, functional, reference
from rnnfast.records import Inputs, names_of

SEED = int(os.environ.get("RNNFAST_FUZZ_SEED", "0"))
MORE = int(os.environ.get("RNNFAST_FUZZ_CALLS", "60"))  # calls of each operator, beside one for each kind of change
NAMES = sorted({name.partition("-")[0] for name in BACKENDS})
# Where a layer has no units there is nothing for the persistent kernels, which are not asked for here.
KINDS = [name for name in BACKENDS if not name.startswith("cuda")] + ["cuda-by the table", "cuda-stepwise"] * bool(
    EMULATION
)


# Malformed calls, in a process of their own: a crash is a test that fails.


def fuzz(backend: str, calls: int, library: Path | None = None, **environment: str) -> None:
    command = [sys.executable, border_calls.__file__, backend, str(SEED), str(calls), *([library] if library else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=3000)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}\n{done.stderr[-10_000:]}"
    assert [line for line in lines if "WRONG" in line] == []
    assert len(lines) > calls * len(border_calls.BORDERS[backend])


@pytest.mark.parametrize("name", NAMES)
def test_malformed_calls(name: str) -> None:
    fuzz(name, MORE if name != "triton" else MORE // 3, EMULATION if name == "cuda" else None)


@pytest.mark.full
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_malformed_calls_with_sanitizers(name: str) -> None:
    if not build.has_sanitizer():
        pytest.skip("this compiler has no AddressSanitizer")
    library = build.cpu_library() if name == "cpu" else build.library(sanitize=True)
    fuzz(name, 5 * MORE, library, LD_PRELOAD=build.preload(), ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.parametrize("name", [name for name in ("triton", "cuda") if name in NAMES])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_kernels_clamp_lengths(mode: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody looks at their values before."""
    monkeypatch.setattr(border, "check_values", lambda *args: None)
    x, weights = torch.randn(3, 4, 2), weights_of(mode, 2, 5, None, torch.float32)
    forward, backward = (getattr(torch.ops.rnnfast, f"{name}_{way}") for way in ("forward", "backward"))

    def computed(lengths: list[int]) -> list[Tensor]:
        inputs = Inputs(mode, x, None, None, None, torch.tensor(lengths), None, True, names_of(mode, 4), weights)
        y, h_n, c_n, c, gates = forward(*inputs, True, True)
        *grads, dweights = backward(*inputs, y, None, None, None, y, c, gates, True, True)
        return [y, h_n, c_n, c, gates, *grads, *dweights]

    for actual, expected in zip(computed([2**31 - 1, -(2**31), 4, 2]), computed([3, 0, 3, 2])):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# A cell that there is not


@pytest.mark.parametrize("mode", ["TANH", "lstm", ""])
def test_unknown_mode(mode: str) -> None:
    x, h, weights = torch.randn(3, 2, 5), torch.randn(1, 2, 5), [torch.randn(5, 5), torch.randn(5, 5)]
    inputs = Inputs(mode, x, None, None, None, None, None, False, "w_ih w_hh", weights)
    of_meta = inputs._replace(x=x.to("meta"), weights=[w.to("meta") for w in weights])
    calls = {
        "functional.rnn": lambda: functional.rnn(mode, x, (h,), weights),
        "functional.cell": lambda: functional.cell(mode, x[0], None, weights),
        "reference.cell": lambda: reference.cell(mode, x[0], x[0], x[0], None),
        "reference.cell_backward": lambda: reference.cell_backward(mode, x[0], x[0], x[0], None, x[0], None),
        "reference.layer": lambda: reference.layer(inputs),
        "meta": lambda: torch.ops.rnnfast.cpu_forward(*of_meta, True, True),
    }
    for name in NAMES:
        forward = getattr(torch.ops.rnnfast, f"{name}_forward")
        calls[name] = lambda forward=forward: forward(*inputs, True, True)
    refused = {name: error_of(call) for name, call in calls.items()}
    assert refused == dict.fromkeys(calls, (RuntimeError, f"rnnfast: no cell is called '{mode}'"))


# Sizes of zero


def weights_of(mode: str, inputs: int, hidden: int, proj: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Of both directions."""
    rows, out = GATES[mode] * hidden, hidden if proj is None else proj
    shapes = [(rows, inputs), (rows, out), (rows,), (rows,), *([] if proj is None else [(proj, hidden)])]
    shapes += [(LSTMS.get(mode, 0) * hidden,)] * bool(LSTMS.get(mode))
    return [torch.randn(shape, dtype=dtype) for shape in shapes * 2]


@pytest.mark.parametrize("cell", [*GATES, "projection"])
@pytest.mark.parametrize(
    "kind, form",
    [
        (kind, form)
        for kind, form in itertools.product(KINDS, ["lengths", "rectangular", "resets", "packed"])
        if kind != "triton" or form == "lengths"  # the interpreter takes its time
    ],
)
def test_zero_in_an_operator(kind: str, cell: str, form: str) -> None:
    mode, names = "LSTM" if cell == "projection" else cell, "TNIHP" if cell == "projection" else "TNIH"
    for zeros in [*names, names]:
        if form == "packed" and set("TN") & set(zeros):
            continue  # a packed sequence has a row at least
        T, N, I, H, P = (0 if name in zeros else size for name, size in zip("TNIHP", (3, 2, 4, 5, 3)))
        x, proj = torch.randn(T, N, I), P if cell == "projection" else None
        weights, out = weights_of(mode, I, H, proj, x.dtype), H if proj is None else P
        batch_sizes = lengths = resets = None
        if form == "packed":
            x, batch_sizes = x.flatten(0, 1)[:5], torch.tensor([2, 2, 1])
        elif form == "lengths":
            lengths = torch.tensor([T, min(T, 1)][:N], dtype=torch.int64)
        elif form == "resets":
            resets = torch.rand(T, N) < 0.5
        is_lstm = mode in LSTMS
        hx = torch.randn(2, N, out), torch.randn(2, N, H) if is_lstm else None
        of_weights = names_of(mode, len(weights) // 2)
        inputs = Inputs(mode, x, *hx, batch_sizes, lengths, resets, True, of_weights, weights)
        with use(kind):
            name = kind.partition("-")[0]
            actual, expected = (computed(of, inputs) for of in (name, "reference"))
        assert all(agree(a, e, x.dtype) for a, e in zip(actual, expected, strict=True)), zeros


def computed(name: str, inputs: Inputs) -> list[Tensor]:
    """Outputs and gradients of an operator, the gradients of what are the same for all."""
    forward, backward = (getattr(torch.ops.rnnfast, f"{name}_{way}") for way in ("forward", "backward"))
    y, h_n, c_n, c, gates = forward(*inputs, True, True)
    torch.manual_seed(1)
    gradients = [torch.randn_like(t) for t in (y, h_n, c_n, c)]
    *grads, dweights = backward(*inputs, *gradients, y, c, gates, True, True)
    return [y, h_n, c_n, c, *grads, *dweights]


@pytest.mark.parametrize("inputs, hidden, batch", [s for s in itertools.product((0, 4), (0, 5), (0, 3)) if 0 in s])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_in_a_cell(kind: str, name: str, inputs: int, hidden: int, batch: int) -> None:
    """What torch.nn makes of it."""
    theirs, ours = pair(name, inputs, hidden)
    x, hx = torch.randn(batch, inputs), states(name, batch, hidden, dtype=torch.float32)
    with use(kind):
        assert_same(values_and_grads(ours, x, hx), values_and_grads(theirs, x, hx))
        assert_same(dict(flatten(ours(x))), dict(flatten(theirs(x))))


@pytest.mark.parametrize("zero", ["inputs", "hidden", "batch", "steps"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_in_a_layer(kind: str, name: str, zero: str) -> None:
    """torch.nn's result or error."""

    def outcome(library: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"inputs": 4, "hidden": 5, "batch": 2, "steps": 3} | {zero: 0}
        layer = getattr(library, name)(sizes["inputs"], sizes["hidden"], 2, bidirectional=True)
        return values_and_grads(layer, torch.randn(sizes["steps"], sizes["batch"], sizes["inputs"]))

    with use(kind):
        if zero == "batch":
            assert_same(outcome(rnnfast), outcome(torch.nn))
        else:
            assert error_of(outcome, rnnfast) == error_of(outcome, torch.nn)


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_units_in_the_function(kind: str, mode: str) -> None:
    x, weights = torch.randn(3, 2, 4), weights_of(mode, 4, 0, None, torch.float32)
    for t in (x, *weights):
        t.requires_grad_()
    with use(kind):
        y, h_n, c_n, _ = functional.rnn(mode, x, None, weights, bidirectional=True)
        grads = torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), [x, *weights])
    assert y.shape == (3, 2, 0) and h_n.shape == (2, 2, 0)
    assert [(g.shape, g.any().item()) for g in grads] == [(t.shape, False) for t in (x, *weights)]
