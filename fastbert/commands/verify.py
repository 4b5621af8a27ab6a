"""`fastbert verify`: every class beside transformers', by a checkpoint's weights, under the project's tolerance rule.

The truth is transformers' model in float64, of the weights as the dtype has rounded them. What differs on purpose is
left out: hidden states and logits at padding, what is pooled where padding is on the left (transformers pools a pad),
and question answering's loss with padding (which takes an answer there for possible). sentence-transformers' pooling
is compared with its formula in plain PyTorch. Letters as in `fastbert.tokens`.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastbert
from fastbert import ops
from fastbert.commands.checkpoint import Checkpoint, right_padding, served
from fastbert.testing import Closeness, closeness
from fastbert.tokens import layout_from_mask

DTYPES = ("float32", "float16", "bfloat16")


class Outputs(NamedTuple):
    """The outputs of a class that are compared: one value for each token [B, S, ...], and for each text [B, ...]."""

    of_tokens: tuple[str, ...] = ()
    of_texts: tuple[str, ...] = ()


HEADS = {
    "BertForPreTraining": Outputs(("prediction_logits",), ("seq_relationship_logits",)),
    "BertForMaskedLM": Outputs(("logits",)),
    "BertForNextSentencePrediction": Outputs((), ("logits",)),
    "BertForSequenceClassification": Outputs((), ("logits",)),
    "BertForTokenClassification": Outputs(("logits",)),
    "BertForMultipleChoice": Outputs((), ("logits",)),
    "BertForQuestionAnswering": Outputs(("start_logits", "end_logits")),
}
MODEL_OUTPUTS = Outputs(("last_hidden_state",), ("pooler_output",))
CLASSES = ("BertModel", *HEADS)
LEFT_OUT = (
    "hidden states and logits at padding, what is pooled where padding is on the left, question answering's loss "
    "with padding"
)

# (B, S) of the batches, some of many texts and some of many tokens; on a GPU also around 64 and 128 tokens, where
# kernels change. The longest texts come on top.
SHAPES = {
    "cpu": ((4, 1), (64, 2), (4, 16), (4, 128)),
    "cuda": ((8, 1), (64, 2), (8, 16), (8, 63), (8, 64), (8, 65), (64, 128), (8, 129)),
}
LONGEST_BATCH = 2
# Heads see B * S places under any mask: texts of this length have all of them, the others padding on the right.
HEAD_EVERY_MASK = 16
# The most places of a head's batch. Where each has a logit for every word, it takes 244 kB with BERT's, in float64.
HEAD_PLACES = {"cpu": 512, "cuda": 8192}
VOCABULARY_HEADS, VOCABULARY_PLACES = ("BertForPreTraining", "BertForMaskedLM"), 128
STATES_SHAPE = (4, 32)
# Of few numbers transformers' may be right by luck. Outputs of fewer are compared together with those of other batches,
# and so are losses, which are single numbers.
FEW_NUMBERS = 64
LOSS_SHAPE, LOSS_BATCHES = (2, 12), 4


class Models(NamedTuple):
    ours: nn.Module
    theirs: nn.Module
    truth: nn.Module

    @torch.no_grad()
    def __call__(self, mask_on_host: bool = False, **inputs) -> tuple:
        """The outputs of each on the same inputs, whose floats take the model's dtype.

        mask_on_host: ours gets its attention_mask on the CPU.
        """
        device, found = self.ours.device, []
        for model in self:
            given = {
                name: x.to(device, model.dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
                for name, x in inputs.items()
            }
            if mask_on_host and model is self.ours:
                given["attention_mask"] = inputs["attention_mask"]
            found.append(model(**given, return_dict=True))
        return tuple(found)


@dataclass(frozen=True)
class Verdict:
    """Of all that was compared under a subject, what came closest to its limit, or went the farthest beyond, and the
    output and the batch where it did.

    closeness: None where transformers gives no number at all. is_finite: whether it gives nothing but numbers.
    """

    subject: str
    where: str
    closeness: Closeness | None
    is_finite: bool = True

    @property
    def holds(self) -> bool:
        return self.closeness is None or self.closeness.holds

    @property
    def severity(self) -> tuple[bool, bool, float]:
        return not self.holds, not self.is_finite, 0.0 if self.closeness is None else self.closeness.share


class Verified(NamedTuple):
    """A class in a dtype: its verdicts, what served our model, and the parameters that the checkpoint lacks."""

    model_class: str
    dtype: str
    verdicts: list[Verdict]
    served: str
    lacking: list[str]

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def is_finite(self) -> bool:
        return all(verdict.is_finite for verdict in self.verdicts)


class Compared(NamedTuple):
    """Values that have to agree: ours, transformers' and the truth, under a subject that has one verdict."""

    subject: str
    where: str
    values: tuple[Tensor, Tensor, Tensor]


def masks(batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """What is kept of a batch, bool [B, S]: column 0 is, but for padding on the left."""
    full = torch.ones(batch_size, seq_len, dtype=torch.bool)
    if seq_len == 1:
        return {"full": full}
    right = right_padding(batch_size, seq_len)
    columns, rows = torch.arange(seq_len), torch.arange(batch_size)[:, None]
    return {
        "full": full,
        "right": right,
        "left": right.flip(1),
        "holes": (columns == 0) | ((3 * columns + rows) % 5 < 3),
    }


def verify(
    checkpoint: Checkpoint,
    device: torch.device,
    dtypes: Sequence[str] = DTYPES,
    classes: Iterable[str] = CLASSES,
    shapes: Iterable[tuple[int, int]] | None = None,
) -> Iterator[Verified]:
    """Compare each class in each dtype.

    shapes: (B, S) of the batches; by default what suits the device.
    """
    if shapes is None:
        longest = checkpoint.config.max_position_embeddings
        shapes = [shape for shape in SHAPES[device.type] if shape[1] < longest] + [(LONGEST_BATCH, longest)]
    for model_class in classes:
        ours, theirs, lacking = checkpoint.pair(model_class)
        for dtype in dtypes:
            rounded = [deepcopy(model).to(device, getattr(torch, dtype)) for model in (ours, theirs)]
            models = Models(*rounded, deepcopy(rounded[1]).double())
            found = (_model if model_class == "BertModel" else _head)(checkpoint, models, shapes)
            yield Verified(model_class, dtype, _verdicts(found), served(models.ours), lacking)


def _verdicts(found: Iterable[Compared]) -> list[Verdict]:
    worst: dict[str, Verdict] = {}
    for subject, where, values in found:
        _, theirs, _ = values
        is_finite = bool(theirs.isfinite().all())
        for each in closeness(*values) or ([] if is_finite else [None]):
            verdict = Verdict(subject, where, each, is_finite)
            if subject not in worst or verdict.severity > worst[subject].severity:
                worst[subject] = verdict
    return list(worst.values())


def _model(checkpoint: Checkpoint, models: Models, shapes: Iterable[tuple[int, int]]) -> Iterator[Compared]:
    for shape in shapes:
        of_kinds = masks(*shape)
        for kind, mask in of_kinds.items():
            outputs = models(**checkpoint.batch(*shape), **_given(kind, mask))
            where = f"{shape[0]}x{shape[1]} {kind}"
            for name, values in _values(outputs, MODEL_OUTPUTS, kind, mask):
                yield Compared(f"BertModel {name}", where, values)
            hidden = tuple(each.last_hidden_state for each in outputs)
            for mode in ("mean", "first"):
                yield Compared(f"pool {mode}", where, _pooled(mode, hidden, kind, mask))
        # On a CPU every mask is on the host.
        if models.ours.device.type != "cpu":
            mask = of_kinds.get("right", of_kinds["full"])
            outputs = models(**checkpoint.batch(*shape), attention_mask=mask.long(), mask_on_host=True)
            for name, values in _values(outputs, MODEL_OUTPUTS, "right", mask):
                yield Compared(f"BertModel {name}", f"{shape[0]}x{shape[1]}, mask on host", values)
    shape = _fitting(STATES_SHAPE, checkpoint)
    batch, mask = checkpoint.batch(*shape), masks(*shape)["right"]
    outputs = models(**batch, attention_mask=mask.long(), output_hidden_states=True)
    for layer, states in enumerate(zip(*(each.hidden_states for each in outputs), strict=True)):
        values = tuple(state[mask.to(state.device)] for state in states)
        yield Compared("BertModel hidden_states", f"state {layer}, right", values)
    for model in (models.theirs, models.truth):
        model.set_attn_implementation("eager")
    # The modules compute attention weights on every device, which the back end "triton" would refuse.
    with fastbert.backend("eager"):
        outputs = models(**batch, attention_mask=mask.long(), output_attentions=True)
    for layer, weights in enumerate(zip(*(each.attentions for each in outputs), strict=True)):
        values = tuple(x.transpose(1, 2)[mask.to(x.device)] for x in weights)
        yield Compared("BertModel attentions", f"layer {layer}, right", values)


@torch.no_grad()
def _pooled(mode: str, hidden: tuple[Tensor, ...], kind: str, mask: Tensor) -> tuple[Tensor, ...]:
    """Normalized vectors [B, E] of each model's last hidden state [B, S, E]: ours by the operation, theirs and the
    truth by sentence-transformers' formula."""
    ours, *others = hidden
    keep = mask.to(ours.device)
    # By the mask on the host: a device without kernels does not pack.
    layout = layout_from_mask(None if kind == "full" else mask, *mask.shape, ours.device)
    found = [ops.pool(ours.flatten(0, 1), layout.cu_seqlens, mode, normalize=True, indices=layout.indices)]
    for states in others:
        if mode == "mean":
            weights = keep[..., None].to(states.dtype)
            vectors = (states * weights).sum(1) / weights.sum(1)
        else:
            vectors = states[torch.arange(len(keep), device=keep.device), keep.int().argmax(1)]
        found.append(normalize(vectors, dim=-1))
    return tuple(found)


def _head(checkpoint: Checkpoint, models: Models, shapes: Iterable[tuple[int, int]]) -> Iterator[Compared]:
    model_class, config = type(models.ours).__name__, models.ours.config
    most = VOCABULARY_PLACES if model_class in VOCABULARY_HEADS else HEAD_PLACES[models.ours.device.type]

    def of_texts(kind: str, mask: Tensor, first: int = 0) -> dict[str, Tensor]:
        inputs = checkpoint.batch(*mask.shape, first) | _given(kind, mask)
        return {name: x[None] for name, x in inputs.items()} if model_class == "BertForMultipleChoice" else inputs

    of_few: dict[str, list[list[Tensor]]] = {}
    for batch_size, seq_len in dict.fromkeys(_cut(shape, most) for shape in shapes):
        of_kinds = masks(batch_size, seq_len)
        if seq_len != HEAD_EVERY_MASK and seq_len > 1:
            of_kinds = {"right": of_kinds["right"]}
        for kind, mask in of_kinds.items():
            for name, values in _values(models(**of_texts(kind, mask)), HEADS[model_class], kind, mask):
                if values[0].numel() < FEW_NUMBERS:
                    of_few.setdefault(name, []).append([x.flatten() for x in values])
                else:
                    yield Compared(model_class, f"{name}, {batch_size}x{seq_len} {kind}", values)
    for name, values in of_few.items():
        yield Compared(model_class, f"{name}, of few", tuple(torch.cat(each) for each in zip(*values, strict=True)))
    generator = torch.Generator().manual_seed(0)
    losses = []
    shape = _fitting(LOSS_SHAPE, checkpoint)
    for kind, mask in masks(*shape).items():
        for index in range(LOSS_BATCHES if _compares_loss(model_class, kind) else 0):
            labels = _labels(model_class, config, mask, generator)
            outputs = models(**of_texts(kind, mask, first=index * shape[0]), **labels)
            losses.append(tuple(each.loss for each in outputs))
    yield Compared(model_class, "loss", tuple(torch.stack(each) for each in zip(*losses, strict=True)))


def _cut(shape: tuple[int, int], most: int) -> tuple[int, int]:
    """A batch of this shape, or as many and as long texts of it as make `most` places."""
    seq_len = min(shape[1], most)
    return min(shape[0], most // seq_len), seq_len


def _fitting(shape: tuple[int, int], checkpoint: Checkpoint) -> tuple[int, int]:
    return shape[0], min(shape[1], checkpoint.config.max_position_embeddings)


def _given(kind: str, mask: Tensor) -> dict[str, Tensor]:
    """The mask as it is given to the models: none where nothing is padding."""
    return {} if kind == "full" else {"attention_mask": mask.long()}


def _values(
    outputs: tuple, compared: Outputs, kind: str, mask: Tensor
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """What is compared of the outputs: the kept tokens' [T, ...], and the texts' but for padding on the left."""
    for name in compared.of_tokens:
        yield name, tuple(each[name][mask.to(each[name].device)] for each in outputs)
    if kind != "left":
        for name in compared.of_texts:
            yield name, tuple(each[name] for each in outputs)


def _compares_loss(model_class: str, kind: str) -> bool:
    """Whether the loss of such a batch is to be transformers': two masks are enough to see what padding does to it."""
    return kind == "full" or (kind == "right" and model_class != "BertForQuestionAnswering")


def _labels(model_class: str, config, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random labels of a batch, as its class takes them; padding has none."""
    batch_size, seq_len = mask.shape

    def classes(count: int, *size: int) -> Tensor:
        return torch.randint(count, size, generator=generator)

    def of_tokens(count: int) -> Tensor:
        return classes(count, batch_size, seq_len).masked_fill(~mask, -100)

    match model_class:
        case "BertForPreTraining":
            return {"labels": of_tokens(config.vocab_size), "next_sentence_label": classes(2, batch_size)}
        case "BertForMaskedLM":
            return {"labels": of_tokens(config.vocab_size)}
        case "BertForNextSentencePrediction":
            return {"labels": classes(2, batch_size)}
        case "BertForTokenClassification":
            return {"labels": of_tokens(config.num_labels)}
        case "BertForMultipleChoice":
            return {"labels": classes(batch_size, 1)}
        case "BertForQuestionAnswering":
            return {"start_positions": classes(seq_len, batch_size), "end_positions": classes(seq_len, batch_size)}
    # What transformers takes an unsaid problem for.
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if problem == "single_label_classification":
        return {"labels": classes(config.num_labels, batch_size)}
    size = (batch_size,) if config.num_labels == 1 else (batch_size, config.num_labels)
    return {"labels": classes(2, *size).float()}


def table(found: Sequence[Verified]) -> Table:
    """A section for each dtype, a row for each verdict."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column(no_wrap=True)
    for heading in ("error", "theirs", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("closest to it in")
    table.add_column(no_wrap=True)
    for dtype in dict.fromkeys(each.dtype for each in found):
        table.add_section()
        table.add_row(Text(dtype, "bold"))
        for verdict in (verdict for each in found if each.dtype == dtype for verdict in each.verdicts):
            close, where = verdict.closeness, verdict.where
            if close is None:
                errors = ("-", "-", "-")
            else:
                errors = (f"{error:.1e}" for error in (close.error, close.their_error, close.limit))
                where = f"{where}, {close.measure}"
            told = Text("ok", "green") if verdict.is_finite else Text("no number", "bold yellow")
            table.add_row(verdict.subject, *errors, where, told if verdict.holds else Text("MISS", "bold red"))
    return table


def remarks(found: Sequence[Verified]) -> Iterator[Text]:
    """What has to be known beside the table, the sum of it last."""
    yield Text("limit: three times transformers' own error and a few roundings, in the maximum and in the rms")
    yield Text(f"left out, for fastbert differs there on purpose: {LEFT_OUT}")
    lacking = dict.fromkeys(each.model_class for each in found if each.lacking)
    if lacking:
        yield Text(f"random weights, the same in both, for what the checkpoint lacks: {', '.join(lacking)}")
    for by in dict.fromkeys(each.served for each in found):
        of = dict.fromkeys(f"{each.model_class} in {each.dtype}" for each in found if each.served == by)
        which = "served by" if len(of) == len(found) else f"{', '.join(of)} served by"
        yield Text(f"{which} {by}", "" if by == "triton" else "yellow")
    wrong = dict.fromkeys(f"{each.model_class} in {each.dtype}" for each in found if not each.holds)
    if wrong:
        yield Text(f"fastbert is WRONG here, beyond the limit: {', '.join(wrong)}", "bold red")
    elif all(each.is_finite for each in found):
        yield Text("fastbert gives transformers' results here, all within the limit", "bold green")
    for dtype in dict.fromkeys(each.dtype for each in found if not each.is_finite):
        of = ", ".join(each.model_class for each in found if each.dtype == dtype and not each.is_finite)
        yield Text(
            f"transformers gives no number here in {dtype}, so nothing to compare with, in {of}: do "
            "not use this dtype with this checkpoint",
            "bold yellow",
        )
