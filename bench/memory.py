"""Peak memory of a call: from the allocator's events on the CPU, from its statistics on a GPU."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory_bytes(fn: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that `fn()` holds at once in tensors on the device, without what was allocated before.

    Only allocations through PyTorch's allocator count, not scratch memory inside BLAS or oneDNN. The result of `fn`
    counts while `fn` runs. Call `fn` once before, so that its caches do not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    changes = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))
