"""Tests of every launcher: memory layouts of operands, what is read and written, errors."""

import re
from itertools import product

import pytest
import torch
from cases import DTYPES
from kernel_cases import (
    DEVICE,
    ERRORS,
    FORMULAS,
    GUARDED,
    LARGEST,
    LAYOUTS,
    OPS,
    bounds,
    example,
    flat,
    layer,
    normal,
    sparse,
)
from torch import Tensor

import fastbert
import fastbert_kernels
from fastbert import ops
from fastbert.testing import OP_FACTOR, check_close
from fastbert_kernels import take_bad_ids

pytestmark = GUARDED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("embeds", [False, True])
def test_a_sequence_does_not_depend_on_its_batch(embeds, dtype):
    """Bitwise equal alone, in a batch in any order, and padded on the right, on the left or on both sides."""
    sequences = [torch.randint(0, 11, (length,)).to(DEVICE) for length in (5, 70, 1, 33)]
    alone = [layer([x], [slice(0, len(x))], len(x), dtype, embeds)[0] for x in sequences]
    assert all(out.isfinite().all() for out in alone)
    for order, seq_len, side in (((0, 1, 2, 3), 70, 0.0), ((2, 3, 1, 0), 75, 0.5), ((3, 0), 40, 1.0)):
        chosen = [sequences[n] for n in order]
        starts = [int((seq_len - len(x)) * side) for x in chosen]
        places = [slice(start, start + len(x)) for start, x in zip(starts, chosen, strict=True)]
        for number, out in zip(order, layer(chosen, places, seq_len, dtype, embeds), strict=True):
            assert torch.equal(out, alone[number]), (order, number)
    assert take_bad_ids(DEVICE) == []


def tensors_of(op: str) -> list[str]:
    return [name for name, x in example(op, torch.float32)[1].items() if isinstance(x, Tensor)]


OPERANDS = [(op, name) for op in OPS for name in tensors_of(op)]
# Expanded indices or cu_seqlens would be invalid, and one dimension cannot be transposed.
LAID_OUT = [
    (op, name, layout)
    for op, name in OPERANDS
    for layout in LAYOUTS
    if layout != "contiguous"
    and not (layout == "expanded" and name in ("indices", "cu_seqlens"))
    and not (layout == "transposed" and example(op, torch.float32)[1][name].ndim == 1)
]


@pytest.mark.parametrize(("op", "name", "layout"), LAID_OUT)
def test_an_operand_may_have_any_layout(op, name, layout):
    launcher, arguments = example(op, torch.float16)
    copy = LAYOUTS[layout](arguments[name])
    assert torch.equal(*(flat(launcher(**arguments | {name: x})) for x in (copy, copy.contiguous())))


# With two rows the stride itself would be 2^31, which is an error.
OPERANDS_OF_ROWS = [
    (op, name) for op, name in OPERANDS for x in [example(op, torch.float32)[1][name]] if x.ndim > 1 and len(x) > 2
]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU see test_outputs_past_2_to_the_31")
@pytest.mark.parametrize(("op", "name"), OPERANDS_OF_ROWS)
def test_offsets_past_2_to_the_31(op, name):
    """Half of the rows are there, in a sparse mapping. An offset that wraps at 32 bits would read zeros.

    The rows are unaligned, so that they are read through pointers: descriptors have 64-bit offsets anyway.
    """
    launcher, arguments = example(op, torch.float16)
    x = arguments[name]
    stride = 64 * -(-(2**31) // (64 * (len(x) // 2)))
    memory = sparse(2**31 + len(x) * stride, x.dtype)
    far = memory.as_strided(x.shape, (stride, *x.stride()[1:]), 2**31 + 1).copy_(x)
    assert torch.equal(*(flat(launcher(**arguments | {name: operand})) for operand in (x, far)))


def rows_far_apart(rows: int, width: int) -> Tensor:
    """Return float16 rows that are 2^31 elements apart, on the CPU in a sparse mapping."""
    size = (rows - 1) * 2**31 + width
    memory = torch.zeros(size, dtype=torch.float16, device=DEVICE) if DEVICE.type == "cuda" else sparse(size)
    return memory.as_strided((rows, width), (2**31, 1))


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith(("attention", "packing_plan"))])
def test_a_stride_of_2_to_the_31_is_an_error(op):
    launcher, arguments = example(op, torch.float16)
    name = {"embed_layer_norm": "word_table", "activation_backward": "grad"}.get(op, "x")
    name = "hidden" if "hidden" in arguments else name
    arguments[name] = rows_far_apart(2, arguments[name].shape[1])
    beside = {"residual", "indices", "grad", "other", "pre"} & set(arguments) - {name}
    arguments |= {key: arguments[key][:2] for key in beside}
    with pytest.raises(ValueError, match="a stride or width of 2147483648 elements is not supported"):
        launcher(**arguments)


@pytest.mark.parametrize("op", ["linear_activation", "qkv_projection", "pool", "unpack"])
def test_the_stride_of_a_single_row_does_not_matter(op):
    launcher, arguments = example(op, torch.float16)
    name = "hidden" if "hidden" in arguments else "x"
    if op == "pool":
        arguments |= {"cu_seqlens": bounds((1,)), "indices": None}
    if op == "unpack":
        arguments["indices"] = arguments["indices"][:1]
    row = arguments[name][:1]
    apart = row.as_strided(row.shape, (2**31 + 1, 1))
    assert torch.equal(launcher(**arguments | {name: apart}), launcher(**arguments | {name: row}))


@pytest.mark.parametrize("op", OPS)
def test_operands_are_only_read(op):
    launcher, arguments = example(op, torch.float16)
    kept = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    launcher(**arguments)
    assert all(torch.equal(x, arguments[name]) for name, x in kept.items())


@pytest.mark.parametrize(("op", "name"), [pair for pair in OPERANDS if pair[0] != "packing_plan"])
def test_operands_on_two_devices_are_an_error(op, name):
    launcher, arguments = example(op, torch.float32)
    with pytest.raises(ValueError, match=f"{op.split()[0]}: tensors are on .* and "):
        launcher(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.parametrize("op", [op for op in OPS if op != "packing_plan"])
def test_float64_is_an_error(op):
    launcher, arguments = example(op, torch.float64)
    with pytest.raises(TypeError, match="dtype torch.float64 is not supported, only float32, float16 and bfloat16"):
        launcher(**arguments)


@pytest.mark.parametrize(("op", "changes", "error", "message"), ERRORS)
def test_invalid_arguments_are_an_error(op, changes, error, message):
    launcher, arguments = example(op, torch.float32)
    for name, value in changes.items():
        if isinstance(value, torch.dtype):
            value = arguments[name].to(value)
        elif isinstance(value, tuple):
            value = torch.zeros(value, device=DEVICE)
        arguments[name] = value
    with pytest.raises(error, match=re.escape(message)):
        launcher(**arguments)


@pytest.mark.parametrize(
    ("hostile", "meant"),
    [
        ([-5, 3, 9], [0, 3, 9]),
        ([0, 3, 1000], [0, 3, 9]),
        ([0, 3, LARGEST], [0, 3, 9]),
        ([-LARGEST - 1, 9, -7, 0], [0, 9, 9, 9]),
        ([0, 9, 20, 30, LARGEST], [0, 9, 9, 9, 9]),
        ([0, 9, 4], [0, 9, 9]),
        ([0, 9, -LARGEST - 1], [0, 9, 9]),
        ([0, 9, LARGEST, -LARGEST - 1], [0, 9, 9, 9]),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["attention", "attention_forward", "attention_backward", "pool"])
def test_hostile_bounds(op, hostile, meant):
    """cu_seqlens that are negative, past the buffer or falling select only rows of the buffer."""

    def inside(*shape: int) -> Tensor:
        return torch.cat((normal(9, *shape), torch.full((200, *shape), float("nan"), device=DEVICE)))[:9]

    if op == "pool":
        arguments = {"hidden": inside(48), "mode": "mean"}
    else:
        arguments = {"qkv": inside(3, 2, 16), "max_seqlen": 9, "scale": 0.25}
    if op == "attention_backward":
        arguments |= {"grad": inside(32), "context": inside(32), "lse": inside(2).T}
    outputs = [
        getattr(fastbert_kernels, op)(**arguments, cu_seqlens=torch.tensor(values, dtype=torch.int32, device=DEVICE))
        for values in (hostile, meant)
    ]
    if op == "attention_backward":  # rows from the last bound on get zeros, and here sequences write them too
        outputs = [out[: max(hostile[-1], 0)] for out in outputs]
    assert torch.equal(*map(flat, outputs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("op", OPS)
def test_launches_on_a_device_that_is_not_current(op):
    launcher, arguments = example(op, torch.float32)
    there = {name: x.to("cuda:1") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    here, there = (flat(launcher(**values)) for values in (arguments, there))
    assert there.device == torch.device("cuda", 1)
    assert torch.equal(here, there.to(DEVICE))
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.unguarded
@pytest.mark.parametrize("op", ops.OPS)
def test_opcheck(op):
    _, arguments = example(op, torch.float32)
    for value in arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    function = getattr(torch.ops.fastbert, op).default
    with fastbert.backend("triton"):
        torch.library.opcheck(function, tuple(arguments.get(argument.name) for argument in function._schema.arguments))


@pytest.mark.gpu
@pytest.mark.unguarded
def test_outputs_past_2_to_the_31():
    """The last sequence of each op agrees with its formula. Last in the file: a wrong offset can end the process."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0] / 2**30
    if free < 24:
        pytest.skip(f"needs 24 GiB of free memory on the device, there are {free:.1f}")
    batch_size, length, width = 5_800, 500, 768
    rows, bound = batch_size * length, bounds((length,))

    def normal(*shape):
        return torch.empty(shape, dtype=torch.float16, device=DEVICE).normal_()

    def run(op, end, **arguments):
        out = getattr(fastbert_kernels, op)(**arguments)
        arguments |= end
        wide = {name: x.double() for name, x in arguments.items() if isinstance(x, Tensor) and x.dtype == torch.float16}
        expected, exact = FORMULAS[op](**arguments), FORMULAS[op](**arguments | wide)
        check_close(op, out[-len(expected) :], expected.half(), exact, OP_FACTOR)
        return out

    words, vector = normal(rows, width), normal(width)
    ids = torch.randint(rows - 99, rows, (batch_size, length), device=DEVICE)
    absent = dict.fromkeys(("token_type_ids", "position_ids", "inputs_embeds", "indices"))
    tables = {"position_table": normal(length, width), "token_type_table": normal(2, width)}
    end = {"word_table": words[-99:], "input_ids": ids[-1:] - (rows - 99)}
    norm = {"weight": vector, "bias": vector, "eps": 1e-12}
    hidden = run("embed_layer_norm", end, input_ids=ids, **absent, word_table=words, **tables, **norm)
    assert hidden.numel() > 2**31
    del words, end
    linear = {"weight": normal(width, width) / 28, "bias": vector}
    parts = {f"{part}_{name}": x for part, (name, x) in product("qkv", linear.items())}
    qkv = run("qkv_projection", {"x": hidden[-length:]}, x=hidden, **parts, num_heads=12)
    end, bounds_of_all = {"qkv": qkv[-length:], "cu_seqlens": bound}, bounds((length,) * batch_size)
    context = run("attention", end, qkv=qkv, cu_seqlens=bounds_of_all, max_seqlen=length, scale=0.125)
    del qkv, end
    end, norm = {"x": context[-length:], "residual": hidden[-length:]}, {"norm_weight": vector, "norm_bias": vector}
    hidden = run("linear_residual_layer_norm", end, x=context, residual=hidden, **linear, **norm, eps=1e-12)
    hidden = run("linear_activation", {"x": hidden[-length:]}, x=hidden, **linear, activation="gelu")
    run("pool", {"hidden": hidden[-length:], "cu_seqlens": bound}, hidden=hidden, cu_seqlens=bounds_of_all, mode="mean")
    backwards = torch.arange(rows - 1, -1, -1, device=DEVICE)
    reversed_rows = fastbert_kernels.unpack(hidden, backwards, batch_size, length).flatten(0, 1)
    assert torch.equal(reversed_rows[-length:], hidden[:length].flip(0))
    assert torch.equal(reversed_rows[:length], hidden[-length:].flip(0))
