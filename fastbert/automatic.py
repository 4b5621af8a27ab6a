"""CUDA graphs that models capture without `graphed`, within limits, and the switch for all graphs."""

import logging
import math
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

from fastbert import graph_rules, graphs
from fastbert._compat import is_replica
from fastbert.capture import Graph, Packed, Padded
from fastbert.graph_rules import MINUTE, ThreadSetting, check_mode, mode_of, thread
from fastbert.graph_state import State
from fastbert.graphs import GraphedForward, NoReplay, free_graphs, graphs_by_model
from fastbert.ops import backend
from fastbert.pretrained import BertPreTrainedModel
from fastbert.replaying import original_forward

# Of a bucket: half the limit of `graphed`. For larger ones the device takes longer than the host takes to launch.
MAX_TOKENS = 2**14
# Packed tokens times hidden size, for the same reason: bulk encoding packs the largest batches.
MAX_PACKED_ELEMENTS = 2**23
MAX_GRAPHS = 32  # of a model
MAX_MEMORY = 2**30  # bytes of the memory pool of a model's graphs
NEEDLESS_GRADIENTS = (
    "a model in eval mode records gradients: where no backward follows, call it under torch.no_grad() or "
    "torch.inference_mode(), which takes less memory and lets it replay CUDA graphs"
)


class AutomaticGraphs(GraphedForward):
    """The graphs that a model captures without `graphed`: the second call of a bucket captures it, within limits.

    A memory pool shrinks only with its last graph. So if the pool exceeds MAX_MEMORY, all graphs are dropped and the
    newest one is captured again into a new pool.
    """

    level = logging.INFO

    @property
    def plain(self) -> Callable:
        """The forward under the class's wrapper. A patch of the class runs around the graph, not in it."""
        return original_forward(type(self.model)).__get__(self.model)

    def reset(self) -> None:
        super().reset()
        self._seen: set[Padded | Packed] = set()

    def __call__(self, *args, **kwargs):
        model = self._model()
        assert model is not None
        outputs = self._try_replay(model, args, kwargs)
        if type(outputs) is not NoReplay:
            return outputs
        why_not = outputs
        if why_not.reason:
            backend.warn_once(self.level, f"no CUDA graph: {why_not.reason}")
        if why_not.bucket is None:
            return self.plain(*args, **kwargs)
        with ThreadSetting("nested", True):
            outputs = self.plain(*args, **kwargs)
        self._seen.add(why_not.bucket)
        return outputs

    @property
    def max_tokens(self) -> int:
        return MAX_TOKENS

    def _why_wrong_device(self, device: torch.device, given: dict) -> NoReplay | None:
        # The plain call raises an error for such inputs, so do not replay.
        input_ids, token_type_ids = given["input_ids"], given.get("token_type_ids")
        if input_ids.device != device or (token_type_ids is not None and token_type_ids.device != device):
            return NoReplay(f"inputs are not on {device}")
        return super()._why_wrong_device(device, given)

    def _why_no_capture(self, bucket: Padded | Packed) -> NoReplay | None:
        if bucket not in self._seen:
            return NoReplay("", bucket)
        if type(bucket) is Packed and bucket.num_tokens * self.model.config.hidden_size > MAX_PACKED_ELEMENTS:
            return NoReplay("a packed batch of this size gains nothing from a graph")
        if bucket in self._failed:
            reason, failed_at = self._failed[bucket]
            if graph_rules.clock() - failed_at < MINUTE:
                return NoReplay(reason)
            del self._failed[bucket]
        why_not = graphs.CudaGraphs.why_memory_unknown() or graph_rules.why_no_capture(mode_of(self.model))
        return NoReplay(why_not, bucket) if why_not else None

    def _keep_within_memory(self, bucket: Padded | Packed, graph: Graph) -> Graph | NoReplay:
        assert self._cuda is not None
        if self._cuda.memory() <= MAX_MEMORY:
            return graph
        alone = len(self._graphs) == 1
        self._free()
        limit = f"{MAX_MEMORY >> 20} MiB"
        if alone:
            problem = f"a graph of {bucket} takes more than {limit}"
            # Final, until the model changes.
            self._failed[bucket] = problem, math.inf
            return NoReplay(problem)
        backend.warn_once(self.level, f"the graphs of a model take more than {limit}: only the newest one is kept")
        return self._graph(bucket)

    def _new_state(self) -> State:
        self._seen.clear()
        return super()._new_state()


def run(model: BertPreTrainedModel, plain: Callable, args: tuple, kwargs: dict):
    """Call a model's forward with inputs on a GPU: replay or capture a graph, or call `plain`."""
    # nested: the graphs of an outer model include this one. A replica of DataParallel lives for one call only.
    if thread.nested or model.training or is_replica(model):
        return plain(model, *args, **kwargs)
    if torch.is_grad_enabled():
        with ThreadSetting("nested", True):
            outputs = plain(model, *args, **kwargs)
        if any(isinstance(x, Tensor) and x.requires_grad for x in _values(outputs)):
            backend.warn_once(logging.WARNING, NEEDLESS_GRADIENTS)
        return outputs
    if mode_of(model) == "off":
        return plain(model, *args, **kwargs)
    automatic = graphs_by_model.get(model)
    if automatic is None:
        automatic = graphs_by_model.setdefault(model, AutomaticGraphs(model, MAX_GRAPHS))
    return automatic(*args, **kwargs)


def _values(outputs: object) -> tuple:
    """The values that a forward returned, which may be of any type if it is patched."""
    if isinstance(outputs, dict):
        return tuple(outputs.values())
    return outputs if isinstance(outputs, tuple) else (outputs,)


class cuda_graphs:
    """Switch the capture and replay of CUDA graphs: "off", "auto" or "on". FASTBERT_GRAPHS sets it for the process.

    `with cuda_graphs("off"):` applies to this thread, inside the block. `cuda_graphs("off", model)` applies to every
    fastbert model in a module, at once and on every thread; as a context it ends with the block. The thread's setting
    takes precedence over the model's, and that over the environment.

    "auto", the default: models capture on the main thread, as long as the only other threads are those of progress
    bars, data loaders and notebooks; all threads replay. "on": models also capture beside other threads, which
    must not wait for the whole device during a capture, as `torch.cuda.synchronize` does, or draw random numbers on it.
    "off": nothing is captured or replayed, `fastbert.graphed` included; for a model it also frees its graphs. Raises
    ValueError for another mode, TypeError for a module without a fastbert model.
    """

    def __init__(self, mode: str, model: nn.Module | None = None):
        check_mode(mode, "fastbert.cuda_graphs")
        self._set: ThreadSetting | None = None
        self._previous: dict[nn.Module, str | None] = {}
        if model is None:
            self._set = ThreadSetting("mode", mode)
            return
        models = [x for x in model.modules() if isinstance(x, BertPreTrainedModel)]
        if not models:
            name = f"{type(model).__module__}.{type(model).__qualname__}"
            raise TypeError(f"there is no fastbert model in a {name}: pass one, or the result of fastbert.optimize")
        for each in models:
            self._previous[each] = graph_rules.mode_by_model.get(each)
            graph_rules.mode_by_model[each] = mode
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
        for model, mode in self._previous.items():
            if mode is None:
                graph_rules.mode_by_model.pop(model, None)
            else:
                graph_rules.mode_by_model[model] = mode


def graphs_of(model: nn.Module) -> GraphedForward | None:
    """The captured graphs of a model; None if there are none."""
    forward = model.__dict__.get("forward")
    found = forward if isinstance(forward, GraphedForward) else graphs_by_model.get(model)
    return found if found is not None and found.num_graphs else None


def describe(model: BertPreTrainedModel) -> str:
    """The mode of a model's graphs, and their buckets and memory, or why nothing is captured."""
    mode = mode_of(model)
    if found := graphs_of(model):
        buckets = ", ".join(map(str, found.buckets()))
        return f"{mode}, {found.num_graphs} captured ({buckets}), {found.memory() / 2**20:.0f} MiB"
    if mode == "off":
        reason = graph_rules.forked or "CUDA graphs are turned off"
    elif model.device.type != graphs.DEVICE_TYPE:
        reason = f"the model is on {model.device.type!r} and CUDA graphs need a CUDA device"
    else:
        forward = model.__dict__.get("forward") or graphs_by_model.get(model)
        reason = getattr(forward, "last_reason", "") or "no batch size and length has come twice in inference"
    return f"{mode}, none captured: {reason}"


def limits() -> str:
    """The limits of the graphs that models capture without `graphed`, in words."""
    return (
        f"{MAX_GRAPHS} graphs and {MAX_MEMORY >> 20} MiB a model, {MAX_TOKENS} tokens a graph, "
        f"{graph_rules.CAPTURES_A_MINUTE} captures a minute"
    )
