"""Planted bugs, each of which a test must fail for: one that survives is a test that is missing.

    python tests/mutants.py [NAME ...]

Each mutant changes one place in a copy of the tracked files, and the test named beside it runs there, as many mutants
at a time as there are cores. The status is 1 if one survives, does not apply, or stops the test in another way than by
failing it; and if a test fails without any mutant, for then nothing is proven.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 600  # seconds for the tests of one mutant

# Tests of another tree would say nothing about the copy.
RUN_PYTEST = """
import sys
from pathlib import Path
import pytest

status = pytest.main(sys.argv[1:])
imported = [Path(sys.modules[name].__file__) for name in ("fastbert", "fastbert_kernels")]
sys.exit(status if all(path.is_relative_to(Path.cwd()) for path in imported) else pytest.ExitCode.INTERNAL_ERROR)
"""


class Mutant(NamedTuple):
    """A bug: `original`, which stands once in the file, becomes `replacement`; the test must fail for it."""

    name: str
    file: str
    original: str
    replacement: str
    test: str  # "test_file.py::test_function", of one that takes long "test_file.py::test_function[case]"


MUTANTS = [
    Mutant(
        "activation-gelu-by-tanh",
        "kernels/fastbert_kernels/activation.py",
        "x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))",
        "x = x / (1.0 + tl.exp2(-x * (2.302208198144325 + 0.1029432395800235 * x * x)))",
        "test_kernels.py::test_linear_activation",
    ),
    Mutant(
        "activation-coefficient-of-the-tail",
        "kernels/fastbert_kernels/activation.py",
        "- 0.0539378435",
        "- 0.0531378435",
        "test_kernels.py::test_gelu_of_every_size_is_a_rounding_away",
    ),
    Mutant(
        "activation-relu-of-nan",
        "kernels/fastbert_kernels/activation.py",
        "x = tl.where(x < 0, 0.0, x)",
        "x = tl.where(x > 0, x, 0.0)",
        "test_kernels.py::test_activation_of_special_values",
    ),
    Mutant(
        "activation-tanh-without-its-series",
        "kernels/fastbert_kernels/activation.py",
        "square < 0.01",
        "square < 0.0",
        "test_kernels.py::test_activation_of_small_values",
    ),
    Mutant(
        "attention-keys-past-the-end-are-read",
        "kernels/fastbert_kernels/attention.py",
        "mask = live[:, None] & mask_d",
        "mask = (offs_key < BLOCK_KEYS)[:, None] & mask_d",
        "test_kernel_properties.py::test_sequences_do_not_depend_on_each_other",
    ),
    Mutant(
        "attention-scores-past-the-end-count",
        "kernels/fastbert_kernels/attention.py",
        'scores = tl.where(live[None, :], scores, float("-inf"))',
        "scores += 0.0",
        "test_kernels.py::test_attention",
    ),
    Mutant(
        "attention-block-one-key-short-counts-as-full",
        "kernels/fastbert_kernels/attention.py",
        "if key + BLOCK_KEYS > length or",
        "if key + BLOCK_KEYS > length + 1 or",
        "test_kernels.py::test_attention",
    ),
    Mutant(
        "attention-negative-scale-takes-the-smallest-score-for-the-largest",
        "kernels/fastbert_kernels/attention.py",
        '"NEGATE": scale < 0',
        '"NEGATE": False',
        "test_kernels.py::test_attention_of_any_scale",
    ),
    Mutant(
        "attention-head-offset-in-32-bits",
        "kernels/fastbert_kernels/attention.py",
        "head.to(tl.int64) * stride_qkv_head",
        "head * stride_qkv_head",
        "test_kernel_properties.py::test_heads_past_2_to_the_31",
    ),
    Mutant(
        "launch-takes-measured-bits-of-another-device",
        "kernels/fastbert_kernels/launch.py",
        "        _check_devices(document, path)\n",
        "",
        "test_tune.py::test_measured_bits_serve_their_device_alone",
    ),
    Mutant(
        "attention-scale-is-missing",
        "kernels/fastbert_kernels/attention.py",
        "max(abs(scale) * LOG2_E, SMALLEST)",
        "max(LOG2_E, SMALLEST)",
        "test_kernels.py::test_attention",
    ),
    Mutant(
        "attention-sum-in-low-precision",
        "kernels/fastbert_kernels/attention.py",
        "row_sum = row_sum * shrink + tl.sum(weights, axis=1)",
        "row_sum = (row_sum * shrink + tl.sum(weights, axis=1)).to(q.dtype).to(tl.float32)",
        "test_kernels.py::test_attention_to_a_long_tail",
    ),
    Mutant(
        "attention-context-in-low-precision",
        "kernels/fastbert_kernels/attention.py",
        "context = dot(weights.to(v.dtype), v, context * shrink[:, None], PRECISION)",
        "context = dot(weights.to(v.dtype), v, context * shrink[:, None], PRECISION).to(v.dtype).to(tl.float32)",
        "test_kernels.py::test_attention",
    ),
    Mutant(
        "attention-context-does-not-shrink",
        "kernels/fastbert_kernels/attention.py",
        "v, context * shrink[:, None], PRECISION",
        "v, context, PRECISION",
        "test_kernels.py::test_attention",
    ),
    Mutant(
        "attention-keys-a-block-by-max-seqlen",
        "kernels/fastbert_kernels/attention.py",
        '"BLOCK_KEYS": config["BLOCK_KEYS"]',
        '"BLOCK_KEYS": config["BLOCK_KEYS"] // (1 if max_seqlen < 100 else 2)',
        "test_kernel_properties.py::test_sequences_do_not_depend_on_each_other",
    ),
    Mutant(
        "attention-bound-past-the-buffer",
        "kernels/fastbert_kernels/attention.py",
        "tl.minimum(end, num_tokens)",
        "tl.minimum(end, num_tokens + 1)",
        "test_kernel_properties.py::test_hostile_bounds",
    ),
    Mutant(
        "attention-query-past-the-end",
        "kernels/fastbert_kernels/attention.py",
        "mask_q = (offs_q < length)[:, None]",
        "mask_q = (offs_q < length + 1)[:, None]",
        "test_kernel_properties.py::test_rows_outside_of_sequences_are_neither_read_nor_written",
    ),
    Mutant(
        "attention-offsets-in-32-bits",
        "kernels/fastbert_kernels/attention.py",
        "places = (key + offs_key).to(tl.int64)[:, None]",
        "places = (key + offs_key)[:, None]",
        "test_kernel_properties.py::test_offsets_past_2_to_the_31",
    ),
    Mutant(
        "embed-place-out-of-range",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "inside = live & (place >= 0) & (place < num_places)",
        "inside = live & (place >= 0)",
        "test_sanitizer.py::test_hostile_ids",
    ),
    Mutant(
        "embed-negative-ids-are-looked-up",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "known = (index >= 0) & (index < limit)",
        "known = index < limit",
        "test_kernels.py::test_index_out_of_range",
    ),
    Mutant(
        "embed-limit-off-by-one",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "bad = live & ((index < 0) | (index >= limit))",
        "bad = live & ((index < 0) | (index > limit))",
        "test_kernels.py::test_index_out_of_range",
    ),
    Mutant(
        "embed-notes-another-input",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "num_types, bad_ids_ptr + 2",
        "num_types, bad_ids_ptr + 4",
        "test_kernels.py::test_index_out_of_range",
    ),
    Mutant(
        "embed-notes-stay",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "values[row, 0] = values[row, 1] = 0",
        "values[row, 0] += 0",
        "test_kernels.py::test_index_out_of_range",
    ),
    Mutant(
        "embed-position-is-the-place",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "positions = column",
        "positions = place",
        "test_kernels.py::test_embed_layer_norm",
    ),
    Mutant(
        "embed-place-of-the-packed-token",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "place = tl.load(indices_ptr + offs_t, mask=live, other=0)",
        "place = offs_t",
        "test_kernels.py::test_embed_layer_norm",
    ),
    Mutant(
        "embed-rows-past-the-count",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "live = offs_t < count",
        "live = offs_t < num_tokens",
        "test_kernels.py::test_embed_layer_norm",
    ),
    Mutant(
        "launch-configuration-of-the-next-size",
        "kernels/fastbert_kernels/launch.py",
        'size <= entry["up_to"]',
        'size < entry["up_to"]',
        "test_kernels.py::test_linear_residual_layer_norm",
    ),
    Mutant(
        "launch-precision-without-asking-torch",
        "kernels/fastbert_kernels/launch.py",
        '"tf32" if wanted == "tf32" else "tf32x3"',
        '"tf32x3"',
        "test_kernels.py::test_precision_follows_torch",
    ),
    Mutant(
        "launch-unit-that-divides-no-width",
        "kernels/fastbert_kernels/launch.py",
        "math.gcd(16 // x.dtype.itemsize, *sizes)",
        "math.gcd(16 // x.dtype.itemsize, *sizes[:-1])",
        "test_kernels.py::test_rows_of_more_than_their_columns",
    ),
    Mutant(
        "launch-descriptors-of-unaligned-rows",
        "kernels/fastbert_kernels/launch.py",
        "x.misaligned == 0 and ",
        "",
        "test_kernels.py::test_descriptors_serve_rows_of_16_bytes_only",
    ),
    Mutant(
        "configuration-of-another-block-k",
        "kernels/fastbert_kernels/configs/sm_90.json",
        """"linear_activation": {
    "16": [
      {"up_to": 256, "config": {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 64,""",
        """"linear_activation": {
    "16": [
      {"up_to": 256, "config": {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 32,""",
        "test_kernel_properties.py::test_configurations",
    ),
    Mutant(
        "configuration-of-other-keys-for-short-sequences",
        "kernels/fastbert_kernels/configs/sm_90.json",
        '"BLOCK_Q": 64, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 2',
        '"BLOCK_Q": 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2',
        "test_kernel_properties.py::test_configurations",
    ),
    Mutant(
        "configuration-for-short-sequences-of-heads-whose-sums-cross-warps",
        "kernels/fastbert_kernels/configs/sm_80.json",
        '{"up_to": 64, "config": {"BLOCK_Q": 64, "BLOCK_KEYS": 64, "num_warps": 4',
        '{"up_to": 128, "config": {"BLOCK_Q": 64, "BLOCK_KEYS": 64, "num_warps": 4',
        "test_report.py::test_short_sequences_sum_rows_as_all_others_do",
    ),
    Mutant(
        "tuner-moves-sizes-that-were-not-measured",
        "kernels/fastbert_kernels/tune.py",
        "if timing and (not kept or up_to == of_class):",
        "if timing:",
        "test_tune.py::test_sizes_that_were_not_measured_keep_their_configuration",
    ),
    Mutant(
        "tuner-takes-a-family-that-is-slower-in-a-class",
        "kernels/fastbert_kernels/trial.py",
        "return fastest if fastest and (fastest.ratio <= 1 or self.present[up_to] in self.dropped) else None",
        "return fastest",
        "test_tune.py::test_a_family_with_other_bits_wins_where_no_class_gets_slower",
    ),
    Mutant(
        "tuner-asks-for-one-block-k-of-16-bits",
        "kernels/fastbert_kernels/trial.py",
        'self.width == "32" and config["BLOCK_K"]',
        'config["BLOCK_K"]',
        "test_tune.py::test_bits_alone_make_a_family_of_16_bits",
    ),
    Mutant(
        "tuner-leaves-two-launches-untimed",
        "kernels/fastbert_kernels/trial.py",
        "if config is not None and time.perf_counter() > stop:",
        "if time.perf_counter() > stop:",
        "test_tune.py::test_one_launch_or_two",
    ),
    Mutant(
        "tuner-keeps-sizes-of-other-bits",
        "kernels/fastbert_kernels/tune.py",
        """timing.config == present["config"] and alike(config, timing.config)""",
        """timing.config == present["config"]""",
        "test_tune.py::test_sizes_that_were_not_measured_keep_their_configuration",
    ),
    Mutant(
        "tuner-keeps-the-source-of-what-it-measured",
        "kernels/fastbert_kernels/tune.py",
        "config, source, measured_us = timing.config, {}, timing.measured_us",
        "config, measured_us = timing.config, timing.measured_us",
        "test_tune.py::test_an_entry_has_its_source_until_it_is_measured",
    ),
    Mutant(
        "tuner-heats-every-epilogue-of-every-tile",
        "kernels/fastbert_kernels/trial.py",
        "if candidate.config not in first:",
        "if False:",
        "test_tune.py::test_heats_are_of_what_may_win",
    ),
    Mutant(
        "tuner-gives-ragged-batches-the-floor-of-full-ones",
        "kernels/fastbert_kernels/cases.py",
        "if self.ragged:  # attention",
        "if False:  # attention",
        "test_tune.py::test_attention_is_tried_on_ragged_batches_too",
    ),
    Mutant(
        "tuner-compares-the-bits-of-one-dtype",
        "kernels/fastbert_kernels/cases.py",
        "dtypes = [dtype for dtype in DTYPES if width_of(dtype) == width_of(every[0].dtype)]",
        "dtypes = [every[0].dtype]",
        "test_tune.py::test_bits_are_compared_for_all_that_an_entry_serves",
    ),
    Mutant(
        "layer-norm-mean-in-low-precision",
        "kernels/fastbert_kernels/layer_norm.py",
        "mean += tl.sum(tl.where(mask, rows - mean[:, None], 0.0), axis=1) / width",
        "mean = mean.to(tl.float16).to(tl.float32)",
        "test_kernels.py::test_statistics_are_float32",
    ),
    Mutant(
        "layer-norm-mean-of-equal-elements",
        "kernels/fastbert_kernels/layer_norm.py",
        "mean += tl.sum(tl.where(mask, rows - mean[:, None], 0.0), axis=1) / width",
        "mean += 0.0",
        "test_kernels.py::test_rows_without_variance_become_the_bias",
    ),
    Mutant(
        "layer-norm-rest-past-the-width",
        "kernels/fastbert_kernels/layer_norm.py",
        "mean += tl.sum(tl.where(mask, rows - mean[:, None], 0.0), axis=1) / width",
        "mean += tl.sum(rows - mean[:, None], axis=1) / width",
        "test_kernels.py::test_rows_without_variance_become_the_bias",
    ),
    Mutant(
        "layer-norm-columns-past-the-width",
        "kernels/fastbert_kernels/layer_norm.py",
        "centered = tl.where(mask, rows - mean[:, None], 0.0)",
        "centered = rows - mean[:, None]",
        "test_kernels.py::test_linear_residual_layer_norm",
    ),
    Mutant(
        "layer-norm-eps",
        "kernels/fastbert_kernels/layer_norm.py",
        "tl.rsqrt(variance + eps)",
        "tl.rsqrt(variance + 1e-6)",
        "test_kernels.py::test_eps_is_what_was_passed",
    ),
    Mutant(
        "layer-norm-rows-past-the-count",
        "kernels/fastbert_kernels/layer_norm.py",
        "mask = (offs_t < count)[:, None] & mask_e",
        "mask = (offs_t < num_tokens)[:, None] & mask_e",
        "test_kernel_properties.py::test_layer_norm_writes_no_rows_past_the_count",
    ),
    Mutant(
        "live-tokens-are-all",
        "kernels/fastbert_kernels/layer_norm.py",
        "count = tl.minimum(tl.load(num_tokens_ptr), num_tokens)",
        "count = num_tokens",
        "test_kernel_properties.py::test_rows_past_the_count_are_neither_read_nor_written",
    ),
    Mutant(
        "linear-rows-past-the-count",
        "kernels/fastbert_kernels/linear_activation.py",
        "result, row, col, count, num_outputs",
        "result, row, col, num_tokens, num_outputs",
        "test_kernel_properties.py::test_rows_past_the_count_are_neither_read_nor_written",
    ),
    Mutant(
        "linear-column-past-the-width",
        "kernels/fastbert_kernels/linear_activation.py",
        "mask_n = offs_n < num_outputs",
        "mask_n = offs_n < num_outputs + 1",
        "test_kernels.py::test_linear_activation",
    ),
    Mutant(
        "linear-residual-of-the-first-tile",
        "kernels/fastbert_kernels/linear_activation.py",
        "places = offs_t * stride_residual + offs_n",
        "places = (offs_t - row) * stride_residual + offs_n",
        "test_kernels.py::test_linear_residual_layer_norm",
    ),
    Mutant(
        "linear-residual-of-the-left-half-twice",
        "kernels/fastbert_kernels/linear_activation.py",
        "col + half * (BLOCK_N // 2), count",
        "col, count",
        "test_kernels.py::test_every_configuration_computes_the_truth",
    ),
    Mutant(
        "linear-stores-a-part-over-the-first",
        "kernels/fastbert_kernels/linear_activation.py",
        "out.store([row, first + col], ",
        "out.store([row, col], ",
        "test_kernel_properties.py::test_epilogues_change_no_bit",
    ),
    Mutant(
        "qkv-tile-over-the-next-part",
        "kernels/fastbert_kernels/qkv_projection.py",
        'fits = width % config["BLOCK_N"] == 0',
        "fits = True",
        "test_kernel_properties.py::test_only_whole_tiles_of_a_part_are_stored_through_a_descriptor",
    ),
    Mutant(
        "configuration-of-two-orders-whose-bits-nobody-measured",
        "kernels/fastbert_kernels/configuration.py",
        'one_order = width == "32" or "bits" not in document',
        'one_order = width == "32"',
        "test_tune.py::test_what_a_file_may_not_hold",
    ),
    Mutant(
        "configuration-of-two-orders-in-float32",
        "kernels/fastbert_kernels/configuration.py",
        'one_order = width == "32" or "bits" not in document',
        'one_order = "bits" not in document',
        "test_tune.py::test_what_a_file_may_not_hold",
    ),
    Mutant(
        "linear-last-tile-is-missing",
        "kernels/fastbert_kernels/linear_activation.py",
        "tiles = tl.cdiv(count, BLOCK_T) * tiles_n",
        "tiles = count // BLOCK_T * tiles_n",
        "test_kernels.py::test_linear_activation",
    ),
    Mutant(
        "linear-gelu-of-float32-by-the-fit",
        "kernels/fastbert_kernels/linear_activation.py",
        '"EXACT": out_dtype == torch.float32',
        '"EXACT": False',
        "test_kernels.py::test_activation_of_small_values",
    ),
    Mutant(
        "residual-norm-launches-by-the-batch",
        "kernels/fastbert_kernels/linear_residual_layer_norm.py",
        "if config is None:",
        "if config is None or size <= 64:",
        "test_kernel_properties.py::test_rows_do_not_depend_on_other_rows",
    ),
    Mutant(
        "residual-norm-columns-of-the-first-tile",
        "kernels/fastbert_kernels/linear_residual_layer_norm.py",
        "residual_ptr + offs_t * stride_residual + offs_n[None, :]",
        "residual_ptr + offs_t * stride_residual + (offs_n - col)[None, :]",
        "test_kernels.py::test_linear_residual_layer_norm",
    ),
    Mutant(
        "residual-norm-mean-of-equal-elements",
        "kernels/fastbert_kernels/linear_residual_layer_norm.py",
        "mean += rest / width",
        "mean += 0.0",
        "test_kernels.py::test_rows_without_variance_become_the_bias",
    ),
    Mutant(
        "residual-norm-mean-in-low-precision",
        "kernels/fastbert_kernels/linear_residual_layer_norm.py",
        "mean += rest / width",
        "mean = mean.to(out_ptr.dtype.element_ty).to(tl.float32)",
        "test_kernels.py::test_statistics_are_float32",
    ),
    Mutant(
        "residual-norm-variance-in-low-precision",
        "kernels/fastbert_kernels/linear_residual_layer_norm.py",
        "rstd = tl.rsqrt(squares / width + eps)",
        "rstd = tl.rsqrt((squares / width).to(out_ptr.dtype.element_ty).to(tl.float32) + eps)",
        "test_kernels.py::test_statistics_are_float32",
    ),
    Mutant(
        "residual-norm-unbiased-variance",
        "kernels/fastbert_kernels/linear_residual_layer_norm.py",
        "rstd = tl.rsqrt(squares / width + eps)",
        "rstd = tl.rsqrt(squares / (width - 1) + eps)",
        "test_kernels.py::test_linear_residual_layer_norm",
    ),
    Mutant(
        "residual-norm-eps",
        "kernels/fastbert_kernels/linear_residual_layer_norm.py",
        "rstd = tl.rsqrt(squares / width + eps)",
        "rstd = tl.rsqrt(squares / width + 1e-6)",
        "test_kernels.py::test_eps_is_what_was_passed",
    ),
    Mutant(
        "residual-norm-offsets-in-32-bits",
        "kernels/fastbert_kernels/linear_residual_layer_norm.py",
        "offs_t = (row + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]",
        "offs_t = (row + tl.arange(0, BLOCK_T))[:, None]",
        "test_kernel_properties.py::test_offsets_past_2_to_the_31",
    ),
    Mutant(
        "matmul-inputs-past-the-width",
        "kernels/fastbert_kernels/matmul.py",
        "mask=offs_inner[None, :] < num_inner",
        "mask=offs_inner[None, :] < num_inner + 1",
        "test_kernels.py::test_linear_activation",
    ),
    Mutant(
        "matmul-order-by-the-batch",
        "kernels/fastbert_kernels/matmul.py",
        "    for inner in range(0, num_inner, BLOCK_K):\n",
        "    for start in range(0, num_inner, BLOCK_K):\n"
        "        last = (num_inner - 1) // BLOCK_K * BLOCK_K\n"
        "        inner = start if num_rows > 64 else last - start\n",
        "test_kernel_properties.py::test_rows_do_not_depend_on_other_rows",
    ),
    Mutant(
        "matmul-second-tile-is-the-first",
        "kernels/fastbert_kernels/matmul.py",
        "weight, col + BLOCK_N, inner",
        "weight, col, inner",
        "test_kernels.py::test_linear_residual_layer_norm",
    ),
    Mutant(
        "matmul-sums-in-low-precision",
        "kernels/fastbert_kernels/matmul.py",
        "first = dot(rows, cols.T, first, PRECISION)",
        "first = dot(rows, cols.T, first, PRECISION).to(rows.dtype).to(tl.float32)",
        "test_kernels.py::test_linear_activation",
    ),
    Mutant(
        "matmul-offsets-in-32-bits",
        "kernels/fastbert_kernels/matmul.py",
        "num_rows - 1).to(tl.int64)",
        "num_rows - 1)",
        "test_kernel_properties.py::test_offsets_past_2_to_the_31",
    ),
    Mutant(
        "plan-drops-a-block-of-rows",
        "kernels/fastbert_kernels/packing.py",
        "for start in range(0, tl.program_id(0), BLOCK):",
        "for start in range(0, tl.minimum(tl.program_id(0), BLOCK), BLOCK):",
        "test_kernels.py::test_packing_plan_of_more_rows_than_a_block",
    ),
    Mutant(
        "plan-starts-every-block-anew",
        "kernels/fastbert_kernels/packing.py",
        "kept += tl.sum(keep.to(tl.int32), axis=0)",
        "kept += 0",
        "test_kernels.py::test_packing_plan",
    ),
    Mutant(
        "plan-dropped-place-off-by-one",
        "kernels/fastbert_kernels/packing.py",
        "num_places - 1 - dropped",
        "num_places - 2 - dropped",
        "test_kernels.py::test_packing_plan",
    ),
    Mutant(
        "plan-drops-negative-values",
        "kernels/fastbert_kernels/packing.py",
        "kept += (values != 0).to(tl.int32)",
        "kept += (values > 0).to(tl.int32)",
        "test_kernels.py::test_packing_plan",
    ),
    Mutant(
        "unpack-leaves-padding-as-it-is",
        "kernels/fastbert_kernels/packing.py",
        "new = hidden.new_empty if hidden.shape[0] == batch_size * seq_len else hidden.new_zeros",
        "new = hidden.new_empty",
        "test_kernels.py::test_unpack_undoes_packing",
    ),
    Mutant(
        "unpack-rows-past-the-count",
        "kernels/fastbert_kernels/packing.py",
        "mask=(token < count)[:, None] & mask_e",
        "mask=(token < num_tokens)[:, None] & mask_e",
        "test_kernels.py::test_unpack_undoes_packing",
    ),
    Mutant(
        "pool-mean-over-all-tokens",
        "kernels/fastbert_kernels/pool.py",
        "tl.maximum(pooled_length, 1).to(tl.float32)",
        "tl.maximum(num_tokens, 1).to(tl.float32)",
        "test_kernels.py::test_pool",
    ),
    Mutant(
        "pool-norm-without-its-guard",
        "kernels/fastbert_kernels/pool.py",
        "tl.maximum(norm, 1e-12)",
        "norm",
        "test_kernels.py::test_pool",
    ),
    Mutant(
        "pool-first-of-no-token",
        "kernels/fastbert_kernels/pool.py",
        "pooled_length = tl.minimum(length, 1)",
        "pooled_length = tl.minimum(num_tokens, 1)",
        "test_kernels.py::test_pool",
    ),
    Mutant(
        "pool-sums-in-low-precision",
        "kernels/fastbert_kernels/pool.py",
        "pooled += tl.sum(tile.to(tl.float32), axis=0)",
        "pooled += tl.sum(tile, axis=0).to(tl.float32)",
        "test_kernels.py::test_a_mean_is_of_a_sum_in_float32",
    ),
    Mutant(
        "pool-row-past-the-buffer",
        "kernels/fastbert_kernels/pool.py",
        "(rows < num_rows)",
        "(rows <= num_rows)",
        "test_kernel_properties.py::test_pool_reads_no_rows_that_do_not_exist",
    ),
    Mutant(
        "qkv-bias-of-the-keys-for-the-values",
        "kernels/fastbert_kernels/qkv_projection.py",
        "q_bias, k_weight, k_bias, v_weight, v_bias\n    if plan",
        "q_bias, k_weight, k_bias, v_weight, k_bias\n    if plan",
        "test_kernels.py::test_qkv_projection",
    ),
    Mutant(
        "qkv-weights-of-several-strides",
        "kernels/fastbert_kernels/qkv_projection.py",
        "if unequal or not unit_strides(",
        "if not unit_strides(",
        "test_kernel_properties.py::test_an_operand_may_lie_anyhow_in_memory[qkv_projection-q_weight-unaligned]",
    ),
    Mutant(
        "eager-norm-weight-and-bias-swapped",
        "fastbert/eager.py",
        "torch.layer_norm(hidden, norm_weight.shape, norm_weight, norm_bias, eps)",
        "torch.layer_norm(hidden, norm_weight.shape, norm_bias, norm_weight, eps)",
        "test_ops.py::test_linear_residual_layer_norm",
    ),
    Mutant(
        "eager-token-types-are-ignored",
        "fastbert/eager.py",
        "hidden = hidden + F.embedding(kept(token_type_ids), token_type_table)",
        "hidden = hidden + token_type_table[0]",
        "test_ops.py::test_embed_layer_norm",
    ),
    Mutant(
        "eager-position-of-the-packed-token",
        "fastbert/eager.py",
        "F.embedding(indices % seq_len, position_table)",
        "F.embedding(torch.arange(len(indices)) % seq_len, position_table)",
        "test_layout.py::test_left_padding_pools_the_first_kept_token",
    ),
    Mutant(
        "eager-bounds-searched-in-a-slice",
        "fastbert/eager.py",
        "torch.searchsorted(cu_seqlens, tokens, right=True) - 1",
        "torch.searchsorted(cu_seqlens[1:], tokens, right=True)",
        "test_library.py::test_bounds_are_searched_from_where_their_storage_begins",
    ),
    Mutant(
        "eager-bias-of-the-keys-for-the-values",
        "fastbert/eager.py",
        "F.linear(x, v_weight, v_bias, out=v)",
        "F.linear(x, v_weight, k_bias, out=v)",
        "test_ops.py::test_qkv_projection",
    ),
    Mutant(
        "eager-rows-past-the-count-teach-weights",
        "fastbert/eager.py",
        "hidden = F.linear(clear_past(x, num_tokens), weight, bias)\n",
        "hidden = F.linear(x, weight, bias)\n",
        "test_library.py::test_gradients_stop_at_the_token_count",
    ),
    Mutant(
        "eager-key-past-the-end",
        "fastbert/eager.py",
        "mask = (torch.arange(max_seqlen, device=q.device) < lengths[:, None].clamp(min=1))[:, None, None]",
        "mask = (torch.arange(max_seqlen, device=q.device) <= lengths[:, None].clamp(min=1))[:, None, None]",
        "test_ops.py::test_attention",
    ),
    Mutant(
        "eager-additive-mask-overflows",
        "fastbert/eager.py",
        "return mask.to(dtype).clamp(min=torch.finfo(dtype).min)",
        "return mask.to(dtype)",
        "test_layout.py::test_a_fully_masked_query_is_finite",
    ),
    Mutant(
        "eager-pool-divides-by-no-length",
        "fastbert/eager.py",
        "lengths.clamp(min=1)",
        "lengths",
        "test_ops.py::test_pool",
    ),
    Mutant(
        "eager-pool-sums-in-low-precision",
        "fastbert/eager.py",
        "lengths, wide = cu_seqlens.diff()[:, None], torch.promote_types(hidden.dtype, torch.float32)",
        "lengths, wide = cu_seqlens.diff()[:, None], hidden.dtype",
        "test_ops.py::test_pool",
    ),
    Mutant(
        "fusion-subclass-counts-as-the-module",
        "fastbert/fusion.py",
        '(type(module) is not expected and expected is not None)\n            or own["training"]',
        '(not isinstance(module, expected or nn.Module))\n            or own["training"]',
        "test_modules.py::test_replaced_and_patched_modules_count",
    ),
    Mutant(
        "fusion-any-parameter-is-plain",
        "fastbert/fusion.py",
        'or (parameter_types and [*map(type, own["_parameters"].values())] != parameter_types)',
        "",
        "test_backend.py::test_explain_names_the_reason",
    ),
    Mutant(
        "fusion-dropout-is-fused-away",
        "fastbert/fusion.py",
        'or own["training"]',
        "",
        "test_training.py::test_every_dropout_drops",
    ),
    Mutant(
        "fusion-gelu-of-another-kind",
        "fastbert/fusion.py",
        'NewGELUActivation: "gelu_tanh"',
        'NewGELUActivation: "gelu"',
        "test_equality.py::test_activations",
    ),
    Mutant(
        "heads-positions-at-padding-count",
        "fastbert/heads.py",
        "positions = positions.masked_fill(on_padding, past_the_end)",
        "positions = positions.masked_fill(on_padding, 0)",
        "test_layout.py::test_question_answering_never_points_at_padding",
    ),
    Mutant(
        "heads-positions-past-the-end-count",
        "fastbert/heads.py",
        "return cross_entropy(logits, positions, ignore_index=past_the_end)",
        "return cross_entropy(logits, positions.clamp(max=past_the_end - 1))",
        "test_layout.py::test_question_answering_never_points_at_padding",
    ),
    Mutant(
        "heads-projection-loses-its-bias",
        "fastbert/fusion.py",
        "*parameters_of(linear), activation)",
        "linear.weight, linear.bias * 0, activation)",
        "test_equality.py::test_activations",
    ),
    Mutant(
        "inputs-positions-of-packed-texts-go-on",
        "fastbert/inputs.py",
        "restarting = layout.restarting_positions() if position_ids is None else None",
        "restarting = None",
        "test_layout.py::test_packed_texts_do_not_see_each_other",
    ),
    Mutant(
        "inputs-a-state-from-the-end",
        "fastbert/inputs.py",
        "return {index % count for index in selection}",
        "return {abs(index) for index in selection}",
        "test_equality.py::test_hidden_states",
    ),
    Mutant(
        "library-attention-past-the-last-text",
        "fastbert/library.py",
        "num_tokens=cu_seqlens[-1:]",
        "num_tokens=None",
        "test_library.py::test_compiled_training",
    ),
    Mutant(
        "library-bounds-of-another-table",
        "fastbert/library.py",
        "tables = word_table, token_type_table, position_table",
        "tables = word_table, position_table, token_type_table",
        "test_library.py::test_gradients_of_an_op_are_its_twins",
    ),
    Mutant(
        "library-gradients-in-the-dtype-of-autocast",
        "fastbert/library.py",
        "torch.autocast(grad.device.type, enabled=False)",
        "torch.autocast(grad.device.type, enabled=torch.is_autocast_enabled(grad.device.type))",
        "test_library.py::test_a_backward_has_no_autocast_of_its_own",
    ),
    Mutant(
        "model-embedding-norm-swapped",
        "fastbert/model.py",
        'weight=weight, bias=parts[4]._parameters["bias"]',
        'weight=parts[4]._parameters["bias"], bias=weight',
        "test_equality.py::test_hidden_states",
    ),
    Mutant(
        "model-padding-row-learns",
        "fastbert/model.py",
        "padding_idx=parts[1].padding_idx",
        "padding_idx=None",
        "test_equality.py::test_gradients_of_every_parameter",
    ),
    Mutant(
        "layers-scale-of-all-heads",
        "fastbert/layers.py",
        "float(p.self_attention.scaling)",
        "p.self_attention.all_head_size**-0.5",
        "test_equality.py::test_hidden_states",
    ),
    Mutant(
        "layers-dropout-in-eval-mode",
        "fastbert/layers.py",
        "self.dropout.p if self.training else 0.0",
        "self.dropout.p",
        "test_modules.py::test_a_replica_without_parameters_of_its_own",
    ),
    Mutant(
        "layers-states-off-by-one",
        "fastbert/layers.py",
        "if index in selection:",
        "if index + 1 in selection:",
        "test_equality.py::test_hidden_states",
    ),
    Mutant(
        "layers-goes-on-from-another-state",
        "fastbert/layers.py",
        "hidden_states = layout.pack(states[-1])\n",
        "pass\n",
        "test_equality.py::test_last_hidden_state_is_the_last_state_and_its_gradient_can_be_retained",
    ),
    Mutant(
        "layers-modules-attend-to-padding",
        "fastbert/layers.py",
        "padded_attention(q, k, v, self.scaling, attention_mask, dropout",
        "padded_attention(q, k, v, self.scaling, None, dropout",
        "test_equality.py::test_attentions",
    ),
    Mutant(
        "layers-score-mask-is-ignored",
        "fastbert/encoder_layer.py",
        "numbers.scale, mask, implementation, num_tokens,",
        "numbers.scale, None, implementation, num_tokens,",
        "test_layout.py::test_score_masks",
    ),
    Mutant(
        "layers-score-mask-does-not-learn",
        "fastbert/encoder_layer.py",
        "in_one_node(compute, x, mask, *weights)",
        "in_one_node(compute, x, mask.detach() if mask is not None else mask, *weights)",
        "test_triton.py::test_a_mask_learns[heads-]",
    ),
    Mutant(
        "layers-computed-again-by-another-choice",
        "fastbert/layers.py",
        "with ops.backend(layout.backend):",
        "with ops.backend(ops.current_backend()):",
        "test_triton.py::test_gradient_checkpointing_computes_a_layer_again_as_before[triton-eager-False]",
    ),
    Mutant(
        "model-graphs-pack-in-pytorch",
        "fastbert/model.py",
        'whole = given.get("output_attentions") or self._packs_in_pytorch(layout)',
        'whole = given.get("output_attentions")',
        "test_library.py::test_a_compiler_sees_nothing_of_packing[dropout]",
    ),
    Mutant(
        "ops-the-last-gradient-is-lost",
        "fastbert/encoder_layer.py",
        "return None, *found\n",
        "return None, *found[:-1], None\n",
        "test_triton.py::test_gradients",
    ),
    Mutant(
        "ops-backward-without-autocast",
        "fastbert/encoder_layer.py",
        "torch.autocast(grad.device.type, dtype, enabled)",
        "torch.autocast(grad.device.type, dtype, False)",
        "test_triton.py::test_a_recomputation_has_the_autocast_of_its_forward",
    ),
    Mutant(
        "ops-kernels-without-autocast",
        "fastbert/ops.py",
        "if not torch.is_autocast_enabled(device_type):",
        "if device_type:",
        "test_triton.py::test_autocast",
    ),
    Mutant(
        "tokens-indices-of-the-mirrored-mask",
        "fastbert/tokens.py",
        "indices = keep.flatten().nonzero().flatten()",
        "indices = keep.flip(1).flatten().nonzero().flatten()",
        "test_equality.py::test_half_precision",
    ),
    Mutant(
        "tokens-pools-the-last-token",
        "fastbert/tokens.py",
        "return sequence_output[:, 0]",
        "return sequence_output[:, -1]",
        "test_layout.py::test_score_masks",
    ),
    Mutant(
        "tokens-padded-first-token-is-the-column",
        "fastbert/tokens.py",
        "first = layout.keep.int().argmax(1)",
        "first = layout.keep.int().argmax(1) * 0",
        "test_tracing.py::test_compile_fullgraph[BertModel]",
    ),
    Mutant(
        "tokens-padded-texts-attend-to-padding",
        "fastbert/tokens.py",
        "mask = _key_mask(keep)",
        "mask = None",
        "test_layout.py::test_packed_equals_padded",
    ),
    Mutant(
        "tokens-padded-states-stay-at-padding",
        "fastbert/tokens.py",
        "return layout.clear(hidden_states)",
        "return hidden_states",
        "test_layout.py::test_packed_equals_padded",
    ),
    Mutant(
        "tokens-query-without-keys",
        "fastbert/tokens.py",
        "return mask | ~mask.any(-1, keepdim=True)",
        "return mask",
        "test_layout.py::test_a_query_without_keys_attends_to_all",
    ),
    Mutant(
        "graphs-old-weights",
        "fastbert/graph_state.py",
        "            list(map(Tensor.data_ptr, self._tensors)),\n",
        "            [],\n",
        "test_graphs.py::test_a_changed_model_is_captured_again",
    ),
    Mutant(
        "graphs-ids-of-old-tables",
        "fastbert/graph_state.py",
        "return self._tables() == self._seen_tables",
        "return True",
        "test_graphs.py::test_a_changed_model_is_captured_again[more_words]",
    ),
    Mutant(
        "graphs-hooks-unseen",
        "fastbert/graph_state.py",
        "any(self._hooks) or _has_any_global_hook(),",
        "False,",
        "test_graphs.py::test_a_hook_is_noticed_and_its_end_too",
    ),
    Mutant(
        "graphs-replaced-modules-unseen",
        "fastbert/graph_state.py",
        "self._dicts == self._seen_dicts and ",
        "",
        "test_graphs.py::test_a_block_that_changes_its_way_is_noticed[adapter]",
    ),
    Mutant(
        "graphs-padding-of-an-earlier-batch",
        "fastbert/capture.py",
        "        self._inputs.zero_()\n",
        "",
        "test_graphs.py::test_one_graph_serves_every_mix_of_lengths_of_a_bucket",
    ),
    Mutant(
        "graphs-token-types-of-an-earlier-batch",
        "fastbert/capture.py",
        "            batch[2].zero_()\n",
        "            pass\n",
        "test_graphs.py::test_inputs_of_every_kind",
    ),
    Mutant(
        "tokens-of-a-changed-normalizer",
        "fastbert/tokenization.py",
        "if mine.ids != kept:",
        "if False:",
        "test_tokenization.py::test_a_normalizer_that_was_changed_after_tokens_were_added",
    ),
    Mutant(
        "tokens-special-by-their-text",
        "fastbert/tokenization.py",
        'COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor")',
        'COMPONENTS = ("normalizer", "pre_tokenizer")',
        "test_tokenization.py::test_real_texts_from_a_word_to_far_past_the_limit",
    ),
    Mutant(
        "tokens-types-are-zeros",
        "fastbert/tokenization.py",
        "has_types = paired or any(encodings[int(lengths.argmax())].type_ids)",
        "has_types = False",
        "test_tokenization.py::test_real_texts_from_a_word_to_far_past_the_limit",
    ),
    Mutant(
        "tokens-types-of-pairs-alone",
        "fastbert/tokenization.py",
        "has_types = paired or any(encodings[int(lengths.argmax())].type_ids)",
        "has_types = paired",
        "test_tokenization.py::test_texts[types of its own]",
    ),
    Mutant(
        "tokens-of-components-in-python",
        "fastbert/tokenization.py",
        "if _is_in_python(component[place]):",
        "if False:",
        "test_tokenization.py::test_whose_tokens_are_the_wrappers_affair[Python]",
    ),
    Mutant(
        "windows-beyond-the-batch-size",
        "fastbert/windows.py",
        "min(batch_size * int(lengths[0]), most_tokens)",
        "most_tokens",
        "test_windows.py::test_batches_are_as_full_as_they_may_be",
    ),
    Mutant(
        "windows-in-no-order",
        "fastbert/windows.py",
        "return Window(first + order,",
        "return Window(first + np.arange(len(order)),",
        "test_windows.py::test_every_token_is_in_one_batch_within_its_bounds",
    ),
    Mutant(
        "windows-thread-that-goes-on",
        "fastbert/windows.py",
        "        stopped.set()\n        if upcoming",
        "        if upcoming",
        "test_windows.py::test_closing_ends_the_thread_within_a_chunk",
    ),
    Mutant(
        "windows-errors-of-the-thread-are-lost",
        "fastbert/windows.py",
        "        if self._error is not None:\n            raise self._error\n        return self._result",
        '        return getattr(self, "_result", None)',
        "test_windows.py::test_what_is_raised_in_the_thread_reaches_the_caller_in_its_place",
    ),
    Mutant(
        "packed-with-hooks-on-the-pooler",
        "fastbert/inference.py",
        "blocks += [] if base.pooler is None else [base.pooler]",
        "",
        "test_inference.py::test_a_pooler_of_somebodys_sees_padded_batches",
    ),
    Mutant(
        "packed-under-patches-for-every-model",
        "fastbert/inference.py",
        'if function is not None and not _is_written_in(function, "sentence_transformers"):',
        "if False:",
        "test_inference.py::test_what_is_patched_for_every_model",
    ),
    Mutant(
        "packed-modules-that-look-at-padding",
        "fastbert/inference.py",
        "kind_of(module) not in AFTER[kind]:",
        "False:",
        "test_inference.py::test_modules_that_may_look_at_padding",
    ),
    Mutant(
        "packed-prompt-of-a-token-less",
        "fastbert/inference.py",
        "(len(ids) > 0 and ids[-1] in special_ids)",
        "1",
        "test_inference.py::test_a_prompt_without_a_special_token_at_its_end",
    ),
    Mutant(
        "packed-prompts-of-the-second-text",
        "fastbert/inference.py",
        "(self._prompt + a, b) for a, b in inputs",
        "(a, self._prompt + b) for a, b in inputs",
        "test_inference.py::test_kinds_of_inputs",
    ),
    Mutant(
        "packed-lengths-of-queries",
        "fastbert/inference.py",
        '        options["max_length"] = lengths[task]\n',
        "        pass\n",
        "test_inference.py::test_lengths_of_queries_and_documents",
    ),
    Mutant(
        "packed-states-are-kept",
        "fastbert/inference.py",
        "outputs.append(packed.features(given)[name])",
        "bar.kept = [*getattr(bar, 'kept', ()), packed.features(given)]; outputs.append(bar.kept[-1][name])",
        "test_inference.py::test_nothing_but_the_vectors_is_kept",
    ),
    Mutant(
        "packed-rows-are-waited-for-at-once",
        "fastbert/inference.py",
        "        arriving = to_host(values)\n        self._collect()\n        self._pending = rows, arriving",
        "        self._pending = rows, to_host(values)\n        self._collect()",
        "test_inference.py::test_rows_from_a_device_are_waited_for_one_window_later",
    ),
    Mutant(
        "encode-the-last-block-is-lost",
        "fastbert/commands/encode.py",
        "                    if pending is not None:\n",
        "                    if pending is not None and block is not None:\n",
        "test_encode.py::test_a_block_is_written_while_the_device_works_on_the_next",
    ),
    Mutant(
        "graphs-types-of-packed-texts-of-before",
        "fastbert/capture.py",
        "            self._inputs[1, :size].zero_()\n",
        "            pass\n",
        "test_graphs.py::test_packed_inputs_of_every_kind",
    ),
    Mutant(
        "graphs-packed-texts-of-before",
        "fastbert/capture.py",
        "        self._bounds[num_bounds:].copy_(cu_seqlens[-1:])\n",
        "",
        "test_graphs.py::test_one_graph_serves_every_mix_of_packed_texts_of_a_bucket",
    ),
    Mutant(
        "graphs-of-packed-texts-past-the-positions",
        "fastbert/graphs.py",
        "if not 0 < longest <= num_positions:",
        "if False:",
        "test_graphs.py::test_packed_texts_that_no_graph_serves",
    ),
    Mutant(
        "graphs-outputs-of-the-pool",
        "fastbert/capture.py",
        "{name: x.clone() for name, x in self._results.items()}",
        "dict(self._results)",
        "test_graphs.py::test_outputs_stay_as_they_are",
    ),
    Mutant(
        "graphs-every-second-dimension-is-cut",
        "fastbert/capture.py",
        "x.ndim > 2 or name in PER_TOKEN",
        "x.ndim > 1",
        "test_graphs.py::test_hidden_sizes_like_the_bucket_are_not_cut",
    ),
    Mutant(
        "graphs-the-newest-makes-room",
        "fastbert/graphs.py",
        "self._graphs.popitem(last=False)",
        "self._graphs.popitem()",
        "test_graphs.py::test_the_least_recently_used_graph_makes_room",
    ),
    Mutant(
        "graphs-used-is-not-recent",
        "fastbert/graphs.py",
        "            self._graphs.move_to_end(bucket)\n",
        "            pass\n",
        "test_graphs.py::test_the_least_recently_used_graph_makes_room",
    ),
    Mutant(
        "graphs-streams-in-no-order",
        "fastbert/capture.py",
        "            stream.wait_event(self._done)\n",
        "            pass\n",
        "test_graphs.py::test_what_is_asked_of_a_cuda_device",
    ),
    Mutant(
        "graphs-buckets-past-the-positions",
        "fastbert/graphs.py",
        "min(max(SHORTEST, _power_of_two(seq_len)), num_positions)",
        "max(SHORTEST, _power_of_two(seq_len))",
        "test_graphs.py::test_buckets_are_powers_of_two_within_the_positions",
    ),
    Mutant(
        "graphs-without-a-lock",
        "fastbert/graphs.py",
        "        with self._lock:\n            outputs = self._replayed(",
        "        if True:\n            outputs = self._replayed(",
        "test_graphs.py::test_threads_get_their_own_outputs",
    ),
    Mutant(
        "binding-that-keeps-a-tensor",
        "kernels/fastbert_kernels/launch.py",
        "{name: None if name in blocks else arguments[name] for name in self.kernel.arg_names}",
        "{name: arguments[name] for name in self.kernel.arg_names}",
        "test_compilation.py::test_a_direct_launch_is_given_what_triton_gives[float16]",
    ),
    Mutant(
        "binding-never-made",
        "kernels/fastbert_kernels/launch.py",
        "if self.binding is None and run is _run and compiled is not None:",
        "if False:",
        "test_compilation.py::test_a_direct_launch_is_given_what_triton_gives[float32]",
    ),
    Mutant(
        "binding-the-place-of-another-pointer",
        "kernels/fastbert_kernels/binding.py",
        "arguments[place] = addresses[number]",
        "arguments[place] = addresses[0]",
        "test_compilation.py::test_a_direct_launch_is_given_what_triton_gives[float32]",
    ),
    Mutant(
        "binding-descriptors-of-the-first-memory",
        "kernels/fastbert_kernels/binding.py",
        "[x if y is None else address for x, y in zip(addresses, blocks, strict=True)]",
        "addresses",
        "test_compilation.py::test_a_direct_launch_is_given_what_triton_gives[float16]",
    ),
    Mutant(
        "layer-workspace-whose-parts-overlap",
        "kernels/fastbert_kernels/encoder_layer.py",
        "attended = max(qkv + context, up)",
        "attended = qkv",
        "test_encoder_layer.py::test_bits[48-torch.float32]",
    ),
    Mutant(
        "layer-weights-known-by-their-addresses-alone",
        "kernels/fastbert_kernels/encoder_layer.py",
        " or found[:3] != (nbytes, dtypes, strides)",
        "",
        "test_encoder_layer.py::test_weights_that_change[transpose]",
    ),
    Mutant(
        "layer-plans-for-any-eps",
        "kernels/fastbert_kernels/encoder_layer.py",
        "        eps, torch_precision(x),\n",
        "        torch_precision(x),\n",
        "test_encoder_layer.py::test_everything_that_varies",
    ),
    Mutant(
        "layer-launches-that-nobody-can-watch",
        "kernels/fastbert_kernels/launch.py",
        "return run is _run and not is_watched()",
        "return run is _run",
        "test_encoder_layer.py::test_who_watches_launches_sees_them",
    ),
    Mutant(
        "launch-plans-of-other-configurations",
        "kernels/fastbert_kernels/launch.py",
        "    for forget in _forgetting:\n        forget()\n",
        "    pass\n",
        "test_kernels.py::test_plans_follow_the_configurations",
    ),
    Mutant(
        "graphs-captured-as-it-happens-to-be",
        "fastbert/graphs.py",
        "if bucket in self._graphs or state.is_current():",
        "if True:",
        "test_graphs.py::test_a_hook_is_noticed_before_another_bucket_is_captured",
    ),
    Mutant(
        "graphs-of-foreign-classes",
        "fastbert/graph_state.py",
        "    if foreign := _foreign(model):",
        "    if foreign := None:",
        "test_graphs.py::test_classes_from_elsewhere_are_not_captured",
    ),
    Mutant(
        "graphs-that-failed-again-and-again",
        "fastbert/graphs.py",
        "return Refusal(self._failed[bucket][0]) if bucket in self._failed else None",
        "return None",
        "test_graphs.py::test_a_failed_capture_is_not_tried_again",
    ),
    Mutant(
        "graphs-by-themselves-at-once",
        "fastbert/automatic.py",
        "if bucket not in self._came:",
        "if False:",
        "test_automatic_graphs.py::test_the_second_call_captures[BertModel]",
    ),
    Mutant(
        "graphs-by-themselves-of-calls-that-failed",
        "fastbert/automatic.py",
        "            outputs = self.plain(*args, **kwargs)\n",
        "            self._came.add(served.bucket)\n            outputs = self.plain(*args, **kwargs)\n",
        "test_automatic_graphs.py::test_only_a_call_that_succeeds_counts",
    ),
    Mutant(
        "graphs-by-themselves-of-models-in-models",
        "fastbert/automatic.py",
        "if thread.owned or model.training",
        "if model.training",
        "test_automatic_graphs.py::test_the_second_call_captures[BertForSequenceClassification]",
    ),
    Mutant(
        "graphs-by-themselves-of-replicas",
        "fastbert/automatic.py",
        ' or "_is_replica" in model.__dict__',
        "",
        "test_automatic_graphs.py::test_replicas_of_data_parallel_are_launched",
    ),
    Mutant(
        "graphs-by-themselves-without-end",
        "fastbert/automatic.py",
        "if self._device.memory() <= MOST_MEMORY:",
        "if True:",
        "test_automatic_graphs.py::test_graphs_beyond_the_memory_make_room_for_the_newest",
    ),
    Mutant(
        "graphs-by-themselves-fail-for-good",
        "fastbert/automatic.py",
        "graph_rules.clock() - failed_at < MINUTE",
        "True",
        "test_automatic_graphs.py::test_a_failed_capture_is_forgotten_and_tried_again_after_a_minute",
    ),
    Mutant(
        "graphs-with-a-patch-of-the-class-in-them",
        "fastbert/automatic.py",
        "return original_forward(type(self.model)).__get__(self.model)",
        "return type(self.model).forward.__get__(self.model)",
        "test_automatic_graphs.py::test_a_patch_of_our_class_is_around_the_graph_once",
    ),
    Mutant(
        "graphs-that-a-move-leaves",
        "fastbert/pretrained.py",
        "            graphs.free_graphs(self)\n",
        "            pass\n",
        "test_automatic_graphs.py::test_a_model_that_moves_frees_what_its_graphs_keep",
    ),
    Mutant(
        "graphs-freed-beside-a-call",
        "fastbert/graphs.py",
        "        with self._lock:\n            self._free()\n            self._state = None\n",
        "        self._free()\n        self._state = None\n",
        "test_automatic_graphs.py::test_graphs_are_turned_off_while_another_thread_calls",
    ),
    Mutant(
        "graphs-of-any-view-of-their-memory",
        "fastbert/graph_state.py",
        "list(map(_nbytes, self._tensors)),\n            list(map(Tensor.is_contiguous, self._matrices)),\n",
        "\n",
        "test_automatic_graphs.py::test_another_view_of_the_same_memory",
    ),
    Mutant(
        "layers-called-around-a-patch",
        "fastbert/layers.py",
        "layer._compiled_call_impl is None and BertLayer.forward is _OWN_LAYER_FORWARD",
        "layer._compiled_call_impl is None",
        "test_automatic_graphs.py::test_patches_of_our_parts_are_called",
    ),
    Mutant(
        "graphs-by-themselves-stay-where-they-are-off",
        "fastbert/automatic.py",
        "                free_graphs(each)\n",
        "                pass\n",
        "test_automatic_graphs.py::test_off_for_a_model_frees_its_graphs_until_the_end_of_the_block",
    ),
    Mutant(
        "graphs-by-themselves-of-a-model-of-before",
        "fastbert/automatic.py",
        "        self._came.clear()\n",
        "        pass\n",
        "test_automatic_graphs.py::test_a_changed_model_begins_anew",
    ),
    Mutant(
        "graphs-by-themselves-of-inputs-elsewhere",
        "fastbert/automatic.py",
        "if input_ids.device != device or ",
        "if ",
        "test_automatic_graphs.py::test_inputs_that_lie_elsewhere_meet_the_models_own_errors",
    ),
    Mutant(
        "graphs-gradients-for-nothing-unsaid",
        "fastbert/automatic.py",
        "isinstance(x, Tensor) and x.requires_grad",
        "False",
        "test_automatic_graphs.py::test_needless_gradients_are_told_of_once",
    ),
    Mutant(
        "graphs-captured-again-and-again",
        "fastbert/graph_rules.py",
        "now - _captured_at[0] < MINUTE",
        "False",
        "test_automatic_graphs.py::test_captures_of_a_minute_are_bounded",
    ),
    Mutant(
        "graphs-captured-beside-any-thread",
        "fastbert/graph_rules.py",
        " and not _is_harmless(other):",
        " and False:",
        "test_automatic_graphs.py::test_a_thread_that_may_wait_for_the_device_keeps_auto_from_capturing",
    ),
    Mutant(
        "graphs-captured-on-any-thread",
        "fastbert/graph_rules.py",
        "if threading.current_thread() is not threading.main_thread():",
        "if False:",
        "test_automatic_graphs.py::test_a_worker_thread_replays_and_does_not_capture",
    ),
    Mutant(
        "graphs-harmless-by-the-beginning-of-a-name",
        "fastbert/graph_rules.py",
        'name == known or name.startswith(f"{known}.")',
        "name.startswith(known)",
        "test_automatic_graphs.py::test_names_that_only_begin_like_those_of_harmless_threads[tqdmlike]",
    ),
    Mutant(
        "graphs-the-model-before-the-thread",
        "fastbert/graph_rules.py",
        "mode = thread.mode or (of_models.get(model) if of_models else None)",
        "mode = (of_models.get(model) if of_models else None) or thread.mode",
        "test_automatic_graphs.py::test_the_thread_comes_before_the_model_and_that_before_the_process",
    ),
    Mutant(
        "graphs-in-graphs-of-somebodys",
        "fastbert/graphs.py",
        "if CudaGraphs.is_capturing():",
        "if False:",
        "test_automatic_graphs.py::test_a_call_that_somebody_captures_is_launched[True]",
    ),
    Mutant(
        "graphs-below-a-mode-that-sees-ops",
        "fastbert/graphs.py",
        "if is_watched():",
        "if False:",
        "test_automatic_graphs.py::test_a_mode_that_sees_every_op_sees_every_op",
    ),
    Mutant(
        "graphs-locks-of-a-forked-process",
        "fastbert/graphs.py",
        "        forward.begin_anew()\n",
        "        pass\n",
        "test_automatic_graphs.py::test_a_forked_process_has_no_graphs",
    ),
    Mutant(
        "graphs-heads-patched-for-every-model",
        "fastbert/graph_state.py",
        "(self._theirs.forward, self._kind.forward, ",
        "(self._kind.forward, ",
        "test_automatic_graphs.py::test_a_forward_of_transformers_that_is_patched_for_every_model",
    ),
    Mutant(
        "conversion-hooks-of-transformers-stay",
        "fastbert/conversion.py",
        "                del module._forward_hooks[key]",
        "                pass",
        "test_conversion.py::test_states_and_attentions_asked_for_before_keep_no_layer_from_being_fused",
    ),
    Mutant(
        "conversion-training-after-a-cast-is-lost",
        "fastbert/conversion.py",
        "learned = original if unchanged.all() else torch.where(unchanged, original, learned.cpu())",
        "learned = original",
        "test_conversion.py::test_weights_trained_after_a_cast_keep_what_they_learned",
    ),
    Mutant(
        "conversion-a-second-cast-passes-for-training",
        "fastbert/conversion.py",
        "original.to(cast).to(tensor.dtype)",
        "original.to(tensor.dtype)",
        "test_conversion.py::test_restore_gives_the_old_bits_after_another_cast",
    ),
    Mutant(
        "conversion-the-old-forward-is-called-on",
        "fastbert/conversion.py",
        "            vars(module)[name] = module_class.forward.__get__(module)",
        "            pass",
        "test_accelerate.py::test_offloaded_blocks",
    ),
    Mutant(
        "fusion-disabled-adapters-count-once-merged",
        "fastbert/fusion.py",
        'getattr(module, "merged", False) and not module.disable_adapters',
        'getattr(module, "merged", False)',
        "test_peft.py::test_disabled_adapters_do_not_count",
    ),
    Mutant(
        "graphs-merged-adapters-are-captured",
        "fastbert/graph_state.py",
        'if type(module).__module__.startswith("peft."):',
        "if False:",
        "test_graphs.py::test_a_merged_adapter_is_not_captured",
    ),
    Mutant(
        "sentences-padding-is-pooled",
        "fastbert/sentences.py",
        "ops.pool(hidden.flatten(0, 1), layout.cu_seqlens, mode, indices=layout.indices)",
        "ops.pool(hidden.flatten(0, 1), layout.cu_seqlens, mode)",
        "test_sentence_transformers.py::test_every_pooling_gives_the_same_vectors",
    ),
    Mutant(
        "sentences-expansion-tokens-are-padding",
        "fastbert/sentences.py",
        'elif "query_expansion_positions" in features:',
        "elif False:",
        "test_sentence_transformers.py::test_expansion_tokens_of_a_multi_vector_encoder_are_scored",
    ),
    Mutant(
        "sentences-the-mask-is-carried-by-anybody",
        "fastbert/sentences.py",
        "carried = _carries.get() and ",
        "carried = ",
        "test_sentence_transformers.py::test_no_mask_is_carried_where_somebody_may_change_the_batch",
    ),
    Mutant(
        "sentences-weights-of-tokens-are-ones",
        "fastbert/sentences.py",
        'if kind == "Pooling" and _kind(after.get(module)) != "Transformer":',
        "if False:",
        "test_sentence_transformers.py::test_a_module_that_weighs_tokens_by_the_mask_keeps_the_pooling_after_it",
    ),
    Mutant(
        "warmup-pooler-of-the-texts-alone",
        "fastbert/compilation.py",
        "new_zeros(batch_size * seq_len, 1,",
        "new_zeros(batch_size, 1,",
        "test_compilation.py::test_sizes_that_vary_compile_nothing_new_and_nothing_spills[float16]",
    ),
    Mutant(
        "rule-three-tf32-products-are-exact",
        "fastbert/commands/closeness.py",
        "torch.finfo(dtype).eps + FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps",
        "torch.finfo(dtype).eps",
        "test_numerics.py::test_a_product_of_three_is_off_by_the_roundings_that_the_rule_allows",
    ),
    Mutant(
        "rule-roundings-that-nothing-takes",
        "fastbert/commands/closeness.py",
        "FLOAT32_ROUNDINGS = 4",
        "FLOAT32_ROUNDINGS = 5",
        "test_numerics.py::test_a_product_of_three_is_off_by_the_roundings_that_the_rule_allows",
    ),
    Mutant(
        "encode-rows-in-the-order-of-their-lengths",
        "fastbert/commands/encode.py",
        "places = np.argsort(texts.rows)",
        "places = np.arange(len(texts.rows))",
        "test_encode.py::test_the_vectors_are_those_of_sentence_transformers",
    ),
    Mutant(
        "encode-progress-before-the-rows",
        "fastbert/commands/resumable.py",
        "        self._file.write(rows.data)\n        self._flush()\n",
        "        self._file.write(rows.data)\n",
        "test_encode.py::test_progress_counts_no_row_that_is_not_in_the_file",
    ),
    Mutant(
        "encode-another-input-goes-on",
        "fastbert/commands/resumable.py",
        "            self._refuse_another(fingerprint)\n",
        "",
        "test_encode.py::test_a_run_of_something_else_does_not_go_on",
    ),
    Mutant(
        "conversion-patches-of-every-model-pass",
        "fastbert/conversion.py",
        "replaced = patches.replaced() or patches.replaced_in_models() or patches.replaced_for_masks(encoder)",
        "replaced = None",
        "test_live_modules.py::test_what_is_patched_for_every_model_counts_or_is_refused[eager-an activation]",
    ),
    Mutant(
        "embed-sum-in-the-words-dtype",
        "kernels/fastbert_kernels/embed_layer_norm.py",
        "word_table.shape[1], dtype=dtype)",
        "word_table.shape[1])",
        "test_live_modules.py::test_outputs_are_transformers[halve_the_words-after-kernels]",
    ),
    Mutant(
        "fusion-the-function-inside-an-activation-is-its-own",
        "fastbert/fusion.py",
        "own = act is (F.gelu if type(activation) is activations.GELUActivation else None)",
        "own = True",
        "test_live_modules.py::test_outputs_are_transformers[change_inside_the_activation-after-eager]",
    ),
    Mutant(
        "inputs-buffers-hold-the-defaults",
        "fastbert/inputs.py",
        "return seen[2]",
        "return None, None",
        "test_live_modules.py::test_outputs_are_transformers[types_of_the_second_kind-before-eager]",
    ),
    Mutant(
        "inputs-a-buffer-that-was-written-to-is-not-seen",
        "fastbert/inputs.py",
        " or seen[1] != versions",
        "",
        "test_live_modules.py::test_a_buffer_is_looked_at_again_once_it_was_written_to",
    ),
    Mutant(
        "inputs-a-table-by-its-count",
        "fastbert/inputs.py",
        "return weight.shape[0]",
        "return table.num_embeddings",
        "test_live_modules.py::test_a_table_of_more_positions_serves_longer_texts",
    ),
    Mutant(
        "inputs-words-at-padding-are-not-counted",
        "fastbert/inputs.py",
        "cleared[name] = torch.where(known, ids, cleared[name])",
        "pass",
        "test_live_modules.py::test_options_of_an_embedding_give_transformers_gradients",
    ),
    Mutant(
        "layers-heads-of-the-configuration",
        "fastbert/layers.py",
        "int(weights[0].shape[0]) // head_size, head_size,",
        "p.self_attention.config.num_attention_heads, head_size,",
        "test_live_modules.py::test_outputs_are_transformers[prune_heads-after-eager]",
    ),
    Mutant(
        "layers-causal-attention-is-fused",
        "fastbert/layers.py",
        "if attention.is_causal:",
        "if False:",
        "test_live_modules.py::test_outputs_are_transformers[attend_causally-after-eager]",
    ),
    Mutant(
        "layers-as-many-states-as-configured",
        "fastbert/layers.py",
        'given.get("output_hidden_states"), len(layers) + 1)',
        'given.get("output_hidden_states"), self.config.num_hidden_layers + 1)',
        "test_live_modules.py::test_outputs_are_transformers[another_layer-after-eager]",
    ),
    Mutant(
        "model-masks-of-its-own-are-ignored",
        "fastbert/model.py",
        "why_no_block(), is_decoder or patches.replaced_for_masks(self)",
        "why_no_block(), False",
        "test_live_modules.py::test_outputs_are_transformers[mask_by_hand-after-eager]",
    ),
    Mutant(
        "layers-a-hooked-encoder-is-given-a-layout",
        "fastbert/layers.py",
        "return own and not seen and ",
        "return own and ",
        "test_parts.py::test_hooks_are_shown_transformers_arguments",
    ),
    Mutant(
        "layers-own-layers-get-no-keywords",
        "fastbert/layers.py",
        "layer(hidden_states, mask, None, **nothing, **given, **asked)",
        "layer(hidden_states, mask, **asked)",
        "test_parts.py::test_hooks_are_shown_transformers_arguments",
    ),
    Mutant(
        "library-a-second-derivative-forgets-its-inputs",
        "fastbert/library.py",
        "return x.view_as(x) if again else",
        "return x.detach().requires_grad_(want) if again else",
        "test_triton.py::test_a_second_derivative",
    ),
    Mutant(
        "library-a-second-derivative-of-an-op",
        "fastbert/library.py",
        "if torch.is_grad_enabled() and not eager.is_tracing():",
        "if False:",
        "test_triton.py::test_a_second_derivative",
    ),
    Mutant(
        "heads-a-trace-depends-on-gradients",
        "fastbert/heads.py",
        "if torch.is_grad_enabled() and not is_jit_tracing():",
        "if torch.is_grad_enabled():",
        "test_onnx.py::test_a_trace_of_a_head_with_gradients_on",
    ),
    Mutant(
        "model-a-trace-holds-the-examples-sizes",
        "fastbert/model.py",
        "return hidden_states.view(shape) if",
        "return hidden_states.unflatten(0, shape[:2]) if",
        "test_onnx.py::test_exported_models_take_other_sizes",
    ),
    Mutant(
        "fusion-a-patched-wrapper-of-copies-passes",
        "fastbert/fusion.py",
        """    if has_hooks(module) or has_patched_forward(module):
        return module
    active""",
        "    active",
        "test_peft.py::test_a_patched_wrapper_of_a_trained_copy_counts",
    ),
    Mutant(
        "conversion-a-patched-head-is-converted",
        "fastbert/conversion.py",
        "return type(head) in heads.ALIKE and bool(patched)",
        "return False",
        "test_conversion.py::test_a_patched_head_goes_on_as_transformers_around_a_converted_encoder",
    ),
    Mutant(
        "model-a-hooked-encoder-clears-beside-its-path",
        "fastbert/model.py",
        "mask.keep = layout.keep",
        "pass",
        "test_parts.py::test_hidden_states_come_through_a_hooked_encoder",
    ),
    Mutant(
        "tokens-a-mask-of-two-dimensions-is-padding-to-an-encoder",
        "fastbert/tokens.py",
        "if isinstance(mask, Tensor) and mask.ndim < 3:",
        "if False:",
        "test_parts.py::test_the_encoder_adds_a_mask_of_any_shape_that_broadcasts",
    ),
    Mutant(
        "fusion-foreign-weights-are-packed",
        "fastbert/fusion.py",
        "not plain.issuperset(map(type, module._parameters.values()))",
        "not module._parameters",
        "test_libraries.py::test_gradients_of_every_sample",
    ),
    Mutant(
        "fusion-the-original-of-trained-copies",
        "fastbert/fusion.py",
        "return copies[active[0]] if trained else module.original_module",
        "return module.original_module",
        "test_peft.py::test_merged_adapters_leave_the_layers_fused",
    ),
    Mutant(
        "inputs-buffers-are-looked-at-below-a-mode",
        "fastbert/inputs.py",
        "is_transforming() or is_watched() or",
        "is_transforming() or",
        "test_libraries.py::test_shapes_without_numbers",
    ),
    Mutant(
        "model-a-replaced-encoder-returns-no-states",
        "fastbert/model.py",
        "if given.get(name) and found is None:",
        "if False:",
        "test_parts.py::test_an_encoder_that_returns_no_states_is_named",
    ),
    Mutant(
        "ops-a-trace-holds-kernels",
        "fastbert/ops.py",
        "leaves = eager.is_jit_tracing() or torch.onnx.is_in_onnx_export()",
        "leaves = False",
        "test_onnx.py::test_exported_models_take_other_sizes",
    ),
    Mutant(
        "patches-a-wrapper-passes",
        "fastbert/patches.py",
        '        and homes[1].partition(".")[0] == library\n',
        "",
        "test_live_modules.py::test_a_wrapped_method_is_a_patched_one",
    ),
]


def applied(mutant: Mutant, text: str) -> str:
    """The file's text with the bug in it; raises ValueError where the place is not there or not the only one."""
    count = text.count(mutant.original)
    if count != 1:
        raise ValueError(f"{mutant.name}: the original text stands {count} times in {mutant.file}")
    return text.replace(mutant.original, mutant.replacement)


def run_tests(tests: Iterable[str], mutant: Mutant | None = None) -> tuple[int, str]:
    """The exit status of pytest in a copy of the tracked files, and what it printed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in listed.rstrip("\0").split("\0"):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        if mutant:
            path = copy / mutant.file
            path.write_text(applied(mutant, path.read_text()))
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
        environment = {
            "PYTHONPATH": f"{copy}:{copy / 'kernels'}",
            "CUDA_VISIBLE_DEVICES": "",  # in the interpreter everywhere: some tests are its alone
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        result = subprocess.run(
            [sys.executable, "-c", RUN_PYTEST, *options],
            cwd=copy, env=os.environ | environment, text=True, timeout=TIME_LIMIT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return result.returncode, result.stdout


def judge(mutant: Mutant) -> str:
    """Print and return what became of a mutant: "killed", "SURVIVED" or "ERROR"."""
    start = time.monotonic()
    try:
        status, output = run_tests([mutant.test], mutant)
    except (ValueError, subprocess.TimeoutExpired) as error:
        status, output = None, str(error)
    lines = output.splitlines()
    # A name with "::" is a test's: one without it is a file that cannot be collected.
    failed = next((line for line in lines if line.startswith(("FAILED ", "ERROR ")) and "::" in line.split()[1]), None)
    if status == 1 and failed:
        verdict, detail = "killed", failed[:200]
    elif status == 0:
        verdict, detail = "SURVIVED", f"PASSED tests/{mutant.test}"
    else:
        verdict, detail = "ERROR", f"status {status}: {lines[-1:]}"
    print(f"{verdict:8}  {time.monotonic() - start:4.0f} s  {mutant.name}  {detail}", flush=True)
    return verdict


def main(names: list[str]) -> None:
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        sys.exit(f"no mutant is called {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    start = time.monotonic()
    by_file: dict[str, set[str]] = {}
    for mutant in mutants:
        by_file.setdefault(mutant.test.split("::")[0], set()).add(mutant.test)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for status, output in pool.map(run_tests, map(sorted, by_file.values())):
            if status != 0:
                sys.exit(f"{output}\nthe tests do not pass without a mutant")
        print(f"without a mutant every test passes, {time.monotonic() - start:.0f} s", flush=True)
        verdicts = list(pool.map(judge, mutants))
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("killed", "SURVIVED", "ERROR"))
    print(f"{len(mutants)} mutants in {time.monotonic() - start:.0f} s: {counts}")
    sys.exit(verdicts.count("killed") < len(mutants))


if __name__ == "__main__":
    main(sys.argv[1:])
