"""The linear with an activation, compared with its formula, and each activation alone."""

import math
from copy import deepcopy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    ACTIVATIONS,
    DEVICE,
    GUARDED,
    HALVES,
    LAYOUTS,
    TABLES,
    TOKENS,
    check,
    normal,
    pairwise,
    random_cases,
)
from torch import Tensor

import fastbert_kernels
from fastbert_kernels import linear_activation, linear_activation_forward
from fastbert_kernels.configs import configured_by

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


@pairwise(
    tokens=(1, 63, 65, 128, 300),
    shape=((48, 80), (312, 384), (80, 2), (13, 7)),
    activation=ACTIVATIONS,
    dtype=DTYPES,
    layout=LAYOUTS,
)
def test_linear_activation_forward(tokens, shape, activation, dtype, layout):
    inputs, outputs = shape
    x = LAYOUTS[layout](normal(tokens, inputs, dtype=dtype))
    weight, bias = normal(outputs, inputs, dtype=dtype) / inputs**0.5, normal(outputs, dtype=dtype)
    arguments = {"x": x, "weight": weight, "bias": bias, "activation": activation}
    out, pre = check("linear_activation_forward", **arguments)
    assert torch.equal(out, linear_activation(**arguments))
    assert torch.equal(pre, linear_activation(**arguments | {"activation": "none"}))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a configuration of another device may not fit on this one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_activation_forward_of_every_configuration(dtype):
    """Both outputs are bitwise those of linear_activation."""
    width = "32" if dtype == torch.float32 else "16"
    x, weight, bias = (normal(*shape, dtype=dtype) for shape in ((70, 64), (136, 64), (136,)))
    for name, table in TABLES.items():
        for entry in table["linear_activation"][width]:
            only = deepcopy(table)
            only["linear_activation"][width] = [entry | {"up_to": None}]
            with configured_by(only):
                out, pre = linear_activation_forward(x, weight, bias, "gelu")
                assert torch.equal(out, linear_activation(x, weight, bias, "gelu")), (name, entry)
                assert torch.equal(pre, linear_activation(x, weight, bias, "none")), (name, entry)


@pytest.mark.parametrize("epilogue", list(product((False, True), repeat=3)), ids=str)
def test_linear_activation_forward_of_every_epilogue(epilogue):
    """Flattened, halved or stored through descriptors, with several tiles for a program."""
    config = dict(zip(("flatten", "halves", "store_descriptor"), epilogue, strict=True)) | {
        "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "ctas_per_sm": 1,
        "descriptors": DEVICE.type == "cpu" or torch.cuda.get_device_capability(DEVICE) >= (9, 0),
    }  # fmt: skip
    entries = {width: [{"up_to": None, "config": config}] for width in ("16", "32")}
    x, weight, bias = (normal(*shape, dtype=torch.float16) for shape in ((70, 40), (48, 40), (48,)))
    with configured_by(TABLES["sm_90"] | {"linear_activation": entries}):
        out, pre = linear_activation_forward(x, weight, bias, "gelu")
        assert torch.equal(out, linear_activation(x, weight, bias, "gelu"))
        assert torch.equal(pre, linear_activation(x, weight, bias, "none"))


@pytest.mark.parametrize("tokens", [0, 1])
def test_linear_activation_forward_of_few_tokens(tokens, launches):
    out, pre = linear_activation_forward(normal(tokens, 40), normal(48, 40), normal(48), "gelu")
    assert out.shape == pre.shape == (tokens, 48)
    assert launches == ["_linear_kernel"] * tokens


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
