"""What calls take on a GPU without what the host takes to launch them, and the rates that the GPU reaches at most.

Calls are captured into CUDA graphs; the graphs' replays take turns and are timed by events. Nothing waits between the
replays of one measurement, so that the host stays ahead and no gap before a launch is timed.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
from workloads import DEVICE

from fastbert_kernels.roofline import Roofs

ROUNDS, WARMUP_ROUNDS, GRAPH_SECONDS = 30, 2, 2e-3
CACHE_MULTIPLE, FEWEST_SETS, MOST_SETS = 4, 2, 64
# A product large enough for the matrix unit to be the only limit, and a copy that no cache holds. float32 runs at a
# fraction of the rate: half the size is enough.
MATMUL_SIZES, COPY_BYTES = {"float32": 4096, "float16": 8192, "bfloat16": 8192}, 2**30


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
        turn = self._graph(calls, stream)
        turns = round(GRAPH_SECONDS / (statistics.median(self.seconds([turn], 3)[0]) * len(calls)))
        return self._graph([*calls] * turns, stream) if turns > 1 else turn

    def _graph(self, calls: Sequence[Callable], stream: torch.cuda.Stream) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        return Replay(graph.replay, calls)

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


@cache
def roofs(timer: Timer) -> Roofs:
    """This device's, measured: by dtype a large product of random data (of float32 in `float32_precision`), and a large
    copy, bytes read and written."""
    flops_per_s = {}
    for name, size in MATMUL_SIZES.items():
        a, b = (torch.randn(size, size, device=DEVICE, dtype=getattr(torch, name)) for _ in range(2))
        flops_per_s[name] = 2.0 * size**3 / _median_seconds(lambda a=a, b=b: a @ b, timer)
    source = torch.empty(COPY_BYTES, device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Roofs(flops_per_s, 2.0 * COPY_BYTES / _median_seconds(lambda: target.copy_(source), timer))


def _median_seconds(call: Callable, timer: Timer) -> float:
    return statistics.median(timer.seconds([timer.capture([call])])[0])
