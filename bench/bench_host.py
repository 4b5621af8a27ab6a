"""The host's work for a forward pass in the kernels: Python and Triton, without the driver. No GPU is needed.

Kernels are compiled for sm_90 and, with CPU tensors, launched into a function that does nothing. The baseline makes the
same launches through Triton's own launcher. The difference between two depths is the time of a layer. A call that
replays a CUDA graph is timed without the driver's work in its copies and in the replay.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import pytest
import records
import torch
import transformers
from providers import SIZES, about
from shown_clock import CLOCK
from workloads import for_this_run

import fastbert
import fastbert_kernels
from fastbert import graphs, tokens
from fastbert.commands.timing import side_by_side
from fastbert_kernels.launch import launching_by
from fastbert_kernels.tuning.ahead_of_time import CHIPS, launching_into

BASELINE = "triton-binding"
TARGET = CHIPS["sm_90"].target
DEPTHS = (2, 12)
SECONDS_PER_CASE = 2.0
ROUNDS = 300


@dataclass(frozen=True)
class HostCase:
    """A forward on a batch [batch, seq_len] with its mask on the device."""

    model: str
    batch: int
    seq_len: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.model}-{self.batch}x{self.seq_len}-{self.dtype}"


TOY = [HostCase("toy", 3, 24, "bfloat16")]
CASES = [HostCase("base", *shape, dtype) for dtype in ("bfloat16", "float32") for shape in ((1, 128), (32, 128))]


class EmptyGraphs(graphs.CudaGraphs):
    """CUDA graphs whose replay only records the time."""

    replayed_at = 0.0

    def __init__(self, device: torch.device):
        self.device = device

    def capture(self, run: Callable):
        def replay():
            EmptyGraphs.replayed_at = time.perf_counter()

        return replay, run()

    def order_after_last_replay(self) -> None:
        pass

    def record_replay(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let kernels and CUDA graphs accept CPU tensors, and keep the host from reading their values."""
    with pytest.MonkeyPatch.context() as patch, fastbert.backend("triton"), torch.inference_mode():
        patch.setattr(fastbert_kernels, "INTERPRETED", True)
        patch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
        patch.setattr(graphs, "DEVICE_TYPE", "cpu")
        patch.setattr(graphs, "CudaGraphs", EmptyGraphs)
        yield


@pytest.fixture(autouse=True)
def _as_on_a_gpu():
    if fastbert_kernels.INTERPRETED:
        pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET")
    with as_on_a_gpu():
        yield


def pytest_generate_tests(metafunc):
    # Without large batches for replays, whose copies would be real work of the CPU.
    cases = [case for case in CASES if case.batch == 1 or metafunc.function is test_launches]
    metafunc.parametrize("case", for_this_run(metafunc.config, TOY, cases, cases), ids=str)


@pytest.mark.planned_seconds(6)
@pytest.mark.benchmark(timer=CLOCK)
def test_launches(benchmark, case):
    """Check that both ways launch the same kernels on the same grids, then time a forward in each."""
    benchmark.group = f"launches of {case}"
    launched = []
    with launching_into(TARGET, lambda name, grid, arguments: launched.append((name, grid))):
        forward = forward_of(case, DEPTHS[0])
        forward()  # prepares launches and compiles
        directly = _made(launched, forward)
        assert directly
        assert _made(launched, _through_triton(forward)) == directly
        if not benchmark.enabled:
            benchmark.pedantic(forward)
            return
    with launching_into(TARGET, lambda name, grid, arguments: None):
        shallow, deep = (_timed(forward_of(case, depth)) for depth in DEPTHS)
    layers = DEPTHS[1] - DEPTHS[0]
    layer_s, baseline_layer_s = (
        (deep.fields()[name] - shallow.fields()[name]) / layers for name in ("median_s", "baseline_median_s")
    )
    CLOCK.show(benchmark, deep.seconds)
    records.write(
        about("host", "host", {"path": "launches", **asdict(case)}, "fastbert", BASELINE)
        | deep.fields()
        | {"layer_s": layer_s, "baseline_layer_s": baseline_layer_s}
    )


@pytest.mark.planned_seconds(2)
@pytest.mark.benchmark(timer=CLOCK)
def test_replay(benchmark, case):
    """Check that a replay gives outputs of the same shapes as launches, then time both."""
    benchmark.group = f"replay of {case}"
    seen = []
    with launching_into(TARGET, lambda name, grid, arguments: seen.append(name)):
        launched, replayed = forward_of(case, DEPTHS[1]), forward_of(case, DEPTHS[1], graphed=True)
        shapes = [{name: x.shape for name, x in forward().items()} for forward in (launched, replayed)]
        assert shapes[0] == shapes[1]
        assert not _made(seen, replayed)
        if not benchmark.enabled:
            benchmark.pedantic(replayed)
            return
        measured = side_by_side(replayed, launched, SECONDS_PER_CASE, clock="host")
        until_replay_s = statistics.median(_until_replay(replayed) for _ in range(ROUNDS))
    CLOCK.show(benchmark, measured.seconds)
    case = {"path": "replay", **asdict(case)}
    records.write(
        about("host", "host", case, "fastbert-graphed", "fastbert-launches")
        | measured.fields()
        | {"until_replay_s": until_replay_s}
    )


def forward_of(case: HostCase, depth: int, graphed: bool = False) -> Callable:
    config = transformers.BertConfig(**SIZES[case.model] | {"vocab_size": 1000, "num_hidden_layers": depth})
    with torch.inference_mode(False):
        model = fastbert.BertModel(config).eval().to(getattr(torch, case.dtype))
    if graphed:
        model = fastbert.graphed(model)
    elif switch := getattr(fastbert, "cuda_graphs", None):  # older commits do not have it
        switch("off", model)
    ids = torch.zeros(case.batch, case.seq_len, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids}
    return lambda: model(**batch)


def _until_replay(forward: Callable) -> float:
    """Return the seconds from a call to its replay. The host's work after the replay overlaps with the device's."""
    start = time.perf_counter()
    forward()
    return EmptyGraphs.replayed_at - start


def _through_triton(forward: Callable) -> Callable:
    def call():
        with launching_by(lambda kernel, grid, arguments: kernel[grid](**arguments)):
            forward()

    return call


def _made(launched: list, forward: Callable) -> list:
    """Return the launches of a forward."""
    launched.clear()
    forward()
    return list(launched)


def _timed(forward: Callable):
    forward()
    return side_by_side(forward, _through_triton(forward), SECONDS_PER_CASE, clock="host")
