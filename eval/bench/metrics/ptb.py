"""The tokens of captions in the COCO caption metrics, without Java.

The COCO metrics call Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`) and remove a list of marks.
It is a lexer: at each place the rule with the longest match makes the token, and the first of these rules if several
are as long. What a rule demands after its token counts for this length. `_rules` states its rules as regular
expressions; a test compares them with the program's own tokens.

Some of its habits decide scores in other languages than English. Characters newer than Unicode 6.1 and most vowel signs
of Sinhala, Malayalam, Kannada, Khmer and Burmese are dropped, and words end there. Chinese, Japanese and Thai are not
segmented, so a caption is one to three tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import regex

from eval.bench.reading.text import shorten

# The tables hold what the program does with every character of the Basic Multilingual Plane; it drops all others.
_NEW_LETTERS = (  # unknown to it
    "037F 0528-052F 0558 0560 0588 058B-058C 05EF 0860-088F 08A1 08AD-08C9 0978 0980 09FC 0AF9 0C34 0C5A-0C5D 0C80 "
    "0CDC-0CDD 0D04 0D54-0D5F 0E86 0E89 0E8C 0E8E-0E93 0E98 0EA0 0EA8-0EA9 0EAC 13F5-13FD 16F1-16F8 170D 171F 1878 "
    "191D-191E 19B0-19C0 19C8-19C9 1B4C 1C80-1CBF 1CF2-1CF3 1CFA 208F 209D-209F 2C2F 2C5F 312E-312F 31BB-31BF "
    "4DB6-4DBF 9FCD-9FFF A698-A69D A78F A794-A79F A7AB-A7F7 A8FD-A8FE A9E0-A9FE AA7E-AA7F AB30-ABBF"
)
_NEW_DIGITS = "0DE6-0DEF A9F0-A9F9"
_WORD_MARKS = (  # parts of words, as letters are
    "00AD 02C2-0379 0384-0385 03F6 0483-0487 055A-055F 0591-05BD 05BF 05C1-05C2 05C4-05C5 05C7 0615-061A 064B-065E "
    "0670 06D6-06ED 06FD-06FE 070F-07B0 07EB-07F3 0900-0903 093C-094E 0951-0955 0962-0963 0981-0983 09BC-09C4 "
    "09C7-09C8 09CB-09CD 09D7 09E2-09E3 0A01-0A03 0A3C 0A3E-0A4F 0A81-0A83 0ABC-0ACF 0B82 0BBE-0BC2 0BC6-0BC8 "
    "0BCA-0BCD 0C01-0C03 0C3E-0C56 0D3E-0D44 0D46-0D48 0E31-0E3A 0E47-0E4E 0EB1-0EBC 0EC8-0ECD"
)
_SIGNS = (  # tokens by themselves
    "00A1 00A6-00A9 00AC 00AE-00B1 00B4 00B6-00B8 00BF 00D7 00F7 037E 0387 0589 05BE 05C0 05C3 05C6 05F3-05F4 "
    "0600-0603 0606-060A 060C 0614 061B 061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 0964-0965 0E4F 1FBD 2016-2017 "
    "2020-2023 2030-2038 203B 203E-2042 2044 207A-207E 208A-208E 2100-2101 2103-2106 2108-2109 2114 2116-2118 "
    "211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2190-2BFF 3001-3002 3012 30FB FF01-FF0F "
    "FF1A-FF20 FF3B-FF40 FF5B-FF65"
)
# A longer caption is read at its start and its end. Those of the benchmark have one sentence.
LIMIT = 2_048
_LONGEST = 1000  # the characters that a rule looks at, so that the time of a long text is bounded
# The metrics also mean to drop -LRB- and its like, but have lowered the case before.
_DROPPED_TOKENS = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
_QUOTES = {
    **dict.fromkeys("\x91‘‛‹", "`"),
    **dict.fromkeys("\x92’›", "'"),
    **dict.fromkeys("\x93“«", "``"),
    **dict.fromkeys("\x94”»", "''"),
}
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_CURRENCIES = {"¢": "cents", "£": "#", **dict.fromkeys("\x80¤₠€", "$")}

# Abbreviations, without their last period. They count in any case, except for letters in brackets.
_ABBREVIATIONS = (  # months and days, states of the USA, companies, others
    r"jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri|"
    r"ala|ariz|[A]z|[A]rk|calif|colo|conn|ct|dak|[D]el|fla|ga|[I]ll|ind|kans?|ky|[L]a|[M]ass|md|mich|minn|[M]iss|mo|"
    r"mont|neb|nev|okla|[O]re|[P]a|penn|tenn|[T]ex|va|vt|[W]ash|wisc?|wyo|"
    r"inc|cos?|corp|pp?t[ye]s?|ltd|plc|rt|bancorp|bhd|assn|univ|intl|sys|tel|est|ext|sq|"
    r"jr|sr|bros|(?:ed|ph)\.d|blvd|rd|esq|etc|al|seq|bldg"
)
_TITLES = (  # that stand before names, and others
    r"mr|mrs|ms|[M]iss|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|ave|"
    r"pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc|"
    r"vs|alex|wm|jos|cie|a\.k\.a|cf|treas|ph|invt|elec|natl|m[ft]g|dept"
)
_BEFORE_NUMBERS = r"ca|figs?|prop|nos?|art|bldg|pp|op"
# Words that begin a sentence after "Vitamin C. ", where the period is no part of the letter.
_OPENERS = (
    r"[A]bout|[A]ccording|[A]dditionally|[A]fter|[A]n?|[A]s|[A]t|[B]ut|[E]arlier|[H]er?|[H]ere|[H]owever|[I]f|[I]n|"
    r"[I]t|[L]ast|[M]any|[M]ore|[M][rs]\.|[N]ow|[O]nce|[O]ne|[O]ther|[O]ur|[S]he|[S]ince|[S]o|[S]ome|[S]uch|[T]hat|"
    r"[T]he|[T]heir|[T]hen|[T]here|[T]hese|[T]hey|[T]his|[W]e|[W]hen|[W]hile|[W]hat|[Y]et|[Y]ou"
)
_FILES = (
    "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|"
    "wav|x|xml|zip"
)


def _characters(table: str) -> str:
    parts = (part.split("-") for part in table.split())
    return "".join("-".join(f"\\u{end}" for end in part) for part in parts)


def _any_case(words: str) -> str:
    """A pattern of words in any case, except for letters in brackets.

    For the program, case includes the long s, the Kelvin sign and the two i of Turkish.
    """
    more = {"i": "İı", "k": "\u212a", "s": "ſ"}

    def variants(match):
        part = match.group()
        if len(part) > 1:  # brackets or an escape
            return part
        return f"[{part.lower()}{part.upper()}{more.get(part.lower(), '')}]"

    return regex.sub(r"\[\w+\]|\\.|[A-Za-z]", variants, words)


# Parts of character classes.
_LETTER = rf"[\p{{L}}\u1885\u1886--[{_characters(_NEW_LETTERS)}]]"
_DIGIT = rf"[\p{{Nd}}--[{_characters(_NEW_DIGITS)}]]"
_SPACE = r" \t\xA0\u2000-\u200A\u3000"
_SPACE_OR_LINE = rf"{_SPACE}\r\n\v\f\x85\u2028\u2029"
_IN_SENTENCE = ",;:、"
# Parts of patterns.
_WORD_LETTER = (
    rf"(?:[{_LETTER}{_characters(_WORD_MARKS)}]|&[aeiouAEIOU](?:{_any_case('acute|grave|uml')});)"
)
_WORD_CHARACTER = rf"(?:{_WORD_LETTER}|{_DIGIT})"
_WORD = rf"{_WORD_LETTER}{_WORD_CHARACTER}*(?:[.!?]{_WORD_LETTER}{_WORD_CHARACTER}*)*"
_APOSTROPHE = rf"(?:['\x92’]|{_any_case('&apos;')})"
_ANY_APOSTROPHE = rf"(?:['\x92’`\x91‘‛]|{_any_case('&apos;')})"
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|{_any_case('re|ve|ll')})"
_NOT = rf"[nN]{_ANY_APOSTROPHE}[tT]"
_WORD_OR_NUMBER = rf"(?:[dDoOlL]{_ANY_APOSTROPHE}[{_LETTER}{_DIGIT}])?[{_LETTER}{_DIGIT}]+"
_AMPERSAND = _any_case("&amp;")
_NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
_TAG = rf"<(?:[!?][A-Za-z-][^>\r\n]*|{_NAME}(?: +{_NAME}(?: *= *(?:'[^']*'|\"[^\"]*\"))?)* */?|/{_NAME}) *>"


def _as_it_is(token: str) -> str:
    return token


def _always(text: str) -> Callable[[str], str]:
    return lambda token: text


def _without_soft_hyphens(token: str) -> str:
    return token.replace("\xad", "")


def _with_fixed_spaces(token: str) -> str:
    return token.replace(" ", "\xa0")


def _ampersand(token: str) -> str:
    return regex.sub("(?i)&amp;", "&", token)


def _quotes(token: str) -> str:
    token = token.replace("&apos;", "'").replace('"', "''").replace("&quot;", "''")
    return _written(_QUOTES, token)


def _written(table: dict[str, str], token: str) -> str:
    return "".join(table.get(character, character) for character in token)


_currency = functools.partial(_written, _CURRENCIES)
_fraction = functools.partial(_written, _FRACTIONS)
_bracket = functools.partial(_written, _BRACKETS)


def _round_brackets(token: str) -> str:
    return token.replace("(", "-LRB-").replace(")", "-RRB-")


def _phone(token: str) -> str:
    return _round_brackets(_with_fixed_spaces(token))


def _hyphens(token: str) -> str:
    return "--" if len(token) in (3, 4) else token


class Rule(NamedTuple):
    """One kind of token.

    Attributes:
      pattern: its first group is the token; what follows the group must follow the token.
      write: what is written for the token; nothing is written if that is empty.
    """

    pattern: regex.Pattern
    write: Callable[[str], str]


def _rule(token: str, write: Callable[[str], str] = _as_it_is, before: str = "") -> Rule:
    return Rule(
        regex.compile(f"({token})(?:{before})", regex.V1 | regex.POSIX | regex.DOTALL), write
    )


def _word_rules() -> list[Rule]:
    letters, any_apostrophe = f"[{_LETTER}]", _ANY_APOSTROPHE
    with_apostrophe = (
        rf"{_APOSTROPHE}[nN]{_APOSTROPHE}?",  # rock 'n' roll
        rf"{_APOSTROPHE}(?:{_any_case('em|till?|cause')}|[2-9]0[sSſ])",
        rf"[lLdDjJ]{_APOSTROPHE}",  # j' ai
        rf"[A-HJ-XZn]{any_apostrophe}{letters}{{2,}}",  # D'Arc
        rf"{letters}+[aeiouyAEIOUY]{any_apostrophe}[aeiouA-Z]{letters}*",  # Hawai'i
        rf"(?:{_any_case('dunkin|somethin|ol')}){_APOSTROPHE}|[oO]{any_apostrophe}[oO]",
        _any_case(r"cont'd\.?|'twas|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l"),
    )
    return [
        _rule(_any_case(r"c\+\+|[cCfF]#")),
        _rule(_any_case("can"), before=_any_case("not")),
        _rule(_any_case("'t"), before=_any_case("was|is")),
        _rule(_any_case("gon|wan"), before=_any_case("na")),
        _rule(_any_case("got"), before=_any_case("ta")),
        _rule(_any_case("lem|gim"), before=_any_case("me")),
        _rule(_TAG, _with_fixed_spaces),
        _rule(_any_case("&(?:md|mdash|ndash);") + "|[\x96\x97–—―]", _always("--")),
        _rule(_AMPERSAND, _ampersand),
        _rule(_any_case("&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);")),
        _rule(_WORD, _without_soft_hyphens, before=_CLITIC),
        _rule(r"[A-Za-z\u00AD]*[A-MO-Za-mo-z]\u00AD*", _without_soft_hyphens, before=_NOT),
        _rule(_WORD, _without_soft_hyphens),
        _rule("|".join(with_apostrophe)),
        _rule(rf"[yY]{_APOSTROPHE}", before=letters),
    ]


def _address_rules() -> list[Rule]:
    blank, brackets = r" \t\n\f\r", "<>|(){}"
    path = rf"(?:/[^{blank}\"<>|()]+[^{blank}\"{brackets}.!?,-])?"
    host = rf"[^{blank}\"`'{brackets}.!?,-_$]+"  # from the comma to the underscore, so no digits
    domain = rf"[^{blank}\"{brackets}.\xA0]++"
    return [
        _rule(_any_case("https?://") + rf"[^{blank}\"{brackets}]+[^{blank}\"{brackets}.!?,-]"),
        _rule(_any_case(r"www\.") + rf"(?:[^{blank}\"{brackets}.!?,]+\.)+[a-zA-Z]{{2,4}}{path}"),
        _rule(rf"(?:{host}\.)+(?:{_any_case('com|net|org|edu')}){path}"),
        _rule(
            rf"(?:<|{_any_case('&lt;')})?[a-zA-Z0-9](?>[^{blank}\"{brackets}\xA0]*@(?={domain}))"
            rf"{domain}(?:\.{domain})*+>?"
        ),
        _rule(rf"@[a-zA-Z_][a-zA-Z_0-9]*|\#{_WORD_LETTER}+"),
    ]


def _number_rules() -> list[Rule]:
    digit, four = _DIGIT, rf"{_DIGIT}{{1,4}}"
    alphanumeric = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    in_any_case = (
        r"-(?:rrb|lrb|rcb|lcb|rsb|lsb)-|c\.d\.s|pro-|anti-|s(?:&|&amp;)p-500|s(?:&|&amp;)ls"
    )
    french = rf"{_any_case('cap')}{_APOSTROPHE}[nN]|[cC]{_APOSTROPHE}{_any_case('est')}"
    return [
        _rule(_CLITIC, _quotes, before="[^A-Za-z]"),
        _rule(_NOT, _quotes, before="[^A-Za-z]"),
        _rule(rf"{digit}{{1,2}}[-/]{digit}{{1,2}}[-/]{digit}{{2,4}}"),
        _rule(
            rf"[-+]?(?:{digit}+|{digit}*(?:[.:,\u00AD\u066B\u066C]{digit}+)+)",
            _without_soft_hyphens,
        ),
        _rule("[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)"),
        _rule(rf"(?:{four}[- \xA0])?{four}(?:\\?/|⁄){four}", _with_fixed_spaces),
        _rule("[¼½¾⅓-⅞]", _fraction),
        _rule(rf"{_any_case(in_any_case)}|{french}", _ampersand),
        _rule(rf"{alphanumeric}(?:\\?/{alphanumeric}){{1,2}}"),
        _rule(r"[A-Z]*\$|\#"),
        _rule("[¢£¤¥\x80₠€؋฿₤￠￡￥￦]", _currency),
    ]


def _abbreviation_rules() -> list[Rule]:
    abbreviation = rf"(?:{_any_case(_ABBREVIATIONS)})\."
    nations = _any_case(r"(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(?:u\.k|u\.s\.s\.r)")
    title = rf"(?:{_any_case(_TITLES)}|[A-Za-z](?:\.[A-Za-z])*|{nations})\."
    blank, opener = f"[{_SPACE_OR_LINE}]", rf"(?:{_any_case(_OPENERS)}|{_TAG})"
    file = rf"{_WORD_CHARACTER}+(?:\.{_WORD_CHARACTER}+)*\.(?:{_any_case(_FILES)})"
    phone = (
        r"(?:\([0-9]{2,3}\)[ \xA0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xA0])?[0-9]{2,4}[- \xA0])"
        r"[0-9]{3,4}[- \xA0]?[0-9]{3,5}",
        r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
    )
    return [
        _rule("[A-Za-z]", before=rf"\.{blank}+{opener}{blank}"),
        _rule(rf"(?:{_any_case(_BEFORE_NUMBERS)})\.", before=rf"{blank}?{_DIGIT}"),
        _rule(
            rf"(?:{_any_case('pt[eyEY]|co')})\.", before=rf"[{_SPACE}](?:{_any_case('ltd|lim')})"
        ),
        _rule(abbreviation, before=".."),
        _rule(abbreviation),
        _rule(title),
        _rule(nations, before=blank),
        _rule(rf"{_APOSTROPHE}[0-9][0-9]", before=blank),
        _rule(file, before=rf"[{_SPACE_OR_LINE}.?!,]"),
        _rule(rf"{_WORD}\.", _without_soft_hyphens, before=f"[{_IN_SENTENCE}]"),
        _rule("|".join(phone), _phone),
    ]


def _mark_rules() -> list[Rule]:
    asian_smiley = (
        r"[\^xX=~<>]\.\[\^[xX]=~<>\]|[-\^x=~<>']_[-\^x=~<>']|\([-\^x=~<>'][_.]?[-\^x=~<>']\)|"
        r"\([\^x=~<>']-[\^x=~<>'`]\)"
    )
    return [
        _rule(f'"|{_any_case("&quot;")}', _quotes),
        _rule("\x7f", _always("")),
        _rule(f"<|{_any_case('&lt;')}", _always("<")),
        _rule(f">|{_any_case('&gt;')}", _always(">")),
        _rule(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", _round_brackets, before="[^A-Za-z0-9]"),
        _rule(asian_smiley, _round_brackets),
        _rule(r"[(){}\[\]]", _bracket),
        _rule("-+", _hyphens),
        _rule(r"\.{3,5}|(?:\.[ \xA0]){2,4}\.|[\x85…]", _always("...")),
        _rule(r"@+|\#+|_+|\*+|(?:\\\*){1,3}"),
        _rule(rf"[{_IN_SENTENCE}]|[?!]+|[.=/]"),
    ]


def _compound_rules() -> list[Rule]:
    hyphenated = (
        r"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(?:-(?:[A-Za-z0-9\u00AD]+|[A-Za-z](?:\.[A-Za-z])+\.))+"
    )
    joined = rf"{_WORD_OR_NUMBER}(?:[-_\u058A\u2010\u2011]{_WORD_OR_NUMBER})*"
    initials = rf"[A-Z]+(?:(?:[+&]|{_AMPERSAND})[A-Z]+)+"
    mark = f"[{_IN_SENTENCE}]"  # a period before one of these belongs to the token
    return [
        _rule(rf"{hyphenated}\.", _without_soft_hyphens, before=mark),
        _rule(hyphenated, _without_soft_hyphens),
        _rule(rf"{joined}\.", before=mark),
        _rule(joined),
        _rule(rf"{initials}\.", _ampersand, before=mark),
        _rule(initials, _ampersand),
    ]


def _quote_rules() -> list[Rule]:
    return [
        _rule("'", _always("`"), before=r"[A-Za-z][^ \t\n\r\xA0]"),
        _rule(_CLITIC, _quotes),
        _rule(_NOT, _quotes),
        _rule(rf"{_APOSTROPHE}|''|[`\x91-\x94‘-‟‹›«»]{{1,2}}", _quotes),
        _rule("<<|>>"),
        _rule(rf"[+%&~\^|\\{_characters(_SIGNS)}]"),
        _rule(rf"[{_SPACE}]+|{_any_case('&nbsp;')}", _always("")),
    ]


@functools.cache
def _rules() -> list[Rule]:
    """All rules in their order, which decides among the longest matches."""
    return [
        *_word_rules(),
        *_address_rules(),
        *_number_rules(),
        *_abbreviation_rules(),
        *_mark_rules(),
        *_compound_rules(),
        *_quote_rules(),
    ]


@functools.lru_cache(4096)
def _rules_from(character: str) -> list[Rule]:
    """The rules that a token can follow that begins with the character."""
    return [rule for rule in _rules() if rule.pattern.match(character, partial=True)]


def _lex(text: str) -> list[str]:
    tokens, place = [], 0
    while place < len(text):
        matches = [
            (match, rule)
            for rule in _rules_from(text[place])
            if (match := rule.pattern.match(text, place, place + _LONGEST))
        ]
        if not matches:  # a space, or a character that is dropped
            place += 1
            continue
        match, rule = max(matches, key=lambda found: found[0].end())
        place = match.end(1)
        if token := rule.write(match.group(1)):
            tokens.append(token)
    return tokens


def _lower(token: str) -> str:
    """The token in lower case as Java writes it.

    Both write the last sigma of a word in another way than the others. But in Java, a word goes on after a digit, and
    after one mark between letters.
    """

    def last_sigma(match):
        word = match.group()
        cased = [place for place, letter in enumerate(word) if letter.lower() != letter.upper()]
        if len(cased) > 1 and word[cased[-1]] == "Σ":
            word = f"{word[: cased[-1]]}ς{word[cased[-1] + 1 :]}"
        return word

    if "Σ" in token:
        letters = r"[\p{L}\p{M}\p{Nd}]+"
        words = rf"{letters}(?:(?<=[\p{{L}}\p{{M}}])[-_.'](?=\p{{L}}){letters})*"
        token = regex.sub(words, last_sigma, token).replace("Σ", "σ")
    return token.lower()


def tokenize(text: str) -> list[str]:
    """The tokens of one caption in lower case, without punctuation.

    In the file that the metrics write, a line end follows the caption, and the lexer sees it. Its characters are Java's
    units of 16 bits. It sees the next caption too, which we cannot; that decides only the period of a last "letter B.".
    """
    units = shorten(text, LIMIT).replace("\n", " ").encode("utf-16-le", "surrogatepass")
    units = "".join(map(chr, memoryview(units).cast("H")))
    line = " ".join(map(_lower, _lex(units + "\n")))
    line = line.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return [token for token in line.rstrip().split(" ") if token and token not in _DROPPED_TOKENS]
