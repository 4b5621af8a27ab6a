"""Compare the host's time of this checkout with that of another commit.

    python bench/compare.py COMMIT [--workload NAMES] [--pairs N] [--threshold PERCENT]

No GPU is needed. This checkout's bench/host_workloads.py measures both packages on one thread, in pairs of processes
that take turns, A B B A, so that other load on the machine affects both. Many pairs are needed, since the speed of a
process varies with its memory layout. The exit status is 1 if a workload is slower by more than noise and the
threshold, or runs only at COMMIT.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import records
import torch
from host_workloads import WORKLOADS
from tqdm import tqdm

from fastbert.commands.machine import describe, machine

WORKER = Path(__file__).with_name("host_workloads.py")
PACKAGES = ("fastbert", "kernels/fastbert_kernels")
PAIRS, ROUNDS, THRESHOLD_PERCENT = 14, 20, 3.0
# The confidence of the interval, and the fewest pairs that give it.
CONFIDENCE, MIN_PAIRS = 0.995, 9


class Measured(NamedTuple):
    """Medians of a call's seconds here and there, and of the ratio here / there with its confidence interval."""

    here_s: float
    there_s: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "same within noise"


def measured(pairs: list[list[tuple[float, float]]]) -> Measured:
    """Summarize the rounds of each pair of processes. A round is the seconds here and there.

    The interval is for the median of the pairs' ratios and assumes no distribution: the number of ratios below their
    true median is binomial.
    """
    ratios = sorted(statistics.median(here / there for here, there in rounds) for rounds in pairs)
    chances = [2 * sum(math.comb(len(ratios), heads) for heads in range(cut + 1)) for cut in range(len(ratios) // 2)]
    cut = sum(chance <= (1 - CONFIDENCE) * 2 ** len(ratios) for chance in chances) - 1
    here_s, there_s = map(statistics.median, zip(*(turns for rounds in pairs for turns in rounds), strict=True))
    return Measured(here_s, there_s, statistics.median(ratios), ratios[cut], ratios[-1 - cut])


@contextmanager
def packages_of(commit: str) -> Iterator[tuple[Path, Path]]:
    """Yield folders of the same path length with this checkout's packages, as they are now, and a commit's."""
    with tempfile.TemporaryDirectory(prefix="fastbert-compare-") as folder:
        here, there, tree = (Path(folder, name) for name in ("here", "else", "tree"))
        records.git("worktree", "add", "--detach", str(tree), commit)
        try:
            for source, copy in ((records.ROOT, here), (tree, there)):
                for package in map(Path, PACKAGES):
                    shutil.copytree(source / package, copy / package.name, ignore=lambda *_: ["__pycache__"])
            yield here, there
        finally:
            records.git("worktree", "remove", "--force", str(tree))


@contextmanager
def process(packages: Path) -> Iterator[Callable[[str], dict]]:
    """Start a process that imports these packages. Yield a function that times a workload in it."""
    paths = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def ask(name: str) -> dict:
        with suppress(BrokenPipeError):  # the process has ended, and its exit status is reported below
            print(name, file=worker.stdin, flush=True)
        answer = worker.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that imports {packages} ended in {name} with status {worker.wait()}")
        return json.loads(answer)

    # In a session of its own the worker does not get Ctrl-C, which this process handles.
    worker = subprocess.Popen([sys.executable, WORKER], env=environment, start_new_session=True, **pipes)
    try:
        yield ask
    finally:
        worker.kill()
        worker.communicate()  # closes the pipes and waits


def measure(folders: tuple[Path, Path], names: list[str], pairs: int) -> tuple[dict[str, Measured], dict[str, tuple]]:
    """Measure workloads. Returns the results, and for others why they did not run here and there, None if they did."""
    timed, absent = {name: [] for name in names}, {}
    for number in tqdm(range(pairs), desc="pairs of processes", disable=None):
        with process(folders[0]) as here, process(folders[1]) as there:
            for name in [name for name in names if name not in absent]:
                rounds = []
                for turn in range(number, number + 1 + ROUNDS):
                    order = (here, there) if turn % 2 else (there, here)
                    answers = {each: each(name) for each in order}
                    if any("absent" in answer for answer in answers.values()):
                        absent[name] = tuple(answers[each].get("absent") for each in (here, there))
                        break
                    rounds.append((answers[here]["seconds"], answers[there]["seconds"]))
                timed[name].append(rounds[1:])  # the first warms up
    return {name: measured(timed[name]) for name in names if name not in absent}, absent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", metavar="COMMIT")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="(default: all)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of processes, 9 or more (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD_PERCENT, help="in percent (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.pairs < MIN_PAIRS:
        parser.error(f"--pairs {given.pairs}: fewer than {MIN_PAIRS} give no interval of {CONFIDENCE:.1%}")
    try:
        other = records.git("rev-parse", "--short", "--verify", f"{given.commit}^{{commit}}")
    except subprocess.CalledProcessError as problem:
        parser.error(problem.stderr.strip())
    before = records.provenance()
    print(f"here {before['commit']}, there {other}; {describe(machine(torch.device('cpu')) | {'threads': 1})}")
    with packages_of(other) as folders:
        found, absent = measure(folders, given.workload, given.pairs)
    load = records.provenance()["load"]
    print(f"load a core {before['load']} before, {load} after; medians of a call's times, ratio here / there")
    print(f"{'':14}{'here':>10}{'there':>11}{'ratio':>8}{f'{CONFIDENCE:.1%} interval':>18}")
    for name, each in found.items():
        times = f"{1e3 * each.here_s:7.3f} ms {1e3 * each.there_s:7.3f} ms"
        print(f"{name:14}{times} {each.ratio:7.3f}    {each.low:.3f} to {each.high:.3f}  {each.verdict}")
    for name, reasons in absent.items():
        for place, reason in zip(("here", "there"), reasons, strict=True):
            print(f"{name:14}absent {place}: {reason}" if reason else f"{name:14}runs {place}")
    slower = [each for each in found.values() if each.verdict == "slower" and each.ratio > 1 + given.threshold / 100]
    return int(bool(slower) or any(here and not there for here, there in absent.values()))


if __name__ == "__main__":
    sys.exit(main())
