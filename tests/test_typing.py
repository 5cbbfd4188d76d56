"""What type checkers know of the layers and cells: mypy reads the functions below, which nobody calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import rnnfast

if TYPE_CHECKING:
    from typing_extensions import assert_type

    States = tuple[Tensor, Tensor]


def layers(x: Tensor, packed: PackedSequence, either: Tensor | PackedSequence, flag: bool) -> None:
    rnn, lstm, gru = rnnfast.RNN(4, 5, nonlinearity="relu"), rnnfast.LSTM(4, 5, device="cpu"), rnnfast.GRU(4, 5)
    assert_type(rnn(x), tuple[Tensor, Tensor])
    assert_type(gru(packed, x), tuple[PackedSequence, Tensor])
    assert_type(gru(x, return_states=True), tuple[Tensor, Tensor, Tensor])
    assert_type(lstm(x, [x, x], lengths=x), tuple[Tensor, States])
    assert_type(lstm(packed, (x, x)), tuple[PackedSequence, States])
    assert_type(lstm(x, resets=x, return_states=True), tuple[Tensor, States, States])
    assert_type(lstm.forward(packed, return_states=True), tuple[PackedSequence, States, States])
    assert_type(lstm(torch.nn.Parameter(x), return_states=False), tuple[Tensor, States])
    assert_type(lstm(x, return_states=flag), tuple[Any, ...])
    lstm(either)
    gru(x, (x,))  # type: ignore[call-overload]
    lstm(x, x)  # type: ignore[call-overload]


def cells(x: Tensor) -> None:
    assert_type(rnnfast.RNNCell(4, 5)(x), Tensor)
    assert_type(rnnfast.GRUCell(4, 5)(x, x), Tensor)
    assert_type(rnnfast.LSTMCell(4, 5)(x, [x, x]), States)
    assert_type(rnnfast.LSTMCell(4, 5).forward(x), States)
    rnnfast.LSTMCell(4, 5)(x, x)  # type: ignore[arg-type]


def functions(model: rnnfast.LSTM) -> None:
    assert_type(rnnfast.convert(model), rnnfast.LSTM)
    assert_type(rnnfast.revert(torch.nn.GRU(4, 5)), torch.nn.GRU)


def test_types() -> None:
    """An ignored error that is none any more fails as well, as what is strict warns of it.

    With the options of `make lint`, whose cache then has all but this file.
    """
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "mypy", __file__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
