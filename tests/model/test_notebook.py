"""The steps of a notebook about transformers' BertModel, with our import instead.

The cells run on MiniLM; the numbers that the notebook printed for bert-base-uncased are checked where that model is in
the local cache.
"""

from copy import deepcopy

import pytest
import torch
from transformers import AutoTokenizer

from fastbert import BertForSequenceClassification, BertModel

SENTENCES = ["Using Transformers is easy!", "Attention is indeed all you need :-)"]


@pytest.fixture(scope="module")
def notebook_batch(minilm_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    assert tokenizer.vocab_size == 30522
    return tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")


def test_the_batch(notebook_batch):
    assert notebook_batch["input_ids"][0].tolist() == [101, 2478, 19081, 2003, 3733, 999, 102, 0, 0, 0, 0]
    assert notebook_batch["attention_mask"].sum(1).tolist() == [7, 11]


def test_the_model_prints_like_transformers(minilm, transformers_minilm):
    assert "(0-5): 6 x BertLayer(" in repr(minilm)
    assert "(query): Linear(in_features=384, out_features=384, bias=True)" in repr(minilm)
    assert repr(minilm) == repr(transformers_minilm)


def test_the_outputs_and_their_three_ways_of_access(minilm, notebook_batch):
    bert_outputs = minilm(**notebook_batch)
    assert type(bert_outputs).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert list(bert_outputs.keys()) == ["last_hidden_state", "pooler_output"]
    assert bert_outputs["pooler_output"].shape == torch.Size([2, 384])
    assert bert_outputs.last_hidden_state.shape == torch.Size([2, 11, 384])
    assert bert_outputs[1].shape == torch.Size([2, 384])
    assert bert_outputs["pooler_output"].equal(bert_outputs[1])


def test_the_pooler_output_is_the_first_token_through_the_pooler(minilm, notebook_batch):
    bert_outputs = minilm(**notebook_batch)
    class_token_hidden_state = bert_outputs.last_hidden_state[:, 0, :]
    exp_pooler_output = minilm.pooler.activation(minilm.pooler.dense(class_token_hidden_state))
    assert bert_outputs.pooler_output.equal(exp_pooler_output)


def test_the_classifier(minilm_path, notebook_batch):
    classifier = BertForSequenceClassification.from_pretrained(minilm_path)
    assert classifier.config.problem_type is None
    classifier_outputs = classifier(**notebook_batch)
    assert type(classifier_outputs).__name__ == "SequenceClassifierOutput"
    assert list(classifier_outputs.keys()) == ["logits"]
    assert classifier_outputs.loss is None
    labeled_batch = deepcopy(notebook_batch)
    labeled_batch["labels"] = torch.tensor([1, 1])
    labeled_output = classifier(**labeled_batch)
    expected = torch.nn.functional.cross_entropy(labeled_output.logits, labeled_batch["labels"])
    assert labeled_output.loss.equal(expected)
    assert labeled_output.loss.grad_fn is not None
    assert classifier.config.problem_type == "single_label_classification"


def test_the_configs(minilm, minilm_path):
    classifier = BertForSequenceClassification.from_pretrained(minilm_path)
    for model in (minilm, classifier):
        assert '"hidden_size": 384' in repr(model.config)
        assert '"model_type": "bert"' in repr(model.config)
        assert model.config.num_labels == 2
        assert model.config.problem_type is None


def test_the_numbers_of_bert_base_uncased():
    try:
        model = BertModel.from_pretrained("bert-base-uncased", local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased", local_files_only=True)
    except OSError:
        pytest.skip("bert-base-uncased is not in the local cache")
    with torch.no_grad():
        outputs = model(**tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt"))
    shown = outputs.last_hidden_state[:, :3][..., [0, 1, 2, -3, -2, -1]]
    expected = [
        [
            [0.0245, 0.1256, 0.1062, -0.0637, 0.0344, 0.3892],
            [0.2678, 0.3460, -0.3190, -0.1258, 0.1899, 0.2213],
            [1.8175, -0.0306, -0.1497, -0.4804, -0.1272, 0.4366],
        ],
        [
            [0.0196, 0.0618, -0.1108, -0.0865, 0.1613, 0.5693],
            [0.3790, 0.5198, 0.1140, 0.2473, 0.2489, -0.2309],
            [-0.1873, 0.1067, 0.6274, -0.2091, -0.0990, 0.6994],
        ],
    ]
    torch.testing.assert_close(shown, torch.tensor(expected), atol=1e-4, rtol=0)
