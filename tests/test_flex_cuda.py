"""The CUDA kernels of cells of which no other backend has any, under the host emulation; and which layers get them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import EMULATION, PERSISTENT, REGIMES, Size, regime, serves
from helpers import FLOOR, choose, tensors_of, values_and_grads
from test_cuda import computed, error
from test_flex import OF_FORM, N, T
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast import FlexRNN, cells, codegen, contest
from rnnfast.cells import CELLS

emulated = pytest.mark.skipif(EMULATION is None, reason="there is a GPU: test_gpu_flex.py runs the kernels")
OWN = [of.name for mode, of in cells.MODES.items() if mode not in CELLS]
CUDA = torch.device("cuda", 0)
DOUBLE = torch.float64
I, H = 3, 37


def layer(cell: str, hidden: int = H, **options: Any) -> FlexRNN:
    return FlexRNN(getattr(cells, cell), I, hidden, **options)


def test_those_that_the_kernels_can_run() -> None:
    """All of rnnfast.cells with a dense W_hh, gates that x and a have alike, and no states but h and c."""
    fit = [
        name
        for name, of in vars(cells).items()
        if isinstance(of, cells.Cell)
        and of.states in (["h"], ["h", "c"])
        and of.gates_of_a == list(range(len(of.gates)))
    ]
    assert sorted(fit) == sorted([*OWN, *(of.name for of in CELLS.values())])
    assert {name: getattr(cells, name).twin for name in fit} == {name: name.upper() for name in fit}


def test_a_scalar_is_a_weight_of_units() -> None:
    assert "kUnitWeights = 1, kColumns = 3" in codegen._cpp_cell(cells.MODES["JANET"])
    x, a = torch.randn(2, 2, 3, 4, dtype=DOUBLE)
    h, beta = torch.randn(3, 4, dtype=DOUBLE), torch.tensor(0.7, dtype=DOUBLE)
    expected = cells.janet.step(x, a, [h], [beta])
    torch.testing.assert_close(cells.MODES["JANET"].step(x, a, [h], [beta.expand(4)]), expected)


def test_refuses_to_print() -> None:
    @rnnfast.cell(gates="a b c d e")
    def five_gates(x: Any, a: Any, s: Any) -> Any:
        return torch.tanh(x.a + a.a) + torch.tanh(x.b + a.b) * (x.c + a.c) * (x.d + a.d) * (x.e + a.e)

    for of, message in ((five_gates, "no room for 5 gates"), (cells.slstm, "no room for states h c n m")):
        with pytest.raises(NotImplementedError, match=message):
            codegen._cpp_cell(of)


# Numbers


@emulated
@pytest.mark.few(2, "name", "cell", "form")
@pytest.mark.parametrize("form", OF_FORM)
@pytest.mark.parametrize("cell", OWN)
@pytest.mark.parametrize("name", REGIMES[1:])
def test_values_and_gradients(name: str, cell: str, form: str) -> None:
    net, x = layer(cell, bidirectional=True, num_layers=2), torch.randn(T, N, I)
    assert name not in PERSISTENT or serves(name, cell, Size(torch.float32, N, H, True))
    with regime(name):
        actual = computed(net, x, **OF_FORM[form])
    assert error(actual, computed(net.double(), x.double(), "reference", **OF_FORM[form])) < 8 * FLOOR[torch.float32]


@emulated
@pytest.mark.parametrize("cell", OWN)
def test_states_given_and_asked_for(cell: str) -> None:
    """In float64, also of packed sequences."""
    net, x = layer(cell, dtype=DOUBLE), torch.randn(T, N, I, dtype=DOUBLE)
    states = tuple(torch.randn(1, N, H, dtype=DOUBLE) for _ in net.cell.states)
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 1, 4]), enforce_sorted=False)
    for input in (x, packed):
        found = []
        for name in ("cuda", "reference"):
            with rnnfast.use_backend(name):
                found.append(list(values_and_grads(net, input, states, return_states=True).values()))
        assert error(*found) < 100 * FLOOR[DOUBLE]


@emulated
@pytest.mark.parametrize("cell", ["cifg", "ligru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype: torch.dtype, cell: str) -> None:
    net, x = layer(cell, dtype=dtype), torch.randn(T, N, I, dtype=dtype)
    for name in (*PERSISTENT, "stepwise"):
        with regime(name):
            actual = computed(net.to(dtype), x)
        assert error(actual, computed(net.double(), x.double(), "reference")) < 4 * FLOOR[dtype], name


@emulated
@pytest.mark.parametrize("cell", OWN)
def test_second_derivatives(cell: str) -> None:
    net, x = layer(cell, 2, dtype=DOUBLE), torch.randn(3, 2, I, dtype=DOUBLE, requires_grad=True)
    with rnnfast.use_backend("cuda"):
        assert torch.autograd.gradgradcheck(lambda x: tuple(tensors_of(net(x))), (x,), fast_mode=True)


@emulated
@pytest.mark.parametrize("cell", OWN)
def test_recomputed_is_kept(cell: str) -> None:
    net, x = layer(cell, num_layers=2), torch.randn(T, N, I)
    again = layer(cell, num_layers=2, recompute=True)
    again.load_state_dict(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(computed(net, x), computed(again, x)))


@emulated
@pytest.mark.parametrize("cell", ["cifg", "janet"])
def test_in_graphs_and_transforms(cell: str) -> None:
    """As torch's cells are, not as the loop that other cells are there."""
    net, x = layer(cell), torch.randn(T, N, I)
    weights = {name: torch.stack([w.detach(), 2 * w.detach()]) for name, w in net.named_parameters()}
    with rnnfast.use_backend("cuda"):
        torch._dynamo.reset()
        found = torch.compile(net, fullgraph=True, backend="aot_eager")(x)[0]
        torch.testing.assert_close(found, net(x)[0], rtol=0, atol=0)
        program = torch.export.export(net, (x,)).module()
        torch.testing.assert_close(program(x)[0], net(x)[0], rtol=0, atol=0)
        each = torch.vmap(lambda of: torch.func.functional_call(net, of, (x,))[0])(weights)
        torch.testing.assert_close(each[0], net(x)[0])


@emulated
def test_scalars_are_the_layers() -> None:
    net, other, x = layer("leaky_rnn"), layer("leaky_rnn", scalars={"leak": 0.8}), torch.randn(T, N, I)
    other.load_state_dict(net.state_dict())
    with regime("by the table"):
        found = computed(other, x)
        assert error(computed(net, x), found) > 1e-2
    assert error(found, computed(other, x, "reference")) < 8 * FLOOR[torch.float32]


@emulated
def test_a_users_cell_with_a_weight_for_a_scalar() -> None:
    @rnnfast.cell(gates="new", states="y", weights="rate")
    def leaks(x: Any, a: Any, s: Any, w: Any) -> Any:
        return (1 - w.rate) * s.y + w.rate * torch.tanh(x.new + a.new)

    assert leaks.twin == "LEAKY_RNN"
    net, x = FlexRNN(leaks, I, H), torch.randn(T, N, I)
    with regime("by the table"):
        found = computed(net, x)
    assert error(found, computed(net, x, "reference")) < 8 * FLOOR[torch.float32]


@emulated
def test_a_check_sees_no_kink() -> None:
    """What is run beside a call has no units at which rounding picks the gradient."""
    net = layer("ligru")
    options = {"num_layers": 1, "bidirectional": False, "dropout": 0.0, "training": True, "batch_sizes": None}
    options |= {"lengths": None, "resets": None, "return_states": False, "recompute": False}
    call = contest.Call("LIGRU", torch.randn(T, N, I), [], [w.detach() for w in net.parameters()], options)
    x, *weights = call.twin().tensors
    assert (x >= 0).all() and all((w[::2] >= 0).all() and (w[1::2] <= 0).all() for w in weights)
    with regime("by the table"):
        assert contest.fault(call, "cuda", N, False, False) is None


# Which layers get them


@emulated
def test_explain_names_the_kernel() -> None:
    with rnnfast.use_backend("cuda"):
        (found,) = rnnfast.explain(layer("cifg"))
        assert found.backend == "cuda" and found.reason.startswith(
            "cluster: W_hh stays on 3 multiprocessors, 8 rows on"
        )
    assert "evaluator" in rnnfast.explain(layer("cifg"))[0].reason  # on a CPU only where it is asked for


def test_a_gpu_gets_cuda(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((9, 0), library=True)
    monkeypatch.setattr(torch.ops.rnnfast, "cuda_plan", lambda *args: f"of a test: {args[0]}")
    monkeypatch.setattr("rnnfast.triton.flex.reason", lambda *args: "of a test")
    of_triton = "triton", "cuda has no kernels of such a layer, Triton compiles it: of a test"
    backend_of = lambda cell, dtype=torch.float32, **options: layer(cell, 40, **options)._backend(CUDA, dtype)
    for cell in OWN:
        assert backend_of(cell) == ("cuda", f"of a test: {cell.upper()}")
        for options in ({"num_heads": 2}, {"recurrent": "diagonal"}, {"recurrent": "none"}, {"zoneout": 0.1}):
            assert backend_of(cell, **options) == of_triton
        with rnnfast.use_backend("triton"):
            assert backend_of(cell) == ("triton", "Triton compiles it: of a test")
        with rnnfast.use_backend("cuda"):
            assert backend_of(cell)[0] == "cuda"
        with rnnfast.use_backend("reference"):
            assert backend_of(cell)[0] == "reference"
        assert backend_of(cell, torch.complex64)[0] == "reference"
    for cell in ("slstm", "sru", "indrnn", "min_gru"):
        assert backend_of(cell) == of_triton
    half = {cell: backend_of(cell, torch.bfloat16)[0] for cell in OWN}  # which would round the scalars
    assert half == {cell: "triton" if getattr(cells, cell).scalars else "cuda" for cell in OWN}
    gpus((9, 0))
    assert backend_of("cifg") == ("triton", "Triton compiles it: of a test")


def test_other_backends_have_none() -> None:
    """By whatever way they are asked."""
    net, x = layer("janet"), torch.randn(T, N, I)
    weights = [*net.parameters(), torch.ones(H)]
    expected = net(x)[0]
    assert choose("JANET", torch.device("cpu"), torch.float32) == ("reference", "cpu has no kernels of JANET")
    torch.testing.assert_close(rnnfast.functional.rnn("JANET", x, None, weights)[0], expected)
    inputs = "JANET", x, None, None, None, None, None, False, "w_ih w_hh b_ih b_hh w_units", weights, False, False
    for name, why in (("cpu", "no cell "), ("triton", "triton has no kernels of JANET")):
        if rnnfast.backends()[name].available:
            with rnnfast.use_backend(name), pytest.raises(RuntimeError, match=f"{name} has no kernels of JANET"):
                rnnfast.functional.rnn("JANET", x, None, weights)
            with pytest.raises(RuntimeError, match=why):
                getattr(torch.ops.rnnfast, f"{name}_forward")(*inputs)
