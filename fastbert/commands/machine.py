"""The machine and the versions of a measurement."""

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
    """The name of a device, the CPU threads and the versions."""
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
    """The result of `machine`, or a record that contains it, in one line."""
    versions = [f"{name} {record[name]}" for name in VERSIONS if record.get(name)]
    return f"{record['device']}, {record['threads']} threads, {', '.join(versions)}"


def _driver_version() -> str | None:
    """The version of the NVIDIA driver, or None without nvidia-smi."""
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
