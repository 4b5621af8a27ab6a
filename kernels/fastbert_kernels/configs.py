"""Launch configurations: the files that hold them, the rules for these files, and the choice for a launch.

A file has a "source", which says where its choices come from, and a list of entries {"up_to": size, "config": {...}}
for each operation and operand width in bits ("16", "32"). A launch uses the first entry whose `up_to` is not below its
size; null means any size. A config has the fields of `GemmConfig` or `AttentionConfig`. The tuner adds the device, the
versions and the "measured_us" of entries. An entry may have its own "source".

The file is the one that FASTBERT_CONFIGS names, if it is set. Otherwise it is the first that exists of
`configs/<device>.json`, `configs/<architecture>.json` and `configs/default.json`.
"""

import functools
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch

from fastbert_kernels.launch import forget_launches, forgotten_with_launches
from fastbert_kernels.limits import MAX_HEAD_SIZE
from fastbert_kernels.operands import TensorSpec
from fastbert_kernels.target import architecture

logger = logging.getLogger("fastbert_kernels")

FOLDER = Path(__file__).parent / "configs"
WIDTHS = ("16", "32")
# Optional keys of a file: how it was measured. "bits": "measured" states that all entries gave bitwise equal rows.
PROVENANCE = ("device", "architecture", "commit", "torch", "triton", "date", "bits")


class _Config:
    def __post_init__(self):
        """Raise ValueError for an invalid value."""
        for field in fields(self):
            value = getattr(self, field.name)
            if problem := _problem(field.name, value):
                raise ValueError(f"{field.name} is {value!r}, expected {problem}")


@dataclass(frozen=True)
class GemmConfig(_Config):
    """The configuration of a persistent GEMM, x [M, K] times W^T [K, N], with output tiles [BLOCK_M, BLOCK_N].

    descriptors: load tiles through TMA descriptors. The last three configure the epilogue, and
    `linear_residual_layer_norm` does not have them. flatten: merge the loops over tiles and over K, so that a tile's
    first loads overlap the epilogue of the tile before. halves: finish one half of a tile's columns after the other.
    store_descriptor: store through a TMA descriptor.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int
    descriptors: bool
    flatten: bool = False
    halves: bool = False
    store_descriptor: bool = False


@dataclass(frozen=True)
class AttentionConfig(_Config):
    """The configuration of attention. A program has BLOCK_M queries and reads BLOCK_N keys at a time.

    In the second launch of the backward it has BLOCK_M keys and reads BLOCK_N queries at a time.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


CONFIGS = {
    "qkv_projection": GemmConfig,
    "linear_activation": GemmConfig,
    "linear_residual": GemmConfig,
    "linear_residual_layer_norm": GemmConfig,
    "attention": AttentionConfig,
    "attention_short": AttentionConfig,
    "attention_backward": AttentionConfig,
}


def keys_of(operation: str) -> tuple[str, ...]:
    """Return the keys of an operation's configurations in a file."""
    own_epilogue = operation == "linear_residual_layer_norm"
    return tuple(field.name for field in fields(CONFIGS[operation]) if field.default is MISSING or not own_epilogue)


def path_of(name: str) -> Path:
    """Return the path for an architecture ("sm_90") or a device ("NVIDIA H200": nvidia-h200.json)."""
    return FOLDER / f"{re.sub('[^a-z0-9_]+', '-', name.lower()).strip('-')}.json"


def shipped(name: str) -> Path:
    """Return the shipped file for a device or an architecture: its own, else default.json.

    Later architectures of the families sm_9x and sm_10x use the files of sm_90 and sm_100.
    """
    family = re.sub(r"^sm_(9|10)\d$", r"sm_\g<1>0", name)
    return next((path for path in map(path_of, (name, family)) if path.exists()), path_of("default"))


def read(path: Path) -> dict:
    """Read a file without checks. Raises ValueError, with the path, if it cannot be read or is no JSON object."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"launch configurations {path}: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"launch configurations {path}: expected a JSON object, not {type(document).__name__}")
    return document


def operations(document: dict) -> dict:
    """Return the part of a file that launches read: operation -> operand width -> entries."""
    return {operation: document[operation] for operation in CONFIGS}


def check(document: dict, path: Path) -> dict:
    """Return the document if it is valid. Raises ValueError with path, operation and field otherwise.

    It checks the conditions of batch invariance that show in a file. Operations configured by tokens have the same
    BLOCK_K in all entries, except for 16 bits in a device's file with "bits": "measured". Their BLOCK_M is below 64 in
    all entries or in none: wgmma and tcgen05 need 64 rows, and smaller blocks use another matrix instruction.
    attention_short obeys `same_summation_order`. Tests and the tuner compare the results of the compiled kernels.
    """

    def fail(place: str, problem: str) -> None:
        raise ValueError(f"launch configurations {path}: {place}{problem}")

    def check_keys(place: str, found: object, needed: tuple[str, ...], allowed: tuple[str, ...] = ()) -> None:
        if not isinstance(found, dict):
            fail(place, f"expected an object, not {found!r}")
        for key in needed:
            if key not in found:
                fail(place, f"{key!r} is missing")
        for key in found:
            if key not in (*needed, *allowed):
                fail(place, f"{key!r} is unknown; known are {', '.join((*needed, *allowed))}")

    check_keys("", document, ("source", *CONFIGS), PROVENANCE)
    if "bits" in document and document["bits"] != "measured":
        fail("", f"bits is {document['bits']!r}, expected 'measured' or nothing")
    if "bits" in document and "device" not in document:
        fail("", "'bits' needs 'device', the name of the measured GPU")
    for operation, kind in CONFIGS.items():
        check_keys(f"{operation}: ", document[operation], WIDTHS)
        for width, entries in document[operation].items():
            place = f"{operation}, {width} bits: "
            if not isinstance(entries, list):
                fail(place, f"expected a list of entries, not {entries!r}")
            for number, entry in enumerate(entries):
                at = f"{operation}, {width} bits, entry {number}: "
                check_keys(at, entry, ("up_to", "config"), ("measured_us", "source"))
                if entry["up_to"] is not None and not _is_count(entry["up_to"]):
                    fail(at, f"up_to is {entry['up_to']!r}, expected a positive integer or null")
                check_keys(at, entry["config"], keys_of(operation))
                try:
                    kind(**entry["config"])
                except ValueError as error:
                    fail(at, str(error))
            one_order = width == "32" or "bits" not in document
            if problem := _problem_of_entries(operation, entries, one_order):
                fail(place, problem)
    for width in WIDTHS:
        if not same_summation_order(document["attention"][width], document["attention_short"][width]):
            fail(
                f"attention_short, {width} bits: ",
                "BLOCK_N, the rows a warp or the use of wgmma differ from attention's: a row's result would depend on "
                "its batch",
            )
    return document


def limit_of(up_to: int | None) -> float:
    return math.inf if up_to is None else up_to


def entry_for(entries: list[dict], size: int | None) -> dict | None:
    """Return the first entry whose `up_to` is not below a size. None as size stands for the largest sizes."""
    return next((entry for entry in entries if limit_of(size) <= limit_of(entry["up_to"])), None)


def same_summation_order(attention: list[dict], short: list[dict]) -> bool:
    """Return True if attention_short can sum in the order of attention for every head size that both have.

    Both need the same BLOCK_N, the same number of rows a warp, and a BLOCK_M that allows wgmma in both or in neither.
    """

    def order(entry: dict) -> tuple[int, float, bool]:
        config = entry["config"]
        return config["BLOCK_N"], config["BLOCK_M"] / config["num_warps"], _fills_wgmma(config["BLOCK_M"])

    limits = {entry["up_to"] for entry in (*attention, *short)}
    pairs = ((entry_for(short, limit), entry_for(attention, limit)) for limit in limits)
    return all(order(brief) == order(every) for brief, every in pairs if brief)


def _fills_wgmma(rows: int) -> bool:
    """Return True if wgmma and tcgen05 can be used. Another instruction would sum in another order."""
    return rows >= 64


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _problem(key: str, value: object) -> str | None:
    """Return what a value should be instead, or None if it is valid."""
    if key in ("descriptors", "flatten", "halves", "store_descriptor"):
        return None if isinstance(value, bool) else "true or false"
    if not _is_count(value):
        return "a positive integer"
    power_of_two = value & (value - 1) == 0
    if key.startswith("BLOCK_"):
        return None if power_of_two and value >= 16 else "a power of two from 16 on"
    return "a power of two up to 32" if key == "num_warps" and not (power_of_two and value <= 32) else None


def _problem_of_entries(operation: str, entries: list[dict], one_order: bool) -> str | None:
    """Return why entries cannot be used together, or None. one_order: they must have the same BLOCK_K."""
    limits = [limit_of(entry["up_to"]) for entry in entries]
    if limits != sorted(set(limits)):
        return f"up_to has to grow from entry to entry, not {[entry['up_to'] for entry in entries]}"
    if operation.startswith("attention"):
        if operation != "attention_short" and limits[-1:] != [MAX_HEAD_SIZE]:
            return f"the last up_to has to be {MAX_HEAD_SIZE}, the largest head size"
        if limits and limits[-1] > MAX_HEAD_SIZE:
            return f"the last up_to is {entries[-1]['up_to']}, above the largest head size, {MAX_HEAD_SIZE}"
        return None
    blocks = sorted({entry["config"]["BLOCK_K"] for entry in entries})
    if one_order and len(blocks) > 1:
        return f"entries differ in BLOCK_K, {blocks}: a row's result would depend on its batch"
    if operation == "linear_residual_layer_norm":
        for entry, limit in zip(entries, limits, strict=True):
            if limit > 3 * entry["config"]["BLOCK_N"]:
                return f"up_to is {entry['up_to']}, above three times BLOCK_N = {entry['config']['BLOCK_N']}"
        return None
    if limits[-1:] != [math.inf]:
        return "the last up_to has to be null, for any number of tokens"
    rows = sorted({entry["config"]["BLOCK_M"] for entry in entries})
    if _fills_wgmma(rows[0]) != _fills_wgmma(rows[-1]):
        return f"BLOCK_M is below 64 in some entries only, {rows}: a row's result would depend on its batch"
    return None


def write(document: dict, path: Path) -> None:
    """Write one entry a line and replace the file atomically, so that a killed run leaves the previous one."""
    check(document, path)
    parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items() if key not in CONFIGS]
    for operation in CONFIGS:
        widths = []
        for width, entries in document[operation].items():
            lines = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
            widths.append(f'    "{width}": [\n{lines}\n    ]' if entries else f'    "{width}": []')
        parts.append(f"  {json.dumps(operation)}: {{\n" + ",\n".join(widths) + "\n  }")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(unfinished, path)


def name_for(device: torch.device) -> str:
    """Return the name of a device's launch configurations: its own if it has a file, else its architecture."""
    return _name_for_gpu(device) if device.type == "cuda" else architecture(device)


@functools.cache
def _name_for_gpu(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device)
    return name if path_of(name).exists() else architecture(device)


def file_for(name: str) -> Path:
    """Return the file for a device or an architecture: the one that FASTBERT_CONFIGS names, else a shipped one."""
    own = os.environ.get("FASTBERT_CONFIGS")
    return Path(own) if own else shipped(name)


@functools.cache
def table_for(name: str) -> dict:
    """Return the launch configurations for a device or an architecture: operation -> operand width -> entries.

    Warns once for each name that falls back to default.json. Raises ValueError for a user's file that is invalid or
    was measured on another GPU.
    """
    path = file_for(name)
    if path == path_of("default"):
        logger.warning("no launch configurations for %s: using %s, which is not tuned for it", name, path)
    document = read(path)
    if path.parent != FOLDER:  # shipped files are checked by the tests and are used on their device only
        check(document, path)
        _check_devices(document, path)
    return operations(document)


def _check_devices(document: dict, path: Path) -> None:
    """Raise ValueError if a user's file with "bits": "measured" would be used on a GPU other than the measured one."""
    if "bits" not in document:
        return
    for device in range(torch.cuda.device_count()):
        if (name := torch.cuda.get_device_name(device)) != document["device"]:
            raise ValueError(
                f"launch configurations {path}: bitwise equality was measured on {document['device']}, but this "
                f"process has {name}, where a row's result could depend on its batch: hide that GPU with "
                "CUDA_VISIBLE_DEVICES"
            )


@contextmanager
def configured_by(table: dict) -> Iterator[None]:
    """Use this table, in the form that `table_for` returns, for every launch of all threads inside the context."""
    global table_for
    before, table_for = table_for, lambda name: table
    forget_launches()
    try:
        yield
    finally:
        table_for = before
        forget_launches()


@functools.cache
def _entries(operation: str, name: str, itemsize: int) -> tuple[tuple[float, GemmConfig | AttentionConfig], ...]:
    entries = table_for(name)[operation]["32" if itemsize == 4 else "16"]
    return tuple((limit_of(entry["up_to"]), CONFIGS[operation](**entry["config"])) for entry in entries)


forgotten_with_launches(_entries.cache_clear)


def choose(operation: str, x: TensorSpec, size: int) -> GemmConfig | AttentionConfig | None:
    """Return the configuration of an operation on tensors like x, or None if the size is above every `up_to`."""
    for reached, config in _entries(operation, name_for(x.device), x.dtype.itemsize):
        if size <= reached:
            return config
    return None
