"""The packing plan of a padded batch, and unpacking."""

import pytest
import torch
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    GUARDED,
    KINDS,
    LAYOUTS,
    check_plan,
    example,
    kept_places,
    normal,
    pairwise,
    random_cases,
)

import fastbert_kernels
from fastbert_kernels import launch, packing, packing_plan, unpack

pytestmark = GUARDED

MASK_VALUES = (
    ("bool", True), ("int64", 1), ("int32", -(2**31)), ("uint8", 200), ("float32", 0.25), ("float16", float("nan"))
)  # fmt: skip


@pairwise(kind=KINDS, batch_size=(1, 2, 7), seq_len=(1, 2, 63, 1024, 1025, 2500), value=MASK_VALUES, layout=LAYOUTS)
def test_packing_plan(kind, batch_size, seq_len, value, layout):
    """Every value other than zero keeps its place."""
    kept = kept_places(kind, batch_size, seq_len)
    values = torch.full(kept.shape, value[1], dtype=getattr(torch, value[0]), device=DEVICE)
    check_plan(LAYOUTS[layout](values.masked_fill(~kept, 0)))


def test_packing_plan_of_more_rows_than_a_block(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 16)
    launch.forget_launches()
    check_plan(kept_places("holes", 40, 3))
    launch.forget_launches()


@pytest.mark.parametrize(("batch_size", "seq_len"), [(0, 4), (3, 0), (0, 0)])
def test_packing_plan_of_no_places(batch_size, seq_len):
    indices, cu_seqlens = packing_plan(torch.ones(batch_size, seq_len, device=DEVICE))
    assert indices.shape == (0,)
    assert cu_seqlens.tolist() == [0] * (batch_size + 1)


@random_cases
@given(
    st.integers(1, 20).flatmap(
        lambda seq_len: st.lists(st.lists(st.booleans(), min_size=seq_len, max_size=seq_len), min_size=1, max_size=5)
    ),
    st.sampled_from(list(LAYOUTS)),
)
def test_random_masks(rows, layout):
    """Embeddings that are computed packed and then unpacked are bitwise equal to those of the padded batch."""
    torch.manual_seed(0)
    mask = LAYOUTS[layout](torch.tensor(rows, device=DEVICE))
    check_plan(mask)
    indices, cu_seqlens = packing_plan(mask)
    _, arguments = example("embed_layer_norm", torch.float16)
    arguments |= {"token_type_ids": None, "position_ids": None, "position_table": normal(20, 48, dtype=torch.float16)}
    arguments["input_ids"] = torch.randint(0, 11, mask.shape).to(DEVICE)
    everything = fastbert_kernels.embed_layer_norm(**arguments | {"indices": None}).unflatten(0, mask.shape)
    packed = fastbert_kernels.embed_layer_norm(**arguments | {"indices": indices}, num_tokens=cu_seqlens[-1:])
    padded = unpack(packed, indices, *mask.shape, cu_seqlens[-1:])
    assert torch.equal(padded, torch.where(mask[..., None], everything, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("trailing", "dtype"),
    [((), DTYPES[0]), ((13,), DTYPES[1]), ((2, 5), DTYPES[2]), ((1030,), DTYPES[0]), ((0,), DTYPES[0])],
    ids=str,
)
def test_unpack_undoes_packing(kind, trailing, dtype):
    """With the token count on the host, and with full-size buffers whose rows past the count are NaN."""
    padded, kept = normal(7, 9, *trailing, dtype=dtype), kept_places(kind, 7, 9)
    indices, cu_seqlens = packing_plan(kept)
    expected = padded.where(kept.reshape(7, 9, *(1 for _ in trailing)), 0)
    packed = padded.flatten(0, 1)[indices]
    num_tokens = int(cu_seqlens[-1])
    assert torch.equal(unpack(packed[:num_tokens], indices[:num_tokens], 7, 9), expected)
    packed[num_tokens:] = float("nan")
    assert torch.equal(unpack(packed, indices, 7, 9, cu_seqlens[-1:]), expected)


def test_unpack_of_everything_is_a_view():
    hidden = normal(6, 4)
    out = unpack(hidden, None, 2, 3)
    assert out.shape == (2, 3, 4)
    assert out.data_ptr() == hidden.data_ptr()
