"""What a GPU alone shows: the compiled kernels' numbers, memory, streams, graphs, sizes and refusals."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from backends import MODES, PERSISTENT, REGIMES, Size, regime, serves
from helpers import (
    CASES,
    CELLS,
    FLOOR,
    FORMS,
    LAYERS,
    Case,
    Problem,
    assert_off_by_twice_at_most,
    choose,
    chooser,
    computed,
    error_of,
    flatten,
    pair,
    tensors_of,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast.records import Inputs, names_of

pytestmark = pytest.mark.gpu
DEVICE, ELSEWHERE = "cuda", "cpu"

# Of float32 without TF32 the one is held by a multiprocessor, the other is not: test_explanation_names_the_kernel.
HIDDEN = {"small": 40, "large": 300}
on_cuda = pytest.mark.parametrize("kernels", ["cuda"], indirect=True)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """torch's two switches: that of recurrent layers, and that of the products over a whole sequence."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=("triton", "cuda"), autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend."""
    found = rnnfast.backends()[request.param]
    if not found.available:
        pytest.skip(f"{request.param}: {found.detail}")
    with rnnfast.use_backend(request.param), tf32(False):
        yield request.param
    torch._dynamo.reset()


def layer(cell: str, hidden: int, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return helpers.layer(cell, hidden, dtype=dtype, device=DEVICE, **options)


def sequence(form: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor | PackedSequence, dict[str, Tensor]]:
    """What a layer of 4 features is called with: 6 steps, 5 rows."""
    x = torch.randn(6, 5, 4, device=DEVICE, dtype=dtype)
    lengths = torch.tensor([2, 6, 1, 6, 4])
    if form == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return packed._replace(data=packed.data.requires_grad_()), {}
    extra = {"lengths": lengths.to(DEVICE), "resets": torch.rand(6, 5, device=DEVICE) < 0.4}
    return x.requires_grad_(), {form: extra[form]} if form in extra else {}


def assert_close(actual: list[Tensor], expected: list[Tensor], scale: float = 1e-5) -> None:
    """Equal but for ``scale`` of each tensor's largest value."""
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = a.to("cpu", torch.float64), e.to("cpu", torch.float64)
        atol = scale * e.abs().max().item()
        torch.testing.assert_close(a, e, rtol=0, atol=atol, msg=lambda text, k=k: f"tensor {k}: {text}")


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert_close(actual, expected, scale=0)


# Numbers


# By name: the dtype, whether with TF32, and the floor relative to the largest value. TF32 has 10 bits of mantissa: two
# of its roundings.
PRECISIONS = {str(dtype).removeprefix("torch."): (dtype, False, floor) for dtype, floor in FLOOR.items()}
PRECISIONS["tf32"] = (torch.float32, True, 2e-3)

GPU_CASES = CASES | {
    "H128": Case(9, 20, 30, 128),  # the most units that an LSTM of a half type has in one program
    "many-rows": Case(2, 1100, 6, 40, bidirectional=True),  # more tiles than multiprocessors
}
PARITY = list(itertools.product(("H63", "wide"), CELLS, FORMS))
PARITY += [
    (case, cell, "rectangular")
    for case in ("one-step", "one-row", "H130-no-bias", "stack", "H128", "many-rows")
    for cell in CELLS
    if GPU_CASES[case].bias or cell != "relu"  # without a bias units lie at relu's kink, where rounding decides
]


class OnDevice:
    """A module on the device, for a caller whose tensors lie on the CPU."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.to(DEVICE)
        self.named_parameters = self.module.named_parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _moved(self.module(*_moved(args, DEVICE), **_moved(kwargs, DEVICE)), "cpu")


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return tuple(_moved(item, device) for item in value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case, cell, form", PARITY)
def test_error_is_at_most_twice_torchs(case: str, cell: str, form: str, precision: str) -> None:
    """Against float64 ours may be off by twice what cuDNN is in the same precision, plus the floor."""
    dtype, allowed_tf32, floor = PRECISIONS[precision]
    problem = Problem(GPU_CASES[case], cell, form, dtype)
    with tf32(allowed_tf32):
        baseline = problem.baseline(dtype, OnDevice)
        actual = problem.run(OnDevice(problem.module(rnnfast, dtype)), dtype)
    exact = problem.exact()
    if cell == "relu" and dtype.itemsize == 2:
        # Of so many sums some lie within a rounding of relu's kink, and then either gradient is right.
        actual, baseline, exact = ({k: t for k, t in of.items() if k[:2] != "d "} for of in (actual, baseline, exact))
    assert_off_by_twice_at_most(actual, baseline, exact, dtype, floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_those_cases_meet_small_and_large_layers(cell: str, precision: str, kernels: str) -> None:
    dtype, allowed_tf32, _ = PRECISIONS[precision]
    found = set()
    with tf32(allowed_tf32):
        for case in {case for case, of_cell, _ in PARITY if of_cell == cell}:
            sizes = GPU_CASES[case].hidden, GPU_CASES[case].batch, GPU_CASES[case].bidirectional, cell == "projection"
            found.add(choose(MODES[cell], torch.device(DEVICE), dtype, *sizes)[1].partition(":")[0])
    if cell == "projection":
        assert found == {"stepwise"}
    elif kernels == "cuda" and dtype == torch.float64:
        assert found <= {"stepwise", "joint"}
    elif kernels == "cuda":
        assert {"multiprocessor"} < found <= set(REGIMES)
    else:
        assert found == {"fused", "stepwise"}


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_every_hidden_size(cell: str) -> None:
    for hidden in range(1, 301):
        module, x = layer(cell, hidden), torch.randn(3, 5, 4, device=DEVICE, requires_grad=True)
        actual = computed(module, x)
        with rnnfast.use_backend("reference"):
            expected = computed(module.double(), x.detach().double().requires_grad_())
        for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
            error = (a - e).abs().max().item()
            assert error <= 1e-5 * e.abs().max().item(), f"H {hidden}: tensor {k} is off by {error:.1e}"


@on_cuda
@pytest.mark.parametrize("allowed", (False, True), ids=("ieee", "tf32"))
def test_products_follow_the_switch_of_recurrent_layers(allowed: bool) -> None:
    """As torch.nn's do, whatever that of other products says."""
    module, x = layer("lstm", 40, batch_first=True), torch.randn(300, 1, 4, device=DEVICE, requires_grad=True)
    torch.backends.cuda.matmul.allow_tf32 = not allowed
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        actual = computed(module, x)
    with rnnfast.use_backend("reference"):
        expected = computed(module.double(), x.detach().double().requires_grad_())
    for a, e in zip(actual, expected, strict=True):
        error = ((a - e).abs().max() / e.abs().max().clamp(min=1e-9)).item()
        # Steps without a predecessor leave nothing for W_hh.
        assert error == 0 or (1e-5 < error < 2e-3 if allowed else error < 1e-5)


# The CUDA kernels' regimes, each forced, and by the table over the sizes


# Of a few steps, relative to the largest value. The gradient of a bias is a sum of up to 30 numbers, each of which
# may be off by half of bfloat16's 2**-8.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}


@on_cuda
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("hidden", (5, 40, 300))
@pytest.mark.parametrize("cell", ("tanh", "lstm", "gru"))
@pytest.mark.parametrize("name", REGIMES[1:])
def test_every_regime(name: str, cell: str, hidden: int, dtype: torch.dtype, form: str) -> None:
    """Against the reference in float64; and again, which gives equal bits."""
    if not serves(name, cell, Size(dtype, 5, hidden, True)):
        assert name in PERSISTENT and hidden > 40
        pytest.skip("it cannot serve this layer")
    module, (x, extra) = layer(cell, hidden, dtype, bidirectional=True), sequence(form, dtype)
    with regime(name):
        actual = computed(module, x, **extra)
        for _ in range(3):
            assert_equal(computed(module, x, **extra), actual)
    wide = x._replace(data=x.data.detach().double().requires_grad_()) if form == "packed" else x.detach().double()
    with rnnfast.use_backend("reference"):
        expected = computed(module.double(), wide if form == "packed" else wide.requires_grad_(), **extra)
    assert_close(actual, expected, ROUNDING[dtype])


@on_cuda
@pytest.mark.parametrize("dtype", (*ROUNDING, torch.float64), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cut", (0, 1))
@pytest.mark.parametrize("cell", ("tanh", "lstm", "gru"))
def test_steps_in_one_launch(cell: str, cut: int, dtype: torch.dtype) -> None:
    """In blocks of few rows and of many."""
    module, x = layer(cell, 70, dtype, bidirectional=True), torch.randn(4, 37, 4, device=DEVICE, dtype=dtype)
    lengths = (torch.arange(37) % 5).to(DEVICE)
    with regime("joint", cut=cut):
        actual = computed(module, x.requires_grad_(), lengths=lengths)
    with rnnfast.use_backend("reference"):
        expected = computed(module.double(), x.detach().double().requires_grad_(), lengths=lengths)
    assert_close(actual, expected, ROUNDING.get(dtype, 1e-12))


ALL_H = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200, 256, 300, 512, 640, 777, 1024, 1536, 2048)
ALL_N = (1, 2, 7, 8, 9, 16, 17, 64, 100, 512)
SIZES = sorted({*((hidden, 9) for hidden in ALL_H), *itertools.product((128, 300), ALL_N)})


@on_cuda
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("hidden, batch", SIZES)
@pytest.mark.parametrize("cell", ("tanh", "lstm", "gru"))
def test_sizes(cell: str, hidden: int, batch: int, dtype: torch.dtype) -> None:
    module, x = layer(cell, hidden, dtype), torch.randn(3, batch, 4, device=DEVICE, dtype=dtype, requires_grad=True)
    actual = computed(module, x)
    with rnnfast.use_backend("reference"):
        expected = computed(module.double(), x.detach().double().requires_grad_())
    assert_close(actual, expected, ROUNDING[dtype])


@on_cuda
@pytest.mark.parametrize("name", REGIMES[1:])
def test_every_regime_in_a_graph(name: str) -> None:
    with regime(name):
        test_graph_capture(True, "lstm", "small", "lengths")


@on_cuda
@pytest.mark.parametrize("name", REGIMES[1:])
def test_every_regime_on_two_streams_at_once(name: str) -> None:
    layers = [layer("gru", 40, bidirectional=True) for _ in range(2)]
    x = torch.randn(200, 64, 4, device=DEVICE, requires_grad=True)
    streams = [torch.cuda.Stream() for _ in layers]
    with regime(name):
        expected = [computed(module, x) for module in layers]
        torch.cuda.synchronize()
        for _ in range(5):
            found = []
            for module, stream in zip(layers, streams):
                with torch.cuda.stream(stream):
                    found.append(computed(module, x))
            torch.cuda.synchronize()
            for actual, e in zip(found, expected):
                assert_equal(actual, e)


SANITIZED = """
import sys, torch, rnnfast
torch.backends.cudnn.rnn.fp32_precision = "ieee"
resets, lengths = torch.rand(3, 9, device="cuda") < 0.4, torch.tensor([3, 0, 1, 2, 3, 3, 1, 2, 3], device="cuda")
x = torch.randn(3, 9, 4, device="cuda")
with rnnfast.use_backend("cuda"):
    torch.ops.rnnfast.cuda_regime(int(sys.argv[1]))
    for dtype in (torch.float32, torch.bfloat16):
        for cell in (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU):
            module = cell(4, 37, bidirectional=True, device="cuda", dtype=dtype)
            for form in ({}, {"lengths": lengths}, {"resets": resets}):
                module(x.to(dtype), **form)[0].sum().backward()
torch.cuda.synchronize()
"""


@on_cuda
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
@pytest.mark.parametrize("name", REGIMES[1:])
def test_compute_sanitizer_finds_nothing(name: str, tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    root = str(Path(rnnfast.__file__).parents[1])
    # Without torch's cache every tensor has bounds of its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": root}
    done = subprocess.run([*command, str(REGIMES.index(name))], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# Memory


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", HIDDEN)
@pytest.mark.parametrize("cell", CELLS)
def test_what_memory_held_before_does_not_matter(cell: str, kernel: str, form: str) -> None:
    module, (x, extra) = layer(cell, HIDDEN[kernel], bidirectional=True), sequence(form)
    poisoned = computed(module, x, **extra)
    assert torch.empty(9, device=DEVICE).isnan().all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        assert_equal(computed(module, x, **extra), poisoned)


@pytest.mark.parametrize("kernel", HIDDEN)
@pytest.mark.parametrize("cell", CELLS)
def test_layouts_do_not_matter(cell: str, kernel: str) -> None:
    """Transposed, sliced and expanded operands and gradients give the numbers of contiguous ones."""
    module = layer(cell, HIDDEN[kernel], bidirectional=True)
    random = lambda *shape: torch.randn(*shape, device=DEVICE)
    widths = (module.proj_size or module.hidden_size, module.hidden_size)[: 2 if module.mode == "LSTM" else 1]
    hx = [random(2, 1, width).expand(-1, 3, -1) for width in widths]
    weights = [0.1 * random(*p.shape, 2)[..., 0] for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    cotangent = random(2 * widths[0])

    def run(x: Tensor, as_given: Any) -> list[Tensor]:
        leaves = [as_given(t).requires_grad_() for t in (x, *hx, *weights)]
        states = leaves[1 : 1 + len(hx)]
        values = dict(zip(names, leaves[1 + len(hx) :]))
        y, h_n = functional_call(module, values, (leaves[0], tuple(states) if len(hx) == 2 else states[0]))
        tensors = [y, *tensors_of(h_n)]
        return tensors + list(torch.autograd.grad(y, leaves, as_given(cotangent.expand_as(y))))

    for x in (random(3, 6, 8)[:, :, ::2].transpose(0, 1), random(6, 1, 4).expand(-1, 3, -1)):
        contiguous = run(x, lambda t: t.detach().clone(memory_format=torch.contiguous_format))
        assert_close(run(x, lambda t: t.detach()), contiguous)


# Sizes


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_long_sequence(cell: str) -> None:
    """70,000 steps, against torch.nn on a CPU."""
    theirs, ours = pair(CELLS[cell][0], 1, 2, dtype=torch.float64)
    x = torch.randn(70_000, 2, 1, dtype=torch.float64, requires_grad=True)
    actual = computed(ours.to(DEVICE), x.detach().to(DEVICE).requires_grad_())
    assert_close(actual, computed(theirs, x), scale=1e-9)


@pytest.mark.parametrize("cell, hidden", [("gru", 16), ("lstm", 16), ("projection", 16)])
def test_many_rows(cell: str, hidden: int) -> None:
    """A batch of more tiles than a grid may have in its second dimension."""
    module, x = layer(cell, hidden), torch.randn(1, 600_000, 4, device=DEVICE, requires_grad=True)
    actual = computed(module, x)
    with rnnfast.use_backend("reference"):
        expected = computed(module.double(), x.detach().double().requires_grad_())
    assert_close(actual, expected, 1e-4)  # the weights' gradients are sums over all rows


@pytest.mark.parametrize("hidden, steps, batch", [(128, 8, 530_000), (256, 4, 530_000)], ids=HIDDEN)
def test_more_elements_than_32_bits_count(hidden: int, steps: int, batch: int) -> None:
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("60 GB of free GPU memory are needed")
    module = layer("lstm", hidden, torch.bfloat16)
    x = torch.randn(steps, batch, 4, device=DEVICE, dtype=torch.bfloat16)
    assert steps * batch * 4 * hidden > 2**31

    def run(part: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The last rows of y and dx, and the gradients of the weights."""
        y, _, _, dx, *dweights = computed(module, part.clone().requires_grad_())
        return [y[:, -1000:], dx[:, -1000:]], dweights

    last, dweights = run(x)
    _, first_half = run(x[:, : batch // 2])
    expected, second_half = run(x[:, batch // 2 :])
    assert_close(last, expected, 2e-2)
    assert_close(dweights, [a + b for a, b in zip(first_half, second_half)], 2e-2)


# Streams, graphs and devices


@pytest.mark.parametrize("kernel", HIDDEN)
@pytest.mark.parametrize("cell", CELLS)
def test_runs_on_the_current_stream(cell: str, kernel: str) -> None:
    module, (x, _) = layer(cell, HIDDEN[kernel], bidirectional=True), sequence("rectangular")
    expected = computed(module, x)
    late = torch.zeros_like(x, requires_grad=True)
    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(4):
            with torch.no_grad():
                late.zero_()
                for _ in range(5):  # a tenth of a second, after which the input is there: another stream finds zeros
                    busy = busy @ busy
                late.copy_(x)
            actual = computed(module, late)
    torch.cuda.synchronize()
    assert_close(actual, expected)


@pytest.mark.parametrize("form", ("rectangular", "lengths", "resets"))
@pytest.mark.parametrize("kernel", HIDDEN)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("trained", (False, True), ids=("infer", "train"))
def test_graph_capture(trained: bool, cell: str, kernel: str, form: str) -> None:
    module, (x, extra) = layer(cell, HIDDEN[kernel], bidirectional=True), sequence(form)

    def run() -> list[Tensor]:
        if trained:
            return computed(module, x, **extra)
        with torch.no_grad():
            return [t for _, t in flatten(module(x, **extra))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        other, other_extra = sequence(form)
        with torch.no_grad():
            x.copy_(other)
        for name, value in other_extra.items():
            extra[name].copy_(value.flip(0))
        graph.replay()
        assert_close(captured, run())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", HIDDEN)
@pytest.mark.parametrize("cell", CELLS)
def test_the_host_never_waits(cell: str, kernel: str, form: str) -> None:
    module, (x, extra) = layer(cell, HIDDEN[kernel], num_layers=2, bidirectional=True), sequence(form)
    expected = computed(module, x, **extra)
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchroniz"):
            expected[0].sum().item()
        for _ in range(3):  # the last ones find the memory of those before
            actual = computed(module, x, **extra)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device only")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", HIDDEN)
@pytest.mark.parametrize("cell", CELLS)
def test_a_device_that_is_not_the_current_one(cell: str, kernel: str, form: str) -> None:
    module, (x, extra) = layer(cell, HIDDEN[kernel], bidirectional=True), sequence(form)
    expected = computed(module, x, **extra)
    other = x.to("cuda:1")
    other = other._replace(data=other.data.detach().requires_grad_()) if form == "packed" else other.detach()
    other = other if form == "packed" else other.requires_grad_()
    actual = computed(copy.deepcopy(module).to("cuda:1"), other, **_moved(extra, "cuda:1"))
    assert {str(t.device) for t in actual} == {"cuda:1"} and torch.cuda.current_device() == 0
    assert_close(actual, expected)


# What torch.nn's layers can do, and what they cannot


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("kernel", HIDDEN)
@pytest.mark.parametrize("cell", CELLS)
def test_runs_give_equal_bits(cell: str, kernel: str, dtype: torch.dtype) -> None:
    module, (x, _) = layer(cell, HIDDEN[kernel], dtype, bidirectional=True), sequence("rectangular", dtype)
    torch.use_deterministic_algorithms(False)  # as users have it
    try:
        expected = computed(module, x)
        for _ in range(3):
            assert_equal(computed(module, x), expected)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_in_eval_mode(cell: str) -> None:
    """cuDNN refuses it."""
    module, (x, _) = layer(cell, HIDDEN["small"]), sequence("rectangular")
    expected = computed(module, x)
    assert_equal(computed(module.eval(), x), expected)


@pytest.mark.parametrize("hidden", (5, 40), ids=HIDDEN)  # float64 is fused up to 32 units
@pytest.mark.parametrize("cell", ("tanh", "lstm", "projection", "gru"))
def test_second_derivatives(cell: str, hidden: int) -> None:
    module = layer(cell, hidden, torch.float64, bidirectional=True)
    x, _ = sequence("rectangular", torch.float64)

    def second() -> list[Tensor]:
        (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, *module.parameters()]))

    actual = second()
    with rnnfast.use_backend("reference"):
        assert_close(actual, second(), 1e-11)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_each_sample(cell: str) -> None:
    module, (x, _) = layer(cell, 5, torch.float64), sequence("rectangular", torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x,))[0].square().sum()

    samples = vmap(grad(loss), in_dims=(None, 1))(weights, x.detach())
    for n in range(x.size(1)):
        expected = torch.autograd.grad(module(x[:, n])[0].square().sum(), list(module.parameters()))
        assert_close([g[n] for g in samples.values()], list(expected), 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_compiled_is_eager(cell: str, form: str) -> None:
    module, (x, extra) = layer(cell, HIDDEN["small"], num_layers=2, bidirectional=True), sequence(form)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal(computed(compiled, x, **extra), computed(module, x, **extra))


@pytest.mark.parametrize("mode", sorted(set(MODES.values())))
def test_opcheck(mode: str, kernels: str) -> None:
    """What the compiler is told of the outputs is what they are."""
    module = layer({mode: cell for cell, mode in reversed(MODES.items())}[mode], 5, bidirectional=True)
    weights, x = [p.detach() for p in module.parameters()], torch.randn(3, 2, 4, device=DEVICE)
    form = None, torch.tensor([1, 3], device=DEVICE), torch.rand(3, 2, device=DEVICE) < 0.5, True
    forward, backward = (getattr(torch.ops.rnnfast, f"{kernels}_{way}").default for way in ("forward", "backward"))
    inputs = Inputs(mode, x, None, None, *form, names_of(mode, len(weights) // 2), weights)
    y, _, _, c, gates = forward(*inputs, True, True)
    torch.library.opcheck(forward, (*inputs, True, True))
    given = *inputs, torch.randn_like(y), None, None, None, y, c, gates
    for need_dx, need_dw in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward, (*given, need_dx, need_dw))


def test_explanation_names_the_kernel(kernels: str) -> None:
    small = {"triton": {"fused"}, "cuda": {"multiprocessor", "cluster"}}[kernels]
    for cell, (size, hidden) in itertools.product(CELLS, HIDDEN.items()):
        (choice,) = rnnfast.explain(layer(cell, hidden), torch.randn(3, 2, 4, device=DEVICE))
        found = choice.reason.partition(":")[0]
        assert choice.backend == kernels
        if cell == "projection":
            assert found == "stepwise"
        elif size == "small":
            assert found in small, choice
        else:
            assert found in ({"stepwise"} if kernels == "triton" else {"cluster", "chip"}), choice


def test_the_choice_is_cuda_where_it_is_built(kernels: str) -> None:
    expected = "cuda" if rnnfast.backends()["cuda"].available else "triton"
    found = chooser.choose_backend(chooser.Circumstances(), "LSTM", torch.device(DEVICE), torch.float32)
    assert found[0] == expected


def test_a_race_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours pass their check, and what is chosen has torch.nn's numbers, as a whole stack."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rnnfast.choice, "_is_deterministic", lambda: False)
    rnnfast.set_choice("measure")
    try:
        for name in LAYERS:
            theirs, ours = pair(name, 24, 40, num_layers=2, bidirectional=True, device=DEVICE)
            x = torch.randn(9, 16, 24, device=DEVICE, requires_grad=True)
            for actual, expected in zip(computed(ours, x), computed(theirs, x)):
                torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)  # of TF32
            assert "measured here: " in rnnfast.explain(ours, x)[0].reason
        known = rnnfast.timings.known_of(torch.device(DEVICE, torch.cuda.current_device()))
        assert all(len(times) > 1 and "torch" in times for times in known.measured.values())
        assert not any(rnnfast.choice._faults.values())
    finally:
        rnnfast.set_choice(None)


# Refusals, in the words that torch.nn has for them here


def _given(module: nn.Module, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> Any:
    h = torch.randn(1, 2, 5, device=device, dtype=dtype)
    return (h, h) if module.mode == "LSTM" else h


REFUSED = {
    "states-elsewhere": lambda m: m(torch.randn(3, 2, 4, device=DEVICE), _given(m, ELSEWHERE)),
    "input-elsewhere": lambda m: m(torch.randn(3, 2, 4, device=ELSEWHERE)),
    "input-and-states-elsewhere": lambda m: m(torch.randn(3, 2, 4, device=ELSEWHERE), _given(m, ELSEWHERE)),
    "only-input-elsewhere": lambda m: m(torch.randn(3, 2, 4, device=ELSEWHERE), _given(m)),
    "weights-elsewhere": lambda m: m.to(ELSEWHERE)(torch.randn(3, 2, 4, device=DEVICE), _given(m)),
    "states-dtype": lambda m: m(torch.randn(3, 2, 4, device=DEVICE), _given(m, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_like_torch(case: str, name: str) -> None:
    theirs, ours = pair(name, 4, 5, device=DEVICE)
    assert error_of(REFUSED[case], ours) == error_of(REFUSED[case], theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_input_elsewhere(name: str) -> None:
    # torch.nn's text comes from whichever product meets the weights first.
    theirs, ours = pair(name, 4, 5, device=DEVICE)
    packed = pack_padded_sequence(torch.randn(3, 2, 4).to(ELSEWHERE), torch.tensor([3, 2]))
    error, text = error_of(ours, packed)
    assert error is error_of(theirs, packed)[0] and "not at the same device" in text


@pytest.mark.parametrize("name", LAYERS)
def test_resets_elsewhere(name: str) -> None:
    module, (x, _) = getattr(rnnfast, name)(4, 5, device=DEVICE), sequence("rectangular")
    with pytest.raises(ValueError, match=f"resets must be on the input's device {x.device}, got {ELSEWHERE}"):
        module(x, resets=torch.zeros(6, 5, dtype=torch.bool, device=ELSEWHERE))


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_may_lie_on_the_cpu(name: str) -> None:
    module, (x, extra) = getattr(rnnfast, name)(4, 5, device=DEVICE), sequence("lengths")
    expected = computed(module, x, **extra)
    assert_equal(computed(module, x, lengths=extra["lengths"].cpu()), expected)
    beyond = extra["lengths"].where(extra["lengths"] < 6, 9)  # to look at values there would be to wait for them
    assert_equal(computed(module, x, lengths=beyond), expected)
