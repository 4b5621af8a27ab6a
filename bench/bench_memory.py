"""The peak memory of a forward, without weights and inputs. It is recorded, and nothing is required of it."""

from dataclasses import asdict
from functools import cache

import records
import torch
from memory import peak_memory_bytes
from providers import BASELINE, HOST_MASK, UNPADDED, about, checked, or_absent, planned
from workloads import DEVICE, Case, for_this_run, inputs

import fastbert

PROVIDERS = (BASELINE, "fastbert", HOST_MASK, UNPADDED)

TOY = [(Case("toy", 8, 24, 0.5), provider) for provider in PROVIDERS]
CPU = [
    (case, provider)
    for case in (Case("minilm", 8, 384), Case("minilm", 8, 384, 0.5), Case("base", 8, 128))
    for provider in (BASELINE, "fastbert")
]
CUDA = [
    (Case(model, 32, 512, fill, dtype), provider)
    for model, fill, dtype in (
        ("base", 1.0, "bfloat16"), ("base", 0.5, "bfloat16"), ("base", 1.0, "float32"), ("base", 0.5, "float32"),
        ("large", 0.5, "bfloat16"),
    )
    for provider in PROVIDERS
]  # fmt: skip


def pytest_generate_tests(metafunc):
    asked = for_this_run(metafunc.config, TOY, CPU, CUDA)
    metafunc.parametrize(("case", "provider"), [planned(*each) for each in asked])


@cache
def peak_of(case: Case, provider: str) -> int:
    # Without CUDA graphs: a replay allocates only its outputs, since the graph keeps the memory of the rest.
    with fastbert.cuda_graphs("off"):
        forward = checked(case, provider).forward
        forward()
        return peak_memory_bytes(forward, DEVICE)


@torch.inference_mode()
def test_memory(request, case, provider):
    """Record the peak of one forward and the baseline's."""
    recorded = not request.config.getoption("benchmark_disable")
    tokens = int(inputs(case)["attention_mask"].sum())
    record = about("memory", "memory", asdict(case) | {"tokens": tokens}, provider)
    with or_absent(record, recorded):
        peak_bytes, baseline_bytes = peak_of(case, provider), peak_of(case, BASELINE)
    assert peak_bytes > 0
    if recorded:
        ratio = baseline_bytes / peak_bytes
        records.write(record | {"peak_bytes": peak_bytes, "baseline_peak_bytes": baseline_bytes, "ratio": ratio})
