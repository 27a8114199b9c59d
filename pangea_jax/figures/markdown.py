"""Tables of a report as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from pangea_jax.figures import inert

# HTML, and what makes a link or a picture of brackets. Single brackets stay readable, as intervals have them.
_ESCAPED = (
    *(("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")),
    *(("](", "]\\("), ("][", "]\\["), ("]:", "]\\:")),
)


def cell(value: Any) -> str:
    """`value` as the text of a cell or a heading: on one line, at most `inert.MOST` characters, and without markup."""
    text = inert.line(value)
    for sign, escaped in _ESCAPED:
        text = text.replace(sign, escaped)
    return text


def table(head: Sequence[str], rows: Iterable[Sequence], *, words: int = 1) -> list[str]:
    """The lines of a table. The first `words` columns hold words, the others right-aligned numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return [f"| {' | '.join(map(cell, row))} |" for row in (head, rule, *rows)]
