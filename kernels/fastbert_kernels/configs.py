"""Launch configurations: the files that hold them, the rules they obey, and which one serves a launch.

A file says in "source" where its choices come from and has, for each operation and operand width in bits ("16", "32"),
entries {"up_to": size, "config": {...}}: the first whose `up_to` reaches the size serves, null has no end. A config has
the fields of `GemmConfig` or `AttentionConfig`. The tuner adds the device, the versions and each entry's "measured_us";
an entry may have a "source" of its own.

The first file that there is serves: the user's own, which FASTBERT_CONFIGS names, `configs/<device>.json`,
`configs/<architecture>.json`, `configs/default.json`.
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
# What a file may say beside "source": where and with what it was measured, and whether its bits were.
PROVENANCE = ("device", "architecture", "commit", "torch", "triton", "date", "bits")


class _Config:
    def __post_init__(self):
        """Raise ValueError for a value that no launch can use."""
        for field in fields(self):
            value = getattr(self, field.name)
            if problem := _problem(field.name, value):
                raise ValueError(f"{field.name} is {value!r}, expected {problem}")


@dataclass(frozen=True)
class GemmConfig(_Config):
    """How a persistent launch computes x [M, K] times W^T [K, N], a tile [BLOCK_M, BLOCK_N] at a time.

    descriptors: tiles come in through TMA descriptors. The last three are of the epilogue, which
    `linear_residual_layer_norm` does not choose. flatten: the loops over tiles and over K are one, so that a tile's
    first loads run under the epilogue before it. halves: the epilogue takes one half of a tile's columns after the
    other. store_descriptor: it stores through a TMA descriptor.
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
    """A program of attention takes BLOCK_M queries, and BLOCK_N keys at a time."""

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
}


def keys_of(operation: str) -> tuple[str, ...]:
    """The keys of an operation's configurations in a file."""
    own_epilogue = operation == "linear_residual_layer_norm"
    return tuple(field.name for field in fields(CONFIGS[operation]) if field.default is MISSING or not own_epilogue)


def path_of(name: str) -> Path:
    """The file of an architecture ("sm_90") or of a device ("NVIDIA H200": nvidia-h200.json)."""
    return FOLDER / f"{re.sub('[^a-z0-9_]+', '-', name.lower()).strip('-')}.json"


def shipped(name: str) -> Path:
    """The file that serves a device or an architecture: its own, that of its family's first from sm_90 on, or
    default.json."""
    family = re.sub(r"^sm_(9|10)\d$", r"sm_\g<1>0", name)
    return next((path for path in map(path_of, (name, family)) if path.exists()), path_of("default"))


def read(path: Path) -> dict:
    """A file as it stands. Raises ValueError, with the path, for one that cannot be read or is no JSON object."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"launch configurations {path}: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"launch configurations {path}: expected a JSON object, not {type(document).__name__}")
    return document


def operations(document: dict) -> dict:
    """The part of a file that launches read."""
    return {operation: document[operation] for operation in CONFIGS}


def check(document: dict, path: Path) -> dict:
    """The document itself, if every launch can use it: ValueError with path, operation and field otherwise.

    Of batch invariance it checks what a file alone can tell: operations chosen by tokens have one BLOCK_K, but for 16
    bits in a device's file that says "bits": "measured", where equal bits of all entries were seen on that device; and
    BLOCK_M is below 64 in all of their entries or in none (wgmma and tcgen05 take 64 rows, so smaller blocks take
    another matrix instruction; a file may serve any architecture); short sequences as `keeps_bits` says. What the
    compiler makes of the configurations is for tests and the tuner to compare.
    """

    def refuse(place: str, problem: str) -> None:
        raise ValueError(f"launch configurations {path}: {place}{problem}")

    def check_keys(place: str, found: object, needed: tuple[str, ...], allowed: tuple[str, ...] = ()) -> None:
        if not isinstance(found, dict):
            refuse(place, f"expected an object, not {found!r}")
        for key in needed:
            if key not in found:
                refuse(place, f"{key!r} is missing")
        for key in found:
            if key not in (*needed, *allowed):
                refuse(place, f"{key!r} is unknown; known are {', '.join((*needed, *allowed))}")

    check_keys("", document, ("source", *CONFIGS), PROVENANCE)
    if "bits" in document and document["bits"] != "measured":
        refuse("", f"bits is {document['bits']!r}, expected 'measured' or nothing")
    if "bits" in document and "device" not in document:
        refuse("", "bits are measured on a device, and 'device' is missing")
    for operation, kind in CONFIGS.items():
        check_keys(f"{operation}: ", document[operation], WIDTHS)
        for width, entries in document[operation].items():
            place = f"{operation}, {width} bits: "
            if not isinstance(entries, list):
                refuse(place, f"expected a list of entries, not {entries!r}")
            for number, entry in enumerate(entries):
                at = f"{operation}, {width} bits, entry {number}: "
                check_keys(at, entry, ("up_to", "config"), ("measured_us", "source"))
                if entry["up_to"] is not None and not _is_count(entry["up_to"]):
                    refuse(at, f"up_to is {entry['up_to']!r}, expected a positive integer or null")
                check_keys(at, entry["config"], keys_of(operation))
                try:
                    kind(**entry["config"])
                except ValueError as error:
                    refuse(at, str(error))
            one_order = width == "32" or "bits" not in document
            if problem := _problem_of_entries(operation, entries, one_order):
                refuse(place, problem)
    for width in WIDTHS:
        if not keeps_bits(document["attention"][width], document["attention_short"][width]):
            refuse(
                f"attention_short, {width} bits: ",
                "BLOCK_N, the rows a warp or 64 rows for wgmma are not those of attention: a row's bits would "
                "depend on its batch",
            )
    return document


def reach(up_to: int | None) -> float:
    return math.inf if up_to is None else up_to


def serving(entries: list[dict], size: int | None) -> dict | None:
    """The first entry that reaches a size; None: any size."""
    return next((entry for entry in entries if reach(size) <= reach(entry["up_to"])), None)


def keeps_bits(attention: list[dict], short: list[dict]) -> bool:
    """Whether entries for short sequences may sum in the order of those for all, wherever both serve a head size:
    blocks of as many keys, as many rows a warp, and 64 rows for wgmma in both or in neither."""

    def order(entry: dict) -> tuple[int, float, bool]:
        config = entry["config"]
        return config["BLOCK_N"], config["BLOCK_M"] / config["num_warps"], _fills_wgmma(config["BLOCK_M"])

    limits = {entry["up_to"] for entry in (*attention, *short)}
    pairs = ((serving(short, limit), serving(attention, limit)) for limit in limits)
    return all(order(brief) == order(every) for brief, every in pairs if brief)


def _fills_wgmma(rows: int) -> bool:
    """Whether so many rows are enough for wgmma and tcgen05; with fewer, another instruction sums in another order."""
    return rows >= 64


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _problem(key: str, value: object) -> str | None:
    """What a value should be instead."""
    if key in ("descriptors", "flatten", "halves", "store_descriptor"):
        return None if isinstance(value, bool) else "true or false"
    if not _is_count(value):
        return "a positive integer"
    power_of_two = value & (value - 1) == 0
    if key.startswith("BLOCK_"):
        return None if power_of_two and value >= 16 else "a power of two from 16 on"
    return "a power of two up to 32" if key == "num_warps" and not (power_of_two and value <= 32) else None


def _problem_of_entries(operation: str, entries: list[dict], one_order: bool) -> str | None:
    """What is wrong with entries together; one_order: they have to sum over K in the same blocks."""
    limits = [reach(entry["up_to"]) for entry in entries]
    if limits != sorted(set(limits)):
        return f"up_to has to grow from entry to entry, not {[entry['up_to'] for entry in entries]}"
    if operation.startswith("attention"):
        if operation == "attention" and limits[-1:] != [MAX_HEAD_SIZE]:
            return f"the last up_to has to be {MAX_HEAD_SIZE}, the largest head size"
        if limits and limits[-1] > MAX_HEAD_SIZE:
            return f"no head size is above {MAX_HEAD_SIZE}: the last up_to is {entries[-1]['up_to']}"
        return None
    blocks = sorted({entry["config"]["BLOCK_K"] for entry in entries})
    if one_order and len(blocks) > 1:
        return f"entries differ in BLOCK_K, {blocks}: a row's bits would depend on its batch"
    if operation == "linear_residual_layer_norm":
        for entry, limit in zip(entries, limits, strict=True):
            if limit > 3 * entry["config"]["BLOCK_N"]:
                return f"rows up to {entry['up_to']} do not fit three times BLOCK_N = {entry['config']['BLOCK_N']}"
        return None
    if limits[-1:] != [math.inf]:
        return "the last up_to has to be null: any number of tokens is served"
    rows = sorted({entry["config"]["BLOCK_M"] for entry in entries})
    if _fills_wgmma(rows[0]) != _fills_wgmma(rows[-1]):
        return f"BLOCK_M is below 64 and not, {rows}: matrix instructions and a row's bits would depend on its batch"
    return None


def write(document: dict, path: Path) -> None:
    """Replace the file as a whole, an entry a line: a run that is killed leaves the last whole one."""
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
    """What a device's launch configurations are called: its own name if it has a file, else its architecture."""
    return _name_for_gpu(device) if device.type == "cuda" else architecture(device)


@functools.cache
def _name_for_gpu(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device)
    return name if path_of(name).exists() else architecture(device)


def file_for(name: str) -> Path:
    """The file that serves a device or an architecture: a user's own, under every name, or the one that is shipped."""
    own = os.environ.get("FASTBERT_CONFIGS")
    return Path(own) if own else shipped(name)


@functools.cache
def table_for(name: str) -> dict:
    """The launch configurations that serve a device or an architecture: operation -> operand width -> entries.

    Warns once of each name that has none of its own, which default.json serves. Raises ValueError for a user's file
    that is wrong or was measured on another GPU.
    """
    path = file_for(name)
    if path == path_of("default"):
        logger.warning("no launch configurations for %s: using %s, which nobody has tuned for it", name, path)
    document = read(path)
    if path.parent != FOLDER:  # what is shipped is checked by the tests, and serves its device alone
        check(document, path)
        _check_devices(document, path)
    return operations(document)


def _check_devices(document: dict, path: Path) -> None:
    """Raise ValueError for a user's file that serves a GPU beside the one on which its bits were measured."""
    if "bits" not in document:
        return
    for device in range(torch.cuda.device_count()):
        if (name := torch.cuda.get_device_name(device)) != document["device"]:
            raise ValueError(
                f"launch configurations {path}: bits were measured on {document['device']}, and this process has "
                f"{name}, on which a row's bits could depend on its batch"
            )


@contextmanager
def configured_by(table: dict) -> Iterator[None]:
    """Every launch, of all threads, takes its configuration from this table, which is one as `table_for` returns."""
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
    return tuple((reach(entry["up_to"]), CONFIGS[operation](**entry["config"])) for entry in entries)


forgotten_with_launches(_entries.cache_clear)


def choose(operation: str, x: TensorSpec, size: int) -> GemmConfig | AttentionConfig | None:
    """The launch configuration of an operation on tensors like x; None if no entry reaches the size."""
    for reached, config in _entries(operation, name_for(x.device), x.dtype.itemsize):
        if size <= reached:
            return config
    return None
