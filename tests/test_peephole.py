"""The peephole LSTM, which torch does not have: a cell of cells.py like any other, against its paper's equations."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS
from torch import Tensor

import rnnfast
from rnnfast import functional
from rnnfast.records import Inputs

DOUBLE = torch.float64
MODE = "PEEPHOLE_LSTM"
T, N, I, H = 6, 4, 3, 7
FORMS = ("rectangular", "packed", "lengths", "resets")


def make(dtype: torch.dtype, proj: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor], list[Tensor]]:
    """Input, states and the weights of both directions."""
    P = proj or H
    shapes = [(4 * H, I), (4 * H, P), (4 * H,), (4 * H,), *([(P, H)] if proj else []), (3 * H,)]
    new = lambda *shape: torch.randn(shape, dtype=dtype).requires_grad_()
    return new(T, N, I), (new(2, N, P), new(2, N, H)), [new(*shape) for shape in shapes * 2]


def of_paper(
    x: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], lengths: Tensor, resets: Tensor
) -> list[Tensor]:
    """Output, h_n and c_n, row by row; a reset ends what comes before it in either direction."""
    each, outputs, finals = len(weights) // 2, [], []
    for d in (0, 1):
        w_ih, w_hh, b_ih, b_hh, *w_hr, w_units = weights[d * each : (d + 1) * each]
        w_i, w_f, w_o = w_units.chunk(3)
        rows = []
        for n in range(N):
            h, c = (state[d, n] for state in hx)
            y = [torch.zeros_like(h)] * T
            steps = range(int(lengths[n]))
            for t in reversed(steps) if d else steps:
                border = t + d
                if border < lengths[n] and resets[border, n]:
                    h, c = torch.zeros_like(h), torch.zeros_like(c)
                i, f, g, o = (w_ih @ x[t, n] + b_ih + w_hh @ h + b_hh).chunk(4)
                i, f = torch.sigmoid(i + w_i * c), torch.sigmoid(f + w_f * c)
                c = f * c + i * torch.tanh(g)
                h = torch.sigmoid(o + w_o * c) * torch.tanh(c)
                h = w_hr[0] @ h if w_hr else h
                y[t] = h
            rows.append((torch.stack(y), h, c))
        outputs.append(torch.stack([y for y, _, _ in rows], 1))
        finals.append([torch.stack(states) for states in list(zip(*rows))[1:]])
    h_n, c_n = map(torch.stack, zip(*finals))
    return [torch.cat(outputs, 2), h_n, c_n]


def run(form: str, x: Tensor, hx: tuple[Tensor, Tensor], weights: list[Tensor], **kwargs) -> list[Tensor]:
    """The same by the layer, of a form of the sequence."""
    of_form = {}
    if form == "packed":
        x = torch.cat([x[t, :size] for t, size in enumerate(SIZES.tolist())])
        of_form = {"batch_sizes": SIZES}
    elif form != "rectangular":
        of_form = {form: {"lengths": LENGTHS, "resets": RESETS}[form]}
    y, h_n, c_n, _ = functional.rnn(MODE, x, hx, weights, bidirectional=True, **of_form, **kwargs)
    if form == "packed":
        padded = y.new_zeros(T, N, y.shape[1])
        for t, rows in enumerate(y.split(SIZES.tolist())):
            padded = torch.cat(
                [padded[:t], torch.nn.functional.pad(rows, (0, 0, 0, N - len(rows)))[None], padded[t + 1 :]]
            )
        y = padded
    return [y, h_n, c_n]


LENGTHS = torch.tensor([2, 6, 0, 5])
SIZES = torch.tensor([4, 4, 3, 3, 1, 1])
RESETS = torch.rand(T, N, generator=torch.Generator().manual_seed(1)) < 0.3


def expected(form: str, *inputs) -> list[Tensor]:
    full, none = torch.full((N,), T), torch.zeros(T, N, dtype=torch.bool)
    lengths = {"packed": (SIZES[:, None] > torch.arange(N)).sum(0), "lengths": LENGTHS}.get(form, full)
    return of_paper(*inputs, lengths, RESETS if form == "resets" else none)


def assert_as_the_paper(form: str, dtype: torch.dtype, proj: int | None = None, **kwargs) -> None:
    x, hx, weights = make(dtype, proj)
    leaves = [x, *hx, *weights]
    right, ours = expected(form, x, hx, weights), run(form, x, hx, weights, **kwargs)
    gradients = [torch.randn_like(t) for t in right]
    bounds = {"rtol": 1e-10, "atol": 1e-12} if dtype == DOUBLE else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(ours, right, **bounds)
    actual, of_paper = (torch.autograd.grad(outputs, leaves, gradients) for outputs in (ours, right))
    torch.testing.assert_close(actual, of_paper, **bounds)


@pytest.mark.runs(lambda dtype: (dtype, N, H, True))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["float64", "float32"])
def test_values_and_gradients(backend: str, dtype: torch.dtype, form: str) -> None:
    assert_as_the_paper(form, dtype)


@pytest.mark.runs(DOUBLE)
@pytest.mark.parametrize("form", FORMS)
def test_with_a_projection(backend: str, form: str) -> None:
    assert_as_the_paper(form, DOUBLE, proj=3)


# Steps, rows and units: of full vectors and of parts, more rows than are added up at once, and few enough for products
# that pack nothing.
SIZED = {"wide": (3, 5, 40), "long": (33, 5, 9), "few-rows": (2, 1, 24)}
TOLERATED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the largest value


@pytest.mark.few(2, "backend", "dtype", "size")
@pytest.mark.runs(lambda dtype, size: (dtype, *SIZED[size][1:], True))
@pytest.mark.parametrize("size", SIZED)
@pytest.mark.parametrize("dtype", TOLERATED, ids=str)
def test_sizes_and_dtypes(backend: str, dtype: torch.dtype, size: str) -> None:
    steps, rows, hidden = SIZED[size]
    of_direction = [(4 * hidden, I), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,), (3 * hidden,)]
    shapes = [(steps, rows, I), (2, rows, hidden), (2, rows, hidden), *of_direction * 2]
    given = [(torch.randn(shape) * (shape[-1] ** -0.5 if k > 2 else 1)).to(dtype) for k, shape in enumerate(shapes)]

    def computed(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in given]
        outputs = functional.rnn(MODE, leaves[0], leaves[1:3], leaves[3:], bidirectional=True)[:3]
        generator = torch.Generator().manual_seed(1)
        gradients = [torch.randn(t.shape, generator=generator).to(given[0].dtype).to(dtype) for t in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]

    with rnnfast.use_backend("reference"):
        expected = computed(DOUBLE)
    for actual, exact in zip(computed(dtype), expected, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - exact).abs().max() <= TOLERATED[dtype] * exact.abs().max()


@pytest.mark.runs(DOUBLE)
def test_recomputed(backend: str) -> None:
    assert_as_the_paper("lengths", DOUBLE, recompute=True)


@pytest.mark.runs(DOUBLE)
def test_gradcheck(backend: str) -> None:
    """First derivatives by finite differences, and second ones."""
    x, hx, weights = make(DOUBLE)
    inputs = [t.detach()[..., :2].contiguous().requires_grad_() for t in (x[:2, :2], hx[0][:, :2], hx[1][:, :2])]
    small = [torch.randn(shape, dtype=DOUBLE).requires_grad_() for shape in [(8, 2), (8, 2), (8,), (8,), (6,)] * 2]

    def function(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return functional.rnn(MODE, x, (h, c), weights, bidirectional=True)[:3]

    assert torch.autograd.gradcheck(function, (*inputs, *small), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (*inputs, *small), fast_mode=True)


def test_weights_are_asked_for() -> None:
    x, hx, weights = make(torch.float32)
    with pytest.raises(RuntimeError, match="got 9 weights for 1 layer"):
        functional.rnn(MODE, x, hx, weights[:-1], bidirectional=True)
    with pytest.raises(RuntimeError, match=r"weight_units has shape \[14\], expected \[21\]"):
        functional.rnn(MODE, x, hx, [*weights[:4], weights[4][:14]] * 2, bidirectional=True)
    other_cell = pytest.raises(
        RuntimeError, match="backend 'torch' cannot serve this call: torch's kernels know neither"
    )
    with other_cell, rnnfast.use_backend("torch"):
        functional.rnn(MODE, x, hx, weights, bidirectional=True)


@pytest.mark.parametrize("name", sorted({backend.partition("-")[0] for backend in BACKENDS}))
def test_opcheck(name: str) -> None:
    x, hx, weights = make(DOUBLE)
    inputs = Inputs(MODE, x, *hx, None, LENGTHS, None, True, "w_ih w_hh b_ih b_hh w_units", weights)
    inputs = Inputs.of_flat([t.detach() if isinstance(t, Tensor) else t for t in inputs.flat()])
    forward, backward = (getattr(torch.ops.rnnfast, f"{name}_{way}").default for way in ("forward", "backward"))
    y, _, _, c, gates = forward(*inputs, True, True)
    torch.library.opcheck(forward, (*inputs, True, True))
    torch.library.opcheck(backward, (*inputs, torch.randn_like(y), None, None, None, y, c, gates, True, True))
