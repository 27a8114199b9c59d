"""Is a text in the language it should be in? By its script, and by fastText's identifier lid.176.

The identifier knows every language of PangeaIns but Igbo. If it does not know the language that a text should be in, or
hardly knows it, the text is wrong only if it is surely in another one.
"""

import functools

import regex

from pangea_jax import language_id, languages
from pangea_jax.curation.markup import Fault
from pangea_jax.language_id import Verdict

MIN_LETTERS = 20
"""Shorter texts are not judged; in Chinese and Japanese a letter counts for three."""

_SCRIPTS = {
    "Hans": r"\p{Han}",
    "Jpan": r"[\p{Han}\p{Hiragana}\p{Katakana}ー]",
    "Kore": r"[\p{Hangul}\p{Han}]",
}
_WEIGHTS = {"Hans": 3, "Jpan": 3, "Kore": 2}  # Latin letters that say as much as one of theirs
# Letters that a translation has for each one of its English source.
_LENGTHS = {"Hans": 0.35, "Jpan": 0.5, "Kore": 0.55, "Hebr": 0.8, "Arab": 0.85, "Ethi": 0.6}
_LENGTH_BOUNDS = (0.4, 2.5)
_SENTENCE_END = regex.compile(r"(?<=[.!?])\s+|(?<=[。！？।؟።])\s*|\n+")
_SURE, _SURE_OF_OTHERS, _ENGLISH_SURE = 0.35, 0.8, 0.7
_FOREIGN_SHARE = 0.2
_COPIED_SHARE = 0.5


def identify(text: str, k: int = 1) -> list[Verdict]:
    """The `k` likeliest languages of a text, without its line breaks and repeated spaces."""
    return language_id.identify(" ".join(text.split()), k)


@functools.cache
def script_pattern(code: str) -> regex.Pattern:
    """Matches a character of the script of a language."""
    script = languages.get(code).script
    return regex.compile(_SCRIPTS.get(script, rf"\p{{Script={script}}}"))


_LETTER = regex.compile(r"\p{L}")
_LATIN = regex.compile(r"\p{Script=Latn}")


def _letters(text: str) -> int:
    return len(_LETTER.findall(text))


def language_faults(prose: str, code: str) -> list[Fault]:
    """Whether a text is in another language, or partly in English.

    Args:
      prose: without code, formulas and marks.
      code: the language that it should be in.
    """
    language = languages.get(code)
    own = len(script_pattern(code).findall(prose)) * _WEIGHTS.get(language.script, 1)
    letters = own + len(_LETTER.findall(script_pattern(code).sub("", prose)))
    if letters < MIN_LETTERS:
        return []
    if own / letters < 0.5:
        return [Fault("wrong language", f"{own / letters:.0%} of it is {language.script}")]
    another = _another(prose, code, is_long=letters >= 3 * MIN_LETTERS)
    if another:
        return [Fault("wrong language", f"{another.label} {another.score:.2f}")]
    foreign = sum(_letters(s) for s in _SENTENCE_END.split(prose) if _is_foreign(s, code))
    if foreign / letters > _FOREIGN_SHARE:
        return [Fault("mixed language", f"{foreign / letters:.0%} of it is English")]
    return []


def _another(prose: str, code: str, *, is_long: bool) -> Verdict | None:
    """The language that a text is in instead, if the identifier is sure enough."""
    verdicts = identify(prose, 5)
    best = verdicts[0]
    # Some share a script and most of their words: being unsure between them is no fault.
    accepted = {code, *language_id.ALSO_CALLED.get(code, ())}
    if best.label in accepted:
        return None
    if code in language_id.HARDLY_KNOWN or language_id.LABELS.isdisjoint(accepted):
        kin = {best.label, *language_id.ALSO_CALLED.get(best.label, ())}
        best = Verdict(best.label, sum(score for label, score in verdicts if label in kin))
        return best if best.score >= _SURE_OF_OTHERS else None
    own = sum(score for label, score in verdicts if label in accepted)
    # Of long texts it is unsure only in languages that it hardly knows.
    return best if best.score >= max(_SURE, 3 * own) or (is_long and not own) else None


def _is_foreign(sentence: str, code: str) -> bool:
    """Whether a sentence of some length is English."""
    letters = _letters(sentence)
    if letters < 25 or code == "en":
        return False
    if languages.get(code).script != "Latn":
        return len(_LATIN.findall(sentence)) / letters > 0.7
    (verdict,) = identify(sentence)
    return verdict.label == "en" and verdict.score >= _ENGLISH_SURE


def copy_faults(source: str, target: str) -> list[Fault]:
    """Whether most of a text's groups of three words stand in its source: it was not translated."""
    ours, theirs = _words(source), _words(target)
    if len(theirs) < 4 or len(ours) < 4:
        return []
    groups = {tuple(ours[i : i + 3]) for i in range(len(ours) - 2)}
    copied = sum(tuple(theirs[i : i + 3]) in groups for i in range(len(theirs) - 2))
    share = copied / (len(theirs) - 2)
    return [Fault("not translated", f"{share:.0%} copied")] if share > _COPIED_SHARE else []


def _words(text: str) -> list[str]:
    # Numbers are the same in any language.
    return regex.findall(r"\p{L}[\p{L}\p{M}'’]*", text.lower())


def length_faults(source: str, target: str, code: str) -> list[Fault]:
    """Whether a translation is much longer or shorter than English usually becomes."""
    ours, theirs = _letters(source), _letters(target)
    expected = _LENGTHS.get(languages.get(code).script, 1.0)
    low, high = (bound * expected for bound in _LENGTH_BOUNDS)
    # A few words may well become many, or one.
    if theirs > high * ours + 40 or theirs < low * ours - 20:
        return [Fault("length out of proportion", f"{theirs} letters for {ours}")]
    return []
