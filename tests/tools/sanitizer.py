"""An address sanitizer for kernels in Triton's interpreter: a lane that is not masked off may point at an element of
the tensor that its pointer was made from, at nothing else.

Every tensor argument gets an address space of its own, so that what lies past its end is never another argument, and a
map of its elements, so that the gaps between the rows of a view are none of them. The interpreter offers no hook for
this. Patched are the method in which it prepares arguments and the four functions by which it reaches memory, from
tensor descriptors too; they are the same in Triton 3.6 to 3.9.
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

# The bits of an address below the number of its argument. Tensors lie in the middle of their spaces, which no offset of
# less than 2^56 bytes leaves: however wrong it is, the argument that it was added to is known.
SPACE_BITS = 58
MIDDLE = 1 << (SPACE_BITS - 1)


class Argument(TensorWrapper):
    """A tensor in its address space. The interpreter takes its own wrapper of tensors wherever it takes a tensor."""

    def __init__(self, name: str, number: int, tensor: Tensor):
        super().__init__(tensor, tensor.dtype)
        self.name = name
        self.start = (number << SPACE_BITS) + MIDDLE + tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.is_element = np.zeros(last + 1 if tensor.numel() else 0, dtype=bool)
        # A bool is a byte, so that the tensor's strides are the map's.
        np.lib.stride_tricks.as_strided(self.is_element, tensor.shape, tensor.stride())[...] = True

    def data_ptr(self) -> int:
        return self.start

    def contains(self, addresses: np.ndarray) -> np.ndarray:
        """Which of the addresses, uint64 [N], are those of elements: bool [N]."""
        offsets = (addresses - np.uint64(self.start)).view(np.int64)
        elements, rest = np.divmod(offsets, self.base.itemsize)
        inside = (rest == 0) & (elements >= 0) & (elements < len(self.is_element))
        inside[inside] = self.is_element[elements[inside]]
        return inside

    def describe(self, address: int) -> str:
        size, strides = list(self.base.shape), list(self.base.stride())
        element = (address - self.start) // self.base.itemsize
        return f"outside of {self.name}: element {element} of {self.base.dtype} {size} with strides {strides}"


class Sanitizer:
    """Checks the accesses of one kernel after the other; stores are the (kernel, argument) pairs that were written."""

    def __init__(self):
        self.kernel = ""
        self.arguments: list[Argument] = []
        self.stores: set[tuple[str, str]] = set()

    def begin(self, kernel: str) -> None:
        self.kernel = kernel
        self.arguments = []

    def separate(self, name: str, value):
        """The value of an argument, in an address space of its own if it is a tensor or a descriptor of one."""
        if isinstance(value, TensorDescriptor):
            return replace(value, base=self.separate(name, value.base))
        if not isinstance(value, Tensor):
            return value
        self.arguments.append(Argument(name, len(self.arguments), value))
        return self.arguments[-1]

    def resolve(self, access: str, pointers: np.ndarray, mask=True) -> np.ndarray:
        """The addresses in memory that the pointers stand for; AssertionError where a live one has no element."""
        unresolved = pointers[np.broadcast_to(mask, pointers.shape)]
        while unresolved.size:  # more than once for a block of pointers to several arguments
            first = int(unresolved[0])  # beyond all spaces it is held against the last
            argument = self.arguments[min(first >> SPACE_BITS, len(self.arguments) - 1)]
            inside = argument.contains(unresolved)
            assert inside[0], f"{self.kernel}: {access} {argument.describe(first)}, in {_kernel_line()}"
            if access != "load":
                self.stores.add((self.kernel, argument.name))
            unresolved = unresolved[~inside]
        return pointers & np.uint64(MIDDLE - 1)


def _kernel_line() -> str:
    """The innermost line on the stack that is neither Triton's nor this file's."""
    others = str(Path(triton.__file__).parent), __file__
    frame = next(frame for frame in reversed(traceback.extract_stack()) if not frame.filename.startswith(others))
    return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"


@contextmanager
def sanitized() -> Iterator[Sanitizer]:
    """Kernels launched inside fail at the first access outside of their tensors, before it happens: AssertionError,
    which the interpreter wraps in its InterpreterError. Compiled kernels are not looked at."""
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
