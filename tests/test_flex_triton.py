"""Triton's kernels around cells of one's own: how a step is printed and found again, what compiles, what serves whom.

Their numbers are tested with those of every other backend, in test_flex.py.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import interpreter
import pytest
import torch
from helpers import FLOOR, assert_off_by_twice_at_most, chooser, flatten, values_and_grads
from test_flex import DOUBLE, OF_FORM, SPECIAL, again, assert_same_or_zero, states_of
from test_means import layer, normalized
from test_triton import H200, ROOT, compiled

import rnnfast
from rnnfast import FlexRNN, cells
from rnnfast.cells import PRIMITIVES, Cell
from rnnfast.evaluator import Plan
from rnnfast.triton import flex

CUDA = torch.device("cuda", 0)
interpreted = pytest.mark.skipif(not interpreter.ENABLED, reason="runs kernels on a CPU")


@pytest.mark.full
@pytest.mark.parametrize(
    ("target", "cell"), [*itertools.product(("sm_80", "sm_90", "sm_100", "gfx942"), ["slstm"]), ("sm_90", "lstm_norm")]
)
def test_the_largest_cells_compile_without_spills(target: str, cell: str) -> None:
    """The command fails if it spills; bench/results/flex-resources.txt has all cells, which take minutes."""
    lines = compiled("bench/flex_resources.py", "--target", target, "-k", f"{cell} fused").splitlines()
    found = [line.split()[1] for line in lines if line.startswith(target)]
    dtypes = 1 if target.startswith("gfx") else 3  # there is no other than float32, and nowhere fused float64
    assert sorted(found) == ["backward"] * dtypes + ["forward"] * dtypes


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.full)])
def test_calls_compile(target: str) -> None:
    """What layers' calls launch, as Triton specialises it."""
    assert " 0 fail" in compiled("tests/named_gpu.py", target, "--flex")


# How a step is printed.


def of_program(function: Callable[..., Any], x: torch.Tensor, **options: Any) -> torch.Tensor:
    """A step of a cell without recurrence, of its gates [X, units] and states of zero."""
    gates = list("pqr"[: len(x)])
    cell = rnnfast.cell(gates=gates, **options)(function)
    x = x[cell.gates_of_x]
    plan = Plan(cell, tuple(cell.scalars.values()), False)
    every, _ = flex.run(plan, *[None] * 3, x.flatten().view(1, 1, -1), *[None] * 4, torch.zeros_like(x[:1]))
    return every[0, 0]


@interpreted
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, of infinities
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("name", sorted(PRIMITIVES.keys() - {"where_positive", "mean"}))
def test_operations(name: str, dtype: torch.dtype) -> None:
    """Each to 8 units in the last place, as torch's, of all pairs of values; but a tanh of float64 to those of 1."""
    values = torch.tensor(SPECIAL, dtype=dtype)
    x = torch.stack([v.flatten() for v in torch.meshgrid(values, values, indexing="ij")])
    operation = lambda *args: cells._primitive(name, *args)
    if name in ("less", "less_equal"):
        function = lambda x, a, s: cells.where(operation(x.p, x.q), x.p, x.q)
        expected = torch.where(PRIMITIVES[name].on_tensors(*x), *x)
    elif name == "where":
        function = lambda x, a, s: cells.where(x.p < 0, x.p, x.q)
        expected = torch.where(x[0] < 0, *x)
    else:
        arity = PRIMITIVES[name].on_tensors.__code__.co_argcount
        function = lambda x, a, s: operation(*[x.p, x.q][:arity])
        expected = PRIMITIVES[name].on_tensors(*x[:arity])
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    floor = 2 * eps if name == "tanh" and dtype == DOUBLE else 4 * tiny
    torch.testing.assert_close(of_program(function, x), expected, rtol=8 * eps, atol=floor, equal_nan=True)


@interpreted
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_numbers_have_all_their_digits_and_signs() -> None:
    x = torch.tensor([[-1.0, 0.0, 1.0]], dtype=DOUBLE)
    tenth = lambda x, a, s: cells.where(x.p < 0, 0.1, cells.maximum(x.p, -0.1)) + 1e-300
    assert of_program(tenth, x).tolist() == [0.1, 1e-300, 1.0]
    infinite = lambda x, a, s: cells.where(x.p < 0, 1 / (0.0 * x.p), cells.where(x.p > 0, float("-inf"), x.p * -0.0))
    found = of_program(infinite, x)
    assert found.tolist()[::2] == [-float("inf"), -float("inf")] and found.signbit().tolist()[1]
    assert of_program(lambda x, a, s: -x.p, x).signbit().tolist() == [False, True, True]


@interpreted
def test_a_cell_of_a_thousand_operations() -> None:
    """Neither Python's recursion nor its brackets end it."""

    def function(x: Any, a: Any, s: Any) -> Any:
        y = x.p
        for _ in range(1100):
            y = 0.5 * (y + x.p)
        return y

    x = torch.tensor([[1.0, -2.0]], dtype=DOUBLE)
    assert torch.equal(of_program(function, x), x[0])


def test_printed_steps_stay() -> None:
    """Triton reads a function's lines when it compiles it, whatever has emptied Python's memory of files."""
    step, _ = flex.steps_of(cells.cifg)
    linecache.checkcache()
    assert "sigmoid" in inspect.getsource(step.fn)
    assert flex.steps_of(again(cells.cifg))[0] is not step
    assert flex._module(flex.sources(cells.cifg)[0]).step is step


def test_another_process_prints_the_same() -> None:
    """So Triton finds what it has compiled."""
    code = "from rnnfast import cells; from rnnfast.triton import flex; print(*flex.sources(cells.slstm), sep='')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout == "".join(flex.sources(cells.slstm)) + "\n"


# What a layer does with them.


LARGE = {"step by step": "a launch and a product a step", "shared": "all steps in one launch"}
OF_ROWS = "a launch and a product a step, by programs that have whole rows for their means"


@interpreted
@pytest.mark.parametrize(
    ("cell", "way"), [*itertools.product((cells.slstm, again(cells.gru)), LARGE), (normalized, "rows")], ids=str
)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("form", OF_FORM)
@pytest.mark.few(2, "cell", "heads", "form", "way")
def test_heads_that_are_too_large_for_the_chip(
    cell: Cell, heads: int, form: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch a step; and programs that share a head, which here wait for no other, but have a launch a step, too.

    Means are of all heads' units, more than a program has in other launches of a step.
    """
    how = flex.How(True, 16, 2, flex.Products(DOUBLE), {}, depth=16) if way == "shared" else None
    monkeypatch.setattr(flex, "_chip", lambda device: H200._replace(shared_memory=0))
    monkeypatch.setattr(flex, "_shared", lambda *args: how)
    hidden = {"shared": 40, "rows": 150}.get(way, 6)  # several programs, parts of products and tiles of rows
    net = FlexRNN(cell, 3, hidden, num_heads=heads, bidirectional=True, dtype=DOUBLE)
    x, states = torch.randn(5, 4, 3, dtype=DOUBLE), states_of(cell, hidden)
    expected = values_and_grads(net, x, states, **OF_FORM[form])
    with rnnfast.use_backend("triton"):
        assert rnnfast.explain(net)[0].reason.endswith(LARGE.get(way, OF_ROWS))
        assert_same_or_zero(values_and_grads(net, x, states, **OF_FORM[form]), expected)
        with torch.no_grad():
            y = net(x, states, **OF_FORM[form])[0]
    torch.testing.assert_close(y, expected["output[0]"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_how_heads_are_shared(dtype: torch.dtype) -> None:
    """All programs of a launch run at once, read little, and have room; where that cannot be, a launch is a step."""
    products = flex.Products.of(dtype, torch.device("cpu"))  # the interpreter's H200
    assert products == (dtype, "tf32" if dtype == torch.float32 else "ieee")  # as torch's default is
    for gates, width, heads, rows in itertools.product((1, 3, 4, 6), (256, 300, 1024, 2048), (1, 4), (1, 64, 500)):
        how = flex.choose(gates, width * heads, width, rows, products, H200)
        programs = heads * -(-width // how.units) * -(-rows // how.rows)
        assert how.fused == bool(how.depth) or gates * width**2 * dtype.itemsize <= H200.room
        if how.depth:
            assert programs <= H200.processors and how.options["launch_cooperative_grid"]
            assert how.options["num_stages"] * how.depth * (gates * how.units + how.rows) * dtype.itemsize < 200 * 1024
    assert flex.choose(4, 1024, 1024, 64, products, H200)[1:3] == (16, 32)
    assert flex.choose(4, 1024, 1024, 8, products, H200)[1:3] == (16, 8)
    assert not flex.choose(4, 1024, 1024, 500, products, H200).fused
    assert not flex.choose(4, 1024, 1024, 8, products, H200._replace(generation=0)).fused  # AMD's
    assert not flex.choose(4, 1024, 1024, 8, flex.Products(torch.float64), H200).fused


@interpreted
def test_other_scalars_are_no_other_kernel() -> None:
    x = torch.randn(3, 2, 3, dtype=DOUBLE)
    for scalars in ({}, {"beta": 0.25}):
        net = FlexRNN(cells.janet, 3, 4, dtype=DOUBLE, scalars=scalars)
        for beta in (net.scalars["beta"], -3.0):
            net.scalars["beta"] = beta
            expected = values_and_grads(net, x)
            with rnnfast.use_backend("triton"):
                assert_same_or_zero(values_and_grads(net, x), expected)


@interpreted
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_what_pads_a_tile_is_nothing() -> None:
    """A unit that is not there is infinite here, and so are its gradients."""

    @rnnfast.cell(gates="g k")
    def inverse(x: Any, a: Any, s: Any) -> Any:
        return 1 / (x.g * x.g + a.g * a.g) + a.k / (x.g * x.g) + cells.mean(1 / (x.k * x.g))

    net, x = FlexRNN(inverse, 3, 5, bias=False, dtype=DOUBLE), 1 + torch.rand(3, 2, 3, dtype=DOUBLE)
    net.weight_ih_l0.data.abs_()
    expected = values_and_grads(net, x)
    assert all(t.isfinite().all() for t in expected.values())
    with rnnfast.use_backend("triton"):
        assert_same_or_zero(values_and_grads(net, x), expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "heads"), [("LSTM", 1), ("GRU", 1), ("RNN", 2)])
def test_layer_norm_is_as_exact_as_in_plain_torch(name: str, heads: int, dtype: torch.dtype) -> None:
    """Against float64 ours may be off by twice what the loop is in the same precision."""
    exact = layer(name, 20, zoneout=0.3, num_heads=heads, bidirectional=True).eval().to(dtype).double()
    x, form = torch.randn(5, 4, 3).to(dtype), OF_FORM["lengths"] | OF_FORM["resets"]
    found = []
    for backend, of in ("triton", dtype), ("reference", dtype), ("reference", DOUBLE):
        with rnnfast.use_backend(backend):
            found.append(values_and_grads(copy.deepcopy(exact).to(of), x.to(of), **form))
    assert_off_by_twice_at_most(*found, dtype, FLOOR[dtype])


@interpreted
def test_second_derivatives() -> None:
    net = FlexRNN(cells.mgu, 2, 2, bias=False, dtype=DOUBLE)
    x = torch.randn(3, 2, 2, dtype=DOUBLE, requires_grad=True)
    with rnnfast.use_backend("triton"):
        assert torch.autograd.gradgradcheck(lambda x: net(x)[0], (x,), fast_mode=True)


@interpreted
@pytest.mark.parametrize("recurrent", ["dense", "none"])
def test_sizes_of_zero(recurrent: str) -> None:
    net = FlexRNN(cells.lstm, 3, 4, 2, recurrent=recurrent, num_heads=2 if recurrent == "dense" else 1, dtype=DOUBLE)
    x, given = torch.randn(2, 3, 3, dtype=DOUBLE), tuple(torch.rand(2, 3, 4, dtype=DOUBLE) for _ in "hc")
    calls = [(x[:, :0], None, {}), (x[:0], given, {"lengths": torch.zeros(3, dtype=torch.long)})]
    calls += [(x, given, {"lengths": torch.zeros(3, dtype=torch.long)})]
    for x, states, options in calls:
        expected = values_and_grads(net, x, states, **options)
        with rnnfast.use_backend("triton"):
            assert_same_or_zero(values_and_grads(net, x, states, **options), expected)


@interpreted
def test_tensors_in_other_layouts() -> None:
    """States that are parts of others, gradients that are one number, inference and training."""
    net = FlexRNN(cells.lstm, 3, 4, num_heads=2, dtype=DOUBLE)
    x, states = torch.randn(3, 2, 3, dtype=DOUBLE), torch.randn(1, 4, 2, 2, dtype=DOUBLE).mT.unbind(2)
    states = tuple(state.transpose(1, 2).reshape(1, 4, 2).mT for state in states)
    assert not states[0].is_contiguous()
    found = []
    for name in ("reference", "triton"):
        with rnnfast.use_backend(name), torch.no_grad():
            inference = [t for _, t in flatten(net(x, states))]
        with rnnfast.use_backend(name):
            y, after = net(x, states)
            gradients = torch.autograd.grad(y.sum() + after[1].sum(), list(net.parameters()))
        found.append([*inference, *gradients])
    torch.testing.assert_close(*found)


# Which backend serves.


def test_a_gpu_gets_triton(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((9, 0))
    monkeypatch.setattr(flex, "_chip", lambda device: H200)
    net = FlexRNN(cells.janet, 3, 4)
    backend, why = net._backend(CUDA, torch.float16)
    assert backend == "triton"
    assert why == "Triton compiles it: all steps in one launch"
    assert FlexRNN(cells.janet, 3, 9000)._backend(CUDA, torch.float32)[1].endswith(": a launch and a product a step")
    for batch, way in ((64, "all steps in one launch"), (5000, "a launch and a product a step")):
        assert FlexRNN(cells.janet, 3, 1024)._backend(CUDA, torch.float32, batch)[1].endswith(way)
    for options in ({}, {"num_heads": 10}, {"recurrent": "none"}, {"recurrent": "diagonal"}):
        assert FlexRNN(cells.janet, 3, 400, **options)._backend(CUDA, torch.float32)[1].endswith("in one launch")
    of_rows = FlexRNN(normalized, 3, 400)
    assert of_rows._backend(CUDA, torch.float32)[1].endswith(OF_ROWS)
    assert FlexRNN(normalized, 3, 128)._backend(CUDA, torch.bfloat16)[1].endswith(": all steps in one launch")
    backend, why = FlexRNN(normalized, 3, 5000)._backend(CUDA, torch.float32)
    assert backend == "reference" and "means over a row, of which Triton's kernels have 4096 units at most" in why
    assert net._backend(CUDA, torch.complex64) == ("reference", "no kernel for torch.complex64")
    assert net._backend(torch.device("mps"), torch.float32) == ("reference", "no kernels for device 'mps'")
    with rnnfast.use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' cannot serve.*device 'cpu'"):
        net(torch.randn(3, 2, 3))
    with rnnfast.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' cannot serve.*device 'cuda'"):
        net._backend(CUDA, torch.float32)
    gpus((9, 0), library=True)
    net = FlexRNN(cells.slstm, 3, 4)
    with rnnfast.use_backend("cuda"):
        assert net._backend(CUDA, torch.float32)[0] == "triton"
    monkeypatch.setattr(chooser, "_HAS_TRITON", False)
    assert net._backend(CUDA, torch.float32) == ("reference", "Triton is not installed")


@interpreted
def test_explain() -> None:
    with rnnfast.use_backend("triton"):
        (choice,) = rnnfast.explain(FlexRNN(cells.slstm, 3, 4))
    assert (choice.backend, choice.reason) == ("triton", "Triton compiles it: all steps in one launch")
