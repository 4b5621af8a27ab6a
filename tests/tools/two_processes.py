"""Two processes of gloo on this machine, which run a test's own file as a script: `FILE RANK FOLDER`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist


def run_twice(script: str, folder: Path) -> None:
    """Run a script in two processes and wait until both have ended. Raises AssertionError if one fails."""
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)


@contextmanager
def one_of_two(rank: int, folder: str) -> Iterator[None]:
    """Be one of the two processes: join the group, and end together with the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    yield
    end_together()


def end_together() -> NoReturn:
    """End this process once all are done, without Python's cleanup.

    The cleanup races with gloo's threads, which need the GIL to let go of tensors: now and then it aborts the process,
    or waits for ever where the last reference to the group is that of a DistributedDataParallel.
    """
    dist.barrier()
    os._exit(0)
