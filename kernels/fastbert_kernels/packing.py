"""The packing plan of a padded batch [B, S], and unpacking, both on the device.

The number of kept tokens stays on the device: buffers have B * S rows, and rows past the count belong to no token.
Prefix sums as in ByteTransformer (Zhai et al. 2022): one launch counts the tokens of each row. In the second launch
each program sums the counts of the rows before its own and writes indices, so no program waits for another.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    check_shape,
    common_unit,
    have_unit_strides,
    live_tokens,
    row_blocks,
    row_stride,
    spec_of,
)

BLOCK = 1024


@triton.jit(do_not_specialize=["stride_row", "seq_len"], do_not_specialize_on_alignment=["mask_ptr"])
def _row_lengths_kernel(
    mask_ptr,  # [B, S]
    lengths_ptr,  # int32 [B]
    stride_row,
    stride_column,
    seq_len,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kept = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, seq_len, BLOCK):
        offs_s = start + tl.arange(0, BLOCK)
        values = tl.load(
            mask_ptr + row * stride_row + offs_s.to(tl.int64) * stride_column, mask=offs_s < seq_len, other=0
        )
        kept += (values != 0).to(tl.int32)
    tl.store(lengths_ptr + row, tl.sum(kept, axis=0))


@triton.jit(do_not_specialize=["stride_row", "seq_len"], do_not_specialize_on_alignment=["mask_ptr", "cu_seqlens_ptr"])
def _packing_plan_kernel(
    mask_ptr,  # [B, S]
    lengths_ptr,  # int32 [B]
    indices_ptr,  # int64 [B * S]
    cu_seqlens_ptr,  # int32 [B + 1]
    stride_row,
    stride_column,
    seq_len,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_places = tl.num_programs(0).to(tl.int64) * seq_len
    before = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, tl.program_id(0), BLOCK):
        offs_b = start + tl.arange(0, BLOCK)
        before += tl.load(lengths_ptr + offs_b, mask=offs_b < tl.program_id(0), other=0).to(tl.int64)
    kept = tl.sum(before, axis=0)
    if row == 0:
        tl.store(cu_seqlens_ptr, 0)
    for start in range(0, seq_len, BLOCK):
        offs_s = start + tl.arange(0, BLOCK)
        inside = offs_s < seq_len
        values = tl.load(mask_ptr + row * stride_row + offs_s.to(tl.int64) * stride_column, mask=inside, other=0)
        keep = inside & (values != 0)
        count = tl.cumsum(keep.to(tl.int32), axis=0)
        place = row * seq_len + offs_s
        tl.store(indices_ptr + kept + count - 1, place, mask=keep)
        # The n-th dropped place of the batch becomes the n-th entry from the end.
        dropped = place - (kept + count)
        tl.store(indices_ptr + num_places - 1 - dropped, place, mask=inside & (values == 0))
        kept += tl.sum(keep.to(tl.int32), axis=0)
    tl.store(cu_seqlens_ptr + row + 1, kept.to(tl.int32))


@cached_by_specs
def _packing_plan_launches(mask: TensorSpec) -> tuple[CachedLaunch, CachedLaunch]:
    """Prepare the launch that counts each row's tokens and the one that writes the plan."""
    if len(mask.shape) != 2 or math.prod(mask.shape) >= 2**31:
        raise ValueError(f"packing_plan: mask is {list(mask.shape)}, expected [B, S] with fewer than 2^31 places")
    batch_size, seq_len = mask.shape
    row, column = mask.strides
    constants = {"stride_row": row, "stride_column": column, "seq_len": seq_len, "BLOCK": BLOCK}
    grid = (batch_size if seq_len else 0,)
    return (
        CachedLaunch(_row_lengths_kernel, grid, mask.device, constants),
        CachedLaunch(_packing_plan_kernel, grid, mask.device, constants),
    )


def packing_plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask [B, S] of bool, integers or floats, zero for padding -> indices int64 [B * S], cu_seqlens int32 [B + 1].

    indices is a permutation of the places of the flattened batch: the kept ones in order, then the others. cu_seqlens
    has the bounds of each row's tokens; its last entry is the number of kept tokens. Raises ValueError for a mask that
    is not [B, S] or has 2^31 places or more.
    """
    count, fill = _packing_plan_launches(spec_of(mask))
    batch_size, size = mask.shape[0], mask.numel()
    indices = torch.empty(size, dtype=torch.int64, device=mask.device)
    if size == 0:
        return indices, torch.zeros(batch_size + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens = torch.empty(batch_size + 1, dtype=torch.int32, device=mask.device)
    lengths = cu_seqlens  # a placeholder: with a single row, lengths is not read
    if batch_size > 1:
        lengths = torch.empty(batch_size, dtype=torch.int32, device=mask.device)
        count(mask_ptr=mask, lengths_ptr=lengths)
    fill(mask_ptr=mask, lengths_ptr=lengths, indices_ptr=indices, cu_seqlens_ptr=cu_seqlens)
    return indices, cu_seqlens


@triton.jit(
    do_not_specialize=["num_tokens", "num_places"],
    do_not_specialize_on_alignment=["indices_ptr", "num_tokens_ptr"],
)
def _unpack_kernel(
    hidden_ptr,  # [T, E]
    indices_ptr,  # int64 [T]
    out_ptr,  # [B * S, E]
    num_tokens_ptr,  # int32 [1] or None
    stride_hidden,  # in UNITs, as the width
    num_tokens,
    num_places,
    width,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    width *= UNIT
    count = live_tokens(num_tokens_ptr, num_tokens)
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = tl.load(indices_ptr + token, mask=token < num_tokens, other=num_places)
    inside = (place >= 0) & (place < num_places)
    for start in range(0, width, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask_e = (offs_e < width)[None, :]
        # Rows past the count are not read. Their places get zeros.
        rows = tl.load(
            hidden_ptr + token[:, None] * (stride_hidden * UNIT) + offs_e[None, :],
            mask=(token < count)[:, None] & mask_e,
            other=0.0,
        )
        tl.store(out_ptr + place[:, None] * width + offs_e[None, :], rows, mask=inside[:, None] & mask_e)


@cached_by_specs
def _unpack_launch(
    hidden: TensorSpec, indices: TensorSpec, num_tokens: TensorSpec | None, batch_size: int, seq_len: int
) -> CachedLaunch | None:
    """Prepare the launch, or return None if operands have to be copied first."""
    check("unpack", hidden, indices, num_tokens)
    size, num_places = hidden.shape[0], batch_size * seq_len
    check_shape("unpack", "indices", indices, size)
    # Other layouts are copied to [T, width].
    if len(hidden.shape) != 2 or not have_unit_strides(hidden, indices):
        return None
    width, blocks = hidden.shape[1], row_blocks(min(hidden.shape[1], BLOCK))
    unit = common_unit(hidden, row_stride(hidden), width)
    return CachedLaunch(
        _unpack_kernel,
        (triton.cdiv(size, blocks["BLOCK_ROWS"]) if num_places and width else 0,),
        hidden.device,
        {
            "stride_hidden": row_stride(hidden) // unit,
            "num_tokens": size,
            "num_places": num_places,
            "width": width // unit,
            "UNIT": unit,
            **blocks,
        },
    )


def unpack(
    hidden: Tensor, indices: Tensor | None, batch_size: int, seq_len: int, num_tokens: Tensor | None = None
) -> Tensor:
    """Scatter the rows of hidden [T, ...] to their places in [B, S, ...], with zeros elsewhere.

    indices int64 [T]: the place of each row in the flattened batch, without duplicates. None means that no token was
    dropped; the result is a view of hidden. num_tokens int32 [1] on the device: the places of rows from index
    num_tokens on get zeros. Raises ValueError or TypeError for invalid shapes, dtypes or devices.
    """
    if indices is None:
        return hidden.unflatten(0, (batch_size, seq_len))
    launch = _unpack_launch(spec_of(hidden), spec_of(indices), spec_of(num_tokens), batch_size, seq_len)
    if launch is None:
        rows = hidden.reshape(hidden.shape[0], math.prod(hidden.shape[1:])).contiguous()
        unpacked = unpack(rows, indices.contiguous(), batch_size, seq_len, num_tokens)
        return unpacked.view(batch_size, seq_len, *hidden.shape[1:])
    # With T = B * S, indices is a permutation, so every place is written.
    new = hidden.new_empty if hidden.shape[0] == batch_size * seq_len else hidden.new_zeros
    out = new(batch_size, seq_len, hidden.shape[1])
    launch(hidden_ptr=hidden, indices_ptr=indices, out_ptr=out, num_tokens_ptr=num_tokens)
    return out
