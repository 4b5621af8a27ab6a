"""The sizes and dtypes that the kernels take."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 128  # elements of a head
MAX_ROW = 16384  # elements of a row that a program holds whole: LayerNorm, embeddings, pooling
