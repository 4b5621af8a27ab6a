"""Dropout in the kernels: which elements are zeroed, how many, and that forward and backward agree."""

import pytest
import torch
from cases import DTYPES
from kernel_cases import DEVICE, GUARDED, HALVES, bounds, check, flat, kept, normal, pairwise
from torch import Tensor

from fastbert_kernels import Dropout, attention_backward, attention_forward, layer_norm_backward, residual_layer_norm

pytestmark = GUARDED


def dropout(p: float = 0.3, seed: int = 0x123456789ABCDEF, site: int = 1) -> Dropout:
    return Dropout(p, torch.tensor([seed], device=DEVICE), site)


def factors(drop: Dropout, rows: int = 70, width: int = 48) -> Tensor:
    """The factors that the kernel applies to ones."""
    ones, zeros, vector = (torch.full(size, value, device=DEVICE) for size, value in (
        ((rows, width), 1.0), ((rows, width), 0.0), ((width,), 1.0)))  # fmt: skip
    return residual_layer_norm(ones, zeros, vector, vector, 1e-12, drop).summed


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62 + 5, 2**63 - 2])
@pytest.mark.parametrize(("rows", "width"), [(1, 4), (2, 48), (70, 300), (9, 1024), (3, 2), (5, 7)])
def test_the_zeros_follow_from_seed_row_and_column(rows, width, seed):
    drop = dropout(seed=seed)
    assert torch.equal(factors(drop, rows, width).cpu(), kept(drop, rows, width).float())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_statistics(p):
    """Of 300 x 1024 elements, p are zero; columns, rows and neighbours are independent. Limits: 5 deviations."""
    zeros = factors(dropout(p), 300, 1024) == 0
    variance = p * (1 - p)
    for share, count in (
        (zeros.double().mean(), zeros.numel()),
        (zeros.double().mean(0), 300),
        (zeros.double().mean(1), 1024),
    ):
        assert (share - p).abs().max() < 5 * (variance / count) ** 0.5
    centered = zeros.double() - p
    for a, b in ((centered[1:], centered[:-1]), (centered[:, 1:], centered[:, :-1])):
        assert (a * b).mean().abs() < 5 * variance / a.numel() ** 0.5
    assert torch.allclose(factors(dropout(p)).max(), torch.tensor(1 / (1 - p), device=DEVICE))


def test_seeds_and_sites_differ():
    first = factors(dropout()) == 0
    for other in (dropout(seed=1), dropout(site=2), dropout(seed=0x123456789ABCDEF + 2**40)):
        different = (first != (factors(other) == 0)).double().mean()
        assert 0.3 < different < 0.54  # 2 p (1 - p) = 0.42


def test_no_dropout_and_nothing_but_dropout():
    assert torch.equal(factors(dropout(0.0)), torch.ones(70, 48, device=DEVICE))
    assert torch.equal(factors(dropout(1.0)), torch.zeros(70, 48, device=DEVICE))
    qkv, cu_seqlens = normal(9, 3, 2, 16), bounds((4, 5))
    context, lse = attention_forward(qkv, cu_seqlens, 5, 0.25, dropout(1.0))
    assert torch.equal(context, torch.zeros_like(context))
    grad = attention_backward(normal(9, 32), qkv, context, lse, cu_seqlens, 5, 0.25, dropout(1.0))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_probability_out_of_range_is_an_error(p):
    with pytest.raises(ValueError, match="dropout probability is .*, expected 0 to 1"):
        factors(dropout(p))


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (torch.tensor([1.0]), TypeError, "the seed is torch.float32 .1., expected int64 .1."),
        (torch.tensor([1, 2]), TypeError, "the seed is torch.int64 .2., expected int64 .1."),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "tensors are on .* and meta"),
    ],
)
def test_an_invalid_seed_is_an_error(seed, error, message):
    drop = Dropout(0.5, seed if seed.device.type == "meta" else seed.to(DEVICE), 0)
    x, vector, qkv, lse = normal(9, 32), normal(32), normal(9, 3, 2, 16), normal(2, 9)
    for call in (
        lambda: residual_layer_norm(x, x, vector, vector, 1e-12, drop),
        lambda: layer_norm_backward(x, x, vector, 1e-12, dropout=drop),
        lambda: attention_forward(qkv, bounds((9,)), 9, 0.25, drop),
        lambda: attention_backward(x, qkv, x, lse, bounds((9,)), 9, 0.25, drop),
    ):
        with pytest.raises(error, match=message):
            call()


@pairwise(width=(48, 300, 768), dtype=DTYPES, p=(0.1, 0.5), tokens=(1, 65))
def test_layer_norm(width, dtype, p, tokens):
    x, residual, grad, weight = (normal(*shape, dtype=dtype) for shape in ((tokens, width),) * 3 + ((width,),))
    drop = dropout(p)
    out = check(
        "residual_layer_norm", x=x, residual=residual, weight=weight, bias=weight, eps=1e-12, dropout=drop
    )  # fmt: skip
    found = check("layer_norm_backward", grad=grad, x=out.summed, weight=weight, eps=1e-12, dropout=drop)
    assert torch.equal(found.linear == 0, (found.x == 0) | (kept(drop, tokens, width) == 0).to(DEVICE))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layer_norm_under_autocast(dtype):
    x, residual, weight, drop = normal(70, 300, dtype=dtype), normal(70, 300), normal(300), dropout()
    out = check("residual_layer_norm", x=x, residual=residual, weight=weight, bias=weight, eps=1e-12, dropout=drop)
    found = layer_norm_backward(normal(70, 300), out.summed, weight, 1e-12, linear_dtype=dtype, dropout=drop)
    assert (found.x.dtype, found.linear.dtype) == (torch.float32, dtype)
    expected = found.x * kept(drop, 70, 300).to(DEVICE).float()
    torch.testing.assert_close(found.linear.float(), expected, atol=1e-6, rtol=2**-7)
    torch.testing.assert_close(found.sums[2], expected.sum(0), atol=1e-4, rtol=1e-4)


@pairwise(
    head_size=(16, 26, 64, 128),
    dtype=DTYPES,
    lengths=((1,), (65, 0, 3), (129, 70), (5, 64, 2)),
    scale=(0.25, -0.5),
)
def test_attention(head_size, dtype, lengths, scale):
    """Forward and backward zero the same probabilities, whatever their tiles."""
    shape = sum(lengths), 3, 2, head_size
    given = {"qkv": normal(*shape, dtype=dtype), "cu_seqlens": bounds(lengths), "max_seqlen": max(lengths)}
    given |= {"scale": scale, "dropout": dropout(site=0)}
    context, lse = check("attention_forward", **given)
    check("attention_backward", grad=normal(shape[0], 2 * head_size, dtype=dtype), context=context, lse=lse, **given)


def test_attention_extracts_its_zeros():
    """With equal scores and values that single out a key, the context is the factor of that key's probability."""
    length, head_size, drop = 70, 128, dropout(site=0)
    qkv = torch.zeros(length, 3, 2, head_size, device=DEVICE)
    qkv[:, 2, :, :length] = torch.eye(length, device=DEVICE)[:, None]
    context, _ = attention_forward(qkv, bounds((length,)), length, 0.25, drop)
    for head in range(2):
        found = context.view(length, 2, head_size)[:, head, :length] * length
        torch.testing.assert_close(found.cpu(), kept(drop, length, length, head).float())


def test_a_draw_is_repeated_by_its_seed():
    x, vector = normal(70, 48), normal(48)
    same, other = (
        [flat(residual_layer_norm(x, x, vector, vector, 1e-12, dropout(seed=seed))) for seed in seeds]
        for seeds in ((7, 7), (7, 8))
    )
    assert torch.equal(*same)
    assert not torch.equal(*other)
