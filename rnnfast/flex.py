"""Layers of any cell: :class:`FlexRNN`.

Letters as in ``reference.py``; L layers, K heads, X gates of a cell that read ``W_ih x`` and A that read ``W_hh h``.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.types import Device

from . import functional, jagged, ops, reference, variants
from .backends import choose_backend, circumstances
from .cells import CELLS, Cell, check_numbers
from .choice import is_faulty
from .evaluator import RUN, Plan, choose, hexadecimal, layer, no_autocast, programs, recomputed, without_matrix
from .modules import NUMBERS, Options, _check_are_tensors, _Module, options, plain_form

RECURRENCES = ("dense", "diagonal", "none")


class FlexRNN(_Module):
    """A stack of recurrent layers of any cell that :func:`rnnfast.cell` has declared.

    Where the cell has the equations of one of torch's, or of the peephole LSTM, as :mod:`rnnfast.cells` writes them,
    and the recurrence is dense and undivided, the layers run on the same kernels as :class:`rnnfast.LSTM`. So do, where
    the backend ``cuda`` serves, those of CIFG, MGU, LiGRU, the LSTM with relu and, in float32 and float64, JANET and
    leaky neurons. All else runs on a CPU through an evaluator of the cell's operations, with nothing to compile, and on
    a GPU on kernels that Triton compiles of it when it first runs, unless it takes means over rows of more than 4096
    units; and elsewhere, in graphs and transforms of torch's, and where derivatives are derived, as plain torch: in any
    dtype, with any derivative.

    Args:
        cell: what :func:`rnnfast.cell` has made of a function; :mod:`rnnfast.cells` has some.
        input_size, hidden_size: I and H.
        num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as for ``torch.nn.LSTM``.
        recurrent: what W_hh is. ``"dense"``: a matrix; ``"diagonal"``: a vector a gate, each unit sees its own h;
            ``"none"``: absent, a is zero.
        num_heads: K, a divisor of H: a dense W_hh is K blocks on the diagonal, each of the units of one head.
        scalars: other values of scalars that the cell declares.
        recompute: keep only what enters a layer for the backward, which runs the layer once more.
        recurrent_dropout, zoneout, state_clip: as for :class:`rnnfast.LSTM`; zoneout is a number, or of several
            states a tuple of one each. The dropout needs a dense recurrence and an h that begins with 0. With one of
            these the layers of torch's cells, too, run as those of other cells.

    Parameters of layer k are ``weight_ih_l{k}`` ``[X*H, I]``, ``weight_hh_l{k}`` ``[A*H, H]`` (``[K, A*H/K, H/K]`` of
    heads, ``[A*H]`` if diagonal), ``bias_ih_l{k}`` ``[X*H]`` and ``bias_hh_l{k}`` ``[A*H]``, where X and A are the
    gates whose x or a the cell reads, in its order; then ``weight_NAME_l{k}`` ``[H]`` for each of the cell's weights.
    Those of the reverse direction end in ``_reverse``. All begin uniformly within 1/sqrt(H) of zero, as torch.nn's.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent: Literal["dense", "diagonal", "none"] = "dense",
        num_heads: int = 1,
        scalars: Mapping[str, float] | None = None,
        recompute: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        state_clip: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(f"cell must be made by rnnfast.cell, got {type(cell).__name__}")
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, got {size}")
        flags = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "recompute": recompute}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], got {dropout!r}")
        if dropout and num_layers == 1:
            warnings.warn(f"dropout is between layers: dropout={dropout} and num_layers=1 drop nothing", stacklevel=2)
        if recurrent not in RECURRENCES:
            raise ValueError(f"recurrent must be one of {', '.join(RECURRENCES)}, got {recurrent!r}")
        if hidden_size % num_heads or (num_heads > 1 and recurrent != "dense"):
            raise ValueError(
                f"num_heads has to divide hidden_size, and needs a dense recurrence: got {num_heads} heads of "
                f"{hidden_size} units, {recurrent}"
            )
        if num_heads > 1 and not cell.gates_of_a:
            raise ValueError(f"{cell} has no W_hh to divide into heads: it reads no gate of a")
        scalars = check_numbers("scalars", scalars)
        if unknown := scalars.keys() - cell.scalars.keys():
            raise ValueError(f"{cell} has no scalars {sorted(unknown)}, it has {sorted(cell.scalars) or 'none'}")
        if taken := {"ih", "hh"}.intersection(cell.weights):
            raise ValueError(f"{cell}: weights cannot be called {sorted(taken)}, as W_ih and W_hh are")
        own = Options(recurrent_dropout=recurrent_dropout, zoneout=zoneout, state_clip=state_clip)
        self._check_variant(own, len(cell.states))
        if recurrent_dropout and (recurrent != "dense" or not cell.gates_of_a or cell.initial[0]):
            raise ValueError(
                f"recurrent_dropout needs a dense recurrence and an h that begins with 0: got {cell}, {recurrent}"
            )
        if own != Options():
            self._rnnfast_options = own
        self.cell, self.recurrent, self.num_heads = cell, recurrent, num_heads
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout, self.recompute = float(dropout), recompute
        self.scalars = {**cell.scalars, **scalars}
        self._has_own_a = recurrent != "dense" and len(cell.gates_of_a) > 0
        self._run_cell = without_matrix(cell, recurrent, bias) if self._has_own_a else cell

        heads, count, width = num_heads, len(cell.gates_of_a), hidden_size // num_heads
        of_a = {
            "dense": (count * hidden_size, hidden_size) if heads == 1 else (heads, count * width, width),
            "diagonal": (count * hidden_size,),
        }
        has_a = recurrent != "none" and count > 0
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (len(cell.gates_of_x) * hidden_size, input_size)}
        shapes |= {"weight_hh": of_a[recurrent]} if has_a else {}
        shapes |= {"bias_ih": shapes["weight_ih"][:1]} if bias else {}
        shapes |= {"bias_hh": (count * hidden_size,)} if bias and has_a else {}
        shapes |= {f"weight_{name}": (hidden_size,) for name in cell.weights}
        self._names = list(shapes)  # of the weights of one direction
        for k, suffix in self._suffixes():
            if k:
                shapes["weight_ih"] = (*shapes["weight_ih"][:1], hidden_size * (1 + bidirectional))
            for name, shape in shapes.items():
                self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._all_names = [name + suffix for _, suffix in self._suffixes() for name in self._names]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, uniformly within 1/sqrt(H) of zero."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _suffixes(self) -> list[tuple[int, str]]:
        """Of each layer and direction, the layer and how the names of its parameters end."""
        directions = ("", "_reverse")[: 1 + self.bidirectional]
        return [(k, f"_l{k}{direction}") for k in range(self.num_layers) for direction in directions]

    def extra_repr(self) -> str:
        defaults: dict[str, Any] = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        defaults |= {
            "bidirectional": False,
            "recurrent": "dense",
            "num_heads": 1,
            "scalars": self.cell.scalars,
            "recompute": False,
        }
        given = [f"{name}={getattr(self, name)}" for name, of in defaults.items() if getattr(self, name) != of]
        return ", ".join([self.cell.name, str(self.input_size), str(self.hidden_size), *given, *options(self)])

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError("torch.jit.script cannot compile a FlexRNN: use torch.export or torch.jit.trace")

    def forward(
        self,
        input: Tensor | PackedSequence,
        states: Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_states: bool = False,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Any, ...]:
        """Run the layers over a sequence.

        Args:
            input: ``[T, N, I]``, ``[N, T, I]`` if batch_first, ``[T, I]`` unbatched, a PackedSequence, a nested tensor
                of the layout torch.jagged, ``[N, lengths, I]``; with cu_seqlens ``[R, I]``.
            states: of each of the cell's states what it is at first, ``[L*D, N, H]`` (``[L*D, H]`` unbatched); if
                None, the cell's initial values.
            lengths, resets: as for :meth:`rnnfast.LSTM.forward`; a reset gives a state its initial value.
            return_states: also return the states of every layer and step.
            cu_seqlens, max_seqlen: as for :meth:`rnnfast.LSTM.forward`.

        Returns:
            (output, states): ``[T, N, D*H]`` in the layout of the input, and a tuple of the cell's states after the
            last step, ``[L*D, N, H]``. With return_states a third item: a tuple of each of them, ``[L, T, N, D*H]``
            (``[L, N, T, D*H]`` if batch_first, ``[L, T, D*H]`` unbatched, ``[L, R, D*H]`` packed,
            nested or with cu_seqlens).

        Raises:
            ValueError: input or states have a wrong number of dimensions or shape; lengths, resets or cu_seqlens do not
                fit, or come with an input of another form.
            TypeError: lengths, resets, cu_seqlens or a state is no Tensor, or max_seqlen no int.
            RuntimeError: dtypes or devices differ; T is 0 and no lengths are given; use_backend asks for a backend that
                cannot serve the cell.
        """
        if lengths is not None or resets is not None:
            _check_are_tensors(lengths=lengths, resets=resets)
        if cu_seqlens is not None or max_seqlen is not None or (isinstance(input, Tensor) and input.is_nested):
            of_padded = functools.partial(FlexRNN.forward, self)  # not a subclass's own, which is running
            more = lengths, resets, return_states, cu_seqlens, max_seqlen
            return jagged.run(of_padded, self.batch_first, input, states, *more)
        weights = self._weights()
        no_more = lengths is None and resets is None and not return_states
        if no_more and (quick := self._quick(input, states, weights)) is not None:
            return quick  # type: ignore[no-any-return]
        if isinstance(input, PackedSequence):
            if lengths is not None or resets is not None:
                name = "resets" if lengths is None else "lengths"
                raise ValueError(f"{name} cannot be given together with a PackedSequence")
            return self._packed(input, states, return_states, weights)
        if input.dim() not in (2, 3):
            raise ValueError(f"FlexRNN: Expected input to be 2D or 3D, got {input.dim()}D instead")
        is_batched = input.dim() == 3
        states = self._checked(states, 3 if is_batched else 2)
        if not is_batched:
            input = input.unsqueeze(1)
            lengths = lengths if lengths is None else lengths.reshape(-1)
            resets = resets if resets is None else resets.unsqueeze(1)
            states = states if states is None else [state.unsqueeze(1) for state in states]
        elif self.batch_first:
            input = input.transpose(0, 1)
            resets = resets.transpose(0, 1) if resets is not None and resets.dim() == 2 else resets
        y, final, every = self._run(input, states, lengths, resets, return_states, weights)
        if not is_batched:
            y, final, every = y.squeeze(1), [s.squeeze(1) for s in final], [s.squeeze(2) for s in every]
        elif self.batch_first:
            y, every = y.transpose(0, 1), [s.transpose(1, 2) for s in every]
        return (y, tuple(final), tuple(every)) if return_states else (y, tuple(final))

    def _to_states(self, states: Any) -> Sequence[Tensor]:
        return self._checked(states, 3) or ()

    def _to_hidden(self, states: Sequence[Tensor]) -> Any:
        return states

    def _plain_states(self, states: Any) -> Sequence[Tensor] | None:
        fits = isinstance(states, (tuple, list)) and len(states) == len(self.cell.states)
        return states if fits else None

    def _plain(self, input: Tensor, weights: list[Tensor], states: Sequence[Tensor]) -> tuple[Any, ...] | None:
        """What the CPU library makes of it, if that serves; else None."""
        if self.dropout and self.training:
            return None
        if mode := self._mode(None, input.device, input.dtype):
            y, *final = ops.PLAIN(plain_form(self, NUMBERS[mode]), input, self._for_kernels(weights), *states)
            final = final[: len(self.cell.states)]
        else:
            form = plain_form(self, 2 * ("weight_hh" in self._names) + self.bias)
            of_program = hexadecimal(self._scalars()), self.num_heads, len(self.cell.gates_of_x)
            program = programs(self._run_cell, *of_program).plain
            y, final = ops.FLEX_PLAIN(form, program, input, weights, states)
        return None if y is None else (y, tuple(final))

    def _packed(
        self, input: PackedSequence, states: Sequence[Tensor] | None, return_states: bool, weights: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        """As a padded sequence with lengths, its rows in the order of the packed ones."""
        data, batch_sizes, order, back = input
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        states = self._checked(states, 3)
        if states is not None and order is not None:
            self._check_batch(states, order.numel())
            states = [state.index_select(1, order) for state in states]
        y, final, every = self._run(x, states, lengths, None, return_states, weights)

        def pack(padded: Tensor) -> Tensor:
            return pack_padded_sequence(padded, lengths).data

        final = final if back is None else [state.index_select(1, back) for state in final]
        output = PackedSequence(pack(y), batch_sizes, order, back)
        if not return_states:
            return output, tuple(final)
        return output, tuple(final), tuple(torch.stack([pack(of_layer) for of_layer in of]) for of in every)

    def _checked(self, states: Any, dims: int) -> Sequence[Tensor] | None:
        if states is None:
            return None
        names = self.cell.states
        if not isinstance(states, (tuple, list)) or len(states) != len(names):
            raise ValueError(f"states have to be a tuple of {len(names)} Tensors: {', '.join(names)}")
        _check_are_tensors(**dict(zip(names, states)))
        for name, state in zip(names, states):
            if state is None or state.dim() != dims:
                got = "None" if state is None else f"{state.dim()}D"
                raise ValueError(f"FlexRNN: Expected state {name} to be {dims}D, got {got} instead")
        return states

    def _check_batch(self, states: Sequence[Tensor], batch: int) -> None:
        expected = [self.num_layers * (1 + self.bidirectional), batch, self.hidden_size]
        for name, state in zip(self.cell.states, states):
            if list(state.shape) != expected:
                raise ValueError(f"Expected state {name} of shape {expected}, got {list(state.shape)}")

    def _run(
        self,
        x: Tensor,
        states: Sequence[Tensor] | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_states: bool,
        flat: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """Of time-major x the output, the final states and, if they are asked for, those of every layer and step."""
        if x.size(-1) != self.input_size:
            raise ValueError(f"input has {x.size(-1)} features, expected input_size={self.input_size}")
        if states is not None:
            self._check_batch(states, x.size(1))
        names, count = self._names, 1 + self.bidirectional
        variant = self._variant()
        if mode := self._mode(variant, x.device, x.dtype):
            return self._by_kernels(mode, x, states, lengths, resets, return_states, flat)
        lengths = functional._check_lengths(x, lengths)
        functional._check_resets(x, resets)
        x, _, _, flat = functional._operands(x, None, None, flat)
        given: Any = states and [functional._operands(x, state, None, ())[1] for state in states]
        directions = [dict(zip(names, flat[at : at + len(names)])) for at in range(0, len(flat), len(names))]
        backend, _ = choose(x.device, x.dtype, self._run_cell, self.hidden_size, self.num_heads)
        serve = RUN[backend]
        if variant is not None:
            serve = functools.partial(variants.run, serve, variant)
        run: Callable[..., Any] = functools.partial(layer, serve, self._plans(None if return_states else 1))
        run = recomputed(run) if self.recompute else run
        if lengths is not None:  # a NaN beyond a row's end times a gradient of zero is a NaN
            x = torch.where(reference.valid_steps(x.size(0), lengths), x, 0)
        y, finals, every = x, [], []
        with no_autocast(x.device.type):  # its casts have been made
            for k in range(self.num_layers):
                at = slice(k * count, (k + 1) * count)
                if k and self.dropout:
                    y = F.dropout(y, self.dropout, self.training)
                after, final = run(y, given and [state[at] for state in given], lengths, resets, directions[at])
                y = after[0]
                finals.append(final)
                every.append(after)
        of_steps = [torch.stack(of) for of in zip(*every)] if return_states else []
        return y, finals[0] if len(finals) == 1 else [torch.cat(of) for of in zip(*finals)], of_steps

    def _weights(self) -> list[Tensor]:
        return self._weights_called(self._all_names)

    def _plans(self, wanted: int | None) -> list[Plan]:
        """Of each direction."""
        scalars = self._scalars()
        return [Plan(self._run_cell, scalars, reverse, wanted) for reverse in (False, True)[: 1 + self.bidirectional]]

    def _scalars(self) -> tuple[float, ...]:
        """Of the cell that runs."""
        return tuple(self.scalars[name] for name in self.cell.scalars) + (0.0,) * self._has_own_a

    def _mode(self, variant: variants.Variant | None, device: torch.device, dtype: torch.dtype) -> str | None:
        """The mode by which ``functional.rnn`` has the layer; None if it has not, or has no kernels of it there."""
        mode = self.cell.twin
        if mode is None or self.recurrent != "dense" or self.num_heads > 1 or variant is not None:
            return None
        dtype = functional.autocast_dtype(device.type, dtype)
        if self.scalars and dtype.itemsize < 4:  # there they are weights, of the layer's dtype, which would round them
            return None
        if mode in CELLS:
            return mode
        seen = circumstances()
        if seen.forced or device.type == "cpu":
            return mode if seen.forced == "cuda" else None
        serves = choose_backend(seen, mode, device, dtype)[0] == "cuda" and not is_faulty("cuda", mode, device, dtype)
        return mode if serves else None

    def _variant(self) -> variants.Variant | None:
        return self._rnnfast_options.variant(self.training, len(self.cell.states))

    def _by_kernels(
        self,
        mode: str,
        x: Tensor,
        states: Sequence[Tensor] | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        return_states: bool,
        weights: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        y, h_n, c_n, every = functional.rnn(
            mode,
            x,
            states,
            self._for_kernels(weights),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            resets=resets,
            return_states=return_states,
            recompute=self.recompute,
        )
        of_steps = [] if every is None else [every] if isinstance(every, Tensor) else every
        return y, [h_n, c_n][: len(self.cell.states)], of_steps

    def _for_kernels(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """With the weights of units of a direction, and the layer's scalars, in one vector."""
        if not self.cell.weights and not self.scalars:
            return weights
        each, own = len(self._names), len(self._names) - len(self.cell.weights)
        scalars = [weights[0].new_full((self.hidden_size,), self.scalars[name]) for name in self.cell.scalars]
        of_direction = [weights[at : at + each] for at in range(0, len(weights), each)]
        return [w for of in of_direction for w in (*of[:own], torch.cat([*of[own:], *scalars]))]

    def _backend(
        self, device: torch.device, dtype: torch.dtype, batch: int = 1, extended: bool = False
    ) -> tuple[str, str]:
        """As ``choose_backend``: the backend that serves a call, and why."""
        if mode := self._mode(self._variant(), device, dtype):
            sizes = self.hidden_size, batch, self.bidirectional
            return choose_backend(circumstances(), mode, device, dtype, *sizes, extended=extended)
        return choose(device, dtype, self._run_cell, self.hidden_size, self.num_heads, batch)
