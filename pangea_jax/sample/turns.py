"""The questions of the embedded sample with their answers, one function for each kind of question.

Each function returns a question without image markers, and its answer. `n` chooses the phrasing,
modulo their number. The phrases are in `pangea_jax.sample.questions`, names and keywords in
`pangea_jax.sample.emoji`.

    name            What is this? -> cat
    description     Which words fit the picture? -> cat, pet, kitten
    translation     What is "gato" in English? -> cat
    other words     Say it in other words. -> pet, kitten
    is it           Is this: dog? -> no
    letter          Which of these is it? A. dog B. cat ... -> B
    kind            Is it an animal, a plant or food? -> an animal
    name of one     two pictures: What is this? (the first) -> dog
    which           two pictures: Which one shows: cat? -> the first
    same            two pictures: Do both show the same thing? -> no
"""

from collections.abc import Sequence

from pangea_jax.sample.emoji import Concept
from pangea_jax.sample.questions import PHRASES

LETTERS = "ABCD"
"""The letters of the options, at most this many."""

Ask = tuple[str, str]
"""A question without image markers, and its answer."""


def ask_name(concept: Concept, language: str, n: int) -> Ask:
    """The name of what the picture shows."""
    return _pick(PHRASES[language].name, n), concept.names[language]


def ask_name_of(pictures: tuple[Concept, Concept], place: int, language: str, n: int) -> Ask:
    """The name of what one of two pictures shows; `place` is 0 or 1."""
    phrases = PHRASES[language]
    question = f"{_pick(phrases.name, n)} ({(phrases.first, phrases.second)[place]})"
    return question, pictures[place].names[language]


def ask_translation(concept: Concept, source_language: str, language: str, n: int) -> Ask:
    """The name in `language`, given the name in `source_language`."""
    question = _pick(PHRASES[language].translate, n)
    return _named(question, concept, source_language), concept.names[language]


def ask_description(concept: Concept, language: str, n: int) -> Ask:
    """Words that fit the picture: the name, then the keywords."""
    phrases = PHRASES[language]
    words = [concept.names[language], *concept.keywords[language]]
    return _pick(phrases.describe, n), phrases.comma.join(words)


def ask_other_words(concept: Concept, language: str, n: int) -> Ask:
    """The keywords of what the picture shows.

    Raises:
      ValueError: the concept has no keywords in this language.
    """
    phrases = PHRASES[language]
    if not concept.keywords[language]:
        raise ValueError(f"{concept.codepoint} has no keywords in {language!r}; ask something else")
    return _pick(phrases.other_words, n), phrases.comma.join(concept.keywords[language])


def ask_is_it(concept: Concept, shown: Concept, language: str, n: int) -> Ask:
    """Whether the picture, which shows `shown`, shows `concept`; the question names `concept`."""
    phrases = PHRASES[language]
    question = _named(_pick(phrases.is_it, n), concept, language)
    return question, _yes_no(concept, shown, language)


def ask_letter(
    concept: Concept, wrong: Sequence[Concept], place: int, language: str, n: int
) -> Ask:
    """The letter of the right name among options.

    Args:
      concept: what the picture shows.
      wrong: the concepts of the other options, in their order.
      place: index of the right option, from 0.

    Raises:
      ValueError: there are more options than `LETTERS`, `place` is none of them, or the right
        concept is among the wrong ones.
    """
    if not 0 <= place <= len(wrong) < len(LETTERS):
        raise ValueError(
            f"place {place} among {len(wrong) + 1} options; expected at most {len(LETTERS)} options "
            "and the index of one"
        )
    if any(option.codepoint == concept.codepoint for option in wrong):
        raise ValueError(f"the right option {concept.codepoint} is also a wrong one")
    options = [*wrong[:place], concept, *wrong[place:]]
    lines = [f"{letter}. {o.names[language]}" for letter, o in zip(LETTERS, options, strict=False)]
    return "\n".join([_pick(PHRASES[language].letter, n), *lines]), LETTERS[place]


def ask_kind(concept: Concept, language: str, n: int) -> Ask:
    """Whether the picture shows an animal, a plant or food."""
    phrases = PHRASES[language]
    words = {"animals": phrases.animal, "plants": phrases.plant, "food": phrases.food}
    return _pick(phrases.kind, n), words[concept.category]


def ask_which(wanted: Concept, pictures: tuple[Concept, Concept], language: str, n: int) -> Ask:
    """Which of two pictures shows `wanted`.

    Raises:
      ValueError: not exactly one of the pictures shows it.
    """
    places = [i for i, shown in enumerate(pictures) if shown.codepoint == wanted.codepoint]
    if len(places) != 1:
        raise ValueError(f"{len(places)} of the two pictures show {wanted.codepoint}; expected one")
    phrases = PHRASES[language]
    answer = (phrases.first, phrases.second)[places[0]]
    return _named(_pick(phrases.which, n), wanted, language), answer


def ask_same(pictures: tuple[Concept, Concept], language: str, n: int) -> Ask:
    """Whether two pictures show the same thing."""
    return _pick(PHRASES[language].same, n), _yes_no(*pictures, language)


def _pick(phrasings: Sequence[str], n: int) -> str:
    return phrasings[n % len(phrasings)]


def _named(phrasing: str, concept: Concept, language: str) -> str:
    return phrasing.replace("{name}", concept.names[language])


def _yes_no(one: Concept, other: Concept, language: str) -> str:
    phrases = PHRASES[language]
    return phrases.yes if one.codepoint == other.codepoint else phrases.no
