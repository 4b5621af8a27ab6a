"""What `BertModel.forward` accepts; the error for anything else names the value, the limit and the way out."""

import inspect
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from fastbert.configuration import BertConfig


class BertForwardKwargs(TypedDict, total=False):
    """The keywords that every `forward` takes beyond its signature; any other is refused.

    cu_seq_lens_q and the four after it are those of `DataCollatorWithFlattening`: input_ids is one row [1, T] of texts
    laid end to end, cu_seq_lens_q [N + 1] bounds them, and pooler_output is [N, E].
    """

    output_attentions: bool | None
    output_hidden_states: bool | int | list[int] | None
    return_dict: bool | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None
    seq_idx: Tensor | None


KEYWORDS = tuple(BertForwardKwargs.__annotations__)


def refuse_decoder_arguments(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache) -> None:
    given = {
        "encoder_hidden_states": encoder_hidden_states is not None,
        "encoder_attention_mask": encoder_attention_mask is not None,
        "past_key_values": past_key_values is not None,
        "use_cache=True": bool(use_cache),
    }
    if any(given.values()):
        names = ", ".join(name for name, is_given in given.items() if is_given)
        raise ValueError(f"{names}: only encoders are served, use transformers.BertLMHeadModel or BertModel")


def refuse_unknown_arguments(forward: Callable, kwargs: dict) -> None:
    unknown = kwargs.keys() - KEYWORDS
    if unknown:
        known = [name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs")]
        known += KEYWORDS
        raise TypeError(f"forward() got unknown arguments {', '.join(sorted(unknown))}; it takes {', '.join(known)}")


def check_inputs(input_ids, inputs_embeds, hidden_size: int) -> tuple[int, int, torch.device]:
    """B, S and the device of a batch; raises ValueError unless it is one of ids [B, S] and embeddings [B, S, E]."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"pass input_ids or inputs_embeds, exactly one of them; got {given}")
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [B, S], got {list(input_ids.shape)}; one text is input_ids[None]")
        return *input_ids.shape, input_ids.device
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != hidden_size:
        raise ValueError(f"inputs_embeds must be [B, S, {hidden_size}], got {list(inputs_embeds.shape)}")
    return *inputs_embeds.shape[:2], inputs_embeds.device


def expand_inputs(name: str, values: Tensor | None, batch_size: int, seq_len: int) -> Tensor | None:
    if values is None or values.shape == (batch_size, seq_len):
        return values
    if values.shape in ((seq_len,), (1, seq_len)):
        return values.expand(batch_size, seq_len)
    raise ValueError(f"{name} must be [{batch_size}, {seq_len}] like the batch, got {list(values.shape)}")


def check_length(longest: int, limit: int) -> None:
    """Raise ValueError for a sequence of more tokens than the model has positions."""
    if longest > limit:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than config.max_position_embeddings={limit}: tokenize with "
            f"truncation=True, max_length={limit}, or split the text"
        )


def refuse_padding(attention_mask: Tensor | None) -> None:
    """Raise ValueError for a mask beside texts that are packed end to end."""
    if attention_mask is not None:
        raise ValueError("attention_mask and cu_seq_lens_q exclude each other: packed texts have no padding")


def raise_out_of_range(
    config: BertConfig, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None
) -> None:
    """Raise IndexError for the first index [T] that an embedding table on the CPU refused, if one is to blame."""
    for name, values, limit, way_out in (
        ("input_ids", input_ids, config.vocab_size, "do tokenizer and model come from one checkpoint?"),
        ("token_type_ids", token_type_ids, config.type_vocab_size, "the model knows no more token types"),
        ("position_ids", position_ids, config.max_position_embeddings, "the model knows no more positions"),
    ):
        bad = [] if values is None else values[(values < 0) | (values >= limit)]
        if len(bad):
            raise IndexError(f"{name} holds {bad[0].item()}, allowed are 0 to {limit - 1}: {way_out}") from None
