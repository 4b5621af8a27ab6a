"""The gradient of attention within every packed sequence: grad [T, H D] -> grad of qkv [T, 3, H, D].

FlashAttention-2's backward (Dao 2023, algorithm 2) in two launches, without atomics, so that the order of every sum is
fixed. Probabilities P are computed again from qkv and lse, the base-2 logarithm of each query's sum of exponentials.
With dP = grad V^T and delta = rowsum(grad * context), the gradient of the scores is dS = P (dP - delta).

1. A program takes BLOCK_M queries of one head, computes and stores their delta, and goes once over the sequence's keys:
   dQ = scale dS K. Further programs write zeros to the rows that belong to no sequence.
2. A program takes BLOCK_M keys and goes once over the sequence's queries: dV = P^T grad, dK = scale dS^T Q.

With dropout, P in dV and dP lose the elements that the forward zeroed, and are scaled as there. delta stays the same,
because the context already holds the dropout. Scores, probabilities, delta and all sums are float32. P and dS are
rounded to the dtype before their products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.attention import LOG2_E, bounds_of, check_programs, check_qkv, with_dropout
from fastbert_kernels.configs import choose
from fastbert_kernels.dropout import Dropout, check_seed, dropout_constants, keep_mask
from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.matmul import dot
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    check_shape,
    have_unit_strides,
    row_stride,
    spec_of,
    with_unit_stride,
)
from fastbert_kernels.target import dot_precision, torch_precision


@triton.jit
def _fill_tail(
    grad_qkv_ptr, cu_seqlens_ptr, block, num_sequences, num_heads, num_tokens,
    HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write zeros to BLOCK_M rows of the gradient that are in no sequence: those from cu_seqlens[N] on."""
    tail = tl.maximum(tl.load(cu_seqlens_ptr + num_sequences), 0).to(tl.int64)
    first = tail + block.to(tl.int64) * BLOCK_M
    if first < num_tokens:
        rows = first + tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        mask = (rows < num_tokens)[:, None] & (offs_d < HEAD_SIZE)[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_D), grad_qkv_ptr.dtype.element_ty)
        for head in range(3 * num_heads):
            places = (rows[:, None] * (3 * num_heads) + head) * HEAD_SIZE + offs_d[None, :]
            tl.store(grad_qkv_ptr + places, zeros, mask=mask)


@triton.jit(
    do_not_specialize=["stride_lse_head", "num_heads", "num_sequences", "blocks", "num_tokens", "threshold"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "lse_ptr", "delta_ptr"],
)
def _attention_bwd_dq_kernel(
    grad_ptr,  # [T, H D]
    qkv_ptr,  # [T, 3, H, D]
    context_ptr,  # [T, H D]
    lse_ptr,  # float32 [H, T]
    cu_seqlens_ptr,  # int32 [N + 1]
    seed_ptr,  # int64 [1] or None
    delta_ptr,  # float32 [H, T]
    grad_qkv_ptr,  # [T, 3, H, D]
    stride_grad_token,
    stride_qkv_token,
    stride_qkv_part,
    stride_qkv_head,
    stride_context_token,
    stride_lse_head,
    num_heads,
    num_sequences,
    blocks,  # of a sequence
    num_tokens,
    scale,
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
):
    # Adjacent programs take heads of the same tokens, as in the forward.
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    block = tl.program_id(0) // num_heads
    if block < num_sequences * blocks:
        start, length = bounds_of(cu_seqlens_ptr, block // blocks, num_tokens)
        first = block % blocks * BLOCK_M
        if first < length:
            offs_q = first + tl.arange(0, BLOCK_M)
            offs_d = tl.arange(0, BLOCK_D)
            offs_key = tl.arange(0, BLOCK_N)
            live_q = offs_q < length
            mask_d = (offs_d < HEAD_SIZE)[None, :]
            mask_q = live_q[:, None] & mask_d
            rows = (start + offs_q).to(tl.int64)
            q_ptr = qkv_ptr + start.to(tl.int64) * stride_qkv_token + head * stride_qkv_head
            k_ptr = q_ptr + stride_qkv_part
            v_ptr = k_ptr + stride_qkv_part
            columns = head * HEAD_SIZE + offs_d[None, :]
            grad = tl.load(grad_ptr + rows[:, None] * stride_grad_token + columns, mask=mask_q, other=0.0)
            context = tl.load(context_ptr + rows[:, None] * stride_context_token + columns, mask=mask_q, other=0.0)
            delta = tl.sum(grad.to(tl.float32) * context.to(tl.float32), axis=1)
            tl.store(delta_ptr + head * num_tokens + rows, delta, mask=live_q)
            lse = tl.load(lse_ptr + head * stride_lse_head + rows, mask=live_q, other=0.0)
            q_places = offs_q.to(tl.int64)[:, None] * stride_qkv_token + offs_d[None, :]
            q = tl.load(q_ptr + q_places, mask=mask_q, other=0.0)
            grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for key in range(0, length, BLOCK_N):
                live = key + offs_key < length
                places = (key + offs_key).to(tl.int64)[:, None] * stride_qkv_token + offs_d[None, :]
                mask = live[:, None] & mask_d
                k = tl.load(k_ptr + places, mask=mask, other=0.0)
                scores = dot(q, k.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
                # A key past the end has score zero, so its weight may be infinite: infinity times zero is NaN.
                weights = tl.where(live[None, :], tl.exp2(scores * scale_log2 - lse[:, None]), 0.0)
                v = tl.load(v_ptr + places, mask=mask, other=0.0)
                grad_weights = dot(grad, v.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
                if DROPOUT:
                    keep = keep_mask(
                        tl.load(seed_ptr), start + offs_q, key, head.to(tl.int32), SITE, threshold, BLOCK_N
                    )
                    grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
                grad_scores = weights * (grad_weights - delta[:, None])
                grad_q = dot(grad_scores.to(k.dtype), k, grad_q, PRECISION)
            out_places = (rows[:, None] * 3 * num_heads + head) * HEAD_SIZE + offs_d[None, :]
            tl.store(grad_qkv_ptr + out_places, (grad_q * scale).to(grad_qkv_ptr.dtype.element_ty), mask=mask_q)
    else:
        block = tl.program_id(0) - num_sequences * blocks * num_heads
        _fill_tail(
            grad_qkv_ptr, cu_seqlens_ptr, block, num_sequences, num_heads, num_tokens, HEAD_SIZE, BLOCK_M, BLOCK_D
        )


@triton.jit(
    do_not_specialize=["stride_lse_head", "num_heads", "blocks", "num_tokens", "threshold"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "lse_ptr", "delta_ptr"],
)
def _attention_bwd_dkv_kernel(
    grad_ptr,  # [T, H D]
    qkv_ptr,  # [T, 3, H, D]
    lse_ptr,  # float32 [H, T]
    cu_seqlens_ptr,  # int32 [N + 1]
    seed_ptr,  # int64 [1] or None
    delta_ptr,  # float32 [H, T]
    grad_qkv_ptr,  # [T, 3, H, D]
    stride_grad_token,
    stride_qkv_token,
    stride_qkv_part,
    stride_qkv_head,
    stride_lse_head,
    num_heads,
    blocks,  # of a sequence
    num_tokens,
    scale,
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
):
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    block = tl.program_id(0) // num_heads
    start, length = bounds_of(cu_seqlens_ptr, block // blocks, num_tokens)
    first = block % blocks * BLOCK_M
    if first < length:
        offs_key = first + tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        offs_q = tl.arange(0, BLOCK_N)
        mask_d = (offs_d < HEAD_SIZE)[None, :]
        mask_key = (offs_key < length)[:, None] & mask_d
        row = start.to(tl.int64)
        q_ptr = qkv_ptr + row * stride_qkv_token + head * stride_qkv_head
        k_ptr = q_ptr + stride_qkv_part
        v_ptr = k_ptr + stride_qkv_part
        grad_ptr += row * stride_grad_token + head * HEAD_SIZE
        lse_ptr += head * stride_lse_head + row
        delta_ptr += head * num_tokens + row
        places = offs_key.to(tl.int64)[:, None] * stride_qkv_token + offs_d[None, :]
        k = tl.load(k_ptr + places, mask=mask_key, other=0.0)
        v = tl.load(v_ptr + places, mask=mask_key, other=0.0)
        grad_k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        grad_v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        # Scores and weights are [keys, queries]. Queries past the end have no gradient and are zero, so their weights,
        # exp2(0), add nothing.
        for query in range(0, length, BLOCK_N):
            live = query + offs_q < length
            rows = (query + offs_q).to(tl.int64)
            mask = live[:, None] & mask_d
            if DROPOUT:
                keep = keep_mask(
                    tl.load(seed_ptr), start + query + offs_q, first, head.to(tl.int32), SITE, threshold, BLOCK_M
                ).T
            q = tl.load(q_ptr + rows[:, None] * stride_qkv_token + offs_d[None, :], mask=mask, other=0.0)
            grad = tl.load(grad_ptr + rows[:, None] * stride_grad_token + offs_d[None, :], mask=mask, other=0.0)
            scores = dot(k, q.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
            weights = tl.exp2(scores * scale_log2 - lse[None, :])
            kept = weights
            if DROPOUT:
                kept = tl.where(keep, weights * keep_scale, 0.0)
            grad_v = dot(kept.to(grad.dtype), grad, grad_v, PRECISION)
            grad_weights = dot(v, grad.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            if DROPOUT:
                grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
            delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
            grad_scores = weights * (grad_weights - delta[None, :])
            grad_k = dot(grad_scores.to(q.dtype), q, grad_k, PRECISION)
        part = ((row + offs_key)[:, None] * 3 + 1) * num_heads
        k_places = (part + head) * HEAD_SIZE + offs_d[None, :]
        v_places = (part + num_heads + head) * HEAD_SIZE + offs_d[None, :]
        tl.store(grad_qkv_ptr + k_places, (grad_k * scale).to(grad_qkv_ptr.dtype.element_ty), mask=mask_key)
        tl.store(grad_qkv_ptr + v_places, grad_v.to(grad_qkv_ptr.dtype.element_ty), mask=mask_key)


@cached_by_specs
def _attention_backward_launches(
    grad: TensorSpec, qkv: TensorSpec, context: TensorSpec, lse: TensorSpec, cu_seqlens: TensorSpec, max_seqlen: int,
    scale: float, allowed: str | None, seed: TensorSpec | None, p: float, site: int,
) -> tuple[CachedLaunch, CachedLaunch] | None:  # fmt: skip
    """Prepare both launches, or return None if operands have to be copied first. allowed: see `dot_precision`."""
    operation = "attention_backward"
    check(operation, qkv, grad, context, lse, cu_seqlens)
    check_seed(operation, seed, qkv.device)
    num_tokens, num_heads, head_size = check_qkv(operation, qkv)
    for name, x, dtype in (("grad", grad, qkv.dtype), ("context", context, qkv.dtype), ("lse", lse, torch.float32)):
        if x.dtype != dtype:
            raise TypeError(f"{operation}: {name} is {x.dtype}, expected {dtype}")
    check_shape(operation, "grad", grad, num_tokens, num_heads * head_size)
    check_shape(operation, "context", context, num_tokens, num_heads * head_size)
    check_shape(operation, "lse", lse, num_heads, num_tokens)
    if not have_unit_strides(grad, qkv, context, lse, cu_seqlens):
        return None
    config = with_dropout(choose(operation, qkv, head_size), qkv, p)
    num_sequences = cu_seqlens.shape[0] - 1
    # At least one block, since kernels divide by their number.
    blocks = max(1, triton.cdiv(max_seqlen, config.BLOCK_M))
    programs = num_sequences * blocks * num_heads
    with_tail = programs + triton.cdiv(num_tokens, config.BLOCK_M)
    check_programs(operation, with_tail)
    common = {
        "stride_grad_token": row_stride(grad),
        "stride_qkv_token": qkv.strides[0],
        "stride_qkv_part": qkv.strides[1],
        "stride_qkv_head": qkv.strides[2],
        "stride_lse_head": lse.strides[0],
        "num_heads": num_heads,
        "blocks": blocks,
        "num_tokens": num_tokens,
        "scale": float(scale),
        "scale_log2": scale * LOG2_E,
        **dropout_constants(p, site),
        "HEAD_SIZE": head_size,
        "PRECISION": dot_precision(qkv.dtype, qkv.device, allowed),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    of_queries = {"stride_context_token": row_stride(context), "num_sequences": num_sequences}
    return (
        CachedLaunch(_attention_bwd_dq_kernel, (with_tail if num_tokens else 0,), qkv.device, common | of_queries),
        CachedLaunch(_attention_bwd_dkv_kernel, (programs if num_tokens else 0,), qkv.device, common),
    )


def attention_backward(
    grad: Tensor, qkv: Tensor, context: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """grad [T, H D], qkv [T, 3, H, D], context and lse of `attention_forward` -> the gradient of qkv [T, 3, H, D].

    grad and context have qkv's dtype. cu_seqlens, max_seqlen, scale and dropout are those of the forward. Rows from
    cu_seqlens[N] on are not read, and their gradient is zero. The gradient of a sequence does not depend on the others.
    Raises ValueError for other shapes, a head size above 128 or 2^31 programs, TypeError for other dtypes.
    """
    tensors = grad, qkv, context, lse, cu_seqlens
    p, seed, site = dropout or (0.0, None, 0)
    launches = _attention_backward_launches(
        *map(spec_of, tensors), max_seqlen, scale, torch_precision(qkv), spec_of(seed), p, site
    )
    if launches is None:
        return attention_backward(*map(with_unit_stride, tensors), max_seqlen, scale, dropout)
    by_queries, by_keys = launches
    grad_qkv = qkv.new_empty(qkv.shape)
    given = {
        "grad_ptr": grad, "qkv_ptr": qkv, "lse_ptr": lse, "cu_seqlens_ptr": cu_seqlens, "seed_ptr": seed,
        "delta_ptr": torch.empty(lse.shape, dtype=torch.float32, device=qkv.device), "grad_qkv_ptr": grad_qkv,
    }  # fmt: skip
    by_queries(context_ptr=context, **given)
    by_keys(**given)
    return grad_qkv
