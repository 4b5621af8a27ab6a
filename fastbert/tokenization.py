"""Texts to packed token ids by the `tokenizers` library, with the same tokens as transformers' wrapper gives.

The wrapper turns the library's results into Python lists and padded tensors, which takes several times as long as
tokenizing. So it is called only once, for one text, to set the truncation of the library's tokenizer.
"""

import copy
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, count, groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastbert._compat import TOKENIZES, set_backend_tokenizer
from fastbert.fusion import class_name

Texts = Sequence[str] | Sequence[Sequence[str]]
# The wrapper's methods that influence tokens. A derived class may override them.
METHODS = {
    name: getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "set_truncation_and_padding", *TOKENIZES)
}
SEQUENCES = (normalizers.Sequence, pre_tokenizers.Sequence)
COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor")
SUPPORTED_OUTPUTS = {"input_ids", "token_type_ids", "attention_mask"}


class Unsupported(Exception):
    """Why texts must go through the original code; empty if the reason is not worth a log line."""


class PackedTokens(NamedTuple):
    """The tokens of N texts, one text after another: input_ids and token_type_ids, int32 [T]; lengths, int64 [N].
    token_type_ids is None if the wrapper returns none."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    lengths: np.ndarray


def why_only_wrapper(tokenizer: object) -> str | None:
    """Why only transformers' wrapper gives a tokenizer's tokens; None if `PackingTokenizer` supports the tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return f"a {class_name(tokenizer)} is not based on the tokenizers library"
    for name, own in METHODS.items():
        if name in vars(tokenizer) or getattr(type(tokenizer), name) is not own:
            return f"{class_name(tokenizer)}.{name} is not transformers' own"
    if tokenizer.padding_side != "right":
        return f"padding_side={tokenizer.padding_side!r} lets positions depend on the batch"
    for name in COMPONENTS:
        if _is_in_python(getattr(tokenizer.backend_tokenizer, name)):
            return f"the {name} of its tokenizer is written in Python"
    return None


def _is_in_python(component: Any) -> bool:
    """Whether a component, or one in a sequence, is written in Python: the library wraps those in its base classes."""
    if type(component) in SEQUENCES:
        with suppress(IndexError):
            for index in count():
                if _is_in_python(component[index]):
                    return True
        return False
    return type(component) in (normalizers.Normalizer, pre_tokenizers.PreTokenizer)


class PackingTokenizer:
    """Gives the tokens that a transformers tokenizer gives for texts, or pairs of texts, with these options.

    It works on a copy, because truncation and padding are state of the tokenizer, and the user's own must not change.
    The copy shares the vocabulary. Making it takes 0.1 ms, and 0.5 ms for each 100 added tokens. So each call makes a
    new copy, which has all changes of the original.

    tokenizer: one for which `why_only_wrapper` is None. options: truncation, max_length, and padding, which must be
    True or "longest". Raises Unsupported for a tokenizer or options that only the wrapper supports, and what the
    wrapper raises.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, **options):
        padding = options.get("padding")
        if padding not in (True, "longest"):
            raise Unsupported(f"padding={padding!r} is asked for")
        self._tokenizer = _copy_of(tokenizer.backend_tokenizer)
        wrapper = copy.copy(tokenizer)
        set_backend_tokenizer(wrapper, self._tokenizer)
        found = wrapper(["a"], **options)
        if not {"input_ids", "attention_mask"} <= found.keys() <= SUPPORTED_OUTPUTS:
            raise Unsupported(f"the tokenizer gives {', '.join(found)}")
        self.gives_types = "token_type_ids" in found
        self._tokenizer.no_padding()

    def __call__(self, texts: Texts, first: int = 0) -> PackedTokens:
        """The tokens of texts. Raises what the tokenizer raises, with the number of the text, counted from `first`."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts)
        except Exception as error:
            self._raise_named(texts, first, error)
        lengths = np.array([len(x) for x in encodings], dtype=np.int64)
        size = int(lengths.sum())
        types = None
        if self.gives_types:
            # Types mark the second text and special tokens, so the longest encoding has every type that occurs.
            paired = not isinstance(texts[0], str)
            has_types = paired or any(encodings[int(lengths.argmax())].type_ids)
            types = _flat(encodings, "type_ids", size) if has_types else np.zeros(size, np.int32)
        return PackedTokens(_flat(encodings, "ids", size), types, lengths)

    def _raise_named(self, texts: Texts, first: int, error: Exception) -> None:
        for number, text in enumerate(texts, first):
            try:
                self._tokenizer.encode_batch_fast([text])
            except Exception as its_own:
                raise type(its_own)(f"text {number}, {_shown(text)}, cannot be tokenized: {its_own}") from error
        raise error


def _flat(encodings: list[Encoding], name: str, size: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(map(attrgetter(name), encodings)), np.int32, size)


def _shown(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _copy_of(original: Tokenizer) -> Tokenizer:
    """A tokenizer with the original's vocabulary and the same tokens. Raises Unsupported if its tokens would differ."""
    copied = Tokenizer(original.model)
    for name in COMPONENTS:
        setattr(copied, name, getattr(original, name))
    added = original.get_added_tokens_decoder()
    for special, tokens in groupby((added[index] for index in sorted(added)), key=attrgetter("special")):
        (copied.add_special_tokens if special else copied.add_tokens)(list(tokens))
    if copied.get_added_tokens_decoder() != added:
        raise Unsupported("the ids of the tokenizer's added tokens change when they are added again")
    # If its normalizer was changed in place, the original may still look for added tokens as the old one wrote them.
    normalized = [token.content for token in added.values() if token.normalized]
    if type(original.normalizer) is normalizers.BertNormalizer:
        # None of its options changes such words.
        normalized = [content for content in normalized if not re.fullmatch("[a-z0-9]+", content)]
    if normalized:
        ours, theirs = (x.encode_batch_fast(normalized, add_special_tokens=False) for x in (copied, original))
        for mine, its_own in zip(ours, theirs, strict=True):
            kept = [id for id, keep in zip(its_own.ids, its_own.attention_mask, strict=True) if keep]
            if mine.ids != kept:
                raise Unsupported("the tokenizer's normalizer was changed after tokens were added")
    return copied
