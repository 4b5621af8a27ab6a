"""transformers' Trainer trains our classes and optimized models as it trains transformers' models."""

import ast
import os
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from cases import SEQ_LEN, VOCAB, pair, tiny_config, with_random_weights
from launch_names import launch_names
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, Trainer, TrainingArguments
from two_processes import end_together

import fastbert

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD = "BertForSequenceClassification"
PACKAGES = ("asyncio", "email", "importlib", "unittest")


class Task(NamedTuple):
    """What the first layer of MiniLM learns from docstrings.

    row: tokenizer, docstring, index of its package -> a row of the data set. trained_on, held_out: docstrings of each
    package.
    """

    head: str
    num_labels: int
    row: Callable[[Any, str, int], dict]
    trained_on: int
    held_out: int
    collator: type
    batch_size: int
    learning_rate: float
    num_epochs: int


def with_package(tokenizer, text: str, package: int) -> dict:
    """Return a text whose label is its package."""
    return dict(tokenizer(text, truncation=True, max_length=32), labels=package)


def with_lengths(tokenizer, text: str, package: int) -> dict:
    """Return a text in which each token's label tells whether the token before it has at least four characters."""
    row = dict(tokenizer(text, truncation=True, max_length=24))
    long = [int(len(token) >= 4) for token in tokenizer.convert_ids_to_tokens(row["input_ids"])]
    return row | {"labels": [-100, *long[:-2], -100]}


PACKAGE_OF_TEXT = Task(HEAD, len(PACKAGES), with_package, 110, 40, DataCollatorWithPadding, 16, 1e-3, 2)
# Few short texts, as the interpreter is slow, and a task that ten steps teach. It needs attention.
LENGTH_BEFORE = Task(
    "BertForTokenClassification", 2, with_lengths, 10, 4, DataCollatorForTokenClassification, 4, 2e-3, 1
)
LARGEST = max(task.trained_on + task.held_out for task in (PACKAGE_OF_TEXT, LENGTH_BEFORE))


@cache
def docstrings_of_packages() -> dict[str, list[str]]:
    """Return distinct docstrings of each package of the standard library, shuffled."""
    library, seen, found = Path(sysconfig.get_path("stdlib")), set(), {}
    for package in PACKAGES:
        texts = []
        for path in sorted((library / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    texts.append(ast.get_docstring(node))
        found[package] = [text for text in dict.fromkeys(texts) if text and text not in seen]
        seen.update(texts)
        random.Random(0).shuffle(found[package])
        assert len(found[package]) >= LARGEST
    return found


class Run(NamedTuple):
    losses: list[float]
    evaluation: dict[str, float]
    model: nn.Module
    launches: Counter[str]


def accuracy(predicted) -> dict[str, float]:
    kept = predicted.label_ids != -100
    return {"accuracy": (predicted.predictions.argmax(-1) == predicted.label_ids)[kept].mean().item()}


@pytest.fixture(scope="module")
def fine_tuned(minilm_path, tokenizer, tmp_path_factory):
    """Return a function that trains the first layer of MiniLM for a task. seed: of dropout."""

    def rows(task: Task, start: int, stop: int) -> list[dict]:
        return [
            task.row(tokenizer, text, index)
            for index, package in enumerate(PACKAGES)
            for text in docstrings_of_packages()[package][start:stop]
        ]

    @cache
    def fine_tune(kind: str, dropout: float, task: Task = PACKAGE_OF_TEXT, seed: int = 0) -> Run:
        transformers.set_seed(0)
        package = fastbert if kind in ("our class", "in kernels") else transformers
        model = getattr(package, task.head).from_pretrained(
            minilm_path,
            num_labels=task.num_labels,
            num_hidden_layers=1,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        # Otherwise the optimizer's step for the embeddings would take most of the time.
        model.bert.embeddings.requires_grad_(False)
        if kind == "optimized":
            fastbert.optimize(model)
        trainer = Trainer(
            model,
            arguments(
                tmp_path_factory.mktemp("run"),
                per_device_train_batch_size=task.batch_size,
                per_device_eval_batch_size=task.held_out,
                learning_rate=task.learning_rate,
                num_train_epochs=task.num_epochs,
                seed=seed,
                data_seed=0,
            ),
            train_dataset=rows(task, 0, task.trained_on),
            eval_dataset=rows(task, task.trained_on, task.trained_on + task.held_out),
            data_collator=task.collator(tokenizer),
            compute_metrics=accuracy,
        )
        with fastbert.backend("triton" if kind == "in kernels" else "auto"), launch_names() as names:
            trainer.train()
            return Run(losses_of(trainer), trainer.evaluate(), model, Counter(names))

    return fine_tune


def arguments(folder, **settings) -> TrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(folder, **defaults | settings)


def losses_of(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


KINDS = ["our class", "optimized"]


@pytest.mark.xdist_group("fine-tuning")
@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_follows_transformers_step_by_step(fine_tuned, kind):
    run, expected = fine_tuned(kind, dropout=0.0), fine_tuned("transformers", dropout=0.0)
    assert len(run.losses) == 2 * -(-len(PACKAGES) * PACKAGE_OF_TEXT.trained_on // 16)
    assert run.losses == pytest.approx(expected.losses, abs=1e-3)
    assert run.evaluation["eval_accuracy"] == pytest.approx(expected.evaluation["eval_accuracy"], abs=0.01)
    assert run.evaluation["eval_loss"] == pytest.approx(expected.evaluation["eval_loss"], abs=1e-3)
    assert sum(run.losses[-8:]) < 0.6 * sum(run.losses[:8])
    # There are four classes.
    assert run.evaluation["eval_accuracy"] > 0.6
    assert {row.backend for row in fastbert.explain(run.model.eval())} == {"eager"}
    assert not run.launches


@pytest.mark.xdist_group("fine-tuning")
def test_fine_tuning_with_dropout_learns(fine_tuned):
    run, without = fine_tuned("our class", dropout=0.1), fine_tuned("our class", dropout=0.0)
    assert run.losses != pytest.approx(without.losses, abs=1e-2)
    assert sum(run.losses[-8:]) < 0.8 * sum(run.losses[:8])
    assert run.evaluation["eval_accuracy"] > 0.5


in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter, on the CPU")


def check_learned_in_kernels(run: Run) -> None:
    """Every step and the evaluation ran in kernels, and the model learned."""
    steps = len(PACKAGES) * LENGTH_BEFORE.trained_on // LENGTH_BEFORE.batch_size
    assert len(run.losses) == steps
    launches = [run.launches[f"_attention_{name}_kernel"] for name in ("fwd", "bwd_dkv")]
    assert launches == [steps + len(PACKAGES), steps]
    assert run.launches["_residual_layer_norm_kernel"] == run.launches["_layer_norm_backward_kernel"] == 2 * steps
    assert sum(run.losses[-4:]) < 0.8 * sum(run.losses[:4])
    assert run.evaluation["eval_accuracy"] > 0.75  # 59 % of the labels are equal


@in_the_interpreter
@pytest.mark.xdist_group("fine-tuning")
def test_fine_tuning_in_kernels_follows_transformers_step_by_step(fine_tuned):
    run, expected = (fine_tuned(kind, 0.0, LENGTH_BEFORE) for kind in ("in kernels", "transformers"))
    check_learned_in_kernels(run)
    assert run.losses == pytest.approx(expected.losses, abs=2e-4)
    for name in ("eval_accuracy", "eval_loss"):
        assert run.evaluation[name] == pytest.approx(expected.evaluation[name], abs=1e-3)


@in_the_interpreter
@pytest.mark.xdist_group("fine-tuning")
def test_fine_tuning_in_kernels_with_dropout_is_within_the_noise_of_transformers(fine_tuned):
    """The noise is that of other seeds. Batches are the same."""
    run, without = (fine_tuned("in kernels", dropout, LENGTH_BEFORE) for dropout in (0.1, 0.0))
    check_learned_in_kernels(run)
    assert run.losses != pytest.approx(without.losses, abs=1e-3)
    expected = [fine_tuned("transformers", 0.1, LENGTH_BEFORE, seed) for seed in range(8)]
    curves = torch.tensor([[*each.losses, each.evaluation["eval_loss"]] for each in expected])
    found = torch.tensor([*run.losses, run.evaluation["eval_loss"]])
    deviations = (found - curves.mean(0)) / curves.std(0)
    assert deviations.square().mean() < 4


def tiny(kind: str, head: str = HEAD, **settings) -> nn.Module:
    ours, theirs = pair(head, **settings)
    return {"our class": lambda: ours, "optimized": lambda: fastbert.optimize(theirs)}.get(kind, lambda: theirs)()


def dataset(head: str = HEAD, count: int = 16, ragged: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(1, VOCAB, (SEQ_LEN,), generator=generator)
        kept = torch.arange(SEQ_LEN) < (3 + index % (SEQ_LEN - 3) if ragged else SEQ_LEN)
        labels = torch.where(kept, ids.roll(1), -100) if head == "BertForMaskedLM" else ids[0] % 2
        rows.append({"input_ids": ids, "attention_mask": kept.long(), "labels": labels})
    return rows


def train(model: nn.Module, folder, rows=None, resume: str | None = None, **settings) -> Trainer:
    transformers.set_seed(0)
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3}
    trainer = Trainer(model, arguments(folder, **defaults | settings), train_dataset=rows or dataset())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def check_weights(model: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    start = dict(tiny("transformers", type(expected).__name__).named_parameters())
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        # The gradient of a key's bias is zero but for rounding, which Adam scales up.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
            assert not torch.equal(a, start[name]), f"{name} was not trained"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [HEAD, "BertForMaskedLM"])
def test_ragged_texts_train_every_weight_as_in_transformers(head, kind, tmp_path):
    rows = dataset(head, ragged=True)
    trainers = [train(tiny(k, head), tmp_path, rows, learning_rate=1e-3) for k in (kind, "transformers")]
    assert losses_of(trainers[0]) == pytest.approx(losses_of(trainers[1]), abs=1e-3)
    check_weights(*(trainer.model for trainer in trainers), tolerance=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_transformers_where_no_text_is_padded(kind, tmp_path):
    """With padding, fastbert draws fewer random numbers: only for kept tokens."""
    dropout = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    trainer, expected = (train(tiny(k, **dropout), tmp_path) for k in (kind, "transformers"))
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-3)
    assert losses_of(trainer) != pytest.approx(losses_of(train(tiny(kind), tmp_path)), abs=1e-2)


@pytest.mark.parametrize(("first", "second"), [(k, k) for k in KINDS] + [("transformers", k) for k in KINDS])
def test_a_resumed_run_ends_where_one_in_one_go_does(first, second, tmp_path):
    """Also if transformers' own model wrote the checkpoint: parameters have the same order."""
    in_one_go = train(tiny(second), tmp_path / "whole")
    train(tiny(first), tmp_path / "part", save_strategy="steps", save_steps=3)
    resumed = train(tiny(second), tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-3"))
    assert resumed.state.global_step == in_one_go.state.global_step == 8
    assert losses_of(resumed)[3:] == pytest.approx(losses_of(in_one_go)[3:], abs=1e-5)
    check_weights(resumed.model, in_one_go.model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_is_loaded_and_the_saved_model_is_transformers(kind, tmp_path):
    transformers.set_seed(0)
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "eval_loss"}
    trainer = Trainer(
        tiny(kind),
        # The learning rate is so high that every later epoch is worse.
        arguments(tmp_path, **settings, load_best_model_at_end=True, learning_rate=0.3, num_train_epochs=2),
        train_dataset=dataset(),
        eval_dataset=dataset(),
    )
    trainer.train()
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-5)
    trainer.save_model(tmp_path / "saved")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    for (name, a), (_, b) in zip(loaded.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_step(kind, tmp_path):
    plain = train(tiny(kind), tmp_path)
    checkpointed = train(tiny(kind), tmp_path, gradient_checkpointing=True)
    assert checkpointed.model.bert.encoder.layer[0].gradient_checkpointing
    assert losses_of(checkpointed) == pytest.approx(losses_of(plain), abs=1e-5)
    check_weights(checkpointed.model, plain.model, tolerance=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_to_bfloat16(kind, tmp_path):
    rows = dataset(ragged=True)
    settings = {"bf16": True, "num_train_epochs": 4}
    trainer, expected = (train(tiny(k), tmp_path, rows, **settings) for k in (kind, "transformers"))
    wide = losses_of(train(tiny("transformers"), tmp_path, rows, num_train_epochs=4))
    assert losses_of(expected) != pytest.approx(wide, abs=1e-4)
    assert losses_of(trainer) == pytest.approx(wide, abs=0.05)
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=0.05)
    assert losses_of(trainer)[-1] < 0.7 * losses_of(trainer)[0]
    assert {x.dtype for x in trainer.model.parameters()} == {torch.float32}


def test_a_model_that_was_trained_in_bfloat16_is_optimized_and_one_that_is_optimized_is_restored(tmp_path):
    """After training, accelerate's autocast still wraps the model's forward."""
    model = train(tiny("transformers"), tmp_path, bf16=True).model.eval()
    assert "forward" in vars(model)
    inputs = {name: x[None] for name, x in dataset(count=1)[0].items()}
    with torch.no_grad():
        before = model(**inputs).logits
        after = fastbert.optimize(model)(**inputs).logits
        torch.testing.assert_close(after, before, atol=0.03, rtol=0.03)
        assert {row.backend for row in fastbert.explain(model)} == {"eager"}
        assert torch.equal(fastbert.restore(model)(**inputs).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_steps_are_one_step_of_their_size(kind, tmp_path):
    whole = train(tiny(kind), tmp_path)
    parts = train(tiny(kind), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert parts.state.global_step == whole.state.global_step == 8
    assert losses_of(parts) == pytest.approx(losses_of(whole), abs=1e-4)
    check_weights(parts.model, whole.model, tolerance=1e-4)


class OwnClassifier(transformers.BertForSequenceClassification):
    """A user's class. Its forward accepts keywords, so Trainer passes num_items_in_batch."""


class OwnLoss(transformers.BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        pooled = self.bert(input_ids, attention_mask, **kwargs).pooler_output[:, :2]
        return {"loss": nn.functional.cross_entropy(pooled, labels), "logits": pooled}


@pytest.mark.parametrize("own", [OwnClassifier, OwnLoss, transformers.BertLMHeadModel])
def test_models_around_an_optimized_encoder_train_as_before(own, tmp_path):
    """Trainer passes them num_items_in_batch, and they pass it to the encoder."""
    rows = dataset("BertForMaskedLM" if own is transformers.BertLMHeadModel else HEAD)
    losses = []
    for change in (lambda x: x, fastbert.optimize):
        torch.manual_seed(0)
        model = change(with_random_weights(own(tiny_config())))
        losses.append(losses_of(train(model, tmp_path, rows, gradient_accumulation_steps=2, num_train_epochs=3)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert len(set(losses[0])) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_and_are_saved_alone(kind, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    trainers = []
    for k in (kind, "transformers"):
        transformers.set_seed(1)
        config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        trainers.append(train(get_peft_model(tiny(k), config), tmp_path / k, learning_rate=1e-2))
    assert losses_of(trainers[0]) == pytest.approx(losses_of(trainers[1]), abs=1e-3)
    assert losses_of(trainers[0])[-1] < losses_of(trainers[0])[0]
    trainers[0].save_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny("transformers"), tmp_path / "saved")
    weights = trainers[0].model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in loaded.state_dict().items() if "lora" in name)


def train_as_one_of_two_processes(folder: str) -> None:
    for kind in ("transformers", *KINDS):
        # By default Trainer multiplies the loss of transformers' classes by the number of processes.
        settings = {"average_tokens_across_devices": kind != "transformers", "per_device_train_batch_size": 2}
        trainer = train(tiny(kind), folder, dataset(ragged=True), ddp_backend="gloo", **settings)
        assert trainer.args.world_size == 2
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        rank = trainer.args.process_index
        torch.save((losses_of(trainer), trainer.model.state_dict()), f"{folder}/{kind}-{rank}.pt")
    end_together()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The losses and weights at the end of each of two processes, by kind and rank."""
    folder = tmp_path_factory.mktemp("two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return {
        (kind, rank): torch.load(folder / f"{kind}-{rank}.pt") for kind in ("transformers", *KINDS) for rank in (0, 1)
    }


@pytest.mark.xdist_group("two-processes")
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_with_the_weights_of_transformers(kind, two_processes, tmp_path):
    weights = [two_processes[kind, rank][1] for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*(x.values() for x in weights), strict=True))
    losses, expected = two_processes["transformers", 0]
    assert two_processes[kind, 0][0] == pytest.approx(losses, abs=1e-4)
    alone = train(tiny(kind), tmp_path, dataset(ragged=True))
    start = tiny("transformers").state_dict()
    for name, value in weights[0].items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4, msg=name)
            torch.testing.assert_close(value, alone.model.state_dict()[name], atol=1e-3, rtol=1e-3, msg=name)
            assert not torch.equal(value, start[name]), name


if __name__ == "__main__":
    train_as_one_of_two_processes(sys.argv[1])
