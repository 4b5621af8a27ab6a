"""The seam: one function per fused op, and the one place that decides what serves a call.

A call is served by the kernel of the same name in `fastbert_kernels` where its tensors, its options and this machine
allow it, and by its twin in `fastbert.eager` otherwise. `backend` (or FASTBERT_BACKEND, read when this module is
first imported, with the first model) overrides the choice. Letters as in `fastbert.tokens`.
"""

import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from fastbert import eager

BACKENDS = ("auto", "triton", "eager")
OPS = (
    "embed_layer_norm",
    "qkv_projection",
    "attention",
    "linear_activation",
    "linear_residual_layer_norm",
    "unpack",
    "pool",
)

logger = logging.getLogger("fastbert")


class _Choice(threading.local):
    """The back end of the current thread; a `threading.local` because torch.compile can trace its attributes."""

    name = os.environ.get("FASTBERT_BACKEND", "auto")


_choice = _Choice()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose what serves the ops inside the block, on this thread.

    "auto" uses Triton where it can and says each reason why not once; "triton" raises RuntimeError with the reason
    where it cannot; "eager" uses plain PyTorch. Raises ValueError for another name.
    """
    _check_name(name, "fastbert.backend")
    previous, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = previous


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown back end {name!r}, choose one of {', '.join(BACKENDS)}")


def current_backend() -> str:
    """The back end chosen for this thread; raises ValueError where FASTBERT_BACKEND holds no back end's name."""
    name = _choice.name
    if name != "auto" and name not in BACKENDS:
        _check_name(name, "FASTBERT_BACKEND")
    return name


@functools.cache
def _say_once(level: int, reason: str) -> None:
    logger.log(level, "%s", reason)


def fall_back(what: str, reason: str, device: torch.device) -> None:
    """Say once that `what` does not run in kernels, or raise RuntimeError where Triton was asked for.

    It is a warning of the logger "fastbert", and only information on a CPU, where no kernel was to be had anyway.
    """
    if _choice.name == "triton":
        raise RuntimeError(f"backend 'triton' cannot serve {what}: {reason}; 'auto' falls back to eager PyTorch")
    if not eager.is_tracing():
        level = logging.INFO if device.type == "cpu" else logging.WARNING
        _say_once(level, f"{what} runs in eager PyTorch: {reason}")


def why_not_triton(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel serves this op for such tensors on this machine; None if one does."""
    if device.type != "cuda":
        return f"the tensors are on {device.type!r} and the kernels need a CUDA device"
    return _why_not_on_cuda(op, device.index, dtype)


@functools.cache
def _why_not_on_cuda(op: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.version.cuda and torch.cuda.get_device_capability(device_index) < (8, 0):
        return "Triton emits matrix instructions from compute capability 8.0 on"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if not hasattr(import_module("fastbert_kernels"), op):
        return f"fastbert_kernels has no kernel for {op}"
    return None


def _serving(op: str, tensor: Tensor, refused: str | None = None):
    """The function that serves a call of `op` on tensors like this one; `refused` says what only eager can do."""
    name = _choice.name
    if name == "eager" or (name == "auto" and tensor.device.type == "cpu"):
        return getattr(eager, op)
    current_backend()
    reason = refused or why_not_triton(op, tensor.device, tensor.dtype)
    if reason is None:
        return getattr(import_module("fastbert_kernels"), op)
    fall_back(op, reason, tensor.device)
    return getattr(eager, op)


def embed_layer_norm(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, word_table: Tensor, position_table: Tensor, token_type_table: Tensor,
    weight: Tensor, bias: Tensor, eps: float, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """Sum of the word, token type and position embeddings of the kept tokens, layer-normalized -> [T, E].

    input_ids, token_type_ids, position_ids: integers [B, S]; None means inputs_embeds [B, S, E] in place of word rows,
    token type 0, the column as position. indices int64 [T]: the kept places of the flattened batch; None keeps all.
    The tables are [V, E], [max positions, E], [types, E]; weight and bias [E]. The word row of padding_idx gets no
    gradient.
    Devlin et al. 2019, section 3; LayerNorm: Ba et al. 2016.
    """
    return _serving("embed_layer_norm", word_table)(
        input_ids, token_type_ids, position_ids, inputs_embeds, indices,
        word_table, position_table, token_type_table, weight, bias, eps, padding_idx,
    )  # fmt: skip


def qkv_projection(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor,
    num_heads: int,
) -> Tensor:  # fmt: skip
    """x [T, E], three weights [E, E] and biases [E] -> queries, keys and values [T, 3, H, D]."""
    return _serving("qkv_projection", x)(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    mask: Tensor | None = None, implementation: str = "sdpa",
) -> Tensor:  # fmt: skip
    """softmax(scale * Q K^T) V of each head within each sequence: qkv [T, 3, H, D], cu_seqlens int32 [N + 1] -> [T, E].

    mask (bool or additive, broadcasting to [N, H, S, S]) needs sequences of one length and is served by eager only.
    implementation, "sdpa" or "eager", chooses the eager path's attention. Vaswani et al. 2017, section 3.2.
    """
    refused = "a mask of attention scores cannot be packed" if mask is not None else None
    return _serving("attention", qkv, refused)(qkv, cu_seqlens, max_seqlen, scale, mask, implementation)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """activation(x W^T + b): x [T, E], weight [F, E], bias [F] -> [T, F].

    activation: "gelu" (exact, by erf), "gelu_tanh", "relu", "tanh" or "none". GELU: Hendrycks and Gimpel 2016.
    """
    return _serving("linear_activation", x)(x, weight, bias, activation)


def linear_residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(x W^T + b + residual): x [T, F], weight [E, F], bias [E], residual [T, E] -> [T, E]."""
    return _serving("linear_residual_layer_norm", x)(x, weight, bias, residual, norm_weight, norm_bias, eps)


def unpack(hidden: Tensor, indices: Tensor | None, batch_size: int, seq_len: int) -> Tensor:
    """hidden [T, ...] to its places in [B, S, ...], zeros elsewhere; indices int64 [T], None if nothing was dropped."""
    return _serving("unpack", hidden)(hidden, indices, batch_size, seq_len)


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False) -> Tensor:
    """One vector a sequence: hidden [T, E], cu_seqlens int32 [N + 1] -> [N, E].

    mode "first" takes the first token, "mean" the mean in float32; normalize divides by the L2 norm. A sequence without
    tokens gives zeros. Raises ValueError for another mode.
    """
    return _serving("pool", hidden)(hidden, cu_seqlens, mode, normalize)
