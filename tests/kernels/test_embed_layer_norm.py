"""The embeddings: compared with their formula, and ids out of range."""

import pytest
import torch
from cases import DTYPES
from kernel_cases import DEVICE, GUARDED, LARGEST, LAYOUTS, check, count, embed_arguments, example, pairwise

import fastbert_kernels
from fastbert_kernels import BadId, take_bad_ids

pytestmark = GUARDED


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
    """With num_tokens, only the rows before it are written."""
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


def test_ids_of_dropped_places_are_not_read():
    _, arguments = example("embed_layer_norm", torch.float32)
    kept = arguments["indices"][:40]
    for name in ("input_ids", "token_type_ids", "position_ids"):
        arguments[name].view(-1)[arguments["indices"][40:]] = -99
    assert fastbert_kernels.embed_layer_norm(**arguments | {"indices": kept}).isfinite().all()
    assert fastbert_kernels.embed_layer_norm(**arguments, num_tokens=count(40))[:40].isfinite().all()
    assert take_bad_ids(DEVICE) == []
