"""When kernels compile: once for each class of sizes, whatever the sizes, and once among threads; what a launch passes
on that skips Triton's launcher; and how much Python a layer takes."""

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
def test_sizes_that_vary_compile_nothing_new_and_nothing_spills(dtype, tmp_path):
    script = TOOLS / "compile_only.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script), dtype],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    warmed, served, machine_code = map(json.loads, run.stdout.splitlines())
    assert served == warmed
    # For each class of tokens, with their count on the device or without.
    assert served["_qkv_projection_kernel"] == (6 if dtype == "float16" else 4)
    # For short sequences in 16 bits, and for all.
    assert served["_attention_fwd_kernel"] == (2 if dtype == "float16" else 1)
    assert served["_packing_plan_kernel"] == 1
    # For padded batches, and for texts that come packed.
    assert served["_pool_kernel"] == 2
    for kernel, spill_bytes, matrix_instruction in machine_code:
        assert spill_bytes == 0, f"{kernel} spills {spill_bytes} bytes a thread"
        assert matrix_instruction == ("HGMMA" if kernel in PRODUCTS else "none"), f"{kernel}: {matrix_instruction}"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_direct_launch_is_given_what_triton_gives(dtype):
    """Kernels, grids and arguments, TMA descriptors among them; and nothing that is remembered keeps a tensor alive."""
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
    # Of descriptors the address comes first among a dozen of numbers.
    few, many = (
        sum(isinstance(value, list) for _, _, values in calls for value in values)
        for op, calls, *_ in found
        if op.startswith("encoder_layer")
    )
    assert (few, many) == (10, 12 if dtype == "float16" else 10)


def test_python_calls_of_a_layer():
    """What the host does for a layer is Python, and most of that are calls."""
    script = TOOLS / "count_calls.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 0 < float(run.stdout) <= 45
