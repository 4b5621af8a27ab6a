"""Each kernel beside its twin in plain PyTorch and the device's measured roof, on a GPU.

A kernel's result is checked before it is timed. Kernel and twin are captured into a CUDA graph each, over inputs that
take turns and outgrow the L2 cache, so that neither pays for its launches; the replays alternate.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import pytest
import records
import torch
from workloads import DEVICE

import fastbert_kernels
from fastbert import eager
from fastbert_kernels import roofline

MODELS = roofline.MODELS | {"toy": roofline.Model(1, 48, 3, 80)}
SEQ_LEN, VOCAB = 128, 30522
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
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BASELINE, ROUNDS, ROTATION_BYTES, GRAPH_SECONDS = "eager", 30, 2**28, 2e-3


@dataclass(frozen=True)
class KernelCase:
    """An op at a model's sizes over a batch of texts of SEQ_LEN places."""

    op: str
    model: str
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}-{self.model}-{self.tokens}-{self.dtype}"


TOY = [KernelCase(op, "toy", 128, "float32") for op in OPS]
TIMED = [
    KernelCase(op, model, tokens, dtype)
    for model in ("minilm", "base", "large")
    for tokens in (128, 4096, 32768)
    for dtype in DTYPES
    for op in OPS
    if dtype == "bfloat16" or model == "base"
]


def call_of(case: KernelCase, seed: int) -> tuple[str, tuple]:
    """The op's name and its arguments."""
    _, width, heads, inner = MODELS[case.model]
    dtype, tokens = DTYPES[case.dtype], case.tokens
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    def linear(outputs, inputs):
        return normal(outputs, inputs) * inputs**-0.5, normal(outputs)

    x, norm = normal(tokens, width), (normal(width), normal(width), 1e-12)
    bounds = torch.arange(0, tokens + 1, SEQ_LEN, device=DEVICE, dtype=torch.int32)
    mask = torch.ones(tokens // SEQ_LEN, SEQ_LEN, device=DEVICE, dtype=torch.long)
    places = torch.arange(tokens, device=DEVICE)
    if case.op == "packing_plan":
        return case.op, (mask,)
    if case.op == "embed_layer_norm":
        ids = torch.randint(0, VOCAB, mask.shape, generator=generator, device=DEVICE)
        tables = normal(VOCAB, width), normal(SEQ_LEN, width), normal(2, width)
        return case.op, (ids, mask, None, None, places, *tables, *norm)
    if case.op == "qkv_projection":
        return case.op, (x, *linear(width, width), *linear(width, width), *linear(width, width), heads)
    if case.op == "attention":
        return case.op, (normal(tokens, 3, heads, width // heads), bounds, SEQ_LEN, (width // heads) ** -0.5)
    if case.op == "linear_activation":
        return case.op, (x, *linear(inner, width), "gelu")
    if case.op in ("attention_output", "feed_forward_output"):
        hidden = normal(tokens, width if case.op == "attention_output" else inner)
        return "linear_residual_layer_norm", (hidden, *linear(width, hidden.shape[1]), x, *norm)
    if case.op == "unpack":
        return case.op, (x, places, *mask.shape)
    return case.op, (x, bounds, "mean", True)


def work_of(case: KernelCase) -> roofline.Work:
    return roofline.work(case.op, MODELS[case.model], case.tokens // SEQ_LEN, SEQ_LEN, DTYPES[case.dtype].itemsize)


def in_float64(arguments: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)


def error_of(output, truth) -> float:
    """The largest difference from the truth; of a plan, whether any index differs."""
    if isinstance(output, tuple):
        return max(float((a != b).any()) for a, b in zip(output, truth, strict=True))
    return (output.double() - truth).abs().max().item()


@cache
def roofs() -> roofline.Roofs:
    """This device's, measured: a large product of random data by dtype (float32 as torch.backends has it), a copy."""
    found = {}
    for name, dtype in DTYPES.items():
        size = 4096 if name == "float32" else 8192
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        found[name] = 2.0 * size**3 / median_seconds(lambda a=a, b=b: a @ b)
    source = torch.empty(2**30, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return roofline.Roofs(found, 2.0 * source.numel() / median_seconds(lambda: target.copy_(source)))


def event_seconds(call: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(call: Callable) -> float:
    for _ in range(3):
        call()
    return statistics.median(event_seconds(call) for _ in range(ROUNDS))


def captured(calls: list[Callable]) -> tuple[Callable, int]:
    """A graph that runs the calls in turns for about GRAPH_SECONDS, and how many it holds."""
    for call in calls:
        call()
    once = sum(event_seconds(call) for call in calls)
    turns = max(1, round(GRAPH_SECONDS / once))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    return graph.replay, turns * len(calls)


@pytest.mark.parametrize("case", TOY if DEVICE.type == "cpu" else TIMED, ids=str)
@torch.inference_mode()
def test_kernel(benchmark, case):
    """A kernel is at most twice as wrong as its twin, but for one rounding of the largest value, and is then timed."""
    if DEVICE.type == "cpu" and not fastbert_kernels.INTERPRETED:
        pytest.skip("kernels are timed on a GPU; without one, TRITON_INTERPRET=1 checks them at toy sizes")
    benchmark.group = f"{case.op} {case.model} {case.tokens} {case.dtype}"
    name, arguments = call_of(case, 0)
    kernel, twin = getattr(fastbert_kernels, name), getattr(eager, name)
    truth = twin(*in_float64(arguments))
    error, twin_error = error_of(kernel(*arguments), truth), error_of(twin(*arguments), truth)
    largest = 0.0 if isinstance(truth, tuple) else truth.abs().max().item()
    assert error <= 2 * twin_error + torch.finfo(DTYPES[case.dtype]).eps * largest, f"{error:.2e}, {twin_error:.2e}"
    if not benchmark.enabled or DEVICE.type == "cpu":
        benchmark.pedantic(kernel, arguments)
        return

    del truth
    needed = work_of(case)
    sets = min(8, max(2, round(ROTATION_BYTES / needed.bytes)))
    inputs = [arguments, *(call_of(case, seed)[1] for seed in range(1, sets))]
    ours, calls = captured([lambda given=given: kernel(*given) for given in inputs])
    theirs, twin_calls = captured([lambda given=given: twin(*given) for given in inputs])
    seconds, twin_seconds = [], []

    def timed():
        seconds.append(event_seconds(ours) / calls)

    benchmark.pedantic(timed, setup=lambda: twin_seconds.append(event_seconds(theirs) / twin_calls), rounds=ROUNDS)
    median_s, twin_median_s = statistics.median(seconds), statistics.median(twin_seconds)
    q20_s, *_, q80_s = statistics.quantiles(seconds, n=5, method="inclusive")
    floor_s = needed.seconds(case.dtype, roofs())
    records.write(
        {"suite": "kernels", "kind": "kernel", "case": asdict(case), "provider": "fastbert", "baseline": BASELINE}
        | {"median_s": median_s, "q20_s": q20_s, "q80_s": q80_s, "rounds": ROUNDS}
        | {"baseline_median_s": twin_median_s, "ratio": twin_median_s / median_s}
        | {"error": error, "error_ratio": error / twin_error if twin_error else None}
        | {"flops_per_s": needed.flops / median_s, "bytes_per_s": needed.bytes / median_s}
        | {"of_roof": floor_s / median_s, "roofs": roofs()._asdict()}
    )
