"""fastbert past one process, on Ray: `Embed` for a corpus on Ray Data, `app` for a service on Ray Serve.

Needs the extra `ray`, and raises ImportError without it. Names are resolved on first use, as in `fastbert`: a service
needs no Ray Data, and a corpus no Ray Serve.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastbert.ray.embed import Embed
    from fastbert.ray.service import app

if missing := [name for name in ("ray", "sentence_transformers") if find_spec(name) is None]:
    raise ImportError(f"fastbert.ray needs {' and '.join(missing)}: pip install 'fastbert-triton[ray]'")

__all__ = ["Embed", "app"]
_HOME = {"Embed": "embed", "app": "service"}

if not TYPE_CHECKING:  # to a type checker, a module with a `__getattr__` has every name

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
