"""Swap the recurrent modules of a model between ``torch.nn``'s classes and ours, in place."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from . import modules

_OURS = {getattr(nn, name): getattr(modules, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}

Model = TypeVar("Model", bound=nn.Module)


class ConversionReport(NamedTuple):
    """What :func:`convert` did, by module name ("" is the model itself)."""

    converted: list[str]
    left_alone: dict[str, str]  # and why


def convert(model: Model) -> Model:
    """Make every ``torch.nn`` recurrent module of a model one of ours, nested and shared ones and the model itself.

    A module changes its class and nothing else: it stays the same object, with the very Parameters, hooks, training
    flag, parametrizations and places in the model that it had. A subclass with code of its own is left alone.

    Args:
        model: any module. It is changed in place.

    Returns:
        The model. Its attribute ``rnnfast_report``, a :class:`ConversionReport`, names what was converted and what
        was left alone.
    """
    report = ConversionReport([], {})
    for name, module in model.named_modules():
        if _swap(module, _OURS):
            report.converted.append(name)
        elif isinstance(module, tuple(_OURS)):
            base = next(theirs for theirs in _OURS if isinstance(module, theirs))
            report.left_alone[name] = f"{type(module).__qualname__} is a subclass of torch.nn.{base.__name__}"
    model.rnnfast_report = report
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`: every module of ours in the model becomes ``torch.nn``'s again, in place.

    Returns:
        The model.
    """
    for module in model.modules():
        _swap(module, _TORCHS)
    model.__dict__.pop("rnnfast_report", None)
    return model


def _swap(module: nn.Module, classes: dict[type, type]) -> bool:
    """Change the class of a module that is, but for parametrizations, exactly one of ``classes``."""
    cls = type(module)
    if cls in classes:
        module.__class__ = classes[cls]
        return True
    base = cls.__bases__[0]
    if parametrize.is_parametrized(module) and base in classes:
        # Parametrizations live in a class of the module's own, made over the original one.
        body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, (classes[base],), body)
        return True
    return False
