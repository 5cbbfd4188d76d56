"""Loops of launches as CUDA graphs: what a GPU does in a few microseconds takes Python many times that to launch."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CAPACITY = 256  # graphs that are kept: of a hundred layers' forward and backward
_graphs: OrderedDict[tuple, torch.cuda.CUDAGraph | None] = OrderedDict()  # None: seen once
_streams: dict[int, torch.cuda.Stream] = {}  # to capture on, by device
_lock = threading.Lock()
_enabled = True


def run(device: torch.device, loop: Callable[[], None], *key: Any) -> None:
    """Run a loop of launches, or replay it if it ran before on the same memory.

    A graph holds addresses. A loop that comes back with the same shapes mostly comes back to the same addresses also,
    since torch's allocator hands out what was just freed; the second time it is captured. The launches must not
    allocate, and no library may lend them memory: what cuBLAS lends dies with whichever graph dies first.

    Args:
        device: where the launches go, the current device.
        loop: the launches, on the current stream.
        key: all that they depend on: tensors, by their addresses, and values.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        loop()
        return
    key = (
        device,
        torch.cuda.current_stream().cuda_stream,
        *(part.data_ptr() if isinstance(part, Tensor) else part for part in key),
    )
    with _lock:
        if _enabled and key in _graphs:
            _graphs.move_to_end(key)
            graph = _graphs[key] = _graphs[key] or _capture(loop)
            if graph is not None:
                graph.replay()
                return
        elif _enabled:
            _graphs[key] = None
            if len(_graphs) > _CAPACITY:
                _graphs.popitem(last=False)
    loop()


def _capture(loop: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    global _enabled
    graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
    if device not in _streams:  # of high priority: those of normal priority may be handed out again
        _streams[device] = torch.cuda.Stream(priority=-1)
    try:
        with torch.cuda.stream(_streams[device]):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                loop()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        _enabled = False
        warnings.warn(f"rnnfast runs without CUDA graphs, which is slower: {error}", stacklevel=2)
        return None
    return graph
