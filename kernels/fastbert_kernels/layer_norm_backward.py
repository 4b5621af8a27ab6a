"""The gradients of y = LayerNorm(x) for x [T, E], with x = residual + dropout(linear) (Ba et al. 2016).

With n = (x - mean) / deviation, g = gradient of y, and means over the row:

    grad_x = (g weight - mean(g weight) - n mean(g weight n)) / deviation
    grad_linear = dropout(grad_x), with the zeros of the forward
    grad_weight = sum of g n, grad_bias = sum of g, grad_linear_bias = sum of grad_linear, over all rows

A program holds whole rows, from which it computes mean and deviation again: reading them would not be faster. It takes
every P-th block of rows and adds up its part of the three sums, in float32. The P parts are then summed in their order,
so two runs give the same bits. Rows past the token count add nothing and get zeros, because products take every row of
a buffer. Limit: rows of at most 4096 elements, for which the sums fit into registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.dropout import Dropout, check_seed, dropout_constants, keep_mask
from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.layer_norm import center_rows
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
from fastbert_kernels.target import num_sms

PROGRAMS_PER_SM = 4  # not measured: fewer would leave memory idle, more would write more partial sums


@triton.jit(
    do_not_specialize=["stride_grad", "stride_other", "stride_x", "num_tokens", "threshold"],
    do_not_specialize_on_alignment=["num_tokens_ptr"],
)
def _layer_norm_backward_kernel(
    grad_ptr,  # [T, E]
    other_ptr,  # [T, E] or None, the second summand of the gradient
    x_ptr,  # [T, E]
    weight_ptr,  # [E]
    seed_ptr,  # int64 [1] or None
    num_tokens_ptr,  # int32 [1] or None
    grad_x_ptr,  # [T, E]
    grad_linear_ptr,  # [T, E] or None if it is grad_x
    sums_ptr,  # float32 [P, 3, E]
    stride_grad,  # in UNITs, like every stride and width
    stride_other,
    stride_x,
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
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < width
    count = live_tokens(num_tokens_ptr, num_tokens)
    weight = tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((BLOCK_E,), tl.float32)
    grad_bias = tl.zeros((BLOCK_E,), tl.float32)
    grad_linear_bias = tl.zeros((BLOCK_E,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_ROWS), tl.num_programs(0)):
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (rows < num_tokens)[:, None] & mask_e[None, :]
        mask = (rows < count)[:, None] & mask_e[None, :]
        offs_t = rows.to(tl.int64)[:, None]
        if DROPOUT:
            keep = keep_mask(tl.load(seed_ptr), rows, 0, 0, SITE, threshold, BLOCK_E)
        x = tl.load(x_ptr + offs_t * (stride_x * UNIT) + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)
        places = offs_t * (stride_grad * UNIT) + offs_e[None, :]
        grad = tl.load(grad_ptr + places, mask=mask, other=0.0).to(tl.float32)
        if other_ptr is not None:
            places = offs_t * (stride_other * UNIT) + offs_e[None, :]
            grad += tl.load(other_ptr + places, mask=mask, other=0.0).to(tl.float32)
        centered, rstd = center_rows(x, mask, width, eps)
        normalized = tl.where(mask, centered * rstd, 0.0)  # without eps, rows past the end would be NaN
        weighted = grad * weight
        along = tl.sum(weighted * normalized, axis=1) / width
        mean = tl.sum(weighted, axis=1) / width
        grad_x = tl.where(mask, rstd * (weighted - mean[:, None] - normalized * along[:, None]), 0.0)
        grad_weight += tl.sum(grad * normalized, axis=0)
        grad_bias += tl.sum(grad, axis=0)
        places = offs_t * width + offs_e[None, :]
        tl.store(grad_x_ptr + places, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if DROPOUT:
            grad_x = tl.where(keep, grad_x * keep_scale, 0.0)
        grad_linear_bias += tl.sum(grad_x, axis=0)
        if grad_linear_ptr is not None:
            tl.store(grad_linear_ptr + places, grad_x.to(grad_linear_ptr.dtype.element_ty), mask=inside)
    sums_ptr += tl.program_id(0).to(tl.int64) * (3 * width) + offs_e
    tl.store(sums_ptr, grad_weight, mask=mask_e)
    tl.store(sums_ptr + width, grad_bias, mask=mask_e)
    tl.store(sums_ptr + 2 * width, grad_linear_bias, mask=mask_e)


@cached_by_specs
def _layer_norm_backward_launch(
    grad: TensorSpec, other: TensorSpec | None, x: TensorSpec, weight: TensorSpec, seed: TensorSpec | None,
    num_tokens: TensorSpec | None, linear_dtype: torch.dtype, eps: float, p: float, site: int,
) -> CachedLaunch | None:  # fmt: skip
    """Prepare the launch, or return None if operands have to be copied first. linear_dtype decides about a second
    gradient, so about the compiled kernel."""
    operation = "layer_norm_backward"
    check(operation, x, weight, grad, other, num_tokens)
    check_seed(operation, seed, x.device)
    size, width = shape_of(operation, "x", x, "T E")
    check_shape(operation, "grad", grad, size, width)
    if other is not None:
        check_shape(operation, "other", other, size, width)
    check_shape(operation, "weight", weight, width)
    if width > MAX_TRAINED_ROW:
        raise ValueError(f"{operation}: rows of {width} elements are longer than {MAX_TRAINED_ROW}")
    if not have_unit_strides(grad, other, x, weight):
        return None
    blocks = row_blocks(width)
    blocks["BLOCK_E"] = max(4, blocks["BLOCK_E"])  # dropout draws four columns at a time
    # The sums take registers that the forward has for rows.
    if blocks["BLOCK_ROWS"] > 2:
        blocks["BLOCK_ROWS"] //= 2
    if width > 2048:
        blocks["num_warps"] = 8
    strides = [row_stride(x), row_stride(grad), row_stride(other or x)]
    unit = common_unit(x, *strides, width)
    programs = min(triton.cdiv(size, blocks["BLOCK_ROWS"]), num_sms(x.device) * PROGRAMS_PER_SM)
    return CachedLaunch(
        _layer_norm_backward_kernel,
        (programs if width else 0,),
        x.device,
        {
            "stride_grad": strides[1] // unit,
            "stride_other": strides[2] // unit,
            "stride_x": strides[0] // unit,
            "num_tokens": size,
            "width": width // unit,
            "eps": eps,
            "UNIT": unit,
            **dropout_constants(p, site),
            **blocks,
        },
    )


class LayerNormGradients(NamedTuple):
    """x: the gradient [T, E] of LayerNorm's input, and of the residual, in the input's dtype; linear: of the linear, in
    its dtype, the same tensor if it is equal; sums: float32 [3, E] of LayerNorm's weight and bias and the linear's."""

    x: Tensor
    linear: Tensor
    sums: Tensor


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, other: Tensor | None = None,
    linear_dtype: torch.dtype | None = None, dropout: Dropout | None = None, num_tokens: Tensor | None = None,
) -> LayerNormGradients:  # fmt: skip
    """grad [T, E] of LayerNorm's output, LayerNorm's input x [T, E], its weight [E] -> gradients.

    other [T, E], in any dtype, is added to grad. linear_dtype: the linear's, if it is not x's. dropout: the forward's.
    num_tokens int32 [1] on the device: rows from index num_tokens on are not read, and their gradients are zero.
    Raises ValueError for invalid shapes, devices or probabilities and for E above 4096, TypeError for dtypes.
    """
    p, seed, site = dropout or (0.0, None, 0)
    linear_dtype = linear_dtype or x.dtype
    launch = _layer_norm_backward_launch(
        *map(spec_of, (grad, other, x, weight, seed, num_tokens)), linear_dtype, eps, p, site
    )
    if launch is None:
        grad, other, x, weight = map(with_unit_stride, (grad, other, x, weight))
        return layer_norm_backward(grad, x, weight, eps, other, linear_dtype, dropout, num_tokens)
    grad_x = x.new_empty(x.shape)
    grad_linear = x.new_empty(x.shape, dtype=linear_dtype) if linear_dtype != x.dtype or p > 0 else None
    sums = x.new_empty((*launch.grid, 3, x.shape[1]), dtype=torch.float32)
    launch(
        grad_ptr=grad, other_ptr=other, x_ptr=x, weight_ptr=weight, seed_ptr=seed,
        num_tokens_ptr=num_tokens, grad_x_ptr=grad_x, grad_linear_ptr=grad_linear, sums_ptr=sums,
    )  # fmt: skip
    return LayerNormGradients(grad_x, grad_x if grad_linear is None else grad_linear, sums.sum(0))
