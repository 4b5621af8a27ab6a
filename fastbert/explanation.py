"""`explain`: which back end serves each block and op, and why not another."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from torch import nn
from transformers.models.bert import modeling_bert as hf

from fastbert import ops, sentences
from fastbert.fusion import FusableBlock, class_name, fused_linear, fused_parts, why_eager
from fastbert.heads import Projects

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
    """The lines of `explain`, one for every block and op; layers that are served alike print as one. notes follow."""

    def __init__(self, rows: Iterable[Served] = ()):
        super().__init__(rows)
        self.notes: list[str] = []

    def __str__(self) -> str:
        blocks: dict[str, list[tuple[str, ...]]] = {}
        for block, *served in self:
            blocks.setdefault(block, []).append(tuple(served))
        rows = [Served("block", "op", "backend", "reason")]
        for served, names in groupby(blocks, key=blocks.get):
            first, *rest = names
            rows += [Served(f"{first}-{rest[-1].rpartition('.')[2]}" if rest else first, *row) for row in served]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] + self.notes)

    __repr__ = __str__


def explain(obj) -> Explanation:
    """A table of what serves each block and op of a fastbert model on this device, and why not something else.

    obj is a model or what holds one, as `optimize` takes. backend is "triton" (our kernels), "eager" (the ops' twins in
    plain PyTorch), "modules" (the block's own modules, one after another, which is where hooks fire and adapters
    count), or "refused" where "triton" was asked for and a call would raise. A note below names each module of no
    library we know that calls the model. Raises TypeError for an object without such blocks.
    """
    root = module_of(obj)
    rows, chosen = Explanation(), ops.current_backend()
    weight = next(root.parameters(), None)
    projects = [module for module in root.modules() if isinstance(module, Projects)]
    projections = [getattr(module, name, None) for module in projects for name in module.projections]
    for name, block in root.named_modules():
        if isinstance(block, FusableBlock):
            served = _served_block(block)
        elif any(block is linear for linear in projections):
            served = [_served_linear(block)]
        elif sentences.pools(block) and weight is not None:
            served = [_served("pool", weight)]
        else:
            continue
        for op, backend, reason in served:
            rows.append(Served(name, op, "refused" if chosen == "triton" != backend else backend, reason))
    if not rows:
        raise TypeError(f"{class_name(root)} has no fastbert encoder in it to explain: fastbert.optimize makes one")
    for name, module in root.named_modules():
        known = type(module).__module__.partition(".")[0] in LIBRARIES
        if not known and any(isinstance(child, hf.BertModel) for child in module.children()):
            rows.notes.append(
                f"{name or type(module).__qualname__}, a {class_name(module)}, calls BertModel: {OWN_CODE}"
            )
    return rows


def _served(op: str, weight: nn.Parameter) -> tuple[str, str, str]:
    """Op, back end and reason of an op on tensors like the weight, without gradients."""
    reason = ops.why_eager(op, weight.device, weight.dtype)
    return op, "eager" if reason else "triton", reason or SERVED


def _served_linear(module: nn.Module) -> tuple[str, str, str]:
    """Op, back end and reason of a head's linear layer."""
    linear, refused = fused_linear(module)
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
