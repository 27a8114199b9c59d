"""Reads the short text that an answer gives, and brings short texts into one form."""

import functools
import unicodedata

import regex

from eval.bench.metrics import numbers, squad
from eval.bench.reading import words
from eval.bench.reading.text import bare, boxed, clean, form, is_accent, lower

# How a sentence introduces its answer, and how it ends after one; from grammars of the languages of MaXM, TyDiQA, xGQA.
_BEFORE = {
    "ar": "هو|هي|إنه|إنها|هذا|هذه",
    "bn": "এটি|এটা|এটি হল|এটি হলো",
    "de": "es ist|das ist|es sind|das sind|es gibt",
    "ga": "is é|tá",
    "mi": "ko",
    "en": "it is|it's|this is|that is|that's|there is|there's|there are|they are|these are|i see",
    "es": "es|son|hay|esto es|se trata de",
    "fi": "se on|ne ovat|tämä on",
    "fr": "c'est|ce sont|il y a|il s'agit de|il s'agit d'",
    "he": "זה|זהו|זו|זוהי|אלה|יש|אלו",
    "hi": "यह|ये|यहाँ|वह",
    "id": "itu adalah|ini adalah|adalah|itu|ini|ada",
    "it": "è|sono|c'è|ci sono|questo è",
    "ja": "これは|それは",
    "ko": "이것은|그것은",
    "pt": "é|são|há|isto é|trata-se de",
    "ro": "este|sunt|e|acesta este|aceasta este|există",
    "ru": "это",
    "sw": "ni|hii ni|huyu ni|kuna",
    "te": "ఇది|అది|ఇవి",
    "th": "มันคือ|นี่คือ|คือ|เป็น|มี",
    "tr": "bu|bunlar",
    "zh": "这是|這是|它是|那是|是|有",
}
_AFTER = {
    "am": "ነው|ናቸው|ነበር",
    "eu": "da|dira",
    "my": "ဖြစ်သည်|ဖြစ်ပါသည်|ပါ",
    "om": "dha",
    "bn": "হয়|ছিল|আছে",
    "fa": "است|هستند|بود",
    "hi": "है|हैं|था|थे|थी",
    "ja": "です|でした|だ|である|であった|ます",
    "ko": "입니다|이에요|예요|이다|였습니다|이었습니다",
    "mn": "юм|байна|байсан",
    "si": "වේ|යි",
    "th": "ครับ|ค่ะ|คะ",
    "tr": "'?[dt][ıiuü]r",
    "ur": "ہے|ہیں|تھا",
    "zh": "的",
}
_ARTICLES = {
    "de": "der die das den dem ein eine einen einem",
    "en": "a an the",
    "es": "el la los las un una unos unas",
    "fr": "le la les un une des du l' d'",
    "it": "il lo la gli le un uno una l'",
    "nl": "de het een",
    "pt": "o a os as um uma",
    "ro": "un o niște",
}
# Zero to ten.
_NUMBERS = {
    "ar": "صفر واحد اثنان ثلاثة أربعة خمسة ستة سبعة ثمانية تسعة عشرة",
    "bn": "শূন্য এক দুই তিন চার পাঁচ ছয় সাত আট নয় দশ",
    "de": "null eins zwei drei vier fünf sechs sieben acht neun zehn",
    "en": "zero one two three four five six seven eight nine ten",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve diez",
    "fi": "nolla yksi kaksi kolme neljä viisi kuusi seitsemän kahdeksan yhdeksän kymmenen",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf dix",
    "he": "אפס אחת שתיים שלוש ארבע חמש שש שבע שמונה תשע עשר",
    "hi": "शून्य एक दो तीन चार पाँच छह सात आठ नौ दस",
    "id": "nol satu dua tiga empat lima enam tujuh delapan sembilan sepuluh",
    "it": "zero uno due tre quattro cinque sei sette otto nove dieci",
    "ko": "영 하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉 열",
    "pt": "zero um dois três quatro cinco seis sete oito nove dez",
    "ro": "zero unu doi trei patru cinci șase șapte opt nouă zece",
    "ru": "ноль один два три четыре пять шесть семь восемь девять десять",
    "sw": "sifuri moja mbili tatu nne tano sita saba nane tisa kumi",
    "te": "సున్నా ఒకటి రెండు మూడు నాలుగు ఐదు ఆరు ఏడు ఎనిమిది తొమ్మిది పది",
    "th": "ศูนย์ หนึ่ง สอง สาม สี่ ห้า หก เจ็ด แปด เก้า สิบ",
    "zh": "零 一 二 三 四 五 六 七 八 九 十",
}
_MORE_NUMBERS = {
    "en": {"none": "0"},
    "he": {"אחד": "1", "שניים": "2", "שני": "2", "שתי": "2", "שלושה": "3", "ארבעה": "4", "חמישה": "5"},
    "hi": {"पांच": "5", "छः": "6", "छे": "6"},
    "ro": {"una": "1", "două": "2"},
    "zh": {"两": "2", "兩": "2", "〇": "0"},
}  # fmt: skip
_UNSPACED = regex.compile(
    r"(?<=[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}])\s+"
    r"(?=[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}])"
)
_VOCALS = regex.compile("[\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670\u0640]+")
_NUMBER = regex.compile(r"(?<![\d\p{L}])([-−])?(\d[\d.,'\u066b\u066c]*\d|\d)")
_FIRST = regex.compile(
    r"([^.。!！?？।\n]{1,60}?[\p{L}\p{M}\p{Nd}]{2})(?:\.\s+(?=\p{Lu}\S*\s+\S+\s+\S)|\.\s+(?=\p{Lo})|[。！？।]\s*(?=\w))"
)
_EDGES = " \t.,;:!?。．、，；：！？।۔؟።၊။\"'«»“”„‘’()[]「」『』《》*_"


def short(response: str, language: str | None = None) -> str:
    """The words of a response that answer: without the cue, the introduction, and what follows on other lines."""
    inside = boxed(response)
    text = clean(inside if inside is not None else response)
    lines = [line.strip() for line in text.split("\n") if line.strip(_EDGES)]
    if not lines:
        return ""
    pattern = _patterns(language)
    text = lines[0][:2000]
    folded = lower(bare(text))
    if cue := pattern["cue"].match(folded):
        rest = text[_place(text, cue.end()) :].strip()
        text = rest or (lines[1][:2000] if len(lines) > 1 else text)
    elif len(folded) <= 200 and (cue := pattern["called"].fullmatch(folded)):
        text = text[: _place(text, cue.end(1))]
    if answered := pattern["yes_no"].match(lower(bare(text))):
        return text[: _place(text, answered.end("word"))].strip(_EDGES)
    if reason := pattern["because"].search(lower(bare(text))):
        text = text[: _place(text, reason.start())]
    text = _first_sentence(text.strip(_EDGES[:2] + "\"'"))
    folded = lower(bare(text))
    if start := pattern["before"].match(folded):
        shortened = text[_place(text, start.end()) :]
        text = shortened if shortened.strip(_EDGES) else text
    end = pattern["after"].search(text.rstrip(_EDGES))
    if end and end.start():
        text = text[: end.start()]
    return text.strip(_EDGES)


def _place(text: str, place: int) -> int:
    """The place in a text that stands at `place` in the bare text."""
    for index, character in enumerate(text):
        if place <= 0 and not is_accent(character):
            return index
        place -= not is_accent(character)
    return len(text)


def _first_sentence(text: str) -> str:
    """The first sentence where it is an answer of few words and an explanation follows."""
    first = _FIRST.match(text)
    return first.group(1) if first and len(first.group(1).split()) <= 6 else text


@functools.cache
def _patterns(language: str | None) -> dict[str, regex.Pattern]:
    known = words.of(language)
    word = rf"{words.LETTER}+"
    before = [_BEFORE["en"], _BEFORE.get(language or "", "(?!)")]
    starts = "|".join(lower(form(text)) for text in before)
    answer, right, is_ = (known.pattern(kind) for kind in ("answer", "right", "is"))
    bare_cue = r"|\s+" if language and not words.Words.own(language, "is") else ""
    spaced = r"(?:\s+|(?<=['\p{Han}\p{Thai}\p{Hiragana}]))"
    return {
        # "the answer is", "Antwort:", "答えは"; in languages without "is" also "doğru cevap"
        "cue": regex.compile(
            rf"[^.:\n]{{0,36}}?(?:{answer})(?:\s*(?:{right}))?"
            rf"(?:(?:\s+{word}){{0,2}}?\s*(?:[:：=]\s*|(?:{is_})\s*[:：]?\s*)|(?:는|은|は)\s*{bare_cue})"
        ),
        "called": regex.compile(
            rf"(.+?)(?:\s+(?:{is_}))?(?:\s+\p{{L}}{{1,3}})?\s*(?:{right})?\s*(?:{answer})(?:\s+(?:{right}))?\W*"
        ),
        # "no, it is not": the word alone answers
        "yes_no": regex.compile(rf"(?P<word>{known.pattern('yes', 'no')})\s*[,.،，、။።।;:!—–-]"),
        "because": regex.compile(rf"(?<=\w)[\s,،，、;]+(?:{known.pattern('because')})"),
        "before": regex.compile(rf"(?:{starts}){spaced}"),
        "after": regex.compile(rf"(?:\s+|(?<=\p{{Lo}}|\p{{Nd}}))(?:{form(_AFTER.get(language or '', '(?!)'))})$"),
    }  # fmt: skip


def plain(text: str, language: str | None = None) -> str:
    """A short text as texts are compared: lower case, no punctuation and articles, one form of each number."""
    text = _VOCALS.sub("", numbers.ascii_digits(clean(text)).replace("İ", "I"))
    text = _NUMBER.sub(lambda match: _number(match, language), text)
    text = lower(squad.normalize(text, unicode_punctuation=True, articles=False))
    if language == "el":  # capitals have no accents
        text = bare(text)
    text = _UNSPACED.sub("", text)
    return " ".join(word for word in text.split() if word not in _articles(language)) or text


@functools.cache
def _articles(language: str | None) -> frozenset[str]:
    own = "en" if language is None else language
    return frozenset(word.rstrip("'") for word in _ARTICLES.get(own, "").split())


def _number(match: regex.Match, language: str | None) -> str:
    """1,234.50 as 1234⋅5: the signs are no punctuation, so they stay."""
    sign = "−" if match.group(1) else ""
    digits = match.group(2)
    if (digits.startswith("0") and digits[1:2].isdigit()) or len(digits) > 40:
        return match.group()
    if digits.isdecimal():
        return sign + digits
    try:
        value = numbers.parse(digits, language)
    except ValueError:
        return match.group()
    if value.denominator == 1:
        return f"{sign}{value}"
    whole, _, part = f"{float(value):.10f}".rstrip("0").partition(".")
    return f"{sign}{whole}⋅{part}"


def same_value(text: str, language: str | None = None) -> str:
    """`plain`, and words for small numbers, for yes and for no in one form."""
    text = plain(text, language)
    if (whole := _values(language).get(text)) is not None:
        return whole
    return " ".join(_digits(language).get(word, word) for word in text.split())


@functools.cache
def _digits(language: str | None) -> dict[str, str]:
    found = {}
    for code in ("en", language or "en"):
        found |= {_key(word): str(i) for i, word in enumerate(_NUMBERS.get(code, "").split())}
        found |= {_key(word): digit for word, digit in _MORE_NUMBERS.get(code, {}).items()}
    return found


def _key(word: str) -> str:
    return lower(unicodedata.normalize("NFKC", word))


@functools.cache
def _values(language: str | None) -> dict[str, str]:
    known = words.of(language)
    found = {"true": "yes", "false": "no"}
    for kind in ("yes", "no"):
        for word in known.list(kind):
            found.setdefault(plain(word.replace("_", " "), language), kind)
    return found
