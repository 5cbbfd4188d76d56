"""Triton's interpreter for the tests: switched on where there is no GPU, and mended where it differs from one.

To be imported before Triton's kernels.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch

ENABLED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()


def _enable() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    call, cast, dot = InterpretedFunction.__call__, InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def call_prepared(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        """Within a kernel of ours its module is prepared; anew at every call it would take half of the time."""
        if function.fn.__module__.startswith("rnnfast."):
            return function.rewrite()(*args, **kwargs)
        return call(function, *args, **kwargs)

    def cast_to_nearest(builder: InterpreterBuilder, source: TensorHandle, type: Any) -> TensorHandle:
        """A GPU rounds to the nearest bfloat16, the interpreter towards zero."""
        if source.dtype.scalar == tl.float32 and type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(builder, source, type)

    def dot_of_values(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: Any) -> TensorHandle:
        """Of bfloat16 the interpreter multiplies the bits, as integers."""
        if a.dtype.scalar == tl.bfloat16:
            a, b = builder.cast_impl(a, tl.float32), builder.cast_impl(b, tl.float32)
        return dot(builder, a, b, *args)

    InterpretedFunction.__call__ = call_prepared
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_to_nearest, dot_of_values


if ENABLED:
    _enable()
