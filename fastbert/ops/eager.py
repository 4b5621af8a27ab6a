"""Every fused op in plain PyTorch: the reference that kernels are tested against, and what runs where no kernel can.

Names and signatures are those of `fastbert.ops`, which documents them; letters as in `fastbert.tokens`.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops.backend import is_tracing, may_overwrite

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)

# By the names of `ops.linear_activation`; "none" is the identity. torch's stub of gelu lacks `out`.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x, out=None: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x, out=None: F.gelu(x, approximate="tanh", out=out),  # type: ignore[call-arg]
    "relu": lambda x, out=None: F.relu(x, inplace=out is not None),
    "tanh": torch.tanh,
}

# Below this E * S^2 the call overhead exceeds the attention of one sequence of S tokens (measured on two cores).
SHORT_ATTENTION = 2**17


def clear_past(hidden: Tensor, num_tokens: Tensor | None) -> Tensor:
    """Zero the rows of hidden [T, ...] from num_tokens on, if given, so that their values have no effect."""
    if num_tokens is None:
        return hidden
    past = torch.arange(hidden.shape[0], device=hidden.device) >= num_tokens
    return hidden.masked_fill(past.view(-1, *[1] * (hidden.ndim - 1)), 0)


def sequence_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """cu_seqlens [N + 1] -> int64 [T], the sequence of each token, N past the end of the last sequence.

    All offsets are searched instead of cu_seqlens[1:], because inductor in torch 2.11 ignores the start of the slice.
    """
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, tokens, right=True) - 1


def packing_plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    keep = (mask != 0).flatten()
    cu_seqlens = F.pad((mask != 0).sum(1).cumsum(0), (1, 0)).int()
    return torch.argsort(keep, stable=True, descending=True), cu_seqlens


def embedding_ids(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, num_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Of each kept token: its id [T] or its embedding [T, E], its type [T], its position [T]. Without types, or
    without positions and indices, those are None: all types are 0, and each sequence has every position."""

    def kept(tensor: Tensor) -> Tensor:  # [B, S, ...] -> [T, ...]
        tensor = tensor.flatten(0, 1)
        return clear_past(tensor if indices is None else tensor[indices], num_tokens)

    given = inputs_embeds if input_ids is None else input_ids
    assert given is not None
    types = None if token_type_ids is None else kept(token_type_ids)
    if position_ids is not None:
        return kept(given), types, kept(position_ids)
    return kept(given), types, None if indices is None else indices % given.shape[1]


def summed_embeddings(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, word_table: Tensor, position_table: Tensor, token_type_table: Tensor,
    padding_idx: int | None = None, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Word, token type and position embeddings of the kept tokens, added in this order -> [T, E]."""
    given, types, positions = embedding_ids(input_ids, token_type_ids, position_ids, inputs_embeds, indices, num_tokens)
    hidden = given if input_ids is None else F.embedding(given, word_table, padding_idx)  # [T, E]
    hidden = hidden + (token_type_table[0] if types is None else F.embedding(types, token_type_table))
    if positions is not None:
        return hidden + F.embedding(positions, position_table)
    shape = (inputs_embeds if input_ids is None else input_ids).shape  # type: ignore[union-attr]
    seq_len, width = shape[1], hidden.shape[1]
    return (hidden.view(-1, seq_len, width) + position_table[:seq_len]).view(-1, width) if seq_len else hidden


def embed_layer_norm(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, word_table: Tensor, position_table: Tensor, token_type_table: Tensor,
    weight: Tensor, bias: Tensor, eps: float, padding_idx: int | None = None, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    hidden = summed_embeddings(
        input_ids, token_type_ids, position_ids, inputs_embeds, indices, word_table, position_table, token_type_table,
        padding_idx, num_tokens,
    )  # fmt: skip
    return clear_past(torch.layer_norm(hidden, weight.shape, weight, bias, eps), num_tokens)


def qkv_projection(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor,
    num_heads: int, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x, hidden_size = clear_past(x, num_tokens), q_weight.shape[0]
    if may_overwrite():
        qkv = x.new_empty(x.shape[0], 3, hidden_size)
        q, k, v = qkv.unbind(1)
        linear: Callable[..., Tensor] = F.linear  # torch's stub lacks `out`
        linear(x, q_weight, q_bias, out=q)
        linear(x, k_weight, k_bias, out=k)
        linear(x, v_weight, v_bias, out=v)
    else:
        q, k, v = F.linear(x, q_weight, q_bias), F.linear(x, k_weight, k_bias), F.linear(x, v_weight, v_bias)
        qkv = torch.stack((q, k, v), 1)
    return clear_past(qkv.view(x.shape[0], 3, num_heads, hidden_size // num_heads), num_tokens)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    mask: Tensor | None = None, implementation: str = "sdpa", num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (size, _, num_heads, head_size), num_sequences = qkv.shape, cu_seqlens.shape[0] - 1
    if mask is None and (num_tokens is not None or size != num_sequences * max_seqlen):
        q, k, v = clear_past(qkv, num_tokens).unbind(1)
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale, 0.0, implementation, num_tokens)
    qkv = qkv.view(num_sequences, max_seqlen, 3, num_heads, head_size)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [N, H, S, D]
    context, _ = _attend(q, k, v, mask, scale, 0.0, implementation)
    return context.transpose(1, 2).reshape(size, num_heads * head_size)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, num_tokens: Tensor | None = None
) -> Tensor:
    hidden = F.linear(clear_past(x, num_tokens), weight, bias)
    return clear_past(ACTIVATIONS[activation](hidden, out=hidden if may_overwrite() else None), num_tokens)


def linear_residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    hidden, residual = F.linear(clear_past(x, num_tokens), weight, bias), clear_past(residual, num_tokens)
    hidden = hidden.add_(residual) if may_overwrite() else hidden + residual
    return clear_past(torch.layer_norm(hidden, norm_weight.shape, norm_weight, norm_bias, eps), num_tokens)


def unpack(
    hidden: Tensor, indices: Tensor | None, batch_size: int, seq_len: int, num_tokens: Tensor | None = None
) -> Tensor:
    if indices is not None:
        hidden = clear_past(hidden, num_tokens)
        hidden = hidden.new_zeros(batch_size * seq_len, *hidden.shape[1:]).index_copy_(0, indices, hidden)
    # Not `unflatten`: a trace would record the sizes of its example as constants.
    return hidden.view(batch_size, seq_len, *hidden.shape[1:])


def pool(
    hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False, indices: Tensor | None = None
) -> Tensor:
    if mode not in ("first", "mean"):
        raise ValueError(f"pool mode {mode!r} is unknown; choose 'first' or 'mean'")
    if mode == "first" and indices is not None:
        # Gather the first tokens only: gathering all of them would copy the hidden states.
        starts = indices[cu_seqlens[:-1].long().clamp(max=indices.shape[0] - 1)] if len(indices) else cu_seqlens[:-1]
    else:
        hidden = hidden if indices is None else hidden[indices]
        starts = cu_seqlens[:-1].long()
    lengths, wide = cu_seqlens.diff()[:, None], torch.promote_types(hidden.dtype, torch.float32)
    if hidden.shape[0] == 0:
        return hidden.new_zeros(len(starts), *hidden.shape[1:])
    if mode == "first":
        pooled = hidden[starts.clamp(max=hidden.shape[0] - 1)].masked_fill(lengths == 0, 0)
    else:
        sequence = sequence_of(cu_seqlens, hidden.shape[0])
        # Rows past the last sequence are added to one extra sum, which is dropped.
        pooled = torch.zeros(len(starts) + 1, hidden.shape[1], dtype=wide, device=hidden.device)
        pooled = pooled.index_add_(0, sequence, hidden.to(wide))[:-1] / lengths.clamp(min=1)
    if normalize:
        # In float32, because the eps of the division, 1e-12, is zero in float16.
        pooled = F.normalize(pooled.to(wide), dim=-1)
    return pooled.to(hidden.dtype)


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, dropout: float, implementation: str
) -> tuple[Tensor, Tensor | None]:
    """Attention of sequences of equal length: q, k, v [N, S, H, D] -> context [N, S, E], and the weights [N, H, S, S]
    if implementation is "eager", otherwise None."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    context, weights = _attend(q, k, v, mask, scale, dropout, implementation)
    return context.transpose(1, 2).flatten(2), weights


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout: float,
    implementation: str, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention within each sequence of q, k, v [T, H, D] -> context [T, E]; rows from num_tokens on are unspecified.

    On the CPU each sequence takes one call, unless the sequences are so short that padding them for a single masked
    call is cheaper. On other devices they are always padded, because the host does not know the lengths.
    """
    size, num_sequences = q.shape[0], cu_seqlens.shape[0] - 1
    mask, place = None, None
    if num_tokens is not None or size != num_sequences * max_seqlen:
        short = q.shape[1] * q.shape[2] * max_seqlen**2 < SHORT_ATTENTION
        if q.device.type == "cpu" and num_tokens is None and not is_tracing() and not short:
            # split instead of slices: the backward of every slice would zero a whole [T, H, D].
            sizes = cu_seqlens.diff().tolist()
            sequences = zip(sizes, *(x[None].split(sizes, 1) for x in (q, k, v)), strict=True)
            contexts = [
                padded_attention(q, k, v, scale, None, dropout, implementation)[0]
                for size, q, k, v in sequences
                if size
            ]
            return torch.cat(contexts, 1)[0]
        sequence = sequence_of(cu_seqlens, size)
        place = sequence * max_seqlen + torch.arange(size, device=q.device) - cu_seqlens[sequence]
        lengths = cu_seqlens.diff()
        if num_tokens is not None:
            # Rows past num_tokens share the first place of one extra sequence.
            place = place.clamp(max=num_sequences * max_seqlen)
            lengths, num_sequences = F.pad(lengths, (0, 1)), num_sequences + 1
        # An empty sequence attends to one zero key, because a softmax over no key is NaN.
        mask = (torch.arange(max_seqlen, device=q.device) < lengths[:, None].clamp(min=1))[:, None, None]
    q, k, v = (unpack(x, place, num_sequences, max_seqlen) for x in (q, k, v))
    context = padded_attention(q, k, v, scale, mask, dropout, implementation)[0].flatten(0, 1)
    return context if place is None else context[place]


def finite(mask: OptionalTensor, dtype: torch.dtype) -> OptionalTensor:
    """An additive mask in the dtype of the scores, with -inf replaced by the dtype's minimum: the softmax of a row of
    -inf alone is NaN. A bool mask and None are returned unchanged."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.to(dtype).clamp(min=torch.finfo(dtype).min)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, implementation: str
) -> tuple[Tensor, Tensor | None]:
    """q, k, v [N, H, S, D] -> context [N, H, S, D], and the weights [N, H, S, S] of "eager"."""
    if implementation == "eager":
        return _softmax_attention(q, k, v, mask, scale, dropout)
    if q.numel() == 0:
        return v + 0 * (q + k), None  # empty, but q and k must get gradients, too
    return F.scaled_dot_product_attention(q, k, v, finite(mask, q.dtype), dropout, scale=scale), None


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention by its definition; also returns the weights, after dropout, as transformers does."""
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        mask = finite(mask, scores.dtype)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights @ v, weights
