"""torch.compile, torch.export and torch.jit.trace: one graph for every mask, equal to the untraced model."""

import os
import re
import subprocess
import sys

import pytest
import torch
from cases import HEADS, MASKS, SEQ_LEN, VOCAB, batch, inputs_for, pair
from torch.export import Dim, export

import fastbert


def assert_same(outputs, expected):
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("head", HEADS)
def test_compile_fullgraph(head):
    ours, _ = pair(head, num_hidden_layers=2 if head == "BertModel" else 1)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for mask in ("right", "left", "full", None):
        inputs = inputs_for(head, mask, with_labels=True)
        assert_same(compiled(**inputs), ours(**inputs))


def test_compile_with_inductor_and_gradients():
    ours, _ = pair(num_hidden_layers=1)
    compiled = torch.compile(ours, fullgraph=True)
    grads = []
    for model in (ours, compiled):
        ours.zero_grad()
        outputs = model(**batch("holes"))
        (outputs.last_hidden_state.square().sum() + outputs.pooler_output.sum()).backward()
        grads.append((outputs, [p.grad.clone() for p in ours.parameters()]))
    assert_same(grads[1][0], grads[0][0])
    for a, b in zip(grads[1][1], grads[0][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"attention_mask": torch.ones(4, 1, SEQ_LEN, SEQ_LEN).tril()},
    ],
    ids=str,
)
def test_compile_options(kwargs):
    ours, _ = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    outputs, expected = compiled(**batch(None) | kwargs), ours(**batch(None) | kwargs)
    if kwargs.get("return_dict") is False:
        outputs, expected = dict(enumerate(outputs)), dict(enumerate(expected))
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-4, rtol=1e-4)


def test_compile_packed_sequences():
    ours, _ = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    cu_seqlens = torch.tensor([0, 5, 8, 9, 16], dtype=torch.int32)
    kwargs = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 7}
    row = torch.randint(0, VOCAB, (1, 16))
    assert_same(compiled(row, **kwargs), ours(row, **kwargs))


def test_compile_dynamic_shapes_once():
    ours, _ = pair()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=count)
    for size in ((3, 9), (5, 14), (2, 20)):
        input_ids, mask = torch.randint(0, VOCAB, size), torch.ones(size, dtype=torch.long)
        mask[0, size[1] // 2 :] = 0
        assert_same(compiled(input_ids, mask), ours(input_ids, mask))
    assert len(graphs) == 1


def test_compile_ignores_values_at_padding():
    ours, _ = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    inputs = batch("left")
    expected = compiled(**inputs).last_hidden_state
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert torch.equal(compiled(**inputs).last_hidden_state, expected)
    assert not expected[MASKS["left"] == 0].any()


FIRST_THING = """
import torch
from cases import batch, pair
from fastbert import model, tokens

tokens.shapes_may_depend_on_data = lambda tensor: False  # as for a mask on a GPU
ours, _ = pair(num_hidden_layers=1)
compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
for mask in (None, "right"):
    compiled(**batch(mask))
for entry in torch._dynamo.eval_frame._debug_get_cache_entry_list(model.BertModel.forward):
    print(entry.guard_manager)
"""


def test_compile_before_any_other_call_of_the_process():
    """Tracing imports the kernels: a guard on whether they are imported would fail right after the trace."""
    environment = os.environ | {"FASTBERT_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", FIRST_THING], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("RootGuardManager") == 2
    assert not re.findall(r".*\b(?:sys|environ|fastbert_kernels)\b.*", run.stdout)


def test_compile_honours_the_back_end(no_interpreter):
    ours, _ = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with fastbert.backend("triton"), pytest.raises(Exception, match="backend 'triton' cannot run"):
        compiled(**batch())
    with fastbert.backend("eager"):
        assert_same(compiled(**batch()), ours(**batch()))


@pytest.mark.parametrize(
    ("head", "strict"),
    [(head, False) for head in HEADS if head != "BertForMultipleChoice"] + [("BertModel", True)],
)
def test_export_with_dynamic_batch_and_length(head, strict):
    ours, _ = pair(head, num_hidden_layers=2 if strict else 1)
    dims = {0: Dim("batch"), 1: Dim("length", max=24)}
    inputs = {name: batch("right")[name] for name in ("input_ids", "attention_mask")}
    program = export(ours, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims), strict=strict)
    for size in ((4, 12), (3, 9), (2, 24)):
        input_ids, mask = torch.randint(0, VOCAB, size), torch.ones(size, dtype=torch.long)
        mask[0, : size[1] // 2] = 0
        with torch.no_grad():
            assert_same(
                program.module()(input_ids=input_ids, attention_mask=mask), ours(input_ids, attention_mask=mask)
            )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_holds_for_other_lengths():
    ours, _ = pair()
    ours.requires_grad_(False)
    inputs = batch("right")
    with torch.no_grad():
        traced = torch.jit.trace(
            lambda ids, mask: ours(ids, mask, return_dict=False), (inputs["input_ids"], inputs["attention_mask"])
        )
        for mask in MASKS.values():
            outputs, expected = traced(inputs["input_ids"], mask), ours(inputs["input_ids"], mask)
            torch.testing.assert_close(outputs[0], expected[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(outputs[1], expected[1], atol=1e-4, rtol=1e-4)


def test_meta_device():
    ours, _ = pair()
    meta = ours.to("meta")
    ids, mask = torch.zeros(3, 7, dtype=torch.long, device="meta"), torch.ones(3, 7, device="meta")
    assert meta(ids, mask).last_hidden_state.shape == (3, 7, 48)


def test_compile_clears_nan_embeddings_at_padding():
    ours, _ = pair()
    inputs = batch("right")
    embeds = ours.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    poisoned = embeds.masked_fill(inputs["attention_mask"][..., None] == 0, torch.nan)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_same(compiled(inputs_embeds=poisoned, **inputs), ours(inputs_embeds=embeds, **inputs))


def test_an_exception_while_tracing_is_not_reported_as_another():
    """Then torch runs the model without its graph, and compiles every function that the model calls on its own."""
    ours, _ = pair("BertForSequenceClassification", num_hidden_layers=1)

    def hook(*_):
        if torch.compiler.is_compiling():
            raise RuntimeError("only in a graph")

    ours.bert.register_forward_hook(hook)
    inputs = inputs_for("BertForSequenceClassification", "right")
    assert_same(torch.compile(ours, backend="eager")(**inputs), ours(**inputs))


def test_compile_training_with_dropout_and_hooks():
    ours, _ = pair(hidden_dropout_prob=0.1)
    ours.train().encoder.layer[1].output.dense.register_forward_hook(lambda module, args, output: output * 0)
    compiled = torch.compile(ours, backend="eager")
    outputs = compiled(**batch()).last_hidden_state
    outputs.sum().backward()
    assert ours.encoder.layer[0].output.dense.weight.grad.isfinite().all()
    assert not ours.encoder.layer[1].output.dense.weight.grad.any()


def test_ensembles_by_vmap():
    models = [pair(num_hidden_layers=1)[0] for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.01)
    stacked, _ = torch.func.stack_module_state(models)
    ids = batch(None)["input_ids"]

    def forward(parameters):
        return torch.func.functional_call(models[0], parameters, (ids,)).last_hidden_state

    with torch.no_grad():
        together = torch.func.vmap(forward)(stacked)
        for outputs, model in zip(together, models, strict=True):
            torch.testing.assert_close(outputs, model(ids).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_forward_mode_gradients_without_recording():
    from torch.autograd import forward_ad

    ours, _ = pair(attention="eager", num_hidden_layers=1)  # torch's sdpa has no forward-mode derivative on the CPU
    embeds, tangent = torch.randn(2, 4, 12, 48).unbind()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(embeds, tangent)
        slope = forward_ad.unpack_dual(ours(inputs_embeds=dual).last_hidden_state).tangent
    with torch.no_grad():
        step = 1e-3
        ends = [ours(inputs_embeds=embeds + sign * step * tangent).last_hidden_state for sign in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), atol=1e-2, rtol=1e-2)


def test_functional_gradients():
    ours, _ = pair(num_hidden_layers=1)
    parameters = dict(ours.named_parameters())
    inputs = batch("right")

    def loss(parameters):
        return torch.func.functional_call(ours, parameters, (), inputs).pooler_output.square().sum()

    grads = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-4, rtol=1e-4)
