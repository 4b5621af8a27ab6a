"""Comparison of the providers of one kernel case: each is checked, timed in turns with the baseline, and recorded."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import device_timing
import pytest
import records
import torch
from device_timing import Replay, Timer, rates, sets_to_rotate
from shown_clock import CLOCK

from fastbert.commands.timing import summary
from fastbert.testing import OP_FACTOR, limit
from fastbert_kernels.tuning.roofline import Work

OURS = "fastbert"
LONGEST_REASON = 400
# The expected time of the first call under torch.compile.
COMPILE_SECONDS = 6


@dataclass
class Comparison:
    """The providers of one case, on the same inputs.

    provide(name, inputs): a provider's call on a set of inputs. error(output): the largest difference of a result from
    the truth. largest: the truth's largest value. work: the least work of the case; case["dtype"] selects its roof.
    """

    suite: str
    kind: str
    case: dict
    baseline: str
    inputs: tuple
    provide: Callable[[str, tuple], Callable[[], Any]]
    error: Callable[[Any], float]
    largest: float
    work: Work
    _sets: list[tuple] = field(default_factory=list, init=False)
    _replay: Replay | None = field(default=None, init=False)

    def record(self, provider: str, timer: Timer | None) -> tuple[dict, list[float]]:
        """Return a provider's record and, with a timer, the seconds of its call in each round.

        The record has "wrong" instead of times if the error exceeds twice the baseline's plus a few roundings of the
        largest value, and "absent" with the reason if the provider cannot run the case. Exceptions of our own kernel
        and of the baseline are raised, since those have to run. With a timer they are recorded first, which replaces
        the times of an earlier run.
        """
        told = {"suite": self.suite, "kind": self.kind, "case": self.case}
        told |= {"provider": provider, "baseline": self.baseline}
        baseline_error, baseline_replay = self._baseline_error, timer and self._baseline_replay(timer)
        try:
            with warnings.catch_warnings(record=True) as hints:
                # torch warns why each back end rejects an input, then raises that there is none.
                warnings.simplefilter("always")
                error = self.error(self.provide(provider, self.inputs)())
                told |= {"error": error, "error_ratio": error / baseline_error if baseline_error else None}
                if not error <= limit(baseline_error, self.largest, getattr(torch, self.case["dtype"]), OP_FACTOR):
                    return told | {"wrong": f"errs by {error:.2e}, {self.baseline} by {baseline_error:.2e}"}, []
                if timer is None:
                    return told, []
                replay = baseline_replay if provider == self.baseline else self._capture(provider, timer)
                baseline_s, seconds = timer.seconds([baseline_replay, replay])
        except Exception as problem:
            told["absent"] = _reason(problem, hints)
            if provider in (OURS, self.baseline):
                if timer:
                    records.write(told)
                raise
            return told, []
        times = summary(seconds, baseline_s)
        return told | times | rates(self.work, self.case["dtype"], times["median_s"], timer), seconds

    @cached_property
    def _baseline_error(self) -> float:
        return self.error(self.provide(self.baseline, self.inputs)())

    def _baseline_replay(self, timer: Timer) -> Replay:
        """Return the baseline's replay, which is captured once for all providers of the case."""
        if self._replay is None:
            self._replay = self._capture(self.baseline, timer)
        return self._replay

    def _capture(self, provider: str, timer: Timer) -> Replay:
        """Capture the provider's calls on sets of equal inputs, which together are larger than the cache."""
        if not self._sets:
            copies = range(1, sets_to_rotate(self.work.bytes, timer))
            self._sets = [self.inputs, *(tuple(map(_clone, self.inputs)) for _ in copies)]
        return timer.capture([self.provide(provider, given) for given in self._sets])


def _clone(x):
    return x.clone() if isinstance(x, torch.Tensor) else x


def _reason(problem: Exception, hints: list[warnings.WarningMessage]) -> str:
    """Return an exception and the warnings before it in one line."""
    told = [f"{type(problem).__name__}: {problem}", *dict.fromkeys(str(hint.message) for hint in hints)]
    return " ".join(" | ".join(told).split())[:LONGEST_REASON]


def planned(pairs: list[tuple], compiled: str) -> list:
    """Return pairs of case and provider as parameters of a test. compiled: the provider that uses torch.compile."""
    compiles = pytest.mark.planned_seconds(COMPILE_SECONDS)
    return [pytest.param(case, name, marks=[compiles] if name == compiled else []) for case, name in pairs]


def run(request, compare: Callable[[Any], Comparison], case: Any, provider: str) -> None:
    """Run the test of one provider of a case: check it, and on a GPU with benchmarks enabled, time and record it.

    The test fails if our own kernel is wrong. A peer that is wrong is an expected failure, an absent one is skipped.
    """
    timer = None if request.config.getoption("benchmark_disable") else device_timing.TIMER
    record, seconds = compare(case).record(provider, timer)
    if timer:
        records.write(record)
    if "absent" in record:
        pytest.skip(f"{case} {provider} is absent: {record['absent']}")
    if "wrong" in record:
        (pytest.fail if provider == OURS else pytest.xfail)(f"{case} {provider} {record['wrong']}")
    if timer:
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = str(case)
        CLOCK.show(benchmark, seconds)
