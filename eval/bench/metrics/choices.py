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
    ratios = [difflib.SequenceMatcher(None, response, text).ratio() for text in texts]
    if ratios and max(ratios) > 0.7:
        return LETTERS[ratios.index(max(ratios))], False
    return random.Random(seed).choice("ABCD"), True


def wrong_letter(answer: str, options: Sequence[str]) -> str | None:
    """The error in a gold letter, or None."""
    known = LETTERS[: len(options)]
    return None if answer in [*known] else f"answer {answer!r} is not one of the letters {known!r}"
