"""Run a model with kernels that are compiled for sm_90 and not launched, and print what was compiled as JSON.

The output is the number of variants of each kernel after the warm-up and after many more sizes, then the spilled bytes
and the matrix instruction of each variant. Whether Triton compiles again depends on a launch's arguments only, so the
model's outputs do not matter. test_compilation.py runs this in a process of its own, without the interpreter.
"""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers

import fastbert
import fastbert_kernels
from fastbert import tokens
from fastbert_kernels.tuning.ahead_of_time import CHIPS, compiling_for


def main(dtype: str) -> None:
    fastbert_kernels.INTERPRETED = True  # so that CPU tensors run in the kernels
    config = transformers.BertConfig(vocab_size=100, num_hidden_layers=1, hidden_size=128, num_attention_heads=4)
    model = fastbert.BertModel(config).eval().to(getattr(torch, dtype))
    # All tensors are on the CPU. Masks of int32 count as masks on the host, all others as on the device.
    tokens.shapes_may_depend_on_data = lambda tensor: tensor.dtype == torch.int32 and tensor.ndim == 2

    def forward(shape):
        mask = torch.ones(shape, dtype=torch.int32)
        mask[:, -1] = 0
        ids = torch.zeros(shape, dtype=torch.long)
        with fastbert.backend("triton"), torch.no_grad():  # both are per thread
            fastbert.warmup(model, [shape])
            for types in (None, ids):
                for attention_mask in (None, mask, mask.long()):
                    model(ids, attention_mask, types)
                packed, (batch_size, seq_len) = ids.int().view(1, -1), shape
                bounds = torch.arange(batch_size + 1, dtype=torch.int32) * seq_len
                model(
                    packed, token_type_ids=None if types is None else packed, cu_seq_lens_q=bounds, max_length_q=seq_len
                )

    with compiling_for(CHIPS["sm_90"].target) as launches:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(forward, [(1, 16), (1, 128), (8, 128), (16, 128)] * 3))
        print(json.dumps(Counter(compiled.kernel for compiled in set(launches))))
        for shape in ((1, 1), (1, 17), (2, 16), (3, 5), (8, 128), (9, 128), (7, 333), (64, 64), (512, 3), (1024, 1)):
            forward(shape)
        print(json.dumps(Counter(compiled.kernel for compiled in set(launches))))
    found = {compiled: compiled.resources for compiled in launches}
    print(json.dumps([(key.kernel, value.spill_bytes, value.matrix_instruction) for key, value in found.items()]))


if __name__ == "__main__":
    main(sys.argv[1])
