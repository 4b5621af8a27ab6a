"""An address sanitizer for kernels in Triton's interpreter.

A lane that is not masked off may only access elements of the tensor that its pointer was made from. Every tensor
argument gets an address space of its own, so that no address past its end belongs to another argument, and a map of its
elements, so that gaps between the rows of a view are detected. The interpreter has no hook for this, so the method that
prepares arguments and the four functions that access memory (also for descriptors) are patched. They are the same in
Triton 3.6 to 3.9.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import triton
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

# The lower bits of an address, below the number of its argument. Tensors are in the middle of their spaces, so an
# offset below 2^56 bytes never leaves the space, and the argument is known.
SPACE_BITS = 58
MIDDLE = 1 << (SPACE_BITS - 1)


class Argument(TensorWrapper):
    """A tensor in its own address space. The interpreter accepts a TensorWrapper wherever it accepts a tensor."""

    def __init__(self, name: str, number: int, tensor: Tensor):
        super().__init__(tensor, tensor.dtype)
        self.name = name
        self.start = (number << SPACE_BITS) + MIDDLE + tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.is_element = np.zeros(last + 1 if tensor.numel() else 0, dtype=bool)
        # A bool is one byte, so the tensor's strides in elements are the map's in bytes.
        np.lib.stride_tricks.as_strided(self.is_element, tensor.shape, tensor.stride())[...] = True

    def data_ptr(self) -> int:
        return self.start

    def contains(self, addresses: np.ndarray) -> np.ndarray:
        """Return bool [N]: whether each of the addresses, uint64 [N], is that of an element."""
        offsets = (addresses - np.uint64(self.start)).view(np.int64)
        elements, rest = np.divmod(offsets, self.base.itemsize)
        inside = (rest == 0) & (elements >= 0) & (elements < len(self.is_element))
        inside[inside] = self.is_element[elements[inside]]
        return inside

    def describe(self, address: int) -> str:
        size, strides = list(self.base.shape), list(self.base.stride())
        element = (address - self.start) // self.base.itemsize
        return f"outside {self.name}: element {element} of {self.base.dtype} {size} with strides {strides}"


class Sanitizer:
    """Checks the accesses of kernels. stores: the (kernel, argument) pairs that were written."""

    def __init__(self):
        self.kernel = ""
        self.arguments: list[Argument] = []
        self.stores: set[tuple[str, str]] = set()

    def begin(self, kernel: str) -> None:
        self.kernel = kernel
        self.arguments = []

    def separate(self, name: str, value):
        """Return an argument, in its own address space if it is a tensor or a descriptor."""
        if isinstance(value, TensorDescriptor):
            return replace(value, base=self.separate(name, value.base))
        if not isinstance(value, Tensor):
            return value
        self.arguments.append(Argument(name, len(self.arguments), value))
        return self.arguments[-1]

    def resolve(self, access: str, pointers: np.ndarray, mask=True) -> np.ndarray:
        """Return the memory addresses of the pointers. Raises AssertionError if one not masked off has no element."""
        unresolved = pointers[np.broadcast_to(mask, pointers.shape)]
        while unresolved.size:  # several iterations for pointers to several arguments
            first = int(unresolved[0])  # an address past all spaces is compared with the last argument
            argument = self.arguments[min(first >> SPACE_BITS, len(self.arguments) - 1)]
            inside = argument.contains(unresolved)
            assert inside[0], f"{self.kernel}: {access} {argument.describe(first)}, in {_kernel_line()}"
            if access != "load":
                self.stores.add((self.kernel, argument.name))
            unresolved = unresolved[~inside]
        return pointers & np.uint64(MIDDLE - 1)


def _kernel_line() -> str:
    """Return the innermost line on the stack that is neither in Triton nor in this file."""
    others = str(Path(triton.__file__).parent), __file__
    frame = next(frame for frame in reversed(traceback.extract_stack()) if not frame.filename.startswith(others))
    return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"


@contextmanager
def sanitized() -> Iterator[Sanitizer]:
    """Let kernels fail before their first access outside their tensors. Compiled kernels are not checked.

    The AssertionError is the cause of the interpreter's InterpreterError.
    """
    sanitizer, memory = Sanitizer(), interpreter._interpreter
    prepare = interpreter.GridExecutor._init_args_hst
    load, store, update, compare_and_swap = memory.load, memory.store, memory.atomic_rmw, memory.atomic_cas

    def prepare_separated(executor, args, kwargs):
        args, kwargs = prepare(executor, args, kwargs)
        sanitizer.begin(executor.fn.__name__)
        args = [sanitizer.separate(name, value) for name, value in zip(executor.arg_names, args, strict=False)]
        return args, {name: sanitizer.separate(name, value) for name, value in kwargs.items()}

    checked = {
        "load": lambda ptr, mask, *rest: load(sanitizer.resolve("load", ptr, mask), mask, *rest),
        "store": lambda ptr, value, mask: store(sanitizer.resolve("store", ptr, mask), value, mask),
        "atomic_rmw": lambda op, ptr, value, mask, order: update(
            op, sanitizer.resolve("atomic", ptr, mask), value, mask, order
        ),
        "atomic_cas": lambda ptr, *rest: compare_and_swap(sanitizer.resolve("atomic", ptr), *rest),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", prepare_separated)
        for name, function in checked.items():
            patch.setattr(memory, name, function)
        yield sanitizer
