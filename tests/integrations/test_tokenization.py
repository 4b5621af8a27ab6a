"""`PackingTokenizer` gives the tokens of transformers' tokenizer, and never changes that tokenizer."""

import copy
import string

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, DistilBertTokenizer, PreTrainedTokenizerFast, XLMRobertaTokenizer

from fastbert.commands.texts import docstrings
from fastbert.tokenization import PackedTokens, PackingTokenizer, Unsupported, why_only_wrapper

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
AS_ENCODE_CALLS_IT = {"padding": True, "truncation": "longest_first"}
# All of Unicode except surrogates, and pieces that normalizers and added tokens react to.
ODD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORDS = st.lists(
    st.sampled_from(
        [
            "Straße", "İstanbul", "[SEP]", "[MASK]", "<s>", "漢字かな", "e\u0301", "\u200b", "\x00", "😀🏽", "  ", "\n",
            "word", "embeddings", "Ünïcödé", "##ing", "a-b_c", "\ufffd", "[cls]",
        ]
    ),
    max_size=8,
).map(" ".join)  # fmt: skip
TEXT = ODD | WORDS | st.tuples(ODD, WORDS).map("".join)


def vocabulary(tokenizer) -> dict[str, int]:
    return tokenizer.get_vocab()


def by_unigrams() -> XLMRobertaTokenizer:
    """Return a Unigram tokenizer, as multilingual checkpoints have."""
    pieces = ["▁", "▁a", "a", "e", "st", "ing", *"bcdö"]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=special + [(piece, -float(place)) for place, piece in enumerate(pieces)])


def by_bytes() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with RoBERTa's post-processor."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: place for place, token in enumerate([*specials, *letters, "th", "the"])}
    backend = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    )


def with_types_of_its_own(tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer that gives a single text the token type 1."""
    made = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), **SPECIAL)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:1 [SEP]:1", pair="[CLS]:2 $A:1 [SEP]:0 $B:0", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def with_added_tokens(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.add_tokens(["Straße", "embeddings", transformers.AddedToken("İst", lstrip=True, single_word=True)])
    made.add_special_tokens({"additional_special_tokens": ["<s>", transformers.AddedToken("a-b", special=True)]})
    made.add_tokens(["漢"])
    return made


KINDS = {
    "MiniLM's": copy.deepcopy,
    "cased": lambda x: BertTokenizer(vocabulary(x), do_lower_case=False, strip_accents=False),
    "without Chinese characters": lambda x: BertTokenizer(vocabulary(x), tokenize_chinese_chars=False),
    "by its JSON": lambda x: PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(x.backend_tokenizer), model_max_length=32, **SPECIAL
    ),
    "without token types": lambda x: DistilBertTokenizer(vocabulary(x)),
    "by unigrams": lambda x: by_unigrams(),
    "by bytes": lambda x: by_bytes(),
    "types of its own": with_types_of_its_own,
    "added tokens": with_added_tokens,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tokenizer):
    return KINDS[request.param](tokenizer)


def theirs(tokenizer, texts, **options) -> PackedTokens:
    """Return the output of transformers' tokenizer without its padding."""
    found = copy.deepcopy(tokenizer)(texts, return_tensors="np", **(AS_ENCODE_CALLS_IT | options))
    kept = found["attention_mask"].astype(bool)
    types = found["token_type_ids"][kept] if "token_type_ids" in found else None
    return PackedTokens(found["input_ids"][kept], types, kept.sum(1))


def assert_same(ours: PackedTokens, expected: PackedTokens) -> None:
    assert ours.input_ids.dtype == np.int32
    assert ours.lengths.tolist() == expected.lengths.tolist()
    assert ours.input_ids.tolist() == expected.input_ids.tolist()
    assert (ours.token_type_ids is None) == (expected.token_type_ids is None)
    if expected.token_type_ids is not None:
        assert ours.token_type_ids.dtype == np.int32
        assert ours.token_type_ids.tolist() == expected.token_type_ids.tolist()


def check(tokenizer, texts, **options) -> None:
    assert_same(
        PackingTokenizer(tokenizer, **(AS_ENCODE_CALLS_IT | options))(texts), theirs(tokenizer, texts, **options)
    )


@settings(max_examples=20, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=1, max_size=6),
    max_length=st.none() | st.integers(4, 24),
    side=st.sampled_from(["right", "left"]),
    truncation=st.sampled_from(["longest_first", "only_first", True, False, "do_not_truncate"]),
)
def test_texts(kind, texts, max_length, side, truncation):
    kind.truncation_side = side
    check(kind, texts, max_length=max_length, truncation=truncation)


@settings(max_examples=20, deadline=None)
@given(
    pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6),
    max_length=st.none() | st.integers(6, 24),
    side=st.sampled_from(["right", "left"]),
    truncation=st.sampled_from(["longest_first", False]),
    as_lists=st.booleans(),
)
def test_pairs(kind, pairs, max_length, side, truncation, as_lists):
    kind.truncation_side = side
    check(kind, [list(pair) for pair in pairs] if as_lists else pairs, max_length=max_length, truncation=truncation)


def test_real_texts_from_a_word_to_far_past_the_limit(tokenizer):
    texts = [*docstrings(700), "", " ", "x" * 5000, "word " * 3000, "\n".join(docstrings(50))]
    check(tokenizer, texts)
    check(tokenizer, list(zip(texts, reversed(texts), strict=True)), max_length=100)


def test_the_users_tokenizer_stays_as_it_is(kind):
    kind.backend_tokenizer.enable_truncation(7, stride=2)
    kind.backend_tokenizer.enable_padding(length=9)
    before, attributes = kind.backend_tokenizer.to_str(), dict(vars(kind))
    PackingTokenizer(kind, **AS_ENCODE_CALLS_IT, max_length=5)(["one", "two and more"])
    assert kind.backend_tokenizer.to_str() == before
    assert vars(kind) == attributes


def _normalizer(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)


def _normalizer_in_place(tokenizer):
    tokenizer.backend_tokenizer.normalizer.strip_accents = False


def _post_processor(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[MASK]", 103))


def _vocabulary(tokenizer):
    """Swap the ids of two words."""
    vocab = dict(tokenizer.get_vocab())
    vocab["word"], vocab["cafe"] = vocab["cafe"], vocab["word"]
    tokenizer.backend_tokenizer.model = models.WordPiece(vocab, unk_token="[UNK]")


CHANGES = {
    "a token": lambda x: x.add_tokens(["café"]),
    "a special token": lambda x: x.add_special_tokens({"additional_special_tokens": ["Café"]}),
    "the normalizer": _normalizer,
    "the normalizer in place": _normalizer_in_place,
    "the post-processor": _post_processor,
    "the vocabulary": _vocabulary,
    "the unknown token of the model": lambda x: setattr(x.backend_tokenizer.model, "unk_token", "[MASK]"),
    "the length": lambda x: setattr(x, "model_max_length", 5),
    "the side": lambda x: (setattr(x, "model_max_length", 5), setattr(x, "truncation_side", "left")),
    "special tokens as text": lambda x: setattr(x, "split_special_tokens", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_users_tokenizer_is_seen(change, tokenizer):
    changed = copy.deepcopy(tokenizer)
    texts = ["A café, a word, ☃ and a Café [SEP] more than enough of them."]
    before = PackingTokenizer(changed, **AS_ENCODE_CALLS_IT)(texts)
    CHANGES[change](changed)
    expected = theirs(changed, texts)
    assert before.input_ids.tolist() != expected.input_ids.tolist()
    check(changed, texts)


def test_a_normalizer_that_was_changed_after_tokens_were_added(tokenizer):
    """tokenizers goes on matching the tokens as the old normalizer left them, and a copy would not."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["Foobár"])
    check(changed, ["foobár Foobár foobar"])
    changed.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    check(changed, ["foobár Foobár foobar"])  # a new normalizer is applied to the added tokens, too
    changed.backend_tokenizer.normalizer.lowercase = True
    with pytest.raises(Unsupported, match="normalizer was changed after tokens were added"):
        PackingTokenizer(changed, **AS_ENCODE_CALLS_IT)


class InPython:
    def pre_tokenize(self, text):
        text.split(lambda index, part: part.split(" ", "removed"))


class Overriding(BertTokenizer):
    def _encode_plus(self, *args, **kwargs):
        return super()._encode_plus(*args, **kwargs)


class Slow(transformers.PreTrainedTokenizer):
    vocab_size = 26

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return string.ascii_lowercase.find(token)

    def get_vocab(self):
        return {token: place for place, token in enumerate(string.ascii_lowercase)}


def with_python(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.PreTokenizer.custom(InPython()), pre_tokenizers.BertPreTokenizer()]
    )
    return made


def patched(tokenizer):
    made = copy.deepcopy(tokenizer)
    made._encode_plus = made._encode_plus
    return made


def padding_left(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.padding_side = "left"
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_python, "the pre_tokenizer of its tokenizer is written in Python"),
        (lambda x: Overriding(vocabulary(x)), "Overriding._encode_plus is not transformers' own"),
        (lambda x: Slow(), "Slow is not based on the tokenizers library"),
        (patched, "BertTokenizer._encode_plus is not transformers' own"),
        (padding_left, "padding_side='left' lets positions depend on the batch"),
        (lambda x: None, "a builtins.NoneType is not based on the tokenizers library"),
    ],
    ids=["Python", "derived", "slow", "patched", "left", "none"],
)
def test_tokenizers_that_only_the_wrapper_supports(make, reason, tokenizer):
    made = make(tokenizer)
    assert why_only_wrapper(made).endswith(reason)
    assert why_only_wrapper(tokenizer) is None


@pytest.mark.parametrize(
    ("options", "names", "reason"),
    [
        ({"padding": "max_length"}, None, "padding='max_length' is asked for"),
        ({"padding": False}, None, "padding=False is asked for"),
        ({}, ["input_ids"], "gives input_ids$"),
        ({"return_special_tokens_mask": True}, None, "gives .*special_tokens_mask"),
    ],
)
def test_outputs_that_only_the_wrapper_supports(options, names, reason, tokenizer):
    made = copy.deepcopy(tokenizer)
    made.model_input_names = names or made.model_input_names
    with pytest.raises(Unsupported, match=reason):
        PackingTokenizer(made, **(AS_ENCODE_CALLS_IT | options))


def test_a_text_that_cannot_be_tokenized_is_named(tokenizer):
    tokenize = PackingTokenizer(tokenizer, **AS_ENCODE_CALLS_IT)
    with pytest.raises(TypeError, match=r"^text 1002, 'half of a pair: \\ud800', cannot be tokenized: TextEncodeInput"):
        tokenize(["one", "two", "half of a pair: \ud800", "four"], 1000)
    with pytest.raises(TypeError, match=r"^text 0, '\\udc00x{60,75}\.\.\., cannot be tokenized"):
        tokenize(["\udc00" + "x" * 500])
    with pytest.raises(TypeError, match=r"^text 1, \('a', None\), cannot"):
        tokenize([("a", "b"), ("a", None)])
