"""CUDA graphs that models capture by themselves, within limits, and the switch for all graphs."""

import logging
import math
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

from fastbert import graph_rules, graphs
from fastbert._compat import is_replica
from fastbert.capture import Graph, Packed, Padded
from fastbert.graph_rules import MINUTE, Set, check_mode, mode_of, thread
from fastbert.graph_state import State, Unseen
from fastbert.graphs import GraphedForward, Refusal, free_graphs, of_models
from fastbert.ops import backend
from fastbert.pretrained import BertPreTrainedModel
from fastbert.replaying import original_forward

# Of a bucket: half of what `graphed` serves. Above, the device takes longer than the host does for the launches.
MOST_PLACES = 2**14
# Tokens of packed texts times the width of their states, likewise: texts in bulk come in the largest batches there are.
MOST_NUMBERS = 2**23
MAX_GRAPHS = 32  # of a model
MOST_MEMORY = 2**30  # bytes, of the pool of a model's graphs
NEEDLESS_GRADIENTS = (
    "a model in eval mode records gradients: where no backward follows, call it under torch.no_grad() or "
    "torch.inference_mode(), which takes less memory and lets it replay CUDA graphs"
)


class ItsGraphs(GraphedForward):
    """The graphs that a model captures by itself: a bucket's when it comes for the second time, within limits.

    Once the pool of a model's graphs has grown beyond the limit, all of them make room for the newest, in a new pool:
    a pool shrinks with its last graph only.
    """

    level = logging.INFO

    @property
    def plain(self) -> Callable:
        """The forward that the class's wrapper stands for: a patch of the class is around that, not in a graph."""
        return original_forward(type(self.model)).__get__(self.model)

    def begin_anew(self) -> None:
        super().begin_anew()
        self._came: set[Padded | Packed] = set()

    def __call__(self, *args, **kwargs):
        model = self._model()
        served = self._served(model, args, kwargs)
        if type(served) is not Refusal:
            return served
        if served.reason:
            backend.warn_once(self.level, f"no CUDA graph: {served.reason}")
        if served.bucket is None:
            return self.plain(*args, **kwargs)
        with Set("owned", True):
            outputs = self.plain(*args, **kwargs)
        self._came.add(served.bucket)
        return outputs

    @property
    def most_places(self) -> int:
        return MOST_PLACES

    def _why_not_from(self, device: torch.device, given: dict) -> Refusal | None:
        # Where the plain call raises an error, this one has to.
        input_ids, token_type_ids = given["input_ids"], given.get("token_type_ids")
        if input_ids.device != device or (token_type_ids is not None and token_type_ids.device != device):
            return Refusal(f"inputs are not on {device}")
        return super()._why_not_from(device, given)

    def _why_no_capture(self, bucket: Padded | Packed) -> Refusal | None:
        if bucket not in self._came:
            return Refusal("", bucket)
        if type(bucket) is Packed and bucket.num_tokens * self.model.config.hidden_size > MOST_NUMBERS:
            return Refusal("of so many packed tokens, launches cost nothing beside the work")
        if bucket in self._failed:
            reason, failed_at = self._failed[bucket]
            if graph_rules.clock() - failed_at < MINUTE:
                return Refusal(reason)
            del self._failed[bucket]
        reason = graphs.CudaGraphs.why_unmeasured() or graph_rules.why_no_capture(mode_of(self.model))
        return Refusal(reason, bucket) if reason else None

    def _within_memory(self, bucket: Padded | Packed, graph: Graph) -> Graph | Refusal:
        if self._device.memory() <= MOST_MEMORY:
            return graph
        alone = len(self._graphs) == 1
        self._free()
        limit = f"{MOST_MEMORY >> 20} MiB"
        if alone:
            problem = f"a graph of {bucket} takes more than {limit}"
            # For good, as long as the model stays what it is.
            self._failed[bucket] = problem, math.inf
            return Refusal(problem)
        backend.warn_once(self.level, f"the graphs of a model take more than {limit}: all make room for the newest")
        return self._graph(bucket)

    def _renewed(self) -> State | Unseen:
        self._came.clear()
        return super()._renewed()


def run(model: nn.Module, plain: Callable, args: tuple, kwargs: dict):
    """A call of a model's forward, whose inputs are on a GPU: by a graph, or plainly."""
    # An outer model of ours has the call, or DataParallel made a replica, for this call only.
    if thread.owned or model.training or is_replica(model):
        return plain(model, *args, **kwargs)
    if torch.is_grad_enabled():
        with Set("owned", True):
            outputs = plain(model, *args, **kwargs)
        if any(isinstance(x, Tensor) and x.requires_grad for x in _values(outputs)):
            backend.warn_once(logging.WARNING, NEEDLESS_GRADIENTS)
        return outputs
    if mode_of(model) == "off":
        return plain(model, *args, **kwargs)
    its = of_models.get(model)
    if its is None:
        its = of_models.setdefault(model, ItsGraphs(model, MAX_GRAPHS))
    return its(*args, **kwargs)


def _values(outputs: object) -> tuple:
    """What a forward returns, whatever that is where somebody patched it."""
    if isinstance(outputs, dict):
        return tuple(outputs.values())
    return outputs if isinstance(outputs, tuple) else (outputs,)


class cuda_graphs:
    """Whether CUDA graphs are captured and replayed: "off", "auto" or "on"; as FASTBERT_GRAPHS says for the process.

    `with cuda_graphs("off"):` holds on this thread, inside of the block. `cuda_graphs("off", model)` holds for each
    model of ours in a module, at once and on every thread, and as a context until the end of the block. What a thread
    says comes before what a model says, and that before the environment.

    "auto", the default, lets models capture by themselves on the main thread, as long as no other thread is alive but
    those of progress bars, data loaders and notebooks; they replay on every thread. "on" lets them capture beside other
    threads, too, none of which may meanwhile wait for the whole device, as `torch.cuda.synchronize` does, or draw
    random numbers on it. "off" captures and replays nothing, nor does `fastbert.graphed`; for a model it frees its
    graphs. Raises ValueError for another name, TypeError for a module without a model of ours.
    """

    def __init__(self, mode: str, model: nn.Module | None = None):
        check_mode(mode, "fastbert.cuda_graphs")
        self._set, self._before = Set("mode", mode), {}
        if model is None:
            return
        self._set = None
        models = [x for x in model.modules() if isinstance(x, BertPreTrainedModel)]
        if not models:
            raise TypeError(f"there is no model of fastbert's in a {type(model).__module__}.{type(model).__qualname__}")
        for each in models:
            self._before[each] = graph_rules.of_models.get(each)
            graph_rules.of_models[each] = mode
            if mode == "off":
                free_graphs(each)

    def __enter__(self) -> None:
        if self._set is not None:
            self._set.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._set is not None:
            self._set.__exit__(kind, error, traceback)
        for model, mode in self._before.items():
            if mode is None:
                graph_rules.of_models.pop(model, None)
            else:
                graph_rules.of_models[model] = mode


def graphs_of(model: nn.Module) -> GraphedForward | None:
    """What has captured graphs of a model; None if nothing has."""
    forward = model.__dict__.get("forward")
    found = forward if isinstance(forward, GraphedForward) else of_models.get(model)
    return found if found is not None and found.num_graphs else None


def told(model: nn.Module) -> str:
    """The mode of a model's graphs, what is captured and the memory it takes; or why nothing is."""
    mode = mode_of(model)
    if found := graphs_of(model):
        buckets = ", ".join(map(str, found.buckets()))
        return f"{mode}, {found.num_graphs} captured ({buckets}), {found.memory() / 2**20:.0f} MiB"
    if mode == "off":
        reason = graph_rules.forked or "they are turned off"
    elif model.device.type != graphs.DEVICE_TYPE:
        reason = f"the model is on {model.device.type!r} and CUDA graphs need a CUDA device"
    else:
        its = model.__dict__.get("forward") or of_models.get(model)
        reason = getattr(its, "last_reason", "") or "no batch size and length has come twice in inference"
    return f"{mode}, none captured: {reason}"


def limits() -> str:
    """What bounds the graphs that models capture by themselves."""
    return (
        f"{MAX_GRAPHS} graphs and {MOST_MEMORY >> 20} MiB a model, {MOST_PLACES} places a graph, "
        f"{graph_rules.CAPTURES_A_MINUTE} captures a minute"
    )
