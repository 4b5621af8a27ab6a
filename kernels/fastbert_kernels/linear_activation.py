"""activation(x W^T + b): x [T, K], W [N, K], b [N] -> [T, N], in float32, float16 or bfloat16.

One persistent launch. Programs take output tiles in row-major order, so that those that run at the same time read the
same rows of x, and all of W stays in the L2 cache. Bias, residual and activation are applied to the float32
accumulator, before the only rounding. GELU: Hendrycks and Gimpel 2016.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.activation import ACTIVATIONS, activate
from fastbert_kernels.configs import GemmConfig, choose
from fastbert_kernels.launch import CachedLaunch, cached_by_specs
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
    with_unit_stride,
)
from fastbert_kernels.target import dot_precision, num_sms, torch_precision


@triton.jit
def _store_part(part, row, col, offs_t, offs_n, mask, out, first, stride_out, STORE_DESCRIPTOR: tl.constexpr):
    if STORE_DESCRIPTOR:
        # Stores rows past the count, too: a flattened loop must not have a condition here.
        out.store([row, first + col], part.to(out.dtype))
    else:
        places = offs_t * stride_out + (first + offs_n)[None, :]
        tl.store(out + places, part.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _finish_part(
    part, row, col, count, num_outputs, bias_ptr, residual_ptr, stride_residual, out, pre, first, stride_out,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    offs_t = (row + tl.arange(0, part.shape[0])).to(tl.int64)[:, None]
    offs_n = col + tl.arange(0, part.shape[1])
    mask_n = offs_n < num_outputs
    mask = (offs_t < count) & mask_n[None, :]
    part += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        places = offs_t * stride_residual + offs_n[None, :]
        part += tl.load(residual_ptr + places, mask=mask, other=0.0).to(tl.float32)
    result = activate(part, ACTIVATION, EXACT)
    _store_part(result, row, col, offs_t, offs_n, mask, out, first, stride_out, STORE_DESCRIPTOR)
    if pre is not None:
        # Stored before the result, it would take so many registers that one CTA fits on an SM of sm_80 instead of two.
        _store_part(part, row, col, offs_t, offs_n, mask, pre, first, stride_out, STORE_DESCRIPTOR)


@triton.jit
def finish_tile(
    tile, row, col, count, num_outputs, bias_ptr, residual_ptr, stride_residual, out, pre, first, stride_out,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, HALVES: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Store activation(tile + bias + residual) to out[row :, first + col :], computed in float32.

    pre: None, or an output like out for tile + bias + residual.
    With HALVES, one half of the columns is finished after the other. A whole residual tile of 128 columns beside the
    accumulator would need so many registers that one CTA fits on an SM instead of two.
    """
    BLOCK_M: tl.constexpr = tile.shape[0]
    BLOCK_N: tl.constexpr = tile.shape[1]
    if HALVES:
        halves = tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            _finish_part(
                halves[half], row, col + half * (BLOCK_N // 2), count, num_outputs, bias_ptr, residual_ptr,
                stride_residual, out, pre, first, stride_out, ACTIVATION, EXACT, STORE_DESCRIPTOR,
            )  # fmt: skip
    else:
        _finish_part(
            tile, row, col, count, num_outputs, bias_ptr, residual_ptr, stride_residual, out, pre, first,
            stride_out, ACTIVATION, EXACT, STORE_DESCRIPTOR,
        )  # fmt: skip


def stored_block(config: GemmConfig, descriptors: bool, dtype: torch.dtype, width: int) -> list[int] | None:
    """Return the block of a contiguous output [T, width] that `finish_tile` stores through a descriptor.

    Returns None for stores through pointers: if they are configured, or if TMA is missing or cannot address the rows.
    """
    if not (config.store_descriptor and descriptors) or width * dtype.itemsize % 16:
        return None
    return [config.BLOCK_M, config.BLOCK_N // (2 if config.halves else 1)]


def epilogue_constants(config: GemmConfig, block_out: list[int] | None) -> dict[str, bool]:
    """Return the constants for `finish_tile` of a kernel that ends in it."""
    return {"FLATTEN": config.flatten, "HALVES": config.halves, "STORE_DESCRIPTOR": block_out is not None}


@triton.jit(
    do_not_specialize=["stride_x", "stride_weight", "stride_residual", "stride_out", "num_tokens"],
    do_not_specialize_on_alignment=["num_tokens_ptr"],
)
def _linear_kernel(
    x,  # [T, K], pointer or descriptor
    weight,  # [N, K], pointer or descriptor
    bias_ptr,  # [N]
    residual_ptr,  # [T, N] or None
    out,  # [T, N], pointer or descriptor
    pre,  # [T, N], pointer or descriptor as out; None if only out is needed
    num_tokens_ptr,  # int32 [1] or None
    stride_x,  # in UNITs, like every stride and width
    stride_weight,
    stride_residual,
    stride_out,
    num_tokens,
    num_outputs,
    num_inputs,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    HALVES: tl.constexpr,
    STORE_DESCRIPTOR: tl.constexpr,
):
    num_outputs *= UNIT
    num_inputs *= UNIT
    count = live_tokens(num_tokens_ptr, num_tokens)
    tiles_n = tl.cdiv(num_outputs, BLOCK_N)
    tiles = tl.cdiv(count, BLOCK_M) * tiles_n
    # disable_licm: the epilogue's addresses, hoisted out of this loop, would take registers from the main loop.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, disable_licm=True):
        row = tile // tiles_n * BLOCK_M
        col = tile % tiles_n * BLOCK_N
        result, _, _ = matmul_tiles(
            x, weight, row, col, count, num_outputs, num_inputs, stride_x * UNIT, stride_weight * UNIT,
            BLOCK_M, BLOCK_N, BLOCK_K, 1, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        finish_tile(
            result, row, col, count, num_outputs, bias_ptr, residual_ptr, stride_residual * UNIT, out, pre, 0,
            stride_out * UNIT, ACTIVATION, EXACT, HALVES, STORE_DESCRIPTOR,
        )  # fmt: skip


@cached_by_specs
def linear_launch(
    operation: str, x: TensorSpec, weight: TensorSpec, bias: TensorSpec, residual: TensorSpec | None,
    num_tokens: TensorSpec | None, activation: str, allowed: str | None, with_pre: bool = False,
) -> CachedLaunch | None:  # fmt: skip
    """Prepare the launch, or return None if operands have to be copied first. allowed: see `dot_precision`.

    with_pre: the launch gets a second output `pre`, for the values before the activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operation}: activation {activation!r} is unknown; choose one of {ACTIVATIONS}")
    check(operation, x, weight, bias, residual, num_tokens)
    (size, num_inputs), num_outputs = shape_of(operation, "x", x, "T K"), weight.shape[0]
    check_shape(operation, "weight", weight, num_outputs, num_inputs)
    check_shape(operation, "bias", bias, num_outputs)
    if not have_unit_strides(x, weight, bias, residual):
        return None
    config = choose("linear_activation" if with_pre else operation, x, size)
    if with_pre and config.BLOCK_N >= 128:
        # Two whole tiles to store would take so many registers that one CTA fits on an SM of sm_90 instead of two.
        config = replace(config, halves=True)
    descriptors = reads_by_descriptors(config, x, weight)
    block_x, block_weight = main_loop_blocks(config, config.BLOCK_N, descriptors)
    out_dtype = (x if residual is None else residual).dtype
    block_out = stored_block(config, descriptors, out_dtype, num_outputs)
    tiles = triton.cdiv(size, config.BLOCK_M) * triton.cdiv(num_outputs, config.BLOCK_N)
    stride_residual = 0 if residual is None else row_stride(residual)
    stride_x, stride_weight = row_stride(x), row_stride(weight)
    unit = common_unit(x, stride_x, stride_weight, stride_residual, num_outputs, num_inputs)
    precision = dot_precision(x.dtype, x.device, allowed)
    return CachedLaunch(
        _linear_kernel,
        (min(tiles, num_sms(x.device) * config.ctas_per_sm),),
        x.device,
        {
            "stride_x": stride_x // unit,
            "stride_weight": stride_weight // unit,
            "stride_residual": stride_residual // unit,
            "stride_out": num_outputs // unit,
            "num_tokens": size,
            "num_outputs": num_outputs // unit,
            "num_inputs": num_inputs // unit,
            "ACTIVATION": activation,
            "EXACT": out_dtype == torch.float32,
            **main_loop_constants(config, config.BLOCK_N, unit, precision, descriptors),
            **epilogue_constants(config, block_out),
            **({} if with_pre else {"pre": None}),
        },
        {"x": block_x, "weight": block_weight, "out": block_out, **({"pre": block_out} if with_pre else {})},
    )


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, num_tokens: Tensor | None = None
) -> Tensor:
    """activation(x W^T + b): x [T, K], weight [N, K], bias [N] -> [T, N].

    activation: "gelu" (exact), "gelu_tanh", "relu", "tanh" or "none". num_tokens int32 [1] on the device: rows from
    index num_tokens on affect no other row, and are undefined in the output. Raises ValueError or TypeError for an
    unknown activation and invalid shapes, dtypes or devices.
    """
    launch = linear_launch(
        "linear_activation", spec_of(x), spec_of(weight), spec_of(bias), None, spec_of(num_tokens), activation,
        torch_precision(x),
    )  # fmt: skip
    if launch is None:
        return linear_activation(*map(with_unit_stride, (x, weight, bias)), activation, num_tokens)
    out = x.new_empty(x.shape[0], weight.shape[0])
    launch(x=x, weight=weight, bias_ptr=bias, residual_ptr=None, out=out, num_tokens_ptr=num_tokens)
    return out


def linear_activation_forward(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """x [T, K], weight [N, K], bias [N] -> activation(x W^T + b), as `linear_activation`, and x W^T + b, both [T, N].

    For training: the derivative of the activation needs its input. Both come from the same float32 accumulator, in one
    launch. With activation "none" they are equal. Raises as `linear_activation` does.
    """
    launch = linear_launch(
        "linear_activation_forward", spec_of(x), spec_of(weight), spec_of(bias), None, None, activation,
        torch_precision(x), True,
    )  # fmt: skip
    if launch is None:
        return linear_activation_forward(*map(with_unit_stride, (x, weight, bias)), activation)
    out, pre = (x.new_empty(x.shape[0], weight.shape[0]) for _ in range(2))
    launch(x=x, weight=weight, bias_ptr=bias, residual_ptr=None, out=out, pre=pre, num_tokens_ptr=None)
    return out, pre
