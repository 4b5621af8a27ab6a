"""Two processes of gloo on this machine, which run a test's own file as a script: `FILE RANK FOLDER`."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Be one of the two processes: join the group, and leave it together with the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        yield
        # Python may not end while gloo's threads still hold tensors: now and then, that aborts the process.
        dist.barrier()
    finally:
        dist.destroy_process_group()
