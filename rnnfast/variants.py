"""Layers whose steps differ from torch.nn's: recurrent dropout, zoneout, clipped gradients, normalised products.

Each is said as a cell of ``evaluator.py``: :func:`varied` makes it of another cell, and the random numbers of its masks
come in as gates of x. What they compute is in the docstring of :class:`rnnfast.LSTM`. Letters as in ``flex.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import border, reference
from .backends import is_recorded
from .cells import CELLS, GATES, PRIMITIVES, Cell, Primitive, _not_derived, _primitive, cell, sigmoid, tanh, where
from .evaluator import RUN, Plan, choose, clip_gradient, gates_of_x, in_plain_torch, no_autocast, recomputed
from .evaluator import layer as layer_of_any_cell
from .records import Inputs, Weights

# It sees a row of units at once, which no kernel does that takes strips of them: plain torch alone runs it.
PRIMITIVES["normalize"] = Primitive(lambda c: F.layer_norm(c, c.shape[-1:]), _not_derived)
normalize = functools.partial(_primitive, "normalize")


@cell(gates="i f g o", states="h c", weights="gain shift")
def lstm_normalized(x: Any, a: Any, s: Any, w: Any) -> Any:
    i = sigmoid(x.i + a.i)
    f = sigmoid(x.f + a.f)
    g = tanh(x.g + a.g)
    o = sigmoid(x.o + a.o)
    c = f * s.c + i * g
    return o * tanh(w.gain * normalize(c) + w.shift), c


class Variant(NamedTuple):
    """What differs in a call; None where nothing does, as torch.compile may take a number, zero too, for a variable."""

    recurrent_dropout: float | None = None
    zoneout: tuple[float | None, ...] = ()  # of each state
    expected: bool = False  # zoneout by its expectation, as in eval mode
    state_clip: float | None = None
    layer_norm: bool = False

    def differs(self) -> bool:
        numbers = self.recurrent_dropout, self.state_clip, *self.zoneout
        return self.layer_norm or any(number is not None for number in numbers)


def choose_variant(
    variant: Variant, mode: str, device: torch.device, dtype: torch.dtype, hidden: int
) -> tuple[str, str]:
    """As ``choose_backend``: the backend that serves a layer, and why."""
    return choose(device, dtype, CELLS[mode], hidden, why_not=_OF_WHOLE_ROWS if variant.layer_norm else "")


_OF_WHOLE_ROWS = "with layer_norm=True a step sees whole rows at once, which only plain torch does"


def run(serve: Callable[..., tuple[Tensor, ...]], variant: Variant, plan: Plan, x: Tensor | None, w_ih: Tensor | None,
        b_ih: Tensor | None, z_gates: Tensor | None, w_hh: Tensor | None, b_hh: Tensor | None, lengths: Tensor | None,
        resets: Tensor | None, *others: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """As ``serve``, one of ``evaluator.RUN``, but of a variant of the plan's cell."""
    p, count = variant.recurrent_dropout, len(plan.cell.states)
    zoned = tuple(k for k, chance in enumerate(variant.zoneout) if chance is not None)
    made = varied(plan.cell, p is not None, zoned, variant.expected, variant.state_clip is not None)
    scalars = [*plan.scalars, *(chance for chance in variant.zoneout if chance is not None)]
    steps = z_gates if x is None else x
    assert steps is not None
    like = others[0].expand(steps.size(0), -1, -1)
    random = [] if variant.expected else [torch.rand_like(like) for _ in zoned]
    if p is not None:
        scale, of_rows = 1 / (1 - p) if p < 1 else 0.0, torch.rand_like(others[0])
        scalars += [p, scale]
        random.append(of_rows.expand_as(like))
        others = torch.where(of_rows < p, 0, scale * others[0]), *others
    if variant.state_clip is not None:
        scalars.append(variant.state_clip)
    more = [*([] if z_gates is None else [z_gates]), *random]
    z_gates = torch.cat(more, 2) if len(more) > 1 else more[0] if more else None
    inputs = x, w_ih, b_ih, z_gates, w_hh, b_hh, lengths, resets
    found = serve(Plan(made, tuple(scalars), plan.reverse), *inputs, *others)
    return (*found[1 : 1 + count], *found[2 + count :]) if p is not None else found


def varied(of: Cell, drops: bool, zoned: tuple[int, ...], expected: bool, clips: bool) -> Cell:
    """Another cell with dropout of what W_hh multiplies, which then is a state of its own before the others, with
    zoneout of the states ``zoned``, and with clipped gradients."""
    return _varied(of, drops, zoned, expected, clips) if drops or zoned or clips else of


varied._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile cannot trace the tracing of a cell


@functools.cache
def _varied(of: Cell, drops: bool, zoned: tuple[int, ...], expected: bool, clips: bool) -> Cell:
    zones = [(k, of.states[k], f"zoneout of {of.states[k]}") for k in zoned]
    drop, scale, clip, reads_w = "dropout of h", "scale of h", "clip of state", bool(of.weights or of.scalars)

    def function(x: Any, a: Any, s: Any, w: Any) -> Any:
        found = of.function(x, a, s, *[w] * reads_w)
        after = list(found) if isinstance(found, (tuple, list)) else [found]
        for k, state, zone in zones:
            p, old = getattr(w, zone), getattr(s, state)
            after[k] = p * old + (1 - p) * after[k] if expected else where(getattr(x, zone) < p, old, after[k])
        if clips:
            after = [clip_gradient(value, getattr(w, clip)) for value in after]
        if drops:
            after.insert(0, where(getattr(x, drop) < getattr(w, drop), 0.0, getattr(w, scale) * after[0]))
        return tuple(after)

    scalars = [zone for *_, zone in zones] + [drop, scale] * drops + [clip] * clips
    gates = [zone for *_, zone in zones if not expected] + [drop] * drops
    states = [drop] * drops + of.states
    assert isinstance(function, FunctionType)
    made = Cell(
        function,
        of.gates + gates,
        states,
        of.weights,
        {**of.scalars, **dict.fromkeys(scalars, 0.0)},
        dict(zip(of.states, of.initial)),
    )
    made.check()
    made.origin = varied, (of, drops, zoned, expected, clips)
    return made


def norm_sizes(mode: str, hidden: int, bias: bool) -> dict[str, int]:
    """The weights that layer_norm=True adds in each direction."""
    sizes = dict.fromkeys(("gain_ih", "gain_hh"), GATES[mode] * hidden)
    return sizes | (dict.fromkeys(("gain_c", "bias_c")[: 1 + bias], hidden) if mode == "LSTM" else {})


def _normalized(sums: Tensor, gain: Tensor, shift: Tensor, mode: str) -> Tensor:
    """Over all gates together, but for the candidate of a GRU."""
    hidden = gain.size(0) // GATES[mode]
    sizes = [2 * hidden, hidden] if mode == "GRU" else [GATES[mode] * hidden]
    parts = zip(sums.split(sizes, -1), gain.split(sizes), shift.split(sizes))
    found = [F.layer_norm(part, part.shape[-1:], *of_part) for part, *of_part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _run_normalized(variant: Variant, mode: str, plan: Plan, x: Tensor, w_ih: Tensor, b_ih: None, z_gates: None,
                    w_hh: Tensor, _: None, lengths: Tensor | None, resets: Tensor | None, *others: Tensor,
                    ) -> tuple[Tensor, ...]:  # fmt: skip
    """As :func:`run` in plain torch, where before the cell's own weights there are gain and shift of both products."""
    count = len(plan.cell.states)
    gain_ih, shift_ih, gain_hh, shift_hh = others[count : count + 4]
    of_product = functools.partial(_normalized, gain=gain_hh, shift=shift_hh, mode=mode)
    serve = functools.partial(in_plain_torch, of_product=of_product)
    x_gates = _normalized(gates_of_x(x, w_ih, b_ih, z_gates, others[0].dtype), gain_ih, shift_ih, mode)
    inputs = None, None, None, x_gates, w_hh, None, lengths, resets
    return run(serve, variant, plan, *inputs, *others[:count], *others[count + 4 :])


def layer(
    variant: Variant, norms: Sequence[dict[str, Tensor]], recompute: bool, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer with all its directions; inputs and results as of :func:`rnnfast.recurrence.layer`.

    Args:
        norms: of each direction its weights of :func:`norm_sizes`; without ``layer_norm`` none.
        recompute: keep only what enters the layer for the backward.

    Raises:
        ValueError: dtypes are complex.
    """
    if not is_recorded() and not torch.compiler.is_compiling():  # what is no operator has no other check
        border.check_layer(inputs._replace(lengths=None))  # which were checked, and may be a transform's
    mode, x, lengths = inputs.mode, inputs.x, inputs.lengths
    if x.is_complex():
        raise ValueError(f"recurrent_dropout, zoneout, layer_norm and state_clip are for real dtypes, got {x.dtype}")
    if inputs.batch_sizes is not None:
        _, pack, padded = reference._padded(inputs, inputs.batch_sizes)
        y, h_n, c_n, c = layer(variant, norms, recompute, padded)
        return pack(y), h_n, c_n, pack(c) if mode == "LSTM" else c
    of = lstm_normalized if variant.layer_norm and mode == "LSTM" else CELLS[mode]
    weights = inputs.directions()
    directions = [_by_name(w, norms[d] if variant.layer_norm else None) for d, w in enumerate(weights)]
    backend, _ = choose_variant(variant, mode, x.device, x.dtype, weights[0].w_hh.size(1))
    serve = functools.partial(run, RUN[backend], variant)
    if variant.layer_norm:
        serve = functools.partial(_run_normalized, variant, mode)
    x = reference.without_padding(inputs).x
    plans = [Plan(of, (), reverse) for reverse in (False, True)[: len(directions)]]
    states = None if inputs.h0 is None else [inputs.h0] if inputs.c0 is None else [inputs.h0, inputs.c0]
    of_layer: Callable[..., Any] = functools.partial(layer_of_any_cell, serve, plans)
    with no_autocast(x.device.type):  # its casts have been made
        every, final = (recomputed(of_layer) if recompute else of_layer)(x, states, lengths, inputs.resets, directions)
    absent = x.new_zeros(0)
    return every[0], final[0], *((final[1], every[1]) if mode == "LSTM" else (absent, absent))


def _by_name(w: Weights, norms: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """As ``evaluator.layer`` takes them; with norms as :func:`_run_normalized` does, biases after the normalisation."""
    found = {"weight_ih": w.w_ih, "weight_hh": w.w_hh}
    if norms is None:
        return found if w.b_ih is None or w.b_hh is None else found | {"bias_ih": w.b_ih, "bias_hh": w.b_hh}
    for of, bias in (("ih", w.b_ih), ("hh", w.b_hh)):
        gain = norms[f"gain_{of}"]
        found |= {f"gain_{of}": gain, f"shift_{of}": torch.zeros_like(gain) if bias is None else bias}
    if (gain_c := norms.get("gain_c")) is not None:
        found |= {"gain": gain_c, "shift": norms.get("bias_c", torch.zeros_like(gain_c))}
    return found
