"""The dispatch: which code runs an op, and why.

An op runs in its kernel in `fastbert_kernels` if its tensors, its options and the machine allow it, otherwise in its
reference in `fastbert.ops.eager`. `backend` overrides the choice, and so does FASTBERT_BACKEND, which is read once,
when this module is imported.
"""

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastbert._compat import (
    constant_in_graphs,
    is_any_autocast_enabled,
    is_jit_tracing,
    is_tracing,
    is_transforming,
    is_watched,
)

BACKENDS = ("auto", "triton", "eager")

NEED_CUDA = "the kernels need a CUDA device"

logger = logging.getLogger("fastbert")


class _Choice(threading.local):
    """The back end chosen on this thread: a `threading.local`, whose attributes torch.compile can trace."""

    name = os.environ.get("FASTBERT_BACKEND", "auto")


_choice = _Choice()


def may_overwrite() -> bool:
    """True if in-place ops are safe: no autograd, tracing, functorch or autocast is active.

    They avoid the page faults of fresh memory: GELU of 1024 x 1536 floats takes two thirds of the time in place.
    """
    return not (torch.is_grad_enabled() or is_tracing() or is_any_autocast_enabled() or is_transforming())


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the back end of the ops inside the block, on this thread.

    "auto" runs the Triton kernels and falls back to PyTorch where they cannot run, logging each reason once; "triton"
    raises RuntimeError with the reason instead; "eager" runs plain PyTorch. Raises ValueError for another name.
    """
    _check_name(name, "fastbert.backend")
    previous, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = previous


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown back end {name!r}, choose one of {', '.join(BACKENDS)}")


def current_backend() -> str:
    """The back end chosen for this thread. Raises ValueError if FASTBERT_BACKEND holds an unknown name."""
    name = _choice.name
    if name != "auto" and name not in BACKENDS:
        _check_name(name, "FASTBERT_BACKEND")
    return name


@functools.cache
def warn_once(level: int, reason: str) -> None:
    logger.log(level, "%s", reason)


def fall_back(what: str, reason: str, device: torch.device) -> None:
    """Log once that `what` runs in eager PyTorch; raise RuntimeError if the back end "triton" was chosen.

    The logger is "fastbert", the level WARNING, or INFO on the CPU, where a fallback is expected.
    """
    if _choice.name == "triton":
        raise RuntimeError(f"backend 'triton' cannot run {what}: {reason}; 'auto' falls back to eager PyTorch")
    if not is_tracing() or is_jit_tracing():
        level = logging.INFO if device.type == "cpu" else logging.WARNING
        warn_once(level, f"{what} runs in eager PyTorch: {reason}")


@constant_in_graphs
def why_not_triton(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this machine has no kernel of this op for such tensors; None if it has one."""
    return _why_not_triton(op, device.type, device.index, dtype)


@functools.cache
def _why_not_triton(op: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    if device_type not in ("cuda", "cpu"):
        return f"the tensors are on {device_type!r} and {NEED_CUDA}"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device_type == "cpu" and not import_module("fastbert_kernels").INTERPRETED:
        return (
            f"the tensors are on 'cpu' and {NEED_CUDA}; to debug them on the CPU, set TRITON_INTERPRET=1 before Triton "
            "is imported"
        )
    if device_type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device_index) < (8, 0):
        return "the GPU's compute capability is below 8.0, the lowest for which Triton emits matrix instructions"
    if dtype not in import_module("fastbert_kernels.limits").DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if not hasattr(import_module("fastbert_kernels"), op):
        return f"fastbert_kernels has no kernel for {op}"
    return None


def launch_configurations(device: torch.device) -> Path | None:
    """The file of a device's launch configurations; None if no kernel runs there. Raises ValueError for a bad file."""
    if why_not_triton("attention", device, torch.float32) is not None:
        return None
    configs = import_module("fastbert_kernels.configs")
    name = configs.name_for(device)
    configs.table_for(name)  # reads and checks it
    return configs.file_for(name)


def why_not_size(op: str, size: int) -> str | None:
    """Why the kernel of an op does not support this head size (`attention`) or row size (`pool`); None if it does.

    Call it only if `why_not_triton` returns None: it imports the kernels for their limits.
    """
    if op == "attention" and size > (limit := _limit_of_kernels("MAX_HEAD_SIZE")):
        return f"heads of {size} are larger than {limit}"
    if op == "pool" and size > (limit := _limit_of_kernels("MAX_ROW")):
        return f"rows of {size} elements are longer than {limit}"
    return None


_why_not_size = functools.cache(why_not_size)  # not for tracing


@constant_in_graphs
def _limit_of_kernels(name: str) -> int:
    return _cached_limit(name)


@functools.cache
def _cached_limit(name: str) -> int:
    return getattr(import_module("fastbert_kernels.limits"), name)


def _wants_kernels(device: torch.device) -> bool:
    """True if the chosen back end tries kernels for tensors on this device."""
    if _choice.name == "auto":
        return device.type != "cpu"
    return current_backend() == "triton"


def _why_not_exported() -> str | None:
    """Why the graph that is being traced may hold no kernels; None if it may."""
    portable = is_jit_tracing() or torch.onnx.is_in_onnx_export()
    return "graphs of torch.jit.trace and torch.onnx must run without fastbert" if portable else None


def why_eager(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str | None:
    """Why the reference runs `op` on such tensors; None if a kernel does. size: see `why_not_size`."""
    if _wants_kernels(device):
        exported = _why_not_exported() if is_tracing() else None
        return exported or why_not_triton(op, device, dtype) or why_not_size(op, size)
    chosen = current_backend()
    return "backend 'eager' is chosen" if chosen == "eager" else f"the tensors are on 'cpu' and {NEED_CUDA}"


def packs_on_device(device: torch.device) -> bool:
    """True if masks on this device are packed there, so that the host never learns the number of tokens."""
    return why_eager("packing_plan", device, torch.float32) is None


def _runs_layers(tensor: Tensor, head_size: int) -> bool:
    """True if kernels run every op of an encoder layer on tensors like this one, and no tracing, function transform or
    dispatch mode has to see the ops."""
    return (
        _wants_kernels(tensor.device)
        and not (is_tracing() or is_transforming() or is_watched())
        and why_not_triton("encoder_layer", tensor.device, tensor.dtype) is None
        and _why_not_size("attention", head_size) is None
    )


def launches_directly(tensor: Tensor, head_size: int) -> bool:
    """True if every op of an encoder layer launches its kernel directly for tensors like this one: kernels support
    them, and no autocast, tracing, function transform or dispatch mode is active. The caller records no gradients."""
    return not torch.is_autocast_enabled(tensor.device.type) and _runs_layers(tensor, head_size)


def trains_layers(hidden: Tensor, head_size: int) -> bool:
    """True if kernels run an encoder layer in training mode, and its gradients, on hidden states [..., E] like these:
    they support them, and no export, function transform or dispatch mode is active."""
    if not is_tracing():
        return _runs_layers(hidden, head_size) and may_train(hidden.shape[-1])
    if torch.compiler.is_exporting() or why_eager("encoder_layer", hidden.device, hidden.dtype) is not None:
        return False
    fits = why_not_size("attention", head_size) is None
    return fits and hidden.shape[-1] <= _limit_of_kernels("MAX_TRAINED_ROW")


def may_train(width: int) -> bool:
    """True if kernels compute gradients of layers with hidden states of this width. Call it only if they run them."""
    return width <= _cached_limit("MAX_TRAINED_ROW")


def kernel(op: str, tensor: Tensor, unsupported_reason: str | None = None, size: int = 0) -> Callable | None:
    """The function that runs `op` on tensors like this one: the launcher of its kernel, the op of `torch_library` under
    tracing, autograd or a dispatch mode, or None for the reference.

    unsupported_reason: why kernels do not support this call, if the caller knows; size: see `why_not_size`.
    """
    if not _wants_kernels(tensor.device):
        return None
    tracing = is_tracing()
    if tracing:
        unsupported_reason = _why_not_exported() or unsupported_reason
    elif is_transforming():
        unsupported_reason = "a function transform or a forward-mode derivative is active"
    reason = unsupported_reason or why_not_triton(op, tensor.device, tensor.dtype) or why_not_size(op, size)
    if reason is not None:
        fall_back(op, reason, tensor.device)
        return None
    if tracing or torch.is_grad_enabled() or is_watched():
        return getattr(torch.ops.fastbert, op)
    # Already imported by why_not_triton; import_module takes ten times as long as the dictionary.
    return getattr(sys.modules["fastbert_kernels"], op)


def raise_bad_ids(device: torch.device, wait: bool = False) -> None:
    """Raise IndexError if kernels on this device have read an index out of range since the last call of this function.

    All outputs of the sequence that holds the index are NaN. Without `wait` this does not wait for kernels that still
    run, so a later call may report their indices. It does nothing under tracing, a function transform or a dispatch
    mode: the next call outside of them raises.
    """
    if is_tracing() or is_transforming() or is_watched():
        return
    # None before the first kernel, and while another thread imports the module.
    take_bad_ids = getattr(sys.modules.get("fastbert_kernels"), "take_bad_ids", None)
    if take_bad_ids is None:
        return
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    found = take_bad_ids(device)
    if found:
        values = ", ".join(f"{name} held {value}, allowed are 0 to {limit - 1}" for name, value, limit in found)
        raise IndexError(
            f"{values}: the outputs of the sequence with this index are NaN, in this call or an earlier one; set "
            "FASTBERT_CHECK=1 in the environment to raise in the call itself"
        )
