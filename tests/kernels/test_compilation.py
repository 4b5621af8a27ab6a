"""Compilation happens once per class of sizes, direct launches pass what Triton's launcher does, a layer's overhead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import OPS

TOOLS = Path(__file__).parent.parent / "tools"
PRODUCTS = (
    "_attention_fwd_kernel",
    "_linear_kernel",
    "_linear_residual_layer_norm_kernel",
    "_qkv_projection_kernel",
)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_new_sizes_compile_nothing_and_nothing_spills(dtype, tmp_path):
    script = TOOLS / "compile_only.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script), dtype],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    warmed, compiled, machine_code = map(json.loads, run.stdout.splitlines())
    assert compiled == warmed
    # One for each class of tokens, with num_tokens on the device and without.
    assert compiled["_qkv_projection_kernel"] == (6 if dtype == "float16" else 4)
    # One for all sequences, and in 16 bits one for short sequences.
    assert compiled["_attention_fwd_kernel"] == (2 if dtype == "float16" else 1)
    assert compiled["_packing_plan_kernel"] == 1
    # One for padded batches and one for packed input.
    assert compiled["_pool_kernel"] == 2
    for kernel, spill_bytes, matrix_instruction in machine_code:
        assert spill_bytes == 0, f"{kernel} spills {spill_bytes} bytes a thread"
        assert matrix_instruction == ("HGMMA" if kernel in PRODUCTS else "none"), f"{kernel}: {matrix_instruction}"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_direct_launch_passes_the_arguments_of_tritons_launcher(dtype):
    """Kernels, grids and arguments, with TMA descriptors, are equal. The caches keep no tensor alive."""
    script = TOOLS / "direct_launches.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script), dtype], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == len(OPS) + 2
    for op, by_triton, directly, is_direct, is_released in found:
        assert by_triton, op
        assert directly == by_triton, op
        assert is_direct, op
        assert is_released, op
    # A descriptor is a list of numbers, which starts with its address.
    few, many = (
        sum(isinstance(value, list) for _, _, values in calls for value in values)
        for op, calls, *_ in found
        if op.startswith("encoder_layer")
    )
    assert (few, many) == (10, 12 if dtype == "float16" else 10)


def test_python_calls_of_a_layer():
    """The host overhead of a layer is mostly Python calls."""
    script = TOOLS / "count_calls.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 0 < float(run.stdout) <= 45
