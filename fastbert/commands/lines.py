"""The input of `fastbert encode`: UTF-8 lines. Each is a text, or a JSON object with the text in a field."""

import codecs
import hashlib
import json
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

# Maximum lines and bytes of a block, which a killed run must repeat. A longer line is read as a whole.
BLOCK_LINES, CPU_BLOCK_LINES = 16384, 512
BLOCK_BYTES = 4 << 20
CHECKED_LINES = 4096  # at least one of the first lines must be a text


def state_of(source: Path) -> tuple[int, int]:
    """The size and the modification time of a file in nanoseconds, which change when it is written to."""
    found = source.stat()
    return found.st_size, found.st_mtime_ns


def count_and_hash(source: Path) -> tuple[int, str]:
    """The number of lines of a file, and a hash of its contents."""
    lines, last, digest = 0, b"\n", hashlib.sha256()
    with source.open("rb") as file:
        while chunk := file.read(1 << 20):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
            digest.update(chunk)
    return lines + (last != b"\n"), f"{digest.hexdigest()} of {source.stat().st_size} bytes"


def check_source(source: Path, field: str | None) -> None:
    """Raise OSError if the input is not a file, and ValueError with the reason if no line at its beginning is a text.

    The number of checked lines depends on the input alone, so that a run can be continued on another device.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is no input file {source}")
    if not source.is_file():
        raise OSError(f"{source} is a folder or a pipe, not a file")
    with source.open("rb") as file:
        lines = read_lines(file, CHECKED_LINES)
    reasons = []
    for line in lines:
        try:
            text_of(line, field)
            return
        except ValueError as error:
            reasons.append(str(error))
    if not lines:
        return
    why = f"line 1: {reasons[0]}"
    if field is not None:
        for number, line in enumerate(lines, 1):
            with suppress(ValueError):
                fields = ", ".join(map(repr, _record(_decoded(line))))
                why = f"line {number}: {reasons[number - 1]} (its fields are {textwrap.shorten(fields, 500)})"
                break
    raise ValueError(f"{source}: none of the first {len(lines):,} lines is a text; {why}")


def read_lines(file: BinaryIO, block_lines: int) -> list[bytes]:
    """Read the next block_lines lines, or fewer if they reach BLOCK_BYTES; none at the end of the file.

    Line ends are kept. A BOM at the beginning of the file is removed.
    """
    lines: list[bytes] = []
    length, start = 0, file.tell()
    while len(lines) < block_lines and length < BLOCK_BYTES and (line := file.readline()):
        lines.append(line)
        length += len(line)
    if start == 0 and lines:
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
    return lines


def text_of(line: bytes, field: str | None) -> str:
    """The text of a line. Raises ValueError with the reason if there is none."""
    text = _decoded(line)
    if field is None:
        return text
    record = _record(text)
    if field not in record:
        raise ValueError(f"no field {field!r}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field!r} holds half a surrogate pair") from None
    return text


def _decoded(line: bytes) -> str:
    if line.endswith(b"\n"):
        line = line[:-1].removesuffix(b"\r")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from None


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (RecursionError, ValueError) as error:  # json.loads recurses, and raises ValueError for long numbers
        raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record
