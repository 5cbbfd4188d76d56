"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of a layer: the products that it makes.

They are those of torch.nn's aten path, but that the gradients of all weights, and of a given h_0, are always computed.
Letters as in ``reference.py``. A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n`` operations; others do not count.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .ops import OPERATORS, of_member, of_records
from .records import Inputs, OutputGradients, Saved


def _known(lengths: Tensor | None) -> Tensor | None:
    """None if all rows count as full: the values of lengths are not to be had while a graph is made."""
    return None if isinstance(lengths, FakeTensor) or (lengths is not None and lengths.is_meta) else lengths


def _rows(x: Tensor, lengths: Tensor | None) -> int:
    """R of the steps that are run."""
    known = _known(lengths)
    return x.shape[:-1].numel() if known is None else int(known.sum())


def _products(inputs: Inputs) -> tuple[int, int, int]:
    """Operations of one row in one direction: of W_ih, of W_hh, of W_hr."""
    w = inputs.directions()[0]
    return 2 * w.w_ih.numel(), 2 * w.w_hh.numel(), 0 if w.w_hr is None else 2 * w.w_hr.numel()


def _forward_flops(inputs: Inputs, *args: Any, **kwargs: Any) -> int:
    return _rows(inputs.x, inputs.lengths) * (1 + inputs.bidirectional) * sum(_products(inputs))


def _backward_flops(
    inputs: Inputs, grads: OutputGradients, saved: Saved, need_dx: bool, need_dw: bool, **kwargs: Any
) -> int:
    x, lengths, batch_sizes, bidirectional = inputs.x, inputs.lengths, inputs.batch_sizes, inputs.bidirectional
    R, D = _rows(x, lengths), 1 + bidirectional
    of_x, of_h, of_m = _products(inputs)
    flops = D * R * (of_x * (need_dx + need_dw) + of_h * (1 + need_dw) + of_m * (1 + need_dw))
    if inputs.h0 is None:  # no gradient goes beyond the first step
        if batch_sizes is None:
            known = _known(lengths)
            first = D * (x.size(1) if known is None else int((known > 0).sum()))
        else:
            first = int(batch_sizes[0]) + (int(batch_sizes[-1]) if bidirectional else 0)
        flops -= first * of_h
    return flops


def _of_members(flops: Callable[..., int], inputs: Inputs, *args: Any, **kwargs: Any) -> int:
    return sum(of_member(flops, i, inputs, *args) for i in range(inputs.x.size(0)))


def _flex_forward_flops(  # of any cell
    operations: Tensor, numbers: Tensor, results: Tensor, x: Tensor | None, w_ih: Tensor | None, b_ih: Tensor | None,
    z_gates: Tensor | None, w_hh: Tensor | None, b_hh: Tensor | None, states: Sequence[Tensor],
    units: Sequence[Tensor], initial: Tensor, lengths: Tensor | None, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    steps = z_gates if x is None else x
    assert steps is not None
    return _rows(steps, lengths) * sum(2 * w.numel() for w in (w_ih, w_hh) if w is not None)


def _flex_backward_flops(
    operations: Tensor, numbers: Tensor, results: Tensor, x: Tensor | None, w_ih: Tensor | None, w_hh: Tensor | None,
    states: Sequence[Tensor], every: Sequence[Tensor], units: Sequence[Tensor], initial: Tensor, saved: Tensor,
    lengths: Tensor | None, resets: Tensor | None, d_every: Sequence[Tensor], d_final: Sequence[Tensor], Z: int,
    reverse: bool, need_dx: bool, need_dz: bool, need_dw: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    of_x, of_h = (0 if w is None else 2 * w.numel() for w in (w_ih, w_hh))
    return _rows(saved, lengths) * (of_x * (need_dx + need_dw) + of_h * (1 + need_dw))


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    forward, backward = of_records(_forward_flops), of_records(_backward_flops, OutputGradients, Saved)
    of_gates = of_records(functools.partial(_backward_flops, need_dx=False, need_dw=False), OutputGradients, Saved)
    formulas = {"forward": forward, "layer": forward, "backward": backward, "gate_gradients": of_gates}
    formulas["forward_members"] = of_records(functools.partial(_of_members, _forward_flops))
    formulas["backward_members"] = of_records(functools.partial(_of_members, _backward_flops), OutputGradients, Saved)
    for direction, formula in formulas.items():
        operators = [operator.overloadpacket for (_, of), operator in OPERATORS.items() if of == direction]
        register_flop_formula(operators, get_raw=True)(formula)
    if hasattr(torch.ops.rnnfast, "cpu_flex_forward"):  # the library is there
        register_flop_formula(torch.ops.rnnfast.cpu_flex_forward, get_raw=True)(_flex_forward_flops)
        register_flop_formula(torch.ops.rnnfast.cpu_flex_backward, get_raw=True)(_flex_backward_flops)


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
