"""Pooling of packed tokens to one vector per sequence: the first token or the mean, optionally with L2 norm 1.

Sums and norms are float32. A sequence's tokens are added in order from its own start, so its vector does not depend on
the batch. The norm is at least 1e-12, as in torch.nn.functional.normalize. Limit: E of at most 16384.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.limits import MAX_ROW
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    common_unit,
    have_unit_strides,
    row_blocks,
    row_stride,
    shape_of,
    spec_of,
    with_unit_stride,
)

MODES = ("first", "mean")


@triton.jit(
    do_not_specialize=["num_tokens", "num_rows"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "indices_ptr"],
)
def _pool_kernel(
    hidden_ptr,  # [T, E], or [P, E] with indices into it
    cu_seqlens_ptr,  # int32 [N + 1]
    indices_ptr,  # int64 [T] or None
    out_ptr,  # [N, E]
    stride_hidden,  # in UNITs, as the width
    num_tokens,
    num_rows,
    width,
    UNIT: tl.constexpr,
    MEAN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    width *= UNIT
    sequence = tl.program_id(0).to(tl.int64)
    # cu_seqlens is not trusted: with any values, nothing is read past the buffers.
    start = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0).to(tl.int64)
    length = tl.maximum(tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_tokens) - start, 0)
    pooled_length = length
    if not MEAN:
        pooled_length = tl.minimum(length, 1)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < width
    pooled = tl.zeros((BLOCK_E,), tl.float32)
    for token in range(0, pooled_length, BLOCK_ROWS):
        offs_t = token + tl.arange(0, BLOCK_ROWS)
        live = offs_t < pooled_length
        rows = start + offs_t
        if indices_ptr is not None:
            rows = tl.load(indices_ptr + rows, mask=live, other=0)
            live = live & (rows >= 0) & (rows < num_rows)
        tile = tl.load(
            hidden_ptr + rows[:, None] * (stride_hidden * UNIT) + offs_e[None, :],
            mask=live[:, None] & mask_e[None, :],
            other=0.0,
        )
        pooled += tl.sum(tile.to(tl.float32), axis=0)
    pooled = pooled / tl.maximum(pooled_length, 1).to(tl.float32)
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(pooled * pooled, axis=0))
        pooled = pooled / tl.maximum(norm, 1e-12)
    tl.store(out_ptr + sequence * width + offs_e, pooled.to(out_ptr.dtype.element_ty), mask=mask_e)


@cached_by_specs
def _pool_launch(
    hidden: TensorSpec, cu_seqlens: TensorSpec, indices: TensorSpec | None, mode: str, normalize: bool
) -> CachedLaunch | None:
    """Prepare the launch, or return None if operands have to be copied first."""
    if mode not in MODES:
        raise ValueError(f"pool mode {mode!r} is unknown; choose 'first' or 'mean'")
    check("pool", hidden, cu_seqlens, indices)
    num_rows, width = shape_of("pool", "hidden", hidden, "T E")
    if width > MAX_ROW:
        raise ValueError(f"pool: rows of {width} elements are longer than {MAX_ROW}")
    if not have_unit_strides(hidden, cu_seqlens, indices):
        return None
    unit = common_unit(hidden, row_stride(hidden), width)
    return CachedLaunch(
        _pool_kernel,
        (cu_seqlens.shape[0] - 1 if width else 0,),
        hidden.device,
        {
            "stride_hidden": row_stride(hidden) // unit,
            "num_tokens": num_rows if indices is None else indices.shape[0],
            "num_rows": num_rows,
            "width": width // unit,
            "UNIT": unit,
            "MEAN": mode == "mean",
            "NORMALIZE": normalize,
            **row_blocks(width),
        },
    )


def pool(
    hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False, indices: Tensor | None = None
) -> Tensor:
    """hidden [T, E], cu_seqlens int32 [N + 1] on the device -> [N, E]. A sequence without tokens gives zeros.

    mode: "first" or "mean". indices int64 [T]: the rows of the tokens in hidden [P, E]; None if hidden is packed.
    Raises ValueError for another mode or E above 16384, TypeError for an unsupported dtype.
    """
    launch = _pool_launch(spec_of(hidden), spec_of(cu_seqlens), spec_of(indices), mode, normalize)
    if launch is None:
        hidden, cu_seqlens, indices = map(with_unit_stride, (hidden, cu_seqlens, indices))
        return pool(hidden, cu_seqlens, mode, normalize, indices)
    if hidden.shape[0] == 0:
        return hidden.new_zeros(cu_seqlens.shape[0] - 1, hidden.shape[1])
    out = hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1])
    launch(hidden_ptr=hidden, cu_seqlens_ptr=cu_seqlens, indices_ptr=indices, out_ptr=out)
    return out
