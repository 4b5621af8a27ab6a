"""The bench of training steps at toy sizes: what it refuses to time, what it records, and the page of its records."""

import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import bench_training
import providers
import pytest
import records
import report
import torch
import training_steps
from providers import BASELINE, OURS_COMPILED
from workloads import TrainingCase

import fastbert

FLOAT32, AUTOCAST = (TrainingCase("toy", 4, 24, 0.5, dtype) for dtype in ("float32", "bfloat16"))
DROPPED = TrainingCase("toy", 4, 24, 0.5, dropout=0.1)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function that returns the records written by the test, which go to a temporary folder."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_training, "SECONDS_PER_CASE", 0.01)
    return lambda: [record for path in tmp_path.glob("*/training.jsonl") for record in records.read(path)]


def run(case: TrainingCase, provider: str) -> list[float]:
    """Run the bench's test of a provider and return the seconds that pytest-benchmark shows."""
    shown = []

    def pedantic(function, rounds):
        before = bench_training.CLOCK()
        for _ in range(rounds):
            function()
            shown.append(bench_training.CLOCK() - before - sum(shown))

    bench_training.test_training(SimpleNamespace(enabled=True, group=None, pedantic=pedantic), case, provider)
    return shown


def spoil(monkeypatch, change) -> None:
    """Let `change` spoil each new model of fastbert."""
    model_of = training_steps.model_of

    def spoiled(case, name):
        model = model_of(case, name)
        if name == "fastbert":
            change(model)
        return model

    monkeypatch.setattr(training_steps, "model_of", spoiled)


def on_gradient(change):
    """Return a function that changes the gradient of one bias of a model."""
    return lambda model: model.bert.encoder.layer[1].output.LayerNorm.bias.register_hook(change)


def on_loss(change):
    """Return a function that lets a model return another loss."""

    def changed(module, inputs, outputs):
        outputs.loss = change(outputs.loss)
        return outputs

    return lambda model: model.register_forward_hook(changed)


WRONG = {
    "gradient": (AUTOCAST, on_gradient(lambda gradient: 1.1 * gradient), "errs by 1.0"),
    "gradient of NaN": (FLOAT32, on_gradient(lambda gradient: gradient * float("nan")), "errs by nan"),
    "no gradient": (FLOAT32, lambda model: model.classifier.bias.requires_grad_(False), "errs by inf"),
    "loss": (AUTOCAST, on_loss(lambda loss: loss + 0.01), "errs by 1.0"),
    "no dropout": (DROPPED, lambda model: model.eval(), "two seeds of dropout give the same loss"),
    "noise in place of dropout": (
        DROPPED,
        lambda model: on_loss(lambda loss: loss + 1e-5 * torch.rand(()))(model.eval()),
        "the gradients differ by only",
    ),
    "gradient of NaN with dropout": (
        DROPPED, on_gradient(lambda gradient: gradient * float("nan")), "the gradients err by nan",
    ),
    "loss of NaN with dropout": (DROPPED, on_loss(lambda loss: loss + loss.detach() * float("nan")), "losses are"),
    "dropout without a seed": (
        DROPPED, lambda model: model.register_forward_pre_hook(lambda *_: torch.seed() and None), "the same seed of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_step_is_not_timed(wrong, monkeypatch, recorded):
    case, change, said = WRONG[wrong]
    spoil(monkeypatch, change)
    with pytest.raises(ArithmeticError, match=said):
        run(case, "fastbert")
    (record,) = recorded()
    assert said in record["absent"]
    assert "ratio" not in record


def test_a_peer_need_not_repeat_its_dropout(monkeypatch):
    spoil(monkeypatch, WRONG["dropout without a seed"][1])
    step = training_steps.Step(DROPPED, "fastbert")
    with pytest.raises(ArithmeticError, match="the same seed of"):
        training_steps.require_dropout(DROPPED, step, repeats=True)
    training_steps.require_dropout(DROPPED, step, repeats=False)


def test_on_a_gpu_fastbert_must_run_in_its_kernels(monkeypatch):
    chosen = []
    monkeypatch.setattr(training_steps, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(training_steps, "Step", lambda case, provider: SimpleNamespace(backward=lambda: torch.ones(())))
    monkeypatch.setattr(training_steps, "errors", lambda case, step: {})
    monkeypatch.setattr(fastbert, "backend", lambda name: chosen.append(name) or nullcontext())
    for provider, expected in (("fastbert", ["triton"]), (BASELINE, []), (OURS_COMPILED, [])):
        chosen.clear()
        training_steps.checked(FLOAT32, provider)
        assert chosen == expected, provider


@pytest.mark.parametrize("provider", ["fastbert", "transformers-eager", BASELINE])
def test_a_step_trains_from_the_same_weights(provider):
    step = training_steps.Step(DROPPED, provider)
    before = {name: x.clone() for name, x in step.model.state_dict().items()}
    start = training_steps.Step(FLOAT32, BASELINE).model.state_dict()
    assert before.keys() == start.keys()
    assert all(torch.equal(x, start[name]) for name, x in before.items())
    step.backward()
    assert all(torch.equal(x, before[name]) for name, x in step.model.state_dict().items())
    step()
    assert not any(torch.equal(x, before[name]) for name, x in step.model.named_parameters())


def test_the_peak_of_a_step_includes_the_gradients():
    """Also if there were gradients before. It does not include the weights and the optimizer's state."""
    step = training_steps.Step(FLOAT32, "fastbert")
    weights = sum(parameter.nbytes for parameter in step.model.parameters())
    step()
    assert weights < step.peak_bytes() < 2 * weights
    assert step.peak_bytes() == step.peak_bytes()


def test_the_reference_is_made_in_parts(monkeypatch):
    case = TrainingCase("toy", 5, 24, 0.5)
    found = []
    for rows in (2, 5):
        training_steps._reference.cache_clear()
        monkeypatch.setattr(training_steps, "REFERENCE_ROWS", rows)
        found.append(training_steps._reference(case)[:2])
    (loss, gradients), (expected_loss, expected) = found
    training_steps._reference.cache_clear()
    torch.testing.assert_close(loss, expected_loss)
    assert len(gradients) == 5 + 2 * 15 + 4
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(gradient, expected[name])


def test_records_of_training_and_their_page(recorded, monkeypatch, tmp_path):
    for case in (DROPPED, AUTOCAST):
        for provider in ("fastbert", BASELINE):
            shown = run(case, provider)
            assert statistics.median(shown) == pytest.approx(recorded()[-1]["median_s"])
    ours, _, ours_exact, theirs = recorded()
    assert ours["case"] | {"tokens": 0} == {
        "model": "toy", "batch": 4, "seq_len": 24, "fill": 0.5, "dtype": "float32", "dropout": 0.1, "tokens": 0,
    }  # fmt: skip
    assert ours["ratio"] == pytest.approx(ours["baseline_median_s"] / ours["median_s"])
    assert ours["memory_ratio"] == ours["baseline_peak_bytes"] / ours["peak_bytes"]
    assert ours["memory_ratio"] != ours["ratio"]
    assert "error" not in ours
    assert theirs["error_ratio"] == theirs["memory_ratio"] == 1
    assert 0 < ours_exact["error_ratio"] < 4

    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "absent")  # must not be written for a CPU
    report.main()
    (page,) = (path.read_text() for path in tmp_path.glob("*/README.md"))
    section = page.partition("\n## A training step of BertForSequenceClassification\n")[2].partition("\n## ")[0]
    columns, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line
    )  # fmt: skip
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert rows.keys() == {"toy 4x24 50% filled, dropout 0.1", "toy 4x24 50% filled bfloat16 autocast, dropout 0"}
    row = rows["toy 4x24 50% filled, dropout 0.1"]
    assert row[f"{BASELINE} / ours"] == f"{ours['ratio']:.2f}"
    assert row[f"peak, {BASELINE} / ours"] == f"{ours['memory_ratio']:.2f}"
    assert row["ms"] == report.milliseconds(ours["median_s"])
    assert row["peak, MiB"] == f"{ours['peak_bytes'] / 2**20:.1f}"
    assert "\n## Every provider's training steps\n" in page
    assert "\n- A training step has float32 weights" in page


def test_steps_on_a_gpu():
    """Every case with every provider, the headline's first."""
    steps = bench_training._gpu_steps()
    cases = list(dict.fromkeys(case for case, _ in steps))
    everyone = [*bench_training.UNCOMPILED, f"{BASELINE}-compiled", OURS_COMPILED]
    assert sorted(map(str, steps)) == sorted(str((case, provider)) for case in cases for provider in everyone)
    assert {(case.fill, case.dropout) for case in cases} == {(1.0, 0.0), (1.0, 0.1), (0.5, 0.0), (0.5, 0.1)}
    assert {str(case).partition(" full")[0] for case in cases[:4]} <= {"base 32x128", str(cases[1]), str(cases[3])}
    assert steps[0] == (TrainingCase("base", 32, 128, 1.0, "bfloat16", 0.1), "fastbert")


def test_what_is_compiled_for_a_full_batch_makes_no_mask(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    for fill in (1.0, 0.5):
        for provider in (f"{BASELINE}-compiled", OURS_COMPILED):
            training_steps.Step(TrainingCase("toy", 4, 24, fill), provider)
    attention = [model.config._attn_implementation for model in compiled]
    assert attention == [providers.MASKLESS, "sdpa", "sdpa", "sdpa"]
