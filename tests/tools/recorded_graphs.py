"""The graphs that inductor would get."""

from typing import Any

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table


def recorded_graphs() -> dict[str, Any]:
    """Return lists of graphs, "forward" and "backward", and "backend", which adds graphs to them and runs them."""
    found: dict[str, Any] = {"forward": [], "backward": []}

    def keep(direction):
        return lambda graph, _: found[direction].append(graph.graph) or make_boxed_func(graph.forward)

    found["backend"] = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), decompositions=select_decomp_table()
    )
    return found
