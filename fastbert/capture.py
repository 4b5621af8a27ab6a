"""A captured forward: its buffers, and what capturing and replaying need of a CUDA device."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from fastbert.graph_rules import Set
from fastbert.outputs import output_of
from fastbert.tokens import copied_to

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of padded batches
PACKED_INPUTS = ("input_ids", "token_type_ids", "cu_seq_lens_q")
# Outputs of two dimensions that have a value for every token; those of three all do.
PER_TOKEN = ("start_logits", "end_logits")

_IS_BUILT = torch.backends.cuda.is_built()
# Graphs whose capture failed: torch's allocator may go on asking them.
_broken: list[object] = []
# There is one capture at a time in a process, and none while a device is waited for.
_capturing = threading.Lock()


def forget_locks() -> None:
    """For a process that was forked while another thread may have held them."""
    global _capturing
    _capturing = threading.Lock()


class CudaGraphs:
    """What replaying needs of a CUDA device: graphs that share one memory pool, and so run one after another."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # to capture on
        self._last_stream, self._done = None, torch.cuda.Event()

    def capture(self, run: Callable[[], ModelOutput]) -> tuple[Callable[[], None], ModelOutput]:
        """What replays run(), and the outputs that every replay writes anew. The first run, which may compile, is not
        captured."""
        # The stream outside of torch.cuda.graph, which does not put the caller's back where a capture fails.
        with _capturing, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            torch.cuda.synchronize()
            run()
            graph = torch.cuda.CUDAGraph()
            # What other threads launch or allocate is no part of this, and must not break it.
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = run()
            except BaseException:
                _broken.append(graph)
                raise
        return graph.replay, outputs

    @staticmethod
    def is_capturing() -> bool:
        """Whether what the current stream is given now goes into somebody's graph."""
        return _IS_BUILT and torch.cuda.is_current_stream_capturing()

    def memory(self) -> int:
        """Bytes of the pool, which has what graphs compute and their outputs. It shrinks with its last graph. 0 where
        nobody knows."""
        if not _IS_BUILT or self.why_unmeasured():
            return 0
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._pool))

    @staticmethod
    def why_unmeasured() -> str | None:
        """Why the memory of a pool is not known; None if it is."""
        if not _IS_BUILT or torch.cuda.get_allocator_backend() == "native":
            return None
        return "the memory of graphs is measured for torch's native allocator only"

    def in_order(self) -> None:
        """Let what the current stream does next come after the last replay, on whichever stream that was."""
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and stream.cuda_stream != self._last_stream:
            stream.wait_event(self._done)
        self._last_stream = stream.cuda_stream

    def done(self) -> None:
        """A replay, and the copies of what it gave, have been launched."""
        self._done.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Wait for the last replay, and not for the device, on which another thread may be capturing."""
        self._done.synchronize()


class Padded(NamedTuple):
    """The bucket of batches of up to [B, S]."""

    batch_size: int
    seq_len: int

    @property
    def places(self) -> int:
        return self.batch_size * self.seq_len

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.seq_len}"


class Packed(NamedTuple):
    """The bucket of up to N texts laid end to end, of up to T tokens in all, none of more than `longest`."""

    num_tokens: int
    num_texts: int
    longest: int

    @property
    def places(self) -> int:
        return self.num_tokens

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens of {self.num_texts} texts of up to {self.longest}"


class Graph:
    """The captured forward for the batches of a bucket."""

    def __init__(self, forward: Callable, graphs: CudaGraphs, bucket: Padded | Packed):
        self.bucket = bucket
        with torch.inference_mode(False):  # tensors that may be written in any mode
            given = self._buffers(graphs.device)

        def run():
            with Set("owned", True), torch.inference_mode(False), torch.no_grad():
                return forward(**given, return_dict=True)

        self._replay, self._outputs = graphs.capture(run)
        self.output_bytes = sum(x.nbytes for x in self._outputs.values())

    def _buffers(self, device: torch.device) -> dict[str, Tensor | int]:
        """The arguments of the captured call, which `launch` writes."""
        raise NotImplementedError

    def launch(self, *inputs: Tensor | None) -> None:
        """Replay the graph for these inputs of one call."""
        raise NotImplementedError

    def _keep(self, num_texts: int, batch_size: int, seq_len: int) -> None:
        """Cut from the outputs what belongs to the call: [N, ...] of texts, [B, S, ...] of tokens."""
        self._results = {
            name: x[:batch_size, :seq_len] if x.ndim > 2 or name in PER_TOKEN else x[:num_texts]
            for name, x in self._outputs.items()
        }

    def outputs(self) -> ModelOutput:
        """Copies of what the last launch gives, which share no memory."""
        return output_of(type(self._outputs), **{name: x.clone() for name, x in self._results.items()})


class PaddedGraph(Graph):
    """Inputs are input_ids, attention_mask and token_type_ids [B, S]."""

    bucket: Padded

    def _buffers(self, device):
        self._inputs = torch.zeros(len(INPUTS), *self.bucket, dtype=torch.int64, device=device)
        self._size = None
        return dict(zip(INPUTS, self._inputs, strict=True))

    def launch(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> None:
        if input_ids.shape != self._size:
            self._resize(input_ids.shape)
        # A row that is not given is already there: ones for a mask, zeros for types.
        if token_type_ids is not None:
            rows = [input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask, token_type_ids]
        else:
            rows = [input_ids] if attention_mask is None else [input_ids, attention_mask]
        count, batch = len(rows), self._batches[-1]
        if count < self._num_given:
            batch[2].zero_()
            if count == 1:
                batch[1].fill_(1)
        self._num_given = count
        device = input_ids.device
        for row in rows:
            if row.device != device:
                rows = [copied_to(self._inputs.device, x) for x in rows]
                device = self._inputs.device
                break
        if device == self._inputs.device:
            torch.stack(rows, out=self._batches[count])
        else:
            # From memory of the host that is not pinned, as here, a copy that goes ahead has been read when it returns.
            self._batches[count].copy_(torch.stack(rows), non_blocking=True)
        self._replay()

    def _resize(self, size: torch.Size) -> None:
        """Prepare the buffers for a batch of another size [B, S]."""
        batch_size, seq_len = size
        self._inputs.zero_()
        self._inputs[1, :batch_size, :seq_len] = 1
        self._num_given = 1
        # By the number of inputs that are given.
        self._batches = [self._inputs[:count, :batch_size, :seq_len] for count in range(len(INPUTS) + 1)]
        self._keep(batch_size, batch_size, seq_len)
        self._size = size


class PackedGraph(Graph):
    """Inputs are input_ids and token_type_ids [1, T], and cu_seq_lens_q [N + 1]."""

    bucket: Packed

    def _buffers(self, device):
        self._inputs = torch.zeros(2, self.bucket.num_tokens, dtype=torch.int64, device=device)
        self._bounds = torch.zeros(self.bucket.num_texts + 1, dtype=torch.int32, device=device)
        input_ids, token_type_ids = self._inputs[:, None]
        given = (input_ids, token_type_ids, self._bounds, self.bucket.longest)
        return dict(zip((*PACKED_INPUTS, "max_length_q"), given, strict=True))

    def launch(self, input_ids: Tensor, token_type_ids: Tensor | None, cu_seqlens: Tensor) -> None:
        (_, size), num_bounds = input_ids.shape, cu_seqlens.shape[0]
        self._inputs[:1, :size].copy_(input_ids)
        if token_type_ids is None:
            self._inputs[1, :size].zero_()
        else:
            self._inputs[1:, :size].copy_(token_type_ids)
        self._bounds[:num_bounds].copy_(cu_seqlens)
        # The texts that a bucket has room for beside these are empty.
        self._bounds[num_bounds:].copy_(cu_seqlens[-1:])
        self._keep(num_bounds - 1, 1, size)
        self._replay()
