"""Bulk encoding: a file of texts becomes a .npy file with one vector a line, by a SentenceTransformer around BERT.

Loading, prompts, tokenizing, pooling and normalizing are sentence-transformers' own, so that the vectors are those of
its `encode`. What is added is for files larger than memory: texts are read in blocks, run in batches of similar
length, and a run that was killed at any moment goes on where it stopped (`fastbert.commands.resumable`).
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
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
from fastbert.commands.resumable import Progress, ResumableNpy
from fastbert.sentences import OnHost, carrying

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import batch_to_device, truncate_embeddings
except ImportError as error:
    raise ImportError(
        f"fastbert encode needs sentence-transformers ({error}): pip install 'fastbert-triton[encode]'"
    ) from error

# Positions in a batch. 128 texts of 128 tokens keep a GPU busy, while the widest activation of BERT large in float32,
# [16384, 4096], takes 256 MiB. On a CPU larger batches leave its cache: MiniLM is then up to a seventh slower.
TOKENS, CPU_TOKENS = 16384, 2048
# Texts that are tokenized together, by similar length: padding a whole block to its longest takes half as long again.
SLICE_LINES = 1024
# Lines that are no text of which a run tells the reason; seconds between two lines of progress without a terminal.
TOLD_LINES, TOLD_SECONDS = 100, 60

T = TypeVar("T")


@dataclass
class Block:
    """Consecutive lines of the input.

    lines: how many. end: where in the input, in bytes, the next block begins. bad: the number of each line that is no
    text, from 1 at the file's beginning -> why. slices: texts of similar length, as their rows in the block, int64 [N],
    and what `preprocess` gives for all N.
    """

    lines: int
    end: int
    bad: dict[int, str]
    slices: list[tuple[np.ndarray, dict[str, Any]]]


@dataclass(frozen=True)
class Encoded:
    """What a run made: vectors [lines, dim], of which `bad` are NaN; bad_lines as in Progress. rate: texts a second."""

    lines: int
    dim: int
    dtype: str
    bad: int
    bad_lines: list[int]
    rate: float


class Told:
    """What a user is told while a run works on lines, of which `done` were done before."""

    def __init__(self, lines: int, done: int, report: Callable[[str], None]):
        self._lines, self._before, self._done, self._bad, self._report = lines, done, done, 0, report
        self._begun = time.monotonic()
        self._due = self._begun + TOLD_SECONDS
        self.bar = tqdm(total=lines, initial=done, unit=" texts", disable=None)
        self._has_terminal = not self.bar.disable  # which its end changes

    def done(self, lines: int) -> None:
        self._done += lines
        self.bar.update(lines)
        if time.monotonic() >= self._due:
            self.progress()

    def progress(self) -> float:
        """Texts a second; told in a line where there is no terminal for the bar."""
        now = time.monotonic()
        rate = (self._done - self._before) / (now - self._begun)
        if not self._has_terminal:
            self._report(f"{self._done:,} of {self._lines:,} lines, {rate:,.1f} texts/s")
        self._due = now + TOLD_SECONDS
        return rate

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
    """Write the vectors of all lines of a file to a new .npy file, as its rows [lines, dim].

    Rows are float16 if the model's vectors are, else float32. They are those of `SentenceTransformer(model).encode`,
    and NaN where a line is no text; for the first TOLD_LINES the number and the reason are reported. A run that was
    killed goes on when it is called with the same input, model, field, prompt and dtype; the rest may change.

    model: a folder, or a name on the hub; one without modules.json gets mean pooling.
    source: UTF-8, with or without a BOM, lines end with LF or CRLF. field: each line is a JSON object, its text the
    string of this name.
    prompt: put before each text, as in `encode(prompt=)`; by default the model's own.
    dtype: of the weights; by default the checkpoint's. device: by default a GPU if there is one.
    tokens: the most positions of a batch, padding included, by default CPU_TOKENS or TOKENS; a longer text is a batch
    alone.
    block_lines: the most that are read, and done, between two points where a killed run goes on.
    report: takes each line for the user.

    Raises FileExistsError if the output exists; OSError for files that cannot be read or written, or without the disk
    space; RuntimeError if another run writes the output, if the input changes meanwhile, or if a batch does not fit on
    the device; ValueError for the partial run of something else, for an input that begins with BLOCK_LINES lines that
    are no text, and for wrong arguments; and what loading raises.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens}: a batch holds at least 1")
    source, npy = Path(source), ResumableNpy(Path(output))
    npy.check_paths(source)
    local_or_hub(model)
    check_source(source, field)
    with npy.locked():
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
        on_cpu = embedder.device.type == "cpu"
        tokens = tokens or (CPU_TOKENS if on_cpu else TOKENS)
        block_lines = block_lines or (CPU_BLOCK_LINES if on_cpu else BLOCK_LINES)

        @carrying()  # the mask on the host is cut with its batch
        def preprocess(texts):
            return embedder.preprocess(texts, prompt=prompt)

        [probe] = _vectors(embedder, preprocess(["text"]), tokens)
        progress = npy.begin(fingerprint, lines, probe.size, probe.dtype)
        if progress.rows:
            report(f"going on after line {progress.rows:,} of {lines:,}")
        told = Told(lines, progress.rows, report)
        try:
            with told.bar:
                for block in _ahead(_blocks(source, progress, field, block_lines, preprocess)):
                    rows = np.full((block.lines, probe.size), np.nan, probe.dtype)
                    for places, features in block.slices:
                        rows[places] = _vectors(embedder, features, tokens)
                        told.done(len(places))
                    told.bad(block.bad)
                    told.done(len(block.bad))
                    if state_of(source) != state:
                        raise RuntimeError(f"{source} changed while it was read")
                    npy.append(rows, block.end, list(block.bad))
        except KeyboardInterrupt:
            if npy.progress.rows:
                report(f"{npy.progress.rows:,} of {lines:,} lines are done: the same command goes on from there")
            raise
        rate = told.progress()
        npy.finish()
    return Encoded(lines, probe.size, str(probe.dtype), npy.progress.bad, npy.progress.bad_lines, rate)


def token_batches(features: dict[str, Any], tokens: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Cut what `preprocess` gives for N texts into batches of at most `tokens` positions, padding included.

    features: tensors [N, ...] and arrays on the host are cut, those that begin with [N, S] like attention_mask to the
    batch's longest text, whichever side is padded; all else holds for every batch. Yields, longest texts first, the
    rows among the N, int64 [B], and their features. A text of more than `tokens` is a batch alone.
    """
    if "attention_mask" not in features:
        raise ValueError("the tokenizer gives no attention_mask, which tells texts from padding: see model_input_names")
    mask = features["attention_mask"].numpy()
    lengths = mask.sum(axis=1)
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        count = max(1, tokens // max(1, lengths[order[0]]))
        rows, order = order[:count], order[count:]
        kept = np.flatnonzero(mask[rows].any(axis=0))
        # A batch of texts without any token keeps one column of padding.
        columns = slice(kept[0], kept[-1] + 1) if len(kept) else slice(0, 1)
        yield rows, {name: _cut(value, rows, columns, mask.shape) for name, value in features.items()}


def _cut(value: Any, rows: np.ndarray, columns: slice, shape: tuple[int, int]) -> Any:
    if isinstance(value, OnHost):
        return OnHost(_cut(value.array, rows, columns, shape))
    if not isinstance(value, Tensor | np.ndarray) or value.shape[:1] != shape[:1]:
        return value
    return value[:, columns][rows] if value.shape[:2] == shape else value[rows]


def _vectors(embedder: SentenceTransformer, features: dict[str, Any], tokens: int) -> np.ndarray:
    """The vectors [N, dim] of N preprocessed texts, float16 if the model's are, else float32."""
    order, vectors = [], []
    with torch.inference_mode():
        for rows, batch in token_batches(features, tokens):
            try:
                found = embedder(batch_to_device(batch, embedder.device))["sentence_embedding"]
            except torch.OutOfMemoryError as error:
                raise RuntimeError(_advice(*batch["attention_mask"].shape)) from error
            if embedder.truncate_dim is not None:
                found = truncate_embeddings(found, embedder.truncate_dim)
            order.append(rows)
            vectors.append(found if found.dtype == torch.float16 else found.float())
        # The device is waited for once, here.
        sorted_vectors = torch.cat(vectors).cpu().numpy()
    result = np.empty_like(sorted_vectors)
    result[np.concatenate(order)] = sorted_vectors
    return result


def _advice(count: int, longest: int) -> str:
    """What helps where a batch [count, longest] does not fit; it may be less than `tokens` allows."""
    if count == 1:
        return (
            f"a single text of {longest} tokens does not fit on the device: no --tokens helps, but a smaller --dtype, "
            "another --device, or a smaller max_seq_length of the model may"
        )
    return f"a batch {(count, longest)} does not fit on the device: --tokens {count * longest // 2}"


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, of which a thread makes the next one while the caller works on the last."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _blocks(
    source: Path, progress: Progress, field: str | None, block_lines: int, preprocess: Callable[[list[str]], dict]
) -> Iterator[Block]:
    """The blocks of the input after a progress, tokenized."""
    first = progress.rows + 1
    with source.open("rb") as file:
        file.seek(progress.offset)
        while lines := read_lines(file, block_lines):
            texts, bad = {}, {}
            for place, line in enumerate(lines):
                try:
                    texts[place] = text_of(line, field)
                except ValueError as error:
                    bad[first + place] = str(error)
            by_length = sorted(texts, key=lambda place: len(texts[place]), reverse=True)
            slices = [by_length[start : start + SLICE_LINES] for start in range(0, len(by_length), SLICE_LINES)]
            tokenized = [(np.array(places), preprocess([texts[place] for place in places])) for places in slices]
            yield Block(len(lines), file.tell(), bad, tokenized)
            first += len(lines)


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
