"""Plots of a device's page: forwards against sequence length and fill, or all forwards relative to the baseline."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator
from providers import BASELINE, PROVIDERS
from workloads import Case

MODELS = ("toy", "tiny", "minilm", "base", "large")
# Case -> provider -> record, in order of size.
Measured = dict[Case, dict[str, dict]]

# Okabe and Ito's palette, which is safe for colour blindness, and a grey.
COLOURS = {
    "fastbert": "#0072B2",
    "fastbert-graphed": "#009E73",
    "transformers-eager": "#E69F00",
    BASELINE: "#000000",
    "unpadded-varlen": "#D55E00",
    f"{BASELINE}-compiled": "#56B4E9",
    f"{BASELINE}-reduce-overhead": "#CC79A7",
    f"{BASELINE}-max-autotune": "#F0E442",
    "unpadded-varlen-compiled": "#999999",
}
MIN_POINTS = 4  # of a line


def sweep(latencies: Measured, field: str) -> list[Case]:
    """Return the longest series of cases that differ in one field only, sorted by it, or [] if it is too short."""
    families: dict[Case, list[Case]] = {}
    for case in latencies:
        families.setdefault(replace(case, **{field: 0}), []).append(case)
    longest = max(families.values(), key=len, default=[])
    return sorted(longest, key=lambda case: getattr(case, field)) if len(longest) >= MIN_POINTS else []


def draw(latencies: Measured, folder: Path) -> dict[str, str]:
    """Draw plots into the folder and return file -> description.

    They show latency against sequence length and throughput against fill if the records have such series, otherwise
    every case relative to the baseline.
    """
    drawn = {}
    if lengths := sweep(latencies, "seq_len"):
        one = lengths[0]
        drawn["seq_len.svg"] = f"Latency of {one.model}, batch {one.batch}, {one.dtype}, against sequence length"
        axis = plot_sweep(latencies, lengths, lambda case: case.seq_len, lambda case, seconds: seconds * 1e3)
        axis.set(xlabel="sequence length", ylabel="time of a forward, ms", xscale="log", yscale="log")
        axis.set_xticks([case.seq_len for case in lengths], [str(case.seq_len) for case in lengths], minor=False)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        save(axis.figure, folder / "seq_len.svg")
    if fills := sweep(latencies, "fill"):
        one = fills[0]
        drawn["fill.svg"] = f"Throughput of {one.model}, {one.batch}x{one.seq_len}, {one.dtype}, against fill"
        axis = plot_sweep(latencies, fills, lambda case: case.fill * 100, lambda case, seconds: case.batch / seconds)
        axis.set(xlabel="share of the batch that is not padding, %", ylabel="sequences per second", ylim=(0, None))
        save(axis.figure, folder / "fill.svg")
    if not drawn and latencies:
        drawn["latency.svg"] = f"Time of a forward relative to {BASELINE}"
        plot_ratios(latencies, folder / "latency.svg")
    return drawn


def plot_sweep(latencies: Measured, cases: list[Case], x: Callable, y: Callable) -> plt.Axes:
    """Draw a line for each provider that has enough of the cases."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in PROVIDERS:
        measured = [case for case in cases if name in latencies[case]]
        if len(measured) >= MIN_POINTS:
            values = [y(case, latencies[case][name]["median_s"]) for case in measured]
            axis.plot([x(case) for case in measured], values, marker="o", color=COLOURS[name], label=name)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return axis


def plot_ratios(latencies: Measured, path: Path) -> None:
    """Draw each provider's time relative to the baseline in the same rounds, with a panel for each model."""
    panels = {model: [case for case in latencies if case.model == model] for model in MODELS}
    panels = {model: cases for model, cases in panels.items() if cases}
    # The baseline is drawn as a line, not as bars.
    shown = {
        name: colour
        for name, colour in COLOURS.items()
        if name != BASELINE and any(name in of for of in latencies.values())
    }
    figure, axes = plt.subplots(
        1, len(panels), figsize=(11, 4), sharey=True, squeeze=False, layout="constrained",
        width_ratios=[len(cases) + 0.5 for cases in panels.values()],
    )  # fmt: skip
    width = 0.8 / len(shown)
    for axis, (model, cases) in zip(axes[0], panels.items(), strict=True):
        baseline = axis.axhline(1, color="black", linewidth=1.2, label=BASELINE)
        bars = []
        for index, (provider, colour) in enumerate(shown.items()):
            places = [place for place, case in enumerate(cases) if provider in latencies[case]]
            times = [1 / latencies[cases[place]][provider]["ratio"] for place in places]
            left = [place + (index - (len(shown) - 1) / 2) * width for place in places]
            bars.append(axis.bar(left, times, width, color=colour, label=provider))
            if provider == "fastbert":
                axis.bar_label(bars[-1], fmt="%.2f", fontsize=8, label_type="center", color="white", rotation=90)
        axis.set_title(model)
        axis.set_xticks(range(len(cases)), [case.shape.replace(" ", "\n", 1) for case in cases], fontsize=8)
        axis.set_xlim(-0.6, len(cases) - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"time of a forward / {BASELINE}\n(lower is better)")
    figure.legend(handles=[bars[0], baseline, *bars[1:]], loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    # A fixed salt and no date make the file reproducible.
    with plt.rc_context({"svg.hashsalt": "fastbert"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
