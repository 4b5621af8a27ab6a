"""Every launcher of `fastbert_kernels` against its formula, over sizes, dtypes, layouts and launch configurations."""

import logging
from copy import deepcopy
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES
from kernel_cases import (
    ACTIVATIONS,
    DEVICE,
    KINDS,
    LARGEST,
    LAYOUTS,
    MARKS,
    TABLES,
    bounds,
    check,
    check_plan,
    count,
    embed_arguments,
    example,
    guarded_outputs,
    kept_places,
    linear_residual_arguments,
    normal,
    pairwise,
)
from sanitizer import sanitized
from torch import Tensor

import fastbert_kernels
from fastbert_kernels import BadId, configs, launch, operands, packing, packing_plan, take_bad_ids, target, unpack

pytestmark = MARKS

TOKENS = (1, 2, 63, 64, 65, 127, 128, 129, 300)
LENGTHS = ((1,), (0, 0), (5, 1, 9, 0, 3), (0, 0, 65, 129, 0), (64,), (128, 127, 2), (256, 257), (16, 16, 16))
HALVES = (torch.float16, torch.bfloat16)
GEMM_AND_RESIDUAL = (*((dtype, dtype) for dtype in DTYPES), *((half, torch.float32) for half in HALVES))
MASK_VALUES = (
    ("bool", True), ("int64", 1), ("int32", -(2**31)), ("uint8", 200), ("float32", 0.25), ("float16", float("nan"))
)  # fmt: skip


@pytest.fixture(autouse=True)
def _guard():
    take_bad_ids(DEVICE)
    with guarded_outputs(), sanitized():
        yield


@pytest.fixture
def configured(monkeypatch):
    """Call it with a table of launch configurations to use that one."""

    def use(table: dict) -> None:
        monkeypatch.setattr(launch, "configurations", lambda name: table)
        launch.forget_launches()

    yield use
    launch.forget_launches()


@pairwise(
    tokens=TOKENS,
    shape=((48, 80), (312, 384), (80, 2), (384, 272), (13, 7)),
    activation=ACTIVATIONS,
    dtype=DTYPES,
    layout=LAYOUTS,
)
def test_linear_activation(tokens, shape, activation, dtype, layout):
    inputs, outputs = shape
    x = LAYOUTS[layout](normal(tokens, inputs, dtype=dtype))
    # Sums of the size of one: of far smaller results than one the rule has no floor.
    weight, bias = normal(outputs, inputs, dtype=dtype) / inputs**0.5, normal(outputs, dtype=dtype)
    check("linear_activation", x=x, weight=weight, bias=bias, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_of_one_column(dtype):
    """The stride of a dimension of one element says nothing, whatever it is."""
    x, weight = (normal(rows, 64, dtype=dtype)[:, ::64] for rows in (9, 20))
    check("linear_activation", x=x, weight=weight, bias=normal(20, dtype=dtype), activation="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["linear_activation", "qkv_projection", "linear_residual_layer_norm"])
def test_rows_of_more_than_their_columns(op, dtype):
    """Strides are multiples of 16 bytes and the number of inputs is not; no descriptor, which knows it, serves them."""
    _, arguments = example(op, dtype)
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.shape[-1] == 40:
            arguments[name] = x[:, 3:16]
    check(op, **arguments)


def activate(values: Tensor, activation: str) -> Tensor:
    """The activation alone, of values that come in as the bias."""
    x, weight = (values.new_zeros(size, 16) for size in (1, len(values)))
    return fastbert_kernels.linear_activation(x, weight, values, activation)[0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_of_every_size_is_a_rounding_away(activation, dtype):
    """Each value by itself: the closeness rule looks at the largest of them."""
    coarse = torch.linspace(-40, 40, 161, device=DEVICE).to(dtype)
    fine = torch.linspace(0, 0.5, 64, device=DEVICE).to(dtype)
    ours = fastbert_kernels.linear_activation(coarse[:, None], torch.ones_like(fine)[:, None], fine, activation)
    truth = ACTIVATIONS[activation](coarse.double()[:, None] + fine.double())
    assert (ours - truth).abs().le(torch.finfo(dtype).eps * truth.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_special_values(activation, dtype):
    largest = torch.finfo(dtype).max
    values = torch.tensor([float("nan"), float("inf"), largest, 1000, 0, -1000, -largest], device=DEVICE, dtype=dtype)
    expected = {
        "tanh": torch.where(values.isnan(), values, values.sign()),
        "none": values,
    }.get(activation, values.where(~(values < 0), 0))
    torch.testing.assert_close(activate(values, activation), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_activation_of_small_values(size, activation, dtype):
    x, weight, bias = normal(16, 48, dtype=dtype) * size, normal(80, 48, dtype=dtype) / 7, normal(80, dtype=dtype)
    check("linear_activation", x=x, weight=weight, bias=bias * size, activation=activation)


@pairwise(
    tokens=TOKENS,
    heads=((3, 16), (5, 26), (1, 7), (12, 32)),
    dtype=DTYPES,
    layouts=(("contiguous",) * 3, ("columns",) * 3, ("contiguous", "columns", "transposed"), ("every other",) * 3),
)
def test_qkv_projection(tokens, heads, dtype, layouts):
    """Weights of one stride are read where they lie, weights of several are copied."""
    num_heads, head_size = heads
    width = num_heads * head_size
    parameters = {}
    for part, layout in zip("qkv", layouts, strict=True):
        parameters[f"{part}_weight"] = LAYOUTS[layout](normal(width, 40, dtype=dtype))
        parameters[f"{part}_bias"] = normal(width, dtype=dtype)
    check("qkv_projection", x=normal(tokens, 40, dtype=dtype), **parameters, num_heads=num_heads)


@pairwise(
    width=(48, 128, 200, 312, 384, 400, 768, 1024),
    dtypes=GEMM_AND_RESIDUAL,
    tokens=(1, 64, 65),
    layout=LAYOUTS,
)
def test_linear_residual_layer_norm(width, dtypes, tokens, layout, launches):
    """Also with a residual of float32 beside 16-bit operands, as autocast has it."""
    arguments = linear_residual_arguments(tokens, width, *dtypes)
    arguments["residual"] = LAYOUTS[layout](arguments["residual"])
    kept = arguments["residual"].clone()
    assert check("linear_residual_layer_norm", **arguments).dtype == dtypes[1]
    assert torch.equal(arguments["residual"], kept)
    if target.architecture(DEVICE) in ("sm_80", "sm_90", "sm_100"):
        one = dtypes[0] in HALVES and width <= 384
        two = ["_linear_kernel", "_layer_norm_kernel"]
        assert launches == (["_linear_residual_layer_norm_kernel"] if one else two)


# Of most widths no float32 sum is the multiple of 0.1 or 333.1; a GPU's quotient is rounded for 1, too.
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
    """Rows whose variance is 10^-6, to which a larger eps would matter."""
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
    """Rows whose mean, rounded to the dtype, would be off by half the spread, or whose squares are infinite there."""

    def rows(count: int) -> Tensor:
        bits = torch.randint(0, 2, (count, width))
        values = bits + 1 / torch.finfo(dtype).eps if spread == "about a large mean" else 60_000 * bits - 30_000
        return values.to(DEVICE, dtype)

    arguments = linear_residual_arguments(9, width, dtype, dtype) | {"residual": rows(9)}
    for name in ("x", "bias"):
        arguments[name].zero_()
    check("linear_residual_layer_norm", **arguments)
    arguments = embed_arguments("int64", "int64", "int64", "contiguous", width, dtype) | {"word_table": rows(11)}
    for name in ("position_table", "token_type_table"):
        arguments[name].zero_()
    check("embed_layer_norm", **arguments, indices=None)


@pairwise(
    head_size=(1, 8, 16, 32, 64, 80, 96, 128),
    lengths=LENGTHS,
    dtype=DTYPES,
    layout=("contiguous", "columns", "unaligned", "every other", "expanded", "parts of more"),
)
def test_attention(head_size, lengths, dtype, layout):
    qkv = normal(sum(lengths), 3, 2, head_size, dtype=dtype)
    if layout == "parts of more":
        qkv = qkv.new_full((len(qkv), 5, 7, head_size + 8), float("nan"))[:, 1:4, 2:6:2, :head_size].copy_(qkv)
    elif layout == "expanded":
        qkv = qkv[:, :, :1].expand(qkv.shape)  # heads: of equal tokens attention is any average
    else:
        qkv = LAYOUTS[layout](qkv)
    check("attention", qkv=qkv, cu_seqlens=bounds(lengths), max_seqlen=max(lengths), scale=head_size**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_large_scores(dtype):
    """Scores up to 10^5, which float16 cannot hold: softmax picks one key."""
    qkv = normal(70, 3, 2, 32, dtype=dtype)
    qkv[:, :2] *= 60
    check("attention", qkv=qkv, cu_seqlens=bounds((65, 5)), max_seqlen=65, scale=1.0)


@pytest.mark.parametrize(("dtype", "score"), [(torch.float16, -7.75), (torch.bfloat16, -5.625)], ids=str)
def test_attention_to_a_long_tail(dtype, score):
    """The weights of 64 keys of this score are less than half of the dtype's step at 64, what the first keys sum to."""
    qkv = torch.zeros(21 * 64, 3, 1, 16)
    qkv[:, 0, 0, 0], qkv[64:, 1, 0, 0], qkv[:, 2] = 1, score, 1
    check("attention", qkv=qkv.to(DEVICE, dtype), cu_seqlens=bounds((21 * 64,)), max_seqlen=21 * 64, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.25, 0.0, 1e-40, -1e-40])
def test_attention_of_any_scale(scale, dtype):
    """With keys past the end of a sequence: minus infinity times zero is no number."""
    qkv = normal(85, 3, 3, 16, dtype=dtype)
    check("attention", qkv=qkv, cu_seqlens=bounds((5, 0, 64, 16)), max_seqlen=64, scale=scale)


@pytest.mark.parametrize("branch", [True, False])
def test_attention_masks_the_same_with_and_without_a_branch(branch, monkeypatch):
    qkv = normal(200, 3, 2, 16, dtype=torch.float16)
    arguments = {"cu_seqlens": bounds((5, 0, 64, 131)), "max_seqlen": 131, "scale": 0.25}
    expected = fastbert_kernels.attention(qkv, **arguments)
    module = import_module("fastbert_kernels.attention")
    monkeypatch.setattr(module, "architecture", lambda device: "sm_90" if branch else "sm_80")
    launch.forget_launches()
    assert torch.equal(fastbert_kernels.attention(qkv, **arguments), expected)
    launch.forget_launches()


def test_a_row_of_queries_keys_and_values_is_below_2_to_the_31():
    """Only planned: three widths of 2^30."""

    def layout(*shape):
        return torch.Size(shape), (shape[-1], 1)[-len(shape) :], torch.float16, DEVICE, 0

    weight, bias = layout(2**30, 16), layout(2**30)
    plan = import_module("fastbert_kernels.qkv_projection").plan_qkv_projection
    with pytest.raises(ValueError, match="a stride or width of 3221225472 elements is not served"):
        plan(layout(5, 16), weight, bias, weight, bias, weight, bias, None, 16, None)


def test_attention_of_too_many_programs():
    """One for each head and block of queries of 67 million texts: only planned."""
    qkv = (torch.Size((9, 3, 16, 64)), (3072, 1024, 64, 1), torch.float16, DEVICE, 0)
    cu_seqlens = (torch.Size((2**26 + 1,)), (1,), torch.int32, DEVICE, 0)
    plan_attention = import_module("fastbert_kernels.attention").plan_attention
    with pytest.raises(ValueError, match="programs are not served, only less than 2.31"):
        plan_attention(qkv, cu_seqlens, 512, 0.125, None)
    assert plan_attention(qkv, cu_seqlens, 16, 0.125, None).grid == (2**30,)


@pytest.mark.parametrize("max_seqlen", [10, 128, 129, 500])
def test_attention_with_a_generous_bound(max_seqlen):
    check("attention", qkv=normal(13, 3, 2, 16), cu_seqlens=bounds((10, 3)), max_seqlen=max_seqlen, scale=0.3)


@pairwise(
    source=("int64", "int32", "embeds"),
    types=("int64", "int32", None),
    positions=(None, "int64", "int32"),
    indices=("all", "some", "capacity"),
    layout=LAYOUTS,
    width=(13, 48, 312, 1025),
    dtype=DTYPES,
)
def test_embed_layer_norm(source, types, positions, indices, layout, width, dtype):
    """In the capacity form only the rows before num_tokens are written."""
    arguments = embed_arguments(source, types, positions, layout, width, dtype)
    places = {"all": None, "some": torch.tensor([26, 0, 4, 10]), "capacity": torch.randperm(27)}[indices]
    arguments["indices"] = None if places is None else places.to(DEVICE)
    out = check("embed_layer_norm", **arguments)
    assert take_bad_ids(DEVICE) == []
    if indices == "capacity":
        counted = fastbert_kernels.embed_layer_norm(**arguments, num_tokens=count(17))
        assert torch.equal(counted[:17], out[:17])
        assert counted[17:].isnan().all()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(-1, "int64"), (11, "int64"), (2**40, "int64"), (-(2**63), "int64"), (-(2**31), "int32"), (LARGEST, "int32")],
)
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_index_out_of_range(name, value, dtype):
    _, arguments = example("embed_layer_norm", torch.float32)
    for ids in ("input_ids", "token_type_ids", "position_ids"):
        arguments[ids] = arguments[ids].to(getattr(torch, dtype))
    arguments["indices"] = torch.arange(70, device=DEVICE)
    expected = fastbert_kernels.embed_layer_norm(**arguments)
    arguments[name][1, 2] = value
    out = fastbert_kernels.embed_layer_norm(**arguments)
    assert out.isnan().all(1).nonzero().flatten().tolist() == [12]
    assert torch.equal(out[out[:, 0] == out[:, 0]], torch.cat((expected[:12], expected[13:])))
    limit = {"input_ids": 11, "token_type_ids": 2, "position_ids": 10}[name]
    assert take_bad_ids(DEVICE) == [BadId(name, value, limit)]
    assert take_bad_ids(DEVICE) == []


def test_several_indices_out_of_range():
    _, arguments = example("embed_layer_norm", torch.float32)
    arguments |= {"position_ids": None, "position_table": arguments["position_table"][:9], "indices": None}
    arguments["input_ids"][3, 4], arguments["input_ids"][6, 0] = 12, -4
    out = fastbert_kernels.embed_layer_norm(**arguments)
    assert out.isnan().all(1).nonzero().flatten().tolist() == [9, 19, 29, 34, 39, 49, 59, 60, 69]
    words, positions = take_bad_ids(DEVICE)
    assert words in (BadId("input_ids", 12, 11), BadId("input_ids", -4, 11))
    assert positions == BadId("position_ids", 9, 9)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is one CPU only")
def test_bad_ids_of_the_current_device():
    _, arguments = example("embed_layer_norm", torch.float32)
    arguments["input_ids"][:] = 99
    fastbert_kernels.embed_layer_norm(**arguments)
    torch.cuda.synchronize()
    assert take_bad_ids(torch.device("cuda")) == [BadId("input_ids", 99, 11)]


@pairwise(kind=KINDS, batch_size=(1, 2, 7), seq_len=(1, 2, 63, 1024, 1025, 2500), value=MASK_VALUES, layout=LAYOUTS)
def test_packing_plan(kind, batch_size, seq_len, value, layout):
    """Every value but zero keeps a place."""
    kept = kept_places(kind, batch_size, seq_len)
    values = torch.full(kept.shape, value[1], dtype=getattr(torch, value[0]), device=DEVICE)
    check_plan(LAYOUTS[layout](values.masked_fill(~kept, 0)))


def test_packing_plan_of_more_rows_than_a_block(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 16)
    launch.forget_launches()
    check_plan(kept_places("holes", 40, 3))
    launch.forget_launches()


@pytest.mark.parametrize(("batch_size", "seq_len"), [(0, 4), (3, 0), (0, 0)])
def test_packing_plan_of_no_places(batch_size, seq_len):
    indices, cu_seqlens = packing_plan(torch.ones(batch_size, seq_len, device=DEVICE))
    assert indices.shape == (0,)
    assert cu_seqlens.tolist() == [0] * (batch_size + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("trailing", "dtype"),
    [((), DTYPES[0]), ((13,), DTYPES[1]), ((2, 5), DTYPES[2]), ((1030,), DTYPES[0]), ((0,), DTYPES[0])],
    ids=str,
)
def test_unpack_undoes_packing(kind, trailing, dtype):
    """With the count on the host, and with buffers of the capacity whose rows past the count are NaN."""
    padded, kept = normal(7, 9, *trailing, dtype=dtype), kept_places(kind, 7, 9)
    indices, cu_seqlens = packing_plan(kept)
    expected = padded.where(kept.reshape(7, 9, *(1 for _ in trailing)), 0)
    packed = padded.flatten(0, 1)[indices]
    num_tokens = int(cu_seqlens[-1])
    assert torch.equal(unpack(packed[:num_tokens], indices[:num_tokens], 7, 9), expected)
    packed[num_tokens:] = float("nan")
    assert torch.equal(unpack(packed, indices, 7, 9, cu_seqlens[-1:]), expected)


def test_unpack_of_everything_is_a_view():
    hidden = normal(6, 4)
    out = unpack(hidden, None, 2, 3)
    assert out.shape == (2, 3, 4)
    assert out.data_ptr() == hidden.data_ptr()


@pairwise(
    lengths=((1,), (5, 1, 9, 0, 3), (0, 0, 65, 129, 0), (0, 0), (16, 17, 15)),
    mode=("first", "mean"),
    normalize=(False, True),
    width=(1, 13, 48, 312, 1025),
    dtype=DTYPES,
    layout=LAYOUTS,
    indexed=(False, True),
)
def test_pool(lengths, mode, normalize, width, dtype, layout, indexed):
    hidden = LAYOUTS[layout](normal(sum(lengths) + 5 * indexed, width, dtype=dtype))
    indices = torch.randperm(len(hidden)).to(DEVICE)[: sum(lengths)] if indexed else None
    check("pool", hidden=hidden, cu_seqlens=bounds(lengths), mode=mode, normalize=normalize, indices=indices)


def test_a_mean_is_of_a_sum_in_float32():
    """40 values of 60000, of which two already are infinite in float16."""
    hidden = torch.full((40, 48), 60_000, dtype=torch.float16, device=DEVICE)
    check("pool", hidden=hidden, cu_seqlens=bounds((40,)), mode="mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_every_configuration_computes_the_truth(name, dtype, configured):
    if DEVICE.type == "cuda" and name not in ("default", configs.path_of(configs.name_for(DEVICE)).stem):
        pytest.skip("a GPU runs its own configurations")
    configured(TABLES[name])
    for op in ("linear_activation", "qkv_projection", "linear_residual_layer_norm"):
        for tokens in (70, 300, 1030):
            arguments = example(op, dtype)[1]
            for rows in {"x", "residual"} & arguments.keys():
                arguments[rows] = normal(tokens, arguments[rows].shape[1], dtype=dtype)
            check(op, **arguments)
    check("attention", **example("attention", dtype)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["linear_activation", "qkv_projection", "linear_residual_layer_norm"])
def test_pointers_and_descriptors_agree(op, dtype, configured):
    table = deepcopy(configs.table_for(target.architecture(DEVICE)))
    launcher, arguments = example(op, dtype)
    expected = launcher(**arguments)
    for entries in (entries for name, widths in table.items() if name != "attention" for entries in widths.values()):
        for entry in entries:
            entry["config"]["descriptors"] = False
    configured(table)
    assert torch.equal(launcher(**arguments), expected)


def test_plans_follow_the_configurations(configured):
    table = deepcopy(configs.table_for(target.architecture(DEVICE)))
    launcher, arguments = example("linear_activation", torch.float32)
    seen = []
    with launch.launching_by(lambda kernel, grid, given: seen.append(given["num_stages"])):
        launcher(**arguments)
        for entry in table["linear_activation"]["32"]:
            entry["config"]["num_stages"] = 1
        configured(table)
        launcher(**arguments)
    assert seen[0] > seen[1] == 1


def test_descriptors_serve_rows_of_16_bytes_only():
    config = {"descriptors": True, "BLOCK_M": 64, "BLOCK_K": 32}

    def served(*tensors, config=config):
        return launch.through_descriptors(config, *(operands.TensorSpec(*operands.spec_of(x)) for x in tensors))

    for columns, expected in ((48, True), (13, False)):
        x, weight = normal(5, columns), normal(7, columns)
        assert served(x, weight) == expected
        assert not served(x, weight, config=config | {"descriptors": False})
    x, weight = normal(5, 48), normal(7, 48)[:, :44]
    for start, expected in ((4, True), (1, False)):
        assert served(x[:, start : start + 44], weight) == expected


def test_an_unknown_architecture_takes_the_defaults(caplog):
    configs.table_for.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastbert_kernels"):
        assert [configs.table_for("sm_75"), configs.table_for("sm_75")] == [TABLES["default"]] * 2
    (message,) = caplog.messages
    assert "no launch configurations for sm_75" in message


def test_architecture(monkeypatch):
    properties = SimpleNamespace(major=8, minor=6, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for hip, name in ((None, "sm_86"), ("6.4", "gfx942")):
        monkeypatch.setattr(torch.version, "hip", hip)
        target._architecture_of_gpu.cache_clear()
        assert target.architecture(torch.device("cuda", 0)) == name
    target._architecture_of_gpu.cache_clear()
    assert target.architecture(torch.device("cpu")) in TABLES


def test_precision_follows_torch(monkeypatch):
    def products(x):
        return launch.precision(operands.TensorSpec(*operands.spec_of(x)), target.torch_precision(x))

    x, matmul = torch.zeros(1), torch.backends.cuda.matmul
    kept = matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "tf32x3"), ("tf32", "tf32")):
            matmul.fp32_precision = setting
            assert products(x) == expected
            assert [products(x.to(half)) for half in HALVES] == ["ieee"] * 2
    finally:
        matmul.fp32_precision = kept
    monkeypatch.setattr(launch, "architecture", lambda device: "gfx942")
    assert products(x) == "ieee"
