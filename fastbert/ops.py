"""The seam: one function per fused op, and the one place that decides what serves a call.

A call is served by the kernel of the same name in `fastbert_kernels` where its tensors, its options and this machine
allow it, and by its twin in `fastbert.eager` otherwise. `backend` (or FASTBERT_BACKEND, read when this module is
first imported, with the first model) overrides the choice. Letters as in `fastbert.tokens`.

num_tokens, an int32 [1] on the device, is how many of the T rows count where the host does not know it: kernels neither
read nor write the rows from there on, the eager twins take and return zeros there.
"""

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastbert import eager

BACKENDS = ("auto", "triton", "eager")
OPS = (
    "packing_plan",
    "embed_layer_norm",
    "qkv_projection",
    "attention",
    "linear_activation",
    "linear_residual_layer_norm",
    "unpack",
    "pool",
)

MAX_HEAD_SIZE = 128
MAX_ROW = 16384  # elements of a row of `pool`
NEED_CUDA = "the kernels need a CUDA device"
# Whether an index out of range raises in the call that met it, which waits for the device.
CHECK_IDS = os.environ.get("FASTBERT_CHECK") == "1"

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
def say_once(level: int, reason: str) -> None:
    logger.log(level, "%s", reason)


def fall_back(what: str, reason: str, device: torch.device) -> None:
    """Say once that `what` does not run in kernels, or raise RuntimeError where Triton was asked for.

    It is a warning of the logger "fastbert", and only information on a CPU, where no kernel was to be had anyway.
    """
    if _choice.name == "triton":
        raise RuntimeError(f"backend 'triton' cannot serve {what}: {reason}; 'auto' falls back to eager PyTorch")
    if not eager.is_tracing() or eager.is_jit_tracing():
        level = logging.INFO if device.type == "cpu" else logging.WARNING
        say_once(level, f"{what} runs in eager PyTorch: {reason}")


def why_not_triton(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel serves this op for such tensors on this machine; None if one does."""
    return _why_not_triton(op, device.type, device.index, dtype)


# A traced graph takes the answer as a constant: what torch.compiler.assume_constant_result sets, without its import of
# the whole of torch._dynamo.
why_not_triton._dynamo_marked_constant = True


@functools.cache
def _why_not_triton(op: str, device_type: str, device_index: int | None, dtype: torch.dtype) -> str | None:
    if device_type not in ("cuda", "cpu"):
        return f"the tensors are on {device_type!r} and {NEED_CUDA}"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device_type == "cpu" and not import_module("fastbert_kernels").INTERPRETED:
        return (
            f"the tensors are on 'cpu' and {NEED_CUDA}, or TRITON_INTERPRET=1 before Triton is imported, to debug them"
        )
    if device_type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device_index) < (8, 0):
        return "Triton emits matrix instructions from compute capability 8.0 on"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if not hasattr(import_module("fastbert_kernels"), op):
        return f"fastbert_kernels has no kernel for {op}"
    return None


def launch_configurations(device: torch.device) -> Path | None:
    """The file by which kernels are launched on a device, None where none can be. Raises ValueError for a bad file."""
    if why_not_triton("attention", device, torch.float32) is not None:
        return None
    launch = import_module("fastbert_kernels.launch")
    name = launch.configuration_name(device)
    launch.configurations(name)  # reads and checks it
    return launch.configuration_file(name)


def why_not_head_size(head_size: int) -> str | None:
    """Why no kernel attends with heads of this size; None if one does."""
    return f"heads of {head_size} are larger than {MAX_HEAD_SIZE}" if head_size > MAX_HEAD_SIZE else None


def _wants_kernels(device: torch.device) -> bool:
    """Whether the chosen back end asks kernels first for tensors on this device."""
    if _choice.name == "auto":
        return device.type != "cpu"
    return current_backend() == "triton"


def _why_not_exported() -> str | None:
    """Why what is traced right now holds none of our kernels; None if it may."""
    leaves = eager.is_jit_tracing() or torch.onnx.is_in_onnx_export()
    return "what torch.jit.trace and torch.onnx record runs without fastbert" if leaves else None


def why_eager(op: str, device: torch.device, dtype: torch.dtype, head_size: int = 0) -> str | None:
    """Why the eager twin serves a call of `op` on such tensors; None if a kernel does."""
    if _wants_kernels(device):
        exported = _why_not_exported() if eager.is_tracing() else None
        return exported or why_not_triton(op, device, dtype) or why_not_head_size(head_size)
    chosen = current_backend()
    return "backend 'eager' is chosen" if chosen == "eager" else f"the tensors are on 'cpu' and {NEED_CUDA}"


def packs_on_device(device: torch.device) -> bool:
    """Whether a mask on this device is packed there, without the host ever knowing how many tokens are kept."""
    return why_eager("packing_plan", device, torch.float32) is None


def launches_directly(tensor: Tensor, refused: str | None = None) -> bool:
    """Whether every op without gradients of tensors like this one, in their own dtype, is a launch of its kernel:
    nobody traces, transforms or watches. refused: as for a call of an op."""
    return (
        refused is None
        and _wants_kernels(tensor.device)
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled(tensor.device.type))
        and not (eager.is_tracing() or eager.is_transforming() or eager.is_watched())
        and why_not_triton("encoder_layer", tensor.device, tensor.dtype) is None
    )


def _kernel(op: str, tensor: Tensor, refused: str | None = None) -> Callable | None:
    """What serves a call of `op` on tensors like this one: the kernel's launcher, the op of `fastbert.library` where
    somebody traces or records it, None for the eager twin. `refused` says what only eager can do."""
    if not _wants_kernels(tensor.device):
        return None
    tracing = eager.is_tracing()
    if tracing:
        refused = _why_not_exported() or refused
    elif eager.is_transforming():
        refused = "a function transform or a forward-mode derivative is active"
    reason = refused or why_not_triton(op, tensor.device, tensor.dtype)
    if reason is not None:
        fall_back(op, reason, tensor.device)
        return None
    if tracing or torch.is_grad_enabled() or eager.is_watched():
        return getattr(torch.ops.fastbert, op)
    # Already imported by why_not_triton; import_module takes ten times as long as the dictionary.
    return getattr(sys.modules["fastbert_kernels"], op)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as it casts the arguments of `torch.nn.functional.linear`."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def raise_bad_ids(device: torch.device, wait: bool = False) -> None:
    """Raise IndexError if kernels on this device have met an index out of range since the last call of this function.

    The outputs of such a text are NaN. Without `wait` kernels that still run are not waited for, so that the error
    comes with a later call. A traced graph and a mode that sees every op have no place for it: there the next call
    without them raises.
    """
    if eager.is_tracing() or eager.is_transforming() or eager.is_watched():
        return
    # Not there before the first kernel, nor while another thread still imports it.
    take_bad_ids = getattr(sys.modules.get("fastbert_kernels"), "take_bad_ids", None)
    if take_bad_ids is None:
        return
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    found = take_bad_ids(device)
    if found:
        values = ", ".join(f"{name} held {value}, allowed are 0 to {limit - 1}" for name, value, limit in found)
        raise IndexError(
            f"{values}: the outputs of that text, in this call or an earlier one, are NaN; FASTBERT_CHECK=1 in the "
            "environment raises in the call itself"
        )


def packing_plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of a padded batch lie in the packed one: mask [B, S], zero for padding -> indices, cu_seqlens.

    indices int64 [B * S] is a permutation of the flattened batch, the kept places first and in their order;
    cu_seqlens int32 [B + 1] bounds each text's tokens among them. Zhai et al. 2022 (ByteTransformer), section III.
    """
    if not packs_on_device(mask.device):
        return eager.packing_plan(mask)
    if eager.is_tracing() or eager.is_watched():
        return torch.ops.fastbert.packing_plan(mask)
    return sys.modules["fastbert_kernels"].packing_plan(mask)  # imported by packs_on_device


def embed_layer_norm(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, word_table: Tensor, position_table: Tensor, token_type_table: Tensor,
    weight: Tensor, bias: Tensor, eps: float, padding_idx: int | None = None, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum of the word, token type and position embeddings of the kept tokens, layer-normalized -> [T, E].

    input_ids, token_type_ids, position_ids: integers [B, S]; None means inputs_embeds [B, S, E] in place of word rows,
    token type 0, the column as position. indices int64 [T]: the kept places of the flattened batch; None keeps all.
    The tables are [V, E], [max positions, E], [types, E]; weight and bias [E]. The word row of padding_idx gets no
    gradient. An index out of range raises IndexError in eager on the CPU; in a kernel see `raise_bad_ids`.
    Devlin et al. 2019, section 3; LayerNorm: Ba et al. 2016.
    """
    if input_ids is None:
        word_table = word_table.detach()  # nothing is looked up in it: no gradient, rather than zeros
    inputs = input_ids, token_type_ids, position_ids, inputs_embeds, indices
    tables = word_table, position_table, token_type_table, weight, bias, eps
    kernel = _kernel("embed_layer_norm", word_table)
    if kernel is None:
        return eager.embed_layer_norm(*inputs, *tables, padding_idx, num_tokens)
    hidden = kernel(*inputs, *tables, padding_idx, num_tokens)
    if CHECK_IDS:
        raise_bad_ids(hidden.device, wait=True)
    return hidden.float() if torch.is_autocast_enabled(hidden.device.type) else hidden


def qkv_projection(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor,
    num_heads: int, num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, E], three weights [E, E] and biases [E] -> queries, keys and values [T, 3, H, D]."""
    tensors = x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias
    kernel = _kernel("qkv_projection", x)
    if kernel is None:
        return eager.qkv_projection(*tensors, num_heads, num_tokens)
    return kernel(*_autocast(*tensors), num_heads, num_tokens)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    mask: Tensor | None = None, implementation: str = "sdpa", num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale * Q K^T) V of each head within each sequence: qkv [T, 3, H, D], cu_seqlens int32 [N + 1] -> [T, E].

    mask (bool or additive, broadcasting to [N, H, S, S]) needs sequences of one length and is served by eager only.
    implementation, "sdpa" or "eager", chooses the eager path's attention. Vaswani et al. 2017, section 3.2.
    """
    refused = "a mask of attention scores cannot be packed" if mask is not None else None
    kernel = _kernel("attention", qkv, refused or why_not_head_size(qkv.shape[-1]))
    if kernel is None:
        return eager.attention(qkv, cu_seqlens, max_seqlen, scale, mask, implementation, num_tokens)
    return kernel(qkv, cu_seqlens, max_seqlen, scale)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, num_tokens: Tensor | None = None
) -> Tensor:
    """activation(x W^T + b): x [T, E], weight [F, E], bias [F] -> [T, F].

    activation: "gelu" (exact, by erf), "gelu_tanh", "relu", "tanh" or "none". GELU: Hendrycks and Gimpel 2016.
    """
    kernel = _kernel("linear_activation", x)
    if kernel is None:
        return eager.linear_activation(x, weight, bias, activation, num_tokens)
    return kernel(*_autocast(x, weight, bias), activation, num_tokens)


def linear_residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm(x W^T + b + residual): x [T, F], weight [E, F], bias [E], residual [T, E] -> [T, E].

    Under autocast the product is in its dtype, and the sum and LayerNorm are float32, as autocast runs LayerNorm.
    """
    norm = norm_weight, norm_bias, eps
    kernel = _kernel("linear_residual_layer_norm", x)
    if kernel is None:
        return eager.linear_residual_layer_norm(x, weight, bias, residual, *norm, num_tokens)
    if torch.is_autocast_enabled(x.device.type):
        residual = residual.float()
    return kernel(*_autocast(x, weight, bias), residual, *norm, num_tokens)


def unpack(
    hidden: Tensor, indices: Tensor | None, batch_size: int, seq_len: int, num_tokens: Tensor | None = None
) -> Tensor:
    """hidden [T, ...] to its places in [B, S, ...], zeros elsewhere.

    indices int64 [T], no two alike: the place of each row; None if nothing was dropped, then the result is a view.
    """
    if indices is None:
        return hidden.view(batch_size, seq_len, *hidden.shape[1:])
    kernel = _kernel("unpack", hidden)
    if kernel is None:
        return eager.unpack(hidden, indices, batch_size, seq_len, num_tokens)
    return kernel(hidden, indices, batch_size, seq_len, num_tokens)


def pool(
    hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False, indices: Tensor | None = None
) -> Tensor:
    """One vector a sequence: hidden [T, E], cu_seqlens int32 [N + 1] -> [N, E].

    mode "first" takes the first token, "mean" the mean in float32; normalize divides by the L2 norm. A sequence without
    tokens gives zeros. indices int64 [T]: the rows of hidden [P, E] where the tokens lie, None where hidden is packed.
    Raises ValueError for another mode.
    """
    width = hidden.shape[-1]
    refused = f"rows of {width} elements are longer than {MAX_ROW}" if width > MAX_ROW else None
    kernel = _kernel("pool", hidden, refused)
    if kernel is None:
        return eager.pool(hidden, cu_seqlens, mode, normalize, indices)
    return kernel(hidden, cu_seqlens, mode, normalize, indices)
