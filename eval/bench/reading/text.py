"""Text of answers without what carries no meaning: markup, invisible characters, forms of the same letter."""

import functools
import re
import unicodedata

import regex

# A longer response is read at its start and its end. Answers of the benchmark have at most some thousand characters.
LIMIT = 8_192
# Control characters, lone surrogates, direction marks, joiners, variation selectors, the tags of emoji.
_INVISIBLE = regex.compile(
    r"[\p{Cc}\p{Cs}\p{Cf}\ufe00-\ufe0f\u3164\U000e0000-\U000e0fff--[\t\n]]+", regex.V1
)
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Letters in negative circles and squares have no compatibility form in Unicode.
_ENCLOSED = {first + i: chr(ord("A") + i) for first in (0x1F150, 0x1F170) for i in range(26)}
# (signs that a text must have, pattern, replacement)
_MARKUP = (
    ("\\", re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|textit|rm|bf)\s*(?=\{)"), ""),
    ("\\", re.compile(r"\\boxed\s*(?=\{)"), "\n"),
    ("{", re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    ("\\", re.compile(r"\\[dt]?frac\{(\d{1,20})\}\{(\d{1,20})\}"), r"\1/\2"),
    ("\\", re.compile(r"\\[()\[\]]|\\(?:left|right|displaystyle|quad|qquad)\b|\\[,;:!> ]"), " "),
    ("\\", re.compile(r"\\([$%&#_{}])"), r"\1"),
    ("<", re.compile(r"</?[A-Za-z][A-Za-z0-9]{0,15}\s*/?>"), "\n"),
    ("*_`~", re.compile(r"[*_`~]{2,}|`|(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w)"), ""),
    ("#>-*•", re.compile(r"^[ \t]*(?:#{1,6}|>|[-*•])[ \t]+", re.MULTILINE), ""),
)  # fmt: skip
# Accents of Latin, Greek and Cyrillic letters, points and vowel signs of Hebrew and Arabic. Marks of Indic scripts are
# letters of their own and stay.
_ACCENTS = re.compile(
    "[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670\u0640]+"
)
# The same letter for a reader: dotless i, final sigma, Arabic and Persian forms, apostrophes.
_SAME = str.maketrans("−ıςىيکگةۀہھے’ʼʻ‘`", "-iσییكگههههی'''''")


def clean(response: object) -> str:
    """A response in compatibility form (NFKC), without markup, LaTeX and invisible characters."""
    text = shorten(response if isinstance(response, str) else str(response))
    if not text.isascii():
        text = text.translate(_ENCLOSED)
    text = _INVISIBLE.sub("", _LINE_END.sub("\n", text))
    text = shorten(unicodedata.normalize("NFKC", text))
    for signs, pattern, replacement in _MARKUP:
        if any(sign in text for sign in signs):
            text = pattern.sub(replacement, text)
    return text.strip()


def form(word: str) -> str:
    """A word of a table in the form that `clean` and `bare` give to answers."""
    return bare(unicodedata.normalize("NFKC", _INVISIBLE.sub("", word)))


def shorten(text: str, limit: int = LIMIT) -> str:
    """The start and the end of an endless text."""
    return text if len(text) <= limit else f"{text[: limit // 2]}\n{text[-limit // 2 :]}"


def bare(text: str) -> str:
    """`text` without accents; the case stays."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", text)))


def is_accent(character: str) -> bool:
    """Whether a character of a composed text has no place in the bare text."""
    return bool(_ACCENTS.fullmatch(character))


def lower(text: str) -> str:
    """A bare text in lower case, letter by letter. A Turkish I is an i with and without its dot."""
    low = text.lower()
    if len(low) != len(text):
        low = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return low.translate(_SAME)


@functools.lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """A short text for comparison: folded, with single spaces, without quotes and punctuation at its ends."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().replace("−", "-").split())
    return text.strip(" .,;:!?。．、，；：！？।۔؟\"'«»“”„‘’()[]「」『』《》…").strip()


_BOX = re.compile(r"\\boxed\s{0,3}\{|<(answer|final_answer|final)>", re.IGNORECASE)


def boxed(response: object) -> str | None:
    """What stands in the last `\\boxed{...}` or `<answer>...</answer>`, if the response has one."""
    text = shorten(response if isinstance(response, str) else str(response))
    if "boxed" not in text and "<" not in text:
        return None
    for match in [*_BOX.finditer(text)][:-4:-1]:
        if match.group(1):
            closing = f"</{match.group(1)}>"
            end = text.find(closing, match.end(), match.end() + 2000)
        else:
            end = _closing_brace(text, match.end())
        if end >= 0 and text[match.end() : end].strip():
            return text[match.end() : end]
    return None


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for place in range(start, min(len(text), start + 400)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return place
    return -1
