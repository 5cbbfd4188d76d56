"""Layers whose steps differ from torch.nn's: recurrent dropout, zoneout, clipped gradients, normalised products, heads.

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
from .cells import CELLS, GATES, Cell, Named, cell, mean, normalize, sigmoid, sqrt, tanh, where
from .evaluator import RUN, Plan, choose, clip_gradient, gates_of_x, no_autocast, recomputed
from .evaluator import layer as layer_of_any_cell
from .records import Inputs, Weights

EPS = 1e-5  # as torch's layer_norm has it


@cell(gates="i f g o", states="h c", weights="gain shift")
def lstm_of_normalized_c(x: Any, a: Any, s: Any, w: Any) -> Any:
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
    heads: int = 1  # of W_hh, which is said by its shape

    def differs(self) -> bool:
        numbers = self.recurrent_dropout, self.state_clip, *self.zoneout
        return self.layer_norm or self.heads > 1 or any(number is not None for number in numbers)


def choose_variant(
    variant: Variant, mode: str, device: torch.device, dtype: torch.dtype, hidden: int, batch: int
) -> tuple[str, str]:
    """As ``choose_backend``: the backend that serves a layer, and why."""
    of = varied(_cell_of(variant, mode), variant.layer_norm, variant.heads > 1)
    return choose(device, dtype, of, hidden, variant.heads, batch)


def _cell_of(variant: Variant, mode: str) -> Cell:
    return lstm_of_normalized_c if variant.layer_norm and mode == "LSTM" else CELLS[mode]


def run(serve: Callable[..., tuple[Tensor, ...]], variant: Variant, plan: Plan, x: Tensor | None, w_ih: Tensor | None,
        b_ih: Tensor | None, z_gates: Tensor | None, w_hh: Tensor | None, b_hh: Tensor | None, lengths: Tensor | None,
        resets: Tensor | None, *others: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """As ``serve``, one of ``evaluator.RUN``, but of a variant of the plan's cell."""
    p, count = variant.recurrent_dropout, len(plan.cell.states)
    zoned = tuple(k for k, chance in enumerate(variant.zoneout) if chance is not None)
    form = p is not None, zoned, variant.expected, variant.state_clip is not None
    made = varied(plan.cell, variant.layer_norm, variant.heads > 1, *form)
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
    wanted = None if plan.wanted is None else plan.wanted + (p is not None)
    found = serve(Plan(made, tuple(scalars), plan.reverse, wanted), *inputs, *others)
    return (*found[1 : 1 + count], *found[2 + count :]) if p is not None else found


def varied(of: Cell, normalizes: bool, in_heads: bool, drops: bool = False, zoned: tuple[int, ...] = (),
           expected: bool = False, clips: bool = False) -> Cell:  # fmt: skip
    """Another cell with normalised gates (:func:`_normalized`), with dropout of what W_hh multiplies, which then is a
    state of its own before the others, with zoneout of the states ``zoned``, and with clipped gradients."""
    changes = normalizes or drops or zoned or clips
    return _varied(of, normalizes, normalizes and in_heads, drops, zoned, expected, clips) if changes else of


varied._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile cannot trace the tracing of a cell


@functools.cache
def _varied(plain: Cell, normalizes: bool, in_heads: bool, drops: bool, zoned: tuple[int, ...], expected: bool,
            clips: bool) -> Cell:  # fmt: skip
    of = _normalized(plain, in_heads) if normalizes else plain
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
    made.origin = varied, (plain, normalizes, in_heads, drops, zoned, expected, clips)
    return made


def _normalized(of: Cell, in_heads: bool) -> Cell:
    """Another cell whose gates of W_hh h are normalised: all together, but for those whose x and a it reads apart, each
    of which is by itself. They have a gain; and the latter a shift too, where the others have theirs in x.

    The rows of W_hh that are normalised together have to add up to zero (:func:`_with_norms`), for then so do their
    products with any h, and what is left of the normalisation is a division. Those of heads, which see a part of h
    each, cannot be had so: there the mean is taken off the products.
    """
    gains, shifts = [f"gain of {gate}" for gate in of.gates], [f"shift of {of.gates[gate]}" for gate in of.apart]

    def function(x: Any, a: Any, s: Any, w: Any) -> Any:
        found: list[Any] = [None] * len(of.gates)
        for together in _together(of):
            values = [getattr(a, of.gates[gate]) for gate in together]
            if in_heads:
                middle = mean(sum(values)) / len(values)
                values = [value - middle for value in values]
            scale = 1 / sqrt(mean(sum(value * value for value in values)) / len(values) + EPS)
            for gate, value in zip(together, values):
                found[gate] = getattr(w, gains[gate]) * (value * scale)
        for gate, shift in zip(of.apart, shifts):
            found[gate] = found[gate] + getattr(w, shift)
        return of.function(x, Named("a", of.gates, found), s, *[w] * bool(of.weights))

    assert isinstance(function, FunctionType)
    return Cell(function, of.gates, of.states, [*gains, *shifts, *of.weights], {}, {})


def _together(cell: Cell) -> list[list[int]]:
    """The gates that are normalised together; the cells have those that they read apart behind the others."""
    joined = [gate for gate in range(len(cell.gates)) if gate not in cell.apart]
    return [joined, *([gate] for gate in cell.apart)]


def _by_group(tensor: Tensor, cell: Cell, dim: int) -> list[Tensor]:
    """A tensor's parts of the gates that are normalised together."""
    if not cell.apart:
        return [tensor]
    hidden = tensor.size(dim) // len(cell.gates)
    return list(tensor.split([hidden * len(group) for group in _together(cell)], dim))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def norm_sizes(mode: str, hidden: int, bias: bool) -> dict[str, int]:
    """The weights that layer_norm=True adds in each direction."""
    sizes = dict.fromkeys(("gain_ih", "gain_hh"), GATES[mode] * hidden)
    return sizes | (dict.fromkeys(("gain_c", "bias_c")[: 1 + bias], hidden) if mode == "LSTM" else {})


def layer(
    variant: Variant, norms: Sequence[dict[str, Tensor]], recompute: bool, inputs: Inputs, keep_c: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer with all its directions; inputs and results as of :func:`rnnfast.recurrence.layer`.

    Args:
        norms: of each direction its weights of :func:`norm_sizes`; without ``layer_norm`` none.
        recompute: keep only what enters the layer for the backward.
        keep_c: whether c of every step is asked for; else it is empty.

    Raises:
        ValueError: dtypes are complex.
    """
    if not is_recorded() and not torch.compiler.is_compiling():  # what is no operator has no other check
        whole = [border.whole(weight) for weight in inputs.weights]
        border.check_layer(inputs._replace(lengths=None, weights=whole))  # lengths were checked, or are a transform's
    mode, x, lengths = inputs.mode, inputs.x, inputs.lengths
    if x.is_complex():
        raise ValueError(
            f"recurrent_dropout, zoneout, layer_norm, state_clip and num_heads are for real dtypes, got {x.dtype}"
        )
    if inputs.batch_sizes is not None:
        _, pack, padded = reference._padded(inputs, inputs.batch_sizes)
        y, h_n, c_n, c = layer(variant, norms, recompute, padded, keep_c)
        return pack(y), h_n, c_n, pack(c) if mode == "LSTM" and keep_c else c
    weights = inputs.directions()
    hidden, of = weights[0].w_ih.size(0) // GATES[mode], CELLS[mode]
    backend, _ = choose_variant(variant, mode, x.device, x.dtype, hidden, x.size(1))
    serve = functools.partial(run, RUN[backend], variant)
    if variant.layer_norm:
        directions = [_with_norms(w, norm, of) for w, norm in zip(weights, norms)]
        serve = functools.partial(_run_normalized, serve, of)
    else:
        directions = [_by_name(w) for w in weights]
    of = _cell_of(variant, mode)
    x = reference.without_padding(inputs).x
    wanted = None if keep_c else 1
    plans = [Plan(of, (), reverse, wanted) for reverse in (False, True)[: len(directions)]]
    states = None if inputs.h0 is None else [inputs.h0] if inputs.c0 is None else [inputs.h0, inputs.c0]
    of_layer: Callable[..., Any] = functools.partial(layer_of_any_cell, serve, plans)
    with no_autocast(x.device.type):  # its casts have been made
        every, final = (recomputed(of_layer) if recompute else of_layer)(x, states, lengths, inputs.resets, directions)
    absent = x.new_zeros(0)
    return every[0], *final, *[absent] * (2 - len(final)), every[1] if mode == "LSTM" and keep_c else absent


def _by_name(w: Weights) -> dict[str, Tensor]:
    """As ``evaluator.layer`` takes them."""
    found = {"weight_ih": w.w_ih, "weight_hh": w.w_hh}
    return found if w.b_ih is None or w.b_hh is None else found | {"bias_ih": w.b_ih, "bias_hh": w.b_hh}


def _with_norms(w: Weights, norms: dict[str, Tensor], cell: Cell) -> dict[str, Tensor]:
    """Likewise, for a cell that :func:`_normalized` has made of this one, behind :func:`_run_normalized`."""
    acc = torch.promote_types(w.w_hh.dtype, torch.float32)
    b_ih, b_hh = (torch.zeros_like(norms["gain_hh"]) if bias is None else bias for bias in (w.b_ih, w.b_hh))
    joined, *apart = _by_group(b_hh, cell, 0)
    of_x, *rest = _by_group(b_ih, cell, 0)
    w_hh = w.w_hh
    if w_hh.dim() == 2:  # else it is of heads
        # Added a sum of its own, which is scaled first: so autograd makes no matrix but the gradient.
        w_hh = _joined([part + part.sum(0) * (-1 / part.size(0)) for part in _by_group(w_hh.to(acc), cell, 0)], 0)
    found = {"weight_ih": w.w_ih, "weight_hh": w_hh}
    found |= {"gain of x": norms["gain_ih"], "shift of x": _joined([of_x.to(acc) + joined.to(acc), *rest], 0)}
    found |= zip(cell.gates, norms["gain_hh"].chunk(len(cell.gates)))
    found |= zip((f"shift of {cell.gates[gate]}" for gate in cell.apart), apart)
    if (gain_c := norms.get("gain_c")) is not None:
        found |= {"gain of c": gain_c, "shift of c": norms["bias_c"] if "bias_c" in norms else torch.zeros_like(gain_c)}
    return found


def _run_normalized(serve: Callable[..., tuple[Tensor, ...]], cell: Cell, plan: Plan, x: Tensor, w_ih: Tensor,
                    b_ih: None, z_gates: None, w_hh: Tensor, b_hh: None, lengths: Tensor | None,
                    resets: Tensor | None, *others: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """As ``serve``, with gates of x that are to be normalised likewise, by the first two of the units' weights."""
    count = len(plan.cell.states)
    states, (gain, shift), units = others[:count], others[count : count + 2], others[count + 2 :]
    made = gates_of_x(x, w_ih, b_ih, z_gates, states[0].dtype)
    parts = zip(_by_group(made, cell, 2), _by_group(gain, cell, 0), _by_group(shift, cell, 0))
    x_gates = _joined([F.layer_norm(part, part.shape[-1:], of_gain, of_shift) for part, of_gain, of_shift in parts], 2)
    return serve(plan, None, None, None, x_gates, w_hh, b_hh, lengths, resets, *states, *units)
