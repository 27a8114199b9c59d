"""The words of `words.toml` as patterns over folded text."""

import functools
import tomllib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import regex

from eval.bench.reading.text import form, lower

# Scripts that attach words to one another: no space is needed around a word.
_ATTACHED = regex.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)
_PREFIXED = regex.compile(r"[\u0590-\u06ff]")
LETTER = r"[\p{L}\p{M}]"
# "and", "the", "in" and the like are written onto the next word in Arabic and Hebrew.
_PREFIX = "(?:[وفبكل]{0,2}(?:ال)?|[והבכלמש]{0,3})"
_PREFIX_LETTERS = "وفبكلاהבלכמשו"
_VIRAMA = 9
# The fewest letters of a Latin word that is looked for whatever the language is. "Yes" and "no" stand alone.
_LEAST = {"not": 2, "yes": 2, "no": 2, "right": 4, "wrong": 4, "answer": 4, "option": 4}
# A short word of a kind is left out if it has one of these meanings elsewhere; all others do not disturb.
_DISTURB = {
    "yes": {"no", "not", "wrong"},
    "no": {"yes", "right"},
    "right": {"no", "not", "wrong", "is", "link", "for", "answer", "option"},
    "wrong": {"yes", "right", "is", "link", "for", "answer", "option"},
    "not": {"is"},
}
_TABLE = tomllib.loads((Path(__file__).parent / "words.toml").read_text("utf-8"))


class Words:
    """The words of a language and of English; without a language, all words that mean the same everywhere."""

    def __init__(self, language: str | None):
        tables = [_TABLE["en"]]
        if language is None:
            tables += _TABLE.values()
        elif language != "en" and language in _TABLE:
            tables.append(_TABLE[language])
        self.language = language
        self._tables = tables
        self._following = regex.compile(either(self.list("not", side=True)))

    def list(self, kind: str, side: bool | None = None) -> list[str]:
        """The words of a kind; with `side`, those of the languages whose negation follows (True) or not."""
        words = []
        for table in self._tables:
            if side is not None and table.get("after", False) != side:
                continue
            # Short Latin words mean something else in other languages ("si", "no", "la").
            shared = self.language is None and table is not _TABLE["en"]
            least = _LEAST.get(kind, 3)
            for word in table.get(kind, "").split():
                latin = form(word).isascii()
                if not (shared and latin and (len(word) < least or _elsewhere(kind, form(word)))):
                    words.append(word)
        return list(dict.fromkeys(words))

    @staticmethod
    def own(language: str, kind: str) -> bool:
        """Whether a language has words of a kind itself."""
        return bool(_TABLE.get(language, {}).get(kind))

    def negation_follows(self, word: str) -> bool:
        """Whether a negation, as it stands in folded text, negates what is before it."""
        return bool(self._following.fullmatch(word))

    @functools.cache  # noqa: B019 - the objects live as long as the process
    def pattern(self, *kinds: str) -> str:
        """A pattern that matches a word of these kinds, in folded text."""
        return either(word for kind in kinds for word in self.list(kind))


@functools.cache
def _kinds(word: str) -> set[str]:
    return {
        kind
        for table in _TABLE.values()
        for kind, words in table.items()
        if isinstance(words, str) and word in form(words).split()
    }


def _elsewhere(kind: str, word: str) -> bool:
    """Whether a short word means something else in another language: "ni" is "nor" in Spanish, "is" in Swahili."""
    if len(word) > 4:
        return False
    return not _kinds(word).isdisjoint(_DISTURB.get(kind, set()))


@functools.cache
def of(language: str | None) -> Words:
    return Words(language if language in _TABLE else None)


def last_counts(language: str | None) -> bool:
    """Whether a sentence says first what the answer is for, and then the answer ("2日で15ドル")."""
    return language == "zh" or bool(_TABLE.get(language or "", {}).get("after"))


def either(words: Iterable[str]) -> str:
    """A pattern that matches any of the words, the longest first; `(?!)` if there are none.

    The pattern looks at the first letter before anything else, which makes it several times as fast.
    """
    attached, apart = set(), set()
    for word in words:
        stem = lower(form(word.rstrip("$").replace("_", " ")))
        kind = attached if _ATTACHED.match(stem) else apart
        kind.add((stem, kind is apart and not word.endswith("$")))
    sides = []
    if apart:
        sides.append(rf"(?=[{_firsts(apart)}])(?<!{LETTER})(?:{_longest_first(apart)})(?!{LETTER})")
    if attached:
        sides.append(f"(?=[{_firsts(attached)}])(?:{_longest_first(attached)})")
    return f"(?:{'|'.join(sides)})" if sides else "(?!)"


def _firsts(stems: Iterable[tuple[str, bool]]) -> str:
    letters = {stem[0] for stem, _ in stems}
    if any(map(_PREFIXED.match, letters)):
        letters.update(_PREFIX_LETTERS)
    return "".join(map(regex.escape, sorted(letters)))


def _longest_first(stems: Iterable[tuple[str, bool]]) -> str:
    return "|".join(sorted((_one(*stem) for stem in stems), key=len, reverse=True))


def _one(stem: str, may_inflect: bool) -> str:
    text = regex.escape(stem, literal_spaces=True).replace(" ", r"\s+")
    if may_inflect and len(stem) >= 4:
        if unicodedata.combining(stem[-1]) == _VIRAMA:  # it goes when a vowel follows
            text = text[:-1]
        text += f"{LETTER}{{0,6}}"
    return _PREFIX + text if _PREFIXED.match(stem) and len(stem) > 2 else text
