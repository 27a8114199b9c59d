"""Tables of a report as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def cell(value: Any) -> str:
    """`value` as the text of a cell: bars are escaped, line breaks become blanks."""
    return " ".join(str(value).replace("\\", "\\\\").replace("|", "\\|").split())


def table(head: Sequence[str], rows: Iterable[Sequence], *, words: int = 1) -> list[str]:
    """The lines of a table. The first `words` columns hold words, the others right-aligned numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return [f"| {' | '.join(map(cell, row))} |" for row in (head, rule, *rows)]
