"""The one tolerance rule of the project.

The error of an implementation may be at most `factor` times the error of transformers' model in the same dtype, plus a
rounding allowance, for both the maximum and the root mean square. The truth is transformers' model in a wider dtype.

The rounding allowance is one rounding of the result in its dtype and four of float32, in which every dtype is computed.
A float32 product of three TF32 products is off by up to four: omitting the product of the low parts costs up to two,
and truncating each low part to TF32 costs one. In sums of many terms transformers' own error covers that, but a sum of
a few terms may be exact in transformers. Plain TF32, off by thousands of roundings, exceeds the limit at least tenfold.
For 16-bit dtypes the four roundings increase the allowance by at most a two-thousandth.

Where transformers gives NaN or infinity, for example where float16 overflows, a result must be finite or the same.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OP_FACTOR, MODEL_FACTOR = 2.0, 3.0
FLOAT32_ROUNDINGS = 4


@dataclass(frozen=True)
class Closeness:
    """An error in one measure, "max" or "rms", transformers' error and the resulting limit."""

    measure: str
    error: float
    their_error: float
    limit: float

    @property
    def share(self) -> float:
        """The error as a share of the limit; infinite if the error or the limit is NaN."""
        if self.error == 0:
            return 0.0
        return self.error / self.limit if math.isfinite(self.error) and self.limit > 0 else math.inf

    @property
    def holds(self) -> bool:
        return self.share <= 1


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


MEASURES = {"max": _largest, "rms": _root_mean_square}


def limit(their_error: float, size: float, dtype: torch.dtype, factor: float = MODEL_FACTOR) -> float:
    """The largest error that the rule allows in `dtype`. size: the truth in the same measure."""
    allowance = torch.finfo(dtype).eps + FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps
    return factor * their_error + allowance * size


def closeness(ours: Tensor, theirs: Tensor, truth: Tensor, factor: float = MODEL_FACTOR) -> list[Closeness]:
    """The errors of ours and theirs in each measure, over the elements that are finite in theirs; an empty list if none
    is. Where theirs is NaN or infinite, ours must be the same or finite, otherwise all errors are NaN.

    Raises ValueError unless the three have one shape, and ours and theirs one dtype. truth should have a wider dtype.
    The rounding allowance is relative to the maximum of the truth (for "rms": to its root mean square).
    """
    if not ours.shape == theirs.shape == truth.shape:
        raise ValueError(f"shapes differ: {list(ours.shape)}, {list(theirs.shape)}, {list(truth.shape)}")
    if ours.dtype != theirs.dtype:
        raise ValueError(f"dtypes differ: {ours.dtype} and {theirs.dtype}")
    finite = theirs.isfinite()
    if not finite.all():
        if not (finite | ours.isfinite() | torch.isclose(ours, theirs, equal_nan=True)).all():
            return [Closeness(measure, math.nan, math.nan, math.nan) for measure in MEASURES]
        ours, theirs, truth = (x[finite] for x in (ours, theirs, truth))
    if theirs.numel() == 0:
        return []
    truth, found = truth.double(), []
    for measure, size in MEASURES.items():
        error, their_error = size(ours.double() - truth), size(theirs.double() - truth)
        found.append(Closeness(measure, error, their_error, limit(their_error, size(truth), ours.dtype, factor)))
    return found


def check_close(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, factor: float = MODEL_FACTOR) -> None:
    """Print both errors. Raises AssertionError if ours breaks the rule or theirs is not finite, and ValueError as
    `closeness` does."""
    assert theirs.isfinite().all(), f"{name}: transformers gives NaN or infinity"
    for found in closeness(ours, theirs, truth, factor):
        errors = f"{found.error:.2e}, transformers {found.their_error:.2e}, limit {found.limit:.2e}"
        print(f"{name}: {found.measure} error {errors}")
        assert found.holds, f"{name}: {found.measure} error {found.error:.3e} exceeds {found.limit:.3e}"
