"""Launch configurations: the shipped files, which one a launch uses, and correct results with all of them."""

import logging
from copy import deepcopy
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES
from kernel_cases import DEVICE, GUARDED, HALVES, TABLES, check, example, normal

from fastbert_kernels import configs, launch, target
from fastbert_kernels.configs import GemmConfig, configured_by
from fastbert_kernels.matmul import reads_by_descriptors
from fastbert_kernels.operands import TensorSpec, spec_of

pytestmark = GUARDED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_every_configuration_gives_correct_results(name, dtype):
    if DEVICE.type == "cuda" and name not in ("default", configs.path_of(configs.name_for(DEVICE)).stem):
        pytest.skip("a GPU runs its own configurations only")
    with configured_by(TABLES[name]):
        for op in ("linear_activation", "qkv_projection", "linear_residual_layer_norm"):
            for tokens in (70, 300, 1030):
                arguments = example(op, dtype)[1]
                for rows in {"x", "residual"} & arguments.keys():
                    arguments[rows] = normal(tokens, arguments[rows].shape[1], dtype=dtype)
                check(op, **arguments)
        for op in ("attention", "attention_forward", "attention_backward"):
            check(op, **example(op, dtype)[1])


@pytest.mark.parametrize("name", TABLES)
def test_configurations(name):
    """Every shipped file is valid, and says what was measured."""
    path = configs.path_of(name)
    document = configs.check(configs.read(path), path)
    # wgmma and tcgen05 need 64 rows.
    if document.get("architecture", name) in ("sm_90", "sm_100"):
        gemms = (TABLES[name][operation]["16"] for operation in TABLES[name] if not operation.startswith("attention"))
        assert all(entry["config"]["BLOCK_M"] >= 64 for entries in gemms for entry in entries)
    timed = "measured_us" in path.read_text()
    assert timed == ("device" in document)
    assert timed or document["source"].endswith("; not measured")
    if timed:
        for operation, width in product(TABLES[name], ("16", "32")):
            for entry in document[operation][width]:
                assert "measured_us" in entry or entry["source"].endswith("; not measured"), (operation, width, entry)


def test_launches_follow_the_configurations():
    table = deepcopy(configs.table_for(target.architecture(DEVICE)))
    launcher, arguments = example("linear_activation", torch.float32)
    seen = []
    with launch.launching_by(lambda kernel, grid, given: seen.append(given["num_stages"])):
        launcher(**arguments)
        for entry in table["linear_activation"]["32"]:
            entry["config"]["num_stages"] = 1
        with configured_by(table):
            launcher(**arguments)
    assert seen[0] > seen[1] == 1


def test_descriptors_need_rows_of_16_bytes():
    config = GemmConfig(64, 64, 32, num_warps=4, num_stages=3, ctas_per_sm=1, descriptors=True)

    def by_descriptors(*tensors, config=config):
        return reads_by_descriptors(config, *(TensorSpec(*spec_of(x)) for x in tensors))

    for columns, expected in ((48, True), (13, False)):
        x, weight = normal(5, columns), normal(7, columns)
        assert by_descriptors(x, weight) == expected
        assert not by_descriptors(x, weight, config=replace(config, descriptors=False))
    x, weight = normal(5, 48), normal(7, 48)[:, :44]
    for start, expected in ((4, True), (1, False)):
        assert by_descriptors(x[:, start : start + 44], weight) == expected


def test_an_unknown_architecture_uses_the_default_file(caplog):
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
        return target.dot_precision(x.dtype, x.device, target.torch_precision(x))

    x, matmul = torch.zeros(1), torch.backends.cuda.matmul
    kept = matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "tf32x3"), ("tf32", "tf32")):
            matmul.fp32_precision = setting
            assert products(x) == expected
            assert [products(x.to(half)) for half in HALVES] == ["ieee"] * 2
    finally:
        matmul.fp32_precision = kept
    monkeypatch.setattr(target, "architecture", lambda device: "gfx942")
    assert products(x) == "ieee"
