"""Cells as they are declared: what is derived from them, for torch's cells and for others."""

from __future__ import annotations

import gc
import math
import operator
import random
import re
import weakref
from typing import Any

import numpy as np
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


def run(of: Cell, inputs: list[Tensor]) -> list[Tensor]:
    """What is traced of a cell, on tensors."""
    return of.program.run(inputs, of.program.tensors(inputs[0]))


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


@pytest.mark.parametrize("name", sorted(PRIMITIVES.keys() - {"where_positive", "less", "held", "clip_gradient"}))
def test_gradients_of_primitives(name: str) -> None:
    if name in BINARY:
        function = lambda x, a, s: BINARY[name](cells.tanh(x.g + a.g), s.h)
    else:
        unary = SMOOTH | KINKED | {"mean": cells.mean}
        function = lambda x, a, s: unary[name](cells.tanh(x.g + a.g)) * s.h
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


CAPTURED = torch.ones(3)


def change_in_place(v: Any) -> Any:
    v += 1
    return v


def assign(x: Any) -> Any:
    x.g = 2 * x.g
    return x.g


REFUSED = {  # what a step makes of x, a and s, on its last line, and what is said of it
    "branches": (lambda x, a, s: x.g if x.g > 0 else a.g, "cannot branch on a value: use where"),
    "compares": (lambda x, a, s: cells.where(x.g == 0, x.g, a.g), "cannot ask whether values are equal"),
    "undeclared": (lambda x, a, s: cells.tanh(x.g + a.q), "a has no 'q', it has g"),
    "states": (lambda x, a, s: (x.g, a.g), "returns 2 states, but has h"),
    "number": (lambda x, a, s: 1.0, "h after the step is no value made of the cell's, but a float"),
    "no-value": (lambda x, a, s: CAPTURED, "h after the step is no value made of the cell's"),
    "captured": (lambda x, a, s: x.g * CAPTURED, "not with a Tensor: bring it in with the input, or declare it"),
    "captured-left": (lambda x, a, s: CAPTURED * x.g, "not with a Tensor"),
    "random": (lambda x, a, s: x.g + torch.rand_like(a.g), "cannot draw random numbers, as torch's rand_like does"),
    "dropout": (lambda x, a, s: torch.nn.functional.dropout(x.g), "cannot draw random numbers"),
    "python-random": (lambda x, a, s: x.g + random.random(), "it computes something else each time"),
    "in-place": (lambda x, a, s: change_in_place(x.g), "cannot change a value in place: make a new one"),
    "in-place-of-torch": (lambda x, a, s: x.g.add_(1), "cannot change a value in place, as torch's add_ does"),
    "in-place-option": (lambda x, a, s: torch.nn.functional.silu(x.g, inplace=True), "cannot change a value in place"),
    "out": (lambda x, a, s: torch.exp(x.g, out=CAPTURED), "cannot change a value in place"),
    "element": (lambda x, a, s: x.g[0], "cannot look into a value: it is a step of each unit of each row by itself"),
    "loop": (lambda x, a, s: sum(step for step in x.g), "cannot look into a value"),
    "assigned": (lambda x, a, s: assign(x), "cannot set x.g: give the new value a name of its own"),
    "sum": (lambda x, a, s: x.g.sum(), "cannot use torch's sum: it is a step of each unit of each row by itself"),
    "softmax": (lambda x, a, s: torch.softmax(x.g, 1), "cannot use torch's softmax"),
    "product": (lambda x, a, s: torch.nn.functional.linear(x.g, CAPTURED), "cannot use torch's linear"),
    "cat": (lambda x, a, s: torch.cat([x.g, a.g]), "cannot use torch's cat"),
    "max": (lambda x, a, s: x.g.max(), "cannot call torch's max so"),
    "nonzero": (lambda x, a, s: torch.where(x.g > 0), "cannot call torch's where so"),
    "scaled": (lambda x, a, s: torch.add(x.g, a.g, alpha=2), "cannot call torch's add so"),
    "unknown": (lambda x, a, s: torch.erf(x.g), "cannot use torch's erf: .* made of sigmoid, tanh, "),
    "power": (lambda x, a, s: x.g**a.g, "raises its values to the powers 2, 3, 0.5, -1, -0.5, not a Value"),
    "power-of-a-number": (lambda x, a, s: 2.0**x.g, "raises its values to the powers"),
    "power-of-a-tensor": (lambda x, a, s: CAPTURED**x.g, "raises its values to the powers"),
    "power-in-place": (lambda x, a, s: operator.ipow(x.g, 2), "cannot change a value in place"),
    "print": (lambda x, a, s: print("here") or x.g, "cannot print: it runs once"),
    "text": (lambda x, a, s: f"{x.g}" and x.g, "cannot print a value"),
    "item": (lambda x, a, s: x.g.item() * a.g, "cannot make a number of a value"),
    "float": (lambda x, a, s: math.exp(x.g) * a.g, "cannot make a number of a value"),
    "numpy": (lambda x, a, s: np.asarray(x.g), "cannot make a number of a value"),
    "operator": (lambda x, a, s: (x.g > 0) & (a.g > 0), "has no &, | and ~: put where.. into where"),
    "remainder": (lambda x, a, s: x.g % 2, "has no % and //"),
    "format": (lambda x, a, s: f"{x.g:.2f}" and x.g, "cannot print a value"),
    "max-of-a-dimension": (lambda x, a, s: x.g.max(1), "cannot look along a dimension"),
    "torchs-max-of-a-dimension": (lambda x, a, s: torch.max(x.g, 1), "cannot look along a dimension"),
    "min-of-a-dimension": (lambda x, a, s: x.g.min(0), "cannot look along a dimension"),
    "condition-minus": (lambda x, a, s: 1 - (x.g > 0), r"use where\(condition, 1.0, 0.0\)"),
    "condition-plus": (lambda x, a, s: (x.g > 0) + (a.g > 0), r"use where\(condition, 1.0, 0.0\)"),
    "condition-of-a-function": (lambda x, a, s: torch.sigmoid(x.g > 0), r"use where\(condition, 1.0, 0.0\)"),
    "condition-as-a-state": (lambda x, a, s: x.g > 0, r"use where\(condition, 1.0, 0.0\)"),
    "no-condition": (lambda x, a, s: torch.where(x.g, a.g, 0.0), "needs a comparison"),
    "attribute": (lambda x, a, s: x.g if x.g.requires_grad else a.g, "cannot use torch's requires_grad"),
    "mean-of-all": (lambda x, a, s: x.g.mean(), "cannot call torch's mean so"),
    "mean-of-rows": (
        lambda x, a, s: x.g.mean(0, keepdim=True),
        r"over the units of a row alone: mean\(-1, keepdim=True",
    ),
    "mean-of-less": (lambda x, a, s: torch.mean(x.g, -1), "over the units of a row alone"),
    "mean-of-a-number": (lambda x, a, s: cells.mean(1.0) * x.g, "mean takes a value"),
    "layer-norm": (lambda x, a, s: torch.layer_norm(x.g, (6,)), r"torch's layer_norm: rnnfast\.cells\.normalize"),
    "variance": (lambda x, a, s: x.g.var(-1, keepdim=True), "cannot use torch's var"),
    "shape": (lambda x, a, s: x.g / x.g.shape[0], "cannot use torch's shape"),
    "normalize": (lambda x, a, s: torch.nn.functional.normalize(x.g), "cannot use torch's norm"),
    "zero": (lambda x, a, s: x.g * (1 / 0), "ZeroDivisionError: division by zero"),
    "name": (lambda x, a, s: x.g + missing, "NameError: name 'missing' is not defined"),  # noqa: F821
    "large": (lambda x, a, s: x.g * 10**400, "OverflowError"),
    "of-another-cell": (lambda x, a, s: x.g + cells.lstm.inputs["x"][0], "reads a value of another cell"),
    "array": (lambda x, a, s: np.ones(3) * x.g, "not with a ndarray"),
    "of-numbers": (lambda x, a, s: cells.tanh(1.0) * x.g, "tanh takes a value"),
    "no-bound": (lambda x, a, s: torch.clamp(x.g), "clamp needs a bound"),
    "parameters": (lambda x, a: x.g, "takes 2 positional arguments but 3 were given"),
    "no-input": (lambda x, a, s: cells.tanh(a.g), "reads no gate of x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    """With the cell's name, and the line of it."""
    function, message = REFUSED[name]
    function.__name__ = f"cell_that_{name}"
    place = f"cell cell_that_{name}, {re.escape(__file__)}:{function.__code__.co_firstlineno}: "
    with pytest.raises(TypeError, match=f"{place}.*({message})"):
        cell(gates="g")(function)


def test_refuses_with_the_line_within() -> None:
    def longer(x: Any, a: Any, s: Any) -> Any:
        g = cells.tanh(x.g)
        g = change_in_place(g)
        return g + a.g

    with pytest.raises(TypeError, match=f"test_cells.py:{longer.__code__.co_firstlineno + 2}: a cell cannot change"):
        cell(gates="g")(longer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "i i"}, "gates have to be distinct identifiers"),
        ({"gates": ("i", "a b")}, "gates have to be distinct identifiers"),
        ({"gates": "_i"}, "gates have to be distinct identifiers"),
        ({"gates": ""}, "one gate and one state at least"),
        ({"gates": "i", "states": ()}, "one gate and one state at least"),
        ({"gates": "i", "weights": "k", "scalars": {"k": 1.0}}, "weights and scalars have to be distinct"),
        ({"gates": "i", "initial": {"c": 1.0}}, r"initial has values of \['c'\], which are no states"),
    ],
)
def test_refuses_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cell(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": {"i", "f"}}, "gates have to be a string, a list or a tuple, got set"),
        ({"gates": "i", "states": {"h": 0.0}}, "states have to be a string, a list or a tuple, got dict"),
        ({"gates": "i", "weights": None}, "weights have to be a string, a list or a tuple, got NoneType"),
        ({"gates": "i", "scalars": ["k"]}, "scalars have to be numbers by name, in a dict, got list"),
        ({"gates": "i", "scalars": {"k": "1"}}, "scalars have to be numbers, got a str for k"),
        ({"gates": "i", "initial": {"h": None}}, "initial have to be numbers, got a NoneType for h"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cell(**options)


def test_numbers_and_operators() -> None:
    """A NaN is the same each time, and what NumPy and Python make of values is taken."""
    of = cell(gates="g")(lambda x, a, s: [np.float64(0.5) * abs(x.g) + 0 * a.g * float("nan")])
    v = torch.tensor([-2.0, 3.0])
    assert run(of, [v, v, v])[0].isnan().all()
    assert run(cell(gates="g")(lambda x, a, s: np.float64(0.5) * abs(x.g)), [v, v, v])[0].tolist() == [1.0, 1.5]


def test_a_long_step() -> None:
    def doubles(x: Any, a: Any, s: Any) -> Any:
        h = x.g
        for _ in range(5000):
            h = h + 1
        return h

    x = torch.zeros(1)
    assert run(cell(gates="g")(doubles), [x, x, x])[0].item() == 5000


def test_refuses_what_is_no_function() -> None:
    with pytest.raises(TypeError, match="declares a function of one step"):
        cell(gates="g")(torch.nn.Tanh())


OF_TORCH = {  # functions of torch that cells may use, beside PRIMITIVES by the names that those have in torch
    "logsigmoid": torch.nn.functional.logsigmoid,
    "softplus": torch.nn.functional.softplus,
    "silu": torch.nn.functional.silu,
    "elu": torch.nn.functional.elu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "hardtanh": torch.nn.functional.hardtanh,
    "hardsigmoid": torch.nn.functional.hardsigmoid,
    "clamp": lambda v: torch.clamp(v, -0.5, 0.5),
    "clip-of-one-side": lambda v: v.clip(min=0.1),
    "square": torch.square,
    "rsqrt": lambda v: torch.rsqrt(1 + v**2),
    "reciprocal": lambda v: (2 + v.abs()).reciprocal(),
    "powers": lambda v: v**3 + (1 + v * v) ** 0.5 + torch.pow(2 + v * v, -1) + (1 + v * v) ** -0.5,
    "lerp": lambda v: torch.lerp(v, 2 * v, torch.sigmoid(v)),
    "comparisons": lambda v: torch.where(torch.gt(v, 0.3), v, 2 * v) + torch.where(v.le(-0.3), torch.ones_like(v), 0.0),
    "arithmetic": lambda v: torch.div(torch.sub(torch.mul(v, 2), 1.0), torch.add(torch.abs(v), 1)).neg() - 1,
    "clamp-of-values": lambda v: torch.clamp(v, -0.5 * v * v, 0.5 * v * v),
    "constants": lambda v: (
        torch.where(v > 0, 1 / 3, torch.full_like(v, 2 / 3))
        if isinstance(v, Tensor)
        else (torch.where(v > 0, 1 / 3, 2 / 3))
    ),
    "two": lambda v: torch.max(v, 0.5 * v) + torch.minimum(v, 3 * v),
    "method": lambda v: v.sigmoid().tanh().exp().log1p().sqrt().log().relu(),
}


def test_normalize_is_torchs() -> None:
    """On tensors as traced, and by its own gradients."""
    v = 5 + torch.randn(4, 7, dtype=torch.float64)
    traced = cell(gates="g")(lambda x, a, s: cells.normalize(x.g, 0.1))
    for found in (run(traced, [v, v, v])[0], cells.normalize(v, 0.1)):
        torch.testing.assert_close(found, torch.nn.functional.layer_norm(v, (7,), eps=0.1))
    assert_gradients_are_autograds(cell(gates="g")(lambda x, a, s: cells.normalize(x.g * a.g) * s.h))
    # The gradient needs two means, of which neither waits for the other.
    ops = [op for op, _ in cells.Program.of([traced.gradients[0].value], [*traced.saved, *traced.incoming]).operations]
    assert ops.count("mean") == 2


@pytest.mark.parametrize("name", OF_TORCH)
def test_functions_of_torch(name: str) -> None:
    """What is traced of them is what they compute."""
    function = lambda x, a, s: OF_TORCH[name](x.g)
    traced = cell(gates="g")(function)
    for scale in (1.0, 50.0):
        v = scale * torch.randn(100, dtype=torch.float64)
        torch.testing.assert_close(run(traced, [v, v, v])[0], OF_TORCH[name](v))


# Where a gradient jumps, and beyond all numbers.
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 3.0, -3.0, 100.0, -100.0, 800.0, -800.0]
EDGES = torch.tensor([*EDGES, math.inf, -math.inf, math.nan], dtype=torch.float64)
SMOOTH_OF_TORCH = {"logsigmoid": torch.nn.functional.logsigmoid, "softplus": torch.nn.functional.softplus}
JUMPING = {
    name: OF_TORCH[name] for name in ("elu", "leaky_relu", "hardtanh", "hardsigmoid", "clamp", "clip-of-one-side")
}
JUMPING |= {"minimum": lambda v: torch.minimum(v, 3 * v), "maximum": lambda v: torch.maximum(3 * v, v)}


@pytest.mark.parametrize("name", [*SMOOTH_OF_TORCH, *JUMPING])
def test_edges(name: str) -> None:
    """Values, and gradients by autograd and by the primitives' rules, as torch's; of smooth functions second ones."""
    function = {**SMOOTH_OF_TORCH, **JUMPING}[name]
    of = cell(gates="g")(lambda x, a, s: function(x.g))
    v, w = EDGES.clone().requires_grad_(), EDGES.clone().requires_grad_()
    y, expected = run(of, [v, v, v])[0], function(w)
    torch.testing.assert_close(y, expected, equal_nan=True)
    (d,), (of_torch,) = (torch.autograd.grad(t.sum(), at, create_graph=True) for t, at in ((y, v), (expected, w)))
    (own, *_), *_ = of.backward([EDGES], [EDGES], [EDGES], [torch.ones_like(EDGES)])
    numbers = ~EDGES.isnan()
    for found in (d, own):
        torch.testing.assert_close(found[numbers], of_torch[numbers])
    if name in SMOOTH_OF_TORCH:
        (second,), p = torch.autograd.grad(d.sum(), v), EDGES.sigmoid()
        torch.testing.assert_close(second[numbers], ((1 - p) * p * (-1 if name == "logsigmoid" else 1))[numbers])


def test_a_state_may_be_an_input_or_another() -> None:
    function = lambda x, a, s: (x.g, s.h, x.g)
    of = cell(gates="g", states="h before again")(function)
    x, h = torch.randn(2, 3)
    assert [t.tolist() for t in run(of, [x, x, h, h, h])] == [x.tolist(), h.tolist(), x.tolist()]


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
