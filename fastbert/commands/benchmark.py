"""`fastbert bench`: time the forward of a checkpoint's BertModel and transformers', after a check of its results.

Letters as in `fastbert.tokens`.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import fastbert
from fastbert.automatic import graphs_of
from fastbert.commands.checkpoint import Checkpoint, describe_backends, right_padding
from fastbert.commands.timing import Measured, side_by_side, throughput_clock
from fastbert.testing import closeness

# (B, S) of the batches: without padding and, for B > 1, with about half padding.
SHAPES = {
    "cpu": ((1, 16), (1, 128), (8, 128), (8, 384)),
    "cuda": ((1, 16), (1, 128), (8, 128), (32, 128), (32, 512)),
}
SECONDS = {"cpu": 5.0, "cuda": 0.5}
GRAPHED = "graphed"


@dataclass(frozen=True)
class Case:
    batch_size: int
    seq_len: int
    is_full: bool

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.seq_len} {'full' if self.is_full else '50% filled'}"


class WrongResults(RuntimeError):
    """Our results exceed the tolerance, or transformers' are NaN or infinite."""


class Benchmark:
    """transformers' model with sdpa and ours, in a dtype on a device; on a GPU ours also with `fastbert.graphed`.

    Raises RuntimeError if the chosen back end cannot run our model on the device.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: str):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        ours, theirs, _ = checkpoint.pair("BertModel")
        ours, self.theirs = (model.to(device, getattr(torch, dtype)) for model in (ours, theirs))
        self.ours: dict[str, nn.Module] = {"fastbert": ours}
        if device.type == "cuda":
            self.ours[GRAPHED] = fastbert.graphed(deepcopy(ours))
        self.truth = deepcopy(self.theirs).double()
        with torch.inference_mode():
            ours(**{name: x.to(device) for name, x in checkpoint.batch(1, 1).items()})

    @property
    def backends(self) -> str:
        return describe_backends(self.ours["fastbert"])

    def cases(self) -> list[Case]:
        """The cases for the device that fit the model's position embeddings."""
        longest = self.checkpoint.config.max_position_embeddings
        shapes = [shape for shape in SHAPES[self.device.type] if shape[1] <= longest] or [(1, longest)]
        return [Case(*shape, is_full) for shape in shapes for is_full in (True, False) if is_full or shape[0] > 1]

    @torch.inference_mode()
    def measure(self, case: Case, seconds: float) -> dict[str, Measured]:
        """Time each of our models and transformers' in alternation, for about `seconds` each.

        Raises WrongResults if hidden states exceed the tolerance of `fastbert.testing` or transformers' are NaN or
        infinite, and RuntimeError if no graph was captured.
        """
        mask = right_padding(case.batch_size, case.seq_len) if not case.is_full else None
        batch = self.checkpoint.batch(case.batch_size, case.seq_len)
        batch |= {} if mask is None else {"attention_mask": mask.long()}
        batch = {name: x.to(self.device) for name, x in batch.items()}

        def forward_of(model: nn.Module) -> Callable:
            return lambda: model(**batch)

        def hidden(forward: Callable) -> Tensor:
            states = forward().last_hidden_state
            return states if mask is None else states[mask.to(self.device)]

        theirs = forward_of(self.theirs)
        expected, truth = hidden(theirs), hidden(forward_of(self.truth))
        if not expected.isfinite().all():
            raise WrongResults(
                f"transformers gives NaN or infinity on {case} in {self.dtype}: do not use this dtype with this "
                "checkpoint"
            )
        forwards = {name: forward_of(model) for name, model in self.ours.items()}
        for name, forward in forwards.items():
            if name == GRAPHED:
                forward()
                forward()  # captures if the first call did not; the third call replays and is checked
            for found in closeness(hidden(forward), expected, truth):
                if not found.holds:
                    raise WrongResults(
                        f"{name} is wrong on {case} in {self.dtype}: it errs by {found.error:.2e} ({found.measure}), "
                        f"transformers by {found.their_error:.2e}; fastbert verify tells more"
                    )
            if name == GRAPHED and not graphs_of(self.ours[name]):
                raise RuntimeError(f"no CUDA graph was captured for {case}: the logger 'fastbert' says why")
        clock = throughput_clock(self.device)
        return {name: side_by_side(forward, theirs, seconds, clock) for name, forward in forwards.items()}


def table(measured: dict[Case, dict[str, Measured]]) -> Table:
    """A row per case: median times in milliseconds, and the speed of each of our models relative to transformers."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("forward")
    names = next(iter(measured.values()), {})
    for heading in ("transformers, ms", *(heading for name in names for heading in (f"{name}, ms", "speed"))):
        table.add_column(heading, justify="right")
    for case, of_models in measured.items():
        found = [each.fields() for each in of_models.values()]
        cells = [f"{1e3 * found[0]['baseline_median_s']:.3g}"]
        for fields in found:
            cells += [f"{1e3 * fields['median_s']:.3g}", f"[bold]{fields['ratio']:.2f}[/]"]
        table.add_row(str(case), *cells)
    return table
