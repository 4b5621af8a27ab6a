from collections.abc import Iterator

import pytest
from kernel_cases import DEVICE, guarded_outputs
from sanitizer import sanitized

from fastbert_kernels import take_bad_ids


@pytest.fixture
def guarded(request) -> Iterator[None]:
    """Outputs begin as NaN between canaries, the interpreter checks every access, and no bad ids are left over."""
    take_bad_ids(DEVICE)
    if "unguarded" in request.keywords:
        yield
        return
    with guarded_outputs(), sanitized():
        yield
