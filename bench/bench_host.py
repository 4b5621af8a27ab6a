"""What the host does for a forward pass in the kernels: Python, and Triton up to the driver, whose part is left out.

Kernels are compiled for sm_90 and launched into a function that does nothing, on CPU tensors, so that no GPU is needed.
The baseline launches through Triton's own binding. A forward's time is measured at two depths: their difference is
a layer's. Of a graph's replay everything counts but the copies' and the replay's own time on a device.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import pytest
import records
import torch
import transformers

import fastbert
import fastbert_kernels
from fastbert import graphs, tokens
from fastbert_kernels.ahead_of_time import CHIPS, launching_into
from fastbert_kernels.launch import launching_by

BASELINE, DEPTHS, ROUNDS = "triton's binding", (2, 12), 300
SIZES = {
    "toy": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}


@dataclass(frozen=True)
class HostCase:
    """A forward over a batch [batch, seq_len] with its mask on the device, by launches or by the replay of a graph."""

    path: str
    model: str
    batch: int
    seq_len: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.path}-{self.model}-{self.batch}x{self.seq_len}-{self.dtype}"


LAUNCHES = [
    HostCase("launches", "base", *shape, dtype) for shape in ((1, 16), (32, 128)) for dtype in ("bfloat16", "float32")
]
REPLAYS = [HostCase("replay", "base", 1, 128, "bfloat16")]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """CPU tensors are served by kernels, and their values are not read by the host."""
    if torch.cuda.is_available() or fastbert_kernels.INTERPRETED:
        pytest.skip("the host's work is watched where kernels compile, on CPU tensors: unset TRITON_INTERPRET")
    monkeypatch.setattr(fastbert_kernels, "INTERPRETED", True)
    monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    with fastbert.backend("triton"), torch.inference_mode():
        yield


@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_launches(benchmark, case):
    """Both ways launch the same kernels on the same grids; then forwards of two depths are timed by turns."""
    benchmark.group = str(case)
    launched = []
    with launching_into(CHIPS["sm_90"].target, lambda name, grid, arguments: launched.append((name, grid))):
        forwards = [_forward(case, depth) for depth in DEPTHS]
        for forward in forwards:
            forward()  # plans and compiles
            directly = _made(launched, forward)
            with _through_triton():
                assert _made(launched, forward) == directly
            assert directly
    if not benchmark.enabled:
        benchmark.pedantic(lambda: None)
        return
    with launching_into(CHIPS["sm_90"].target, lambda name, grid, arguments: None):
        seconds, baseline = ([[], []] for _ in range(2))

        def timed():
            for depth, forward in enumerate(forwards):
                seconds[depth].append(_seconds(forward))
                with _through_triton():
                    baseline[depth].append(_seconds(forward))

        benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=3)
    records.write(
        _record(case, BASELINE, seconds[-1][3:], baseline[-1][3:])
        | {"layer_s": _a_layer(seconds), "baseline_layer_s": _a_layer(baseline), "launches": len(directly)}
    )


@pytest.mark.parametrize("case", REPLAYS, ids=str)
def test_replay(benchmark, case, monkeypatch):
    """A replayed call is timed beside one that launches; what it returns has the model's shapes."""
    benchmark.group = str(case)

    class Recorded(graphs.CudaGraphs):
        def __init__(self, device):
            self.device = device

        def capture(self, run):
            return (lambda: None), run()

        def in_order(self):
            pass

        def wait(self):
            pass

    monkeypatch.setattr(graphs, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(graphs, "CudaGraphs", Recorded)
    with launching_into(CHIPS["sm_90"].target, lambda name, grid, arguments: None):
        plain, replayed = _forward(case, DEPTHS[-1]), _forward(case, DEPTHS[-1], graphed=True)
        shapes = [{name: x.shape for name, x in forward().items()} for forward in (plain, replayed)]
        assert shapes[0] == shapes[1]
        seconds, baseline = [], []

        def timed():
            seconds.append(_seconds(replayed))
            baseline.append(_seconds(plain))

        benchmark.pedantic(timed, rounds=ROUNDS if benchmark.enabled else 1, warmup_rounds=3)
    if benchmark.enabled:
        records.write(_record(case, "launches", seconds[3:], baseline[3:]))


def _forward(case: HostCase, depth: int, graphed: bool = False) -> Callable:
    config = transformers.BertConfig(vocab_size=1000, num_hidden_layers=depth, **SIZES[case.model])
    with torch.inference_mode(False):
        model = fastbert.BertModel(config).eval().to(getattr(torch, case.dtype))
    model = fastbert.graphed(model) if graphed else model
    ids = torch.zeros(case.batch, case.seq_len, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids}
    return lambda: model(**batch)


@contextmanager
def _through_triton():
    with launching_by(lambda kernel, grid, arguments: kernel[grid](**arguments)):
        yield


def _made(launched: list, forward: Callable) -> list:
    """The launches of a forward."""
    launched.clear()
    forward()
    return list(launched)


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _a_layer(seconds: list[list[float]]) -> float:
    """What a layer adds, from the medians at the two depths."""
    shallow, deep = map(statistics.median, seconds)
    return (deep - shallow) / (DEPTHS[1] - DEPTHS[0])


def _record(case: HostCase, baseline_name: str, seconds: list[float], baseline: list[float]) -> dict:
    median_s, baseline_median_s = statistics.median(seconds), statistics.median(baseline)
    q20_s, *_, q80_s = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "suite": "host", "kind": "host", "case": asdict(case), "provider": "fastbert", "baseline": baseline_name,
        "median_s": median_s, "q20_s": q20_s, "q80_s": q80_s, "rounds": len(seconds),
        "baseline_median_s": baseline_median_s, "ratio": baseline_median_s / median_s,
    }  # fmt: skip
