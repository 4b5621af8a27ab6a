"""When graphs may be captured and replayed: the mode, other threads, and how many captures a minute."""

import os
import threading
import time
from collections import deque
from types import TracebackType
from weakref import WeakKeyDictionary

from torch import nn

from fastbert._compat import PINS_MEMORY, target_of

MODES = ("off", "auto", "on")
CAPTURES_A_MINUTE = 20  # of a process, by themselves: each waits for the device and empties the allocator's cache
MINUTE = 60.0
# Whose threads do not wait for the device: progress bars', those that pin memory or feed queues for data loaders,
# and notebooks'. A part of a name is enough: "ipykernel.iostream".
HARMLESS = (
    "tqdm", PINS_MEMORY, "multiprocessing.queues", "IPython", "ipykernel", "jupyter_client",
    "zmq", "fastbert",
)  # fmt: skip
RUNS_CODE = ("ipykernel.subshell",)  # of those, a thread that runs what its user writes
# Why other threads count.
THREADS = (
    "waiting for the device is an error in every thread while one captures: FASTBERT_GRAPHS=on captures nevertheless"
)

clock = time.monotonic  # seconds


class _Thread(threading.local):
    """What holds on the current thread.

    mode: that of `fastbert.cuda_graphs`, None outside. owned: a model of ours that has this call counts and captures
    for the models inside of it. is_warmup: captures are asked for, as many as there are shapes.
    """

    mode: str | None = None
    owned = False
    is_warmup = False

    def __init__(self):
        self.before: list[object] = []  # what was set, the last first to be put back


thread = _Thread()
of_models: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
default = os.environ.get("FASTBERT_GRAPHS", "auto")
# Why this process, which was forked, has no graphs.
forked: str | None = None
# How a capture failed, but for want of memory: what CUDA and torch's allocator make of another one is not known then.
broken: str | None = None
_captured_at: deque[float] = deque(maxlen=CAPTURES_A_MINUTE)


class Set:
    """Sets an attribute of `thread` inside of a with block."""

    def __init__(self, name: str, value: object):
        self._name, self._value = name, value

    def __enter__(self) -> None:
        thread.before.append(getattr(thread, self._name))
        setattr(thread, self._name, self._value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        setattr(thread, self._name, thread.before.pop())


def check_mode(mode: str, source: str) -> None:
    """Raise ValueError for what is no mode."""
    if mode not in MODES:
        raise ValueError(f"{source}: unknown mode {mode!r} of CUDA graphs, choose one of {', '.join(MODES)}")


def mode_of(model: nn.Module) -> str:
    """The mode of a model on this thread: the thread's, else its own, else FASTBERT_GRAPHS. Raises ValueError where
    that holds no mode's name."""
    if forked is not None:
        return "off"
    mode = thread.mode or (of_models.get(model) if of_models else None)
    if mode is None:
        mode = default
        if mode not in MODES:
            check_mode(mode, "FASTBERT_GRAPHS")
    return mode


def why_no_capture(mode: str) -> str | None:
    """Why nothing may be captured by itself now; None, and one capture is counted, if it may."""
    if broken is not None:
        return broken
    if mode == "auto" and (reason := _other_thread()):
        return reason
    now = clock()
    if thread.is_warmup:
        return None
    if len(_captured_at) == CAPTURES_A_MINUTE and now - _captured_at[0] < MINUTE:
        return f"{CAPTURES_A_MINUTE} graphs were captured within a minute"
    _captured_at.append(now)
    return None


def _other_thread() -> str | None:
    """Why "auto" captures nothing while these threads are alive; None if they are known to be harmless."""
    if threading.current_thread() is not threading.main_thread():
        return f"this is not the main thread, and {THREADS}"
    for other in threading.enumerate():
        if other is not threading.main_thread() and not _is_harmless(other):
            # Not its name, which may count up: each reason is said once.
            what = _run_by(other) or f"{type(other).__module__}.{type(other).__qualname__}"
            return f"a thread is alive that may wait for the device ({what}), and {THREADS}"
    return None


def _run_by(other: threading.Thread) -> str | None:
    """The function that a thread was given to run; None for a class with a `run` of its own."""
    target = target_of(other)
    return target and f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', target)}"


def _is_harmless(other: threading.Thread) -> bool:
    names = (type(other).__module__, _run_by(other) or "")
    if any(name.startswith(RUNS_CODE) for name in names):
        return False
    return any(name == known or name.startswith(f"{known}.") for name in names for known in HARMLESS)
