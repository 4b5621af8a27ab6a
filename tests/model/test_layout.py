"""Packing of every mask in every dtype: sequences are independent of each other and of padding."""

from copy import deepcopy

import pytest
import torch
from cases import BATCH, DTYPES, HEADS, MASKS, SEQ_LEN, VOCAB, batch, inputs_for, pair
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import tokens
from fastbert.testing import check_close


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_mask_dtypes_give_bitwise_equal_outputs(mask, dtype):
    ours, _ = pair()
    inputs = batch(mask)
    expected = ours(**inputs)
    outputs = ours(**inputs | {"attention_mask": inputs["attention_mask"].to(dtype)})
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(outputs.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("garbage", [7, VOCAB - 1, -100, 10**6])
@pytest.mark.parametrize("mask", ["right", "left", "holes"])
def test_values_at_padding_have_no_effect(mask, garbage):
    ours, _ = pair()
    inputs = batch(mask)
    padding = inputs["attention_mask"] == 0
    expected = ours(**inputs)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(padding, garbage)
    inputs["token_type_ids"] = inputs["token_type_ids"].masked_fill(padding, garbage)
    outputs = ours(**inputs)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(outputs.pooler_output, expected.pooler_output)


def test_nan_embeddings_at_padding_have_no_effect():
    ours, _ = pair()
    inputs = batch("holes")
    embeds = ours.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    expected = ours(inputs_embeds=embeds, **inputs).last_hidden_state
    poisoned = embeds.masked_fill(inputs["attention_mask"][..., None] == 0, torch.nan)
    assert torch.equal(ours(inputs_embeds=poisoned, **inputs).last_hidden_state, expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_batch_equals_each_sequence_alone(rows, seed):
    ours, theirs = pair()
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(rows)
    input_ids = torch.randint(0, VOCAB, mask.shape, generator=generator)
    with torch.no_grad():
        together = ours(input_ids, mask)
        for row, kept in enumerate(mask):
            columns = kept.nonzero().flatten()
            assert not together.last_hidden_state[row, ~kept].any()
            if not len(columns):
                continue
            alone = {"input_ids": input_ids[row, columns][None], "position_ids": columns[None]}
            expected = theirs(**alone)
            # One or two tokens are too few values for the rule, which compares two errors.
            for a, b in (
                (together.last_hidden_state[row, columns], expected.last_hidden_state[0]),
                (together.pooler_output[row], expected.pooler_output[0]),
            ):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_permuting_the_batch_permutes_the_outputs():
    ours, theirs = pair()
    inputs = batch("holes")
    order = torch.tensor([2, 0, 3, 1])
    outputs = ours(**inputs).last_hidden_state
    permuted = ours(**{name: x[order] for name, x in inputs.items()}).last_hidden_state
    truth = deepcopy(theirs).double()(**inputs).last_hidden_state
    kept = MASKS["holes"][order].bool()
    check_close("permuted", permuted[kept], outputs[order][kept], truth[order][kept])


def test_layers_on_another_device():
    """`device_map` can place the last layers on another device; "meta" stands in for it."""
    ours, _ = pair()
    ours.encoder.layer[2].to("meta")
    ours.pooler.to("meta")
    move = lambda module, args: (args[0].to("meta"), *args[1:])  # noqa: E731
    ours.encoder.layer[2].register_forward_pre_hook(move)
    for mask in (None, "right", "left"):
        outputs = ours(**batch(mask))
        assert outputs.last_hidden_state.shape == (BATCH, SEQ_LEN, 48)
        assert outputs.last_hidden_state.device == outputs.pooler_output.device == torch.device("meta")
        assert ours(**batch(mask), output_attentions=True).attentions[2].shape == (BATCH, 3, SEQ_LEN, SEQ_LEN)


def test_a_default_device_has_no_effect():
    ours, _ = pair()
    inputs = batch()
    with torch.device("meta"):
        assert ours(**inputs).last_hidden_state.device == torch.device("cpu")


def test_one_mask_row_for_all_sequences():
    ours, theirs = pair()
    inputs = batch(None)
    mask = MASKS["right"][1:2]
    outputs = ours(**inputs, attention_mask=mask).last_hidden_state[:, :7]
    expected = theirs(**inputs, attention_mask=mask.expand(BATCH, -1)).last_hidden_state[:, :7]
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)


def test_inputs_of_other_strides():
    ours, _ = pair()
    inputs = batch("right")
    expected = ours(**inputs)
    strided = {name: torch.stack((x, x), -1)[..., 0] for name, x in inputs.items()}
    transposed = {name: x.t().contiguous().t() for name, x in inputs.items()}
    for other in (strided, transposed):
        assert not other["input_ids"].is_contiguous()
        assert torch.equal(ours(**other).last_hidden_state, expected.last_hidden_state)


def test_packed_equals_padded():
    """The padded layout of traced graphs and score masks gives the same outputs as the packed one."""
    ours, _ = pair()
    for mask in MASKS:
        inputs = batch(mask)
        layout = tokens.layout_from_mask(inputs["attention_mask"], BATCH, SEQ_LEN, torch.device("cpu"))
        padded = layout.as_padded()
        hidden = torch.randn(BATCH, SEQ_LEN, 48) * MASKS[mask][..., None]
        packed_states = ours.encoder(layout.pack(hidden), layout).last_hidden_state
        padded_states = ours.encoder(hidden, padded).last_hidden_state
        torch.testing.assert_close(packed_states, padded_states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep_rows", [(), (0,), (3,), (0, 2)])
def test_rows_without_a_token_are_zeros(keep_rows):
    ours, theirs = pair()
    inputs = batch("right")
    mask = torch.zeros_like(inputs["attention_mask"])
    mask[list(keep_rows)] = inputs["attention_mask"][list(keep_rows)]
    inputs["attention_mask"] = mask
    outputs = ours.train()(**inputs)
    outputs.last_hidden_state.sum().backward()
    empty = ~mask.any(1)
    assert not outputs.last_hidden_state[empty].any()
    expected = ours.pooler(torch.zeros(1, 1, 48))
    torch.testing.assert_close(outputs.pooler_output[empty], expected.expand(int(empty.sum()), -1))
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
    if keep_rows:
        kept = mask.bool()
        truth = deepcopy(theirs).double()(**inputs).last_hidden_state[kept]
        check_close("kept", outputs.last_hidden_state[kept], theirs(**inputs).last_hidden_state[kept], truth)


def score_masks():
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(BATCH, 1, SEQ_LEN, SEQ_LEN, generator=generator) < 0.6
    allowed |= torch.eye(SEQ_LEN, dtype=torch.bool)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return {
        "bool": (allowed, allowed),
        "additive": (additive, additive),
        "minus infinity": (additive.masked_fill(~allowed, -torch.inf), additive),
        "per head": (additive.expand(-1, 3, -1, -1), additive),
        "keys only": (additive[:, :, :1], additive[:, :, :1]),
        "one for all": (additive[:1], additive[:1].expand(BATCH, -1, -1, -1)),
        "bias": (torch.randn(allowed.shape, generator=generator),) * 2,
        "3-D bool": (allowed[:, 0], allowed),
        "3-D int": (allowed[:, 0].long(), allowed),
        "4-D int": (allowed.long(), allowed),
        "3-D additive": (additive[:, 0], additive),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", score_masks())
def test_score_masks(name, attention):
    mask, reference = score_masks()[name]
    ours, theirs = pair(attention="sdpa")
    ours.set_attn_implementation(attention)
    inputs = batch(None)
    with torch.no_grad():
        outputs = ours(**inputs, attention_mask=mask)
        expected = theirs(**inputs, attention_mask=reference)
        wide = reference.double() if reference.is_floating_point() else reference
        truth = deepcopy(theirs).double()(**inputs, attention_mask=wide)
    for key in ("last_hidden_state", "pooler_output"):
        check_close(key, outputs[key], expected[key], truth[key])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 1, 12).bool(), torch.full((1, 1, 12, 12), -torch.inf)], ids=str)
def test_a_fully_masked_query_is_finite(mask, attention, dtype):
    ours, _ = pair(attention=attention)
    outputs = ours.to(dtype)(**batch(None), attention_mask=mask).last_hidden_state
    outputs.float().square().sum().backward()
    assert outputs.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_query_without_keys_attends_to_all(dtype, attention):
    ours, _ = pair(attention=attention)
    mask = torch.ones(1, 1, SEQ_LEN, SEQ_LEN, dtype=dtype)
    expected = ours(**batch(None), attention_mask=mask).last_hidden_state
    mask[..., 3, :] = 0
    torch.testing.assert_close(ours(**batch(None), attention_mask=mask).last_hidden_state, expected)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches_with_states_and_attentions(shape):
    ours, _ = pair()
    outputs = ours(torch.zeros(shape, dtype=torch.long), output_hidden_states=True, output_attentions=True)
    assert {tuple(state.shape) for state in outputs.hidden_states} == {(*shape, 48)}
    assert {tuple(weights.shape) for weights in outputs.attentions} == {(shape[0], 3, shape[1], shape[1])}


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("head", HEADS)
def test_empty_batches(head, shape):
    ours, theirs = pair(head)
    choices = (2,) if head == "BertForMultipleChoice" else ()
    inputs = torch.zeros(shape[0], *choices, shape[1], dtype=torch.long)
    for mask in (None, torch.ones_like(inputs)):
        outputs = ours(inputs, mask)
        full = theirs(torch.zeros(2, *choices, 5, dtype=torch.long))
        for key in full:
            sizes = {2: shape[0], 5: shape[1]} if head != "BertForMultipleChoice" else {}
            if not sizes:
                assert list(outputs[key].shape) == [shape[0], 2]
                continue
            batch_size, *rest = full[key].shape
            rest = [shape[1] if size == 5 else size for size in rest]
            assert list(outputs[key].shape) == [sizes[batch_size], *rest], key


PACKED = {"lengths": (5, 3, 1, 7), "cu_seqlens": torch.tensor([0, 5, 8, 9, 16], dtype=torch.int32)}


def packed_arguments(dtype=torch.int32):
    cu_seqlens = PACKED["cu_seqlens"].to(dtype)
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 7, "max_length_k": 7}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("with_positions", [True, False])
def test_packed_sequences_do_not_attend_to_each_other(with_positions, attention):
    ours, theirs = pair(attention=attention)
    row = torch.randint(0, VOCAB, (1, 16))
    positions = torch.cat([torch.arange(length) for length in PACKED["lengths"]])[None] if with_positions else None
    with torch.no_grad():
        outputs = ours(row, position_ids=positions, **packed_arguments())
        asked = ours(row, position_ids=positions, **packed_arguments(torch.int64), output_attentions=True)
        assert outputs.pooler_output.shape == (4, 48)
        assert asked.attentions[0].shape == (1, 3, 16, 16)
        torch.testing.assert_close(asked.pooler_output, outputs.pooler_output)
        start = 0
        for index, length in enumerate(PACKED["lengths"]):
            text = row[:, start : start + length]
            expected, truth = theirs(text), deepcopy(theirs).double()(text)
            for packed in (outputs, asked):
                hidden = packed.last_hidden_state[:, start : start + length]
                check_close("hidden", hidden, expected.last_hidden_state, truth.last_hidden_state)
                check_close("pooled", packed.pooler_output[index], expected.pooler_output[0], truth.pooler_output[0])
            assert not asked.attentions[0][0, :, start : start + length, start + length :].any()
            start += length


@pytest.mark.parametrize("lengths", [(5, 1, 9, 0, 3), (40, 2), (1, 2)])
def test_short_and_long_sequences_on_both_sides_of_the_threshold(lengths, monkeypatch):
    """On the CPU short sequences are padded for one call of attention, long ones take one call each."""
    from fastbert.ops import eager

    qkv = torch.randn(sum(lengths), 3, 2, 8)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    outputs = []
    for threshold in (0, 2**60):
        monkeypatch.setattr(eager, "SHORT_ATTENTION", threshold)
        outputs.append(eager.attention(qkv, cu_seqlens, max(lengths), 0.3))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_multiple_choice_inputs():
    ours, theirs = pair("BertForMultipleChoice")
    inputs = inputs_for("BertForMultipleChoice")
    flat = inputs | {"attention_mask": inputs["attention_mask"].flatten(0, 1), "position_ids": torch.arange(SEQ_LEN)}
    torch.testing.assert_close(ours(**flat).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_data_collator_with_flattening():
    from transformers import DataCollatorWithFlattening

    ours, theirs = pair("BertForTokenClassification")
    texts = [{"input_ids": torch.randint(0, VOCAB, (n,)).tolist(), "labels": [1] * n} for n in (6, 2, 9)]
    collated = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(texts)
    outputs = ours(**collated)
    logits = [theirs(torch.tensor([text["input_ids"]])).logits for text in texts]
    torch.testing.assert_close(outputs.logits, torch.cat(logits, 1), atol=1e-5, rtol=1e-5)
    assert outputs.loss.isfinite()


def test_question_answering_never_points_at_padding():
    ours, theirs = pair("BertForQuestionAnswering")
    with torch.no_grad():
        ours.qa_outputs.bias.fill_(-50.0)
    inputs = inputs_for("BertForQuestionAnswering", "left", with_labels=True)
    inputs["start_positions"] = inputs["end_positions"] = torch.full((BATCH,), SEQ_LEN - 1)
    outputs = ours(**inputs)
    padding = inputs["attention_mask"] == 0
    for logits in (outputs.start_logits, outputs.end_logits):
        assert (logits[padding] == torch.finfo(logits.dtype).min).all()
        assert not padding.gather(1, logits.argmax(1, keepdim=True)).any()
    assert outputs.loss.isfinite()
    # Positions at padding are ignored in the loss.
    first = torch.zeros(BATCH, dtype=torch.long)
    everywhere_first = ours(**inputs | {"start_positions": first, "end_positions": first}).loss
    theirs.load_state_dict(ours.state_dict())
    unpadded = {name: inputs[name][:1] for name in ("input_ids", "token_type_ids")}
    torch.testing.assert_close(
        everywhere_first, theirs(**unpadded, start_positions=first[:1], end_positions=first[:1]).loss
    )
    # Without padding, each sequence alone has transformers' loss.
    losses = []
    for row, kept in enumerate(inputs["attention_mask"].bool()):
        columns = kept.nonzero().flatten()
        alone = {name: inputs[name][row, columns][None] for name in ("input_ids", "token_type_ids")}
        last = torch.tensor([len(columns) - 1])
        losses.append(theirs(**alone, position_ids=columns[None], start_positions=last, end_positions=last).loss)
    torch.testing.assert_close(outputs.loss, torch.stack(losses).mean())


def test_left_padding_pools_the_first_kept_token():
    ours, theirs = pair("BertForSequenceClassification")
    inputs = batch("left")
    logits = ours(**inputs).logits
    for row, kept in enumerate(inputs["attention_mask"].bool()):
        columns = kept.nonzero().flatten()
        alone = {name: inputs[name][row, columns][None] for name in ("input_ids", "token_type_ids")}
        torch.testing.assert_close(logits[row], theirs(**alone, position_ids=columns[None]).logits[0])
