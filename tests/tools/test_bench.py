"""The benches and the demo run, on a CPU at toy sizes; the README's figures are the ones their records give."""

import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import bench_attention
import bench_encode
import bench_latency
import bench_memory
import bench_model
import cases
import demo
import device_timing
import memory
import plots
import providers
import pytest
import records
import report
import torch
import transformers
import workloads
from peers import UnpaddedBert
from providers import BASELINE, GRAPHED, UNPADDED
from shown_clock import CLOCK
from workloads import Case

import fastbert
from fastbert.commands import machine, timing
from fastbert_kernels.tuning.roofline import H200, Roofs

ROOT = Path(__file__).parent.parent.parent
TOY = Case("toy", 3, 24, 0.5)


def run_bench(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    # Not `python -m pytest`, which would put the repository on the path, and with it the bare folder `kernels`.
    pytest_itself = Path(sys.executable).with_name("pytest")
    command = [pytest_itself, "bench", *arguments, "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bench_options():
    """bench/conftest.py as a module: that name belongs to the tests' own here."""
    spec = importlib.util.spec_from_file_location("bench_options", ROOT / "bench" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Benchmark:
    """What the benches use of pytest-benchmark's fixture."""

    def __init__(self):
        self.enabled, self.group, self.shown = True, None, []

    def pedantic(self, function, rounds=1):
        for _ in range(rounds):
            start = CLOCK()
            result = function()
            self.shown.append(CLOCK() - start)
        return result


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The records that a test writes, which go to a folder of its own."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "_commit", lambda: "0" * 7)

    def read() -> list[dict]:
        return [record for path in sorted(tmp_path.glob("*/*.jsonl")) for record in records.read(path)]

    return read


@pytest.mark.parametrize("suites", ["model,latency,encode,memory", "attention,kernels", "host"])
def test_the_bench_checks_its_results(suites):
    """Every provider that runs here, checked and not timed; nothing is recorded, and nobody but peers skipped."""
    environment = dict(os.environ)
    if suites == "host":
        # Triton compiles for it, which its interpreter does not.
        environment.pop("TRITON_INTERPRET", None)
    before = {path: path.read_bytes() for path in records.RESULTS.rglob("*") if path.is_file()}
    run = run_bench("--suite", suites, "--benchmark-disable", environment=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(" is absent: " in line and "fastbert" not in line for line in skipped), run.stdout
    assert before == {path: path.read_bytes() for path in records.RESULTS.rglob("*") if path.is_file()}


def test_what_does_not_fit_the_time_is_left_out_and_named():
    run = run_bench("--suite", "memory", "--seconds", "0.5", "--benchmark-disable", "--commit", "8ad994e")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "4 skipped" in run.stdout
    assert " passed" not in run.stdout
    assert "left out of memory for want of time, 4: test_memory[toy-8x24-50-filled-transformers-sdpa]" in run.stdout
    assert "--seconds 0.5 has no time left for it in memory" in run.stdout


def test_what_compiles_needs_more_time():
    run = run_bench("--suite", "kernels", "--seconds", "6", "--benchmark-disable", "-k", "linear_activation")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed, 1 skipped" in run.stdout
    assert "for want of time, 1: test_kernel[linear_activation-toy-2x64-float32-torch-compiled]" in run.stdout


def test_an_unknown_suite_is_refused_with_the_known_ones():
    run = run_bench("--suite", "model,speed")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "'speed': the suites are model, latency, encode, memory, attention, kernels, host" in run.stderr


def test_a_commit_is_a_name_of_git(bench_options):
    assert bench_options._commit("8ad994e059ba24f783436ae4cad75f3f29be6065-dirty") == "8ad994e-dirty"
    assert bench_options._commit("8ad994e") == "8ad994e"
    for text in ("", "main", "8ad99", "8ad994e-", "8ad994e dirty"):
        with pytest.raises(bench_options.argparse.ArgumentTypeError, match=f"'{text}': git's name of a commit"):
            bench_options._commit(text)


def test_the_given_commit_is_the_records(bench_options, monkeypatch):
    monkeypatch.setattr(records, "given_commit", None)
    monkeypatch.setattr(records, "_head", lambda: None)
    config = SimpleNamespace(getoption={"commit": "8ad994e"}.get, addinivalue_line=lambda *_: None)
    bench_options.pytest_configure(config)
    assert records.provenance()["commit"] == "8ad994e"


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_a_record(tmp_path, monkeypatch):
    """Git's own name where it knows the project, else the given one, else none; never that of a folder around it."""

    def commit_of(root: Path) -> str:
        records._head.cache_clear()
        monkeypatch.setattr(records, "ROOT", root)
        return records.provenance()["commit"]

    around, alone = tmp_path / "around", tmp_path / "alone"
    alone.mkdir()
    for folder in (around, around / "project"):
        folder.mkdir()
        (folder / "file").write_text("1")
    git(around, "init", "--quiet")
    git(around, "add", ".")
    git(around, "commit", "--quiet", "--message", "all")
    name = git(around, "rev-parse", "--short", "HEAD").strip()
    monkeypatch.setattr(records, "given_commit", None)
    assert commit_of(alone) == commit_of(around / "project") == "unknown"
    assert commit_of(around) == name
    monkeypatch.setattr(records, "given_commit", "8ad994e")
    assert commit_of(alone) == commit_of(around / "project") == "8ad994e"
    (around / "file").write_text("2")
    assert commit_of(around) == f"{name}-dirty"
    records._head.cache_clear()


def test_options_of_the_bench(bench_options):
    assert bench_options._suites("kernels,model") == ("model", "kernels")
    assert bench_options._seconds("1.5") == 1.5
    for text in ("0", "-1", "nan", "soon"):
        with pytest.raises(bench_options.argparse.ArgumentTypeError, match=f"'{text}': a number of seconds above 0"):
            bench_options._seconds(text)
    assert set(bench_options.SUITES) == set(report.SUITES)


def test_time_that_a_suite_leaves_is_the_next_ones(bench_options, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(bench_options.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bench_options, "SUITES", {"model": 0.3, "memory": 0.1, "kernels": 0.6})
    budget = bench_options.Budget(40.0, ("model", "memory"))  # to 130 and to 140
    assert budget.allows("model", 29)
    assert not budget.allows("model", 31)
    now[0] = 105.0
    assert budget.allows("memory", 34)
    assert not budget.allows("memory", 36)


def every_forward() -> list[tuple[Case, str]]:
    return [*bench_model._toy_forwards(), *bench_model._cpu_forwards(), *bench_model._gpu_forwards()]


def every_batch() -> list[Case]:
    """What the model or attention alone is timed on, a case a shape."""
    pairs = [*every_forward(), *bench_attention.TOY, *bench_attention.timed()]
    return list({case.shape: case for case, _ in pairs}.values())


@pytest.mark.parametrize("case", every_batch(), ids=lambda case: case.shape)
def test_batches_have_the_fill_they_are_named_after(case):
    batch = workloads.inputs(case)
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (case.batch, case.seq_len)
    assert lengths.max() == case.seq_len
    assert lengths.double().mean() / case.seq_len == pytest.approx(case.fill, abs=workloads.FILL_TOLERANCE)
    assert not batch["input_ids"][batch["attention_mask"] == 0].any()
    assert torch.equal(workloads.lengths_of(case), lengths.cpu())


def test_batches_that_no_texts_make_are_refused():
    with pytest.raises(ValueError, match="toy 2x16 52% filled"):
        workloads.inputs(Case("toy", 2, 16, 0.52))
    with pytest.raises(ValueError, match="toy 4000x512 full needs texts of 512 tokens, and only"):
        workloads.inputs(Case("toy", 4000, 512))


def test_every_provider_is_known_and_drawn():
    assert {provider for _, provider in every_forward()} <= set(providers.PROVIDERS)
    assert set(plots.COLOURS) == set(providers.PROVIDERS)
    assert len(set(plots.COLOURS.values())) == len(providers.PROVIDERS)
    assert len(bench_model._gpu_forwards()) == len(set(bench_model._gpu_forwards()))


def test_the_floor_of_a_forward():
    """By hand, a layer: 12 E^2 + 9 E weights; a token's products are 24 E^2 operations, its attention 4 S E."""
    config = transformers.BertConfig()
    small = workloads.forward_work(config, Case("base", 1, 16, dtype="bfloat16"))
    assert small.bytes == 2 * (12 * (12 * 768**2 + 9 * 768) + 16 * 768)
    large = workloads.forward_work(config, Case("base", 32, 128, dtype="bfloat16"))
    assert large.flops == 12 * (2 * 12 * 768**2 + 4 * 128 * 768) * 4096
    assert large.seconds("bf16", H200) == pytest.approx(0.905e-3, rel=0.01)
    lengths = workloads.inputs(TOY)["attention_mask"].sum(1)
    ragged = workloads.forward_work(transformers.BertConfig(**providers.SIZES["toy"]), TOY)
    products = 2 * (4 * 48**2 + 2 * 48 * 80) * lengths.sum()
    assert ragged.flops == 2 * (products + 4 * 48 * (lengths**2).sum())


def right_padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(0, cases.VOCAB, mask.shape), "attention_mask": mask}


@pytest.mark.parametrize(
    "lengths", [[7, 12, 1, 4], [12] * 3, [1], list(range(1, 25))], ids=["ragged", "full", "one", "all lengths"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_unpadded_peer_is_transformers_model(lengths, dtype):
    theirs = cases.pair()[1].to(dtype)
    peer, batch = UnpaddedBert.from_transformers(theirs), right_padded(lengths)
    with torch.no_grad():
        outputs, expected = peer(**batch), theirs(**batch)
    keep = batch["attention_mask"].bool()
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(outputs.last_hidden_state[keep], expected.last_hidden_state[keep], **close)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, **close)
    assert not outputs.last_hidden_state[~keep].any()


def test_the_unpadded_peer_refuses_another_activation():
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        UnpaddedBert.from_transformers(cases.pair(hidden_act="relu")[1])


def test_providers_by_name(monkeypatch):
    graphed = []
    monkeypatch.setattr(fastbert, "graphed", lambda model: graphed.append(model) or model, raising=False)
    assert type(providers.model_of(Case("toy", 1, 16, dtype="float16"), GRAPHED)) is fastbert.BertModel
    assert len(graphed) == 1
    monkeypatch.undo()
    forwards = [providers.model_of(TOY, GRAPHED).forward for _ in range(2)]
    assert forwards[0] is not forwards[1]  # one case's graphs are not another's
    with torch.inference_mode():
        compiled = providers.model_of(TOY, f"{UNPADDED}-compiled")
    assert type(compiled) is UnpaddedBert
    assert not any(parameter.is_inference() for parameter in compiled.parameters())
    assert hasattr(compiled.encode, "_torchdynamo_orig_callable")
    with pytest.raises(ValueError, match="no provider is called 'tensorrt', but fastbert, "):
        providers.model_of(TOY, "tensorrt")


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_a_wrong_provider_is_not_timed(value, monkeypatch):
    right = providers.uncompiled("toy", "float32", "fastbert")

    def wrong(**batch):
        outputs = right(**batch)
        outputs.last_hidden_state[0, 0, 0] *= value
        return outputs

    model_of = providers.model_of
    monkeypatch.setattr(providers, "model_of", lambda case, name: wrong if name == "fastbert" else model_of(case, name))
    assert providers.checked(TOY, BASELINE).fields["error_ratio"] == 1
    with torch.no_grad(), pytest.raises(ArithmeticError, match=f"errs by .*, {BASELINE} by"):
        providers.checked(TOY, "fastbert")


def test_a_peer_that_cannot_run_leaves_its_reason(recorded):
    about = providers.about("model", "latency", dataclasses.asdict(TOY), UNPADDED)
    with pytest.raises(pytest.skip.Exception, match="unpadded-varlen is absent"), providers.or_absent(about, True):
        raise RuntimeError("FlashAttention takes 16 bits\nand more lines")
    assert [record["absent"] for record in recorded()] == ["RuntimeError: FlashAttention takes 16 bits"]
    with pytest.raises(AssertionError), providers.or_absent(about, False):
        raise AssertionError


@pytest.mark.parametrize("provider", sorted(providers.OURS))
def test_ours_that_fails_takes_the_place_of_an_earlier_record(provider, recorded):
    about = providers.about("memory", "memory", dataclasses.asdict(TOY), provider)
    records.write(about | {"ratio": 2.0})
    with pytest.raises(RuntimeError, match="no kernel"), providers.or_absent(about, True):
        raise RuntimeError("no kernel")
    (record,) = recorded()
    assert record["absent"] == "RuntimeError: no kernel"
    assert "ratio" not in record


def test_every_provider_of_ours_is_known_as_such():
    timed = {name for _, name in every_forward()} | {name for *_, name in [*bench_latency.CUDA, *bench_memory.CUDA]}
    assert {name for name in timed if name.startswith("fastbert")} == set(providers.OURS)


@pytest.mark.parametrize("provider", [*providers.PROVIDERS, providers.HOST_MASK])
def test_a_full_batch_has_no_mask(provider):
    full, ragged = (providers.batch_of(case, provider) for case in (Case("toy", 1, 16), TOY))
    needs_one = provider.startswith(UNPADDED) or provider == providers.HOST_MASK
    assert ("attention_mask" in full) == needs_one
    assert "attention_mask" in ragged


def test_a_compiled_peer_has_no_mask_inside_where_the_batch_is_full(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    full = Case("toy", 1, 16)
    for case in (full, TOY):
        providers.model_of(case, f"{BASELINE}-compiled")
    assert [model.config._attn_implementation for model in compiled] == [providers.MASKLESS, "sdpa"]
    # Nothing makes a mask for it, whatever it is given.
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    batch = workloads.inputs(TOY)
    with torch.no_grad():
        for model in compiled:
            model(**batch)
    assert [mask is None for mask in masks] == [True, True, False, False]
    # Of a full batch the result is the baseline's.
    with torch.no_grad():
        found, expected = (
            model(**providers.batch_of(full, BASELINE)).last_hidden_state
            for model in (compiled[0], providers.model_of(full, BASELINE))
        )
    assert torch.equal(found, expected)


def test_graphs_have_to_be_captured(monkeypatch):
    model = providers.model_of(TOY, GRAPHED)
    monkeypatch.setattr(providers, "DEVICE", torch.device("cuda"))
    with pytest.raises(RuntimeError, match="no CUDA graph was captured"):
        providers.require_graphs(model, GRAPHED)
    model.forward._graphs[4, 32] = None
    providers.require_graphs(model, GRAPHED)
    providers.require_graphs(lambda: None, "fastbert")


def test_a_graphed_model_without_a_graph_is_not_timed(monkeypatch):
    for name in ("truth", BASELINE, GRAPHED):
        providers.uncompiled("toy", "float32", name)  # on this device
    monkeypatch.setattr(providers, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(fastbert, "backend", lambda name: nullcontext())
    with torch.no_grad(), pytest.raises(RuntimeError, match="no CUDA graph was captured"):
        providers.checked(TOY, GRAPHED)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_request_itself_is_checked(enabled, monkeypatch, recorded):
    request_of = bench_latency.request_of
    monkeypatch.setattr(bench_latency, "request_of", lambda *of: lambda: request_of(*of)() + 0.01)
    benchmark = Benchmark()
    benchmark.enabled = enabled
    with pytest.raises(ArithmeticError, match="errs by"):
        bench_latency.test_latency(benchmark, Case("toy", 1, 16), "host", "fastbert")
    assert len(recorded()) == enabled


def test_headlines_fit_into_500_seconds(bench_options):
    def planned_until(forwards: list, seconds: float, case: Case, provider: str) -> float:
        asked = [(each[0], each[-1]) for each in forwards]
        before = asked[: asked.index((case, provider)) + 1]
        modes = [providers.COMPILED.get(name, (None, None))[1] for _, name in before]
        return sum(seconds + providers.COMPILE_SECONDS[mode] for mode in modes)

    one, dense = (Case("base", *shape, dtype="bfloat16") for shape in ((1, 128), (256, 128)))
    share = bench_options.SUITES
    for how in ("compiled", "reduce-overhead", "max-autotune"):
        assert planned_until(bench_latency.CUDA, 2.5, one, f"{BASELINE}-{how}") <= 500 * share["latency"]
    for case, how in ((dense, "max-autotune"), (one, "compiled"), (one, "reduce-overhead")):
        assert planned_until(bench_model._gpu_forwards(), 1, case, f"{BASELINE}-{how}") <= 500 * share["model"]
    assert sum(share.values()) == pytest.approx(1)


def test_times_of_the_device(monkeypatch):
    """Events of a device that takes 1 ms for our call and 2 ms for the baseline's, and a host that takes no time."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    def taking(seconds):
        def call():
            now[0] += seconds

        return call

    monkeypatch.setattr(torch.cuda, "Event", Event)
    measured = timing.side_by_side(taking(1e-3), taking(2e-3), seconds=0.075, clock="device")
    assert (measured.clock, measured.calls) == ("device", 3)
    fields = measured.fields()
    assert fields["rounds"] == 10
    assert fields["median_s"] == pytest.approx(1e-3)
    assert fields["ratio"] == pytest.approx(2)
    assert 0 <= fields["host_s"] < 1e-3


def test_peak_memory_of_a_gpu(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 175)
    assert memory.peak_memory_bytes(lambda: None, torch.device("cuda")) == 75
    assert len(reset) == 1


def test_the_driver_is_recorded_where_it_is_known(monkeypatch):
    def answers(command, **_):
        return SimpleNamespace(stdout="580.159.04\n")

    def missing(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(machine.subprocess, "run", answers)
    assert machine._driver_version() == "580.159.04"
    monkeypatch.setattr(machine.subprocess, "run", missing)
    assert machine._driver_version() is None


def test_records_of_every_suite_and_their_report(recorded, monkeypatch, tmp_path, capsys):
    """Toy cases, timed on this CPU into a folder of the test's own, and a device's page of them."""
    for bench in (bench_model, bench_latency, bench_encode):
        monkeypatch.setattr(bench, "SECONDS_PER_CASE", 0.01)
    for name in ("fastbert", BASELINE):
        benchmark = Benchmark()
        bench_model.test_forward(benchmark, TOY, name)
        (record,) = (record for record in recorded() if record["suite"] == "model" and record["provider"] == name)
        assert statistics.median(benchmark.shown) == pytest.approx(record["median_s"])
        bench_latency.test_latency(Benchmark(), Case("toy", 1, 16), "host", name)
        for case in (bench_encode.TOY[-1][0], bench_encode.TOY[0][0]):
            bench_encode.test_encode(Benchmark(), case, bench_encode.BASELINE if name == BASELINE else name)
        config = SimpleNamespace(getoption=lambda _: False)
        bench_memory.test_memory(SimpleNamespace(config=config), bench_memory.TOY[0][0], name)
    found = {(record["suite"], record["provider"]): record for record in recorded()}
    assert len(found) == 8
    assert found["model", "fastbert"]["clock"] == "host"
    assert found["model", "fastbert"]["rounds"] >= timing.LEAST_ROUNDS
    assert found["model", BASELINE]["error_ratio"] == 1
    request = found["latency", "fastbert"]
    assert request["p50_s"] == pytest.approx(request["median_s"])
    assert request["p50_s"] <= request["p90_s"] <= request["p99_s"]
    assert found["encode", "fastbert"]["texts_per_s"] == pytest.approx(8 / found["encode", "fastbert"]["median_s"])
    (host,) = (x for x in recorded() if x["case"].get("call") == "host" and x["provider"] == "fastbert")
    assert host["of_tokenizer"] > 0.5
    assert host["tokenizer_threads"] >= 1
    assert found["memory", "fastbert"]["peak_bytes"] > 0

    readme = tmp_path / "README.md"
    readme.write_text("a GPU's\n")
    monkeypatch.setattr(report, "README", readme)
    report.main()
    assert readme.read_text() == "a GPU's\n"
    (page,) = (path.read_text() for path in tmp_path.glob("*/README.md"))
    for heading in ("The model's forward", "One text, as a user waits for it", "Sentences", "Peak memory"):
        assert f"## {heading}" in page
    assert "toy 1x16 full, ids on the host" in page
    assert "| encode minilm texts 8 mean tokens 50 batch 4 sorted float32 |" in page
    assert "\n| toy 3x24 50% filled | 1.00 |" in page.replace(f"{found['model', 'fastbert']['ratio']:.2f}", "1.00")
    assert "The roof" not in page
    assert "## Absent" not in page
    assert "latency.svg" in capsys.readouterr().out


def gpu_records() -> list[dict]:
    """Of every forward of a GPU's run, with made-up times by which fastbert loses the smallest and wins the others."""
    machine = {
        "device": "NVIDIA H200", "threads": 16, "torch": "2.11.0", "transformers": "5.17.0", "triton": "3.6.0",
        "driver": "580.1", "python": "3.12.3", "commit": "abc1234", "load": 0.1, "date": "2026-12-01T00:00:00+00:00",
    }  # fmt: skip
    speeds = {"fastbert": 2.0, GRAPHED: 4.0, "transformers-eager": 0.5, BASELINE: 1.0, UNPADDED: 1.5}
    found = []
    for case, provider in bench_model._gpu_forwards():
        record = providers.about("model", "latency", dataclasses.asdict(case) | {"tokens": 1}, provider)
        if provider == UNPADDED and case.dtype == "float32":
            found.append(machine | record | {"absent": "RuntimeError: only 16 | bits"})
            continue
        ratio = speeds.get(provider, 3.0)
        baseline_s = case.batch * case.seq_len * 1e-6
        if provider == "fastbert" and case == Case("base", 8, 16, dtype="bfloat16"):
            ratio = 0.75
        seconds = baseline_s / ratio
        times = {"median_s": seconds, "q20_s": seconds, "q80_s": seconds, "baseline_median_s": baseline_s}
        found.append(
            machine | record | times | {"ratio": ratio, "rounds": 9, "error": 0.1, "error_ratio": 1.1, "of_roof": 0.42}
            | {"clock": "device", "calls": 1, "host_s": seconds if case.batch == 1 else seconds / 10}
        )  # fmt: skip
    kernel = {"suite": "kernels", "kind": "kernel", "case": {"op": "pool", "model": "base", "tokens": 128}}
    times = {
        "median_s": 2e-6,
        "q20_s": 2e-6,
        "q80_s": 2e-6,
        "baseline_median_s": 1e-6,
        "rounds": 30,
        "error_ratio": None,
    }
    found.append(machine | kernel | times | {"provider": "fastbert", "baseline": "eager", "ratio": 0.5, "of_roof": 0.1})
    found.append(machine | kernel | {"provider": "compiled", "baseline": "eager", "wrong": "errs by 1, eager by 0"})
    return found


def test_the_report_of_a_gpu(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    for suite in ("model", "kernels"):
        lines = [json.dumps(record) for record in gpu_records() if record["suite"] == suite]
        (folder / f"{suite}.jsonl").write_text("\n".join(lines) + "\n")
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(("before", *report.FORWARDS, "after")))
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", readme)
    report.main()
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "fill.svg", "kernels.jsonl", "model.jsonl", "seq_len.svg",
    ]  # fmt: skip
    page = (folder / "README.md").read_text()
    sections = {part.partition("\n")[0]: part.splitlines() for part in page.split("\n## ")}

    rows = [line for line in sections["The model's forward"] if line.startswith("| ")][2:]
    assert len(rows) == sum(provider in ("fastbert", GRAPHED) for _, provider in bench_model._gpu_forwards())
    columns = next(line for line in sections["The model's forward"] if line.startswith("| case")).split(" | ")
    ratios = [float(row.split(" | ")[columns.index("best peer / ours")]) for row in rows]
    assert ratios == sorted(ratios)
    assert rows[0].startswith("| base 8x16 full bfloat16 | 1 | fastbert |")
    assert ratios[0] == 0.5  # 0.75 beside unpadded-varlen's 1.5
    assert "| 42% |" in rows[0]
    assert "| host |" in next(row for row in rows if row.startswith("| base 1x128 full bfloat16"))
    assert "host" not in rows[0]

    assert "| eager | 0.00100 | 0.50 | 0.50 | 10% |" in "\n".join(sections["Kernels"])
    absent = "\n".join(sections["Absent"])
    assert (
        "| model | unpadded-varlen | RuntimeError: only 16 \\| bits | base 32x128 full; base 32x128 50% filled |"
        in absent
    )
    assert "| kernels | compiled | errs by 1, eager by 0 | pool base tokens 128 |" in absent
    assert "| MLPerf, as published | INT8, 99 % of float32's accuracy | H200 | 9164 |" in page
    assert "| fastbert-graphed | bfloat16 | NVIDIA H200 | 10417 |" in page  # 4 / (384e-6)
    speeds = "\n".join(sections["Every provider's forwards"])
    assert "| base 8x16 full bfloat16 | 0.75 | 4.00 |  | 1.50 |" in speeds

    assert "| The model's forward | fastbert | 40 | 6 | 1 | 0.50 | base 8x16 full bfloat16 | 2.00 |" in page
    assert "| The model's forward | fastbert-graphed | 40 | 0 | 0 | 1.33 |" in page
    before, table = readme.read_text().split(report.FORWARDS[0])
    table, after = table.split(report.FORWARDS[1])
    assert (before.strip(), after.strip()) == ("before", "after")
    row = "| base 1x128 full bfloat16 | 0.128 | 0.0640 | 0.0320 | transformers-sdpa-reduce-overhead | **0.67** |"
    assert row in table
    assert "`fastbert` loses 6 of 40, 1 of those bound by the host; `fastbert-graphed` loses 0 of 40: " in table
    assert "[the page](nvidia-h200/README.md)" in table
    assert "](nvidia-h200/fill.svg)" in table
    assert "8x16" not in table
    assert "driver 580.1" in table


def test_a_peers_time_agrees_with_its_ratio():
    """Of a host that was half as fast while the peer had its turn with the baseline."""
    of = {
        "fastbert": {"median_s": 3e-3, "baseline_median_s": 4e-3, "ratio": 4 / 3},
        UNPADDED: {"median_s": 4e-3, "baseline_median_s": 8e-3, "ratio": 2.0},
    }
    of = {name: {"case": {}, "baseline": BASELINE} | record for name, record in of.items()}
    row = report.row_of(report.Comparison("model", "a case", of), "fastbert")
    assert (row["ms"], row["its ms"], row["best peer / ours"]) == ("3.00", "2.00", "0.67")


def test_the_page_says_how_evenly_the_host_worked():
    lines = [record for record in gpu_records() if record["suite"] == "model"]
    baselines = [record for record in lines if record["provider"] == BASELINE and "ratio" in record]
    full = [record for record in baselines if report.case_of(record).fill == 1 and record["case"]["model"] == "base"]
    for record in baselines:
        record["host_s"] = 9.0  # of masks that somebody reads
    for place, record in enumerate(full):
        record["host_s"] = 4e-3 + place * 1e-4 if record["case"]["dtype"] == "bfloat16" else 20.0
    pace = report.pace(report.by_case(lines, "latency"))
    assert f"{BASELINE}'s full batches of base in bfloat16" in pace
    issued = [record["host_s"] for record in full if record["host_s"] < 1]
    least, largest = min(issued), max(issued)
    assert f" in {report.milliseconds(least)} to {report.milliseconds(largest)} ms." in pace
    assert report.pace({TOY: {BASELINE: {"clock": "host"}}}) == ""


def test_the_page_names_the_roof():
    roofs = {"flops_per_s": {"float32": 124.4e12, "bfloat16": 721.8e12}, "bytes_per_s": 2.65e12}
    assert report.roof([{"device": "CPU"}]) == ""
    earlier = report.roof([{"roofs": roofs}, {}])
    assert "in TFLOP/s 124 in float32, 722 in bfloat16; in TB/s 2.65." in earlier
    assert "medians under load, the copy by memcpy" in earlier
    assert (records.RESULTS / "device" / report.ROOFS.partition("#")[0]).resolve().exists()
    better = {"flops_per_s": {"float32": 130e12, "bfloat16": 788e12}, "bytes_per_s": 4.2e12}
    found = report.roof([{"roofs": better | {"sustained": roofs}}, {"roofs": better | {"sustained": better}}])
    assert "124 to 130 in float32, 722 to 788 in bfloat16; in TB/s 2.65 to 4.20." in found.partition("sustained")[2]
    assert "in TFLOP/s 130 in float32, 788 in bfloat16; in TB/s 4.20." in found


def test_what_failed_of_ours_is_the_first_loss_of_the_page():
    lines = [record for record in gpu_records() if record["suite"] == "model"]
    (place,) = (
        place
        for place, record in enumerate(lines)
        if report.case_of(record) == Case("base", 8, 64, dtype="bfloat16") and record["provider"] == "fastbert"
    )
    passed = report.page(lines, {})
    timed = {"ratio", "median_s", "q20_s", "q80_s", "baseline_median_s", "rounds", "of_roof", "clock", "host_s"}
    lines[place] = {name: x for name, x in lines[place].items() if name not in timed} | {"absent": "errs by 1"}
    failed = report.page(lines, {})
    assert "failed |" not in passed
    section = failed.partition("## The model's forward")[2].splitlines()
    columns, row = (line.split(" | ") for line in (section[2], section[4]))
    assert row[0] == "| base 8x64 full bfloat16"
    assert row[columns.index("best peer / ours")] == "failed"
    assert columns == passed.partition("## The model's forward")[2].splitlines()[2].split(" | ")

    def summary(page):
        return next(line for line in page.splitlines() if line.startswith("| The model's forward")).split(" | ")

    assert summary(failed)[1:3] == summary(passed)[1:3] == ["fastbert", "40"]
    assert int(summary(failed)[3]) == int(summary(passed)[3]) + 1
    assert summary(failed)[5:7] == ["failed", "base 8x64 full bfloat16"]
    assert "| model | fastbert | errs by 1 | base 8x64 full bfloat16 |" in failed


def test_a_sweep_needs_points():
    cases_of_three = {Case("base", 8, seq_len): {} for seq_len in (16, 32, 64)}
    assert plots.sweep(cases_of_three, "seq_len") == []
    cases_of_four = {Case("base", 8, 128): {}, Case("base", 1, 8): {}} | cases_of_three
    assert [case.seq_len for case in plots.sweep(cases_of_four, "seq_len")] == [16, 32, 64, 128]


def test_no_records_make_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="run `pytest bench` first"):
        report.main()


def test_the_rates_of_a_gpu(monkeypatch):
    roofs = Roofs({"float32": 1e12}, 1e12)
    sustained = Roofs({"float32": 5e11}, 9e11)
    monkeypatch.setattr(device_timing, "roofs", lambda timer: device_timing.MeasuredRoofs(roofs, sustained))
    assert bench_model._rates(TOY, 1.0) == {}
    monkeypatch.setattr(bench_model, "DEVICE", torch.device("cuda"))
    rates = bench_model._rates(TOY, 1.0)
    work = workloads.forward_work(transformers.BertConfig(**providers.SIZES["toy"]), TOY)
    assert rates["flops_per_s"] == work.flops
    assert rates["of_roof"] == work.seconds("float32", roofs)
    assert rates["roofs"] == {
        "flops_per_s": {"float32": 1e12}, "bytes_per_s": 1e12, "float32_precision": "ieee",
        "sustained": {"flops_per_s": {"float32": 5e11}, "bytes_per_s": 9e11},
    }  # fmt: skip


def test_tokens_tell_kernels_apart_but_not_batches():
    kernels = [{"op": "pool", "tokens": tokens} for tokens in (128, 4096)]
    assert records.about(kernels[0]) != records.about(kernels[1])
    batches = [dataclasses.asdict(TOY) | {"tokens": tokens} for tokens in (36, 37)]
    assert records.about(batches[0]) == records.about(batches[1])


def test_the_readme_shows_what_the_gpus_records_say(tmp_path):
    overviews = []
    for path in sorted(records.RESULTS.glob("*/model.jsonl")):
        lines = list(records.read(path))
        if not report.on_cpu(lines[0]):
            folder = path.parent.relative_to(ROOT).as_posix()
            overviews.append(report.overview(lines, folder, plots.draw(report.by_case(lines, "latency"), tmp_path)))
    assert overviews
    begin, end = report.FORWARDS
    assert (ROOT / "README.md").read_text().partition(begin)[2].partition(end)[0].strip() == "\n\n".join(overviews)


def test_sentences_were_encoded_as_fast_as_promised():
    """Sorted by length never slower than sentence-transformers by itself, in their own order 1.2 times as fast."""
    promised = {"sorted": 1.0, "given": 1.2}
    encoded = [record for path in records.RESULTS.glob("*/encode.jsonl") for record in records.read(path)]
    ours = [record for record in encoded if record["provider"] == "fastbert"]
    assert {record["case"]["order"] for record in ours} == promised.keys()
    for record in ours:
        assert record["ratio"] >= promised[record["case"]["order"]], record


def test_a_readme_without_the_marks_is_left_as_it_is(monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no marks\n")
    monkeypatch.setattr(report, "README", readme)
    with pytest.raises(ValueError, match="README.md has no <!-- bench:begin -->"):
        report.between(report.FORWARDS, readme.read_text(), ["table"])


def test_the_pages_show_what_the_records_say(tmp_path):
    folders = sorted({path.parent for path in records.RESULTS.glob("*/*.jsonl")})
    assert folders
    for folder in folders:
        lines = [record for path in sorted(folder.glob("*.jsonl")) for record in records.read(path)]
        drawn = plots.draw(report.by_case(lines, "latency"), tmp_path)
        assert (folder / "README.md").read_text() == report.page(lines, drawn)
        assert all((folder / name).exists() for name in drawn)


@pytest.mark.parametrize(
    ("limit", "status", "verdict"), [(1e-5, 0, "gives transformers' embeddings"), (0.0, 1, "WRONG")]
)
def test_the_demo(limit, status, verdict, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NUM_DOCSTRINGS", 8)
    monkeypatch.setattr(demo, "BATCH_SIZE", 4)
    monkeypatch.setattr(demo, "LARGEST_DIFFERENCE", limit)
    assert demo.main() == status
    printed = capsys.readouterr().out
    assert verdict in printed
    assert "8 docstrings" in printed
