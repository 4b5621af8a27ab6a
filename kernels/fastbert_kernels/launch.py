"""What every launcher shares: launch configurations, checks of its operands, and launches planned by their layouts.

Configurations are data (`configuration` has their format): the first that there is of `configs/<device>.json`,
`configs/<architecture>.json` and `configs/default.json`, or the user's own file that FASTBERT_CONFIGS names.

What a launch takes beside addresses (checks, configuration, grid, strides, Triton's choice of a compiled kernel)
follows from the layouts of its tensors. The first call with a layout plans it; later ones find the plan and hand
addresses to the compiled kernel, in a fraction of the time of a launch through Triton.
"""

import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels import configuration
from fastbert_kernels.binding import Binding, Block, forget_descriptors, is_watched

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter runs the configurations of this architecture.
INTERPRETED_ARCHITECTURE = "sm_90"
MAX_ROW = 16384

logger = logging.getLogger("fastbert_kernels")
_launching = threading.Lock()
_nowhere_else = nullcontext()


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


def configuration_file(name: str) -> Path:
    """The file that serves a device or an architecture: a user's own, under every name, or the one that is shipped."""
    own = os.environ.get("FASTBERT_CONFIGS")
    return Path(own) if own else configuration.shipped(name)


@functools.cache
def configurations(name: str) -> dict:
    """The launch configurations of a device or an architecture; those of default.json, with one warning, where there
    are none."""
    path = configuration_file(name)
    if path == configuration.path_of("default"):
        logger.warning("no launch configurations for %s: using %s, which nobody has tuned for it", name, path)
    document = configuration.read(path)
    if path.parent != configuration.FOLDER:  # what is shipped is checked by the tests, and serves its device alone
        configuration.check(document, path)
        _check_devices(document, path)
    return configuration.operations(document)


def _check_devices(document: dict, path: Path) -> None:
    """Raise ValueError for a user's file that serves a GPU beside the one on which its bits were measured."""
    if "bits" not in document:
        return
    for device in range(torch.cuda.device_count()):
        if (name := torch.cuda.get_device_name(device)) != document["device"]:
            raise ValueError(
                f"launch configurations {path}: bits were measured on {document['device']}, and this process has "
                f"{name}, on which a row's bits could depend on its batch"
            )


@contextmanager
def configured_by(table: dict) -> Iterator[None]:
    """Every launch, of all threads, takes its configuration from this table: operation -> operand width -> entries."""
    global configurations
    before, configurations = configurations, lambda name: table
    forget_plans()
    try:
        yield
    finally:
        configurations = before
        forget_plans()


def configuration_name(device: torch.device) -> str:
    """What a device's launch configurations are called: its own name where it has a file, else its architecture."""
    return _configuration_name_of_gpu(device) if device.type == "cuda" else architecture(device)


@functools.cache
def _configuration_name_of_gpu(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device)
    return name if configuration.path_of(name).exists() else architecture(device)


@functools.cache
def _entries(operation: str, name: str, itemsize: int) -> tuple[dict, ...]:
    return tuple(configurations(name)[operation]["32" if itemsize == 4 else "16"])


class Layout(NamedTuple):
    """Everything about a tensor that a launch is planned by; `misaligned` is its address modulo 16."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    misaligned: int = 0


def layout_of(x: Tensor | None) -> tuple | None:
    """The fields of a `Layout`, of a tensor or nothing: what plans are found by."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)


def choose(operation: str, x: Layout, size: int) -> dict | None:
    """The launch configuration of an operation on tensors like x; None where no entry reaches the size."""
    for entry in _entries(operation, configuration_name(x.device), x.dtype.itemsize):
        if entry["up_to"] is None or size <= entry["up_to"]:
            return entry["config"]
    return None


@functools.cache
def num_processors(device: torch.device) -> int:
    """How many programs run at a time: multiprocessors of a GPU; a few in the interpreter, so that loops go round."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def torch_precision(x: Tensor) -> str | None:
    """What torch.backends wants of float32 products; None for other dtypes."""
    return torch.backends.cuda.matmul.fp32_precision if x.dtype == torch.float32 else None


def precision(x: Layout, wanted: str | None) -> str:
    """How products of float32 are made: three TF32 products, or one where torch.backends allows TF32.

    AMD's matrix instructions take float32 itself.
    """
    if x.dtype != torch.float32 or architecture(x.device).startswith("gfx"):
        return "ieee"
    return "tf32" if wanted == "tf32" else "tf32x3"


def check(operation: str, *operands: Layout | None) -> None:
    """Raise TypeError for a dtype no kernel takes, ValueError for tensors on different devices."""
    first, *others = (x for x in operands if x is not None)
    if first.dtype not in DTYPES:
        raise TypeError(f"{operation}: dtype {first.dtype} is not served, only float32, float16 and bfloat16")
    for other in others:
        if other.device != first.device:
            raise ValueError(f"{operation}: tensors lie on {first.device} and {other.device}")


def shape_of(operation: str, name: str, x: Layout, letters: str) -> tuple[int, ...]:
    """The shape of a tensor that has a dimension for each of the letters; raises ValueError for another number."""
    if len(x.shape) != len(letters.split()):
        raise ValueError(f"{operation}: {name} is {list(x.shape)}, expected [{letters.replace(' ', ', ')}]")
    return x.shape


def check_shape(operation: str, name: str, x: Layout, *shape: int) -> None:
    """Raise ValueError where a tensor has another shape than the operation needs."""
    if x.shape != shape:
        raise ValueError(f"{operation}: {name} is {list(x.shape)}, expected {list(shape)}")


def unit_strides(*operands: Layout | None) -> bool:
    """Whether the last dimension of each is contiguous, as kernels read it; nothing is read of an empty one."""
    return all(x is None or x.strides[-1] == 1 or x.shape[-1] == 1 or 0 in x.shape for x in operands)


def with_unit_stride(x: Tensor | None) -> Tensor | None:
    """x itself where `unit_strides` holds for it; a copy otherwise."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _addressable_by_tma(x: Layout) -> bool:
    """Whether rows begin at multiples of 16 bytes, one after another."""
    stride, unit = x.strides
    return unit == 1 and stride >= x.shape[1] and x.misaligned == 0 and stride * x.dtype.itemsize % 16 == 0


def through_descriptors(config: dict, x: Layout, *weights: Layout) -> bool:
    """Whether the main loop reads x [T, K] and weights [N, K] by host descriptors: where configured and where TMA can
    address them (16-byte aligned rows), by pointers elsewhere. Built on the host, they need no allocator on the device.
    """
    for weight in weights:
        if weight.dtype != x.dtype:
            raise TypeError(f"the input is {x.dtype} and a weight {weight.dtype}: a GEMM takes one dtype")
    return config["descriptors"] and all(map(_addressable_by_tma, (x, *weights)))


def gemm_blocks(config: dict, block_n: int, descriptors: bool) -> tuple[list[int] | None, list[int] | None]:
    """The blocks of x and of a weight for `Plan`: None, by pointers, where there are no descriptors."""
    if not descriptors:
        return None, None
    return [config["BLOCK_T"], config["BLOCK_K"]], [block_n, config["BLOCK_K"]]


def gemm_options(config: dict, block_n: int, unit: int, products: str, descriptors: bool) -> dict:
    """What the kernels around the main loop of `matmul` take beside their operands."""
    return {
        "UNIT": unit,
        "PRECISION": products,
        "DESCRIPTORS": descriptors,
        "BLOCK_T": config["BLOCK_T"],
        "BLOCK_N": block_n,
        "BLOCK_K": config["BLOCK_K"],
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }


def stored_block(config: dict, descriptors: bool, dtype: torch.dtype, width: int) -> list[int] | None:
    """The block of a contiguous output [T, width] that an epilogue stores through a descriptor: where configured, where
    the device has descriptors at all and where TMA can address the rows. None: through pointers."""
    if not (config["store_descriptor"] and descriptors) or width * dtype.itemsize % 16:
        return None
    return [config["BLOCK_T"], config["BLOCK_N"] // (2 if config["halves"] else 1)]


def epilogue_options(config: dict, block_out: list[int] | None) -> dict:
    """What the kernels of `finish_tile` take beside `gemm_options`."""
    return {"FLATTEN": config["flatten"], "HALVES": config["halves"], "STORE_DESCRIPTOR": block_out is not None}


def row_stride(x: Layout) -> int:
    """Elements from one row to the next. A single row has none: whatever its stride says, the next would follow it."""
    return x.strides[0] if x.shape[0] > 1 else x.shape[-1]


def common_unit(x: Layout, *sizes: int) -> int:
    """The largest number of elements, up to 16 bytes, that divides all these sizes and strides.

    Kernels get them as multiples of it and so know how wide their accesses may be; Triton itself asks for 16 elements
    or nothing, which leaves single elements for a width like 312. Raises ValueError for 2^31 elements or more: kernels
    multiply by the unit in 32 bits.
    """
    if max(sizes) >= 2**31:
        raise ValueError(f"a stride or width of {max(sizes)} elements is not served, only those below 2^31")
    return math.gcd(16 // x.dtype.itemsize, *sizes)


def run(kernel: triton.JITFunction, grid: tuple[int, ...], arguments: dict) -> CompiledKernel | None:
    """What a launch through Triton comes down to; `launching_by` puts something else in its place."""
    return kernel[grid](**arguments)


_run = run


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def launches_directly() -> bool:
    """Whether nobody has put something in the place of launches or watches them."""
    return run is _run and not is_watched()


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the current one where it is not."""
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if elsewhere else _nowhere_else


def current_stream() -> int:
    """The stream on which PyTorch works now, on the current device, as Triton's driver names it."""
    active = driver.active
    return active.get_current_stream(active.get_current_device())


@contextmanager
def launching_by(instead: Callable[[triton.JITFunction, tuple[int, ...], dict], object]) -> Iterator[None]:
    """Every launch, of all threads, goes to instead(kernel, grid, arguments): to be compiled only, or watched."""
    global run
    with _launching:
        before, run = run, instead
    try:
        yield
    finally:
        with _launching:
            run = before


class Plan:
    """A launch on tensors of certain layouts: all but their addresses.

    operands: the names of the kernel's tensor arguments in the order in which `launch` gets them; a tensor read through
    a host descriptor has the shape of its blocks beside it, one read through a pointer None. A grid with a zero
    launches nothing. binding: what launches directly, once the first launch has compiled.
    """

    def __init__(
        self, kernel: triton.JITFunction, grid: tuple[int, ...], device: torch.device,
        operands: dict[str, list[int] | None], constants: dict,
    ):  # fmt: skip
        self.kernel, self.grid, self.device, self.operands = kernel, grid, device, operands
        # Products and sums in one rounding: what the numbers here rest on is not left to a default.
        self.constants = constants | {"enable_fp_fusion": True}
        self.binding: Binding | None = None

    def launch(self, *tensors: Tensor | None) -> None:
        """Launch on tensors of the layouts planned for; their device need not be the current one."""
        if 0 in self.grid:
            return
        with on_device(self.device):
            if self.binding is None or not launches_directly():
                self._launch_by_triton(tensors)
            else:
                self.binding.launch(current_stream(), [x if x is None else x.data_ptr() for x in tensors])

    def _launch_by_triton(self, tensors: tuple[Tensor | None, ...]) -> None:
        arguments = {
            name: tensor if tensor is None or block is None else TensorDescriptor.from_tensor(tensor, block)
            for (name, block), tensor in zip(self.operands.items(), tensors, strict=True)
        } | self.constants
        # One at a time: of threads that need a kernel first, one compiles it; and the interpreter's state is global.
        with _launching:
            compiled = run(self.kernel, self.grid, arguments)
            # Nothing is compiled in the interpreter.
            if self.binding is None and run is _run and compiled is not None:
                self.binding = self._bound(compiled, tensors, arguments)

    def _bound(self, compiled: CompiledKernel, tensors: tuple[Tensor | None, ...], arguments: dict) -> Binding | None:
        """What tensors of the same layouts and the same constants get again of what Triton has chosen."""
        blocks = {
            name: None if block is None else Block(tensor.shape, tensor.stride(), tensor.dtype, tuple(block))
            for (name, block), tensor in zip(self.operands.items(), tensors, strict=True)
        }
        given = {name: None if name in blocks else arguments[name] for name in self.kernel.arg_names}
        addresses = [x if x is None else x.data_ptr() for x in tensors]
        try:
            return Binding(compiled, (*self.grid, 1, 1)[:3], given, blocks, addresses)
        except Exception as unknown:  # whatever a version of Triton does that nobody has tried
            reason = f"{type(unknown).__name__}: {unknown}"
            _warn_once(f"launches go through the launcher of Triton {triton.__version__}, which takes longer: {reason}")
            return None


_forgetting: list[Callable[[], None]] = [forget_descriptors]


def forgotten_with_plans(forget: Callable[[], None]) -> Callable[[], None]:
    """`forget_plans` is to call this, too."""
    _forgetting.append(forget)
    return forget


def planned(plan_of: Callable) -> Callable:
    """Remember what plan_of(*layouts and settings) returned for the last 1024 arguments: some kilobytes each."""

    @functools.lru_cache(1024)
    @functools.wraps(plan_of)
    def planner(*arguments):
        return plan_of(*(Layout(*x) if type(x) is tuple else x for x in arguments))

    forgotten_with_plans(planner.cache_clear)
    return planner


def forget_plans() -> None:
    """For those who change what plans follow from beside layouts: configurations, or the target of compilation."""
    _entries.cache_clear()
    for forget in _forgetting:
        forget()
