"""Check and time the candidate configurations of one operation on the device.

A row's result must not depend on the number of tokens in the batch, so the configurations of all classes of sizes must
give bitwise equal rows. Configurations that do, and that one file may hold together, form a family, and the tuner
chooses a family first. Attention and the one-launch LayerNorm are configured by the head size or the row width, which
the batch does not change: all their configurations are one family, and each class is decided alone.

A time is the median over replays of a CUDA graph with many launches, whose inputs exceed the L2 cache. Replays of the
candidate and of the present configuration alternate, and the ratio of their times decides.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from operator import itemgetter

import torch
from torch import Tensor
from triton.errors import TritonError

from fastbert_kernels.configs import configured_by, entry_for, limit_of
from fastbert_kernels.tuning.candidates import CLASSES, Candidate, width_of, with_config
from fastbert_kernels.tuning.cases import FORMULAS, Case, invariance_cases, random_call, sequence_in_batches
from fastbert_kernels.tuning.report import DTYPES

# Inputs rotate through several times the L2 cache. Small ones stop at MAX_SETS: their calls are bound by the launch.
ROTATION_BYTES, MAX_SETS, GRAPH_SECONDS, GRAPH_LAUNCHES = 2**28, 64, 1e-3, 200
# The finals take FINALISTS of each family and class, each with every number of CTAs per SM worth a trial.
HEAT_ROUNDS, FINAL_ROUNDS, FINALISTS = 3, 15, 6


@dataclass(frozen=True)
class Timing:
    """The time of a configuration relative to the present one, or to the roofline if the present one does not launch.

    ratio and upper: geometric means over cases of the median and of the 80th percentile of the rounds' ratios.
    measured_us: the median time of each case in microseconds.
    """

    config: dict | None
    ratio: float
    upper: float
    measured_us: dict[str, float]


def event_seconds(call: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(calls: list[Callable], repeats: int) -> Callable:
    """Capture a CUDA graph that makes all calls in order, repeats times. Return its replay function."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    return graph.replay


def with_plain_epilogue(config: dict) -> dict:
    """Return the configuration with every option of the epilogue off."""
    return config | {key: False for key in ("flatten", "halves", "store_descriptor") if key in config}


def worth_timing(config: dict, up_to: int | None) -> bool:
    """Return True if a configuration could win in a class of token counts. There are too many to time all everywhere.

    Tiles of 128 x 128 and more leave most SMs of a large GPU idle up to 128 tokens. Up to 512 tokens a program has too
    few tiles for its epilogue to matter. Above 1024 tokens, tiles below 64 x 64 read their operands too often.
    """
    tokens, tile = limit_of(up_to), config["BLOCK_M"] * config["BLOCK_N"]
    if config != with_plain_epilogue(config):
        return tokens >= 1024
    return tokens > 128 if tile >= 128 * 128 else tokens <= 1024 or tile >= 64 * 64


def _shape(case: Case) -> tuple[int, int]:
    return case.batch_size, case.seq_len


def _fastest(results: list[tuple[Timing, Candidate]], configs: list[dict]) -> list[dict]:
    """Return the FINALISTS fastest among these configurations."""
    ranked = sorted(results, key=lambda result: result[0].ratio)
    return list(islice((candidate.config for _, candidate in ranked if candidate.config in configs), FINALISTS))


class Trial:
    """The trial of one operation's configurations in the size classes of the given cases.

    table: the present configurations of all operations. say: prints a line for each configuration that is dropped and
    for each one that there was no time to try.
    """

    def __init__(
        self, operation: str, cases: dict[int | None, list[Case]], table: dict, device: torch.device,
        say: Callable[[str], None],
    ):  # fmt: skip
        self.operation, self.cases, self.table, self.device, self.say = operation, cases, table, device, say
        every = [case for of_class in cases.values() for case in of_class]
        self.width, self.single_family = width_of(every[0].dtype), operation in CLASSES
        self.present = {up_to: self._present(up_to) for up_to in cases}
        self.families: list[tuple[tuple | None, list[Tensor], list[dict | None]]] = []
        self.dropped: list[dict | None] = []
        self._sequence_calls = [list(sequence_in_batches(case, device)) for case in invariance_cases(operation, cases)]
        self._inputs: dict[Case, tuple[list[partial], Tensor, float]] = {}
        self._replays: dict[Case, tuple[Callable, int] | None] = {}

    def _present(self, up_to: int | None) -> dict | None:
        entry = entry_for(self.table[self.operation][self.width], up_to)
        return entry and entry["config"]

    def configured(self, config: dict | None):
        return configured_by(with_config(self.table, self.operation, self.width, config))

    def sequence_rows(self, config: dict | None) -> list[Tensor] | None:
        """Return the output rows of one sequence for each invariance case, or None if they depend on the batch."""
        alone = []
        with self.configured(config):
            for batches in self._sequence_calls:
                results = [call()[rows] for call, rows in batches]
                if not all(torch.equal(result, results[0]) for result in results):
                    return None
                alone.append(results[0])
        return alone

    def admit(self, config: dict | None) -> bool:
        """Return True if a configuration launches and is batch invariant, and put it into its family."""
        if config in self.dropped:
            return False
        if any(config in configs for *_, configs in self.families):
            return True
        try:
            rows = self.sequence_rows(config)
        except TritonError as error:
            self.drop(config, f"{type(error).__name__}: {error}")
            return False
        if rows is None:
            self.drop(config, "the results of a sequence depend on its batch")
            return False
        # One file may not mix these, even if the rows are equal: see `configs.check`.
        blocks = None if self.single_family else (config["BLOCK_M"] < 64, self.width == "32" and config["BLOCK_K"])
        for other_blocks, other_rows, configs in self.families:
            if other_blocks == blocks and (self.single_family or all(map(torch.equal, other_rows, rows))):
                configs.append(config)
                return True
        self.families.append((blocks, rows, [config]))
        return True

    def same_family(self, one: dict | None, other: dict | None) -> bool:
        """Return True if one file may hold both configurations."""
        return self.single_family or any(one in configs and other in configs for *_, configs in self.families)

    def drop(self, config: dict | None, reason: str) -> None:
        """Remove a configuration from the trial and print the reason."""
        self.say(f"dropped {config}: {reason}")
        self.dropped.append(config)
        for *_, configs in self.families:
            if config in configs:
                configs.remove(config)

    def inputs(self, case: Case) -> tuple[list[partial], Tensor, float]:
        """Return calls with rotating inputs, the float64 result of the first call, and the largest error allowed in it.

        The limit is twice the error of plain PyTorch in the same dtype, plus one rounding of the dtype and four of
        float32 (the error of a product made of three TF32 products), both relative to the largest value.
        """
        if case not in self._inputs:
            sets = min(MAX_SETS, max(2, round(ROTATION_BYTES / case.work.bytes)))
            given = [random_call(case, self.device, seed) for seed in range(sets)]
            formula = FORMULAS[given[0].func.__name__]
            exact = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given[0].args)
            truth = formula(*exact)
            error = (formula(*given[0].args) - truth).abs().max().item()
            # The rule of `fastbert.testing`, which kernels may not import. A test in test_tune.py compares the two.
            roundings = torch.finfo(DTYPES[case.dtype]).eps + 4 * torch.finfo(torch.float32).eps
            limit = 2 * error + roundings * truth.abs().max().item()
            self._inputs[case] = given, truth, limit
        return self._inputs[case]

    def why_wrong(self, config: dict | None, case: Case) -> str | None:
        """Return why a configuration's result is wrong, or None if its error is within the limit."""
        given, truth, limit = self.inputs(case)
        # The allocator reuses this memory for the output, so elements that the kernel does not write are NaN.
        torch.full_like(truth, float("nan"), dtype=DTYPES[case.dtype])
        with self.configured(config):
            error = (given[0]() - truth).abs().max().item()
        return None if error <= limit else f"error {error:.2e} above {limit:.2e} in {case}"

    def replay(self, config: dict | None, case: Case) -> tuple[Callable, int]:
        """Return a graph's replay function and its number of launches, which is the same for every configuration."""
        calls = self.inputs(case)[0]
        launches = min(GRAPH_LAUNCHES, GRAPH_SECONDS / case.work.seconds(case.dtype))
        repeats = max(1, round(launches / len(calls)))
        with self.configured(config):
            return capture(calls, repeats), repeats * len(calls)

    def _present_replay(self, up_to: int | None, case: Case) -> tuple[Callable, int] | None:
        """Return `replay` of the present configuration, or None if it does not launch."""
        if case not in self._replays:
            try:
                self._replays[case] = self.replay(self.present[up_to], case)
            except TritonError as error:
                self.drop(self.present[up_to], f"{type(error).__name__}: {error}")
                self._replays[case] = None
        return self._replays[case]

    def reference(self, up_to: int | None) -> str:
        """Return the name of the time that the ratios of a class are relative to."""
        unlaunched = any(self._present_replay(up_to, case) is None for case in self.cases[up_to])
        return "roofline time" if unlaunched else "present time"

    def timing(self, config: dict | None, up_to: int | None, cases: list[Case], rounds: int) -> Timing | None:
        """Time a configuration in these cases of a class. Drop it and return None if a result is wrong."""
        medians, uppers, measured_us = [], [], {}
        for case in cases:
            if problem := self.why_wrong(config, case):
                self.drop(config, problem)
                return None
            candidate = self.replay(config, case)
            present = self._present_replay(up_to, case)
            roofline = case.work.seconds(case.dtype)
            seconds = [
                [replay and event_seconds(replay[0]) / replay[1] for replay in (present, candidate)]
                for _ in range(rounds)
            ]
            ratios = [ours / (theirs or roofline) for theirs, ours in seconds]
            medians.append(statistics.median(ratios))
            uppers.append(statistics.quantiles(ratios, n=5, method="inclusive")[-1])
            measured_us[str(case)] = round(1e6 * statistics.median(ours for _, ours in seconds), 2)
        return Timing(config, statistics.geometric_mean(medians), statistics.geometric_mean(uppers), measured_us)

    def run(
        self, candidates: list[Candidate], report_failures: Callable[[dict, int | None], list[str]], seconds: float
    ) -> dict[int | None, Timing]:
        """Choose a configuration for each class within about this many seconds.

        Heats time the candidates in the largest cases of a class, finals time the fastest in all of them.
        report_failures: returns the reasons why the report rejects a configuration for a class.
        """
        started = time.perf_counter()
        # Entries for sizes between two classes may stay only if they are of the chosen family.
        for entry in [] if self.single_family else self.table[self.operation][self.width]:
            self.admit(entry["config"])
        heats = self._heats(candidates, started + 0.6 * seconds)
        timings = self._finals(heats, started + seconds)
        while True:
            chosen = self.choose(timings)
            failed = {
                up_to: reasons
                for up_to, timing in chosen.items()
                if timing.config not in (None, self.present[up_to])
                and (reasons := report_failures(timing.config, up_to))
            }
            if not failed:
                return chosen
            for up_to, reasons in failed.items():
                # The number of CTAs per SM does not change the code, so all of these fail alike.
                code = chosen[up_to].config | {"ctas_per_sm": 1}
                admitted = [config for *_, configs in self.families for config in configs if config]
                for config in (config for config in admitted if config | {"ctas_per_sm": 1} == code):
                    self.drop(config, "; ".join(reasons))

    def _heats(self, candidates: list[Candidate], end: float) -> dict[int | None, list[tuple[Timing, Candidate]]]:
        """Time each candidate in the largest cases of the classes in which it could win.

        A tile is timed with its plain epilogue first. Its other epilogues follow in the classes where that one is among
        the FINALISTS fastest.
        """
        heats = {up_to: [] for up_to in self.cases}
        every = [candidate.config for candidate in candidates]
        first = [
            config
            for config in every
            if config == with_plain_epilogue(config) or with_plain_epilogue(config) not in every
        ]
        # In random order, so that candidates of all kinds have been timed when time runs out.
        mixed = random.Random(0).sample(candidates, len(candidates))
        mixed.sort(key=lambda candidate: candidate.config not in first)
        for number, candidate in enumerate(mixed):
            config = candidate.variants()[0]
            if time.perf_counter() > end:
                self.say(f"no time for more than {number} of {len(candidates)} candidates")
                break
            classes = [up_to for up_to in self.cases if self.single_family or worth_timing(config, up_to)]
            if candidate.config not in first:
                plain = with_plain_epilogue(candidate.config)
                classes = [up_to for up_to in classes if plain in _fastest(heats[up_to], first)]
            if not classes or not self.admit(config):
                continue
            for up_to in classes:
                cases = self.cases[up_to]
                largest = [case for case in cases if _shape(case) == _shape(cases[-1])]
                timing = self.timing(config, up_to, largest, HEAT_ROUNDS)
                if timing is None:
                    break
                heats[up_to].append((timing, candidate))
        return heats

    def _finals(self, heats: dict[int | None, list[tuple[Timing, Candidate]]], end: float) -> dict:
        """Time the finalists of each class in all of its cases, after the present configuration."""
        timings = {up_to: [] for up_to in self.cases}
        for up_to, config in self.present.items():
            timing = self.timing(config, up_to, self.cases[up_to], FINAL_ROUNDS) if self.admit(config) else None
            if timing:
                timings[up_to].append(replace(timing, ratio=1.0, upper=1.0))
        for number, (up_to, results) in enumerate(heats.items()):
            now = time.perf_counter()
            stop = now + (end - now) / (len(heats) - number)
            results.sort(key=lambda result: result[0].ratio)
            of_families = ([r for r in results if r[0].config in configs][:FINALISTS] for *_, configs in self.families)
            # The fastest of any family go first: those left when time runs out were unlikely to win.
            finalists = sorted(chain.from_iterable(of_families), key=lambda result: result[0].ratio)
            entrants = [config for _, candidate in finalists for config in candidate.variants()]
            # None stands for two launches instead of one. It is always timed, even if time has run out.
            for config in [None, *entrants] if self.operation == "linear_residual_layer_norm" else entrants:
                if config == self.present[up_to]:
                    continue
                if config is not None and time.perf_counter() > stop:
                    self.say(f"no time for {config}, up_to {up_to}")
                elif self.admit(config) and (timing := self.timing(config, up_to, self.cases[up_to], FINAL_ROUNDS)):
                    timings[up_to].append(timing)
        return timings

    def choose(self, timings: dict[int | None, list[Timing]]) -> dict[int | None, Timing]:
        """Choose a configuration for each class, all from the family that is fastest over all classes.

        No class may get slower, and a family replaces the present one only if it is faster by more than the spread.
        Returns nothing for classes for which no family has such configurations.
        """
        chosen = {}
        for group in [[up_to] for up_to in timings] if self.single_family else [list(timings)]:
            offers = []
            for *_, configs in self.families:
                picks = {
                    up_to: self._pick(up_to, [x for x in timings[up_to] if x.config in configs]) for up_to in group
                }
                if all(picks.values()):
                    of = "ratio" if all(self.present[up_to] in configs for up_to in group) else "upper"
                    mean = statistics.geometric_mean(getattr(timing, of) for timing in picks.values())
                    offers.append((mean, picks))
            if offers:
                chosen |= min(offers, key=itemgetter(0))[1]
        return chosen

    def _pick(self, up_to: int | None, of_family: list[Timing]) -> Timing | None:
        """Return the fastest timing of a family, or the present configuration's if that is as fast within the spread.

        Returns None if the fastest is slower than the present configuration, unless that was dropped: it is wrong, or
        it does not launch and ratios are relative to the roofline.
        """
        present = next((timing for timing in of_family if timing.config == self.present[up_to]), None)
        fastest = min(of_family, key=lambda timing: timing.ratio, default=None)
        if present and fastest.upper >= 1:
            return present
        return fastest if fastest and (fastest.ratio <= 1 or self.present[up_to] in self.dropped) else None
