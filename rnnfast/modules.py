"""The layers and cells: ``torch.nn``'s own construction, parameters and checks, with our forward.

The layers derive from ``torch.nn.RNNBase``, not from ``torch.nn.LSTM`` and its like: torch.compile refuses whatever is
an instance of those. The cells derive from torch's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional


class _Leaf(nn.Module):
    """A module that torch.fx records as one node, as it does those of torch.nn, and before any hook has run."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if fx._symbolic_trace._is_fx_tracing_flag and (proxy := _proxy_among((*args, *kwargs.values()))) is not None:
            return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(self), args, kwargs)
        return nn.Module.__call__(self, *args, **kwargs)


def _proxy_among(values: Sequence[Any]) -> fx.Proxy | None:
    for value in values:
        found = _proxy_among(value) if isinstance(value, (tuple, list)) else value
        if isinstance(found, fx.Proxy):
            return found
    return None


def _scriptable(module: nn.Module) -> nn.Module:
    """What TorchScript compiles in place of a module of ours: torch.nn's, with the very Parameters."""
    cls = type(module)
    ours = next(base for base in cls.__mro__ if base in OURS)
    if cls.forward is not ours.forward:
        return module  # a forward of the user's own, to be compiled
    twin = copy.copy(module)
    twin.__class__ = getattr(nn, ours.__name__)  # TorchScript knows its overloads; of a subclass it does not
    return twin


class _Recurrent(_Leaf, nn.RNNBase):
    """The forward that RNN, LSTM and GRU share."""

    recompute = False

    def __init__(self, mode: str, recompute: bool, *args: Any) -> None:
        nn.RNNBase.__init__(self, mode, *args)  # what convert makes has torch.nn.LSTM between, with another signature
        if recompute:  # else a layer has torch.nn's attributes and no other
            self.recompute = True

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    def flatten_parameters(self) -> None:
        """Does nothing: weights are read where they lie, so they need no single chunk of memory."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | Sequence[Tensor] | None = None,
        *more: Any,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layers over a sequence; the first two arguments and results are ``torch.nn``'s.

        Args:
            input: ``[T, N, I]``, ``[N, T, I]`` if batch_first, ``[T, I]`` unbatched, or a PackedSequence.
            hx: h_0 ``[L*D, N, P]`` (``[L*D, P]`` unbatched), for an LSTM (h_0, c_0); zeros if None.
            lengths: integer tensor ``[N]`` (``[]`` unbatched) on any device, in any order, 0 allowed: row n has
                ``lengths[n]`` valid steps. The output beyond them is 0, h_n is the last valid state, and the reverse
                direction starts at the last valid step. On a GPU, values outside 0..T are clamped.
            resets: bool ``[T, N]`` (``[N, T]`` if batch_first, ``[T]`` unbatched), true at the first step of an
                episode. In every layer and direction, what comes out on an episode is what comes out when the stack
                runs on it alone. hx enters the forward direction before step 0, unless that step is a reset, and
                the reverse direction's last episode.
            return_states: also return the states of every layer and step.

        Returns:
            (output, h_n), for an LSTM (output, (h_n, c_n)); with return_states a third item: h
            ``[L, T, N, D*P]`` (``[L, N, T, D*P]`` if batch_first, ``[L, T, D*P]`` unbatched, ``[L, R, D*P]`` packed),
            for an LSTM (h, c), c with H for P.

        Raises:
            ValueError: input has a wrong number of dimensions or dtype; lengths or resets do not fit, or come with a
                PackedSequence.
            TypeError: lengths or resets is no Tensor.
            RuntimeError: hx or input has a wrong size, in torch's words.
        """
        if more:  # torch.onnx's older exporter gives all arguments by position, also those that were left out
            if len(more) != 3 or not torch.onnx.is_in_onnx_export():
                raise TypeError(f"forward() takes from 2 to 3 positional arguments but {3 + len(more)} were given")
            lengths, resets, return_states = more
        for name, given in (("lengths", lengths), ("resets", resets)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(given).__name__}")
        packed = isinstance(input, PackedSequence)
        batch_sizes = unsorted_indices = None
        if packed:
            if lengths is not None or resets is not None:
                name = "resets" if lengths is None else "lengths"
                raise ValueError(f"{name} cannot be given together with a PackedSequence")
            input, batch_sizes, sorted_indices, unsorted_indices = packed_input = input
            if hx is not None:
                if sorted_indices is not None:
                    self._check_caller_order(hx, sorted_indices)
                hx = self.permute_hidden(hx, sorted_indices)
            self._check(input, hx, batch_sizes)
            batched = time_major = True
        else:
            if input.dim() not in (2, 3):
                raise ValueError(
                    f"{self._name}: Expected input to be 2D or 3D, got {input.dim()}D{self._tensor} instead"
                )
            batched = input.dim() == 3
            time_major = not (batched and self.batch_first)
            if hx is not None:
                hx = self._batched_hx(hx, batched)
            if not batched:
                input = input.unsqueeze(0 if self.batch_first else 1)
                lengths = lengths if lengths is None else lengths.reshape(-1)
                resets = resets if resets is None else resets.unsqueeze(1)
            self._check(input, hx, None)
            if self.batch_first:
                input = input.transpose(0, 1)
            if resets is not None and resets.dim() == 2 and not time_major:
                resets = resets.transpose(0, 1)

        output, h_n, c_n, states = functional.rnn(
            self.mode,
            input,
            hx if hx is None or self.mode == "LSTM" else (hx,),
            self._weights(),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            lengths=lengths,
            resets=resets,
            return_states=return_states,
            recompute=self.recompute,
        )
        if packed:
            output = PackedSequence(output, *packed_input[1:])
        else:
            output = _to_callers_layout(output, batched, time_major)
            if not batched:
                h_n, c_n = h_n.squeeze(1), c_n.squeeze(1) if self.mode == "LSTM" else c_n
            if return_states:
                of = states if self.mode == "LSTM" else (states,)
                of = tuple(_to_callers_layout(s, batched, time_major, dim=1) for s in of)
                states = of if self.mode == "LSTM" else of[0]
        hidden = (h_n, c_n) if self.mode == "LSTM" else h_n
        result = output, self.permute_hidden(hidden, unsorted_indices)
        return (*result, states) if return_states else result

    def _weights(self) -> list[Tensor]:
        """What torch.nn computes from: ``_flat_weights``, but for attributes that were replaced after it was made."""
        flat, names, parameters = self._flat_weights, self._flat_weights_names, self._parameters
        if all(weight is not None and parameters.get(name) is weight for name, weight in zip(names, flat)):
            return flat
        weights = [getattr(self, name, None) for name in names]
        refs = self._flat_weight_refs
        if any(w is not None and ref is not None and ref() is not w for w, ref in zip(weights, refs)):
            weights = [f if w is None else w for w, f in zip(weights, flat)]
        else:
            weights = flat
        for name, weight in zip(names, weights):
            if weight is None:
                raise TypeError(f"{name} must be a Tensor, not None")
        return weights

    def __prepare_scriptable__(self) -> nn.Module:
        return _scriptable(self)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """torch's check. It reads the dtype of ``_flat_weights``, behind which functional_call swaps the weights."""
        if input.dtype != self._flat_weights[0].dtype:
            self._update_flat_weights()
        super().check_input(input, batch_sizes)

    def _check(self, input: Tensor, hx: Any, batch_sizes: Tensor | None) -> None:
        """torch's checks; of packed input with states they need the batch size, which compilation does not know."""
        if hx is None or (batch_sizes is not None and torch.compiler.is_compiling()):
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, hx, batch_sizes)

    def _check_caller_order(self, hx: Tensor | Sequence[Tensor], sorted_indices: Tensor) -> None:
        for state in hx if self.mode == "LSTM" else (hx,):
            if state.dim() == 3 and state.size(1) != sorted_indices.numel():
                raise RuntimeError(f"Expected hidden batch size {sorted_indices.numel()}, got {list(state.shape)}")

    def _batched_hx(self, hx: Tensor, batched: bool) -> Tensor:
        """hx with a batch dimension, after torch's check of its dimensions."""
        if hx.dim() != 2 + batched:
            kind, dims = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
            raise RuntimeError(f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor")
        return hx if batched else hx.unsqueeze(1)


def _to_callers_layout(sequence: Tensor, batched: bool, time_major: bool, dim: int = 0) -> Tensor:
    """From ``[T, N, *]`` at ``dim`` to the layout of the caller's input."""
    if not batched:
        return sequence.squeeze(dim + 1)
    return sequence if time_major else sequence.transpose(dim, dim + 1)


class RNN(_Recurrent):
    """``torch.nn.RNN`` on fused kernels: the same arguments, parameters, state_dict and results.

    Maths, shapes and errors: the page of ``torch.nn.RNN``. :meth:`forward` takes ``lengths``, ``resets`` and
    ``return_states`` beside. With ``recompute=True`` a layer keeps only its output (and c) from forward to backward,
    which then computes the gates again.
    """

    _name, _tensor = "RNN", " tensor"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        proj_size: None = None,
    ) -> None:
        _refuse_projection(proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0
        super().__init__(f"RNN_{nonlinearity.upper()}", recompute, *sizes, device, dtype)


class LSTM(_Recurrent):
    """``torch.nn.LSTM`` on fused kernels: the same arguments, parameters, state_dict and results.

    Maths, shapes and errors: the page of ``torch.nn.LSTM``. :meth:`forward` takes ``lengths``, ``resets`` and
    ``return_states`` beside. With ``recompute=True`` a layer keeps only its output (and c) from forward to backward,
    which then computes the gates again.
    """

    _name, _tensor = "LSTM", ""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        super().__init__("LSTM", recompute, *sizes, device, dtype)

    # torch.nn.LSTM's module interface, itself no base of ours: its methods serve as they are.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def _check(self, input: Tensor, hx: Any, batch_sizes: Tensor | None) -> None:
        if hx is not None and len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        if batch_sizes is None:  # torch leaves a packed LSTM's checks to its operator, and so do we
            super()._check(input, hx, batch_sizes)
        if isinstance(hx, Tensor):
            raise TypeError("lstm() received an invalid combination of arguments: hx must be a tuple of two Tensors")

    def _batched_hx(self, hx: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        if hx[0].dim() != 2 + batched or hx[1].dim() != 2 + batched:
            kind, dims = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dims}-D "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        return hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))


class GRU(_Recurrent):
    """``torch.nn.GRU`` on fused kernels: the same arguments, parameters, state_dict and results.

    Maths, shapes and errors: the page of ``torch.nn.GRU``. :meth:`forward` takes ``lengths``, ``resets`` and
    ``return_states`` beside. With ``recompute=True`` a layer keeps only its output (and c) from forward to backward,
    which then computes the gates again.
    """

    _name, _tensor = "GRU", ""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        proj_size: None = None,
    ) -> None:
        _refuse_projection(proj_size)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0
        super().__init__("GRU", recompute, *sizes, device, dtype)


def _refuse_projection(proj_size: int | None) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(_Leaf, nn.RNNCellBase):
    """The forward that RNNCell, LSTMCell and GRUCell share."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step.

        Args:
            input: ``[N, I]`` or ``[I]``.
            hx: h ``[N, H]`` or ``[H]``, for an LSTMCell (h, c); zeros if None.

        Returns:
            h, for an LSTMCell (h, c), shaped like hx.

        Raises:
            ValueError, RuntimeError: a wrong number of dimensions, size or dtype, in torch's words.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"{self._name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        states = self._states(hx)
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            states = states if states is None else [s.unsqueeze(0) for s in states]
        own = self._parameters  # what is not among them, as parametrized weights are not, is looked up by Module
        weights = [own.get(name) if own.get(name) is not None else getattr(self, name) for name in _CELL_WEIGHTS]
        if weights[2] is None or weights[3] is None:
            given = weights[2] if weights[3] is None else weights[3]
            if given is None:
                del weights[2:]
            else:  # torch.nn takes one without the other
                weights[2:] = (torch.zeros_like(given) if bias is None else bias for bias in weights[2:])
        mode = self._mode
        h, c = functional.cell(mode, input, states, weights)
        if not batched:
            h, c = h.squeeze(0), c.squeeze(0) if mode == "LSTM" else c
        return (h, c) if mode == "LSTM" else h

    def __prepare_scriptable__(self) -> nn.Module:
        return _scriptable(self)

    def _states(self, hx: Tensor | None) -> Sequence[Tensor] | None:
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"{self._name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return hx if hx is None else (hx,)


class RNNCell(_Cell, nn.RNNCell):
    """``torch.nn.RNNCell`` on fused kernels: the same arguments, parameters, state_dict and results."""

    _name = "RNNCell"

    @property
    def _mode(self) -> str:
        if self.nonlinearity == "tanh":
            return "RNN_TANH"
        if self.nonlinearity == "relu":
            return "RNN_RELU"
        raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")


class LSTMCell(_Cell, nn.LSTMCell):
    """``torch.nn.LSTMCell`` on fused kernels: the same arguments, parameters, state_dict and results."""

    _name, _mode = "LSTMCell", "LSTM"

    def _states(self, hx: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        for idx, state in enumerate(() if hx is None else hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{idx}] to be 1D or 2D, got {state.dim()}D instead")
        if isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        if hx is not None and len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        return hx


class GRUCell(_Cell, nn.GRUCell):
    """``torch.nn.GRUCell`` on fused kernels: the same arguments, parameters, state_dict and results."""

    _name, _mode = "GRUCell", "GRU"


OURS = (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
