"""The machine and the versions behind a figure."""

import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
import transformers

VERSIONS = ("torch", "transformers", "triton", "python", "driver")


@cache
def machine(device: torch.device) -> dict:
    """A device's name, the CPU's threads and the versions, which stay the same during a run."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton"),
        "driver": _driver_version() if on_gpu else None,
        "python": platform.python_version(),
    }


def describe(record: dict) -> str:
    """What `machine` tells, or a record that holds it, in one line."""
    versions = [f"{name} {record[name]}" for name in VERSIONS if record.get(name)]
    return f"{record['device']}, {record['threads']} threads, {', '.join(versions)}"


def _driver_version() -> str | None:
    """The NVIDIA driver's, or None where nvidia-smi is not there to tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.exists() else None
    return found[1] if found else platform.machine()
