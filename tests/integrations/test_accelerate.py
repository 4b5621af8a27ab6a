"""accelerate, torch.compile and data-parallel wrappers, applied before `optimize` and after it."""

import pytest
import torch
import transformers
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from cases import MASKS, inputs_for, pair
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastbert

HEAD = "BertForSequenceClassification"
BLOCKS = ["bert.embeddings", *(f"bert.encoder.layer.{index}" for index in range(3)), "bert.pooler", "classifier"]


def outputs_of(model: nn.Module, mask: str = "right", head: str = HEAD) -> torch.Tensor:
    """Return the logits, or the last hidden state at kept tokens."""
    with torch.no_grad():
        outputs = model(**inputs_for(head, mask))[0]
    return outputs[MASKS[mask].bool()] if outputs.ndim == 3 else outputs


def check_close(outputs: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)


def backends(model: nn.Module) -> dict[str, str]:
    return {row.block: row.backend for row in fastbert.explain(model)}


def gradients_of(model: nn.Module, module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of the parameters of `module` after a forward and backward of `model`."""
    module.zero_grad()
    model(**inputs_for(HEAD, with_labels=True)).loss.backward()
    return {name: x.grad.clone() for name, x in module.named_parameters() if x.grad is not None}


def check_gradients(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
@pytest.mark.parametrize("kind", ["our class", "optimized"])
def test_a_model_that_was_loaded_by_a_device_map(kind, device_map, tmp_path):
    _, theirs = pair(HEAD)
    theirs.save_pretrained(tmp_path)
    package = fastbert if kind == "our class" else transformers
    model = package.BertForSequenceClassification.from_pretrained(tmp_path, device_map=device_map)
    before = outputs_of(model)
    fastbert.optimize(model)
    assert set(backends(model).values()) == {"eager"}
    check_close(outputs_of(model), outputs_of(theirs))
    fastbert.restore(model)
    assert torch.equal(outputs_of(model), before)


def dispatched(model: nn.Module, on_disk: list[str], folder) -> nn.Module:
    """Return the model after accelerate offloaded the weights of some blocks to the disk."""
    device_map = {name: "disk" if name in on_disk else "cpu" for name in [*BLOCKS, "dropout"]}
    dispatch_model(model, device_map, offload_dir=folder)
    assert {name for name in BLOCKS if any(x.is_meta for x in model.get_submodule(name).parameters())} == {*on_disk}
    return model


ON_DISK = [["bert.encoder.layer.1"], ["bert.embeddings"], ["bert.pooler", "classifier"], BLOCKS]


@pytest.mark.parametrize("order", ["optimized, then dispatched", "dispatched, then optimized"])
@pytest.mark.parametrize("on_disk", ON_DISK, ids=lambda names: f"{names[0]} and {len(names) - 1} more")
def test_offloaded_blocks(on_disk, order, tmp_path):
    """accelerate wraps the forward of the modules it offloads, so these blocks run through their modules."""
    expected = {mask: outputs_of(pair(HEAD)[1], mask) for mask in ("right", "full")}
    _, model = pair(HEAD)
    if order == "optimized, then dispatched":
        dispatched(fastbert.optimize(model), on_disk, tmp_path)
    else:
        fastbert.optimize(dispatched(model, on_disk, tmp_path))
    assert type(model) is fastbert.BertForSequenceClassification
    assert set(backends(model).values()) == {"modules"}
    for mask, logits in expected.items():
        check_close(outputs_of(model, mask), logits)
    fastbert.restore(model)
    for mask, logits in expected.items():
        assert torch.equal(outputs_of(model, mask), logits)
    assert not any(type(module).__module__.startswith("fastbert") for module in model.modules())


@pytest.mark.parametrize("when", ["before optimize", "after optimize"])
def test_blocks_are_fused_again_once_accelerates_hooks_are_removed(when, tmp_path):
    """After that each module has its class's own forward as an attribute."""
    expected = outputs_of(pair(HEAD)[1])
    _, model = pair(HEAD)
    changes = [remove_hook_from_submodules, fastbert.optimize]
    dispatched(model, ["bert.encoder.layer.1"], tmp_path)
    for change in changes if when == "before optimize" else changes[::-1]:
        change(model)
    assert "forward" in vars(model.bert.encoder.layer[1])
    assert set(backends(model).values()) == {"eager"}
    check_close(outputs_of(model), expected)
    fastbert.restore(model)
    assert torch.equal(outputs_of(model), expected)


def test_offloaded_weights_are_not_cast(tmp_path):
    _, model = pair(HEAD)
    dispatched(model, ["bert.encoder.layer.1"], tmp_path)
    for obj in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match="offloaded weights cannot be cast: load the model with"):
            fastbert.optimize(obj, torch.bfloat16)
        assert {x.dtype for x in model.parameters()} == {torch.float32}
        assert type(model) is transformers.BertForSequenceClassification


@pytest.fixture
def accelerator():
    """Return a function that makes an Accelerator. Its settings, which are global, are reset before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda mixed_precision: Accelerator(cpu=True, mixed_precision=mixed_precision)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("order", ["prepared, then optimized", "optimized, then prepared"])
@pytest.mark.parametrize(("mixed_precision", "tolerance"), [("no", 1e-5), ("bf16", 0.05)])
def test_prepared_models(mixed_precision, tolerance, order, accelerator):
    accelerator = accelerator(mixed_precision)
    expected = accelerator.prepare(pair(HEAD)[1])
    before, gradients = outputs_of(expected), gradients_of(expected, expected)
    _, model = pair(HEAD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = [lambda x: accelerator.prepare(x, optimizer)[0], fastbert.optimize]
    for step in steps if order == "prepared, then optimized" else steps[::-1]:
        model = step(model)
    assert set(backends(model).values()) == {"eager"}
    assert model(**inputs_for(HEAD)).logits.dtype == torch.float32
    torch.testing.assert_close(outputs_of(model), before, atol=tolerance, rtol=tolerance)
    found = gradients_of(model, model)
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, gradients[name], atol=max(tolerance * scale, 1e-4), rtol=0.05, msg=name)
    weight = model.classifier.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.classifier.weight, weight)


def test_a_bare_encoder_in_accelerates_autocast_is_named(accelerator):
    """The autocast wraps transformers' forward, so fastbert's would never run."""
    model = accelerator("bf16").prepare(pair()[1])
    before = outputs_of(model, head="BertModel")
    with pytest.raises(ValueError, match="BertModel has a patched forward"):
        fastbert.optimize(model)
    assert torch.equal(outputs_of(model, head="BertModel"), before)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("head", ["BertModel", HEAD, "BertForTokenClassification"])
def test_an_optimized_model_compiles_to_one_graph(head):
    _, model = pair(head)
    fastbert.optimize(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mask in ("right", "full"):
        check_close(outputs_of(compiled, mask, head), outputs_of(pair(head)[1], mask, head))
    fastbert.restore(model)
    check_close(outputs_of(compiled, head=head), outputs_of(pair(head)[1], head=head))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("head", "compiled_by"),
    [("BertModel", "function"), (HEAD, "function"), (HEAD, "method"), ("BertForTokenClassification", "method")],
)
def test_a_compiled_model_notices_that_it_was_optimized(head, compiled_by):
    _, model = pair(head)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    if compiled_by == "function":
        compiled = torch.compile(model, backend=count)
    else:
        model.compile(backend=count)
        compiled = model
    expected = outputs_of(pair(head)[1], head=head)
    check_close(outputs_of(compiled, head=head), expected)
    before = len(graphs)
    assert before
    assert fastbert.optimize(compiled) is compiled
    assert type(model) is getattr(fastbert, head)
    check_close(outputs_of(compiled, head=head), expected)
    assert len(graphs) > before
    fastbert.restore(compiled)
    assert type(model) is getattr(transformers, head)
    check_close(outputs_of(compiled, head=head), expected)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_an_optimized_model_compiles_with_its_gradients():
    _, model = pair(HEAD)
    gradients = gradients_of(model, model)
    compiled = torch.compile(fastbert.optimize(model), fullgraph=True, backend="aot_eager")
    check_gradients(gradients_of(compiled, model), gradients)


@pytest.fixture
def _group_of_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {"DistributedDataParallel": DistributedDataParallel, "DataParallel": nn.DataParallel}


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("order", ["wrapped, then optimized", "optimized, then wrapped"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_that_run_a_model_in_parallel(wrapper, order):
    _, model = pair(HEAD)
    expected, gradients = outputs_of(model), gradients_of(model, model)
    steps = [WRAPPERS[wrapper], fastbert.optimize]
    wrapped = model
    for step in steps if order == "wrapped, then optimized" else steps[::-1]:
        wrapped = step(wrapped)
    assert type(wrapped) is WRAPPERS[wrapper]
    assert wrapped.module is model
    assert set(backends(wrapped).values()) == {"eager"}
    check_close(outputs_of(wrapped), expected)
    for _ in range(2):
        check_gradients(gradients_of(wrapped, model), gradients)
    fastbert.restore(wrapped)
    assert type(model) is transformers.BertForSequenceClassification
    assert torch.equal(outputs_of(wrapped), expected)
