"""Differential fuzz of fastbert against transformers.

A seed draws a case: a class, a configuration, mutations of the model before or after it becomes ours, a batch, and a
back end. `run` builds transformers' model, the same in float64 as the truth, and ours. It compares outputs, losses and
gradients, and requires that the model is bitwise equal after `restore`. Only errors that `fuzz_mutations` lists are
allowed.

    python tests/tools/fuzz.py --seconds 600 --seed 7    run the cases from seed 7 on for ten minutes
    python tests/tools/fuzz.py --case 1234               repeat the case of one seed
"""

import argparse
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from random import Random
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # set before Triton is imported

import torch
from fuzz_cases import Case, build, draw, encoder_of, inputs_of, keep_of
from fuzz_mutations import MUTATIONS
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert import tokens
from fastbert.fusion import class_name
from fastbert.ops import backend
from fastbert.testing import closeness, limit

# Limits relative to transformers' largest error in a case. Its error in one output with few numbers may be small by
# chance. Gradients have a larger factor, since they jump at the kinks of activations.
FACTORS = {"output": 10.0, "gradient": 30.0}
NO_TRITON = "RuntimeError: backend 'triton' cannot run"


class Fault(AssertionError):
    """fastbert differs from transformers."""


@dataclass
class Expected:
    """The results of transformers' model, each as a pair with the result in float64.

    differentiable: the names of the outputs that are finite and have a gradient.
    """

    model: nn.Module
    outputs: tuple[dict, dict]
    gradients: tuple[dict, dict]
    differentiable: list[str]


def check(seed: int) -> str:
    """`run` the case of a seed. Raises Fault with a description of the case."""
    case = draw(seed)
    try:
        return run(case)
    except Fault as fault:
        names = ", ".join(f"{name} {when}" for name, when in case.mutations)
        again = f"python tests/tools/fuzz.py --case {seed}"
        raise Fault(f"case {seed} ({names}): {fault}\n{case}\n    again: {again}") from fault


def run(case: Case) -> str:
    """Compare our model with transformers'. Raises Fault if they differ.

    Returns "compared", "unsupported: ..." with an allowed error of fastbert, or "transformers: ..." with its error.
    """
    with warnings.catch_warnings(), running_on(case.backend):
        warnings.simplefilter("ignore")
        try:
            expected = expect(case)
        except Exception as error:
            return f"transformers: {type(error).__name__}: {error}"
        with patched(case, "before"):
            unsupported, ours = None, mutate(build(case), case, "before")
            try:
                ours = made_ours(ours, case)
            except Exception as error:
                unsupported = allowed_error(case, error)
            with patched(case, "after"):
                mutate(ours, case, "after")
                try:
                    if unsupported is None:
                        check_call(ours, case, expected)
                except Fault:
                    raise
                except Exception as error:
                    unsupported = allowed_error(case, error)
                try:
                    if case.made != "drop-in":
                        check_restored(fastbert.restore(ours), case, expected.model)
                except ValueError as error:
                    unsupported = allowed_error(case, error)
    return unsupported or "compared"


@contextmanager
def running_on(chosen: str) -> Iterator[None]:
    """Use the back end of a case. Kernels run in Triton's interpreter."""
    with ExitStack() as stack:
        if chosen in ("host", "device"):
            stack.enter_context(mock.patch.object(backend, "_wants_kernels", return_value=True))
        if chosen == "device":
            stack.enter_context(mock.patch.object(tokens, "shapes_may_depend_on_data", return_value=False))
        stack.enter_context(fastbert.backend(chosen if chosen in ("eager", "triton") else "auto"))
        yield


@contextmanager
def patched(case: Case, when: str) -> Iterator[None]:
    """Apply the case's patches of the process for this time, "before" or "after"."""
    with ExitStack() as stack:
        for name, at in case.mutations:
            if at == when and MUTATIONS[name].of_process:
                stack.enter_context(MUTATIONS[name].apply(Random(f"{case.seed} {name}")))
        yield


def mutate(model: nn.Module, case: Case, when: str) -> nn.Module:
    """Apply the case's mutations of the model for this time, and return it."""
    for name, at in case.mutations:
        if at == when and not MUTATIONS[name].of_process:
            torch.manual_seed(case.seed)
            MUTATIONS[name].apply(model, encoder_of(model), Random(f"{case.seed} {name}"))
    return model


def made_ours(model: nn.Module, case: Case) -> nn.Module:
    if case.made == "drop-in":
        ours = getattr(fastbert, case.head)(deepcopy(model.config), **case.arguments)
        ours.to(case.dtype).load_state_dict(model.state_dict())
        return ours.train(case.training)
    if case.made == "inner first":
        fastbert.optimize(encoder_of(model))
    model = fastbert.optimize(model, dtype=case.dtype if case.casts else None)
    return deepcopy(model) if case.made == "deepcopy" else model


def expect(case: Case) -> Expected:
    """Return transformers' results after all mutations and patches of a case."""
    with patched(case, "before"):
        theirs, truth = (mutate(build(case), case, "before") for _ in range(2))
        with patched(case, "after"):
            return compute(mutate(theirs, case, "after"), mutate(truth, case, "after"), case)


def compute(theirs: nn.Module, truth: nn.Module, case: Case) -> Expected:
    """Return the results of two of transformers' models for a case. The second one is converted to float64."""
    if case.casts:
        theirs, truth = theirs.to(case.dtype), truth.to(case.dtype)
    for module in truth.double().modules():
        vars(module).update({name: x.double() for name, x in vars(module).items() if isinstance(x, Tensor)})
    inputs, exact = inputs_of(case, theirs), inputs_of(case, theirs)
    for name, x in exact.items():
        if x.is_floating_point():
            exact[name] = x.detach().double().requires_grad_(x.requires_grad)
    with differing_on_purpose(theirs, case), differing_on_purpose(truth, case):
        outputs, true_outputs = call(theirs, case, inputs), call(truth, case, exact)
    tensors = {name: x for name, x in outputs.items() if isinstance(x, Tensor)}
    names = [name for name, x in tensors.items() if x.requires_grad and x.isfinite().all()]
    gradients = backward(theirs, inputs, outputs, names), backward(truth, exact, true_outputs, names)
    return Expected(theirs, (outputs, true_outputs), gradients, names)


@contextmanager
def differing_on_purpose(model: nn.Module, case: Case) -> Iterator[None]:
    """Make transformers' model behave like fastbert where it differs on purpose, as docs/differences.md says."""
    keep, bert, handles = keep_of(case), encoder_of(model), []
    attention = bert.config._attn_implementation

    def pool_first_kept(module, args):
        hidden = args[0] * keep[..., None]
        if not isinstance(module, hf.BertPooler):
            return (hidden,)
        first = hidden[torch.arange(case.rows), keep.int().argmax(1)]
        return (torch.cat((first[:, None], hidden[:, 1:]), 1),)

    def no_answer_at_padding(module, args, output):
        return output.masked_fill(~keep[..., None], torch.finfo(output.dtype).min)

    if keep is not None and bert.pooler is not None:
        handles.append(bert.pooler.register_forward_pre_hook(pool_first_kept, prepend=True))
    if keep is not None and case.head == "BertForQuestionAnswering":
        handles.append(model.qa_outputs.register_forward_hook(no_answer_at_padding))
    if case.options.get("output_attentions"):
        model.set_attn_implementation("eager")
    yield
    bert.config._attn_implementation = attention
    for handle in handles:
        handle.remove()


def call(model: nn.Module, case: Case, inputs: dict) -> dict[str, Tensor | None]:
    """Return the outputs at kept tokens by name or position."""
    with torch.set_grad_enabled(case.gradients), torch.autocast("cpu", torch.bfloat16, case.autocast):
        outputs = model(**inputs, **case.options)
    keep = keep_of(case)

    def kept(x):
        if keep is None or not isinstance(x, Tensor) or x.ndim < 2 or len(x) != len(keep):
            return x
        x = x.transpose(1, 2) if x.ndim == 4 else x  # attention weights: queries first
        return x[keep] if x.shape[1] == case.seq_len else x

    named = enumerate(outputs) if isinstance(outputs, tuple) else outputs.items()
    return {
        f"{name}[{index}]": kept(x)
        for name, value in named
        for index, x in enumerate(value if isinstance(value, tuple) else (value,))
    }


def backward(model: nn.Module, inputs: dict, outputs: dict, names: list[str]) -> dict[str, Tensor | None]:
    """Return the gradients of a randomly weighted sum of these outputs, by parameter and input."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for name in names:
        x = outputs[name]
        weights = torch.randn(x.shape, generator=generator) / max(x.numel(), 1) ** 0.5
        total = total + (x * weights.to(x.dtype)).sum()
    if names:
        total.backward()
    leaves = {name: x for name, x in inputs.items() if x.requires_grad} | dict(model.named_parameters())
    return {name: None if x.grad is None else x.grad.to_dense() for name, x in leaves.items()}


def check_call(ours: nn.Module, case: Case, expected: Expected) -> None:
    inputs = inputs_of(case, expected.model, ours=True)
    outputs = call(ours, case, inputs)
    backend.raise_bad_ids(torch.device("cpu"))  # raises bad ids here, not in the next case
    compare("output", outputs, *expected.outputs)
    compare("gradient", backward(ours, inputs, outputs, expected.differentiable), *expected.gradients)


def compare(what: str, ours: dict, theirs: dict, truth: dict) -> None:
    """Raise Fault unless ours has the same names and types as theirs, and values within the tolerance of the truth."""
    if list(ours) != list(theirs):
        raise Fault(f"{what}s that only one side has: {sorted(set(ours) ^ set(theirs))}")
    measured, unit = {}, 0.0
    for name, value in theirs.items():
        if type(ours[name]) is not type(value):
            raise Fault(f"{what} {name}: {type(ours[name]).__name__}, transformers {type(value).__name__}")
        if not isinstance(value, Tensor):
            continue
        try:
            found = closeness(ours[name], value, truth[name])
        except ValueError as error:
            raise Fault(f"{what} {name}: {error}") from None
        if found:
            size = truth[name][value.isfinite()].abs().max().item()
            # There is no wider type than float64 for the truth, so float64 is compared with float32's rounding.
            rounding = torch.finfo(torch.float32 if value.dtype == torch.float64 else value.dtype).eps
            measured[name] = found[0], size, value.dtype
            unit = max(unit, found[0].their_error, rounding * size)
    for name, (found, size, dtype) in measured.items():
        allowed = limit(unit, size, dtype, FACTORS[what])
        if not found.error <= allowed:
            errors = f"transformers' {found.their_error:.3g}, allowed {allowed:.3g}"
            raise Fault(f"{what} {name}: error {found.error:.3g} of values up to {size:.3g}, {errors}")


def check_restored(model: nn.Module, case: Case, theirs: nn.Module) -> None:
    """Raise Fault unless a restored model has transformers' classes again and is bitwise equal."""
    if case.casts:
        theirs, state = build(case), model.state_dict()
        different = [name for name, x in theirs.state_dict().items() if not torch.equal(x, state[name])]
    elif "max_norm" in dict(case.mutations):
        different = []  # every call renormalizes the table, with a rounding
    else:
        inputs = inputs_of(case, theirs)
        with differing_on_purpose(model, case), differing_on_purpose(theirs, case):
            found, outputs = call(model, case, inputs), call(theirs, case, inputs)
        same = partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
        different = [name for name, x in outputs.items() if isinstance(x, Tensor) and not same(found[name], x)]
    classes = ([class_name(module) for module in each.modules()] for each in (model, theirs))
    different += [f"a {ours} for a {was}" for ours, was in zip(*classes, strict=True) if ours != was]
    if different:
        raise Fault(f"these differ after restore: {different}")


def allowed_error(case: Case, error: Exception) -> str:
    """Return "unsupported: ..." for an error that a mutation or the back end of the case allows, else raise Fault."""
    message = f"{type(error).__name__}: {error}"
    allowed = [MUTATIONS[name].error for name, _ in case.mutations]
    allowed += [NO_TRITON] if case.backend == "triton" else []
    if any(pattern and re.search(pattern, message) for pattern in allowed):
        return f"unsupported: {message}"
    raise Fault(f"{message}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the first seed (default: the time)")
    parser.add_argument("--case", type=int, help="run only the case of this seed")
    options = parser.parse_args()
    outcomes, end = Counter(), time.monotonic() + options.seconds
    seed = first = options.seed if options.case is None else options.case
    while seed == first or (options.case is None and time.monotonic() < end):
        try:
            outcomes[check(seed).partition(":")[0]] += 1
        except Fault as fault:
            outcomes["FAULT"] += 1
            print(fault, flush=True)
        seed += 1
    print(f"seeds {first} to {seed - 1}:", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return bool(outcomes["FAULT"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
