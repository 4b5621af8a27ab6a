"""When a block of the model runs in the fused ops.

A block (the embeddings, a layer, the pooler) is fused if every one of its modules is exactly of the class that belongs
there, with plain parameters, no hooks, no patched forward and no active dropout, and the ops know what it computes.
An adapter of PEFT's that is merged into the weights counts as the module that it wraps.
Otherwise all of it runs through its modules, so that every hook fires and every adapter counts.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from fastbert import ops, patches
from fastbert._compat import has_global_module_hooks, hooks_of, own_modules, own_parameters, unexpected_modules
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing

# The class of an activation -> the name `ops.linear_activation` has for the same function.
FUSED_ACTIVATIONS = {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    activations.LinearActivation: "none",
}
# The classes of transformers' activations, each of which looks at every number by itself.
ACTIVATIONS = {made[0] if isinstance(made, tuple) else made for made in activations.ACT2CLS.values()}
# The attribute of a module that remembers what it was before `optimize`.
ORIGINAL = "_fastbert_original"
# How many parameters a module has by its class.
PARAMETERS = {nn.Linear: 2, nn.LayerNorm: 2, nn.Embedding: 1}


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
    attention: nn.Module
    self_attention: nn.Module
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


Parts = EmbeddingsParts | LayerParts | PoolerParts


class FusableBlock:
    """A block of the model that the ops can serve.

    `parts` lists every module that takes part in the block's forward, the block first; `made_of` has the class of each
    but the block, None for an activation. `refusal` is what else the ops do not know of the parts that they would
    serve, and whether only transformers' own code does, which needs its shapes, [B, S, E].
    """

    ops_used: tuple[str, ...] = ()
    made_of: tuple[type | None, ...]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "made_of" in vars(cls):
            cls.expected = tuple((kind, [nn.Parameter] * PARAMETERS.get(kind, 0)) for kind in (cls, *cls.made_of))

    def parts(self) -> Parts:
        raise NotImplementedError

    def refusal(self, parts: Parts) -> tuple[str | None, bool]:
        return None, False


def parameters_of(module: nn.Linear | nn.LayerNorm) -> tuple[nn.Parameter, nn.Parameter]:
    """weight and bias."""
    own = own_parameters(module)
    return own["weight"], own["bias"]


def fused_activation(activation: nn.Module) -> str | None:
    """The name that `ops.linear_activation` has for what a module computes; None for a function it has not."""
    act = activation.__dict__.get("act")
    if isinstance(act, MethodType):
        own = act.__self__ is activation and act.__func__ in vars(type(activation)).values()
    elif isinstance(act, partial):
        tanh = (act.func, act.args, act.keywords) == (F.gelu, (), {"approximate": "tanh"})
        own = tanh and type(activation) is activations.GELUTanh
    else:
        own = act is (F.gelu if type(activation) is activations.GELUActivation else None)
    return FUSED_ACTIVATIONS.get(type(activation)) if own else None


def is_number(value: object) -> bool:
    """Whether a number can be read without waiting for a device, and has no gradient."""
    if isinstance(value, Tensor):
        plain = type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad
        return plain and value.numel() == 1 and not is_tracing()
    return isinstance(value, int | float)


def why_no_block() -> str | None:
    """Why no block of any model is fused; None if blocks may be."""
    return "a global module hook is registered" if has_global_module_hooks() else patches.replaced()


def fused_parts(block: nn.Module, asked: bool = False) -> tuple[Parts | None, str | None]:
    """The parts of a block that the ops serve, and None; or None, and why it runs through its modules.

    asked: the caller knows that `why_no_block` has no reason. This runs for every block of every call.
    """
    if not isinstance(block, FusableBlock):
        return None, f"it is a {class_name(block)}"
    if not asked and (reason := why_no_block()):
        return None, reason
    try:
        parts = block.parts()
    except KeyError as error:
        return None, f"it has no module {error} where one was built: a part of it was replaced or wrapped"
    for index in unexpected_modules(parts, block.expected):
        module, (expected, parameter_types) = parts[index], block.expected[index]
        base = _merged_base(module)
        reason = _why_not_plain(base or module, expected, len(parameter_types))
        if reason:
            return None, f"{_name(block, base or module)} {reason}"
        if base is not None:
            parts = parts._make([*parts[:index], base, *parts[index + 1 :]])
    reason, _ = block.refusal(parts)
    return (None, reason) if reason else (parts, None)


def _merged_base(module: nn.Module) -> nn.Module | None:
    """The module that one of PEFT's wraps, where its forward is no more than the call of it: its adapters are merged
    into the weights there."""
    if not type(module).__module__.startswith("peft.") or has_hooks(module) or has_patched_forward(module):
        return None
    # A disabled adapter is taken out of the weights in its next forward.
    merged = getattr(module, "merged", False) and not module.disable_adapters
    return module.base_layer if merged else None


def _chosen_copy(module: nn.Module) -> nn.Module:
    """The module that PEFT's wrapper of a module and its trained copies calls; any other module as it is."""
    copies = own_modules(module).get("modules_to_save")
    if copies is None or not type(module).__module__.startswith("peft."):
        return module
    if has_hooks(module) or has_patched_forward(module):
        return module
    active = module.active_adapters
    trained = active and not module.disable_adapters and all(name in copies for name in active)
    return copies[active[0]] if trained else module.original_module


def _why_not_plain(module: nn.Module, expected: type | None, num_parameters: int) -> str | None:
    """What keeps a module from being what belongs there; None for one that is merely in training mode."""
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
    # Attention has no call of its dropout module: it drops while it is itself in training mode.
    dropout = module.dropout if getattr(expected, "applies_dropout", False) else module
    if module.training and type(dropout) is nn.Dropout and dropout.p > 0:
        return f"applies dropout (p={dropout.p})"
    return None


def fused_linear(module: nn.Module) -> tuple[nn.Linear | None, str | None]:
    """The linear layer for which `ops.linear_activation` stands where a module that is no part of a block is called,
    and None; or None, and why there is none."""
    if reason := why_no_block():
        return None, reason
    module = _chosen_copy(module)
    linear = _merged_base(module) or module
    reason = _why_not_plain(linear, nn.Linear, PARAMETERS[nn.Linear])
    return (None, f"it {reason}") if reason else (linear, None)


def linear_of_any_rank(x: Tensor, linear: nn.Linear, activation: str) -> Tensor:
    """`ops.linear_activation` of x [..., K] -> [..., F]."""
    y = ops.linear_activation(x.reshape(-1, x.shape[-1]), *parameters_of(linear), activation)
    return y.view(*x.shape[:-1], y.shape[-1])


def must_see_padding(block: nn.Module, asked: bool = False) -> bool:
    """Whether a block that is not fused may hold code that expects transformers' shapes, [B, S, E].

    Hooks, patched forwards, modules and weights of a foreign class may look along the sequence or at the batch. The
    block's own modules do not, nor do PEFT's adapters, which change a layer feature by feature. asked: as for
    `fused_parts`.
    """
    if not isinstance(block, FusableBlock) or (not asked and why_no_block()):
        return True
    plain = {nn.Parameter, Tensor, type(None)}
    for module in block.modules():
        if has_hooks(module) or has_patched_forward(module):
            return True
        # In a trace every weight is of another class.
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
    _, by_transformers = block.refusal(parts)
    return by_transformers


def why_eager(block: FusableBlock, op: str, weight: nn.Parameter) -> str | None:
    """Why the eager twin serves an op of a block with such weights; None if a kernel does."""
    head_size = block.attention.self.attention_head_size if op == "attention" else 0
    return backend.why_eager(op, weight.device, weight.dtype, head_size)


def runs_in_kernels(block: nn.Module) -> bool:
    """Whether a block runs in the ops, and each of them in its kernel."""
    parts, _ = fused_parts(block)
    return parts is not None and not any(why_eager(block, op, next(block.parameters())) for op in block.ops_used)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook of this very module would fire."""
    return any(hooks_of(module))


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
