"""Launch each kernel twice into a function instead of a GPU, and print the arguments of both launches as JSON.

The first launch of a layout goes through Triton, the second is direct. The same holds for the first and second call of
a layer. The function replaces the driver binding behind Triton's own CUDA launcher. test_compilation.py runs this in a
process of its own, without the interpreter.
"""

import gc
import json
import sys
import weakref
from types import SimpleNamespace

import torch
from kernel_cases import OPS, example
from torch import nn
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import fastbert_kernels
from fastbert_kernels.launch import forget_launches
from fastbert_kernels.tuning.ahead_of_time import CHIPS, launching_into

HEADS = 2
# Tokens and width: few tokens, and enough that results are stored through descriptors.
LAYERS = {"encoder_layer": (40, 64), "encoder_layer of many tokens": (1100, 128)}


class Descriptor:
    """The stand-in for the descriptor that the binding builds."""

    def __init__(self, address: int, *others):
        self.fields = [address, *(list(x) if isinstance(x, tuple | list | torch.Size) else x for x in others)]


def behind_tritons_launcher(launched) -> None:
    """Launch by Triton's CUDA launcher, with a binding that calls launched(name, grid, arguments)."""

    def binding(x, y, z, stream, function, *others):
        # In Triton 3.6 the kernel's arguments follow the launcher's own. Later versions pass them as one tuple.
        nested = isinstance(others[-1], list | tuple)
        arguments = others[-1] if nested else others[nvidia._BASE_ARGS_FORMAT_LEN - 5 :]
        launched(function, (x, y, z), [x.fields if isinstance(x, Descriptor) else x for x in arguments])

    utilities = driver.active.utils
    utilities.launch, utilities.build_signature_metadata = binding, lambda signature: b""
    utilities.fill_tma_descriptor = utilities.fill_tma_descriptor_tiled = Descriptor
    nvidia.PyKernelArg = SimpleNamespace
    nvidia.compile_module_from_src, nvidia.library_dirs = lambda **_: SimpleNamespace(launch=binding), list
    driver.active.launcher_cls = nvidia.CudaLauncher


def layer_example(dtype: torch.dtype, tokens: int, width: int) -> tuple:
    def linear(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        module = nn.Linear(inputs, outputs, dtype=dtype)
        return module.weight.detach(), module.bias.detach()

    projections = [linear(width, width) for _ in range(4)]
    norm = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)
    parts = *projections, norm, linear(width, 4 * width), linear(4 * width, width), tuple(x.clone() for x in norm)
    weights = fastbert_kernels.LayerWeights(*(x for part in parts for x in part))
    x, bounds = torch.randn(tokens, width, dtype=dtype), torch.tensor([0, 16, 37], dtype=torch.int32)
    arguments = {
        "x": x, "weights": weights, "cu_seqlens": bounds, "max_seqlen": 30, "num_heads": HEADS, "scale": 0.125,
        "activation": "gelu", "eps": (1e-12, 1e-12), "num_tokens": bounds[-1:],
    }  # fmt: skip
    return fastbert_kernels.encoder_layer, arguments


def tensors_of(arguments: dict) -> dict[str, torch.Tensor]:
    found = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    return found | {f"weight {number}": x for number, x in enumerate(arguments.get("weights", []))}


def main(dtype: str) -> None:
    seen, given_tensors, found = [], [], []

    def launched(name, grid, arguments):
        given_tensors.append(any(isinstance(x, torch.Tensor) for x in arguments))
        seen.append((name, grid, [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]))

    with launching_into(CHIPS["sm_90"].target, launched):
        behind_tritons_launcher(launched)
        for op in (*OPS, *LAYERS):
            calls = []
            forget_launches()  # two ops may share a launch
            given_tensors.clear()
            kept = []  # keeps the memory, so that the second call's tensors have other addresses
            for _ in range(2):
                torch.manual_seed(0)
                dtype_of = getattr(torch, dtype)
                launcher, arguments = layer_example(dtype_of, *LAYERS[op]) if op in LAYERS else example(op, dtype_of)
                kept.append(arguments)
                given = {x.data_ptr(): name for name, x in tensors_of(arguments).items()}
                seen.clear()
                results = launcher(**arguments)
                results = results if isinstance(results, tuple) else (results,)
                final = given | {x.data_ptr(): f"result {number}" for number, x in enumerate(results)}
                # A layer's output may reuse the memory of an intermediate tensor, which must not get its name.
                names = [given if op in LAYERS else final] * (len(seen) - 1) + [final]
                calls.append(
                    [
                        (name, grid, [named(x, known) for x in values])
                        for (name, grid, values), known in zip(seen, names, strict=True)
                    ]
                )
            inputs = [weakref.ref(x) for each in kept for x in tensors_of(each).values()]
            del arguments, kept, launcher
            gc.collect()
            half = len(given_tensors) // 2  # the first call's launches get tensors, the second's their addresses
            first, second = given_tensors[:half], given_tensors[half:]
            # A layer launches some kernels twice on the same layouts, so its first call has direct launches, too.
            as_meant = not any(second) and (first[0] if op in LAYERS else all(first))
            found.append((op, *calls, as_meant, all(x() is None for x in inputs)))
    print(json.dumps(found))


def named(x, names: dict[int, str]) -> object:
    """Return a value with the addresses of inputs and results replaced by their names."""
    if isinstance(x, list):
        return [named(part, names) for part in x]
    return names.get(x, "an address" if isinstance(x, int) and x > 2**32 else str(x))


if __name__ == "__main__":
    main(sys.argv[1])
