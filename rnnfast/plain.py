"""Inference on a CPU without autograd, tracing, a mode, autocast or a profiler: a whole stack of layers, or a cell, by
one call of the native library, through ctypes, as an operator's call takes longer than a small step.

The library gets bare pointers, and other threads run meanwhile, which may replace a module's weights: whoever calls it
holds the storages that it reads until it returns, and every pointer has been seen to lie within one of these.

Letters as in ``reference.py``, and L layers.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backends import BACKENDS, DTYPES, USUAL, Circumstances, circumstances
from .cells import GATES, HAS_CELL_STATE
from .records import BY_COUNT

# Asked for at every call.
_is_compiling, _is_any_autocast = torch.compiler.is_compiling, torch._C._is_any_autocast_enabled
_dispatch_modes, _is_profiled = torch._C._len_torch_dispatch_stack, torch._C._autograd._profiler_enabled
_CIRCUMSTANCES = USUAL, Circumstances(forced="cpu")
_TYPES = frozenset((Tensor, nn.Parameter))
_IS_AVAILABLE = BACKENDS["cpu"].probe(None).available
_place, _storage = Tensor.data_ptr, Tensor.untyped_storage
_is_contiguous, _is_neg, _facts = Tensor.is_contiguous, Tensor.is_neg, attrgetter("dtype", "shape", "layout")
_MOST_NUMBERS = 2**31  # of an input; the operators refuse more steps, rows or features


def is_plain(input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether a call is inference on a CPU and no more: no derivative, graph, mode or profile, no other Tensors."""
    return (
        not _is_compiling()
        and _IS_AVAILABLE
        and type(input) is Tensor
        and input.is_cpu
        and circumstances() in _CIRCUMSTANCES
        and not _is_any_autocast()
        and not _dispatch_modes()
        and not _is_profiled()
        and _TYPES.issuperset(map(type, (*hx, *weights)))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (input, *hx, *weights)))
    )


class Layers:
    """The weights of a stack of layers, or of a cell, which is one layer, where they lie, as the library takes them.

    Args:
        form: mode, L, and whether there are two directions.
        weights: layer by layer, direction by direction, in torch's order.
        storages: of the weights.

    Raises:
        ValueError: they are no such weights, on a CPU, contiguous and of a dtype that has kernels.
        MemoryError: there is none.
    """

    def __init__(self, form: tuple[str, int, bool], weights: Sequence[Tensor], storages: Sequence[Any]) -> None:
        mode, layers, bidirectional = form
        self.directions = 1 + bidirectional
        self.of_layers = layers * self.directions
        count = len(weights) // max(self.of_layers, 1)
        names = BY_COUNT.get(mode, {}).get(count, "").split()
        if not names or count * self.of_layers != len(weights):
            raise ValueError("a wrong number of weights")
        first = dict(zip(names, weights))
        if any(w.layout is not torch.strided or w.dim() not in (1, 2) for w in weights):
            raise ValueError("weights are no matrices and vectors")
        self.form, self.dtype, self.has_cell, gates = form, weights[0].dtype, HAS_CELL_STATE[mode], GATES[mode]
        self.inputs, self.hidden = weights[0].size(-1), weights[0].size(0) // gates
        self.outputs = first["w_hr"].size(0) if "w_hr" in first else self.hidden
        rows = gates * self.hidden
        shapes = {"w_hh": (rows, self.outputs), "b_ih": (rows,), "b_hh": (rows,), "w_hr": (self.outputs, self.hidden)}
        for k, weight in enumerate(weights):
            shapes["w_ih"] = rows, self.inputs if k < count * self.directions else self.outputs * self.directions
            is_right = weight.shape == shapes[names[k % count]] and weight.dtype is self.dtype and weight.is_cpu
            if not is_right or not weight.is_contiguous() or weight.is_neg() or not weight.numel():
                raise ValueError("weights do not fit")
        if self.dtype not in DTYPES or max(self.inputs, rows) >= _MOST_NUMBERS:
            raise ValueError("no kernels for these weights")
        self._sizes: dict[tuple[torch.Size, int, bool], _Sizes] = {}
        self._places, self._of_weights = [*map(_place, weights)], [*map(_facts, weights)]
        self._in_memory = _extents(storages)
        if not all(map(_lies_in, weights, self._places, storages)):
            raise ValueError("the memory of a weight was taken away")
        functions = library()
        self.handle = functions.rnnfast_layers_new(
            mode.encode(), DTYPES.index(self.dtype), layers, self.directions, self.inputs, self.hidden, self.outputs,
            "b_ih" in first, "w_hr" in first, (ctypes.c_void_p * len(weights))(*self._places),
        )  # fmt: skip
        if not self.handle:
            raise MemoryError("rnnfast: no memory")
        self._run, self._delete = functions.rnnfast_layers_run, functions.rnnfast_layers_delete

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._delete(self.handle)

    def are_of(self, form: tuple[str, int, bool], weights: Sequence[Tensor], storages: Sequence[Any]) -> bool:
        """Whether these weights, in these storages, still are what they were made of."""
        return (
            self.form == form
            and self._of_weights == [*map(_facts, weights)]
            and all(map(_is_contiguous, weights))
            and not any(map(_is_neg, weights))
            and self._in_memory == _extents(storages)
            and self._places == [*map(_place, weights)]
        )

    def __call__(self, input: Tensor, hx: Sequence[Tensor], dims: int, batch_first: bool) -> tuple[Tensor, ...] | None:
        """output, h_n and, for an LSTM, c_n, as torch.nn has them, or None if an argument does not fit.

        Args:
            dims: of an input with a batch: 3, of a cell 2, whose output is h_n.
        """
        key = input.shape, dims, batch_first
        sizes = self._sizes.get(key) or self._sizes_of(*key)
        if sizes is None or len(hx) > len(sizes.of_states):
            return None
        x = _readable(input.transpose(0, 1) if sizes.is_turned else input, self.dtype)
        given: list[Tensor] = []
        for state, shape in zip(hx, sizes.of_states):
            of = _readable(state, self.dtype) if state.shape == shape else None
            if of is None:
                return None
            given.append(of)
        if x is None:
            return None
        finals = [x.new_empty(shape) for shape in sizes.of_states]
        y = x.new_empty(sizes.of_y) if sizes.of_y else finals[0]
        h0, c0 = (*map(_place, given), None, None)[:2]
        h_n, c_n = (*map(_place, finals), None)[:2]
        if self._run(self.handle, sizes.steps, sizes.rows, x.data_ptr(), h0, c0, y.data_ptr(), h_n, c_n):
            return None
        if sizes.of_y:
            finals.insert(0, y.transpose(0, 1) if sizes.is_turned else y)
        return tuple(finals)

    def _sizes_of(self, shape: torch.Size, dims: int, batch_first: bool) -> _Sizes | None:
        lacks, numbers = dims - len(shape), shape.numel()  # a dimension, of the batch
        if lacks not in (0, 1) or shape[-1] != self.inputs or not 0 < numbers < _MOST_NUMBERS:
            return None
        is_cell, is_turned = dims == 2, batch_first and not lacks
        steps = 1 if is_cell else shape[is_turned]
        rows = numbers // (steps * self.inputs)
        batch = () if lacks else (rows,)
        of_state = batch if is_cell else (self.of_layers, *batch)
        of_states = [(*of_state, width) for width in (self.outputs, self.hidden)[: 1 + self.has_cell]]
        of_y = () if is_cell else (steps, *batch, self.outputs * self.directions)
        if len(self._sizes) >= 64:  # of inputs that vary
            self._sizes.clear()
        found = self._sizes[shape, dims, batch_first] = _Sizes(steps, rows, is_turned, of_y, of_states)
        return found


class _Sizes(NamedTuple):
    """Of a call, and the shapes of what it makes."""

    steps: int
    rows: int
    is_turned: bool  # the input, whose batch comes first
    of_y: tuple[int, ...]  # (): a cell's, which is h_n
    of_states: list[tuple[int, ...]]


def _readable(t: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The same where the library can read it, if it can at all."""
    if t.dtype is not dtype or not t.is_cpu or t.layout is not torch.strided:
        return None
    if not t.is_contiguous() or t.is_neg():
        return t.resolve_neg().contiguous()
    return t if _lies_in(t, t.data_ptr(), t.untyped_storage()) else None


def _extents(storages: Sequence[Any]) -> list[tuple[int, int]]:
    return [(storage.data_ptr(), storage.nbytes()) for storage in storages]


def _lies_in(t: Tensor, place: int, storage: Any) -> bool:
    """Whether a contiguous tensor at this place has its memory there: a storage can be made smaller beneath it."""
    begin: int = storage.data_ptr()
    return begin <= place and place + t.nbytes <= begin + storage.nbytes()


_kept: dict[int, tuple[weakref.ref[nn.Module], Layers]] = {}  # by the id of a module


def run(
    module: nn.Module, form: tuple[str, int, bool], input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor],
    dims: int, batch_first: bool,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """As ``Layers.__call__`` of a module's weights, whose Layers are kept until they change."""
    weights = [*weights]  # a module's own list may get others meanwhile
    try:
        storages = [*map(_storage, weights)]
    except RuntimeError:  # there are none of sparse ones
        return None
    key = id(module)
    kept = _kept.get(key)
    layers = kept[1] if kept is not None and kept[0]() is module else None
    if layers is None or not layers.are_of(form, weights, storages):
        try:
            layers = Layers(form, weights, storages)
        except ValueError:
            return None
        _kept[key] = weakref.ref(module, lambda _: _kept.pop(key, None)), layers
    return layers(input, hx, dims, batch_first)


@functools.cache
def library() -> Any:
    found = ctypes.CDLL(str(Path(__file__).with_name("_cpu.so")))
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    weights = ctypes.POINTER(pointer)
    types: dict[str, tuple[Any, list[Any]]] = {
        "layers_new": (pointer, [ctypes.c_char_p, flag, count, flag, *[count] * 3, flag, flag, weights]),
        "layers_run": (flag, [pointer, count, count, *[pointer] * 6]),
        "layers_delete": (None, [pointer]),
        "stream_new": (pointer, [pointer, count, pointer, pointer]),
        "stream_step": (flag, [pointer, pointer]),
        "stream_delete": (None, [pointer]),
    }
    for name, (result, arguments) in types.items():
        function: Callable[..., Any] = getattr(found, f"rnnfast_{name}")
        function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return found
