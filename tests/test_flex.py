"""Layers of any cell: those of rnnfast.cells against loops of their papers' equations, and random ones."""

from __future__ import annotations

import copy
import io
import pickle
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, use
from helpers import FLOOR, FORMS, assert_same, flatten, values_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cells import BINARY, KINKED, SMOOTH
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import FlexRNN, cells
from rnnfast.cells import PRIMITIVES, Cell
from rnnfast.evaluator import FUSED, OPERATIONS, programs

DOUBLE = torch.float64
T, N, I, H = 5, 4, 3, 6
sigmoid, tanh = torch.sigmoid, torch.tanh


# A step by the equations of each paper: from the gates of W x + b and of U h + b, the states, the units' own weights.


def cifg(x: Any, u: Any, s: Any, w: Any) -> Any:
    f, g, o = (a + b for a, b in zip(x, u))
    c = sigmoid(f) * s[1] + (1 - sigmoid(f)) * tanh(g)
    return sigmoid(o) * tanh(c), c


def relu_lstm(x: Any, u: Any, s: Any, w: Any) -> Any:
    i, f, g, o = (a + b for a, b in zip(x, u))
    c = sigmoid(f) * s[1] + sigmoid(i) * g.clamp(min=0)
    return sigmoid(o) * c.clamp(min=0), c


def slstm(x: Any, u: Any, s: Any, w: Any) -> Any:
    """As the reference code of xLSTM, which takes the first m from i alone, where n is 0."""
    i, f, z, o = (a + b for a, b in zip(x, u))
    _, c, n, m = s
    log_f = m - softplus(-f)
    new_m = torch.where(n == 0, i, torch.max(i, log_f))
    kept = torch.exp((log_f - new_m).clamp(max=0))  # of a first step there is nothing to keep, however large the gate
    c = kept * c + torch.exp(i - new_m) * tanh(z)
    n = kept * n + torch.exp(i - new_m)
    return sigmoid(o) * c / n, c, n, new_m


def janet(x: Any, u: Any, s: Any, w: Any) -> Any:
    f, g = (a + b for a, b in zip(x, u))
    return sigmoid(f) * s[0] + (1 - sigmoid(f - 1)) * tanh(g)


def mgu(x: Any, u: Any, s: Any, w: Any) -> Any:
    f = sigmoid(x[0] + u[0])
    return (1 - f) * s[0] + f * tanh(x[1] + f * u[1])


def ligru(x: Any, u: Any, s: Any, w: Any) -> Any:
    z = sigmoid(x[0] + u[0])
    return z * s[0] + (1 - z) * (x[1] + u[1]).clamp(min=0)


def indrnn(x: Any, u: Any, s: Any, w: Any) -> Any:
    return (x[0] + w[0] * s[0]).clamp(min=0)


def sru(x: Any, u: Any, s: Any, w: Any) -> Any:
    f, r = sigmoid(x[1] + w[0] * s[1]), sigmoid(x[2] + w[1] * s[1])
    c = f * s[1] + (1 - f) * x[0]
    return r * c + (1 - r) * x[3], c


def min_gru(x: Any, u: Any, s: Any, w: Any) -> Any:
    return (1 - sigmoid(x[0])) * s[0] + sigmoid(x[0]) * x[1]


def min_lstm(x: Any, u: Any, s: Any, w: Any) -> Any:
    f, i = sigmoid(x[0]), sigmoid(x[1])
    return f / (f + i) * s[0] + i / (f + i) * x[2]


def leaky_rnn(x: Any, u: Any, s: Any, w: Any) -> Any:
    return s[0] + 0.3 * (tanh(x[0] + u[0]) - s[0])


def peephole_lstm(x: Any, u: Any, s: Any, w: Any) -> Any:
    i, f, g, o = (a + b for a, b in zip(x, u))
    c = sigmoid(f + w[1] * s[1]) * s[1] + sigmoid(i + w[0] * s[1]) * tanh(g)
    return sigmoid(o + w[2] * c) * tanh(c), c


PAPERS = [cifg, relu_lstm, slstm, janet, mgu, ligru, indrnn, sru, min_gru, min_lstm, leaky_rnn, peephole_lstm]


def whole(w_hh: Tensor | None, gates: int, hidden: int, rows: Sequence[int]) -> Tensor:
    """The matrix [G, H, H] that a layer's W_hh stands for; rows are the gates that it has."""
    found = torch.zeros(gates, hidden, hidden, dtype=DOUBLE)
    if w_hh is None:
        return found
    for at, gate in enumerate(rows):
        if w_hh.dim() == 1:
            found[gate] = torch.diag(w_hh[at * hidden : (at + 1) * hidden])
        elif w_hh.dim() == 2:
            found[gate] = w_hh[at * hidden : (at + 1) * hidden]
        else:
            width = w_hh.size(2)
            found[gate] = torch.block_diag(*w_hh[:, at * width : (at + 1) * width])
    return found


class Loop(torch.nn.Module):
    """A FlexRNN of one layer, row by row and step by step; a reset ends what comes before it in either direction."""

    def __init__(self, net: FlexRNN, step: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.step = net, step

    def forward(self, x: Tensor, states: Any, *, lengths: Tensor | None = None, resets: Tensor | None = None) -> Any:
        cell, hidden = self.net.cell, self.net.hidden_size
        steps, rows = x.shape[:2]
        lengths = torch.full((rows,), steps) if lengths is None else lengths
        resets = torch.zeros(steps, rows, dtype=torch.bool) if resets is None else resets
        outputs, finals = [], []
        for d, suffix in enumerate(("_l0", "_l0_reverse")):
            w = {name.removesuffix(suffix): p for name, p in self.net.named_parameters() if name.endswith(suffix)}
            read = {"ih": cell.gates_of_x, "hh": cell.gates_of_a}
            b = {of: torch.zeros(len(cell.gates), hidden, dtype=DOUBLE) for of in read}
            for of in read.keys() & {name.removeprefix("bias_") for name in w}:
                b[of] = b[of].index_copy(0, torch.tensor(read[of]), w[f"bias_{of}"].view(-1, hidden))
            w_hh = whole(w.get("weight_hh"), len(cell.gates), hidden, cell.gates_of_a)
            units = [w[f"weight_{name}"] for name in cell.weights]
            of_rows = []
            for n in range(rows):
                s = [state[d, n] for state in states]
                y = [torch.zeros(hidden, dtype=DOUBLE)] * steps
                valid = range(int(lengths[n]))
                for t in reversed(valid) if d else valid:
                    if t + d < lengths[n] and resets[t + d, n]:
                        s = [torch.full_like(s[0], value) for value in cell.initial]
                    product = (w["weight_ih"] @ x[t, n]).view(-1, hidden)
                    of_x = b["ih"].index_add(0, torch.tensor(cell.gates_of_x), product)
                    s = self.step(of_x, w_hh @ s[0] + b["hh"], s, units)
                    s = s if isinstance(s, tuple) else (s,)
                    y[t] = s[0]
                of_rows.append((torch.stack(y), s))
            outputs.append(torch.stack([y for y, _ in of_rows], 1))
            finals.append([torch.stack(of) for of in zip(*(s for _, s in of_rows))])
        return torch.cat(outputs, 2), tuple(torch.stack(of) for of in zip(*finals))


# Of the evaluator, which has the same arithmetic with AVX-512's products of bfloat16 and with tiles as without them.
KERNELS = [n for n in BACKENDS if n in ("reference", "cpu-portable", "cpu-avx2", "cpu-avx512", "triton")]
on_each = pytest.mark.parametrize("kernels", KERNELS)


def states_of(cell: Cell, hidden: int = H, rows: int = N) -> tuple[Tensor, ...]:
    """Random, and for a normaliser positive, as it is in any step but the first."""
    made = {name: torch.randn(2, rows, hidden, dtype=DOUBLE) for name in cell.states}
    return tuple(state.abs() + 0.5 if name == "n" else state for name, state in made.items())


OF_FORM = {
    "rectangular": {},
    "lengths": {"lengths": torch.tensor([2, 5, 0, 4])},
    "resets": {"resets": torch.rand(T, N, generator=torch.Generator().manual_seed(1)) < 0.3},
}


def assert_as_the_loop(net: FlexRNN, step: Callable[..., Any], x: Tensor, states: Any, **of_form: Any) -> None:
    loop = values_and_grads(Loop(net, step), x, states, **of_form)
    expected = {name.replace("net.", ""): t for name, t in loop.items()}
    found = values_and_grads(net, x, states, **of_form)
    assert_same_or_zero(found, expected)


def with_zeros(found: dict[str, Tensor], every: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where nothing was read there is no gradient, or one of zero."""
    return {name: found.get(name, torch.zeros_like(t)) for name, t in every.items()}


def assert_same_or_zero(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    every = {**expected, **found}
    assert_same(with_zeros(found, every), with_zeros(expected, every))


@on_each
@pytest.mark.parametrize("form", OF_FORM)
@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.__name__)
@pytest.mark.few(1, "kernels", "form", "paper")
def test_cells_as_in_their_papers(kernels: str, paper: Callable[..., Any], form: str) -> None:
    cell = getattr(cells, paper.__name__)
    net = FlexRNN(cell, I, H, bidirectional=True, dtype=DOUBLE)
    with use(kernels):
        assert_as_the_loop(net, paper, torch.randn(T, N, I, dtype=DOUBLE), states_of(cell), **OF_FORM[form])


def test_every_cell_is_tested() -> None:
    declared = {name for name, of in vars(cells).items() if isinstance(of, Cell)}
    assert declared == {paper.__name__ for paper in PAPERS} | {"rnn_tanh", "rnn_relu", "lstm", "gru"}


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.__name__)
def test_second_derivatives(paper: Callable[..., Any]) -> None:
    net = FlexRNN(getattr(cells, paper.__name__), 2, 2, bias=False, dtype=DOUBLE)
    names, weights = zip(*net.named_parameters())
    x = torch.randn(3, 2, 2, dtype=DOUBLE, requires_grad=True)

    def function(x: Tensor, *weights: Tensor) -> Any:
        y, states = torch.func.functional_call(net, dict(zip(names, weights)), x)
        return y, *states

    assert torch.autograd.gradcheck(function, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *weights), fast_mode=True)


class _Stop(torch.autograd.Function):
    """Has no gradient for what comes in."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@on_each
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.few(1, "kernels", "create_graph")
def test_gradients_that_are_none(kernels: str, create_graph: bool) -> None:
    """Those of outputs, and of a state that is made of nothing that has gradients."""

    @rnnfast.cell(gates="g", states="h c", weights="u")
    def counts(x: Any, a: Any, s: Any, w: Any) -> Any:
        return torch.tanh(x.g + a.g) * s.c, 0.5 * s.c + w.u

    net, x = FlexRNN(counts, I, H, dtype=DOUBLE).requires_grad_(False), torch.randn(T, N, I, dtype=DOUBLE)
    x.requires_grad_()
    for of in (lambda y, c: _Stop.apply(y) + c, lambda y, c: _Stop.apply(y), lambda y, c: c, lambda y, c: y + c):
        found = []
        for name in ("reference", kernels):
            with use(name):
                y, (_, c) = net(x)
                loss = of(y, c).sum() + x.sum()
            found.append(torch.autograd.grad(loss, x, create_graph=create_graph)[0])
        torch.testing.assert_close(*found)


GATES = "abcdef"


# Torch's cells as a user's.


def again(of: Cell) -> Cell:
    """The same cell, but for a factor of 1, by which no kernel knows it."""

    def function(*given: Any) -> Any:
        h, *others = of.function(*given) if len(of.states) > 1 else [of.function(*given)]
        return h * 1.0, *others

    return cells.cell(gates=of.gates, states=of.states, weights=of.weights)(function)


OF_TORCH = {"LSTM": again(cells.lstm), "GRU": again(cells.gru), "RNN": again(cells.rnn_tanh)}


class AsTorchs(torch.nn.Module):
    """A FlexRNN that takes and returns states as LSTM, GRU and RNN do."""

    def __init__(self, name: str, *args: Any, **options: Any) -> None:
        super().__init__()
        self.net = FlexRNN(OF_TORCH[name], *args, **options)

    def forward(self, x: Any, hx: Any = None, **of_call: Any) -> Any:
        states = hx if hx is None or isinstance(hx, tuple) else (hx,)
        y, *found = self.net(x, states, **of_call)
        return y, *(of if len(of) > 1 else of[0] for of in found)


@on_each
@pytest.mark.parametrize("form", [*FORMS, "batch-first", "unbatched", "states"])
@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.few(1, "kernels", "form", "name")
def test_torchs_cells_written_anew(kernels: str, name: str, form: str) -> None:
    """The same parameters by the same names, and the same results."""
    options = {"num_layers": 2, "bidirectional": True, "dtype": DOUBLE, "batch_first": form == "batch-first"}
    torch.manual_seed(0)
    theirs = getattr(rnnfast, name)(I, H, **options)
    torch.manual_seed(0)
    ours = AsTorchs(name, I, H, **options)
    x, rows = torch.randn(T, N, I, dtype=DOUBLE), (N,)
    of_form: dict[str, Any] = {}
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([2, 5, 1, 4]), enforce_sorted=False)
    elif form == "batch-first":
        x = x.transpose(0, 1)
        of_form = {"resets": OF_FORM["resets"]["resets"].T, "return_states": True}
    elif form == "unbatched":
        x, rows = x[:, 0], ()
        of_form = {"lengths": torch.tensor(3), "return_states": True}
    elif form == "states":
        of_form = {"return_states": True}
    else:
        of_form = OF_FORM[form]
    hx = torch.randn(4, *rows, H, dtype=DOUBLE)
    hx = (hx, torch.randn_like(hx)) if name == "LSTM" else hx
    with use(kernels):
        found = values_and_grads(ours, x, hx, **of_form)
    assert_same({key.replace("net.", ""): t for key, t in found.items()}, values_and_grads(theirs, x, hx, **of_form))


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(kernels: str, dtype: torch.dtype) -> None:
    """All states are float32 from step to step."""
    theirs, ours = rnnfast.LSTM(I, H, dtype=DOUBLE), AsTorchs("LSTM", I, H, dtype=DOUBLE)
    ours.net.load_state_dict(theirs.to(dtype).state_dict())
    x = torch.randn(T, N, I).to(dtype)
    expected = values_and_grads(theirs.double(), x.double())
    with use(kernels):
        found = values_and_grads(ours.to(dtype), x)
    for (name, e), actual in zip(expected.items(), found.values()):
        assert actual.dtype == dtype, name
        assert (actual.double() - e).abs().max() <= 2 * FLOOR[dtype] * e.abs().max(), name


@rnnfast.cell(gates=[*GATES], states="h c", weights="u")
def six_gates(x: Any, a: Any, s: Any, w: Any) -> Any:
    c = torch.sigmoid(x.a + a.a) * s.c + torch.tanh(x.b + a.b) * torch.sigmoid(x.c + a.c)
    return torch.tanh(c + x.d * a.d) * torch.sigmoid(x.e + w.u * a.e) + torch.tanh(x.f + a.f), c


# Rows of a thread, strips of units and parts of them, panels of several vectors, groups of gates.
@on_each
@pytest.mark.parametrize("recurrent", ["dense", "heads", "diagonal", "none"])
@pytest.mark.parametrize("cell", [cells.slstm, cells.leaky_rnn, six_gates], ids=str)
@pytest.mark.few(1, "kernels", "recurrent", "cell")
def test_wide_layers(kernels: str, recurrent: str, cell: Cell) -> None:
    options = {"num_heads": 2} if recurrent == "heads" else {"recurrent": recurrent}
    lengths = torch.tensor([0, 3, 2, 1, 3, 0])
    for hidden, rows in ((300, 6), (38, 1)):
        net = FlexRNN(cell, I, hidden, bidirectional=True, **options, dtype=DOUBLE)
        x, states = torch.randn(3, rows, I, dtype=DOUBLE), states_of(cell, hidden, rows)
        of_form = {"lengths": lengths} if rows > 1 else {}
        with use("reference"):
            expected = values_and_grads(net, x, states, **of_form)
        with use(kernels):
            assert_same_or_zero(values_and_grads(net, x, states, **of_form), expected)


def test_threads_change_nothing() -> None:
    """Not a bit, however many rows each takes."""
    net, x = FlexRNN(cells.slstm, I, 40), torch.randn(3, 7, I)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(values_and_grads(net, x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name in ("output[0]", "gradient of input[0]"):
            assert torch.equal(found[0][name], other[name]), name


@pytest.mark.parametrize("of", [cells.lstm, cells.gru, cells.rnn_relu, cells.peephole_lstm], ids=str)
def test_torchs_cells_have_all_backends(of: Cell) -> None:
    """And give the same there as the loop."""
    kernels, loop = FlexRNN(of, I, H, 2, dtype=DOUBLE), FlexRNN(again(of), I, H, 2, dtype=DOUBLE)
    loop.load_state_dict(kernels.state_dict())
    x = torch.randn(T, N, I, dtype=DOUBLE)
    (choice,) = rnnfast.explain(kernels, x)
    assert choice.backend == "cpu"
    assert again(of).twin is None
    for of_call in (*OF_FORM.values(), {"return_states": True}):
        assert_same(values_and_grads(kernels, x, **of_call), values_and_grads(loop, x, **of_call))


def test_a_users_cell_of_the_same_equations_has_them_too() -> None:
    @rnnfast.cell(gates=("in", "forget", "new", "out"), states=("y", "memory"))
    def lstm(x: Any, r: Any, s: Any) -> Any:
        out = torch.sigmoid(x.out + r.out)
        forget, write = torch.sigmoid(x.forget + r.forget), torch.sigmoid(getattr(x, "in") + getattr(r, "in"))
        memory = forget * s.memory + write * torch.tanh(x.new + r.new)
        return out * torch.tanh(memory), memory

    @rnnfast.cell(gates="i f g o", states="h c", initial={"c": 1.0})
    def begins_elsewhere(x: Any, a: Any, s: Any) -> Any:
        return cells.lstm.function(x, a, s)

    assert lstm.twin == "LSTM" and begins_elsewhere.twin is None
    net = FlexRNN(lstm, I, H, dtype=DOUBLE)
    assert rnnfast.explain(net)[0].backend == "cpu"
    loop = FlexRNN(again(cells.lstm), I, H, dtype=DOUBLE)
    loop.load_state_dict(net.state_dict())
    x = torch.randn(T, N, I, dtype=DOUBLE)
    assert_same(values_and_grads(net, x), values_and_grads(loop, x))


# Forms of W_hh.


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_heads_are_blocks(heads: int) -> None:
    net, dense = (FlexRNN(cells.slstm, I, H, num_heads=k, dtype=DOUBLE) for k in (heads, 1))
    state = dict(net.state_dict())
    state["weight_hh_l0"] = whole(net.weight_hh_l0.detach(), 4, H, range(4)).flatten(0, 1)
    dense.load_state_dict(state)
    assert net.weight_hh_l0.numel() * heads == dense.weight_hh_l0.numel()
    x = torch.randn(T, N, I, dtype=DOUBLE)
    assert_same(dict(flatten(net(x))), dict(flatten(dense(x))))


@on_each
@pytest.mark.parametrize("hidden", [3, 17])
@pytest.mark.few(1, "kernels", "hidden")
def test_heads_of_one_unit(kernels: str, hidden: int) -> None:
    """As a diagonal; and with a bias that is one number in memory."""
    net = FlexRNN(cells.janet, I, hidden, num_heads=hidden, dtype=DOUBLE)
    diagonal = FlexRNN(cells.janet, I, hidden, recurrent="diagonal", dtype=DOUBLE)
    state = net.state_dict()
    state["weight_hh_l0"] = net.weight_hh_l0.detach().view(hidden, -1).T.flatten()
    diagonal.load_state_dict(state)
    x, one = torch.randn(T, N, I, dtype=DOUBLE), {"bias_hh_l0": torch.rand(1, dtype=DOUBLE).expand(2 * hidden)}
    with use("reference"):
        expected = values_and_grads(diagonal, x)
        y = torch.func.functional_call(net, one, x)[0].detach()
    with use(kernels):
        found = values_and_grads(net, x)
        with torch.no_grad():
            torch.testing.assert_close(torch.func.functional_call(net, one, x)[0], y)
    name = "gradient of weight_hh_l0"
    expected[name] = expected[name].view(-1, hidden).T.reshape(hidden, -1, 1)
    assert_same(found, expected)


@pytest.mark.parametrize("recurrent", ["diagonal", "none"])
def test_less_than_dense(recurrent: str) -> None:
    net = FlexRNN(cells.lstm, I, H, recurrent=recurrent, bidirectional=True, dtype=DOUBLE)
    x = torch.randn(T, N, I, dtype=DOUBLE)
    assert_as_the_loop(net, lambda x, u, s, w: cells.lstm.step(x, u, s), x, states_of(cells.lstm))
    assert "evaluator" in rnnfast.explain(net)[0].reason


def test_parameters_are_those_that_are_read() -> None:
    shapes = lambda cell, **options: {n: list(p.shape) for n, p in FlexRNN(cell, I, H, **options).named_parameters()}
    assert shapes(cells.min_gru) == {"weight_ih_l0": [2 * H, I], "bias_ih_l0": [2 * H]}
    assert shapes(cells.indrnn, bias=False) == {"weight_ih_l0": [H, I], "weight_u_l0": [H]}
    assert shapes(cells.lstm, bias=False, num_heads=2)["weight_hh_l0"] == [2, 4 * H // 2, H // 2]

    @rnnfast.cell(gates="f g")
    def forgets_by_the_past_alone(x: Any, a: Any, s: Any) -> Any:
        return torch.sigmoid(a.f) * s.h + torch.tanh(x.g)

    found = shapes(forgets_by_the_past_alone)
    assert found == {
        "weight_ih_l0": [H, I], "weight_hh_l0": [H, H], "bias_ih_l0": [H], "bias_hh_l0": [H],
    }  # fmt: skip


# Random cells.


@st.composite
def random_cells(draw: st.DrawFn) -> tuple[Cell, str, int]:
    """A cell of random expressions, its recurrence and heads. States are bounded, or they would explode."""
    states = ["h", "c", "n", "m"][: draw(st.integers(1, 4))]
    gates = list(GATES[: draw(st.integers(1, 6))])
    names = [f"x.{g}" for g in gates] + [f"a.{g}" for g in gates] + [f"s.{s}" for s in states] + ["w.u", "w.k", 0.5]
    expressions = st.recursive(
        st.sampled_from(names),
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(sorted(SMOOTH | KINKED)), inner),
            st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
        ),
        max_leaves=6,
    )
    of_states = [draw(expressions) for _ in states]

    def step(x: Any, a: Any, s: Any, w: Any) -> Any:
        scope = {"x": x, "a": a, "s": s, "w": w}
        value = lambda e: (
            (SMOOTH | KINKED | BINARY)[e[0]](*map(value, e[1:]))
            if isinstance(e, tuple)
            else eval(e, scope)
            if isinstance(e, str)
            else e + 0 * x.a
        )
        return tuple(torch.tanh(value(e) + x.a) for e in of_states)

    declared = rnnfast.cell(gates=gates, states=states, weights="u", scalars={"k": 0.7}, initial={states[-1]: 0.3})
    recurrent = draw(st.sampled_from(["dense", "diagonal", "none"]))
    cell = declared(step)
    return cell, recurrent, draw(st.sampled_from([1, 2])) if recurrent == "dense" and cell.gates_of_a else 1


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.full)])
def test_random_cells(count: int) -> None:
    drawn = given(random_cells(), st.sampled_from(sorted(OF_FORM)), st.sampled_from(KERNELS))
    settings(deadline=None, max_examples=count, derandomize=True, database=None)(drawn(assert_is_as_written))()


def assert_is_as_written(drawn: tuple[Cell, str, int], form: str, kernels: str) -> None:
    """Against autograd through the loop, of the function itself."""
    cell, recurrent, heads = drawn
    torch.manual_seed(0)
    net = FlexRNN(cell, 2, 4, recurrent=recurrent, num_heads=heads, bidirectional=True, dtype=DOUBLE)
    step = lambda x, u, s, w: cell.step(x, u, s, [*w, torch.tensor(0.7, dtype=DOUBLE)])
    x, states = torch.randn(3, 2, 2, dtype=DOUBLE), tuple(torch.randn(2, 2, 4, dtype=DOUBLE) for _ in cell.states)
    of_form = {
        "rectangular": {},
        "lengths": {"lengths": torch.tensor([1, 3])},
        "resets": {"resets": torch.tensor([[False, True], [True, False], [False, False]])},
    }
    with use(kernels):
        assert_as_the_loop(net, step, x, states, **of_form[form])


# What a layer can do beside.


@pytest.fixture
def net() -> FlexRNN:
    return FlexRNN(cells.slstm, I, H, 2, num_heads=2, bidirectional=True, dtype=DOUBLE)


X = torch.randn(T, N, I, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


def test_recompute(net: FlexRNN) -> None:
    """The same numbers, of less that is kept."""
    found = []
    for net.recompute in (False, True):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            net(X)
        found.append((len(kept), values_and_grads(net, X)))
    assert_same(found[1][1], found[0][1], rtol=0, atol=0)
    assert 3 * found[1][0] < found[0][0]


def test_recompute_within_transforms(net: FlexRNN) -> None:
    expected = torch.func.grad(lambda x: net(x)[0].sum())(X)
    net.recompute = True
    torch.testing.assert_close(torch.func.grad(lambda x: net(x)[0].sum())(X), expected)


@on_each
@pytest.mark.parametrize("log_i", [-90.0, -800.0])
def test_slstm_of_small_input_gates(kernels: str, log_i: float) -> None:
    """At a first step, and at one after a reset, the normaliser takes what there is: h is o * tanh(z)."""
    net = FlexRNN(cells.slstm, I, H, recurrent="none", dtype=DOUBLE if log_i < -90 else torch.float32)
    x = X.to(net.weight_ih_l0.dtype)
    resets = torch.zeros(T, N, dtype=torch.bool)
    resets[2] = True
    with torch.no_grad():
        net.bias_ih_l0[:H] = log_i
    with use(kernels):
        y, _ = net(x, resets=resets)
        grads = torch.autograd.grad(y.square().sum(), [net.weight_ih_l0, net.bias_ih_l0])
    gates = torch.nn.functional.linear(x, net.weight_ih_l0, net.bias_ih_l0)
    _, _, z, o = gates.chunk(4, 2)
    torch.testing.assert_close(y[[0, 2]], (o.sigmoid() * z.tanh())[[0, 2]])
    assert all(grad.isfinite().all() for grad in grads)


@on_each
def test_min_lstm_of_small_gates(kernels: str) -> None:
    """The share of each of two gates that underflow."""
    net = FlexRNN(cells.min_lstm, I, H)
    with torch.no_grad():
        net.bias_ih_l0[: 2 * H] = -110
        net.weight_ih_l0[: 2 * H] = 0
    with use(kernels):
        y, _ = net(X.float())
    candidate = torch.nn.functional.linear(X.float(), net.weight_ih_l0, net.bias_ih_l0)[..., 2 * H :]
    torch.testing.assert_close(y[0], candidate[0] / 2)


@on_each
@pytest.mark.parametrize("recurrent", ["dense", "none"])
@pytest.mark.few(1, "kernels", "recurrent")
def test_what_lies_beyond_the_lengths_is_nothing(kernels: str, recurrent: str) -> None:
    net = FlexRNN(cells.slstm, I, H, 2, bidirectional=True, recurrent=recurrent, dtype=DOUBLE)
    lengths = torch.tensor([2, 5, 0, 4])
    beyond = torch.arange(T)[:, None, None] >= lengths[:, None]
    with use(kernels):
        found, expected = (
            values_and_grads(net, X.masked_fill(beyond, padding), lengths=lengths) for padding in (float("nan"), 0.0)
        )
    assert_same(found, expected)


@on_each
def test_a_nan_goes_through(kernels: str) -> None:
    f = torch.nn.functional
    functions = [f.hardtanh, f.hardsigmoid, f.elu, lambda v: v.clamp(-1, 1), lambda v: cells.minimum(1.0, v)]
    functions += [lambda v: cells.maximum(v, -1.0), lambda v: torch.maximum(v, 0 * v)]
    for function in functions:
        net = FlexRNN(rnnfast.cell(gates="g")(lambda x, a, s, of=function: of(x.g)), 1, 1)
        with use(kernels):
            assert net(torch.full((1, 1, 1), float("nan")))[0].isnan().all()


@on_each
def test_initial_values_are_not_rounded(kernels: str) -> None:
    @rnnfast.cell(gates="g", states="h c", initial={"c": 0.1})
    def rest(x: Any, a: Any, s: Any) -> Any:
        return (s.c - 0.1) * 1e4 + 0 * x.g, s.c

    resets = torch.tensor([[False], [False], [True]])
    net = FlexRNN(rest, 1, 1, bidirectional=True, dtype=torch.bfloat16)
    with use(kernels):
        y, _ = net(torch.zeros(3, 1, 1, dtype=torch.bfloat16), resets=resets)
    assert y.abs().max() < 1e-2


@on_each
def test_constants_keep_their_dtype(kernels: str) -> None:
    net = FlexRNN(rnnfast.cell(gates="g")(lambda x, a, s: torch.where(x.g > 9, 1 / 3, 2 / 3)), 1, 1, dtype=DOUBLE)
    with use(kernels):
        assert net(torch.zeros(1, 1, 1, dtype=DOUBLE))[0].item() == 2 / 3


def test_scalars() -> None:
    slow, fast = (FlexRNN(cells.leaky_rnn, I, H, scalars=given, dtype=DOUBLE) for given in (None, {"leak": 0.9}))
    fast.load_state_dict(slow.state_dict())
    assert not torch.equal(slow(X)[0], fast(X)[0])
    for net, leak in ((slow, 0.3), (fast, 0.9)):
        y, (h,) = net(X[:1])
        w = net.weight_ih_l0 @ X[0].T + net.bias_ih_l0[:, None] + net.bias_hh_l0[:, None]
        torch.testing.assert_close(h[0], leak * torch.tanh(w).T)


def test_initial_values_come_back_at_a_reset() -> None:
    @rnnfast.cell(gates="g", states="h c", initial={"h": 2.0, "c": -1.0})
    def adds(x: Any, a: Any, s: Any) -> Any:
        return s.h + 0 * x.g, s.c - s.h

    resets = torch.tensor([[False], [False], [True], [False]])
    y, (h, c) = FlexRNN(adds, 1, 1, dtype=DOUBLE)(torch.zeros(4, 1, 1, dtype=DOUBLE), resets=resets)
    assert y.flatten().tolist() == [2, 2, 2, 2] and c.item() == -5


def test_dropout_is_torchs(net: FlexRNN) -> None:
    net.dropout = 0.5
    assert not torch.equal(net(X)[0], net(X)[0])
    torch.manual_seed(3)
    first = net(X)[0]
    torch.manual_seed(3)
    assert torch.equal(first, net(X)[0])
    assert torch.equal(net.eval()(X)[0], net(X)[0])
    with pytest.warns(UserWarning, match="dropout=0.5 and num_layers=1 drop nothing"):
        of_one_layer = FlexRNN(cells.janet, I, H, dropout=0.5, dtype=DOUBLE)
    assert torch.equal(of_one_layer(X)[0], of_one_layer.eval()(X)[0])


def test_copies(net: FlexRNN) -> None:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)):
        assert other.cell is cells.slstm and repr(other) == repr(net)
        assert_same(dict(flatten(other(X))), dict(flatten(net(X))), rtol=0, atol=0)


def test_a_local_cell_is_no_name_to_pickle() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match="again"):
        pickle.dumps(again_locally())


def again_locally() -> Cell:
    @rnnfast.cell(gates="g")
    def again(x: Any, a: Any, s: Any) -> Any:
        return x.g

    return again


def test_repr(net: FlexRNN) -> None:
    assert repr(net) == "FlexRNN(slstm, 3, 6, num_layers=2, bidirectional=True, num_heads=2)"
    other = FlexRNN(cells.leaky_rnn, 3, 6, bias=False, recurrent="diagonal", scalars={"leak": 1.0}, recompute=True)
    assert repr(other) == (
        "FlexRNN(leaky_rnn, 3, 6, bias=False, recurrent=diagonal, scalars={'leak': 1.0}, recompute=True)"
    )


@pytest.mark.parametrize("form", ["lengths", pytest.param("resets", marks=pytest.mark.full)])
def test_compile(form: str) -> None:
    net = FlexRNN(cells.janet, I, H, bidirectional=True, dtype=DOUBLE)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    of_form = {"lengths": torch.tensor([2, 1, 0, 2])} if form == "lengths" else {"resets": OF_FORM[form]["resets"][:2]}
    of_call = {**of_form, "return_states": True}
    found = values_and_grads(compiled, X[:2], **of_call)
    assert_same({k.replace("_orig_mod.", ""): t for k, t in found.items()}, values_and_grads(net, X[:2], **of_call))


@pytest.mark.parametrize("recurrent", ["dense", "diagonal"])
def test_compile_is_the_first_call(recurrent: str) -> None:
    """Of a cell that nothing has run before."""

    @rnnfast.cell(gates="f g")
    def fresh(x: Any, a: Any, s: Any) -> Any:
        f = torch.sigmoid(x.f + a.f)
        return f * s.h + (1 - f) * torch.tanh(a.g)

    net = FlexRNN(fresh, I, H, recurrent=recurrent, dtype=DOUBLE)
    y, _ = torch.compile(net, fullgraph=True, backend="eager")(X)
    torch.testing.assert_close(y, net(X)[0])


@pytest.mark.parametrize("recurrent", ["diagonal", "none"])
def test_copies_without_a_matrix(recurrent: str) -> None:
    net = FlexRNN(cells.janet, I, H, recurrent=recurrent, dtype=DOUBLE)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(X)[0], net(X)[0])


def test_export() -> None:
    net = FlexRNN(cells.janet, I, H, dtype=DOUBLE)
    program = torch.export.export(net, (X,), {"lengths": OF_FORM["lengths"]["lengths"]})
    found = program.module()(X, lengths=OF_FORM["lengths"]["lengths"])
    assert_same(dict(flatten(found)), dict(flatten(net(X, **OF_FORM["lengths"]))))


def test_transforms(net: FlexRNN) -> None:
    """Per-sample gradients by vmap, and forward-mode derivatives."""
    weights = dict(net.named_parameters())
    loss = lambda weights, x: torch.func.functional_call(net, weights, (x.unsqueeze(1),))[0].square().sum()
    of_samples = torch.func.vmap(torch.func.grad(loss), (None, 1))(weights, X)
    expected = [torch.func.grad(loss)(weights, X[:, n]) for n in range(N)]
    assert_same(of_samples, {name: torch.stack([of[name] for of in expected]) for name in weights})
    direction = torch.randn_like(X)
    _, forward = torch.func.jvp(lambda x: net(x)[0], (X,), (direction,))
    x = X.clone().requires_grad_()
    reverse = torch.autograd.grad(net(x)[0], x, torch.ones_like(forward))[0]
    torch.testing.assert_close(forward.sum(), (reverse * direction).sum())


def test_autocast() -> None:
    net = FlexRNN(cells.slstm, I, H)
    with torch.autocast("cpu", torch.bfloat16):
        y, states = net(X.float())
    assert {y.dtype, *(state.dtype for state in states)} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), net(X.float())[0], rtol=5e-2, atol=5e-2)


def test_is_one_node_of_a_graph(net: FlexRNN) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[0] + 1

    model = Model()
    graph = torch.fx.symbolic_trace(model)
    assert "call_module" in [node.op for node in graph.graph.nodes]
    assert torch.equal(graph(X), model(X))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile a FlexRNN"):
        torch.jit.script(model)


def test_sizes_of_zero(net: FlexRNN) -> None:
    y, states = net(X[:, :0])
    assert y.shape == (T, 0, 2 * H) and {state.shape for state in states} == {(4, 0, H)}
    given = [torch.rand(4, N, H, dtype=DOUBLE) for _ in range(4)]
    y, states = net(X[:0], given, lengths=torch.zeros(N, dtype=torch.long))
    assert y.shape == (0, N, 2 * H) and all(torch.equal(a, b) for a, b in zip(states, given))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        net(X[:0])


@pytest.mark.parametrize("on", ["reference", "cpu"])
def test_states_without_steps_share_no_memory(on: str) -> None:
    net = FlexRNN(cells.cifg, I, H, dtype=DOUBLE)
    with rnnfast.use_backend(on):
        _, (h, c) = net(X[:0], lengths=torch.zeros(N, dtype=torch.long))
    with torch.no_grad():
        h.add_(1)
    assert not c.count_nonzero()


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0"])
def test_a_bias_may_be_taken_away(name: str) -> None:
    net = FlexRNN(cells.slstm, I, H, dtype=DOUBLE)
    with torch.no_grad():
        getattr(net, name).zero_()
    expected = net(X)[0]
    setattr(net, name, None)
    torch.testing.assert_close(net(X)[0], expected)
    net(X)[0].sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(net(X)[0], expected)


def test_programs_outlive_modes() -> None:
    """What runs first within a mode, or with a default device, leaves nothing behind that is fit for these alone."""

    def fresh() -> FlexRNN:
        cell = rnnfast.cell(gates="f")(lambda x, a, s: (x.f + a.f).tanh())
        return FlexRNN(cell, I, H, device="cpu", dtype=DOUBLE).requires_grad_(False)

    with FakeTensorMode():
        fake = fresh()
        assert fake(torch.empty(T, N, I, dtype=DOUBLE))[0].shape == (T, N, H)
    net = fresh()
    net.cell = net._run_cell = fake.cell
    expected = reference(net)
    torch.testing.assert_close(net(X)[0], expected)
    with torch.device("meta"):
        net = fresh()
        torch.testing.assert_close(net(X)[0], reference(net))
    torch.testing.assert_close(net(X)[0], reference(net))
    torch.testing.assert_close(net.requires_grad_()(X)[0], reference(net))


def reference(net: FlexRNN) -> Tensor:
    with rnnfast.use_backend("reference"):
        return net(X)[0]


def test_explain(net: FlexRNN) -> None:
    (choice,) = rnnfast.explain(torch.nn.Sequential(net), X)
    assert choice.backend == "cpu" and "evaluator" in choice.reason
    assert rnnfast.explain(net)[0] == choice._replace(module="")
    refused = pytest.raises(RuntimeError, match="backend 'torch' cannot serve this call: its kernels are of")
    with rnnfast.use_backend("torch"), refused:
        net(X)
    with rnnfast.use_backend("reference"):
        assert rnnfast.explain(net)[0].backend == "reference"
    of_complex = FlexRNN(cells.mgu, I, H, dtype=torch.complex64)
    (choice,) = rnnfast.explain(of_complex)
    assert choice.backend == "reference" and "no kernel for torch.complex64" in choice.reason
    with rnnfast.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot serve this call: no kernel for"):
        of_complex(X.to(torch.complex64))


# The operators of the CPU library.

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-3, -1e-3, 3e-39, 1e-30, 1e30, -1e30, 20.0, -20.0, 88.0, 700.0, -700.0]
SPECIAL += [
    float("inf"),
    -float("inf"),
    float("nan"),
    1e-300,
    1e-310,
    -0.999999,
    0.7071,
    1.4142,
    *torch.randn(60).tolist(),
]


def arity_of(name: str) -> int:
    return PRIMITIVES[name].on_tensors.__code__.co_argcount


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("kernels", [name for name in KERNELS if name.startswith("cpu")])
def test_operations(kernels: str, dtype: torch.dtype) -> None:
    """Each to 8 units in the last place, as torch's, of all pairs of values."""
    values = torch.tensor(SPECIAL, dtype=dtype)
    a, b = (v.flatten() for v in torch.meshgrid(values, values, indexing="ij"))
    size = a.numel()
    x = torch.stack([a, b]).view(1, 1, -1)
    none = torch.zeros(0, dtype=DOUBLE)
    of_two = {both: (second, first, at) for (second, at, first), both in FUSED.items()}
    for number, name in enumerate(OPERATIONS):
        count = 3 if name == "where" or name in of_two else 2
        operation = torch.tensor([[number, 0, *([1] * (count - 1)), *([0] * (3 - count))]])
        program, x_gates = (operation, none, torch.tensor([3])), (None, None, None, x)
        arguments = *program, *x_gates, None, None, [torch.zeros(1, size, dtype=dtype)], []
        with use(kernels):
            after, *_ = torch.ops.rnnfast.cpu_flex_forward(
                *arguments, torch.zeros(1, dtype=DOUBLE), None, None, False, False
            )
        tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
        if name in of_two:  # of sums that cancel each other what matters is how large their terms are
            second, first, at = of_two[name]
            made = PRIMITIVES[first].on_tensors(a, b)
            expected = PRIMITIVES[second].on_tensors(*((b, made) if at else (made, b))[: arity_of(second)])
            slack = (made.abs() + b.abs()).nan_to_num(0, 0, 0) * 4 * eps + 4 * tiny + 8 * eps * expected.abs()
            near = (after[0][0] - expected).abs() <= slack
            assert (near | (after[0][0] == expected) | (after[0][0].isnan() & expected.isnan())).all(), name
            continue
        arity = arity_of(name)
        given = (a != 0, b, b) if name == "where" else (a, b)[:arity]
        expected = PRIMITIVES[name].on_tensors(*given).to(dtype)
        # The reference's own functions of subnormals and their like differ by what lies below the smallest normal one.
        torch.testing.assert_close(after[0][0], expected, rtol=8 * eps, atol=4 * tiny, equal_nan=True, msg=name)


def test_two_operations_as_one() -> None:
    """Where what the first one makes is read by the second alone."""

    @rnnfast.cell(gates="f g")
    def cell(x, a, s):
        f = x.f + a.f
        return torch.sigmoid(f) * s.h + f * torch.tanh(x.g + a.g) * x.g

    (operations, _, results), *_ = programs(cell, (), 1, 2)
    names = [OPERATIONS[number] for number in operations[:, 0]]
    assert sorted(names) == ["add", "multiply_add", "multiply_twice", "sigmoid", "tanh_of_sum"]
    assert results.tolist() == [5 + len(names) - 1]


@pytest.mark.parametrize("options", [{}, {"recurrent_dropout": 0.3}, {"bidirectional": True}], ids=str)
def test_states_that_nobody_asks_for(options: dict[str, Any]) -> None:
    """Without autograd they are not made, and change nothing."""
    net, x = FlexRNN(cells.slstm, I, H, num_layers=2, **options), torch.randn(T, N, I)
    with torch.no_grad():
        torch.manual_seed(0)
        y, states = net(x)
        torch.manual_seed(0)
        expected, of_states, every = net(x, return_states=True)
    assert torch.equal(y, expected) and torch.equal(y, every[0][-1]) and len(every) == 4
    assert all(map(torch.equal, states, of_states))


def test_zeros_of_either_sign() -> None:
    """Scalars that are equal, and are not the same."""
    cell = rnnfast.cell(gates="f", scalars={"zero": 0.0})(lambda x, a, s, w: 1 / (0 * x.f + w.zero))
    for zero in (0.0, -0.0):
        (h,) = FlexRNN(cell, 1, 1, scalars={"zero": zero}, recurrent="none")(torch.ones(1, 1, 1) * -zero)[1]
        assert h.item() == 1 / torch.tensor(zero)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("given", ["x", "z_gates", "both"])
def test_operators_and_their_fakes(given: str, heads: int) -> None:
    """What they return has the shapes that fakes give it, and arguments are left as they are."""
    torch.manual_seed(0)
    forward, backward = torch.ops.rnnfast.cpu_flex_forward.default, torch.ops.rnnfast.cpu_flex_backward.default
    cell, of_x = cells.peephole_lstm, {"x": 4, "z_gates": 0, "both": 3}[given]
    made = programs(cell, (), heads, of_x)
    x, w_ih, b_ih = (torch.randn(T, N, I), torch.randn(of_x * H, I), torch.randn(of_x * H)) if of_x else (None,) * 3
    z_gates = torch.randn(T, N, (4 - of_x) * H) if of_x < 4 else None
    w_hh, units = torch.randn(heads, 4 * H // heads, H // heads), [torch.randn(H)] * 3
    states = [torch.randn(N, H)] * 2
    lengths, resets = torch.tensor([5, 0, 3, 1]), torch.rand(T, N) < 0.3
    of_gates = x, w_ih, b_ih, z_gates, w_hh, torch.randn(4 * H)
    for keep in (False, True):
        program = made.keeping if keep else made.forward
        call = *program, *of_gates, states, units, made.initial, lengths, resets, True, keep
        torch.library.opcheck(forward, call, test_utils=("test_schema", "test_faketensor"))
    for wanted in (0, 1, 2):
        torch.library.opcheck(
            forward, (*made.forward, *call[3:-1], False, 0, wanted), test_utils=("test_schema", "test_faketensor")
        )
    with pytest.raises(RuntimeError, match="of 2 states, and of all for a backward, not of 1"):
        forward(*call, 0, 1)
    _, every, saved = forward(*call)
    of_steps = x, w_ih, w_hh, states, every, units, made.initial, saved, lengths, resets
    for needs in ((True, True, True), (False, False, False)):
        grads = [torch.randn(T, N, H), torch.zeros(0)], [torch.zeros(0), torch.randn(N, H)]
        call = *made.backward, *of_steps, *grads, 4 - of_x, True, *needs
        torch.library.opcheck(backward, call, test_utils=("test_schema", "test_faketensor"))


def malformed() -> dict[str, tuple[Callable[[list[Any]], None], str]]:
    """What is wrong with the arguments of cpu_flex_forward, and what is said."""
    at = lambda index, value: lambda args: args.__setitem__(index, value)
    rows = lambda *row: torch.tensor([row])

    def of_x(**given: Tensor) -> Callable[[list[Any]], None]:
        found = {"x": torch.zeros(2, 3, 5), "w_ih": torch.zeros(4, 5), "b_ih": None, **given}
        return lambda args: args.__setitem__(slice(3, 6), found.values())

    return {
        "operation": (at(0, rows(len(OPERATIONS), 0, 0, 0)), "has no operation"),
        "negative operation": (at(0, rows(-1, 0, 0, 0)), "has no operation"),
        "place beyond": (at(0, rows(0, 0, 3, 0)), "reads place 3"),
        "negative place": (at(0, rows(0, 0, 0, -1)), "reads place -1"),
        "columns": (at(0, torch.zeros(1, 3, dtype=torch.long)), "operations has shape"),
        "dtype": (at(0, torch.zeros(1, 4)), "operations has dtype"),
        "numbers": (at(1, torch.zeros(1)), "numbers has dtype"),
        "result beyond": (at(2, torch.tensor([4])), "result 0 is place 4"),
        "result is an input": (at(2, torch.tensor([0])), "result 0 is place 0"),
        "results": (at(2, torch.zeros(0, dtype=torch.long)), "has 0 results, of 1 states"),
        "results that nobody keeps": (
            lambda args: args.__setitem__(slice(2, 16), [torch.tensor([3, 3]), *args[3:15], False]),
            "has 2 results, of 1 states",
        ),
        "results of rows that nobody keeps": (
            lambda args: args.__setitem__(slice(15, 16), [False, 1]),
            "has 1 results, of 1 states",
        ),
        "nothing": (at(6, None), "needs x or z_gates"),
        "x": (at(3, torch.zeros(2, 8)), "x has to be"),
        "x alone": (at(3, torch.zeros(2, 3, 5)), "x and w_ih need each other"),
        "w_ih alone": (at(4, torch.zeros(4, 5)), "x and w_ih need each other"),
        "w_ih": (of_x(w_ih=torch.zeros(4, 6)), "w_ih has shape"),
        "w_ih of no whole gate": (of_x(w_ih=torch.zeros(6, 5)), r"w_ih has to be \[X\*H, I\]"),
        "w_ih of no gate": (of_x(w_ih=torch.zeros(0, 5)), r"w_ih has to be \[X\*H, I\]"),
        "b_ih": (of_x(b_ih=torch.zeros(5)), "b_ih has shape"),
        "dtype of x": (of_x(x=torch.zeros(2, 3, 5, dtype=DOUBLE)), "w_ih has dtype"),
        "more gates than the program reads": (of_x(), "result 0 is place 3"),
        "z": (at(6, torch.zeros(2, 8)), "z_gates has to be"),
        "z of half": (at(6, torch.zeros(2, 3, 8).half()), "z_gates has to be float32 or float64"),
        "z of no whole gate": (at(6, torch.zeros(2, 3, 7)), "z_gates has to have columns for every unit"),
        "w_hh": (at(7, torch.zeros(1, 4, 3)), "w_hh has shape"),
        "heads": (at(7, torch.zeros(3, 4, 4)), "w_hh has to be"),
        "b_hh": (at(8, torch.zeros(3)), "b_hh has shape"),
        "states": (at(9, []), "states have to be"),
        "rows": (at(9, [torch.zeros(2, 4)]), "states has shape"),
        "state dtype": (at(9, [torch.zeros(3, 4, dtype=DOUBLE)]), "states has dtype"),
        "units": (at(10, [torch.zeros(3)]), "a weight of units has shape"),
        "initial": (at(11, torch.zeros(2, dtype=DOUBLE)), "initial has shape"),
        "lengths": (at(12, torch.tensor([0, 1, 3])), "lengths have to be between 0 and 2"),
        "resets": (at(13, torch.zeros(3, 2, dtype=torch.bool)), "resets has shape"),
    }


@pytest.mark.parametrize("what", malformed())
def test_malformed_calls(what: str) -> None:
    program = [torch.tensor([[0, 0, 1, 0]]), torch.zeros(0, dtype=DOUBLE), torch.tensor([3])]
    args = [*program, None, None, None, torch.zeros(2, 3, 4), torch.zeros(1, 4, 4), torch.zeros(4)]
    args += [[torch.zeros(3, 4)], []]
    args += [torch.zeros(1, dtype=DOUBLE), torch.tensor([0, 1, 2]), torch.zeros(2, 3, dtype=torch.bool), False, True]
    torch.ops.rnnfast.cpu_flex_forward(*args)
    change, message = malformed()[what]
    change(args)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnnfast.cpu_flex_forward(*args)


BAD_BACKWARD = {
    "results": (2, torch.tensor([4]), "has 1 results, expected 3"),
    "result is an input": (2, torch.tensor([5, 4, 0]), "result 2 is place 0"),
    "x alone": (3, torch.zeros(2, 3, 5), "x and w_ih need each other"),
    "w_ih": (4, torch.zeros(4, 6), "x and w_ih need each other"),
    "w_hh": (5, torch.zeros(1, 8, 4), "has 3 results, expected 4"),
    "states": (6, [torch.zeros(2, 3, 4)], r"states have to be \[N, H\]"),
    "every": (7, [torch.zeros(2, 3, 5)], "every has shape"),
    "initial": (9, torch.zeros(2, dtype=DOUBLE), "initial has shape"),
    "saved": (10, torch.zeros(2, 3, 6), "saved has to have columns for every unit"),
    "rows": (10, torch.zeros(2, 2, 4), "states has shape"),
    "d_final": (14, [torch.zeros(3, 4)] * 2, "got 2 d_final, expected 1"),
    "no gates": (15, 0, "a layer needs gates"),
    "gates": (15, -1, "there cannot be -1 gates"),
}


@pytest.mark.parametrize("what", BAD_BACKWARD)
def test_malformed_backward(what: str) -> None:
    """Of a cell of one gate: the gradients are d times what was saved, of x and of a, and d of h."""
    program = [torch.tensor([[2, 0, 3, 0], [0, 3, 3, 0]]), torch.zeros(0, dtype=DOUBLE), torch.tensor([4, 4, 5])]
    steps = torch.ones(2, 3, 4)
    initial = torch.zeros(1, dtype=DOUBLE)
    args = [*program, None, None, torch.zeros(4, 4), [steps[0]], [steps], [], initial, steps, None, None, [steps]]
    args += [[torch.zeros(3, 4)], 1, False, True, True, True]
    dx, dw_ih, _, dz, dw_hh, db_hh, (dh,), _ = torch.ops.rnnfast.cpu_flex_backward(*args)
    assert dx.numel() == 0 == dw_ih.numel() and dz[0, 0, 0] == 3 and dh[0, 0] == 6
    assert dw_hh.shape == (4, 4) and dw_hh[0, 0] == 12 == db_hh[0]
    index, value, message = BAD_BACKWARD[what]
    args[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rnnfast.cpu_flex_backward(*args)


STATES = [torch.zeros(4, N, H, dtype=DOUBLE)] * 4
BAD_CALLS = {
    "4D": ((X[None],), {}, ValueError, "Expected input to be 2D or 3D, got 4D"),
    "features": ((X[..., :2],), {}, ValueError, "input has 2 features, expected input_size=3"),
    "dtype": ((X.float(),), {}, RuntimeError, "must have the same dtype"),
    "a tensor for states": ((X, STATES[0]), {}, ValueError, "a tuple of 4 Tensors: h, c, n, m"),
    "three states": ((X, STATES[:3]), {}, ValueError, "a tuple of 4 Tensors"),
    "no tensor": ((X, [*STATES[:3], 1.0]), {}, TypeError, "m must be a Tensor, got float"),
    "one missing": ((X, [*STATES[:3], None]), {}, ValueError, "Expected state m to be 3D, got None"),
    "state dims": ((X, [*STATES[:3], STATES[0][0]]), {}, ValueError, "Expected state m to be 3D, got 2D"),
    "state shape": (
        (X, [*STATES[:3], STATES[0][:2]]),
        {},
        ValueError,
        r"state m of shape \[4, 4, 6\], got \[2, 4, 6\]",
    ),
    "state dtype": ((X, [*STATES[:3], STATES[0].float()]), {}, RuntimeError, "must have the same dtype"),
    "lengths": ((X,), {"lengths": torch.tensor([9, 1, 1, 1])}, ValueError, "lengths must be within 0..5"),
    "lengths' kind": ((X,), {"lengths": [5, 1, 1, 1]}, TypeError, "lengths must be a Tensor, got list"),
    "resets": ((X,), {"resets": torch.zeros(T, N)}, ValueError, "resets must be a bool tensor"),
    "packed lengths": (
        (pack_padded_sequence(X, torch.tensor([5, 4, 3, 2])),),
        {"lengths": torch.tensor([5, 4, 3, 2])},
        ValueError,
        "lengths cannot be given together with a PackedSequence",
    ),
    "packed states": (
        (pack_padded_sequence(X, torch.tensor([2, 4, 3, 5]), enforce_sorted=False), [s[:, :3] for s in STATES]),
        {},
        ValueError,
        r"state h of shape \[4, 4, 6\], got \[4, 3, 6\]",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(net: FlexRNN, name: str) -> None:
    args, options, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        net(*args, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cell": tanh}, TypeError, "cell must be made by rnnfast.cell, got builtin"),
        ({"cell": again_locally}, TypeError, "cell must be made by rnnfast.cell, got function"),
        ({"input_size": 3.0}, TypeError, "input_size must be an int, got float"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero, got 0"),
        ({"num_heads": 4}, ValueError, "num_heads has to divide hidden_size"),
        ({"num_heads": 2, "recurrent": "diagonal"}, ValueError, "needs a dense recurrence"),
        ({"recurrent": "sparse"}, ValueError, "recurrent must be one of dense, diagonal, none, got 'sparse'"),
        ({"dropout": 1.5}, ValueError, "dropout should be a number in range"),
        ({"bias": 1}, TypeError, "bias must be a bool, got int"),
        ({"batch_first": "no"}, TypeError, "batch_first must be a bool, got str"),
        ({"bidirectional": 2}, TypeError, "bidirectional must be a bool, got int"),
        ({"recompute": "x"}, TypeError, "recompute must be a bool, got str"),
        ({"cell": cells.min_gru, "num_heads": 2}, ValueError, "cell min_gru has no W_hh to divide into heads"),
        ({"cell": cells.janet, "scalars": ["beta"]}, TypeError, "scalars have to be numbers by name"),
        ({"cell": cells.janet, "scalars": {"beta": None}}, TypeError, "scalars have to be numbers, got a NoneType"),
        ({"scalars": {"beta": 1.0}}, ValueError, r"cell slstm has no scalars \['beta'\], it has none"),
    ],
)
def test_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlexRNN(**{"cell": cells.slstm, "input_size": I, "hidden_size": H, **change})


@pytest.mark.parametrize("shape", [(24,), (6,), ()])
def test_weights_of_another_recurrence(shape: tuple[int, ...]) -> None:
    """Which the cell's own would else be taken for."""
    net = FlexRNN(cells.slstm, 4, 6)
    net.weight_hh_l0 = torch.nn.Parameter(torch.randn(shape))
    with pytest.raises(RuntimeError, match="weight_hh of a dense recurrence must be 2D or 3D"):
        net(torch.randn(3, 2, 4))
    net = FlexRNN(cells.slstm, 4, 6, recurrent="diagonal")
    net.weight_hh_l0 = torch.nn.Parameter(torch.randn(30))
    with pytest.raises(RuntimeError, match=r"weights of units, got \d+"):
        net(torch.randn(3, 2, 4))


def test_weights_with_names_of_others() -> None:
    cell = rnnfast.cell(gates="g", weights="hh")(lambda x, a, s, w: x.g * w.hh)
    with pytest.raises(ValueError, match="weights cannot be called"):
        FlexRNN(cell, I, H)


def test_the_readmes_cell_learns(tmp_path: Path) -> None:
    """Its listing as it stands there; one that learns nothing would stay at 10.5."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    script = tmp_path / "listing.py"
    script.write_text(readme.partition("## Cells of your own")[2].partition("```python\n")[2].partition("```")[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert runpy.run_path(str(script))["loss"] < 1
    finally:
        torch.set_num_threads(threads)
