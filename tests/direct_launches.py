"""Launches each kernel twice into a function in place of a GPU and prints, as JSON, what its two launches were given.

The first launch of a layout goes through Triton, the second directly. test_compilation.py runs this in a process of its
own, without the interpreter.
"""

import gc
import json
import sys
import weakref

import torch
from kernel_cases import OPS, example
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels.ahead_of_time import CHIPS, launching_into


def main(dtype: str) -> None:
    seen, given_tensors, found = [], [], []

    def launched(name, grid, arguments):
        given_tensors.append(any(isinstance(x, torch.Tensor) for x in arguments))
        seen.append((name, grid, [described(x) for x in arguments]))

    with launching_into(CHIPS["sm_90"].target, launched):
        for op in OPS:
            calls = []
            given_tensors.clear()
            kept = []  # so that the second call's tensors lie elsewhere
            for _ in range(2):
                torch.manual_seed(0)
                launcher, arguments = example(op, getattr(torch, dtype))
                kept.append(arguments)
                given = {x.data_ptr(): name for name, x in arguments.items() if isinstance(x, torch.Tensor)}
                seen.clear()
                results = launcher(**arguments)
                results = results if isinstance(results, tuple) else (results,)
                names = given | {x.data_ptr(): f"result {number}" for number, x in enumerate(results)}
                calls.append([(name, grid, [named(x, names) for x in values]) for name, grid, values in seen])
            x = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
            alive = weakref.ref(x)
            del arguments, x, kept
            gc.collect()
            half = len(given_tensors) // 2  # the first call's launches get tensors, the second's their addresses
            as_meant = given_tensors == [True] * half + [False] * half
            found.append((op, *calls, as_meant, alive() is None))
    print(json.dumps(found))


def described(x) -> object:
    if isinstance(x, TensorDescriptor):
        return ["descriptor", x.base.data_ptr(), *x.shape, *x.strides, *x.block_shape]
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def named(x, names: dict[int, str]) -> object:
    """A value with the addresses of inputs and results replaced by their names."""
    if isinstance(x, list):
        return [named(part, names) for part in x]
    return names.get(x, "an address" if isinstance(x, int) and x > 2**32 else str(x))


if __name__ == "__main__":
    main(sys.argv[1])
