"""Cells as they are declared: what is derived from them, for torch's cells and for others."""

from __future__ import annotations

import gc
import operator
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rnnfast import cells, codegen
from rnnfast.cells import CELLS, PRIMITIVES, Cell, Value, cell

SMOOTH = {  # primitives and where they may be applied without a kink or a pole nearby
    "sigmoid": cells.sigmoid,
    "tanh": cells.tanh,
    "exp": lambda v: cells.exp(-v * v),
    "log": lambda v: cells.log(1 + v * v),
    "log1p": lambda v: cells.log1p(v * v),
    "sqrt": lambda v: cells.sqrt(2 + v * v),
    "negate": lambda v: -v,
}
KINKED = {"relu": cells.relu, "abs": cells.absolute}
BINARY = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": lambda v, w: v / (2 + w * w),
    "minimum": cells.minimum,
    "maximum": cells.maximum,
    "where": lambda v, w: cells.where(v < w, v * w, v - w),
    "less_equal": lambda v, w: cells.where(w >= v, 2 * w, 0.5),
}


def assert_gradients_are_autograds(of: Cell) -> None:
    """In float64, of random states, from random gradients of the states after the step."""
    torch.manual_seed(0)
    shapes = len(of.gates), len(of.gates), len(of.states), len(of.weights)
    x, a, before, weights = (
        [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(n)] for n in shapes
    )
    after = of.step(x, a, before, weights)
    grads = [torch.randn_like(t) for t in after]
    inputs = [*x, *a, *before, *weights]
    expected = torch.autograd.grad(after, inputs, grads, materialize_grads=True, allow_unused=True)
    with torch.no_grad():
        of_x, of_a, of_before, of_weights = of.backward(x, a, before, grads, weights)
    of_states = [torch.zeros_like(s) if g is None else g for g, s in zip(of_before, before)]
    found = [*of_x, *of_a, *of_states, *of_weights]
    torch.testing.assert_close(tuple(map(torch.as_tensor, found)), expected)


@pytest.mark.parametrize("mode", CELLS)
def test_gradients(mode: str) -> None:
    assert_gradients_are_autograds(CELLS[mode])


@pytest.mark.parametrize("name", sorted(PRIMITIVES.keys() - {"where_positive", "less"}))
def test_gradients_of_primitives(name: str) -> None:
    if name in BINARY:
        function = lambda x, a, s: BINARY[name](cells.tanh(x.g + a.g), s.h)
    else:
        function = lambda x, a, s: (SMOOTH | KINKED)[name](cells.tanh(x.g + a.g)) * s.h
    function.__name__ = name
    assert_gradients_are_autograds(cell(gates="g")(function))


EXPRESSIONS = st.recursive(
    st.sampled_from(["x.g", "x.k", "a.g + x.g", "a.k", "s.h", "s.c", 0.5, 2]),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(SMOOTH | KINKED)), inner),
        st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
    ),
    max_leaves=8,
)


def value_of(expression: Any, names: dict[str, Any]) -> Any:
    if isinstance(expression, tuple):
        operation, *args = expression
        args = [value_of(arg, names) for arg in args]
        if not any(isinstance(arg, (Value, Tensor)) for arg in args):
            return args[0]
        return (SMOOTH | KINKED | BINARY)[operation](*args)
    return eval(expression, names) if isinstance(expression, str) else expression


@settings(deadline=None, max_examples=200, derandomize=True)
@given(EXPRESSIONS, EXPRESSIONS)
def test_gradients_of_any_cell(first: Any, second: Any) -> None:
    """Of random expressions."""

    def anything(x: Any, a: Any, s: Any) -> Any:
        names = {"x": x, "a": a, "s": s}
        c = cells.sigmoid(value_of(first, names) + x.g) * s.c
        return cells.tanh(value_of(second, names) + c), c

    assert_gradients_are_autograds(cell(gates="g k", states="h c")(anything))


def test_what_is_saved() -> None:
    """What the backward cannot make of the states: a gate's value, and of the GRU what the reset gate multiplies."""
    of_torch = {mode: CELLS[mode] for mode in ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")}
    saved = {mode: [value.name for value in of.saved] for mode, of in of_torch.items()}
    assert saved == {"RNN_TANH": [], "RNN_RELU": [], "LSTM": list("ifgo"), "GRU": list("rznq")}
    reads = {mode: cells.READS[mode] for mode in of_torch}
    assert reads == {"RNN_TANH": ("h",), "RNN_RELU": ("h",), "LSTM": (), "GRU": ("old_h",)}
    assert [mode for mode, of in of_torch.items() if of.projects] == ["LSTM"]


def test_output_of_what_was_saved() -> None:
    x, a, before = ([torch.randn(2, 3) for _ in range(n)] for n in (4, 4, 2))
    i, f, g, o = ((v + w).tanh() if k == 2 else (v + w).sigmoid() for k, (v, w) in enumerate(zip(x, a)))
    h, c = cells.lstm.step(x, a, before)
    assert torch.equal(cells.lstm.output([i, f, g, o], [c]), h)


def test_printed_cells_are_those_declared() -> None:
    for name, printed in codegen.FILES.items():
        assert (codegen.ROOT / name).read_text() == printed(), f"{name}: python -m rnnfast.codegen writes it anew"


@cell(gates="g")
def branches(x, a, s):
    return x.g if x.g > 0 else a.g


@cell(gates="g")
def compares(x, a, s):
    return cells.where(x.g == 0, x.g, a.g)


@cell(gates="g")
def misspells(x, a, s):
    return cells.tanh(x.g + a.h)


@cell(gates="g", states="h c")
def loses_a_state(x, a, s):
    return cells.tanh(x.g + a.g)


@cell(gates="g")
def passes_an_input_on(x, a, s):
    return x.g


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (branches, "a cell cannot branch on a value: use where"),
        (compares, "a cell cannot ask whether values are equal"),
        (misspells, "cell misspells: a has no 'h'"),
        (loses_a_state, "cell loses_a_state returns 1 states, but has h and c"),
        (passes_an_input_on, "cell passes_an_input_on: h after the step is no value of its own"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_refuses(of: Cell, message: str) -> None:
    with pytest.raises((TypeError, AttributeError), match=message):
        assert of.after


class _Torch:
    """triton.language on tensors."""

    zeros_like = staticmethod(torch.zeros_like)


@cell(gates="r z h")
def gru_of_the_paper(x, a, s):
    d = cells.sigmoid(x.r + a.r)
    F = cells.sigmoid(x.z + a.z)
    old_h = a.h
    h = cells.tanh(x.h + d * old_h)
    return h + F * (s.h - h)


@cell(gates="i f c o", states="h c")
def lstm_of_the_paper(x, a, s):
    dh = cells.sigmoid(x.i + a.i)
    dc = cells.sigmoid(x.f + a.f)
    c = cells.tanh(x.c + a.c)
    new = dc * s.c + dh * c
    return cells.sigmoid(x.o + a.o) * cells.tanh(new), new


@cell(gates="g", weights="v")
def rnn_with_a_candidate(x, a, s, w):
    c = cells.tanh(x.g + a.g)
    return s.h + w.v * (c - s.h)


@cell(gates="i f g o", states="h c", weights="d x")
def lstm_with_own_weights(x, a, s, w):
    i = cells.sigmoid(x.i + a.i + w.d * s.c)
    f = cells.sigmoid(x.f + a.f)
    c = f * s.c + i * cells.tanh(x.g + a.g)
    o = cells.sigmoid(x.o + a.o + w.x * c)
    k = w.x * c
    return o * cells.tanh(k), c


OTHERS = [gru_of_the_paper, lstm_of_the_paper, rnn_with_a_candidate, lstm_with_own_weights]


def test_names_of_variables_are_no_parameters() -> None:
    text = codegen._cpp_cell(rnn_with_a_candidate)
    assert "F c_ = " in text and "F c = " not in text


def test_refuses_to_print() -> None:
    @cell(gates="i f g o", states="h c", weights="d")
    def decaying_lstm(x, a, s, w):
        c = cells.sigmoid(x.f + a.f) * s.c * w.d + cells.sigmoid(x.i + a.i) * cells.tanh(x.g + a.g)
        return cells.sigmoid(x.o + a.o) * cells.tanh(c), c

    @cell(gates="i f g o", states="h c", weights="d unread")
    def unread(x, a, s, w):
        return cells.lstm.function(x, a, s)

    for of, message in (
        (decaying_lstm, "needs a name, for its gradient is read twice"),
        (unread, "no room for weights"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            codegen._cpp_cell(of)


@pytest.mark.parametrize("of", OTHERS, ids=lambda of: of.name)
def test_gradients_of_others(of: Cell) -> None:
    assert_gradients_are_autograds(of)


@pytest.mark.parametrize("of", [*CELLS.values(), *OTHERS], ids=lambda of: of.name)
def test_printed_functions(of: Cell) -> None:
    """Triton's, run on tensors, whatever a cell calls its gates and variables."""
    text = codegen._triton_cell(of).replace("@triton.jit\n", "")
    names: dict[str, Any] = {"tl": _Torch, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}
    names["where_positive"] = lambda y, d: torch.where(y <= 0, 0.0, d)
    exec(text, names)
    torch.manual_seed(0)
    G, states = len(of.gates), len(of.states)
    counts = G, G, states, states, len(of.weights)
    x, a, before, grads, w = ([torch.randn(2, 3, dtype=torch.float64) for _ in range(n)] for n in counts)
    sums = [v if k in of.apart else v + of_a for k, (v, of_a) in enumerate(zip(x, a))] + [a[k] for k in of.apart]
    h, c, saved = names[f"{of.name}_forward"](sums, w, *before, *[None] * (2 - states))
    after = of.step(x, a, before, w)
    torch.testing.assert_close((h, c)[:states], after)
    both = [value for pair in zip(after, before) for value in pair] + [None, None]
    d, of_units, direct, dc = names[f"{of.name}_backward"](saved, w, *both[:4], *grads, *[None] * (2 - states))
    of_x, of_a, of_before, of_weights = of.backward(x, a, before, grads, w)
    torch.testing.assert_close([torch.zeros_like(h) + of_unit for of_unit in of_units], of_weights)
    torch.testing.assert_close(list(d), [*of_x, *(of_a[k] for k in of.apart)])
    expected = torch.zeros_like(h) if of_before[0] is None else of_before[0]
    torch.testing.assert_close((direct, dc)[:states], (expected, *of_before[1:]))


def test_a_step_on_tensors_leaves_nothing_behind() -> None:
    gc.collect()
    gc.disable()
    try:
        x = [torch.randn(2, 3) for _ in range(4)]
        cells.lstm.step(x, x, x[:2])
        references = [weakref.ref(t) for t in x]
        del x
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


@cell(gates="g", states="h m")
def has_another_state(x, a, s):
    m = cells.tanh(x.g + a.g) + s.m
    return cells.tanh(m), m


@cell(gates="n r")
def reads_the_first_gate_apart(x, a, s):
    return cells.tanh(x.n + cells.sigmoid(x.r + a.r) * a.n)


@cell(gates="g k")
def leaves_a_gate(x, a, s):
    return cells.tanh(x.g + a.g)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (has_another_state, "no room for states h m"),
        (reads_the_first_gate_apart, "x and a apart in the last gate only"),
        (leaves_a_gate, "no room for gates that are not read"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_the_kernels_have_not(of: Cell, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        codegen._cpp_cell(of)


@cell(gates="i f g o", states="h c")
def reads_an_old_state_late(x, a, s):
    i, f, g, o = (cells.tanh(v + w) for v, w in ((x.i, a.i), (x.f, a.f), (x.g, a.g), (x.o, a.o)))
    c = f * i
    return o * g * s.c, c


@cell(gates="g")
def takes_a_logarithm(x, a, s):
    return cells.log(x.g + a.g)


def test_what_cannot_be_printed() -> None:
    with pytest.raises(NotImplementedError, match="c is computed before the old one is read for the last time"):
        codegen._cpp_cell(reads_an_old_state_late)
    with pytest.raises(NotImplementedError, match="Cpp has no log"):
        codegen._cpp_cell(takes_a_logarithm)
