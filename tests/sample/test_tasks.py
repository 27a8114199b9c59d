"""The questions of the evaluation: balanced, the same in every language, without a hint in the blind run."""

import collections
import dataclasses
import itertools

import pytest

from pangea_jax.data.record import IMAGE_MARKER
from pangea_jax.sample import emoji, tasks, turns
from pangea_jax.sample.scores import BY_METRIC
from pangea_jax.sample.tasks import LETTERS, NAMED, NAMES, TASKS, make_items

CODES = ("en", "zh", "ar", "si")
LIMIT = 40
CHOICE = ("letter_accuracy", "yes_no_accuracy", "two_pictures_accuracy")


@pytest.fixture(scope="module")
def by_key():
    concepts = emoji.load_concepts()
    return {f"twemoji/{concept.codepoint}": concept for concept in concepts}


@pytest.fixture(scope="module")
def items(emoji_store):
    return make_items(emoji_store, "unseen_artwork", CODES, ("twemoji",), limit=LIMIT, seed=3)


def of(items, metric):
    return [item for item in items if item.metric == metric]


def test_every_kind_asks_about_every_thing_in_every_language(items):
    assert collections.Counter(item.metric for item in items) == dict.fromkeys(TASKS, 4 * LIMIT)
    assert {"exact_match", *TASKS} == set(BY_METRIC)
    for metric in TASKS:
        mine = of(items, metric)
        assert len({(item.language, item.images, item.question) for item in mine}) == len(mine)


def test_chance_is_one_in_the_number_of_answers(items):
    for item in items:
        assert 1 / len(set(item.candidates)) == BY_METRIC[item.metric].chance
        assert len(set(item.candidates)) == len(item.candidates)


def test_names_are_asked_for_and_ranked(items, by_key):
    for item in of(items, NAMED):
        concept = by_key[item.images[0]]
        assert item.candidates[0] == concept.names[item.language]
        assert len(item.candidates) == NAMES
        assert item.question[0].text == f"{IMAGE_MARKER}\n" + next(
            question
            for question, _ in (turns.ask_name(concept, item.language, n) for n in range(3))
            if item.question[0].text.endswith(question)
        )
        (blind,) = item.blind_images
        assert by_key[blind].names[item.language] not in item.candidates


def test_the_letter_is_that_of_the_true_name(items, by_key):
    places = collections.Counter()
    for item in of(items, "letter_accuracy"):
        name = by_key[item.images[0]].names[item.language]
        _, *lines = item.question[0].text.split("\n")[1:]
        options = dict(line.split(". ", 1) for line in lines)
        assert len(set(options.values())) == LETTERS
        assert options[item.candidates[0]] == name
        assert sorted(item.candidates) == sorted(options) == list(turns.LETTERS)
        assert by_key[item.blind_images[0]].names[item.language] not in options.values()
        places[item.candidates[0], item.language] += 1
    assert set(places.values()) == {LIMIT // LETTERS}


def test_half_of_the_answers_are_yes(items, by_key):
    counts = collections.Counter()
    for item in of(items, "yes_no_accuracy"):
        code, shown = item.language, by_key[item.images[0]]
        yes = turns.ask_is_it(shown, shown, code, 0)[1]
        asked = item.question[0].text.removeprefix(f"{IMAGE_MARKER}\n")
        true = [turns.ask_is_it(shown, shown, code, n)[0] for n in range(6)]
        assert (asked in true) == (item.candidates[0] == yes)
        # The blind picture shows neither the thing in the picture nor the one that is named.
        blind = by_key[item.blind_images[0]]
        assert asked not in {turns.ask_is_it(blind, shown, code, n)[0] for n in range(6)}
        assert blind.names[code] != shown.names[code]
        counts[item.candidates[0] == yes, code] += 1
    assert set(counts.values()) == {LIMIT // 2}


def test_half_of_the_pictures_asked_for_are_the_first(items, by_key):
    counts = collections.Counter()
    for item in of(items, "two_pictures_accuracy"):
        code = item.language
        pictures = tuple(by_key[key] for key in item.images)
        assert item.question[0].text.startswith(f"{IMAGE_MARKER}\n{IMAGE_MARKER}\n")
        asked = item.question[0].text.removeprefix(f"{IMAGE_MARKER}\n" * 2)
        asks = [turns.ask_which(wanted, pictures, code, n) for wanted in pictures for n in range(6)]
        assert {answer for question, answer in asks if question == asked} == {item.candidates[0]}
        blind = [by_key[key].names[code] for key in item.blind_images]
        assert len({*blind, *(concept.names[code] for concept in pictures)}) == 4
        counts[item.candidates[0], code] += 1
    assert set(counts.values()) == {LIMIT // 2}


@pytest.mark.parametrize("metric", TASKS)
def test_blind_one_of_a_group_is_right_whatever_the_model_thinks(items, metric):
    places = TASKS[metric].places
    for code in CODES:
        mine = [item for item in of(items, metric) if item.language == code]
        for group in zip(*[iter(mine)] * places, strict=True):
            # The same input in the image-blind run, and each time another true answer.
            assert len({(item.question, item.blind_images) for item in group}) == 1
            assert len({item.images for item in group}) == places
            assert len({item.candidates[0] for item in group}) == places
            assert len({frozenset(item.candidates) for item in group}) == 1


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_answers_are_as_balanced_as_their_number_allows(emoji_store, limit):
    items = make_items(emoji_store, "unseen_artwork", ("en",), ("twemoji",), limit=limit)
    for metric in CHOICE:
        counts = collections.Counter(item.candidates[0] for item in of(items, metric))
        assert sum(counts.values()) == limit
        assert max(counts.values()) - min(counts.values()) <= 1


def test_only_the_language_differs_between_languages(items, by_key):
    concepts = list(by_key.values())
    for group in zip(*[iter(items)] * len(CODES), strict=True):
        assert tuple(item.language for item in group) == CODES
        assert len({(item.metric, item.images, item.blind_images) for item in group}) == 1
        if group[0].metric != NAMED:
            continue
        # The names are those of one list of things: some thing has all four of them, each time.
        for names in zip(*(item.candidates for item in group), strict=True):
            assert any(tuple(c.names[code] for code in CODES) == names for c in concepts)


def test_wrong_answers_do_not_depend_on_the_languages(emoji_store, items):
    alone = make_items(emoji_store, "unseen_artwork", ("zh",), ("twemoji",), limit=LIMIT, seed=3)
    assert alone == [item for item in items if item.language == "zh"]


def test_items_depend_on_the_seed_and_kinds_do_not_depend_on_each_other(emoji_store):
    def make(seed, **options):
        artists = ("noto", "openmoji")
        return make_items(emoji_store, "seen_artwork", ("en", "ko"), artists, seed=seed, **options)

    few = make(0, limit=10)
    assert few == make(0, limit=10) != make(1, limit=10)
    for metric in TASKS:
        assert make(0, limit=10, metrics=(metric,)) == of(few, metric)
    assert {item.images[0] for item in few} >= {item.images[0] for item in of(few, NAMED)}
    whole = make(0, metrics=(NAMED,))
    artists = [item.images[0].split("/")[0] for item in whole]
    assert 0.4 < artists.count("noto") / len(artists) < 0.6
    for item in itertools.chain(few, whole):
        assert len({key.split("/")[0] for key in (*item.images, *item.blind_images)}) == 1


def test_phrasings_change_with_the_thing(items):
    english = [item for item in of(items, NAMED) if item.language == "en"]
    assert len({item.question for item in english}) > 1


def test_two_things_with_one_name_are_never_in_one_question(emoji_store, monkeypatch):
    """All things but twelve get the name of one of them, in a language that is not asked."""
    same = emoji.load_concepts()[20].names["ko"]
    concepts = tuple(
        concept if i < 12 else dataclasses.replace(concept, names=dict(concept.names, ko=same))
        for i, concept in enumerate(emoji.load_concepts())
    )
    monkeypatch.setattr(emoji, "load_concepts", lambda: concepts)
    groups = {f"twemoji/{c.codepoint}": i if i < 12 else 12 for i, c in enumerate(concepts)}
    for item in make_items(emoji_store, "unseen_artwork", ("en",), ("twemoji",), limit=30):
        keys = item.images + item.blind_images
        assert len({groups[key] for key in keys}) == len(keys)


def test_an_artist_with_too_few_drawings_is_named(emoji_store, monkeypatch):
    few = emoji.load_concepts()[:9]
    monkeypatch.setattr(emoji, "load_concepts", lambda: few)
    with pytest.raises(ValueError, match="artist 'noto' has drawn 8 things with other names than"):
        make_items(emoji_store, "seen_artwork", ("en",), ("noto",))


def test_an_unknown_split_or_metric_is_an_error(emoji_store):
    with pytest.raises(ValueError, match="split 'dev' is not one of"):
        make_items(emoji_store, "dev", ("en",), ("noto",))
    with pytest.raises(ValueError, match="metric 'bleu' is not one of"):
        make_items(emoji_store, tasks.SPLITS[0], ("en",), ("noto",), metrics=("bleu",))
