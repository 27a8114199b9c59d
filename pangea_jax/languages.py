"""The languages of PangeaIns and PangeaBench: one table, and one function to look up a tag.

PangeaIns has 39 languages (paper, Table 5; counts in thousands of samples). The paper says that
PangeaBench covers 47 languages, but it has no list. The 14 datasets of PangeaBench name 55
languages, and the table below has them all. The 39 of PangeaIns and the 36 of XM100 together are
exactly 47, and we found no other way to get that number (`PANGEABENCH`). The other eight occur only
in CVQA, xChatBench, M3Exam, MMMLU or XStoryCloze.
"""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """One language.

    Attributes:
      code: canonical tag, as in PangeaIns, except for Hebrew: `he` here, `iw` in PangeaIns.
      english_name: name in English.
      native_name: name in the language itself.
      script: ISO 15924 code of the script.
      aliases: other tags in the released datasets and evaluation harnesses.
      pangeains_thousands: thousands of PangeaIns samples (paper, Table 5), None outside PangeaIns.
    """

    code: str
    english_name: str
    native_name: str
    script: str
    aliases: tuple[str, ...] = ()
    pangeains_thousands: float | None = None


_TABLE = (
    Language("af", "Afrikaans", "Afrikaans", "Latn"),
    Language("am", "Amharic", "አማርኛ", "Ethi", (), 31.7),
    Language("ar", "Arabic", "العربية", "Arab", (), 162.8),
    Language("bg", "Bulgarian", "български", "Cyrl", (), 52.7),
    Language("bn", "Bengali", "বাংলা", "Beng", ("bengali",), 118.4),
    Language("br", "Breton", "brezhoneg", "Latn"),
    Language("cs", "Czech", "čeština", "Latn", (), 4.6),
    Language("da", "Danish", "dansk", "Latn"),
    Language("de", "German", "Deutsch", "Latn", (), 132.2),
    Language("el", "Greek", "Ελληνικά", "Grek", (), 7.3),
    Language("en", "English", "English", "Latn", (), 2554.6),
    Language("es", "Spanish", "español", "Latn", (), 126.6),
    Language("eu", "Basque", "euskara", "Latn"),
    Language("fa", "Persian", "فارسی", "Arab", (), 8.4),
    Language("fi", "Finnish", "suomi", "Latn"),
    Language("fil", "Filipino", "Filipino", "Latn", ("tl",)),
    Language("fr", "French", "français", "Latn", (), 193.8),
    Language("ga", "Irish", "Gaeilge", "Latn", (), 34.7),
    Language("he", "Hebrew", "עברית", "Hebr", ("iw",), 168.3),
    Language("hi", "Hindi", "हिन्दी", "Deva", (), 163.5),
    Language("hr", "Croatian", "hrvatski", "Latn"),
    Language("hu", "Hungarian", "magyar", "Latn"),
    Language("id", "Indonesian", "Bahasa Indonesia", "Latn", ("in",), 178.4),
    Language("ig", "Igbo", "Igbo", "Latn", (), 26.1),
    Language("it", "Italian", "italiano", "Latn", (), 68.8),
    Language("ja", "Japanese", "日本語", "Jpan", ("jp",), 403.3),
    Language("jv", "Javanese", "Basa Jawa", "Latn", ("jw",), 35.2),
    Language("ko", "Korean", "한국어", "Kore", ("kr",), 182.5),
    Language("mi", "Maori", "te reo Māori", "Latn"),
    Language("min", "Minangkabau", "Baso Minangkabau", "Latn"),
    Language("mn", "Mongolian", "монгол", "Cyrl", (), 37.6),
    Language("ms", "Malay", "Bahasa Melayu", "Latn", (), 39.2),
    Language("my", "Burmese", "မြန်မာ", "Mymr"),
    Language("nl", "Dutch", "Nederlands", "Latn", (), 4.5),
    Language("no", "Norwegian", "norsk", "Latn", ("nb",), 60.7),
    Language("om", "Oromo", "Afaan Oromoo", "Latn"),
    Language("pl", "Polish", "polski", "Latn", (), 8.2),
    Language("pt", "Portuguese", "português", "Latn", (), 176.5),
    Language("quz", "Cusco Quechua", "Qusqu Runasimi", "Latn"),
    Language("ro", "Romanian", "română", "Latn", (), 147.2),
    Language("ru", "Russian", "русский", "Cyrl", (), 211.0),
    Language("rw", "Kinyarwanda", "Ikinyarwanda", "Latn"),
    Language("si", "Sinhala", "සිංහල", "Sinh", (), 0.6),
    Language("su", "Sundanese", "Basa Sunda", "Latn", (), 33.0),
    Language("sv", "Swedish", "svenska", "Latn"),
    Language("sw", "Swahili", "Kiswahili", "Latn", (), 132.7),
    Language("ta", "Tamil", "தமிழ்", "Taml", (), 37.1),
    Language("te", "Telugu", "తెలుగు", "Telu", (), 64.6),
    Language("th", "Thai", "ไทย", "Thai", (), 160.4),
    Language("tr", "Turkish", "Türkçe", "Latn", (), 140.7),
    Language("uk", "Ukrainian", "українська", "Cyrl", (), 7.4),
    Language("ur", "Urdu", "اردو", "Arab", ("urdu",), 156.4),
    Language("vi", "Vietnamese", "Tiếng Việt", "Latn", (), 315.5),
    Language("yo", "Yoruba", "Yorùbá", "Latn"),
    Language("zh", "Chinese", "中文", "Hans", ("zh_simplified", "zh-cn", "zh-hans"), 557.4),
)

LANGUAGES: dict[str, Language] = {language.code: language for language in _TABLE}

PANGEAINS: tuple[str, ...] = tuple(
    language.code for language in _TABLE if language.pangeains_thousands is not None
)

UNDETERMINED = "und"
"""The tag (ISO 639-2) of a text whose language is not known. It is no language of the table."""

# fmt: off
XM100: tuple[str, ...] = (
    "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi", "hr", "hu",
    "id", "it", "ja", "ko", "mi", "nl", "no", "pl", "pt", "quz", "ro", "ru", "sv", "sw", "te", "th",
    "tr", "uk", "vi", "zh",
)
# fmt: on

PANGEABENCH: tuple[str, ...] = tuple(
    code for code in LANGUAGES if code in PANGEAINS or code in XM100
)

# Unicode CLDR has no Sundanese emoji names.
EMOJI: tuple[str, ...] = tuple(code for code in PANGEAINS if code != "su")


def name(code: str) -> str:
    """The English name of a canonical code, or of `UNDETERMINED`."""
    return "not identified" if code == UNDETERMINED else LANGUAGES[code].english_name


_BY_TAG = {
    tag.lower(): language for language in _TABLE for tag in (language.code, *language.aliases)
}


def get(tag: str) -> Language:
    """Returns the language of a tag or alias; case does not matter, and `_` equals `-`.

    Raises:
      KeyError: the tag is unknown; the message names the nearest known tags.
    """
    wanted = tag.strip().lower()
    for spelling in (wanted, wanted.replace("_", "-"), wanted.replace("-", "_")):
        if spelling in _BY_TAG:
            return _BY_TAG[spelling]
    by_name = {language.english_name.lower(): language.code for language in _TABLE}
    near = difflib.get_close_matches(wanted, [*_BY_TAG, *by_name], n=3, cutoff=0.5)
    hints = [by_name.get(name, name) for name in near]
    hint = f"; did you mean {', '.join(dict.fromkeys(hints))}?" if hints else "."
    raise KeyError(f"unknown language tag {tag!r}{hint} Known: {' '.join(LANGUAGES)}")
