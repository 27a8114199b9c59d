"""Every script is drawn shaped and in order, or the error names what is missing."""

import unicodedata

import matplotlib.font_manager
import pytest
from fontTools.ttLib import TTFont
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from pangea_jax import languages
from pangea_jax.figures import text_render
from pangea_jax.figures.text_render import (
    MissingGlyphError,
    fit_text,
    font_families,
    is_right_to_left,
    missing_glyphs,
    require_glyphs,
    text_width,
    visible,
)


def _outline(text):
    font = FontProperties(family=font_families())
    return {tuple(point) for point in TextPath((0, 0), text, size=100, prop=font).vertices.round(2)}


def test_every_language_has_a_font():
    for code, language in languages.LANGUAGES.items():
        require_glyphs(language.native_name, code)


def test_coverage_agrees_with_the_character_maps_of_the_fonts():
    mapped = set()
    for family in font_families():
        path = matplotlib.font_manager.findfont(FontProperties(family=family))
        mapped |= TTFont(str(path), fontNumber=0, lazy=True).getBestCmap().keys()
    sample = [c for c in map(chr, range(0x21, 0x1F000, 37)) if unicodedata.category(c)[0] in "LNPS"]
    assert missing_glyphs("".join(sample)) == [c for c in sample if ord(c) not in mapped]
    assert 0 < len(missing_glyphs("".join(sample))) < len(sample)


def test_an_uncovered_script_is_an_error_that_names_it():
    with pytest.raises(
        MissingGlyphError, match=r"the truth of 3 \(xx\): U\+12000 CUNEIFORM SIGN A"
    ):
        require_glyphs("\U00012000", "the truth of 3 (xx)")


@pytest.mark.parametrize(
    ("character", "package"), [("猫", "noto-cjk-sans-jp-regular"), ("ক", "manimgx-fonts")]
)
def test_without_the_font_package_the_error_names_it(monkeypatch, character, package):
    monkeypatch.setattr(text_render.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(text_render, "_on_system", lambda family: False)
    text_render.font_families.cache_clear()
    text_render._fonts.cache_clear()
    try:
        with pytest.raises(MissingGlyphError, match=f"pip install {package}"):
            require_glyphs(character, "a question")
    finally:
        text_render.font_families.cache_clear()
        text_render._fonts.cache_clear()


@pytest.mark.parametrize(
    "joined", ["سلام", "क्ष", "স্ত্রী", "కె", "க்ஷ", "ශ්‍රී"], ids=["ar", "hi", "bn", "te", "ta", "si"]
)
def test_letters_are_shaped_together(joined):
    # A zero-width non-joiner between all letters is how Unicode asks for the unshaped row.
    apart = "\u200c".join(joined.replace("\u200d", ""))
    assert _outline(joined) != _outline(apart)


def test_hebrew_runs_from_right_to_left():
    # The last letter stands at the left edge, where it stands when alone.
    assert _outline("ב") <= _outline("אב")
    assert not _outline("א") <= _outline("אב")
    assert _outline("a") <= _outline("ab")
    assert is_right_to_left("מה זה?") and is_right_to_left("؟ قطة") and not is_right_to_left("1 a")


def test_lines_fit_and_keep_every_word():
    text = "the quick brown fox jumps over the lazy dog"
    lines, size = fit_text(text, 100, 9, min_size=6, max_lines=3)
    assert " ".join(lines) == text and 1 < len(lines) <= 3
    assert all(text_width(line, size) <= 100 for line in lines)


def test_text_shrinks_before_it_is_cut():
    text = "Eichhörnchen"
    width = text_width(text, 8)
    assert fit_text(text, width + 0.01, 10, min_size=7, max_lines=1) == ([text], 8)
    (cut,), size = fit_text(text, width / 2, 10, min_size=7, max_lines=1)
    assert size == 7 and cut.endswith("…") and text.startswith(cut[:-1])
    assert text_width(cut, 7) <= width / 2


def test_scripts_without_spaces_break_between_characters():
    text = "これは何ですか\uff1f名前を答えてください。"
    lines, size = fit_text(text, 95, 9, min_size=9, max_lines=3)
    assert "".join(lines) == text and len(lines) > 1 and size == 9
    assert not any(line[0] in "\uff1f。" for line in lines)


def test_what_a_model_wrote_is_always_drawable():
    written = visible("a\x00b\U00012000\u202e \n c\ufffd $x_2$")
    assert written == "a<U+0000>b<U+12000><U+202E> c\ufffd $x_2$"
    assert missing_glyphs(written) == []
    assert visible("") == ""
    assert visible("می‌خواهم") == "می‌خواهم"
