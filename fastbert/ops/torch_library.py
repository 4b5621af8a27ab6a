"""The kernels as `torch.library` ops, "fastbert::<op>", for traced graphs and for autograd of single ops.

In a graph each op is one opaque node, whose fake gives the shape of the output. Its backward is another opaque node,
which recomputes the op by its eager reference, hidden from compilers; for the embeddings it has a kernel. Without
tracing and gradients `fastbert.ops` calls the launchers directly, because a custom op costs 7 to 14 microseconds a
call. Letters as in `fastbert.tokens`.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert._compat import autograd_below_modes
from fastbert.ops import eager
from fastbert.ops.backend import is_tracing

_LIBRARY = torch.library.Library("fastbert", "FRAGMENT")

# Op name -> its fake, which makes an output of the right shape and dtype. Its annotations become the op's schema.
FAKES: dict[str, Callable] = {}


def _fake(function: Callable) -> Callable:
    FAKES[function.__name__] = function
    return function


@_fake
def packing_plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    indices = mask.new_empty(mask.numel(), dtype=torch.int64)
    return indices, mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


@_fake
def embed_layer_norm(
    input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None,
    indices: Tensor | None, word_table: Tensor, position_table: Tensor, token_type_table: Tensor,
    weight: Tensor, bias: Tensor, eps: float, padding_idx: int | None, num_tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    given = inputs_embeds if input_ids is None else input_ids
    assert given is not None
    size = given.shape[0] * given.shape[1] if indices is None else indices.shape[0]
    summands = given if input_ids is None else word_table, position_table, token_type_table
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in summands))
    return word_table.new_empty(size, word_table.shape[1], dtype=dtype)


@_fake
def qkv_projection(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor,
    num_heads: int, num_tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], 3, num_heads, q_weight.shape[0] // num_heads)


@_fake
def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])


@_fake
def linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: str, num_tokens: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake
def linear_residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    num_tokens: Tensor | None,
) -> Tensor:  # fmt: skip
    return residual.new_empty(residual.shape)


@_fake
def unpack(hidden: Tensor, indices: Tensor, batch_size: int, seq_len: int, num_tokens: Tensor | None) -> Tensor:
    return hidden.new_empty(batch_size, seq_len, *hidden.shape[1:])


@_fake
def pool(hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool, indices: Tensor | None) -> Tensor:
    return hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1])


SCHEMAS = {name: torch.library.infer_schema(fake, mutates_args=()) for name, fake in FAKES.items()}


def gradients(compute: Callable[..., Tensor], inputs: tuple, wanted: tuple[bool, ...], grad: Tensor) -> list:
    """The gradients of compute(*inputs) for the wanted inputs, None for the others.

    compute runs again on detached inputs, with autograd: this saves memory, as gradient checkpointing does. Under
    `create_graph=True` the inputs keep their history, so that the gradients can be differentiated.
    """
    create_graph = torch.is_grad_enabled()

    def source(x, want):
        if not isinstance(x, Tensor):
            return x
        # An alias, because one input may have been computed from another.
        return x.view_as(x) if create_graph else x.detach().requires_grad_(want)

    sources = list(map(source, inputs, wanted))
    # Only this implementation of torch's attention has a second derivative.
    attention = sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext()
    with torch.enable_grad(), attention:
        output = compute(*sources)
    sources = [x for x, want in zip(sources, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(output, sources, grad, create_graph=create_graph, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def _within_bounds(places: tuple, tables: tuple[Tensor, ...]) -> tuple:
    """input_ids, token_type_ids and position_ids, clamped to their tables, inputs_embeds and indices: an index out of
    range would be a fatal device assert. The kernel has already set that token to NaN and recorded the index."""
    *ids, inputs_embeds, indices = places
    words, positions, types = tables
    limits = map(len, (words, types, positions))
    known = (x if x is None else x.clamp(0, limit - 1) for x, limit in zip(ids, limits, strict=True))
    return (*known, inputs_embeds, indices)


def _embed_within_bounds(*inputs):
    return eager.embed_layer_norm(*_within_bounds(inputs[:5], inputs[5:8]), *inputs[5:])


def _embedding_gradients(inputs: tuple, wanted: tuple[bool, ...], grad: Tensor) -> list:
    """The gradients of embed_layer_norm for the wanted inputs, None for the others: LayerNorm's by its kernel, those of
    the tables by torch, which adds the rows of equal ids in a fixed order."""
    weight, bias, eps, padding_idx, num_tokens = inputs[8:]
    summands = [x.detach().requires_grad_(want) if want else x for x, want in zip(inputs[:8], wanted, strict=False)]
    with torch.enable_grad():
        arguments = *_within_bounds(tuple(summands[:5]), tuple(summands[5:])), *summands[5:], padding_idx, num_tokens
        summed = eager.summed_embeddings(*arguments)
    found = import_module("fastbert_kernels").layer_norm_backward(
        eager.clear_past(grad, num_tokens), summed.detach(), weight, eps
    )
    learning = [x for x, want in zip(summands, wanted, strict=False) if want]
    rows = iter(torch.autograd.grad(summed, learning, found.x, allow_unused=True) if learning else ())
    # Copies, because outputs of an op may not share memory.
    sums = {8: found.sums[0].to(weight.dtype, copy=True), 9: found.sums[1].to(bias.dtype, copy=True)}
    return [(sums[place] if place in sums else next(rows)) if want else None for place, want in enumerate(wanted)]


def _reference(name: str) -> Callable[..., Tensor]:
    if name == "attention":
        return lambda qkv, cu_seqlens, max_seqlen, scale: eager.attention(
            qkv, cu_seqlens, max_seqlen, scale, num_tokens=cu_seqlens[-1:]
        )
    return _embed_within_bounds if name == "embed_layer_norm" else getattr(eager, name)


def _gradients_of(name: str, inputs: tuple, wanted: tuple[bool, ...], grad: Tensor) -> list:
    """The gradients of an op for the wanted inputs, None for the others."""
    if name == "embed_layer_norm" and inputs[5].shape[1] <= import_module("fastbert_kernels").MAX_TRAINED_ROW:
        return _embedding_gradients(inputs, wanted, grad)
    return gradients(_reference(name), inputs, wanted, grad)


def _define_backward(name: str) -> Callable[..., list[Tensor]]:
    """Define "<name>_backward": the output's gradient, the op's inputs and a bool for each input -> the gradients for
    the inputs whose bool is True."""
    inputs, _ = SCHEMAS[name].removeprefix("(").split(") -> ")
    _LIBRARY.define(f"{name}_backward(Tensor grad, {inputs}, bool[] wanted) -> Tensor[]")

    def backward(grad, *arguments):
        *inputs, wanted = arguments
        # The inputs have been autocast before the op. Under a dispatch mode torch excludes autograd.
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False), autograd_below_modes():
            found = _gradients_of(name, tuple(inputs), wanted, grad)
        # As the fake promises: a contiguous tensor for each wanted input.
        return [
            x.new_zeros(x.shape) if gradient is None else gradient.contiguous()
            for x, gradient, want in zip(inputs, found, wanted, strict=True)
            if want
        ]

    def fake(grad, *arguments):
        *inputs, wanted = arguments
        return [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want]

    # CompositeExplicitAutograd, because this runs autograd, which the body of a `custom_op` cannot.
    _LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbert::{name}_backward", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastbert, f"{name}_backward")


def _define(name: str) -> None:
    def launch(*arguments):
        return getattr(import_module("fastbert_kernels"), name)(*arguments)

    op = torch.library.custom_op(f"fastbert::{name}", launch, mutates_args=(), schema=SCHEMAS[name])
    op.register_fake(FAKES[name])
    if name == "packing_plan":
        return
    compute_gradients = _define_backward(name)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if other is None else other[0] for other in ctx.others]
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled() and not is_tracing():
            return tuple(gradients(_reference(name), inputs, wanted, grad))
        found = iter(compute_gradients(grad, *inputs, wanted))
        return tuple(next(found) if want else None for want in wanted)

    op.register_autograd(backward, setup_context=setup_context)


for _name in SCHEMAS:
    _define(_name)
