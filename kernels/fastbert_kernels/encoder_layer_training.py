"""A whole layer of BERT's encoder with what its gradients need, and these gradients: x [T, E] -> [T, E] and back.

The forward saves, in units of T x E: QKV 3, the context 1, both sums before LayerNorm 2, the activation's input 4 (for
F = 4 E); the caller keeps x. Outputs of LayerNorm and of the activation are computed again, which takes no product.
Products without an activation are torch.mm, because cuBLAS is hard to beat; only QKV, from three weights, has a kernel.
Everything else runs in kernels, and all sums over tokens have a fixed order: the same inputs and the same seed give the
same bits, if torch.mm does (see `torch.use_deterministic_algorithms`).

All dropouts of a layer share one seed. The backward draws their zeros again from it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert_kernels.activation_backward import activation_backward
from fastbert_kernels.attention import attention_forward
from fastbert_kernels.attention_backward import attention_backward
from fastbert_kernels.dropout import Dropout
from fastbert_kernels.encoder_layer import LayerWeights
from fastbert_kernels.layer_norm import layer_norm
from fastbert_kernels.layer_norm_backward import layer_norm_backward
from fastbert_kernels.linear_activation import linear_activation_forward
from fastbert_kernels.qkv_projection import qkv_projection
from fastbert_kernels.residual_layer_norm import residual_layer_norm


class SavedTensors(NamedTuple):
    """What the forward of a layer saves for its backward."""

    qkv: Tensor  # [T, 3, H, D]
    context: Tensor  # [T, H D]
    lse: Tensor  # float32 [H, T]
    attention_sum: Tensor  # [T, E], the input of attention's LayerNorm, in the residual's dtype
    up: Tensor  # [T, F], the input of the activation
    output_sum: Tensor  # [T, E], the input of the output's LayerNorm
    output_norm: Tensor  # float32 [2, E], a copy of this LayerNorm's weight and bias


class Dropouts(NamedTuple):
    """The probabilities of a layer's dropouts: of attention's weights, of its output, of the feed-forward output."""

    attention: float
    attention_output: float
    output: float

    def at(self, site: int, seed: Tensor | None) -> Dropout | None:
        """Return the dropout at one of these places, which are its site; None if nothing is dropped there."""
        return Dropout(self[site], seed, site) if seed is not None and self[site] > 0 else None


def encoder_layer_forward(
    x: Tensor, residual: Tensor, weights: LayerWeights, cu_seqlens: Tensor, max_seqlen: int, num_heads: int,
    scale: float, activation: str, eps: tuple[float, float], dropouts: Dropouts, seed: Tensor | None,
) -> tuple[Tensor, SavedTensors]:  # fmt: skip
    """x [T, E] in the weights' dtype, and x in the dtype of the output -> the output [T, E], and what to save.

    The two differ under autocast, where products are 16 bits wide, and residuals and LayerNorm float32. LayerNorm's
    parameters may have another dtype than the weights. seed: int64 [1] on the device, for dropout; None for no dropout.
    The other arguments are those of `encoder_layer`.
    """
    w = weights
    qkv = qkv_projection(x, w.q_weight, w.q_bias, w.k_weight, w.k_bias, w.v_weight, w.v_bias, num_heads)
    context, lse = attention_forward(qkv, cu_seqlens, max_seqlen, scale, dropouts.at(0, seed))
    linear = torch.addmm(w.attention_bias, context, w.attention_weight.T)
    norm = w.attention_norm_weight, w.attention_norm_bias, eps[0]
    attended = residual_layer_norm(linear, residual, *norm, dropouts.at(1, seed))
    activated, up = linear_activation_forward(attended.narrow, w.up_weight, w.up_bias, activation)
    linear = torch.addmm(w.down_bias, activated, w.down_weight.T)
    norm = w.output_norm_weight, w.output_norm_bias, eps[1]
    output = residual_layer_norm(linear, attended.out, *norm, dropouts.at(2, seed))
    return output.out, SavedTensors(qkv, context, lse, attended.summed, up, output.summed, output.norm)


class LayerGradients(NamedTuple):
    """Gradients of x and of the weights, in the order of `LayerWeights`; None for those that were not wanted."""

    x: Tensor | None
    weights: LayerWeights


def encoder_layer_backward(
    grad: Tensor, make_x: Callable[[], Tensor], saved: SavedTensors, weights: LayerWeights, cu_seqlens: Tensor,
    max_seqlen: int, scale: float, activation: str, eps: tuple[float, float], dropouts: Dropouts, seed: Tensor | None,
    wants_x: bool, wanted: LayerWeights,
) -> LayerGradients:  # fmt: skip
    """grad [T, E] of the output, x [T, E] in the weights' dtype, what the forward saved -> gradients.

    make_x: returns x; called if a wanted gradient depends on x. wanted: a bool for each weight. Products and launches
    on which no wanted gradient depends are left out. Gradients have the dtypes of the weights and, for x, of the
    residual; biases of queries, keys, values and of the activation have float32 gradients.
    """
    w, dtype = weights, weights.q_weight.dtype
    found: dict[str, Tensor | None] = {}
    needs_context = wants_x or any(wanted[:6])
    needs_attended = needs_context or any(wanted[6:10])
    needs_up = needs_attended or any(wanted[10:13])

    output = layer_norm_backward(
        grad, saved.output_sum, w.output_norm_weight, eps[1], None, dtype, dropouts.at(2, seed)
    )  # fmt: skip
    found["output_norm_weight"], found["output_norm_bias"], found["down_bias"] = output.sums.to(
        w.output_norm_weight.dtype
    )
    if needs_up:
        grad_activated = output.linear @ w.down_weight
        grad_up, activated, found["up_bias"] = activation_backward(grad_activated, saved.up, activation)
        del grad_activated
        if wanted.down_weight:
            found["down_weight"] = output.linear.T @ activated
        del activated
    if wanted.up_weight:
        norm = w.attention_norm_weight, w.attention_norm_bias, eps[0]
        found["up_weight"] = grad_up.T @ layer_norm(saved.attention_sum, *norm, dtype)
    if needs_attended:
        attended = layer_norm_backward(
            output.x, saved.attention_sum, w.attention_norm_weight, eps[0], grad_up @ w.up_weight, dtype,
            dropouts.at(1, seed),
        )  # fmt: skip
        del grad_up, output
        sums = attended.sums.to(w.attention_norm_weight.dtype)
        found["attention_norm_weight"], found["attention_norm_bias"], found["attention_bias"] = sums
        if wanted.attention_weight:
            found["attention_weight"] = attended.linear.T @ saved.context
    grad_x = None
    if needs_context:
        qkv = attention_backward(
            attended.linear @ w.attention_weight, saved.qkv, saved.context, saved.lse, cu_seqlens, max_seqlen, scale,
            dropouts.at(0, seed),
        ).flatten(1)  # fmt: skip
        names, width = ("q", "k", "v"), w.q_weight.shape[0]
        if any(wanted[0:6:2]):
            for name, part in zip(names, (qkv.T @ make_x()).split(width), strict=True):
                found[f"{name}_weight"] = part
        if any(wanted[1:6:2]):
            for name, part in zip(names, qkv.sum(0, dtype=torch.float32).split(width), strict=True):
                found[f"{name}_bias"] = part
        if wants_x:
            weight = torch.cat((w.q_weight, w.k_weight, w.v_weight))
            same = attended.x.dtype == dtype
            grad_x = torch.addmm(attended.x, qkv, weight) if same else attended.x.add_(qkv @ weight)
    asked = (found.get(name) if want else None for name, want in zip(w._fields, wanted, strict=True))
    return LayerGradients(grad_x, LayerWeights(*asked))
