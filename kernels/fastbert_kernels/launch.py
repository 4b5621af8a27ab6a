"""Launches that are prepared once for the specs of their tensors.

What a launch takes beside addresses (checks, configuration, grid, strides, Triton's choice of a compiled kernel)
follows from the specs of its tensors. The first call with given specs prepares the launch; later ones find it and hand
addresses to the compiled kernel, in a fraction of the time of a launch through Triton.
"""

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels.binding import Binding, Block, forget_descriptors, is_watched
from fastbert_kernels.operands import TensorSpec
from fastbert_kernels.target import current_stream, on_device

logger = logging.getLogger("fastbert_kernels")
_launching = threading.Lock()


def run(kernel: triton.JITFunction, grid: tuple[int, ...], arguments: dict) -> CompiledKernel | None:
    """Launch through Triton; `launching_by` puts something else in the place of this function."""
    return kernel[grid](**arguments)


_run = run


def launches_directly() -> bool:
    """Whether launches may go past Triton's launcher: nobody has replaced or watches them."""
    return run is _run and not is_watched()


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


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


class CachedLaunch:
    """A launch on tensors of certain specs: all but their addresses.

    constants: the kernel's arguments that are no tensors. blocks: by their names, the tensors that are read or written
    through host descriptors, with the shape of a block. A grid with a zero launches nothing. binding: what launches
    directly, once the first launch has compiled.
    """

    def __init__(
        self, kernel: triton.JITFunction, grid: tuple[int, ...], device: torch.device, constants: dict,
        blocks: dict[str, list[int] | None] | None = None,
    ):  # fmt: skip
        self.kernel, self.grid, self.device = kernel, grid, device
        self.blocks = {name: block for name, block in (blocks or {}).items() if block is not None}
        # Products and sums in one rounding: what the numbers here rest on is not left to a default.
        self.constants = constants | {"enable_fp_fusion": True}
        self.binding: Binding | None = None

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch on the kernel's tensor arguments, of the specs it was made for, on whatever device is the current."""
        if 0 in self.grid:
            return
        with on_device(self.device):
            if self.binding is None or not launches_directly():
                self._launch_by_triton(tensors)
            else:
                addresses = {name: x if x is None else x.data_ptr() for name, x in tensors.items()}
                self.binding.launch(current_stream(), addresses)

    def _launch_by_triton(self, tensors: dict[str, Tensor | None]) -> None:
        described = {name: TensorDescriptor.from_tensor(tensors[name], block) for name, block in self.blocks.items()}
        arguments = tensors | described | self.constants
        # One at a time: of threads that need a kernel first, one compiles it; and the interpreter's state is global.
        with _launching:
            compiled = run(self.kernel, self.grid, arguments)
            # Nothing is compiled in the interpreter.
            if self.binding is None and run is _run and compiled is not None:
                self.binding = self._bound(compiled, tensors, arguments)

    def _bound(self, compiled: CompiledKernel, tensors: dict[str, Tensor | None], arguments: dict) -> Binding | None:
        """The compiled kernel with all that Triton has chosen for tensors of these specs; None, with a warning, if this
        version of Triton launches in a way that `binding` does not know."""
        blocks = {
            name: Block(tensors[name].shape, tensors[name].stride(), tensors[name].dtype, tuple(block))
            for name, block in self.blocks.items()
        }
        given = {name: None if name in tensors else arguments[name] for name in self.kernel.arg_names}
        addresses = {name: x if x is None else x.data_ptr() for name, x in tensors.items()}
        try:
            return Binding(compiled, (*self.grid, 1, 1)[:3], given, addresses, blocks)
        except Exception as unknown:  # whatever a version of Triton does that nobody has tried
            reason = f"{type(unknown).__name__}: {unknown}"
            _warn_once(f"launches go through the launcher of Triton {triton.__version__}, which takes longer: {reason}")
            return None


_forgetting: list[Callable[[], None]] = [forget_descriptors]


def forgotten_with_launches(forget: Callable[[], None]) -> Callable[[], None]:
    """Decorator: `forget_launches` calls this function, too."""
    _forgetting.append(forget)
    return forget


def cached_by_specs(prepare: Callable) -> Callable:
    """Decorator: remember what prepare(*specs and settings) returned for the last 1024 arguments, some kilobytes each.

    Specs are given as `spec_of` returns them; prepare gets them as `TensorSpec`.
    """

    @functools.lru_cache(1024)
    @functools.wraps(prepare)
    def prepared(*arguments):
        return prepare(*(TensorSpec(*x) if type(x) is tuple else x for x in arguments))

    forgotten_with_launches(prepared.cache_clear)
    return prepared


def forget_launches() -> None:
    """For those who change what launches follow from beside specs: configurations, or the target of compilation."""
    for forget in _forgetting:
        forget()
