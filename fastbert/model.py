"""The whole BERT model (Devlin et al. 2019): embeddings -> layers -> pooler.

Each class derives from the class of the same name in transformers, which builds the modules. The computation runs in
`fastbert.ops` on packed tokens. What the ops do not support runs through the modules, or in transformers' own code on
[B, S, E]. Letters of the shapes as in `fastbert.tokens`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack

from fastbert import ops, patches
from fastbert._compat import MAKES_MASKS, attn_implementation, is_compiled, own_modules, weights_of
from fastbert.configuration import ATTENTION_IMPLEMENTATIONS, attention_implementation
from fastbert.fusion import (
    EmbeddingsParts,
    FusableBlock,
    PoolerParts,
    class_name,
    fused_parts,
    linear_of_any_rank,
    must_see_padding,
    parameters_of,
    runs_in_kernels,
    why_no_block_is_fused,
)
from fastbert.inputs import (
    Batch,
    BertForwardKwargs,
    layers_of,
    looks_up_with_options,
    option,
    raise_out_of_range,
    read_batch,
    reject_decoder_arguments,
    reject_unknown_arguments,
    without_padding,
)
from fastbert.layers import BertEncoder, BertLayer, BertSelfAttention, mask_for, runs_packed
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing
from fastbert.outputs import output_of
from fastbert.pretrained import BertPreTrainedModel
from fastbert.replaying import replays
from fastbert.tokens import TokenLayout


class BertEmbeddings(hf.BertEmbeddings, FusableBlock[EmbeddingsParts]):
    """Word + token type + position embeddings, LayerNorm, dropout: ids [B, S] -> [B, S, E]."""

    ops_used = ("embed_layer_norm",)
    part_classes = (nn.Embedding, nn.Embedding, nn.Embedding, nn.LayerNorm, nn.Dropout)

    def parts(self) -> EmbeddingsParts:
        own = own_modules(self)
        return EmbeddingsParts(
            self, own["word_embeddings"], own["position_embeddings"], own["token_type_embeddings"],
            own["LayerNorm"], own["dropout"],
        )  # fmt: skip

    def unsupported_reason(self, parts: EmbeddingsParts) -> tuple[str | None, bool]:
        if any(map(looks_up_with_options, (parts.words, parts.positions, parts.types))):
            return "an embedding has max_norm, sparse or scale_grad_by_freq set", False
        if parts.positions.padding_idx is not None or parts.types.padding_idx is not None:
            return "an embedding of positions or token types has a padding_idx", False
        return None, False


class BertPooler(hf.BertPooler, FusableBlock[PoolerParts]):
    """tanh(linear(first token)): [B, S, E] -> [B, E]."""

    ops_used = ("linear_activation",)
    part_classes = (nn.Linear, nn.Tanh)

    def parts(self) -> PoolerParts:
        own = own_modules(self)
        return PoolerParts(self, own["dense"], own["activation"])

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts, reason = fused_parts(self)
        if parts is not None:
            return linear_of_any_rank(hidden_states[:, 0], parts.dense, "tanh")
        assert reason is not None
        backend.fall_back("the pooler", reason, hidden_states.device)
        return super().forward(hidden_states)


class BertModel(BertPreTrainedModel, hf.BertModel):
    """BERT with the interface of transformers' BertModel: `from_pretrained`, parameters, outputs."""

    embeddings: BertEmbeddings
    encoder: BertEncoder
    pooler: BertPooler | None

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
        """Encode a batch of sequences.

        input_ids, token_type_ids, position_ids: integers [B, S]; inputs_embeds [B, S, E] replaces input_ids.
        attention_mask: see `fastbert.tokens.layout_from_mask`; keywords: see `BertForwardKwargs`. Returns
        last_hidden_state [B, S, E] (zeros at padding), pooler_output [B, E] (from the first kept token of each
        sequence), and on request hidden_states ([B, S, E] for the embeddings and each layer) and attentions
        ([B, H, S, S] for each layer). Raises IndexError for an id, token type or position out of range (on a GPU
        possibly in a later call), RuntimeError if the back end "triton" is chosen and cannot run, ValueError or
        TypeError for other bad input.
        """
        if replaced := patches.replaced_in_models():
            raise ValueError(f"{replaced}, which fastbert does not run: undo that, or use transformers' class")
        is_decoder = self.config.is_decoder
        if use_cache is None and is_decoder:
            use_cache = self.config.use_cache
        reject_decoder_arguments(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache)
        reject_unknown_arguments(type(self).forward, kwargs)
        backend.current_backend()  # raises for an unknown name, before any work
        batch = read_batch(
            self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_q"),
        )  # fmt: skip
        layout = batch.layout
        backend.raise_bad_ids(layout.cu_seqlens.device)
        implementation = attention_implementation(self.config)
        if implementation != layout.implementation:
            layout = replace(layout, implementation=implementation)
        return_dict = option("return_dict", kwargs, self.config, True)
        # The keywords of transformers' encoder, including what the configuration requests.
        given: dict[str, Any] = {name: value for name, value in kwargs.items() if name != "return_dict"}
        given["position_ids"] = position_ids if position_ids is None else batch.position_ids
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None and (requested := getattr(self.config, name, False)):
                given[name] = requested
        unfused_reason, own_masks = why_no_block_is_fused(), is_decoder or patches.replaced_for_masks(self)
        encoder, pooler = self.encoder, self.pooler
        if own_masks or not runs_packed(encoder):
            sequence_output, hidden_states, attentions = self._encode_as_transformers(
                layout, batch, attention_mask, given, bool(own_masks)
            )
        else:
            needs_padding = given.get("output_attentions") or self._packs_in_pytorch(layout)
            encoder_layout = layout.as_padded() if needs_padding else layout
            # Call `run` directly: `runs_packed` found no hook or patch that the module's call would reach.
            sequence_output, hidden_states, attentions = encoder.run(
                self._embed(encoder_layout, batch, unfused_reason), encoder_layout, given, unfused_reason
            )
        if hidden_states and hidden_states[-1] is not None:
            hidden_states = (*hidden_states[:-1], sequence_output)  # a hook of the encoder may have changed it
        output = output_of(
            BaseModelOutputWithPoolingAndCrossAttentions,
            last_hidden_state=sequence_output,
            pooler_output=None if pooler is None else self._pool(pooler, layout, sequence_output, unfused_reason),
            hidden_states=hidden_states,
            attentions=attentions,
        )
        return output if return_dict else output.to_tuple()

    def _encode_as_transformers(
        self, layout: TokenLayout, batch: Batch, attention_mask: Tensor | None, given: dict, own_masks: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None, tuple[Tensor | None, ...] | None]:
        """Call the encoder as transformers does, with hidden states [B, S, E] and a mask, because it has hooks or was
        replaced, or because the model makes its own masks. Returns the last hidden state, hidden states and attentions,
        with zeros at padding.

        own_masks: the model makes its masks, which may let tokens attend to padding, so padding is embedded as it is.
        """
        layout = layout.as_padded()
        embedded = replace(layout, keep=None) if own_masks else layout
        hidden_states = self._embed(embedded, batch, why_no_block_is_fused())
        if own_masks:
            mask = self._own_mask(layout, attention_mask, hidden_states)
        else:
            mask = mask_for(layers_of(self.encoder), layout, hidden_states)
            if mask is not None and not is_tracing():
                # Our own encoder reads `keep` from the mask, to zero the padding of the states that it returns.
                mask.keep = layout.keep  # type: ignore[attr-defined]
        unused = dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask", "past_key_values"))
        encoded = self.encoder(hidden_states, attention_mask=mask, **unused, use_cache=False, **given)
        states, attentions = getattr(encoded, "hidden_states", None), getattr(encoded, "attentions", None)
        for name, found in ("output_hidden_states", states), ("output_attentions", attentions):
            if given.get(name) and found is None:
                raise ValueError(f"{name} is not supported by a {class_name(self.encoder)}, which returns none")
        if states and getattr(mask, "keep", None) is None:
            states = tuple(map(layout.clear, states))
        return layout.clear(encoded.last_hidden_state), states, attentions

    def _own_mask(self, layout: TokenLayout, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """The mask that the model's own `_create_attention_masks` makes for a padded layout."""
        named = attn_implementation(self.config)
        if named not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"{named} is not supported for a decoder or a patched _create_attention_masks: call "
                "model.set_attn_implementation('sdpa')"
            )
        if attention_mask is None and layout.mask is not None:
            raise ValueError(
                "cu_seq_lens_q is not supported for a decoder or a patched _create_attention_masks: pass one sequence "
                "per row, with an attention_mask"
            )
        # transformers takes [B, S] or a mask of four dimensions.
        padding = attention_mask is not None and attention_mask.ndim == 2
        given = layout.expand(attention_mask) if padding else layout.mask
        others = dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states", "past_key_values"))
        mask, _ = getattr(self, MAKES_MASKS)(attention_mask=given, embedding_output=hidden_states, **others)
        return mask

    def _packs_in_pytorch(self, layout: TokenLayout) -> bool:
        """True if a traced graph would pack in plain PyTorch because some block does not run in kernels. The graph then
        stays padded: compilers must not differentiate the gathers and scatters of packing."""
        if not is_tracing() or layout.indices is None or backend.current_backend() == "triton":
            return False
        return not all(map(runs_in_kernels, (self.embeddings, *self.encoder.layer)))

    def _embed(self, layout: TokenLayout, batch: Batch, unfused_reason: str | None) -> Tensor:
        """The embeddings [T, E] of the kept tokens, or [B, S, E] if padded. unfused_reason: as in `BertEncoder.run`."""
        embeddings, inputs = self.embeddings, batch.embedded()
        parts, reason = (None, unfused_reason) if unfused_reason else fused_parts(embeddings, fusable=True)
        if parts is not None:
            words, positions, types = weights_of((parts.words, parts.positions, parts.types))
            weight, bias = parameters_of(parts.norm)
            first = words if batch.inputs_embeds is None else batch.inputs_embeds
            summed = torch.promote_types(torch.promote_types(first.dtype, positions.dtype), types.dtype)
            if summed != weight.dtype:
                parts, reason = None, f"its sums are {summed} and its LayerNorm {weight.dtype}"
        try:
            if parts is not None:
                inputs = {name: layout.clear(layout.expand(values)) for name, values in inputs.items()}
                hidden_states = ops.embed_layer_norm(
                    **inputs, indices=layout.indices, num_tokens=layout.num_tokens,
                    word_table=words, position_table=positions, token_type_table=types,
                    weight=weight, bias=bias, eps=parts.norm.eps, padding_idx=parts.words.padding_idx,
                )  # fmt: skip
                if parts.dropout.training and parts.dropout.p > 0:
                    hidden_states = F.dropout(hidden_states, parts.dropout.p)
                shape = layout.batch_size, layout.seq_len, hidden_states.shape[1]
                return hidden_states.view(shape) if layout.padded else hidden_states
            assert reason is not None
            backend.fall_back("the embeddings", reason, layout.cu_seqlens.device)
            inputs = without_padding(inputs, layout.as_padded(), embeddings)
            return layout.pack(embeddings(**inputs, past_key_values_length=0))
        except (IndexError, RuntimeError):
            if not is_tracing() and layout.cu_seqlens.device.type == "cpu":
                raise_out_of_range(self.config, embeddings, layout, batch)
            raise

    def _pool(
        self, pooler: nn.Module, layout: TokenLayout, sequence_output: Tensor, unfused_reason: str | None
    ) -> Tensor:
        """The pooler of last_hidden_state [B, S, E]. Our own class needs the first tokens only."""
        if not isinstance(pooler, BertPooler):
            return pooler(sequence_output)
        first = layout.first_tokens(sequence_output)
        parts, _ = (None, None) if unfused_reason else fused_parts(pooler, fusable=True)
        if parts is not None and not is_compiled(pooler) and BertPooler.forward is _OWN_FORWARDS[2]:
            return linear_of_any_rank(first, parts.dense, "tanh")  # no hook or patch would see the module's call
        first = first[:, None]
        if parts is None and must_see_padding(pooler) and len(first) == layout.batch_size:
            first = torch.cat((first, sequence_output[:, 1:]), 1)
        return pooler(first)


replays(BertModel)


def bypassed_forwards() -> tuple[Callable, ...]:
    """The forwards of our own classes that the model bypasses if no hook or patch would see their calls."""
    return BertLayer.forward, BertEncoder.forward, BertPooler.forward


_OWN_FORWARDS = bypassed_forwards()


def why_not_bypassed() -> str | None:
    """Why one of `bypassed_forwards` has to be called: it is patched for every model. None if none is."""
    bypassed: tuple[type[nn.Module], ...] = (BertLayer, BertEncoder, BertPooler)
    for kind, own in zip(bypassed, _OWN_FORWARDS, strict=True):
        if kind.forward is not own:
            return f"{kind.__module__}.{kind.__qualname__}.forward is patched for every model"
    return None


# transformers' class -> ours, which has the same submodules, parameters and attributes.
OURS: dict[type, type] = {
    hf.BertModel: BertModel,
    hf.BertEmbeddings: BertEmbeddings,
    hf.BertEncoder: BertEncoder,
    hf.BertLayer: BertLayer,
    hf.BertSelfAttention: BertSelfAttention,
    hf.BertPooler: BertPooler,
}


def become_ours(root: nn.Module, ours: dict[type, type] = OURS) -> None:
    """Replace the classes of transformers' modules by ours, in place."""
    for module in root.modules():
        module.__class__ = ours.get(type(module), type(module))
