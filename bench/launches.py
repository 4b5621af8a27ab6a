"""Draw the launches of a layer: bench/results/launches.svg.

The columns are recorded: for fastbert the kernels that one layer launches in Triton's interpreter, for transformers'
sdpa the ATen operations that make a tensor, each of which is a launch on a GPU. The batch has padding.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import matplotlib
import torch
import transformers
from matplotlib import pyplot as plt
from records import RESULTS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert_kernels.launch import launching_by, run

PICTURE = RESULTS / "launches.svg"
# The parts of a layer and their colors.
PARTS = ("queries, keys, values", "attention", "its output", "feed-forward, up", "feed-forward, down")
COLORS = ("#8ecae6", "#ffb703", "#b7e4c7", "#cdb4db", "#f4a6a6")
# ATen's name -> label.
THEIRS = {
    "addmm": "linear",
    "scalar_tensor": "constant of the mask",
    "where": "mask to scores",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled dot product attention",
    "add": "add the residual",
    "native_layer_norm": "LayerNorm",
    "gelu": "GELU",
}
OURS = {
    "_qkv_projection_kernel": "three linears",
    "_attention_fwd_kernel": "attention within each sequence",
    "_linear_residual_layer_norm_kernel": "linear + residual + LayerNorm",
    "_layer_norm_kernel": "LayerNorm",
}
# Labels of `_linear_kernel` in the order of its launches in a layer whose LayerNorm is a separate launch.
LINEARS = ("linear + residual", "linear + GELU", "linear + residual")


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def batch() -> dict[str, torch.Tensor]:
    """Return two sequences of 8 and 4 tokens: integers [2, 8]."""
    input_ids = torch.ones(2, 8, dtype=torch.int64)
    attention_mask = (torch.arange(8) < torch.tensor([[8], [4]])).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def model(library, hidden_size: int) -> nn.Module:
    """Return a BertModel with one layer in bfloat16."""
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=hidden_size, num_attention_heads=12, intermediate_size=4 * hidden_size
    )
    return library.BertModel(config).to(torch.bfloat16).eval()


@torch.no_grad()
def their_launches(hidden_size: int) -> list[str]:
    """Return the ATen operations of transformers' layer that make a tensor."""
    theirs, recorder, layer = model(transformers, hidden_size), _Recorder(), []
    theirs.encoder.layer[0].register_forward_pre_hook(lambda *_: recorder.names.clear())
    theirs.encoder.layer[0].register_forward_hook(lambda *_: layer.extend(recorder.names))
    with recorder:
        theirs(**batch())
    return layer


@torch.no_grad()
def our_launches(hidden_size: int) -> list[str]:
    """Return the kernels of our layer."""
    names = []

    def named(kernel, grid, arguments):
        names.append(kernel.fn.__name__)
        run(kernel, grid, arguments)

    with launching_by(named), fastbert.backend("triton"):
        model(fastbert, hidden_size)(**batch())
    return names[names.index("_qkv_projection_kernel") : names.index("_unpack_kernel")]


def their_boxes(launches: list[str]) -> list[tuple[str, int]]:
    """Return the label of each launch and the part of the layer that it belongs to."""
    boxes, linears = [], 0
    for name in launches:
        linears += name == "addmm"
        # Linears 1 to 3 belong to part 0. Linears 4, 5 and 6 start parts 2, 3 and 4. Attention between them is part 1.
        part = linears - 2 if linears > 3 else int(linears == 3 and name != "addmm")
        boxes.append((THEIRS[name], part))
    return boxes


def our_boxes(launches: list[str]) -> list[tuple[str, int]]:
    boxes, part, linears = [], -1, iter(LINEARS if "_layer_norm_kernel" in launches else LINEARS[1:2])
    for name in launches:
        part += name != "_layer_norm_kernel"
        boxes.append((OURS.get(name) or next(linears), part))
    return boxes


def draw(columns: dict[str, list[tuple[str, int]]]) -> plt.Figure:
    """Draw a column of boxes for each list, in the order of the launches from top to bottom, colored by part."""
    tallest = max(map(len, columns.values()))
    figure, axes = plt.subplots(figsize=(9, 0.38 * tallest + 1.3))
    for x, (title, boxes) in enumerate(columns.items()):
        axes.text(x, tallest + 0.35, title, ha="center", va="bottom", fontsize=10, weight="bold")
        for row, (label, part) in enumerate(boxes):
            y = tallest - 1 - row
            axes.add_patch(plt.Rectangle((x - 0.44, y + 0.08), 0.88, 0.84, color=COLORS[part], linewidth=0))
            axes.text(x, y + 0.5, label, ha="center", va="center", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS]
    axes.legend(handles, PARTS, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=5, frameon=False, fontsize=8)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.2, tallest + 1.2))
    axes.axis("off")
    figure.tight_layout()
    return figure


def columns() -> dict[str, list[tuple[str, int]]]:
    theirs, base, small = their_launches(768), our_launches(768), our_launches(384)
    return {
        f"transformers sdpa: {len(theirs)}\npadded, [B, S, E]": their_boxes(theirs),
        f"fastbert, E = 768: {len(base)}\nkept tokens, [T, E]": our_boxes(base),
        f"fastbert, E up to 384: {len(small)}\nkept tokens, [T, E]": our_boxes(small),
    }


if __name__ == "__main__":
    # A fixed salt makes the file reproducible, and fonttype "none" keeps its labels as text.
    matplotlib.rcParams.update({"svg.hashsalt": "fastbert", "svg.fonttype": "none"})
    draw(columns()).savefig(PICTURE, metadata={"Date": None})
