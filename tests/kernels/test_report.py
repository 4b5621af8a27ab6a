"""The report of compiled kernels: shipped configurations pass, faulty ones fail, and its figures are right."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
import triton
from kernel_cases import TABLES
from torch.utils.flop_counter import FlopCounterMode
from triton.backends.compiler import GPUTarget

from fastbert_kernels import configs
from fastbert_kernels.tuning import roofline
from fastbert_kernels.tuning.ahead_of_time import CHIPS, Compiled, Resources
from fastbert_kernels.tuning.report import DTYPES, SHAPES, TRAINING, failures, page

# In one process, so that the rows that several tests read are compiled once.
pytestmark = pytest.mark.xdist_group("report")

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "kernels" / "fastbert_kernels"
COMMITTED = ROOT / "bench" / "results" / "compiled" / "README.md"
KEYS = (
    "op", "kernel", "target", "dtype", "config", "registers", "spill_bytes", "shared_bytes", "matrix_instruction",
    "tma", "code_bytes", "compile_s", "ctas_per_sm", "occupancy", "reasons", "shapes",
)  # fmt: skip

# With another Triton than the table's, tests leave out what one version proves: the report's own errors, and float16,
# whose code differs from that of bfloat16 in conversions only.
OTHER_TRITON = f"Triton {triton.__version__}." not in COMMITTED.read_text()
COMPILED = [dtype for dtype in DTYPES if not OTHER_TRITON or dtype != "fp16"]

# The tables of the architecture and of a device.
OF_SM_90 = (TABLES["sm_90"], TABLES["nvidia-h200"])


def compiled_keys(entry: dict) -> dict:
    """Return the part of an entry's configuration that the report's rows have if TMA can address the operands."""
    config = {key: value for key, value in entry["config"].items() if key not in ("ctas_per_sm", "descriptors")}
    return {key.upper() if isinstance(value, bool) else key: value for key, value in config.items()}


def report(*options: str, packages: Path | None = None, interpret: bool = False) -> subprocess.CompletedProcess:
    """Run the command as a user does. packages: a folder from which fastbert_kernels is imported instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    if packages:
        environment["PYTHONPATH"] = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "fastbert_kernels.tuning.report", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sm_90() -> list[dict]:
    """Every row of one target. Standard output must be one JSON list and nothing else."""
    run = report("--json", "--target=sm_90", *(f"--dtype={dtype}" for dtype in COMPILED))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_keys_of_a_row(sm_90):
    for row in sm_90:
        assert tuple(row) == KEYS
        assert row["target"] == "sm_90"
        assert row["compile_s"] > 0
        assert 0 < row["occupancy"] <= 1
        assert row["code_bytes"] % 16 == 0
        assert 16 <= row["registers"] <= 255
    assert {row["dtype"] for row in sm_90} == set(COMPILED)
    assert {row["dtype"] for row in sm_90 if row["op"] in TRAINING} == {"bf16", "fp32"}


def test_every_kernel_and_every_shipped_configuration_has_a_row(sm_90):
    functions = {
        node.name
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert {row["kernel"] for row in sm_90} == functions
    of_op = {"linear_residual": "linear_residual_layer_norm", "attention_short": "attention"}
    for operation, dtype in product(TABLES["sm_90"], COMPILED):
        for table in OF_SM_90:
            for entry in table[operation][dtype[-2:]]:
                config = compiled_keys(entry)
                op = of_op.get(operation, operation)
                if op in TRAINING and dtype == "fp16":
                    continue
                rows = [row["config"] for row in sm_90 if (row["op"], row["dtype"]) == (op, dtype)]
                assert any(config.items() <= row.items() for row in rows), (operation, dtype, config)


def test_nothing_spills_and_every_product_uses_the_matrix_unit(sm_90):
    for row in sm_90:
        assert row["reasons"] == []
        assert row["shared_bytes"] <= 227 * 1024
        multiplies = "PRECISION" in row["config"]
        trained = row["op"] == "attention_backward" or row["config"].get("DROPOUT", False)
        wide = row["dtype"] == "fp32" and row["config"].get("HEAD_SIZE", 0) > 64
        assert row["spill_bytes"] <= (128 if wide and trained else 48 if row["config"].get("DROPOUT") else 0)
        wide = wide and row["op"] == "attention_backward"
        assert row["matrix_instruction"] == ("HMMA" if wide else "HGMMA" if multiplies else "none")
        assert row["tma"] == row["config"].get("DESCRIPTORS", False)
    assert {row["tma"] for row in sm_90 if row["op"] == "qkv_projection"} == {True, False}


def test_ctas_per_sm_of_a_configuration_is_what_fits(sm_90):
    """With more CTAs, some would start only when others end. Checked where TMA can address the operands."""
    for operation, op, kernel in (
        ("qkv_projection", "qkv_projection", "_qkv_projection_kernel"),
        ("linear_activation", "linear_activation", "_linear_kernel"),
        ("linear_residual", "linear_residual_layer_norm", "_linear_kernel"),
        ("linear_residual_layer_norm", "linear_residual_layer_norm", "_linear_residual_layer_norm_kernel"),
    ):
        rows = [row for row in sm_90 if (row["op"], row["kernel"], row["tma"]) == (op, kernel, True)]
        rows = [row for row in rows if any(shape["model"] != "E300" for shape in row["shapes"])]
        for table, width in product(OF_SM_90, ("16", "32")):
            for entry in table[operation][width]:
                config = compiled_keys(entry)
                held = {
                    row["ctas_per_sm"]
                    for row in rows
                    if (row["dtype"] == "fp32") == (width == "32") and config.items() <= row["config"].items()
                }
                assert min(held) == entry["config"]["ctas_per_sm"], (operation, entry)


def test_other_targets_compile_their_configurations():
    others = [f"--target={target}" for target in CHIPS if target != "sm_90"]
    run = report("--json", *others, "--dtype=bf16", "--op=attention", "--op=qkv_projection")
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert {(row["target"], row["matrix_instruction"]) for row in rows} == {
        ("sm_80", "HMMA"), ("sm_89", "HMMA"), ("sm_100", "tcgen05"), ("gfx942", "MFMA"),
    }  # fmt: skip


def test_short_sequences_are_summed_in_the_same_order():
    """Up to 64 tokens attention uses the instruction of longer sequences and one column of warps. With several columns
    a row's sum would cross warps, in another order."""
    script = r"""
import json, re, sys, torch
from fastbert_kernels import attention
from fastbert_kernels.configs import table_for
from fastbert_kernels.launch import launching_by
from fastbert_kernels.tuning.ahead_of_time import CHIPS, compiling_for

def layouts(target, head_size, longest):
    code = []
    qkv = torch.empty(512, 3, 4, head_size, dtype=torch.bfloat16, device="meta")
    bounds = torch.empty(5, dtype=torch.int32, device="meta")
    compile_only = lambda kernel, grid, given: code.append(kernel.warmup(grid=grid, **given).asm["ttgir"])
    with compiling_for(CHIPS[target].target), launching_by(compile_only):
        attention(qkv, bounds, longest, 1.0)
    found = re.findall(r"warpsPerCTA = \[(\d+), (\d+)\], instrShape = (\[.*?\])", code[0])
    return sorted((int(columns), shape) for _, columns, shape in found)

sizes = (16, 32, 64, 80, 128)
targets = [target for target in CHIPS if table_for(target)["attention_short"]["16"]]
print(json.dumps({f"{target} D {d}": [layouts(target, d, s) for s in (64, 65)] for target in targets for d in sizes}))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {place.split()[0] for place in found} == {"sm_80", "sm_90"}
    for place, (short, every) in found.items():
        assert short, place
        assert short == every, place
        assert {columns for columns, _ in short} == {1}, place


def section(text: str, title: str) -> list[str]:
    """Return the lines of a page below a heading."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()


@pytest.mark.skipif(OTHER_TRITON, reason=f"the table was made with another Triton than {triton.__version__}")
def test_the_committed_table_is_what_the_kernels_compile_to(sm_90):
    committed, compiled = COMMITTED.read_text(), page(sm_90)
    for title in ("sm_90", "Roofline times"):
        assert section(compiled, title) == section(committed, title), "run `make report` and look at its diff"
    assert [title for title in CHIPS if f"## {title}\n" in committed] == list(CHIPS)


@pytest.mark.skipif(OTHER_TRITON, reason="runs with the Triton of the table")
def test_faulty_configurations_fail_with_their_reason(tmp_path):
    """One without wgmma, one that spills, one that is too large, one that does not compile, one that is invalid."""
    shutil.copytree(KERNELS, tmp_path / "fastbert_kernels", ignore=shutil.ignore_patterns("nvidia-h200.json"))
    path = tmp_path / "fastbert_kernels" / "configs" / "sm_90.json"
    table = json.loads(path.read_text())
    few, *_, many = table["qkv_projection"]["16"]
    few["config"]["BLOCK_M"] = 16
    many["config"] |= {"BLOCK_N": 256, "num_warps": 4}
    few, *_, many = table["linear_activation"]["16"]
    few["config"]["num_stages"] = 16
    many["config"] |= {"BLOCK_M": 2048, "BLOCK_N": 1024}
    table["linear_residual_layer_norm"]["16"][0]["config"]["BLOCK_M"] = 96
    for operation in (
        "qkv_projection",
        "linear_activation",
        "linear_residual",
    ):  # no others, which take long to compile
        table[operation]["16"][1:-1] = []
    path.write_text(json.dumps(table))
    ops = ("--op=qkv_projection", "--op=linear_activation", "--op=linear_residual_layer_norm")
    run = report("--json", "--target=sm_90", "--dtype=bf16", *ops, packages=tmp_path)
    assert run.returncode == 1, run.stderr
    reasons = {(row["op"], row["config"].get("BLOCK_M"), *row["reasons"]) for row in json.loads(run.stdout)}

    def found(op: str, block_m: int | None, pattern: str) -> bool:
        return any(key[:2] == (op, block_m) and len(key) > 2 and re.match(pattern, key[2]) for key in reasons)

    assert found("qkv_projection", 16, "matrix instruction HMMA instead of HGMMA$")
    assert found("qkv_projection", 128, r"spills \d+ bytes a thread$")
    assert found("linear_activation", 64, r"\d+ bytes of shared memory of 232448$")
    assert found("linear_activation", 2048, "does not compile: CompilationError")
    assert found("linear_residual_layer_norm", None, "does not compile: ValueError: BLOCK_M is 96, expected a power of")


def test_the_interpreter_is_an_error():
    run = report(interpret=True)
    assert run.returncode == 2
    assert "unset TRITON_INTERPRET" in run.stderr


@pytest.mark.parametrize(
    ("chip", "registers", "shared_bytes", "columns", "num_warps", "ctas_per_sm"),
    [
        ("sm_90", 128, 0, 0, 8, 2),  # 16 warps by registers
        ("sm_90", 129, 0, 0, 8, 1),  # rounded up to 136 a thread: 15 warps, 12 in units of four
        ("sm_90", 32, 0, 0, 4, 16),  # all 64 warps
        ("sm_90", 32, 0, 0, 1, 32),  # no more than 32 CTAs
        ("sm_90", 32, 112 * 1024, 0, 4, 2),  # 113 KiB each, with what the system reserves
        ("sm_90", 32, 114 * 1024, 0, 4, 1),
        ("sm_80", 64, 54 * 1024, 0, 4, 2),
        ("sm_89", 32, 0, 0, 4, 12),  # 48 warps
        ("sm_100", 64, 1024, 256, 4, 2),  # half the tensor memory each
        ("gfx942", 128, 0, 0, 4, 4),
        ("gfx942", 129, 0, 0, 4, 3),
        ("gfx942", 32, 33 * 1024, 0, 4, 1),
    ],
)
def test_ctas_per_sm(chip, registers, shared_bytes, columns, num_warps, ctas_per_sm):
    found = Resources(registers, 0, shared_bytes, columns, "none", False, 16, num_warps)
    assert found.ctas_per_sm(CHIPS[chip]) == ctas_per_sm


@pytest.mark.parametrize(
    ("chip", "change", "reason"),
    [
        ("sm_90", {}, None),
        ("sm_90", {"matrix_instruction": "tcgen05"}, None),  # stronger than needed
        ("sm_90", {"spill_bytes": 8}, "spills 8 bytes a thread"),
        ("gfx942", {"spill_bytes": 8, "matrix_instruction": "MFMA"}, None),
        ("sm_90", {"matrix_instruction": "none"}, "matrix instruction none instead of HGMMA"),
        (
            "sm_80",
            {"shared_bytes": 163 * 1024 + 1, "matrix_instruction": "HMMA"},
            "166913 bytes of shared memory of 166912",
        ),
        (
            "sm_100",
            {"tensor_memory_columns": 768, "matrix_instruction": "tcgen05"},
            "768 columns of tensor memory of 512",
        ),
        (
            "sm_90",
            {"registers": 255, "num_warps": 16},
            "16 warps of 255 registers each thread do not fit on a multiprocessor",
        ),
    ],
)
def test_reasons(chip, change, reason):
    fine = Resources(64, 0, 1024, 0, "HGMMA", False, 16, 4)
    compiled = Compiled("kernel", {"PRECISION": "ieee"}, 0.0, replace(fine, **change), None)
    assert failures(compiled, CHIPS[chip], "bf16") == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("kernel", "dtype", "config", "spill_bytes", "passes"),
    [
        ("kernel", "bf16", {"DROPOUT": False}, 8, False),
        ("kernel", "bf16", {"DROPOUT": False}, 0, True),
        ("kernel", "bf16", {"DROPOUT": True}, 48, True),
        ("kernel", "bf16", {"DROPOUT": True}, 56, False),
        ("_attention_bwd_dq_kernel", "fp32", {"HEAD_SIZE": 80}, 128, True),
        ("_attention_bwd_dq_kernel", "fp32", {"HEAD_SIZE": 80}, 136, False),
        ("_attention_bwd_dq_kernel", "fp32", {"HEAD_SIZE": 64}, 8, False),
        ("_attention_bwd_dq_kernel", "bf16", {"HEAD_SIZE": 80}, 8, False),
        ("_attention_fwd_kernel", "fp32", {"HEAD_SIZE": 80, "DROPOUT": True}, 128, True),
        ("_attention_fwd_kernel", "fp32", {"HEAD_SIZE": 80, "DROPOUT": False}, 8, False),
    ],
)
def test_what_may_spill(kernel, dtype, config, spill_bytes, passes):
    resources = Resources(64, spill_bytes, 1024, 0, "HGMMA", False, 16, 4)
    found = failures(Compiled(kernel, config, 0.0, resources, None), CHIPS["sm_90"], dtype)
    assert found == ([] if passes else [f"spills {spill_bytes} bytes a thread"])


@pytest.mark.parametrize(
    ("dtype", "head_size", "chip", "passes"),
    [
        ("fp32", 80, "sm_90", True), ("fp32", 64, "sm_90", False), ("bf16", 80, "sm_90", False),
        ("fp32", 80, "sm_80", True),
    ],
)  # fmt: skip
def test_only_the_backward_of_wide_float32_heads_may_go_without_wgmma(dtype, head_size, chip, passes):
    resources = Resources(64, 0, 1024, 0, "HMMA", False, 16, 4)
    config = {"PRECISION": "tf32x3", "HEAD_SIZE": head_size}
    for kernel, expected in (("_attention_bwd_dkv_kernel", passes), ("_attention_fwd_kernel", chip == "sm_80")):
        found = failures(Compiled(kernel, config, 0.0, resources, None), CHIPS[chip], dtype)
        assert found == ([] if expected else ["matrix instruction HMMA instead of HGMMA"])


def test_names_of_chips():
    for name, chip in CHIPS.items():
        known = GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
        assert chip.target == known
    documents = {path.stem: configs.read(path) for path in configs.FOLDER.glob("*.json")}
    assert CHIPS.keys() >= {document.get("architecture", name) for name, document in documents.items()} - {"default"}


@pytest.mark.parametrize("name", ["tiny", "minilm"])
def test_floating_point_operations_equal_torchs_count(name):
    num_layers, width, num_heads, inner = model = roofline.MODELS[name]
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=width, num_hidden_layers=num_layers, num_attention_heads=num_heads,
        intermediate_size=inner, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        bert = transformers.BertModel(config)
        ids = torch.zeros(3, 20, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        bert(ids)
    layer = sum(roofline.work(place, model, 3, 20, 4).flops for place in roofline.LAYER)
    assert num_layers * layer + roofline.work("pooler", model, 3, 20, 4).flops == counter.get_total_flops()


def test_roofline_times():
    """Worked out by hand for one 16-bit layer of BERT-base. Bytes bound small shapes, operations large ones."""
    base = roofline.MODELS["base"]
    assert roofline.work("feed_forward_output", base, 1, 16, 2) == (
        2 * 16 * 3072 * 768,
        2 * (16 * 3072 + 768 * 3072 + 768 + 2 * 16 * 768),
    )
    assert roofline.work("attention", base, 2, 128, 2) == (4 * 2 * 128 * 128 * 768, 2 * 256 * 768 * 4)
    rows, statistic = 2 * 256 * 768, 4 * 256 * 12
    assert roofline.work("attention_forward", base, 2, 128, 2) == (4 * 2 * 128 * 128 * 768, 4 * rows + statistic)
    assert roofline.work("attention_backward_dq", base, 2, 128, 2) == (
        6 * 2 * 128 * 128 * 768,
        6 * rows + 2 * statistic,
    )
    assert roofline.work("attention_backward_dkv", base, 2, 128, 2) == (
        8 * 2 * 128 * 128 * 768,
        6 * rows + 2 * statistic,
    )
    tokens, positions = 2 * 256 * 768, 2 * 128 * 768
    assert roofline.work("embed_layer_norm", base, 2, 128, 2) == (0, 2 * tokens + positions + 3 * 8 * 256)
    assert roofline.work("unpack", base, 2, 128, 2) == (0, 2 * tokens + 8 * 256)
    assert roofline.work("pool", base, 2, 128, 2) == (0, tokens + 2 * 2 * 768)
    assert roofline.work("layer_norm", base, 2, 128, 4) == (0, 4 * tokens)
    assert roofline.work("row_lengths", base, 2, 128, 2) == (0, 8 * 256)
    assert roofline.work("packing_plan", base, 2, 128, 2) == (0, 2 * 8 * 256)
    for batch_size, seq_len in SHAPES:
        needed = roofline.work("qkv_projection", base, batch_size, seq_len, 2)
        assert needed.seconds("bf16") == pytest.approx(
            needed.bytes / 4.3e12 if batch_size * seq_len < 400 else needed.flops / 788e12, rel=1e-12
        )
    with pytest.raises(ValueError, match="'attention_out'"):
        roofline.work("attention_out", base, 1, 1, 2)
