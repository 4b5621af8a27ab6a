"""PEFT's adapters work as on transformers' models: added before or after `optimize`, or to our own class."""

import peft
import pytest
import torch
import transformers
from cases import inputs_for, pair
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import fastbert

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HEAD = "BertForSequenceClassification"
INPUTS = inputs_for(HEAD, with_labels=True)
LAYERS = {f"encoder.layer.{index}" for index in range(3)}
PLACES = ["query", "value", "intermediate.dense"]


def lora(**settings) -> LoraConfig:
    """Return a LoRA configuration with random weights. PEFT's default would not change the outputs."""
    defaults = {"r": 4, "target_modules": PLACES, "init_lora_weights": False, "task_type": "SEQ_CLS"}
    return LoraConfig(**defaults | settings)


def adapted(order: str, config: peft.PeftConfig | None = None) -> PeftModel:
    """Return a model with adapters, made in one of the ORDERS. Weights and adapters are the same for each."""
    ours, model = pair(HEAD)
    if order == "our class":
        model = ours
    elif order == "optimized, then adapted":
        fastbert.optimize(model)
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config or lora()).eval()
    return fastbert.optimize(wrapped) if order == "adapted, then optimized" else wrapped


ORDERS = ["optimized, then adapted", "adapted, then optimized", "our class"]
TRANSFORMERS = "transformers"


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def check_logits(model: nn.Module, expected: nn.Module | torch.Tensor) -> None:
    expected = expected if isinstance(expected, torch.Tensor) else logits_of(expected)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def back_ends(model: nn.Module) -> dict[str, set[str]]:
    """Return the back ends of each layer's ops."""
    rows = {}
    for row in fastbert.explain(model):
        if ".layer." in row.block:
            rows.setdefault("encoder" + row.block.rpartition("encoder")[2], set()).add(row.backend)
    return rows


def all_layers(backend: str) -> dict[str, set[str]]:
    return {name: {backend} for name in LAYERS}


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def trained(model: nn.Module, steps: int = 5) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train for some steps. Return their losses and the gradients of the first."""
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.05)
    model.train()
    losses, first = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**INPUTS).loss
        loss.backward()
        first = first or {name: x.clone() for name, x in gradients_of(model).items()}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


TUNERS = {
    "LoRA": lora(),
    "LoRA everywhere": lora(target_modules="all-linear", modules_to_save=["classifier"]),
    "LoRA on embeddings and the pooler": lora(target_modules=["word_embeddings", "pooler.dense", "output.dense"]),
    "a trained pooler": lora(modules_to_save=["classifier", "pooler"]),
    "rank-stabilized": lora(use_rslora=True, bias="lora_only"),
    "DoRA": lora(use_dora=True),
    "IA3": peft.IA3Config(
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
        task_type="SEQ_CLS",
        init_ia3_weights=False,
    ),
    "LoHa": peft.LoHaConfig(r=4, target_modules=PLACES, init_weights=False, task_type="SEQ_CLS"),
    "LoKr": peft.LoKrConfig(r=4, target_modules=PLACES, init_weights=False, task_type="SEQ_CLS"),
    "VeRA": peft.VeraConfig(r=4, target_modules=["query", "value"], init_weights=False, task_type="SEQ_CLS"),
    "norms": peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    "trained tokens": peft.TrainableTokensConfig(token_indices=[3, 5, 7], target_modules=["word_embeddings"]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_adapters_train_as_on_transformers(tuner, order):
    model, expected = adapted(order, TUNERS[tuner]), adapted(TRANSFORMERS, TUNERS[tuner])
    names = [name for name, x in expected.named_parameters() if x.requires_grad]
    assert names
    assert [name for name, x in model.named_parameters() if x.requires_grad] == names
    check_logits(model, expected)
    (losses, gradients), (expected_losses, expected_gradients) = trained(model), trained(expected)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert len(set(losses)) > 1
    assert gradients.keys() == expected_gradients.keys() == set(names)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-3, msg=name)
    torch.testing.assert_close(logits_of(model), logits_of(expected), atol=1e-4, rtol=1e-4)


MERGED = [name for name in TUNERS if name != "a trained pooler"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tuner", MERGED)
def test_merged_adapters_leave_the_layers_fused(tuner, order):
    model, expected = adapted(order, TUNERS[tuner]), adapted(TRANSFORMERS, TUNERS[tuner])
    trained(model)
    trained(expected)
    live, live_layers = logits_of(model), back_ends(model)
    in_layers = tuner != "trained tokens"
    assert live_layers == all_layers("modules" if in_layers else "eager")
    model.merge_adapter()
    expected.merge_adapter()
    assert back_ends(model) == all_layers("eager")
    assert {row.backend for row in fastbert.explain(model)} == {"eager"}
    torch.testing.assert_close(logits_of(model), logits_of(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(model), live, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert back_ends(model) == live_layers
    torch.testing.assert_close(logits_of(model), live, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tuner", MERGED)
def test_a_merged_and_unloaded_model_is_a_fastbert_model(tuner, order):
    model, expected = adapted(order, TUNERS[tuner]), adapted(TRANSFORMERS, TUNERS[tuner])
    unmerged = logits_of(model)
    model, expected = model.merge_and_unload(), expected.merge_and_unload()
    assert type(model) is fastbert.BertForSequenceClassification
    assert {row.backend for row in fastbert.explain(model)} == {"eager"}
    weights = model.state_dict()
    assert list(weights) == list(expected.state_dict())
    assert all(torch.equal(weights[name], x) for name, x in expected.state_dict().items())
    check_logits(model, expected)
    torch.testing.assert_close(logits_of(model), unmerged, atol=1e-4, rtol=1e-4)
    if order != "our class":
        fastbert.restore(model)
        assert type(model) is transformers.BertForSequenceClassification
        assert torch.equal(logits_of(model), logits_of(expected))


@pytest.mark.parametrize("order", ORDERS)
def test_unloading_gives_back_the_weights_from_before(order):
    model = adapted(order)
    before = pair(HEAD)[1]
    assert not torch.allclose(logits_of(model), logits_of(before), atol=1e-2)
    model = model.unload()
    assert back_ends(model) == all_layers("eager")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in before.state_dict().items())
    check_logits(model, before)


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
@pytest.mark.parametrize("order", ORDERS)
def test_disabled_adapters_do_not_count(order, merged):
    """PEFT unmerges a disabled adapter in the next forward of its module, so that module must run."""
    model, expected = adapted(order), adapted(TRANSFORMERS)
    base = logits_of(pair(HEAD)[1])
    if merged:
        model.merge_adapter()
        expected.merge_adapter()
    adapters_on = logits_of(expected)
    check_logits(model, adapters_on)
    assert not torch.allclose(adapters_on, base, atol=1e-2)
    with model.disable_adapter():
        assert back_ends(model) == all_layers("modules")
        for _ in range(2):
            torch.testing.assert_close(logits_of(model), base, atol=1e-4, rtol=1e-4)
    assert back_ends(model) == all_layers("modules")
    torch.testing.assert_close(logits_of(model), adapters_on, atol=1e-4, rtol=1e-4)
    model.merge_adapter()
    assert back_ends(model) == all_layers("eager")
    torch.testing.assert_close(logits_of(model), adapters_on, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_two_adapters_take_turns(order):
    models = adapted(order), adapted(TRANSFORMERS)
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("second", lora(r=2, target_modules=["key"]))
    results = {}
    for name in ("default", "second"):
        for model in models:
            model.set_adapter(name)
        check_logits(*models)
        results[name] = logits_of(models[0])
    assert not torch.allclose(*results.values(), atol=1e-2)
    trained(models[0])
    trained(models[1])
    torch.testing.assert_close(*map(logits_of, models), atol=1e-4, rtol=1e-4)
    for model in models:
        model.set_adapter("default")
    check_logits(models[0], results["default"])
    models[0].merge_adapter(["second"])
    # The first adapter is not merged, the second one is.
    assert back_ends(models[0]) == all_layers("modules")
    models[0].unmerge_adapter()
    for model in models:
        model.delete_adapter("second")
    check_logits(*models)


def test_a_layer_is_fused_only_once_all_its_adapters_are_merged():
    model = adapted("optimized, then adapted", lora(target_modules=["query", "value"]))
    layer = model.base_model.model.bert.encoder.layer[1]
    layer.attention.self.query.merge()
    reasons = {row.block.rpartition("bert.")[2]: row.reason for row in fastbert.explain(model) if "layer" in row.block}
    assert "attention.self.value is a peft.tuners.lora" in reasons["encoder.layer.1"]
    assert "attention.self.query is a peft.tuners.lora" in reasons["encoder.layer.0"]
    layer.attention.self.value.merge()
    assert back_ends(model) == all_layers("modules") | {"encoder.layer.1": {"eager"}}
    check_logits(model, adapted(TRANSFORMERS, lora(target_modules=["query", "value"])))


def test_a_hook_on_what_a_merged_adapter_wraps_fires():
    model = adapted("optimized, then adapted")
    calls = []
    model.base_model.model.bert.encoder.layer[1].attention.self.query.base_layer.register_forward_hook(
        lambda *_: calls.append(1)
    )
    model.merge_adapter()
    assert back_ends(model) == all_layers("eager") | {"encoder.layer.1": {"modules"}}
    logits_of(model)
    assert calls == [1]


@pytest.mark.parametrize("order", ORDERS)
def test_saved_adapters_are_transformers_own_bytes_and_load_anywhere(order, tmp_path):
    model, expected = adapted(order), adapted(TRANSFORMERS)
    model.save_pretrained(tmp_path / "ours")
    expected.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()
    trained(model)
    model.save_pretrained(tmp_path / "trained")
    weights = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in weights)
    assert any("classifier" in name for name in weights)
    ours, theirs = pair(HEAD)
    optimized = fastbert.optimize(pair(HEAD)[1])
    trained_logits = logits_of(model)
    assert not torch.allclose(trained_logits, logits_of(expected), atol=1e-3)
    for fresh in (ours, theirs, optimized):
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "trained")
        check_logits(loaded, trained_logits)
    fastbert.optimize(loaded)
    check_logits(loaded, trained_logits)


@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_of_no_task_names_our_class_which_peft_imports_if_allowed(order, tmp_path):
    _, theirs = pair(HEAD)
    theirs.save_pretrained(tmp_path / "base")
    model = adapted(order, lora(task_type=None))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    check_logits(PeftModel.from_pretrained(theirs, tmp_path / "adapter"), model)
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["fastbert.heads"])
    assert type(loaded.get_base_model()) is fastbert.BertForSequenceClassification
    check_logits(loaded, model)


@pytest.mark.parametrize("order", ORDERS[:2])
def test_restore_takes_fastbert_out_from_below_the_adapters(order):
    model, expected = adapted(order), adapted(TRANSFORMERS)
    fastbert.restore(model)
    assert [(name, type(x)) for name, x in model.named_modules()] == [
        (name, type(x)) for name, x in expected.named_modules()
    ]
    assert torch.equal(logits_of(model), logits_of(expected))


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_of_several_adapters(order):
    logits = []
    for model in (adapted(order), adapted(TRANSFORMERS)):
        torch.manual_seed(2)
        model.add_adapter("second", lora(r=2, target_modules=["key"]))
        names = ["second", "__base__", "default", "second"]
        with torch.no_grad():
            logits.append(model.eval()(**INPUTS, adapter_names=names).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[0], logits_of(adapted(TRANSFORMERS)), atol=1e-2)


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_checkpointing_below_adapters(order):
    results = []
    for model in (adapted(order), adapted(TRANSFORMERS)):
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable()
        results.append(trained(model, steps=2))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig], ids=["prompts", "encoder"])
def test_prompt_tuning(config, order):
    """It prepends learned embeddings to the inputs."""
    settings = config(task_type="SEQ_CLS", num_virtual_tokens=5)
    model, expected = adapted(order, settings), adapted(TRANSFORMERS, settings)
    check_logits(model, expected)
    (losses, gradients), (expected_losses, expected_gradients) = trained(model), trained(expected)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert any(name.startswith("prompt_encoder") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-3, msg=name)
    assert back_ends(model) == all_layers("eager")


@pytest.mark.parametrize("order", ORDERS)
def test_prefix_tuning_is_unsupported(order):
    """It passes keys and values in a cache, which fastbert's encoders do not support."""
    model = adapted(order, peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5))
    with pytest.raises(ValueError, match="past_key_values: only encoders are supported"):
        model(input_ids=INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"])


def test_a_patched_wrapper_of_a_trained_copy_counts():
    model = adapted("our class", TUNERS["LoRA everywhere"])
    wrapper = model.base_model.model.classifier
    assert "modules_to_save" in wrapper._modules
    wrapper.forward = lambda x, forward=wrapper.forward: forward(x) * 0
    assert not logits_of(model).any()
