"""The tokens of captions in the COCO caption metrics, without Java.

The COCO metrics call Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`) and remove a list of marks.
We found the tables of characters by running that program on every character of the Basic Multilingual Plane. Two of its
faults decide scores in other languages than English. It drops characters that are newer than about Unicode 5, and most
vowel signs of Sinhala, Malayalam, Kannada, Khmer and Burmese; words end there. It also does not segment Chinese,
Japanese or Thai, so a caption is one to three tokens.
"""

import functools

import regex

# Marks that are part of words, as all letters and decimal digits of Unicode are.
_WORD_MARKS = (
    "02C2-0379 0384-0385 03F6 0483-0487 055A-055F 058A 0591-05BD 05BF 05C1-05C2 05C4-05C5 05C7 0615-061A "
    "064B-065E 0670 06D6-06FE 070F-07F3 0900-0903 093C-094E 0951-0955 0962-0963 0981-09E3 0A01-0A4F 0A81-0ACF "
    "0B82-0BCD 0C01-0C03 0C3E-0C56 0D3E-0D48 0E31-0E3A 0E47-0E4E 0EB1-0ECD 1885-1886"
)
# Signs that are tokens. A character in neither table is dropped and ends a word.
_SIGNS = (
    "00A1 00A5-00A9 00AC 00AE-00B4 00B6-00B9 00BF 00D7 00F7 037E 0387 0589 05BE 05C0 05C3 05C6 05F3-0603 0606-060C "
    "0614 061B 061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 0964-0965 0E3F 0E4F 1FBD 2016-2017 201A 201E-2023 "
    "2030-2038 203B 203E-2042 2044 2070 2074-207E 2080-208E 20A4 2100-2101 2103-2106 2108-2109 2114 2116-2118 "
    "211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2155-215E 2190-2BFF 3001-3002 3012 30FB "
    "FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 FFE5-FFE6"
)
_DROPPED_TOKENS = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_ESCAPES = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"£": "#", "¢": "cents", **dict.fromkeys("\x80¤₠€", "$")},
    **{"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
    **dict.fromkeys("'‘’‛‹›\x91\x92", "'"),
    **dict.fromkeys('"“”«»\x93\x94', "''"),
    **dict.fromkeys("–—―\x96\x97", "--"),
    "…": "...",
}
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri|ariz|calif|colo|conn|ct|dak|fla|"
    "ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo|inc|cos?|corp|pp?t[ye]s?|ltd|plc|rt|"
    "bancorp|dept|bhd|assn|univ|intl|sys|tel|est|ext|sq|jr|sr|bros|(?:ed|ph)\\.d|esq|mr|mrs|ms|drs?|profs?|sens?|"
    "reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|ave|pres|lieut|hon|brig|co?mdr|pfc|spc|"
    "supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc|etc|al|seq|bldg|pls|vs|"
    "invt|elec|natl|m[ft]g"
)
_CAPITALISED_ABBREVIATIONS = (
    "A[Zz]|A[Rr][Kk]|D[Ee][Ll]|I[Ll][Ll]|L[Aa]|M[Aa][Ss][Ss]|M[Ii][Ss][Ss]|O[Rr][Ee]|P[Aa]|T[Ee][Xx]|W[Aa][Ss][Hh]|"
    "A[Ll][Aa]"
)


_CLITIC = regex.compile("n?['’](?:[msdt]|re|ve|ll)", regex.IGNORECASE)


def _characters(table: str) -> str:
    parts = (part.split("-") for part in table.split())
    return "".join("-".join(f"\\u{end}" for end in part) for part in parts)


@functools.cache
def _rules() -> tuple[regex.Pattern, ...]:
    """The rules of the lexer. At each place the longest match wins; of several longest ones, the first."""
    letter = rf"[\p{{L}}{_characters(_WORD_MARKS)}]"
    either = rf"[\p{{L}}\p{{Nd}}{_characters(_WORD_MARKS)}]"
    plain = r"[\p{L}\p{Nd}]"
    apostrophe = "['’\x92]"
    clitic = rf"{apostrophe}(?:[msd]|re|ve|ll)(?!{either})"
    word = rf"{letter}{either}*(?:[.!?]{letter}{either}*)*"
    part = "[a-z0-9]+(?:-[a-z]+){0,2}"
    patterns = (
        r"</?[a-z][a-z0-9]*(?:\s[^<>\r\n]*)?/?>",
        r"https?://[^\s\"<>|(){}]+[^\s\"<>|.!?(){},-]",
        r"[a-z0-9_.+-]*[a-z0-9_]@[a-z0-9_-]+(?:\.[a-z0-9_-]+)+",
        r"[@#][a-z_][a-z0-9_]*",
        rf"(can)not(?!{either})|((?:gon|wan)(?=na)|got(?=ta)|(?:gim|lem)(?=me))..(?!{either})",
        rf"({letter}{either}*)n{apostrophe}t(?!{either})",
        rf"n{apostrophe}t(?!{either})",
        clitic,
        rf"{apostrophe}n(?:{apostrophe}|(?!{either}))|{apostrophe}em(?!{either})",
        rf"[ldj]{apostrophe}|(y{apostrophe})\p{{L}}|ol{apostrophe}",
        rf"{apostrophe}[2-9]0s|{apostrophe}till?(?!{either})|{apostrophe}cause(?!{either})",
        rf"({apostrophe}t)(?:is|was)(?!{either})",
        rf"(?-i:[A-HJ-XZn]){apostrophe}\p{{L}}{{2,}}|c{apostrophe}est(?!{either})",
        rf"[dlo]{apostrophe}{plain}{{2,}}(?:[-_]{plain}+)*|{apostrophe}\p{{Nd}}\p{{Nd}}(?=\s)",
        rf"\p{{L}}+[aeiouy]{apostrophe}(?-i:[aeiouA-Z])\p{{L}}*",
        rf"({word}){clitic}",
        word,
        r"[-+]?(?:\p{Nd}+(?:[.:,\u066B\u066C]\p{Nd}+)*|(?:[.:,\u066B\u066C]\p{Nd}+)+)",
        r"(?:\p{Nd}{1,4}[- ])?\p{Nd}{1,4}(?:/|\u2044)\p{Nd}{1,4}",
        r"\p{Nd}{1,2}[-/]\p{Nd}{1,2}[-/]\p{Nd}{2,4}",
        rf"{plain}+(?:[-_\u2010\u2011]{plain}+)+",
        r"[a-z0-9][a-z0-9.,]*(?:-[a-z0-9]+)+",
        rf"{part}(?:/{part}){{1,2}}",
        r"(?-i:[A-Z]+(?:[+&][A-Z]+)+)",
        r"[a-z](?:\.[a-z])+\.|[a-z]\.",
        rf"(?:{_ABBREVIATIONS})\.|(?-i:(?:{_CAPITALISED_ABBREVIATIONS})\.)",
        rf"({word}\.)[,;:、]",
        r"((?:ca|figs?|prop|nos?|art|bldg|pp|op)\.)\s*\p{Nd}",
        r"c\+\+|[cf]#",
        rf"{plain}+|(?-i:[A-Z]+)\$|{either}+\.(?:jpe?g|gif|png|pdf|html?|txt|docx?|zip|py)(?!{either})",
        r"\.(?:\s?\.)+|[!?]+|-+|`{1,2}|''|_+|\*+|~+|\#+",
        r"[\u0021-\u007E\x80\x91-\x94\x96\x97¢-¤«»¼-¾‘-‛“”‹›–-―…₠€⅓⅔]",
        rf"[{_characters(_SIGNS)}]",
    )
    return tuple(regex.compile(pattern, regex.IGNORECASE | regex.V1) for pattern in patterns)


def tokenize(text: str) -> list[str]:
    """The tokens of one caption in lower case, without punctuation."""
    text = text.replace("\u00ad", "").replace("\n", " ")
    tokens, place = [], 0
    while place < len(text):
        matches = [match for rule in _rules() if (match := rule.match(text, place))]
        if not matches:
            place += 1
            continue
        longest = max(matches, key=regex.Match.end)
        # If a rule has a group, only the group is the token; the rest of the match must follow it in the text.
        token = next(filter(None, longest.groups()), longest.group())
        place += len(token)
        if _CLITIC.fullmatch(token):
            token = token.replace("’", "'")
        if token.startswith(("..", "--")):  # a run of dots or dashes is one token
            token = "..."
        # The metrics split at spaces, so a space inside a token becomes a no-break space.
        tokens.append(_ESCAPES.get(token, token).lower().replace(" ", "\u00a0"))
    return [token for token in tokens if token not in _DROPPED_TOKENS]
