"""`explain`: which back end runs each block and op, and why not another."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf

from fastbert import automatic, inference, sentences
from fastbert.fusion import FusableBlock, LayerParts, class_name, dropout_reason, fused_linear, fused_parts, why_eager
from fastbert.heads import PARTS, PROJECTIONS, Head
from fastbert.ops import backend
from fastbert.pretrained import BertPreTrainedModel

KERNEL = "a kernel runs it"
# Libraries whose modules ignore the hidden states at padding.
LIBRARIES = ("fastbert", "torch", "transformers", "sentence_transformers", "peft", "accelerate")
OWN_CODE = (
    "hidden states at padding are zeros. Code that reads them, as for ColBERT's queries, must pass a 4-D mask, "
    "attention_mask[:, None, None].bool()"
)
Choice: TypeAlias = tuple[str, str, str]  # op, back end and reason


class Row(NamedTuple):
    """A row of `explain`: the back end of an op of a block, and the reason."""

    block: str
    op: str
    backend: str
    reason: str


class Explanation(list[Row]):
    """The result of `explain`: a row per block and op, notes, and lines on CUDA graphs. Prints equal layers as one."""

    def __init__(self, rows: Iterable[Row] = ()):
        super().__init__(rows)
        self.notes: list[str] = []
        self.graphs: list[str] = []

    def __str__(self) -> str:
        blocks: dict[str, list[Choice]] = {}
        for row in self:
            blocks.setdefault(row.block, []).append((row.op, row.backend, row.reason))
        rows = [Row("block", "op", "backend", "reason")]
        for choices, names in groupby(blocks, key=blocks.__getitem__):
            first, *rest = names
            rows += [Row(f"{first}-{rest[-1].rpartition('.')[2]}" if rest else first, *choice) for choice in choices]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] + self.notes + self.graphs)

    __repr__ = __str__


def explain(obj) -> Explanation:
    """Tell which back end runs each block and op of a fastbert model on its device, and why not another.

    obj: a model or an object that holds one, as for `optimize`. The back end is "triton" (our kernels), "eager" (the
    reference ops in plain PyTorch), "modules" (the block's own modules, so that hooks and adapters take part), or
    "unsupported" if "triton" was chosen and a call would raise. Notes tell whether the texts of a sentence-transformers
    model are packed, and name modules of unknown libraries that call the model. The last lines give the mode, buckets
    and memory of each model's CUDA graphs, or why there are none. Raises TypeError for an object without a fastbert
    encoder.
    """
    root = module_of(obj)
    if not any(isinstance(module, FusableBlock) for module in root.modules()):
        raise TypeError(f"{class_name(root)} contains no fastbert encoder: convert its BERT with fastbert.optimize")
    rows, chosen = Explanation(), backend.current_backend()
    weight = next(root.parameters(), None)
    projections = list(_projections(root))
    choices: Iterable[Choice]
    for name, block in root.named_modules():
        if isinstance(block, FusableBlock):
            choices = _choices_of_block(block)
        elif callers := [caller for linear, caller in projections if linear is block]:
            choices = [_choice_of_linear(block, callers[0])]
        elif sentences.pools(block) and weight is not None:
            choices = [_choice("pool", weight)]
        else:
            continue
        for op, back_end, reason in choices:
            rows.append(Row(name, op, "unsupported" if chosen == "triton" != back_end else back_end, reason))
    for name, module in root.named_modules():
        if (kind := inference.sentence_transformers_class(module)) in inference.MODELS:
            why = inference.why_unsupported(module)
            through = f"through sentence-transformers' own code: {why}" if why else "tokenized ahead and packed"
            rows.notes.append(f"the texts of {name or kind} go {through}")
        if _is_own_code(module) and not any(_is_own_code(part) for part in module.modules() if part is not module):
            what = f"{name or type(module).__qualname__}, a {class_name(module)}"
            rows.notes.append(f"{what}, calls BertModel: {OWN_CODE}")
    rows.graphs = list(_graphs(root))
    return rows


def _graphs(root: nn.Module) -> Iterator[str]:
    """A line for each fastbert model, except for models inside another one that have no graphs of their own."""
    models = {name: module for name, module in root.named_modules() if isinstance(module, BertPreTrainedModel)}
    inner = {part for model in models.values() for part in model.modules() if part is not model}
    for name, model in models.items():
        if model not in inner or automatic.graphs_of(model):
            yield f"CUDA graphs of {name or type(model).__name__}: {automatic.describe(model)}"


def _projections(root: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """The linear layers of our heads, each with the module that calls it, which may be transformers'."""
    for module in (part for head in root.modules() if isinstance(head, Head) for part in head.modules()):
        for kind, names in PROJECTIONS.items():
            if isinstance(module, kind):
                yield from ((getattr(module, name, None), module) for name in names)


def _is_own_code(module: nn.Module) -> bool:
    """Whether a module contains a BertModel, and its forward is not of a library in LIBRARIES."""
    known = type(module).forward.__module__.partition(".")[0] in LIBRARIES
    return not known and any(isinstance(part, hf.BertModel) for part in module.modules())


def _choice(op: str, weight: Tensor) -> Choice:
    """The choice for an op on tensors like the weight, without gradients."""
    reason = backend.why_eager(op, weight.device, weight.dtype)
    return op, "eager" if reason else "triton", reason or KERNEL


def _choice_of_linear(module: nn.Module, caller: nn.Module) -> Choice:
    """The choice for a linear layer of a head."""
    linear, reason = fused_linear(module)
    if not isinstance(caller, (Head, *PARTS.values())):
        linear, reason = None, f"it is called by a {class_name(caller)}"
    if linear is None:
        return "linear_activation", "modules", reason or ""
    return _choice("linear_activation", linear.weight)


def _choices_of_block(block: FusableBlock) -> Iterator[Choice]:
    """The choice for each op of a block."""
    weight = next(block.parameters(), None)
    parts, unfused_reason = fused_parts(block, drops=True)
    if parts is not None and weight is not None:
        drops = not any(why_eager(block, op, weight) for op in block.ops_used)
        if not (drops and isinstance(parts, LayerParts) and backend.may_train(parts.query.weight.shape[-1])):
            unfused_reason = dropout_reason(block, parts)
    for op in block.ops_used:
        if unfused_reason or weight is None:
            yield op, "modules", unfused_reason or "it has no parameters"
        elif reason := why_eager(block, op, weight):
            yield op, "eager", reason
        else:
            yield op, "triton", f"{KERNEL}, but eager for a 3-D or 4-D mask" if op == "attention" else KERNEL


def module_of(obj) -> nn.Module:
    """obj if it is a module, else its attribute `model`, as of a pipeline. Raises TypeError if there is no module."""
    if isinstance(obj, nn.Module):
        return obj
    held = getattr(obj, "model", None)
    if isinstance(held, nn.Module):
        return held
    raise TypeError(
        f"got a {class_name(obj)}: pass a transformers model, a SentenceTransformer, a CrossEncoder or a pipeline"
    )
