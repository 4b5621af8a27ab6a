"""A launch by what Triton's own launcher calls in the end: its binding to the driver, a function in C.

Triton's launcher looks at every argument in Python, builds every TMA descriptor anew and keeps lists of hooks, in each
launch. What it hands to the binding is recorded here once for each cached launch. Later launches put addresses,
descriptors and the stream into the places that these have there, and call the binding themselves. Of Triton's launcher
this knows that it has a method `launch`, which is the binding or a closure around one called `launcher`; the versions
that are tested are in constraints.txt and in the Makefile.
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


# By kernel, name of the operand and `Block`.
_known: dict[tuple[CompiledKernel, str, Block], _Descriptors] = {}


def forget_descriptors() -> None:
    _known.clear()


def is_watched() -> bool:
    """Whether somebody has hooks on launches, a profiler for instance, which only Triton's own launcher calls."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Binding:
    """The binding's call for one compiled kernel on one grid.

    arguments: all of the kernel's, by name; addresses: those of its tensors, None for one that is None; blocks: the
    `Block` of each tensor that is read or written through a descriptor. Descriptors are built, so these tensors have to
    be there. Raises LookupError, or whatever it comes to, if Triton's launcher is built otherwise than this module
    knows. pointers and descriptors say where in the template the address or the descriptor of a tensor goes, by name.
    """

    def __init__(
        self, compiled: CompiledKernel, grid: tuple[int, int, int], arguments: dict, addresses: dict[str, int | None],
        blocks: dict[str, Block],
    ):  # fmt: skip
        metadata = compiled.metadata
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
            raise LookupError("each launch allocates memory for the kernel")
        self._compiled, self._grid = compiled, grid
        self._arguments, self._blocks = arguments, blocks
        self._launch = compiled.run.launch
        names = getattr(getattr(self._launch, "__code__", None), "co_freevars", ())
        self._wrapped = "launcher" in names
        self._binding = self._launch
        if self._wrapped:
            self._binding = self._launch.__closure__[names.index("launcher")].cell_contents
        # Where the binding gets an address is found by a number that stands for it.
        stand_ins = {
            name: _ADDRESS + number if name not in blocks and address is not None else address
            for number, (name, address) in enumerate(addresses.items())
        }
        self._before, self._after, self.template = self._recorded(stand_ins)
        _, _, again = self._recorded(stand_ins)
        anew = [place for place, (x, y) in enumerate(zip(self.template, again, strict=True)) if _is_descriptor(x, y)]
        if len(anew) != len(blocks):
            raise LookupError(f"{len(anew)} arguments are made anew in each launch, of {len(blocks)}")
        self.pointers = [
            (self.template.index(stand_in), name)
            for name, stand_in in stand_ins.items()
            if name not in blocks and stand_in is not None
        ]
        # In the order of the kernel's arguments, as they stand in the template.
        described = [name for name in arguments if name in blocks]
        self.descriptors = [
            (place, name, self._descriptors_of(name, place, stand_ins))
            for place, name in zip(anew, described, strict=True)
        ]
        self.calls: dict[int, Callable[[list], None]] = {}

    def _descriptors_of(self, name: str, place: int, stand_ins: dict[str, int | None]) -> _Descriptors:
        # Of a weight they are the same whatever the number of tokens.
        key = self._compiled, name, self._blocks[name]
        known = _known.get(key)
        if known is None:
            if len(_known) >= MOST_BLOCKS:
                forget_descriptors()
            known = _known.setdefault(key, _Descriptors(partial(self._descriptor, place, stand_ins)))
        return known

    def _recorded(self, addresses: dict[str, int | None]) -> tuple[tuple, tuple, list]:
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
        described = {name: block.descriptor(addresses[name]) for name, block in self._blocks.items()}
        given = (self._arguments | addresses | described).values()
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

    def _descriptor(self, place: int, addresses: dict[str, int | None], address: int) -> object:
        # The memory of the other descriptors may be gone.
        _, _, arguments = self._recorded(addresses | dict.fromkeys(self._blocks, address))
        return arguments[place]

    def on(self, stream: int) -> Callable[[list], None]:
        """What launches the kernel on a stream, given the filled template; it is kept in `calls`."""
        call = self.calls.get(stream)
        if call is None:
            if self._after is None:
                call = self.calls[stream] = lambda arguments: self._binding(*self._before, stream, *arguments)
            else:
                call = self.calls[stream] = partial(self._binding, *self._before, stream, *self._after)
        return call

    def launch(self, stream: int, addresses: dict[str, int | None]) -> None:
        """Launch on memory at these addresses."""
        arguments = self.template.copy()
        for place, name in self.pointers:
            arguments[place] = addresses[name]
        for place, name, known in self.descriptors:
            arguments[place] = known[addresses[name]]
        self.on(stream)(arguments)


def _is_descriptor(first: object, second: object) -> bool:
    """Whether two recordings have an object each that was built for it, and no number or name."""
    plain = int, float, str, bytes, tuple, list, dict, type(None)
    return first is not second and not isinstance(first, plain)
