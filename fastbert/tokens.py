"""The token layout: where the tokens of a padded batch [B, S] lie in the packed one [T].

Letters used in every shape of this project: B batch, S padded length, T packed tokens, H heads, D head size, E hidden
size, F feed-forward size, V vocabulary.

Padding is removed once, before the embeddings, and put back once, after the last layer, as zeros. The number of tokens
is known to the host where the mask is on the CPU, and otherwise stays on the device, in buffers of B * S rows. Where no
kernel could read it there and shapes may not depend on data (a graph is traced, the tensors are not on the CPU), or
where a mask is not per token, nothing is dropped: the hidden states stay [B, S, E] and attention gets a mask.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing
from fastbert.ops.eager import clear_past, finite, sequence_of


def shapes_may_depend_on_data(tensor: Tensor) -> bool:
    """Whether the host may read this tensor's values for free and size other tensors by them."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not is_tracing()


def copied_to(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on a device, without waiting for what the device has still to do.

    A copy from ordinary host memory may go ahead: the driver has read it before the call returns. From pinned memory,
    or to the host, the values might change or not have arrived.
    """
    # accelerate names devices by strings and numbers.
    free = tensor.device.type == "cpu" and torch.device(device).type == "cuda" and not tensor.is_pinned()
    return tensor.to(device, non_blocking=free)


@dataclass(frozen=True)
class TokenLayout:
    """How one batch is laid out inside the encoder.

    cu_seqlens int32 [N + 1] bounds the N sequences among the tokens; no sequence is longer than max_seqlen.
    indices int64 [T] is the padded place of each packed token, None where every place is kept.
    padded says that hidden states are [B, S, E] and not [T, E]; then keep (bool [B, S]) marks the tokens that are not
    padding, and mask ([B or 1, H or 1, S or 1, S], bool with True for "attend", or additive) goes to attention.
    implementation ("sdpa" or "eager") is the eager path's attention; backend is what the forward's caller chose, in
    which a layer is computed again, too.
    num_tokens int32 [1], where only the device knows it, is how many of the T = B * S packed rows are tokens; indices,
    if there is one, is then a permutation of all places, the kept ones first.
    """

    batch_size: int
    seq_len: int
    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor | None = None
    padded: bool = False
    keep: Tensor | None = None
    mask: Tensor | None = None
    implementation: str = "sdpa"
    num_tokens: Tensor | None = None
    backend: str = field(default_factory=backend.current_backend)

    def pack(self, hidden_states: Tensor) -> Tensor:
        """[B, S, E] -> the encoder's own layout: [T, E], or [B, S, E] where nothing is dropped."""
        if self.padded:
            return hidden_states
        hidden_states, indices = hidden_states.flatten(0, 1), self.to(hidden_states.device).indices
        return hidden_states if indices is None else hidden_states[indices]

    def unpack(self, hidden_states: Tensor) -> Tensor:
        """The encoder's own layout -> [B, S, E] with zeros at padding."""
        layout = self.to(hidden_states.device)
        if layout.padded:
            return layout.clear(hidden_states)
        if layout.indices is None:
            hidden_states = clear_past(hidden_states, layout.num_tokens)
        return ops.unpack(hidden_states, layout.indices, layout.batch_size, layout.seq_len, layout.num_tokens)

    def first_tokens(self, sequence_output: Tensor) -> Tensor:
        """[B, S, E] -> [N, E]: each sequence's first kept token, zeros for a sequence without one."""
        layout = self.to(sequence_output.device)
        if layout.keep is not None:
            first = layout.keep.int().argmax(1)
            tokens = sequence_output[torch.arange(layout.batch_size, device=first.device), first]
            return tokens.masked_fill(~layout.keep.any(1, keepdim=True), 0)
        if layout.indices is None and layout.cu_seqlens.shape[0] == layout.batch_size + 1 and layout.seq_len:
            return sequence_output[:, 0]
        return ops.pool(sequence_output.flatten(0, 1), layout.cu_seqlens, "first", indices=layout.indices)

    def pack_cleared(self, values: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...] with zeros in the rows that are no tokens: an index at padding may be anything."""
        return self.clear_past_tokens(self.pack(values))

    def clear_past_tokens(self, hidden_states: Tensor) -> Tensor:
        """[T, E] with zeros in the rows that are no tokens, for modules that take every row for one."""
        return clear_past(hidden_states, self.to(hidden_states.device).num_tokens)

    def expand(self, values: Tensor | None) -> Tensor | None:
        """[B or 1, S] -> [B, S]; [B, S, E] as it is."""
        return values if values is None or values.ndim > 2 else values.expand(self.batch_size, -1)

    def clear(self, values: Tensor | None) -> Tensor | None:
        """[B, S, ...] or [1, S] with zeros at padding where nothing is dropped: what stands there must not matter."""
        if values is None or self.keep is None:
            return values
        keep = self.keep if values.shape[0] == self.keep.shape[0] else self.keep.any(0, keepdim=True)
        return values.masked_fill(~(keep if values.ndim == 2 else keep[..., None]), 0)

    def attention_mask(self, hidden_states: Tensor) -> Tensor | None:
        """The mask of a layout that drops nothing as transformers' modules take it: [B or 1, H or 1, S, S] or None,
        boolean for "sdpa" and otherwise added to the scores of these hidden states."""
        mask = self.to(hidden_states.device).mask
        if mask is None:
            return None
        if mask.dtype == torch.bool and self.implementation == "eager":
            mask = hidden_states.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(hidden_states.dtype).min)
        return finite(mask, hidden_states.dtype).expand(-1, -1, self.seq_len, self.seq_len)

    def restarting_positions(self) -> Tensor:
        """int64 [1, T]: each token's place in its own sequence, for texts packed end to end."""
        starts = self.cu_seqlens[sequence_of(self.cu_seqlens, self.seq_len)]
        return (torch.arange(self.seq_len, device=starts.device) - starts)[None]

    def as_padded(self) -> "TokenLayout":
        """The same batch with nothing dropped, for modules that must see Hugging Face's [B, S, E]."""
        if self.padded:
            return self
        keep, mask = None, None
        if self.indices is not None:
            tokens = torch.ones_like(self.indices, dtype=torch.float32)
            keep = ops.unpack(tokens, self.indices, self.batch_size, self.seq_len, self.num_tokens) != 0
            mask = _key_mask(keep)
        elif self.cu_seqlens.numel() - 1 != self.batch_size:
            mask = _block_diagonal_mask(self.cu_seqlens, self.seq_len)
        cu_seqlens = _uniform_cu_seqlens(self.batch_size, self.seq_len, self.cu_seqlens.device)
        return replace(
            self, cu_seqlens=cu_seqlens, max_seqlen=self.seq_len, indices=None, padded=True, keep=keep, mask=mask,
            num_tokens=None,
        )  # fmt: skip

    def to(self, device: torch.device) -> "TokenLayout":
        """The layout on a layer's device: `device_map` can spread the layers over several."""
        if self.cu_seqlens.device == device:
            return self
        moved = {name: getattr(self, name) for name in ("cu_seqlens", "indices", "keep", "mask", "num_tokens")}
        moved = {name: copied_to(device, tensor) for name, tensor in moved.items() if tensor is not None}
        return replace(self, **moved)


def layout_from_mask(
    attention_mask: Tensor | None, batch_size: int, seq_len: int, device: torch.device, heads: Collection[int] = ()
) -> TokenLayout:
    """The layout of a padded batch, for layers of these numbers of heads.

    attention_mask: None keeps every token. 0/1 [B or 1, S] of any integer, bool or float dtype may have padding and
    holes anywhere. A mask of scores, [B or 1, S or 1, S] or [B or 1, H or 1, S or 1, S], is bool or 0/1 integers with 1
    for "attend", or floats that are added. Raises ValueError or TypeError for anything else.
    """
    if attention_mask is not None:
        check_mask(attention_mask, batch_size, seq_len, heads)
    packs = attention_mask is not None and attention_mask.ndim == 2 and batch_size and seq_len
    if packs and not shapes_may_depend_on_data(attention_mask) and backend.packs_on_device(device):
        mask = attention_mask if attention_mask.device == device else copied_to(device, attention_mask != 0)
        return _planned_on_device(mask.expand(batch_size, seq_len))
    every_token = TokenLayout(batch_size, seq_len, _uniform_cu_seqlens(batch_size, seq_len, device), seq_len)
    if attention_mask is None or batch_size == 0 or seq_len == 0:
        return every_token
    if attention_mask.ndim > 2:
        return replace(every_token, padded=True, mask=_score_mask(copied_to(device, attention_mask)))
    keep = (attention_mask != 0).expand(batch_size, seq_len)
    if not shapes_may_depend_on_data(attention_mask):
        keep = copied_to(device, keep)
        return replace(every_token, padded=True, keep=keep, mask=_key_mask(keep))
    lengths = keep.sum(1)
    indices = keep.flatten().nonzero().flatten()
    if len(indices) == batch_size * seq_len:
        return every_token
    cu_seqlens = lengths.new_zeros(batch_size + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    packed = TokenLayout(batch_size, seq_len, cu_seqlens, int(lengths.max()), indices)
    return packed.to(device)


def _planned_on_device(mask: Tensor) -> TokenLayout:
    """The packed layout of a mask [B, S] on a device whose values the host does not know."""
    indices, cu_seqlens = ops.packing_plan(mask)
    batch_size, seq_len = mask.shape
    if is_tracing() or type(mask) is not Tensor or not torch.is_grad_enabled():
        return TokenLayout(batch_size, seq_len, cu_seqlens, seq_len, indices, num_tokens=cu_seqlens[-1:])
    # One read of the count: what is recorded for a backward has its size, and the backward no rows that are no tokens.
    return TokenLayout(batch_size, seq_len, cu_seqlens, seq_len, indices[: int(cu_seqlens[-1])])


def layout_from_scores(mask: Tensor | None, hidden_states: Tensor, heads: Collection[int]) -> TokenLayout:
    """The layout, in which nothing is dropped, for somebody who calls the encoder with hidden states [B, S, E] and a
    mask of scores (or None), as in transformers."""
    batch_size, seq_len, _ = hidden_states.shape
    if isinstance(mask, Tensor) and mask.ndim < 3:
        mask = mask[(None,) * (4 - mask.ndim)]
    return layout_from_mask(mask, batch_size, seq_len, hidden_states.device, heads).as_padded()


def layout_from_cu_seqlens(
    cu_seqlens: Tensor, max_seqlen: int | None, batch_size: int, seq_len: int, device: torch.device
) -> TokenLayout:
    """The layout of texts that are already packed end to end into one row, as `DataCollatorWithFlattening` sends them.

    cu_seqlens: integers [N + 1] from 0 to S, never falling; batch_size must be 1. Raises ValueError otherwise, but for
    bounds that the host does not know: what they leave out at the end is zeros then.
    """
    if batch_size != 1 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seq_lens_q needs one row of packed tokens and the bounds of its texts, [1, S] and [N + 1]; "
            f"got {batch_size} rows and cu_seq_lens_q of shape {list(cu_seqlens.shape)}"
        )
    if shapes_may_depend_on_data(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != seq_len or bounds != sorted(bounds):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {seq_len} tokens of the row, got {bounds}")
        max_seqlen = max(after - before for before, after in pairwise(bounds))
        return TokenLayout(batch_size, seq_len, cu_seqlens.to(torch.int32), max_seqlen).to(device)
    # Without the host's knowledge of the lengths, a sequence can be as long as the row, and the last end before it.
    cu_seqlens = copied_to(device, cu_seqlens).to(torch.int32)
    longest = seq_len if max_seqlen is None else max_seqlen
    return TokenLayout(batch_size, seq_len, cu_seqlens, longest, num_tokens=cu_seqlens[-1:])


def check_mask(mask: Tensor, batch_size: int, seq_len: int, heads: Collection[int]) -> None:
    """Raise TypeError for a mask that is no tensor of numbers, ValueError for one of the wrong shape or values."""
    if not isinstance(mask, Tensor) or mask.dtype.is_complex:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attention_mask must be a tensor of bool, integers or floats, got {kind}")
    allowed = {
        2: ((1, batch_size), (1, seq_len)),
        3: ((1, batch_size), (1, seq_len), (seq_len,)),
        4: ((1, batch_size), (1, *heads), (1, seq_len), (1, seq_len)),
    }.get(mask.ndim)
    shape = list(mask.shape)
    if allowed is None or any(size not in sizes for size, sizes in zip(shape, allowed, strict=True)):
        raise ValueError(
            f"attention_mask has shape {shape}, but the batch is [{batch_size}, {seq_len}]: expected "
            f"[{batch_size}, {seq_len}], [{batch_size}, {seq_len}, {seq_len}], or a shape that broadcasts to "
            f"[{batch_size}, {max(heads, default=1)}, {seq_len}, {seq_len}]"
        )
    additive = mask.ndim > 2 and mask.is_floating_point()
    if mask.dtype == torch.bool or additive or not shapes_may_depend_on_data(mask):
        return
    if mask.is_floating_point() or mask.ndim > 2:
        others = mask[(mask != 0) & (mask != 1)]
        if others.numel():
            raise ValueError(
                f"a {mask.ndim}-D attention_mask of {mask.dtype} must hold 0 and 1 only, found {others[0].item()}; "
                "additive masks are floats of shape [B, 1, S, S] or [B, 1, 1, S]"
            )


def _uniform_cu_seqlens(batch_size: int, seq_len: int, device: torch.device) -> Tensor:
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len


def _key_mask(keep: Tensor) -> Tensor:
    """[B, S] -> [B, 1, 1, S]. A text without any token attends to everything: its softmax over nothing would be NaN,
    in the gradients even though its outputs are zeroed."""
    return (keep | ~keep.any(1, keepdim=True))[:, None, None]


def _score_mask(mask: Tensor) -> Tensor:
    """[B, S, S] or 4-D -> 4-D, bool or additive; a row that masks every key attends to all of them, as under
    transformers' additive minimum."""
    mask = mask[:, None] if mask.ndim == 3 else mask
    if mask.is_floating_point():
        return mask
    mask = mask != 0
    return mask | ~mask.any(-1, keepdim=True)


def _block_diagonal_mask(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[N + 1] -> [1, 1, T, T]: tokens attend within their own sequence."""
    sequence = sequence_of(cu_seqlens, num_tokens)
    return (sequence[:, None] == sequence)[None, None]
