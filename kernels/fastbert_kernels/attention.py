"""softmax(scale Q K^T) V of every head within every packed sequence, non-causal: [T, 3, H, D] -> [T, H D].

A program takes BLOCK_M queries of one head of one sequence and goes once over the sequence's keys with the online
softmax (Milakov and Gimelshein 2018; Dao et al. 2022), so there is no S x S matrix. Scores, their maximum and sum, and
the output are float32. Probabilities are rounded to the dtype before the product with V. exp2 replaces exp, with
log2(e) folded into the scale. Scaling and the subtraction of the maximum are one instruction. Sequences may have any
length, heads up to 128 elements. Programs of a sequence without tokens return at once.

For the backward, log2 of the sum of each query's exponentials is stored too, from which probabilities are computed
again (Dao 2023).
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.configs import AttentionConfig, choose
from fastbert_kernels.dropout import Dropout, check_seed, dropout_constants, keep_mask
from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.limits import MAX_HEAD_SIZE
from fastbert_kernels.matmul import dot
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    check_shape,
    have_unit_strides,
    shape_of,
    spec_of,
    with_unit_stride,
)
from fastbert_kernels.target import architecture, dot_precision, torch_precision

SHORT = 64  # tokens: sequences up to this length leave half of a block of 128 queries idle
LOG2_E = 1.4426950408889634
SMALLEST = 2.0**-126  # float32's smallest normal number


@triton.jit
def bounds_of(cu_seqlens_ptr, sequence, num_tokens):
    """The first row and the length of a sequence. With any values, they select only rows of the buffer, or none."""
    start = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0)
    end = tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), 0)
    return start, tl.minimum(end, num_tokens) - start


@triton.jit(
    do_not_specialize=["num_heads", "query_blocks", "num_tokens", "threshold"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "lse_ptr"],
)
def _attention_fwd_kernel(
    qkv_ptr,  # [T, 3, H, D]
    cu_seqlens_ptr,  # int32 [N + 1]
    seed_ptr,  # int64 [1] or None
    out_ptr,  # [T, H, D]
    lse_ptr,  # float32 [H, T] or None
    stride_qkv_token,
    stride_qkv_part,
    stride_qkv_head,
    num_heads,
    query_blocks,
    num_tokens,
    scale_log2,
    threshold,
    keep_scale,
    SITE: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGATE: tl.constexpr,
    BRANCH: tl.constexpr,
):
    # Adjacent programs take heads of the same tokens: two heads of 32 elements share a cache line.
    head = tl.program_id(0) % num_heads
    block = tl.program_id(0) // num_heads
    start, length = bounds_of(cu_seqlens_ptr, block // query_blocks, num_tokens)
    first = block % query_blocks * BLOCK_M
    if first < length:
        offs_q = first + tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        offs_key = tl.arange(0, BLOCK_N)
        mask_d = (offs_d < HEAD_SIZE)[None, :]
        q_ptr = qkv_ptr + start.to(tl.int64) * stride_qkv_token + head.to(tl.int64) * stride_qkv_head
        k_ptr = q_ptr + stride_qkv_part
        v_ptr = k_ptr + stride_qkv_part
        mask_q = (offs_q < length)[:, None] & mask_d
        q = tl.load(q_ptr + offs_q.to(tl.int64)[:, None] * stride_qkv_token + offs_d[None, :], mask=mask_q, other=0.0)
        if NEGATE:
            q = (-q.to(tl.float32)).to(q.dtype)  # the interpreter cannot negate bfloat16
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        context = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for key in range(0, length, BLOCK_N):
            live = key + offs_key < length
            # Keys past the end are masked, not clamped: a key of the next sequence may be NaN, and 0 * NaN is NaN.
            places = (key + offs_key).to(tl.int64)[:, None] * stride_qkv_token + offs_d[None, :]
            mask = live[:, None] & mask_d
            if DROPOUT:
                keep = keep_mask(tl.load(seed_ptr), start + offs_q, key, head, SITE, threshold, BLOCK_N)
            k = tl.load(k_ptr + places, mask=mask, other=0.0)
            scores = dot(q, k.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            # Most blocks are full. A branch saves time only on sm_90: elsewhere it costs registers or shared memory.
            if key + BLOCK_N > length or not BRANCH:
                scores = tl.where(live[None, :], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
            weights = tl.exp2(scores * scale_log2 - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(weights, axis=1)
            if DROPOUT:
                weights = tl.where(keep, weights, 0.0)
            v = tl.load(v_ptr + places, mask=mask, other=0.0)
            context = dot(weights.to(v.dtype), v, context * shrink[:, None], PRECISION)
            row_max = new_max
        if lse_ptr is not None:
            lse_places = head.to(tl.int64) * num_tokens + start + offs_q
            tl.store(lse_ptr + lse_places, row_max + tl.log2(row_sum), mask=offs_q < length)
        context *= (keep_scale / row_sum)[:, None]
        out_places = ((start + offs_q).to(tl.int64)[:, None] * num_heads + head) * HEAD_SIZE + offs_d[None, :]
        tl.store(out_ptr + out_places, context.to(out_ptr.dtype.element_ty), mask=mask_q)


def check_qkv(operation: str, qkv: TensorSpec) -> tuple[int, int, int]:
    """Return T, H and D of qkv [T, 3, H, D]. Raises ValueError for another shape or an unsupported head size."""
    num_tokens, _, num_heads, head_size = shape_of(operation, "qkv", qkv, "T 3 H D")
    check_shape(operation, "qkv", qkv, num_tokens, 3, num_heads, head_size)
    if not 0 < head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"{operation}: head size {head_size} is not supported, only 1 to {MAX_HEAD_SIZE}")
    return num_tokens, num_heads, head_size


def check_programs(operation: str, programs: int) -> None:
    """Raise ValueError if a grid has 2^31 programs or more."""
    if programs >= 2**31:
        raise ValueError(
            f"{operation}: {programs} programs are not supported, only fewer than 2^31: use smaller batches"
        )


def with_dropout(config: AttentionConfig, qkv: TensorSpec, p: float) -> AttentionConfig:
    """Return the configuration for dropout, whose numbers take registers: half of the columns at a time.

    Large blocks of float32 keep their columns: the compiler spills more with half of them.
    """
    if p == 0 or (qkv.dtype == torch.float32 and config.BLOCK_M > 64):
        return config
    return replace(config, BLOCK_N=max(16, config.BLOCK_N // 2))


@cached_by_specs
def attention_launch(
    qkv: TensorSpec, cu_seqlens: TensorSpec, max_seqlen: int, scale: float, allowed: str | None,
    operation: str = "attention", seed: TensorSpec | None = None, p: float = 0.0, site: int = 0,
) -> CachedLaunch | None:  # fmt: skip
    """Prepare the launch, or return None if operands have to be copied first. allowed: see `dot_precision`.

    operation: "attention", or "attention_forward", whose launch also gets `lse_ptr`: another compiled kernel. seed, p
    and site: of `Dropout`.
    """
    check(operation, qkv, cu_seqlens)
    check_seed(operation, seed, qkv.device)
    num_tokens, num_heads, head_size = check_qkv(operation, qkv)
    if not have_unit_strides(qkv, cu_seqlens):
        return None
    config = choose("attention_short", qkv, head_size) if max_seqlen <= SHORT else None
    config = with_dropout(config or choose("attention", qkv, head_size), qkv, p)
    query_blocks = triton.cdiv(max_seqlen, config.BLOCK_M) if num_tokens else 0
    programs = (cu_seqlens.shape[0] - 1) * query_blocks * num_heads
    check_programs(operation, programs)
    return CachedLaunch(
        _attention_fwd_kernel,
        (programs,),
        qkv.device,
        {
            "stride_qkv_token": qkv.strides[0],
            "stride_qkv_part": qkv.strides[1],
            "stride_qkv_head": qkv.strides[2],
            "num_heads": num_heads,
            "query_blocks": query_blocks,
            "num_tokens": num_tokens,
            # Never zero: minus infinity times zero would be NaN.
            "scale_log2": max(abs(scale) * LOG2_E, SMALLEST),
            **dropout_constants(p, site),
            "HEAD_SIZE": head_size,
            "PRECISION": dot_precision(qkv.dtype, qkv.device, allowed),
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
            # The largest score stays the largest after scaling only if the scale is positive.
            "NEGATE": scale < 0,
            "BRANCH": architecture(qkv.device) == "sm_90",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """qkv [T, 3, H, D], cu_seqlens int32 [N + 1] on the device -> context [T, H D].

    max_seqlen: an upper bound of the lengths, known on the host. Rows from cu_seqlens[N] on are neither read nor
    written. Raises ValueError for a head size above 128 or for 2^31 programs (one for each head and block of queries),
    TypeError for an unsupported dtype.
    """
    launch = attention_launch(spec_of(qkv), spec_of(cu_seqlens), max_seqlen, scale, torch_precision(qkv))
    if launch is None:
        return attention(with_unit_stride(qkv), with_unit_stride(cu_seqlens), max_seqlen, scale)
    out = qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])
    launch(qkv_ptr=qkv, cu_seqlens_ptr=cu_seqlens, seed_ptr=None, out_ptr=out, lse_ptr=None)
    return out


def attention_forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout: Dropout | None = None,
    clear_tail: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention for training: arguments as in `attention` -> the context [T, H D], and lse.

    Without dropout the context is bitwise equal to that of `attention`. Dropout zeroes probabilities: its rows are rows
    of qkv, its columns places of keys in their sequence, its planes heads. lse, float32 [H, T], is log2 of the sum over
    a query's keys of exp(scale q k). Rows from cu_seqlens[N] on are neither read nor written, or zero in the context if
    clear_tail. Raises ValueError and TypeError as `attention` does, and ValueError for a probability outside of 0 to 1.
    """
    p, seed, site = dropout or (0.0, None, 0)
    launch = attention_launch(
        spec_of(qkv), spec_of(cu_seqlens), max_seqlen, scale, torch_precision(qkv), "attention_forward", spec_of(seed),
        p, site,
    )  # fmt: skip
    if launch is None:
        return attention_forward(
            with_unit_stride(qkv), with_unit_stride(cu_seqlens), max_seqlen, scale, dropout, clear_tail
        )
    num_tokens, _, num_heads, head_size = qkv.shape
    out = (qkv.new_zeros if clear_tail else qkv.new_empty)(num_tokens, num_heads * head_size)
    lse = qkv.new_empty(num_heads, num_tokens, dtype=torch.float32)
    launch(qkv_ptr=qkv, cu_seqlens_ptr=cu_seqlens, seed_ptr=seed, out_ptr=out, lse_ptr=lse)
    return out, lse
