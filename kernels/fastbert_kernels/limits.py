"""The dtypes and sizes that the kernels support."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 128  # elements of a head
MAX_ROW = 16384  # elements of a row in LayerNorm, embeddings and pooling, where one program holds the whole row
MAX_TRAINED_ROW = 4096  # elements of a row in LayerNorm for training, whose sums over rows stay in registers
