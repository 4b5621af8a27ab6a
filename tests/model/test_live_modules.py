"""Changed modules take effect before and after `optimize`, whatever the configuration says, as in transformers."""

import subprocess
import sys
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from cases import MASKS, VOCAB, batch, inputs_for, pair, tiny_config, with_random_weights
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.ops import backend


def first(model):
    return model.encoder.layer[0]


def prune_heads(model):
    """Structured pruning: narrower projections and fewer heads in the attention module."""
    attention, output = first(model).attention.self, first(model).attention.output
    rows = torch.cat([torch.arange(head * 16, (head + 1) * 16) for head in (0, 2)])
    for name in ("query", "key", "value"):
        linear = getattr(attention, name)
        linear.weight, linear.bias = nn.Parameter(linear.weight[rows]), nn.Parameter(linear.bias[rows])
    output.dense.weight = nn.Parameter(output.dense.weight[:, rows])
    attention.num_attention_heads, attention.all_head_size = 2, 32


def prune_neurons(model):
    layer = first(model)
    up, down = layer.intermediate.dense, layer.output.dense
    up.weight, up.bias = nn.Parameter(up.weight[:50]), nn.Parameter(up.bias[:50])
    down.weight = nn.Parameter(down.weight[:, :50])


def narrow_heads(model):
    attention = first(model).attention.self
    attention.attention_head_size, attention.num_attention_heads = 8, 6


def change_eps(model):
    first(model).output.LayerNorm.eps = model.embeddings.LayerNorm.eps = 0.3


def scale(value):
    return lambda model: setattr(first(model).attention.self, "scaling", value)


def learn_the_scale(model):
    model.set_attn_implementation("eager")
    first(model).attention.self.scaling = nn.Parameter(torch.tensor(0.4))


def swap_the_activation(model):
    first(model).intermediate.intermediate_act_fn = nn.ReLU()


def change_inside_the_activation(model):
    first(model).intermediate.intermediate_act_fn.act = torch.relu


def attend_causally_below_a_hook(model):
    attend_causally(model)
    first(model).register_forward_hook(lambda *_: None)


def activate_along_the_sequence(model):
    first(model).intermediate.intermediate_act_fn.act = lambda x: x.softmax(1)


def attend_causally(model):
    first(model).attention.self.is_causal = True


def become_a_decoder(model):
    model.config.is_decoder, model.config.use_cache = True, False


def halve_the_words(model):
    model.embeddings.word_embeddings.half()


def halve_the_positions(model):
    model.embeddings.position_embeddings.half()


def feed_forward_by_hand(model):
    layer = first(model)
    layer.feed_forward_chunk = lambda x: layer.output(layer.intermediate(x), x) * 1.5


def mask_by_hand(model):
    causal = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)[None, None]
    model._create_attention_masks = lambda **inputs: (causal, None)


def positions_twice_around(model):
    model.embeddings.position_ids = (torch.arange(48) % 5)[None]


def positions_from_the_second(model):
    model.embeddings.position_ids = torch.arange(1, 24)[None]


def types_of_the_second_kind(model):
    model.embeddings.token_type_ids.fill_(1)


def types_by_position(model):
    model.embeddings.token_type_ids[0, 3:] = 1


def cut_the_positions(model):
    table = model.embeddings.position_embeddings
    table.weight = nn.Parameter(table.weight[:12])


def another_layer(model):
    model.encoder.layer.append(deepcopy(model.encoder.layer[0]))
    first(model).output.dense.weight.data.mul_(2)


def one_layer_twice(model):
    model.encoder.layer = nn.ModuleList([model.encoder.layer[1], model.encoder.layer[0], model.encoder.layer[1]])


# Change of the model -> whether its blocks are still fused.
CHANGES = {
    prune_heads: True,
    prune_neurons: True,
    narrow_heads: True,
    change_eps: True,
    scale(0.0): True,
    scale(-0.3): True,
    scale(torch.tensor(0.3)): True,
    learn_the_scale: False,
    swap_the_activation: True,
    change_inside_the_activation: False,
    activate_along_the_sequence: False,
    attend_causally: False,
    attend_causally_below_a_hook: False,
    become_a_decoder: True,
    halve_the_words: True,
    halve_the_positions: True,
    feed_forward_by_hand: False,
    mask_by_hand: True,
    positions_twice_around: True,
    positions_from_the_second: True,
    types_of_the_second_kind: True,
    types_by_position: True,
    cut_the_positions: True,
    another_layer: True,
    one_layer_twice: True,
}
# Changes for which `optimize` raises -> its message. After `optimize` they take effect.
REFUSED = {
    become_a_decoder: "config.is_decoder=True is not supported",
    feed_forward_by_hand: "encoder.layer.0 has a patched feed_forward_chunk",
    mask_by_hand: "its _create_attention_masks is patched",
}
WITHOUT_TYPES = (types_of_the_second_kind, types_by_position)


def tiny(**settings):
    torch.manual_seed(0)
    return with_random_weights(transformers.BertModel(tiny_config(num_hidden_layers=2, **settings)))


def changed_pair(change, when):
    """A changed model of transformers, and an optimized one with the same change, made before or after `optimize` and a
    first call."""
    theirs, ours = tiny(), tiny()
    change(theirs)
    if when == "before":
        change(ours)
    fastbert.optimize(ours)
    if when == "after":
        ours(**batch(None))
        change(ours)
    return ours, theirs


def given_to(change, mask):
    inputs = batch(mask)
    if change in WITHOUT_TYPES:
        del inputs["token_type_ids"]
    return inputs


@pytest.fixture(params=["eager", "kernels"])
def back_end(request, monkeypatch):
    """Plain PyTorch, and as on a GPU: kernels where they are supported."""
    if request.param == "kernels":
        monkeypatch.setattr(backend, "_wants_kernels", lambda device: True)
    return request.param


# With kernels, only changes after `optimize` are tested: the moment makes no difference to them.
@pytest.mark.parametrize(
    ("when", "back_end"), [("before", "eager"), ("after", "eager"), ("after", "kernels")], indirect=["back_end"]
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("<>"))
def test_outputs_are_transformers(change, when, back_end):
    if when == "before" and change in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[change]):
            changed_pair(change, when)
        return
    ours, theirs = changed_pair(change, when)
    # Modules that mix tokens of a sequence see zeros at padding here, so compare without padding.
    masks = ["full"] if change is activate_along_the_sequence else ["right"]
    for mask in masks if back_end == "kernels" else [None, *masks]:
        inputs = given_to(change, mask)
        with torch.no_grad():
            outputs, expected = (model(**inputs, output_hidden_states=True) for model in (ours, theirs))
        kept = ... if mask is None else MASKS[mask].bool()
        assert len(outputs.hidden_states) == len(expected.hidden_states) == len(ours.encoder.layer) + 1
        for a, b in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a[kept], b[kept], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)
    fused = {row.backend for row in fastbert.explain(ours) if row.block == "encoder.layer.0"} != {"modules"}
    assert fused == CHANGES[change]


@pytest.mark.parametrize("change", [prune_heads, learn_the_scale, halve_the_words, positions_twice_around, scale(-0.3)])
def test_gradients_are_transformers(change, back_end):
    ours, theirs = changed_pair(change, "before")
    for model in (ours, theirs):
        model(**batch("right")).last_hidden_state[MASKS["right"].bool()].sin().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not name.startswith("pooler") and not name.endswith("key.bias"):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_a_score_mask_may_have_the_number_of_heads_of_any_layer():
    ours, theirs = tiny(), tiny()
    for model in (ours, theirs):
        prune_heads(model)
        model.encoder.layer = model.encoder.layer[:1]
    fastbert.optimize(ours)
    mask = torch.randn(4, 2, 12, 12)
    with torch.no_grad():
        outputs, expected = (model(**batch(None), attention_mask=mask) for model in (ours, theirs))
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_a_table_of_more_positions_allows_longer_sequences(back_end):
    """Users extend the position table by replacing its weight, without updating num_embeddings."""
    ours, theirs = tiny(), tiny()
    for model in (ours, theirs):
        embeddings = model.embeddings
        weight = embeddings.position_embeddings.weight
        embeddings.position_embeddings.weight = nn.Parameter(torch.cat((weight, weight.flip(0))))
        embeddings.position_ids, embeddings.token_type_ids = torch.arange(48)[None], torch.zeros(1, 48).long()
    fastbert.optimize(ours)
    ids = torch.randint(VOCAB, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="a sequence of 49 tokens is longer than max_position_embeddings=48"):
            ours(torch.ones(1, 49, dtype=torch.long))


@pytest.mark.parametrize("way", ["plain", "training", "hooked", "compiled"])
def test_a_table_may_be_longer_than_the_buffers(way):
    ours, longer = fastbert.BertModel(tiny_config()).eval(), nn.Embedding(48, 48)
    ours.embeddings.position_embeddings = longer
    ids, model = torch.randint(VOCAB, (2, 40)), ours
    with torch.no_grad():
        expected = ours(ids, position_ids=torch.arange(40)[None]).last_hidden_state
        if way == "training":
            ours.train()
        elif way == "hooked":
            ours.embeddings.register_forward_hook(lambda *_: None)
        elif way == "compiled":
            model = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_a_buffer_may_be_missing():
    ours, theirs = fastbert.optimize(tiny()), tiny()
    for model in (ours, theirs):
        del model.embeddings.token_type_ids
        positions_from_the_second(model)
    ids = batch(None)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], atol=1e-5, rtol=1e-5)


def test_a_table_of_fewer_positions_is_the_limit():
    ours = tiny()
    cut_the_positions(ours)
    with pytest.raises(ValueError, match="a sequence of 13 tokens is longer than max_position_embeddings=12"):
        fastbert.optimize(ours)(torch.ones(1, 13, dtype=torch.long))


def test_an_id_past_the_end_of_a_cut_table_is_named():
    ours = tiny()
    table = ours.embeddings.word_embeddings
    table.weight = nn.Parameter(table.weight[:20])
    with pytest.raises(IndexError, match="input_ids holds 20, allowed are 0 to 19"):
        fastbert.optimize(ours)(torch.full((1, 3), 20))


def test_a_buffer_is_checked_again_after_a_write():
    ours, theirs = fastbert.optimize(tiny()), tiny()
    ids = batch(None)["input_ids"]
    with torch.no_grad():
        for value in (0, 1, 0):
            for model in (ours, theirs):
                model.embeddings.token_type_ids[0, 2] = value
            torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], atol=1e-5, rtol=1e-5)


def test_packed_sequences_have_the_positions_of_the_buffer():
    ours = tiny()
    positions_twice_around(ours)
    fastbert.optimize(ours)
    row = torch.randint(VOCAB, (1, 16))
    with torch.no_grad():
        packed = ours(row, cu_seq_lens_q=torch.tensor([0, 9, 16])).last_hidden_state
        alone = torch.cat((ours(row[:, :9])[0], ours(row[:, 9:])[0]), 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_traced_graphs_have_the_buffers_as_they_are():
    ours = fastbert.optimize(tiny())
    ids = batch(None)["input_ids"]
    compiled, theirs = torch.compile(ours, fullgraph=True, backend="aot_eager"), tiny()
    with torch.no_grad():
        for change in (lambda model: None, types_by_position, positions_from_the_second):
            change(ours)
            change(theirs)
            torch.testing.assert_close(compiled(ids)[0], theirs(ids)[0], atol=1e-5, rtol=1e-5)


def test_a_new_configuration_that_names_no_attention():
    ours = fastbert.optimize(tiny())
    with torch.no_grad():
        before = ours(**batch("right")).last_hidden_state
        ours.config = tiny_config(num_hidden_layers=2)
        assert ours.config._attn_implementation is None
        assert torch.equal(ours(**batch("right")).last_hidden_state, before)


def test_an_unknown_attention_function_raises():
    ours = fastbert.optimize(tiny())
    ours.config._attn_implementation = "twice"
    with pytest.raises(ValueError, match="attn_implementation='twice' of the model is unknown"):
        ours(**batch(None))


@pytest.mark.parametrize("change", [attend_causally, become_a_decoder])
def test_causal_attention_by_another_implementation_raises(change):
    ours = fastbert.optimize(tiny())
    change(ours)
    ours.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 is not supported"):
        ours(**batch("right"))


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("way", ["wrapped", "patched", "patched for every model"])
def test_attention_weights_of_a_layer_with_another_forward_raise(way, monkeypatch):
    """The weights would be missing, or the patch ignored."""
    ours = fastbert.optimize(tiny())
    layer = first(ours)
    if way == "wrapped":
        ours.encoder.layer[0] = Wrapped(layer)
    elif way == "patched":
        monkeypatch.setattr(layer, "forward", halved(layer.forward))
    else:
        monkeypatch.setattr(hf.BertLayer, "forward", halved(hf.BertLayer.forward))
    with pytest.raises(
        ValueError, match="output_attentions is not supported for a .* whose forward is patched or wrapped"
    ):
        ours(**batch("right"), output_attentions=True)
    assert ours(**batch("right")).last_hidden_state.isfinite().all()


def test_use_cache_raises():
    ours = fastbert.optimize(tiny())
    ours.config.is_decoder = True
    with pytest.raises(ValueError, match="use_cache=True: only encoders are supported"):
        ours(**batch(None))


@pytest.mark.parametrize(
    "mask", [MASKS["right"][1:2], MASKS["right"][:, None] * MASKS["right"][:, :, None]], ids=["2-D", "3-D"]
)
def test_masks_of_our_own_shapes_combine_with_causal_ones(mask):
    ours = fastbert.optimize(tiny())
    become_a_decoder(ours)
    wide = mask.expand(4, -1) if mask.ndim == 2 else mask[:, None].bool()
    with torch.no_grad():
        outputs, expected = (ours(**batch(None), attention_mask=x).last_hidden_state for x in (mask, wide))
    assert torch.equal(outputs, expected)


def test_packed_sequences_with_custom_masks_raise():
    ours = fastbert.optimize(tiny())
    mask_by_hand(ours)
    with pytest.raises(ValueError, match="cu_seq_lens_q is not supported for a decoder or a patched"):
        ours(batch(None)["input_ids"][:1], cu_seq_lens_q=torch.tensor([0, 5, 12]))


OPTIONS = [("scale_grad_by_freq", True), ("max_norm", 0.5), ("sparse", True), ("padding_idx", 1)]


@pytest.mark.parametrize("table", ["word_embeddings", "position_embeddings", "token_type_embeddings"])
@pytest.mark.parametrize(("option", "value"), OPTIONS)
def test_options_of_an_embedding_give_transformers_gradients(table, option, value, back_end):
    """Ids at padding count in the frequencies; positions are looked up once for all sequences."""
    found = []
    for model in (fastbert.optimize(tiny()), tiny()):
        setattr(getattr(model.embeddings, table), option, value)
        inputs = batch("right") | {"position_ids": torch.arange(12)[None]}
        inputs["input_ids"][:, ::2] = inputs["input_ids"][:1, :1]  # one word is frequent
        output = model(**inputs).last_hidden_state[MASKS["right"].bool()]
        output.sin().sum().backward()
        weight = getattr(model.embeddings, table).weight
        found.append((output, weight.grad.to_dense(), weight.detach()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_invalid_ids_at_padding_of_a_table_with_options():
    ours = fastbert.optimize(tiny())
    ours.embeddings.word_embeddings.scale_grad_by_freq = True
    inputs = batch("right")
    expected = ours(**inputs).last_hidden_state
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert torch.equal(ours(**inputs).last_hidden_state, expected)


def twice(function):
    return lambda *args, **kwargs: (lambda out: (out[0] * 2, *out[1:]))(function(*args, **kwargs))


@contextmanager
def patched(owner, name, make):
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def registered(interface, function):
    original = interface()["sdpa"]
    interface.register("sdpa", function(original))
    try:
        yield
    finally:
        interface.register("sdpa", original)


@contextmanager
def registered_as_eager():
    AttentionInterface.register("eager", twice(hf.eager_attention_forward))
    try:
        yield
    finally:
        del AttentionInterface._global_mapping["eager"]


def halved(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 0.5


def see_the_first_half(function):
    def mask(*args, **kwargs):
        kept = torch.ones(4, 1, 12, 12, dtype=torch.bool)
        kept[..., 6:] = False
        return kept

    return mask


EVERY_MODEL = {
    "attention of a layer": lambda: patched(hf.BertSelfAttention, "forward", twice),
    "a whole layer": lambda: patched(hf.BertLayer, "forward", halved),
    "the feed-forward part": lambda: patched(
        hf.BertLayer, "feed_forward_chunk", lambda original: lambda self, x: original(self, x) * 0.5
    ),
    "an inner module": lambda: patched(hf.BertIntermediate, "forward", halved),
    "embeddings": lambda: patched(hf.BertEmbeddings, "forward", halved),
    "the pooler": lambda: patched(hf.BertPooler, "forward", halved),
    "linear layers": lambda: patched(nn.Linear, "forward", halved),
    "an activation": lambda: patched(transformers.activations.GELUActivation, "forward", halved),
    "registered attention": lambda: registered(AttentionInterface, twice),
    "eager attention": lambda: patched(hf, "eager_attention_forward", twice),
    "registered eager attention": registered_as_eager,
    "a function of torch": lambda: patched(
        torch.nn.functional, "scaled_dot_product_attention", lambda original: halved(original)
    ),
    "the masks' method": lambda: patched(
        hf.BertModel, "_create_attention_masks", lambda _: lambda self, **inputs: (torch.eye(12)[None, None] * 9, None)
    ),
    "registered masks": lambda: registered(AttentionMaskInterface, see_the_first_half),
}


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_patch_of_every_model_counts_or_raises(name, back_end):
    """`optimize` raises. After `optimize` the patch takes effect until it is undone."""
    theirs, ours = tiny(), tiny()
    if "eager" in name:
        theirs.set_attn_implementation("eager")
        ours.set_attn_implementation("eager")
    inputs = batch("right")
    kept = MASKS["right"].bool()
    with torch.no_grad():
        before = theirs(**inputs)
        with EVERY_MODEL[name]():
            with pytest.raises(ValueError, match="which fastbert would not run: undo that first"):
                fastbert.optimize(ours)
            assert type(ours) is transformers.BertModel
        fastbert.optimize(ours)
        with EVERY_MODEL[name]():
            outputs, expected = ours(**inputs), theirs(**inputs)
        assert not torch.allclose(expected.pooler_output, before.pooler_output, atol=1e-3)
        for a, b in ((outputs, expected), (ours(**inputs), before)):
            torch.testing.assert_close(a.last_hidden_state[kept], b.last_hidden_state[kept], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(a.pooler_output, b.pooler_output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [hf.BertModel, hf.BertEncoder])
def test_a_patched_forward_of_every_model_or_encoder_raises(kind):
    ours = fastbert.optimize(tiny())
    with patched(kind, "forward", halved):
        with pytest.raises(ValueError, match=f"{kind.__name__}.forward is patched or replaced for every model"):
            ours(**batch(None))
        with pytest.raises(ValueError, match=f"{kind.__name__}.forward is patched or replaced for every model"):
            fastbert.optimize(tiny())
    assert ours(**batch(None)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("head", ["BertForQuestionAnswering", "BertForMultipleChoice"])
def test_a_patched_head_whose_forward_is_ours_raises(head):
    ours, theirs = pair(head)
    fastbert.optimize(theirs)
    inputs = inputs_for(head)
    with patched(getattr(hf, head), "forward", halved):
        for model in (ours, theirs):
            with pytest.raises(ValueError, match=f"{head}.forward is patched for every model"):
                model(**inputs)
        with pytest.raises(ValueError, match=f"{head}.forward is patched for every model"):
            fastbert.optimize(getattr(transformers, head)(tiny_config()))
    assert torch.equal(theirs(**inputs)[0], ours(**inputs)[0])


@pytest.mark.parametrize("whose", ["our class", "optimized"])
def test_a_patched_bert_model_raises(whose):
    ours, theirs = pair()
    model = ours if whose == "our class" else fastbert.optimize(theirs)
    with (
        patched(hf.BertModel, "forward", halved),
        pytest.raises(ValueError, match="BertModel.forward is patched or replaced for every model"),
    ):
        model(**batch())


def test_a_wrapped_method_counts_as_patched():
    import functools

    with patched(hf.BertOutput, "forward", lambda original: functools.wraps(original)(halved(original))):
        assert "BertOutput.forward is patched" in fastbert.explain(fastbert.BertModel(tiny_config()))[1].reason


class Doubled(hf.BertSelfAttention):
    def forward(self, *args, **kwargs):
        context, weights = super().forward(*args, **kwargs)
        return context * 2, weights


def test_a_class_that_replaces_one_of_transformers_raises_or_counts():
    with patched(hf, "BertSelfAttention", lambda _: Doubled):
        theirs = tiny()
        ours = fastbert.BertModel(tiny_config(num_hidden_layers=2)).eval()
        ours.load_state_dict(theirs.state_dict())
        with pytest.raises(ValueError, match=r"encoder.layer.0.attention.self is a \S*Doubled, not transformers' Bert"):
            fastbert.optimize(tiny())
        with torch.no_grad():
            torch.testing.assert_close(ours(**batch(None))[0], theirs(**batch(None))[0], atol=1e-5, rtol=1e-5)


def test_a_class_that_was_replaced_before_the_import_raises():
    code = """
from transformers.models.bert import modeling_bert as hf
original = hf.BertSelfAttention
class Doubled(original):
    def forward(self, *args, **kwargs):
        context, weights = super().forward(*args, **kwargs)
        return context * 2, weights
hf.BertSelfAttention = Doubled
import torch, fastbert
config = hf.BertConfig(vocab_size=9, hidden_size=12, num_hidden_layers=1, intermediate_size=12)
theirs, ours = hf.BertModel(config).eval(), fastbert.BertModel(config).eval()
ours.load_state_dict(theirs.state_dict())
ids = torch.ones(1, 3, dtype=torch.long)
print(torch.allclose(ours(ids)[0], theirs(ids)[0], atol=1e-6))
try:
    fastbert.optimize(theirs)
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    equal, error = run.stdout.splitlines()
    assert equal == "True"
    assert error.startswith("BertSelfAttention.forward is patched or replaced for every model")


def test_the_last_hidden_state_is_the_one_a_hook_of_the_encoder_returns():
    ours, theirs = pair()
    for model in (ours, theirs):
        model.encoder.register_forward_hook(
            lambda module, args, out: replace(out, last_hidden_state=out.last_hidden_state * 2)
        )
    outputs, expected = (model(**batch(None), output_hidden_states=True) for model in (ours, theirs))
    for a, b in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
