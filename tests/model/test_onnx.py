"""torch.jit traces and ONNX exports by both of torch's exporters: they contain no size of the example as a constant."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from cases import HEADS, VOCAB, inputs_for, pair
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.export import Dim

import fastbert
from fastbert.ops import backend

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
NAMES = ("input_ids", "attention_mask", "token_type_ids")


def texts(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, a mask with padding and holes, and types."""
    generator = torch.Generator().manual_seed(sum(shape))
    ids, types = (torch.randint(high, shape, generator=generator) for high in (VOCAB, 2))
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., shape[-1] // 2 :] = 0
    mask[-1, ..., 1] = 0
    return ids, mask, types


class Outputs(nn.Module):
    """The outputs of a model as a tuple, without those that are None."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.model(**dict(zip(NAMES, inputs, strict=True)), return_dict=True).to_tuple()


class Embeddings(nn.Module):
    """The sentence embeddings of a SentenceTransformer, from tokenized texts."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(dict(zip(NAMES, inputs, strict=True)))["sentence_embedding"]


@pytest.fixture(params=["on the CPU", "as on a GPU"])
def kernels_are_wanted(request, monkeypatch):
    """A context in which the dispatch tries kernels first, as on a GPU."""

    @contextmanager
    def wanted():
        with monkeypatch.context() as patch:
            if request.param == "as on a GPU":
                patch.setattr(backend, "_wants_kernels", lambda device: True)
                patch.setattr(backend, "why_not_triton", lambda *_: None)
            yield

    return wanted


def exported(model: nn.Module, inputs: tuple[Tensor, ...], dynamo: bool, path) -> onnxruntime.InferenceSession:
    """The model in onnxruntime, exported with sizes that may vary in every dimension."""
    if dynamo:
        sizes = tuple(dict.fromkeys(range(x.ndim), Dim.DYNAMIC) for x in inputs)
        how = {"dynamo": True, "dynamic_shapes": {"inputs": sizes}, "verbose": False}
    else:
        axes = {name: {i: f"size{i}" for i in range(inputs[0].ndim)} for name in NAMES}
        how = {"dynamo": False, "dynamic_axes": axes}
    with torch.no_grad():
        torch.onnx.export(model.eval(), inputs, path, input_names=list(NAMES), **how)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check_other_sizes(session, model: nn.Module, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        inputs = texts(*shape)
        found = session.run(None, {name: x.numpy() for name, x in zip(NAMES, inputs, strict=True)})
        with torch.no_grad():
            expected = model(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-4, rtol=1e-4)


EXPORTED = [*((head, "sdpa") for head in HEADS), ("BertModel", "eager")]
# By torch.export, as in test_tracing.py, which exports every head.
BY_DYNAMO = ["BertModel", "BertForMultipleChoice"]


@pytest.mark.parametrize(
    ("head", "attention", "kernels_are_wanted", "dynamo"),
    [(*each, place, False) for each in EXPORTED for place in ("on the CPU", "as on a GPU")]
    + [(*each, "as on a GPU", True) for each in EXPORTED if each[0] in BY_DYNAMO],
    indirect=["kernels_are_wanted"],
)
def test_exported_models_take_other_sizes(head, attention, dynamo, kernels_are_wanted, tmp_path):
    ours, _ = pair(head, attention, num_hidden_layers=1)
    choices = (2,) if head == "BertForMultipleChoice" else ()
    with kernels_are_wanted():
        session = exported(Outputs(ours), texts(3, *choices, 9), dynamo, tmp_path / "model.onnx")
    check_other_sizes(session, Outputs(ours), (2, *choices, 14), (5, *choices, 4), (3, *choices, 9))


@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "dynamo"])
def test_an_exported_sentence_transformer_takes_other_sizes(dynamo, minilm_path, tmp_path):
    model = fastbert.optimize(SentenceTransformer(str(minilm_path), device="cpu"))
    session = exported(Embeddings(model), texts(3, 9), dynamo, tmp_path / "model.onnx")
    check_other_sizes(session, Embeddings(model), (2, 14), (5, 4))


@pytest.mark.parametrize("whose", ["our class", "optimized"])
@pytest.mark.parametrize("head", HEADS)
def test_a_trace_of_a_head_with_gradients_on(head, whose, kernels_are_wanted):
    ours, theirs = pair(head, num_hidden_layers=1, return_dict=False)
    if whose == "optimized":
        ours = fastbert.optimize(theirs)
    choices = (2,) if head == "BertForMultipleChoice" else ()
    with kernels_are_wanted():
        traced = torch.jit.trace(ours, texts(2, *choices, 8)[:2], strict=False)
    for shape in ((2, *choices, 8), (3, *choices, 5)):
        inputs = texts(*shape)[:2]
        for a, b in zip(traced(*inputs), ours(*inputs), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_trace_with_the_back_end_triton_raises():
    ours, _ = pair(return_dict=False)
    with (
        fastbert.backend("triton"),
        pytest.raises(RuntimeError, match="graphs of torch.jit.trace and torch.onnx must run without fastbert"),
    ):
        torch.jit.trace(ours, texts(2, 8)[:2], strict=False)


def test_dynamic_quantization_finds_every_linear():
    """Dynamic quantization selects modules by exact type."""
    for head in HEADS:
        ours, theirs = pair(head, tie_word_embeddings=False)
        quantized = [
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8) for model in (ours, theirs)
        ]
        assert not any(type(x) is nn.Linear for model in quantized for x in model.modules())
        with torch.no_grad():
            outputs, expected = (model(**inputs_for(head, None)) for model in quantized)
        for name in expected:
            torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=1e-5)


def test_exact_types_are_counted_as_in_transformers():
    for head in HEADS:
        counts = [
            sum(type(x) is nn.Linear for x in model.modules())
            for model in (*pair(head), fastbert.optimize(getattr(transformers, head)(pair(head)[0].config)))
        ]
        assert len(set(counts)) == 1
