"""`fastbert verify`: compare each class with transformers', with a checkpoint's weights and the tolerance rule.

The truth is transformers' model in float64, with weights rounded to the dtype. Intended differences are left out:
hidden states and logits at padding, the pooled output with left padding (transformers pools a padding token), and the
loss of question answering with padding (transformers counts answers at padding). sentence-transformers' pooling is
compared with its formula in plain PyTorch. Letters as in `fastbert.tokens`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

import fastbert
from fastbert import ops
from fastbert.commands.checkpoint import Checkpoint, describe_backends, right_padding
from fastbert.testing import Closeness, closeness
from fastbert.tokens import layout_from_mask

DTYPES = ("float32", "float16", "bfloat16")


class Outputs(NamedTuple):
    """The outputs of a class that are compared: per token [B, S, ...] and per sequence [B, ...]."""

    per_token: tuple[str, ...] = ()
    per_sequence: tuple[str, ...] = ()


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
    "hidden states and logits at padding, the pooled output with left padding, the loss of question answering with "
    "padding"
)

# (B, S) of the batches, some with many sequences and some with long ones; on a GPU also around 64 and 128 tokens,
# where kernel variants change. A batch of the longest sequences is added.
SHAPES = {
    "cpu": ((4, 1), (64, 2), (4, 16), (4, 128)),
    "cuda": ((8, 1), (64, 2), (8, 16), (8, 63), (8, 64), (8, 65), (64, 128), (8, 129)),
}
LONGEST_BATCH = 2
# Heads run with every mask at this sequence length, and only with right padding at others.
HEAD_EVERY_MASK = 16
# Maximum B * S of a head's batch. With a logit per word each position takes 244 kB for BERT's vocabulary, in float64.
HEAD_TOKENS = {"cpu": 512, "cuda": 8192}
VOCABULARY_HEADS, VOCABULARY_TOKENS = ("BertForPreTraining", "BertForMaskedLM"), 128
STATES_SHAPE = (4, 32)
# If there are only a few numbers, transformers' may be exact by chance and the limit too strict. Outputs with fewer
# numbers than this are compared together with those of other batches, and so are losses.
FEW_NUMBERS = 64
LOSS_SHAPE, LOSS_BATCHES = (2, 12), 4


class Models(NamedTuple):
    ours: PreTrainedModel
    theirs: PreTrainedModel
    truth: PreTrainedModel

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], mask_on_host: bool = False) -> tuple:
        """The outputs of each model on the same inputs. Floating-point inputs are cast to the model's dtype.

        mask_on_host: our model gets its attention_mask on the CPU.
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
    """The comparison of a subject (a class or one of its outputs) that is closest to its limit or furthest beyond it.

    where: its output and batch. closeness: None if transformers gives only NaN or infinity. is_finite: whether
    transformers gives neither.
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
    """A class in a dtype: its verdicts, the back ends of our model, and the parameters missing in the checkpoint."""

    model_class: str
    dtype: str
    verdicts: list[Verdict]
    backends: str
    missing: list[str]

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def is_finite(self) -> bool:
        return all(verdict.is_finite for verdict in self.verdicts)


class Compared(NamedTuple):
    """Values of ours, transformers and the truth that must agree. There is one verdict per subject."""

    subject: str
    where: str
    values: tuple[Tensor, ...]


def masks(batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """Masks by kind, bool [B, S]. Column 0 is kept, except with left padding."""
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

    shapes: (B, S) of the batches; None means SHAPES and the longest sequences.
    """
    if shapes is None:
        longest = checkpoint.config.max_position_embeddings
        shapes = [shape for shape in SHAPES[device.type] if shape[1] < longest] + [(LONGEST_BATCH, longest)]
    for model_class in classes:
        ours, theirs, missing = checkpoint.pair(model_class)
        for dtype in dtypes:
            copies: list[Any] = [deepcopy(model).to(device, getattr(torch, dtype)) for model in (ours, theirs)]
            models = Models(copies[0], copies[1], deepcopy(copies[1]).double())
            found = (_model if model_class == "BertModel" else _head)(checkpoint, models, shapes)
            yield Verified(model_class, dtype, _verdicts(found), describe_backends(models.ours), missing)


def _verdicts(found: Iterable[Compared]) -> list[Verdict]:
    worst: dict[str, Verdict] = {}
    for subject, where, values in found:
        ours, theirs, truth = values
        is_finite = bool(theirs.isfinite().all())
        measures: list[Closeness | None] = [*closeness(ours, theirs, truth)]
        for each in measures or ([] if is_finite else [None]):
            verdict = Verdict(subject, where, each, is_finite)
            if subject not in worst or verdict.severity > worst[subject].severity:
                worst[subject] = verdict
    return list(worst.values())


def _model(checkpoint: Checkpoint, models: Models, shapes: Iterable[tuple[int, int]]) -> Iterator[Compared]:
    for shape in shapes:
        of_kinds = masks(*shape)
        for kind, mask in of_kinds.items():
            outputs = models(checkpoint.batch(*shape) | _given(kind, mask))
            where = f"{shape[0]}x{shape[1]} {kind}"
            for name, values in _values(outputs, MODEL_OUTPUTS, kind, mask):
                yield Compared(f"BertModel {name}", where, values)
            hidden = tuple(each.last_hidden_state for each in outputs)
            for mode in ("mean", "first"):
                yield Compared(f"pool {mode}", where, _pooled(mode, hidden, kind, mask))
        # On a CPU every mask is on the host.
        if models.ours.device.type != "cpu":
            mask = of_kinds.get("right", of_kinds["full"])
            outputs = models(checkpoint.batch(*shape) | {"attention_mask": mask.long()}, mask_on_host=True)
            for name, values in _values(outputs, MODEL_OUTPUTS, "right", mask):
                yield Compared(f"BertModel {name}", f"{shape[0]}x{shape[1]}, mask on host", values)
    shape = _fitting(STATES_SHAPE, checkpoint)
    mask = masks(*shape)["right"]
    batch: dict[str, Any] = checkpoint.batch(*shape) | {"attention_mask": mask.long()}
    outputs = models(batch | {"output_hidden_states": True})
    for layer, states in enumerate(zip(*(each.hidden_states for each in outputs), strict=True)):
        values = tuple(state[mask.to(state.device)] for state in states)
        yield Compared("BertModel hidden_states", f"state {layer}, right", values)
    for model in (models.theirs, models.truth):
        model.set_attn_implementation("eager")
    # The back end "triton" does not support attention weights, which the modules compute on every device.
    with fastbert.backend("eager"):
        outputs = models(batch | {"output_attentions": True})
    for layer, weights in enumerate(zip(*(each.attentions for each in outputs), strict=True)):
        values = tuple(x.transpose(1, 2)[mask.to(x.device)] for x in weights)
        yield Compared("BertModel attentions", f"layer {layer}, right", values)


@torch.no_grad()
def _pooled(mode: str, hidden: tuple[Tensor, ...], kind: str, mask: Tensor) -> tuple[Tensor, ...]:
    """Normalized vectors [B, E] from each model's last hidden state [B, S, E]: ours by the op `pool`, the others by
    sentence-transformers' formula."""
    ours, *others = hidden
    keep = mask.to(ours.device)
    # Use the mask on the host, because a device without kernels does not pack.
    batch_size, seq_len = mask.shape
    layout = layout_from_mask(None if kind == "full" else mask, batch_size, seq_len, ours.device)
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
    max_tokens = VOCABULARY_TOKENS if model_class in VOCABULARY_HEADS else HEAD_TOKENS[models.ours.device.type]

    def inputs_of(kind: str, mask: Tensor, first: int = 0) -> dict[str, Tensor]:
        batch_size, seq_len = mask.shape
        inputs = checkpoint.batch(batch_size, seq_len, first) | _given(kind, mask)
        return {name: x[None] for name, x in inputs.items()} if model_class == "BertForMultipleChoice" else inputs

    small: dict[str, list[list[Tensor]]] = {}
    for batch_size, seq_len in dict.fromkeys(_cut(shape, max_tokens) for shape in shapes):
        of_kinds = masks(batch_size, seq_len)
        if seq_len != HEAD_EVERY_MASK and seq_len > 1:
            of_kinds = {"right": of_kinds["right"]}
        for kind, mask in of_kinds.items():
            for name, values in _values(models(inputs_of(kind, mask)), HEADS[model_class], kind, mask):
                if values[0].numel() < FEW_NUMBERS:
                    small.setdefault(name, []).append([x.flatten() for x in values])
                else:
                    yield Compared(model_class, f"{name}, {batch_size}x{seq_len} {kind}", values)
    for name, batches in small.items():
        joined = tuple(torch.cat(each) for each in zip(*batches, strict=True))
        yield Compared(model_class, f"{name}, small batches", joined)
    generator = torch.Generator().manual_seed(0)
    losses = []
    shape = _fitting(LOSS_SHAPE, checkpoint)
    for kind, mask in masks(*shape).items():
        for index in range(LOSS_BATCHES if _compares_loss(model_class, kind) else 0):
            labels = _labels(model_class, config, mask, generator)
            outputs = models(inputs_of(kind, mask, first=index * shape[0]) | labels)
            losses.append(tuple(each.loss for each in outputs))
    yield Compared(model_class, "loss", tuple(torch.stack(each) for each in zip(*losses, strict=True)))


def _cut(shape: tuple[int, int], max_tokens: int) -> tuple[int, int]:
    """The shape (B, S), reduced to at most max_tokens."""
    seq_len = min(shape[1], max_tokens)
    return min(shape[0], max_tokens // seq_len), seq_len


def _fitting(shape: tuple[int, int], checkpoint: Checkpoint) -> tuple[int, int]:
    return shape[0], min(shape[1], checkpoint.config.max_position_embeddings)


def _given(kind: str, mask: Tensor) -> dict[str, Tensor]:
    """The mask argument of a batch; none without padding."""
    return {} if kind == "full" else {"attention_mask": mask.long()}


def _values(outputs: tuple, compared: Outputs, kind: str, mask: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """The outputs to compare: those of kept tokens [T, ...], and those of sequences except with left padding."""
    for name in compared.per_token:
        yield name, tuple(each[name][mask.to(each[name].device)] for each in outputs)
    if kind != "left":
        for name in compared.per_sequence:
            yield name, tuple(each[name] for each in outputs)


def _compares_loss(model_class: str, kind: str) -> bool:
    """Whether to compare the loss with this kind of mask. Two kinds suffice to see the effect of padding."""
    return kind == "full" or (kind == "right" and model_class != "BertForQuestionAnswering")


def _labels(model_class: str, config, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random labels for a batch of a class; padding is ignored."""
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
    # transformers' default for problem_type.
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
    table.add_column("closest in")
    table.add_column(no_wrap=True)
    for dtype in dict.fromkeys(each.dtype for each in found):
        table.add_section()
        table.add_row(Text(dtype, "bold"))
        for verdict in (verdict for each in found if each.dtype == dtype for verdict in each.verdicts):
            close, where = verdict.closeness, verdict.where
            errors: Iterable[str]
            if close is None:
                errors = ("-", "-", "-")
            else:
                errors = (f"{error:.1e}" for error in (close.error, close.their_error, close.limit))
                where = f"{where}, {close.measure}"
            result = Text("ok", "green") if verdict.is_finite else Text("not finite", "bold yellow")
            table.add_row(verdict.subject, *errors, where, result if verdict.holds else Text("MISS", "bold red"))
    return table


def remarks(found: Sequence[Verified]) -> Iterator[Text]:
    """Notes on the table; the last ones sum it up."""
    yield Text("limit: three times transformers' own error plus a few roundings, for the maximum and the rms")
    yield Text(f"left out, because fastbert differs there on purpose: {LEFT_OUT}")
    missing = dict.fromkeys(each.model_class for each in found if each.missing)
    if missing:
        yield Text(f"weights missing in the checkpoint are random, the same in both: {', '.join(missing)}")
    for used in dict.fromkeys(each.backends for each in found):
        users = dict.fromkeys(f"{each.model_class} in {each.dtype}" for each in found if each.backends == used)
        label = "back end" if len(users) == len(found) else f"back end of {', '.join(users)}"
        yield Text(f"{label}: {used}", "" if used == "triton" else "yellow")
    wrong = dict.fromkeys(f"{each.model_class} in {each.dtype}" for each in found if not each.holds)
    if wrong:
        yield Text(f"fastbert is WRONG here, beyond the limit: {', '.join(wrong)}", "bold red")
    elif all(each.is_finite for each in found):
        yield Text("fastbert gives transformers' results here, all within the limit", "bold green")
    for dtype in dict.fromkeys(each.dtype for each in found if not each.is_finite):
        affected = ", ".join(each.model_class for each in found if each.dtype == dtype and not each.is_finite)
        yield Text(
            f"transformers gives NaN or infinity here in {dtype}, so there is nothing to compare with, in {affected}: "
            "do not use this dtype with this checkpoint",
            "bold yellow",
        )
