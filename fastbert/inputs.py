"""What `BertModel.forward` accepts; the error for anything else names the value, the limit and the way out."""

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastbert._compat import is_replica, own_buffers, versions_of
from fastbert.configuration import BertConfig
from fastbert.ops.backend import is_tracing, is_transforming, is_watched
from fastbert.tokens import TokenLayout, layout_from_cu_seqlens, layout_from_mask, shapes_may_depend_on_data


class BertForwardKwargs(TypedDict, total=False):
    """The keywords that every `forward` takes beyond its signature; any other is refused.

    cu_seq_lens_q and the four after it are those of `DataCollatorWithFlattening`: input_ids is one row [1, T] of texts
    laid end to end, cu_seq_lens_q [N + 1] bounds them, and pooler_output is [N, E]. num_items_in_batch is what Trainer
    gives to the loss of somebody's head, which hands all its keywords on.
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


def option(name: str, kwargs: dict, config: BertConfig, default: bool):
    """What a call asks for, or else what the configuration does."""
    value = kwargs.get(name)
    return getattr(config, name, default) if value is None else value


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


def _asks(value: object) -> bool:
    return bool(value) if isinstance(value, int | float) else value is not None


def refuse_unknown_arguments(forward: Callable, kwargs: dict) -> None:
    """None, False and 0 ask for nothing: heads written for older releases pass on what nobody gave, as a head_mask."""
    unknown = {name for name, value in kwargs.items() if _asks(value)} - set(KEYWORDS)
    if unknown:
        known = [name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs")]
        known += KEYWORDS
        raise TypeError(f"forward() got unknown arguments {', '.join(sorted(unknown))}; it takes {', '.join(known)}")


class Batch(NamedTuple):
    """What forward was given, checked: integers [B, S] ([1, S] of types or positions that all texts share), floats
    [B, S, E], and the layout they have."""

    layout: TokenLayout
    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None

    def embedded(self) -> dict[str, Tensor | None]:
        """What the embeddings take, by name."""
        return {name: value for name, value in self._asdict().items() if name != "layout"}


def read_batch(
    model: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None,
    position_ids: Tensor | None, inputs_embeds: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_of_keys: Tensor | None, max_seqlen: int | None,
) -> Batch:  # fmt: skip
    """The batch that forward's arguments describe; raises ValueError or TypeError if they describe none."""
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
        # As transformers' embeddings look them up, but that a position without a type of its own has the last one's.
        places = torch.arange(seq_len, device=device)[None] if position_ids is None else position_ids
        token_type_ids = default_types.to(device)[0][places.clamp(0, default_types.shape[1] - 1)]
    elif token_type_ids is None and limit > num_columns(model.embeddings, "token_type_ids", limit):
        token_type_ids = torch.zeros(batch_size, seq_len, dtype=torch.long, device=device)
    return Batch(layout, input_ids, token_type_ids, position_ids, inputs_embeds)


def layers_of(encoder: nn.Module) -> Iterable[nn.Module]:
    """The layers of an encoder, which may be of any class; what else is among them has no attention."""
    layers = getattr(encoder, "layer", None)
    return layers if isinstance(layers, nn.ModuleList) else encoder.modules()


def head_counts(encoder: nn.Module, config: BertConfig) -> set[int]:
    """The numbers of heads of an encoder's layers, which are what their modules say."""
    attentions = (getattr(getattr(x, "attention", None), "self", None) for x in layers_of(encoder))
    found = {x.num_attention_heads for x in attentions if hasattr(x, "num_attention_heads")}
    return found or {config.num_attention_heads}


def num_rows(table: nn.Module | None, default: int) -> int:
    """How many rows an embedding table has: people put another weight into it and leave numbers beside as they were.

    A weight that is sharded has its shape only while it is gathered.
    """
    weight = getattr(table, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0]
    return getattr(table, "num_embeddings", default)


def num_columns(embeddings: nn.Module, buffer: str, default: int) -> int:
    """How many positions a buffer of embeddings has a default for."""
    values = own_buffers(embeddings).get(buffer)
    return default if values is None else values.shape[1]


def num_positions(config: BertConfig, embeddings: nn.Module, default: Tensor | None) -> int:
    """How many tokens of a sequence have a position: by the table, or by the buffer that says which (or None)."""
    rows = num_rows(getattr(embeddings, "position_embeddings", None), config.max_position_embeddings)
    if default is None:
        return rows
    # A traced graph does not know what the buffer holds: its own, or in a table that was lengthened, 0, 1, 2, ...
    return max(rows, default.shape[1]) if is_tracing() else default.shape[1]


def _positions(
    embeddings: nn.Module, default: Tensor | None, restarting: Tensor | None, seq_len: int, device: torch.device
) -> Tensor | None:
    """The positions [1, S] where they have to be given: None where they are 0, 1, 2, ... and embeddings know so."""
    if default is not None and seq_len <= default.shape[1]:
        default = default.to(device)
        return default[:, :seq_len] if restarting is None else default[0][restarting]
    if restarting is None and seq_len > num_columns(embeddings, "position_ids", seq_len):
        return torch.arange(seq_len, device=device)[None]
    return restarting


# Embeddings -> the buffers that were looked at, their versions, and which of them hold other numbers than the defaults.
_looked_at: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def changed_defaults(embeddings: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The buffers of default positions and of default token types [1, max positions], each where it counts: where it
    may hold other numbers than 0, 1, 2, ... or zeros; None where it does not, or is not there.

    They are looked at once, which waits for the device, and again when they were replaced or written to (of writes
    through `.data` torch keeps no count). A traced graph has them as they will be.
    """
    own = own_buffers(embeddings)
    buffers = own.get("position_ids"), own.get("token_type_ids")
    there = [x for x in buffers if x is not None]
    if not there or there[0].is_meta:
        return None, None
    # Replicas of `nn.DataParallel` are new in every call.
    unknown = is_tracing() or is_transforming() or is_watched() or is_replica(embeddings)
    if unknown or any(type(x) is not Tensor or x.is_inference() for x in there):
        return buffers
    versions = versions_of(there)
    seen = _looked_at.get(embeddings)
    if seen is None or seen[0][0] is not buffers[0] or seen[0][1] is not buffers[1] or seen[1] != versions:
        positions, types = buffers
        if positions is not None and (positions.diff() == 1).all() and not positions[:, :1].any():
            positions = None
        if types is not None and not types.any():
            types = None
        seen = _looked_at[embeddings] = buffers, versions, (positions, types)
    return seen[2]


def looks_up_with_options(table: nn.Embedding) -> bool:
    """Whether rows that are looked up are counted, scaled or renormalized."""
    return bool(table.max_norm is not None or table.sparse or table.scale_grad_by_freq)


def without_padding(inputs: dict[str, Tensor | None], layout: TokenLayout, embeddings: nn.Module) -> dict:
    """What embeddings take [B, S, ...], with zeros at the padding of a layout that drops nothing: what stands there
    must not matter. Ids that a table counts stay, if it has them."""
    tables = {
        "input_ids": "word_embeddings",
        "token_type_ids": "token_type_embeddings",
        "position_ids": "position_embeddings",
    }
    cleared = {name: layout.clear(values) for name, values in inputs.items()}
    for name, table in tables.items():
        table, ids = getattr(embeddings, table, None), inputs[name]
        if ids is not None and isinstance(table, nn.Embedding) and looks_up_with_options(table):
            known = (ids >= 0) & (ids < num_rows(table, 0))
            cleared[name] = torch.where(known, ids, cleared[name])
    return cleared


def _check_inputs(input_ids, inputs_embeds, hidden_size: int) -> tuple[int, int, torch.device]:
    """B, S and the device of a batch of either ids [B, S] or embeddings [B, S, E]."""
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
            raise ValueError(f"input_ids must be [B, S], got {list(input_ids.shape)}; one text is input_ids[None]")
        return *input_ids.shape, input_ids.device
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != hidden_size:
        raise ValueError(f"inputs_embeds must be [B, S, {hidden_size}], got {list(inputs_embeds.shape)}")
    return *inputs_embeds.shape[:2], inputs_embeds.device


def _check_integers(name: str, values: Tensor | None, batch_size: int, seq_len: int) -> Tensor | None:
    """Token types or positions as [B or 1, S], of whatever shape broadcasts to [B, S]."""
    if values is None or values.shape in ((batch_size, seq_len), (1, seq_len)):
        return values
    rows, columns = (1, 1, *values.shape)[-2:]
    if values.ndim > 2 or rows not in (1, batch_size) or columns not in (1, seq_len):
        raise ValueError(f"{name} must be [{batch_size}, {seq_len}] like the batch, got {list(values.shape)}")
    return values.expand(rows, seq_len)


def _check_packed(cu_seqlens: Tensor, cu_seqlens_of_keys: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse bounds of packed texts that are no tensor, or that another argument contradicts."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seq_lens_q must be a tensor of integers, got {type(cu_seqlens).__name__}")
    if attention_mask is not None:
        raise ValueError("attention_mask and cu_seq_lens_q exclude each other: packed texts have no padding")
    given = cu_seqlens_of_keys is not None and shapes_may_depend_on_data(cu_seqlens)
    if given and not torch.equal(cu_seqlens, cu_seqlens_of_keys):
        bounds = cu_seqlens.tolist(), cu_seqlens_of_keys.tolist()
        raise ValueError(f"cu_seq_lens_q={bounds[0]} and cu_seq_lens_k={bounds[1]} must agree in an encoder")


def raise_out_of_range(config: BertConfig, embeddings: nn.Module, layout: TokenLayout, batch: Batch) -> None:
    """Raise IndexError for the first kept index that an embedding table refused, if one is to blame."""
    for name, table, default, way_out in (
        ("input_ids", "word_embeddings", config.vocab_size, "do tokenizer and model come from one checkpoint?"),
        ("token_type_ids", "token_type_embeddings", config.type_vocab_size, "the model knows no more token types"),
        ("position_ids", "position_embeddings", config.max_position_embeddings, "the model knows no more positions"),
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
    """The indices among `count` hidden states that output_hidden_states asks for: 0 is the embeddings' output.

    Raises ValueError for an index of no state; transformers returns nothing for it.
    """
    if isinstance(selection, bool) or not selection:
        return range(count) if selection else ()
    selection = [selection] if isinstance(selection, int) else list(selection)
    if any(not -count <= index < count for index in selection):
        raise ValueError(f"output_hidden_states={selection}: the states are 0 to {count - 1}, or -{count} to -1")
    return {index % count for index in selection}
