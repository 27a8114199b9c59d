"""Where an answer names options, and which of them it negates."""

import bisect
import dataclasses
import functools
import unicodedata
from collections.abc import Sequence

import regex

from eval.bench.reading import words
from eval.bench.reading.text import bare, form, lower, plain

LETTERS = "ABCDEFGHIJ"
_MOST = 12
_REACH = 45
# The letters of options in exams, by language: first the usual series, then others in use, then names of A, B, C, D.
_CYRILLIC = ("АБВГДЕЖЗИК",)
_ARABIC = ("ابجده", "ابتثج")
NATIVE: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "am": ("ሀለሐመሠ",),
    "ar": _ARABIC[:1],
    "bg": _CYRILLIC,
    "bn": ("কখগঘঙ", ("এ", "বি", "সি", "ডি")),
    "el": ("ΑΒΓΔΕ",),
    "fa": (*_ARABIC[:1], ("الف",)),
    "he": ("אבגדה",),
    "hi": ("कखगघङ", "अबसद", ("ए", "बी", "सी", "डी")),
    "ja": ("アイウエオ", "イロハニホ", "あいうえお", "甲乙丙丁戊"),
    "ko": ("가나다라마", "ㄱㄴㄷㄹㅁ"),
    "mn": ("АБВГД",),
    "my": ("ကခဂဃင",),
    "ru": _CYRILLIC,
    "si": ("අආඇඈ", "කඛගඝ", ("ඒ", "බී", "සී", "ඩී")),
    "ta": ("அஆஇஈஉ", ("ஏ", "பி", "சி", "டி")),
    "te": ("అఆఇఈఉ", "కఖగఘ", ("ఎ", "బి", "సి", "డి")),
    "th": ("กขคงจ",),
    "uk": ("АБВГД",),
    "ur": (*_ARABIC[:1], ("الف",)),
    "zh": ("甲乙丙丁戊",),
}
_HANGING = frozenset(
    {"tr", "fi", "hu", "sv", "no", "da", "de", "nl", "af", "ru", "uk", "bg", "quz", "mn"}
)
# What may follow a letter of a script that attaches words, up to the end of its word.
_ENDINGS = (
    "입니다|이에요|예요|이다|다|번|가|이|을|를|은|는|が|は|です|だ|である|を|の|で|に|ครับ|ค่ะ|คะ"
)
# Between a noun and the letter or number of the option: topic markers, articles, "the number", Persian's vowel.
_PARTICLES = r"เป็น|ที่|은|는|이|가|は|が|の|ی|ه|\b(?:no|nr|n°|το|η|ο)\b"
# Words of one letter in languages of the benchmark: articles, prepositions, pronouns, conjunctions.
_LETTER_WORDS = "AEI"
MARK = r"[.):：、،,;\]｝}】」』>»”\"'!?؟。!．]"


@dataclasses.dataclass(frozen=True)
class Mention:
    """A place that names an option. `option` is None if the question has no such option."""

    start: int
    end: int
    option: str | None
    kind: str  # "bracket", "letter", "lower", "native" or "text"


class Answer:
    """A cleaned answer: `text` without accents, `low` in lower case, of the same length."""

    def __init__(self, text: str, language: str | None):
        self.text = bare(text)
        self.low = lower(self.text)
        # With accents, where the places stay the same: È is no E.
        composed = unicodedata.normalize("NFC", text)
        self.accented = composed if len(composed) == len(self.text) else self.text
        self.words = words.of(language)
        self.native = native(language)
        self.patterns = patterns(language)
        self._found: dict[str, list[regex.Match]] = {}
        self.hanging = language in _HANGING

    def all(self, kind: str) -> list[regex.Match]:
        """The matches of a pattern in the answer, looked for once."""
        if kind not in self._found:
            self._found[kind] = [*self.patterns[kind].finditer(self.low)]
        return self._found[kind]


@functools.cache
def native(language: str | None) -> dict[str, str]:
    """Native letter -> Latin letter."""
    found: dict[str, str] = {}
    known = NATIVE.values() if language is None else [NATIVE.get(language, ())]
    for series in (s for rows in known for s in rows):
        for letter, own in zip(LETTERS, series):
            found.setdefault(form(own), letter)
            found.setdefault(lower(form(own)), letter)
    return found


@functools.cache
def patterns(language: str | None) -> dict[str, regex.Pattern]:
    """The patterns over an answer in a language."""
    own = native(language)
    letter = words.LETTER
    natives = "|".join(sorted(map(regex.escape, own), key=len, reverse=True)) or "(?!)"
    word = words.of(language).pattern
    # "B'dir", "B-vaihtoehto": some languages hang endings and nouns on a letter.
    apostrophe = "" if language in _HANGING else r"|['’]\p{L}"
    hyphen = "" if language in _HANGING else r"|-\p{L}"
    return {
        # A Latin letter stands alone if no Latin letter or digit touches it; letters of other scripts may.
        "latin": regex.compile(
            r"(?<![\p{Latin}\p{M}\p{Nd}_'’@/&+−-])(?<!\p{L}\.)[A-Ja-j]"
            rf"(?![\p{{Latin}}\p{{M}}\p{{Nd}}_@&+#°%]{apostrophe}{hyphen}|\.\p{{L}}|/\p{{L}}{{2}})"
        ),
        "slashed": regex.compile(r"(?<=[A-Ja-j]\s?[/&+]\s?)[A-Ja-j](?![\p{L}\p{M}\p{Nd}_'’+#-])"),
        # A capital that no sentence begins with and no word follows.
        "native": regex.compile(
            rf"(?<=[^\s\p{{P}}]\s)(?:{natives})(?<=\p{{Lu}})(?=\s*(?:{MARK}|$|\n))"
        ),
        "native_here": regex.compile(
            rf"(?:{natives})(?=(?:{_ENDINGS})*(?:[^\p{{L}}\p{{M}}\p{{Nd}}]|$))"
        ),
        "answer": regex.compile(word("answer")),
        "option": regex.compile(word("option")),
        "right": regex.compile(word("right")),
        "good": regex.compile(word("right", "answer")),
        "is": regex.compile(word("is")),
        "not": regex.compile(word("not")),
        "wrong": regex.compile(word("wrong")),
        "nor": regex.compile(word("nor")),
        "but": regex.compile(word("but")),
        "link": regex.compile(rf"[\s()\[\]\"'*]*(?:[,、،/&+;]|{word('link')})?[\s()\[\]\"'*]*"
                              rf"(?:{word('link')})?[\s()\[\]\"'*]*(?:{word('option')}\s*)?[\s()\[\]\"'*]*"),
        "linked": regex.compile(rf"[/&+]|{word('link')}"),
        "says": regex.compile(word("not", "because")),
        "skip": regex.compile(rf"(?:[\s:：፦፡\"'(\[*—–-]|{word('is')}|{word('right')}|{_PARTICLES})*"),
        "word": regex.compile(rf"{letter}+"),
    }  # fmt: skip


def letters(answer: Answer, allowed: str) -> list[Mention]:
    """The letters that stand alone, in order."""
    text, found = answer.text, []
    single = [
        *answer.patterns["latin"].finditer(answer.accented),
        *answer.patterns["slashed"].finditer(text),
    ]
    for match in ends(single):
        start, end = match.span()
        before, after = text[:start].rstrip()[-1:], text[end:].lstrip()[:1]
        bracketed = (
            bool(before)
            and before in "([{（【「『<“\"'‘"
            and bool(after)
            and after in ")]}）】」』>”\"'’"
        )
        if after in ("'", "’") and not bracketed and not answer.hanging:
            continue  # "E' la C"
        capital = match.group().isupper()
        if not bracketed and _is_word(answer, start, end):
            continue
        kind = "bracket" if bracketed else "letter" if capital else "lower"
        option = match.group().upper()
        if option in allowed:
            found.append(Mention(start, end, option, kind))
        elif bracketed or capital:
            found.append(Mention(start, end, None, kind))
    return found


def ends(found: Sequence) -> Sequence:
    """The first and the last of many places: an answer that names options hundreds of times says nothing between."""
    return found if len(found) <= 2 * _MOST else [*found[:_MOST], *found[-_MOST:]]


def _is_word(answer: Answer, start: int, end: int) -> bool:
    """Whether a letter is a word of the sentence, such as the article of "A man" and the last word of "plan B"."""
    text = answer.text
    if text[start].upper() not in _LETTER_WORDS:
        return False
    following = regex.match(r"[ \t]+([\p{Latin}\p{M}'’]+)", text[end : end + 40])
    if not following:
        return False
    after = lower(following.group(1))
    if len(following.group(1)) == 1 and text[start].isupper():
        return False  # "A e B"
    if text[start].islower():
        return True
    if answer.patterns["is"].fullmatch(after) or answer.patterns["linked"].fullmatch(after):
        return False
    if answer.patterns["says"].match(answer.low, end + 1):
        return False
    begins = regex.search(r"(?:^|[.!?:\n]|[\"'(])\s*$", text[max(0, start - 4) : start])
    return (
        bool(begins)
        and not answer.patterns["good"].match(after)
        and following.group(1)[0].islower()
    ) or (text[start] == "I" and not begins)


def texts(answer: Answer, options: Sequence[str]) -> list[Mention]:
    """The options whose text stands in the answer, without those inside a longer option's text."""
    found: list[Mention] = []
    low = answer.low
    for letter, option in zip(LETTERS, options):
        wanted = lower(bare(plain(option)))
        if (
            len(wanted) > 400
            or not wanted
            or (len(wanted) == 1 and wanted.isascii() and wanted.isalpha())
        ):
            continue
        if wanted in low or " " in wanted:
            places = ends([*_text_pattern(wanted).finditer(low)])
            found += [Mention(*match.span(), letter, "text") for match in places]
    longest: list[Mention] = []
    for mention in sorted(found, key=lambda m: (m.start, -m.end)):
        if not longest or mention.end > longest[-1].end:
            longest.append(mention)
        elif (mention.start, mention.end) == (longest[-1].start, longest[-1].end):
            longest.append(mention)  # two options with the same text
    return longest


@functools.lru_cache(maxsize=4096)
def _text_pattern(wanted: str) -> regex.Pattern:
    """An option's text, not inside a longer word or number; a sign is a part of it."""
    body = regex.escape(wanted, literal_spaces=True).replace(" ", r"\s+")
    spaceless = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}\p{Hangul}]"
    first, last = wanted[0], wanted[-1]
    before = r"(?<![\p{L}\p{M}\p{Nd}_])" if not regex.match(spaceless, first) else ""
    if first.isdigit():
        before = r"(?<![\p{L}\p{Nd}_]|(?<![\p{L}\p{Nd}])[-−+]|\p{Nd}[.,])"
    after = r"(?![\p{L}\p{M}\p{Nd}_+#]|-\p{L})" if not regex.match(spaceless, last) else ""
    if last.isdigit():
        after = r"(?![\p{Latin}\p{Nd}_%°+#]|[.,:/]\p{Nd})"
    return regex.compile(before + body + after)


def groups(answer: Answer, mentions: Sequence[Mention]) -> list[list[Mention]]:
    """Mentions that an "and", an "or" or a comma joins stand together."""
    found: list[list[Mention]] = []
    for mention in mentions:
        gap = answer.low[found[-1][-1].end : mention.start] if found else ""
        if found and len(gap) <= 24 and "\n" not in gap and answer.patterns["link"].fullmatch(gap):
            found[-1].append(mention)
        else:
            found.append([mention])
    return found


def negated(answer: Answer, grouped: Sequence[Sequence[Mention]]) -> set[Mention]:
    """The mentions that the answer says are not meant."""
    found: set[Mention] = set()
    if not grouped:
        return found
    starts = [group[0].start for group in grouped]
    for kind in ("not", "wrong", "nor"):
        for match in answer.all(kind):
            index = bisect.bisect_left(starts, match.end())
            before = grouped[index - 1] if index else None
            after = grouped[index] if index < len(grouped) else None
            if before and (
                before[-1].end > match.start() or match.start() - before[-1].end > _REACH
            ):
                before = None
            if after and after[0].start - match.end() > _REACH:
                after = None
            if not (before or after) or (kind == "wrong" and _denied(answer, match.start())):
                continue
            found |= _targets(answer, match, before, after, kind)
    return found


def _denied(answer: Answer, place: int) -> bool:
    """Whether a negation stands right before ("not wrong")."""
    return any(
        len(answer.low[m.end() : place].split()) <= 1 and "," not in answer.low[m.end() : place]
        for m in answer.patterns["not"].finditer(answer.low, max(0, place - 24), place)
    )


def _targets(answer: Answer, match: regex.Match, before, after, kind: str) -> set[Mention]:
    follows = kind == "wrong" or (kind == "not" and answer.words.negation_follows(match.group()))
    if before and not _near(answer, before[-1].end, match.start(), follows):
        before = None
    if after and not _near(answer, match.end(), after[0].start, not follows):
        after = None
    if before and (follows or not after):
        return {*_scope(answer, before, last=True)}
    if after and not (kind == "wrong" and len(answer.low[match.end() : after[0].start]) > 20):
        return {*_scope(answer, after, last=False)}
    return set()


def _near(answer: Answer, start: int, end: int, usual: bool) -> bool:
    gap = answer.low[start:end]
    if len(gap) < 4:
        gap = gap.lstrip(".):")  # "A. wrong"
    if regex.search(r"[,;:，、،。．.!?\n—–।۔።၊။፣؟]", gap) or answer.patterns["but"].search(gap):
        return False
    rest = answer.patterns["option"].sub(" ", answer.patterns["good"].sub(" ", gap))
    return len(answer.patterns["word"].findall(rest)) <= (3 if usual else 2)


def _scope(answer: Answer, group: Sequence[Mention], *, last: bool) -> Sequence[Mention]:
    """All of "A, B or C"; of "not B, D" only the next."""
    inside = answer.low[group[0].end : group[-1].start] if len(group) > 1 else ""
    if answer.patterns["linked"].search(inside):
        return group
    return group[-1:] if last else group[:1]
