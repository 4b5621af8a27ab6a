"""What captured graphs depend on of a model, and what keeps a model from being captured."""

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
from fastbert.model import BertEmbeddings, BertPooler, bypassed_forwards, why_not_bypassed

# What a head may be made of: these look at a token by itself, and so not at a bucket's padding.
TOKENWISE = (
    nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleList,
    nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid,
)  # fmt: skip

# What a fused layer has computed by, beside parameters, in the dictionaries of its modules.
ATTENTION_NUMBERS = itemgetter("attention_head_size", "scaling", "is_causal")
_eps, _act, _training = map(itemgetter, ("eps", "act", "training"))
_nbytes = attrgetter("nbytes")
AGAIN_SECONDS = 60.0  # until what raised an error is looked at again
CONFIGURED = ("output_hidden_states", "output_attentions", "is_decoder")


class State:
    """Snapshot of everything that captured graphs depend on. Tells why the model cannot be captured (refusal, or None),
    and whether it has changed since.

    It keeps the tensors of the parameters: a graph that runs once more after they were replaced reads no foreign
    memory, and no new one gets the address of an old one.

    Every call asks, of hundreds of modules and tensors: what is looked at are their dictionaries, which do not change
    their place, by functions that are written in C.
    """

    def __init__(self, model: nn.Module, device_type: str):
        modules = list(model.modules())
        others, base = modules[1:], model.base_model
        self.refusal = _refusal(model, others, device_type)
        self.device, self._base = model.device, weakref.ref(base)
        self._embeddings = getattr(base, "embeddings", nn.Module())
        self.num_positions = num_positions(model.config, self._embeddings, None)
        tensors = [own for x in modules for own in (own_parameters(x), own_buffers(x)) if own]
        self._dicts = [own for x in modules if (own := own_modules(x))] + tensors
        # Others than plain ones are refused, and may have no address.
        self._tensors = [x for own in tensors for x in own.values() if type(x) in (nn.Parameter, Tensor)]
        self._kept = [x.detach() for x in self._tensors]
        self._matrices = [x for x in self._tensors if x.ndim > 1]
        self._buffers = [x for x in own_buffers(self._embeddings).values() if x is not None and not x.is_inference()]
        self._attributes = [x.__dict__ for x in others]
        # The model's own hooks fire around its forward, as always.
        self._hooks = [hooks for x in others for hooks in hooks_of(x)]
        # A patch of its forward makes ours refuse, or compute something else where ours calls it.
        self._theirs, self._kind = _theirs(model), type(model)
        layers = [] if self.refusal else base.encoder.layer
        self._attentions = [x.attention.self.__dict__ for x in layers]
        self._norms = [norm.__dict__ for x in layers for norm in (x.attention.output.LayerNorm, x.output.LayerNorm)]
        activations = [x.intermediate.intermediate_act_fn.__dict__ for x in layers]
        self._activations = [own for own in activations if "act" in own]
        # A configuration's own reading of attributes takes ten times as long.
        self._config = config = vars(model.config)
        self._configured = [config_key(config, name) for name in CONFIGURED]
        tables = {name: x for name, x in own_modules(self._embeddings).items() if type(x) is nn.Embedding}
        self._tables_of = [name for name, x in tables.items() if own_parameters(x).get("weight") is not None]
        self._seen_dicts = [dict(own) for own in self._dicts]
        self._seen_tables, self._seen = self._tables(), self._look()

    def _look(self) -> tuple:
        return (
            list(map(Tensor.data_ptr, self._tensors)),
            # Another view of the same memory may have come into the place of one.
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
            (self._theirs.forward, self._kind.forward, *bypassed_forwards()),
            torch.backends.cuda.matmul.fp32_precision,
        )

    def _tables(self) -> list[tuple[int, torch.Size]]:
        own = own_modules(self._embeddings)
        tables = [own_parameters(own[name])["weight"] for name in self._tables_of]
        return [(table.data_ptr(), table.shape) for table in tables]

    def has_its_tables(self) -> bool:
        """Whether the embedding tables are the same: where not, a graph would report ids that the new ones have, or
        read past their end."""
        try:
            return self._tables() == self._seen_tables
        except (AttributeError, KeyError):  # something else is in their place
            return False

    def is_current(self) -> bool:
        """Whether nothing has changed. It costs as much as the launch of a graph, and so is asked while one runs."""
        try:
            # The same objects are found without a call of theirs. Another tensor of one number counts as the same, as
            # long as it has the number by which a graph computes.
            return self._dicts == self._seen_dicts and self._look() == self._seen
        except Exception:  # the == of another tensor has no truth value, and a number may be gone
            return False


class Unseen:
    """In the place of the state of a model that cannot be looked at, as something in it raises an error."""

    def __init__(self, error: Exception):
        self.refusal = f"what is in the model cannot be looked at: {type(error).__name__}: {error}"
        self._since = time.monotonic()

    def is_current(self) -> bool:
        return time.monotonic() - self._since < AGAIN_SECONDS


def _refusal(model: nn.Module, others: list[nn.Module], device_type: str) -> str | None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return "its parameters lie on several devices"
    (device,) = devices
    foreign = [type(x).__name__ for x in model.parameters() if type(x) is not nn.Parameter]
    if foreign:
        return f"a {foreign[0]} is in the place of a plain Parameter"
    if device.type != device_type:
        return f"the model is on {device.type!r} and CUDA graphs need a CUDA device"
    if model.config.output_hidden_states or model.config.output_attentions:
        return "the configuration asks for hidden states or attention weights"
    if model.config.is_decoder or patches.replaced_for_masks(model.base_model):
        return "transformers makes its masks"
    if reason := patches.replaced_forward(_theirs(model)) or why_not_bypassed():
        return reason
    if foreign := _foreign(model):
        return f"a {foreign.__module__}.{foreign.__qualname__} may look at a bucket's padding"
    if any(x is not None for x in changed_defaults(model.base_model.embeddings)):
        return "default positions or token types are other than transformers'"
    for module in others:
        if has_hooks(module) or "forward" in module.__dict__:
            return f"a {type(module).__name__} has hooks or a patched forward"
        if module.training:
            return f"a {type(module).__name__} is in training mode"
        if type(module).__module__.startswith("peft."):
            return f"an adapter may leave the weights unseen, merged as it is: unload the {type(module).__name__}"
        if isinstance(module, FusableBlock):
            _, reason = fused_parts(module)
            if reason is None:
                weight = next(module.parameters())
                reason = next(filter(None, (why_eager(module, op, weight) for op in module.ops_used)), None)
            if reason:
                return f"a {type(module).__name__} runs in eager PyTorch: {reason}"
    return None


def _theirs(model: nn.Module) -> type[nn.Module]:
    """The class of transformers' that a model is of, or derives from."""
    return next(kind for kind in type(model).__mro__ if kind.__module__ == hf.__name__)


def _foreign(model: nn.Module) -> type | None:
    """The first class, of the model or of a module in it, that might look at padding; None if none might."""
    base = model.base_model
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
