"""The roofline time of a launch (Williams et al. 2009): its floating-point operations and bytes at a GPU's peak rates.

Each operand is read from memory once and each result is written once. Launch overhead and caches are not modelled.
"""

from typing import NamedTuple


class Model(NamedTuple):
    """The sizes of a BERT encoder."""

    num_layers: int
    width: int
    num_heads: int
    inner: int  # feed-forward


MODELS = {
    "tiny": Model(2, 128, 2, 512),
    "tinybert": Model(4, 312, 12, 1200),
    "minilm": Model(6, 384, 12, 1536),
    "base": Model(12, 768, 12, 3072),
    "large": Model(24, 1024, 16, 4096),
}
# The launches of one layer, by their place in it.
LAYER = ("qkv_projection", "attention", "attention_output", "linear_activation", "feed_forward_output")


class Roofs(NamedTuple):
    """The rates that a GPU reaches in a large product of random data and in a large copy (bytes read and written)."""

    flops_per_s: dict[str, float]
    bytes_per_s: float


# Measured on an NVIDIA H200: a bf16 product of 8192^3 and a device copy. fp16 runs on the same units. fp32 is derived,
# not measured: TF32 runs at half the rate of bf16, and a float32 product takes three.
H200 = Roofs({"bf16": 788e12, "fp16": 788e12, "fp32": 788e12 / 6}, 4.3e12)


class Work(NamedTuple):
    flops: float
    bytes: float

    def seconds(self, dtype: str, roofs: Roofs = H200) -> float:
        """Return the roofline time: computation and transfers overlap, so the slower of the two counts."""
        return max(self.flops / roofs.flops_per_s[dtype], self.bytes / roofs.bytes_per_s)


def work(place: str, model: Model, batch_size: int, seq_len: int, itemsize: int) -> Work:
    """Return the work of one launch on a full batch [B, S]. Ids and indices are int64.

    place: one of LAYER, "row_lengths" or "packing_plan" (the two launches of the packing plan), "embed_layer_norm",
    "layer_norm" (alone), "unpack", "pool" or "pooler"; of training "residual_layer_norm",
    "layer_norm_backward", "attention_forward", "attention_backward_dq", "attention_backward_dkv",
    "linear_activation_forward" or "activation_backward". Raises ValueError for another.
    """
    tokens, (_, width, num_heads, inner) = batch_size * seq_len, model
    rows, ids = tokens * width * itemsize, 8 * tokens
    product = 2.0 * tokens * seq_len * width  # of two of a sequence's queries, keys and values
    statistic = 4.0 * tokens * num_heads  # bytes of lse, or of delta

    def linear(tokens: int, inputs: int, outputs: int, residual: int = 0) -> Work:
        elements = tokens * (inputs + outputs + residual) + (inputs + 1) * outputs
        return Work(2.0 * tokens * inputs * outputs, float(elements * itemsize))

    match place:
        case "qkv_projection":
            return linear(tokens, width, 3 * width)
        case "attention":
            return Work(2 * product, 4.0 * rows)
        case "attention_forward":
            return Work(2 * product, 4.0 * rows + statistic)
        case "attention_backward_dq":  # scores, their gradient's product with V, and dQ
            return Work(3 * product, 6.0 * rows + 2 * statistic)
        case "attention_backward_dkv":  # the first two again, dK and dV
            return Work(4 * product, 6.0 * rows + 2 * statistic)
        case "attention_output":
            return linear(tokens, width, width, residual=width)
        case "linear_activation":
            return linear(tokens, width, inner)
        case "linear_activation_forward":  # writes two outputs
            return linear(tokens, width, inner, residual=inner)
        case "activation_backward":  # reads two and writes two
            return Work(0.0, 4.0 * tokens * inner * itemsize)
        case "feed_forward_output":
            return linear(tokens, inner, width, residual=width)
        case "pooler":
            return linear(batch_size, width, width)
        case "row_lengths":
            return Work(0.0, float(ids))
        case "packing_plan":
            return Work(0.0, 2.0 * ids)
        case "embed_layer_norm":  # reads ids, types, indices, a word row per token and each position row once
            return Work(0.0, 2.0 * rows + seq_len * width * itemsize + 3.0 * ids)
        case "layer_norm":
            return Work(0.0, 2.0 * rows)
        case "residual_layer_norm":  # reads two summands, writes their sum and the output
            return Work(0.0, 4.0 * rows)
        case "layer_norm_backward":  # reads the gradient's two summands and the rows, writes two gradients
            return Work(0.0, 5.0 * rows)
        case "unpack":
            return Work(0.0, 2.0 * rows + ids)
        case "pool":
            return Work(0.0, float(rows + batch_size * width * itemsize))
    raise ValueError(f"unknown place of a launch: {place!r}")
