"""A case of kernels: every provider is checked against float64, timed in turns with the baseline, and recorded."""

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
# What the first call of a function under torch.compile is expected to take.
COMPILE_SECONDS = 6


@dataclass
class Comparison:
    """The providers of one case, on the same inputs.

    `provide(name, inputs)` gives a provider's call on a set of inputs, `error(output)` its result's largest difference
    from the truth, of which `largest` is the largest value; `work` is what the case has to do at least, and
    case["dtype"] names the roof.
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
        """What is known of a provider, and with a timer the seconds of its call, round by round.

        The record has "wrong" and no times where the error is more than twice the baseline's plus a few roundings of
        the largest value, and "absent", the reason, where the provider cannot run the case. Raises what our own kernel
        or the baseline raises: those have to run. With a timer, what ours raises is recorded, in the place of an
        earlier run's times.
        """
        told = {"suite": self.suite, "kind": self.kind, "case": self.case}
        told |= {"provider": provider, "baseline": self.baseline}
        baseline_error, baseline_replay = self._baseline_error, timer and self._baseline_replay(timer)
        try:
            with warnings.catch_warnings(record=True) as hints:
                # torch warns why a back end does not take an input, and then raises that none does.
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
        """Captured once for all providers of the case."""
        if self._replay is None:
            self._replay = self._capture(self.baseline, timer)
        return self._replay

    def _capture(self, provider: str, timer: Timer) -> Replay:
        """The provider's calls on sets of equal values in memory of their own, together larger than the cache."""
        if not self._sets:
            copies = range(1, sets_to_rotate(self.work.bytes, timer))
            self._sets = [self.inputs, *(tuple(map(_clone, self.inputs)) for _ in copies)]
        return timer.capture([self.provide(provider, given) for given in self._sets])


def _clone(x):
    return x.clone() if isinstance(x, torch.Tensor) else x


def _reason(problem: Exception, hints: list[warnings.WarningMessage]) -> str:
    """What was raised and the warnings before it, in one line."""
    told = [f"{type(problem).__name__}: {problem}", *dict.fromkeys(str(hint.message) for hint in hints)]
    return " ".join(" | ".join(told).split())[:LONGEST_REASON]


def planned(pairs: list[tuple], compiled: str) -> list:
    """The parameters of a test, cases and their providers, of which `compiled` is under torch.compile."""
    compiles = pytest.mark.planned_seconds(COMPILE_SECONDS)
    return [pytest.param(case, name, marks=[compiles] if name == compiled else []) for case, name in pairs]


def run(request, compare: Callable[[Any], Comparison], case: Any, provider: str) -> None:
    """One test: a provider of a case is checked, and where there is a GPU and benchmarks are not disabled, timed and
    recorded, whatever came of it. Our own kernel fails if it is wrong; of a peer the test says so and goes on."""
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
