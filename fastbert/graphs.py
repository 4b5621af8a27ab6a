"""CUDA graphs that unpad: a model's whole forward as one launch, whatever the lengths of the texts.

A graph is captured for a bucket, the smallest powers of two (B, S) that hold a batch. The mask is data and the number
of tokens stays on the device, so that one graph serves every mix of lengths inside its bucket, and tiles past the
tokens cost nothing.
"""

import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from operator import is_, itemgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_outputs import ModelOutput

from fastbert import ops, patches
from fastbert.eager import is_tracing, is_transforming
from fastbert.fusion import FusableBlock, fused_parts, has_hooks, hooks_of, why_eager
from fastbert.inputs import KEYWORDS, changed_defaults, num_positions
from fastbert.layers import BertEncoder, BertLayer
from fastbert.model import BertEmbeddings, BertPooler
from fastbert.pretrained import BertPreTrainedModel
from fastbert.tokens import copied_to

DEVICE_TYPE = "cuda"
SHORTEST = 16  # places of a bucket's texts
MOST_PLACES = 2**15  # of a bucket: beyond them launches cost nothing beside the work
MOST_OUTPUT_BYTES = 2**28  # of a graph, which keeps its outputs' memory
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # the rows of a graph's input buffer
# Outputs of two dimensions that have a value for every token; those of three all do.
PER_TOKEN = ("start_logits", "end_logits")
INTEGERS = (torch.int64, torch.int32)
MASKS = (*INTEGERS, torch.int16, torch.int8, torch.uint8, torch.bool)
# What a head may be made of: these look at a token by itself, and so not at a bucket's padding.
TOKENWISE = (
    nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleList,
    nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid,
)  # fmt: skip

# There is one capture at a time in a process, and none while a device is waited for.
_capturing = threading.Lock()


def graphed(model: nn.Module, max_graphs: int = 32) -> nn.Module:
    """Let a model's forward replay CUDA graphs; in place, returns the model.

    A call takes input_ids, attention_mask and token_type_ids, integers [B, S] on any device; outputs are the model's
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
    model.forward = GraphedForward(model, max_graphs)
    return model


class CudaGraphs:
    """What replaying needs of a CUDA device: graphs that share one memory pool, and so run one after another."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # to capture on
        self._last_stream = None

    def capture(self, run: Callable[[], ModelOutput]) -> tuple[Callable[[], None], ModelOutput]:
        """What replays run(), and the outputs that every replay writes anew. The first run, which may compile, is not
        captured."""
        # The stream outside of torch.cuda.graph, which does not put the caller's back where a capture fails.
        with _capturing, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            torch.cuda.synchronize()
            run()
            graph = torch.cuda.CUDAGraph()
            # What other threads launch or allocate is no part of this, and must not break it.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()
        return graph.replay, outputs

    def in_order(self) -> None:
        """Let what the current stream does next come after the last replay, on whichever stream that was."""
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and stream != self._last_stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def wait(self) -> None:
        with _capturing:
            torch.cuda.synchronize(self.device)


class State:
    """What captured graphs rest on of a model, why it cannot be captured (refusal, or None), and whether it changed.

    It keeps the tensors of the parameters: a graph that runs once more after they were replaced reads no foreign
    memory, and no new one gets the address of an old one.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        others = modules[1:]
        self.refusal = _refusal(model, others)
        self.device, self._config, self._base = model.device, model.config, weakref.ref(model.base_model)
        self._embeddings = getattr(model.base_model, "embeddings", nn.Module())
        self.num_positions = num_positions(model.config, self._embeddings, None)
        self._children = [module._modules for module in modules if module._modules]
        self._tensors = [own for x in modules for own in (x._parameters, x._buffers) if own]
        self._attributes = [x.__dict__ for x in others]
        self._layers = [] if self.refusal else model.base_model.encoder.layer
        # The model's own hooks fire around its forward, as always.
        self._hooks = [hooks for x in others for hooks in hooks_of(x)]
        self._kept = [x if x is None else x.detach() for own in self._tensors for x in own.values()]
        self._seen_children = list(chain.from_iterable(map(dict.values, self._children)))
        self._seen_tables, self._seen = self._tables(), self._look()

    def _look(self) -> tuple:
        return (
            [x if x is None else x.data_ptr() for own in self._tensors for x in own.values()],
            list(map(itemgetter("training"), self._attributes)),
            list(map(len, self._attributes)),
            any(self._hooks) or _has_any_global_hook(),
            [x is None or x.is_inference() or x._version for x in self._embeddings._buffers.values()],
            [layer.numbers() for layer in self._layers],
            (self._config.output_hidden_states, self._config.output_attentions, self._config.is_decoder),
            patches.replaced() or patches.replaced_for_masks(self._base()),
            torch.backends.cuda.matmul.fp32_precision,
        )

    def _tables(self) -> list[tuple[int, torch.Size]]:
        tables = (x._parameters["weight"] for x in self._embeddings._modules.values() if type(x) is nn.Embedding)
        return [(table.data_ptr(), table.shape) for table in tables]

    def has_its_tables(self) -> bool:
        """Whether the embedding tables are the same: where not, a graph would report ids that the new ones have, or
        read past their end."""
        return self._tables() == self._seen_tables

    def is_current(self) -> bool:
        """Whether everything is. It costs as much as the launch of a graph, and so is asked while one runs."""
        children = chain.from_iterable(map(dict.values, self._children))
        return all(map(is_, children, self._seen_children)) and self._look() == self._seen


def _refusal(model: nn.Module, others: list[nn.Module]) -> str | None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return "its parameters lie on several devices"
    (device,) = devices
    if device.type != DEVICE_TYPE:
        return f"the model is on {device.type!r} and CUDA graphs need a CUDA device"
    if model.config.output_hidden_states or model.config.output_attentions:
        return "the configuration asks for hidden states or attention weights"
    if model.config.is_decoder or patches.replaced_for_masks(model.base_model):
        return "transformers makes its masks"
    if foreign := _foreign(model):
        return f"a {foreign.__module__}.{foreign.__qualname__} may look at a bucket's padding"
    if any(x is not None for x in changed_defaults(model.base_model.embeddings)):
        return "default positions or token types are other than transformers'"
    for module in others:
        if has_hooks(module) or "forward" in module.__dict__:
            return f"a {type(module).__name__} has hooks or a patched forward"
        if module.training:
            return f"a {type(module).__name__} is in training mode"
        if type(module).__module__.startswith("peft."):
            return f"an adapter may leave the weights unseen, merged as it is: unload the {type(module).__name__}"
        if isinstance(module, FusableBlock):
            _, reason = fused_parts(module)
            if reason is None:
                weight = next(module.parameters())
                reason = next(filter(None, (why_eager(module, op, weight) for op in module.ops_used)), None)
            if reason:
                return f"a {type(module).__name__} runs in eager PyTorch: {reason}"
    return None


def _foreign(model: nn.Module) -> type | None:
    """The first class, of the model or of a module in it, that might look at padding; None if none might."""
    base = model.base_model
    if not type(model).__module__.startswith("fastbert."):
        return type(model)
    expected = {"embeddings": BertEmbeddings, "encoder": BertEncoder, "pooler": BertPooler}
    found = [type(x) for name, x in base.named_children() if type(x) is not expected.get(name)]
    found = found or [type(x) for x in base.encoder.layer if type(x) is not BertLayer]
    encoder = set(base.modules())
    for kind in (type(x) for x in model.modules() if x not in encoder):
        if kind not in TOKENWISE and kind.__module__.split(".")[0] not in ("fastbert", "transformers"):
            found.append(kind)
    return found[0] if found else None


class Graph:
    """The captured forward for batches of up to [B, S]."""

    def __init__(self, forward: Callable, graphs: CudaGraphs, batch_size: int, seq_len: int):
        with torch.inference_mode(False):  # a tensor that may be written in any mode
            self._inputs = torch.zeros(len(INPUTS), batch_size, seq_len, dtype=torch.int64, device=graphs.device)
        self._size = None

        def run():
            with torch.inference_mode(False), torch.no_grad():
                return forward(**dict(zip(INPUTS, self._inputs, strict=True)), return_dict=True)

        self._replay, self._outputs = graphs.capture(run)
        self.output_bytes = sum(x.nbytes for x in self._outputs.values())

    def launch(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> None:
        if input_ids.shape != self._size:
            batch_size, seq_len = input_ids.shape
            self._inputs.zero_()
            self._batch, self._has_types = self._inputs[:, :batch_size, :seq_len], False
            self._results = {
                name: x[:batch_size, :seq_len] if x.ndim > 2 or name in PER_TOKEN else x[:batch_size]
                for name, x in self._outputs.items()
            }
            self._size = input_ids.shape
        rows = [input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask]
        if token_type_ids is not None:
            rows.append(token_type_ids)
        elif self._has_types:
            self._batch[len(rows)].zero_()
        self._has_types = token_type_ids is not None
        if any(row.device != input_ids.device for row in rows):
            rows = [copied_to(self._inputs.device, row) for row in rows]
        # From memory of the host that is not pinned, as here, a copy that goes ahead has been read when it returns.
        self._batch[: len(rows)].copy_(torch.stack(rows), non_blocking=True)
        self._replay()

    def outputs(self) -> ModelOutput:
        """Copies of what the last launch gives."""
        # As __init__ would make it, which looks at each field several times and takes as long as the copies.
        outputs = type(self._outputs).__new__(type(self._outputs))
        outputs.__dict__.update(self._outputs.__dict__)
        for name, x in self._results.items():
            outputs[name] = x.clone()
        return outputs


class GraphedForward:
    """In the place of a model's forward: `graphed` has the contract."""

    def __init__(self, model: nn.Module, max_graphs: int):
        # Not the model itself, which then would be freed by the garbage collector alone.
        self._model, self.max_graphs = weakref.ref(model), max_graphs
        self.__signature__ = inspect.signature(self.plain)
        self._names = tuple(self.__signature__.parameters)
        self._known = {*self._names, *KEYWORDS}
        self._lock = threading.Lock()  # the graphs' buffers are for one call at a time
        self._state: State | None = None
        self._device: CudaGraphs | None = None
        self._graphs: OrderedDict[tuple[int, int], Graph] = OrderedDict()
        self._failed: dict[tuple[int, int], str] = {}

    @property
    def model(self) -> nn.Module:
        return self._model()

    @property
    def plain(self) -> Callable:
        """The forward of the model's class."""
        return type(self.model).forward.__get__(self.model)

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
        given = dict(zip(self._names, args, strict=False)) | kwargs if args else kwargs
        refused = self._why_not(given, len(args) + len(kwargs))
        if refused is None:
            inputs = tuple(map(given.get, INPUTS))
            with self._lock:
                outputs, refused = self._replayed(*inputs)
            if refused is None:
                as_dict = given.get("return_dict")
                as_dict = self.model.config.return_dict if as_dict is None else as_dict
                return outputs if as_dict else outputs.to_tuple()
        if refused:
            level = logging.INFO if self.model.device.type == "cpu" else logging.WARNING
            ops.say_once(level, f"no CUDA graph: {refused}")
        return self.plain(*args, **kwargs)

    def _why_not(self, given: dict, num_given: int) -> str | None:
        """Why no graph serves such a call of whatever model; empty where the model's own forward knows better."""
        if self.model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled():
            return "gradients are recorded: call the model under torch.no_grad() or torch.inference_mode()"
        if torch.is_autocast_enabled(DEVICE_TYPE):
            return "autocast is on: give the model its dtype by .to()"
        if ops.current_backend() == "eager":
            return "backend 'eager' is chosen"
        if ops.CHECK_IDS:
            return "FASTBERT_CHECK=1 waits for each call"
        if len(given) != num_given:
            return ""  # too many arguments, or one twice
        for name, value in given.items():
            if name not in self._known:
                return ""
            if value is not None and value is not False and name not in INPUTS and name != "return_dict":
                return f"{name} is given"
        input_ids = given.get("input_ids")
        if type(input_ids) is not Tensor or input_ids.ndim != 2 or input_ids.dtype not in INTEGERS:
            return "input_ids are not integers [B, S]"
        if 0 in input_ids.shape:
            return ""
        for name, dtypes in (("attention_mask", MASKS), ("token_type_ids", INTEGERS)):
            x = given.get(name)
            if x is not None and (type(x) is not Tensor or x.shape != input_ids.shape or x.dtype not in dtypes):
                return f"{name} is not integers [B, S]"
        return None

    def _replayed(self, input_ids, attention_mask, token_type_ids) -> tuple[ModelOutput | None, str | None]:
        """The outputs, or why there are none."""
        state = self._state
        if state is None or ((state.refusal or not state.has_its_tables()) and not state.is_current()):
            state = self._renewed()
        for _ in range(3):
            if state.refusal:
                return None, state.refusal
            batch_size, seq_len = input_ids.shape
            if seq_len > state.num_positions:
                return None, ""  # an error, which the model itself words
            bucket = _power_of_two(batch_size), min(max(SHORTEST, _power_of_two(seq_len)), state.num_positions)
            if bucket[0] * bucket[1] > MOST_PLACES:
                return None, f"beyond {MOST_PLACES} places a batch, launches cost nothing beside the work"
            ops.raise_bad_ids(state.device)
            # What is captured is looked at before, what was captured while it runs.
            if bucket in self._graphs or state.is_current():
                graph = self._graph(bucket)
                if graph is None:
                    return None, self._failed[bucket]
                self._device.in_order()
                graph.launch(input_ids, attention_mask, token_type_ids)
                if state.is_current():
                    return graph.outputs(), None
            state = self._renewed()
        return None, "every call changes the model"

    def _graph(self, bucket: tuple[int, int]) -> Graph | None:
        """The graph of a bucket, captured if need be; None where that failed, now or before."""
        if bucket in self._graphs:
            self._graphs.move_to_end(bucket)
        elif bucket not in self._failed:
            try:
                graph = Graph(self.plain, self._device, *bucket)
            except RuntimeError as error:  # the device's memory is full, or CUDA refuses something
                self._failed[bucket] = f"capturing {bucket[0]} x {bucket[1]} places failed: {error}"
                return None
            if graph.output_bytes > MOST_OUTPUT_BYTES:
                self._failed[bucket] = f"the outputs of a bucket take more than {MOST_OUTPUT_BYTES >> 20} MiB"
                return None
            self._graphs[bucket] = graph
            if len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
                limit = f"more buckets of batch sizes and lengths than max_graphs={self.max_graphs}"
                ops.say_once(logging.WARNING, f"{limit}: the least recently used graph makes room for each new one")
        return self._graphs.get(bucket)

    def _renewed(self) -> State:
        """The model's present state; graphs captured in another are gone."""
        if self._graphs:
            self._device.wait()  # they may run
            self._graphs.clear()
        self._failed.clear()
        self._state = State(self.model)
        if self._state.refusal is None:
            self._device = CudaGraphs(self._state.device)
        return self._state


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not below the size."""
    return 1 << (size - 1).bit_length()
