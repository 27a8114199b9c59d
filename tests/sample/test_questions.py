import dataclasses
import unicodedata

import pytest

from pangea_jax import languages
from pangea_jax.sample.questions import PHRASES, Phrases

PHRASINGS = {"name": 3} | dict.fromkeys(
    ("translate", "describe", "other_words", "is_it", "letter", "kind", "which", "same"), 2
)
NAMING = {"translate", "is_it", "which"}
ANSWERS = ("yes", "no", "animal", "plant", "food", "first", "second")
# Kinds of which every phrasing is a question; the others may be requests.
ALWAYS_ASKED = ("is_it", "kind", "which", "same")
QUESTION_MARKS = dict.fromkeys(("ar", "fa", "ur"), "؟") | dict.fromkeys(("ja", "zh"), "？")
QUESTION_MARKS |= {"el": ";", "fr": " ?", "th": ""}
# Punctuation that is not of the language's own script; Thai questions have no mark.
PUNCTUATION = dict.fromkeys(PHRASES, ' "?.,:') | dict.fromkeys(("ar", "fa", "ur"), ' ".:')
PUNCTUATION |= {"ja": "？、。「」", "zh": "？、。“”", "th": ' ",', "el": ' ";.,:', "am": ' "?'}
PUNCTUATION["fa"] += "\N{ZERO WIDTH NON-JOINER}"
PUNCTUATION["bn"] += "।-"
PUNCTUATION["es"] += "¿"
for code in ("fr", "ig", "it"):
    PUNCTUATION[code] += "'"
for code in ("fr", "hi", "ig", "mn", "ms", "ro", "ru"):
    PUNCTUATION[code] += "-"


def phrasings(language: str) -> list[str]:
    return [text for kind in PHRASINGS for text in getattr(PHRASES[language], kind)]


def texts(language: str) -> list[str]:
    phrases = PHRASES[language]
    return [*phrasings(language), *(getattr(phrases, name) for name in ANSWERS), phrases.comma]


def test_every_language_of_the_sample_has_phrases():
    assert list(PHRASES) == sorted(languages.EMOJI)
    fields = {field.name for field in dataclasses.fields(Phrases)}
    assert fields == {*PHRASINGS, *ANSWERS, "comma"}


@pytest.mark.parametrize("language", PHRASES)
def test_every_kind_has_its_number_of_different_phrasings(language):
    assert {kind: len(getattr(PHRASES[language], kind)) for kind in PHRASINGS} == PHRASINGS
    assert len(set(phrasings(language))) == sum(PHRASINGS.values())


@pytest.mark.parametrize("language", PHRASES)
def test_a_name_stands_where_one_is_asked_about_and_nowhere_else(language):
    for kind in PHRASINGS:
        for text in getattr(PHRASES[language], kind):
            assert text.count("{name}") == (kind in NAMING), text
            assert not set("{}") & set(text.replace("{name}", "")), text


@pytest.mark.parametrize("language", PHRASES)
def test_texts_are_normalised_and_only_of_the_script(language, in_script, foreign_characters):
    for text in texts(language):
        bare = text.replace("{name}", "")
        assert text == unicodedata.normalize("NFC", text)
        assert "  " not in text, text
        assert foreign_characters(bare, language) <= set(PUNCTUATION[language]), text
    for text in texts(language)[:-1]:
        assert text == text.strip()
        assert in_script(text.replace("{name}", ""), language), text


@pytest.mark.parametrize("language", PHRASES)
def test_questions_have_the_marks_of_their_language(language):
    mark = QUESTION_MARKS.get(language, "?")
    for kind in ALWAYS_ASKED:
        for text in getattr(PHRASES[language], kind):
            assert text.endswith(mark), text
            assert text.count("¿") == (language == "es"), text
    for text in phrasings(language):
        assert text.count('"') % 2 == 0, text
        assert text.count("「") == text.count("」"), text
        assert text.count("“") == text.count("”"), text
        if language == "fr":
            assert all(text[i - 1] == " " for i, char in enumerate(text) if char in "?:"), text


@pytest.mark.parametrize("language", PHRASES)
def test_the_kinds_to_choose_from_are_spelled_as_the_answers(language):
    phrases = PHRASES[language]
    for text in phrases.kind:
        places = [text.find(word) for word in (phrases.animal, phrases.plant, phrases.food)]
        assert -1 < places[0] < places[1] < places[2], text


@pytest.mark.parametrize("language", PHRASES)
def test_answers_differ(language):
    answers = [getattr(PHRASES[language], name) for name in ANSWERS]
    assert len(set(answers)) == len(ANSWERS)


@pytest.mark.parametrize("language", PHRASES)
def test_the_comma_is_that_of_the_script(language):
    other = {"am": "፣ ", "ja": "、", "zh": "、"} | dict.fromkeys(("ar", "fa", "ur"), "، ")
    assert PHRASES[language].comma == other.get(language, ", ")
