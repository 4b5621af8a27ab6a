"""A captured forward and its buffers, and the CUDA calls of capture and replay."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from fastbert.graph_rules import ThreadSetting
from fastbert.outputs import output_of
from fastbert.tokens import copied_to

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of padded batches
PACKED_INPUTS = ("input_ids", "token_type_ids", "cu_seq_lens_q")
# Outputs [B, S] with a value per token; other two-dimensional outputs are per sequence. All three-dimensional outputs
# are per token.
PER_TOKEN = ("start_logits", "end_logits")

_IS_BUILT = torch.backends.cuda.is_built()
# Graphs whose capture failed: torch's allocator may still call them.
_broken: list[object] = []
# A process may run one capture at a time, and must not synchronize a device meanwhile.
_capturing = threading.Lock()


def reset_lock() -> None:
    """Replace the lock in a forked process: another thread may have held it."""
    global _capturing
    _capturing = threading.Lock()


class CudaGraphs:
    """The CUDA graphs of a model on one device. They share a memory pool, and so must run one after another."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # for captures
        self._last_stream: int | None = None
        self._done = torch.cuda.Event()

    def capture(self, run: Callable[[], ModelOutput]) -> tuple[Callable[[], None], ModelOutput]:
        """Run run() once, because it may compile, and capture its second run. Returns a function that replays it, and
        the outputs, which each replay overwrites."""
        # Set the stream here: torch.cuda.graph does not restore the caller's stream if a capture fails.
        with _capturing, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            torch.cuda.synchronize()
            run()
            graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads may launch and allocate during the capture.
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = run()
            except BaseException:
                _broken.append(graph)
                raise
        return graph.replay, outputs

    @staticmethod
    def is_capturing() -> bool:
        """Whether the current stream is being captured."""
        return _IS_BUILT and torch.cuda.is_current_stream_capturing()

    def memory(self) -> int:
        """Bytes of the pool, outputs included; 0 if unknown. Only dropping the last graph returns memory to CUDA."""
        if not _IS_BUILT or self.why_memory_unknown():
            return 0
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._pool))

    @staticmethod
    def why_memory_unknown() -> str | None:
        """Why the size of the pool is unknown; None if it is known."""
        if not _IS_BUILT or torch.cuda.get_allocator_backend() == "native":
            return None
        return "the memory of graphs is known for torch's native allocator only"

    def order_after_last_replay(self) -> None:
        """Make the current stream wait for the last replay, if that ran on another stream."""
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and stream.cuda_stream != self._last_stream:
            stream.wait_event(self._done)
        self._last_stream = stream.cuda_stream

    def record_replay(self) -> None:
        """Record that a replay and the copies of its outputs were launched."""
        self._done.record(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        """Wait for the last replay, but not for the whole device, on which another thread may be capturing."""
        self._done.synchronize()


class Padded(NamedTuple):
    """The bucket of padded batches up to [B, S]."""

    batch_size: int
    seq_len: int

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_len

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.seq_len}"


class Packed(NamedTuple):
    """The bucket of up to N packed sequences, of up to T tokens in all and up to max_seqlen each."""

    num_tokens: int
    num_sequences: int
    max_seqlen: int

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens in {self.num_sequences} sequences of up to {self.max_seqlen}"


class Graph:
    """A forward captured for the batches of one bucket."""

    def __init__(self, forward: Callable, graphs: CudaGraphs, bucket: Padded | Packed):
        self.bucket = bucket
        with torch.inference_mode(False):  # inference tensors can be written only in inference mode
            given = self._buffers(graphs.device)

        def run():
            with ThreadSetting("nested", True), torch.inference_mode(False), torch.no_grad():
                return forward(**given, return_dict=True)

        self._replay, self._outputs = graphs.capture(run)
        self.output_bytes = sum(x.nbytes for x in self._outputs.values())

    def _buffers(self, device: torch.device) -> dict[str, Tensor | int]:
        """Allocate the arguments of the captured call; `launch` writes to them."""
        raise NotImplementedError

    def launch(self, *inputs: Tensor | None) -> None:
        """Replay the graph for the inputs of a call."""
        raise NotImplementedError

    def _slice_outputs(self, num_sequences: int, batch_size: int, seq_len: int) -> None:
        """Select the views of the outputs that belong to a call: [N, ...] per sequence, [B, S, ...] per token."""
        self._results = {
            name: x[:batch_size, :seq_len] if x.ndim > 2 or name in PER_TOKEN else x[:num_sequences]
            for name, x in self._outputs.items()
        }

    def outputs(self) -> ModelOutput:
        """Copies of the outputs of the last launch."""
        return output_of(type(self._outputs), **{name: x.clone() for name, x in self._results.items()})


class PaddedGraph(Graph):
    """Inputs are input_ids, attention_mask and token_type_ids [B, S]."""

    bucket: Padded
    _size: torch.Size | None
    _num_given: int
    _batches: list[Tensor]

    def _buffers(self, device):
        self._inputs = torch.zeros(len(INPUTS), *self.bucket, dtype=torch.int64, device=device)
        self._size = None
        return dict(zip(INPUTS, self._inputs, strict=True))

    # Takes the inputs of its kind of bucket.
    def launch(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> None:
        if input_ids.shape != self._size:
            self._resize(input_ids.shape)
        # Missing inputs have their defaults in the buffer already: ones for the mask, zeros for the types.
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
            # The host memory here is not pinned, so the copy has read it when it returns.
            self._batches[count].copy_(torch.stack(rows), non_blocking=True)
        self._replay()

    def _resize(self, size: torch.Size) -> None:
        """Prepare the buffers for batches of a new size [B, S]."""
        batch_size, seq_len = size
        self._inputs.zero_()
        self._inputs[1, :batch_size, :seq_len] = 1
        self._num_given = 1
        # _batches[n]: the buffers of the first n inputs.
        self._batches = [self._inputs[:count, :batch_size, :seq_len] for count in range(len(INPUTS) + 1)]
        self._slice_outputs(batch_size, batch_size, seq_len)
        self._size = size


class PackedGraph(Graph):
    """Inputs are input_ids and token_type_ids [1, T], and cu_seq_lens_q [N + 1]."""

    bucket: Packed

    def _buffers(self, device):
        self._inputs = torch.zeros(2, self.bucket.num_tokens, dtype=torch.int64, device=device)
        self._cu_seqlens = torch.zeros(self.bucket.num_sequences + 1, dtype=torch.int32, device=device)
        input_ids, token_type_ids = self._inputs[:, None]
        given = (input_ids, token_type_ids, self._cu_seqlens, self.bucket.max_seqlen)
        return dict(zip((*PACKED_INPUTS, "max_length_q"), given, strict=True))

    def launch(  # type: ignore[override]
        self, input_ids: Tensor, token_type_ids: Tensor | None, cu_seqlens: Tensor
    ) -> None:
        (_, size), num_offsets = input_ids.shape, cu_seqlens.shape[0]
        self._inputs[:1, :size].copy_(input_ids)
        if token_type_ids is None:
            self._inputs[1, :size].zero_()
        else:
            self._inputs[1:, :size].copy_(token_type_ids)
        self._cu_seqlens[:num_offsets].copy_(cu_seqlens)
        # The remaining sequences of the bucket are empty.
        self._cu_seqlens[num_offsets:].copy_(cu_seqlens[-1:])
        self._slice_outputs(num_offsets - 1, 1, size)
        self._replay()
