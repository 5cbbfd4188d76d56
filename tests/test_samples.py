"""vmap over samples and over the weights of an ensemble: numbers, and how often kernels run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS
from helpers import CELLS, FORMS, layer, tensors_of
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import rnnfast
from rnnfast import samples
from rnnfast.ops import OPERATORS
from rnnfast.records import Inputs, names_of

DOUBLE = torch.float64
T, N, I, H, B = 5, 2, 3, 4, 3
LENGTHS = torch.tensor([[5, 3], [0, 4], [2, 1]])
PACKED = torch.tensor([2, 2, 2, 1, 1])  # 8 rows


def assert_near(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tensors_of(actual), tensors_of(expected), rtol=1e-10, atol=1e-12)


def stacked(of: list[Any]) -> list[Tensor]:
    """What is the same place in each, as one tensor."""
    return [torch.stack(tensors) for tensors in zip(*map(tensors_of, of))]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss_of_output(module: nn.Module) -> Callable[..., Tensor]:
    return lambda weights, x: functional_call(module, weights, (x,))[0].square().sum()


def problem(cell: str, form: str, hx: bool) -> tuple[Callable[..., Tensor], list[Tensor], list[Tensor], Tensor | None]:
    """A loss of weights, x, states and what the form needs; a single one of each but the weights is of B samples."""
    module = layer(cell, H, I, bidirectional=True)
    mode, weights = module.mode, [p.detach() for p in module.parameters()]
    P = module.proj_size or H
    states = [torch.randn(B, 2, N, width, dtype=DOUBLE) for width in ((P, H) if mode == "LSTM" else (P,)) if hx]
    rows = (PACKED.sum(),) if form == "packed" else (T, N)
    x = torch.randn(B, *rows, I, dtype=DOUBLE)
    extra = {"lengths": LENGTHS, "resets": torch.rand(B, T, N) < 0.4}.get(form)

    def loss(weights: list[Tensor], x: Tensor, states: list[Tensor], extra: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"batch_sizes": PACKED} if form == "packed" else {}
        options |= {} if extra is None else {form: extra}
        hx = states or None
        y, h_n, c_n, _ = rnnfast.functional.rnn(mode, x, hx, weights, bidirectional=True, **options)
        return y.square().sum() + h_n.pow(3).sum() + 2 * c_n.square().sum()

    return loss, weights, [x, *states], extra


@pytest.mark.few(2, "cell", "form", "hx", "backend")
@pytest.mark.runs(DOUBLE, B * N, H, True)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_samples(backend: str, cell: str, form: str, hx: bool) -> None:
    """Of the weights, of x and of the states; lengths and resets are the samples' own."""
    loss, weights, (x, *states), extra = problem(cell, form, hx)
    derive = grad(loss, (0, 1, 2))
    found = vmap(derive, (None, 0, 0 if states else None, None if extra is None else 0))(weights, x, states, extra)
    each = [derive(weights, x[b], [s[b] for s in states], None if extra is None else extra[b]) for b in range(B)]
    assert_near(tensors_of(found), stacked(each))


@pytest.mark.runs(DOUBLE, B * N, H, True)
def test_lengths_that_all_samples_share(backend: str) -> None:
    loss, weights, (x,), _ = problem("gru", "lengths", False)
    derive = lambda x: grad(loss)(weights, x, [], LENGTHS[0])
    assert_near(tensors_of(vmap(derive)(x)), stacked([derive(of) for of in x]))


@pytest.mark.runs(DOUBLE, B * N, H)
def test_peephole_weights(backend: str) -> None:
    names = names_of("PEEPHOLE_LSTM", 5)
    shapes = {"w_ih": (4 * H, I), "w_hh": (4 * H, H), "b_ih": (4 * H,), "b_hh": (4 * H,), "w_units": (3 * H,)}
    weights = [torch.randn(shapes[name], dtype=DOUBLE) for name in names.split()]
    loss = lambda weights, x: rnnfast.functional.rnn("PEEPHOLE_LSTM", x, None, weights)[0].square().sum()
    x = torch.randn(B, T, N, I, dtype=DOUBLE)
    found = vmap(grad(loss), (None, 0))(weights, x)
    assert_near(found, stacked([grad(loss)(weights, of) for of in x]))


@pytest.mark.runs(lambda dtype: (dtype, 40, 20, True))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")], indirect=True)
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    """Off by some roundings of a few sums; more rows and units than a vector or a block has."""
    module = layer("projection", 20, 9, dtype, bidirectional=True)
    x = torch.randn(40, 7, 2, 9).to(dtype)
    found = vmap(grad(loss_of_output(module)), (None, 0))(weights_of(module), x)
    exact = {name: of.double() for name, of in weights_of(module).items()}
    expected = vmap(grad(loss_of_output(module.double())), (None, 0))(exact, x.double())
    for name, of in expected.items():
        error = (found[name].double() - of).abs().max() / of.abs().max()
        assert found[name].dtype == dtype and error < 64 * torch.finfo(dtype).eps, name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each operator has run."""
    found: Counter = Counter()

    def counted(name: str, operator: Any) -> Callable[..., Any]:
        return lambda *args: found.update([name]) or operator(*args)

    for key, operator in OPERATORS.items():
        monkeypatch.setitem(OPERATORS, key, counted(key[1], operator))
    return found


@pytest.mark.few(1, "backend", "cell")
@pytest.mark.runs(DOUBLE, B * N, H)
@pytest.mark.parametrize("cell", CELLS)
def test_samples_run_at_once(backend: str, cell: str, calls: Counter) -> None:
    module, x = layer(cell, H, I), torch.randn(B, T, N, I, dtype=DOUBLE)
    weights = weights_of(module)
    vmap(grad(loss_of_output(module)), (None, 0))(weights, x)
    assert calls == ({"forward": 1} if backend == "reference" else {"forward": 1, "gate_gradients": 1})
    calls.clear()
    vmap(grad(loss_of_output(module), 1), (None, 0))(weights, x)  # which need no products
    vmap(lambda x: module(x)[0])(x)
    assert calls == {"forward": 2, "backward": 1}
    calls.clear()
    jacrev(lambda x: module(x)[0].sum(0))(x[0])
    assert calls == {"forward": 1, "backward": 1}


@pytest.mark.few(1, "backend", "cell")
@pytest.mark.runs(DOUBLE, B * N, H, True)
@pytest.mark.parametrize("cell", CELLS)
def test_members_of_an_ensemble(backend: str, cell: str) -> None:
    """With x of all, and each with its own."""
    members = [layer(cell, H, I, bidirectional=True) for _ in range(B)]
    weights, _ = stack_module_state(members)
    loss, x = loss_of_output(members[0]), torch.randn(B, T, N, I, dtype=DOUBLE)
    each = [weights_of(member) for member in members]
    assert_near(vmap(grad(loss), (0, None))(weights, x[0]), stacked([grad(loss)(of, x[0]) for of in each]))
    assert_near(vmap(grad(loss))(weights, x), stacked([grad(loss)(of, own) for of, own in zip(each, x)]))
    run = lambda weights, x: functional_call(members[0], weights, (x,))
    assert_near(vmap(run)(weights, x), stacked([run(of, own) for of, own in zip(each, x)]))


@pytest.mark.full_on("triton")
@pytest.mark.few(2, "backend", "cell", "form")
@pytest.mark.runs(DOUBLE, B * N, H, True)
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_forms_of_members(backend: str, cell: str, form: str, own: bool, calls: Counter) -> None:
    """Gradients of the weights, x and states, with x, states, lengths and resets of each member or of all."""
    loss, weights, (x, *states), extra = problem(cell, form, own)
    weights = [torch.stack([weight, weight.flip(0), -weight]) for weight in weights]
    if not own:
        x, extra = x[0], None if extra is None else extra[0]
    at = lambda b: ([w[b] for w in weights], *((x[b], [s[b] for s in states]) if own else (x, [])))
    extras = [extra[b] if own and extra is not None else extra for b in range(B)]
    axes = 0, 0 if own else None, 0 if states else None, 0 if own and extra is not None else None
    derive = grad(loss, (0, 1, 2))
    each = stacked([derive(*at(b), extras[b]) for b in range(B)])
    calls.clear()
    assert_near(tensors_of(vmap(derive, axes)(weights, x, states, extra)), each)
    if backend.startswith("cpu"):
        assert calls == {"forward_members": 1, "backward_members": 1}
    # And by autograd, outside of the vmap; what all share gets the sum.
    inputs = [t.requires_grad_() for t in (*weights, x, *states)]
    outside = torch.autograd.grad(vmap(loss, axes)(weights, x, states, extra).sum(), inputs)
    assert_near(outside, [of if of.shape == leaf.shape else of.sum(0) for of, leaf in zip(each, inputs)])


@pytest.mark.few(1, "backend")
@pytest.mark.runs(DOUBLE, 2 * B * N, H)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_derivatives_of_members(backend: str, cell: str) -> None:
    """Jacobians, which are another vmap over the backward, and second derivatives, on both sides of the vmap."""
    members = [layer(cell, H, I) for _ in range(2)]
    weights, _ = stack_module_state(members)
    own, x = [weights_of(member) for member in members], torch.randn(T, N, I, dtype=DOUBLE)
    run = lambda weights, x: functional_call(members[0], weights, (x,))[0].flatten()[:3]
    assert_near(vmap(jacrev(run, (0, 1)), (0, None))(weights, x), stacked([jacrev(run, (0, 1))(of, x) for of in own]))
    loss = loss_of_output(members[0])
    penalty = lambda weights, x: sum(of.pow(3).sum() for of in tensors_of(grad(loss, (0, 1))(weights, x)))
    expected = stacked([grad(penalty)(of, x) for of in own])
    assert_near(vmap(grad(penalty), (0, None))(weights, x), expected)
    assert_near(grad(lambda of: vmap(penalty, (0, None))(of, x).sum())(weights), expected)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_members_on_threads(count: int) -> None:
    """As many at a time as there are threads, and what is left by all."""
    members = [layer("gru", H, I) for _ in range(count)]
    weights, _ = stack_module_state(members)
    derive, x = grad(loss_of_output(members[0])), torch.randn(T, N, I, dtype=DOUBLE)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = vmap(derive, (0, None))(weights, x)
    finally:
        torch.set_num_threads(threads)
    assert_near(found, stacked([derive(weights_of(member), x) for member in members]))


def test_malformed_members() -> None:
    x, weights = torch.randn(2, T, N, I), [torch.randn(2, H, I), torch.randn(2, H, H)]
    inputs = Inputs("RNN_TANH", x, None, None, None, None, None, False, "w_ih w_hh", weights)
    forward, backward = OPERATORS["cpu", "forward_members"], OPERATORS["cpu", "backward_members"]
    y, *_, c, gates = forward(*inputs, False, True)
    with pytest.raises(RuntimeError, match="x has to begin with a dimension of members"):
        forward(*inputs._replace(x=x[:0]), False, True)
    fewer = [weights[0], weights[1][:1]]
    with pytest.raises(RuntimeError, match="each tensor but batch_sizes has to begin with a dimension of 2 members"):
        forward(*inputs._replace(weights=fewer), False, True)
    with pytest.raises(RuntimeError, match=r"h0 has shape \[2, 4\], expected \[1, 2, 4\]"):
        forward(*inputs._replace(h0=torch.randn(2, 2, H)), False, True)
    with pytest.raises(RuntimeError, match="each tensor but batch_sizes has to begin with a dimension of 2 members"):
        backward(*inputs, y[:1], None, None, None, y, c, gates, True, True)
    with pytest.raises(RuntimeError, match="lengths have to be between 0 and 5"):
        forward(*inputs._replace(lengths=torch.tensor([[1, 2], [1, 6]])), False, True)


@pytest.mark.few(1, "backend", "order")
@pytest.mark.runs(DOUBLE, 2 * B * N, H)
@pytest.mark.parametrize("order", ["samples of members", "members of samples", "samples of samples"])
def test_nested(backend: str, order: str, calls: Counter) -> None:
    """Each member's samples run at once, whichever vmap is the outer one."""
    members = [layer("lstm", H, I) for _ in range(2)]
    weights, _ = stack_module_state(members)
    derive, x = grad(loss_of_output(members[0])), torch.randn(2, B, T, N, I, dtype=DOUBLE)
    own = [weights_of(member) for member in members]
    if order == "samples of members":
        found = vmap(vmap(derive, (None, 0)), (0, None))(weights, x[0])
        each = [stacked([derive(of, sample) for sample in x[0]]) for of in own]
    elif order == "members of samples":
        found = vmap(vmap(derive, (0, None)), (None, 0))(weights, x[0])
        each = [stacked([derive(of, sample) for of in own]) for sample in x[0]]
    else:
        found = vmap(vmap(derive, (None, 0)), (None, 0))(own[0], x)
        each = [stacked([derive(own[0], sample) for sample in samples]) for samples in x]
    assert_near(found, stacked(each))
    runs = 1 if order == "samples of samples" else 2
    looped = len(x.flatten(0, 1)) if order == "samples of samples" else 2 * B
    at_once = backend.startswith("cpu") and order == "samples of members"  # rows of samples, in the forward of members
    assert calls["forward"] - looped == (0 if at_once else runs) and calls["forward_members"] == at_once
    assert calls["gate_gradients"] == (0 if backend == "reference" else runs)


@pytest.mark.full_on("triton")
@pytest.mark.few(1, "backend", "form")
@pytest.mark.runs(DOUBLE, B * N, H, True)
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(backend: str, form: str) -> None:
    """Of a penalty on the gradients of samples, alone and below another vmap."""
    loss, weights, (x, *states), extra = problem("projection", form, True)
    axes = (None, 0, 0, None if extra is None else 0)

    def penalty(weights: list[Tensor], x: Tensor, states: list[Tensor], each: Callable[..., Any]) -> Tensor:
        return sum(of.pow(3).sum() for of in tensors_of(each(weights, x, states, extra)))

    def one_by_one(weights: list[Tensor], x: Tensor, states: list[Tensor], extra: Tensor | None) -> list[Any]:
        own = [None] * B if extra is None else extra
        return [grad(loss, (0, 1))(weights, x[b], [s[b] for s in states], own[b]) for b in range(B)]

    at_once = vmap(grad(loss, (0, 1)), axes)
    first, second = (grad(penalty, (0, 1, 2))(weights, x, states, each) for each in (at_once, one_by_one))
    assert_near(first, second)


@pytest.mark.few(1, "backend", "sizes")
@pytest.mark.runs(DOUBLE, B * N, H)
@pytest.mark.parametrize("sizes", [(B, 0, N), (B, T, 0)], ids=["steps", "rows"])
def test_sizes_of_zero(backend: str, sizes: tuple[int, int, int]) -> None:
    module, lengths = layer("lstm", H, I), torch.zeros(B, sizes[2], dtype=torch.long)
    weights, x = weights_of(module), torch.randn(*sizes, I, dtype=DOUBLE)
    loss = lambda weights, x, lengths: functional_call(module, weights, (x,), {"lengths": lengths})[0].square().sum()
    found = vmap(grad(loss), (None, 0, 0))(weights, x, lengths)
    for name, of in found.items():
        assert torch.equal(of, torch.zeros(B, *weights[name].shape, dtype=DOUBLE))


def test_no_samples() -> None:
    module = rnnfast.GRU(I, H)
    none, x = {name: of.new_empty(0, *of.shape) for name, of in weights_of(module).items()}, torch.randn(T, N, I)
    with pytest.raises(ValueError, match="vmap is over a dimension of size 0"):
        vmap(lambda x: module(x)[0])(torch.randn(0, T, N, I))
    with pytest.raises(ValueError, match="vmap is over a dimension of size 0"):
        vmap(grad(loss_of_output(module)), (0, None))(none, x)


@pytest.mark.few(1, "backend", "cell")
@pytest.mark.runs(DOUBLE, 8 * N, H)
@pytest.mark.parametrize("cell", CELLS)
def test_jacobians_in_parts(backend: str, cell: str, calls: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is copied for so many of their rows at a time as there is memory to spare: of one, at least."""
    module, x = layer(cell, H, I), torch.randn(T, N, I, dtype=DOUBLE)
    weights, run = weights_of(module), lambda weights, x: functional_call(module, weights, (x,))[0].flatten()[:8]
    expected = jacrev(run, (0, 1))(weights, x)
    calls.clear()
    for most, runs in ((1, 8), (2**20, 1)):
        monkeypatch.setattr(samples, "_MOST_COPIED", most)
        assert_near(jacrev(run, (0, 1))(weights, x), expected)
        assert calls["backward" if backend == "reference" else "gate_gradients"] == (
            0 if backend == "reference" else runs
        )
        calls.clear()
    monkeypatch.setattr(samples, "_MOST_COPIED", 1)
    assert_near(vmap(jacrev(run, (0, 1)), (None, 0))(weights, x.expand(2, -1, -1, -1)), stacked([expected] * 2))
