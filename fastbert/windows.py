"""Tokenize texts window by window, one window ahead of the device, and cut each window into packed batches.

The texts of a window are sorted by length: a text's vector does not depend on the other texts of its batch. Nothing is
padded. The ids and cu_seqlens of all batches of a window go to the device in one copy.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from fastbert.tokenization import PackedTokens, PackingTokenizer, Texts

# Texts per tokenizer call. Tokenizing can be stopped between calls.
CHUNK = 512
# Texts that are sorted together. The first window is small because the device is idle until it is tokenized.
FIRST_WINDOW, LARGEST_WINDOW = 1024, 16384
# Maximum tokens of a batch. 16384 keep a GPU busy, and the widest activation of BERT large in float32, [16384, 4096],
# takes 256 MiB. On a CPU larger batches exceed the cache: MiniLM is then up to a seventh slower.
TOKENS, CPU_TOKENS = 16384, 2048
# Parts of a window begin at multiples of this many int32 numbers: kernels have other variants for addresses that 16
# bytes do not divide.
ALIGNED = 4

T = TypeVar("T")


@dataclass
class Window:
    """Texts that are sorted together, as batches.

    rows: int64 [N], the index of each text among all texts, longest text first. lengths: int64 [N], their token counts.
    cuts: the index in [0, N) of each batch's first text, and N. packed: int32, for each batch its input_ids [T], its
    token_type_ids [T] if has_types, and its cu_seqlens; each part is ALIGNED.
    """

    rows: np.ndarray
    lengths: np.ndarray
    cuts: list[int]
    packed: np.ndarray
    has_types: bool

    def batches(self, device: torch.device) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield for each batch the number of its texts and the arguments of the model, on the device."""
        packed = torch.from_numpy(self.packed)
        if device.type == "cuda":  # torch reuses the pinned memory only after the copy
            packed = packed.pin_memory().to(device, non_blocking=True)
        names = ("input_ids", "token_type_ids") if self.has_types else ("input_ids",)
        start = 0
        for first, last in pairwise(self.cuts):
            lengths = self.lengths[first:last]
            given: dict[str, Any] = {"max_length_q": int(lengths[0])}
            num_tokens, num_offsets = int(lengths.sum()), len(lengths) + 1
            for name in names:
                given[name] = packed[None, start : start + num_tokens]
                start += num_tokens + -num_tokens % ALIGNED
            given["cu_seq_lens_q"] = packed[start : start + num_offsets]
            start += num_offsets + -num_offsets % ALIGNED
            yield len(lengths), given


def ahead(jobs: Iterable[Callable[[threading.Event], T | None]]) -> Generator[T, None, None]:
    """Yield the results of jobs until one is None. A thread runs the next job while the caller uses the last result.

    The caller's thread runs the first job, so a single job needs no other thread. Each job gets an event, which is set
    when its result is no longer needed. Raises the error of a job in the place of its result. Closing ends the thread.
    """
    stopped, waiting, upcoming = threading.Event(), iter(jobs), None
    done = next(waiting)(stopped)
    try:
        while done is not None:
            job = next(waiting, None)
            upcoming = None if job is None else _Upcoming(job, stopped)
            yield done
            done = None if upcoming is None else upcoming.result()
    finally:
        stopped.set()
        if upcoming is not None:
            upcoming.join()


class _Upcoming(threading.Thread, Generic[T]):
    """A function call in its own thread. `result` waits for it and returns or raises what it did."""

    def __init__(self, function: Callable[..., T], *args):
        super().__init__(name="fastbert-tokenizing")
        self._function, self._args = function, args
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function(*self._args)
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        self.join()
        if self._error is not None:
            raise self._error
        return self._result


def spans(count: int) -> Iterator[tuple[int, int]]:
    """Yield the start and stop index of each window of `count` texts."""
    start, size = 0, FIRST_WINDOW
    while start < count:
        stop = min(start + size, count)
        yield start, stop
        start, size = stop, min(2 * size, LARGEST_WINDOW)


def window_of(
    tokenizer: PackingTokenizer, texts: Texts, first: int, batch_size: int, max_tokens: int, stopped: threading.Event
) -> Window | None:
    """Tokenize texts and cut them into a window. Returns None if `stopped` was set meanwhile.

    first: the index of the first text among all texts. A batch has at most batch_size times the tokens of the longest
    text, and at most max_tokens; a longer text is a batch alone. Raises what the tokenizer raises.
    """
    chunks = []
    for start in range(0, len(texts), CHUNK):
        if stopped.is_set():
            return None
        chunks.append(tokenizer(texts[start : start + CHUNK], first + start))
    return window_of_tokens(chunks, first, batch_size, max_tokens)


def window_of_tokens(chunks: Sequence[PackedTokens], first: int, batch_size: int, max_tokens: int) -> Window:
    """Cut the tokens of texts into a window, as `window_of` does."""
    lengths = np.concatenate([chunk.lengths for chunk in chunks])
    order = np.argsort(-lengths, kind="stable")
    begins, lengths = (lengths.cumsum() - lengths)[order], lengths[order]
    ends = lengths.cumsum()
    # The index of each token of the sorted texts among the tokens of the chunks.
    indices = np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1])
    per_token = [np.concatenate([chunk.input_ids for chunk in chunks])[indices]]
    has_types = chunks[0].token_type_ids is not None
    if has_types:
        per_token.append(np.concatenate([chunk.token_type_ids for chunk in chunks])[indices])
    cuts, parts = _cuts(ends, min(batch_size * int(lengths[0]), max_tokens)), []
    for start, stop in pairwise(cuts):
        before, end = (int(ends[index - 1]) if index else 0 for index in (start, stop))
        cu_seqlens = np.concatenate([[0], ends[start:stop] - before])
        for part in (*(values[before:end] for values in per_token), cu_seqlens):
            parts.append(np.pad(part.astype(np.int32), (0, -len(part) % ALIGNED)))
    return Window(first + order, lengths, cuts, np.concatenate(parts), has_types)


def _cuts(ends: np.ndarray, max_tokens: int) -> list[int]:
    """The index of each batch's first text, and the number of texts. ends: int64 [N], the last offset of each text."""
    cuts = [0]
    while cuts[-1] < len(ends):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        stop = int(np.searchsorted(ends, before + max_tokens, side="right"))
        cuts.append(max(stop, cuts[-1] + 1))
    return cuts
