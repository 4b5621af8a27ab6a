"""Code that runs without coverage. pytest-cov's marker no_cover has no effect with pytest-xdist (pytest-cov 7.1)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def untraced() -> Iterator[None]:
    """Stop coverage on this thread."""
    tracer = sys.gettrace()
    if not hasattr(tracer, "stop"):  # there is no tracer, or not coverage's
        yield
        return
    tracer.stop()
    try:
        yield
    finally:
        tracer.start()
