"""The BertFor* classes: transformers' heads and losses on this package's encoder.

Each class derives from the class of the same name in transformers and inherits its modules, and its forward and loss
unless they are overridden here. Logits come from plain `nn.Linear`s, because other libraries select modules by type.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as hf
from transformers.utils.generic import can_return_tuple

from fastbert import patches
from fastbert.fusion import fused_linear, linear_of_any_rank
from fastbert.model import OURS, become_ours
from fastbert.ops import backend
from fastbert.ops.backend import is_jit_tracing
from fastbert.outputs import output_of
from fastbert.pretrained import BertPreTrainedModel
from fastbert.replaying import replays
from fastbert.tokens import copied_to


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """A head's linear layer of x [..., E], computed by the encoder's op, so that logits do not depend on the batch.

    With gradients the module itself is called, because its backward recomputes nothing. A jit trace always uses the op,
    because it must not depend on grad mode.
    """
    if torch.is_grad_enabled() and not is_jit_tracing():
        return linear(x)
    fused, reason = fused_linear(linear)
    if fused is None:
        assert reason is not None
        backend.fall_back("a head's linear layer", reason, x.device)
        return linear(x)
    return linear_of_any_rank(x, fused, "none")


class BertPredictionHeadTransform(hf.BertPredictionHeadTransform):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., E] -> [..., E]"""
        if patches.replaced_forward(hf.BertPredictionHeadTransform):
            return super().forward(hidden_states)
        return self.LayerNorm(self.transform_act_fn(project(self.dense, hidden_states)))


class BertLMPredictionHead(hf.BertLMPredictionHead):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., E] -> [..., V]"""
        if patches.replaced_forward(hf.BertLMPredictionHead):
            return super().forward(hidden_states)
        return project(self.decoder, self.transform(hidden_states))


class BertOnlyNSPHead(hf.BertOnlyNSPHead):
    def forward(self, pooled_output: Tensor) -> Tensor:
        """[..., E] -> [..., 2]"""
        if patches.replaced_forward(hf.BertOnlyNSPHead):
            return super().forward(pooled_output)
        return project(self.seq_relationship, pooled_output)


class BertPreTrainingHeads(hf.BertPreTrainingHeads):
    def forward(self, sequence_output: Tensor, pooled_output: Tensor) -> tuple[Tensor, Tensor]:
        """[..., E] and [..., E] -> [..., V] and [..., 2]"""
        if patches.replaced_forward(hf.BertPreTrainingHeads):
            return super().forward(sequence_output, pooled_output)
        return self.predictions(sequence_output), project(self.seq_relationship, pooled_output)


# transformers' class of a head's part -> ours.
PARTS: dict[type, type] = {
    hf.BertPredictionHeadTransform: BertPredictionHeadTransform,
    hf.BertLMPredictionHead: BertLMPredictionHead,
    hf.BertOnlyNSPHead: BertOnlyNSPHead,
    hf.BertPreTrainingHeads: BertPreTrainingHeads,
}

# transformers' heads that compute the same as ours of the same name.
ALIKE = (hf.BertForSequenceClassification, hf.BertForTokenClassification)
# transformers' class -> the linear layers that our class calls through `project`.
PROJECTIONS = {
    hf.BertPredictionHeadTransform: ("dense",),
    hf.BertLMPredictionHead: ("decoder",),
    hf.BertOnlyNSPHead: ("seq_relationship",),
    hf.BertPreTrainingHeads: ("seq_relationship",),
    hf.BertForSequenceClassification: ("classifier",),
    hf.BertForTokenClassification: ("classifier",),
    hf.BertForMultipleChoice: ("classifier",),
    hf.BertForQuestionAnswering: ("qa_outputs",),
}


class Head(BertPreTrainedModel):
    """The common part of the heads."""

    bert: hf.BertModel

    def post_init(self):
        become_ours(self, {**OURS, **PARTS})
        super().post_init()

    def _encode(
        self, kind: type, input_ids: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None,
        position_ids: Tensor | None, inputs_embeds: Tensor | None, **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:  # fmt: skip
        """The outputs of the encoder.

        Raises ValueError if the forward of kind, transformers' class that ours replaces, is patched for every model.
        """
        if replaced := patches.replaced_forward(kind):
            raise ValueError(f"{replaced}, which fastbert does not run: undo that, or use transformers' class")
        return self.bert(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, return_dict=True, **kwargs,
        )  # fmt: skip


class BertForPreTraining(Head, hf.BertForPreTraining):
    """Masked language modeling and next sentence prediction: logits [B, S, V] and [B, 2]."""


class BertForMaskedLM(Head, hf.BertForMaskedLM):
    """Masked language modeling: logits [B, S, V]."""


class BertForNextSentencePrediction(Head, hf.BertForNextSentencePrediction):
    """Next sentence prediction: logits [B, 2]."""


def _sequence_loss(model: "BertForSequenceClassification", logits: Tensor, labels: Tensor) -> Tensor | None:
    """transformers' loss of logits [B, num_labels], by config.problem_type, which is inferred from the labels if None.

    The loss classes are looked up in transformers' module, because users replace them there.
    """
    kind, num_labels = model.config.problem_type, model.num_labels
    if kind is None:
        if num_labels == 1:
            kind = "regression"
        elif labels.dtype in (torch.long, torch.int):
            kind = "single_label_classification"
        else:
            kind = "multi_label_classification"
        model.config.problem_type = kind
    if kind == "regression":
        both = (logits.squeeze(), labels.squeeze()) if num_labels == 1 else (logits, labels)
        return hf.MSELoss()(*both)
    if kind == "single_label_classification":
        return hf.CrossEntropyLoss()(logits.view(-1, num_labels), labels.view(-1))
    return hf.BCEWithLogitsLoss()(logits, labels) if kind == "multi_label_classification" else None


class BertForSequenceClassification(Head, hf.BertForSequenceClassification):
    """Classification or regression of sequences: logits [B, num_labels]."""

    num_labels: int

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """labels: classes as integers [B], regression targets as floats [B] or [B, num_labels], or 0/1 floats
        [B, num_labels]. config.problem_type says which; if it is None, num_labels and the first labels set it."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self._encode(hf.BertForSequenceClassification, *inputs, **kwargs)
        logits = project(self.classifier, self.dropout(outputs[1]))
        return output_of(
            SequenceClassifierOutput,
            loss=None if labels is None else _sequence_loss(self, logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BertForTokenClassification(Head, hf.BertForTokenClassification):
    """Classification of tokens: logits [B, S, num_labels]."""

    num_labels: int

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """labels: classes as integers [B, S]; -100 is ignored."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self._encode(hf.BertForTokenClassification, *inputs, **kwargs)
        logits = project(self.classifier, self.dropout(outputs[0]))
        return output_of(
            TokenClassifierOutput,
            loss=None if labels is None else hf.CrossEntropyLoss()(logits.view(-1, self.num_labels), labels.view(-1)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BertForMultipleChoice(Head, hf.BertForMultipleChoice):
    """A choice between sequences: logits [B, choices]."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """All inputs are [B, choices, S], labels integers [B]; logits are [B, choices].

        Unlike transformers, this supports non-contiguous inputs and empty batches.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or given.ndim < 3:
            shape = None if given is None else list(given.shape)
            raise ValueError(f"pass input_ids [B, choices, S] or inputs_embeds [B, choices, S, E], got {shape}")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flat = (x.flatten(0, 1) if isinstance(x, Tensor) and x.ndim > 2 else x for x in inputs)
        outputs = self._encode(hf.BertForMultipleChoice, *flat, **kwargs)
        logits = project(self.classifier, self.dropout(outputs.pooler_output)).view(given.shape[:2])
        return output_of(
            MultipleChoiceModelOutput,
            loss=None if labels is None else hf.CrossEntropyLoss()(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _position_loss(logits: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
    """Cross entropy of logits [B, S] at positions [B]. Positions at padding or past the sequence are ignored."""
    past_the_end = logits.shape[1]
    positions = positions.clamp(0, past_the_end)
    if padding is not None:
        on_padding = padding.gather(1, positions.clamp(max=past_the_end - 1)[:, None])[:, 0]
        positions = positions.masked_fill(on_padding, past_the_end)
    return cross_entropy(logits, positions, ignore_index=past_the_end)


class BertForQuestionAnswering(Head, hf.BertForQuestionAnswering):
    """The start and the end of an answer: two logits [B, S]."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """start_logits and end_logits [B, S] are the dtype's minimum at padding, so that argmax never picks padding.

        start_positions, end_positions: integers [B]; those past the sequence or at padding are ignored.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self._encode(hf.BertForQuestionAnswering, *inputs, **kwargs)
        logits = project(self.qa_outputs, outputs[0])
        padding = None
        if attention_mask is not None and attention_mask.ndim == 2:
            padding = (copied_to(logits.device, attention_mask) == 0).expand(logits.shape[:2])
            logits = logits.masked_fill(padding[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = (x.squeeze(-1).contiguous() for x in logits.split(1, dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            ends = ((start_logits, start_positions), (end_logits, end_positions))
            loss = sum(_position_loss(scores, positions.view(-1), padding) for scores, positions in ends) / 2
        return output_of(
            QuestionAnsweringModelOutput,
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


replays(
    BertForPreTraining,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForMultipleChoice,
    BertForQuestionAnswering,
)
