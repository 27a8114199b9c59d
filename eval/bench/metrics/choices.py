"""Reads the letter of a multiple-choice answer, by the paper's rules and by correct ones."""

import difflib
import random
import re
import unicodedata
from collections.abc import Sequence

import regex

LETTERS = "ABCDEFGHIJ"
# Option letters of other scripts, accepted if a letter stands alone or after a cue.
_NATIVE = {
    **dict(zip("أبجد", "ABCD", strict=True)),
    **dict(zip("কখগঘ", "ABCD", strict=True)),
    **dict(zip("กขคง", "ABCD", strict=True)),
    **dict(zip("АБВГ", "ABCD", strict=True)),
    "ا": "A",
}
_CUE_WORDS = (  # as NFKC writes them
    "answer|option|choice|答案|答|选项|選項|正解|答え|回答|정답|답|คำตอบ|ข้อ|đáp án|câu trả lời|respuesta|opción|"
    "resposta|responder|alternativa|opção|risposta|opzione|réponse|antwort|antwoord|jawaban|pilihan|jibu|chaguo|idahun|"
    "ответ|вариант|उत्तर|विकल्प|উত্তর|الإجابة|الجواب|جواب|பதில்|సమాధానం"
)
_CUE = regex.compile(
    rf"(?:{unicodedata.normalize('NFKC', _CUE_WORDS)})"
    r"[^\w()]{0,9}(?:is|are|es|è|é|est|ist|是|为|は|là|คือ|adalah|ni|है|هي|هو|lautet|:){0,3}[\s:*\"'(\[]{0,9}"
    # "the answer is a dog" names no letter
    r"((?-i:A(?!\s+[a-z])|[B-J])|[أبجدا]|[কখগঘ]|[กขคง])(?![\p{L}\p{M}'’])",
    regex.IGNORECASE,
)
_ALONE = re.compile(r"[\W_]*([A-J]|[أبجدا]|[কখগঘ]|[กขคง]|[АБВГ])[\W_]*", re.IGNORECASE)
_BRACKETED = re.compile(r"[(（\[]\s*([A-J])\s*[)）\]]")
_LEADING = re.compile(r"\**\s*([A-J])\s*[).:：、．,\]）*\n-]")
_STANDING = re.compile(r"(?<![^\W_])([B-J])(?![^\W_]|['’])")


def letter(response: str, options: Sequence[str]) -> str | None:
    """The option that a response chooses; None if it names none or several.

    The rules in their order: a letter and nothing else; the last letter after a cue ("the answer is", "答案："); a
    letter at the start; one letter in brackets; the text of exactly one option; one capital letter that stands alone.
    """
    text = unicodedata.normalize("NFKC", response).strip()
    allowed = LETTERS[: len(options)]
    if match := _ALONE.fullmatch(text):
        return _latin(match.group(1), allowed)
    if cued := _CUE.findall(text):
        return _latin(cued[-1], allowed)
    if match := _LEADING.match(text):
        # A response that repeats the list of options does not choose any of them.
        leading = {_LEADING.match(line) for line in text.splitlines()} - {None}
        chosen = {found.group(1) for found in leading}
        return _latin(match.group(1), allowed) if len(chosen) == 1 else None
    for pattern in (_BRACKETED, None, _STANDING):
        found = set(pattern.findall(text)) if pattern else _named_options(text, options)
        if len(found) == 1:
            return _latin(found.pop(), allowed)
    return None


def _latin(character: str, allowed: str) -> str | None:
    character = _NATIVE.get(character, character).upper()
    return character if character in allowed else None


def _named_options(text: str, options: Sequence[str]) -> set[str]:
    """Letters of the options that equal the response, else of those that it contains as whole words."""
    text = _plain(text)
    plain = {LETTERS[i]: _plain(option) for i, option in enumerate(options)}
    same = {key for key, option in plain.items() if option and option == text}
    if same:
        return same
    spaceless = any(unicodedata.category(c) == "Lo" for c in text)
    found = {
        key
        for key, option in plain.items()
        if option and (option in text if spaceless else f" {option} " in f" {text} ")
    }
    # An option does not count if a longer option that contains it is named too ("red" in "dark red").
    return {k for k in found if not any(k != o and plain[k] in plain[o] for o in found)}


def _plain(text: str) -> str:
    """Words in lower case; all other characters than letters, marks and numbers become spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join("".join(kept).split())


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
