"""When a block of the model runs in the fused ops, and `explain`, which tells.

A block (the embeddings, a layer, the pooler) is fused if every one of its modules is exactly of the class it was built
with, with plain parameters, no hooks, no patched forward and no active dropout, and its activation is one the ops know.
Otherwise all of it runs through its modules, so that every hook fires and every adapter counts.
"""

from itertools import groupby
from typing import NamedTuple

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert import ops

# transformers' name of an activation -> the name `ops.linear_activation` has for the same function.
FUSED_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
    "linear": "none",
}


class FusableBlock(nn.Module):
    """A block of the model that the ops can serve.

    `parts` lists every module that takes part in the block's forward, the block first; `seal`, called once they are
    built, remembers their classes.
    """

    ops_used: tuple[str, ...] = ()
    fused_activation: str | None = "none"

    def parts(self) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def seal(self) -> None:
        self.part_types = tuple(map(type, self.parts()))


def why_not_fused(block: FusableBlock) -> str | None:
    """Why a block runs through its modules; None if the ops serve it.

    This runs for every block of every call: it reads the modules' dictionaries, which costs a tenth of going through
    `nn.Module.modules` and attribute access.
    """
    if block.fused_activation is None:
        return "its activation is not one of " + ", ".join(FUSED_ACTIVATIONS)
    if _has_any_global_hook():
        return "a global module hook is registered"
    for module, expected in zip(block.parts(), block.part_types, strict=True):
        own = module.__dict__
        if type(module) is not expected:
            found = type(module)
            return f"{_name(block, module)} is a {found.__module__}.{found.__qualname__}, not a {expected.__qualname__}"
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return f"{_name(block, module)} has hooks"
        if "forward" in own:
            return f"{_name(block, module)} has a patched forward"
        for parameter in own["_parameters"].values():
            if type(parameter) is not nn.Parameter:
                return f"{_name(block, module)} has a {type(parameter).__name__} in place of a plain Parameter"
        if own["training"]:
            dropout = module if expected is nn.Dropout else own["_modules"].get("dropout")
            if dropout is not None and dropout.p > 0:
                return f"{_name(block, dropout)} is active (p={dropout.p})"
    return None


def _name(block: nn.Module, module: nn.Module) -> str:
    names = (name for name, candidate in block.named_modules() if candidate is module)
    return next(names) or type(block).__name__


def has_hooks(block: nn.Module) -> bool:
    """Whether a hook would fire in this block: then its modules must see the shapes of Hugging Face, [B, S, E]."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in block.modules()
    )


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


def explain(model: nn.Module) -> Explanation:
    """A table of what serves each block and op of a fastbert model on this device, and why not something else.

    backend is "triton" (our kernels), "eager" (the ops' twins in plain PyTorch) or "modules" (the block's own modules,
    one after another, which is where hooks fire and adapters count). Raises TypeError for a model without such blocks.
    """
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, FusableBlock)]
    if not blocks:
        raise TypeError(f"{type(model).__module__}.{type(model).__name__} has no fastbert encoder in it to explain")
    rows = Explanation()
    for name, block in blocks:
        refused = why_not_fused(block)
        weight = next(block.parameters())
        for op in block.ops_used:
            if refused:
                rows.append(Served(name, op, "modules", refused))
            elif ops.current_backend() == "eager":
                rows.append(Served(name, op, "eager", "backend 'eager' is chosen"))
            else:
                reason = ops.why_not_triton(op, weight.device, weight.dtype)
                rows.append(Served(name, op, "eager" if reason else "triton", reason or "a kernel serves it"))
    return rows
