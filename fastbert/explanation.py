"""`explain`: which back end serves each block and op, and why not another."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from torch import nn

from fastbert import ops, sentences
from fastbert.fusion import FusableBlock, class_name, fused_parts, why_eager
from fastbert.heads import Projection

SERVED = "a kernel serves it"


class Served(NamedTuple):
    """One line of `explain`: what serves an op of a block."""

    block: str
    op: str
    backend: str
    reason: str


class Explanation(list[Served]):
    """The lines of `explain`, one for every block and op; layers that are served alike print as one."""

    def __str__(self) -> str:
        blocks: dict[str, list[tuple[str, ...]]] = {}
        for block, *served in self:
            blocks.setdefault(block, []).append(tuple(served))
        rows = [Served("block", "op", "backend", "reason")]
        for served, names in groupby(blocks, key=blocks.get):
            first, *rest = names
            rows += [Served(f"{first}-{rest[-1].rpartition('.')[2]}" if rest else first, *row) for row in served]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    __repr__ = __str__


def explain(obj) -> Explanation:
    """A table of what serves each block and op of a fastbert model on this device, and why not something else.

    obj is a model or what holds one, as `optimize` takes. backend is "triton" (our kernels), "eager" (the ops' twins in
    plain PyTorch), "modules" (the block's own modules, one after another, which is where hooks fire and adapters
    count), or "refused" where "triton" was asked for and a call would raise. Raises TypeError for an object without
    such blocks.
    """
    root = module_of(obj)
    rows, chosen = Explanation(), ops.current_backend()
    weight = next(root.parameters(), None)
    for name, block in root.named_modules():
        if isinstance(block, FusableBlock):
            served = _served_block(block)
        elif type(block) is Projection:
            served = [_served("linear_activation", block.weight)]
        elif sentences.pools(block) and weight is not None:
            served = [_served("pool", weight)]
        else:
            continue
        for op, backend, reason in served:
            rows.append(Served(name, op, "refused" if chosen == "triton" != backend else backend, reason))
    if not rows:
        raise TypeError(f"{class_name(root)} has no fastbert encoder in it to explain: fastbert.optimize makes one")
    return rows


def _served(op: str, weight: nn.Parameter) -> tuple[str, str, str]:
    """Op, back end and reason of an op on tensors like the weight, without gradients."""
    reason = ops.why_eager(op, weight.device, weight.dtype)
    return op, "eager" if reason else "triton", reason or SERVED


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
