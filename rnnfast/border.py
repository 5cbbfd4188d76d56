"""The check of an operator's arguments for the backends in Python: the rules of ``csrc/ops.cpp``, in its words.

Letters as in ``reference.py``. It costs a few microseconds, so what is right is told apart first and described never.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .cells import GATES, HAS_CELL_STATE, UNIT_WEIGHTS
from .records import NAMES, Inputs, OutputGradients, Saved
from .reference import check_mode

# As C++ names them; the other dtypes go by torch's name in Python.
DTYPE_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.bool: "Bool",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
}
_MOST_SIZE = 2**31
_STRIDED = torch.strided


class Sizes(NamedTuple):
    """What the arguments of a layer say."""

    has_cell: bool
    D: int
    N: int
    H: int
    P: int
    R: int
    rows: tuple[int, ...]  # [T, N], or packed [R]
    dtype: torch.dtype
    acc: torch.dtype  # of c
    device: torch.device


def _refuse(text: str) -> NoReturn:
    raise RuntimeError(f"rnnfast: {text}")


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is None:  # a schema without `?` lets it pass
        _refuse(f"{name} is missing")
    if tensor.shape != shape:
        _refuse(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype is not dtype:
        names = (DTYPE_NAMES.get(d, d) for d in (tensor.dtype, dtype))
        _refuse("{} has dtype {}, expected {}".format(name, *names))
    if tensor.device != device or tensor.layout is not _STRIDED:
        _refuse(f"{name} is {tensor.layout} on {tensor.device}, expected torch.strided on {device}")


def check_devices(x: Tensor, tensors: Iterable[Tensor | None], batch_sizes: Tensor | None) -> None:
    """Of tensors on several devices torch picks the operator's kernel by one of them: a fake's, if one is on meta."""
    if x is None:
        _refuse("x is missing")
    device = x.device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            _refuse(f"a tensor is on {tensor.device}, expected {device} as x")
    if batch_sizes is not None and batch_sizes.device.type not in ("cpu", device.type):
        _refuse("batch_sizes has to be a vector of int64 on the CPU")


def check_lengths(lengths: Tensor, steps: int) -> None:
    """What can be said of them without their values."""
    if lengths is None:
        _refuse("lengths is missing")
    if steps < 0:
        _refuse(f"a sequence has no {steps} steps")
    dtype = lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or lengths.layout is not _STRIDED:
        _refuse(f"lengths are {lengths.layout} {DTYPE_NAMES.get(dtype, dtype)}, expected torch.strided integers")


def whole(weight: Tensor) -> Tensor:
    """A weight as it is; of a W_hh of K heads, ``[K, G*H/K, H/K]``, one that has the shape of the whole matrix."""
    if weight.dim() != 3:
        return weight
    heads, rows, width = weight.shape
    return weight.new_empty(()).expand(heads * rows, heads * width)


def check_layer(inputs: Inputs, dtypes: Sequence[torch.dtype] | None = None) -> Sizes:
    """Checks the arguments of a layer's forward; ``dtypes``: what the backend serves, if not all that float."""
    mode, x, h0, c0, batch_sizes, lengths, resets, bidirectional, names, weights = inputs
    check_mode(mode)
    if x is None:
        _refuse("x is missing")
    D, dtype, device = 1 + bidirectional, x.dtype, x.device
    G, has_cell = GATES[mode], HAS_CELL_STATE[mode]
    if not (dtype.is_floating_point or dtype.is_complex) if dtypes is None else dtype not in dtypes:
        _refuse(f"no kernel for dtype {DTYPE_NAMES.get(dtype, dtype)}")
    if x.layout is not _STRIDED:
        _refuse(f"x is {x.layout} on {device}, expected torch.strided on {device}")
    dimensions = 3 if batch_sizes is None else 2
    if x.dim() != dimensions:
        _refuse(f"x has {x.dim()} dimensions, expected {dimensions}")
    *rows, I = x.shape
    if batch_sizes is None:
        T, N = rows
        R = T * N
        if lengths is not None:
            _check("lengths", lengths, (N,), torch.int64, device)
        if resets is not None:
            _check("resets", resets, (T, N), torch.bool, device)
    else:
        if lengths is not None or resets is not None:
            _refuse("batch_sizes go with neither lengths nor resets")
        (R,) = rows
        T, N = _check_batch_sizes(batch_sizes, R)
    if T >= _MOST_SIZE or N >= _MOST_SIZE or I >= _MOST_SIZE:
        _refuse("x has 2^31 or more steps, rows or features")

    if names not in NAMES[mode]:
        _refuse(f"no {mode} has weights '{names}'")
    count, projected = NAMES[mode][names], "w_hr" in names
    if len(weights) != D * count:
        _refuse(f"got {len(weights)} weights, expected {count} for each of {D} direction(s), {names}")
    directions = inputs.directions()
    w_ih, w_hr = directions[0].w_ih, directions[0].w_hr
    if w_ih.dim() != 2 or w_ih.shape[0] % G:
        _refuse(f"weight_ih has to be [{G} * hidden_size, input_size]")
    GH = w_ih.shape[0]
    H = P = GH // G
    if w_hr is not None:
        if w_hr.dim() != 2:
            _refuse("weight_hr has to be [proj_size, hidden_size]")
        P = w_hr.shape[0]
    if H >= _MOST_SIZE or P >= _MOST_SIZE:
        _refuse("the layer has 2^31 or more units")
    for w in directions:
        _check("weight_ih", w.w_ih, (GH, I), dtype, device)
        _check("weight_hh", w.w_hh, (GH, P), dtype, device)
        if "b_ih" in names:
            _check("bias_ih", w.b_ih, (GH,), dtype, device)
            _check("bias_hh", w.b_hh, (GH,), dtype, device)
        if projected:
            _check("weight_hr", w.w_hr, (P, H), dtype, device)
        if UNIT_WEIGHTS[mode]:
            _check("weight_units", w.w_units, (UNIT_WEIGHTS[mode] * H,), dtype, device)
    if h0 is not None:
        _check("h0", h0, (D, N, P), dtype, device)
    if c0 is not None:
        _check("c0", c0, (D, N, H), dtype, device)
        if not has_cell:
            _refuse(f"no {mode} has a cell state")
    return Sizes(has_cell, D, N, H, P, R, tuple(rows), dtype, torch.promote_types(dtype, torch.float32), device)


def check_values(inputs: Inputs) -> None:
    """Checks, after all that needs none, the values of lengths; but on other devices than the CPU, whose kernels clamp
    them: that would have to wait for the device."""
    x, lengths = inputs.x, inputs.lengths
    if lengths is not None and lengths.is_cpu and lengths.numel():
        low, high = (bound.item() for bound in lengths.aminmax())
        if low < 0 or high > len(x):
            _refuse(f"lengths have to be between 0 and {len(x)}")


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> tuple[int, int]:
    """Returns T and N."""
    on_cpu = batch_sizes.is_cpu and batch_sizes.layout is _STRIDED
    if batch_sizes.dim() != 1 or not on_cpu or batch_sizes.dtype != torch.int64 or not batch_sizes.numel():
        _refuse("batch_sizes has to be a vector of int64 on the CPU")
    if batch_sizes.numel() > rows:  # each is a row or more
        _refuse(f"batch_sizes do not sum to the {rows} rows of x")
    sizes = batch_sizes.tolist()
    if sizes[-1] <= 0 or sizes != sorted(sizes, reverse=True):
        _refuse("batch_sizes has to be positive and must not increase")
    if sum(sizes) != rows:
        _refuse(f"batch_sizes do not sum to the {rows} rows of x")
    return len(sizes), sizes[0]


def check_backward(sizes: Sizes, saved_gates: int, grads: OutputGradients, saved: Saved) -> None:
    """Checks what a layer's backward is given beside; ``saved_gates``: columns of H that its forward keeps of them."""
    (dy, dh_n, dc_n, dc), (y, c, gates) = grads, saved
    has_cell, D, N, H, P, R, rows, dtype, acc, device = sizes
    of_y, of_c, of_c_n = (*rows, D * P), (*rows, D * H) if has_cell else (0,), (D, N, H) if has_cell else (0,)
    _check("y", y, of_y, dtype, device)
    _check("c", c, of_c, acc, device)
    _check("gates", gates, (D, R, saved_gates * H) if saved_gates else (0,), dtype, device)
    if dy is not None:
        _check("dy", dy, of_y, dtype, device)
    if dh_n is not None:
        _check("dh_n", dh_n, (D, N, P), dtype, device)
    if dc_n is not None:
        _check("dc_n", dc_n, of_c_n, dtype, device)
    if dc is not None:
        _check("dc", dc, of_c, acc, device)
