"""When a block of the model runs in the fused ops.

A block (the embeddings, a layer, the pooler) is fused if every one of its modules is exactly of the class it was built
with, with plain parameters, no hooks, no patched forward and no active dropout, and its activation is one the ops know.
An adapter of PEFT's that is merged into the weights counts as the module that it wraps.
Otherwise all of it runs through its modules, so that every hook fires and every adapter counts.
"""

from collections import namedtuple
from collections.abc import Callable

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
    built, remembers what they are. `refusal` is what else the ops do not know of the parts that they would serve.
    """

    ops_used: tuple[str, ...] = ()

    def parts(self) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def refusal(self, parts: tuple[nn.Module, ...]) -> str | None:
        return None

    def seal(self) -> None:
        self.sealed = tuple((type(x), [*map(type, x._parameters.values())]) for x in self.parts())


# The modules of a `BertLayer`, flat.
LayerParts = namedtuple(
    "LayerParts",
    "layer attention self_attention query key value attention_dropout self_output self_output_dense self_output_norm "
    "self_output_dropout intermediate intermediate_dense intermediate_activation output output_dense output_norm "
    "output_dropout",
)


def parameters_of(module: nn.Linear | nn.LayerNorm) -> tuple[nn.Parameter, nn.Parameter]:
    """weight and bias, without `nn.Module.__getattr__`, which took a sixth of a small layer's time."""
    own = module._parameters
    return own["weight"], own["bias"]


def fused_parts(block: nn.Module) -> tuple[tuple[nn.Module, ...] | None, str | None]:
    """The parts of a block that the ops serve, and None; or None, and why it runs through its modules.

    This runs for every block of every call: it reads the modules' dictionaries, which costs a tenth of going through
    `nn.Module.modules` and attribute access.
    """
    if not isinstance(block, FusableBlock):
        return None, f"it is a {class_name(block)}"
    if _has_any_global_hook():
        return None, "a global module hook is registered"
    try:
        parts = block.parts()
    except KeyError as error:
        return None, f"it has no module {error} where one was built: a part of it was replaced or wrapped"
    for index, (module, (expected, parameter_types)) in enumerate(zip(parts, block.sealed, strict=True)):
        own = module.__dict__
        if (
            type(module) is not expected
            or own["training"]
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or (parameter_types and [*map(type, own["_parameters"].values())] != parameter_types)
        ):
            base = _merged_base(module)
            reason = _why_not_plain(base or module, expected, len(parameter_types))
            if reason:
                return None, f"{_name(block, base or module)} {reason}"
            if base is not None:
                parts = getattr(type(parts), "_make", tuple)([*parts[:index], base, *parts[index + 1 :]])
    reason = block.refusal(parts)
    return (None, reason) if reason else (parts, None)


def _merged_base(module: nn.Module) -> nn.Module | None:
    """The module that one of PEFT's wraps, where its forward is no more than the call of it: its adapters are merged
    into the weights there."""
    if not type(module).__module__.startswith("peft.") or has_hooks(module) or has_patched_forward(module):
        return None
    # A disabled adapter is taken out of the weights in its next forward.
    merged = getattr(module, "merged", False) and not module.disable_adapters
    return module.base_layer if merged else None


def _why_not_plain(module: nn.Module, expected: type, num_parameters: int) -> str | None:
    """What keeps a module from being what it was built as; None for one that is merely in training mode."""
    if type(module) is not expected:
        return f"is a {class_name(module)}, not a {expected.__qualname__}"
    if has_hooks(module):
        return "has hooks"
    if has_patched_forward(module):
        return "has a patched forward"
    if len(module._parameters) != num_parameters:
        return f"has {len(module._parameters)} parameters of its own, not {num_parameters}"
    for parameter in module._parameters.values():
        if type(parameter) is not nn.Parameter:
            return f"has a {type(parameter).__name__} in place of a plain Parameter"
    # Attention has no call of its dropout module: it drops while it is itself in training mode.
    dropout = module.dropout if getattr(expected, "applies_dropout", False) else module
    if module.training and type(dropout) is nn.Dropout and dropout.p > 0:
        return f"applies dropout (p={dropout.p})"
    return None


def must_see_padding(block: nn.Module) -> bool:
    """Whether a block that is not fused may hold code that expects transformers' shapes, [B, S, E].

    Hooks, patched forwards and modules of a foreign class may look along the sequence. The block's own modules do not,
    nor do PEFT's adapters, which change a layer feature by feature.
    """
    if not isinstance(block, FusableBlock) or _has_any_global_hook():
        return True
    if any(has_hooks(module) or has_patched_forward(module) for module in block.modules()):
        return True
    try:
        return any(
            type(module) is not expected and not type(module).__module__.startswith("peft.")
            for module, (expected, _) in zip(block.parts(), block.sealed, strict=True)
        )
    except KeyError:
        return True


def why_eager(block: FusableBlock, op: str, weight: nn.Parameter) -> str | None:
    """Why the eager twin serves an op of a block with such weights; None if a kernel does."""
    head_size = block.attention.self.attention_head_size if op == "attention" else 0
    return ops.why_eager(op, weight.device, weight.dtype, head_size)


def runs_in_kernels(block: nn.Module) -> bool:
    """Whether a block runs in the ops, and each of them in its kernel."""
    parts, _ = fused_parts(block)
    return parts is not None and not any(why_eager(block, op, next(block.parameters())) for op in block.ops_used)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of this very module would fire."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_patched_forward(module: nn.Module) -> bool:
    """Whether a module's forward is not that of its class."""
    return "forward" in module.__dict__ and not is_own_forward(module, module.__dict__["forward"])


def is_own_forward(module: nn.Module, forward: Callable | None) -> bool:
    """Whether a forward is that of the module's class, which accelerate leaves in a module where it removes a hook."""
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _name(block: nn.Module, module: nn.Module) -> str:
    names = (name for name, candidate in block.named_modules() if candidate is module)
    return next(names) or type(block).__name__
