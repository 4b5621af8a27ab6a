"""The records of one case together: our providers, the peers, and the best peer."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import records
from workloads import Case, TrainingCase

SUITES = {
    "model": "The model's forward",
    "latency": "Latency of one sequence, from the call to the result on the host",
    "training": "A training step of BertForSequenceClassification",
    "encode": "Sentences to embeddings, end to end",
    "memory": "Peak memory of one forward",
    "attention": "Attention",
    "kernels": "Kernels",
    "host": "The host's work for a forward in the kernels, without the driver",
}
# A forward counts as bound by the host if issuing it takes this share of its time.
HOST_SHARE = 0.9


def case_of(record: dict) -> Case:
    """Return the forward or the training step that a record of the model's suites measures."""
    case_class = TrainingCase if record["kind"] == "training" else Case
    names = {field.name for field in fields(case_class)}
    return case_class(**{name: value for name, value in record["case"].items() if name in names})


@dataclass(frozen=True)
class Comparison:
    """One case of a suite: its title and the records of all providers, including absent ones."""

    suite: str
    title: str
    of: dict[str, dict]

    @property
    def case(self) -> Case:
        """The forward or the training step, in the model's suites."""
        return case_of(next(iter(self.of.values())))

    @property
    def ours(self) -> list[str]:
        return [name for name in self.of if name.startswith("fastbert")]

    def best_peer(self) -> tuple[str, float]:
        """Return the best peer and its ratio to the baseline. The baseline is a peer with ratio 1."""
        any_record = next(iter(self.of.values()))
        speeds = {name: record["ratio"] for name, record in self.of.items() if "ratio" in record}
        peers = {name: speed for name, speed in speeds.items() if name not in self.ours} | {any_record["baseline"]: 1.0}
        best = max(peers, key=peers.get)
        return best, peers[best]

    def host_bound(self, name: str) -> bool:
        """Return True if a provider was timed by the device and issuing its call takes nearly as long as the call."""
        record = self.of[name]
        return record.get("clock") == "device" and record["host_s"] >= HOST_SHARE * record["median_s"]

    def beside_best(self, name: str) -> float:
        """Return our provider's ratio over the best peer's, both relative to the same baseline; 0 if ours failed."""
        return self.of[name].get("ratio", 0.0) / self.best_peer()[1]


def comparisons(lines: Iterable[dict]) -> list[Comparison]:
    """Return all cases of all suites in the order of SUITES."""
    grouped: dict[tuple, Comparison] = {}
    for record in lines:
        key = record["suite"], *records.about(record["case"])
        found = grouped.setdefault(key, Comparison(record["suite"], title_of(record), {}))
        found.of[record["provider"]] = record
    return sorted(grouped.values(), key=lambda each: list(SUITES).index(each.suite))


def title_of(record: dict) -> str:
    """Return the title of a record's case."""
    case = dict(record["case"])
    if {field.name for field in fields(Case)} <= case.keys():
        return f"{case_of(record)}" + (f", ids on the {case['ids']}" if "ids" in case else "")
    return " ".join(f"{name} {value}" if isinstance(value, int | float) else str(value) for name, value in case.items())
