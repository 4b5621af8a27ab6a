"""Every fused op in plain PyTorch: what the CPU runs, and the reference the kernels are held to.

Same names and signatures as `fastbert.ops`, which documents them; letters as in `fastbert.tokens`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops.backend import is_tracing, may_overwrite

# The same functions as transformers' activations of these names; "none" is the identity.
ACTIVATIONS = {
    "none": lambda x, out=None: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x, out=None: F.gelu(x, approximate="tanh", out=out),
    "relu": lambda x, out=None: F.relu(x, inplace=out is not None),
    "tanh": torch.tanh,
}


# E * S^2 below which attention over a sequence of S tokens takes less than the call (measured on two cores).
SHORT_ATTENTION = 2**17


def clear_past(hidden: Tensor, num_tokens: Tensor | None) -> Tensor:
    """hidden [T, ...] with zeros from row num_tokens on, where it is given: what stands there must not matter."""
    if num_tokens is None:
        return hidden
    past = torch.arange(hidden.shape[0], device=hidden.device) >= num_tokens
    return hidden.masked_fill(past.view(-1, *[1] * (hidden.ndim - 1)), 0)


def sequence_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence that each token belongs to, N past the last one's end; cu_seqlens [N + 1].

    All bounds are searched, not those from the second on: inductor of torch 2.11 ignores where a slice begins.
    """
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, tokens, right=True) - 1


def packing_plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    keep = (mask != 0).flatten()
    cu_seqlens = F.pad((mask != 0).sum(1).cumsum(0), (1, 0)).int()
    return torch.argsort(keep, stable=True, descending=True), cu_seqlens


def embed_layer_norm(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, word_table: Tensor, position_table: Tensor, token_type_table: Tensor,
    weight: Tensor, bias: Tensor, eps: float, padding_idx: int | None = None, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    seq_len = (inputs_embeds if input_ids is None else input_ids).shape[1]

    def kept(tensor: Tensor) -> Tensor:  # [B, S, ...] -> [T, ...]
        tensor = tensor.flatten(0, 1)
        return clear_past(tensor if indices is None else tensor[indices], num_tokens)

    hidden = (
        F.embedding(kept(input_ids), word_table, padding_idx) if input_ids is not None else kept(inputs_embeds)
    )  # [T, E]
    if token_type_ids is None:
        hidden = hidden + token_type_table[0]
    else:
        hidden = hidden + F.embedding(kept(token_type_ids), token_type_table)
    if position_ids is not None:
        hidden = hidden + F.embedding(kept(position_ids), position_table)
    elif indices is not None:
        hidden = hidden + F.embedding(indices % seq_len, position_table)
    else:
        width = hidden.shape[1]
        hidden = (hidden.view(-1, seq_len, width) + position_table[:seq_len]).view(-1, width) if seq_len else hidden
    return clear_past(torch.layer_norm(hidden, weight.shape, weight, bias, eps), num_tokens)


def qkv_projection(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor,
    num_heads: int, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x, hidden_size = clear_past(x, num_tokens), q_weight.shape[0]
    if may_overwrite():
        qkv = x.new_empty(x.shape[0], 3, hidden_size)
        q, k, v = qkv.unbind(1)
        F.linear(x, q_weight, q_bias, out=q)
        F.linear(x, k_weight, k_bias, out=k)
        F.linear(x, v_weight, v_bias, out=v)
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
    # Not `unflatten`: a trace holds it with the sizes of the example.
    return hidden.view(batch_size, seq_len, *hidden.shape[1:])


def pool(
    hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False, indices: Tensor | None = None
) -> Tensor:
    if mode not in ("first", "mean"):
        raise ValueError(f"pool mode {mode!r} is unknown; choose 'first' or 'mean'")
    if mode == "first" and indices is not None:
        # The rows of the first tokens alone: a gather of all of them would copy the hidden states.
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
        # Rows past the last sequence are added to one more, which is dropped.
        pooled = torch.zeros(len(starts) + 1, hidden.shape[1], dtype=wide, device=hidden.device)
        pooled = pooled.index_add_(0, sequence, hidden.to(wide))[:-1] / lengths.clamp(min=1)
    if normalize:
        # In float32: the guard against a division by zero is 1e-12, which is zero in float16.
        pooled = F.normalize(pooled.to(wide), dim=-1)
    return pooled.to(hidden.dtype)


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, dropout: float, implementation: str
) -> tuple[Tensor, Tensor | None]:
    """Attention of sequences of one length: q, k, v [N, S, H, D] -> context [N, S, E], and the weights [N, H, S, S]
    of implementation "eager"."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    context, weights = _attend(q, k, v, mask, scale, dropout, implementation)
    return context.transpose(1, 2).flatten(2), weights


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, dropout: float,
    implementation: str, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention within each sequence of q, k, v [T, H, D] -> context [T, E]; rows from num_tokens on are unspecified.

    On the CPU every sequence takes a call of its own, unless they are so short that the calls cost more than padding
    them for one masked call. Elsewhere they are padded, for the host does not know the lengths.
    """
    size, num_sequences = q.shape[0], cu_seqlens.shape[0] - 1
    mask, place = None, None
    if num_tokens is not None or size != num_sequences * max_seqlen:
        short = q.shape[1] * q.shape[2] * max_seqlen**2 < SHORT_ATTENTION
        if q.device.type == "cpu" and num_tokens is None and not is_tracing() and not short:
            # split, not slices: the backward of a slice fills a whole [T, H, D] with zeros, once a sequence.
            lengths = cu_seqlens.diff().tolist()
            sequences = zip(lengths, *(x[None].split(lengths, 1) for x in (q, k, v)), strict=True)
            context = [
                padded_attention(*sequence, scale, None, dropout, implementation)[0]
                for length, *sequence in sequences
                if length
            ]
            return torch.cat(context, 1)[0]
        sequence = sequence_of(cu_seqlens, size)
        place = sequence * max_seqlen + torch.arange(size, device=q.device) - cu_seqlens[sequence]
        lengths = cu_seqlens.diff()
        if num_tokens is not None:
            # Rows past the count share the first place of a sequence of their own.
            place = place.clamp(max=num_sequences * max_seqlen)
            lengths, num_sequences = F.pad(lengths, (0, 1)), num_sequences + 1
        # A sequence without tokens attends to a zero: its softmax over nothing would be NaN.
        mask = (torch.arange(max_seqlen, device=q.device) < lengths[:, None].clamp(min=1))[:, None, None]
    q, k, v = (unpack(x, place, num_sequences, max_seqlen) for x in (q, k, v))
    context = padded_attention(q, k, v, scale, mask, dropout, implementation)[0].flatten(0, 1)
    return context if place is None else context[place]


def finite(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An additive mask in the scores' dtype whose -inf are that dtype's minimum: a row of -inf only would be NaN."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.to(dtype).clamp(min=torch.finfo(dtype).min)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, implementation: str
) -> tuple[Tensor, Tensor | None]:
    """q, k, v [N, H, S, D] -> [N, H, S, D], and of "eager" the weights [N, H, S, S]."""
    if implementation == "eager":
        return _softmax_attention(q, k, v, mask, scale, dropout)
    if q.numel() == 0:
        return v + 0 * (q + k), None  # of nothing, but queries and keys get their gradients, of zeros
    return F.scaled_dot_product_attention(q, k, v, finite(mask, q.dtype), dropout, scale=scale), None


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, for its weights (after dropout, as transformers returns them)."""
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        mask = finite(mask, scores.dtype)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights @ v, weights
