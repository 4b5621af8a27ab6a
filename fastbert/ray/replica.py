"""The model of a service: token ids in, vectors or scores out, in batches that are limited by tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import serve
from sentence_transformers import CrossEncoder, SentenceTransformer

from fastbert.inference import FEW_TEXTS, PackedEncoder
from fastbert.ray.loading import load
from fastbert.ray.protocol import Limits
from fastbert.tokenization import PackedTokens, PackingTokenizer

# Seconds that a piece of a request waits for others before a batch runs.
BATCH_SECONDS = 0.005
# A number of sequences that never limits a batch.
ANY_NUMBER = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What `app` was called with. model: a folder, or a name on the hub. name: the one that clients give."""

    model: str
    name: str
    ranks: bool
    dtype: torch.dtype | None
    truncate: bool
    api_key: str | None
    limits: Limits


@dataclass(frozen=True)
class Description:
    """What a frontend needs of the model. tokenizer: cuts long texts only if the service does. longest: the maximum
    tokens of an input. piece: the maximum tokens of a piece. dim: of a vector, 1 for scores."""

    tokenizer: PackingTokenizer
    prompt: str
    longest: int
    piece: int
    vocab_size: int
    dim: int


class Model:
    """The deployment that holds the model: token ids in, vectors or scores out."""

    def __init__(self, settings: Settings):
        kind: Any = CrossEncoder if settings.ranks else SentenceTransformer
        self._encoder = load(kind, settings.model, dtype=settings.dtype)
        prompt = (self._encoder.prompts or {}).get(self._encoder.default_prompt_name) or ""
        self._packed = PackedEncoder(self._encoder, FEW_TEXTS, settings.ranks, prompt, ANY_NUMBER)
        transformer: Any = self._encoder[0]
        tokenizer = self._packed.tokenizer
        if not settings.truncate:
            tokenizer = PackingTokenizer(transformer.processor, padding=True)
        config = transformer.model.config
        longest = min(self._encoder.max_seq_length or config.max_position_embeddings, config.max_position_embeddings)
        piece = max(self._packed.max_tokens, longest)
        outputs: Any = self.outputs  # as `serve.batch` made it
        outputs.set_max_batch_size(piece)
        probe = self._run([tokenizer([("a", "b")] if settings.ranks else ["a"])])
        dim = probe[0].shape[1] if not settings.ranks else 1
        self._description = Description(tokenizer, prompt, longest, piece, config.vocab_size, dim)

    def describe(self) -> Description:
        return self._description

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=BATCH_SECONDS, batch_size_fn=lambda pieces: _total(pieces))
    async def outputs(self, pieces: list[PackedTokens]) -> list[np.ndarray]:
        """For each piece, the vectors of its N inputs, float32 [N, dim], or their scores [N].

        It holds up the event loop, on purpose: Ray makes a batch of what has arrived whether or not the device is free,
        so it must not look before. Ray's own messages, such as health checks, have another loop.
        """
        return self._run(pieces)

    @torch.inference_mode()
    def _run(self, pieces: list[PackedTokens]) -> list[np.ndarray]:
        window = self._packed.window_of_tokens(pieces)
        batches = [self._packed.features(given) for _, given in window.batches(self._packed.device)]
        if isinstance(self._encoder, CrossEncoder):
            found = self._encoder.activation_fn(torch.cat([each["scores"] for each in batches]).float()).reshape(-1)
        else:
            found = torch.cat([each["sentence_embedding"] for each in batches])[:, : self._encoder.truncate_dim].float()
        outputs = np.empty(found.shape, np.float32)
        outputs[window.rows] = found.cpu().numpy()
        return np.split(outputs, np.cumsum([len(piece.lengths) for piece in pieces])[:-1])


def _total(pieces: Sequence[PackedTokens]) -> int:
    return sum(len(piece.input_ids) for piece in pieces)
