"""Changes that users make to a live BERT, for `fuzz`: mutations of one model, and patches of the whole process.

A mutation is called with the model, its `BertModel` and a random generator, and changes the model in place. It makes
the same random choices for models of the same architecture. A patch is called with the generator and returns a context
manager. The names in MUTATIONS are part of the seeds: a new name changes the random choices.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.bert import modeling_bert as hf
from transformers.utils import ModelOutput

PATCHED_CLASS = "is patched or replaced for every model"
NO_WEIGHTS = "output_attentions is not supported"


@dataclass(frozen=True)
class Mutation:
    """error: the pattern of fastbert's error if it may be unsupported; "" if it must be supported."""

    apply: Callable[..., AbstractContextManager | None]
    error: str = ""
    of_process: bool = False


def changed(output):
    """Return a module's output times 1.25: the tensor, or the first one of a tuple or of transformers' output."""
    if isinstance(output, Tensor):
        return output * 1.25 if output.is_floating_point() else output
    if isinstance(output, ModelOutput):
        first = next(iter(output))
        return type(output)(**{**output, first: changed(output[first])})
    return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else output


def _changing(function: Callable) -> Callable:
    return lambda *args, **kwargs: changed(function(*args, **kwargs))


class _Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return changed(self.inner(*args, **kwargs))


class _MeanPooler(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.tanh().mean(1)


ACTIVATIONS = nn.SiLU(), nn.GELU("tanh"), nn.ReLU(), ACT2FN["gelu_new"]
SCALINGS = 0.0, -0.3, 0.7, 2, torch.tensor(0.3), nn.Parameter(torch.tensor(0.6))
PLAIN = nn.Linear, nn.LayerNorm, nn.Embedding
CHANGED = {
    kind: type(f"Changed{kind.__name__}", (kind,), {"forward": _changing(kind.forward)})
    for kind in (*PLAIN, nn.Dropout)
}


# The places of mutations: functions from the model, its BertModel and a generator to a module.


def _some(*classes: type) -> Callable:
    return lambda model, bert, r: r.choice([module for module in model.modules() if isinstance(module, classes)])


def _model(model, bert, r):
    return model


def _bert(model, bert, r):
    return bert


def _table(model, bert, r):
    own = bert.embeddings
    return r.choice((own.word_embeddings, own.position_embeddings, own.token_type_embeddings))


def _layer(model, bert, r):
    return r.choice(bert.encoder.layer)


def _attention(model, bert, r):
    return _layer(model, bert, r).attention.self


def _intermediate(model, bert, r):
    return _layer(model, bert, r).intermediate


def _activation(model, bert, r):
    return _intermediate(model, bert, r).intermediate_act_fn


def _sets(place: Callable, name: str, *values) -> Callable:
    return lambda *where: setattr(place(*where), name, deepcopy(where[-1].choice(values)))


def _calls(place: Callable, name: str, *arguments) -> Callable:
    """Return a mutation that calls a method, with one of the arguments if there are any."""
    return lambda *where: getattr(place(*where), name)(*([where[-1].choice(arguments)] if arguments else []))


def _replace(model: nn.Module, module: nn.Module, by: nn.Module) -> None:
    holders = [(m, name) for m in model.modules() for name, child in m._modules.items() if child is module]
    for holder, name in holders:
        setattr(holder, name, by)


# Sizes and buffers


def pruned_heads(model, bert, r):
    layer = _layer(model, bert, r)
    attention, output = layer.attention.self, layer.attention.output
    heads, size = attention.num_attention_heads, attention.attention_head_size
    kept = sorted(r.sample(range(heads), r.randint(1, heads)))
    rows = torch.cat([torch.arange(head * size, (head + 1) * size) for head in kept])
    for linear in (attention.query, attention.key, attention.value):
        linear.weight, linear.bias = nn.Parameter(linear.weight[rows]), nn.Parameter(linear.bias[rows])
        linear.out_features = len(rows)
    output.dense.weight, output.dense.in_features = nn.Parameter(output.dense.weight[:, rows]), len(rows)
    attention.num_attention_heads, attention.all_head_size = len(kept), len(rows)


def head_size(model, bert, r):
    attention = _attention(model, bert, r)
    size = attention.attention_head_size
    attention.attention_head_size = r.choice([x for x in range(1, size + 1) if size % x == 0])


def longer_positions(model, bert, r):
    own, longer = bert.embeddings, 2 * bert.config.max_position_embeddings
    weight = torch.cat((own.position_embeddings.weight, own.position_embeddings.weight.flip(0))).detach()
    if r.random() < 0.5:
        own.position_embeddings.weight = nn.Parameter(weight)
    else:
        own.position_embeddings = nn.Embedding.from_pretrained(weight, freeze=False)
    if r.random() < 0.7:
        own.position_ids, own.token_type_ids = torch.arange(longer)[None], torch.zeros(1, longer, dtype=torch.long)
    bert.config.max_position_embeddings = r.choice((longer, longer // 2))


def shorter_positions(model, bert, r):
    table = bert.embeddings.position_embeddings
    table.weight = nn.Parameter(table.weight[: r.randint(len(table.weight) // 2, len(table.weight))].detach())


def position_buffer(model, bert, r):
    change = r.choice((lambda x: x.flip(1), lambda x: x % 3, lambda x: x[:, 1:], lambda x: (x * 0).repeat(1, 2)))
    bert.embeddings.position_ids = change(bert.embeddings.position_ids)


def token_type_buffer(model, bert, r):
    highest = bert.config.type_vocab_size - 1
    if r.random() < 0.2:
        del bert.embeddings.token_type_ids
    else:
        bert.embeddings.token_type_ids[:, r.randint(0, 1) :: 2] = highest


def layers(model, bert, r):
    old = list(bert.encoder.layer)
    new = r.choice((old[1:] or old, old[::-1], old + old, old[:1] * 3, [*old, deepcopy(old[0])]))
    bert.encoder.layer = nn.ModuleList(new)


# Parameters and other attributes


def config_flags(model, bert, r):
    for name in r.sample(("output_hidden_states", "output_attentions", "return_dict"), r.randint(1, 3)):
        setattr(bert.config, name, name != "return_dict")


def checkpointing(model, bert, r):
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": r.random() < 0.5})


def plain_tensor(model, bert, r):
    module = _some(*PLAIN)(bert, bert, r)
    weight = module.weight.detach() * 2
    del module.weight
    module.weight = weight


def decoder_config(model, bert, r):
    bert.config.is_decoder, bert.config.use_cache = True, False


def tied_between_layers(model, bert, r):
    first, last = bert.encoder.layer[0], bert.encoder.layer[-1]
    last.output.dense.weight = first.output.dense.weight
    last.attention.self.query.weight = first.attention.self.key.weight


def tied_within_a_layer(model, bert, r):
    attention = _attention(model, bert, r)
    attention.query, attention.key = attention.value, attention.value


def no_affine(model, bert, r):
    norm = _some(nn.LayerNorm)(model, bert, r)
    norm.weight, norm.bias, norm.elementwise_affine = None, None, False


# Replaced modules, hooks, and patches of an instance


def subclass(model, bert, r):
    module = _some(*CHANGED)(bert, bert, r)
    module.__class__ = next(by for kind, by in CHANGED.items() if isinstance(module, kind))


def sequential(model, bert, r):
    linear = _some(nn.Linear)(model, bert, r)
    _replace(model, linear, nn.Sequential(linear, nn.Tanh()))


def identity(model, bert, r):
    _replace(model, _some(nn.LayerNorm, nn.Dropout, nn.Tanh)(bert, bert, r), nn.Identity())


def weight_norm(model, bert, r):
    parametrizations.weight_norm(_some(*PLAIN)(bert, bert, r))


def wrapper(model, bert, r):
    module = r.choice([*_layer(model, bert, r).modules(), bert.embeddings, *bert.embeddings.children()])
    _replace(model, module, _Wrapper(module))


def forward_hook(model, bert, r):
    _some(nn.Module)(model, bert, r).register_forward_hook(
        lambda module, args, output: changed(output), prepend=r.random() < 0.5
    )


def pre_hook(model, bert, r):
    # Not on the first layer: transformers would return the hook's result as the embeddings' output.
    module = r.choice([module for module in model.modules() if module is not bert.encoder.layer[0]])
    module.register_forward_pre_hook(lambda module, args: changed(args) if args else None)


def backward_hook(model, bert, r):
    def double(module, grad_input, grad_output):
        return tuple(None if grad is None else grad * 2 for grad in grad_input)

    _some(nn.Module)(model, bert, r).register_full_backward_hook(double)


def gradient_hook(model, bert, r):
    r.choice(list(model.parameters())).register_hook(lambda grad: grad * 2)


def patched_forward(model, bert, r):
    module = _some(nn.Module)(model, bert, r)
    module.forward = _changing(module.forward)


def patched_chunk(model, bert, r):
    layer = _layer(model, bert, r)
    layer.feed_forward_chunk = lambda x: layer.output(layer.intermediate(x), x) * 1.25


def patched_masks(model, bert, r):
    make = bert._create_attention_masks

    def biased(embedding_output, **given):
        mask, other = make(embedding_output=embedding_output, **given)
        size = embedding_output.shape[1]
        bias = embedding_output.new_full((1, 1, size, size), -2.0).triu(1)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, torch.finfo(bias.dtype).min)
        return bias if mask is None else bias + mask, other

    bert._create_attention_masks = biased


# Patches of the process


def _forward_of(kind: type) -> AbstractContextManager:
    return mock.patch.object(kind, "forward", _changing(kind.forward))


def class_forward(r):
    parts = "Embeddings", "SelfAttention", "SelfOutput", "Attention", "Intermediate", "Output", "Layer", "Pooler"
    return _forward_of(getattr(hf, f"Bert{r.choice((*parts, 'Encoder', 'Model'))}"))


def torch_forward(r):
    return _forward_of(r.choice((*PLAIN, nn.Dropout)))


def class_chunk(r):
    chunk = hf.BertLayer.feed_forward_chunk
    return mock.patch.object(hf.BertLayer, "feed_forward_chunk", lambda self, x: changed(chunk(self, x)))


@contextmanager
def registered_attention(r):
    eager = _changing(hf.eager_attention_forward)
    with mock.patch.dict(AttentionInterface._global_mapping), mock.patch.object(hf, "eager_attention_forward", eager):
        AttentionInterface.register("sdpa", _changing(ALL_ATTENTION_FUNCTIONS["sdpa"]))
        yield


@contextmanager
def global_hook(r):
    kind, before = r.choice((*PLAIN, nn.Dropout)), r.random() < 0.5

    def hook(module, args, output=None):
        return changed(args if before else output) if isinstance(module, kind) else None

    register = f"register_module_forward_{'pre_' if before else ''}hook"
    handle = getattr(torch_module, register)(hook)
    try:
        yield
    finally:
        handle.remove()


MUTATIONS = {
    "pruned heads": Mutation(pruned_heads),
    "head size": Mutation(head_size),
    "longer positions": Mutation(longer_positions),
    "shorter positions": Mutation(shorter_positions, "longer than max_position_embeddings"),
    "position_ids": Mutation(position_buffer),
    "token_type_ids": Mutation(token_type_buffer),
    "layers": Mutation(layers),
    "resized words": Mutation(_calls(_model, "resize_token_embeddings", 9, 50)),
    "no pooler": Mutation(_sets(_bert, "pooler", None)),
    "mean pooler": Mutation(_sets(_bert, "pooler", _MeanPooler())),
    # Parameters and other attributes
    "eps": Mutation(_sets(_some(nn.LayerNorm), "eps", 1e-3, 0.5)),
    "scaling": Mutation(_sets(_attention, "scaling", *SCALINGS)),
    "is_causal": Mutation(_sets(_attention, "is_causal", True)),
    "activation": Mutation(_sets(_intermediate, "intermediate_act_fn", *ACTIVATIONS)),
    "activation.act": Mutation(_sets(_activation, "act", torch.relu, torch.tanh)),
    "dropout": Mutation(_sets(_some(nn.Dropout), "p", 1.0)),  # drops everything, so that the result is not random
    "padding_idx": Mutation(_sets(_table, "padding_idx", 1, None)),
    "max_norm": Mutation(_sets(_table, "max_norm", 0.8)),
    "scale_grad_by_freq": Mutation(_sets(_table, "scale_grad_by_freq", True)),
    "sparse": Mutation(_sets(_table, "sparse", True)),
    "table's dtype": Mutation(_calls(_table, "to", torch.float16, torch.bfloat16, torch.float64)),
    "norm's dtype": Mutation(_calls(_some(nn.LayerNorm), "float")),
    "model's dtype": Mutation(_calls(_model, "to", torch.bfloat16, torch.float64)),
    "frozen": Mutation(_calls(_some(nn.Module), "requires_grad_", False)),
    "no bias": Mutation(_sets(_some(nn.Linear, nn.LayerNorm), "bias", None)),
    "no affine": Mutation(no_affine),
    "plain tensor": Mutation(plain_tensor),
    "tied between layers": Mutation(tied_between_layers),
    "tied within a layer": Mutation(tied_within_a_layer),
    "decoder": Mutation(decoder_config, "is_decoder"),
    "flags": Mutation(config_flags),
    "attention by name": Mutation(_calls(_model, "set_attn_implementation", "sdpa", "eager")),
    "checkpointing": Mutation(checkpointing),
    "input gradients": Mutation(_calls(_model, "enable_input_require_grads")),
    # Replaced modules, hooks, and patches of an instance
    "subclass": Mutation(subclass),
    "weight_norm": Mutation(weight_norm),
    "sequential": Mutation(sequential),
    "identity": Mutation(identity),
    "wrapper": Mutation(wrapper, f"is a fuzz_mutations._Wrapper, not transformers'|{NO_WEIGHTS}"),
    "hook": Mutation(forward_hook),
    "hook that watches": Mutation(_calls(_some(nn.Module), "register_forward_hook", lambda *_: None)),
    "hook before": Mutation(pre_hook),
    "hook of the backward": Mutation(backward_hook),
    "hook of a gradient": Mutation(gradient_hook),
    "forward": Mutation(patched_forward, f"has a patched forward|{NO_WEIGHTS}"),
    "feed_forward_chunk": Mutation(patched_chunk, "has a patched feed_forward_chunk"),
    "_create_attention_masks": Mutation(patched_masks, "its _create_attention_masks is patched"),
    # Patches of the process
    "class's forward": Mutation(class_forward, f"{PATCHED_CLASS}|{NO_WEIGHTS}", of_process=True),
    "torch's forward": Mutation(torch_forward, PATCHED_CLASS, of_process=True),
    "class's chunk": Mutation(class_chunk, PATCHED_CLASS, of_process=True),
    "registered attention": Mutation(registered_attention, "function is registered for attention", of_process=True),
    "global hook": Mutation(global_hook, of_process=True),
}
