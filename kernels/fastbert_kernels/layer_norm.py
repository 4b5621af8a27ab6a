"""LayerNorm of whole rows (Ba et al. 2016): (x - mean) / sqrt(variance + eps) * weight + bias.

Statistics are float32, the variance is biased, and the row stays in registers for all passes. The mean is corrected by
the mean of the differences from it: the rounded mean of equal elements may differ from the element, the corrected one
does not. So a row without variance gives exactly the bias, as in PyTorch. Limit: rows of at most 16384 elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.limits import MAX_ROW
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    check_shape,
    common_unit,
    live_tokens,
    row_blocks,
    row_stride,
    shape_of,
    spec_of,
    spec_of_new,
    with_unit_stride,
)


@triton.jit
def center_rows(rows, mask, width, eps):
    """rows float32 [R, E], zero outside the mask -> the rows minus their mean [R, E], and 1 / deviation [R, 1]."""
    mean = tl.sum(rows, axis=1) / width
    mean += tl.sum(tl.where(mask, rows - mean[:, None], 0.0), axis=1) / width
    centered = tl.where(mask, rows - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, axis=1) / width
    return centered, tl.rsqrt(variance + eps)[:, None]


@triton.jit
def normalize_rows(rows, mask, width, weight, bias, eps):
    """rows float32 [R, E], zero outside the mask (which broadcasts to [R, E]); weight and bias [1, E] -> [R, E]."""
    centered, rstd = center_rows(rows, mask, width, eps)
    return centered * rstd * weight + bias


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["num_tokens_ptr"])
def _layer_norm_kernel(
    x_ptr,  # [T, E]
    norm_weight_ptr,  # [E]
    norm_bias_ptr,  # [E]
    out_ptr,  # [T, E], may be x
    num_tokens_ptr,  # int32 [1] or None
    stride_x,  # in UNITs, like every stride and width
    stride_out,
    num_tokens,
    width,
    eps,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    width *= UNIT
    count = live_tokens(num_tokens_ptr, num_tokens)
    start = tl.program_id(0) * BLOCK_ROWS
    if start < count:
        offs_t = start + tl.arange(0, BLOCK_ROWS)
        offs_e = tl.arange(0, BLOCK_E)
        mask_e = (offs_e < width)[None, :]
        mask = (offs_t < count)[:, None] & mask_e
        offs_t = offs_t.to(tl.int64)[:, None]
        rows = tl.load(x_ptr + offs_t * (stride_x * UNIT) + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(norm_weight_ptr + offs_e, mask=offs_e < width, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(norm_bias_ptr + offs_e, mask=offs_e < width, other=0.0).to(tl.float32)[None, :]
        rows = normalize_rows(rows, mask_e, width, weight, bias, eps)
        places = offs_t * (stride_out * UNIT) + offs_e[None, :]
        tl.store(out_ptr + places, rows.to(out_ptr.dtype.element_ty), mask=mask)


@cached_by_specs
def layer_norm_launch(
    x: TensorSpec, weight: TensorSpec, bias: TensorSpec, out: TensorSpec, num_tokens: TensorSpec | None, eps: float
) -> CachedLaunch:
    """Prepare LayerNorm of the rows of x [T, E] into out [T, E], which may be x. weight and bias [E] are contiguous."""
    check("layer_norm", x, weight, bias, num_tokens)
    size, width = shape_of("layer_norm", "x", x, "T E")
    check_shape("layer_norm", "weight", weight, width)
    check_shape("layer_norm", "bias", bias, width)
    if width > MAX_ROW:
        raise ValueError(f"layer_norm: rows of {width} elements are longer than {MAX_ROW}")
    blocks = row_blocks(width)
    unit = common_unit(x, row_stride(x), row_stride(out), width)
    return CachedLaunch(
        _layer_norm_kernel,
        (triton.cdiv(size, blocks["BLOCK_ROWS"]) if width else 0,),
        x.device,
        {
            "stride_x": row_stride(x) // unit,
            "stride_out": row_stride(out) // unit,
            "num_tokens": size,
            "width": width // unit,
            "eps": eps,
            "UNIT": unit,
            **blocks,
        },
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm of the rows of x [T, E], with weight and bias [E] -> [T, E] in dtype, or in x's if that is None.

    Raises ValueError for invalid shapes or devices and for E above 16384, TypeError for an unsupported dtype.
    """
    x, weight, bias = map(with_unit_stride, (x, weight, bias))
    new = spec_of_new(*x.shape, dtype=dtype or x.dtype, device=x.device)
    launch = layer_norm_launch(spec_of(x), spec_of(weight), spec_of(bias), tuple(new), None, eps)
    out = x.new_empty(x.shape, dtype=dtype)
    launch(x_ptr=x, norm_weight_ptr=weight, norm_bias_ptr=bias, out_ptr=out, num_tokens_ptr=None)
    return out
