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

# hidden size, heads, feed-forward size
MODELS = {"toy": (48, 3, 80), "minilm": (384, 12, 1536), "base": (768, 12, 3072), "large": (1024, 16, 4096)}
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


def call_of(case: KernelCase, seed: int) -> tuple[str, tuple, float, float]:
    """The op's name, its arguments, and the FLOPs and bytes that its call needs at least."""
    width, heads, inner = MODELS[case.model]
    dtype, tokens = DTYPES[case.dtype], case.tokens
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    def linear(outputs, inputs):
        return normal(outputs, inputs) * inputs**-0.5, normal(outputs)

    def size_of(*tensors):
        return sum(x.numel() * x.itemsize for x in tensors)

    x, norm = normal(tokens, width), (normal(width), normal(width), 1e-12)
    bounds = torch.arange(0, tokens + 1, SEQ_LEN, device=DEVICE, dtype=torch.int32)
    mask = torch.ones(tokens // SEQ_LEN, SEQ_LEN, device=DEVICE, dtype=torch.long)
    places = torch.arange(tokens, device=DEVICE)
    if case.op == "packing_plan":
        return case.op, (mask,), 0.0, 2.0 * size_of(mask)
    if case.op == "embed_layer_norm":
        ids = torch.randint(0, VOCAB, mask.shape, generator=generator, device=DEVICE)
        tables = normal(VOCAB, width), normal(SEQ_LEN, width), normal(2, width)
        return case.op, (ids, mask, None, None, None, *tables, *norm), 0.0, 2.0 * size_of(x) + 2 * size_of(ids)
    if case.op == "qkv_projection":
        weights = (*linear(width, width), *linear(width, width), *linear(width, width))
        return case.op, (x, *weights, heads), 6.0 * tokens * width**2, 4.0 * size_of(x) + size_of(*weights)
    if case.op == "attention":
        qkv, scale = normal(tokens, 3, heads, width // heads), (width // heads) ** -0.5
        return case.op, (qkv, bounds, SEQ_LEN, scale), 4.0 * tokens * SEQ_LEN * width, 4.0 * size_of(x)
    if case.op == "linear_activation":
        weights, outputs = linear(inner, width), tokens * inner * x.itemsize
        return case.op, (x, *weights, "gelu"), 2.0 * tokens * width * inner, size_of(x, *weights) + outputs
    if case.op in ("attention_output", "feed_forward_output"):
        hidden = normal(tokens, width if case.op == "attention_output" else inner)
        weights, flops = linear(width, hidden.shape[1]), 2.0 * hidden.numel() * width
        moved = size_of(hidden, *weights) + 2.0 * size_of(x)
        return "linear_residual_layer_norm", (hidden, *weights, x, *norm), flops, moved
    if case.op == "unpack":
        return case.op, (x, places, *mask.shape), 0.0, 2.0 * size_of(x)
    return case.op, (x, bounds, "mean", True), 0.0, float(size_of(x))


def in_float64(arguments: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)


def error_of(output, truth) -> float:
    """The largest difference from the truth; of a plan, whether any index differs."""
    if isinstance(output, tuple):
        return max(float((a != b).any()) for a, b in zip(output, truth, strict=True))
    return (output.double() - truth).abs().max().item()


@cache
def roofs() -> dict[str, float]:
    """FLOP/s of a large product by dtype (random data; float32 as torch.backends has it) and bytes/s of a copy."""
    found = {}
    for name, dtype in DTYPES.items():
        size = 4096 if name == "float32" else 8192
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        found[name] = 2.0 * size**3 / median_seconds(lambda a=a, b=b: a @ b)
    source = torch.empty(2**30, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    found["copy"] = 2.0 * source.numel() / median_seconds(lambda: target.copy_(source))
    return found


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
    name, arguments, flops, moved = call_of(case, 0)
    kernel, twin = getattr(fastbert_kernels, name), getattr(eager, name)
    truth = twin(*in_float64(arguments))
    error, twin_error = error_of(kernel(*arguments), truth), error_of(twin(*arguments), truth)
    largest = 0.0 if isinstance(truth, tuple) else truth.abs().max().item()
    assert error <= 2 * twin_error + torch.finfo(DTYPES[case.dtype]).eps * largest, f"{error:.2e}, {twin_error:.2e}"
    if not benchmark.enabled or DEVICE.type == "cpu":
        benchmark.pedantic(kernel, arguments)
        return

    del truth
    sets = min(8, max(2, round(ROTATION_BYTES / max(moved, 1.0))))
    inputs = [arguments, *(call_of(case, seed)[1] for seed in range(1, sets))]
    ours, calls = captured([lambda given=given: kernel(*given) for given in inputs])
    theirs, twin_calls = captured([lambda given=given: twin(*given) for given in inputs])
    seconds, twin_seconds = [], []

    def timed():
        seconds.append(event_seconds(ours) / calls)

    benchmark.pedantic(timed, setup=lambda: twin_seconds.append(event_seconds(theirs) / twin_calls), rounds=ROUNDS)
    median_s, twin_median_s = statistics.median(seconds), statistics.median(twin_seconds)
    q20_s, *_, q80_s = statistics.quantiles(seconds, n=5, method="inclusive")
    floor_s = max(flops / roofs()[case.dtype], moved / roofs()["copy"])
    records.write(
        {"suite": "kernels", "kind": "kernel", "case": asdict(case), "provider": "fastbert", "baseline": BASELINE}
        | {"median_s": median_s, "q20_s": q20_s, "q80_s": q80_s, "rounds": ROUNDS}
        | {"baseline_median_s": twin_median_s, "ratio": twin_median_s / median_s}
        | {"error": error, "error_ratio": error / twin_error if twin_error else None}
        | {"flops_per_s": flops / median_s, "bytes_per_s": moved / median_s, "of_roof": floor_s / median_s}
        | {"roofs": roofs()}
    )
