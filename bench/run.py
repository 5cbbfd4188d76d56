"""rnnfast, torch.nn and every other runtime that is installed, timed in turn in one run: a CSV row for each case.

    python bench/run.py            # the default table, a few minutes
    python bench/run.py --gpu      # the table for a GPU, under ten minutes
    python bench/run.py --quick    # does it all work? seconds

Letters: T steps, N batch, I input features, H hidden units, G gates (LSTM 4, GRU 3, RNN 1).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import itertools
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import machine
import peers
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import rnnfast
from rnnfast import cells

SHAPES = ["100x64x64", "100x32x128", "100x32x256", "100x1x256", "50x64x512"]
SHAPES += ["100x1x512", "50x32x1024", "37x12x200", "200x8x96"]
GATES = {"LSTM": cells.GATES["LSTM"], "GRU": cells.GATES["GRU"], "RNN": cells.GATES["RNN_TANH"]}  # of torch.nn's layers
PEERS = ("onnxruntime", "openvino")  # what may stand beside torch.nn
# The table of --gpu: of each dtype the H and N of one layer, then of two bidirectional ones. All of 256 steps.
GPU_STEPS = 256
GPU_SHAPES = [
    ("bfloat16", (64, 128, 256, 512, 1024), (1, 16, 64, 256), 1, 1),
    ("float32", (64, 256, 1024), (1, 64), 1, 1),
    ("float16", (128, 512), (1, 64), 1, 1),
    ("bfloat16", (128, 512), (64,), 2, 2),
]
# Whether float32 may become TF32 on a GPU, by the suffix of a contender: in recurrent layers, and in other products.
TF32 = {"": (False, False), "_tf32": (True, True), "_default": (True, False)}  # the last is torch's own default
BURST = 0.02  # seconds that one contender runs before the next one has its turn
LONG = 50  # milliseconds of a call that is worth no other to warm up
PAUSE = 0.02  # and rests before it: the threads of an OpenMP team spin for about 15 ms after their last work


class Case(NamedTuple):
    """What is timed: the part of a row that identifies it."""

    cell: str
    dtype: str
    mode: str  # infer, forward (with a graph for autograd) or train (forward and backward)
    threads: int
    T: int
    N: int
    I: int
    H: int
    layers: int = 1
    directions: int = 1
    form: str = "rectangular"  # packed: of ragged rows; lengths: the same rows, padded

    @property
    def row_lengths(self) -> Tensor:
        """Valid steps of each row: all of them, or from 55 % of T up."""
        first = self.T if self.form == "rectangular" else 0.55 * self.T
        return torch.linspace(first, self.T, self.N).round().long() if self.N > 1 else torch.tensor([self.T])

    @property
    def gflop(self) -> float:
        """Of the matrix products; those of the backward are twice those of the forward."""
        inputs = [self.I] + [self.directions * self.H] * (self.layers - 1)
        per_step = sum(2 * GATES[self.cell] * self.H * (i + self.H) for i in inputs) * self.directions
        return int(self.row_lengths.sum()) * per_step * (3 if self.mode == "train" else 1) / 1e9


COLUMNS = [
    *("machine", "versions", "commit", "device", *Case._fields),
    *("ours_ms", "torch_ms", *(f"{peer}_ms" for peer in PEERS), "best_peer", "ratio_torch", "ratio_best"),
    "ours_step_us",
    *("ours_tf32_ms", "torch_tf32_ms", "ratio_tf32", "ours_default_ms", "torch_default_ms", "ratio_default"),
    *("ours_ran", "ours_tf32_ran", "ours_default_ran", "torch_ran", "torch_tf32_ran", "torch_default_ran"),
    *("ours_gpu_ms", "torch_gpu_ms", "ours_kernels"),
    *("gflops", "ceiling_gflops", "share_of_ceiling"),
    *("ours_kept_mb", "ours_recompute_kept_mb", "torch_kept_mb", "ours_peak_mb", "torch_peak_mb", "elsewhere"),
]


def contenders(case: Case, device: str = "cpu", verify: bool = True) -> dict[str, Callable[[], list[Tensor]]]:
    """By name a call of each contender on the same weights and inputs; ours and torch's first.

    Args:
        verify: whether to compare results, which runs each contender.

    Raises:
        RuntimeError: a result differs from torch.nn's in float64 by more than rounding.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    options = {"num_layers": case.layers, "bidirectional": case.directions == 2, "device": device, "dtype": dtype}
    theirs = getattr(nn, case.cell)(case.I, case.H, **options)
    ours = getattr(rnnfast, case.cell)(case.I, case.H, **options)
    ours.load_state_dict(theirs.state_dict())
    lengths = case.row_lengths
    # A GPU would find one and the same input in its cache each time.
    inputs = [
        torch.randn(case.T, case.N, case.I, dtype=dtype, device=device) for _ in range(4 if device == "cuda" else 1)
    ]
    if case.form == "packed":
        inputs = [pack_padded_sequence(x, lengths, enforce_sorted=False) for x in inputs]

    functions = {"ours": ours, "torch": theirs}
    if case.form == "lengths":
        functions = {
            "ours": functools.partial(ours, lengths=lengths.to(device)),
            "torch": _pack_and_pad(theirs, lengths),
        }
    if device == "cuda":
        suffixes = TF32 if case.dtype == "float32" else [""]
        calls = {
            f"{name}{suffix}": Call(function, module, inputs, case.mode, TF32[suffix])
            for suffix in suffixes
            for (name, function), module in zip(functions.items(), (ours, theirs))
        }
    else:
        calls = {
            name: Call(function, module, inputs, case.mode)
            for (name, function), module in zip(functions.items(), (ours, theirs))
        }
        if (case.mode, case.dtype, case.form) == ("infer", "float32", "rectangular"):
            x = inputs[0].numpy()
            for name, run in peers.runners(theirs, case.T, case.N, case.threads).items():
                calls[name] = lambda run=run: [torch.from_numpy(run(x))]
    if verify and (wrong := too_far_off(case, errors(case, calls))):
        raise RuntimeError(f"{wrong}: {case}")
    return calls


def errors(case: Case, calls: dict[str, Callable[[], list[Tensor]]]) -> dict[str, float]:
    """How far each call that was not made before is off torch.nn's result in float64, by the largest value.

    In the dtype itself torch.nn's sums over many steps are no measure, least of all in the half types.
    """
    theirs, wide = calls["torch"], torch.float64
    exact = copy.deepcopy(theirs.module).to(wide)
    function = _pack_and_pad(exact, case.row_lengths) if case.form == "lengths" else exact
    expected = Call(function, exact, [_detached(x).to(wide) for x in theirs.inputs[:1]], case.mode)()
    return {
        name: max(
            ((a - e).abs().max() / e.abs().max().clamp(min=1e-9)).item()  # of a single step dW_hh is zero
            for a, e in zip(call(), expected, strict=True)
        )
        for name, call in calls.items()
    }


def too_far_off(case: Case, off: dict[str, float]) -> str:
    """Which result differs from torch.nn's in float64 by more than rounding, and by how much; empty if none does."""
    for name in off.keys() - {f"torch{suffix}" for suffix in TF32}:
        dtype = getattr(torch, case.dtype)
        eps = 2**-10 if name in ("ours_tf32", "ours_default") else torch.finfo(dtype).eps
        # Sums over very many steps can cancel: there torch.nn's own error is allowed for.
        allowed = max(eps**0.5, 2 * off["torch"] if dtype.itemsize > 2 else 0)
        if not off[name] < allowed:
            return f"{name} is off by {off[name]:.1e} of the largest value"
    return ""


class Call:
    """One contender on rotated inputs: its output, or for ``train`` the gradients of input and weights."""

    def __init__(
        self,
        function: Callable,
        module: nn.Module,
        inputs: list[Tensor | PackedSequence],
        mode: str,
        tf32: tuple[bool, bool] | None = None,
    ):
        """Args: tf32: as in TF32; None leaves torch's switches alone."""
        self.function, self.module, self.mode, self.tf32 = function, module, mode, tf32
        self.parameters = list(module.train(mode != "infer").parameters())
        self.inputs = [_copy(x, requires_grad=mode != "infer") for x in inputs]
        self.rotated = itertools.cycle(self.inputs)
        self.d_output = None

    def switch(self) -> None:
        """Sets both of torch's switches: recurrent layers have one of their own, and ours also make products."""
        if self.tf32:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self.tf32

    def __call__(self) -> list[Tensor]:
        self.switch()
        x = next(self.rotated)
        with torch.set_grad_enabled(self.mode != "infer"):
            output = _data(self.function(x)[0])
        if self.mode != "train":
            return [output.detach()]
        if self.d_output is None:
            self.d_output = torch.linspace(-1, 1, output.numel()).to(output).view_as(output)
        return list(torch.autograd.grad(output, [_data(x), *self.parameters], self.d_output))

    def kept_mb(self) -> float:
        """MB that autograd keeps for the backward, each storage once; weights and inputs live anyway: not counted."""
        kept = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self()
        for given in [*self.parameters, *map(_data, self.inputs)]:
            kept.pop(given.untyped_storage().data_ptr(), None)
        return sum(kept.values()) / 1e6


def peak_mb(case: Case, device: str, name: str, backend: str | None) -> float:
    """MB that one call takes beyond what is there before it, scratch and caches included. For a process of its own."""
    if device == "cpu":
        torch.set_num_threads(case.threads)
    with forced(backend):
        return machine.peak_mb(contenders(case, device, verify=False)[name], device)


def forced(backend: str | None) -> contextlib.AbstractContextManager:
    """Ours on this backend; None: on the one that it chooses."""
    return rnnfast.use_backend(backend) if backend else contextlib.nullcontext()


def _data(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def _copy(x: Tensor | PackedSequence, requires_grad: bool) -> Tensor | PackedSequence:
    data = _data(x).clone().requires_grad_(requires_grad)
    return x._replace(data=data) if isinstance(x, PackedSequence) else data


def _detached(x: Tensor | PackedSequence) -> Tensor | PackedSequence:
    return x._replace(data=x.data.detach()) if isinstance(x, PackedSequence) else x.detach()


def _pack_and_pad(module: nn.Module, lengths: Tensor) -> Callable:
    """What one writes with torch.nn for padded rows of several lengths."""
    return lambda x: pad_packed_sequence(module(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])


def what_ran(calls: dict[str, Callable]) -> dict[str, str | float]:
    """On a GPU, of ours the backend and its kind of kernel, of torch.nn the names of the kernels, and their time."""
    found = {}
    for suffix in TF32:
        if f"ours{suffix}" in calls:
            ours = calls[f"ours{suffix}"]
            ours.switch()
            choice = rnnfast.explain(ours.module, ours.inputs[0])[0]
            found[f"ours{suffix}_ran"] = f"{choice.backend} {choice.reason.partition(':')[0]}"
            found[f"torch{suffix}_ran"] = ";".join(kernels := profiled(calls[f"torch{suffix}"]))
            if not suffix:
                own = profiled(ours)
                found |= {"ours_gpu_ms": sum(own.values()), "torch_gpu_ms": sum(kernels.values())}
                found["ours_kernels"] = ";".join(f"{name} {ms:.3g}" for name, ms in own.items())
    return found


def profiled(call: Callable) -> dict[str, float]:
    """The kernels of a call, and the milliseconds that each takes in all, by name without types and arguments."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            name = shortened(event.name)
            found[name] = found.get(name, 0) + event.time_range.elapsed_us() / 1e3
    return found


def shortened(kernel: str) -> str:
    """``void at::native::(anonymous namespace)::f<float, 4>(int)`` is ``f``."""
    name = re.sub(r"\(anonymous namespace\)::|^void ", "", kernel)
    return re.split(r"[<(]", name)[0].split("::")[-1]


def measure(calls: dict[str, Callable], rounds: int, device: str, burst: float = BURST) -> dict[str, float]:
    """Milliseconds of each call. In every round each has its turn, of several calls where they are short.

    A machine may be a half faster for some seconds than in the next ones, as others use it or not, and medians over
    all rounds could then be of other seconds for each. So what counts of a call is the median of its share in what a
    round took, times the median round.
    """
    # The first calls are slow, of all and after each rest: they do not count, neither where the length of a burst is
    # chosen, or it would be a shorter one, nor in it. Of a long call one more would cost much and change little.
    bursts = {}
    for name, call in calls.items():
        estimate = min(machine.times(call, 2, device))
        is_long = estimate > LONG
        if not is_long:
            estimate = statistics.median(machine.times(call, 20, device))
        count = max(1, min(1000, round(burst * 1e3 / estimate)))
        bursts[name] = 0 if is_long else 1 + count // 10, count
    of_rounds, shares = [], {name: [] for name in calls}
    for i in range(rounds):
        medians = {}
        for name in list(calls)[:: -1 if i % 2 else 1]:  # nobody always follows the same one
            first, count = bursts[name]
            time.sleep(PAUSE if device == "cpu" else 0)
            medians[name] = statistics.median(machine.times(calls[name], first + count, device)[first:])
        of_rounds.append(statistics.geometric_mean(medians.values()))
        for name, median in medians.items():
            shares[name].append(median / of_rounds[-1])
    return {name: statistics.median(of_rounds) * statistics.median(of_name) for name, of_name in shares.items()}


def row_of(
    case: Case,
    device: str,
    rounds: int,
    burst: float = BURST,
    attempts: int = 2,
    memory: bool = False,
    backend: str | None = None,
) -> dict[str, Any]:
    """Everything about one case but for the machine. While others use it, it is measured again; the quietest counts."""
    if device == "cpu":
        torch.set_num_threads(case.threads)
    calls = contenders(case, device)
    product, product_gflop = machine.product(case.dtype, device)
    tries = []
    while len(tries) < attempts and not (tries and tries[-1][0] < 0.05):
        with machine.Elsewhere() as elsewhere:
            ms = measure(calls | {"product": product}, rounds, device, burst)
        tries.append((elsewhere.cores, ms))
    elsewhere, ms = min(tries, key=lambda found: found[0])
    ceiling = product_gflop / ms.pop("product") * 1e3
    kept = {}
    if case.mode != "infer":
        kept = {f"{name}_kept_mb": calls[name].kept_mb() for name in ("ours", "torch")}
        calls["ours"].module.recompute = True
        kept["ours_recompute_kept_mb"] = calls["ours"].kept_mb()
    if memory:
        for name in ("ours", "torch"):
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                kept[f"{name}_peak_mb"] = fresh.apply(peak_mb, (case, device, name, backend))
    row = compared(case, device, ms, ceiling) | kept | {"elsewhere": elsewhere}
    return rounded(row | (what_ran(calls) if device == "cuda" else {}))


def compared(case: Case, device: str, ms: dict[str, float], ceiling: float) -> dict[str, Any]:
    """The columns that follow from the milliseconds of each contender, and from the ceiling in GFLOP/s."""
    others = {name: value for name, value in ms.items() if name in ("torch", *PEERS)}
    best_peer = min(others, key=others.get)
    gflops = case.gflop / ms["ours"] * 1e3
    row = {"device": device, **case._asdict(), **{f"{name}_ms": value for name, value in ms.items()}}
    row["ours_step_us"] = ms["ours"] * 1e3 / (case.T * case.layers)
    row |= {"best_peer": best_peer, "ratio_torch": ms["torch"] / ms["ours"], "ratio_best": ms[best_peer] / ms["ours"]}
    for suffix in ("_tf32", "_default"):
        if f"ours{suffix}" in ms:
            row[f"ratio{suffix}"] = ms[f"torch{suffix}"] / ms[f"ours{suffix}"]
    return row | {"gflops": gflops, "ceiling_gflops": ceiling, "share_of_ceiling": gflops / ceiling}


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Its floats to four digits."""
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The product of all options; with the default shapes and forms also three rows of another kind."""
    if args.gpu:
        for (dtype, *sizes, layers, directions), cell, mode in itertools.product(GPU_SHAPES, args.cells, args.modes):
            for H, N in itertools.product(*sizes):
                yield Case(cell, dtype, mode, args.threads[0], GPU_STEPS, N, H, H, layers, directions)
        return
    default = (
        not (args.shapes or args.quick) and args.forms == ["rectangular"] and args.layers == args.bidirectional == [1]
    )
    shapes = args.shapes or (["20x4x32"] if args.quick else SHAPES)
    for cell, mode, threads in itertools.product(args.cells, args.modes, args.threads):
        for dtype, shape, layers, directions, form in itertools.product(
            args.dtypes, shapes, args.layers, args.bidirectional, args.forms
        ):
            T, N, *I, H = map(int, shape.split("x"))
            yield Case(cell, dtype, mode, threads, T, N, I[0] if I else H, H, layers, directions, form)
        if default:
            yield Case(cell, "float32", mode, threads, 1, 1, 256, 256)
            yield Case(cell, "float32", mode, threads, 100, 16, 256, 256, form="packed")
            yield Case(cell, "bfloat16", mode, threads, 100, 32, 256, 256, layers=2, directions=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument, nargs="+")
    add("--cells", default=list(GATES), choices=GATES)
    add("--dtypes", default=["float32"], choices=["float32", "float64", "bfloat16", "float16"])
    add("--modes", default=["infer", "train"], choices=["infer", "forward", "train"])
    add("--threads", default=[torch.get_num_threads()], type=int)
    add("--shapes", metavar="TxNxH", help="or TxNxIxH")
    add("--forms", default=["rectangular"], choices=["rectangular", "packed", "lengths"])
    add("--layers", default=[1], type=int)
    add("--bidirectional", default=[1], type=int, choices=[1, 2], help="directions", metavar="DIRECTIONS")
    parser.add_argument("--repeats", type=int, help="rounds in which each contender has a turn (7, quick: 2)")
    parser.add_argument("--gpu", action="store_true", help="the table for a GPU, of --cells and --modes")
    parser.add_argument("--memory", action="store_true", help="peak memory too, from fresh processes (takes minutes)")
    parser.add_argument("--quick", action="store_true", help="one small shape and little patience: no numbers to trust")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", choices=["triton", "cuda"], help="ours on this one (the one that it chooses)")
    parser.add_argument("--out", type=Path, help="the CSV (results/<machine>.csv)")
    args = parser.parse_args()
    if args.gpu and args.device == "cpu":
        parser.error("the table of --gpu would take a CPU hours")

    of_machine = machine.describe(args.device)
    name = re.sub(r"[^a-z0-9]+", "-", of_machine["machine"].lower()).strip("-")
    path = args.out or Path(__file__).parent / "results" / f"{name}{'-quick' if args.quick else ''}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.quick:
        patience = args.repeats or 2, 0.002, 1
    else:
        patience = (args.repeats or 5, 0.01, 1) if args.gpu else (args.repeats or 7,)
    rows = []
    with path.open("w", newline="") as file, forced(args.backend):
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        for case in (bar := tqdm(list(cases(args)))):
            bar.set_description(f"{case.cell} {case.mode} {case.T}x{case.N}x{case.H}")
            row = row_of(case, args.device, *patience, memory=args.memory, backend=args.backend)
            rows.append(row)
            table.writerow(of_machine | row)
            file.flush()

    print(f"{path}: {of_machine['machine']}; {of_machine['versions']}; {of_machine['commit']}\n")
    print(f"{'':14}{'to torch.nn':>22}{'to the best peer':>22}\n{'':14}" + f"{'geomean':>12}{'minimum':>10}" * 2)
    for group in sorted({(row["cell"], row["mode"]) for row in rows}):
        of_group = [row for row in rows if (row["cell"], row["mode"]) == group]
        print(f"{' '.join(group):14}", end="")
        for column in ("ratio_torch", "ratio_best"):
            ratios = [float(row[column]) for row in of_group]
            print(f"{statistics.geometric_mean(ratios):12.2f}{min(ratios):10.2f}", end="")
        print()


if __name__ == "__main__":
    main()
