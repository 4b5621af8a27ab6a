"""Launch configurations measured on the present device: ``python -m fastbert_kernels.tuning.tune``.

Candidates of every operation are compiled and cut as the report would cut them (`candidates`), then checked and timed
beside the present configuration at the shapes of BERT models (`trial`). What wins is written to the user's own file
(FASTBERT_CONFIGS), or to `configs/<device>.json` of this package, after each operation: a run that is killed keeps what
it has found. Models are, if none is named, base and MiniLM, whose layer rerankers share.
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
from fastbert_kernels.tuning.cases import bits_cases, cases_of
from fastbert_kernels.tuning.report import DTYPES, markdown
from fastbert_kernels.tuning.roofline import MODELS
from fastbert_kernels.tuning.trial import Timing, Trial

# One launch is decided after the GEMM of the two that it would replace.
OPERATIONS = ("qkv_projection", "attention", "linear_residual", "linear_residual_layer_norm", "linear_activation")
MEASURED = "measured by python -m fastbert_kernels.tuning.tune where an entry has measured_us; elsewhere: "


class Compilers:
    """Processes that compile candidates for a target, while this one times others."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int, target: str):
        self.pool, self.workers, self.target = pool, workers, target

    def cut(self, operation: str, dtypes: list[str], models: list[str]) -> Callable[[], list[Candidate]]:
        """Begin to compile an operation's grid; what is returned waits for the candidates."""
        every = grid(operation, CHIPS[self.target], DTYPES[dtypes[0]].itemsize)
        begun = [
            self.pool.submit(examine, self.target, dtypes, operation, models, every[first :: self.workers])
            for first in range(self.workers)
        ]
        return lambda: [candidate for part in begun for candidate in part.result()]

    def refuse(self, operation: str, width: str, config: dict, up_to: int | None) -> list[str]:
        """What the report would have against a configuration for its class, in any model and dtype."""
        dtypes = [dtype for dtype in DTYPES if width_of(dtype) == width]
        models = sorted({case.model for case in cases_of(operation, ALL_MODELS, dtypes)[up_to]})
        # A process compiles once what several models share.
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
    alike: Callable[[dict | None, dict | None], bool],
) -> list[dict]:  # fmt: skip
    """The entries of an operation and width with these choices for their classes.

    Sizes outside of these classes keep what they had, with its source, and so do those of a class for which the present
    configuration of its largest size is chosen, which alone has been measured, as long as both are alike. Neighbours of
    one configuration and source are one entry.
    """
    classes = CLASSES.get(operation, TOKEN_CLASSES)
    measured = {case for timing in chosen.values() for case in timing.measured_us}
    entries = []
    for up_to in sorted({*classes, *(entry["up_to"] for entry in before)}, key=configs.reach):
        of_class = next((limit for limit in classes if configs.reach(up_to) <= configs.reach(limit)), None)
        entry, present = configs.serving(before, up_to), configs.serving(before, of_class)
        entry = entry or {"config": None}
        config, source = entry["config"], {key: entry[key] for key in ("source",) if key in entry}
        measured_us = {case: time for case, time in entry.get("measured_us", {}).items() if case not in measured}
        timing = chosen.get(of_class)
        kept = timing and present and timing.config == present["config"] and alike(config, timing.config)
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
    """HEAD's short name, with "-dirty" if the work tree differs; None outside of a git checkout."""
    git = partial(subprocess.run, cwd=configs.FOLDER, check=True, capture_output=True, text=True)
    try:
        if not git(["git", "ls-files", "."]).stdout:  # an installed package inside of somebody else's checkout
            return None
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changes = git(["git", "--no-optional-locks", "status", "--porcelain", "--", "..", ":!."]).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changes else head


def provenance(device: torch.device, source: str) -> dict:
    """Where, with what, of which commit and when (UTC); bits are compared of all configurations that are chosen."""
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
    """Time candidates of these operations and write the document with the choices, after each of them.

    seconds: how long candidates are checked and timed, compilation apart.
    """
    units = []
    for operation, width in product(operations, dict.fromkeys(map(width_of, dtypes))):
        of_width = [dtype for dtype in dtypes if width_of(dtype) == width]
        if cases := cases_of(operation, models, of_width):
            compared = bits_cases(operation, cases)
            served = (sorted({getattr(case, of) for case in compared}) for of in ("dtype", "model"))
            units.append((operation, width, cases, compilers.cut(operation, *served)))
    for number, (operation, width, cases, candidates) in enumerate(units):
        found = [candidate for candidate in candidates() if not candidate.reasons]
        say(f"{operation}, {width} bits: {len(found)} candidates")
        started = time.perf_counter()
        trial = Trial(operation, cases, configs.operations(document), device, say)
        refuse = partial(compilers.refuse, operation, width)
        chosen = trial.run(found, refuse, seconds / (len(units) - number))
        seconds -= time.perf_counter() - started
        for up_to, timing in chosen.items():
            kept = (
                "kept"
                if timing.config == trial.present[up_to]
                else f"{timing.ratio:.3f} of the {trial.reference(up_to)}"
            )
            say(f"  up_to {up_to}: {timing.config}, {kept}")
        if not chosen:
            say("  nothing chosen: no family was timed in every class and nowhere slower than at present")
            continue
        entries = merged(operation, document[operation][width], chosen, trial.alike)
        document = document | {operation: document[operation] | {width: entries}}
        # What serves short sequences is not searched: it goes with the configuration that it was made for.
        if not configs.keeps_bits(document["attention"][width], document["attention_short"][width]):
            say("  attention_short has no configuration any more: its bits would differ")
            document = document | {"attention_short": document["attention_short"] | {width: []}}
        document = provenance(device, document["source"]) | configs.operations(document)
        configs.write(document, path)
        del trial  # and with it the inputs


def list_candidates(operations: list[str], dtypes: list[str], models: list[str], target: str) -> None:
    """Print what survives the cut, an operation and dtype at a time, below the floors of the cases it would serve."""
    header = ("configuration", "registers", "shared bytes", "instruction", "CTAs per SM")
    with compilers(target) as workers:
        for operation, dtype in product(operations, dtypes):
            cases = cases_of(operation, models, [dtype])
            found = workers.cut(operation, [dtype], models)() if cases else []
            rows = [
                (" ".join(f"{key}={value}" for key, value in candidate.config.items() if key != "ctas_per_sm"),
                 candidate.registers, candidate.shared_bytes, candidate.matrix_instruction, candidate.ctas_per_sm)
                for candidate in found if not candidate.reasons
            ]  # fmt: skip
            say(f"## {operation}, {dtype}, {target}: {len(rows)} of {len(found)} candidates\n")
            for case in chain.from_iterable(cases.values()):
                say(f"- {case}: floor {case.work.seconds(dtype) * 1e6:.2f} us")
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
    parser.add_argument("--out", type=Path, help="the file to write, and to begin from where it exists")
    parser.add_argument("--seconds", type=float, default=900, help="for checks and timings (default: %(default)s)")
    parser.add_argument("--candidates", action="store_true", help="only list what would be timed: needs no GPU")
    parser.add_argument("--target", choices=list(CHIPS), help="the architecture for --candidates (default: sm_90)")
    options = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("nothing compiles in Triton's interpreter: unset TRITON_INTERPRET")
    operations = [operation for operation in OPERATIONS if operation in (options.op or OPERATIONS)]
    dtypes, models = options.dtype or ["bf16"], options.model or ["base", "minilm"]
    if options.candidates:
        list_candidates(operations, dtypes, models, options.target or "sm_90")
        return 0
    if not options.seconds > 0:
        parser.error(f"--seconds is {options.seconds:g}, it has to be positive")
    if options.target:
        parser.error("--target goes with --candidates: what is timed is compiled for the device that is here")
    if not torch.cuda.is_available():
        parser.error("no GPU to time candidates on; --candidates lists them without one")
    device = torch.device("cuda", torch.cuda.current_device())
    target = architecture(device)
    if target not in CHIPS:
        parser.error(f"what a multiprocessor of {target} holds is not known here, only of {', '.join(CHIPS)}")
    own = os.environ.get("FASTBERT_CONFIGS")
    path = options.out or (Path(own) if own else configs.path_of(torch.cuda.get_device_name(device)))
    begin = path if path.exists() else configs.shipped(configs.name_for(device))
    document = configs.check(configs.read(begin), begin)
    if "bits" in document and document["device"] != torch.cuda.get_device_name(device):
        parser.error(f"{begin} holds bits that were measured on another device, {document['device']}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        parser.error(f"cannot write {path}: {error}")
    if document.get("architecture", target) != target:
        parser.error(f"{begin} was measured on {document['architecture']}, this device is {target}")
    say(f"{torch.cuda.get_device_name(device)}: beginning from {begin}, writing {path}")
    with torch.inference_mode(), compilers(target) as workers:
        tune(path, document, operations, dtypes, models, options.seconds, workers, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
