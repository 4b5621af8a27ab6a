"""The tolerance rule of `fastbert.commands.closeness` as an assertion."""

from torch import Tensor

from fastbert.commands.closeness import MODEL_FACTOR, closeness


def check_close(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, factor: float = MODEL_FACTOR) -> None:
    """Print both errors; raise AssertionError if ours breaks the rule or theirs is no number somewhere, and ValueError
    as `closeness` does."""
    assert theirs.isfinite().all(), f"{name}: transformers gives no number"
    for found in closeness(ours, theirs, truth, factor):
        errors = f"{found.error:.2e}, transformers {found.their_error:.2e}, limit {found.limit:.2e}"
        print(f"{name}: {found.measure} error {errors}")
        assert found.holds, f"{name}: {found.measure} error {found.error:.3e} exceeds {found.limit:.3e}"
