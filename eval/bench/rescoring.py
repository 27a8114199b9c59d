"""What scoring the responses of an earlier run again has changed, and why."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.bench.documents import read_lines
from eval.bench.task import PROFILES
from eval.bench.tasks import ALL_TASKS
from pangea_jax.work import atomic

# task -> id of the document -> its line of samples/<task>.jsonl
Samples = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Change:
    """A document with another score or reading; a profile without a score has None for both."""

    task: str
    profile: str
    doc_id: str
    response: Any
    target: Any
    read_before: Any
    read: Any
    score_before: float | None
    score: float | None


def snapshot(folder: Path, tasks: Iterable[str]) -> Samples:
    """The sample logs of a run, to be read before it is scored again."""
    return {
        name: {row["doc_id"]: row for _, row in read_lines(folder / "samples" / f"{name}.jsonl")}
        for name in tasks
    }


def changes(before: Samples, after: Samples) -> list[Change]:
    """The documents whose score or reading differs."""
    found = []
    for name, rows in after.items():
        metric = ALL_TASKS[name].dataset.metric
        for doc_id, row in rows.items():
            old = before.get(name, {}).get(doc_id, {})
            for profile in PROFILES:
                then, now = (_reading(sample.get(profile), metric) for sample in (old, row))
                if then != now:
                    response, target = row["resps"][0][0], row["target"]
                    values = (then[0], now[0], then[1], now[1])
                    found.append(Change(name, profile, doc_id, response, target, *values))
    return found


def _reading(entry: Mapping[str, Any] | None, metric: str) -> tuple[Any, float | None]:
    return (entry["filtered_resps"][0], entry["metrics"].get(metric)) if entry else (None, None)


def reason(task: str, old_version: int | None) -> str:
    """What changed in a data set since a version."""
    dataset = ALL_TASKS[task].dataset
    if old_version == dataset.version:
        return "the same version: the code, a library or the judge's replies differ"
    newer = (v for v in range((old_version or 0) + 1, dataset.version + 1) if v in dataset.changes)
    said = "; ".join(dataset.changes[version] for version in newer)
    return f"version {old_version} to {dataset.version}: {said or 'no note'}"


def write(
    folder: Path,
    before: Samples,
    results_before: Mapping[str, Any],
    results: Mapping[str, Any],
    console: Console,
) -> list[Change]:
    """Writes `rescored.jsonl`, one changed document a line, and prints a line per task and profile."""
    found = changes(before, snapshot(folder, results["documents"]))
    lines = (json.dumps(dataclasses.asdict(c), ensure_ascii=False) + "\n" for c in found)
    atomic.write_bytes(folder / "rescored.jsonl", "".join(lines).encode())
    table = Table(title="Changed by scoring again", title_justify="left")
    for name in ("task", "profile", "before", "now", "other score", "other reading"):
        table.add_column(name, justify="left" if name in ("task", "profile") else "right")
    why: dict[str, str] = {}
    for task in results["tasks"]:
        then, now = results_before["tasks"].get(task, {}), results["tasks"][task]
        for profile in PROFILES:
            own = [c for c in found if (c.task, c.profile) == (task, profile)]
            scores = [entry.get(profile, {}).get("score") for entry in (then, now)]
            if own or scores[0] != scores[1]:
                moved = sum(c.score_before != c.score for c in own)
                shown = ("-" if score is None else f"{score:.1f}" for score in scores)
                table.add_row(task, profile, *shown, str(moved), str(len(own) - moved))
                why[ALL_TASKS[task].dataset.name] = reason(task, then.get("version"))
    if table.row_count:
        console.print(table)
        for dataset, text in why.items():
            console.print(f"{dataset}: {text}", soft_wrap=True)
        console.print(
            f"the {len(found)} changed answers: {folder / 'rescored.jsonl'}", soft_wrap=True
        )
    else:
        console.print("no score changed")
    return found
