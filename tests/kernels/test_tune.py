"""The tuner on toy sizes with made-up times, the filter of its candidates with the compiler, the rules for files."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from types import SimpleNamespace

import pytest
import torch
import triton
from kernel_cases import DEVICE, MARKS, TABLES, normal
from torch import Tensor

from fastbert.testing import OP_FACTOR, closeness, limit
from fastbert_kernels import configs, launch, linear_activation, target
from fastbert_kernels.launch import launching_by, run
from fastbert_kernels.tuning import cases, report, trial, tune
from fastbert_kernels.tuning.ahead_of_time import CHIPS
from fastbert_kernels.tuning.candidates import ALL_MODELS, TOKEN_CLASSES, Candidate, grid
from fastbert_kernels.tuning.cases import cases_of, invariance_cases
from fastbert_kernels.tuning.roofline import Model
from fastbert_kernels.tuning.trial import Timing, Trial

OPERATION = "linear_activation"
PRESENT = {
    "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3, "ctas_per_sm": 2,
    "descriptors": False, "flatten": False, "halves": False, "store_descriptor": False,
}  # fmt: skip
TABLE = TABLES["sm_90"] | {OPERATION: {"16": [], "32": [{"up_to": None, "config": PRESENT}]}}
# The planted bugs by number of stages, which does not change results by itself.
FINE, BATCH_DEPENDENT, OTHER_ROUNDING, WRONG = 2, 1, 4, 5


def candidate(**config) -> Candidate:
    return Candidate(PRESENT | config, 0, 0, "HGMMA", 2, [])


def planted(kernel, grid, arguments):
    run(kernel, grid, arguments)
    out, stages = arguments["out" if "out" in arguments else "out_ptr"], arguments.get("num_stages")
    if stages == OTHER_ROUNDING or (stages == BATCH_DEPENDENT and len(out) > 150):
        out.copy_(out.nextafter(torch.full_like(out, float("inf"))))
    elif stages == WRONG:
        out.mul_(1.01)


@pytest.fixture
def times(monkeypatch):
    """Toy cases of two classes. A test sets `of`, the time of a configuration at a number of tokens."""
    monkeypatch.setitem(ALL_MODELS, "toy", Model(1, 48, 3, 80))
    for name, value in (
        ("SHAPES", ((1, 16), (2, 80))), ("SEQUENCE_LEN", 37), ("SEQUENCE", 2), ("NUM_SEQUENCES", 5),
        ("INVARIANCE_MODELS", ()),
    ):  # fmt: skip
        monkeypatch.setattr(cases, name, value)
    given_times = SimpleNamespace(of=lambda config, tokens: 1.0)

    def capture(calls, repeats):
        calls[0]()
        (entry, *_), *_ = configs.table_for("")[OPERATION].values()
        return entry["config"], len(calls[0].args[0])

    monkeypatch.setattr(trial, "capture", capture)
    monkeypatch.setattr(trial, "event_seconds", lambda replay: given_times.of(*replay))
    with launching_by(planted):
        yield given_times


def trial_of(lines: list[str]) -> Trial:
    return Trial(OPERATION, cases_of(OPERATION, ["toy"], ["fp32"]), TABLE, DEVICE, lines.append)


def test_the_fastest_correct_configuration_wins(times):
    """Faster ones lose: one is wrong, one depends on the batch, one rounds differently and is slow in the other class,
    one is rejected by the report."""
    seconds = {WRONG: 0.1, BATCH_DEPENDENT: 0.1, FINE: 0.6, 3: 1.0}
    times.of = lambda config, tokens: (
        (0.1 if tokens == 16 else 20.0)
        if config["num_stages"] == OTHER_ROUNDING
        else seconds[config["num_stages"]] * (0.5 if config["num_warps"] == 8 else 1.0)
    )
    lines = []
    candidates = [candidate(num_stages=stages) for stages in (WRONG, BATCH_DEPENDENT, OTHER_ROUNDING, FINE)]
    candidates.append(candidate(num_stages=FINE, num_warps=8))
    reported = []

    def report_failures(config, up_to):
        reported.append(config["num_warps"])
        return ["spills"] if config["num_warps"] == 8 else []

    chosen = trial_of(lines).run(candidates, report_failures, 1000.0)
    assert set(chosen) == {16, 512}
    for timing in chosen.values():
        assert (timing.config["num_stages"], timing.config["num_warps"]) == (FINE, 4)
        assert timing.ratio == pytest.approx(0.6)
    assert reported == [8, 8, 4, 4]
    dropped = [(int(re.search(r"'num_stages': (\d)", line)[1]), line.split("}: ")[1]) for line in lines]
    assert {(stages, reason.split(" above")[0][:14]) for stages, reason in dropped} == {
        (WRONG, dict(dropped)[WRONG][:14]), (BATCH_DEPENDENT, "the results of"), (FINE, "spills"),
    }  # fmt: skip
    assert dict(dropped)[WRONG].startswith("error ")


def test_a_gain_within_the_spread_does_not_win(times):
    noisy = cycle((0.8, 0.9, 1.3))
    times.of = lambda config, tokens: 1.0 if config == PRESENT else next(noisy)
    chosen = trial_of([]).run([candidate(num_stages=FINE)], lambda config, up_to: [], 1000.0)
    assert [timing.config for timing in chosen.values()] == [PRESENT, PRESENT]
    assert all(timing.measured_us for timing in chosen.values())


@pytest.mark.parametrize(("slow", "chosen_stages"), [(0.9, OTHER_ROUNDING), (1.0, OTHER_ROUNDING), (1.01, 3)])
def test_another_family_wins_only_if_no_class_gets_slower(slow, chosen_stages, times):
    """No matter how much faster it is in the other class."""
    times.of = lambda config, tokens: (0.1 if tokens == 16 else slow) if config["num_stages"] == OTHER_ROUNDING else 1.0
    chosen = trial_of([]).run([candidate(num_stages=OTHER_ROUNDING)], lambda config, up_to: [], 1000.0)
    assert [timing.config["num_stages"] for timing in chosen.values()] == [chosen_stages, chosen_stages]


def test_a_family_may_mix_block_k_in_16_bits_only(times):
    """Bitwise equal results are enough in 16 bits. In 32 bits all entries of a file have one BLOCK_K."""
    times.of = lambda config, tokens: 0.5 if config["BLOCK_K"] == (64 if tokens == 16 else 32) else 1.0
    for dtype, width, blocks in (("fp16", "16", [64, 32]), ("fp32", "32", [32, 32])):
        table = TABLE | {OPERATION: {width: [{"up_to": None, "config": PRESENT | {"BLOCK_K": 32}}]}}
        tried = Trial(OPERATION, cases_of(OPERATION, ["toy"], [dtype]), table, DEVICE, print)
        # As on a GPU. In the interpreter sums with another BLOCK_K differ.
        tried.sequence_rows = lambda config: [torch.zeros(1)]
        chosen = tried.run([candidate(BLOCK_K=64, num_stages=FINE)], lambda config, up_to: [], 1000.0)
        assert [timing.config["BLOCK_K"] for timing in chosen.values()] == blocks
        few_rows = PRESENT | {"BLOCK_M": 32}
        assert tried.admit(few_rows)
        assert not tried.same_family(few_rows, PRESENT)


def test_without_time_the_present_configuration_stays(times):
    times.of = lambda config, tokens: 1.0 if config == PRESENT else 0.1
    lines = []
    chosen = trial_of(lines).run([candidate(num_stages=FINE)], lambda config, up_to: [], 0.0)
    assert [timing.config for timing in chosen.values()] == [PRESENT, PRESENT]
    assert lines == ["no time for more than 0 of 1 candidates"]


def test_configurations_without_a_final_are_printed(times, monkeypatch):
    """The heats take an hour."""
    now = iter((0.0, 0.0))
    monkeypatch.setattr(trial.time, "perf_counter", lambda: next(now, 3600.0))
    lines = []
    chosen = trial_of(lines).run([candidate(num_stages=FINE)], lambda config, up_to: [], 60.0)
    assert [timing.config for timing in chosen.values()] == [PRESENT, PRESENT]
    untimed = [PRESENT | {"num_stages": FINE, "ctas_per_sm": count} for count in (2, 1)]
    assert lines == [f"no time for {config}, up_to {up_to}" for up_to in (16, 512) for config in untimed]


def test_heats_skip_what_cannot_win(times, monkeypatch):
    """Large tiles are not timed in small classes, other epilogues only for many tokens and the fastest tile."""
    monkeypatch.setattr(cases, "SHAPES", ((1, 16), (2, 80), (4, 160)))
    monkeypatch.setattr(trial, "FINALISTS", 1)
    heated = []

    def of(config, tokens):
        if config != PRESENT:
            heated.append((config["BLOCK_M"], config["BLOCK_N"], config["halves"], tokens))
        return 0.5 if config["BLOCK_M"] == 256 else 1.0

    times.of = of
    tried = trial_of([])
    tiles = [{"BLOCK_M": 128, "BLOCK_N": 128}, {"BLOCK_M": 256, "BLOCK_N": 64}, {"BLOCK_M": 64, "BLOCK_N": 16}]
    given = [candidate(**tile, halves=halves) for halves in (True, False) for tile in tiles[: 2 if halves else 3]]
    given.append(candidate(BLOCK_M=128, BLOCK_N=256, halves=True))  # without a candidate with the plain epilogue
    tried._heats(given, float("inf"))
    assert set(heated) == {
        (128, 128, False, 160), (128, 128, False, 640), (256, 64, False, 160), (256, 64, False, 640),
        (64, 16, False, 16), (64, 16, False, 160), (64, 16, False, 640), (256, 64, True, 640), (128, 256, True, 640),
    }  # fmt: skip
    assert [trial.worth_timing(PRESENT | {"BLOCK_N": 32}, up_to) for up_to in (1024, 4096, None)] == [
        True,
        False,
        False,
    ]


def test_attention_is_timed_on_ragged_batches(times):
    """Their work is the sum over their sequences, and the last one has S tokens."""
    (of_class,) = cases_of("attention", ["toy"], ["fp32"]).values()
    assert [str(case) for case in of_class] == [
        "toy 1x16 attention fp32", "toy 2x80 attention fp32", "toy 2x80 ragged attention fp32"
    ]  # fmt: skip
    ragged = of_class[-1]
    assert ragged.lengths == [cases.LENGTHS[0], 80]
    call = cases.random_call(ragged, DEVICE, 0)
    qkv, cu_seqlens, max_seqlen, _ = call.args
    assert (len(qkv), cu_seqlens.tolist(), max_seqlen) == (ragged.tokens, [0, cases.LENGTHS[0], ragged.tokens], 80)
    assert ragged.work.flops == 4 * 48 * sum(length**2 for length in ragged.lengths)
    assert ragged.work.bytes == 4 * 48 * 4 * ragged.tokens
    full = replace(ragged, ragged=False)
    assert full.work.flops == 4 * 48 * 2 * 80**2
    # Each sequence alone, in plain PyTorch.
    parts = [
        cases.FORMULAS["attention"](part, torch.tensor([0, len(part)]), 80, 0.25) for part in qkv.split(ragged.lengths)
    ]
    torch.testing.assert_close(cases.FORMULAS["attention"](qkv, cu_seqlens, 80, 0.25), torch.cat(parts))
    tried = Trial("attention", {32: of_class}, TABLES["sm_90"], DEVICE, pytest.fail)
    assert tried.why_wrong(tried.present[32], ragged) is None


def test_lengths_of_ragged_batches():
    """A batch of any size has short and long sequences, and about the mean of all lengths."""
    assert len(cases.LENGTHS) == 32
    assert max(cases.LENGTHS) <= 512
    for batch_size in (5, 9, 33, 257):
        lengths = cases.Case("attention", "base", batch_size, 512, "bf16", ragged=True).lengths
        assert len(lengths) == batch_size
        assert lengths[-1] == 512
        assert 30 < sum(lengths[:-1]) / (batch_size - 1) < 80


def test_a_present_configuration_that_does_not_launch_is_replaced(times):
    """A right configuration wins, and a faster one that is wrong does not."""

    def out_of_resources(kernel, grid, arguments):
        if arguments.get("num_stages") == PRESENT["num_stages"]:
            raise triton.OutOfResources(300000, 232448, "shared memory")
        planted(kernel, grid, arguments)

    times.of = lambda config, tokens: 7.0 if config["num_stages"] == FINE else 1.0
    lines, candidates = [], [candidate(num_stages=stages) for stages in (FINE, WRONG)]
    tried = trial_of(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", out_of_resources)
        chosen = tried.run(candidates, lambda config, up_to: [], 1000.0)
    assert [timing.config["num_stages"] for timing in chosen.values()] == [FINE, FINE]
    assert [tried.reference(up_to) for up_to in chosen] == ["roofline time", "roofline time"]
    assert any("OutOfResources" in line for line in lines)


def test_inputs_exceed_the_cache(times, monkeypatch):
    """There are many sets of small inputs and few of large ones."""
    tried = trial_of([])
    (small, *_), (large, *_) = tried.cases.values()
    monkeypatch.setattr(trial, "ROTATION_BYTES", 10 * small.work.bytes)
    assert len(tried.inputs(small)[0]) == 10
    monkeypatch.setattr(trial, "ROTATION_BYTES", large.work.bytes)
    assert len(tried.inputs(large)[0]) == 2


def test_sets_of_inputs_are_larger_than_the_cache_of_an_h200():
    for of_class in cases_of("linear_residual", ["base", "large"], ["bf16"]).values():
        for case in of_class:
            assert min(trial.MAX_SETS, trial.ROTATION_BYTES / case.work.bytes) * case.work.bytes >= 60 * 2**20, case


@pytest.mark.parametrize(
    ("operation", "models", "expected"),
    [
        ("qkv_projection", ["large"], {"large", "minilm", "base"}),
        ("linear_residual_layer_norm", ["minilm"], {"minilm"}),  # base has two launches
        ("attention", ["base"], {"base"}),  # minilm's heads are in another class
    ],
)
def test_invariance_is_tested_for_all_users_of_an_entry(operation, models, expected):
    compared = invariance_cases(operation, cases_of(operation, models, ["bf16"]))
    assert {case.model for case in compared} == expected
    assert {case.dtype for case in compared} == {"bf16", "fp16"}
    assert len(compared) == 2 * len(expected) * len({case.place for case in compared})


def test_a_configuration_that_is_wrong_in_the_other_dtype_is_dropped(times):
    """Float16 is timed, and in bfloat16 the results of a sequence depend on its batch."""

    def of_bfloat16(kernel, grid, arguments):
        run(kernel, grid, arguments)
        out = arguments["out"]
        if out.dtype == torch.bfloat16 and len(out) > 150:
            out.mul_(1.5)

    table = TABLE | {OPERATION: {"16": [{"up_to": None, "config": PRESENT}], "32": []}}
    lines = []
    tried = Trial(OPERATION, cases_of(OPERATION, ["toy"], ["fp16"]), table, DEVICE, lines.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", of_bfloat16)
        assert not tried.admit(PRESENT)
    assert "the results of a sequence depend on its batch" in lines[0]
    assert tried.admit(PRESENT | {"num_warps": 8})


def near_the_limit(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield results of a kernel, of plain PyTorch and the truth, with errors below, at and above the limit."""
    for steps in range(8):  # PyTorch is exact, so five roundings of float32 are allowed, or one of 16 bits
        truth = torch.ones(1, dtype=torch.float64)
        yield (truth + steps * torch.finfo(dtype).eps).to(dtype), truth.to(dtype), truth
    for size, their_share in product((2.0**-10, 1.0, 1000.0), (2.0**-6, 0.1, 0.2)):
        their_error = their_share * size
        largest = limit(their_error, size, dtype, OP_FACTOR)
        for share in (0.5, 1 - 2.0**-50, 1.0, 1 + 2.0**-50, 2.0):
            truth = torch.tensor([size, share * largest, their_error], dtype=torch.float64)
            zero = torch.zeros(1, dtype=torch.float64)
            ours, theirs = torch.cat((truth[:1], zero, truth[2:])), torch.cat((truth[:2], zero))
            yield ours.to(dtype), theirs.to(dtype), truth
    for value in ("nan", "inf"):
        truth = torch.ones(2, dtype=torch.float64)
        yield torch.tensor([1.0, float(value)], dtype=dtype), truth.to(dtype), truth


@pytest.mark.parametrize("dtype", report.DTYPES)
def test_the_limit_is_that_of_fastbert_testing(dtype, times, monkeypatch):
    entry = {"up_to": None, "config": PRESENT}
    given = cases_of(OPERATION, ["toy"], [dtype])
    tried = Trial(OPERATION, given, TABLE | {OPERATION: {"16": [entry], "32": [entry]}}, DEVICE, pytest.fail)
    case, verdicts = next(iter(given.values()))[0], []
    for ours, theirs, truth in near_the_limit(report.DTYPES[dtype]):

        def kernel(x, ours=ours):
            return ours

        def formula(x, theirs=theirs, truth=truth):
            return truth if x.dtype == torch.float64 else theirs

        monkeypatch.setitem(trial.FORMULAS, "kernel", formula)
        monkeypatch.setattr(trial, "random_call", lambda *_, kernel=kernel, x=theirs: partial(kernel, x))
        tried._inputs.clear()
        by_the_rule = closeness(ours, theirs, truth, OP_FACTOR)[0]
        _, _, allowed = tried.inputs(case)
        wrong = tried.why_wrong(PRESENT, case)
        assert allowed == by_the_rule.limit
        assert (wrong is None) == by_the_rule.holds
        if wrong is not None:
            assert wrong.startswith(f"error {by_the_rule.error:.2e} above {by_the_rule.limit:.2e}")
        verdicts.append(by_the_rule.holds)
    exact = [True] * 6 + [False] * 2 if dtype == "fp32" else [True] * 2 + [False] * 6
    assert verdicts == exact + [True, True, True, False, False] * 9 + [False, False]


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr("fastbert_kernels.tuning.tune.knobs.runtime.interpret", False)
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "NVIDIA H200")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(configs, "name_for", lambda device: "sm_90")


def test_a_file_that_cannot_be_written_is_an_error_before_tuning(h200, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--out", str(tmp_path / "file" / "own.json")])
    assert "cannot write" in capsys.readouterr().err


def test_default_models(h200, monkeypatch):
    """Base and MiniLM, whose LayerNorm can be one launch."""
    listed = []
    monkeypatch.setattr(tune, "list_candidates", lambda *options: listed.append(options))
    tune.main(["--candidates"])
    tune.main(["--candidates", "--model", "large", "--op", "attention"])
    assert listed == [
        (list(tune.OPERATIONS), ["bf16"], ["base", "minilm"], "sm_90"), (["attention"], ["bf16"], ["large"], "sm_90"),
    ]  # fmt: skip


def test_a_file_measured_on_another_device_is_an_error(h200, tmp_path, capsys):
    path = tmp_path / "own.json"
    document = configs.read(configs.path_of("sm_90")) | {"device": "NVIDIA H100", "bits": "measured"}
    path.write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--out", str(path)])
    assert "was measured on another device, NVIDIA H100: choose another --out" in capsys.readouterr().err


def test_one_launch_or_two(times):
    """LayerNorm in one launch is timed against two launches, which need no configuration, even if no time is left."""
    table = deepcopy(TABLES["sm_90"])
    fused = table["linear_residual_layer_norm"]["16"][0]["config"]
    table["linear_residual_layer_norm"]["32"] = [{"up_to": 384, "config": fused | {"BLOCK_K": 32, "num_stages": 2}}]

    def capture(calls, repeats):
        calls[0]()
        return configs.table_for("")["linear_residual_layer_norm"]["32"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "capture", capture)
        patch.setattr(cases, "SHAPES", ((1, 16),))
        patch.setattr(trial, "event_seconds", lambda entries: 1.0 if entries else 0.5)
        given = cases_of("linear_residual_layer_norm", ["toy"], ["fp32"])
        chosen = Trial("linear_residual_layer_norm", given, table, DEVICE, print).run([], lambda config, up_to: [], 0.0)
    assert chosen[384].config is None
    before = table["linear_residual_layer_norm"]["32"]
    assert tune.merged("linear_residual_layer_norm", before, chosen, always_same_family) == []


@pytest.mark.parametrize("operation", ["qkv_projection", "attention"])
def test_other_operations_agree_with_their_formulas(operation, times, monkeypatch):
    monkeypatch.setattr(trial, "capture", lambda calls, repeats: calls[0]())
    times.of = lambda *output: 1.0
    given = cases_of(operation, ["toy"], ["fp32"])
    tried = Trial(operation, given, TABLES["sm_90"], DEVICE, pytest.fail)
    chosen = tried.run([], lambda config, up_to: [], 9.0)
    assert {up_to: timing.config for up_to, timing in chosen.items()} == tried.present
    assert len(chosen) == (1 if operation == "attention" else 2)


@pytest.mark.parametrize(("keys", "left"), [(64, 1), (32, 0)])
def test_short_sequences_lose_a_configuration_of_another_order(keys, left, times, monkeypatch, tmp_path, capsys):
    document = configs.read(configs.path_of("sm_90"))
    entry, *_ = document["attention"]["16"]
    config = entry["config"] | {"BLOCK_N": keys, "num_stages": 1}
    found = trial.Timing(config, 0.5, 0.5, {"a case": 1.0})
    monkeypatch.setattr(trial.Trial, "run", lambda self, *_: {32: found})
    monkeypatch.setattr(tune, "provenance", lambda device, source: {"source": source})
    nothing_compiles = SimpleNamespace(compile_candidates=lambda *_: list, report_failures=lambda *_: [])
    path = tmp_path / "out.json"
    tune.tune(path, document, ["attention"], ["fp16"], ["toy"], 1.0, nothing_compiles, DEVICE)
    written = configs.read(path)
    assert written["attention"]["16"][0]["config"] == config
    assert len(written["attention_short"]["16"]) == left
    assert ("removed the configuration of attention_short" in capsys.readouterr().out) == (left == 0)


def test_a_killed_run_keeps_what_it_has_found(times, monkeypatch, tmp_path):
    times.of = lambda config, tokens: 1.0 if config == PRESENT else 0.5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    path, document = tmp_path / "own.json", {"source": "guessed", **TABLE}
    document[OPERATION] = document[OPERATION] | {"16": TABLES["sm_90"][OPERATION]["16"]}

    def killed():
        raise KeyboardInterrupt

    class Compilers:
        def compile_candidates(self, operation, dtypes, models):
            assert (dtypes, models) == (["fp32"], ["toy"])
            broken = replace(candidate(num_warps=8), reasons=["spills"])
            return killed if operation == "attention" else lambda: [candidate(num_stages=FINE), broken]

        def report_failures(self, operation, width, config, up_to):
            return []

    with pytest.raises(KeyboardInterrupt):
        tune.tune(path, document, [OPERATION, "attention"], ["fp32"], ["toy"], 1000.0, Compilers(), DEVICE)
    written = configs.check(configs.read(path), path)
    assert not list(tmp_path.glob("*.unfinished"))
    small, between, large, rest = written[OPERATION]["32"]
    assert [(entry["up_to"], entry["config"]["num_stages"]) for entry in (small, large)] == [(16, FINE), (512, FINE)]
    assert [list(entry["measured_us"]) for entry in (small, large)] == [
        ["toy 1x16 linear_activation fp32"], ["toy 2x80 linear_activation fp32"],
    ]  # fmt: skip
    assert [between, rest] == [{"up_to": up_to, "config": PRESENT} for up_to in (128, None)]
    assert written["attention"] == TABLE["attention"]
    assert (written["device"], written["source"]) == ("NVIDIA H200", tune.MEASURED + "guessed")
    assert written["bits"] == "measured"
    assert tune.provenance(DEVICE, written["source"])["source"] == written["source"]


def always_same_family(*_):
    return True


def test_adjacent_entries_of_one_configuration_are_merged():
    other = PRESENT | {"num_warps": 8}
    before = [{"up_to": 16, "config": PRESENT}, {"up_to": 1024, "config": PRESENT}, {"up_to": None, "config": other}]
    timing = Timing(other, 0.5, 0.6, {"a": 1.0})
    found = tune.merged("qkv_projection", before, {16: timing, 128: timing}, always_same_family)
    assert found == [{"up_to": 128, "config": other, "measured_us": {"a": 1.0}}, *before[1:]]
    assert tune.merged("qkv_projection", before, {1024: timing}, always_same_family)[1:] == [
        {"up_to": None, "config": other, "measured_us": {"a": 1.0}}
    ]


def test_sizes_that_were_not_measured_keep_their_configuration():
    """129 to 256 tokens are between the largest sizes of two classes, 128 and 512."""
    small, middle, large, fast = (PRESENT | {"num_warps": count} for count in (1, 2, 4, 8))
    before = [
        {"up_to": 256, "config": small, "measured_us": {"a": 1.0, "b": 2.0}}, {"up_to": 512, "config": middle},
        {"up_to": None, "config": large},
    ]  # fmt: skip

    def merged(up_to, timing, same_family=always_same_family):
        return tune.merged("qkv_projection", before, {up_to: timing}, same_family)

    # A class that keeps its configuration takes the new measurement. The entry's other measurements stay.
    assert merged(16, Timing(small, 1.0, 1.0, {"a": 3.0})) == [
        before[0] | {"measured_us": {"a": 3.0, "b": 2.0}}, *before[1:]
    ]  # fmt: skip
    assert merged(16, Timing(fast, 0.5, 0.5, {"a": 3.0})) == [
        {"up_to": 16, "config": fast, "measured_us": {"a": 3.0}}, before[0] | {"measured_us": {"b": 2.0}}, *before[1:]
    ]  # fmt: skip
    kept = merged(512, Timing(middle, 1.0, 1.0, {"c": 3.0}))
    assert [(entry["up_to"], entry["config"]) for entry in kept] == [(256, small), (512, middle), (None, large)]
    assert kept[1]["measured_us"] == {"c": 3.0}
    assert merged(512, Timing(fast, 0.5, 0.5, {"c": 3.0})) == [
        before[0] | {"up_to": 128}, {"up_to": 512, "config": fast, "measured_us": {"c": 3.0}}, before[2]
    ]  # fmt: skip
    # Configurations of different families are not merged.
    assert merged(512, Timing(middle, 1.0, 1.0, {"c": 3.0}), lambda one, other: one == other) == [
        before[0] | {"up_to": 128}, {"up_to": 512, "config": middle, "measured_us": {"c": 3.0}}, before[2]
    ]  # fmt: skip
    # Row widths beyond the last class keep their entry.
    before = [{"up_to": 256, "config": small}, {"up_to": 768, "config": large}]
    timing = Timing(fast, 0.5, 0.5, {"a": 1.0})
    assert tune.merged("linear_residual_layer_norm", before, {384: timing}, always_same_family) == [
        {"up_to": 384, "config": fast, "measured_us": {"a": 1.0}}, {"up_to": 768, "config": large}
    ]  # fmt: skip


def test_an_entry_has_its_source_until_it_is_measured():
    """Even if an adjacent entry with the same configuration is measured."""
    before = [{"up_to": 16, "config": PRESENT}, {"up_to": None, "config": PRESENT, "source": "guessed"}]
    timing = Timing(PRESENT, 1.0, 1.0, {"a": 1.0})
    measured = {"config": PRESENT, "measured_us": {"a": 1.0}}
    assert tune.merged("qkv_projection", before, {16: timing}, always_same_family) == [
        {"up_to": 16} | measured,
        before[1],
    ]
    chosen = dict.fromkeys(TOKEN_CLASSES, timing)
    assert tune.merged("qkv_projection", before, chosen, always_same_family) == [{"up_to": None} | measured]


def test_candidates_that_spill_or_are_too_large_are_dropped(tmp_path):
    """The compiler for sm_90 decides, at the sizes of a real model. Without a GPU nothing is timed."""
    script = tmp_path / "cut.py"
    script.write_text("""
import json, sys
from fastbert_kernels.tuning import tune
from fastbert_kernels.tuning.candidates import examine, grid
from fastbert_kernels.tuning.ahead_of_time import CHIPS
given = [c for c in grid("qkv_projection", CHIPS["sm_90"], 2) if c["BLOCK_M"] == c["BLOCK_N"] == 128][:1]
assert given[0]["descriptors"]
given += [given[0] | {"BLOCK_N": 256, "num_warps": 4}, given[0] | {"num_stages": 8, "BLOCK_K": 128}]
given += [given[0] | {"BLOCK_M": 16}]
print(json.dumps([vars(c) for c in examine("sm_90", ["bf16"], "qkv_projection", ["tiny"], given)]))
try:
    tune.main([])
except SystemExit as error:
    print(error.code)
""")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, code = done.stdout.splitlines()
    fine, spilling, large, rows = json.loads(found)
    assert fine["reasons"] == []
    assert (fine["matrix_instruction"], fine["ctas_per_sm"]) == ("HGMMA", 2)
    assert re.fullmatch(r"spills \d+ bytes a thread", spilling["reasons"][0])
    assert re.fullmatch(r"\d+ bytes of shared memory of 232448", large["reasons"][0])
    assert rows["reasons"] == ["matrix instruction HMMA instead of HGMMA"]
    assert code == "2"
    assert "no GPU to time the candidates on; --candidates lists them without one" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "unset TRITON_INTERPRET"), (["--op", "softmax"], "invalid choice: 'softmax'")],
)
def test_options_are_checked(options, message, capsys, monkeypatch):
    monkeypatch.setattr("fastbert_kernels.tuning.tune.knobs.runtime.interpret", True)
    with pytest.raises(SystemExit, match="2"):
        tune.main(options)
    assert message in capsys.readouterr().err


@pytest.fixture
def forgetful():
    """Configuration files are read again."""

    def forget():
        configs.table_for.cache_clear()
        configs._name_for_gpu.cache_clear()
        launch.forget_launches()

    forget()
    yield
    forget()


def test_fastbert_configs_replaces_every_shipped_file(forgetful, monkeypatch, tmp_path):
    """It is used for every GPU and target."""
    path = tmp_path / "own.json"
    document = deepcopy(configs.read(configs.path_of("sm_90")))
    document[OPERATION]["32"] = [{"up_to": None, "config": PRESENT | {"BLOCK_N": 32}}]
    configs.write(document, path)
    assert configs.read(path) == document
    monkeypatch.setenv("FASTBERT_CONFIGS", str(path))
    seen = []
    with launching_by(lambda kernel, grid, arguments: seen.append(arguments["BLOCK_N"])):
        linear_activation(normal(5, 48), normal(7, 48), normal(7), "none")
    assert seen == [32]
    assert configs.table_for("sm_80") == configs.operations(document)


def test_the_file_of_a_device_is_preferred_to_its_architecture(forgetful, monkeypatch, tmp_path):
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 7)
    for name, document in (("sm_90", {"source": "architecture"}), ("default", {"source": "default"})):
        configs.path_of(name).write_text(json.dumps(document | TABLE))
    assert configs.name_for(device) == "sm_90"
    own = configs.path_of("NVIDIA H200")
    assert own == tmp_path / "nvidia-h200.json"
    own.write_text(json.dumps({"source": "device", "architecture": "sm_90"} | TABLES["sm_80"]))
    forgotten = (configs.table_for, configs._name_for_gpu)
    for cache in forgotten:
        cache.cache_clear()
    assert configs.table_for(configs.name_for(device)) == TABLES["sm_80"]
    assert configs.table_for("sm_90") == TABLE
    assert report.tables_of("sm_90") == [TABLE, TABLES["sm_80"]]
    assert configs.name_for(torch.device("cpu")) == target.INTERPRETED_ARCHITECTURE


def changed(*path, to=None):
    """Return a shipped file with one value changed, or removed for None."""
    document = deepcopy(configs.read(configs.path_of("sm_90")))
    place = document
    for key in path[:-1]:
        place = place[key]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return document


FIRST = ("qkv_projection", "16", 0)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed("source"), "'source' is missing"),
        (changed("attention"), "'attention' is missing"),
        (changed("softmax", to={}), "'softmax' is unknown; known are source, qkv_projection, "),
        (changed("attention", "16"), "attention: '16' is missing"),
        (changed("attention", "16", to={}), "attention, 16 bits: expected a list of entries, not {}"),
        (changed("attention", "16", to=[]), "attention, 16 bits: the last up_to has to be 128"),
        (changed("attention_backward", "32", to=[]), "attention_backward, 32 bits: the last up_to has to be 128"),
        (changed("attention", "16", to=[3]), "attention, 16 bits, entry 0: expected an object, not 3"),
        (changed("attention", "16", 0, "config", "BLOCK_K", to=64), "entry 0: 'BLOCK_K' is unknown; known are BLOCK_M"),
        (changed(*FIRST, "config", "BLOCK_K"), "qkv_projection, 16 bits, entry 0: 'BLOCK_K' is missing"),
        (changed(*FIRST, "config", "BLOCK_M", to=96), "entry 0: BLOCK_M is 96, expected a power of two from 16 on"),
        (changed(*FIRST, "config", "BLOCK_N", to=8), "entry 0: BLOCK_N is 8, expected a power of two from 16 on"),
        (changed(*FIRST, "config", "BLOCK_K", to=32), "qkv_projection, 16 bits: entries differ in BLOCK_K, [32, 64]"),
        (changed(*FIRST, "config", "num_warps", to=3), "entry 0: num_warps is 3, expected a power of two up to 32"),
        (changed(*FIRST, "config", "num_warps", to=64), "entry 0: num_warps is 64, expected a power of two up to 32"),
        (changed(*FIRST, "config", "num_stages", to=0), "entry 0: num_stages is 0, expected a positive integer"),
        (changed(*FIRST, "config", "ctas_per_sm", to=1.5), "entry 0: ctas_per_sm is 1.5, expected a positive integer"),
        (changed(*FIRST, "config", "descriptors", to=1), "entry 0: descriptors is 1, expected true or false"),
        (changed(*FIRST, "config", "flatten", to=0), "entry 0: flatten is 0, expected true or false"),
        (changed(*FIRST, "config", "halves"), "qkv_projection, 16 bits, entry 0: 'halves' is missing"),
        (changed("linear_residual_layer_norm", "16", 0, "config", "halves", to=True), "entry 0: 'halves' is unknown"),
        (changed(*FIRST, "because", to="it won"), "entry 0: 'because' is unknown; known are up_to, config, "),
        (changed("bits", to="equal") | {"device": "H"}, "bits is 'equal', expected 'measured' or nothing"),
        (changed("bits", to="measured"), "'bits' needs 'device', the name of the measured GPU"),
        (changed("qkv_projection", "32", 0, "config", "BLOCK_K", to=64) | {"device": "H", "bits": "measured"},
         "qkv_projection, 32 bits: entries differ in BLOCK_K, [32, 64]"),
        (changed(*FIRST, "config", "BLOCK_M", to=32) | {"device": "H", "bits": "measured"},
         "qkv_projection, 16 bits: BLOCK_M is below 64 in some entries only"),
        (changed(*FIRST, "up_to", to="many"), "entry 0: up_to is 'many', expected a positive integer or null"),
        (changed("qkv_projection", "16", 2), "qkv_projection, 16 bits: the last up_to has to be null"),
        (changed("qkv_projection", "16", 1, "up_to", to=64), "up_to has to grow from entry to entry, not [256, 64, "),
        (changed("attention_short", "16", 0, "config", "BLOCK_N", to=32), "attention_short, 16 bits: BLOCK_N, "),
        (changed("attention_short", "16", 0, "config", "num_warps", to=8), "attention_short, 16 bits: BLOCK_N, "),
        (changed("attention_short", "16", 0, "up_to", to=256), "16 bits: the last up_to is 256, above the largest"),
        (changed("attention_short", "16", 0, "config", to={
            "BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 2, "num_stages": 2,
        }), "attention_short, 16 bits: BLOCK_N, the rows a warp or the use of wgmma"),
        (changed(*FIRST, "config", "BLOCK_M", to=32), "qkv_projection, 16 bits: BLOCK_M is below 64 in some entries"),
        (changed("linear_residual_layer_norm", "16", 0, "up_to", to=768), "up_to is 768, above three times BLOCK_N"),
    ],
)  # fmt: skip
def test_invalid_files(document, message, forgetful, monkeypatch, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(document))
    monkeypatch.setenv("FASTBERT_CONFIGS", str(path))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        linear_activation(normal(5, 48), normal(7, 48), normal(7), "none")
    assert str(error.value).startswith(f"launch configurations {path}: ")


@pytest.mark.parametrize("operation", ["qkv_projection", "linear_activation", "linear_residual", "attention"])
def test_the_configurations_of_an_h200_are_among_the_candidates(operation):
    tried = grid(operation, CHIPS["sm_90"], 2)
    for entry in TABLES["nvidia-h200"][operation]["16"]:
        assert entry["config"] | ({"ctas_per_sm": 1} if "ctas_per_sm" in entry["config"] else {}) in tried, entry


@pytest.mark.parametrize("names", [[], ["NVIDIA H200"], ["NVIDIA H200", "NVIDIA H100"]], ids=str)
def test_a_file_with_measured_bits_is_for_its_device_only(names, forgetful, monkeypatch, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(configs.path_of("NVIDIA H200").read_text())
    monkeypatch.setenv("FASTBERT_CONFIGS", str(path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device])
    if "NVIDIA H100" in names:
        with pytest.raises(ValueError, match="was measured on NVIDIA H200, but this process has NVIDIA H100"):
            configs.table_for("sm_90")
    else:
        assert configs.table_for("sm_90") == TABLES["nvidia-h200"]


def test_a_file_with_measured_bits_may_mix_block_k():
    document = changed(*FIRST, "config", "BLOCK_K", to=128)
    path = configs.path_of("sm_90")
    with pytest.raises(ValueError, match="entries differ in BLOCK_K"):
        configs.check(document, path)
    measured = document | {"device": "NVIDIA H200", "bits": "measured"}
    assert configs.check(measured, path) is measured


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_unreadable_files(text, forgetful, monkeypatch, tmp_path):
    path = tmp_path / "own.json"
    if text:
        path.write_text(text)
    monkeypatch.setenv("FASTBERT_CONFIGS", str(path))
    with pytest.raises(ValueError, match=re.escape(f"launch configurations {path}: ")):
        configs.table_for("sm_90")


@pytest.mark.gpu
def test_a_run_on_the_device_writes_a_file(tmp_path):
    path = tmp_path / "own.json"
    options = ("--model=minilm", "--op=attention", "--op=linear_residual_layer_norm", "--seconds=20", f"--out={path}")
    command = [sys.executable, "-m", "fastbert_kernels.tuning.tune", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    document = configs.check(configs.read(path), path)
    assert document["device"] == torch.cuda.get_device_name()
    assert any("measured_us" in entry for entry in document["attention"]["16"])


pytestmark = [] if DEVICE.type == "cuda" else MARKS
