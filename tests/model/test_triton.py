"""The whole model in the kernels: on a GPU, or on CPU tensors in Triton's interpreter."""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from cases import BATCH, HEADS, MASKS, SEQ_LEN, VOCAB, at_kept_tokens, batch, inputs_for, pair
from torch._subclasses import FakeTensorMode

import fastbert
import fastbert_kernels
from fastbert import ops, tokens
from fastbert.ops import backend, eager
from fastbert.testing import check_close
from fastbert_kernels.target import architecture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
KERNELS_OF_A_LAYER = Counter(
    _qkv_projection_kernel=1, _attention_fwd_kernel=1, _linear_kernel=3, _layer_norm_kernel=2
)  # in float32; in 16 bits and up to E = 384 two launches fewer


@pytest.fixture(autouse=True)
def in_kernels():
    """Everything runs in kernels, or raises."""
    fastbert_kernels.take_bad_ids(torch.device(DEVICE))
    with fastbert.backend("triton"):
        yield


@pytest.fixture(params=["host", "device"])
def packed_on(request, monkeypatch):
    """Where masks are packed: on the host, or on the device, where the host never knows the number of tokens."""
    if request.param == "device":
        monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    return request.param


@pytest.fixture
def no_eager(monkeypatch):
    """A call of an eager reference fails the test."""

    def forbid(op):
        def forbidden(*_, **__):
            raise AssertionError(f"eager.{op} was called")

        return forbidden

    for op in ops.OPS:
        monkeypatch.setattr(eager, op, forbid(op))


def on_device(inputs):
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def for_ours(inputs, packed_on):
    """The inputs, with the mask on the device where it is packed."""
    known = packed_on == "host" and "attention_mask" in inputs
    return inputs | ({"attention_mask": inputs["attention_mask"].cpu()} if known else {})


def models(head="BertModel", dtype=torch.float32, **settings):
    """Ours, transformers', and the truth: transformers' in float64."""
    ours, theirs = pair(head, **settings)
    return ours.to(DEVICE, dtype), theirs.to(DEVICE, dtype), deepcopy(theirs).to(DEVICE, torch.float64)


def check_outputs(ours, theirs, truth, mask):
    for name in ours:
        if name == "pooler_output" and mask is not None and not mask[:, 0].all():
            continue  # transformers pools the padding
        outputs = (ours[name], theirs[name], truth[name])
        if ours[name].is_floating_point() and ours[name].ndim:
            check_close(name, *(at_kept_tokens(x, mask) for x in outputs))


@pytest.mark.parametrize("mask", [None, "right", "left", "holes", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_outputs(mask, dtype, packed_on, no_eager, launches):
    ours, theirs, truth = models(dtype=dtype)
    inputs = on_device(batch(mask))
    with torch.no_grad():
        outputs = [ours(**for_ours(inputs, packed_on)), theirs(**inputs), truth(**inputs)]
    kept = None if mask is None else MASKS[mask].to(DEVICE)
    check_outputs(*outputs, kept)
    if kept is not None:
        assert not outputs[0].last_hidden_state[kept == 0].any()
    if architecture(torch.device(DEVICE)) not in ("sm_80", "sm_90", "sm_100"):
        return
    # Hidden size 48: one launch with LayerNorm in 16 bits.
    fused = Counter(_qkv_projection_kernel=1, _attention_fwd_kernel=1, _linear_kernel=1)
    fused["_linear_residual_layer_norm_kernel"] = 2
    layer = KERNELS_OF_A_LAYER if dtype == torch.float32 else fused
    assert sum(layer.values()) <= 7
    around = Counter(_embed_layer_norm_kernel=1, _linear_kernel=1)
    if mask is not None and (packed_on == "device" or mask != "full"):
        around.update(_unpack_kernel=1, _pool_kernel=1)
    if mask is not None and packed_on == "device":
        around.update(_row_lengths_kernel=1, _packing_plan_kernel=1)
    assert Counter(launches) == Counter({name: 3 * count for name, count in layer.items()}) + around


@pytest.mark.parametrize(("mask", "packed_on"), [("right", "host"), ("holes", "device")], indirect=["packed_on"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head, mask, packed_on, no_eager):
    ours, theirs, truth = models(head)
    inputs = on_device(inputs_for(head, mask))
    with torch.no_grad():
        outputs = [model(**inputs) for model in (ours, theirs, truth)]
    kept = inputs["attention_mask"]
    if head == "BertForQuestionAnswering":
        assert outputs[0].start_logits[kept == 0].max() == torch.finfo(torch.float32).min
    # transformers pools column 0, also if it is padding.
    rows = kept[..., 0].bool().flatten(1).all(1) if kept.ndim == 3 else kept[:, 0].bool()
    outputs = [{name: x[rows] for name, x in output.items()} for output in outputs]
    check_outputs(*outputs, kept[rows])


@pytest.mark.parametrize(
    ("padding", "dtype"), [("right", torch.float16), ("left", torch.float16), ("holes", torch.float32)], ids=str
)
def test_minilm(minilm_path, tokenizer, padding, dtype, no_eager, launches):
    import transformers

    texts = ["The cat sits outside.", "A man plays the guitar, and nobody listens to him any more.", "Why?"]
    tokenizer.padding_side = "right" if padding == "holes" else padding
    inputs = tokenizer(texts, padding=True, return_tensors="pt").to(DEVICE)
    tokenizer.padding_side = "right"
    if padding == "holes":
        inputs["attention_mask"][1, 3:6] = 0
    loaded = [library.BertModel.from_pretrained(minilm_path).to(DEVICE).eval() for library in (fastbert, transformers)]
    truth = deepcopy(loaded[1]).double()
    ours, theirs = (model.to(dtype) for model in loaded)
    with torch.no_grad():
        outputs = [ours(**for_ours(dict(inputs), "host")), theirs(**inputs), truth(**inputs)]
    check_outputs(*outputs, inputs["attention_mask"])
    if architecture(torch.device(DEVICE)) in ("sm_80", "sm_90", "sm_100"):
        assert len(launches) == (6 * 7 if dtype == torch.float32 else 6 * 5) + 4


def gradients(model, inputs):
    """The gradients of all parameters except the key biases: theirs are zero up to rounding, because they change no
    softmax."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None and not name.endswith("key.bias")
    }


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining"])
def test_gradients(head, packed_on):
    inputs = on_device(inputs_for(head, "right", with_labels=True))
    if inputs["labels"].ndim == 2:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    ours, theirs, truth = [gradients(model, inputs) for model in models(head)]
    assert ours.keys() == theirs.keys()
    # All gradients at once, each divided by its size: a bias of two elements is too small for statistics.
    sizes = {name: gradient.square().mean().sqrt() for name, gradient in truth.items()}
    check_close(
        "gradients",
        *(torch.cat([(x[name].double() / sizes[name]).flatten() for name in sizes]).to(kind)
          for x, kind in ((ours, torch.float32), (theirs, torch.float32), (truth, torch.float64))),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "mask"), [("BertModel", "right"), ("BertForSequenceClassification", None), ("BertModel", None)]
)
def test_a_second_derivative(head, mask):
    """A penalty on the gradients of the embeddings needs second derivatives through all layers. The eager back end has
    them with eager attention."""
    found = []
    for model in models(head, attention="eager"):
        layers = (model.bert if head != "BertModel" else model).encoder.layer
        layers[1] = layers[0]
        inputs = on_device(batch(mask))
        words = model.get_input_embeddings().weight
        x = words[inputs.pop("input_ids")].detach().requires_grad_()
        with fastbert.backend("eager"):
            outputs = model(inputs_embeds=x, **inputs)
        output = outputs[0] if mask is None or head != "BertModel" else outputs[0][MASKS[mask].bool()]
        (gradient,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
        kept = gradient if mask is None else gradient[MASKS[mask].bool()]
        (kept.square().sum() / 1000).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad})
    if mask is not None:
        for gradients in found:
            gradients["x"] = gradients["x"][MASKS[mask].bool()]
    assert found[0].keys() == found[1].keys()
    for name, truth in found[2].items():
        if not name.endswith("key.bias"):  # zero up to rounding: it changes no softmax
            check_close(name, *(gradients[name] for gradients in found[:2]), truth)


def test_kernels_have_no_second_derivative():
    ours, _, _ = models()
    x = torch.randn(BATCH, SEQ_LEN, 48, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives .* run the forward under fastbert.backend"):
        torch.autograd.grad(ours(inputs_embeds=x)[0].pow(3).sum(), x, create_graph=True)


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("mask", [None, "right"])
def test_shapes_without_numbers(mask, record, monkeypatch):
    """The first forward of a model may be one of fake tensors."""
    ours, _ = pair("BertForMaskedLM")
    ours.to(DEVICE)
    monkeypatch.setattr(sys.modules["fastbert_kernels.embed_layer_norm"], "_notes", {})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(record):
        inputs = {name: mode.from_tensor(x) for name, x in on_device(batch(mask)).items()}
        ours(**inputs)
        logits = ours(**inputs).logits
        assert logits.shape == (BATCH, SEQ_LEN, ours.config.vocab_size)
        if record:
            logits.sum().backward()


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 48), (2, 3, 5, 48)], ids=str)
def test_the_pooler_alone(shape, record):
    ours, theirs, truth = (model.pooler for model in models())
    hidden = torch.randn(shape, device=DEVICE)
    with torch.set_grad_enabled(record):
        check_close("pooled", ours(hidden), theirs(hidden), truth(hidden.double()))


def saved_by(call):
    """The tensors that a call saves for its backward, each memory once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        call()
    return list(kept.values())


def saved_by_a_layer(inputs, **settings):
    """The numbers that one layer saves, ours and transformers': the difference between models of three and of two."""
    saved = {}
    for num_layers in (2, 3):
        for model in models(num_hidden_layers=num_layers, intermediate_size=4 * 48, **settings)[:2]:
            parameters = {x.data_ptr() for x in model.train().parameters()}
            kept = saved_by(lambda model=model: model(**inputs))
            sizes = [x.numel() for x in kept if x.data_ptr() not in parameters and x.is_floating_point()]
            saved.setdefault(type(model).__module__, []).append(sum(sizes))
    return [after - before for before, after in saved.values()]


@pytest.mark.parametrize("mask", [None, "right"])
def test_what_a_layer_saves(mask):
    """10 units of T x E, where transformers saves 16: 3 for queries, keys and values, 1 for the context, 2 for the sums
    before LayerNorm, and 4 for the activation's input. The layer's input is made again from the layer before."""
    ours, theirs = saved_by_a_layer(on_device(batch(mask)))
    size = 48 * (BATCH * SEQ_LEN if mask is None else int(MASKS[mask].sum()))
    # Beside these: lse, one number a head, and LayerNorm's weight and bias.
    assert ours == 10 * size + 3 * size // 48 + 2 * 48
    assert ours <= 0.65 * theirs or mask is not None  # transformers computes padding, too


def test_what_a_layer_saves_with_dropout():
    """As much as without, since nothing about dropout is stored. transformers saves 24 units in plain PyTorch, which
    stores the probabilities: with 32 tokens and 3 heads as many a row as base with 128 tokens."""
    dropouts = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    inputs = {"input_ids": torch.randint(0, VOCAB, (2, 32), device=DEVICE)}
    ours, theirs = saved_by_a_layer(inputs, max_position_embeddings=32, attention="eager", **dropouts)
    assert ours == 10 * 64 * 48 + 3 * 64 + 2 * 48
    assert ours <= 0.45 * theirs


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("around_backward", ["triton", "eager", "another thread"])
@pytest.mark.parametrize("around_forward", ["triton", "eager"])
def test_gradient_checkpointing_recomputes_a_layer_by_the_same_back_end(
    around_forward, around_backward, use_reentrant, launches
):
    """Whatever back end is chosen on the thread of the backward, which on a GPU is one of autograd's."""
    ours, _, _ = models("BertForSequenceClassification", num_hidden_layers=2)
    inputs = on_device(inputs_for("BertForSequenceClassification", "right", with_labels=True))
    expected = gradients(ours, inputs)
    ours.zero_grad()
    ours.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.disable_input_require_grads()  # hooks, which prevent fusion
    launches.clear()
    with fastbert.backend(around_forward):
        loss = ours(**inputs).loss
    if around_backward == "another thread":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
    else:
        with fastbert.backend(around_backward):
            loss.backward()
    assert launches.count("_qkv_projection_kernel") == (4 if around_forward == "triton" else 0)
    for name, grad in expected.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, grad, atol=1e-4, rtol=1e-3)


# Score masks made of a relative bias [H, S, S].
BIASED = {
    "heads": lambda bias: bias[None],
    "texts": lambda bias: torch.stack((*bias, torch.zeros_like(bias[0]))),
    "some texts": lambda bias: torch.stack((bias, bias, *torch.zeros_like(bias)[None].expand(2, -1, -1, -1))),
    "float64": lambda bias: bias[None].double(),
    "-inf": lambda bias: bias[None].masked_fill(MASKS["right"].to(DEVICE)[:, None, None] == 0, -torch.inf),
    "bool": lambda bias: (bias > 0)[None],
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", BIASED)
def test_a_mask_learns(kind, autocast, monkeypatch):
    monkeypatch.setattr(backend._choice, "name", "auto")
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    seed, found = torch.randn(3, SEQ_LEN, SEQ_LEN), []
    for model, dtype in zip(models(num_hidden_layers=2), (torch.float32, torch.float32, torch.float64), strict=True):
        bias = seed.to(DEVICE, dtype).requires_grad_()
        mask = BIASED[kind](bias)
        if found:  # transformers takes four dimensions and the model's own dtype
            mask = mask[:, None] if mask.ndim == 3 else mask
            mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        with torch.autocast(DEVICE, torch.bfloat16, autocast and dtype == torch.float32):
            output = model(batch(None)["input_ids"].to(DEVICE), mask).last_hidden_state
        wanted = [model.encoder.layer[0].output.dense.weight, *([bias] if mask.requires_grad else [])]
        found.append(torch.autograd.grad(output.pow(3).sum(), wanted))
    for name, *gradients in zip(("weight", "bias"), *found, strict=False):
        check_close(name, *gradients, factor=6.0 if autocast else 3.0)


def texts_of(lengths, seq_len):
    ids = torch.arange(len(lengths))[:, None] * 7 + torch.arange(seq_len) * 3
    mask = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
    return on_device({"input_ids": ids % 61 * mask, "attention_mask": mask.long()})


@pytest.mark.parametrize(
    ("dtype", "packed_on"),
    [(torch.float32, "host"), (torch.float16, "device"), (torch.bfloat16, "host"), (torch.bfloat16, "device")],
    indirect=["packed_on"],
    ids=str,
)
def test_a_sequence_is_bitwise_equal_in_any_batch(dtype, packed_on):
    ours, _, _ = models(dtype=dtype, num_hidden_layers=1)
    lengths = (5, 12, 1, 9, 12, 3)
    together = texts_of(lengths, 12)
    with torch.no_grad():
        outputs = ours(**together)
        pooled = pool_mean(outputs.last_hidden_state, together["attention_mask"])
        for row, length in enumerate(lengths):
            ids = together["input_ids"][row : row + 1]
            left = torch.cat((ids[:, length:], ids[:, :length]), 1)
            alone = [
                (ours(ids[:, :length]), slice(None)),
                (ours(torch.nn.functional.pad(ids, (0, 8)), mask_of(length, 20)), slice(length)),
            ]
            # Left padding shifts positions, unless they are given.
            positions = torch.cat((torch.zeros(12 - length), torch.arange(length)))[None].long().to(DEVICE)
            flipped = ours(left, mask_of(length, 12).flip(1), position_ids=positions)
            alone.append((flipped, slice(12 - length, None)))
            for output, columns in alone:
                assert torch.equal(output.last_hidden_state[0, columns], outputs.last_hidden_state[row, :length])
                assert torch.equal(output.pooler_output[0], outputs.pooler_output[row])
            vector = pool_mean(alone[0][0].last_hidden_state, None)
            assert torch.equal(vector[0], pooled[row])
        order = torch.tensor([3, 0, 5, 1, 4, 2], device=DEVICE)
        permuted = ours(**{name: x[order] for name, x in together.items()})
        assert torch.equal(permuted.last_hidden_state, outputs.last_hidden_state[order])
        changed = together["input_ids"].masked_fill(together["attention_mask"] == 0, 60)
        assert torch.equal(ours(changed, together["attention_mask"])[0], outputs[0])


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"])
def test_logits_are_bitwise_equal_in_any_batch(head, packed_on):
    ours, _, _ = models(f"BertFor{head}", num_hidden_layers=1)
    lengths = (5, 12, 1)
    together = texts_of(lengths, 12)
    with torch.no_grad():
        logits = ours(**together)[0]
        for row, length in enumerate(lengths):
            alone = ours(together["input_ids"][row : row + 1, :length])[0]
            expected = logits[row] if head == "SequenceClassification" else logits[row, :length]
            assert torch.equal(alone[0], expected)


def test_eight_threads_at_once():
    ours, _, _ = models(num_hidden_layers=1)
    inputs = [texts_of((length, 4), 12) for length in range(1, 9)]
    with torch.no_grad():
        expected = [ours(**given).last_hidden_state for given in inputs]

    def run(given):
        with torch.no_grad(), fastbert.backend("triton"):
            return ours(**given).last_hidden_state

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, inputs))
    for ours_alone, ours_among in zip(expected, found, strict=True):
        assert torch.equal(ours_alone, ours_among)


def mask_of(length, seq_len):
    return (torch.arange(seq_len) < length)[None].long().to(DEVICE)


def pool_mean(hidden_states, mask):
    mask = torch.ones(hidden_states.shape[:2], device=DEVICE) if mask is None else mask
    indices, cu_seqlens = ops.packing_plan(mask)
    return ops.pool(hidden_states.flatten(0, 1), cu_seqlens, "mean", True, indices)


@pytest.mark.parametrize(
    ("name", "value", "limit"), [("input_ids", 99, 61), ("token_type_ids", -1, 2), ("position_ids", 24, 24)]
)
def test_an_index_out_of_range(name, value, limit, packed_on):
    """Its sequence is NaN, the others are bitwise equal, and the next call raises an error with the value."""
    ours, _, _ = models(num_hidden_layers=1)
    inputs = on_device(batch("right")) | {"position_ids": torch.arange(SEQ_LEN, device=DEVICE).repeat(BATCH, 1)}
    with torch.no_grad():
        clean = ours(**inputs)
        inputs[name] = inputs[name].clone()
        inputs[name][1, 3] = value
        inputs[name][1, 9] = 1000  # at padding: never read
        dirty = ours(**inputs)
        kept = inputs["attention_mask"].bool()
        assert dirty.last_hidden_state[1][kept[1]].isnan().all()
        assert dirty.pooler_output[1].isnan().all()
        for row in (0, 2, 3):
            assert torch.equal(dirty.last_hidden_state[row], clean.last_hidden_state[row])
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        with pytest.raises(IndexError, match=f"{name} held {value}, allowed are 0 to {limit - 1}"):
            ours(**inputs)
        assert ours(**on_device(batch("right"))).last_hidden_state.isfinite().all()


def test_several_indices_out_of_range_are_all_named():
    ours, _, _ = models(num_hidden_layers=1)
    inputs = on_device(batch(None))
    inputs["input_ids"][0, 0], inputs["token_type_ids"][1, 1] = -7, 5
    with torch.no_grad():
        ours(**inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        with pytest.raises(IndexError, match="input_ids held -7, .* to 60, token_type_ids held 5, allowed are 0 to 1:"):
            ours(**inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_an_index_out_of_range_in_training(compiled):
    """The backward repeats the lookup in plain PyTorch, which must clamp the index."""
    ours, _, _ = models("BertForSequenceClassification", num_hidden_layers=1)
    inputs = on_device(inputs_for("BertForSequenceClassification", "right", with_labels=True))
    inputs["input_ids"][1, 9] = -100  # at padding: never read
    model = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    model(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)
    inputs["input_ids"][1, 2] = 61
    model(**inputs).loss.backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert fastbert_kernels.take_bad_ids(torch.device(DEVICE)) == [("input_ids", 61, 61)]


def test_ids_at_padding_may_be_invalid_for_modules_too(monkeypatch):
    monkeypatch.setattr(backend._choice, "name", "auto")
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
    for change in (lambda model: model.embeddings.train(), lambda model: model.double()):
        ours, _, _ = models(hidden_dropout_prob=1e-9)
        change(ours)
        inputs = on_device(batch("right"))
        with torch.no_grad():
            expected = ours(**inputs).last_hidden_state
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            torch.testing.assert_close(ours(**inputs).last_hidden_state, expected)


def test_ids_can_be_checked_in_the_same_call():
    code = (
        "import torch, fastbert; config = fastbert.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, "
        "num_attention_heads=2, intermediate_size=16); "
        f"fastbert.BertModel(config).eval().to('{DEVICE}')(torch.full((1, 3), 9, device='{DEVICE}'))"
    )
    environment = os.environ | {"FASTBERT_CHECK": "1", "FASTBERT_BACKEND": "triton"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "input_ids holds 9, allowed are 0 to 8" in run.stderr


def test_packed_sequences(no_eager):
    ours, _, _ = models(num_hidden_layers=1)
    lengths = (5, 1, 6)
    inputs = batch(None)["input_ids"][:1].to(DEVICE)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    with torch.no_grad():
        packed = ours(inputs, cu_seq_lens_q=cu_seqlens)
        start = 0
        for row, length in enumerate(lengths):
            alone = ours(inputs[:, start : start + length])
            assert torch.equal(packed.last_hidden_state[:, start : start + length], alone.last_hidden_state)
            assert torch.equal(packed.pooler_output[row], alone.pooler_output[0])
            start += length


def test_packed_sequences_with_offsets_on_the_device(monkeypatch):
    """The offsets cannot be checked then. Outputs past the last offset are zeros."""
    ours, _, _ = models(num_hidden_layers=1)
    inputs = batch(None)["input_ids"][:1].to(DEVICE)
    with torch.no_grad():
        expected = ours(inputs[:, :9], cu_seq_lens_q=torch.tensor([0, 5, 9]).int())
        monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
        packed = ours(inputs, cu_seq_lens_q=torch.tensor([0, 5, 9], device=DEVICE).int(), max_length_q=5)
    assert torch.equal(packed.last_hidden_state[:, :9], expected.last_hidden_state)
    assert torch.equal(packed.pooler_output, expected.pooler_output)
    assert not packed.last_hidden_state[:, 9:].any()


def test_a_packed_row_may_be_longer_than_the_position_table():
    ours, _, _ = models(num_hidden_layers=1)
    with torch.no_grad():
        outputs = ours(torch.ones(1, 30, dtype=torch.long, device=DEVICE), cu_seq_lens_q=torch.tensor([0, 10, 20, 30]))
    assert torch.equal(outputs.pooler_output[0], outputs.pooler_output[2])


def hooked(model):
    model.encoder.layer[1].output.register_forward_hook(lambda *_: None)


def training(model):
    model.encoder.layer[1].train()


@pytest.mark.parametrize("change", [hooked, training, "weights", "states"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_unsupported_parts_run_in_eager_beside_kernels(change, gradients, packed_on, monkeypatch):
    """One layer of three, or the requested outputs, need the modules. All numbers equal transformers'."""
    monkeypatch.setattr(backend._choice, "name", "auto")
    monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    ours, theirs, truth = models(hidden_dropout_prob=1e-9)
    asked = {"weights": {"output_attentions": True}, "states": {"output_hidden_states": True}}.get(change, {})
    if callable(change):
        change(ours)
    inputs = on_device(batch("right"))
    with torch.set_grad_enabled(gradients):
        outputs = [model(**inputs, **asked) for model in (ours, theirs, truth)]
    check_outputs(*({"last_hidden_state": out.last_hidden_state} for out in outputs), inputs["attention_mask"])
    for states in zip(*(out.hidden_states or () for out in outputs), strict=True):
        check_close("state", *(at_kept_tokens(x, inputs["attention_mask"]) for x in states))
    if gradients:
        loss = outputs[0].last_hidden_state.square().sum()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(ours.encoder.parameters())))


def test_heads_that_are_too_large_raise_or_run_in_eager(monkeypatch):
    ours, theirs, truth = models(hidden_size=272, num_attention_heads=2)
    inputs = on_device(batch("right"))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="heads of 136 are larger than 128"):
            ours(**inputs)
        assert {row.backend for row in fastbert.explain(ours) if row.op == "attention"} == {"unsupported"}
        monkeypatch.setattr(backend._choice, "name", "auto")
        monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
        monkeypatch.setattr(tokens, "shapes_may_depend_on_data", lambda tensor: False)
        outputs = [model(**inputs) for model in (ours, theirs, truth)]
    check_outputs(*outputs, inputs["attention_mask"])


def test_autocast(packed_on):
    """Products in bfloat16, sums and LayerNorm in float32, as in transformers' modules under autocast."""
    ours, theirs, truth = models()
    inputs = on_device(batch("right"))
    with torch.no_grad():
        expected = truth(**inputs)
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs = [model(**inputs) for model in (ours, theirs)]
    assert outputs[0].last_hidden_state.dtype == outputs[1].last_hidden_state.dtype == torch.float32
    assert outputs[0].pooler_output.dtype == outputs[1].pooler_output.dtype
    # The interpreter truncates float32 to bfloat16, a GPU rounds: twice the error.
    factor = 3.0 if DEVICE == "cuda" else 6.0
    check_close(
        "autocast", *(at_kept_tokens(x[0], inputs["attention_mask"]) for x in (*outputs, expected)), factor=factor
    )


def test_gradients_under_autocast():
    ours, theirs, truth = models("BertForSequenceClassification")
    inputs = on_device(inputs_for("BertForSequenceClassification", "right", with_labels=True))
    found = [gradients(truth, inputs)]
    for model in (ours, theirs):
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"):
        check_close(name, found[1][name], found[2][name].float(), found[0][name], factor=6.0)


def test_warmup(launches):
    ours, _, _ = models("BertForMultipleChoice")
    fastbert.warmup(ours, [(1, 4), (2, 3)])
    assert launches.count("_qkv_projection_kernel") == 2 * 6 * 3
    with pytest.raises(ValueError, match="a sequence of 25 tokens is longer"):
        fastbert.warmup(ours, [(1, 25)])
