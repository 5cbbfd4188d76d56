"""Compiles what layers' calls launch for a GPU that is only named, and launches nothing.

    python tests/named_gpu.py sm_90            # few calls, with every two values of the options in one of them
    python tests/named_gpu.py sm_90 --all      # every cell, dtype, size, form and state
    python tests/named_gpu.py sm_90 --flex     # cells of one's own

The calls are made on a CPU, so all is real up to the launch: what a layer hands to Triton, and how Triton specialises
its kernels on that, which no signature written by hand would tell. The exit code is 1 if a kernel does not compile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from covering import covering
from helpers import CELLS, FORMS, chooser, layer, load, states_of
from torch.nn.utils.rnn import pack_padded_sequence
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import rnnfast
from rnnfast.triton import layer as launches

TARGETS = load("bench/resources.py").TARGETS


class NamedGPU(DriverBase):
    """What Triton asks of the driver of its GPU."""

    def __init__(self, target: GPUTarget, shared_memory: int) -> None:
        self.target = target
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared_memory, "warpSize": target.warp_size},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None


class Call(NamedTuple):
    cell: str
    dtype: str
    hidden: int
    form: str
    given_hx: bool
    trained: bool
    batch: int = 5
    bidirectional: bool = True
    bias: bool = True
    tf32: bool = False
    return_states: bool = False


SIZES = (2, 16, 40, 128, 300)
DTYPES = ("bfloat16", "float16", "float32", "float64")
ALL = [Call(*values) for values in itertools.product(CELLS, DTYPES, SIZES, FORMS, (False, True), (False, True))]
# In the last, many rows make other tiles.
MORE = (CELLS, DTYPES, SIZES, FORMS, *[(False, True)] * 2, (5, 1300), *[(False, True)] * 4)


def few(strength: int) -> list[Call]:
    calls = [Call(*values) for values in itertools.product(*MORE)]
    calls = [c for c in calls if not (c.tf32 and c.dtype != "float32") and not (c.batch > 5 and c.hidden == 300)]
    return [calls[i] for i in sorted(covering(calls, strength))]


def make(call: Call) -> None:
    """A call, and if it is trained its backward."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if call.tf32 else "ieee"
    dtype, T = getattr(torch, call.dtype), 3
    module = layer(call.cell, call.hidden, 8, dtype, bidirectional=call.bidirectional, bias=call.bias)
    x = torch.randn(T, call.batch, 8, dtype=dtype, requires_grad=call.trained)
    hx, options = None, {}
    if call.given_hx:
        hx = states_of(module, call.batch)
        hx = tuple(s.to(dtype) for s in hx) if isinstance(hx, tuple) else hx.to(dtype)
    if call.form == "packed":
        x = pack_padded_sequence(x, torch.tensor([3, 1] + [1] * (call.batch - 2)))
    elif call.form == "lengths":
        options["lengths"] = torch.tensor([3, 0] + [2] * (call.batch - 2))
    elif call.form == "resets":
        options["resets"] = torch.rand(T, call.batch) < 0.5
    if call.return_states:
        options["return_states"] = True
    with torch.set_grad_enabled(call.trained):
        y, *_ = module(x, hx, **options)
    if call.trained:
        (y.data if call.form == "packed" else y).sum().backward()


class FlexCall(NamedTuple):
    cell: str
    dtype: str
    hidden: int
    form: str
    trained: bool
    options: dict[str, Any]


FLEX = [
    FlexCall("slstm", "float32", 256, "resets", True, {"num_heads": 4, "bidirectional": True}),
    FlexCall("janet", "bfloat16", 5, "lengths", True, {"bias": False}),
    FlexCall("slstm", "bfloat16", 600, "resets", True, {"num_heads": 2}),
    FlexCall("sru", "float16", 40, "rectangular", True, {}),
    FlexCall("leaky_rnn", "float64", 3, "rectangular", False, {"recurrent": "diagonal"}),
    FlexCall("LSTM", "bfloat16", 40, "lengths", True, {"layer_norm": True, "zoneout": 0.1}),
    FlexCall("GRU", "float32", 1, "resets", True, {"layer_norm": True, "state_clip": 0.1}),
    FlexCall("RNN", "float32", 300, "rectangular", True, {"layer_norm": True, "num_heads": 2}),
]


def make_flex(call: FlexCall) -> None:
    dtype = getattr(torch, call.dtype)
    is_torchs = call.cell in ("LSTM", "GRU", "RNN")
    of = getattr(rnnfast, call.cell) if is_torchs else partial(rnnfast.FlexRNN, getattr(rnnfast.cells, call.cell))
    net = of(8, call.hidden, dtype=dtype, **call.options)
    options = {"lengths": torch.tensor([3, 0, 2])} if call.form == "lengths" else {}
    options |= {"resets": torch.rand(3, 3) < 0.5} if call.form == "resets" else {}
    with torch.set_grad_enabled(call.trained):
        y, _ = net(torch.randn(3, 3, 8, dtype=dtype), **options)
    if call.trained:
        y.sum().backward()


def start(target: str) -> None:
    named, chip = TARGETS[target]
    torch.set_num_threads(1)
    chooser._INTERPRETED = True  # so that Triton serves tensors on a CPU
    launches._chip = lambda device: chip
    triton.runtime.driver.set_active(NamedGPU(named, chip.shared_memory))


def failure(call: Call | FlexCall) -> str | None:
    try:
        with rnnfast.use_backend("triton"):
            (make if isinstance(call, Call) else make_flex)(call)
    except Exception:
        return traceback.format_exc()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--strength", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    calls = FLEX if args.flex else ALL if args.all else few(args.strength)
    began, bad = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(args.workers, initializer=start, initargs=(args.target,)) as pool:
            for call, why in zip(calls, pool.map(failure, calls)):
                if why:
                    bad += 1
                    print(f"{call}\n{why}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{args.target}, Triton {triton.__version__}: {len(calls)} calls, {bad} fail; {seconds:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
