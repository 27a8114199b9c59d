"""The letter of a multiple-choice answer by the paper's rules. `reading.letter` reads it properly."""

import difflib
import random
import re
from collections.abc import Sequence

from eval.bench.reading.mentions import LETTERS


def paper_letter(response: str, options: Sequence[str], *, seed: str) -> tuple[str, bool]:
    """The parser of CVQA and M3Exam in the paper's harness (neulab/Pangea, cvqa/utils.py and m3exam/utils.py).

    It keeps the faults of that parser. First it takes a letter before `)`, `.`, `:` or a space, anywhere and in either
    case. Then it takes the first a, b, c or d of any word, so "The answer is B" gives A. The text of an option counts
    only if there is no such letter. Otherwise the letter is random (the harness has no seed).

    Returns:
      the letter, and whether it was drawn.
    """
    response = response.strip()
    if match := re.search(r"\(?([A-D])[).:\s]", response, re.IGNORECASE):
        return match.group(1).upper(), False
    if match := re.search("[ABCD]", response, re.IGNORECASE):
        return match.group().upper(), False
    texts = [re.sub(r"^[A-D]\.\s*", "", option).strip() for option in options]
    ratios = [_ratio(response, text) for text in texts]
    if ratios and max(ratios) > 0.7:
        return LETTERS[ratios.index(max(ratios))], False
    return random.Random(seed).choice("ABCD"), True


def _ratio(first: str, second: str) -> float:
    """The ratio of difflib, or 0 if the lengths alone keep it at 0.7 or below, since it takes quadratic time."""
    matcher = difflib.SequenceMatcher(None, first, second)
    return matcher.ratio() if matcher.real_quick_ratio() > 0.7 else 0.0


def wrong_letter(answer: str, options: Sequence[str]) -> str | None:
    """The error in a gold letter, or None."""
    known = LETTERS[: len(options)]
    return None if answer in [*known] else f"answer {answer!r} is not one of the letters {known!r}"
