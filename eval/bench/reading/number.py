"""Reads the number that an answer gives."""

import functools
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

import regex

from eval.bench.metrics import numbers
from eval.bench.reading import words
from eval.bench.reading.mentions import Answer, Mention, ends, groups, negated
from eval.bench.reading.text import boxed, clean, shorten

_SENTENCE = regex.compile(r"[!?。！？।॥။።؟\n]+|\.(?=\s|$)")
# Before compatibility forms are resolved: these spaces group digits, exponents are no digits, ½ is not 1 and 2.
_GROUPING = regex.compile(
    r"(?<=\p{Nd})(?:[\u00a0\u202f\u2009\u2007]|\\[,;! ]|\{,\})(?=\p{Nd}{3}(?!\p{Nd}))"
)
_EXPONENTS = dict.fromkeys(map(ord, "⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉"), " ")
_VULGAR_SIGN = regex.compile("[¼½¾⅐-⅞]")
_VULGAR = regex.compile(rf"(\p{{Nd}}{{0,9}})\s?({_VULGAR_SIGN.pattern})")
_SIGN = regex.compile(r"([-−])\s?(\p{Sc})\s?(?=\d)")
_FRACTION = regex.compile(r"(?<![\d/.,])(\d{1,9})\s?/\s?(\d{1,9})(?![\d/]|[.,]\d)")
_LARGE = {"万": 10**4, "萬": 10**4, "만": 10**4, "億": 10**8, "亿": 10**8, "억": 10**8}
_COMMA = regex.compile(r"[,،、，(（]")
_NUMERALS = regex.compile(r"[零〇一二两兩三四五六七八九十百千万萬億亿]+|[\u1369-\u137c]+|[௦-௲]+")
_CURRENCY = r"[\s\p{Sc}:：=*~≈\"'(\[]"


def number(response: str, language: str | None = None) -> Fraction | None:
    """The number that a response gives as its answer, exact; None without one.

    In this order: the box of a final answer; the number after the last word for "answer" (right after "is" or a colon,
    else the first if it follows closely, else the last of that sentence); the number before that word; the last number.
    Numbers that the answer negates ("not 18") do not count, and those that say what the answer is for ("15 for 2 days")
    only if there is no other.
    """
    if (inside := boxed(response)) is not None:
        found = _places(_prepare(inside), language)
        if found:
            return _of_equation(_prepare(inside), found)
    text = _prepare(response)
    if not text:
        return None
    answer = Answer(text, language)
    found = _places(answer.text, language)
    if not found:
        return _numerals(answer.text)
    mentions = {Mention(start, end, str(value), "number"): value for start, end, value in found}
    denied = negated(answer, groups(answer, [*mentions]))
    counted = [m for m in mentions if m not in denied] or [*mentions]
    chosen = _after_cue(answer, counted)
    return mentions[chosen or _last(answer, counted, 0, len(text))]


def _prepare(response: object) -> str:
    text = shorten(str(response)).replace("####", "\nAnswer: ")
    text = _GROUPING.sub("'", text.translate(_EXPONENTS))
    if _VULGAR_SIGN.search(text):
        text = _VULGAR.sub(_decimal, text, count=16)
    return _SIGN.sub(r"\2\1", numbers.ascii_digits(clean(text)))


def _decimal(match: regex.Match) -> str:
    part = Fraction(unicodedata.numeric(match.group(2))).limit_denominator(10)
    value = int(match.group(1) or 0) + part
    if value.denominator in (2, 4, 5, 8):
        return f" {float(value)}"
    return f" {value.numerator}/{value.denominator}"


def _places(text: str, language: str | None) -> list[tuple[int, int, Fraction]]:
    _, matches = numbers.search(text, space_groups=language in numbers.SPACE)
    matches = ends(matches)
    divided = {m.start(): m for m in ends([*_FRACTION.finditer(text)]) if int(m.group(2))}
    divisors = {m.start(2) for m in divided.values()}
    found = []
    for match in matches:
        if (whole := divided.get(match.start())) is not None:
            found.append((*whole.span(), Fraction(int(whole.group(1)), int(whole.group(2)))))
        elif match.start() not in divisors:
            found.append((*match.span(), numbers.parse(match.group(), language)))
    return [(start, end, value * _LARGE.get(text[end : end + 1], 1)) for start, end, value in found]


def _of_equation(text: str, found: Sequence[tuple[int, int, Fraction]]) -> Fraction:
    """The number after the last equals sign, else the first."""
    after = [value for start, _, value in found if start > text.rfind("=")]
    return after[0] if after else found[0][2]


@functools.cache
def _patterns(language: str | None) -> dict[str, regex.Pattern]:
    known = words.of(language)
    return {
        "is": regex.compile(rf"(?:{known.pattern('is')}|[:：=]){_CURRENCY}*$"),
        "for": regex.compile(rf"(?:{known.pattern('for')}){_CURRENCY}*$"),
        "word": regex.compile(rf"{words.LETTER}+"),
    }


def _after_cue(answer: Answer, mentions: Sequence[Mention]) -> Mention | None:
    """The number of the last sentence with a word for "answer" and a number."""
    skip = regex.compile(r"[^\S\n]*[:：፦፡=-]?\s*")
    for cue in reversed(ends(answer.all("answer"))):
        start = skip.match(answer.low, cue.end()).end()
        stop = _SENTENCE.search(answer.low, start)
        end = stop.start() if stop else len(answer.low)
        inside = [m for m in mentions if start <= m.start < end]
        if inside:
            return _chosen(answer, inside, start, end)
        begins = _begin(answer, max(0, cue.start() - 200), cue.start())
        before = [m for m in mentions if begins <= m.start and m.end <= cue.start()]
        if before:
            return before[-1]
    return None


def _begin(answer: Answer, start: int, end: int) -> int:
    """Where the last sentence before `end` begins, not before `start`."""
    return max((m.end() for m in _SENTENCE.finditer(answer.low, start, end)), default=start)


def _chosen(answer: Answer, inside: Sequence[Mention], start: int, end: int) -> Mention:
    patterns = _patterns(answer.words.language)
    equals = answer.low.rfind("=", start, end)
    if equals >= 0 and (after := [m for m in inside if m.start > equals]) and len(after) == 1:
        return after[0]
    if words.last_counts(answer.words.language):
        stop = _COMMA.search(answer.low, inside[0].end)
        clause = [m for m in inside if m.end <= (stop.start() if stop else end)]
        return clause[-1]
    for mention in inside:
        if patterns["is"].search(answer.low[max(start, mention.start - 24) : mention.start]):
            return mention
    first = inside[0]
    gap = answer.low[start : first.start]
    if len(patterns["word"].findall(gap)) <= 2 and not patterns["for"].search(gap):
        return first
    return _last(answer, inside, start, end)


def _last(answer: Answer, mentions: Sequence[Mention], start: int, end: int) -> Mention:
    """The last number, without those that say what the others are for."""
    patterns = _patterns(answer.words.language)
    last = mentions[-1]
    begins = _begin(answer, start, last.start)
    inside = [m for m in mentions if m.start >= begins]
    own = [
        m for m in inside if not patterns["for"].search(answer.low[max(0, m.start - 24) : m.start])
    ]
    return own[-1] if own else last


def _numerals(text: str) -> Fraction | None:
    """The last number in numerals without places, such as 十八 or ፲፰."""
    runs = _NUMERALS.findall(text)
    if not runs:
        return None
    total = part = digit = 0
    for character in runs[-1]:
        value = 2 if character in "两兩" else int(unicodedata.numeric(character))
        if value >= 10**4:
            total, part, digit = total + max(part + digit, 1) * value, 0, 0
        elif value in (100, 1000) or (value == 10 and not "\u1369" <= character <= "\u137c"):
            part, digit = part + max(digit, 1) * value, 0
        else:
            digit += value
    return Fraction(total + part + digit)
