"""The BertFor* classes: transformers' heads and losses on this package's encoder.

Each class derives from transformers' of the same name and takes its forward, its loss and its head modules from there;
only what differs on purpose is written here.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import MultipleChoiceModelOutput, QuestionAnsweringModelOutput
from transformers.models.bert import modeling_bert as hf
from transformers.utils.generic import can_return_tuple

from fastbert import ops, patches
from fastbert.fusion import ORIGINAL
from fastbert.model import become_ours
from fastbert.pretrained import BertPreTrainedModel
from fastbert.tokens import copied_to


class Projection(nn.Linear):
    """A head's linear layer in the op of the encoder's, so that logits do not depend on the batch either.

    With gradients it is nn.Linear's own forward, whose backward has nothing to compute again.
    """

    def forward(self, x: Tensor) -> Tensor:
        plain = all(type(parameter) is nn.Parameter for parameter in (self.weight, self.bias))
        if torch.is_grad_enabled() or not plain or patches.replaced():
            return super().forward(x)
        return ops.linear_activation(x.flatten(0, -2), self.weight, self.bias, "none").unflatten(0, x.shape[:-1])


# Where the heads keep what makes logits of hidden states.
LOGITS = ("cls", "classifier", "qa_outputs")


def plain_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that make a model's logits and are not `Projection`s."""
    parts = (getattr(model, name, None) for name in LOGITS)
    return [x for part in parts if part is not None for x in part.modules() if type(x) is nn.Linear]


class Head(BertPreTrainedModel):
    """What the heads have in common: the linear layers that make their logits are `Projection`s."""

    def post_init(self):
        become_ours(self)
        for linear in plain_linears(self):
            linear.__class__ = Projection
        super().post_init()

    def refuse_patches(self, kind: type) -> None:
        """Raise ValueError if an optimized head has a forward of ours in the place of one that was patched since."""
        if ORIGINAL in self.__dict__ and (replaced := patches.replaced_forward(kind)):
            raise ValueError(f"{replaced}, and fastbert has its own: take that back, or fastbert.restore the model")


class BertForPreTraining(Head, hf.BertForPreTraining):
    """Masked language modeling and next sentence prediction: logits [B, S, V] and [B, 2]."""


class BertForMaskedLM(Head, hf.BertForMaskedLM):
    """A logit for every token of the vocabulary at every place: [B, S, V]."""


class BertForNextSentencePrediction(Head, hf.BertForNextSentencePrediction):
    """Whether the second sentence follows the first: logits [B, 2]."""


class BertForSequenceClassification(Head, hf.BertForSequenceClassification):
    """Classification or regression of texts: logits [B, num_labels]."""


class BertForTokenClassification(Head, hf.BertForTokenClassification):
    """Classification of tokens: logits [B, S, num_labels]."""


class BertForMultipleChoice(Head, hf.BertForMultipleChoice):
    """A choice between texts: logits [B, choices]."""

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
        """Every input has transformers' shape [B, choices, S]; logits are [B, choices], labels integers [B].

        Unlike transformers' this also takes tensors that are not contiguous and batches without a text or a token.
        """
        self.refuse_patches(hf.BertForMultipleChoice)
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or given.ndim < 3:
            shape = None if given is None else list(given.shape)
            raise ValueError(f"pass input_ids [B, choices, S] or inputs_embeds [B, choices, S, E], got {shape}")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flat = (x.flatten(0, 1) if isinstance(x, Tensor) and x.ndim > 2 else x for x in inputs)
        outputs = self.bert(*flat, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(given.shape[:2])
        return MultipleChoiceModelOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _position_loss(logits: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
    """Cross entropy of logits [B, S] at positions [B], over those that lie on a token."""
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
        """start_logits and end_logits [B, S] are the dtype's minimum at padding, so that no answer lies there.

        start_positions, end_positions: integers [B]; past the sequence or at padding they count in no loss.
        """
        self.refuse_patches(hf.BertForQuestionAnswering)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.bert(*inputs, return_dict=True, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)
        padding = None
        if attention_mask is not None and attention_mask.ndim == 2:
            padding = (copied_to(logits.device, attention_mask) == 0).expand(logits.shape[:2])
            logits = logits.masked_fill(padding[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = (x.squeeze(-1).contiguous() for x in logits.split(1, dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            ends = ((start_logits, start_positions), (end_logits, end_positions))
            loss = sum(_position_loss(scores, positions.view(-1), padding) for scores, positions in ends) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
