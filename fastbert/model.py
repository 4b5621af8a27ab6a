"""BERT's encoder (Devlin et al. 2019), whole: embeddings -> layers -> pooler.

Module names, parameters and outputs are transformers'; the work is done by the ops of `fastbert.ops` on packed tokens.
Letters of the shapes as in `fastbert.tokens`. Hidden states between the blocks are [T, E], or [B, S, E] where the
layout drops nothing (`TokenLayout.padded`).
"""

from collections import namedtuple
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack

from fastbert import ops
from fastbert.configuration import BertConfig
from fastbert.eager import is_tracing, padded_attention, varlen_attention
from fastbert.fusion import FUSED_ACTIVATIONS, FusableBlock, has_hooks, why_not_fused
from fastbert.inputs import (
    BertForwardKwargs,
    check_inputs,
    check_length,
    expand_inputs,
    raise_out_of_range,
    refuse_decoder_arguments,
    refuse_padding,
    refuse_unknown_arguments,
)
from fastbert.pretrained import BertPreTrainedModel
from fastbert.tokens import TokenLayout, layout_from_cu_seqlens, layout_from_mask


class BertEmbeddings(FusableBlock):
    """Word + token type + position embeddings, LayerNorm, dropout: ids [B, S] or [T] -> the same shape with E."""

    ops_used = ("embed_layer_norm",)

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.seal()

    def parts(self):
        own = self._modules
        return (
            self, own["word_embeddings"], own["position_embeddings"], own["token_type_embeddings"],
            own["LayerNorm"], own["dropout"],
        )  # fmt: skip

    def forward(self, input_ids=None, token_type_ids=None, position_ids=None, inputs_embeds=None) -> Tensor:
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        shape, device = hidden_states.shape[:-1], hidden_states.device
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.long, device=device)
        if position_ids is None:
            position_ids = torch.arange(shape[-1], device=device)
        hidden_states = hidden_states + self.token_type_embeddings(token_type_ids)
        hidden_states = hidden_states + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(hidden_states))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states: Tensor, layout: TokenLayout, output_attentions: bool = False):
        """[T, E] or [B, S, E] -> the same, and the attention weights [B, H, S, S] or None."""
        heads = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        q = self.query(hidden_states).view(heads)
        k = self.key(hidden_states).view(heads)
        v = self.value(hidden_states).view(heads)
        dropout = self.dropout.p if self.training else 0.0
        if layout.padded:
            implementation = "eager" if output_attentions else layout.implementation
            return padded_attention(q, k, v, self.scaling, layout.mask, dropout, implementation)
        bounds = (layout.cu_seqlens, layout.max_seqlen)
        return varlen_attention(q, k, v, *bounds, self.scaling, dropout, layout.implementation), None


class BertSelfOutput(nn.Module):
    """dense -> dropout -> add the residual -> LayerNorm; `BertOutput` is the same with another input width."""

    def __init__(self, config: BertConfig, in_features: int | None = None):
        super().__init__()
        self.dense = nn.Linear(in_features or config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertOutput(BertSelfOutput):
    def __init__(self, config: BertConfig):
        super().__init__(config, config.intermediate_size)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(self, hidden_states: Tensor, layout: TokenLayout, output_attentions: bool = False):
        context, weights = self.self(hidden_states, layout, output_attentions)
        return self.output(context, hidden_states), weights


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


LayerParts = namedtuple(
    "LayerParts",
    "layer attention self_attention query key value attention_dropout self_output self_output_dense self_output_norm "
    "self_output_dropout intermediate intermediate_dense intermediate_activation output output_dense output_norm "
    "output_dropout",
)


class BertLayer(GradientCheckpointingLayer, FusableBlock):
    ops_used = (
        "qkv_projection",
        "attention",
        "linear_residual_layer_norm",
        "linear_activation",
        "linear_residual_layer_norm",
    )

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)
        self.fused_activation = FUSED_ACTIVATIONS.get(config.hidden_act)
        self.seal()

    def parts(self):
        own = self._modules
        attention, intermediate, output = own["attention"], own["intermediate"], own["output"]
        self_attention, self_output = attention._modules["self"], attention._modules["output"]
        a, s, i, o = self_attention._modules, self_output._modules, intermediate._modules, output._modules
        return LayerParts(
            self, attention, self_attention, a["query"], a["key"], a["value"], a["dropout"],
            self_output, s["dense"], s["LayerNorm"], s["dropout"],
            intermediate, i["dense"], i["intermediate_act_fn"],
            output, o["dense"], o["LayerNorm"], o["dropout"],
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, layout: TokenLayout, fused: bool = False, output_attentions: bool = False):
        """[T, E] or [B, S, E] -> the same; with output_attentions, that and the weights [B, H, S, S]."""
        layout = layout.to(hidden_states.device)
        if fused:
            return self._forward_fused(hidden_states, layout)
        attention_output, weights = self.attention(hidden_states, layout, output_attentions)
        hidden_states = self.output(self.intermediate(attention_output), attention_output)
        return (hidden_states, weights) if output_attentions else hidden_states

    def _forward_fused(self, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        p = self.parts()
        x = hidden_states.flatten(0, 1) if layout.padded else hidden_states  # [T, E]
        # Nested, so that the queries, keys and values [T, 3, H, D] are gone before the wider feed-forward part.
        x = ops.linear_residual_layer_norm(
            ops.attention(
                ops.qkv_projection(
                    x, *_parameters(p.query), *_parameters(p.key), *_parameters(p.value),
                    p.self_attention.num_attention_heads,
                ),
                layout.cu_seqlens, layout.max_seqlen, p.self_attention.scaling, layout.mask, layout.implementation,
            ),
            *_parameters(p.self_output_dense), x, *_parameters(p.self_output_norm), p.self_output_norm.eps,
        )  # fmt: skip
        y = ops.linear_activation(x, *_parameters(p.intermediate_dense), self.fused_activation)  # [T, F]
        x = ops.linear_residual_layer_norm(
            y, *_parameters(p.output_dense), x, *_parameters(p.output_norm), p.output_norm.eps
        )
        return x.view(hidden_states.shape) if layout.padded else x


def _parameters(module: nn.Linear | nn.LayerNorm) -> tuple[nn.Parameter, nn.Parameter]:
    """weight and bias, without `nn.Module.__getattr__`, which took a sixth of a small layer's time."""
    own = module._parameters
    return own["weight"], own["bias"]


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        output_hidden_states: Collection[int] = (),
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The layers, one after another; unpacks the last hidden state and those that are asked for to [B, S, E]."""
        states: list[Tensor | None] = []
        attentions: list[Tensor] = []
        for index, layer in enumerate(self.layer):
            if index in output_hidden_states:
                states.append(layout.unpack(hidden_states))
                # The model goes on from the state it returns, so that gradients can be read there.
                hidden_states = layout.pack(states[-1]) if torch.is_grad_enabled() else hidden_states
            else:
                states.append(None)
            refused = "attention weights are asked for" if output_attentions else why_not_fused(layer)
            if refused is None:
                hidden_states = layer(hidden_states, layout, True)
                continue
            ops.fall_back("an encoder layer", refused, hidden_states.device)
            if output_attentions:
                hidden_states, weights = layer(hidden_states, layout, output_attentions=True)
                attentions.append(weights if layout.keep is None else weights * layout.keep[:, None, :, None])
            elif has_hooks(layer):
                hidden_states = layout.pack(layer(layout.unpack(hidden_states), layout.as_padded()))
            else:
                hidden_states = layer(hidden_states, layout)
        last_hidden_state = layout.unpack(hidden_states)
        states.append(last_hidden_state if len(self.layer) in output_hidden_states else None)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last_hidden_state,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class BertPooler(FusableBlock):
    """tanh of a linear of the first token: [B, S, E] -> [B, E]."""

    ops_used = ("linear_activation",)

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()
        self.seal()

    def parts(self):
        return self, self._modules["dense"], self._modules["activation"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        first_token = hidden_states[:, 0]
        refused = why_not_fused(self)
        if refused is None:
            return ops.linear_activation(first_token, *_parameters(self.dense), "tanh")
        ops.fall_back("the pooler", refused, hidden_states.device)
        return self.activation(self.dense(first_token))


class BertModel(BertPreTrainedModel, hf.BertModel):
    """BERT's encoder with transformers' interface: `from_pretrained`, parameters, outputs."""

    _no_split_modules = ["BertEmbeddings", "BertLayer"]

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[BertForwardKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Tensor, ...]:
        """Encode a batch of texts.

        input_ids, token_type_ids, position_ids: integers [B, S]; inputs_embeds [B, S, E] in place of input_ids.
        attention_mask: see `fastbert.tokens.layout_from_mask`. Returns last_hidden_state [B, S, E] (zeros at padding),
        pooler_output [B, E] (of each text's first kept token), and hidden_states and attentions where asked for.
        Raises IndexError for an id, token type or position out of range, ValueError or TypeError for other bad input.
        """
        refuse_decoder_arguments(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache)
        refuse_unknown_arguments(type(self).forward, kwargs)
        ops.current_backend()
        batch_size, seq_len, device = check_inputs(input_ids, inputs_embeds, self.config.hidden_size)
        token_type_ids = expand_inputs("token_type_ids", token_type_ids, batch_size, seq_len)
        position_ids = expand_inputs("position_ids", position_ids, batch_size, seq_len)
        num_heads, cu_seqlens = self.config.num_attention_heads, kwargs.get("cu_seq_lens_q")
        if cu_seqlens is None:
            layout = layout_from_mask(attention_mask, batch_size, seq_len, num_heads, device)
        else:
            refuse_padding(attention_mask)
            layout = layout_from_cu_seqlens(cu_seqlens.to(device), kwargs.get("max_length_q"), batch_size, seq_len)
            position_ids = layout.restarting_positions() if position_ids is None else position_ids
        if position_ids is None or cu_seqlens is not None:
            check_length(seq_len if cu_seqlens is None else layout.max_seqlen, self.config.max_position_embeddings)
        output_attentions = kwargs.get("output_attentions")
        if output_attentions is None:
            output_attentions = getattr(self.config, "output_attentions", False)

        layout = replace(layout, implementation=self.config._attn_implementation)
        encoder_layout = layout.as_padded() if output_attentions else layout
        hidden_states = self._embed(encoder_layout, input_ids, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encoder(
            hidden_states,
            encoder_layout,
            self._selected_hidden_states(kwargs.get("output_hidden_states")),
            bool(output_attentions),
        )
        sequence_output = encoded.last_hidden_state
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence_output,
            pooler_output=self.pooler(layout.first_tokens(sequence_output)[:, None]) if self.pooler else None,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return_dict = kwargs.get("return_dict")
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _embed(self, layout, input_ids, token_type_ids, position_ids, inputs_embeds) -> Tensor:
        """The embeddings of the kept tokens, in the encoder's layout."""
        inputs = [layout.clear(x) for x in (input_ids, token_type_ids, position_ids, inputs_embeds)]
        embeddings = self.embeddings
        refused = why_not_fused(embeddings)
        try:
            if refused is None:
                _, words, positions, types, norm, _ = embeddings.parts()
                tables = (words.weight, positions.weight, types.weight)
                hidden_states = ops.embed_layer_norm(
                    *inputs, layout.indices, *tables, *_parameters(norm), norm.eps, words.padding_idx
                )
                return hidden_states.view(layout.batch_size, layout.seq_len, -1) if layout.padded else hidden_states
            ops.fall_back("the embeddings", refused, self.device)
            if has_hooks(embeddings) or layout.padded:
                return layout.pack(embeddings(*inputs))
            if position_ids is None:
                inputs[2] = torch.arange(layout.seq_len, device=self.device).expand(layout.batch_size, -1)
            return embeddings(*(x if x is None else layout.pack(x) for x in inputs))
        except IndexError:
            if not is_tracing():
                raise_out_of_range(self.config, *(x if x is None else layout.pack(x) for x in inputs[:3]))
            raise

    def _selected_hidden_states(self, selection: bool | int | Collection[int] | None) -> Collection[int]:
        """The indices of the hidden states to return: 0 is the embeddings' output, -1 the last layer's."""
        if selection is None:
            selection = getattr(self.config, "output_hidden_states", False)
        count = self.config.num_hidden_layers + 1
        if isinstance(selection, bool) or not selection:
            return range(count) if selection else ()
        return {index % count for index in ([selection] if isinstance(selection, int) else selection)}
