"""Configurations of one operation on a device: right or wrong, their bits, their time beside the present ones.

All sizes of an operation and dtype have to give a row the same bits, so the choice is first one of families:
configurations whose results for the rows of a text are equal bit by bit, and which one file may hold. Attention and the
one-launch LayerNorm are chosen by the width of a row, which no batch changes: there all are one family, and each class
of sizes stands alone.

A time is the median over replays of a CUDA graph of many launches over inputs that outgrow the L2 cache; the present
configuration's replays alternate with them, and what counts is the ratio of the two.
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

from fastbert_kernels.configs import configured_by, reach, serving
from fastbert_kernels.tuning.candidates import CLASSES, Candidate, replaced, width_of
from fastbert_kernels.tuning.cases import FORMULAS, Case, around_a_text, bits_cases, drawn
from fastbert_kernels.tuning.report import DTYPES

# Several times the L2 cache, but of inputs of a few hundred kilobytes, whose calls are bound by their launch, no more
# than MOST_SETS.
ROTATION_BYTES, MOST_SETS, GRAPH_SECONDS, GRAPH_LAUNCHES = 2**28, 64, 1e-3, 200
# FINALISTS of each family and class, with each number of programs that they may have.
HEAT_ROUNDS, FINAL_ROUNDS, FINALISTS = 3, 15, 6


@dataclass(frozen=True)
class Timing:
    """A configuration's time as a ratio to the present one's, or to the floor where that does not launch: the geometric
    mean over cases of the median of rounds, and of the quantile that four of five rounds stay below; the medians in
    microseconds by case."""

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


def captured(given: list[Callable], turns: int) -> Callable:
    """The replay of a graph that makes these calls in so many turns."""
    for call in given:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in given:
                call()
    graph.replay()
    return graph.replay


def plain(config: dict) -> dict:
    """The configuration with the plain epilogue."""
    return config | {key: False for key in ("flatten", "halves", "store_descriptor") if key in config}


def suits(config: dict, up_to: int | None) -> bool:
    """Whether a configuration may win in a class of tokens: there are too many to heat all in every class.

    Tiles from 128 x 128 on leave most multiprocessors of a large GPU idle up to 128 tokens; up to 512, programs have
    too few tiles for their epilogues to matter; and beyond 1024 tokens, tiles below 64 x 64 read their operands too
    often.
    """
    tokens, tile = reach(up_to), config["BLOCK_M"] * config["BLOCK_N"]
    if config != plain(config):
        return tokens >= 1024
    return tokens > 128 if tile >= 128 * 128 else tokens <= 1024 or tile >= 64 * 64


def _shape(case: Case) -> tuple[int, int]:
    return case.batch_size, case.seq_len


def _fastest(results: list[tuple[Timing, Candidate]], configs: list[dict]) -> list[dict]:
    """The FINALISTS fastest of these configurations."""
    ranked = sorted(results, key=lambda result: result[0].ratio)
    return list(islice((candidate.config for _, candidate in ranked if candidate.config in configs), FINALISTS))


class Trial:
    """The trial of an operation's configurations for the classes of sizes that these cases belong to.

    table: the present configurations of all operations; say: takes a line for each one that is dropped, and for
    what no time was left for.
    """

    def __init__(
        self, operation: str, cases: dict[int | None, list[Case]], table: dict, device: torch.device,
        say: Callable[[str], None],
    ):  # fmt: skip
        self.operation, self.cases, self.table, self.device, self.say = operation, cases, table, device, say
        every = [case for of_class in cases.values() for case in of_class]
        self.width, self.alone = width_of(every[0].dtype), operation in CLASSES
        self.present = {up_to: self._present(up_to) for up_to in cases}
        self.families: list[tuple[tuple | None, list[Tensor], list[dict | None]]] = []
        self.dropped: list[dict | None] = []
        self._around_a_text = [list(around_a_text(case, device)) for case in bits_cases(operation, cases)]
        self._inputs: dict[Case, tuple[list[partial], Tensor, float]] = {}
        self._replays: dict[Case, tuple[Callable, int] | None] = {}

    def _present(self, up_to: int | None) -> dict | None:
        entry = serving(self.table[self.operation][self.width], up_to)
        return entry and entry["config"]

    def configured(self, config: dict | None):
        return configured_by(replaced(self.table, self.operation, self.width, config))

    def bits(self, config: dict | None) -> list[Tensor] | None:
        """The rows of a text at each place; None where they differ from batch to batch."""
        alone = []
        with self.configured(config):
            for batches in self._around_a_text:
                results = [call()[rows] for call, rows in batches]
                if not all(torch.equal(result, results[0]) for result in results):
                    return None
                alone.append(results[0])
        return alone

    def admit(self, config: dict | None) -> bool:
        """Whether a configuration runs at all and is batch invariant; it then belongs to a family."""
        if config in self.dropped:
            return False
        if any(config in configs for *_, configs in self.families):
            return True
        try:
            bits = self.bits(config)
        except TritonError as error:
            self.drop(config, f"{type(error).__name__}: {error}")
            return False
        if bits is None:
            self.drop(config, "a text's bits depend on its batch")
            return False
        # What `configs.check` asks of operations that are chosen by tokens, whatever bits were measured.
        blocks = None if self.alone else (config["BLOCK_M"] < 64, self.width == "32" and config["BLOCK_K"])
        for others, other_bits, configs in self.families:
            if others == blocks and (self.alone or all(map(torch.equal, other_bits, bits))):
                configs.append(config)
                return True
        self.families.append((blocks, bits, [config]))
        return True

    def alike(self, one: dict | None, other: dict | None) -> bool:
        """Whether one file may hold both."""
        return self.alone or any(one in configs and other in configs for *_, configs in self.families)

    def drop(self, config: dict | None, reason: str) -> None:
        """Take a configuration out of the trial, for good."""
        self.say(f"dropped {config}: {reason}")
        self.dropped.append(config)
        for *_, configs in self.families:
            if config in configs:
                configs.remove(config)

    def inputs(self, case: Case) -> tuple[list[partial], Tensor, float]:
        """Calls with inputs that together outgrow the L2 cache or are MOST_SETS, what the first should give, and its
        largest error: twice that of plain PyTorch in the same dtype, and of the largest value one rounding and four of
        float32, as much as a product of three TF32 products may be off."""
        if case not in self._inputs:
            sets = min(MOST_SETS, max(2, round(ROTATION_BYTES / case.work.bytes)))
            given = [drawn(case, self.device, seed) for seed in range(sets)]
            formula = FORMULAS[given[0].func.__name__]
            exact = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given[0].args)
            truth = formula(*exact)
            error = (formula(*given[0].args) - truth).abs().max().item()
            # The rule of `fastbert.testing`, which is not imported here: a test in test_tune.py holds the two equal.
            floor = torch.finfo(DTYPES[case.dtype]).eps + 4 * torch.finfo(torch.float32).eps
            limit = 2 * error + floor * truth.abs().max().item()
            self._inputs[case] = given, truth, limit
        return self._inputs[case]

    def wrong(self, config: dict | None, case: Case) -> str | None:
        """What is wrong with a configuration's result."""
        given, truth, limit = self.inputs(case)
        # The allocator gives this memory to the output next: what is not written stays NaN.
        torch.full_like(truth, float("nan"), dtype=DTYPES[case.dtype])
        with self.configured(config):
            error = (given[0]() - truth).abs().max().item()
        return None if error <= limit else f"error {error:.2e} above {limit:.2e} in {case}"

    def replay(self, config: dict | None, case: Case) -> tuple[Callable, int]:
        """A graph's replay, and how many launches it makes: of every configuration as many, by the case's floor."""
        given = self.inputs(case)[0]
        launches = min(GRAPH_LAUNCHES, GRAPH_SECONDS / case.work.seconds(case.dtype))
        turns = max(1, round(launches / len(given)))
        with self.configured(config):
            return captured(given, turns), turns * len(given)

    def _present_replay(self, up_to: int | None, case: Case) -> tuple[Callable, int] | None:
        """The present configuration's replay; None where it does not launch."""
        if case not in self._replays:
            try:
                self._replays[case] = self.replay(self.present[up_to], case)
            except TritonError as error:
                self.drop(self.present[up_to], f"{type(error).__name__}: {error}")
                self._replays[case] = None
        return self._replays[case]

    def reference(self, up_to: int | None) -> str:
        """What times of a class are ratios to."""
        unlaunched = any(self._present_replay(up_to, case) is None for case in self.cases[up_to])
        return "floor" if unlaunched else "present time"

    def timing(self, config: dict | None, up_to: int | None, cases: list[Case], rounds: int) -> Timing | None:
        """The configuration's time in these cases of a class; None, and dropped, where a result is wrong."""
        medians, uppers, measured_us = [], [], {}
        for case in cases:
            if problem := self.wrong(config, case):
                self.drop(config, problem)
                return None
            candidate = self.replay(config, case)
            present = self._present_replay(up_to, case)
            floor = case.work.seconds(case.dtype)
            seconds = [
                [replay and event_seconds(replay[0]) / replay[1] for replay in (present, candidate)]
                for _ in range(rounds)
            ]
            ratios = [ours / (theirs or floor) for theirs, ours in seconds]
            medians.append(statistics.median(ratios))
            uppers.append(statistics.quantiles(ratios, n=5, method="inclusive")[-1])
            measured_us[str(case)] = round(1e6 * statistics.median(ours for _, ours in seconds), 2)
        return Timing(config, statistics.geometric_mean(medians), statistics.geometric_mean(uppers), measured_us)

    def run(
        self, candidates: list[Candidate], refuse: Callable[[dict, int | None], list[str]], seconds: float
    ) -> dict[int | None, Timing]:
        """The choice for each class, by heats in its largest cases and finals in all of them, for about so many
        seconds.

        refuse: reasons why a chosen configuration may not serve its class after all.
        """
        started = time.perf_counter()
        # Also what serves sizes between two classes: whether it may stay depends on its bits.
        for entry in [] if self.alone else self.table[self.operation][self.width]:
            self.admit(entry["config"])
        heats = self._heats(candidates, started + 0.6 * seconds)
        timings = self._finals(heats, started + seconds)
        while True:
            chosen = self.choose(timings)
            refused = {
                up_to: reasons
                for up_to, timing in chosen.items()
                if timing.config not in (None, self.present[up_to]) and (reasons := refuse(timing.config, up_to))
            }
            if not refused:
                return chosen
            for up_to, reasons in refused.items():
                # Another number of programs is the same code.
                code = chosen[up_to].config | {"ctas_per_sm": 1}
                alike = [config for *_, configs in self.families for config in configs if config]
                for config in (config for config in alike if config | {"ctas_per_sm": 1} == code):
                    self.drop(config, "; ".join(reasons))

    def _heats(self, candidates: list[Candidate], end: float) -> dict[int | None, list[tuple[Timing, Candidate]]]:
        """Timings in the largest cases of the classes that a configuration suits; another epilogue is heated only where
        its configuration with the plain one, if that is a candidate, is among the FINALISTS fastest."""
        heats = {up_to: [] for up_to in self.cases}
        every = [candidate.config for candidate in candidates]
        first = [config for config in every if config == plain(config) or plain(config) not in every]
        # Where time runs out, it has been spent on all kinds of them.
        mixed = random.Random(0).sample(candidates, len(candidates))
        mixed.sort(key=lambda candidate: candidate.config not in first)
        for number, candidate in enumerate(mixed):
            config = candidate.variants()[0]
            if time.perf_counter() > end:
                self.say(f"no time for more than {number} of {len(candidates)} candidates")
                break
            classes = [up_to for up_to in self.cases if self.alone or suits(config, up_to)]
            if candidate.config not in first:
                classes = [up_to for up_to in classes if plain(candidate.config) in _fastest(heats[up_to], first)]
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
        """The timings of each class in all of its cases, the present configuration's first."""
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
            # The fastest first, of whatever family: where time runs out, the others have not lost much.
            finalists = sorted(chain.from_iterable(of_families), key=lambda result: result[0].ratio)
            entrants = [config for _, candidate in finalists for config in candidate.variants()]
            # Two launches in the place of one need no configuration, and always get their time.
            for config in [None, *entrants] if self.operation == "linear_residual_layer_norm" else entrants:
                if config == self.present[up_to]:
                    continue
                if config is not None and time.perf_counter() > stop:
                    self.say(f"no time for {config}, up_to {up_to}")
                elif self.admit(config) and (timing := self.timing(config, up_to, self.cases[up_to], FINAL_ROUNDS)):
                    timings[up_to].append(timing)
        return timings

    def choose(self, timings: dict[int | None, list[Timing]]) -> dict[int | None, Timing]:
        """For each class a configuration that is not slower than the present one, all of the family that is fastest
        over all classes; instead of the present ones only what is faster by more than the spread. Nothing where no
        family has such a configuration for each class."""
        chosen = {}
        for group in [[up_to] for up_to in timings] if self.alone else [list(timings)]:
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
        """The fastest, or the present configuration where that is as fast within the spread. One that was dropped is no
        measure: it does not launch, so that ratios are to the floor, or is wrong."""
        present = next((timing for timing in of_family if timing.config == self.present[up_to]), None)
        fastest = min(of_family, key=lambda timing: timing.ratio, default=None)
        if present and fastest.upper >= 1:
            return present
        return fastest if fastest and (fastest.ratio <= 1 or self.present[up_to] in self.dropped) else None
