"""The answer parser of MMMU, by its official rules. xMMMU uses it too."""

import random
import re
from collections.abc import Mapping, Sequence

_ANSWER_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def parse_multiple_choice(
    response: str, letters: Sequence[str], options: Mapping[str, str], *, seed: str | None
) -> str | None:
    """The last letter that a response names, by the first rule that finds one (neulab/Pangea, xmmmu/utils.py).

    The rules are a letter in brackets, before a space ("USA is" names A), before a full stop, and an option's text.

    Args:
      letters: the letters of the options.
      options: letter -> text of the option.
      seed: the seed of the random letter for an unreadable response; with None the function returns None instead.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    # (pattern that names a letter, pattern to find the last named letter)
    rules = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
    found = (([c for c in letters if mark.format(c) in response], last) for mark, last in rules)
    named, pattern = next(filter(lambda rule: rule[0], found), ([], ""))
    if not named and len(response.split()) > 5:
        named = [key for key, text in options.items() if text.lower() in response.lower()]
        pattern = ""
    if not named:
        return random.Random(seed).choice(list(letters)) if seed is not None else None
    if len(named) == 1:
        return named[0]
    if pattern:
        places = [response.rfind(pattern.format(letter)) for letter in named]
    else:
        places = [response.lower().rfind(options[letter].lower()) for letter in named]
    return named[places.index(max(places))]


def parse_open(response: str) -> list[str | float]:
    """Candidate answers to an open question: key parts of the response and all numbers in them, normalised."""
    parts = _key_parts(response)
    candidates = parts.copy()
    for part in parts:
        candidates += extract_numbers(part)
    normalised = [value for candidate in candidates for value in normalize(candidate)]
    return list(dict.fromkeys(normalised))


def _key_parts(response: str) -> list[str]:
    response = response.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", response)
    parts = []
    for index, sentence in enumerate(sentences):
        # The last sentence may be an equation. Its result is the answer.
        cues = (*_ANSWER_CUES, "=") if index == len(sentences) - 1 else _ANSWER_CUES
        tails = [sentence.split(cue)[-1].strip() for cue in cues if cue in sentence]
        shortest = ""
        for tail in tails:  # any later tail replaces an empty one
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            parts.append(shortest)
    return parts or [response]


def extract_numbers(text: str) -> list[str]:
    """Numbers with thousands commas, in scientific notation, and plain ones, in this order."""
    with_commas = re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text)
    # Without the look behind, each digit of an endless number would begin a search through the rest.
    scientific = re.findall(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+", text)
    plain = re.findall(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])", text)
    return with_commas + scientific + plain


def normalize(text: str) -> list[str | float]:
    """A number rounded to two decimals, or text in lower case; a single letter gets a space before or after it."""
    text = str(text).strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_is_correct(gold: Sequence[str] | str, candidates: Sequence[str | float]) -> bool:
    """Whether a candidate contains a gold text or equals a gold number."""
    answers = [gold] if isinstance(gold, str) else gold
    golds = [value for answer in answers for value in normalize(answer)]
    for candidate in candidates:
        if isinstance(candidate, str):
            if any(isinstance(g, str) and g in candidate for g in golds):
                return True
        elif candidate in golds:
            return True
    return False
