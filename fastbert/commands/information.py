"""`fastbert info`: versions, devices, kernels, settings and caches."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from rich.table import Table

import fastbert
from fastbert import automatic, graph_rules, ops
from fastbert.commands.machine import machine
from fastbert.ops import backend

VARIABLES = ("FASTBERT_BACKEND", "FASTBERT_GRAPHS", "FASTBERT_CHECK", "FASTBERT_CONFIGS")
# A program that imports the models and prints the seconds it took.
IMPORTS = """
import time
start = time.perf_counter()
from fastbert import BertForSequenceClassification, BertModel
from fastbert.ops import backend
print(time.perf_counter() - start)
"""


def facts() -> Iterator[tuple[str, str]]:
    """Names and values, most useful first."""
    devices = [*(torch.device("cuda", index) for index in range(torch.cuda.device_count())), torch.device("cpu")]
    versions = {"fastbert": fastbert.__version__} | machine(devices[0])
    for name in ("fastbert", "torch", "triton", "transformers", "python", "driver"):
        if name != "driver" or versions[name]:
            yield name, versions[name] or "not installed"
    for device in devices:
        yield str(device), _about(device)
        in_kernels, in_pytorch = _operations(device)
        yield f"kernels on {device}", "; ".join(filter(None, (in_kernels, *in_pytorch)))
        if in_kernels:
            yield f"configurations on {device}", _configurations(device)
    yield "CUDA graphs", _graphs()
    for name in VARIABLES:
        yield name, os.environ.get(name, "not set")
    yield "Hugging Face cache", HF_HUB_CACHE
    cold_start = [_imports(IMPORTS)]
    if versions["triton"]:
        home = Path(os.environ.get("TRITON_HOME") or Path.home())
        cache = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
        yield "Triton cache", str(cache)
        cold_start.append(f"kernels in Triton's cache: {_size(cache) / 2**20:.0f} MiB, others compile when first used")
    yield "cold start", "; ".join(cold_start)


def _graphs() -> str:
    """The mode of this process, and the limits of graphs that models capture without `fastbert.graphed`."""
    try:
        graph_rules.check_mode(graph_rules.default, "FASTBERT_GRAPHS")
    except ValueError as error:
        return str(error)
    return f"{graph_rules.default}: at most {automatic.limits()}"


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, which other processes may be writing."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except OSError:  # gone meanwhile
            continue
    return found


@functools.cache
def _imports(code: str) -> str:
    """The seconds that a new process takes to import the models."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode:
        return f"the models cannot be imported: {(run.stderr.strip().splitlines() or ['no message'])[-1]}"
    return f"imports: {float(run.stdout):.1f} s"


def _about(device: torch.device) -> str:
    about = machine(device)
    if device.type == "cpu":
        return f"{about['device']}, {about['threads']} threads"
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{about['device']}, compute capability {properties.major}.{properties.minor}, {memory}"


def _operations(device: torch.device) -> tuple[str, list[str]]:
    """The operations that have kernels on a device, and the others by reason."""
    by_reason: dict[str | None, list[str]] = {}
    for op in ops.OPS:
        by_reason.setdefault(backend.why_eager(op, device, torch.float32), []).append(op)
    names = {reason: "all" if len(found) == len(ops.OPS) else ", ".join(found) for reason, found in by_reason.items()}
    in_kernels = names.pop(None, "")
    return in_kernels, [f"{which} in plain PyTorch: {reason}" for reason, which in names.items()]


def _configurations(device: torch.device) -> str:
    try:
        return str(backend.launch_configurations(device))
    except ValueError as error:
        return str(error)


def table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in facts():
        table.add_row(name, value)
    return table
