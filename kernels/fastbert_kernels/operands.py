"""The tensors of a launch: what it depends on beside their addresses, and the checks that every operation makes.

The last part is for kernels over rows: how many rows count, and how many one program takes.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.limits import DTYPES


class TensorSpec(NamedTuple):
    """All that a launch depends on of a tensor, but its address; `misaligned` is the address modulo 16."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    misaligned: int = 0


def spec_of(x: Tensor | None) -> tuple | None:
    """The fields of a tensor's `TensorSpec`, as a plain tuple, which takes a third of the time; None for None."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)


def spec_of_new(*shape: int, dtype: torch.dtype, device: torch.device) -> TensorSpec:
    """The spec of a contiguous tensor that torch allocates."""
    strides = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
    return TensorSpec(torch.Size(shape), strides, dtype, device)


def check(operation: str, *operands: TensorSpec | None) -> None:
    """Raise TypeError for a dtype that no kernel takes, ValueError for tensors on different devices."""
    first, *others = (x for x in operands if x is not None)
    if first.dtype not in DTYPES:
        raise TypeError(f"{operation}: dtype {first.dtype} is not served, only float32, float16 and bfloat16")
    for other in others:
        if other.device != first.device:
            raise ValueError(f"{operation}: tensors lie on {first.device} and {other.device}")


def shape_of(operation: str, name: str, x: TensorSpec, letters: str) -> tuple[int, ...]:
    """The shape of a tensor that has a dimension for each of the letters; raises ValueError for another number."""
    if len(x.shape) != len(letters.split()):
        raise ValueError(f"{operation}: {name} is {list(x.shape)}, expected [{letters.replace(' ', ', ')}]")
    return x.shape


def check_shape(operation: str, name: str, x: TensorSpec, *shape: int) -> None:
    """Raise ValueError if a tensor has another shape than the operation needs."""
    if x.shape != shape:
        raise ValueError(f"{operation}: {name} is {list(x.shape)}, expected {list(shape)}")


def have_unit_strides(*operands: TensorSpec | None) -> bool:
    """Whether the last dimension of each tensor is contiguous, as kernels read it; of an empty one nothing is read."""
    return all(x is None or x.strides[-1] == 1 or x.shape[-1] == 1 or 0 in x.shape for x in operands)


def with_unit_stride(x: Tensor | None) -> Tensor | None:
    """x itself if `have_unit_strides` holds for it, else a copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def addressable_by_tma(x: TensorSpec) -> bool:
    """Whether rows begin at multiples of 16 bytes, one after another."""
    stride, unit = x.strides
    return unit == 1 and stride >= x.shape[1] and x.misaligned == 0 and stride * x.dtype.itemsize % 16 == 0


def row_stride(x: TensorSpec) -> int:
    """Elements from one row to the next. A single row has none: whatever its stride says, the next would follow it."""
    return x.strides[0] if x.shape[0] > 1 else x.shape[-1]


def common_unit(x: TensorSpec, *sizes: int) -> int:
    """The largest number of elements, up to 16 bytes, that divides all these sizes and strides.

    Kernels get sizes and strides in this unit and so know how wide their accesses may be. Triton itself tells them only
    whether a number is a multiple of 16: for a width like 312, accesses would be of single elements. Raises ValueError
    for 2^31 elements or more: kernels multiply by the unit in 32 bits.
    """
    if max(sizes) >= 2**31:
        raise ValueError(f"a stride or width of {max(sizes)} elements is not served, only those below 2^31")
    return math.gcd(16 // x.dtype.itemsize, *sizes)


def row_blocks(width: int) -> dict[str, int]:
    """Rows of a program and its warps, from the width alone, so that a row's bits never depend on other rows."""
    block = max(1, triton.next_power_of_2(width))
    rows = max(1, min(16, 2048 // block))
    return {"BLOCK_ROWS": rows, "BLOCK_E": block, "num_warps": 4 if rows * block <= 4096 else 8}


@triton.jit
def live_tokens(num_tokens_ptr, num_tokens):
    """How many rows count: the number on the device if one is given, else every row of the buffer."""
    count = num_tokens
    if num_tokens_ptr is not None:
        count = tl.minimum(tl.load(num_tokens_ptr), num_tokens)
    return count
