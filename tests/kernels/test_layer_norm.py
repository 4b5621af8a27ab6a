"""LayerNorm's statistics, after a linear and after the embeddings."""

import pytest
import torch
from cases import DTYPES
from kernel_cases import (
    DEVICE,
    GEMM_AND_RESIDUAL,
    GUARDED,
    HALVES,
    check,
    count,
    embed_arguments,
    linear_residual_arguments,
    normal,
)
from torch import Tensor

import fastbert_kernels
from fastbert_kernels.layer_norm import layer_norm_launch
from fastbert_kernels.operands import spec_of

pytestmark = GUARDED

# A float32 sum of 0.1 or 333.1 is rounded at most widths. On a GPU the quotient is rounded for 1, too.
ELEMENTS = (1, 0.1, 333.1)


@pytest.mark.parametrize("dtypes", GEMM_AND_RESIDUAL, ids=str)
@pytest.mark.parametrize("width", [48, 300, 400])
def test_rows_without_variance_become_the_bias(width, dtypes):
    arguments = linear_residual_arguments(5, width, *dtypes)
    for name in ("x", "bias"):
        arguments[name].zero_()
    for element in ELEMENTS:
        arguments["residual"].fill_(element)
        out = fastbert_kernels.linear_residual_layer_norm(**arguments)
        assert torch.equal(out, arguments["norm_bias"].expand(5, width)), element


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 300, 400])
def test_embeddings_without_variance_become_the_bias(width, dtype):
    arguments = embed_arguments("int64", None, None, "contiguous", width, dtype) | {"indices": None}
    for name in ("position_table", "token_type_table"):
        arguments[name].fill_(1e-3)
    for element in ELEMENTS:
        arguments["word_table"].fill_(element)
        out = fastbert_kernels.embed_layer_norm(**arguments)
        assert torch.equal(out, arguments["bias"].expand(27, width)), element


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
@pytest.mark.parametrize("width", [48, 400])
def test_eps_is_what_was_passed(width, eps, dtype):
    """The rows have a variance of 10^-6, so that a larger eps would show."""
    arguments = linear_residual_arguments(9, width, dtype, dtype) | {"eps": eps}
    for name in ("x", "bias", "residual"):
        arguments[name] *= 1e-4 if name == "x" else 1e-3
    check("linear_residual_layer_norm", **arguments)
    arguments = embed_arguments("int64", "int64", "int64", "contiguous", width, dtype) | {"eps": eps, "indices": None}
    for name in ("word_table", "position_table", "token_type_table"):
        arguments[name] *= 1e-3
    check("embed_layer_norm", **arguments)


@pytest.mark.parametrize("spread", ["about a large mean", "about zero"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [48, 400])
def test_statistics_are_float32(width, dtype, spread):
    """In the dtype of the rows, their mean would be off by half the spread, or their squares would be infinite."""

    def rows(count: int) -> Tensor:
        coins = torch.randint(0, 2, (count, width))
        values = coins + 1 / torch.finfo(dtype).eps if spread == "about a large mean" else 60_000 * coins - 30_000
        return values.to(DEVICE, dtype)

    arguments = linear_residual_arguments(9, width, dtype, dtype) | {"residual": rows(9)}
    for name in ("x", "bias"):
        arguments[name].zero_()
    check("linear_residual_layer_norm", **arguments)
    arguments = embed_arguments("int64", "int64", "int64", "contiguous", width, dtype) | {"word_table": rows(11)}
    for name in ("position_table", "token_type_table"):
        arguments[name].zero_()
    check("embed_layer_norm", **arguments, indices=None)


@pytest.mark.parametrize("num_tokens", [0, 13, 64])
def test_layer_norm_writes_no_rows_past_the_count(num_tokens):
    """The output holds numbers. In place, rows of NaN would stay NaN even if they were written."""
    x, out = normal(70, 48), torch.full((70, 48), 7.0, device=DEVICE)
    weight, bias, counted = torch.ones_like(x[0]), torch.zeros_like(x[0]), count(num_tokens)
    launch = layer_norm_launch(*map(spec_of, (x, weight, bias, out, counted)), 1e-12)
    launch(x_ptr=x, norm_weight_ptr=weight, norm_bias_ptr=bias, out_ptr=out, num_tokens_ptr=counted)
    torch.testing.assert_close(out[:num_tokens], torch.layer_norm(x[:num_tokens], (48,), eps=1e-12))
    assert (out[num_tokens:] == 7).all()
