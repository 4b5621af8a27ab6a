"""Libraries that use BERT give the same results after their model is optimized. They are used as documented."""

import functools
from copy import deepcopy

import pytest
import torch
import transformers
from cases import HEADS, MASKS, SEQ_LEN, batch, inputs_for, pair, tiny_config
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import fastbert

HEAD = "BertForSequenceClassification"
TEXTS = (
    "Triton compiles kernels that are written in Python, and tunes them for the device at hand.",
    "The kitten takes a nap on the warm windowsill in the afternoon.",
    "Padding costs nothing where only the tokens that count are computed.",
)


def both(head: str = HEAD, **settings) -> tuple[nn.Module, nn.Module]:
    """Return an optimized model and transformers' with the same weights."""
    _, theirs = pair(head, **settings)
    return fastbert.optimize(deepcopy(theirs)), theirs


def check_same(outputs, expected):
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def sentences(minilm_path):
    """Return MiniLM as a SentenceTransformer, plain and optimized."""
    models = [SentenceTransformer(str(minilm_path), device="cpu") for _ in range(2)]
    return models[0], fastbert.optimize(models[1])


def test_keybert(sentences):
    keybert = pytest.importorskip("keybert")
    found = [
        keybert.KeyBERT(model=model).extract_keywords(" ".join(TEXTS), keyphrase_ngram_range=(1, 2), use_mmr=True)
        for model in sentences
    ]
    assert [word for word, _ in found[0]] == [word for word, _ in found[1]]
    assert [score for _, score in found[0]] == pytest.approx([score for _, score in found[1]], abs=2e-4)


@pytest.mark.parametrize("num_layers", [4, 6])
def test_bert_score(num_layers, minilm_path):
    """BERTScorer shortens the encoder's list of layers."""
    bert_score = pytest.importorskip("bert_score")
    found = []
    for optimized in (False, True):
        scorer = bert_score.BERTScorer(model_type=str(minilm_path), num_layers=num_layers, device="cpu", batch_size=2)
        if optimized:
            fastbert.optimize(scorer._model)
        found.append(scorer.score(list(TEXTS), [TEXTS[1], TEXTS[2], TEXTS[0]]))
    check_same(found[1], found[0])


@pytest.mark.parametrize("mask", [None, "right"])
@pytest.mark.parametrize("place", ["embeddings", "embeddings.word_embeddings", "encoder.layer.1", "pooler.dense"])
def test_captum_attributes_by_integrated_gradients(place, mask):
    attr = pytest.importorskip("captum.attr")
    inputs, attributions = batch(mask), []
    ids, keep = inputs["input_ids"], inputs.get("attention_mask")
    for model in both():
        forward = functools.partial(lambda model, ids, keep: model(ids, keep).logits.softmax(-1), model)
        lig = attr.LayerIntegratedGradients(forward, model.bert.get_submodule(place))
        found = lig.attribute(ids, torch.zeros_like(ids), target=1, additional_forward_args=(keep,), n_steps=5)
        found = found[0] if isinstance(found, tuple) else found
        attributions.append(found[keep.bool()] if mask and found.shape[:2] == keep.shape else found)
    check_same(*([x] for x in attributions))


def test_captum_leaves_features_out():
    attr = pytest.importorskip("captum.attr")
    inputs, found = batch(), []
    for model in both():
        ablation = attr.FeatureAblation(lambda ids, keep, model=model: model(ids, keep).logits)
        keep = inputs["attention_mask"]
        found.append(ablation.attribute(inputs["input_ids"], 3, target=0, additional_forward_args=(keep,)) * keep)
    check_same(*([x] for x in found))


def gradients(model: nn.Module, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model(**(inputs or inputs_for(HEAD, with_labels=True))).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mask", [None, "right"])
def test_gradients_of_every_sample(mask):
    """torch's expanded weights require the batch to be the first dimension."""
    found = []
    for model in both():
        model.bert.embeddings.requires_grad_(False)
        outputs = call_for_per_sample_grads(model, batch_size=4)(**batch(mask))
        outputs.logits.square().sum().backward()
        found.append([p.grad_sample for p in model.parameters() if p.requires_grad])
    check_same(*found)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("mask", [None, "right"])
def test_graphs_by_make_fx(mask, mode):
    ours, _ = both()
    inputs = batch(mask)
    names = list(inputs)
    graph = make_fx(
        lambda *values: ours(**dict(zip(names, values, strict=True))).logits,
        tracing_mode=mode, _allow_non_fake_inputs=True,
    )(*inputs.values())  # fmt: skip
    check_same([graph(*inputs.values())], [ours(**inputs).logits])


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("mask", [None, "right"])
def test_shapes_without_numbers(mask, record):
    ours, _ = both()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(record):
        assert ours(**{name: mode.from_tensor(x) for name, x in batch(mask).items()}).logits.shape == (4, 2)


def pruned(model):
    for layer in model.bert.encoder.layer:
        prune.l1_unstructured(layer.attention.self.value, "weight", amount=0.4)
    prune.random_structured(model.classifier, "weight", amount=0.5, dim=1)


def weight_normed(model):
    parametrizations.weight_norm(model.bert.encoder.layer[1].output.dense)
    parametrizations.spectral_norm(model.bert.pooler.dense)


def with_own_input_embeddings(model):
    class Prompted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + self.weight[0]

    torch.manual_seed(2)
    model.set_input_embeddings(Prompted(61, 48))


def with_more_tokens(model):
    torch.manual_seed(2)
    model.resize_token_embeddings(70)


@pytest.mark.parametrize("change", [pruned, weight_normed, with_own_input_embeddings, with_more_tokens])
def test_changed_weights_train_as_in_transformers(change):
    found = []
    for model in both():
        torch.manual_seed(0)
        change(model)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    check_same(found[0].values(), found[1].values())


def test_quantized_before_it_is_optimized():
    for head in HEADS:
        _, theirs = pair(head, tie_word_embeddings=False)
        quantized = torch.ao.quantization.quantize_dynamic(theirs, {nn.Linear}, dtype=torch.qint8)
        with torch.no_grad():
            expected = quantized(**inputs_for(head, None))
            outputs = fastbert.optimize(deepcopy(quantized))(**inputs_for(head, None))
        check_same(outputs.to_tuple(), expected.to_tuple())


def test_grounding_dino():
    """It passes masks of three dimensions, which separate the phrases of a text, and position_ids that start anew."""
    torch.manual_seed(0)
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64, embed_dim=12, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=tiny_config(vocab_size=2000), d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5, max_text_len=24,
        use_pretrained_backbone=False, use_timm_backbone=False, backbone=None,
    )  # fmt: skip
    theirs = transformers.GroundingDinoForObjectDetection(config).eval()
    ours = fastbert.optimize(deepcopy(theirs))
    inputs = {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "input_ids": torch.tensor([[101, 1037, 1012, 1037, 1998, 1012, 102], [101, 1037, 1012, 102, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
    }
    with torch.no_grad():
        check_same([ours(**inputs).pred_boxes], [theirs(**inputs).pred_boxes])


def test_code_that_divides_by_the_norm_of_padding_needs_a_mask_of_scores():
    """Hidden states at padding are zeros, so dividing by their norm gives NaN, as in torchmetrics' BERTScore."""
    ours, theirs = (model.bert for model in both())
    keep = MASKS["right"]

    def mean_direction(hidden):
        return (hidden / hidden.norm(dim=-1, keepdim=True) * keep[..., None]).sum(1)

    inputs = batch()
    assert mean_direction(ours(**inputs).last_hidden_state)[1].isnan().all()
    expected = mean_direction(theirs(**inputs).last_hidden_state)
    inputs["attention_mask"] = keep[:, None, None].bool()
    check_same([mean_direction(ours(**inputs).last_hidden_state)], [expected])
    assert inputs["attention_mask"].shape == (4, 1, 1, SEQ_LEN)
