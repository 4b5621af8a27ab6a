"""Compiling the kernels, and capturing graphs, before the first request."""

import json
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.models.bert.modeling_bert import BertForMultipleChoice

from fastbert.automatic import cuda_graphs
from fastbert.graph_rules import Set
from fastbert.inference import MODELS, why_padded
from fastbert.model import BertModel, BertPooler
from fastbert.ops import backend

# The operations whose launch configurations go by the number of tokens.
BY_TOKENS = ("qkv_projection", "linear_activation", "linear_residual")
SHORT = 64  # tokens of a text that attention takes for short


def warmup(model: nn.Module, shapes: Iterable[tuple[int, int]] = ()) -> None:
    """Run a model on a GPU for every class of sizes in its launch configurations, so that no later size compiles, and
    on batches of these shapes (B, S), so that the graphs of their buckets are captured: by `fastbert.graphed`, or
    without it where models capture by themselves. Shows a progress bar on a terminal.

    model: on the device, in the dtype and in the mode in which it will serve. Of a kernel there is one variant for each
    class of sizes (of tokens in the encoder, of texts in the pooler, and texts of up to 64 tokens or more). Each shape
    runs without padding, with a mask on the model's device, and with one on the host, with token types and without; ids
    and mask of int64, as tokenizers send them; of the models that `encode` and `predict` give packed texts, so, too,
    with ids and bounds of int32. The pooler runs on as many texts as a shape has tokens, too, since a batch of as many
    tokens may have so many. inputs_embeds, position_ids and other dtypes compile with their first batch. Raises
    what the model raises for such a batch: ValueError for one too long.
    """
    shapes, classes = list(shapes), _shapes_of_classes(model)
    with torch.no_grad(), tqdm(total=len(shapes) + len(classes), desc="warming up", unit="shape", disable=None) as bar:
        for shape in classes:
            with cuda_graphs("off"):
                _run(model, *shape)
            bar.update()
        for shape in shapes:
            with Set("is_warmup", True):
                _run(model, *shape)
            bar.update()


def _shapes_of_classes(model: nn.Module) -> list[tuple[int, int]]:
    """Batches (B, S) that meet every class of sizes for which a model's kernels are compiled."""
    encoder = next((module for module in model.modules() if isinstance(module, BertModel)), None)
    if encoder is None or encoder.device.type == "cpu":
        return []
    path = backend.launch_configurations(encoder.device)
    if path is None:
        return []
    table, width = json.loads(path.read_text()), "32" if encoder.dtype.itemsize == 4 else "16"
    limits = {entry["up_to"] for operation in BY_TOKENS for entry in table[operation][width]}
    return class_shapes(limits, encoder.embeddings.position_embeddings.num_embeddings)


def class_shapes(limits: Iterable[int | None], longest: int) -> list[tuple[int, int]]:
    """Batches (B, S) with as many tokens as each class has at most, of short texts and of longer ones, none longer than
    `longest`; and a batch of more."""
    found, bounds = {}, [0, *sorted(limit for limit in limits if limit is not None)]
    for low, high in (*pairwise(bounds), (bounds[-1], None)):
        for seq_len in (min(SHORT, longest), longest):
            if high is not None:
                seq_len = min(seq_len, high)
            # The largest batch of the class, or the smallest of the last one.
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
    if type(model) in MODELS.values() and why_padded(model) is None:
        packed = input_ids.int().view(1, -1)
        bounds = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
        for types in (None, packed):
            model(input_ids=packed, token_type_ids=types, cu_seq_lens_q=bounds, max_length_q=seq_len)
    for pooler in (module for module in model.modules() if isinstance(module, BertPooler)):
        pooler(pooler.dense.weight.new_zeros(batch_size * seq_len, 1, pooler.dense.in_features))
