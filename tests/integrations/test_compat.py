"""The private names of other libraries in `fastbert._compat` behave as it says, and no other file uses such names.

The ids of the tests contain the names. After an upgrade of a library, the failures tell which names are gone.
"""

import ast
import inspect
import re
import sys
import threading
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from cases import tiny_config
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import _compat

PACKAGE = Path(fastbert.__file__).parent
COVERED: set[str] = set()
PRIVATE = re.compile(r"_[A-Za-z]\w*")
# Public: the underscores only avoid clashes with the fields of a named tuple.
PUBLIC = {"_asdict", "_fields", "_make"}


def private_names(*names: str):
    """Parametrize a test by the private names that it covers."""
    COVERED.update(names)
    return pytest.mark.parametrize("private", names)


# torch: what is active on this thread


@private_names("torch._C._is_tracing")
def test_tracing(private):
    inside = []
    torch.jit.trace(lambda x: inside.append((_compat.is_tracing(), _compat.is_jit_tracing())) or x, torch.ones(()))
    assert (True, True) in inside
    assert not _compat.is_tracing()
    assert not _compat.is_jit_tracing()


@private_names("torch._C._are_functorch_transforms_active")
def test_functorch(private):
    inside = []
    torch.func.grad(lambda x: inside.append(_compat.is_transforming()) or x)(torch.ones(()))
    assert inside == [True]
    assert not _compat.is_transforming()


@private_names("torch.autograd.forward_ad._current_level")
def test_forward_mode(private):
    with forward_ad.dual_level():
        assert _compat.is_transforming()
    assert not _compat.is_transforming()


@private_names(
    "torch._C._functorch", "torch._C._functorch.is_legacy_batchedtensor", "torch._C._functorch.is_batchedtensor"
)
def test_batched_gradients(private):
    found = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            found.append(_compat.is_batched(grad))
            return grad

    x = torch.ones(3, requires_grad=True)
    y = Watched.apply(x)
    torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    torch.func.vmap(lambda row: found.append(_compat.is_batched(row)) or row)(torch.eye(2))
    assert found == [False, True, True]


@private_names("torch._C._len_torch_dispatch_stack")
def test_dispatch_modes(private):
    with TorchDispatchMode():
        assert _compat.is_watched()
    assert not _compat.is_watched()


@private_names("torch._C._is_any_autocast_enabled")
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_autocast(private, device_type):
    if device_type == "cuda" and not torch.cuda.is_available():
        pytest.skip("autocast on a GPU needs one")
    with torch.autocast(device_type, dtype=torch.bfloat16):
        assert _compat.is_any_autocast_enabled()
    assert not _compat.is_any_autocast_enabled()


@private_names("torch.cuda._is_in_bad_fork")
def test_a_process_that_was_not_forked(private):
    assert _compat.is_in_bad_fork() is False


class RecordsInside(TorchDispatchMode):
    """Note whether autograd records inside the mode, without and with `autograd_below_modes`."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        x = torch.ones(2, requires_grad=True)
        by_itself = (x * 2).requires_grad
        with _compat.autograd_below_modes():
            self.seen.add((by_itself, (x * 2).requires_grad))
        return function(*args, **(kwargs or {}))


@private_names("torch._C._SetExcludeDispatchKeyGuard", "torch._C.DispatchKey")
def test_autograd_below_modes(private):
    with RecordsInside() as mode:
        torch.ones(2) + 1
    assert mode.seen == {(False, True)}


@private_names("_dynamo_marked_constant")
@pytest.mark.parametrize("constant", [False, True])
def test_constants_in_graphs(private, constant):
    """Dynamo notices when a value that a function reads has changed, unless the function is marked as a constant."""
    held = [1]

    def number():
        return held[0]

    if constant:
        number = _compat.constant_in_graphs(number)
    torch.compiler.reset()  # both states share code, and dynamo would reuse the graph
    compiled = torch.compile(lambda x: x * number(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(())).item() == 1
    held[0] = 2
    assert compiled(torch.ones(())).item() == (1 if constant else 2)


# torch: modules and tensors


@private_names("torch.nn.modules.module._has_any_global_hook")
def test_global_hooks(private):
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert _compat.has_global_module_hooks() is True
    finally:
        handle.remove()
    assert _compat.has_global_module_hooks() is False


HOOKS = {
    "torch.nn.Module._forward_hooks": "register_forward_hook",
    "torch.nn.Module._forward_pre_hooks": "register_forward_pre_hook",
    "torch.nn.Module._backward_hooks": "register_full_backward_hook",
    "torch.nn.Module._backward_pre_hooks": "register_full_backward_pre_hook",
}
PLAIN = [(nn.Linear, [nn.Parameter] * 2)]


@private_names(*HOOKS)
def test_hooks(private):
    module = nn.Linear(2, 2).eval()
    kinds = _compat.hooks_of(module)
    handle = getattr(module, HOOKS[private])(lambda *_: None)
    assert [*map(len, kinds)] == [name == private for name in HOOKS]
    assert list(_compat.unexpected_modules([module], PLAIN)) == [0]
    handle.remove()
    assert not any(kinds)
    assert list(_compat.unexpected_modules([module], PLAIN)) == []


def with_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module


def with_weight(weight: torch.Tensor) -> nn.Module:
    module = nn.Linear(2, 2).eval()
    del module.weight
    module.weight = weight  # a parameter only if it is of such a class
    return module


class Derived(nn.Linear):
    pass


class DerivedParameter(nn.Parameter):
    pass


def test_unexpected_modules():
    modules = [
        nn.Linear(2, 2).eval(), nn.Linear(2, 2), Derived(2, 2).eval(), with_forward(nn.Linear(2, 2).eval()),
        nn.Linear(2, 2, bias=False).eval(), with_weight(torch.ones(2, 2)),
        with_weight(DerivedParameter(torch.ones(2, 2))),
    ]  # fmt: skip
    assert list(_compat.unexpected_modules(modules, PLAIN * len(modules))) == [1, 2, 3, 4, 5, 6]
    assert list(_compat.unexpected_modules(modules, [(None, [])] * len(modules))) == [1, 3]


@private_names("torch.nn.Module._compiled_call_impl")
def test_modules_that_are_compiled(private):
    module = nn.Linear(2, 2)
    assert not _compat.is_compiled(module)
    module.compile(backend="eager")
    assert _compat.is_compiled(module)


@private_names("torch.nn.Module._is_replica", "torch.nn.Module._replicate_for_data_parallel")
def test_replicas(private):
    """`nn.DataParallel` calls `_replicate_for_data_parallel` of each module."""
    module = nn.Identity()
    made = mock.Mock(wraps=getattr(nn.Identity, _compat.REPLICATE))
    setattr(module, _compat.REPLICATE, lambda: made(module))
    (replica,) = nn.parallel.replicate(module, [0])
    assert made.called
    assert _compat.is_replica(replica)
    assert not _compat.is_replica(module)


@private_names("torch.nn.Module._modules")
def test_own_modules(private):
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, shared, nn.Sequential(nn.ReLU()))
    module.register_module("none", None)
    assert _compat.own_modules(module) == {"0": shared, "1": shared, "2": module[2], "none": None}
    assert _compat.own_modules_of(module, shared) == [_compat.own_modules(module), {}]


@private_names("torch.nn.Module._parameters")
def test_own_parameters(private):
    with_bias, without = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    assert _compat.own_parameters(without) == {"weight": without.weight, "bias": None}
    assert _compat.own_parameters(nn.Sequential(with_bias)) == {}
    assert _compat.weights_of([with_bias]) == [with_bias.weight]
    found = _compat.weights_and_biases([with_bias, without])
    expected = [with_bias.weight, with_bias.bias, without.weight, None]
    assert all(x is y for x, y in zip(found, expected, strict=True))


@private_names("torch.nn.Module._buffers")
def test_own_buffers(private):
    norm = nn.BatchNorm1d(2)
    norm.register_buffer("none", None)
    found = _compat.own_buffers(norm)
    assert found.keys() == {"running_mean", "running_var", "num_batches_tracked", "none"}
    assert found["running_mean"] is norm.running_mean
    assert _compat.own_buffers(nn.Sequential(norm)) == {}


@private_names("torch.Tensor._version")
def test_versions(private):
    x, y = torch.zeros(2), torch.zeros(2)
    x_before, y_before = _compat.versions_of([x, y])
    x.add_(1)
    assert _compat.versions_of([x, y]) == [x_before + 1, y_before]
    with torch.inference_mode():
        z = torch.zeros(2)
    with pytest.raises(RuntimeError, match="Inference tensors do not track version counter"):
        _compat.versions_of([z])


@private_names("torch._foreach_copy_")
def test_cast_together(private):
    tensors = [torch.randn(3, 5), torch.randn(5, 3).T, torch.randn(0), torch.randn(2, dtype=torch.float64)]
    cast = _compat.cast_together(tensors, torch.bfloat16)
    for x, y in zip(tensors, cast, strict=True):
        assert torch.equal(x.bfloat16(), y)
        assert y.stride() == x.stride()
    assert _compat.cast_together([], torch.bfloat16) == []


# transformers


@private_names(
    "transformers.utils.generic.GeneralInterface._local_mapping",
    "transformers.utils.generic.GeneralInterface._global_mapping",
)
def test_registered(private, monkeypatch):
    functions = transformers.AttentionInterface()
    assert _compat.registered(functions, "sdpa") is functions["sdpa"]
    functions["sdpa"] = test_registered
    assert _compat.registered(functions, "sdpa") is test_registered
    assert _compat.registered(functions, "nobody's") is None


@private_names("transformers.PreTrainedConfig._attn_implementation")
def test_attention_of_a_configuration(private):
    model = hf.BertModel(tiny_config(attn_implementation="eager"))
    assert _compat.attn_implementation(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert _compat.attn_implementation(model.config) == "sdpa"


@private_names("transformers.PreTrainedConfig._output_attentions")
@pytest.mark.parametrize("asked", [False, True])
def test_keys_of_a_configuration(private, asked):
    config = transformers.BertConfig(attn_implementation="eager", output_attentions=asked, output_hidden_states=asked)
    for name in ("output_attentions", "output_hidden_states", "is_decoder"):
        assert vars(config)[_compat.config_key(vars(config), name)] is getattr(config, name)
    assert config.output_attentions is asked


@private_names("_output_capturing_hooks_installed")
def test_hooks_that_capture_outputs(private):
    model = hf.BertModel(tiny_config()).eval()
    ids, layer = torch.ones(1, 3, dtype=torch.long), model.encoder.layer[0]
    model(ids, output_hidden_states=True)
    assert vars(model)["_output_capturing_hooks_installed"]
    layer.register_forward_hook(lambda *_: None)
    assert len(_compat.hooks_of(layer)[0]) > 1
    for module in model.modules():
        _compat.remove_capturing_hooks(module)
    assert "_output_capturing_hooks_installed" not in vars(model)
    assert [len(_compat.hooks_of(x)[0]) for x in model.encoder.layer] == [1] + [0] * (len(model.encoder.layer) - 1)
    # transformers puts them in again.
    assert model(ids, output_hidden_states=True).hidden_states is not None


@private_names("transformers.PreTrainedTokenizerFast._tokenizer")
def test_the_tokenizer_of_a_wrapper(private):
    first, second = (Tokenizer(WordLevel({"a": 0, "b": token}, unk_token="a")) for token in (1, 2))
    wrapper = transformers.PreTrainedTokenizerFast(tokenizer_object=first)
    assert wrapper("b").input_ids == [1]
    _compat.set_backend_tokenizer(wrapper, second)
    assert wrapper.backend_tokenizer is second
    assert wrapper("b").input_ids == [2]


@private_names(*(f"transformers.PreTrainedTokenizerFast.{name}" for name in _compat.TOKENIZES))
def test_a_call_of_a_tokenizer_goes_through(private, tokenizer):
    name = private.rpartition(".")[2]
    kind = type(tokenizer)
    assert getattr(kind, name) is getattr(transformers.PreTrainedTokenizerFast, name)
    with mock.patch.object(kind, name, autospec=True, side_effect=getattr(kind, name)) as called:
        tokenizer(["a b"], padding=True, return_tensors="pt")
    assert called.called


@private_names("transformers.BertModel._create_attention_masks")
def test_a_model_makes_its_masks_by(private):
    model = hf.BertModel(tiny_config()).eval()
    with mock.patch.object(model, _compat.MAKES_MASKS, wraps=getattr(model, _compat.MAKES_MASKS)) as called:
        model(torch.ones(1, 3, dtype=torch.long))
    assert called.called
    assert {"attention_mask", "embedding_output"} <= called.call_args.kwargs.keys()


# accelerate


@private_names("_old_forward")
def test_the_forward_below_a_hook_of_accelerates(private):
    module = nn.Linear(2, 2)
    forward = module.forward
    add_hook_to_module(module, ModelHook())
    assert vars(module)[_compat.WRAPPED_FORWARD] == forward
    assert module.forward != forward
    remove_hook_from_module(module)
    assert _compat.WRAPPED_FORWARD not in vars(module)


# sentence-transformers


@pytest.fixture(scope="module")
def encoder(tiny_path) -> SentenceTransformer:
    transformer = Transformer(tiny_path)
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


@private_names("sentence_transformers.SentenceTransformer._inference")
def test_encode_goes_through(private, encoder):
    for kind in (SentenceTransformer, CrossEncoder, SparseEncoder, MultiVectorEncoder):
        assert callable(getattr(kind, _compat.INFERENCE))
    with mock.patch.object(encoder, _compat.INFERENCE, wraps=getattr(encoder, _compat.INFERENCE)) as called:
        encoder.encode(["a"])
    assert called.called


@private_names("sentence_transformers.SentenceTransformer._resolve_inference_device")
def test_the_device_of_a_call(private, encoder):
    assert _compat.inference_device(encoder, "cpu") == _compat.inference_device(encoder, None) == torch.device("cpu")
    assert hasattr(encoder, _compat.RESOLVES_DEVICE)


@private_names(*(f"sentence_transformers.base.modules.Transformer.{name}" for name in _compat.CALLS_PROCESSOR))
def test_preprocess_goes_through(private, encoder):
    transformer, name = encoder[0], private.rpartition(".")[2]
    with mock.patch.object(transformer, name, wraps=getattr(transformer, name)) as called:
        transformer.preprocess(["a"])
    assert called.called


@private_names("torch.utils.data._utils.pin_memory")
def test_the_thread_that_pins_memory(private):
    assert private == _compat.PINS_MEMORY
    assert callable(import_module(private)._pin_memory_loop)
    assert "target=_utils.pin_memory._pin_memory_loop" in inspect.getsource(torch.utils.data.dataloader)


# Python


@private_names("threading.Thread._target")
def test_the_function_of_a_thread(private):
    wait = threading.Event()
    thread = threading.Thread(target=wait.wait)
    assert _compat.target_of(thread) == wait.wait
    thread.start()
    assert _compat.target_of(thread) == wait.wait
    wait.set()
    thread.join()
    assert _compat.target_of(thread) is None


# Private methods and attributes of base classes that ours override. They cannot move to `_compat`.

OVERRIDES = {
    "transformers.PreTrainedModel._supports_flash_attn": "our own kernels attend",
    "transformers.PreTrainedModel._supports_flex_attn": "our own kernels attend",
    "transformers.PreTrainedModel._supports_attention_backend": "our own kernels attend",
    "transformers.PreTrainedModel._can_record_outputs": "our encoder collects hidden states and attentions",
    "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected": "a buffer that checkpoints carried",
    "transformers.PreTrainedModel._check_and_adjust_attn_implementation": "refuses what has no eager path",
    "transformers.PreTrainedModel._can_set_attn_implementation": "transformers would guess it from its own source",
    "torch.nn.Module._apply": "moves and casts: what graphs keep of the old place is freed before",
}


def is_foreign(kind: type) -> bool:
    return kind.__module__.split(".")[0] not in (PACKAGE.name, *sys.stdlib_module_names)


def overridden() -> set[str]:
    """Return the private names that classes of ours override from base classes of other libraries."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
        module = import_module(".".join(parts).removesuffix(".__init__"))
        for name, defined in definitions_in([ast.parse(path.read_text())]).by_class.items():
            bases = [base for base in getattr(module, name).__mro__ if is_foreign(base)]
            found |= {x for x in defined if any(x in vars(base) for base in bases)}
    return found


@pytest.mark.parametrize("private", OVERRIDES)
def test_a_base_class_still_has(private):
    *home, kind, name = private.split(".")
    assert name in vars(getattr(import_module(".".join(home)), kind))


def test_all_overrides_are_listed():
    assert overridden() == {name.rpartition(".")[2] for name in OVERRIDES}


# Outside `_compat` there are no private names of other libraries.


class Definitions(ast.NodeVisitor):
    """Collect the private names that files define: in modules, in class bodies and as attributes of self."""

    def __init__(self):
        self.plain: set[str] = set()
        self.by_class: dict[str, set[str]] = {}
        self.bases: dict[str, list[str]] = {}
        self.inside: list[str] = []

    def visit_ClassDef(self, node):
        self.plain.add(node.name)
        self.bases.setdefault(node.name, []).extend(x.id for x in node.bases if isinstance(x, ast.Name))
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_FunctionDef(self, node):
        self.define(node.name)
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.define(node.id)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
            self.define(node.attr)
        self.generic_visit(node)

    def define(self, name: str) -> None:
        if PRIVATE.fullmatch(name):
            self.plain.add(name)
            if self.inside:
                self.by_class.setdefault(self.inside[-1], set()).add(name)

    def of_class(self, name: str) -> set[str]:
        found = set(self.by_class.get(name, ()))
        return found.union(*(self.of_class(base) for base in self.bases.get(name, ()) if base != name))


class Uses(ast.NodeVisitor):
    """Collect the private names of other libraries in a file: attributes, imports, strings, anything below `torch._C`.

    Names that fastbert defines are its own. If `_compat` uses a name, too, it is fastbert's own only as an attribute of
    self in a class that defines it.
    """

    def __init__(self, definitions: Definitions, known: set[str]):
        self.definitions, self.known = definitions, known
        self.inside: list[str] = []
        self.found: list[tuple[int, str]] = []

    def visit_ClassDef(self, node):
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Attribute(self, node):
        if PRIVATE.fullmatch(node.attr) and not self.is_own(node):
            self.found.append((node.lineno, ast.unparse(node)))
        self.generic_visit(node)

    def is_own(self, node: ast.Attribute) -> bool:
        of_self = ast.unparse(node.value) in ("self", "cls", "super()")
        if of_self and self.inside and node.attr in self.definitions.of_class(self.inside[-1]):
            return True
        own = node.attr in self.definitions.plain and node.attr not in self.known
        return (own and not of_self) or node.attr in PUBLIC

    def visit_ImportFrom(self, node):
        if node.module.partition(".")[0] != "fastbert":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            self.found += [(node.lineno, name) for name in names if PRIVATE.fullmatch(name)]

    def visit_Import(self, node):
        names = [part for alias in node.names for part in alias.name.split(".")]
        self.found += [(node.lineno, name) for name in names if PRIVATE.fullmatch(name)]

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            for part in node.value.split("."):
                if PRIVATE.fullmatch(part) and not part.startswith("_fastbert") and part not in PUBLIC:
                    self.found.append((node.lineno, repr(node.value)))

    def visit_JoinedStr(self, node):
        # Only f"_{...}" can form a private name.
        if isinstance(first := node.values[0], ast.Constant) and first.value == "_":
            self.found.append((node.lineno, ast.unparse(node)))
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                self.visit(value)


def definitions_in(trees: list[ast.Module]) -> Definitions:
    definitions = Definitions()
    for tree in trees:
        definitions.visit(tree)
    return definitions


def names_in_compat() -> set[str]:
    """Return the last parts of the private names in `_compat`."""
    uses = Uses(Definitions(), set())
    uses.visit(ast.parse((PACKAGE / "_compat.py").read_text()))
    return {re.split(r"\W+", shown.strip("'"))[-1] for _, shown in uses.found} - {"_C", ""}


def test_every_name_in_compat_has_its_test():
    last_parts = {name.rpartition(".")[2] for name in COVERED}
    assert names_in_compat() - last_parts == set()
    text = (PACKAGE / "_compat.py").read_text()
    assert [name for name in last_parts if name not in text] == []


def foreign_names(sources: dict[str, str]) -> list[str]:
    """Return "path:line: name" for every private name of another library in `sources`, a dict from path to code."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    definitions, known, found = definitions_in([*trees.values()]), names_in_compat(), []
    for path, tree in trees.items():
        uses = Uses(definitions, known)
        uses.visit(tree)
        found += [f"{path}:{line}: {name}" for line, name in uses.found]
    return found


def sources() -> dict[str, str]:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "_compat.py"]
    return {str(path.relative_to(PACKAGE)): path.read_text() for path in paths}


def test_no_private_name_outside_compat():
    assert foreign_names(sources()) == []


IN_A_MODULE = """
from torch import nn
class Block(nn.Module):
    def forward(self):
        return self.{name}
"""
PLANTED = {
    "attribute": "hooks = module._forward_hooks",
    "attribute of self": IN_A_MODULE.format(name="_modules"),
    "new attribute of self": IN_A_MODULE.format(name="_non_persistent_buffers_set"),
    "name that a class of ours has, too": "buffers = graph._buffers",
    "below torch._C": "keys = torch._C.DispatchKey",
    "imported name": "from torch.nn.modules.module import _global_forward_hooks",
    "imported from": "from torch._dynamo import is_compiling",
    "imported module": "import torch._dynamo.config",
    "string": "there = '_hf_hook' in vars(module)",
    "dotted string": "name = 'torch._dynamo.config'",
    "formatted string": "value = vars(config)[f'_{name}']",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_name_is_found(kind):
    (found,) = foreign_names(sources() | {"planted.py": PLANTED[kind]})
    assert found.startswith("planted.py:")
