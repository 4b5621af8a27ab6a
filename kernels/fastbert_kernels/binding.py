"""A launch by what Triton's own launcher calls in the end: its binding to the driver, a function in C.

Triton's launcher looks at every argument in Python, builds every TMA descriptor anew and keeps lists of hooks, in each
launch. What it hands to the binding is recorded here once for each plan. Later launches put addresses, descriptors and
the stream into the places that these have there, and call the binding themselves. Of Triton's launcher this knows that
it has a method `launch`, which is the binding or a closure around one called `launcher`; the versions that are tested
are in constraints.txt and in the Makefile.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType
from typing import NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

# Numbers that stand for a stream and for addresses while a call is recorded: no stride and no size is as large.
_STREAM, _ADDRESS = 0x7E57 << 40, 0x7E58 << 40
MOST_DESCRIPTORS = 256  # of one operand, 128 bytes each and what Python adds; beyond, all are built anew
MOST_BLOCKS = 1024  # that are remembered of all kernels' operands


class Memory:
    """What a tensor descriptor asks of a tensor; it keeps none alive."""

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Block(NamedTuple):
    """How an operand is read through a descriptor: the tensor's shape, strides and dtype, and the shape of a block."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    block: tuple[int, ...]

    def descriptor(self, address: int) -> TensorDescriptor:
        return TensorDescriptor(Memory(address, self.dtype), self.shape, self.strides, list(self.block))


class _Descriptors(dict):
    """What the binding takes for a descriptor of one operand, by address."""

    def __init__(self, build: Callable[[int], object]):
        self._build = build

    def __missing__(self, address: int) -> object:
        if len(self) >= MOST_DESCRIPTORS:
            self.clear()
        found = self[address] = self._build(address)
        return found


# By kernel, number of the operand and `Block`.
_known: dict[tuple[CompiledKernel, int, Block], _Descriptors] = {}


def forget_descriptors() -> None:
    _known.clear()


def is_watched() -> bool:
    """Whether somebody has hooks on launches, a profiler for instance, which only Triton's own launcher calls."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Binding:
    """The binding's call for one compiled kernel on one grid.

    arguments are those of the kernel, by name; `operands` the names of its tensors in the order in which a launch gets
    their addresses, with a `Block` for each that is read through a descriptor, and None for the others. addresses: of
    tensors that there are, for which descriptors can be built. Raises LookupError, or whatever it comes to, where
    Triton's launcher is built otherwise than this module knows.
    """

    def __init__(
        self, compiled: CompiledKernel, grid: tuple[int, int, int], arguments: dict, operands: dict[str, Block | None],
        addresses: list[int | None],
    ):  # fmt: skip
        metadata = compiled.metadata
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
            raise LookupError("each launch allocates memory for the kernel")
        self._compiled, self._grid = compiled, grid
        self._arguments, self._operands = arguments, operands
        self._launch = compiled.run.launch
        names = getattr(getattr(self._launch, "__code__", None), "co_freevars", ())
        self._wrapped = "launcher" in names
        self._binding = self._launch
        if self._wrapped:
            self._binding = self._launch.__closure__[names.index("launcher")].cell_contents
        # Where the binding gets an address is found by a number that stands for it.
        stand_ins = [
            _ADDRESS + number if block is None and address is not None else address
            for number, (block, address) in enumerate(zip(operands.values(), addresses, strict=True))
        ]
        self._before, self._after, self.template = self._recorded(stand_ins)
        _, _, again = self._recorded(stand_ins)
        anew = [place for place, (x, y) in enumerate(zip(self.template, again, strict=True)) if _is_descriptor(x, y)]
        self.pointers, self.descriptors = [], []
        for number, (block, address) in enumerate(zip(operands.values(), addresses, strict=True)):
            if block is not None:
                place = anew[len(self.descriptors)]
                # Of a weight it is the same whatever the number of tokens.
                known = _known.get((compiled, number, block))
                if known is None:
                    if len(_known) >= MOST_BLOCKS:
                        forget_descriptors()
                    known = _Descriptors(partial(self._descriptor, place, stand_ins))
                    known = _known.setdefault((compiled, number, block), known)
                self.descriptors.append((place, number, known))
            elif address is not None:
                self.pointers.append((self.template.index(stand_ins[number]), number))
        if len(anew) != len(self.descriptors):
            raise LookupError(f"{len(anew)} arguments are made anew in each launch, of {len(self.descriptors)}")
        self._calls: dict[int, Callable[[list], None]] = {}

    def _recorded(self, addresses: list[int | None]) -> tuple[tuple, tuple, list]:
        """What the binding is called with: before the stream, between it and the kernel's arguments, and these."""
        calls: list[tuple] = []

        def record(*call) -> None:
            calls.append(call)

        launcher = copy.copy(self._compiled.run)
        launcher.launch = record
        if self._wrapped:
            code, cells = self._launch.__code__, self._launch.__closure__
            cells = (
                CellType(record) if name == "launcher" else cell
                for name, cell in zip(code.co_freevars, cells, strict=True)
            )
            launcher.launch = FunctionType(code, self._launch.__globals__, closure=tuple(cells))
        values = dict(zip(self._operands, addresses, strict=True))
        given = [
            values[name]
            if name in values and self._operands[name] is None
            else self._operands[name].descriptor(values[name])
            if name in values
            else value
            for name, value in self._arguments.items()
        ]
        compiled = self._compiled
        launcher(*self._grid, _STREAM, compiled.function, compiled.packed_metadata, None, None, None, *given)
        (call,) = calls
        if _STREAM not in call:
            raise LookupError("the stream is not handed on")
        stream = call.index(_STREAM)
        # Of Triton 3.6 the kernel's arguments follow the launcher's own, later they are one argument.
        nested = isinstance(call[-1], list | tuple)
        arguments = call[-1] if nested else call[stream + 1 :]
        return call[:stream], call[stream + 1 : -1] if nested else None, list(arguments)

    def _descriptor(self, place: int, addresses: list[int | None], address: int) -> object:
        # The memory of the other descriptors may be gone.
        blocks = self._operands.values()
        _, _, arguments = self._recorded([x if y is None else address for x, y in zip(addresses, blocks, strict=True)])
        return arguments[place]

    def on(self, stream: int) -> Callable[[list], None]:
        """What launches the kernel on a stream, given the template with addresses and descriptors in it."""
        call = self._calls.get(stream)
        if call is None:
            if self._after is None:
                call = self._calls[stream] = lambda arguments: self._binding(*self._before, stream, *arguments)
            else:
                call = self._calls[stream] = partial(self._binding, *self._before, stream, *self._after)
        return call

    def launch(self, stream: int, addresses: list[int | None]) -> None:
        """Launch on memory at these addresses."""
        arguments = self.template.copy()
        for place, number in self.pointers:
            arguments[place] = addresses[number]
        for place, number, known in self.descriptors:
            arguments[place] = known[addresses[number]]
        self.on(stream)(arguments)


def _is_descriptor(first: object, second: object) -> bool:
    """Whether two recordings have an object each that was built for it, and no number or name."""
    plain = int, float, str, bytes, tuple, list, dict, type(None)
    return first is not second and not isinstance(first, plain)
