"""Print how many Python functions of fastbert and fastbert_kernels one layer of a forward calls.

Kernels are launched into a function that does nothing. test_compilation.py runs this in a process of its own, without
the interpreter.
"""

import sys
from pathlib import Path

import torch
import transformers

import fastbert
import fastbert_kernels
from fastbert import tokens
from fastbert_kernels.tuning import ahead_of_time

OURS = tuple(str(Path(package.__file__).parent) for package in (fastbert, fastbert_kernels))
# The stand-ins for the driver and for Triton's launcher do not count.
INSTEAD = ahead_of_time.__file__
WARM = 5  # forwards, after which intermediate tensors reuse the memory of earlier ones


def calls(num_layers: int) -> int:
    config = transformers.BertConfig(
        vocab_size=100, num_hidden_layers=num_layers, hidden_size=768, num_attention_heads=12, intermediate_size=3072
    )
    model = fastbert.BertModel(config).eval().to(torch.bfloat16)
    ids = torch.ones(1, 16, dtype=torch.long)
    counts = []

    def count(frame, event, argument):
        name = frame.f_code.co_filename
        counts[-1] += event == "call" and name.startswith(OURS) and name != INSTEAD

    for _ in range(WARM):
        model(ids, ids)
    for _ in range(WARM):
        counts.append(0)
        sys.setprofile(count)
        try:
            model(ids, ids)
        finally:
            sys.setprofile(None)
    return min(counts)


if __name__ == "__main__":
    fastbert_kernels.INTERPRETED = True  # so that CPU tensors run in the kernels
    tokens.shapes_may_depend_on_data = lambda tensor: False
    target = ahead_of_time.CHIPS["sm_90"].target
    with (
        ahead_of_time.launching_into(target, lambda name, grid, arguments: None),
        fastbert.backend("triton"),
        torch.no_grad(),
    ):
        print((calls(12) - calls(2)) / 10)
