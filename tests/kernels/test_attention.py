"""Attention over packed sequences: compared with torch's attention, and independent of the other sequences."""

from importlib import import_module

import pytest
import torch
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, GUARDED, LAYOUTS, SIX_LENGTHS, bounds, check, normal, pairwise, random_cases, sparse

import fastbert_kernels
from fastbert_kernels import launch

pytestmark = GUARDED

LENGTHS = ((1,), (0, 0), (5, 1, 9, 0, 3), (0, 0, 65, 129, 0), (64,), (128, 127, 2), (256, 257), (16, 16, 16))


@pairwise(
    head_size=(1, 8, 16, 32, 64, 80, 96, 128),
    lengths=LENGTHS,
    dtype=DTYPES,
    layout=("contiguous", "columns", "unaligned", "every other", "expanded", "parts of more"),
)
def test_attention(head_size, lengths, dtype, layout):
    qkv = normal(sum(lengths), 3, 2, head_size, dtype=dtype)
    if layout == "parts of more":
        qkv = qkv.new_full((len(qkv), 5, 7, head_size + 8), float("nan"))[:, 1:4, 2:6:2, :head_size].copy_(qkv)
    elif layout == "expanded":
        qkv = qkv[:, :, :1].expand(qkv.shape)  # over heads: equal tokens would make attention an average of equals
    else:
        qkv = LAYOUTS[layout](qkv)
    check("attention", qkv=qkv, cu_seqlens=bounds(lengths), max_seqlen=max(lengths), scale=head_size**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_large_scores(dtype):
    """Scores up to 10^5 overflow float16. Softmax picks one key."""
    qkv = normal(70, 3, 2, 32, dtype=dtype)
    qkv[:, :2] *= 60
    check("attention", qkv=qkv, cu_seqlens=bounds((65, 5)), max_seqlen=65, scale=1.0)


@pytest.mark.parametrize(("dtype", "score"), [(torch.float16, -7.75), (torch.bfloat16, -5.625)], ids=str)
def test_attention_to_a_long_tail(dtype, score):
    """The first keys sum to 64. The weights of 64 keys of this score are below half the dtype's spacing at 64."""
    qkv = torch.zeros(21 * 64, 3, 1, 16)
    qkv[:, 0, 0, 0], qkv[64:, 1, 0, 0], qkv[:, 2] = 1, score, 1
    check("attention", qkv=qkv.to(DEVICE, dtype), cu_seqlens=bounds((21 * 64,)), max_seqlen=21 * 64, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.25, 0.0, 1e-40, -1e-40])
def test_attention_of_any_scale(scale, dtype):
    """Blocks of keys extend past the ends of sequences, where a zero scale would make NaN of minus infinity."""
    qkv = normal(85, 3, 3, 16, dtype=dtype)
    check("attention", qkv=qkv, cu_seqlens=bounds((5, 0, 64, 16)), max_seqlen=64, scale=scale)


@pytest.mark.parametrize("branch", [True, False])
def test_attention_is_the_same_with_and_without_a_branch(branch, monkeypatch):
    qkv = normal(200, 3, 2, 16, dtype=torch.float16)
    arguments = {"cu_seqlens": bounds((5, 0, 64, 131)), "max_seqlen": 131, "scale": 0.25}
    expected = fastbert_kernels.attention(qkv, **arguments)
    module = import_module("fastbert_kernels.attention")
    monkeypatch.setattr(module, "architecture", lambda device: "sm_90" if branch else "sm_80")
    launch.forget_launches()
    assert torch.equal(fastbert_kernels.attention(qkv, **arguments), expected)
    launch.forget_launches()


@pytest.mark.parametrize("max_seqlen", [10, 128, 129, 500])
def test_attention_with_a_larger_max_seqlen(max_seqlen):
    check("attention", qkv=normal(13, 3, 2, 16), cu_seqlens=bounds((10, 3)), max_seqlen=max_seqlen, scale=0.3)


@random_cases
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=4),
    num_heads=st.integers(1, 3),
    head_size=st.integers(1, 128),
    dtype=st.sampled_from(DTYPES),
    gaps=st.tuples(*[st.integers(0, 3)] * 3),
)
def test_random_attention(lengths, num_heads, head_size, dtype, gaps):
    torch.manual_seed(0)
    shape = 3, num_heads, head_size
    buffer = torch.full((sum(lengths), *map(sum, zip(shape, gaps, strict=True))), float("nan"), dtype=dtype)
    qkv = buffer.to(DEVICE)[:, :3, :num_heads, gaps[2] :].copy_(normal(sum(lengths), *shape))
    check("attention", qkv=qkv, cu_seqlens=bounds(lengths), max_seqlen=max(lengths), scale=head_size**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 80])
def test_sequences_do_not_depend_on_each_other(head_size, dtype):
    """Alone, in any order, with another max_seqlen, and between sequences of NaN."""
    sequences = normal(sum(SIX_LENGTHS), 3, 2, head_size, dtype=dtype).split(SIX_LENGTHS)

    def attend(numbers, max_seqlen=70):
        lengths = [SIX_LENGTHS[n] for n in numbers]
        qkv = torch.cat([sequences[n] for n in numbers])
        return fastbert_kernels.attention(qkv, bounds(lengths), max_seqlen, 0.25).split(lengths)

    together = attend(range(6))
    for order in ((5, 4, 3, 2, 1, 0), (2, 4, 2, 0), (1,), (3, 3, 5), (0,)):
        for number, out in zip(order, attend(order, 200), strict=True):
            assert torch.equal(out, together[number])
    for number in (1, 3, 5):
        sequences[number].fill_(float("nan"))
    for number, out in enumerate(attend(range(6))):
        assert out.isnan().all() if number in (1, 3, 5) else torch.equal(out, together[number])


@pytest.mark.parametrize("lengths", [(0, 0), (3,), (0, 5, 0, 2)], ids=str)
def test_rows_outside_sequences_are_neither_read_nor_written(lengths):
    qkv, stop = normal(9, 3, 2, 16), sum(lengths)
    expected = fastbert_kernels.attention(qkv[:stop], bounds(lengths), 9, 0.25)
    qkv[stop:] = float("nan")
    out = fastbert_kernels.attention(qkv, bounds(lengths), 9, 0.25)
    assert torch.equal(out[:stop], expected)
    qkv[stop:] = 0
    assert fastbert_kernels.attention(qkv, bounds(lengths), 9, 0.25)[stop:].isnan().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU see test_every_kernel.py")
def test_heads_past_2_to_the_31():
    """The stride of a head is below 2^31, the offset of the last head is above."""
    qkv, stride = normal(9, 3, 3, 16, dtype=torch.float16), 3 * 2**29
    far = sparse(2 * stride + 2048).as_strided(qkv.shape, (48, 16, stride, 1)).copy_(qkv)
    arguments = bounds((5, 4)), 5, 0.25
    assert torch.equal(fastbert_kernels.attention(far, *arguments), fastbert_kernels.attention(qkv, *arguments))


def test_attention_of_too_many_programs():
    """67 million sequences have too many programs, one for each head and block of queries. Nothing is launched."""
    qkv = (torch.Size((9, 3, 16, 64)), (3072, 1024, 64, 1), torch.float16, DEVICE, 0)
    cu_seqlens = (torch.Size((2**26 + 1,)), (1,), torch.int32, DEVICE, 0)
    attention_launch = import_module("fastbert_kernels.attention").attention_launch
    with pytest.raises(ValueError, match="programs are not supported, only fewer than 2.31"):
        attention_launch(qkv, cu_seqlens, 512, 0.125, None)
    assert attention_launch(qkv, cu_seqlens, 16, 0.125, None).grid == (2**30,)
