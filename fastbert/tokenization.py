"""Texts as packed token ids by the `tokenizers` library itself, token by token those of transformers' wrapper.

The wrapper's own work, Python lists and padded tensors of what the library gives, takes several times as long as
tokenizing. It is asked for one text only, so that it sets truncation as it would for all.
"""

import copy
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, count, groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastbert._compat import TOKENIZES, set_backend_tokenizer
from fastbert.fusion import class_name

Texts = Sequence[str] | Sequence[Sequence[str]]
# What of the wrapper makes tokens of texts; a class that derives from it may have its own.
METHODS = {
    name: getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "set_truncation_and_padding", *TOKENIZES)
}
SEQUENCES = (normalizers.Sequence, pre_tokenizers.Sequence)
COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor")
SERVED_OUTPUTS = {"input_ids", "token_type_ids", "attention_mask"}


class Unserved(Exception):
    """Why texts have to go through the original code; empty where that is no news."""


class PackedTokens(NamedTuple):
    """The tokens of N texts, laid end to end: input_ids and token_type_ids int32 [T] (None if the wrapper gives none),
    lengths int64 [N]."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    lengths: np.ndarray


def why_wrapper(tokenizer: object) -> str | None:
    """Why the tokens of a tokenizer are the wrapper's affair; None if `PackingTokenizer` may serve it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return f"a {class_name(tokenizer)} does not tokenize by the tokenizers library"
    for name, own in METHODS.items():
        if name in vars(tokenizer) or getattr(type(tokenizer), name) is not own:
            return f"{class_name(tokenizer)}.{name} is not transformers' own"
    if tokenizer.padding_side != "right":
        return f"padding_side={tokenizer.padding_side!r} lets positions depend on the batch"
    for name in COMPONENTS:
        if _is_in_python(getattr(tokenizer.backend_tokenizer, name)):
            return f"the {name} of its tokenizer is written in Python"
    return None


def _is_in_python(component: object) -> bool:
    """Whether a component, or one of a sequence, is somebody's class, which is wrapped in these; the library's derive
    from them."""
    if type(component) in SEQUENCES:
        with suppress(IndexError):
            for place in count():
                if _is_in_python(component[place]):
                    return True
        return False
    return type(component) in (normalizers.Normalizer, pre_tokenizers.PreTokenizer)


class PackingTokenizer:
    """The tokens that a tokenizer of transformers' gives for texts, or pairs of texts, called with these options.

    It works on a copy, as truncation and padding are state of the tokenizer: the user's own is never touched. The copy
    shares the vocabulary and is made in a tenth of a millisecond, and another half for each 100 added tokens; so there
    is one for each call, and no change of the original's is ever missed.

    tokenizer: one of which `why_wrapper` says nothing. options: truncation, max_length, and padding, which has to be
    True or "longest". Raises Unserved for a tokenizer or options that are the wrapper's affair, and what the wrapper
    raises.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, **options):
        padding = options.get("padding")
        if padding not in (True, "longest"):
            raise Unserved(f"padding={padding!r} is asked for")
        self._tokenizer = _copy_of(tokenizer.backend_tokenizer)
        wrapper = copy.copy(tokenizer)
        set_backend_tokenizer(wrapper, self._tokenizer)
        found = wrapper(["a"], **options)
        if not {"input_ids", "attention_mask"} <= found.keys() <= SERVED_OUTPUTS:
            raise Unserved(f"the tokenizer gives {', '.join(found)}")
        self._gives_types = "token_type_ids" in found
        self._tokenizer.no_padding()

    def __call__(self, texts: Texts, first: int = 0) -> PackedTokens:
        """Raises what the tokenizer raises for a text, and names the text, counted from `first`."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts)
        except Exception as error:
            self._raise_named(texts, first, error)
        lengths = np.array([len(x) for x in encodings], dtype=np.int64)
        size = int(lengths.sum())
        types = None
        if self._gives_types:
            # A type belongs to one of the two texts or to a special token: the longest encoding has all that there are.
            paired = not isinstance(texts[0], str)
            has_types = paired or any(encodings[int(lengths.argmax())].type_ids)
            types = _flat(encodings, "type_ids", size) if has_types else np.zeros(size, np.int32)
        return PackedTokens(_flat(encodings, "ids", size), types, lengths)

    def _raise_named(self, texts: Texts, first: int, error: Exception) -> None:
        for place, text in enumerate(texts, first):
            try:
                self._tokenizer.encode_batch_fast([text])
            except Exception as its_own:
                raise type(its_own)(f"text {place}, {_shown(text)}, cannot be tokenized: {its_own}") from error
        raise error


def _flat(encodings: list[Encoding], name: str, size: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(map(attrgetter(name), encodings)), np.int32, size)


def _shown(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _copy_of(original: Tokenizer) -> Tokenizer:
    """A tokenizer that makes the same tokens and shares the original's vocabulary. Raises Unserved if it does not."""
    copied = Tokenizer(original.model)
    for name in COMPONENTS:
        setattr(copied, name, getattr(original, name))
    added = original.get_added_tokens_decoder()
    for special, tokens in groupby((added[index] for index in sorted(added)), key=attrgetter("special")):
        (copied.add_special_tokens if special else copied.add_tokens)(list(tokens))
    if copied.get_added_tokens_decoder() != added:
        raise Unserved("the tokenizer's added tokens have ids that adding them again does not give")
    # A tokenizer whose normalizer was changed in place goes on looking for what the old one had made of these.
    normalized = [token.content for token in added.values() if token.normalized]
    if type(original.normalizer) is normalizers.BertNormalizer:
        # However it is set, it leaves such words as they are.
        normalized = [content for content in normalized if not re.fullmatch("[a-z0-9]+", content)]
    if normalized:
        ours, theirs = (x.encode_batch_fast(normalized, add_special_tokens=False) for x in (copied, original))
        for mine, its_own in zip(ours, theirs, strict=True):
            kept = [id for id, keep in zip(its_own.ids, its_own.attention_mask, strict=True) if keep]
            if mine.ids != kept:
                raise Unserved("the tokenizer's normalizer was changed after tokens were added")
    return copied
