"""Nodes of ONNX: https://onnx.ai/onnx/operators, LSTM, GRU and RNN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from .. import functional, modules
from ..cells import GATES
from ..modules import GRU, LSTM, RNN
from ..onnx import ORDER
from ..records import Weights
from .weights import directions_of, from_array, layer_of, reorder, resets_after, to_array

_ACTIVATIONS: dict[str, dict[tuple[str, ...], str]] = {
    "LSTM": {("sigmoid", "tanh", "tanh"): "LSTM"},
    "GRU": {("sigmoid", "tanh"): "GRU"},
    "RNN": {("tanh",): "RNN_TANH", ("relu",): "RNN_RELU"},
}
# Attributes and the values that say nothing new. Alpha and beta are of activations that are refused.
_USUAL = {"clip": 0, "input_forget": 0, "output_sequence": 1}
_READ = {
    "hidden_size",
    "direction",
    "layout",
    "linear_before_reset",
    "activations",
    "activation_alpha",
    "activation_beta",
}


class Node(nn.Module):
    """An ``LSTM``, ``GRU`` or ``RNN`` node of ONNX with its weights as parameters, on our kernels.

    It takes and returns what the operator does, each in its layout: also peepholes, and a reverse direction alone.

    Args:
        node: the node.
        initializers: of its graph; those by the names of the node's W, R and, if it has them, B and P are copied.

    Raises:
        ValueError: the node is another operator's; it has an activation or attribute that our layers do not have; a
            weight is missing, no initializer, or of a wrong shape.
    """

    def __init__(self, node: onnx.NodeProto, initializers: Iterable[onnx.TensorProto]) -> None:
        super().__init__()
        kind = node.op_type
        if kind not in _ACTIVATIONS:
            raise ValueError(f"ONNX's {kind} is no LSTM, GRU or RNN")
        attributes = {of.name: onnx.helper.get_attribute_value(of) for of in node.attribute}
        for name, value in attributes.items():
            if name not in _READ and value != _USUAL.get(name):
                raise ValueError(f"ONNX's {kind} has {name}={value!r}, which our layers do not have")
        direction = attributes.get("direction", b"forward").decode()
        if direction not in ("forward", "reverse", "bidirectional"):
            raise ValueError(f"ONNX's {kind} has direction={direction!r}, which is none")
        self.bidirectional, self.reverse = direction == "bidirectional", direction == "reverse"
        self.batch_first, self.reset_after = attributes.get("layout", 0) == 1, True
        if kind == "GRU":
            self.reset_after = attributes.get("linear_before_reset", 0) != 0
        self.mode = _mode(
            kind, [of.decode().lower() for of in attributes.get("activations", ())], 1 + self.bidirectional
        )
        x, w, r, b, _, _, _, p = (*node.input, *[""] * 8)[:8]
        if not (w and r):
            raise ValueError(f"ONNX's {kind} needs W and R, got {w!r} and {r!r}")
        given = {of.name: of for of in initializers}
        for name in (w, r, b, p):
            if name and name not in given:
                raise ValueError(f"the weight {name!r} of ONNX's {kind} is no initializer")
        arrays = [from_array(numpy_helper.to_array(given[name])) if name else None for name in (w, r, b, p)]
        _check_shapes(kind, 1 + self.bidirectional, attributes.get("hidden_size"), *arrays)
        self.weights = nn.ParameterList(
            weight for of in _directions(self.mode, *arrays) for weight in of if weight is not None
        )
        self.mode = "PEEPHOLE_LSTM" if p else self.mode

    def forward(
        self,
        X: Tensor,
        sequence_lens: Tensor | None = None,
        initial_h: Tensor | None = None,
        initial_c: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What the operator computes.

        Args:
            X: ``[T, N, I]``; with layout 1 ``[N, T, I]``.
            sequence_lens: integers ``[N]``, within 0..T.
            initial_h, initial_c: ``[D, N, H]``; with layout 1 ``[N, D, H]``; zeros if None.

        Returns:
            Y ``[T, D, N, H]`` (layout 1: ``[N, T, D, H]``), Y_h and, of an LSTM, Y_c, as the initial states. Of a row
            without steps all are 0.

        Raises:
            RuntimeError, ValueError: as :func:`rnnfast.functional.rnn`.
        """
        if X.dim() != 3:
            raise ValueError(f"X has to have 3 dimensions, got {X.dim()}")
        directions, is_lstm = 1 + self.bidirectional, self.mode.endswith("LSTM")
        states = [initial_h, initial_c][: 1 + is_lstm]
        if self.batch_first:
            X, *states = (None if of is None else of.transpose(0, 1) for of in (X, *states))  # type: ignore[assignment]
        zeros = X.new_zeros(directions, X.size(1), self.weights[1].size(1))
        hx = [zeros if state is None else state for state in states]
        if sequence_lens is not None:
            modules._check_are_tensors(sequence_lens=sequence_lens)
            functional._check_lengths(X, sequence_lens)  # before they are an index
        X = _reversed(X, sequence_lens) if self.reverse else X
        Y, h, c, _ = functional.rnn(
            self.mode, X, hx, list(self.weights), bidirectional=self.bidirectional, lengths=sequence_lens,
            reset_after=self.reset_after,
        )  # fmt: skip
        Y = _reversed(Y, sequence_lens) if self.reverse else Y
        finals = [h, c] if is_lstm else [h]
        if sequence_lens is not None:
            finals = [torch.where((sequence_lens > 0)[:, None], final, 0) for final in finals]
        Y = Y.unflatten(2, (directions, -1))
        if self.batch_first:
            return Y.transpose(0, 1), *(final.transpose(0, 1) for final in finals)
        return Y.transpose(1, 2), *finals


def _mode(kind: str, activations: list[str], directions: int) -> str:
    each = len(activations) // directions
    one = tuple(activations[:each]) or next(iter(_ACTIVATIONS[kind]))
    if one not in _ACTIVATIONS[kind] or list(one) * directions != (activations or list(one) * directions):
        usual = " or ".join(map(str, _ACTIVATIONS[kind]))
        raise ValueError(f"ONNX's {kind} has activations={activations}, our layers have {usual} in each direction")
    return _ACTIVATIONS[kind][one]


def _check_shapes(kind: str, count: int, hidden: int | None, w: Any, r: Any, b: Any, p: Any) -> None:
    """Against the operator's: W ``[D, G*H, I]``, R ``[D, G*H, H]``, B ``[D, 2*G*H]`` and P ``[D, 3*H]``."""
    gates = GATES["RNN_TANH" if kind == "RNN" else kind]
    hidden = r.shape[-1] if hidden is None else hidden
    rows = gates * hidden
    inputs = w.shape[-1] if w.dim() else 0
    expected = (count, rows, inputs), (count, rows, hidden), (count, 2 * rows), (count, 3 * hidden)
    for name, weight, shape in zip("WRBP", (w, r, b, p), expected):
        if weight is not None and weight.shape != shape:
            raise ValueError(f"ONNX's {kind} has {name} of shape {list(weight.shape)}, expected {list(shape)}")
    if p is not None and kind != "LSTM":
        raise ValueError(f"ONNX's {kind} has no peepholes")


def _directions(mode: str, w: Any, r: Any, b: Tensor | None, p: Tensor | None) -> list[Weights]:
    """Of the operator's weights ours."""
    gates = [ORDER[mode].index(gate) for gate in range(GATES[mode])]
    found = []
    for d in range(len(w)):
        b_ih, b_hh = (None, None) if b is None else (reorder(of, gates) for of in b[d].chunk(2))
        units = None if p is None else reorder(p[d], (0, 2, 1))  # i o f
        found.append(Weights(reorder(w[d], gates), reorder(r[d], gates), b_ih, b_hh, None, units))
    return found


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Each row of ``[T, N, F]`` from its last valid step to its first; what lies beyond stays."""
    if lengths is None:
        return x.flip(0)
    t, lengths = torch.arange(x.size(0), device=x.device)[:, None], lengths.to(x.device)
    return x.gather(0, torch.where(t < lengths, lengths - 1 - t, t)[:, :, None].expand_as(x))


def from_onnx(node: onnx.NodeProto, initializers: Iterable[onnx.TensorProto]) -> RNN | LSTM | GRU:
    """A layer of ours with the weights of a node of ONNX; arguments as of :class:`Node`.

    It takes and returns what ``torch.nn``'s layers do: an output ``[T, N, D*H]``, and states ``[D, N, H]``, also if it
    is ``batch_first``, as a node of layout 1 is.

    Raises:
        ValueError: as of :class:`Node`; the node has peepholes, or a reverse direction alone, for which there is Node.
    """
    module = Node(node, initializers)
    if module.mode == "PEEPHOLE_LSTM" or module.reverse:
        what = "the reverse direction alone" if module.reverse else "peepholes"
        raise ValueError(
            f"ONNX's {node.op_type} has {what}, which our layers do not have: rnnfast.interop.onnx.Node runs it"
        )
    weights, count = list(module.weights), 1 + module.bidirectional
    each = len(weights) // count
    directions = [Weights(*weights[d * each : (d + 1) * each]) for d in range(count)]
    options: dict[str, Any] = {} if module.reset_after else {"reset_after": False}
    layer: RNN | LSTM | GRU = layer_of(
        module.mode, directions, module.bidirectional, batch_first=module.batch_first, **options
    )
    return layer


def to_onnx(module: nn.Module, name: str = "") -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """A node of ONNX with the weights of a layer of ours or of torch.nn.

    Args:
        module: a layer, not a stack of such: of a whole model torch.onnx.export makes a graph.
        name: stands before the names of the node's inputs X, W, R and B, and of its outputs Y, Y_h and Y_c.

    Returns:
        The node, and the initializers W, R and, if there are biases, B. Of a ``batch_first`` layer it is of layout 1,
        which is opset 14's and which onnxruntime does not run on CPUs; bfloat16 is opset 22's.

    Raises:
        TypeError: the module is no RNN, LSTM or GRU.
        ValueError: it has several layers, a projection, or a dtype that the operator does not have.
    """
    directions = list(directions_of(module, "ONNX"))
    form: Any = module
    mode, dtype = form.mode, directions[0].w_ih.dtype
    if form.num_layers > 1:
        raise ValueError(f"a node of ONNX is one layer, got {form.num_layers}: torch.onnx.export makes a graph of them")
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"a recurrent node of ONNX cannot be of {dtype}")
    kind = mode.partition("_")[0]
    attributes: dict[str, Any] = {"linear_before_reset": int(resets_after(form))} if kind == "GRU" else {}
    if kind == "RNN":
        attributes["activations"] = [mode[4:].capitalize()] * len(directions)
    if form.batch_first:
        attributes["layout"] = 1
    arrays = {
        "W": torch.stack([reorder(of.w_ih, ORDER[mode]) for of in directions]),
        "R": torch.stack([reorder(of.w_hh, ORDER[mode]) for of in directions]),
    }
    biases = [
        torch.cat([reorder(b, ORDER[mode]) for b in (of.b_ih, of.b_hh) if b is not None])
        for of in directions
        if of.b_ih is not None
    ]
    arrays |= {"B": torch.stack(biases)} if biases else {}
    node = onnx.helper.make_node(
        kind, [name + of for of in ("X", *arrays)], [f"{name}Y", f"{name}Y_h", *[f"{name}Y_c"] * (kind == "LSTM")],
        name=name, hidden_size=form.hidden_size, direction="bidirectional" if form.bidirectional else "forward",
        **attributes,
    )  # fmt: skip
    return node, [_initializer(name + key, of) for key, of in arrays.items()]


def _initializer(name: str, weight: Tensor) -> onnx.TensorProto:
    array = to_array(weight)
    if weight.dtype == torch.bfloat16:  # an array of float32
        return onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, array.shape, array.ravel())
    return numpy_helper.from_array(array, name)
