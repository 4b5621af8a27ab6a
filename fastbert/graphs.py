"""CUDA graphs that unpad: a model's whole forward as one launch, whatever the lengths of the texts.

A graph is captured for a bucket, the smallest powers of two (B, S) that hold a batch; for texts that come packed,
those of their tokens and the longest, and the power of four that holds their number. The mask, or the bounds, are data
and the number of tokens stays on the device, so that one graph serves every mix of lengths inside its bucket, and tiles
past the tokens cost nothing.
"""

import inspect
import logging
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

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
    forget_locks,
)
from fastbert.graph_rules import mode_of
from fastbert.graph_state import State, Unseen
from fastbert.inputs import KEYWORDS
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing, is_transforming, is_watched
from fastbert.pretrained import BertPreTrainedModel
from fastbert.replaying import plain_forward

DEVICE_TYPE = "cuda"
SHORTEST = 16  # places of a bucket's texts, tokens of a packed one
# Tokens of the longest packed text: below, attention makes no difference.
SHORTEST_PACKED = 64
MOST_PLACES = 2**15  # of a bucket: beyond them launches cost nothing beside the work
MOST_OUTPUT_BYTES = 2**28  # of a graph, which keeps its outputs' memory
INTEGERS = (torch.int64, torch.int32)
MASKS = (*INTEGERS, torch.int16, torch.int8, torch.uint8, torch.bool)
KNOWN_TO_GRAPHS = {*INPUTS, *PACKED_INPUTS, "max_length_q", "return_dict"}
_all: weakref.WeakSet["GraphedForward"] = weakref.WeakSet()
# What models capture by themselves.
of_models: weakref.WeakKeyDictionary[nn.Module, "GraphedForward"] = weakref.WeakKeyDictionary()
# What a forked process inherits and can neither use nor give back to CUDA.
_inherited: list = []


def graphed(model: nn.Module, max_graphs: int = 32) -> nn.Module:
    """Let a model's forward replay CUDA graphs; in place, returns the model.

    A call takes input_ids, attention_mask and token_type_ids, integers [B, S] on any device, or texts packed on the
    model's device: input_ids and token_type_ids [1, T], cu_seq_lens_q [N + 1] and max_length_q. Outputs are the model's
    own, on its device, and nothing overwrites them later. The first call of a bucket captures it, which takes about as
    long as a few calls without a graph and the compilation of what is not compiled (`fastbert.warmup` does it before);
    of more than max_graphs buckets the least recently used is dropped. Graphs share the memory of what they compute,
    each keeps that of its outputs. While one is captured no other thread may call `torch.cuda.synchronize`.

    New weights, `.to()`, other modules, hooks, adapters, modes and numbers that layers have beside parameters are
    noticed in the next call; until then the weights of the last capture stay in memory.
    What graphs do not serve runs as without them, and the logger "fastbert" says why, each reason once: gradients,
    training, hidden states, attention weights, labels and other inputs, autocast, masks of scores, a CPU, blocks that
    run through their modules, modules and models of classes from elsewhere, outputs above 256 MiB, a failed capture.

    `del model.forward` takes it back. Raises TypeError for what is no fastbert model, ValueError for one whose forward
    is patched already, or max_graphs below 1.
    """
    if not isinstance(model, BertPreTrainedModel):
        raise TypeError(f"{type(model).__module__}.{type(model).__qualname__} is no model of fastbert's to graph")
    if max_graphs < 1:
        raise ValueError(f"max_graphs is {max_graphs}, it must be 1 or more")
    if "forward" in model.__dict__:
        raise ValueError("the model's forward is patched already: graph it once, before others wrap it")
    free_graphs(model)
    model.forward = GraphedForward(model, max_graphs)
    return model


def free_graphs(model: nn.Module) -> None:
    """Free the memory that a model's graphs keep, and the weights of before that they depend on."""
    for found in (of_models.pop(model, None), model.__dict__.get("forward")):
        if isinstance(found, GraphedForward):
            found.free()


class Refusal(NamedTuple):
    """Why no graph served a call, empty where there is nothing to say. bucket: that the plain call, if it succeeds, is
    a coming of; None where the plain call is none of this model's, and a model inside of it may replay a graph."""

    reason: str
    bucket: Padded | Packed | None = None


class GraphedForward:
    """In the place of a model's forward: `graphed` has the contract."""

    level = logging.WARNING

    def __init__(self, model: nn.Module, max_graphs: int):
        # Not the model itself, which then would be freed by the garbage collector alone.
        self._model, self.max_graphs = weakref.ref(model), max_graphs
        self.__signature__ = inspect.signature(self.plain)
        self._names = tuple(self.__signature__.parameters)
        self._known = {*self._names, *KEYWORDS}
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> None:
        """Be as if nothing had been captured; what was stays as it is."""
        self._lock = threading.Lock()  # the graphs' buffers are for one call at a time
        self._state: State | Unseen | None = None
        self._device: CudaGraphs | None = None
        self._graphs: OrderedDict[Padded | Packed, Graph] = OrderedDict()
        # Why a capture failed, and when.
        self._failed: dict[Padded | Packed, tuple[str, float]] = {}
        self.last_reason = ""

    @property
    def model(self) -> nn.Module:
        return self._model()

    @property
    def plain(self) -> Callable:
        """The forward of the model's class."""
        return plain_forward(type(self.model)).__get__(self.model)

    @property
    def num_graphs(self) -> int:
        """How many are captured now."""
        return len(self._graphs)

    def __reduce__(self):
        """A copy of the model captures graphs of its own."""
        return GraphedForward, (self.model, self.max_graphs)

    def __call__(self, *args, **kwargs):
        if is_tracing() or is_transforming():
            return self.plain(*args, **kwargs)
        model = self._model()
        served = self._served(model, args, kwargs)
        if type(served) is not Refusal:
            return served
        if served.reason:
            level = logging.INFO if model.device.type == "cpu" else self.level
            backend.warn_once(level, f"no CUDA graph: {served.reason}")
        return self.plain(*args, **kwargs)

    def _served(self, model: nn.Module, args: tuple, kwargs: dict) -> ModelOutput | tuple | Refusal:
        """What a graph computes of a call, or why none does."""
        given = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        reason = self._why_not(model, given, len(args) + len(kwargs))
        if reason is not None:
            return Refusal(reason)
        with self._lock:
            outputs = self._replayed(given)
        if type(outputs) is Refusal:
            self.last_reason = outputs.reason
            return outputs
        as_dict = given.get("return_dict")
        if as_dict is None:
            # A configuration's own reading of attributes takes ten times as long.
            as_dict = object.__getattribute__(model.config, "__dict__").get("return_dict", True)
        return outputs if as_dict else outputs.to_tuple()

    def _why_not(self, model: nn.Module, given: dict, num_given: int) -> str | None:
        """Why no graph serves such a call of whatever model; empty where the model's own forward knows better."""
        if mode_of(model) == "off":
            return graph_rules.forked or "they are turned off"
        if model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled():
            return "gradients are recorded: call the model under torch.no_grad() or torch.inference_mode()"
        if torch.is_autocast_enabled(DEVICE_TYPE):
            return "autocast is on: give the model its dtype by .to()"
        if backend.current_backend() == "eager":
            return "backend 'eager' is chosen"
        if ops.CHECK_IDS:
            return "FASTBERT_CHECK=1 waits for each call"
        if is_watched():
            return "a mode sees every op"
        if CudaGraphs.is_capturing():
            return "the call goes into a graph of somebody's"
        if len(given) != num_given:
            return ""  # too many arguments, or one twice
        if not given.keys() <= KNOWN_TO_GRAPHS:
            for name, value in given.items():
                if name not in self._known:
                    return ""
                if value is not None and value is not False and name not in KNOWN_TO_GRAPHS:
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
        return None if given.get("cu_seq_lens_q") is None else self._why_not_packed(given)

    def _why_not_packed(self, given: dict) -> str | None:
        """The same for texts that come packed, whose ids and types are as they should be."""
        bounds = given["cu_seq_lens_q"]
        if given.get("attention_mask") is not None or given["input_ids"].shape[0] != 1:
            return ""
        if type(bounds) is not Tensor or bounds.ndim != 1 or len(bounds) < 2 or bounds.dtype not in INTEGERS:
            return ""
        if type(given.get("max_length_q")) is not int:
            return "cu_seq_lens_q is given without max_length_q"
        return None

    def _replayed(self, given: dict) -> ModelOutput | Refusal:
        state = self._state
        if state is None or ((state.refusal or not state.has_its_tables()) and not state.is_current()):
            state = self._renewed()
        inputs = [given.get(name) for name in (INPUTS if given.get("cu_seq_lens_q") is None else PACKED_INPUTS)]
        for _ in range(3):
            if state.refusal:
                return Refusal(state.refusal)
            if why_not := self._why_not_from(state.device, given):
                return why_not
            bucket = _bucket(given, state.num_positions)
            if bucket is None:
                return Refusal("")  # an error, which the model itself words
            if bucket.places > self.most_places:
                return Refusal(f"beyond {self.most_places} places a batch, launches cost nothing beside the work")
            backend.raise_bad_ids(state.device)
            # Check the model before a capture; for an existing graph, check while the replay runs.
            if bucket in self._graphs or state.is_current():
                graph = self._graph(bucket)
                if type(graph) is Refusal:
                    return graph
                self._device.in_order()
                graph.launch(*inputs)
                outputs = graph.outputs() if state.is_current() else None
                self._device.done()
                if outputs is not None:
                    return outputs
            state = self._renewed()
        return Refusal("every call changes the model")

    @property
    def most_places(self) -> int:
        return MOST_PLACES

    def _why_not_from(self, device: torch.device, given: dict) -> Refusal | None:
        """Whether inputs lie where they may not; the rows of a padded batch may be copied from anywhere."""
        bounds = given.get("cu_seq_lens_q")
        if bounds is not None and {bounds.device, given["input_ids"].device} != {device}:
            return Refusal(f"packed texts and their bounds are not on {device}")
        return None

    def _graph(self, bucket: Padded | Packed) -> Graph | Refusal:
        """The graph of a bucket, captured if need be and possible."""
        if bucket in self._graphs:
            self._graphs.move_to_end(bucket)
            return self._graphs[bucket]
        if refusal := self._why_no_capture(bucket):
            return refusal
        if self._device is None:
            self._device = CudaGraphs(self._state.device)
        failed_at = math.inf  # what is too large stays so
        try:
            kind = PackedGraph if type(bucket) is Packed else PaddedGraph
            graph = kind(self.plain, self._device, bucket)
            problem = self._too_large(graph)
        except torch.OutOfMemoryError:  # whose message has numbers, and each reason is said once
            problem = f"there was no memory to capture {bucket}"
            failed_at = graph_rules.clock()
        # CUDA refuses something, or it is an error of the model's, which comes again from the plain call.
        except Exception as error:
            problem = f"capturing {bucket} failed: {type(error).__name__}: {error}"
            failed_at = graph_rules.clock()
            if isinstance(error, RuntimeError):
                graph_rules.broken = problem
        if problem:
            self._failed[bucket] = problem, failed_at
            if not self._graphs:
                self._device = None
            return Refusal(problem)
        self._graphs[bucket] = graph
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
            limit = f"more buckets of batch sizes and lengths than max_graphs={self.max_graphs}"
            backend.warn_once(self.level, f"{limit}: the least recently used graph makes room for each new one")
        return self._within_memory(bucket, graph)

    def _why_no_capture(self, bucket: Padded | Packed) -> Refusal | None:
        return Refusal(self._failed[bucket][0]) if bucket in self._failed else None

    def _too_large(self, graph: Graph) -> str | None:
        if graph.output_bytes > MOST_OUTPUT_BYTES:
            return f"the outputs of a bucket take more than {MOST_OUTPUT_BYTES >> 20} MiB"
        return None

    def _within_memory(self, bucket: Padded | Packed, graph: Graph) -> Graph | Refusal:
        return graph

    def buckets(self) -> list[Padded | Packed]:
        """What is captured, the least recently used first."""
        return list(self._graphs)

    def memory(self) -> int:
        """Bytes that the graphs keep from others."""
        with self._lock:
            return self._device.memory() if self._graphs else 0

    def free(self) -> None:
        """Drop all graphs, and with them their pool, and forget the model's state."""
        with self._lock:
            self._free()
            self._state = None

    def _free(self) -> None:
        if self._graphs:
            self._device.wait()  # they may run
            self._graphs.clear()
        self._device = None

    def _renewed(self) -> State | Unseen:
        """The model's present state; graphs captured in another are gone."""
        self._free()
        self._failed.clear()
        try:
            self._state = State(self.model, DEVICE_TYPE)
        except Exception as error:  # the plain call may need nothing of what raised it
            self._state = Unseen(error)
        return self._state


def _is_like(x: object, shape: torch.Size, dtypes: tuple[torch.dtype, ...]) -> bool:
    return type(x) is Tensor and x.shape == shape and x.dtype in dtypes


def _bucket(given: dict, num_positions: int) -> Padded | Packed | None:
    """The smallest bucket that holds a call's inputs; None for texts of more tokens than there are positions."""
    (batch_size, seq_len), bounds = given["input_ids"].shape, given.get("cu_seq_lens_q")
    if bounds is None:
        if seq_len > num_positions:
            return None
        return Padded(_power_of_two(batch_size), min(max(SHORTEST, _power_of_two(seq_len)), num_positions))
    longest = given["max_length_q"]
    if not 0 < longest <= num_positions:
        return None
    return Packed(
        max(SHORTEST, _power_of_two(seq_len)),
        _power_of_four(len(bounds) - 1),
        min(max(SHORTEST_PACKED, _power_of_two(longest)), num_positions),
    )


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not below the size."""
    return 1 << (size - 1).bit_length()


def _power_of_four(size: int) -> int:
    return 1 << -(-(size - 1).bit_length() // 2) * 2


def _in_child() -> None:
    """A forked process has no CUDA, and locks that nobody may ever release: it begins anew, without graphs."""
    if any(forward.num_graphs for forward in _all) or is_in_bad_fork():
        graph_rules.forked = "this process was forked from one that used CUDA"
    forget_locks()
    for forward in list(_all):
        _inherited.append(vars(forward).copy())
        forward.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
