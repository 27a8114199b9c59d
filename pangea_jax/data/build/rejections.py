"""Counts records that cannot be used by their reason, says which is the first one, and what to do."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pangea_jax.data.record import RecordError

Reasons = dict[str, tuple[int, str]]
"""Reason -> (number of records, what is wrong with the first one)."""

_LONGEST = 500
_CORRECT = "correct the record"
_ANOTHER_FILE = "put a whole picture there"
_REMEDIES = {
    "cannot be read": _CORRECT,
    "cannot be rendered": _CORRECT,
    "empty answer": "write an answer, or remove the record",
    "empty question": "write a question, give --question, or remove the record",
    "field is missing": "add the field, or name it with --columns, or give --question for captions",
    "language not identified": "add the field, give --default_language, or leave out --strict_language",
    "last turn is not an answer": "add the answer, or remove the turn",
    "marker in an answer": "remove <image> from the answer",
    "marker within a marker": "write the inner <image> in another way",
    "marker in the system prompt": "move <image> into a question",
    "markers and images differ in number": "write one <image> for each picture, or none at all",
    "no turns": "add the turns, or remove the record",
    "not valid Unicode": "write the text again in UTF-8",
    "path has backslashes": "write the path with / from the folder of the pictures on",
    "path is ambiguous": "write the path from the folder of the pictures on",
    "path is not allowed": "write the path from the folder of the pictures on, and give that with --images",
    "picture cannot be read": "make the file readable",
    "picture is an address": "download the picture, and write its path",
    "picture is damaged": _ANOTHER_FILE,
    "picture is not a regular file": _ANOTHER_FILE,
    "picture is outside of the source": "copy it into the source, or pass --follow_links",
    "picture is missing": "put the file there, correct the path, or give the folder of the pictures with --images",
    "picture is too large": "make it smaller, or raise --max_pixels",
    "picture of 32-bit grey": "save it with 8 bits a channel",
    "picture of no known format": f"{_ANOTHER_FILE}, such as JPEG or PNG",
    "pictures without a mark": "write <image> at the place of each, or give --unmarked=front",
    "roles do not alternate": "let human and gpt alternate, human first",
    "system prompt is not first": "move it to the beginning, or remove it",
    "unknown language": "correct the tag",
    "unknown part": "leave the part out",
    "unknown speaker": "correct the name of the speaker",
    "video or audio": "remove the record, or the field",
    "wrong number of cells": "put a cell with the delimiter in quotes",
    "wrong type": _CORRECT,
}


def remedy(reason: str) -> str:
    """What to do about a fault."""
    return _REMEDIES.get(reason, _CORRECT)


def describe(raw: Any, error: RecordError) -> dict[str, Any]:
    """The fault of a record, in fields that can be written as UTF-8."""
    id = error.record_id or (str(raw.get("id") or "") if isinstance(raw, Mapping) else "")
    id = id[:_LONGEST].encode("utf-8", "replace").decode()
    detail = error.detail[: 2 * _LONGEST].encode("utf-8", "replace").decode()
    return {"id": id, "reason": error.reason, "field": error.field, "detail": detail}


def sentence(row: Mapping[str, Any]) -> str:
    """Where a fault is, what it is, and what to do, in one sentence.

    Args:
      row: `file`, `number` of the record in it, `id`, `reason`, `field` and `detail`.
    """
    id = f" ({row['id']!r:.80})" if row["id"] else ""
    detail = f": {row['detail']:.{_LONGEST}}" if row["detail"] else ""
    where = f"{row['file']}, record {row['number']:,}{id}, field {row['field']}"
    return " ".join(f"{where}{detail}; {remedy(row['reason'])}".split())


def count(rejected: Iterable[Mapping[str, Any]]) -> Reasons:
    """Counts records by `reason`, and describes the first one of each; see `sentence`."""
    counts, first = Counter(), {}
    for row in rejected:
        counts[row["reason"]] += 1
        if row["reason"] not in first:
            first[row["reason"]] = sentence(row)
    return {reason: (count, first[reason]) for reason, count in counts.items()}


def table(reasons: Reasons) -> str:
    """One line for each reason, the most frequent first."""
    rows = sorted(reasons.items(), key=lambda item: (-item[1][0], item[0]))
    lines = (f"{count:>10,}  {reason}: {first}" for reason, (count, first) in rows)
    return "\n".join(lines)
