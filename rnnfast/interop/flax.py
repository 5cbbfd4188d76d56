"""Cells of flax.linen: https://flax-linen.readthedocs.io, RNN modules."""

from __future__ import annotations

from typing import Any

import jax
import numpy
import torch
from flax import linen
from torch import Tensor, nn

from ..modules import GRUCell, LSTMCell, RNNCell
from .weights import from_array, resets_after, to_array

_GATES = {"LSTMCell": "ifgo", "OptimizedLSTMCell": "ifgo", "GRUCell": "rzn", "SimpleCell": [""]}
_CLASSES: dict[str, Any] = {name: LSTMCell if "LSTM" in name else GRUCell for name in _GATES} | {"SimpleCell": RNNCell}
_RNN = {linen.tanh: "tanh", jax.nn.tanh: "tanh", linen.relu: "relu", jax.nn.relu: "relu"}


def from_flax(cell: linen.RNNCellBase, params: Any) -> LSTMCell | GRUCell | RNNCell:
    """A cell of ours with the weights of one of Flax. Flax has an LSTM's state as (c, h), torch as (h, c).

    Args:
        cell: an ``LSTMCell``, ``OptimizedLSTMCell``, ``GRUCell`` or ``SimpleCell``.
        params: its ``variables["params"]``.

    Raises:
        TypeError: the cell is none of these.
        ValueError: it has an activation, or another option, that torch's cells do not have; params are another cell's.
    """
    kind = type(cell).__name__
    if kind not in _GATES or type(cell) is not getattr(linen, kind, None):
        raise TypeError(f"{kind} is no {', '.join(_GATES)} of flax.linen")
    activation = _RNN.get(cell.activation_fn)
    if activation is None or (activation == "relu" and kind != "SimpleCell"):
        raise ValueError(f"Flax's {kind} has activation_fn={cell.activation_fn}, which torch's cells do not have")
    if getattr(cell, "gate_fn", linen.sigmoid) not in (linen.sigmoid, jax.nn.sigmoid):
        raise ValueError(f"Flax's {kind} has gate_fn={cell.gate_fn}, torch's cells have sigmoid only")
    if getattr(cell, "residual", False):
        raise ValueError("Flax's SimpleCell has residual=True, torch's cells have no such option")

    missing = [which + gate for which in "ih" for gate in _GATES[kind] if which + gate not in params]
    if missing:
        found_keys = ", ".join(map(str, params)) or "nothing"
        raise ValueError(
            f"params of Flax's {kind} have {', '.join(missing)}, not {found_keys}: give variables['params']"
        )

    def weight(which: str) -> Tensor:
        return torch.cat([from_array(params[which + gate]["kernel"]).T for gate in _GATES[kind]])

    def bias(which: str) -> Tensor:
        """Zero for a gate that has none there."""
        zero = numpy.zeros(cell.features, params["h" + _GATES[kind][0]]["kernel"].dtype)
        return torch.cat([from_array(params[which + gate].get("bias", zero)) for gate in _GATES[kind]])

    found = {"weight_ih": weight("i"), "weight_hh": weight("h"), "bias_ih": bias("i"), "bias_hh": bias("h")}
    options: dict[str, Any] = {"nonlinearity": activation} if kind == "SimpleCell" else {}
    ours: LSTMCell | GRUCell | RNNCell = _CLASSES[kind](
        found["weight_ih"].size(1), cell.features, dtype=found["weight_ih"].dtype, **options
    )
    ours.load_state_dict(found)
    return ours


def to_flax(module: nn.Module) -> tuple[linen.RNNCellBase, dict[str, Any]]:
    """A cell of Flax (of an LSTM an ``OptimizedLSTMCell``) and its params, from one of ours or of torch.nn.

    Raises:
        TypeError: the module is no RNNCell, LSTMCell or GRUCell.
        ValueError: it has no biases, which Flax's cells have, or it is a GRU with ``reset_after=False``.
    """
    names = {nn.LSTMCell: "OptimizedLSTMCell", nn.GRUCell: "GRUCell", nn.RNNCell: "SimpleCell"}
    kind = next((name for cls, name in names.items() if isinstance(module, cls)), None)
    if kind is None:
        raise TypeError(f"{type(module).__name__} is no RNNCell, LSTMCell or GRUCell")
    form: Any = module
    given = form.bias_hh if form.bias_ih is None else form.bias_ih
    if given is None or not resets_after(form):
        raise ValueError(f"Flax has no {kind} with {'bias=False' if given is None else 'reset_after=False'}")
    biases = [torch.zeros_like(given) if bias is None else bias for bias in (form.bias_ih, form.bias_hh)]
    options = {"activation_fn": getattr(linen, form.nonlinearity)} if kind == "SimpleCell" else {}
    dtype = str(form.weight_hh.dtype).removeprefix("torch.")
    cell = getattr(linen, kind)(form.hidden_size, param_dtype=dtype, **options)
    params: dict[str, Any] = {}
    for k, gate in enumerate(_GATES[kind]):
        of_gate = [weight.chunk(len(_GATES[kind]))[k] for weight in (form.weight_ih, form.weight_hh, *biases)]
        w_ih, w_hh, b_ih, b_hh = (
            jax.numpy.asarray(to_array(weight.mT if weight.dim() == 2 else weight), dtype) for weight in of_gate
        )
        params["i" + gate], params["h" + gate] = {"kernel": w_ih}, {"kernel": w_hh}
        if gate == "n":
            params["in"]["bias"], params["hn"]["bias"] = b_ih, b_hh
        else:
            params[("h" if "LSTM" in kind else "i") + gate]["bias"] = b_ih + b_hh
    return cell, params
