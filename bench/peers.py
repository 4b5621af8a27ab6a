"""A peer without custom kernels: BERT's encoder on packed tokens, in plain PyTorch with `varlen_attn`.

Padding is removed once, before the embeddings, and put back at the end. Queries, keys and values are one product.
`torch.compile` is applied to `encode`, whose inputs are packed.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

# transformers' parameter names and the names here. query, key and value are then concatenated to `qkv`.
_NAMES = (
    (r"^embeddings\.(word|position|token_type)_embeddings", r"\1"),
    (r"^embeddings\.LayerNorm", "norm"),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense", r"layers.\1.projection"),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"layers.\1.attention_norm"),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense", r"layers.\1.up"),
    (r"^encoder\.layer\.(\d+)\.output\.dense", r"layers.\1.down"),
    (r"^encoder\.layer\.(\d+)\.output\.LayerNorm", r"layers.\1.output_norm"),
    (r"^encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)", r"layers.\1.\2"),
    (r"^pooler\.dense", "pooler"),
)


class Outputs(NamedTuple):
    last_hidden_state: Tensor  # [B, S, E], zeros at padding
    pooler_output: Tensor  # [B, E]


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """q, k, v [T, H, D] -> [T, H, D] within the sequences that cu_seqlens [B + 1] bounds.

    `varlen_attn` has no CPU implementation. There SDPA runs for each sequence, so that the rest of this model can be
    checked. It is never timed.
    """
    if q.is_cuda:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    lengths = cu_seqlens.diff().tolist()
    sequences = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*sequence)[0] for sequence in sequences], 1).transpose(0, 1)


class UnpaddedLayer(nn.Module):
    def __init__(self, config: transformers.BertConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads, width // config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """[T, E] -> [T, E]"""
        q, k, v = self.qkv(x).unflatten(1, (3, *self.heads)).unbind(1)
        context = _varlen_attention(q, k, v, cu_seqlens, max_seqlen).flatten(1)
        x = self.attention_norm(x + self.projection(context))
        return self.output_norm(x + self.down(F.gelu(self.up(x))))


class UnpaddedBert(nn.Module):
    def __init__(self, config: transformers.BertConfig):
        super().__init__()
        width = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_position_embeddings, width)
        self.token_type = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.layers = nn.ModuleList(UnpaddedLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(width, width)

    @classmethod
    def from_transformers(cls, model: transformers.BertModel) -> "UnpaddedBert":
        """Return this model with the same weights, dtype and device, in eval mode.

        Raises ValueError for an activation other than "gelu", RuntimeError for unknown parameters.
        """
        if model.config.hidden_act != "gelu":
            raise ValueError(f"hidden_act is {model.config.hidden_act!r}, only 'gelu' is supported")
        state = {}
        for name, parameter in model.state_dict().items():
            for pattern, replacement in _NAMES:
                name = re.sub(pattern, replacement, name)
            state[name] = parameter
        for layer in range(model.config.num_hidden_layers):
            for kind in ("weight", "bias"):
                parts = [state.pop(f"layers.{layer}.{part}.{kind}") for part in ("query", "key", "value")]
                state[f"layers.{layer}.qkv.{kind}"] = torch.cat(parts)
        with torch.device("meta"):
            unpadded = cls(model.config)
        unpadded.load_state_dict(state, assign=True)
        return unpadded.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        """input_ids int64 [B, S] on the model's device; attention_mask 0/1 [B, S] with padding on the right.

        The mask is on the host, where the tokenizer made it, so that no sync is needed.
        """
        (batch_size, seq_len), device = input_ids.shape, input_ids.device
        lengths = attention_mask.sum(1)
        kept = attention_mask.flatten().nonzero().flatten()
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        positions = (kept % seq_len).to(device, non_blocking=True)
        max_seqlen, full = int(lengths.max()), len(kept) == batch_size * seq_len
        kept, cu_seqlens = (x.to(device, non_blocking=True) for x in (kept, cu_seqlens))
        # Up to torch 2.13 this is the only back end. Later versions would prefer cuDNN.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            tokens = input_ids.flatten() if full else input_ids.flatten()[kept]
            hidden = self.encode(tokens, positions, cu_seqlens, max_seqlen)
        if not full:
            hidden = hidden.new_zeros(batch_size * seq_len, hidden.shape[1]).index_copy_(0, kept, hidden)
        hidden = hidden.unflatten(0, (batch_size, seq_len))
        return Outputs(hidden, torch.tanh(self.pooler(hidden[:, 0])))

    def encode(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """tokens and positions int64 [T], cu_seqlens int32 [B + 1] -> [T, E]"""
        x = self.norm(self.word(tokens) + self.position(positions) + self.token_type.weight[0])
        for layer in self.layers:
            x = layer(x, cu_seqlens, max_seqlen)
        return x
