"""The input files of a corpus: found, and read in parts of a fixed number of rows.

Ray's tasks import this module. So it imports neither torch nor Ray.
"""

import codecs
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from fastbert.commands.lines import text_of

WILDCARDS = "*?["
PARQUET = ".parquet"
# The columns that are added to texts: a vector or null, and why it is null.
VECTOR, ERROR = "vector", "error"


@dataclass(frozen=True)
class Source:
    """An input file. path: in its filesystem. name: its path below the folder that holds all inputs. state: its size in
    bytes and its modification time in nanoseconds, which change when it is written to."""

    filesystem: fs.FileSystem
    path: str
    name: str
    state: tuple[int, int]

    def check_state(self) -> None:
        """Raise RuntimeError if the file has changed since it was found."""
        if _state(self.filesystem.get_file_info(self.path)) != self.state:
            raise RuntimeError(f"{self.path} changed while it was read: start again, with another -o")


@dataclass(frozen=True)
class Part:
    """Consecutive rows of an input file. first: the number of the first one, counted from 0. texts and reasons: as
    `Embed.vectors` takes them."""

    first: int
    texts: list[str | None]
    reasons: dict[int, str]


def resolve(place: str) -> tuple[fs.FileSystem, str]:
    """The filesystem and the path of a local path or a URI, such as s3://bucket/folder. A URI's path is taken as it is:
    nothing in it is encoded. Raises ValueError for an empty one, OSError for a URI that pyarrow cannot read."""
    if not place:
        raise ValueError("the path is empty")
    if "://" not in place:
        return fs.LocalFileSystem(), os.path.abspath(place)
    scheme, _, rest = place.partition("://")
    host, _, path = rest.partition("/")
    try:
        filesystem, root = fs.FileSystem.from_uri(f"{scheme}://{host}/")
    except pa.ArrowInvalid as error:
        raise OSError(f"{place}: {error}") from error
    return filesystem, f"{root.rstrip('/')}/{path}".rstrip("/")


def find(place: str) -> list[Source]:
    """The input files that a path, a folder or a pattern such as folder/*.parquet names, sorted by path.

    Of a folder, all files in it and below. Files and folders whose names begin with "." or "_" are left out, as readers
    of Parquet folders do. Raises OSError if there is no file, ValueError if the name of the only one begins so.
    """
    filesystem, path = resolve(place)
    found = filesystem.get_file_info(path)
    if found.type == fs.FileType.File:
        name = os.path.basename(path)
        if name[0] in "._":
            raise ValueError(f"{path}: readers of the output would ignore names that begin with {name[0]!r}: rename it")
        return [Source(filesystem, path, name, _state(found))]
    if found.type == fs.FileType.Directory:
        base, all_found = path, filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    else:
        wildcards = [path.find(each) for each in WILDCARDS if each in path]
        if not wildcards:
            raise FileNotFoundError(f"there is no file or folder {place}")
        base = os.path.dirname(path[: min(wildcards)])
        all_found = filesystem.get_file_info(ArrowFSWrapper(filesystem).glob(path))
    sources = []
    for found in sorted(all_found, key=lambda each: each.path):
        name = os.path.relpath(found.path, base)
        if found.type == fs.FileType.File and not any(each[0] in "._" for each in name.split("/")):
            sources.append(Source(filesystem, found.path, name, _state(found)))
    if not sources:
        raise FileNotFoundError(f"there is no input file {path}, or none whose name begins with neither . nor _")
    return sources


def _state(found: fs.FileInfo) -> tuple[int, int]:
    return found.size, found.mtime_ns


def parts(source: Source, field: str | None, rows: int) -> Iterator[Part]:
    """Read a file in parts of `rows` rows. The last part has fewer, perhaps none, so that a reader knows it.

    A Parquet file has the texts in the column `field`, "text" by default. Other files hold UTF-8 lines, as
    `fastbert encode` reads them: each is a text, or with `field` a JSON object. Compressed ones end with .gz, .bz2,
    .lz4 or .zst. Raises ValueError for a file that is not Parquet despite its name or has no such column, TypeError for
    a column that does not hold strings, and OSError if the file cannot be read.
    """
    read = _parquet_parts if source.path.endswith(PARQUET) else _line_parts
    first = size = 0
    try:
        for texts, reasons in read(source, field, rows):
            size = len(texts)
            yield Part(first, texts, reasons)
            first += size
    except (OSError, TypeError, ValueError) as error:
        kind = next(kind for kind in (OSError, TypeError, ValueError) if isinstance(error, kind))
        raise kind(f"{source.path}: {error}") from error
    if size == rows or not first:
        yield Part(first, [], {})


def _parquet_parts(source: Source, field: str | None, rows: int) -> Iterator[tuple[list, dict]]:
    column = field or "text"
    file = pq.ParquetFile(source.filesystem.open_input_file(source.path))
    check_column(file.schema_arrow, column)
    pending: list[pa.RecordBatch] = []
    count = 0
    for batch in file.iter_batches(rows, columns=[column]):
        while batch.num_rows:
            taken = batch.slice(0, rows - count)
            pending.append(taken)
            count += taken.num_rows
            batch = batch.slice(taken.num_rows)
            if count == rows:
                yield texts_of(pa.Table.from_batches(pending)[column])
                pending, count = [], 0
    if pending:
        yield texts_of(pa.Table.from_batches(pending)[column])


def _line_parts(source: Source, field: str | None, rows: int) -> Iterator[tuple[list, dict]]:
    # pyarrow decompresses by the file's name.
    with source.filesystem.open_input_stream(source.path) as stream:
        lines = io.BufferedReader(cast(io.RawIOBase, stream))
        is_first = True
        while found := list(islice(cast(BinaryIO, lines), rows)):
            if is_first:
                found[0] = found[0].removeprefix(codecs.BOM_UTF8)
                is_first = False
            texts: list[str | None] = []
            reasons = {}
            for row, line in enumerate(found):
                try:
                    texts.append(text_of(line, field))
                except ValueError as error:
                    texts.append(None)
                    reasons[row] = str(error)
            yield texts, reasons


def check_column(schema: pa.Schema, name: str) -> None:
    """Raise ValueError unless a table has one column of this name, and TypeError if it does not hold strings."""
    if name not in schema.names:
        raise ValueError(f"there is no column {name!r}, only {', '.join(map(repr, schema.names))}")
    if schema.names.count(name) > 1:
        raise ValueError(f"there are {schema.names.count(name)} columns {name!r}")
    kind = schema.field(name).type
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_kind(held) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise TypeError(f"column {name!r} holds {kind}, not strings")


def texts_of(column: pa.ChunkedArray) -> tuple[list[str | None], dict[int, str]]:
    """The texts of a column of strings, None where there is none, and by index the reason."""
    texts: list[str | None]
    reasons: dict[int, str] = {}
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check what it reads
        texts = []
        for row, encoded in enumerate(column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()):
            try:
                texts.append(None if encoded is None else encoded.decode())
            except UnicodeDecodeError as error:
                texts.append(None)
                reasons[row] = f"invalid UTF-8 at byte {error.start + 1}"
    for row, text in enumerate(texts):
        if text is None:
            reasons.setdefault(row, "it is null")
    return texts, reasons
