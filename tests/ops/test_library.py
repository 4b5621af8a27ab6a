"""The kernels as `torch.library` ops: their contracts, and traced graphs of the model that run in the kernels."""

from collections import Counter

import pytest
import torch
from cases import MASKS, batch, inputs_for, pair
from recorded_graphs import recorded_graphs
from torch.library import opcheck

import fastbert
from fastbert import ops, tokens
from fastbert.ops import backend, torch_library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
E, F = 16, 20


def parameter(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def integers(values):
    return torch.tensor(values, device=DEVICE)


def examples():
    """Arguments of each op in the order of its schema. num_tokens includes every row, so that no row is unspecified."""
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


@pytest.mark.parametrize("op", torch_library.SCHEMAS)
def test_opcheck(op):
    for arguments in examples()[op]:
        opcheck(getattr(torch.ops.fastbert, op).default, arguments)


@pytest.mark.parametrize("op", [op for op in torch_library.SCHEMAS if op != "packing_plan"])
def test_opcheck_of_the_backward(op):
    for arguments in examples()[op]:
        grad = torch.randn_like(getattr(torch.ops.fastbert, op)(*arguments)).detach()
        learning = [isinstance(x, torch.Tensor) and x.requires_grad for x in arguments]
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        for wanted in (learning, [want and not any(learning[:i]) for i, want in enumerate(learning)]):
            opcheck(getattr(torch.ops.fastbert, f"{op}_backward").default, (grad, *arguments, wanted))


def test_a_backward_op_ignores_autocast():
    inputs = parameter(9, E), parameter(F, E), parameter(F)
    found = []
    for enabled in (False, True):
        output = torch.ops.fastbert.linear_activation(*inputs, "gelu", None)
        with torch.autocast(DEVICE, torch.bfloat16, enabled):
            found.append(torch.autograd.grad(output.sum(), inputs))
    assert all(torch.equal(*gradients) for gradients in zip(*found, strict=True))


def test_every_op_has_a_fake():
    assert set(torch_library.SCHEMAS) == set(torch_library.FAKES) == set(ops.OPS)


@pytest.mark.parametrize("op", [op for op in ops.OPS if op != "packing_plan"])
def test_gradients_of_an_op_are_its_references(op):
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
    """Rows past num_tokens are arbitrary in inputs and outputs: they must not contribute to gradients of weights."""
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


@pytest.mark.parametrize(
    ("head", "num_layers"), [("BertModel", 3), ("BertForSequenceClassification", 1), ("BertForMaskedLM", 1)]
)
def test_compiled_without_a_graph_break(head, num_layers, launches):
    """Masks are packed in a traced graph, too: buffers of B * S rows keep shapes static."""
    ours = pair(head, num_hidden_layers=num_layers)[0].to(DEVICE)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), fastbert.backend("triton"):
        for mask in (None, *MASKS):
            inputs = {name: x.to(DEVICE) for name, x in inputs_for(head, mask).items()}
            expected = ours(**inputs).to_tuple()
            launches.clear()
            outputs = compiled(**inputs).to_tuple()
            assert launches.count("_qkv_projection_kernel") == num_layers
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


@pytest.fixture
def graphs(monkeypatch):
    """The forward and backward graphs that inductor would get, with masks packed on the device."""
    monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    torch._dynamo.reset()
    return recorded_graphs()


def names(graph, namespace):
    """The names of a namespace's ops in a graph, one per call."""
    targets = (node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return [target._schema.name.removeprefix(f"{namespace}::") for target in targets if target.namespace == namespace]


PACKING = {"index", "index_put", "index_copy", "index_select", "gather", "scatter", "scatter_add", "searchsorted"}


@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True}], ids=["", "states"])
@pytest.mark.parametrize("mask", [None, "holes"])
def test_compilers_see_the_backward_as_opaque_ops(mask, asked, graphs):
    ours = pair()[0].to(DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in batch(mask).items()}
    with fastbert.backend("triton"):
        outputs = torch.compile(ours, fullgraph=True, backend=graphs["backend"])(**inputs, **asked)
        sum(x.sin().sum() for x in (outputs.pooler_output, *(outputs.hidden_states or outputs[:1]))).backward()
    (backward,) = graphs["backward"]
    # One linear with an activation: the pooler's.
    expected = Counter(trained_layer_backward=3, linear_activation_backward=1, embed_layer_norm_backward=1)
    if mask is not None:
        expected.update(unpack_backward=4 if asked else 1, pool_backward=1)
    assert Counter(names(backward, "fastbert")) == expected
    for graph in (*graphs["forward"], backward):
        found = {*names(graph, "aten")}
        assert not found & {*PACKING, "bmm", "_softmax", "_safe_softmax"}
        assert not [name for name in found if "scaled_dot_product" in name]


def dropout(model):
    model.train()


def hook(model):
    model.encoder.layer[1].output.register_forward_hook(lambda *_: None)


def hook_of_the_embeddings(model):
    model.embeddings.register_forward_hook(lambda *_: None)


LARGE_HEADS = {"hidden_size": 272, "num_attention_heads": 2}


@pytest.mark.parametrize("change", [dropout, hook, hook_of_the_embeddings, LARGE_HEADS])
def test_traced_graphs_with_fallbacks_do_not_pack(change, graphs, monkeypatch):
    """If not every block of a traced graph runs in kernels, the graph stays padded."""
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    settings = change if change is LARGE_HEADS else {}
    ours = pair(hidden_dropout_prob=1e-9, num_hidden_layers=2, **settings)[0].to(DEVICE)
    if callable(change):
        change(ours)
    inputs, found = {name: x.to(DEVICE) for name, x in batch("holes").items()}, []
    for model in (ours, torch.compile(ours, fullgraph=True, backend=graphs["backend"])):
        outputs = model(**inputs).to_tuple()
        gradients = torch.autograd.grad(sum(x.sin().sum() for x in outputs), [*ours.parameters()])
        found.append((*outputs, *gradients))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    for graph in (*graphs["forward"], *graphs["backward"]):
        assert not {*names(graph, "aten")} & PACKING


def test_offsets_are_searched_without_a_slice(graphs):
    """Inductor in torch 2.11 ignores the start of a slice that is searched on a GPU."""
    bounds, hidden = integers([0, 5, 8, 9, 12]).int(), torch.randn(12, E, device=DEVICE)
    ours = pair(num_hidden_layers=1)[0].to(DEVICE)
    packed = {"input_ids": batch()["input_ids"][:1].to(DEVICE), "cu_seq_lens_q": bounds, "max_length_q": 5}
    compiled, pool = (torch.compile(x, fullgraph=True, backend=graphs["backend"]) for x in (ours, ops.pool))
    with torch.no_grad(), fastbert.backend("eager"):
        compiled(**packed)
        compiled(**packed, output_attentions=True)
        pool(hidden, bounds, "mean")
    nodes = [node for graph in graphs["forward"] for node in graph.nodes]
    searched = [node.args[0].meta["val"] for node in nodes if node.target is torch.ops.aten.searchsorted.Tensor]
    # Two for each packed batch (positions, attention's mask), one for the pooling.
    assert [bounds.storage_offset() for bounds in searched] == [0] * 5


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
