"""LayerNorm(dropout(x) + residual) for training: x, residual [T, E] -> [T, E], and the sum before LayerNorm.

The sum is rounded to its dtype before LayerNorm, so `layer_norm` of the stored sum gives the same bits again. LayerNorm
is that of `layer_norm` (Ba et al. 2016), dropout that of `dropout`. Rows past the token count get zeros, because the
products of a backward take every row of a buffer.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.dropout import Dropout, check_seed, dropout_constants, keep_mask
from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.layer_norm import normalize_rows
from fastbert_kernels.limits import MAX_TRAINED_ROW
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    check_shape,
    common_unit,
    have_unit_strides,
    live_tokens,
    row_blocks,
    row_stride,
    shape_of,
    spec_of,
    with_unit_stride,
)


@triton.jit(
    do_not_specialize=["stride_x", "stride_residual", "num_tokens", "threshold"],
    do_not_specialize_on_alignment=["num_tokens_ptr"],
)
def _residual_layer_norm_kernel(
    x_ptr,  # [T, E]
    residual_ptr,  # [T, E]
    weight_ptr,  # [E]
    bias_ptr,  # [E]
    seed_ptr,  # int64 [1] or None
    num_tokens_ptr,  # int32 [1] or None
    out_ptr,  # [T, E]
    narrow_ptr,  # [T, E] or None, the output in another dtype
    sum_ptr,  # [T, E]
    norm_ptr,  # float32 [2, E]
    stride_x,  # in UNITs, like every stride and width
    stride_residual,
    num_tokens,
    width,
    eps,
    threshold,
    keep_scale,
    SITE: tl.constexpr,
    DROPOUT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    width *= UNIT
    offs_t = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = (offs_e < width)[None, :]
    mask = (offs_t < num_tokens)[:, None] & mask_e
    live = (offs_t < live_tokens(num_tokens_ptr, num_tokens))[:, None] & mask_e
    places_t = offs_t.to(tl.int64)[:, None]
    rows = tl.load(x_ptr + places_t * (stride_x * UNIT) + offs_e[None, :], mask=live, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), offs_t, 0, 0, SITE, threshold, BLOCK_E)
        rows = tl.where(keep, rows * keep_scale, 0.0)
    places = places_t * (stride_residual * UNIT) + offs_e[None, :]
    rows += tl.load(residual_ptr + places, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_e, mask=offs_e < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_e, mask=offs_e < width, other=0.0).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(norm_ptr + offs_e, weight, mask=offs_e < width)
        tl.store(norm_ptr + width + offs_e, bias, mask=offs_e < width)
    places = places_t * width + offs_e[None, :]
    rounded = rows.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + places, rounded, mask=mask)
    rows = normalize_rows(rounded.to(tl.float32), mask_e, width, weight[None, :], bias[None, :], eps)
    if num_tokens_ptr is not None:
        rows = tl.where(live, rows, 0.0)
    tl.store(out_ptr + places, rows.to(out_ptr.dtype.element_ty), mask=mask)
    if narrow_ptr is not None:
        tl.store(narrow_ptr + places, rows.to(narrow_ptr.dtype.element_ty), mask=mask)


@cached_by_specs
def _residual_layer_norm_launch(
    x: TensorSpec, residual: TensorSpec, weight: TensorSpec, bias: TensorSpec, seed: TensorSpec | None,
    num_tokens: TensorSpec | None, eps: float, p: float, site: int,
) -> CachedLaunch | None:  # fmt: skip
    """Prepare the launch, or return None if operands have to be copied first."""
    operation = "residual_layer_norm"
    check(operation, x, residual, weight, bias, num_tokens)
    check_seed(operation, seed, x.device)
    size, width = shape_of(operation, "x", x, "T E")
    check_shape(operation, "residual", residual, size, width)
    check_shape(operation, "weight", weight, width)
    check_shape(operation, "bias", bias, width)
    if width > MAX_TRAINED_ROW:
        raise ValueError(f"{operation}: rows of {width} elements are longer than {MAX_TRAINED_ROW}")
    if not have_unit_strides(x, residual, weight, bias):
        return None
    blocks, stride_x, stride_residual = row_blocks(width), row_stride(x), row_stride(residual)
    blocks["BLOCK_E"] = max(4, blocks["BLOCK_E"])  # dropout draws four columns at a time
    unit = common_unit(x, stride_x, stride_residual, width)
    return CachedLaunch(
        _residual_layer_norm_kernel,
        (triton.cdiv(size, blocks["BLOCK_ROWS"]) if width else 0,),
        x.device,
        {
            "stride_x": stride_x // unit,
            "stride_residual": stride_residual // unit,
            "num_tokens": size,
            "width": width // unit,
            "eps": eps,
            "UNIT": unit,
            **dropout_constants(p, site),
            **blocks,
        },
    )


class NormalizedSum(NamedTuple):
    """out and summed [T, E] in the residual's dtype; narrow [T, E]: out in x's dtype, or out itself if equal; norm
    float32 [2, E]: weight and bias, to normalize summed again even if the parameters are gone, as after FSDP's forward.
    """

    out: Tensor
    narrow: Tensor
    summed: Tensor
    norm: Tensor


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: Dropout | None = None,
    num_tokens: Tensor | None = None,
) -> NormalizedSum:  # fmt: skip
    """LayerNorm(dropout(x) + residual), and dropout(x) + residual: x, residual [T, E]; weight, bias [E].

    num_tokens int32 [1] on the device: rows from index num_tokens on are not read, and are zero in all results.
    Raises ValueError for invalid shapes, devices or probabilities and for E above 4096, TypeError for dtypes.
    """
    p, seed, site = dropout or (0.0, None, 0)
    launch = _residual_layer_norm_launch(*map(spec_of, (x, residual, weight, bias, seed, num_tokens)), eps, p, site)
    if launch is None:
        return residual_layer_norm(*map(with_unit_stride, (x, residual, weight, bias)), eps, dropout, num_tokens)
    out, summed = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    narrow = None if x.dtype == residual.dtype else x.new_empty(x.shape)
    norm = x.new_empty(2, x.shape[1], dtype=torch.float32)
    launch(
        x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias, seed_ptr=seed,
        num_tokens_ptr=num_tokens, out_ptr=out, narrow_ptr=narrow, sum_ptr=summed, norm_ptr=norm,
    )  # fmt: skip
    return NormalizedSum(out, out if narrow is None else narrow, summed, norm)
