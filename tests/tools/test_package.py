"""The structure of the packages: which module imports which, what an import costs, what is exported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastbert

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "fastbert"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_only_the_dispatch_imports_the_kernels():
    for name, path in MODULES.items():
        text = path.read_text()
        knows = name in ("ops.backend", "ops.torch_library", "ops.trained_layer")
        assert 'import_module("fastbert_kernels")' not in text or knows, path
        assert not any(module.startswith("fastbert_kernels") for module in imported(path)), path


def test_modules_import_those_below_them_alone():
    below = {
        "_compat": set(),
        "ops.backend": {"_compat"},
        "ops.eager": {"ops.backend"},
        "ops.torch_library": {"_compat", "ops.backend", "ops.eager"},
        "ops.trained_layer": {"_compat", "ops.eager"},
        "ops": {"ops.backend", "ops.eager", "ops.torch_library"},
        "tokens": {"ops"},
        "patches": {"_compat"},
        "outputs": {"ops"},
        "fusion": {"_compat", "ops", "patches"},
        "encoder_layer": {"_compat", "ops"},
        "inputs": {"_compat", "configuration", "ops", "tokens"},
        "pretrained": {"configuration"},
        "layers": {"_compat", "configuration", "encoder_layer", "fusion", "inputs", "ops", "patches", "tokens"},
        "model": {
            "_compat",
            "configuration",
            "fusion",
            "inputs",
            "layers",
            "ops",
            "outputs",
            "patches",
            "pretrained",
            "replaying",
            "tokens",
        },
        "heads": {"fusion", "model", "ops", "outputs", "patches", "pretrained", "replaying", "tokens"},
        "compilation": {"automatic", "graph_rules", "inference", "model", "ops"},
        "tokenization": {"_compat", "fusion"},
        "windows": {"tokenization"},
        "inference": {
            "_compat",
            "fusion",
            "graphs",
            "heads",
            "layers",
            "model",
            "ops",
            "patches",
            "tokenization",
            "windows",
        },
        "sentences": {"_compat", "inference", "inputs", "ops", "tokenization", "tokens"},
        "explanation": {"automatic", "fusion", "heads", "inference", "ops", "pretrained", "sentences"},
        "conversion": {
            "_compat",
            "automatic",
            "configuration",
            "explanation",
            "fusion",
            "graphs",
            "heads",
            "model",
            "patches",
            "replaying",
            "sentences",
        },
        "capture": {"graph_rules", "outputs", "tokens"},
        "graph_rules": {"_compat"},
        "replaying": {"ops"},
        "automatic": {"_compat", "capture", "graph_rules", "graph_state", "graphs", "ops", "pretrained", "replaying"},
        "graph_state": {"_compat", "fusion", "inputs", "layers", "model", "patches", "pretrained"},
        "graphs": {"_compat", "capture", "graph_rules", "graph_state", "inputs", "ops", "pretrained", "replaying"},
        "configuration": {"_compat"},
        "commands": set(),
        "commands.texts": set(),
        "commands.timing": set(),
        "testing": set(),
        "commands.machine": set(),
        "commands.resumable": set(),
        "commands.checkpoint": {"commands.texts"},
        "commands.verify": {"commands.checkpoint", "ops", "testing", "tokens"},
        "commands.benchmark": {"automatic", "commands.checkpoint", "commands.timing", "testing"},
        "commands.information": {"automatic", "commands.machine", "graph_rules", "ops"},
        "commands.lines": set(),
        "commands.encode": {
            "commands.checkpoint",
            "commands.lines",
            "commands.resumable",
            "inference",
            "tokenization",
            "windows",
        },
        "ray": {"ray.embed", "ray.service"},
        "ray.inputs": {"commands.lines"},
        "ray.files": {"ray.inputs"},
        "ray.loading": {"commands.checkpoint"},
        "ray.embed": {"inference", "ray.inputs", "ray.loading", "tokenization", "windows"},
        "ray.corpus": {"commands.checkpoint", "commands.encode", "ray.embed", "ray.files", "ray.inputs"},
        "ray.protocol": set(),
        "ray.replica": {"inference", "ray.loading", "ray.protocol", "tokenization"},
        "ray.frontend": {"ray.protocol", "ray.replica", "tokenization"},
        "ray.service": {"commands.checkpoint", "ray.frontend", "ray.protocol", "ray.replica", "windows"},
        "commands.serve": {"ray.service"},
        "cli": {
            "commands.serve",
            "ray.corpus",
            "ray.protocol",
            *(f"commands.{name}" for name in ("benchmark", "checkpoint", "encode", "information", "machine", "verify")),
        },
    }
    assert below.keys() == MODULES.keys()
    for name, allowed in below.items():
        own = {module.removeprefix("fastbert.") for module in imported(MODULES[name]) if module.startswith("fastbert.")}
        # `from fastbert.fusion import why_eager` gives fastbert.fusion.why_eager, whose module is before the last dot.
        modules = {each if each in MODULES else each.rpartition(".")[0] for each in own} & MODULES.keys()
        if not name.startswith("ops"):
            modules = {"ops" if each.startswith("ops.") else each for each in modules}
        assert modules <= allowed, f"{name} imports {modules - allowed}"


def test_kernels_stand_alone():
    files = list((ROOT / "kernels").rglob("*.py"))
    assert files
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in files:
        tops = {module.split(".")[0] for module in imported(path)}
        assert tops <= {"torch", "triton", "fastbert_kernels", *sys.stdlib_module_names}, path


def test_a_module_of_the_kernels_imports_those_below_it_alone():
    folder = ROOT / "kernels" / "fastbert_kernels"
    names = {path: ".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
    from_below = (
        "limits", "target", "binding", "activation", "operands", "launch", "configs", "matmul", "dropout", "layer_norm",
        "embed_layer_norm", "packing", "pool", "attention", "attention_backward", "activation_backward",
        "residual_layer_norm", "layer_norm_backward", "linear_activation",
        "qkv_projection", "linear_residual_layer_norm", "encoder_layer", "encoder_layer_training", "__init__",
        "tuning.__init__", "tuning.roofline", "tuning.ahead_of_time", "tuning.report", "tuning.candidates",
        "tuning.cases", "tuning.trial", "tuning.tune",
    )  # fmt: skip
    assert sorted(from_below) == sorted(names.values())
    for path, name in names.items():
        own = {module.removeprefix("fastbert_kernels.") for module in imported(path) if "fastbert_kernels" in module}
        own = {"__init__" if module == "fastbert_kernels" else module for module in own}
        modules = {module if module in from_below else module.rpartition(".")[0] for module in own}
        above = modules - set(from_below[: from_below.index(name)])
        assert not above, f"{name} imports {above}"


def test_private_names_cost_no_import():
    tops = {module.split(".")[0] for module in imported(PACKAGE / "_compat.py")}
    assert tops <= {"torch", *sys.stdlib_module_names}


def test_files_stay_short():
    for path in [*ROOT.glob("fastbert/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("bench/*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def run(code: str) -> str:
    """Run Python code in a process outside of the repository and return its output."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_without_triton_and_without_heavy_modules():
    code = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTriton())
import fastbert
assert "torch" not in sys.modules and "transformers" not in sys.modules
import torch
model = fastbert.BertModel(fastbert.BertConfig(hidden_size=12, num_hidden_layers=1, intermediate_size=12)).eval()
print(tuple(model(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.shape))
"""
    assert run(code).strip() == "(1, 3, 12)"


def test_the_import_costs_little_more_than_transformers_own():
    code = """
import time
import torch, transformers.models.bert.modeling_bert, transformers.models.bert.configuration_bert
start = time.perf_counter()
from fastbert import BertConfig, BertForMaskedLM, BertModel, backend, explain
print(time.perf_counter() - start)
"""
    assert any(float(run(code)) < 0.2 for _ in range(3))


def test_the_repository_root_is_not_on_the_path():
    """If it were, `import kernels` would find the folder instead of Hugging Face's package."""
    assert run("import importlib.util; import fastbert; print(importlib.util.find_spec('kernels'))").strip() == "None"


def test_exports():
    assert sorted(fastbert._HOME) == fastbert.__all__
    assert set(fastbert.__all__) <= set(dir(fastbert))
    for name in fastbert.__all__:
        assert getattr(fastbert, name).__module__.startswith(("fastbert.", "transformers."))
        assert getattr(fastbert, name).__doc__
    with pytest.raises(AttributeError, match="module 'fastbert' has no attribute 'BertLMHeadModel'"):
        fastbert.BertLMHeadModel  # noqa: B018


def test_forward_signatures_are_transformers():
    import inspect

    import transformers
    from cases import HEADS

    for head in HEADS:
        ours = inspect.signature(getattr(fastbert, head).forward).parameters
        theirs = inspect.signature(getattr(transformers, head).forward).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("module", ["ray", "ray.files", "ray.corpus", "commands.serve"])
def test_what_needs_ray_says_what_to_install(module):
    code = f"import sys; sys.modules['ray'] = None; import fastbert.{module}"
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    last = found.stderr.splitlines()[-1]
    assert last == "ImportError: fastbert.ray needs ray: pip install 'fastbert-triton[ray]'"
