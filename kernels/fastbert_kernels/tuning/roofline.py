"""The roofline time of a launch (Williams et al. 2009): its floating-point operations and bytes at a GPU's peak rates.

Each operand is read from memory once and each result is written once. Launch overhead and caches are not modelled.
"""

from collections.abc import Iterator
from typing import NamedTuple

from fastbert_kernels.layer_norm_backward import PROGRAMS_PER_SM


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
VOCABULARY, POSITIONS = 30522, 512  # rows of the embeddings' tables
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


class Part(NamedTuple):
    """Launches of one kind in a training step. runs: the kernel, or the PyTorch op; work: of all of them together."""

    runs: str
    what: str
    launches: int
    work: Work

    @property
    def in_our_kernel(self) -> bool:
        return self.runs.endswith("_kernel")


def training_layer(model: Model, lengths: list[int], dropout: bool) -> Iterator[Part]:
    """Yield the forward and the backward of a layer in 16-bit autocast with float32 parameters, in order.

    lengths: of the sequences, in tokens. The layer is not the first one, whose input is not normalized again.
    """
    _, width, num_heads, inner = model
    tokens, pairs = sum(lengths), float(sum(length**2 for length in lengths))
    rows, statistic = float(tokens * width), 4.0 * tokens * num_heads  # elements; bytes of lse, or of delta
    weights, biases = 4 * width * width + 2 * width * inner, 5 * width + inner
    norm_partials = 2 * 3 * 4.0 * width * min(tokens, 132 * PROGRAMS_PER_SM)  # 132 SMs; of both LayerNorms

    def attention(products: int, read_and_written: int, statistics: int) -> Work:
        return Work(2.0 * products * pairs * width, 2 * read_and_written * rows + statistics * statistic)

    def product(*sizes: tuple[int, int, int]) -> Work:
        """M x K times K x N, for each size."""
        return Work(sum(2.0 * m * k * n for m, k, n in sizes), sum(2.0 * (m * k + k * n + m * n) for m, k, n in sizes))

    def moved(size: float) -> Work:
        return Work(0.0, float(size))

    yield Part("foreach_copy_", "weights and biases to 16 bits", 1, moved(6 * (weights + biases)))
    if dropout:
        yield Part("randint", "seed of dropout", 1, moved(8))
    yield Part("_qkv_projection_kernel", "queries, keys, values", 1, work("qkv_projection", model, 1, tokens, 2))
    yield Part("_attention_fwd_kernel", "attention", 1, attention(2, 4, 1))
    yield Part("addmm", "attention's output", 1, product((tokens, width, width)))
    # Reads 16-bit rows and the float32 residual; writes the sum and the output in float32, and a 16-bit output.
    yield Part("_residual_layer_norm_kernel", "residual and LayerNorm", 2, moved(2 * 16 * rows))
    yield Part("_linear_kernel", "up and activation", 1, work("linear_activation_forward", model, 1, tokens, 2))
    yield Part("addmm", "down", 1, product((tokens, inner, width)))
    # Reads the gradient and the sum in float32, and once another 16-bit gradient; writes a gradient of each width.
    yield Part("_layer_norm_backward_kernel", "LayerNorm", 2, moved((14 + 16) * rows + norm_partials))
    of_inputs = product(
        (tokens, width, inner), (tokens, inner, width), (tokens, width, width), (tokens, 3 * width, width)
    )
    yield Part("mm", "gradients of inputs", 4, of_inputs)
    yield Part("_activation_backward_kernel", "activation", 1, work("activation_backward", model, 1, tokens, 2))
    of_weights = product(
        (width, tokens, inner), (inner, tokens, width), (width, tokens, width), (3 * width, tokens, width)
    )
    yield Part("mm", "gradients of weights", 4, of_weights)
    yield Part("_layer_norm_kernel", "inputs of two linears, made again", 2, moved(2 * 6 * rows))
    yield Part("_attention_bwd_dq_kernel", "attention, queries", 1, attention(3, 6, 2))
    yield Part("_attention_bwd_dkv_kernel", "attention, keys and values", 1, attention(4, 6, 2))
    yield Part("sum", "biases and partial sums", 4, moved(norm_partials + 6 * rows))
    yield Part("cat", "weights of queries, keys, values", 1, moved(2 * 2 * 3 * width * width))
    yield Part("add_", "gradient of the residual", 1, moved(10 * rows))
    yield Part("foreach_copy_", "gradients of weights to float32", 1, moved(6 * weights))


def parameters(model: Model) -> int:
    """Return the number of parameters of a BertForSequenceClassification with two labels."""
    num_layers, width, _, inner = model
    layer = 4 * width * (width + 1) + 2 * width * inner + inner + width + 4 * width
    return num_layers * layer + (VOCABULARY + POSITIONS + 2 + 2) * width + width * (width + 1) + 2 * (width + 1)


def training_step(model: Model, lengths: list[int], dropout: bool) -> list[Part]:
    """Return the parts of a step of BertForSequenceClassification in 16-bit autocast, with float32 parameters and fused
    AdamW, whose gradients start as None."""
    size, tokens, tables = parameters(model), sum(lengths), (VOCABULARY + POSITIONS + 2) * model.width
    rows = 4.0 * tokens * model.width
    of_layers = [
        Part(part.runs, part.what, model.num_layers * part.launches, Work(*(model.num_layers * x for x in part.work)))
        for part in training_layer(model, lengths, dropout)
    ]
    return [
        Part("_embed_layer_norm_kernel", "embeddings", 1, Work(0.0, 2 * rows)),
        *of_layers,
        Part("_layer_norm_backward_kernel", "LayerNorm of the embeddings", 1, Work(0.0, 3 * rows)),
        # Each table's gradient is filled with zeros; then rows are read, and read and written there.
        Part("embedding_dense_backward", "gradients of three tables", 3, Work(0.0, 4.0 * tables + 3 * 3 * rows)),
        Part("other ops", "packing, pooler, classifier, loss", OTHER_OPS, Work(0.0, 0.0)),
        # Reads parameter, gradient and both moments; writes all but the gradient. Its launches are an estimate.
        Part("_fused_adamw_", "AdamW", 10, Work(0.0, 28.0 * size)),
    ]


# On a CPU, 55 to 86 ops that work run around the layers, fewer without padding and without dropout.
OTHER_OPS = 70


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
