"""Numbers and derivatives of every backend: all cells, sequence forms and dtypes, every output and every gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import BACKENDS
from helpers import (
    CASES,
    CELLS,
    FLOOR,
    FORMS,
    Problem,
    assert_off_by_twice_at_most,
    assert_same,
    layer,
    states_of,
    tensors_of,
    values_and_grads,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import cells, reference
from rnnfast.backends import INSTRUCTION_SETS
from rnnfast.cells import GATES, UNIT_WEIGHTS
from rnnfast.records import Inputs, names_of

DOUBLE = torch.float64
CPU_BACKENDS = [backend for backend in BACKENDS if backend.startswith("cpu")]
DTYPES = pytest.mark.parametrize("dtype", FLOOR, ids=lambda dtype: str(dtype)[6:])


def assert_near(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tensors_of(actual), tensors_of(expected), rtol=1e-11, atol=1e-13)


def row(hidden: Any, n: int) -> Any:
    """The state of one row, as a batch of its own."""
    return tuple(h[:, n : n + 1] for h in hidden) if isinstance(hidden, tuple) else hidden[:, n : n + 1]


@functools.cache
def solved(case: str, cell: str, form: str, dtype: torch.dtype) -> tuple[Problem, dict[str, Tensor], dict[str, Tensor]]:
    """A problem, its exact result in float64 and torch's in the dtype, once for all backends."""
    torch.manual_seed(0)
    problem = Problem(CASES[case], cell, form, dtype)
    return problem, problem.exact(), problem.baseline(dtype)


@pytest.mark.runs(lambda case, dtype: (dtype, CASES[case].batch, CASES[case].hidden, CASES[case].bidirectional))
@pytest.mark.few(3, "backend", "case", "cell", "form", "dtype")
@DTYPES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_torchs(backend: str, case: str, cell: str, form: str, dtype: torch.dtype) -> None:
    problem, exact, baseline = solved(case, cell, form, dtype)
    actual = problem.run(problem.module(rnnfast, dtype), dtype)
    assert_off_by_twice_at_most(actual, baseline, exact, dtype, FLOOR[dtype])


@pytest.mark.parametrize("form", ("rectangular", "packed"))
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", CASES)
def test_reference_is_torchs(case: str, cell: str, form: str) -> None:
    """The definition, tied to torch.nn in float64: the oracle of every other test here."""
    problem = Problem(CASES[case], cell, form)
    actual = problem.exact()
    expected = problem.run(problem.module(nn, DOUBLE), DOUBLE)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_are_each_row_alone(backend: str, cell: str) -> None:
    module = layer(cell, num_layers=2, bidirectional=True)
    lengths, x, hx = torch.tensor([3, 0, 7, 1, 7, 4]), torch.randn(7, 6, 4, dtype=DOUBLE), states_of(module, 6)
    y, hidden, states = module(x, hx, lengths=lengths, return_states=True)
    for n, length in enumerate(lengths.tolist()):
        if length == 0:  # an empty row yields zeros and keeps its state
            assert_near([row(hidden, n)], [row(hx, n)])
        else:
            y_n, hidden_n, states_n = module(x[:length, n : n + 1], row(hx, n), return_states=True)
            assert_near([y[:length, n : n + 1], row(hidden, n)], [y_n, hidden_n])
            assert_near([s[:, :length, n : n + 1] for s in tensors_of([states])], tensors_of([states_n]))
        assert not y[length:, n].any()
        assert not any(s[:, length:, n].any() for s in tensors_of([states]))


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("cell", CELLS)
def test_resets_are_each_episode_alone(backend: str, cell: str) -> None:
    """In a bidirectional stack; hx enters the forward direction at the start and the reverse one at the end."""
    module = layer(cell, num_layers=2, bidirectional=True)
    x, hx = torch.randn(8, 3, 4, dtype=DOUBLE, requires_grad=True), states_of(module, 3)
    borders = [(3, 4), (), (0, 7)]
    resets = torch.zeros(8, 3, dtype=torch.bool)
    for n, starts in enumerate(borders):
        resets[list(starts), n] = True
    y, hidden = module(x, hx, resets=resets)
    for n, starts in enumerate(borders):
        cuts = sorted({0, 8, *starts})
        for start, end in zip(cuts, cuts[1:]):
            own = [h.clone() for h in tensors_of([row(hx, n)])]
            for h in own:  # what of hx enters this episode
                if start or 0 in starts:
                    h[0::2] = 0
                if end < 8:
                    h[1::2] = 0
            y_n, hidden_n = module(x[start:end, n : n + 1], tuple(own) if module.mode == "LSTM" else own[0])
            assert_near([y[start:end, n : n + 1]], [y_n])
            for h, h_n in zip(tensors_of([row(hidden, n)]), tensors_of([hidden_n])):
                if end == 8:
                    assert_near([h[0::2]], [h_n[0::2]])
                if start == 0:
                    assert_near([h[1::2]], [h_n[1::2]])
            # the gradient is cut at the borders
            (dx,) = torch.autograd.grad(y[start:end, n].sum(), x, retain_graph=True)
            assert dx[start:end, n].any() and not dx[:start].any() and not dx[end:].any()


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("cell", CELLS)
def test_resets_with_lengths(backend: str, cell: str) -> None:
    module = layer(cell, bidirectional=True)
    x, lengths, resets = torch.randn(6, 4, 4, dtype=DOUBLE), torch.tensor([6, 2, 0, 4]), torch.rand(6, 4) < 0.5
    hx = states_of(module, 4)
    y, hidden = module(x, hx, lengths=lengths, resets=resets)
    for n, length in enumerate(lengths.tolist()):
        if length:
            y_n, hidden_n = module(x[:length, n : n + 1], row(hx, n), resets=resets[:length, n : n + 1])
            assert_near([y[:length, n : n + 1], row(hidden, n)], [y_n, hidden_n])
        assert not y[length:, n].any()


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("batch_first", (False, True), ids=("time-major", "batch-first"))
@pytest.mark.parametrize("cell", CELLS)
def test_return_states(backend: str, cell: str, batch_first: bool) -> None:
    """The states are those of each step's own run, and gradients flow through them."""
    module = layer(cell, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(5, 3, 4, dtype=DOUBLE, requires_grad=True)
    inputs = x.transpose(0, 1) if batch_first else x
    output, _, states = module(inputs, return_states=True)
    h, c = states if module.mode == "LSTM" else (states, None)
    out, hidden = module.proj_size or 5, 5
    leading = (2, 3, 5) if batch_first else (2, 5, 3)
    assert h.shape == (*leading, 2 * out) and (c is None or c.shape == (*leading, 2 * hidden))
    torch.testing.assert_close(h[1], output, rtol=0, atol=0)
    for t in range(1, 6):  # the forward direction's state after t steps is the h_n of a run of t steps
        _, h_n = module(inputs[:, :t] if batch_first else inputs[:t])
        h_n, c_n = h_n if module.mode == "LSTM" else (h_n, None)
        at = (slice(None), t - 1) if batch_first else (t - 1,)
        torch.testing.assert_close(h[0][at][..., :out], h_n[0], rtol=1e-11, atol=1e-13)
        if c is not None:
            torch.testing.assert_close(c[0][at][..., :hidden], c_n[0], rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        assert_near(module(inputs, return_states=True)[2], states)
    cotangents = [torch.randn_like(s) for s in tensors_of([states])]
    leaves = [x, *module.parameters()]
    actual = torch.autograd.grad(tensors_of([states]), leaves, cotangents)
    with rnnfast.use_backend("reference"):
        _, _, states = module(inputs, return_states=True)
        assert_near(actual, torch.autograd.grad(tensors_of([states]), leaves, cotangents))


@pytest.mark.runs(DOUBLE)
def test_return_states_packed_and_unbatched(backend: str) -> None:
    module = layer("lstm", num_layers=2)
    x = torch.randn(5, 3, 4, dtype=DOUBLE)
    lengths = torch.tensor([5, 3, 2])
    output, _, (h, c) = module(pack_padded_sequence(x, lengths), return_states=True)
    assert h.shape == c.shape == (2, 10, 5)
    torch.testing.assert_close(h[1], output.data, rtol=0, atol=0)
    padded = module(x, lengths=lengths, return_states=True)[2]
    for packed, expected in zip((h, c), padded):
        of_layer = [pad_packed_sequence(output._replace(data=p))[0] for p in packed]
        torch.testing.assert_close(torch.stack(of_layer), expected, rtol=1e-11, atol=1e-13)
    _, _, (h, c) = module(x[:, 0], return_states=True)
    assert h.shape == c.shape == (2, 5, 5)


@pytest.mark.runs(DOUBLE)
def test_lengths_zero_steps(backend: str) -> None:
    module = layer("lstm", bidirectional=True)
    hx = states_of(module, 2)
    y, hidden = module(torch.randn(0, 2, 4, dtype=DOUBLE), hx, lengths=torch.tensor([0, 0]))
    assert y.shape == (0, 2, 10)
    assert_near([hidden], [hx])


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(backend: str, cell: str) -> None:
    module = layer(cell, bidirectional=True)
    x = torch.randn(3, 0, 4, dtype=DOUBLE, requires_grad=True)
    y, _ = module(x)
    y.sum().backward()
    assert y.shape[:2] == (3, 0) and x.grad.shape == x.shape
    assert all(not p.grad.any() for p in module.parameters())


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("cell", CELLS)
def test_layouts_do_not_matter(backend: str, cell: str) -> None:
    """Transposed, sliced and expanded operands and gradients give the numbers of contiguous ones."""
    module = layer(cell, bidirectional=True)
    x = torch.randn(3, 6, 8, dtype=DOUBLE)[:, :, ::2].transpose(0, 1)
    hx = tuple(h[:, :1].expand(-1, 3, -1) for h in tensors_of([states_of(module, 3)]))
    hx = hx if module.mode == "LSTM" else hx[0]
    strided = {name: torch.randn(*p.shape, 2, dtype=DOUBLE)[..., 0] for name, p in module.named_parameters()}

    def run(as_given):
        leaves = [as_given(t).requires_grad_() for t in (x, *tensors_of([hx]), *strided.values())]
        states = tuple(leaves[1:3]) if module.mode == "LSTM" else leaves[1]
        values = dict(zip(strided, leaves[len(leaves) - len(strided) :]))
        y, h_n = functional_call(module, values, (leaves[0], states))
        cotangent = torch.randn(y.shape[-1], dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
        return [y, *tensors_of([h_n]), *torch.autograd.grad(y, leaves, as_given(cotangent.expand_as(y)))]

    assert_near(run(lambda t: t.detach()), run(lambda t: t.detach().clone(memory_format=torch.contiguous_format)))


@pytest.mark.few(2, "backend", "cell", "form")
@pytest.mark.full_on("triton")  # a hundred runs
@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_first_and_second_derivatives(backend: str, cell: str, form: str) -> None:
    module = layer(cell, 4, 2, bidirectional=True)
    x = torch.randn(3, 2, 2, dtype=DOUBLE)
    hx = tensors_of([states_of(module, 2)])
    extra = {"lengths": torch.tensor([3, 1])} if form == "lengths" else {}
    extra |= {"resets": torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.bool)} if form == "resets" else {}

    def run(x: Tensor, *rest: Tensor):
        hidden = tuple(rest[: len(hx)]) if module.mode == "LSTM" else rest[0]
        values = dict(zip((name for name, _ in module.named_parameters()), rest[len(hx) :]))
        inputs = pack_padded_sequence(x, torch.tensor([3, 2])) if form == "packed" else x
        y, h_n = functional_call(module, values, (inputs, hidden), extra)
        return (y.data if form == "packed" else y, *tensors_of([h_n]))

    leaves = [t.detach().requires_grad_() for t in (x, *hx, *module.parameters())]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    if backend != "triton" or form == "rectangular":  # plain torch's for every backend, and slow in an interpreter
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.full_on("triton")  # a hundred runs
@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("cell", CELLS)
def test_function_transforms(backend: str, cell: str) -> None:
    """grad, per-sample vmap(grad), ensembles and jacrev: each against a loop, or against plain torch."""
    module = layer(cell, 4, 3, bidirectional=True)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 3, 3, dtype=DOUBLE)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x,))[0].square().sum()

    def by_autograd(x: Tensor) -> list[Tensor]:
        module.zero_grad()
        module(x)[0].square().sum().backward()
        return [p.grad.clone() for p in module.parameters()]

    assert_near(list(grad(loss)(weights, x).values()), by_autograd(x))
    samples = vmap(grad(loss), in_dims=(None, 1))(weights, x)
    for n in range(3):
        assert_near([g[n] for g in samples.values()], by_autograd(x[:, n]))
    others = [layer(cell, 4, 3, bidirectional=True) for _ in range(2)]
    stacked, _ = stack_module_state(others)
    ensemble = vmap(lambda w: functional_call(module, w, (x,))[0])(stacked)
    for k, other in enumerate(others):
        torch.testing.assert_close(ensemble[k], other(x)[0])
    output, little = lambda x: module(x)[0], x[:2, :1]
    jacobian = jacrev(output)(little)
    with rnnfast.use_backend("reference"):
        torch.testing.assert_close(jacobian, jacrev(output)(little))
        torch.testing.assert_close(jacobian, jacfwd(output)(little))


@pytest.mark.parametrize("dim", range(3))
def test_vmap_along_any_dimension(dim: int) -> None:
    weights, x = [p.detach() for p in layer("lstm").parameters()], torch.randn(3, 3, 3, 4, dtype=DOUBLE)
    run = lambda x: rnnfast.functional.rnn("LSTM", x, None, weights)[0]
    assert_near(vmap(run, in_dims=dim)(x), torch.stack([run(x.select(dim, n)) for n in range(3)]))


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode(backend: str, cell: str) -> None:
    """Forward-mode derivatives are right beside every backend, and never silently zero."""
    module = layer(cell, 4, 3, bidirectional=True)
    x, tangent = torch.randn(2, 5, 2, 3, dtype=DOUBLE)
    _, derivative = jvp(lambda x: module(x)[0], (x,), (tangent,))
    epsilon = 1e-6
    difference = (module(x + epsilon * tangent)[0] - module(x - epsilon * tangent)[0]) / (2 * epsilon)
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-8)
    assert derivative.abs().max() > 1e-3


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _assert_equal_bits(
    cell: str, threads: Callable[[int], None], counts: tuple[int, ...], rows: int = 7, hidden: int = 40
) -> None:
    module, x = layer(cell, hidden, 9, torch.float32, bidirectional=True), torch.randn(11, rows, 9)
    found = []
    for count in counts:
        threads(count)
        inputs = x.clone().requires_grad_()
        outputs = tensors_of(module(inputs))
        found.append([*outputs, *torch.autograd.grad(outputs[0].square().sum(), [inputs, *module.parameters()])])
        assert all(map(torch.equal, found[0], found[-1]))


@pytest.mark.runs(torch.float32, 7, 40, True)
@pytest.mark.parametrize("cell", CELLS)
def test_runs_give_equal_bits(backend: str, cell: str, threads: Callable[[int], None]) -> None:
    """On one thread: but for `cpu` the products over the whole sequence are torch's, whose sums are its own affair."""
    _assert_equal_bits(cell, threads, (1, 1, 1))


@pytest.mark.runs(torch.float32, 7, 40, True)
@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("rows, hidden", [(7, 40), (2, 160)], ids=["rows-shared", "units-shared"])
@pytest.mark.parametrize("cell", CELLS)
def test_thread_counts_give_equal_bits(
    backend: str, cell: str, rows: int, hidden: int, threads: Callable[[int], None]
) -> None:
    """These kernels never split a sum over threads."""
    _assert_equal_bits(cell, threads, (1, 2, 3, 4, 5, 1), rows, hidden)


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("cell", CELLS)
def test_each_gradient_alone(backend: str, cell: str) -> None:
    """Of whichever input asks for one, and of no other."""
    module, x = layer(cell), torch.randn(3, 2, 4, dtype=DOUBLE)
    names = [name for name, _ in module.named_parameters()]
    values = [x, *tensors_of(states_of(module, 2)), *(p.detach() for p in module.parameters())]

    def outputs(*values: Tensor) -> Tensor:
        x, *hx = values[: len(values) - len(names)]
        weights = dict(zip(names, values[-len(names) :]))
        return functional_call(module, weights, (x, tuple(hx) if module.mode == "LSTM" else hx[0]))[0]

    leaves = [t.clone().requires_grad_() for t in values]
    expected = torch.autograd.grad(outputs(*leaves).square().sum(), leaves)
    for k, leaf in enumerate(leaves):
        (alone,) = torch.autograd.grad(outputs(*values[:k], leaf, *values[k + 1 :]).square().sum(), leaf)
        assert_near(alone, expected[k])


@pytest.mark.parametrize("cell", ("lstm", "projection"))
def test_second_derivatives_through_states(cell: str) -> None:
    module = layer(cell, 3, 2, bidirectional=True)
    x = torch.randn(3, 2, 2, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x, return_states=True)[2], x, fast_mode=True)


@pytest.mark.runs(lambda dtype: (dtype, 5))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_half_types_round_to_nearest(backend: str, dtype: torch.dtype) -> None:
    """Ties to even; of sums whose terms lie 0, 1/4, 1/2, 3/4 and 3/2 of a last place above 1."""
    module = layer("relu", 1, 2, dtype, bias=False)
    last = torch.finfo(dtype).eps
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.tensor([1, last / 4]) if weight.numel() == 2 else torch.zeros(1))
        above = torch.tensor([0, 1, 2, 3, 6], dtype=dtype)
        y, _ = module(torch.stack([torch.ones_like(above), above], 1).unsqueeze(0))
    assert y.flatten().tolist() == [1, 1, 1, 1 + last, 1 + 2 * last]


@pytest.mark.runs(lambda dtype: (dtype,))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_the_cell_state_of_a_half_type_is_float32(backend: str, dtype: torch.dtype) -> None:
    """Sixteen times an eighth of what it has room for beside 1."""
    module, eighth = layer("lstm", 1, 1, dtype), torch.finfo(dtype).eps / 8
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            open_gates = torch.tensor([20, 20, eighth, 20])  # c + tanh(eighth), a step
            parameter.copy_(open_gates if name == "bias_ih_l0" else torch.zeros_like(parameter))
        zero, one = torch.zeros(1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype)
        _, (_, c_n) = module(torch.zeros(16, 1, 1, dtype=dtype), (zero, one))
    assert c_n.item() == 1 + 16 * eighth


@pytest.mark.few(1, "backend", "cell")
@pytest.mark.runs(DOUBLE, 3, 5, True)
@pytest.mark.parametrize("cell", CELLS)
def test_what_lies_beyond_a_row_is_not_looked_at(backend: str, cell: str) -> None:
    module, lengths = layer(cell, 5, 4, bidirectional=True), torch.tensor([3, 0, 5])
    x = torch.randn(5, 3, 4, dtype=DOUBLE)
    finite = values_and_grads(module, x, lengths=lengths)
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    assert_same(values_and_grads(module, x, lengths=lengths), finite)


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("change", ("input", "weight", "output"))
def test_changing_a_saved_tensor_raises(backend: str, change: str) -> None:
    module, x = layer("lstm"), torch.randn(3, 2, 4, dtype=DOUBLE)
    y, _ = module(x)
    with torch.no_grad():
        {"input": x, "weight": module.weight_hh_l0, "output": y}[change].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.runs(lambda dtype: (dtype,))
@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", (torch.float32, DOUBLE))
def test_gate_functions_to_some_units_in_the_last_place(backend: str, dtype: torch.dtype) -> None:
    """Read off cells: h = tanh(x) of an RNN, and c = sigmoid(x) of an LSTM whose c_0 is 1 and whose candidate is 0."""
    far = torch.tensor([0, 9, 9.2, 86.9, 90, 1e4, 1e30, torch.nan], dtype=dtype)
    x = torch.cat([torch.linspace(0, 90, 200_003, dtype=dtype), torch.logspace(-30, 0, 5_001, dtype=dtype), far])
    x = torch.cat([x, -x]).view(1, -1, 1)
    zero, infinite = torch.zeros_like(x), torch.full((1, 1, 1), torch.inf, dtype=dtype)
    rnn, lstm = rnnfast.RNN(1, 1, bias=False, dtype=dtype), rnnfast.LSTM(1, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        for parameter in (*rnn.parameters(), *lstm.parameters()):
            parameter.zero_()
        rnn.weight_ih_l0[0] = lstm.weight_ih_l0[1] = 1
        h, c = rnn(x)[0], lstm(x, (zero, zero + 1))[1][1]
        assert rnn(infinite)[0] == 1 and rnn(-infinite)[0] == -1
    for actual, expected in ((h, x.double().tanh()), (c, x.double().sigmoid())):
        unit = expected.to(dtype).abs()
        unit = torch.nextafter(unit, unit + 1) - unit
        off = ((actual.double() - expected).abs() - torch.finfo(dtype).tiny * 2).clamp(min=0) / unit
        assert torch.equal(actual.isnan(), x.isnan()) and off.nan_to_num(0).max() <= 5


@pytest.mark.runs(torch.float32)
@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)  # others take minutes
def test_long_sequences(backend: str) -> None:
    """70,000 steps: beyond 16-bit step counts; in two halves the state carries over bit by bit."""
    module = layer("gru", 2, 1, torch.float32)
    x = torch.randn(70_000, 1, 1)
    y, h_n = module(x)
    first, h = module(x[:40_000])
    second, h = module(x[40_000:], h)
    assert torch.equal(y, torch.cat([first, second])) and torch.equal(h_n, h)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.few(2, "name", "cell", "form", "dtype")
@pytest.mark.parametrize("dtype", (DOUBLE, torch.bfloat16), ids=("float64", "bfloat16"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", sorted({backend.partition("-")[0] for backend in BACKENDS}))
def test_opcheck(name: str, cell: str, form: str, dtype: torch.dtype) -> None:
    module = layer(cell, dtype=dtype, bidirectional=True)
    x = torch.randn(3, 2, 4, dtype=dtype)
    hx = [h.to(dtype) for h in tensors_of(states_of(module, 2))]
    h0, c0 = hx if module.mode == "LSTM" else (hx[0], None)
    weights = [p.detach() for p in module.parameters()]
    batch_sizes = lengths = resets = None
    if form == "packed":
        x, batch_sizes = x.reshape(6, 4)[:5], torch.tensor([2, 2, 1])
    elif form == "lengths":
        lengths = torch.tensor([1, 3])
    elif form == "resets":
        resets = torch.rand(3, 2) < 0.5
    inputs = Inputs(
        module.mode, x, h0, c0, batch_sizes, lengths, resets, True, names_of(module.mode, len(weights) // 2), weights
    )
    forward = getattr(torch.ops.rnnfast, f"{name}_forward").default
    backward = getattr(torch.ops.rnnfast, f"{name}_backward").default
    y, h_n, c_n, c, gates = forward(*inputs, True, True)
    torch.library.opcheck(forward, (*inputs, True, True))
    fakes = {"test_utils": "test_faketensor"}  # the rest has been checked then
    torch.library.opcheck(forward, (*inputs._replace(h0=None, c0=None), False, False), **fakes)
    dy, dc = torch.randn_like(y), torch.randn_like(c) if module.mode == "LSTM" else None
    given = *inputs, dy, None, None, dc, y, c, gates
    torch.library.opcheck(backward, (*given, True, True))
    for needs in ((False, True), (True, False)):
        torch.library.opcheck(backward, (*given, *needs), **fakes)
    if name != "reference":
        torch.library.opcheck(getattr(torch.ops.rnnfast, f"{name}_gate_gradients").default, given, **fakes)
    if name == "cpu":
        stack = lambda of: torch.stack([of, of]) if isinstance(of, torch.Tensor) and of is not batch_sizes else of
        members = tuple([*map(stack, of)] if isinstance(of, list) else stack(of) for of in given)
        of_layer = members[: len(inputs)]
        torch.library.opcheck(torch.ops.rnnfast.cpu_forward_members.default, (*of_layer, True, True), **fakes)
        torch.library.opcheck(torch.ops.rnnfast.cpu_backward_members.default, (*members, True, True), **fakes)


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("mode", cells.CELLS)
def test_no_input_features(backend: str, mode: str) -> None:
    """The biases alone: weight_ih has no columns, yet every gradient is there."""
    rows = GATES[mode] * 5
    shapes = ((rows, 0), (rows, 5), (rows,), (rows,), *[(UNIT_WEIGHTS[mode] * 5,)] * (UNIT_WEIGHTS[mode] > 0))
    weights = [torch.randn(shape, dtype=DOUBLE, requires_grad=True) for shape in shapes]

    def gradients() -> tuple[Tensor, ...]:
        y, *_ = rnnfast.functional.rnn(mode, torch.randn(4, 3, 0, dtype=DOUBLE), None, weights)
        return torch.autograd.grad(y.square().sum(), weights)

    actual = gradients()
    with rnnfast.use_backend("reference"):
        assert_near(actual, gradients())


def test_opcheck_of_lengths() -> None:
    torch.library.opcheck(torch.ops.rnnfast.checked_lengths.default, (torch.tensor([0, 3, 2]), 3))


def test_instruction_sets() -> None:
    if not rnnfast.backends()["cpu"].available:
        pytest.fail("the native library is not built")
    torch.library.opcheck(torch.ops.rnnfast.cpu_isa.default, (None,))
    before = torch.ops.rnnfast.cpu_isa(None)
    for number in (-1, len(INSTRUCTION_SETS)):
        with pytest.raises(RuntimeError, match="lacks instruction set"):
            torch.ops.rnnfast.cpu_isa(number)
    assert torch.ops.rnnfast.cpu_isa(None) == before


def test_reference_cell_is_torchs() -> None:
    """One step of each cell against torch.nn's cells, from the same products."""
    h, c = torch.randn(2, 3, 5, dtype=DOUBLE)
    for mode, cls, options in (
        ("RNN_TANH", nn.RNNCell, {}),
        ("RNN_RELU", nn.RNNCell, {"nonlinearity": "relu"}),
        ("GRU", nn.GRUCell, {}),
        ("LSTM", nn.LSTMCell, {}),
    ):
        module, x = cls(4, 5, dtype=DOUBLE, **options), torch.randn(3, 4, dtype=DOUBLE)
        expected = module(x, (h, c) if mode == "LSTM" else h)
        products = (
            torch.nn.functional.linear(x, module.weight_ih, module.bias_ih),
            torch.nn.functional.linear(h, module.weight_hh, module.bias_hh),
        )
        actual = reference.cell(mode, *products, h, c if mode == "LSTM" else None)
        torch.testing.assert_close(actual, expected if mode == "LSTM" else (expected, None))


@pytest.mark.few(2, "backend", "cell", "form")
@pytest.mark.runs(torch.float32, CASES["H63"].batch, 63, True)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_recompute_keeps_outputs_only(backend: str, cell: str, form: str) -> None:
    """The same bits as without; what autograd keeps, beside inputs and weights, is y and an LSTM's c."""
    problem = Problem(CASES["H63"], cell, form)
    kept, results = {}, {}
    for recompute in (False, True):
        module = problem.module(rnnfast, torch.float32)
        module.recompute = recompute
        live = {t.untyped_storage().data_ptr() for t in module.parameters()}
        sizes: dict[int, int] = {}

        def pack(t: Tensor, live=live, sizes=sizes) -> Tensor:
            if t.untyped_storage().data_ptr() not in live:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results[recompute] = problem.run(module, torch.float32)
        kept[recompute] = sum(sizes.values())
    for name, value in results[True].items():
        assert torch.equal(value, results[False][name]), name
    y = results[True]["output"]
    rows, directions = y.numel() // y.size(-1), 2
    c = rows * directions * problem.case.hidden * 4 if problem.is_lstm else 0
    inputs = sum(results[True][name].numel() * 4 for name in results[True] if name.startswith("d x"))
    weights_of_the_loss = 3 * y.numel() * 4  # of this test's projection of the outputs, and lengths and resets
    assert kept[True] <= y.numel() * 4 + c + inputs + weights_of_the_loss
    saves_gates = backend != "reference" and cell not in ("tanh", "relu")
    gates = rows * directions * 4 * problem.case.hidden * 4 if saves_gates else 0
    assert kept[False] - kept[True] == gates


def test_recompute_is_an_option_of_the_constructor() -> None:
    assert "recompute=True" in repr(rnnfast.GRU(3, 4, recompute=True))
    assert not rnnfast.LSTM(3, 4).recompute
    with pytest.raises(TypeError, match="recompute"):
        nn.LSTM(3, 4, recompute=True)
