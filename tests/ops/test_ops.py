"""The eager reference of every op against its definition, through the dispatch, over sizes, dtypes and layouts."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES

from fastbert import ops
from fastbert.ops import eager
from fastbert.testing import OP_FACTOR, check_close

LENGTHS = {"one": (1,), "ragged": (5, 1, 9, 0, 3), "uniform": (4, 4, 4), "none": (0, 0), "long": (129, 2)}


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def check(name, function, *args):
    """Compare an op in each dtype with its formula in float64, by the error of the formula in the same dtype."""
    for dtype in DTYPES:
        cast, exact = (
            [x.to(kind) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
            for kind in (dtype, torch.float64)
        )
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                outputs = getattr(ops, name)(*cast)
            check_close(f"{name} {dtype}", outputs, function(*cast), function(*exact), OP_FACTOR)


def test_signatures_agree():
    for op in ops.OPS:
        assert list(inspect.signature(getattr(ops, op)).parameters) == list(
            inspect.signature(getattr(eager, op)).parameters
        )
        assert getattr(ops, op).__doc__


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_qkv_projection(num_tokens):
    weights = [torch.randn(size) for size in ((24, 24), (24,)) * 3]

    def formula(x, *parameters):
        *parameters, heads = parameters
        parts = [F.linear(x, w, b) for w, b in zip(parameters[::2], parameters[1::2], strict=True)]
        return torch.stack(parts, 1).view(len(x), 3, heads, -1)

    check("qkv_projection", formula, torch.randn(num_tokens, 24), *weights, 3) if num_tokens else None
    assert ops.qkv_projection(torch.randn(num_tokens, 24), *weights, 3).shape == (num_tokens, 3, 3, 8)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention(lengths, implementation):
    qkv = torch.randn(sum(lengths), 3, 2, 8)

    def formula(qkv, cu_seqlens, *_):
        outputs = []
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            q, k, v = qkv[start:stop].permute(1, 2, 0, 3)
            outputs.append(((q @ k.mT * 0.3).softmax(-1) @ v).transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    check("attention", formula, qkv, cu_seqlens_of(lengths), max(lengths), 0.3, None, implementation)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_without_reading_lengths_on_the_host(lengths, monkeypatch):
    """Traced graphs and other devices pad the sequences, mask the padding and run attention once."""
    qkv, cu_seqlens = torch.randn(sum(lengths), 3, 2, 8), cu_seqlens_of(lengths)
    expected = eager.attention(qkv, cu_seqlens, max(lengths), 0.3)
    monkeypatch.setattr(eager, "is_tracing", lambda: True)
    for max_seqlen in (max(lengths), max(lengths) + 2):
        torch.testing.assert_close(eager.attention(qkv, cu_seqlens, max_seqlen, 0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_gradients(implementation):
    qkv = torch.randn(9, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    cu_seqlens = cu_seqlens_of((4, 0, 3, 2))
    assert torch.autograd.gradcheck(
        lambda qkv: ops.attention(qkv, cu_seqlens, 4, 0.5, None, implementation), (qkv,), atol=1e-6
    )


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", lambda x: x.clamp(min=0)),
        ("tanh", torch.tanh),
        ("none", lambda x: x),
    ],
)
def test_linear_activation(activation, formula):
    args = (torch.randn(7, 12), torch.randn(20, 12), torch.randn(20))
    check("linear_activation", lambda x, w, b, _: formula(F.linear(x, w, b)), *args, activation)


def test_linear_residual_layer_norm():
    def formula(x, w, b, residual, gamma, beta, eps):
        x = F.linear(x, w, b) + residual
        return F.layer_norm(x, (12,), gamma, beta, eps)

    x, residual = torch.randn(7, 20), torch.randn(7, 12)
    kept = residual.clone()
    parameters = torch.randn(12, 20), torch.randn(12), residual, torch.randn(12), torch.randn(12), 1e-12
    check("linear_residual_layer_norm", formula, x, *parameters)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("indices", [None, torch.tensor([1, 2, 5])])
def test_embed_layer_norm(indices):
    tables = torch.randn(11, 6), torch.randn(5, 6), torch.randn(2, 6)
    ids, types = torch.randint(0, 11, (2, 4)), torch.randint(0, 2, (2, 4))
    positions = torch.randint(0, 5, (2, 4))
    embeds = torch.randn(2, 4, 6)
    for input_ids, token_types, places in ((ids, types, positions), (ids, None, None), (None, types, None)):

        def formula(input_ids, token_types, places, embeds, indices, words, place_table, type_table, gamma, beta, eps):
            words = embeds if input_ids is None else words[input_ids]
            types = torch.zeros(2, 4, dtype=torch.long) if token_types is None else token_types
            places = torch.arange(4).expand(2, 4) if places is None else places
            hidden = (words + type_table[types] + place_table[places]).flatten(0, 1)
            hidden = hidden if indices is None else hidden[indices]
            return F.layer_norm(hidden, (6,), gamma, beta, eps)

        given = None if input_ids is not None else embeds
        norm = torch.randn(6), torch.randn(6), 1e-12
        check("embed_layer_norm", formula, input_ids, token_types, places, given, indices, *tables, *norm)


def test_padding_row_gets_no_gradient():
    words = torch.randn(11, 6, requires_grad=True)
    args = torch.randn(5, 6), torch.randn(2, 6), torch.ones(6), torch.zeros(6), 1e-12
    ids = torch.tensor([[0, 3, 0, 7]])
    ops.embed_layer_norm(ids, None, None, None, None, words, *args, 0).square().sum().backward()
    assert words.grad.any(1).nonzero().flatten().tolist() == [3, 7]


def test_unpack():
    hidden = torch.randn(3, 4, requires_grad=True)
    padded = ops.unpack(hidden, torch.tensor([1, 2, 5]), 2, 3)
    assert torch.equal(padded.flatten(0, 1)[[1, 2, 5]], hidden)
    assert not padded.flatten(0, 1)[[0, 3, 4]].any()
    assert torch.equal(ops.unpack(hidden, None, 3, 1), hidden[:, None])
    padded.sum().backward()
    assert torch.equal(hidden.grad, torch.ones(3, 4))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["first", "mean"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_pool(lengths, mode, normalize):
    hidden = torch.randn(sum(lengths), 6)

    def formula(hidden, cu_seqlens, mode, normalize):
        texts = hidden.split(cu_seqlens.diff().tolist())
        rows = [(x[0] if mode == "first" else x.mean(0)) if len(x) else hidden.new_zeros(6) for x in texts]
        rows = torch.stack(rows)
        return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-5) if normalize else rows

    for dtype in DTYPES:
        args = (cu_seqlens_of(lengths), mode, normalize)
        outputs = ops.pool(hidden.to(dtype), *args)
        check_close("pool", outputs, formula(hidden.to(dtype), *args), formula(hidden.double(), *args), OP_FACTOR)
        assert outputs.isfinite().all()


def test_pool_raises_for_an_unknown_mode():
    with pytest.raises(ValueError, match="pool mode 'max' is unknown; choose 'first' or 'mean'"):
        ops.pool(torch.randn(2, 3), cu_seqlens_of((2,)), "max")
