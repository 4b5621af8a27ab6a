"""fastbert: a drop-in BERT encoder for GPUs that runs as eager PyTorch everywhere else.

``from fastbert import BertModel`` replaces ``from transformers import BertModel``. Names are resolved on first use
(PEP 562), so that importing the package needs neither a GPU nor Triton and costs next to nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

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
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
