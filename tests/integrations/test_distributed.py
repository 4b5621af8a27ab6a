"""Training in the kernels with DistributedDataParallel over two processes equals training in one process."""

import sys
from collections import Counter
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from cases import batch, labels, pair
from launch_names import launch_names
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import one_of_two, run_twice

import fastbert
from fastbert.testing import check_close

pytestmark = [
    pytest.mark.xdist_group("two-processes-in-kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU: kernels run in the interpreter"),
]

HEAD, NUM_LAYERS, STEPS = "BertForSequenceClassification", 2, 3
# The settings of DistributedDataParallel, and the number of batches of which a step adds up the gradients.
WAYS: dict[str, tuple[dict[str, bool], int]] = {
    "plain": ({"find_unused_parameters": False}, 1),
    "accumulated": ({"find_unused_parameters": False}, 2),
    "static graph": ({"static_graph": True}, 1),
}
DROPOUTS = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
# Which seeds the two processes set before they train with dropout.
SEEDS = {"one seed": (0, 0), "two seeds": (0, 1)}


class Run(NamedTuple):
    weights: dict[str, Tensor]
    losses: list[float]
    kernels: Counter[str]


def models(**settings) -> tuple[nn.Module, nn.Module]:
    """Return our model and transformers' in training mode, with the same weights."""
    ours, theirs = pair(HEAD, num_hidden_layers=NUM_LAYERS, **settings)
    return ours.train(), theirs.train()


def batch_of(step: int) -> dict[str, Tensor]:
    """Return eight rows of different lengths. Each process takes every other row, so their numbers of tokens differ."""
    halves = [batch("right", seed) | labels(HEAD, seed) for seed in (2 * step, 2 * step + 1)]
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def train(model: nn.Module, rows: slice = slice(None), num_batches: int = 1) -> Run:
    """Train for some steps on some rows of each batch. Every step adds up the gradients of num_batches parts."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    with launch_names() as names, fastbert.backend("triton"):
        for step in range(STEPS):
            optimizer.zero_grad()
            inputs = {name: x[rows].chunk(num_batches) for name, x in batch_of(step).items()}
            for part in range(num_batches):
                with nullcontext() if part == num_batches - 1 else model.no_sync():
                    loss = model(**{name: parts[part] for name, parts in inputs.items()}).loss / num_batches
                    loss.backward()
                losses.append(loss.item())
            optimizer.step()
    weights = {name.removeprefix("module."): x.detach() for name, x in model.named_parameters()}
    return Run(weights, losses, Counter(names))


def run(rank: int, folder: str) -> None:
    from quick_interpreter import quicken

    quicken()
    with one_of_two(rank, folder):
        for way, (settings, num_batches) in WAYS.items():
            model = DistributedDataParallel(models()[0], **settings)
            torch.save(train(model, slice(rank, None, 2), num_batches)._asdict(), f"{folder}/{way} {rank}.pt")
        for name, seeds in SEEDS.items():
            ours, _ = models(**DROPOUTS)
            ours.bert.embeddings.dropout.p = ours.dropout.p = 0.0  # these are PyTorch's, not in kernels
            model = DistributedDataParallel(ours)
            torch.manual_seed(seeds[rank])
            # The same rows in both processes.
            torch.save(train(model, slice(2))._asdict(), f"{folder}/{name} {rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[Run]]:
    """What each of the two processes ended with."""
    folder = tmp_path_factory.mktemp("distributed")
    run_twice(__file__, folder)
    names = (*WAYS, *SEEDS)
    return {name: [Run(**torch.load(folder / f"{name} {rank}.pt")) for rank in (0, 1)] for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    """One process that trains on whole batches: our model, transformers', and transformers' in float64."""
    ours, theirs = models()
    return {"ours": train(ours), "theirs": train(theirs), "truth": train(models()[1].double())}


def check_kernels(found: Run, num_batches: int = 1) -> None:
    """Every layer of every forward and backward ran in kernels."""
    times = STEPS * num_batches * NUM_LAYERS
    kernels = "_attention_fwd_kernel", "_residual_layer_norm_kernel", "_attention_bwd_dkv_kernel"
    assert [found.kernels[name] for name in kernels] == [times, 2 * times, times]


def check_equal(runs: list[Run]) -> None:
    """Both processes ended with the same weights."""
    for name, weight in runs[0].weights.items():
        assert torch.equal(weight, runs[1].weights[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(found, alone, way):
    check_equal(found[way])
    start = dict(models()[1].named_parameters())
    _, num_batches = WAYS[way]
    for each, times in ((found[way][0], num_batches), (found[way][1], num_batches), (alone["ours"], 1)):
        check_kernels(each, times)
        assert each.weights.keys() == start.keys()
        for name, weight in each.weights.items():
            check_close(name, weight, alone["theirs"].weights[name], alone["truth"].weights[name])
            # The gradient of a key's bias is zero but for rounding.
            assert name.endswith("key.bias") or (weight - start[name]).abs().max() > 1e-4, f"{name} was not trained"


def test_processes_with_different_seeds_drop_different_elements(found):
    """And their weights stay equal."""
    same, different = (found[name] for name in SEEDS)
    assert same[0].losses == same[1].losses
    assert all(a != b for a, b in zip(different[0].losses, different[1].losses, strict=True))
    for runs in (same, different):
        check_equal(runs)
        check_kernels(runs[0])


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
