"""Which backend serves a call on a GPU: ours are checked where they first run, and raced against torch's kernels.

What was decided stays in memory, so that a call of a kind that is known costs a look into a dictionary. Nothing is run
beside a call that is captured, compiled or transformed, or made within a backward: such a call takes what the tables of
``timings.py`` say. Of several ranks only the first one measures.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from . import contest
from .backends import BACKENDS, DTYPES, OF_DEVICE, OF_TORCH, USUAL, Circumstances, choose_backend, launches_steps
from .cells import GATES
from .contest import Call
from .timings import Key, described, known_of, ranked

MODES = ("table", "measure", "torch", "ours")
RACED = frozenset(name for name, backend in BACKENDS.items() if backend.module)  # those for GPUs
_MOST = 4096  # decisions in memory: the oldest go first
_ROWS = 9  # of a check


class Decision(NamedTuple):
    """A backend, and why."""

    backend: str
    reason: str
    is_final: bool = True  # or nothing could be run, as it can in another call


# The index of a device, whether cuDNN serves, whether a time may be taken (not where results have to be deterministic),
# how many weights there are, and what a Key has, with the dtype itself: hashes of devices take long.
Where = tuple[Any, ...]
_settled: dict[Where, Decision] = {}
_faults: dict[tuple[Any, ...], str | None] = {}  # by backend, device, mode, dtype and more: what a check has found
_told: set[tuple[Any, ...]] = set()  # those of which a warning has told
_settling = threading.Lock()


def _known_mode(mode: str | None) -> str | None:
    if mode and mode not in MODES:
        raise ValueError(f"unknown choice {mode!r}, expected one of {', '.join(MODES)}")
    return mode or None


_mode = _known_mode(os.environ.get("RNNFAST_CHOICE"))


def set_choice(mode: str | None) -> None:
    """Set how the backend of a call on a GPU is chosen, in the whole process from here on.

    Whatever the mode, a backend of ours has to pass a check before it first serves a kind of layer: some steps, forward
    and backward, with at most twice the error of torch's kernels. One that fails is not used, with a warning.

    Args:
        mode: ``"measure"``: where nothing was measured before, the first call of a kind waits for a race, of seven
            calls of each backend; ``"table"``: by what was measured before, here or by us on such a GPU, and else ours;
            ``"torch"``: torch's kernels wherever they can serve; ``"ours"``: never those. None is the default: what
            the environment's ``RNNFAST_CHOICE`` says, or else ``"table"`` on a GPU of which the package has a table,
            and ``"measure"`` on others.

    Raises:
        ValueError: there is no such mode.
    """
    global _mode
    _mode = _known_mode(os.environ.get("RNNFAST_CHOICE") if mode is None else mode)
    forget()


def mode_on(device: torch.device) -> str:
    return _mode or ("table" if known_of(device).shipped else "measure")


def known_on(device: torch.device) -> str:
    """What is known of a GPU, in a line."""
    known = known_of(device)
    found = [f"{len(known.shipped)} times shipped"] * bool(known.shipped)
    found += [f"{len(known.measured)} times measured here, in {known.path}"] * bool(known.measured)
    if not found:
        found = ["no times, `python -m rnnfast tune` measures them"]
    return f"{known.name} ({device}): {' and '.join(found)}; the choice is {mode_on(device)!r}"


def share_choice() -> None:
    """Give all ranks what rank 0 has measured of its current GPU: a collective, which every rank has to call.

    It is for processes that do not share a cache folder. Ranks other than 0 never measure: what rank 0 is the first to
    measure, they take from the tables on disk, or from this.

    Raises:
        ValueError: there is no process group.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    known = known_of(device)
    sent: list[Any] = [(known.fingerprint, known.measured)]
    distributed.broadcast_object_list(sent, src=0)
    if sent[0][0] == known.fingerprint:
        known.measured = sent[0][1]
        _settled.clear()


def forget() -> None:
    """Decide anew, and read the tables anew. What checks have found stays."""
    _settled.clear()
    known_of.cache_clear()


# At every call. To find these takes longer than to ask them.
_precision = torch._C._get_fp32_precision_getter
_is_deterministic, _has_cudnn = torch._C._get_deterministic_algorithms, torch._C._get_cudnn_enabled
_has_gradients, _dispatch_modes = torch.is_grad_enabled, torch._C._len_torch_dispatch_stack
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
_NOT_OF_TORCH = ("lengths", "resets", "return_states", "recompute")


def choose(
    seen: Circumstances, backend: str, mode: str, x: Tensor, h0: Tensor | None, c0: Tensor | None,
    weights: Sequence[Tensor], **options: Any,
) -> str:  # fmt: skip
    """What serves a call of ``functional.rnn``, or without options of ``functional.cell``, in place of a backend."""
    if seen is not USUAL or (_dispatch_modes() and type(x) is not Tensor):  # a fake tensor's sizes may be symbols
        in_torch = mode in OF_TORCH and bool(options) and not seen.transformed and not torch.compiler.is_exporting()
        in_torch = in_torch and all(options[name] is None or options[name] is False for name in _NOT_OF_TORCH)
        return backend if seen.forced else _untried(backend, mode, x.device, x.dtype, in_torch)
    trained = _has_gradients() and (
        weights[0].requires_grad or any(t is not None and t.requires_grad for t in (x, h0, c0, *weights))
    )
    w_hh, of_x = weights[1].shape, x.shape  # of any number of dimensions: nothing is checked yet
    steps, rows, width, more = 1, of_x[0], of_x[-1], ()  # type: int, int, int, Any
    if options:
        batch_sizes, form = options["batch_sizes"], "rectangular"
        if batch_sizes is None:
            steps, rows = rows, of_x[1] if len(of_x) > 1 else 1
        else:
            steps, form = batch_sizes.numel(), "packed"
            rows = -(-rows // (steps or 1))
        for name in _NOT_OF_TORCH:
            if options[name] is not None and options[name] is not False:
                form += f" {name}"
        apart = options["dropout"] > 0 and options["training"] and options["num_layers"] > 1
        more = options["num_layers"], options["bidirectional"], form, apart
    where = where_of(
        mode, x.get_device(), x.dtype, width, w_hh[0] // GATES[mode], w_hh[-1], steps, rows, trained, len(weights),
        *more,
    )  # fmt: skip
    found = _settled.get(where)
    if found is None or not found.is_final:
        found = _settle(where, Call(mode, x, [t for t in (h0, c0) if t is not None], weights, options))
    return found.backend


def where_of(
    mode: str, index: int, dtype: torch.dtype, inputs: int, hidden: int, outputs: int, steps: int, rows: int,
    trained: bool, weights: int, layers: int = 1, bidirectional: bool = False, form: str = "cell", apart: bool = False,
) -> Where:  # fmt: skip
    """What is decided once: calls on a device by what a Key has; those of a cell need not be told their form."""
    is_float = dtype is torch.float32
    return (
        index, _has_cudnn(), not _is_deterministic(), weights, mode, dtype,
        is_float and _precision("cuda", "rnn") == "tf32", is_float and _precision("cuda", "matmul") == "tf32",
        inputs, hidden, outputs, layers, 1 + bidirectional, form, apart, trained,
        steps and 1 << (steps - 1).bit_length(), rows and 1 << (rows - 1).bit_length(),
    )  # fmt: skip


def parts_of(where: Where) -> tuple[torch.device, Key, bool, bool, int]:
    index, has_cudnn, may_measure, weights, mode, dtype, *rest = where
    device = torch.device("cuda", index) if index >= 0 else torch.device("cpu")  # there tests have emulated kernels
    return device, Key(mode, _NAMES[dtype], *rest), has_cudnn, may_measure, weights


def is_faulty(backend: str, mode: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a check of the backend's kernels of such a layer has failed."""
    return any(fault and kind[:4] == (backend, device, mode, dtype) for kind, fault in list(_faults.items()))


def _untried(backend: str, mode: str, device: torch.device, dtype: torch.dtype, in_torch: bool) -> str:
    """What serves where nothing can be run."""
    faulty = is_faulty(backend, mode, device, dtype)
    if in_torch and (faulty or _mode == "torch"):
        return "torch"
    return "reference" if faulty else backend


is_faulty._dynamo_marked_constant = _untried._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explained(where: Where, batch: int) -> Decision:
    """The decision of a call, or what it would be if nothing could be run."""
    return _settled.get(where) or _Question(where, batch).answer()


def _settle(where: Where, call: Call) -> Decision:
    call.check()  # what is wrong with a call is no fault of a backend
    # What a backward has called runs in a thread that others may wait for, so it must wait for nobody.
    if _is_captured(call.x) or torch._C._current_graph_task_id() != -1 or _dispatch_modes():
        if where not in _settled:
            _keep(_settled, where, explained(where, call.batch)._replace(is_final=False))
        return _settled[where]
    with _settling:
        found = _settled.get(where)
        if found is not None and found.is_final:
            return found
        found = _answer(where, call)
        new = {kind: fault for kind, fault in _faults.items() if fault and kind not in _told}
        _told.update(new)
        faulty = {kind[0] for kind in new}
        for other in [other for other, decision in list(_settled.items()) if decision.backend in faulty]:
            _settled.pop(other, None)
        _keep(_settled, where, found)
    for (backend, of, mode, dtype, *_), fault in new.items():
        text = f"rnnfast: backend {backend!r} is not used for this kind of {mode} in {dtype} on {of}: {fault}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    return found


def _answer(where: Where, call: Call) -> Decision:
    """In a thread of its own, where none of the caller's modes, hooks and contexts hold."""
    future: Future[Decision] = Future()

    def work() -> None:
        try:
            future.set_result(_Question(where, call.batch, call).answer_there())
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=work, daemon=True).start()
    except RuntimeError:  # at the interpreter's end, or where there are too many
        return explained(where, call.batch)._replace(is_final=False)
    try:
        return future.result()
    except RuntimeError as error:
        if not contest.is_short_of_memory(error):
            raise
        return explained(where, call.batch)  # for good: each further try would make every call wait


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _keep(table: dict[Any, Any], key: Any, value: Any) -> None:
    table[key] = value
    if len(table) > _MOST:
        table.pop(next(iter(table)), None)


class _Question:
    """Which backend serves a call of so many rows; with the call, what is not known is checked and measured."""

    def __init__(self, where: Where, batch: int, call: Call | None = None) -> None:
        self.device, self.key, self.has_cudnn, self.may_measure, weights = parts_of(where)
        self.batch, self.call, key = batch, call, self.key
        self.per_direction = weights // (key.layers * key.directions)
        self.failed: dict[str, str] = {}
        self.in_torch = key.form in ("rectangular", "packed", "cell") and key.cell in OF_TORCH
        self.of = key.cell, self.device, getattr(torch, key.dtype), key.hidden
        self.rest = key.directions == 2, key.outputs != key.hidden

    def answer_there(self) -> Decision:
        """On the device, with its generator put back where masks of dropout are drawn."""
        gpus = [self.device] if self.device.type == "cuda" else []  # on a CPU tests have emulated kernels
        with torch.random.fork_rng(gpus, enabled=self.key.apart), torch.cuda.device(gpus[0] if gpus else -1):
            return self.answer()

    def answer(self) -> Decision:
        layer, mode = (*self.of, self.batch, *self.rest), mode_on(self.device)
        is_open = self.in_torch and mode != "ours"
        ours = {}
        for name in OF_DEVICE[self.device.type]:
            try:
                _, reason = choose_backend(Circumstances(forced=name), *layer)
            except ImportError as error:  # of its module
                self.failed[name] = fault = f"{type(error).__name__}: {error}"
                _keep(_faults, (name, self.device, self.key.cell, self.of[2]), fault)
            except RuntimeError:  # it is not here
                continue
            else:
                if not (is_open and launches_steps(name, reason)):
                    ours[name] = reason
        if not (ours or self.failed):
            return Decision(*choose_backend(USUAL, *layer, extended=not is_open))
        names, why = list(ours), "asked for" if self.in_torch else "torch's kernels cannot serve the call"
        if is_open:
            names, why = ([], "asked for") if mode == "torch" else self.ranking(names, mode)
        found = next(filter(self.passes, names), "torch" if self.in_torch else "reference")
        if found in ours:
            return Decision(found, f"{ours[found]}; {why}")
        return Decision(
            found, "; ".join([why, *(f"{name} has failed: {fault}" for name, fault in self.failed.items())])
        )

    def ranking(self, ours: list[str], mode: str) -> tuple[list[str], str]:
        """Those of ours that are to serve rather than torch's kernels, the best first, and why."""
        key, call, known = self.key, self.call, known_of(self.device)
        is_first = not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
        measures = call is not None and mode == "measure" and self.may_measure and is_first
        # All times are of cuDNN, and none of calls without elements.
        is_timed = self.has_cudnn and 0 not in (key.inputs, key.hidden, key.outputs, key.steps, key.rows)
        for times, source in known.times(key, nearest=not measures) if is_timed else ():
            here = {name: ms for name, ms in times.items() if name in ("torch", *ours)}
            is_whole = not measures or all(name in here or not self.passes(name) for name in ours)
            if len(here) > 1 and is_whole:
                return ranked(here), f"{source}: {described(here)}"
        passed = list(filter(self.passes, ours))
        if call is None or not (measures and is_timed and passed):
            return passed, "nothing was measured"
        times, errors = contest.race(call, ["torch", *passed], key.trained)
        for name in errors.keys() - {"torch"}:
            _keep(_faults, self.kind(name, self.batch), errors[name])
            self.passes(name)  # not any more, which is to be told
        if len(times) > 1:
            known.add(key, times)
        return ranked(times), f"measured here: {described(times)}"

    def kind(self, name: str, batch: int) -> tuple[Any, ...]:
        """What a check of a backend holds for."""
        key, reason = self.key, BACKENDS[name].load().reason
        cell, device, *of = self.of
        plans = (reason(device, cell, *of, batch, *self.rest, backward) for backward in (False, True))
        form = key.inputs > 0, key.outputs, key.tf32, key.products_tf32, key.directions, self.per_direction, key.form
        return name, device, cell, *of, *form, *plans

    def passes(self, name: str) -> bool:
        """Whether nothing is known to be wrong with a backend; with a call that is found out."""
        kind = self.kind(name, self.batch)
        if kind not in _faults and self.call is not None:
            alike = self.batch == 0 or self.kind(name, _ROWS) == kind
            rows = _ROWS if alike else self.batch
            tf32 = self.key.tf32 or self.key.products_tf32
            _keep(_faults, kind, contest.fault(self.call, name, rows, self.in_torch, tf32))
        fault = _faults.get(kind)
        if fault:
            self.failed[name] = fault
        return not fault
