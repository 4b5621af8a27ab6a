"""The device that a launch runs on or is compiled for: architecture, number of SMs, precision, stream."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# The interpreter uses the configurations of this architecture.
INTERPRETED_ARCHITECTURE = "sm_90"

_no_change = nullcontext()


def architecture(device: torch.device) -> str:
    """Return the architecture of a device as in the names of configuration files: "sm_90", "gfx942".

    For the meta device it is the target of Triton's active driver, for which kernels are compiled ahead of time.
    """
    if device.type == "cuda":
        return _architecture_of_gpu(device)
    return architecture_of(driver.active.get_current_target()) if device.type == "meta" else INTERPRETED_ARCHITECTURE


@functools.cache
def _architecture_of_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def architecture_of(target: GPUTarget) -> str:
    """Return the architecture of a Triton target."""
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of SMs of a GPU; 3 in the interpreter, so that persistent loops have several iterations."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def torch_precision(x: Tensor) -> str | None:
    """Return the precision that torch.backends allows for float32 products; None for other dtypes."""
    return torch.backends.cuda.matmul.fp32_precision if x.dtype == torch.float32 else None


def dot_precision(dtype: torch.dtype, device: torch.device, allowed: str | None) -> str:
    """Return the input_precision of `tl.dot`. allowed: the value of `torch_precision`.

    A float32 product is three TF32 products, or one if torch.backends allows TF32. AMD GPUs multiply float32 itself.
    """
    if dtype != torch.float32 or architecture(device).startswith("gfx"):
        return "ieee"
    return "tf32" if allowed == "tf32" else "tf32x3"


def on_device(device: torch.device) -> AbstractContextManager:
    """Return a context in which a CUDA device is the current one."""
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if elsewhere else _no_change


def current_stream() -> int:
    """Return PyTorch's current stream on the current device, as Triton's driver represents it."""
    active = driver.active
    return active.get_current_stream(active.get_current_device())
