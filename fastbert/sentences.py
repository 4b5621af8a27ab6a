"""sentence-transformers' modules on our ops: its pooling and normalizing in `pool`, and the tokens counted on the host.

Methods are patched on the instances, so that classes, and with them saved folders, stay sentence-transformers' own.
"""

import functools
import inspect
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.eager import is_tracing
from fastbert.inputs import KEYWORDS
from fastbert.tokens import layout_from_mask

# Pooling's names of modes -> those of `ops.pool`.
MODES = {"cls": "first", "mean": "mean"}
# What changes how Pooling weighs tokens: it then does its own work.
WEIGHED = ("cu_seq_lens_q", "cls_token_embeddings", "token_weights_sum")
# The mask of a batch as a numpy array, which nothing moves to a device.
HOST_MASK = "attention_mask_on_host"


class Patch:
    """A function of a module, and of a call's arguments, in the place of one of its methods."""

    def __init__(self, function: Callable, module: nn.Module):
        # Not the module itself, which then would be freed by the garbage collector alone.
        self.function, self._module = function, weakref.ref(module)

    def __call__(self, *args, **kwargs):
        return self.function(self._module(), *args, **kwargs)

    def __reduce__(self):
        return Patch, (self.function, self._module())


def _preprocess(transformer: nn.Module, *args, **kwargs) -> dict:
    """Transformer.preprocess, with the mask on the host in the features of a model of ours on a device."""
    features = type(transformer).preprocess(transformer, *args, **kwargs)
    mask, model = features.get("attention_mask"), transformer.model
    if isinstance(mask, Tensor) and mask.device.type == "cpu" and model.device.type != "cpu" and _is_ours(model):
        features[HOST_MASK] = mask.numpy()
    return features


def _is_ours(model: nn.Module) -> bool:
    """Whether a model takes a mask on the host: somebody's head may look at it on the device."""
    return type(model).__module__.startswith("fastbert.")


def _forward(transformer: nn.Module, features: dict, **kwargs) -> dict:
    """Transformer.forward, which lets the model have the mask on the host: memory then follows the tokens."""
    on_host = features.pop(HOST_MASK, None)
    if not _is_ours(transformer.model):
        return type(transformer).forward(transformer, features, **kwargs)
    mask = features.get("attention_mask")
    # A batch that was cut since has another mask.
    if on_host is not None and mask is not None and mask.shape == on_host.shape and "attention_mask" not in kwargs:
        kwargs["attention_mask"] = torch.from_numpy(on_host)
    # Features that went through before hold outputs, too, which transformers' models swallow.
    taken = _taken_by(type(transformer.model))
    inputs = {name: value for name, value in features.items() if name in taken}
    features.update(type(transformer).forward(transformer, inputs, **kwargs))
    return features


@functools.cache
def _taken_by(model_class: type) -> frozenset[str]:
    """The features that Transformer.forward looks at, for a model of ours."""
    return frozenset({*inspect.signature(model_class.forward).parameters, *KEYWORDS, "modality"})


def _pool(pooling: nn.Module, features: dict, **kwargs) -> dict:
    """Pooling.forward, where no gradients are recorded in the op: token_embeddings [B, S, E] -> sentence_embedding
    [B, E]."""
    hidden, mask = features["token_embeddings"], features.get("attention_mask")
    mode = MODES.get(pooling.pooling_mode)
    served = mode is not None and mask is not None and hidden.ndim == 3 and mask.shape == hidden.shape[:2]
    excludes_prompt = not pooling.include_prompt and "prompt_length" in features
    if not served or excludes_prompt or not features.keys().isdisjoint(WEIGHED) or _records():
        return type(pooling).forward(pooling, features, **kwargs)
    batch_size, seq_len, _ = hidden.shape
    layout = layout_from_mask(mask, batch_size, seq_len, 1, hidden.device)
    if layout.padded:  # on a device where no kernel packs
        return type(pooling).forward(pooling, features, **kwargs)
    pooled = ops.pool(hidden.flatten(0, 1), layout.cu_seqlens, mode, indices=layout.indices)
    features["sentence_embedding"] = pooled
    return features


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
    "Transformer": {"preprocess": _preprocess, "forward": _forward},
    "Pooling": {"forward": _pool},
    "Normalize": {"forward": _normalize},
}


def _patches(module: nn.Module) -> dict[str, Callable]:
    kind = type(module)
    return PATCHES.get(kind.__name__, {}) if kind.__module__.startswith("sentence_transformers.") else {}


def patch(root: nn.Module) -> None:
    """Patch the modules of sentence-transformers' in a model, but for methods that somebody patched already."""
    for module in root.modules():
        for name, function in _patches(module).items():
            if hasattr(module, name) and name not in module.__dict__:
                module.__dict__[name] = Patch(function, module)


def unpatch(root: nn.Module) -> None:
    for module in root.modules():
        for name in _patches(module):
            if isinstance(module.__dict__.get(name), Patch):
                del module.__dict__[name]


def is_pooling(module: nn.Module) -> bool:
    """Whether a module pools in the op."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, Patch) and forward.function is _pool and module.pooling_mode in MODES
