"""Launches that are prepared once for the specs of their tensors.

All of a launch but the addresses (checks, configuration, grid, strides, Triton's choice of a compiled kernel) depends
only on the specs of its tensors. The first call with given specs prepares the launch. Later calls pass addresses to the
compiled kernel, in a fraction of the time of a launch through Triton.
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

from fastbert_kernels.binding import Binding, Block, forget_descriptors, has_launch_hooks
from fastbert_kernels.operands import TensorSpec
from fastbert_kernels.target import current_stream, on_device

logger = logging.getLogger("fastbert_kernels")
_launching = threading.Lock()


def run(kernel: triton.JITFunction, grid: tuple[int, ...], arguments: dict) -> CompiledKernel | None:
    """Launch through Triton. `launching_by` replaces this function."""
    return kernel[grid](**arguments)


_run = run


def launches_directly() -> bool:
    """Return True if launches may bypass Triton's launcher: `run` is not replaced and there are no launch hooks."""
    return run is _run and not has_launch_hooks()


@contextmanager
def launching_by(instead: Callable[[triton.JITFunction, tuple[int, ...], dict], object]) -> Iterator[None]:
    """Call instead(kernel, grid, arguments) for every launch of all threads, to observe it or only to compile it."""
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
    """A launch on tensors of certain specs: everything but their addresses.

    constants: the kernel's arguments other than tensors. blocks: block shapes of the tensors that are accessed through
    host descriptors, by name. A grid with a zero launches nothing. binding: launches directly; None until the first
    launch has compiled the kernel.
    """

    def __init__(
        self, kernel: triton.JITFunction, grid: tuple[int, ...], device: torch.device, constants: dict,
        blocks: dict[str, list[int] | None] | None = None,
    ):  # fmt: skip
        self.kernel, self.grid, self.device = kernel, grid, device
        self.blocks = {name: block for name, block in (blocks or {}).items() if block is not None}
        # Fused multiply-add. The numerics depend on it, so it is not left to Triton's default.
        self.constants = constants | {"enable_fp_fusion": True}
        self.binding: Binding | None = None

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch on tensors with the specs of this launch, by kernel argument. Any device may be current."""
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
        # The lock lets one thread compile a kernel that several need, and protects the interpreter's global state.
        with _launching:
            compiled = run(self.kernel, self.grid, arguments)
            # compiled is None in the interpreter.
            if self.binding is None and run is _run and compiled is not None:
                self.binding = self._bound(compiled, tensors, arguments)

    def _bound(self, compiled: CompiledKernel, tensors: dict[str, Tensor | None], arguments: dict) -> Binding | None:
        """Return the binding of a compiled kernel, or None after a warning if `binding` does not know this Triton."""
        blocks = {
            name: Block(tensors[name].shape, tensors[name].stride(), tensors[name].dtype, tuple(block))
            for name, block in self.blocks.items()
        }
        given = {name: None if name in tensors else arguments[name] for name in self.kernel.arg_names}
        addresses = {name: x if x is None else x.data_ptr() for name, x in tensors.items()}
        try:
            return Binding(compiled, (*self.grid, 1, 1)[:3], given, addresses, blocks)
        except Exception as unknown:  # an untested version of Triton may raise anything here
            reason = f"{type(unknown).__name__}: {unknown}"
            _warn_once(f"launches go through the launcher of Triton {triton.__version__}, which is slower: {reason}")
            return None


_forgetting: list[Callable[[], None]] = [forget_descriptors]


def forgotten_with_launches(forget: Callable[[], None]) -> Callable[[], None]:
    """Decorator: `forget_launches` calls this function."""
    _forgetting.append(forget)
    return forget


def cached_by_specs(prepare: Callable) -> Callable:
    """Decorator: cache the results of prepare(*specs, *settings) for the last 1024 arguments, some kilobytes each.

    Callers pass specs as plain tuples from `spec_of`. prepare gets each of them as a `TensorSpec`.
    """

    @functools.lru_cache(1024)
    @functools.wraps(prepare)
    def prepared(*arguments):
        return prepare(*(TensorSpec(*x) if type(x) is tuple else x for x in arguments))

    forgotten_with_launches(prepared.cache_clear)
    return prepared


def forget_launches() -> None:
    """Clear every cache of launches. Needed after a change of configurations or of the compilation target."""
    for forget in _forgetting:
        forget()
