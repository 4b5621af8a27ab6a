"""When CUDA graphs may be captured and replayed: the mode, other threads, and the captures per minute."""

import os
import threading
import time
from collections import deque
from types import TracebackType
from weakref import WeakKeyDictionary

from torch import nn

from fastbert._compat import PINS_MEMORY, target_of

MODES = ("off", "auto", "on")
CAPTURES_A_MINUTE = 20  # without `graphed`, in a process: each waits for the device and empties the allocator's cache
MINUTE = 60.0
# Modules whose threads never wait for the device: progress bars, pinned memory and queues of data loaders, notebooks.
# Submodules are included.
HARMLESS = (
    "tqdm", PINS_MEMORY, "multiprocessing.queues", "IPython", "ipykernel", "jupyter_client",
    "zmq", "fastbert",
)  # fmt: skip
RUNS_CODE = ("ipykernel.subshell",)  # exceptions: their threads run user code
THREADS = "a capture breaks if another thread waits for the device meanwhile; FASTBERT_GRAPHS=on captures anyway"

clock = time.monotonic  # seconds


class _Thread(threading.local):
    """Settings of the current thread.

    mode: set by `fastbert.cuda_graphs`, None outside. nested: an outer model of ours is running, and its own graphs
    include the models inside. is_warmup: captures are requested and not limited.
    """

    mode: str | None = None
    nested = False
    is_warmup = False

    def __init__(self) -> None:
        self.previous: list[object] = []  # a stack of the values that ThreadSetting must restore


thread = _Thread()
mode_by_model: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
default = os.environ.get("FASTBERT_GRAPHS", "auto")
# Why this process has no graphs, if it was forked.
forked: str | None = None
# Why captures have stopped: the error of a failed capture, except for lack of memory. CUDA and torch's allocator may be
# unable to capture since then.
broken: str | None = None
_captured_at: deque[float] = deque(maxlen=CAPTURES_A_MINUTE)


class ThreadSetting:
    """Context manager that sets an attribute of `thread`."""

    def __init__(self, name: str, value: object):
        self._name, self._value = name, value

    def __enter__(self) -> None:
        thread.previous.append(getattr(thread, self._name))
        setattr(thread, self._name, self._value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        setattr(thread, self._name, thread.previous.pop())


def check_mode(mode: str, source: str) -> None:
    """Raise ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"{source}: unknown mode {mode!r} of CUDA graphs, choose one of {', '.join(MODES)}")


def mode_of(model: nn.Module) -> str:
    """The mode of a model on this thread: the thread's, else the model's, else FASTBERT_GRAPHS. Raises ValueError if
    that variable holds an unknown mode."""
    if forked is not None:
        return "off"
    mode = thread.mode or (mode_by_model.get(model) if mode_by_model else None)
    if mode is None:
        mode = default
        if mode not in MODES:
            check_mode(mode, "FASTBERT_GRAPHS")
    return mode


def why_no_capture(mode: str) -> str | None:
    """Why a model may not capture a graph now. If it may, count one capture and return None."""
    if broken is not None:
        return broken
    if mode == "auto" and (reason := _why_threads_block()):
        return reason
    now = clock()
    if thread.is_warmup:
        return None
    if len(_captured_at) == CAPTURES_A_MINUTE and now - _captured_at[0] < MINUTE:
        return f"{CAPTURES_A_MINUTE} graphs were captured within a minute"
    _captured_at.append(now)
    return None


def _why_threads_block() -> str | None:
    """Why "auto" captures nothing: another thread may wait for the device. None if all threads are harmless."""
    if threading.current_thread() is not threading.main_thread():
        return f"this is not the main thread, and {THREADS}"
    for other in threading.enumerate():
        if other is not threading.main_thread() and not _is_harmless(other):
            # Without the thread's name, which may contain a counter: each reason is logged once.
            what = _run_by(other) or f"{type(other).__module__}.{type(other).__qualname__}"
            return f"a thread is alive that may wait for the device ({what}), and {THREADS}"
    return None


def _run_by(other: threading.Thread) -> str | None:
    """The name of the function that a thread runs; None if the thread's class defines `run`."""
    target = target_of(other)
    return target and f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', target)}"


def _is_harmless(other: threading.Thread) -> bool:
    names = (type(other).__module__, _run_by(other) or "")
    if any(name.startswith(RUNS_CODE) for name in names):
        return False
    return any(name == known or name.startswith(f"{known}.") for name in names for known in HARMLESS)
