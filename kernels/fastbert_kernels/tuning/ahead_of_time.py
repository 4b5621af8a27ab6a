"""Compile kernels for a GPU that is not present, and read registers, spills, shared memory and instructions.

Triton compiles for any target, and its wheel includes NVIDIA's cuobjdump. Launchers are called with tensors of the
meta device, so that a kernel is specialized as in a real launch.
"""

import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastbert_kernels.launch import forget_launches, launching_by


@dataclass(frozen=True)
class Chip:
    """The resources of a multiprocessor, which its CTAs share. On AMD GPUs, warps are wavefronts.

    Sources: CUDA C++ Programming Guide (technical specifications by compute capability); AMD CDNA 3 instruction set.
    """

    target: GPUTarget
    matrix_instruction: str  # of 16-bit operands
    matrix_instruction_fp32: str
    program_shared_bytes: int  # the most that one CTA may use
    shared_bytes: int
    registers: int  # 32 bits wide, of all threads
    warps: int
    ctas_per_sm: int
    reserved_shared_bytes: int = 1024  # by the system, for each CTA


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), "HMMA", "HMMA", 163 * 1024, 164 * 1024, 65536, 64, 32),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), "HMMA", "HMMA", 99 * 1024, 100 * 1024, 65536, 48, 24),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), "HGMMA", "HGMMA", 227 * 1024, 228 * 1024, 65536, 64, 32),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), "tcgen05", "HMMA", 227 * 1024, 228 * 1024, 65536, 64, 32),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), "MFMA", "MFMA", 64 * 1024, 64 * 1024, 4 * 512 * 64, 32, 32, 0),
}
TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor of sm_100
# From the strongest to the weakest, as PTX and AMD's assembly name them. Code that mixes them counts as the weakest.
MATRIX_INSTRUCTIONS = {
    "tcgen05": r"\btcgen05\.mma\b", "HGMMA": r"\bwgmma\.mma_async\b", "HMMA": r"\bmma\.sync\b", "MFMA": r"\bv_mfma_\w+"
}  # fmt: skip
TMA_LOAD = r"\bcp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global\b"


@dataclass(frozen=True)
class Resources:
    """The resources of a compiled kernel: registers and spills per thread, shared and tensor memory per CTA."""

    registers: int
    spill_bytes: int  # local memory
    shared_bytes: int
    tensor_memory_columns: int
    matrix_instruction: str
    tma: bool
    code_bytes: int
    num_warps: int

    def ctas_per_sm(self, chip: Chip) -> int:
        """Return the number of CTAs that fit on a multiprocessor, by registers, shared memory, tensor memory, warps."""
        if chip.target.backend == "cuda":
            # Registers are allocated to a warp in units of 256, and warps in units of 4.
            warps = chip.registers // (-(-self.registers * 32 // 256) * 256) // 4 * 4
        else:
            # Each of 4 SIMDs has 8 wavefronts at most and 512 registers a lane, allocated in units of 8.
            warps = 4 * min(8, 512 // (-(-self.registers // 8) * 8))
        held = min(chip.warps, warps) // self.num_warps
        shared = self.shared_bytes + chip.reserved_shared_bytes
        if shared:
            held = min(held, chip.shared_bytes // shared)
        if self.tensor_memory_columns:
            held = min(held, TENSOR_MEMORY_COLUMNS // self.tensor_memory_columns)
        return min(held, chip.ctas_per_sm)


class _CompileOnlyDriver:
    """The driver of a GPU that is not present: tells Triton the target."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> "_CompileOnlyDriver":
        return self  # the key of Triton's in-memory caches, so that no earlier kernel is found

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class _Utilities:
    """The driver functions that Triton calls before the first launch of a kernel."""

    def load_binary(self, name: str, kernel: bytes, shared_bytes: int, device) -> tuple:
        return name, name, 0, 0, 1024  # module, function, registers, spills, maximum of threads

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": max(chip.program_shared_bytes for chip in CHIPS.values())}


@contextmanager
def launching_into(target: GPUTarget, launched: Callable[..., None]) -> Iterator[None]:
    """Compile launches on CPU tensors for a target, and call launched(name, grid, arguments) instead of the driver.

    So the host's work for a launch can be observed and timed without a GPU. arguments are those of the compiled kernel,
    in order; a tensor or its address stands for a pointer.
    """

    class Launcher:
        """Ends in a call of its method `launch`, as Triton's launcher does."""

        def __init__(self, source, metadata):
            pass

        def __call__(self, x, y, z, stream, function, *others):
            self.launch(x, y, z, stream, function, *others[:4], others[4:])

        def launch(self, x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, arguments):
            launched(function, (x, y, z), arguments)

    substitute = _CompileOnlyDriver(target)
    substitute.utils, substitute.launcher_cls = _Utilities(), Launcher
    driver.set_active(substitute)
    forget_launches()
    try:
        yield
    finally:
        driver.set_active(None)
        forget_launches()


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled kernel: its resources, or the compiler's error."""

    kernel: str
    config: dict  # constants and launch options
    seconds: float
    resources: Resources | None
    error: str | None


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Compile launches on meta tensors for a target, and append a `Compiled` for each of them to the list.

    Launches for which Triton uses the same kernel append the same object. Raises RuntimeError in the interpreter.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    launches: list[Compiled] = []
    found: dict = {}

    def compile_launch(kernel, grid, arguments) -> None:
        name = kernel.fn.__name__
        constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        config = {key: arguments[key] for key in (*constants, "num_warps", "num_stages") if key in arguments}
        started = time.perf_counter()
        try:
            compiled = kernel.warmup(grid=grid, **arguments)
            seconds = time.perf_counter() - started
            if compiled.hash not in found:
                found[compiled.hash] = Compiled(name, config, seconds, resources(compiled), None)
            launches.append(found[compiled.hash])
        except Exception as error:  # raised by any stage of the compiler or by its tools
            failed = Compiled(name, config, time.perf_counter() - started, None, f"{type(error).__name__}: {error}")
            launches.append(found.setdefault((name, *config.items()), failed))

    always = knobs.compilation.always_compile
    driver.set_active(_CompileOnlyDriver(target))
    knobs.compilation.always_compile = True  # a cached kernel would give a wrong compilation time
    forget_launches()  # cached launches are for another architecture
    try:
        with launching_by(compile_launch):
            yield launches
    finally:
        knobs.compilation.always_compile = always
        driver.set_active(None)  # Triton then detects the machine's own driver again
        forget_launches()


def resources(compiled: CompiledKernel) -> Resources:
    """Read the resources of a compiled kernel from its machine code, and its special instructions from the assembly.

    NVIDIA's are read from PTX: nvdisasm takes longer than the compiler.
    """
    metadata = compiled.metadata
    if metadata.target.backend == "cuda":
        code = compiled.asm["ptx"]
        registers, spill_bytes = _usage(compiled.asm["cubin"])
        code_bytes = _executable_bytes(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        registers = _of_amdgcn(code, r"\.vgpr_count")  # includes the accumulation registers
        spill_bytes = _of_amdgcn(code, r"\.private_segment_fixed_size")
        code_bytes = _of_amdgcn(code, "codeLenInByte")
    found = [name for name, pattern in MATRIX_INSTRUCTIONS.items() if re.search(pattern, code)]
    return Resources(
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", 0) or 0,
        matrix_instruction=found[-1] if found else "none",
        tma=re.search(TMA_LOAD, code) is not None,
        code_bytes=code_bytes,
        num_warps=metadata.num_warps,
    )


def _of_amdgcn(code: str, name: str) -> int:
    return int(re.search(rf"{name}(?: =|:)\s*(\d+)", code)[1])


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return a cubin's registers and bytes of local memory per thread."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def _executable_bytes(cubin: bytes) -> int:
    """Return the size of the executable sections of a 64-bit ELF file (System V ABI, chapter 4)."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    total = 0
    for number in range(count):
        flags, _, _, section_size = struct.unpack_from("<4Q", cubin, headers + number * size + 8)
        total += section_size if flags & 0x4 else 0  # SHF_EXECINSTR
    return total
