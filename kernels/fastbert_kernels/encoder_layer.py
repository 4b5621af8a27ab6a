"""A whole layer of BERT's encoder (Devlin et al. 2019) as one call: x [T, E] -> [T, E].

Its launches are those of `qkv_projection`, `attention`, `linear_residual_layer_norm`, `linear_activation` and
`linear_residual_layer_norm`, one after another, and so are its bits. The first call of a shape calls these. Later ones
find the layer's launches as one object, look at the weights once, and put addresses into calls of the driver's binding.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert_kernels.attention import attention, plan_attention
from fastbert_kernels.launch import (
    Plan,
    current_stream,
    forgotten_with_plans,
    launches_directly,
    layout_of,
    on_device,
    torch_precision,
)
from fastbert_kernels.layer_norm import plan_layer_norm
from fastbert_kernels.linear_activation import linear_activation, plan_linear
from fastbert_kernels.linear_residual_layer_norm import linear_residual_layer_norm, plan_linear_residual_layer_norm
from fastbert_kernels.qkv_projection import plan_qkv_projection, qkv_projection

# By what a step's operands are numbered; the weights follow.
X, QKV, CONTEXT, ATTENDED, UP, OUT, CU_SEQLENS, NUM_TOKENS, WEIGHTS = range(9)
ALIGNMENT = 256  # elements, of the parts of a workspace
MOST_SHAPES, MOST_LAYERS = 1024, 1024  # that are remembered; beyond, all are forgotten

_nbytes_of, _dtype_of = attrgetter("nbytes"), attrgetter("dtype")


class Weights(NamedTuple):
    """What a layer's weights are, and the plans of layers with such weights, by what else varies.

    They count as unchanged if their addresses, sizes in bytes, dtypes and strides are the same.
    """

    nbytes: list[int]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    plans: dict[tuple, "LayerPlan | None"]


# By the addresses of all weights, and by what they are but for their addresses.
_weights: dict[tuple[int, ...], Weights] = {}
_plans: dict[tuple, dict[tuple, "LayerPlan | None"]] = {}


@forgotten_with_plans
def _forget_layers() -> None:
    _weights.clear()
    _plans.clear()


def _plans_for(weights: Sequence[Tensor], addresses: tuple[int, ...]) -> dict[tuple, "LayerPlan | None"]:
    """The plans of layers whose weights are what these are now."""
    nbytes, dtypes = list(map(_nbytes_of, weights)), list(map(_dtype_of, weights))
    strides = list(map(Tensor.stride, weights))
    found = _weights.get(addresses)
    if found is None or found[:3] != (nbytes, dtypes, strides):
        if len(_weights) >= MOST_LAYERS:
            _forget_layers()
        plans = _plans.setdefault(tuple(map(layout_of, weights)), {})
        found = _weights[addresses] = Weights(nbytes, dtypes, strides, plans)
    return found.plans


class Step(NamedTuple):
    """A launch: its plan, and the numbers of its operands."""

    plan: Plan
    operands: tuple[int | None, ...]


class LayerPlan:
    """The launches of a layer on tensors of certain layouts.

    Its intermediate tensors are parts of one workspace: queries, keys and values and the context, over both of them
    what the feed-forward part has between its linears, and behind what attention's part returns.
    """

    def __init__(self, steps: list[Step], widths: tuple[int, int, int, int], x: Tensor):
        size = x.shape[0]
        qkv, context, up, width = (-(-size * width // ALIGNMENT) * ALIGNMENT for width in widths)
        attended = max(qkv + context, up)
        self._workspace, self._shape = attended + width, torch.Size((size, widths[-1]))
        self._context, self._attended = (offset * x.dtype.itemsize for offset in (qkv, attended))
        self._steps = [
            (
                step.plan.binding,
                [(place, step.operands[number]) for place, number in step.plan.binding.pointers],
                [(place, step.operands[number], known) for place, number, known in step.plan.binding.descriptors],
            )
            for step in steps
        ]

    def launch(self, x: Tensor, addresses: tuple[int, ...], bounds: int, count: int | None, stream: int) -> Tensor:
        """The layer's output for the weights, the bounds and the count of tokens at these addresses."""
        out, workspace = x.new_empty(self._shape), x.new_empty(self._workspace)
        start = workspace.data_ptr()
        addresses = (
            x.data_ptr(), start, start + self._context, start + self._attended, start, out.data_ptr(), bounds, count,
            *addresses,
        )  # fmt: skip
        for binding, pointers, descriptors in self._steps:
            arguments = binding.template.copy()
            for place, operand in pointers:
                arguments[place] = addresses[operand]
            for place, operand, known in descriptors:
                arguments[place] = known[addresses[operand]]
            binding.on(stream)(arguments)
        return out


def _planned(
    x: Tensor, weights: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int, num_heads: int, scale: float,
    activation: str, eps: tuple[float, float], num_tokens: Tensor | None,
) -> LayerPlan | None:  # fmt: skip
    """The plan of a layer whose launches have just been made; None where one copies operands or is not bound."""
    count, wanted = layout_of(num_tokens), torch_precision(x)
    given, (size, width) = list(map(layout_of, weights)), (x.shape[0], weights[0].shape[0])
    hidden, up_width = weights[6].shape[0], weights[10].shape[0]

    def fresh(*shape: int) -> tuple:
        strides = tuple(torch.Size(shape[index + 1 :]).numel() for index in range(len(shape)))
        return torch.Size(shape), strides, x.dtype, x.device, 0

    qkv, context = fresh(size, 3, num_heads, width // num_heads), fresh(size, width)
    attended, up = fresh(size, hidden), fresh(size, up_width)
    w = range(WEIGHTS, WEIGHTS + 16)
    steps = [
        Step(plan_qkv_projection(layout_of(x), *given[:6], count, num_heads, wanted), (X, *w[:6], QKV, NUM_TOKENS)),
        Step(plan_attention(qkv, layout_of(cu_seqlens), max_seqlen, scale, wanted), (QKV, CU_SEQLENS, CONTEXT)),
        *_linear_residual_layer_norm(
            (context, *given[6:8], layout_of(x), *given[8:10]), (CONTEXT, *w[6:8], X, *w[8:10], ATTENDED),
            attended, count, eps[0], wanted,
        ),
        Step(
            plan_linear("linear_activation", attended, *given[10:12], None, count, activation, wanted),
            (ATTENDED, *w[10:12], None, UP, NUM_TOKENS),
        ),
        *_linear_residual_layer_norm(
            (up, *given[12:14], attended, *given[14:]), (UP, *w[12:14], ATTENDED, *w[14:], OUT),
            attended, count, eps[1], wanted,
        ),
    ]  # fmt: skip
    if any(step.plan is None or step.plan.binding is None for step in steps):
        return None
    return LayerPlan(steps, (3 * width, width, up_width, hidden), x)


def _linear_residual_layer_norm(
    layouts: tuple, operands: tuple[int, ...], out: tuple, count: tuple | None, eps: float, wanted: str | None
) -> list[Step]:
    """One launch or two, as the operation itself takes: of x, weight, bias, residual and the two of LayerNorm."""
    plan = plan_linear_residual_layer_norm(*layouts, count, eps, wanted)
    if plan != ():
        return [Step(plan, (*operands, NUM_TOKENS))]
    x, weight, bias, residual, *norm = layouts
    *linear, norm_weight, norm_bias, result = operands
    return [
        Step(
            plan_linear("linear_residual", x, weight, bias, residual, count, "none", wanted),
            (*linear, result, NUM_TOKENS),
        ),
        Step(plan_layer_norm(out, *norm, out, count, eps), (result, norm_weight, norm_bias, result, NUM_TOKENS)),
    ]


def encoder_layer(
    x: Tensor, weights: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int, num_heads: int, scale: float,
    activation: str, eps: tuple[float, float], num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, E], cu_seqlens int32 [N + 1] on the device -> [T, E].

    weights: weight and bias of the queries, of the keys, of the values, of attention's output and its LayerNorm, of the
    feed-forward part's first linear, its second and its LayerNorm, 16 in all. eps: of both LayerNorms. max_seqlen,
    scale, activation and num_tokens as in the operations that it is made of, whose errors it raises.
    """
    addresses = tuple(map(Tensor.data_ptr, weights))
    bounds, count = cu_seqlens.data_ptr(), None if num_tokens is None else num_tokens.data_ptr()
    plans = _plans_for(weights, addresses)
    of_count = None if count is None else (num_tokens.shape, num_tokens.dtype, num_tokens.device, count % 16)
    key = (
        x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, cu_seqlens.shape, cu_seqlens.stride(),
        cu_seqlens.dtype, cu_seqlens.device, bounds % 16, of_count, max_seqlen, num_heads, scale, activation,
        eps, torch_precision(x),
    )  # fmt: skip
    plan = plans.get(key)
    if plan is not None and launches_directly():
        with on_device(x.device):
            return plan.launch(x, addresses, bounds, count, current_stream())
    *qkv, o, o_bias, norm1, norm1_bias, up, up_bias, down, down_bias, norm2, norm2_bias = weights
    # Nested, so that the queries, keys and values are gone before the wider feed-forward part.
    attended = linear_residual_layer_norm(
        attention(qkv_projection(x, *qkv, num_heads, num_tokens), cu_seqlens, max_seqlen, scale),
        o, o_bias, x, norm1, norm1_bias, eps[0], num_tokens,
    )  # fmt: skip
    hidden = linear_activation(attended, up, up_bias, activation, num_tokens)
    out = linear_residual_layer_norm(hidden, down, down_bias, attended, norm2, norm2_bias, eps[1], num_tokens)
    if key not in plans and launches_directly():
        if len(plans) >= MOST_SHAPES:
            plans.clear()
        plans[key] = _planned(x, weights, cu_seqlens, max_seqlen, num_heads, scale, activation, eps, num_tokens)
    return out
