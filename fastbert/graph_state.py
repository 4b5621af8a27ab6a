"""A snapshot of what a captured graph depends on, and the models that cannot be captured."""

import time
import weakref
from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf

from fastbert import patches
from fastbert._compat import (
    config_key,
    has_global_module_hooks,
    hooks_of,
    own_buffers,
    own_modules,
    own_parameters,
    versions_of,
)
from fastbert.fusion import FusableBlock, fused_parts, has_hooks, why_eager
from fastbert.inputs import changed_defaults, num_positions
from fastbert.layers import BertEncoder, BertLayer
from fastbert.model import BertEmbeddings, BertModel, BertPooler, bypassed_forwards, why_not_bypassed
from fastbert.pretrained import BertPreTrainedModel

# Modules allowed in a head: they compute each token alone, so a bucket's padding does not matter to them.
TOKENWISE = (
    nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleList,
    nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid,
)  # fmt: skip

# Numbers that a fused layer reads from the `__dict__` of its modules.
ATTENTION_NUMBERS = itemgetter("attention_head_size", "scaling", "is_causal")
_eps, _act, _training = map(itemgetter, ("eps", "act", "training"))
_nbytes = attrgetter("nbytes")
RETRY_SECONDS = 60.0  # after an error, until the model is inspected again
CONFIGURED = ("output_hidden_states", "output_attentions", "is_decoder")


class State:
    """Snapshot of everything a captured graph depends on. Tells whether the model can be captured, and whether it has
    changed since.

    unsupported_reason: why the model cannot be captured, or None. device: of the parameters. num_positions: rows of the
    position embeddings.

    It keeps the parameters' tensors alive: a graph that replays once after they were replaced reads valid memory, and
    no new tensor gets an old address. `is_current` runs in each call, over hundreds of modules and tensors. So it reads
    their `__dict__`s, which stay the same objects, by functions written in C.
    """

    unsupported_reason: str | None

    def __init__(self, model: BertPreTrainedModel, device_type: str):
        modules = list(model.modules())
        others, config = modules[1:], model.config
        base: BertModel = model.base_model  # type: ignore[assignment]  # our models are around a BertModel
        self.unsupported_reason = _why_unsupported(model, others, device_type)
        self.device, self._base = model.device, weakref.ref(base)
        self._embeddings = getattr(base, "embeddings", nn.Module())
        self.num_positions = num_positions(config, self._embeddings, None)
        tensors = [own for x in modules for own in (own_parameters(x), own_buffers(x)) if own]
        self._dicts = [own for x in modules if (own := own_modules(x))] + tensors
        # Only plain tensors: others may have no address, and make the model unsupported.
        self._tensors: list[Tensor] = [
            x for own in tensors for x in own.values() if x is not None and type(x) in (nn.Parameter, Tensor)
        ]
        self._kept = [x.detach() for x in self._tensors]
        self._matrices = [x for x in self._tensors if x.ndim > 1]
        self._buffers = [x for x in own_buffers(self._embeddings).values() if x is not None and not x.is_inference()]
        self._attributes = [x.__dict__ for x in others]
        # Not the model's own hooks, which fire outside of the graph.
        self._hooks = [hooks for x in others for hooks in hooks_of(x)]
        # Our forwards may call transformers' forward, which may be patched.
        self._transformers_class, self._class = _transformers_class(model), type(model)
        layers = [] if self.unsupported_reason else base.encoder.layer
        self._attentions = [x.attention.self.__dict__ for x in layers]
        self._norms = [norm.__dict__ for x in layers for norm in (x.attention.output.LayerNorm, x.output.LayerNorm)]
        activations = [x.intermediate.intermediate_act_fn.__dict__ for x in layers]
        self._activations = [own for own in activations if "act" in own]
        # Ten times as fast as reading the attributes of a configuration.
        self._config = vars(config)
        self._configured = [config_key(self._config, name) for name in CONFIGURED]
        tables = {name: x for name, x in own_modules(self._embeddings).items() if type(x) is nn.Embedding}
        self._table_names = [name for name, x in tables.items() if own_parameters(x).get("weight") is not None]
        self._seen_dicts = [dict(own) for own in self._dicts]
        self._seen_tables, self._seen = self._tables(), self._snapshot()

    def _snapshot(self) -> tuple:
        return (
            list(map(Tensor.data_ptr, self._tensors)),
            # A tensor may have been replaced by another view of the same memory.
            list(map(_nbytes, self._tensors)),
            list(map(Tensor.is_contiguous, self._matrices)),
            any(map(_training, self._attributes)),
            list(map(len, self._attributes)),
            any(self._hooks) or has_global_module_hooks(),
            versions_of(self._buffers),
            list(map(ATTENTION_NUMBERS, self._attentions)),
            list(map(_eps, self._norms)),
            list(map(_act, self._activations)),
            list(map(self._config.get, self._configured)),
            patches.replaced() or patches.replaced_for_masks(self._base()),
            (self._transformers_class.forward, self._class.forward, *bypassed_forwards()),
            torch.backends.cuda.matmul.fp32_precision,
        )

    def _tables(self) -> list[tuple[int, torch.Size]]:
        own = own_modules(self._embeddings)
        tables = [own_parameters(own[name])["weight"] for name in self._table_names]
        return [(table.data_ptr(), table.shape) for table in tables if table is not None]

    def has_same_tables(self) -> bool:
        """Whether the embedding tables have the same addresses and shapes."""
        try:
            return self._tables() == self._seen_tables
        except (AttributeError, KeyError):  # a table was replaced by something else
            return False

    def is_current(self) -> bool:
        """Whether nothing has changed. Takes as long as a graph launch, so it is called while a graph runs."""
        try:
            # Lists and dicts compare identities first. A replaced one-element tensor compares by its value, which is
            # correct as long as the value is the captured one.
            return self._dicts == self._seen_dicts and self._snapshot() == self._seen
        except Exception:  # the == of a replaced tensor has no truth value, and an attribute may be missing
            return False


class UnreadableState(State):
    """Stands for the snapshot of a model whose inspection raised an error. Has no attribute but unsupported_reason."""

    def __init__(self, error: Exception):
        self.unsupported_reason = f"the model cannot be inspected: {type(error).__name__}: {error}"
        self._since = time.monotonic()

    def is_current(self) -> bool:
        return time.monotonic() - self._since < RETRY_SECONDS


def _why_unsupported(model: BertPreTrainedModel, others: list[nn.Module], device_type: str) -> str | None:
    base: BertModel = model.base_model  # type: ignore[assignment]
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return "the model's parameters are on several devices"
    (device,) = devices
    foreign = [type(x).__name__ for x in model.parameters() if type(x) is not nn.Parameter]
    if foreign:
        return f"a parameter is a {foreign[0]}, not a plain Parameter"
    if device.type != device_type:
        return f"the model is on {device.type!r} and CUDA graphs need a CUDA device"
    if model.config.output_hidden_states or model.config.output_attentions:
        return "the configuration asks for hidden states or attention weights"
    if model.config.is_decoder or patches.replaced_for_masks(base):
        return "the model is a decoder, or the functions that make its masks are patched"
    if reason := patches.replaced_forward(_transformers_class(model)) or why_not_bypassed():
        return reason
    if kind := _class_seeing_padding(model):
        return f"a {kind.__module__}.{kind.__qualname__} may look at a bucket's padding"
    if any(x is not None for x in changed_defaults(base.embeddings)):
        return "the default positions or token types were changed"
    for module in others:
        if has_hooks(module) or "forward" in module.__dict__:
            return f"a {type(module).__name__} has hooks or a patched forward"
        if module.training:
            return f"a {type(module).__name__} is in training mode"
        if type(module).__module__.startswith("peft."):
            return f"a merged adapter can change the weights unnoticed: unload the {type(module).__name__}"
        if isinstance(module, FusableBlock):
            _, reason = fused_parts(module)
            if reason is None:
                weight = next(module.parameters())
                reason = next(filter(None, (why_eager(module, op, weight) for op in module.ops_used)), None)
            if reason:
                return f"a {type(module).__name__} runs in eager PyTorch: {reason}"
    return None


def _transformers_class(model: nn.Module) -> type[nn.Module]:
    """The transformers class that a model's class is or derives from."""
    return next(kind for kind in type(model).__mro__ if kind.__module__ == hf.__name__)


def _class_seeing_padding(model: BertPreTrainedModel) -> type | None:
    """The first class, of the model or one of its modules, that might look at padding; None if there is none."""
    base: BertModel = model.base_model  # type: ignore[assignment]
    if not type(model).__module__.startswith("fastbert."):
        return type(model)
    expected = {"embeddings": BertEmbeddings, "encoder": BertEncoder, "pooler": BertPooler}
    found = [type(x) for name, x in base.named_children() if type(x) is not expected.get(name)]
    found = found or [type(x) for x in base.encoder.layer if type(x) is not BertLayer]
    encoder = set(base.modules())
    for kind in (type(x) for x in model.modules() if x not in encoder):
        if kind not in TOKENWISE and kind.__module__.split(".")[0] not in ("fastbert", "transformers"):
            found.append(kind)
    return found[0] if found else None
