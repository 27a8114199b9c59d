"""Reads whether an answer says that a statement is true."""

import functools

import regex

from eval.bench.reading import words
from eval.bench.reading.mentions import MARK, Answer, letters
from eval.bench.reading.text import boxed, clean

# A value stands at the start or at the end of a long answer.
_ENDS = 1000
_CLAUSE = regex.compile(
    r"[.,;:!?\n()\[\]\"“”«»。！？，、；：।॥။၊።፣؟،؛…—–]+|\s-\s"
    r"|(?<=[\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}])\s+"
)
_SENTENCE = regex.compile(r"[.;!?\n。！？；।॥။።؟؛]+")
_OPTIONS = regex.compile(
    r"[(\[]?a[)\].:]\s{0,3}false\W{1,6}(?:or\W{1,3})?[(\[]?b[)\].:]\s{0,3}true\b[)\]]?"
)


def truth(response: str, language: str | None = None) -> str | None:
    """`true`, `false` or None, from the option's letter ((a) false, (b) true) or from words.

    A negation turns a word round ("not true" is false). An answer that says both is read by the sentence after the word
    for "answer", or by a first sentence that says nothing else; otherwise it is not answered.
    """
    if (inside := boxed(response)) is not None and (found := _read(inside, language)):
        return found
    return _read(response, language)


def _read(response: str, language: str | None) -> str | None:
    text = clean(response)
    if not text:
        return None
    if len(text) > 2 * _ENDS:
        text = f"{text[:_ENDS]}\n{text[-_ENDS:]}"
    answer = Answer(text, language)
    low = answer.low
    stripped = _patterns(language)["both"].sub(" ", _OPTIONS.sub(" ", low))
    if stripped != low:  # both values are there to choose from
        return _verdict(stripped, language)
    lettered, said = _letter(answer), _verdict(low, language)
    if lettered is None:
        return said
    return lettered if said in (None, lettered) else None


def _letter(answer: Answer) -> str | None:
    """The value of the option's letter, where it can only be that: alone, in brackets, leading, after a noun."""
    found = set()
    for m in letters(answer, "AB"):
        before = answer.low[max(0, m.start - 40) : m.start].rstrip()
        after = answer.text[m.end :]
        starts = not regex.search(r"[\p{L}\p{Nd}]", answer.low[: m.start])
        marked = bool(regex.match(rf"\s*(?:{MARK}|$)|\n", after))
        if m.kind == "bracket" or (starts and marked) or (marked and _cued(answer, before)):
            found.add(m.option)
    if len(found) != 1:
        return None
    return {"A": "false", "B": "true"}.get(found.pop() or "")


def _cued(answer: Answer, before: str) -> bool:
    before = before.rstrip(" :：-")
    for kind in ("is", "option", "answer"):
        for match in answer.patterns[kind].finditer(before):
            if match.end() == len(before):
                return True
    return False


@functools.cache
def _patterns(language: str | None) -> dict[str, regex.Pattern]:
    known = words.of(language)
    wrong, right = known.pattern("wrong"), known.pattern("right")
    yes, no = known.pattern("yes"), known.pattern("no")
    value = f"(?:{known.pattern('right', 'wrong', 'yes', 'no')})"
    link = rf"(?:\s*/\s*|\W{{0,3}}(?:{known.pattern('link')}|{known.pattern('not')})\W{{0,3}}|\s+m[iıuü]\s+)"
    return {
        "value": regex.compile(f"(?P<wrong>{wrong})|(?P<right>{right})"),
        "both": regex.compile(
            rf"(?:{right}|{yes})\W{{0,3}}(?:/|{known.pattern('link')})\W{{0,3}}(?:{wrong}|{no})"
            rf"|(?:{wrong}|(?!{known.pattern('not')}){no})\W{{0,3}}(?:/|{known.pattern('link')})\W{{0,3}}(?:{right}|{yes})"
        ),
        "yes": regex.compile(rf"\s*(?:{yes})\s*"),
        "no": regex.compile(rf"\s*(?:{no})\s*"),
        "starts": regex.compile(rf"\s*(?:(?P<no>{no})|(?P<yes>{yes}))(?!\p{{L}})"),
        "not": regex.compile(known.pattern("not")),
        "unsure": regex.compile(known.pattern("unsure")),
        "answer": regex.compile(known.pattern("answer")),
        "any": regex.compile(value),
        "link": regex.compile(link),
        "word": regex.compile(rf"{words.LETTER}+"),
    }


def _verdict(low: str, language: str | None) -> str | None:
    patterns = _patterns(language)
    sentences = [s for s in _SENTENCE.split(low) if s.strip()]
    found = [
        (sentence, _values(sentence, patterns, words.of(language))) for sentence in sentences[:200]
    ]
    values = set().union(*(v for _, v in found)) if found else set()
    if len(values) == 1:
        return values.pop()
    if not values:
        return None
    for sentence, own in reversed(found):
        if len(own) == 1 and patterns["answer"].search(sentence):
            return next(iter(own))
    first, own = next((s, v) for s, v in found if v)
    alone = len(patterns["word"].findall(patterns["any"].sub(" ", first))) <= 2
    later = [v for s, v in found[1:] if len(patterns["word"].findall(s)) <= 2]
    if first == found[0][0] and len(own) == 1 and alone and all(v <= own for v in later):
        return next(iter(own))
    return None


def _values(sentence: str, patterns: dict[str, regex.Pattern], known: words.Words) -> set[str]:
    """The truth values that a sentence states."""
    found = set()
    clauses = _CLAUSE.split(sentence)
    for index, clause in enumerate(clauses[:100]):
        if not clause.strip():
            continue
        if patterns["no"].fullmatch(clause):
            found.add("false")
        elif patterns["yes"].fullmatch(clause):
            found.add("true")
        elif patterns["unsure"].search(clause):
            break
        else:
            stated = _stated(clause, patterns, known)
            if not stated and index == 0 and (start := patterns["starts"].match(clause)):
                rest = clause[start.end() :]
                negation = patterns["not"].fullmatch(start.group().strip())
                if not negation and len(rest.split()) <= 6:
                    stated = {"true" if start.group("yes") else "false"}
            found |= stated
    return found


def _stated(clause: str, patterns: dict[str, regex.Pattern], known: words.Words) -> set[str]:
    """The values of the words for true and false in a clause, with their negations."""
    values = [*patterns["value"].finditer(clause)][:20]
    taken = {place for v in values for place in range(*v.span())}
    negations = [m for m in patterns["not"].finditer(clause) if m.start() not in taken][:40]
    found = set()
    for index, value in enumerate(values):
        previous = values[index - 1].end() if index else 0
        following = values[index + 1].start() if index + 1 < len(values) else len(clause)
        before = [m for m in negations if previous <= m.start() < value.start()]
        after = [m for m in negations if value.end() <= m.start() and m.end() <= following]
        count = bool(before) and _words(clause[before[-1].end() : value.start()], patterns) <= 4
        count += bool(after) and _words(
            clause[value.end() : after[0].start()], patterns
        ) <= known.negation_follows(after[0].group())
        right = value.group("right") is not None
        found.add("true" if right == (not count) else "false")
    return found


def _words(text: str, patterns: dict[str, regex.Pattern]) -> int:
    return len(patterns["word"].findall(text))
