"""What the ways from and to other libraries share: weights by direction, in torch's order of the gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .. import modules
from ..cells import GATES
from ..records import Weights, names_of

_CLASSES: dict[str, Any] = {
    "RNN_TANH": modules.RNN, "RNN_RELU": modules.RNN, "LSTM": modules.LSTM, "GRU": modules.GRU
}  # fmt: skip


def from_array(array: Any) -> Tensor:
    """A copy. Of a type that numpy does not have, such as bfloat16, torch has the name."""
    array = numpy.asarray(array)
    return torch.from_numpy(array.astype("float64")).to(getattr(torch, array.dtype.name))


def to_array(tensor: Tensor) -> Any:
    """A copy; a bfloat16, which numpy does not have, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def reorder(weight: Tensor, gates: Sequence[int]) -> Tensor:
    """The rows of some gates, in this order."""
    of_gates = weight.chunk(len(gates))
    return torch.cat([of_gates[gate] for gate in gates])


def layer_of(mode: str, directions: Sequence[Weights], bidirectional: bool = False, **options: Any) -> Any:
    """A layer of ours, or a stack of such, with the weights of its directions, all with biases or all without."""
    first, flat = directions[0], [weight for of in directions for weight in of if weight is not None]
    if mode.startswith("RNN"):
        options["nonlinearity"] = mode.removeprefix("RNN_").lower()
    layer = _CLASSES[mode](
        first.w_ih.size(1), first.w_hh.size(1), len(directions) // (1 + bidirectional), bias=first.b_ih is not None,
        bidirectional=bidirectional, dtype=first.w_ih.dtype, **options,
    )  # fmt: skip
    layer.load_state_dict(dict(zip(layer._flat_weights_names, flat, strict=True)))
    return layer


def directions_of(module: nn.Module, library: str) -> Iterator[Weights]:
    """The weights of a layer's directions, layer by layer, all with both biases or all with none: for one that was
    deleted stand zeros.

    Raises:
        TypeError: the module is no layer of rnnfast or torch.nn.
        ValueError: it has what the library has not.
    """
    if not isinstance(module, nn.RNNBase) or module.mode not in GATES:
        raise TypeError(f"{type(module).__name__} is no RNN, LSTM or GRU")
    refused = [f"proj_size={module.proj_size}"] if module.proj_size else []
    if isinstance(module, modules._Recurrent):
        refused += [option for option in modules.options(module) if not option.startswith("reset_after")]
    if refused:
        raise ValueError(f"{library} has no layers with {', '.join(refused)}")
    weights = [getattr(module, key) for key in module._flat_weights_names]  # also those that are parametrized
    each = len(weights) // (module.num_layers * (1 + module.bidirectional))
    names = names_of(module.mode, each).split()
    has_biases = any(weight is not None for key, weight in zip(module._flat_weights_names, weights) if "bias" in key)
    for first in range(0, len(weights), each):
        of = Weights(**dict(zip(names, weights[first : first + each])))
        if has_biases:
            biases = (of.w_ih.new_zeros(len(of.w_ih)) if b is None else b for b in (of.b_ih, of.b_hh))
            of = Weights(of.w_ih, of.w_hh, *biases)
        yield of


def resets_after(module: Any) -> bool:
    """Whether a GRU does; torch.nn's always do."""
    return getattr(module, "_rnnfast_options", modules.Options()).reset_after


def sum_of(w: Weights) -> Tensor | None:
    """The biases as one, for what is a sum of both products."""
    return None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh
