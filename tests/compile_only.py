"""Runs a model with kernels that are compiled for sm_90 and not launched; prints how many variants of each there are,
twice, and of each variant the bytes that spill and the matrix instructions.

Triton decides by the arguments of a launch whether it has to compile again. No GPU is needed for that, only a driver
that says which one there would be. The model's outputs mean nothing here. test_compilation.py runs this in a process of
its own, without the interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastbert
import fastbert_kernels
import fastbert_kernels.launch
from fastbert import tokens


class CompileOnlyDriver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


kernels = set()


def compile_only(kernel, grid, device, **arguments):
    with fastbert_kernels.launch._launching:
        kernel.warmup(grid=grid, **arguments)
    kernels.add(kernel)


def variants() -> dict[str, int]:
    return {kernel.fn.__name__: len(kernel.device_caches[0][0]) for kernel in kernels}


def machine_code() -> list[tuple[str, int, int]]:
    """Of each variant: kernel, bytes of stack a thread, number of HGMMA instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = []
    for kernel in kernels:
        for compiled in kernel.device_caches[0][0].values():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage, listing = (
                    subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
                    for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
                )
            stack = int(re.search(r"STACK:(\d+)", usage)[1])
            found.append((kernel.fn.__name__, stack, len(re.findall(r"\bHGMMA\b", listing))))
    return found


def main(dtype: str) -> None:
    driver.set_active(CompileOnlyDriver())
    fastbert_kernels.INTERPRETED = True  # so that CPU tensors are served
    for name in list(sys.modules):
        if name.startswith("fastbert_kernels.") and hasattr(sys.modules[name], "launch"):
            sys.modules[name].launch = compile_only
    config = transformers.BertConfig(vocab_size=100, num_hidden_layers=1, hidden_size=384, intermediate_size=512)
    model = fastbert.BertModel(config).eval().to(getattr(torch, dtype))
    # Of the masks, all on the CPU, those of int32 stand for masks on the host.
    tokens.shapes_may_depend_on_data = lambda tensor: tensor.dtype == torch.int32

    def forward(shape):
        mask = torch.ones(shape, dtype=torch.int32)
        mask[:, -1] = 0
        ids = torch.zeros(shape, dtype=torch.long)
        with fastbert.backend("triton"), torch.no_grad():  # both hold for their thread alone
            fastbert.warmup(model, [shape])
            for types in (None, ids):
                for attention_mask in (None, mask, mask.long()):
                    model(ids, attention_mask, types)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(forward, [(1, 16), (16, 128)] * 4))
    print(json.dumps(variants()))
    for shape in ((1, 1), (1, 17), (2, 16), (3, 5), (8, 128), (9, 128), (7, 333), (64, 64), (512, 3)):
        forward(shape)
    print(json.dumps(variants()))
    print(json.dumps(machine_code()))


if __name__ == "__main__":
    main(sys.argv[1])
