"""Layers x directions x dropout x packing, written once over ``recurrence.layer``, and the checks at its border.

Letters as in ``reference.py``, and L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import aten, border, choice, onnx, recurrence, reference
from .backends import choose_backend, circumstances, is_recorded
from .border import DTYPE_NAMES
from .cells import GATES, HAS_CELL_STATE
from .records import Inputs, names_of
from .reference import check_mode


def rnn(
    mode: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_states: bool = False,
    recompute: bool = False,
    reset_after: bool = True,
    of_layers: Sequence[Callable[[Inputs, bool], tuple[Tensor, Tensor, Tensor, Tensor]]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | tuple[Tensor, Tensor] | None]:
    """A stack of recurrent layers: the function behind :class:`rnnfast.RNN`, ``LSTM`` and ``GRU``.

    Args:
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"LSTM"`` or ``"GRU"``, or another cell of ``cells.py``.
        input: ``[T, N, I]``, or with ``batch_sizes`` the packed rows ``[R, I]``.
        hx: (h_0,) or, for an LSTM, (h_0, c_0), ``[L*D, N, P]`` and ``[L*D, N, H]``; None is zeros.
        weights: all weights in torch's flat order: layer by layer, direction by direction, weight_ih, weight_hh,
            then bias_ih and bias_hh if there are biases, then weight_hr if there is a projection, then, if the
            cell has weights of the units' own, those as one vector ``[U*H]``, in the order in which it declares them.
        dropout, training: between layers, in training only, with torch's generator.
        batch_sizes: int64 ``[T]`` on the CPU, of a PackedSequence.
        lengths: integer tensor ``[N]`` within 0..T, in any order. Output beyond a row's end is 0.
        resets: bool ``[T, N]``, true at the first step of an episode: the state is zeroed there, in every layer and
            direction, and the gradient is cut.
        return_states: whether to return h (and c) of every layer and step.
        recompute: keep only outputs (and c) for the backward, which computes the gates again.
        reset_after: false for a GRU that resets h before the product, as :class:`rnnfast.GRU` has it.
        of_layers: of each layer what runs it, as :func:`rnnfast.recurrence.layer` does, of its inputs and whether c of
            every step is to be kept; None: a backend.

    Returns:
        output ``[T, N, D*P]`` (or ``[R, D*P]``), h_n, c_n (shape ``[0]`` but for an LSTM) and the states: None, or
        h ``[L, T, N, D*P]``, or for an LSTM (h, c) with c ``[L, T, N, D*H]``.

    Raises:
        RuntimeError: dtypes, devices or shapes do not fit, in torch's words; T is 0 and no lengths are given.
        ValueError: lengths or resets have a wrong shape or dtype; lengths on the CPU leave 0..T; reset_after is false
            of another cell than a GRU, or together with recompute.
    """
    check_mode(mode)
    check_reset_after(mode, reset_after, recompute)
    h0, c0 = (None, None) if hx is None else (hx[0], hx[1] if HAS_CELL_STATE[mode] else None)
    input, h0, c0, weights = _operands(input, h0, c0, weights)
    if input.size(-1) != weights[0].size(1):
        raise _products_differ(input.numel() // max(input.size(-1), 1), input.size(-1), weights[0])
    directions = 1 + bidirectional
    per_direction, beyond = divmod(len(weights), num_layers * directions)
    if beyond:
        raise RuntimeError(
            f"rnnfast: got {len(weights)} weights for {num_layers} layer(s) of {directions} direction(s)"
        )
    per_layer, names = per_direction * directions, names_of(mode, per_direction)
    if hx is not None and not (batch_sizes is not None and torch.compiler.is_compiling()):
        batch = input.size(1) if batch_sizes is None else int(batch_sizes[0])
        w_hh = border.whole(weights[1])
        _check_states(h0, c0, num_layers * directions, batch, w_hh, w_hh.size(0) // GATES[mode])
    if batch_sizes is None:
        lengths = _check_lengths(input, lengths)
        _check_resets(input, resets)

    extended = resets is not None or return_states
    seen = circumstances()
    opaque = seen.compiled and lengths is None and not torch.compiler.is_exporting()
    backend, _ = choose_backend(
        seen, mode, input.device, input.dtype, extended=extended, opaque=opaque, reset_after=reset_after
    )
    if of_layers is not None:
        backend = "reference"
    elif backend in choice.RACED:
        backend = choice.choose(
            seen, backend, mode, input, h0, c0, weights, num_layers=num_layers, bidirectional=bidirectional,
            dropout=dropout, training=training, batch_sizes=batch_sizes, lengths=lengths, resets=resets,
            return_states=return_states, recompute=recompute,
        )  # fmt: skip
    if backend == "torch" and "w_hr" in names and torch.onnx.is_in_onnx_export():
        backend = "reference"  # ONNX has no operator with a projection, and torch's translation of it does not run
    by_torch = None
    if backend == "torch":
        by_torch = functools.partial(
            aten.stack, mode, batch_sizes=batch_sizes, lengths=lengths, bidirectional=bidirectional, training=training
        )
        # A second derivative needs the masks of dropout, and an exporter an operator for each layer.
        if not (dropout and training) and not torch.compiler.is_exporting():
            return *by_torch(input, h0, c0, weights, num_layers=num_layers), None
    y, h_ns, c_ns, hs, cs = input, [], [], [], []
    for k in range(num_layers):
        if k and dropout and training:
            y = F.dropout(y, dropout)
        states = slice(k * directions, (k + 1) * directions)
        of_layer = (
            y,
            h0 if h0 is None or num_layers == 1 else h0[states],
            c0 if c0 is None or num_layers == 1 else c0[states],
            weights[k * per_layer : (k + 1) * per_layer],
        )
        if by_torch:
            y, h_n, c_n = by_torch(*of_layer)
        elif not reset_after and not extended and batch_sizes is None and onnx.is_exporting():
            y, h_n, c_n = onnx.layer(mode, *of_layer, lengths, bidirectional, reset_after)
        else:
            inputs = Inputs(mode, *of_layer[:3], batch_sizes, lengths, resets, bidirectional, names, of_layer[3])
            if of_layers is not None:
                y, h_n, c_n, c = of_layers[k](inputs, return_states)
            elif reset_after:
                y, h_n, c_n, c = recurrence.layer(backend, inputs, keep_c=return_states, recompute=recompute)
            else:
                y, h_n, c_n, c = _resets_before(inputs)
            cs.append(c)
        h_ns.append(h_n)
        c_ns.append(c_n)
        hs.append(y)
    all_states: Tensor | tuple[Tensor, Tensor] | None = None
    if return_states:
        all_hs = _join(torch.stack, hs)
        all_states = (all_hs, _join(torch.stack, cs).to(input.dtype)) if HAS_CELL_STATE[mode] else all_hs
    return y, _join(torch.cat, h_ns), _join(torch.cat, c_ns), all_states


def cell(
    mode: str, input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor], *, reset_after: bool = True
) -> tuple[Tensor, Tensor]:
    """One step of a cell: the function behind :class:`rnnfast.RNNCell`, ``LSTMCell`` and ``GRUCell``.

    Args:
        mode: as for :func:`rnn`.
        input: ``[N, I]``.
        hx: (h,) or, for an LSTM, (h, c), each ``[N, H]``; None is zeros.
        weights: weight_ih, weight_hh and, if there are biases, bias_ih and bias_hh; then as for :func:`rnn`.
        reset_after: as for :func:`rnn`.

    Returns:
        h and c after the step, ``[N, H]``; c has shape ``[0]`` but for an LSTM.

    Raises:
        RuntimeError: dtypes, devices or shapes do not fit, in torch's words.
        ValueError: reset_after is false of another cell than a GRU.
    """
    check_mode(mode)
    check_reset_after(mode, reset_after)
    inputs, hidden = weights[0].size(1), weights[1].size(1)
    if input.size(1) != inputs:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {inputs}")
    for k, state in enumerate(() if hx is None else hx):
        if state.size(0) != input.size(0):
            raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {state.size(0)}")
        if state.size(1) != hidden:
            raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected {hidden}")
    h0, c0 = (None, None) if hx is None else (hx[0], hx[1] if HAS_CELL_STATE[mode] else None)
    input, h0, c0, weights = _operands(input, h0, c0, weights)
    seen = circumstances()
    backend, _ = choose_backend(seen, mode, input.device, input.dtype, reset_after=reset_after)
    if backend in choice.RACED:
        backend = choice.choose(seen, backend, mode, input, h0, c0, weights)
    if backend == "torch":
        return aten.cell(mode, input, h0, c0, weights)
    if h0 is not None:
        h0, c0 = h0.unsqueeze(0), c0 if c0 is None else c0.unsqueeze(0)
    form = None, None, None, False, names_of(mode, len(weights))
    step = Inputs(mode, input.unsqueeze(0), h0, c0, *form, weights)
    _, h_n, c_n, _ = recurrence.layer(backend, step) if reset_after else _resets_before(step)
    return h_n.squeeze(0), c_n.squeeze(0) if HAS_CELL_STATE[mode] else c_n


def _resets_before(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is no operator, and so has no other check. A graph that is recorded guards its sizes by itself."""
    if not is_recorded() and not torch.compiler.is_compiling():
        border.check_layer(inputs._replace(lengths=None))  # which were checked, and may be a transform's
    return reference.layer(inputs, reset_after=False)


def check_reset_after(mode: str, reset_after: bool, recompute: bool = False) -> None:
    if not isinstance(reset_after, bool):
        raise TypeError(f"reset_after should be of type bool, got: {type(reset_after).__name__}")
    if not reset_after and (mode != "GRU" or recompute):
        raise ValueError(f"reset_after=False is for a GRU without recompute, got {mode} with recompute={recompute}")


def _join(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> Tensor:
    """``torch.cat`` or ``torch.stack``, without a copy for a single tensor."""
    if len(tensors) > 1:
        return function(tensors)
    return tensors[0] if function is torch.cat else tensors[0].unsqueeze(0)


def _operands(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, Sequence[Tensor]]:
    """What a backend computes with: cast under autocast, and of one device and dtype, or refused in torch's words."""
    device = input.device
    kind = device.type  # torch makes it anew each time, in a third of a microsecond
    if kind != "meta" and torch.is_autocast_enabled(kind):

        def cast(t: Tensor) -> Tensor:
            return t.to(autocast_dtype(kind, t.dtype))

        input, weights = cast(input), [cast(weight) for weight in weights]
        h0, c0 = h0 if h0 is None else cast(h0), c0 if c0 is None else cast(c0)
    dtype = input.dtype
    for t in (h0, c0, *weights):
        if t is not None and (t.dtype != dtype or t.device != device):
            raise _mismatch(input, t, "hidden" if t is h0 or t is c0 else "parameter")
    return input, h0, c0, weights


def _mismatch(input: Tensor, other: Tensor, kind: str) -> RuntimeError:
    if other.device != input.device:
        return RuntimeError(
            f"Input and {kind} tensors are not at the same device, "
            f"found input tensor at {input.device} and {kind} tensor at {other.device}"
        )
    if input.is_cuda:
        inputs, others = (DTYPE_NAMES.get(t.dtype, t.dtype) for t in (input, other))
        return RuntimeError(
            f"Input and {kind} tensors are not the same dtype, "
            f"found input tensor with {inputs} and {kind} tensor with {others}"
        )
    first, second = (other.dtype, input.dtype) if kind == "hidden" else (input.dtype, other.dtype)
    names = DTYPE_NAMES.get(first, first), DTYPE_NAMES.get(second, second)
    return RuntimeError("mat1 and mat2 must have the same dtype, but got {} and {}".format(*names))


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """What autocast makes of an operand's dtype, by its own rule: the low one if it floats, but float64 stays."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device) if dtype.is_floating_point and dtype != torch.float64 else dtype


def _check_states(h0: Tensor | None, c0: Tensor | None, states: int, batch: int, w_hh: Tensor, hidden: int) -> None:
    for state, width in ((h0, w_hh.size(1)), (c0, hidden)):
        if state is None:
            continue
        if state.size(2) != width:
            raise _products_differ(state.size(1), state.size(2), w_hh)
        if state.size(0) != states:
            raise RuntimeError(f"Expected {'more' if state.size(0) < states else 'fewer'} hidden states in stacked_rnn")
        if state.size(1) != batch:
            raise RuntimeError(
                f"The size of tensor a ({state.size(1)}) must match the size of tensor b ({batch}) "
                "at non-singleton dimension 0"
            )


def _products_differ(rows: int, columns: int, weight: Tensor) -> RuntimeError:
    return RuntimeError(
        f"mat1 and mat2 shapes cannot be multiplied ({rows}x{columns} and {weight.size(1)}x{weight.size(0)})"
    )


def _check_lengths(input: Tensor, lengths: Tensor | None) -> Tensor | None:
    if lengths is None:
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return None
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be an integer tensor, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.size(0) != input.size(1):
        raise ValueError(f"lengths must have shape [{input.size(1)}], the batch size, got {list(lengths.shape)}")
    # A graph may run where this operator, which is Python's, is not; a layer on a CPU checks the values once more.
    if is_recorded() or (torch.compiler.is_exporting() and input.device.type == "cpu"):
        return lengths.to(input.device, torch.int64)
    checked: Tensor = torch.ops.rnnfast.checked_lengths(lengths, input.size(0))
    return checked.to(input.device)


def _check_resets(input: Tensor, resets: Tensor | None) -> None:
    if resets is None:
        return
    if resets.dtype != torch.bool:
        raise ValueError(f"resets must be a bool tensor, got {resets.dtype}")
    if resets.shape != input.shape[:2]:
        raise ValueError(f"resets must have shape {list(input.shape[:2])}, one a step, got {list(resets.shape)}")
    if resets.device != input.device:
        raise ValueError(f"resets must be on the input's device {input.device}, got {resets.device}")
