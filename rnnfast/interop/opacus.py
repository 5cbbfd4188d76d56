"""Differentially private training of our layers as they are: https://opacus.ai."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn
from torch.func import grad, vmap

from .. import functional
from ..convert import _PassesFor
from ..modules import _Recurrent
from .weights import directions_of, resets_after

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model) -> Model:
    """Make Opacus find the gradient of each sample for the RNN, LSTM and GRU layers of ours in a model.

    ::

        model = rnnfast.interop.opacus.prepare(model)
        model, optimizer, loader = PrivacyEngine().make_private(module=model, ...)

    The layers stay what they are. All samples go through the kernels at once, forward and backward, a second time
    forward, as Opacus keeps the input alone; per sample are the products that make the gradients of the weights.

    Opacus tells of the gradient of the output alone: a use of the final states raises in the backward, so take the last
    step of the output instead. Its ``grad_sample_mode`` is ``"hooks"`` or ``"ghost"``; ``"functorch"`` and ``"ew"``,
    which derive without these samplers, cannot train recurrent layers.

    Args:
        model: its layers are ``batch_first``, without dropout, projection and ``reset_after=False``. Their input is a
            tensor, without a state, ``lengths`` or ``resets``. It is changed in place: the layers get hooks, which
            watch trainings alone and which :func:`rnnfast.revert` takes away.

    Raises:
        ValueError: a layer has one of these options, or, from its call, one of these arguments, or a forward of its
            own; it is one of torch.nn's classes, which Opacus replaces by layers of its own:
            ``rnnfast.convert(model, compile=True)`` makes it ours.
        RuntimeError: from the backward: a gradient comes to the final states; a layer of such a class was not
            prepared.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _Recurrent)}
    for name, layer in layers.items():
        _check_options(layer, name)
    for layer in layers.values():
        register_grad_sampler(type(layer))(_gradients)  # of the class, so that it also asks whether a layer is prepared
        if not _is_prepared(layer):
            hooks = [layer.register_forward_pre_hook(_check_arguments, with_kwargs=True)]
            if layer._has_cell_state:  # of a tuple within the outputs a module's hooks see nothing
                hooks.append(layer.register_forward_hook(_watch_states))
            else:
                hooks.append(layer.register_full_backward_pre_hook(_check_gradients))
            layer._rnnfast_hooks = hooks
    return model


def _is_prepared(layer: nn.Module) -> bool:
    return "_rnnfast_hooks" in layer.__dict__


def _check_options(layer: Any, name: str = "") -> None:
    list(directions_of(layer, "Opacus' training"))
    cls = type(layer)
    refused = {
        "batch_first=False": not layer.batch_first,
        "dropout": layer.dropout and layer.num_layers > 1,
        "reset_after=False": not resets_after(layer),
        "a class of torch.nn's": isinstance(cls, _PassesFor),
        "its own forward": cls.forward is not _Recurrent.forward or cls.__call__ is not _Recurrent.__call__,
    }
    if found := [option for option, has in refused.items() if has]:
        raise ValueError(f"Opacus cannot train the layer {name or cls.__name__} with {', '.join(found)}")


def _is_trained(layer: nn.Module) -> bool:
    """When Opacus watches, too."""
    return layer.training and torch.is_grad_enabled()


def _check_arguments(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _is_trained(layer):
        return
    given = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(given, Tensor) or given.is_nested or given.dim() != 3:
        raise ValueError(
            "Opacus sees the input alone: a layer that it trains takes one batch of tensors and nothing else"
        )


def _watch_states(layer: nn.Module, args: Any, outputs: tuple[Tensor, tuple[Tensor, Tensor]]) -> None:
    for state in outputs[1] if _is_trained(layer) else ():
        if state.requires_grad:
            state.register_hook(_refuse_gradient)


def _check_gradients(layer: nn.Module, grads: Any) -> None:
    if layer.training:
        _refuse_gradient(grads[1])


def _refuse_gradient(grad: Tensor | None) -> None:
    if grad is not None and grad.any():  # hooks may make zeros of none
        raise RuntimeError("Opacus does not see the gradient of final states: take the last step of the output instead")


def _gradients(layer: Any, activations: list[Tensor], grads: Tensor) -> dict[nn.Parameter, Tensor]:
    """Of each weight, ``[N, ...]``, from the input and the gradient of the output, both ``[N, T, F]``."""
    if not _is_prepared(layer):
        raise RuntimeError(f"this {type(layer).__name__} is not prepared: call rnnfast.interop.opacus.prepare(model)")
    _check_options(layer)
    if activations[0].shape[:2] != grads.shape[:2]:
        sizes = list(activations[0].shape[:2]), list(grads.shape[:2])
        raise RuntimeError("Opacus gives inputs of {} samples and steps, and gradients of {}".format(*sizes))
    weights = layer._weights()

    def loss(weights: list[Tensor], x: Tensor, dy: Tensor) -> Tensor:
        form = {"num_layers": layer.num_layers, "bidirectional": layer.bidirectional}
        y, *_ = functional.rnn(layer.mode, x.unsqueeze(1), None, weights, **form)
        return (y.squeeze(1) * dy).sum()

    of_samples = vmap(grad(loss), in_dims=(None, 0, 0))([w.detach() for w in weights], activations[0], grads)
    found: dict[nn.Parameter, Tensor] = {}
    for gradient, weight in zip(of_samples, weights):
        if weight.requires_grad:
            found[weight] = found[weight] + gradient if weight in found else gradient  # tied weights occur twice
    return found
