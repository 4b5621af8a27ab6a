"""What a launch has to do at least: floating-point operations and bytes, and the time they take at a GPU's roofs.

Each operand is read from memory once and each result written once (Williams et al. 2009); nothing is said of launches
or caches. These are the denominators of measurements.
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
# What one layer launches, by its place in the layer.
LAYER = ("qkv_projection", "attention", "attention_output", "linear_activation", "feed_forward_output")


class Roofs(NamedTuple):
    """The rates a GPU reaches: a large product of random data, a large copy (bytes read and written)."""

    flops_per_s: dict[str, float]
    bytes_per_s: float


# Measured on an NVIDIA H200: bf16, 8192^3, and a device copy. fp16 runs on the same units. fp32 is derived and not
# measured: TF32 runs at half of bf16's rate, and a product takes three.
H200 = Roofs({"bf16": 788e12, "fp16": 788e12, "fp32": 788e12 / 6}, 4.3e12)


class Work(NamedTuple):
    flops: float
    bytes: float

    def seconds(self, dtype: str, roofs: Roofs = H200) -> float:
        """The floor: operations and bytes move at the same time, so the slower of the two counts."""
        return max(self.flops / roofs.flops_per_s[dtype], self.bytes / roofs.bytes_per_s)


def work(place: str, model: Model, batch_size: int, seq_len: int, itemsize: int) -> Work:
    """The work of one launch on a full batch [B, S]; place: one of LAYER, "row_lengths" and "packing_plan" (its two
    launches), "embed_layer_norm", "layer_norm" (alone), "unpack", "pool" or "pooler". Ids and indices are int64."""
    tokens, (_, width, _, inner) = batch_size * seq_len, model
    rows, ids = tokens * width * itemsize, 8 * tokens

    def linear(tokens: int, inputs: int, outputs: int, residual: int = 0) -> Work:
        elements = tokens * (inputs + outputs + residual) + (inputs + 1) * outputs
        return Work(2.0 * tokens * inputs * outputs, float(elements * itemsize))

    match place:
        case "qkv_projection":
            return linear(tokens, width, 3 * width)
        case "attention":
            return Work(4.0 * tokens * seq_len * width, 4.0 * rows)
        case "attention_output":
            return linear(tokens, width, width, residual=width)
        case "linear_activation":
            return linear(tokens, width, inner)
        case "feed_forward_output":
            return linear(tokens, inner, width, residual=width)
        case "pooler":
            return linear(batch_size, width, width)
        case "row_lengths":
            return Work(0.0, float(ids))
        case "packing_plan":
            return Work(0.0, 2.0 * ids)
        case "embed_layer_norm":  # ids, types and indices; a row of words, and every position once
            return Work(0.0, 2.0 * rows + seq_len * width * itemsize + 3.0 * ids)
        case "layer_norm":
            return Work(0.0, 2.0 * rows)
        case "unpack":
            return Work(0.0, 2.0 * rows + ids)
        case "pool":
            return Work(0.0, float(rows + batch_size * width * itemsize))
    raise ValueError(f"no launch is called {place!r}")
