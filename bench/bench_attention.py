"""Attention over sequences of varying lengths, compared with PyTorch's implementations and the measured roofs.

Every provider gets inputs in the layout it needs and returns rows of H * D values, as the next linear takes them. Our
kernel, `varlen_attn` and flex_attention work on packed tokens. flex_attention's block mask is not timed: like
cu_seqlens, a model makes it once for all layers. The others work on padded batches, with a mask if there is padding.
Work counts the tokens only, 4 * sum(length^2) * H * D operations, whatever a provider computes at padding.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property, lru_cache

import pytest
import torch
import torch.nn.functional as F
from comparison import OURS, Comparison, planned, run
from shown_clock import CLOCK
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from workloads import DEVICE, SQUAD, Case, for_this_run, lengths_of, readable

import fastbert_kernels
from fastbert.ops import eager
from fastbert_kernels.tuning import roofline

HEADS = {"minilm": (12, 32), "base": (12, 64), "large": (16, 64), "toy": (3, 16)}
BASELINE, VARLEN, FLEX = "sdpa", "varlen_attn", "flex_attention"
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


def timed() -> list[tuple[Case, str]]:
    """Return what is timed, the most informative first. flex_attention comes last, in fewer cases, since it compiles
    for seconds in each."""
    shapes = (256, 128, 1.0), (256, 128, 0.5), (32, 512, 1.0), (32, 512, 0.5), (256, 64, 1.0), (64, 384, 1.0)
    cases = [Case(model, *shape, "bfloat16") for model in ("base", "minilm", "large") for shape in shapes]
    cases.append(SQUAD)
    pairs = [(case, name) for case in cases for name in (OURS, BASELINE, VARLEN, *BACKENDS)]
    return pairs + [(case, FLEX) for case in cases if case.model != "large" or case == SQUAD]


TOY_CASES = Case("toy", 2, 16), Case("toy", 3, 96, 0.5)
TOY = [(case, name) for case in TOY_CASES for name in (OURS, BASELINE, VARLEN, *BACKENDS, FLEX)]


def pytest_generate_tests(metafunc):
    pairs = for_this_run(metafunc.config, TOY, TOY, timed())
    metafunc.parametrize(("case", "name"), planned(pairs, FLEX), ids=readable)


class Layout:
    """The layouts of sequences with these lengths, packed and padded to seq_len."""

    def __init__(self, lengths: Tensor, seq_len: int):
        self.lengths, self.seq_len = lengths.to(DEVICE), seq_len
        self.cu_seqlens = F.pad(self.lengths.cumsum(0), (1, 0)).int()
        self.mask = torch.arange(seq_len, device=DEVICE) < self.lengths[:, None]  # [N, S]
        self.full = bool(self.mask.all())

    def padded(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [N, S, H, D], zeros at padding."""
        out = x.new_zeros(*self.mask.shape, *x.shape[1:])
        out[self.mask] = x
        return out

    def packed(self, context: Tensor) -> Tensor:
        """Return a provider's context, [T, E] or [N, S, E], as [T, E]."""
        return context if context.ndim == 2 else context[self.mask]

    @cached_property
    def documents(self):
        """flex_attention's block mask of packed sequences, which do not attend to each other."""
        sequence = torch.repeat_interleave(torch.arange(len(self.lengths), device=DEVICE), self.lengths)

        def same(batch, head, query, key):
            return sequence[query] == sequence[key]

        return create_block_mask(same, None, None, len(sequence), len(sequence), device=DEVICE)


def _flex(q, k, v, block_mask):
    return flex_attention(q, k, v, block_mask=block_mask).transpose(1, 2).flatten(2)


def provider(name: str, layout: Layout, compiled_flex: Callable, qkv: Tensor) -> Callable[[], Tensor]:
    """Return a provider's attention of qkv [T, 3, H, D] -> [T, E], or [N, S, E] if it works on padded batches."""
    scale = qkv.shape[-1] ** -0.5  # the default of all other providers
    bounds, longest = layout.cu_seqlens, layout.seq_len
    if name == OURS:
        return lambda: fastbert_kernels.attention(qkv, bounds, longest, scale)
    q, k, v = (x.contiguous() for x in qkv.unbind(1))  # [T, H, D]
    if name == VARLEN:

        def varlen():
            # Some releases prefer cuDNN.
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return varlen_attn(q, k, v, bounds, bounds, longest, longest).flatten(1)

        return varlen
    if name == FLEX and not layout.full:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]
        return lambda: compiled_flex(q, k, v, layout.documents)[0]
    q, k, v = (layout.padded(x).transpose(1, 2) for x in (q, k, v))  # [N, H, S, D]
    if name == FLEX:
        return lambda: compiled_flex(q, k, v, None)
    mask = None if layout.full else layout.mask[:, None, None]

    def sdpa():
        with sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext():
            context = F.scaled_dot_product_attention(q, k, v, mask)
        return context.transpose(1, 2).flatten(2)

    return sdpa


@lru_cache(maxsize=1)
def comparison(case: Case) -> Comparison:
    num_heads, head_size = HEADS[case.model]
    dtype, lengths = getattr(torch, case.dtype), lengths_of(case)
    layout, tokens, width = Layout(lengths, case.seq_len), int(lengths.sum()), num_heads * head_size
    generator = torch.Generator(DEVICE).manual_seed(0)
    qkv = torch.randn(tokens, 3, num_heads, head_size, generator=generator, device=DEVICE, dtype=dtype)
    truth = eager.attention(qkv.double(), layout.cu_seqlens, case.seq_len, head_size**-0.5)
    torch.compiler.reset()
    # On a CPU flex_attention runs uncompiled.
    compiled_flex = _flex if DEVICE.type == "cpu" else torch.compile(_flex, dynamic=False, fullgraph=True)
    return Comparison(
        suite="attention",
        kind="attention",
        case=asdict(case) | {"heads": num_heads, "head_size": head_size, "tokens": tokens},
        baseline=BASELINE,
        inputs=(qkv,),
        provide=lambda name, given: provider(name, layout, compiled_flex, *given),
        error=lambda context: (layout.packed(context).double() - truth).abs().max().item(),
        largest=truth.abs().max().item(),
        work=roofline.Work(
            4.0 * lengths.square().sum().item() * width, 4.0 * tokens * width * dtype.itemsize + 4.0 * (case.batch + 1)
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def _free_memory():
    yield
    comparison.cache_clear()


@pytest.mark.benchmark(timer=CLOCK)
@torch.no_grad()
def test_attention(request, case, name):
    """Check that a provider's error is at most twice sdpa's plus a few roundings of the largest value, then time it."""
    if name == OURS and DEVICE.type == "cpu" and not fastbert_kernels.INTERPRETED:
        pytest.skip("kernels are timed on a GPU; without one, TRITON_INTERPRET=1 checks them at toy sizes")
    run(request, comparison, case, name)
