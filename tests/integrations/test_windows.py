"""Windows contain every token once, batches keep their limits, and the thread ends with its caller."""

import threading
import time
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import graph_rules, windows
from fastbert.tokenization import PackedTokens
from fastbert.windows import ALIGNED, Window

CPU = torch.device("cpu")


class Counting:
    """A tokenizer for texts that are numbers. Text n at place i becomes n tokens with id i and token type i + 1."""

    def __init__(self, has_types: bool = True):
        self.calls, self.has_types = [], has_types

    def __call__(self, texts, first):
        self.calls.append((first, len(texts), threading.current_thread()))
        lengths = np.array(texts, dtype=np.int64)
        ids = np.repeat(np.arange(first, first + len(texts)), lengths).astype(np.int32)
        return PackedTokens(ids, ids + 1 if self.has_types else None, lengths)


def run(lengths: list[int], batch_size: int = 32, max_tokens: int = 64, tokenizer=None):
    def job(start, stop, stopped):
        return windows.window_of(tokenizer or Counting(), lengths[start:stop], start, batch_size, max_tokens, stopped)

    return windows.ahead(partial(job, *span) for span in windows.spans(len(lengths)))


@pytest.fixture
def small(monkeypatch):
    """Windows of 4, 8 and then 10 texts, tokenized 3 at a time."""
    for name, value in {"CHUNK": 3, "FIRST_WINDOW": 4, "LARGEST_WINDOW": 10}.items():
        monkeypatch.setattr(windows, name, value)


def tokenizing() -> list[threading.Thread]:
    return [x for x in threading.enumerate() if x.name == "fastbert-tokenizing"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=70).filter(any),
    batch_size=st.integers(1, 40),
    max_tokens=st.integers(1, 100),
    has_types=st.booleans(),
)
def test_every_token_is_in_one_batch_within_its_bounds(lengths, batch_size, max_tokens, has_types):
    found, spans = list(run(lengths, batch_size, max_tokens, Counting(has_types))), []
    for window in found:
        spans.append((window.rows.min(), window.rows.max() + 1))
        longest = int(window.lengths[0])
        limit = min(batch_size * longest, max_tokens)
        assert (np.diff(window.lengths) <= 0).all()
        assert window.lengths.tolist() == [lengths[row] for row in window.rows]
        rows = iter(window.rows.tolist())
        for count, inputs in window.batches(CPU):
            own, bounds = [next(rows) for _ in range(count)], inputs["cu_seq_lens_q"].tolist()
            assert np.diff(bounds).tolist() == [lengths[row] for row in own]
            assert bounds[0] == 0
            assert bounds[-1] <= limit or count == 1 or bounds[1] == bounds[-1]
            assert inputs["max_length_q"] == max(np.diff(bounds))
            ids = [row for row in own for _ in range(lengths[row])]
            assert inputs["input_ids"].tolist() == [ids]
            assert ("token_type_ids" in inputs) == has_types
            if has_types:
                assert inputs["token_type_ids"].tolist() == [[x + 1 for x in ids]]
            for tensor in inputs.values():
                if isinstance(tensor, torch.Tensor):
                    assert tensor.dtype == torch.int32
                    offset = tensor.data_ptr() - torch.from_numpy(window.packed).data_ptr()
                    assert offset % (4 * ALIGNED) == 0
        assert next(rows, None) is None
    assert [end for _, end in spans] == [start for start, _ in spans[1:]] + [len(lengths)]


def test_batches_are_as_full_as_they_may_be():
    (window,) = run([4] * 40, batch_size=5, max_tokens=64)
    assert [count for count, _ in window.batches(CPU)] == [5] * 8
    (window,) = run([4] * 40, batch_size=500, max_tokens=64)
    assert [count for count, _ in window.batches(CPU)] == [16, 16, 8]
    (window,) = run([100, 70, 3, 3], batch_size=500, max_tokens=64)
    assert [count for count, _ in window.batches(CPU)] == [1, 1, 2]


def test_windows_grow_and_are_tokenized_in_chunks(small):
    tokenizer = Counting()
    found = list(run([2] * 35, tokenizer=tokenizer))
    assert [len(window.rows) for window in found] == [4, 8, 10, 10, 3]
    assert [call[:2] for call in tokenizer.calls] == [
        (0, 3), (3, 1), (4, 3), (7, 3), (10, 2), (12, 3), (15, 3), (18, 3), (21, 1), (22, 3), (25, 3), (28, 3), (31, 1),
        (32, 3),
    ]  # fmt: skip
    mine = threading.current_thread()
    assert [thread is mine for *_, thread in tokenizer.calls] == [True] * 2 + [False] * 12


def test_the_next_window_is_made_while_the_caller_works(small):
    tokenizer = Counting()
    found = run([2] * 20, tokenizer=tokenizer)
    next(found)
    deadline = time.monotonic() + 10
    while len(tokenizer.calls) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(tokenizer.calls) == 5  # and none of the third window
    found.close()


def test_ahead_ends_with_the_first_none():
    jobs = iter([1, 2, None, 4])
    assert list(windows.ahead(lambda stopped: next(jobs) for _ in range(9))) == [1, 2]
    assert next(jobs) == 4
    assert list(windows.ahead([lambda stopped: None])) == []


def test_one_window_needs_no_thread(monkeypatch):
    monkeypatch.setattr(windows, "_Upcoming", None)
    assert len(list(run([3] * windows.FIRST_WINDOW))) == 1


def test_a_graph_may_be_captured_beside_the_thread(small):
    """The thread never uses the device."""
    go_on = threading.Event()

    class Waiting(Counting):
        def __call__(self, texts, first):
            assert first < 4 or go_on.wait(10)
            return super().__call__(texts, first)

    found = run([2] * 20, tokenizer=Waiting())
    next(found)
    assert len(tokenizing()) == 1
    assert graph_rules._why_threads_block() is None
    go_on.set()
    found.close()


def test_closing_ends_the_thread_within_a_chunk(small):
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(Counting):
        def __call__(self, texts, first):
            if first >= 4:
                begun.set()
                assert go_on.wait(10)
            return super().__call__(texts, first)

    tokenizer = Waiting()
    found = run([2] * 100, tokenizer=tokenizer)
    next(found)
    assert begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    found.close()
    assert tokenizing() == []
    assert len(tokenizer.calls) == 3


def test_an_error_in_the_thread_is_raised_in_the_place_of_its_result(small):
    class Failing(Counting):
        def __call__(self, texts, first):
            if first >= 12:
                raise TypeError(f"text {first}")
            return super().__call__(texts, first)

    found = run([2] * 40, tokenizer=Failing())
    assert len(next(found).rows) == 4
    assert len(next(found).rows) == 8
    with pytest.raises(TypeError, match="text 12"):
        next(found)
    assert tokenizing() == []
    with pytest.raises(TypeError, match="text 12"):
        list(run([2] * 40, tokenizer=lambda texts, first: Failing()(texts, 12)))


def test_a_window_knows_what_it_holds():
    window = Window(np.array([1, 0]), np.array([2, 1]), [0, 2], np.array([7, 8, 9, 0, 0, 2, 3, 0], np.int32), False)
    ((count, inputs),) = window.batches(CPU)
    assert count == 2
    assert inputs.keys() == {"input_ids", "cu_seq_lens_q", "max_length_q"}
    assert inputs["input_ids"].tolist() == [[7, 8, 9]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 2, 3]
    assert list(pairwise(window.cuts)) == [(0, 2)]
