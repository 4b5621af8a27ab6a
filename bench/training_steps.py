"""Training steps of BertForSequenceClassification: fastbert and its peers with the same weights, checked before timing.

The weights are float32. A case in bfloat16 runs the forward under autocast.
"""

import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import torch
import transformers
from memory import peak_memory_bytes
from providers import (
    BASELINE,
    COMPILED,
    MASKLESS,
    OURS,
    batch_of,
    compiled,
    graph_breaks,
    maskless_if_full,
    require_right,
    source,
)
from torch import Tensor, nn
from workloads import DEVICE, TrainingCase, inputs

import fastbert
from fastbert.testing import limit

# The class and the attention of each model before compilation.
MODELS = {
    "fastbert": (fastbert.BertForSequenceClassification, "sdpa"),
    "transformers-eager": (transformers.BertForSequenceClassification, "eager"),
    BASELINE: (transformers.BertForSequenceClassification, "sdpa"),
    MASKLESS: (transformers.BertForSequenceClassification, MASKLESS),
}
LEARNING_RATE = 1e-5
# The sequences in one backward of the reference, whose activations in float64 would not fit a GPU for large batches.
REFERENCE_ROWS = 8


def labels_of(case: TrainingCase) -> Tensor:
    """Return labels, int64 [B]: one of class 1 in four.

    With as many of each class, gradients of biases nearly cancel, and rounding is a large part of what is left.
    """
    return (torch.arange(case.batch, device=DEVICE) % 4 == 0).long()


def model_of(case: TrainingCase, name: str) -> nn.Module:
    """Return a new model of MODELS in training mode. All start with the same weights."""
    model_class, attention = MODELS[name]
    encoder = source(case.model, "float32")
    config = deepcopy(encoder.config)
    config._attn_implementation = attention
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = case.dropout
    with DEVICE:
        model = model_class(config)
    model.bert.load_state_dict(encoder.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.classifier.weight
        weight.copy_(config.initializer_range * torch.randn(weight.shape, generator=generator))
    return model.train()


class Step:
    """A provider's training step: clear the gradients, forward, backward and fused AdamW."""

    def __init__(self, case: TrainingCase, provider: str):
        name, mode = COMPILED.get(provider, (provider, None))
        self.model = model_of(case, maskless_if_full(case, name) if mode else name)
        self._forward = compiled(self.model, mode) if mode else self.model
        self._batch = batch_of(case, provider) | {"labels": labels_of(case)}
        self._autocast = case.dtype == "bfloat16"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()

    def backward(self) -> Tensor:
        """Run the step without the optimizer's update, which leaves new gradients, and return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self._autocast):
            loss = self._forward(**self._batch).loss
        loss.backward()
        return loss.detach()

    def peak_bytes(self) -> int:
        """Return the peak memory of a step: activations, gradients and temporaries, without weights and optimizer."""
        # The first step allocates the optimizer's state. Gradients of an earlier step would count as allocated before.
        self()
        self.optimizer.zero_grad(set_to_none=True)
        return peak_memory_bytes(self, DEVICE)


@lru_cache(maxsize=1)
def baseline_of(case: TrainingCase) -> Step:
    """Return the baseline's step, checked, which all providers of a case share."""
    return checked(case, BASELINE)[0]


def checked(case: TrainingCase, provider: str) -> tuple[Step, dict]:
    """Return a provider's step after a check of its loss and gradients, and fields of its record.

    Raises ArithmeticError if they are wrong, and RuntimeError if fastbert does not run in its kernels on a GPU.
    """
    step = Step(case, provider)
    in_kernels = provider == "fastbert" and DEVICE.type == "cuda"
    with fastbert.backend("triton") if in_kernels else nullcontext():
        start = time.perf_counter()
        step.backward().item()
        fields = {"first_call_s": time.perf_counter() - start}
        if case.dropout:
            require_dropout(case, step, repeats=provider in OURS)
        else:
            fields |= errors(case, step)
    if provider in COMPILED:
        fields["graph_breaks"] = graph_breaks()
    return step, fields


def errors(case: TrainingCase, step: Step) -> dict:
    """Return error and error_ratio of a step's gradients without dropout: the largest relative error of a parameter's.

    Raises ArithmeticError if they or the loss are wrong by `fastbert.testing.limit`.
    """
    loss, gradients, loss_error, gradient_error = _reference(case)
    found = step.backward()
    require_right((found - loss).abs().item(), loss_error, loss, case.dtype, BASELINE)
    # The reference is relative to itself, so its size is 1.
    return require_right(relative_error(step.model, gradients), gradient_error, torch.ones(()), case.dtype, BASELINE)


def require_dropout(case: TrainingCase, step: Step, repeats: bool) -> None:
    """Raise ArithmeticError unless the loss depends on the seed, and the gradients are finite and differ from those
    without dropout by more than `fastbert.testing.limit`. repeats: one seed must also give the same loss twice."""
    _, gradients, _, gradient_error = _reference(replace(case, dropout=0.0))
    losses = []
    for seed in (1, 0, 0):
        torch.manual_seed(seed)
        losses.append(step.backward().item())
    other, first, again = losses
    error = relative_error(step.model, gradients)
    if not torch.tensor([*losses, error]).isfinite().all():
        raise ArithmeticError(f"with dropout the losses are {losses}, and the gradients err by {error:.2e}")
    if other == first:
        raise ArithmeticError(f"two seeds of dropout give the same loss, {first}")
    if error <= limit(gradient_error, 1.0, getattr(torch, case.dtype)):
        raise ArithmeticError(f"with dropout the gradients differ by only {error:.2e} from those without")
    if repeats and first != again:
        raise ArithmeticError(f"the same seed of dropout gives the losses {first} and {again}")


@lru_cache(maxsize=1)
def _reference(case: TrainingCase) -> tuple[Tensor, dict[str, Tensor], float, float]:
    """Return the loss and the gradients of a case without dropout in float64, and the baseline's errors in both."""
    model, batch, labels = model_of(case, BASELINE).double(), inputs(case), labels_of(case)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for rows in torch.arange(case.batch, device=DEVICE).split(REFERENCE_ROWS):
        part = model(**{name: x[rows] for name, x in batch.items()}, labels=labels[rows]).loss * len(rows) / case.batch
        part.backward()
        loss += part.detach()
    # A key's bias changes no softmax: its gradient is zero up to rounding.
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.endswith("key.bias")}
    baseline = Step(case, BASELINE)
    loss_error = (baseline.backward() - loss).abs().item()
    return loss, gradients, loss_error, relative_error(baseline.model, gradients)


def relative_error(model: nn.Module, reference: dict[str, Tensor]) -> float:
    """Return the largest relative error of a parameter's gradient: the norm of the difference over the reference's.

    It is infinite if a gradient is missing, and NaN if one has a NaN.
    """
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    if any(found[name] is None for name in reference):
        return float("inf")
    return torch.stack([(found[name] - x).norm() / x.norm() for name, x in reference.items()]).max().item()
