"""One recurrent layer, with all its directions, as a differentiable operator.

Around the operators of ``ops.py`` stand, once for all backends, first and second derivatives and vmap. The backend
``torch`` has none of this: ``functional`` calls it, as ``aten.py`` has whole stacks. Letters as in ``reference.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from . import reference
from .backends import BACKENDS, WITH_OPERATORS, is_recorded
from .cells import HAS_CELL_STATE, SAVED_GATES
from .ops import LIBRARY, OPERATORS

_is_exporting = torch.compiler.is_exporting  # asked for at every call
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _loop_over_batch(function: type, info, in_dims: tuple, args: tuple):
    """The vmap of an autograd Function, sample by sample: no sum crosses samples, so each gets its own gradients."""
    samples = [
        function.apply(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(tensors) for tensors in zip(*samples))
    return outputs, (0,) * len(outputs)


def _save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Save tensors for the backward, absent ones apart: tools that walk ``saved_tensors`` expect no None there."""
    ctx.absent = [i for i, t in enumerate(tensors) if t is None]
    ctx.save_for_backward(*(t for t in tensors if t is not None))


def _saved(ctx: Any) -> list[Tensor | None]:
    tensors = list(ctx.saved_tensors)
    for i in ctx.absent:
        tensors.insert(i, None)
    return tensors


def _one_by_one(backward: Callable) -> Callable:
    """A backward that also takes a batch of gradients, as ``is_grads_batched`` makes it with the vmap of before
    torch.func: it runs once for each."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not any(g is not None and _is_legacy_batched(g) for g in grads):
            return backward(ctx, *grads)
        # The level of the innermost vmap is to be had by entering another, and its operators apply within it only.
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        batched = [g is not None and _is_legacy_batched(g) for g in grads]
        plain = [torch._remove_batch_dim(g, level, 0, 0) if of_batch else g for g, of_batch in zip(grads, batched)]
        size = next(g.size(0) for g, of_batch in zip(plain, batched) if of_batch)
        torch._C._vmapmode_decrement_nesting()
        try:
            each = [backward(ctx, *(g[i] if b else g for g, b in zip(plain, batched))) for i in range(size)]
            results = [None if of[0] is None else torch.stack(of) for of in zip(*each)]
        finally:
            torch._C._vmapmode_increment_nesting()
        return tuple(None if r is None else torch._add_batch_dim(r, 0, level) for r in results)

    return run


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(backend, mode, bidirectional, recompute, batch_sizes, lengths, resets, x, h0, c0, *weights):
        return OPERATORS[backend, "forward"](
            mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, True, not recompute
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.mode, ctx.bidirectional, ctx.recompute, *tensors = inputs
        y, _, _, c, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        _save(ctx, (*tensors[:6], y, c, gates, *tensors[6:]))

    @staticmethod
    @_one_by_one
    def backward(ctx, dy, dh_n, dc_n, dc, _):
        needs = ctx.needs_input_grad
        dx, dh0, dc0, *dweights = _layer_backward(ctx, dy, dh_n, dc_n, dc, needs[7], any(needs[10:]))
        grads = (grad if need else None for grad, need in zip((dx, dh0, dc0, *dweights), needs[7:]))
        return (None,) * 7 + (*grads, *[None] * (len(needs) - 10 - len(dweights)))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _loop_over_batch(_Layer, info, in_dims, args)


def _layer_backward(ctx, dy, dh_n, dc_n, dc, need_dx: bool, need_dw: bool) -> tuple[Tensor | None, ...]:
    """dx, dh0, dc0 and, if needed, the weights' gradients, of what ``_Layer.setup_context`` has kept."""
    if all(grad is None for grad in (dy, dh_n, dc_n, dc)):
        return None, None, None
    batch_sizes, lengths, resets, x, h0, c0, y, c, gates, *weights = _saved(ctx)
    if ctx.recompute:
        is_kept = not HAS_CELL_STATE[ctx.mode] or c.dim() > 1
        with torch.no_grad():
            *_, again, gates = OPERATORS[ctx.backend, "forward"](
                ctx.mode, x, h0, c0, weights, batch_sizes, lengths, resets, ctx.bidirectional, not is_kept, True
            )
        c = c if is_kept else again
    # Only a derivative of this backward needs a Function; torch.compile wants none where there is no derivative.
    twice = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    return (_LayerBackward.apply if twice else _LayerBackward.forward)(
        ctx.backend, ctx.mode, ctx.bidirectional, need_dx, need_dw, batch_sizes, lengths, resets,
        dy, dh_n, dc_n, dc, x, h0, c0, y, c, gates, *weights,
    )  # fmt: skip


class _LayerBackward(torch.autograd.Function):
    """Its own derivatives go through plain torch: x and the weights determine y, c and the gates, which get none."""

    @staticmethod
    def forward(
        backend, mode, bidirectional, need_dx, need_dw, batch_sizes, lengths, resets, dy, dh_n, dc_n, dc, x, h0, c0, y,
        c, gates, *weights,
    ):  # fmt: skip
        dx, dh0, dc0, dweights = OPERATORS[backend, "backward"](
            mode, dy, dh_n, dc_n, dc, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, y, c, gates,
            need_dx, need_dw,
        )  # fmt: skip
        return dx, dh0, dc0, *dweights

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.mode, ctx.bidirectional, _, _, *tensors = inputs
        ctx.set_materialize_grads(False)
        _save(ctx, (*tensors[:10], *tensors[13:]))

    @staticmethod
    @_one_by_one
    def backward(ctx, *grads):
        batch_sizes, lengths, resets, *tensors = _saved(ctx)
        form = (batch_sizes, lengths, resets, ctx.bidirectional)
        # An output that was not asked for has shape [0]; whatever gradient comes for it says nothing.
        live = [i for i, (g, t) in enumerate(zip(grads, tensors[4:])) if None not in (g, t) and g.shape == t.shape]

        if not live:
            return (None,) * len(ctx.needs_input_grad)

        given = [i for i, t in enumerate(tensors) if t is not None]

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            inputs = list(tensors)
            for i, value in zip(given, values):
                inputs[i] = value
            firsts = reference.layer_backward(ctx.mode, *inputs[:7], inputs[7:], *form)
            return tuple(firsts[i] for i in live)

        _, vjp = torch.func.vjp(first_order, *(tensors[i] for i in given))
        seconds: list[Tensor | None] = [None] * len(tensors)
        for i, second in zip(given, vjp(tuple(grads[i] for i in live))):
            seconds[i] = second
        return (None,) * 8 + (*seconds[:7], None, None, None, *seconds[7:])

    @staticmethod
    def vmap(info, in_dims, *args):
        return _loop_over_batch(_LayerBackward, info, in_dims, args)


# The operator that stands in exported programs, ``rnnfast::NAME_layer``, has derivatives of its own: such a program
# can be trained. It keeps no gates, as if to recompute.


def _setup_layer(ctx: Any, inputs: tuple, output: tuple, *, backend: str) -> None:
    mode, x, h0, c0, weights, batch_sizes, lengths, resets, bidirectional, _, _ = inputs
    tensors = batch_sizes, lengths, resets, x, h0, c0, *weights
    _Layer.setup_context(ctx, (backend, mode, bidirectional, True, *tensors), output)


def _backward_of_layer(ctx: Any, dy, dh_n, dc_n, dc, _) -> tuple:
    _, *needs, need_dw = ctx.needs_input_grad[:5]
    grads = _layer_backward(ctx, dy, dh_n, dc_n, dc, needs[0], any(need_dw))
    of_operands = (grad if need else None for grad, need in zip(grads, needs))  # x, h0 and c0
    return None, *of_operands, list(grads[3:]) or [None] * len(need_dw), *[None] * (len(ctx.needs_input_grad) - 5)


for _name in WITH_OPERATORS:
    torch.library.register_autograd(
        f"rnnfast::{_name}_layer", _backward_of_layer, lib=LIBRARY,
        setup_context=functools.partial(_setup_layer, backend=_name),
    )  # fmt: skip


def layer(
    backend: str,
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
    keep_c: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One recurrent layer over a sequence. Arguments are taken as valid: ``functional`` has checked them.

    Args:
        backend: as :func:`choose_backend` gives it.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"LSTM"`` or ``"GRU"``.
        x: ``[T, N, I]``; with ``batch_sizes`` packed rows ``[R, I]``.
        h0, c0: ``[D, N, P]`` and ``[D, N, H]``; None is zero.
        weights: of each direction w_ih ``[G*H, I]``, w_hh ``[G*H, P]``, then if there are biases b_ih and b_hh
            ``[G*H]``, then if there is a projection w_hr ``[P, H]``.
        batch_sizes: int64 ``[T]`` on the CPU, as in a PackedSequence.
        lengths: int64 ``[N]`` within 0..T on x's device. y and c are zero beyond a row's end.
        resets: bool ``[T, N]``, true at the first step of an episode: the state is zeroed before that step, for the
            reverse direction after it.
        keep_c: whether c is asked for.
        recompute: keep no gates for the backward, which runs the forward once more instead.

    Returns:
        y ``[T, N, D*P]`` (or ``[R, D*P]``), h_n ``[D, N, P]``, and for an LSTM c_n ``[D, N, H]`` and c, the cell state
        at every step, ``[T, N, D*H]`` (or ``[R, D*H]``), in float32 where x is of a half type. Absent: shape ``[0]``.
    """
    form = (batch_sizes, lengths, resets)
    if backend == "reference" and (forward_ad._current_level >= 0 or is_recorded()):
        return reference.layer(mode, x, h0, c0, weights, *form, bidirectional)
    if _is_exporting():
        return OPERATORS[backend, "layer"](mode, x, h0, c0, weights, *form, bidirectional, keep_c, False)[:4]
    if torch._C._are_functorch_transforms_active():
        return _transformed(backend, mode, bidirectional, *form, x, h0, c0, *weights)[:4]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights)):
        recompute = recompute and SAVED_GATES[mode] > 0 and BACKENDS[backend].saves_gates
        apply = _Layer.apply if torch.compiler.is_compiling() else _apply
        return apply(backend, mode, bidirectional, recompute, *form, x, h0, c0, *weights)[:4]
    return OPERATORS[backend, "forward"](mode, x, h0, c0, weights, *form, bidirectional, keep_c, False)[:4]


# What Function.apply does where nothing is transformed, without its look at the signature, which takes 15 microseconds.
_apply = super(torch.autograd.Function, _Layer).apply


def _transformed(backend: str, mode: str, bidirectional: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """``_Layer`` within transforms of torch.func, which would have to take its recomputation in the backward along.

    Functionalization has no rule for a Function: what changes nothing in place is applied to the values within.
    """
    functorch, interpreter = torch._C._functorch, None
    if torch._C._are_functorch_transforms_active():
        interpreter = retrieve_current_functorch_interpreter()
    if interpreter is None or interpreter.key() != functorch.TransformType.Functionalize:
        return _Layer.apply(backend, mode, bidirectional, False, *tensors)
    values = []
    for t in tensors:
        if t is not None and functorch.is_functionaltensor(t):
            torch._sync(t)
            t = functorch._unwrap_functional_tensor(t, False)
        values.append(t)
    with interpreter.lower():
        outputs = _transformed(backend, mode, bidirectional, *values)
    return tuple(functorch._wrap_functional_tensor(t, interpreter.level()) for t in outputs)
