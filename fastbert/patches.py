"""Detects process-wide patches of the code of torch and transformers that fastbert replaces.

A method patched on a class, a class replaced in its module and a newly registered attention function change every model
of the process. They leave no trace on module instances, and the fused ops would ignore them.
"""

import inspect
from collections.abc import Callable
from operator import attrgetter

import torch.nn.functional as F
from torch import nn
from transformers import activations
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as hf

from fastbert._compat import MAKES_MASKS, constant_in_graphs, registered

BERT_CLASSES = (
    "BertEmbeddings", "BertLayer", "BertAttention", "BertSelfAttention", "BertSelfOutput", "BertIntermediate",
    "BertOutput", "BertPooler",
)  # fmt: skip
_ACTIVATIONS = ("GELUActivation", "NewGELUActivation", "FastGELUActivation", "GELUTanh", "LinearActivation")
# Class, method, and the original name of the class.
_FORWARDS = (
    *(
        (kind, "forward", kind.__name__)
        for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ReLU, nn.Tanh)
    ),
    *((getattr(activations, name), "forward", name) for name in _ACTIVATIONS),
    *((getattr(hf, name), "forward", name) for name in BERT_CLASSES),
)
_FEED_FORWARD = hf.BertLayer, "feed_forward_chunk", "BertLayer"
# Replaced by our model and encoder, not by blocks.
_MODEL_METHODS = (hf.BertModel, "forward", "BertModel"), (hf.BertEncoder, "forward", "BertEncoder")
_MAKES_MASKS = hf.BertModel, MAKES_MASKS, "BertModel"


def _is_original(kind: type, method: str, name: str) -> bool:
    """True if the class has its original name and the method, with its wrappers, comes from the class's library."""
    function = getattr(kind, method)
    plain = inspect.unwrap(function)
    homes = [getattr(x, "__globals__", {}).get("__name__", "") for x in (plain, function)]
    library = kind.__module__.partition(".")[0]
    return (
        kind.__qualname__ == name
        and library in ("torch", "transformers")
        and homes[0] == kind.__module__
        and homes[1].partition(".")[0] == library
        # In parts, because torch 2.13 compares a function's __qualname__ wrongly in functions that it compiles.
        and plain.__qualname__.split(".") == [name, method]
    )


def _original(kind: type, method: str, name: str) -> Callable | None:
    """The method when this module is imported; None if it is not original."""
    return getattr(kind, method) if _is_original(kind, method, name) else None


_ORIGINALS, _ORIGINAL_MODELS = ([_original(*method) for method in methods] for methods in (_FORWARDS, _MODEL_METHODS))
_ORIGINAL_FEED_FORWARD = _original(*_FEED_FORWARD)
_KINDS, _MODEL_KINDS = ([kind for kind, _, _ in methods] for methods in (_FORWARDS, _MODEL_METHODS))
_forward_of = attrgetter("forward")
_ORIGINAL_MASKS = _original(*_MAKES_MASKS)
_FUNCTIONS = F.scaled_dot_product_attention, F.linear, F.layer_norm, F.embedding, F.gelu
_EAGER = hf.eager_attention_forward if hf.eager_attention_forward.__module__ == hf.__name__ else None


def _first_replaced(methods: tuple, originals: list) -> str | None:
    for (kind, method, name), before in zip(methods, originals, strict=True):
        if getattr(kind, method) is not before and not _is_original(kind, method, name):
            return f"{name}.{method} is patched or replaced for every model"
    return None


@constant_in_graphs
def replaced() -> str | None:
    """Return which patch of the code that the fused ops replace is active, as a reason; None if there is none."""
    # This runs in every call. Comparing lists is quick, because it compares identities first.
    if [*map(_forward_of, _KINDS)] != _ORIGINALS and (reason := _first_replaced(_FORWARDS, _ORIGINALS)):
        return reason
    if hf.BertLayer.feed_forward_chunk is not _ORIGINAL_FEED_FORWARD and not _is_original(*_FEED_FORWARD):
        return "BertLayer.feed_forward_chunk is patched or replaced for every model"
    if (F.scaled_dot_product_attention, F.linear, F.layer_norm, F.embedding, F.gelu) != _FUNCTIONS:
        return "a function of torch.nn.functional is replaced"
    sdpa, eager = registered(ALL_ATTENTION_FUNCTIONS, "sdpa"), registered(ALL_ATTENTION_FUNCTIONS, "eager")
    eager = hf.eager_attention_forward if eager is None else eager
    if sdpa is not sdpa_attention_forward or eager is not _EAGER or hf.eager_attention_forward is not _EAGER:
        return "another function is registered for attention"
    return None


@constant_in_graphs
def replaced_in_models() -> str | None:
    """Return which forward that our model and encoder replace is patched, as a reason; None if none is."""
    if [*map(_forward_of, _MODEL_KINDS)] == _ORIGINAL_MODELS:
        return None
    return _first_replaced(_MODEL_METHODS, _ORIGINAL_MODELS)


@constant_in_graphs
def replaced_forward(kind: type) -> str | None:
    """Return that the forward of a class of transformers is patched, as a reason; None if it is original."""
    name = kind.__name__
    return None if _is_original(kind, "forward", name) else f"{name}.forward is patched for every model"


@constant_in_graphs
def replaced_for_masks(model: hf.BertModel) -> str | None:
    """Return which function that makes a model's masks is patched or replaced, as a reason; None if none is."""
    if getattr(getattr(model, MAKES_MASKS), "__func__", None) is not _ORIGINAL_MASKS:
        return "its _create_attention_masks is patched"
    functions = registered(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa"), registered(ALL_MASK_ATTENTION_FUNCTIONS, "eager")
    if functions != (sdpa_mask, eager_mask) or hf.create_bidirectional_mask is not create_bidirectional_mask:
        return "another function is registered for masks"
    return None
