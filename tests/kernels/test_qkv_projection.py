"""The projection of queries, keys and values: compared with its formula, and the edges of its tiles."""

from importlib import import_module

import pytest
import torch
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, GUARDED, LAYOUTS, TOKENS, check, normal, pairwise, random_cases

import fastbert_kernels
from fastbert_kernels.configs import configured_by
from fastbert_kernels.launch import launching_by

pytestmark = GUARDED


@pairwise(
    tokens=TOKENS,
    heads=((3, 16), (5, 26), (1, 7), (12, 32)),
    dtype=DTYPES,
    layouts=(("contiguous",) * 3, ("columns",) * 3, ("contiguous", "columns", "transposed"), ("every other",) * 3),
)
def test_qkv_projection(tokens, heads, dtype, layouts):
    """Weights with the same stride are read in place. If strides differ, they are copied."""
    num_heads, head_size = heads
    width = num_heads * head_size
    parameters = {}
    for part, layout in zip("qkv", layouts, strict=True):
        parameters[f"{part}_weight"] = LAYOUTS[layout](normal(width, 40, dtype=dtype))
        parameters[f"{part}_bias"] = normal(width, dtype=dtype)
    check("qkv_projection", x=normal(tokens, 40, dtype=dtype), **parameters, num_heads=num_heads)


@random_cases
@given(
    tokens=st.integers(1, 140),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 40)),
    num_inputs=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_random_qkv_projection(tokens, heads, num_inputs, dtype, layout):
    torch.manual_seed(0)
    num_heads, width = heads[0], heads[0] * heads[1]
    parameters = {}
    for part in "qkv":
        parameters[f"{part}_weight"] = LAYOUTS[layout](normal(width, num_inputs, dtype=dtype))
        parameters[f"{part}_bias"] = normal(width, dtype=dtype)
    check("qkv_projection", x=normal(tokens, num_inputs, dtype=dtype), **parameters, num_heads=num_heads)


@pytest.mark.parametrize(("heads", "stored_by_descriptor"), [(4, True), (3, False)])
def test_only_whole_tiles_of_a_part_are_stored_through_a_descriptor(heads, stored_by_descriptor):
    """A tile past the end of the queries would overwrite the first keys, in a race with the program that owns them."""
    config = {
        "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "ctas_per_sm": 1,
        "descriptors": True, "flatten": False, "halves": False, "store_descriptor": True,
    }  # fmt: skip
    width, seen = 16 * heads, []
    arguments = [normal(70, width), *[normal(width, width), normal(width)] * 3, heads]
    with (
        configured_by({"qkv_projection": {"32": [{"up_to": None, "config": config}]}}),
        launching_by(lambda kernel, grid, given: seen.append(given["STORE_DESCRIPTOR"])),
    ):
        fastbert_kernels.qkv_projection(*arguments)
    assert seen == [stored_by_descriptor]


def test_a_row_of_queries_keys_and_values_is_below_2_to_the_31():
    """Its stride is three times 2^30. Nothing is launched."""

    def spec(*shape):
        return torch.Size(shape), (shape[-1], 1)[-len(shape) :], torch.float16, DEVICE, 0

    weight, bias = spec(2**30, 16), spec(2**30)
    launch = import_module("fastbert_kernels.qkv_projection").qkv_projection_launch
    with pytest.raises(ValueError, match="a stride or width of 3221225472 elements is not supported"):
        launch(spec(5, 16), weight, bias, weight, bias, weight, bias, None, 16, None)
