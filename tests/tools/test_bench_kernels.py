"""The benches of kernels and attention, with the host's clock or a fake device instead of a GPU."""

import gc
import time
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import bench_attention
import bench_kernels
import comparison
import device_timing
import pytest
import records
import torch
from bench_kernels import KernelCase
from comparison import Comparison
from device_timing import GraphTimer, Replay
from workloads import lengths_of

from fastbert.ops import eager
from fastbert_kernels.tuning import roofline

TIMES = {"median_s", "q20_s", "q80_s", "rounds", "baseline_median_s", "ratio", "flops_per_s", "bytes_per_s"}
TIMES |= {"of_roof", "roofs"}


class HostTimer:
    """A timer with the host's clock and two rounds of one turn."""

    cache_bytes = 2**12

    def __init__(self):
        self.captured = []

    def capture(self, calls):
        self.captured.append(calls)
        return Replay(lambda: [call() for call in calls], calls)

    def seconds(self, replays, rounds=2):
        measured = [[] for _ in replays]
        for _ in range(rounds):
            for replay, seconds in zip(replays, measured, strict=True):
                start = time.perf_counter()
                replay.run()
                seconds.append((time.perf_counter() - start) / len(replay.calls))
        return measured


@pytest.fixture
def timer(monkeypatch, tmp_path):
    """Make the benches time as on a GPU, with the host's clock, small sizes for the roofs and a temporary folder."""
    timer = HostTimer()
    monkeypatch.setattr(device_timing, "TIMER", timer)
    monkeypatch.setattr(device_timing, "MATMUL_SIZES", dict.fromkeys(device_timing.MATMUL_SIZES, 32))
    monkeypatch.setattr(device_timing, "COPY_BYTES", 2**12)
    monkeypatch.setattr(device_timing, "REST_SECONDS", 0)
    monkeypatch.setattr(device_timing, "LOAD_ROUNDS", 4)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    yield timer
    bench_kernels.comparison.cache_clear()
    bench_attention.comparison.cache_clear()


@torch.no_grad()
def outcome_of(compare, case, provider) -> tuple[str, str]:
    """Return how a test of the benches ends, and its message."""
    benchmark = SimpleNamespace(pedantic=lambda target, rounds: [target() for _ in range(rounds)])
    request = SimpleNamespace(
        config=SimpleNamespace(getoption=lambda name: False), getfixturevalue=lambda name: benchmark
    )
    try:
        comparison.run(request, compare, case, provider)
    except (pytest.skip.Exception, pytest.fail.Exception, pytest.xfail.Exception) as ended:
        return type(ended).__name__, str(ended)
    return "Passed", ""


def written() -> list[dict]:
    return [line for path in records.RESULTS.rglob("*.jsonl") for line in records.read(path)]


def toy(provide) -> Comparison:
    """Return a case whose truth is 1, 2, 3."""
    truth = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return Comparison(
        suite="kernels",
        kind="kernel",
        case={"op": "toy", "dtype": "float32"},
        baseline="torch",
        inputs=(truth.float(), "an argument"),
        provide=provide,
        error=lambda output: (output.double() - truth).abs().max().item(),
        largest=3.0,
        work=roofline.Work(6.0, 2.0**10),
    )


def identity(name, given):
    return lambda: given[0]


def test_every_provider_of_attention_has_a_record(timer):
    case = bench_attention.TOY_CASES[1]
    providers = [name for of, name in bench_attention.TOY if of == case]
    outcomes = {name: outcome_of(bench_attention.comparison, case, name) for name in providers}
    lines = {line["provider"]: line for line in written()}
    assert list(lines) == providers
    absent = {"sdpa-efficient", "sdpa-cudnn", "varlen_attn"}  # not available on a CPU
    assert {name: how for name, (how, _) in outcomes.items()} == {
        name: "Skipped" if name in absent else "Passed" for name in providers
    }
    lengths = lengths_of(case).double()
    operations = 4 * lengths.square().sum().item() * 3 * 16
    for name, line in lines.items():
        assert (line["suite"], line["kind"], line["baseline"]) == ("attention", "attention", "sdpa")
        assert line["case"]["tokens"] == lengths.sum()
        if name in absent:
            assert line["absent"] in outcomes[name][1]
            assert ("_flash_attention_forward" if name == "varlen_attn" else "No viable backend") in line["absent"]
            assert not TIMES & line.keys()
            continue
        assert line.keys() >= TIMES
        assert line["ratio"] == line["baseline_median_s"] / line["median_s"]
        assert line["error_ratio"] == pytest.approx(line["error"] / lines["sdpa"]["error"])
        assert line["flops_per_s"] == pytest.approx(operations / line["median_s"])
        roofs = roofline.Roofs(line["roofs"]["flops_per_s"], line["roofs"]["bytes_per_s"])
        work = roofline.Work(operations, line["bytes_per_s"] * line["median_s"])
        assert line["of_roof"] == pytest.approx(work.seconds("float32", roofs) / line["median_s"])
        assert line["roofs"]["float32_precision"] == "ieee"
        assert line["roofs"]["sustained"].keys() == {"flops_per_s", "bytes_per_s"}


def test_inputs_rotate_through_memory_larger_than_the_cache(timer):
    case = toy(identity)
    for provider in ("torch", "fastbert"):
        case.record(provider, timer)
    ours = timer.captured[-1]
    assert len(timer.captured[0]) == len(ours) == 16  # of 2^10 bytes, beside a cache of 2^12
    del case, timer.captured[:]
    gc.collect()
    sets = [call() for call in ours]
    assert len({x.data_ptr() for x in sets}) == 16
    assert all(torch.equal(x, sets[0]) for x in sets)


def test_the_baseline_is_captured_once_and_timed_beside_every_provider(timer, monkeypatch):
    replays, seconds, case = [], timer.seconds, toy(identity)
    monkeypatch.setattr(timer, "seconds", lambda given, *rounds: replays.append(given) or seconds(given, *rounds))
    for provider in ("torch", "fastbert", "peer"):
        case.record(provider, timer)
    (itself, ours, peer) = (given for given in replays if len(given) == 2)
    assert itself[0] is itself[1] is ours[0] is peer[0]
    assert len({id(each[1].calls) for each in (itself, ours, peer)}) == 3


def test_batches_of_an_op_have_records_of_their_own(timer):
    pairs = [(batch, provider) for batch in (1, 2) for provider in ("torch", "fastbert")]
    for batch, provider in pairs:
        case = KernelCase("pool", "toy", batch, 16, "float32")
        assert outcome_of(bench_kernels.comparison, case, provider) == ("Passed", "")
    assert [(line["case"]["batch"], line["provider"]) for line in written()] == pairs


def failing(problem):
    """Return providers of which one raises."""

    def provide(name, given):
        def call():
            if name == problem:
                raise RuntimeError(f"{name} cannot\n  run")
            return given[0]

        return call

    return provide


@pytest.mark.parametrize("problem", ["fastbert", "torch", "peer"])
def test_a_failing_peer_is_absent_and_ours_or_the_baseline_fail(timer, problem):
    provider = "peer" if problem == "torch" else problem
    ended = nullcontext() if problem == "peer" else pytest.raises(RuntimeError, match=f"{problem} cannot")
    with ended:
        outcome = outcome_of(lambda _: toy(failing(problem)), "toy", provider)
        assert outcome == ("Skipped", "toy peer is absent: RuntimeError: peer cannot run")
    # Our failure is recorded, and replaces the record of an earlier run.
    assert [line["absent"] for line in written()] == [f"RuntimeError: {problem} cannot run"] * (problem != "torch")
    assert not any(TIMES & line.keys() for line in written())


# The baseline's error is 1e-3.
@pytest.mark.parametrize(
    ("provider", "error", "how"),
    [
        ("fastbert", 1.99e-3, "Passed"),
        ("fastbert", 2.1e-3, "Failed"),
        ("fastbert", float("nan"), "Failed"),
        ("peer", 2.1e-3, "XFailed"),
    ],
)
def test_a_wrong_result_is_not_timed(timer, provider, error, how):
    def provide(name, given):
        return lambda: given[0] + (error if name == provider else 1e-3)

    ended, said = outcome_of(lambda _: toy(provide), "toy", provider)
    assert ended == how
    (line,) = written()
    if how != "Passed":
        assert "errs by" in line["wrong"]
        assert line["wrong"] in said
        assert not TIMES & line.keys()


class Device:
    """A fake GPU on which captured calls take a fixed time, and calls from the host take a second."""

    def __init__(self, monkeypatch, seconds_a_call):
        self.now, self.made, self.replayed = 0.0, [], []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = device.now

            def elapsed_time(self, end):
                return 1e3 * (end.time - self.time)

        class Graph:
            def replay(self):
                device.replayed.append(self.calls)
                device.now += seconds_a_call * len(self.calls)

        @contextmanager
        def graph(graph, stream):
            now, before = device.now, len(device.made)
            yield
            device.now, graph.calls = now, device.made[before:]

        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": nullcontext,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, name):
        def made():
            self.now += 1
            self.made.append(name)

        return made


@pytest.mark.parametrize(("seconds", "calls"), [(1e-4, 20), (1e-2, 2)])
def test_a_graph_holds_as_many_turns_as_fill_two_milliseconds(monkeypatch, seconds, calls):
    device = Device(monkeypatch, seconds)
    replay = GraphTimer().capture([device.call("a"), device.call("b")])
    assert len(replay.calls) == calls
    replay.run()
    assert device.replayed[-1] == ["a", "b"] * (calls // 2)
    # The calls before the first graph, and in it.
    assert device.made[:4] == ["a", "b"] * 2


def test_outputs_are_kept_for_a_turn(monkeypatch):
    """No call reuses the memory of another output of its turn. The next turn may reuse it."""
    device = Device(monkeypatch, 1e-4)
    alive, held = weakref.WeakSet(), []

    class Output:
        pass

    def call():
        device.call("")()
        held.append(len(alive))
        output = Output()
        alive.add(output)
        return output

    calls = len(GraphTimer().capture([call] * 4).calls)
    assert calls > 4
    assert held[-calls:] == [0, 1, 2, 3] * (calls // 4)
    assert not alive


class Tiring(HostTimer):
    """A device that takes 3 s for its first round, 1 s for the second and 2 s under load, less for TF32 products."""

    def __init__(self, speed):
        super().__init__()
        self.speed = speed

    def capture(self, calls):
        return Replay(device_timing.float32_precision, calls)

    def seconds(self, replays, rounds=2):
        speeds = [self.speed if replay.run() == "tf32" else 1 for replay in replays]
        return [[seconds / speed for seconds in (3.0, 1.0, *[2.0] * (rounds - 2))] for speed in speeds]


@pytest.mark.parametrize(("speed", "thirds"), [(6, 6), (2, 3)])
def test_the_roofs_are_best_and_sustained_rates(timer, monkeypatch, speed, thirds):
    """The roof of float32 is the rate of its product or a third of TF32's, whichever is larger."""
    rests, before = [], torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(device_timing.time, "sleep", rests.append)
    found = device_timing.roofs(Tiring(speed))
    for roofs, seconds in ((found.best, 1.0), (found.sustained, 2.0)):
        # Bytes read and bytes written.
        assert roofs.bytes_per_s == 2 * device_timing.COPY_BYTES / seconds
        rates = dict.fromkeys(device_timing.MATMUL_SIZES, 2 * 32**3 / seconds)
        assert roofs.flops_per_s == pytest.approx(rates | {"float32": rates["float32"] * thirds / 3})
    assert len(rests) == 5
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_replays_take_turns(monkeypatch):
    device, timer = Device(monkeypatch, 1e-3), GraphTimer()
    replays = [timer.capture([device.call(name)] * count) for name, count in (("a", 2), ("b", 4))]
    del device.replayed[:]
    measured = timer.seconds(replays, 3)
    assert "".join(calls[0] for calls in device.replayed) == "abbaabbaab"
    assert measured == [pytest.approx([1e-3] * 3)] * 2  # per call, without the warm-up rounds


def test_a_plan_with_a_wrong_place_is_wrong():
    name, (mask,) = bench_kernels.call_of(KernelCase("packing_plan", "toy", 4, 16, "float32"))
    indices, bounds = plan = getattr(eager, name)(mask)
    kept = int(bounds[-1])
    assert 4 < kept < mask.numel() - 1
    # The order of dropped places does not matter.
    for right in (plan, (torch.cat((indices[:kept], indices[kept:].flip(0))), bounds)):
        assert bench_kernels.error_of(right, plan) == 0
    for wrong in ((indices.roll(1), bounds), (indices, bounds + 1)):
        assert bench_kernels.error_of(wrong, plan) == 1
