"""Triton's interpreter in half of the time, with the same results (triton/runtime/interpreter.py, 3.6 to 3.9)."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from triton import language as tl
from triton.runtime import interpreter
from untraced import untraced

PATCH = pytest.MonkeyPatch()


def quicken() -> None:
    """Let the interpreter do once what it repeats in every call or operation, and which no operand affects.

    Also turn off its overflow check: it computes every integer sum and product again in 64 bits, but compares the two
    only under `debug`.
    """
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    PATCH.setattr(interpreter.interpreter_builder, "options", options)
    _patch_the_language_once_a_launch()
    _share_shapes()
    _share_dtypes()
    PATCH.setattr(interpreter.GridExecutor, "__call__", untraced()(interpreter.GridExecutor.__call__))
    _keep_frames_in_one_chunk()


@contextmanager
def not_quickened() -> Iterator[None]:
    """Run Triton's own interpreter."""
    PATCH.undo()
    try:
        yield
    finally:
        quicken()


def _patch_the_language_once_a_launch() -> None:
    """The interpreter patches `triton.language` again in each call of a jit helper, and searches it for builtins.

    One thread launches at a time: `fastbert_kernels.launch` holds a lock.
    """
    patch_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    is_builtin = tl.core.is_builtin
    patched: set[int] = set()  # the ids of the globals that this launch has patched

    @functools.cache
    def names_of(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtins(package, builder, scope):
        for name in names_of(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch_language(fn)

    def launch_anew(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    PATCH.setattr(interpreter, "_patch_builtin", patch_builtins)
    PATCH.setattr(interpreter, "_patch_lang", patch_once)
    PATCH.setattr(interpreter.GridExecutor, "__call__", launch_anew)


def _keep_frames_in_one_chunk() -> None:
    """Python 3.11 and later keep frames in chunks of 16 KiB. Where a launch happens to call functions across the end of
    a chunk, each of these calls maps a chunk and unmaps it again, which may take half of the time.

    A frame of more than 512 KiB gets a chunk of 1 MiB, and its callees use the rest of that chunk.
    """
    launch = interpreter.GridExecutor.__call__

    def launch_in_a_chunk(*args, **kwargs):
        return launch(*args, **kwargs)

    launch_in_a_chunk.__code__ = launch_in_a_chunk.__code__.replace(co_stacksize=2**16 + 2**10)
    PATCH.setattr(interpreter.GridExecutor, "__call__", launch_in_a_chunk)


def _share_shapes() -> None:
    """Every block type and every tensor make objects of their shape. There are few shapes."""
    make_block_type = tl.block_type.__init__

    @functools.cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[tl.tuple, int, str, tl.tuple, tl.constexpr]:
        if not sizes:
            return tl.tuple([]), 1, "", tl.tuple([]), tl.constexpr(1)
        made = object.__new__(tl.block_type)
        make_block_type(made, tl.int1, list(sizes))
        constants = tl.tuple([tl.constexpr(size) for size in sizes])
        return made.shape, made.numel, str(made.shape), constants, tl.constexpr(math.prod(sizes))

    def block_type(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if not sizes:
            return make_block_type(self, element_ty, shape)
        self.element_ty = element_ty
        self.shape, self.numel, text, _, _ = shape_of(sizes)
        self.name = f"<{text}, {element_ty}>"

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        *_, self.shape, self.numel = shape_of(tuple(type.shape.values) if type.is_block() else ())

    PATCH.setattr(tl.block_type, "__init__", block_type)
    PATCH.setattr(tl.tensor, "__init__", tensor)


def _share_dtypes() -> None:
    """The interpreter makes a table of all dtypes whenever it looks for numpy's dtype of one."""
    names = [*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES]
    pointer, numpy_dtype = np.dtype(np.uint64), interpreter._get_np_dtype
    table = {name: numpy_dtype(tl.dtype(name)) for name in names}

    def dtype_of(dtype):
        scalar = dtype.scalar
        return pointer if scalar.is_ptr() else table[scalar.name]

    PATCH.setattr(interpreter, "_get_np_dtype", dtype_of)
