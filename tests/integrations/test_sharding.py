"""A training step with FSDP or FSDP2 over two processes equals the step of one process."""

import functools
import sys
from copy import deepcopy

import pytest
import torch
from cases import inputs_for, pair
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.bert import modeling_bert as hf
from two_processes import one_of_two, run_twice

import fastbert

HEAD = "BertForSequenceClassification"
WRAPPERS = ("FSDP", "FSDP with its own parameters", "FSDP2", "FSDP2 of our class")


def model_of(wrapper: str) -> nn.Module:
    ours, theirs = pair(HEAD)
    return {"transformers": theirs, "FSDP2 of our class": ours}.get(wrapper) or fastbert.optimize(deepcopy(theirs))


def sharded(wrapper: str) -> nn.Module:
    """Return a sharded model, in which each BertLayer, found by transformers' class, is a unit."""
    model = model_of(wrapper)
    if wrapper.startswith("FSDP2"):
        for module in model.modules():
            if isinstance(module, hf.BertLayer):
                fully_shard(module)
        return fully_shard(model)
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={hf.BertLayer})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=not wrapper.endswith("its own parameters"),
        device_id=torch.device("cpu"),
    )  # fmt: skip


def step(model: nn.Module, rows: slice) -> torch.Tensor:
    """Do one step of SGD on rows of the batch and return the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = {name: x[rows] for name, x in inputs_for(HEAD, with_labels=True).items()}
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            names = {name.replace("_fsdp_wrapped_module.", ""): x for name, x in model.named_parameters()}
            return {name: x.detach().clone() for name, x in names.items()}
    return {name: x.full_tensor().detach() for name, x in model.named_parameters()}


def run(rank: int, folder: str) -> None:
    with one_of_two(rank, folder):
        for wrapper in WRAPPERS:
            model = sharded(wrapper)
            units = sum(isinstance(x, FullyShardedDataParallel) for x in model.modules()) or sum(
                hasattr(x, "unshard") for x in model.modules()
            )
            loss = step(model, slice(2 * rank, 2 * rank + 2))
            weights = whole_weights(model)
            with torch.no_grad():
                logits = model(**inputs_for(HEAD)).logits
            if rank == 0:
                found = {"units": units, "loss": loss, "weights": weights, "logits": logits}
                torch.save(found, f"{folder}/{wrapper}.pt")
        model = model_of("transformers")
        fully_shard(model.bert.encoder.layer[0])
        with pytest.raises(ValueError, match=r"layer\.0 is a .*FSDPBertLayer"):
            fastbert.optimize(model)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the first process saved for each wrapper."""
    folder = tmp_path_factory.mktemp("sharded")
    run_twice(__file__, folder)
    return {wrapper: torch.load(folder / f"{wrapper}.pt") for wrapper in WRAPPERS}


@pytest.mark.xdist_group("two-sharded-processes")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_step_is_that_of_one_process(found, wrapper):
    expected = model_of("transformers")
    step(expected, slice(None))
    weights = dict(expected.named_parameters())
    outcome = found[wrapper]
    assert outcome["units"] == 3 + 1
    assert outcome["weights"].keys() <= weights.keys()
    assert len(outcome["weights"]) >= 4
    for name, weight in outcome["weights"].items():
        torch.testing.assert_close(weight, weights[name].detach(), atol=1e-5, rtol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(outcome["logits"], expected(**inputs_for(HEAD)).logits, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
