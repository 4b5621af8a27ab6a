"""A layer of the encoder in the ops: which back end serves it is decided once, and it is one node of autograd.

Letters as in `fastbert.tokens`.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import backend, torch_library


class LayerNumbers(NamedTuple):
    """What a layer computes by beside its weights; eps of attention's LayerNorm and of the feed-forward part's."""

    num_heads: int
    head_size: int
    scale: float
    activation: str
    eps: tuple[float, float]


def encoder_layer(
    x: Tensor, weights: Sequence[Tensor], numbers: LayerNumbers, cu_seqlens: Tensor, max_seqlen: int,
    mask: Tensor | None, implementation: str, num_tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    """x [T, E] -> [T, E], as `ops` says of each of its ops.

    weights: weight and bias of the queries, of the keys, of the values, of attention's output and its LayerNorm, of the
    feed-forward part's first linear, its second and its LayerNorm. mask, implementation: of `ops.attention`.
    """

    def compute(x, mask, *weights):
        refused = backend.why_not_head_size(numbers.head_size)
        if mask is None and backend.launches_directly(x, refused):
            # Already imported by launches_directly.
            whole = sys.modules["fastbert_kernels"].encoder_layer
            num_heads, _, *others = numbers
            return whole(x, weights, cu_seqlens, max_seqlen, num_heads, *others, num_tokens)
        qkv, (attended, norm1, up, down, norm2) = weights[:6], zip(weights[6::2], weights[7::2], strict=True)
        # Nested, so that the queries, keys and values [T, 3, H, D] are gone before the wider feed-forward part.
        x = ops.linear_residual_layer_norm(
            ops.attention(
                ops.qkv_projection(x, *qkv, numbers.num_heads, num_tokens),
                cu_seqlens, max_seqlen, numbers.scale, mask, implementation, num_tokens,
            ),
            *attended, x, *norm1, numbers.eps[0], num_tokens,
        )  # fmt: skip
        y = ops.linear_activation(x, *up, numbers.activation, num_tokens)  # [T, F]
        return ops.linear_residual_layer_norm(y, *down, x, *norm2, numbers.eps[1], num_tokens)

    return in_one_node(compute, x, mask, *weights) if torch.is_grad_enabled() else compute(x, mask, *weights)


class _Recomputed(torch.autograd.Function):
    """A computation of many ops as one node: forward in the kernels, backward through the eager twins, recomputed."""

    @staticmethod
    def forward(ctx, compute, *tensors):
        device_type = tensors[0].device.type
        ctx.compute = compute
        ctx.autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        ctx.save_for_backward(*tensors)
        return compute(*tensors)

    @staticmethod
    def backward(ctx, grad):
        enabled, dtype = ctx.autocast
        tensors = ctx.saved_tensors  # outside of the block: gradient checkpointing runs the forward again to find them
        with backend.backend("eager"), torch.autocast(grad.device.type, dtype, enabled):
            found = torch_library.gradients(ctx.compute, tensors, ctx.needs_input_grad[1:], grad)
        return None, *found


def in_one_node(compute: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """compute(*tensors), where kernels serve it and a gradient may be asked for as one node of autograd.

    A node an op costs 43 to 61 microseconds each; and only the tensors given here are kept for the backward. None but
    them gets a gradient.
    """
    x = tensors[0]
    if not torch.is_grad_enabled() or backend.is_tracing() or backend.is_transforming():
        return compute(*tensors)
    if backend.why_eager("qkv_projection", x.device, x.dtype) is not None:
        return compute(*tensors)
    return _Recomputed.apply(compute, *tensors)
