"""Dropout inside kernels (Srivastava et al. 2014): an element is zeroed with probability p, others are scaled up.

Whether an element is kept follows from a seed on the device and from the element's row and column, by the
counter-based generator Philox 4x32-10 (Salmon et al. 2011). So forward and backward, whose tiles differ, agree without
a stored mask. One call of the generator gives the numbers of four adjacent columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.operands import TensorSpec

MAX_THRESHOLD = 2**31 - 1


class Dropout(NamedTuple):
    """p: probability of zero, from 0 to 1; seed: int64 [1] on the device; site: tells uses of one seed apart."""

    p: float
    seed: Tensor
    site: int


@triton.jit
def keep_mask(seed, rows, column, plane, SITE: tl.constexpr, threshold, BLOCK: tl.constexpr):
    """rows integers [R], columns from column on (a multiple of 4), plane (a head, or 0) -> bool [R, BLOCK]."""
    zeros = tl.zeros((rows.shape[0], BLOCK // 4), tl.int32)
    quads = zeros + (column // 4 + tl.arange(0, BLOCK // 4))[None, :]
    first, second, third, fourth = tl.philox(
        seed, quads, zeros + rows.to(tl.int32)[:, None], zeros + plane, zeros + SITE
    )
    # Joined, the numbers have the order of the columns: first, second, third, fourth.
    numbers = tl.join(tl.join(first, third), tl.join(second, fourth))
    numbers = tl.reshape(numbers, (rows.shape[0], BLOCK))
    return (numbers >> 1).to(tl.int32) >= threshold  # 31 bits, so that threshold is an int32 for every p


def threshold_of(p: float) -> int:
    """Return how many of the 2^31 equally likely numbers zero an element. For p = 1 the scale zeroes the last one."""
    return min(round(p * 2**31), MAX_THRESHOLD)


def scale_of(p: float) -> float:
    """Return the factor of kept elements."""
    return 1.0 / (1.0 - p) if p < 1 else 0.0


def dropout_constants(p: float, site: int) -> dict:
    """Return the arguments of a kernel that calls `keep_mask`, without the seed. Raises ValueError for an invalid p."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability is {p}, expected 0 to 1")
    return {"threshold": threshold_of(p), "keep_scale": scale_of(p), "SITE": site, "DROPOUT": p > 0}


def check_seed(operation: str, seed: TensorSpec | None, device: torch.device) -> None:
    """Raise TypeError or ValueError for a seed that is not int64 [1] on the device."""
    if seed is None:
        return
    if seed.dtype != torch.int64 or seed.shape != (1,):
        raise TypeError(f"{operation}: the seed is {seed.dtype} {list(seed.shape)}, expected int64 [1]")
    if seed.device != device:
        raise ValueError(f"{operation}: tensors are on {device} and {seed.device}")
