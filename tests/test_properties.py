"""Random configurations against torch.nn, and the sequence forms against each other: float64, all gradients."""

from __future__ import annotations

from typing import Any

import torch
from helpers import assert_equal_modules, assert_same, flatten, pair, states, values_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast

DOUBLE = torch.float64
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SIZES = st.integers(1, 9)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """The name of a layer and its arguments."""
    name = draw(st.sampled_from(["RNN", "LSTM", "GRU"]))
    kwargs = {
        "input_size": draw(SIZES),
        "hidden_size": draw(SIZES),
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dtype": DOUBLE,
    }
    if name == "RNN":
        kwargs["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if name == "LSTM" and kwargs["hidden_size"] > 1:
        kwargs["proj_size"] = draw(st.integers(0, kwargs["hidden_size"] - 1))
    return name, kwargs


def _states(name: str, kwargs: dict[str, Any], *rows: int) -> Any:
    count = kwargs["num_layers"] * (1 + kwargs["bidirectional"])
    out = kwargs.get("proj_size", 0) or kwargs["hidden_size"]
    return states(name, count, *rows, out, c=(count, *rows, kwargs["hidden_size"]))


def _rows(hx: Any, *rows: int) -> Any:
    """The states of some rows, as a batch of their own."""
    return tuple(h[:, list(rows)] for h in hx) if isinstance(hx, tuple) else hx[:, list(rows)]


@SETTINGS
@given(configurations(), SIZES, st.integers(0, 9), st.booleans(), st.booleans(), st.booleans())
def test_layer(
    configuration: Any, steps: int, rows: int, batch_first: bool, unbatched: bool, with_states: bool
) -> None:
    name, kwargs = configuration
    theirs, ours = pair(name, **kwargs, batch_first=batch_first)
    shape = (steps,) if unbatched else (rows, steps) if batch_first else (steps, rows)
    x = torch.randn(*shape, kwargs["input_size"], dtype=DOUBLE)
    inputs = (x, _states(name, kwargs, *(() if unbatched else (rows,)))) if with_states else (x,)
    assert_equal_modules(theirs, ours, *inputs)


@SETTINGS
@given(configurations(), st.lists(SIZES, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_packed_sequence(configuration: Any, lengths: list[int], in_order: bool, with_states: bool) -> None:
    name, kwargs = configuration
    theirs, ours = pair(name, **kwargs)
    if in_order:
        lengths = sorted(lengths, reverse=True)
    x = torch.randn(max(lengths), len(lengths), kwargs["input_size"], dtype=DOUBLE)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=in_order)
    inputs = (packed, _states(name, kwargs, len(lengths))) if with_states else (packed,)
    assert_equal_modules(theirs, ours, *inputs)


class _Padded(nn.Module):
    """A module of torch.nn that takes padded rows with ``lengths`` the long way round, by packing."""

    def __init__(self, module: nn.Module, total: int) -> None:
        super().__init__()
        self.module, self.total = module, total

    def forward(self, x: torch.Tensor, hx: Any, *, lengths: torch.Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths, self.module.batch_first, enforce_sorted=False)
        output, hidden = self.module(packed, hx)
        assert isinstance(output, PackedSequence)
        return pad_packed_sequence(output, self.module.batch_first, total_length=self.total)[0], hidden


@SETTINGS
@given(configurations(), st.lists(SIZES, min_size=1, max_size=6), st.integers(0, 3), st.booleans())
def test_lengths_are_packing(configuration: Any, lengths: list[int], beyond: int, batch_first: bool) -> None:
    name, kwargs = configuration
    theirs, ours = pair(name, **kwargs, batch_first=batch_first)
    steps, rows = max(lengths) + beyond, len(lengths)
    x = torch.randn(*((rows, steps) if batch_first else (steps, rows)), kwargs["input_size"], dtype=DOUBLE)
    hx = _states(name, kwargs, rows)
    expected = values_and_grads(_Padded(theirs, steps), x, hx, lengths=torch.tensor(lengths))
    found = values_and_grads(ours, x, hx, lengths=torch.tensor(lengths))
    assert_same(found, {key.replace("module.", ""): t for key, t in expected.items()})


@SETTINGS
@given(configurations(), st.lists(SIZES, min_size=1, max_size=4), st.integers(0, 5))
def test_a_row_without_steps_changes_nothing(configuration: Any, lengths: list[int], at: int) -> None:
    name, kwargs = configuration
    module = getattr(rnnfast, name)(**kwargs)
    at = min(at, len(lengths))
    steps, all_lengths = max(lengths), [*lengths[:at], 0, *lengths[at:]]
    x, hx = (
        torch.randn(steps, len(all_lengths), kwargs["input_size"], dtype=DOUBLE),
        _states(name, kwargs, len(all_lengths)),
    )
    output, hidden = module(x, hx, lengths=torch.tensor(all_lengths))
    assert not output[:, at].any()
    assert_same(dict(flatten(_rows(hidden, at))), dict(flatten(_rows(hx, at))), rtol=0, atol=0)
    others = [n for n in range(len(all_lengths)) if n != at]
    expected, expected_hidden = module(x[:, others], _rows(hx, *others), lengths=torch.tensor(lengths))
    assert_same(dict(flatten(_rows(hidden, *others))), dict(flatten(expected_hidden)))
    assert_same({"output": output[:, others]}, {"output": expected})


class _Episodes(nn.Module):
    """A module of torch.nn that runs on each episode of each row alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor, *, resets: torch.Tensor) -> torch.Tensor:
        rows = []
        for n in range(x.shape[1]):
            borders = [0, *(t for t in range(1, len(x)) if resets[t, n]), len(x)]
            rows.append(torch.cat([self.module(x[a:b, n])[0] for a, b in zip(borders, borders[1:])]))
        return torch.stack(rows, 1)


@SETTINGS
@given(configurations(), SIZES, st.integers(1, 3), st.integers(0, 2**27 - 1))
def test_resets_are_episodes_alone(configuration: Any, steps: int, rows: int, bits: int) -> None:
    name, kwargs = configuration
    theirs, ours = pair(name, **kwargs)
    x = torch.randn(steps, rows, kwargs["input_size"], dtype=DOUBLE)
    resets = torch.tensor([[bool(bits >> (t * rows + n) & 1) for n in range(rows)] for t in range(steps)])
    expected = values_and_grads(_Episodes(theirs), x, resets=resets)
    found = values_and_grads(_OutputOnly(ours), x, resets=resets)
    assert_same(found, expected)


class _OutputOnly(_Episodes):
    def forward(self, x: torch.Tensor, *, resets: torch.Tensor) -> torch.Tensor:
        return self.module(x, resets=resets)[0]


@SETTINGS
@given(
    st.sampled_from(["RNNCell", "LSTMCell", "GRUCell"]), SIZES, SIZES, st.booleans(), st.integers(0, 9), st.booleans()
)
def test_cell(name: str, inputs: int, hidden: int, bias: bool, rows: int, unbatched: bool) -> None:
    theirs, ours = pair(name, inputs, hidden, bias, dtype=DOUBLE)
    shape = () if unbatched else (rows,)
    x = torch.randn(*shape, inputs, dtype=DOUBLE)
    assert_equal_modules(theirs, ours, x)
    assert_equal_modules(theirs, ours, x, states(name, *shape, hidden))
