"""`optimize` and `restore`: a live model of transformers runs in fastbert and stays the object it was."""

import functools
import inspect
import logging
import pickle
from copy import deepcopy

import pytest
import torch
import transformers
from cases import DTYPES, HEADS, MASKS, at_kept_tokens, batch, inputs_for, pair, tiny_config, with_random_weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.conversion import PLANNED
from fastbert.fusion import class_name
from fastbert.testing import check_close


def mean_of_kept(hidden_states, attention_mask):
    if attention_mask is None:
        return hidden_states.mean(1)
    kept = attention_mask[..., None].to(hidden_states.dtype)
    return (hidden_states * kept).sum(1) / kept.sum(1)


class OwnHead(hf.BertPreTrainedModel):
    """What people write around transformers' encoder: a head of their own."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.project = nn.Linear(config.hidden_size, 5)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        outputs = self.bert(input_ids, attention_mask, token_type_ids, **kwargs)
        logits = self.project(mean_of_kept(outputs.last_hidden_state, attention_mask))
        loss = None if labels is None else cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss, logits, outputs.hidden_states)


class OwnClassifier(transformers.BertForSequenceClassification):
    """A subclass of a head of transformers'."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits / self.temperature
        return outputs


class PlainModule(nn.Module):
    """No class of transformers' around the encoder."""

    def __init__(self, config):
        super().__init__()
        self.text_encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.norm = nn.BatchNorm1d(config.hidden_size)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        hidden_states = self.text_encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        return self.norm(mean_of_kept(hidden_states, attention_mask))


class TwoEncoders(nn.Module):
    """Two encoders of two configurations, one of which has two names."""

    def __init__(self, config):
        super().__init__()
        self.questions = transformers.BertModel(config)
        self.answers = transformers.BertModel(tiny_config(num_hidden_layers=1, num_attention_heads=4))
        self.shared = self.questions

    def forward(self, **inputs):
        return torch.stack([x(**inputs).pooler_output for x in (self.questions, self.answers, self.shared)], 1)


def dpr(name, projection_dim):
    return lambda config: getattr(transformers, name)(
        transformers.DPRConfig(**config.to_dict() | {"projection_dim": projection_dim})
    )


KINDS = {
    **{head: getattr(transformers, head) for head in HEADS},
    "BertLMHeadModel": transformers.BertLMHeadModel,
    "DPRContextEncoder": dpr("DPRContextEncoder", 7),
    "DPRQuestionEncoder": dpr("DPRQuestionEncoder", 0),
    "DPRReader": dpr("DPRReader", 0),
    "own head": OwnHead,
    "own classifier": OwnClassifier,
    "plain module": PlainModule,
    "two encoders": TwoEncoders,
}
SAVED = [name for name in KINDS if name not in ("plain module", "two encoders")]
AVERAGED = ("own head", "plain module")


def made(kind: str = "BertForSequenceClassification", **settings) -> nn.Module:
    """A model of transformers', in eval mode; the same weights in every call."""
    torch.manual_seed(0)
    return with_random_weights(KINDS[kind](tiny_config(**settings)))


def given_to(kind: str, mask: str | None = "right") -> dict[str, Tensor]:
    inputs = inputs_for(kind, mask)
    if kind.startswith("DPR"):
        # A pad's id counts as padding where no mask is given.
        inputs["input_ids"] = inputs["input_ids"].clamp(min=1)
    if kind == "DPRReader":
        del inputs["token_type_ids"]
    return inputs


def outputs_of(model: nn.Module, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Every tensor of an output by its name."""
    with torch.no_grad():
        outputs = model(**inputs, **options)
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    named = {}
    for name, value in outputs.items():
        named |= {f"{name}[{i}]": x for i, x in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return named


def comparable(kind: str, value: Tensor, mask: str | None) -> Tensor:
    """Return what must be equal: kept tokens, or sequences whose first column, which transformers pools, is kept."""
    if mask is None:
        return value
    kept = MASKS[mask].bool()
    if value.shape[:2] == kept.shape:
        return value[kept]
    if kind in AVERAGED:
        return value
    return value.flatten(0, 1)[kept[:, 0]] if kind == "BertForMultipleChoice" else value[kept[:, 0]]


def check_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def check_equal(kind: str, a: dict[str, Tensor], b: dict[str, Tensor], mask: str | None) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        values = [comparable(kind, x[name], mask) for x in (a, b)]
        assert values[0].numel() > 0
        torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def modules_of(root: nn.Module) -> list:
    """All that there is to say of a tree of modules."""
    return [
        (
            name, id(module), type(module), sorted(vars(module)), module.training,
            list(module._forward_hooks.values()), list(module._forward_pre_hooks.values()),
        )
        for name, module in root.named_modules(remove_duplicate=False)
    ]  # fmt: skip


def tensors_of(root: nn.Module) -> list:
    tensors = *root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)
    return [(name, id(x), x.data_ptr(), x.dtype, x.requires_grad) for name, x in tensors]


def backends(obj) -> set[str]:
    return {row.backend for row in fastbert.explain(obj)}


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_stay_and_come_back_to_the_bit(kind, mask):
    model = made(kind)
    inputs = given_to(kind, mask)
    before = outputs_of(model, inputs)
    assert fastbert.optimize(model) is model
    assert backends(model) == {"eager"}
    check_equal(kind, outputs_of(model, inputs), before, mask)
    assert fastbert.restore(model) is model
    check_same_bits(outputs_of(model, inputs), before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_stays_where_it_was(kind):
    model = made(kind)
    modules, tensors, names, random = modules_of(model), tensors_of(model), list(model.state_dict()), torch.random
    state, expected = random.get_rng_state(), type(model)
    fastbert.optimize(model)
    assert isinstance(model, expected)
    assert [(name, same) for name, same, *_ in modules_of(model)] == [(name, same) for name, same, *_ in modules]
    assert tensors_of(model) == tensors
    assert list(model.state_dict()) == names
    assert modules_of(model) != modules
    fastbert.restore(model)
    assert modules_of(model) == modules
    assert tensors_of(model) == tensors
    assert torch.equal(random.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_losses_stay(kind):
    model = made(kind)
    labelled = kind in HEADS[1:]
    inputs = inputs_for(kind, "full", with_labels=True) if labelled else given_to(kind, "full")
    losses, gradients = [], []
    for change in (lambda x: x, fastbert.optimize, fastbert.restore):
        outputs = change(model)(**inputs)
        first = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
        loss = outputs.loss if labelled else first.square().mean()
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(losses[2], losses[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-3, msg=name)
        assert torch.equal(gradients[2][name], expected)


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_folder_has_the_same_bytes(kind, tmp_path):
    model = made(kind)
    model.save_pretrained(tmp_path / "before")
    fastbert.optimize(model).save_pretrained(tmp_path / "optimized")
    fastbert.restore(model).save_pretrained(tmp_path / "restored")
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("before", "optimized", "restored")
    ]
    assert "model.safetensors" in contents[0]
    assert "config.json" in contents[0]
    assert contents[0] == contents[1] == contents[2]


def test_the_class_of_an_optimized_model_loads_what_it_saved(tmp_path):
    model = fastbert.optimize(made())
    model.save_pretrained(tmp_path)
    for loaded in (type(model).from_pretrained(tmp_path), transformers.AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded.base_model.embeddings.word_embeddings.weight, model.get_input_embeddings().weight)
    assert type(model) is fastbert.BertForSequenceClassification


def test_weights_load_into_an_optimized_model_and_a_folder_loads_into_a_subclass(tmp_path):
    source = made("own classifier")
    source.save_pretrained(tmp_path)
    model = OwnClassifier.from_pretrained(tmp_path)
    torch.nn.init.ones_(fastbert.optimize(model).bert.pooler.dense.weight)
    missing = model.load_state_dict(source.state_dict())
    assert not missing.missing_keys
    inputs = given_to("own classifier")
    check_equal("own classifier", outputs_of(model, inputs), outputs_of(source, inputs), "right")


def test_modes_and_frozen_parameters_stay():
    model = made(hidden_dropout_prob=0.3)
    model.train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.requires_grad_(False)
    modules, tensors = modules_of(model), tensors_of(model)
    fastbert.optimize(model)
    assert [row[4] for row in modules_of(model)] == [row[4] for row in modules]
    assert tensors_of(model) == tensors
    assert {row.block for row in fastbert.explain(model) if row.backend == "eager"} == {
        "bert.embeddings",
        "bert.encoder.layer.0",
        "bert.pooler",
        "classifier",
    }


def test_hooks_of_the_user_are_kept_and_can_be_removed():
    model = made()
    inputs, seen = given_to("BertForSequenceClassification"), []

    def hook(module, args, output):
        seen.append((type(module).__name__, args[0].shape, output.shape))

    handles = [
        model.bert.encoder.layer[1].register_forward_hook(hook),
        model.bert.encoder.layer[2].output.dense.register_forward_hook(hook),
        model.classifier.register_forward_hook(hook),
    ]
    before = outputs_of(model, inputs)
    expected = seen.copy()
    seen.clear()
    fastbert.optimize(model)
    check_equal("", outputs_of(model, inputs), before, "right")
    assert [row[1:] for row in seen] == [row[1:] for row in expected]
    blocks = {row.block: (row.backend, row.reason) for row in fastbert.explain(model)}
    assert blocks["bert.encoder.layer.0"][0] == "eager"
    assert blocks["bert.encoder.layer.1"] == ("modules", "BertLayer has hooks")
    assert blocks["bert.encoder.layer.2"] == ("modules", "output.dense has hooks")
    fastbert.restore(model)
    seen.clear()
    check_same_bits(outputs_of(model, inputs), before)
    assert seen == expected
    fastbert.optimize(model)
    for handle in handles:
        handle.remove()
    assert backends(model) == {"eager"}


@pytest.mark.parametrize("kind", ["BertModel", "BertForTokenClassification", "own head"])
def test_states_and_attentions_asked_for_before_keep_no_layer_from_being_fused(kind):
    """transformers leaves hooks in a model that was once asked for hidden states."""
    model = made(kind)
    inputs = given_to(kind)
    options = {"output_hidden_states": True}
    if kind != "own head":
        model.set_attn_implementation("eager")
        options["output_attentions"] = True
    before = outputs_of(model, inputs, **options)
    assert any(module._forward_hooks for module in model.modules())
    fastbert.optimize(model)
    assert backends(model) == {"eager"}
    for _ in range(2):
        after = outputs_of(model, inputs, **options)
        assert sum(name.startswith("hidden_states") for name in after) == 4
        assert sum(name.startswith("attentions") for name in after) == 3 * (kind != "own head")
        for name, value in after.items():
            a, b = (x.transpose(1, 2) if name.startswith("attentions") else x for x in (value, before[name]))
            values = [comparable(kind, x, "right") for x in (a, b)]
            torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5, msg=name)
        assert backends(model) == {"eager"}
    fastbert.restore(model)
    check_same_bits(outputs_of(model, inputs, **options), before)
    fastbert.optimize(model)
    assert backends(model) == {"eager"}
    assert after.keys() == outputs_of(model, inputs, **options).keys()


def test_hidden_states_come_through_a_configuration():
    model = made("BertForMaskedLM", output_hidden_states=True)
    inputs = given_to("BertForMaskedLM")
    before = outputs_of(model, inputs)
    check_equal("BertForMaskedLM", outputs_of(fastbert.optimize(model), inputs), before, "right")
    check_same_bits(outputs_of(fastbert.restore(model), inputs), before)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "own head", "plain module"])
def test_doing_it_twice_is_doing_it_once(kind):
    model = made(kind)
    before, inputs = modules_of(model), given_to(kind)
    fastbert.restore(model)
    assert modules_of(model) == before
    optimized = modules_of(fastbert.optimize(model))
    outputs = outputs_of(model, inputs)
    assert modules_of(fastbert.optimize(model)) == optimized
    check_same_bits(outputs_of(model, inputs), outputs)
    fastbert.restore(model)
    assert modules_of(fastbert.restore(model)) == before
    assert modules_of(fastbert.optimize(model)) == optimized


@pytest.mark.parametrize("head", HEADS)
def test_fastberts_own_classes_stay_as_they_are(head):
    ours, _ = pair(head)
    modules, tensors = modules_of(ours), tensors_of(ours)
    for change in (fastbert.optimize, fastbert.restore):
        assert change(ours) is ours
        assert modules_of(ours) == modules
        assert tensors_of(ours) == tensors


def test_our_encoder_in_a_head_of_transformers_lets_the_head_be_converted():
    model = made()
    ours, _ = pair()
    ours.load_state_dict(model.bert.state_dict())
    model.bert = ours
    inputs = given_to("BertForSequenceClassification")
    before = outputs_of(model, inputs)
    fastbert.optimize(model)
    assert type(model) is fastbert.BertForSequenceClassification
    check_same_bits(outputs_of(model, inputs), before)
    fastbert.restore(model)
    assert type(model) is transformers.BertForSequenceClassification
    assert model.bert is ours
    assert type(ours) is fastbert.BertModel


def test_a_part_is_restored_alone():
    model = made("two encoders")
    modules, inputs = modules_of(model), given_to("two encoders")
    fastbert.optimize(model)
    fastbert.restore(model.answers)
    assert type(model.answers) is transformers.BertModel
    assert type(model.questions) is fastbert.BertModel
    outputs = outputs_of(model, inputs)
    fastbert.restore(model)
    assert modules_of(model) == modules
    check_equal("", outputs, outputs_of(model, inputs), "right")


def custom_attention(module, query, key, value, attention_mask, **kwargs):
    return (value * 2).transpose(1, 2), None


class OwnEncoder(transformers.BertModel):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state * 2
        return outputs


class OwnAttention(hf.BertSelfAttention):
    def forward(self, *args, **kwargs):
        context, weights = super().forward(*args, **kwargs)
        return context * 2, weights


class NotAModel:
    model = "bert-base-uncased"


def with_custom_attention():
    transformers.AttentionInterface.register("twice", custom_attention)
    model = made()
    model.config._attn_implementation = "twice"
    return model


def with_own_encoder():
    model = made()
    model.bert.__class__ = OwnEncoder
    return model


def with_own_attention():
    model = made()
    model.bert.encoder.layer[1].attention.self.__class__ = OwnAttention
    return model


def with_patched_forward(name):
    model = made()
    module = model.get_submodule(name)
    module.forward = functools.partial(type(module).forward, module)
    return model


def patched_question_answering():
    model = made("BertForQuestionAnswering")
    model.forward = functools.partial(type(model).forward, model)
    return model


def with_patched_forward_below_accelerates():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = with_patched_forward("bert.encoder.layer.1")
    add_hook_to_module(model.bert.encoder.layer[1], ModelHook())
    return model


def bert2bert():
    decoder = tiny_config(is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(tiny_config(), decoder)
    return transformers.EncoderDecoderModel(config).eval()


def relative_positions():
    model = made()
    model.config.position_embedding_type = "relative_key"
    return model


def beside_a_decoder():
    return nn.ModuleDict({"good": made(), "decoder": made("BertLMHeadModel", is_decoder=True)})


REFUSED = {
    "decoder": (lambda: made("BertLMHeadModel", is_decoder=True), r"config.is_decoder=True is not supported"),
    "encoder and decoder": (bert2bert, r"config.is_decoder=True is not supported"),
    "beside a decoder": (beside_a_decoder, r"config.is_decoder=True is not supported"),
    "relative positions": (relative_positions, r"position_embedding_type='relative_key' is not supported"),
    "custom attention": (with_custom_attention, r"attn_implementation='twice' of the model is unknown"),
    "own encoder": (with_own_encoder, r"\S*test_conversion.OwnEncoder derives from transformers' BertModel"),
    "own attention": (
        with_own_attention,
        r"encoder.layer.1.attention.self is a \S*test_conversion.OwnAttention, not transformers' BertSelfAttention",
    ),
    "patched layer": (lambda: with_patched_forward("bert.encoder.layer.1"), r"encoder.layer.1 has a patched forward"),
    "patched encoder": (lambda: with_patched_forward("bert"), r"BertModel has a patched forward"),
    "patched question answering": (patched_question_answering, r"BertForQuestionAnswering has a patched forward"),
    "patched, then hooked by accelerate": (
        with_patched_forward_below_accelerates,
        r"encoder.layer.1 has a patched forward",
    ),
}


def call(model):
    inputs = given_to("BertForSequenceClassification")
    if isinstance(model, nn.ModuleDict):
        model = model["good"]
    if isinstance(model, transformers.EncoderDecoderModel):
        inputs = {"input_ids": inputs["input_ids"], "decoder_input_ids": inputs["input_ids"]}
    return model(**inputs)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_raise_and_stay_unchanged(name):
    make, message = REFUSED[name]
    model = make()
    with torch.no_grad():
        before = call(model)
        modules, tensors = modules_of(model), tensors_of(model)
        for dtype in (None, torch.bfloat16):
            with pytest.raises(ValueError, match=message):
                fastbert.optimize(model, dtype)
            assert modules_of(model) == modules
            assert tensors_of(model) == tensors
        assert torch.equal(call(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16"], ids=str)
def test_an_unsupported_dtype_raises_before_anything_is_changed(dtype):
    model = made()
    modules, tensors = modules_of(model), tensors_of(model)
    with pytest.raises(ValueError, match=f"dtype={dtype} is not supported: choose torch.float32"):
        fastbert.optimize(model, dtype)
    assert modules_of(model) == modules
    assert tensors_of(model) == tensors


TINY = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 80}
MODERN = {**TINY, "global_attn_every_n_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"vocab_size": 61, "dim": 48, "n_layers": 1, "n_heads": 3, "hidden_dim": 80}
SMALL_GPT = {"vocab_size": 61, "n_embd": 48, "n_layer": 1, "n_head": 3, "bos_token_id": 0, "eos_token_id": 0}
NOT_BERT = {
    "Roberta": (TINY, "RoBERTa is planned but not supported yet"),
    "XLMRoberta": (TINY, "XLM-RoBERTa is planned but not supported yet"),
    "DistilBert": (DISTIL, "DistilBERT is planned but not supported yet"),
    "ModernBert": (MODERN, "ModernBERT is planned but not supported yet"),
    "MPNet": (TINY, "MPNet is planned but not supported yet"),
    "GPT2": (SMALL_GPT, "of model_type 'gpt2': fastbert supports BERT"),
    "Electra": ({**TINY, "embedding_size": 48}, "of model_type 'electra': fastbert supports BERT"),
}


@pytest.mark.parametrize("name", NOT_BERT)
def test_models_that_are_not_bert_are_named(name):
    settings, message = NOT_BERT[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
    for obj in (model, nn.Sequential(model)):
        modules = modules_of(obj)
        with pytest.raises(TypeError, match=message) as raised:
            fastbert.optimize(obj)
        assert class_name(model) in str(raised.value)
        assert modules_of(obj) == modules


def test_planned_models_are_models_of_transformers():
    assert set(PLANNED) <= set(transformers.CONFIG_MAPPING)


@pytest.mark.parametrize("obj", ["bert-base-uncased", None, {"model": 1}, NotAModel(), torch.zeros(2)], ids=class_name)
@pytest.mark.parametrize("function", [fastbert.optimize, fastbert.restore, fastbert.explain])
def test_objects_without_a_module_raise(function, obj):
    with pytest.raises(TypeError, match=f"got a {class_name(obj)}: pass a transformers model"):
        function(obj)


def test_a_module_without_transformers_is_named():
    with pytest.raises(TypeError, match=r"found no transformers model in a torch.nn.modules.linear.Linear"):
        fastbert.optimize(nn.Linear(2, 2))
    linear = nn.Linear(2, 2)
    assert fastbert.restore(linear) is linear


def test_a_patched_or_replaced_leaf_is_supported():
    model = made()
    layers = model.bert.encoder.layer
    query = layers[0].attention.self.query
    query.forward = lambda x: nn.functional.linear(x, query.weight, query.bias) * 2
    layers[1].output.LayerNorm = nn.Sequential(nn.LayerNorm(48, elementwise_affine=False))
    layers[2].intermediate.intermediate_act_fn = nn.SiLU()
    inputs = given_to("BertForSequenceClassification")
    before = outputs_of(model, inputs)
    check_equal("", outputs_of(fastbert.optimize(model), inputs), before, "right")
    reasons = {row.block: row.reason for row in fastbert.explain(model) if row.backend == "modules"}
    assert reasons == {
        "bert.encoder.layer.0": "attention.self.query has a patched forward",
        "bert.encoder.layer.1": "output.LayerNorm is a torch.nn.modules.container.Sequential, not a LayerNorm",
        "bert.encoder.layer.2": reasons["bert.encoder.layer.2"],
    }
    assert "torch.nn.modules.activation.SiLU" in reasons["bert.encoder.layer.2"]
    check_same_bits(outputs_of(fastbert.restore(model), inputs), before)


def test_a_patched_head_goes_on_as_transformers_around_a_converted_encoder():
    """accelerate leaves such a patch in a model that was trained in bfloat16."""
    model = made()
    inputs = given_to("BertForSequenceClassification")
    before = outputs_of(model, inputs)
    model.forward = functools.partial(type(model).forward, model)
    check_equal("", outputs_of(fastbert.optimize(model), inputs), before, "right")
    assert (type(model), type(model.bert)) == (transformers.BertForSequenceClassification, fastbert.BertModel)
    assert backends(model) == {"eager"}
    check_same_bits(outputs_of(fastbert.restore(model), inputs), before)


def test_a_head_that_is_patched_for_every_model(monkeypatch):
    """A patch before `optimize` keeps running. After a later patch calls raise: our forward would bypass it."""
    inputs = given_to("BertForSequenceClassification")
    converted, kind = fastbert.optimize(made()), transformers.BertForSequenceClassification
    before = outputs_of(converted, inputs)
    forward = kind.forward

    def twice(self, *, weight=2, **kwargs):
        outputs = forward(self, **kwargs)
        outputs.logits = outputs.logits * weight
        return outputs

    monkeypatch.setattr(kind, "forward", twice)
    for ours in (converted, pair("BertForSequenceClassification")[0]):
        with pytest.raises(
            ValueError, match=r"^BertForSequenceClassification.forward is patched .*transformers' class"
        ):
            ours(**inputs)
    model = fastbert.optimize(made())
    assert "weight" in inspect.signature(model.forward).parameters
    torch.testing.assert_close(model(**inputs).logits, 2 * before["logits"], atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    check_same_bits(outputs_of(converted, inputs), before)


@pytest.mark.parametrize("name", ["bert.encoder.layer.1", "bert"])
def test_a_forward_patched_since_is_named_by_restore_and_nothing_is_changed(name):
    model = fastbert.optimize(made())
    module = model.get_submodule(name)
    module.forward = functools.partial(type(module).forward, module)
    inputs = given_to("BertForSequenceClassification")
    outputs, modules = outputs_of(model, inputs), modules_of(model)
    with pytest.raises(ValueError, match=f"^{name} has a patched forward"):
        fastbert.restore(model)
    assert modules_of(model) == modules
    check_same_bits(outputs_of(model, inputs), outputs)
    del module.forward
    fastbert.restore(model)
    check_same_bits(outputs_of(model, inputs), outputs_of(made(), inputs))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification", "own head", "plain module"])
def test_a_cast_is_as_close_as_transformers_and_is_taken_back(kind, dtype):
    model = made(kind)
    inputs, parameters = given_to(kind), [*map(id, model.parameters())]
    before, weights, modules = outputs_of(model, inputs), weights_of(model), modules_of(model)
    expected = outputs_of(deepcopy(model).to(dtype), inputs)
    fastbert.optimize(model, dtype)
    assert {x.dtype for x in model.parameters()} == {dtype}
    assert [*map(id, model.parameters())] == parameters
    assert {x.dtype for x in model.buffers()} <= {dtype, torch.int64}
    for name, value in outputs_of(model, inputs).items():
        check_close(name, *(comparable(kind, x[name], "right") for x in ({name: value}, expected, before)))
    fastbert.restore(model)
    check_same_bits(weights_of(model), weights)
    assert [*map(id, model.parameters())] == parameters
    assert modules_of(model) == modules
    check_same_bits(outputs_of(model, inputs), before)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForPreTraining"])
def test_tied_weights_stay_tied_through_a_cast_and_training(head):
    model = fastbert.optimize(made(head), torch.bfloat16)
    table = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is table
    before = made(head).state_dict()
    with torch.no_grad():
        table[3] += 1
    trained = table.detach().clone()
    fastbert.restore(model)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight is table
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(table[3], trained[3].float())
    assert torch.equal(table[4:], before[name][4:])
    tied = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    assert {name for name, x in weights_of(model).items() if not torch.equal(x, before[name])} == tied


def test_weights_trained_after_a_cast_keep_what_they_learned():
    model = made()
    before, inputs = weights_of(model), inputs_for("BertForSequenceClassification", with_labels=True)
    model.bert.requires_grad_(False)
    fastbert.optimize(model, torch.bfloat16)
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.5)
    model(**inputs).loss.backward()
    optimizer.step()
    trained = weights_of(model.classifier)
    fastbert.restore(model)
    for name, value in weights_of(model).items():
        assert value.dtype == torch.float32
        if name.startswith("classifier"):
            learned = trained[name.removeprefix("classifier.")]
            changed = learned != before[name].bfloat16()
            assert changed.any()
            assert torch.equal(value, torch.where(changed, learned.float(), before[name]))
        else:
            assert torch.equal(value, before[name])
    assert {x.grad.dtype for x in model.classifier.parameters()} == {torch.float32}
    model(**inputs).loss.backward()


def test_another_cast_starts_from_the_weights_before_the_first():
    model = made()
    before = weights_of(model)
    fastbert.optimize(model, torch.bfloat16)
    fastbert.optimize(model)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    fastbert.optimize(model, torch.float16)
    check_same_bits(weights_of(model), {name: x.half() for name, x in before.items()})
    fastbert.optimize(model, torch.float32)
    check_same_bits(weights_of(model), before)
    fastbert.optimize(model, torch.float16)
    check_same_bits(weights_of(fastbert.restore(model)), before)


def test_a_narrow_model_comes_back_narrow_after_a_cast_to_a_wider_dtype():
    model = made().half()
    before = weights_of(model)
    fastbert.optimize(model, torch.float32)
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    check_same_bits(weights_of(fastbert.restore(model)), before)


def test_fastberts_own_class_is_cast_and_taken_back():
    ours, _ = pair("BertForMaskedLM")
    before = weights_of(ours)
    fastbert.optimize(ours, torch.float16)
    assert {x.dtype for x in ours.parameters()} == {torch.float16}
    check_same_bits(weights_of(fastbert.restore(ours)), before)
    assert type(ours) is fastbert.BertForMaskedLM


@pytest.mark.parametrize("kind", ["BertModel", "BertForTokenClassification"])
def test_restore_drops_graphs(kind, caplog):
    model = made(kind)
    inputs, modules = given_to(kind), modules_of(model)
    before = outputs_of(model, inputs)
    fastbert.graphed(fastbert.optimize(model))
    with caplog.at_level(logging.INFO, "fastbert"):
        check_equal(kind, outputs_of(model, inputs), before, "right")
    assert "forward" in vars(model)
    fastbert.restore(model)
    assert modules_of(model) == modules
    check_same_bits(outputs_of(model, inputs), before)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_optimized_and_restored_by_themselves(kind, copied):
    model = made(kind)
    inputs = given_to(kind)
    before = outputs_of(model, inputs)
    fastbert.optimize(model)
    expected = outputs_of(model, inputs)
    other = copied(model)
    assert type(other) is type(model)
    check_same_bits(outputs_of(other, inputs), expected)
    fastbert.restore(other)
    check_same_bits(outputs_of(other, inputs), before)
    check_same_bits(outputs_of(model, inputs), expected)
    assert backends(model) == {"eager"}
    with pytest.raises(TypeError, match="no fastbert encoder"):
        fastbert.explain(other)


def test_a_copy_of_a_cast_model_gets_its_own_weights_back():
    model = made()
    before = weights_of(model)
    other = deepcopy(fastbert.optimize(model, torch.bfloat16))
    check_same_bits(weights_of(fastbert.restore(other)), before)
    check_same_bits(weights_of(fastbert.restore(model)), before)


def test_an_optimizer_made_before_goes_on_with_the_same_parameters():
    results = []
    for changes in ({}, {2: fastbert.optimize, 4: fastbert.restore, 5: fastbert.optimize}):
        model = made().train()
        inputs = inputs_for("BertForSequenceClassification", with_labels=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        start = weights_of(model)
        for step in range(7):
            changes.get(step, lambda x: x)(model)
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        results.append(weights_of(model))
    for name, expected in results[0].items():
        assert name.endswith("position_ids") or not torch.equal(expected, start[name])
        # A gradient that is nothing but rounding, as of the keys' biases, has a sign that Adam steps along.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(results[1][name], expected, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_gradient_checkpointing_recomputes_the_layers(before, monkeypatch):
    model = made().train()
    calls = []
    forward = fastbert.model.BertLayer._forward_fused
    monkeypatch.setattr(fastbert.model.BertLayer, "_forward_fused", lambda *a: calls.append(1) or forward(*a))
    inputs = inputs_for("BertForSequenceClassification", with_labels=True)
    model(**inputs).loss.backward()
    expected = model.bert.encoder.layer[0].output.dense.weight.grad.clone()
    model.zero_grad()
    changes = [fastbert.optimize, lambda x: x.gradient_checkpointing_enable()]
    for change in changes[::-1] if before else changes:
        change(model)
    assert model.is_gradient_checkpointing
    model(**inputs).loss.backward()
    assert len(calls) == 6
    torch.testing.assert_close(model.bert.encoder.layer[0].output.dense.weight.grad, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "own head"])
def test_attention_by_another_name_is_set_afterwards(kind):
    model = fastbert.optimize(made(kind))
    inputs = given_to(kind)
    expected = outputs_of(model, inputs)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    check_equal(kind, outputs_of(model, inputs), expected, "right")


def test_the_vocabulary_is_resized_afterwards():
    model = fastbert.optimize(made("BertForMaskedLM"))
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.full((1, 3), 69)
    expected = outputs_of(model, {"input_ids": ids})
    assert expected["logits"].shape == (1, 3, 70)
    fastbert.restore(model)
    torch.testing.assert_close(outputs_of(model, {"input_ids": ids}), expected, atol=1e-5, rtol=1e-5)


def test_the_real_model_stays_within_the_promise(minilm_path, tokenizer):
    model = transformers.BertModel.from_pretrained(minilm_path).eval()
    inputs = tokenizer(
        ["A", "Encoders read both ways.", "Padding is removed once, " * 9], padding=True, return_tensors="pt"
    )
    before = outputs_of(model, inputs)
    after = outputs_of(fastbert.optimize(model), inputs)
    kept = inputs["attention_mask"]
    for name in ("last_hidden_state", "pooler_output"):
        values = (at_kept_tokens(x[name], kept) for x in (after, before))
        torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    check_same_bits(outputs_of(fastbert.restore(model), inputs), before)


@pytest.mark.parametrize("then", [torch.float32, torch.float16, None], ids=str)
def test_restore_is_bitwise_equal_after_another_cast(then):
    _, model = pair("BertForMaskedLM")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fastbert.optimize(model, dtype=torch.bfloat16)
    if then is not None:
        model.to(then)
    fastbert.restore(model)
    # The cast to float16 changes weights below its normal range, and `restore` keeps changes, as after training.
    tiny = torch.finfo(torch.float16).tiny if then is torch.float16 else 0
    for name, x in model.state_dict().items():
        same = (x == before[name]) | (before[name].abs() < tiny)
        assert same.all(), name


def test_untrained_weights_stay_bitwise_equal():
    _, model = pair()
    table = model.embeddings.word_embeddings.weight
    before = table.detach().clone()
    fastbert.optimize(model, dtype=torch.bfloat16)
    with torch.no_grad():
        table[3] += 1
    learned = table[3].detach().float()
    fastbert.restore(model)
    assert torch.equal(table[3], learned)
    rest = torch.arange(len(table)) != 3
    assert torch.equal(table[rest], before[rest])


def test_a_module_that_an_optimized_model_shares_may_be_optimized_too():
    (_, first), (_, second) = pair(), pair()
    second.embeddings = first.embeddings
    expected = second(**batch()).last_hidden_state
    fastbert.optimize(first)
    fastbert.optimize(second)
    kept = MASKS["right"].bool()
    torch.testing.assert_close(second(**batch()).last_hidden_state[kept], expected[kept], atol=1e-5, rtol=1e-5)
