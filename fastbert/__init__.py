"""fastbert: a drop-in BERT encoder for GPUs that runs as eager PyTorch everywhere else.

``from fastbert import BertModel`` replaces ``from transformers import BertModel``. Names are resolved on first use
(PEP 562), so that importing the package needs neither a GPU nor Triton and costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastbert.automatic import cuda_graphs
    from fastbert.compilation import warmup
    from fastbert.configuration import BertConfig
    from fastbert.conversion import optimize, restore
    from fastbert.explanation import explain
    from fastbert.graphs import graphed
    from fastbert.heads import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )
    from fastbert.model import BertModel
    from fastbert.ops.backend import backend

__version__ = "0.1.0"

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "backend",
    "cuda_graphs",
    "explain",
    "graphed",
    "optimize",
    "restore",
    "warmup",
]
# Where each is defined.
_HOME = {
    "BertConfig": "configuration",
    "BertModel": "model",
    "BertForMaskedLM": "heads",
    "BertForMultipleChoice": "heads",
    "BertForNextSentencePrediction": "heads",
    "BertForPreTraining": "heads",
    "BertForQuestionAnswering": "heads",
    "BertForSequenceClassification": "heads",
    "BertForTokenClassification": "heads",
    "backend": "ops.backend",
    "cuda_graphs": "automatic",
    "explain": "explanation",
    "graphed": "graphs",
    "optimize": "conversion",
    "restore": "conversion",
    "warmup": "compilation",
}

if not TYPE_CHECKING:  # to a type checker, a module with a `__getattr__` has every name

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
