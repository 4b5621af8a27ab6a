"""Turns the records under bench/results into the table of the project's README, and a page and plots per device."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import records
from matplotlib.ticker import LogLocator
from providers import BASELINE, PROVIDERS
from workloads import Case

from fastbert.commands.machine import describe

README = records.ROOT / "README.md"
# Between which lines the README has a table of sentences, and one of forwards.
ENCODE = "<!-- encode:begin -->", "<!-- encode:end -->"
FORWARDS = "<!-- bench:begin -->", "<!-- bench:end -->"
MODELS = ("toy", "tiny", "minilm", "base", "large")
SUITES = {
    "model": "The model's forward",
    "latency": "One text, as a user waits for it",
    "encode": "Sentences to embeddings, end to end",
    "memory": "Peak memory of one forward",
    "attention": "Attention",
    "kernels": "Kernels",
    "host": "The host's work for a forward in the kernels, without the driver's",
}
# Okabe and Ito's palette, which survives colour blindness, and a grey.
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
# A line needs so many points to be a sweep.
FEWEST_POINTS = 4
# Of the suite that encodes sentences, the order of the texts in words.
ORDERS = {"sorted": "sorted by length", "given": "in their own order"}
# Of a forward's time, what the host may take to issue it before the host counts as the limit.
HOST_SHARE = 0.9
# MLPerf Inference, BERT-large on SQuAD, offline, samples a second on one GPU: published figures, not measured here.
MLPERF = (
    ("H200", "INT8, 99 % of float32's accuracy", 9164),
    ("H200", "FP8, 99.9 %", 7994),
    ("H100", "INT8, 99 %", 8765),
    ("H100", "FP8, 99.9 %", 7773),
)

Measured = dict[Case, dict[str, dict]]


def case_of(record: dict) -> Case:
    """The forward that a record of the model's suites is about."""
    names = {field.name for field in fields(Case)}
    return Case(**{name: value for name, value in record["case"].items() if name in names})


def by_case(lines: Iterable[dict], kind: str) -> Measured:
    """The records of a kind as case -> provider -> record, from small cases to large ones, without absent peers."""
    measured: Measured = {}
    for record in lines:
        if record["kind"] == kind and "ratio" in record:
            measured.setdefault(case_of(record), {})[record["provider"]] = record
    order = sorted(measured, key=_size_of)
    return {case: measured[case] for case in order}


def _size_of(case: Case) -> tuple:
    return MODELS.index(case.model), case.dtype, case.batch * case.seq_len, -case.fill


def markdown_table(columns: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ("---", *("---:" for _ in columns[1:]))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, rule, *rows))


def table_of(rows: list[dict[str, object]]) -> str:
    """A table of rows by column, without the columns in which no row has anything."""
    # Full rows have the order of the columns.
    by_length = sorted(rows, key=len, reverse=True)
    columns = dict.fromkeys(column for row in by_length for column, value in row.items() if value is not None)
    return markdown_table(tuple(columns), [["" if row.get(c) is None else row[c] for c in columns] for row in rows])


def milliseconds(seconds: float) -> str:
    """Three digits, or more before the point."""
    return f"{seconds * 1e3:.{max(0, 2 - math.floor(math.log10(seconds * 1e3)))}f}"


def provenance_line(lines: Iterable[dict]) -> str:
    """Where, with what and when the records were measured; several answers if they come from several runs."""
    lines = list(lines)
    machines, commits, dates = (
        " and ".join(sorted(set(map(fact, lines))))
        for fact in (describe, lambda line: str(line["commit"]), lambda line: line["date"][:10])
    )
    loads = [line["load"] for line in lines]
    return f"{machines}; commit {commits}, {dates}, load per core {min(loads):.1f} to {max(loads):.1f}."


def on_cpu(record: dict) -> bool:
    return record["device"].startswith("CPU")


def overview(latencies: Measured) -> str:
    """The README's table of forwards: fastbert and the baseline in milliseconds, of the same interleaved rounds, and
    how many times as fast as the baseline each provider was, each in its own interleaved rounds with it. Of a GPU's
    cases, which are many, BERT base's but for those that are drawn, and BERT-large's samples a second."""
    drawn = {*sweep(latencies, "seq_len"), *sweep(latencies, "fill")}
    shown = {
        case: of
        for case, of in latencies.items()
        if on_cpu(of["fastbert"]) or (case.model == "base" and case not in drawn)
    }
    compared = [name for name in PROVIDERS if name != BASELINE and any(name in of for of in shown.values())]
    rows = []
    for case, of in shown.items():
        ours = of["fastbert"]
        times = (milliseconds(ours["baseline_median_s"]), milliseconds(ours["median_s"]))
        speeds = [f"{of[name]['ratio']:.2f}" if name in of else "" for name in compared]
        rows.append((case, *times, f"**{speeds[0]}**", *speeds[1:]))
    columns = ("forward", f"{BASELINE}, ms", "fastbert, ms", *(f"speed of {name}" for name in compared))
    parts = (markdown_table(columns, rows), samples(latencies), provenance_line(_records_of(latencies)))
    return "\n\n".join(part for part in parts if part)


def _records_of(latencies: Measured) -> list[dict]:
    return [record for of in latencies.values() for record in of.values()]


def sentences(lines: Iterable[dict]) -> str:
    """Texts a second from end to end, of sentence-transformers by itself and optimized, if they were measured."""
    rows, told = [], []
    for comparison in comparisons(line for line in lines if line["suite"] == "encode"):
        for name in comparison.ours:
            record = comparison.of[name]
            if "ratio" not in record:
                continue
            case = record["case"]
            what = f"{case['texts']} texts, {case['batch']} to a batch, {ORDERS[case['order']]}"
            by = f"{case['model']} {case['dtype']}, {name}"
            rates = (case["texts"] / record["baseline_median_s"], record["texts_per_s"])
            rows.append((f"{what}; {by}", *(f"{rate:.0f}" for rate in rates), f"**{record['ratio']:.2f}**"))
            told.append(record)
    if not rows:
        return ""
    columns = ("`encode`", "sentence-transformers, texts/s", "optimized, texts/s", "speed")
    return "\n\n".join((markdown_table(columns, rows), provenance_line(told)))


def samples(latencies: Measured) -> str:
    """BERT-large at SQuAD's lengths in samples a second, beside what MLPerf has published, if it was measured."""
    rows = [
        (name, case.dtype, of[name]["device"], f"{case.batch / of[name]['median_s']:.0f}")
        for case, of in latencies.items()
        if case.model == "large" and case.seq_len == 384
        for name in PROVIDERS
        if name in of
    ]
    if not rows:
        return ""
    published = [("MLPerf, as published", precision, device, f"{rate}") for device, precision, rate in MLPERF]
    columns = ("BERT-large, texts of 384 tokens at most and about 175 in the mean", "precision", "device", "samples/s")
    return markdown_table(columns, [*rows, *published])


@dataclass(frozen=True)
class Comparison:
    """One case of a suite: its title and the records of all providers, ours and peers, absent ones too."""

    suite: str
    title: str
    of: dict[str, dict]

    @property
    def ours(self) -> list[str]:
        return [name for name in self.of if name.startswith("fastbert")]

    def best_peer(self) -> tuple[str, float]:
        """The best peer and how many times as good as the baseline it is, which counts as 1 beside itself."""
        any_record = next(iter(self.of.values()))
        speeds = {name: record["ratio"] for name, record in self.of.items() if "ratio" in record}
        peers = {name: speed for name, speed in speeds.items() if name not in self.ours} | {any_record["baseline"]: 1.0}
        best = max(peers, key=peers.get)
        return best, peers[best]

    def beside_best(self, name: str) -> float:
        """How many times as good as the best peer a provider of ours is, both paired with the same baseline; 0 where
        ours failed."""
        return self.of[name].get("ratio", 0.0) / self.best_peer()[1]


def comparisons(lines: Iterable[dict]) -> list[Comparison]:
    """All cases of all suites, in the order of SUITES."""
    grouped: dict[tuple, Comparison] = {}
    for record in lines:
        key = record["suite"], *records.about(record["case"])
        found = grouped.setdefault(key, Comparison(record["suite"], title_of(record), {}))
        found.of[record["provider"]] = record
    return sorted(grouped.values(), key=lambda each: list(SUITES).index(each.suite))


def title_of(record: dict) -> str:
    """A case in words."""
    case = dict(record["case"])
    if {field.name for field in fields(Case)} <= case.keys():
        return f"{case_of(record)}" + (f", ids on the {case['ids']}" if "ids" in case else "")
    return " ".join(f"{name} {value}" if isinstance(value, int | float) else str(value) for name, value in case.items())


def ratio_text(ratio: float) -> str:
    """A ratio to the best peer in words."""
    return f"{ratio:.2f}" if ratio else "failed"


def best_column(record: dict) -> str:
    """What a record measures, in one figure: milliseconds, or MiB."""
    return f"{record['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in record else milliseconds(record["median_s"])


def row_of(comparison: Comparison, name: str) -> dict[str, object]:
    """A line of the page: a provider of ours in a case, and the best peer there."""
    record = comparison.of[name]
    peer, _ = comparison.best_peer()
    beside_best = ratio_text(comparison.beside_best(name))
    if "ratio" not in record:
        return {"case": comparison.title, "ours": name, "best peer": peer, "best peer / ours": beside_best}
    baseline_figure = {"median_s": record.get("baseline_median_s"), "peak_bytes": record.get("baseline_peak_bytes")}
    beside = comparison.of.get(peer, {key: value for key, value in baseline_figure.items() if value is not None})
    unit = "MiB" if "peak_bytes" in record else "ms"
    spread = [milliseconds(record[quantile]) for quantile in ("q20_s", "q80_s") if quantile in record]
    host_bound = record.get("clock") == "device" and record["host_s"] >= HOST_SHARE * record["median_s"]
    return {
        "case": comparison.title,
        "tokens": record["case"].get("tokens"),
        "ours": name,
        unit: best_column(record),
        "20 % to 80 %": " to ".join(spread) or None,
        **{f"p{rank}, ms": milliseconds(record[f"p{rank}_s"]) for rank in (90, 99) if f"p{rank}_s" in record},
        "a layer, us": f"{record['layer_s'] * 1e6:.1f}" if "layer_s" in record else None,
        "until the replay, us": f"{record['until_replay_s'] * 1e6:.1f}" if "until_replay_s" in record else None,
        "texts/s": f"{record['texts_per_s']:.0f}" if "texts_per_s" in record else None,
        "best peer": peer,
        f"its {unit}": best_column(beside),
        "best peer / ours": beside_best,
        f"{record['baseline']} / ours": f"{record['ratio']:.2f}",
        "of the roof": f"{record['of_roof']:.0%}" if "of_roof" in record else None,
        "error ratio": f"{record['error_ratio']:.2f}" if record.get("error_ratio") is not None else None,
        "limit": "host" if host_bound else None,
        "rounds": record.get("rounds"),
    }


def page(lines: list[dict], plots: dict[str, str]) -> str:
    """The device's page: every case of every suite beside its best peer, the losses first; plots: file -> what it
    shows."""
    cases = comparisons(lines)
    device = lines[0]["device"]
    summary, sections = [], []
    for suite, heading in SUITES.items():
        compared = [(each, name) for each in cases if each.suite == suite for name in each.ours]
        if not compared:
            continue
        compared.sort(key=lambda pair: pair[0].beside_best(pair[1]))
        ratios = [each.beside_best(name) for each, name in compared]
        losses = sum(ratio < 1 for ratio in ratios)
        worst, worst_name = compared[0]
        worst_text, best_text = ratio_text(ratios[0]), ratio_text(ratios[-1])
        summary.append((heading, len(ratios), losses, f"{worst_text}, {worst_name}, {worst.title}", best_text))
        table = table_of([row_of(each, name) for each, name in compared])
        sections.append(f"## {heading}\n\n{table}\n")
    columns = ("suite", "comparisons", "losses to the best peer", "the worst, best peer / ours", "the best")
    latencies = by_case(lines, "latency")
    noise = [of[BASELINE]["ratio"] for of in latencies.values() if BASELINE in of]
    draws = (
        f" {BASELINE} measured beside itself gives {min(noise):.2f} to {max(noise):.2f}: between those it is a draw."
        if noise
        else ""
    )
    parts = [
        f"# Measured on {device}",
        f"Written by `bench/report.py` from the records beside it: {provenance_line(lines)}",
        "Ratios are of times, or of memory: above 1, fastbert is the better one. Each table begins with the losses, of "
        "which the first are what failed."
        f"{draws} The error ratio is fastbert's largest error over the baseline's, both against float64. The roof is "
        "the least time that the device's own rates, measured in the same run, allow; float32's rate is that of its "
        "product or a third of TF32's, whichever is larger. The limit is the host where "
        "issuing a call takes nearly as long as the call. Where the load per core is above 1, other programs ran at "
        "the same time.",
        markdown_table(columns, summary),
        *(f"![{shown}]({name})" for name, shown in plots.items()),
        samples(latencies),
        *(section.strip() for section in sections),
        absent(cases),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def absent(cases: list[Comparison]) -> str:
    """The providers that could not run or were wrong, each with its reason and the cases."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for each in cases:
        for name, record in each.of.items():
            reason = record.get("absent") or record.get("wrong")
            if reason:
                reasons.setdefault((each.suite, name, reason.replace("|", "\\|")), []).append(each.title)
    if not reasons:
        return ""
    rows = [(suite, name, reason, "; ".join(titles)) for (suite, name, reason), titles in reasons.items()]
    return f"## Absent\n\n{markdown_table(('suite', 'provider', 'reason', 'cases'), rows)}"


def sweep(latencies: Measured, field: str) -> list[Case]:
    """The longest series of cases that differ in one field only, in its order; none if it is too short for a line."""
    families: dict[Case, list[Case]] = {}
    for case in latencies:
        families.setdefault(replace(case, **{field: 0}), []).append(case)
    longest = max(families.values(), key=len, default=[])
    return sorted(longest, key=lambda case: getattr(case, field)) if len(longest) >= FEWEST_POINTS else []


def draw(latencies: Measured, folder: Path) -> dict[str, str]:
    """Draw what the records allow into the folder: latency against sequence length and throughput against fill, or
    where nothing was swept, every case relative to the baseline. Returns file -> what it shows."""
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
        axis.set(xlabel="tokens that are no padding, %", ylabel="texts a second", ylim=(0, None))
        save(axis.figure, folder / "fill.svg")
    if not drawn and latencies:
        drawn["latency.svg"] = f"Time of a forward relative to {BASELINE}"
        plot_ratios(latencies, folder / "latency.svg")
    return drawn


def plot_sweep(latencies: Measured, cases: list[Case], x: Callable, y: Callable) -> plt.Axes:
    """A line for each provider that was measured at enough of the cases."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in PROVIDERS:
        measured = [case for case in cases if name in latencies[case]]
        if len(measured) >= FEWEST_POINTS:
            values = [y(case, latencies[case][name]["median_s"]) for case in measured]
            axis.plot([x(case) for case in measured], values, marker="o", color=COLOURS[name], label=name)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return axis


def plot_ratios(latencies: Measured, path: Path) -> None:
    """Draw each provider's time relative to the baseline measured in the same rounds, a panel for each model."""
    panels = {model: [case for case in latencies if case.model == model] for model in MODELS}
    panels = {model: cases for model, cases in panels.items() if cases}
    # The baseline is the line that the bars are measured by.
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
    # The same records make the same file.
    with plt.rc_context({"svg.hashsalt": "fastbert"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def between(marks: tuple[str, str], text: str, tables: list[str]) -> str:
    """The text with the tables between two of its lines; raises ValueError where it lacks one of these."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{README.name} has no {marks[0]} and {marks[1]} to put a table between")
    return "\n".join((before + begin, "\n\n".join(tables), end + after))


def main() -> None:
    encodes, overviews = [], []
    for folder in sorted({path.parent for path in records.RESULTS.glob("*/*.jsonl")}):
        lines = [record for path in sorted(folder.glob("*.jsonl")) for record in records.read(path)]
        latencies = by_case(lines, "latency")
        latencies = {case: of for case, of in latencies.items() if {"fastbert", BASELINE} <= of.keys()}
        plots = draw(latencies, folder)
        (folder / "README.md").write_text(page(lines, plots))
        print(f"wrote {', '.join(['README.md', *plots])} in {folder.relative_to(records.ROOT)}")
        if latencies:
            overviews.append(overview(latencies))
        if encode := sentences(lines):
            encodes.append(encode)
    if not overviews:
        sys.exit(f"bench/results has no case of both fastbert and {BASELINE}: run `pytest bench` first")
    README.write_text(between(ENCODE, between(FORWARDS, README.read_text(), overviews), encodes))
    print("wrote the tables in README.md")


if __name__ == "__main__":
    main()
