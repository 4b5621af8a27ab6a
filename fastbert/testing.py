"""The one tolerance rule of the project.

An implementation may be at most `factor` times as far from the truth as transformers' model in the same dtype is, plus
a rounding floor, in the maximum and in the root mean square. The truth is transformers' model in a wider dtype.

The floor is one rounding of the result in its dtype and four of float32, in which every dtype is computed. A float32
product made of three TF32 products is off by up to four: leaving out the product of the low parts takes up to two,
cutting the low parts to TF32 one each. Among many terms that is lost in what any order of their sum takes, and
transformers' error allows for it; of one term or a few transformers may have the exact result. Plain TF32, off by
thousands of roundings, is ten times the limit and more; to the floor of 16 bits the four add a two-thousandth at most.

Where transformers itself gives no number, as where float16 overflows, there is nothing to hold an implementation to.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OP_FACTOR, MODEL_FACTOR = 2.0, 3.0
FLOAT32_ROUNDINGS = 4


@dataclass(frozen=True)
class Closeness:
    """An error in one measure, "max" or "rms", beside transformers' own and the limit that follows from it."""

    measure: str
    error: float
    their_error: float
    limit: float

    @property
    def share(self) -> float:
        """The error as a share of the limit; infinite where the error or the limit is no number."""
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
    """The largest error that the rule allows in `dtype`, where the truth is of this size in the same measure."""
    floor = torch.finfo(dtype).eps + FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps
    return factor * their_error + floor * size


def closeness(ours: Tensor, theirs: Tensor, truth: Tensor, factor: float = MODEL_FACTOR) -> list[Closeness]:
    """How close ours comes to the truth beside theirs, in each measure, over what is finite in theirs; an empty list if
    nothing is. Where theirs is NaN or infinite ours may be the same or finite; anything else there has a NaN for error.

    ours and theirs are of one shape and dtype, truth of the same shape and a wider dtype; ValueError otherwise. The
    floor is relative to the largest value (for the root mean square: to the root mean square).
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
    """Print both errors; raise AssertionError if ours breaks the rule or theirs is no number somewhere, and ValueError
    as `closeness` does."""
    assert theirs.isfinite().all(), f"{name}: transformers gives no number"
    for found in closeness(ours, theirs, truth, factor):
        errors = f"{found.error:.2e}, transformers {found.their_error:.2e}, limit {found.limit:.2e}"
        print(f"{name}: {found.measure} error {errors}")
        assert found.holds, f"{name}: {found.measure} error {found.error:.3e} exceeds {found.limit:.3e}"
