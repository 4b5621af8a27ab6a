"""BERT's layers and the encoder that runs them (Devlin et al. 2019, Vaswani et al. 2017), on packed tokens.

A layer runs in one of three ways: in the fused ops, through its modules on packed tokens, or in transformers' own code
on [B, S, E]. Hidden states between layers are [T, E], or [B, S, E] if the layout is padded. Letters of the shapes as in
`fastbert.tokens`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert import modeling_bert as hf

from fastbert import patches
from fastbert._compat import (
    attn_implementation,
    has_global_module_hooks,
    is_compiled,
    own_modules,
    own_modules_of,
    own_parameters,
    weights_and_biases,
)
from fastbert.configuration import ATTENTION_IMPLEMENTATIONS, attention_implementation
from fastbert.encoder_layer import LayerNumbers, LayerWeights, encoder_layer
from fastbert.fusion import (
    ACTIVATIONS,
    FUSED_ACTIVATIONS,
    FusableBlock,
    LayerParts,
    class_name,
    dropout_reason,
    fused_activation,
    fused_parts,
    has_hooks,
    has_patched_forward,
    is_plain_number,
    must_see_padding,
    why_no_block_is_fused,
)
from fastbert.inputs import head_counts, reject_decoder_arguments, selected_hidden_states
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing
from fastbert.ops.eager import padded_attention, varlen_attention
from fastbert.tokens import TokenLayout, layout_from_score_mask


class BertSelfAttention(hf.BertSelfAttention):
    def forward(  # type: ignore[override]  # transformers annotates a tuple of one, and returns two
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor | None = None,
        past_key_values: hf.Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, E] with a packed layout, otherwise [B, S, E] -> the same shape, and the attention weights [B, H, S, S] or
        None.

        With output_attentions the weights are computed whichever attention the configuration names.
        """
        named, needs_weights = attn_implementation(self.config), bool(kwargs.get("output_attentions"))
        if attention_mask is not None:  # `device_map` can place layers on different devices
            attention_mask = attention_mask.to(hidden_states.device)
        theirs = named in ATTENTION_IMPLEMENTATIONS and (named == "eager" or not needs_weights)
        if theirs and not isinstance(attention_mask, TokenLayout) and hidden_states.numel():
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)  # type: ignore[return-value]
        size, dropout = self.attention_head_size, self.dropout.p if self.training else 0.0
        projected = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        q, k, v = (x.view(*x.shape[:-1], x.shape[-1] // size, size) for x in projected)
        if not isinstance(attention_mask, TokenLayout):
            if self.is_causal and not needs_weights and named not in ATTENTION_IMPLEMENTATIONS:
                raise ValueError(
                    f"{named} is not supported for causal attention: call model.set_attn_implementation('sdpa')"
                )
            implementation = "eager" if needs_weights else "sdpa"
            return padded_attention(q, k, v, self.scaling, attention_mask, dropout, implementation)
        layout = attention_mask
        context = varlen_attention(
            q, k, v, layout.cu_seqlens, layout.max_seqlen, self.scaling, dropout, layout.implementation,
            layout.num_tokens,
        )  # fmt: skip
        return context, None


class BertLayer(hf.BertLayer, FusableBlock[LayerParts]):
    ops_used = (
        "qkv_projection",
        "attention",
        "linear_residual_layer_norm",
        "linear_activation",
        "linear_residual_layer_norm",
    )
    part_classes = (
        hf.BertAttention, BertSelfAttention, nn.Linear, nn.Linear, nn.Linear, nn.Dropout,
        hf.BertSelfOutput, nn.Linear, nn.LayerNorm, nn.Dropout,
        hf.BertIntermediate, nn.Linear, None,
        hf.BertOutput, nn.Linear, nn.LayerNorm, nn.Dropout,
    )  # fmt: skip

    def parts(self) -> LayerParts:
        own = own_modules(self)
        attention, intermediate, output = own["attention"], own["intermediate"], own["output"]
        of_attention, i, o = own_modules_of(attention, intermediate, output)
        self_attention, self_output = of_attention["self"], of_attention["output"]
        a, s = own_modules_of(self_attention, self_output)
        return LayerParts(
            self, attention, self_attention, a["query"], a["key"], a["value"], a["dropout"],
            self_output, s["dense"], s["LayerNorm"], s["dropout"],
            intermediate, i["dense"], i["intermediate_act_fn"],
            output, o["dense"], o["LayerNorm"], o["dropout"],
        )  # fmt: skip

    def head_size(self) -> int:
        return self.attention.self.attention_head_size

    def dropouts(self, parts: LayerParts) -> tuple[float, ...]:
        after_attention, after_feed_forward = parts.self_output_dropout, parts.output_dropout
        # Attention applies dropout itself, by its own training flag, and never calls its dropout module.
        return (
            parts.attention_dropout.p if parts.self_attention.training else 0.0,
            after_attention.p if after_attention.training else 0.0,
            after_feed_forward.p if after_feed_forward.training else 0.0,
        )

    def unsupported_reason(self, parts: LayerParts) -> tuple[str | None, bool]:
        attention = parts.self_attention
        if attention.is_causal:
            return "its attention is causal", True
        if not is_plain_number(attention.scaling):
            return f"attention.self.scaling is {attention.scaling}, not a number on the host", True
        if "feed_forward_chunk" in self.__dict__:
            return "has a patched feed_forward_chunk", True
        # Modules other than nn.Linear may have no weight.
        weights = [own_parameters(x).get("weight") for x in (parts.query, parts.key, parts.value)]
        widths = {int(x.shape[0]) for x in weights if x is not None}  # int: while tracing, sizes are tensors
        if len(widths) > 1 or any(width % attention.attention_head_size for width in widths):
            return f"queries, keys and values cannot be cut into heads of {attention.attention_head_size}", True
        activation = parts.intermediate_activation
        if fused_activation(activation) is None:
            known = ", ".join(dict.fromkeys(FUSED_ACTIVATIONS.values()))
            elementwise = type(activation) in ACTIVATIONS and "act" not in activation.__dict__
            return f"intermediate_act_fn, a {class_name(activation)}, computes none of {known}", not elementwise
        return None, False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: hf.Cache | None = None,
        fused: LayerParts | None = None,
        trained: bool = False,
        attentions: list[Tensor | None] | None = None,
        **kwargs,
    ) -> Tensor:
        """[T, E] or [B, S, E] -> the same shape.

        fused: this layer's parts, to run them in the ops; attention_mask is then a layout. trained: the result of
        `trains_in_kernels`, for fused parts. attentions: a list to which the attention weights [B, H, S, S] are
        appended. Without both, a mask or None runs transformers' own code.
        """
        if fused is not None:
            assert isinstance(attention_mask, TokenLayout)
            layout = attention_mask.to(hidden_states.device)
            if layout.backend == backend.current_backend():
                return self._forward_fused(hidden_states, layout, fused, trained)
            # Gradient checkpointing recomputes the layer outside of the caller's block, possibly on another thread.
            with backend.backend(layout.backend):
                return self._forward_fused(hidden_states, layout, fused, trained)
        if attentions is None and not isinstance(attention_mask, TokenLayout):
            given = (encoder_hidden_states, encoder_attention_mask, past_key_values)
            reject_decoder_arguments(*given, use_cache=None)
            return super().forward(hidden_states, attention_mask, *given, **kwargs)
        hidden_states, weights = self.attention(hidden_states, attention_mask, past_key_values=None, **kwargs)
        if attentions is not None:
            attentions.append(weights)
        return self.feed_forward_chunk(hidden_states)

    def _forward_fused(self, hidden_states: Tensor, layout: TokenLayout, p: LayerParts, trained: bool) -> Tensor:
        weights = LayerWeights(
            *weights_and_biases(
                (p.query, p.key, p.value, p.self_output_dense, p.self_output_norm, p.intermediate_dense,
                 p.output_dense, p.output_norm)
            )
        )  # fmt: skip
        head_size, activation = p.self_attention.attention_head_size, fused_activation(p.intermediate_activation)
        assert activation is not None
        numbers = LayerNumbers(
            int(weights.q_weight.shape[0]) // head_size, head_size, float(p.self_attention.scaling),
            activation, (p.self_output_norm.eps, p.output_norm.eps), self.dropouts(p),
        )  # fmt: skip
        x = encoder_layer(
            hidden_states.flatten(0, 1) if layout.padded else hidden_states, weights, numbers, layout.cu_seqlens,
            layout.max_seqlen, layout.mask, layout.implementation, layout.num_tokens, trained,
        )  # fmt: skip
        return x.view(hidden_states.shape) if layout.padded else x


def trains_in_kernels(layer: BertLayer, hidden_states: Tensor, layout: TokenLayout) -> bool:
    """True if kernels would run this fusable layer on these hidden states, with its dropout and its gradients.

    Only the caller of a layer asks: inside a compiled call or a recomputation the answer could be another one.
    """
    return layout.mask is None and backend.trains_layers(hidden_states, layer.head_size())


def is_causal(layer: nn.Module) -> bool:
    """True if the attention of a layer, which may be of any class, is causal when it gets no mask."""
    attention = getattr(getattr(layer, "attention", None), "self", None)
    return bool(getattr(attention, "is_causal", False))


def mask_for(layers: Iterable[nn.Module], layout: TokenLayout, hidden_states: Tensor) -> Tensor | None:
    """The mask of a padded layout, in the form of transformers' layers."""
    if layout.keep is not None and any(map(is_causal, layers)) and not is_tracing() and layout.keep.all():
        return None  # transformers also drops a mask without padding, and then is_causal decides
    return layout.attention_mask(hidden_states)


def runs_packed(encoder: nn.Module) -> bool:
    """True if the encoder is our own class and no hook, patch or compiled call can see its arguments."""
    observed = has_hooks(encoder) or has_patched_forward(encoder) or has_global_module_hooks()
    own = type(encoder) is BertEncoder and BertEncoder.forward is _OWN_ENCODER_FORWARD
    return own and not observed and not is_compiled(encoder)


class BertEncoder(hf.BertEncoder):
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: hf.Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the layers. Returns the last hidden state and the requested ones as [B, S, E].

        attention_mask: a layout, or what transformers' encoder takes, a score mask or None. output_hidden_states and
        output_attentions work as in the model. Layers that run transformers' own code get all keywords.
        """
        reject_decoder_arguments(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache)
        layout = attention_mask
        if not isinstance(layout, TokenLayout):
            layout = layout_from_score_mask(layout, hidden_states, head_counts(self, self.config))
            keep, implementation = getattr(attention_mask, "keep", None), attention_implementation(self.config)
            layout = replace(layout, keep=keep, implementation=implementation)
        last_hidden_state, states, attentions = self.run(hidden_states, layout, kwargs, why_no_block_is_fused())
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last_hidden_state,
            hidden_states=states,  # type: ignore[arg-type]  # None for a state that was not requested
            attentions=attentions,  # type: ignore[arg-type]  # None for a layer without weights
        )

    def run(
        self, hidden_states: Tensor, layout: TokenLayout, given: Mapping[str, Any], unfused_reason: str | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None, tuple[Tensor | None, ...] | None]:
        """Last hidden state, hidden states and attentions. given: the keywords of forward. unfused_reason: the result
        of `why_no_block_is_fused`."""
        layout, layers = layout.to(hidden_states.device), list(self.layer)
        selection = selected_hidden_states(given.get("output_hidden_states"), len(layers) + 1)
        output_attentions = given.get("output_attentions")
        if output_attentions:
            layout, unfused_reason = replace(layout, implementation="eager"), "attention weights are asked for"
        states: list[Tensor | None] = []
        attentions: list[Tensor | None] | None = [] if output_attentions else None
        for index, layer in enumerate(layers):
            if index in selection:
                state = layout.unpack(hidden_states)
                states.append(state)
                # Continue from the returned state, so that it gets a gradient. A traced graph is one autograd node, in
                # which no output gets the gradient of another.
                if torch.is_grad_enabled() and not is_tracing():
                    hidden_states = layout.pack(state)
            else:
                states.append(None)
            hidden_states = self._run(layer, hidden_states, layout, attentions, unfused_reason, given)
        last_hidden_state = layout.unpack(hidden_states)
        states.append(last_hidden_state if len(layers) in selection else None)
        return (
            last_hidden_state,
            tuple(states) if selection else None,
            None if attentions is None else tuple(attentions),
        )

    def _run(
        self, layer: nn.Module, hidden_states: Tensor, layout: TokenLayout, attentions: list | None,
        unfused_reason: str | None, given: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """Run one layer: in the ops, through its modules on packed tokens, or in transformers' own code, called as
        transformers calls it."""
        parts, reason = None, unfused_reason
        if not unfused_reason:
            parts, reason = fused_parts(layer, fusable=True, drops=True)
        if parts is not None:
            assert isinstance(layer, BertLayer)
            trained = (layer.training or torch.is_grad_enabled()) and trains_in_kernels(layer, hidden_states, layout)
            reason = None if trained else dropout_reason(layer, parts)
            if reason is None:
                own = not is_compiled(layer) and BertLayer.forward is _OWN_LAYER_FORWARD
                if torch.is_grad_enabled() or is_tracing() or not own:  # a trace must not depend on grad mode
                    return layer(hidden_states, layout, fused=parts, trained=trained)
                return layer._forward_fused(hidden_states, layout.to(hidden_states.device), parts, trained)
        assert reason is not None
        backend.fall_back("an encoder layer", reason, hidden_states.device)
        if not layout.padded and not unfused_reason and not must_see_padding(layer, fusable=True):
            return layer(layout.clear_past_tokens(hidden_states), layout)
        mask = mask_for([layer], layout.as_padded(), hidden_states)
        extra = {}
        if attentions is not None:
            own = isinstance(layer, BertLayer) and not has_patched_forward(layer)
            if own and not patches.replaced_forward(hf.BertLayer):
                extra = {"attentions": attentions}
            elif any(isinstance(module, hf.BertSelfAttention) for module in layer.modules()):
                raise ValueError(
                    f"output_attentions is not supported for a {class_name(layer)} whose forward is patched or "
                    "wrapped: undo that, or leave output_attentions out"
                )
        hidden_states = hidden_states if layout.padded else layout.unpack(hidden_states)
        unused = dict.fromkeys(("encoder_attention_mask", "past_key_values"))
        return layout.pack(layer(hidden_states, mask, None, **unused, **given, **extra))


_OWN_LAYER_FORWARD, _OWN_ENCODER_FORWARD = BertLayer.forward, BertEncoder.forward
