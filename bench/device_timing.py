"""GPU times of calls without the host's launch overhead, and the peak rates of the GPU.

Calls are captured into CUDA graphs, whose replays alternate and are timed by events. There is no sync between the
replays of one measurement, so that the host stays ahead of the device and no gaps are timed.
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
CACHE_MULTIPLE, MIN_SETS, MAX_SETS = 4, 2, 64
# A product that only the matrix unit limits, and a copy larger than any cache. float32 is slower, so half the size is
# enough.
MATMUL_SIZES, COPY_BYTES = {"float32": 4096, "float16": 8192, "bfloat16": 8192}, 2**30
# A rested device is fastest in its first rounds. LOAD_ROUNDS of GRAPH_SECONDS are about a second of load, in which its
# clock falls.
REST_SECONDS, LOAD_ROUNDS = 0.5, 500


class Replay(NamedTuple):
    """run() makes these calls. Since a graph only has addresses, the calls are kept to keep their inputs alive."""

    run: Callable[[], None]
    calls: Sequence[Callable]


class Timer(Protocol):
    """The interface of a comparison to a device. Tests implement it with the host's clock."""

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
        """Capture the calls in turns, with so many turns that they take about GRAPH_SECONDS.

        Each call runs once before, so that kernels are compiled and chosen outside the graph. The time of a turn is
        measured by a graph of one turn, since a call from the host may take much longer than its kernels.
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
                # If an output were freed within its turn, the next call would write to its memory, still in the cache.
                outputs = [call() for call in calls]
                del outputs
        return Replay(graph.replay, [*calls] * turns)

    def seconds(self, replays: Sequence[Replay], rounds: int = ROUNDS) -> list[list[float]]:
        """Return for each replay the seconds of one call in each round.

        Every other round reverses the order, so that no replay always follows the same one.
        """
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


# None without a GPU: there results are only checked.
TIMER: Timer | None = GraphTimer() if DEVICE.type == "cuda" else None


def sets_to_rotate(bytes_a_call: float, timer: Timer) -> int:
    """Return how many sets of inputs are several times larger than the cache, so that no call finds its inputs there.

    At most MAX_SETS, since calls on a few hundred kilobytes are bound by their launch anyway.
    """
    return min(max(MIN_SETS, round(CACHE_MULTIPLE * timer.cache_bytes / bytes_a_call)), MAX_SETS)


def float32_precision() -> str:
    """Return how torch multiplies float32 matrices: "ieee", or "tf32" if torch.backends allows it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class MeasuredRoofs(NamedTuple):
    """best: the best round of a rested device, used for `of_roof`. sustained: the median under load."""

    best: Roofs
    sustained: Roofs


@cache
def roofs(timer: Timer) -> MeasuredRoofs:
    """Measure this device's roofs: a large product of random data in each dtype, and a large copy (read plus write).

    The copy is a negating kernel: memcpy, which `copy_` calls, reaches two thirds of an H200's bandwidth
    (NVIDIA/cccl#1672) and less in a graph (pytorch/pytorch#191284). The roof of float32 is the larger of two rates:
    torch's product in `float32_precision`, and a third of TF32's, since three TF32 products have float32's precision.
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
    """Return the fields of a record that follow from its median time.

    The rates are those of the least work. of_roof is the roofline time at this device's best rates over the median.
    """
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
    """Return the operations per second of a square product, best and sustained."""
    size = MATMUL_SIZES[dtype]
    a, b = (torch.randn(size, size, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))
    return _best_and_sustained(2.0 * size**3, lambda: a @ b, timer)


def _best_and_sustained(amount: float, call: Callable, timer: Timer) -> tuple[float, float]:
    """Return amount / seconds of a call, in the best round after a rest and under load."""
    replay = timer.capture([call])
    time.sleep(REST_SECONDS)
    (seconds,) = timer.seconds([replay], LOAD_ROUNDS)
    return amount / min(seconds), amount / statistics.median(seconds[len(seconds) // 2 :])
