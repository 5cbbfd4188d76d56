"""What a GPU alone shows of cells of one's own and of the layers' options: the numbers of what Triton compiles."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import PERSISTENT, regime
from helpers import LAYERS, assert_off_by_twice_at_most, values_and_grads
from test_flex import OF_TORCH, AsTorchs, again, with_zeros
from test_gpu import PRECISIONS, assert_close, assert_equal, tf32
from test_means import normalized
from test_variants import FLEX, own_lstm
from torch import Tensor

import rnnfast
from rnnfast import FlexRNN, cells
from rnnfast.triton import flex

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
T, N, I = 7, 20, 5
# Hidden units and options of a layer: all steps in one launch, where W_hh or a head's stays on the chip, where programs
# share a head, and where units know nothing of each other; and a launch a step.
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "fused": (64, {}),
    "heads": (192, {"num_heads": 3}),
    "shared": (300, {}),
    "shared-heads": (640, {"num_heads": 2}),
    "diagonal": (300, {"recurrent": "diagonal"}),
    "stepwise": (300, {}),
}
ANEW = {name: again(getattr(cells, name)) for name in ("lstm", "gru", "peephole_lstm")}
OWN = ("cifg", "relu_lstm", "slstm", "janet", "mgu", "ligru", "indrnn", "sru", "min_gru", "min_lstm", "leaky_rnn")
ZOO = ANEW | {name: getattr(cells, name) for name in OWN} | {"normalized": normalized}
# sLSTM has operations of all kinds, peephole_lstm weights of the units' own, and normalized means over rows, for which
# programs share no head: where others would, a launch is a step.
CHOSEN = [(of, "float32", size, "rectangular") for of in ZOO for size in ("fused", "shared", "stepwise")]
CHOSEN += [(of, "float32", size, form) for of in ("gru", "slstm") for size in SIZES for form in ("lengths", "resets")]
CHOSEN += [
    (name, dtype, size, form)
    for name, form in (("lstm", "rectangular"), ("slstm", "both"), ("peephole_lstm", "both"), ("normalized", "both"))
    for size in ("fused", "shared", "shared-heads", "stepwise")
    for dtype in PRECISIONS
    if dtype != "float32"
]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    found = rnnfast.backends()["triton"]
    if not found.available:
        pytest.skip(f"triton: {found.detail}")
    with rnnfast.use_backend("triton"), tf32(False):
        yield
    torch._dynamo.reset()


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stepwise":
        monkeypatch.setattr(flex, "_shared", lambda *args: None)
    return request.param


def of_form(form: str, steps: int = T, rows: int = N) -> dict[str, Tensor]:
    lengths, resets = (torch.arange(rows) % (steps + 1)).to(DEVICE), torch.rand(steps, rows, device=DEVICE) < 0.3
    given = {"rectangular": {}, "lengths": {"lengths": lengths}, "resets": {"resets": resets}}
    return given[form] if form in given else given["lengths"] | given["resets"]


def states_of(cell: cells.Cell, hidden: int, dtype: torch.dtype, rows: int) -> tuple[Tensor, ...]:
    """Random, and for a normaliser positive, as it is in any step but the first."""
    made = [(name, torch.randn(1, rows, hidden, device=DEVICE)) for name in cell.states]
    return tuple((state.abs() + 0.5 if name == "n" else state).to(dtype) for name, state in made)


def assert_is_near(
    cell: str, precision: str, hidden: int, form: str, steps: int = T, rows: int = N, **options: Any
) -> None:
    """Against float64 ours may be off by twice what a loop in plain torch is in the same precision, plus the floor."""
    dtype, allowed, floor = PRECISIONS[precision]
    torch.manual_seed(0)
    net = FlexRNN(ZOO[cell], I, hidden, device=DEVICE, dtype=dtype, **options)
    x = torch.randn(steps, rows, I, device=DEVICE, dtype=dtype)
    states, given = states_of(ZOO[cell], hidden, dtype, rows), of_form(form, steps, rows)
    with tf32(allowed):
        actual = values_and_grads(net, x, states, **given)
        with torch.no_grad():
            inferred = net(x, states, **given)[0]
        with rnnfast.use_backend("reference"):
            baseline = values_and_grads(net, x, states, **given)
    with rnnfast.use_backend("reference"):
        exact = values_and_grads(net.double(), x.double(), tuple(state.double() for state in states), **given)
    assert_close([inferred], [actual["output[0]"]], floor)
    exact, baseline = ({name: t.cpu() for name, t in with_zeros(of, actual).items()} for of in (exact, baseline))
    assert_off_by_twice_at_most(actual, baseline, exact, dtype, 2 * floor)


@pytest.mark.parametrize("cell, precision, size, form", CHOSEN, indirect=["size"])
def test_error_is_at_most_twice_torchs(cell: str, precision: str, size: str, form: str) -> None:
    hidden, options = SIZES[size]
    assert_is_near(cell, precision, hidden, form, **options)


OF_CUDA = [of.name for mode, of in cells.MODES.items() if mode not in cells.CELLS]
BY_CUDA = [(of, "float32", hidden, form) for of in OF_CUDA for hidden in (40, 300) for form in ("rectangular", "both")]
BY_CUDA += [(of, "float64", 300, "both") for of in OF_CUDA]
# Not of those with relu, at whose kink rounding picks the gradient.
BY_CUDA += [(of, "tf32", 300, "both") for of in ("cifg", "janet", "mgu", "leaky_rnn")]
BY_CUDA += [
    (of, dtype, hidden, "both") for of in ("cifg", "mgu") for dtype in ("bfloat16", "float16") for hidden in (40, 300)
]
BY_CUDA += [("mgu", "bfloat16", hidden, "rectangular") for hidden in (1000, 3000)]


@pytest.fixture
def cuda() -> Iterator[None]:
    """The CUDA kernels in place of Triton's."""
    if not rnnfast.backends()["cuda"].available:
        pytest.skip("the CUDA library is not there")
    with rnnfast.use_backend("cuda"):
        yield


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("cell, precision, hidden, form", BY_CUDA)
def test_cells_of_cudas_own(cell: str, precision: str, hidden: int, form: str) -> None:
    """In the regimes that the plan chooses: on a multiprocessor, in a cluster, on the chip, step by step."""
    (found,) = rnnfast.explain(FlexRNN(ZOO[cell], I, hidden, device=DEVICE, dtype=PRECISIONS[precision][0]))
    assert found.backend == "cuda"
    assert_is_near(cell, precision, hidden, form)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", PERSISTENT)
@pytest.mark.parametrize("cell", OF_CUDA)
def test_cells_of_cudas_own_in_each_regime(cell: str, name: str) -> None:
    """And again, which gives equal bits."""
    net, x = FlexRNN(ZOO[cell], I, 40, device=DEVICE), torch.randn(T, N, I, device=DEVICE)
    with regime(name):
        assert_is_near(cell, "float32", 40, "both")
        first, second = (list(values_and_grads(net, x).values()) for _ in range(2))
    assert_equal(first, second)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("cell", OF_CUDA)
def test_cudas_kernels_serve_unasked(cell: str) -> None:
    """They pass the check of their first call."""
    net, x = FlexRNN(ZOO[cell], I, 40, device=DEVICE), torch.randn(T, N, I, device=DEVICE)
    found, (explained,) = contextvars.Context().run(lambda: (values_and_grads(net, x), rnnfast.explain(net, x)))
    assert explained.backend == "cuda"
    assert_equal(list(found.values()), list(values_and_grads(net, x).values()))


@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("hidden, rows", [(300, 64), (300, 130), (1024, 64), (512, 200)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tiles_of_shared_heads(precision: str, hidden: int, rows: int, steps: int) -> None:
    """Of 16 to 64 rows, by four warps and by eight."""
    assert_is_near("slstm", precision, hidden, "both", steps, rows)


def test_what_runs(size: str) -> None:
    hidden, options = SIZES[size]
    (found,) = rnnfast.explain(FlexRNN(ANEW["lstm"], I, hidden, device=DEVICE, **options))
    assert found.backend == "triton"
    assert found.reason.endswith("a launch and a product a step" if size == "stepwise" else "all steps in one launch")


@pytest.mark.parametrize("hidden", [40, 300])
@pytest.mark.parametrize("name", OF_TORCH)
def test_torchs_cells_written_anew(name: str, hidden: int) -> None:
    """Stacks of both directions: off by twice what cuDNN is, at most."""
    options = {"num_layers": 2, "bidirectional": True, "device": DEVICE}
    theirs, ours = getattr(torch.nn, name)(I, hidden, **options), AsTorchs(name, I, hidden, **options)
    ours.net.load_state_dict(theirs.state_dict())
    x = torch.randn(T, N, I, device=DEVICE)
    actual = {name.replace("net.", ""): t for name, t in values_and_grads(ours, x).items()}
    baseline = values_and_grads(theirs, x)
    exact = {k: t.cpu() for k, t in values_and_grads(theirs.double(), x.double()).items()}
    assert_off_by_twice_at_most(actual, baseline, exact, torch.float32, 2 * PRECISIONS["float32"][2])


def test_in_a_graph(size: str) -> None:
    hidden, options = SIZES[size]
    net, x = FlexRNN(cells.slstm, I, hidden, device=DEVICE, **options), torch.randn(T, N, I, device=DEVICE)
    with torch.no_grad():
        expected = net(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = net(x)[0]
        found.zero_()
        graph.replay()
    assert_equal([found], [expected])


def test_compiled_is_eager(size: str) -> None:
    hidden, options = SIZES[size]
    net, x = FlexRNN(cells.slstm, I, hidden, device=DEVICE, **options), torch.randn(T, N, I, device=DEVICE)
    expected = values_and_grads(net, x)
    with rnnfast.use_backend("reference"):  # compiled it is the loop
        found = values_and_grads(torch.compile(net, fullgraph=True), x)
    assert_close(list(found.values()), list(expected.values()))


def test_second_derivatives() -> None:
    net = FlexRNN(cells.slstm, 2, 3, device=DEVICE, dtype=torch.float64)
    x = torch.randn(3, 2, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: net(x)[0], (x,), fast_mode=True)


# Options: random numbers are torch's, and so the same in every backend


@pytest.mark.parametrize("hidden", [24, 300])
@pytest.mark.parametrize("option", FLEX)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "FlexRNN"])
def test_options(name: str, option: str, hidden: int) -> None:
    of, options = getattr(rnnfast, name), dict(FLEX[option])
    if name == "FlexRNN":
        of = lambda *args, **kwargs: FlexRNN(own_lstm, *args, **kwargs)
    elif name != "LSTM" and isinstance(options.get("zoneout"), tuple):
        options["zoneout"] = options["zoneout"][0]
    net = of(I, hidden, num_layers=2, bidirectional=True, device=DEVICE, **options)
    x, given = torch.randn(T, N, I, device=DEVICE), of_form("both")
    found = list(values_and_grads(net, x, **given).values())
    with rnnfast.use_backend("reference"):
        expected = list(values_and_grads(net, x, **given).values())
    assert_close(found, expected, scale=5e-5)


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3, "state_clip": 0.05, "num_heads": 2}], ids=str)
@pytest.mark.parametrize("hidden", [24, 64, 128, 300, 2050])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_norm(name: str, hidden: int, options: dict[str, Any]) -> None:
    """Of rows that one launch holds, and of larger ones, step by step."""
    net = getattr(rnnfast, name)(I, hidden, bidirectional=True, layer_norm=True, device=DEVICE, **options)
    x, given = torch.randn(T, N, I, device=DEVICE), of_form("both")
    found = list(values_and_grads(net, x, **given).values())
    with rnnfast.use_backend("reference"):
        expected = list(values_and_grads(net, x, **given).values())
    assert_close(found, expected, scale=5e-5)


@pytest.mark.parametrize("form", ["nested", "cu_seqlens"])
@pytest.mark.parametrize("name", LAYERS)
def test_sequences_end_to_end(name: str, form: str) -> None:
    """Nested tensors, and rows with cu_seqlens that lie on the GPU, against each sequence alone."""
    net, bounds = getattr(rnnfast, name)(I, 40, 2, bidirectional=True, device=DEVICE), torch.tensor([0, 3, 3, 8, 9])
    x = torch.randn(9, I, device=DEVICE, requires_grad=True)
    if form == "nested":
        y = net(torch.nested.nested_tensor_from_jagged(x, bounds.to(DEVICE)))[0].values()
    else:
        y = net(x, cu_seqlens=bounds.to(DEVICE), max_seqlen=5)[0]
    alone = torch.cat([net(x[begin:end])[0] for begin, end in zip(bounds, bounds[1:]) if begin < end])
    assert_close(*([out, *torch.autograd.grad(out.sum(), [x, *net.parameters()])] for out in (y, alone)))
