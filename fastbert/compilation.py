"""Compiling the kernels before the first request."""

from collections.abc import Iterable

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.models.bert.modeling_bert import BertForMultipleChoice

from fastbert.model import BertPooler


def warmup(model: nn.Module, shapes: Iterable[tuple[int, int]]) -> None:
    """Run a model on batches of these shapes (B, S), so that a service's first requests find the kernels compiled, and
    the graphs of their buckets captured if the model is `fastbert.graphed`. Shows a progress bar on a terminal.

    model: on the device, in the dtype and in the mode in which it will serve. Sizes that vary do not compile again: of
    a kernel there is one variant for each class of sizes in the launch configurations (of tokens in the encoder, of
    texts in the pooler, and texts of up to 64 tokens or more). The smallest batch, one of about 1,000 tokens and the
    largest meet all classes that are shipped: the pooler runs on as many texts as a shape has tokens, too, since a
    batch of as many tokens may have so many. Each shape runs without padding, with a mask on the model's device, and
    with one on the host, with token types and without; ids and mask of int64, as tokenizers send them. inputs_embeds,
    position_ids and other dtypes compile with their first batch. Raises what the model raises for such
    a batch: ValueError for one too long.
    """
    device = next(model.parameters()).device
    poolers = [module for module in model.modules() if isinstance(module, BertPooler)]
    with torch.no_grad():
        for batch_size, seq_len in tqdm(list(shapes), "warming up", unit="shape", disable=None):
            size = (batch_size, 1, seq_len) if isinstance(model, BertForMultipleChoice) else (batch_size, seq_len)
            input_ids = torch.zeros(size, dtype=torch.long, device=device)
            mask = torch.ones(size, dtype=torch.long)
            mask[:, seq_len // 2 + 1 :] = 0
            for attention_mask in (None, mask.to(device), mask):
                model(input_ids=input_ids, attention_mask=attention_mask)
                model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=input_ids)
            for pooler in poolers:
                pooler(pooler.dense.weight.new_zeros(batch_size * seq_len, 1, pooler.dense.in_features))
