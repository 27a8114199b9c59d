"""The questions of the sample's evaluation, asked as in training (`pangea_jax.sample.turns`).

    exact_match             What is this?  The answer must be the name, written in full.
    rank_accuracy           The same question: the likeliest of ten names must be the true one.
    letter_accuracy         Which of these is it?  The likeliest of four letters must be the right one.
    yes_no_accuracy         Is this: cat?  Half of the answers are yes, half no.
    two_pictures_accuracy   Which one shows: cat?  Half of the answers are the first, half the second.

All languages have the same pictures, wrong answers and phrasings, so that only the language differs. No language has
one name for two of the things in a question. Every question is also asked image-blind: its pictures are replaced by
drawings of other things, which the question does not name. Then the question alone has to give the answer, and it
cannot: questions come in groups, the same question with the pictures that make each of its answers right (ten names,
four letters, yes and no, the first and the second). In the image-blind run all of a group have the same pictures, so
exactly one of them is answered rightly.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from pangea_jax.data.record import IMAGE_MARKER, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.sample import emoji, turns
from pangea_jax.sample.emoji import Concept

SPLITS = ("seen_artwork", "unseen_artwork")
NAMED = "rank_accuracy"
"""Items of this score are also answered in words, for `exact_match`."""
NAMES, LETTERS = 10, len(turns.LETTERS)


@dataclasses.dataclass(frozen=True)
class Item:
    """One question in one language.

    Attributes:
      metric: the score that it counts for, a key of `TASKS`.
      images: keys of its pictures.
      blind_images: keys of the pictures in the image-blind run.
      candidates: possible answers. The first one is the true one.
    """

    metric: str
    split: str
    language: str
    question: tuple[Turn, ...]
    images: tuple[str, ...]
    blind_images: tuple[str, ...]
    candidates: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a question is about, for all languages.

    Attributes:
      concept: what is asked about.
      others: things with other names: first further answers, then those in the blind pictures.
      place: number of the right answer, from 0, among the same answers in all cases of a group.
      n: number of the phrasing.
    """

    concept: Concept
    others: tuple[Concept, ...]
    place: int
    n: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """A case in one language.

    Attributes:
      question: without image markers.
      candidates: possible answers in a fixed order; the case's `place` is the true one.
      shown, blind: what the pictures show, and what those of the image-blind run show.
    """

    question: str
    candidates: Sequence[str]
    shown: Sequence[Concept]
    blind: Sequence[Concept]


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
      ask: puts a case into a language.
      others: number of other things that a case needs.
      places: number of places that the right answer can have; so many questions are a group.
    """

    ask: Callable[[Case, str], Asked]
    others: int
    places: int


def _name(case: Case, language: str) -> Asked:
    *others, blind = case.others
    could_be = (case.concept, *others)
    asks = [turns.ask_name(shown, language, case.n) for shown in could_be]
    return _chosen(asks, case, [could_be[case.place]], [blind])


def _letter(case: Case, language: str) -> Asked:
    *others, blind = case.others
    options = (case.concept, *others)
    asks = [
        turns.ask_letter(shown, (*options[:i], *options[i + 1 :]), i, language, case.n)
        for i, shown in enumerate(options)
    ]
    return _chosen(asks, case, [options[case.place]], [blind])


def _yes_no(case: Case, language: str) -> Asked:
    other, blind = case.others
    could_be = (case.concept, other)
    asks = [turns.ask_is_it(case.concept, shown, language, case.n) for shown in could_be]
    return _chosen(asks, case, [could_be[case.place]], [blind])


def _two_pictures(case: Case, language: str) -> Asked:
    other, *blind = case.others
    orders = ((case.concept, other), (other, case.concept))
    asks = [turns.ask_which(case.concept, shown, language, case.n) for shown in orders]
    return _chosen(asks, case, orders[case.place], blind)


def _chosen(asks: Sequence[turns.Ask], case: Case, shown, blind) -> Asked:
    """The question whose answer is the case's; the answers of all of them are the candidates."""
    return Asked(asks[case.place][0], [answer for _, answer in asks], shown, blind)


TASKS = {
    NAMED: Task(_name, NAMES, NAMES),
    "letter_accuracy": Task(_letter, LETTERS, LETTERS),
    "yes_no_accuracy": Task(_yes_no, 2, 2),
    "two_pictures_accuracy": Task(_two_pictures, 3, 2),
}


def make_items(
    store: RecordStore,
    split: str,
    languages: Sequence[str],
    artists: Collection[str],
    *,
    metrics: Collection[str] = tuple(TASKS),
    limit: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """The questions of a split: of each kind, about every thing, in every language.

    The pictures are drawings by `artists` in turn. All pictures of a question are by one artist.

    Args:
      metrics: the kinds of questions, keys of `TASKS`.
      limit: number of things to ask about, chosen at random with the seed; None: all.

    Raises:
      ValueError: the split or a metric is unknown, or an artist has drawn too few things.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    if unknown := sorted(set(metrics) - set(TASKS)):
        raise ValueError(f"metric {unknown[0]!r} is not one of {tuple(TASKS)}")
    drawn = _drawn(store, artists)
    concepts = [c for c in emoji.load_concepts() if any(c in theirs for theirs in drawn.values())]
    asked = sorted(np.random.default_rng(seed).permutation(len(concepts))[:limit])
    items = []
    for number, (metric, task) in enumerate(TASKS.items()):
        if metric not in metrics:
            continue
        rng = np.random.default_rng((seed, number))  # so that each kind is independent of the rest
        things = [concepts[which] for which in asked]
        for case, artist in _cases(task, things, drawn, rng):
            items += [_item(metric, split, case, language, artist) for language in languages]
    return items


def _cases(
    task: Task, things: Sequence[Concept], drawn: Mapping[str, Sequence[Concept]], rng
) -> Iterator[tuple[Case, str]]:
    """As many cases as things, and whose drawings they show. Each thing is shown once if its artist has drawn it."""
    shuffled = [things[i] for i in rng.permutation(len(things))]
    for number, start in enumerate(range(0, len(shuffled), task.places)):
        first, *rest = group = shuffled[start : start + task.places]
        able = [artist for artist, theirs in drawn.items() if all(c in theirs for c in group)]
        able = able or [artist for artist, theirs in drawn.items() if first in theirs]
        artist = able[number % len(able)]
        theirs = drawn[artist]
        further = (theirs[i] for i in rng.permutation(len(theirs)))
        candidates = itertools.chain((c for c in rest if c in theirs), further)
        others = _unlike(first, candidates, task.others, artist)
        n = int(rng.integers(60))
        for place in range(len(group)):
            yield Case(first, others, place, n), artist


def _item(metric: str, split: str, case: Case, language: str, artist: str) -> Item:
    asked = TASKS[metric].ask(case, language)
    keys = [
        tuple(emoji.image_key(artist, concept.codepoint) for concept in concepts)
        for concepts in (asked.shown, asked.blind)
    ]
    text = "\n".join([*[IMAGE_MARKER] * len(asked.shown), asked.question])
    truth = asked.candidates[case.place]
    wrong = (c for i, c in enumerate(asked.candidates) if i != case.place)
    return Item(metric, split, language, (Turn("user", text),), *keys, (truth, *wrong))


def _drawn(store: RecordStore, artists: Collection[str]) -> dict[str, list[Concept]]:
    """For each artist the things that they have drawn."""
    keys = frozenset(emoji.picture_keys(store, artists))
    concepts = emoji.load_concepts()
    return {
        artist: [c for c in concepts if emoji.image_key(artist, c.codepoint) in keys]
        for artist in artists
    }


def _unlike(
    concept: Concept, others: Iterable[Concept], count: int, artist: str
) -> tuple[Concept, ...]:
    """The first `count` of `others` that no language calls like `concept` or like each other."""
    chosen = [concept]
    for other in others:
        if len(chosen) > count:
            break
        if not any(other.names[code] == one.names[code] for one in chosen for code in one.names):
            chosen.append(other)
    if len(chosen) <= count:
        raise ValueError(
            f"artist {artist!r} has drawn {len(chosen) - 1} things with other names than "
            f"{concept.codepoint}; a question needs {count}"
        )
    return tuple(chosen[1:])
