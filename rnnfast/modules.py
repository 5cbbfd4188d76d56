"""The layers and cells: ``torch.nn``'s own construction, parameters and checks, with our forward.

The layers derive from ``torch.nn.RNNBase``, not from ``torch.nn.LSTM`` and its like: torch.compile refuses whatever is
an instance of those. The cells derive from torch's.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from . import aten, functional, jagged, ops, variants
from .backends import USUAL, Circumstances, circumstances, is_recorded
from .cells import CELLS, GATES
from .variants import Variant

Input = TypeVar("Input", Tensor, PackedSequence)  # and the output is of the same
Hx = TypeVar("Hx")  # the states that a layer or cell takes
Hidden = TypeVar("Hidden")  # and those that it returns

# Asked for at every call.
_is_any_autocast, _is_grad_enabled = torch._C._is_any_autocast_enabled, torch.is_grad_enabled
_dispatch_modes, _storage = torch._C._len_torch_dispatch_stack, Tensor.untyped_storage
_FORCED, _TYPES = Circumstances(forced="cpu"), frozenset((Tensor, nn.Parameter))
NUMBERS = {mode: number for number, mode in enumerate(CELLS)}  # as csrc/cells.h has them
_module_call = nn.Module.__call__  # which some tools replace
_CHECKS = ("check_input", "check_forward_args", "check_hidden_size", "get_expected_hidden_size", "permute_hidden")


class Options(NamedTuple):
    """What makes a module of ours another one than torch.nn's, in one attribute: subclasses keep the short names."""

    reset_after: bool = True
    init: str | None = None
    forget_bias: float | None = None
    weight_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, ...] = 0.0
    layer_norm: bool = False
    state_clip: float | None = None
    hidden_sizes: tuple[int, ...] = ()  # of the layers, where hidden_size is a list
    num_heads: int = 1

    def variant(self, training: bool, states: int = 1) -> Variant | None:
        """How the steps of a call differ from torch.nn's beside ``reset_after``; None: in nothing."""
        if self is _USUAL_OPTIONS:
            return None
        chances = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,) * states
        variant = Variant(
            self.recurrent_dropout if training and self.recurrent_dropout else None,
            tuple(chance if chance else None for chance in chances),
            not training,
            self.state_clip if (training if is_recorded() else torch.is_grad_enabled()) else None,
            self.layer_norm,
            self.num_heads,
        )
        return variant if variant.differs() else None

    def is_usual(self, training: bool) -> bool:
        """Whether a step is torch.nn's."""
        return self is _USUAL_OPTIONS or (
            self.reset_after
            and not self.hidden_sizes
            and not (self.weight_dropout and training)
            and self.variant(training) is None
        )


_USUAL_OPTIONS = Options()


class _Module(nn.Module):
    """What the layers and cells share: torch's tools, and states, which are tuples within whatever the cell.

    torch.fx records one of them as one node, as it does the modules of torch.nn, and before any hook has run.
    """

    _has_cell_state = False
    recompute = False
    _rnnfast_options = _USUAL_OPTIONS
    if TYPE_CHECKING:
        _theirs: Any  # torch.nn's class of the same name
        hidden_size: Any  # an int, or a list of such
    # From this many units on torch's kernels are quicker for a single step under autograd, in float32 on a CPU;
    # bench/README.md has the figures.
    _quicker_by_torch_from = math.inf

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if nn.Module.__call__ is _module_call and self._compiled_call_impl is None:
            return self._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]  # as that would, a frame later
        if _symbolic_trace._is_fx_tracing_flag and (proxy := _proxy_among((*args, *kwargs.values()))) is not None:
            path = proxy.tracer.path_of_module(self)  # type: ignore[attr-defined]  # a Tracer's, to which modules belong
            return proxy.tracer.create_proxy("call_module", path, args, kwargs)
        return nn.Module.__call__(self, *args, **kwargs)

    def _quick(self, input: Any, hx: Any, weights: list[Tensor]) -> Any:
        """What a single operator makes of a call on a CPU that has no more arguments; None if none serves it.

        It is torch's for a single step under autograd, where that is the quicker one, and our library's for inference.
        Most of a small step's time is spent in Python, so there is little here.
        """
        if type(input) is not Tensor or not input.is_cpu:
            return None
        if self._rnnfast_options is not _USUAL_OPTIONS and not self._rnnfast_options.is_usual(self.training):
            return None
        seen = circumstances()
        if (seen is not USUAL and (seen.compiled or seen != _FORCED)) or _is_any_autocast():
            return None
        if _is_grad_enabled() and weights[0].requires_grad:
            is_torchs = seen is USUAL and self._is_quicker_by_torch(input.dtype)
            return self._single(input, hx, weights) if is_torchs else None
        states = () if hx is None else self._plain_states(hx)
        if (
            states is None
            or _dispatch_modes()
            or not _TYPES.issuperset(map(type, (*states, *weights)))  # others may have operators of their own
            or (_is_grad_enabled() and any(t.requires_grad for t in (input, *states, *weights)))
        ):
            return None
        try:
            # Another thread may give a weight other data meanwhile: what the library reads is held until it returns.
            held = [*map(_storage, weights)]
        except RuntimeError:  # there are none of sparse ones
            return None
        served = self._plain(input, weights, states)
        del held
        return served

    def _weights_called(self, names: Sequence[str]) -> list[Any]:
        """As getattr finds them, in a tenth of the time."""
        own = self._parameters  # what is not among them, as parametrized weights are not, is looked up by Module
        return [getattr(self, name) if (weight := own.get(name)) is None else weight for name in names]

    def _is_quicker_by_torch(self, dtype: torch.dtype) -> bool:
        """Whether torch's operator is, of a single step under autograd on a CPU."""
        return dtype is torch.float32 and bool(self.hidden_size >= self._quicker_by_torch_from)

    if TYPE_CHECKING:

        def _single(self, input: Tensor, hx: Any, weights: list[Tensor]) -> Any: ...
        def _plain(self, input: Tensor, weights: list[Tensor], states: Sequence[Tensor]) -> Any: ...

    def __prepare_scriptable__(self) -> nn.Module:
        return _scriptable(self)

    def _set_options(self, **options: Any) -> None:
        """Those that torch.nn does not have; a default leaves a module with torch.nn's attributes and no other."""
        if options.pop("recompute", False):
            self.recompute = True
        own = Options(**options)
        if own.init is not None and (not isinstance(own.init, str) or own.init != "orthogonal"):
            raise ValueError(f"init should be None or 'orthogonal', got {own.init!r}")
        if own.forget_bias is not None and not (_is_number(own.forget_bias) and math.isfinite(own.forget_bias)):
            raise ValueError(f"forget_bias should be None or a finite number, got {own.forget_bias!r}")
        if own.forget_bias is not None and not self.bias:
            raise ValueError("forget_bias is the start of a bias: it needs bias=True")
        if not _is_chance(own.weight_dropout):
            raise ValueError(f"weight_dropout should be a number in the range [0, 1], got {own.weight_dropout!r}")
        self._check_variant(own, 1 + self._has_cell_state)
        if own != Options():
            self._rnnfast_options = own
        self._begin()

    def _check_variant(self, own: Options, states: int) -> None:
        if not _is_chance(own.recurrent_dropout):
            raise ValueError(f"recurrent_dropout should be a number in the range [0, 1], got {own.recurrent_dropout!r}")
        zoneout: Any = own.zoneout
        by_state = isinstance(zoneout, tuple) and len(zoneout) == states > 1
        if not all(map(_is_chance, zoneout if by_state else [zoneout])):
            more = f", or a tuple of {states}, one for each state" if states > 1 else ""
            raise ValueError(f"zoneout should be a number in the range [0, 1]{more}, got {zoneout!r}")
        if not isinstance(own.layer_norm, bool):
            raise TypeError(f"layer_norm should be of type bool, got: {type(own.layer_norm).__name__}")
        if own.state_clip is not None and not (_is_number(own.state_clip) and 0 < own.state_clip < math.inf):
            raise ValueError(f"state_clip should be None or a finite number above 0, got {own.state_clip!r}")
        with torch.enable_grad():
            differs = own.variant(training=True) is not None
        if differs and (getattr(self, "proj_size", False) or not own.reset_after):
            has = "proj_size" if own.reset_after else "reset_after=False"
            raise ValueError(f"recurrent_dropout, zoneout, layer_norm, state_clip and num_heads cannot go with {has}")

    def reset_parameters(self) -> None:
        """As torch.nn's, and then what ``init`` and ``forget_bias`` ask for."""
        if isinstance(self.hidden_size, list):
            for name, weight in self.named_parameters():
                bound = 1 / math.sqrt(self._hidden_of(name))
                nn.init.uniform_(weight, -bound, bound)
        else:
            super().reset_parameters()  # type: ignore[misc]  # of nn.RNNBase or nn.RNNCellBase
        self._begin()

    def _hidden_of(self, name: str) -> int:
        """Of the layer that has a parameter."""
        if isinstance(self.hidden_size, list):
            return int(self.hidden_size[_layer_of(name)])
        return int(self.hidden_size)

    @torch.no_grad()
    def _begin(self) -> None:
        own = self._rnnfast_options
        for name, weight in self.named_parameters(recurse=False):
            if own.init == "orthogonal" and name.startswith("weight_hh"):
                if weight.is_complex():
                    raise ValueError(f"init='orthogonal' is for real dtypes, got {weight.dtype}")
                units = self._hidden_of(name) // own.num_heads  # of a head, whose gates each are a square matrix
                for gate in weight.flatten(0, -2).split(units):
                    # torch has no orthogonal matrices of half types
                    made = torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, torch.float32))
                    gate.copy_(nn.init.orthogonal_(made))
            if name.startswith("gain"):
                weight.fill_(1)
            elif name.startswith("bias_c"):
                weight.zero_()
            elif own.forget_bias is not None and name.startswith("bias"):
                hidden = self._hidden_of(name)
                weight[hidden : 2 * hidden] = own.forget_bias if "_ih" in name else 0

    def extra_repr(self) -> str:
        recompute = ["recompute=True"] if self.recompute is True else []  # and not what a subclass has of that name
        return ", ".join(
            [super().extra_repr(), *recompute, *options(self, [of for of in Options._fields if of != "hidden_sizes"])]
        )

    def _to_states(self, hx: Any) -> Sequence[Tensor]:
        """(h,) or (h, c) of what a caller gives."""
        states: Sequence[Tensor] = hx if self._has_cell_state else (hx,)
        return states

    def _plain_states(self, hx: Any) -> Sequence[Tensor] | None:
        """As _to_states, but None if they are of a wrong kind."""
        if not self._has_cell_state:
            return (hx,)
        return hx if isinstance(hx, (tuple, list)) and len(hx) == 2 else None

    def _to_hidden(self, states: Sequence[Tensor]) -> Any:
        """h or (h, c), as a caller has them."""
        return states if self._has_cell_state else states[0]


def plain_form(module: Any, kind: int) -> int:
    """Of a stack of layers, as csrc/cpu/arguments.h reads it."""
    layouts = (2 if module.batch_first else 0) | (1 if module.bidirectional else 0)
    return int(module.num_layers << 8 | kind << 3 | layouts)


def _layer_of(name: str) -> int:
    """The layer that a parameter, or a suffix of such, belongs to."""
    return int(name.rpartition("_l")[2].partition("_")[0])


def _is_number(value: Any) -> bool:
    """As torch.nn has it of ``dropout``."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_chance(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


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
    if own := options(module):
        raise RuntimeError(f"torch.jit.script compiles torch.nn.{ours.__name__}, which has no {', '.join(own)}")
    twin = copy.copy(module)
    twin.__dict__.pop("_rnnfast_options", None)
    twin.__class__ = getattr(nn, ours.__name__)  # TorchScript knows its overloads; of a subclass it does not
    return twin


OF_NUMBERS = tuple(
    name for name in Options._fields if name not in ("init", "forget_bias")
)  # the options that make other numbers


def options(module: nn.Module, names: Sequence[str] = OF_NUMBERS) -> list[str]:
    """Of a module of ours those that are not as by default."""
    own: Any = module._rnnfast_options
    values = zip(Options._fields, own, Options())
    return [f"{name}={value!r}" for name, value, usual in values if name in names and value != usual]


class _Recurrent(_Module, nn.RNNBase, Generic[Hx, Hidden]):
    """The forward that RNN, LSTM and GRU share."""

    _tensor = ""
    _checks_as_ours = True  # none is overridden: a call that skips them would skip the user's
    if TYPE_CHECKING:  # TorchScript reads annotations, too
        _name: str
        _flat_weights: list[Any]  # Tensors, and None where one was deleted

    def __init__(
        self, mode: str, input_size: int, hidden_size: Any, num_layers: int, *args: Any, **options: Any
    ) -> None:
        sizes = self._sizes(hidden_size, num_layers, args) if isinstance(hidden_size, (list, tuple)) else []
        if sizes:
            hidden_size, num_layers = sizes[0], len(sizes)
        # What convert makes has torch.nn.LSTM between, with another signature.
        nn.RNNBase.__init__(self, mode, input_size, hidden_size, num_layers, *args)
        heads = self._check_heads(options.get("num_heads", 1), sizes or [hidden_size])
        if sizes:
            self.hidden_size, options["hidden_sizes"] = sizes, tuple(sizes)
        if sizes or heads > 1:
            self._resize(sizes or [hidden_size] * num_layers, heads)
        if options.get("layer_norm") is True:
            like = self._flat_weights[0]
            for suffix in self._suffixes():
                for name, size in variants.norm_sizes(mode, self._hidden_of(suffix), self.bias).items():
                    self.register_parameter(name + suffix, nn.Parameter(like.new_empty(size)))
        self._set_options(**options)

    @staticmethod
    def _sizes(sizes: Sequence[Any], num_layers: int, others: Sequence[Any]) -> list[int]:
        """Of layers, checked in torch's words."""
        for size in sizes:
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"hidden_size should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError("hidden_size must be greater than zero")
        if not sizes or num_layers not in (1, len(sizes)):
            raise ValueError(f"hidden_size has to have a size for each layer, got {sizes} and num_layers={num_layers}")
        *_, proj_size, _, _ = others
        if proj_size:
            raise ValueError("proj_size cannot go with a hidden_size for each layer")
        return list(sizes)

    @staticmethod
    def _check_heads(heads: Any, sizes: Sequence[int]) -> int:
        if not isinstance(heads, int) or isinstance(heads, bool):
            raise TypeError(f"num_heads should be of type int, got: {type(heads).__name__}")
        if heads <= 0 or any(size % heads for size in sizes):
            raise ValueError(f"num_heads has to be a divisor of hidden_size, got {heads} heads of {sizes[0]} units")
        return heads

    def _resize(self, sizes: list[int], heads: int) -> None:
        """Give each layer its own size, and its W_hh so many blocks on the diagonal."""
        below = [self.input_size, *(size * (1 + self.bidirectional) for size in sizes)]
        for name, weight in list(self.named_parameters()):
            k = _layer_of(name)
            rows = GATES[self.mode] * sizes[k]
            shape = [rows, below[k] if "_ih" in name else sizes[k]][: weight.dim()]
            if heads > 1 and name.startswith("weight_hh"):
                shape = [heads, rows // heads, sizes[k] // heads]
            setattr(self, name, nn.Parameter(weight.new_empty(shape)))
        self.reset_parameters()

    def _suffixes(self) -> list[str]:
        """How the names of parameters end, layer by layer and direction by direction."""
        directions = ("", "_reverse")[: 1 + self.bidirectional]
        return [f"_l{k}{direction}" for k in range(self.num_layers) for direction in directions]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = next((base for base in cls.__mro__ if base.__module__ == __name__), cls)
        cls._checks_as_ours = all(getattr(cls, name) is getattr(ours, name) for name in _CHECKS)

    def flatten_parameters(self) -> None:
        """Does nothing: weights are read where they lie, so they need no single chunk of memory."""

    @overload
    def forward(
        self,
        input: Input,
        hx: Hx | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: Literal[False] = False,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Input, Hidden]: ...

    @overload
    def forward(
        self,
        input: Input,
        hx: Hx | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: Literal[True],
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Input, Hidden, Hidden]: ...

    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Hx | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Any, ...]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Hx | None = None,
        *more: Any,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Any, ...]:
        """Run the layers over a sequence; the first two arguments and results are ``torch.nn``'s.

        Args:
            input: ``[T, N, I]``, ``[N, T, I]`` if batch_first, ``[T, I]`` unbatched, a PackedSequence, or a nested
                tensor of the layout torch.jagged, ``[N, lengths, I]``; with cu_seqlens ``[R, I]``.
            hx: h_0 ``[L*D, N, P]`` (``[L*D, P]`` unbatched), for an LSTM (h_0, c_0); zeros if None.
            lengths: integer tensor ``[N]`` (``[]`` unbatched) on any device, in any order, 0 allowed: row n has
                ``lengths[n]`` valid steps. The output beyond them is 0, h_n is the last valid state, and the reverse
                direction starts at the last valid step. On a GPU, values outside 0..T are clamped.
            resets: bool ``[T, N]`` (``[N, T]`` if batch_first, ``[T]`` unbatched), true at the first step of an
                episode. In every layer and direction, what comes out on an episode is what comes out when the stack
                runs on it alone. hx enters the forward direction before step 0, unless that step is a reset, and
                the reverse direction's last episode.
            return_states: also return the states of every layer and step.
            cu_seqlens: int32 or int64 ``[N + 1]`` on the input's device, of sequences one after the other: number n is
                the rows cu_seqlens[n] to cu_seqlens[n + 1] of the input, output and resets (``[R]``, as of a nested
                input too). batch_first is ignored.
            max_seqlen: T or more, of these. With it a GPU is not waited for, and wrong cu_seqlens are clamped.

        Returns:
            (output, h_n), for an LSTM (output, (h_n, c_n)); with return_states a third item: h
            ``[L, T, N, D*P]`` (``[L, N, T, D*P]`` if batch_first, ``[L, T, D*P]`` unbatched, ``[L, R, D*P]`` packed,
            nested or with cu_seqlens), for an LSTM (h, c), c with H for P.

        Raises:
            ValueError: input has a wrong number of dimensions or dtype; lengths, resets or cu_seqlens do not fit, or
                come with an input of another form.
            TypeError: lengths, resets or cu_seqlens is no Tensor, or max_seqlen no int.
            RuntimeError: hx or input has a wrong size, in torch's words.
        """
        if more:  # torch.onnx's older exporter gives all arguments by position, also those that were left out
            if len(more) != 5 or not torch.onnx.is_in_onnx_export():
                raise TypeError(f"forward() takes from 2 to 3 positional arguments but {3 + len(more)} were given")
            lengths, resets, return_states, cu_seqlens, max_seqlen = more
        if lengths is not None or resets is not None:
            _check_are_tensors(lengths=lengths, resets=resets)
        if cu_seqlens is not None or max_seqlen is not None or (isinstance(input, Tensor) and input.is_nested):
            of_padded = functools.partial(_Recurrent.forward, self)  # not a subclass's own, which is running
            more = lengths, resets, return_states, cu_seqlens, max_seqlen
            return jagged.run(of_padded, self.batch_first, input, hx, *more)
        weights = self._weights()
        no_more = lengths is None and resets is None and not return_states
        if no_more and (quick := self._quick(input, hx, weights)) is not None:
            return quick  # type: ignore[no-any-return]
        dropped = self._rnnfast_options.weight_dropout
        if dropped and self.training:
            weights = [
                F.dropout(weight, dropped) if name.startswith("weight_hh") else weight
                for name, weight in zip(self._flat_weights_names, weights)
            ]
        output: Tensor | PackedSequence
        if isinstance(input, PackedSequence):
            output, final, states = self._packed(input, hx, lengths, resets, return_states, weights)
            hidden = self.permute_hidden(self._to_hidden(final), input.unsorted_indices)
        else:
            output, final, states = self._padded(input, hx, lengths, resets, return_states, weights)
            hidden = self.permute_hidden(self._to_hidden(final), None)
        return (output, hidden, self._to_hidden(states)) if return_states else (output, hidden)

    if TYPE_CHECKING:  # a Module's is known to take and return anything
        __call__ = forward

    def _single(self, input: Tensor, hx: Any, weights: list[Tensor]) -> tuple[Any, ...] | None:
        """What torch's kernels make of a single step; None of more, or where torch.nn would read other weights."""
        if input.dim() < 2 or weights is not self._flat_weights:
            return None
        if input.size(1 if self.batch_first and input.dim() == 3 else 0) != 1:
            return None
        # What torch.nn's forward calls in the end; its checks, most of a small step's time, are implied by these.
        if input.dim() == 3 and input.size(2) == self.input_size and self._checks_as_ours:
            rows = input.size(0 if self.batch_first else 1)
            shape = self.num_layers * (1 + self.bidirectional), rows, self.hidden_size
            hx = input.new_zeros(shape) if hx is None else hx
            if type(hx) is Tensor and hx.shape == shape and weights[0].dtype is input.dtype:
                form = self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first
                return aten.STACKS[self.mode](input, hx, weights, *form)
        found: tuple[Any, ...] = self._theirs.forward(self, input, hx)
        return found

    def _plain(self, input: Tensor, weights: list[Tensor], states: Sequence[Tensor]) -> tuple[Any, ...] | None:
        """What the CPU library makes of it, if that serves; else None."""
        if not self._checks_as_ours or (self.dropout and self.training):
            return None
        y, h, c = ops.PLAIN(plain_form(self, NUMBERS[self.mode]), input, weights, *states)
        return None if h is None else (y, h if c is None else (h, c))

    def _packed(
        self, input: PackedSequence, hx: Any, lengths: Tensor | None, resets: Tensor | None, return_states: bool,
        weights: Sequence[Tensor],
    ) -> tuple[PackedSequence, Sequence[Tensor], Sequence[Tensor]]:  # fmt: skip
        """The output, the final states in its order, and those of every step."""
        if lengths is not None or resets is not None:
            name = "resets" if lengths is None else "lengths"
            raise ValueError(f"{name} cannot be given together with a PackedSequence")
        data, batch_sizes, sorted_indices, unsorted_indices = input
        states = None
        if hx is not None:
            if sorted_indices is not None:
                _check_caller_order(self._to_states(hx), sorted_indices)
            states = self._to_states(self.permute_hidden(hx, sorted_indices))
        self._check(data, states, batch_sizes)
        output, final, all_states = self._rnn(data, states, weights, return_states, batch_sizes=batch_sizes)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), final, all_states

    def _padded(
        self, input: Tensor, hx: Any, lengths: Tensor | None, resets: Tensor | None, return_states: bool,
        weights: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:  # fmt: skip
        """The output, the final states, and those of every step, in the layout of the input."""
        dims = input.dim()
        if dims not in (2, 3):
            raise ValueError(f"{self._name}: Expected input to be 2D or 3D, got {dims}D{self._tensor} instead")
        batched = dims == 3
        states = None if hx is None else self._batched(self._to_states(hx), batched)
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            lengths = lengths if lengths is None else lengths.reshape(-1)
            resets = resets if resets is None else resets.unsqueeze(1)
        self._check(input, states, None)
        if self.batch_first:
            input = input.transpose(0, 1)
            if batched and resets is not None and resets.dim() == 2:
                resets = resets.transpose(0, 1)
        output, final, states = self._rnn(input, states, weights, return_states, lengths=lengths, resets=resets)
        if not batched:
            return output.squeeze(1), tuple(s.squeeze(1) for s in final), tuple(s.squeeze(2) for s in states)
        if self.batch_first:
            return output.transpose(0, 1), final, tuple(s.transpose(1, 2) for s in states)
        return output, final, states

    def _rnn(
        self,
        input: Tensor,
        states: Sequence[Tensor] | None,
        weights: Sequence[Tensor],
        return_states: bool,
        *,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """Of time-major input the output, the final states, and, if they are asked for, those of every step."""
        run = functools.partial(
            functional.rnn,
            self.mode,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            lengths=lengths,
            resets=resets,
            return_states=return_states,
            recompute=self.recompute,
            reset_after=self._rnnfast_options.reset_after,
        )
        of_layers = self._of_layers()
        if isinstance(self.hidden_size, list):
            return self._layer_by_layer(run, input, states, weights, of_layers)
        output, h_n, c_n, all_states = run(input, states, weights, num_layers=self.num_layers, of_layers=of_layers)
        final = (h_n, c_n) if self._has_cell_state else (h_n,)
        return output, final, self._to_states(all_states) if return_states else ()

    def _layer_by_layer(
        self, run: Any, y: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor], of_layers: Any
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """As ``_rnn``, where each layer has its size: their states lie side by side."""
        sizes, finals, every = self.hidden_size, [], []
        each = len(weights) // len(sizes)
        for k in range(len(sizes)):
            if k and self.dropout and self.training:
                y = F.dropout(y, self.dropout)
            given = states and [state.split(sizes, 2)[k] for state in states]
            own = weights[k * each : (k + 1) * each]
            y, h_n, c_n, of_steps = run(y, given, own, of_layers=of_layers and of_layers[k : k + 1])
            finals.append((h_n, c_n)[: 1 + self._has_cell_state])
            every.append(() if of_steps is None else self._to_states(of_steps))
        return y, tuple(torch.cat(of, 2) for of in zip(*finals)), tuple(torch.cat(of, -1) for of in zip(*every))

    def _of_layers(self) -> list[Any] | None:
        """What runs the layers, where their steps are not torch.nn's."""
        variant = self._rnnfast_options.variant(self.training, 1 + self._has_cell_state)
        if variant is None:
            return None
        names = variants.norm_sizes(self.mode, 0, self.bias) if variant.layer_norm else ()
        norms = [{name: getattr(self, name + suffix) for name in names} for suffix in self._suffixes()]
        count = 1 + self.bidirectional
        return [
            functools.partial(variants.layer, variant, norms[at : at + count], self.recompute)
            for at in range(0, len(norms), count)
        ]

    def _weights(self) -> list[Tensor]:
        """What torch.nn computes from: ``_flat_weights``, but for attributes that were replaced after it was made."""
        flat, names, parameters = self._flat_weights, self._flat_weights_names, self._parameters
        for name, weight in zip(names, flat):
            if weight is None or parameters.get(name) is not weight:
                break
        else:
            return flat
        weights: list[Any] = [getattr(self, name, None) for name in names]
        refs = self._flat_weight_refs
        if any(w is not None and ref is not None and ref() is not w for w, ref in zip(weights, refs)):
            weights = [f if w is None else w for w, f in zip(weights, flat)]
        else:
            weights = flat
        for name, weight in zip(names, weights):
            if weight is None:
                raise TypeError(f"{name} must be a Tensor, not None")
        return weights

    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """torch's; where each layer has its size, their states lie side by side."""
        return self._side_by_side(super().get_expected_hidden_size(input, batch_sizes))

    def _side_by_side(self, expected: tuple[int, int, Any]) -> tuple[int, int, int]:
        _, batch, size = expected
        return (1 + self.bidirectional, batch, sum(size)) if isinstance(size, list) else expected

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """torch's check. It reads the dtype of ``_flat_weights``, behind which functional_call swaps the weights."""
        if input.dtype != self._flat_weights[0].dtype:
            self._update_flat_weights()
        super().check_input(input, batch_sizes)

    def _check(self, input: Tensor, states: Sequence[Tensor] | None, batch_sizes: Tensor | None) -> None:
        """torch's checks; of packed input with states they need the batch size, which compilation does not know."""
        if states is None or (batch_sizes is not None and torch.compiler.is_compiling()):
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, self._to_hidden(states), batch_sizes)

    def _batched(self, states: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        """States with a batch dimension, after torch's check of their dimensions."""
        (h,) = states
        if h.dim() != 2 + batched:
            kind, dims = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
            raise RuntimeError(f"For {kind} input, hx should also be {dims}-D but got {h.dim()}-D tensor")
        return states if batched else (h.unsqueeze(1),)


def _check_are_tensors(**arguments: Any) -> None:
    for name, given in arguments.items():
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(given).__name__}")


def _check_caller_order(states: Sequence[Tensor], sorted_indices: Tensor) -> None:
    for state in states:
        if state.dim() == 3 and state.size(1) != sorted_indices.numel():
            raise RuntimeError(f"Expected hidden batch size {sorted_indices.numel()}, got {list(state.shape)}")


class RNN(_Recurrent[Tensor, Tensor]):
    """``torch.nn.RNN`` on fused kernels: the same arguments, parameters, state_dict and results.

    Maths, shapes and errors: the page of ``torch.nn.RNN``. :meth:`forward` takes ``lengths``, ``resets`` and
    ``return_states`` beside.

    Args:
        recompute: keep only the output from forward to backward, which then computes the gates again.
        init: ``"orthogonal"``: weight_hh begins as an orthogonal matrix (Saxe et al., 2014); None: as torch.nn's.
        weight_dropout: in training the chance of each number of weight_hh to be 0 in a call, in all of its steps; the
            others are divided by 1 - weight_dropout (Merity et al., "Regularizing and Optimizing LSTM Language Models",
            2018).

        recurrent_dropout, zoneout, state_clip: as of :class:`rnnfast.LSTM`, of h alone.
        num_heads: as of :class:`rnnfast.LSTM`.
        layer_norm: as of :class:`rnnfast.LSTM`, ``h_t = tanh(LN(W_ih x; gain_ih, bias_ih) + LN(W_hh h; gain_hh,
            bias_hh))``, or relu of that.

    A list as ``hidden_size``, and what serves these options: as of :class:`rnnfast.LSTM`.

    Raises:
        ValueError: an option is none of these; num_heads is no divisor of hidden_size.
        TypeError: layer_norm is no bool, or num_heads no int.
    """

    _name, _tensor = "RNN", " tensor"
    _theirs, _quicker_by_torch_from = nn.RNN, 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        init: str | None = None,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        state_clip: float | None = None,
        num_heads: int = 1,
        proj_size: None = None,
    ) -> None:
        _refuse_projection(proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0
        own: dict[str, Any] = {"recompute": recompute, "init": init, "weight_dropout": weight_dropout}
        own |= {"recurrent_dropout": recurrent_dropout, "zoneout": zoneout}
        own |= {"layer_norm": layer_norm, "state_clip": state_clip, "num_heads": num_heads}
        super().__init__(f"RNN_{nonlinearity.upper()}", *sizes, device, dtype, **own)


class LSTM(_Recurrent[Sequence[Tensor], tuple[Tensor, Tensor]]):
    """``torch.nn.LSTM`` on fused kernels: the same arguments, parameters, state_dict and results.

    Maths, shapes and errors: the page of ``torch.nn.LSTM``. :meth:`forward` takes ``lengths``, ``resets`` and
    ``return_states`` beside.

    Args:
        recompute: keep only the output and c from forward to backward, which then computes the gates again.
        init: ``"orthogonal"``: the part of weight_hh of each gate begins as an orthogonal matrix, or with a projection
            with orthogonal columns (Saxe et al., 2014); None: as torch.nn's.
        forget_bias: what the bias of the forget gate begins with (Jozefowicz et al., 2015): bias_ih has it, and
            bias_hh 0; None: as torch.nn's.
        weight_dropout: in training the chance of each number of weight_hh to be 0 in a call, in all of its steps; the
            others are divided by 1 - weight_dropout (Merity et al., "Regularizing and Optimizing LSTM Language Models",
            2018).

        recurrent_dropout: in training the chance p of each number of h to be 0 where W_hh multiplies it, by one mask m
            for all steps of a row, drawn for each layer and direction: ``W_hh (m * h_{t-1} / (1 - p))`` (Gal and
            Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016).
        zoneout: the chance of each number of h and of c to stay in a step what it was, or a pair, for h and for c. In
            training ``h_t = d * h_{t-1} + (1 - d) * o * tanh(f * c_{t-1} + i * g)``, with a mask d for each step, in
            eval mode the same with the chance for d; and so c_t, with a mask of its own (Krueger et al., "Zoneout:
            Regularizing RNNs by Randomly Preserving Hidden Activations", 2017).
        layer_norm: normalise the products and the cell state (Ba et al., "Layer Normalization", 2016, equations 20
            to 22). With ``LN(z; a, b) = a * (z - mean z) / sqrt(var z + 1e-5) + b``, over all four gates together, the
            gates are ``LN(W_ih x; gain_ih, bias_ih) + LN(W_hh h; gain_hh, bias_hh)``, and
            ``h_t = o * tanh(LN(c_t; gain_c, bias_c))``. The gains begin with 1, bias_c with 0; the paper's bias b
            is in bias_ih and bias_hh.
        state_clip: the bound of the gradients of h_t and c_t as they leave a step, h_t's with the output's and that
            from the next step: in the backward they are clamped to [-state_clip, state_clip] before they go into the
            step (as Graves does with the gates', "Generating Sequences With Recurrent Neural Networks", 2013). What a
            layer computes stays the same, and so do its forward-mode derivatives, as tangents are not clipped. Those of
            a gradient are the clipped gradient's; but what is derived in reverse once more is clipped once more, and so
            is no derivative of the clipped gradient.
        num_heads: K, a divisor of H: W_hh is K blocks on the diagonal, each of the units of one head, as in
            :class:`rnnfast.FlexRNN`: ``weight_hh_l{k}`` is ``[K, G*H/K, H/K]``, a head after the other and of each its
            G gates. It goes with all of these, whose equations stay the same.

    With a list ``hidden_size`` has a size for each layer, and h_0, h_n, c_0 and c_n are ``[D, N, sum(hidden_size)]``,
    layer beside layer; so are the states of every step, ``[1, T, N, D * sum(hidden_size)]``.

    Where a step is another one than torch.nn's (``recurrent_dropout`` in training, ``zoneout``, ``layer_norm``,
    ``num_heads``, ``state_clip`` where a gradient is asked for), the layers run as those of :class:`rnnfast.FlexRNN`
    do: on a CPU by the native library's evaluator, on a GPU by Triton's kernels, but with ``layer_norm`` of more than
    4096 units as plain torch there. Random numbers are of torch's generators. Dtypes are real.

    Raises:
        ValueError: an option is none of these; there is a forget_bias and no bias; num_heads is no divisor of
            hidden_size; proj_size comes with one of recurrent_dropout, zoneout, layer_norm, state_clip and num_heads,
            or with a list of sizes.
        TypeError: layer_norm is no bool, or num_heads no int.
    """

    _name, _has_cell_state = "LSTM", True
    _theirs = nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        init: str | None = None,
        forget_bias: float | None = None,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        layer_norm: bool = False,
        state_clip: float | None = None,
        num_heads: int = 1,
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        own: dict[str, Any] = {
            "recompute": recompute,
            "init": init,
            "forget_bias": forget_bias,
            "weight_dropout": weight_dropout,
        }
        own |= {"recurrent_dropout": recurrent_dropout, "zoneout": zoneout}
        own |= {"layer_norm": layer_norm, "state_clip": state_clip, "num_heads": num_heads}
        super().__init__("LSTM", *sizes, device, dtype, **own)

    # torch.nn.LSTM's module interface, itself no base of ours: its methods serve as they are.
    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        return self._side_by_side(nn.LSTM.get_expected_cell_size(self, input, batch_sizes))  # type: ignore[arg-type]

    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]  # of two states, as torch overrides it
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def _check(self, input: Tensor, states: Sequence[Tensor] | None, batch_sizes: Tensor | None) -> None:
        if states is not None and len(states) != 2:
            raise RuntimeError("lstm expects two hidden states")
        if batch_sizes is None:  # torch leaves a packed LSTM's checks to its operator, and so do we
            super()._check(input, states, batch_sizes)
        if isinstance(states, Tensor):
            raise TypeError("lstm() received an invalid combination of arguments: hx must be a tuple of two Tensors")

    def _batched(self, states: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        h, c = states[0], states[1]
        if h.dim() != 2 + batched or c.dim() != 2 + batched:
            kind, dims = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dims}-D but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )
        return states if batched else (h.unsqueeze(1), c.unsqueeze(1))


class GRU(_Recurrent[Tensor, Tensor]):
    """``torch.nn.GRU`` on fused kernels: the same arguments, parameters, state_dict and results.

    Maths, shapes and errors: the page of ``torch.nn.GRU``. :meth:`forward` takes ``lengths``, ``resets`` and
    ``return_states`` beside.

    Args:
        recompute: keep only the output from forward to backward, which then computes the gates again.
        reset_after: False: the reset gate comes before the product, as Cho et al. have it ("Learning Phrase
            Representations using RNN Encoder-Decoder", 2014), and by default ONNX:
            ``n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)``. That is plain torch, step by step, on every device.
        init: ``"orthogonal"``: the part of weight_hh of each gate begins as an orthogonal matrix (Saxe et al., 2014);
            None: as torch.nn's.
        weight_dropout: in training the chance of each number of weight_hh to be 0 in a call, in all of its steps; the
            others are divided by 1 - weight_dropout (Merity et al., "Regularizing and Optimizing LSTM Language Models",
            2018).

        recurrent_dropout, zoneout, state_clip: as of :class:`rnnfast.LSTM`, of h alone.
        num_heads: as of :class:`rnnfast.LSTM`.
        layer_norm: as of :class:`rnnfast.LSTM`, but of r and z together, and of the candidate by itself, as the paper's
            supplement has it of GRUs: ``n = tanh(LN(W_in x; ...) + r * LN(W_hn h; ...))``.


    A list as ``hidden_size``, and what serves these options: as of :class:`rnnfast.LSTM`.

    Raises:
        ValueError: an option is none of these; reset_after is false, and recompute true or one of recurrent_dropout,
            zoneout, layer_norm, state_clip and num_heads given; num_heads is no divisor of hidden_size.
        TypeError: reset_after or layer_norm is no bool, or num_heads no int.
    """

    _name = "GRU"
    _theirs, _quicker_by_torch_from = nn.GRU, 128

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        reset_after: bool = True,
        init: str | None = None,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        state_clip: float | None = None,
        num_heads: int = 1,
        proj_size: None = None,
    ) -> None:
        _refuse_projection(proj_size)
        functional.check_reset_after("GRU", reset_after, recompute)
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0
        own: dict[str, Any] = {
            "recompute": recompute,
            "reset_after": reset_after,
            "init": init,
            "weight_dropout": weight_dropout,
        }
        own |= {"recurrent_dropout": recurrent_dropout, "zoneout": zoneout}
        own |= {"layer_norm": layer_norm, "state_clip": state_clip, "num_heads": num_heads}
        super().__init__("GRU", *sizes, device, dtype, **own)


def _refuse_projection(proj_size: int | None) -> None:
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


_A_CELL = 1 << 8 | 2 << 1  # the form of one layer, with a layout of its own
_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(_Module, nn.RNNCellBase, Generic[Hx, Hidden]):
    """The forward that RNNCell, LSTMCell and GRUCell share."""

    if TYPE_CHECKING:
        _name: str
        _mode: str

    def forward(self, input: Tensor, hx: Hx | None = None) -> Hidden:
        """One step.

        Args:
            input: ``[N, I]`` or ``[I]``.
            hx: h ``[N, H]`` or ``[H]``, for an LSTMCell (h, c); zeros if None.

        Returns:
            h, for an LSTMCell (h, c), shaped like hx.

        Raises:
            ValueError, RuntimeError: a wrong number of dimensions, size or dtype, in torch's words.
        """
        weights = self._weights()
        if (quick := self._quick(input, hx, weights)) is not None:
            return quick  # type: ignore[no-any-return]
        dims = input.dim()
        if dims not in (1, 2):
            raise ValueError(f"{self._name}: Expected input to be 1D or 2D, got {dims}D instead")
        states = None if hx is None else self._checked(hx)
        if dims == 1:
            input = input.unsqueeze(0)
            states = None if states is None else [state.unsqueeze(0) for state in states]
        h, c = functional.cell(self._mode, input, states, weights, reset_after=self._rnnfast_options.reset_after)
        if dims == 1:
            h, c = h.squeeze(0), c.squeeze(0)
        return self._to_hidden((h, c))  # type: ignore[no-any-return]

    if TYPE_CHECKING:  # a Module's is known to take and return anything
        __call__ = forward

    def _single(self, input: Tensor, hx: Any, weights: list[Tensor]) -> Any:
        """As torch.nn's forward, which reads its attributes slowly."""
        if hx is None and input.dim() == 2:
            zeros = input.new_zeros(input.size(0), weights[1].size(1))
            hx = (zeros, zeros) if self._has_cell_state else zeros
        else:
            states = self._plain_states(hx)
            if states is None or input.dim() != 2 or any(type(s) is not Tensor or s.dim() != 2 for s in states):
                return self._theirs.forward(self, input, hx)
        return aten.CELLS[self._mode](input, hx, *weights)

    def _plain(self, input: Tensor, weights: list[Tensor], states: Sequence[Tensor]) -> Any:
        """What the CPU library makes of it, if that serves; else None."""
        _, h, c = ops.PLAIN(_A_CELL | NUMBERS[self._mode] << 3, input, weights, *states)
        return h if c is None else (h, c)

    def _weights(self) -> list[Tensor]:
        weights = self._weights_called(_CELL_WEIGHTS)
        if weights[2] is None or weights[3] is None:
            given = weights[2] if weights[3] is None else weights[3]
            if given is None:
                del weights[2:]
            else:  # torch.nn takes one without the other
                weights[2:] = (torch.zeros_like(given) if bias is None else bias for bias in weights[2:])
        return weights

    def _checked(self, hx: Any) -> Sequence[Tensor]:
        """The states that a caller gives, with a right number of dimensions."""
        if hx.dim() not in (1, 2):
            raise ValueError(f"{self._name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return (hx,)


class RNNCell(_Cell[Tensor, Tensor], nn.RNNCell):
    """``torch.nn.RNNCell`` on fused kernels: the same arguments, parameters, state_dict and results.

    ``init``: as of :class:`rnnfast.RNN`.
    """

    _name = "RNNCell"
    _theirs, _quicker_by_torch_from = nn.RNNCell, 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        init: str | None = None,
    ) -> None:
        nn.RNNCell.__init__(self, input_size, hidden_size, bias, nonlinearity, device, dtype)
        self._set_options(init=init)

    @property
    def _mode(self) -> str:  # type: ignore[override]  # nobody sets it
        if self.nonlinearity == "tanh":
            return "RNN_TANH"
        if self.nonlinearity == "relu":
            return "RNN_RELU"
        raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")


class LSTMCell(_Cell[Sequence[Tensor], tuple[Tensor, Tensor]], nn.LSTMCell):
    """``torch.nn.LSTMCell`` on fused kernels: the same arguments, parameters, state_dict and results.

    ``init`` and ``forget_bias``: as of :class:`rnnfast.LSTM`.
    """

    _name, _mode, _has_cell_state = "LSTMCell", "LSTM", True
    _theirs, _quicker_by_torch_from = nn.LSTMCell, 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        init: str | None = None,
        forget_bias: float | None = None,
    ) -> None:
        nn.LSTMCell.__init__(self, input_size, hidden_size, bias, device, dtype)
        self._set_options(init=init, forget_bias=forget_bias)

    def _checked(self, hx: Sequence[Tensor]) -> Sequence[Tensor]:
        for idx, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{idx}] to be 1D or 2D, got {state.dim()}D instead")
        if isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        if len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        return hx


class GRUCell(_Cell[Tensor, Tensor], nn.GRUCell):
    """``torch.nn.GRUCell`` on fused kernels: the same arguments, parameters, state_dict and results.

    ``reset_after`` and ``init``: as of :class:`rnnfast.GRU`.
    """

    _name, _mode = "GRUCell", "GRU"
    _theirs, _quicker_by_torch_from = nn.GRUCell, 128

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        init: str | None = None,
    ) -> None:
        functional.check_reset_after("GRU", reset_after)
        nn.GRUCell.__init__(self, input_size, hidden_size, bias, device, dtype)
        self._set_options(reset_after=reset_after, init=init)


OURS = (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
