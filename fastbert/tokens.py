"""The token layout maps a padded batch [B, S] to packed tokens [T] and back.

Letters used in every shape of this project: B batch, S padded length, T packed tokens, H heads, D head size, E hidden
size, F feed-forward size, V vocabulary. N is the number of sequences, which is B unless sequences share a row.

Padding is removed once, before the embeddings, and restored once, after the last layer, as zeros. The host knows the
number of tokens if the mask is on the CPU, and reads it from the device if gradients are recorded outside of a trace.
Otherwise the number stays on the device and buffers have B * S rows. A batch stays padded, with hidden states [B, S, E]
and a mask for attention, if its mask has more than two dimensions, or if neither the host nor a kernel can read the
number of tokens (while tracing, or with a mask on a device without kernels).
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import backend
from fastbert.ops.backend import is_tracing
from fastbert.ops.eager import OptionalTensor, clear_past, finite, sequence_of


def shapes_may_depend_on_data(tensor: Tensor) -> bool:
    """True if the host can read the tensor's values without waiting, and nothing that records the call forbids it."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not is_tracing()


def copied_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy a tensor to a device, without waiting for the device if that is safe.

    It is safe from pageable host memory, because the driver reads it before the call returns. Pinned memory could be
    overwritten before it is read; a copy to the host could be read before it arrives.
    """
    # torch.device(): accelerate passes strings and numbers.
    safe = tensor.device.type == "cpu" and torch.device(device).type == "cuda" and not tensor.is_pinned()
    return tensor.to(device, non_blocking=safe)


@dataclass(frozen=True)
class TokenLayout:
    """The layout of one batch inside the encoder.

    cu_seqlens: int32 [N + 1], the offsets of the N sequences among the tokens.
    max_seqlen: upper bound of the sequence lengths.
    indices: int64 [T], the position of each packed token in the flattened batch; None if every token is kept.
    padded: True if hidden states are [B, S, E] instead of [T, E].
    keep: if padded, bool [B, S], False for padding, or None without padding.
    mask: if padded, attention's mask [B or 1, H or 1, S or 1, S] or None: bool (True means attend) or additive.
    implementation: "sdpa" or "eager", the attention of the eager path.
    num_tokens: int32 [1], the number of tokens among the T = B * S rows if only the device knows it, otherwise None.
        indices is then a permutation of all positions, kept ones first.
    backend: the back end chosen by the caller of forward. Gradient checkpointing must recompute a layer with it.
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
        """[B, S, E] -> [T, E], or unchanged if padded."""
        if self.padded:
            return hidden_states
        hidden_states, indices = hidden_states.flatten(0, 1), self.to(hidden_states.device).indices
        return hidden_states if indices is None else hidden_states[indices]

    def unpack(self, hidden_states: Tensor) -> Tensor:
        """[T, E], or [B, S, E] if padded, -> [B, S, E] with zeros at padding."""
        layout = self.to(hidden_states.device)
        if layout.padded:
            return layout.clear(hidden_states)
        if layout.indices is None:
            hidden_states = clear_past(hidden_states, layout.num_tokens)
        return ops.unpack(hidden_states, layout.indices, layout.batch_size, layout.seq_len, layout.num_tokens)

    def first_tokens(self, sequence_output: Tensor) -> Tensor:
        """[B, S, E] -> [N, E]: the first kept token of each sequence, zeros for an empty sequence."""
        layout = self.to(sequence_output.device)
        if layout.keep is not None:
            first = layout.keep.int().argmax(1)
            tokens = sequence_output[torch.arange(layout.batch_size, device=first.device), first]
            return tokens.masked_fill(~layout.keep.any(1, keepdim=True), 0)
        if layout.indices is None and layout.cu_seqlens.shape[0] == layout.batch_size + 1 and layout.seq_len:
            return sequence_output[:, 0]
        return ops.pool(sequence_output.flatten(0, 1), layout.cu_seqlens, "first", indices=layout.indices)

    def pack_cleared(self, values: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...] with zeros in rows past the last token, because ids at padding may be invalid."""
        return self.clear_past_tokens(self.pack(values))

    def clear_past_tokens(self, hidden_states: Tensor) -> Tensor:
        """Zero the rows of [T, E] past the last token, for modules that treat every row as a token."""
        return clear_past(hidden_states, self.to(hidden_states.device).num_tokens)

    def expand(self, values: OptionalTensor) -> OptionalTensor:
        """[B or 1, S] -> [B, S]; [B, S, E] and None are returned unchanged."""
        if values is None or values.ndim > 2:
            return values
        return values.expand(self.batch_size, -1)

    def clear(self, values: OptionalTensor) -> OptionalTensor:
        """Zero the padding of [B, S, ...] or [1, S] if the layout is padded, so that its values have no effect."""
        if values is None or self.keep is None:
            return values
        keep = self.keep if values.shape[0] == self.keep.shape[0] else self.keep.any(0, keepdim=True)
        return values.masked_fill(~(keep if values.ndim == 2 else keep[..., None]), 0)

    def attention_mask(self, hidden_states: Tensor) -> Tensor | None:
        """The mask of a padded layout in the form of transformers' modules: [B or 1, H or 1, S, S] or None, bool for
        "sdpa", additive in the dtype of the hidden states for "eager"."""
        mask = self.to(hidden_states.device).mask
        if mask is None:
            return None
        if mask.dtype == torch.bool and self.implementation == "eager":
            mask = hidden_states.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(hidden_states.dtype).min)
        return finite(mask, hidden_states.dtype).expand(-1, -1, self.seq_len, self.seq_len)

    def restarting_positions(self) -> Tensor:
        """int64 [1, T]: the position of each token in its own sequence, for sequences packed into one row."""
        starts = self.cu_seqlens[sequence_of(self.cu_seqlens, self.seq_len)]
        return (torch.arange(self.seq_len, device=starts.device) - starts)[None]

    def as_padded(self) -> "TokenLayout":
        """The padded layout of the same batch, for modules that need transformers' shape [B, S, E]."""
        if self.padded:
            return self
        keep, mask = None, None
        if self.indices is not None:
            tokens = torch.ones_like(self.indices, dtype=torch.float32)
            keep = ops.unpack(tokens, self.indices, self.batch_size, self.seq_len, self.num_tokens) != 0
            mask = _key_mask(keep)
        if self.cu_seqlens.numel() - 1 != self.batch_size:
            # Tokens past the last offset form a block of their own.
            mask = _block_diagonal_mask(self.cu_seqlens, self.seq_len)
        cu_seqlens = _uniform_cu_seqlens(self.batch_size, self.seq_len, self.cu_seqlens.device)
        return replace(
            self, cu_seqlens=cu_seqlens, max_seqlen=self.seq_len, indices=None, padded=True, keep=keep, mask=mask,
            num_tokens=None,
        )  # fmt: skip

    def to(self, device: torch.device) -> "TokenLayout":
        """The layout on another device: `device_map` can place layers on different devices."""
        if self.cu_seqlens.device == device:
            return self
        moved = {name: getattr(self, name) for name in ("cu_seqlens", "indices", "keep", "mask", "num_tokens")}
        moved = {name: copied_to(device, tensor) for name, tensor in moved.items() if tensor is not None}
        return replace(self, **moved)


def layout_from_mask(
    attention_mask: Tensor | None, batch_size: int, seq_len: int, device: torch.device, heads: Collection[int] = ()
) -> TokenLayout:
    """The layout of a padded batch.

    attention_mask: None keeps every token. A padding mask [B or 1, S] holds 0 and 1 in any real dtype, zeros anywhere.
    A score mask [B or 1, S or 1, S] or [B or 1, H or 1, S or 1, S] is bool or 0/1 integers (1 means attend), or
    additive floats. heads: the valid values of H, since layers may differ. Raises ValueError or TypeError for any
    other mask.
    """
    if attention_mask is not None:
        check_mask(attention_mask, batch_size, seq_len, heads)
    if attention_mask is None or batch_size == 0 or seq_len == 0:
        return TokenLayout(batch_size, seq_len, _uniform_cu_seqlens(batch_size, seq_len, device), seq_len)
    if attention_mask.ndim == 2 and not shapes_may_depend_on_data(attention_mask) and backend.packs_on_device(device):
        mask = attention_mask if attention_mask.device == device else copied_to(device, attention_mask != 0)
        return _layout_on_device(mask.expand(batch_size, seq_len))
    every_token = TokenLayout(batch_size, seq_len, _uniform_cu_seqlens(batch_size, seq_len, device), seq_len)
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


def _layout_on_device(mask: Tensor) -> TokenLayout:
    """The packed layout of a padding mask [B, S] whose values only the device knows."""
    indices, cu_seqlens = ops.packing_plan(mask)
    batch_size, seq_len = mask.shape
    if is_tracing() or type(mask) is not Tensor or not torch.is_grad_enabled():
        return TokenLayout(batch_size, seq_len, cu_seqlens, seq_len, indices, num_tokens=cu_seqlens[-1:])
    # With gradients the host reads the number of tokens, so that the tensors saved for backward hold tokens only.
    return TokenLayout(batch_size, seq_len, cu_seqlens, seq_len, indices[: int(cu_seqlens[-1])])


def layout_from_score_mask(mask: Tensor | None, hidden_states: Tensor, heads: Collection[int]) -> TokenLayout:
    """The padded layout for a direct call of the encoder with hidden states [B, S, E] and a score mask or None, as in
    transformers."""
    batch_size, seq_len, _ = hidden_states.shape
    if isinstance(mask, Tensor) and mask.ndim < 3:
        mask = mask[(None,) * (4 - mask.ndim)]
    return layout_from_mask(mask, batch_size, seq_len, hidden_states.device, heads).as_padded()


def layout_from_cu_seqlens(
    cu_seqlens: Tensor, max_seqlen: int | None, batch_size: int, seq_len: int, device: torch.device
) -> TokenLayout:
    """The layout of sequences that are already packed into one row, as by `DataCollatorWithFlattening`.

    cu_seqlens: integers [N + 1] from 0 to S, not decreasing; batch_size must be 1. Raises ValueError otherwise. Offsets
    on a device may end below S; tokens past the last one get zeros. Without gradients and in a trace these are not
    checked, and their sequences may be as long as max_seqlen; None means S.
    """
    if batch_size != 1 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seq_lens_q needs one row [1, S] of packed tokens and holds the offsets [N + 1] of its sequences; "
            f"got {batch_size} rows and cu_seq_lens_q of shape {list(cu_seqlens.shape)}"
        )
    on_host = shapes_may_depend_on_data(cu_seqlens)
    # With gradients the host reads the offsets, as in `_layout_on_device`.
    if on_host or (torch.is_grad_enabled() and type(cu_seqlens) is Tensor and not is_tracing()):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > seq_len or bounds != sorted(bounds) or (on_host and bounds[-1] != seq_len):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {seq_len} tokens of the row, got {bounds}")
        longest = max(after - before for before, after in pairwise(bounds))
        indices = None if bounds[-1] == seq_len else torch.arange(bounds[-1], device=device)
        return TokenLayout(batch_size, seq_len, cu_seqlens.to(torch.int32), longest, indices).to(device)
    # The host does not know the lengths: one sequence may fill the row, or the last one may end before the row does.
    cu_seqlens = copied_to(device, cu_seqlens).to(torch.int32)
    longest = seq_len if max_seqlen is None else max_seqlen
    return TokenLayout(batch_size, seq_len, cu_seqlens, longest, num_tokens=cu_seqlens[-1:])


def check_mask(mask: Tensor, batch_size: int, seq_len: int, heads: Collection[int]) -> None:
    """Raise TypeError unless the mask is a tensor of real numbers or bools, ValueError for a bad shape or value."""
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
    """[B, S] -> [B, 1, 1, S]. An empty sequence attends to every key: a softmax over no key is NaN, and although its
    outputs are zeroed, its gradients would be NaN."""
    return (keep | ~keep.any(1, keepdim=True))[:, None, None]


def _score_mask(mask: Tensor) -> Tensor:
    """[B, S, S] or 4-D -> 4-D, bool or additive. A row that masks every key attends to all of them, as with
    transformers' additive mask of the dtype's minimum."""
    mask = mask[:, None] if mask.ndim == 3 else mask
    if mask.is_floating_point():
        return mask
    mask = mask != 0
    return mask | ~mask.any(-1, keepdim=True)


def _block_diagonal_mask(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[N + 1] -> [1, 1, T, T]: tokens attend within their own sequence."""
    sequence = sequence_of(cu_seqlens, num_tokens)
    return (sequence[:, None] == sequence)[None, None]
