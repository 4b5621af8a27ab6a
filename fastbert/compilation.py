"""`warmup`: compile the kernels and capture CUDA graphs before the first request."""

import json
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.models.bert.modeling_bert import BertForMultipleChoice

from fastbert.automatic import cuda_graphs
from fastbert.graph_rules import ThreadSetting
from fastbert.inference import MODELS, why_needs_padding
from fastbert.model import BertModel, BertPooler
from fastbert.ops import backend

# Operations whose launch configuration depends on the number of tokens.
BY_TOKENS = ("qkv_projection", "linear_activation", "linear_residual")
SHORT = 64  # attention has another kernel variant for sequences up to this length


def warmup(model: nn.Module, shapes: Iterable[tuple[int, int]] = ()) -> None:
    """Compile every kernel variant that a model can need on its GPU, and capture the graphs of these shapes (B, S).

    model: on the device, in the dtype and mode in which it will run. Kernels have variants for classes of sizes: of
    token counts in the encoder, of sequence counts in the pooler, and in attention one for sequences of up to 64 tokens
    and one for longer ones. Each shape runs without a mask, with a mask on the device and with one on the host, each
    with and without token types, in int64 as tokenizers return them. Models that `encode` and `predict` call with
    packed sequences also run packed, in int32. The pooler also runs on as many sequences as a shape has tokens.
    inputs_embeds, position_ids and other dtypes compile with their first batch. Graphs are captured unless they are
    turned off, with or without `fastbert.graphed`.

    Shows a progress bar on a terminal. Raises what the model raises, such as ValueError for a shape that is too long.
    """
    shapes, classes = list(shapes), _shapes_of_classes(model)
    with torch.no_grad(), tqdm(total=len(shapes) + len(classes), desc="warming up", unit="shape", disable=None) as bar:
        for shape in classes:
            with cuda_graphs("off"):
                _run(model, *shape)
            bar.update()
        for shape in shapes:
            with ThreadSetting("is_warmup", True):
                _run(model, *shape)
            bar.update()


def _shapes_of_classes(model: nn.Module) -> list[tuple[int, int]]:
    """Batches (B, S) that cover every class of sizes for which a model's kernels are compiled."""
    encoder = next((module for module in model.modules() if isinstance(module, BertModel)), None)
    if encoder is None or encoder.device.type == "cpu":
        return []
    path = backend.launch_configurations(encoder.device)
    if path is None:
        return []
    table, width = json.loads(path.read_text()), "32" if encoder.dtype.itemsize == 4 else "16"
    limits = {entry["up_to"] for operation in BY_TOKENS for entry in table[operation][width]}
    return class_shapes(limits, encoder.embeddings.position_embeddings.num_embeddings)


def class_shapes(limits: Iterable[int | None], max_seq_len: int) -> list[tuple[int, int]]:
    """For each class the largest batch (B, S) of short sequences and the largest of sequences up to max_seq_len. For
    the class without a limit, the smallest ones."""
    bounds = [0, *sorted(limit for limit in limits if limit is not None)]
    found: dict[tuple[int, int], None] = {}
    for low, high in (*pairwise(bounds), (bounds[-1], None)):
        for seq_len in (min(SHORT, max_seq_len), max_seq_len):
            if high is not None:
                seq_len = min(seq_len, high)
            found[low // seq_len + 1 if high is None else high // seq_len, seq_len] = None
    return list(found)


def _run(model: nn.Module, batch_size: int, seq_len: int) -> None:
    device = next(model.parameters()).device
    size = (batch_size, 1, seq_len) if isinstance(model, BertForMultipleChoice) else (batch_size, seq_len)
    input_ids = torch.zeros(size, dtype=torch.long, device=device)
    mask = torch.ones(size, dtype=torch.long)
    mask[:, seq_len // 2 + 1 :] = 0
    for attention_mask in (None, mask.to(device), mask):
        model(input_ids=input_ids, attention_mask=attention_mask)
        model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=input_ids)
    if type(model) in MODELS.values() and why_needs_padding(model) is None:
        packed = input_ids.int().view(1, -1)
        cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
        for types in (None, packed):
            model(input_ids=packed, token_type_ids=types, cu_seq_lens_q=cu_seqlens, max_length_q=seq_len)
    for pooler in (module for module in model.modules() if isinstance(module, BertPooler)):
        pooler(pooler.dense.weight.new_zeros(batch_size * seq_len, 1, pooler.dense.in_features))
