"""Training under torch.compile: layers are opaque ops, forward and backward, and equal those outside of graphs."""

from collections import Counter
from functools import partial

import pytest
import torch
from cases import MASKS, VOCAB, batch, inputs_for, pair
from kernel_cases import bounds, count, guarded_outputs, normal
from recorded_graphs import recorded_graphs
from torch.library import opcheck

import fastbert
import fastbert_kernels
from fastbert import tokens
from fastbert.fusion import runs_in_kernels
from fastbert.ops import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
HEAD = "BertForSequenceClassification"
DROPOUTS = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
BACKWARD = ("layer_norm_backward", "activation_backward", "attention_bwd_dq", "attention_bwd_dkv")
WEIGHTS = fastbert_kernels.LayerWeights._fields


@pytest.fixture(autouse=True)
def in_kernels(monkeypatch):
    """Kernels, with masks that only the device knows, as on a GPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    with fastbert.backend("triton"):
        yield


def on_device(inputs):
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def model_of(head=HEAD, **settings):
    return pair(head, **settings)[0].to(DEVICE)


def trainer_of(**settings):
    """A model in training mode. Its embeddings do not drop: PyTorch would draw numbers for padding, too."""
    model = model_of(**DROPOUTS | settings).train()
    model.bert.embeddings.dropout.p = 0.0
    return model


def step(call, model, inputs, seed=0):
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = call(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=tolerance, msg=lambda x, n=name: n + x)


@pytest.fixture
def graphs():
    """The graphs that inductor would get, and a back end that runs them."""
    return recorded_graphs()


def calls(graph):
    targets = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return Counter(target._schema.name.split("::")[1] for target in targets)


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("head", [HEAD, "BertForMaskedLM"])
def test_the_layers_of_a_graph_are_opaque_and_equal_those_outside(head, mask, graphs, launches):
    ours, inputs = model_of(head), on_device(inputs_for(head, mask, with_labels=True))
    expected = step(ours, ours, inputs)
    compiled = torch.compile(ours, fullgraph=True, backend=graphs["backend"])
    launches.clear()
    check_same(step(compiled, ours, inputs), expected)
    assert launches.count("_attention_bwd_dkv_kernel") == launches.count("_qkv_projection_kernel") == 3
    forward, backward = (calls(*graphs[direction]) for direction in ("forward", "backward"))
    assert (forward["trained_layer"], backward["trained_layer_backward"]) == (3, 3)
    for found in (forward, backward):
        assert not {"bmm", "native_layer_norm", "gelu", "_softmax"} & {*found}
    # Outside of the layers there are the pooler and the classifier, or the two linears of a language model.
    assert forward["mm"] + forward["addmm"] <= 2


@pytest.mark.parametrize("mask", [None, "holes"])
def test_dropout_draws_what_it_draws_outside_of_a_graph(mask):
    ours, inputs = trainer_of(), on_device(inputs_for(HEAD, mask, with_labels=True))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        check_same(step(compiled, ours, inputs, seed), step(ours, ours, inputs, seed))
    assert not torch.equal(step(compiled, ours, inputs, 0)["loss"], step(compiled, ours, inputs, 1)["loss"])
    with torch.no_grad():
        torch.manual_seed(0)
        found = compiled(**inputs).loss
        torch.manual_seed(0)
        torch.testing.assert_close(found, ours(**inputs).loss)


def test_checkpointing_draws_the_same_zeros(launches):
    ours, inputs = trainer_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    expected = step(ours, ours, inputs)
    torch._dynamo.reset()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.disable_input_require_grads()  # hooks, which prevent fusion
    launches.clear()
    check_same(step(torch.compile(ours, fullgraph=True, backend="aot_eager"), ours, inputs), expected)
    assert launches.count("_attention_fwd_kernel") == 6


def test_inductor_with_autocast_and_dropout():
    """A seed repeats a step. Without dropout a step in a graph is one outside of it."""
    ours, inputs = trainer_of(num_hidden_layers=2), on_device(inputs_for(HEAD, "right", with_labels=True))
    compiled = torch.compile(ours, fullgraph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = [step(compiled, ours, inputs, seed) for seed in (0, 0, 1)]
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        assert not torch.equal(found[0]["loss"], found[2]["loss"])
        ours.eval()
        check_same(step(compiled, ours, inputs), step(ours, ours, inputs), 0.03)
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}


def test_one_graph_for_all_lengths():
    ours, seen = trainer_of(num_hidden_layers=1), []
    ours.config.problem_type = "single_label_classification"  # otherwise the first call sets it
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=lambda g, _: seen.append(g) or g.forward)
    for size in ((3, 9), (5, 14), (2, 20)):
        mask = (torch.arange(size[1]) < torch.arange(3, 3 + size[0])[:, None]).long()
        inputs = {"input_ids": torch.randint(0, VOCAB, size), "attention_mask": mask, "labels": mask[:, 0]}
        check_same(step(compiled, ours, on_device(inputs)), step(ours, ours, on_device(inputs)))
    assert len(seen) == 1


def test_packed_sequences():
    ours = model_of("BertModel")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    cu_seqlens = torch.tensor([0, 5, 8, 9, 14], dtype=torch.int32, device=DEVICE)
    row = torch.randint(0, VOCAB, (1, 16), device=DEVICE)  # two tokens belong to no sequence
    found = []
    for call in (compiled, ours):
        ours.zero_grad()
        output = call(row, cu_seq_lens_q=cu_seqlens, max_length_q=7).last_hidden_state
        output[:, :14].square().sum().backward()
        found.append({name: p.grad.clone() for name, p in ours.encoder.named_parameters()})
        assert not output[:, 14:].any()
    check_same(*found)


def test_a_layer_that_is_compiled_alone(launches):
    ours, inputs = trainer_of(num_hidden_layers=2), on_device(inputs_for(HEAD, "right", with_labels=True))
    expected = step(ours, ours, inputs)
    ours.bert.encoder.layer[1].compile(backend="aot_eager", fullgraph=True)
    launches.clear()
    check_same(step(ours, ours, inputs), expected)
    assert launches.count("_attention_bwd_dkv_kernel") == 2


@pytest.mark.parametrize("part", ["LayerNorm", "value.bias", "layer.2", "layer.2.output", "embeddings"])
def test_frozen_parameters(part, launches):
    """The others get the same gradients, and nothing is launched for gradients that nobody wants."""
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    for name, p in ours.named_parameters():
        p.requires_grad_(part in name)
    found, counts = [], []
    for call in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        launches.clear()
        found.append(step(call, ours, inputs))
        counts.append([launches.count(f"_{kernel}_kernel") for kernel in BACKWARD])
    check_same(*found)
    assert counts[0] == counts[1]


def test_graphs_with_dropout_are_packed(graphs, monkeypatch):
    """As those without: some block that kernels do not run would leave the whole graph padded."""
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    ours, inputs = trainer_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    with fastbert.backend("auto"):
        step(torch.compile(ours, fullgraph=True, backend=graphs["backend"]), ours, inputs)
    assert calls(graphs["forward"][0])["trained_layer"] == 3
    assert calls(graphs["forward"][0])["packing_plan"] == 1


def test_second_derivatives_are_an_error():
    ours, inputs = model_of(num_hidden_layers=1), on_device(inputs_for(HEAD, "right", with_labels=True))
    loss = torch.compile(ours, backend="eager")(**inputs).loss
    with pytest.raises(RuntimeError, match="no second derivatives .*fastbert.backend\\('eager'\\)"):
        torch.autograd.grad(loss, ours.bert.encoder.layer[0].output.dense.weight, create_graph=True)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_exported_graphs_hold_no_ops_of_training(mode, monkeypatch):
    """Graphs for inference would store what only gradients need; and exported dropout must be PyTorch's."""
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    ours = getattr(model_of("BertModel", num_hidden_layers=1, **DROPOUTS), mode)()
    with fastbert.backend("auto"):
        graph = str(torch.export.export(ours, (), on_device(batch("right")), strict=True).graph)
    assert "trained_layer" not in graph
    assert ("fastbert.attention" in graph) == (mode == "eval")


@pytest.mark.parametrize("autocast", [False, True])
def test_a_graph_break_before_a_layer(autocast, launches):
    """The traced encoder packs on the device. Its layers, outside of the graph, do not know the number of tokens."""
    ours, inputs = trainer_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.disable_input_require_grads()  # hooks, which prevent fusion
    with torch.autocast(DEVICE, torch.bfloat16, autocast):
        expected = step(ours, ours, inputs)
        for layer in ours.bert.encoder.layer:
            layer._gradient_checkpointing_func = torch.compiler.disable(layer._gradient_checkpointing_func)
        launches.clear()
        found = step(torch.compile(ours, backend="aot_eager"), ours, inputs)
    check_same(found, expected, 0.03 if autocast else 1e-4)
    assert launches.count("_attention_fwd_kernel") == 6


def test_a_block_without_parameters_of_its_own_does_not_run_in_kernels():
    """As in FSDP's flat parameters and DataParallel's copies."""
    ours = model_of("BertModel", num_hidden_layers=1)
    layer = ours.encoder.layer[0]
    assert runs_in_kernels(layer)
    for module in layer.modules():
        for name in list(module._parameters):
            value = module._parameters.pop(name)
            setattr(module, name, value.detach())
    assert not runs_in_kernels(layer)


def arguments(
    size, dtype=torch.float32, wide=torch.float32, dropouts=(0.0, 0.0, 0.0), eps=(1e-12, 1e-6), second_norm=None
):
    """Of "fastbert::trained_layer", for a buffer of 9 rows, E = 12 and F = 20, of which `size` are tokens. second_norm:
    the dtype of the output's LayerNorm, if it is another."""
    shapes = [(12, 12), (12,)] * 4 + [(12,), (12,), (20, 12), (20,), (12, 20), (12,), (12,), (12,)]
    weights = [
        normal(*shape, dtype=wide if "norm" in name else dtype) for name, shape in zip(WEIGHTS, shapes, strict=True)
    ]
    weights[-2:] = (w.to(second_norm or wide) for w in weights[-2:])
    seed = torch.tensor([7], device=DEVICE) if any(dropouts) else None
    numbers = 2, 6**-0.5, "gelu", list(eps), list(dropouts), seed
    return [normal(9, 12, dtype=wide), dtype, weights, bounds((size - 2, 2)), size, *numbers, count(size)]


def requiring_gradients(given):
    for x in (given[0], *given[2]):
        x.requires_grad_()
    return given


@pytest.mark.parametrize("eps", [(1e-12, 1e-6), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.3, 0.2, 0.1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)]
)
def test_rows_past_the_count_have_no_effect(dtype, wide, dropouts, eps):
    """They hold NaN in x, in the gradient and in every new buffer. The output and the gradient of x are zero there."""
    given = arguments(6, dtype, wide, dropouts, eps)
    x, grad = given[0], normal(9, 12, dtype=wide)
    for tensor in (x, grad):
        tensor[6:] = torch.nan
    found = []
    for rows in (9, 6):
        inputs = requiring_gradients([x[:rows].detach().clone(), *given[1:-1], given[-1] if rows == 9 else None])
        with guarded_outputs():
            out = torch.ops.fastbert.trained_layer(*inputs)[0]
            gradients = torch.autograd.grad(out, (inputs[0], *inputs[2]), grad[:rows])
        found.append((out.detach(), *gradients))
    for whole, alone in zip(*found, strict=True):
        if whole.shape != alone.shape:
            assert not whole[6:].any()
            whole = whole[:6]
        assert whole.dtype == alone.dtype
        torch.testing.assert_close(whole, alone, atol=2e-2 if dtype == torch.float16 else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.3, 0.2, 0.1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "wide", "second_norm"),
    [
        (torch.float32, torch.float32, None),
        (torch.float16, torch.float32, None),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=["float32", "autocast", "wide and narrow norm", "narrow and wide norm"],
)
def test_opcheck(dtype, wide, second_norm, dropouts):
    given = arguments(9, dtype, wide, dropouts, second_norm=second_norm)
    opcheck(torch.ops.fastbert.trained_layer.default, tuple(requiring_gradients(list(given))))
    given[0], given[2] = given[0].detach(), [w.detach() for w in given[2]]
    out, *saved = torch.ops.fastbert.trained_layer(*given)
    for wanted in (None, {"x"}, {"output_sums"}, {"qkv_bias", "up_weight"}):
        flags = [wanted is None or name in wanted for name in fastbert_kernels.LayerGradients._fields]
        x, kind, weights, cu_seqlens, max_seqlen, _, *rest = given
        backward = partial(opcheck, torch.ops.fastbert.trained_layer_backward.default)
        backward((torch.randn_like(out), x, kind, weights, saved, cu_seqlens, max_seqlen, *rest, flags))
