"""activation(x W^T + b): x [T, K], W [N, K], b [N] -> [T, N], in float32, float16 or bfloat16.

One persistent launch: each program takes output tiles in turn, row by row of tiles, so that the programs that run at a
time read the same rows of x while all of W stays in the L2 cache. Bias, residual and activation happen in float32 on
the accumulator, before the only rounding. GELU: Hendrycks and Gimpel 2016.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.activation import ACTIVATIONS, activate
from fastbert_kernels.launch import (
    Layout,
    Plan,
    check,
    check_shape,
    choose,
    common_unit,
    epilogue_options,
    gemm_blocks,
    gemm_options,
    layout_of,
    num_processors,
    planned,
    precision,
    row_stride,
    shape_of,
    stored_block,
    through_descriptors,
    torch_precision,
    unit_strides,
    with_unit_stride,
)
from fastbert_kernels.layer_norm import live_tokens
from fastbert_kernels.matmul import matmul_tiles


@triton.jit
def _finish_part(
    part, row, col, count, num_outputs, bias_ptr, residual_ptr, stride_residual, out, first, stride_out,
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
    if STORE_DESCRIPTOR:
        # All rows of the buffer, also past the count: a loop that is flattened takes no condition.
        out.store([row, first + col], result.to(out.dtype))
    else:
        places = offs_t * stride_out + (first + offs_n)[None, :]
        tl.store(out + places, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish_tile(
    tile, row, col, count, num_outputs, bias_ptr, residual_ptr, stride_residual, out, first, stride_out,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, HALVES: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """activation(tile + bias + residual) to out[row :, first + col :], in float32 up to the store.

    One half of the columns after the other where HALVES: with the residual of a whole tile of 128 columns beside the
    accumulator, registers would leave room for one program on a multiprocessor instead of two.
    """
    BLOCK_T: tl.constexpr = tile.shape[0]
    BLOCK_N: tl.constexpr = tile.shape[1]
    if HALVES:
        halves = tl.split(tl.permute(tl.reshape(tile, (BLOCK_T, 2, BLOCK_N // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            _finish_part(
                halves[half], row, col + half * (BLOCK_N // 2), count, num_outputs, bias_ptr, residual_ptr,
                stride_residual, out, first, stride_out, ACTIVATION, EXACT, STORE_DESCRIPTOR,
            )  # fmt: skip
    else:
        _finish_part(
            tile, row, col, count, num_outputs, bias_ptr, residual_ptr, stride_residual, out, first,
            stride_out, ACTIVATION, EXACT, STORE_DESCRIPTOR,
        )  # fmt: skip


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
    BLOCK_T: tl.constexpr,
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
    tiles = tl.cdiv(count, BLOCK_T) * tiles_n
    # What an epilogue needs, hoisted out of this loop, would take registers from the main loop.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, disable_licm=True):
        row = tile // tiles_n * BLOCK_T
        col = tile % tiles_n * BLOCK_N
        result, _, _ = matmul_tiles(
            x, weight, row, col, count, num_outputs, num_inputs, stride_x * UNIT, stride_weight * UNIT,
            BLOCK_T, BLOCK_N, BLOCK_K, 1, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        finish_tile(
            result, row, col, count, num_outputs, bias_ptr, residual_ptr, stride_residual * UNIT, out, 0,
            stride_out * UNIT, ACTIVATION, EXACT, HALVES, STORE_DESCRIPTOR,
        )  # fmt: skip


@planned
def plan_linear(
    operation: str, x: Layout, weight: Layout, bias: Layout, residual: Layout | None, num_tokens: Layout | None,
    activation: str, wanted: str | None,
) -> Plan | None:  # fmt: skip
    check(operation, x, weight, bias, residual, num_tokens)
    (size, num_inputs), num_outputs = shape_of(operation, "x", x, "T K"), weight.shape[0]
    check_shape(operation, "weight", weight, num_outputs, num_inputs)
    check_shape(operation, "bias", bias, num_outputs)
    if not unit_strides(x, weight, bias, residual):
        return None
    config = choose(operation, x, size)
    descriptors = through_descriptors(config, x, weight)
    block_x, block_weight = gemm_blocks(config, config["BLOCK_N"], descriptors)
    out_dtype = (x if residual is None else residual).dtype
    block_out = stored_block(config, descriptors, out_dtype, num_outputs)
    tiles = triton.cdiv(size, config["BLOCK_T"]) * triton.cdiv(num_outputs, config["BLOCK_N"])
    stride_residual = 0 if residual is None else row_stride(residual)
    stride_x, stride_weight = row_stride(x), row_stride(weight)
    unit = common_unit(x, stride_x, stride_weight, stride_residual, num_outputs, num_inputs)
    return Plan(
        _linear_kernel,
        (min(tiles, num_processors(x.device) * config["programs"]),),
        x.device,
        {"x": block_x, "weight": block_weight}
        | {"bias_ptr": None, "residual_ptr": None, "out": block_out, "num_tokens_ptr": None},
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
            **gemm_options(config, config["BLOCK_N"], unit, precision(x, wanted), descriptors),
            **epilogue_options(config, block_out),
        },
    )


def linear(
    operation: str, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str,
    num_tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    """activation(x W^T + b + residual) -> [T, N] in the residual's dtype, or x's without one."""
    plan = plan_linear(
        operation, layout_of(x), layout_of(weight), layout_of(bias), layout_of(residual), layout_of(num_tokens),
        activation, torch_precision(x),
    )  # fmt: skip
    if plan is None:
        copied = map(with_unit_stride, (x, weight, bias, residual))
        return linear(operation, *copied, activation, num_tokens)
    out = (x if residual is None else residual).new_empty(x.shape[0], weight.shape[0])
    plan.launch(x, weight, bias, residual, out, num_tokens)
    return out


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, num_tokens: Tensor | None = None
) -> Tensor:
    """activation(x W^T + b): x [T, K], weight [N, K], bias [N] -> [T, N].

    activation: "gelu" (exact), "gelu_tanh", "relu", "tanh" or "none". num_tokens int32 [1], on the device: rows from it
    on change no other row, and hold anything in the output. Raises ValueError or TypeError for another activation,
    shape, dtype or device.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear_activation: activation {activation!r} is unknown; choose one of {ACTIVATIONS}")
    return linear("linear_activation", x, weight, bias, None, activation, num_tokens)
