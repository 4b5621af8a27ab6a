"""What every kernel compiles to, on any machine: ``python -m fastbert_kernels.tuning.report``.

Every kernel x shipped configuration x architecture x dtype is compiled ahead of time at the sizes of BERT models. Its
registers, spills, shared memory, matrix instruction and CTAs per SM are read from the machine code and the assembly.
The roofline time of each call that uses it is listed beside them. The exit status is 1 if a kernel does not compile,
spills on NVIDIA, exceeds the chip's shared memory or lacks the matrix instruction of its dtype. Its row has the reason.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch
import triton
from torch import Tensor
from triton import knobs

import fastbert_kernels
from fastbert_kernels import configs
from fastbert_kernels.dropout import Dropout
from fastbert_kernels.limits import MAX_ROW, MAX_TRAINED_ROW
from fastbert_kernels.tuning.ahead_of_time import (
    CHIPS,
    MATRIX_INSTRUCTIONS,
    TENSOR_MEMORY_COLUMNS,
    Chip,
    Compiled,
    compiling_for,
)
from fastbert_kernels.tuning.roofline import H200, LAYER, MODELS, Model, work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPS = (
    "packing_plan",
    "embed_layer_norm",
    "qkv_projection",
    "attention",
    "attention_forward",
    "attention_backward",
    "linear_residual_layer_norm",
    "linear_activation",
    "residual_layer_norm",
    "layer_norm_backward",
    "linear_activation_forward",
    "activation_backward",
    "unpack",
    "pool",
)
SHAPES = ((1, 16), (1, 128), (4, 128), (8, 128), (32, 128), (32, 512), (256, 128))  # batch size, padded length
# Sizes that those models do not have: rows that TMA cannot address, other head sizes, the widest rows.
FURTHER_MODELS = {
    "E300": Model(12, 300, 12, 1200),
    "D16": Model(12, 384, 24, 1536),
    "D80": Model(24, 1280, 16, 5120),
    "D128": Model(24, 1024, 8, 4096),
    "widest": Model(1, MAX_ROW, 128, 4 * MAX_ROW),
}
# Ops that only training uses. They are compiled in bf16 and fp32, since the code of fp16 differs in conversions only,
# and not for models whose rows or heads no BERT model has.
TRAINING = (
    "attention_forward", "attention_backward", "linear_activation_forward", "activation_backward",
    "residual_layer_norm", "layer_norm_backward",
)  # fmt: skip
# Kernels that are one of several launches of their op, and their place in `work`.
PARTS = {
    "_row_lengths_kernel": "row_lengths",
    "_layer_norm_kernel": "layer_norm",
    "_attention_bwd_dq_kernel": "attention_backward_dq",
    "_attention_bwd_dkv_kernel": "attention_backward_dkv",
}
# wgmma reads one operand of a float32 product from registers. Heads of more elements would spill in the backward, which
# therefore multiplies fewer than 64 rows, by mma.
MAX_HEAD_SIZE_OF_FP32_WGMMA = 64
# ptxas prefers an occupancy step to a few of the registers that dropout's numbers take.
MAX_SPILL_OF_DROPOUT = 48  # bytes
# In float32, heads above 64 do not fit into the registers of training's attention. Tritons differ in how many spill.
MAX_SPILL_OF_WIDE_FP32 = 128  # bytes


def calls(model: Model, batch_size: int, seq_len: int, dtype: torch.dtype) -> Iterator[tuple[str, str, Callable]]:
    """Yield the launchers' calls of a forward pass with its mask on the device, and of training: place in the model,
    op, call."""
    tokens, (_, width, num_heads, inner) = batch_size * seq_len, model
    scale = (width // num_heads) ** -0.5

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, indices = new(batch_size, seq_len, dtype=torch.int64), new(tokens, dtype=torch.int64)
    cu_seqlens, num_tokens = new(batch_size + 1, dtype=torch.int32), new(1, dtype=torch.int32)
    x, bias, norm = new(tokens, width), new(width), (new(width), new(width), 1e-12)
    tables, square = (new(30522, width), new(512, width), new(2, width)), (new(width, width), bias)
    dropout = Dropout(0.1, new(1, dtype=torch.int64), 1)
    rows = new(tokens, min(width, MAX_TRAINED_ROW))
    trained = (rows, rows, rows[0])
    qkv, activated = new(tokens, 3, num_heads, width // num_heads), new(tokens, inner)
    lse = new(num_heads, tokens, dtype=torch.float32)
    for place, op, *arguments in (
        ("packing_plan", "packing_plan", ids),
        ("embed_layer_norm", "embed_layer_norm", ids, ids, None, None, indices, *tables, *norm, None, num_tokens),
        ("qkv_projection", "qkv_projection", x, *square * 3, num_heads, num_tokens),
        ("attention", "attention", qkv, cu_seqlens, seq_len, scale),
        ("attention_forward", "attention_forward", qkv, cu_seqlens, seq_len, scale),
        ("attention_backward", "attention_backward", x, qkv, x, lse, cu_seqlens, seq_len, scale),
        ("attention_forward", "attention_forward", qkv, cu_seqlens, seq_len, scale, dropout),
        ("attention_backward", "attention_backward", x, qkv, x, lse, cu_seqlens, seq_len, scale, dropout),
        ("attention_output", "linear_residual_layer_norm", x, *square, x, *norm, num_tokens),
        ("linear_activation", "linear_activation", x, new(inner, width), new(inner), "gelu", num_tokens),
        ("linear_activation_forward", "linear_activation_forward", x, new(inner, width), new(inner), "gelu"),
        ("activation_backward", "activation_backward", activated, activated, "gelu"),
        ("feed_forward_output", "linear_residual_layer_norm", activated, new(width, inner), bias, x, *norm, num_tokens),
        ("residual_layer_norm", "residual_layer_norm", *trained, rows[0], 1e-12, dropout, num_tokens),
        ("layer_norm_backward", "layer_norm_backward", *trained, 1e-12, rows, dtype, dropout, num_tokens),
        ("unpack", "unpack", x, indices, batch_size, seq_len, num_tokens),
        ("pool", "pool", x, cu_seqlens, "mean", True),
        ("pooler", "linear_activation", new(batch_size, width), *square, "tanh"),
    ):
        yield place, op, partial(getattr(fastbert_kernels, op), *arguments)


def tables_of(target: str) -> list[dict]:
    """Return the launch configurations used on a target: those of the architecture and of each device with its own."""
    documents = map(configs.read, sorted(configs.FOLDER.glob("*.json")))
    of_devices = [document for document in documents if document.get("architecture") == target]
    return [configs.table_for(target), *map(configs.operations, of_devices)]


def rows_of(target: str, dtype: str, ops: list[str]) -> list[dict]:
    """Return a row for each kernel that the models compile for a target. kernels/README.md lists the keys."""
    rows, failed_calls = {}, {}
    models, tables = (MODELS | FURTHER_MODELS).items(), tables_of(target)
    with compiling_for(CHIPS[target].target) as launches:
        for table, (name, model), (batch_size, seq_len) in product(tables, models, SHAPES):
            for place, op, call in calls(model, batch_size, seq_len, DTYPES[dtype]):
                if op not in ops or (op in TRAINING and (dtype == "fp16" or name in ("E300", "D16"))):
                    continue
                launches.clear()
                try:
                    with configs.configured_by(table):
                        call()
                except Exception as error:  # raised by the launcher, before a kernel is compiled
                    failed = Compiled(op, {}, 0.0, None, f"{type(error).__name__}: {error}")
                    launches.append(failed_calls.setdefault((op, failed.error), failed))
                for compiled in launches:
                    row = rows.setdefault(compiled, _row(op, target, dtype, compiled))
                    part = PARTS.get(compiled.kernel, place)
                    needed = work(part, model, batch_size, seq_len, DTYPES[dtype].itemsize)
                    shape = {"model": name, "batch_size": batch_size, "seq_len": seq_len, "place": part}
                    shape |= {"flops": needed.flops, "bytes": needed.bytes}
                    shape |= {"roofline_us": round(needed.seconds(dtype) * 1e6, 3)}
                    if shape not in row["shapes"]:  # another table or a layer's second LayerNorm repeats it
                        row["shapes"].append(shape)
    return list(rows.values())


def _row(op: str, target: str, dtype: str, compiled: Compiled) -> dict:
    chip, found = CHIPS[target], compiled.resources
    read = ("registers", "spill_bytes", "shared_bytes", "matrix_instruction", "tma", "code_bytes")
    ctas_per_sm = found and found.ctas_per_sm(chip)
    return {
        "op": op,
        "kernel": compiled.kernel,
        "target": target,
        "dtype": dtype,
        "config": compiled.config,
        **{key: found and getattr(found, key) for key in read},
        "compile_s": round(compiled.seconds, 3),
        "ctas_per_sm": ctas_per_sm,
        "occupancy": found and round(ctas_per_sm * found.num_warps / chip.warps, 3),
        "reasons": failures(compiled, chip, dtype),
        "shapes": [],
    }


def failures(compiled: Compiled, chip: Chip, dtype: str) -> list[str]:
    """Return the reasons why a kernel may not ship as it is compiled; empty if it may."""
    found, reasons = compiled.resources, []
    if found is None:
        return [f"does not compile: {compiled.error}"]
    is_backward = compiled.kernel in ("_attention_bwd_dq_kernel", "_attention_bwd_dkv_kernel")
    is_wide = dtype == "fp32" and compiled.config.get("HEAD_SIZE", 0) > MAX_HEAD_SIZE_OF_FP32_WGMMA
    drops = bool(compiled.config.get("DROPOUT"))
    allowed_spill = MAX_SPILL_OF_WIDE_FP32 if is_wide and (drops or is_backward) else MAX_SPILL_OF_DROPOUT * drops
    if found.spill_bytes > allowed_spill and chip.target.backend == "cuda":
        reasons.append(f"spills {found.spill_bytes} bytes a thread")
    if found.shared_bytes > chip.program_shared_bytes:
        reasons.append(f"{found.shared_bytes} bytes of shared memory of {chip.program_shared_bytes}")
    if found.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        reasons.append(f"{found.tensor_memory_columns} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
    if not reasons and not found.ctas_per_sm(chip):
        reasons.append(
            f"{found.num_warps} warps of {found.registers} registers each thread do not fit on a multiprocessor"
        )
    needed = chip.matrix_instruction_fp32 if dtype == "fp32" else chip.matrix_instruction
    if is_backward and is_wide:
        needed = "HMMA" if needed == "HGMMA" else needed
    strongest_first = (*MATRIX_INSTRUCTIONS, "none")
    multiplies = "PRECISION" in compiled.config
    if multiplies and strongest_first.index(found.matrix_instruction) > strongest_first.index(needed):
        reasons.append(f"matrix instruction {found.matrix_instruction} instead of {needed}")
    return reasons


def markdown(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ("---",) * len(header), *rows))


def resource_line(row: dict) -> tuple:
    """Return the cells of a row that do not change from run to run."""
    config = " ".join(f"{key}={value}" for key, value in row["config"].items())
    models = dict.fromkeys(shape["model"] for shape in row["shapes"])
    tokens = [shape["batch_size"] * shape["seq_len"] for shape in row["shapes"]]
    return (
        row["op"], row["kernel"], row["dtype"], config, f"{' '.join(models)}, {min(tokens)} to {max(tokens)} tokens",
        row["registers"], row["spill_bytes"], row["shared_bytes"], row["matrix_instruction"],
        "yes" if row["tma"] else "no", row["code_bytes"], row["ctas_per_sm"], row["occupancy"],
        "; ".join(row["reasons"]).replace("\n", " "),
    )  # fmt: skip


def roofline_line(name: str, batch_size: int, seq_len: int, dtype: str) -> tuple:
    """Return the roofline times of each launch of a layer and of the whole model on an H200, in microseconds."""
    model = MODELS[name]

    def roofline_us(place: str) -> float:
        return work(place, model, batch_size, seq_len, DTYPES[dtype].itemsize).seconds(dtype, H200) * 1e6

    once = sum(map(roofline_us, ("row_lengths", "packing_plan", "embed_layer_norm", "unpack", "pooler")))
    layer = [roofline_us(place) for place in LAYER]
    total = once + model.num_layers * sum(layer)
    return name, f"{batch_size}x{seq_len}", dtype, *(f"{microseconds:.2f}" for microseconds in (*layer, total))


def page(rows: list[dict]) -> str:
    """Return the report as Markdown."""
    parts = [
        "# What the kernels compile to\n\nWritten by `python -m fastbert_kernels.tuning.report`, which compiles the "
        f"kernels and runs none; Triton {triton.__version__}. Registers and spills (bytes of local memory) "
        "are per thread, shared memory is per CTA. `CTAs per SM` is the number of CTAs that fit on an SM at a time, "
        "`occupancy` the share of its warps that they use. sm_89 stands for the architectures that use default.json."
    ]
    header = ("op", "kernel", "dtype", "configuration", "used for", "registers", "spill bytes", "shared bytes")
    header += ("instruction", "TMA", "code bytes", "CTAs per SM", "occupancy", "fails because")
    for target in dict.fromkeys(row["target"] for row in rows):
        lines = [resource_line(row) for row in rows if row["target"] == target]
        parts.append(f"## {target}\n\n{markdown(header, lines)}")
    times = [
        roofline_line(name, *shape, dtype)
        for dtype, name, shape in product(("bf16", "fp32"), ("minilm", "base", "large"), SHAPES)
    ]
    parts.append(
        "## Roofline times\n\nMicroseconds of each launch of one layer and of a whole forward pass with pooler, on "
        "full batches, at the rates measured on an NVIDIA H200: "
        f"{H200.flops_per_s['bf16'] / 1e12:.0f} TFLOP/s in bf16, {H200.bytes_per_s / 1e12:.1f} TB/s. fp32 takes three "
        "TF32 products at half that rate: derived, not measured. `linear_residual_layer_norm` counts as one launch."
        "\n\n" + markdown(("model", "B x S", "dtype", *LAYER, "model"), times)
    )
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastbert_kernels.tuning.report", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows instead of a page")
    for name, choices in (("target", CHIPS), ("dtype", DTYPES), ("op", OPS)):
        parser.add_argument(
            f"--{name}", action="append", choices=list(choices), help=f"only this {name} (may be repeated)"
        )
    options = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    targets, dtypes, ops = options.target or list(CHIPS), options.dtype or list(DTYPES), options.op or list(OPS)
    jobs = [(target, dtype, ops) for target in targets for dtype in dtypes]
    rows = []
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), get_context("spawn")) as pool:
        for (target, dtype, _), found in zip(jobs, pool.map(rows_of, *zip(*jobs, strict=True)), strict=True):
            rows += found
            failed = sum(bool(row["reasons"]) for row in found)
            print(f"{target} {dtype}: {len(found)} kernels, {failed} of them fail", file=sys.stderr)
    print(json.dumps(rows) if options.json else page(rows))
    return int(any(row["reasons"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
