"""Loading and saving, both ways between this package and transformers."""

import copy
import json
import logging
import pickle

import pytest
import torch
import transformers
from cases import DTYPES, HEADS, batch, inputs_for, pair, tiny_config
from safetensors.torch import load_file, save_file

import fastbert


def check_same_state(a, b):
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("head", HEADS)
def test_round_trips(head, shard, tmp_path):
    ours, theirs = pair(head)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    loaded = getattr(fastbert, head).from_pretrained(tmp_path / "theirs")
    check_same_state(loaded, theirs)
    loaded.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    back = getattr(transformers, head).from_pretrained(tmp_path / "ours")
    check_same_state(back, theirs)
    for name in ("theirs", "ours"):
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == (shard == "20KB")
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert saved[0] == saved[1]
    assert saved[1]["architectures"] == [head]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs_for(head))[0], ours(**inputs_for(head))[0], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, "auto", "bfloat16"], ids=str)
def test_dtype(dtype, tmp_path):
    pair()[1].half().save_pretrained(tmp_path)
    expected = transformers.BertModel.from_pretrained(tmp_path, dtype=dtype)
    loaded = fastbert.BertModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == expected.dtype
    check_same_state(loaded, expected)


def test_offloaded_embeddings(tmp_path):
    ours, theirs = pair()
    theirs.save_pretrained(tmp_path / "model")
    device_map = {"embeddings": "disk", "encoder": "cpu", "pooler": "cpu"}
    loaded = fastbert.BertModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(loaded(**batch())[0], ours(**batch())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    ours, theirs = pair("BertForSequenceClassification")
    theirs.save_pretrained(tmp_path)
    loaded = fastbert.BertForSequenceClassification.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded(**batch()).logits, ours(**batch()).logits)


def test_offloaded_layers_run_through_their_modules(tmp_path):
    ours, theirs = pair()
    theirs.save_pretrained(tmp_path / "model")
    device_map = {"embeddings": "cpu", "pooler": "cpu"} | {f"encoder.layer.{i}": "cpu" for i in range(3)}
    device_map["encoder.layer.1"] = "disk"
    loaded = fastbert.BertModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    rows = {row.block: row for row in fastbert.explain(loaded)}
    assert rows["encoder.layer.1"].backend == "modules"
    with torch.no_grad():
        outputs, expected = loaded(**batch()), ours(**batch())
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_legacy_names_and_buffers(tmp_path, caplog):
    _, theirs = pair()
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }
    legacy["embeddings.position_ids"] = torch.arange(24)[None]
    assert legacy.keys() != weights.keys()
    save_file(legacy, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "transformers"):
        loaded = fastbert.BertModel.from_pretrained(tmp_path)
    check_same_state(loaded, theirs)
    assert "position_ids" not in caplog.text


def test_weights_only_bin(tmp_path):
    _, theirs = pair()
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    check_same_state(fastbert.BertModel.from_pretrained(tmp_path), theirs)


def test_safetensors_come_first(tmp_path):
    _, theirs = pair()
    theirs.save_pretrained(tmp_path)
    torch.save({name: x + 1 for name, x in theirs.state_dict().items()}, tmp_path / "pytorch_model.bin")
    check_same_state(fastbert.BertModel.from_pretrained(tmp_path), theirs)


def test_with_and_without_prefix(tmp_path, caplog):
    head, _ = pair("BertForMaskedLM")
    head.save_pretrained(tmp_path / "head")
    base = fastbert.BertModel.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    check_same_state(base, head.bert)
    base.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING, "transformers"):
        classifier = fastbert.BertForTokenClassification.from_pretrained(tmp_path / "base", num_labels=5)
    check_same_state(classifier.bert, base)
    assert "classifier.weight" in caplog.text
    assert classifier.classifier.weight.std() > 0
    assert not classifier.classifier.bias.any()


def test_newly_initialized_like_transformers(tmp_path):
    """Every class loads a bare encoder with the same missing keys and the same initial distribution."""
    _, theirs = pair()
    theirs.save_pretrained(tmp_path)
    for head in HEADS[1:]:
        info = [
            getattr(package, head).from_pretrained(tmp_path, output_loading_info=True)
            for package in (fastbert, transformers)
        ]
        assert info[0][1]["missing_keys"] == info[1][1]["missing_keys"]
        assert not info[0][1]["unexpected_keys"] - info[1][1]["unexpected_keys"]
        spreads = [
            {name: x.std().item() for name, x in model.state_dict().items() if x.numel() > 1} for model, _ in info
        ]
        for name, spread in spreads[0].items():
            assert spread == pytest.approx(spreads[1][name], rel=0.5), name


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForPreTraining"])
def test_the_decoder_is_tied_and_stays_tied(head, tmp_path):
    ours, theirs = pair(head)
    ours.save_pretrained(tmp_path)
    for model in (ours, getattr(fastbert, head).from_pretrained(tmp_path)):
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
        assert len(list(model.parameters())) == len(list(theirs.parameters()))
    ours.resize_token_embeddings(70, mean_resizing=False)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert ours.config.vocab_size == 70
    logits = ours(torch.full((1, 3), 69))[0 if head == "BertForMaskedLM" else "prediction_logits"]
    assert logits.shape == (1, 3, 70)


def test_untied_decoder(tmp_path):
    ours, theirs = pair("BertForMaskedLM", tie_word_embeddings=False)
    assert ours.cls.predictions.decoder.weight is not ours.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(ours(**batch()).logits[:, 0], theirs(**batch()).logits[:, 0], atol=1e-4, rtol=1e-4)


def test_new_models_initialize_like_transformers():
    torch.manual_seed(3)
    ours = fastbert.BertForSequenceClassification(tiny_config())
    torch.manual_seed(3)
    check_same_state(ours, transformers.BertForSequenceClassification(tiny_config()))


def test_copies():
    ours, _ = pair("BertForSequenceClassification")
    expected = ours(**batch()).logits
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(model(**batch()).logits, expected)
        assert all(row.backend == "eager" for row in fastbert.explain(model))


def test_buffers_that_no_checkpoint_has_are_initialized(minilm, transformers_minilm):
    for buffers in zip(minilm.named_buffers(), transformers_minilm.named_buffers(), strict=True):
        assert buffers[0][0] == buffers[1][0]
        assert torch.equal(buffers[0][1], buffers[1][1])
