"""Write the prediction of a training step into bench/ROOFLINE.md: `python bench/training_step.py`.

Work, launches and least times are those of `fastbert_kernels.tuning.roofline`. The rates and the host's times were
measured on one H200 for the forward, before the kernels for training. Nothing here is a measurement of those kernels.
"""

from typing import NamedTuple

import records
from report import between, markdown_table

from fastbert_kernels.tuning.roofline import MODELS, Part, training_step

PAGE = records.ROOT / "bench" / "ROOFLINE.md"
MARKS = "<!-- training:begin -->", "<!-- training:end -->"

# At 4096 tokens in a forward: the slower of our two GEMMs (29.7 us for queries, keys and values; cuBLAS reached 500 to
# 680), attention (11.5 us) and LayerNorm (4.6 us). LayerNorm of 128 tokens took 1.6 us.
FLOPS_PER_S, ATTENTION_FLOPS_PER_S, BYTES_PER_S, LAUNCH_S = 490e12, 140e12, 2.7e12, 1.6e-6
# Of a launch: Triton's launcher and our code around it at 8ad994e; PyTorch's `F.linear`.
KERNEL_HOST_S, OP_HOST_S = 22.8e-6, 20.4e-6
# Milliseconds of transformers' step, by dropout: sdpa, and compiled. Full batches of 32 x 128.
TRANSFORMERS_MS = {False: (32.4, 16.3), True: (22.9, 17.7)}
FULL = [128] * 32
HALF_FULL = [max(1, int(128 * (0.02 + 0.96 * index / 31))) for index in range(32)]
# The goals: transformers' time over ours.
SDPA_GOAL, COMPILED_GOAL, HALF_FULL_GOAL = 1.5, 1.1, 1.8


def predicted_s(part: Part) -> float:
    """Return the seconds on the device at the rates that the forward reached."""
    rate = ATTENTION_FLOPS_PER_S if "_attention_" in part.runs else FLOPS_PER_S
    return max(part.work.flops / rate, part.work.bytes / BYTES_PER_S, part.launches * LAUNCH_S)


class Step(NamedTuple):
    """A predicted step. Times are milliseconds; roofline: of the device at the H200's roofs, device: at the rates that
    the forward reached, host: of all launches."""

    tokens: int
    launches: int
    tflop: float
    gigabytes: float
    roofline: float
    device: float
    host: float

    @property
    def time(self) -> float:
        """The host's work and the device's overlap, so the slower of the two counts."""
        return max(self.device, self.host)


def step(lengths: list[int], dropout: bool) -> Step:
    """Return the prediction for base."""
    parts = training_step(MODELS["base"], lengths, dropout)
    return Step(
        sum(lengths),
        sum(part.launches for part in parts),
        sum(part.work.flops for part in parts) / 1e12,
        sum(part.work.bytes for part in parts) / 1e9,
        1e3 * sum(part.work.seconds("bf16") for part in parts),
        1e3 * sum(map(predicted_s, parts)),
        1e3 * sum(part.launches * (KERNEL_HOST_S if part.in_our_kernel else OP_HOST_S) for part in parts),
    )


def of_dropout(dropout: bool) -> str:
    return "dropout 0.1" if dropout else "dropout 0"


def parts_table() -> str:
    """Return every part of a full batch with dropout."""
    rows = [
        (
            part.what, f"`{part.runs}`", part.launches, f"{part.work.flops / 1e9:.0f}", f"{part.work.bytes / 1e6:.0f}",
            f"{1e6 * part.work.seconds('bf16'):.0f}", f"{1e6 * predicted_s(part):.0f}",
        )
        for part in training_step(MODELS["base"], FULL, True)
    ]  # fmt: skip
    columns = ("part", "runs", "launches", "GFLOP", "MB", "roofline time", "predicted")
    return markdown_table(columns, rows)


def steps_table() -> str:
    """Return the predicted steps."""
    rows = []
    for name, lengths in (("full", FULL), ("half full", HALF_FULL)):
        for dropout in (False, True):
            of = step(lengths, dropout)
            numbers = [f"{x:.1f}" for x in (of.tflop, of.gigabytes, of.roofline, of.device, of.host)]
            rows.append((f"{name}, {of_dropout(dropout)}", of.tokens, of.launches, *numbers))
    columns = ("batch", "tokens", "launches", "TFLOP", "GB", "roofline, ms", "device, ms", "host, ms")
    return markdown_table(columns, rows)


class Goal(NamedTuple):
    """Milliseconds of a peer's step and of ours as predicted, and the ratio of the two that is the goal."""

    name: str
    theirs: float
    ours: float
    goal: float

    @property
    def is_reached(self) -> bool:
        return self.theirs / self.ours >= self.goal


def goals() -> list[Goal]:
    """Return the goals beside the prediction."""
    found = []
    for dropout, (sdpa, compiled) in TRANSFORMERS_MS.items():
        told, full, half = of_dropout(dropout), step(FULL, dropout).time, step(HALF_FULL, dropout).time
        found.append(Goal(f"full, {told}, sdpa", sdpa, full, SDPA_GOAL))
        found.append(Goal(f"full, {told}, compiled", compiled, full, COMPILED_GOAL))
        found.append(Goal(f"half full, {told}, sdpa", sdpa, half, HALF_FULL_GOAL))
    return found


def goals_table() -> str:
    """Return the goals as a table."""
    rows = [
        (
            each.name, f"{each.theirs:.1f}", f"{each.ours:.1f}", f"{each.theirs / each.ours:.2f}", each.goal,
            "yes" if each.is_reached else "no",
        )
        for each in goals()
    ]  # fmt: skip
    return markdown_table(("batch, peer", "transformers, ms", "predicted, ms", "ratio", "goal", "reached"), rows)


def products_ms() -> tuple[float, float]:
    """Return the milliseconds of a full batch's products without those of attention: predicted, and at the roofs."""
    parts = [part for part in training_step(MODELS["base"], FULL, True) if part.work.flops]
    parts = [part for part in parts if "_attention_" not in part.runs]
    return 1e3 * sum(map(predicted_s, parts)), 1e3 * sum(part.work.seconds("bf16") for part in parts)


def text() -> list[str]:
    """Return the section without its heading."""
    full, half = step(FULL, True), step(HALF_FULL, True)
    products, at_the_roof = products_ms()
    return [
        "Written by `python bench/training_step.py`. **Everything here is a prediction: no kernel for training has run "
        "on a GPU.** A step is forward, backward and fused AdamW of base with two labels, 32 x 128, with float32 "
        "parameters and autocast to bfloat16. Sums before LayerNorm and residuals are float32. Every step casts the "
        "weights. The table is of a full batch with dropout: microseconds on the device, all "
        f"{MODELS['base'].num_layers} layers together.",
        parts_table(),
        "The roofline time is at 788 TFLOP/s and 4.3 TB/s. The predicted time is at the rates that the forward's "
        f"kernels reached at 4096 tokens: GEMMs {FLOPS_PER_S / 1e12:.0f} TFLOP/s, attention "
        f"{ATTENTION_FLOPS_PER_S / 1e12:.0f} TFLOP/s, LayerNorm {BYTES_PER_S / 1e12:.1f} TB/s, and at least "
        f"{LAUNCH_S * 1e6:.1f} a launch. The same rates are assumed for the backward, for PyTorch's ops and for half "
        "as many tokens, where GEMMs will be slower. A test counts the launches of a layer. Those of AdamW and of "
        "other ops are estimates.",
        steps_table(),
        "The lengths of the half full batch rise evenly from 2 to 125. The host's time is the number of launches times "
        f"what one took on the H200's host at 8ad994e: {KERNEL_HOST_S * 1e6:.1f} for a kernel (17.8 in Triton's "
        f"launcher, 5 in our code; the launcher is our own since, and not measured there), {OP_HOST_S * 1e6:.1f} for "
        "`F.linear`, which stands for every op of PyTorch. A cast may take less; allocations, autograd and the "
        "model's Python come on top. A batch with padding also waits once for its number of tokens.",
        f"So **the step is bound by the host**: with dropout {full.host:.1f} ms against {full.device:.1f} on the "
        f"device for a full batch, {half.host:.1f} against {half.device:.1f} half full. The device would be the bound "
        f"on a host {full.host / full.device:.1f} and {half.host / half.device:.1f} times as fast.",
        goals_table(),
        "transformers' times are those [above](#what-was-measured), of full batches, before the kernels for training. "
        "Half full its sdpa is assumed to take as long, since it computes padding. With such an estimate of the host's "
        "time, a ratio near its goal leaves open whether it is reached; sdpa's time without dropout is high for its "
        "work, so the ratios to it are, too. **Not reached by this prediction:** "
        f"{'; '.join(each.name for each in goals() if not each.is_reached) or 'none'}.",
        f"The largest gap is the host's time for {full.launches} launches. Two of a layer's cast its weights and its "
        "weights' gradients. On the device the largest gap is the GEMMs: "
        f"{products:.1f} ms of {full.device:.1f}, {at_the_roof:.1f} at the roof.",
    ]


def main() -> None:
    PAGE.write_text(between(MARKS, PAGE.read_text(), text()))
    print(f"wrote a section of {PAGE.name}")


if __name__ == "__main__":
    main()
