"""A file of vectors that is written block by block, and can be continued after the process was killed at any moment.

Until OUT is complete there are OUT.partial, which has OUT's size from the beginning, and OUT.progress.json, which tells
how many rows are written and what they were made from. Rows reach the disk before the progress that counts them.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError as error:
    raise ImportError(f"fastbert encode needs a POSIX system, for the lock on its output ({error})") from error

BAD_LINES = 1000  # number of bad lines whose numbers are kept
PARQUET = ".parquet"
ROW_GROUP = 16384  # rows


@dataclass
class Progress:
    """The contents of OUT.progress.json.

    fingerprint: what the rows are made from, by name. rows: the number of complete rows. offset: the byte offset of the
    next line in the input. bad: the number of rows that are NaN because their line is not a text. bad_lines: the
    numbers of the first BAD_LINES such lines, counted from 1.
    """

    fingerprint: dict[str, str | None]
    rows: int = 0
    offset: int = 0
    bad: int = 0
    bad_lines: list[int] = field(default_factory=list)

    @staticmethod
    def read(path: Path) -> "Progress | None":
        """Read the progress from a file; None if there is no file. Raises ValueError for other contents."""
        try:
            return Progress(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a progress file: delete it, or give another -o ({error})") from error

    def write(self, path: Path) -> None:
        """Replace the file atomically."""
        new = path.with_name(path.name + ".new")
        with new.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def resumable(path: Path) -> "ResumableNpy":
    """The output for a file name: Parquet if it ends with .parquet, else .npy. Raises ImportError without pyarrow."""
    return ResumableParquet(path) if path.suffix == PARQUET else ResumableNpy(path)


class ResumableNpy:
    """Writes OUT: `with locked():`, `begin` once, `append` for each block of rows, `finish`."""

    progress: Progress

    def __init__(self, path: Path):
        self.path = path
        # Not with_name, which raises an error of its own for ".".
        self.partial = path.parent / f"{path.name}.partial"
        self.progress_path = path.parent / f"{path.name}.progress.json"

    def check_paths(self, source: Path) -> None:
        """Raise an error if the input would be overwritten, or if the output exists or has no folder."""
        for path in (self.path, self.partial, self.progress_path):
            if path.exists() and source.exists() and path.samefile(source):
                raise ValueError(f"{source} would be overwritten: give another -o")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path.parent} for the output")
        self._check_absent()

    def _check_absent(self) -> None:
        """Raise FileExistsError or IsADirectoryError if the output exists."""
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder: name a file, such as -o {self.path / 'vectors.npy'}")
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists already: delete it, or give another -o")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Open and lock the partial file. At the end, delete it if it is empty.

        Raises RuntimeError if another run has locked it, OSError if it cannot be written.
        """
        self.partial.touch()
        with self.partial.open("r+b") as self._file:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another run is writing {self.partial}") from None
            try:
                # A run that had the lock may have completed the output since.
                self._check_absent()
                yield
            finally:
                if not self._size():
                    self.partial.unlink(missing_ok=True)

    def begin(self, fingerprint: dict[str, str | None], rows: int, dim: int, dtype: np.dtype) -> Progress:
        """Begin or continue an array [rows, dim] with this fingerprint. Reserves its disk space, returns the progress.

        Raises ValueError if the partial file has another fingerprint, FileExistsError if it is not a partial output,
        OSError if the disk is full.
        """
        header = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (rows, dim)})
        self._row_bytes = dim * dtype.itemsize
        self._first_row = header.tell()
        size = self._first_row + rows * self._row_bytes
        progress = Progress.read(self.progress_path)
        if progress is None and self._size():
            raise FileExistsError(f"{self.partial} was not left by a run: delete it, or give another -o")
        if progress is not None and progress.rows:
            self._check_fingerprint(progress, fingerprint)
            if self._size() == size:
                self.progress = progress
                return progress
        self.progress = Progress(fingerprint)
        # Write the progress before the first byte: a partial file without progress raises FileExistsError.
        self.progress.write(self.progress_path)
        self._allocate(size)
        self._file.write(header.getbuffer())
        return self.progress

    def _check_fingerprint(self, progress: Progress, fingerprint: dict[str, str | None]) -> None:
        """Raise ValueError if the progress has another fingerprint."""
        differing = [name for name, value in fingerprint.items() if progress.fingerprint.get(name) != value]
        if differing:
            raise ValueError(
                f"{self.partial} was begun with another {' and another '.join(differing)}: delete it and "
                f"{self.progress_path}, or give another -o"
            )

    def _allocate(self, size: int) -> None:
        """Reserve the partial file's bytes, so that a full disk is an error at once and not after hours."""
        self._file.truncate(0)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)
        except OSError as error:
            self._file.truncate(0)
            self.progress_path.unlink()
            raise OSError(error.errno, f"{size:,} bytes for the vectors: {error.strerror}", str(self.path)) from error

    def append(self, rows: np.ndarray, offset: int, bad_lines: list[int]) -> None:
        """Write the next rows [N, dim] and then the progress. offset: the byte offset of the next line in the input."""
        progress = self.progress
        self._file.seek(self._first_row + progress.rows * self._row_bytes)
        self._file.write(rows.data)
        self._flush()
        done = replace(
            progress,
            rows=progress.rows + len(rows),
            offset=offset,
            bad=progress.bad + len(bad_lines),
            bad_lines=[*progress.bad_lines, *bad_lines][:BAD_LINES],
        )
        done.write(self.progress_path)
        self.progress = done

    def finish(self) -> None:
        """Rename the complete file to OUT, and delete the progress."""
        self._flush()
        self._check_absent()
        self.partial.rename(self.path)
        self.progress_path.unlink()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size


class ResumableParquet(ResumableNpy):
    """A Parquet file with one column, "vector": a list of dim float16 or float32 numbers per row.

    Parquet cannot be appended to after a crash. So OUT.partial is a .npy file, and `finish` converts it to Parquet with
    ROW_GROUP rows per group. This needs disk space for both.
    """

    def __init__(self, path: Path):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{path} needs pyarrow ({error}): pip install pyarrow, or name a .npy file") from error
        super().__init__(path)

    def finish(self) -> None:
        import pyarrow
        import pyarrow.parquet

        self._flush()
        self._check_absent()
        rows, new = np.load(self.partial, mmap_mode="r"), self.partial.with_name(self.partial.name + ".new")
        numbers = pyarrow.from_numpy_dtype(rows.dtype)
        schema = pyarrow.schema([("vector", pyarrow.list_(numbers, rows.shape[1]))])
        with new.open("wb") as file:
            with pyarrow.parquet.ParquetWriter(file, schema) as writer:
                for start in range(0, len(rows), ROW_GROUP):
                    flat = pyarrow.array(rows[start : start + ROW_GROUP].reshape(-1))
                    vectors = pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])
                    writer.write_table(pyarrow.table([vectors], schema=schema))
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.path)
        self.partial.unlink()
        self.progress_path.unlink()
