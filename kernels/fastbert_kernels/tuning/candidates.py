"""Candidate launch configurations, compiled and filtered by the rules of the report. No GPU is needed.

Every launch of the operation in a model's layer is compiled with the candidate. As in the report, a candidate is
dropped if it does not compile, spills, exceeds shared memory or lacks the matrix instruction of its dtype. So all that
are left use the same matrix instruction.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from fastbert_kernels.configs import configured_by, keys_of
from fastbert_kernels.limits import MAX_HEAD_SIZE
from fastbert_kernels.tuning.ahead_of_time import CHIPS, Chip, compiling_for
from fastbert_kernels.tuning.report import DTYPES, FURTHER_MODELS, calls, failures
from fastbert_kernels.tuning.roofline import MODELS, Model

ALL_MODELS = MODELS | FURTHER_MODELS
# The launcher that reads an operation's configurations, where their names differ.
LAUNCHERS = {"linear_residual": "linear_residual_layer_norm"}
# The keys of a GEMM's configuration without those of its epilogue.
MAIN_LOOP = keys_of("linear_residual_layer_norm")
# Size classes: the largest size of each. Sizes are tokens, except for two operations: the row width and the head size.
TOKEN_CLASSES = (16, 128, 512, 1024, 4096, None)
CLASSES = {"linear_residual_layer_norm": (384,), "attention": (32, 64, MAX_HEAD_SIZE)}


@dataclass
class Candidate:
    """A configuration and what it compiles to. reasons: why it is dropped; empty if it is not."""

    config: dict
    registers: int
    shared_bytes: int
    matrix_instruction: str
    ctas_per_sm: int  # the most that fit
    reasons: list[str]

    def variants(self) -> list[dict]:
        """Return the configuration with each number of CTAs per SM worth timing, the most that fit first."""
        if "ctas_per_sm" not in self.config:
            return [self.config]
        counts = sorted({self.ctas_per_sm, *(n for n in (1, 2, 4) if n < self.ctas_per_sm)}, reverse=True)
        return [self.config | {"ctas_per_sm": count} for count in counts]


def width_of(dtype: str) -> str:
    """Return the operand width in bits ("16" or "32"), the key of a dtype's entries in a file."""
    return str(8 * DTYPES[dtype].itemsize)


def size_of(operation: str, model: Model, tokens: int) -> int:
    """Return the size by which an operation's entry is chosen."""
    if operation == "attention":
        return model.width // model.num_heads
    return model.width if operation == "linear_residual_layer_norm" else tokens


def with_config(table: dict, operation: str, width: str, config: dict | None) -> dict:
    """Return the table with this configuration of an operation for all sizes, or with no entry for None.

    Entries that would be used instead are removed: one launch in place of two, attention of short sequences.
    """
    entries = [] if config is None else [{"up_to": None, "config": config}]
    instead = {"linear_residual": "linear_residual_layer_norm", "attention": "attention_short"}.get(operation)
    return table | ({instead: {width: []}} if instead else {}) | {operation: {width: entries}}


def grid(operation: str, chip: Chip, itemsize: int) -> list[dict]:
    """Return the configurations worth compiling for operands of `itemsize` bytes, with one CTA per SM.

    Tiles have 8 to 128 accumulators a thread, 64 to 512 bytes of K and as many stages as fit into shared memory. They
    are loaded by TMA wherever the chip has it. All epilogues are tried for large tiles only, where they take long.
    """
    instruction = chip.matrix_instruction if itemsize == 2 else chip.matrix_instruction_fp32
    # wgmma and tcgen05 need 64 rows. Smaller tiles use another instruction, which sums in another order.
    rows = (64, 128) if instruction in ("HGMMA", "tcgen05") else (16, 32, 64, 128)
    stages = (2, 3, 4, 5, 6) if chip.target.backend == "cuda" else (1, 2, 3)
    if operation == "attention":
        keys = keys_of(operation)
        return [dict(zip(keys, values, strict=True)) for values in product(rows, (32, 64, 128), (4, 8), (1, *stages))]
    tiles = 3 if operation == "linear_residual_layer_norm" else 1  # side by side
    found = []
    for values in product(rows, (128,) if tiles > 1 else (16, 32, 64, 128, 256), (32, 64, 128, 256), (4, 8), stages):
        block_m, block_n, block_k, num_warps, num_stages = values
        accumulators = tiles * block_m * block_n // (32 * num_warps)
        shared_bytes = num_stages * (block_m + tiles * block_n) * block_k * itemsize
        if 8 <= accumulators <= 128 and 64 <= block_k * itemsize <= 512 and shared_bytes <= chip.program_shared_bytes:
            config = dict(zip(MAIN_LOOP, (*values, 1, _has_tma(chip)), strict=True))
            found += [config] if tiles > 1 else [config | epilogue for epilogue in _epilogues(operation, config)]
    return found


def _epilogues(operation: str, config: dict) -> list[dict]:
    """Return the epilogues worth compiling for a tile. Stores by TMA need loads by TMA.

    With a residual, a tile of 128 columns is always halved: as a whole it needs the registers of a second CTA.
    """
    keys = [key for key in keys_of(operation) if key not in config]
    halved = operation == "linear_residual" and config["BLOCK_N"] >= 128
    if config["BLOCK_M"] * config["BLOCK_N"] < 128 * 128:
        return [dict(zip(keys, (False, halved, False), strict=True))]
    halves, by = (True,) if halved else (False, True), (False, True) if config["descriptors"] else (False,)
    return [dict(zip(keys, values, strict=True)) for values in product((False, True), halves, by)]


def _has_tma(chip: Chip) -> bool:
    return chip.target.backend == "cuda" and chip.target.arch >= 90


def examine(
    target: str, dtypes: Iterable[str], operation: str, models: Iterable[str], configs: list[dict]
) -> list[Candidate]:
    """Compile each configuration for everything that the operation launches in these models."""
    chip, found = CHIPS[target], []
    with compiling_for(chip.target) as launches:
        for config in configs:
            compiled = {}
            for dtype, model in product(dtypes, models):
                with configured_by(with_config({}, operation, width_of(dtype), config)):
                    for _, launcher, call in calls(ALL_MODELS[model], 8, 128, DTYPES[dtype]):
                        if launcher == LAUNCHERS.get(operation, operation):
                            launches.clear()
                            call()
                            compiled |= {launch: dtype for launch in launches if "PRECISION" in launch.config}
            found.append(_candidate(config, compiled, chip))
    return found


def _candidate(config: dict, compiled: dict, chip: Chip) -> Candidate:
    reasons = [reason for launch, dtype in compiled.items() for reason in failures(launch, chip, dtype)]
    resources = [launch.resources for launch in compiled if launch.resources]
    if not resources:
        return Candidate(config, 0, 0, "none", 0, reasons)
    return Candidate(
        config,
        max(found.registers for found in resources),
        max(found.shared_bytes for found in resources),
        resources[0].matrix_instruction,
        min(found.ctas_per_sm(chip) for found in resources),
        list(dict.fromkeys(reasons)),
    )
