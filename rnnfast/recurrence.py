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
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from . import aten, reference, samples
from .backends import BACKENDS, WITH_OPERATORS, is_recorded
from .cells import HAS_CELL_STATE, SAVED_GATES
from .ops import LIBRARY, OPERATORS
from .records import InputGradients, Inputs, OutputGradients, Outputs, Saved

_is_exporting = torch.compiler.is_exporting  # asked for at every call
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _loop_over_batch(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """The vmap of an autograd Function, call by call: of an ensemble, where members have no operator of their own."""
    results = [
        function.apply(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(tensors) for tensors in zip(*results))
    return outputs, (0,) * len(outputs)


def _in_parts(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...], most: int) -> Any:
    """The vmap of an autograd Function, at most so many samples at a time."""
    found: list[Any] = []
    dims: Any = ()
    for first in range(0, info.batch_size, most):
        count = min(most, info.batch_size - first)
        part = [a if dim is None else a.narrow(dim, first, count) for a, dim in zip(args, in_dims)]
        outputs, dims = function.vmap(info._replace(batch_size=count), in_dims, *part)
        found.append(outputs)
    return tuple(of[0] if dim is None else torch.cat(of, dim) for of, dim in zip(zip(*found), dims)), dims


def _has_members(backend: str, of_members: bool, dims: Inputs) -> bool:
    """Whether members with these batch dimensions are one call of an operator. Those within another vmap are not: their
    samples are run at once."""
    outer = retrieve_all_functorch_interpreters()
    is_innermost = not any(of.key() == torch._C._functorch.TransformType.Vmap for of in outer)
    has_operator = (backend, "forward_members") in OPERATORS
    return has_operator and is_innermost and not of_members and dims.batch_sizes is None


def _stacked_dims(outputs: Sequence[Tensor]) -> tuple[int | None, ...]:
    """The batch dimensions of what an operator for members returns."""
    return tuple(None if of.shape == (0,) else 0 for of in outputs)


def _save(ctx: Any, values: Sequence[Any]) -> None:
    """Save for the backward; what is no tensor goes apart: tools that walk ``saved_tensors`` expect no None there."""
    ctx.others = [(i, value) for i, value in enumerate(values) if not isinstance(value, Tensor)]
    ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))


def _saved(ctx: Any) -> list[Any]:
    values = list(ctx.saved_tensors)
    for i, value in ctx.others:
        values.insert(i, value)
    return values


def _one_by_one(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that also takes a batch of gradients, as ``is_grads_batched`` makes it with the vmap of before
    torch.func: it runs once for each."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
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


def _operator(backend: str, direction: str, of_members: bool) -> Any:
    return OPERATORS[backend, f"{direction}_members" if of_members else direction]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, recompute: bool, of_members: bool, *inputs: Any) -> Any:
        return _operator(backend, "forward", of_members)(*Inputs.of_flat(inputs), True, not recompute)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, ctx.recompute, ctx.of_members, *of_layer = inputs
        y, _, _, c, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        _save(ctx, (y, c, gates, *of_layer))

    @staticmethod
    @_one_by_one
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs = Inputs.of_flat(ctx.needs_input_grad[3:])
        return None, None, None, *_layer_backward(ctx, OutputGradients(*grads[:4]), needs).flat()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        backend, recompute, of_members, *values = args
        inputs, dims, count = Inputs.of_flat(values), Inputs.of_flat(in_dims[3:]), info.batch_size
        run: Any = functools.partial(_Layer.apply, backend, recompute)
        if of_members or not samples.share_weights(dims, count):
            if not _has_members(backend, of_members, dims):
                return _loop_over_batch(_Layer, info, in_dims, args)
            outputs = run(True, *samples.stack(inputs, dims, count).flat())
            return outputs, _stacked_dims(outputs)
        packed = inputs.batch_sizes is not None
        outputs = run(False, *samples.fold(inputs, dims, count, packed).flat())
        return samples.unfold(Outputs._fields, outputs, count, packed)


_NO_GRADIENTS: Any = Inputs._make([None] * len(Inputs._fields))


def _layer_backward(ctx: Any, grads: OutputGradients, needs: Inputs) -> Any:
    """Inputs with the gradient of each, or None where none is needed, of what ``_Layer.setup_context`` has kept."""
    if all(grad is None for grad in grads):
        return _NO_GRADIENTS._replace(weights=[None] * len(needs.weights))
    y, c, gates, *inputs = _saved(ctx)
    layer_inputs = Inputs.of_flat(inputs)
    # Only a derivative of this backward needs a Function; torch.compile wants none where there is no derivative.
    is_transformed = torch._C._are_functorch_transforms_active()
    twice = torch.is_grad_enabled() or is_transformed
    if (
        torch.is_grad_enabled()
        and not is_transformed
        and not torch.compiler.is_compiling()
        and ctx.backend == "cpu"
        and not ctx.of_members
        and grads.dc is None
        and (grads.dy is not None or grads.dh_n is not None)
        and aten.can_derive(layer_inputs)
    ):
        return _derivable_backward(layer_inputs, grads, needs)
    if ctx.recompute:
        is_kept = not HAS_CELL_STATE[layer_inputs.mode] or c.dim() > 1
        with torch.no_grad():
            *_, again, gates = _operator(ctx.backend, "forward", ctx.of_members)(*layer_inputs, not is_kept, True)
        c = c if is_kept else again
    apply: Any = _LayerBackward.apply if twice else _LayerBackward.forward
    form = ctx.backend, ctx.of_members, needs.x, any(needs.weights), 0
    dx, dh0, dc0, *dweights = apply(*form, *grads, y, c, gates, *inputs)
    dweights = [grad if need else None for grad, need in zip(dweights, needs.weights)]
    return _NO_GRADIENTS._replace(
        x=dx if needs.x else None,
        h0=dh0 if needs.h0 else None,
        c0=dc0 if needs.c0 else None,
        weights=dweights or [None] * len(needs.weights),
    )


def _derivable_backward(inputs: Inputs, grads: OutputGradients, needs: Inputs) -> Any:
    """As ``_layer_backward``, through torch's own operators: quicker to derive than step by step in Python."""
    flat, wanted = list(inputs.flat()), [i for i, need in enumerate(needs.flat()) if need]
    # A view of each: there the gradient ends, and does not go on to what the tensor was made of, or through its hooks.
    for i in wanted:
        flat[i] = flat[i].view_as(flat[i])
    pairs = [pair for pair in zip(aten.derivable(Inputs.of_flat(flat)), grads) if pair[1] is not None]
    outputs, of_outputs = zip(*pairs)
    found = torch.autograd.grad(outputs, [flat[i] for i in wanted], of_outputs, create_graph=True, allow_unused=True)
    gradients: list[Any] = [None] * len(flat)
    for i, gradient in zip(wanted, found):
        gradients[i] = gradient
    return Inputs.of_flat(gradients)


def _of_backward(values: Sequence[Any]) -> tuple[OutputGradients, Saved, Inputs]:
    first, last = len(OutputGradients._fields), len(OutputGradients._fields) + len(Saved._fields)
    return OutputGradients(*values[:first]), Saved(*values[first:last]), Inputs.of_flat(values[last:])


class _LayerBackward(torch.autograd.Function):
    """Its own derivatives go through plain torch: x and the weights determine y, c and the gates, which get none."""

    @staticmethod
    def forward(backend: str, of_members: bool, need_dx: bool, need_dw: bool, count: int, *values: Any) -> Any:
        """Count: 0, or how many samples the rows are of, each with gradients of the weights to itself. Values: the
        fields of OutputGradients and Saved, and those of Inputs, flat."""
        grads, saved, inputs = _of_backward(values)
        if count:
            return samples.backward(backend, need_dx, inputs, grads, saved, count)
        run = _operator(backend, "backward", of_members)
        dx, dh0, dc0, dweights = run(*inputs, *grads, *saved, need_dx, need_dw)
        return dx, dh0, dc0, *dweights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        _, ctx.of_members, _, _, ctx.count, *values = inputs
        of_output, _, of_layer = _of_backward(values)
        _save(ctx, (*of_output, *of_layer.flat()))

    @staticmethod
    @_one_by_one
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        values, fields = _saved(ctx), len(OutputGradients._fields)
        inputs = Inputs.of_flat(values[fields:])
        derived = inputs.x, inputs.h0, inputs.c0, *inputs.weights
        # An output that was not asked for has shape [0]; whatever gradient comes for it says nothing.
        pairs = enumerate(zip(grads, derived))
        live = [i for i, (g, t) in pairs if g is not None and t is not None and g.shape[-t.dim() :] == t.shape]
        if not live:
            return (None,) * len(ctx.needs_input_grad)

        given = [i for i, v in enumerate(values) if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())]

        def first_order(*of: Tensor) -> tuple[Tensor | None, ...]:
            at = list(values)
            for i, value in zip(given, of):
                at[i] = value
            run: Any = samples.members_backward if ctx.of_members else reference.layer_backward
            run = functools.partial(samples.reference_backward, ctx.count) if ctx.count else run
            firsts = run(Inputs.of_flat(at[fields:]), OutputGradients(*at[:fields]))
            return tuple(firsts[i] for i in live)

        vjp = torch.func.vjp(first_order, *(values[i] for i in given))[1]
        seconds: list[Tensor | None] = [None] * len(values)
        for i, second in zip(given, vjp(tuple(grads[i] for i in live))):
            seconds[i] = second
        return *[None] * 5, *seconds[:fields], *(None for _ in Saved._fields), *seconds[fields:]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        backend, of_members, need_dx, need_dw, count, *values = args
        of_values, of_dims = _of_backward(values), _of_backward(in_dims[5:])
        run: Any = functools.partial(_LayerBackward.apply, backend)
        if of_members or not samples.share_weights(of_dims[2], info.batch_size):
            if count or not _has_members(backend, of_members, of_dims[2]):
                return _loop_over_batch(_LayerBackward, info, in_dims, args)
            grads, saved, inputs = (samples.stack(*pair, info.batch_size) for pair in zip(of_values, of_dims))
            found = run(True, need_dx, need_dw, 0, *grads, *saved, *inputs.flat())
            return found, _stacked_dims(found)
        if (most := samples.at_once(of_values[1], of_dims[1])) < info.batch_size:
            return _in_parts(_LayerBackward, info, in_dims, args, most)
        size, packed = info.batch_size, of_values[2].batch_sizes is not None
        grads, saved, inputs = (samples.fold(*pair, size, packed) for pair in zip(of_values, of_dims))
        all_samples = (count or 1) * size if need_dw else 0
        dx, dh0, dc0, *dweights = run(False, need_dx, need_dw, all_samples, *grads, *saved, *inputs.flat())
        results, dims = samples.unfold(InputGradients._fields, (dx, dh0, dc0), size, packed)
        if count:
            dweights = [grad.unflatten(0, (count, size)) for grad in dweights]
        return (*results, *dweights), (*dims, *[1 if count else 0] * len(dweights))


# The operator that stands in exported programs, ``rnnfast::NAME_layer``, has derivatives of its own: such a program
# can be trained. It keeps no gates, as if to recompute.


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: Any, *, backend: str) -> None:
    _Layer.setup_context(ctx, (backend, True, False, *Inputs(*inputs[:-2]).flat()), output)


def _backward_of_layer(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *needs, _, _ = ctx.needs_input_grad
    return *_layer_backward(ctx, OutputGradients(*grads[:4]), Inputs(*needs)), None, None


for _name in WITH_OPERATORS:
    torch.library.register_autograd(
        f"rnnfast::{_name}_layer", _backward_of_layer, lib=LIBRARY,
        setup_context=functools.partial(_setup_layer, backend=_name),
    )  # fmt: skip


def layer(
    backend: str, inputs: Inputs, *, keep_c: bool = False, recompute: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One recurrent layer over a sequence. Arguments are taken as valid: ``functional`` has checked them.

    Args:
        backend: as :func:`choose_backend` gives it.
        inputs: what it is computed from. With ``batch_sizes`` x has packed rows; an absent state is zero; lengths are
            within 0..T and on x's device, and y and c are zero beyond a row's end; resets are true at the first step of
            an episode: the state is zeroed before that step, for the reverse direction after it.
        keep_c: whether c is asked for.
        recompute: keep no gates for the backward, which runs the forward once more instead.

    Returns:
        y, h_n, c_n and c of Outputs. Absent: shape ``[0]``.
    """
    if backend == "reference" and (forward_ad._current_level >= 0 or is_recorded()):
        return reference.layer(inputs)
    _, x, h0, c0, *_, weights = inputs
    if _is_exporting():
        y, h_n, c_n, c, _ = OPERATORS[backend, "layer"](*inputs, keep_c, False)
    elif torch._C._are_functorch_transforms_active():
        y, h_n, c_n, c, _ = _transformed(backend, *inputs.flat())
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights)):
        recompute = recompute and SAVED_GATES[inputs.mode] > 0 and BACKENDS[backend].saves_gates
        apply: Any = _Layer.apply if torch.compiler.is_compiling() else _apply
        y, h_n, c_n, c, _ = apply(backend, recompute, False, *inputs.flat())
    else:
        y, h_n, c_n, c, _ = OPERATORS[backend, "forward"](*inputs, keep_c, False)
    return y, h_n, c_n, c


# What Function.apply does where nothing is transformed, without its look at the signature, which takes 15 microseconds.
_apply = super(torch.autograd.Function, _Layer).apply


def _transformed(backend: str, *inputs: Any) -> tuple[Tensor, ...]:
    """``_Layer`` within transforms of torch.func, which would have to take its recomputation in the backward along.

    Functionalization has no rule for a Function: what changes nothing in place is applied to the values within.
    """
    functorch, interpreter = torch._C._functorch, None
    if torch._C._are_functorch_transforms_active():
        interpreter = retrieve_current_functorch_interpreter()
    if interpreter is None or interpreter.key() != functorch.TransformType.Functionalize:
        found: tuple[Tensor, ...] = _Layer.apply(backend, False, False, *inputs)  # type: ignore[no-untyped-call]
        return found
    values = []
    for value in inputs:
        if isinstance(value, Tensor) and functorch.is_functionaltensor(value):
            torch._sync(value)  # type: ignore[attr-defined, no-untyped-call]
            value = functorch._unwrap_functional_tensor(value, False)
        values.append(value)
    with interpreter.lower():
        outputs = _transformed(backend, *values)
    return tuple(functorch._wrap_functional_tensor(t, interpreter.level()) for t in outputs)
