"""The kernels as `torch.library` ops: their contracts, and the model in traced graphs, in the kernels."""

import pytest
import torch
from cases import MASKS, batch, inputs_for, pair
from torch.library import opcheck

import fastbert
from fastbert import library, ops, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
E, F = 16, 20


def parameter(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def integers(values):
    return torch.tensor(values, device=DEVICE)


def examples():
    """Arguments of each op, in the order of its schema; num_tokens counts every row: no row is unspecified."""
    count = integers([9]).int()
    bounds = integers([0, 3, 3, 9]).int()
    places = integers([8, 0, 2, 5, 1, 3, 4, 7, 6])
    norm = parameter(E), parameter(E), 1e-12
    ids = torch.randint(0, 11, (3, 3), device=DEVICE)
    tables = parameter(11, E), parameter(8, E), parameter(2, E)
    embeds = parameter(3, 3, E)
    attended = parameter(9, F), parameter(E, F), parameter(E), parameter(9, E), *norm
    return {
        "packing_plan": [(integers([[1, 0, 1], [0, 0, 1]]),)],
        "embed_layer_norm": [
            (ids, ids % 2, None, None, places, *tables, *norm, 0, count),
            (None, None, ids % 8, embeds, None, *tables, *norm, None, None),
        ],
        "qkv_projection": [
            (parameter(9, E), *(parameter(*shape) for shape in ((E, E), (E,)) * 3), 2, given) for given in (None, count)
        ],
        "attention": [(parameter(9, 3, 2, 8), bounds, 6, 0.3)],
        "linear_activation": [
            (parameter(9, E), parameter(F, E), parameter(F), activation, given)
            for activation, given in (("gelu", None), ("tanh", count))
        ],
        "linear_residual_layer_norm": [(*attended, None), (*attended, count)],
        "unpack": [(parameter(9, E), places, 3, 3, count), (parameter(2, E), places[1:3], 3, 3, None)],
        "pool": [(parameter(9, E), bounds, "mean", True, places), (parameter(9, E), bounds, "first", False, None)],
    }  # fmt: skip


@pytest.mark.parametrize("op", library.SCHEMAS)
def test_opcheck(op):
    for arguments in examples()[op]:
        opcheck(getattr(torch.ops.fastbert, op).default, arguments)


def test_every_op_of_the_seam_has_one():
    assert set(library.SCHEMAS) == set(library.FAKES) == set(ops.OPS)


@pytest.mark.parametrize("op", [op for op in ops.OPS if op != "packing_plan"])
def test_gradients_of_an_op_are_its_twins(op):
    for arguments in examples()[op]:
        inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        found = []
        for name in ("triton", "eager"):
            with fastbert.backend(name):
                output = getattr(ops, op)(*arguments)
                found.append(torch.autograd.grad(output.square().sum(), inputs, allow_unused=True))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_gradients_stop_at_the_token_count():
    """Rows past the count are garbage, in and out: no weight may learn from them."""
    count = integers([5]).int()
    weight, bias = parameter(F, E), parameter(F)
    x = torch.randn(9, E, device=DEVICE)
    expected = torch.autograd.grad(ops.linear_activation(x[:5], weight, bias, "gelu").sum(), (weight, bias))
    x[5:] = torch.nan
    with fastbert.backend("triton"):
        output = ops.linear_activation(x, weight, bias, "gelu", count)
        grad = torch.ones_like(output)
        grad[5:] = torch.nan
        found = torch.autograd.grad(output, (weight, bias), grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head", ["BertModel", "BertForSequenceClassification", "BertForMaskedLM"])
def test_compiled_without_a_graph_break(head, launches):
    """A mask packs in a traced graph too: its capacity keeps shapes static."""
    ours = pair(head)[0].to(DEVICE)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), fastbert.backend("triton"):
        for mask in (None, *MASKS):
            inputs = {name: x.to(DEVICE) for name, x in inputs_for(head, mask).items()}
            expected = ours(**inputs).to_tuple()
            launches.clear()
            outputs = compiled(**inputs).to_tuple()
            assert launches.count("_qkv_projection_kernel") == 3
            assert launches.count("_packing_plan_kernel") == (mask is not None)
            for a, b in zip(outputs, expected, strict=True):
                assert torch.equal(a, b)


def test_compiled_training():
    ours = pair("BertForSequenceClassification")[0].to(DEVICE)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = inputs_for("BertForSequenceClassification", "right", with_labels=True)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    found = []
    with fastbert.backend("triton"):
        for model in (ours, compiled):
            ours.zero_grad()
            model(**inputs).loss.backward()
            found.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_exported(monkeypatch):
    monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    ours = pair()[0].to(DEVICE)
    inputs = {name: batch("right")[name].to(DEVICE) for name in ("input_ids", "attention_mask")}
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=24)}
    with torch.no_grad(), fastbert.backend("triton"):
        program = torch.export.export(ours, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims), strict=True)
        ops_used = {str(node.target) for node in program.graph.nodes if "fastbert" in str(node.target)}
        assert "fastbert.attention.default" in ops_used
        for batch_size, seq_len in ((4, 12), (3, 9)):
            shorter = {name: x[:batch_size, :seq_len] for name, x in inputs.items()}
            assert torch.equal(program.module()(**shorter).last_hidden_state, ours(**shorter).last_hidden_state)


def test_function_transforms_run_in_eager():
    ours = pair()[0].to(DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in batch(None).items()}

    def summed(embeds):
        return ours(inputs_embeds=embeds).last_hidden_state.sum()

    embeds = ours.embeddings.word_embeddings(inputs["input_ids"]).detach()
    with fastbert.backend("triton"), pytest.raises(RuntimeError, match="a function transform or a forward-mode deriv"):
        torch.func.grad(summed)(embeds)
    assert torch.func.grad(summed)(embeds).isfinite().all()
