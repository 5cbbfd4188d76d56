"""Layers of Keras 3: https://keras.io/api/layers/recurrent_layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import torch
from torch import Tensor, nn

from ..modules import GRU, LSTM, RNN
from ..records import Weights
from .weights import directions_of, from_array, layer_of, reorder, resets_after, sum_of, to_array

# Gates: the LSTM's stand in torch's order, the GRU's as z r h.
_ORDERS = {"RNN_TANH": (0,), "RNN_RELU": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}
# Options of a layer that change its numbers, or what a training makes of it, and the values that torch's layers have.
_PARTS = ("kernel", "recurrent", "bias")
_USUAL: dict[str, Any] = {"recurrent_activation": "sigmoid", "dropout": 0, "recurrent_dropout": 0, "stateful": False}
_USUAL |= {f"{of}_{kind}": None for kind in ("regularizer", "constraint") for of in (*_PARTS, "activity")}


def from_keras(layers: Any) -> RNN | LSTM | GRU:
    """A layer of ours with the weights of one of Keras, or of a stack of such.

    It is ``batch_first``, and returns the whole sequence and the last state, whatever ``return_sequences`` and
    ``return_state`` say. A mask of Keras that ends rows is our ``lengths``; beyond them our output is 0, as with
    ``zero_output_for_mask``.

    Args:
        layers: a built ``SimpleRNN``, ``LSTM`` or ``GRU``, or a ``Bidirectional`` of one that concatenates; or a list
            or ``keras.Sequential`` of equal ones, between which may stand a ``Dropout`` each, all of one rate.

    Raises:
        TypeError: a layer is none of these.
        ValueError: a layer has no weights yet; it has an activation, or another option, which torch's layers do not
            have; those of a stack are unequal, or do not take what the one before gives.
    """
    listed = layers.layers if isinstance(layers, keras.Sequential) else layers
    listed = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    dropouts = [layer for layer in listed if type(layer) is keras.layers.Dropout]
    stack = [layer for layer in listed if layer not in dropouts]
    rates = {layer.rate for layer in dropouts}
    is_between = [layer in dropouts for layer in listed] == [False, *[True, False] * (len(stack) - 1)]
    if dropouts and not (is_between and len(rates) == 1 and not any(layer.noise_shape for layer in dropouts)):
        raise ValueError("Dropout has to stand between all Keras layers of a stack, with one rate and no noise_shape")
    if not stack:
        raise ValueError("there is no Keras layer in the list")
    if not all(getattr(layer, "return_sequences", True) for layer in stack[:-1]):
        raise ValueError("within a stack a Keras layer with return_sequences=False leaves no sequence for the next one")
    forms, directions = zip(*(pair for layer in stack for pair in _read(layer)))
    if len(set(forms)) > 1:
        raise ValueError("the Keras layers of a stack, or two directions, are of several kinds: convert one at a time")
    form, count = forms[0], 1 + forms[0].bidirectional
    for given in (of.w_ih.size(1) for of in directions[count:]):
        if given != form.units * count:
            raise ValueError(
                f"within a stack a Keras layer takes {given} features, the one before gives {form.units * count}"
            )
    options: dict[str, Any] = {} if form.reset_after else {"reset_after": False}
    options |= {"dropout": rates.pop()} if rates else {}
    ours: RNN | LSTM | GRU = layer_of(form.mode, directions, form.bidirectional, batch_first=True, **options)
    return ours


class _Form(NamedTuple):
    """What the directions and layers of a stack have in common."""

    mode: str
    bidirectional: bool
    reset_after: bool
    units: int
    bias: bool
    dtype: str


def _read(layer: Any) -> list[tuple[_Form, Weights]]:
    """The directions of a layer."""
    if type(layer) is not keras.layers.Bidirectional:
        return [_read_direction(layer, False)]
    if layer.merge_mode != "concat":
        raise ValueError(f"Keras' Bidirectional has merge_mode={layer.merge_mode!r}, torch's layers have 'concat' only")
    both = _read_direction(layer.forward_layer, False), _read_direction(layer.backward_layer, True)
    return [(form._replace(bidirectional=True), weights) for form, weights in both]


def _read_direction(layer: Any, backwards: bool) -> tuple[_Form, Weights]:
    kind = type(layer).__name__
    if type(layer) not in (keras.layers.SimpleRNN, keras.layers.LSTM, keras.layers.GRU):
        raise TypeError(f"{kind} is no SimpleRNN, LSTM or GRU of Keras, nor a Bidirectional of one")
    config = layer.get_config()
    activation = config["activation"]
    if activation != "tanh" and (kind, activation) != ("SimpleRNN", "relu"):
        raise ValueError(f"Keras' {kind} has activation={activation!r}, which torch's layers do not have")
    for name, usual in {**_USUAL, "go_backwards": backwards}.items():
        if config.get(name, usual) != usual:
            raise ValueError(f"Keras' {kind} has {name}={config[name]!r}, torch's layers have {usual!r} only")
    if not layer.built:
        raise ValueError(f"Keras' {kind} has no weights yet: build it, or call it once")
    mode = f"RNN_{activation.upper()}" if kind == "SimpleRNN" else kind
    kernel, recurrent, *biases = (from_array(weight) for weight in layer.get_weights())
    form = _Form(mode, False, config.get("reset_after", True), config["units"], bool(biases), str(kernel.dtype))
    weights = [kernel.T, recurrent.T]
    if biases:
        weights += biases[0] if biases[0].dim() == 2 else (biases[0], torch.zeros_like(biases[0]))
    return form, Weights(*(reorder(weight, _ORDERS[mode]) for weight in weights))


def to_keras(module: nn.Module) -> list[Any]:
    """Keras layers with the weights of a layer of ours or of torch.nn, of which ``keras.Sequential`` makes a stack.

    Each returns sequences, and takes them batch first. Between those of a stack stands a ``Dropout`` if there is one.

    Raises:
        TypeError: the module is no RNN, LSTM or GRU.
        ValueError: it has a projection, which Keras has not.
    """
    directions = list(directions_of(module, "Keras"))
    form: Any = module  # an nn.RNNBase
    count = 1 + form.bidirectional
    layers: list[Any] = []
    for first in range(0, len(directions), count):
        if layers and form.dropout:
            layers.append(keras.layers.Dropout(form.dropout))
        layers.append(_made(form, directions[first : first + count]))
    return layers


def _made(form: Any, directions: Sequence[Weights]) -> Any:
    mode, first = form.mode, directions[0]
    kind, activation = ("SimpleRNN", mode[4:].lower()) if mode.startswith("RNN") else (mode, "tanh")
    options: dict[str, Any] = {"reset_after": resets_after(form)} if mode == "GRU" else {}
    dtype = str(first.w_ih.dtype).removeprefix("torch.")
    options |= {"recurrent_initializer": "glorot_uniform"}  # the default, orthogonal, cannot be drawn in half types
    layer = getattr(keras.layers, kind)(
        form.hidden_size,
        activation=activation,
        use_bias=first.b_ih is not None,
        return_sequences=True,
        dtype=dtype,
        **options,
    )
    layer = keras.layers.Bidirectional(layer, dtype=dtype) if len(directions) > 1 else layer
    layer.build((None, None, first.w_ih.size(1)))
    layer.set_weights([to_array(weight) for w in directions for weight in _keras_weights(mode, w, resets_after(form))])
    return layer


def _keras_weights(mode: str, w: Weights, reset_after: bool) -> list[Tensor]:
    order = _ORDERS[mode]  # which is its own inverse
    found = [reorder(w.w_ih, order).T, reorder(w.w_hh, order).T]
    total = sum_of(w)
    if w.b_ih is None or w.b_hh is None or total is None:
        return found
    if mode == "GRU" and reset_after:
        return [*found, torch.stack([reorder(w.b_ih, order), reorder(w.b_hh, order)])]
    return [*found, reorder(total, order)]
