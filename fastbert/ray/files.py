"""The files of a corpus: the input, and a folder of Parquet files that is written part by part.

Each input file becomes a folder with a Parquet file for each part of the same number of rows, in the order of the rows.
A part is complete once it has its name, which tells its rows. An input file is finished once it has a part with fewer
rows, its last one, and all before it. So names alone tell what a killed run has left, and a part that is made twice
replaces itself.

Ray's tasks import this module. So it imports neither torch nor Ray.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from fastbert.ray.inputs import ERROR, VECTOR, Source, parts

# What the output was made from, for a run that continues it. Readers of Parquet folders ignore files with this prefix.
MANIFEST = "_fastbert.json"
NAME = re.compile(r"(\d+)-(\d+)\.parquet")


@dataclass(frozen=True)
class Contents:
    """What an output holds: vectors [rows, dim], of which `bad` are null. reported: "file, row N: reason" for the first
    of these."""

    files: int
    rows: int
    bad: int
    reported: list[str]
    dim: int
    dtype: str


def nested(values: pa.Array) -> pa.Array:
    """A list array with one list, of these values."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


def _is_partial(found: fs.FileInfo) -> bool:
    """Whether a file has no name of its own yet."""
    return found.base_name.startswith(".") and found.base_name.endswith(".partial")


class Corpus:
    """The input files and the output folder."""

    def __init__(self, sources: list[Source], filesystem: fs.FileSystem, path: str, field: str | None, rows: int):
        self._filesystem, self._path, self._field, self._rows = filesystem, path, field, rows
        if rows < 1:
            raise ValueError(f"part_rows={rows}: it must be at least 1")
        # A pattern may find what an earlier run has written.
        self.sources = [x for x in sources if x.filesystem != filesystem or not x.path.startswith(f"{path}/")]
        if not self.sources:
            raise ValueError(f"all input lies in the output folder {path}: give another -o")
        found = filesystem.get_file_info(path)
        if found.type == fs.FileType.File:
            raise NotADirectoryError(f"{path} is a file: name a folder, such as -o vectors/")

    def check_first_file(self) -> None:
        """Raise ValueError with the reason if the first part of the first file holds no text."""
        first = next(parts(self.sources[0], self._field, self._rows))
        if first.reasons and not any(text is not None for text in first.texts):
            row, reason = next(iter(first.reasons.items()))
            raise ValueError(
                f"{self.sources[0].path}: none of the first {len(first.texts):,} rows is a text; row {row}: {reason}"
            )

    def begin(self, made_from: dict) -> list[tuple[int, list[int]]]:
        """Create or continue the output. Returns the index of each input file that is not finished, with the first rows
        of its parts that exist. Raises ValueError if the output was made from something else."""
        existing = self._existing()
        manifest = made_from | {"inputs": {each.name: [each.path, *each.state] for each in self.sources}}
        path = f"{self._path}/{MANIFEST}"
        if self._filesystem.get_file_info(path).type == fs.FileType.File:
            with self._filesystem.open_input_stream(path) as file:
                earlier = json.loads(file.read())
            differing = [name for name, value in made_from.items() if earlier.get(name) != value]
            if differing:
                raise ValueError(
                    f"{self._path} was made with another {' and another '.join(differing)}: give another -o"
                )
            for name, state in manifest["inputs"].items():
                if name in existing and earlier["inputs"].get(name) != state:
                    raise ValueError(
                        f"{name} is another file than when {self._path}/{name} was made, or has changed: delete that, "
                        "or give another -o"
                    )
            manifest["inputs"] = earlier["inputs"] | manifest["inputs"]
        elif any(not _is_partial(each) for each in self._listed()):
            raise FileExistsError(f"{self._path} holds other files: give another -o")
        self._filesystem.create_dir(self._path)
        self._save(path, json.dumps(manifest, indent=1).encode())
        todo = []
        for index, each in enumerate(self.sources):
            done = existing.get(each.name, {})
            last = max(done, default=0)
            if len(done) <= last // self._rows or done[last] - last == self._rows:
                todo.append((index, sorted(done)))
        return todo

    def _existing(self) -> dict[str, dict[int, int]]:
        """The parts of each input file by its name: the first row of each part, and the row after its last one."""
        found: dict[str, dict[int, int]] = {}
        for each in self._listed():
            folder, _, name = os.path.relpath(each.path, self._path).rpartition("/")
            if rows := NAME.fullmatch(name):
                found.setdefault(folder, {})[int(rows[1])] = int(rows[2])
        return found

    def _listed(self) -> list[fs.FileInfo]:
        return self._filesystem.get_file_info(fs.FileSelector(self._path, recursive=True, allow_not_found=True))

    def read(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Yield the missing parts of the file that a row names, each as one row."""
        ((index,), (done,)) = batch.to_pydict().values()
        source = self.sources[index]
        for part in parts(source, self._field, self._rows):
            if part.first not in done:
                yield pa.table(
                    {
                        "file": pa.array([index]),
                        "first": pa.array([part.first]),
                        "texts": nested(pa.array(part.texts, pa.large_string())),
                        "reasons": nested(pa.array(map(part.reasons.get, range(len(part.texts))), pa.string())),
                    }
                )

    def write(self, batch: pa.Table) -> pa.Table:
        """Write a part, and return the number of its rows."""
        (index,), (first,) = batch["file"].to_pylist(), batch["first"].to_pylist()
        source = self.sources[index]
        vectors, errors = (batch[name].combine_chunks().flatten() for name in (VECTOR, ERROR))
        rows = pa.array(range(first, first + len(vectors)), pa.int64())
        names = pa.array([source.name] * len(vectors), pa.string())
        table = pa.table({"file": names, "row": rows, VECTOR: vectors, ERROR: errors})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        source.check_state()
        folder = f"{self._path}/{source.name}"
        self._filesystem.create_dir(folder)
        self._save(f"{folder}/{first:012}-{first + len(vectors):012}.parquet", sink.getvalue())
        return pa.table({"rows": [len(vectors)]})

    def _save(self, path: str, content: bytes | pa.Buffer) -> None:
        """Write a file that is complete once it has its name, even if the process or the machine dies."""
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.partial"
        with self._filesystem.open_output_stream(temporary) as file:
            file.write(content)
        if isinstance(self._filesystem, fs.LocalFileSystem):
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self._filesystem.move(temporary, path)

    def tidy(self) -> None:
        """Delete what killed runs have left of parts."""
        for each in self._listed():
            if _is_partial(each):
                self._filesystem.delete_file(each.path)

    def contents(self, limit: int) -> Contents:
        """What the output holds of all input files, read from itself. limit: of `reported`."""
        made = ds.dataset(
            [
                part.path
                for each in self.sources
                for part in self._filesystem.get_file_info(fs.FileSelector(f"{self._path}/{each.name}"))
            ],
            filesystem=self._filesystem,
            format="parquet",
        )
        failed = made.filter(pc.field(ERROR).is_valid())
        reported = failed.head(limit, columns=["file", "row", ERROR]).to_pylist()
        vectors = made.schema.field(VECTOR).type
        return Contents(
            files=len(self.sources),
            rows=made.count_rows(),
            bad=failed.count_rows(),
            reported=[f"{each['file']}, row {each['row']}: {each[ERROR]}" for each in reported],
            dim=vectors.list_size,
            dtype=vectors.value_type.to_pandas_dtype().__name__,
        )
