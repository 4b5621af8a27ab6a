"""Bulk encoding: the lines of a text file become the vectors of a file, with a SentenceTransformer around BERT.

sentence-transformers does the loading, prompts, pooling and normalizing, `fastbert.inference` the tokens and batches.
So the vectors are those of `encode`. Files may be larger than memory: while the device computes one block of texts, the
next one is tokenized and the last one is written. A killed run can be continued (`fastbert.commands.resumable`).
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from threading import Event

import numpy as np
import torch
from tqdm.auto import tqdm

import fastbert
from fastbert.commands.checkpoint import local_or_hub, select_device
from fastbert.commands.lines import (
    BLOCK_LINES,
    CPU_BLOCK_LINES,
    check_source,
    count_and_hash,
    read_lines,
    state_of,
    text_of,
)
from fastbert.commands.resumable import resumable
from fastbert.inference import FEW_TEXTS, PackedEncoder, to_host
from fastbert.tokenization import Unsupported
from fastbert.windows import CPU_TOKENS, TOKENS, Window, ahead

try:
    from sentence_transformers import SentenceTransformer
except ImportError as error:
    raise ImportError(
        f"fastbert encode needs sentence-transformers ({error}): pip install 'fastbert-triton[encode]'"
    ) from error

# Number of bad lines that are reported with their reason; seconds between progress reports without a terminal.
REPORTED_LINES, REPORT_SECONDS = 100, 60
# The parts of a run that are timed.
PARTS = ("reading and tokenizing", "the device", "writing")


@dataclass
class Block:
    """Consecutive lines of the input.

    lines: the number of lines. end: the byte offset of the next block in the input. bad: line number, counted from 1 in
    the file, -> why the line is not a text. rows: int64 [N], the indices of the texts among the block's lines. texts:
    the N texts or their window; None if N is 0.
    """

    lines: int
    end: int
    bad: dict[int, str]
    rows: np.ndarray
    texts: Window | list[str] | None


@dataclass(frozen=True)
class Encoded:
    """The result of a run: vectors [lines, dim], of which `bad` are NaN.

    bad_lines: see Progress. rate: texts per second. tokens_rate: tokens per second, None if sentence-transformers' own
    code ran. seconds: the waiting time for each of PARTS.
    """

    lines: int
    dim: int
    dtype: str
    bad: int
    bad_lines: list[int]
    rate: float
    tokens_rate: float | None
    seconds: dict[str, float]


class RunReport:
    """Reports the progress of a run to the user. lines: of the input; done: lines that earlier runs completed."""

    def __init__(self, lines: int, done: int, report: Callable[[str], None]):
        self._lines, self._before, self._done, self._bad, self._report = lines, done, done, 0, report
        self._begun = time.monotonic()
        self._due = self._begun + REPORT_SECONDS
        self.seconds, self.tokens = dict.fromkeys(PARTS, 0.0), 0
        self.bar = tqdm(total=lines, initial=done, unit=" texts", disable=None)
        self._has_terminal = not self.bar.disable  # closing the bar changes it

    def done(self, lines: int) -> None:
        self._done += lines
        self.bar.update(lines)
        if time.monotonic() >= self._due:
            self.progress()

    def progress(self) -> tuple[float, float]:
        """Return texts and tokens per second, and report them in a line if there is no terminal for the bar."""
        now = time.monotonic()
        rate, tokens_rate = (count / (now - self._begun) for count in (self._done - self._before, self.tokens))
        if not self._has_terminal:
            tokens = f", {tokens_rate:,.0f} tokens/s" if self.tokens else ""
            self._report(f"{self._done:,} of {self._lines:,} lines, {rate:,.1f} texts/s{tokens}")
        self._due = now + REPORT_SECONDS
        return rate, tokens_rate

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to one of PARTS."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun

    def bad(self, lines: dict[int, str]) -> None:
        for number, reason in lines.items():
            if self._bad < REPORTED_LINES:
                self._report(f"line {number}: {reason}")
            elif self._bad == REPORTED_LINES:
                self._report(f"line {number} is not a text either: from here on such lines are only counted")
            self._bad += 1


def _to_stderr(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def encode_file(
    model: str,
    source: str | Path,
    output: str | Path,
    *,
    field: str | None = None,
    prompt: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    tokens: int | None = None,
    block_lines: int | None = None,
    report: Callable[[str], None] = _to_stderr,
) -> Encoded:
    """Write the vectors of all lines of a file to a new file, as rows [lines, dim].

    Rows are the vectors of `SentenceTransformer(model).encode`: float16 if the model's vectors are, else float32. Lines
    that are not texts become rows of NaN; the first REPORTED_LINES are reported with their reasons. A call with the
    same input, model, field, prompt and dtype continues a killed run; other arguments may differ.

    model: a folder, or a name on the hub; without modules.json it gets mean pooling.
    source: UTF-8, with or without a BOM, with lines that end with LF or CRLF. field: if given, each line is a JSON
    object with the text in this field.
    output: a .npy file, or a Parquet file if the name ends with .parquet (`resumable.ResumableParquet`).
    prompt: put before each text, as in `encode(prompt=)`; by default the model's own.
    dtype: of the weights; by default the checkpoint's. device: by default a GPU if there is one.
    tokens: the maximum tokens of a batch, by default CPU_TOKENS or TOKENS; a longer text is a batch alone.
    block_lines: the maximum lines of a block; a killed run loses at most its last blocks.
    report: receives each line for the user.

    Raises FileExistsError if the output exists; OSError for files that cannot be read or written, or if the disk is
    full; RuntimeError if another run writes the output, if the input changes meanwhile, or if a batch does not fit on
    the device; ValueError if the partial output belongs to another run, if none of the first CHECKED_LINES lines is a
    text, and for wrong arguments; ImportError for Parquet without pyarrow; and what loading raises.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens}: it must be at least 1")
    source, file = Path(source), resumable(Path(output))
    file.check_paths(source)
    local_or_hub(model)
    check_source(source, field)
    with file.locked():
        state = state_of(source)
        lines, content = count_and_hash(source)
        embedder = load(model, device, report)
        if prompt is None and embedder.default_prompt_name is not None:
            prompt = embedder.prompts.get(embedder.default_prompt_name)
        fingerprint = {"input": content, "field": field, "prompt": prompt, "model": identity(embedder)}
        if dtype is not None:
            embedder.to(dtype)
        fingerprint["dtype"] = str(embedder.dtype)
        fastbert.optimize(embedder)
        vectors = _Embedder(embedder, prompt, tokens, report)
        on_cpu = embedder.device.type == "cpu"
        block_lines = block_lines or (CPU_BLOCK_LINES if on_cpu else BLOCK_LINES)
        progress = file.begin(fingerprint, lines, vectors.dim, vectors.dtype)
        if progress.rows:
            report(f"continuing after line {progress.rows:,} of {lines:,}")
        run = RunReport(lines, progress.rows, report)

        def write(block: Block, arriving: Callable[[], np.ndarray]) -> None:
            with run.part("the device"):
                found = arriving()
            with run.part("writing"):
                rows = np.full((block.lines, vectors.dim), np.nan, vectors.dtype)
                rows[block.rows] = found
                run.bad(block.bad)
                run.done(len(block.bad))
                if state_of(source) != state:
                    raise RuntimeError(f"{source} changed while it was read: start again, with another -o")
                file.append(rows, block.end, list(block.bad))

        read = _reading(source, progress.rows, progress.offset, field, block_lines, vectors.prepared)
        try:
            with run.bar, closing(ahead(repeat(read))) as blocks:
                pending = None
                while True:
                    with run.part("reading and tokenizing"):
                        block = next(blocks, None)
                    if block is not None:
                        with run.part("the device"):
                            upcoming = block, vectors.of(block, run)
                    # Write the last block while the device computes this one.
                    if pending is not None:
                        write(*pending)
                    if block is None:
                        break
                    pending = upcoming
        except KeyboardInterrupt:
            if file.progress.rows:
                report(f"{file.progress.rows:,} of {lines:,} lines are done: repeat the command to continue")
            raise
        rate, tokens_rate = run.progress()
        with run.part("writing"):
            file.finish()
    done = file.progress
    return Encoded(
        lines, vectors.dim, str(vectors.dtype), done.bad, done.bad_lines, rate, tokens_rate or None, run.seconds
    )


class _Embedder:
    """Computes vectors of texts in packed windows, or by sentence-transformers' encode if the model is unsupported.

    dim, dtype: of a vector, float16 if the model's are, else float32.
    """

    def __init__(
        self, embedder: SentenceTransformer, prompt: str | None, tokens: int | None, report: Callable[[str], None]
    ):
        self._embedder, self._prompt = embedder, prompt
        self._tokens = tokens or (CPU_TOKENS if embedder.device.type == "cpu" else TOKENS)
        self._packed: PackedEncoder | None
        try:
            # max_tokens alone limits a batch: batch_size is as large.
            self._packed = PackedEncoder(embedder, FEW_TEXTS, False, prompt, self._tokens, max_tokens=self._tokens)
        except Unsupported as error:
            report(f"texts go through sentence-transformers' own code: {error}")
            self._packed = None
        probe = embedder.encode(["text"], prompt=prompt, show_progress_bar=False)
        self.dim, self.dtype = probe.shape[1], probe.dtype

    def prepared(self, texts: list[str], first: int, stopped: Event) -> Window | list[str] | None:
        """Prepare texts for `of`: their window if possible. first: the first line's number. None if stopped."""
        if self._packed is None:
            return texts
        try:
            return self._packed.window(texts, first, stopped)
        except Unsupported:  # a text has no tokens
            return texts

    @torch.inference_mode()
    def of(self, block: Block, run: RunReport) -> Callable[[], np.ndarray]:
        """Start to compute the vectors [N, dim] of a block. Returns a function that waits for them."""
        texts = block.texts
        if texts is None:
            return lambda: np.empty((0, self.dim), self.dtype)
        if not isinstance(texts, Window):
            return self._by_sentence_transformers(texts, run)
        assert self._packed is not None  # it made the window
        found = []
        for count, given in texts.batches(self._embedder.device):
            try:
                found.append(self._packed.features(given)["sentence_embedding"])
            except torch.OutOfMemoryError as error:
                raise RuntimeError(_advice(count, given["input_ids"].shape[1])) from error
            run.tokens += given["input_ids"].shape[1]
            run.done(count)
        vectors = torch.cat(found)[:, : self._embedder.truncate_dim]
        arriving = to_host(vectors if vectors.dtype == torch.float16 else vectors.float())
        # From the order of the window to that of the block.
        order = np.argsort(texts.rows)
        return lambda: arriving().numpy()[order]

    def _by_sentence_transformers(self, texts: list[str], run: RunReport) -> Callable[[], np.ndarray]:
        seq_len = self._embedder.max_seq_length or self._tokens
        batch_size = max(1, self._tokens // seq_len)
        try:
            vectors = self._embedder.encode(texts, prompt=self._prompt, batch_size=batch_size, show_progress_bar=False)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(_advice(batch_size, batch_size * seq_len)) from error
        run.done(len(texts))
        return lambda: vectors


def _advice(count: int, num_tokens: int) -> str:
    """The message for a batch of `count` texts that does not fit on the device."""
    if count == 1:
        return (
            f"a single text of {num_tokens} tokens does not fit on the device: no --tokens helps, but a smaller "
            "--dtype, another --device, or a smaller max_seq_length of the model may"
        )
    return f"a batch of {num_tokens} tokens does not fit on the device: --tokens {num_tokens // 2}"


def _reading(
    source: Path, rows: int, offset: int, field: str | None, block_lines: int, prepared: Callable
) -> Callable[[Event], Block | None]:
    """Return a function that reads the next block of the input and prepares its texts; it returns None at the end.

    rows, offset: the number of lines that are done, and the byte offset of the next one.
    """
    begin = [rows + 1, offset]

    def read(stopped: Event) -> Block | None:
        first, offset = begin
        with source.open("rb") as file:
            file.seek(offset)
            lines = read_lines(file, block_lines)
            end = file.tell()
        texts: dict[int, str] = {}
        bad: dict[int, str] = {}
        for row, line in enumerate(lines):
            try:
                texts[row] = text_of(line, field)
            except ValueError as error:
                bad[first + row] = str(error)
        begin[:] = first + len(lines), end
        ready = prepared(list(texts.values()), first, stopped) if texts else None
        if not lines or stopped.is_set():
            return None
        return Block(len(lines), end, bad, np.array(list(texts), dtype=np.int64), ready)

    return read


def load(model: str, device: str | None, report: Callable[[str], None]) -> SentenceTransformer:
    if Path(model).is_dir() and not Path(model, "modules.json").exists():
        report(f"{model} has no modules.json: vectors are the mean over the tokens of a text")
    return SentenceTransformer(model, device=str(select_device(device))).eval()


def identity(embedder: SentenceTransformer) -> str:
    """A hash of all that vectors depend on: weights, configuration, tokenizer and the modules' options."""
    digest, config = hashlib.sha256(), embedder.config
    tokenizer = getattr(embedder.tokenizer, "backend_tokenizer", None)
    digest.update(
        json.dumps(
            [
                repr(embedder),
                config.to_json_string() if config is not None else None,
                tokenizer.to_str() if tokenizer is not None else embedder.tokenizer.get_vocab(),
                embedder.max_seq_length,
                embedder.truncate_dim,
            ]
        ).encode()
    )
    for name, tensor in embedder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
