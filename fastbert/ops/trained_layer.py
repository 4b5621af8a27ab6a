"""A whole encoder layer in training as two `torch.library` ops: "fastbert::trained_layer" and its backward.

They are the layer's nodes in a graph of `torch.compile`, opaque to compilers: the forward also returns what the
backward needs, so that no product is computed twice. Buffers have T = B * S rows, of which num_tokens are tokens.
Letters as in `fastbert.tokens`.
"""

from importlib import import_module

import torch
from torch import Tensor

from fastbert._compat import is_batched, is_tracing
from fastbert.ops.eager import clear_past


def trained_layer(
    x: Tensor, dtype: torch.dtype, weights: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, num_heads: int,
    scale: float, activation: str, eps: list[float], dropouts: list[float], seed: Tensor | None,
    num_tokens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [T, E] -> the output [T, E], zero from num_tokens on, and `fastbert_kernels.SavedTensors`.

    The arguments are those of `fastbert_kernels.encoder_layer_forward`; weights, eps and dropouts are flat.
    """
    kernels = import_module("fastbert_kernels")
    with torch.autocast(x.device.type, enabled=False):  # the caller has cast
        out, _, saved = kernels.encoder_layer_forward(
            x.to(dtype), x, kernels.LayerWeights(*weights), cu_seqlens, max_seqlen, num_heads, scale, activation,
            tuple(eps), kernels.Dropouts(*dropouts), seed, num_tokens,
        )  # fmt: skip
    return out, *saved


def _fake(x, dtype, weights, cu_seqlens, max_seqlen, num_heads, *_):
    kernels = import_module("fastbert_kernels")
    w, (size, width) = kernels.LayerWeights(*weights), x.shape
    context_width, inner = w.q_weight.shape[0], w.up_weight.shape[0]
    saved = kernels.SavedTensors(
        qkv=x.new_empty(size, 3, num_heads, context_width // num_heads, dtype=dtype),
        context=x.new_empty(size, context_width, dtype=dtype),
        lse=x.new_empty(num_heads, size, dtype=torch.float32),
        attention_sum=x.new_empty(size, width),
        up=x.new_empty(size, inner, dtype=dtype),
        output_sum=x.new_empty(size, width),
        output_norm=x.new_empty(2, width, dtype=torch.float32),
    )
    return x.new_empty(size, width), *saved


def trained_layer_backward(
    grad: Tensor, x: Tensor, dtype: torch.dtype, weights: list[Tensor], saved: list[Tensor], cu_seqlens: Tensor,
    max_seqlen: int, scale: float, activation: str, eps: list[float], dropouts: list[float], seed: Tensor | None,
    num_tokens: Tensor | None, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """grad [T, E] of the output, x and what the forward returned beside it -> the wanted ones of
    `fastbert_kernels.LayerGradients`."""
    kernels = import_module("fastbert_kernels")
    with torch.autocast(grad.device.type, enabled=False):
        found = kernels.encoder_layer_backward(
            grad, lambda: clear_past(x.to(dtype), num_tokens), kernels.SavedTensors(*saved),
            kernels.LayerWeights(*weights), cu_seqlens, max_seqlen, scale, activation, tuple(eps),
            kernels.Dropouts(*dropouts), seed, kernels.LayerGradients(*wanted), num_tokens,
        )  # fmt: skip
    return [gradient for gradient in found if gradient is not None]


def _fake_backward(grad, x, dtype, weights, *arguments):
    kernels = import_module("fastbert_kernels")
    w = kernels.LayerWeights(*weights)
    (context_width, width), inner = w.q_weight.shape, w.up_weight.shape[0]
    found = kernels.LayerGradients(
        x=x.new_empty(x.shape),
        qkv_weight=x.new_empty(3 * context_width, width, dtype=dtype),
        qkv_bias=x.new_empty(3 * context_width, dtype=torch.float32),
        attention_weight=x.new_empty(w.attention_weight.shape, dtype=dtype),
        attention_sums=x.new_empty(3, width, dtype=w.attention_norm_weight.dtype),
        up_weight=x.new_empty(w.up_weight.shape, dtype=dtype),
        up_bias=x.new_empty(inner, dtype=torch.float32),
        down_weight=x.new_empty(w.down_weight.shape, dtype=dtype),
        output_sums=x.new_empty(3, width, dtype=w.output_norm_weight.dtype),
    )
    return [gradient for gradient, want in zip(found, arguments[-1], strict=True) if want]


def check_derivative(grad: Tensor) -> None:
    """Raise RuntimeError for a derivative that the kernels of a layer do not have."""
    if (torch.is_grad_enabled() and not is_tracing()) or is_batched(grad):
        raise RuntimeError(
            "layers that ran in kernels have no second derivatives (create_graph=True) and no batched gradients "
            "(is_grads_batched, vectorize, vmap): run the forward under fastbert.backend('eager')"
        )


def _setup_context(ctx, inputs, output):
    x, dtype, weights, cu_seqlens, max_seqlen, _, scale, activation, eps, dropouts, seed, num_tokens = inputs
    ctx.set_materialize_grads(False)  # of the saved tensors, which are outputs
    ctx.numbers = dtype, max_seqlen, scale, activation, eps, dropouts, len(weights)
    ctx.save_for_backward(x, cu_seqlens, seed, num_tokens, *weights, *output[1:])


def _backward(ctx, grad, *_):
    dtype, max_seqlen, scale, activation, eps, dropouts, num_weights = ctx.numbers
    others = (None,) * 9
    if grad is None:
        return None, None, [None] * num_weights, *others
    check_derivative(grad)
    x, cu_seqlens, seed, num_tokens, *tensors = ctx.saved_tensors
    kernels = import_module("fastbert_kernels")
    wanted = kernels.wanted_gradients(ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    found = iter(
        torch.ops.fastbert.trained_layer_backward(
            grad, x, dtype, tensors[:num_weights], tensors[num_weights:], cu_seqlens, max_seqlen, scale, activation,
            eps, dropouts, seed, num_tokens, list(wanted),
        )
    )  # fmt: skip
    gradients = kernels.LayerGradients(*(next(found) if want else None for want in wanted))
    return gradients.x, None, list(gradients.of_weights()), *others


_forward_op = torch.library.custom_op("fastbert::trained_layer", trained_layer, mutates_args=())
_forward_op.register_fake(_fake)
_forward_op.register_autograd(_backward, setup_context=_setup_context)
torch.library.custom_op("fastbert::trained_layer_backward", trained_layer_backward, mutates_args=()).register_fake(
    _fake_backward
)
