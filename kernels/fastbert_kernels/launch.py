"""What every launcher shares: launch configurations, host tensor descriptors, and the launch itself.

Configurations are data: `configs/<architecture>.json`, or `configs/default.json` for an architecture without a file.
An operation's entries for one operand width are tried in their order; the first whose `up_to` reaches the size serves.
"""

import functools
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter runs the configurations of this architecture.
INTERPRETED_ARCHITECTURE = "sm_90"
MAX_ROW = 16384

logger = logging.getLogger("fastbert_kernels")
_launching = threading.Lock()


def architecture(device: torch.device) -> str:
    """The name of a device's configuration file: "sm_90", "gfx942". On the meta device nothing runs: there it is the
    target of Triton's active driver, for which kernels compile."""
    if device.type == "cuda":
        return _architecture_of_gpu(device)
    return architecture_of(driver.active.get_current_target()) if device.type == "meta" else INTERPRETED_ARCHITECTURE


@functools.cache
def _architecture_of_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def architecture_of(target: GPUTarget) -> str:
    """The name of a configuration file, as Triton's target spells it."""
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@functools.cache
def configurations(name: str) -> dict:
    """The launch configurations of an architecture, or of its family's first from sm_90 on; those of default.json,
    with one warning, where there are none."""
    folder = Path(__file__).parent / "configs"
    family = re.sub(r"^sm_(9|10)\d$", r"sm_\g<1>0", name)
    for path in (folder / f"{name}.json", folder / f"{family}.json"):
        if path.exists():
            return json.loads(path.read_text())
    path = folder / "default.json"
    logger.warning("no launch configurations for %s: using %s, which nobody has tuned for it", name, path)
    return json.loads(path.read_text())


@functools.cache
def _entries(operation: str, name: str, itemsize: int) -> tuple[dict, ...]:
    table = configurations(name)
    return tuple(table[operation].get("32" if itemsize == 4 else "16", ()))


def choose(operation: str, x: Tensor, size: int) -> dict | None:
    """The launch configuration of an operation on tensors like x; None where no entry reaches the size."""
    for entry in _entries(operation, architecture(x.device), x.dtype.itemsize):
        if entry["up_to"] is None or size <= entry["up_to"]:
            return entry["config"]
    return None


@functools.cache
def num_processors(device: torch.device) -> int:
    """How many programs run at a time: multiprocessors of a GPU; a few in the interpreter, so that loops go round."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def precision(x: Tensor) -> str:
    """How products of float32 are made: three TF32 products, or one where torch.backends allows TF32.

    AMD's matrix instructions take float32 itself.
    """
    if x.dtype != torch.float32 or architecture(x.device).startswith("gfx"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def check(operation: str, *tensors: Tensor | None) -> None:
    """Raise TypeError for a dtype no kernel takes, ValueError for tensors on different devices."""
    first, *others = (x for x in tensors if x is not None)
    if first.dtype not in DTYPES:
        raise TypeError(f"{operation}: dtype {first.dtype} is not served, only float32, float16 and bfloat16")
    for other in others:
        if other.device != first.device:
            raise ValueError(f"{operation}: tensors lie on {first.device} and {other.device}")


def shape_of(operation: str, name: str, x: Tensor, letters: str) -> tuple[int, ...]:
    """The shape of a tensor that has a dimension for each of the letters; raises ValueError for another number."""
    if x.ndim != len(letters.split()):
        raise ValueError(f"{operation}: {name} is {list(x.shape)}, expected [{letters.replace(' ', ', ')}]")
    return x.shape


def check_shape(operation: str, name: str, x: Tensor, *shape: int) -> None:
    """Raise ValueError where a tensor has another shape than the operation needs."""
    if x.shape != shape:
        raise ValueError(f"{operation}: {name} is {list(x.shape)}, expected {list(shape)}")


def with_unit_stride(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, as kernels read it; a copy otherwise."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _addressable_by_tma(x: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, one after another."""
    stride, unit = x.stride()
    return unit == 1 and stride >= x.shape[1] and x.data_ptr() % 16 == 0 and stride * x.itemsize % 16 == 0


def operands(
    x: Tensor, weights: tuple[Tensor, ...], config: dict, block_n: int
) -> tuple[bool, Tensor | TensorDescriptor, tuple[Tensor | TensorDescriptor, ...]]:
    """x [T, K] and weights [N, K] as the main loop reads them: host descriptors where configured and where TMA can
    address them (16-byte aligned rows), pointers elsewhere. Built on the host, they need no allocator on the device."""
    for weight in weights:
        if weight.dtype != x.dtype:
            raise TypeError(f"the input is {x.dtype} and a weight {weight.dtype}: a GEMM takes one dtype")
    if not config["descriptors"] or not all(map(_addressable_by_tma, (x, *weights))):
        return False, x, weights
    blocks = [config["BLOCK_T"], config["BLOCK_K"]], [block_n, config["BLOCK_K"]]
    return (
        True,
        TensorDescriptor.from_tensor(x, blocks[0]),
        tuple(TensorDescriptor.from_tensor(weight, blocks[1]) for weight in weights),
    )


def gemm_options(x: Tensor, config: dict, block_n: int, unit: int, descriptors: bool) -> dict:
    """What the kernels around the main loop of `matmul` take beside their operands."""
    return {
        "UNIT": unit,
        "PRECISION": precision(x),
        "DESCRIPTORS": descriptors,
        "BLOCK_T": config["BLOCK_T"],
        "BLOCK_N": block_n,
        "BLOCK_K": config["BLOCK_K"],
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }


def row_stride(x: Tensor) -> int:
    """Elements from one row to the next. A single row has none: whatever its stride says, the next would follow it."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[-1]


def common_unit(x: Tensor, *sizes: int) -> int:
    """The largest number of elements, up to 16 bytes, that divides all these sizes and strides.

    Kernels get them as multiples of it and so know how wide their accesses may be; Triton itself asks for 16 elements
    or nothing, which leaves single elements for a width like 312. Raises ValueError for 2^31 elements or more: kernels
    multiply by the unit in 32 bits.
    """
    if max(sizes) >= 2**31:
        raise ValueError(f"a stride or width of {max(sizes)} elements is not served, only those below 2^31")
    return math.gcd(16 // x.itemsize, *sizes)


def run(kernel: triton.JITFunction, grid: tuple[int, ...], arguments: dict) -> None:
    """What every launch comes down to; `launching_by` puts something else in its place."""
    kernel[grid](**arguments)


@contextmanager
def launching_by(instead: Callable[[triton.JITFunction, tuple[int, ...], dict], None]) -> Iterator[None]:
    """Every launch, of all threads, goes to instead(kernel, grid, arguments): to be compiled only, or watched."""
    global run
    with _launching:
        before, run = run, instead
    try:
        yield
    finally:
        with _launching:
            run = before


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], device: torch.device, **arguments) -> None:
    """kernel[grid](**arguments) on the tensors' device, which need not be the current one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    # One at a time: of threads that need a kernel first, one compiles it; and the interpreter's state is global.
    with _launching, torch.cuda.device(device) if elsewhere else nullcontext():
        # Products and sums in one rounding: what the numbers here rest on is not left to a default.
        arguments["enable_fp_fusion"] = True
        run(kernel, grid, arguments)
