"""The model's forward: fastbert compared with its peers, on the same weights and the same real texts.

Results are checked before anything is timed. Timed rounds alternate with the baseline's, so that other load on the
machine affects both medians of the ratio. On a GPU a round is many calls back to back, timed by the device's events.
That measures throughput; the host's time for the same calls is recorded as `host_s`.
"""

from dataclasses import asdict

import pytest
import records
import torch
from providers import BASELINE, GRAPHED, UNPADDED, about, checked, or_absent, planned, source
from shown_clock import CLOCK
from workloads import DEVICE, SQUAD, Case, for_this_run, forward_work, inputs

from fastbert.commands.timing import side_by_side, throughput_clock

SECONDS_PER_CASE = 5.0 if DEVICE.type == "cpu" else 0.3

CPU_SHAPES = ((1, 16, 1.0), (1, 128, 1.0), (8, 128, 1.0), (8, 128, 0.5), (8, 384, 1.0), (8, 384, 0.5))
GPU_SHAPES = ((1, 16), (1, 128), (8, 128), (32, 128), (32, 512), (256, 128))

CPU_PROVIDERS = ("fastbert", "transformers-eager", BASELINE, f"{BASELINE}-compiled")
GPU_PROVIDERS = ("fastbert", GRAPHED, BASELINE, UNPADDED)


def _toy_forwards() -> list[tuple[Case, str]]:
    cases = [
        Case("toy", 1, 16), Case("toy", 3, 24, 0.5), Case("toy", 1, 16, dtype="bfloat16"),
        Case("toy", 3, 24, 0.5, "bfloat16"),
    ]  # fmt: skip
    uncompiled = ["fastbert", "transformers-eager", BASELINE, UNPADDED, *([GRAPHED] if DEVICE.type == "cuda" else [])]
    return [*((case, provider) for case in cases for provider in uncompiled), (cases[1], f"{BASELINE}-compiled")]


def _cpu_forwards() -> list[tuple[Case, str]]:
    cases = [Case("tiny", 1, 16), *(Case(model, *shape) for model in ("minilm", "base") for shape in CPU_SHAPES)]
    # The tiny model measures Python's overhead, which compiled graphs do not have.
    return [(case, name) for case in cases for name in CPU_PROVIDERS if case.model != "tiny" or "compiled" not in name]


def _gpu_forwards() -> list[tuple[Case, str]]:
    """Return the forwards on a GPU, the most informative first, so that a run which ends early has them."""
    bf16 = {"dtype": "bfloat16"}
    one, dense = (Case("base", *shape, **bf16) for shape in ((1, 128), (256, 128)))
    ragged, float32 = Case("base", 32, 128, 0.5, **bf16), Case("base", 32, 128)
    headline = [one, dense, ragged, float32]
    shapes = [Case("base", *shape, **bf16) for shape in GPU_SHAPES]
    ragged_shapes = [Case("base", *shape, 0.5, **bf16) for shape in ((32, 512), (256, 128), (8, 128))]
    lengths = [Case("base", 8, seq_len, **bf16) for seq_len in (16, 32, 64, 256, 384, 512)]
    fills = [Case("base", 64, 256, fill, **bf16) for fill in (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)]
    dtypes = [Case("base", 32, 128, 0.5), Case("base", 32, 128, dtype="float16")]
    swept = [SQUAD, *shapes, *ragged_shapes, *lengths, *fills]
    models = [Case(model, *shape, **bf16) for model in ("minilm", "large") for shape in (*GPU_SHAPES, (32, 128, 0.5))]
    forwards = [
        *((case, provider) for case in headline for provider in GPU_PROVIDERS),
        *((case, "transformers-eager") for case in headline),
        (dense, f"{BASELINE}-max-autotune"),
        (one, f"{BASELINE}-reduce-overhead"),
        (one, f"{BASELINE}-compiled"),
        (ragged, f"{UNPADDED}-compiled"),
        (ragged, f"{BASELINE}-compiled"),
        *((case, provider) for case in swept for provider in GPU_PROVIDERS),
        (float32, f"{BASELINE}-compiled"),
        *((case, provider) for case in [*dtypes, *models] for provider in GPU_PROVIDERS),
        (SQUAD, f"{UNPADDED}-compiled"),
        (dense, f"{BASELINE}-compiled"),
        (one, f"{BASELINE}-max-autotune"),
        (ragged, f"{BASELINE}-max-autotune"),
    ]
    return list(dict.fromkeys(forwards))


def pytest_generate_tests(metafunc):
    forwards = for_this_run(metafunc.config, _toy_forwards(), _cpu_forwards(), _gpu_forwards())
    metafunc.parametrize(("case", "provider"), [planned(*asked) for asked in forwards])


@pytest.mark.benchmark(timer=CLOCK)
@torch.inference_mode()
def test_forward(benchmark, case, provider):
    """Check a provider's results, then time its forward."""
    benchmark.group = str(case)
    tokens = int(inputs(case)["attention_mask"].sum())
    record = about("model", "latency", asdict(case) | {"tokens": tokens}, provider)
    with or_absent(record, benchmark.enabled):
        ours = checked(case, provider)
        if not benchmark.enabled:
            benchmark.pedantic(ours.forward)
            return
        baseline = checked(case, BASELINE).forward
        measured = side_by_side(ours.forward, baseline, SECONDS_PER_CASE, throughput_clock(DEVICE))
        median_s = measured.fields()["median_s"]
        record |= measured.fields() | ours.fields | _rates(case, median_s)
    CLOCK.show(benchmark, measured.seconds)
    records.write(record)


def _rates(case: Case, median_s: float) -> dict:
    """Return the rates of a forward on a GPU and its share of the roofs measured in this run; nothing on a CPU."""
    if DEVICE.type != "cuda":
        return {}
    from device_timing import TIMER, rates

    return rates(forward_work(source(case.model, case.dtype).config, case), case.dtype, median_s, TIMER)
