"""`encoder_layer` is bitwise equal to its operations one after another, whatever changes between calls.

The interpreter has no driver to launch through. A stand-in for `Binding` runs the kernel on the memory at the addresses
that it is given.
"""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import bounds, normal
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert import encoder_layer as fastbert_layer
from fastbert_kernels import (
    LayerWeights,
    attention,
    configs,
    encoder_layer,
    launch,
    linear_activation,
    linear_residual_layer_norm,
    qkv_projection,
)
from fastbert_kernels.layer_norm import layer_norm_launch
from fastbert_kernels.operands import spec_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU every test launches through `Binding`")
KERNELS = import_module("fastbert_kernels.encoder_layer")  # the function hides the module of the same name
LENGTHS, CAPACITY = (7, 0, 20, 1), 33


def memory(address: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return the elements at an address."""
    return torch.frombuffer((ctypes.c_char * (size * dtype.itemsize)).from_address(address), dtype=dtype)


class Descriptors:
    def __getitem__(self, address: int) -> int:
        return address


class Interpreted:
    """A stand-in for `Binding`, with its attributes."""

    def __init__(self, cached: launch.CachedLaunch, tensors: dict[str, Tensor | None], calls: list[str]):
        self._launch, self._calls = cached, calls
        self._specs = {name: x if x is None else (x.shape, x.stride(), x.dtype) for name, x in tensors.items()}
        self.template, self.calls = [None] * len(tensors), {}
        places = [(place, name) for place, (name, x) in enumerate(tensors.items()) if x is not None]
        self.pointers = [(place, name) for place, name in places if name not in cached.blocks]
        self.descriptors = [(place, name, Descriptors()) for place, name in places if name in cached.blocks]

    def on(self, stream: int) -> Callable[[list], None]:
        return self._run

    def launch(self, stream: int, addresses: dict[str, int | None]) -> None:
        self._run(list(addresses.values()))

    def _run(self, addresses: list[int | None]) -> None:
        arguments = {}
        for (name, spec), address in zip(self._specs.items(), addresses, strict=True):
            if spec is None:
                arguments[name] = None
            elif name not in self._launch.blocks:
                arguments[name] = memory(address, 1, spec[2])
            else:
                (rows, columns), (stride, _), dtype = spec
                whole = memory(address, (rows - 1) * stride + columns, dtype)
                block = self._launch.blocks[name]
                arguments[name] = TensorDescriptor.from_tensor(whole.as_strided(*spec[:2]), block)
        self._calls.append(self._launch.kernel.fn.__name__)
        with launch._launching:  # the interpreter's state is global
            launch.run(self._launch.kernel, self._launch.grid, arguments | self._launch.constants)


@pytest.fixture
def bound(monkeypatch) -> list[str]:
    """The names of the kernels launched through bindings during the test, in order."""
    calls, by_triton = [], launch.CachedLaunch._launch_by_triton

    def launch_by_triton(cached, tensors):
        by_triton(cached, tensors)
        cached.binding = Interpreted(cached, tensors, calls)

    monkeypatch.setattr(launch.CachedLaunch, "_launch_by_triton", launch_by_triton)
    monkeypatch.setattr(launch, "current_stream", lambda: 0)
    monkeypatch.setattr(KERNELS, "current_stream", lambda: 0)
    launch.forget_launches()
    yield calls
    launch.forget_launches()


class Layer:
    """The arguments of a layer. E, heads * head size and F may all differ."""

    def __init__(
        self, dtype: torch.dtype, width: int = 48, heads: int = 2, head_size: int = 16, feed_forward: int = 80
    ):
        attended, self.heads, self.dtype = heads * head_size, heads, dtype
        shapes = [(attended, width)] * 3 + [(width, attended), None, (feed_forward, width), (width, feed_forward), None]
        self.weights = []
        for shape in shapes:
            weight = normal(width, dtype=dtype) if shape is None else normal(*shape, dtype=dtype) / shape[1] ** 0.5
            self.weights += [weight, normal(len(weight), dtype=dtype) / 8]
        self.eps = 1e-12, 1e-5

    def arguments(self, x: Tensor, lengths=LENGTHS, counted: bool = True, activation: str = "gelu") -> tuple:
        cu_seqlens = bounds(lengths)
        count = cu_seqlens[-1:] if counted else None
        return x, LayerWeights(*self.weights), cu_seqlens, max(lengths), self.heads, 0.3, activation, self.eps, count

    def one_after_another(self, x, weights, cu_seqlens, longest, heads, scale, activation, eps, count) -> Tensor:
        qkv = qkv_projection(x, *weights[:6], heads, count)
        context = attention(qkv, cu_seqlens, longest, scale)
        y = linear_residual_layer_norm(context, *weights[6:8], x, *weights[8:10], eps[0], count)
        hidden = linear_activation(y, *weights[10:12], activation, count)
        return linear_residual_layer_norm(hidden, *weights[12:14], y, *weights[14:], eps[1], count)

    def check(self, x: Tensor, **how) -> None:
        arguments = self.arguments(x, **how)
        tokens = sum(how.get("lengths", LENGTHS))
        expected, found = self.one_after_another(*arguments), encoder_layer(*arguments)
        assert found.shape == x.shape
        assert found.is_contiguous()
        assert torch.equal(found[:tokens], expected[:tokens])


def tokens_of(layer: Layer, size: int = CAPACITY) -> Tensor:
    return normal(size, layer.weights[0].shape[1], dtype=layer.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [48, 400])
def test_bitwise_equal_to_the_operations(dtype, width, bound):
    """With one launch for linear, residual and LayerNorm, and with two. The second call launches directly."""
    layer = Layer(dtype, width)
    x = tokens_of(layer)
    encoder_layer(*layer.arguments(x))
    bound.clear()
    for seed in range(3):
        torch.manual_seed(seed)
        arguments = layer.arguments(tokens_of(layer))
        expected = layer.one_after_another(*arguments)
        bound.clear()
        found = encoder_layer(*arguments)
        in_one = dtype != torch.float32 and width == 48
        assert len(bound) == (5 if in_one else 7)
        assert torch.equal(found[: sum(LENGTHS)], expected[: sum(LENGTHS)])


def test_results_through_descriptors(bound):
    """The workspace and the output, which are at other addresses in each call, are written through descriptors."""
    config = {
        "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2, "ctas_per_sm": 1,
        "descriptors": True, "flatten": True, "halves": True, "store_descriptor": True,
    }  # fmt: skip
    entries, in_one_launch = {"16": [{"up_to": None, "config": config}]}, {"16": []}
    gemms = dict.fromkeys(("qkv_projection", "linear_activation", "linear_residual"), entries)
    table = configs.table_for("sm_90") | gemms | {"linear_residual_layer_norm": in_one_launch}
    with configs.configured_by(table):
        layer = Layer(torch.float16, width=64, heads=4, feed_forward=96)
        kept = []
        for _ in range(3):
            kept.append(torch.empty(7 * CAPACITY * 64, dtype=torch.float16))
            layer.check(tokens_of(layer))
        assert len(bound) >= 2 * 7
        stored = [step.launch.blocks["out"] for step in steps_of(layer) if "out" in step.operands]
        assert stored == [[16, 16]] * 4


def steps_of(layer: Layer) -> list:
    """Return the steps of a layer as `_cached_layer` builds them."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNELS, "CachedLayer", lambda steps, *_: made.extend(steps))
        KERNELS._cached_layer(*layer.arguments(tokens_of(layer)))
    return made


def test_everything_that_varies(bound):
    """Sizes, lengths, activation, eps, strides and heads change between calls of one layer with cached launches."""
    layer = Layer(torch.bfloat16)
    for _ in range(2):
        for size in (33, 28, 64, 28):
            layer.check(tokens_of(layer, size))
        layer.check(tokens_of(layer, 28), counted=False)
        layer.check(tokens_of(layer, 60), lengths=(60,))
        layer.check(tokens_of(layer, 60), lengths=(30, 30))
        layer.check(tokens_of(layer), activation="relu")
        layer.eps = 1e-3, 1e-12
        layer.check(tokens_of(layer))
        layer.check(normal(CAPACITY, 49, dtype=torch.bfloat16)[:, 1:])  # a row stride that is no multiple of 16 bytes
        layer.check(normal(49, CAPACITY, dtype=torch.bfloat16)[1:].t())  # the operations copy this
    layer.heads = 1
    layer.check(tokens_of(layer))


def transpose(weights: list[Tensor]) -> None:
    weights[6].data = weights[6].data.t()  # [48, 48] in the same memory


def cut(weights: list[Tensor]) -> None:
    weights[10].data, weights[11].data = weights[10].data[:64], weights[11].data[:64]
    weights[12].data = weights[12].data[:, :64]


def move(weights: list[Tensor]) -> None:
    weights[0].data = weights[0].data * 2


def replace(weights: list[Tensor]) -> None:
    weights[14] = weights[14] * 2


def write(weights: list[Tensor]) -> None:
    weights[12].mul_(2)


@pytest.mark.parametrize("change", [transpose, cut, move, replace, write])
def test_weights_that_change(change, bound):
    layer = Layer(torch.float32, width=48, heads=3)
    x = tokens_of(layer)
    for _ in range(2):
        layer.check(x)
    before = encoder_layer(*layer.arguments(x))
    change(layer.weights)
    for _ in range(2):
        layer.check(x)
    assert not torch.equal(encoder_layer(*layer.arguments(x))[:7], before[:7])


def test_weights_of_another_dtype_at_the_same_addresses(bound):
    layer = Layer(torch.float16)
    x = tokens_of(layer)
    for _ in range(2):
        layer.check(x)
    for weight in layer.weights:
        weight.data = weight.data.view(torch.bfloat16)
    with pytest.raises(TypeError, match="a GEMM needs one dtype"):
        encoder_layer(*layer.arguments(x))


def test_layers_of_the_same_shapes_use_their_own_weights(bound):
    layers = [Layer(torch.float32) for _ in range(3)]
    x = tokens_of(layers[0])
    for _ in range(2):
        for layer in layers:
            layer.check(x)


def test_errors_are_those_of_the_operations(bound):
    layer = Layer(torch.float32)
    x = tokens_of(layer)
    layer.check(x)
    with pytest.raises(ValueError, match="q_weight is"):
        layer.check(normal(CAPACITY, 47))
    with pytest.raises(ValueError, match="activation 'swish' is unknown"):
        layer.check(x, activation="swish")
    with pytest.raises(ValueError, match="cannot be cut into 5 heads"):
        layer.heads = 5
        layer.check(x)
    layer.heads = 2
    layer.check(x)
    arguments = list(layer.arguments(x))
    for number in (2, 8):  # cu_seqlens and num_tokens on another device
        elsewhere = [*arguments[:number], arguments[number].to("meta"), *arguments[number + 1 :]]
        with pytest.raises(ValueError, match="tensors are on cpu and meta"):
            encoder_layer(*elsewhere)
    layer.weights[10] = layer.weights[10].half()
    with pytest.raises(TypeError, match="a GEMM needs one dtype"):
        layer.check(x)


def test_nothing_to_do(bound):
    layer = Layer(torch.float32)
    for _ in range(2):
        assert encoder_layer(*layer.arguments(tokens_of(layer, 0), lengths=(0, 0))).shape == (0, 48)


def test_hooks_and_launching_by_see_every_launch(bound, monkeypatch):
    """Only Triton's launcher calls a profiler's hooks."""
    layer = Layer(torch.float32)
    arguments = layer.arguments(tokens_of(layer))
    encoder_layer(*arguments)
    bound.clear()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
        encoder_layer(*arguments)
    assert not bound
    seen = []
    with launch.launching_by(lambda kernel, grid, given: seen.append(kernel.fn.__name__)):
        encoder_layer(*arguments)
    assert len(seen) == 7
    assert not bound
    encoder_layer(*arguments)
    assert bound == seen


def test_threads(bound):
    """Direct launches hold no lock, and each call fills in its own arguments."""
    layers = [Layer(torch.float32) for _ in range(4)]
    batches = [tokens_of(layers[0], size) for size in (28, 33)]
    expected = [[layer.one_after_another(*layer.arguments(x)) for x in batches] for layer in layers]
    start = threading.Barrier(4)

    def run(number: int) -> None:
        start.wait()
        for turn in range(6):
            which = (number + turn) % len(layers)
            for x, y in zip(batches, expected[which], strict=True):
                assert torch.equal(encoder_layer(*layers[which].arguments(x))[:28], y[:28])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


def test_caches_are_bounded(bound, monkeypatch):
    monkeypatch.setattr(KERNELS, "MAX_LAYERS", 2)
    monkeypatch.setattr(KERNELS, "MAX_SHAPES", 2)
    layers = [Layer(torch.float32) for _ in range(3)]
    for layer in layers:
        layer.check(tokens_of(layer))
        assert len(KERNELS._weights) <= 2
    for size in (28, 29, 30, 31):
        layers[0].check(tokens_of(layers[0], size))
        assert all(len(cached) <= 2 for cached in KERNELS._layers.values())


def test_an_unknown_launcher_is_used_with_one_warning(caplog):
    """If Triton's launcher is not one that `Binding` knows, launches go through it."""
    tensors = {"x_ptr": normal(3, 48), "norm_weight_ptr": normal(48), "norm_bias_ptr": normal(48)}
    tensors |= {"out_ptr": normal(3, 48), "num_tokens_ptr": None}
    launch._warn_once.cache_clear()
    for _ in range(2):
        cached = layer_norm_launch(*map(spec_of, tensors.values()), 1e-12)
        compiled = SimpleNamespace(metadata=None, run=object())
        assert cached._bound(compiled, tensors, tensors | cached.constants) is None
    (message,) = caplog.messages
    assert message.startswith("launches go through the launcher of Triton")
    launch._warn_once.cache_clear()


def test_fastbert_has_the_same_fields_of_layer_weights():
    assert fastbert_layer.LayerWeights._fields == LayerWeights._fields
