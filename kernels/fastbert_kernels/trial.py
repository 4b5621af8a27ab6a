"""Configurations of one operation on a device: right or wrong, their bits, their time beside the present ones.

All sizes of an operation and dtype have to give a row the same bits, so the choice is first one of families:
configurations with one BLOCK_K whose results for the rows of a text are equal bit by bit. Attention and the one-launch
LayerNorm are chosen by the width of a row, which no batch changes: there each class of sizes stands alone.

A time is the median over replays of a CUDA graph of many launches over inputs that outgrow the L2 cache; the present
configuration's replays alternate with them, and what counts is the ratio of the two.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.errors import TritonError

from fastbert_kernels.candidates import ALL_MODELS, CLASSES, TOKEN_CLASSES, Candidate, replaced, size_of, width_of
from fastbert_kernels.launch import configured_by
from fastbert_kernels.report import DTYPES, SHAPES, calls
from fastbert_kernels.roofline import Work, work

# The places in a model's layer at which an operation is timed.
PLACES = {
    "qkv_projection": ("qkv_projection",),
    "linear_activation": ("linear_activation",),
    "linear_residual": ("attention_output", "feed_forward_output"),
    "linear_residual_layer_norm": ("attention_output", "feed_forward_output"),
    "attention": ("attention",),
}
# Of each launcher, the arguments with a row for each token.
ROWS = {"linear_residual_layer_norm": (0, 3)}
# A text of so many tokens, the sixth of nine: it begins at an odd row, and the batch ends past 1024.
TEXT_LEN, TEXT, TEXTS = 137, 5, 9
ROTATION_BYTES, GRAPH_SECONDS, GRAPH_LAUNCHES = 2**28, 1e-3, 200
# FINALISTS of each family and class, with each number of programs that they may have.
HEAT_ROUNDS, FINAL_ROUNDS, FINALISTS = 3, 15, 3


@dataclass(frozen=True)
class Case:
    """One launch in a model's layer, on a full batch [B, S]."""

    place: str
    model: str
    batch_size: int
    seq_len: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.model} {self.batch_size}x{self.seq_len} {self.place} {self.dtype}"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def work(self) -> Work:
        model, itemsize = ALL_MODELS[self.model], DTYPES[self.dtype].itemsize
        return work(self.place, model, self.batch_size, self.seq_len, itemsize)


@dataclass(frozen=True)
class Timing:
    """A configuration's time as a ratio to the present one's: the geometric mean over cases of the median of rounds,
    and of the quantile that four of five rounds stay below; the medians in microseconds by case."""

    config: dict | None
    ratio: float
    upper: float
    measured_us: dict[str, float]


def cases_of(operation: str, models: Iterable[str], dtypes: Iterable[str]) -> dict[int | None, list[Case]]:
    """The cases of each class of sizes that has any, by its `up_to`, in the order of their tokens."""
    found, below = {}, 0
    every = [
        Case(place, model, *shape, dtype)
        for shape, dtype, model, place in product(sorted(SHAPES, key=math.prod), dtypes, models, PLACES[operation])
    ]
    for up_to in CLASSES.get(operation, TOKEN_CLASSES):
        reached = math.inf if up_to is None else up_to
        found[up_to] = [
            case for case in every if below < size_of(operation, ALL_MODELS[case.model], case.tokens) <= reached
        ]
        below = reached
    return {up_to: cases for up_to, cases in found.items() if cases}


def _linear_residual_layer_norm(x, weight, bias, residual, norm_weight, norm_bias, eps, _):
    return F.layer_norm(F.linear(x, weight, bias) + residual, norm_weight.shape, norm_weight, norm_bias, eps)


def _qkv_projection(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, num_heads, _):
    parts = F.linear(x, q_weight, q_bias), F.linear(x, k_weight, k_bias), F.linear(x, v_weight, v_bias)
    return torch.stack(parts, 1).unflatten(2, (num_heads, -1))


def _attention(qkv, cu_seqlens, max_seqlen, scale):
    q, k, v = qkv.unflatten(0, (-1, max_seqlen)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(len(qkv), -1)


# Of full batches, in plain PyTorch.
FORMULAS = {
    "qkv_projection": _qkv_projection,
    "linear_activation": lambda x, weight, bias, activation, _: F.gelu(F.linear(x, weight, bias)),
    "linear_residual_layer_norm": _linear_residual_layer_norm,
    "attention": _attention,
}


def drawn(case: Case, device: torch.device, seed: int) -> partial:
    """The launcher's call of a case with random values, products of which are of the order of 1."""
    generator = torch.Generator(device).manual_seed(seed)
    bounds = torch.arange(0, case.tokens + 1, case.seq_len, dtype=torch.int32, device=device)

    def fill(x):
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():  # num_tokens or cu_seqlens
            return bounds[-1:] if x.numel() == 1 else bounds
        values = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device)
        return values * x.shape[1] ** -0.25 if x.ndim == 2 else values

    every = calls(ALL_MODELS[case.model], case.batch_size, case.seq_len, DTYPES[case.dtype])
    call = next(call for place, _, call in every if place == case.place)
    return partial(call.func, *map(fill, call.args))


def around_a_text(case: Case, device: torch.device) -> Iterator[tuple[partial, slice]]:
    """Calls of the case's place on batches around one text, and where its rows are: alone first."""
    whole = drawn(Case(case.place, case.model, TEXTS, TEXT_LEN, case.dtype), device, 0)
    rows = ROWS.get(whole.func.__name__, (0,))
    for first, last in ((TEXT, TEXT + 1), (TEXT - 2, TEXT + 2), (0, TEXTS)):
        part = drawn(Case(case.place, case.model, last - first, TEXT_LEN, case.dtype), device, 0)
        arguments = [
            x[first * TEXT_LEN : last * TEXT_LEN] if index in rows
            else x if isinstance(x, Tensor) and x.is_floating_point() else part.args[index]
            for index, x in enumerate(whole.args)
        ]  # fmt: skip
        start = (TEXT - first) * TEXT_LEN
        yield partial(whole.func, *arguments), slice(start, start + TEXT_LEN)


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


class Trial:
    """The trial of an operation's configurations for the classes of sizes that these cases belong to.

    table: the present configurations of all operations; say: takes a line for each one that is dropped.
    """

    def __init__(
        self, operation: str, cases: dict[int | None, list[Case]], table: dict, device: torch.device,
        say: Callable[[str], None],
    ):  # fmt: skip
        self.operation, self.cases, self.table, self.device, self.say = operation, cases, table, device, say
        every = [case for of_class in cases.values() for case in of_class]
        self.width = width_of(every[0].dtype)
        self.present = {up_to: self._present(up_to) for up_to in cases}
        self.families: list[tuple[int | None, list[Tensor], list[dict | None]]] = []
        self.dropped: list[dict | None] = []
        places = {(case.place, case.model, case.dtype): case for case in every}.values()
        self._around_a_text = [list(around_a_text(case, device)) for case in places]
        self._inputs: dict[Case, tuple[list[partial], Tensor, float]] = {}
        self._replays: dict[Case, tuple[Callable, int]] = {}

    def _present(self, up_to: int | None) -> dict | None:
        for entry in self.table[self.operation][self.width]:
            if entry["up_to"] is None or (up_to is not None and up_to <= entry["up_to"]):
                return entry["config"]
        return None

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
        inner = config and config.get("BLOCK_K")
        for block_k, others, configs in self.families:
            if block_k == inner and all(map(torch.equal, others, bits)):
                configs.append(config)
                return True
        self.families.append((inner, bits, [config]))
        return True

    def drop(self, config: dict | None, reason: str) -> None:
        """Take a configuration out of the trial, for good."""
        self.say(f"dropped {config}: {reason}")
        self.dropped.append(config)
        for *_, configs in self.families:
            if config in configs:
                configs.remove(config)

    def inputs(self, case: Case) -> tuple[list[partial], Tensor, float]:
        """Calls with inputs that together outgrow the L2 cache, what the first one should give, and its largest error:
        twice that of plain PyTorch in the same dtype, and one rounding of the largest value."""
        if case not in self._inputs:
            sets = min(8, max(2, round(ROTATION_BYTES / case.work.bytes)))
            given = [drawn(case, self.device, seed) for seed in range(sets)]
            formula = FORMULAS[given[0].func.__name__]
            exact = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given[0].args)
            truth = formula(*exact)
            error = (formula(*given[0].args) - truth).abs().max().item()
            limit = 2 * error + torch.finfo(DTYPES[case.dtype]).eps * truth.abs().max().item()
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

    def timing(self, config: dict | None, up_to: int | None, cases: list[Case], rounds: int) -> Timing | None:
        """The configuration's time in these cases of a class; None, and dropped, where a result is wrong."""
        medians, uppers, measured_us = [], [], {}
        for case in cases:
            if problem := self.wrong(config, case):
                self.drop(config, problem)
                return None
            if case not in self._replays:
                self._replays[case] = self.replay(self.present[up_to], case)
            present, candidate = self._replays[case], self.replay(config, case)
            seconds = [[event_seconds(replay) / count for replay, count in (present, candidate)] for _ in range(rounds)]
            ratios = [ours / theirs for theirs, ours in seconds]
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
                code = chosen[up_to].config | {"programs": 1}
                alike = [config for *_, configs in self.families for config in configs if config]
                for config in (config for config in alike if config | {"programs": 1} == code):
                    self.drop(config, "; ".join(reasons))

    def _heats(self, candidates: list[Candidate], end: float) -> dict[int | None, list[tuple[Timing, Candidate]]]:
        heats = {up_to: [] for up_to in self.cases}
        # Where time runs out, it has been spent on all kinds of them.
        for candidate in random.Random(0).sample(candidates, len(candidates)):
            config = candidate.variants()[0]
            if time.perf_counter() > end:
                break
            if not self.admit(config):
                continue
            for up_to, cases in self.cases.items():
                largest = [case for case in cases if case.tokens == cases[-1].tokens]
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
            # Two launches in the place of one need no configuration.
            for config in [None, *entrants] if self.operation == "linear_residual_layer_norm" else entrants:
                if config == self.present[up_to]:
                    continue
                if time.perf_counter() > stop:
                    break
                if self.admit(config) and (timing := self.timing(config, up_to, self.cases[up_to], FINAL_ROUNDS)):
                    timings[up_to].append(timing)
        return timings

    def choose(self, timings: dict[int | None, list[Timing]]) -> dict[int | None, Timing]:
        """For each class the fastest of the family that is fastest over all classes: instead of the present only what
        is faster by more than the spread. Nothing where no family has a configuration for each class."""
        alone = self.operation in CLASSES
        chosen = {}
        for group in [[up_to] for up_to in timings] if alone else [list(timings)]:
            offers = []
            for *_, configs in self.families:
                picks = {}
                for up_to in group:
                    of_family = [timing for timing in timings[up_to] if timing.config in configs]
                    if not of_family:
                        break
                    present = next((timing for timing in of_family if timing.config == self.present[up_to]), None)
                    fastest = min(of_family, key=lambda timing: timing.ratio)
                    picks[up_to] = present if present and fastest.upper >= 1 else fastest
                else:
                    offers.append(picks)
            if offers:
                chosen |= self._fastest(offers)
        return chosen

    def _fastest(self, offers: list[dict[int | None, Timing]]) -> dict[int | None, Timing]:
        def mean(offer: dict[int | None, Timing], of: str) -> float:
            return statistics.geometric_mean(getattr(timing, of) for timing in offer.values())

        fastest = min(offers, key=lambda offer: mean(offer, "ratio"))
        for offer in offers:
            own = next(configs for *_, configs in self.families if next(iter(offer.values())).config in configs)
            if all(self.present[up_to] in own for up_to in offer) and mean(fastest, "upper") >= mean(offer, "ratio"):
                return offer
        return fastest
