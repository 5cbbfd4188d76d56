"""What the stages of gpu_day.py do, item by item, in a process of their own: python bench/gpu_work.py STAGE

Each item's start and its result are a line of JSON in the file of --report, written at once: the process may hang or
die at any item. Items that stand in the file of --done are left out. Letters as in run.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_cuts
import flex as flex_bench
import machine
import run
import torch
from torch import Tensor, nn

import rnnfast

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
AGAIN = 3  # exit status: what is left wants a new process
Item = tuple[str, Callable[[], dict[str, Any]]]
# By name the dtype, and torch's two switches of TF32.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, (False, False)),
    "tf32": (torch.float32, (True, True)),
    "float32": (torch.float32, (False, False)),
}


class Work:
    """The items of every stage, on one device."""

    def __init__(self, device: str) -> None:
        self.device, self.rehearsed = device, device == "cpu"

    # The smallest call

    def versions(self) -> Iterator[Item]:
        """Each in a process of its own."""
        yield "machine", self.machine
        yield "libraries", self.libraries
        for regime in cuda_cuts.REGIMES:
            yield f"cuda {regime}", functools.partial(self.smallest, "cuda", regime)
        yield "triton", functools.partial(self.smallest, "triton")

    def machine(self) -> dict[str, Any]:
        fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "memory.total")
        smi = machine.output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
        found = machine.describe(self.device) | {
            "nvidia-smi": dict(zip(fields, smi.split(", "))),
            "nvcc": (machine.output(["nvcc", "--version"]).splitlines() or [""])[-1],
            "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "",
            "python": sys.version.split()[0],
        }
        if not self.rehearsed:
            of = torch.cuda.get_device_properties(0)
            fields = ("major", "minor", "multi_processor_count", "L2_cache_size", "shared_memory_per_block_optin")
            found |= {name: getattr(of, name, None) for name in fields}
        return found

    def libraries(self) -> dict[str, Any]:
        found = rnnfast.backends()
        missing = [f"{name}: {found[name].detail}" for name in ("cpu", "cuda", "triton") if not found[name].available]
        if missing:
            raise RuntimeError("; ".join(missing))
        return {name: of.detail for name, of in found.items()}

    def smallest(self, backend: str, regime: str | None = None) -> dict[str, Any]:
        """Two LSTMs forward and backward, both directions, against the reference in float64."""
        off = 0.0
        for dtype, (of, switches), allowed in (("float32", PRECISIONS["float32"], 1e-4), ("bfloat16", *HALF)):
            set_tf32(switches)
            torch.manual_seed(0)
            module = rnnfast.LSTM(4, 24, bidirectional=True, dtype=of, device=self.device)
            x = torch.randn(5, 3, 4, dtype=of, device=self.device, requires_grad=True)
            with forced(backend, regime):
                actual = outputs_and_gradients(module, x)
            with rnnfast.use_backend("reference"):
                expected = outputs_and_gradients(module.double(), x.detach().double().requires_grad_())
            here = max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))
            if not here < allowed:
                raise RuntimeError(f"{dtype}: off by {here:.1e} of the largest value")
            off = max(off, here)
        return {"figure": off}

    # The table of the bench

    def cudnn(self) -> Iterator[Item]:
        """LSTM and GRU in bfloat16, every size; then some of all else."""
        if self.rehearsed:
            shapes = [("bfloat16", ((64, 16),), ("LSTM",), 1, 1), ("float32", ((20, 2),), ("GRU",), 2, 2)]
        else:
            grid = itertools.product((256, 1024, 512, 128, 64), (64, 16, 1, 256))
            shapes = [("bfloat16", tuple(grid), ("LSTM", "GRU"), 1, 1)]
            shapes += [("float32", ((256, 64), (1024, 64), (128, 16)), ("LSTM", "GRU"), 1, 1)]
            shapes += [("float16", ((256, 64),), ("LSTM", "GRU"), 1, 1)]
            shapes += [("bfloat16", ((256, 64), (1024, 64)), ("RNN",), 1, 1)]
            shapes += [("bfloat16", ((256, 64),), ("LSTM", "GRU"), 2, 2)]
        yield from self.rows(shapes)

    def more(self) -> Iterator[Item]:
        """What cudnn leaves over, Triton where it has fused kernels, and large sizes."""
        if self.rehearsed:
            yield from self.rows([("float16", ((12, 3),), ("RNN",), 1, 1)])
            return
        rest = tuple(itertools.product((64, 128, 256, 512, 1024), (1, 64)))
        yield from self.rows([("bfloat16", ((64, 64), (128, 64)), ("LSTM", "GRU"), 1, 1)], backend="triton")
        yield from self.rows([("bfloat16", ((256, 1024), (1024, 1024), (2048, 64)), ("LSTM", "GRU"), 1, 1)])
        yield from self.rows([("bfloat16", ((256, 64),), ("LSTM", "GRU"), 1, 1)], steps=4096)
        measured = {name for name, _ in self.cudnn()}
        left = [("float32", rest, ("LSTM", "GRU"), 1, 1), ("bfloat16", rest, ("RNN",), 1, 1)]
        left += [("float16", rest, ("LSTM", "GRU"), 1, 1), ("float32", rest, ("RNN",), 1, 1)]
        yield from ((name, item) for name, item in self.rows(left) if name not in measured)

    # Cells of one's own

    def flex(self) -> Iterator[Item]:
        """An LSTM that no kernel knows, and sLSTMs of one head and of more, as many units as inputs."""
        sizes = [("lstm", "bfloat16", H, N, 1) for H, N in ((64, 16), (64, 64), (1024, 64))]
        sizes += [("lstm", "float32", 64, 64, 1), ("slstm", "bfloat16", 256, 64, 4), ("slstm", "float32", 256, 64, 4)]
        sizes += [("slstm", "bfloat16", 64, 64, 1), ("slstm", "bfloat16", 1024, 64, 1)]
        for (cell, dtype, H, N, heads), mode in itertools.product(sizes, flex_bench.MODES):
            T, H, N = (5, 2 * heads, 3) if self.rehearsed else (run.GPU_STEPS, H, N)
            name = f"{cell} {dtype} {mode} {T}x{N}x{H}" + (f" {heads} heads" if heads > 1 else "")
            yield name, functools.partial(self.of_flex, cell, dtype, mode, T, N, H, heads)

    def of_flex(self, cell: str, dtype: str, mode: str, T: int, N: int, H: int, heads: int) -> dict[str, Any]:
        """Milliseconds of a layer; of the LSTM also of our kernels of it and of cuDNN, else of a plain loop."""
        rnnfast.set_choice("ours")
        options = {"device": self.device, "dtype": getattr(torch, dtype)}
        net = rnnfast.FlexRNN(flex_bench.CELLS[cell], H, H, num_heads=heads, **options)
        modules = {"ours": net} if cell == "slstm" else {
            "ours": net, "kernels": rnnfast.LSTM(H, H, **options), "torch": nn.LSTM(H, H, **options)
        }  # fmt: skip
        inputs = [torch.randn(T, N, H, **options)]
        calls = {name: run.Call(module, module, inputs, mode, (False, False)) for name, module in modules.items()}
        if cell == "slstm":

            def loop(x: Tensor) -> Any:
                with rnnfast.use_backend("reference"):
                    return net(x)

            calls["loop"] = run.Call(loop, net, inputs, mode, (False, False))
        ms = run.measure(calls, 1 if self.rehearsed else 3, self.device, 0.01)
        over = {f"ratio_{name}": value / ms["ours"] for name, value in ms.items() if name != "ours"}
        return {"figure": list(over.values())[-1]} | {f"{name}_ms": value for name, value in ms.items()} | over

    def rows(self, shapes: list, steps: int = run.GPU_STEPS, backend: str | None = None) -> Iterator[Item]:
        if self.rehearsed:
            steps = 9
        threads = torch.get_num_threads()
        for dtype, sizes, cells, layers, directions in shapes:
            for (H, N), mode, cell in itertools.product(sizes, ("infer", "train"), cells):
                case = run.Case(cell, dtype, mode, threads, steps, N, H, H, layers, directions)
                name = f"{cell} {dtype} {mode} {steps}x{N}x{H}" + (f" {layers}x{directions}" if layers > 1 else "")
                yield f"{name} {backend}" if backend else name, functools.partial(self.row, case, backend)

    def row(self, case: run.Case, backend: str | None) -> dict[str, Any]:
        rnnfast.set_choice("ours")
        with run.forced(backend or ("cuda" if self.rehearsed else None)):
            # A float64 run of all steps would take longer than all else.
            short = case._replace(T=min(case.T, 8))
            off = run.errors(short, run.contenders(short, self.device, verify=False))
            wrong = run.too_far_off(short, off)
            calls = run.contenders(case, self.device, verify=False)
            ms = run.measure(calls, 1 if self.rehearsed else 3, self.device, 0.001 if self.rehearsed else 0.01)
            row = self.of_machine | run.compared(case, self.device, ms, self.ceiling(case.dtype))
            for name in ("ours", "torch"):
                row |= {f"{name}_off": off[name], f"{name}_wall_ms": self.wall_ms(calls[name])}
            if not self.rehearsed:
                try:
                    row |= run.what_ran(calls)
                except RuntimeError as error:  # without its names a row is still worth much
                    row["torch_ran"] = f"no profiler: {one_line(error)}"
        row = dict.fromkeys((*run.COLUMNS, "ours_off", "torch_off", "ours_wall_ms", "torch_wall_ms", "wrong"), "") | row
        row = run.rounded(row | {"wrong": wrong})
        return {"row": row, "figure": row["ratio_torch"], **({"outcome": "failed", "reason": wrong} if wrong else {})}

    @functools.cached_property
    def of_machine(self) -> dict[str, str]:
        return machine.describe(self.device)

    @functools.cache  # noqa: B019, there is one of this class, as long as the process runs
    def ceiling(self, dtype: str) -> float:
        """GFLOP/s of torch's own product of large squares."""
        set_tf32((False, False))
        # A CPU may take a minute for half types.
        product, gflop = machine.product("float32" if self.rehearsed else dtype, self.device)
        return gflop / statistics.median(machine.times(product, 5, self.device)[2:]) * 1e3

    def wall_ms(self, call: Callable) -> float:
        """Of a call and of waiting for it."""
        found = []
        for _ in range(7):
            start = time.perf_counter()
            call()
            self.wait()
            found.append((time.perf_counter() - start) * 1e3)
        return statistics.median(found)

    def wait(self) -> None:
        if not self.rehearsed:
            torch.cuda.synchronize()

    # What the table of the plan wants

    def costs(self) -> Iterator[Item]:
        rnnfast.backends()  # loads the CUDA library, which is asked for plans before its first call
        yield "machine", self.machine
        calls = itertools.product(
            ("LSTM", "GRU"), ("infer", "train"), ("bfloat16", "tf32"), ("cuda", "triton", "torch")
        )
        for cell, mode, precision, backend in calls if not self.rehearsed else [("GRU", "train", "tf32", "cuda")]:
            name = f"call {cell} {mode} {precision} {backend}"
            yield name, functools.partial(self.of_call, cell, mode, precision, backend)
        layers = itertools.product(("LSTM", "GRU"), ROUNDING, CUT_SIZES.items())
        for cell, precision, (H, batches) in layers if not self.rehearsed else [("LSTM", "tf32", (20, (3,)))]:
            dtype, (tf32, _) = PRECISIONS[precision]
            for N in batches:
                layer = cuda_cuts.Layer(cell, dtype, tf32, H, N, (2, 4) if self.rehearsed else (32, 96), self.device)
                for direction in cuda_cuts.PASSES:
                    for regime, number in layer.cuts(direction):
                        cut = regime if number is None else f"{regime} {number}"
                        name = f"cut {cut} {cell} {precision} {direction} N{N} H{H}"
                        yield name, functools.partial(self.of_cut, layer, direction, regime, number, precision)

    def of_cut(
        self, layer: cuda_cuts.Layer, direction: str, regime: str, number: int | None, precision: str
    ) -> dict[str, Any]:
        found = layer.measure(direction, regime, number)
        if found["error"] < ROUNDING[precision]:
            return found | {"figure": found["error"]}
        return found | {"outcome": "failed", "reason": f"off by {found['error']:.1e} of the largest value"}

    def of_call(self, cell: str, mode: str, precision: str, backend: str) -> dict[str, Any]:
        """Microseconds of a call of one step: of the host alone, which may run ahead, and until the GPU is through."""
        call = self.call(cell, mode, precision, T=1, N=1, H=64, backend=backend)
        count = 3 if self.rehearsed else 100
        with run.forced(backend):
            for _ in range(3):
                call()
            self.wait()
            start = time.perf_counter()
            for _ in range(count):
                call()
            host = (time.perf_counter() - start) / count
            self.wait()
            wall = self.wall_ms(call)
        return {"host_us": host * 1e6, "wall_us": wall * 1e3}

    def call(self, cell: str, mode: str, precision: str, T: int, N: int, H: int, backend: str = "cuda") -> run.Call:
        """A layer of few input features, whose products weigh nothing."""
        dtype, switches = PRECISIONS[precision]
        library = nn if backend == "torch" else rnnfast
        module = getattr(library, cell)(16, H, dtype=dtype, device=self.device)
        inputs = [torch.randn(T, N, 16, dtype=dtype, device=self.device)]
        return run.Call(module, module, inputs, mode, switches)


HALF = PRECISIONS["bfloat16"], 6e-2
# How far two regimes may be apart after 32 steps, by the largest value.
ROUNDING = {"bfloat16": 3e-2, "tf32": 4e-3, "float32": 2e-5}
# Batches by hidden units: where the choice changes.
CUT_SIZES = {
    64: (8, 64, 256, 1024, 4096),
    128: (8, 64, 256, 1024),
    256: (8, 64, 128, 256, 512),
    512: (8, 64, 128, 256),
    1024: (8, 16, 32, 64, 128),
}


def set_tf32(switches: tuple[bool, bool]) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = switches


@contextlib.contextmanager
def forced(backend: str, regime: str | None = None) -> Iterator[None]:
    with rnnfast.use_backend(backend), cuda_cuts.asked_for(regime) if regime else contextlib.nullcontext():
        yield


def outputs_and_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    y, (h, c) = module(x)
    weight = torch.linspace(-1, 1, y.numel()).to(y).view_as(y)
    return [y, h, c, *torch.autograd.grad((y * weight).sum() + h.sum() + c.sum(), [x, *module.parameters()])]


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]


def is_usable() -> bool:
    """Whether the GPU still takes work: after some errors it takes none from this process."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["versions", "cudnn", "costs", "flex", "more"])
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--done", type=Path, required=True)
    parser.add_argument("--without", action="append", default=[], metavar="WORD", help="leave out items of that word")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.rehearse:
        import backends  # noqa: F401, the tests' interpreter and emulation

        torch.set_num_threads(1)
    done = set(args.done.read_text().splitlines())
    with args.report.open("a") as report:

        def say(**line: Any) -> None:
            report.write(json.dumps(line) + "\n")
            report.flush()

        for name, item in getattr(Work("cpu" if args.rehearse else "cuda"), args.stage)():
            if name in done or set(args.without).intersection(name.split()):
                continue
            say(start=name)
            start, failed = time.perf_counter(), False
            try:
                found = {"outcome": "passed", **item()}
            except Exception as error:
                # A regime has no kernels for some sizes.
                failed = "the regime asked for cannot serve this call" not in str(error)
                found = {"outcome": "failed" if failed else "skipped", "reason": one_line(error)}
            say(item=name, seconds=round(time.perf_counter() - start, 2), **found)
            if args.stage == "versions" or (failed and not args.rehearse and not is_usable()):
                sys.exit(AGAIN)


if __name__ == "__main__":
    main()
