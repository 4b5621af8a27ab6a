"""A layer of the encoder in the fused ops: one dispatch and one autograd node for the whole layer.

Letters as in `fastbert.tokens`.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef

from fastbert import ops
from fastbert.ops import backend


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
    """x [T, E] -> [T, E]. cu_seqlens, max_seqlen, mask, implementation: see `ops.attention`; num_tokens: see `ops`.

    If gradients are recorded and kernels run the whole layer, it is one autograd node, which is differentiable once.
    """
    if torch.is_grad_enabled() and mask is None and num_tokens is None and backend.runs_layers(x, numbers.head_size):
        if any(tensor.requires_grad for tensor in (x, *weights)):
            return _trained(x, weights, numbers, cu_seqlens, max_seqlen)
        with torch.no_grad():
            return encoder_layer(x, weights, numbers, cu_seqlens, max_seqlen, mask, implementation, num_tokens)
    if mask is None and backend.launches_directly(x, numbers.head_size):
        # Already imported by launches_directly.
        return sys.modules["fastbert_kernels"].encoder_layer(
            x, weights, cu_seqlens, max_seqlen, numbers.num_heads, numbers.scale, numbers.activation, numbers.eps,
            num_tokens,
        )  # fmt: skip
    w = weights
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


class _NormalizedRows(NamedTuple):
    """How a layer made its output: LayerNorm of rows that it saves for its own backward.

    The next layer can compute its input again from these rows and need not save it. The reference is weak because
    gradient checkpointing and offloading free what a layer saves.
    """

    rows: TensorWeakRef  # [T, E]
    weight: Tensor
    bias: Tensor
    eps: float
    version: int  # of the output: it grows if the output is changed in place


class _Call:
    """The arguments of a layer without gradients. made: of the input, if it was made by a layer; rows: set by the
    forward, for the `_NormalizedRows` of the output."""

    def __init__(self, numbers: LayerNumbers, max_seqlen: int, made: _NormalizedRows | None):
        self.numbers, self.max_seqlen, self.made = numbers, max_seqlen, made
        self.rows: TensorWeakRef | None = None


def _trained(
    x: Tensor, weights: LayerWeights, numbers: LayerNumbers, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    made = getattr(x, "_fastbert_made", None)
    call = _Call(numbers, max_seqlen, made if made is not None and made.version == x._version else None)
    out = _TrainedLayer.apply(call, cu_seqlens, x, *weights)
    made = _NormalizedRows(
        call.rows, weights.output_norm_weight, weights.output_norm_bias, numbers.eps[1], out._version
    )
    out._fastbert_made = made
    return out


class _TrainedLayer(torch.autograd.Function):
    """A layer in kernels, forward and backward."""

    @staticmethod
    def forward(ctx, call, cu_seqlens, x, *weights):
        kernels, numbers, device_type = sys.modules["fastbert_kernels"], call.numbers, x.device.type
        low, residual, used = x, x, LayerWeights(*weights)
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            low, residual = x.to(dtype), x.float()
            # LayerNorm is not autocast: its parameters keep their dtype.
            norms = [name for name in used._fields if "norm" in name]
            cast = {name: weight.to(dtype) for name, weight in used._asdict().items() if name not in norms}
            used = used._replace(**cast)
        out, saved = kernels.encoder_layer_forward(
            low, residual, used, cu_seqlens, call.max_seqlen, numbers.num_heads, numbers.scale, numbers.activation,
            numbers.eps,
        )  # fmt: skip
        call.rows = TensorWeakRef(saved.output_sum)
        rows = None if call.made is None else call.made.rows()
        made = (x,) if rows is None else (rows, call.made.weight, call.made.bias)
        ctx.save_for_backward(cu_seqlens, *used, *saved, *made)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kernels, numbers = sys.modules["fastbert_kernels"], ctx.call.numbers
        cu_seqlens, *tensors = ctx.saved_tensors
        weights, tensors = LayerWeights(*tensors[:16]), tensors[16:]
        saved, made = kernels.SavedTensors(*tensors[:6]), tensors[6:]
        _, _, wants_x, *wanted = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            dtype = weights.q_weight.dtype
            x = made[0].to(dtype) if len(made) == 1 else kernels.layer_norm(*made, ctx.call.made.eps, dtype)
            found = kernels.encoder_layer_backward(
                grad, x, saved, weights, cu_seqlens, ctx.call.max_seqlen, numbers.scale, numbers.activation,
                numbers.eps, wants_x, LayerWeights(*wanted),
            )  # fmt: skip
        return None, None, found.x, *found.weights
