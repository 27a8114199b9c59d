"""The conversations of the embedded sample: several turns about one or two drawings, in one language.

    one picture     <image> What is this? -> cat; or: Which words fit the picture? -> cat, pet, kitten;
                    then other words, is it, letter, kind
    two pictures    <image><image> the names of both; then which of them, are they the same
    text            the translation of a name

A conversation is made from artist, concept, language and variety alone. They seed the generator of
all choices, so no conversation depends on another one. `Plan` says which questions are asked how
often. Nothing that could be answered without looking gives the answer away: letters, yes or no, and
the first or the second are drawn evenly for every concept.
"""

import dataclasses
import random
from collections.abc import Sequence

from pangea_jax.data.record import IMAGE_MARKER, Conversation, Turn
from pangea_jax.sample import turns
from pangea_jax.sample.emoji import Concept, image_key, load_concepts
from pangea_jax.sample.questions import PHRASES

# A multiple of every number of phrasings, so that each phrasing is equally likely.
_PHRASINGS = 6
# Nobody would call them an animal, a plant or food, so nobody is asked. Unicode sorts them there.
_NO_KIND = frozenset("🏵🐚🐽🐾🕸🦠🪶🪽🪹🪺🍼🍴🍽🏺🔪🥄🥢🥡🫖🫙")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which conversations are made. All numbers but two are probabilities.

    Attributes:
      varieties: number of conversations about each drawing in each language.
      describe: the picture is described (its name and keywords), instead of the name alone.
      name_first: the name or description is asked first; otherwise it is asked last.
      other_words: asked, too, after a name alone.
      is_it, letter, kind: each of these is asked, too, in any order.
      max_turns: most questions about one picture.
      two_pictures: a conversation has two pictures by the same artist.
      name_both: the names of both pictures are asked first.
      which: asks which of two different pictures shows a given thing; always asked if nothing else is.
      same: asks whether both pictures show the same thing. Then in half of the cases both pictures
        are the same drawing, and `which` is not asked.
      same_category: wrong things in questions, and second pictures, have the same category;
        otherwise they are any.

    Raises:
      ValueError: a probability is not in [0, 1], or a count is below 1.
    """

    varieties: int = 8
    describe: float = 0.95
    name_first: float = 0.5
    other_words: float = 0.2
    is_it: float = 0.08
    letter: float = 0.08
    kind: float = 0.04
    max_turns: int = 4
    two_pictures: float = 0.04
    name_both: float = 0.5
    which: float = 0.5
    same: float = 0.25
    same_category: float = 0.5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("varieties", "max_turns"):
                if value < 1:
                    raise ValueError(f"plan.{field.name} is {value}; expected 1 or more")
            elif not 0 <= value <= 1:
                raise ValueError(f"plan.{field.name} is {value}; expected a probability, 0 to 1")


DEFAULT_PLAN = Plan()


def picture_record(
    artist: str,
    concept: Concept,
    language: str,
    variety: int,
    plan: Plan,
    drawn: Sequence[Concept],
) -> Conversation:
    """A conversation about a drawing, and perhaps a second one.

    Args:
      drawn: what the artist has drawn, in a fixed order; second pictures are from it.
    """
    name = f"{image_key(artist, concept.codepoint)}/{language}/{variety}"
    draw = random.Random(name)
    pictures, asked = _asked(draw, concept, language, plan, drawn)
    question, answer = asked[0]
    asked[0] = (f"{IMAGE_MARKER}\n" * len(pictures) + question, answer)
    return Conversation(
        id=name,
        source=f"emoji/{artist}",
        language=language,
        category=concept.category,
        images=tuple(image_key(artist, shown.codepoint) for shown in pictures),
        turns=_turns(asked),
    )


def text_record(
    concept: Concept, source_language: str, language: str, n: int | None = None
) -> Conversation:
    """The translation of a name.

    Args:
      n: the phrasing; None: the concept and the languages choose it.
    """
    if n is None:
        key = f"{concept.codepoint}/{source_language}/{language}"
        n = random.Random(key).randrange(_PHRASINGS)
    ask = turns.ask_translation(concept, source_language, language, n)
    name = f"text/{concept.codepoint}/{source_language}-{language}"
    return _text(name, concept, language, [ask])


class TextLessons(Sequence[Conversation]):
    """Conversations without pictures, about every concept; a source for Grain.

    A decoder learns from them what a model such as Qwen2 knows before it sees a picture:

        translations        of every name between every two languages, in every phrasing
        worded questions    the questions about one or two pictures, with names in place of the pictures, in the same
                            language or in English: cat -> Is this: dog? -> no

    Args:
      codes: the languages.
      plan: which worded questions are asked; `plan.varieties` conversations for each concept and pair of
        languages.
    """

    def __init__(self, codes: Sequence[str], plan: Plan):
        self._concepts, self._plan = load_concepts(), plan
        pairs = [(one, other) for one in codes for other in codes]
        self._translations = [
            (one, other, n)
            for one, other in pairs
            if one != other
            for n in range(len(PHRASES[other].translate))
        ]
        self._worded = [
            (one, other, variety)
            for one, other in pairs
            if one in (other, "en")
            for variety in range(plan.varieties)
        ]

    def __len__(self) -> int:
        return len(self._concepts) * (len(self._translations) + len(self._worded))

    def __getitem__(self, i) -> Conversation:
        place, which = divmod(int(i), len(self._translations) + len(self._worded))
        concept = self._concepts[place]
        if which < len(self._translations):
            one, other, n = self._translations[which]
            return text_record(concept, one, other, n)
        one, other, variety = self._worded[which - len(self._translations)]
        return _worded_record(concept, one, other, variety, self._plan)

    def __repr__(self) -> str:
        return f"TextLessons(len={len(self)})"


def _worded_record(
    concept: Concept, named_in: str, language: str, variety: int, plan: Plan
) -> Conversation:
    """A conversation about pictures with names in the language `named_in` in their place."""
    name = f"words/{concept.codepoint}/{named_in}-{language}/{variety}"
    pictures, asked = _asked(random.Random(name), concept, language, plan, load_concepts())
    question, answer = asked[0]
    shown = "\n".join(picture.names[named_in] for picture in pictures)
    return _text(name, concept, language, [(f"{shown}\n{question}", answer), *asked[1:]])


def _asked(
    draw: random.Random, concept: Concept, language: str, plan: Plan, drawn: Sequence[Concept]
) -> tuple[tuple[Concept, ...], list[turns.Ask]]:
    """What the pictures show, and the questions about them."""
    if draw.random() < plan.two_pictures:
        return _about_two(draw, concept, language, plan, drawn)
    return (concept,), _about_one(draw, concept, language, plan)


def _about_one(draw: random.Random, concept: Concept, language: str, plan: Plan) -> list[turns.Ask]:
    """Questions about one picture."""
    n = draw.randrange(_PHRASINGS)
    asked = []
    describe = draw.random() < plan.describe
    if not describe and draw.random() < plan.other_words and concept.keywords[language]:
        asked.append(turns.ask_other_words(concept, language, n))
    if draw.random() < plan.is_it:
        named = draw.choice((concept, *_others(draw, concept, 1, plan)))
        asked.append(turns.ask_is_it(named, concept, language, n))
    if draw.random() < plan.letter:
        wrong = _others(draw, concept, len(turns.LETTERS) - 1, plan)
        place = draw.randrange(len(turns.LETTERS))
        asked.append(turns.ask_letter(concept, wrong, place, language, n))
    if draw.random() < plan.kind and concept.char not in _NO_KIND:
        asked.append(turns.ask_kind(concept, language, n))
    draw.shuffle(asked)
    asked = asked[: plan.max_turns - 1]
    ask = turns.ask_description if describe else turns.ask_name
    name = ask(concept, language, n)
    return [name, *asked] if draw.random() < plan.name_first else [*asked, name]


def _about_two(
    draw: random.Random, concept: Concept, language: str, plan: Plan, drawn: Sequence[Concept]
) -> tuple[tuple[Concept, Concept], list[turns.Ask]]:
    """Two pictures, and questions about them; at least one."""
    n = draw.randrange(_PHRASINGS)
    same = draw.random() < plan.same
    (other,) = _others(draw, concept, 1, plan, drawn)
    if same:
        other = draw.choice((concept, other))
    pictures = (concept, other) if draw.random() < 0.5 else (other, concept)
    asked = []
    if draw.random() < plan.name_both:
        asked += [turns.ask_name_of(pictures, place, language, n) for place in (0, 1)]
    which = draw.random() < plan.which
    if same:
        asked.append(turns.ask_same(pictures, language, n))
    elif which or not asked:
        asked.append(turns.ask_which(draw.choice(pictures), pictures, language, n))
    return pictures, asked


def _others(
    draw: random.Random,
    concept: Concept,
    count: int,
    plan: Plan,
    among: Sequence[Concept] | None = None,
) -> list[Concept]:
    """Distinct other concepts, by default among all; with `same_category` all are of its category."""
    near = draw.random() < plan.same_category
    return draw.sample(
        [
            other
            for other in among or load_concepts()
            if other.codepoint != concept.codepoint
            and (not near or other.category == concept.category)
        ],
        count,
    )


def _text(name: str, concept: Concept, language: str, asked: Sequence[turns.Ask]) -> Conversation:
    return Conversation(
        id=name,
        source="emoji/cldr",
        language=language,
        category=concept.category,
        images=(),
        turns=_turns(asked),
    )


def _turns(asked: Sequence[turns.Ask]) -> tuple[Turn, ...]:
    return tuple(
        turn
        for question, answer in asked
        for turn in (Turn("user", question), Turn("assistant", answer))
    )
