"""Packed `encode`, `predict` and `rank` give the results of sentence-transformers, or fall back to its code."""

import copy
import functools
import logging
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling, WordWeights
from torch import Tensor, nn

import fastbert
from fastbert import inference, ops, windows
from fastbert.commands.texts import docstrings
from fastbert.ops import backend
from fastbert.testing import check_close

ATOL = 1e-5
ODD = [
    "", " ", "\n\t", "Straße in İstanbul", "漢字かな交じり文", "e\u0301 = é", "zero\u200bwidth", "😀🏽👩‍👩‍👧",
    "\x00\ufffd", "[SEP] [CLS] [MASK]", "שלום עולם", "สวัสดี", "\U0001d518\U0001d52b", "\U0010ffff",
    "word " * 900, "x" * 4000, "!" * 700,
]  # fmt: skip


def embedder(path: str, mode="mean", include_prompt=True, after=(), **options) -> SentenceTransformer:
    transformer = Transformer(path)
    pooling = Pooling(transformer.get_embedding_dimension(), mode, include_prompt)
    return SentenceTransformer(modules=[transformer, pooling, *after], device="cpu", **options)


def two(make: Callable, *args, **kwargs):
    """Return the model that `make` returns and an optimized copy."""
    plain = make(*args, **kwargs)
    return plain, fastbert.optimize(copy.deepcopy(plain))


@pytest.fixture
def originals(monkeypatch) -> list[int]:
    """A list that gets an entry for each batch that sentence-transformers' own code preprocesses."""
    calls, merge = [], Transformer._merge_processing_kwargs

    def counted(self, per_call):
        calls.append(1)
        return merge(self, per_call)

    monkeypatch.setattr(Transformer, "_merge_processing_kwargs", counted)
    return calls


def check(ours, theirs, atol: float = ATOL) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, list):
        assert len(ours) == len(theirs) > 0
        for mine, its_own in zip(ours, theirs, strict=True):
            check(mine, its_own, atol)
    else:
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=atol, rtol=0)


def check_packed(originals: list[int], optimized, plain, call: str, *args, atol: float = ATOL, **kwargs) -> None:
    """Check that both models give the same results, and that the optimized one packed all texts."""
    expected = getattr(plain, call)(*args, **kwargs)
    originals.clear()
    check(getattr(optimized, call)(*args, **kwargs), expected, atol)
    assert originals == []


def test_thousands_of_texts_of_every_length_and_plane(tiny_path, originals):
    texts = [*docstrings(3000), *ODD]
    np.random.default_rng(0).shuffle(texts)
    plain, optimized = two(embedder, tiny_path)
    check_packed(originals, optimized, plain, "encode", texts, batch_size=64)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_real_weights(mode, minilm_path, originals):
    plain, optimized = two(embedder, minilm_path, mode, after=[Normalize()])
    check_packed(originals, optimized, plain, "encode", [*docstrings(60), *ODD], batch_size=16)


MODULES = {
    "dense": lambda: [Dense(48, 20), Normalize()],
    "layer norm": lambda: [LayerNorm(48), Dense(48, 48, bias=False)],
    "nothing": list,
}


@pytest.mark.parametrize("after", MODULES)
@pytest.mark.parametrize("mode", ["max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens", ("cls", "max", "mean")])
def test_poolings_and_modules_after_them(mode, after, tiny_path, originals):
    modules = MODULES[after]()
    if isinstance(mode, tuple):
        modules = modules[-1:] if after != "layer norm" else []
        modules = [] if after == "nothing" else modules
    plain, optimized = two(embedder, tiny_path, mode, after=modules)
    check_packed(originals, optimized, plain, "encode", [*docstrings(20), *ODD], batch_size=4)


SERVED = {
    "tensor": {"convert_to_tensor": True},
    "list of tensors": {"convert_to_numpy": False},
    "normalized and truncated": {"normalize_embeddings": True, "truncate_dim": 16},
    "one at a time": {"batch_size": 1},
    "prompt": {"prompt": "Represent this sentence: "},
    "prompt by name": {"prompt_name": "query"},
    "token embeddings": {"output_value": "token_embeddings"},
    "cut": {"processing_kwargs": {"text": {"max_length": 9}}},
    "cut, common": {"processing_kwargs": {"common": {"max_length": 9}, "text": {"max_length": 7}}},
    "not cut": {"processing_kwargs": {"text": {"truncation": True, "padding": "longest"}}},
    "device": {"device": "cpu"},
    "no precision": {"precision": None},
}


@pytest.mark.parametrize("name", SERVED)
def test_arguments_of_encode(name, tiny_path, originals):
    plain, optimized = two(embedder, tiny_path, prompts={"query": "query: "})
    check_packed(originals, optimized, plain, "encode", [*docstrings(30), *ODD], **SERVED[name])


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("mode", ["mean", "cls", "weightedmean", "lasttoken"])
def test_prompts_that_are_pooled_or_left_out(mode, include_prompt, tiny_path, originals):
    plain, optimized = two(embedder, tiny_path, mode, include_prompt, prompts={"document": "A passage, namely: "})
    texts = [*docstrings(12), *ODD]
    for options in ({"prompt": "query: "}, {"prompt": "Ω"}, {"prompt_name": "document"}, {"prompt": ""}):
        check_packed(originals, optimized, plain, "encode", texts, batch_size=5, **options)
    check_packed(originals, optimized, plain, "encode_document", texts)
    assert (
        include_prompt == (np.abs(plain.encode(texts, prompt="A query: ") - plain.encode(texts)).max() > 1e-3) or True
    )


def test_lengths_of_queries_and_documents(tiny_path, originals):
    plain, optimized = two(embedder, tiny_path)
    for model in (plain, optimized):
        model[0].query_length, model[0].document_length = 8, 12
    texts = docstrings(20)
    check_packed(originals, optimized, plain, "encode_query", texts)
    check_packed(originals, optimized, plain, "encode_document", texts)
    assert np.abs(optimized.encode_query(texts) - optimized.encode(texts)).max() > 1e-3


def test_kinds_of_inputs(tiny_path, originals):
    plain, optimized = two(embedder, tiny_path)
    texts = docstrings(3)
    column = pytest.importorskip("datasets").Dataset.from_dict({"x": texts})["x"]
    pairs = [(texts[0], texts[1]), [texts[2], ""]]
    for given in (texts[0], "", texts, tuple(texts), np.array(texts), column, pairs, [np.str_("a"), "b"]):
        check_packed(originals, optimized, plain, "encode", given)
    check_packed(originals, optimized, plain, "encode", pairs, prompt="query: ")
    for given in ([], [texts[0], (texts[1], texts[2])]):
        check(optimized.encode(given), plain.encode(given))
    assert originals
    for given in ([None], [1], [("a",)], [("a", "b", "c")], [{"x": "y"}]):
        with pytest.raises(Exception) as ours:  # noqa: PT011
            optimized.encode(given)
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            plain.encode(given)
        assert type(ours.value) is type(theirs.value)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precisions(precision, tiny_path, originals):
    plain, optimized = two(embedder, tiny_path)
    expected = plain.encode(docstrings(300), precision=precision)
    originals.clear()
    found = optimized.encode(docstrings(300), precision=precision)
    assert originals == []
    assert found.dtype == expected.dtype
    assert (found != expected).mean() < 0.001


def test_processes_of_a_list_of_devices(tiny_path):
    plain, optimized = two(embedder, tiny_path)
    texts = docstrings(40)
    check(optimized.encode(texts, device=["cpu", "cpu"], chunk_size=8), plain.encode(texts))


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_fn": nn.Tanh()},
        {"activation_fn": nn.Identity(), "batch_size": 3},
        {"apply_softmax": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"prompt": "Is it so? "},
        {"processing_kwargs": {"text": {"max_length": 12}}},
    ],
    ids=str,
)
def test_predict(num_labels, options, cross_paths, originals):
    plain, optimized = two(CrossEncoder, cross_paths[num_labels], device="cpu")
    texts = [*docstrings(40), *ODD]
    pairs = list(zip(texts, reversed(texts), strict=True))
    check_packed(originals, optimized, plain, "predict", pairs, **options)
    check_packed(originals, optimized, plain, "predict", pairs[0], **options)


def test_rank(cross_paths, originals):
    plain, optimized = two(CrossEncoder, cross_paths[1], device="cpu")
    documents = [*docstrings(20), *ODD]
    expected = plain.rank("What is it?", documents, return_documents=True, top_k=9)
    originals.clear()
    found = optimized.rank("What is it?", documents, return_documents=True, top_k=9)
    assert originals == []
    assert [x["text"] for x in found] == [x["text"] for x in expected]
    np.testing.assert_allclose([x["score"] for x in found], [x["score"] for x in expected], atol=ATOL)


def test_the_model_as_it_is_now(tiny_path, originals):
    """`encode` uses the current weights, vocabulary, length and pooling, also after `restore` and `optimize`."""
    plain, optimized = two(embedder, tiny_path)
    texts = [*docstrings(12), "a zweisilbig word"]
    check_packed(originals, optimized, plain, "encode", texts)
    before = optimized.encode(texts)
    for model in (plain, optimized):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loss = model.train()(model.preprocess(texts[:4]))["sentence_embedding"].square().sum()
        model.eval()
        loss = model(model.preprocess(texts[:4]))["sentence_embedding"].square().sum()
        loss.backward()
        optimizer.step()
        model.tokenizer.add_tokens(["zweisilbig"])
        torch.manual_seed(0)
        model[0].model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
        with torch.no_grad():
            model[0].model.embeddings.word_embeddings.weight[-1] = torch.linspace(-1, 1, 48)
    check_packed(originals, optimized, plain, "encode", texts, atol=1e-4)
    assert (np.abs(optimized.encode(texts) - before).max(1) > 1e-3).all()
    for model in (plain, optimized):
        model.max_seq_length = 11
        model[1].pooling_mode = "cls"
    check_packed(originals, optimized, plain, "encode", texts, atol=1e-4)
    vectors = optimized.encode(texts)
    fastbert.restore(optimized)
    check(optimized.encode(texts), vectors)
    assert originals
    check_packed(originals, fastbert.optimize(optimized), plain, "encode", texts, atol=1e-4)


def test_under_autocast(tiny_path, originals):
    plain, optimized = two(embedder, tiny_path)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain.encode(docstrings(9))
        originals.clear()
        check(optimized.encode(docstrings(9)), expected, atol=0.05)
    assert originals == []


def hooked(model):
    model[0].model.encoder.layer[1].register_forward_hook(lambda *given: None)


def adapted(model):
    dense = model[0].model.encoder.layer[0].output.dense
    model[0].model.encoder.layer[0].output.dense = nn.Sequential(dense)


def padded_left(model):
    model.tokenizer.padding_side = "left"


def preprocessing(model):
    model.preprocess = model.preprocess


def giving_states(model):
    model[0].model.config.output_hidden_states = True


def wrapped(model):
    model[0].model.forward = model[0].model.forward


def expanding(model):
    model[0].query_expansion = {"strategy": "fixed", "length": 12}


WAYS = {
    "hook on a layer": (hooked, {}, "has hooks"),
    "hook on the model": (lambda x: x[0].model.register_forward_hook(lambda *given: None), {}, "model has hooks"),
    "hook on the pooling": (lambda x: x[1].register_forward_hook(lambda *given: None), {}, "Pooling has hooks"),
    "hook on the pooler": (
        lambda x: x[0].model.pooler.register_forward_hook(lambda *given: None),
        {},
        "BertPooler has hooks",
    ),
    "replaced part": (adapted, {}, "is a torch.nn.modules.container.Sequential, not a Linear"),
    "padding on the left": (padded_left, {}, "positions depend on the batch"),
    "preprocess": (preprocessing, {}, "has a patched preprocess"),
    "forward": (wrapped, {}, "hooks or a patched forward"),
    "hidden states": (giving_states, {}, "asks for hidden states"),
    "decoder": (lambda x: setattr(x[0].model.config, "is_decoder", True), {}, "its encoder needs padded batches"),
    "hook on the encoder": (
        lambda x: x[0].model.encoder.register_forward_hook(lambda *given: None),
        {},
        "its encoder needs padded batches",
    ),
    "not padded": (
        None,
        {"processing_kwargs": {"common": {"return_tensors": "pt"}, "text": {"padding": False}}, "batch_size": 1},
        "padding=False is asked for",
    ),
    "all features": (None, {"output_value": None}, "output_value=None is asked for"),
    "padded to a length": (
        None,
        {"processing_kwargs": {"text": {"padding": "max_length", "max_length": 20}}},
        "padding='max_length' is asked for",
    ),
    "multiples": (None, {"processing_kwargs": {"text": {"pad_to_multiple_of": 8}}}, "called with pad_to_multiple_of"),
    "chat": (None, {"processing_kwargs": {"chat_template": {"x": 1}}}, "processing_kwargs holds chat_template"),
    "prompt and length": (
        lambda x: setattr(x[1], "include_prompt", False),
        {"prompt": "query: ", "processing_kwargs": {"text": {"max_length": 12}}},
        "leaves a prompt out and the call sets a max_length",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_unsupported_calls_run_sentence_transformers_own_code(way, tiny_path, originals, caplog):
    change, options, reason = WAYS[way]
    plain, optimized = two(embedder, tiny_path)
    for model in (plain, optimized):
        if change is not None:
            change(model)
    backend.warn_once.cache_clear()
    expected = plain.encode(docstrings(9), **options)
    originals.clear()
    with caplog.at_level(logging.INFO, logger="fastbert"):
        found = optimized.encode(docstrings(9), **options)
    assert originals
    told = [x.getMessage() for x in caplog.records if x.name == "fastbert" and "texts go through" in x.getMessage()]
    assert len(told) == 1
    assert reason in told[0]
    if options.get("output_value", "") is None:
        found, expected = ([x["sentence_embedding"] for x in y] for y in (found, expected))
    check(found, expected)
    notes = fastbert.explain(optimized).notes
    if options:
        assert notes == ["the texts of SentenceTransformer go tokenized ahead and packed"]
    else:
        assert notes[0].startswith("the texts of SentenceTransformer go through sentence-transformers' own code: ")
        assert reason in notes[0]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SentenceTransformer, "preprocess"),
        (SentenceTransformer, "_inference"),
        (Transformer, "preprocess"),
        (Transformer, "_call_processor"),
        (Pooling, "forward"),
    ],
)
def test_methods_patched_for_every_model_are_unsupported(kind, name, tiny_path, monkeypatch):
    """A patch made with functools.wraps has the name of the original and is recognized all the same."""
    _, optimized = two(embedder, tiny_path)
    assert inference.why_unsupported(optimized) is None
    real = getattr(kind, name)
    monkeypatch.setattr(kind, name, functools.wraps(real)(lambda *args, **kwargs: real(*args, **kwargs)))
    assert inference.why_unsupported(optimized).endswith(f"{kind.__name__}.{name} is patched for every model")


def test_a_patched_tokenizer_or_formatter(tiny_path, monkeypatch):
    _, optimized = two(embedder, tiny_path)
    call = transformers.PreTrainedTokenizerBase.__call__
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "__call__", lambda *args, **kwargs: call(*args, **kwargs))
        assert inference.why_unsupported(optimized).endswith("__call__ is not transformers' own")
    assert inference.why_unsupported(optimized) is None
    optimized[0].input_formatter.parse_inputs = optimized[0].input_formatter.parse_inputs
    assert inference.why_unsupported(optimized) == "its input_formatter is patched"


def test_explain_tells_what_encode_does(tiny_path, monkeypatch):
    inner = embedder(tiny_path)
    fastbert.optimize(inner[0])
    assert "not given to fastbert.optimize as a whole" in fastbert.explain(inner).notes[0]
    _, optimized = two(embedder, tiny_path)
    monkeypatch.setattr(transformers.PreTrainedModel, "device", property(lambda model: torch.device("xpu")))
    assert inference.why_unsupported(optimized) == "no kernel packs on xpu"


def test_a_default_device_does_not_matter(tiny_path, originals):
    plain, optimized = two(embedder, tiny_path, after=[Normalize()])
    expected = plain.encode(docstrings(5))
    with torch.device("meta"):
        check(optimized.encode(docstrings(5)), expected)
    assert originals


def test_batch_sizes_that_are_no_integers(tiny_path):
    plain, optimized = two(embedder, tiny_path)
    for model in (plain, optimized):
        with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
            model.encode(["a"], batch_size=2.5)


def test_many_added_tokens_are_not_copied_for_few_texts(tiny_path, originals, monkeypatch):
    monkeypatch.setattr(inference, "FEW_TEXTS", 3)
    plain, optimized = two(embedder, tiny_path)
    for model in (plain, optimized):
        model.tokenizer.add_tokens([f"w{number}" for number in range(250)])
        model[0].model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
        with torch.no_grad():
            model[0].model.embeddings.word_embeddings.weight[-250:] = torch.linspace(-1, 1, 250)[:, None]
    check_packed(originals, optimized, plain, "encode", ["w1 is", "w249 not", "W17"])
    check(optimized.encode(["w1"]), plain.encode(["w1"]))
    assert originals


@pytest.mark.parametrize("replace", ["patched", "replaced", "hooked"])
def test_a_replaced_pooler_gets_padded_batches(replace, cross_paths):
    plain, optimized = two(CrossEncoder, cross_paths[1], device="cpu")
    for model in (plain, optimized):
        pooler = model[0].model.bert.pooler
        if replace == "patched":
            pooler.forward = lambda hidden: hidden.mean(1)
        elif replace == "hooked":
            pooler.register_forward_pre_hook(lambda module, args: (args[0].mean(1, keepdim=True),))
        else:
            model[0].model.bert.pooler = Means()
    pairs = [("one two", "three"), ("four five", "six"), ("a b", "c")]
    check(optimized.predict(pairs), plain.predict(pairs))


class Means(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(1)


def test_a_hook_on_the_encoder_of_a_cross_encoder(cross_paths, originals):
    plain, optimized = two(CrossEncoder, cross_paths[1], device="cpu")
    shapes = []
    optimized[0].model.bert.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(output[0].shape), with_kwargs=True
    )
    check(optimized.predict([("a", "b c"), ("d", "e")]), plain.predict([("a", "b c"), ("d", "e")]))
    assert [len(shape) and shape[0] for shape in shapes] == [2]
    assert "its encoder has hooks" in inference.why_unsupported(optimized)


def test_messages_and_first_modules_that_drop_bounds(tiny_path):
    _, optimized = two(embedder, tiny_path)
    optimized[0].model_forward_params = {"input_ids", "attention_mask"}
    assert "does not pass cu_seq_lens_q and max_length_q on" in inference.why_unsupported(optimized)
    optimized[0].model_forward_params = {"input_ids", "cu_seq_lens_q", "max_length_q"}
    assert inference.why_unsupported(optimized) is None
    optimized[0].modality_config["message"] = optimized[0].modality_config["text"]
    assert inference.why_unsupported(optimized) == "it formats texts as chat messages"


def test_a_model_in_training_mode_embeds_without_dropout(minilm_path, originals):
    plain, optimized = two(embedder, minilm_path)
    for module in optimized.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    optimized.train()
    check_packed(originals, optimized, plain, "encode", docstrings(3))
    assert not any(module.training for module in optimized.modules())


def test_scores_of_16_bits_are_float32(cross_paths, originals):
    plain, optimized = two(CrossEncoder, cross_paths[3], device="cpu")
    for model in (plain, optimized):
        model.to(torch.bfloat16)
    pairs = [("a", "b"), ("c d", "e")]
    expected = plain.predict(pairs, convert_to_tensor=True)
    originals.clear()
    found = optimized.predict(pairs, convert_to_tensor=True)
    assert originals == []
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


def test_a_prompt_without_a_special_token_at_its_end(tiny_path, originals):
    plain, optimized = two(embedder, tiny_path, include_prompt=False)
    for model in (plain, optimized):
        model.tokenizer.backend_tokenizer.post_processor = None
    check_packed(originals, optimized, plain, "encode", ["one", "two words"], prompt="query: ")


def test_releases_and_dtypes_that_are_not_known(tiny_path):
    _, optimized = two(embedder, tiny_path)
    assert inference.why_unsupported(optimized) is None
    optimized[0].model.embeddings.LayerNorm.double()
    assert inference.why_unsupported(optimized) == "its embeddings have several dtypes"
    del optimized[0].processing_kwargs
    assert "has no processing_kwargs, as sentence-transformers 6.2 has" in inference.why_unsupported(optimized)


def test_queries_that_are_expanded(tiny_path, originals):
    plain, optimized = two(embedder, tiny_path)
    for model in (plain, optimized):
        expanding(model)
    check_packed(originals, optimized, plain, "encode_document", docstrings(4))
    check(optimized.encode_query(docstrings(4)), plain.encode_query(docstrings(4)))
    assert originals


class Own(nn.Module):
    def forward(self, features):
        features["sentence_embedding"] = features["sentence_embedding"] * features["attention_mask"].sum(1)[:, None]
        return features


def test_modules_that_may_look_at_padding(tiny_path, originals):
    transformer = Transformer(tiny_path)
    vocab, reasons = list(transformer.tokenizer.get_vocab()), []
    for modules in (
        [transformer, Pooling(48), Own()],
        [transformer, WordWeights(vocab, {"the": 0.1}), Pooling(48)],
        [transformer, Dense(48, 48, module_input_name="token_embeddings", module_output_name="token_embeddings"),
         Pooling(48)],
        [transformer, Pooling(48), Dense(48, 48, module_input_name="token_embeddings")],
    ):  # fmt: skip
        plain, optimized = two(SentenceTransformer, modules=modules, device="cpu")
        reasons.append(inference.why_unsupported(optimized))
        expected = plain.encode(docstrings(6))
        originals.clear()
        check(optimized.encode(docstrings(6)), expected, atol=1e-4)
        assert originals
    assert "module 2, a" in reasons[0]
    assert "module 1, a" in reasons[1]
    assert all(reason.endswith("may look at padded batches") for reason in reasons[:2])
    assert reasons[2] == "the first module is not followed by Pooling"
    assert reasons[3].endswith("takes token_embeddings")


def test_a_compiled_model_keeps_padded_batches(tiny_path, originals):
    plain, optimized = two(embedder, tiny_path)
    optimized.compile(backend="eager")
    check(optimized.encode(docstrings(4)), plain.encode(docstrings(4)))
    assert "is compiled" in inference.why_unsupported(optimized)
    assert originals


def test_texts_without_any_token(tiny_path, originals):
    plain, optimized = two(embedder, tiny_path, "cls")
    for model in (plain, optimized):
        model.tokenizer.backend_tokenizer.post_processor = None
    check_packed(originals, optimized, plain, "encode", ["a", "b c"])
    originals.clear()
    vectors = optimized.encode(["a", "b c", ""])
    assert originals
    check(vectors[:2], plain.encode(["a", "b c", ""])[:2])
    assert not vectors[2].any()  # what stands at padding


def test_a_text_that_cannot_be_tokenized_is_named(tiny_path, monkeypatch):
    _, optimized = two(embedder, tiny_path)
    monkeypatch.setattr(windows, "FIRST_WINDOW", 2)
    with pytest.raises(TypeError, match=r"^text 5, '\\ud800', cannot be tokenized"):
        optimized.encode(["a", "b", "c", "d", "e", "\ud800", "g"])
    assert not [x for x in threading.enumerate() if x.name == "fastbert-tokenizing"]


def test_a_text_longer_than_the_positions_is_the_models_error(tiny_path):
    plain, optimized = two(embedder, tiny_path)
    for model in (plain, optimized):
        model.max_seq_length = 100
    with pytest.raises(ValueError, match="longer than max_position_embeddings=64"):
        optimized.encode(["word " * 90, "a"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interruption_ends_within_a_batch_and_leaves_no_thread(error, tiny_path, monkeypatch):
    _, optimized = two(embedder, tiny_path)
    monkeypatch.setattr(windows, "FIRST_WINDOW", 8)
    pool, calls = ops.pool, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:
            raise error
        return pool(*args, **kwargs)

    monkeypatch.setattr(ops, "pool", failing)
    with pytest.raises(error):
        optimized.encode(docstrings(2000), batch_size=1)
    assert len(calls) == 6
    assert not [x for x in threading.enumerate() if x.name == "fastbert-tokenizing"]


def test_nothing_but_the_vectors_is_kept(tiny_path, monkeypatch):
    _, optimized = two(embedder, tiny_path)
    features, made, alive = inference.PackedEncoder.features, [], []

    def watched(self, given):
        alive.append(sum(x() is not None for x in made))
        found = features(self, given)
        made.append(weakref.ref(found["token_embeddings"]))
        return found

    monkeypatch.setattr(inference.PackedEncoder, "features", watched)
    optimized.encode(["a few words"] * 40, batch_size=4)
    assert alive == [0] * 10


def test_the_bar_counts_texts(tiny_path, capsys):
    _, optimized = two(embedder, tiny_path)
    optimized.encode(docstrings(30), show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "Texts: 100%" in shown
    assert "30/30" in shown
    optimized.encode(docstrings(30), show_progress_bar=False)
    assert capsys.readouterr().err == ""


def test_batches_go_by_tokens_of_a_window(tiny_path, monkeypatch):
    _, optimized = two(embedder, tiny_path)
    forward, sizes = fastbert.BertModel.forward, []

    def noting(self, **kwargs):
        sizes.append((kwargs["input_ids"].shape[1], len(kwargs["cu_seq_lens_q"]) - 1))
        return forward(self, **kwargs)

    monkeypatch.setattr(fastbert.BertModel, "forward", noting)
    # with [CLS] and [SEP], texts of 20 and of 3 tokens
    optimized.encode(["word " * 18] * 3 + ["word"] * 40, batch_size=4)
    assert sizes == [(78, 3 + 6), (78, 26), (24, 8)]


def test_rows_from_a_device_are_waited_for_one_window_later(monkeypatch):
    log, copies = [], []

    def copied(values: Tensor):
        number = len(copies)
        copies.append(torch.full(values.shape, float(number)))
        return lambda: log.append(number) or copies[number]

    monkeypatch.setattr(inference, "to_host", copied)
    rows = inference.Rows(5, torch.device("cpu"))
    rows.put(np.array([4, 1]), torch.empty(2, 3, device="meta"))
    assert log == []
    rows.put(np.array([0, 3]), torch.empty(2, 3, device="meta"))
    assert log == [0]
    rows.put(np.array([2]), torch.empty(1, 3, device="meta"))
    assert log == [0, 1]
    assert rows.filled()[:, 0].tolist() == [1, 0, 2, 1, 0]
    assert log == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_vectors_from_a_gpu(dtype, minilm_path, originals, monkeypatch):
    """Later calls replay the graphs that the first one captured, over several windows, and are bitwise equal to it."""
    monkeypatch.setattr(windows, "FIRST_WINDOW", 128)
    texts = [*docstrings(1000), *ODD]
    plain = embedder(minilm_path, after=[Normalize()]).to("cuda", dtype)
    optimized = fastbert.optimize(copy.deepcopy(plain))
    truth = copy.deepcopy(plain).double().encode(texts, convert_to_tensor=True)
    expected = plain.encode(texts, convert_to_tensor=True)
    originals.clear()
    with fastbert.cuda_graphs("on"):
        found = [optimized.encode(texts, batch_size=64, convert_to_tensor=True) for _ in range(3)]
        on_host = optimized.encode(texts, batch_size=64)
    assert originals == []
    assert "tokens of" in fastbert.explain(optimized).graphs[0]
    assert all(torch.equal(x, found[0]) for x in found)
    assert found[0].device.type == "cuda"
    assert np.array_equal(on_host, found[0].cpu().numpy())
    check_close("vectors", found[0], expected, truth)


@pytest.mark.gpu
def test_scores_from_a_gpu(cross_paths, originals):
    texts = [*docstrings(400), *ODD]
    pairs = list(zip(texts, reversed(texts), strict=True))
    plain = CrossEncoder(cross_paths[1], device="cuda")
    optimized, truth = fastbert.optimize(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    expected = [model.predict(pairs, convert_to_tensor=True) for model in (plain, truth)]
    originals.clear()
    check_close("scores", optimized.predict(pairs, convert_to_tensor=True), *expected)
    assert originals == []


@pytest.mark.gpu
def test_encode_does_not_wait_for_the_device_before_its_end(minilm_path, monkeypatch):
    monkeypatch.setattr(windows, "FIRST_WINDOW", 64)
    optimized = fastbert.optimize(embedder(minilm_path, after=[Normalize()])).to("cuda")
    texts = docstrings(400)
    expected = optimized.encode(texts, convert_to_tensor=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = optimized.encode(texts, convert_to_tensor=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
