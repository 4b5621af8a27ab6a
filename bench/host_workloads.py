"""Calls in which Python takes most of the time, and the worker process in which bench/compare.py times them.

Models are tiny, so that arithmetic takes little time, or BERT base where kernels do nothing. Only public names of
fastbert are used, so that the workloads run with other commits. The host suite needs more; it is imported only by its
own workloads, so that the others run without it.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

import torch
import transformers

import fastbert

SHAPE, NUM_LAYERS = (1, 16), 6
SIZES = {"vocab_size": 1000, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
CONFIG = transformers.BertConfig(num_hidden_layers=NUM_LAYERS, **SIZES)
BLOCK_SECONDS = 0.02


@contextmanager
def _in_kernels(size: str, graphed: bool = False) -> Iterator[Callable]:
    """A forward in kernels as in the host suite, without the work of a GPU and its driver."""
    import bench_host as host

    case = host.HostCase(size, *SHAPE, "bfloat16")
    with host.as_on_a_gpu(), host.launching_into(host.TARGET, lambda name, grid, arguments: None):
        yield host.forward_of(case, 12 if size == "base" else NUM_LAYERS, graphed)


@contextmanager
def _on_the_cpu(model) -> Iterator[Callable]:
    """A forward in plain PyTorch."""
    ids, model = torch.ones(SHAPE, dtype=torch.long), model.eval()
    with torch.no_grad():
        yield lambda: model(input_ids=ids, attention_mask=ids, token_type_ids=torch.zeros_like(ids))


@contextmanager
def _training(model) -> Iterator[Callable]:
    """Forward and backward in plain PyTorch."""
    ids, labels, model = torch.ones(SHAPE, dtype=torch.long), torch.zeros(SHAPE[0], dtype=torch.long), model.train()

    def step():
        model.zero_grad()
        model(input_ids=ids, attention_mask=ids, labels=labels).loss.backward()

    yield step


# Name -> function that returns a context with the call.
WORKLOADS = {
    "launches": lambda: _in_kernels("tiny"),
    "base launches": lambda: _in_kernels("base"),
    "replay": lambda: _in_kernels("tiny", graphed=True),
    "base replay": lambda: _in_kernels("base", graphed=True),
    "forward": lambda: _on_the_cpu(fastbert.BertModel(CONFIG)),
    "classifier": lambda: _on_the_cpu(fastbert.BertForSequenceClassification(CONFIG)),
    "optimized": lambda: _on_the_cpu(fastbert.optimize(transformers.BertModel(CONFIG))),
    "training": lambda: _training(fastbert.BertForSequenceClassification(CONFIG)),
}


def _seconds(call: Callable) -> float:
    """Return the median seconds of consecutive calls within BLOCK_SECONDS."""
    seconds, begin = [], time.perf_counter()
    while not seconds or time.perf_counter() - begin < BLOCK_SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def answer_requests() -> None:
    """Answer each line of stdin, a workload's name, with a line of JSON.

    It has the "seconds" of a call, or "absent" with the reason why the workload does not run. A workload stays prepared
    until another one is requested.
    """
    # An editable installation would provide modules that the other commit does not have.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "fastbert" not in repr(finder)]
    # Both processes of a pair run on one core, so that other load on it affects both.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    answers, prepared = sys.stdout, None
    with redirect_stdout(sys.stderr), ExitStack() as stack:
        for name in map(str.strip, sys.stdin):
            try:
                if name != prepared:
                    stack.close()
                    call = stack.enter_context(WORKLOADS[name]())
                    call()  # prepares launches and compiles
                    prepared = name
                answer = {"seconds": _seconds(call)}
            except Exception as problem:
                answer, prepared = {"absent": " ".join(f"{type(problem).__name__}: {problem}".split())}, None
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answer_requests()
