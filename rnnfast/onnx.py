"""A layer as an operator of ONNX: https://onnx.ai/onnx/operators, LSTM, GRU and RNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import GATES
from .records import Inputs, names_of

# Where ONNX's gates stand in torch's order: i o f c, and z r h.
ORDER = {"RNN_TANH": (0,), "RNN_RELU": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
_VERSION = 14  # of the operators, since which they have a layout


def is_exporting() -> bool:
    """Whether torch.onnx's exporter by torch.export is at work."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def layer(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    bidirectional: bool,
    reset_after: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y ``[T, N, D*H]``, h_n and c_n ``[D, N, H]`` (shape ``[0]`` but for an LSTM) as a node of the recorded graph."""
    T, N, _ = x.shape
    D, H = 1 + bidirectional, weights[1].size(1)
    names = names_of(mode, len(weights) // D)
    directions = Inputs(mode, x, h0, c0, None, lengths, None, bidirectional, names, weights).directions()

    def onnx_order(weight: Tensor) -> Tensor:
        gates = weight.chunk(GATES[mode])
        return torch.cat([gates[gate] for gate in ORDER[mode]])

    w = torch.stack([onnx_order(of.w_ih) for of in directions])
    r = torch.stack([onnx_order(of.w_hh) for of in directions])
    biases = [(of.b_ih, of.b_hh) for of in directions]
    b = [torch.cat([onnx_order(ih), onnx_order(hh)]) for ih, hh in biases if ih is not None and hh is not None]
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if bidirectional else "forward"}
    if mode == "GRU":
        attributes["linear_before_reset"] = int(reset_after)
    elif mode != "LSTM":
        attributes["activations"] = ["Tanh" if mode == "RNN_TANH" else "Relu"] * D
    inputs = [x, w, r, torch.stack(b) if b else None, None if lengths is None else lengths.to(torch.int32), h0]
    shapes = [(T, D, N, H), (D, N, H)]
    if mode == "LSTM":
        inputs.append(c0)
        shapes.append((D, N, H))
    y, *finals = torch.onnx.ops.symbolic_multi_out(
        mode.partition("_")[0], inputs, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes, version=_VERSION
    )
    if lengths is not None and h0 is not None:  # the operator gives 0 for a row without steps
        given = (h for h in (h0, c0) if h is not None)
        finals = [torch.where((lengths > 0)[:, None], final, initial) for final, initial in zip(finals, given)]
    h_n, c_n = finals if mode == "LSTM" else (*finals, x.new_empty(0))
    return y.transpose(1, 2).reshape(T, N, D * H), h_n, c_n
