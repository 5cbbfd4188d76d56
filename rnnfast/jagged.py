"""Sequences one after the other without padding: nested tensors of the jagged layout, and rows with ``cu_seqlens``.

They run as padded sequences with ``lengths``, on the same kernels. Letters as in ``reference.py``; R rows in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import LIBRARY


class Places(NamedTuple):
    """Where the rows of R are among padded ones, and back."""

    lengths: Tensor  # [N]
    steps: int  # T
    of_padded: Tensor  # [T*N]: the row at each place; any row where there is none
    of_rows: Tensor  # [R]: the place of each row

    def pad(self, rows: Tensor) -> Tensor:
        """``[R, ...]`` to ``[T, N, ...]``."""
        padded: Tensor = rows.index_select(0, self.of_padded).unflatten(0, (self.steps, len(self.lengths)))
        return padded

    def join(self, padded: Tensor, axis: int = 0) -> Tensor:
        """``[T, N, ...]``, those two at the axis, to ``[R, ...]``."""
        return padded.flatten(axis, axis + 1).index_select(axis, self.of_rows)


def _places(cu_seqlens: Tensor, rows: int, max_seqlen: int | None = None) -> Places:
    """Of sequence n, of N, the rows cu_seqlens[n] to cu_seqlens[n+1], of so many in all."""
    bounds = torch.ops.rnnfast.checked_cu_seqlens(cu_seqlens, rows, max_seqlen)
    begins, lengths, N = bounds[:-1], bounds.diff(), bounds.numel() - 1
    steps = 0
    if rows and N:
        steps = int(lengths.max()) if max_seqlen is None else max_seqlen
    if rows > N * steps:
        raise ValueError(f"max_seqlen={steps} is too small for {rows} rows of {N} sequences")
    step, row = (torch.arange(size, device=bounds.device) for size in (steps, rows))
    sequence = torch.searchsorted(bounds[1:], row, right=True).clamp_(max=max(N - 1, 0))
    of_padded = (begins + step[:, None]).flatten().clamp_(0, max(rows - 1, 0))
    of_rows = (row - begins[sequence]).clamp_(0, max(steps - 1, 0)) * N + sequence
    return Places(lengths, steps, of_padded, of_rows)


def _check(rows: Tensor, cu_seqlens: Any, resets: Tensor | None, max_seqlen: Any) -> None:
    """What can be said of the arguments without values."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a Tensor, got {type(cu_seqlens).__name__}")
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt))):
        raise TypeError(f"max_seqlen must be an int, got {type(max_seqlen).__name__}")
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"max_seqlen must not be negative, got {max_seqlen}")
    if rows.dim() != 2:
        raise ValueError(f"with cu_seqlens the input must have shape [rows, features], got {list(rows.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens must have shape [N + 1], of N sequences, got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != rows.device:
        raise ValueError(f"cu_seqlens must be on the input's device {rows.device}, got {cu_seqlens.device}")
    if resets is not None and resets.shape != rows.shape[:1]:
        raise ValueError(f"resets must have shape {list(rows.shape[:1])}, one a row, got {list(resets.shape)}")


def _without_holes(nested: Any) -> tuple[Tensor, Tensor]:
    """The rows of its sequences, one after the other, and where these begin and end. Its own ``contiguous`` has no
    derivative where there are holes."""
    rows, offsets, lengths = nested.values(), nested.offsets(), nested.lengths()
    if lengths is None:
        return rows, offsets
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    before = (offsets - bounds)[:-1].repeat_interleave(lengths)  # how many rows of the values are left out before each
    return rows.index_select(0, before + torch.arange(len(before), device=rows.device)), bounds


def run(
    forward: Callable[..., Any], batch_first: bool, input: Any, hx: Any, lengths: Tensor | None,
    resets: Tensor | None, return_states: bool, cu_seqlens: Tensor | None, max_seqlen: int | None,
) -> tuple[Any, ...]:  # fmt: skip
    """A layer's forward, of a nested input or of rows with cu_seqlens; results in the form of the input."""
    nested: Any = input if isinstance(input, Tensor) and input.is_nested else None
    if nested is not None and (lengths is not None or cu_seqlens is not None or max_seqlen is not None):
        raise ValueError("a nested input knows its lengths: give no lengths, cu_seqlens or max_seqlen")
    if not isinstance(input, Tensor) or lengths is not None:
        raise ValueError("cu_seqlens cannot be given together with lengths or a PackedSequence")
    if nested is not None:
        if nested.layout is not torch.jagged or nested.dim() != 3 or nested._ragged_idx != 1:
            raise ValueError("a nested input must be of the layout torch.jagged, [N, lengths, features]")
        input, cu_seqlens = _without_holes(nested)
        max_seqlen = nested._maybe_max_seqlen
    _check(input, cu_seqlens, resets, max_seqlen)
    assert cu_seqlens is not None  # as it was checked
    places = _places(cu_seqlens, len(input), max_seqlen)
    x, resets = places.pad(input), None if resets is None else places.pad(resets)
    if batch_first:
        x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)

    def join(padded: Any, axis: int) -> Any:
        if isinstance(padded, tuple):
            return tuple(join(of, axis) for of in padded)
        return places.join(padded.transpose(axis, axis + 1) if batch_first else padded, axis)

    y, hidden, *states = forward(x, hx, lengths=places.lengths, resets=resets, return_states=return_states)
    output = join(y, 0)
    if nested is not None:
        bounds = {"min_seqlen": nested._maybe_min_seqlen, "max_seqlen": nested._maybe_max_seqlen}
        output = torch.nested.nested_tensor_from_jagged(output, cu_seqlens, **bounds)
    return (output, hidden, *join(tuple(states), 1))


def _checked_cu_seqlens(cu_seqlens: Tensor, rows: int, max_seqlen: int | None) -> Tensor:
    """A copy, int64: checked where that needs no synchronisation, or there is one anyway, else clamped into order."""
    bounds = cu_seqlens.to(torch.int64, copy=True)
    if not bounds.is_cpu and max_seqlen is not None:
        return bounds.clamp_(0, rows).cummax(0).values
    values = bounds.tolist()
    if values != sorted(values) or values[0] != 0 or values[-1] != rows:
        raise ValueError(f"cu_seqlens must not decrease, from 0 to the {rows} rows of the input, got {bounds}")
    longest = max((end - begin for begin, end in zip(values, values[1:])), default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen} is less than {longest}, the longest of cu_seqlens")
    return bounds


LIBRARY.define(
    "checked_cu_seqlens(Tensor cu_seqlens, SymInt rows, SymInt? max_seqlen) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("checked_cu_seqlens", _checked_cu_seqlens, "CompositeExplicitAutograd")
torch.library.register_fake(
    "rnnfast::checked_cu_seqlens",
    lambda cu_seqlens, rows, max_seqlen: torch.empty_like(cu_seqlens, dtype=torch.int64),
    lib=LIBRARY,
)
