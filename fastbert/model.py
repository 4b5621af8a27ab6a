"""BERT's encoder (Devlin et al. 2019), whole: embeddings -> layers -> pooler.

Each class derives from transformers' of its name, which builds it; the work is done by the ops of `fastbert.ops` on
packed tokens. What the ops do not serve runs through the modules, by transformers' own code in its own shapes. Letters
of the shapes as in `fastbert.tokens`. Hidden states between the blocks are [T, E], or [B, S, E] where the layout drops
nothing (`TokenLayout.padded`).
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack

from fastbert import ops, patches
from fastbert.configuration import ATTENTION_IMPLEMENTATIONS, attention_implementation
from fastbert.eager import is_tracing, padded_attention, varlen_attention
from fastbert.fusion import (
    FUSED_ACTIVATIONS,
    FusableBlock,
    LayerParts,
    fused_activation,
    fused_parts,
    has_hooks,
    has_patched_forward,
    is_number,
    looks_along,
    must_see_padding,
    parameters_of,
    why_no_block,
)
from fastbert.inputs import (
    Batch,
    BertForwardKwargs,
    head_counts,
    looks_up_with_options,
    option,
    raise_out_of_range,
    read_batch,
    refuse_decoder_arguments,
    refuse_unknown_arguments,
    selected_hidden_states,
    without_padding,
)
from fastbert.pretrained import BertPreTrainedModel
from fastbert.tokens import TokenLayout, as_layout

CAUSAL = "its attention is causal"


class BertEmbeddings(hf.BertEmbeddings, FusableBlock):
    """Word + token type + position embeddings, LayerNorm, dropout: ids [B, S] -> [B, S, E]."""

    ops_used = ("embed_layer_norm",)
    made_of = (nn.Embedding, nn.Embedding, nn.Embedding, nn.LayerNorm, nn.Dropout)

    def parts(self):
        own = self._modules
        return (
            self, own["word_embeddings"], own["position_embeddings"], own["token_type_embeddings"],
            own["LayerNorm"], own["dropout"],
        )  # fmt: skip

    def refusal(self, parts):
        _, words, positions, types, _, _ = parts
        if any(map(looks_up_with_options, (words, positions, types))):
            return "an embedding has max_norm, sparse or scale_grad_by_freq set"
        if positions.padding_idx is not None or types.padding_idx is not None:
            return "an embedding of positions or token types has a padding_idx"
        return None


class BertSelfAttention(hf.BertSelfAttention):
    applies_dropout = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor | None = None,
        past_key_values: None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, E] of a packed layout, or [B, S, E] -> the same, and the attention weights [B, H, S, S] or None.

        output_attentions computes the weights by whatever attention the configuration names.
        """
        named, weights_asked = self.config._attn_implementation, bool(kwargs.get("output_attentions"))
        packed = isinstance(attention_mask, TokenLayout)
        # Not on the layer's device yet where `device_map` spreads the layers over several.
        mask = attention_mask.to(hidden_states.device) if attention_mask is not None else None
        serves = named in ATTENTION_IMPLEMENTATIONS and (named == "eager" or not weights_asked)
        if serves and not packed and hidden_states.numel():
            return super().forward(hidden_states, mask, past_key_values, **kwargs)
        size, dropout = self.attention_head_size, self.dropout.p if self.training else 0.0
        projected = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        q, k, v = (x.view(*x.shape[:-1], x.shape[-1] // size, size) for x in projected)
        if not packed:
            return padded_attention(q, k, v, self.scaling, mask, dropout, "eager" if weights_asked else "sdpa")
        bounds, layout = (mask.cu_seqlens, mask.max_seqlen), mask
        context = varlen_attention(q, k, v, *bounds, self.scaling, dropout, layout.implementation, layout.num_tokens)
        return context, None


class BertLayer(hf.BertLayer, FusableBlock):
    ops_used = (
        "qkv_projection",
        "attention",
        "linear_residual_layer_norm",
        "linear_activation",
        "linear_residual_layer_norm",
    )
    made_of = (
        hf.BertAttention, BertSelfAttention, nn.Linear, nn.Linear, nn.Linear, nn.Dropout,
        hf.BertSelfOutput, nn.Linear, nn.LayerNorm, nn.Dropout,
        hf.BertIntermediate, nn.Linear, None,
        hf.BertOutput, nn.Linear, nn.LayerNorm, nn.Dropout,
    )  # fmt: skip

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
        attention, q, k, v = parts[2:6]
        widths = {x._parameters["weight"].shape[0] for x in (q, k, v)}
        if len(widths) > 1 or widths.pop() % attention.attention_head_size:
            return f"queries, keys and values cannot be cut into heads of {attention.attention_head_size}"
        if fused_activation(parts.intermediate_activation) is None:
            return f"its activation is not one of {', '.join(dict.fromkeys(FUSED_ACTIVATIONS.values()))}"
        return None

    def foreign(self, parts):
        attention = parts.self_attention
        if attention.is_causal:
            return CAUSAL
        if not is_number(attention.scaling):
            return f"attention.self.scaling is {attention.scaling}, no number that the host knows"
        if "feed_forward_chunk" in self.__dict__:
            return "has a patched feed_forward_chunk"
        return "its activation may look along a text" if looks_along(parts.intermediate_activation) else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_values: None = None,
        fused: LayerParts | None = None,
        attentions: list[Tensor | None] | None = None,
        **kwargs,
    ) -> Tensor:
        """[T, E] or [B, S, E] -> the same: in the ops, if given the parts they serve, or through the modules.

        The modules append the attention weights [B, H, S, S] to `attentions`, if given. With a mask as transformers'
        layers take it, or None, everything is transformers'.
        """
        if fused is not None:
            return self._forward_fused(hidden_states, attention_mask.to(hidden_states.device), fused)
        packed = isinstance(attention_mask, TokenLayout)
        if not packed and attentions is None:
            given = (encoder_hidden_states, encoder_attention_mask, past_key_values)
            refuse_decoder_arguments(*given, use_cache=None)
            return super().forward(hidden_states, attention_mask, *given, **kwargs)
        asked = {} if attentions is None else {"output_attentions": True}
        hidden_states, weights = self.attention(hidden_states, attention_mask, **asked)
        if attentions is not None:
            attentions.append(weights)
        return self.feed_forward_chunk(hidden_states)

    def _forward_fused(self, hidden_states: Tensor, layout: TokenLayout, p: LayerParts) -> Tensor:
        count, bounds = layout.num_tokens, (layout.cu_seqlens, layout.max_seqlen)
        num_heads = p.query._parameters["weight"].shape[0] // p.self_attention.attention_head_size
        activation = fused_activation(p.intermediate_activation)

        def compute(x, *weights):
            qkv, (attended, norm1, up, down, norm2) = weights[:6], zip(weights[6::2], weights[7::2], strict=True)
            # Nested, so that the queries, keys and values [T, 3, H, D] are gone before the wider feed-forward part.
            x = ops.linear_residual_layer_norm(
                ops.attention(
                    ops.qkv_projection(x, *qkv, num_heads, count),
                    *bounds, float(p.self_attention.scaling), layout.mask, layout.implementation, count,
                ),
                *attended, x, *norm1, p.self_output_norm.eps, count,
            )  # fmt: skip
            y = ops.linear_activation(x, *up, activation, count)  # [T, F]
            return ops.linear_residual_layer_norm(y, *down, x, *norm2, p.output_norm.eps, count)

        x = ops.in_one_node(
            compute, hidden_states.flatten(0, 1) if layout.padded else hidden_states,
            *parameters_of(p.query), *parameters_of(p.key), *parameters_of(p.value),
            *parameters_of(p.self_output_dense), *parameters_of(p.self_output_norm),
            *parameters_of(p.intermediate_dense), *parameters_of(p.output_dense), *parameters_of(p.output_norm),
        )  # fmt: skip
        return x.view(hidden_states.shape) if layout.padded else x


class BertEncoder(hf.BertEncoder):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Collection[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The layers, one after another; unpacks the last hidden state and those that are asked for to [B, S, E]."""
        refuse_decoder_arguments(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache)
        layout = as_layout(attention_mask, hidden_states, head_counts(self))
        selection = selected_hidden_states(output_hidden_states, len(self.layer) + 1)
        states: list[Tensor | None] = []
        attentions: list[Tensor] | None = [] if output_attentions else None
        refused = "attention weights are asked for" if output_attentions else why_no_block()
        for index, layer in enumerate(self.layer):
            if index in selection:
                states.append(layout.unpack(hidden_states))
                # The model goes on from the state it returns, so that gradients can be read there.
                hidden_states = layout.pack(states[-1]) if torch.is_grad_enabled() else hidden_states
            else:
                states.append(None)
            hidden_states = self._run(layer, hidden_states, layout, attentions, refused)
        last_hidden_state = layout.unpack(hidden_states)
        states.append(last_hidden_state if len(self.layer) in selection else None)
        if attentions and layout.keep is not None:
            attentions = [weights * layout.keep.to(weights.device)[:, None, :, None] for weights in attentions]
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last_hidden_state,
            hidden_states=tuple(states) if selection else None,
            attentions=None if attentions is None else tuple(attentions),
        )

    def _run(
        self, layer: nn.Module, hidden_states: Tensor, layout: TokenLayout, attentions: list | None, refused: str | None
    ) -> Tensor:
        """One layer: in the ops, through its modules, or through them in the shapes of transformers."""
        parts, refused = (None, refused) if refused else fused_parts(layer, asked=True)
        if parts is not None:
            return layer(hidden_states, layout, fused=parts)
        ops.fall_back("an encoder layer", refused, hidden_states.device)
        if not layout.padded and not must_see_padding(layer):
            return layer(layout.clear_past_tokens(hidden_states), layout)
        padded = layout.as_padded()
        mask = padded.attention_mask(hidden_states)
        if refused is CAUSAL and padded.keep is not None and padded.keep.all():
            mask = None  # as transformers leaves it out, and then goes by the module
        returns_weights = attentions is not None and isinstance(layer, BertLayer) and not has_patched_forward(layer)
        asked = {"attentions": attentions} if returns_weights else {}
        hidden_states = hidden_states if layout.padded else layout.unpack(hidden_states)
        return layout.pack(layer(hidden_states, mask, **asked))


class BertPooler(hf.BertPooler, FusableBlock):
    """tanh of a linear of the first token: [B, S, E] -> [B, E]."""

    ops_used = ("linear_activation",)
    made_of = (nn.Linear, nn.Tanh)

    def parts(self):
        return self, self._modules["dense"], self._modules["activation"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts, refused = fused_parts(self)
        if parts is not None:
            return ops.linear_activation(hidden_states[:, 0], *parameters_of(parts[1]), "tanh")
        ops.fall_back("the pooler", refused, hidden_states.device)
        return super().forward(hidden_states)


class BertModel(BertPreTrainedModel, hf.BertModel):
    """BERT's encoder with transformers' interface: `from_pretrained`, parameters, outputs."""

    def post_init(self):
        become_ours(self)
        super().post_init()

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
        if use_cache is None and self.config.is_decoder:
            use_cache = self.config.use_cache
        refuse_decoder_arguments(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache)
        refuse_unknown_arguments(type(self).forward, kwargs)
        ops.current_backend()  # raises for a name of no back end, before any work
        batch = read_batch(
            self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_q"),
        )  # fmt: skip
        ops.raise_bad_ids(batch.layout.cu_seqlens.device)
        output_attentions = option("output_attentions", kwargs, self.config, False)
        layout = replace(batch.layout, implementation=attention_implementation(self.config))
        # What hooks the encoder, or wants attention weights, sees nothing dropped.
        encoder_layout = layout.as_padded() if output_attentions or has_hooks(self.encoder) else layout
        if output_attentions:
            encoder_layout = replace(encoder_layout, implementation="eager")
        masks_of_its_own = self.config.is_decoder or patches.found_for_masks(self)
        hidden_states = self._embed(encoder_layout.as_padded() if masks_of_its_own else encoder_layout, batch)
        if masks_of_its_own:
            encoder_layout = self._masked_as_by_transformers(encoder_layout, attention_mask, hidden_states)
        encoded = self.encoder(
            hidden_states,
            encoder_layout,
            output_hidden_states=option("output_hidden_states", kwargs, self.config, False),
            output_attentions=output_attentions,
        )
        sequence_output = encoded.last_hidden_state
        hidden_states = encoded.hidden_states
        if hidden_states and hidden_states[-1] is not None:
            hidden_states = (*hidden_states[:-1], sequence_output)  # which a hook of the encoder may have changed
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence_output,
            pooler_output=None if self.pooler is None else self._pool(layout, sequence_output),
            hidden_states=hidden_states,
            attentions=encoded.attentions,
        )
        return output if option("return_dict", kwargs, self.config, True) else output.to_tuple()

    def _masked_as_by_transformers(
        self, layout: TokenLayout, attention_mask: Tensor | None, hidden_states: Tensor
    ) -> TokenLayout:
        """The layout with nothing dropped, and the mask that the model's own `_create_attention_masks` makes."""
        layout = layout.as_padded()
        if attention_mask is None and layout.mask is not None:
            raise ValueError("texts packed by cu_seq_lens_q have the mask that keeps them apart, and no other")
        given = dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states", "past_key_values"))
        mask, _ = self._create_attention_masks(attention_mask=attention_mask, embedding_output=hidden_states, **given)
        return replace(layout, mask=mask)

    def _embed(self, layout: TokenLayout, batch: Batch) -> Tensor:
        """The embeddings of the kept tokens, in the encoder's layout."""
        embeddings, inputs = self.embeddings, batch.embedded()
        parts, refused = fused_parts(embeddings)
        if parts is not None:
            first = parts[1].weight if batch.inputs_embeds is None else batch.inputs_embeds
            summed = torch.promote_types(torch.promote_types(first.dtype, parts[2].weight.dtype), parts[3].weight.dtype)
            if summed != parts[4].weight.dtype:
                parts, refused = None, f"its sums are {summed} and its LayerNorm {parts[4].weight.dtype}"
        try:
            if parts is not None:
                _, words, positions, types, norm, _ = parts
                inputs = {name: layout.clear(layout.expand(values)) for name, values in inputs.items()}
                hidden_states = ops.embed_layer_norm(
                    **inputs, indices=layout.indices, num_tokens=layout.num_tokens,
                    word_table=words.weight, position_table=positions.weight, token_type_table=types.weight,
                    weight=norm.weight, bias=norm.bias, eps=norm.eps, padding_idx=words.padding_idx,
                )  # fmt: skip
                return (
                    hidden_states.unflatten(0, (layout.batch_size, layout.seq_len)) if layout.padded else hidden_states
                )
            ops.fall_back("the embeddings", refused, layout.cu_seqlens.device)
            return layout.pack(embeddings(**without_padding(inputs, layout.as_padded(), embeddings)))
        except (IndexError, RuntimeError):
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


# transformers' class -> ours, which has the same parts, parameters and attributes.
OURS = {
    hf.BertModel: BertModel,
    hf.BertEmbeddings: BertEmbeddings,
    hf.BertEncoder: BertEncoder,
    hf.BertLayer: BertLayer,
    hf.BertSelfAttention: BertSelfAttention,
    hf.BertPooler: BertPooler,
}


def become_ours(root: nn.Module) -> None:
    """Give transformers' modules, as they are built, the classes of this file."""
    for module in root.modules():
        module.__class__ = OURS.get(type(module), type(module))
