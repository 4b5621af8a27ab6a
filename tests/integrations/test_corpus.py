"""A corpus on Ray Data: every row gets the vector that one process gives it, whatever is killed on the way."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from fastbert.cli import app
from fastbert.commands.texts import docstrings

ray = pytest.importorskip("ray", reason="fastbert.ray needs Ray")
from ray.data import ActorPoolStrategy  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

from fastbert.inference import PackedEncoder  # noqa: E402
from fastbert.ray import Embed, corpus  # noqa: E402
from fastbert.ray.corpus import encode_corpus  # noqa: E402
from fastbert.ray.files import MANIFEST, Corpus, nested  # noqa: E402
from fastbert.ray.inputs import find, parts, resolve  # noqa: E402

pytestmark = pytest.mark.xdist_group("ray")
TEXTS = [" ".join(text.split())[:80] for text in docstrings(600)]
ROWS, MANY = 20, 60  # of a part


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def embed(tiny_path) -> Embed:
    return Embed(tiny_path)


@pytest.fixture(scope="module")
def expected(tiny_path):
    encoder = SentenceTransformer(tiny_path, device="cpu")

    def of(texts: list[str], **arguments) -> np.ndarray:
        return encoder.encode(texts, **arguments)

    return of


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """[N, dim], with NaN for nulls."""
    size = column.type.list_size
    return np.array([[np.nan] * size if row is None else row for row in column.to_pylist()], np.float32)


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def write_parquet(path: Path, texts: list, **columns) -> None:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()), **columns}), path, row_group_size=7)


def output_of(path: Path) -> dict[str, pa.Table]:
    """The table of each input file, in the order of the output's files."""
    table = ds.dataset(path).to_table()
    names = table["file"].unique().to_pylist()
    return {name: table.filter(pa.compute.equal(table["file"], name)) for name in names}


def assert_complete(path: Path, wanted: dict[str, np.ndarray]) -> None:
    """Check that the output has each row of the input once, in order, with its vector."""
    found = output_of(path)
    assert found.keys() == {name for name, of_file in wanted.items() if len(of_file)}
    for name, table in found.items():
        assert table["row"].to_pylist() == list(range(len(wanted[name])))
        assert_close(vectors(table["vector"]), wanted[name])
    assert not list(path.rglob("*.partial"))


def parts_of(path: Path) -> dict[str, int]:
    """The time in nanoseconds at which each part was written."""
    return {str(each): each.stat().st_mtime_ns for each in path.rglob("*-*.parquet")}


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.01)


def processes(title: str) -> list[int]:
    """The ids of the processes whose title begins so."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                if (each / "cmdline").read_text().startswith(title):
                    found.append(int(each.name))
            except OSError:  # it has ended
                continue
    return found


# Embed


def test_embed_adds_the_vectors_of_encode(embed, expected):
    batch = pa.table({"id": range(50), "text": TEXTS[:50]})
    found = embed(batch)
    assert found.column_names == ["id", "text", "vector", "error"]
    assert found.select(["id", "text"]).equals(batch)
    assert found["vector"].type == pa.list_(pa.float32(), 48)
    assert_close(vectors(found["vector"]), expected(TEXTS[:50]))
    assert found["error"].null_count == 50


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_embed_takes_every_type_of_string(embed, expected, kind):
    found = embed(pa.table({"text": pa.array(TEXTS[:5]).cast(kind)}))
    assert_close(vectors(found["vector"]), expected(TEXTS[:5]))


def test_a_bad_row_becomes_null_with_its_reason(embed, expected):
    encoded = [b"good", b"\xff\xfe", None, b"", b"nul\x00byte", b"cut \xe2\x82"]
    found = embed(pa.table({"text": pa.array(encoded, pa.binary()).view(pa.string())}))
    assert found["error"].to_pylist() == [None, "invalid UTF-8 at byte 1", "it is null", None, None,
                                          "invalid UTF-8 at byte 5"]  # fmt: skip
    assert found["vector"].is_null().to_pylist() == [False, True, True, False, False, True]
    assert_close(vectors(found["vector"])[[0, 3, 4]], expected(["good", "", "nul\x00byte"]))


def test_a_batch_without_any_text(embed):
    for rows in ([], [None, None]):
        found = embed(pa.table({"text": pa.array(rows, pa.string())}))
        assert found["vector"].type == pa.list_(pa.float32(), 48)
        assert found["vector"].null_count == found.num_rows == len(rows)


def test_a_text_that_cannot_be_tokenized_fails_alone(tiny_path, expected):
    embed = Embed(tiny_path)
    embed.encoder.tokenizer.backend_tokenizer.model.unk_token = "[NONE]"  # is not in the vocabulary
    found = embed(pa.table({"text": [None, "a cat", "\U0001f9ff", "a dog"]}))
    reason = "it cannot be tokenized: WordPiece error: Missing [UNK] token from the vocabulary"
    assert found["error"].to_pylist() == ["it is null", None, reason, None]
    assert_close(vectors(found["vector"])[1::2], expected(["a cat", "a dog"]))


def test_a_vector_that_is_not_finite_is_none(tiny_path):
    embed = Embed(tiny_path)
    with torch.no_grad():
        embed.encoder[0].model.embeddings.word_embeddings.weight[embed.encoder.tokenizer.vocab["cat"]] = torch.inf
    found = embed(pa.table({"text": ["a cat", "a dog"]}))
    assert found["error"].to_pylist() == ["its vector holds NaN or infinity in torch.float32", None]
    assert found["vector"].is_null().to_pylist() == [True, False]


def test_other_errors_end_the_batch(embed, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(embed, "_encode", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        embed(pa.table({"text": ["a"]}))


def test_a_device_without_memory_is_told_what_helps(embed, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(embed, "_encode", fail)
    with pytest.raises(RuntimeError, match="a batch of up to 2048 tokens does not fit on the device: tokens=1024"):
        embed(pa.table({"text": ["a"]}))


def test_float16_prompts_and_token_limits(tiny_path, expected, monkeypatch):
    found = Embed(tiny_path, dtype=torch.float16)(pa.table({"text": TEXTS[:5]}))["vector"]
    assert found.type == pa.list_(pa.float16(), 48)
    assert np.abs(vectors(found) - expected(TEXTS[:5])).max() < 2e-2
    embed, sizes = Embed(tiny_path, "words", prompt="query: ", tokens=100), []
    monkeypatch.setattr(PackedEncoder, "features", recording(PackedEncoder.features, sizes))
    found = embed(pa.table({"words": TEXTS[:5]}))
    assert 50 < max(sizes) <= 100
    assert_close(vectors(found["vector"]), expected(TEXTS[:5], prompt="query: "))
    with pytest.raises(ValueError, match="tokens=0: it must be at least 1"):
        Embed(tiny_path, tokens=0)


def test_a_model_that_is_never_packed_runs_in_batches_of_the_limit(tiny_path, tmp_path, expected, monkeypatch):
    bert = Transformer(tiny_path)
    bert.processor.padding_side = "left"  # only sentence-transformers' own code supports this
    SentenceTransformer(modules=[bert, Pooling(48, pooling_mode="cls")], device="cpu").save(str(tmp_path))
    embed = Embed(str(tmp_path), tokens=4 * 64)
    sizes = []
    monkeypatch.setattr(bert_of(embed), "forward", counting(bert_of(embed).forward, sizes))
    found = embed(pa.table({"text": TEXTS[:10]}))
    wanted = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS[:10], batch_size=4)
    assert_close(vectors(found["vector"]), wanted)
    assert max(sizes) == 4


def recording(features, sizes: list[int]):
    def call(self, given):
        sizes.append(given["input_ids"].shape[1])
        return features(self, given)

    return call


def bert_of(embed: Embed):
    return embed.encoder[0].model


def counting(forward, sizes: list[int]):
    def call(*args, input_ids, **kwargs):
        sizes.append(len(input_ids))
        return forward(*args, input_ids=input_ids, **kwargs)

    return call


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"text": np.array(["a"])}, TypeError, "the batch is a dict: map_batches needs batch_format='pyarrow'"),
        (pa.table({"body": ["a"]}), ValueError, "there is no column 'text', only 'body'"),
        (pa.table({"text": [1]}), TypeError, "column 'text' holds int64, not strings"),
        (pa.table({"text": ["a"], "error": [1]}), ValueError, "the batch has a column 'error' already"),
    ],
)
def test_wrong_batches_are_errors(embed, batch, error, message):
    with pytest.raises(error, match=message):
        embed(batch)


# Input files


def test_files_are_found_by_path_folder_and_pattern(tmp_path):
    for name in ("b.txt", "a.parquet", "[c].txt", "_hidden", ".hidden", "sub/d.txt", "_sub/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(place) -> list[str]:
        return [each.name for each in find(str(place))]

    assert names(tmp_path) == names(f"{tmp_path}/") == ["[c].txt", "a.parquet", "b.txt", "sub/d.txt"]
    assert names(tmp_path / "*") == ["[c].txt", "a.parquet", "b.txt"]
    assert names(tmp_path / "**/*.txt") == ["[c].txt", "b.txt", "sub/d.txt"]
    assert names(tmp_path / "*/*.txt") == ["sub/d.txt"]
    assert names(tmp_path / "[c].txt") == ["[c].txt"]
    with pytest.raises(ValueError, match="_hidden: readers of the output would ignore names that begin with '_'"):
        names(tmp_path / "_hidden")
    assert names(f"file://{tmp_path}/*.parquet") == ["a.parquet"]
    for place, error in (
        (tmp_path / "none", "there is no file or folder"),
        (tmp_path / "*.csv", "there is no input file"),
        ("nowhere://a/b", "Unrecognized filesystem type"),
    ):
        with pytest.raises(OSError, match=error):
            find(str(place))


@pytest.mark.parametrize("folder", ["set[1]", "d*d", "a b", "a#b", "a?b=1", "50%20é"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_path_is_taken_as_it_is(tmp_path, folder, scheme):
    for name in (folder, "set1", "dxd", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    (source,) = find(f"{scheme}{tmp_path}/{folder}")
    assert [part.texts for part in parts(source, None, 10)] == [[folder]]
    (source,) = find(f"{scheme}{tmp_path}/{folder}/x.txt")
    assert source.name == "x.txt"


@pytest.mark.parametrize(
    "content", [gzip.compress(b"text\n" * 99)[:-9], b"text\n"], ids=["truncated", "not compressed"]
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    with pytest.raises(OSError, match=rf"^{path}: "):
        list(parts(find(str(path))[0], None, 10))


def test_two_columns_of_one_name_are_an_error(tmp_path, embed):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: there are 2 columns 'text'"):
        list(parts(find(str(tmp_path))[0], None, 10))
    with pytest.raises(ValueError, match="there are 2 columns 'text'"):
        embed(table)


# The output, without a cluster


def made(source: Path, output: Path, parts: int | None = None) -> Corpus:
    """Write an output as Ray's tasks do, with zeros as vectors, and stop after some parts."""
    corpus = Corpus(find(str(source)), *resolve(str(output)), None, ROWS)
    for index, done in corpus.begin({"model": "m"}):
        for part in corpus.read(pa.table({"file": [index], "done": [done]})):
            if parts == 0:
                return corpus
            parts = None if parts is None else parts - 1
            size = len(part["texts"][0])
            zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * size, np.float32)), 2)
            columns = {"vector": nested(zeros), "error": nested(pa.nulls(size, pa.string()))}
            corpus.write(pa.table({"file": part["file"], "first": part["first"], **columns}))
    corpus.tidy()
    return corpus


@pytest.mark.parametrize("killed_after", range(5))
def test_an_output_is_continued_after_any_part(tmp_path, killed_after):
    source, output = tmp_path / "in", tmp_path / "in" / "sub" / "out"  # found as input, too
    source.mkdir()
    for name, count in (("a", 0), ("b", ROWS), ("c", 2 * ROWS + 1)):
        (source / f"{name}.txt").write_text("x\n" * count)
    output.mkdir(parents=True)
    (output / "._fastbert.json.0.partial").touch()  # a run was killed as it began
    made(source, output, killed_after)
    before = parts_of(output)
    assert len(before) == killed_after
    assert made(source, output).contents(9).rows == 3 * ROWS + 1
    assert parts_of(output).items() >= before.items()
    assert output_of(output)["c.txt"]["row"].to_pylist() == list(range(2 * ROWS + 1))
    assert made(source, output).begin({"model": "m"}) == []


def test_another_folder_with_the_same_names_is_no_continuation(tmp_path):
    for name in ("in", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("x\n")
        os.utime(tmp_path / name / "a.txt", (0, 0))
    made(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match=r"a\.txt is another file than when .*/out/a\.txt was made, or has changed"):
        made(tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (ValueError("wrong\nFailed to apply UDF transform after 1/1"), "wrong"),
        (FileNotFoundError(2, "no file", "Failed to apply UDF transform after 1/1"), "[Errno 2] no file"),
        (OSError(28, "disk full\nFailed to apply UDF transform"), "[Errno 28] disk full"),
    ],
)
def test_errors_of_our_own_come_out_of_rays(own, told):
    found = corpus._own_error(SimpleNamespace(cause=own))
    assert type(found) is type(own)
    assert str(found) == told


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 20, 35])
@pytest.mark.parametrize("suffix", ["parquet", "txt", "jsonl.gz"])
def test_parts_hold_every_row_once_and_the_last_one_is_shorter(tmp_path, count, suffix):
    path, field = tmp_path / f"a.{suffix}", None
    if suffix == "parquet":
        write_parquet(path, TEXTS[:count], other=list(range(count)))
    elif suffix == "txt":
        mark = "\ufeff" if count else ""
        path.write_text(mark + "".join(text + "\r\n" for text in TEXTS[:count]), newline="")
    else:
        field = "body"
        path.write_bytes(gzip.compress("\n".join(json.dumps({field: text}) for text in TEXTS[:count]).encode()))
    found = list(parts(find(str(path))[0], field, 10))
    assert [text for part in found for text in part.texts] == TEXTS[:count]
    assert [part.first for part in found] == [10 * index for index in range(count // 10 + 1)]
    assert [len(part.texts) for part in found] == [10] * (count // 10) + [count % 10]
    assert not any(part.reasons for part in found)


def test_bad_lines_have_reasons(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\xff\nno json\n{}\n{"text": 1}')
    (part,) = parts(find(str(path))[0], "text", 10)
    assert part.texts == ["good", None, None, None, None]
    assert list(part.reasons) == [1, 2, 3, 4]
    assert part.reasons[3] == "no field 'text'"


# On a cluster


def test_several_actors_embed_a_dataset(cluster, tiny_path, expected):
    class Named(Embed):
        def __call__(self, batch):
            found = super().__call__(batch)
            return found.append_column("actor", pa.array([os.getpid()] * len(batch)))

    dataset = ray.data.from_items([{"id": row, "text": text} for row, text in enumerate(TEXTS)], override_num_blocks=12)
    made = dataset.map_batches(
        Named, fn_constructor_args=[tiny_path], batch_format="pyarrow", batch_size=50, num_cpus=0.5,
        compute=ActorPoolStrategy(size=2),
    )  # fmt: skip
    rows = sorted(made.take_all(), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(len(TEXTS)))
    assert len({row["actor"] for row in rows}) == 2
    assert_close(np.array([row["vector"] for row in rows]), expected(TEXTS))


def test_a_corpus_of_all_formats_is_made_and_extended(cluster, tiny_path, expected, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write_parquet(source / "a.parquet", TEXTS[:45])
    write_parquet(source / "b.parquet", TEXTS[45 : 45 + ROWS])
    write_parquet(source / "empty.parquet", [])
    arguments = {"part_rows": ROWS, "report": (said := []).append}
    made, rate = encode_corpus(tiny_path, f"{source}/*", str(output), **arguments)
    wanted = {"a.parquet": expected(TEXTS[:45]), "b.parquet": expected(TEXTS[45 : 45 + ROWS]), "empty.parquet": []}
    assert_complete(output, wanted)
    assert (made.files, made.rows, made.bad, made.dim, made.dtype) == (3, 45 + ROWS, 0, 48, "float32")
    assert rate > 0

    before, said[:] = parts_of(output), []
    (source / "sub").mkdir()
    (source / "sub" / "c.parquet").write_bytes((source / "a.parquet").read_bytes())
    made, rate = encode_corpus(tiny_path, f"{source}/**", str(output), **arguments)
    assert_complete(output, {**wanted, "sub/c.parquet": wanted["a.parquet"]})
    assert parts_of(output).items() >= before.items()
    assert (made.files, made.rows) == (4, 90 + ROWS)
    assert "3 of 4 files are finished already" in said

    made, rate = encode_corpus(tiny_path, f"{source}/**", str(output), **arguments)
    assert (made.rows, rate) == (90 + ROWS, None)

    for others, message in (
        ({"prompt": "query: "}, "another prompt"),
        ({"part_rows": 5}, "another rows of a part"),
        ({"dtype": torch.float16}, "another dtype and another model"),
    ):
        with pytest.raises(ValueError, match=f"out was made with {message}: give another -o"):
            encode_corpus(tiny_path, f"{source}/**", str(output), **{**arguments, **others})
    write_parquet(source / "b.parquet", TEXTS[:3])
    with pytest.raises(ValueError, match=r"b\.parquet is another file than when .*/out/b\.parquet was made"):
        encode_corpus(tiny_path, f"{source}/**", str(output), **arguments)


def test_a_killed_actor_loses_no_row(cluster, tiny_path, expected, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b"):
        write_parquet(source / f"{name}.parquet", 5 * TEXTS)
    killed = []

    def kill() -> None:
        wait_for(lambda: len(parts_of(output)) > 3)
        killed.extend((pid, len(parts_of(output))) for pid in processes("ray::MapWorker(MapBatches(_EmbedParts))"))
        for pid, _ in killed:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    encode_corpus(tiny_path, str(source), str(output), part_rows=MANY)
    killer.join()
    assert killed
    assert killed[0][1] < 6000 / MANY
    assert_complete(output, {f"{name}.parquet": np.tile(expected(TEXTS), (5, 1)) for name in ("a", "b")})


def test_a_killed_driver_is_continued(cluster, tiny_path, expected, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b"):
        write_parquet(source / f"{name}.parquet", 5 * TEXTS)
    arguments = f"{tiny_path!r}, {str(source)!r}, {str(output)!r}, part_rows={MANY}"
    script = f"from fastbert.ray.corpus import encode_corpus; encode_corpus({arguments})"
    own = {"RAY_TMPDIR": "/tmp/fastbert-killed-driver"}  # tells its processes from the cluster's
    driver = subprocess.Popen([sys.executable, "-c", script], env=os.environ | own, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for(lambda: len(parts_of(output)) > 3 or driver.poll() is not None)
    finally:
        driver.kill()
        driver.wait()
    before = parts_of(output)
    assert 3 < len(before) < 6000 / MANY
    (output / "a.parquet" / ".000-020.parquet.0.partial").write_bytes(b"half")
    made, _ = encode_corpus(tiny_path, str(source), str(output), part_rows=MANY, report=(said := []).append)
    assert parts_of(output).items() >= before.items()
    assert made.rows == 6000
    assert not said or said == [f"{tiny_path} has no modules.json: vectors are the mean over the tokens of a text"]
    assert_complete(output, {f"{name}.parquet": np.tile(expected(TEXTS), (5, 1)) for name in ("a", "b")})


def test_errors_of_actors_and_tasks_are_told_in_one_line(cluster, tiny_path, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_parquet(source / "a.parquet", TEXTS[:5])
    pq.write_table(pa.table({"text": [1]}), source / "b.parquet")
    with pytest.raises(TypeError) as raised:
        encode_corpus(tiny_path, str(source), str(tmp_path / "out"), part_rows=ROWS)
    assert str(raised.value) == f"{source}/b.parquet: column 'text' holds int64, not strings"


def test_a_machine_with_another_model_is_an_error(cluster, tiny_path, tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", TEXTS[:5])
    monkeypatch.setattr(corpus, "identity", lambda encoder: "another")
    with pytest.raises(RuntimeError) as raised:
        encode_corpus(tiny_path, str(tmp_path / "a.parquet"), str(tmp_path / "out"))
    assert re.fullmatch(rf"RuntimeError: {tiny_path} on [\d.]+ is another model than here", str(raised.value))


def test_an_input_that_changes_meanwhile_is_an_error(cluster, tiny_path, tmp_path, monkeypatch):
    def run(*arguments):
        write_parquet(tmp_path / "a.parquet", TEXTS[:9])
        return real(*arguments)

    real = corpus._run
    monkeypatch.setattr(corpus, "_run", run)
    write_parquet(tmp_path / "a.parquet", TEXTS[:5])
    with pytest.raises(RuntimeError, match=r"a\.parquet changed while it was read: start again, with another -o$"):
        encode_corpus(tiny_path, str(tmp_path / "a.parquet"), str(tmp_path / "out"))
    assert not parts_of(tmp_path / "out")


def test_wrong_arguments_fail_before_anything_runs(tiny_path, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("{}\n{}\n")
    output = str(tmp_path / "out")
    for place, out, options, error, message in (
        (tmp_path / "none", output, {}, FileNotFoundError, "there is no file or folder"),
        (source, output, {"field": "x"}, ValueError, r"none of the first 2 rows is a text; row 0: no field 'x'"),
        (source, str(source), {}, NotADirectoryError, "is a file: name a folder"),
        (source, str(tmp_path), {}, ValueError, "all input lies in the output folder"),
        (source, output, {"tokens": 0}, ValueError, "tokens=0: it must be at least 1"),
        ("", output, {}, ValueError, "the path is empty"),
        (source, output, {"part_rows": 0}, ValueError, "part_rows=0: it must be at least 1"),
    ):
        with pytest.raises(error, match=message):
            encode_corpus(tiny_path, str(place), out, **options)
    with pytest.raises(OSError, match="there is no folder /none, and it is not a valid name on the hub"):
        encode_corpus("/none", str(source), output)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="full holds other files: give another -o"):
        encode_corpus(tiny_path, str(source), str(tmp_path / "full"))
    assert not Path(output).exists()


def test_the_command(cluster, minilm_path, tmp_path):
    source, output = tmp_path / "texts.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[:30]) + "{}\n")

    def run(*options: str):
        return CliRunner().invoke(app, ["encode", minilm_path, str(source), "-o", str(output), *options])

    found = run("--field", "body", "--ray")
    assert found.exit_code == 1, found.output
    assert f"{output}: float32 [31, 384], 1 files, " in found.output
    assert "texts.jsonl, row 30: no field 'body'" in found.output
    assert "rows without a vector, whose column error says why: 1" in found.output
    (table,) = output_of(output).values()
    assert_close(vectors(table["vector"])[:30], SentenceTransformer(minilm_path, device="cpu").encode(TEXTS[:30]))
    assert (output / MANIFEST).is_file()
    for options, message in (
        (("--ray", "--device", "cpu"), "--device cpu: with --ray, the cluster's GPUs are the devices"),
        (("--address", "auto"), "--address auto needs --ray"),
    ):
        found = run(*options)
        assert found.exit_code == 2
        assert message in found.output
