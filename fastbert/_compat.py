"""Every private name of another library that fastbert uses, each in one place.

If a release renames one, its test in tests/integrations/test_compat.py fails and this file has to change. Each function
wraps the private names that its docstring lists. Each constant is a private name that fastbert looks up or sets.
Private names that a class of ours overrides (`_supports_flash_attn`) stay in that class.

Only torch is imported here, because the ops need neither transformers nor sentence-transformers.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules import module as all_modules

# torch: what is active on this thread


def is_tracing() -> bool:
    """True while `torch.compile`, `torch.export` or `torch.jit.trace` records a graph, in which neither shapes nor
    control flow may depend on data: `torch._C._is_tracing`. The public function makes three calls."""
    return is_compiling() or torch._C._is_tracing()


def is_jit_tracing() -> bool:
    """True while `torch.jit.trace`, or an exporter that uses it, records a graph: `torch._C._is_tracing`."""
    return not is_compiling() and torch._C._is_tracing()


def is_transforming() -> bool:
    """True inside functorch transforms and forward-mode derivatives, which have to see inside the ops:
    `torch._C._are_functorch_transforms_active` and `torch.autograd.forward_ad._current_level`."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(grad: Tensor) -> bool:
    """True for a gradient of `torch.autograd.grad(..., is_grads_batched=True)`, or inside vmap:
    `torch._C._functorch.is_legacy_batchedtensor` and `is_batchedtensor`."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def is_watched() -> bool:
    """True if a `TorchDispatchMode` is active, which sees every op (to count flops, or for fake tensors):
    `torch._C._len_torch_dispatch_stack`."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_any_autocast_enabled() -> bool:
    """True under autocast of any device type: `torch._C._is_any_autocast_enabled`. The public function takes one
    device type."""
    return torch._C._is_any_autocast_enabled()


def is_in_bad_fork() -> bool:
    """True in a process forked from one that had initialized CUDA: `torch.cuda._is_in_bad_fork`."""
    return torch.cuda._is_in_bad_fork()


@contextmanager
def autograd_below_modes() -> Iterator[None]:
    """Enable autograd inside the block, although a dispatch mode has excluded it:
    `torch._C._SetExcludeDispatchKeyGuard` for keys of `torch._C.DispatchKey`."""
    keys, guard = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with guard(keys.AutogradFunctionality, False), guard(keys.ADInplaceOrView, False):
        yield


def constant_in_graphs(function: Callable) -> Callable:
    """Decorator: torch.compile treats the result of the function as a constant. It sets `_dynamo_marked_constant`, as
    `torch.compiler.assume_constant_result` does, but without importing `torch._dynamo`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# torch: modules and tensors


def has_global_module_hooks() -> bool:
    """True if a hook of all modules is registered: `torch.nn.modules.module._has_any_global_hook`."""
    return bool(all_modules._has_any_global_hook())


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The hooks of the module itself, by kind: `_forward_hooks`, `_forward_pre_hooks`, `_backward_hooks`,
    `_backward_pre_hooks`. These dictionaries are never replaced during the module's life."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_compiled(module: nn.Module) -> bool:
    """True after `module.compile()`: `_compiled_call_impl`."""
    return module._compiled_call_impl is not None


def is_replica(module: nn.Module) -> bool:
    """True for a copy that `nn.DataParallel` makes for one call: `_is_replica`."""
    return "_is_replica" in module.__dict__


def own_modules(module: nn.Module) -> dict[str, Any]:
    """The direct submodules by name, of any class or None: `_modules`. `named_children` takes ten times as long, and
    leaves out None and duplicates."""
    return module._modules


def own_modules_of(*modules: nn.Module) -> list[dict[str, Any]]:
    """`own_modules` of several modules in one call, for code that runs once per layer: `_modules`."""
    found = []
    for module in modules:
        found.append(module._modules)  # not in a comprehension, which is a call of its own up to Python 3.11
    return found


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of the module itself, by name: `_parameters`. Attribute access by `nn.Module.__getattr__` took a
    sixth of a small layer's time."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of the module itself, by name: `_buffers`."""
    return module._buffers


def weights_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The weight of each module: `_parameters`. It may not be None."""
    return [module._parameters["weight"] for module in modules]  # type: ignore[misc]


def weights_and_biases(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The weight and bias of each module, in one list: `_parameters`. Neither may be None."""
    return [module._parameters[name] for module in modules for name in ("weight", "bias")]  # type: ignore[misc]


def unexpected_modules(
    modules: Sequence[nn.Module], expected: Sequence[tuple[type | None, list[type]]]
) -> Iterator[int]:
    """The indices of the modules that differ from what is expected: a class (None for any) and the types of all
    parameters (empty for any). Modules in training mode, with hooks or with a forward on the instance count, too.

    This runs for every module in every call, so it reads the modules' dictionaries directly, which takes a tenth of the
    time: `_forward_hooks`, `_forward_pre_hooks`, `_backward_hooks`, `_backward_pre_hooks`, `_parameters`.
    """
    for index, (module, (kind, parameter_types)) in enumerate(zip(modules, expected, strict=True)):
        own = module.__dict__
        if (
            (type(module) is not kind and kind is not None)
            or own["training"]
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or (parameter_types and [*map(type, own["_parameters"].values())] != parameter_types)
        ):
            yield index


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor was written to: `Tensor._version`. Raises RuntimeError for an inference tensor."""
    return [x._version for x in tensors]


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another dtype, without gradients. For tensors of one dtype on a GPU this is one launch:
    `torch._foreach_copy_`."""
    cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if cast:
        torch._foreach_copy_(cast, list(tensors))
    return cast


# The method of `nn.Module` with which `nn.DataParallel` copies a module.
REPLICATE = "_replicate_for_data_parallel"
# The module of the function that runs in a data loader's pin-memory thread.
PINS_MEMORY = "torch.utils.data._utils.pin_memory"


# transformers


def attn_implementation(config: Any) -> str | None:
    """The attention implementation of a configuration: `PreTrainedConfig._attn_implementation`."""
    return config._attn_implementation


def config_key(config: dict, name: str) -> str:
    """The key of a setting in a configuration's `vars`: its name, with an underscore if the setting is a property
    (`_output_attentions`)."""
    return name if name in config else f"_{name}"


def remove_capturing_hooks(module: nn.Module) -> None:
    """Remove the forward hooks that transformers' output capturing has left on a module (`_forward_hooks`), and its
    mark that they are installed (`_output_capturing_hooks_installed`)."""
    hooks = module._forward_hooks
    for key, hook in list(hooks.items()):
        if hook.__module__ == "transformers.utils.output_capturing":
            del hooks[key]
    module.__dict__.pop("_output_capturing_hooks_installed", None)


def set_backend_tokenizer(wrapper: Any, tokenizer: object) -> None:
    """Replace the tokenizer inside a `PreTrainedTokenizerFast`: `_tokenizer`, which `backend_tokenizer` returns and no
    public name sets."""
    wrapper._tokenizer = tokenizer


def registered(functions: Any, name: str) -> Callable | None:
    """The function that a `GeneralInterface` of transformers has for a name: `_local_mapping` and `_global_mapping`.
    Its own lookup takes ten times as long."""
    local = functions._local_mapping
    return local[name] if name in local else functions._global_mapping.get(name)


# The method of `BertModel` that makes the masks for its layers.
MAKES_MASKS = "_create_attention_masks"
# Methods of `PreTrainedTokenizerFast` that a call runs through.
TOKENIZES = "_encode_plus", "_convert_encoding", "_get_padding_truncation_strategies"


# accelerate

# The attribute in which accelerate keeps the forward that its hooks wrap.
WRAPPED_FORWARD = "_old_forward"


# sentence-transformers


def inference_device(encoder: Any, device: object) -> torch.device:
    """The device on which `encode` and `predict` run: `_resolve_inference_device`. It may move the model."""
    return encoder._resolve_inference_device(device)


# The method behind `encode` and `predict`, and the method of `inference_device`; both since 6.2.
INFERENCE, RESOLVES_DEVICE = "_inference", "_resolve_inference_device"
# Methods of Transformer that `preprocess` runs through.
CALLS_PROCESSOR = "_call_processor", "_call_single_modality_processor"


# Python


def target_of(thread: threading.Thread) -> Callable | None:
    """The function that a thread runs, None once it has finished: `threading.Thread._target`."""
    return getattr(thread, "_target", None)
