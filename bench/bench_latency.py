"""The latency of one sequence, from the call with ids on the host or the device to the pooled vector on the host.

Times are the host's, and include copies, launches and the device's work. The vector is checked.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict

import pytest
import records
import torch
from providers import (
    BASELINE,
    GRAPHED,
    POOLED,
    UNPADDED,
    about,
    batch_of,
    checked,
    errors,
    model_of,
    or_absent,
    planned,
)
from shown_clock import CLOCK
from workloads import DEVICE, Case, for_this_run, inputs

from fastbert.commands.timing import side_by_side

SECONDS_PER_CASE = 4.0 if DEVICE.type == "cpu" else 1.5
# Includes the checks.
PLANNED_SECONDS = SECONDS_PER_CASE + 1

TOY = [(Case("toy", 1, 16), place, provider) for place in ("host", "device") for provider in ("fastbert", BASELINE)]
CPU = [
    (Case(model, 1, seq_len), "host", provider)
    for model, seq_len in (("tiny", 16), ("minilm", 128))
    for provider in ("fastbert", BASELINE)
]
HEADLINE = Case("base", 1, 128, dtype="bfloat16")
# The most informative first, so that a run which ends early has them.
CUDA = [
    *((HEADLINE, "host", provider) for provider in ("fastbert", GRAPHED, BASELINE, UNPADDED)),
    *((HEADLINE, "host", f"{BASELINE}-{how}") for how in ("compiled", "reduce-overhead")),
    *(
        (Case(model, 1, seq_len, dtype="bfloat16"), "host", provider)
        for model, seq_len in (("base", 16), ("minilm", 128), ("large", 128))
        for provider in ("fastbert", GRAPHED, BASELINE, UNPADDED)
    ),
    *((HEADLINE, "device", provider) for provider in ("fastbert", GRAPHED, BASELINE)),
    *((Case("base", 1, 128), "host", provider) for provider in ("fastbert", GRAPHED, BASELINE)),
    # It compiles for more than a minute.
    (HEADLINE, "host", f"{BASELINE}-max-autotune"),
]


def pytest_generate_tests(metafunc):
    metafunc.parametrize(
        ("case", "ids", "provider"),
        [planned(*asked, seconds=PLANNED_SECONDS) for asked in for_this_run(metafunc.config, TOY, CPU, CUDA)],
    )


def request_of(model: Callable, case: Case, ids: str, provider: str) -> Callable:
    """Return a call that ends with the pooled vectors [B, E] on the host.

    It copies ids on the host to the device, except for the graphed model, which takes ids on any device.
    """
    on_device = batch_of(case, provider)
    on_host = {name: x.cpu() for name, x in on_device.items()}
    if ids == "device" or provider == GRAPHED:
        batch = on_device if ids == "device" else on_host
        return lambda: model(**batch).pooler_output.cpu()
    devices = {name: x.device for name, x in on_device.items()}
    return lambda: model(**{name: x.to(devices[name]) for name, x in on_host.items()}).pooler_output.cpu()


@pytest.mark.benchmark(timer=CLOCK)
@torch.inference_mode()
def test_latency(benchmark, case, ids, provider):
    """Check a provider's results, then time the call."""
    benchmark.group = f"{case}, ids on the {ids}"
    tokens = int(inputs(case)["attention_mask"].sum())
    record = about("latency", "request", asdict(case) | {"tokens": tokens, "ids": ids}, provider)
    with or_absent(record, benchmark.enabled):
        found = checked(case, provider)
        request = request_of(found.model, case, ids, provider)
        found_errors = errors(case, POOLED, request() if benchmark.enabled else benchmark.pedantic(request))
        if not benchmark.enabled:
            return
        baseline = request_of(model_of(case, BASELINE), case, ids, BASELINE)
        measured = side_by_side(request, baseline, SECONDS_PER_CASE, clock="host")
        percentiles = statistics.quantiles(measured.seconds, n=100, method="inclusive")
        record |= (
            measured.fields()
            | found.fields
            | found_errors
            | {f"p{rank}_s": percentiles[rank - 1] for rank in (50, 90, 99)}
        )
    CLOCK.show(benchmark, measured.seconds)
    records.write(record)
