"""Reads numbers in text of any language, with the digits of any script and any separator of thousands."""

import re
import unicodedata
from fractions import Fraction

# The decimal mark of the languages is a comma in CLDR (a point in all others), and a space groups digits.
COMMA = frozenset(
    "af bg br cs da de el es eu fi fr hr hu id it jv min nl no pl pt ro ru rw su sv tr uk vi".split()  # noqa: SIM905
)
SPACE = frozenset("af bg br cs de es fi fr hu no pl ru sv uk".split())  # noqa: SIM905
# Grouped digits come first, so that they are not read as several numbers. India groups by two digits, the last group by
# three. The number of digits has a limit, because Python refuses to read numbers with thousands of digits.
_GROUP = "[,.\u066c'’٬\u00a0\u202f]"
_NUMBER = re.compile(
    rf"(?<!\d)(?:(?<![A-Za-z])[-−])?(?:[1-9]\d{{0,2}}(?:{_GROUP}\d{{2,3}}){{0,9}}{_GROUP}\d{{3}}(?!\d)|\d{{1,40}})(?:[.,\u066b]\d{{1,40}})?"
)


def ascii_digits(text: str) -> str:
    """Decimal digits of all scripts as 0-9."""
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def find(text: str, *, space_groups: bool = False, language: str | None = None) -> list[Fraction]:
    """The numbers in `text`, in order, exact.

    A separator before exactly three final digits separates thousands (2,125 and 2.125 are both 2125), but for the point
    of a language whose decimal mark it is. Otherwise it is the decimal mark (18.00 is 18).

    Args:
      space_groups: whether a plain space also separates thousands (2 125), as in French or Russian.
      language: its decimal mark decides about 2.125.
    """
    text, matches = search(text, space_groups=space_groups)
    return [parse(match.group(), language) for match in matches]


def search(text: str, *, space_groups: bool = False) -> tuple[str, list[re.Match]]:
    """The text with the digits 0-9, and the places of the numbers that `find` reads."""
    text = ascii_digits(text)
    if space_groups:
        text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "\u00a0", text)
    return text, [*_NUMBER.finditer(text)]


def parse(number: str, language: str | None = None) -> Fraction:
    """The value of one number in the forms that `find` reads.

    Raises:
      ValueError: not a number.
    """
    number = ascii_digits(number.strip()).replace("−", "-")
    if not re.fullmatch(r"-?\d[\d.,\u066b\u066c'’\u00a0\u202f]*", number):
        raise ValueError(f"expected a number such as 2,125 or 18.5, got {number!r}")
    number = re.sub("['’\u066c\u00a0\u202f]", "", number)
    whole, mark, rest = _split_decimals(number, language)
    whole = re.sub("[.,\u066b]", "", whole)
    return Fraction(f"{whole}.{rest}" if mark else whole)


def _split_decimals(number: str, language: str | None) -> tuple[str, str, str]:
    marks = [(place, c) for place, c in enumerate(number) if c in ".,\u066b"]
    if not marks:
        return number, "", ""
    place, mark = marks[-1]
    rest = number[place + 1 :]
    kinds = {c for _, c in marks}
    grouped = len(rest) == 3 and number.lstrip("-")[0] != "0" and len(kinds) == 1 and mark in ".,"
    # Nobody writes 2.125 for 2125 where the point is the decimal mark. But answers in German or French do write 2,125
    # for 2125, after the English habit, far more often than a decimal with three digits.
    point = mark == "." and len(marks) == 1 and language is not None and language not in COMMA
    if (grouped and not point) or not rest or (len(marks) > 1 and len(kinds) == 1):
        return number, "", ""
    return number[:place], mark, rest
