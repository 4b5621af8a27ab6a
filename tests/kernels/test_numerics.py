"""The arithmetic that only a GPU has, modelled, and the functions that replace others, held to the tolerance rule."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE

from fastbert.testing import FLOAT32_ROUNDINGS, OP_FACTOR, check_close
from fastbert_kernels import linear_activation

BLOCK_K = 32  # of the shipped configurations of float32


def tf32(x):
    """x rounded to the 10 bits of mantissa that a TF32 product takes."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def parts(x):
    """x as two TF32 numbers: the low part is cut off, as the matrix unit does."""
    high = tf32(x)
    return high, ((x - high).view(torch.int32) & ~0x1FFF).view(torch.float32)


def add_products(sums, x, weight):
    """sums + x W^T as the matrix unit adds: eight products at a time, cut off to float32."""
    for part in range(0, x.shape[1], 8):
        exact = sums.double() + x[:, part : part + 8].double() @ weight[:, part : part + 8].double().T
        nearest = exact.float()
        past = nearest.double().abs() > exact.abs()
        sums = torch.where(past, nearest.nextafter(torch.zeros_like(nearest)), nearest)
    return sums


def product_by_tf32(x, weight, products):
    """x W^T of float32 in one TF32 product an element, or in three, the small ones first, block after block."""
    out = torch.zeros(len(x), len(weight))
    for block in zip(x.split(BLOCK_K, 1), weight.split(BLOCK_K, 1), strict=True):
        (high, low), (weight_high, weight_low) = map(parts, block)
        sums = torch.zeros_like(out)
        if products == 3:
            sums = add_products(add_products(sums, low, weight_high), high, weight_low)
        out += add_products(sums, high, weight_high)
    return out


@pytest.mark.parametrize("num_inputs", [1, 8, 40, 384, 768, 3072])
def test_three_tf32_products_keep_the_rule_and_one_does_not(num_inputs):
    """Why float32 is "tf32x3" on NVIDIA GPUs: the matrix unit's speed within the rule."""
    x, weight = torch.randn(64, num_inputs), torch.randn(256, num_inputs) / math.sqrt(num_inputs)
    truth, eager = x.double() @ weight.double().T, F.linear(x, weight)
    check_close(f"three products, K = {num_inputs}", product_by_tf32(x, weight, 3), eager, truth, OP_FACTOR)
    with pytest.raises(AssertionError, match="max error"):
        check_close(f"one product, K = {num_inputs}", product_by_tf32(x, weight, 1), eager, truth, OP_FACTOR)


def test_a_product_of_three_is_off_by_the_roundings_that_the_rule_allows():
    """By more than those of the product, and less than with the one of the result."""
    x, weight = 1 + torch.rand(2, 2048, 1)
    ours, truth = product_by_tf32(x, weight, 3), x.double() @ weight.double().T
    check_close("one product", ours, truth.float(), truth, OP_FACTOR)
    off = ((ours - truth) / truth).abs().max() / torch.finfo(torch.float32).eps
    assert FLOAT32_ROUNDINGS < off < FLOAT32_ROUNDINGS + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gelu_without_erf_is_exact_to_the_rounding(dtype):
    """Every bfloat16, or float16, of magnitude up to 8, through the kernel, against erfc in float64."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    # Not bfloat16's subnormals, below 1e-38, which GPUs and the interpreter flush to zero.
    values = values[values.isfinite() & (values.abs() <= 8) & ((values == 0) | (values.abs() > 1e-37))]
    x = F.pad(values, (0, -len(values) % 16)).view(-1, 16).to(DEVICE)
    identity, zeros = torch.eye(16, dtype=dtype, device=DEVICE), torch.zeros(16, dtype=dtype, device=DEVICE)
    ours = linear_activation(x, identity, zeros, "gelu").flatten()[: len(values)].double().cpu()
    truth = values.double() * torch.special.erfc(-values.double() / math.sqrt(2)) / 2
    rounding = torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # Half of a rounding is the best there is; in the interpreter bfloat16 is cut off and may take a whole one.
    limit = 1.01 if dtype == torch.bfloat16 else 0.51
    below = values < -5.5  # past the fit the tail is small, not exact
    assert ((ours - truth).abs() <= limit * rounding)[~below].all()
    assert (ours - truth).abs()[below].max() < 1e-6
    # The form by tanh would not pass.
    assert ((F.gelu(values.double(), approximate="tanh") - truth).abs() > rounding).any()
