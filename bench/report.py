"""Write a page and plots for each device from the records in bench/results, and the README's table from a GPU's."""

import math
import re
import sys
from collections.abc import Iterable

import records
from plots import MODELS, Measured, draw
from providers import BASELINE, GRAPHED, PROVIDERS
from ranking import SUITES, Comparison, case_of, comparisons
from workloads import Case

from fastbert.commands.machine import describe

README = records.ROOT / "README.md"
# The lines around the generated part of the README.
FORWARDS = "<!-- bench:begin -->", "<!-- bench:end -->"
# The forwards in the README: one sequence, a half-filled batch, and large ones.
README_SHAPES = ("1x128 full", "32x128 50% filled", "256x128 full", "256x128 50% filled")
README_OURS = ("fastbert", GRAPHED)
README_PLOT = "fill.svg"
# MLPerf Inference, BERT-large on SQuAD, offline, samples per second on one GPU. Published, not measured here.
MLPERF = (
    ("H200", "INT8, 99 % of float32's accuracy", 9164),
    ("H200", "FP8, 99.9 %", 7994),
    ("H100", "INT8, 99 %", 8765),
    ("H100", "FP8, 99.9 %", 7773),
)

# The explanation of the roofs, relative to a device's page.
ROOFS = "../../ROOFLINE.md#the-roofs"
# A cell of a numeric column.
NUMBER = re.compile(r"(\*\*)?[\d.]+%?( to [\d.]+)?(\*\*)?|failed|")


def by_case(lines: Iterable[dict], kind: str) -> Measured:
    """Return the records of a kind as case -> provider -> record, in order of size, without absent providers."""
    measured: Measured = {}
    for record in lines:
        if record["kind"] == kind and "ratio" in record:
            measured.setdefault(case_of(record), {})[record["provider"]] = record
    order = sorted(measured, key=_size_of)
    return {case: measured[case] for case in order}


def _size_of(case: Case) -> tuple:
    return MODELS.index(case.model), case.dtype, case.batch * case.seq_len, -case.fill, str(case)


def markdown_table(columns: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """Return a Markdown table with numeric columns aligned to the right."""
    cells = [tuple(map(str, row)) for row in rows]
    rule = ("---:" if all(map(NUMBER.fullmatch, column)) else "---" for column in zip(*cells, strict=True))
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, tuple(rule), *cells))


def table_of(rows: list[dict[str, object]]) -> str:
    """Return a table of rows, without the columns that are empty in every row."""
    # The longest rows define the order of the columns.
    by_length = sorted(rows, key=len, reverse=True)
    columns = dict.fromkeys(column for row in by_length for column, value in row.items() if value is not None)
    return markdown_table(tuple(columns), [["" if row.get(c) is None else row[c] for c in columns] for row in rows])


def milliseconds(seconds: float) -> str:
    """Return milliseconds with three significant digits, or more before the point."""
    return f"{seconds * 1e3:.{max(0, 2 - math.floor(math.log10(seconds * 1e3)))}f}"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


def provenance_line(lines: Iterable[dict]) -> str:
    """Return the machines, versions, commits, dates and load of the records, which may come from several runs."""
    lines = list(lines)
    machines, commits, dates = (
        " and ".join(sorted(set(map(fact, lines))))
        for fact in (describe, lambda line: str(line["commit"]), lambda line: line["date"][:10])
    )
    loads = [line["load"] for line in lines]
    return f"{machines}; commit {commits}, {dates}, load per core {min(loads):.1f} to {max(loads):.1f}."


def on_cpu(record: dict) -> bool:
    return record["device"].startswith("CPU")


def speeds(heading: str, measured: Measured) -> str:
    """Return the section with every provider's speed relative to the baseline in the same rounds."""
    if not measured:
        return ""
    compared = [name for name in PROVIDERS if name != BASELINE and any(name in of for of in measured.values())]
    rows = [
        (case, *(f"{of[name]['ratio']:.2f}" if name in of else "" for name in compared))
        for case, of in measured.items()
    ]
    table = markdown_table((f"speed, {BASELINE} = 1", *compared), rows)
    return f"## {heading}\n\n{table}"


def samples(latencies: Measured) -> str:
    """Return a table of BERT-large at SQuAD's lengths with MLPerf's published figures, or "" if it was not measured."""
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
    columns = ("BERT-large, at most 384 tokens, about 175 on average", "precision", "device", "samples/s")
    return markdown_table(columns, [*rows, *published])


def ratio_text(ratio: float) -> str:
    """Return a ratio to the best peer as text."""
    return f"{ratio:.2f}" if ratio else "failed"


def row_of(comparison: Comparison, name: str) -> dict[str, object]:
    """Return a row of the page: one of our providers in a case, and the best peer."""
    record = comparison.of[name]
    peer, _ = comparison.best_peer()
    beside_best = ratio_text(comparison.beside_best(name))
    if "ratio" not in record:
        return {"case": comparison.title, "ours": name, "best peer": peer, "best peer / ours": beside_best}
    value, unit, text = record.get("median_s"), "ms", milliseconds
    if comparison.suite == "memory":
        value, unit, text = record["peak_bytes"], "MiB", mebibytes
    spread = [milliseconds(record[quantile]) for quantile in ("q20_s", "q80_s") if quantile in record]
    return {
        "case": comparison.title,
        "tokens": record["case"].get("tokens"),
        "ours": name,
        unit: text(value),
        "20 % to 80 %": " to ".join(spread) or None,
        **{f"p{rank}, ms": milliseconds(record[f"p{rank}_s"]) for rank in (90, 99) if f"p{rank}_s" in record},
        "a layer, us": f"{record['layer_s'] * 1e6:.1f}" if "layer_s" in record else None,
        "until the replay, us": f"{record['until_replay_s'] * 1e6:.1f}" if "until_replay_s" in record else None,
        "texts/s": f"{record['texts_per_s']:.0f}" if "texts_per_s" in record else None,
        "ours / tokenizer alone": f"{record['of_tokenizer']:.2f}" if "of_tokenizer" in record else None,
        "best peer": peer,
        f"its {unit}": text(value * comparison.beside_best(name)),
        "best peer / ours": beside_best,
        f"{record['baseline']} / ours": f"{record['ratio']:.2f}",
        "peak, MiB": mebibytes(record["peak_bytes"]) if "memory_ratio" in record else None,
        f"peak, {record['baseline']} / ours": f"{record['memory_ratio']:.2f}" if "memory_ratio" in record else None,
        "of the roof": f"{record['of_roof']:.0%}" if "of_roof" in record else None,
        "error ratio": f"{record['error_ratio']:.2f}" if record.get("error_ratio") is not None else None,
        "limit": "host" if comparison.host_bound(name) else None,
        "rounds": record.get("rounds"),
    }


def page(lines: list[dict], plots: dict[str, str]) -> str:
    """Return the device's page: every case of every suite with its best peer, the worst first.

    plots: file -> description.
    """
    cases, latencies = comparisons(lines), by_case(lines, "latency")
    summary, sections = [], []
    for suite, heading in SUITES.items():
        compared = [(each, name) for each in cases if each.suite == suite for name in each.ours]
        if not compared:
            continue
        compared.sort(key=lambda pair: pair[0].beside_best(pair[1]))
        for ours in dict.fromkeys(sorted(name for _, name in compared)):
            summary.append(standing(heading, ours, [each for each, name in compared if name == ours]))
        sections.append(f"## {heading}\n\n{table_of([row_of(each, name) for each, name in compared])}")
    parts = [
        f"# Measured on {lines[0]['device']}",
        f"Written by `bench/report.py` from the records in this folder: {provenance_line(lines)}",
        table_of(summary),
        reading(lines, latencies),
        *(f"![{shown}]({name})" for name, shown in plots.items()),
        samples(latencies),
        *sections,
        speeds("Every provider's forwards", latencies),
        speeds("Every provider's training steps", by_case(lines, "training")),
        absent(cases),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def standing(heading: str, ours: str, ranked: list[Comparison]) -> dict[str, object]:
    """Return a row of the summary: one of our providers in a suite. ranked: its cases, the worst first."""
    ratios = [each.beside_best(ours) for each in ranked]
    lost = [each for each, ratio in zip(ranked, ratios, strict=True) if ratio < 1]
    timed = any(each.of[ours].get("clock") == "device" for each in ranked)
    return {
        "suite": heading,
        "ours": ours,
        "cases": len(ranked),
        "lost to the best peer": len(lost),
        "of these bound by the host": sum(each.host_bound(ours) for each in lost) if timed else None,
        "worst ratio, best peer / ours": ratio_text(ratios[0]),
        "worst case": ranked[0].title,
        "best ratio": ratio_text(ratios[-1]),
    }


def reading(lines: list[dict], latencies: Measured) -> str:
    """Return the notes on how to read a page."""
    against_peers = [*latencies.values(), *by_case(lines, "training").values()]
    noise = [of[BASELINE]["ratio"] for of in against_peers if BASELINE in of]
    told = [
        "A case is a model, batch x length, the share of the batch that is tokens and not padding, and the dtype "
        "(float32 if none is given).",
        "Ratios are of times or of memory. Above 1, ours is better. Tables start with failures, then losses. All "
        "providers were timed in rounds that alternate with the baseline's. The peer's time in a row is the baseline's "
        "time in our rounds divided by the peer's speed relative to the baseline.",
        f"{BASELINE} measured against itself gives {min(noise):.2f} to {max(noise):.2f}, which is the noise."
        if noise
        else "",
        "A training step has float32 weights and runs in another dtype by autocast. Its peak memory is that of "
        "activations, gradients and temporaries, without weights and the optimizer's state."
        if any(line["kind"] == "training" for line in lines)
        else "",
        pace(latencies),
        roof(lines),
        "The error ratio is our largest error over the baseline's, both relative to float64. If the load per core is "
        "above 1, other programs were running at the same time.",
    ]
    return "\n".join(f"- {each}" for each in told if each)


def pace(latencies: Measured) -> str:
    """Return a note on how much the host's speed changed during the run, which affects the times that it bounds.

    It is measured by the time to issue the baseline's full batches, which make the same launches at every size.
    """
    issued: dict[tuple, list[float]] = {}
    for case, of in latencies.items():
        if of.get(BASELINE, {}).get("clock") == "device" and case.fill == 1:
            issued.setdefault((case.model, case.dtype), []).append(of[BASELINE]["host_s"])
    (model, dtype), seconds = max(issued.items(), key=lambda item: len(item[1]), default=((None, None), []))
    if len(seconds) < 2:
        return ""
    return (
        "The limit is the host if issuing a call takes nearly as long as the call. The host's speed changed during the "
        f"run: it took {milliseconds(min(seconds))} to {milliseconds(max(seconds))} ms to issue {BASELINE}'s full "
        f"batches of {model} in {dtype}, which make the same calls at every size. The times of calls that the host "
        "bounds change with it, and so do their ratios to calls that it does not bound."
    )


def roof(lines: list[dict]) -> str:
    """Return a note on the rates that the share of the roof refers to, or "" if none were measured."""
    found = [line["roofs"] for line in lines if "roofs" in line]
    if not found:
        return ""
    told = (
        "The share of the roof is the roofline time over the measured time. The roofs are the device's rates, measured "
        f"in the same run: {rates_text(found)}. float32's is the rate of its product or a third of TF32's, whichever "
        "is larger."
    )
    if all("sustained" in each for each in found):
        sustained = rates_text([each["sustained"] for each in found])
        return f"{told} A rested device reached these rates; under load it sustained {sustained}."
    return f"{told} These are medians under load, with a copy by memcpy: [less than the device can do]({ROOFS})."


def rates_text(roofs: list[dict]) -> str:
    """Return rates as text, from the smallest to the largest of several runs."""

    def span(rates: Iterable[float], digits: int) -> str:
        return " to ".join(dict.fromkeys(f"{rate / 1e12:.{digits}f}" for rate in (min(rates), max(rates))))

    products = [
        f"{span([each['flops_per_s'][name] for each in roofs], 0)} in {name}" for name in roofs[0]["flops_per_s"]
    ]
    return f"in TFLOP/s {', '.join(products)}; in TB/s {span([each['bytes_per_s'] for each in roofs], 2)}"


def overview(lines: list[dict], folder: str, plots: dict[str, str]) -> str:
    """Return the README's part on a GPU: some forwards, how many of all are lost, and a plot; "" without forwards.

    folder: the folder of the GPU's page and plots, relative to the README.
    """
    forwards = [each for each in comparisons(lines) if each.suite == "model" and "fastbert" in each.of]
    rows, told = [], []
    for each in sorted(forwards, key=lambda each: _size_of(each.case)):
        timed = [name for name in README_OURS if "ratio" in each.of.get(name, {})]
        if each.case.shape in README_SHAPES and timed:
            sdpa_s = each.of[timed[0]]["baseline_median_s"]
            row = {"forward": each.title, f"{BASELINE}, ms": milliseconds(sdpa_s)}
            row |= {f"{name}, ms": milliseconds(each.of[name]["median_s"]) for name in timed}
            row["best peer"] = each.best_peer()[0]
            rows.append(row | {f"best peer / {name}": f"**{each.beside_best(name):.2f}**" for name in timed})
    if not rows:
        return ""
    for name in README_OURS:
        ran = [each for each in forwards if name in each.of]
        lost = [each for each in ran if each.beside_best(name) < 1]
        by_host = sum(each.host_bound(name) for each in lost)
        told.append(
            f"`{name}` loses {len(lost)} of {len(ran)}" + (f", {by_host} of those bound by the host" if lost else "")
        )
    parts = (
        table_of(rows),
        f"Above 1, fastbert is faster than the best peer. Of all forwards {'; '.join(told)}: [the page]"
        f"({folder}/README.md) has each, the losses first.",
        provenance_line(line for line in lines if line["suite"] == "model"),
        *([f"![{plots[README_PLOT]}]({folder}/{README_PLOT})"] if README_PLOT in plots else []),
    )
    return "\n\n".join(parts)


def absent(cases: list[Comparison]) -> str:
    """Return the section of providers that could not run or were wrong, with the reasons and cases."""
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


def between(marks: tuple[str, str], text: str, tables: list[str]) -> str:
    """Return the text with these tables between two marked lines. Raises ValueError if a mark is missing."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{README.name} has no {marks[0]} and {marks[1]} to put a table between")
    return "\n".join((before + begin, "\n\n".join(tables), end + after))


def main() -> None:
    overviews = []
    for folder in sorted({path.parent for path in records.RESULTS.glob("*/*.jsonl")}):
        lines = [record for path in sorted(folder.glob("*.jsonl")) for record in records.read(path)]
        plots = draw(by_case(lines, "latency"), folder)
        (folder / "README.md").write_text(page(lines, plots))
        place = folder.relative_to(records.ROOT).as_posix()
        print(f"wrote {', '.join(['README.md', *plots])} in {place}")
        if not on_cpu(lines[0]):
            overviews.append(overview(lines, place, plots))
    if not any(records.RESULTS.glob("*/*.jsonl")):
        sys.exit("bench/results has no records: run `pytest bench` first")
    if any(overviews):
        README.write_text(between(FORWARDS, README.read_text(), [each for each in overviews if each]))
        print("wrote the tables in README.md")


if __name__ == "__main__":
    main()
