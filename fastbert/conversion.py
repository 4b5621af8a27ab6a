"""`optimize` and `restore`: convert the BERT in an existing object to fastbert, and back.

Conversion is in place: modules of transformers get the classes of `fastbert.model`, which derive from transformers'
classes. Nothing is copied. Optimizers, adapters, wrappers and pipelines keep their references to the same modules and
parameters.
"""

import re
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bert import modeling_bert as hf

from fastbert import heads, model, patches, sentences
from fastbert._compat import MAKES_MASKS, WRAPPED_FORWARD, own_buffers, own_parameters, remove_capturing_hooks
from fastbert.configuration import attention_implementation, check_config
from fastbert.explanation import module_of
from fastbert.fusion import ORIGINAL, class_name, is_own_forward
from fastbert.graphs import GraphedForward, free_graphs
from fastbert.replaying import plain_forward

# Name pattern of an encoder's module -> its class. The pooler may be of any class.
STRUCTURE = {
    r"": hf.BertModel,
    r"embeddings": hf.BertEmbeddings,
    r"encoder": hf.BertEncoder,
    r"encoder\.layer\.\d+": hf.BertLayer,
    r"encoder\.layer\.\d+\.attention": hf.BertAttention,
    r"encoder\.layer\.\d+\.attention\.self": hf.BertSelfAttention,
    r"encoder\.layer\.\d+\.attention\.output": hf.BertSelfOutput,
    r"encoder\.layer\.\d+\.intermediate": hf.BertIntermediate,
    r"encoder\.layer\.\d+\.output": hf.BertOutput,
}
# Head class of transformers -> ours of the same name. For the encoder's modules see `model.OURS`.
HEADS = {
    getattr(hf, name): getattr(heads, name)
    for name in (
        "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction", "BertForSequenceClassification",
        "BertForTokenClassification", "BertForMultipleChoice", "BertForQuestionAnswering",
    )
}  # fmt: skip
PLANNED = {
    "xlm-roberta": "XLM-RoBERTa",
    "xlm-roberta-xl": "XLM-RoBERTa-XL",
    "roberta": "RoBERTa",
    "distilbert": "DistilBERT",
    "modernbert": "ModernBERT",
    "mpnet": "MPNet",
}
# Methods that transformers' modules call on themselves, beside forward.
METHODS = ("feed_forward_chunk", MAKES_MASKS)
Object = TypeVar("Object")


@dataclass
class Original:
    """State of a module before its conversion.

    module_class: its class, None if it was not changed. tensors: its own parameters and buffers before a cast to dtype,
    on the host.
    """

    module_class: type[nn.Module] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None


def optimize(obj: Object, dtype: torch.dtype | None = None) -> Object:
    """Convert the BERT in `obj` to fastbert, in place, and return obj. `restore` undoes it.

    obj: a transformers model with BERT's encoder (any `BertFor*`, your own class, DPR), also inside a PEFT model, a
    `SentenceTransformer`, a `CrossEncoder`, a `pipeline` or another module. Parameters stay the same objects, to be
    trained, saved and adapted as before. Saved folders are ordinary ones. Modules of fastbert's own classes, and
    modules that are converted already, do not change.

    sentence-transformers' encode, predict and rank run on packed tokens and tokenize ahead where `fastbert.inference`
    supports that; `explain` tells whether it does, and why not. Mean and first-token pooling and normalizing run in the
    op `pool` if no gradients are recorded.

    dtype: torch.float32, float16 or bfloat16 casts all of obj. The previous weights stay on the host for `restore`,
    also in copies and pickles.

    Raises TypeError, which names what was found, for an object without BERT. Raises ValueError for an unsupported BERT,
    such as a decoder or one with modules that are patched or of other classes, for another dtype, and for a cast of
    offloaded weights. After an error obj is unchanged.
    """
    root = module_of(obj)
    encoders = [module for module in root.modules() if isinstance(module, hf.BertModel)]
    if not encoders:
        raise TypeError(_no_bert_message(obj, root))
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not supported: choose torch.float32, torch.float16 or torch.bfloat16")
    if dtype is not None and any(x.is_meta for x in (*root.parameters(), *root.buffers())):
        raise ValueError(f"offloaded weights cannot be cast: load the model with dtype={dtype}")
    encoders = [encoder for encoder in encoders if not isinstance(encoder, model.BertModel)]
    outer = [module for module in root.modules() if type(module) in HEADS and not _keeps_class(module)]
    for encoder in encoders:
        _check_encoder(encoder)
    for module in outer:
        replaced = patches.replaced_forward(type(module))
        if replaced and plain_forward(HEADS[type(module)]) is not type(module).forward:
            raise ValueError(f"{replaced}, which fastbert would not run: undo that first")
        _check_forward(module, HEADS[type(module)], class_name(module))
    _remove_capturing_hooks(root)
    if dtype is not None:
        _cast(root, dtype)
    for module in [module for encoder in encoders for module in encoder.modules() if type(module) in model.OURS]:
        _convert(module, model.OURS[type(module)])
    for module in outer:
        _convert(module, HEADS[type(module)])
    for module in [module for module in root.modules() if isinstance(module, heads.Head)]:
        for part in [part for part in module.modules() if type(part) in heads.PARTS and not _is_patched(part)]:
            _convert(part, heads.PARTS[type(part)])
    sentences.patch(root)
    return obj


def restore(obj: Object) -> Object:
    """Undo `optimize`: restore classes, attributes and the weights from before a cast, in place, and return obj.

    Elements that were trained after a cast keep their trained values, in the old dtype. CUDA graphs are dropped, also
    those of `fastbert.graphed`. Modules that were not converted do not change.

    Raises ValueError for a module whose forward was patched after the conversion. Then nothing has changed.
    """
    root = module_of(obj)
    for name, module in root.named_modules():
        kept = vars(module).get(ORIGINAL)
        if kept is not None and kept.module_class is not None:
            _check_forward(module, kept.module_class, name or class_name(module))
    sentences.unpatch(root)
    for module in root.modules():
        original: Original | None = module.__dict__.pop(ORIGINAL, None)
        if original is None:
            continue
        if original.dtype is not None:
            for name, tensor in original.tensors.items():
                _restore_tensor(module, name, tensor, original.dtype)
        if original.module_class is not None:
            if isinstance(module.__dict__.get("forward"), GraphedForward):
                del module.forward
            free_graphs(module)
            _set_class(module, original.module_class)
    return obj


def _no_bert_message(obj: object, root: nn.Module) -> str:
    """The error message for an object without BERT; it names what was found instead."""
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            kind = module.config.model_type
            if kind in PLANNED:
                return f"{PLANNED[kind]} is planned but not supported yet (found a {class_name(module)}): only BERT is"
            return f"found a {class_name(module)} of model_type {kind!r}: fastbert supports BERT ({hf.__name__})"
    return f"found no transformers model in a {class_name(obj)}: fastbert supports BERT ({hf.__name__})"


def _check_encoder(encoder: hf.BertModel) -> None:
    """Raise ValueError unless all modules to convert are transformers' own and unpatched."""
    if type(encoder) is not hf.BertModel:
        raise ValueError(
            f"{class_name(encoder)} derives from transformers' BertModel and may compute something else: put a plain "
            "BertModel into it or in its place"
        )
    check_config(encoder.config)
    attention_implementation(encoder.config)
    replaced = patches.replaced() or patches.replaced_in_models() or patches.replaced_for_masks(encoder)
    if replaced:
        raise ValueError(f"{replaced}, which fastbert would not run: undo that first")
    for name, module in encoder.named_modules():
        expected = next((kind for pattern, kind in STRUCTURE.items() if re.fullmatch(pattern, name)), None)
        # A module shared with another model may be converted already.
        if expected is not None and type(module) not in (expected, model.OURS.get(expected)):
            raise ValueError(f"{name} is a {class_name(module)}, not transformers' {expected.__name__}")
        converted = model.OURS.get(type(module))
        if converted is not None:
            _check_forward(module, converted, name or class_name(module))
        patched = [key for key in METHODS if key in vars(module)]
        if expected is not None and patched:
            raise ValueError(f"{name or class_name(module)} has a patched {patched[0]}, which fastbert would not run")


def _keeps_class(head: nn.Module) -> bool:
    """Whether a head keeps its transformers class, because its forward is patched and our class computes the same."""
    patched = _is_patched(head) or patches.replaced_forward(type(head))
    return type(head) in heads.ALIKE and bool(patched)


def _is_patched(module: nn.Module) -> bool:
    """Whether a patched forward, which may call the forward of the module's class, would stay after a conversion."""
    # accelerate's wrapper is no obstacle: `_set_class` replaces the forward that it calls.
    forward = vars(module).get(WRAPPED_FORWARD, vars(module).get("forward"))
    return forward is not None and not is_own_forward(module, forward) and not isinstance(forward, GraphedForward)


def _check_forward(module: nn.Module, module_class: type[nn.Module], name: str) -> None:
    """Raise ValueError for a patched forward that would still call the old class's forward after a conversion."""
    if _is_patched(module) and plain_forward(type(module)) is not plain_forward(module_class):
        raise ValueError(
            f"{name} has a patched forward, which would still call the forward of {type(module).__name__}: remove the "
            "patch, and apply it again afterwards"
        )


def _convert(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Change a module's class and remember the old one."""
    original = vars(module).setdefault(ORIGINAL, Original())
    original.module_class = type(module)
    _set_class(module, module_class)


def _set_class(module: nn.Module, module_class: type[nn.Module]) -> None:
    """Change a module's class, and bind forwards that accelerate stored in the module to the new class."""
    for name in ("forward", WRAPPED_FORWARD):
        if is_own_forward(module, vars(module).get(name)):
            vars(module)[name] = module_class.forward.__get__(module)
    module.__class__ = module_class


def _remove_capturing_hooks(root: nn.Module) -> None:
    """Remove the hooks that transformers installed to collect hidden states and attentions. fastbert collects them
    itself and does not fuse a layer with hooks; transformers installs them again when needed."""
    for module in root.modules():
        remove_capturing_hooks(module)


def _cast(root: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module's floating-point parameters and buffers, and keep the previous values of those that change."""
    for module in root.modules():
        original: Original | None = module.__dict__.get(ORIGINAL)
        if original is not None and original.dtype is not None:
            for name in list(original.tensors):
                _restore_tensor(module, name, original.tensors.pop(name), original.dtype)
    changing = [
        (module, name, tensor)
        for module in root.modules()
        for name, tensor in (*own_parameters(module).items(), *own_buffers(module).items())
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype
    ]
    # A tied tensor has several names, but one copy on the host.
    before = {id(tensor): tensor.data for _, _, tensor in changing}
    root.to(dtype)
    on_host = {key: data.cpu() for key, data in before.items()}
    for module, name, tensor in changing:
        changed: Original = vars(module).setdefault(ORIGINAL, Original())
        changed.tensors[name], changed.dtype = on_host[id(tensor)], dtype


def _restore_tensor(module: nn.Module, name: str, original: Tensor, cast: torch.dtype) -> None:
    """Restore a tensor from before a cast to dtype `cast`. Elements that were trained since then keep their values."""
    tensor = own_parameters(module).get(name, own_buffers(module).get(name))
    if tensor is None:
        return
    learned = tensor.data.to(original.dtype)
    if tensor.shape == original.shape:
        unchanged = tensor.data.cpu() == original.to(cast).to(tensor.dtype)
        learned = original if unchanged.all() else torch.where(unchanged, original, learned.cpu())
    tensor.data = learned.to(tensor.device)
    if tensor.grad is not None:
        tensor.grad.data = tensor.grad.data.to(original.dtype)
