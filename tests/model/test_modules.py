"""Hooks, and replaced, wrapped or patched modules take effect, with the shapes of transformers."""

import pytest
import torch
from cases import MASKS, batch, pair
from torch import nn
from transformers.models.bert import modeling_bert

import fastbert

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}

HOOKED = [
    "embeddings.word_embeddings",
    "embeddings",
    "encoder.layer.1",
    "encoder.layer.1.attention.self.query",
    "encoder.layer.1.attention.output.LayerNorm",
    "encoder.layer.1.intermediate.intermediate_act_fn",
    "encoder.layer.2.output.dropout",
    "pooler.dense",
    "pooler",
]


@pytest.mark.parametrize("mask", [None, "right"])
@pytest.mark.parametrize("name", [*HOOKED, "encoder"])
def test_hooks_get_the_inputs_and_outputs_of_transformers(name, mask):
    """Inputs and outputs have the same shapes, and at kept tokens the same values."""
    ours, theirs = pair()
    seen = {"in": [], "out": []}

    def hook(module, args, kwargs, output):
        values = [*args, *(kwargs[key] for key in ("input_ids", "hidden_states") if key in kwargs)]
        seen["in"].append(values[0])
        seen["out"].append(output[0] if name == "encoder" else output)

    for model in (ours, theirs):
        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    outputs, expected = ours(**batch(mask)), theirs(**batch(mask))
    for place in ("in", "out"):
        a, b = seen[place]
        assert isinstance(a, torch.Tensor)
        assert a.shape == b.shape, f"{place}puts: {a.shape}, transformers {b.shape}"
        kept = MASKS[mask].bool() if mask is not None and a.ndim >= 2 and a.shape[1] == 12 else ...
        torch.testing.assert_close(a[kept], b[kept], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)


def test_a_hook_may_change_a_layers_output_while_attentions_are_requested():
    ours, theirs = pair(attention="eager")
    for model in (ours, theirs):
        model.encoder.layer[1].register_forward_hook(lambda module, args, output: output * 2)
    outputs, expected = (model(**batch(None), output_attentions=True) for model in (ours, theirs))
    for name in ("last_hidden_state", "attentions"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-4, rtol=1e-4)


def test_hooked_embeddings_do_not_read_padding():
    ours, _ = pair()
    inputs = batch("left")
    expected = ours(**inputs).last_hidden_state
    ours.enable_input_require_grads()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    torch.testing.assert_close(ours(**inputs).last_hidden_state, expected, atol=1e-6, rtol=1e-6)


def test_a_hooked_pooler_still_pools_the_first_kept_token():
    ours, _ = pair()
    expected = ours(**batch("left")).pooler_output
    ours.pooler.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(ours(**batch("left")).pooler_output, expected)


def test_hooks_change_the_output_and_gradients_reach_them():
    ours, theirs = pair()
    grads = []
    for model in (ours, theirs):
        layer = model.encoder.layer[1]
        layer.attention.self.value.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.output.dense.register_full_backward_hook(lambda module, grad_in, grad_out: grads.append(grad_out[0]))
    outputs, expected = (model(**batch()).last_hidden_state[MASKS["right"].bool()] for model in (ours, theirs))
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(*(g[MASKS["right"].bool()] for g in grads), atol=1e-3, rtol=1e-3)


def test_global_hooks_fire_for_every_module():
    ours, _ = pair()
    names, shapes = [], []

    def hook(module, args, output):
        names.append(type(module).__name__)
        shapes.append(output.shape if isinstance(module, nn.Linear) else None)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        ours(**batch())
    finally:
        handle.remove()
    assert names.count("BertSelfAttention") == 3
    assert names.count("Linear") == 3 * 6 + 1
    assert sum(shape is not None and shape[:2] == (4, 12) for shape in shapes) == 3 * 6


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


def test_replaced_and_patched_modules_count():
    for change in ("class", "forward", "module"):
        ours, theirs = pair()
        for model in (ours, theirs):
            attention = model.encoder.layer[0].attention.self
            if change == "class":
                attention.key.__class__ = Scaled
            elif change == "forward":
                attention.key.forward = lambda x, key=attention.key: nn.functional.linear(x, key.weight, key.bias) * 3
            else:
                attention.key = nn.Sequential(attention.key, nn.Linear(48, 48))
        theirs.load_state_dict(ours.state_dict())
        outputs, expected = (model(**batch()).last_hidden_state[MASKS["right"].bool()] for model in (ours, theirs))
        torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
        rows = [row for row in fastbert.explain(ours) if row.block == "encoder.layer.0"]
        assert {row.backend for row in rows} == {"modules"}
        assert "attention.self.key" in rows[0].reason


class Wrapper(nn.Module):
    """A user's wrapper of a module, which may mix the tokens of a sequence and expects [B, S, E]."""

    def __init__(self, inner, along_the_sequence=False):
        super().__init__()
        self.inner, self.along_the_sequence = inner, along_the_sequence

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return output - output.mean(1, keepdim=True) if self.along_the_sequence else output


WRAPPED = [
    "embeddings",
    "encoder.layer.1",
    "encoder.layer.1.attention",
    "encoder.layer.1.attention.self",
    "encoder.layer.1.attention.output",
    "encoder.layer.1.intermediate",
    "encoder.layer.1.output",
    "encoder.layer.1.output.dense",
    "pooler",
]


# Means over a sequence are comparable only without padding, and only for modules that return one tensor of tokens.
AVERAGED = ["encoder.layer.1", "encoder.layer.1.attention.output", "encoder.layer.1.output.dense", "embeddings"]


@pytest.mark.parametrize(
    ("name", "along_the_sequence", "mask"),
    [(name, False, mask) for name in WRAPPED for mask in (None, "right")] + [(name, True, None) for name in AVERAGED],
)
def test_wrapped_modules(name, along_the_sequence, mask):
    ours, theirs = pair()
    for model in (ours, theirs):
        parent, _, child = name.rpartition(".")
        inner = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, Wrapper(inner, along_the_sequence))
    outputs, expected = ours(**batch(mask)), theirs(**batch(mask))
    kept = slice(None) if mask is None else MASKS[mask].bool()
    torch.testing.assert_close(outputs[0][kept], expected[0][kept], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1], expected[1], atol=1e-4, rtol=1e-4)
    rows = [row for row in fastbert.explain(ours) if row.block.startswith(name.split(".attention")[0])]
    assert all(row.backend == "modules" for row in rows if name.endswith(("attention", "output", "self")))


class MeanPooler(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.mean(1)


def test_a_pooler_of_another_class_gets_every_token():
    ours, theirs = pair()
    ours.pooler, theirs.pooler = MeanPooler(), MeanPooler()
    torch.testing.assert_close(ours(**batch(None))[1], theirs(**batch(None))[1], atol=1e-5, rtol=1e-5)


def test_a_replica_without_parameters_of_its_own():
    """`nn.DataParallel` empties the replicas' parameters and sets plain tensors in their place."""
    ours, _ = pair(**DROPOUT)
    expected = ours(**batch()).last_hidden_state

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.clone())
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child)
        return replica

    replica = replicate(ours)
    torch.testing.assert_close(replica(**batch()).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert {row.backend for row in fastbert.explain(replica)} == {"modules"}
    ours.train()
    assert replicate(ours)(**batch()).last_hidden_state.isfinite().all()


def test_a_weight_that_is_no_parameter_counts():
    ours, theirs = pair()
    for model in (ours, theirs):
        dense = model.encoder.layer[0].output.dense
        weight = dense.weight.detach() * 2
        del dense.weight
        dense.weight = weight
    outputs, expected = (model(**batch())[0][MASKS["right"].bool()] for model in (ours, theirs))
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [{"max_norm": 0.5}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_options_of_an_embedding_count(change):
    ours, theirs = pair()
    for model in (ours, theirs):
        for name, value in change.items():
            setattr(model.embeddings.word_embeddings, name, value)
    outputs, expected = (model(**batch())[0][MASKS["right"].bool()] for model in (ours, theirs))
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
    outputs.square().sum().backward()
    assert ours.embeddings.word_embeddings.weight.grad.is_sparse == change.get("sparse", False)
    assert "max_norm, sparse or scale_grad_by_freq" in fastbert.explain(ours)[0].reason


def test_parametrized_and_pruned_weights_count():
    from torch.nn.utils import parametrizations, prune

    ours, theirs = pair()
    for model in (ours, theirs):
        prune.l1_unstructured(model.encoder.layer[0].intermediate.dense, "weight", amount=0.5)
        parametrizations.weight_norm(model.encoder.layer[1].output.dense)
        with torch.no_grad():
            model.encoder.layer[1].output.dense.parametrizations.weight.original0.mul_(2)
    outputs, expected = (model(**batch()).last_hidden_state[MASKS["right"].bool()] for model in (ours, theirs))
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)


def test_submodules_can_be_called_as_in_transformers():
    ours, theirs = pair(attention="eager")
    hidden = torch.randn(4, 12, 48)
    mask = torch.zeros(4, 1, 1, 12).masked_fill(MASKS["right"][:, None, None] == 0, torch.finfo(torch.float32).min)
    nothing = {"encoder_hidden_states": None, "past_key_values": None}
    for arguments in ((), (mask,)):
        outputs, expected = ours.encoder(hidden, *arguments)[0], theirs.encoder(hidden, *arguments)[0]
        torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
        for name in ("encoder.layer.1", "encoder.layer.1.attention", "encoder.layer.1.attention.self"):
            outputs, expected = (model.get_submodule(name)(hidden, *arguments, **nothing) for model in (ours, theirs))
            torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
    asked = {"use_cache": False, "output_attentions": False, "output_hidden_states": None, "return_dict": True}
    outputs = ours.encoder(hidden, attention_mask=mask, **nothing, **asked)[0]
    torch.testing.assert_close(outputs, theirs.encoder(hidden, mask)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.embeddings(batch()["input_ids"]), theirs.embeddings(batch()["input_ids"]))


@pytest.mark.parametrize("kind", ["BertLayer", "BertSelfAttention", "BertAttention", "BertEmbeddings", "BertPooler"])
def test_parts_are_found_by_transformers_classes(kind):
    """Sharding policies and activation checkpointing search for them."""
    kind = getattr(modeling_bert, kind)
    ours, theirs = pair()
    counts = [sum(isinstance(x, kind) for x in model.modules()) for model in (ours, theirs, fastbert.optimize(theirs))]
    assert counts[0] == counts[1] == counts[2] > 0


class Gated(nn.Module):
    """Uses the mask in the form that transformers passes to its layers."""

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        keep = (attention_mask[:, 0, -1] == 0).float()[..., None]
        return hidden_states * ((hidden_states * keep).sum(1) / keep.sum(1)).sigmoid()[:, None]


def test_a_module_in_place_of_a_layer_gets_transformers_masks():
    ours, theirs = pair(attention="eager")
    for model in (ours, theirs):
        model.encoder.layer[1] = Gated()
    kept = MASKS["right"].bool()
    outputs, expected = (model(**batch()).last_hidden_state[kept] for model in (ours, theirs))
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
