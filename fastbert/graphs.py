"""CUDA graphs over packed tokens: a model's whole forward as one launch, for any mix of sequence lengths.

A graph is captured per bucket. Padded batches: B and S rounded up to powers of two. Packed sequences: the number of
tokens and the longest sequence rounded up to powers of two, the number of sequences to a power of four. The mask or the
cu_seqlens are inputs of the graph, and the token count stays on the device. So one graph fits every mix of lengths in
its bucket, and tiles past the last token cost nothing.
"""

import inspect
import logging
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, TypeVar, final

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from fastbert import graph_rules, ops
from fastbert._compat import is_in_bad_fork
from fastbert.capture import (
    INPUTS,
    PACKED_INPUTS,
    CudaGraphs,
    Graph,
    Packed,
    PackedGraph,
    Padded,
    PaddedGraph,
    reset_lock,
)
from fastbert.graph_rules import mode_of
from fastbert.graph_state import State, UnreadableState
from fastbert.inputs import KEYWORDS
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing, is_transforming, is_watched
from fastbert.pretrained import BertPreTrainedModel
from fastbert.replaying import plain_forward

DEVICE_TYPE = "cuda"
MIN_SEQ_LEN = 16  # smallest S of a padded bucket, and smallest token count of a packed one
MIN_PACKED_SEQ_LEN = 64  # smallest max_seqlen of a packed bucket: attention runs the same for shorter sequences
MAX_TOKENS = 2**15  # of a bucket: for larger ones, launches take no time beside the computation
MAX_OUTPUT_BYTES = 2**28  # of a graph, which keeps its outputs' memory
INTEGERS = (torch.int64, torch.int32)
MASKS = (*INTEGERS, torch.int16, torch.int8, torch.uint8, torch.bool)
SUPPORTED_ARGUMENTS = {*INPUTS, *PACKED_INPUTS, "max_length_q", "return_dict"}
Model = TypeVar("Model", bound=nn.Module)
_instances: weakref.WeakSet["GraphedForward"] = weakref.WeakSet()
# Graphs that models capture without `graphed`.
graphs_by_model: weakref.WeakKeyDictionary[nn.Module, "GraphedForward"] = weakref.WeakKeyDictionary()
# Graphs inherited by a forked process, which must neither use nor free them.
_inherited: list[dict[str, object]] = []


def graphed(model: Model, max_graphs: int = 32) -> Model:
    """Let a model's forward replay CUDA graphs. Changes the model in place and returns it.

    Inputs: input_ids, attention_mask and token_type_ids, integers [B, S] on any device; or packed sequences on the
    model's device: input_ids and token_type_ids [1, T], cu_seq_lens_q [N + 1] and max_length_q. Outputs are those of
    the model, on its device; later calls do not overwrite them. The first call of a bucket captures its graph, which
    takes a few plain calls plus the compilation of new kernel variants (`fastbert.warmup` does both ahead). Beyond
    max_graphs buckets the least recently used graph is dropped. All graphs share a memory pool, but each keeps its own
    outputs. During a capture no other thread may call `torch.cuda.synchronize`.

    The next call notices new weights, `.to()`, replaced modules, hooks, adapters, modes and changed numbers such as
    eps. Until then the weights of the last capture stay in memory.
    Unsupported calls run without a graph, and the logger "fastbert" gives each reason once: gradients, training, hidden
    states, attention weights, labels and other inputs, autocast, 3-D and 4-D masks, a CPU, blocks that run through
    their modules, modules and models of unknown classes, outputs above 256 MiB, a failed capture.

    `del model.forward` undoes it. Raises TypeError for a module that is not a fastbert model, ValueError for a model
    whose forward is already patched and for max_graphs below 1.
    """
    if not isinstance(model, BertPreTrainedModel):
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"{name} is not a fastbert model: pass one, or the model that fastbert.optimize converted")
    if max_graphs < 1:
        raise ValueError(f"max_graphs is {max_graphs}, it must be 1 or more")
    if "forward" in model.__dict__:
        raise ValueError("the model's forward is patched already: graph it once, before others wrap it")
    free_graphs(model)
    model.forward = GraphedForward(model, max_graphs)
    return model


def free_graphs(model: nn.Module) -> None:
    """Free the graphs of a model, and the old weights that they keep in memory."""
    for found in (graphs_by_model.pop(model, None), model.__dict__.get("forward")):
        if isinstance(found, GraphedForward):
            found.free()


@final
class NoReplay(NamedTuple):
    """Why a call did not replay a graph; an empty reason is not logged.

    bucket: if given, models inside this one replay no graphs in the plain call, and the bucket counts as seen if the
    call succeeds. If None, the models inside may replay graphs.
    """

    reason: str
    bucket: Padded | Packed | None = None


class GraphedForward:
    """Replaces a model's forward; see `graphed`."""

    level = logging.WARNING

    def __init__(self, model: BertPreTrainedModel, max_graphs: int):
        # A weak reference: a reference cycle would keep the model until the next garbage collection.
        self._model, self.max_graphs = weakref.ref(model), max_graphs
        self.__signature__ = inspect.signature(self.plain)
        self._names = tuple(self.__signature__.parameters)
        self._known = {*self._names, *KEYWORDS}
        self.reset()
        _instances.add(self)

    def reset(self) -> None:
        """Start without graphs. Graphs that were captured are not freed."""
        self._lock = threading.Lock()  # one call at a time: calls share the graphs' buffers
        self._state: State | None = None
        self._cuda: CudaGraphs | None = None
        self._graphs: OrderedDict[Padded | Packed, Graph] = OrderedDict()
        # Bucket -> why its capture failed, and when.
        self._failed: dict[Padded | Packed, tuple[str, float]] = {}
        self.last_reason = ""

    @property
    def model(self) -> BertPreTrainedModel:
        model = self._model()
        assert model is not None  # it holds this object
        return model

    @property
    def plain(self) -> Callable:
        """The forward of the model's class."""
        return plain_forward(type(self.model)).__get__(self.model)

    @property
    def num_graphs(self) -> int:
        """The number of captured graphs."""
        return len(self._graphs)

    def __reduce__(self):
        """A copy of the model captures its own graphs."""
        return GraphedForward, (self.model, self.max_graphs)

    def __call__(self, *args, **kwargs):
        if is_tracing() or is_transforming():
            return self.plain(*args, **kwargs)
        model = self._model()
        assert model is not None
        outputs = self._try_replay(model, args, kwargs)
        if type(outputs) is not NoReplay:
            return outputs
        if outputs.reason:
            level = logging.INFO if model.device.type == "cpu" else self.level
            backend.warn_once(level, f"no CUDA graph: {outputs.reason}")
        return self.plain(*args, **kwargs)

    def _try_replay(self, model: BertPreTrainedModel, args: tuple, kwargs: dict) -> ModelOutput | tuple | NoReplay:
        """The outputs of a replay, or why the call cannot replay a graph."""
        given = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        reason = self._why_unsupported(model, given, len(args) + len(kwargs))
        if reason is not None:
            return NoReplay(reason)
        with self._lock:
            outputs = self._replay(given)
        if type(outputs) is NoReplay:
            self.last_reason = outputs.reason
            return outputs
        as_dict = given.get("return_dict")
        if as_dict is None:
            # Ten times as fast as reading the attribute of a configuration.
            as_dict = object.__getattribute__(model.config, "__dict__").get("return_dict", True)
        return outputs if as_dict else outputs.to_tuple()

    def _why_unsupported(self, model: nn.Module, given: dict, num_given: int) -> str | None:
        """Why graphs do not support these arguments or the current modes; None if they do. Empty for invalid arguments,
        for which the plain forward raises the error."""
        if mode_of(model) == "off":
            return graph_rules.forked or "CUDA graphs are turned off"
        if model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled():
            return "gradients are recorded: call the model under torch.no_grad() or torch.inference_mode()"
        if torch.is_autocast_enabled(DEVICE_TYPE):
            return "autocast is on: give the model its dtype by .to()"
        if backend.current_backend() == "eager":
            return "backend 'eager' is chosen"
        if ops.CHECK_IDS:
            return "FASTBERT_CHECK=1 checks the ids of each call"
        if is_watched():
            return "a TorchFunctionMode or TorchDispatchMode is active"
        if CudaGraphs.is_capturing():
            return "the call is being captured into another CUDA graph"
        if len(given) != num_given:
            return ""  # too many arguments, or the same one twice
        if not given.keys() <= SUPPORTED_ARGUMENTS:
            for name, value in given.items():
                if name not in self._known:
                    return ""
                if value is not None and value is not False and name not in SUPPORTED_ARGUMENTS:
                    return f"{name} is given"
        input_ids, attention_mask, token_type_ids = map(given.get, INPUTS)
        if type(input_ids) is not Tensor or input_ids.ndim != 2 or input_ids.dtype not in INTEGERS:
            return "input_ids are not integers [B, S]"
        shape = input_ids.shape
        if 0 in shape:
            return ""
        if attention_mask is not None and not _is_like(attention_mask, shape, MASKS):
            return "attention_mask is not integers [B, S]"
        if token_type_ids is not None and not _is_like(token_type_ids, shape, INTEGERS):
            return "token_type_ids is not integers [B, S]"
        return None if given.get("cu_seq_lens_q") is None else self._why_unsupported_packed(given)

    def _why_unsupported_packed(self, given: dict) -> str | None:
        """The same for packed sequences; input_ids and token_type_ids are checked already."""
        cu_seqlens = given["cu_seq_lens_q"]
        if given.get("attention_mask") is not None or given["input_ids"].shape[0] != 1:
            return ""
        if type(cu_seqlens) is not Tensor or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            return ""
        if cu_seqlens.dtype not in INTEGERS:
            return ""
        if type(given.get("max_length_q")) is not int:
            return "cu_seq_lens_q is given without max_length_q"
        return None

    def _replay(self, given: dict) -> ModelOutput | NoReplay:
        state = self._state
        # With changed tables, a replay would report valid ids as out of range, or read past the end of a table.
        if state is None or ((state.unsupported_reason or not state.has_same_tables()) and not state.is_current()):
            state = self._new_state()
        inputs = [given.get(name) for name in (INPUTS if given.get("cu_seq_lens_q") is None else PACKED_INPUTS)]
        for _ in range(3):
            if state.unsupported_reason:
                return NoReplay(state.unsupported_reason)
            if why_not := self._why_wrong_device(state.device, given):
                return why_not
            bucket = _bucket(given, state.num_positions)
            if bucket is None:
                return NoReplay("")  # the model raises the error
            if bucket.num_tokens > self.max_tokens:
                return NoReplay(f"a batch of more than {self.max_tokens} tokens gains nothing from a graph")
            backend.raise_bad_ids(state.device)
            # Check the model before a capture; for an existing graph, check while the replay runs.
            if bucket in self._graphs or state.is_current():
                graph = self._graph(bucket)
                if type(graph) is NoReplay:
                    return graph
                assert self._cuda is not None
                self._cuda.order_after_last_replay()
                graph.launch(*inputs)
                outputs = graph.outputs() if state.is_current() else None
                self._cuda.record_replay()
                if outputs is not None:
                    return outputs
            state = self._new_state()
        return NoReplay("each call changes the model")

    @property
    def max_tokens(self) -> int:
        return MAX_TOKENS

    def _why_wrong_device(self, device: torch.device, given: dict) -> NoReplay | None:
        """Why the inputs' devices are unsupported; padded batches are copied from any device."""
        cu_seqlens = given.get("cu_seq_lens_q")
        if cu_seqlens is not None and {cu_seqlens.device, given["input_ids"].device} != {device}:
            return NoReplay(f"packed input_ids and cu_seq_lens_q are not on {device}")
        return None

    def _graph(self, bucket: Padded | Packed) -> Graph | NoReplay:
        """The graph of a bucket, which is captured if there is none."""
        if bucket in self._graphs:
            self._graphs.move_to_end(bucket)
            return self._graphs[bucket]
        if why_not := self._why_no_capture(bucket):
            return why_not
        if self._cuda is None:
            assert self._state is not None
            self._cuda = CudaGraphs(self._state.device)
        failed_at = math.inf  # outputs that are too large stay too large
        try:
            kind = PackedGraph if type(bucket) is Packed else PaddedGraph
            graph = kind(self.plain, self._cuda, bucket)
            problem = self._why_too_large(graph)
        except torch.OutOfMemoryError:  # its message has numbers: each would be logged as a new reason
            problem = f"not enough memory to capture {bucket}"
            failed_at = graph_rules.clock()
        except Exception as error:  # of CUDA, or of the model, which the plain call raises again
            problem = f"capturing {bucket} failed: {type(error).__name__}: {error}"
            failed_at = graph_rules.clock()
            if isinstance(error, RuntimeError):
                graph_rules.broken = problem
        if problem:
            self._failed[bucket] = problem, failed_at
            if not self._graphs:
                self._cuda = None
            return NoReplay(problem)
        self._graphs[bucket] = graph
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
            limit = f"more buckets of batch sizes and lengths than max_graphs={self.max_graphs}"
            backend.warn_once(self.level, f"{limit}: each new graph replaces the least recently used one")
        return self._keep_within_memory(bucket, graph)

    def _why_no_capture(self, bucket: Padded | Packed) -> NoReplay | None:
        return NoReplay(self._failed[bucket][0]) if bucket in self._failed else None

    def _why_too_large(self, graph: Graph) -> str | None:
        if graph.output_bytes > MAX_OUTPUT_BYTES:
            return f"the outputs of a bucket take more than {MAX_OUTPUT_BYTES >> 20} MiB"
        return None

    def _keep_within_memory(self, bucket: Padded | Packed, graph: Graph) -> Graph | NoReplay:
        return graph

    def buckets(self) -> list[Padded | Packed]:
        """The buckets of the captured graphs, least recently used first."""
        return list(self._graphs)

    def memory(self) -> int:
        """Bytes of the graphs' memory pool."""
        with self._lock:
            return self._cuda.memory() if self._cuda is not None and self._graphs else 0

    def free(self) -> None:
        """Drop all graphs, their memory pool and the snapshot of the model."""
        with self._lock:
            self._free()
            self._state = None

    def _free(self) -> None:
        if self._cuda is not None and self._graphs:
            self._cuda.synchronize()  # a replay may still run
            self._graphs.clear()
        self._cuda = None

    def _new_state(self) -> State:
        """Take a new snapshot of the model and drop all graphs, which were captured from an older state."""
        self._free()
        self._failed.clear()
        try:
            self._state = State(self.model, DEVICE_TYPE)
        except Exception as error:  # the plain call may still work
            self._state = UnreadableState(error)
        return self._state


def _is_like(x: object, shape: torch.Size, dtypes: tuple[torch.dtype, ...]) -> bool:
    return type(x) is Tensor and x.shape == shape and x.dtype in dtypes


def _bucket(given: dict, num_positions: int) -> Padded | Packed | None:
    """The smallest bucket that holds a call's inputs; None for sequences with more tokens than position embeddings."""
    (batch_size, seq_len), cu_seqlens = given["input_ids"].shape, given.get("cu_seq_lens_q")
    if cu_seqlens is None:
        if seq_len > num_positions:
            return None
        return Padded(_power_of_two(batch_size), min(max(MIN_SEQ_LEN, _power_of_two(seq_len)), num_positions))
    max_seqlen = given["max_length_q"]
    if not 0 < max_seqlen <= num_positions:
        return None
    return Packed(
        max(MIN_SEQ_LEN, _power_of_two(seq_len)),
        _power_of_four(len(cu_seqlens) - 1),
        min(max(MIN_PACKED_SEQ_LEN, _power_of_two(max_seqlen)), num_positions),
    )


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _power_of_four(size: int) -> int:
    return 1 << -(-(size - 1).bit_length() // 2) * 2


def _after_fork() -> None:
    """Reset all graphs in a forked process: it cannot use CUDA, and inherits locks that no thread will release."""
    if any(forward.num_graphs for forward in _instances) or is_in_bad_fork():
        graph_rules.forked = "this process was forked from one that used CUDA"
    reset_lock()
    for forward in list(_instances):
        _inherited.append(vars(forward).copy())
        forward.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
