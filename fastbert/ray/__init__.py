"""fastbert past one process, on Ray: `Embed` for a corpus on Ray Data, `app` for a service on Ray Serve.

Needs the extra `ray`. Names are resolved on first use, as in `fastbert`: a service needs no Ray Data, and a corpus no
Ray Serve.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastbert.ray.embed import Embed
    from fastbert.ray.service import app

__all__ = ["Embed", "app"]
_HOME = {"Embed": "embed", "app": "service"}

if not TYPE_CHECKING:  # to a type checker, a module with a `__getattr__` has every name

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"fastbert.ray needs Ray ({error}): pip install 'fastbert-triton[ray]'") from error
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
