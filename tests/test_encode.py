"""Bulk encoding: the vectors of sentence-transformers, of every line, whatever the file holds and whenever the process
dies."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from fastbert.cli import app
from fastbert.commands import encode, resumable
from fastbert.commands.encode import encode_file, token_batches
from fastbert.commands.resumable import Progress, ResumableNpy
from fastbert.commands.texts import docstrings
from fastbert.sentences import OnHost

sentence_transformers = pytest.importorskip("sentence_transformers", reason="encoding needs sentence-transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

SHORT = [" ".join(text.split())[:80] for text in docstrings(160)]


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory, tokenizer) -> str:
    """A folder of a BERT with two layers of 32 random values, without modules.json."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.5
    )
    transformers.BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory, bert_path) -> str:
    """The same BERT as a SentenceTransformer."""
    path = tmp_path_factory.mktemp("tiny")
    SentenceTransformer(bert_path, device="cpu").save(str(path))
    return str(path)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in" / "texts"
    path.parent.mkdir()
    path.write_text("\n".join(SHORT[:100]) + "\n")
    return path


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "out" / "vectors.npy"
    path.parent.mkdir()
    return path


def beside(path) -> set[str]:
    return {each.name for each in path.parent.iterdir()}


def expected(path: str, texts: list[str], **arguments) -> np.ndarray:
    return SentenceTransformer(path, device="cpu").encode(texts, **arguments)


def jsonl(texts) -> str:
    return "".join(json.dumps({"id": 0, "text": text}) + "\n" for text in texts)


def interrupted(source, output, path, blocks: int = 2, **arguments) -> None:
    """A run that dies after so many blocks of 20 lines."""
    calls = []

    def append(self, *given):
        if len(calls) == blocks:
            raise KeyboardInterrupt
        calls.append(given)
        real(self, *given)

    real = ResumableNpy.append
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableNpy, "append", append)
        encode_file(path, source, output, block_lines=20, **arguments)
    assert Progress.read(progress_of(output)).rows == 20 * blocks


def progress_of(output):
    return ResumableNpy(output).progress_path


@pytest.mark.parametrize("field", [None, "text"])
def test_the_vectors_are_those_of_sentence_transformers(source, output, minilm_path, field):
    texts = docstrings(40) if field else SHORT[:40]
    source.write_text(jsonl(texts) if field else "\n".join(texts))
    made = encode_file(minilm_path, source, output, field=field, block_lines=16, tokens=600)
    vectors = np.load(output, mmap_mode="r")
    assert (made.lines, made.dim, made.dtype, made.bad) == (40, 384, "float32", 0)
    assert vectors.shape == (40, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected(minilm_path, texts), rtol=0, atol=1e-5)
    assert beside(output) == {output.name}


def test_only_newlines_separate_texts(source, output, tiny_path):
    texts = ["one", "two\u2028still two", "", "  ", "three\rthree\x0b\x0c\u0085three", "", "\ufeffsix\r", "last\r"]
    ends = ["\r\n", "\n", "\n", "\n", "\n", "\r\n", "\r\n", ""]
    source.write_bytes("".join(map("".join, zip(texts, ends, strict=True))).encode())
    encode_file(tiny_path, source, output)
    np.testing.assert_allclose(np.load(output), expected(tiny_path, texts), rtol=0, atol=1e-5)


def test_of_an_end_one_carriage_return_belongs_to_it():
    lines = [b"a\r\n", b"a\r\r\n", b"a\r", b" a \n"]
    assert [encode._text(line, None) for line in lines] == ["a", "a\r", "a\r", " a "]


def test_a_file_without_lines(source, output, tiny_path):
    source.write_bytes(b"")
    assert encode_file(tiny_path, source, output).lines == 0
    assert np.load(output).shape == (0, 32)


def test_prompts(tmp_path, source, output, bert_path):
    """The model's own, one that is given, none; a pooling that leaves the prompt out has to know its length."""
    transformer = Transformer(bert_path)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean", include_prompt=False)
    path, texts = str(tmp_path / "prompted"), SHORT[:100]
    SentenceTransformer(
        modules=[transformer, pooling], device="cpu", prompts={"q": "a query: "}, default_prompt_name="q"
    ).save(path)
    wanted = [expected(path, texts), expected(path, texts, prompt="this: "), expected(path, texts, prompt="")]
    assert all(np.abs(wanted[i] - wanted[i - 1]).max() > 0.1 for i in range(3))
    for prompt, vectors in zip((None, "this: ", ""), wanted, strict=True):
        encode_file(path, source, output, prompt=prompt, tokens=300)
        np.testing.assert_allclose(np.load(output), vectors, rtol=0, atol=1e-5)
        output.unlink()


def test_a_model_that_truncates_its_vectors(tmp_path, source, output, bert_path):
    path = str(tmp_path / "truncating")
    SentenceTransformer(bert_path, device="cpu", truncate_dim=8).save(path)
    encode_file(path, source, output)
    np.testing.assert_allclose(np.load(output), expected(path, SHORT[:100]), rtol=0, atol=1e-5)
    assert np.load(output).shape == (100, 8)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, np.float16), (torch.bfloat16, np.float32)])
def test_dtypes(source, output, tiny_path, dtype, rows):
    encode_file(tiny_path, source, output, dtype=dtype)
    model = SentenceTransformer(tiny_path, device="cpu")
    truth = model.encode(SHORT[:100])
    error = np.abs(model.to(dtype).encode(SHORT[:100], convert_to_tensor=True).float().numpy() - truth).max()
    vectors = np.load(output)
    assert vectors.dtype == rows
    assert 0 < np.abs(vectors - truth).max() <= 3 * error


def test_a_folder_without_modules_gets_mean_pooling_and_says_so(source, output, bert_path, tiny_path):
    said = []
    encode_file(bert_path, source, output, report=said.append)
    assert said == [f"{bert_path} has no modules.json: a vector is the mean over its text's tokens"]
    np.testing.assert_allclose(np.load(output), expected(tiny_path, SHORT[:100]), rtol=0, atol=1e-5)


BAD = [
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 11"),
    (b"", "invalid JSON: Expecting value: line 1 column 1 (char 0)"),
    (b'{"text": "a"', "invalid JSON: Expecting ',' delimiter: line 1 column 13 (char 12)"),
    (b"[" * 100_000, "invalid JSON: "),
    (b'{"text": ' + b"1" * 5000 + b"}", "invalid JSON: "),
    (b'["text"]', "not a JSON object"),
    (b'{"texts": "a"}', "no field 'text'"),
    (b'{"text": null}', "field 'text' is not a string"),
    (b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair"),
]


def test_bad_lines_are_told_and_are_nan(source, output, tiny_path):
    """In a block with good lines and in blocks without."""
    source.write_bytes(b"\n".join([*(line for line, _ in BAD), *jsonl(["good", "better"]).encode().splitlines()]))
    said = []
    made = encode_file(tiny_path, source, output, field="text", block_lines=4, report=said.append)
    for number, (message, (_, reason)) in enumerate(zip(said, BAD, strict=True), 1):
        assert message.startswith(f"line {number}: {reason}")
        assert len(message.splitlines()) == 1
    vectors = np.load(output)
    assert (made.bad, made.bad_lines) == (len(BAD), list(range(1, len(BAD) + 1)))
    assert np.isnan(vectors[: len(BAD)]).all()
    np.testing.assert_allclose(vectors[len(BAD) :], expected(tiny_path, ["good", "better"]), rtol=0, atol=1e-5)


def test_bad_lines_of_before_a_resume_are_counted_and_the_first_kept(source, output, tiny_path, monkeypatch):
    monkeypatch.setattr(resumable, "BAD_LINES", 15)
    source.write_bytes(b"\n".join(b"text" if number % 2 else b"\xff" for number in range(1, 101)))
    interrupted(source, output, tiny_path)
    said = []
    made = encode_file(tiny_path, source, output, block_lines=20, report=said.append)
    assert (made.bad, made.bad_lines) == (50, list(range(2, 31, 2)))
    assert [message.split(":")[0] for message in said] == [
        "going on after line 40 of 100", *(f"line {number}" for number in range(42, 101, 2))
    ]  # fmt: skip


def test_a_killed_run_goes_on(source, output, minilm_path):
    source.write_text("\n".join(SHORT))
    once = output.with_name("once.npy")
    encode_file(minilm_path, source, once, block_lines=16)
    arguments = f"{minilm_path!r}, {str(source)!r}, {str(output)!r}, block_lines=16"
    code = f"from fastbert.commands.encode import encode_file; encode_file({arguments})"
    run = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while (progress := Progress.read(progress_of(output))) is None or progress.rows < 32:
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.005)
    finally:
        run.kill()
    assert run.wait() == -signal.SIGKILL
    assert not output.exists()
    done = Progress.read(progress_of(output)).rows
    said = []
    encode_file(minilm_path, source, output, block_lines=16, report=said.append)
    assert said == [f"going on after line {done} of 160"]
    assert output.read_bytes() == once.read_bytes()
    assert beside(output) == {output.name, once.name}


# Where a run touches the disk: it dies before each of their calls.
STEPS = [
    (json, "dump"), (os, "fsync"), (os, "posix_fallocate"), (Path, "replace"), (Path, "rename"), (Path, "unlink")
]  # fmt: skip


def test_dying_between_any_two_steps_loses_nothing(source, output, tiny_path, monkeypatch):
    monkeypatch.setattr(encode, "_load", cache(encode._load))
    source.write_text("\n".join(SHORT[:30]))
    once = output.with_name("once.npy")
    encode_file(tiny_path, source, once, block_lines=20)
    for deaths in count():
        steps = []

        def dying(real, deaths=deaths, steps=steps):
            def step(*given, **named):
                steps.append(real.__name__)
                if len(steps) > deaths:
                    raise KeyboardInterrupt
                return real(*given, **named)

            return step

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            for owner, name in STEPS:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            encode_file(tiny_path, source, output, block_lines=20)
        died = len(steps) > deaths
        assert output.exists() == (not died or (steps[-1] == "unlink" and "rename" in steps))
        if not output.exists():
            encode_file(tiny_path, source, output, block_lines=20)
        assert output.read_bytes() == once.read_bytes()
        for path in (output, progress_of(output)):
            path.unlink(missing_ok=True)
        if not died:
            break
    assert {*steps} == {name for _, name in STEPS}


def test_progress_counts_no_row_that_is_not_in_the_file(source, output, tiny_path, monkeypatch):
    def write(self, path):
        counted.append((self.rows, ResumableNpy(output).partial.read_bytes()[128 : 128 + self.rows * 32 * 4]))
        real(self, path)

    counted, real = [], Progress.write
    monkeypatch.setattr(Progress, "write", write)
    encode_file(tiny_path, source, output, block_lines=30)
    assert [rows for rows, _ in counted] == [0, 30, 60, 90, 100]
    assert all(np.load(output)[:rows].tobytes() == written for rows, written in counted)


def test_a_run_goes_on_from_the_progress_and_not_from_the_rows(source, output, tiny_path):
    """As after a crash of the machine: rows that no progress counts are written again."""
    once = output.with_name("once.npy")
    encode_file(tiny_path, source, once, block_lines=20)
    interrupted(source, output, tiny_path)
    with ResumableNpy(output).partial.open("r+b") as file:
        file.seek(128 + 40 * 32 * 4)
        file.write(b"\xff" * 5 * 32 * 4)
    encode_file(tiny_path, source, output, block_lines=20)
    assert output.read_bytes() == once.read_bytes()


def test_a_deleted_partial_file_begins_anew(source, output, tiny_path):
    interrupted(source, output, tiny_path)
    ResumableNpy(output).partial.unlink()
    encode_file(tiny_path, source, output)
    np.testing.assert_allclose(np.load(output), expected(tiny_path, SHORT[:100]), rtol=0, atol=1e-5)


def test_a_run_without_rows_binds_nothing(source, output, tiny_path):
    interrupted(source, output, tiny_path, blocks=0)
    source.write_text("another, shorter\n")
    encode_file(tiny_path, source, output, prompt="query: ")
    assert output.stat().st_size == 128 + 32 * 4


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"field": "text"}, "field"),
        ({"prompt": "query: "}, "prompt"),
        ({"dtype": torch.float16}, "dtype"),
        ({"field": "text", "prompt": "query: "}, "field and another prompt"),
        ("weights", "model"),
        ("length", "model"),
        ("input", "input"),
    ],
)
def test_a_run_of_something_else_does_not_go_on(tmp_path, source, output, tiny_path, other, differing):
    interrupted(source, output, tiny_path)
    files = {path: path.read_bytes() for path in output.parent.iterdir()}
    path, arguments = tiny_path, other
    if isinstance(other, str):
        arguments = {}
        if other == "input":
            source.write_text(source.read_text().replace("a", "b"))
        else:
            path, model = str(tmp_path / "other"), SentenceTransformer(tiny_path, device="cpu")
            if other == "weights":
                next(model.parameters()).data[0, 0] += 1
            else:
                model.max_seq_length = 9
            model.save(path)
    with pytest.raises(ValueError, match=f"was begun with another {differing}: delete it and .*json, or give another"):
        encode_file(path, source, output, **arguments)
    assert files == {path: path.read_bytes() for path in output.parent.iterdir()}


def test_batches_and_device_may_change_in_a_resume(source, output, tiny_path):
    interrupted(source, output, tiny_path)
    said = []
    encode_file(tiny_path, source, output, tokens=50, device="cpu", report=said.append)
    assert said == ["going on after line 40 of 100"]
    np.testing.assert_allclose(np.load(output), expected(tiny_path, SHORT[:100]), rtol=0, atol=1e-5)


def test_an_output_that_appears_meanwhile_stays(source, output, tiny_path, monkeypatch):
    monkeypatch.setattr(encode, "_blocks", lambda *given: output.write_text("somebody's") and iter(()))
    with pytest.raises(FileExistsError, match="vectors.npy exists already"):
        encode_file(tiny_path, source, output)
    assert output.read_text() == "somebody's"


def _input_is_the_output(source, output):
    os.link(source, output)


def _input_is_the_partial_file(source, output):
    os.link(source, ResumableNpy(output).partial)


def _foreign_partial_file(source, output):
    ResumableNpy(output).partial.write_text("somebody's")


def _foreign_progress(source, output):
    progress_of(output).write_text('{"rows": 3}')


def _pipe(source, output):
    source.unlink()
    os.mkfifo(source)


def _folder(source, output):
    source.unlink()
    source.mkdir()


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda source, output: output.touch(), FileExistsError, "vectors.npy exists already: delete it"),
        (lambda source, output: output.parent.rmdir(), FileNotFoundError, "no such folder: '.*/out'"),
        (lambda source, output: source.unlink(), FileNotFoundError, "No such file .*/texts'"),
        (_folder, OSError, "texts is a folder or a pipe"),
        (_pipe, OSError, "texts is a folder or a pipe"),
        (_input_is_the_output, ValueError, "texts would be written over"),
        (_input_is_the_partial_file, ValueError, "texts would be written over"),
        (_foreign_partial_file, FileExistsError, "partial is not the beginning of a run: delete it"),
        (_foreign_progress, ValueError, "progress.json is not the progress of a run: delete it"),
    ],
)
def test_what_is_refused(source, output, tiny_path, prepare, error, message):
    prepare(source, output)
    files = beside(output) if output.parent.exists() else None
    with pytest.raises(error, match=message):
        encode_file(tiny_path, source, output)
    assert not output.parent.exists() or beside(output) == files


def test_wrong_arguments(source, output, tiny_path):
    with pytest.raises(ValueError, match="tokens=0"):
        encode_file(tiny_path, source, output, tokens=0)
    with pytest.raises(FileNotFoundError, match="nowhere/at/all"):
        encode_file("nowhere/at/all", source, output)
    assert beside(output) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(source, output, tiny_path):
    output.parent.chmod(0o500)
    with pytest.raises(PermissionError, match="vectors.npy"):
        encode_file(tiny_path, source, output)


def test_a_full_disk_is_an_error_at_the_start(source, output, tiny_path, monkeypatch):
    def full(file, offset, size):
        os.ftruncate(file, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"12,928 bytes for the vectors: No space left on device: '.*/vectors.npy'"):
        encode_file(tiny_path, source, output)
    assert beside(output) == set()


def test_two_runs_at_once_are_refused(source, output, tiny_path):
    with ResumableNpy(output).locked(), pytest.raises(RuntimeError, match="another run is writing .*partial"):
        encode_file(tiny_path, source, output)
    encode_file(tiny_path, source, output)


def test_an_input_that_changes_meanwhile(source, output, tiny_path, monkeypatch):
    def vectors(*given):
        with source.open("a") as file:
            file.write("one more\n")
        return real(*given)

    real = encode._vectors
    monkeypatch.setattr(encode, "_vectors", vectors)
    with pytest.raises(RuntimeError, match="texts changed while it was read"):
        encode_file(tiny_path, source, output)
    assert not output.exists()


def test_a_batch_that_does_not_fit_on_the_device(source, output, tiny_path, monkeypatch):
    def forward(self, features):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SentenceTransformer, "forward", forward)
    with pytest.raises(RuntimeError, match=r"a batch \(1, 3\) does not fit on the device: --tokens 300"):
        encode_file(tiny_path, source, output, tokens=600)


def test_memory_does_not_grow_with_the_lines(tmp_path, output, tiny_path, monkeypatch):
    def begin(*given):
        tracemalloc.start()
        return real(*given)

    real = ResumableNpy.begin
    monkeypatch.setattr(ResumableNpy, "begin", begin)
    peaks = []
    for lines in (400, 4000):
        source = tmp_path / str(lines)
        source.write_text("a text\n" * lines)
        encode_file(tiny_path, source, output, block_lines=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        output.unlink()
    # The vectors of 3600 lines are 460 kB, the lines as strings 200 kB.
    assert peaks[1] - peaks[0] < 100_000


def test_long_lines_end_a_block(source, output, tiny_path, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK_BYTES", 450)
    with source.open("rb") as file:
        blocks = list(iter(lambda: encode._read_lines(file, 10), []))
    assert b"".join(b"".join(lines) for lines in blocks) == source.read_bytes()
    assert {len(lines) == 10 for lines in blocks} == {True, False}
    for lines in blocks[:-1]:
        assert len(lines) == 10 or sum(map(len, lines)) >= 450
        assert sum(map(len, lines[:-1])) < 450
    encode_file(tiny_path, source, output, block_lines=10)
    np.testing.assert_allclose(np.load(output), expected(tiny_path, SHORT[:100]), rtol=0, atol=1e-5)


def test_a_block_is_made_while_the_one_before_is_worked_on():
    made = [Event() for _ in range(4)]

    def items():
        for number in range(3):
            made[number].set()
            yield number
        made[3].set()

    seen = []
    for number in encode._ahead(items()):
        assert made[number + 1].wait(10)
        seen.append(number)
    assert seen == [0, 1, 2]


def features_of(lengths: list[int], padding_side: str) -> dict:
    """As `preprocess` gives them: each token has the id 1000 * its text's number + its place in the text + 1."""
    longest = max(lengths)
    input_ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    for number, length in enumerate(lengths):
        first = longest - length if padding_side == "left" else 0
        input_ids[number, first : first + length] = 1000 * number + torch.arange(length) + 1
    mask = (input_ids > 0).long()
    rest = {
        "on_host": OnHost(mask.numpy()),
        "number": torch.arange(len(lengths)),
        "modality": "text",
        "prompt_length": 2,
    }
    return {"input_ids": input_ids, "attention_mask": mask, **rest}


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("lengths", [[3], [5, 1, 9, 5, 30, 2, 2, 7], [4] * 9, [0, 3, 0], [1, 0, 25]])
@pytest.mark.parametrize("tokens", [1, 12, 20, 1000])
def test_batches_keep_the_budget_and_every_token(lengths, padding_side, tokens):
    seen = []
    for rows, batch in token_batches(features_of(lengths, padding_side), tokens):
        input_ids, mask = batch["input_ids"], batch["attention_mask"]
        size, longest = input_ids.shape
        assert input_ids.numel() <= tokens or size == 1
        assert longest == max(1, *(lengths[row] for row in rows))
        assert torch.equal(mask, (input_ids > 0).long())
        assert np.array_equal(batch["on_host"].array, mask.numpy())
        assert batch["number"].tolist() == rows.tolist()
        assert (batch["modality"], batch["prompt_length"]) == ("text", 2)
        for row, ids in zip(rows, input_ids, strict=True):
            assert ids[ids > 0].tolist() == [1000 * row + place + 1 for place in range(lengths[row])]
            assert (ids[-1 if padding_side == "left" else 0] > 0) == (lengths[row] > 0)
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[row] for row in seen] == sorted(lengths, reverse=True)


def test_what_is_missing_without_sentence_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    spec = importlib.util.spec_from_file_location("encode_alone", encode.__file__)
    with pytest.raises(ImportError, match=r"pip install 'fastbert-triton\[encode\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def command(*arguments):
    return CliRunner().invoke(app, ["encode", *map(str, arguments)])


def test_the_command(source, output, tiny_path):
    source.write_text(jsonl(["one", "two"]) + "three\n")
    done = command(tiny_path, source, "-o", output, "--field", "text", "--prompt", "p: ", "--dtype", "float16")
    assert (done.exit_code, done.stdout) == (
        1, f"{output}: float16 [3, 32]\nrows of NaN, for lines that are no text: 3\n"
    )  # fmt: skip
    assert done.stderr == "line 3: invalid JSON: Expecting value: line 1 column 1 (char 0)\n"
    vectors = np.load(output)
    np.testing.assert_allclose(vectors[:2], expected(tiny_path, ["p: one", "p: two"]), rtol=0, atol=0.05)
    again = command(tiny_path, source, "-o", output)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"fastbert: {output} exists already: delete it, or give another -o\n"
    output.unlink()
    plain = command(tiny_path, source, "-o", output, "--tokens", 64, "--device", "cpu")
    assert (plain.exit_code, plain.stdout, plain.stderr) == (0, f"{output}: float32 [3, 32]\n", "")


def test_an_interrupted_command_says_how_to_go_on(source, output, tiny_path, monkeypatch):
    def append(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumableNpy, "append", append)
    done = command(tiny_path, source, "-o", output)
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "fastbert: interrupted; the same command goes on from here\n"
