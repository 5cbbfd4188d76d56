"""Fused RNN, LSTM and GRU layers for PyTorch that give ``torch.nn``'s numbers."""

from . import flops, functional  # noqa: F401  flops is known to torch from here on
from .backends import backends, use_backend
from .choice import set_choice, share_choice
from .convert import convert, revert
from .explain import explain
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .stream import Stream

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "backends",
    "convert",
    "explain",
    "functional",
    "revert",
    "set_choice",
    "share_choice",
    "use_backend",
]
