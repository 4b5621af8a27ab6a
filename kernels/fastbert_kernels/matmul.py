"""The GEMM main loop that all linears share: tiles of x W^T for x [T, K] and W [N, K], accumulated in float32.

Operands are read through pointers (cp.async, from sm_80 on) or host tensor descriptors (TMA, from sm_90 on). For every
shape, K is summed in blocks of BLOCK_K from start to end, so that a row's result does not depend on the other rows.

A float32 product is three TF32 products ("tf32x3": Ootomo and Yokota 2022), a product of 16-bit types is exact.
"""

import triton
import triton.language as tl
from triton import knobs

from fastbert_kernels.configs import GemmConfig
from fastbert_kernels.operands import TensorSpec, addressable_by_tma

# Triton's interpreter multiplies bfloat16 as if it were uint16 (in 3.6 to 3.9), so operands are widened there.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """a [M, K] times b [K, N] plus the float32 accumulator [M, N]."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _load_tile(
    operand, row, inner, num_rows, num_inner, stride_row, ROWS: tl.constexpr, INNER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """operand[row : row + ROWS, inner : inner + INNER], zeros past num_inner, anything past num_rows."""
    if DESCRIPTORS:
        tile = operand.load([row, inner])
    else:
        # Rows past the end repeat the last row, which needs no mask. Their results are never stored.
        offs_row = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        offs_inner = inner + tl.arange(0, INNER)
        pointers = operand + offs_row[:, None] * stride_row + offs_inner[None, :]
        tile = tl.load(pointers, mask=offs_inner[None, :] < num_inner, other=0.0)
    return tile


@triton.jit
def matmul_tiles(
    x, weight, row, col, num_rows, num_cols, num_inner, stride_x, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """x[row :] times the weight rows [col :] -> three accumulators [BLOCK_M, BLOCK_N], of which TILES are computed.

    The tiles are adjacent in the output: a width like 384 is no power of two, so it cannot be one tile. x and weight
    are pointers, or descriptors of blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K].
    """
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    third = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for inner in range(0, num_inner, BLOCK_K):
        rows = _load_tile(x, row, inner, num_rows, num_inner, stride_x, BLOCK_M, BLOCK_K, DESCRIPTORS)
        cols = _load_tile(weight, col, inner, num_cols, num_inner, stride_weight, BLOCK_N, BLOCK_K, DESCRIPTORS)
        first = dot(rows, cols.T, first, PRECISION)
        if TILES > 1:
            cols = _load_tile(
                weight, col + BLOCK_N, inner, num_cols, num_inner, stride_weight, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            second = dot(rows, cols.T, second, PRECISION)
        if TILES > 2:
            cols = _load_tile(
                weight, col + 2 * BLOCK_N, inner, num_cols, num_inner, stride_weight, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            third = dot(rows, cols.T, third, PRECISION)
    return first, second, third


def reads_by_descriptors(config: GemmConfig, x: TensorSpec, *weights: TensorSpec) -> bool:
    """Return True if the main loop reads x [T, K] and weights [N, K] through host descriptors, False for pointers.

    Descriptors are used if they are configured and TMA can address all operands. Since they are built on the host, they
    need no device memory. Raises TypeError for a weight of another dtype than x.
    """
    for weight in weights:
        if weight.dtype != x.dtype:
            raise TypeError(f"the input is {x.dtype} and a weight {weight.dtype}: a GEMM needs one dtype")
    return config.descriptors and all(map(addressable_by_tma, (x, *weights)))


def main_loop_blocks(config: GemmConfig, block_n: int, descriptors: bool) -> tuple[list[int] | None, list[int] | None]:
    """Return the block shapes of the descriptors of x and of a weight, or None for both without descriptors."""
    return ([config.BLOCK_M, config.BLOCK_K], [block_n, config.BLOCK_K]) if descriptors else (None, None)


def main_loop_constants(config: GemmConfig, block_n: int, unit: int, precision: str, descriptors: bool) -> dict:
    """Return the constants and launch options of a kernel that calls `matmul_tiles`."""
    return {
        "UNIT": unit,
        "PRECISION": precision,
        "DESCRIPTORS": descriptors,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": block_n,
        "BLOCK_K": config.BLOCK_K,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
