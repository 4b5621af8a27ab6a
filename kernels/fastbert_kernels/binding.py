"""Launch a compiled kernel through Triton's C binding to the driver, without Triton's launcher.

In each launch Triton's launcher inspects every argument in Python, builds every TMA descriptor and keeps lists of
hooks. Here the arguments that it passes to the binding are recorded once for each cached launch. Later launches fill
addresses, descriptors and the stream into this template and call the binding directly. This relies on one detail of
Triton's launcher: its attribute `launch` is the binding, or a closure around a binding called `launcher`. The tested
versions are in constraints.txt and in the Makefile.
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

# Placeholders for a stream and for addresses while a call is recorded. Strides and sizes are smaller.
_STREAM, _ADDRESS = 0x7E57 << 40, 0x7E58 << 40
MAX_DESCRIPTORS = 256  # cached for one operand, 128 bytes each plus Python's overhead; then the cache is cleared
MAX_BLOCKS = 1024  # operands of all kernels with cached descriptors


class Memory:
    """The part of a tensor that a tensor descriptor uses. It keeps no tensor alive."""

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Block(NamedTuple):
    """All of an operand's descriptor but the address: the tensor's shape, strides and dtype, and the block's shape."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    block: tuple[int, ...]

    def descriptor(self, address: int) -> TensorDescriptor:
        return TensorDescriptor(Memory(address, self.dtype), self.shape, self.strides, list(self.block))


class _Descriptors(dict):
    """The binding's arguments for the descriptor of one operand, by address."""

    def __init__(self, build: Callable[[int], object]):
        self._build = build

    def __missing__(self, address: int) -> object:
        if len(self) >= MAX_DESCRIPTORS:
            self.clear()
        found = self[address] = self._build(address)
        return found


# Keys are the kernel, the operand's name and its `Block`.
_known: dict[tuple[CompiledKernel, str, Block], _Descriptors] = {}


def forget_descriptors() -> None:
    _known.clear()


def has_launch_hooks() -> bool:
    """Return True if there are launch hooks, of a profiler for instance. Only Triton's launcher calls them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Binding:
    """The call of the binding for one compiled kernel and grid.

    arguments: all arguments of the kernel by name. addresses: those of its tensors, None for None. blocks: the `Block`
    of each tensor that is accessed through a descriptor; these tensors must exist, since descriptors are built.
    The attributes pointers and descriptors give the places of addresses and descriptors in the template, by name.
    Raises LookupError or any other exception if Triton's launcher is not one that this module knows.
    """

    def __init__(
        self, compiled: CompiledKernel, grid: tuple[int, int, int], arguments: dict, addresses: dict[str, int | None],
        blocks: dict[str, Block],
    ):  # fmt: skip
        metadata = compiled.metadata
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
            raise LookupError("the kernel needs scratch memory in each launch")
        self._compiled, self._grid = compiled, grid
        self._arguments, self._blocks = arguments, blocks
        self._launch = compiled.run.launch
        names = getattr(getattr(self._launch, "__code__", None), "co_freevars", ())
        self._wrapped = "launcher" in names
        self._binding = self._launch
        if self._wrapped:
            self._binding = self._launch.__closure__[names.index("launcher")].cell_contents
        # A placeholder for each address shows its place among the binding's arguments.
        stand_ins = {
            name: _ADDRESS + number if name not in blocks and address is not None else address
            for number, (name, address) in enumerate(addresses.items())
        }
        self._before, self._after, self.template = self._recorded(stand_ins)
        _, _, again = self._recorded(stand_ins)
        anew = [place for place, (x, y) in enumerate(zip(self.template, again, strict=True)) if _is_descriptor(x, y)]
        if len(anew) != len(blocks):
            raise LookupError(f"each launch builds {len(anew)} descriptors for {len(blocks)} operands")
        self.pointers = [
            (self.template.index(stand_in), name)
            for name, stand_in in stand_ins.items()
            if name not in blocks and stand_in is not None
        ]
        # In the order of the kernel's arguments, which the template has, too.
        described = [name for name in arguments if name in blocks]
        self.descriptors = [
            (place, name, self._descriptors_of(name, place, stand_ins))
            for place, name in zip(anew, described, strict=True)
        ]
        self.calls: dict[int, Callable[[list], None]] = {}

    def _descriptors_of(self, name: str, place: int, stand_ins: dict[str, int | None]) -> _Descriptors:
        # Shared between launches: a weight's descriptors do not depend on the number of tokens.
        key = self._compiled, name, self._blocks[name]
        known = _known.get(key)
        if known is None:
            if len(_known) >= MAX_BLOCKS:
                forget_descriptors()
            known = _known.setdefault(key, _Descriptors(partial(self._descriptor, place, stand_ins)))
        return known

    def _recorded(self, addresses: dict[str, int | None]) -> tuple[tuple, tuple, list]:
        """Return the binding's arguments: before the stream, between stream and kernel arguments, kernel arguments."""
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
            raise LookupError("the stream is not passed to the binding")
        stream = call.index(_STREAM)
        # In Triton 3.6 the kernel's arguments follow the launcher's own. Later versions pass them as one tuple.
        nested = isinstance(call[-1], list | tuple)
        arguments = call[-1] if nested else call[stream + 1 :]
        return call[:stream], call[stream + 1 : -1] if nested else None, list(arguments)

    def _descriptor(self, place: int, addresses: dict[str, int | None], address: int) -> object:
        # The other operands' memory may be freed, so all descriptors get this address.
        _, _, arguments = self._recorded(addresses | dict.fromkeys(self._blocks, address))
        return arguments[place]

    def on(self, stream: int) -> Callable[[list], None]:
        """Return a function that launches the filled template on a stream. It is cached in `calls`."""
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
    """Return True if two recordings have different objects that are no plain values: descriptors, built each time."""
    plain = int, float, str, bytes, tuple, list, dict, type(None)
    return first is not second and not isinstance(first, plain)
