"""Every record accounted for: what may become of one, how many there were of each, and the report on it."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pangea_jax.curation.reply_store import Usage
from pangea_jax.data.record import Conversation


class AccountingError(AssertionError):
    """A record was lost or counted twice: a fault of the program, never of its input."""


@dataclasses.dataclass(frozen=True)
class Passed:
    """A row for the next part: whatever JSON can hold."""

    row: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Kept:
    """A finished record.

    Attributes:
      provenance: source id, prompts' version, model, scores, every check's verdict.
      pictures: bytes of files to be written, by their name in `record.images`; pictures that lie elsewhere
        already are not in it.
    """

    record: Conversation
    provenance: Mapping[str, Any]
    pictures: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """What was left out.

    Attributes:
      id: of the record, or where it stood.
      stage: one of the job's stages.
      reason: a short fixed phrase, so that it can be counted.
      detail: what was found in this one.
      count: records, where it is known of several at once that they cannot be read.
    """

    id: str
    stage: str
    reason: str
    detail: str = ""
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Added:
    """`count` more records enter `stage` than were read: one was made into several."""

    stage: str
    count: int


@dataclasses.dataclass(frozen=True)
class Entered:
    """The row stood for a file, and this many records entered with it: in the place of the row."""

    count: int


Outcome = Passed | Kept | Dropped | Added | Entered


@dataclasses.dataclass
class Accounting:
    """Counts of records; `check` says that none was lost.

    Attributes:
      entered: records read.
      left: records passed on or kept.
      added: stage -> records that one was made into, besides itself.
      dropped: stage -> reason -> records.
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
        """Each stage's records in and out, and what it dropped by reason, the most frequent first."""
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
    """A section on calls whose cost is not known but bounded, if there are any."""
    rows = {
        purpose: f"{row.estimated:,} of {row.calls:,} replies came without a count of tokens and are charged "
        "as one a byte, the most that it can be"
        for purpose, row in usage.items()
        if row.estimated
    }
    return {"Estimated cost": rows} if rows else {}


def markdown(report: Mapping[str, Any]) -> str:
    """report.md, of the contents of report.json."""
    lines = [f"# {report['title']}", ""]
    made = sum(stage["added"] for stage in report["stages"])
    equation = f"{report['entered']:,} records entered"
    equation += f", {made:,} more were made of them" if made else ""
    lines += [f"{equation}; {report['kept']:,} are kept, {report['dropped']:,} dropped.", ""]
    lines += ["| stage | in | dropped | out | yield | the paper |", "|---|---:|---:|---:|---:|---|"]
    for stage in report["stages"]:
        dropped = stage["in"] - stage["out"]
        share = f"{stage['out'] / stage['in']:.1%}" if stage["in"] else ""
        numbers = f"{stage['in']:,} | {dropped:,} | {stage['out']:,} | {share}"
        lines.append(
            f"| {stage['stage']} | {numbers} | {report['published'].get(stage['stage'], '')} |"
        )
    lines += ["", "| dropped at | because | records |", "|---|---|---:|"]
    for stage in report["stages"]:
        for reason, count in stage["dropped"].items():
            lines.append(f"| {stage['stage']} | {cell(reason)} | {count:,} |")
    for heading, values in report["sections"].items():
        lines += ["", f"## {heading}", "", "| | |", "|---|---|"]
        for name, value in values.items():
            value = f"{value:,.4g}" if isinstance(value, float) else value
            lines.append(f"| {cell(name)} | {cell(value)} |")
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """A value as a cell of a Markdown table, which neither its bars nor its lines can break."""
    return " ".join(str(value).replace("\\", "\\\\").replace("|", "\\|").split())
