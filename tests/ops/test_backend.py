"""The dispatch: the choice of the back end, when blocks are fused, and `explain`."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from cases import batch, pair
from torch import nn

import fastbert
from fastbert import ops
from fastbert.ops import backend, eager

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU there is no interpreter; test_triton.py runs kernels on the device"
)


def test_unknown_names_raise():
    with (
        pytest.raises(ValueError, match="unknown back end 'cuda', choose one of auto, triton, eager"),
        fastbert.backend("cuda"),
    ):
        pass


def test_an_explicit_choice_that_cannot_run_raises_with_the_reason(no_interpreter):
    ours, _ = pair()
    with fastbert.backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot run .*on 'cpu'.*CUDA device"):
        ours(**batch())
    assert ours(**batch()).last_hidden_state.isfinite().all()


@interpreted
def test_an_explicit_choice_raises_for_a_layer_that_must_run_through_its_modules():
    ours, _ = pair()
    ours.encoder.layer[0].register_forward_hook(lambda *_: None)
    with (
        fastbert.backend("triton"),
        pytest.raises(RuntimeError, match="cannot run an encoder layer: BertLayer has hooks"),
    ):
        ours(**batch())
    assert ours(**batch()).last_hidden_state.isfinite().all()


def test_the_choice_nests_and_is_restored_after_an_error():
    with fastbert.backend("eager"):
        with pytest.raises(KeyError), fastbert.backend("triton"):
            raise KeyError
        assert backend.current_backend() == "eager"
    assert backend.current_backend() == "auto"


def test_the_choice_belongs_to_its_thread():
    seen = []
    with fastbert.backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backend.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("triton", "RuntimeError: backend 'triton' cannot run"),
        ("cuda", "ValueError: FASTBERT_BACKEND: unknown"),
        ("eager", ""),
    ],
)
def test_the_environment_chooses(name, message):
    code = (
        "import torch, fastbert; model = fastbert.BertModel(fastbert.BertConfig(hidden_size=12, num_hidden_layers=1, "
        "intermediate_size=12)).eval(); model(torch.ones(1, 3, dtype=torch.long))"
    )
    environment = os.environ | {"FASTBERT_BACKEND": name, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (run.returncode != 0) == bool(message), run.stderr
    assert message in run.stderr


@interpreted
def test_options_that_kernels_lack_fall_back(caplog):
    ours, _ = pair()
    backend.warn_once.cache_clear()
    with fastbert.backend("triton"), pytest.raises(RuntimeError, match="attention: a 3-D or 4-D attention mask"):
        ours(**batch(None), attention_mask=torch.ones(4, 1, 12, 12))
    with caplog.at_level(logging.INFO, "fastbert"):
        for _ in range(2):
            backend.fall_back("attention", "a mask", torch.device("cuda"))
            backend.fall_back("attention", "a mask", torch.device("cpu"))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.records[0].getMessage() == "attention runs in eager PyTorch: a mask"


def test_the_fallback_for_attention_weights_is_logged_once(caplog):
    backend.warn_once.cache_clear()
    ours, _ = pair()
    with caplog.at_level(logging.INFO, "fastbert"):
        for _ in range(2):
            ours(**batch(), output_attentions=True)
    assert [record.getMessage() for record in caplog.records] == [
        "an encoder layer runs in eager PyTorch: attention weights are asked for"
    ]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["right", "full", None])
def test_attention_implementations_are_used(implementation, mask, monkeypatch):
    ours, _ = pair()
    ours.set_attn_implementation(implementation)
    if implementation == "eager":
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    else:
        monkeypatch.setattr(eager, "_softmax_attention", None)
    for change in (lambda: None, lambda: ours.train().encoder.layer[0].output.dropout.__setattr__("p", 0.1)):
        change()
        assert ours(**batch(mask)).last_hidden_state.isfinite().all()


class _Parameter(nn.Parameter):
    pass


def _replace_parameter(layer):
    layer.output.dense.weight = _Parameter(layer.output.dense.weight.detach())


def _activate_dropout(layer):
    layer.attention.self.train().dropout.p = 0.1


REASONS = {
    "layer hook": (lambda layer: layer.register_forward_hook(lambda *_: None), "BertLayer has hooks"),
    "pre-hook": (lambda layer: layer.output.register_forward_pre_hook(lambda *_: None), "output has hooks"),
    "backward hook": (
        lambda layer: layer.attention.self.key.register_full_backward_hook(lambda *_: None),
        "attention.self.key has hooks",
    ),
    "class": (
        lambda layer: setattr(layer.intermediate, "dense", nn.Identity()),
        "intermediate.dense is a torch.nn.modules.linear.Identity, not a Linear",
    ),
    "norm": (
        lambda layer: setattr(layer.output, "LayerNorm", nn.RMSNorm(48)),
        "output.LayerNorm is a torch.nn.modules.normalization.RMSNorm, not a LayerNorm",
    ),
    "patched forward": (
        lambda layer: setattr(layer.output.dense, "forward", None),
        "output.dense has a patched forward",
    ),
    "parameter subclass": (_replace_parameter, "output.dense has a _Parameter in place of a plain Parameter"),
    "dropout": (_activate_dropout, "it applies dropout (p=0.1), which only kernels do"),
    "activation": (
        lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.SiLU()),
        "intermediate_act_fn, a torch.nn.modules.activation.SiLU, computes none of gelu, gelu_tanh, relu, tanh, none",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_explain_names_the_reason(name):
    ours, _ = pair()
    change, reason = REASONS[name]
    change(ours.encoder.layer[1])
    rows = fastbert.explain(ours)
    changed = [row for row in rows if row.block == "encoder.layer.1"]
    assert {(row.backend, row.reason) for row in changed} == {("modules", reason)}
    assert {row.backend for row in rows if row not in changed} == {"eager"}


def test_explain_lists_the_back_end_of_every_block_and_op(no_interpreter):
    ours, _ = pair("BertForSequenceClassification")
    rows = fastbert.explain(ours)
    assert len(rows) == 1 + 3 * 5 + 1 + 1
    assert (rows[-1].block, rows[-1].op) == ("classifier", "linear_activation")
    assert {row.op for row in rows} <= set(ops.OPS)
    assert {(row.backend, row.reason) for row in rows} == {
        ("eager", "the tensors are on 'cpu' and the kernels need a CUDA device")
    }
    with fastbert.backend("eager"):
        assert {row.reason for row in fastbert.explain(ours)} == {"backend 'eager' is chosen"}
    with fastbert.backend("triton"):
        assert {row.backend for row in fastbert.explain(ours)} == {"unsupported"}
    table = str(rows).splitlines()
    assert table[0].split() == ["block", "op", "backend", "reason"]
    assert any("bert.encoder.layer.0-2" in line for line in table)
    ours.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert any("bert.encoder.layer.1-2" in line for line in str(fastbert.explain(ours)).splitlines())


@interpreted
def test_explain_of_kernels_and_of_a_quantized_model():
    ours, _ = pair()
    quantized = torch.ao.quantization.quantize_dynamic(ours, {nn.Linear}, dtype=torch.qint8)
    assert {row.backend for row in fastbert.explain(quantized) if row.block != "embeddings"} == {"modules"}
    assert quantized(**batch()).last_hidden_state.isfinite().all()
    with fastbert.backend("triton"):
        rows = fastbert.explain(ours)
    assert {row.backend for row in rows} == {"triton"}
    assert "but eager for a 3-D or 4-D mask" in next(row.reason for row in rows if row.op == "attention")


@interpreted
def test_explain_of_dropout_in_kernels():
    ours, _ = pair(hidden_dropout_prob=0.1, num_hidden_layers=2)
    with fastbert.backend("triton"):
        assert {row.backend for row in fastbert.explain(ours.train())} == {"triton"}


def test_dropout_in_eval_mode_does_not_unfuse():
    ours, _ = pair(hidden_dropout_prob=0.1)
    ours.train()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert {row.backend for row in fastbert.explain(ours)} == {"eager"}


def test_explain_raises_for_a_model_that_is_not_ours():
    with pytest.raises(TypeError, match="torch.nn.modules.linear.Linear contains no fastbert encoder"):
        fastbert.explain(nn.Linear(2, 2))


def test_explain_names_an_unsupported_activation():
    ours, _ = pair(hidden_act="silu")
    (reason,) = {row.reason for row in fastbert.explain(ours) if "layer" in row.block}
    name = "transformers.activations.SiLUActivation"
    assert reason == f"intermediate_act_fn, a {name}, computes none of gelu, gelu_tanh, relu, tanh, none"


def test_plain_layers_never_call_their_modules(monkeypatch):
    """Without gradients no module below the model is called, because no hook would see it."""
    ours, _ = pair()
    called, call = [], nn.Module.__call__

    def counted(module, *args, **kwargs):
        called.append(type(module).__name__)
        return call(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counted)
    ours(**batch())
    assert called == ["BertModel", *["BertLayer"] * 3]
    called.clear()
    with torch.no_grad():
        ours(**batch())
    assert called == ["BertModel"]


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((7, 5), torch.float16, "compute capability is below 8.0"),
        ((9, 0), torch.float64, "float32, float16 and bfloat16, not torch.float64"),
        ((9, 0), torch.float16, "fastbert_kernels has no kernel for no_such_op"),
    ],
)
def test_why_a_gpu_is_unsupported(capability, dtype, message, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    backend._why_not_triton.cache_clear()
    assert message in backend.why_not_triton("no_such_op", torch.device("cuda", 0), dtype)
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    backend._why_not_triton.cache_clear()
    assert "triton is not installed" in backend.why_not_triton("no_such_op", torch.device("cuda", 0), dtype)
    backend._why_not_triton.cache_clear()
