"""The records of benchmarks: one JSON line for each case and provider, in bench/results/<device>/<suite>.jsonl.

Every record has suite, kind ("latency" of a forward, "request" from the call to the result on the host, "encode",
"memory", "kernel", "attention" or "host"), case, provider, baseline, ratio (baseline / provider: higher is better) and
what `provenance` adds; that of a provider which could not run has "absent", the reason, or "wrong", by how much it
errs, and no ratio. Times add median_s, q20_s, q80_s and baseline_median_s in seconds, rounds, error and error_ratio
(error / the baseline's); on a GPU also flops_per_s and bytes_per_s (of what the case has to do, whatever the provider
does), of_roof (the least time the measured roofs allow / the median) and the roofs: the best rates of the device in
this run, what it sustained, and torch's float32_precision. Records without "sustained" have medians in the roofs'
place, and a copy by memcpy.
clock, calls and host_s are those of `fastbert.commands.timing.Measured`, first_call_s is the first call's, compilation
included, graph_breaks torch.compile's; requests add p50_s, p90_s and p99_s; encode texts_per_s, what decides over the
tokenizer's threads, and without the model of_tokenizer, times what tokenizing alone takes; memory has peak_bytes
and baseline_peak_bytes; the host's launches have layer_s, what one layer takes, and baseline_layer_s, its replays
until_replay_s.
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
# Of `pytest bench --commit`.
given_commit: str | None = None


def write(record: dict) -> None:
    """Put one finished record into its file at once, in the place of an earlier one of the same case and provider.

    The file is replaced as a whole, so that a run which is killed leaves every finished record and no half line.
    """
    record = record | provenance()
    path = RESULTS / _slug(record) / f"{record['suite']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [other for other in read(path) if _identity(other) != _identity(record)] if path.exists() else []
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in [*kept, record]))
    os.replace(unfinished, path)


def read(path: Path) -> Iterator[dict]:
    return map(json.loads, path.read_text().splitlines())


def _identity(record: dict) -> tuple:
    """What a record tells of whom."""
    return record["kind"], record["provider"], *about(record["case"])


def about(case: dict) -> tuple:
    """What tells a case from others. Where it has a fill, its tokens do not: they follow from Python's own texts."""
    return tuple(sorted((name, value) for name, value in case.items() if name != "tokens" or "fill" not in case))


def _commit() -> str:
    """The short name of HEAD, with "-dirty" if anything but the results differs from it; where the project came without
    its history, the name that `pytest bench --commit` gave, or "unknown"."""
    return _head() or given_commit or "unknown"


@cache
def _head() -> str | None:
    try:
        # A copy without its history may lie in somebody else's repository.
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
    """Where, with what, of which commit and when (UTC) a record was measured; load is the last minute's average number
    of running threads per core, above 1 when others were at work."""
    load = os.getloadavg()[0] / os.cpu_count()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return machine(DEVICE) | {"commit": _commit(), "load": round(load, 2), "date": date}


def _slug(record: dict) -> str:
    threads = f" {record['threads']} threads" if record["device"].startswith("CPU") else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{record['device']}{threads}".lower()).strip("-")
