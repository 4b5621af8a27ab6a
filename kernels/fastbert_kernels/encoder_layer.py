"""A whole layer of BERT's encoder (Devlin et al. 2019) as one call: x [T, E] -> [T, E].

It makes the launches of `qkv_projection`, `attention`, `linear_residual_layer_norm`, `linear_activation` and
`linear_residual_layer_norm` in this order, so its results are bitwise equal to theirs. The first call of a shape calls
these functions. Later calls use one cached object with all launches: they check the weights once and fill addresses
into the calls of the driver's binding.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert_kernels.attention import attention, attention_launch
from fastbert_kernels.launch import CachedLaunch, forgotten_with_launches, launches_directly
from fastbert_kernels.linear_activation import linear_activation, linear_launch
from fastbert_kernels.linear_residual_layer_norm import (
    linear_residual_layer_norm,
    linear_residual_layer_norm_launches,
)
from fastbert_kernels.operands import spec_of, spec_of_new
from fastbert_kernels.qkv_projection import qkv_projection, qkv_projection_launch
from fastbert_kernels.target import current_stream, on_device, torch_precision

ALIGNMENT = 256  # of the parts of a workspace, in elements
MAX_SHAPES, MAX_LAYERS = 1024, 1024  # sizes at which the caches are cleared

_nbytes_of, _dtype_of = attrgetter("nbytes"), attrgetter("dtype")


class LayerWeights(NamedTuple):
    """The parameters of a layer: weights [out, in], biases and LayerNorm's parameters [out]."""

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    attention_weight: Tensor
    attention_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor


class _KnownWeights(NamedTuple):
    """The properties of a layer's weights, and the cached layers with such weights by their other arguments.

    Weights count as unchanged if their addresses, sizes in bytes, dtypes and strides are the same.
    """

    nbytes: list[int]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    layers: dict[tuple, "CachedLayer | None"]


# Keys: the addresses of all weights, and the specs of all weights.
_weights: dict[tuple[int, ...], _KnownWeights] = {}
_layers: dict[tuple, dict[tuple, "CachedLayer | None"]] = {}


@forgotten_with_launches
def _forget_layers() -> None:
    _weights.clear()
    _layers.clear()


def _layers_with(weights: Sequence[Tensor], addresses: tuple[int, ...]) -> dict[tuple, "CachedLayer | None"]:
    """Return the cached layers for these weights."""
    nbytes, dtypes = list(map(_nbytes_of, weights)), list(map(_dtype_of, weights))
    strides = list(map(Tensor.stride, weights))
    found = _weights.get(addresses)
    if found is None or found[:3] != (nbytes, dtypes, strides):
        if len(_weights) >= MAX_LAYERS:
            _forget_layers()
        layers = _layers.setdefault(tuple(map(spec_of, weights)), {})
        found = _weights[addresses] = _KnownWeights(nbytes, dtypes, strides, layers)
    return found.layers


# The names of a layer's tensors, which steps use for their operands: these, then the weights in their order.
_TENSORS = ("x", "qkv", "context", "attended", "up", "out", "cu_seqlens", "num_tokens")
_PLACE = {name: place for place, name in enumerate((*_TENSORS, *LayerWeights._fields))}


class Step(NamedTuple):
    """A launch of a layer. operands: for each tensor argument of the kernel, the name of the layer's tensor or None."""

    launch: CachedLaunch
    operands: dict[str, str | None]


class CachedLayer:
    """The launches of a layer on tensors of certain specs.

    The intermediate tensors share one workspace. It holds qkv and then the context; `up` reuses the memory of both.
    After them comes `attended`, the output of the attention block.
    """

    def __init__(self, steps: list[Step], widths: tuple[int, int, int, int], x: Tensor):
        size = x.shape[0]
        qkv, context, up, width = (-(-size * width // ALIGNMENT) * ALIGNMENT for width in widths)
        attended = max(qkv + context, up)
        self._workspace, self._shape = attended + width, torch.Size((size, widths[-1]))
        self._context, self._attended = (offset * x.dtype.itemsize for offset in (qkv, attended))
        self._steps = [
            (
                launch.binding,
                [(place, _PLACE[operands[name]]) for place, name in launch.binding.pointers],
                [(place, _PLACE[operands[name]], known) for place, name, known in launch.binding.descriptors],
            )
            for launch, operands in steps
        ]

    def launch(self, x: Tensor, addresses: tuple[int, ...], bounds: int, count: int | None, stream: int) -> Tensor:
        """Return the layer's output. addresses: of the weights; bounds: of cu_seqlens; count: of num_tokens."""
        out, workspace = x.new_empty(self._shape), x.new_empty(self._workspace)
        start = workspace.data_ptr()
        addresses = (  # in the order of _TENSORS; qkv and up are at the start of the workspace
            x.data_ptr(), start, start + self._context, start + self._attended, start, out.data_ptr(), bounds, count,
            *addresses,
        )  # fmt: skip
        for binding, pointers, descriptors in self._steps:
            arguments = binding.template.copy()
            for place, operand in pointers:
                arguments[place] = addresses[operand]
            for place, operand, known in descriptors:
                arguments[place] = known[addresses[operand]]
            (binding.calls.get(stream) or binding.on(stream))(arguments)
        return out


def _cached_layer(
    x: Tensor, weights: LayerWeights, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, scale: float,
    activation: str, eps: tuple[float, float], num_tokens: Tensor | None,
) -> CachedLayer | None:  # fmt: skip
    """Return the layer whose launches have just been made, or None if one of them copies operands or has no binding."""
    w = LayerWeights(*map(spec_of, weights))
    size, width, inner = x.shape[0], weights.q_weight.shape[0], weights.up_weight.shape[0]
    hidden, allowed, count = weights.attention_weight.shape[0], torch_precision(x), spec_of(num_tokens)

    def new(*shape: int) -> tuple:
        return tuple(spec_of_new(*shape, dtype=x.dtype, device=x.device))

    qkv, context = new(size, 3, num_heads, width // num_heads), new(size, width)
    attended, up = new(size, hidden), new(size, inner)
    qkv_launch = qkv_projection_launch(
        spec_of(x), w.q_weight, w.q_bias, w.k_weight, w.k_bias, w.v_weight, w.v_bias, count, num_heads, allowed
    )
    attending = attention_launch(qkv, spec_of(cu_seqlens), max_seqlen, scale, allowed)
    attention_output = linear_residual_layer_norm_launches(
        context, w.attention_weight, w.attention_bias, spec_of(x), w.attention_norm_weight, w.attention_norm_bias,
        count, eps[0], allowed,
    )  # fmt: skip
    up_launch = linear_launch("linear_activation", attended, w.up_weight, w.up_bias, None, count, activation, allowed)
    output = linear_residual_layer_norm_launches(
        up, w.down_weight, w.down_bias, attended, w.output_norm_weight, w.output_norm_bias, count, eps[1], allowed
    )
    if None in (qkv_launch, attending, attention_output, up_launch, output):
        return None

    def linear_residual_layer_norm_steps(launches, x: str, linear: str, residual: str, norm: str, out: str):
        operands = {"x": x, "weight": f"{linear}_weight", "bias_ptr": f"{linear}_bias", "residual_ptr": residual}
        operands["num_tokens_ptr"] = "num_tokens"
        norms = {"norm_weight_ptr": f"{norm}_weight", "norm_bias_ptr": f"{norm}_bias"}
        if launches.layer_norm is None:
            return [Step(launches.linear, operands | norms | {"out_ptr": out})]
        norms |= {"x_ptr": out, "out_ptr": out, "num_tokens_ptr": "num_tokens"}
        return [Step(launches.linear, operands | {"out": out}), Step(launches.layer_norm, norms)]

    steps = [
        Step(
            qkv_launch,
            {"x": "x", "q_weight": "q_weight", "q_bias_ptr": "q_bias", "k_weight": "k_weight", "k_bias_ptr": "k_bias"}
            | {"v_weight": "v_weight", "v_bias_ptr": "v_bias", "out": "qkv", "num_tokens_ptr": "num_tokens"},
        ),
        Step(
            attending,
            {"qkv_ptr": "qkv", "cu_seqlens_ptr": "cu_seqlens", "out_ptr": "context"}
            | dict.fromkeys(("lse_ptr", "seed_ptr")),
        ),
        *linear_residual_layer_norm_steps(
            attention_output, "context", "attention", "x", "attention_norm", "attended"
        ),
        Step(
            up_launch,
            {"x": "attended", "weight": "up_weight", "bias_ptr": "up_bias", "residual_ptr": None, "out": "up"}
            | {"num_tokens_ptr": "num_tokens"},
        ),
        *linear_residual_layer_norm_steps(output, "up", "down", "attended", "output_norm", "out"),
    ]  # fmt: skip
    if any(launch.binding is None for launch, _ in steps):
        return None
    return CachedLayer(steps, (3 * width, width, inner, hidden), x)


def encoder_layer(
    x: Tensor, weights: LayerWeights, cu_seqlens: Tensor, max_seqlen: int, num_heads: int, scale: float,
    activation: str, eps: tuple[float, float], num_tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, E], cu_seqlens int32 [N + 1] on the device -> [T, E].

    eps: for attention's LayerNorm and the output's. max_seqlen, scale, activation, num_tokens and the errors raised are
    those of the operations.
    """
    addresses = tuple(map(Tensor.data_ptr, weights))
    bounds, count = cu_seqlens.data_ptr(), None if num_tokens is None else num_tokens.data_ptr()
    layers = _layers_with(weights, addresses)
    of_count = None if count is None else (num_tokens.shape, num_tokens.dtype, num_tokens.device, count % 16)
    key = (
        x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, cu_seqlens.shape, cu_seqlens.stride(),
        cu_seqlens.dtype, cu_seqlens.device, bounds % 16, of_count, max_seqlen, num_heads, scale, activation,
        eps, torch_precision(x),
    )  # fmt: skip
    layer = layers.get(key)
    if layer is not None and launches_directly():
        with on_device(x.device):
            return layer.launch(x, addresses, bounds, count, current_stream())
    w = weights
    qkv = qkv_projection(x, w.q_weight, w.q_bias, w.k_weight, w.k_bias, w.v_weight, w.v_bias, num_heads, num_tokens)
    context = attention(qkv, cu_seqlens, max_seqlen, scale)
    del qkv  # frees its memory before the wider feed-forward part
    attended = linear_residual_layer_norm(
        context, w.attention_weight, w.attention_bias, x, w.attention_norm_weight, w.attention_norm_bias, eps[0],
        num_tokens,
    )  # fmt: skip
    del context
    up = linear_activation(attended, w.up_weight, w.up_bias, activation, num_tokens)
    out = linear_residual_layer_norm(
        up, w.down_weight, w.down_bias, attended, w.output_norm_weight, w.output_norm_bias, eps[1], num_tokens
    )
    if key not in layers and launches_directly():
        if len(layers) >= MAX_SHAPES:
            layers.clear()
        layers[key] = _cached_layer(x, weights, cu_seqlens, max_seqlen, num_heads, scale, activation, eps, num_tokens)
    return out
