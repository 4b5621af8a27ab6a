from collections.abc import Iterator

import pytest
from kernel_cases import DEVICE, guarded_outputs
from sanitizer import sanitized

from fastbert_kernels import take_bad_ids


@pytest.fixture
def guarded(request) -> Iterator[None]:
    """Fill outputs with NaN between canaries, check every access of the interpreter, and start without bad ids."""
    take_bad_ids(DEVICE)
    if "unguarded" in request.keywords:
        yield
        return
    with guarded_outputs(), sanitized():
        yield
