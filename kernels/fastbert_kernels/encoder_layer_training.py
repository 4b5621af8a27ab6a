"""A whole layer of BERT's encoder with what its gradients need, and these gradients: x [T, E] -> [T, E] and back.

The forward saves, in units of T x E: QKV 3, the context 1, both sums before LayerNorm 2, the activation's input 4 (for
F = 4 E); the caller keeps x. Outputs of LayerNorm and of the activation are computed again, which takes no product.
Products without an activation are torch.mm, because cuBLAS is hard to beat; only QKV, from three weights, has a kernel.
Everything else runs in kernels, and all sums over tokens have a fixed order: the same inputs and the same seed give the
same bits, if torch.mm does (see `torch.use_deterministic_algorithms`).

All dropouts of a layer share one seed. The backward draws their zeros again from it.

If only the device knows the number of tokens, products take all T rows of the buffers. Their operands are therefore
finite past the count, and zero on one side of every sum over rows. QKV and lse are undefined there: only attention
reads them, by offsets.
"""

from collections.abc import Callable, Sequence
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
    operand: Tensor, x: Tensor, weights: LayerWeights, cu_seqlens: Tensor, max_seqlen: int, num_heads: int,
    scale: float, activation: str, eps: tuple[float, float], dropouts: Dropouts, seed: Tensor | None,
    num_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, SavedTensors]:  # fmt: skip
    """x [T, E] -> the output [T, E] in x's dtype, the same in the weights' dtype, and what to save.

    operand: x in the weights' dtype, that of the products. Under autocast it is 16 bits wide, and x, LayerNorm and its
    parameters are float32. Otherwise operand is x, and both outputs are one tensor. seed: int64 [1] on the device, for
    dropout; None for no dropout. num_tokens: as in `encoder_layer`; the output is zero past it. The other arguments are
    those of `encoder_layer`.
    """
    w = weights
    qkv = qkv_projection(
        operand, w.q_weight, w.q_bias, w.k_weight, w.k_bias, w.v_weight, w.v_bias, num_heads, num_tokens
    )
    context, lse = attention_forward(
        qkv, cu_seqlens, max_seqlen, scale, dropouts.at(0, seed), clear_tail=num_tokens is not None
    )
    linear = torch.addmm(w.attention_bias, context, w.attention_weight.T)
    norm = w.attention_norm_weight, w.attention_norm_bias, eps[0]
    attended = residual_layer_norm(linear, x, *norm, dropouts.at(1, seed), num_tokens)
    activated, up = linear_activation_forward(attended.narrow, w.up_weight, w.up_bias, activation)
    linear = torch.addmm(w.down_bias, activated, w.down_weight.T)
    norm = w.output_norm_weight, w.output_norm_bias, eps[1]
    output = residual_layer_norm(linear, attended.out, *norm, dropouts.at(2, seed), num_tokens)
    return output.out, output.narrow, SavedTensors(qkv, context, lse, attended.summed, up, output.summed, output.norm)


class LayerGradients(NamedTuple):
    """Gradients of a layer, those of one sum together; None for those that were not wanted."""

    x: Tensor | None  # [T, E]
    qkv_weight: Tensor | None  # [3 H D, E]
    qkv_bias: Tensor | None  # float32 [3 H D]
    attention_weight: Tensor | None
    attention_sums: Tensor | None  # [3, E]: of attention_norm_weight, attention_norm_bias and attention_bias
    up_weight: Tensor | None
    up_bias: Tensor | None  # float32
    down_weight: Tensor | None
    output_sums: Tensor | None  # [3, E]: of output_norm_weight, output_norm_bias and down_bias

    def of_weights(self) -> LayerWeights:
        """The gradient of each weight or None. Some are views of one tensor."""
        q_weight, k_weight, v_weight = (None,) * 3 if self.qkv_weight is None else self.qkv_weight.chunk(3)
        q_bias, k_bias, v_bias = (None,) * 3 if self.qkv_bias is None else self.qkv_bias.chunk(3)
        attention, output = ((None,) * 3 if x is None else x.unbind() for x in (self.attention_sums, self.output_sums))
        return LayerWeights(
            q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, self.attention_weight, attention[2], *attention[:2],
            self.up_weight, self.up_bias, self.down_weight, output[2], *output[:2],
        )  # fmt: skip


def wanted_gradients(x: bool, weights: Sequence[bool]) -> LayerGradients:
    """A bool for each of a layer's gradients, from one for x and one for each weight in the order of `LayerWeights`."""
    w = LayerWeights(*weights)
    return LayerGradients(
        x, w.q_weight or w.k_weight or w.v_weight, w.q_bias or w.k_bias or w.v_bias, w.attention_weight,
        w.attention_norm_weight or w.attention_norm_bias or w.attention_bias, w.up_weight, w.up_bias, w.down_weight,
        w.output_norm_weight or w.output_norm_bias or w.down_bias,
    )  # fmt: skip


def encoder_layer_backward(
    grad: Tensor, make_x: Callable[[], Tensor], saved: SavedTensors, weights: LayerWeights, cu_seqlens: Tensor,
    max_seqlen: int, scale: float, activation: str, eps: tuple[float, float], dropouts: Dropouts, seed: Tensor | None,
    wanted: LayerGradients, num_tokens: Tensor | None = None,
) -> LayerGradients:  # fmt: skip
    """grad [T, E] of the output, x [T, E] in the weights' dtype, what the forward saved -> gradients.

    make_x: returns x, finite past num_tokens; called if a wanted gradient depends on x. wanted: of `wanted_gradients`.
    Products and launches on which no wanted gradient depends are left out. Gradients have the dtypes of the weights
    (sums that of LayerNorm's) and, for x, of the output. Rows of grad from num_tokens on are not read, and are zero in
    the gradient of x.
    """
    w, dtype = weights, weights.q_weight.dtype
    found: dict[str, Tensor] = {}
    needs_context = wanted.x or wanted.qkv_weight or wanted.qkv_bias
    needs_attended = needs_context or wanted.attention_weight or wanted.attention_sums
    needs_up = needs_attended or wanted.up_weight or wanted.up_bias or wanted.down_weight

    output = layer_norm_backward(
        grad, saved.output_sum, w.output_norm_weight, eps[1], None, dtype, dropouts.at(2, seed), num_tokens
    )  # fmt: skip
    found["output_sums"] = output.sums.to(w.output_norm_weight.dtype)
    if needs_up:
        grad_activated = output.linear @ w.down_weight
        grad_up, activated, found["up_bias"] = activation_backward(grad_activated, saved.up, activation)
        del grad_activated
        if wanted.down_weight:
            found["down_weight"] = output.linear.T @ activated
        del activated
    if wanted.up_weight:
        # Rows past num_tokens are zero: without eps they would be NaN.
        norm = w.attention_norm_weight, w.attention_norm_bias, max(eps[0], torch.finfo(torch.float32).tiny)
        found["up_weight"] = grad_up.T @ layer_norm(saved.attention_sum, *norm, dtype)
    if needs_attended:
        attended = layer_norm_backward(
            output.x, saved.attention_sum, w.attention_norm_weight, eps[0], grad_up @ w.up_weight, dtype,
            dropouts.at(1, seed), num_tokens,
        )  # fmt: skip
        del grad_up, output
        found["attention_sums"] = attended.sums.to(w.attention_norm_weight.dtype)
        if wanted.attention_weight:
            found["attention_weight"] = attended.linear.T @ saved.context
    if needs_context:
        qkv = attention_backward(
            attended.linear @ w.attention_weight, saved.qkv, saved.context, saved.lse, cu_seqlens, max_seqlen, scale,
            dropouts.at(0, seed),
        ).flatten(1)  # fmt: skip
        if wanted.qkv_weight:
            found["qkv_weight"] = qkv.T @ make_x()
        if wanted.qkv_bias:
            found["qkv_bias"] = qkv.sum(0, dtype=torch.float32)
        if wanted.x:
            weight = torch.cat((w.q_weight, w.k_weight, w.v_weight))
            same = attended.x.dtype == dtype
            found["x"] = torch.addmm(attended.x, qkv, weight) if same else attended.x.add_(qkv @ weight)
    asked = (found[name] if want else None for name, want in zip(wanted._fields, wanted, strict=True))
    return LayerGradients(*asked)
