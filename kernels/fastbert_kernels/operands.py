"""The tensors of a launch: their specs, the checks of every operation, and strides and blocks of kernels over rows."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.limits import DTYPES


class TensorSpec(NamedTuple):
    """The properties of a tensor that a launch depends on, except its address. misaligned: the address modulo 16."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    misaligned: int = 0


def spec_of(x: Tensor | None) -> tuple | None:
    """Return the fields of a tensor's `TensorSpec` as a plain tuple, which is three times as fast; None for None."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)


def spec_of_new(*shape: int, dtype: torch.dtype, device: torch.device) -> TensorSpec:
    """Return the spec of a new contiguous tensor."""
    strides = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
    return TensorSpec(torch.Size(shape), strides, dtype, device)


def check(operation: str, *operands: TensorSpec | None) -> None:
    """Raise TypeError if the first operand's dtype is unsupported, ValueError for tensors on different devices."""
    first, *others = (x for x in operands if x is not None)
    if first.dtype not in DTYPES:
        raise TypeError(f"{operation}: dtype {first.dtype} is not supported, only float32, float16 and bfloat16")
    for other in others:
        if other.device != first.device:
            raise ValueError(f"{operation}: tensors are on {first.device} and {other.device}")


def shape_of(operation: str, name: str, x: TensorSpec, letters: str) -> tuple[int, ...]:
    """Return the shape of a tensor with one dimension for each letter. Raises ValueError for another number."""
    if len(x.shape) != len(letters.split()):
        raise ValueError(f"{operation}: {name} is {list(x.shape)}, expected [{letters.replace(' ', ', ')}]")
    return x.shape


def check_shape(operation: str, name: str, x: TensorSpec, *shape: int) -> None:
    """Raise ValueError if a tensor does not have the shape that the operation needs."""
    if x.shape != shape:
        raise ValueError(f"{operation}: {name} is {list(x.shape)}, expected {list(shape)}")


def have_unit_strides(*operands: TensorSpec | None) -> bool:
    """Return True if the last dimension of each tensor is contiguous, as kernels need it. Empty tensors pass."""
    return all(x is None or x.strides[-1] == 1 or x.shape[-1] == 1 or 0 in x.shape for x in operands)


def with_unit_stride(x: Tensor | None) -> Tensor | None:
    """Return x if its last dimension is contiguous, else a contiguous copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def addressable_by_tma(x: TensorSpec) -> bool:
    """Return True if TMA can address x: contiguous rows that do not overlap and start at multiples of 16 bytes."""
    stride, unit = x.strides
    return unit == 1 and stride >= x.shape[1] and x.misaligned == 0 and stride * x.dtype.itemsize % 16 == 0


def row_stride(x: TensorSpec) -> int:
    """Return the elements from one row to the next. A single row may have any stride, so its width is used."""
    return x.strides[0] if x.shape[0] > 1 else x.shape[-1]


def common_unit(x: TensorSpec, *sizes: int) -> int:
    """Return the largest number of elements, up to 16 bytes, that divides all these sizes and strides.

    Kernels get sizes and strides in this unit, so that the compiler knows how wide accesses may be. Triton itself only
    detects multiples of 16: with a width like 312 it would access single elements. Raises ValueError for 2^31 elements
    or more, since kernels multiply by the unit in 32 bits.
    """
    if max(sizes) >= 2**31:
        raise ValueError(f"a stride or width of {max(sizes)} elements is not supported, only below 2^31")
    return math.gcd(16 // x.dtype.itemsize, *sizes)


def row_blocks(width: int) -> dict[str, int]:
    """Return a program's rows, columns and warps. They depend on the width alone, so a row's result does not depend on
    the number of rows."""
    block = max(1, triton.next_power_of_2(width))
    rows = max(1, min(16, 2048 // block))
    return {"BLOCK_ROWS": rows, "BLOCK_E": block, "num_warps": 4 if rows * block <= 4096 else 8}


@triton.jit
def live_tokens(num_tokens_ptr, num_tokens):
    """The number of live rows: num_tokens on the device if it is given, else all rows of the buffer."""
    count = num_tokens
    if num_tokens_ptr is not None:
        count = tl.minimum(tl.load(num_tokens_ptr), num_tokens)
    return count
