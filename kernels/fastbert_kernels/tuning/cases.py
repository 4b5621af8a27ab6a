"""The cases in which the tuner checks and times an operation: launches of a BERT layer, their inputs and references.

`sequence_in_batches` puts one sequence into several batches, to test that its results do not depend on the batch.
Attention, whose time depends on the lengths of the sequences, is timed on full and on ragged batches.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, cycle, islice, product

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels.tuning.candidates import ALL_MODELS, CLASSES, TOKEN_CLASSES, size_of, width_of
from fastbert_kernels.tuning.report import DTYPES, SHAPES, calls
from fastbert_kernels.tuning.roofline import Work, work

# The places in a model's layer at which an operation is timed.
PLACES = {
    "qkv_projection": ("qkv_projection",),
    "linear_activation": ("linear_activation",),
    "linear_residual": ("attention_output", "feed_forward_output"),
    "linear_residual_layer_norm": ("attention_output", "feed_forward_output"),
    "attention": ("attention",),
}
# Batch invariance is always tested for these models: LayerNorm in one launch (384 columns) and in two (768).
INVARIANCE_MODELS = ("minilm", "base")
# The positions of a launcher's arguments that have a row for each token, where it is not the first argument alone.
TOKEN_ARGUMENTS = {"linear_residual_layer_norm": (0, 3)}
# The invariance test looks at the sixth of nine sequences: it starts at an odd row, and the batch exceeds 1024 tokens.
SEQUENCE_LEN, SEQUENCE, NUM_SEQUENCES = 137, 5, 9
# Lengths of real texts in MiniLM's tokens: 32 evenly spaced quantiles of 6000 docstrings of installed packages, cut at
# 512. Short and long ones alternate, so that the first few have about the mean of all.
LENGTHS = (
    32, 9, 82, 15, 48, 12, 200, 21, 26, 6, 61, 13, 39, 10, 115, 17,
    36, 10, 94, 16, 53, 13, 373, 24, 29, 8, 70, 14, 43, 11, 148, 19,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One launch in a model's layer, on a full batch [B, S] or on a ragged one, whose last sequence has S tokens."""

    place: str
    model: str
    batch_size: int
    seq_len: int
    dtype: str
    ragged: bool = False

    def __str__(self) -> str:
        ragged = " ragged" if self.ragged else ""
        return f"{self.model} {self.batch_size}x{self.seq_len}{ragged} {self.place} {self.dtype}"

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        if not self.ragged:
            return [self.seq_len] * self.batch_size
        real = islice(cycle(LENGTHS), self.batch_size - 1)
        return [*(min(length, self.seq_len) for length in real), self.seq_len]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def work(self) -> Work:
        model, itemsize = ALL_MODELS[self.model], DTYPES[self.dtype].itemsize
        if self.ragged:  # attention only: it has no weights, so the work of its sequences adds up
            parts = [work(self.place, model, 1, length, itemsize) for length in self.lengths]
            return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))
        return work(self.place, model, self.batch_size, self.seq_len, itemsize)


def cases_of(operation: str, models: Iterable[str], dtypes: Iterable[str]) -> dict[int | None, list[Case]]:
    """Return the cases of each size class by its `up_to`, smallest batch first. Classes without cases are left out."""
    found, below = {}, 0
    shapes, kinds = sorted(SHAPES, key=math.prod), (False, True) if operation == "attention" else (False,)
    every = [
        Case(place, model, *shape, dtype, ragged)
        for shape, dtype, model, place, ragged in product(shapes, dtypes, models, PLACES[operation], kinds)
        if shape[0] > 1 or not ragged
    ]
    for up_to in CLASSES.get(operation, TOKEN_CLASSES):
        reached = math.inf if up_to is None else up_to
        found[up_to] = [
            case for case in every if below < size_of(operation, ALL_MODELS[case.model], case.tokens) <= reached
        ]
        below = reached
    return {up_to: cases for up_to, cases in found.items() if cases}


def invariance_cases(operation: str, cases: dict[int | None, list[Case]]) -> list[Case]:
    """Return the cases in which batch invariance is tested, one for each place, model and dtype.

    One entry of a file is used by all dtypes of its operand width and by all models in its class. So these are all
    dtypes of the width of the given cases, and their models and INVARIANCE_MODELS in the given classes.
    """
    every = [case for of_class in cases.values() for case in of_class]
    dtypes = [dtype for dtype in DTYPES if width_of(dtype) == width_of(every[0].dtype)]
    users = cases_of(operation, dict.fromkeys([*(case.model for case in every), *INVARIANCE_MODELS]), dtypes)
    found = chain.from_iterable(users.get(up_to, []) for up_to in cases)
    return list({(case.place, case.model, case.dtype): case for case in found}.values())


def _linear_residual_layer_norm(x, weight, bias, residual, norm_weight, norm_bias, eps, _):
    return F.layer_norm(F.linear(x, weight, bias) + residual, norm_weight.shape, norm_weight, norm_bias, eps)


def _qkv_projection(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads, _):
    parts = F.linear(x, q_weight, q_bias), F.linear(x, k_weight, k_bias), F.linear(x, v_weight, v_bias)
    return torch.stack(parts, 1).unflatten(2, (num_heads, -1))


def _attention(qkv, cu_seqlens, max_seqlen, scale):
    sequences = (part[None].permute(2, 0, 3, 1, 4) for part in qkv.split(cu_seqlens.diff().tolist()))
    contexts = [F.scaled_dot_product_attention(*sequence, scale=scale) for sequence in sequences]
    return torch.cat(contexts, dim=2)[0].transpose(0, 1).flatten(1)


# The reference of each launcher in plain PyTorch.
FORMULAS = {
    "qkv_projection": _qkv_projection,
    "linear_activation": lambda x, weight, bias, activation, _: F.gelu(F.linear(x, weight, bias)),
    "linear_residual_layer_norm": _linear_residual_layer_norm,
    "attention": _attention,
}


def random_call(case: Case, device: torch.device, seed: int) -> partial:
    """Return the launcher's call of a case, with random values scaled so that a linear's results are of order 1."""
    generator = torch.Generator(device).manual_seed(seed)
    bounds = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=device)

    def fill(x):
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():  # num_tokens or cu_seqlens
            return bounds[-1:] if x.numel() == 1 else bounds
        shape = (case.tokens, *x.shape[1:]) if x.ndim == 4 else x.shape  # qkv [T, 3, H, D] of a ragged batch is shorter
        values = torch.randn(shape, generator=generator, dtype=x.dtype, device=device)
        return values * x.shape[1] ** -0.25 if x.ndim == 2 else values

    every = calls(ALL_MODELS[case.model], case.batch_size, case.seq_len, DTYPES[case.dtype])
    call = next(call for place, _, call in every if place == case.place)
    return partial(call.func, *map(fill, call.args))


def sequence_in_batches(case: Case, device: torch.device) -> Iterator[tuple[partial, slice]]:
    """Yield calls on batches that hold one sequence, and the slice of its rows: alone, among four, among all."""
    whole = random_call(Case(case.place, case.model, NUM_SEQUENCES, SEQUENCE_LEN, case.dtype), device, 0)
    rows = TOKEN_ARGUMENTS.get(whole.func.__name__, (0,))
    for first, last in ((SEQUENCE, SEQUENCE + 1), (SEQUENCE - 2, SEQUENCE + 2), (0, NUM_SEQUENCES)):
        part = random_call(Case(case.place, case.model, last - first, SEQUENCE_LEN, case.dtype), device, 0)
        arguments = [
            x[first * SEQUENCE_LEN : last * SEQUENCE_LEN] if index in rows
            else x if isinstance(x, Tensor) and x.is_floating_point() else part.args[index]
            for index, x in enumerate(whole.args)
        ]  # fmt: skip
        start = (SEQUENCE - first) * SEQUENCE_LEN
        yield partial(whole.func, *arguments), slice(start, start + SEQUENCE_LEN)
