"""Many texts as packed batches: tokenized one window ahead of the device, sorted by length, and cut by tokens.

A text's vector does not depend on its batch, so that batches may hold whichever texts are of one length. Nothing is
padded on either side: a window's ids and the bounds of all of its batches go to the device in one copy.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastbert.tokenization import PackedTokens, PackingTokenizer, Texts

# Texts in a call of the tokenizer, between two of which it can be stopped.
CHUNK = 512
# Texts that are sorted together. The first window is small, for the device has nothing to do meanwhile.
FIRST_WINDOW, LARGEST_WINDOW = 1024, 16384
# Tokens of a batch at most. 16384 keep a GPU busy, while the widest activation of BERT large in float32, [16384, 4096],
# takes 256 MiB. On a CPU larger batches leave its cache: MiniLM is then up to a seventh slower.
TOKENS, CPU_TOKENS = 16384, 2048
# Numbers from one part of a window to the next: of addresses that 16 bytes divide, kernels are other variants.
ALIGNED = 4

T = TypeVar("T")


@dataclass
class Window:
    """Texts that are worked on together.

    rows: int64 [N], the place of each among all texts, longest first. lengths: int64 [N], their tokens. cuts: where
    batches begin among the N, and N. packed: int32, of each batch its input_ids [T], its token_type_ids [T] if
    has_types, and the bounds of its texts, which begin with 0; each ALIGNED.
    """

    rows: np.ndarray
    lengths: np.ndarray
    cuts: list[int]
    packed: np.ndarray
    has_types: bool

    def batches(self, device: torch.device) -> Iterator[tuple[int, dict[str, Tensor | int]]]:
        """For each batch the number of its texts, and the arguments of a model on the device."""
        packed = torch.from_numpy(self.packed)
        if device.type == "cuda":  # pinned memory is torch's to reuse, once the copy is done
            packed = packed.pin_memory().to(device, non_blocking=True)
        names = ("input_ids", "token_type_ids") if self.has_types else ("input_ids",)
        start = 0
        for first, last in pairwise(self.cuts):
            lengths = self.lengths[first:last]
            given = {"max_length_q": int(lengths[0])}
            num_tokens, num_bounds = int(lengths.sum()), len(lengths) + 1
            for name in names:
                given[name] = packed[None, start : start + num_tokens]
                start += num_tokens + -num_tokens % ALIGNED
            given["cu_seq_lens_q"] = packed[start : start + num_bounds]
            start += num_bounds + -num_bounds % ALIGNED
            yield len(lengths), given


def ahead(jobs: Iterable[Callable[[threading.Event], T | None]]) -> Iterator[T]:
    """What the jobs give, of which a thread does the next one while the caller works on the last; None ends it.

    The first is done by the caller's thread, so that one job alone needs no other. A job is given an event: once it is
    set, nobody waits for what the job gives. Raises what a job raises, in its place. Closing ends the thread.
    """
    stopped, jobs, upcoming = threading.Event(), iter(jobs), None
    done = next(jobs)(stopped)
    try:
        while done is not None:
            job = next(jobs, None)
            upcoming = job and _Upcoming(job, stopped)
            yield done
            done = upcoming and upcoming.result()
    finally:
        stopped.set()
        if upcoming is not None:
            upcoming.join()


class _Upcoming(threading.Thread):
    """A call in a thread of its own; `result` waits for it, and raises what it raised."""

    def __init__(self, function: Callable, *args):
        super().__init__(name="fastbert-tokenizing")
        self._function, self._args, self._error = function, args, None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function(*self._args)
        except BaseException as error:
            self._error = error

    def result(self):
        self.join()
        if self._error is not None:
            raise self._error
        return self._result


def spans(count: int) -> Iterator[tuple[int, int]]:
    """Where the windows of so many texts begin and end."""
    start, size = 0, FIRST_WINDOW
    while start < count:
        stop = min(start + size, count)
        yield start, stop
        start, size = stop, min(2 * size, LARGEST_WINDOW)


def window_of(
    tokenizer: PackingTokenizer, texts: Texts, first: int, batch_size: int, most_tokens: int, stopped: threading.Event
) -> Window | None:
    """The window of some texts, the first of which is at that place among all; None if it was stopped meanwhile.

    No batch has more tokens than batch_size times the longest text, nor more than most_tokens, but for a text that
    alone has more. Raises what the tokenizer raises.
    """
    chunks = []
    for start in range(0, len(texts), CHUNK):
        if stopped.is_set():
            return None
        chunks.append(tokenizer(texts[start : start + CHUNK], first + start))
    return _window(chunks, first, batch_size, most_tokens)


def _window(chunks: Sequence[PackedTokens], first: int, batch_size: int, most_tokens: int) -> Window:
    lengths = np.concatenate([chunk.lengths for chunk in chunks])
    order = np.argsort(-lengths, kind="stable")
    begins, lengths = (lengths.cumsum() - lengths)[order], lengths[order]
    ends = lengths.cumsum()
    # The place of each token of the sorted texts among those of the chunks.
    places = np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1])
    per_token = [np.concatenate([chunk.input_ids for chunk in chunks])[places]]
    has_types = chunks[0].token_type_ids is not None
    if has_types:
        per_token.append(np.concatenate([chunk.token_type_ids for chunk in chunks])[places])
    cuts, parts = _cuts(ends, min(batch_size * int(lengths[0]), most_tokens)), []
    for start, stop in pairwise(cuts):
        before, end = (int(ends[place - 1]) if place else 0 for place in (start, stop))
        bounds = np.concatenate([[0], ends[start:stop] - before])
        for part in (*(values[before:end] for values in per_token), bounds):
            parts.append(np.pad(part.astype(np.int32), (0, -len(part) % ALIGNED)))
    return Window(first + order, lengths, cuts, np.concatenate(parts), has_types)


def _cuts(ends: np.ndarray, most_tokens: int) -> list[int]:
    """Where batches of at most so many tokens begin, and where the last one ends; ends: of each text, int64 [N]."""
    cuts = [0]
    while cuts[-1] < len(ends):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        stop = int(np.searchsorted(ends, before + most_tokens, side="right"))
        cuts.append(max(stop, cuts[-1] + 1))
    return cuts
