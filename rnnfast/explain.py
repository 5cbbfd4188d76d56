"""Which backend serves each layer of a model, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .backends import choose_backend, circumstances
from .flex import FlexRNN
from .functional import autocast_dtype
from .modules import _Cell, _Recurrent


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
        torch.nn recurrent module is named with the backend ``"torch.nn"``.
    """
    found = Explanation()
    recurrent = (nn.RNNBase, nn.RNNCellBase, FlexRNN)
    names: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, recurrent)}

    def record(module: nn.Module, args: tuple[Any, ...], call_kwargs: dict[str, Any]) -> None:
        input = args[0] if args else call_kwargs["input"]
        data = input.data if isinstance(input, PackedSequence) else input
        extended = call_kwargs.get("resets") is not None or call_kwargs.get("return_states", False)
        steps = _steps(module, input) if call_kwargs.get("lengths") is None else None
        found.append(_choice(names[module], module, data, _batch(module, input), extended, steps))

    if not (inputs or kwargs):
        for module, name in names.items():
            first = "weight_ih_l0" if isinstance(module, FlexRNN) else "weight_ih"
            weight: Any = module._flat_weights[0] if isinstance(module, nn.RNNBase) else getattr(module, first)
            found.append(_choice(name, module, weight))
        return found
    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in names]
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model.eval()(*inputs, **kwargs)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    return found


def _batch(module: nn.Module, input: Tensor | PackedSequence) -> int:
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes[0])
    if isinstance(module, nn.RNNCellBase):
        return input.size(0) if input.dim() == 2 else 1
    return input.size(0 if module.batch_first else 1) if input.dim() == 3 else 1


def _steps(module: nn.Module, input: Tensor | PackedSequence) -> int | None:
    """Of a rectangular input."""
    if isinstance(module, nn.RNNCellBase):
        return 1
    if isinstance(input, PackedSequence):
        return None
    return input.size(1 if module.batch_first and input.dim() == 3 else 0)


def _choice(
    name: str, module: nn.Module, data: Tensor, batch: int = 1, extended: bool = False, steps: int | None = None
) -> Choice:
    dtype = autocast_dtype(data.device.type, data.dtype)
    layer = f"{type(module).__name__}({module.extra_repr()})"
    described = f"{dtype} on {data.device}"
    if isinstance(module, FlexRNN):
        return Choice(name, layer, described, *module._backend(data.device, dtype, batch, extended))
    if not isinstance(module, (_Recurrent, _Cell)):
        return Choice(name, layer, described, "torch.nn", "not an rnnfast module; rnnfast.convert would make it one")
    mode = module.mode if isinstance(module, _Recurrent) else module._mode
    sizes = module.hidden_size, batch, getattr(module, "bidirectional", False), getattr(module, "proj_size", 0) > 0
    backend, reason = choose_backend(circumstances(), mode, data.device, dtype, *sizes, extended)
    is_derived = any(parameter.requires_grad for parameter in module.parameters())
    if backend == "cpu" and steps == 1 and not extended and is_derived:
        with torch.enable_grad():
            if module._is_quicker_by_torch(data):
                reason += "; under autograd a single step is quicker by torch's, which serve it"
    return Choice(name, layer, described, backend, reason)
