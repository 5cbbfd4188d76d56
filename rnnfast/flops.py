"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of a layer: the products that it makes.

They are those of torch.nn's aten path, but that the gradients of all weights, and of a given h_0, are always computed.
Letters as in ``reference.py``. A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n`` operations; others do not count.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .backends import WITH_OPERATORS


def _known(lengths: Tensor | None) -> Tensor | None:
    """None if all rows count as full: the values of lengths are not to be had while a graph is made."""
    return None if isinstance(lengths, FakeTensor) or (lengths is not None and lengths.is_meta) else lengths


def _rows(x: Tensor, lengths: Tensor | None) -> int:
    """R of the steps that are run."""
    known = _known(lengths)
    return x.shape[:-1].numel() if known is None else int(known.sum())


def _products(x: Tensor, weights: Sequence[Tensor], bidirectional: bool) -> tuple[int, int, int]:
    """Operations of one row in one direction: of W_ih, of W_hh, of W_hr."""
    w_ih, w_hh = weights[:2]
    projected = len(weights) // (1 + bidirectional) % 2 == 1
    return 2 * w_ih.numel(), 2 * w_hh.numel(), 2 * weights[-1].numel() * projected


def _forward_flops(
    mode: str, x: Tensor, h0: Any, c0: Any, weights: Sequence[Tensor], batch_sizes: Tensor | None,
    lengths: Tensor | None, resets: Any, bidirectional: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _rows(x, lengths) * (1 + bidirectional) * sum(_products(x, weights, bidirectional))


def _backward_flops(
    mode: str, dy: Any, dh_n: Any, dc_n: Any, dc: Any, x: Tensor, h0: Tensor | None, c0: Any,
    weights: Sequence[Tensor], batch_sizes: Tensor | None, lengths: Tensor | None, resets: Any, bidirectional: bool,
    y: Any, c: Any, gates: Any, need_dx: bool, need_dw: bool, **kwargs: Any,
) -> int:  # fmt: skip
    R, D = _rows(x, lengths), 1 + bidirectional
    of_x, of_h, of_m = _products(x, weights, bidirectional)
    flops = D * R * (of_x * (need_dx + need_dw) + of_h * (1 + need_dw) + of_m * (1 + need_dw))
    if h0 is None:  # no gradient goes beyond the first step
        if batch_sizes is None:
            known = _known(lengths)
            first = D * (x.size(1) if known is None else int((known > 0).sum()))
        else:
            first = int(batch_sizes[0]) + (int(batch_sizes[-1]) if bidirectional else 0)
        flops -= first * of_h
    return flops


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for direction, formula in (("forward", _forward_flops), ("layer", _forward_flops), ("backward", _backward_flops)):
        operators = [getattr(torch.ops.rnnfast, f"{backend}_{direction}") for backend in WITH_OPERATORS]
        register_flop_formula(operators, get_raw=True)(formula)


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when torch's counter is imported: it brings Triton along, which takes long to import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            load(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec


_COUNTER = "torch.utils.flop_counter"
if _COUNTER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _OnImport())
