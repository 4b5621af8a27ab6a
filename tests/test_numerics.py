"""The arithmetic that only a GPU has, modelled, and the functions that replace others, held to the tolerance rule."""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import check_close
from kernel_cases import DEVICE

from fastbert.commands.closeness import OP_FACTOR
from fastbert_kernels import linear_activation


def tf32(x):
    """x rounded to the 10 bits of mantissa that a TF32 product takes."""
    bits = x.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def product_by_tf32(x, weight, products):
    """x W^T of float32 in one TF32 product an element, or in three, of high and low parts, the small ones first."""
    high, weight_high = tf32(x), tf32(weight)
    if products == 1:
        return high @ weight_high.T
    low, weight_low = tf32(x - high), tf32(weight - weight_high)
    return low @ weight_high.T + high @ weight_low.T + high @ weight_high.T


@pytest.mark.parametrize("num_inputs", [384, 768, 3072])
def test_three_tf32_products_keep_the_rule_and_one_does_not(num_inputs):
    """Why float32 is "tf32x3" on NVIDIA GPUs: the matrix unit's speed within the rule."""
    x, weight = torch.randn(64, num_inputs), torch.randn(256, num_inputs) / math.sqrt(num_inputs)
    truth, eager = x.double() @ weight.double().T, F.linear(x, weight)
    check_close(f"three products, K = {num_inputs}", product_by_tf32(x, weight, 3), eager, truth, OP_FACTOR)
    with pytest.raises(AssertionError, match="max error"):
        check_close(f"one product, K = {num_inputs}", product_by_tf32(x, weight, 1), eager, truth, OP_FACTOR)


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
