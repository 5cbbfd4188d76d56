"""Recurrent layers one step at a time, for loops that have an input only when they have used the output before it."""

from __future__ import annotations

import copy
import ctypes
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backends import BACKENDS, DTYPES, is_forced
from .cells import CELLS
from .flex import FlexRNN
from .modules import OURS, _Cell, _Recurrent

_TYPES = (Tensor, nn.Parameter)
_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_increment_version: Callable[[Any], None] = torch._C._increment_version


class Stream:
    """A layer, a cell, or a sequence of such and of other modules, called for one step, that keeps the state.

    ::

        step = rnnfast.Stream(nn.Sequential(nn.Linear(4, 16), rnnfast.GRU(16, 16), nn.Linear(16, 2)))
        for x in sensor:  # each [1, 4]
            act(step(x))

    It is for inference, without gradients and autocast, and puts the module into eval mode. On a CPU a step of a layer
    is a call of the library, which writes into memory made beforehand and decides next to nothing in Python; a step of
    a :class:`rnnfast.FlexRNN` of another cell than torch's is an operator's call. One thread may use it at a time.

    Args:
        module: an ``RNN``, ``LSTM``, ``GRU`` or cell of rnnfast or torch.nn, a ``FlexRNN``, or an ``nn.Sequential`` of
            such and of modules without a state, which get ``[N, F]``. Layers have one direction; ``batch_first`` makes
            no difference. A copy of their weights is kept: after a change call :meth:`refresh`.
        batch: the number of rows, N.

    Raises:
        TypeError: the module has no recurrent layer or cell, or one of them has a forward or hooks of its own.
        ValueError: a layer has two directions, or a hidden_size for each of its layers; batch is less than 1.
    """

    def __init__(self, module: nn.Module, batch: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"rnnfast.Stream: batch has to be 1 or more, got {batch}")
        self.module, self.batch = module.eval(), batch
        self._steps = [_step(part, batch) for part in _parts(module)]
        self._recurrent = [step for step in self._steps if isinstance(step, _Step)]
        if not self._recurrent:
            raise TypeError(f"rnnfast.Stream: {type(module).__name__} has no recurrent layer or cell to step through")

    def __call__(self, x: Tensor) -> Tensor:
        """The output of one step.

        Args:
            x: ``[N, I]``, or what the first module of a sequence takes.

        Returns:
            ``[N, P]``, or what the last module returns. That of a layer or cell is its state, in memory that the next
            step writes again: clone what has to stay.

        Raises:
            ValueError: x has another shape, dtype or device than the weights and ``batch`` ask for.
        """
        if len(self._steps) == 1:
            return self._recurrent[0](x)
        with torch.no_grad():
            for step, reader in zip(self._steps, [*self._steps[1:], None]):
                x = step(x)
                if isinstance(step, _Step) and reader is not None and not isinstance(reader, _Step):
                    x = x.clone()  # the state is not for others, who may work in place
        return x

    @property
    def state(self) -> Any:
        """As torch.nn has it: of a layer h ``[L, N, P]``, of a cell ``[N, H]``, of an LSTM (h, c), of a FlexRNN a tuple
        of its cell's states; of a sequence a list of these. It is the memory that steps read and write; what is
        assigned is copied there.

        Raises:
            ValueError: what is assigned has another shape.
        """
        states = [step.state for step in self._recurrent]
        return states if isinstance(self.module, nn.Sequential) else states[0]

    @state.setter
    def state(self, value: Any) -> None:
        values = value if isinstance(self.module, nn.Sequential) else [value]
        if len(values) != len(self._recurrent):
            raise ValueError(f"rnnfast.Stream: got {len(values)} states for {len(self._recurrent)} recurrent modules")
        for step, of_step in zip(self._recurrent, values):
            step.put(of_step)

    def reset(self, mask: Tensor | None = None) -> None:
        """Give the state its initial value, zero but for some cells of a FlexRNN, in all rows, or in those where
        ``mask``, bool ``[N]``, is true.

        Raises:
            ValueError: mask has another shape or dtype.
        """
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (self.batch,)):
            raise ValueError(f"mask must be bool of shape [{self.batch}], got {mask.dtype} of {list(mask.shape)}")
        for state, value in (pair for step in self._recurrent for pair in zip(step.states, step.initial)):
            state.fill_(value) if mask is None else state.masked_fill_(mask.to(state.device)[:, None], value)

    def refresh(self) -> None:
        """Take over weights that have changed; the state stays."""
        for step in self._recurrent:
            step.refresh()

    def __reduce__(self) -> Any:  # for copies and pickles: what the library holds is made anew
        return _restored, (type(self), self.module, self.batch, [step.state for step in self._recurrent])


def _restored(cls: type[Stream], module: nn.Module, batch: int, states: list[Any]) -> Stream:
    stream = cls(module, batch)
    stream.state = states if isinstance(module, nn.Sequential) else states[0]
    return stream


def _parts(module: nn.Module) -> list[nn.Module]:
    if type(module) is nn.Sequential:
        return [part for child in module for part in _parts(child)]
    return [module]


def _step(module: nn.Module, batch: int) -> Any:
    return _Step(_ours(module), batch) if isinstance(module, (nn.RNNBase, nn.RNNCellBase, FlexRNN)) else module


def _ours(module: nn.Module) -> Any:
    """The module, or, of one of torch.nn's, a module of ours with its very Parameters."""
    of_torch = next((ours for ours in OURS if type(module).forward is getattr(nn, ours.__name__).forward), None)
    own = of_torch is None and type(module).forward not in (_Recurrent.forward, _Cell.forward, FlexRNN.forward)
    if own or "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        raise TypeError(f"rnnfast.Stream: {type(module).__name__} has a forward or hooks of its own")
    if of_torch is None:
        return module
    twin = copy.copy(module)
    twin.__class__ = of_torch
    return twin


def _mode_of(module: Any) -> str | None:
    """By which the library has the cell of a module of ours; None if it has not."""
    if isinstance(module, FlexRNN):
        weight = module._weights()[0]
        mode = None if module.cell.weights or module.scalars else module._mode(None, weight.device, weight.dtype)
        return mode if mode in CELLS else None
    return str(module._mode if isinstance(module, _Cell) else module.mode)


class _Step:
    """A layer or cell of ours with its state."""

    def __init__(self, module: Any, batch: int) -> None:
        if getattr(module, "bidirectional", False):
            raise ValueError("rnnfast.Stream: a layer of two directions needs its whole input")
        if isinstance(module.hidden_size, list):
            raise ValueError("rnnfast.Stream: layers have one hidden_size, this has one for each")
        self.module, self.is_cell = module, isinstance(module, _Cell)
        weight = module._weights()[0]
        self.dtype, self.device, self.shape = weight.dtype, weight.device, torch.Size((batch, weight.size(1)))
        self.projected = getattr(module, "proj_size", 0)
        of_flex = module.cell.initial if isinstance(module, FlexRNN) else None
        self.initial = of_flex or (0.0,) * (1 + module._has_cell_state)
        widths = [self.projected or module.hidden_size] + [module.hidden_size] * (len(self.initial) - 1)
        layers = () if self.is_cell else (module.num_layers,)
        with torch.inference_mode(False):
            self.states = [
                torch.full((*layers, batch, width), value, dtype=weight.dtype, device=weight.device)
                for width, value in zip(widths, self.initial)
            ]
        self.output = self.states[0] if self.is_cell else self.states[0][-1]
        self._delete: Any = lambda: None
        self.refresh()

    @property
    def state(self) -> Any:
        return self.module._to_hidden(tuple(self.states))

    def put(self, value: Any) -> None:
        values = self.module._to_states(value)
        if [to.shape for to in self.states] != [of.shape for of in values]:
            shapes = [list(of.shape) for of in values], [list(to.shape) for to in self.states]
            raise ValueError("rnnfast.Stream: got states of shapes {}, expected {}".format(*shapes))
        for to, of in zip(self.states, [of.detach().clone() for of in values]):  # they may be our own
            to.copy_(of)

    def refresh(self) -> None:
        """Hand the weights to the library, where it serves them; the module's forward has checked them before."""
        if any(state.untyped_storage().nbytes() < state.numel() * state.element_size() for state in self.states):
            raise RuntimeError("rnnfast.Stream: the memory of the state was taken away")
        self._by_module(torch.zeros(self.shape, dtype=self.dtype, device=self.device))
        self._delete()
        self._run: Any = None
        self._is_served = False
        module, mode = self.module, _mode_of(self.module)
        is_served = (
            self.device.type == "cpu" and self.dtype in DTYPES and module._rnnfast_options.is_usual(training=False)
        )
        if not is_served or not BACKENDS["cpu"].probe(self.device).available:
            return
        # The library reads weights where they lie: no others than these, which nobody else can move or free.
        weights = [weight.detach().clone(memory_format=torch.contiguous_format) for weight in module._weights()]
        if not all(weight.numel() for weight in weights):
            return
        self._kept, self._places, self._is_served = weights, self._places_of_states(), True
        if mode is None:
            return
        layers = 1 if self.is_cell else module.num_layers
        biased = len(weights) // layers - bool(self.projected) > 2
        h, c = (*self._places, None)[:2]
        library = _library()
        self._handle = library.rnnfast_stream_new(
            mode.encode(), DTYPES.index(self.dtype), layers,
            *self.shape, module.hidden_size, self.output.size(1), biased, bool(self.projected),
            (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights)), h, c,
        )  # fmt: skip
        if not self._handle:
            raise MemoryError("rnnfast.Stream: no memory")
        self._delete = weakref.finalize(self, library.rnnfast_stream_delete, self._handle)
        self._run = library.rnnfast_stream_step

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.shape or x.dtype is not self.dtype or x.device != self.device:
            got, expected = (f"{of.dtype} {list(of.shape)} on {of.device}" for of in (x, self))
            raise ValueError(f"rnnfast.Stream: got {got}, expected {expected}")
        if not self._is_served or type(x) not in _TYPES or _dispatch_modes() or _tracing_state() or is_forced():
            self.put(self._by_module(x))
            return self.output
        if self._places != self._places_of_states():  # as share_memory_() moves them
            self.refresh()
        if self._run is None:
            self._by_one_operator(x)
            return self.output
        if not x.is_contiguous() or x.is_neg():
            x = x.resolve_neg().contiguous()
        if self._run(self._handle, x.data_ptr()):
            raise MemoryError("rnnfast.Stream: no memory for a step")
        _increment_version(self.states)  # so that autograd knows what has saved the output
        return self.output

    def _places_of_states(self) -> list[int]:
        return [state.data_ptr() for state in self.states]

    @torch.no_grad()
    def _by_one_operator(self, x: Tensor) -> None:
        """A step of a FlexRNN whose cell the library's streams do not have."""
        with self._in_eval_mode():
            made = self.module._plain(x.unsqueeze(1 if self.module.batch_first else 0), self._kept, self.states)
        if made is None:
            self.put(self._by_module(x))
        else:
            torch._foreach_copy_(self.states, made[1])

    @torch.no_grad()
    def _by_module(self, x: Tensor) -> Any:
        """The state after a step."""
        if self.is_cell:
            return self.module(x, self.state)
        with self._in_eval_mode():
            return self.module(x.unsqueeze(1 if self.module.batch_first else 0), self.state)[1]

    @contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        training, self.module.training = self.module.training, False
        try:
            yield
        finally:
            self.module.training = training


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(str(Path(__file__).with_name("_cpu.so")))
    pointer, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.rnnfast_stream_new.restype = pointer
    library.rnnfast_stream_new.argtypes = [
        ctypes.c_char_p, flag, *[count] * 5, flag, flag, ctypes.POINTER(pointer), pointer, pointer
    ]  # fmt: skip
    library.rnnfast_stream_step.restype, library.rnnfast_stream_step.argtypes = flag, [pointer, pointer]
    library.rnnfast_stream_delete.restype, library.rnnfast_stream_delete.argtypes = None, [pointer]
    return library
