"""The fused ops of BERT, one function each. An op runs in a Triton kernel or in plain PyTorch.

`backend` decides which, `eager` has the references, `torch_library` the ops of traced graphs and their gradients.
Letters as in `fastbert.tokens`.

num_tokens is an int32 [1] on the device: how many of the T rows are tokens, if only the device knows it. The rows from
index num_tokens on affect no other row. Kernels leave them undefined in their outputs, except that `unpack` writes
zeros to their places. The references read them as zeros and return zeros there.
"""

import os
import sys

import torch
from torch import Tensor

from fastbert.ops import backend, eager, torch_library

OPS = tuple(torch_library.FAKES)
# If True, an index out of range raises in the same call, which waits for the device.
CHECK_IDS = os.environ.get("FASTBERT_CHECK") == "1"


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype if it is enabled, as autocast does for `torch.nn.functional.linear`."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def packing_plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Plan the packing of a padded batch: mask [B, S], zero for padding -> indices, cu_seqlens.

    indices int64 [B * S] is a permutation of the flattened batch: the kept positions first, in their order.
    cu_seqlens int32 [B + 1] holds the offsets of the sequences in it. Zhai et al. 2022 (ByteTransformer), section III.
    """
    if not backend.packs_on_device(mask.device):
        return eager.packing_plan(mask)
    if backend.is_tracing() or backend.is_watched():
        return torch.ops.fastbert.packing_plan(mask)
    return sys.modules["fastbert_kernels"].packing_plan(mask)  # imported by packs_on_device


def embed_layer_norm(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, word_table: Tensor, position_table: Tensor, token_type_table: Tensor,
    weight: Tensor, bias: Tensor, eps: float, padding_idx: int | None = None, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm of the sum of word, token type and position embeddings of the kept tokens -> [T, E].

    input_ids, token_type_ids, position_ids: integers [B, S]. Without input_ids, inputs_embeds [B, S, E] replaces the
    word embeddings; without token_type_ids all types are 0; without position_ids the column is the position.
    indices int64 [T]: the kept positions of the flattened batch; None keeps all. Tables: [V, E], [max positions, E],
    [types, E]; weight and bias [E]. The word embedding of padding_idx gets no gradient. An index out of range raises
    IndexError in eager on the CPU; for kernels see `raise_bad_ids`.
    Devlin et al. 2019, section 3; LayerNorm: Ba et al. 2016.
    """
    if input_ids is None:
        word_table = word_table.detach()  # unused: its gradient is None instead of zeros
    arguments = (
        input_ids, token_type_ids, position_ids, inputs_embeds, indices, word_table, position_table, token_type_table,
        weight, bias, eps, padding_idx, num_tokens,
    )  # fmt: skip
    kernel = backend.kernel("embed_layer_norm", word_table)
    if kernel is None:
        return eager.embed_layer_norm(*arguments)
    hidden = kernel(*arguments)
    if CHECK_IDS:
        backend.raise_bad_ids(hidden.device, wait=True)
    return hidden.float() if torch.is_autocast_enabled(hidden.device.type) else hidden


def qkv_projection(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor,
    num_heads: int, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, E], three weights [E, E] and biases [E] -> queries, keys and values [T, 3, H, D]."""
    tensors = x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias
    kernel = backend.kernel("qkv_projection", x)
    if kernel is None:
        return eager.qkv_projection(*tensors, num_heads, num_tokens)
    return kernel(*_autocast(*tensors), num_heads, num_tokens)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    mask: Tensor | None = None, implementation: str = "sdpa", num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale * Q K^T) V of each head within each sequence: qkv [T, 3, H, D], cu_seqlens int32 [N + 1] -> [T, E].

    max_seqlen: an upper bound of the sequence lengths; later tokens would have undefined rows. mask (bool or additive,
    broadcasting to [N, H, S, S]) needs sequences of equal length and runs in eager only.
    implementation, "sdpa" or "eager", is the attention of the eager path. Vaswani et al. 2017, section 3.2.
    """
    unsupported_reason = "a 3-D or 4-D attention mask cannot be packed" if mask is not None else None
    kernel = backend.kernel("attention", qkv, unsupported_reason, size=qkv.shape[-1])
    if kernel is None:
        return eager.attention(qkv, cu_seqlens, max_seqlen, scale, mask, implementation, num_tokens)
    return kernel(qkv, cu_seqlens, max_seqlen, scale)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, num_tokens: Tensor | None = None
) -> Tensor:
    """activation(x W^T + b): x [T, E], weight [F, E], bias [F] -> [T, F].

    activation: "gelu" (exact, by erf), "gelu_tanh", "relu", "tanh" or "none". GELU: Hendrycks and Gimpel 2016.
    """
    kernel = backend.kernel("linear_activation", x)
    if kernel is None:
        return eager.linear_activation(x, weight, bias, activation, num_tokens)
    return kernel(*_autocast(x, weight, bias), activation, num_tokens)


def linear_residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm(x W^T + b + residual): x [T, F], weight [E, F], bias [E], residual [T, E] -> [T, E].

    Under autocast the product is computed in autocast's dtype, the sum and LayerNorm in float32.
    """
    norm = norm_weight, norm_bias, eps
    kernel = backend.kernel("linear_residual_layer_norm", x)
    if kernel is None:
        return eager.linear_residual_layer_norm(x, weight, bias, residual, *norm, num_tokens)
    if torch.is_autocast_enabled(x.device.type):
        residual = residual.float()
    return kernel(*_autocast(x, weight, bias), residual, *norm, num_tokens)


def unpack(
    hidden: Tensor, indices: Tensor | None, batch_size: int, seq_len: int, num_tokens: Tensor | None = None
) -> Tensor:
    """Scatter hidden [T, ...] into [B, S, ...], with zeros elsewhere.

    indices int64 [T], all different: the position of each row in the flattened batch; None if every token was kept,
    then the result is a view.
    """
    if indices is None:
        return hidden.view(batch_size, seq_len, *hidden.shape[1:])
    kernel = backend.kernel("unpack", hidden)
    if kernel is None:
        return eager.unpack(hidden, indices, batch_size, seq_len, num_tokens)
    return kernel(hidden, indices, batch_size, seq_len, num_tokens)


def pool(
    hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False, indices: Tensor | None = None
) -> Tensor:
    """One vector per sequence: hidden [T, E], cu_seqlens int32 [N + 1] -> [N, E].

    mode "first" takes the first token, "mean" the mean in float32; normalize divides by the L2 norm. An empty sequence
    gives zeros. indices int64 [T]: the row of each token in hidden [P, E]; None if hidden is packed.
    Raises ValueError for another mode.
    """
    kernel = backend.kernel("pool", hidden, size=hidden.shape[-1])
    if kernel is None:
        return eager.pool(hidden, cu_seqlens, mode, normalize, indices)
    return kernel(hidden, cu_seqlens, mode, normalize, indices)
