"""sentence-transformers' modules on our ops: its pooling and normalizing in `pool`, and the tokens counted on the host.

Methods are patched on the instances, so that classes, and with them saved folders, stay sentence-transformers' own.
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fastbert import inference, ops
from fastbert._compat import INFERENCE, REPLICATE, is_compiled
from fastbert.inference import kind_of
from fastbert.inputs import KEYWORDS
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing
from fastbert.ops.eager import sequence_of
from fastbert.tokenization import Unserved
from fastbert.tokens import layout_from_mask

# Pooling's names of modes -> those of `ops.pool`.
MODES = {"cls": "first", "mean": "mean"}
# What changes how Pooling weighs tokens: it then does its own work.
WEIGHED = ("cls_token_embeddings", "token_weights_sum")
# The feature that is the mask of a batch on the host.
HOST_MASK = "attention_mask_on_host"
# Whether nobody comes between `preprocess` and `forward`, who might change the mask or the order of a batch.
_carries = ContextVar("carries", default=False)
# What `_taken_by` found for each class; torch.compile warns of functools.cache.
TAKEN: dict[type, frozenset[str]] = {}


class Patch:
    """A function of a module, and of a call's arguments, in the place of one of its methods."""

    def __init__(self, function: Callable, module: nn.Module):
        # Not the module itself, which then would be freed by the garbage collector alone.
        self.function, self._module = function, weakref.ref(module)

    def __call__(self, *args, **kwargs):
        return self.function(self._module(), *args, **kwargs)

    def __reduce__(self):
        return Patch, (self.function, self._module())


class OnHost:
    """Hides an array in a batch: a tensor would be moved to the device, an array be an input of a compiled model."""

    def __init__(self, array: np.ndarray):
        self.array = array


def _replicate(module: nn.Module) -> nn.Module:
    """The replica of `nn.DataParallel`, on a device of its own, whose methods are its own, too."""
    replica = getattr(type(module), REPLICATE)(module)
    for name, patched in list(vars(replica).items()):
        if isinstance(patched, Patch):
            vars(replica)[name] = Patch(patched.function, replica)
    return replica


@contextmanager
def carrying() -> Iterator[None]:
    """In the block, on this thread, `preprocess` also leaves the mask on the host, for a model on a device.

    Who then reorders or cuts a batch has to do so with the mask in its `OnHost`, too.
    """
    token = _carries.set(True)
    try:
        yield
    finally:
        _carries.reset(token)


def _inference(encoder: nn.Module, *args, **kwargs):
    """What `encode` and `predict` do with all texts: batches go from `preprocess` to `forward` as they are."""
    with carrying():
        return getattr(type(encoder), INFERENCE)(encoder, *args, **kwargs)


def _encode(encoder: nn.Module, *args, **kwargs):
    """SentenceTransformer._inference: by packed batches, or where these do not serve a call, as it is."""
    return _served(inference.encode, encoder, *args, **kwargs)


def _predict(encoder: nn.Module, *args, **kwargs):
    """CrossEncoder._inference, likewise."""
    return _served(inference.predict, encoder, *args, **kwargs)


def _served(function: Callable, encoder: nn.Module, *args, **kwargs):
    try:
        return function(encoder, *args, **kwargs)
    except Unserved as error:
        if reason := str(error):
            backend.warn_once(logging.INFO, f"texts go through sentence-transformers' own code: {reason}")
    return _inference(encoder, *args, **kwargs)


def _preprocess(transformer: nn.Module, *args, **kwargs) -> dict:
    """Transformer.preprocess, which while `carrying` leaves the mask on the host, for a model of ours on a device."""
    features = type(transformer).preprocess(transformer, *args, **kwargs)
    mask, model = features.get("attention_mask"), transformer.model
    carried = _carries.get() and model.device.type != "cpu" and _is_ours(model)
    if carried and isinstance(mask, Tensor) and mask.device.type == "cpu":
        features[HOST_MASK] = OnHost(mask.numpy())
    return features


def _is_ours(module: nn.Module) -> bool:
    """Whether a class is fastbert's. Only such a model takes a mask on the host: somebody's head may look at it on the
    device."""
    return type(module).__module__.startswith("fastbert.")


def _forward(transformer: nn.Module, features: dict, **kwargs) -> dict:
    """Transformer.forward, which lets the model have the mask on the host: memory then follows the tokens."""
    on_host, mask = features.pop(HOST_MASK, None), features.get("attention_mask")
    if mask is None or "attention_mask" in kwargs:
        pass
    elif "query_expansion_positions" in features:
        # Tokens that nobody attends to, of which the hidden states count: as a mask of scores it drops nothing.
        kwargs["attention_mask"] = mask.bool()[:, None, None]
    # An input on the host keeps a compiled model out of CUDA graphs. A batch that was padded since has another mask.
    elif on_host is not None and not _is_compiled(transformer.model) and mask.shape == on_host.array.shape:
        kwargs["attention_mask"] = torch.from_numpy(on_host.array)
    if not _is_ours(transformer.model):
        return type(transformer).forward(transformer, features, **kwargs)
    # Features that went through before hold outputs, too, which transformers' models swallow.
    taken = _taken_by(type(transformer.model))
    inputs = {name: value for name, value in features.items() if name in taken}
    features.update(type(transformer).forward(transformer, inputs, **kwargs))
    return features


def _is_compiled(model: nn.Module) -> bool:
    return is_tracing() or is_compiled(model)


def _taken_by(model_class: type) -> frozenset[str]:
    """The features that Transformer.forward looks at, for a model of ours."""
    if model_class not in TAKEN:
        TAKEN[model_class] = frozenset({*inspect.signature(model_class.forward).parameters, *KEYWORDS, "modality"})
    return TAKEN[model_class]


def _pool(pooling: nn.Module, features: dict, **kwargs) -> dict:
    """Pooling.forward, where no gradients are recorded in the op: token_embeddings [B, S, E], or of N packed texts
    [1, T, E] -> sentence_embedding [B, E] or [N, E]."""
    hidden, mask = features["token_embeddings"], features.get("attention_mask")
    mode, bounds = _only_mode(pooling), features.get("cu_seq_lens_q")
    served = mode is not None and hidden.ndim == 3 and (bounds is None) != (mask is None)
    excludes_prompt = not pooling.include_prompt and "prompt_length" in features
    if _records() or not served or excludes_prompt or not features.keys().isdisjoint(WEIGHED):
        given = features if bounds is None or _records() else _padded(features)
        features["sentence_embedding"] = type(pooling).forward(pooling, given, **kwargs)["sentence_embedding"]
        return features
    if bounds is not None:
        features["sentence_embedding"] = ops.pool(hidden.flatten(0, 1), bounds.to(torch.int32), mode)
        return features
    if mask.shape != hidden.shape[:2]:
        return type(pooling).forward(pooling, features, **kwargs)
    batch_size, seq_len, _ = hidden.shape
    layout = layout_from_mask(mask, batch_size, seq_len, hidden.device)
    if layout.padded:  # on a device where no kernel packs
        return type(pooling).forward(pooling, features, **kwargs)
    pooled = ops.pool(hidden.flatten(0, 1), layout.cu_seqlens, mode, indices=layout.indices)
    features["sentence_embedding"] = pooled
    return features


def _padded(features: dict) -> dict:
    """Features of N packed texts, token_embeddings [1, T, E], as those of a padded batch, [N, S, E] and a mask: what
    sentence-transformers has for packed ones waits for a GPU, and adds there in no order."""
    hidden, bounds, longest = features["token_embeddings"][0], features["cu_seq_lens_q"], features.get("max_length_q")
    if not isinstance(longest, int):
        return features
    sequence, places = sequence_of(bounds, len(hidden)), torch.arange(len(hidden), device=hidden.device)
    places = sequence * longest + places - bounds[sequence]
    mask = torch.arange(longest, device=hidden.device) < bounds.diff()[:, None]
    rest = {name: value for name, value in features.items() if name != "cu_seq_lens_q"}
    padded = ops.unpack(hidden, places, len(bounds) - 1, longest)
    return rest | {"token_embeddings": padded, "attention_mask": mask.long()}


def _only_mode(pooling: nn.Module) -> str | None:
    """The name in `ops.pool` of what a module pools by; None for several modes and those that the op has not."""
    return MODES.get(pooling.pooling_mode) if isinstance(pooling.pooling_mode, str) else None


def _normalize(normalize: nn.Module, features: dict) -> dict:
    """Normalize.forward, where no gradients are recorded in the op: vectors [B, E] of length 1."""
    vectors = features.get(normalize.module_input_name)
    if vectors is None or vectors.ndim != 2 or _records():
        return type(normalize).forward(normalize, features)
    rows = torch.arange(len(vectors) + 1, dtype=torch.int32, device=vectors.device)
    features[normalize.module_output_name] = ops.pool(vectors, rows, "first", normalize=True)
    return features


def _records() -> bool:
    return torch.is_grad_enabled() or is_tracing()


# A class of sentence-transformers' -> what takes the place of its methods.
PATCHES = {
    "SentenceTransformer": {INFERENCE: _encode},
    "SparseEncoder": {INFERENCE: _inference},
    "MultiVectorEncoder": {INFERENCE: _inference},
    "CrossEncoder": {INFERENCE: _predict},
    "Transformer": {"preprocess": _preprocess, "forward": _forward, REPLICATE: _replicate},
    "Pooling": {"forward": _pool, REPLICATE: _replicate},
    "Normalize": {"forward": _normalize, REPLICATE: _replicate},
}


def _kind(module: nn.Module) -> str | None:
    """The name of a class of sentence-transformers' that is patched."""
    kind = kind_of(module)
    return kind if kind in PATCHES else None


def patch(root: nn.Module) -> None:
    """Patch the modules of sentence-transformers' in a model, but for methods that somebody patched already."""
    modules = list(root.modules())
    # A module before Pooling may weigh tokens by the mask; only the Transformer's own is one of zeros and ones.
    after = {b: a for parent in modules for a, b in pairwise(parent.children())}
    for module in modules:
        kind = _kind(module)
        if kind == "Pooling" and _kind(after.get(module)) != "Transformer":
            continue
        if kind is None or (kind == "Transformer" and not any(map(_is_ours, module.modules()))):
            continue
        for name, function in PATCHES[kind].items():
            if hasattr(module, name) and name not in module.__dict__:
                module.__dict__[name] = Patch(function, module)


def unpatch(root: nn.Module) -> None:
    for module in root.modules():
        for name in PATCHES.get(_kind(module), ()):
            if isinstance(module.__dict__.get(name), Patch):
                del module.__dict__[name]


def pools(module: nn.Module) -> bool:
    """Whether a module's work is done by the op `pool`."""
    forward = module.__dict__.get("forward")
    function = forward.function if isinstance(forward, Patch) else None
    return function is _normalize or (function is _pool and _only_mode(module) is not None)
