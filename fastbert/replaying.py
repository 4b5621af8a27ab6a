"""What lets a class's forward replay CUDA graphs by itself: a wrapper, which looks whether there might be a GPU."""

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from torch import Tensor, nn

from fastbert.ops.backend import is_tracing, is_transforming

HOME = "_fastbert_home"  # of a wrapper: the class that has the forward, and the forward if that is the wrapped class
_homes: dict[type[nn.Module], tuple[type[nn.Module], Callable | None]] = {}


def replays(*kinds: type[nn.Module]) -> None:
    """Wrap the forwards of these classes. Classes derived from them replay nothing."""
    for kind in kinds:
        kind.forward = _replaying(kind)


def plain_forward(kind: type[nn.Module]) -> Callable:
    """The forward of a class without its wrapper."""
    home, own = getattr(kind.forward, HOME, (kind, None))
    return own or home.forward


def original_forward(kind: type[nn.Module]) -> Callable:
    """What the wrapper of a class calls, whether or not somebody has patched the class since."""
    home, own = _homes[kind]
    return own or home.forward


@functools.cache
def _imported(name: str) -> ModuleType:
    # They import the model, which imports this.
    return import_module(f"fastbert.{name}")


def _replaying(kind: type[nn.Module]) -> Callable:
    home = next(x for x in kind.__mro__ if "forward" in vars(x))
    own = kind.forward if home is kind else None

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        # What is inherited is looked up in each call: somebody may patch it for every model.
        plain = own or home.forward
        if is_tracing() or is_transforming() or type(self) is not kind:
            return plain(self, *args, **kwargs)
        input_ids = args[0] if args else kwargs.get("input_ids")
        if type(input_ids) is not Tensor or input_ids.device.type != _imported("graphs").DEVICE_TYPE:
            return plain(self, *args, **kwargs)
        return _imported("automatic").run(self, plain, args, kwargs)

    _homes[kind] = home, own
    setattr(forward, HOME, _homes[kind])
    return forward
