"""Timing of two calls in alternating rounds, so that disturbances affect both."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LEAST_ROUNDS, MOST_ROUNDS, WARMUP_ROUNDS = 4, 300, 2
# Much longer than the few microseconds of the first launch and the end of a round on the GPU.
ROUND_SECONDS = 3e-3


@dataclass(frozen=True)
class Measured:
    """Seconds per call in each round, of a provider and of its baseline.

    clock: "host" measures each call from start to end, with the device's work. "device" uses events around `calls`
    calls back to back; host_s is then the median time to issue a call. If that is close to the median, the host is the
    bottleneck.
    """

    clock: str
    calls: int
    seconds: list[float]
    baseline_seconds: list[float]
    host_s: float

    def fields(self) -> dict:
        """The fields of a record."""
        about = {"clock": self.clock, "calls": self.calls, "host_s": self.host_s}
        return about | summary(self.seconds, self.baseline_seconds)


def summary(seconds: list[float], baseline_seconds: list[float]) -> dict:
    """The statistics of a record, from the seconds of each round."""
    median_s, baseline_median_s = map(statistics.median, (seconds, baseline_seconds))
    q20_s, *_, q80_s = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "median_s": median_s,
        "q20_s": q20_s,
        "q80_s": q80_s,
        "rounds": len(seconds),
        "baseline_median_s": baseline_median_s,
        "ratio": baseline_median_s / median_s,
    }


def host_seconds(call: Callable, calls: int = 1) -> tuple[float, float]:
    """Seconds per call by the host's clock, twice: as the time of a call and as the time to issue it. The call must
    wait for its work on a device."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = (time.perf_counter() - start) / calls
    return seconds, seconds


def device_seconds(call: Callable, calls: int = 1) -> tuple[float, float]:
    """Seconds per call by the device's events, and seconds per call that the host took to issue it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    host_s, _ = host_seconds(call, calls)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls, host_s


CLOCKS = {"host": host_seconds, "device": device_seconds}


def throughput_clock(device: torch.device) -> str:
    """The clock that measures the throughput of a device."""
    return "host" if device.type == "cpu" else "device"


def side_by_side(call: Callable, baseline: Callable, seconds: float, clock: str) -> Measured:
    """Time both for about `seconds` in all, each round of the call after one of the baseline. Before that, each runs
    for a tenth of `seconds`; the minimum times determine the number of rounds."""
    clocked = CLOCKS[clock]
    least, baseline_least = (_undisturbed(clocked, each, seconds / 10) for each in (call, baseline))
    repeats = (1, 1) if clock == "host" else [max(1, round(ROUND_SECONDS / each)) for each in (least, baseline_least)]
    rounds = int(seconds / (repeats[0] * least + repeats[1] * baseline_least))
    rounds = min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)
    timed, baseline_timed = [], []
    for _ in range(WARMUP_ROUNDS + rounds):
        baseline_timed.append(clocked(baseline, repeats[1]))
        timed.append(clocked(call, repeats[0]))
    timed, baseline_timed = timed[WARMUP_ROUNDS:], baseline_timed[WARMUP_ROUNDS:]
    host_s = statistics.median(issued for _, issued in timed)
    return Measured(clock, repeats[0], [each for each, _ in timed], [each for each, _ in baseline_timed], host_s)


def _undisturbed(clocked: Callable, call: Callable, seconds: float) -> float:
    """The minimum time of `call` over about `seconds` of tries."""
    tries = [clocked(call)[0]]
    while sum(tries) < seconds:
        tries.append(clocked(call)[0])
    return min(tries)
