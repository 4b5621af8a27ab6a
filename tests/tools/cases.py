"""Cases that the tests share: heads, configurations, masks, and pairs of our model and transformers'."""

from copy import deepcopy

import torch
import transformers
from torch import Tensor, nn

import fastbert

HEADS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForMultipleChoice",
    "BertForQuestionAnswering",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BATCH, SEQ_LEN, VOCAB = 4, 12, 61

_KEPT = {
    "right": [[1] * n + [0] * (SEQ_LEN - n) for n in (12, 7, 1, 4)],
    "left": [[0] * (SEQ_LEN - n) + [1] * n for n in (12, 7, 1, 4)],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1], [0] * 5 + [1] * 2 + [0] * 5, [1, 0] * 6, [1] * 12],
    "full": [[1] * SEQ_LEN] * BATCH,
}
MASKS = {name: torch.tensor(rows) for name, rows in _KEPT.items()}


def tiny_config(**settings) -> transformers.BertConfig:
    """Return a configuration with no powers of two, no dropout, and weights so large that bugs show."""
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 80,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return transformers.BertConfig(**(defaults | settings))


def with_random_weights(model: nn.Module) -> nn.Module:
    """Add noise to every parameter and return the model in eval mode.

    Biases and norms start as constants, with which a missing bias would not show.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def saved(model_class: type, path, tokenizer, **settings) -> str:
    """Save a small model of transformers' with random weights and this tokenizer, and return its folder."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=64, num_hidden_layers=2, **settings)
    with_random_weights(model_class(config)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def pair(head: str = "BertModel", attention: str = "sdpa", **settings) -> tuple[nn.Module, nn.Module]:
    """Return our model and transformers' with the same random weights, in eval mode."""
    torch.manual_seed(0)
    config = tiny_config(**settings)
    config._attn_implementation = attention
    theirs = with_random_weights(getattr(transformers, head)(config))
    ours = getattr(fastbert, head)(deepcopy(config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(mask: str | None = "right", seed: int = 0) -> dict[str, Tensor]:
    """Return input_ids, token_type_ids [4, 12] and, unless mask is None, an attention_mask of `MASKS`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "input_ids": torch.randint(0, VOCAB, (BATCH, SEQ_LEN), generator=generator),
        "token_type_ids": torch.randint(0, 2, (BATCH, SEQ_LEN), generator=generator),
    }
    return inputs if mask is None else inputs | {"attention_mask": MASKS[mask]}


def labels(head: str, seed: int = 0) -> dict[str, Tensor]:
    """Return labels for `head`. Token labels are -100 in the first column, as at padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN), generator=generator)
    tokens[:, 0] = -100
    sequences = torch.randint(0, 2, (BATCH,), generator=generator)
    return {
        "BertModel": {},
        "BertForPreTraining": {"labels": tokens, "next_sentence_label": sequences},
        "BertForMaskedLM": {"labels": tokens},
        "BertForNextSentencePrediction": {"labels": sequences},
        "BertForSequenceClassification": {"labels": sequences},
        "BertForTokenClassification": {"labels": torch.where(tokens < 0, tokens, tokens % 2)},
        "BertForMultipleChoice": {"labels": sequences[:2]},
        "BertForQuestionAnswering": {"start_positions": sequences, "end_positions": sequences + 3},
    }[head]


def inputs_for(head: str, mask: str | None = "right", with_labels: bool = False) -> dict[str, Tensor]:
    """Return a batch in the shape that `head` needs: [2, 2, S] for multiple choice."""
    inputs = batch(mask)
    if head == "BertForMultipleChoice":
        inputs = {name: x.view(2, 2, SEQ_LEN) for name, x in inputs.items()}
    return inputs | (labels(head) if with_labels else {})


def at_kept_tokens(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return an output at kept tokens if it is [B, S, ...], else the whole output."""
    if mask is None or value.shape[:2] != mask.shape:
        return value
    return value[mask.bool()]
