"""Which code runs an op, and why.

An op runs in the kernel of its name in `fastbert_kernels` where its tensors, its options and this machine allow it, and
in its reference, `fastbert.ops.eager`, otherwise. `backend` (or FASTBERT_BACKEND, read when this module is first
imported, with the first model) overrides the choice.
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
    """The back end of the current thread; a `threading.local` because torch.compile can trace its attributes."""

    name = os.environ.get("FASTBERT_BACKEND", "auto")


_choice = _Choice()


def may_overwrite() -> bool:
    """Whether results may be written over tensors made here: nobody records, traces, transforms or autocasts them.

    Fresh memory costs page faults: at 1024 x 1536 floats, GELU in place takes two thirds of the time.
    """
    return not (torch.is_grad_enabled() or is_tracing() or is_any_autocast_enabled() or is_transforming())


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose what serves the ops inside the block, on this thread.

    "auto" uses Triton where it can and says each reason why not once; "triton" raises RuntimeError with the reason
    where it cannot; "eager" uses plain PyTorch. Raises ValueError for another name.
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
    """The back end chosen for this thread; raises ValueError where FASTBERT_BACKEND holds no back end's name."""
    name = _choice.name
    if name != "auto" and name not in BACKENDS:
        _check_name(name, "FASTBERT_BACKEND")
    return name


@functools.cache
def warn_once(level: int, reason: str) -> None:
    logger.log(level, "%s", reason)


def fall_back(what: str, reason: str, device: torch.device) -> None:
    """Say once that `what` does not run in kernels, or raise RuntimeError where Triton was asked for.

    It is a warning of the logger "fastbert", and only information on a CPU, where no kernel was to be had anyway.
    """
    if _choice.name == "triton":
        raise RuntimeError(f"backend 'triton' cannot serve {what}: {reason}; 'auto' falls back to eager PyTorch")
    if not is_tracing() or is_jit_tracing():
        level = logging.INFO if device.type == "cpu" else logging.WARNING
        warn_once(level, f"{what} runs in eager PyTorch: {reason}")


@constant_in_graphs
def why_not_triton(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel serves this op for such tensors on this machine; None if one does."""
    return _why_not_triton(op, device.type, device.index, dtype)


@functools.cache
def _why_not_triton(op: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    if device_type not in ("cuda", "cpu"):
        return f"the tensors are on {device_type!r} and {NEED_CUDA}"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device_type == "cpu" and not import_module("fastbert_kernels").INTERPRETED:
        return (
            f"the tensors are on 'cpu' and {NEED_CUDA}, or TRITON_INTERPRET=1 before Triton is imported, to debug them"
        )
    if device_type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device_index) < (8, 0):
        return "Triton emits matrix instructions from compute capability 8.0 on"
    if dtype not in import_module("fastbert_kernels.limits").DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if not hasattr(import_module("fastbert_kernels"), op):
        return f"fastbert_kernels has no kernel for {op}"
    return None


def launch_configurations(device: torch.device) -> Path | None:
    """The file by which kernels are launched on a device, None where none can be. Raises ValueError for a bad file."""
    if why_not_triton("attention", device, torch.float32) is not None:
        return None
    configs = import_module("fastbert_kernels.configs")
    name = configs.name_for(device)
    configs.table_for(name)  # reads and checks it
    return configs.file_for(name)


def why_not_size(op: str, size: int) -> str | None:
    """Why the kernel of an op takes no head (`attention`) or row (`pool`) of this size; None if it does.

    The limits are the kernels' own: ask only if `why_not_triton` has no reason, for this imports them.
    """
    if op == "attention" and size > (limit := _limit_of_kernels("MAX_HEAD_SIZE")):
        return f"heads of {size} are larger than {limit}"
    if op == "pool" and size > (limit := _limit_of_kernels("MAX_ROW")):
        return f"rows of {size} elements are longer than {limit}"
    return None


_why_not_size = functools.cache(why_not_size)  # where nobody traces


@constant_in_graphs
def _limit_of_kernels(name: str) -> int:
    return _cached_limit(name)


@functools.cache
def _cached_limit(name: str) -> int:
    return getattr(import_module("fastbert_kernels.limits"), name)


def _wants_kernels(device: torch.device) -> bool:
    """Whether the chosen back end asks kernels first for tensors on this device."""
    if _choice.name == "auto":
        return device.type != "cpu"
    return current_backend() == "triton"


def _why_not_exported() -> str | None:
    """Why what is traced right now holds none of our kernels; None if it may."""
    leaves = is_jit_tracing() or torch.onnx.is_in_onnx_export()
    return "what torch.jit.trace and torch.onnx record runs without fastbert" if leaves else None


def why_eager(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str | None:
    """Why the reference runs a call of `op` on such tensors; None if a kernel does. size: see `why_not_size`."""
    if _wants_kernels(device):
        exported = _why_not_exported() if is_tracing() else None
        return exported or why_not_triton(op, device, dtype) or why_not_size(op, size)
    chosen = current_backend()
    return "backend 'eager' is chosen" if chosen == "eager" else f"the tensors are on 'cpu' and {NEED_CUDA}"


def packs_on_device(device: torch.device) -> bool:
    """Whether a mask on this device is packed there, without the host ever knowing how many tokens are kept."""
    return why_eager("packing_plan", device, torch.float32) is None


def launches_directly(tensor: Tensor, head_size: int) -> bool:
    """Whether every op of an encoder layer, on tensors like this one in their own dtype, is a launch of its kernel:
    nobody records gradients, traces, transforms or watches."""
    return (
        _wants_kernels(tensor.device)
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled(tensor.device.type))
        and not (is_tracing() or is_transforming() or is_watched())
        and why_not_triton("encoder_layer", tensor.device, tensor.dtype) is None
        and _why_not_size("attention", head_size) is None
    )


def kernel(op: str, tensor: Tensor, refused: str | None = None, size: int = 0) -> Callable | None:
    """What runs a call of `op` on tensors like this one: the kernel's launcher, the op of `torch_library` where
    somebody traces or records it, None for the reference. refused: why only the reference can, if so; size: see
    `why_not_size`."""
    if not _wants_kernels(tensor.device):
        return None
    tracing = is_tracing()
    if tracing:
        refused = _why_not_exported() or refused
    elif is_transforming():
        refused = "a function transform or a forward-mode derivative is active"
    reason = refused or why_not_triton(op, tensor.device, tensor.dtype) or why_not_size(op, size)
    if reason is not None:
        fall_back(op, reason, tensor.device)
        return None
    if tracing or torch.is_grad_enabled() or is_watched():
        return getattr(torch.ops.fastbert, op)
    # Already imported by why_not_triton; import_module takes ten times as long as the dictionary.
    return getattr(sys.modules["fastbert_kernels"], op)


def raise_bad_ids(device: torch.device, wait: bool = False) -> None:
    """Raise IndexError if kernels on this device have met an index out of range since the last call of this function.

    The outputs of such a text are NaN. Without `wait` kernels that still run are not waited for, so that the error
    comes with a later call. A traced graph and a mode that sees every op have no place for it: there the next call
    without them raises.
    """
    if is_tracing() or is_transforming() or is_watched():
        return
    # Not there before the first kernel, nor while another thread still imports it.
    take_bad_ids = getattr(sys.modules.get("fastbert_kernels"), "take_bad_ids", None)
    if take_bad_ids is None:
        return
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    found = take_bad_ids(device)
    if found:
        values = ", ".join(f"{name} held {value}, allowed are 0 to {limit - 1}" for name, value, limit in found)
        raise IndexError(
            f"{values}: the outputs of that text, in this call or an earlier one, are NaN; FASTBERT_CHECK=1 in the "
            "environment raises in the call itself"
        )
