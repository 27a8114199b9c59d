"""The possible outcomes of a record, the count of each, and the report."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pangea_jax.curation.reply_store import Usage
from pangea_jax.data.record import Conversation
from pangea_jax.figures.markdown import table


class AccountingError(AssertionError):
    """A record was lost or counted twice. The program is at fault, never its input."""


class Unfit(Exception):
    """A record that cannot be used.

    Attributes:
      reason: a short fixed phrase, so that it can be counted.
      detail: what was found in this record.
    """

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason

    def dropped(self, id: str, stage: str) -> "Dropped":
        return Dropped(id, stage, self.reason, self.detail)


@dataclasses.dataclass(frozen=True)
class Passed:
    """A row for the next part: any JSON object."""

    row: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Kept:
    """A finished record.

    Attributes:
      provenance: source id, version of the prompts, model, scores, verdict of every check.
      pictures: name in `record.images` -> bytes of a file to write; empty if the pictures already exist.
    """

    record: Conversation
    provenance: Mapping[str, Any]
    pictures: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record that was left out.

    Attributes:
      id: id of the record, or its place in the source.
      stage: one of the job's stages.
      reason, detail: see `Unfit`.
      count: number of records, if several are left out together.
    """

    id: str
    stage: str
    reason: str
    detail: str = ""
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Added:
    """One record became several: `count` more records enter `stage` than were read."""

    stage: str
    count: int


@dataclasses.dataclass(frozen=True)
class Entered:
    """The row was a file: `count` records entered in place of the row."""

    count: int


Outcome = Passed | Kept | Dropped | Added | Entered


@dataclasses.dataclass
class Accounting:
    """Counts of records.

    Attributes:
      entered: number of records read.
      left: number of records passed on or kept.
      added: stage -> number of further records that were made of one.
      dropped: stage -> reason -> number of records.
    """

    entered: int = 0
    left: int = 0
    added: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def count(self, outcome: Outcome) -> None:
        if isinstance(outcome, Dropped):
            self.dropped.setdefault(outcome.stage, Counter())[outcome.reason] += outcome.count
        elif isinstance(outcome, Added):
            self.added[outcome.stage] += outcome.count
        elif isinstance(outcome, Entered):
            self.entered += outcome.count - 1  # the row itself was counted when it was read
        else:
            self.left += 1

    @property
    def num_dropped(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.dropped.values())

    def check(self, where: str) -> None:
        """
        Raises:
          AccountingError: entered + added is not left + dropped.
        """
        came, went = self.entered + self.added.total(), self.left + self.num_dropped
        if came != went:
            raise AccountingError(
                f"{where}: {self.entered} records entered and {self.added.total()} were made of them, "
                f"but {self.left} left and {self.num_dropped} were dropped"
            )

    def merge(self, other: "Accounting") -> None:
        """Adds the counts of another shard of the same part."""
        self.entered += other.entered
        self.left += other.left
        self.added.update(other.added)
        for stage, reasons in other.dropped.items():
            self.dropped.setdefault(stage, Counter()).update(reasons)

    def rows(self, stages: Sequence[str]) -> list[dict[str, Any]]:
        """For each stage: records in and out, and those dropped by reason, the most frequent first."""
        rows, count = [], self.entered
        for stage in stages:
            reasons = self.dropped.get(stage, Counter())
            reasons = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
            entered = count + self.added[stage]
            count = entered - sum(reasons.values())
            row = {"stage": stage, "in": entered, "added": self.added[stage], "out": count}
            rows.append(row | {"dropped": reasons})
        return rows

    def to_json(self) -> dict[str, Any]:
        dropped = {stage: dict(sorted(reasons.items())) for stage, reasons in self.dropped.items()}
        counts = {"entered": self.entered, "left": self.left}
        return counts | {"added": dict(self.added), "dropped": dict(sorted(dropped.items()))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Accounting":
        dropped = {stage: Counter(reasons) for stage, reasons in value["dropped"].items()}
        return cls(value["entered"], value["left"], Counter(value["added"]), dropped)


def estimates(usage: Mapping[str, Usage]) -> dict[str, dict[str, str]]:
    """A section of the report on replies whose cost is only an upper bound; empty if there are none."""
    rows = {
        purpose: f"{row.estimated:,} of {row.calls:,} replies came without a count of tokens; each of their "
        "bytes is charged as one token, which is the maximum"
        for purpose, row in usage.items()
        if row.estimated
    }
    return {"Estimated cost": rows} if rows else {}


def markdown(report: Mapping[str, Any]) -> str:
    """report.md, made of the contents of report.json."""
    made = sum(stage["added"] for stage in report["stages"])
    equation = f"{report['entered']:,} records entered"
    equation += f", {made:,} more were made of them" if made else ""
    lines = [f"# {report['title']}", ""]
    lines += [f"{equation}; {report['kept']:,} are kept, {report['dropped']:,} dropped.", ""]
    stages, reasons = [], []
    for stage in report["stages"]:
        name, entered, left = stage["stage"], stage["in"], stage["out"]
        share = f"{left / entered:.1%}" if entered else ""
        counts = f"{entered:,}", f"{entered - left:,}", f"{left:,}"
        stages.append((name, *counts, share, report["published"].get(name, "")))
        reasons += [(name, why, f"{count:,}") for why, count in stage["dropped"].items()]
    lines += table(("stage", "in", "dropped", "out", "yield", "the paper"), stages)
    lines += ["", *table(("dropped at", "because", "records"), reasons, words=2)]
    for heading, values in report["sections"].items():
        rows = [(k, f"{v:,.4g}" if isinstance(v, float) else v) for k, v in values.items()]
        lines += ["", f"## {heading}", "", *table(("", ""), rows, words=2)]
    return "\n".join(lines) + "\n"


def provenance(out: Path) -> Iterator[dict[str, Any]]:
    """The provenance of every record that a pipeline kept in `out`, in their order."""
    for path in sorted((out / "provenance").glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
