"""Protects what a translation must not change, restores it afterwards, and compares the structure of both texts.

Before a translation, code, formulas, tags, addresses and coordinates become numbered marks such as `⟦1⟧`, which
models keep more reliably. Afterwards, options, numbers, tables and lists of both texts are compared. The rules are
the same for all languages, except that only English number words are read.
"""

import dataclasses
import itertools
import json
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

from pangea_jax.data.record import IMAGE_MARKER

# The order counts: a match hides everything inside it from the later kinds. All lengths are limited, since a model
# may write a hundred thousand openings without an end.
_KINDS = {
    "image marker": re.escape(IMAGE_MARKER),
    "code": r"```[\s\S]*?(?:```|\Z)|`[^`\n]+`",
    # Pandoc's rule to tell formulas from prices: no space just inside the dollars, no digit after them.
    "formula": r"\$\$[\s\S]{1,2000}?\$\$|\\\[[\s\S]{1,2000}?\\\]|\\\([\s\S]{1,2000}?\\\)"
    r"|\\begin\{(?P<environment>\w+\*?)\}[\s\S]{0,4000}?\\end\{(?P=environment)\}"
    r"|\$(?=\S)[^$\n]{0,2000}?(?<=\S)\$(?!\d)|\$ [^$\n]{1,200}? \$(?!\d)|\\[A-Za-z]+(?:\{[^{}\n]*\})+",
    "tag": r"<\|[^|<>\n]{1,40}\|>|<!--[\s\S]{0,4000}?-->"
    r"|</?[A-Za-z][\w-]{0,40}(?:\s+[\w:-]+=(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s<>\"']+))*\s*/?>",
    "address": r"(?:https?://|www\.)[^\s<>\"]*[^\s<>\".,;:!?)\]}'，。；：！？）】」。、]|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+",
    "coordinates": r"\[\s*-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?)+\s*\]",
    # The lines of a JSON object that is not in a code block.
    "data": r"(?m:^[ \t]*(?:[{}\[\]]+,?|\"[\w-]+\"[ \t]*:[ \t]*(?:[\"\d\[{-]|true|false|null).*)$)",
}
_PATTERN = re.compile("|".join(f"(?P<{k.replace(' ', '_')}>{v})" for k, v in _KINDS.items()))
_BRACKETS = ("⟦⟧", "⦃⦄", "⟪⟫", "⌊⌋")

# Cyrillic and Greek letters that look like Latin ones.
_FOREIGN_LETTERS = str.maketrans("АВСЕНІЈасеһіјΑΒΕΗΙ", "ABCEHIJacehijABEHI")
_LABEL = r"(?P<open>[(（\[]?)(?P<letter>[A-Ja-jＡ-Ｊａ-ｊАВСЕасеΑΒΕ])(?P<close>[.):：．）\]、])"
_OPTION_LINE = re.compile(rf"(?m)^[ \t]*(?:[-*•][ \t]+)?(?:\*\*)?{_LABEL}(?=\s|\*|⟦|\$|\S)")
_OPTION_INLINE = re.compile(r"(?<!\w)[(（](?P<letter>[A-Ja-jＡ-Ｊａ-ｊАВСЕасеΑΒΕ])[)）]")
_BARE_LETTER = re.compile(r"\s*[(\[]?[A-Ja-j][)\].:]?\s*")
_NUMBER = re.compile(r"\d+(?:[.,'’٬٫\u00a0\u202f]\d+)*")
_ENGLISH_UNITS = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_UNITS = _ENGLISH_UNITS | {
    **{"百": 1e2, "千": 1e3, "万": 1e4, "萬": 1e4, "亿": 1e8, "億": 1e8, "兆": 1e12},
    **{"백": 1e2, "천": 1e3, "만": 1e4, "억": 1e8, "조": 1e12},
    **{"लाख": 1e5, "करोड़": 1e7, "লাখ": 1e5, "কোটি": 1e7, "لاکھ": 1e5, "کروڑ": 1e7},
}
# (?a:) since without it "s" also matches "ſ", and "i" matches "İ".
_UNIT = re.compile(
    rf"\s?(?:(?a:{'|'.join(_ENGLISH_UNITS)})(?![a-z])|{'|'.join(u for u in _UNITS if not u.isascii())})",
    re.IGNORECASE,
)
_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
_WORDS = {name: str(n) for n, name in enumerate(_MONTHS, 1)} | {
    **{"ten": "10", "eleven": "11", "twelve": "12", "dozen": "12", "twenty": "20", "thirty": "30"},
    **{"forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80"},
    **{"ninety": "90", "hundred": "100", "thousand": "1000"},
}
_BULLET = re.compile(r"(?m)^[ \t]*(?:[-*•][ \t]+|\d+[.)]\s+)")
_HEADING = re.compile(r"(?m)^#{1,6}\s")
_SPEAKER = re.compile(r"(?mi)^\s*(?:user|assistant|human|gpt|system|ai)\s*[:：]")
_CONTROL = re.compile(r"<\|[^|<>\n]{1,40}\|>|\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\[/?INST\]")


class Fault(NamedTuple):
    """Something that a translation should not have.

    Attributes:
      reason: a short fixed phrase.
      detail: what was found.
    """

    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Protected:
    """A text whose untranslatable spans are numbered marks.

    Attributes:
      text: the text with the marks.
      spans: the texts that mark 1, 2, ... stand for.
      kinds: the kind of each span: code, formula, ...
      brackets: the two characters around a mark's number; they do not occur in the original text.
    """

    text: str
    spans: tuple[str, ...]
    kinds: tuple[str, ...]
    brackets: str

    def mark(self, number: int) -> str:
        return f"{self.brackets[0]}{number}{self.brackets[1]}"


def protect(text: str) -> Protected:
    """Replaces everything that must not be translated by marks.

    >>> protect("<image>\\nIs $x^2$ in `f(x)`?").text
    '⟦1⟧\\nIs ⟦2⟧ in ⟦3⟧?'

    Raises:
      ValueError: the text contains all brackets that a mark could have.
    """
    brackets = next((pair for pair in _BRACKETS if not set(pair) & set(text)), None)
    if brackets is None:
        raise ValueError(f"the text contains all of {' '.join(_BRACKETS)}")
    found = _spans(text)
    number = itertools.count(1)
    marked = _PATTERN.sub(lambda match: f"{brackets[0]}{next(number)}{brackets[1]}", text)
    return Protected(marked, tuple(s for _, s in found), tuple(k for k, _ in found), brackets)


def _spans(text: str) -> list[tuple[str, str]]:
    """(kind, span) of everything that must not be translated, in order."""
    return [
        (next(k for k in _KINDS if match[k.replace(" ", "_")] is not None), match[0])
        for match in _PATTERN.finditer(text)
    ]


def prose(text: str) -> str:
    """The text without what must not be translated."""
    return _PATTERN.sub(" ", text)


def restore(text: str, source: Protected) -> tuple[str, list[str], list[Fault]]:
    """Puts the spans back into a translation.

    Returns:
      the text, the repairs that were made, and the faults that could not be repaired.
    """
    text, repairs = _plain_marks(text, source)
    found = Counter(int(n) for n in re.findall(_mark_pattern(source), text))
    faults = []
    for number, (span, kind) in enumerate(zip(source.spans, source.kinds, strict=True), 1):
        if found[number] == 1:
            continue
        if found[number] > 1:
            faults.append(Fault(f"{kind} repeated", _cut(span)))
        elif kind == "image marker" and (moved := _at_border(text, source, number)):
            text = moved
            repairs.append("image marker put back")
        else:
            faults.append(Fault(f"{kind} lost", _cut(span)))
    rest = re.sub(_mark_pattern(source), "", text)
    unknown = [source.mark(number) for number in found if not 1 <= number <= len(source.spans)]
    # The original text has none of the brackets, so every bracket here belongs to a mark.
    if unknown or set(source.brackets) & set(rest):
        faults.append(Fault("mark invented", (unknown or ["half a mark"])[0]))

    def span_of(match: re.Match) -> str:
        number = int(match[1])
        return source.spans[number - 1] if 1 <= number <= len(source.spans) else match[0]

    return re.sub(_mark_pattern(source), span_of, text), repairs, faults


def _mark_pattern(source: Protected) -> str:
    return rf"{source.brackets[0]}(\d{{1,5}}){source.brackets[1]}"


def _plain_marks(text: str, source: Protected) -> tuple[str, list[str]]:
    """Corrects marks with other digits or with spaces inside."""
    opening, closing = source.brackets
    plain = re.sub(
        rf"{opening}\s*(\d{{1,5}})\s*{closing}",
        lambda match: f"{opening}{int(match[1])}{closing}",
        text,
    )
    return plain, ["mark respelled"] if plain != text else []


def _at_border(text: str, source: Protected, number: int) -> str:
    """Puts an image marker back if it was first or last in the source; empty if it was elsewhere."""
    mark = source.mark(number)
    if source.text.lstrip().startswith(mark):
        gap = re.match(r"\s*", source.text.lstrip()[len(mark) :])[0]
        return mark + gap + text.lstrip()
    if source.text.rstrip().endswith(mark):
        gap = re.search(r"\s*$", source.text.rstrip()[: -len(mark)])[0]
        return text.rstrip() + gap + mark
    return ""


def is_translatable(text: str) -> bool:
    """Whether there are words to translate: not in a number, a formula or the letter of an option.

    >>> [is_translatable(text) for text in ("2.89", "(B)", "$x$", "yes")]
    [False, False, False, True]
    """
    if _BARE_LETTER.fullmatch(text):
        return False
    return any(character.isalpha() for character in prose(text))


def labels(text: str) -> list[str]:
    """The letters of the options of a multiple-choice question, in order; empty if there are fewer than two.

    >>> labels("Which?\\nA. cat\\nB. dog"), labels("Is it (a) red or (b) blue?"), labels("A. Smith")
    (['A', 'B'], ['a', 'b'], [])
    """
    for pattern in (_OPTION_LINE, _OPTION_INLINE):
        found = [_latin(match["letter"]) for match in pattern.finditer(text)]
        if len(found) > 1 and found[0] in "Aa" and found[1] in "Bb":
            return found
    return []


def _latin(letter: str) -> str:
    return unicodedata.normalize("NFKC", letter).translate(_FOREIGN_LETTERS)


def repair_labels(source: str, target: str) -> tuple[str, bool]:
    """Writes the labels of options as in the source, if they are the same letters in other characters or brackets.

    For example, `Ａ．` becomes `A.`, and a Cyrillic `В)` becomes `B.`.

    Returns:
      the text, and whether it was changed.
    """
    for pattern in (_OPTION_LINE, _OPTION_INLINE):
        ours, theirs = list(pattern.finditer(source)), list(pattern.finditer(target))
        letters = [_latin(match["letter"]) for match in ours]
        if len(ours) < 2 or letters != [_latin(match["letter"]) for match in theirs]:
            continue
        names = ("open", "letter", "close") if pattern is _OPTION_LINE else ("letter",)
        pieces, end = [], 0
        for our, their in zip(ours, theirs, strict=True):
            pieces += [target[end : their.start(names[0])], *(our[name] for name in names)]
            end = their.end(names[-1])
            if our["letter"] and pattern is _OPTION_LINE and not target[end : end + 1].isspace():
                pieces.append(" " * source[our.end("close") : our.end("close") + 1].isspace())
        repaired = "".join(pieces) + target[end:]
        return repaired, repaired != target
    return target, False


def numbers(text: str) -> Counter[str]:
    """The numbers of a text in one spelling for all digits and separators.

    >>> sorted(numbers("1,234 of 3,5 in ٢٠٢٠")) == sorted(numbers("1.234 of 3.5 in 2020"))
    True
    """
    return Counter(number for match in _NUMBER.findall(text) for number in _values(match))


def _values(written: str) -> list[str]:
    """The numbers in a group of digits and separators.

    `1.234` and `1,234` are 1234, `1,5` and `1.5` are a fraction, and `1.5.2020` are three numbers.
    """
    ascii_digits = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in written)
    digits, separators = re.findall(r"\d+", ascii_digits), re.findall(r"\D", ascii_digits)
    *whole, last = digits
    # Groups have three digits; in India those above the thousands have two.
    grouped = [len(some) in (2, 3) for some in whole[1:]] + [len(last) == 3]
    if separators and all(grouped) and len(digits[0]) <= 3 and len(set(separators)) == 1:
        digits = ["".join(digits)]
    elif separators[-1:] in ([","], ["."], ["٫"]) and separators.count(separators[-1]) == 1:
        digits = ["".join(whole).lstrip("0").rjust(1, "0") + "." + last]
    return [number.lstrip("0") or "0" if "." not in number else number for number in digits]


def structural_faults(source: str, target: str) -> list[Fault]:
    """What a translated turn has lost, added or broken; the same rules for every language."""
    if not target.strip():
        return [Fault("empty turn")]
    faults = _span_faults(source, target)
    # The other checks see only the places of protected spans.
    ours, theirs = (_PATTERN.sub("⟦⟧", text) for text in (source, target))
    faults += _option_faults(ours, theirs)
    faults += _number_faults(ours, theirs)
    faults += _layout_faults(ours, theirs)
    for pattern, reason in ((_SPEAKER, "speaker label"), (_CONTROL, "control characters")):
        new = Counter(pattern.findall(target)) - Counter(pattern.findall(source))
        if new.total() and not (reason == "speaker label" and pattern.search(source)):
            faults.append(Fault(reason, repr(next(iter(new)))))
    if repetition(target) > repetition(source) + 0.4:
        faults.append(Fault("repetition", f"{repetition(target):.0%} of it repeats earlier text"))
    return faults


def _span_faults(source: str, target: str) -> list[Fault]:
    before, after = Counter(_spans(source)), Counter(_spans(target))
    lost = [Fault(f"{kind} lost", _cut(span)) for kind, span in before - after]
    return lost + [Fault(f"{kind} invented", _cut(span)) for kind, span in after - before]


def _option_faults(source: str, target: str) -> list[Fault]:
    ours, theirs = labels(source), labels(target)
    if ours != theirs:
        reason = "options missing" if len(theirs) < len(ours) else "options changed"
        return [Fault(reason, f"{' '.join(ours) or 'none'} became {' '.join(theirs) or 'none'}")]
    # An answer to a multiple-choice question begins with a label.
    answer = re.match(rf"\s*{_LABEL}", source)
    if answer and not ours:
        reply = re.match(rf"\s*{_LABEL}", target)
        if not reply or _latin(reply["letter"]) != _latin(answer["letter"]):
            return [Fault("answer's option changed", answer[0].strip())]
    return []


def _number_faults(source: str, target: str) -> list[Fault]:
    ours, theirs = numbers(source), numbers(target)
    lost, new = ours - theirs, theirs - ours
    if lost and new:
        _match_sizes(source, target, lost, new)
    lost -= Counter(number for number in lost if _roman(number) in target.split())
    new = Counter({number: n for number, n in new.items() if number not in _spelled_out(source)})
    sizes = dict(_sized(source))
    for number, size in _sized(target):
        our = sizes.get(number)
        # For example, 20 million became 20万: the same number with another unit.
        if our and our != size and our >= 1e6 * float(number) and size > float(number):
            return [Fault("numbers changed", f"{our:,.0f} became {size:,.0f}")]
    # A digit may become a word, or a word a digit, but a digit must not become another digit.
    if all(len(number) == 1 for number in (*lost, *new)) and not (lost and new):
        return []
    show = [" ".join(sorted(some.elements())) or "nothing" for some in (lost, new)]
    return [Fault("numbers changed", _cut(f"{show[0]} became {show[1]}"))]


def _match_sizes(source: str, target: str, lost: Counter[str], new: Counter[str]) -> None:
    """Removes numbers that are equal in other units, such as 1.5 million and 150万."""
    sizes = Counter(size for number, size in _sized(target) if number in new)
    for number, size in _sized(source):
        if lost[number] and sizes[size]:
            sizes[size] -= 1
            lost[number] -= 1
            new.subtract(Counter([n for n, s in _sized(target) if s == size and new[n] > 0][:1]))
    for counts in (lost, new):
        for number in [number for number, count in counts.items() if count <= 0]:
            del counts[number]


def _sized(text: str) -> list[tuple[str, float]]:
    """Each number, and its value together with the unit after it."""
    found = []
    for match in _NUMBER.finditer(text):
        unit = _UNIT.match(text, match.end())
        factor = _UNITS[unit[0].strip().lower()] if unit else 1.0
        found += [(number, round(float(number) * factor, 6)) for number in _values(match[0])]
    return found


def _roman(number: str) -> str:
    """A number up to 39 in Roman numerals, as of centuries and kings; otherwise empty."""
    if len(number) > 2 or not number.isdigit() or not 0 < int(number) < 40:
        return ""
    tens, ones = divmod(int(number), 10)
    return "X" * tens + ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")[ones]


def _spelled_out(text: str) -> set[str]:
    """The numbers that an English text has as words: months, hours after noon, dozens, hundreds."""
    words = re.findall(r"[a-z]+", text.lower())
    found = {_WORDS[word] for word in words if word in _WORDS}
    if "pm" in words or "p.m" in text.lower():
        found |= {str(hour + 12) for hour in range(1, 12) if str(hour) in numbers(text)}
    return found


def _layout_faults(source: str, target: str) -> list[Fault]:
    faults = []
    for reason, count in (
        ("table changed", _table),
        ("list changed", lambda text: len(_BULLET.findall(text))),
        ("headings changed", lambda text: len(_HEADING.findall(text))),
    ):
        before, after = count(source), count(target)
        if before != after:
            faults.append(Fault(reason, _cut(f"{before} became {after}")))
    if source.count("**") % 2 == 0 and target.count("**") % 2:
        faults.append(Fault("emphasis broken", "an odd number of **"))
    return faults


def _table(text: str) -> list[int]:
    """The number of cells of each row of the Markdown tables."""
    return [line.strip().count("|") - 1 for line in text.splitlines() if line.lstrip()[:1] == "|"]


def repetition(text: str) -> float:
    """The share of the runs of 12 characters that occur earlier in the text; 0 for short texts."""
    runs = len(text) - 11
    return 0.0 if runs < 100 else 1 - len({text[i : i + 12] for i in range(runs)}) / runs


def turns_of(text: str) -> tuple[list[str] | None, list[str]]:
    """Finds the list of texts in a reply, with or without words around it.

    Returns:
      the texts (None: no list of texts), and the repairs that were made.
    """
    begin, end = text.find("["), text.rfind("]")
    if begin < 0 or end < begin:
        return None, []
    inside, repairs = text[begin : end + 1], []
    if inside != text.strip():
        repairs.append("words around the reply removed")
    value = _json(inside)
    if value is None:
        # A backslash that begins no escape stands for itself; a comma before the end is removed.
        inside = re.sub(r'\\(?!["\\/bfnrtu])', r"\\\\", inside)
        value = _json(re.sub(r",\s*\]$", "]", inside))
        repairs.append("JSON repaired")
    if not isinstance(value, list):
        return None, []
    texts = [entry.get("text") if isinstance(entry, dict) else entry for entry in value]
    if not all(isinstance(entry, str) for entry in texts):
        return None, []
    return [whole_characters(text) for text in texts], repairs


def whole_characters(text: str) -> str:
    """Replaces half surrogate pairs by U+FFFD, which the checks find. JSON can hold such halves, UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _json(text: str):
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def keep_margins(source: str, target: str) -> str:
    """The target, with the white space of the source at both ends."""
    begin = source[: len(source) - len(source.lstrip())]
    return begin + target.strip() + source[len(source.rstrip()) :]


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
