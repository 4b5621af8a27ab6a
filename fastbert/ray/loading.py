"""Load a sentence-transformers model once per actor: optimized, compiled and warm."""

from typing import Any, TypeVar

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer

import fastbert
from fastbert.commands.checkpoint import local_or_hub, select_device

E = TypeVar("E", SentenceTransformer, CrossEncoder)


def load(kind: type[E], model: str, device: str | None = None, dtype: torch.dtype | None = None) -> E:
    """Return an optimized model in eval mode, with every kernel compiled that it can need.

    kind: SentenceTransformer or CrossEncoder. model: a folder, or a name on the hub. device: by default a GPU if there
    is one; in an actor with `num_gpus=1` this is Ray's. dtype: of the weights; by default the checkpoint's.

    Raises OSError if there is no such model, ValueError for a device that does not exist, and what loading raises.
    """
    transformers.utils.logging.disable_progress_bar()
    encoder = kind(local_or_hub(model), device=str(select_device(device))).eval()
    if dtype is not None:
        encoder.to(dtype)
    fastbert.optimize(encoder)
    transformer: Any = encoder[0]
    fastbert.warmup(transformer.model)
    return encoder
