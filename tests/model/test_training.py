"""Training: dropout, checkpointing, autocast, adapters, Trainer."""

from copy import deepcopy

import pytest
import torch
from cases import MASKS, batch, inputs_for, pair
from torch import nn

import fastbert
from fastbert.testing import check_close

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


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MultipleChoice"])
@pytest.mark.parametrize("classifier_dropout", [None, 0.0, 0.4])
def test_a_classifier_has_its_own_dropout(classifier_dropout, head):
    ours, theirs = pair(f"BertFor{head}", **DROPOUT, classifier_dropout=classifier_dropout)
    assert ours.dropout.p == theirs.dropout.p == (0.3 if classifier_dropout is None else classifier_dropout)


def test_mean_under_dropout_is_the_output_without(minilm):
    """Dropout scales by 1 / (1 - p), so the mean of many draws is the output in eval mode."""
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
    # Row 0 of the word embeddings is padding_idx, which has no gradient but changes the finite difference.
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
    # Its hook makes the embeddings run on padding and draw another dropout mask, so both models get it.
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


@pytest.mark.filterwarnings("ignore")
def test_trainer_averages_the_loss_over_its_accumulation_steps(tmp_path):
    from transformers import Trainer, TrainingArguments

    ours, _ = pair("BertForSequenceClassification")
    inputs = inputs_for("BertForSequenceClassification", "full", with_labels=True)
    rows = [{name: value[i % 4] for name, value in inputs.items()} for i in range(8)]
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    arguments = TrainingArguments(tmp_path, **settings, logging_steps=1, report_to=[], learning_rate=0.0, use_cpu=True)
    trainer = Trainer(ours, arguments, train_dataset=rows)
    with torch.no_grad():
        expected = ours(**inputs).loss.item()
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-4)


def test_eight_threads_agree():
    from concurrent.futures import ThreadPoolExecutor

    ours, _ = pair()
    with torch.no_grad():
        expected = [ours(**batch(mask)).last_hidden_state for mask in MASKS]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda mask: ours(**batch(mask)).last_hidden_state, [*MASKS] * 8))
    for index, result in enumerate(results):
        torch.testing.assert_close(result, expected[index % len(MASKS)], atol=1e-5, rtol=1e-5)
