"""A layer of the encoder in the fused ops: one dispatch and one autograd node for the whole layer.

Letters as in `fastbert.tokens`.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from fastbert import ops
from fastbert._compat import cast_together, is_tracing, versions_of
from fastbert.ops import backend
from fastbert.ops.trained_layer import check_derivative


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
    """The numbers of a layer; eps: of the LayerNorms after attention and after the feed-forward part; dropouts: the
    probabilities for attention's weights, its output and the feed-forward output, 0 for those that are not active."""

    num_heads: int
    head_size: int
    scale: float
    activation: str
    eps: tuple[float, float]
    dropouts: tuple[float, ...]


def encoder_layer(
    x: Tensor, weights: LayerWeights, numbers: LayerNumbers, cu_seqlens: Tensor, max_seqlen: int,
    mask: Tensor | None, implementation: str, num_tokens: Tensor | None, trained: bool,
) -> Tensor:  # fmt: skip
    """x [T, E] -> [T, E]. cu_seqlens, max_seqlen, mask, implementation: see `ops.attention`; num_tokens: see `ops`.

    trained: kernels can run the layer with its dropout and its gradients; then, if gradients are recorded, it is one
    autograd node, which is differentiable once, also in a traced graph. Without trained there may be no dropout.
    """
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    if trained and (records or any(numbers.dropouts)):
        # The caller may have been traced, and then a graph break runs the layer, whose tokens only the device counts.
        if is_tracing() or (records and num_tokens is not None):
            return _trained_by_op(x, weights, numbers, cu_seqlens, max_seqlen, num_tokens)
        return _trained(x, weights, numbers, cu_seqlens, max_seqlen, num_tokens, records)
    assert not any(numbers.dropouts), "only kernels for training drop"
    if mask is None and not records and backend.launches_directly(x, numbers.head_size):
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


class _Source(NamedTuple):
    """Where a layer's output comes from: LayerNorm of rows [T, E] that the layer saves for its own backward.

    The next layer makes its input from these rows again and need not save it. The reference to them is weak, because
    gradient checkpointing and offloading free what a layer saves. norm [2, E]: LayerNorm's weight and bias, copied,
    because FSDP frees parameters between layers. narrow [T, E]: the output in the dtype of products, if that is
    another; it lives as long as the output. version: of the output; in-place changes raise it.
    """

    rows: TensorWeakRef
    norm: Tensor
    narrow: Tensor | None
    eps: float
    version: int


class _Call:
    """The arguments of a layer that are not differentiated. rows, norm, narrow: set by the forward, for the output's
    `_Source`."""

    rows: TensorWeakRef
    norm: Tensor
    narrow: Tensor | None

    def __init__(self, numbers: LayerNumbers, max_seqlen: int, source: _Source | None):
        self.numbers, self.max_seqlen, self.source = numbers, max_seqlen, source


def _trained(
    x: Tensor, weights: LayerWeights, numbers: LayerNumbers, cu_seqlens: Tensor, max_seqlen: int,
    num_tokens: Tensor | None, records: bool,
) -> Tensor:  # fmt: skip
    source = getattr(x, "fastbert_source", None)
    call = _Call(numbers, max_seqlen, source if source is not None and [source.version] == versions_of([x]) else None)
    if not records:
        with torch.no_grad():
            return _forward(call, cu_seqlens, x, weights, num_tokens)[0]
    out = _TrainedLayer.apply(call, cu_seqlens, x, *weights)
    out.fastbert_source = _Source(call.rows, call.norm, call.narrow, numbers.eps[1], *versions_of([out]))
    return out


def _operands(
    x: Tensor, weights: LayerWeights, numbers: LayerNumbers
) -> tuple[Tensor, torch.dtype, LayerWeights, Tensor | None]:
    """x and the weights as autocast casts them, the dtype of the products, and the seed of the dropouts or None."""
    device_type, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device_type):
        # LayerNorm is not autocast, and its parameters keep their dtype.
        x, dtype = x.float(), torch.get_autocast_dtype(device_type)
        named = dict(zip(LayerWeights._fields, weights, strict=True))
        wide = {name: w for name, w in named.items() if "norm" not in name and w.dtype != dtype}
        # autograd and compilers have to see each cast.
        seen = torch.is_grad_enabled() or is_tracing()
        cast = [w.to(dtype) for w in wide.values()] if seen else cast_together([*wide.values()], dtype)
        weights = LayerWeights(**named | dict(zip(wide, cast, strict=True)))
    # Drawn on the device, by torch's generator there: `torch.manual_seed` and checkpointing repeat it.
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if any(numbers.dropouts) else None
    return x, dtype, weights, seed


def _trained_by_op(
    x: Tensor, weights: LayerWeights, numbers: LayerNumbers, cu_seqlens: Tensor, max_seqlen: int,
    num_tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    x, dtype, weights, seed = _operands(x, weights, numbers)
    out, *_ = torch.ops.fastbert.trained_layer(
        x, dtype, list(weights), cu_seqlens, max_seqlen, numbers.num_heads, numbers.scale, numbers.activation,
        numbers.eps, numbers.dropouts, seed, num_tokens,
    )  # fmt: skip
    return out


def _forward(call: _Call, cu_seqlens: Tensor, x: Tensor, weights: LayerWeights, num_tokens: Tensor | None = None):
    """The output of a layer, what to save, the weights that it used, and the seed of its dropouts or None."""
    kernels, numbers = sys.modules["fastbert_kernels"], call.numbers
    known = None if call.source is None else call.source.narrow
    x, dtype, weights, seed = _operands(x, weights, numbers)
    operand = known if known is not None and known.dtype == dtype else x.to(dtype)
    out, narrow, saved = kernels.encoder_layer_forward(
        operand, x, weights, cu_seqlens, call.max_seqlen, numbers.num_heads, numbers.scale,
        numbers.activation, numbers.eps, kernels.Dropouts(*numbers.dropouts), seed, num_tokens,
    )  # fmt: skip
    call.rows, call.norm = TensorWeakRef(saved.output_sum), saved.output_norm
    call.narrow = None if narrow is out else narrow  # not the output itself, which would refer to itself
    return out, saved, weights, seed


class _TrainedLayer(torch.autograd.Function):
    """A layer whose forward and backward run in kernels."""

    @staticmethod
    def forward(ctx, call, cu_seqlens, x, *weights):
        out, saved, used, seed = _forward(call, cu_seqlens, x, LayerWeights(*weights))
        rows = None if call.source is None else call.source.rows()
        source = (x,) if rows is None else (rows, call.source.norm)
        # Not the call, whose rows in the dtype of products would live until the backward.
        ctx.numbers, ctx.max_seqlen, ctx.dtype = call.numbers, call.max_seqlen, weights[0].dtype
        ctx.source_eps = None if call.source is None else call.source.eps
        ctx.save_for_backward(cu_seqlens, seed, *used, *saved, *source)
        return out

    @staticmethod
    def backward(ctx, grad):
        check_derivative(grad)
        kernels, numbers = sys.modules["fastbert_kernels"], ctx.numbers
        cu_seqlens, seed, *tensors = ctx.saved_tensors
        num_weights, num_saved = len(LayerWeights._fields), len(kernels.SavedTensors._fields)
        weights, tensors = LayerWeights(*tensors[:num_weights]), tensors[num_weights:]
        saved, source = kernels.SavedTensors(*tensors[:num_saved]), tensors[num_saved:]

        def operand():
            dtype = weights.q_weight.dtype
            if len(source) == 1:
                return source[0].to(dtype)
            rows, norm = source
            return kernels.layer_norm(rows, *norm, ctx.source_eps, dtype)

        _, _, wants_x, *wanted = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            found = kernels.encoder_layer_backward(
                grad, operand, saved, weights, cu_seqlens, ctx.max_seqlen, numbers.scale, numbers.activation,
                numbers.eps, kernels.Dropouts(*numbers.dropouts), seed, kernels.wanted_gradients(wants_x, wanted),
            )  # fmt: skip
        # Of the weights that were cast. autograd would cast each by a launch of its own.
        named = dict(zip(found._fields, found, strict=True))
        products = {name: x for name, x in named.items() if "weight" in name and x is not None}
        if weights.q_weight.dtype != ctx.dtype:
            cast = cast_together([*products.values()], ctx.dtype)
            found = kernels.LayerGradients(**named | dict(zip(products, cast, strict=True)))
        return None, None, found.x, *found.of_weights()
