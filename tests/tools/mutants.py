"""Mutation testing: planted bugs, each of which must make a test fail.

    python tests/tools/mutants.py [NAME ...]

Each mutant of mutants.yaml changes one place in a copy of the tracked files, where its test then runs, with one mutant
per core at a time. The exit status is 1 if a mutant survives, does not apply, or stops the test other than by a
failure, and if a test fails without a mutant.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parent.parent.parent
TIME_LIMIT = 600  # seconds for the tests of one mutant

# Fails if packages are imported from outside the copy.
RUN_PYTEST = """
import sys
from pathlib import Path
import pytest

status = pytest.main(sys.argv[1:])
imported = [Path(sys.modules[name].__file__) for name in ("fastbert", "fastbert_kernels")]
sys.exit(status if all(path.is_relative_to(Path.cwd()) for path in imported) else pytest.ExitCode.INTERNAL_ERROR)
"""


class Mutant(NamedTuple):
    """A bug: `original`, which occurs once in the file, is replaced by `replacement`. The test must then fail."""

    name: str
    file: str
    original: str
    replacement: str
    test: str  # "folder/test_file.py::test_function", with "[case]" if it takes long


MUTANTS = [Mutant(**entry) for entry in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())]


def applied(mutant: Mutant, text: str) -> str:
    """Return the file's text with the bug. Raises ValueError unless the original text occurs exactly once."""
    count = text.count(mutant.original)
    if count != 1:
        raise ValueError(f"{mutant.name}: the original text occurs {count} times in {mutant.file}, expected 1")
    return text.replace(mutant.original, mutant.replacement)


def run_tests(tests: Iterable[str], mutant: Mutant | None = None) -> tuple[int, str]:
    """Run pytest in a copy of the tracked files. Returns its exit status and output."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in listed.rstrip("\0").split("\0"):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        if mutant:
            path = copy / mutant.file
            path.write_text(applied(mutant, path.read_text()))
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
        environment = {
            "PYTHONPATH": f"{copy}:{copy / 'kernels'}",
            "CUDA_VISIBLE_DEVICES": "",  # always in the interpreter, which some tests need
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        result = subprocess.run(
            [sys.executable, "-c", RUN_PYTEST, *options],
            cwd=copy, env=os.environ | environment, text=True, timeout=TIME_LIMIT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return result.returncode, result.stdout


def judge(mutant: Mutant) -> str:
    """Run a mutant's test, and print and return the verdict: "killed", "SURVIVED" or "ERROR"."""
    start = time.monotonic()
    try:
        status, output = run_tests([mutant.test], mutant)
    except (ValueError, subprocess.TimeoutExpired) as error:
        status, output = None, str(error)
    lines = output.splitlines()
    # Names of tests have "::". A name without it is a file that cannot be collected.
    failed = next((line for line in lines if line.startswith(("FAILED ", "ERROR ")) and "::" in line.split()[1]), None)
    if status == 1 and failed:
        verdict, detail = "killed", failed[:200]
    elif status == 0:
        verdict, detail = "SURVIVED", f"PASSED tests/{mutant.test}"
    else:
        verdict, detail = "ERROR", f"status {status}: {lines[-1:]}"
    print(f"{verdict:8}  {time.monotonic() - start:4.0f} s  {mutant.name}  {detail}", flush=True)
    return verdict


def main(names: list[str]) -> None:
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        sys.exit(f"unknown mutants: {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    start = time.monotonic()
    by_file: dict[str, set[str]] = {}
    for mutant in mutants:
        by_file.setdefault(mutant.test.split("::")[0], set()).add(mutant.test)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for status, output in pool.map(run_tests, map(sorted, by_file.values())):
            if status != 0:
                sys.exit(f"{output}\nthe tests fail without a mutant")
        print(f"without mutants all tests pass, {time.monotonic() - start:.0f} s", flush=True)
        verdicts = list(pool.map(judge, mutants))
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("killed", "SURVIVED", "ERROR"))
    print(f"{len(mutants)} mutants in {time.monotonic() - start:.0f} s: {counts}")
    sys.exit(verdicts.count("killed") < len(mutants))


if __name__ == "__main__":
    main(sys.argv[1:])
