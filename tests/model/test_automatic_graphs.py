"""CUDA graphs that models capture by themselves."""

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cases import HEADS, pair, tiny_config
from recordings import (
    DEVICE,
    LAYERS,
    Recordings,
    assert_freed_at_once,
    assert_same,
    record_outputs_only,
    recorded,
    texts,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

import fastbert
import fastbert_kernels
from fastbert import automatic, compilation, graph_rules, graph_state, graphs
from fastbert.ops import backend

SENTENCES = ["The cat sits outside.", "A man plays.", "Why?", "Nobody listens to it."]

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


@pytest.fixture
def captures(monkeypatch, caplog) -> list[tuple[int, ...]]:
    """The buckets that are captured during the test, in their order; everything runs in the kernels."""
    caplog.set_level(logging.INFO, logger="fastbert")
    alive, is_harmless = set(threading.enumerate()), graph_rules._is_harmless  # pytest-xdist has a thread of its own
    monkeypatch.setattr(graph_rules, "_is_harmless", lambda other: other in alive or is_harmless(other))
    monkeypatch.setattr(graph_rules, "_captured_at", deque(maxlen=graph_rules.CAPTURES_A_MINUTE))
    buckets = recorded(monkeypatch)
    fastbert_kernels.take_bad_ids(DEVICE)
    backend.warn_once.cache_clear()
    with fastbert.backend("triton"), torch.no_grad():
        yield buckets
    backend.warn_once.cache_clear()


def made(head: str = "BertModel", **settings) -> nn.Module:
    model, _ = pair(head, **(LAYERS | settings))
    Recordings.model = model.to(DEVICE)
    return model


def plain(model: nn.Module, **batch):
    with fastbert.cuda_graphs("off"):
        return model(**batch)


def call(model: nn.Module, times: int = 2, shape: tuple[int, int] = (2, 16)) -> None:
    """Calls, each of which has to give what it gives without graphs."""
    for seed in range(times):
        batch = texts(*shape, seed=seed)
        assert_same(model(**batch), plain(model, **batch))


@pytest.mark.parametrize("head", HEADS)
def test_the_second_call_captures(head, captures):
    model = made(head)
    of_choices = head == "BertForMultipleChoice"  # its BertModel captures, on [B, S]
    batch = {name: x[:, None] if of_choices else x for name, x in texts(3, 18).items()}
    expected = plain(model, **batch)
    assert_same(model(**batch), expected)
    assert captures == []
    for _ in range(2):
        assert_same(model(**batch), expected)
        assert captures == [(4, 32)]


def test_an_optimized_model_captures_until_it_is_restored(captures):
    theirs = transformers.BertForSequenceClassification(tiny_config(**LAYERS)).eval().to(DEVICE)
    Recordings.model = fastbert.optimize(theirs)
    call(theirs)
    assert captures == [(2, 16)]
    fastbert.restore(theirs)
    assert automatic.graphs_of(theirs) is None
    fastbert.optimize(theirs)
    call(theirs)
    assert captures == [(2, 16)] * 2


def test_a_sentence_transformer_captures(captures, tokenizer, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformers.BertModel(tiny_config(vocab_size=len(tokenizer), **LAYERS)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embedder = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(48)], device=str(DEVICE))
    fastbert.optimize(embedder)
    Recordings.model = embedder[0].model
    sentences = ["Why?", "The cat sits outside.", "A man plays the guitar.", "cat"]
    with fastbert.cuda_graphs("off"):
        expected = embedder.encode(sentences, batch_size=2)
    for _ in range(2):
        assert (embedder.encode(sentences, batch_size=2) == expected).all()
    assert captures == [(16, 4, 40)]


def test_a_pipeline_captures(captures, tokenizer):
    model = made("BertForSequenceClassification", vocab_size=len(tokenizer))
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device=DEVICE)
    results = [pipe("The cat sits outside.") for _ in range(3)]
    assert captures == [(1, 16)]
    assert results[0] == results[1] == results[2]


def test_only_a_call_that_succeeds_counts(captures, monkeypatch):
    model = made()
    with monkeypatch.context() as patch:
        patch.setattr(fastbert.model, "read_batch", lambda *args: 1 / 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                model(**texts(2, 16))
    model(**texts(2, 16))
    assert captures == []
    model(**texts(2, 16))
    assert captures == [(2, 16)]


def test_the_least_recently_used_makes_room(captures, monkeypatch):
    monkeypatch.setattr(automatic, "MAX_GRAPHS", 2)
    model = made()
    for batch_size in (1, 2, 1, 4):
        call(model, shape=(batch_size, 16))
    assert captures == [(1, 16), (2, 16), (4, 16)]
    assert automatic.graphs_of(model).buckets() == [(1, 16), (4, 16)]


def test_a_batch_beyond_the_token_limit_is_launched(captures, monkeypatch, caplog):
    monkeypatch.setattr(automatic, "MAX_TOKENS", 64)
    model = made()
    call(model, 3, (5, 16))
    call(model, 3, (4, 16))
    assert captures == [(4, 16)]
    assert "more than 64 tokens" in caplog.text


def test_inputs_on_other_devices_raise_the_models_own_errors(captures):
    model, batch = made(), texts(2, 16)
    call(model)
    ids, types = batch["input_ids"], batch["token_type_ids"].to("meta")
    its, elsewhere = graphs.graphs_by_model[model], "inputs are not on"
    assert its._why_wrong_device(torch.device("meta"), {"input_ids": ids}).reason.startswith(elsewhere)
    assert its._why_wrong_device(DEVICE, {"input_ids": ids, "token_type_ids": types}).reason.startswith(elsewhere)
    packed = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 2], device="meta")}
    assert "cu_seq_lens_q are not on" in its._why_wrong_device(DEVICE, packed).reason
    assert its._why_wrong_device(DEVICE, {"input_ids": ids, "token_type_ids": batch["token_type_ids"]}) is None


def with_memory(monkeypatch, bytes_of_a_graph: int) -> None:
    """Each capture lets its pool grow."""
    capture = graphs.CudaGraphs.capture

    def growing(self, run):
        self.taken = getattr(self, "taken", 0) + bytes_of_a_graph
        return capture(self, run)

    monkeypatch.setattr(graphs.CudaGraphs, "capture", growing)
    monkeypatch.setattr(graphs.CudaGraphs, "memory", lambda self: self.taken)


def test_graphs_beyond_the_memory_make_room_for_the_newest(captures, monkeypatch):
    with_memory(monkeypatch, 400 << 20)
    model = made()
    for batch_size in (1, 2, 4, 4):
        call(model, shape=(batch_size, 16))
    assert captures == [(1, 16), (2, 16), (4, 16), (4, 16)]
    assert automatic.graphs_of(model).buckets() == [(4, 16)]
    assert automatic.graphs_of(model).memory() == 400 << 20
    model(**texts(1, 16))  # called before, so the first call captures
    assert captures[4:] == [(1, 16)]


def test_a_graph_that_alone_takes_too_much_is_captured_once(captures, monkeypatch, caplog):
    with_memory(monkeypatch, 2 << 30)
    model = made()
    call(model, 5)
    assert captures == [(2, 16)]
    assert "a graph of 2x16 takes more than 1024 MiB" in caplog.text
    assert automatic.graphs_of(model) is None


def test_captures_of_a_minute_are_bounded(captures, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(graph_rules, "clock", lambda: now[0])
    monkeypatch.setattr(graph_rules, "_captured_at", deque(maxlen=2))
    monkeypatch.setattr(graph_rules, "CAPTURES_A_MINUTE", 2)
    model = made()
    for batch_size in (1, 2, 4):
        call(model, 3, (batch_size, 16))
        now[0] += 10
    assert captures == [(1, 16), (2, 16)]
    assert "2 graphs were captured within a minute" in caplog.text
    now[0] = 60.0
    call(model, 1, (4, 16))
    assert captures == [(1, 16), (2, 16), (4, 16)]


def test_a_failed_capture_is_forgotten_and_tried_again_after_a_minute(captures, monkeypatch, caplog):
    now, tries = [0.0], []
    monkeypatch.setattr(graph_rules, "clock", lambda: now[0])
    model = made()

    def full(self, run):
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(graphs.CudaGraphs, "capture", full)
        call(model, 4)
    assert len(tries) == 1
    assert "not enough memory to capture 2x16" in caplog.text
    assert len(graph_rules._captured_at) == 1  # it counts as a capture
    its = graphs.graphs_by_model[model]
    assert its._cuda is None
    call(model)
    assert captures == []
    now[0] = 60.0
    call(model)
    assert captures == [(2, 16)]


def test_no_capture_after_an_error_of_cuda(captures, monkeypatch, caplog):
    """After a RuntimeError, later captures may fail in any model. Other errors concern one model only."""
    monkeypatch.setattr(graph_rules, "broken", None)

    def refuse(error):
        raise error

    for error, goes_on in ((ValueError("not here"), True), (RuntimeError("operation not permitted"), False)):
        model = made()
        with monkeypatch.context() as patch:
            patch.setattr(graphs.CudaGraphs, "capture", lambda self, run, error=error: refuse(error))
            call(model, 3)
        captures.clear()
        call(made(), 3)
        assert captures == ([(2, 16)] if goes_on else [])
    assert "RuntimeError: operation not permitted" in caplog.text


def test_an_allocator_with_unknown_pool_sizes(captures, monkeypatch, caplog):
    reason = "the memory of graphs is known for torch's native allocator only"
    monkeypatch.setattr(graphs.CudaGraphs, "why_memory_unknown", staticmethod(lambda: reason))
    model = made()
    call(model, 3)
    assert captures == []
    assert reason in caplog.text
    assert reason in str(fastbert.explain(model))


def test_outputs_too_large_are_not_captured_again_and_those_of_the_encoder_are(captures, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(graph_rules, "clock", lambda: now[0])
    monkeypatch.setattr(graphs, "MAX_OUTPUT_BYTES", 2 * 16 * 48 * 4)
    model = made("BertForMaskedLM")
    call(model, 4)
    now[0] = 100.0
    call(model, 2)
    assert "outputs of a bucket take more than" in caplog.text
    assert captures == [(2, 16), (2, 16)]
    assert automatic.graphs_of(model.bert) is not None


def alive(thread: threading.Thread):
    """Start a daemon thread and return it."""
    thread.daemon = True
    thread.start()
    return thread


def test_a_thread_that_may_wait_for_the_device_keeps_auto_from_capturing(captures, caplog):
    model, end = made(), threading.Event()
    alive(threading.Thread(target=end.wait))
    try:
        call(model, 3)
        assert captures == []
        assert "a thread is alive that may wait for the device (threading.Event.wait)" in caplog.text
        with fastbert.cuda_graphs("on"):
            call(model, 1)
        assert captures == [(2, 16)]
    finally:
        end.set()


def test_harmless_threads_do_not_keep_auto_from_capturing(captures):
    """tqdm's monitor, which lives on after the first bar; and those of data loaders and notebooks, by what they run."""
    from tqdm import tqdm
    from tqdm._monitor import TMonitor

    list(tqdm(range(1)))
    assert any(isinstance(other, TMonitor) for other in threading.enumerate())
    end = threading.Event()
    for module in ("torch.utils.data._utils.pin_memory", "multiprocessing.queues", "ipykernel.iostream"):

        def run():
            end.wait()

        run.__module__ = module
        alive(threading.Thread(target=run))
    try:
        call(made())
        assert captures == [(2, 16)]
    finally:
        end.set()


@pytest.mark.parametrize("name", ["ipykernel.subshell", "torch.utils.data", "tqdmlike"])
def test_names_that_only_begin_like_those_of_harmless_threads(name):
    def run():
        pass

    run.__module__ = name
    assert not graph_rules._is_harmless(threading.Thread(target=run))


def test_a_worker_thread_replays_and_does_not_capture(captures):
    model = made()
    call(model)
    found = []

    def work():
        with fastbert.backend("triton"), torch.no_grad():
            for shape in ((2, 16), (1, 16), (1, 16)):
                found.append((model(**texts(*shape)), plain(model, **texts(*shape))))

    work.__module__ = "tqdm"  # it captures nothing even where its thread is a harmless one
    worker = alive(threading.Thread(target=work))
    worker.join()
    assert len(found) == 3
    for outputs, expected in found:
        assert_same(outputs, expected)
    assert captures == [(2, 16)]


def replays(monkeypatch) -> list[int]:
    """An entry for each launch of a graph."""
    made, launch = [], graphs.PaddedGraph.launch
    monkeypatch.setattr(graphs.PaddedGraph, "launch", lambda self, *inputs: made.append(1) or launch(self, *inputs))
    return made


def test_the_thread_comes_before_the_model_and_that_before_the_process(captures, monkeypatch):
    model, launched = made(), replays(monkeypatch)
    call(model)
    assert len(launched) == 1
    monkeypatch.setattr(graph_rules, "default", "off")
    call(model)
    assert len(launched) == 1
    fastbert.cuda_graphs("on", model)
    call(model)
    assert len(launched) == 3
    with fastbert.cuda_graphs("off"):
        call(model)
        with fastbert.cuda_graphs("auto"):
            call(model, 1)
    assert len(launched) == 4


def test_off_for_a_model_frees_its_graphs_until_the_end_of_the_block(captures):
    model = made("BertForSequenceClassification")
    call(model)
    with fastbert.cuda_graphs("off", model):
        assert automatic.graphs_of(model) is None
        call(model, 3)
    assert captures == [(2, 16)]
    call(model)
    assert captures == [(2, 16)] * 2
    fastbert.cuda_graphs("off", model)
    call(model, 3)
    assert captures == [(2, 16)] * 2
    assert automatic.graphs_of(model.bert) is None


def test_off_holds_for_what_is_graphed(captures, caplog, monkeypatch):
    model, launched = fastbert.graphed(made()), replays(monkeypatch)
    model(**texts(2, 16))
    with fastbert.cuda_graphs("off"):
        model(**texts(2, 16))
    fastbert.cuda_graphs("off", model)
    model(**texts(2, 16))
    assert launched == [1]
    assert model.forward.num_graphs == 0
    assert "CUDA graphs are turned off" in caplog.text


def test_bad_names(captures, monkeypatch):
    for arguments in (("maybe",), ("", made())):
        with pytest.raises(ValueError, match="choose one of off, auto, on"):
            fastbert.cuda_graphs(*arguments)
    with pytest.raises(TypeError, match="no fastbert model in a torch.nn.modules.linear.Linear"):
        fastbert.cuda_graphs("off", nn.Linear(1, 1))
    monkeypatch.setattr(graph_rules, "default", "maybe")
    with pytest.raises(ValueError, match="FASTBERT_GRAPHS: unknown mode 'maybe' of CUDA graphs, choose"):
        made()(**texts(2, 16))


def test_the_environment_names_the_mode():
    code = "from fastbert import graph_rules; print(graph_rules.default)"
    environment = os.environ | {"FASTBERT_GRAPHS": "on"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "on", run.stderr


def test_where_labels_keep_a_head_from_replaying_its_encoder_does(captures):
    """As in Trainer's evaluation."""
    model = made("BertForSequenceClassification")
    batch = texts(2, 16) | {"labels": torch.tensor([0, 1], device=DEVICE)}
    for _ in range(3):
        assert_same(model(**batch), plain(model, **batch))
    assert captures == [(2, 16)]
    assert automatic.graphs_of(model.bert) is not None
    call(model, 1)  # the head's own first call, which captures nothing
    assert captures == [(2, 16)]


@pytest.mark.parametrize("graphed", [False, True])
def test_a_call_within_a_users_capture_is_launched(graphed, captures, monkeypatch):
    model = made()
    model = fastbert.graphed(model) if graphed else model
    monkeypatch.setattr(graphs.CudaGraphs, "is_capturing", staticmethod(lambda: True))
    call(model, 3)
    assert captures == []
    monkeypatch.setattr(graphs.CudaGraphs, "is_capturing", staticmethod(lambda: False))
    call(model)
    assert captures == [(2, 16)]


def test_copies_have_graphs_of_their_own(captures):
    model = made()
    call(model)
    before = set(vars(model))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(vars(copied)) == before
        assert automatic.graphs_of(copied) is None
        Recordings.model = copied
        copied.pooler.dense.weight.zero_()
        call(copied)
        assert not copied(**texts(2, 16)).pooler_output.equal(model(**texts(2, 16)).pooler_output)
    assert captures == [(2, 16)] * 3


def test_a_model_that_is_dropped_is_freed(captures, monkeypatch):
    model = made()
    record_outputs_only(monkeypatch)
    for _ in range(2):
        model(**texts(2, 16))
    assert automatic.graphs_of(model)
    owned = [model]
    del model
    assert_freed_at_once(owned)


def test_replicas_of_data_parallel_are_launched(captures):
    model = made("BertForSequenceClassification")
    batch, known = texts(2, 16), len(graphs.graphs_by_model)
    for _ in range(3):
        replica = copy.copy(model)  # as torch.nn.parallel.replicate makes them, of every module
        replica.__dict__ = model.__dict__ | {"_is_replica": True, "_modules": dict(model._modules)}
        replica.bert = copy.copy(model.bert)
        replica.bert.__dict__ = model.bert.__dict__ | {"_is_replica": True}
        assert_same(replica(**batch), plain(model, **batch))
    assert captures == []
    assert len(graphs.graphs_by_model) == known


def test_a_compiler_sees_the_plain_forward(captures):
    model = made()
    with fastbert.backend("auto"):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for _ in range(3):
            compiled(**texts(2, 16))
    assert captures == []


def test_transforms_see_the_plain_forward(captures):
    model, batch = made(), texts(2, 16)
    with fastbert.backend("auto"):
        for _ in range(3):
            torch.func.functional_call(model, dict(model.named_parameters()), (), batch)
            torch.func.vmap(lambda ids: model(ids).pooler_output)(batch["input_ids"][None])
    assert captures == []


def test_a_mode_that_sees_every_op_sees_every_op(captures):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    model, batch, numbers = made(), texts(2, 16), []
    with fastbert.backend("auto"):
        for _ in range(3):
            seen = []
            with Counted():
                model(**batch)
            numbers.append(len(seen))
    assert numbers[0] == numbers[2] > 0
    assert captures == []


def test_hooks_fire_in_each_call(captures):
    model, fired = made(), []
    call(model)
    model.register_forward_hook(lambda *_: fired.append("model"))
    hook = model.encoder.layer[0].register_forward_hook(lambda *_: fired.append("layer"))
    with fastbert.backend("auto"):
        for _ in range(3):
            model(**texts(2, 16))
    assert fired == ["layer", "model"] * 3
    hook.remove()
    call(model)
    assert captures == [(2, 16)] * 2


def test_a_changed_model_begins_anew(captures):
    model = made()
    call(model)
    model.load_state_dict({name: x * 1.5 for name, x in model.state_dict().items()})
    call(model)
    assert captures == [(2, 16)]
    weight = model.encoder.layer[0].output.dense.weight
    weight.data = weight.data * 1.5
    call(model, 1)
    assert captures == [(2, 16)]
    call(model, 1)
    assert captures == [(2, 16)] * 2


def test_a_parameter_of_one_number_that_equals_the_one_before(captures):
    """It counts as the same until it has another number."""
    model = made("BertForTokenClassification", num_labels=1)
    call(model)
    model.classifier.bias = nn.Parameter(model.classifier.bias.clone())
    call(model, 1)
    model.classifier.bias += 1
    call(model)
    assert captures == [(2, 16)] * 2


def test_a_forward_of_transformers_that_is_patched_for_every_model(captures, monkeypatch):
    theirs = transformers.BertForMaskedLM.forward
    model = made("BertForMaskedLM")
    call(model)

    def doubled(self, *args, **kwargs):
        outputs = theirs(self, *args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    before = plain(model, **texts(2, 16))
    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", doubled)
    assert torch.equal(model(**texts(2, 16)).logits, before.logits * 2)


def test_training_between_calls_keeps_the_graphs(captures):
    model = made()
    call(model)
    model.train()
    with torch.enable_grad():
        model(**texts(2, 16)).pooler_output.sum().backward()
    model.eval()
    for parameter in model.parameters():
        parameter.sub_(0.01)
    call(model)
    assert captures == [(2, 16)]


class Wrapped(torch.Tensor):
    """A weight that has no memory of its own, as quantized ones."""

    @staticmethod
    def __new__(cls, weight):
        kept = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        kept.weight = weight
        return kept

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].weight)
        args = torch.utils._pytree.tree_map(lambda x: x.weight if isinstance(x, cls) else x, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("of", ["layer", "head"])
def test_weights_of_other_classes_are_launched(of, captures, caplog):
    model = made("BertForSequenceClassification")
    linear = model.classifier if of == "head" else model.bert.encoder.layer[0].output.dense
    linear.weight = nn.Parameter(Wrapped(linear.weight.detach()), requires_grad=False)
    with fastbert.backend("auto"):
        for _ in range(3):
            assert torch.equal(model(**texts(2, 16)).logits, plain(model, **texts(2, 16)).logits)
    assert "a parameter is a Wrapped, not a plain Parameter" in caplog.text


def test_a_model_that_cannot_be_inspected_is_launched(captures, monkeypatch, caplog):
    model = made()
    monkeypatch.setattr(graphs, "State", lambda *given: 1 / 0)
    call(model, 3)
    assert captures == []
    assert "cannot be inspected: ZeroDivisionError" in caplog.text


class Subclass(fastbert.BertModel):
    pass


def test_classes_derived_from_ours_are_launched(captures):
    model = Subclass(tiny_config(**LAYERS)).eval().to(DEVICE)
    call(model, 3)
    assert captures == []


def test_a_model_inside_a_users_module_captures(captures):
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = made()

        def forward(self, **batch):
            return self.bert(**batch).pooler_output * 2

    model = Doubled()
    for _ in range(3):
        assert torch.equal(model(**texts(2, 16)), plain(model, **texts(2, 16)))
    assert captures == [(2, 16)]


def test_needless_gradients_are_warned_of_once(captures, caplog):
    model, frozen = made("BertForSequenceClassification"), made().requires_grad_(False)
    with torch.enable_grad():
        frozen(**texts(2, 16))
        model.train()
        model(**texts(2, 16))
        assert "gradients" not in caplog.text
        model.eval()
        for _ in range(2):
            assert model(**texts(2, 16)).logits.requires_grad
        made()(**texts(2, 16))
    (record,) = [record for record in caplog.records if "records gradients" in record.message]
    assert record.levelno == logging.WARNING
    assert "torch.no_grad() or torch.inference_mode()" in record.message
    assert captures == []


FORKS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import pytest, torch, fastbert
from fastbert import automatic, graphs
from fastbert.ops import backend
from recordings import Recordings, assert_same, recorded, texts
from test_automatic_graphs import call, made

backend.why_not_triton("attention", torch.device("cpu"), torch.float32)
with pytest.MonkeyPatch.context() as patch, fastbert.backend("triton"), torch.no_grad():
    captures = recorded(patch)
    model = made()
    graphed = fastbert.graphed(made())
    graphed(**texts(1, 16))
    Recordings.model = model
    call(model)
    its = graphs.graphs_by_model[model]
    its._lock.acquire()  # as another thread might
    child = os.fork()
    if not child:
        call(model, 3)
        graphed(**texts(1, 16))
        told = automatic.describe(model)
        os._exit(0 if len(captures) == 2 and "forked" in told and told.startswith("off") else 1)
    its._lock.release()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    call(model, 1)
    assert automatic.describe(model).startswith("auto, 1 captured")
"""


@pytest.mark.skipif(not hasattr(os, "fork") or DEVICE.type == "cuda", reason="a forked process cannot use CUDA at all")
def test_a_forked_process_has_no_graphs():
    arguments = [sys.executable, "-c", FORKS, str(Path(__file__).parent)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_a_fork_before_anything_was_captured_changes_nothing():
    code = "import os, fastbert.automatic as a; pid = os.fork(); m = a.graph_rules.forked\n"
    # One write per process: print may write twice, and the other process may write in between.
    code += "os.write(1, f'{m}\\n'.encode())\nos._exit(0) if not pid else os.waitpid(pid, 0)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["None", "None"], run.stderr


def test_explain_tells_of_graphs(captures, monkeypatch):
    model = made("BertForSequenceClassification")
    (line,) = fastbert.explain(model).graphs
    assert line.endswith(": auto, none captured: no batch size and length has come twice in inference")
    call(model)
    call(model, shape=(1, 9))
    (line,) = fastbert.explain(model).graphs
    assert line.startswith("CUDA graphs of BertForSequenceClassification: auto, 2 captured (2x16, 1x16), ")
    assert line.endswith(" MiB")
    assert str(fastbert.explain(model)).endswith(line)
    with fastbert.cuda_graphs("off", model):
        assert fastbert.explain(model).graphs[0].endswith("off, none captured: CUDA graphs are turned off")
    monkeypatch.setattr(graph_rules, "_why_threads_block", lambda: "somebody waits")
    call(model)
    assert fastbert.explain(model).graphs[0].endswith("auto, none captured: somebody waits")


def test_encode_replays(captures, tmp_path, tokenizer, monkeypatch, caplog):
    """The first call runs plainly, the second captures, the third replays."""
    model = transformers.BertModel(
        tiny_config(vocab_size=len(tokenizer), max_position_embeddings=40, num_hidden_layers=1)
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    transformer = Transformer(str(tmp_path))
    embedder = SentenceTransformer(modules=[transformer, Pooling(48)], device=str(DEVICE))
    expected = embedder.encode(SENTENCES)
    fastbert.optimize(embedder)
    Recordings.model = transformer.model
    for _ in range(3):
        np.testing.assert_allclose(embedder.encode(SENTENCES), expected, atol=1e-5)
    assert captures == [(32, 4, 40)]
    np.testing.assert_allclose(embedder.encode(SENTENCES[:3]), expected[:3], atol=1e-5)
    assert "1 captured (32 tokens in 4 sequences of up to 40)" in fastbert.explain(embedder).graphs[0]
    monkeypatch.setattr(automatic, "MAX_PACKED_ELEMENTS", 64 * 48 - 1)
    for _ in range(3):
        embedder.encode([*SENTENCES, "Nobody at all, as far as anybody knows, has ever seen one of them."])
    assert len(captures) == 1
    assert "gains nothing from a graph" in caplog.text


def test_explain_tells_of_a_cpu():
    model = fastbert.BertModel(tiny_config(**LAYERS))
    assert fastbert.explain(model).graphs == [
        "CUDA graphs of BertModel: auto, none captured: the model is on 'cpu' and CUDA graphs need a CUDA device"
    ]


def test_warmup_captures_more_than_a_minute_allows(captures, monkeypatch):
    monkeypatch.setattr(graph_rules, "CAPTURES_A_MINUTE", 1)
    monkeypatch.setattr(graph_rules, "_captured_at", deque([graph_rules.clock()], maxlen=1))
    model = made()
    call(model, 3, (4, 16))
    assert captures == []
    fastbert.warmup(model, [(1, 9), (2, 16)])
    assert captures == [(1, 16), (16, 1, 40), (2, 16), (32, 4, 40)]


def test_warmup_meets_every_class_of_sizes(captures, monkeypatch):
    model, shapes = made(), []
    monkeypatch.setattr(compilation, "_shapes_of_classes", lambda model: [(2, 8), (1, 24)])

    def note(module, args, given):
        shapes.append(given["input_ids"].shape)

    model.register_forward_pre_hook(note, with_kwargs=True)
    fastbert.warmup(model)
    assert set(shapes) == {(2, 8), (1, 24)}  # and none packed, of a model with a hook
    assert captures == []


def test_classes_of_sizes():
    found = compilation.class_shapes([256, 1024, None], 512)
    assert found == [(4, 64), (1, 256), (16, 64), (2, 512), (17, 64), (3, 512)]
    assert compilation.class_shapes([16, None], 512) == [(1, 16), (1, 64), (1, 512)]
    assert compilation.class_shapes([], 40) == [(1, 40)]


def test_a_patch_of_our_class_is_around_the_graph_once(captures, monkeypatch):
    """The patch doubles once: the graph that it replays holds the forward without the patch."""
    model, ours = made(), fastbert.BertModel.forward

    def doubled(self, *args, **kwargs):
        outputs = ours(self, *args, **kwargs)
        outputs.last_hidden_state = 2 * outputs.last_hidden_state
        return outputs

    batch = texts(2, 16)
    expected = 2 * plain(model, **batch).last_hidden_state
    call(model)
    monkeypatch.setattr(fastbert.BertModel, "forward", doubled)
    for _ in range(3):
        assert torch.equal(model(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("kind", [fastbert.model.BertLayer, fastbert.model.BertEncoder, fastbert.model.BertPooler])
def test_patches_of_our_parts_are_called(kind, captures, monkeypatch, caplog):
    model, calls, forward = made(), [], kind.forward

    def counted(self, *args, **kwargs):
        calls.append(kind)
        return forward(self, *args, **kwargs)

    batch = texts(2, 16)
    for _ in range(2):
        expected = model(**batch)
    assert captures == [(2, 16)]
    monkeypatch.setattr(kind, "forward", counted)
    # An encoder with a patched forward gets a 4-D mask, which no kernel supports.
    packed = kind is not fastbert.model.BertEncoder
    for _ in range(3):
        calls.clear()
        with fastbert.backend("triton" if packed else "auto"):
            outputs = model(**batch)
        if packed:
            assert_same(outputs, expected)
        torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state)
        # Unlike a graph, `Recordings` run Python: the first replay calls the patch before the change is noticed.
        assert calls
    assert len(calls) == 1
    assert f"{kind.__qualname__}.forward is patched for every model" in caplog.text


def test_a_model_that_moves_frees_what_its_graphs_keep(captures):
    """Also inside a user's module, and whether or not it is called again."""
    model = made()
    whole = nn.Sequential(nn.Module())
    whole[0].bert = model
    call(model)
    forward = weakref.ref(graphs.graphs_by_model[model])
    kept = weakref.ref(graphs.graphs_by_model[model]._state)
    whole.double()
    gc.collect()
    assert kept() is None
    assert forward() is None
    assert automatic.graphs_of(model) is None


def test_graphs_are_turned_off_while_another_thread_calls(captures, monkeypatch):
    model, batch = made(), texts(2, 16)
    call(model)
    expected, replaying, go_on = plain(model, **batch), threading.Event(), threading.Event()
    order = Recordings.order_after_last_replay

    def wait(self):
        replaying.set()
        go_on.wait(10)
        return order(self)

    monkeypatch.setattr(graphs.CudaGraphs, "order_after_last_replay", wait)
    found = []

    def serve():
        with torch.no_grad(), fastbert.backend("triton"):
            found.append(model(**batch))

    caller = alive(threading.Thread(target=serve))
    assert replaying.wait(10)
    freeing = alive(threading.Thread(target=fastbert.cuda_graphs, args=("off", model)))
    freeing.join(0.1)
    go_on.set()
    caller.join()
    freeing.join()
    assert_same(found[0], expected)
    assert automatic.graphs_of(model) is None


@pytest.mark.parametrize("rows", [1, 2])
def test_another_view_of_the_same_memory(rows, captures):
    """Fewer classes, or a square weight transposed."""
    model = made("BertForSequenceClassification")
    call(model)
    if rows == 1:
        model.classifier.weight.data, model.classifier.bias.data = (
            x.data[:1] for x in (model.classifier.weight, model.classifier.bias)
        )
    else:
        query = model.bert.encoder.layer[0].attention.self.query
        query.weight.data = query.weight.data.t()
    call(model)
    assert model(**texts(2, 16)).logits.shape == (2, rows)


def test_a_patched_forward_may_return_anything_where_gradients_are_recorded(captures, monkeypatch):
    model = made("BertForMaskedLM")
    with torch.enable_grad():
        for result in (None, 1.0, torch.tensor(2.0)):
            monkeypatch.setattr(transformers.BertForMaskedLM, "forward", lambda self, *_, result=result, **__: result)
            assert model(**texts(2, 16)) is result


def test_graphed_frees_automatic_graphs(captures):
    model = made()
    call(model)
    fastbert.graphed(model)
    assert model not in graphs.graphs_by_model


def test_a_model_that_raised_is_inspected_again(captures, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(graph_state.time, "monotonic", lambda: now[0])
    model, state = made(), graph_state.State

    def broken(*args):
        monkeypatch.setattr(graphs, "State", state)
        raise RuntimeError("not now")

    monkeypatch.setattr(graphs, "State", broken)
    call(model, 3)
    assert captures == []
    now[0] = 61.0
    call(model, 3)
    assert captures == [(2, 16)]


def test_a_context_may_be_entered_again():
    off, on = fastbert.cuda_graphs("off"), fastbert.cuda_graphs("on")
    with on, off:
        with off:
            assert graph_rules.thread.mode == "off"
        assert graph_rules.thread.mode == "off"
    assert graph_rules.thread.mode is None
    assert graph_rules.thread.previous == []
