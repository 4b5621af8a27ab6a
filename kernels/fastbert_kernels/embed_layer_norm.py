"""LayerNorm(word row + token type row + position row) of the kept tokens -> packed [T, E] (Devlin et al. 2019).

Ids are not trusted, so no table is read out of bounds. A token whose id, type, position or place is out of range
becomes NaN, which attention spreads over its own sequence only. The bad id is written to a buffer in pinned host
memory, which `take_bad_ids` reads without a device sync. Sum and statistics are float32. Limit: E of at most 16384.
"""

import functools
import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.launch import CachedLaunch, cached_by_specs
from fastbert_kernels.layer_norm import normalize_rows
from fastbert_kernels.limits import MAX_ROW
from fastbert_kernels.operands import (
    TensorSpec,
    check,
    check_shape,
    common_unit,
    have_unit_strides,
    live_tokens,
    row_blocks,
    row_stride,
    spec_of,
    with_unit_stride,
)

INPUTS = ("input_ids", "token_type_ids", "position_ids")


class BadId(NamedTuple):
    """An index out of the range of its table, 0 to limit - 1."""

    name: str
    value: int
    limit: int


class _Notes(NamedTuple):
    """A buffer int64 [3, 2] that the kernels of a device write and the host reads: a bad value and its limit per input.

    Zero means none, since an index of 0 is never out of range. values: the buffer's memory, which is much faster to
    read than the tensor.
    """

    buffer: Tensor
    values: memoryview


_notes: dict[torch.device, _Notes] = {}
_taking = threading.Lock()


def _notes_of(device: torch.device) -> _Notes:
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    notes = _notes.get(device)
    if notes is None:
        buffer = torch.zeros(len(INPUTS), 2, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        notes = _Notes(buffer, buffer.numpy().data)
        notes = _notes.setdefault(device, notes)  # one for all threads
    return notes


def take_bad_ids(device: torch.device) -> list[BadId]:
    """Return the indices out of range that kernels on this device found since the last call, at most one per input.

    It does not wait for running kernels: synchronize first to include theirs.
    """
    values = _notes_of(device).values
    # The fast path: this is called before every forward of a model.
    if not values.tobytes().strip(b"\0"):
        return []
    with _taking:
        # A running kernel may have written only one of the two.
        found = [(row, BadId(INPUTS[row], *pair)) for row, pair in enumerate(values.tolist()) if all(pair)]
        for row, _ in found:
            values[row, 0] = values[row, 1] = 0
    return [bad_id for _, bad_id in found]


@triton.jit
def _add_rows(hidden, table_ptr, stride_table, index, live, limit, bad_id_ptr, offs_e, mask_e):
    """Return hidden [R, E] plus the table's rows at index [R]. An index out of range gives NaN and is noted."""
    known = (index >= 0) & (index < limit)
    rows = tl.load(
        table_ptr + tl.where(known, index, 0)[:, None] * stride_table + offs_e[None, :],
        mask=(live & known)[:, None] & mask_e,
        other=0.0,
    )
    bad = live & ((index < 0) | (index >= limit))
    note = bad_id_ptr + tl.zeros_like(index)
    tl.store(note + 1, tl.zeros_like(index) + limit, mask=bad)
    tl.store(note, index, mask=bad)
    return tl.where(known[:, None], hidden + rows.to(tl.float32), float("nan"))


@triton.jit(
    do_not_specialize=[
        "stride_ids_row", "stride_types_row", "stride_positions_row", "stride_embeds_row",
        "num_tokens", "num_places", "seq_len",
    ],
    do_not_specialize_on_alignment=[
        "input_ids_ptr", "token_type_ids_ptr", "position_ids_ptr", "indices_ptr", "num_tokens_ptr",
    ],
)  # fmt: skip
def _embed_layer_norm_kernel(
    input_ids_ptr,  # [B, S] or None
    token_type_ids_ptr,  # [B, S] or None
    position_ids_ptr,  # [B, S] or None
    inputs_embeds_ptr,  # [B, S, E] or None
    indices_ptr,  # int64 [T] or None
    word_table_ptr,  # [V, E]
    position_table_ptr,  # [max positions, E]
    token_type_table_ptr,  # [types, E]
    weight_ptr,  # [E]
    bias_ptr,  # [E]
    out_ptr,  # [T, E]
    bad_ids_ptr,  # int64 [3, 2]
    num_tokens_ptr,  # int32 [1] or None
    stride_ids_row,
    stride_ids_column,
    stride_types_row,
    stride_types_column,
    stride_positions_row,
    stride_positions_column,
    stride_embeds_row,  # in UNITs, like the strides of the tables and the width
    stride_embeds_column,
    stride_word_table,
    stride_position_table,
    stride_token_type_table,
    num_tokens,
    num_places,
    seq_len,
    width,
    num_words,
    num_positions,
    num_types,
    eps,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    width *= UNIT
    count = live_tokens(num_tokens_ptr, num_tokens)
    start = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    if start < count:
        offs_t = start + tl.arange(0, BLOCK_ROWS)
        offs_e = tl.arange(0, BLOCK_E)
        live = offs_t < count
        place = offs_t
        inside = live
        if indices_ptr is not None:
            place = tl.load(indices_ptr + offs_t, mask=live, other=0)
            inside = live & (place >= 0) & (place < num_places)
            place = tl.where(inside, place, 0)
        mask_e = (offs_e < width)[None, :]
        # A 32-bit division: a 64-bit one is a subroutine.
        row = (place.to(tl.int32) // seq_len).to(tl.int64)
        column = (place.to(tl.int32) % seq_len).to(tl.int64)
        if input_ids_ptr is not None:
            ids = tl.load(input_ids_ptr + row * stride_ids_row + column * stride_ids_column, mask=inside, other=0).to(
                tl.int64
            )
            hidden = _add_rows(
                tl.zeros((BLOCK_ROWS, BLOCK_E), tl.float32), word_table_ptr, stride_word_table * UNIT, ids, inside,
                num_words, bad_ids_ptr, offs_e, mask_e,
            )  # fmt: skip
        else:
            places = row * (stride_embeds_row * UNIT) + column * (stride_embeds_column * UNIT)
            hidden = tl.load(
                inputs_embeds_ptr + places[:, None] + offs_e[None, :], mask=inside[:, None] & mask_e, other=0.0
            ).to(tl.float32)
        types = tl.zeros((BLOCK_ROWS,), tl.int64)
        if token_type_ids_ptr is not None:
            types = tl.load(
                token_type_ids_ptr + row * stride_types_row + column * stride_types_column, mask=inside, other=0
            ).to(tl.int64)
        hidden = _add_rows(
            hidden, token_type_table_ptr, stride_token_type_table * UNIT, types, inside, num_types, bad_ids_ptr + 2,
            offs_e, mask_e,
        )  # fmt: skip
        positions = column
        if position_ids_ptr is not None:
            positions = tl.load(
                position_ids_ptr + row * stride_positions_row + column * stride_positions_column, mask=inside, other=0
            ).to(tl.int64)
        hidden = _add_rows(
            hidden, position_table_ptr, stride_position_table * UNIT, positions, inside, num_positions, bad_ids_ptr + 4,
            offs_e, mask_e,
        )  # fmt: skip
        weight = tl.load(weight_ptr + offs_e, mask=offs_e < width, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + offs_e, mask=offs_e < width, other=0.0).to(tl.float32)[None, :]
        hidden = tl.where(inside[:, None], hidden, float("nan"))
        hidden = normalize_rows(tl.where(mask_e, hidden, 0.0), mask_e, width, weight, bias, eps)
        tl.store(
            out_ptr + offs_t[:, None] * width + offs_e[None, :],
            hidden.to(out_ptr.dtype.element_ty),
            mask=live[:, None] & mask_e,
        )


@cached_by_specs
def _embed_layer_norm_launch(
    input_ids: TensorSpec | None, token_type_ids: TensorSpec | None, position_ids: TensorSpec | None,
    inputs_embeds: TensorSpec | None, indices: TensorSpec | None, word_table: TensorSpec, position_table: TensorSpec,
    token_type_table: TensorSpec, weight: TensorSpec, bias: TensorSpec, num_tokens: TensorSpec | None, eps: float,
) -> CachedLaunch | None:  # fmt: skip
    """Prepare the launch, or return None if operands have to be copied first."""
    operation = "embed_layer_norm"
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ValueError(f"{operation}: pass input_ids or inputs_embeds")
    (batch_size, seq_len), width = given.shape[:2], word_table.shape[1]
    check(operation, word_table, position_table, token_type_table, weight, bias, given, token_type_ids, position_ids)
    check(operation, word_table, indices, num_tokens)
    for name, ids in zip(INPUTS, (input_ids, token_type_ids, position_ids), strict=True):
        if ids is not None:
            check_shape(operation, name, ids, batch_size, seq_len)
    if input_ids is None:
        check_shape(operation, "inputs_embeds", given, batch_size, seq_len, width)
    for name, table in (("position_table", position_table), ("token_type_table", token_type_table)):
        check_shape(operation, name, table, table.shape[0], width)
    check_shape(operation, "weight", weight, width)
    check_shape(operation, "bias", bias, width)
    if batch_size * seq_len >= 2**31:
        raise ValueError(f"{operation}: a batch of {batch_size} x {seq_len} places is not supported, only below 2^31")
    if width > MAX_ROW:
        raise ValueError(f"{operation}: rows of {width} elements are longer than {MAX_ROW}")
    tables = {"word": word_table, "position": position_table, "token_type": token_type_table}
    if not have_unit_strides(*tables.values(), weight, bias, indices, inputs_embeds):
        return None
    size, blocks = batch_size * seq_len if indices is None else indices.shape[0], row_blocks(width)
    wide_strides = _strides("embeds", inputs_embeds)
    wide_strides |= {f"stride_{name}_table": row_stride(table) for name, table in tables.items()}
    unit = common_unit(word_table, width, *wide_strides.values())
    return CachedLaunch(
        _embed_layer_norm_kernel,
        (triton.cdiv(size, blocks["BLOCK_ROWS"]),),
        word_table.device,
        {
            **_strides("ids", input_ids),
            **_strides("types", token_type_ids),
            **_strides("positions", position_ids),
            **{name: stride // unit for name, stride in wide_strides.items()},
            "num_tokens": size,
            "num_places": batch_size * seq_len,
            "seq_len": seq_len,
            "width": width // unit,
            "num_words": word_table.shape[0],
            "num_positions": position_table.shape[0],
            "num_types": token_type_table.shape[0],
            "eps": eps,
            "UNIT": unit,
            **blocks,
        },
    )


def embed_layer_norm(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, word_table: Tensor, position_table: Tensor, token_type_table: Tensor,
    weight: Tensor, bias: Tensor, eps: float, padding_idx: int | None = None, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm of the summed embeddings of the kept tokens -> [T, E] in the dtype that their sum has in torch.

    input_ids, token_type_ids, position_ids: integers [B, S]. Without input_ids, inputs_embeds [B, S, E] replaces the
    word rows; without token_type_ids all types are 0; without position_ids the position is the column. indices int64
    [T]: the kept places of the flattened batch; None keeps all. Tables: [V, E], [max positions, E], [types, E]. weight
    and bias: [E]. num_tokens int32 [1] on the device: rows from index num_tokens on are neither read nor written.
    padding_idx only affects gradients. Raises ValueError or TypeError for invalid shapes, dtypes or devices.
    """
    if input_ids is not None:
        inputs_embeds = None
    launch = _embed_layer_norm_launch(
        spec_of(input_ids), spec_of(token_type_ids), spec_of(position_ids), spec_of(inputs_embeds), spec_of(indices),
        spec_of(word_table), spec_of(position_table), spec_of(token_type_table), spec_of(weight), spec_of(bias),
        spec_of(num_tokens), eps,
    )  # fmt: skip
    if launch is None:
        # Ids may have any stride.
        copied = map(
            with_unit_stride,
            (inputs_embeds, indices, word_table, position_table, token_type_table, weight, bias),
        )
        return embed_layer_norm(input_ids, token_type_ids, position_ids, *copied, eps, padding_idx, num_tokens)
    places = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2].numel()
    summands = (word_table if inputs_embeds is None else inputs_embeds, position_table, token_type_table)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in summands))
    out = word_table.new_empty(places if indices is None else indices.shape[0], word_table.shape[1], dtype=dtype)
    launch(
        input_ids_ptr=input_ids, token_type_ids_ptr=token_type_ids, position_ids_ptr=position_ids,
        inputs_embeds_ptr=inputs_embeds, indices_ptr=indices, word_table_ptr=word_table,
        position_table_ptr=position_table, token_type_table_ptr=token_type_table, weight_ptr=weight, bias_ptr=bias,
        out_ptr=out, bad_ids_ptr=_notes_of(out.device).buffer, num_tokens_ptr=num_tokens,
    )  # fmt: skip
    return out


def _strides(name: str, x: TensorSpec | None) -> dict[str, int]:
    row, column = (0, 0) if x is None else x.strides[:2]
    row = row if x is not None and x.shape[0] > 1 else 0  # the stride of a single row may be anything
    return {f"stride_{name}_row": row, f"stride_{name}_column": column}
