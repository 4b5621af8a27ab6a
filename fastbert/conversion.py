"""`optimize` and `restore`: fastbert inside what people already have.

A live model of transformers is converted in place: its modules get the classes of `fastbert.model`, which derive from
theirs, and stay the objects they were. So nothing is copied, and optimizers, adapters, wrappers and
pipelines that hold a module or a parameter go on holding it.
"""

import re
from dataclasses import dataclass, field

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

# The modules of an encoder by the pattern of their names; the pooler may be anything.
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
# transformers' class of a head -> ours of the same name. The encoder's are `model.OURS`.
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
# What transformers' modules call beside forward.
METHODS = ("feed_forward_chunk", MAKES_MASKS)


@dataclass
class Original:
    """What a converted module was.

    module_class is None where it has kept its class; tensors, on the host, are its own parameters and buffers before a
    cast to dtype.
    """

    module_class: type | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None


def optimize(obj, dtype: torch.dtype | None = None):
    """Let the BERT in `obj` run in fastbert; in place, returns obj. `restore` takes it back.

    obj: a transformers model around BERT's encoder (any `BertFor*`, your own class, DPR), bare or inside of a PEFT
    model, a `SentenceTransformer`, a `CrossEncoder`, a `pipeline` or another module. Every parameter stays where it
    is, to be trained, saved and adapted as before; saving writes the ordinary folder. Objects of fastbert's own
    classes, and those optimized before, stay as they are.

    sentence-transformers' encode, predict and rank tokenize ahead and pack the tokens (`fastbert.inference`), where
    `explain` says nothing against it. Pooling by the mean or the first token, and normalizing, run in the `pool` op
    where no gradients are recorded.

    dtype: torch.float32, float16 or bfloat16 casts all of obj. The weights from before stay on the host, for `restore`,
    also in copies and pickles.

    Raises TypeError for an object without BERT, which names what was found; ValueError for a BERT that fastbert does
    not serve, such as a decoder, one whose modules are of other classes or patched, for another dtype, and for a cast
    of offloaded weights. Either leaves obj as it was.
    """
    root = module_of(obj)
    encoders = [module for module in root.modules() if isinstance(module, hf.BertModel)]
    if not encoders:
        raise TypeError(_why_no_bert(obj, root))
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not served: choose torch.float32, torch.float16 or torch.bfloat16")
    if dtype is not None and any(x.is_meta for x in (*root.parameters(), *root.buffers())):
        raise ValueError(f"weights that are offloaded cannot be cast: load the model with dtype={dtype}")
    encoders = [encoder for encoder in encoders if not isinstance(encoder, model.BertModel)]
    outer = [module for module in root.modules() if type(module) in HEADS and not _goes_on(module)]
    for encoder in encoders:
        _check_encoder(encoder)
    for module in outer:
        replaced = patches.replaced_forward(type(module))
        if replaced and plain_forward(HEADS[type(module)]) is not type(module).forward:
            raise ValueError(f"{replaced}, which fastbert would not run: take that back first")
        _check_forward(module, HEADS[type(module)], class_name(module))
    _remove_capturing_hooks(root)
    if dtype is not None:
        _cast(root, dtype)
    for module in [module for encoder in encoders for module in encoder.modules() if type(module) in model.OURS]:
        _become(module, model.OURS[type(module)])
    for module in outer:
        _become(module, HEADS[type(module)])
    for module in [module for module in root.modules() if isinstance(module, heads.Head)]:
        for part in [part for part in module.modules() if type(part) in heads.PARTS and not _is_patched(part)]:
            _become(part, heads.PARTS[type(part)])
    sentences.patch(root)
    return obj


def restore(obj):
    """Take back what `optimize` did to `obj`: classes, attributes, weights before a cast; in place, returns obj.

    What was trained after a cast keeps what it learned, element by element, in the dtype from before. CUDA graphs
    are dropped, those of `fastbert.graphed`, too. What was never optimized stays as it is.

    Raises ValueError, before anything is changed, for a module whose forward was patched since.
    """
    root = module_of(obj)
    for name, module in root.named_modules():
        original = vars(module).get(ORIGINAL)
        if original is not None and original.module_class is not None:
            _check_forward(module, original.module_class, name or class_name(module))
    sentences.unpatch(root)
    for module in root.modules():
        original: Original | None = module.__dict__.pop(ORIGINAL, None)
        if original is None:
            continue
        for name, tensor in original.tensors.items():
            _put_back(module, name, tensor, original.dtype)
        if original.module_class is not None:
            if isinstance(module.__dict__.get("forward"), GraphedForward):
                del module.forward
            free_graphs(module)
            _set_class(module, original.module_class)
    return obj


def _why_no_bert(obj, root: nn.Module) -> str:
    """The message for an object without BERT: what was found instead."""
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            kind = module.config.model_type
            if kind in PLANNED:
                return f"{PLANNED[kind]} is planned and not served yet (found a {class_name(module)}), only BERT is"
            return f"found a {class_name(module)} of model_type {kind!r}: fastbert serves BERT ({hf.__name__})"
    return f"found no transformers model in a {class_name(obj)}: fastbert serves BERT ({hf.__name__})"


def _check_encoder(encoder: hf.BertModel) -> None:
    """Raise ValueError unless every module that a conversion changes is what transformers made it."""
    if type(encoder) is not hf.BertModel:
        raise ValueError(
            f"{class_name(encoder)} derives from transformers' BertModel and may compute something else: put a plain "
            "BertModel into it or in its place"
        )
    check_config(encoder.config)
    attention_implementation(encoder.config)
    replaced = patches.replaced() or patches.replaced_in_models() or patches.replaced_for_masks(encoder)
    if replaced:
        raise ValueError(f"{replaced}, which fastbert would not run: take that back first")
    for name, module in encoder.named_modules():
        expected = next((kind for pattern, kind in STRUCTURE.items() if re.fullmatch(pattern, name)), None)
        # Converted already is what another model shares with this one.
        if expected is not None and type(module) not in (expected, model.OURS.get(expected)):
            raise ValueError(f"{name} is a {class_name(module)}, not transformers' {expected.__name__}")
        converted = model.OURS.get(type(module))
        if converted is not None:
            _check_forward(module, converted, name or class_name(module))
        patched = [key for key in METHODS if key in vars(module)]
        if expected is not None and patched:
            raise ValueError(f"{name or class_name(module)} has a patched {patched[0]}, which fastbert would not run")


def _goes_on(head: nn.Module) -> bool:
    """Whether a head keeps transformers' class, of which ours computes the same: somebody patched its forward."""
    patched = _is_patched(head) or patches.replaced_forward(type(head))
    return type(head) in heads.ALIKE and bool(patched)


def _is_patched(module: nn.Module) -> bool:
    """Whether somebody's forward goes on calling that of the module's class, and would after a change of class."""
    # accelerate's wrapper calls the forward that it wraps, which `_set_class` renews.
    forward = vars(module).get(WRAPPED_FORWARD, vars(module).get("forward"))
    return forward is not None and not is_own_forward(module, forward) and not isinstance(forward, GraphedForward)


def _check_forward(module: nn.Module, module_class: type, name: str) -> None:
    """Raise ValueError for a patched forward that would go on calling another than that of the class to come."""
    if _is_patched(module) and plain_forward(type(module)) is not plain_forward(module_class):
        raise ValueError(
            f"{name} has a patched forward, which would go on calling {type(module).__name__}'s from before: take the "
            "patch away, and put it back afterwards"
        )


def _become(module: nn.Module, module_class: type) -> None:
    """Make a module one of another class, and remember what it was."""
    original = vars(module).setdefault(ORIGINAL, Original())
    original.module_class = type(module)
    _set_class(module, module_class)


def _set_class(module: nn.Module, module_class: type) -> None:
    for name in ("forward", WRAPPED_FORWARD):
        if is_own_forward(module, vars(module).get(name)):
            vars(module)[name] = module_class.forward.__get__(module)
    module.__class__ = module_class


def _remove_capturing_hooks(root: nn.Module) -> None:
    """Remove the hooks that transformers leaves in a model once hidden states or attentions were asked for, and would
    install again: fastbert collects these itself, and a layer with hooks is not fused."""
    for module in root.modules():
        remove_capturing_hooks(module)


def _cast(root: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module's floating-point parameters and buffers, and remember those that change."""
    for module in root.modules():
        original: Original | None = module.__dict__.get(ORIGINAL)
        for name in list(original.tensors) if original else ():
            _put_back(module, name, original.tensors.pop(name), original.dtype)
    changing = [
        (module, name, tensor)
        for module in root.modules()
        for name, tensor in (*own_parameters(module).items(), *own_buffers(module).items())
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype
    ]
    # A tied tensor is there under several names, and once on the host.
    before = {id(tensor): tensor.data for _, _, tensor in changing}
    root.to(dtype)
    on_host = {key: data.cpu() for key, data in before.items()}
    for module, name, tensor in changing:
        original = vars(module).setdefault(ORIGINAL, Original())
        original.tensors[name], original.dtype = on_host[id(tensor)], dtype


def _put_back(module: nn.Module, name: str, original: Tensor, cast: torch.dtype) -> None:
    """The tensor from before a cast to a dtype: each element with its own bits, or if it was trained since, with what
    it has learned."""
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
