"""The one tolerance rule of the project.

An implementation may be at most `factor` times as far from the truth as transformers' model in the same dtype is, plus
a rounding floor, in the maximum and in the root mean square. The truth is transformers' model in a wider dtype.
"""

import torch
from torch import Tensor

OP_FACTOR, MODEL_FACTOR = 2.0, 3.0


def check_close(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, factor: float = MODEL_FACTOR) -> None:
    """Print both errors and raise AssertionError if ours breaks the rule.

    ours and theirs are of one shape and dtype, truth of the same shape and a wider dtype. The floor is one rounding of
    the largest value (for the root mean square: of the root mean square) in ours' dtype.
    """
    assert ours.shape == theirs.shape == truth.shape, f"{name}: shapes {ours.shape}, {theirs.shape}, {truth.shape}"
    assert ours.dtype == theirs.dtype, f"{name}: dtypes {ours.dtype} and {theirs.dtype}"
    if truth.numel() == 0:
        return
    truth = truth.double()
    eps = torch.finfo(ours.dtype).eps
    for measure, size in (("max", lambda x: x.abs().max().item()), ("rms", lambda x: x.square().mean().sqrt().item())):
        our_error, their_error = size(ours.double() - truth), size(theirs.double() - truth)
        limit = factor * their_error + eps * size(truth)
        print(f"{name}: {measure} error {our_error:.2e}, transformers {their_error:.2e}, limit {limit:.2e}")
        assert our_error <= limit, f"{name}: {measure} error {our_error:.3e} exceeds {limit:.3e}"
