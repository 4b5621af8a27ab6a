"""Checks the arguments of `BertModel.forward`. Errors name the value, the limit and the way out."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf

from fastbert._compat import is_replica, own_buffers, versions_of
from fastbert.configuration import BertConfig
from fastbert.ops.backend import is_tracing, is_transforming, is_watched
from fastbert.tokens import TokenLayout, layout_from_cu_seqlens, layout_from_mask, shapes_may_depend_on_data


class BertForwardKwargs(TypedDict, total=False):
    """The keywords that every `forward` takes beyond its signature; any other raises TypeError.

    cu_seq_lens_q and the four after it come from `DataCollatorWithFlattening`: input_ids is then one row [1, T] of
    packed sequences, cu_seq_lens_q [N + 1] holds their offsets, and pooler_output is [N, E]. If the offsets are on a
    device, max_length_q must be an upper bound of the lengths (not checked; None means T). num_items_in_batch comes
    from Trainer, through custom heads that pass on all keywords.
    """

    output_attentions: bool | None
    output_hidden_states: bool | int | list[int] | None
    return_dict: bool | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None
    seq_idx: Tensor | None
    num_items_in_batch: Tensor | int | None


KEYWORDS = tuple(BertForwardKwargs.__annotations__)


def option(name: str, kwargs: Mapping[str, Any], config: BertConfig, default: bool) -> Any:
    """The keyword of a call, or the setting of the configuration if it is None or missing."""
    value = kwargs.get(name)
    return getattr(config, name, default) if value is None else value


def reject_decoder_arguments(encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache) -> None:
    given = {
        "encoder_hidden_states": encoder_hidden_states is not None,
        "encoder_attention_mask": encoder_attention_mask is not None,
        "past_key_values": past_key_values is not None,
        "use_cache=True": bool(use_cache),
    }
    if any(given.values()):
        names = ", ".join(name for name, is_given in given.items() if is_given)
        others = "transformers.BertLMHeadModel or transformers.BertModel"
        raise ValueError(f"{names}: only encoders are supported, use {others}")


def _has_effect(value: object) -> bool:
    return bool(value) if isinstance(value, int | float) else value is not None


def reject_unknown_arguments(forward: Callable, kwargs: Mapping[str, object]) -> None:
    """Raise TypeError for an unknown keyword. None, False and 0 pass, because heads written for older releases pass on
    arguments at their defaults, as head_mask=None."""
    unknown = {name for name, value in kwargs.items() if _has_effect(value)} - set(KEYWORDS)
    if unknown:
        known = [name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs")]
        known += KEYWORDS
        raise TypeError(f"forward() got unknown arguments {', '.join(sorted(unknown))}; it takes {', '.join(known)}")


class Batch(NamedTuple):
    """The checked arguments of forward: integers [B, S] ([1, S] for types or positions that all sequences share),
    inputs_embeds [B, S, E], and the layout."""

    layout: TokenLayout
    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None

    def embedded(self) -> dict[str, Tensor | None]:
        """The arguments of the embeddings, by name."""
        return {name: value for name, value in self._asdict().items() if name != "layout"}


def read_batch(
    model: hf.BertModel, input_ids: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None,
    position_ids: Tensor | None, inputs_embeds: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_of_keys: Tensor | None, max_seqlen: int | None,
) -> Batch:  # fmt: skip
    """Check the arguments of forward and make the batch. Raises ValueError or TypeError for bad arguments."""
    batch_size, seq_len, device = _check_inputs(input_ids, inputs_embeds, model.config.hidden_size)
    token_type_ids = _check_integers("token_type_ids", token_type_ids, batch_size, seq_len)
    position_ids = _check_integers("position_ids", position_ids, batch_size, seq_len)
    restarting = None
    if cu_seqlens is None:
        heads = head_counts(model.encoder, model.config) if getattr(attention_mask, "ndim", 0) == 4 else ()
        layout = layout_from_mask(attention_mask, batch_size, seq_len, device, heads)
        longest = seq_len if position_ids is None else 0
    else:
        _check_packed(cu_seqlens, cu_seqlens_of_keys, attention_mask)
        layout = layout_from_cu_seqlens(cu_seqlens, max_seqlen, batch_size, seq_len, device)
        longest = layout.max_seqlen
        restarting = layout.restarting_positions() if position_ids is None else None
    default_positions, default_types = changed_defaults(model.embeddings)
    limit = num_positions(model.config, model.embeddings, default_positions)
    if longest > limit:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than max_position_embeddings={limit}: tokenize "
            f"with truncation=True, max_length={limit}, or split the text"
        )
    if position_ids is None:
        position_ids = _positions(model.embeddings, default_positions, restarting, seq_len, device)
    if token_type_ids is None and default_types is not None:
        # As in transformers, except that positions past the buffer take its last token type.
        places = torch.arange(seq_len, device=device)[None] if position_ids is None else position_ids
        token_type_ids = default_types.to(device)[0][places.clamp(0, default_types.shape[1] - 1)]
    elif token_type_ids is None and limit > num_columns(model.embeddings, "token_type_ids", limit):
        token_type_ids = torch.zeros(batch_size, seq_len, dtype=torch.long, device=device)
    return Batch(layout, input_ids, token_type_ids, position_ids, inputs_embeds)


def layers_of(encoder: nn.Module) -> Iterable[nn.Module]:
    """The layers of an encoder of any class; may include other modules, which have no attention."""
    layers = getattr(encoder, "layer", None)
    return layers if isinstance(layers, nn.ModuleList) else encoder.modules()


def head_counts(encoder: nn.Module, config: BertConfig) -> set[int]:
    """The numbers of heads that occur among an encoder's layers, read from their modules."""
    attentions: Iterable[Any] = (getattr(getattr(x, "attention", None), "self", None) for x in layers_of(encoder))
    found = {x.num_attention_heads for x in attentions if hasattr(x, "num_attention_heads")}
    return found or {config.num_attention_heads}


def num_rows(table: nn.Module | None, default: int) -> int:
    """The number of rows of an embedding table, by its weight: users replace weights without updating num_embeddings.

    A sharded weight is two-dimensional only while it is gathered. At other times num_embeddings counts.
    """
    weight = getattr(table, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0]
    return getattr(table, "num_embeddings", default)


def num_columns(embeddings: nn.Module, buffer: str, default: int) -> int:
    """The number of positions in a buffer of the embeddings."""
    values = own_buffers(embeddings).get(buffer)
    return default if values is None else values.shape[1]


def num_positions(config: BertConfig, embeddings: nn.Module, default: Tensor | None) -> int:
    """The longest supported sequence: the rows of the position table, or the entries of `default`.

    default: the buffer of default positions if it differs from 0, 1, 2, ..., otherwise None.
    """
    rows = num_rows(getattr(embeddings, "position_embeddings", None), config.max_position_embeddings)
    if default is None:
        return rows
    # While tracing the values of the buffer are unknown. It may hold 0, 1, 2, ... beside a table with more rows.
    return max(rows, default.shape[1]) if is_tracing() else default.shape[1]


def _positions(
    embeddings: nn.Module, default: Tensor | None, restarting: Tensor | None, seq_len: int, device: torch.device
) -> Tensor | None:
    """The positions [1, S] to pass to the embeddings; None if they are 0, 1, 2, ..., which embeddings assume."""
    if default is not None and seq_len <= default.shape[1]:
        default = default.to(device)
        return default[:, :seq_len] if restarting is None else default[0][restarting]
    if restarting is None and seq_len > num_columns(embeddings, "position_ids", seq_len):
        return torch.arange(seq_len, device=device)[None]
    return restarting


# Embeddings -> the buffers that were checked, their versions, and the result of `changed_defaults`.
_checked: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def changed_defaults(embeddings: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The buffers of default positions and default token types [1, max positions]. Each is None if it is missing or
    holds the usual values (0, 1, 2, ... and zeros).

    The values are checked once, which waits for the device, and again after the buffer was replaced or written to
    (torch does not count writes through `.data`). While tracing both buffers are returned unchecked.
    """
    own = own_buffers(embeddings)
    buffers = own.get("position_ids"), own.get("token_type_ids")
    there = [x for x in buffers if x is not None]
    if not there or there[0].is_meta:
        return None, None
    # `nn.DataParallel` makes new replicas in every call.
    unknown = is_tracing() or is_transforming() or is_watched() or is_replica(embeddings)
    if unknown or any(type(x) is not Tensor or x.is_inference() for x in there):
        return buffers
    versions = versions_of(there)
    seen = _checked.get(embeddings)
    if seen is None or seen[0][0] is not buffers[0] or seen[0][1] is not buffers[1] or seen[1] != versions:
        positions, types = buffers
        if positions is not None and (positions.diff() == 1).all() and not positions[:, :1].any():
            positions = None
        if types is not None and not types.any():
            types = None
        seen = _checked[embeddings] = buffers, versions, (positions, types)
    return seen[2]


def looks_up_with_options(table: nn.Embedding) -> bool:
    """True if a table renormalizes the rows that are looked up, or scales or sparsifies their gradients."""
    return bool(table.max_norm is not None or table.sparse or table.scale_grad_by_freq)


def without_padding(inputs: dict[str, Tensor | None], layout: TokenLayout, embeddings: nn.Module) -> dict:
    """The arguments of the embeddings [B, S, ...] with zeros at the padding of a padded layout, so that its values have
    no effect. Valid ids stay if their table has options, which transformers applies to padding, too."""
    tables = {
        "input_ids": "word_embeddings",
        "token_type_ids": "token_type_embeddings",
        "position_ids": "position_embeddings",
    }
    cleared = {name: layout.clear(values) for name, values in inputs.items()}
    for name, attribute in tables.items():
        table, ids, zeroed = getattr(embeddings, attribute, None), inputs[name], cleared[name]
        if ids is not None and zeroed is not None and isinstance(table, nn.Embedding) and looks_up_with_options(table):
            known = (ids >= 0) & (ids < num_rows(table, 0))
            cleared[name] = torch.where(known, ids, zeroed)
    return cleared


def _check_inputs(input_ids, inputs_embeds, hidden_size: int) -> tuple[int, int, torch.device]:
    """Check input_ids [B, S] or inputs_embeds [B, S, E]. Returns B, S and the device."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"You must specify exactly one of input_ids or inputs_embeds, got {given}")
    name, values = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(values).__name__}: tokenize with return_tensors='pt' and call "
            "model(**batch)"
        )
    if input_ids is not None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}: convert by input_ids.long()")
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must be [B, S], got {list(input_ids.shape)}; for one sequence pass input_ids[None]"
            )
        return *input_ids.shape, input_ids.device
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != hidden_size:
        raise ValueError(f"inputs_embeds must be [B, S, {hidden_size}], got {list(inputs_embeds.shape)}")
    return *inputs_embeds.shape[:2], inputs_embeds.device


def _check_integers(name: str, values: Tensor | None, batch_size: int, seq_len: int) -> Tensor | None:
    """Token types or positions as [B or 1, S]. Accepts any shape that broadcasts to [B, S]."""
    if values is None or values.shape in ((batch_size, seq_len), (1, seq_len)):
        return values
    rows, columns = (1, 1, *values.shape)[-2:]
    if values.ndim > 2 or rows not in (1, batch_size) or columns not in (1, seq_len):
        raise ValueError(f"{name} must be [{batch_size}, {seq_len}] like the batch, got {list(values.shape)}")
    return values.expand(rows, seq_len)


def _check_packed(cu_seqlens: Tensor, cu_seqlens_of_keys: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise TypeError or ValueError unless cu_seqlens is a tensor and agrees with the other arguments."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seq_lens_q must be a tensor of integers, got {type(cu_seqlens).__name__}")
    if attention_mask is not None:
        raise ValueError("attention_mask and cu_seq_lens_q exclude each other: packed sequences have no padding")
    if cu_seqlens_of_keys is None or not shapes_may_depend_on_data(cu_seqlens):
        return
    if not torch.equal(cu_seqlens, cu_seqlens_of_keys):
        offsets = cu_seqlens.tolist(), cu_seqlens_of_keys.tolist()
        raise ValueError(f"cu_seq_lens_q={offsets[0]} and cu_seq_lens_k={offsets[1]} must agree in an encoder")


def raise_out_of_range(config: BertConfig, embeddings: nn.Module, layout: TokenLayout, batch: Batch) -> None:
    """Raise IndexError for the first kept index that is outside of its embedding table, if there is one."""
    for name, table, default, way_out in (
        ("input_ids", "word_embeddings", config.vocab_size, "do tokenizer and model come from one checkpoint?"),
        ("token_type_ids", "token_type_embeddings", config.type_vocab_size, "the model has no more token types"),
        ("position_ids", "position_embeddings", config.max_position_embeddings, "the model has no more positions"),
    ):
        limit = num_rows(getattr(embeddings, table, None), default)
        values = layout.clear(layout.expand(getattr(batch, name)))
        if values is None:
            continue
        values = layout.pack_cleared(values)
        bad = values[(values < 0) | (values >= limit)]
        if len(bad):
            raise IndexError(
                f"index out of range in self: {name} holds {bad[0].item()}, allowed are 0 to {limit - 1}: {way_out}"
            ) from None


def selected_hidden_states(selection: bool | int | Collection[int] | None, count: int) -> Collection[int]:
    """The indices, among `count` hidden states, that output_hidden_states selects; 0 is the output of the embeddings.

    Raises ValueError for an index out of range, which transformers ignores.
    """
    if isinstance(selection, bool) or not selection:
        return range(count) if selection else ()
    selection = [selection] if isinstance(selection, int) else list(selection)
    if any(not -count <= index < count for index in selection):
        raise ValueError(f"output_hidden_states={selection}: the states are 0 to {count - 1}, or -{count} to -1")
    return {index % count for index in selection}
