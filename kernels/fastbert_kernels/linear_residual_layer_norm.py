"""LayerNorm(x W^T + b + residual): x [T, K], W [E, K], residual [T, E] -> [T, E] in the residual's dtype.

It is one launch if the device's configurations have an entry for E: in 16 bits up to E = 384, where a program holds
whole rows in three accumulators of 128 columns and the sum before LayerNorm never leaves the chip. For 768 columns and
more, and in float32 with its three products, the accumulators would spill. Otherwise a GEMM with bias and residual in
its epilogue writes the sum, rounded as in eager PyTorch, and a second launch normalizes it in place. The choice depends
on E, the dtype and the device only, so that a row's result does not depend on the batch.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.configs import choose
from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.layer_norm import layer_norm_launch
from fastbert_kernels.limits import MAX_ROW
from fastbert_kernels.linear_activation import linear_launch
from fastbert_kernels.matmul import main_loop_blocks, main_loop_constants, matmul_tiles, reads_by_descriptors
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    check_shape,
    common_unit,
    have_unit_strides,
    live_tokens,
    row_stride,
    shape_of,
    spec_of,
    spec_of_new,
    with_unit_stride,
)
from fastbert_kernels.target import dot_precision, num_sms, torch_precision


@triton.jit
def _plus_bias_and_residual(
    tile, col, offs_t, count, bias_ptr, residual_ptr, stride_residual, width, BLOCK_N: tl.constexpr
):
    """Return the accumulator [T, N] for columns from col on plus bias and residual, with zeros past the width."""
    offs_n = col + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    mask = (offs_t < count) & mask_n[None, :]
    tile += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    residual = tl.load(residual_ptr + offs_t * stride_residual + offs_n[None, :], mask=mask, other=0.0)
    return tl.where(mask_n[None, :], tile + residual.to(tl.float32), 0.0)


@triton.jit
def _centered(tile, col, mean, width, BLOCK_N: tl.constexpr):
    return tl.where((col + tl.arange(0, BLOCK_N) < width)[None, :], tile - mean[:, None], 0.0)


@triton.jit
def _store_normalized(
    tile, col, offs_t, count, rstd, norm_weight_ptr, norm_bias_ptr, out_ptr, stride_out, width, BLOCK_N: tl.constexpr
):
    offs_n = col + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    weight = tl.load(norm_weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(norm_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    normalized = (tile * rstd[:, None] * weight + bias).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_t * stride_out + offs_n[None, :], normalized, mask=(offs_t < count) & mask_n[None, :])


@triton.jit(
    do_not_specialize=["stride_x", "stride_weight", "stride_residual", "stride_out", "num_tokens"],
    do_not_specialize_on_alignment=["num_tokens_ptr"],
)
def _linear_residual_layer_norm_kernel(
    x,  # [T, K], pointer or descriptor
    weight,  # [E, K], pointer or descriptor
    bias_ptr,  # [E]
    residual_ptr,  # [T, E]
    norm_weight_ptr,  # [E]
    norm_bias_ptr,  # [E]
    out_ptr,  # [T, E]
    num_tokens_ptr,  # int32 [1] or None
    stride_x,  # in UNITs, like every stride and width
    stride_weight,
    stride_residual,
    stride_out,
    num_tokens,
    width,
    num_inputs,
    eps,
    TILES: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    width *= UNIT
    num_inputs *= UNIT
    stride_residual *= UNIT
    stride_out *= UNIT
    count = live_tokens(num_tokens_ptr, num_tokens)
    # disable_licm: see linear_activation.
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_M), tl.num_programs(0), disable_licm=True):
        row = tile * BLOCK_M
        first, second, third = matmul_tiles(
            x, weight, row, 0, count, width, num_inputs, stride_x * UNIT, stride_weight * UNIT,
            BLOCK_M, BLOCK_N, BLOCK_K, TILES, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        offs_t = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        first = _plus_bias_and_residual(
            first, 0, offs_t, count, bias_ptr, residual_ptr, stride_residual, width, BLOCK_N
        )
        total = tl.sum(first, axis=1)
        if TILES > 1:
            second = _plus_bias_and_residual(
                second, BLOCK_N, offs_t, count, bias_ptr, residual_ptr, stride_residual, width, BLOCK_N
            )
            total += tl.sum(second, axis=1)
        if TILES > 2:
            third = _plus_bias_and_residual(
                third, 2 * BLOCK_N, offs_t, count, bias_ptr, residual_ptr, stride_residual, width, BLOCK_N
            )
            total += tl.sum(third, axis=1)
        mean = total / width
        rest = tl.sum(_centered(first, 0, mean, width, BLOCK_N), axis=1)
        if TILES > 1:
            rest += tl.sum(_centered(second, BLOCK_N, mean, width, BLOCK_N), axis=1)
        if TILES > 2:
            rest += tl.sum(_centered(third, 2 * BLOCK_N, mean, width, BLOCK_N), axis=1)
        mean += rest / width  # the correction of layer_norm
        first = _centered(first, 0, mean, width, BLOCK_N)
        squares = tl.sum(first * first, axis=1)
        if TILES > 1:
            second = _centered(second, BLOCK_N, mean, width, BLOCK_N)
            squares += tl.sum(second * second, axis=1)
        if TILES > 2:
            third = _centered(third, 2 * BLOCK_N, mean, width, BLOCK_N)
            squares += tl.sum(third * third, axis=1)
        rstd = tl.rsqrt(squares / width + eps)
        _store_normalized(
            first, 0, offs_t, count, rstd, norm_weight_ptr, norm_bias_ptr, out_ptr, stride_out, width, BLOCK_N
        )
        if TILES > 1:
            _store_normalized(
                second, BLOCK_N, offs_t, count, rstd, norm_weight_ptr, norm_bias_ptr, out_ptr, stride_out, width,
                BLOCK_N,
            )  # fmt: skip
        if TILES > 2:
            _store_normalized(
                third, 2 * BLOCK_N, offs_t, count, rstd, norm_weight_ptr, norm_bias_ptr, out_ptr, stride_out, width,
                BLOCK_N,
            )  # fmt: skip


class Launches(NamedTuple):
    """One launch, or two: the linear with the residual, and LayerNorm of its output."""

    linear: CachedLaunch
    layer_norm: CachedLaunch | None


@cached_by_specs
def linear_residual_layer_norm_launches(
    x: TensorSpec, weight: TensorSpec, bias: TensorSpec, residual: TensorSpec, norm_weight: TensorSpec,
    norm_bias: TensorSpec, num_tokens: TensorSpec | None, eps: float, allowed: str | None,
) -> Launches | None:  # fmt: skip
    """Prepare the launches, or return None if operands have to be copied first. allowed: see `dot_precision`."""
    operation = "linear_residual_layer_norm"
    check(operation, x, weight, bias, residual, norm_weight, norm_bias, num_tokens)
    (size, num_inputs), width = shape_of(operation, "x", x, "T K"), weight.shape[0]
    check_shape(operation, "weight", weight, width, num_inputs)
    check_shape(operation, "bias", bias, width)
    check_shape(operation, "residual", residual, size, width)
    check_shape(operation, "norm_weight", norm_weight, width)
    check_shape(operation, "norm_bias", norm_bias, width)
    if width > MAX_ROW:
        raise ValueError(f"{operation}: rows of {width} elements are longer than {MAX_ROW}")
    if not have_unit_strides(x, weight, bias, residual, norm_weight, norm_bias):
        return None
    config = choose(operation, x, width)
    if config is None:
        out = spec_of_new(size, width, dtype=residual.dtype, device=residual.device)
        return Launches(
            linear_launch("linear_residual", x, weight, bias, residual, num_tokens, "none", allowed),
            layer_norm_launch(out, norm_weight, norm_bias, out, num_tokens, eps),
        )
    block_n = min(config.BLOCK_N, max(16, triton.next_power_of_2(width)))
    descriptors = reads_by_descriptors(config, x, weight)
    block_x, block_weight = main_loop_blocks(config, block_n, descriptors)
    stride_x, stride_weight, stride_residual = row_stride(x), row_stride(weight), row_stride(residual)
    unit = common_unit(x, stride_x, stride_weight, stride_residual, width, num_inputs)
    whole = CachedLaunch(
        _linear_residual_layer_norm_kernel,
        (min(triton.cdiv(size, config.BLOCK_M), num_sms(x.device) * config.ctas_per_sm),),
        x.device,
        {
            "stride_x": stride_x // unit,
            "stride_weight": stride_weight // unit,
            "stride_residual": stride_residual // unit,
            "stride_out": width // unit,
            "num_tokens": size,
            "width": width // unit,
            "num_inputs": num_inputs // unit,
            "eps": eps,
            "TILES": triton.cdiv(width, block_n),
            **main_loop_constants(config, block_n, unit, dot_precision(x.dtype, x.device, allowed), descriptors),
        },
        {"x": block_x, "weight": block_weight},
    )
    return Launches(whole, None)


def linear_residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm(x W^T + b + residual): x [T, K], weight [E, K], bias [E], residual [T, E] -> [T, E].

    norm_weight and norm_bias [E]. num_tokens int32 [1] on the device: rows from index num_tokens on affect no other
    row, and are undefined in the output. Raises ValueError for invalid shapes or devices and E above 16384, TypeError
    for dtypes.
    """
    launches = linear_residual_layer_norm_launches(
        spec_of(x), spec_of(weight), spec_of(bias), spec_of(residual), spec_of(norm_weight), spec_of(norm_bias),
        spec_of(num_tokens), eps, torch_precision(x),
    )  # fmt: skip
    if launches is None:
        tensors = map(with_unit_stride, (x, weight, bias, residual, norm_weight, norm_bias))
        return linear_residual_layer_norm(*tensors, eps, num_tokens)
    out = residual.new_empty(residual.shape)
    operands = {"x": x, "weight": weight, "bias_ptr": bias, "residual_ptr": residual, "num_tokens_ptr": num_tokens}
    norm = {"norm_weight_ptr": norm_weight, "norm_bias_ptr": norm_bias}
    if launches.layer_norm is None:
        launches.linear(**operands, **norm, out_ptr=out)
    else:
        launches.linear(**operands, out=out)
        launches.layer_norm(x_ptr=out, **norm, out_ptr=out, num_tokens_ptr=num_tokens)
    return out
