"""Properties of the launchers that no tolerance is needed for: what a row's bits depend on, what is read and written,
what is refused."""

import mmap
import re
from itertools import product

import pytest
import torch
from cases import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ACTIVATIONS,
    DEVICE,
    ERRORS,
    LARGEST,
    LAYOUTS,
    MARKS,
    OPS,
    TABLES,
    bounds,
    check,
    check_plan,
    count,
    example,
    guarded_outputs,
    layer,
    linear_residual_arguments,
    normal,
)
from sanitizer import sanitized
from torch import Tensor

import fastbert_kernels
from fastbert_kernels import configs, packing_plan, take_bad_ids, unpack
from fastbert_kernels.configs import configured_by
from fastbert_kernels.launch import launching_by
from fastbert_kernels.layer_norm import layer_norm_launch
from fastbert_kernels.operands import spec_of

pytestmark = MARKS

PROJECTIONS = ("linear_activation", "qkv_projection", "linear_residual_layer_norm", "linear_residual_layer_norm wide")
TWO_LAUNCHES = [("linear_residual_layer_norm", "linear_residual")]
# Where TMA does not exist, tiles come and go by pointers.
DESCRIPTORS = DEVICE.type == "cpu" or torch.cuda.get_device_capability(DEVICE) >= (9, 0)
LENGTHS = (5, 64, 0, 1, 70, 3)


@pytest.fixture(autouse=True)
def _guard():
    with guarded_outputs(), sanitized():
        yield


def projection(op: str, dtype: torch.dtype, tokens: int):
    """A launcher and arguments with that many rows, and the names of the arguments that have them.

    There are four blocks of inputs or more: a sum of two would not tell their order.
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
    """Alone, at any place of a tile, and in a buffer so large that another configuration serves it."""
    launcher, arguments, rows = projection(op, dtype, 1100)
    expected = launcher(**arguments)
    for start, stop in ((0, 1), (62, 67), (64, 128), (800, 1100), (1099, 1100)):
        part = launcher(**arguments | {name: arguments[name][start:stop] for name in rows})
        assert torch.equal(part, expected[start:stop]), (start, stop)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", PROJECTIONS)
def test_rows_of_nan_stay_where_they_are(op, dtype):
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
    """Through pointers. A descriptor, which no configuration has for few tokens, writes the last tile as a whole."""
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
@pytest.mark.parametrize("width", [64, 48])
@pytest.mark.parametrize(("op", "operation"), [*zip(PROJECTIONS[:2], PROJECTIONS[:2], strict=True), *TWO_LAUNCHES])
def test_epilogues_change_no_bit(op, operation, width, dtype):
    """Flattened, in halves, through a descriptor, also for a residual of another dtype. A descriptor writes the other
    rows of the last tile, pointers and tiles over the end of a part do not."""
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
        entries = {bits: [{"up_to": None, "config": entry}] for bits in ("16", "32")}
        nothing = {"linear_residual_layer_norm": {"16": [], "32": []}}
        with configured_by(TABLES["sm_90"] | nothing | {operation: entries}):
            out = launcher(**arguments, num_tokens=count(37))
        by_descriptor = DESCRIPTORS and entry["store_descriptor"] and not (op == "qkv_projection" and width == 48)
        assert out[37:48].isfinite().all() if by_descriptor else out[37:48].isnan().all()
        assert out[48:].isnan().all()
        kept.append(out[:37])
    assert kept[0].isfinite().all()
    for out in kept[1:]:
        assert torch.equal(out, kept[0])


@pytest.mark.parametrize(("heads", "stored_by_descriptor"), [(4, True), (3, False)])
def test_only_whole_tiles_of_a_part_are_stored_through_a_descriptor(heads, stored_by_descriptor):
    """A tile over the end of the queries would write the first keys, in a race with the program that they belong to."""
    config = {
        "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "ctas_per_sm": 1,
        "descriptors": True, "flatten": False, "halves": False, "store_descriptor": True,
    }  # fmt: skip
    width, seen = 16 * heads, []
    arguments = [normal(70, width), *[normal(width, width), normal(width)] * 3, heads]
    with (
        configured_by({"qkv_projection": {"32": [{"up_to": None, "config": config}]}}),
        launching_by(lambda kernel, grid, given: seen.append(given["STORE_DESCRIPTOR"])),
    ):
        fastbert_kernels.qkv_projection(*arguments)
    assert seen == [stored_by_descriptor]


@pytest.mark.parametrize("num_tokens", [0, 13, 64])
def test_layer_norm_writes_no_rows_past_the_count(num_tokens):
    """Over a buffer of numbers: in its own place LayerNorm would make NaN of NaN."""
    x, out = normal(70, 48), torch.full((70, 48), 7.0, device=DEVICE)
    weight, bias = torch.ones_like(x[0]), torch.zeros_like(x[0])
    norm = layer_norm_launch(*map(spec_of, (x, weight, bias, out, count(num_tokens))), 1e-12)
    norm(x_ptr=x, norm_weight_ptr=weight, norm_bias_ptr=bias, out_ptr=out, num_tokens_ptr=count(num_tokens))
    torch.testing.assert_close(out[:num_tokens], torch.layer_norm(x[:num_tokens], (48,), eps=1e-12))
    assert (out[num_tokens:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 80])
def test_sequences_do_not_depend_on_each_other(head_size, dtype):
    """Alone, in any order, with another bound of the longest one, between sequences of NaN."""
    texts = normal(sum(LENGTHS), 3, 2, head_size, dtype=dtype).split(LENGTHS)

    def attend(numbers, max_seqlen=70):
        lengths = [LENGTHS[n] for n in numbers]
        qkv = torch.cat([texts[n] for n in numbers])
        return fastbert_kernels.attention(qkv, bounds(lengths), max_seqlen, 0.25).split(lengths)

    together = attend(range(6))
    for order in ((5, 4, 3, 2, 1, 0), (2, 4, 2, 0), (1,), (3, 3, 5), (0,)):
        for number, out in zip(order, attend(order, 200), strict=True):
            assert torch.equal(out, together[number])
    for number in (1, 3, 5):
        texts[number].fill_(float("nan"))
    for number, out in enumerate(attend(range(6))):
        assert out.isnan().all() if number in (1, 3, 5) else torch.equal(out, together[number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["first", "mean"])
def test_pooled_vectors_do_not_depend_on_each_other(mode, dtype):
    texts = normal(sum(LENGTHS), 312, dtype=dtype).split(LENGTHS)

    def pool(numbers):
        lengths = [LENGTHS[n] for n in numbers]
        return fastbert_kernels.pool(torch.cat([texts[n] for n in numbers]), bounds(lengths), mode, True)

    together = pool(range(6))
    for order in ((5, 4, 3, 2, 1, 0), (4,), (1, 1), (2, 0)):
        assert torch.equal(pool(order), together[list(order)])
    texts[1].fill_(float("nan"))
    out = pool(range(6))
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3, 4, 5]], together[[0, 2, 3, 4, 5]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("embeds", [False, True])
def test_a_text_does_not_depend_on_its_batch(embeds, dtype):
    """Bit for bit the same alone, in a batch in any order, and padded on the right, on the left or on both sides."""
    texts = [torch.randint(0, 11, (length,)).to(DEVICE) for length in (5, 70, 1, 33)]
    alone = [layer([text], [slice(0, len(text))], len(text), dtype, embeds)[0] for text in texts]
    assert all(out.isfinite().all() for out in alone)
    for order, seq_len, side in (((0, 1, 2, 3), 70, 0.0), ((2, 3, 1, 0), 75, 0.5), ((3, 0), 40, 1.0)):
        chosen = [texts[n] for n in order]
        starts = [int((seq_len - len(text)) * side) for text in chosen]
        places = [slice(start, start + len(text)) for start, text in zip(starts, chosen, strict=True)]
        for number, out in zip(order, layer(chosen, places, seq_len, dtype, embeds), strict=True):
            assert torch.equal(out, alone[number]), (order, number)
    assert take_bad_ids(DEVICE) == []


def test_indices_of_dropped_places_are_not_looked_at():
    _, arguments = example("embed_layer_norm", torch.float32)
    kept = arguments["indices"][:40]
    for name in ("input_ids", "token_type_ids", "position_ids"):
        arguments[name].view(-1)[arguments["indices"][40:]] = -99
    assert fastbert_kernels.embed_layer_norm(**arguments | {"indices": kept}).isfinite().all()
    assert fastbert_kernels.embed_layer_norm(**arguments, num_tokens=count(40))[:40].isfinite().all()
    assert take_bad_ids(DEVICE) == []


def tensors_of(op: str) -> list[str]:
    return [name for name, x in example(op, torch.float32)[1].items() if isinstance(x, Tensor)]


OPERANDS = [(op, name) for op in OPS for name in tensors_of(op)]
# Places and bounds that are all alike are none; of one dimension there is nothing to transpose.
LAID_OUT = [
    (op, name, layout)
    for op, name in OPERANDS
    for layout in LAYOUTS
    if layout != "contiguous"
    and not (layout == "expanded" and name in ("indices", "cu_seqlens"))
    and not (layout == "transposed" and example(op, torch.float32)[1][name].ndim == 1)
]


@pytest.mark.parametrize(("op", "name", "layout"), LAID_OUT)
def test_an_operand_may_lie_anyhow_in_memory(op, name, layout):
    launcher, arguments = example(op, torch.float16)
    copy = LAYOUTS[layout](arguments[name])
    outputs = [launcher(**arguments | {name: x}) for x in (copy, copy.contiguous())]
    if op == "packing_plan":
        outputs = [torch.cat(plan) for plan in outputs]
    assert torch.equal(*outputs)


# Linux's own number; `mmap` names it from Python 3.13 on.
MAP_NORESERVE = 0x4000
# Of two rows the stride itself would be 2^31, which is refused.
OPERANDS_OF_ROWS = [
    (op, name) for op, name in OPERANDS for x in [example(op, torch.float32)[1][name]] if x.ndim > 1 and len(x) > 2
]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU holds all of it: test_gpu.py")
@pytest.mark.parametrize(("op", "name"), OPERANDS_OF_ROWS)
def test_offsets_past_2_to_the_31(op, name):
    """Half of the rows lie there, in memory of which only they exist; where 32 bits would put them there are zeros.

    They are unaligned, so that pointers address them and no descriptor, which counts in 64 bits itself.
    """
    launcher, arguments = example(op, torch.float16)
    x = arguments[name]
    stride = 64 * -(-(2**31) // (64 * (len(x) // 2)))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, (2**31 + len(x) * stride) * x.itemsize, flags)
    far = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (stride, *x.stride()[1:]), 2**31 + 1).copy_(x)
    outputs = [launcher(**arguments | {name: operand}) for operand in (x, far)]
    if op == "packing_plan":
        outputs = [torch.cat(plan) for plan in outputs]
    assert torch.equal(*outputs)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU holds all of it: test_gpu.py")
def test_heads_past_2_to_the_31():
    """Strides are below it, what they are multiplied by is not."""
    qkv, stride = normal(9, 3, 3, 16, dtype=torch.float16), 3 * 2**29
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, (2 * stride + 2048) * 2, flags), dtype=torch.float16)
    far = memory.as_strided(qkv.shape, (48, 16, stride, 1)).copy_(qkv)
    arguments = bounds((5, 4)), 5, 0.25
    assert torch.equal(fastbert_kernels.attention(far, *arguments), fastbert_kernels.attention(qkv, *arguments))


def rows_far_apart(rows: int, width: int) -> Tensor:
    """float16 rows that lie 2^31 elements apart, in memory of which only they exist."""
    if DEVICE.type == "cuda":
        return torch.zeros((rows - 1) * 2**31 + width, dtype=torch.float16, device=DEVICE).as_strided(
            (rows, width), (2**31, 1)
        )
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, rows * 2**32, flags)
    return torch.frombuffer(memory, dtype=torch.float16).as_strided((rows, width), (2**31, 1))


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("attention", "packing_plan")])
def test_rows_that_lie_2_to_the_31_apart_are_refused(op):
    launcher, arguments = example(op, torch.float16)
    name = "word_table" if op == "embed_layer_norm" else "hidden" if "hidden" in arguments else "x"
    arguments[name] = rows_far_apart(2, arguments[name].shape[1])
    arguments |= {key: arguments[key][:2] for key in ("residual", "indices") if key in arguments}
    with pytest.raises(ValueError, match="a stride or width of 2147483648 elements is not served"):
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
def test_operands_lie_on_one_device(op, name):
    launcher, arguments = example(op, torch.float32)
    with pytest.raises(ValueError, match=f"{op.split()[0]}: tensors lie on .* and "):
        launcher(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.parametrize("op", [op for op in OPS if op != "packing_plan"])
def test_float64_is_refused(op):
    launcher, arguments = example(op, torch.float64)
    with pytest.raises(TypeError, match="dtype torch.float64 is not served, only float32, float16 and bfloat16"):
        launcher(**arguments)


@pytest.mark.parametrize(("op", "changes", "error", "message"), ERRORS)
def test_what_does_not_fit_is_refused(op, changes, error, message):
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
@pytest.mark.parametrize("op", ["attention", "pool"])
def test_hostile_bounds(op, hostile, meant):
    """Bounds that are negative, past the buffer or falling mean the rows between them that there are."""
    shape = (3, 2, 16) if op == "attention" else (48,)
    x = torch.cat((normal(9, *shape), torch.full((200, *shape), float("nan"), device=DEVICE)))[:9]
    rest = {"attention": {"max_seqlen": 9, "scale": 0.25}, "pool": {"mode": "mean"}}[op]
    outputs = [
        getattr(fastbert_kernels, op)(x, torch.tensor(values, dtype=torch.int32, device=DEVICE), **rest)
        for values in (hostile, meant)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("lengths", [(0, 0), (3,), (0, 5, 0, 2)], ids=str)
def test_rows_outside_of_sequences_are_neither_read_nor_written(lengths):
    qkv, stop = normal(9, 3, 2, 16), sum(lengths)
    expected = fastbert_kernels.attention(qkv[:stop], bounds(lengths), 9, 0.25)
    qkv[stop:] = float("nan")
    out = fastbert_kernels.attention(qkv, bounds(lengths), 9, 0.25)
    assert torch.equal(out[:stop], expected)
    qkv[stop:] = 0
    assert fastbert_kernels.attention(qkv, bounds(lengths), 9, 0.25)[stop:].isnan().all()


def test_pool_reads_no_rows_that_do_not_exist():
    hidden = normal(5, 48)
    with_zeros = torch.cat((hidden, torch.zeros_like(hidden)))
    outputs = [
        fastbert_kernels.pool(rows, bounds((5,)), "mean", indices=torch.tensor(indices, device=DEVICE))
        for rows, indices in ((hidden, [1, -1, 5, 2**40, 3]), (with_zeros, [1, 6, 5, 7, 3]))
    ]
    assert torch.equal(*outputs)


drawn = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@drawn
@given(
    tokens=st.integers(1, 140),
    columns=st.tuples(st.integers(1, 100), st.integers(16, 140)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
)
def test_drawn_linear_activation(tokens, columns, activation, dtype, layouts):
    torch.manual_seed(0)
    inputs, outputs = columns
    x, weight = (
        LAYOUTS[layout](normal(rows, inputs, dtype=dtype))
        for layout, rows in zip(layouts, (tokens, outputs), strict=True)
    )
    check("linear_activation", x=x, weight=weight, bias=normal(outputs, dtype=dtype), activation=activation)


@drawn
@given(
    tokens=st.integers(1, 140),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 40)),
    num_inputs=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_drawn_qkv_projection(tokens, heads, num_inputs, dtype, layout):
    torch.manual_seed(0)
    num_heads, width = heads[0], heads[0] * heads[1]
    parameters = {}
    for part in "qkv":
        parameters[f"{part}_weight"] = LAYOUTS[layout](normal(width, num_inputs, dtype=dtype))
        parameters[f"{part}_bias"] = normal(width, dtype=dtype)
    check("qkv_projection", x=normal(tokens, num_inputs, dtype=dtype), **parameters, num_heads=num_heads)


@drawn
@given(
    tokens=st.integers(1, 140),
    width=st.integers(2, 500),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
)
def test_drawn_linear_residual_layer_norm(tokens, width, dtype, layouts):
    torch.manual_seed(0)
    arguments = linear_residual_arguments(tokens, width, dtype, dtype)
    for name, layout in zip(("x", "residual"), layouts, strict=True):
        arguments[name] = LAYOUTS[layout](arguments[name])
    check("linear_residual_layer_norm", **arguments)


@drawn
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=4).filter(any),
    width=st.integers(1, 300),
    mode=st.sampled_from(("first", "mean")),
    normalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_drawn_pool(lengths, width, mode, normalize, dtype, layout):
    torch.manual_seed(0)
    hidden = LAYOUTS[layout](normal(sum(lengths), width, dtype=dtype))
    check("pool", hidden=hidden, cu_seqlens=bounds(tuple(lengths)), mode=mode, normalize=normalize)


@drawn
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=4),
    num_heads=st.integers(1, 3),
    head_size=st.integers(1, 128),
    dtype=st.sampled_from(DTYPES),
    gaps=st.tuples(*[st.integers(0, 3)] * 3),
)
def test_drawn_attention(lengths, num_heads, head_size, dtype, gaps):
    torch.manual_seed(0)
    shape = 3, num_heads, head_size
    buffer = torch.full((sum(lengths), *map(sum, zip(shape, gaps, strict=True))), float("nan"), dtype=dtype)
    qkv = buffer.to(DEVICE)[:, :3, :num_heads, gaps[2] :].copy_(normal(sum(lengths), *shape))
    check("attention", qkv=qkv, cu_seqlens=bounds(lengths), max_seqlen=max(lengths), scale=head_size**-0.5)


@drawn
@given(
    st.integers(1, 20).flatmap(
        lambda seq_len: st.lists(st.lists(st.booleans(), min_size=seq_len, max_size=seq_len), min_size=1, max_size=5)
    ),
    st.sampled_from(list(LAYOUTS)),
)
def test_drawn_masks(rows, layout):
    """Planned, embedded in packed form and put back, tokens have the bits that they have without packing."""
    torch.manual_seed(0)
    mask = LAYOUTS[layout](torch.tensor(rows, device=DEVICE))
    check_plan(mask)
    indices, cu_seqlens = packing_plan(mask)
    _, arguments = example("embed_layer_norm", torch.float16)
    arguments |= {"token_type_ids": None, "position_ids": None, "position_table": normal(20, 48, dtype=torch.float16)}
    arguments["input_ids"] = torch.randint(0, 11, mask.shape).to(DEVICE)
    everything = fastbert_kernels.embed_layer_norm(**arguments | {"indices": None}).unflatten(0, mask.shape)
    packed = fastbert_kernels.embed_layer_norm(**arguments | {"indices": indices}, num_tokens=cu_seqlens[-1:])
    padded = unpack(packed, indices, *mask.shape, cu_seqlens[-1:])
    assert torch.equal(padded, torch.where(mask[..., None], everything, 0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("op", OPS)
def test_launches_on_a_device_that_is_not_current(op):
    launcher, arguments = example(op, torch.float32)
    there = {name: x.to("cuda:1") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    outputs = [launcher(**values) for values in (arguments, there)]
    here, there = (torch.cat(out) if op == "packing_plan" else out for out in outputs)
    assert there.device == torch.device("cuda", 1)
    assert torch.equal(here, there.to(DEVICE))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", TABLES)
def test_configurations(name):
    """What batch invariance and the kernels ask of every configuration file."""
    path = configs.path_of(name)
    document = configs.check(configs.read(path), path)
    # Of the matrix instructions none but wgmma and tcgen05, which take 64 rows or more.
    if document.get("architecture", name) in ("sm_90", "sm_100"):
        gemms = (TABLES[name][operation]["16"] for operation in TABLES[name] if not operation.startswith("attention"))
        assert all(entry["config"]["BLOCK_M"] >= 64 for entries in gemms for entry in entries)
    # What nobody has measured says so.
    timed = "measured_us" in path.read_text()
    assert timed == ("device" in document)
    assert timed or document["source"].endswith("; not measured")
    if timed:
        for operation, width in product(TABLES[name], ("16", "32")):
            for entry in document[operation][width]:
                assert "measured_us" in entry or entry["source"].endswith("; not measured"), (operation, width, entry)
