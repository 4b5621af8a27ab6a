"""A layer of the encoder in the fused ops: one dispatch and one autograd node for the whole layer.

Letters as in `fastbert.tokens`.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import backend, torch_library


class LayerWeights(NamedTuple):
    """The tensors of a layer: weights [out, in], biases and LayerNorm's two [out].

    The same fields as `fastbert_kernels.LayerWeights`, which cannot be imported without Triton; a test compares them.
    """

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    attention_weight: Tensor
    attention_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor


class LayerNumbers(NamedTuple):
    """The numbers of a layer; eps: of the LayerNorms after attention and after the feed-forward part."""

    num_heads: int
    head_size: int
    scale: float
    activation: str
    eps: tuple[float, float]


def encoder_layer(
    x: Tensor, weights: LayerWeights, numbers: LayerNumbers, cu_seqlens: Tensor, max_seqlen: int,
    mask: Tensor | None, implementation: str, num_tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    """x [T, E] -> [T, E]. cu_seqlens, max_seqlen, mask, implementation: see `ops.attention`; num_tokens: see `ops`."""

    def compute(x: Tensor, mask: Tensor | None, w: LayerWeights) -> Tensor:
        if mask is None and backend.launches_directly(x, numbers.head_size):
            # Already imported by launches_directly.
            return sys.modules["fastbert_kernels"].encoder_layer(
                x, w, cu_seqlens, max_seqlen, numbers.num_heads, numbers.scale, numbers.activation, numbers.eps,
                num_tokens,
            )  # fmt: skip
        qkv = ops.qkv_projection(
            x, w.q_weight, w.q_bias, w.k_weight, w.k_bias, w.v_weight, w.v_bias, numbers.num_heads, num_tokens
        )  # [T, 3, H, D]
        context = ops.attention(qkv, cu_seqlens, max_seqlen, numbers.scale, mask, implementation, num_tokens)
        del qkv  # frees its memory before the feed-forward part, which needs more
        attended = ops.linear_residual_layer_norm(
            context, w.attention_weight, w.attention_bias, x, w.attention_norm_weight, w.attention_norm_bias,
            numbers.eps[0], num_tokens,
        )  # fmt: skip
        del context
        up = ops.linear_activation(attended, w.up_weight, w.up_bias, numbers.activation, num_tokens)  # [T, F]
        return ops.linear_residual_layer_norm(
            up, w.down_weight, w.down_bias, attended, w.output_norm_weight, w.output_norm_bias, numbers.eps[1],
            num_tokens,
        )  # fmt: skip

    if not torch.is_grad_enabled():
        return compute(x, mask, weights)
    return one_autograd_node(lambda x, mask, *weights: compute(x, mask, LayerWeights(*weights)), x, mask, *weights)


class _Recomputed(torch.autograd.Function):
    """Several ops as one autograd node: forward in kernels; backward recomputes them in their references."""

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
        tensors = ctx.saved_tensors  # before the block: under gradient checkpointing this runs the forward again
        with backend.backend("eager"), torch.autocast(grad.device.type, dtype, enabled):
            found = torch_library.gradients(ctx.compute, tensors, ctx.needs_input_grad[1:], grad)
        return None, *found


def one_autograd_node(compute: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """compute(x, *others), as one autograd node if gradients are enabled and kernels run it.

    One node per op would cost 43 to 61 microseconds each. Only the tensors passed here are saved for the backward and
    get gradients.
    """
    if not torch.is_grad_enabled() or backend.is_tracing() or backend.is_transforming():
        return compute(x, *others)
    if backend.why_eager("qkv_projection", x.device, x.dtype) is not None:
        return compute(x, *others)
    return _Recomputed.apply(compute, x, *others)
