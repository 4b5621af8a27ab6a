"""Each kernel compared with its eager reference, the reference under torch.compile, and the device's measured roofs.

Batches are full, so every op works on batch * seq_len tokens, except the packing plan, whose mask has padding. Without
a GPU the results are checked at toy sizes in Triton's interpreter.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import pytest
import torch
from comparison import OURS, Comparison, planned, run
from shown_clock import CLOCK
from workloads import DEVICE, for_this_run

import fastbert_kernels
from fastbert.ops import eager
from fastbert_kernels.tuning import roofline

MODELS = roofline.MODELS | {"toy": roofline.Model(1, 48, 3, 80)}
VOCAB = 30522
BASELINE, COMPILED = "torch", "torch-compiled"
OPS = (
    "packing_plan",
    "embed_layer_norm",
    "qkv_projection",
    "attention",
    "attention_output",
    "linear_activation",
    "feed_forward_output",
    "unpack",
    "pool",
)


@dataclass(frozen=True)
class KernelCase:
    """An op at a model's sizes on a batch [batch, seq_len]."""

    op: str
    model: str
    batch: int
    seq_len: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}-{self.model}-{self.batch}x{self.seq_len}-{self.dtype}"


def timed() -> list[tuple[KernelCase, str]]:
    """Return what is timed, the most informative first.

    All ops of three models run in bfloat16, and base's layer also in float32 and float16, with fewer batches. The
    packing plan depends on neither model nor dtype, so it runs for base only. Since torch.compile takes seconds for
    each case, it runs for two batches of base in bfloat16. The baseline timed beside itself shows the noise.
    """
    return [
        (KernelCase(op, model, batch, 128, dtype), provider)
        for model, dtype, ops, batches, providers in (
            ("base", "bfloat16", OPS, (1,), (OURS, BASELINE, COMPILED)),
            ("base", "bfloat16", OPS, (32, 256, 8), (OURS, BASELINE)),
            ("base", "bfloat16", OPS, (32,), (COMPILED,)),
            ("minilm", "bfloat16", OPS[1:], (1, 32, 256, 8), (OURS,)),
            ("large", "bfloat16", OPS[1:], (1, 32, 256, 8), (OURS,)),
            ("base", "float32", roofline.LAYER, (1, 32, 256), (OURS,)),
            ("base", "float16", roofline.LAYER, (32,), (OURS,)),
        )
        for batch in batches
        for op in ops
        for provider in providers
    ]


TOY = [(KernelCase(op, "toy", 2, 64, "float32"), name) for op in OPS for name in (OURS, BASELINE)]
TOY.append((KernelCase("linear_activation", "toy", 2, 64, "float32"), COMPILED))


def pytest_generate_tests(metafunc):
    pairs = for_this_run(metafunc.config, TOY, TOY, timed())
    metafunc.parametrize(("case", "provider"), planned(pairs, COMPILED), ids=str)


def call_of(case: KernelCase) -> tuple[str, tuple]:
    """Return the name of the case's function and its arguments."""
    _, width, heads, inner = MODELS[case.model]
    dtype, batch, seq_len = getattr(torch, case.dtype), case.batch, case.seq_len
    tokens = batch * seq_len
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    def linear(outputs, inputs):
        return normal(outputs, inputs) * inputs**-0.5, normal(outputs)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, device=DEVICE)

    norm = normal(width), normal(width), 1e-12
    bounds = torch.arange(0, tokens + 1, seq_len, device=DEVICE, dtype=torch.int32)
    places = torch.arange(tokens, device=DEVICE)
    if case.op == "packing_plan":
        mask = torch.arange(seq_len, device=DEVICE) < integers(1, seq_len + 1, batch, 1)
        return case.op, (mask.long(),)
    if case.op == "embed_layer_norm":
        ids, types = integers(0, VOCAB, batch, seq_len), integers(0, 2, batch, seq_len)
        tables = normal(VOCAB, width), normal(seq_len, width), normal(2, width)
        return case.op, (ids, types, None, None, places, *tables, *norm)
    if case.op == "qkv_projection":
        weights = *linear(width, width), *linear(width, width), *linear(width, width)
        return case.op, (normal(tokens, width), *weights, heads)
    if case.op == "attention":
        return case.op, (normal(tokens, 3, heads, width // heads), bounds, seq_len, (width // heads) ** -0.5)
    if case.op == "linear_activation":
        return case.op, (normal(tokens, width), *linear(inner, width), "gelu")
    if case.op in ("attention_output", "feed_forward_output"):
        hidden = normal(tokens, width if case.op == "attention_output" else inner)
        residual = normal(tokens, width)
        return "linear_residual_layer_norm", (hidden, *linear(width, hidden.shape[1]), residual, *norm)
    if case.op == "unpack":
        return case.op, (normal(tokens, width), places, batch, seq_len)
    return case.op, (normal(tokens, width), bounds, "mean", True)


def in_float64(arguments: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)


def error_of(output, truth) -> float:
    """Return the largest difference from the truth; for a plan, 1 if a kept place or a bound differs, else 0."""
    if isinstance(truth, tuple):
        (indices, bounds), (true_indices, true_bounds) = output, truth
        kept = true_bounds[-1]
        return float(not torch.equal(bounds, true_bounds) or not torch.equal(indices[:kept], true_indices[:kept]))
    return (output.double() - truth).abs().max().item()


@lru_cache(maxsize=1)
def comparison(case: KernelCase) -> Comparison:
    name, arguments = call_of(case)
    reference = getattr(eager, name)
    # After a number of recompilations torch would fall back to eager, so each case starts anew.
    torch.compiler.reset()
    functions = {
        OURS: getattr(fastbert_kernels, name),
        BASELINE: reference,
        COMPILED: torch.compile(reference, dynamic=False, fullgraph=True),
    }
    truth = reference(*in_float64(arguments))
    return Comparison(
        suite="kernels",
        kind="kernel",
        case=asdict(case),
        baseline=BASELINE,
        inputs=arguments,
        provide=lambda provider, given: partial(functions[provider], *given),
        error=lambda output: error_of(output, truth),
        largest=0.0 if isinstance(truth, tuple) else truth.abs().max().item(),
        work=roofline.work(case.op, MODELS[case.model], case.batch, case.seq_len, getattr(torch, case.dtype).itemsize),
    )


@pytest.fixture(scope="module", autouse=True)
def _free_memory():
    yield
    comparison.cache_clear()


@pytest.mark.benchmark(timer=CLOCK)
@torch.no_grad()
def test_kernel(request, case, provider):
    """Check that the error is at most twice the reference's plus a few roundings of the largest value, then time."""
    if DEVICE.type == "cpu" and not fastbert_kernels.INTERPRETED:
        pytest.skip("kernels are timed on a GPU; without one, TRITON_INTERPRET=1 checks them at toy sizes")
    run(request, comparison, case, provider)
