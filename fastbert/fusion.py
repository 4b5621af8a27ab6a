"""Decides whether a block of the model (the embeddings, a layer, the pooler) runs in the fused ops.

A block is fused if each of its modules has exactly the expected class, plain parameters, no hooks and no patched
forward, and if the ops support what it computes. A PEFT adapter that is merged into the weights counts as
the module it wraps. Otherwise the whole block runs through its modules, so that all hooks and adapters take effect.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.models.bert import modeling_bert as hf

from fastbert import ops, patches
from fastbert._compat import has_global_module_hooks, hooks_of, own_modules, own_parameters, unexpected_modules
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing

# Activation class -> its name in `ops.linear_activation`.
FUSED_ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    activations.LinearActivation: "none",
}
# All activation classes of transformers. Each is elementwise.
ACTIVATIONS = {made[0] if isinstance(made, tuple) else made for made in activations.ACT2CLS.values()}
# The attribute in which a module remembers its state before `optimize`.
ORIGINAL = "_fastbert_original"
# Module class -> its number of parameters.
NUM_PARAMETERS: dict[type | None, int] = {nn.Linear: 2, nn.LayerNorm: 2, nn.Embedding: 1}


class EmbeddingsParts(NamedTuple):
    """The modules of `BertEmbeddings`."""

    embeddings: nn.Module
    words: nn.Embedding
    positions: nn.Embedding
    types: nn.Embedding
    norm: nn.LayerNorm
    dropout: nn.Dropout


class LayerParts(NamedTuple):
    """The modules of a `BertLayer`, flat."""

    layer: nn.Module
    attention: hf.BertAttention
    self_attention: hf.BertSelfAttention
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_dropout: nn.Dropout
    self_output: nn.Module
    self_output_dense: nn.Linear
    self_output_norm: nn.LayerNorm
    self_output_dropout: nn.Dropout
    intermediate: nn.Module
    intermediate_dense: nn.Linear
    intermediate_activation: nn.Module
    output: nn.Module
    output_dense: nn.Linear
    output_norm: nn.LayerNorm
    output_dropout: nn.Dropout


class PoolerParts(NamedTuple):
    """The modules of `BertPooler`."""

    pooler: nn.Module
    dense: nn.Linear
    activation: nn.Module


Parts = TypeVar("Parts", EmbeddingsParts, LayerParts, PoolerParts)


class FusableBlock(nn.Module, Generic[Parts]):
    """A block of the model that can run in the fused ops.

    ops_used: the names of these ops. part_classes: the expected class of each part but the first, None for any class.
    expected: (class, parameter types) of each part, derived from part_classes.
    """

    ops_used: tuple[str, ...] = ()
    part_classes: tuple[type | None, ...]
    expected: tuple[tuple[type | None, list[type]], ...]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "part_classes" in vars(cls):
            cls.expected = tuple(
                (kind, [nn.Parameter] * NUM_PARAMETERS.get(kind, 0)) for kind in (cls, *cls.part_classes)
            )

    def parts(self) -> Parts:
        """Every module that takes part in the block's forward, the block first. Raises KeyError if one is missing."""
        raise NotImplementedError

    def unsupported_reason(self, parts: Parts) -> tuple[str | None, bool]:
        """Why the ops do not support what these parts compute (None if they do), and whether only transformers' own
        code computes it, which needs hidden states [B, S, E]."""
        return None, False

    def dropouts(self, parts: Parts) -> tuple[float, ...]:
        """The probabilities of the dropouts inside the fused ops, 0 for those that are not active."""
        return ()

    def head_size(self) -> int:
        """The head size D of a layer, 0 for other blocks."""
        return 0


def parameters_of(module: nn.Linear | nn.LayerNorm) -> tuple[nn.Parameter, nn.Parameter]:
    """The weight and bias of a fused module."""
    own = own_parameters(module)
    weight, bias = own["weight"], own["bias"]
    assert weight is not None
    assert bias is not None
    return weight, bias


def fused_activation(activation: nn.Module) -> str | None:
    """The name in `ops.linear_activation` of the function a module computes; None if it has no such function."""
    act = activation.__dict__.get("act")
    if isinstance(act, MethodType):
        own = act.__self__ is activation and act.__func__ in vars(type(activation)).values()
    elif isinstance(act, partial):
        tanh = (act.func, act.args, act.keywords) == (F.gelu, (), {"approximate": "tanh"})
        own = tanh and type(activation) is activations.GELUTanh
    else:
        own = act is (F.gelu if type(activation) is activations.GELUActivation else None)
    return FUSED_ACTIVATIONS.get(type(activation)) if own else None


def is_plain_number(value: object) -> bool:
    """True for a number that the host can read without waiting for a device, and that has no gradient."""
    if isinstance(value, Tensor):
        plain = type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad
        return plain and value.numel() == 1 and not is_tracing()
    return isinstance(value, int | float)


def why_no_block_is_fused() -> str | None:
    """Why no block of any model can be fused now; None if nothing prevents it globally."""
    return "a global module hook is registered" if has_global_module_hooks() else patches.replaced()


@overload
def fused_parts(
    block: FusableBlock[Parts], fusable: bool = False, drops: bool = False
) -> tuple[Parts | None, str | None]: ...
@overload
def fused_parts(block: nn.Module, fusable: bool = False, drops: bool = False) -> tuple[Any | None, str | None]: ...
def fused_parts(block: nn.Module, fusable: bool = False, drops: bool = False) -> tuple[Any | None, str | None]:
    """(parts, None) if the block can run in the ops, otherwise (None, the reason why it runs through its modules).

    fusable: the caller knows that `why_no_block_is_fused` returned None. drops: the caller asks `dropout_reason`. This
    runs for every block of every call.
    """
    if not isinstance(block, FusableBlock):
        return None, f"it is a {class_name(block)}"
    if not fusable and (reason := why_no_block_is_fused()):
        return None, reason
    try:
        parts = block.parts()
    except KeyError as error:
        return None, f"it has no module {error}: a part of it was replaced or wrapped"
    for index in unexpected_modules(parts, block.expected):
        module, (expected, parameter_types) = parts[index], block.expected[index]
        base = _merged_base(module)
        reason = _why_not_plain(base or module, expected, len(parameter_types))
        if reason:
            return None, f"{_name(block, base or module)} {reason}"
        if base is not None:
            parts = parts._make([*parts[:index], base, *parts[index + 1 :]])
    reason, _ = block.unsupported_reason(parts)
    reason = reason or (None if drops else dropout_reason(block, parts))
    return (None, reason) if reason else (parts, None)


def dropout_reason(block: FusableBlock[Parts], parts: Parts) -> str | None:
    """Why a block with active dropout runs through its modules where kernels do not run it; None without dropout."""
    p = max((0.0, *block.dropouts(parts)))
    return f"it applies dropout (p={p}), which only kernels do" if p > 0 else None


def _merged_base(module: Any) -> nn.Module | None:
    """The module that a PEFT layer wraps if its adapters are merged, because its forward then only calls that module;
    otherwise None."""
    if not type(module).__module__.startswith("peft.") or has_hooks(module) or has_patched_forward(module):
        return None
    # PEFT unmerges a disabled adapter in the next forward.
    merged = getattr(module, "merged", False) and not module.disable_adapters
    return module.base_layer if merged else None


def _active_copy(module: Any) -> nn.Module:
    """The module that a PEFT wrapper with trained copies (`modules_to_save`) calls: the active copy or the original.
    Any other module is returned unchanged."""
    copies = own_modules(module).get("modules_to_save")
    if copies is None or not type(module).__module__.startswith("peft."):
        return module
    if has_hooks(module) or has_patched_forward(module):
        return module
    active = module.active_adapters
    trained = active and not module.disable_adapters and all(name in copies for name in active)
    return copies[active[0]] if trained else module.original_module


def _why_not_plain(module: nn.Module, expected: type | None, num_parameters: int) -> str | None:
    """Why a module is not a plain instance of the expected class; None if it is."""
    if type(module) is not expected and expected is not None:
        return f"is a {class_name(module)}, not a {expected.__qualname__}"
    if has_hooks(module):
        return "has hooks"
    if has_patched_forward(module):
        return "has a patched forward"
    own = own_parameters(module) if num_parameters else {}
    if len(own) != num_parameters:
        return f"has {len(own)} parameters of its own, not {num_parameters}"
    for name, parameter in own.items():
        if parameter is None:
            return f"has no {name}"
        if type(parameter) is not nn.Parameter:
            return f"has a {type(parameter).__name__} in place of a plain Parameter"
    return None


def fused_linear(module: nn.Module) -> tuple[nn.Linear | None, str | None]:
    """For a module outside of the blocks: (the linear layer that `ops.linear_activation` can compute, None), or
    (None, the reason)."""
    if reason := why_no_block_is_fused():
        return None, reason
    module = _active_copy(module)
    linear = _merged_base(module) or module
    reason = _why_not_plain(linear, nn.Linear, NUM_PARAMETERS[nn.Linear])
    if reason or not isinstance(linear, nn.Linear):
        return None, f"it {reason}"
    return linear, None


def linear_of_any_rank(x: Tensor, linear: nn.Linear, activation: str) -> Tensor:
    """`ops.linear_activation` for any leading dimensions: x [..., K] -> [..., F]."""
    y = ops.linear_activation(x.reshape(-1, x.shape[-1]), *parameters_of(linear), activation)
    return y.view(*x.shape[:-1], y.shape[-1])


def must_see_padding(block: nn.Module, fusable: bool = False) -> bool:
    """True if a block that is not fused may hold code that expects transformers' shape [B, S, E].

    Hooks, patched forwards, modules of other classes and weights of other classes may use the batch or sequence
    dimension. The block's own modules and PEFT adapters do not. fusable: as in `fused_parts`.
    """
    if not isinstance(block, FusableBlock) or (not fusable and why_no_block_is_fused()):
        return True
    plain = {nn.Parameter, Tensor, type(None)}
    for module in block.modules():
        if has_hooks(module) or has_patched_forward(module):
            return True
        # While tracing, all weights have another class.
        own = own_parameters(module).values()
        if own and not is_tracing() and not plain.issuperset(map(type, own)):
            return True
    try:
        parts = block.parts()
    except KeyError:
        return True
    for module, (expected, _) in zip(parts, block.expected, strict=True):
        if type(module) is not expected and expected is not None and not type(module).__module__.startswith("peft."):
            return True
    _, needs_padding = block.unsupported_reason(parts)
    return needs_padding


def why_eager(block: FusableBlock, op: str, weight: nn.Parameter) -> str | None:
    """Why the reference runs an op of a fused block with such weights; None if a kernel does."""
    return backend.why_eager(op, weight.device, weight.dtype, block.head_size() if op == "attention" else 0)


def runs_in_kernels(block: nn.Module) -> bool:
    """True if a block is fused and each of its ops runs in a kernel."""
    if not isinstance(block, FusableBlock):
        return False
    parts, _ = fused_parts(block, drops=True)
    if parts is None:
        return False
    weight = next(block.parameters())
    if dropout_reason(block, parts) and not backend.trains_layers(weight, block.head_size()):
        return False
    return not any(why_eager(block, op, weight) for op in block.ops_used)


def has_hooks(module: nn.Module) -> bool:
    """True if the module itself has a hook. Hooks of its submodules do not count."""
    return any(hooks_of(module))


def has_patched_forward(module: nn.Module) -> bool:
    """True if the instance has a forward other than that of its class."""
    return "forward" in module.__dict__ and not is_own_forward(module, module.__dict__["forward"])


def is_own_forward(module: nn.Module, forward: Callable | None) -> bool:
    """True for the module's own forward as a bound method. accelerate leaves it on the instance when it removes a
    hook."""
    return getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module


def class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _name(block: nn.Module, module: nn.Module) -> str:
    names = (name for name, candidate in block.named_modules() if candidate is module)
    return next(names) or type(block).__name__
