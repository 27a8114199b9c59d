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

    It looks at the first letter before anything else, in groups, which makes it many times as fast.
    """
    stems = {
        (lower(form(word.rstrip("$").replace("_", " "))), word.endswith("$")) for word in words
    }
    latin = [s for s in stems if s[0][0] < "\u0370"]
    attached = [s for s in stems if _ATTACHED.match(s[0])]
    prefixed = [s for s in stems if _PREFIXED.match(s[0])]
    others = stems.difference(latin, attached, prefixed)
    sides = [_side(latin), _side(others), _side(prefixed), _side(attached, apart=False)]
    return f"(?:{'|'.join(side for side in sides if side)})" if any(sides) else "(?!)"


def _side(stems: Iterable[tuple[str, bool]], *, apart: bool = True) -> str:
    """A pattern for words of one kind of script; with `apart`, no letter touches them."""
    by_first: dict[str, list[str]] = {}
    prefixed = False
    for stem, fixed in stems:
        pattern = _one(stem, may_inflect=apart and not fixed)
        if _PREFIXED.match(stem) and len(stem) > 2:
            prefixed, first = True, ""
            pattern = _PREFIX + pattern
        else:
            first = regex.escape(stem[0])
            pattern = pattern[len(first) :]
        by_first.setdefault(first, []).append(pattern)
    if not by_first:
        return ""
    firsts = [*map(regex.escape, _PREFIX_LETTERS)] if prefixed else []
    firsts += [regex.escape(stem[0]) for stem, _ in stems]
    choices = "|".join(
        f"{first}(?:{'|'.join(sorted(rest, key=len, reverse=True))})"
        for first, rest in sorted(by_first.items())
    )
    look = f"(?=[{''.join(sorted(set(firsts)))}])"
    return f"{look}(?<!{LETTER})(?:{choices})(?!{LETTER})" if apart else f"{look}(?:{choices})"


def _one(stem: str, *, may_inflect: bool) -> str:
    text = regex.escape(stem, literal_spaces=True).replace(" ", r"\s+")
    if may_inflect and len(stem) >= 4:
        if unicodedata.combining(stem[-1]) == _VIRAMA:  # it goes when a vowel follows
            text = text[:-1]
        text += f"{LETTER}{{0,6}}"
    return text
