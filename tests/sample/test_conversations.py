from collections import Counter, defaultdict

import numpy as np
import pytest

from pangea_jax import languages
from pangea_jax.data.record import IMAGE_MARKER
from pangea_jax.sample import emoji, turns
from pangea_jax.sample.conversations import Plan, TextLessons, picture_record, text_record
from pangea_jax.sample.questions import PHRASES

CONCEPTS = emoji.load_concepts()
CAT, BANANA, ROSE = (
    next(concept for concept in CONCEPTS if concept.char == char) for char in "🐱🍌🌹"
)
ALL = Plan(
    describe=0, name_first=1, other_words=1, is_it=1, letter=1, kind=1, max_turns=5, two_pictures=0
)
PAIRS = Plan(name_both=1, two_pictures=1, which=0.5, same=0.5)

# (question, answer) of each turn; of the second also the pictures.
GOLDEN_ONE = [
    ("Nombra lo que ves.", "rosa"),
    ('¿Es correcto el nombre "rosa"?', "sí"),
    ("¿Qué es: animal, planta o comida?", "planta"),
    ("¿Qué otras palabras encajan?", "flor"),
    ("Elige la letra correcta.\nA. rosa\nB. trébol de cuatro hojas\nC. dónut\nD. águila", "A"),
]
GOLDEN_TWO = (
    ("noto/1f339", "noto/1f34b"),
    [
        ("Benenne, was du siehst. (das erste)", "Rose"),
        ("Benenne, was du siehst. (das zweite)", "Zitrone"),
        ("Ist auf beiden Bildern dasselbe zu sehen?", "nein"),
    ],
)


def record(concept=CAT, language="en", variety=0, plan=ALL, artist="noto"):
    return picture_record(artist, concept, language, variety, plan, CONCEPTS)


def records(plan, languages_=("en", "zh"), varieties=4):
    """Conversations about every concept, with what they are about."""
    for concept in CONCEPTS:
        for language in languages_:
            for variety in range(varieties):
                made = record(concept, language, variety, plan)
                yield concept, language, made, [turn.text for turn in made.turns]


def asked_in(texts):
    """(question, answer) of each turn, without markers."""
    questions = [text.replace(f"{IMAGE_MARKER}\n", "") for text in texts[::2]]
    return list(zip(questions, texts[1::2], strict=True))


def kind_of(question, language):
    """The name of the question's kind, a field of `Phrases`."""
    phrases = PHRASES[language]
    for kind in ("is_it", "which"):
        for phrasing in getattr(phrases, kind):
            before, after = phrasing.split("{name}")
            if question.startswith(before) and question.endswith(after):
                return kind
    for kind in ("name", "describe", "other_words", "letter", "kind", "same"):
        if question.split("\n")[0].split(" (")[0] in getattr(phrases, kind):
            return kind
    raise AssertionError(question)


# Turns


@pytest.mark.parametrize("n", range(6))
def test_each_kind_of_question_has_its_answer(n):
    assert turns.ask_name(CAT, "en", n) == (PHRASES["en"].name[n % 3], "cat face")
    question, answer = turns.ask_translation(CAT, "es", "en", n)
    assert (CAT.names["es"] in question, answer) == (True, "cat face")
    question, answer = turns.ask_description(BANANA, "en", n)
    assert (question in PHRASES["en"].describe, answer) == (
        True,
        ", ".join(["banana", *BANANA.keywords["en"]]),
    )
    question, answer = turns.ask_other_words(BANANA, "en", n)
    assert answer == "fruit, potassium"
    assert turns.ask_other_words(BANANA, "zh", n)[1] == "、".join(BANANA.keywords["zh"])
    assert turns.ask_is_it(CAT, CAT, "en", n)[1] == "yes"
    question, answer = turns.ask_is_it(BANANA, CAT, "en", n)
    assert ("banana" in question, answer) == (True, "no")
    question, answer = turns.ask_letter(CAT, (BANANA, ROSE), 1, "en", n)
    assert question.split("\n")[1:] == ["A. banana", "B. cat face", "C. rose"]
    assert answer == "B"
    kinds = [turns.ask_kind(concept, "en", n)[1] for concept in (CAT, ROSE, BANANA)]
    assert kinds == ["animal", "plant", "food"]
    assert turns.ask_which(ROSE, (CAT, ROSE), "en", n)[1] == "the second"
    assert turns.ask_same((CAT, ROSE), "en", n)[1] == "no"
    assert turns.ask_same((CAT, CAT), "en", n)[1] == "yes"
    question, answer = turns.ask_name_of((CAT, ROSE), 1, "en", n)
    assert ("(the second)" in question, answer) == (True, "rose")


def test_impossible_questions_are_refused():
    without = next(c for c in CONCEPTS if not c.keywords["mn"])
    with pytest.raises(ValueError, match=r"has no keywords in 'mn'"):
        turns.ask_other_words(without, "mn", 0)
    with pytest.raises(ValueError, match="0 of the two pictures"):
        turns.ask_which(BANANA, (CAT, ROSE), "en", 0)
    with pytest.raises(ValueError, match="2 of the two pictures"):
        turns.ask_which(CAT, (CAT, CAT), "en", 0)
    with pytest.raises(ValueError, match="place 3 among 3 options"):
        turns.ask_letter(CAT, (BANANA, ROSE), 3, "en", 0)
    with pytest.raises(ValueError, match="is also a wrong one"):
        turns.ask_letter(CAT, (BANANA, CAT), 0, "en", 0)


# Conversations


@pytest.mark.parametrize("language", languages.EMOJI)
def test_every_conversation_is_valid_in_every_language(language):
    for plan in (Plan(), ALL, PAIRS):
        for concept in CONCEPTS[::41]:
            for variety in range(3):
                record(concept, language, variety, plan).validate()


def test_a_conversation_depends_on_nothing_but_its_row():
    before = record(variety=3)
    assert record(variety=3) == before
    list(records(Plan(), ("en",), 1))
    assert record(variety=3) == before
    varieties = {tuple(t.text for t in record(variety=v).turns) for v in range(8)}
    assert len(varieties) == 8


def test_conversations_are_the_same_with_every_version_of_python():
    texts = [turn.text for turn in record(ROSE, "es", 1, ALL).turns]
    assert asked_in(texts) == GOLDEN_ONE
    pair = record(ROSE, "de", 2, PAIRS)
    assert (pair.images, asked_in([turn.text for turn in pair.turns])) == GOLDEN_TWO


def test_the_name_comes_first_or_last_as_planned():
    for share in (0.0, 1.0):
        plan = Plan(
            describe=0, name_first=share, two_pictures=0, other_words=1, is_it=1, letter=1, kind=1
        )
        for concept, language, _, texts in records(plan, ("en",), 1):
            asked = asked_in(texts)
            place = 0 if share else -1
            assert kind_of(asked[place][0], language) == "name"
            assert asked[place][1] == concept.names[language]
            assert len(asked) <= plan.max_turns


def test_the_shares_are_those_of_the_plan():
    plan = Plan(describe=0.5, other_words=0.6, is_it=0.3, letter=0.2, kind=0.1, two_pictures=0.2)
    count, pairs, total = Counter(), 0, 0
    for _, language, made, texts in records(plan, ("en", "zh"), 4):
        total += 1
        pairs += len(made.images) == 2
        if len(made.images) == 1:
            count.update({kind_of(question, language) for question, _ in asked_in(texts)})
    singles = total - pairs
    assert pairs / total == pytest.approx(plan.two_pictures, abs=0.02)
    assert count["name"] + count["describe"] == singles
    # Other words are asked for after a name alone; a few concepts have none.
    wanted = {"other_words": (1 - plan.describe) * plan.other_words}
    wanted |= {kind: getattr(plan, kind) for kind in ("describe", "is_it", "letter", "kind")}
    for kind, share in wanted.items():
        assert count[kind] / singles == pytest.approx(share, abs=0.02), kind


def test_two_pictures_are_named_and_compared():
    seen = Counter()
    by_name = {"en": {c.names["en"]: c.codepoint for c in CONCEPTS}}
    for concept, language, made, texts in records(PAIRS, ("en",), 4):
        shown = [key.split("/")[1] for key in made.images]
        assert concept.codepoint in shown
        assert made.turns[0].text.startswith(f"{IMAGE_MARKER}\n{IMAGE_MARKER}\n")
        asked = asked_in(texts)
        assert [by_name[language][answer] for _, answer in asked[:2]] == shown
        for question, answer in asked[2:]:
            kind = kind_of(question, language)
            seen[kind] += 1
            if kind == "same":
                assert (answer == "yes") == (shown[0] == shown[1])
            else:
                assert shown[0] != shown[1]
                place = ("the first", "the second").index(answer)
                named = next(c for c in CONCEPTS if c.codepoint == shown[place])
                assert named.names[language] in question
    assert min(seen["same"], seen["which"]) > 200


def test_bad_plans_are_refused():
    with pytest.raises(ValueError, match=r"plan.letter is 1.5; expected a probability"):
        Plan(letter=1.5)
    with pytest.raises(ValueError, match=r"plan.varieties is 0; expected 1 or more"):
        Plan(varieties=0)


# No answer can be guessed without looking


def chi_square(counts):
    """The statistic of equal shares, per degree of freedom; about 1 if they are equal."""
    counts = np.asarray(counts, float)
    expected = counts.mean()
    return ((counts - expected) ** 2).sum() / expected / (len(counts) - 1)


@pytest.fixture(scope="module")
def answers():
    """For each kind of question, the answers and whom they are about."""
    found = defaultdict(list)
    for plan in (ALL, PAIRS):
        for concept, language, _, texts in records(plan, ("en",), 12):
            for question, answer in asked_in(texts):
                found[kind_of(question, language)].append((concept, question, answer))
    return found


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("letter", "ABCD"),
        ("is_it", ("yes", "no")),
        ("same", ("yes", "no")),
        ("which", ("the first", "the second")),
    ],
)
def test_answers_are_balanced(answers, kind, values):
    rows = answers[kind]
    assert len(rows) > 700
    count = Counter(answer for _, _, answer in rows)
    assert set(count) == set(values)
    # One in ten thousand balanced generators is outside.
    assert chi_square([count[value] for value in values]) < {2: 15.1, 4: 7.0}[len(values)]
    # Nor does the concept, its category or the phrasing tell the answer.
    by_concept, by_category, by_phrasing = (defaultdict(Counter) for _ in range(3))
    for concept, question, answer in rows:
        by_concept[concept.codepoint][answer] += 1
        by_category[concept.category][answer] += 1
        by_phrasing[question[:8]][answer] += 1
    for groups, limit in ((by_concept, 1.4), (by_category, 7.0), (by_phrasing, 7.0)):
        many = [c for c in groups.values() if c.total() >= 5]
        mean = np.mean([chi_square([c[value] for value in values]) for c in many])
        assert mean < limit


def test_a_named_thing_does_not_tell_whether_it_is_shown(answers):
    """Names in "no" questions are as common as in "yes" questions."""
    named = {"yes": Counter(), "no": Counter()}
    names = sorted((c.names["en"] for c in CONCEPTS), key=len, reverse=True)
    category = {c.names["en"]: c.category for c in CONCEPTS}
    for _, question, answer in answers["is_it"]:
        name = next(name for name in names if name in question)
        named[answer][category[name]] += 1
    for group in ("animals", "plants", "food"):
        yes, no = (named[answer][group] for answer in ("yes", "no"))
        assert 0.7 < yes / no < 1.4, group


def test_half_of_the_options_have_the_same_category(answers):
    category = {c.names["en"]: c.category for c in CONCEPTS}
    same = [
        len({category[line[3:]] for line in question.split("\n")[1:]}) == 1
        for _, question, _ in answers["letter"]
    ]
    # Options from all concepts are sometimes of one category, too.
    assert 0.5 < np.mean(same) < 0.62


# Text records


def test_translations_name_the_thing_in_the_language_of_the_question():
    text = text_record(BANANA, "es", "de").validate()
    (question, answer) = (turn.text for turn in text.turns)
    assert (text.kind, text.language, answer) == ("text", "de", "Banane")
    assert "plátano" in question
    assert text_record(BANANA, "es", "de") == text
    phrasings = {text_record(c, "es", "de").turns[0].text.split('"')[0] for c in CONCEPTS}
    assert len(phrasings) == 2


def test_text_lessons_are_every_translation_and_the_worded_questions():
    codes = ("en", "sw", "zh")
    lessons = TextLessons(codes, Plan(varieties=2, describe=0, name_first=0, two_pictures=0))
    assert len(lessons) == 283 * (6 * 2 + 5 * 2)
    made = [lessons[i].validate() for i in range(22)]
    assert all(record.images == () for record in made)
    translated, worded = made[:12], made[12:]
    assert len({record.turns[0].text for record in translated}) == 12
    assert {record.language for record in translated} == set(codes)
    for record in made:
        assert record.turns[-1].text == CONCEPTS[0].names[record.language]
    pairs = Counter(
        (
            next(c for c in codes if CONCEPTS[0].names[c] == record.turns[0].text.split("\n")[0]),
            record.language,
        )
        for record in worded
    )
    assert pairs == {(one, other): 2 for one in codes for other in codes if one in (other, "en")}
    assert lessons[np.int64(len(lessons) - 1)].category == CONCEPTS[-1].category


@pytest.mark.parametrize("kind", ["is_it", "letter", "which", "same"])
def test_worded_questions_are_answered_by_the_names_in_place_of_the_pictures(kind):
    off = dict.fromkeys(
        (
            "describe",
            "name_first",
            "other_words",
            "is_it",
            "letter",
            "kind",
            "name_both",
            "which",
            "same",
            "two_pictures",
        ),
        0,
    )
    on = {"which": dict(two_pictures=1, which=1), "same": dict(two_pictures=1, same=1)}
    plan = Plan(varieties=3, **off | on.get(kind, {kind: 1}))
    lessons, answers = TextLessons(("en", "zh"), plan), Counter()
    for i in range(0, len(lessons), 5):
        record = lessons[i]
        if record.id.startswith("words/"):
            answers[record.turns[1].text] += 1
            assert record.turns[1].text == read_from_words(record, kind), record
    assert sum(answers.values()) > 400
    assert max(answers.values()) < 0.65 * sum(answers.values())


def read_from_words(record, kind):
    """The answer, found in the text of the question alone."""
    lines, phrases = record.turns[0].text.split("\n"), PHRASES[record.language]
    thing = {name: c.codepoint for c in CONCEPTS for name in (c.names["en"], c.names["zh"])}
    if kind == "letter":
        return next(line[0] for line in lines[2:] if thing[line[3:]] == thing[lines[0]])
    if kind == "same":
        return phrases.yes if thing[lines[0]] == thing[lines[1]] else phrases.no
    before, after = next(
        (before, after)
        for before, after in (phrasing.split("{name}") for phrasing in getattr(phrases, kind))
        if lines[-1].startswith(before) and lines[-1].endswith(after)
    )
    named = thing[lines[-1].removeprefix(before).removesuffix(after)]
    if kind == "is_it":
        return phrases.yes if named == thing[lines[0]] else phrases.no
    return phrases.first if named == thing[lines[0]] else phrases.second
