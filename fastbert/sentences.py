"""Patches of sentence-transformers' modules: packed `encode` and `predict`, the op `pool`, and masks on the host.

Methods are patched on the instances. The classes stay those of sentence-transformers, and so do saved folders.
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert import inference, ops
from fastbert._compat import INFERENCE, REPLICATE, is_compiled
from fastbert.inference import sentence_transformers_class
from fastbert.inputs import KEYWORDS
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing
from fastbert.ops.eager import sequence_of
from fastbert.tokenization import Unsupported
from fastbert.tokens import layout_from_mask

# Pooling mode of sentence-transformers -> mode of `ops.pool`.
MODES = {"cls": "first", "mean": "mean"}
# Features that change how Pooling weighs tokens, which `ops.pool` does not support.
WEIGHTS = ("cls_token_embeddings", "token_weights_sum")
# The feature that holds a batch's mask on the host.
HOST_MASK = "attention_mask_on_host"
# True while the batches of `preprocess` reach `forward` unchanged.
_keeps_host_mask = ContextVar("keeps_host_mask", default=False)
# Model class -> its `_accepted_features`. Not functools.cache, of which torch.compile warns.
_ACCEPTED: dict[type, frozenset[str]] = {}


class Patch:
    """Replaces a method of a module: calls function(module, *args, **kwargs)."""

    def __init__(self, function: Callable, module: nn.Module):
        # A weak reference: a reference cycle would keep the module until the next garbage collection.
        self.function, self._module = function, weakref.ref(module)

    def __call__(self, *args, **kwargs):
        return self.function(self._module(), *args, **kwargs)

    def __reduce__(self):
        return Patch, (self.function, self._module())


class OnHost:
    """Hides an array in a batch. A tensor would be moved to the device; an array would be an input of torch.compile."""

    def __init__(self, array: np.ndarray):
        self.array = array


def _replicate(module: nn.Module) -> nn.Module:
    """Make a replica for `nn.DataParallel`, whose patches call the replica."""
    replica = getattr(type(module), REPLICATE)(module)
    for name, patched in list(vars(replica).items()):
        if isinstance(patched, Patch):
            vars(replica)[name] = Patch(patched.function, replica)
    return replica


@contextmanager
def keep_host_masks() -> Iterator[None]:
    """Within the block, on this thread, `preprocess` also keeps the mask on the host, for a model on a device.

    Code that reorders or cuts a batch must change the mask in its `OnHost` in the same way.
    """
    token = _keeps_host_mask.set(True)
    try:
        yield
    finally:
        _keeps_host_mask.reset(token)


def _inference(encoder: nn.Module, *args, **kwargs):
    """The class's own `_inference`, in which the batches of `preprocess` reach `forward` unchanged."""
    with keep_host_masks():
        return getattr(type(encoder), INFERENCE)(encoder, *args, **kwargs)


def _encode(encoder: nn.Module, *args, **kwargs):
    """SentenceTransformer._inference on packed batches, or the original if they are unsupported."""
    return _packed_or_original(inference.encode, encoder, *args, **kwargs)


def _predict(encoder: nn.Module, *args, **kwargs):
    """CrossEncoder._inference on packed batches, or the original if they are unsupported."""
    return _packed_or_original(inference.predict, encoder, *args, **kwargs)


def _packed_or_original(function: Callable, encoder: nn.Module, *args, **kwargs):
    try:
        return function(encoder, *args, **kwargs)
    except Unsupported as error:
        if reason := str(error):
            backend.warn_once(logging.INFO, f"texts go through sentence-transformers' own code: {reason}")
    return _inference(encoder, *args, **kwargs)


def _preprocess(transformer: Any, *args, **kwargs) -> dict:
    """Transformer.preprocess. Within `keep_host_masks`, also keeps the mask on the host for our models on a device."""
    features = type(transformer).preprocess(transformer, *args, **kwargs)
    mask, model = features.get("attention_mask"), transformer.model
    keeps = _keeps_host_mask.get() and model.device.type != "cpu" and _is_ours(model)
    if keeps and isinstance(mask, Tensor) and mask.device.type == "cpu":
        features[HOST_MASK] = OnHost(mask.numpy())
    return features


def _is_ours(module: nn.Module) -> bool:
    """Whether the class is fastbert's. Other heads may need the mask on the device."""
    return type(module).__module__.startswith("fastbert.")


def _forward(transformer: Any, features: dict, **kwargs) -> dict:
    """Transformer.forward. Passes the mask on the host to the model, so that memory follows the number of tokens."""
    on_host, mask = features.pop(HOST_MASK, None), features.get("attention_mask")
    if mask is None or "attention_mask" in kwargs:
        pass
    elif "query_expansion_positions" in features:
        # The hidden states of masked tokens are needed here. A 4-D mask keeps all tokens.
        kwargs["attention_mask"] = mask.bool()[:, None, None]
    # An input on the host keeps a compiled model out of CUDA graphs. A batch padded since then has a larger mask.
    elif on_host is not None and not _is_compiled(transformer.model) and mask.shape == on_host.array.shape:
        kwargs["attention_mask"] = torch.from_numpy(on_host.array)
    if not _is_ours(transformer.model):
        return type(transformer).forward(transformer, features, **kwargs)
    # Features may hold outputs of an earlier forward, which our models reject and transformers' models ignore.
    accepted = _accepted_features(type(transformer.model))
    inputs = {name: value for name, value in features.items() if name in accepted}
    features.update(type(transformer).forward(transformer, inputs, **kwargs))
    return features


def _is_compiled(model: nn.Module) -> bool:
    return is_tracing() or is_compiled(model)


def _accepted_features(model_class: type[nn.Module]) -> frozenset[str]:
    """The features that Transformer.forward or our model reads."""
    if model_class not in _ACCEPTED:
        _ACCEPTED[model_class] = frozenset({*inspect.signature(model_class.forward).parameters, *KEYWORDS, "modality"})
    return _ACCEPTED[model_class]


def _pool(pooling: Any, features: dict, **kwargs) -> dict:
    """Pooling.forward, in the op `pool` if it supports the mode and no gradients are recorded. token_embeddings
    [B, S, E] -> sentence_embedding [B, E]; or [1, T, E] of N packed texts -> [N, E]."""
    hidden, mask = features["token_embeddings"], features.get("attention_mask")
    mode, cu_seqlens = _op_mode(pooling), features.get("cu_seq_lens_q")
    unsupported = hidden.ndim != 3 or (cu_seqlens is None) == (mask is None)
    excludes_prompt = not pooling.include_prompt and "prompt_length" in features
    if _records() or mode is None or unsupported or excludes_prompt or not features.keys().isdisjoint(WEIGHTS):
        given = features if cu_seqlens is None or _records() else _padded(features)
        features["sentence_embedding"] = type(pooling).forward(pooling, given, **kwargs)["sentence_embedding"]
        return features
    if cu_seqlens is not None:
        features["sentence_embedding"] = ops.pool(hidden.flatten(0, 1), cu_seqlens.to(torch.int32), mode)
        return features
    if mask is None or mask.shape != hidden.shape[:2]:
        return type(pooling).forward(pooling, features, **kwargs)
    batch_size, seq_len, _ = hidden.shape
    layout = layout_from_mask(mask, batch_size, seq_len, hidden.device)
    if layout.padded:  # on a device without a packing kernel
        return type(pooling).forward(pooling, features, **kwargs)
    pooled = ops.pool(hidden.flatten(0, 1), layout.cu_seqlens, mode, indices=layout.indices)
    features["sentence_embedding"] = pooled
    return features


def _padded(features: dict) -> dict:
    """Features of N packed texts, token_embeddings [1, T, E], as those of a padded batch: [N, S, E] and a mask. For
    packed features sentence-transformers' Pooling waits for the GPU and adds in no fixed order."""
    hidden, cu_seqlens = features["token_embeddings"][0], features["cu_seq_lens_q"]
    seq_len = features.get("max_length_q")
    if not isinstance(seq_len, int):
        return features
    sequence, indices = sequence_of(cu_seqlens, len(hidden)), torch.arange(len(hidden), device=hidden.device)
    indices = sequence * seq_len + indices - cu_seqlens[sequence]
    mask = torch.arange(seq_len, device=hidden.device) < cu_seqlens.diff()[:, None]
    rest = {name: value for name, value in features.items() if name != "cu_seq_lens_q"}
    padded = ops.unpack(hidden, indices, len(cu_seqlens) - 1, seq_len)
    return rest | {"token_embeddings": padded, "attention_mask": mask.long()}


def _op_mode(pooling: Any) -> str | None:
    """The mode of `ops.pool` that does what a Pooling module does; None if there is none."""
    return MODES.get(pooling.pooling_mode) if isinstance(pooling.pooling_mode, str) else None


def _normalize(normalize: Any, features: dict) -> dict:
    """Normalize.forward, in the op `pool` if no gradients are recorded: vectors [B, E] of length 1."""
    vectors = features.get(normalize.module_input_name)
    if vectors is None or vectors.ndim != 2 or _records():
        return type(normalize).forward(normalize, features)
    cu_seqlens = torch.arange(len(vectors) + 1, dtype=torch.int32, device=vectors.device)
    features[normalize.module_output_name] = ops.pool(vectors, cu_seqlens, "first", normalize=True)
    return features


def _records() -> bool:
    return torch.is_grad_enabled() or is_tracing()


# Class of sentence-transformers -> the functions that replace its methods.
PATCHES: dict[str | None, dict[str, Callable]] = {
    "SentenceTransformer": {INFERENCE: _encode},
    "SparseEncoder": {INFERENCE: _inference},
    "MultiVectorEncoder": {INFERENCE: _inference},
    "CrossEncoder": {INFERENCE: _predict},
    "Transformer": {"preprocess": _preprocess, "forward": _forward, REPLICATE: _replicate},
    "Pooling": {"forward": _pool, REPLICATE: _replicate},
    "Normalize": {"forward": _normalize, REPLICATE: _replicate},
}


def patch(root: nn.Module) -> None:
    """Patch all modules of sentence-transformers in a model, except methods that are patched already."""
    modules = list(root.modules())
    # Pool only right after a Transformer: another module before Pooling may give a mask of other values than 0 and 1.
    previous = {b: a for parent in modules for a, b in pairwise(parent.children())}
    for module in modules:
        kind = sentence_transformers_class(module)
        if kind == "Pooling" and sentence_transformers_class(previous.get(module)) != "Transformer":
            continue
        if kind == "Transformer" and not any(map(_is_ours, module.modules())):
            continue
        for name, function in PATCHES.get(kind, {}).items():
            if hasattr(module, name) and name not in module.__dict__:
                module.__dict__[name] = Patch(function, module)


def unpatch(root: nn.Module) -> None:
    """Take back `patch`; other patches stay."""
    for module in root.modules():
        for name in PATCHES.get(sentence_transformers_class(module), {}):
            if isinstance(module.__dict__.get(name), Patch):
                del module.__dict__[name]


def pools(module: nn.Module) -> bool:
    """Whether a module's work is done by the op `pool`."""
    forward = module.__dict__.get("forward")
    function = forward.function if isinstance(forward, Patch) else None
    return function is _normalize or (function is _pool and _op_mode(module) is not None)
