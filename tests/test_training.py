"""Training: dropout, checkpointing, autocast, hooks, adapters."""

from copy import deepcopy

import pytest
import torch
from cases import MASKS, batch, inputs_for, pair
from closeness import check_close
from torch import nn

import fastbert

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}


def loss_of(model, inputs):
    torch.manual_seed(5)
    return model(**inputs).last_hidden_state.square().sum()


def test_dropout_is_active_in_training_only():
    ours, _ = pair(**DROPOUT)
    inputs = batch()
    assert torch.equal(ours(**inputs)[0], ours(**inputs)[0])
    ours.train()
    first, second = ours(**inputs)[0], ours(**inputs)[0]
    assert not torch.equal(first, second)
    assert torch.equal(loss_of(ours, inputs), loss_of(ours, inputs))


@pytest.mark.parametrize("part", ["embeddings", "attention", "hidden"])
def test_every_dropout_drops(part):
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, _ = pair(**settings)
    module = {
        "embeddings": ours.embeddings.dropout,
        "attention": ours.encoder.layer[1].attention.self.dropout,
        "hidden": ours.encoder.layer[1].output.dropout,
    }[part]
    inputs = batch()
    expected = ours(**inputs)[0]
    module.p = 0.5
    torch.testing.assert_close(ours(**inputs)[0], expected)
    ours.train()
    assert not torch.allclose(ours(**inputs)[0], expected)


def test_mean_under_dropout_is_the_output_without(minilm):
    """Dropout scales by 1 / (1 - p): over many draws the embeddings' mean is what eval mode gives."""
    embeddings = deepcopy(minilm.embeddings)
    ids = torch.arange(1000, 1016)[None]
    expected = embeddings(ids)
    embeddings.train()
    mean = torch.stack([embeddings(ids) for _ in range(400)]).mean(0)
    assert (mean - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_gradients_with_dropout():
    """The gradient along a random direction agrees with a finite difference under the same dropout masks."""
    ours, _ = pair(**DROPOUT)
    ours = ours.double().train()
    inputs = batch("holes")
    parameters = list(ours.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    loss_of(ours, inputs).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True) if p.grad is not None)
    # Row 0 of the word embeddings is padding_idx: it counts in the finite difference but has no gradient.
    directions[0][0] = 0
    step, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * step * d)
            losses.append(loss_of(ours, inputs))
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(sign * step * d)
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / (2 * step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("settings", [{}, DROPOUT], ids=["fused", "dropout"])
def test_gradient_checkpointing(settings, use_reentrant):
    ours, _ = pair(**settings)
    # Its hook makes the embeddings see padding, and draw another dropout mask; so it is on both.
    ours.enable_input_require_grads()
    checkpointed = deepcopy(ours)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    losses = [loss_of(model.train(), batch()) for model in (ours, checkpointed)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(ours.named_parameters(), checkpointed.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_checkpointing_recomputes_the_layers():
    ours, _ = pair()
    ours.gradient_checkpointing_enable()
    ours.train()
    calls = []
    forward = type(ours.encoder.layer[0])._forward_fused
    layer = type(ours.encoder.layer[0])
    layer._forward_fused = lambda *args: calls.append(1) or forward(*args)
    try:
        loss_of(ours, batch()).backward()
    finally:
        layer._forward_fused = forward
    assert len(calls) == 6


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["right", "full"])
def test_autocast(mask, dtype, training):
    ours, theirs = pair("BertForSequenceClassification", **(DROPOUT if training else {}))
    if training:
        ours.bert.encoder.train()
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    truth = theirs(**batch(mask))
    with torch.autocast("cpu", dtype):
        outputs, expected = ours(**batch(mask)), theirs(**batch(mask))
    assert outputs.logits.dtype == expected.logits.dtype == dtype
    check_close("logits", outputs.logits, expected.logits, truth.logits)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        torch.testing.assert_close(ours(**batch(mask)).logits, outputs.logits)
    outputs.logits.float().sum().backward()
    assert ours.bert.encoder.layer[0].attention.self.query.weight.grad.dtype == torch.float32


HOOKED = [
    "embeddings.word_embeddings",
    "embeddings",
    "encoder.layer.1",
    "encoder.layer.1.attention.self.query",
    "encoder.layer.1.attention.output.LayerNorm",
    "encoder.layer.1.intermediate.intermediate_act_fn",
    "encoder.layer.2.output.dropout",
    "pooler.dense",
    "pooler",
]


@pytest.mark.parametrize("name", HOOKED)
def test_forward_hooks_see_what_transformers_shows_them(name):
    ours, theirs = pair()
    seen = []
    for model in (ours, theirs):
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    outputs, expected = ours(**batch()), theirs(**batch())
    assert len(seen) == 2
    assert seen[0].shape == seen[1].shape or name == "pooler"
    if seen[0].ndim == 3:
        torch.testing.assert_close(*(x[MASKS["right"].bool()] for x in seen), atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(*seen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)


def test_hooks_change_the_output_and_gradients_reach_them():
    ours, theirs = pair()
    grads = []
    for model in (ours, theirs):
        layer = model.encoder.layer[1]
        layer.attention.self.value.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.output.dense.register_full_backward_hook(lambda module, grad_in, grad_out: grads.append(grad_out[0]))
    outputs, expected = (model(**batch()).last_hidden_state[MASKS["right"].bool()] for model in (ours, theirs))
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(*(g[MASKS["right"].bool()] for g in grads), atol=1e-3, rtol=1e-3)


def test_global_hooks_fire_for_every_module():
    ours, _ = pair()
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        ours(**batch())
    finally:
        handle.remove()
    assert names.count("BertSelfAttention") == 3
    assert names.count("Linear") == 3 * 6 + 1


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


def test_replaced_and_patched_modules_count():
    for change in ("class", "forward", "module"):
        ours, theirs = pair()
        for model in (ours, theirs):
            attention = model.encoder.layer[0].attention.self
            if change == "class":
                attention.key.__class__ = Scaled
            elif change == "forward":
                attention.key.forward = lambda x, key=attention.key: nn.functional.linear(x, key.weight, key.bias) * 3
            else:
                attention.key = nn.Sequential(attention.key, nn.Linear(48, 48))
        theirs.load_state_dict(ours.state_dict())
        outputs, expected = (model(**batch()).last_hidden_state[MASKS["right"].bool()] for model in (ours, theirs))
        torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
        rows = [row for row in fastbert.explain(ours) if row.block == "encoder.layer.0"]
        assert {row.backend for row in rows} == {"modules"}
        assert "attention.self.key" in rows[0].reason


def test_parametrized_and_pruned_weights_count():
    from torch.nn.utils import parametrizations, prune

    ours, theirs = pair()
    for model in (ours, theirs):
        prune.l1_unstructured(model.encoder.layer[0].intermediate.dense, "weight", amount=0.5)
        parametrizations.weight_norm(model.encoder.layer[1].output.dense)
        with torch.no_grad():
            model.encoder.layer[1].output.dense.parametrizations.weight.original0.mul_(2)
    outputs, expected = (model(**batch()).last_hidden_state[MASKS["right"].bool()] for model in (ours, theirs))
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", [["query", "value"], ["dense"], ["query", "word_embeddings"]])
def test_lora(targets):
    from peft import LoraConfig, get_peft_model

    ours, theirs = pair("BertForSequenceClassification")
    wrapped = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="SEQ_CLS")
        wrapped.append(get_peft_model(model, config))
    assert {row.backend for row in fastbert.explain(ours) if row.block == "bert.encoder.layer.0"} == {"modules"}
    inputs = inputs_for("BertForSequenceClassification", with_labels=True)
    losses = [model.train()(**inputs).loss for model in wrapped]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(wrapped[0].named_parameters(), wrapped[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=name)
    before = wrapped[0].eval()(**inputs).logits
    merged = wrapped[0].merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, before, atol=1e-4, rtol=1e-4)
    assert {row.backend for row in fastbert.explain(merged) if "layer" in row.block} == {"eager"}


def test_training_lowers_the_loss():
    ours, _ = pair("BertForSequenceClassification", **DROPOUT)
    optimizer = torch.optim.AdamW(ours.train().parameters(), lr=2e-3)
    inputs = inputs_for("BertForSequenceClassification", with_labels=True)
    losses = []
    for _ in range(60):
        loss = ours(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])


def test_trainer_divides_the_loss_by_its_accumulation_steps():
    ours, _ = pair("BertForSequenceClassification")
    assert ours.accepts_loss_kwargs is False
