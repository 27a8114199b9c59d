"""Reads which option of a multiple-choice question an answer chooses."""

import itertools
from collections.abc import Iterable, Sequence

import regex

from eval.bench.reading.mentions import (
    LETTERS,
    MARK,
    Answer,
    Mention,
    ends,
    groups,
    letters,
    negated,
    texts,
)  # fmt: skip
from eval.bench.reading.text import boxed, clean, plain, shorten

# Stands for "several options" while reading; the reader gives None.
_SEVERAL = "several"
_CIRCLED = str.maketrans({chr(0x2460 + i): f"({i + 1})" for i in range(9)})
_LABEL = regex.compile(
    r"(?:(?<=^|\n|[:：;,、，]\s?)|(?<=[^\S\n]))[(（\[]?([A-J])\s?[.):：、．\]）][ \t]*(?=\S)"
)
_SENTENCE = regex.compile(r"[!?。！？।॥။።؟\n]+|(?<!(?<![^\W\d_])[^\W\d_])\.(?=\s|$)")
_DIGIT = regex.compile(r"\d(?![\p{Nd}\p{Latin}]|[.,]\d)")
_CLOSED_DIGIT = regex.compile(r"\d(?=\s?[)\]번])")
_NO_LETTER = r"[^\p{L}\p{M}\p{Nd}\p{S}#%&-]*"


def letter(response: str, options: Sequence[str], language: str | None = None) -> str | None:
    """The option that a response chooses; None if it names none or several.

    In this order: the box or tag of a final answer; a letter or the text of an option and nothing else; a letter after
    a word for "answer"; a letter at the start; a letter that the answer calls correct; the only letter, else the only
    option's text, that the answer names and does not negate. A repeated list of the options says nothing.

    Args:
      language: the language of the question; its words count and those of English. None: the words of all languages.
    """
    if (inside := boxed(response)) is not None:
        found = _read(inside, options, language)
        if found and found in LETTERS:
            return found
    found = _read(response, options, language)
    return None if found == _SEVERAL else found


def _read(response: str, options: Sequence[str], language: str | None) -> str | None:
    allowed = LETTERS[: len(options)]
    text = clean(str(response).translate(_CIRCLED))
    if not text:
        return None
    if language is None:  # the words of all languages take longer to look for
        text = shorten(text, 4000)
    answer = Answer(text, language)
    if found := _alone(answer, text, options, allowed):
        return found
    shortened, listed = _without_list(answer.text, len(options))
    if listed:
        answer = Answer(shortened, language)
    named = _mentions(answer, options, allowed)
    written = texts(answer, options)
    named = [
        m
        for m in named
        if not any(t.start <= m.start and m.end <= t.end and t.end - t.start > 1 for t in written)
        or m.kind == "bracket"
    ]
    grouped = groups(answer, named)
    # A negation belongs to the nearest option, whether it is named by its letter or by its text.
    denied = negated(answer, groups(answer, sorted([*named, *written], key=lambda m: m.start)))
    denied |= _one_option(answer, [*named, *written], denied)
    refused = {m.option for m in named if m in denied} - {
        m.option for m in named if m not in denied
    }
    chosen = [m for m in written if m not in denied and m.option not in refused]
    leading = _leading(answer, named, denied)
    cued, firm = _after_cue(answer, grouped, denied, chosen)
    if cued and (firm or not leading):
        return _inside(cued, allowed)
    if leading:
        return _inside(leading, allowed)
    if praised := _called_correct(answer, named, denied):
        return _inside(praised, allowed)
    for mentions in _by_strength(answer, [m for m in named if m not in denied], chosen):
        if found := _only(mentions):
            return _inside(found, allowed)
    return None


def _one_option(answer: Answer, mentions: Iterable[Mention], denied: set[Mention]) -> set[Mention]:
    """The other half of "A: cat", where one half is negated."""
    ordered = sorted(mentions, key=lambda m: m.start)
    halves = (
        pair
        for pair in itertools.pairwise(ordered)
        if pair[0].option == pair[1].option and pair[1].start - pair[0].end <= 4
    )
    return {half for pair in halves if not denied.isdisjoint(pair) for half in pair}


def _inside(option: str | None, allowed: str) -> str | None:
    return option if option and option in allowed else None


def _only(mentions: Iterable[Mention]) -> str | None:
    options = {m.option or "?" for m in mentions}
    return None if not options else options.pop() if len(options) == 1 else _SEVERAL


def _alone(answer: Answer, text: str, options: Sequence[str], allowed: str) -> str | None:
    """The reading of an answer that is a letter, or exactly the text of one option."""
    same = [
        k for k, option in zip(LETTERS, options) if plain(option) and plain(option) == plain(text)
    ]
    single = len(plain(text)) == 1 and text.strip(" .()").upper() in allowed
    if len(same) == 1 and not single:
        return same[0]
    if match := regex.fullmatch(rf"{_NO_LETTER}([A-Ja-j]){_NO_LETTER}", answer.text):
        return match.group(1).upper() if match.group(1).upper() in allowed else None
    own = "|".join(sorted(map(regex.escape, answer.native), key=len, reverse=True)) or "(?!)"
    if match := regex.fullmatch(rf"{_NO_LETTER}({own})번?{_NO_LETTER}", answer.text):
        return _inside(answer.native[match.group(1)], allowed)
    if match := regex.fullmatch(r"\s*(?:[(\[]\s*(\d)\s*[)\]]|(\d)\s*번)\W*", answer.text):
        return _numbered(match.group(1) or match.group(2), options)
    return None


def _numbered(digit: str, options: Sequence[str]) -> str | None:
    """The option with a number, unless the options have numbers themselves."""
    number = int(digit)
    if any(regex.search(r"\p{Nd}", option) for option in options) or not 0 < number <= len(options):
        return None
    return LETTERS[number - 1]


def _without_list(text: str, size: int) -> tuple[str, bool]:
    """The text without the first list of options A, B, C, ... that it repeats."""
    labels = list(itertools.islice(_LABEL.finditer(text), 200))
    for first, label in enumerate(labels):
        if label.group(1) != "A":
            continue
        run = [label]
        for other in labels[first + 1 :]:
            if len(run) < len(LETTERS) and other.group(1) == LETTERS[len(run)]:
                run.append(other)
        if len(run) >= max(2, min(3, size)):
            end = (
                regex.compile(r"\n|$|(?<=\p{L})[.。](?=\s+\p{Lu})")
                .search(text, run[-1].end())
                .start()
            )
            return f"{text[: label.start()]}\n{text[end:]}".strip(), True
    return text, False


def _mentions(answer: Answer, options: Sequence[str], allowed: str) -> list[Mention]:
    """Letters, and native letters and numbers in a place where only an option can stand."""
    found = letters(answer, allowed)
    taken = {m.start for m in found}
    nouns = [m.end() for m in answer.all("option")]
    turns = [m.end() for kind in ("not", "but") for m in answer.all(kind)]
    cues = [m.end() for m in answer.all("answer")]
    places = [0, *ends(nouns), *ends(cues), *(ends(turns) if answer.native else ())]
    for place in places:
        here = answer.patterns["skip"].match(answer.low, place).end()
        if match := answer.patterns["native_here"].match(answer.text, here):
            following = answer.text[match.end() : match.end() + 2]
            a_word = regex.match(r"[ \t]\p{Ll}", following) or (
                (match.group().islower() or not place) and regex.match(r"[ \t]\p{L}", following)
            )
            if match.start() not in taken and not a_word:
                option = answer.native[match.group()]
                found.append(
                    Mention(*match.span(), option if option in allowed else None, "native")
                )
                taken.add(match.start())
        elif match := (_DIGIT if place in nouns else _CLOSED_DIGIT).match(answer.text, here):
            if option := _numbered(match.group(), options):
                found.append(Mention(*match.span(), option, "native"))
    for match in ends([*answer.patterns["native"].finditer(answer.text)]):
        if match.start() not in taken:
            option = answer.native[match.group()]
            found.append(Mention(*match.span(), option if option in allowed else None, "native"))
            taken.add(match.start())
    for match in regex.finditer(r"[(\[「『\"']\s*([\p{L}\p{M}]{1,4})\s*[)\]」』\"']", answer.text):
        if match.group(1) in answer.native and match.start(1) not in taken:
            option = answer.native[match.group(1)]
            found.append(Mention(*match.span(1), option if option in allowed else None, "bracket"))
            taken.add(match.start(1))
    return sorted(found, key=lambda mention: mention.start)


def _leading(answer: Answer, named: Sequence[Mention], denied: set[Mention]) -> str | None:
    """The letter that starts the answer and stands apart from what follows."""
    starts = []
    lines = regex.finditer(r"(?:^|\n)[^\p{L}\p{M}\p{Nd}\n]*", answer.text)
    for line in itertools.islice(lines, 40):
        first = next((m for m in named if m.start == line.end()), None)
        if first and regex.match(rf"[ \t]*(?:{MARK}|\n|[-–—=→]|$)", answer.text[first.end :]):
            starts.append((line.start(), first))
    if not starts or starts[0][0] != 0 or starts[0][1] in denied:
        return None
    first = starts[0][1]
    if regex.match(r"\s*[,/、،，&]\s*[(\[]?[A-J](?!\p{L})", answer.text[first.end :]):
        return None
    return _only(m for _, m in starts)


def _after_cue(answer: Answer, grouped, denied, chosen) -> tuple[str | None, bool]:
    """The option named after the last word for "answer", and whether nothing else can be meant."""
    best: tuple[str | None, bool] = (None, False)
    for cue in ends(answer.all("answer")):
        start = regex.compile(r"[^\S\n]*[:：፦፡=-]?\s*").match(answer.low, cue.end()).end()
        stop = _SENTENCE.search(answer.low, start)
        end = stop.start() if stop else len(answer.low)
        group = next(
            (g for g in grouped if start <= g[0].start < end and not denied.issuperset(g)), None
        )
        written = [m for m in chosen if start <= m.start < end]
        if group is None:
            if found := _only(written):
                best = found, False
            continue
        gap = answer.low[start : group[0].start]
        backward = [
            g
            for g in grouped
            if 0 <= cue.start() - g[-1].end <= 40
            and not denied.issuperset(g)
            and not regex.search(r"[,;:，、.\n]", answer.low[g[-1].end : cue.start()])
        ]
        if backward and (len(gap) > 20 or regex.search(r"[,;，、]", gap)):
            continue
        if len(gap) > 60:
            continue
        found = _only(m for m in group if m not in denied)
        closed = regex.match(rf"\s*(?:{MARK}|$)|[^\p{{Latin}}\s]", answer.text[group[-1].end :])
        best = found, bool(closed) or ":" in answer.low[cue.end() : group[0].start]
    return best


def _called_correct(answer: Answer, named: Sequence[Mention], denied: set[Mention]) -> str | None:
    """The option of "B is correct" and "correct: B"."""
    found: list[Mention] = []
    left = [m for m in named if m not in denied]
    for match in ends(answer.all("good")):
        before = [m for m in left if 0 <= match.start() - m.end <= 40]
        before = [m for m in before if not _apart(answer, m.end, match.start())]
        after = [m for m in left if 0 <= m.start - match.end() <= 15]
        after = [m for m in after if not _apart(answer, match.end(), m.start)]
        if before:
            between = answer.low[before[0].end : before[-1].start]
            found += before if answer.patterns["linked"].search(between) else before[-1:]
        elif after:
            found.append(after[0])
    return _only(found)


def _apart(answer: Answer, start: int, end: int) -> bool:
    return bool(regex.search(r"[;.。!?\n]", answer.low[start:end]))


def _by_strength(answer: Answer, named: Sequence[Mention], chosen: Sequence[Mention]):
    """The mentions from the clearest to the least clear kind."""
    yield [m for m in named if m.kind == "bracket"]
    yield [
        m
        for m in named
        if m.kind != "lower" or (m.option or "A") not in "AEI" or _after_noun(answer, m)
    ]
    yield chosen


def _after_noun(answer: Answer, mention: Mention) -> bool:
    """Whether a letter stands right after "option" or "answer"."""
    before = answer.low[max(0, mention.start - 30) : mention.start].rstrip(" :：")
    nouns = answer.patterns["option"].finditer(before), answer.patterns["answer"].finditer(before)
    return any(m.end() == len(before) for found in nouns for m in found)
