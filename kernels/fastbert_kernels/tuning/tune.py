"""Tune the launch configurations for the present device: ``python -m fastbert_kernels.tuning.tune``.

The candidates of every operation are compiled and filtered by the rules of the report (`candidates`), then checked and
timed beside the present configuration at the shapes of BERT models (`trial`). After each operation the winners are
written to --out, else to the file that FASTBERT_CONFIGS names, else to `configs/<device>.json` of this package, so a
killed run keeps them. The default models are base and MiniLM; MiniLM's rerankers have the same layer.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton import knobs

from fastbert_kernels import configs
from fastbert_kernels.target import architecture
from fastbert_kernels.tuning.ahead_of_time import CHIPS
from fastbert_kernels.tuning.candidates import ALL_MODELS, CLASSES, TOKEN_CLASSES, Candidate, examine, grid, width_of
from fastbert_kernels.tuning.cases import cases_of, invariance_cases
from fastbert_kernels.tuning.report import DTYPES, markdown
from fastbert_kernels.tuning.roofline import MODELS
from fastbert_kernels.tuning.trial import Timing, Trial

# The one-launch LayerNorm comes after `linear_residual`, the GEMM of the two launches that it competes with.
OPERATIONS = ("qkv_projection", "attention", "linear_residual", "linear_residual_layer_norm", "linear_activation")
MEASURED = "measured by python -m fastbert_kernels.tuning.tune where an entry has measured_us; elsewhere: "


class Compilers:
    """Processes that compile candidates for a target while this process times others."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int, target: str):
        self.pool, self.workers, self.target = pool, workers, target

    def compile_candidates(self, operation: str, dtypes: list[str], models: list[str]) -> Callable[[], list[Candidate]]:
        """Start to compile an operation's grid. Return a function that waits for the candidates."""
        every = grid(operation, CHIPS[self.target], DTYPES[dtypes[0]].itemsize)
        begun = [
            self.pool.submit(examine, self.target, dtypes, operation, models, every[first :: self.workers])
            for first in range(self.workers)
        ]
        return lambda: [candidate for part in begun for candidate in part.result()]

    def report_failures(self, operation: str, width: str, config: dict, up_to: int | None) -> list[str]:
        """Return the reasons why the report rejects a configuration for any model and dtype of a class."""
        dtypes = [dtype for dtype in DTYPES if width_of(dtype) == width]
        models = sorted({case.model for case in cases_of(operation, ALL_MODELS, dtypes)[up_to]})
        # One process for each dtype, so that launches that several models share are compiled once.
        begun = [self.pool.submit(examine, self.target, [dtype], operation, models, [config]) for dtype in dtypes]
        return list(dict.fromkeys(chain.from_iterable(part.result()[0].reasons for part in begun)))


@contextmanager
def compilers(target: str) -> Iterator[Compilers]:
    workers = max(1, (os.cpu_count() or 1) - 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            yield Compilers(pool, workers, target)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def say(line: str) -> None:
    print(line, flush=True)


def merged(
    operation: str, before: list[dict], chosen: dict[int | None, Timing],
    same_family: Callable[[dict | None, dict | None], bool],
) -> list[dict]:  # fmt: skip
    """Return the entries of an operation and width after these choices for their classes.

    Sizes outside the chosen classes keep their configuration and source. Of a class's present configurations, only that
    of its largest size is measured. If it is chosen again, smaller sizes keep theirs where `same_family` holds.
    Adjacent entries with the same configuration and source become one.
    """
    classes = CLASSES.get(operation, TOKEN_CLASSES)
    measured = {case for timing in chosen.values() for case in timing.measured_us}
    entries = []
    for up_to in sorted({*classes, *(entry["up_to"] for entry in before)}, key=configs.limit_of):
        of_class = next((limit for limit in classes if configs.limit_of(up_to) <= configs.limit_of(limit)), None)
        entry, present = configs.entry_for(before, up_to), configs.entry_for(before, of_class)
        entry = entry or {"config": None}
        config, source = entry["config"], {key: entry[key] for key in ("source",) if key in entry}
        measured_us = {case: time for case, time in entry.get("measured_us", {}).items() if case not in measured}
        timing = chosen.get(of_class)
        kept = timing and present and timing.config == present["config"] and same_family(config, timing.config)
        if timing and (not kept or up_to == of_class):
            config, source, measured_us = timing.config, {}, timing.measured_us
        if config is None:
            continue
        last = entries[-1] if entries else {}
        if last.get("config") == config and last.get("source") == source.get("source"):
            measured_us = entries.pop().get("measured_us", {}) | measured_us
        times = {"measured_us": measured_us} if measured_us else {}
        entries.append({"up_to": up_to, "config": config} | times | source)
    return entries


def commit() -> str | None:
    """Return HEAD's short hash, with "-dirty" if the work tree differs; None outside a git checkout."""
    git = partial(subprocess.run, cwd=configs.FOLDER, check=True, capture_output=True, text=True)
    try:
        if not git(["git", "ls-files", "."]).stdout:  # an installed package inside another project's checkout
            return None
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changes = git(["git", "--no-optional-locks", "status", "--porcelain", "--", "..", ":!."]).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changes else head


def provenance(device: torch.device, source: str) -> dict:
    """Return the header of a tuned file: source, device, versions, commit and date (UTC).

    "bits": "measured" states that all chosen configurations gave bitwise equal rows.
    """
    found = {
        "source": source if source.startswith(MEASURED) else MEASURED + source,
        "device": torch.cuda.get_device_name(device),
        "architecture": architecture(device),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bits": "measured",
    }
    return {key: value for key, value in found.items() if value is not None}


def tune(
    path: Path, document: dict, operations: list[str], dtypes: list[str], models: list[str], seconds: float,
    compilers: Compilers, device: torch.device,
) -> None:  # fmt: skip
    """Time the candidates of these operations, and write the document with the choices after each operation.

    seconds: the time for checks and timings, without compilation.
    """
    units = []
    for operation, width in product(operations, dict.fromkeys(map(width_of, dtypes))):
        of_width = [dtype for dtype in dtypes if width_of(dtype) == width]
        if cases := cases_of(operation, models, of_width):
            compared = invariance_cases(operation, cases)
            users = (sorted({getattr(case, of) for case in compared}) for of in ("dtype", "model"))
            units.append((operation, width, cases, compilers.compile_candidates(operation, *users)))
    for number, (operation, width, cases, candidates) in enumerate(units):
        found = [candidate for candidate in candidates() if not candidate.reasons]
        say(f"{operation}, {width} bits: {len(found)} candidates")
        started = time.perf_counter()
        trial = Trial(operation, cases, configs.operations(document), device, say)
        report_failures = partial(compilers.report_failures, operation, width)
        chosen = trial.run(found, report_failures, seconds / (len(units) - number))
        seconds -= time.perf_counter() - started
        for up_to, timing in chosen.items():
            kept = (
                "kept"
                if timing.config == trial.present[up_to]
                else f"{timing.ratio:.3f} of the {trial.reference(up_to)}"
            )
            say(f"  up_to {up_to}: {timing.config}, {kept}")
        if not chosen:
            say("  nothing chosen: in every family some class was not timed or is slower than at present")
            continue
        entries = merged(operation, document[operation][width], chosen, trial.same_family)
        document = document | {operation: document[operation] | {width: entries}}
        # attention_short is not tuned. It is removed if it no longer sums in the order of attention.
        if not configs.same_summation_order(document["attention"][width], document["attention_short"][width]):
            say("  removed the configuration of attention_short: its results would differ from attention's")
            document = document | {"attention_short": document["attention_short"] | {width: []}}
        document = provenance(device, document["source"]) | configs.operations(document)
        configs.write(document, path)
        del trial  # frees its inputs


def list_candidates(operations: list[str], dtypes: list[str], models: list[str], target: str) -> None:
    """Print the candidates that pass the report and the roofline times of their cases, by operation and dtype."""
    header = ("configuration", "registers", "shared bytes", "instruction", "CTAs per SM")
    with compilers(target) as workers:
        for operation, dtype in product(operations, dtypes):
            cases = cases_of(operation, models, [dtype])
            found = workers.compile_candidates(operation, [dtype], models)() if cases else []
            rows = [
                (" ".join(f"{key}={value}" for key, value in candidate.config.items() if key != "ctas_per_sm"),
                 candidate.registers, candidate.shared_bytes, candidate.matrix_instruction, candidate.ctas_per_sm)
                for candidate in found if not candidate.reasons
            ]  # fmt: skip
            say(f"## {operation}, {dtype}, {target}: {len(rows)} of {len(found)} candidates\n")
            for case in chain.from_iterable(cases.values()):
                say(f"- {case}: roofline time {case.work.seconds(dtype) * 1e6:.2f} us")
            dropped = Counter(candidate.reasons[0].split(":")[0] for candidate in found if candidate.reasons)
            for reason, count in dropped.items():
                say(f"- {count} dropped: {reason}")
            say("\n" + markdown(header, rows) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastbert_kernels.tuning.tune", description=__doc__.split("\n\n")[1]
    )
    for name, choices, default in (
        ("model", MODELS, "base and minilm"), ("dtype", DTYPES, "bf16"), ("op", OPERATIONS, "all"),
    ):  # fmt: skip
        text = f"may be repeated (default: {default})"
        parser.add_argument(f"--{name}", action="append", choices=list(choices), help=text)
    parser.add_argument("--out", type=Path, help="the file to write; tuning starts from it if it exists")
    parser.add_argument("--seconds", type=float, default=900, help="time for checks and timings (default: %(default)s)")
    parser.add_argument("--candidates", action="store_true", help="only list what would be timed; needs no GPU")
    parser.add_argument("--target", choices=list(CHIPS), help="the architecture for --candidates (default: sm_90)")
    options = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    operations = [operation for operation in OPERATIONS if operation in (options.op or OPERATIONS)]
    dtypes, models = options.dtype or ["bf16"], options.model or ["base", "minilm"]
    if options.candidates:
        list_candidates(operations, dtypes, models, options.target or "sm_90")
        return 0
    if not options.seconds > 0:
        parser.error(f"--seconds is {options.seconds:g}, it has to be positive")
    if options.target:
        parser.error("--target needs --candidates: timings are for the present device only")
    if not torch.cuda.is_available():
        parser.error("no GPU to time the candidates on; --candidates lists them without one")
    device = torch.device("cuda", torch.cuda.current_device())
    target = architecture(device)
    if target not in CHIPS:
        parser.error(f"{target} cannot be tuned: its limits are not in CHIPS, which has {', '.join(CHIPS)}")
    own = os.environ.get("FASTBERT_CONFIGS")
    path = options.out or (Path(own) if own else configs.path_of(torch.cuda.get_device_name(device)))
    begin = path if path.exists() else configs.shipped(configs.name_for(device))
    document = configs.check(configs.read(begin), begin)
    if "bits" in document and document["device"] != torch.cuda.get_device_name(device):
        parser.error(f"{begin} was measured on another device, {document['device']}: choose another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        parser.error(f"cannot write {path}: {error}")
    if document.get("architecture", target) != target:
        parser.error(f"{begin} was measured on {document['architecture']}, this device is {target}")
    say(f"{torch.cuda.get_device_name(device)}: starting from {begin}, writing {path}")
    with torch.inference_mode(), compilers(target) as workers:
        tune(path, document, operations, dtypes, models, options.seconds, workers, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
