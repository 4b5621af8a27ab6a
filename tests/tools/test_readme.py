"""The README's code runs, with MiniLM in the place of the models it names."""

import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastbert import cli
from fastbert.commands import benchmark, verify

ROOT = Path(__file__).parent.parent.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
MODELS = re.compile(r"bert-base-uncased|sentence-transformers/all-MiniLM-L6-v2")


def commands() -> list[list[str]]:
    """The words of each line of the shell's blocks, without its comment."""
    lines = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if not line.startswith("#")]


COMMANDS = commands()


def of_program(name: str) -> list:
    return [pytest.param(words[1:], id=" ".join(words[:3])) for words in COMMANDS if words[0] == name]


def test_every_block_is_run_here():
    assert {language for language, _ in BLOCKS} == {"python", "sh", ""}
    (tree,) = (block for language, block in BLOCKS if not language)
    assert all((ROOT / path).exists() for path in re.findall(r"^\S+|(?<=  )\S+/(?=  )", tree, re.MULTILINE)), tree
    assert {words[0] for words in COMMANDS} == {"fastbert", "make", "pip"}


def test_every_python_block_runs(minilm_path, capsys):
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(MODELS.sub(minilm_path, block), names)
    assert "encoder.layer.0-5" in capsys.readouterr().out
    assert names["classifier"].bert.embeddings.word_embeddings.weight.grad.any()
    assert names["vectors"].shape == (2, 384)


@pytest.mark.parametrize("words", of_program("fastbert"))
def test_the_command_runs(words, minilm_path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("A cat sleeps.\nThe kitten takes a nap.\n")
    for module in (verify, benchmark):
        monkeypatch.setattr(module, "SHAPES", dict.fromkeys(("cpu", "cuda"), ((2, 12),)))
    monkeypatch.setattr(benchmark, "SECONDS", dict.fromkeys(("cpu", "cuda"), 0.1))
    found = CliRunner().invoke(cli.app, [MODELS.sub(minilm_path, word) for word in words])
    assert found.exit_code == 0, found.output
    assert found.output
    assert Path("vectors.npy").exists() == (words[0] == "encode")


@pytest.mark.parametrize("targets", of_program("make"))
def test_the_target_is_there(targets):
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the picture is of the interpreter's launches")
def test_the_picture_of_a_layer_is_what_is_launched():
    import launches  # which asks for the interpreter

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
