"""The GEMM of all linears: independent rows, pointers and descriptors, epilogues, float32 by three TF32 products."""

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from kernel_cases import DEVICE, GUARDED, TABLES, check, count, example, normal
from torch import Tensor

import fastbert_kernels
from fastbert.testing import FLOAT32_ROUNDINGS, OP_FACTOR, check_close
from fastbert_kernels import configs, target
from fastbert_kernels.configs import configured_by
from fastbert_kernels.linear_activation import linear_launch
from fastbert_kernels.operands import spec_of

pytestmark = GUARDED

PROJECTIONS = ("linear_activation", "qkv_projection", "linear_residual_layer_norm", "linear_residual_layer_norm wide")
TWO_LAUNCHES = [("linear_residual_layer_norm", "linear_residual")]
# Without TMA, tiles are loaded and stored through pointers.
DESCRIPTORS = DEVICE.type == "cpu" or torch.cuda.get_device_capability(DEVICE) >= (9, 0)
LARGE = 20_011  # tokens, above the limits of all classes
WIDTHS = {"minilm": 384, "base": 768, "large": 1024}
# The inputs and outputs of an operation's linears for a model's width.
PLACES = {
    "qkv_projection": lambda width: [(width, width)],
    "linear_activation": lambda width: [(width, 4 * width)],
    "linear_residual": lambda width: [(width, width), (4 * width, width)],
}


def projection(op: str, dtype: torch.dtype, tokens: int) -> tuple[Callable, dict, list[str]]:
    """Return a launcher, its arguments with this number of tokens, and the names of those with a row for each token.

    K has at least four blocks, so that a change in the order of the sum shows.
    """
    launcher, arguments = example(op, dtype)
    rows = [name for name in ("x", "residual") if name in arguments]
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.ndim == 2:
            size, width = tokens if name in rows else len(x), x.shape[1] if name == "residual" else 200
            arguments[name] = normal(size, width, dtype=dtype)
    return launcher, arguments, rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", PROJECTIONS)
def test_rows_do_not_depend_on_other_rows(op, dtype):
    """Alone, at any place of a tile, and in a buffer so large that it has another configuration."""
    launcher, arguments, rows = projection(op, dtype, 1100)
    expected = launcher(**arguments)
    for start, stop in ((0, 1), (62, 67), (64, 128), (800, 1100), (1099, 1100)):
        part = launcher(**arguments | {name: arguments[name][start:stop] for name in rows})
        assert torch.equal(part, expected[start:stop]), (start, stop)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", PROJECTIONS)
def test_rows_of_nan_do_not_spread(op, dtype):
    launcher, arguments, rows = projection(op, dtype, 70)
    expected = launcher(**arguments)
    for name in rows:
        arguments[name][[0, 31, 69]] = float("nan")
    out = launcher(**arguments)
    assert out[[0, 31, 69]].isnan().all()
    others = [row for row in range(70) if row not in (0, 31, 69)]
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 70, 1000])
@pytest.mark.parametrize("op", PROJECTIONS)
def test_rows_past_the_count_are_neither_read_nor_written(op, num_tokens):
    """Through pointers. Descriptors, which no configuration has for few tokens, write the whole last tile."""
    launcher, arguments, rows = projection(op, torch.bfloat16, 70)
    expected = launcher(**arguments)
    for name in rows:
        arguments[name][num_tokens:] = float("nan")
    out = launcher(**arguments, num_tokens=count(num_tokens))
    assert torch.equal(out[:num_tokens], expected[:num_tokens])
    assert out[num_tokens:].isnan().all()
    for name in rows:
        arguments[name][num_tokens:] = 0
    out = launcher(**arguments, num_tokens=count(num_tokens))
    assert out[num_tokens:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["linear_activation", "qkv_projection", "linear_residual_layer_norm"])
def test_parts_of_longer_rows(op, dtype):
    """Neither the address of a row nor the number of inputs is a multiple of 16 bytes, so descriptors are not used."""
    _, arguments = example(op, dtype)
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.shape[-1] == 40:
            arguments[name] = x[:, 3:16]
    check(op, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["linear_activation", "qkv_projection", "linear_residual_layer_norm"])
def test_pointers_and_descriptors_agree(op, dtype):
    table = deepcopy(configs.table_for(target.architecture(DEVICE)))
    launcher, arguments = example(op, dtype)
    expected = launcher(**arguments)
    for entries in (entries for name, widths in table.items() if name != "attention" for entries in widths.values()):
        for entry in entries:
            entry["config"]["descriptors"] = False
    with configured_by(table):
        assert torch.equal(launcher(**arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 48])
@pytest.mark.parametrize(("op", "operation"), [*zip(PROJECTIONS[:2], PROJECTIONS[:2], strict=True), *TWO_LAUNCHES])
def test_epilogues_give_bitwise_equal_results(op, operation, width, dtype):
    """Flattened, halved or stored through a descriptor, also for a residual of another dtype.

    Only descriptors write rows past the count, up to the end of the last tile.
    """
    config = {
        "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "ctas_per_sm": 1,
        "descriptors": DESCRIPTORS,
    }  # fmt: skip
    launcher, arguments = example(op, dtype)
    for name, x in arguments.items():
        if isinstance(x, Tensor) and name != "x":
            arguments[name] = normal(70 if name == "residual" else width, *x.shape[1:], dtype=dtype)
    if "residual" in arguments:
        arguments["residual"] = normal(70, width, dtype=torch.float32 if dtype == torch.float16 else dtype)
    arguments |= {"num_heads": 4} if "num_heads" in arguments else {}
    kept = []
    for epilogue in product((False, True), repeat=3):
        entry = config | dict(zip(("flatten", "halves", "store_descriptor"), epilogue, strict=True))
        entries = {operand_width: [{"up_to": None, "config": entry}] for operand_width in ("16", "32")}
        two_launches = {"linear_residual_layer_norm": {"16": [], "32": []}}
        with configured_by(TABLES["sm_90"] | two_launches | {operation: entries}):
            out = launcher(**arguments, num_tokens=count(37))
        by_descriptor = DESCRIPTORS and entry["store_descriptor"] and not (op == "qkv_projection" and width == 48)
        assert out[37:48].isfinite().all() if by_descriptor else out[37:48].isnan().all()
        assert out[48:].isnan().all()
        kept.append(out[:37])
    assert kept[0].isfinite().all()
    for out in kept[1:]:
        assert torch.equal(out, kept[0])


@pytest.mark.gpu
@pytest.mark.unguarded
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", WIDTHS)
@pytest.mark.parametrize("operation", ["qkv_projection", "linear_activation", "linear_residual"])
def test_a_sequence_is_bitwise_equal_in_every_class_of_sizes(operation, model, dtype):
    """16 rows are put at the start, at an odd place and at the end of batches of the smallest and the largest size of
    each entry of this device's file."""
    width = "32" if dtype == torch.float32 else "16"
    limits = [entry["up_to"] for entry in configs.table_for(configs.name_for(DEVICE))[operation][width]]
    sizes = sorted({16, *(size for limit in limits[:-1] for size in (limit, limit + 1)), LARGE})
    for inputs, outputs in PLACES[operation](WIDTHS[model]):
        part, bias = normal(outputs, inputs, dtype=dtype) * inputs**-0.5, normal(outputs, dtype=dtype)
        rows, batch = normal(16, inputs, dtype=dtype), normal(LARGE, inputs, dtype=dtype)
        residual = normal(16, outputs, dtype=dtype)
        alone = None
        for size in sizes:
            for first in {0, min(333, size - 16), size - 16}:
                x, rest = batch[:size].clone(), torch.zeros(size, outputs, dtype=dtype, device=DEVICE)
                x[first : first + 16], rest[first : first + 16] = rows, residual
                if operation == "qkv_projection":
                    out = fastbert_kernels.qkv_projection(x, *[part, bias] * 3, 12)
                elif operation == "linear_activation":
                    out = fastbert_kernels.linear_activation(x, part, bias, "gelu")
                else:
                    specs, out = map(spec_of, (x, part, bias, rest)), torch.empty_like(rest)
                    launch = linear_launch("linear_residual", *specs, None, "none", target.torch_precision(x))
                    launch(x=x, weight=part, bias_ptr=bias, residual_ptr=rest, out=out, num_tokens_ptr=None)
                alone = out[:16] if alone is None else alone
                assert torch.equal(out[first : first + 16], alone), (inputs, outputs, size, first)


BLOCK_K = 32  # of the shipped configurations for float32


def tf32(x):
    """Round x to the 10 bits of mantissa of TF32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def parts(x):
    """Split x into two TF32 numbers. The low part is truncated, as in the matrix unit."""
    high = tf32(x)
    return high, ((x - high).view(torch.int32) & ~0x1FFF).view(torch.float32)


def add_products(sums, x, weight):
    """Return sums + x W^T as the matrix unit computes it: eight products at a time, truncated to float32."""
    for part in range(0, x.shape[1], 8):
        exact = sums.double() + x[:, part : part + 8].double() @ weight[:, part : part + 8].double().T
        nearest = exact.float()
        past = nearest.double().abs() > exact.abs()
        sums = torch.where(past, nearest.nextafter(torch.zeros_like(nearest)), nearest)
    return sums


def product_by_tf32(x, weight, products):
    """Return the float32 product x W^T by one or by three TF32 products an element, the small ones first."""
    out = torch.zeros(len(x), len(weight))
    for block in zip(x.split(BLOCK_K, 1), weight.split(BLOCK_K, 1), strict=True):
        (high, low), (weight_high, weight_low) = map(parts, block)
        sums = torch.zeros_like(out)
        if products == 3:
            sums = add_products(add_products(sums, low, weight_high), high, weight_low)
        out += add_products(sums, high, weight_high)
    return out


@pytest.mark.parametrize("num_inputs", [1, 8, 40, 384, 768, 3072])
def test_three_tf32_products_are_within_the_tolerance_and_one_is_not(num_inputs):
    """This is why float32 uses "tf32x3" on NVIDIA GPUs."""
    x, weight = torch.randn(64, num_inputs), torch.randn(256, num_inputs) / math.sqrt(num_inputs)
    truth, eager = x.double() @ weight.double().T, F.linear(x, weight)
    check_close(f"three products, K = {num_inputs}", product_by_tf32(x, weight, 3), eager, truth, OP_FACTOR)
    with pytest.raises(AssertionError, match="max error"):
        check_close(f"one product, K = {num_inputs}", product_by_tf32(x, weight, 1), eager, truth, OP_FACTOR)


def test_the_error_of_three_tf32_products_is_the_tolerance_of_float32():
    """It exceeds FLOAT32_ROUNDINGS, and stays below them plus the rounding of the result."""
    x, weight = 1 + torch.rand(2, 2048, 1)
    ours, truth = product_by_tf32(x, weight, 3), x.double() @ weight.double().T
    check_close("one product", ours, truth.float(), truth, OP_FACTOR)
    off = ((ours - truth) / truth).abs().max() / torch.finfo(torch.float32).eps
    assert FLOAT32_ROUNDINGS < off < FLOAT32_ROUNDINGS + 1
