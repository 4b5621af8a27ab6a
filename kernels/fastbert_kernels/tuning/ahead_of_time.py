"""Kernels compiled for a GPU that need not be here, and what the compiler made of them.

Triton compiles for any target, and its wheel carries NVIDIA's disassembler: registers, spills, shared memory and the
instructions chosen can be read on any machine. Launchers are called with tensors of the meta device, so that a kernel
is specialized as in a real launch.
"""

import re
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
    """What programs share of a multiprocessor (NVIDIA: CUDA C++ Programming Guide, technical specifications by compute
    capability; AMD: CDNA 3 instruction set, compute unit). Warps are AMD's wavefronts."""

    target: GPUTarget
    matrix_instruction: str  # of 16-bit operands
    matrix_instruction_fp32: str
    program_shared_bytes: int
    shared_bytes: int
    registers: int  # 32 bits wide, of all threads
    warps: int
    ctas_per_sm: int
    reserved_shared_bytes: int = 1024  # by the system, for each program


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), "HMMA", "HMMA", 163 * 1024, 164 * 1024, 65536, 64, 32),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), "HMMA", "HMMA", 99 * 1024, 100 * 1024, 65536, 48, 24),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), "HGMMA", "HGMMA", 227 * 1024, 228 * 1024, 65536, 64, 32),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), "tcgen05", "HMMA", 227 * 1024, 228 * 1024, 65536, 64, 32),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), "MFMA", "MFMA", 64 * 1024, 64 * 1024, 4 * 512 * 64, 32, 32, 0),
}
TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor of sm_100
# From the strongest to the weakest: code that mixes them counts as its weakest.
MATRIX_INSTRUCTIONS = {"tcgen05": r"\bUTC\w*MMA\b", "HGMMA": r"\bHGMMA\b", "HMMA": r"\bHMMA\b", "MFMA": r"\bv_mfma_\w+"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes, a thread (registers, spills) or a program (shared memory)."""

    registers: int
    spill_bytes: int  # local memory
    shared_bytes: int
    tensor_memory_columns: int
    matrix_instruction: str
    tma: bool
    code_bytes: int
    num_warps: int

    def ctas_per_sm(self, chip: Chip) -> int:
        """How many programs a multiprocessor holds at a time, by registers, shared memory and warps."""
        if chip.target.backend == "cuda":
            # A warp gets registers in units of 256, and of warps 4 at a time.
            warps = chip.registers // (-(-self.registers * 32 // 256) * 256) // 4 * 4
        else:
            # Each of 4 SIMDs has 512 registers a lane, which a wavefront gets in units of 8, and 8 wavefronts.
            warps = 4 * min(8, 512 // (-(-self.registers // 8) * 8))
        held = min(chip.warps, warps) // self.num_warps
        shared = self.shared_bytes + chip.reserved_shared_bytes
        if shared:
            held = min(held, chip.shared_bytes // shared)
        if self.tensor_memory_columns:
            held = min(held, TENSOR_MEMORY_COLUMNS // self.tensor_memory_columns)
        return min(held, chip.ctas_per_sm)


class _CompileOnlyDriver:
    """Tells Triton which GPU there would be."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> "_CompileOnlyDriver":
        return self  # the key of Triton's caches in memory: none is found from before

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class _Utilities:
    """What Triton asks a driver before the first launch of a kernel."""

    def load_binary(self, name: str, kernel: bytes, shared_bytes: int, device) -> tuple:
        return name, name, 0, 0, 1024  # module, function, registers, spills, threads at most

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": max(chip.program_shared_bytes for chip in CHIPS.values())}


@contextmanager
def launching_into(target: GPUTarget, launched: Callable[..., None]) -> Iterator[None]:
    """Launchers called inside with tensors of the CPU compile for a target, and their launches end in launched(name,
    grid, arguments) in place of a GPU: what the host does for a launch, all but the driver's part, can be watched and
    timed. arguments are those of the compiled kernel, in its order; a tensor's address may stand for it."""

    class Launcher:
        """Calls its method `launch` in the end, as Triton's does."""

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
    """What became of a kernel: resources, or the compiler's error."""

    kernel: str
    config: dict  # its constants and launch options
    seconds: float
    resources: Resources | None
    error: str | None


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Launchers called inside with tensors of the meta device compile for a target; the list gets an entry a launch.

    Two launches that Triton serves by one kernel give the same entry.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("nothing compiles in Triton's interpreter: unset TRITON_INTERPRET")
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
        except Exception as error:  # from any stage of the compiler, or of its tools
            failed = Compiled(name, config, time.perf_counter() - started, None, f"{type(error).__name__}: {error}")
            launches.append(found.setdefault((name, *config.items()), failed))

    always = knobs.compilation.always_compile
    driver.set_active(_CompileOnlyDriver(target))
    knobs.compilation.always_compile = True  # so that the seconds are those of a compilation
    forget_launches()  # which are for one architecture
    try:
        with launching_by(compile_launch):
            yield launches
    finally:
        knobs.compilation.always_compile = always
        driver.set_active(None)  # Triton then looks for the machine's own again
        forget_launches()


def resources(compiled: CompiledKernel) -> Resources:
    """What a compiled kernel takes, read from its machine code."""
    metadata = compiled.metadata
    if metadata.target.backend == "cuda":
        usage, code = _disassembled(compiled.asm["cubin"])
        registers, spill_bytes = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        code_bytes = 16 + max(int(address, 16) for address in re.findall(r"/\*([0-9a-f]{4,})\*/ ", code))
    else:
        code = compiled.asm["amdgcn"]
        registers = _of_amdgcn(code, r"\.vgpr_count")  # with the accumulation registers
        spill_bytes = _of_amdgcn(code, r"\.private_segment_fixed_size")
        code_bytes = _of_amdgcn(code, "codeLenInByte")
    found = [name for name, pattern in MATRIX_INSTRUCTIONS.items() if re.search(pattern, code)]
    return Resources(
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", 0) or 0,
        matrix_instruction=found[-1] if found else "none",
        tma="UTMALDG" in code,
        code_bytes=code_bytes,
        num_warps=metadata.num_warps,
    )


def _of_amdgcn(code: str, name: str) -> int:
    return int(re.search(rf"{name}(?: =|:)\s*(\d+)", code)[1])


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of a cubin's registers, and nvdisasm's listing."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
