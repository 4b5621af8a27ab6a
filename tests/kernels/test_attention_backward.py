"""Attention in training: its sum of exponentials, and the gradient, which is compared with torch's."""

from importlib import import_module

import pytest
import torch
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    FORMULAS,
    GUARDED,
    LAYOUTS,
    SIX_LENGTHS,
    bounds,
    check,
    normal,
    pairwise,
    random_cases,
    sparse,
)
from torch import Tensor

from fastbert_kernels import attention, attention_backward, attention_forward
from fastbert_kernels.operands import TensorSpec, spec_of_new

pytestmark = GUARDED

LENGTHS = ((1,), (0, 0), (2, 1, 63, 0, 3), (0, 64, 0), (127, 2), (65,), (129,), (16, 16, 16))


def arguments_of(qkv: Tensor, lengths: tuple[int, ...], scale: float, max_seqlen: int | None = None) -> dict:
    """Return the arguments of the backward, with a random gradient and the results of the kernel's forward."""
    arguments = {"qkv": qkv, "cu_seqlens": bounds(lengths), "scale": scale}
    arguments["max_seqlen"] = max(lengths, default=0) if max_seqlen is None else max_seqlen
    context, lse = attention_forward(**arguments)
    return arguments | {"grad": normal(*context.shape, dtype=qkv.dtype), "context": context, "lse": lse}


def rounded_arguments_of(qkv: Tensor, lengths: tuple[int, ...], scale: float) -> dict:
    """Return the same with the context rounded to the nearest, as GPUs do.

    The interpreter's conversion to bfloat16 truncates. That biases delta, whose error does not average out in the sums.
    """
    arguments = arguments_of(qkv, lengths, scale)
    given = {name: arguments[name] for name in ("cu_seqlens", "max_seqlen", "scale")}
    return arguments | {"context": FORMULAS["attention"](qkv.double(), **given).to(qkv.dtype)}


@pairwise(
    head_size=(1, 16, 26, 32, 64, 80, 128),
    lengths=LENGTHS,
    dtype=DTYPES,
    layout=("contiguous", "columns", "unaligned", "every other", "parts of more"),
)
def test_attention_backward(head_size, lengths, dtype, layout):
    """qkv, the incoming gradient and the context have this layout."""
    qkv = normal(sum(lengths), 3, 2, head_size, dtype=dtype)
    arguments = rounded_arguments_of(qkv, lengths, head_size**-0.5)
    for name in ("qkv", "grad", "context"):
        if layout != "parts of more":
            arguments[name] = LAYOUTS[layout](arguments[name])
        elif name == "qkv":
            wide = qkv.new_full((len(qkv), 5, 7, head_size + 8), float("nan"))
            arguments[name] = wide[:, 1:4, 2:6:2, :head_size].copy_(qkv)
    found = check("attention_backward", **arguments)
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 80])
def test_attention_forward(head_size, dtype):
    """The context is bitwise that of `attention`, and lse is exact to a few roundings of float32."""
    lengths = (5, 0, 64, 131)
    arguments = {"qkv": normal(200, 3, 2, head_size, dtype=dtype), "cu_seqlens": bounds(lengths), "max_seqlen": 131}
    context, lse = check("attention_forward", **arguments, scale=head_size**-0.5)
    assert torch.equal(context, attention(**arguments, scale=head_size**-0.5))
    assert lse.dtype == torch.float32
    for sequence, found in zip(arguments["qkv"].double().split(lengths), lse.split(lengths, 1), strict=True):
        q, k, _ = sequence.permute(1, 2, 0, 3)
        exact = (q @ k.mT * head_size**-0.5).exp().sum(-1).log2()
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.25, 0.0, 1e-40, -1e-40, 1.5])
def test_any_scale(scale, dtype):
    check("attention_backward", **rounded_arguments_of(normal(85, 3, 3, 16, dtype=dtype), (5, 0, 64, 16), scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_any_size_have_a_finite_gradient(dtype):
    """Scores up to 10^5. Those of both signs make keys past the end weigh infinitely, unless they are masked."""
    qkv = normal(75, 3, 2, 32, dtype=dtype)
    qkv[:, :2] *= 60
    qkv[65:, 0] = qkv[65:, 0].abs()
    qkv[65:, 1] = -qkv[65:, 1].abs()
    arguments = arguments_of(qkv, (65, 10), 1.0)
    assert arguments["lse"][:, 65:].max() < -1000
    assert attention_backward(**arguments).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_long_sequences(dtype):
    check("attention_backward", **rounded_arguments_of(normal(530, 3, 1, 32, dtype=dtype), (513, 17), 0.2))


def test_a_larger_max_seqlen():
    qkv = normal(13, 3, 2, 16)
    found = [attention_backward(**arguments_of(qkv, (10, 3), 0.3) | {"max_seqlen": n, "grad": qkv[:, 0].flatten(1)})
             for n in (10, 128, 129, 500)]  # fmt: skip
    assert all(torch.equal(found[0], other) for other in found[1:])


@random_cases
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=4),
    num_heads=st.integers(1, 3),
    head_size=st.integers(1, 128),
    dtype=st.sampled_from(DTYPES),
    gaps=st.tuples(*[st.integers(0, 3)] * 3),
)
def test_random_attention_backward(lengths, num_heads, head_size, dtype, gaps):
    torch.manual_seed(0)
    shape = 3, num_heads, head_size
    buffer = torch.full((sum(lengths), *map(sum, zip(shape, gaps, strict=True))), float("nan"), dtype=dtype)
    qkv = buffer.to(DEVICE)[:, :3, :num_heads, gaps[2] :].copy_(normal(sum(lengths), *shape))
    check("attention_backward", **rounded_arguments_of(qkv, lengths, head_size**-0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 80])
def test_sequences_do_not_depend_on_each_other(head_size, dtype):
    """Alone, in any order, with another max_seqlen, and between sequences of NaN."""
    rows = sum(SIX_LENGTHS)
    sequences = normal(rows, 3, 2, head_size, dtype=dtype).split(SIX_LENGTHS)
    grads = normal(rows, 2 * head_size, dtype=dtype).split(SIX_LENGTHS)

    def gradients(numbers, max_seqlen=70):
        lengths = [SIX_LENGTHS[n] for n in numbers]
        arguments = arguments_of(torch.cat([sequences[n] for n in numbers]), lengths, 0.25, max_seqlen)
        return attention_backward(**arguments | {"grad": torch.cat([grads[n] for n in numbers])}).split(lengths)

    together = gradients(range(6))
    for order in ((5, 4, 3, 2, 1, 0), (2, 4, 2, 0), (1,), (0,)):
        for number, out in zip(order, gradients(order, 200), strict=True):
            assert torch.equal(out, together[number])
    for number in (1, 3, 5):
        sequences[number].fill_(float("nan"))
        grads[number].fill_(float("nan"))
    for number, out in enumerate(gradients(range(6))):
        assert out.isnan().all() if number in (1, 3, 5) else torch.equal(out, together[number])


@pytest.mark.parametrize("lengths", [(0, 0), (3,), (0, 5, 0, 2), ()], ids=str)
@pytest.mark.parametrize("num_tokens", [9, 150])
def test_rows_outside_sequences_are_not_read_and_their_gradient_is_zero(lengths, num_tokens):
    stop = sum(lengths)
    arguments = arguments_of(normal(num_tokens, 3, 2, 16), lengths, 0.25)
    assert arguments["lse"][:, stop:].isnan().all()  # the forward writes none of these rows
    forward = {name: arguments[name] for name in ("qkv", "cu_seqlens", "scale", "max_seqlen")}
    cleared, _ = attention_forward(**forward, clear_tail=True)
    assert torch.equal(cleared[:stop], arguments["context"][:stop])
    assert torch.equal(cleared[stop:], torch.zeros_like(cleared[stop:]))
    rows = {name: arguments[name][:stop] for name in ("grad", "qkv", "context")}
    expected = attention_backward(**arguments | rows | {"lse": arguments["lse"][:, :stop]})
    for name in ("grad", "qkv", "context"):
        arguments[name][stop:] = float("nan")
    arguments["lse"][:, stop:] = float("nan")
    out = attention_backward(**arguments)
    assert torch.equal(out[:stop], expected)
    assert torch.equal(out[stop:], torch.zeros_like(out[stop:]))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU see test_every_kernel.py")
def test_heads_past_2_to_the_31():
    """The stride of a head is below 2^31, the offset of the last head is above."""
    arguments = arguments_of(normal(9, 3, 3, 16, dtype=torch.float16), (5, 4), 0.25)
    qkv, stride = arguments["qkv"], 3 * 2**29
    far = sparse(2 * stride + 2048).as_strided(qkv.shape, (48, 16, stride, 1)).copy_(qkv)
    assert torch.equal(attention_backward(**arguments | {"qkv": far}), attention_backward(**arguments))


def test_too_many_programs():
    """67 million sequences have too many programs, one for each head and block. Nothing is launched."""

    def spec(*shape: int, dtype: torch.dtype = torch.float16) -> TensorSpec:
        return spec_of_new(*shape, dtype=dtype, device=DEVICE)

    grad, qkv, lse = spec(9, 1024), spec(9, 3, 16, 64), spec(16, 9, dtype=torch.float32)
    launches = import_module("fastbert_kernels.attention_backward")._attention_backward_launches
    with pytest.raises(ValueError, match="attention_backward: .* programs are not supported, only fewer than 2.31"):
        launches(grad, qkv, grad, lse, spec(2**26 + 1, dtype=torch.int32), 512, 0.125, None, None, 0.0, 0)
