"""Parts of the model called alone, hooked or replaced: they accept and get the arguments of transformers' parts."""

import inspect
import itertools
import re
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import transformers
from cases import MASKS, SEQ_LEN, batch, inputs_for, pair
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert import modeling_bert as hf
from transformers.utils.output_capturing import capture_outputs

import fastbert

ATTENTIONS = ("sdpa", "eager")
HIDDEN = torch.randn(4, SEQ_LEN, 48, generator=torch.Generator().manual_seed(1))
IDS = batch()["input_ids"]


def scores(attention: str, mask: str = "right") -> Tensor:
    """The mask [B, 1, S, S] that transformers passes to its layers."""
    keep = MASKS[mask].bool()[:, None, None].expand(-1, 1, SEQ_LEN, -1)
    return keep if attention == "sdpa" else torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)


def flat(value) -> list[Tensor | None]:
    """The tensors of an output: a tensor, a tuple or an output object."""
    values = value.to_tuple() if hasattr(value, "to_tuple") else value
    return list(values) if isinstance(values, tuple) else [values]


def check_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


NOTHING = {"encoder_hidden_states": None, "encoder_attention_mask": None, "past_key_values": None}
# Keywords without effect.
KEYWORDS = [
    {},
    {"output_attentions": False},
    {"use_cache": False, "output_hidden_states": False, "return_dict": True},
    {"position_ids": None, "cache_position": None, "head_mask": None},
    {"position_ids": torch.arange(SEQ_LEN)[None]},
]


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["encoder", "encoder.layer.1", "encoder.layer.1.attention"])
def test_layers_take_what_transformers_take(name, attention, masked, record):
    ours, theirs = (model.get_submodule(name) for model in pair(attention=attention))
    mask = scores(attention) if masked else None
    calls = [((HIDDEN, mask), keywords) for keywords in (*KEYWORDS, NOTHING)]
    calls += [((HIDDEN, mask, None, None, None), {}), ((HIDDEN,), {"attention_mask": mask, **NOTHING})]
    calls += [((), {"hidden_states": HIDDEN, "attention_mask": mask})]
    with torch.set_grad_enabled(record):
        for args, kwargs in calls:
            check_same(flat(ours(*args, **kwargs)), flat(theirs(*args, **kwargs)))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_self_attention_takes_what_transformers_takes(attention):
    ours, theirs = (model.encoder.layer[0].attention.self for model in pair(attention=attention))
    mask = scores(attention)
    keywords = ({}, {"past_key_values": None}, {"encoder_hidden_states": None, "output_attentions": False})
    for args, kwargs in itertools.product(((HIDDEN,), (HIDDEN, mask)), keywords):
        check_same(flat(ours(*args, **kwargs)), flat(theirs(*args, **kwargs)))


def test_embeddings_take_what_transformers_take():
    ours, theirs = (model.embeddings for model in pair())
    types, place = torch.ones(4, 1, dtype=torch.long), torch.tensor([[3]])
    for args, kwargs in (
        ((IDS,), {}),
        ((IDS, types), {}),
        ((IDS, None, place), {}),
        ((IDS, types[:1], place.expand(4, 1)), {}),
        ((IDS,), {"past_key_values_length": 5}),
        ((), {"inputs_embeds": HIDDEN, "past_key_values_length": 0}),
    ):
        torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs))


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 5, 48), (2, 3, 5, 48), (0, 5, 48)], ids=str)
@pytest.mark.parametrize("head", [name for name in dir(fastbert) if name.startswith("BertFor")])
def test_heads_take_inputs_of_any_rank(head, shape, record):
    ours, theirs = pair(head)
    hidden = torch.randn(shape)
    calls = {
        "cls": lambda m: m.cls(hidden, hidden * 2) if head == "BertForPreTraining" else m.cls(hidden),
        "cls.predictions": lambda m: m.cls.predictions(hidden),
        "cls.predictions.transform": lambda m: m.cls.predictions.transform(hidden),
        "classifier": lambda m: m.classifier(hidden),
        "qa_outputs": lambda m: m.qa_outputs(hidden),
    }
    called = 0
    with torch.set_grad_enabled(record):
        for name, call in calls.items():
            if name in dict(theirs.named_modules()):
                check_same(flat(call(ours)), flat(call(theirs)))
                called += 1
    assert called


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {"token_type_ids": torch.tensor([[0], [1], [1], [0]])},
        {"token_type_ids": torch.tensor([[1]])},
        {"token_type_ids": torch.tensor([1])},
        {"token_type_ids": torch.tensor(1)},
        {"position_ids": torch.tensor([[7]])},
        {"position_ids": torch.tensor([[7], [0], [1], [3]])},
        {"position_ids": torch.arange(SEQ_LEN).flip(0)[None]},
        {"attention_mask": torch.ones(4, 1)},
        {"attention_mask": torch.ones(1, 1, dtype=torch.long)},
        {"attention_mask": MASKS["right"].bool()[:, None, None, :]},
        {"attention_mask": MASKS["right"].bool()[:1, None, None, :]},
        {"past_key_values": None, "use_cache": False, "head_mask": None, "return_dict": True},
        {"output_router_logits": False, "past_key_values_length": 0},
    ],
    ids=lambda given: " ".join(f"{k}{list(v.shape) if isinstance(v, Tensor) else v}" for k, v in given.items()),
)
def test_inputs_that_broadcast_and_keywords_without_effect(given, record):
    ours, theirs = pair("BertForPreTraining")
    with torch.set_grad_enabled(record):
        check_same(flat(ours(IDS, **given)), flat(theirs(IDS, **given)))


def test_a_mask_of_one_column_drops_whole_sequences():
    ours, _ = pair()
    column = torch.tensor([[1], [0], [1], [0]])
    outputs, expected = ours(IDS, column), ours(IDS, column.expand(4, SEQ_LEN))
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert not outputs.last_hidden_state[1].any()


EVERY_MODULE = [
    "embeddings", "embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.LayerNorm", "encoder",
    "encoder.layer.1", "encoder.layer.1.attention", "encoder.layer.1.attention.self",
    "encoder.layer.1.attention.self.key", "encoder.layer.1.attention.output", "encoder.layer.1.intermediate",
    "encoder.layer.1.output.dropout", "pooler", "pooler.dense",
]  # fmt: skip


def described(value):
    """What a hook can see of an argument, except for its values."""
    return (value.dtype, value.shape) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True}, {"position_ids": torch.arange(SEQ_LEN)[None]}])
@pytest.mark.parametrize("mask", [None, "right"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", EVERY_MODULE)
def test_hooks_get_transformers_arguments(name, attention, mask, asked):
    models = pair(attention=attention)
    seen = []
    for model in models:
        model.get_submodule(name).register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    for model in models:
        model(**batch(mask), **asked)
    (args, kwargs), (their_args, their_kwargs) = seen
    assert [described(x) for x in args] == [described(x) for x in their_args]
    assert {k: described(x) for k, x in kwargs.items()} == {k: described(x) for k, x in their_kwargs.items()}
    masks = [[x for x in (*a, *k.values()) if isinstance(x, Tensor) and x.ndim == 4] for a, k in seen]
    assert all(torch.equal(x, y) for x, y in zip(*masks, strict=True))


@pytest.mark.parametrize("head", [name for name in dir(fastbert) if name.startswith("BertFor")])
def test_hooks_in_heads_get_transformers_arguments(head):
    models = pair(head)
    seen = [{}, {}]
    for model, calls in zip(models, seen, strict=True):
        for name, module in model.named_modules():
            if name and not name.startswith("bert."):
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name, calls=calls: calls.update({name: (args, kwargs)}),
                    with_kwargs=True,
                )
        model(**inputs_for(head))
    assert seen[0].keys() == seen[1].keys()
    for name, (args, kwargs) in seen[0].items():
        their_args, their_kwargs = seen[1][name]
        assert [described(x) for x in args] == [described(x) for x in their_args], name
        assert {k: described(x) for k, x in kwargs.items()} == {k: described(x) for k, x in their_kwargs.items()}, name


class OwnLayer(nn.Module):
    """Adds the mean over the kept tokens to each token: it needs the mask and transformers' shapes."""

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, position_ids=None, **kwargs):
        assert hidden_states.shape == (4, SEQ_LEN, 48)
        assert encoder_hidden_states is None
        assert attention_mask is None or attention_mask.shape == (4, 1, SEQ_LEN, SEQ_LEN)
        keep = torch.ones(4, SEQ_LEN) if attention_mask is None else (attention_mask[:, 0, -1] >= 0).float()
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            keep = attention_mask[:, 0, -1].float()
        return hidden_states + ((hidden_states * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))[:, None]


class OwnEncoder(nn.Module):
    """An encoder of another class, with the signature of transformers' encoder."""

    def __init__(self, layers):
        super().__init__()
        self.blocks = layers

    def forward(self, hidden_states, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def with_own_layer(model):
    model.encoder.layer[1] = OwnLayer()


def with_layer_of_transformers(model):
    torch.manual_seed(3)
    model.encoder.layer.append(hf.BertLayer(model.config).eval())


def with_own_encoder(model):
    model.encoder = OwnEncoder(model.encoder.layer)


def with_patched_encoder(model):
    forward = model.encoder.forward
    model.encoder.forward = lambda hidden_states, attention_mask=None, **kwargs: forward(
        hidden_states * 0.5, attention_mask, **kwargs
    )


def with_hooked_encoder(model):
    def halved(module, args, kwargs):
        mask = kwargs["attention_mask"]
        assert mask is None or mask.shape == (4, 1, SEQ_LEN, SEQ_LEN)
        return (args[0] * 0.5,), kwargs

    model.encoder.register_forward_pre_hook(halved, with_kwargs=True)


CHANGES = (with_own_layer, with_layer_of_transformers, with_own_encoder, with_patched_encoder, with_hooked_encoder)


@pytest.mark.parametrize("whose", ["our class", "optimized"])
@pytest.mark.parametrize("mask", [None, "right", "left"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_modules_replaced_after_optimize_get_transformers_arguments(change, attention, mask, whose):
    ours, theirs = pair(attention=attention)
    if whose == "optimized":
        ours = fastbert.optimize(deepcopy(theirs))
    grads = []
    for model in (ours, theirs):
        change(model)
        output = model(**batch(mask)).last_hidden_state
        kept = output if mask is None else output[MASKS[mask].bool()]
        kept.square().sum().backward()
        grads.append((kept, model.embeddings.word_embeddings.weight.grad))
    check_same(*grads)
    if mask is not None:
        assert not ours(**batch(mask)).last_hidden_state[MASKS[mask] == 0].any()


def test_an_encoder_that_returns_no_states_is_named():
    ours, _ = pair()
    with_own_encoder(ours)
    with pytest.raises(ValueError, match=r"^output_hidden_states is not supported by a .*OwnEncoder"):
        ours(IDS, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"^output_attentions is not supported by a .*OwnEncoder"):
        ours(IDS, output_attentions=True)


@pytest.mark.parametrize("hook", ["encoder", "every module"])
@pytest.mark.parametrize("mask", [None, "right"])
def test_hidden_states_come_through_a_hooked_encoder(mask, hook):
    """So do their gradients."""
    kept = ... if mask is None else MASKS[mask].bool()
    found = []
    for model in pair():
        register = model.encoder.register_forward_hook if hook == "encoder" else register_module_forward_hook
        handle = register(lambda *_: None)
        outputs = model(**batch(mask), output_hidden_states=True)
        handle.remove()
        states = outputs.hidden_states
        assert states[-1] is outputs.last_hidden_state
        for state in states:
            state.retain_grad()
        outputs.last_hidden_state[kept].square().sum().backward()
        found.append([x[kept] for state in states for x in (state, state.grad)])
    check_same(*found)


def test_an_encoder_that_shares_one_layer():
    class Shared(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, attention_mask=None, **kwargs):
            for _ in range(2):
                hidden_states = self.layer(hidden_states, attention_mask)
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)

    models = pair()
    for model in models:
        model.encoder = Shared(model.encoder.layer[0])
    kept = MASKS["right"].bool()
    check_same(*([model(**batch()).last_hidden_state[kept]] for model in models))
    scores = {"attention_mask": kept[:, None, None]}
    check_same(*([model(IDS, **scores).last_hidden_state] for model in models))


@pytest.mark.parametrize("shape", [(5, 5), (1, 1), (1, 5), (1, 1, 1, 1), (5, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_encoder_adds_a_mask_of_any_shape_that_broadcasts(attention, shape):
    """Also if B equals S, so that the shape could be that of a padding mask."""
    ours, theirs = (model.encoder for model in pair(attention=attention))
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    check_same(flat(ours(HIDDEN.repeat(2, 1, 1)[:5, :5], mask)), flat(theirs(HIDDEN.repeat(2, 1, 1)[:5, :5], mask)))


class CapturingModel(transformers.PreTrainedModel):
    """A custom model in which transformers collects the states of BERT's layers."""

    config_class = transformers.BertConfig
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": hf.BertLayer, "attentions": hf.BertSelfAttention}

    def __init__(self, bert: hf.BertModel, whole: bool):
        super().__init__(bert.config)
        self.part = bert if whole else nn.ModuleList([bert.embeddings, bert.encoder])

    @capture_outputs
    def forward(self, input_ids, attention_mask=None, **kwargs):
        if isinstance(self.part, hf.BertModel):
            return BaseModelOutput(last_hidden_state=self.part(input_ids, attention_mask).last_hidden_state)
        embeddings, encoder = self.part
        keep = None if attention_mask is None else attention_mask.bool()[:, None, None]
        return BaseModelOutput(last_hidden_state=encoder(embeddings(input_ids), keep).last_hidden_state)


@pytest.mark.parametrize("whole", [False, True])
def test_transformers_collects_no_packed_states(whole):
    ours, theirs = (CapturingModel(bert, whole).eval() for bert in pair())
    for asked in ({"output_hidden_states": True}, {"output_hidden_states": True, "output_attentions": True}):
        outputs, expected = (model(IDS, MASKS["right"], **asked) for model in (ours, theirs))
        assert list(outputs) == list(expected)
        kept = MASKS["right"].bool()
        check_same([x[kept] for x in outputs.hidden_states], [x[kept] for x in expected.hidden_states])
        assert whole or len(outputs.hidden_states) == 4


class DerivedLayer(hf.BertLayer):
    """A layer derived from transformers', with its own constructor."""

    def __init__(self, config):
        hf.GradientCheckpointingLayer.__init__(self)
        vars(self).update({name: x for name, x in vars(hf.BertLayer(config)).items() if name != "training"})

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        return super().forward(hidden_states, attention_mask) * 2


def test_layers_that_derive_from_transformers_run_as_they_do_there():
    ours, theirs = pair()
    torch.manual_seed(5)
    own = DerivedLayer(ours.config).eval()
    for model in (ours, theirs):
        model.encoder.layer[2] = own
    kept = MASKS["right"].bool()
    check_same(*([model(**batch()).last_hidden_state[kept]] for model in (ours, theirs)))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mask", [None, "right"])
def test_gradients_of_attention_weights_can_be_retained(mask, attention):
    ours, theirs = pair(attention=attention)
    theirs.set_attn_implementation("eager")
    grads = []
    for model in (ours, theirs):
        outputs = model(**batch(mask), output_attentions=True)
        for weights in outputs.attentions:
            weights.retain_grad()
        kept = outputs.last_hidden_state[... if mask is None else MASKS[mask].bool()]
        kept.square().sum().backward()
        # Values at padding are arbitrary, both for queries and for keys.
        tokens = torch.ones(4, SEQ_LEN) if mask is None else MASKS[mask]
        pairs = (tokens[:, :, None] * tokens[:, None]).bool()
        grads.append([weights.grad.transpose(0, 1)[:, pairs] for weights in outputs.attentions])
    assert all(grad.any() for grad in grads[0])
    check_same(*grads)


def test_explain_notes_custom_code_around_the_model():
    ours, _ = pair()
    assert "own" not in str(fastbert.explain(ours))
    own = nn.Module()
    own.bert = ours
    assert fastbert.explain(own).notes == []  # a plain container computes nothing
    own = type("ColBERT", (nn.Module,), {"forward": lambda self, *inputs: self.bert(*inputs)})()
    own.bert = ours
    for bert in (ours, nn.ModuleList([ours]), nn.Sequential(ours)):
        own.bert = bert
        (note,) = fastbert.explain(own).notes
    assert re.match(r"ColBERT, a .*ColBERT, calls BertModel: hidden states at padding are zeros", note)
    assert "attention_mask[:, None, None].bool()" in str(fastbert.explain(own))


@pytest.mark.parametrize("whose", ["our class", "optimized"])
def test_colbert_queries_by_a_score_mask(whose):
    """Hidden states of tokens that no token attends to are used."""
    ours, theirs = pair()
    if whose == "optimized":
        ours = fastbert.optimize(deepcopy(theirs))
    inputs = batch()
    expected = theirs(**inputs).last_hidden_state
    inputs["attention_mask"] = inputs["attention_mask"][:, None, None].bool()
    torch.testing.assert_close(ours(**inputs).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_a_class_derived_from_a_head_may_use_other_module_names():
    class Mine(fastbert.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.projections = nn.Linear(48, 8)

        def forward(self, *args, **kwargs):
            return self.projections(self.bert(*args, **kwargs)[0])

    config = pair()[0].config
    assert Mine(config)(IDS).shape == (4, SEQ_LEN, 8)
    assert fastbert.explain(Mine(config)).notes  # its forward is of no known library


def test_parts_of_a_head_replaced_after_optimize():
    _, theirs = pair("BertForMaskedLM")
    model = fastbert.optimize(deepcopy(theirs))
    torch.manual_seed(4)
    model.cls = hf.BertOnlyMLMHead(theirs.config).eval()
    theirs.cls = deepcopy(model.cls)
    kept = MASKS["right"].bool()
    with torch.no_grad():
        check_same([model(**batch()).logits[kept]], [theirs(**batch()).logits[kept]])
        rows = {row.block: row for row in fastbert.explain(model)}
        assert rows["cls.predictions.decoder"].backend == "modules"
        assert "transformers" in rows["cls.predictions.decoder"].reason
        rows = {row.block: row for row in fastbert.explain(fastbert.optimize(model))}
        assert rows["cls.predictions.decoder"].backend == "eager"
        check_same([model(**batch()).logits[kept]], [theirs(**batch()).logits[kept]])
    fastbert.restore(model)
    assert not any(type(x).__module__.startswith("fastbert") for x in model.modules())


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_losses_are_those_of_transformers_module(head, monkeypatch):
    class Loss(nn.Module):
        def forward(self, logits, labels):
            return logits.new_tensor(42.0)

    monkeypatch.setattr(hf, "CrossEntropyLoss", Loss)
    ours, theirs = pair(head)
    for model in (ours, theirs):
        assert model(**inputs_for(head, with_labels=True)).loss == 42
    for model in pair("BertForSequenceClassification"):
        model.config.problem_type = "ranking"
        assert model(**inputs_for("BertForSequenceClassification", with_labels=True)).loss is None


def test_signatures_begin_as_transformers_do():
    for kind in ("BertEmbeddings", "BertLayer", "BertSelfAttention", "BertEncoder", "BertPooler"):
        ours = getattr(fastbert.model, kind)
        names, theirs = (
            [name for name, x in inspect.signature(c.forward).parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD]
            for c in (ours, getattr(hf, kind))
        )
        assert names[: len(theirs)] == theirs


def test_a_pooler_or_encoder_of_any_class_may_return_less():
    ours, _ = pair()
    ours.pooler = None
    ours.encoder = OwnEncoder(nn.ModuleList())
    ours.encoder.forward = lambda hidden, **kwargs: SimpleNamespace(last_hidden_state=hidden)
    assert ours(IDS).pooler_output is None
