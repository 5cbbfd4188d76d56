"""Triton's interpreter for the tests: on where there is no GPU, mended where it differs from one, and hastened.

To be imported before Triton's kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from types import FunctionType, SimpleNamespace
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


def _hasten() -> None:
    """Of every operation on a tile most time goes into what its result's type is: found once, it takes a quarter."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    broadcast = semantic.TritonSemantic.broadcast_impl_value
    builder, prepare, dtype_of = interpreter.interpreter_builder, interpreter._patch_lang, interpreter._get_np_dtype
    # Integers are checked for overflow on a GPU in debug builds only.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    prepared: set[int] = set()
    dtypes: dict[str, np.dtype] = {}

    def prepare_once(function: FunctionType) -> SimpleNamespace:
        """Triton's language in a module stays that of the interpreter."""
        if id(function.__globals__) not in prepared:
            prepared.add(id(function.__globals__))
            prepare(function)
        return SimpleNamespace(restore=lambda: None)

    def dtype_by_name(of: Any) -> np.dtype:
        if of.scalar.name not in dtypes:
            dtypes[of.scalar.name] = dtype_of(of.scalar)
        return dtypes[of.scalar.name]

    @functools.cache
    def sizes(shape: tuple[int, ...]) -> tuple[core.tuple, core.constexpr]:
        return core.tuple(map(core.constexpr, shape)), core.constexpr(math.prod(shape))

    @functools.cache
    def checked(shape: tuple[int, ...], types: tuple[type, ...]) -> tuple[core.tuple, int]:
        if not shape:
            raise TypeError("0d block_type is forbidden")
        return core.tuple(shape), core.validate_block_shape(shape)

    def make_block_type(block: core.block_type, element: core.dtype, shape: list[Any] | core.tuple) -> None:
        assert isinstance(shape, (list, core.tuple))
        values = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        block.element_ty = element
        block.shape, block.numel = checked(values, tuple(map(type, values)))  # 64.0 is 64, but no size

    def name_of_block_type(block: core.block_type) -> str:
        """Seldom asked for."""
        return f"<{block.shape}, {block.element_ty}>"

    def broadcast_what_differs(of: semantic.TritonSemantic, a: core.tensor, b: core.tensor) -> tuple:
        """Tiles of one shape stay as they are, which Triton finds out size by size."""
        return (a, b) if a.shape is b.shape else broadcast(of, a, b)  # `sizes` makes one of each

    def make_tensor(tensor: core.tensor, handle: Any, type: Any) -> None:
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        tensor.shape, tensor.numel = sizes(tuple(type.shape) if type.is_block() else ())

    def make_tuple(values: core.tuple, args: Any, type: Any = None) -> None:
        values.values, values.given_type = list(args), type

    def type_of_tuple(values: core.tuple) -> core.tuple_type:
        """Seldom asked for."""
        if values.given_type is None:
            values.given_type = core._type_for_tuple_values(values.values)
        elif not isinstance(values.given_type, core.tuple_type):
            values.given_type = core.tuple_type(values.given_type)
        return values.given_type

    interpreter._patch_lang, interpreter._get_np_dtype = prepare_once, dtype_by_name
    core.block_type.__init__, core.block_type.name = make_block_type, property(name_of_block_type)
    semantic.TritonSemantic.broadcast_impl_value = broadcast_what_differs
    core.tensor.__init__, core.tuple.__init__, core.tuple.type = make_tensor, make_tuple, property(type_of_tuple)


if ENABLED:
    _enable()
    _hasten()
