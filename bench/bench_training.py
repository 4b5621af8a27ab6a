"""A training step of BertForSequenceClassification with two labels: fastbert compared with its peers.

A step is zero_grad, forward with the loss, backward and fused AdamW, from the same weights on the same real texts. The
loss and the gradients are checked before anything is timed. Rounds alternate with the baseline's, as for the model's
forward. The peak memory of a step is recorded beside its time.
"""

from dataclasses import asdict
from functools import lru_cache

import pytest
import records
from providers import BASELINE, COMPILED, OURS_COMPILED, about, or_absent, planned
from shown_clock import CLOCK
from training_steps import baseline_of, checked
from workloads import DEVICE, TrainingCase, for_this_run, inputs

from fastbert.commands.timing import side_by_side, throughput_clock

SECONDS_PER_CASE = 8.0 if DEVICE.type == "cpu" else 0.6
# Include the checks. A backward is compiled, too, which takes longer than a forward.
PLANNED_SECONDS, PLANNED_COMPILED_SECONDS = 2, 25

UNCOMPILED = ("fastbert", BASELINE, "transformers-eager")
# fill and dropout, the most usual first.
VARIANTS = ((1.0, 0.1), (0.5, 0.1), (1.0, 0.0), (0.5, 0.0))


def _cases(model: str, batch: int, seq_len: int, dtype: str = "float32") -> list[TrainingCase]:
    return [TrainingCase(model, batch, seq_len, fill, dtype, dropout) for fill, dropout in VARIANTS]


def _toy_steps() -> list[tuple[TrainingCase, str]]:
    cases = [*_cases("toy", 4, 24), *_cases("toy", 4, 24, "bfloat16")]
    steps = [(case, provider) for case in cases for provider in UNCOMPILED]
    return [*steps, (cases[1], OURS_COMPILED), (cases[2], f"{BASELINE}-compiled")]


def _cpu_steps() -> list[tuple[TrainingCase, str]]:
    return [(case, provider) for case in _cases("minilm", 8, 128) for provider in UNCOMPILED]


def _gpu_steps() -> list[tuple[TrainingCase, str]]:
    """Return the steps on a GPU, the most informative first, so that a run which ends early has them."""
    headline = _cases("base", 32, 128, "bfloat16")
    others = [
        *_cases("base", 32, 512, "bfloat16"), *_cases("base", 8, 128, "bfloat16"),
        *_cases("minilm", 32, 128, "bfloat16"), *_cases("base", 32, 128),
    ]  # fmt: skip
    compiled = (f"{BASELINE}-compiled", OURS_COMPILED)
    steps = [
        *((case, provider) for case in headline for provider in UNCOMPILED),
        (headline[0], compiled[0]),
        # Their records have the baseline's times, too.
        *((case, "fastbert") for case in others),
        (headline[0], compiled[1]),
        *((case, provider) for case in others for provider in UNCOMPILED),
        *((case, provider) for case in [*headline, *others] for provider in compiled),
    ]
    return list(dict.fromkeys(steps))


def pytest_generate_tests(metafunc):
    steps = for_this_run(metafunc.config, _toy_steps(), _cpu_steps(), _gpu_steps())
    seconds = {True: PLANNED_COMPILED_SECONDS, False: PLANNED_SECONDS}
    asked = [planned(case, provider, seconds=seconds[provider in COMPILED]) for case, provider in steps]
    metafunc.parametrize(("case", "provider"), asked)


@lru_cache(maxsize=1)
def _baseline_peak_bytes(case: TrainingCase) -> int:
    return baseline_of(case).peak_bytes()


@pytest.mark.benchmark(timer=CLOCK)
def test_training(benchmark, case, provider):
    """Check a provider's loss and gradients, then time its step and measure the step's peak memory."""
    benchmark.group = str(case)
    tokens = int(inputs(case)["attention_mask"].sum())
    record = about("training", "training", asdict(case) | {"tokens": tokens}, provider)
    with or_absent(record, benchmark.enabled):
        step, fields = checked(case, provider)
        if not benchmark.enabled:
            benchmark.pedantic(step)
            return
        measured = side_by_side(step, baseline_of(case), SECONDS_PER_CASE, throughput_clock(DEVICE))
        peak_bytes, baseline_peak_bytes = step.peak_bytes(), _baseline_peak_bytes(case)
        record |= measured.fields() | fields
        record |= {"peak_bytes": peak_bytes, "baseline_peak_bytes": baseline_peak_bytes}
        record |= {"memory_ratio": baseline_peak_bytes / peak_bytes}
    CLOCK.show(benchmark, measured.seconds)
    records.write(record)
