"""Code of torch and transformers that the fused ops stand for, and whether somebody replaced it for every model.

A method patched on a class, a class replaced in its module and an attention function registered anew change every model
of the process. No module shows it, and the ops would go on computing what the code did before.
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
# Class, method, and the name that the class has where nobody replaced it.
_FORWARDS = (
    *(
        (kind, "forward", kind.__name__)
        for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ReLU, nn.Tanh)
    ),
    *((getattr(activations, name), "forward", name) for name in _ACTIVATIONS),
    *((getattr(hf, name), "forward", name) for name in BERT_CLASSES),
)
_FEED_FORWARD = hf.BertLayer, "feed_forward_chunk", "BertLayer"
# What no block stands for, but the model and its encoder.
_MODEL_METHODS = (hf.BertModel, "forward", "BertModel"), (hf.BertEncoder, "forward", "BertEncoder")
_MAKES_MASKS = hf.BertModel, MAKES_MASKS, "BertModel"


def _is_original(kind: type, method: str, name: str) -> bool:
    """Whether a class has its own name, and whether its method and the wrappers around it are its library's."""
    function = getattr(kind, method)
    plain = inspect.unwrap(function)
    homes = [getattr(x, "__globals__", {}).get("__name__", "") for x in (plain, function)]
    library = kind.__module__.partition(".")[0]
    return (
        kind.__qualname__ == name
        and library in ("torch", "transformers")
        and homes[0] == kind.__module__
        and homes[1].partition(".")[0] == library
        and plain.__qualname__ == f"{name}.{method}"
    )


def _original(kind: type, method: str, name: str) -> Callable | None:
    """A method as it is when this module is imported, None where it is no longer original."""
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
    """What was replaced of the code that the ops stand for; None if nothing was."""
    # Every call asks: lists are compared by identities first.
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
    """What was replaced of the code that our model and encoder stand for; None if nothing was."""
    if [*map(_forward_of, _MODEL_KINDS)] == _ORIGINAL_MODELS:
        return None
    return _first_replaced(_MODEL_METHODS, _ORIGINAL_MODELS)


@constant_in_graphs
def replaced_forward(kind: type) -> str | None:
    """Whether the forward of a class of transformers' was replaced, as a reason; None if it was not."""
    name = kind.__name__
    return None if _is_original(kind, "forward", name) else f"{name}.forward is patched for every model"


@constant_in_graphs
def replaced_for_masks(model: hf.BertModel) -> str | None:
    """What was replaced of the code by which transformers makes a model's masks; None if nothing was."""
    if getattr(getattr(model, MAKES_MASKS), "__func__", None) is not _ORIGINAL_MASKS:
        return "its _create_attention_masks is patched"
    functions = registered(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa"), registered(ALL_MASK_ATTENTION_FUNCTIONS, "eager")
    if functions != (sdpa_mask, eager_mask) or hf.create_bidirectional_mask is not create_bidirectional_mask:
        return "another function is registered for masks"
    return None
