"""Text of unknown origin, as records, answers and names are, so that it does nothing where it is shown.

On a console, an escape sequence of a terminal would move the cursor or hide lines. In every medium, an override of the
writing direction turns the rest of a line round, and a line of a megabyte hides all others.
"""

import re
from typing import Any

from rich.console import Console, RenderHook
from rich.segment import Segment

MOST = 1_000
"""Maximum number of characters of a text in a table, a title or a message."""

# Control characters but tab and line feed, the embeddings, overrides and isolates of the writing direction, line and
# paragraph separators, and halves of surrogate pairs. Marks (U+200E, U+200F) turn nothing round and stay.
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with each active character as its number.

    >>> visible("a\\x1b[31mb\\u202ec")
    'a<1B>[31mb<202E>c'
    """
    return _ACTIVE.sub(lambda match: f"<{ord(match.group()):02X}>", text)


def line(value: Any, most: int = MOST) -> str:
    """`value` on one line, without active characters and at most `most` characters long."""
    text = str(value)
    shown = visible(" ".join(text[: 4 * most].split()))
    return shown if len(shown) <= most and len(text) <= 4 * most else f"{shown[: most - 1]}…"


def label(value: Any, most: int = 80) -> str:
    """`line` as a text of a figure, where `$` would begin a formula."""
    return line(value, most).replace("$", r"\$")


class _Filter(RenderHook):
    def process_renderables(self, renderables):
        return [_Inert(part) for part in renderables]


class _Inert:
    """A renderable of rich whose texts are `visible`; rich's own colours and cursor movements stay."""

    def __init__(self, inside: Any):
        self._inside = inside

    def __rich_console__(self, console, options):
        for segment in console.render(self._inside, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def console(**settings: Any) -> Console:
    """A `rich.console.Console` on which no text is active."""
    made = Console(**settings)
    made.push_render_hook(_Filter())
    return made
