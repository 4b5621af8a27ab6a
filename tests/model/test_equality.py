"""Every class equals transformers' class in outputs, losses, gradients, hidden states and attentions."""

from copy import deepcopy

import pytest
import torch
import transformers
from cases import BATCH, DTYPES, HEADS, MASKS, SEQ_LEN, at_kept_tokens, batch, inputs_for, pair

from fastbert.testing import check_close


def check_outputs(ours, theirs, truth, mask):
    """Compare two outputs key by key, recursing into tuples of states."""
    assert type(ours) is type(theirs)
    assert list(ours.keys()) == list(theirs.keys())
    for name in ours:
        values = ours[name], theirs[name], truth[name]
        for index, (a, b, c) in enumerate(zip(*(x if isinstance(x, tuple) else (x,) for x in values), strict=True)):
            check_close(f"{name}[{index}]", *(at_kept_tokens(x, mask) for x in (a, b, c)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("head", HEADS)
def test_outputs_and_loss(head, mask, attention):
    ours, theirs = pair(head, attention)
    # With left padding and holes transformers pools padding in column 0. Padded question answering differs on purpose.
    # Both have their own tests.
    pools_elsewhere = mask in ("left", "holes") and head not in ("BertForMaskedLM", "BertForTokenClassification")
    if pools_elsewhere or (head == "BertForQuestionAnswering" and mask not in (None, "full")):
        ours, theirs = ours.bert if hasattr(ours, "bert") else ours, theirs.bert if hasattr(theirs, "bert") else theirs
        ours.pooler = theirs.pooler = None
        inputs = batch(mask)
    else:
        inputs = inputs_for(head, mask, with_labels=True)
        if "labels" in inputs and inputs["labels"].shape == (BATCH, SEQ_LEN) and mask:
            inputs["labels"] = inputs["labels"].masked_fill(MASKS[mask] == 0, -100)
    with torch.no_grad():
        outputs = (model(**inputs) for model in (ours, theirs, deepcopy(theirs).double()))
        check_outputs(*outputs, None if mask is None else MASKS[mask])


@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_every_parameter(head):
    inputs = inputs_for(head, "full" if head == "BertForQuestionAnswering" else "right", with_labels=True)
    if "labels" in inputs and inputs["labels"].shape == (BATCH, SEQ_LEN):
        inputs["labels"] = inputs["labels"].masked_fill(MASKS["right"] == 0, -100)
    ours, theirs = pair(head)
    truth = deepcopy(theirs).double()
    for model in (ours, theirs, truth):
        outputs = model.train()(**inputs)
        loss = outputs.loss if head != "BertModel" else outputs.pooler_output.square().sum()
        loss.backward()
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), truth.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if name.endswith("key.bias"):
            # A constant added to every score changes no softmax: the gradient is zero up to rounding.
            assert a.grad.abs().max() < 1e-6
        elif a.grad is not None:
            check_close(name, a.grad, b.grad, c.grad)


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize(
    ("selection", "selected"), [(True, {0, 1, 2, 3}), (1, {1}), ([0, -1], {0, 3}), ([2], {2})], ids=str
)
def test_hidden_states(selection, selected, mask):
    ours, theirs = pair()
    inputs = batch(mask)
    with torch.no_grad():
        states = ours(**inputs, output_hidden_states=selection).hidden_states
        expected = theirs(**inputs, output_hidden_states=True).hidden_states
        truth = deepcopy(theirs).double()(**inputs, output_hidden_states=True).hidden_states
    assert {index for index, state in enumerate(states) if state is not None} == selected
    for index, (a, b, c) in enumerate(zip(states, expected, truth, strict=True)):
        if a is not None:
            kept = None if mask is None else MASKS[mask]
            check_close(f"state {index}", *(at_kept_tokens(x, kept) for x in (a, b, c)))
            if mask is not None:
                assert not a[MASKS[mask] == 0].any()


def test_last_hidden_state_is_the_last_state_and_its_gradient_can_be_retained():
    ours, _ = pair()
    outputs = ours(**batch(), output_hidden_states=True)
    assert outputs.hidden_states[-1] is outputs.last_hidden_state
    for state in outputs.hidden_states:
        state.retain_grad()
    outputs.pooler_output.square().sum().backward()
    assert all(state.grad is not None and state.grad.any() for state in outputs.hidden_states)


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_attentions(mask):
    ours, theirs = pair()
    theirs.set_attn_implementation("eager")
    inputs = batch(mask)
    with torch.no_grad():
        weights, expected, truth = (
            model(**inputs, output_attentions=True).attentions for model in (ours, theirs, deepcopy(theirs).double())
        )
    assert len(weights) == len(expected) == 3
    for a, b, c in zip(weights, expected, truth, strict=True):
        queries = (x.transpose(1, 2) for x in (a, b, c))
        check_close("attentions", *(at_kept_tokens(x, None if mask is None else MASKS[mask]) for x in queries))


def test_states_and_attentions_come_through_a_head_and_from_the_config():
    ours, theirs = pair(
        "BertForTokenClassification", output_hidden_states=True, output_attentions=True, attention="eager"
    )
    with torch.no_grad():
        outputs, expected = ours(**batch(None)), theirs(**batch(None))
    assert list(outputs.keys()) == list(expected.keys()) == ["logits", "hidden_states", "attentions"]
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_return_dict_false_gives_the_tuple(head):
    ours, theirs = pair(head)
    inputs = inputs_for(head, with_labels=True)
    outputs, expected = ours(**inputs, return_dict=False), theirs(**inputs, return_dict=False)
    assert isinstance(outputs, tuple)
    assert [x.shape for x in outputs] == [x.shape for x in expected]
    ours.config.return_dict = False
    assert isinstance(ours(**inputs), tuple)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mask", [None, "right", "left", "holes"])
def test_half_precision(mask, dtype):
    ours, theirs = pair()
    truth = deepcopy(theirs)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    with torch.no_grad():
        outputs = [model(**batch(mask)).last_hidden_state for model in (ours, theirs, truth)]
    assert outputs[0].dtype == dtype
    check_close(str(dtype), *(at_kept_tokens(x, None if mask is None else MASKS[mask]) for x in outputs))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "tanh", "silu"])
def test_activations(activation):
    ours, theirs = pair("BertForMaskedLM", hidden_act=activation)
    with torch.no_grad():
        outputs = [
            model(**batch()).logits[MASKS["right"].bool()] for model in (ours, theirs, deepcopy(theirs).double())
        ]
    check_close(activation, *outputs)


@pytest.mark.parametrize("settings", [{"hidden_size": 96, "num_attention_heads": 1}, {"num_attention_heads": 48}])
def test_head_sizes(settings):
    ours, theirs = pair(**settings)
    with torch.no_grad():
        outputs = [
            model(**batch()).last_hidden_state[MASKS["right"].bool()]
            for model in (ours, theirs, deepcopy(theirs).double())
        ]
    check_close("last_hidden_state", *outputs)


def test_inputs_embeds_and_position_ids():
    ours, theirs = pair()
    inputs = batch("right")
    embeds = ours.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    positions = torch.randint(0, 24, (BATCH, SEQ_LEN))
    for position_ids in (None, positions, positions[:1], positions[0]):
        kwargs = inputs | {"inputs_embeds": embeds, "position_ids": position_ids}
        with torch.no_grad():
            outputs = ours(**kwargs).last_hidden_state
            # transformers supports positions per row only with token types, so they are passed here.
            expected = theirs(**kwargs).last_hidden_state
            truth = deepcopy(theirs).double()(**kwargs | {"inputs_embeds": embeds.double()}).last_hidden_state
        check_close("embeds", *(x[MASKS["right"].bool()] for x in (outputs, expected, truth)))


def test_problem_types_are_inferred_and_written_to_the_config():
    for num_labels, targets, problem_type in (
        (1, torch.rand(BATCH), "regression"),
        (3, torch.randint(0, 3, (BATCH,)), "single_label_classification"),
        (3, torch.rand(BATCH, 3), "multi_label_classification"),
    ):
        ours, theirs = pair("BertForSequenceClassification", num_labels=num_labels)
        loss, expected = ours(**batch(), labels=targets).loss, theirs(**batch(), labels=targets).loss
        torch.testing.assert_close(loss, expected)
        assert ours.config.problem_type == theirs.config.problem_type == problem_type


def test_a_model_is_also_an_instance_of_transformers_class():
    for head in HEADS:
        ours, theirs = pair(head)
        assert isinstance(ours, getattr(transformers, head))
        assert type(ours).__name__ == type(theirs).__name__
        assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
