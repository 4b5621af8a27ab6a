"""The benches and the demo run, and the README's figures are the ones their records give."""

import subprocess
import sys
from pathlib import Path

import demo
import pytest
import records
import report

ROOT = Path(__file__).parent.parent


def test_the_bench_checks_its_results():
    """One case of every provider of the tiny model, checked and not timed; nothing is recorded."""
    before = {path: path.read_bytes() for path in records.RESULTS.rglob("*") if path.is_file()}
    # Not `python -m pytest`, which would put the repository on the path, and with it the bare folder `kernels`.
    pytest_itself = Path(sys.executable).with_name("pytest")
    command = [pytest_itself, "bench", "-k", "tiny", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout
    assert before == {path: path.read_bytes() for path in records.RESULTS.rglob("*") if path.is_file()}


def test_the_bench_of_kernels_checks_its_results():
    """Every kernel at toy sizes, in the interpreter where there is no GPU."""
    pytest_itself = Path(sys.executable).with_name("pytest")
    command = [pytest_itself, "bench/bench_kernels.py", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_the_readme_shows_what_the_records_say():
    tables = [
        report.overview(report.by_case(records.read(path), "latency"))
        for path in sorted(records.RESULTS.glob("*/model.jsonl"))
    ]
    text = (ROOT / "README.md").read_text()
    shown = text.partition(report.BEGIN)[2].partition(report.END)[0]
    assert tables
    assert shown.strip() == "\n\n".join(tables)


@pytest.mark.parametrize(
    ("limit", "status", "verdict"), [(1e-5, 0, "gives transformers' embeddings"), (0.0, 1, "WRONG")]
)
def test_the_demo(limit, status, verdict, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NUM_DOCSTRINGS", 8)
    monkeypatch.setattr(demo, "BATCH_SIZE", 4)
    monkeypatch.setattr(demo, "LARGEST_DIFFERENCE", limit)
    assert demo.main() == status
    printed = capsys.readouterr().out
    assert verdict in printed
    assert "8 docstrings" in printed
