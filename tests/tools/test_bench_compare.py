"""bench/compare.py with made-up times, with fake packages in a git repository, and each of its workloads once."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import compare
import pytest
import records
from compare import measured

NOISE = random.Random(0)
# Replaces bench/host_workloads.py. process_time does not count other processes.
WORKER = """
import json, sys, time
import fastbert

for name in map(str.strip, sys.stdin):
    start = time.process_time()
    try:
        getattr(fastbert, name)()
        answer = {"seconds": time.process_time() - start}
    except AttributeError as problem:
        answer = {"absent": str(problem)}
    print(json.dumps(answer), flush=True)
"""
PACKAGE = """
import time

def busy():
    end = time.process_time() + {milliseconds} / 1e3
    while time.process_time() < end:
        pass
"""


def pairs(factor: float, number: int, between: float = 0.02) -> list[list[tuple[float, float]]]:
    """Return rounds of a workload that takes `factor` times as long here as there.

    The machine's speed varies by half. Processes of the same code differ by `between`, in one pair of ten by 10 times
    that.
    """

    def rounds():
        here = factor * (1 + NOISE.gauss(0, between * NOISE.choice([1] * 9 + [10])))
        speeds = [NOISE.uniform(1, 1.5) for _ in range(5)]
        return [(here * speed * NOISE.uniform(0.99, 1.01), speed * NOISE.uniform(0.99, 1.01)) for speed in speeds]

    return [rounds() for _ in range(number)]


def test_verdicts_of_made_up_times():
    """Noise alone rarely gives a verdict, and 10 % is detected in noise of 2 %."""
    verdicts = [measured(pairs(1.0, compare.PAIRS)).verdict for _ in range(400)]
    assert verdicts.count("same within noise") >= 392
    for factor, verdict in ((1.1, "slower"), (0.9, "faster")):
        found = [measured(pairs(factor, compare.PAIRS)) for _ in range(20)]
        assert {each.verdict for each in found} == {verdict}
        assert all(each.ratio == pytest.approx(factor, rel=0.05) for each in found)


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with packages that are busy for 2 ms at HEAD, and a worker for them."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root, worker = tmp_path / "project", tmp_path / "worker.py"
    worker.write_text(WORKER)
    for package in compare.PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text(PACKAGE.format(milliseconds=2))
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all")
    monkeypatch.setattr(records, "ROOT", root)
    monkeypatch.setattr(compare, "WORKER", worker)
    monkeypatch.setattr(compare, "WORKLOADS", {"busy": None, "gone": None, "new": None})
    monkeypatch.setattr(compare, "ROUNDS", 6)
    monkeypatch.setattr(compare.tempfile, "tempdir", str(tmp_path))
    records._head.cache_clear()
    yield root
    records._head.cache_clear()
    assert git(root, "worktree", "list").count("\n") == 1
    assert not list(tmp_path.glob("fastbert-compare-*"))


@pytest.mark.parametrize(
    ("milliseconds", "threshold", "verdict", "status"),
    [(2, 3, "same within noise", 0), (2.2, 3, "slower", 1), (2.2, 30, "slower", 0)],
)
def test_a_planted_difference_is_found(milliseconds, threshold, verdict, status, repository, capsys):
    (repository / "fastbert/__init__.py").write_text(PACKAGE.format(milliseconds=milliseconds) + "\n\nnew = busy\n")
    arguments = ["HEAD", "--pairs", "9", "--threshold", str(threshold), "--workload", "busy", "new"]
    assert compare.main(arguments) == status
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith("busy "))
    name = git(repository, "rev-parse", "--short", "HEAD").strip()
    if milliseconds != 2:  # otherwise a few microseconds may give another verdict
        assert line.endswith(verdict)
    assert f"here {name}-dirty, there {name}; " in printed
    assert "new           runs here" in printed
    assert "new           absent there: module 'fastbert' has no attribute 'new'" in printed


def test_a_workload_that_only_runs_at_the_other_commit_fails(repository, capsys):
    """The tree is clean, and the other commit is older."""
    (repository / "fastbert/__init__.py").write_text("")
    git(repository, "commit", "--quiet", "--all", "--message", "nothing")
    assert compare.main(["HEAD~1", "--workload", "busy", "gone"]) == 1
    printed = capsys.readouterr().out
    assert "-dirty" not in printed
    assert "busy          absent here: module 'fastbert' has no attribute 'busy'" in printed
    assert "busy          runs there" in printed
    assert printed.count("gone          absent") == 2


def test_a_worker_that_ends_is_an_error(repository):
    compare.WORKER.write_text("import sys; sys.exit(7)")
    with pytest.raises(RuntimeError, match="the process that imports .*/else ended in busy with status 7"):
        compare.main(["HEAD"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "Needed a single revision"),
        (["HEAD", "--pairs", "8"], "--pairs 8: fewer than 9 give no interval of 99.5%"),
        (["HEAD", "--workload", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_invalid_arguments_are_an_error(arguments, reason, repository, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert reason in capsys.readouterr().err


def test_every_workload_runs_here(tmp_path):
    for package in compare.PACKAGES:
        (tmp_path / Path(package).name).symlink_to(records.ROOT / package)
    with compare.process(tmp_path) as ask:
        answers = {name: ask(name) for name in compare.WORKLOADS}
        assert ask("speed") == {"absent": "KeyError: 'speed'"}
        assert "seconds" in ask("forward")
    assert all(answer.get("seconds", 0) > 0 for answer in answers.values()), json.dumps(answers)
    assert answers["replay"]["seconds"] < answers["launches"]["seconds"]
