"""The records of benchmarks: one JSON line for each case and provider, in bench/results/<device>/<suite>.jsonl.

Every record has suite, kind ("latency" of a forward, "request" from the call to the result on the host, "training",
"encode", "memory", "kernel", "attention" or "host"), case, provider, baseline, ratio (baseline / provider: higher is
better) and the fields of `provenance`. If the provider could not run, it has "absent" with the reason instead of a
ratio; if the result was wrong, "wrong" with the error.

Timed records add median_s, q20_s, q80_s and baseline_median_s in seconds, rounds, error and error_ratio (error / the
baseline's error); on a GPU also flops_per_s and bytes_per_s (of the least work of the case), of_roof (the roofline time
at the measured roofs / the median) and roofs: the best rates of the device in this run, the sustained ones, and torch's
float32_precision. In records without "sustained" the roofs are medians, with a copy by memcpy. clock, calls and host_s
are those of `fastbert.commands.timing.Measured`. first_call_s includes compilation. graph_breaks is torch.compile's.

Requests add p50_s, p90_s and p99_s; encode adds texts_per_s, the settings of the tokenizer's threads and, without the
model, of_tokenizer (relative to tokenization alone); memory has peak_bytes and baseline_peak_bytes; host has layer_s
and baseline_layer_s (one layer) for launches, until_replay_s for replays.

Training steps have their ratio of times as "ratio" and also peak_bytes, baseline_peak_bytes and their ratio,
memory_ratio. The dtype of their case is autocast's. With dropout they have no error.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from workloads import DEVICE

from fastbert.commands.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# The value of `pytest bench --commit`.
given_commit: str | None = None


def write(record: dict) -> None:
    """Write one finished record to its file, in place of an earlier one of the same case and provider.

    The file is replaced atomically, so that a killed run leaves all finished records and no partial line.
    """
    record = record | provenance()
    path = RESULTS / slug(record) / f"{record['suite']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [other for other in read(path) if _identity(other) != _identity(record)] if path.exists() else []
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in [*kept, record]))
    os.replace(unfinished, path)


def read(path: Path) -> Iterator[dict]:
    return map(json.loads, path.read_text().splitlines())


def _identity(record: dict) -> tuple:
    """Return what two records share if one replaces the other."""
    return record["kind"], record["provider"], *about(record["case"])


def about(case: dict) -> tuple:
    """Return what identifies a case. With a fill this excludes the tokens, which depend on the docstrings installed."""
    return tuple(sorted((name, value) for name, value in case.items() if name != "tokens" or "fill" not in case))


def _commit() -> str:
    """Return HEAD's short hash, with "-dirty" if anything but the results differs from it.

    Without the project's history it is the value of `pytest bench --commit`, or "unknown".
    """
    return _head() or given_commit or "unknown"


@cache
def _head() -> str | None:
    try:
        # A copy without its history may be inside another repository.
        if Path(git("rev-parse", "--show-toplevel")) != ROOT:
            return None
        head = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changes else head


def git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def provenance() -> dict:
    """Return the machine, versions, commit, load and date (UTC) of a record.

    load: the last minute's average number of running threads per core; above 1 other programs were running.
    """
    load = os.getloadavg()[0] / os.cpu_count()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return machine(DEVICE) | {"commit": _commit(), "load": round(load, 2), "date": date}


def slug(record: dict) -> str:
    threads = f" {record['threads']} threads" if record["device"].startswith("CPU") else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{record['device']}{threads}".lower()).strip("-")
