"""The CUDA backend without a GPU: its kernels under the host emulation, the choice among them, what is said if missing.

Most of its numbers are tested with those of every other backend, in each regime.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from backends import EMULATION, MODES, PERSISTENT, REGIMES, WITH_PRODUCTS, Size, regime, serves
from helpers import CASES, FLOOR, choose, chooser
from torch import Tensor, nn

import rnnfast
from rnnfast.backends import Availability
from rnnfast.gpu import allows_tf32

emulated = pytest.mark.skipif(EMULATION is None, reason="there is a GPU: test_gpu.py runs the kernels")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GATED = ("tanh", "lstm", "gru")
layer = functools.partial(helpers.layer, dtype=torch.float32)


@contextmanager
def threads_in_order(seed: int) -> Iterator[None]:
    """Of the emulation: another order for each seed, a fixed one for 0."""
    library = ctypes.CDLL(str(EMULATION))
    library.rnnfast_emulation_seed(ctypes.c_uint64(seed))
    try:
        yield
    finally:
        library.rnnfast_emulation_seed(ctypes.c_uint64(0))


def computed(module: nn.Module, x: Tensor, backend: str = "cuda", **form: Tensor) -> list[Tensor]:
    with rnnfast.use_backend(backend):
        return helpers.computed(module, x.detach().requires_grad_(), **form)


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, relative to the largest value of its tensor."""
    pairs = zip(actual, expected, strict=True)
    return max(((a.double() - e.double()).abs().max() / e.abs().max()).item() for a, e in pairs)


# Numbers


@emulated
@pytest.mark.parametrize("cell", GATED)
@pytest.mark.parametrize("name", WITH_PRODUCTS)
@pytest.mark.parametrize("steps", (1, 4))
def test_threads_may_run_in_any_order(steps: int, name: str, cell: str) -> None:
    module, x = layer(cell, 40, bidirectional=True), torch.randn(steps, 19, 4)
    lengths = torch.randint(0, steps + 1, (19,))
    with regime(name):
        expected = computed(module, x, lengths=lengths)
        for seed in range(1, 5):
            with threads_in_order(seed):
                actual = computed(module, x, lengths=lengths)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), seed


@emulated
@pytest.mark.parametrize("cell", GATED)
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_tf32_where_torch_allows_it(name: str, cell: str) -> None:
    module, x = layer(cell, 40, bidirectional=True), torch.randn(6, 9, 4)
    found = {}
    for precision in ("ieee", "tf32"):
        with regime(name, precision):
            found[precision] = computed(module, x)
    expected = computed(module.double(), x.double(), "reference")
    assert error(found["ieee"], expected) < 8 * FLOOR[torch.float32]
    assert 1e-5 < error(found["tf32"], expected) < 4 * 2**-11  # a mantissa of 10 bits: its rounding, a few times


@emulated
@pytest.mark.parametrize("cell", GATED)
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_more_rows_than_the_chip_holds_at_once(name: str, cell: str) -> None:
    module, x, form = layer(cell, 20), torch.randn(3, 500, 4), {"lengths": torch.randint(0, 4, (500,))}
    with regime(name):
        actual = computed(module, x, **form)
    assert error(actual, computed(module.double(), x.double(), "reference", **form)) < 8 * FLOOR[torch.float32]


@pytest.mark.few(3, "name", "cell", "dtype", "where", "value")
@emulated
@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e30), ids=str)
@pytest.mark.parametrize("where", ("input", "hx"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", (*GATED, "relu"))
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_what_is_not_finite_stays_in_its_row(
    name: str, cell: str, dtype: torch.dtype, where: str, value: float
) -> None:
    """Units and rows that only fill up a tile take none of it."""
    module, x, h0 = layer(cell, 21, dtype=dtype), torch.randn(3, 5, 4), torch.randn(1, 5, 21, dtype=dtype)
    # So few bits that torch's product with x is exact: it may sum up 4 rows in another order than 5.
    for parameter in (module.weight_ih_l0, module.bias_ih_l0):
        parameter.data.mul_(64).round_().div_(64)
    x = x.mul(16).round().div(16).to(dtype)
    (x if where == "input" else h0)[0, 2, 3] = value
    others = [0, 1, 3, 4]

    def output(backend: str, rows: list[int]) -> Tensor:
        h = h0[:, rows]
        with rnnfast.use_backend(backend), torch.no_grad():
            return module(x[:, rows], (h, torch.zeros_like(h)) if cell == "lstm" else h)[0]

    with regime(name):
        y = output("cuda", list(range(5)))
        assert torch.equal(y[:, others], output("cuda", others))
    rounding = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, output("reference", list(range(5))), equal_nan=True, **rounding)


@emulated
@pytest.mark.parametrize("name", REGIMES)
def test_compiled_is_eager(name: str) -> None:
    module, x = layer("lstm", 20, bidirectional=True, num_layers=2), torch.randn(3, 5, 4)
    with regime(name):
        torch._dynamo.reset()
        actual = computed(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
        assert all(torch.equal(a, e) for a, e in zip(actual, computed(module, x), strict=True))


# The choice among the kernels


@emulated
def test_every_regime_has_its_tests() -> None:
    """The fixture leaves out what a regime says that it cannot serve: this much it has to."""
    for cell in ("tanh", "relu", "lstm", "gru"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            sizes = {case: Size(dtype, of.batch, of.hidden, of.bidirectional) for case, of in CASES.items()}
            for case in ("one-step", "one-row", "one-unit", "H63", "stack"):
                assert all(serves(name, cell, sizes[case]) for name in PERSISTENT), (case, cell, dtype)
            assert serves("cluster", cell, sizes["H130-no-bias"])
            assert serves("chip", cell, sizes["H130-no-bias"])


@emulated
@pytest.mark.parametrize(
    ("expected", "mode", "dtype", "batch", "hidden", "projected"),
    [
        ("multiprocessor: W_hh stays on one multiprocessor, 8 rows on each, ", "GRU", torch.float16, 250, 64, False),
        ("cluster: W_hh stays on 3 multiprocessors, 8 rows on each, ", "LSTM", torch.float32, 9, 40, False),
        ("cluster: W_hh stays on ", "GRU", torch.bfloat16, 9, 256, False),
        ("chip: W_hh stays on 32 multiprocessors, ", "GRU", torch.float32, 9, 512, False),
        ("joint: the chip does not hold W_hh, or not so quickly; one launch", "GRU", torch.float16, 5000, 64, False),
        ("stepwise: the chip does not hold W_hh", "LSTM", torch.float32, 9, 2048, False),
        ("stepwise: float64 has no fast products; a product and ", "LSTM", torch.float64, 500, 512, False),
        ("joint: float64 has no fast products; one launch a step, 8 rows ", "LSTM", torch.float64, 9, 40, False),
        ("stepwise: a projection ", "LSTM", torch.float32, 9, 40, True),
    ],
)
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_plan(
    backward: bool, expected: str, mode: str, dtype: torch.dtype, batch: int, hidden: int, projected: bool
) -> None:
    """Of the emulated chip, a small one."""
    reason = torch.ops.rnnfast.cuda_plan(mode, dtype, batch, hidden, False, projected, False, backward, 0)
    assert reason.startswith(expected)


@emulated
def test_few_steps_are_not_worth_arranging() -> None:
    """Which kernels have run is told by the last bits."""
    module, x = layer("lstm", 40, dtype=torch.float64), torch.randn(4, 9, 4, dtype=torch.float64)
    for steps, name in ((3, "stepwise"), (4, "joint")):
        found = {}
        for of in ("by the table", "stepwise", "joint"):
            with regime(of):
                found[of] = computed(module, x[:steps])
        same = [of for of in found if all(torch.equal(a, b) for a, b in zip(found[of], found["by the table"]))]
        assert same == ["by the table", name]


@emulated
@pytest.mark.few(2, "name", "cell", "dtype", "form")
@pytest.mark.parametrize("form", ("rectangular", "lengths", "resets"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", GATED)
@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_every_cut(name: str, cell: str, dtype: torch.dtype, form: str) -> None:
    """All that the plans choose from, of an odd layer in both directions."""
    module, x = layer(cell, 37, dtype=dtype, bidirectional=True), torch.randn(4, 35, 4, dtype=dtype)
    extra = {"lengths": torch.arange(35) % 5, "resets": torch.rand(4, 35) < 0.3}
    extra = {form: extra[form]} if form in extra else {}
    expected = computed(module.double(), x.double(), "reference", **extra)
    module.to(dtype)
    found = set()
    for number in range(12):
        size = MODES[cell], dtype, 35, 37, True, False, False
        try:
            with regime(name, cut=number):
                found |= {torch.ops.rnnfast.cuda_plan(*size, backward, 0) for backward in (False, True)}
                actual = computed(module, x, **extra)
        except RuntimeError as refusal:
            if "cannot serve" not in str(refusal):
                raise
            continue
        assert error(actual, expected) < {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype], found
    rows = {"multiprocessor": {8}, "joint": {8, 32}}.get(name, {8, 16, 32})
    assert rows == {int(plan.split(" rows")[0].split()[-1]) for plan in found}
    if name == "chip":
        assert {plan.endswith("flags") for plan in found} == {False, True}


@emulated
@pytest.mark.parametrize("name", PERSISTENT)
def test_a_regime_refuses_what_it_cannot_serve(name: str) -> None:
    refused = [layer("lstm", 40, dtype=torch.float64), layer("projection", 40), layer("gru", 2048)]
    assert [torch.ops.rnnfast.cuda_regime(None), torch.ops.rnnfast.cuda_regime(0)] == [0, 0]
    with regime(name):
        assert REGIMES[torch.ops.rnnfast.cuda_regime(None)] == name
        for module in refused:
            x = torch.randn(2, 3, 4, dtype=next(module.parameters()).dtype)
            with rnnfast.use_backend("cuda"), pytest.raises(RuntimeError, match="regime asked for cannot serve"):
                module(x)
            with rnnfast.use_backend("cuda"), pytest.raises(RuntimeError, match="regime asked for cannot serve"):
                rnnfast.explain(module)
    for number in (-1, len(REGIMES), 16, 16 + REGIMES.index("stepwise"), 64 * 16 + 1):
        with pytest.raises(RuntimeError, match=f"no regime has number {number}"):
            torch.ops.rnnfast.cuda_regime(number)
    for module in refused[:2]:  # by the table they run
        x = torch.randn(2, 3, 4, dtype=next(module.parameters()).dtype)
        assert error(computed(module, x), computed(module, x, "reference")) < 1e-5


@emulated
def test_explain_names_the_kernel() -> None:
    assert rnnfast.backends()["cuda"] == (True, "CUDA kernels under a host emulation, for tests")
    x, packed = torch.randn(3, 5, 4), nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(1, 4)])
    with rnnfast.use_backend("cuda"):
        for module, inputs, sizes in (
            (layer("lstm", 40, bidirectional=True), (x,), (5, 40, True, False)),
            (layer("lstm", 40, batch_first=True), (x,), (3, 40, False, False)),
            (layer("lstm", 40), (x[:, 0],), (1, 40, False, False)),
            (layer("lstm", 40), (packed,), (2, 40, False, False)),
            (layer("lstm", 40), (), (1, 40, False, False)),
            (layer("projection", 40), (x,), (5, 40, False, True)),
            (rnnfast.LSTMCell(4, 40), (x[0],), (5, 40, False, False)),
            (rnnfast.LSTMCell(4, 40), (x[0, 0],), (1, 40, False, False)),
        ):
            asked = []
            with pytest.MonkeyPatch.context() as patch:
                plan = lambda *args, asked=asked: asked.append(args) or "cluster: of a test"
                patch.setattr(torch.ops.rnnfast, "cuda_plan", plan)
                (choice,) = rnnfast.explain(module, *inputs)
            assert choice[2:] == ("torch.float32 on cpu", "cuda", "cluster: of a test")
            (args,) = asked
            assert args[:2] == ("LSTM", torch.float32) and args[2:6] == sizes and args[7:] == (False, 0)
    assert rnnfast.explain(layer("lstm", 40))[0].backend != "cuda"  # on a CPU only where it is asked for


# The choice of the backend


def test_a_gpu_gets_cuda(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((9, 0), (7, 5), library=True)
    assert choose("LSTM", CUDA, torch.float32) == ("cuda", "CUDA kernels")
    assert choose("LSTM", CUDA, torch.complex64)[0] == "reference"
    assert choose("LSTM", CPU, torch.float32)[0] != "cuda"
    with rnnfast.use_backend("reference"):
        assert choose("LSTM", CUDA, torch.float32)[0] == "reference"
    gpus((9, 0), library=True)
    with rnnfast.use_backend("triton"):
        assert choose("LSTM", CUDA, torch.float32) == ("triton", "Triton kernels")
    with rnnfast.use_backend("cuda"):
        assert choose("LSTM", CUDA, torch.float32) == ("cuda", "CUDA kernels")
        for device in (CPU, torch.device("meta")):
            with pytest.raises(RuntimeError, match=f"does not serve device '{device}'"):
                choose("LSTM", device, torch.float32)
    plan = lambda *args: f"cluster: {args}"
    monkeypatch.setattr(torch.ops.rnnfast, "cuda_plan", plan)
    reason = plan("LSTM", torch.float32, 5, 40, True, False, allows_tf32(), False, 0)
    assert choose("LSTM", CUDA, torch.float32, 40, 5, True) == ("cuda", reason)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert rnnfast.backends()["cuda"] == (False, "its kernels are for NVIDIA's GPUs")
    assert choose("LSTM", CUDA, torch.float32) == ("triton", "Triton kernels")


@pytest.mark.parametrize("lack", ("gpu", "capability", "library", "loadable-library"))
def test_what_is_missing_is_said(
    lack: str, gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load = chooser._load.__wrapped__
    gpus(*([] if lack == "gpu" else [(9, 0), (7, 5) if lack == "capability" else (8, 0)]), library=True)
    monkeypatch.setattr(chooser, "_HAS_TRITON", False)
    if "library" in lack:
        monkeypatch.setattr(chooser, "_load", load)
        monkeypatch.setattr(chooser, "__file__", str(tmp_path / "backends.py"))
    if lack == "loadable-library":
        (tmp_path / "_cuda.so").write_bytes(b"no library")
    reason = {
        "gpu": "torch finds no GPU that it can use",
        "capability": "GPU 1 has compute capability 7.5, the kernels need 8.0",
        "library": "the native library is not built (no CUDA compiler at installation?)",
        "loadable-library": "the native library does not load: ",
    }[lack]
    found = rnnfast.backends()["cuda"]
    assert not found.available and found.detail.startswith(reason)
    with pytest.raises(RuntimeError) as missing, rnnfast.use_backend("cuda"):
        pass
    assert str(missing.value).startswith(f"backend 'cuda' is missing here: {reason}")
    backend, said = choose("LSTM", torch.device("cuda", 1), torch.float32)
    assert backend == "torch" and said == f"{found.detail}; Triton is not installed"


def test_without_a_gpu_the_library_is_not_loaded(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus()
    monkeypatch.setattr(chooser, "_load", lambda *args: pytest.fail("loaded the library"))
    assert rnnfast.backends()["cuda"] == Availability(False, "torch finds no GPU that it can use")


# The operators check what they are given


def call(operator: str, **changed: Any) -> None:
    """Of two directions of an LSTM of 5 units, 3 steps of 2 rows, in float32."""
    new = torch.zeros
    given = {
        "mode": "LSTM",
        "x_gates": new(2, 6, 20),
        "w_hh": [new(20, 5), new(20, 5)],
        "b_hh": [new(20), new(20)],
        "w_hr": [],
        "w_units": [],
        "h": new(2, 2, 5),
        "c": new(2, 2, 5),
        "y": new(6, 10),
        "cs": new(6, 10),
        "gates": new(2, 6, 20),
        "dy": new(6, 10),
        "dcs": new(6, 10),
        "h0": new(2, 2, 5),
        "c0": new(2, 2, 5),
        "dh": new(2, 2, 5),
        "dc": new(2, 2, 5),
        "dgates": new(2, 6, 20),
        "dprojections": None,
        "out": new(2, 6, 5),
        "offsets": None,
        "lengths": torch.tensor([3, 1]),
        "resets": new(3, 2, dtype=torch.uint8),
        "steps": 3,
        "tf32": False,
        "stream": 0,
    }
    getattr(torch.ops.rnnfast, operator)(**{name: (given | changed)[name] for name in takes(operator)})


def takes(operator: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.rnnfast, operator).default._schema.arguments]


OPERATORS = ("cuda_forward_steps", "cuda_backward_steps", "cuda_states_before")
WRONG = {
    **{name: [torch.zeros(3, 3)] for name in ("y", "cs", "dy", "dcs")},
    **{name: [torch.zeros(2, 2, 4)] for name in ("c", "h0", "c0", "dc")},
    **{name: [torch.zeros(2, 6, 19), torch.zeros(2, 6, 20).double()] for name in ("gates", "dgates", "x_gates")},
    "h": [torch.zeros(2, 2, 4), torch.zeros(2, 4, 5)[:, ::2], torch.zeros(2, 2, 5).half()],
    "dh": [torch.zeros(2, 2, 4), torch.zeros(2, 4, 5)[:, ::2], torch.zeros(2, 2, 5).half()],
    "out": [torch.zeros(2, 6, 4), torch.zeros(2, 12, 5)[:, ::2], torch.zeros(6, 10)],
    "w_hh": [[], [torch.zeros(20, 5)], [torch.zeros(20, 5), torch.zeros(20, 4)], [torch.zeros(5, 20).t()] * 2],
    "b_hh": [[torch.zeros(20), torch.zeros(5)], [torch.zeros(20)], [torch.zeros(20)] * 3],
    "lengths": [torch.tensor([3]), torch.tensor([3, 1], dtype=torch.int32)],
    "resets": [torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.int64)],
    "offsets": [torch.tensor([0, 2])],
    "mode": ["LSTM2", "GRU"],
    "steps": [0, 4],
}


@emulated
@pytest.mark.parametrize(
    ("operator", "name", "k"),
    [
        (operator, name, k)
        for operator in OPERATORS
        for name in takes(operator)
        for k in range(len(WRONG.get(name, ())))
    ],
)
def test_operators_check_their_arguments(operator: str, name: str, k: int) -> None:
    call(operator)
    with pytest.raises(RuntimeError, match="rnnfast: "):
        call(operator, **{name: WRONG[name][k]})


@emulated
def test_a_product_is_refused_or_left_to_torch() -> None:
    """On a CPU there is no cuBLAS: the operator says so, and has written nothing."""
    multiply, new = torch.ops.rnnfast.cuda_multiply, torch.zeros
    out = new(2, 4)
    assert multiply(torch.ones(2, 3), torch.ones(3, 4), out, False, False, 0) is False and not out.any()
    assert multiply(new(0, 3), new(3, 4), new(0, 4), True, True, 0) is False
    for a, b, out in (
        (new(2, 3), new(4, 4), new(2, 4)),
        (new(2, 3), new(3, 4), new(4, 2)),
        (new(6), new(3, 4), new(2, 4)),
        (new(2, 3), new(3, 4).double(), new(2, 4)),
        (new(2, 3, dtype=torch.int32), new(3, 4, dtype=torch.int32), new(2, 4, dtype=torch.int32)),
    ):
        with pytest.raises(RuntimeError, match="rnnfast: "):
            multiply(a, b, out, False, False, 0)


def test_cublas_is_called_with_its_own_layouts(tmp_path: Path) -> None:
    """A library that stands for cuBLAS; see blas.cpp."""
    compile = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", str(Path(__file__).with_name("blas.cpp"))]
    fake, program = tmp_path / "libcublas.so.13", tmp_path / "program"
    subprocess.run([*compile, "-DFAKE", "-shared", "-fPIC", f"-Wl,-soname,{fake.name}", "-o", str(fake)], check=True)
    subprocess.run([*compile, "-o", str(program), "-ldl", "-pthread"], check=True)
    for arguments in ([], [str(fake)]):
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.returncode, done.stdout)
