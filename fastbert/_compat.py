"""Every private name of another library that fastbert uses, each in one place.

Where a release renames one, the test of that name in tests/integrations/test_compat.py fails, and this is the file to
change. A function tells what it is asked for in our words, and its docstring says which names it stands for. A constant
is the name of a method that fastbert looks up in a class or puts on an instance. What a class of ours overrides because
its base class asks for it (`_supports_flash_attn`) stays in that class.

Only torch is imported here: the ops need neither transformers nor sentence-transformers.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules import module as all_modules

# torch: what is active on this thread


def is_tracing() -> bool:
    """True while a graph is recorded (`torch.compile`, `torch.export`, `torch.jit.trace`), so that neither shapes nor
    control flow may depend on data: `torch._C._is_tracing`, of which the public function makes three calls."""
    return is_compiling() or torch._C._is_tracing()


def is_jit_tracing() -> bool:
    """True while `torch.jit.trace`, or an exporter by it, records: `torch._C._is_tracing`."""
    return not is_compiling() and torch._C._is_tracing()


def is_transforming() -> bool:
    """True inside functorch's transforms and forward-mode derivatives, which look into the ops:
    `torch._C._are_functorch_transforms_active` and `torch.autograd.forward_ad._current_level`."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_watched() -> bool:
    """True if a `TorchDispatchMode` sees every op: it counts them, say, or runs them without numbers.
    `torch._C._len_torch_dispatch_stack`."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_any_autocast_enabled() -> bool:
    """True under autocast of any device type: `torch._C._is_any_autocast_enabled`. The public function asks for one."""
    return torch._C._is_any_autocast_enabled()


def is_in_bad_fork() -> bool:
    """True in a process forked from one that had initialized CUDA: `torch.cuda._is_in_bad_fork`."""
    return torch.cuda._is_in_bad_fork()


@contextmanager
def autograd_below_modes() -> Iterator[None]:
    """Let autograd record in the block although a dispatch mode has excluded it:
    `torch._C._SetExcludeDispatchKeyGuard` of keys in `torch._C.DispatchKey`."""
    keys, guard = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with guard(keys.AutogradFunctionality, False), guard(keys.ADInplaceOrView, False):
        yield


def constant_in_graphs(function: Callable) -> Callable:
    """Let a traced graph take what a function returns as a constant: `_dynamo_marked_constant`, the attribute that
    `torch.compiler.assume_constant_result` sets after importing the whole of `torch._dynamo`."""
    function._dynamo_marked_constant = True
    return function


# torch: modules and tensors


def has_global_module_hooks() -> bool:
    """True if a hook of all modules is registered: `torch.nn.modules.module._has_any_global_hook`."""
    return bool(all_modules._has_any_global_hook())  # a dictionary, which changes in its place


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The hooks of this very module by kind: `_forward_hooks`, `_forward_pre_hooks`, `_backward_hooks`,
    `_backward_pre_hooks`. The dictionaries stay the same objects as long as the module lives."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_compiled(module: nn.Module) -> bool:
    """True after `module.compile()`: `_compiled_call_impl`."""
    return module._compiled_call_impl is not None


def is_replica(module: nn.Module) -> bool:
    """True for a module that `nn.DataParallel` made for one call: `_is_replica`."""
    return "_is_replica" in module.__dict__


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules in this very module by name: `_modules`. `named_children` takes ten times as long, and leaves out
    None and what is there twice."""
    return module._modules


def own_modules_of(*modules: nn.Module) -> list[dict[str, nn.Module | None]]:
    """`own_modules` of each of these in one call, for what runs for every layer of every call: `_modules`."""
    found = []
    for module in modules:
        found.append(module._modules)  # not in a comprehension, which is a call of its own up to Python 3.11
    return found


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of this very module by name: `_parameters`, without `nn.Module.__getattr__`, which took a sixth
    of a small layer's time."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of this very module by name: `_buffers`."""
    return module._buffers


def weights_and_biases(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """weight and bias of each module, in one list: `_parameters`."""
    return [module._parameters[name] for module in modules for name in ("weight", "bias")]


def unexpected_modules(
    modules: Sequence[nn.Module], expected: Sequence[tuple[type | None, list[type]]]
) -> Iterator[int]:
    """The indices of the modules that are not what is expected, a class (None for any) and the types of all parameters
    (empty for any), or are in training mode, or have hooks or a forward of their own.

    Every call asks, for every module. The modules' dictionaries are read directly, which costs a tenth of attribute
    access: `_forward_hooks`, `_forward_pre_hooks`, `_backward_hooks`, `_backward_pre_hooks`, `_parameters`.
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
    """How often each tensor was written to: `Tensor._version`. Inference tensors have none, and raise RuntimeError."""
    return [x._version for x in tensors]


# The method of `nn.Module` by which `nn.DataParallel` copies a module.
REPLICATE = "_replicate_for_data_parallel"
# The module whose function runs in a data loader's thread that pins memory.
PINS_MEMORY = "torch.utils.data._utils.pin_memory"


# transformers


def attn_implementation(config: object) -> str | None:
    """What a configuration names for attention: `PreTrainedConfig._attn_implementation`."""
    return config._attn_implementation


def config_key(config: dict, name: str) -> str:
    """The key of a setting in a configuration's `vars`. That of a property has an underscore: `_output_attentions`."""
    return name if name in config else f"_{name}"


def remove_capturing_hooks(module: nn.Module) -> None:
    """Remove the forward hooks that transformers' output capturing has left in a module (`_forward_hooks`), and that it
    remembers having them (`_output_capturing_hooks_installed`)."""
    hooks = module._forward_hooks
    for key, hook in list(hooks.items()):
        if hook.__module__ == "transformers.utils.output_capturing":
            del hooks[key]
    module.__dict__.pop("_output_capturing_hooks_installed", None)


def set_backend_tokenizer(wrapper: object, tokenizer: object) -> None:
    """Let a wrapper tokenize by another tokenizer: `PreTrainedTokenizerFast._tokenizer`, which `backend_tokenizer`
    returns and nothing public sets."""
    wrapper._tokenizer = tokenizer


def registered(functions: MutableMapping, name: str) -> Callable | None:
    """What a mapping of transformers has for a name: `GeneralInterface._local_mapping` and `_global_mapping`. Its own
    reading takes ten times as long."""
    local = functions._local_mapping
    return local[name] if name in local else functions._global_mapping.get(name)


# The method of `BertModel` that makes the masks of its layers.
MAKES_MASKS = "_create_attention_masks"
# Methods of `PreTrainedTokenizerFast` through which a call goes.
TOKENIZES = "_encode_plus", "_convert_encoding", "_get_padding_truncation_strategies"


# accelerate

# Where a module has the forward that accelerate's hooks wrap, in its own dictionary.
WRAPPED_FORWARD = "_old_forward"


# sentence-transformers


def inference_device(encoder: nn.Module, device: object) -> torch.device:
    """The device on which `encode` and `predict` run, which may move the model: `_resolve_inference_device`."""
    return encoder._resolve_inference_device(device)


# The method of a whole model behind `encode` and `predict`, and the one of `inference_device`; both since 6.2.
INFERENCE, RESOLVES_DEVICE = "_inference", "_resolve_inference_device"
# Methods of Transformer that `preprocess` goes through.
CALLS_PROCESSOR = "_call_processor", "_call_single_modality_processor"


# Python


def target_of(thread: threading.Thread) -> Callable | None:
    """The function that a thread was given to run, None once it has run: `threading.Thread._target`."""
    return getattr(thread, "_target", None)
