"""Which backend serves each layer of a model, and why."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import choice
from .backends import USUAL, choose_backend, circumstances
from .flex import FlexRNN
from .functional import autocast_dtype
from .modules import _Cell, _Recurrent
from .variants import choose_variant


class Choice(NamedTuple):
    """The backend of one module for one input."""

    module: str
    layer: str
    input: str
    backend: str
    reason: str


class Explanation(list[Choice]):
    """A list of :class:`Choice` that prints as a table."""

    def __repr__(self) -> str:
        if not self:
            return "no rnnfast module was called"
        return "\n".join(
            f"{c.module or '(the model)'}: {c.layer}, input {c.input} -> {c.backend}: {c.reason}" for c in self
        )


def explain(model: nn.Module, *inputs: Any, **kwargs: Any) -> Explanation:
    """Which backend each recurrent layer of ours in a model will use for this input, and why.

    Args:
        model: any module. It runs once, in eval mode and without gradients; its training flags and torch's
            generators are left as they were.
        inputs, kwargs: what the model is called with. Without any, nothing runs, and each module is explained by
            its weights.

    Returns:
        A :class:`Choice` for each call of a module of ours, in the order of the calls; it prints as a table. A
        torch.nn recurrent module is named with the backend ``"torch.nn"``. On a GPU the reason says where the choice
        came from, and the times: of a call with gradients where they are enabled here. The run, which has none, is a
        call like others: in mode ``"measure"`` it may wait for a race, whose times are of inference.
    """
    found = Explanation()
    recurrent = (nn.RNNBase, nn.RNNCellBase, FlexRNN)
    names: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, recurrent)}

    trained, training = torch.is_grad_enabled(), [module for module in model.modules() if module.training]

    def record(module: nn.Module, args: tuple[Any, ...], call_kwargs: dict[str, Any], output: Any) -> None:
        options = ((name, call_kwargs.get(name)) for name in ("lengths", "resets", "return_states"))
        more = [name for name, value in options if value is not None and value is not False]
        input = args[0] if args else call_kwargs["input"]
        if call_kwargs.get("cu_seqlens") is not None or (isinstance(input, Tensor) and input.is_nested):
            more.append("lengths")  # as which it runs
        found.append(_choice(names[module], module, input, more, trained, module in training))

    if not (inputs or kwargs):
        for module, name in names.items():
            first = "weight_ih_l0" if isinstance(module, FlexRNN) else "weight_ih"
            weight: Any = module._flat_weights[0] if isinstance(module, nn.RNNBase) else getattr(module, first)
            found.append(_choice(name, module, weight, None, trained, module.training))
        return found
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in names]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model.eval()(*inputs, **kwargs)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    return found


def _sizes(module: nn.Module, input: Tensor | PackedSequence) -> tuple[int, int, int]:
    """T, N, and the rows of a step, in the mean of packed ones."""
    if isinstance(input, PackedSequence):
        steps = len(input.batch_sizes)
        return steps, int(input.batch_sizes[0]), -(-len(input.data) // steps)
    if input.is_nested:
        offsets: Tensor = input.offsets()  # type: ignore[attr-defined]  # of a jagged one
        return int(offsets.diff().max()), input.size(0), input.size(0)
    if isinstance(module, nn.RNNCellBase):
        batch = input.size(0) if input.dim() == 2 else 1
        return 1, batch, batch
    batch = input.size(0 if module.batch_first else 1) if input.dim() == 3 else 1
    return input.size(1 if module.batch_first and input.dim() == 3 else 0), batch, batch


def _choice(
    name: str, module: nn.Module, input: Tensor | PackedSequence, more: list[str] | None, trained: bool,
    training: bool = False,
) -> Choice:  # fmt: skip
    """Of a call, with what else was given to it, or with None of a weight, for a single row of unknown length."""
    data = input.data if isinstance(input, PackedSequence) else input
    dtype = autocast_dtype(data.device.type, data.dtype)
    layer = f"{type(module).__name__}({module.extra_repr()})"
    described = f"{dtype} on {data.device}"
    steps, batch, rows = (0, 1, 1) if more is None else _sizes(module, input)
    extended = more is not None and not {"resets", "return_states"}.isdisjoint(more)
    if isinstance(module, FlexRNN):
        before, module.training = module.training, training
        with torch.set_grad_enabled(trained):
            chosen = module._backend(data.device, dtype, batch, extended)
        module.training = before
        return Choice(name, layer, described, *chosen)
    if not isinstance(module, (_Recurrent, _Cell)):
        return Choice(name, layer, described, "torch.nn", "not an rnnfast module; rnnfast.convert would make it one")
    mode = module.mode if isinstance(module, _Recurrent) else module._mode
    hidden: int = max(module.hidden_size) if isinstance(module.hidden_size, list) else module.hidden_size
    with torch.set_grad_enabled(trained):
        variant = module._rnnfast_options.variant(training)
    if variant is not None:
        return Choice(name, layer, described, *choose_variant(variant, mode, data.device, dtype, hidden, batch))
    outputs: int = getattr(module, "proj_size", 0) or hidden
    bidirectional: bool = getattr(module, "bidirectional", False)
    projected = outputs < hidden
    seen, of = circumstances(), (mode, data.device, dtype)
    own = module._rnnfast_options
    choose = functools.partial(choose_backend, seen, *of, extended=extended, reset_after=own.reset_after)
    is_derived = any(parameter.requires_grad for parameter in module.parameters())
    if more is not None and seen is USUAL and choose()[0] in choice.RACED:
        key_of: tuple[Any, ...] = steps, rows, trained and is_derived, len(module._weights())
        if isinstance(module, _Recurrent):
            form = "packed" if isinstance(input, PackedSequence) else "rectangular"
            form = " ".join((form, *more, *["recompute"] * module.recompute))
            apart = training and module.num_layers > 1 and module.dropout > 0
            key_of += module.num_layers, bidirectional, form, apart
        where = choice.where_of(mode, data.get_device(), dtype, module.input_size, hidden, outputs, *key_of)
        backend, reason, _ = choice.explained(where, batch)
    else:
        projection = {"bidirectional": bidirectional, "projected": projected}
        backend, reason = choose(hidden=hidden, batch=batch, **projection)
    if backend == "cpu" and seen is USUAL and steps == 1 and not more and is_derived:
        with torch.enable_grad():
            if own.is_usual(training) and module._is_quicker_by_torch(dtype):
                reason += "; under autograd a single step is quicker by torch's, which serve it"
    return Choice(name, layer, described, backend, reason)
