"""sentence-transformers gives the same vectors, scores, saved files and losses with an optimized model."""

import gc
import pickle
import warnings
import weakref
from copy import deepcopy
from functools import partial, wraps
from itertools import pairwise

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from cases import saved
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn

import fastbert
from fastbert import ops, sentences
from fastbert.commands.texts import docstrings
from fastbert.fusion import class_name
from fastbert.ops import backend
from fastbert.sentences import HOST_MASK
from fastbert.testing import check_close

# The kernels run on a GPU, or on CPU tensors in Triton's interpreter.
KERNELS_ON = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
MODES = ("mean", "cls", "max", "weightedmean", "mean_sqrt_len_tokens", "lasttoken", ("cls", "mean"))
IN_THE_OP = ("mean", "cls")
ATOL = 1e-5


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of different lengths, not sorted by length, one of them empty."""
    found = [text[:200] for text in docstrings(21)] + ["", "Why?", " ".join(docstrings(20))[:600]]
    assert found != sorted(found, key=len)
    return found


def around(path: str, mode="mean", include_prompt=True, normalize=True, config=None, **options) -> SentenceTransformer:
    """Return a SentenceTransformer with the usual modules: Transformer, Pooling and, by default, Normalize."""
    transformer = Transformer(path, config_kwargs=config)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), mode, include_prompt)]
    return SentenceTransformer(modules=modules + [Normalize()] * normalize, device="cpu", **options)


def two(make, *args, **kwargs):
    """Return the model that `make` returns and a second one, optimized, with the same weights."""
    return make(*args, **kwargs), fastbert.optimize(make(*args, **kwargs))


@pytest.fixture(scope="module")
def minilms(minilm_path) -> tuple[SentenceTransformer, SentenceTransformer]:
    """all-MiniLM-L6-v2, plain and optimized. It pools by the mean and normalizes."""
    return two(SentenceTransformer, minilm_path, device="cpu")


@pytest.fixture(scope="module")
def minilm_vectors(minilms, texts) -> tuple[np.ndarray, np.ndarray]:
    plain, optimized = (model.encode(texts) for model in minilms)
    return plain, optimized


@pytest.fixture(scope="module")
def tinies(tiny_path) -> tuple[SentenceTransformer, SentenceTransformer]:
    return two(around, tiny_path)


def check_same(ours, theirs, atol: float = ATOL) -> None:
    """Check that types, shapes and names are equal and numbers close. Token embeddings are compared at kept tokens."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        kept = ours["attention_mask"].bool()
        for name in ours:
            at_tokens = name == "token_embeddings"
            check_same(*(x[name][kept] if at_tokens else x[name] for x in (ours, theirs)), atol)
    elif isinstance(ours, list):
        assert len(ours) == len(theirs) > 0
        for x, y in zip(ours, theirs, strict=True):
            check_same(x, y, atol)
    elif isinstance(ours, (np.ndarray, np.floating, Tensor)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert 0 not in ours.shape
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=atol, rtol=0)
    else:
        assert ours == theirs


def is_plain(obj: nn.Module) -> bool:
    """Return whether a model has no class or attribute from fastbert."""
    found = [x for module in obj.modules() for x in (module, *vars(module).values())]
    return not any(type(x).__module__.startswith("fastbert") for x in found)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_pooling_gives_the_same_vectors(mode, minilm_path, texts):
    plain, optimized = two(around, minilm_path, mode, normalize=False)
    expected = plain.encode(texts, batch_size=8)
    assert expected.shape == (len(texts), 768 if isinstance(mode, tuple) else 384)
    check_same(optimized.encode(texts, batch_size=8), expected)


OPTIONS = {
    "as it is": {},
    "tensor": {"convert_to_tensor": True},
    "list of tensors": {"convert_to_numpy": False},
    "normalized": {"normalize_embeddings": True},
    "truncated": {"truncate_dim": 100},
    "truncated, then normalized": {"truncate_dim": 100, "normalize_embeddings": True},
    "one by one": {"batch_size": 1},
    "prompt": {"prompt": "Represent this sentence: "},
    "token embeddings": {"output_value": "token_embeddings"},
    "everything": {"output_value": None},
    "cut to 16 tokens": {"processing_kwargs": {"text": {"max_length": 16}}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_encode_gives_the_same(name, minilms, texts):
    plain, optimized = minilms
    options = {"batch_size": 7} | OPTIONS[name]
    check_same(optimized.encode(texts[-12:], **options), plain.encode(texts[-12:], **options))


def test_one_text_no_text_and_other_kinds_of_lists(minilms, texts):
    plain, optimized = minilms
    column = pytest.importorskip("datasets").Dataset.from_dict({"x": texts[:3]})["x"]
    for given in (texts[0], [], tuple(texts[:3]), np.array(texts[:3]), column):
        ours, theirs = (model.encode(given) for model in (optimized, plain))
        assert type(ours) is type(theirs)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize("include_prompt", [True, False], ids=["pooled with its prompt", "pooled without it"])
@pytest.mark.parametrize("mode", ["mean", "cls", ("cls", "mean")], ids=str)
def test_prompts_by_default_by_name_and_by_hand(mode, include_prompt, minilm_path, texts):
    prompts = {"query": "query: ", "passage": "This is a passage to be found later: "}
    plain, optimized = two(around, minilm_path, mode, include_prompt, prompts=prompts, default_prompt_name="passage")
    unprompted = plain.encode(texts[:6], prompt="")
    for options in ({}, {"prompt_name": "query"}, {"prompt": "Any other: "}, {"prompt": ""}):
        expected = plain.encode(texts[:6], batch_size=4, **options)
        if options != {"prompt": ""}:
            assert np.abs(expected - unprompted).max() > 1e-3
        check_same(optimized.encode(texts[:6], batch_size=4, **options), expected)
    check_same(optimized.encode_query(texts[:6]), plain.encode_query(texts[:6]))
    check_same(optimized.encode_document(texts[:6]), plain.encode_document(texts[:6]))


@pytest.mark.parametrize("mode", ["mean", "cls", MODES[:-1]], ids=str)
def test_batches_laid_end_to_end_by_sentence_transformers(mode, tiny_path, texts, pooled):
    """sentence-transformers packs batches itself for flash attention, which needs a GPU, so it is set up by hand."""
    plain, optimized = two(around, tiny_path, mode, include_prompt=False)
    transformer = optimized[0]
    transformer.data_collator = transformers.DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    transformer._flatten_position_offset, transformer.can_flatten_inputs = 0, True
    for prompt in ("", "query: "):
        features = optimized.preprocess(texts[:9], prompt=prompt)
        assert features["input_ids"].shape[0] == 1
        assert "attention_mask" not in features
        with torch.no_grad():
            found = optimized.eval()(features)["sentence_embedding"]
        check_same(found, plain.encode(texts[:9], prompt=prompt, convert_to_tensor=True))
    # If no prompt is left out, only several modes at once are pooled by sentence-transformers.
    assert len(pooled.of("mean")) == (mode == "mean")


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_integer_codes_differ_only_where_a_rounding_crosses_a_step(precision, minilms, minilm_vectors, texts):
    theirs, ours = (model.encode(texts, precision=precision) for model in minilms)
    vectors, optimized_vectors = minilm_vectors
    vectors = vectors.astype(np.float64)
    error = np.abs(optimized_vectors - vectors).max(0)
    assert error.max() < ATOL
    assert ours.dtype == theirs.dtype == precision
    # A code is the value's position between the minimum and maximum of its column, in 255 steps. Value, minimum and
    # maximum each differ by at most the column's error, and float32 rounds the steps.
    least, greatest = vectors.min(0), vectors.max(0)
    steps = (vectors - least) / (greatest - least) * 255
    slack = 4 * error / ((greatest - least) / 255) + 255 * 2**-22
    assert slack.max() < 0.02
    flipped = ours != theirs
    assert (np.abs(ours.astype(int) - theirs)[flipped] == 1).all()
    assert (np.abs(steps - steps.round()) <= slack)[flipped].all()
    # A column's maximum is exactly on a step. Few other values are near one.
    assert flipped[vectors < greatest].mean() < 0.001


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits_differ_only_where_a_value_is_within_rounding_of_zero(precision, minilms, minilm_vectors, texts):
    codes = [model.encode(texts, precision=precision) for model in minilms]
    assert {x.dtype for x in codes} == {np.dtype("int8" if precision == "binary" else "uint8")}
    offset = 128 if precision == "binary" else 0
    theirs, ours = (np.unpackbits((x.astype(int) + offset).astype(np.uint8), axis=1) for x in codes)
    vectors, optimized_vectors = minilm_vectors
    error = np.abs(optimized_vectors - vectors).max(0)
    assert (theirs == (vectors > 0)).all()
    assert (np.abs(vectors) <= error)[ours != theirs].all()
    assert (ours != theirs).mean() < 1e-4


@pytest.mark.parametrize("function", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities(function, minilm_path, texts):
    plain, optimized = two(SentenceTransformer, minilm_path, device="cpu", similarity_fn_name=function)
    vectors = [[model.encode(part, convert_to_tensor=True) for part in (texts[:6], texts[6:12])] for model in
               (optimized, plain)]  # fmt: skip
    # The Manhattan distance adds the errors of 384 values.
    atol = 1e-4 if function == "manhattan" else ATOL
    check_same(optimized.similarity(*vectors[0]), plain.similarity(*vectors[1]), atol)
    check_same(optimized.similarity_pairwise(*vectors[0]), plain.similarity_pairwise(*vectors[1]), atol)


@pytest.mark.parametrize("batch_size", [1, 3, 24])
def test_a_vector_does_not_depend_on_batch_size_or_order(batch_size, minilms, minilm_vectors, texts):
    assert len(texts) == 24
    order = np.random.default_rng(batch_size).permutation(24)
    found = minilms[1].encode([texts[i] for i in order], batch_size=batch_size)
    check_same(found[np.argsort(order)], minilm_vectors[0])
    np.testing.assert_allclose(found[np.argsort(order)], minilm_vectors[1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("device", KERNELS_ON)
@pytest.mark.parametrize("mode", IN_THE_OP)
def test_in_the_kernels_a_vector_has_the_same_bits_in_any_batch_and_order(mode, device, tiny_path, launches):
    plain, optimized = two(around, tiny_path, mode, config={"num_hidden_layers": 1})
    short = ["Why?", "", "The cat sits outside.", "A man plays the guitar, and nobody listens.", "cat", "No: yes."]
    expected = plain.encode(short)
    optimized.to(device)
    with fastbert.backend("triton"):
        vectors = optimized.encode(short, batch_size=len(short))
        launches_of_pooling = launches.count("_pool_kernel")
        for batch_size in (1, 3):
            assert np.array_equal(optimized.encode(short, batch_size=batch_size), vectors)
        order = [3, 0, 5, 1, 4, 2]
        assert np.array_equal(optimized.encode([short[i] for i in order], batch_size=3), vectors[order])
    assert launches_of_pooling == 3  # the pooler's first tokens, the pooling, the normalizing
    np.testing.assert_allclose(vectors, expected, atol=ATOL, rtol=0)


def test_processes_of_a_pool_of_ones_own_and_of_a_list_of_devices(tinies, texts):
    plain, optimized = tinies
    expected = plain.encode(texts)
    pool = optimized.start_multi_process_pool(["cpu"])
    try:
        check_same(optimized.encode(texts, device=["cpu", "cpu"], chunk_size=16), expected)
        check_same(optimized.encode(texts, pool=pool, chunk_size=16, batch_size=5), expected)
    finally:
        optimized.stop_multi_process_pool(pool)
    check_same(optimized.encode(texts), expected)


def test_a_sparse_encoder_gives_the_same_vectors(tmp_path, tokenizer, texts):
    path = saved(transformers.BertForMaskedLM, tmp_path, tokenizer)

    def make():
        return SparseEncoder(modules=[Transformer(path, transformer_task="fill-mask"), SpladePooling()], device="cpu")

    plain, optimized = two(make)
    ours, theirs = (model.encode(texts[:6], batch_size=4).to_dense() for model in (optimized, plain))
    assert theirs.any()
    check_same(ours, theirs)


class Pooled(list):
    """The calls of `ops.pool`: mode, normalize, input and output."""

    def of(self, mode: str, normalize: bool = False) -> list[tuple[Tensor, Tensor]]:
        return [(taken, given) for m, n, taken, given in self if (m, n) == (mode, normalize)]


@pytest.fixture
def pooled(monkeypatch) -> Pooled:
    calls, pool = Pooled(), ops.pool

    def counted(hidden, cu_seqlens, mode, normalize=False, indices=None):
        given = pool(hidden, cu_seqlens, mode, normalize, indices)
        calls.append((mode, normalize, hidden, given))
        return given

    monkeypatch.setattr(ops, "pool", counted)
    return calls


@pytest.mark.parametrize("filled", [True, False], ids=["full", "ragged"])
@pytest.mark.parametrize(("mode", "name"), [("mean", "mean"), ("cls", "first")])
def test_inference_pools_and_normalizes_in_the_op(mode, name, filled, tiny_path, texts, pooled):
    model = fastbert.optimize(around(tiny_path, mode)).eval()
    features = model.preprocess(texts[:1] * 4 if filled else texts[:4])
    assert features["attention_mask"].all() == filled
    with torch.no_grad():
        features = model(features)
    token_embeddings, vectors = features["token_embeddings"], features["sentence_embedding"]
    (taken, given), (to_normalize, normalized) = pooled.of(name)[-1], pooled.of("first", normalize=True)[-1]
    assert taken.data_ptr() == token_embeddings.data_ptr()
    assert to_normalize is given
    assert normalized is vectors
    assert given is not vectors
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))


def test_encode_pools_once_a_batch(tiny_path, texts, pooled):
    model = fastbert.optimize(around(tiny_path))
    model.encode(texts[:1] * 10, batch_size=4)
    assert len(pooled.of("mean")) == len(pooled.of("first", normalize=True)) == 3


@pytest.mark.parametrize("mode", IN_THE_OP)
def test_where_gradients_are_recorded_sentence_transformers_pools(mode, tiny_path, texts, pooled):
    plain, optimized = two(around, tiny_path, mode)
    gradients = []
    for model in (optimized, plain):
        features = model.eval()(model.preprocess(texts[:4]))
        vectors = features["sentence_embedding"]
        assert not any(given is vectors for *_, given in pooled)
        assert not pooled.of("mean")
        assert not pooled.of("first", normalize=True)
        (vectors * torch.arange(48)).sum().backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 30
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in IN_THE_OP], ids=str)
def test_other_modes_are_pooled_by_sentence_transformers_and_normalized_in_the_op(mode, tiny_path, texts, pooled):
    fastbert.optimize(around(tiny_path, mode)).encode(texts[:4])
    assert len(pooled) == 2
    assert len(pooled.of("first", normalize=True)) == len(pooled.of("first")) == 1  # the call of BERT's own pooler


def test_modes_may_be_set_afterwards_and_in_a_list(tiny_path, texts, pooled):
    plain, optimized = two(around, tiny_path, "max")
    for model in (plain, optimized):
        model[1].pooling_mode = ["cls", "mean"]
    check_same(optimized.encode(texts[:4]), plain.encode(texts[:4]))
    assert {row.op for row in fastbert.explain(optimized) if row.block == "1"} == set()
    assert not pooled.of("mean")
    for model in (plain, optimized):
        model[1].pooling_mode = "mean"
    check_same(optimized.encode(texts[:4]), plain.encode(texts[:4]))
    assert {row.op for row in fastbert.explain(optimized) if row.block == "1"} == {"pool"}
    assert len(pooled.of("mean")) == 1


def test_the_prompt_is_left_out_by_sentence_transformers(tiny_path, texts, pooled):
    model = fastbert.optimize(around(tiny_path, include_prompt=False))
    model.encode(texts[:4], prompt="query: ")
    assert not pooled.of("mean")
    model.encode(texts[:4])
    assert len(pooled.of("mean")) == 1


def test_weights_of_tokens_are_left_to_sentence_transformers(tiny_path, texts, pooled):
    plain, optimized = two(around, tiny_path, normalize=False)
    vectors = []
    for model in (plain.eval(), optimized.eval()):
        with torch.no_grad():
            features = model.preprocess(texts[:4]) | {"token_weights_sum": torch.arange(1.0, 5.0)}
            vectors.append(model(features)["sentence_embedding"])
    assert not pooled.of("mean")
    check_same(*vectors)


def test_explain_names_the_pooling(tiny_path):
    model = around(tiny_path)
    fastbert.optimize(model)
    rows = [row for row in fastbert.explain(model) if row.op == "pool"]
    assert [(row.block, row.backend) for row in rows] == [("1", "eager"), ("2", "eager")]
    by_maximum = fastbert.explain(fastbert.optimize(around(tiny_path, "max")))
    assert [row.block for row in by_maximum if row.op == "pool"] == ["2"]
    fastbert.restore(model)
    with pytest.raises(TypeError, match="contains no fastbert encoder: convert its BERT"):
        fastbert.explain(model)


def moved(batch: dict, device=None) -> dict:
    """Return a batch with copies of its tensors, as `batch_to_device` returns for another device."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


@pytest.fixture
def on_a_device(monkeypatch):
    """Simulate models on a GPU: their device is cuda, and moving a batch copies its tensors."""
    monkeypatch.setattr(transformers.PreTrainedModel, "device", property(lambda model: torch.device("cuda", 0)))
    for package in (sentence_transformers.sentence_transformer, sentence_transformers.cross_encoder):
        monkeypatch.setattr(package.model, "batch_to_device", moved)


@pytest.fixture
def masks_given(monkeypatch) -> list[Tensor]:
    """The attention masks that sentence-transformers passes to our models."""
    masks = []
    for model_class in (fastbert.BertModel, fastbert.BertForSequenceClassification):

        @wraps(model_class.forward)
        def forward(model, *args, plain=model_class.forward, **kwargs):
            masks.extend([kwargs["attention_mask"]] if "attention_mask" in kwargs and "input_ids" in kwargs else [])
            return plain(model, *args, **kwargs)

        monkeypatch.setattr(model_class, "forward", forward)
    return masks


def preprocessed(model, texts) -> dict:
    """Return the features that `encode` and `predict` make of texts."""
    with sentences.keep_host_masks(), torch.inference_mode():
        return model.preprocess(texts)


def test_a_model_on_a_device_is_called_with_the_mask_on_the_host(tiny_path, texts, on_a_device, masks_given):
    plain, optimized = (model.eval() for model in two(around, tiny_path))
    features = preprocessed(optimized, texts[:5])
    on_host = features[HOST_MASK].array
    assert type(on_host) is np.ndarray
    assert np.array_equal(on_host, features["attention_mask"])
    assert not on_host.all()
    batch = moved(features)
    with torch.no_grad():
        outputs = optimized(batch)
        expected = plain(moved(plain.preprocess(texts[:5])))
    (given,) = masks_given
    assert given.data_ptr() == on_host.ctypes.data
    assert given.device.type == "cpu"
    assert batch["attention_mask"].data_ptr() != given.data_ptr()
    assert outputs["attention_mask"].data_ptr() == batch["attention_mask"].data_ptr()
    assert sorted(outputs) == sorted(expected)
    check_same(outputs["sentence_embedding"], expected["sentence_embedding"])


@pytest.mark.parametrize("output_value", ["sentence_embedding", None, "token_embeddings"])
def test_nothing_of_the_mask_on_the_host_is_seen_outside(output_value, tiny_path, texts, on_a_device, masks_given):
    plain, optimized = two(around, tiny_path)
    optimized.register_forward_hook(lambda *given: None)  # the hook keeps texts from being packed
    options = {"output_value": output_value, "batch_size": 3, "device": "cpu"}
    check_same(*(model.encode(texts[:7], **options) for model in (optimized, plain)))
    assert len(masks_given) == 3


@pytest.mark.parametrize(
    "cut", [lambda x: x[:2], lambda x: x[:, :9], lambda x: torch.cat([x, x])], ids=["texts", "tokens", "twice"]
)
def test_a_batch_of_another_shape_goes_by_the_mask_that_it_has(cut, tiny_path, texts, on_a_device, masks_given):
    plain, optimized = (model.eval() for model in two(around, tiny_path))
    batches = [
        {name: cut(x) if isinstance(x, Tensor) else x for name, x in preprocessed(model, texts[:4]).items()}
        for model in (optimized, plain)
    ]
    assert HOST_MASK in batches[0]
    with torch.no_grad():
        ours, theirs = optimized(batches[0]), plain(batches[1])
    (given,) = masks_given
    assert given is batches[0]["attention_mask"]
    assert HOST_MASK not in ours
    check_same(ours["sentence_embedding"], theirs["sentence_embedding"])


def test_a_mask_in_the_call_itself_goes_before_the_one_on_the_host(tiny_path, texts, on_a_device, masks_given):
    transformer = fastbert.optimize(around(tiny_path)).eval()[0]
    features = preprocessed(transformer, texts[:3])
    other = features["attention_mask"].clone()
    other[:, 4:] = 0
    with torch.no_grad():
        hidden_states = transformer(features, attention_mask=other)["token_embeddings"]
    assert masks_given[0] is other
    assert not hidden_states[:, 4:].any()


def test_no_mask_is_carried_for_a_model_on_the_cpu_or_one_that_is_restored(tiny_path, texts, monkeypatch):
    model = fastbert.optimize(around(tiny_path))
    assert HOST_MASK not in preprocessed(model, texts[:3])
    monkeypatch.setattr(transformers.PreTrainedModel, "device", property(lambda model: torch.device("cuda", 0)))
    assert HOST_MASK in preprocessed(model, texts[:3])
    assert HOST_MASK not in preprocessed(fastbert.restore(model), texts[:3])


def test_no_host_mask_where_user_code_may_change_the_batch(tiny_path, texts, on_a_device, masks_given):
    """The shape alone cannot tell that texts were reordered or the mask was changed."""
    plain, optimized = (model.eval() for model in two(around, tiny_path))
    found = []
    for model in (optimized, plain):
        with torch.inference_mode():
            batch = model.preprocess(texts[:4])
            batch = {name: x.flip(0) if isinstance(x, Tensor) else x for name, x in batch.items()}
            batch["attention_mask"][:, 5:] = 0
            found.append(model(batch)["sentence_embedding"])
    assert len(masks_given) == 1
    assert not masks_given[0][:, 5:].any()
    check_same(*found)


def test_no_mask_on_the_host_is_an_input_of_a_compiled_model(tiny_path, texts, on_a_device, masks_given):
    optimized = fastbert.optimize(around(tiny_path)).eval()
    features = moved(preprocessed(optimized, texts[:4]))
    optimized[0].model.compile(backend="eager")
    with torch.no_grad():
        optimized(features)
    assert [mask is features["attention_mask"] for mask in masks_given] == [True]


def test_a_module_that_weighs_tokens_by_the_mask_keeps_the_pooling_after_it(tiny_path, texts, pooled):
    class Weights(nn.Module):
        def forward(self, features):
            features["attention_mask"] = features["attention_mask"] * 3
            features["attention_mask"][:, 1] = 1
            return features

    plain, optimized = two(lambda: SentenceTransformer(modules=[around(tiny_path)[0], Weights(), Pooling(48, "mean")]))
    pooled.clear()
    check_same(*(model.encode(texts[:5]) for model in (optimized, plain)))
    assert pooled.of("mean") == []


class OwnEncoder(transformers.BertPreTrainedModel):
    """A user's model with a BertModel inside."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **kwargs):
        return self.bert(input_ids, attention_mask, token_type_ids, return_dict=True)


@pytest.mark.parametrize("model_class", [transformers.BertModel, OwnEncoder])
@pytest.mark.parametrize("attend", [False, True])
def test_expansion_tokens_of_a_multi_vector_encoder_are_scored(attend, model_class, minilm_path):
    """With attend=False the mask leaves them out, but their hidden states are scored all the same."""
    if not hasattr(sentence_transformers, "MultiVectorEncoder"):
        pytest.skip(f"sentence-transformers {sentence_transformers.__version__} has no MultiVectorEncoder")

    def make():
        torch.manual_seed(0)  # for the weights of its new projection
        encoder = sentence_transformers.MultiVectorEncoder(minilm_path, device="cpu")
        encoder[0].model = model_class.from_pretrained(minilm_path)
        encoder[0].query_expansion = {"strategy": "fixed", "attend": attend, "length": 32}
        return encoder

    plain, optimized = two(make)
    for encode in ("encode_query", "encode_document"):
        # Queries are expanded to 32 tokens, which is more than these have.
        ours, theirs = (getattr(model, encode)(["Why?", "The cat sits.", ""]) for model in (optimized, plain))
        for vectors, expected in zip(ours, theirs, strict=True):
            assert vectors.any(-1).all()
            check_same(vectors, expected)


@pytest.mark.parametrize("device", KERNELS_ON)
def test_vectors_wider_than_the_kernels_rows_are_normalized_in_plain_pytorch(tiny_path, device, monkeypatch):
    normalize = Normalize()
    fastbert.optimize(nn.ModuleList([around(tiny_path), normalize]))
    vectors = torch.randn(2, 16385, device=device)
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    with torch.no_grad(), fastbert.backend("auto"):
        found = normalize({"sentence_embedding": vectors})["sentence_embedding"]
    check_same(found, nn.functional.normalize(vectors))
    with torch.no_grad(), fastbert.backend("triton"), pytest.raises(RuntimeError, match="rows of 16385 elements"):
        normalize({"sentence_embedding": vectors})


class OwnClassifier(transformers.BertForSequenceClassification):
    """A user's class, which may use the mask on the device of its own tensors."""


def test_no_host_mask_for_other_classes(cross_paths, texts, on_a_device):
    pairs = list(zip(texts[:4], texts[4:8], strict=True))

    def make():
        encoder = CrossEncoder(cross_paths[1], device="cpu")
        encoder[0].model = OwnClassifier.from_pretrained(cross_paths[1])
        return encoder

    plain, optimized = two(make)
    assert type(optimized[0].model) is OwnClassifier
    assert isinstance(optimized[0].model.bert, fastbert.BertModel)
    assert HOST_MASK not in preprocessed(optimized, pairs)
    assert HOST_MASK in preprocessed(fastbert.optimize(CrossEncoder(cross_paths[1], device="cpu")), pairs)
    check_same(*(encoder.predict(pairs, device="cpu") for encoder in (optimized, plain)))


def test_features_that_went_through_may_go_through_again(tiny_path, texts):
    """Some losses pass the same features to a second model."""
    plain, optimized = (model.eval() for model in two(around, tiny_path))
    with torch.no_grad():
        ours, theirs = (model(model(model.preprocess(texts[:4]))) for model in (optimized, plain))
        assert sorted(ours) == sorted(theirs)
        check_same(ours["sentence_embedding"], theirs["sentence_embedding"])
        other = fastbert.optimize(around(tiny_path, "cls")).eval()
        check_same(other(ours)["sentence_embedding"], fastbert.restore(other)(theirs)["sentence_embedding"])


def test_a_replica_of_data_parallel_computes_with_its_own_weights(tiny_path, texts):
    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1.5)
        for name, child in module._modules.items():
            replica._modules[name] = child and replicate(child)
        return replica

    plain, optimized = (model.eval() for model in two(around, tiny_path, "cls"))
    with torch.no_grad():
        before = optimized(optimized.preprocess(texts[:4]))["sentence_embedding"]
        ours, theirs = (replicate(x)(x.preprocess(texts[:4]))["sentence_embedding"] for x in (optimized, plain))
        assert (theirs - before).abs().max() > 1e-2
        check_same(ours, theirs)
        check_same(optimized(optimized.preprocess(texts[:4]))["sentence_embedding"], before)


def test_a_compiled_model_is_one_graph_without_warnings(tiny_path, texts, on_a_device):
    model = fastbert.optimize(around(tiny_path))
    vectors = model.encode(texts[:9], device="cpu")
    model.compile(backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same(model.encode(texts[:9], batch_size=4, device="cpu"), vectors)


def files_of(path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_saved_sentence_transformer_has_the_same_bytes(dtype, tiny_path, texts, tmp_path):
    prompts = {"query": "query: "}
    plain = around(tiny_path, ("cls", "mean"), prompts=prompts)
    optimized = fastbert.optimize(around(tiny_path, ("cls", "mean"), prompts=prompts), dtype)
    plain.to(dtype)
    plain.save_pretrained(str(tmp_path / "plain"))  # before `encode`, which changes the truncation of the tokenizer
    expected = plain.encode(texts[:4], convert_to_tensor=True)
    optimized.encode(texts[:4])
    optimized.save_pretrained(str(tmp_path / "optimized"))
    files, expected_files = files_of(tmp_path / "optimized"), files_of(tmp_path / "plain")
    assert {"model.safetensors", "config.json", "modules.json", "README.md", "1_Pooling/config.json"} <= files.keys()
    assert files.keys() == expected_files.keys()
    # The model card shows similarities with four digits. bfloat16 has three.
    shown = {"README.md"} if dtype == torch.bfloat16 else set()
    assert {name for name in files if files[name] != expected_files[name]} <= shown
    loaded = SentenceTransformer(str(tmp_path / "optimized"), device="cpu")
    assert type(loaded[0].model) is transformers.BertModel
    assert is_plain(loaded)
    assert torch.equal(loaded.encode(texts[:4], convert_to_tensor=True), expected)
    fastbert.restore(optimized)
    if dtype is None:
        optimized.save_pretrained(str(tmp_path / "restored"))
        assert files_of(tmp_path / "restored") == files


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_saved_cross_encoder_has_the_same_bytes(num_labels, cross_paths, texts, tmp_path):
    pairs = list(zip(texts[:4], texts[4:8], strict=True))
    plain, optimized = two(CrossEncoder, cross_paths[num_labels], device="cpu")
    plain.save_pretrained(str(tmp_path / "plain"))  # before `predict`, which changes the truncation of the tokenizer
    expected = plain.predict(pairs)
    optimized.predict(pairs)
    optimized.save_pretrained(str(tmp_path / "optimized"))
    files = files_of(tmp_path / "optimized")
    assert files == files_of(tmp_path / "plain")
    assert {"model.safetensors", "config.json"} <= files.keys()
    loaded = CrossEncoder(str(tmp_path / "optimized"), device="cpu")
    assert type(loaded[0].model) is transformers.BertForSequenceClassification
    assert np.array_equal(loaded.predict(pairs), expected)


def state_of(model: nn.Module) -> list:
    """Return identity, class and attribute names of every module, and identity, address and dtype of every tensor."""
    modules = [(name, id(x), type(x), list(vars(x))) for name, x in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(x), x.data_ptr(), x.dtype) for name, x in (*model.named_parameters(), *model.named_buffers())]
    return [modules, tensors]


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def check_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_restore_leaves_nothing_behind(minilm_path, texts):
    model = SentenceTransformer(minilm_path, device="cpu")
    before, bits, vectors = state_of(model), bits_of(model), model.encode(texts[:12])
    assert is_plain(model)
    assert fastbert.optimize(model) is model
    modules, tensors = state_of(model)
    assert tensors == before[1]
    assert modules != before[0]
    assert not is_plain(model)
    assert not np.array_equal(model.encode(texts[:12]), vectors)
    assert fastbert.restore(model) is model
    assert state_of(model) == before
    assert is_plain(model)
    check_same_bits(bits_of(model), bits)
    assert np.array_equal(model.encode(texts[:12]), vectors)


def test_doing_it_twice_is_doing_it_once(tiny_path, texts):
    model = around(tiny_path)
    before = state_of(model)
    fastbert.restore(model)
    assert state_of(model) == before
    once = state_of(fastbert.optimize(model))
    vectors = model.encode(texts[:8])
    assert state_of(fastbert.optimize(model)) == once != before
    assert np.array_equal(model.encode(texts[:8]), vectors)
    assert state_of(fastbert.restore(model)) == before
    assert state_of(fastbert.restore(model)) == before


def test_methods_patched_by_the_user_stay(tiny_path, texts):
    model = around(tiny_path)
    calls = []

    def forward(features, **kwargs):
        calls.append(features)
        return Pooling.forward(model[1], features, **kwargs)

    model[1].forward = forward
    fastbert.optimize(model).encode(texts[:3])
    assert len(calls) == 1
    assert model[1].forward is forward
    fastbert.restore(model).encode(texts[:3])
    assert len(calls) == 2
    assert model[1].forward is forward


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"])
def test_a_copy_is_optimized_and_restored_by_itself(copied, tiny_path, texts):
    plain, optimized = two(around, tiny_path)
    vectors, expected = optimized.encode(texts[:8]), plain.encode(texts[:8])
    state = state_of(optimized)
    copy = copied(optimized)
    assert np.array_equal(copy.encode(texts[:8]), vectors)
    assert state_of(optimized) == state
    assert [(name, kind, names) for name, _, kind, names in state_of(copy)[0]] == [
        (name, kind, names) for name, _, kind, names in state[0]
    ]
    # A patched method still bound to the first model would use the first model's weights.
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(1.5)
    changed = copy.encode(texts[:8])
    assert np.abs(changed - vectors).max() > 1e-2
    assert np.array_equal(optimized.encode(texts[:8]), vectors)
    plain.load_state_dict(copy.state_dict())
    check_same(changed, plain.encode(texts[:8]))
    assert is_plain(fastbert.restore(copy))
    assert np.array_equal(fastbert.restore(optimized).encode(texts[:8]), expected)


@pytest.mark.parametrize("mode", IN_THE_OP)
def test_a_cast_is_as_close_as_sentence_transformers_and_is_taken_back(mode, minilm_path, texts):
    plain, model = around(minilm_path, mode), around(minilm_path, mode)
    state, bits = state_of(model), bits_of(model)
    encode = partial(SentenceTransformer.encode, inputs=texts[:12], convert_to_tensor=True)
    expected = encode(plain)
    fastbert.optimize(model, dtype=torch.bfloat16)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert [(name, same) for name, same, *_ in state_of(model)[1]] == [(name, same) for name, same, *_ in state[1]]
    check_close("vectors", encode(model), encode(plain.bfloat16()), expected.double())
    fastbert.restore(model)
    assert is_plain(model)
    assert state_of(model)[0] == state[0]
    check_same_bits(bits_of(model), bits)
    assert torch.equal(encode(model), expected)


def test_values_trained_in_bfloat16_are_kept(tiny_path, texts):
    model = around(tiny_path, normalize=False)
    before = bits_of(model)
    fastbert.optimize(model, dtype=torch.bfloat16)
    frozen = "0.model.embeddings.word_embeddings.weight"
    model.get_parameter(frozen).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(model.train().preprocess(texts[:4]))["sentence_embedding"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = bits_of(model)
    after = bits_of(fastbert.restore(model))
    learned = {name for name in trained if not torch.equal(trained[name], before[name].bfloat16())}
    assert len(learned) > 20
    # Its values are not exact in bfloat16, so rounding would show.
    assert not torch.equal(before[frozen], before[frozen].bfloat16().float())
    for name in after:
        assert after[name].dtype == torch.float32
        unchanged = trained[name] == before[name].bfloat16()
        assert unchanged.all() == (name not in learned)
        assert torch.equal(after[name], torch.where(unchanged, before[name], trained[name].float()))
    assert frozen not in learned
    again = around(tiny_path, normalize=False)
    again.load_state_dict(after)
    assert np.array_equal(model.encode(texts[:4]), again.encode(texts[:4]))


@pytest.mark.parametrize("restored", [False, True], ids=["optimized", "restored"])
@pytest.mark.parametrize("kind", [SentenceTransformer, CrossEncoder])
def test_reference_counting_alone_frees_a_model(kind, restored, tiny_path, cross_paths, texts):
    gc.collect()
    gc.disable()
    try:
        if kind is SentenceTransformer:
            model = fastbert.optimize(around(tiny_path))
            model.encode(texts[:2])
        else:
            model = fastbert.optimize(CrossEncoder(cross_paths[1], device="cpu"))
            model.predict([texts[:2]])
        if restored:
            fastbert.restore(model)
        model.model_card_data.model = None  # a reference cycle of sentence-transformers
        alive = [weakref.ref(module) for module in model.modules()]
        assert len(alive) > 20
        del model
        assert not any(reference() for reference in alive)
    finally:
        gc.enable()


PREDICTIONS = {
    "as it is": {},
    "logits": {"activation_fn": nn.Identity()},
    "sigmoid": {"activation_fn": nn.Sigmoid()},
    "tanh": {"activation_fn": nn.Tanh()},
    "softmax": {"apply_softmax": True},
    "tensor": {"convert_to_tensor": True},
    "list of tensors": {"convert_to_numpy": False},
    "one by one": {"batch_size": 1},
    "prompt": {"prompt": "Is it an answer? "},
}


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_every_option_of_predict_gives_the_same_scores(num_labels, name, cross_paths, texts):
    plain, optimized = two(CrossEncoder, cross_paths[num_labels], device="cpu")
    pairs = list(zip(texts[:8], texts[8:16], strict=True))
    options = {"batch_size": 3} | PREDICTIONS[name]
    ours, theirs = (encoder.predict(pairs, **options) for encoder in (optimized, plain))
    check_same(ours, theirs)
    assert np.stack(theirs).std(0).min() > 1e-3
    one = [encoder.predict(pairs[0], **options) for encoder in (optimized, plain)]
    check_same(*one)


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "return_documents": True}, {"activation_fn": nn.Identity()}])
def test_documents_are_ranked_alike(options, cross_paths, texts):
    plain, optimized = two(CrossEncoder, cross_paths[1], device="cpu")
    documents = [text for text in texts[1:20] if text]
    ours, theirs = (encoder.rank(texts[0], documents, batch_size=4, **options) for encoder in (optimized, plain))
    scores = [row.pop("score") for row in theirs]
    assert min(high - low for high, low in pairwise(scores)) > 2 * ATOL
    np.testing.assert_allclose([row.pop("score") for row in ours], scores, atol=ATOL, rtol=0)
    assert ours == theirs
    assert len(theirs) == options.get("top_k", len(documents))


def test_a_cross_encoder_comes_back_to_the_bit(cross_paths, texts):
    model = CrossEncoder(cross_paths[3], device="cpu")
    pairs = list(zip(texts[:6], texts[6:12], strict=True))
    state, scores = state_of(model), model.predict(pairs)
    fastbert.optimize(model)
    assert type(model[0].model) is fastbert.BertForSequenceClassification
    assert state_of(model)[1] == state[1]
    check_same(model.predict(pairs), scores)
    assert state_of(fastbert.restore(model)) == state
    assert np.array_equal(model.predict(pairs), scores)


def test_a_cross_encoder_on_a_device_is_called_with_the_mask_on_the_host(cross_paths, texts, on_a_device, masks_given):
    plain, optimized = two(CrossEncoder, cross_paths[1], device="cpu")
    pairs = list(zip(texts[:6], texts[6:12], strict=True))
    optimized.register_forward_hook(lambda *given: None)  # the hook keeps texts from being packed
    on_host = preprocessed(optimized, pairs)[HOST_MASK].array
    check_same(*(encoder.predict(pairs, device="cpu") for encoder in (optimized, plain)))
    (given,) = masks_given
    # `predict` sorts pairs by length, longest first.
    assert given.shape == on_host.shape
    assert given.sum(1).tolist() == sorted(on_host.sum(1), reverse=True)


def pairs_of_docstrings(count: int, length: int = 150) -> dict[str, list[str]]:
    """Return pairs of a docstring's first line and the text after it."""
    split = [text.partition("\n\n") for text in docstrings(6 * count)]
    rows = [(first, rest[:length]) for first, _, rest in split if len(rest) > 20][:count]
    assert len(rows) == count
    return {"first": [first for first, _ in rows], "rest": [rest for _, rest in rows]}


def fine_tune(model: SentenceTransformer, columns: dict, loss, path, steps: int = 8, learning_rate=2e-3) -> list[float]:
    """Train with 8 rows per step. Return the loss of each step."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(path), max_steps=steps, per_device_train_batch_size=8, learning_rate=learning_rate,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    dataset = pytest.importorskip("datasets").Dataset.from_dict(columns)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss(model))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == steps
    return losses


def dropout(p: float) -> dict[str, float]:
    return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}


def check_trained(optimized: SentenceTransformer, path: str, before: dict[str, Tensor]) -> None:
    """Check that all weights but the pooler's, which has no gradient, changed, and that they work without fastbert."""
    texts = docstrings(8)
    for name, x in optimized.state_dict().items():
        assert torch.equal(x, before[name]) == name.startswith("0.model.pooler")
    vectors = optimized.encode(texts)
    again = around(path)
    again.max_seq_length = optimized.max_seq_length
    again.load_state_dict(optimized.state_dict())
    check_same(vectors, again.encode(texts))
    assert np.array_equal(fastbert.restore(optimized).encode(texts), again.encode(texts))


@pytest.mark.parametrize("loss", [MultipleNegativesRankingLoss, CosineSimilarityLoss])
def test_fine_tuning_without_dropout_has_the_same_loss_at_every_step(loss, tiny_path, tmp_path):
    plain, optimized = two(around, tiny_path, config=dropout(0.0))
    before = bits_of(plain)
    columns = pairs_of_docstrings(64)
    if loss is CosineSimilarityLoss:
        columns["label"] = [float(i % 2) for i in range(64)]
    ours, theirs = (fine_tune(model, columns, loss, tmp_path) for model in (optimized, plain))
    assert max(theirs) - min(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    check_trained(optimized, tiny_path, before)


def test_fine_tuning_of_the_real_model_has_the_same_loss_at_every_step(minilm_path, tmp_path):
    plain, optimized = two(around, minilm_path, config=dropout(0.0))
    before = bits_of(plain)
    columns = pairs_of_docstrings(32, 100)
    losses = []
    for model in (optimized, plain):
        model.max_seq_length = 32
        losses.append(fine_tune(model, columns, MultipleNegativesRankingLoss, tmp_path, steps=4, learning_rate=5e-5))
    np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)
    check_trained(optimized, minilm_path, before)


def test_on_texts_of_one_length_dropout_drops_the_same_at_every_step(tiny_path, tmp_path):
    """Without padding, packed and padded hidden states have the same layout, so the same elements are dropped."""
    plain, optimized = two(around, tiny_path, config=dropout(0.1))
    before = bits_of(plain)
    columns = {name: [f"{text} " * 20 for text in rows] for name, rows in pairs_of_docstrings(64).items()}
    losses = []
    for model in (optimized, plain):
        model.max_seq_length = 16
        assert all(model.preprocess(rows)["attention_mask"].all() for rows in columns.values())
        losses.append(fine_tune(model, columns, MultipleNegativesRankingLoss, tmp_path))
    np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)
    check_trained(optimized, tiny_path, before)


def noise_of_dropout(model: SentenceTransformer, texts: list[str], draws: int = 40) -> float:
    """Return the mean squared distance between vectors with and without dropout."""
    features = model.preprocess(texts)
    with torch.no_grad():
        exact = model.eval()(moved(features))["sentence_embedding"]
        vectors = [model.train()(moved(features))["sentence_embedding"] for _ in range(draws)]
    return torch.stack([(x - exact).square().mean() for x in vectors]).mean().item()


def test_on_ragged_texts_dropout_drops_as_much(tiny_path, texts):
    """With packed hidden states other elements are dropped, but the noise is as large."""
    noise = {}
    for p in (0.1, 0.13):
        noise[p] = [noise_of_dropout(model, texts[:16]) for model in two(around, tiny_path, config=dropout(p))]
    assert noise[0.13][0] > 1.2 * noise[0.1][0]
    for plain, optimized in noise.values():
        assert abs(optimized / plain - 1) < 0.1


def test_fine_tuning_on_ragged_texts_with_dropout_learns_them(tiny_path, tmp_path):
    plain, optimized = two(around, tiny_path, config=dropout(0.1))
    before = bits_of(plain)
    columns = {name: rows * 3 for name, rows in pairs_of_docstrings(8).items()}
    for model in (optimized, plain):
        losses = fine_tune(model, columns, MultipleNegativesRankingLoss, tmp_path, steps=24, learning_rate=5e-3)
        assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    check_trained(optimized, tiny_path, before)


SIZES = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 80}
DISTIL = {"dim": 48, "n_layers": 1, "n_heads": 3, "hidden_dim": 80}
FAMILIES = {
    "RoBERTa": ("Roberta", SIZES),
    "XLM-RoBERTa": ("XLMRoberta", SIZES),
    "DistilBERT": ("DistilBert", DISTIL),
    "MPNet": ("MPNet", SIZES),
    "ModernBERT": ("ModernBert", SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_named_in_one_sentence_and_left_alone(family, tokenizer, tmp_path):
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **settings)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = around(str(tmp_path))
    state, bits, vectors = state_of(model), bits_of(model), model.encode(["Why?", "The cat sits outside."])
    with pytest.raises(TypeError) as raised:
        fastbert.optimize(model)
    message = str(raised.value)
    assert message.startswith(f"{family} is planned but not supported yet")
    assert class_name(model[0].model) in message
    assert "\n" not in message
    assert ". " not in message
    assert state_of(model) == state
    assert is_plain(model)
    check_same_bits(bits_of(model), bits)
    assert np.array_equal(model.encode(["Why?", "The cat sits outside."]), vectors)
