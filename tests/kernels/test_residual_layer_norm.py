"""LayerNorm for training: with residual, and its gradients, compared with autograd's."""

import pytest
import torch
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    GEMM_AND_RESIDUAL,
    GUARDED,
    HALVES,
    LAYOUTS,
    check,
    count,
    flat,
    normal,
    pairwise,
    random_cases,
)

from fastbert_kernels import Dropout, layer_norm, layer_norm_backward, residual_layer_norm
from fastbert_kernels.launch import CachedLaunch

pytestmark = GUARDED


def arguments(tokens: int, width: int, dtype: torch.dtype) -> dict:
    shapes = {"grad": (tokens, width), "x": (tokens, width), "weight": (width,)}
    return {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()} | {"eps": 1e-12}


@pairwise(width=(2, 48, 128, 300, 384, 768, 1024, 4096), dtype=DTYPES, tokens=(1, 2, 63, 64, 65, 300), layout=LAYOUTS)
def test_layer_norm_backward(width, dtype, tokens, layout):
    given = arguments(tokens, width, dtype)
    given |= {name: LAYOUTS[layout](given[name]) for name in ("grad", "x")}
    check("layer_norm_backward", **given)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_under_autocast(dtype):
    """The residual's part is float32, the linear's 16 bits wide, in gradients and in sums before LayerNorm."""
    wide, other = arguments(70, 300, torch.float32), normal(70, 300, dtype=dtype)
    found = layer_norm_backward(**wide, other=other, linear_dtype=dtype)
    alone = layer_norm_backward(**wide | {"grad": wide["grad"] + other})
    assert (found.x.dtype, found.linear.dtype) == (torch.float32, dtype)
    assert torch.equal(found.x, alone.x)
    assert alone.linear is alone.x
    assert torch.equal(found.linear, found.x.to(dtype)) or DEVICE.type == "cpu"  # the interpreter truncates
    torch.testing.assert_close(found.linear.float(), found.x, atol=1e-6, rtol=2**-7)
    assert torch.equal(found.sums, alone.sums)


@pairwise(width=(2, 48, 128, 300, 384, 768, 1024, 4096), dtypes=GEMM_AND_RESIDUAL, tokens=(1, 63, 300), layout=LAYOUTS)
def test_residual_layer_norm(width, dtypes, tokens, layout):
    """Under autocast the residual is float32 beside a 16-bit linear."""
    x, residual = (LAYOUTS[layout](normal(tokens, width, dtype=dtype)) for dtype in dtypes)
    check("residual_layer_norm", x=x, residual=residual, weight=normal(width), bias=normal(width), eps=1e-12)


def test_gradients_of_another_dtype_are_another_launch(monkeypatch):
    """A prepared launch keeps its compiled kernel, which depends on the dtype of the linear's gradient."""
    prepared, launch = [], CachedLaunch.__call__
    monkeypatch.setattr(
        CachedLaunch, "__call__", lambda self, **tensors: prepared.append(self) or launch(self, **tensors)
    )
    given = arguments(9, 48, torch.float32)
    for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        layer_norm_backward(**given, linear_dtype=dtype)
    assert prepared[0] is prepared[1]
    assert len(set(prepared)) == 3


def test_no_rows():
    found = layer_norm_backward(**arguments(0, 48, torch.float32))
    assert found.x.shape == (0, 48)
    assert torch.equal(found.sums, torch.zeros(3, 48, device=DEVICE))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-2])
def test_eps_is_what_was_passed(eps):
    """The rows have a variance of 10^-6, so that a larger eps would show. 65 rows: the last block is not full."""
    given = arguments(65, 48, torch.float32) | {"eps": eps}
    given["x"] *= 1e-3
    check("layer_norm_backward", **given)


def test_a_row_without_variance():
    given = arguments(5, 48, torch.float32)
    given["x"][2] = 333.1
    check("layer_norm_backward", **given)


def test_a_row_with_nan_affects_the_sums_only():
    given = arguments(9, 48, torch.float32)
    clean = layer_norm_backward(**given)
    given["x"][4] = torch.nan
    found = layer_norm_backward(**given)
    others = [row for row in range(9) if row != 4]
    assert torch.equal(found.x[others], clean.x[others])
    assert found.x[4].isnan().all()
    assert found.sums[[0, 2]].isnan().all()
    assert torch.equal(found.sums[1], clean.sums[1])


@pytest.mark.parametrize("num_tokens", [0, 1, 37, 64, 70, 100])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=str)
def test_rows_past_the_count_are_not_read_and_become_zeros(num_tokens, p, dtypes):
    dtype, wide = dtypes
    dropout = Dropout(p, torch.tensor([5], device=DEVICE), 1) if p else None
    x, residual, grad, other = (normal(70, 300, dtype=kind) for kind in (dtype, wide, wide, dtype))
    for tensor in (x, residual, grad, other):
        tensor[num_tokens:] = torch.nan
    weight, bias, live = normal(300), normal(300), min(num_tokens, 70)
    found = residual_layer_norm(x, residual, weight, bias, 0.0, dropout, count(num_tokens))
    alone = residual_layer_norm(x[:live], residual[:live], weight, bias, 0.0, dropout)
    for whole, part in zip(found[:3], alone[:3], strict=True):
        assert torch.equal(whole[:live], part)
        assert not whole[live:].any()
    assert torch.equal(found.norm, torch.stack((weight, bias)))
    saved = found.summed.clone()
    saved[num_tokens:] = torch.nan
    found = layer_norm_backward(grad, saved, weight, 0.0, other, dtype, dropout, count(num_tokens))
    alone = layer_norm_backward(grad[:live], saved[:live], weight, 0.0, other[:live], dtype, dropout)
    for whole, part in zip(found[:2], alone[:2], strict=True):
        assert torch.equal(whole[:live], part)
        assert not whole[live:].any()
    torch.testing.assert_close(found.sums, alone.sums)


def test_the_same_bits_in_every_run():
    given = arguments(300, 48, torch.float16)
    assert torch.equal(*(flat(layer_norm_backward(**given)) for _ in range(2)))


@random_cases
@given(tokens=st.integers(1, 140), width=st.integers(2, 500), dtype=st.sampled_from(DTYPES), other=st.booleans())
def test_random_layer_norm_backward(tokens, width, dtype, other):
    torch.manual_seed(0)
    given = arguments(tokens, width, dtype)
    check("layer_norm_backward", **given, other=normal(tokens, width, dtype=dtype) if other else None)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float16)], ids=str)
def test_layer_norm_makes_the_forwards_output_again(dtypes):
    """From the sum before LayerNorm, bit for bit; under autocast in both dtypes."""
    wide, dtype = dtypes
    norm = normal(300), normal(300), 1e-12
    found = residual_layer_norm(normal(70, 300, dtype=dtype), normal(70, 300, dtype=wide), *norm)
    assert (found.out.dtype, found.narrow.dtype, found.summed.dtype) == (wide, dtype, wide)
    assert torch.equal(layer_norm(found.summed, *norm), found.out)
    assert torch.equal(layer_norm(found.summed, *norm, dtype), found.narrow)
