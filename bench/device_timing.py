"""What calls take on a GPU without what the host takes to launch them, and the rates that the GPU reaches at most.

Calls are captured into CUDA graphs; the graphs' replays take turns and are timed by events. Nothing waits between the
replays of one measurement, so that the host stays ahead and no gap before a launch is timed.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol

import torch
from workloads import DEVICE

from fastbert_kernels.tuning.roofline import Roofs, Work

ROUNDS, WARMUP_ROUNDS, GRAPH_SECONDS = 30, 2, 2e-3
CACHE_MULTIPLE, FEWEST_SETS, MOST_SETS = 4, 2, 64
# A product large enough for the matrix unit to be the only limit, and a copy that no cache holds. float32 runs at a
# fraction of the rate: half the size is enough.
MATMUL_SIZES, COPY_BYTES = {"float32": 4096, "float16": 8192, "bfloat16": 8192}, 2**30
# The first rounds of a rested device are its best ones. So many, of GRAPH_SECONDS each, are about a second of load, in
# which its clock falls.
REST_SECONDS, LOAD_ROUNDS = 0.5, 500


class Replay(NamedTuple):
    """run() makes these calls. A graph knows addresses alone: the calls are kept because they keep their inputs."""

    run: Callable[[], None]
    calls: Sequence[Callable]


class Timer(Protocol):
    """What a comparison needs of a device: tests put the host's clock in the GPU's place."""

    cache_bytes: int

    def capture(self, calls: Sequence[Callable]) -> Replay: ...

    def seconds(self, replays: Sequence[Replay], rounds: int = ROUNDS) -> list[list[float]]: ...


class GraphTimer:
    """CUDA graphs, timed by events."""

    @property
    def cache_bytes(self) -> int:
        """The size of the last cache before memory."""
        return torch.cuda.get_device_properties(DEVICE).L2_cache_size

    def capture(self, calls: Sequence[Callable]) -> Replay:
        """A graph of the calls in turns, as many turns as take about GRAPH_SECONDS.

        Each call runs once before: kernels compile and libraries choose theirs outside of the graph. A turn's time is
        read from a graph of it, for a call from the host may take many times the kernel's time.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        stream.synchronize()
        turn = self._graph(calls, 1, stream)
        turns = round(GRAPH_SECONDS / (statistics.median(self.seconds([turn], 3)[0]) * len(calls)))
        return self._graph(calls, turns, stream) if turns > 1 else turn

    def _graph(self, calls: Sequence[Callable], turns: int, stream: torch.cuda.Stream) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(turns):
                # An output that is dropped within its turn would give its memory, still in the cache, to the next call.
                outputs = [call() for call in calls]
                del outputs
        return Replay(graph.replay, [*calls] * turns)

    def seconds(self, replays: Sequence[Replay], rounds: int = ROUNDS) -> list[list[float]]:
        """For each replay the seconds of one of its calls, round by round; every other round goes the other way about,
        so that none always follows the same one."""
        events = [[] for _ in replays]
        for turn in range(WARMUP_ROUNDS + rounds):
            for place in range(len(replays))[:: -1 if turn % 2 else 1]:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                replays[place].run()
                end.record()
                events[place].append((start, end))
        torch.cuda.synchronize()
        return [
            [start.elapsed_time(end) / 1e3 / len(replay.calls) for start, end in timed[WARMUP_ROUNDS:]]
            for replay, timed in zip(replays, events, strict=True)
        ]


# None where nothing can be timed: results are checked there.
TIMER: Timer | None = GraphTimer() if DEVICE.type == "cuda" else None


def sets_to_rotate(bytes_a_call: float, timer: Timer) -> int:
    """How many sets of inputs are several times larger than the cache, so that a call finds none of its own there.

    At most MOST_SETS: calls on a few hundred kilobytes are bound by their launch, wherever these lie.
    """
    return min(max(FEWEST_SETS, round(CACHE_MULTIPLE * timer.cache_bytes / bytes_a_call)), MOST_SETS)


def float32_precision() -> str:
    """How torch multiplies float32 matrices: "ieee", or "tf32" where torch.backends allows it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class MeasuredRoofs(NamedTuple):
    """best: of the best round of a rested device, the roof of `of_roof`. sustained: medians of the second half of
    LOAD_ROUNDS."""

    best: Roofs
    sustained: Roofs


@cache
def roofs(timer: Timer) -> MeasuredRoofs:
    """This device's: by dtype a large product of random data, and a large copy, bytes read and written.

    The copy is a kernel that negates: memcpy, which `copy_` calls, reaches two thirds of an H200's bandwidth
    (NVIDIA/cccl#1672) and less from a graph (pytorch/pytorch#191284). float32's is the larger of two: torch's product
    in `float32_precision`, and a third of the rate of its product in TF32, for three of those have float32's precision.
    """
    source = torch.empty(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    copy = _best_and_sustained(2.0 * COPY_BYTES, lambda: torch.neg(source, out=target), timer)
    products = {name: _matmul_rates(name, timer) for name in MATMUL_SIZES}
    with _tf32():
        thirds = [rate / 3 for rate in _matmul_rates("float32", timer)]
    products["float32"] = tuple(map(max, products["float32"], thirds))
    return MeasuredRoofs(
        *(Roofs({name: both[i] for name, both in products.items()}, bytes_per_s) for i, bytes_per_s in enumerate(copy))
    )


def rates(work: Work, dtype: str, median_s: float, timer: Timer) -> dict:
    """What a record says of a time: the operations and bytes a second of what had to be done, and the share of the time
    that this device's best roofs allow."""
    best, sustained = roofs(timer)
    return {
        "flops_per_s": work.flops / median_s,
        "bytes_per_s": work.bytes / median_s,
        "of_roof": work.seconds(dtype, best) / median_s,
        "roofs": best._asdict() | {"sustained": sustained._asdict(), "float32_precision": float32_precision()},
    }


@contextmanager
def _tf32() -> Iterator[None]:
    """Let torch multiply float32 matrices in TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _matmul_rates(dtype: str, timer: Timer) -> tuple[float, float]:
    """Operations a second of a square product, best and sustained."""
    size = MATMUL_SIZES[dtype]
    a, b = (torch.randn(size, size, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))
    return _best_and_sustained(2.0 * size**3, lambda: a @ b, timer)


def _best_and_sustained(amount: float, call: Callable, timer: Timer) -> tuple[float, float]:
    """How much of an amount a call does a second: in the best round after a rest, and under load."""
    replay = timer.capture([call])
    time.sleep(REST_SECONDS)
    (seconds,) = timer.seconds([replay], LOAD_ROUNDS)
    return amount / min(seconds), amount / statistics.median(seconds[len(seconds) // 2 :])
