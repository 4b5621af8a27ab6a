"""The model's forward: fastbert beside transformers' BertModel, on the same weights and the same real texts.

Nothing is timed before its result is checked. Each timed call follows a timed call of the baseline, so that the ratio
compares medians of interleaved rounds: what else the machine does hits both.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache

import pytest
import records
import torch
from memory import peak_memory_bytes
from torch import Tensor
from workloads import BASELINE, DEVICE, PROVIDERS, Case, inputs, kept_tokens, models

SHAPES = ((1, 16, 1.0), (1, 128, 1.0), (8, 128, 1.0), (8, 128, 0.5), (8, 384, 1.0), (8, 384, 0.5))
CASES = [Case("tiny", 1, 16), *(Case(model, *shape) for model in ("minilm", "base") for shape in SHAPES)]
# The tiny model is there for what Python costs, which a compiled graph does not pay.
FORWARDS = [(case, name) for case in CASES for name in PROVIDERS if case.model != "tiny" or "compiled" not in name]
MEMORY_CASES = [Case("minilm", 8, 384), Case("minilm", 8, 384, 0.5), Case("base", 8, 128)]

SECONDS_PER_CASE, LEAST_ROUNDS, MOST_ROUNDS, WARMUP_ROUNDS = 5.0, 4, 300, 2


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def _readable(value: Case | str) -> str:
    return str(value).replace(" ", "-").replace("%", "")


@pytest.mark.parametrize(("case", "provider"), FORWARDS, ids=_readable)
def test_forward(benchmark, case, provider):
    """A provider's forward is at most twice as wrong as the baseline's (in the maximum over the kept tokens, but for
    one rounding of the largest value), and then takes its time."""
    benchmark.group = str(case)
    forward, baseline = _forward(case, provider), _forward(case, BASELINE)
    truth, baseline_error = _truth(case)
    error = _error(case, forward() if benchmark.enabled else benchmark.pedantic(forward), truth)
    rounding = torch.finfo(torch.float32).eps * truth.abs().max().item()
    assert error <= 2 * baseline_error + rounding, f"{provider} errs by {error:.2e}, {BASELINE} by {baseline_error:.2e}"
    if not benchmark.enabled:
        return

    rounds = int(SECONDS_PER_CASE / (_undisturbed_seconds(forward) + _undisturbed_seconds(baseline)))
    rounds = min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)
    baseline_s = []

    def time_baseline():
        baseline_s.append(_seconds(baseline))

    benchmark.pedantic(forward, setup=time_baseline, rounds=rounds, warmup_rounds=WARMUP_ROUNDS)
    seconds = benchmark.stats.stats.data
    median_s, baseline_median_s = statistics.median(seconds), statistics.median(baseline_s[WARMUP_ROUNDS:])
    q20_s, *_, q80_s = statistics.quantiles(seconds, n=5, method="inclusive")
    records.write(
        _record("latency", case, provider)
        | {"median_s": median_s, "q20_s": q20_s, "q80_s": q80_s, "rounds": rounds}
        | {"baseline_median_s": baseline_median_s, "ratio": baseline_median_s / median_s}
        | {"error": error, "error_ratio": error / baseline_error}
    )


@pytest.mark.parametrize("case", MEMORY_CASES, ids=_readable)
def test_memory(request, case):
    """The peak memory of one forward beside the baseline's, recorded whatever it is."""
    if request.config.getoption("benchmark_disable"):
        pytest.skip("memory is recorded, not checked, and benchmarks are disabled")
    if DEVICE.type != "cpu":
        pytest.skip("the peak is read from the CPU's allocator")
    peaks = {}
    for provider in ("fastbert", BASELINE):
        forward = _forward(case, provider)
        forward()
        peaks[provider] = peak_memory_bytes(forward)
    for provider, peak_bytes in peaks.items():
        ratio = peaks[BASELINE] / peak_bytes
        measured = {"peak_bytes": peak_bytes, "baseline_peak_bytes": peaks[BASELINE], "ratio": ratio}
        records.write(_record("memory", case, provider) | measured)


def _record(kind: str, case: Case, provider: str) -> dict:
    tokens = int(_inputs(case)["attention_mask"].sum())
    described = asdict(case) | {"tokens": tokens}
    return {"suite": "model", "kind": kind, "case": described, "provider": provider, "baseline": BASELINE}


_inputs = lru_cache(maxsize=1)(inputs)


def _forward(case: Case, provider: str) -> Callable:
    """A call of the provider's model on the case's batch, which ends when the device has finished."""
    model, batch = models(case.model)[provider], _inputs(case)

    def forward():
        outputs = model(**batch)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return outputs

    return forward


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _undisturbed_seconds(call: Callable) -> float:
    """The least that `call` takes in half a second of tries."""
    seconds = [_seconds(call)]
    while sum(seconds) < 0.5:
        seconds.append(_seconds(call))
    return min(seconds)


@lru_cache(maxsize=1)
def _truth(case: Case) -> tuple[Tensor, float]:
    """The kept tokens' hidden states in float64 [T, E], and the largest error of the baseline."""
    truth = kept_tokens(_forward(case, "truth")(), _inputs(case)["attention_mask"])
    return truth, _error(case, _forward(case, BASELINE)(), truth)


def _error(case: Case, outputs, truth: Tensor) -> float:
    """The largest difference of the hidden states from the truth [T, E]."""
    return (kept_tokens(outputs, _inputs(case)["attention_mask"]).double() - truth).abs().max().item()
