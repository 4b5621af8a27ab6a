"""The documentation's code and commands run, with MiniLM in place of other models, and its links have targets."""

import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from typer.testing import CliRunner

from fastbert import cli
from fastbert.commands import benchmark, serve, verify

ROOT = Path(__file__).parent.parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"]
# The benchmarks' pages have links too.
LINKING = [*PAGES, *ROOT.glob("bench/**/*.md")]
BLOCKS = {
    path.relative_to(ROOT).as_posix(): re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    for path in PAGES
}
MODELS = re.compile(r"bert-base-uncased|sentence-transformers/all-MiniLM-L6-v2")


def blocks_of(page: str, language: str) -> list[str]:
    return [block for each, block in BLOCKS[page] if each == language]


def commands() -> list[list[str]]:
    """Return the words of each line of a page's shell blocks, without comments."""
    lines = [line for page in BLOCKS for block in blocks_of(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if not line.startswith("#")]


COMMANDS = commands()


def of_program(name: str) -> list:
    return [pytest.param(words[1:], id=" ".join(words[:3])) for words in COMMANDS if words[0] == name]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_shell_blocks_have_commands_that_are_run_here():
    assert {language for blocks in BLOCKS.values() for language, _ in blocks} == {"python", "sh", ""}
    assert {words[0] for words in COMMANDS} == {"fastbert", "make", "pip"}


def test_the_map_names_files_that_exist():
    (tree,) = blocks_of("docs/kernels.md", "")
    folder, paths = "", re.findall(r"(?:\w+/)*\w+\.py|(?:\w+/)+(?=  |:)", tree)
    assert len(paths) > 30
    for path in paths:
        folder = path.rpartition("/")[0] or folder  # `layers.py` beside `fastbert/model.py`
        assert any((ROOT / above / path).exists() for above in ("", "fastbert", folder)), path


@pytest.mark.parametrize("page", [page for page in BLOCKS if blocks_of(page, "python")])
def test_the_python_blocks_of_a_page_run(page, minilm_path, capsys):
    names: dict[str, object] = {}
    try:
        for block in blocks_of(page, "python"):
            exec(MODELS.sub(minilm_path, block), names)
    finally:
        ray.shutdown()
    if page == "README.md":
        assert "encoder.layer.0-5" in capsys.readouterr().out
        assert names["classifier"].bert.embeddings.word_embeddings.weight.grad.any()
        assert names["vectors"].shape == (2, 384)


@pytest.mark.parametrize("words", of_program("fastbert"))
def test_the_command_runs(words, minilm_path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    texts = ["A cat sleeps.", "The kitten takes a nap."]
    Path("texts.txt").write_text("\n".join(texts))
    Path("texts").mkdir()
    pq.write_table(pa.table({"text": texts}), "texts/a.parquet")
    for module in (verify, benchmark):
        monkeypatch.setattr(module, "SHAPES", dict.fromkeys(("cpu", "cuda"), ((2, 12),)))
    monkeypatch.setattr(serve, "run", lambda model, host, port, report, **options: report(model))
    monkeypatch.setattr(benchmark, "SECONDS", dict.fromkeys(("cpu", "cuda"), 0.1))
    once = ["--dtype", "float32"] if words[0] == "verify" else []  # one dtype of three: each runs every class
    found = CliRunner().invoke(cli.app, [MODELS.sub(minilm_path, word) for word in words] + once)
    assert found.exit_code == 0, found.output
    assert found.output
    if words[0] == "encode":
        assert Path("vectors" if "--ray" in words else "vectors.npy").exists()


@pytest.mark.parametrize("targets", of_program("make"))
def test_the_target_is_there(targets):
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the picture is of the interpreter's launches")
def test_the_picture_of_a_layer_is_what_is_launched():
    import launches  # it sets TRITON_INTERPRET

    picture = launches.PICTURE.read_text()
    columns = launches.columns()
    assert len(columns) == 3
    for title, boxes in columns.items():
        count, _ = title.split("\n")
        assert count.endswith(f": {len(boxes)}")
        assert f">{count}</text>" in picture
    for label in {label for boxes in columns.values() for label, _ in boxes}:
        shown = sum(label == each for boxes in columns.values() for each, _ in boxes)
        assert picture.count(f">{label}</text>") == shown, label


@pytest.mark.parametrize("words", of_program("pip"))
def test_what_is_installed_is_there(words):
    install, what = words
    extras = re.fullmatch(r"\.(?:\[(.*)\])?", what)[1]
    assert install == "install"
    assert set(extras.split(",") if extras else ()) <= {*metadata.metadata("fastbert-triton").get_all("Provides-Extra")}
