"""`fastbert encode` gives sentence-transformers' vector for every line, for any file, and after a crash at any time."""

import errno
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from fastbert.cli import app
from fastbert.commands import encode, lines, resumable
from fastbert.commands.encode import encode_file
from fastbert.commands.resumable import Progress, ResumableNpy
from fastbert.commands.texts import docstrings
from fastbert.inference import PackedEncoder

sentence_transformers = pytest.importorskip("sentence_transformers", reason="encoding needs sentence-transformers")
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer  # noqa: E402

SHORT = [" ".join(text.split())[:80] for text in docstrings(160)]


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory, tokenizer) -> str:
    """The folder of a BERT with two layers of width 32, random weights and no modules.json."""
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
    """The folder of the same BERT as a SentenceTransformer."""
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


def without_progress(said: list[str]) -> list[str]:
    return [message for message in said if not message.endswith(" tokens/s")]


def jsonl(texts) -> str:
    return "".join(json.dumps({"id": 0, "text": text}) + "\n" for text in texts)


def interrupted(source, output, path, blocks: int = 2, **arguments) -> None:
    """Run `encode_file` with blocks of 20 lines and interrupt it after some blocks."""
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


def without_a_probe(self, embedder, prompt, tokens, report):
    self._embedder, self._prompt, self._tokens = embedder, prompt, tokens
    self._packed = PackedEncoder(embedder, 1, False, prompt, tokens, max_tokens=tokens)
    self.dim, self.dtype = 32, np.dtype(np.float32)


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


def test_one_carriage_return_belongs_to_the_end_of_a_line():
    ended = [b"a\r\n", b"a\r\r\n", b"a\r", b" a \n"]
    assert [lines.text_of(line, None) for line in ended] == ["a", "a\r", "a\r", " a "]


@pytest.mark.parametrize("field", [None, "text"])
def test_a_bom_is_no_part_of_the_text(source, output, tiny_path, field):
    """Only at the start of the file. A resumed run starts elsewhere."""
    texts = [*SHORT[:40], "\ufeffa bom amid"]
    source.write_text("\ufeff" + (jsonl(texts) if field else "\n".join(texts)))
    interrupted(source, output, tiny_path, field=field)
    made = encode_file(tiny_path, source, output, field=field)
    assert (made.lines, made.bad) == (41, 0)
    np.testing.assert_allclose(np.load(output), expected(tiny_path, texts), rtol=0, atol=1e-5)
    with io.BytesIO(b"\xef\xbb\xbf\xef\xbb\xbfone\n\xef\xbb\xbftwo") as file:
        assert lines.read_lines(file, 1) == [b"\xef\xbb\xbfone\n"]
        assert lines.read_lines(file, 1) == [b"\xef\xbb\xbftwo"]


def test_a_file_of_a_bom_alone_is_one_empty_text(source, output, tiny_path):
    source.write_text("\ufeff")
    assert encode_file(tiny_path, source, output).lines == 1
    np.testing.assert_allclose(np.load(output), expected(tiny_path, [""]), rtol=0, atol=1e-5)


def test_a_file_without_lines(source, output, tiny_path):
    source.write_bytes(b"")
    assert encode_file(tiny_path, source, output).lines == 0
    assert np.load(output).shape == (0, 32)


def test_prompts(tmp_path, source, output, bert_path):
    """The model's default prompt, a given one, and none. Poolings that exclude the prompt need its length."""
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
    assert without_progress(said) == [
        f"{bert_path} has no modules.json: vectors are the mean over the tokens of a text"
    ]
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


def test_bad_lines_are_logged_and_are_nan(source, output, tiny_path):
    """In blocks with and without good lines."""
    source.write_bytes(b"\n".join([*(line for line, _ in BAD), *jsonl(["good", "better"]).encode().splitlines()]))
    said = []
    made = encode_file(tiny_path, source, output, field="text", block_lines=4, report=said.append)
    for number, (message, (_, reason)) in enumerate(zip(without_progress(said), BAD, strict=True), 1):
        assert message.startswith(f"line {number}: {reason}")
        assert len(message.splitlines()) == 1
    vectors = np.load(output)
    assert (made.bad, made.bad_lines) == (len(BAD), list(range(1, len(BAD) + 1)))
    assert np.isnan(vectors[: len(BAD)]).all()
    np.testing.assert_allclose(vectors[len(BAD) :], expected(tiny_path, ["good", "better"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "field", "why"),
    [
        (b"not json\n" + jsonl(SHORT[:9]).encode(), "txt", "10 lines is a text; line 2: no field 'txt' "),
        (b'{"text": null, "id": 1}\n\n', "text", "2 lines is a text; line 1: field 'text' is not a string "),
        (b"plain\ntext\n", "text", "2 lines is a text; line 1: invalid JSON: Expecting value"),
        ("né\né".encode("latin-1"), None, "2 lines is a text; line 1: invalid UTF-8 at byte 2"),
    ],
)
def test_an_input_without_any_text_raises_before_anything_is_written(
    source, output, tiny_path, content, field, why, monkeypatch
):
    source.write_bytes(content)
    monkeypatch.setattr(Path, "touch", None)
    with pytest.raises(ValueError, match=re.escape(f"texts: none of the first {why}")) as raised:
        encode_file(tiny_path, source, output, field=field)
    names = "'text', 'id'" if b"null" in content else "'id', 'text'"
    assert str(raised.value).endswith(f"(its fields are {names})") == (b"{" in content)
    assert beside(output) == set()


def test_of_many_bad_lines_the_first_are_logged(source, output, tiny_path, monkeypatch):
    """The limit holds across blocks: the third message is the last one of the first block."""
    monkeypatch.setattr(encode, "REPORTED_LINES", 3)
    source.write_bytes(b"text\n" + b"\xff\n" * 99)
    said = []
    made = encode_file(tiny_path, source, output, block_lines=4, report=said.append)
    assert [message.split(":")[0] for message in without_progress(said)] == [
        "line 2", "line 3", "line 4", "line 5 is not a text either"
    ]  # fmt: skip
    assert (made.bad, made.bad_lines) == (99, list(range(2, 101)))


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_else_lines(source, output, tiny_path, monkeypatch, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    interrupted(source, output, tiny_path)
    # a clock that advances only when it is read
    clock = SimpleNamespace(monotonic=iter(range(0, 10_000, 25)).__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr(encode, "time", clock)
    said = []
    made = encode_file(tiny_path, source, output, block_lines=20, report=said.append)
    assert ("100/100" in stderr.getvalue()) == terminal
    told = r"(\d+) of 100 lines, ([\d.]+) texts/s, [\d,]+ tokens/s"
    lines_done = [re.fullmatch(told, message) for message in said[1:]]
    if terminal:
        assert lines_done == []
    else:
        assert lines_done[0][1] != "100"
        assert (lines_done[-1][1], lines_done[-1][2]) == ("100", f"{made.rate:.1f}")
    assert 0 < made.rate < 60 / 25


def test_bad_lines_before_a_resume_are_counted_and_the_first_kept(source, output, tiny_path, monkeypatch):
    monkeypatch.setattr(resumable, "BAD_LINES", 15)
    source.write_bytes(b"\n".join(b"text" if number % 2 else b"\xff" for number in range(1, 101)))
    interrupted(source, output, tiny_path)
    said = []
    made = encode_file(tiny_path, source, output, block_lines=20, report=said.append)
    assert (made.bad, made.bad_lines) == (50, list(range(2, 31, 2)))
    assert [message.split(":")[0] for message in without_progress(said)] == [
        "continuing after line 40 of 100", *(f"line {number}" for number in range(42, 101, 2))
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
    assert without_progress(said) == [f"continuing after line {done} of 160"]
    assert output.read_bytes() == once.read_bytes()
    assert beside(output) == {output.name, once.name}


# The functions that touch the disk. The run dies before each call of one.
STEPS = [
    (json, "dump"), (os, "fsync"), (os, "posix_fallocate"), (Path, "replace"), (Path, "rename"), (Path, "unlink")
]  # fmt: skip


def test_dying_between_any_two_steps_loses_nothing(source, output, tiny_path, monkeypatch):
    monkeypatch.setattr(encode, "load", cache(encode.load))
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
    """After a crash of the machine, rows that the progress file does not count are written again."""
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


def test_a_run_without_rows_may_be_replaced(source, output, tiny_path):
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
    source.write_text(jsonl(SHORT[:100]))
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
    assert without_progress(said) == ["continuing after line 40 of 100"]
    np.testing.assert_allclose(np.load(output), expected(tiny_path, SHORT[:100]), rtol=0, atol=1e-5)


def test_an_output_that_appears_meanwhile_stays(source, output, tiny_path, monkeypatch):
    def reading(*given):
        output.write_text("another")
        return real(*given)

    real = encode._reading
    monkeypatch.setattr(encode, "_reading", reading)
    with pytest.raises(FileExistsError, match="vectors.npy exists already"):
        encode_file(tiny_path, source, output)
    assert output.read_text() == "another"


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
        (lambda source, output: output.mkdir(), IsADirectoryError, "npy is a folder: name a file, .*npy/vectors.npy"),
        (lambda source, output: output.parent.rmdir(), FileNotFoundError, "^there is no folder .*/out for the output"),
        (lambda source, output: source.unlink(), FileNotFoundError, "^there is no input file .*/texts$"),
        (_folder, OSError, "texts is a folder or a pipe"),
        (_pipe, OSError, "texts is a folder or a pipe"),
        (_input_is_the_output, ValueError, "texts would be overwritten"),
        (_input_is_the_partial_file, ValueError, "texts would be overwritten"),
        (_foreign_partial_file, FileExistsError, "partial was not left by a run: delete it"),
        (_foreign_progress, ValueError, "progress.json is not a progress file: delete it"),
    ],
)
def test_unsupported_inputs_and_outputs_raise(source, output, tiny_path, prepare, error, message):
    prepare(source, output)
    files = beside(output) if output.parent.exists() else None
    with pytest.raises(error, match=message):
        encode_file(tiny_path, source, output)
    assert not output.parent.exists() or beside(output) == files


def test_wrong_arguments(source, output, tiny_path):
    with pytest.raises(ValueError, match="tokens=0"):
        encode_file(tiny_path, source, output, tokens=0)
    for model in ("nowhere/at/all", "./my-modl", str(output.parent / "nothing")):
        with pytest.raises(OSError, match=re.escape(f"there is no folder {model}, and it is not a valid name")):
            encode_file(model, source, output)
    with pytest.raises(IsADirectoryError, match="^. is a folder: name a file, such as -o vectors.npy"):
        encode_file(tiny_path, source, ".")
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


def test_two_runs_at_once_raise(source, output, tiny_path):
    with ResumableNpy(output).locked(), pytest.raises(RuntimeError, match="another run is writing .*partial"):
        encode_file(tiny_path, source, output)
    encode_file(tiny_path, source, output)


def test_an_input_that_changes_meanwhile(source, output, tiny_path, monkeypatch):
    def of(*given):
        with source.open("a") as file:
            file.write("one more\n")
        return real(*given)

    real = encode._Embedder.of
    monkeypatch.setattr(encode._Embedder, "of", of)
    with pytest.raises(RuntimeError, match="texts changed while it was read"):
        encode_file(tiny_path, source, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("fits", "advice"),
    [
        (1, r"a batch of (\d+) tokens does not fit on the device: --tokens (\d+)"),
        (0, "a single text of 3 tokens does not fit on the device: no --tokens helps, but a smaller --dtype"),
    ],
)
def test_a_batch_that_does_not_fit_on_the_device(source, output, tiny_path, monkeypatch, fits, advice):
    """The advice is half of the failed batch's tokens, since a batch may be far smaller than the budget."""

    def call(self, features, **kwargs):
        if len(features["cu_seq_lens_q"]) - 1 > fits:
            raise torch.OutOfMemoryError
        return self.forward(features, **kwargs)

    source.write_text("\n".join(SHORT[:100]) if fits else "word")
    monkeypatch.setattr(SentenceTransformer, "__call__", call)
    if not fits:
        monkeypatch.setattr(encode._Embedder, "__init__", without_a_probe)
    with pytest.raises(RuntimeError, match=advice) as error:
        encode_file(tiny_path, source, output, tokens=100_000)
    if fits:
        num_tokens, tokens = map(int, re.search(advice, str(error.value)).groups())
        assert 500 < num_tokens == 2 * tokens + num_tokens % 2


def test_a_model_that_takes_padded_batches(source, output, bert_path, tmp_path):
    """Its texts run through sentence-transformers' code, as in `SentenceTransformer.encode`."""
    transformer = Transformer(bert_path)
    transformer.tokenizer.padding_side = "left"
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(tmp_path / "left"))
    said = []
    made = encode_file(str(tmp_path / "left"), source, output, block_lines=30, tokens=2000, report=said.append)
    assert "positions depend on the batch" in said[0]
    assert made.tokens_rate is None
    assert said[-1].endswith(" texts/s")
    assert np.load(output).shape == (100, 32)
    assert not np.isnan(np.load(output)).any()


def test_padded_batches_that_do_not_fit_without_a_length_limit(source, output, bert_path, tmp_path, monkeypatch):
    transformer = Transformer(bert_path)
    transformer.tokenizer.padding_side = "left"
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(tmp_path / "left"))
    plain = SentenceTransformer.encode

    def call(self, texts, **kwargs):
        if len(texts) > 1:
            raise torch.OutOfMemoryError
        return plain(self, texts, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "max_seq_length", None)
    monkeypatch.setattr(SentenceTransformer, "encode", call)
    with pytest.raises(RuntimeError, match="does not fit on the device"):
        encode_file(str(tmp_path / "left"), source, output)


def test_a_model_without_a_configuration_is_named(source, output, tokenizer, tmp_path):
    static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    with pytest.raises(TypeError, match="found no transformers model in a .*SentenceTransformer"):
        encode_file(str(tmp_path / "static"), source, output)


def test_texts_without_any_token(source, output, bert_path, tmp_path):
    transformer = Transformer(bert_path)
    transformer.tokenizer.backend_tokenizer.post_processor = None
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(tmp_path / "bare"))
    source.write_text("one\ntwo\n\nfour\nfive\n")
    encode_file(str(tmp_path / "bare"), source, output, block_lines=2)
    vectors, theirs = np.load(output), expected(str(tmp_path / "bare"), ["one", "two", "four", "five"])
    np.testing.assert_allclose(vectors[[0, 1, 3, 4]], theirs, rtol=0, atol=1e-5)


def test_memory_does_not_grow_with_the_lines(tmp_path, output, tiny_path, monkeypatch):
    def begin(*given):
        tracemalloc.start()
        return real(*given)

    real = ResumableNpy.begin
    monkeypatch.setattr(ResumableNpy, "begin", begin)
    peaks = []
    for number in (400, 4000):
        source = tmp_path / str(number)
        source.write_text("a text\n" * number)
        encode_file(tiny_path, source, output, block_lines=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        output.unlink()
    # The vectors of 3600 lines are 460 kB, the lines as strings 200 kB.
    assert peaks[1] - peaks[0] < 150_000


def test_long_lines_end_a_block(source, output, tiny_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 450)
    with source.open("rb") as file:
        blocks = list(iter(lambda: lines.read_lines(file, 10), []))
    assert b"".join(map(b"".join, blocks)) == source.read_bytes()
    assert {len(block) == 10 for block in blocks} == {True, False}
    for block in blocks[:-1]:
        assert len(block) == 10 or sum(map(len, block)) >= 450
        assert sum(map(len, block[:-1])) < 450
    encode_file(tiny_path, source, output, block_lines=10)
    np.testing.assert_allclose(np.load(output), expected(tiny_path, SHORT[:100]), rtol=0, atol=1e-5)


def test_a_block_is_written_while_the_device_works_on_the_next(source, output, tiny_path, monkeypatch):
    log = []

    def noting(kind, name, of):
        real = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *given: log.append(of(*given)) or real(self, *given))

    noting(encode._Embedder, "of", lambda block, told: f"begin {block.end}")
    noting(ResumableNpy, "append", lambda rows, offset, bad: f"write {offset}")
    encode_file(tiny_path, source, output, block_lines=40)
    ends = [int(entry.split()[1]) for entry in log if entry.startswith("write")]
    assert len(ends) == 3
    assert log == [f"begin {ends[0]}", f"begin {ends[1]}", f"write {ends[0]}", f"begin {ends[2]}", f"write {ends[1]}",
                   f"write {ends[2]}"]  # fmt: skip


def parquet(path):
    return pytest.importorskip("pyarrow.parquet").ParquetFile(path)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_parquet(source, output, tiny_path, dtype, monkeypatch):
    """Parquet has the same rows, also after a resume, in row groups of one size."""
    monkeypatch.setattr(resumable, "ROW_GROUP", 32)
    source.write_bytes(b"\n".join([*(text.encode() for text in SHORT[:99]), b"\xff"]))
    encode_file(tiny_path, source, output, block_lines=20, dtype=dtype)
    vectors = np.load(output)
    output.unlink()
    path = output.with_suffix(".parquet")
    interrupted(source, path, tiny_path, dtype=dtype)
    encode_file(tiny_path, source, path, block_lines=20, dtype=dtype)
    assert beside(path) == {path.name}
    made = parquet(path)
    number = "halffloat" if dtype else "float"
    assert str(made.schema_arrow) == f"vector: fixed_size_list<element: {number}>[32]\n  child 0, element: {number}"
    assert [made.metadata.row_group(i).num_rows for i in range(made.num_row_groups)] == [32, 32, 32, 4]
    found = made.read()["vector"].combine_chunks().flatten().to_numpy().reshape(100, 32)
    assert np.array_equal(found, vectors, equal_nan=True)
    assert np.isnan(found[99]).all()
    with pytest.raises(FileExistsError, match="exists already"):
        encode_file(tiny_path, source, path)


def test_a_run_that_died_while_parquet_was_made_goes_on(source, output, tiny_path, monkeypatch):
    path = output.with_suffix(".parquet")
    parquet_module = pytest.importorskip("pyarrow.parquet")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            parquet_module.ParquetWriter, "write_table", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        encode_file(tiny_path, source, path)
    assert not path.exists()
    said = []
    encode_file(tiny_path, source, path, report=said.append)
    assert "continuing after line 100 of 100" in said
    assert beside(path) == {path.name}
    assert parquet(path).metadata.num_rows == 100


def test_parquet_of_no_lines(source, output, tiny_path):
    source.write_text("")
    encode_file(tiny_path, source, output.with_suffix(".parquet"))
    assert parquet(output.with_suffix(".parquet")).metadata.num_rows == 0


def test_parquet_without_pyarrow(source, output, tiny_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ImportError, match=r"vectors.parquet needs pyarrow .*: pip install pyarrow, or name a .npy file"
    ):
        encode_file(tiny_path, source, output.with_suffix(".parquet"))
    assert beside(output) == set()


def test_missing_sentence_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    spec = importlib.util.spec_from_file_location("encode_alone", encode.__file__)
    with pytest.raises(ImportError, match=r"pip install 'fastbert-triton\[encode\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_without_locks(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("resumable_alone", resumable.__file__)
    with pytest.raises(ImportError, match="encode needs a POSIX system"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def command(*arguments):
    return CliRunner().invoke(app, ["encode", *map(str, arguments)])


def test_the_command(source, output, tiny_path):
    source.write_text(jsonl(["one", "two"]) + "three\n")
    done = command(tiny_path, source, "-o", output, "--field", "text", "--prompt", "p: ", "--dtype", "float16")
    assert done.exit_code == 1
    nan_rows = "rows of NaN, for lines that are not texts: 3"
    waited = r"waited for reading and tokenizing [\d.]+ s, the device [\d.]+ s, writing [\d.]+ s"
    said = rf"{output}: float16 \[3, 32\], [\d,.]+ texts/s, [\d,]+ tokens/s\n{waited}\n{nan_rows}\n"
    assert re.fullmatch(said, done.stdout)
    bad, progress = done.stderr.splitlines()
    assert bad == "line 3: invalid JSON: Expecting value: line 1 column 1 (char 0)"
    assert re.fullmatch(r"3 of 3 lines, [\d,.]+ texts/s, [\d,]+ tokens/s", progress)
    vectors = np.load(output)
    np.testing.assert_allclose(vectors[:2], expected(tiny_path, ["p: one", "p: two"]), rtol=0, atol=0.05)
    again = command(tiny_path, source, "-o", output)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"fastbert: {output} exists already: delete it, or give another -o\n"
    output.unlink()
    plain = command(tiny_path, source, "-o", output, "--tokens", 64, "--device", "cpu")
    assert (plain.exit_code, without_progress(plain.stderr.splitlines())) == (0, [])
    assert plain.stdout.startswith(f"{output}: float32 [3, 32], ")


@pytest.mark.parametrize("done", [0, 1])
def test_an_interrupted_command_says_how_to_go_on(source, output, tiny_path, monkeypatch, done):
    """It stops after the current block is on the disk."""

    def write(*given):
        if len(writes) > done:
            raise KeyboardInterrupt
        writes.append(given)
        real(*given)

    writes, real = [], Progress.write
    monkeypatch.setattr(Progress, "write", write)
    monkeypatch.setattr(encode, "CPU_BLOCK_LINES", 30)
    ended = command(tiny_path, source, "-o", output)
    assert (ended.exit_code, ended.stdout) == (130, "")
    how = "30 of 100 lines are done: repeat the command to continue\n" if done else ""
    assert ended.stderr == f"{how}fastbert: interrupted\n"
