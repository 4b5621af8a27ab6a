"""Bulk encoding: a file of texts becomes a file with one vector a line, by a SentenceTransformer around BERT.

Loading, prompts, pooling and normalizing are sentence-transformers' own, tokens and batches are those of
`fastbert.inference`, so that the vectors are those of `encode`. What is added is for files larger than memory: texts
are read in blocks, of which the next is tokenized and the last is written while the device works on one, and a run that
was killed at any moment goes on where it stopped (`fastbert.commands.resumable`).
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
from fastbert.commands.checkpoint import device_called, local_or_hub
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

# Lines that are no text of which a run tells the reason; seconds between two lines of progress without a terminal.
TOLD_LINES, TOLD_SECONDS = 100, 60
# What a run's time goes to.
PARTS = ("reading and tokenizing", "the device", "writing")


@dataclass
class Block:
    """Consecutive lines of the input.

    lines: how many. end: where in the input, in bytes, the next block begins. bad: the number of each line that is no
    text, from 1 at the file's beginning -> why. places: int64 [N], of the lines that are texts, in the block. texts:
    these, or their window; None without any.
    """

    lines: int
    end: int
    bad: dict[int, str]
    places: np.ndarray
    texts: Window | list[str] | None


@dataclass(frozen=True)
class Encoded:
    """What a run made: vectors [lines, dim], of which `bad` are NaN; bad_lines as in Progress. rate: texts a second.
    tokens_rate: tokens a second, None where sentence-transformers' own code did the work. seconds: what the run waited
    for, of PARTS."""

    lines: int
    dim: int
    dtype: str
    bad: int
    bad_lines: list[int]
    rate: float
    tokens_rate: float | None
    seconds: dict[str, float]


class Told:
    """What a user is told while a run works on lines, of which `done` were done before."""

    def __init__(self, lines: int, done: int, report: Callable[[str], None]):
        self._lines, self._before, self._done, self._bad, self._report = lines, done, done, 0, report
        self._begun = time.monotonic()
        self._due = self._begun + TOLD_SECONDS
        self.seconds, self.tokens = dict.fromkeys(PARTS, 0.0), 0
        self.bar = tqdm(total=lines, initial=done, unit=" texts", disable=None)
        self._has_terminal = not self.bar.disable  # which its end changes

    def done(self, lines: int) -> None:
        self._done += lines
        self.bar.update(lines)
        if time.monotonic() >= self._due:
            self.progress()

    def progress(self) -> tuple[float, float]:
        """Texts and tokens a second; told in a line where there is no terminal for the bar."""
        now = time.monotonic()
        rate, tokens_rate = (count / (now - self._begun) for count in (self._done - self._before, self.tokens))
        if not self._has_terminal:
            tokens = f", {tokens_rate:,.0f} tokens/s" if self.tokens else ""
            self._report(f"{self._done:,} of {self._lines:,} lines, {rate:,.1f} texts/s{tokens}")
        self._due = now + TOLD_SECONDS
        return rate, tokens_rate

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block as one of PARTS."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun

    def bad(self, lines: dict[int, str]) -> None:
        for number, reason in lines.items():
            if self._bad < TOLD_LINES:
                self._report(f"line {number}: {reason}")
            elif self._bad == TOLD_LINES:
                self._report(f"line {number} is no text, either: from here on such lines are only counted")
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
    """Write the vectors of all lines of a file to a new file, as its rows [lines, dim].

    Rows are float16 if the model's vectors are, else float32. They are those of `SentenceTransformer(model).encode`,
    and NaN where a line is no text; for the first TOLD_LINES the number and the reason are reported. A run that was
    killed goes on when it is called with the same input, model, field, prompt and dtype; the rest may change.

    model: a folder, or a name on the hub; one without modules.json gets mean pooling.
    source: UTF-8, with or without a BOM, lines end with LF or CRLF. field: each line is a JSON object, its text the
    string of this name.
    output: a .npy file, or by a name that ends in .parquet, one of Parquet, as `resumable.ResumableParquet` says.
    prompt: put before each text, as in `encode(prompt=)`; by default the model's own.
    dtype: of the weights; by default the checkpoint's. device: by default a GPU if there is one.
    tokens: the most tokens of a batch, by default CPU_TOKENS or TOKENS; a longer text is a batch alone.
    block_lines: the most that are read, and done, between two points where a killed run goes on.
    report: takes each line for the user.

    Raises FileExistsError if the output exists; OSError for files that cannot be read or written, or without the disk
    space; RuntimeError if another run writes the output, if the input changes meanwhile, or if a batch does not fit on
    the device; ValueError for the partial run of something else, for an input that begins with CHECKED_LINES lines that
    are no text, and for wrong arguments; ImportError for Parquet without pyarrow; and what loading raises.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens}: a batch holds at least 1")
    source, file = Path(source), resumable(Path(output))
    file.check_paths(source)
    local_or_hub(model)
    check_source(source, field)
    with file.locked():
        state = state_of(source)
        lines, content = count_and_hash(source)
        embedder = _load(model, device, report)
        if prompt is None:
            prompt = embedder.prompts.get(embedder.default_prompt_name)
        fingerprint = {"input": content, "field": field, "prompt": prompt, "model": _identity(embedder)}
        if dtype is not None:
            embedder.to(dtype)
        fingerprint["dtype"] = str(embedder.dtype)
        fastbert.optimize(embedder)
        vectors = _Vectors(embedder, prompt, tokens, report)
        on_cpu = embedder.device.type == "cpu"
        block_lines = block_lines or (CPU_BLOCK_LINES if on_cpu else BLOCK_LINES)
        progress = file.begin(fingerprint, lines, vectors.dim, vectors.dtype)
        if progress.rows:
            report(f"going on after line {progress.rows:,} of {lines:,}")
        told = Told(lines, progress.rows, report)

        def write(block: Block, arriving: Callable[[], np.ndarray]) -> None:
            with told.part("the device"):
                found = arriving()
            with told.part("writing"):
                rows = np.full((block.lines, vectors.dim), np.nan, vectors.dtype)
                rows[block.places] = found
                told.bad(block.bad)
                told.done(len(block.bad))
                if state_of(source) != state:
                    raise RuntimeError(f"{source} changed while it was read")
                file.append(rows, block.end, list(block.bad))

        read = _reading(source, progress.rows, progress.offset, field, block_lines, vectors.prepared)
        try:
            with told.bar, closing(ahead(repeat(read))) as blocks:
                pending = None
                while True:
                    with told.part("reading and tokenizing"):
                        block = next(blocks, None)
                    if block is not None:
                        with told.part("the device"):
                            upcoming = block, vectors.of(block, told)
                    # While the device works on this block, the last is written.
                    if pending is not None:
                        write(*pending)
                    if block is None:
                        break
                    pending = upcoming
        except KeyboardInterrupt:
            if file.progress.rows:
                report(f"{file.progress.rows:,} of {lines:,} lines are done: the same command goes on from there")
            raise
        rate, tokens_rate = told.progress()
        with told.part("writing"):
            file.finish()
    done = file.progress
    return Encoded(
        lines, vectors.dim, str(vectors.dtype), done.bad, done.bad_lines, rate, tokens_rate or None, told.seconds
    )


class _Vectors:
    """Vectors of texts, by packed windows, or where these do not serve the model, by sentence-transformers' encode.

    dim, dtype: of a vector, float16 if the model's are, else float32.
    """

    def __init__(
        self, embedder: SentenceTransformer, prompt: str | None, tokens: int | None, report: Callable[[str], None]
    ):
        self._embedder, self._prompt = embedder, prompt
        self._tokens = tokens or (CPU_TOKENS if embedder.device.type == "cpu" else TOKENS)
        try:
            # A batch is as large as its tokens allow, however many texts these are.
            self._packed = PackedEncoder(embedder, FEW_TEXTS, False, prompt, self._tokens, max_tokens=self._tokens)
        except Unsupported as error:
            report(f"texts go through sentence-transformers' own code: {error}")
            self._packed = None
        probe = embedder.encode(["text"], prompt=prompt, show_progress_bar=False)
        self.dim, self.dtype = probe.shape[1], probe.dtype

    def prepared(self, texts: list[str], first: int, stopped: Event) -> Window | list[str] | None:
        """What `of` takes for these texts, the first of which is in the line of this number; None once stopped."""
        if self._packed is None:
            return texts
        try:
            return self._packed.window(texts, first, stopped)
        except Unsupported:  # texts without any token
            return texts

    @torch.inference_mode()
    def of(self, block: Block, told: Told) -> Callable[[], np.ndarray]:
        """Begin with the vectors [N, dim] of a block's N texts; what this returns waits for them."""
        texts = block.texts
        if texts is None:
            return lambda: np.empty((0, self.dim), self.dtype)
        if not isinstance(texts, Window):
            return self._by_sentence_transformers(texts, told)
        found = []
        for count, given in texts.batches(self._embedder.device):
            try:
                found.append(self._packed.features(given)["sentence_embedding"])
            except torch.OutOfMemoryError as error:
                raise RuntimeError(_advice(count, given["input_ids"].shape[1])) from error
            told.tokens += given["input_ids"].shape[1]
            told.done(count)
        vectors = torch.cat(found)[:, : self._embedder.truncate_dim]
        arriving = to_host(vectors if vectors.dtype == torch.float16 else vectors.float())
        # Of the window's order, back to the block's.
        places = np.argsort(texts.rows)
        return lambda: arriving().numpy()[places]

    def _by_sentence_transformers(self, texts: list[str], told: Told) -> Callable[[], np.ndarray]:
        batch_size = max(1, self._tokens // (self._embedder.max_seq_length or self._tokens))
        try:
            vectors = self._embedder.encode(texts, prompt=self._prompt, batch_size=batch_size, show_progress_bar=False)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(_advice(batch_size, batch_size * self._embedder.max_seq_length)) from error
        told.done(len(texts))
        return lambda: vectors


def _advice(count: int, num_tokens: int) -> str:
    """What helps where a batch of so many texts does not fit; it may be less than `tokens` allows."""
    if count == 1:
        return (
            f"a single text of {num_tokens} tokens does not fit on the device: no --tokens helps, but a smaller "
            "--dtype, another --device, or a smaller max_seq_length of the model may"
        )
    return f"a batch of {num_tokens} tokens does not fit on the device: --tokens {num_tokens // 2}"


def _reading(
    source: Path, rows: int, offset: int, field: str | None, block_lines: int, prepared: Callable
) -> Callable[[Event], Block | None]:
    """A function that at each call reads the next block of the input after so many rows, from that byte on, and
    prepares its texts; it gives None at the end."""
    begin = [rows + 1, offset]

    def read(stopped: Event) -> Block | None:
        first, offset = begin
        with source.open("rb") as file:
            file.seek(offset)
            lines = read_lines(file, block_lines)
            end = file.tell()
        texts, bad = {}, {}
        for place, line in enumerate(lines):
            try:
                texts[place] = text_of(line, field)
            except ValueError as error:
                bad[first + place] = str(error)
        begin[:] = first + len(lines), end
        ready = prepared(list(texts.values()), first, stopped) if texts else None
        if not lines or stopped.is_set():
            return None
        return Block(len(lines), end, bad, np.array(list(texts), dtype=np.int64), ready)

    return read


def _load(model: str, device: str | None, report: Callable[[str], None]) -> SentenceTransformer:
    if Path(model).is_dir() and not Path(model, "modules.json").exists():
        report(f"{model} has no modules.json: a vector is the mean over its text's tokens")
    return SentenceTransformer(model, device=str(device_called(device))).eval()


def _identity(embedder: SentenceTransformer) -> str:
    """A hash of what makes vectors of texts: weights, configuration, tokenizer, the modules' options."""
    digest = hashlib.sha256()
    tokenizer = getattr(embedder.tokenizer, "backend_tokenizer", None)
    digest.update(
        json.dumps(
            [
                repr(embedder),
                embedder.config.to_json_string(),
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
