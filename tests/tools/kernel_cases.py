"""Shared by the kernel tests: operands, formulas in plain PyTorch, memory layouts, and NaN-filled guarded outputs."""

import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from hypothesis import HealthCheck, settings
from torch import Tensor

import fastbert_kernels
from fastbert.testing import OP_FACTOR, check_close
from fastbert_kernels import Dropout, configs

# Without a GPU the kernels run in Triton's interpreter, on CPU tensors.
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# The interpreter computes with numpy, which warns of intended overflows: exp2(1000) is infinite.
MARKS = [pytest.mark.gpu] if DEVICE.type == "cuda" else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
# The marks of every kernel test. tests/kernels/conftest.py has the fixture.
GUARDED = [*MARKS, pytest.mark.usefixtures("guarded")]

OPS = (
    "linear_activation",
    "linear_activation_forward",
    "activation_backward",
    "qkv_projection",
    "linear_residual_layer_norm",
    "linear_residual_layer_norm wide",
    "residual_layer_norm",
    "layer_norm",
    "layer_norm_backward",
    "attention",
    "attention_forward",
    "attention_backward",
    "embed_layer_norm",
    "unpack",
    "pool",
    "packing_plan",
)
LARGEST = 2**31 - 1  # of int32
TOKENS = (1, 2, 63, 64, 65, 127, 128, 129, 300)
SIX_LENGTHS = (5, 64, 0, 1, 70, 3)
HALVES = (torch.float16, torch.bfloat16)
GEMM_AND_RESIDUAL = (*((dtype, dtype) for dtype in DTYPES), *((half, torch.float32) for half in HALVES))
TABLES = {path.stem: configs.operations(configs.read(path)) for path in sorted(configs.FOLDER.glob("*.json"))}
# Elements on either side of an output: a multiple of 16 bytes in every dtype, so that the output stays aligned.
GUARD = 64
CANARY = 77


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Fill what launchers allocate inside with NaN (integers with -1), and check the canaries around it at the end."""
    buffers = []

    def poisoned(allocate: Callable) -> Callable:
        def allocate_poisoned(*args, **kwargs) -> Tensor:
            out = allocate(*args, **kwargs)
            if out.numel() == 0:
                return out
            buffers.append(out.new_full((out.numel() + 2 * GUARD,), CANARY))
            return buffers[-1][GUARD:-GUARD].fill_(float("nan") if out.is_floating_point() else -1).view(out.shape)

        return allocate_poisoned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        yield
    for buffer in buffers:
        outside = torch.cat((buffer[:GUARD], buffer[-GUARD:]))
        assert (outside == CANARY).all(), f"a kernel wrote outside its output of {buffer.numel() - 2 * GUARD} elements"


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal values, the same on every device."""
    return torch.randn(shape).to(DEVICE, dtype)


# The constant of Linux. `mmap` has it from Python 3.13 on.
MAP_NORESERVE = 0x4000


def sparse(size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return [size] zeros in a mapping that takes memory only for the pages that are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags), dtype=dtype)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    """cu_seqlens int32 [N + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def count(n: int) -> Tensor:
    """num_tokens int32 [1]."""
    return torch.tensor([n], dtype=torch.int32, device=DEVICE)


def example(op: str, dtype: torch.dtype) -> tuple[Callable, dict]:
    """Return a launcher and arguments of sizes that no block divides: 70 tokens of 7 sequences, 40 -> 48 columns."""
    width = 400 if op.endswith(" wide") else 48
    op = op.removesuffix(" wide")
    cu_seqlens, places = bounds((5, 0, 64, 1)), torch.randperm(70).to(DEVICE)
    x, weight, bias = normal(70, 40, dtype=dtype), normal(width, 40, dtype=dtype), normal(width, dtype=dtype)
    hidden = normal(70, width, dtype=dtype)
    norm_weight, norm_bias = normal(width, dtype=dtype), normal(width, dtype=dtype)
    ids = torch.randint(0, 9, (7, 10)).to(DEVICE)
    attended = {
        "qkv": normal(70, 3, 3, 16, dtype=dtype), "cu_seqlens": cu_seqlens, "max_seqlen": 64, "scale": 0.25,
    }  # fmt: skip
    context, lse = _attention_forward(**attended | {"qkv": attended["qkv"].double()})
    arguments = {
        "linear_activation": {"x": x, "weight": weight, "bias": bias, "activation": "gelu"},
        "linear_activation_forward": {"x": x, "weight": weight, "bias": bias, "activation": "gelu"},
        "activation_backward": {"grad": hidden, "pre": normal(70, width, dtype=dtype), "activation": "gelu"},
        "qkv_projection": {
            "x": x,
            **{f"{part}_weight": normal(width, 40, dtype=dtype) for part in "qkv"},
            **{f"{part}_bias": normal(width, dtype=dtype) for part in "qkv"},
            "num_heads": 3,
        },
        "linear_residual_layer_norm": {
            "x": x, "weight": weight, "bias": bias, "residual": hidden, "norm_weight": norm_weight,
            "norm_bias": norm_bias, "eps": 1e-12,
        },
        "residual_layer_norm": {
            "x": hidden, "residual": normal(70, width, dtype=dtype), "weight": norm_weight, "bias": norm_bias,
            "eps": 1e-12,
        },
        "layer_norm": {"x": hidden, "weight": norm_weight, "bias": norm_bias, "eps": 1e-12},
        "layer_norm_backward": {
            "grad": normal(70, width, dtype=dtype), "x": hidden, "weight": norm_weight, "eps": 1e-12,
            "other": normal(70, width, dtype=dtype),
        },
        "attention": attended,
        "attention_forward": attended,
        "attention_backward": {
            "grad": normal(70, 48, dtype=dtype), "context": context.to(dtype), "lse": lse.float(), **attended,
        },
        "embed_layer_norm": {
            "input_ids": ids, "token_type_ids": ids % 2, "position_ids": 9 - ids, "inputs_embeds": None,
            "indices": places, "word_table": normal(11, width, dtype=dtype),
            "position_table": normal(10, width, dtype=dtype), "token_type_table": normal(2, width, dtype=dtype),
            "weight": norm_weight, "bias": norm_bias, "eps": 1e-12,
        },
        "unpack": {"hidden": hidden, "indices": places, "batch_size": 7, "seq_len": 10},
        "pool": {"hidden": hidden, "cu_seqlens": cu_seqlens, "mode": "mean", "normalize": True, "indices": places},
        "packing_plan": {"mask": ids > 3},
    }[op]  # fmt: skip
    return getattr(fastbert_kernels, op), arguments


def kept(dropout: Dropout | None, rows: int, columns: int, plane: int = 0) -> Tensor | float:
    """The factors [rows, columns] of dropout, 0 or 1 / (1 - p), by Philox 4x32-10 (Salmon et al. 2011, section 3.3)."""
    if dropout is None:
        return 1.0
    seed = int(dropout.seed)
    high, low = np.uint64(32), np.uint64(2**32 - 1)
    shape, quads = (rows, -(-columns // 4)), np.arange(-(-columns // 4), dtype=np.uint64)
    counter = [quads, np.arange(rows, dtype=np.uint64)[:, None], np.uint64(plane), np.uint64(dropout.site)]
    counter = [np.broadcast_to(x, shape) for x in counter]
    keys = [seed % 2**32, seed >> 32]
    for _ in range(10):
        products = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (products[1] >> high) ^ counter[1] ^ np.uint64(keys[0]), products[1] & low,
            (products[0] >> high) ^ counter[3] ^ np.uint64(keys[1]), products[0] & low,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    numbers = np.stack(counter, -1).reshape(rows, -1)[:, :columns]
    is_kept = torch.from_numpy((numbers >> np.uint64(1)).astype(np.int64) >= round(dropout.p * 2**31))
    return is_kept.double() / (1 - dropout.p)


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
}


def _linear_activation(x, weight, bias, activation, num_tokens=None):
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def _linear_activation_forward(x, weight, bias, activation):
    pre = F.linear(x, weight, bias)
    return ACTIVATIONS[activation](pre), pre


def _activation_backward(grad, pre, activation):
    pre = pre.detach().requires_grad_()
    output = ACTIVATIONS[activation](pre)
    (grad_pre,) = torch.autograd.grad(output, pre, grad)
    return grad_pre, output.detach(), grad_pre.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))


def _qkv_projection(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads, num_tokens=None):
    parts = F.linear(x, q_weight, q_bias), F.linear(x, k_weight, k_bias), F.linear(x, v_weight, v_bias)
    return torch.stack(parts, 1).unflatten(2, (num_heads, -1))


def _linear_residual_layer_norm(x, weight, bias, residual, norm_weight, norm_bias, eps, num_tokens=None):
    return F.layer_norm(F.linear(x, weight, bias) + residual, norm_weight.shape, norm_weight, norm_bias, eps)


def as_factors(factors: Tensor | float, like: Tensor) -> Tensor | float:
    return factors.to(like.device, like.dtype) if isinstance(factors, Tensor) else factors


def _residual_layer_norm(x, residual, weight, bias, eps, dropout=None):
    summed = x * as_factors(kept(dropout, *x.shape), x) + residual
    out = F.layer_norm(summed, weight.shape, weight, bias, eps)
    return out, out, summed, torch.stack((weight, bias)).to(torch.promote_types(weight.dtype, torch.float32))


def _layer_norm(x, weight, bias, eps, dtype=None):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _layer_norm_backward(grad, x, weight, eps, other=None, linear_dtype=None, dropout=None):
    """By autograd. Sums over rows are taken in float32 at least, from the gradients of the given dtype."""
    x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
    bias = torch.zeros_like(weight).requires_grad_()
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad if other is None else grad + other
    found = torch.autograd.grad(F.layer_norm(x, weight.shape, weight, bias, eps), (x, weight, bias), grad.to(x.dtype))
    linear = found[0] * as_factors(kept(dropout, *x.shape), x)
    return found[0], linear, torch.stack([tensor.to(wide) for tensor in (*found[1:], linear.to(wide).sum(0))])


def _attention(qkv, cu_seqlens, max_seqlen, scale, dropout=None):
    outputs, masks = [], [kept(dropout, len(qkv), max_seqlen, head) for head in range(qkv.shape[2])]
    for sequence, start in zip(qkv.split(cu_seqlens.diff().tolist()), cu_seqlens.tolist(), strict=False):
        q, k, v = sequence.permute(1, 2, 0, 3)
        if dropout is None:
            context = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            rows, keys = slice(start, start + len(sequence)), slice(len(sequence))
            factors = torch.stack([mask[rows, keys] for mask in masks]).to(qkv.device, qkv.dtype)
            context = ((q @ k.mT * scale).softmax(-1) * factors) @ v
        outputs.append(context.transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def _attention_forward(qkv, cu_seqlens, max_seqlen, scale, dropout=None):
    sums = []
    for sequence in qkv.split(cu_seqlens.diff().tolist()):
        q, k, _ = sequence.permute(1, 2, 0, 3)
        sums.append((q @ k.mT * scale).logsumexp(-1) / math.log(2))
    return _attention(qkv, cu_seqlens, max_seqlen, scale, dropout), torch.cat(sums, 1)


def _attention_backward(grad, qkv, context, lse, cu_seqlens, max_seqlen, scale, dropout=None):
    qkv = qkv.detach().requires_grad_()
    (grad_qkv,) = torch.autograd.grad(_attention(qkv, cu_seqlens, max_seqlen, scale, dropout), qkv, grad)
    return grad_qkv


def _embed_layer_norm(
    input_ids, token_type_ids, position_ids, inputs_embeds, indices, word_table, position_table, token_type_table,
    weight, bias, eps, num_tokens=None,
):  # fmt: skip
    hidden = inputs_embeds if input_ids is None else word_table[input_ids.long()]
    types = torch.zeros_like(hidden[..., 0]) if token_type_ids is None else token_type_ids
    columns = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    positions = columns if position_ids is None else position_ids
    hidden = (hidden + token_type_table[types.long()] + position_table[positions.long()]).flatten(0, 1)
    return F.layer_norm(hidden if indices is None else hidden[indices], weight.shape, weight, bias, eps)


def _pool(hidden, cu_seqlens, mode, normalize=False, indices=None):
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    zeros = hidden.new_zeros(hidden.shape[1])
    sequences = (hidden if indices is None else hidden[indices]).split(cu_seqlens.diff().tolist())
    rows = torch.stack([(x[0] if mode == "first" else x.mean(0)) if len(x) else zeros for x in sequences])
    return F.normalize(rows, dim=-1) if normalize else rows


FORMULAS = {
    "linear_activation": _linear_activation,
    "linear_activation_forward": _linear_activation_forward,
    "activation_backward": _activation_backward,
    "qkv_projection": _qkv_projection,
    "linear_residual_layer_norm": _linear_residual_layer_norm,
    "residual_layer_norm": _residual_layer_norm,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "attention": _attention,
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "embed_layer_norm": _embed_layer_norm,
    "pool": _pool,
}


def flat(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return a launcher's output, or all elements of its outputs, for comparisons of their bits."""
    return outputs if isinstance(outputs, Tensor) else torch.cat([x.flatten() for x in outputs])


def check(op: str, **arguments) -> Any:
    """Return the launcher's output, or outputs, after a check of the error against float64.

    The limit follows from the error of the formula in the arguments' dtypes.
    """
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()
    }
    # On CPUs with AMX, torch 2.13 reads past a bfloat16 row and multiplies that by zero: NaN there gives NaN.
    packed = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    ours = getattr(fastbert_kernels, op)(**arguments)
    found = (x if isinstance(x, tuple) else (x,) for x in (ours, FORMULAS[op](**packed), FORMULAS[op](**exact)))
    for number, (output, theirs, truth) in enumerate(zip(*found, strict=True)):
        check_close(f"{op}, output {number}", output, theirs.to(output.dtype), truth, OP_FACTOR)
    return ours


def _inside(x: Tensor, before: int, after: int, step: int = 1) -> Tensor:
    """Return x as a view into longer rows of NaN (of zeros for integers)."""
    rows = x.new_full(
        (*x.shape[:-1], before + x.shape[-1] * step + after), float("nan") if x.is_floating_point() else 0
    )
    return rows[..., before : before + x.shape[-1] * step : step].copy_(x)


# Memory layouts of an operand. "columns" keeps the alignment that tensor descriptors need.
LAYOUTS = {
    "contiguous": lambda x: x,
    "columns": lambda x: _inside(x, 0, 16),
    "unaligned": lambda x: _inside(x, 1, 2),
    "every other": lambda x: _inside(x, 0, 0, 2),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
}


def pairwise(**choices) -> pytest.MarkDecorator:
    """Parametrize by cases in which every pair of values of two lists occurs, not by the full product."""
    values = [list(choice) for choice in choices.values()]
    numbers = [range(len(choice)) for choice in values]
    unmet = dict.fromkeys(
        ((i, a), (j, b)) for i, j in combinations(range(len(values)), 2) for a, b in product(numbers[i], numbers[j])
    )
    cases = []
    while unmet:
        case = dict(next(iter(unmet)))
        for i in range(len(values)):
            if i not in case:
                met = [sum(tuple(sorted(((i, a), other))) in unmet for other in case.items()) for a in numbers[i]]
                case[i] = met.index(max(met))
        for pair in combinations(sorted(case.items()), 2):
            unmet.pop(pair, None)
        cases.append([values[i][case[i]] for i in range(len(values))])
    return pytest.mark.parametrize(list(choices), [pytest.param(*case, id=_readable(case)) for case in cases])


def _readable(case: list) -> str:
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case)


random_cases = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def linear_residual_arguments(tokens: int, width: int, dtype: torch.dtype, residual_dtype: torch.dtype) -> dict:
    """Arguments of linear_residual_layer_norm for 40 -> width columns."""
    names = ("x", "weight", "bias", "residual", "norm_weight", "norm_bias")
    shapes = (tokens, 40), (width, 40), (width,), (tokens, width), (width,), (width,)
    dtypes = (dtype,) * 3 + (residual_dtype,) * 3
    arguments = {name: normal(*shape, dtype=kind) for name, shape, kind in zip(names, shapes, dtypes, strict=True)}
    return arguments | {"eps": 1e-12}


def embed_arguments(
    source: str, types: str | None, positions: str | None, layout: str, width: int, dtype: torch.dtype
) -> dict:
    """Arguments of embed_layer_norm for a batch [3, 9].

    source: the dtype of input_ids, or "embeds" for inputs_embeds. types, positions: dtypes; None leaves them out.
    """
    tables = {"word_table": 11, "position_table": 9, "token_type_table": 2}
    arguments = {name: normal(rows, width, dtype=dtype) for name, rows in tables.items()}
    arguments |= {"weight": normal(width, dtype=dtype), "bias": normal(width, dtype=dtype), "eps": 1e-12}
    kinds = {"input_ids": None if source == "embeds" else source, "token_type_ids": types, "position_ids": positions}
    for (name, kind), limit in zip(kinds.items(), (11, 2, 9), strict=True):
        ids = torch.randint(0, limit, (3, 9)).to(DEVICE)
        arguments[name] = None if kind is None else LAYOUTS[layout](ids.to(getattr(torch, kind)))
    arguments["inputs_embeds"] = LAYOUTS[layout](normal(3, 9, width, dtype=dtype)) if source == "embeds" else None
    return arguments


KINDS = ("right", "left", "holes", "none", "all")


def kept_places(kind: str, batch_size: int, seq_len: int) -> Tensor:
    """Return a mask bool [B, S] with another length in each row. The first row of "holes" is empty."""
    columns, rows = torch.arange(seq_len), torch.arange(batch_size)[:, None]
    lengths = (rows * 37 + seq_len // 2) % (seq_len + 1)
    return {
        "right": columns < lengths,
        "left": columns >= seq_len - lengths,
        "holes": (rows > 0) & ((columns * 7 + rows) % 3 == 1),
        "none": torch.zeros(batch_size, seq_len, dtype=torch.bool),
        "all": torch.ones(batch_size, seq_len, dtype=torch.bool),
    }[kind].to(DEVICE)


def check_plan(mask: Tensor) -> None:
    """Check packing_plan: the kept places in order, then the others; cu_seqlens of the kept places of each row."""
    kept = mask.bool()
    indices, cu_seqlens = fastbert_kernels.packing_plan(mask)
    assert (indices.dtype, cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert cu_seqlens.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    places = kept.flatten().nonzero().flatten()
    assert torch.equal(indices[: len(places)], places)
    assert torch.equal(indices.sort().values, torch.arange(mask.numel(), device=DEVICE))


def layer(sequences: list[Tensor], places: list[slice], seq_len: int, dtype: torch.dtype, embeds: bool) -> list[Tensor]:
    """Run every kernel in turn, as an encoder chains them, on a batch padded with bad ids or NaN.

    places: the columns of each sequence. Returns [length + 1, 48] for each: its hidden states and their mean.
    """
    torch.manual_seed(1)
    tables = embed_arguments("int64", None, None, "contiguous", 48, dtype)
    tables["position_table"] = normal(100, 48, dtype=dtype)
    weights = [(normal(48, 48, dtype=dtype), normal(48, dtype=dtype)) for _ in range(5)]
    words = normal(11, 48, dtype=dtype)
    ids = torch.full((len(sequences), seq_len), -99, device=DEVICE)
    positions = torch.full_like(ids, -99)
    mask = torch.zeros_like(ids)
    for row, (sequence, place) in enumerate(zip(sequences, places, strict=True)):
        ids[row, place], mask[row, place] = sequence, 1
        positions[row, place] = torch.arange(len(sequence), device=DEVICE)
    indices, cu_seqlens = fastbert_kernels.packing_plan(mask)
    num_tokens, norm = cu_seqlens[-1:], weights[4]
    tables |= {"input_ids": ids, "position_ids": positions, "indices": indices}
    if embeds:
        tables["inputs_embeds"] = torch.where(mask[..., None].bool(), words[ids.clamp(min=0)], float("nan"))
        tables["input_ids"] = None
    hidden = fastbert_kernels.embed_layer_norm(**tables, num_tokens=num_tokens)
    qkv = fastbert_kernels.qkv_projection(hidden, *weights[0], *weights[1], *weights[2], 3, num_tokens)
    context = fastbert_kernels.attention(qkv, cu_seqlens, seq_len, 0.25)
    hidden = fastbert_kernels.linear_residual_layer_norm(
        context, *weights[3], hidden, norm[0][0], norm[1], 1e-12, num_tokens
    )
    hidden = fastbert_kernels.linear_activation(hidden, *weights[0], "gelu", num_tokens)
    vectors = fastbert_kernels.pool(hidden, cu_seqlens, "mean", True)
    padded = fastbert_kernels.unpack(hidden, indices, *ids.shape, num_tokens)
    assert not padded[mask == 0].any()
    return [torch.cat((padded[row, place], vectors[row : row + 1])) for row, place in enumerate(places)]


# A launcher, invalid arguments (a tuple is the shape of a tensor), and the error they raise.
ERRORS = [
    (
        "linear_activation",
        {"activation": "swish"},
        ValueError,
        "activation 'swish' is unknown; choose one of ('none', ",
    ),
    (
        "linear_activation_forward",
        {"activation": None},
        ValueError,
        "activation None is unknown; choose one of ('none', ",
    ),
    (
        "linear_activation_forward",
        {"bias": (47,)},
        ValueError,
        "linear_activation_forward: bias is [47], expected [48]",
    ),
    (
        "activation_backward",
        {"activation": "swish"},
        ValueError,
        "activation_backward: activation 'swish' is unknown; choose one of ('none', ",
    ),
    ("activation_backward", {"grad": (70,)}, ValueError, "activation_backward: grad is [70], expected [T, F]"),
    ("activation_backward", {"pre": (70, 47)}, ValueError, "activation_backward: pre is [70, 47], expected [70, 48]"),
    (
        "activation_backward",
        {"pre": torch.float16},
        TypeError,
        "activation_backward: grad is torch.float32 and pre torch.float16, expected one dtype",
    ),
    ("linear_activation", {"weight": (48, 41)}, ValueError, "linear_activation: weight is [48, 41], expected [48, 40]"),
    ("linear_activation", {"bias": (47,)}, ValueError, "linear_activation: bias is [47], expected [48]"),
    (
        "linear_activation",
        {"weight": torch.float16},
        TypeError,
        "the input is torch.float32 and a weight torch.float16",
    ),
    ("qkv_projection", {"k_weight": (48, 41)}, ValueError, "qkv_projection: k_weight is [48, 41], expected [48, 40]"),
    ("qkv_projection", {"v_bias": (47,)}, ValueError, "qkv_projection: v_bias is [47], expected [48]"),
    (
        "qkv_projection",
        {"v_weight": torch.bfloat16},
        TypeError,
        "the input is torch.float32 and a weight torch.bfloat16",
    ),
    ("qkv_projection", {"num_heads": 5}, ValueError, "a width of 48 cannot be cut into 5 heads"),
    ("qkv_projection", {"num_heads": 0}, ValueError, "a width of 48 cannot be cut into 0 heads"),
    ("qkv_projection", {"x": (70,)}, ValueError, "qkv_projection: x is [70], expected [T, K]"),
    ("linear_activation", {"x": (7, 10, 40)}, ValueError, "linear_activation: x is [7, 10, 40], expected [T, K]"),
    ("linear_residual_layer_norm", {"x": (40,)}, ValueError, "layer_norm: x is [40], expected [T, K]"),
    ("attention", {"qkv": (9, 3, 48)}, ValueError, "attention: qkv is [9, 3, 48], expected [T, 3, H, D]"),
    ("pool", {"hidden": (7, 10, 48)}, ValueError, "pool: hidden is [7, 10, 48], expected [T, E]"),
    ("linear_residual_layer_norm", {"weight": (48, 1)}, ValueError, "weight is [48, 1], expected [48, 40]"),
    ("linear_residual_layer_norm", {"bias": (1,)}, ValueError, "bias is [1], expected [48]"),
    ("linear_residual_layer_norm", {"residual": (69, 48)}, ValueError, "residual is [69, 48], expected [70, 48]"),
    ("linear_residual_layer_norm", {"norm_weight": (1,)}, ValueError, "norm_weight is [1], expected [48]"),
    ("linear_residual_layer_norm", {"norm_bias": (49,)}, ValueError, "norm_bias is [49], expected [48]"),
    (
        "linear_residual_layer_norm",
        {"weight": torch.float16},
        TypeError,
        "a weight torch.float16: a GEMM needs one dtype",
    ),
    (
        "linear_residual_layer_norm",
        {"weight": (16385, 40), "residual": (70, 16385)}
        | dict.fromkeys(("bias", "norm_weight", "norm_bias"), (16385,)),
        ValueError,
        "linear_residual_layer_norm: rows of 16385 elements are longer than 16384",
    ),
    ("residual_layer_norm", {"x": (48,)}, ValueError, "residual_layer_norm: x is [48], expected [T, E]"),
    ("residual_layer_norm", {"residual": (69, 48)}, ValueError, "residual is [69, 48], expected [70, 48]"),
    ("residual_layer_norm", {"weight": (47,)}, ValueError, "residual_layer_norm: weight is [47], expected [48]"),
    ("residual_layer_norm", {"bias": (47,)}, ValueError, "residual_layer_norm: bias is [47], expected [48]"),
    (
        "residual_layer_norm",
        dict.fromkeys(("x", "residual"), (2, 4097)) | dict.fromkeys(("weight", "bias"), (4097,)),
        ValueError,
        "residual_layer_norm: rows of 4097 elements are longer than 4096",
    ),
    ("layer_norm", {"x": (7, 10, 48)}, ValueError, "layer_norm: x is [7, 10, 48], expected [T, E]"),
    ("layer_norm", {"weight": (47,)}, ValueError, "layer_norm: weight is [47], expected [48]"),
    ("layer_norm", {"bias": (47,)}, ValueError, "layer_norm: bias is [47], expected [48]"),
    (
        "layer_norm",
        {"x": (2, 16385), "weight": (16385,), "bias": (16385,)},
        ValueError,
        "layer_norm: rows of 16385 elements are longer than 16384",
    ),
    ("layer_norm_backward", {"x": (48,)}, ValueError, "layer_norm_backward: x is [48], expected [T, E]"),
    ("layer_norm_backward", {"grad": (69, 48)}, ValueError, "layer_norm_backward: grad is [69, 48], expected [70, 48]"),
    ("layer_norm_backward", {"other": (70, 1)}, ValueError, "layer_norm_backward: other is [70, 1], expected [70, 48]"),
    ("layer_norm_backward", {"weight": (47,)}, ValueError, "layer_norm_backward: weight is [47], expected [48]"),
    (
        "layer_norm_backward",
        dict.fromkeys(("grad", "x", "other"), (2, 4097)) | {"weight": (4097,)},
        ValueError,
        "layer_norm_backward: rows of 4097 elements are longer than 4096",
    ),
    ("attention", {"qkv": (9, 2, 3, 16)}, ValueError, "attention: qkv is [9, 2, 3, 16], expected [9, 3, 3, 16]"),
    ("attention", {"qkv": (9, 3, 1, 129)}, ValueError, "head size 129 is not supported, only 1 to 128"),
    ("attention", {"qkv": (9, 3, 1, 0)}, ValueError, "head size 0 is not supported, only 1 to 128"),
    ("attention_forward", {"qkv": (9, 3, 1, 129)}, ValueError, "attention_forward: head size 129 is not supported"),
    ("attention_backward", {"qkv": (70, 3, 1, 129)}, ValueError, "attention_backward: head size 129 is not supported"),
    ("attention_backward", {"qkv": (70, 3, 48)}, ValueError, "qkv is [70, 3, 48], expected [T, 3, H, D]"),
    ("attention_backward", {"grad": (70, 3, 16)}, ValueError, "grad is [70, 3, 16], expected [70, 48]"),
    ("attention_backward", {"context": (69, 48)}, ValueError, "context is [69, 48], expected [70, 48]"),
    ("attention_backward", {"lse": (70, 3)}, ValueError, "attention_backward: lse is [70, 3], expected [3, 70]"),
    ("attention_backward", {"grad": torch.float16}, TypeError, "grad is torch.float16, expected torch.float32"),
    ("attention_backward", {"context": torch.bfloat16}, TypeError, "context is torch.bfloat16, expected torch.float32"),
    ("attention_backward", {"lse": torch.float16}, TypeError, "lse is torch.float16, expected torch.float32"),
    ("embed_layer_norm", {"input_ids": None}, ValueError, "embed_layer_norm: pass input_ids or inputs_embeds"),
    ("embed_layer_norm", {"token_type_ids": (7, 9)}, ValueError, "token_type_ids is [7, 9], expected [7, 10]"),
    ("embed_layer_norm", {"position_ids": (1, 10)}, ValueError, "position_ids is [1, 10], expected [7, 10]"),
    (
        "embed_layer_norm",
        {"input_ids": None, "inputs_embeds": (7, 10, 47)},
        ValueError,
        "inputs_embeds is [7, 10, 47], expected [7, 10, 48]",
    ),
    ("embed_layer_norm", {"position_table": (9, 47)}, ValueError, "position_table is [9, 47], expected [9, 48]"),
    ("embed_layer_norm", {"token_type_table": (2, 1)}, ValueError, "token_type_table is [2, 1], expected [2, 48]"),
    ("embed_layer_norm", {"weight": (47,)}, ValueError, "embed_layer_norm: weight is [47], expected [48]"),
    ("embed_layer_norm", {"bias": (1,)}, ValueError, "embed_layer_norm: bias is [1], expected [48]"),
    (
        "embed_layer_norm",
        dict.fromkeys(("word_table", "position_table", "token_type_table"), (2, 16385))
        | dict.fromkeys(("weight", "bias"), (16385,)),
        ValueError,
        "embed_layer_norm: rows of 16385 elements are longer than 16384",
    ),
    (
        "embed_layer_norm",
        dict.fromkeys(
            ("input_ids", "token_type_ids", "position_ids"),
            torch.ones(1, 1, dtype=torch.int64, device=DEVICE).expand(2**16, 2**15),
        ),
        ValueError,
        "a batch of 65536 x 32768 places is not supported, only below 2^31",
    ),
    ("unpack", {"indices": (69,)}, ValueError, "unpack: indices is [69], expected [70]"),
    ("pool", {"mode": "max"}, ValueError, "pool mode 'max' is unknown; choose 'first' or 'mean'"),
    ("pool", {"hidden": (2, 16385)}, ValueError, "pool: rows of 16385 elements are longer than 16384"),
    ("packing_plan", {"mask": (3,)}, ValueError, "mask is [3], expected [B, S] with fewer than 2^31 places"),
    ("packing_plan", {"mask": (2, 3, 4)}, ValueError, "mask is [2, 3, 4], expected [B, S]"),
    (
        "packing_plan",
        {"mask": torch.ones(1, 1, device=DEVICE).expand(2**16, 2**15)},
        ValueError,
        "mask is [65536, 32768], expected [B, S] with fewer than 2^31 places",
    ),
]
