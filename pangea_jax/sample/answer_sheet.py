"""A sheet of pictures, each with the question, the model's answer and the true answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangea_jax import languages
from pangea_jax.figures import style as fig
from pangea_jax.figures.text_render import (
    draw_text,
    fit_text,
    is_right_to_left,
    require_glyphs,
    text_width,
    visible,
)
from pangea_jax.sample.scores import AnswerExample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4
CARD_WIDTH, CARD_HEIGHT = 226.0, 88.0  # points
PICTURE = 68.0
MARGIN, HEADER = 14.0, 42.0
TEXT_LEFT = PICTURE + 9.0
ANSWER_LEFT = TEXT_LEFT + 13.0


def answer_sheet(
    examples: Sequence[AnswerExample], out_path_stem: str | Path, title: str
) -> tuple[Path, Path]:
    """Draws `<stem>.png` and `<stem>.svg`, four cards to a row.

    Args:
      examples: in the order to show; 24 fit on a screen.
      out_path_stem: path of the figures without suffix.
      title: the questions and the model.

    Raises:
      ValueError: there are no examples, or a picture is not uint8 [height, width, 3].
      MissingGlyphError: no font can draw a question or a truth. In an answer such characters
        become code points, since a model may write anything.
    """
    from matplotlib.figure import Figure

    _check(examples)
    rows = math.ceil(len(examples) / COLUMNS)
    columns = min(COLUMNS, len(examples))
    width = max(2, columns) * CARD_WIDTH + 2 * MARGIN
    height = rows * CARD_HEIGHT + HEADER + MARGIN
    with fig.style():
        figure = Figure(figsize=(width / 72, height / 72))
        page = _Page(figure, width, height)
        right = sum(example.is_right for example in examples)
        note = f"{right} of {len(examples)} right     ✓ ✗ answer     = truth"
        page.write(width - MARGIN, 19, note, ha="right", color=fig.MUTED)
        room = width - 2 * MARGIN - text_width(note, 9) - 12
        page.write_lines(MARGIN, 19, title, room, size=12.5, lines=2)
        splits = {example.split for example in examples}
        for i, example in enumerate(examples):
            left = MARGIN + i % COLUMNS * CARD_WIDTH
            top = HEADER + i // COLUMNS * CARD_HEIGHT
            _draw_card(page, left, top, example, show_split=len(splits) > 1)
        return fig.save(figure, Path(out_path_stem))


class _Page:
    """Draws at places given in points from the top left corner of a figure."""

    def __init__(self, figure: Figure, width: float, height: float):
        self._figure, self._width, self._height = figure, width, height

    def picture(self, left: float, top: float, side: float, pixels: np.ndarray) -> None:
        x, y = left / self._width, 1 - (top + side) / self._height
        axes = self._figure.add_axes((x, y, side / self._width, side / self._height))
        axes.imshow(pixels, interpolation="lanczos")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, color=fig.FAINT, linewidth=0.6)

    def write(
        self, x: float, y: float, text: str, *, language: str = "en", size: float = 9, **style
    ) -> None:
        """Draws one line of text with its base line `y` points below the top edge."""
        x, y = x / self._width, 1 - y / self._height
        draw_text(self._figure, x, y, text, language=language, size=size, va="baseline", **style)

    def write_lines(
        self, x: float, y: float, text: str, width: float, *, size: float, lines: int, **style
    ) -> float:
        """Draws text in lines of at most `width` points. Returns the base line below the last."""
        pitch = 1.38 * size
        fitted, size = fit_text(text, width, size, min_size=size - 2.5, max_lines=lines)
        if is_right_to_left(text):
            style["ha"] = "right"
            x += max(text_width(line, size) for line in fitted)
        for line in fitted:
            self.write(x, y, line, size=size, **style)
            y += pitch
        return y


def _draw_card(
    page: _Page, left: float, top: float, example: AnswerExample, *, show_split: bool
) -> None:
    language = languages.get(example.language)
    page.picture(left, top, PICTURE, example.picture)
    x, y = left + TEXT_LEFT, top + 7
    name = language.english_name
    if language.native_name.casefold() != name.casefold():
        name += f" · {language.native_name}"
    if show_split:
        name += f" · {example.split.replace('_', ' ')}"
    code = language.code
    room = CARD_WIDTH - TEXT_LEFT - 10
    page.write_lines(x, y, name, room, size=7, lines=1, language=code, color=fig.MUTED)
    y = page.write_lines(x, y + 14, example.question, room, size=8.5, lines=2, language=code)
    x = left + ANSWER_LEFT
    room = CARD_WIDTH - ANSWER_LEFT - 10
    sign, colour = ("✓", fig.GREEN) if example.is_right else ("✗", fig.VERMILION)
    answer = visible(example.answer) or "(nothing)"
    page.write(left + TEXT_LEFT, y + 3, sign, size=10, color=colour)
    y = page.write_lines(x, y + 3, answer, room, size=10, lines=1, language=code, color=colour)
    page.write(left + TEXT_LEFT + 1, y + 1, "=", size=9, color=fig.MUTED)
    page.write_lines(x, y + 1, example.truth, room, size=9, lines=1, language=code)


def _check(examples: Sequence[AnswerExample]) -> None:
    if not examples:
        raise ValueError("no examples to draw: give at least one AnswerExample")
    for i, example in enumerate(examples):
        shape, dtype = example.picture.shape, example.picture.dtype
        if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
            raise ValueError(
                f"picture of example {i} is {dtype} {list(shape)}, expected "
                "uint8 [height, width, 3]"
            )
        for part in ("question", "truth"):
            text = getattr(example, part)
            require_glyphs(text, f"the {part} of example {i} ({example.language})")
