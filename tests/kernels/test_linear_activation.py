"""The linear with an activation, compared with its formula, and each activation alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS, DEVICE, GUARDED, HALVES, LAYOUTS, TOKENS, check, normal, pairwise, random_cases
from torch import Tensor

import fastbert_kernels
from fastbert_kernels import linear_activation

pytestmark = GUARDED


@pairwise(
    tokens=TOKENS,
    shape=((48, 80), (312, 384), (80, 2), (384, 272), (13, 7)),
    activation=ACTIVATIONS,
    dtype=DTYPES,
    layout=LAYOUTS,
)
def test_linear_activation(tokens, shape, activation, dtype, layout):
    inputs, outputs = shape
    x = LAYOUTS[layout](normal(tokens, inputs, dtype=dtype))
    # Scaled so that sums are of order one: the tolerance is relative to the largest result.
    weight, bias = normal(outputs, inputs, dtype=dtype) / inputs**0.5, normal(outputs, dtype=dtype)
    check("linear_activation", x=x, weight=weight, bias=bias, activation=activation)


@random_cases
@given(
    tokens=st.integers(1, 140),
    columns=st.tuples(st.integers(1, 100), st.integers(16, 140)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
)
def test_random_linear_activation(tokens, columns, activation, dtype, layouts):
    torch.manual_seed(0)
    inputs, outputs = columns
    x, weight = (
        LAYOUTS[layout](normal(rows, inputs, dtype=dtype))
        for layout, rows in zip(layouts, (tokens, outputs), strict=True)
    )
    check("linear_activation", x=x, weight=weight, bias=normal(outputs, dtype=dtype), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_one_column(dtype):
    """The stride of a dimension of one element may have any value."""
    x, weight = (normal(rows, 64, dtype=dtype)[:, ::64] for rows in (9, 20))
    check("linear_activation", x=x, weight=weight, bias=normal(20, dtype=dtype), activation="none")


def activate(values: Tensor, activation: str) -> Tensor:
    """Return the activation of values, which are passed as the bias of a zero product."""
    x, weight = (values.new_zeros(size, 16) for size in (1, len(values)))
    return fastbert_kernels.linear_activation(x, weight, values, activation)[0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_every_size_is_a_rounding_away(activation, dtype):
    """Each value is checked alone, since the tolerance rule is relative to the largest."""
    coarse = torch.linspace(-40, 40, 161, device=DEVICE).to(dtype)
    fine = torch.linspace(0, 0.5, 64, device=DEVICE).to(dtype)
    ours = fastbert_kernels.linear_activation(coarse[:, None], torch.ones_like(fine)[:, None], fine, activation)
    truth = ACTIVATIONS[activation](coarse.double()[:, None] + fine.double())
    assert (ours - truth).abs().le(torch.finfo(dtype).eps * truth.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_without_erf_is_within_the_rounding(dtype):
    """Every bfloat16 or float16 value up to a magnitude of 8 is compared with erfc in float64."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    # Without bfloat16's subnormals, below 1e-38, which GPUs and the interpreter flush to zero.
    values = values[values.isfinite() & (values.abs() <= 8) & ((values == 0) | (values.abs() > 1e-37))]
    x = F.pad(values, (0, -len(values) % 16)).view(-1, 16).to(DEVICE)
    identity, zeros = torch.eye(16, dtype=dtype, device=DEVICE), torch.zeros(16, dtype=dtype, device=DEVICE)
    ours = linear_activation(x, identity, zeros, "gelu").flatten()[: len(values)].double().cpu()
    truth = values.double() * torch.special.erfc(-values.double() / math.sqrt(2)) / 2
    rounding = torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # Half a rounding is the best possible. The interpreter truncates bfloat16, which can take a whole one.
    limit = 1.01 if dtype == torch.bfloat16 else 0.51
    below = values < -5.5  # outside the fit the tail is small, not exact
    assert ((ours - truth).abs() <= limit * rounding)[~below].all()
    assert (ours - truth).abs()[below].max() < 1e-6
    # The tanh approximation would not pass.
    assert ((F.gelu(values.double(), approximate="tanh") - truth).abs() > rounding).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_special_values(activation, dtype):
    largest = torch.finfo(dtype).max
    values = torch.tensor([float("nan"), float("inf"), largest, 1000, 0, -1000, -largest], device=DEVICE, dtype=dtype)
    expected = {
        "tanh": torch.where(values.isnan(), values, values.sign()),
        "none": values,
    }.get(activation, values.where(~(values < 0), 0))
    torch.testing.assert_close(activate(values, activation), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_activation_of_small_values(size, activation, dtype):
    x, weight, bias = normal(16, 48, dtype=dtype) * size, normal(80, 48, dtype=dtype) / 7, normal(80, dtype=dtype)
    check("linear_activation", x=x, weight=weight, bias=bias * size, activation=activation)
