"""CUDA graphs for tests: real ones on a GPU, on a CPU a stand-in that, like a graph, only knows addresses."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import VOCAB
from torch import nn

from fastbert import graphs, tokens

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LAYERS = {"num_hidden_layers": 1, "max_position_embeddings": 40}


class Recordings(graphs.CudaGraphs):
    """A stand-in for CUDA graphs. A replay runs the captured Python again, with the parameters' memory at the capture.

    Results are written to the outputs of the capture.
    """

    model: nn.Module

    def __init__(self, device):
        self.device = device

    def capture(self, run: Callable):
        run()
        outputs = run()
        captured = [(parameter, parameter.data) for parameter in self.model.parameters()]

        def replay():
            present = [parameter.data for parameter, _ in captured]
            for parameter, data in captured:
                parameter.data = data
            hooks = [(module._forward_hooks, dict(module._forward_hooks)) for module in self.model.modules()]
            for registered, _ in hooks:
                registered.clear()  # a graph runs no Python
            with torch.random.fork_rng():  # a graph does not use torch's CPU generator
                results = run()
            for name, output in outputs.items():
                output.copy_(results[name])
            for (parameter, _), data in zip(captured, present, strict=True):
                parameter.data = data
            for registered, functions in hooks:
                registered.update(functions)

        return replay, outputs

    def order_after_last_replay(self):
        pass

    def record_replay(self):
        pass

    def synchronize(self):
        pass


def recorded(monkeypatch) -> list[tuple[int, ...]]:
    """Return a list to which every capture from now on adds its bucket. On a CPU `Recordings` replace graphs."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "DEVICE_TYPE", "cpu")
        monkeypatch.setattr(graphs, "CudaGraphs", Recordings)
        monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    buckets, capture = [], graphs.CudaGraphs.capture

    def counted(self, run):
        (given,) = (cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, dict))
        size = tuple(given["input_ids"].shape)
        if "cu_seq_lens_q" in given:
            size = size[1], len(given["cu_seq_lens_q"]) - 1, given["max_length_q"]
        buckets.append(size)
        return capture(self, run)

    monkeypatch.setattr(graphs.CudaGraphs, "capture", counted)
    return buckets


def record_outputs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make replays on a CPU return the first outputs. Unlike a graph, `Recordings` would keep the model alive."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs.CudaGraphs, "capture", lambda self, run: (lambda: None, run()))


def assert_freed_at_once(owned: list[nn.Module]) -> None:
    """Check that the only model in the list, which has no other reference, is freed without the garbage collector."""
    weight = weakref.ref(owned[0].pooler.dense.weight)
    Recordings.model = None
    gc.collect()
    gc.disable()
    try:
        owned.clear()
        assert weight() is None
    finally:
        gc.enable()


def texts(batch_size: int, seq_len: int, *, seed: int = 0, on: torch.device = DEVICE) -> dict[str, torch.Tensor]:
    """Return a random batch with holes and padding and at least one token."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch_size, seq_len
    mask = torch.randint(0, 2, shape, generator=generator)
    mask[-1, -1] = 1
    given = {
        "input_ids": torch.randint(0, VOCAB, shape, generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
    }
    return {name: x.to(on) for name, x in given.items()}


def assert_same(outputs, expected) -> None:
    assert type(outputs) is type(expected)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(outputs[name], value), name
