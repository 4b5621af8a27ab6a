"""`fastbert verify` and `fastbert bench` report planted faults, and nothing for a correct model."""

import math
from copy import deepcopy

import pytest
import torch
import transformers
from cases import HEADS, VOCAB, pair, tiny_config
from rich.console import Console

import fastbert
from fastbert import heads, ops, tokens
from fastbert.commands import benchmark, verify
from fastbert.commands.benchmark import GRAPHED, Benchmark, Case, WrongResults
from fastbert.commands.checkpoint import Checkpoint, describe_backends, local_or_hub, right_padding, select_device
from fastbert.commands.verify import CLASSES
from fastbert.ops import eager
from fastbert.testing import closeness

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet():
    """Silence transformers' warnings about weights that a checkpoint lacks."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model of a class, without a tokenizer, and return its folder."""

    def save(head: str = "BertModel", **settings) -> Checkpoint:
        _, theirs = pair(head, **settings)
        theirs.save_pretrained(tmp_path)
        return Checkpoint(str(tmp_path))

    return save


def verified(found: Checkpoint, *classes: str, dtype: str = "float32", **settings) -> list[verify.Verified]:
    return list(verify.verify(found, CPU, [dtype], classes, **settings))


def missed(found: list[verify.Verified]) -> set[str]:
    return {verdict.subject for each in found for verdict in each.verdicts if not verdict.holds}


def printed(*lines) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        for line in lines:
            console.print(line)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def test_minilm(minilm_path):
    found = list(
        verify.verify(
            Checkpoint(minilm_path), CPU, ["float32", "bfloat16"], ["BertModel", "BertForQuestionAnswering"], [(2, 16)]
        )
    )
    assert [(each.model_class, each.dtype) for each in found] == [
        (model_class, dtype)
        for model_class in ("BertModel", "BertForQuestionAnswering")
        for dtype in ("float32", "bfloat16")
    ]
    assert all(each.holds for each in found)
    assert [verdict.subject.removeprefix("BertModel ") for verdict in found[0].verdicts] == [
        "last_hidden_state", "pooler_output", "pool mean", "pool first", "hidden_states", "attentions",
    ]  # fmt: skip
    assert not found[0].missing
    assert found[2].missing == ["qa_outputs.bias", "qa_outputs.weight"]
    text = printed(verify.table(found), *verify.remarks(found))
    assert text.count(" ok\n") == 14
    assert "weights missing in the checkpoint are random, the same in both: BertForQuestionAnswering\n" in text
    assert "\nback end: eager (the tensors are on 'cpu' and the kernels need a CUDA device)\n" in text
    assert text.endswith("fastbert gives transformers' results here, all within the limit\n")


@pytest.mark.parametrize("head", HEADS)
def test_every_class_by_its_own_weights(head, saved):
    (found,) = verified(saved(head), head)
    assert found.holds, found
    assert not found.missing


@pytest.mark.parametrize("dtype", verify.DTYPES)
def test_every_class_by_an_encoders_weights(dtype, saved):
    found = verified(saved(), *CLASSES, dtype=dtype)
    assert [each.model_class for each in found] == list(HEADS) == list(CLASSES)
    assert not missed(found)
    assert all(each.missing for each in found[1:])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_labels": 1},
        {"num_labels": 5},
        {"num_labels": 2, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ],
    ids=str,
)
def test_problem_types(settings, saved):
    # These numbers of labels do not fit question answering, which has two, and multiple choice, which has one.
    found = verified(
        saved("BertForSequenceClassification", **settings),
        "BertForSequenceClassification", "BertForQuestionAnswering", "BertForMultipleChoice", dtype="float16",
    )  # fmt: skip
    assert not missed(found)
    assert not found[0].missing


def test_no_token_types_and_few_positions(saved):
    found = verified(saved(type_vocab_size=1, max_position_embeddings=4), *CLASSES)
    assert not missed(found)


def test_in_the_kernels(saved):
    with fastbert.backend("triton"):
        found = verified(saved(num_hidden_layers=1), "BertModel", "BertForTokenClassification", shapes=[(2, 5)])
    assert not missed(found)
    assert {each.backends for each in found} == {"triton"}


def test_a_kernel_that_errs_is_found(saved, monkeypatch):
    # an error of one in a thousand, with correct shapes and signs
    exact = eager.linear_residual_layer_norm
    monkeypatch.setattr(eager, "linear_residual_layer_norm", lambda x, *others: exact(x * 1.001, *others))
    found = verified(saved(), *CLASSES)
    assert not any(each.holds for each in found)
    assert missed(found) == {
        "BertModel last_hidden_state", "BertModel pooler_output", "BertModel hidden_states", "pool mean", "pool first",
        *CLASSES[1:],
    }  # fmt: skip
    text = printed(verify.table(found), *verify.remarks(found))
    assert text.count(" MISS\n") == 12
    assert "fastbert is WRONG here, beyond the limit: BertModel in float32, BertForPreTraining in float32, " in text


def test_a_weight_that_was_loaded_wrong_is_found(saved, monkeypatch):
    load = Checkpoint.pair

    def perturbed(self, model_class):
        ours, theirs, missing = load(self, model_class)
        with torch.no_grad():
            ours.base_model.encoder.layer[1].output.dense.bias[3] += 1e-2
        return ours, theirs, missing

    monkeypatch.setattr(Checkpoint, "pair", perturbed)
    found = verified(saved(), *CLASSES)
    assert not any(each.holds for each in found)


def test_padding_that_leaks_is_found(saved, monkeypatch):
    layout = tokens.layout_from_mask
    monkeypatch.setattr("fastbert.inputs.layout_from_mask", lambda mask, *others: layout(None, *others))
    (found,) = verified(saved(), "BertModel")
    wrong = {verdict.subject: verdict.where for verdict in found.verdicts if not verdict.holds}
    assert set(wrong) >= {"BertModel last_hidden_state", "BertModel pooler_output", "BertModel hidden_states"}
    assert "full" not in wrong["BertModel last_hidden_state"]


def test_a_loss_that_errs_is_found(saved, monkeypatch):
    forward = fastbert.BertForSequenceClassification.forward

    def with_another_loss(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss * 1.01
        return outputs

    monkeypatch.setattr(fastbert.BertForSequenceClassification, "forward", with_another_loss)
    (found,) = verified(saved("BertForSequenceClassification"), "BertForSequenceClassification")
    (verdict,) = found.verdicts
    assert not verdict.closeness.holds
    assert verdict.where == "loss"


@pytest.mark.parametrize("head", CLASSES[1:])
def test_a_projection_that_errs_with_many_rows_is_found(head, saved, monkeypatch):
    exact = heads.project

    def wrong_past_row_24(linear, x):
        y = exact(linear, x)
        y.flatten(0, -2)[24:] *= 1.01
        return y

    monkeypatch.setattr(heads, "project", wrong_past_row_24)
    (found,) = verified(saved(head), head)
    assert not found.holds


@pytest.mark.parametrize("mode", ["mean", "first"])
def test_pooling_that_errs_is_found(mode, saved, monkeypatch):
    exact = ops.pool

    def wrong(hidden, cu_seqlens, wanted, normalize=False, indices=None):
        # takes the first token of the next text
        longer = torch.cat([cu_seqlens[:1], (cu_seqlens[1:] + 1).clamp(max=cu_seqlens[-1])])
        return exact(hidden, longer if wanted == mode else cu_seqlens, wanted, normalize, indices)

    monkeypatch.setattr(ops, "pool", wrong)
    assert f"pool {mode}" in missed(verified(saved(), "BertModel"))


def test_a_mask_on_the_host_reaches_our_model_alone():
    class Model(torch.nn.Module):
        dtype = torch.float32
        device = torch.device("meta")

        def forward(self, attention_mask, input_ids, return_dict):
            return attention_mask.device.type, input_ids.device.type

    models = verify.Models(Model(), Model(), Model())
    batch = {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 2).long()}
    assert models(batch) == (("meta", "meta"),) * 3
    assert models(batch, mask_on_host=True) == (("cpu", "meta"), ("meta", "meta"), ("meta", "meta"))


@pytest.mark.parametrize("ours_too", [True, False])
def test_results_of_transformers_that_are_not_finite_are_reported(ours_too, saved, monkeypatch):
    load = Checkpoint.pair

    def overflowing(self, model_class):
        ours, theirs, missing = load(self, model_class)
        for model in (theirs, ours) if ours_too else (theirs,):
            model.embeddings.LayerNorm.bias.data[0] = 1e30  # inf in float16, and NaN from the first layer on
        return ours, theirs, missing

    monkeypatch.setattr(Checkpoint, "pair", overflowing)
    found = verified(saved(), "BertModel", dtype="float16", shapes=[(2, 7)])
    assert not missed(found)
    assert not found[0].is_finite
    verdicts = {verdict.subject: verdict for verdict in found[0].verdicts}
    assert verdicts["BertModel last_hidden_state"].closeness is None
    text = printed(verify.table(found), *verify.remarks(found))
    assert text.count(" not finite\n") == 6
    assert " - " in text
    reason = "transformers gives NaN or infinity here in float16, so there is nothing to compare with, in BertModel"
    advice = "do not use this dtype with this checkpoint"
    assert " ".join(text.split()).endswith(f"{reason}: {advice}")
    assert "within the limit" not in text
    with pytest.raises(
        WrongResults, match="transformers gives NaN or infinity on 1x8 full in float16: do not use this dtype"
    ):
        Benchmark(saved(), CPU, "float16").measure(Case(1, 8, is_full=True), 0.01)


def test_results_that_are_not_finite_are_wrong(saved, monkeypatch):
    exact = eager.linear_activation

    def poisoned(x, *others):
        y = exact(x, *others)
        return torch.full_like(y, torch.nan) if len(y) == 1 else y

    monkeypatch.setattr(eager, "linear_activation", poisoned)
    (found,) = verified(saved(), "BertModel", shapes=[(1, 1), (2, 7)])
    assert "BertModel last_hidden_state" in missed([found])
    assert "  nan " in printed(verify.table([found]))


def test_the_rule():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    nan, inf = math.nan, math.inf
    for ours, theirs, holds in (
        (truth, truth, True),
        (truth + 1e-8, truth, True),
        (truth + 2.9e-3, truth + 1e-3, True),
        (truth + 3.1e-3, truth + 1e-3, False),
        (truth * nan, truth + 1e-3, False),
        (truth * inf, truth + 1e-3, False),
        # Where theirs is NaN or infinite, ours may be a number or the same. The other values are compared.
        ([1.0, 7.0], [1.0, inf], True),
        ([1.0, nan], [1.0, nan], True),
        ([1.0, -inf], [1.0, -inf], True),
        ([1.1, inf], [1.0, inf], False),
        ([nan, inf], [1.0, inf], False),
        ([1.0, inf], [1.0, -inf], False),
        ([1.0, nan], [1.0, inf], False),
        ([nan, nan], [inf, inf], False),
    ):
        found = closeness(torch.as_tensor(ours).float(), torch.as_tensor(theirs).float(), truth)
        assert [each.measure for each in found] == ["max", "rms"]
        assert [each.holds for each in found] == [holds] * 2
        assert [each.share <= 1 for each in found] == [holds] * 2
    zeros = torch.zeros(2)
    assert [each.share for each in closeness(zeros, zeros, zeros.double())] == [0, 0]
    assert [each.share for each in closeness(zeros + 1, zeros, zeros.double())] == [math.inf] * 2
    assert closeness(zeros[:0], zeros[:0], zeros[:0].double()) == []
    assert closeness(zeros, zeros * nan, zeros.double()) == []
    with pytest.raises(ValueError, match=r"shapes differ: \[1\], \[2\], \[2\]"):
        closeness(zeros[:1], zeros, zeros.double())
    with pytest.raises(ValueError, match="dtypes differ: torch.float16 and torch.float32"):
        closeness(zeros.half(), zeros, zeros.double())


def test_batches_are_texts(minilm_path, tokenizer):
    batch = Checkpoint(minilm_path).batch(3, 20)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (3, 20)
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert (words[0], words[10], words[-1]) == ("[CLS]", "[SEP]", "[SEP]")
    assert batch["token_type_ids"][0].tolist() == [0] * 11 + [1] * 9
    assert "[UNK]" not in words
    others = Checkpoint(minilm_path).batch(2, 20, first=1)
    assert torch.equal(others["input_ids"], batch["input_ids"][1:])
    assert not torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_batches_without_a_tokenizer_are_random(saved):
    found = saved()
    assert found.why_no_tokenizer == "there is no vocabulary"
    ids = found.batch(40, 24)["input_ids"]
    assert set(ids.flatten().tolist()) == set(range(VOCAB))
    assert torch.equal(ids, saved().batch(40, 24)["input_ids"])


def test_a_tokenizer_of_another_model_raises(saved, tmp_path, tokenizer):
    found = saved()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gives ids up to \d+, but the model has 61 words"):
        found.batch(1, 8)


def test_half_of_a_batch_is_padding():
    mask = right_padding(4, 10)
    assert mask.sum(1).tolist() == [10, 7, 4, 1]
    assert right_padding(1, 3).all()
    for kind, kept in verify.masks(4, 10).items():
        assert kept.any(1).all()
        assert kept[:, 0].all() == (kind != "left")
        assert kept.all() == (kind == "full")


def test_devices(monkeypatch):
    assert select_device("cpu") == CPU
    with pytest.raises(ValueError, match="there is no device 'tpu' here, only cpu"):
        select_device("tpu")
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert select_device(None) == torch.device("cuda", 0)
    assert select_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ValueError, match="there is no device 'cuda:2' here, only cpu, cuda, cuda:0, cuda:1"):
        select_device("cuda:2")


def test_back_ends_are_described_in_one_line():
    ours, _ = pair()
    ours.encoder.layer[1].register_forward_hook(lambda *_: None)
    reason = "the tensors are on 'cpu' and the kernels need a CUDA device"
    assert (
        describe_backends(ours)
        == f"eager (12 of 17 operations: {reason}), modules (5 of 17 operations: BertLayer has hooks)"
    )
    with fastbert.backend("triton"):
        assert (
            describe_backends(ours)
            == "triton (12 of 17 operations), unsupported (5 of 17 operations: BertLayer has hooks)"
        )


def test_bench(saved, monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", {"cpu": ((1, 8), (3, 16), (3, 25))})
    running = Benchmark(saved(), CPU, "float32")
    assert running.backends.startswith("eager (")
    cases = running.cases()
    assert list(map(str, cases)) == ["1x8 full", "3x16 full", "3x16 50% filled"]
    measured = {case: running.measure(case, 0.01) for case in cases}
    assert all(list(of_models) == ["fastbert"] for of_models in measured.values())
    text = printed(benchmark.table(measured))
    assert "transformers, ms" in text
    for case, of_models in measured.items():
        (line,) = (line for line in text.splitlines() if str(case) in line)
        assert line.split()[-1] == f"{of_models['fastbert'].fields()['ratio']:.2f}"


def test_bench_times_nothing_that_is_wrong(saved, monkeypatch):
    monkeypatch.setattr(benchmark, "side_by_side", lambda *_: pytest.fail("timed"))
    running = Benchmark(saved(), CPU, "float32")
    exact = eager.linear_activation
    monkeypatch.setattr(eager, "linear_activation", lambda *inputs: exact(*inputs) * 1.001)
    with pytest.raises(WrongResults, match="fastbert is wrong on 3x16 50% filled in float32: it errs by"):
        running.measure(Case(3, 16, is_full=False), 0.01)


def test_bench_times_no_graph_that_was_not_captured(saved):
    running = Benchmark(saved(), CPU, "float32")
    running.ours[GRAPHED] = fastbert.graphed(deepcopy(running.ours["fastbert"]))
    with pytest.raises(RuntimeError, match="no CUDA graph was captured for 1x8 full: the logger 'fastbert' says why"):
        running.measure(Case(1, 8, is_full=True), 0.01)


def test_a_model_that_is_not_bert_raises(tmp_path):
    transformers.RobertaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of type 'roberta', but fastbert supports only 'bert'"):
        Checkpoint(str(tmp_path))
    transformers.BertModel(tiny_config(is_decoder=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.is_decoder=True is not supported"):
        Checkpoint(str(tmp_path)).pair("BertModel")


def test_a_checkpoint_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./my-modl", "/no/such", "my-modl/"):
        with pytest.raises(OSError, match=f"^there is no folder {name}, and it is not a valid name on the hub$"):
            Checkpoint(name)
    with pytest.raises(OSError, match="^there is no folder my-modl, and it cannot be loaded from the hub: "):
        Checkpoint("my-modl")
    (tmp_path / "empty").mkdir()
    assert [local_or_hub(name) for name in ("./empty", "any/name")] == ["./empty", "any/name"]
    with pytest.raises(OSError, match="^there is no config.json in ./empty$"):
        Checkpoint("./empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="the config.json of ./empty has no model_type"):
        Checkpoint("./empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(OSError, match="^(?!there is no folder).*config"):
        Checkpoint("./empty")


def test_a_folder_of_sentence_transformers(saved, tmp_path):
    whole = tmp_path / "whole"
    _, theirs = pair()
    theirs.save_pretrained(whole / "0_Transformer")
    (whole / "config.json").write_text('{"__version__": "0.2.0"}')
    (whole / "modules.json").write_text('[{"path": "0_Transformer"}, {"path": "1_Pooling"}]')
    checkpoint = Checkpoint(str(whole))
    assert not missed(verified(checkpoint, "BertModel", shapes=[(2, 5)]))
    assert torch.equal(checkpoint.pair("BertModel")[0].embeddings.word_embeddings.weight,
                       theirs.embeddings.word_embeddings.weight)  # fmt: skip
    (whole / "modules.json").write_text('[{"path": "0_Transfromer"}]')
    with pytest.raises(OSError, match="there is no config.json in .*0_Transfromer"):
        Checkpoint(str(whole))
    (whole / "modules.json").write_text("{}")
    with pytest.raises(ValueError, match=r"modules.json is not a list of sentence-transformers' modules"):
        Checkpoint(str(whole))


def test_bench_raises_before_anything_is_timed(saved, no_interpreter):
    with fastbert.backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        Benchmark(saved(), CPU, "float32")


@pytest.mark.gpu
def test_on_a_gpu(saved):
    device = select_device("cuda")
    found = list(verify.verify(saved(), device))
    assert not missed(found)
    assert {each.backends for each in found} == {"triton"}
    running = Benchmark(saved(), device, "bfloat16")
    for case in running.cases():
        assert list(running.measure(case, 0.01)) == ["fastbert", GRAPHED]
