"""Embed texts in the actors of Ray Data, one model per actor."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from sentence_transformers import SentenceTransformer

from fastbert import inference
from fastbert.ray.inputs import ERROR, VECTOR, check_column, texts_of
from fastbert.ray.loading import load
from fastbert.tokenization import Unsupported
from fastbert.windows import CPU_TOKENS, TOKENS


class Embed:
    """A callable class for `ray.data.Dataset.map_batches`, which adds the vectors of a column of texts.

    Each actor loads the model once, and computes vectors as `SentenceTransformer.encode` does after
    `fastbert.optimize`: tokenizing the next texts while the device works, without padding. The number of actors, their
    GPUs and `batch_size` are given to `map_batches`. Texts are sorted by length within a batch, so batches of thousands
    of texts are fastest:

        dataset.map_batches(
            fastbert.ray.Embed, fn_constructor_args=["sentence-transformers/all-MiniLM-L6-v2", "text"],
            batch_format="pyarrow", batch_size=16384, compute=ray.data.ActorPoolStrategy(size=8), num_gpus=1,
        )

    model: a folder, or a name on the hub, on the machine of each actor. column: of the texts. prompt: put before each
    text; by default the model's own. dtype: of the weights; by default the checkpoint's. tokens: the maximum tokens of
    a batch on the device, for a device with little memory.

    Raises ValueError for wrong arguments, and what loading raises.
    """

    def __init__(
        self, model: str, column: str = "text", *, prompt: str | None = None,
        dtype: torch.dtype | None = None, tokens: int | None = None,
    ):  # fmt: skip
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens={tokens}: it must be at least 1")
        self.encoder = load(SentenceTransformer, model, dtype=dtype)
        if prompt is None and self.encoder.default_prompt_name is not None:
            prompt = self.encoder.prompts.get(self.encoder.default_prompt_name)
        self._column, self._prompt = column, prompt
        self._tokens = tokens or (CPU_TOKENS if self.encoder.device.type == "cpu" else TOKENS)
        probe = self._encode(["text"])
        self.dim, self.dtype = probe.shape[1], probe.dtype

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add two columns to a batch: "vector", a list of dim float32 numbers, or float16 if the model's vectors are,
        and "error", a string. A row that has no vector has null there, and the reason in "error".

        Raises TypeError for another batch_format than "pyarrow" and for a column that holds no texts, ValueError if
        the column is missing or an added one exists already, and RuntimeError if the device has too little memory.
        """
        if not isinstance(batch, pa.Table):
            raise TypeError(f"the batch is a {type(batch).__name__}: map_batches needs batch_format='pyarrow'")
        if existing := {VECTOR, ERROR} & set(batch.column_names):
            raise ValueError(f"the batch has a column {existing.pop()!r} already: rename or drop it")
        check_column(batch.schema, self._column)
        vectors, errors = self.vectors(*texts_of(batch[self._column]))
        return batch.append_column(VECTOR, vectors).append_column(ERROR, errors)

    def vectors(self, texts: list[str | None], reasons: dict[int, str]) -> tuple[pa.Array, pa.Array]:
        """The vectors of N texts, a fixed-size list or null for each, and the reasons for the nulls, strings.

        texts: None if there is none. reasons: why, by the text's index.
        """
        rows = [row for row, text in enumerate(texts) if text is not None]
        found, failed = self._found([texts[row] for row in rows])
        reasons = reasons | {rows[index]: reason for index, reason in failed.items()}
        values = np.zeros((len(texts), self.dim), self.dtype)
        values[rows] = found
        missing = np.zeros(len(texts), dtype=bool)
        missing[list(reasons)] = True
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self.dim, mask=pa.array(missing))
        return vectors, pa.array([reasons.get(row) for row in range(len(texts))], pa.string())

    def _found(self, texts: list) -> tuple[np.ndarray, dict[int, str]]:
        """The vectors [N, dim] of texts, and by index the reasons for those that are no vectors."""
        failed: dict[int, str] = {}
        if not texts:
            return np.empty((0, self.dim), self.dtype), failed
        try:
            vectors = self._encode(texts)
        except torch.OutOfMemoryError as error:
            advice = (
                f"a batch of up to {self._tokens} tokens does not fit on the device: tokens={max(1, self._tokens // 2)}"
            )
            raise RuntimeError(advice) from error
        except Exception:
            failed = self._untokenizable(texts)
            if not failed:
                raise
            kept = [index for index in range(len(texts)) if index not in failed]
            vectors = np.zeros((len(texts), self.dim), self.dtype)
            vectors[kept], others = self._found([texts[index] for index in kept])
            return vectors, failed | {kept[index]: reason for index, reason in others.items()}
        for index in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
            failed[index] = f"its vector holds NaN or infinity in {self.encoder.dtype}"
        return vectors, failed

    def _encode(self, texts: list[str]) -> np.ndarray:
        try:
            # The tokens alone limit a batch: batch_size is as large.
            vectors: Any = inference.encode(
                self.encoder, texts, prompt=self._prompt, batch_size=self._tokens, max_tokens=self._tokens,
                show_progress_bar=False, output_value="sentence_embedding", save_to_cpu=True,
                normalize_embeddings=False, truncate_dim=self.encoder.truncate_dim,
            )  # fmt: skip
        except Unsupported:
            batch_size = max(1, self._tokens // (self.encoder.max_seq_length or self._tokens))
            vectors = self.encoder.encode(
                texts, prompt=self._prompt, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=False,
                convert_to_tensor=True,
            ).cpu()  # fmt: skip
        return (vectors if vectors.dtype == torch.float16 else vectors.float()).numpy()

    def _untokenizable(self, texts: list[str]) -> dict[int, str]:
        """By index, why texts cannot be tokenized."""
        failed = {}
        for index, text in enumerate(texts):
            try:
                self.encoder.tokenizer([text])
            except Exception as error:
                failed[index] = f"it cannot be tokenized: {error}"
        return failed
