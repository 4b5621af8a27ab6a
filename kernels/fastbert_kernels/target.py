"""The device that a launch runs on or compiles for: architecture, multiprocessors, precision, stream."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# The interpreter runs the configurations of this architecture.
INTERPRETED_ARCHITECTURE = "sm_90"

_no_change = nullcontext()


def architecture(device: torch.device) -> str:
    """The architecture of a device, as configuration files are named: "sm_90", "gfx942".

    Nothing runs on the meta device: there it is the target of Triton's active driver, for which kernels compile.
    """
    if device.type == "cuda":
        return _architecture_of_gpu(device)
    return architecture_of(driver.active.get_current_target()) if device.type == "meta" else INTERPRETED_ARCHITECTURE


@functools.cache
def _architecture_of_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def architecture_of(target: GPUTarget) -> str:
    """The architecture of one of Triton's targets."""
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@functools.cache
def num_sms(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; a few in the interpreter, so that persistent loops go round."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def torch_precision(x: Tensor) -> str | None:
    """The precision that torch.backends allows for float32 products; None for other dtypes."""
    return torch.backends.cuda.matmul.fp32_precision if x.dtype == torch.float32 else None


def dot_precision(dtype: torch.dtype, device: torch.device, allowed: str | None) -> str:
    """The input_precision of `tl.dot`: three TF32 products for a float32 one, or one where torch.backends allows TF32.

    AMD's matrix instructions take float32 itself.
    """
    if dtype != torch.float32 or architecture(device).startswith("gfx"):
        return "ieee"
    return "tf32" if allowed == "tf32" else "tf32x3"


def on_device(device: torch.device) -> AbstractContextManager:
    """A context in which a CUDA device is the current one."""
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if elsewhere else _no_change


def current_stream() -> int:
    """The stream on which PyTorch works now, on the current device, as Triton's driver names it."""
    active = driver.active
    return active.get_current_stream(active.get_current_device())
