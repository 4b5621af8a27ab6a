"""BERT's encoder (Devlin et al. 2019), whole: embeddings -> layers -> pooler.

Module names, parameters and outputs are transformers'; the work is done by the ops of `fastbert.ops` on packed tokens.
Letters of the shapes as in `fastbert.tokens`. Hidden states between the blocks are [T, E], or [B, S, E] where the
layout drops nothing (`TokenLayout.padded`).
"""

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
from fastbert.fusion import (
    FUSED_ACTIVATIONS,
    FusableBlock,
    LayerParts,
    fused_parts,
    has_hooks,
    must_see_padding,
    parameters_of,
    runs_in_kernels,
)
from fastbert.inputs import (
    Batch,
    BertForwardKwargs,
    option,
    raise_out_of_range,
    read_batch,
    refuse_decoder_arguments,
    refuse_unknown_arguments,
    selected_hidden_states,
)
from fastbert.pretrained import BertPreTrainedModel
from fastbert.tokens import TokenLayout, as_layout


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

    def refusal(self, parts):
        _, words, positions, types, _, _ = parts
        for table in (words, positions, types):
            if table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
                return "an embedding has max_norm, sparse or scale_grad_by_freq set"
        if positions.padding_idx is not None or types.padding_idx is not None:
            return "an embedding of positions or token types has a padding_idx"
        return None

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
    applies_dropout = True

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

    def forward(self, hidden_states: Tensor, layout: TokenLayout):
        """[T, E] or [B, S, E] -> the same, and the attention weights [B, H, S, S] or None."""
        heads = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        q = self.query(hidden_states).view(heads)
        k = self.key(hidden_states).view(heads)
        v = self.value(hidden_states).view(heads)
        dropout = self.dropout.p if self.training else 0.0
        if layout.padded:
            return padded_attention(q, k, v, self.scaling, layout.mask, dropout, layout.implementation)
        bounds = (layout.cu_seqlens, layout.max_seqlen)
        context = varlen_attention(q, k, v, *bounds, self.scaling, dropout, layout.implementation, layout.num_tokens)
        return context, None


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

    def forward(self, hidden_states: Tensor, layout: TokenLayout):
        context, weights = self.self(hidden_states, layout)
        return self.output(context, hidden_states), weights


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


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
        self.num_attention_heads = config.num_attention_heads
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

    def refusal(self, parts):
        return None if self.fused_activation else f"its activation is not one of {', '.join(FUSED_ACTIVATIONS)}"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor | None = None,
        fused: LayerParts | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """[T, E] or [B, S, E] -> the same: in the ops, if given the parts they serve, or through the modules.

        The modules append the attention weights [B, H, S, S] to `attentions`, if given.
        """
        layout = as_layout(attention_mask, hidden_states, self.num_attention_heads)
        if fused is not None:
            if layout.backend == ops.current_backend():
                return self._forward_fused(hidden_states, layout, fused)
            # Gradient checkpointing computes the layer again where the forward's choice ended, or on another thread.
            with ops.backend(layout.backend):
                return self._forward_fused(hidden_states, layout, fused)
        attention_output, weights = self.attention(hidden_states, layout)
        if attentions is not None:
            attentions.append(weights)
        return self.output(self.intermediate(attention_output), attention_output)

    def _forward_fused(self, hidden_states: Tensor, layout: TokenLayout, p: LayerParts) -> Tensor:
        count, bounds = layout.num_tokens, (layout.cu_seqlens, layout.max_seqlen)

        def compute(x, mask, *weights):
            qkv, (attended, norm1, up, down, norm2) = weights[:6], zip(weights[6::2], weights[7::2], strict=True)
            # Nested, so that the queries, keys and values [T, 3, H, D] are gone before the wider feed-forward part.
            x = ops.linear_residual_layer_norm(
                ops.attention(
                    ops.qkv_projection(x, *qkv, self.num_attention_heads, count),
                    *bounds, p.self_attention.scaling, mask, layout.implementation, count,
                ),
                *attended, x, *norm1, p.self_output_norm.eps, count,
            )  # fmt: skip
            y = ops.linear_activation(x, *up, self.fused_activation, count)  # [T, F]
            return ops.linear_residual_layer_norm(y, *down, x, *norm2, p.output_norm.eps, count)

        x = ops.in_one_node(
            compute, hidden_states.flatten(0, 1) if layout.padded else hidden_states, layout.mask,
            *parameters_of(p.query), *parameters_of(p.key), *parameters_of(p.value),
            *parameters_of(p.self_output_dense), *parameters_of(p.self_output_norm),
            *parameters_of(p.intermediate_dense), *parameters_of(p.output_dense), *parameters_of(p.output_norm),
        )  # fmt: skip
        return x.view(hidden_states.shape) if layout.padded else x


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor | None = None,
        output_hidden_states: Collection[int] = (),
        output_attentions: bool = False,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The layers, one after another; unpacks the last hidden state and those that are asked for to [B, S, E]."""
        layout = as_layout(attention_mask, hidden_states, self.config.num_attention_heads)
        states: list[Tensor | None] = []
        attentions: list[Tensor] | None = [] if output_attentions else None
        for index, layer in enumerate(self.layer):
            if index in output_hidden_states:
                states.append(layout.unpack(hidden_states))
                # The model goes on from the state it returns, so that gradients can be read there; in a traced graph,
                # one node, no output has a gradient in another.
                if torch.is_grad_enabled() and not is_tracing():
                    hidden_states = layout.pack(states[-1])
            else:
                states.append(None)
            hidden_states = self._run(layer, hidden_states, layout, attentions)
        last_hidden_state = layout.unpack(hidden_states)
        states.append(last_hidden_state if len(self.layer) in output_hidden_states else None)
        if attentions and layout.keep is not None:
            attentions = [weights * layout.keep.to(weights.device)[:, None, :, None] for weights in attentions]
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last_hidden_state,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=None if attentions is None else tuple(attentions),
        )

    def _run(self, layer: nn.Module, hidden_states: Tensor, layout: TokenLayout, attentions: list | None) -> Tensor:
        """One layer: in the ops, through its modules, or through them in the shapes of transformers."""
        parts, refused = fused_parts(layer) if attentions is None else (None, "attention weights are asked for")
        if parts is not None:
            return layer(hidden_states, layout, parts)
        ops.fall_back("an encoder layer", refused, hidden_states.device)
        if attentions is not None:
            return layer(hidden_states, layout, attentions=attentions)
        if must_see_padding(layer):
            return layout.pack(layer(layout.unpack(hidden_states), layout.as_padded()))
        return layer(layout.clear_past_tokens(hidden_states), layout)


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
        parts, refused = fused_parts(self)
        if parts is not None:
            return ops.linear_activation(first_token, *parameters_of(parts[1]), "tanh")
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
        ops.current_backend()  # raises for a name of no back end, before any work
        batch = read_batch(
            self.config, self.embeddings, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_q"),
        )  # fmt: skip
        ops.raise_bad_ids(batch.layout.cu_seqlens.device)
        output_attentions = option("output_attentions", kwargs, self.config, False)
        layout = replace(batch.layout, implementation=self.config._attn_implementation)
        # What hooks the encoder, or wants attention weights, sees nothing dropped.
        sees_padding = output_attentions or has_hooks(self.encoder) or self._packs_in_pytorch(layout)
        encoder_layout = layout.as_padded() if sees_padding else layout
        if output_attentions:
            encoder_layout = replace(encoder_layout, implementation="eager")
        selection = option("output_hidden_states", kwargs, self.config, False)
        selection = selected_hidden_states(selection, self.config.num_hidden_layers + 1)
        hidden_states = self._embed(encoder_layout, batch)
        encoded = self.encoder(hidden_states, encoder_layout, selection, bool(output_attentions))
        sequence_output = encoded.last_hidden_state
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence_output,
            pooler_output=None if self.pooler is None else self._pool(layout, sequence_output),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if option("return_dict", kwargs, self.config, True) else output.to_tuple()

    def _packs_in_pytorch(self, layout: TokenLayout) -> bool:
        """Whether a traced graph would hold packing in plain PyTorch, beside a block that no kernels serve: its gathers
        and scatters have gradients that are better not left to a compiler."""
        if not is_tracing() or layout.indices is None or ops.current_backend() == "triton":
            return False
        return not all(map(runs_in_kernels, (self.embeddings, *self.encoder.layer)))

    def _embed(self, layout: TokenLayout, batch: Batch) -> Tensor:
        """The embeddings of the kept tokens, in the encoder's layout."""
        inputs = {name: layout.clear(values) for name, values in batch.embedded().items()}
        embeddings = self.embeddings
        parts, refused = fused_parts(embeddings)
        try:
            if parts is not None:
                _, words, positions, types, norm, _ = parts
                hidden_states = ops.embed_layer_norm(
                    **inputs, indices=layout.indices, num_tokens=layout.num_tokens,
                    word_table=words.weight, position_table=positions.weight, token_type_table=types.weight,
                    weight=norm.weight, bias=norm.bias, eps=norm.eps, padding_idx=words.padding_idx,
                )  # fmt: skip
                shape = layout.batch_size, layout.seq_len
                return hidden_states.unflatten(0, shape) if layout.padded else hidden_states
            ops.fall_back("the embeddings", refused, layout.cu_seqlens.device)
            if layout.padded or must_see_padding(embeddings):
                inputs = {name: layout.as_padded().clear(values) for name, values in inputs.items()}
                return layout.pack(embeddings(**inputs))
            if inputs["position_ids"] is None:
                inputs["position_ids"] = layout.columns()
            return embeddings(**{name: x if x is None else layout.pack_cleared(x) for name, x in inputs.items()})
        except IndexError:
            if not is_tracing():
                raise_out_of_range(self.config, embeddings, layout, batch)
            raise

    def _pool(self, layout: TokenLayout, sequence_output: Tensor) -> Tensor:
        """What the pooler makes of last_hidden_state [B, S, E]: its own class needs no more than the first tokens."""
        if not isinstance(self.pooler, BertPooler):
            return self.pooler(sequence_output)
        first = layout.first_tokens(sequence_output)[:, None]
        parts, _ = fused_parts(self.pooler)
        if parts is None and must_see_padding(self.pooler) and len(first) == layout.batch_size:
            first = torch.cat((first, sequence_output[:, 1:]), 1)
        return self.pooler(first)
