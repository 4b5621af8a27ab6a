"""`fastbert verify`: every class beside transformers', by a checkpoint's weights, under the project's tolerance rule.

The truth is transformers' model in float64, of the weights as the dtype has rounded them. What differs on purpose is
left out: hidden states and logits at padding, what is pooled where padding is on the left (transformers pools a pad),
and question answering's loss with padding (which takes an answer there for possible). Letters as in `fastbert.tokens`.
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

import fastbert
from fastbert.commands.checkpoint import Checkpoint, right_padding, served
from fastbert.commands.closeness import Closeness, closeness

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

# (B, S) of the batches; on a GPU also around 64 and 128 tokens, where kernels change. The longest texts come on top.
SHAPES = {
    "cpu": ((4, 1), (4, 16), (4, 128)),
    "cuda": ((8, 1), (8, 16), (8, 63), (8, 64), (8, 65), (64, 128), (8, 129)),
}
LONGEST_BATCH = 2
STATES_SHAPE = (4, 32)
# Losses are single numbers, of which transformers' may be right by luck: of many batches the largest errors compare.
HEAD_SHAPE, HEAD_BATCHES = (2, 12), 6


class Models(NamedTuple):
    ours: nn.Module
    theirs: nn.Module
    truth: nn.Module

    @torch.no_grad()
    def __call__(self, **inputs) -> tuple:
        """The outputs of each on the same inputs, whose floats take the model's dtype."""
        device = self.ours.device
        return tuple(
            model(
                **{name: x.to(device, model.dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
                   for name, x in inputs.items()},
                return_dict=True,
            )
            for model in self
        )  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Of all that was compared under a subject, what came closest to its limit, or went the farthest beyond, and the
    output and the batch where it did."""

    subject: str
    where: str
    closeness: Closeness


class Verified(NamedTuple):
    """A class in a dtype: its verdicts, what served our model, and the parameters that the checkpoint lacks."""

    model_class: str
    dtype: str
    verdicts: list[Verdict]
    served: str
    lacking: list[str]

    @property
    def holds(self) -> bool:
        return all(verdict.closeness.holds for verdict in self.verdicts)


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

    shapes: (B, S) of BertModel's batches; by default what suits the device.
    """
    if shapes is None:
        longest = checkpoint.config.max_position_embeddings
        shapes = [shape for shape in SHAPES[device.type] if shape[1] < longest] + [(LONGEST_BATCH, longest)]
    for model_class in classes:
        ours, theirs, lacking = checkpoint.pair(model_class)
        for dtype in dtypes:
            rounded = [deepcopy(model).to(device, getattr(torch, dtype)) for model in (ours, theirs)]
            models = Models(*rounded, deepcopy(rounded[1]).double())
            found = _model(checkpoint, models, shapes) if model_class == "BertModel" else _head(checkpoint, models)
            yield Verified(model_class, dtype, _verdicts(found), served(models.ours), lacking)


def _verdicts(found: Iterable[Compared]) -> list[Verdict]:
    worst: dict[str, Verdict] = {}
    for subject, where, values in found:
        for each in closeness(*values):
            if subject not in worst or each.share > worst[subject].closeness.share:
                worst[subject] = Verdict(subject, where, each)
    return list(worst.values())


def _model(checkpoint: Checkpoint, models: Models, shapes: Iterable[tuple[int, int]]) -> Iterator[Compared]:
    for shape in shapes:
        for kind, mask in masks(*shape).items():
            outputs = models(**checkpoint.batch(*shape), **_given(kind, mask))
            for name, values in _values(outputs, MODEL_OUTPUTS, kind, mask):
                yield Compared(f"BertModel {name}", f"{shape[0]}x{shape[1]} {kind}", values)
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


def _head(checkpoint: Checkpoint, models: Models) -> Iterator[Compared]:
    model_class, config = type(models.ours).__name__, models.ours.config
    shape = _fitting(HEAD_SHAPE, checkpoint)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for kind, mask in masks(*shape).items():
        of_batches: dict[str, list[tuple[Tensor, ...]]] = {}
        for index in range(HEAD_BATCHES):
            inputs = checkpoint.batch(*shape, first=index * shape[0]) | _given(kind, mask)
            if model_class == "BertForMultipleChoice":
                inputs = {name: x[None] for name, x in inputs.items()}
            outputs = models(**inputs, **_labels(model_class, config, mask, generator))
            for name, values in _values(outputs, HEADS[model_class], kind, mask):
                of_batches.setdefault(name, []).append(values)
            if _compares_loss(model_class, kind):
                losses.append(tuple(each.loss for each in outputs))
        for name, values in of_batches.items():
            together = tuple(torch.cat([x.flatten() for x in each]) for each in zip(*values, strict=True))
            yield Compared(model_class, f"{name}, {kind}", together)
    yield Compared(model_class, "loss", tuple(torch.stack(each) for each in zip(*losses, strict=True)))


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
    if model_class == "BertForQuestionAnswering":
        return kind == "full"
    return kind != "left" or not HEADS[model_class].of_texts


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
            close = verdict.closeness
            errors = (f"{error:.1e}" for error in (close.error, close.their_error, close.limit))
            told = Text("ok", "green") if close.holds else Text("MISS", "bold red")
            table.add_row(verdict.subject, *errors, f"{verdict.where}, {close.measure}", told)
    return table


def remarks(found: Sequence[Verified]) -> Iterator[Text]:
    """What has to be known beside the table, the sum of it last."""
    yield Text("limit: three times transformers' own error and one rounding, in the maximum and in the rms")
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
    else:
        yield Text("fastbert gives transformers' results here, all within the limit", "bold green")
