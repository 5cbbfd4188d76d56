"""A backend run beside others on tensors of its own: whether its numbers are right, and how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .backends import use_backend
from .border import check_layer
from .cells import GATES, HAS_CELL_STATE, MODES
from .records import Inputs, names_of
from .timings import Times

_WARM_UPS, _TIMED, _SECONDS = 2, 5, 0.1  # of a race; its time begins when each has run once
_STEPS = 4  # of a check
# Of a check, relative to the largest value: a few roundings of the dtype, as in the tests.
_FLOORS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
_FLOOR_OF_TF32 = 2e-3
_clock = time.perf_counter


class Call(NamedTuple):
    """A call of ``functional.rnn``, or without options of ``functional.cell``."""

    mode: str
    x: Tensor
    hx: Sequence[Tensor]
    weights: Sequence[Tensor]
    options: dict[str, Any]

    @property
    def batch(self) -> int:
        sizes = self.options.get("batch_sizes")
        return self.x.size(-2) if sizes is None else int(sizes[0])

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x, *self.hx, *self.weights]

    def run(self, backend: str, trained: bool) -> list[Tensor]:
        """All outputs and, if trained, the gradients of half their squares' sum."""
        call: Any = functional.rnn if self.options else functional.cell
        with use_backend(backend), torch.set_grad_enabled(trained):
            found = call(self.mode, self.x, self.hx or None, self.weights, **self.options)
        outputs = [t for t in _tensors(found) if t.numel()]
        if not (trained and outputs):
            return outputs
        grads = torch.autograd.grad(outputs, self.tensors, [t.detach() for t in outputs], materialize_grads=True)
        return [*outputs, *(t for t in grads if t.numel())]

    def check(self) -> None:
        """As the operators of our backends check every layer: raises what they would."""
        x, hx, options = self.x, list(self.hx), self.options
        if not options:
            x, hx = x.unsqueeze(0), [h.unsqueeze(0) for h in hx]
        bidirectional, layers = options.get("bidirectional", False), options.get("num_layers", 1)
        directions, per_layer = 1 + bidirectional, len(self.weights) // layers
        given = (options.get(name) for name in ("batch_sizes", "lengths", "resets"))
        form = *given, bidirectional, names_of(self.mode, per_layer // directions)
        for k in range(layers):
            weights = self.weights[k * per_layer : (k + 1) * per_layer]
            h0, c0 = (*(h[k * directions : (k + 1) * directions] for h in hx), None, None)[:2]
            sizes = check_layer(Inputs._make((self.mode, x, h0, c0, *form, weights)))
            x = x.new_empty(1).expand(*sizes.rows, directions * sizes.P)

    def twin(self) -> Call:
        """Of the same sizes, with values of its own."""
        tensors = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in self.tensors]
        generator = torch.Generator(self.x.device)  # torch's own may serve other threads meanwhile
        has_kink = any(op == "relu" for op, _ in MODES[self.mode].program.operations)
        for i, t in enumerate(tensors):
            scale = 1.0 if i <= len(self.hx) else max(t.size(-1), 1) ** -0.5 if t.dim() > 1 else 0.5
            t.uniform_(-scale, scale, generator=generator)
            if has_kink:  # units that are clearly on or off: at the kink rounding picks the gradient
                t.abs_()
                if i > len(self.hx):
                    t.mul_(scale)[1::2].neg_()
        return self.of(tensors)

    def of(self, tensors: Sequence[Tensor]) -> Call:
        """With other values."""
        # Of Parameters torch's kernels are spared a copy in each call: see aten.py.
        made = [nn.Parameter(t) if isinstance(old, nn.Parameter) else t for t, old in zip(tensors, self.tensors)]
        x, *others = (t.requires_grad_() for t in made)
        return self._replace(x=x, hx=others[: len(self.hx)], weights=others[len(self.hx) :])

    def exact(self) -> Call:
        """The same in float64."""
        return self.of([t.detach().double() for t in self.tensors])

    def small(self, rows: int) -> Call:
        """Its first layer over few steps of some rows, from a state that is given."""
        x, options, of_rows = self.x, dict(self.options), [rows]
        count = len(self.weights)
        if options:
            count //= options["num_layers"]
            of_rows, options["num_layers"] = [1 + options["bidirectional"], rows], 1
            if options["batch_sizes"] is None:
                x = _like(x, _STEPS, rows)
            else:
                options["batch_sizes"] = torch.tensor([rows - t * rows // _STEPS for t in range(_STEPS)])
                x = _like(x, int(options["batch_sizes"].sum()))
            if options["lengths"] is not None:
                options["lengths"] = torch.arange(rows, device=x.device) % (_STEPS + 1)
            if options["resets"] is not None:
                options["resets"] = torch.arange(_STEPS * rows, device=x.device).view(_STEPS, rows) % 3 == 0
        else:
            x = _like(x, rows)
        widths = self.weights[1].size(1), self.weights[0].size(0) // GATES[self.mode]
        hx = [x.new_empty(*of_rows, width) for width in widths[: 1 + HAS_CELL_STATE[self.mode]]]
        return self._replace(x=x, hx=hx, weights=self.weights[:count], options=options).twin()


def _like(t: Tensor, *sizes: int) -> Tensor:
    """Of the same width."""
    return t.new_empty(*sizes, t.size(-1))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    return [] if value is None else [value]


def is_short_of_memory(error: BaseException) -> bool:
    """Of which no backend is guilty. CUDA's libraries say it in their own words."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def _attempt(call: Call, backend: str, trained: bool) -> tuple[list[Tensor], str | None]:
    """What a backend makes of a call, or what it raises, but where memory is short."""
    try:
        found = call.run(backend, trained)
        _wait(call.x.device)
        return found, None
    except Exception as error:
        if is_short_of_memory(error):
            raise
        return [], f"{type(error).__name__}: {error}"


def fault(call: Call, backend: str, rows: int, in_torch: bool, tf32: bool) -> str | None:
    """What is wrong with a backend's outputs and gradients in a small call of some rows, if anything.

    As in the tests, they may be off from float64 by twice what torch's kernels are, or where those cannot serve or fail
    plain torch, plus a few roundings.
    """
    small = call.small(rows)
    actual, error = _attempt(small, backend, True)
    if error:
        return error
    exact = small.exact().run("reference", True)
    baseline, error = _attempt(small, "torch", True) if in_torch else ([], "it cannot serve")
    if error:
        baseline = small.run("reference", True)
    floor = _FLOOR_OF_TF32 if tf32 else _FLOORS[call.x.dtype]
    for a, b, e in zip(actual, baseline, exact):
        off, of_torch, scale = torch.stack([(a - e).abs().max(), (b - e).abs().max(), e.abs().max()]).tolist()
        if not off <= 2 * of_torch + floor * scale:  # NaN is no number that this holds for
            what = "an output" if a.requires_grad else "a gradient"
            return f"{what} is off by {off:.2e}, torch by {of_torch:.2e}, of {scale:.2e}"
    return None


def race(call: Call, backends: Sequence[str], trained: bool) -> tuple[Times, dict[str, str]]:
    """The median time of each, which take turns; and of those that failed, why."""
    call, device = call.twin(), call.x.device
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    errors: dict[str, str] = {}
    began = _clock()
    for turn in range(_WARM_UPS + _TIMED):
        for name in list(seconds)[:: 1 - 2 * (turn % 2)]:
            _wait(device)
            start = _clock()
            _, error = _attempt(call, name, trained)
            if error:
                errors[name] = error
                del seconds[name]
                continue
            seconds[name].append(_clock() - start)
        if turn == 0:  # kernels were compiled
            began = _clock()
        elif _clock() - began > _SECONDS:
            break
    return {name: 1e3 * statistics.median(of[_WARM_UPS:] or of[1:]) for name, of in seconds.items()}, errors


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
