"""Fused RNN, LSTM and GRU layers for PyTorch that give ``torch.nn``'s numbers, and layers of any other cell."""

from . import flops, functional  # noqa: F401  flops is known to torch from here on
from .backends import backends, use_backend
from .cells import cell
from .choice import set_choice, share_choice
from .convert import convert, revert
from .explain import explain
from .flex import FlexRNN
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .stream import Stream

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "FlexRNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "backends",
    "cell",
    "convert",
    "explain",
    "functional",
    "revert",
    "set_choice",
    "share_choice",
    "use_backend",
]
