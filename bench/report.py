"""Turns the records under bench/results into the table of the project's README, and a page and a plot per device."""

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import records
from workloads import BASELINE, PROVIDERS, Case

README = records.ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MODELS = ("tiny", "minilm", "base")
PEERS = PROVIDERS[1:]
# Okabe and Ito's palette, which survives colour blindness; the baseline is the line that the bars are measured by.
COLOURS = {"fastbert": "#0072B2", "transformers-eager": "#E69F00", f"{BASELINE}-compiled": "#56B4E9"}

Measured = dict[Case, dict[str, dict]]


def by_case(lines: Iterable[dict], kind: str) -> Measured:
    """The records of a kind as case -> provider -> record, from small cases to large ones."""
    measured: Measured = {}
    for record in lines:
        if record["kind"] == kind:
            described = {name: value for name, value in record["case"].items() if name != "tokens"}
            measured.setdefault(Case(**described), {})[record["provider"]] = record
    order = sorted(measured, key=lambda case: (MODELS.index(case.model), case.batch * case.seq_len, -case.fill))
    return {case: measured[case] for case in order}


def markdown_table(columns: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ("---", *("---:" for _ in columns[1:]))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, rule, *rows))


def milliseconds(seconds: float) -> str:
    """Three digits, or more before the point."""
    return f"{seconds * 1e3:.{max(0, 2 - math.floor(math.log10(seconds * 1e3)))}f}"


def provenance_line(measured: Measured) -> str:
    """Where, with what and when the records were measured; several answers if they come from several runs."""
    lines = [record for providers in measured.values() for record in providers.values()]
    machines, commits, dates = (
        " and ".join(sorted(set(map(fact, lines))))
        for fact in (records.describe, lambda line: str(line["commit"]), lambda line: line["date"][:10])
    )
    loads = [line["load"] for line in lines]
    return f"{machines}; commit {commits}, {dates}, load per core {min(loads):.1f} to {max(loads):.1f}."


def overview(latencies: Measured) -> str:
    """The README's table: fastbert and the baseline in milliseconds, of the same interleaved rounds, and how many times
    as fast as the baseline each provider was, each in its own interleaved rounds with it."""
    compared = [name for name in PROVIDERS if name != BASELINE]
    rows = []
    for case, of in latencies.items():
        ours = of["fastbert"]
        times = (milliseconds(ours["baseline_median_s"]), milliseconds(ours["median_s"]))
        speeds = [f"{of[name]['ratio']:.2f}" if name in of else "" for name in compared]
        rows.append((case, *times, f"**{speeds[0]}**", *speeds[1:]))
    columns = ("forward", f"{BASELINE}, ms", "fastbert, ms", *(f"speed of {name}" for name in compared))
    return f"{markdown_table(columns, rows)}\n\n{provenance_line(latencies)}"


def best_peer(of: dict[str, dict]) -> tuple[str, float]:
    """The fastest peer of a case, and fastbert's speed relative to it, both paired with the same baseline."""
    speeds = {name: 1.0 if name == BASELINE else of[name]["ratio"] for name in PEERS if name in of}
    fastest = max(speeds, key=speeds.get)
    return fastest, of["fastbert"]["ratio"] / speeds[fastest]


def page(latencies: Measured, memory: Measured) -> str:
    """The device's page: every case beside its best peer, the losses first, and the peaks of memory."""
    beside_best = {case: best_peer(of) for case, of in latencies.items()}
    losses = sum(ratio < 1 for _, ratio in beside_best.values())
    noise = [latencies[case][BASELINE]["ratio"] for case in beside_best]
    rows = []
    for case, (peer, ratio) in sorted(beside_best.items(), key=lambda item: item[1][1]):
        ours = latencies[case]["fastbert"]
        spread = " to ".join(milliseconds(ours[quantile]) for quantile in ("q20_s", "q80_s"))
        times = (milliseconds(ours["median_s"]), spread, milliseconds(latencies[case][peer]["median_s"]))
        ratios = (f"{value:.2f}" for value in (ratio, ours["ratio"], ours["error_ratio"]))
        rows.append((case, ours["case"]["tokens"], *times, peer, *ratios, ours["rounds"]))
    columns = (
        "case", "tokens", "fastbert, ms", "20 % to 80 %", "best peer, ms", "best peer", "best peer / fastbert",
        f"{BASELINE} / fastbert", "error ratio", "rounds",
    )  # fmt: skip
    device = next(iter(latencies.values()))[BASELINE]["device"]
    return f"""# The model's forward on {device}

Written by `bench/report.py` from `model.jsonl`: {provenance_line(latencies)}

Ratios are of times: above 1, fastbert is the faster one. In {losses} of {len(beside_best)} cases it is slower than the
best peer; the table begins with them. {BASELINE} measured beside itself gives {min(noise):.2f} to {max(noise):.2f}: a
ratio between those is a draw. The error ratio is fastbert's largest error over {BASELINE}'s, both against float64.
Where the load per core is above 1, other programs ran at the same time.

![Time of a forward relative to {BASELINE}](latency.svg)

{markdown_table(columns, rows)}

## Peak memory of one forward

What PyTorch's allocator holds at most on top of the weights and inputs, in MiB; above 1, fastbert takes less.

{memory_table(memory)}
"""


def memory_table(memory: Measured) -> str:
    rows = (
        (case, *(f"{of['fastbert'][field] / 2**20:.1f}" for field in ("peak_bytes", "baseline_peak_bytes")),
         f"{of['fastbert']['ratio']:.2f}")
        for case, of in memory.items()
    )  # fmt: skip
    return markdown_table(("case", "fastbert", BASELINE, "ratio"), rows)


def plot(latencies: Measured, path: Path) -> None:
    """Draw each provider's time relative to the baseline measured in the same rounds, a panel for each model."""
    panels = {model: [case for case in latencies if case.model == model] for model in MODELS}
    panels = {model: cases for model, cases in panels.items() if cases}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(11, 4), sharey=True, squeeze=False, layout="constrained",
        width_ratios=[len(cases) + 0.5 for cases in panels.values()],
    )  # fmt: skip
    width = 0.8 / len(COLOURS)
    for axis, (model, cases) in zip(axes[0], panels.items(), strict=True):
        baseline = axis.axhline(1, color="black", linewidth=1.2, label=BASELINE)
        bars = []
        for index, (provider, colour) in enumerate(COLOURS.items()):
            places = [place for place, case in enumerate(cases) if provider in latencies[case]]
            times = [1 / latencies[cases[place]][provider]["ratio"] for place in places]
            left = [place + (index - (len(COLOURS) - 1) / 2) * width for place in places]
            bars.append(axis.bar(left, times, width, color=colour, label=provider))
            if provider == "fastbert":
                axis.bar_label(bars[-1], fmt="%.2f", fontsize=8, label_type="center", color="white", rotation=90)
        axis.set_title(model)
        axis.set_xticks(range(len(cases)), [case.shape.replace(" ", "\n", 1) for case in cases], fontsize=8)
        axis.set_xlim(-0.6, len(cases) - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"time of a forward / {BASELINE}\n(lower is better)")
    figure.legend(handles=[bars[0], baseline, *bars[1:]], loc="outside upper center", ncols=4, frameon=False)
    # The same records make the same file.
    with plt.rc_context({"svg.hashsalt": "fastbert"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    overviews = []
    for path in sorted(records.RESULTS.glob("*/model.jsonl")):
        lines = list(records.read(path))
        latencies = by_case(lines, "latency")
        latencies = {case: of for case, of in latencies.items() if {"fastbert", BASELINE} <= of.keys()}
        if not latencies:
            continue
        plot(latencies, path.with_name("latency.svg"))
        path.with_name("README.md").write_text(page(latencies, by_case(lines, "memory")))
        overviews.append(overview(latencies))
        print(f"wrote README.md and latency.svg in {path.parent.relative_to(records.ROOT)}")
    if not overviews:
        sys.exit(f"bench/results has no case of both fastbert and {BASELINE}: run `pytest bench` first")
    table = "\n\n".join(overviews)
    text = README.read_text()
    if BEGIN in text and END in text:
        between = re.compile(f"{BEGIN}.*?{END}", re.S)
        README.write_text(between.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text))
        print("wrote the table in README.md")
    else:
        print(f"README.md has no {BEGIN} and {END} to put this between:\n\n{table}")


if __name__ == "__main__":
    main()
