"""The cases of `fuzz`: a seed draws a `Case`, which builds transformers' model and the inputs of its call."""

from copy import deepcopy
from dataclasses import dataclass, field, fields
from random import Random

import torch
import transformers
from cases import HEADS
from fuzz_mutations import MUTATIONS
from torch import Tensor, nn
from transformers.activations import ACT2FN

# The first mutation of a seed, by turns. None: models are compared without mutations.
TURNS = (None, None, None, None, *MUTATIONS)
# Mutations whose results depend on the inputs at padding: tables that count or rescale rows, custom masks.
READ_PADDING = {"max_norm", "scale_grad_by_freq", "_create_attention_masks", "decoder"}
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)
MASKS = (None, "full", "right", "right", "left", "holes", "one row", "3-D", "4-D", "additive")


@dataclass
class Case:
    """A model, its mutations, a batch and a back end.

    backend: "eager", "triton", or "auto" as on a GPU with packing on the "host" or the "device". made: how our model is
    made, by "optimize", "inner first", with a cast ("optimize(dtype)"), as a "deepcopy" of an optimized model, or from
    fastbert's class ("drop-in"). mutations: names and times, "before" or "after" our model is made.
    """

    seed: int
    head: str
    settings: dict
    dtype: torch.dtype
    pooler: bool
    training: bool
    backend: str
    mutations: list[tuple[str, str]]
    batch_size: int
    choices: int
    seq_len: int
    embeds: bool
    ids_dtype: torch.dtype
    token_types: bool
    positions: str | None
    mask: str | None
    mask_dtype: torch.dtype
    labels: bool
    gradients: bool
    made: str = "optimize"
    learned_mask: bool = False
    autocast: bool = False
    options: dict = field(default_factory=dict)

    def __str__(self):
        return "\n".join(f"    {each.name} = {getattr(self, each.name)!r}" for each in fields(self))

    @property
    def rows(self) -> int:
        return self.batch_size * self.choices

    @property
    def casts(self) -> bool:
        return self.made == "optimize(dtype)"

    @property
    def arguments(self) -> dict:
        """The class's arguments other than the configuration."""
        return {"add_pooling_layer": self.pooler} if self.head == "BertModel" else {}


def draw(seed: int) -> Case:
    """Draw the case of a seed. Consecutive seeds go through the mutations in order."""
    r = Random(seed)
    turn = TURNS[seed % len(TURNS)]
    names = list(dict.fromkeys([turn, *r.sample(list(MUTATIONS), r.choice((0, 0, 1, 2)))])) if turn else []
    head, training = r.choice(HEADS), r.random() < 0.4
    settings = _settings(r, head, training, min_layers=1 if names else 0)
    case = Case(
        seed, head, settings, training=training,
        dtype=r.choices((torch.float32, torch.float64, torch.bfloat16, torch.float16), (14, 2, 1, 1))[0],
        pooler=r.random() < 0.8, backend=r.choice(("eager", "host", "device", "eager" if names else "triton")),
        mutations=[(name, r.choice(("before", "after"))) for name in names],
        batch_size=r.randint(1, 3), choices=r.randint(1, 3) if head == "BertForMultipleChoice" else 1,
        seq_len=r.randint(1, settings["max_position_embeddings"]), embeds=r.random() < 0.2,
        ids_dtype=r.choice((torch.int64, torch.int32)), token_types=r.random() < 0.6,
        positions=r.choice((None, None, None, "row", "each")), mask=r.choice(MASKS), mask_dtype=r.choice(INTEGERS),
        labels=r.random() < 0.7, gradients=r.random() < 0.4,
    )  # fmt: skip
    if head == "BertForMultipleChoice" and case.mask in MASKS[-4:]:
        case.mask = "holes"
    case.learned_mask = case.gradients and case.mask == "additive" and r.random() < 0.5
    case.autocast = case.dtype == torch.float32 and not names and r.random() < 0.3
    case.options = _options(r, case)
    ways = ["optimize"] * 4 + ["inner first"]
    if "before" not in dict(case.mutations).values():
        ways += ["drop-in", "deepcopy"]
    if case.dtype.itemsize == 2 and not names:
        ways += ["optimize(dtype)"]
    case.made = r.choice(ways)
    return case


def _settings(r: Random, head: str, training: bool, min_layers: int) -> dict:
    """Draw a configuration, without dropout in training, where its random choices could not be repeated."""
    heads, head_size = r.choice([(h, d) for h in range(1, 6) for d in range(1, 33) if 4 <= h * d <= 64])
    labels = 2 if head == "BertForQuestionAnswering" else r.randint(1, 4)
    problems = ("regression", "single_label_classification", "multi_label_classification")
    dropout = (0.0,) if training else (0.0, 0.3)
    return {
        "vocab_size": r.randint(8, 40),
        "hidden_size": heads * head_size,
        "num_attention_heads": heads,
        "num_hidden_layers": r.choice((min_layers, 1, 1, 2, 2, 3)),
        "intermediate_size": r.randint(1, 70),
        "max_position_embeddings": r.randint(4, 24),
        "type_vocab_size": r.randint(1, 3),
        "hidden_act": r.choice(("gelu", "relu", "gelu_new")) if r.random() < 0.6 else r.choice(sorted(ACT2FN)),
        "layer_norm_eps": r.choice((1e-12, 1e-5, 0.1)),
        "pad_token_id": r.choice((0, 0, 1, 5, None)),
        "tie_word_embeddings": r.random() < 0.7,
        "attn_implementation": r.choice(("sdpa", "eager")),
        "initializer_range": r.uniform(0.15, 0.3),
        "num_labels": labels,
        "problem_type": r.choice((None, *problems)) if labels > 1 else None,
        "chunk_size_feed_forward": r.choice((0, 0, 0, 1)),
        "hidden_dropout_prob": r.choice(dropout),
        "attention_probs_dropout_prob": r.choice(dropout),
        "classifier_dropout": r.choice((None, *dropout)),
    }


def _options(r: Random, case: Case) -> dict:
    """Draw the options of a call. transformers counts hidden states by the configuration, with none for no layers."""
    names, count, options = dict(case.mutations), case.settings["num_hidden_layers"] + 1, {}
    if count > 1 and r.random() < 0.4:
        some = sorted(r.sample(range(-count, count), r.randint(1, count)))
        options["output_hidden_states"] = "layers" in names or r.choice((True, r.randrange(1, count) - count, some))
    # With "sdpa" transformers returns no weights. They come from "eager", which mutations may change differently.
    eager = case.settings["attn_implementation"] == "eager" and "attention by name" not in names
    if r.random() < 0.3 and not case.autocast and (eager or not names):
        options["output_attentions"] = True
    if r.random() < 0.3:
        options["return_dict"] = r.random() < 0.5
    return options


def build(case: Case) -> nn.Module:
    """Build transformers' model of a case without mutations, in float32 if `optimize` is to cast it."""
    torch.manual_seed(case.seed)
    model = getattr(transformers, case.head)(transformers.BertConfig(**deepcopy(case.settings)), **case.arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return (model if case.casts else model.to(case.dtype)).train(case.training)


def encoder_of(model: nn.Module) -> nn.Module:
    return model.bert if hasattr(model, "bert") else model


def keep_of(case: Case) -> Tensor | None:
    """Return the kept tokens, bool [rows, S], or None if the mask is no padding mask. Some rows may be empty."""
    generator = torch.Generator().manual_seed(case.seed)
    lengths = torch.randint(0, case.seq_len + 1, (case.rows, 1), generator=generator)
    lengths[0].clamp_(min=1)
    columns = torch.arange(case.seq_len)
    holes = torch.rand(case.rows, case.seq_len, generator=generator) < 0.6
    holes[0, -1] = True
    return {
        "full": columns.expand(case.rows, -1) >= 0,
        "right": columns < lengths,
        "left": columns >= case.seq_len - lengths,
        "holes": holes,
        "one row": (columns < lengths[0]).expand(case.rows, -1),
    }.get(case.mask)


def inputs_of(case: Case, theirs: nn.Module, ours: bool = False) -> dict[str, Tensor]:
    """Return the keyword arguments of the call. Ours get invalid values at padding, and masks that only ours accept."""
    generator = torch.Generator().manual_seed(case.seed)
    settings, rows, seq_len, keep = case.settings, case.rows, case.seq_len, keep_of(case)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def rubbish(values: Tensor, value: float) -> Tensor:
        if not ours or keep is None or READ_PADDING & set(dict(case.mutations)):
            return values
        return values.masked_fill(~keep if values.ndim == 2 else ~keep[..., None], value)

    ids = rubbish(integers(settings["vocab_size"], rows, seq_len).to(case.ids_dtype), -100)
    embeds = torch.randn(rows, seq_len, settings["hidden_size"], generator=generator).to(case.dtype)
    types = rubbish(integers(settings["type_vocab_size"], rows, seq_len), 99)
    places = integers(settings["max_position_embeddings"], rows, seq_len)
    inputs = {"inputs_embeds": rubbish(embeds, torch.nan)} if case.embeds else {"input_ids": ids}
    if case.token_types:
        inputs["token_type_ids"] = types
    if case.positions:
        inputs["position_ids"] = rubbish(places, 99) if case.positions == "each" else places[:1]
    if case.mask:
        eager = case.options.get("output_attentions") or encoder_of(theirs).config._attn_implementation == "eager"
        inputs["attention_mask"] = _mask(case, keep, generator, ours, eager)
    if case.head == "BertForMultipleChoice":
        inputs = {
            name: x.expand(rows, *x.shape[1:]).unflatten(0, (-1, case.choices)).contiguous()
            for name, x in inputs.items()
        }
    for name, learned in (("inputs_embeds", True), ("attention_mask", case.learned_mask)):
        if case.gradients and learned and name in inputs:
            inputs[name].requires_grad_()
    return inputs | (_labels(case, keep, integers, ours) if case.labels else {})


def _mask(case: Case, keep: Tensor | None, generator: torch.Generator, ours: bool, eager: bool) -> Tensor:
    if keep is not None:
        dtype = case.mask_dtype if case.seed % 3 else torch.float32
        return (keep[:1] if ours and case.mask == "one row" else keep).to(dtype)
    r, columns = Random(case.seed), torch.arange(case.seq_len)
    sizes = [r.choice((1, size)) for size in (case.rows, case.settings["num_attention_heads"], case.seq_len)]
    if case.mask == "3-D" or case.settings["num_hidden_layers"] == 0:
        sizes[1] = 1
    scores = torch.randn(*sizes, case.seq_len, generator=generator)
    lowest = torch.finfo(case.dtype).min
    if case.mask == "additive":  # each row attends to the first column: a row of minus infinity would give NaN
        least = r.choice((lowest, -1e4, -torch.inf, -2.0))
        return scores.masked_fill((scores > 0.5) & (columns > 0), least).to(case.dtype)
    attend = (scores > 0) | (columns == 0)
    if ours:
        return (attend[:, 0] if case.mask == "3-D" else attend).to(case.mask_dtype)
    return torch.zeros(attend.shape, dtype=case.dtype).masked_fill(~attend, lowest) if eager else attend


def _labels(case: Case, keep: Tensor | None, integers, ours: bool) -> dict[str, Tensor]:
    rows, seq_len, count = case.batch_size, case.seq_len, case.settings["num_labels"]

    def of_tokens(high: int) -> Tensor:
        labels = integers(high, rows, seq_len)
        labels[:, ::3] = -100
        return labels if keep is None else labels.masked_fill(~keep, -100)

    def of_sequences() -> Tensor:
        problem = case.settings["problem_type"] or ("regression" if count == 1 else "single_label_classification")
        if problem == "single_label_classification":
            return integers(count, rows)
        high = 9 if problem == "regression" else 2
        return integers(high, rows, count).to(case.dtype).squeeze(1)

    def places() -> Tensor:
        places = integers(seq_len + 2, rows)
        if keep is None or ours:
            return places
        on_padding = ~keep.gather(1, places.clamp(max=seq_len - 1)[:, None])[:, 0]
        return places.masked_fill(on_padding, seq_len)  # the loss ignores these, as fastbert ignores padding

    vocabulary = case.settings["vocab_size"]
    return {
        "BertModel": dict,
        "BertForPreTraining": lambda: {"labels": of_tokens(vocabulary), "next_sentence_label": integers(2, rows)},
        "BertForMaskedLM": lambda: {"labels": of_tokens(vocabulary)},
        "BertForNextSentencePrediction": lambda: {"labels": integers(2, rows)},
        "BertForSequenceClassification": lambda: {"labels": of_sequences()},
        "BertForTokenClassification": lambda: {"labels": of_tokens(count)},
        "BertForMultipleChoice": lambda: {"labels": integers(case.choices, rows)},
        "BertForQuestionAnswering": lambda: {"start_positions": places(), "end_positions": places()},
    }[case.head]()
