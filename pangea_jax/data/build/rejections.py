"""Counts records that cannot be used by their reason, with the id of the first record."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pangea_jax.data.record import RecordError

Reasons = dict[str, tuple[int, str]]
"""Reason -> (number of records, id of the first one)."""


def describe(raw: Any, error: RecordError) -> dict[str, Any]:
    """The fault of a record, in fields that can be written as UTF-8."""
    id = error.record_id or (str(raw.get("id", "")) if isinstance(raw, Mapping) else "")
    id = id.encode("utf-8", "replace").decode()
    detail = error.detail.encode("utf-8", "replace").decode()
    return {"id": id, "reason": error.reason, "field": error.field, "detail": detail}


def count(rejected: Iterable[Mapping[str, Any]]) -> Reasons:
    """Counts records, given by `reason` and `id`, in their order."""
    counts, first = Counter(), {}
    for row in rejected:
        counts[row["reason"]] += 1
        first.setdefault(row["reason"], row["id"])
    return {reason: (count, first[reason]) for reason, count in counts.items()}


def merge(parts: Iterable[Reasons]) -> Reasons:
    """Adds the counts of several parts, in their order."""
    merged: dict[str, tuple[int, str]] = {}
    for part in parts:
        for reason, (count, id) in part.items():
            before, first = merged.get(reason, (0, id))
            merged[reason] = (before + count, first)
    return merged


def table(reasons: Reasons) -> str:
    """One line for each reason, the most frequent first."""
    rows = sorted(reasons.items(), key=lambda item: (-item[1][0], item[0]))
    return "\n".join(f"{count:>10,}  {reason}, e.g. {id!r}" for reason, (count, id) in rows)
