"""`fastbert.graphed`: models whose forward replays CUDA graphs."""

import copy
import inspect
import io
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases import HEADS, VOCAB, pair, tiny_config
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
from torch import nn

import fastbert
import fastbert_kernels
from fastbert import automatic, capture, graphs, ops
from fastbert.ops import backend

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


@pytest.fixture
def captures(monkeypatch, caplog) -> list[tuple[int, ...]]:
    """The buckets that are captured during the test, in their order; everything runs in the kernels, and no model
    captures by itself."""
    caplog.set_level(logging.INFO, logger="fastbert")
    buckets = recorded(monkeypatch)
    monkeypatch.setattr(automatic, "run", lambda model, plain, args, kwargs: plain(model, *args, **kwargs))
    fastbert_kernels.take_bad_ids(DEVICE)
    backend.warn_once.cache_clear()
    with fastbert.backend("triton"), torch.no_grad():
        yield buckets
    backend.warn_once.cache_clear()


def models(head: str = "BertModel", max_graphs: int = 32, **settings) -> tuple[nn.Module, nn.Module]:
    """A graphed model, and one with the same weights that is not."""
    plain, _ = pair(head, **(LAYERS | settings))
    plain.to(DEVICE)
    model = fastbert.graphed(copy.deepcopy(plain), max_graphs)
    Recordings.model = model
    return model, plain


def test_one_graph_runs_every_mix_of_lengths_of_a_bucket(captures):
    model, plain = models()
    for seed, (batch_size, seq_len) in enumerate([(3, 20), (4, 32), (3, 17), (3, 20), (4, 31), (3, 20)]):
        batch = texts(batch_size, seq_len, seed=seed)
        assert_same(model(**batch), plain(**batch))
    assert captures == [(4, 32)]


def test_buckets_are_powers_of_two_within_the_positions(captures):
    model, plain = models()
    for shape in ((1, 1), (1, 16), (2, 17), (5, 33), (8, 40), (7, 40)):
        assert_same(model(**texts(*shape)), plain(**texts(*shape)))
    assert captures == [(1, 16), (2, 32), (8, 40)]


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, captures):
    model, plain = models(head)
    of_choices = head == "BertForMultipleChoice"  # whose input has three dimensions
    batch = {name: x[:, None] if of_choices else x for name, x in texts(3, 18).items()}
    for _ in range(2):
        assert_same(model(**batch), plain(**batch))
    assert captures == ([] if of_choices else [(4, 32)])


def packed(lengths: list[int], *, seed: int = 0, bounds: torch.dtype = torch.int32) -> dict:
    """Texts of these lengths, laid end to end."""
    given = texts(1, sum(lengths), seed=seed)
    del given["attention_mask"]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, bounds)
    return given | {"cu_seq_lens_q": ends, "max_length_q": max(lengths)}


def test_one_graph_runs_every_mix_of_packed_sequences_of_a_bucket(captures):
    model, plain = models()
    mixes = [[5, 9, 3], [5, 9, 3, 14], [30], [1, 1, 1, 30 - 3], [5, 9, 3], [0, 8, 0, 20], [17]]
    for seed, lengths in enumerate(mixes):
        given = packed(lengths, seed=seed)
        assert_same(model(**given), plain(**given))
    # The longest sequence of a packed bucket is rounded up to at least 64 tokens, here cut to the 40 positions.
    assert captures == [(32, 4, 40), (32, 1, 40)]
    given = packed([5, 9, 3])
    assert_same(model(**given), plain(**packed([5, 9, 3])))
    given = packed([30, 3])
    assert_same(model(**given), plain(**given))
    assert captures[2:] == [(64, 4, 40)]
    assert [str(bucket) for bucket in model.forward.buckets()] == [
        "32 tokens in 1 sequences of up to 40",
        "32 tokens in 4 sequences of up to 40",
        "64 tokens in 4 sequences of up to 40",
    ]


def test_packed_inputs_of_every_kind(captures):
    """Each call follows one with token types: nothing of that call may be left in the buffers."""
    model, plain = models()
    full = packed([5, 9, 3], seed=9)
    ids, types, bounds, longest = full.values()
    short = torch.tensor([0, 5, 9], dtype=torch.int32, device=DEVICE)
    others = [
        {"input_ids": ids, "cu_seq_lens_q": bounds, "max_length_q": longest},
        full | {"input_ids": ids.int(), "token_type_ids": types.int()},
        full | {"cu_seq_lens_q": bounds.long()},
        full | {"cu_seq_lens_q": short},  # the rest of the row is no text
    ]
    for other in others:
        assert_same(model(**full), plain(**full))
        assert_same(model(**other), plain(**other))
    assert captures == [(32, 4, 40)]


@pytest.mark.parametrize("head", [head for head in HEADS if head != "BertForMultipleChoice"])
def test_heads_of_packed_texts(head, captures):
    model, plain = models(head)
    given = packed([5, 9, 3])
    for _ in range(2):
        assert_same(model(**given), plain(**given))
    assert captures == [(32, 4, 40)]


def test_unsupported_packed_inputs_run_without_a_graph(captures, caplog):
    model, plain = models()
    given = packed([5, 9, 3])
    others = [
        {name: value for name, value in given.items() if name != "max_length_q"},
        given | {"position_ids": torch.arange(17, device=DEVICE)[None]},
        given | {"cu_seq_lens_k": given["cu_seq_lens_q"]},
    ]
    for other in others:
        assert_same(model(**other), plain(**other))
    for reason in ("without max_length_q", "position_ids is given", "cu_seq_lens_k is given"):
        assert reason in caplog.text
    with pytest.raises(ValueError, match="longer than max_position_embeddings=40"):
        model(**packed([41]))
    with pytest.raises(ValueError, match="exclude each other"):
        model(**given, attention_mask=torch.ones(1, 17, dtype=torch.int64, device=DEVICE))
    assert captures == []


def test_hidden_sizes_like_the_bucket_are_not_cut(captures):
    model, plain = models(hidden_size=32, num_attention_heads=2)
    batch = texts(3, 20)
    assert_same(model(**batch), plain(**batch))
    assert model(**batch).pooler_output.shape == (3, 32)
    assert captures == [(4, 32)]


def test_outputs_stay_as_they_are(captures):
    model, _ = models()
    first = model(**texts(4, 16, seed=1))
    kept = copy.deepcopy(first)
    second = model(**texts(4, 16, seed=2))
    assert_same(first, kept)
    assert not torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert captures == [(4, 16)]


def test_inputs_of_every_kind(captures):
    """Each after one with all three inputs: nothing of an earlier call may be left in the buffers."""
    model, plain = models()
    full = texts(3, 18, seed=9)
    ids, mask, types = full.values()
    others = [
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "token_type_ids": types},
        {"input_ids": ids.int(), "attention_mask": mask.bool(), "token_type_ids": types.int()},
        {"input_ids": ids, "attention_mask": mask * -(2**40)},
        {"input_ids": ids, "attention_mask": mask.to(torch.uint8) * 200, "token_type_ids": None},
        {"input_ids": ids.t().contiguous().t(), "attention_mask": mask[:, :1].expand(-1, 18)},
    ]
    for other in others:
        assert_same(model(**full), plain(**full))
        assert_same(model(**other), plain(**other))
    assert_same(model(ids, mask), plain(ids, mask))
    assert_same(model(ids, token_type_ids=types), plain(ids, token_type_ids=types))
    as_tuple, expected = model(ids, return_dict=False), plain(ids, return_dict=False)
    assert type(as_tuple) is tuple
    assert all(map(torch.equal, as_tuple, expected))
    on_the_host = {name: x.cpu() for name, x in full.items()}
    assert_same(model(**on_the_host), plain(**full))
    assert_same(model(**(full | {"attention_mask": mask.cpu()})), plain(**full))
    assert captures == [(4, 32)]


def test_the_least_recently_used_graph_makes_room(captures, caplog):
    model, _ = models(max_graphs=2)
    for shape in ((1, 16), (2, 16), (1, 16), (4, 16)):
        model(**texts(*shape))
    assert model.forward.num_graphs == 2
    assert "max_graphs=2" in caplog.text
    captures.clear()
    model(**texts(1, 16))
    model(**texts(4, 16))
    assert captures == []
    model(**texts(2, 16))
    assert captures == [(2, 16)]


UNSUPPORTED = {
    "output_hidden_states is given": {"output_hidden_states": True},
    "output_attentions is given": {"output_attentions": True},
    "position_ids is given": {"position_ids": torch.arange(18, device=DEVICE)[None]},
    "attention_mask is not integers [B, S]": {"attention_mask": torch.ones(3, 18, device=DEVICE)},
    "input_ids are not integers [B, S]": {
        "input_ids": None,
        "inputs_embeds": None,
    },
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_inputs_run_without_a_graph_and_log_the_reason(reason, captures, caplog):
    model, plain = models()
    batch = texts(3, 18) | UNSUPPORTED[reason]
    if "inputs_embeds" in batch:
        batch["inputs_embeds"] = torch.randn(3, 18, plain.config.hidden_size, device=DEVICE)
        reason = "inputs_embeds is given"
    with fastbert.backend("auto"):  # attention weights run in eager PyTorch, which "triton" does not support
        expected = plain(**batch)
        for _ in range(2):
            outputs = model(**batch)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert outputs.keys() == expected.keys()
    assert [message for message in caplog.messages if "no CUDA graph" in message] == [f"no CUDA graph: {reason}"]
    assert captures == []


def test_score_masks_gradients_training_and_autocast_run_without(captures, caplog):
    model, plain = models()
    batch = texts(3, 18)
    scores = batch | {"attention_mask": torch.ones(3, 1, 18, 18, dtype=torch.long, device=DEVICE)}
    with fastbert.backend("auto"):
        assert torch.equal(model(**scores).last_hidden_state, plain(**scores).last_hidden_state)
    with torch.enable_grad():
        assert model(**batch).last_hidden_state.requires_grad
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_same(model(**batch), plain(**batch))
    with fastbert.backend("eager"):
        assert_same(model(**batch), plain(**batch))
    model.train()
    plain.train()
    assert_same(model(**batch), plain(**batch))
    for reason in ("attention_mask is not", "gradients are recorded", "autocast is on", "'eager'", "in training mode"):
        assert f"no CUDA graph: {reason}" in caplog.text.replace("the model is ", "").replace("backend ", ""), reason
    assert captures == []


def test_ids_that_are_checked_in_each_call_run_without(captures, caplog, monkeypatch):
    monkeypatch.setattr(ops, "CHECK_IDS", True)
    model, _ = models()
    model(**texts(1, 16))
    assert "FASTBERT_CHECK" in caplog.text
    assert captures == []


def test_a_batch_beyond_the_largest_bucket_runs_without(captures, caplog, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_TOKENS", 64)
    model, plain = models()
    assert_same(model(**texts(5, 16)), plain(**texts(5, 16)))
    assert "more than 64 tokens" in caplog.text
    assert captures == []


def test_a_cpu_runs_without(caplog):
    backend.warn_once.cache_clear()
    caplog.set_level(logging.INFO, logger="fastbert")
    plain, _ = pair(**LAYERS)
    model = fastbert.graphed(copy.deepcopy(plain))
    batch = texts(3, 18, on=torch.device("cpu"))
    with torch.no_grad():
        for _ in range(2):
            assert_same(model(**batch), plain(**batch))
    (message,) = [record for record in caplog.records if "no CUDA graph" in record.message]
    assert "on 'cpu'" in message.message
    assert message.levelno == logging.INFO


def test_bad_input_meets_the_models_own_errors(captures):
    model, _ = models()
    batch = texts(2, 16)
    model(**batch)
    with pytest.raises(ValueError, match="longer than max_position_embeddings=40"):
        model(**texts(1, 41))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(TypeError, match="unknown arguments colour"):
        model(**batch, colour=1)
    with pytest.raises(TypeError):
        model(*[batch["input_ids"]] * 20)
    with pytest.raises(TypeError):
        model(batch["input_ids"], input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(batch["input_ids"], attention_mask=torch.ones(2, 3, dtype=torch.long, device=DEVICE))
    assert model(batch["input_ids"][:0]).last_hidden_state.shape == (0, 16, 48)


def test_a_bad_id_is_told_of_in_the_next_call(captures):
    model, _ = models()
    batch = texts(2, 16)
    bad = batch["input_ids"].clone()
    bad[0, 0] = VOCAB + 5
    outputs = model(bad)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert outputs.last_hidden_state[0].isnan().all()
    assert not outputs.last_hidden_state[1].isnan().any()
    with pytest.raises(IndexError, match=f"input_ids held {VOCAB + 5}, allowed are 0 to {VOCAB - 1}"):
        model(**batch)
    assert not model(**batch).last_hidden_state.isnan().any()


def double_a_weight(model):
    model.encoder.layer[0].output.dense.weight.mul_(2)


def load_other_weights(model):
    model.load_state_dict({name: x * 1.5 for name, x in model.state_dict().items()})


def assign_other_weights(model):
    model.load_state_dict({name: x * 1.5 for name, x in model.state_dict().items()}, assign=True)


def replace_data(model):
    weight = model.encoder.layer[0].intermediate.dense.weight
    weight.data = weight.data * 2


def replace_parameter(model):
    norm = model.encoder.layer[0].output.LayerNorm
    norm.bias = nn.Parameter(norm.bias + 1)


def change_dtype(model):
    model.to(torch.bfloat16)


def change_dtype_and_back(model):
    model.half().float()


def more_words(model):
    model.resize_token_embeddings(VOCAB + 9)
    model.embeddings.word_embeddings.weight[VOCAB:] = 0.5


def fewer_layers(model):
    del model.encoder.layer[1]


def change_the_scale(model):
    model.encoder.layer[0].attention.self.scaling = 0.9


def change_eps(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


CHANGES = {
    double_a_weight: 0,
    load_other_weights: 0,
    assign_other_weights: 1,
    replace_data: 1,
    replace_parameter: 1,
    change_dtype: 1,
    change_dtype_and_back: 1,
    more_words: 1,
    fewer_layers: 1,
    change_the_scale: 1,
    change_eps: 1,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_again(change, captures):
    model, plain = models(num_hidden_layers=2)
    batch = texts(2, 16)
    before = model(**batch)
    captures.clear()
    torch.manual_seed(1)
    change(model)
    torch.manual_seed(1)
    change(plain)
    if change is more_words:
        batch["input_ids"][-1, -1] = VOCAB + 7
    outputs = model(**batch)
    assert_same(outputs, plain(**batch))
    assert not torch.equal(outputs.last_hidden_state, before.last_hidden_state) or change is change_dtype_and_back
    assert captures == [(2, 16)] * CHANGES[change]
    assert_same(model(**batch), plain(**batch))  # and raises nothing
    assert len(captures) == CHANGES[change]


def test_a_hook_is_noticed_and_its_end_too(captures, caplog):
    model, plain = models()
    batch = texts(2, 16)
    model(**batch)
    fired = []
    hook = model.encoder.layer[0].register_forward_hook(lambda *_: fired.append(1))
    with fastbert.backend("auto"):
        model(**batch)
        model(**batch)
    assert fired == [1, 1]
    assert "has hooks" in caplog.text
    hook.remove()
    assert_same(model(**batch), plain(**batch))
    assert captures == [(2, 16)] * 2


WAYS = ["dropout", "adapter", "configuration", "patched", "types", "positions", "causal", "activation", "everywhere"]


@pytest.mark.parametrize("what", WAYS)
def test_a_block_that_changes_its_way_is_noticed(what, captures, caplog, monkeypatch):
    model, _ = models()
    batch = texts(2, 16)
    del batch["token_type_ids"]
    model(**batch)
    layer = model.encoder.layer[0]
    if what == "dropout":
        layer.output.dropout.p = 0.5
        layer.output.dropout.train()
    elif what == "adapter":
        layer.output.dense = nn.Sequential(layer.output.dense, nn.Tanh())
    elif what == "configuration":
        model.config.output_hidden_states = True
    elif what == "types":
        model.embeddings.token_type_ids.fill_(1)
    elif what == "positions":
        model.embeddings.position_ids = model.embeddings.position_ids.flip(1)
    elif what == "causal":
        layer.attention.self.is_causal = True
    elif what == "activation":
        layer.intermediate.intermediate_act_fn.act = torch.relu
    elif what == "everywhere":
        linear = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: linear(self, x) * 2)
    else:
        layer.forward = type(layer).forward.__get__(layer)
    with fastbert.backend("auto"):
        torch.manual_seed(0)
        outputs = model(**batch)
        torch.manual_seed(0)
        expected = model.forward.plain(**batch)
    assert outputs.keys() == expected.keys()
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert "no CUDA graph: " in caplog.text
    assert len(captures) == 1


def test_a_hook_is_noticed_before_another_bucket_is_captured(captures):
    """A hook may wait for the device, which would break the capture; and it should not see the captured run."""
    model, _ = models()
    model(**texts(2, 16))
    seen = []
    model.encoder.layer[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with fastbert.backend("auto"):
        model(**texts(3, 16))
    assert seen == [(3, 16, 48)]
    assert captures == [(2, 16)]


class MeanOverPlaces(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.mean(1)


class Subclass(fastbert.BertModel):
    pass


@pytest.mark.parametrize("what", ["pooler", "layer", "head", "subclass"])
def test_classes_from_elsewhere_are_not_captured(what, captures, caplog):
    """They may compute across the positions of a sequence, and a bucket has more positions than the call."""
    model, _ = models("BertForTokenClassification" if what == "head" else "BertModel")
    if what == "pooler":
        model.pooler = MeanOverPlaces()
    elif what == "layer":
        layer = model.encoder.layer[0]
        layer.__class__ = type("OtherLayer", (type(layer),), {})
    elif what == "head":
        model.classifier = nn.Sequential(nn.Linear(48, 3), nn.Softmax(1)).to(DEVICE)
    else:
        model = fastbert.graphed(Subclass(tiny_config(**LAYERS)).eval().to(DEVICE))
    with fastbert.backend("auto"):
        outputs, expected = (forward(**texts(3, 20)) for forward in (model, model.forward.plain))
    assert_same(outputs, expected)
    assert captures == []
    assert "may look at a bucket's padding" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merged_adapter_is_not_captured(captures, caplog):
    """Its layer runs in the kernels with the merged weights. Unmerging changes no address, so no graph could tell."""
    from peft import LoraConfig, inject_adapter_in_model

    model, _ = models()
    inject_adapter_in_model(LoraConfig(target_modules=["query"], init_lora_weights=False), model)
    model.eval()
    adapter = model.encoder.layer[0].attention.self.query
    batch = texts(2, 16)
    adapter.merge()
    assert_same(model(**batch), model.forward.plain(**batch))
    adapter.unmerge()
    with fastbert.backend("auto"):
        assert_same(model(**batch), model.forward.plain(**batch))
    assert captures == []
    assert "a merged adapter can change the weights unnoticed" in caplog.text


def test_an_optimized_sentence_transformer_replays(captures, tokenizer, tmp_path):
    """Its texts come packed."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertModel

    BertModel(tiny_config(vocab_size=len(tokenizer), **LAYERS)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    transformer = Transformer(str(tmp_path))
    embedder = SentenceTransformer(modules=[transformer, Pooling(48), Normalize()], device=str(DEVICE))
    sentences = ["Why?", "", "The cat sits outside.", "A man plays the guitar, and nobody listens to the man.", "cat"]
    fastbert.optimize(embedder)
    expected = embedder.encode(sentences, batch_size=2)
    Recordings.model = fastbert.graphed(embedder[0].model)
    for _ in range(2):
        assert (embedder.encode(sentences, batch_size=2) == expected).all()
    assert captures == [(32, 16, 40)]
    fastbert.restore(embedder)
    assert "forward" not in vars(embedder[0].model)


def test_a_failed_capture_is_not_tried_again(captures, caplog, monkeypatch):
    model, plain = models()
    model(**texts(1, 16))
    tries = []

    def full(self, run):
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(graphs.CudaGraphs, "capture", full)
        for _ in range(3):
            assert_same(model(**texts(2, 16)), plain(**texts(2, 16)))
        assert_same(model(**texts(1, 16)), plain(**texts(1, 16)))
    assert tries == [1]
    assert "not enough memory to capture 2x16" in caplog.text
    assert captures == [(1, 16)]
    model.bfloat16()
    model(**texts(2, 16))
    assert captures == [(1, 16), (2, 16)]


def test_outputs_too_large_to_be_kept_run_without(captures, caplog, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_OUTPUT_BYTES", 16 * 48 * 4)
    model, plain = models()
    for _ in range(2):
        assert_same(model(**texts(1, 16)), plain(**texts(1, 16)))
    assert "outputs of a bucket take more than" in caplog.text
    assert captures == [(1, 16)]


def test_a_model_that_is_dropped_is_freed(captures, monkeypatch):
    model, _ = models()
    record_outputs_only(monkeypatch)
    model(**texts(1, 16))
    owned = [model]
    del model
    assert_freed_at_once(owned)


def test_training_between_calls_keeps_the_graphs(captures):
    model, plain = models()
    batch = texts(2, 16)
    model(**batch)
    model.train()
    with torch.enable_grad():
        model(**batch).pooler_output.sum().backward()
    model.eval()
    for parameter in (*model.parameters(), *plain.parameters()):
        parameter.sub_(0.01)
    assert_same(model(**batch), plain(**batch))
    assert captures == [(2, 16)]


def test_threads_get_their_own_outputs(captures):
    model, plain = models()
    batches = [texts(batch_size, seq_len, seed=seed) for seed in range(3) for batch_size, seq_len in ((1, 9), (2, 17))]
    expected = [plain(**batch) for batch in batches]

    def call(batch):
        with fastbert.backend("triton"), torch.no_grad():
            if DEVICE.type == "cpu":
                return model(**batch)
            with torch.cuda.stream(torch.cuda.Stream()):
                outputs = model(**batch)
                torch.cuda.current_stream().synchronize()
                return outputs

    with ThreadPoolExecutor(8) as pool:
        for outputs, wanted in zip(pool.map(call, batches * 3), expected * 3, strict=True):
            assert_same(outputs, wanted)
    assert sorted(captures) == [(1, 16), (2, 32)]


def test_a_copy_has_graphs_of_its_own(captures):
    model, plain = models()
    batch = texts(2, 16)
    model(**batch)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for copied in copies:
        assert copied.forward.model is copied
        assert copied.forward.max_graphs == 32
        Recordings.model = copied
        copied.pooler.dense.weight.zero_()
        assert not copied(**batch).pooler_output.equal(plain(**batch).pooler_output)
    assert_same(model(**batch), plain(**batch))
    assert len(captures) == 4


def test_the_model_stays_what_it_is(captures, tmp_path):
    model, plain = models()
    assert type(model) is fastbert.BertModel
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    model(**texts(2, 16))
    model.save_pretrained(tmp_path)
    reloaded = fastbert.BertModel.from_pretrained(tmp_path).to(DEVICE).eval()
    assert_same(reloaded(**texts(2, 16)), plain(**texts(2, 16)))
    del model.forward
    assert_same(model(**texts(2, 16)), plain(**texts(2, 16)))
    assert len(captures) == 1


def test_graphed_raises_for_unsupported_models_and_limits():
    with pytest.raises(TypeError, match="Linear is not a fastbert model"):
        fastbert.graphed(nn.Linear(2, 2))
    model = fastbert.BertModel(tiny_config(num_hidden_layers=1))
    with pytest.raises(ValueError, match="max_graphs is 0"):
        fastbert.graphed(model, max_graphs=0)
    fastbert.graphed(model)
    with pytest.raises(ValueError, match="patched already"):
        fastbert.graphed(model)


def test_warmup_captures(captures, capsys):
    model, _ = models()
    fastbert.warmup(model, [(1, 9), (2, 16)])
    assert captures == [(1, 16), (16, 1, 40), (2, 16), (32, 4, 40)]
    model(**texts(2, 12))
    model(**packed([9, 13]))
    assert len(captures) == 4


class FakeCuda:
    """A stand-in for the functions of torch.cuda that a capture calls. It logs the calls."""

    def __init__(self, monkeypatch):
        self.log, self.stream = [], "main"
        self.streams = {name: SimpleNamespace(name=name, cuda_stream=name) for name in ("main", "other")}
        for name, stream in self.streams.items():
            stream.wait_event = lambda event, name=name: self.log.append(f"{name} after {event.of}")
        names = (
            "graph_pool_handle", "Stream", "Event", "CUDAGraph", "synchronize", "device", "graph", "current_stream",
        )  # fmt: skip
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.inside(f"on {stream}"))

    @contextmanager
    def inside(self, what):
        self.log.append(what)
        yield
        self.log.append(f"end {what}")

    def graph_pool_handle(self):
        return "pool"

    def Stream(self, device):
        return f"side stream of {device}"

    def Event(self):
        event = SimpleNamespace(of=None)
        event.record = lambda stream: setattr(event, "of", stream.name)
        event.synchronize = lambda: self.log.append(f"wait for {event.of}")
        return event

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def synchronize(self, device=None):
        self.log.append("wait")

    def device(self, device):
        return nullcontext()

    def graph(self, graph, pool, stream, capture_error_mode):
        return self.inside(f"capture into {pool} on {stream}, {capture_error_mode}")

    def current_stream(self, device):
        return self.streams[self.stream]


def test_cuda_calls_of_capture_and_replay(monkeypatch):
    """A first run that is not captured, the shared pool, and an order among the streams of calls."""
    cuda = FakeCuda(monkeypatch)
    device = graphs.CudaGraphs("cuda:0")
    for _ in range(2):
        replay, outputs = device.capture(lambda: cuda.log.append("run") or "outputs")
    assert outputs == "outputs"
    side, captured = "on side stream of cuda:0", "capture into pool on side stream of cuda:0, thread_local"
    assert cuda.log == 2 * [side, "wait", "run", captured, "run", f"end {captured}", f"end {side}"]
    cuda.log.clear()
    for stream in ("main", "main", "other", "other", "main"):
        cuda.stream = stream
        device.order_after_last_replay()
        replay()
        device.record_replay()
    device.synchronize()
    in_order = ["other after main", "replay", "replay", "main after other", "replay"]
    assert cuda.log == ["replay"] * 2 + in_order + ["wait for main"]


def test_a_graph_whose_capture_failed_is_kept(monkeypatch):
    """torch's allocator may go on asking it."""
    FakeCuda(monkeypatch)
    monkeypatch.setattr(capture, "_broken", [])
    runs = iter((None, RuntimeError("operation not permitted")))

    def run():
        if (error := next(runs)) is not None:
            raise error

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.CudaGraphs("cuda:0").capture(run)
    assert len(capture._broken) == 1
