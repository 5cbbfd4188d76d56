"""Swap the recurrent modules of a model between ``torch.nn``'s classes and ours, in place."""

from __future__ import annotations

import copyreg
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
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


class _PassesFor(type):
    """The classes that convert makes: each equals the one that it stands for, as ``type(m) == torch.nn.LSTM`` asks.

    Tools look modules up by their exact type, torch's own quantisation among them. Equal classes are equal keys.
    """

    stands_for: type[nn.Module]

    def __eq__(cls, other: object) -> bool:
        return cls is other or vars(cls).get("stands_for") is other

    def __hash__(cls) -> int:
        return hash(vars(cls).get("stands_for")) if "stands_for" in vars(cls) else super().__hash__()


@functools.cache
def _passing_for(cls: type[nn.Module]) -> Any:
    """A subclass of torch's class, or of a subclass of it, with the forward of ours."""
    base = _torch_base(cls)
    bases = (_OURS[cls], cls) if cls is base else (cls, _passing_for(base))

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced = super(new, self).__reduce_ex__(protocol)
        # What has no state is a way of the user's own to make the object.
        return reduced if len(reduced) < 3 else (_without_init, (cls,), *reduced[2:])

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        super(new, self).__setattr__(name, value)
        if name == "qconfig" and value is not None:  # torch.ao.quantization is about to replace its own module
            _become(self, cls)

    body = {"stands_for": cls, "__module__": __name__, "__doc__": cls.__doc__}
    body |= {"__reduce_ex__": reduce, "__setattr__": set_attribute}
    metaclass = _PassesFor if type(cls) is type else type("_PassesFor", (_PassesFor, type(cls)), {})
    new = metaclass(cls.__name__, bases, body)
    return new


copyreg.pickle(_PassesFor, lambda cls: (_passing_for, (cls.stands_for,)))  # the class itself


def _without_init(cls: Any) -> Any:
    """A module to be filled from a pickle or a copy."""
    passing = _passing_for(cls)
    return passing.__new__(passing)


def convert(model: Model, *, compile: bool = False) -> Model:
    """Make every ``torch.nn`` recurrent module of a model one of ours, nested and shared ones and the model itself.

    A module changes its class and nothing else: it stays the same object, with the very Parameters, hooks, training
    flag, parametrizations and places in the model that it had. It also stays an instance of its class, so that
    ``isinstance(m, torch.nn.LSTM)`` and tools that know modules by their type go on as before; a subclass of
    ``torch.nn.LSTM`` that has no forward of its own is converted likewise. :func:`torch.compile` breaks its graph at
    whatever is an instance of ``torch.nn.LSTM``, ``GRU`` or ``RNN``, with right results.

    Args:
        model: any module. It is changed in place.
        compile: make layers that compile with ``fullgraph=True``: :class:`rnnfast.LSTM` and its like, no instances of
            ``torch.nn.LSTM``. Subclasses of the user's are then left alone.

    Returns:
        The model. Its attribute ``rnnfast_report``, a :class:`ConversionReport`, names what was converted, and what
        recurrent modules were left alone and why.
    """
    report = ConversionReport([], {})
    for name, module in model.named_modules():
        cls = _class_of(module)
        if issubclass(cls, modules.OURS) or not issubclass(cls, tuple(_OURS)):
            if compile and isinstance(cls, _PassesFor):
                theirs = cls.stands_for
                if theirs in _OURS:
                    _become(module, _OURS[theirs])
                    report.converted.append(name)
                else:
                    report.left_alone[name] = _subclass(theirs) + _why_not(theirs, compile)
            elif reason := _is_foreign(module):
                report.left_alone[name] = reason
        elif why := _why_not(cls, compile):
            report.left_alone[name] = _subclass(cls) + why
        else:
            try:
                ours = _OURS[cls] if compile else _passing_for(cls)
            except Exception as error:  # code of the user's that runs when a class is made
                report.left_alone[name] = f"{_subclass(cls)}, of which there is no other: {error}"
                continue
            _become(module, ours)
            report.converted.append(name)
    model.rnnfast_report = report  # type: ignore[assignment]
    return model


def revert(model: Model) -> Model:
    """Undo :func:`convert`: every module of ours in the model becomes ``torch.nn``'s again, in place.

    Returns:
        The model, which needs rnnfast no more. Its attribute ``rnnfast_report`` has the names ``reverted``, and by name
        what was ``left_alone`` and why: subclasses of our classes, and options that torch.nn does not have.
    """
    report = SimpleNamespace(reverted=[], left_alone={})  # no type of ours: a pickle of the model would ask for it
    for name, module in model.named_modules():
        module.__dict__.pop("rnnfast_report", None)
        cls = _class_of(module)
        if not issubclass(cls, modules.OURS):
            continue
        theirs = vars(cls).get("stands_for") or _TORCHS.get(cls)
        if theirs is None:
            ours = next(base for base in cls.__mro__ if base in _TORCHS)
            report.left_alone[name] = f"{cls.__qualname__} is a subclass of rnnfast.{ours.__name__}"
            continue
        if own := modules.options(module):
            report.left_alone[name] = f"torch.nn.{theirs.__name__} has no {', '.join(own)}"
            continue
        _become(module, theirs)
        module.__dict__.pop("_rnnfast_options", None)
        module.__dict__.pop("recompute", None)
        for hook in module.__dict__.pop("_rnnfast_hooks", ()):  # of interop.opacus
            hook.remove()
        report.reverted.append(name)
    model.rnnfast_report = report  # type: ignore[assignment]
    return model


def _class_of(module: nn.Module) -> Any:  # mypy takes no class for the hashable key that a cache asks for
    """The module's class but for parametrizations, which live in a class of its own, made over the original one."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _torch_base(cls: type[nn.Module]) -> Any:
    return next(base for base in cls.__mro__ if base in _OURS)


def _subclass(cls: type[nn.Module]) -> str:
    return f"{cls.__qualname__} is a subclass of torch.nn.{_torch_base(cls).__name__}"


def _why_not(cls: type[nn.Module], compile: bool) -> str:
    base = _torch_base(cls)
    if cls.forward is not base.forward or cls.__call__ is not base.__call__:
        return " with its own forward"
    return ", and compile is set" if compile and cls is not base else ""


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        old = type(module)
        body = {key: value for key, value in vars(old).items() if key not in ("__dict__", "__weakref__")}
        cls = type(cls)(old.__name__, (cls,), body)  # type: ignore[misc]  # a call of its metaclass
    module.__class__ = cls


def _is_foreign(module: nn.Module) -> str | None:
    """Of recurrent modules that have other code behind them: which."""
    names = {cls.__name__ for cls in _OURS}
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript" if getattr(module, "original_name", None) in names else None
    cls = type(module)
    return f"it is {cls.__module__}'s" if cls.__module__.startswith("torch.ao.nn.") and cls.__name__ in names else None
