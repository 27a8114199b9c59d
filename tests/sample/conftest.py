"""What the tests of the sample share: whether a text is in the script of its language."""

import unicodedata

import pytest

from pangea_jax import languages

# Beginnings of the Unicode character names of each script (ISO 15924).
SCRIPT_NAMES = {
    "Arab": ("ARABIC",),
    "Beng": ("BENGALI",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Grek": ("GREEK",),
    "Hans": ("CJK",),
    "Hebr": ("HEBREW",),
    "Jpan": ("CJK", "HIRAGANA", "KATAKANA"),
    "Kore": ("HANGUL",),
    "Latn": ("LATIN", "MODIFIER LETTER"),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Thai": ("THAI",),
}


@pytest.fixture(scope="session")
def foreign_characters():
    """foreign_characters(text, language): those that the language's script does not have."""

    def find(text: str, language: str) -> set[str]:
        names = SCRIPT_NAMES[languages.get(language).script]
        return {char for char in text if not unicodedata.name(char).startswith(names)}

    return find


@pytest.fixture(scope="session")
def in_script(foreign_characters):
    """in_script(text, language): whether it has letters, and all are of the language's script."""

    def check(text: str, language: str) -> bool:
        letters = "".join(char for char in text if char.isalpha())
        return bool(letters) and not foreign_characters(letters, language)

    return check
