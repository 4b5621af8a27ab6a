"""Bad input: every error names the value, the limit and the way out."""

import pytest
import torch
import transformers
from cases import batch, pair, tiny_config

import fastbert

IDS = torch.ones(2, 6, dtype=torch.long)
FORWARD = {
    "id too large": (
        {"input_ids": IDS * 61},
        IndexError,
        "^index out of range in self: input_ids holds 61, allowed are 0 to 60.*tokenizer",
    ),
    "id negative": ({"input_ids": -IDS}, IndexError, "input_ids holds -1, allowed are 0 to 60"),
    "type too large": ({"token_type_ids": IDS * 2}, IndexError, "token_type_ids holds 2, allowed are 0 to 1"),
    "type negative": ({"token_type_ids": -IDS}, IndexError, "token_type_ids holds -1, allowed are 0 to 1"),
    "position": ({"position_ids": IDS * 24}, IndexError, "position_ids holds 24, allowed are 0 to 23"),
    "too long": (
        {"input_ids": torch.ones(1, 25, dtype=torch.long)},
        ValueError,
        "25 tokens is longer than max_position_embeddings=24.*truncation=True, max_length=24",
    ),
    "packed text too long": (
        {"input_ids": torch.ones(1, 40, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 10, 40])},
        ValueError,
        "30 tokens is longer than max_position_embeddings=24",
    ),
    "mask of another length": (
        {"attention_mask": IDS[:, :5]},
        ValueError,
        r"attention_mask has shape \[2, 5\], but the batch is \[2, 6\]: expected \[2, 6\]",
    ),
    "mask of one dimension": ({"attention_mask": IDS[0]}, ValueError, r"attention_mask has shape \[6\]"),
    "mask of five dimensions": ({"attention_mask": IDS[None, None, None]}, ValueError, r"shape \[1, 1, 1, 2, 6\]"),
    "4-D mask of other heads": ({"attention_mask": torch.ones(2, 2, 6, 6)}, ValueError, r"\[2, 3, 6, 6\]"),
    "complex mask": ({"attention_mask": IDS.to(torch.complex64)}, TypeError, "integers or floats, got torch.complex64"),
    "mask as a list": ({"attention_mask": [[1] * 6] * 2}, TypeError, "must be a tensor .*, got list"),
    "additive 2-D mask": ({"attention_mask": IDS * -1e4}, ValueError, r"found -10000.0.*\[B, 1, 1, S\]"),
    "integers in a 4-D mask": (
        {"attention_mask": IDS[:, None, None] * -9},
        ValueError,
        "4-D attention_mask of torch.int64 must hold 0 and 1 only, found -9",
    ),
    "neither ids nor embeddings": (
        {"input_ids": None},
        ValueError,
        "^You must specify exactly one of input_ids or inputs_embeds, got neither",
    ),
    "both ids and embeddings": (
        {"inputs_embeds": torch.zeros(2, 6, 48)},
        ValueError,
        "^You must specify exactly one of input_ids or inputs_embeds, got both",
    ),
    "ids as a list": (
        {"input_ids": [[1, 2]]},
        TypeError,
        "must be a tensor, got list: tokenize with return_tensors='pt'",
    ),
    "ids as floats": (
        {"input_ids": IDS.float()},
        TypeError,
        r"int64 or int32, got torch.float32: .*input_ids.long\(\)",
    ),
    "bounds as a list": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": [0, 6]},
        TypeError,
        "must be a tensor of integers, got list",
    ),
    "falling bounds": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 4, 2, 6])},
        ValueError,
        r"must rise from 0 to the 6 tokens of the row, got \[0, 4, 2, 6\]",
    ),
    "bounds of keys": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 3, 6])},
        ValueError,
        r"cu_seq_lens_q=\[0, 6\] and cu_seq_lens_k=\[0, 3, 6\] must agree",
    ),
    "hidden states": (
        {"output_hidden_states": [1, 4]},
        ValueError,
        r"output_hidden_states=\[1, 4\]: the states are 0 to 3",
    ),
    "ids of one dimension": ({"input_ids": IDS[0]}, ValueError, r"input_ids must be \[B, S\], got \[6\]"),
    "embeddings of another width": (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 47)},
        ValueError,
        r"inputs_embeds must be \[B, S, 48\], got \[2, 6, 47\]",
    ),
    "types of another shape": (
        {"token_type_ids": IDS[:, :3]},
        ValueError,
        r"token_type_ids must be \[2, 6\].*\[2, 3\]",
    ),
    "unknown argument": (
        {"atention_mask": IDS},
        TypeError,
        "unknown arguments atention_mask; it takes .*attention_mask",
    ),
    "cross-attention": (
        {"encoder_hidden_states": torch.zeros(1)},
        ValueError,
        "encoder_hidden_states: .*BertLMHeadModel",
    ),
    "cache": ({"past_key_values": ()}, ValueError, "past_key_values: .*transformers"),
    "use_cache": ({"use_cache": True}, ValueError, "use_cache=True: .*transformers"),
    "packed and masked": (
        {"cu_seq_lens_q": torch.tensor([0, 6]), "attention_mask": IDS},
        ValueError,
        "exclude each other",
    ),
    "packed rows": ({"cu_seq_lens_q": torch.tensor([0, 6])}, ValueError, "one row .* of packed tokens .* got 2 rows"),
    "packed past the end": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 4, 7])},
        ValueError,
        r"must rise from 0 to the 6 tokens of the row, got \[0, 4, 7\]",
    ),
}


@pytest.mark.parametrize("trace_hooks", [False, True])
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name, trace_hooks):
    kwargs, error, message = FORWARD[name]
    ours, _ = pair()
    if trace_hooks:
        ours.embeddings.word_embeddings.register_forward_hook(lambda *_: None)
    with pytest.raises(error, match=message):
        ours(**({"input_ids": IDS} | kwargs))


def test_keywords_that_older_heads_and_trainer_pass_on_are_accepted():
    ours, _ = pair("BertForSequenceClassification")
    expected = ours(**batch()).logits
    assert torch.equal(ours(**batch(), head_mask=None, num_items_in_batch=torch.tensor(4)).logits, expected)


def test_unknown_arguments_of_a_head_raise():
    ours, _ = pair("BertForMaskedLM")
    with pytest.raises(TypeError, match="unknown arguments is_casual"):
        ours(**batch(), is_casual=True)


@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_decoder": True}, "config.is_decoder=True is not supported.*transformers.BertLMHeadModel"),
        ({"add_cross_attention": True}, "config.add_cross_attention=True is not supported.*transformers"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'.*only 'absolute'"),
        ({"hidden_act": "gelo"}, "config.hidden_act='gelo' is unknown; choose one of .*gelu"),
        (
            {"num_attention_heads": 5},
            r"^The hidden size \(48\) is not a multiple of the number of attention heads \(5\)",
        ),
    ],
)
def test_configuration(head, settings, message, tmp_path):
    config = tiny_config(**settings)
    with pytest.raises(ValueError, match=message):
        getattr(fastbert, head)(config)
    pair(head)[0].save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(fastbert, head).from_pretrained(tmp_path)


def test_attention_implementation():
    ours, _ = pair()
    with pytest.raises(
        ValueError, match='^Specified `attn_implementation="flex_attention"` is not supported: .* eager, sdpa'
    ):
        ours.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match='^Specified `attn_implementation="flash_attention_2"` is not supp'):
        fastbert.BertModel._from_config(tiny_config(), attn_implementation="flash_attention_2")


def test_multiple_choice_needs_three_dimensions():
    ours, _ = pair("BertForMultipleChoice")
    with pytest.raises(ValueError, match=r"input_ids \[B, choices, S\].*got \[2, 6\]"):
        ours(IDS)


def damage(path, content):
    weights = path / "model.safetensors"
    weights.write_bytes(content(weights.read_bytes()))


@pytest.mark.parametrize("content", [lambda b: b"nonsense", lambda b: b[: len(b) // 2], lambda b: b""])
def test_corrupt_checkpoint(tmp_path, content):
    pair()[0].save_pretrained(tmp_path)
    damage(tmp_path, content)
    with pytest.raises(OSError, match=f"{tmp_path}.*cannot be read.*fetch or save it again"):
        fastbert.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_corrupt_bin(tmp_path, content):
    ours, _ = pair()
    ours.config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(ours.state_dict(), path)
    path.write_bytes(content or path.read_bytes()[:5000])
    with pytest.raises(OSError, match=f"{tmp_path} cannot be (read|loaded)") as raised:
        fastbert.BertModel.from_pretrained(tmp_path)
    assert "weights_only" not in str(raised.value)


def test_corrupt_index(tmp_path):
    pair()[0].save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(OSError, match=f"{tmp_path} cannot be read"):
        fastbert.BertModel.from_pretrained(tmp_path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path}/nowhere"):
        fastbert.BertModel.from_pretrained(tmp_path / "nowhere")
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=f"model.safetensors.*{tmp_path}"):
        fastbert.BertModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no-such-owner/no-such-model"):
        fastbert.BertModel.from_pretrained("no-such-owner/no-such-model")


def test_an_extended_table_of_positions_sets_the_limit():
    ours, _ = pair()
    ours.embeddings.position_embeddings = torch.nn.Embedding(40, 48)
    assert ours(torch.ones(1, 40, dtype=torch.long)).last_hidden_state.shape == (1, 40, 48)
    with pytest.raises(ValueError, match="41 tokens is longer than max_position_embeddings=40"):
        ours(torch.ones(1, 41, dtype=torch.long))


def test_a_configuration_of_another_class_raises():
    with pytest.raises(TypeError, match="PreTrainedConfig"):
        fastbert.BertModel({"hidden_size": 48})
    assert issubclass(fastbert.BertConfig, transformers.PreTrainedConfig)
