"""Training in the kernels: gradients, launches, memory, and what training code does with a model."""

import weakref
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import pytest
import torch
from cases import SEQ_LEN, batch, inputs_for, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import random_cases
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import create_selective_checkpoint_contexts, noop_context_fn

import fastbert
import fastbert_kernels
from fastbert import encoder_layer, tokens
from fastbert.fusion import fused_parts
from fastbert.ops import backend
from fastbert.testing import check_close
from fastbert.tokens import layout_from_mask
from fastbert_kernels.launch import launching_by
from fastbert_kernels.tuning.roofline import MODELS, training_layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
# The interpreter truncates float32 to bfloat16, a GPU rounds: twice the error.
BFLOAT16_FACTOR = 3.0 if DEVICE == "cuda" else 6.0
HEAD = "BertForSequenceClassification"


@pytest.fixture(autouse=True)
def in_kernels():
    with fastbert.backend("triton"):
        yield


def on_device(inputs):
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def model_of(head=HEAD, dtype=torch.float32, **settings):
    return pair(head, **settings)[0].to(DEVICE, dtype)


def gradients(model, inputs, autocast=None, scale=1.0):
    """The gradient of every parameter but the key biases, whose gradients are zero up to rounding."""
    model.zero_grad()
    with torch.autocast(DEVICE, autocast or torch.bfloat16, autocast is not None):
        loss = model(**inputs).loss
    (loss * scale).backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad / scale for name, grad in named.items() if not name.endswith("key.bias")}


def check_gradients(ours, theirs, truth, factor=3.0):
    """All gradients at once, each divided by its size: a bias of two elements is too small for statistics."""
    assert ours.keys() == theirs.keys() == truth.keys()
    sizes = {name: gradient.square().mean().sqrt() for name, gradient in truth.items()}
    dtype = next(iter(ours.values())).dtype
    all_of = [torch.cat([(x[name].double() / sizes[name]).flatten() for name in sizes]) for x in (ours, theirs, truth)]
    check_close("gradients", all_of[0].to(dtype), all_of[1].to(dtype), all_of[2], factor)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.float32, torch.float16), (torch.float32, torch.bfloat16)],
    ids=["float16", "bfloat16", "autocast-float16", "autocast-bfloat16"],
)
def test_gradients_in_16_bits(dtype, autocast, activation):
    """float32 is tested for every head in test_triton."""
    ours, theirs = (model.to(DEVICE, dtype) for model in pair(HEAD, hidden_act=activation))
    inputs = on_device(inputs_for(HEAD, "right", with_labels=True))
    truth = gradients(deepcopy(theirs).double(), inputs)
    scale = 64.0 if torch.float16 in (dtype, autocast) else 1.0
    found = [gradients(model, inputs, autocast, scale) for model in (ours, theirs)]
    check_gradients(*found, truth, BFLOAT16_FACTOR if torch.bfloat16 in (dtype, autocast) else 3.0)


@settings(random_cases, max_examples=8)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    heads=st.sampled_from([(32, 2), (48, 3), (60, 2), (26, 1)]),
)
def test_random_lengths(lengths, dtype, heads):
    width, num_heads = heads
    sizes = {"hidden_size": width, "num_attention_heads": num_heads, "num_hidden_layers": 2}
    ours, theirs = (model.to(DEVICE, dtype) for model in pair(max_position_embeddings=64, **sizes))
    truth, seq_len = deepcopy(theirs).double(), max(lengths)
    mask = (torch.arange(seq_len) < torch.tensor(lengths)[:, None]).to(DEVICE)
    torch.manual_seed(len(lengths))
    x, weights = torch.randn(len(lengths), seq_len, width), torch.randn(len(lengths), seq_len, width)
    found = []
    for model in (ours, theirs, truth):
        kind = next(model.parameters()).dtype
        embeds = x.to(DEVICE, kind).requires_grad_()
        output = model(inputs_embeds=embeds, attention_mask=mask.long()).last_hidden_state
        loss = (output * weights.to(DEVICE, kind))[mask].sum()
        parameters = dict(model.encoder.named_parameters())
        wanted = {name: p for name, p in parameters.items() if not name.endswith("key.bias")}
        grads = torch.autograd.grad(loss, [embeds, *wanted.values()])
        found.append(dict(zip(("x", *wanted), grads, strict=True)))
    for grads in found:
        grads["x"] = grads["x"][mask]
    check_gradients(*found, factor=4.0)


# And two products by PyTorch.
FORWARD = Counter(
    _qkv_projection_kernel=1, _attention_fwd_kernel=1, _linear_kernel=1, _residual_layer_norm_kernel=2
)  # fmt: skip
# LayerNorm twice more: the input of the layer and of its feed-forward part are made again.
BACKWARD = Counter(
    _layer_norm_backward_kernel=2, _activation_backward_kernel=1, _attention_bwd_dq_kernel=1,
    _attention_bwd_dkv_kernel=1, _layer_norm_kernel=2,
)  # fmt: skip

# PyTorch's ops that launch nothing.
FREE = {"t", "transpose", "permute", "view", "unbind", "split", "detach", "empty", "new_empty"}


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of PyTorch's ops that run a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_launches_of_a_layer(launches):
    """Forward and backward: the difference between a model of three layers and one of two."""
    inputs, found = on_device(inputs_for(HEAD, "right", with_labels=True)), []
    for num_layers in (2, 3):
        model = model_of(num_hidden_layers=num_layers)
        launches.clear()
        loss = model(**inputs).loss
        forward = Counter(launches)
        launches.clear()
        with Counted() as others:
            loss.backward()
        found.append((forward, Counter(launches), others.counts))
    forward, backward, others = (after - before for before, after in zip(*found, strict=True))
    assert forward == FORWARD
    assert backward == BACKWARD
    # Seven products, the sums of partial sums and of the biases of queries, keys and values, and their three weights.
    assert {name: others[name] for name in ("mm", "addmm", "sum", "cat")} == {"mm": 7, "addmm": 1, "sum": 4, "cat": 1}
    interpreters = {"copy_", "set_"} if DEVICE == "cpu" else set()
    assert set(others) <= {"mm", "addmm", "sum", "cat"} | FREE | interpreters


@pytest.mark.parametrize("drops", [False, True])
def test_the_roofline_of_a_training_step_has_every_launch(drops):
    """The launches of a layer under autocast, forward and backward. Nothing is computed: launches are counted only."""
    inputs, found = on_device(inputs_for(HEAD, "right", with_labels=True)), []
    for num_layers in (2, 3):
        model, names = model_of(num_hidden_layers=num_layers, **(DROPOUTS if drops else {})).train(), []
        counted = launching_by(lambda kernel, grid, arguments, to=names: to.append(kernel.fn.__name__))
        with counted, profile(activities=[ProfilerActivity.CPU]) as profiled:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
        events = [event.name for event in profiled.events() if event.name.startswith("aten::")]
        ops = [name.removeprefix("aten::").removeprefix("_") for name in events]
        found.append(Counter(names + ops))
    layer, expected = found[1] - found[0], Counter()
    for part in training_layer(MODELS["base"], [128], drops):
        expected[part.runs] += part.launches
    if DEVICE == "cpu":
        expected["to_copy"] += 2  # of operands in another dtype than the result, by `sum` and by `add_`
    assert {name: layer[name] for name in expected} == expected
    assert {name: expected[name] for name in FORWARD | BACKWARD} == FORWARD + BACKWARD
    # What these ops call.
    inner = {"to", "copy_", "fill_", "random_", "matmul", "as_strided", "empty_strided", "expand", "resolve_conj"}
    inner |= {"numpy_T", "narrow", "slice", "select", "flatten", "chunk", "empty_like"}
    assert set(layer) - set(expected) <= FREE | inner


PARTS = {
    "biases": lambda name: name.endswith("bias"),
    "norms": lambda name: "LayerNorm" in name,
    "values": lambda name: "value" in name,
    "attention's output": lambda name: "attention.output.dense" in name,
    "up": lambda name: "intermediate" in name,
    "down": lambda name: "output.dense" in name and "attention" not in name,
    "one weight": lambda name: name == "layer.1.output.dense.weight",
    "the last layer": lambda name: name.startswith("layer.2"),
}


@pytest.mark.parametrize("part", PARTS)
def test_frozen_parameters(part, launches):
    """The others get the same gradients, and nothing is launched for gradients that nobody wants."""
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    expected = gradients(ours, inputs)
    trained = []
    for name, p in ours.named_parameters():
        p.requires_grad_(name.startswith("bert.encoder.") and PARTS[part](name.removeprefix("bert.encoder.")))
        trained += [name] if p.requires_grad and not name.endswith("key.bias") else []
    ours.zero_grad()
    launches.clear()
    found = gradients(ours, inputs)
    assert list(found) == trained
    for name, gradient in found.items():  # layers below the first trained one run as in inference
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    backward = Counter(launches)
    if part == "the last layer":
        assert backward["_layer_norm_backward_kernel"] == 2
        assert backward["_attention_bwd_dkv_kernel"] == 1
    if part == "one weight":
        # The layer above needs its input's gradient.
        assert (backward["_attention_bwd_dq_kernel"], backward["_activation_backward_kernel"]) == (1, 2)


def test_a_frozen_model_records_nothing():
    ours = model_of().requires_grad_(False)
    assert ours(**on_device(batch("right"))).logits.grad_fn is None


def test_frozen_embeddings_are_not_differentiated(launches):
    ours, inputs = model_of(num_hidden_layers=1), on_device(inputs_for(HEAD, "right", with_labels=True))
    expected = gradients(ours, inputs)
    ours.bert.embeddings.requires_grad_(False)
    launches.clear()
    found = gradients(ours, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert launches.count("_layer_norm_backward_kernel") == 2


def test_a_second_backward():
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    loss = ours(**inputs).loss
    found = []
    for _ in range(2):
        ours.zero_grad()
        loss.backward(retain_graph=True)
        found.append([p.grad.clone() for p in ours.parameters()])
    assert all(map(torch.equal, *found))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("name", ["output.dense.weight", "output.LayerNorm.bias", "attention.self.key.weight"])
def test_a_parameter_that_changed_in_place_is_an_error(name):
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    loss = ours(**inputs).loss
    with torch.no_grad():
        ours.bert.encoder.layer[1].get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_an_input_that_changed_in_place(autocast):
    """A layer's input is made again from what the layer before saved, unless it was changed since. Under autocast the
    layer before also made it in 16 bits."""
    layers, layout = (
        model_of("BertModel").encoder.layer,
        layout_from_mask(None, 1, 9, torch.device(DEVICE)),
    )
    x, found = torch.randn(9, 48, device=DEVICE), []
    for change in (lambda y: y.mul_(2), lambda y: y * 2):
        parts = [fused_parts(layer)[0] for layer in layers[:2]]
        with torch.autocast(DEVICE, torch.bfloat16, autocast):
            hidden = layers[0]._forward_fused(x, layout, parts[0], True)
            output = layers[1]._forward_fused(change(hidden), layout, parts[1], True)
        found.append(torch.autograd.grad(output.square().sum(), [*layers[0].parameters(), *layers[1].parameters()]))
    assert all(map(torch.equal, *found))


def test_parameters_that_are_gone_after_their_layer():
    """FSDP frees a layer's parameters after its forward and after its backward. Here they become NaN."""
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    expected = gradients(ours, inputs)
    ours.zero_grad()
    loss, layers = ours(**inputs).loss, ours.bert.encoder.layer
    kept = [p.detach().clone() for p in layers[0].parameters()]
    found = []
    hook = layers[1].output.LayerNorm.weight.register_post_accumulate_grad_hook(lambda p: found.append(p))
    for p in layers[0].parameters():
        p.data.fill_(torch.nan)

    def restore(_):
        for p, values in zip(layers[0].parameters(), kept, strict=True):
            p.data.copy_(values)

    layers[1].attention.self.query.weight.register_post_accumulate_grad_hook(restore)
    loss.backward()
    hook.remove()
    assert len(found) == 1
    for name, gradient in expected.items():
        assert torch.equal(ours.get_parameter(name).grad, gradient), name


def test_the_same_bits_in_every_run():
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    found = [gradients(ours, inputs) for _ in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_gradients_add_up():
    """Over two backwards, and over two layers with the same parameters."""
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    once = gradients(ours, inputs)
    ours(**inputs).loss.backward()
    for name, grad in once.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, 2 * grad)
    tied, theirs = (model.to(DEVICE) for model in pair(HEAD, num_hidden_layers=2))
    for model in (tied, theirs):
        model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    found = [gradients(model, inputs) for model in (tied, theirs, deepcopy(theirs).double())]
    check_gradients(*found)


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {}])
def test_gradients_of_every_hidden_state(asked):
    """Also of an expanded gradient, as a sum has it."""
    found = []
    ours, theirs = (model.to(DEVICE) for model in pair())
    for model in (ours, theirs, deepcopy(theirs).double()):
        outputs = model(**on_device(batch(None)), **asked)
        loss = sum(x.sum() + x.square().sum() for x in outputs.hidden_states or outputs[:1])
        loss.backward()
        named = model.named_parameters()
        found.append({name: p.grad for name, p in named if p.grad is not None and not name.endswith("key.bias")})
    check_gradients(*found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_frees_what_layers_save(use_reentrant, monkeypatch):
    """Although a layer's output refers to rows from which the next layer could make it again."""
    ours, inputs = model_of().train(), on_device(inputs_for(HEAD, "right", with_labels=True))
    expected = gradients(ours, inputs)
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.disable_input_require_grads()  # hooks, which prevent fusion
    sources, trained = [], encoder_layer._trained

    def watched(x, *others):
        sources.append(getattr(x, "fastbert_source", None))
        return trained(x, *others)

    monkeypatch.setattr(encoder_layer, "_trained", watched)
    found = gradients(ours, inputs)
    assert [source for source in sources if source is not None and source.rows() is not None] == []
    assert len(sources) == (3 if use_reentrant else 6)  # the reentrant one records no gradients in the forward
    for name, gradient in expected.items():  # the reentrant one runs its first forward as in inference
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_saved_tensors_on_the_host():
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    expected = gradients(ours, inputs)
    ours.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        loss = ours(**inputs).loss
    loss.backward()
    assert all(torch.equal(ours.get_parameter(name).grad, grad) for name, grad in expected.items())


def test_a_gradient_scaler():
    """A step of float16 autocast changes the parameters; one whose gradients overflow does not."""
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for scale, steps in ((64.0, True), (2.0**40, False)):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        before = ours.bert.encoder.layer[0].output.dense.weight.clone()
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = ours(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, ours.bert.encoder.layer[0].output.dense.weight) != steps
        assert (scaler.get_scale() == scale) == steps


@pytest.mark.parametrize("on_the_device", [False, True])
def test_packed_sequences(on_the_device, monkeypatch):
    """The gradients of two sequences in one row are those of two rows. Tokens past the last offset have none."""
    ours = model_of("BertModel")
    row, end = batch(None)["input_ids"][:1].to(DEVICE), 9 if on_the_device else SEQ_LEN
    if on_the_device:
        monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    ids = torch.stack((row[0, :5], row[0, 4:9])) if on_the_device else None
    bounds = torch.tensor([0, 5, end], device=DEVICE).int()
    output = ours(row, cu_seq_lens_q=bounds, max_length_q=7).last_hidden_state
    assert not output[:, end:].any()
    found = [torch.autograd.grad(output.square().sum(), list(ours.encoder.parameters()))]
    loss = sum(ours(x).last_hidden_state.square().sum() for x in (row[:, :5], row[:, 5:end]))
    found.append(torch.autograd.grad(loss, list(ours.encoder.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
    assert ids is None or ids.shape == (2, 5)


@pytest.mark.parametrize("change", ["hook", "weights"])
def test_packed_sequences_with_a_tail_in_modules(change, monkeypatch):
    """A layer that must see padding gets a mask that separates the sequences and the tokens past them."""
    ours, row = model_of("BertModel"), batch(None)["input_ids"][:1].to(DEVICE)
    if change == "hook":
        ours.encoder.layer[1].output.register_forward_hook(lambda *_: None)
    asked = {"output_attentions": True} if change == "weights" else {}
    monkeypatch.setattr(backend._choice, "name", "auto")
    monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    packed = ours(row, cu_seq_lens_q=torch.tensor([0, 3, 8], device=DEVICE).int(), max_length_q=5, **asked)
    alone = torch.cat([ours(x, **asked).last_hidden_state for x in (row[:, :3], row[:, 3:8])], 1)
    torch.testing.assert_close(packed.last_hidden_state[:, :8], alone, atol=1e-5, rtol=1e-5)
    assert not packed.last_hidden_state[:, 8:].any()


@pytest.mark.parametrize("bounds", [[1, 5, 9], [0, 9, 5], [0, 5, 99]])
def test_offsets_that_do_not_rise_are_an_error(bounds, monkeypatch):
    """With gradients the host reads them, wherever they are: rows in no sequence would spoil every gradient."""
    monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    with pytest.raises(ValueError, match="cu_seq_lens_q must rise from 0 to the 12 tokens of the row"):
        model_of("BertModel")(
            batch(None)["input_ids"][:1].to(DEVICE), cu_seq_lens_q=torch.tensor(bounds, device=DEVICE), max_length_q=7
        )


def test_a_linear_probe_between_layers():
    """Code outside of the model sees plain tensors between fused layers, and modules among them work."""
    ours, theirs = (model.to(DEVICE) for model in pair())
    found = []
    for model in (ours, theirs, deepcopy(theirs).double()):
        kind = next(model.parameters()).dtype
        torch.manual_seed(2)
        probe = nn.Linear(48, 1).to(DEVICE, kind)
        states = model(**on_device(batch(None)), output_hidden_states=True).hidden_states
        loss = probe(states[1]).square().sum() + probe(states[2].detach()).sum()
        parameters = [*model.encoder.layer[0].parameters(), *probe.parameters()]
        names = [*(name for name, _ in model.encoder.layer[0].named_parameters()), "probe.weight", "probe.bias"]
        grads = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        found.append({name: grad for name, grad in grads.items() if not name.endswith("key.bias")})
    check_gradients(*found)


DROPOUTS = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}


def test_dropout_runs_in_kernels(launches):
    ours, inputs = model_of(**DROPOUTS).train(), on_device(inputs_for(HEAD, "right", with_labels=True))
    loss = ours(**inputs).loss
    assert Counter(launches) == Counter({name: 3 * times for name, times in FORWARD.items()}) + Counter(
        _embed_layer_norm_kernel=1, _linear_kernel=1, _unpack_kernel=1, _pool_kernel=launches.count("_pool_kernel")
    )
    launches.clear()
    loss.backward()
    for name, times in BACKWARD.items():
        assert launches.count(name) >= 3 * times - (name == "_layer_norm_kernel")


def test_the_seed_of_torch_repeats_a_step():
    ours, inputs = model_of(**DROPOUTS).train(), on_device(inputs_for(HEAD, "right", with_labels=True))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(gradients(ours, inputs))
    same, other = ([torch.equal(found[0][name], x[name]) for name in found[0]] for x in found[1:])
    assert all(same)
    assert not any(other)


def test_gradients_with_dropout():
    """The gradient along random directions agrees with a finite difference under the same zeros, in float32. The
    directions change the attention block or the feed-forward part of one layer."""
    ours, inputs = model_of("BertModel", num_hidden_layers=2, **DROPOUTS).train(), on_device(batch("holes"))
    torch.manual_seed(7)
    weights = torch.randn(1, 1, 48).to(DEVICE)

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return (ours(**inputs).last_hidden_state * weights).double().sum()

    parameters, step = list(ours.encoder.parameters()), 2e-3
    directions = [torch.randn(p.shape).to(DEVICE) * p.detach().abs().mean() for p in parameters]
    moves = list(zip(parameters, directions, torch.autograd.grad(loss(), parameters), strict=True))
    for start in (0, 8, 16, 24):
        slope = sum((grad.double() * d).sum() for _, d, grad in moves[start : start + 8])
        losses = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for p, d, _ in moves[start : start + 8]:
                    p.add_(d, alpha=sign * step)
                losses.append(loss())
        torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_zeros(use_reentrant):
    ours, inputs = model_of(**DROPOUTS).train(), on_device(inputs_for(HEAD, "right", with_labels=True))
    ours.disable_input_require_grads()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            ours.disable_input_require_grads()  # hooks, which prevent fusion
        torch.manual_seed(3)
        found.append(gradients(ours, inputs))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, DROPOUTS], ids=["plain", "dropout"])
@pytest.mark.parametrize("way", ["selective", "watched"])
def test_checkpointing_under_dispatch_modes(way, settings):
    """Selective checkpointing enters a mode, and a mode may be active around the backward alone: the recomputation
    still runs in the kernels, as the forward."""
    ours, inputs = model_of(**settings).train(), on_device(inputs_for(HEAD, "right", with_labels=True))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            contexts = noop_context_fn
            if way == "selective":
                contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
            ours.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
            ours.disable_input_require_grads()  # hooks, which prevent fusion
        torch.manual_seed(3)
        ours.zero_grad()
        loss = ours(**inputs).loss
        with Counted() if way == "watched" and checkpointing else nullcontext():
            loss.backward()
        found.append([p.grad.clone() for p in ours.parameters()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_dropout_in_a_layer_that_is_compiled_alone(monkeypatch):
    monkeypatch.setattr(backend._choice, "name", "auto")
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    ours, inputs = model_of("BertModel", num_hidden_layers=2, **DROPOUTS).train(), on_device(batch("right"))
    ours.encoder.layer[1].compile(backend="eager")
    outputs = [ours(**inputs).last_hidden_state for _ in range(2)]
    assert not torch.equal(*outputs)
    outputs[0].square().sum().backward()
    assert all(p.grad is not None for p in ours.encoder.parameters())


def test_batched_gradients_are_an_error():
    x = torch.randn(1, 5, 48, device=DEVICE, requires_grad=True)
    output = model_of("BertModel")(inputs_embeds=x).last_hidden_state.sum(-1)[0]
    with pytest.raises(RuntimeError, match="no batched gradients"):
        torch.autograd.grad(output, x, torch.eye(5, device=DEVICE), is_grads_batched=True)


@pytest.mark.parametrize("records", [False, True])
def test_dropout_without_gradients(records):
    """As for estimates of uncertainty: a model in training mode drops, whether gradients are recorded or not."""
    ours, inputs = model_of("BertModel", **DROPOUTS).train(), on_device(batch("right"))
    ours.requires_grad_(records)
    with torch.set_grad_enabled(records):
        first, second = (ours(**inputs).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.testing.assert_close(ours(**inputs)[0], ours.eval()(**inputs)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["embeddings", "attention", "attention's output", "output"])
def test_every_dropout_drops(part):
    """And only the one that is in training mode."""
    ours, inputs = model_of("BertModel", **DROPOUTS), on_device(batch("right"))
    layer = ours.encoder.layer[1]
    dropout, owner = {
        "embeddings": (ours.embeddings.dropout,) * 2,
        "attention": (layer.attention.self.dropout, layer.attention.self),
        "attention's output": (layer.attention.output.dropout,) * 2,
        "output": (layer.output.dropout,) * 2,
    }[part]
    layer.training = True
    with torch.no_grad():
        expected = ours(**inputs).last_hidden_state
        assert torch.equal(ours(**inputs).last_hidden_state, expected)
        owner.training = True
        assert not torch.allclose(ours(**inputs).last_hidden_state, expected, atol=1e-3)
        dropout.p = 0.0
        torch.testing.assert_close(ours(**inputs).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_the_mean_over_many_draws():
    """Dropout keeps the expectation where what follows is linear: the last layer's sum before LayerNorm."""
    ours = model_of("BertModel", num_hidden_layers=1, **DROPOUTS)
    layer, x = ours.encoder.layer[0], torch.randn(SEQ_LEN, 48, device=DEVICE)
    layout = layout_from_mask(None, 1, SEQ_LEN, torch.device(DEVICE))
    layer.output.train()
    layer.training = True
    sums, forward = [], fastbert_kernels.encoder_layer_forward

    def watched(*arguments):
        out, narrow, saved = forward(*arguments)
        sums.append(saved.output_sum)
        return out, narrow, saved

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fastbert_kernels, "encoder_layer_forward", watched)
        parts = fused_parts(layer, drops=True)[0]
        for _ in range(200):
            layer._forward_fused(x, layout, parts, True)
        layer.output.eval()
        layer.attention.output.dropout.train().p = 1e-9  # no draw zeroes anything, but the same code runs
        layer._forward_fused(x, layout, fused_parts(layer, drops=True)[0], True)
    mean, expected = torch.stack(sums[:-1]).mean(0), sums[-1]
    deviation = torch.stack(sums[:-1]).std(0) / 200**0.5
    assert ((mean - expected).abs() <= 5 * deviation + 1e-5).all()


def test_dropout_falls_back_to_modules_where_kernels_cannot_drop(monkeypatch):
    """A mask of three dimensions."""
    ours, inputs = model_of("BertModel", **DROPOUTS).train(), on_device(batch("right"))
    score = inputs["attention_mask"][:, None, :].expand(-1, SEQ_LEN, -1)
    with pytest.raises(RuntimeError, match="it applies dropout .p=0.3., which only kernels do"):
        ours(input_ids=inputs["input_ids"], attention_mask=score)
    monkeypatch.setattr(backend._choice, "name", "auto")
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    assert ours(input_ids=inputs["input_ids"], attention_mask=score).last_hidden_state.isfinite().all()


def test_dropout_where_only_the_device_knows_the_number_of_tokens(monkeypatch, launches):
    """Without gradients. With them the host reads the number."""
    ours, inputs = model_of("BertModel", **DROPOUTS).train(), on_device(batch("right"))
    ours.embeddings.dropout.p = 0.0  # by PyTorch, which draws a number for every row of a buffer
    found = []
    for records in (False, True):
        launches.clear()
        torch.manual_seed(0)
        with torch.set_grad_enabled(records):
            found.append(ours(**inputs).last_hidden_state.detach())
        assert launches.count("_residual_layer_norm_kernel") == 6
        monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
        with torch.set_grad_enabled(records):
            torch.manual_seed(0)
            assert torch.equal(ours(**inputs).last_hidden_state, found[-1])
        monkeypatch.undo()
        assert "_packing_plan_kernel" in launches
    assert torch.equal(*found)


PARAMETERS = (
    "attention.self.query.weight", "attention.self.value.bias", "attention.output.dense.weight",
    "attention.output.dense.bias", "attention.output.LayerNorm.weight", "intermediate.dense.bias",
    "intermediate.dense.weight", "output.dense.weight", "output.LayerNorm.bias",
)  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_one_trained_parameter(name):
    """Of the first layer alone, below which nothing needs a gradient."""
    ours, inputs = model_of(num_hidden_layers=1), on_device(inputs_for(HEAD, "right", with_labels=True))
    expected = gradients(ours, inputs)
    ours.requires_grad_(False)
    ours.bert.encoder.layer[0].get_parameter(name).requires_grad_()
    found = gradients(ours, inputs)
    assert list(found) == [f"bert.encoder.layer.0.{name}"]
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_a_16_bit_model_under_autocast():
    """Residuals and LayerNorm are float32, as on a GPU in transformers."""
    ours, theirs = (model.to(DEVICE, torch.float16) for model in pair())
    x = torch.randn(2, 9, 48, device=DEVICE, dtype=torch.float16)
    with torch.autocast(DEVICE, torch.float16):
        found, expected = (model.encoder(x).last_hidden_state for model in (ours, theirs))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=1e-2, rtol=1e-2)


def test_the_16_bit_output_of_a_layer_dies_with_the_next_one(monkeypatch):
    """The next layer reads it. The last layer's output is kept by what unpacks it."""
    kept, source = [], encoder_layer._Source

    def watched(*fields):
        made = source(*fields)
        kept.append(None if made.narrow is None else weakref.ref(made.narrow))
        return made

    monkeypatch.setattr(encoder_layer, "_Source", watched)
    ours, inputs = model_of(), on_device(inputs_for(HEAD, "right", with_labels=True))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = ours(**inputs).loss
    assert len(kept) == 3
    assert [narrow() is None for narrow in kept] == [True, True, False]
    loss.backward()


def test_norms_are_not_autocast():
    """A LayerNorm's weight of 1 + 2^-12 is 1 in bfloat16."""
    ours, x = model_of("BertModel"), torch.randn(9, 48, device=DEVICE)
    layer, layout = ours.encoder.layer[0], layout_from_mask(None, 1, 9, torch.device(DEVICE))
    outputs = []
    for weight in (1.0, 1 + 2**-12):
        torch.nn.init.constant_(layer.output.LayerNorm.weight, weight)
        torch.nn.init.zeros_(layer.output.LayerNorm.bias)
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs.append(layer._forward_fused(x, layout, fused_parts(layer)[0], True))
    torch.testing.assert_close(outputs[1] / outputs[0], torch.full_like(x, 1 + 2**-12), atol=1e-6, rtol=0)
