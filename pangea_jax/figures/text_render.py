"""Text of every language in matplotlib figures: finds fonts, checks glyphs, breaks lines.

matplotlib 3.11 itself shapes text and orders right-to-left text (libraqm). This module gives it a
font for every script and makes sure that no character becomes an empty box. matplotlib is imported when it is needed:
programs that may draw at the end start a second faster.
"""

from __future__ import annotations

import bisect
import functools
import importlib.util
import itertools
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font
    from matplotlib.text import Text

FONT_PACKAGES = {  # PyPI name -> import name; all fonts OFL-1.1
    "manimgx-fonts": "manimgx_fonts",
    "noto-cjk-sans-jp-regular": "noto_cjk_sans_jp_regular",
}
NOTO_FAMILIES = (
    "Noto Sans",
    "Noto Sans Arabic",
    "Noto Sans Bengali",
    "Noto Sans Devanagari",
    "Noto Sans Ethiopic",
    "Noto Sans Hebrew",
    "Noto Sans Myanmar",
    "Noto Sans Sinhala",
    "Noto Sans Tamil",
    "Noto Sans Telugu",
    "Noto Sans Thai",
    "Noto Sans CJK JP",  # has the Chinese and Korean forms too; the language tag chooses
)
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "IDEOGRAPHIC")
_NO_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "THAI", "MYANMAR")
_INVISIBLE = frozenset("\u200b\u200c\u200d\u200e\u200f\u2060\ufe0e\ufe0f")


class MissingGlyphError(ValueError):
    """No installed font can draw some characters of a text."""


@functools.cache
def font_families() -> tuple[str, ...]:
    """Registers the font families with matplotlib and returns their names in order of preference.

    A Noto family comes from the system if it is installed there, otherwise from the font packages. The last family is
    matplotlib's DejaVu Sans, which has signs such as the check mark.

    Raises:
      RuntimeError: this matplotlib cannot shape text.
    """
    import matplotlib.ft2font

    if not hasattr(matplotlib.ft2font, "__libraqm_version__"):
        raise RuntimeError(
            f"matplotlib {matplotlib.__version__} cannot shape Arabic or Indic text; "
            "run: pip install 'matplotlib>=3.11'"
        )
    packaged, families = _packaged_fonts(), []
    for family in NOTO_FAMILIES:
        if _on_system(family):
            families.append(family)
        elif path := packaged.get(family.replace(" ", "").lower()):
            families.append(_register(path))
    return (*families, "DejaVu Sans")


def missing_glyphs(text: str) -> list[str]:
    """The distinct characters of `text` that none of `font_families()` can draw."""
    fonts = _fonts()
    return [
        character
        for character in dict.fromkeys(text)
        if not (character.isspace() or character in _INVISIBLE)
        and not any(font.get_char_index(ord(character)) for font in fonts)
    ]


def require_glyphs(text: str, where: str) -> None:
    """Checks that `text` can be drawn. The error names it as `where`: "the question of example 3".

    Raises:
      MissingGlyphError: names the characters and the font package to install.
    """
    missing = missing_glyphs(text)
    if not missing:
        return
    names = {c: unicodedata.name(c, "unnamed") for c in missing}
    shown = ", ".join(f"U+{ord(c):04X} {name}" for c, name in list(names.items())[:3])
    remedies = dict.fromkeys(map(_remedy, names.values()))
    raise MissingGlyphError(
        f"no font for {len(missing)} character(s) of {where}: {shown}. {' '.join(remedies)}"
    )


def visible(text: str) -> str:
    """The text of a model, ready to draw: a character without a glyph becomes, for example, `<U+12000>`.

    Runs of white space become one space. It never fails, because a model may write any character.
    """
    text = " ".join(text.split())
    controls = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cn", "Co", "Cs")}
    hidden = (controls - _INVISIBLE).union(missing_glyphs(text))
    return "".join(f"<U+{ord(c):04X}>" if c in hidden else c for c in text)


def text_width(text: str, size: float) -> float:
    """The width in points of one line at `size` points, after shaping."""
    return _unit_width(text) * size


def fit_text(
    text: str, width: float, size: float, *, min_size: float, max_lines: int
) -> tuple[list[str], float]:
    """Breaks `text` into lines that are at most `width` points wide.

    It tries `size`, then smaller sizes in steps of half a point. If the text does not fit at `min_size`, an ellipsis
    ends it.

    Returns:
      the lines in logical order, and the size in points.
    """
    pieces = _break_pieces(text)
    while True:
        lines = _fill(pieces, width, size)
        if len(lines) <= max_lines and all(text_width(line, size) <= width for line in lines):
            return lines, size
        if size - 0.5 < min_size:
            break
        size -= 0.5
    kept = lines[:max_lines]
    if len(lines) > max_lines:
        kept[-1] = " ".join(lines[max_lines - 1 :])
    return [_cut(line, width, size) for line in kept], size


def is_right_to_left(text: str) -> bool:
    """Whether the first character with a strong direction is a right-to-left one (UAX 9, P2-P3)."""
    strong = (unicodedata.bidirectional(character) for character in text)
    return next((kind for kind in strong if kind in ("L", "R", "AL")), "L") != "L"


def draw_text(
    figure: Figure, x: float, y: float, text: str, *, language: str, size: float, **style
) -> Text:
    """Draws `text` at (x, y), in fractions of the figure, with the glyph forms of `language`."""
    artist = figure.text(x, y, text, family=font_families(), size=size, **style)
    artist.set_parse_math(False)
    artist.set_language({"zh": "zh-Hans"}.get(language, language))
    return artist


def _packaged_fonts() -> dict[str, Path]:
    """Upright fonts of the installed font packages: family -> path. A key is, for example, `notosansbengali`."""
    fonts = {}
    for module in FONT_PACKAGES.values():
        spec = importlib.util.find_spec(module)
        for folder in spec.submodule_search_locations if spec else ():
            for path in sorted(Path(folder).glob("*.[to]tf")):
                if "Italic" not in path.stem:
                    fonts[re.split(r"[\[-]", path.stem)[0].lower()] = path
    return fonts


def _on_system(family: str) -> bool:
    from matplotlib import font_manager

    # Weight 400 excludes the variable CJK fonts, whose default form is too thin to read.
    return any(
        entry.name == family and entry.weight == 400 and entry.style == "normal"
        for entry in font_manager.fontManager.ttflist
    )


def _register(path: Path) -> str:
    from matplotlib.font_manager import fontManager as manager

    manager.addfont(path)
    return next(entry.name for entry in manager.ttflist if entry.fname == str(path))


@functools.cache
def _fonts() -> tuple[FT2Font, ...]:
    from matplotlib import font_manager

    families = [font_manager.FontProperties(family=name) for name in font_families()]
    return tuple(font_manager.get_font(font_manager.findfont(family)) for family in families)


def _remedy(character_name: str) -> str:
    package = list(FONT_PACKAGES)[character_name.startswith(_CJK)]
    if importlib.util.find_spec(FONT_PACKAGES[package]) is None:
        return f"Run: pip install {package}"
    return (
        f"Install the Noto Sans font of the script of {character_name} and add its family to "
        "NOTO_FAMILIES in pangea_jax/figures/text_render.py."
    )


def _clusters(text: str) -> list[str]:
    """Splits before every character that may start a line."""
    clusters: list[str] = []
    for character in text:
        extends = unicodedata.category(character) in ("Mn", "Mc", "Cf", "Pe", "Po", "Pf", "Lm")
        if clusters and (extends or character == "\u0e33"):  # Thai AM behaves as a mark
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _break_pieces(text: str) -> list[tuple[str, bool]]:
    """(piece, preceded by a space); a line may end after each piece."""
    pieces = []
    for word in text.split():
        spaceless = any(unicodedata.name(c, "").startswith(_NO_SPACES) for c in word)
        parts = _clusters(word) if spaceless else [word]
        pieces += [(part, i == 0) for i, part in enumerate(parts)]
    return pieces


def _fill(pieces: list[tuple[str, bool]], width: float, size: float) -> list[str]:
    lines = [""]
    for piece, spaced in pieces:
        longer = lines[-1] + (" " if spaced and lines[-1] else "") + piece
        if not lines[-1] or text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(piece)
    return lines


def _cut(line: str, width: float, size: float) -> str:
    if text_width(line, size) <= width:
        return line
    starts = list(itertools.accumulate(_clusters(line)))
    fitting = bisect.bisect_right(starts, width, key=lambda s: text_width(s + "…", size))
    return (starts[fitting - 1] if fitting else "") + "…"


@functools.lru_cache(maxsize=4096)
def _unit_width(text: str) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    # Unhinted outlines scale with the size, so one measurement is enough.
    font = FontProperties(family=font_families(), size=1000)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 1000
