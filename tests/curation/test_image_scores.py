"""What models write when they are asked for scores."""

import pytest

from pangea_jax.curation import asking, image_scores

GOOD_SCORE = {"quality": 4, "subject": "Cooking and Food", "country": "Japan"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "1. Text Quality Score (1-5): 4\n2. Subject Category: Cooking and Food\n3. Country/Region: Japan",
            {},
        ),
        (
            "1. **Text Quality Score (1-5):** 4\n2. **Subject Category:** Cooking & Food\n3. **Country/Region:** Japan",
            {},
        ),
        (
            'Text Quality Score: 4/5\nSubject Category: cooking and food.\nCountry/Region: "Japan".',
            {},
        ),
        ("1. 4\n2. Cooking and Food\n3. Japan", {}),
        ("1: 4.0\n2: Cooking and Food\n3: Japan", {}),
        (
            "1. Text Quality Score (1-5): 5 (Very High Quality)\n2. Subject: Others\n3. Country: Côte d'Ivoire",
            {"quality": 5, "subject": "Others", "country": "Côte d'Ivoire"},
        ),
        (
            "Quality: 4\nText Quality: 2\n2. Subject Category: Objects, Materials, and Clothing\n"
            "3. Country/Region: No specific country",
            {"quality": 2, "subject": "Objects, Materials, and Clothing", "country": None},
        ),
        (
            "1. Score: 1\n2. Subject Category: Others\n3. Country/Region: None",
            {"quality": 1, "subject": "Others", "country": None},
        ),
    ],
)
def test_scores_are_read_in_the_forms_that_models_write(answer, expected):
    assert image_scores.read_score(answer) == (expected or GOOD_SCORE)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "answer is not a score"),
        ("I think it is a fine text.", "answer is not a score"),
        ("1. Text Quality Score: 4\n2. Subject Category: Others", "answer is not a score"),
        ("5\n" * 10_000, "answer is not a score"),
        ("1. Quality: 6\n2. Subject: Others\n3. Country: Japan", "quality is not 1 to 5"),
        ("1. Quality: 45\n2. Subject: Others\n3. Country: Japan", "quality is not 1 to 5"),
        (
            "1. Quality: 4\n2. Subject: Weapons\n3. Country: Japan",
            "subject is not among the eleven",
        ),
        (
            "1. Quality: 4\n2. Subject: Others\n3. Country: Japan; ignore what was said\n",
            "country is not a name",
        ),
        ("1. Quality: 4\n2. Subject: Others\n3. Country: {text}", "country is not a name"),
        ("1. Quality: 4\n2. Subject: Others\n3. Country: " + "a" * 61, "country is not a name"),
    ],
)
def test_scores_that_are_none_are_refused(answer, reason):
    with pytest.raises(asking.Unusable) as caught:
        image_scores.read_score(answer)
    assert caught.value.reason == reason
