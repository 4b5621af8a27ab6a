"""x W_q^T + b_q, x W_k^T + b_k and x W_v^T + b_v in one launch: x [T, E], three W [E, E], three b [E] -> [T, 3, H, D].

The weights stay three tensors. Each output tile belongs to one of them and selects its pointer or descriptor. The
launch is persistent, with tiles in the order of `linear_activation`, so that x is read from memory once for all three.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.configs import choose
from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.linear_activation import epilogue_constants, finish_tile, stored_block
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


@triton.jit(
    do_not_specialize=["stride_x", "stride_weight", "num_tokens"], do_not_specialize_on_alignment=["num_tokens_ptr"]
)
def _qkv_projection_kernel(
    x,  # [T, K], pointer or descriptor, as are the weights
    q_weight,  # [E, K]
    k_weight,  # [E, K]
    v_weight,  # [E, K]
    q_bias_ptr,  # [E]
    k_bias_ptr,  # [E]
    v_bias_ptr,  # [E]
    out,  # [T, 3 E], pointer or descriptor
    num_tokens_ptr,  # int32 [1] or None
    stride_x,  # in UNITs, like every stride and width
    stride_weight,
    num_tokens,
    width,
    num_inputs,
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
    width *= UNIT
    num_inputs *= UNIT
    count = live_tokens(num_tokens_ptr, num_tokens)
    tiles_n = tl.cdiv(width, BLOCK_N)
    # disable_licm: see linear_activation.
    tiles = tl.cdiv(count, BLOCK_M) * tiles_n * 3
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, disable_licm=True):
        row = tile // (tiles_n * 3) * BLOCK_M
        part = tile // tiles_n % 3
        col = tile % tiles_n * BLOCK_N
        if DESCRIPTORS:
            # Use `if`: `tl.where` does not accept descriptors.
            weight = q_weight
            if part == 1:
                weight = k_weight
            elif part == 2:
                weight = v_weight
        else:
            # Use `tl.where`: Triton 3.6 for AMD does not compile pointers that an `if` chooses.
            weight = tl.where(part == 0, q_weight, tl.where(part == 1, k_weight, v_weight))
        bias_ptr = tl.where(part == 0, q_bias_ptr, tl.where(part == 1, k_bias_ptr, v_bias_ptr))
        result, _, _ = matmul_tiles(
            x, weight, row, col, count, width, num_inputs, stride_x * UNIT, stride_weight * UNIT,
            BLOCK_M, BLOCK_N, BLOCK_K, 1, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        finish_tile(
            result, row, col, count, width, bias_ptr, None, 0, out, None, part * width, 3 * width,
            "none", True, HALVES, STORE_DESCRIPTOR,
        )  # fmt: skip


@cached_by_specs
def qkv_projection_launch(
    x: TensorSpec, q_weight: TensorSpec, q_bias: TensorSpec, k_weight: TensorSpec, k_bias: TensorSpec,
    v_weight: TensorSpec, v_bias: TensorSpec, num_tokens: TensorSpec | None, num_heads: int, allowed: str | None,
) -> CachedLaunch | None:  # fmt: skip
    """Prepare the launch, or return None if operands have to be copied first. allowed: see `dot_precision`."""
    check("qkv_projection", x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_tokens)
    (size, num_inputs), width = shape_of("qkv_projection", "x", x, "T K"), q_weight.shape[0]
    for name, weight, bias in (("q", q_weight, q_bias), ("k", k_weight, k_bias), ("v", v_weight, v_bias)):
        check_shape("qkv_projection", f"{name}_weight", weight, width, num_inputs)
        check_shape("qkv_projection", f"{name}_bias", bias, width)
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"qkv_projection: a width of {width} cannot be cut into {num_heads} heads")
    stride_x, stride_weight = row_stride(x), row_stride(q_weight)
    unequal = {row_stride(k_weight), row_stride(v_weight)} != {stride_weight} and 0 not in q_weight.shape
    if unequal or not have_unit_strides(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias):
        return None
    config = choose("qkv_projection", x, size)
    descriptors = reads_by_descriptors(config, x, q_weight, k_weight, v_weight)
    block_x, block_weight = main_loop_blocks(config, config.BLOCK_N, descriptors)
    # A tile past the end of one part would overwrite the first columns of the next through a descriptor.
    fits = width % config.BLOCK_N == 0
    block_out = stored_block(config, descriptors, x.dtype, width) if fits else None
    tiles = triton.cdiv(size, config.BLOCK_M) * triton.cdiv(width, config.BLOCK_N) * 3
    unit = common_unit(x, stride_x, stride_weight, width, 3 * width, num_inputs)  # 3 * width: the output's stride
    precision = dot_precision(x.dtype, x.device, allowed)
    return CachedLaunch(
        _qkv_projection_kernel,
        (min(tiles, num_sms(x.device) * config.ctas_per_sm),),
        x.device,
        {
            "stride_x": stride_x // unit,
            "stride_weight": stride_weight // unit,
            "num_tokens": size,
            "width": width // unit,
            "num_inputs": num_inputs // unit,
            **main_loop_constants(config, config.BLOCK_N, unit, precision, descriptors),
            **epilogue_constants(config, block_out),
        },
        {"x": block_x, "q_weight": block_weight, "k_weight": block_weight, "v_weight": block_weight, "out": block_out},
    )


def qkv_projection(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor,
    num_heads: int, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, K], three weights [E, K] and biases [E] -> queries, keys and values [T, 3, H, D].

    num_tokens int32 [1] on the device: rows from index num_tokens on affect no other row, and are undefined in the
    output. Raises ValueError or TypeError for invalid shapes, dtypes or devices.
    """
    launch = qkv_projection_launch(
        spec_of(x), spec_of(q_weight), spec_of(q_bias), spec_of(k_weight), spec_of(k_bias),
        spec_of(v_weight), spec_of(v_bias), spec_of(num_tokens), num_heads, torch_precision(x),
    )  # fmt: skip
    if launch is None:
        # The kernel has one stride for all three weights, so weights with different strides are copied, too.
        weights = (tensor.contiguous() for tensor in (q_weight, q_bias, k_weight, k_bias, v_weight, v_bias))
        return qkv_projection(with_unit_stride(x), *weights, num_heads, num_tokens)
    width = q_weight.shape[0]
    out = x.new_empty(x.shape[0], 3 * width)
    launch(
        x=x, q_weight=q_weight, q_bias_ptr=q_bias, k_weight=k_weight, k_bias_ptr=k_bias, v_weight=v_weight,
        v_bias_ptr=v_bias, out=out, num_tokens_ptr=num_tokens,
    )  # fmt: skip
    return out.view(x.shape[0], 3, num_heads, width // num_heads)
