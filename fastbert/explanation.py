"""`explain`: which back end serves each block and op, and why not another."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from torch import nn
from transformers.models.bert import modeling_bert as hf

from fastbert import automatic, inference, sentences
from fastbert.fusion import FusableBlock, class_name, fused_linear, fused_parts, why_eager
from fastbert.heads import PARTS, PROJECTIONS, Head
from fastbert.ops import backend
from fastbert.pretrained import BertPreTrainedModel

SERVED = "a kernel serves it"
# Whose modules around BertModel do not use what stands at padding.
LIBRARIES = ("fastbert", "torch", "transformers", "sentence_transformers", "peft", "accelerate")
OWN_CODE = (
    "hidden states at padding are zeros: where it uses them, as ColBERT's queries do, it has to pass a mask of scores, "
    "attention_mask[:, None, None].bool()"
)


class Served(NamedTuple):
    """One line of `explain`: what serves an op of a block."""

    block: str
    op: str
    backend: str
    reason: str


class Explanation(list[Served]):
    """The lines of `explain`, one for every block and op; layers that are served alike print as one. notes follow, and
    what there is of CUDA graphs."""

    def __init__(self, rows: Iterable[Served] = ()):
        super().__init__(rows)
        self.notes: list[str] = []
        self.graphs: list[str] = []

    def __str__(self) -> str:
        blocks: dict[str, list[tuple[str, ...]]] = {}
        for block, *served in self:
            blocks.setdefault(block, []).append(tuple(served))
        rows = [Served("block", "op", "backend", "reason")]
        for served, names in groupby(blocks, key=blocks.get):
            first, *rest = names
            rows += [Served(f"{first}-{rest[-1].rpartition('.')[2]}" if rest else first, *row) for row in served]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] + self.notes + self.graphs)

    __repr__ = __str__


def explain(obj) -> Explanation:
    """A table of what serves each block and op of a fastbert model on this device, and why not something else.

    obj is a model or what holds one, as `optimize` takes. backend is "triton" (our kernels), "eager" (the ops' twins in
    plain PyTorch), "modules" (the block's own modules, one after another, which is where hooks fire and adapters
    count), or "refused" where "triton" was asked for and a call would raise. Notes below tell whether texts go packed
    to a model of sentence-transformers', and name each module of no library we know that calls the model; the last
    lines have the CUDA graphs of each model: their mode, buckets and memory, or why there are none. Raises TypeError
    for an object without such blocks.
    """
    root = module_of(obj)
    if not any(isinstance(module, FusableBlock) for module in root.modules()):
        raise TypeError(f"{class_name(root)} has no fastbert encoder in it to explain: fastbert.optimize makes one")
    rows, chosen = Explanation(), backend.current_backend()
    weight = next(root.parameters(), None)
    projections = list(_projections(root))
    for name, block in root.named_modules():
        if isinstance(block, FusableBlock):
            served = _served_block(block)
        elif calling := [whole for linear, whole in projections if linear is block]:
            served = [_served_linear(block, calling[0])]
        elif sentences.pools(block) and weight is not None:
            served = [_served("pool", weight)]
        else:
            continue
        for op, by, reason in served:
            rows.append(Served(name, op, "refused" if chosen == "triton" != by else by, reason))
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
    """A line for each model of ours that no other of them calls, or that has graphs itself."""
    models = {name: module for name, module in root.named_modules() if isinstance(module, BertPreTrainedModel)}
    inner = {part for model in models.values() for part in model.modules() if part is not model}
    for name, model in models.items():
        if model not in inner or automatic.graphs_of(model):
            yield f"CUDA graphs of {name or type(model).__name__}: {automatic.describe(model)}"


def _projections(root: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The linear layers of our heads, each with the module that calls it, which may be transformers'."""
    for module in (part for head in root.modules() if isinstance(head, Head) for part in head.modules()):
        for kind, names in PROJECTIONS.items():
            if isinstance(module, kind):
                yield from ((getattr(module, name, None), module) for name in names)


def _is_own_code(module: nn.Module) -> bool:
    """Whether a module's forward is of no library we know, and there is a BertModel in it."""
    known = type(module).forward.__module__.partition(".")[0] in LIBRARIES
    return not known and any(isinstance(part, hf.BertModel) for part in module.modules())


def _served(op: str, weight: nn.Parameter) -> tuple[str, str, str]:
    """Op, back end and reason of an op on tensors like the weight, without gradients."""
    reason = backend.why_eager(op, weight.device, weight.dtype)
    return op, "eager" if reason else "triton", reason or SERVED


def _served_linear(module: nn.Module, whole: nn.Module) -> tuple[str, str, str]:
    """Op, back end and reason of the linear layer of a head, or of a part of one."""
    linear, refused = fused_linear(module)
    if not isinstance(whole, (Head, *PARTS.values())):
        linear, refused = None, f"it is called by a {class_name(whole)}"
    return ("linear_activation", "modules", refused) if linear is None else _served("linear_activation", linear.weight)


def _served_block(block: FusableBlock) -> Iterator[tuple[str, str, str]]:
    """Op, back end and reason of each op of a block."""
    _, refused = fused_parts(block)
    weight = next(block.parameters(), None)
    for op in block.ops_used:
        if refused or weight is None:
            yield op, "modules", refused or "it has no parameters"
        elif reason := why_eager(block, op, weight):
            yield op, "eager", reason
        else:
            yield op, "triton", f"{SERVED}, eager a mask of scores" if op == "attention" else SERVED


def module_of(obj) -> nn.Module:
    """obj itself, or the model that it (a pipeline) holds; raises TypeError where there is none."""
    if isinstance(obj, nn.Module):
        return obj
    held = getattr(obj, "model", None)
    if isinstance(held, nn.Module):
        return held
    raise TypeError(
        f"got a {class_name(obj)}: pass a transformers model, a SentenceTransformer, a CrossEncoder or a pipeline"
    )
