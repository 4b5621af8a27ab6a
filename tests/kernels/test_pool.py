"""Pooling: compared with its formula, and independent of the other sequences."""

import pytest
import torch
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, GUARDED, LAYOUTS, SIX_LENGTHS, bounds, check, normal, pairwise, random_cases

import fastbert_kernels

pytestmark = GUARDED


@pairwise(
    lengths=((1,), (5, 1, 9, 0, 3), (0, 0, 65, 129, 0), (0, 0), (16, 17, 15)),
    mode=("first", "mean"),
    normalize=(False, True),
    width=(1, 13, 48, 312, 1025),
    dtype=DTYPES,
    layout=LAYOUTS,
    indexed=(False, True),
)
def test_pool(lengths, mode, normalize, width, dtype, layout, indexed):
    hidden = LAYOUTS[layout](normal(sum(lengths) + 5 * indexed, width, dtype=dtype))
    indices = torch.randperm(len(hidden)).to(DEVICE)[: sum(lengths)] if indexed else None
    check("pool", hidden=hidden, cu_seqlens=bounds(lengths), mode=mode, normalize=normalize, indices=indices)


@random_cases
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=4).filter(any),
    width=st.integers(1, 300),
    mode=st.sampled_from(("first", "mean")),
    normalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_random_pool(lengths, width, mode, normalize, dtype, layout):
    torch.manual_seed(0)
    hidden = LAYOUTS[layout](normal(sum(lengths), width, dtype=dtype))
    check("pool", hidden=hidden, cu_seqlens=bounds(tuple(lengths)), mode=mode, normalize=normalize)


def test_a_mean_is_summed_in_float32():
    """The sum of two of these 40 values would be infinite in float16."""
    hidden = torch.full((40, 48), 60_000, dtype=torch.float16, device=DEVICE)
    check("pool", hidden=hidden, cu_seqlens=bounds((40,)), mode="mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["first", "mean"])
def test_pooled_vectors_do_not_depend_on_each_other(mode, dtype):
    sequences = normal(sum(SIX_LENGTHS), 312, dtype=dtype).split(SIX_LENGTHS)

    def pool(numbers):
        lengths = [SIX_LENGTHS[n] for n in numbers]
        return fastbert_kernels.pool(torch.cat([sequences[n] for n in numbers]), bounds(lengths), mode, True)

    together = pool(range(6))
    for order in ((5, 4, 3, 2, 1, 0), (4,), (1, 1), (2, 0)):
        assert torch.equal(pool(order), together[list(order)])
    sequences[1].fill_(float("nan"))
    out = pool(range(6))
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3, 4, 5]], together[[0, 2, 3, 4, 5]])


def test_pool_reads_no_rows_that_do_not_exist():
    hidden = normal(5, 48)
    with_zeros = torch.cat((hidden, torch.zeros_like(hidden)))
    outputs = [
        fastbert_kernels.pool(rows, bounds((5,)), "mean", indices=torch.tensor(indices, device=DEVICE))
        for rows, indices in ((hidden, [1, -1, 5, 2**40, 3]), (with_zeros, [1, 6, 5, 7, 3]))
    ]
    assert torch.equal(*outputs)
