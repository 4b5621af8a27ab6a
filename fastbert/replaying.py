"""The wrapper around a class's forward that lets it replay CUDA graphs if its inputs are on a GPU."""

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from torch import Tensor, nn

from fastbert.ops.backend import is_tracing, is_transforming

# An attribute of a wrapper: the class that defines the wrapped forward, and that forward unless it is inherited.
HOME = "_fastbert_home"
_homes: dict[type[nn.Module], tuple[type[nn.Module], Callable | None]] = {}


def replays(*kinds: type[nn.Module]) -> None:
    """Wrap the forwards of these classes. Their subclasses replay nothing."""
    for kind in kinds:
        kind.forward = _replaying(kind)


def plain_forward(kind: type[nn.Module]) -> Callable:
    """The forward of a class, without the wrapper if it has one."""
    home, own = getattr(kind.forward, HOME, (kind, None))
    return own or home.forward


def original_forward(kind: type[nn.Module]) -> Callable:
    """The forward that the wrapper of a class calls, even if the class has been patched since."""
    home, own = _homes[kind]
    return own or home.forward


@functools.cache
def _imported(name: str) -> ModuleType:
    # Not at the top: these modules import the model, which imports this one.
    return import_module(f"fastbert.{name}")


def _replaying(kind: type[nn.Module]) -> Callable:
    home = next(x for x in kind.__mro__ if "forward" in vars(x))
    own = kind.forward if home is kind else None

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        # Look up an inherited forward in each call, because it may be patched for every model.
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
