import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from pangea_jax import languages
from pangea_jax.data.mixture import Mixture, apportion, choose, shares

CODES = ("en", "es", "sw", "ko")
PICTURES, TEXTS = 50, 20


@pytest.fixture(scope="module")
def index():
    """50 pictures of each of two artists and 20 texts a language."""
    rows = [
        {"language": code, "kind": kind, "source": source}
        for code in CODES
        for kind, source, count in (
            ("image", "made/a", PICTURES),
            ("image", "made/b", PICTURES),
            ("text", "made/words", TEXTS),
        )
        for _ in range(count)
    ]
    return pa.Table.from_pylist(rows)


def mixture(**changes):
    fields = {"num_examples": 200, "en_ratio": 0.4, "languages": CODES, "sources": ("made/a",)}
    return Mixture(**(fields | changes))


def column(index, name, rows):
    return np.asarray(index[name].to_pylist())[rows]


@pytest.mark.parametrize(
    ("en_ratio", "total", "expected"),
    [
        (0.0, 200, {"en": 0, "es": 67, "sw": 67, "ko": 66}),
        (0.4, 200, {"en": 80, "es": 40, "sw": 40, "ko": 40}),
        (0.4, 101, {"en": 41, "es": 20, "sw": 20, "ko": 20}),
        (0.8, 10, {"en": 8, "es": 1, "sw": 1, "ko": 0}),
        (1.0, 200, {"en": 200, "es": 0, "sw": 0, "ko": 0}),
        (None, 200, {"en": 50, "es": 50, "sw": 50, "ko": 50}),
    ],
)
def test_counts_are_exact(index, en_ratio, total, expected):
    choice = choose(index, mixture(en_ratio=en_ratio, num_examples=total))
    assert len(choice.rows) == total
    assert choice.examples_per_language == expected
    drawn = Counter(column(index, "language", choice.rows).tolist())
    assert {code: drawn[code] for code in CODES} == expected
    assert set(column(index, "source", choice.rows)) == {"made/a"}


@pytest.mark.parametrize("text_ratio", [0.0, 0.1, 1.0])
def test_text_has_its_share_in_every_language(index, text_ratio):
    choice = choose(index, mixture(text_ratio=text_ratio))
    kind, language = (column(index, name, choice.rows) for name in ("kind", "language"))
    for code, total in choice.examples_per_language.items():
        assert (kind[language == code] == "text").sum() == round(text_ratio * total)
    assert choice.kinds == {name: int((kind == name).sum()) for name in ("image", "text")}
    assert choice.summary()["num_examples"] == 200


def test_records_repeat_evenly(index):
    choice = choose(index, mixture(num_examples=625))
    for code, total in choice.examples_per_language.items():
        rows = choice.rows[column(index, "language", choice.rows) == code]
        counts = np.unique(rows, return_counts=True)[1]
        assert len(counts) == PICTURES
        assert counts.max() - counts.min() <= 1
        assert choice.repeat_factor[f"{code}/image"] == pytest.approx(total / PICTURES, abs=5e-4)


def test_a_smaller_total_draws_a_subset(index):
    draws = [
        Counter(choose(index, mixture(num_examples=total, text_ratio=0.3)).rows.tolist())
        for total in range(1, 400, 7)
    ]
    for smaller, larger in itertools.pairwise(draws):
        assert smaller <= larger


@pytest.mark.parametrize("en_ratio", [0.0, 0.2, 0.37, 0.4, 0.8, 0.95])
@pytest.mark.parametrize("others", [1, 3, 7, 37])
def test_no_language_shrinks_when_the_total_grows(en_ratio, others):
    table = [en_ratio, *[(1 - en_ratio) / others] * others]
    counts = np.array([apportion(total, table) for total in range(600)])
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts.sum(axis=1) == np.arange(600)).all()
    assert (np.abs(counts - np.outer(np.arange(600), table)) < 1 + 1e-6).all()


def test_the_seed_decides(index):
    def rows(seed):
        return choose(index, mixture(seed=seed, num_examples=60)).rows

    assert np.array_equal(rows(3), rows(3))
    assert not np.array_equal(np.sort(rows(3)), np.sort(rows(4)))


def test_a_language_draws_the_same_whatever_the_others_do(index):
    def english(codes):
        rows = choose(index, mixture(languages=codes, en_ratio=None, num_examples=100)).rows
        return rows[column(index, "language", rows) == "en"].tolist()

    assert english(("en", "es")) == english(("ko", "en"))


def test_shares_sum_to_one():
    for en_ratio in (0, 0.3, 1, None):
        assert sum(shares(mixture(en_ratio=en_ratio)).values()) == pytest.approx(1)
    assert "en" not in shares(mixture(languages=("es", "sw"), en_ratio=0))


def test_too_many_repeats_and_missing_records_are_errors(index):
    with pytest.raises(ValueError, match=r"'en' repeat each of its 50 records 1\.6 times.*=1\.5"):
        choose(index, mixture(max_repeat=1.5))
    with pytest.raises(ValueError, match=r"no image records in language 'fr' from sources"):
        choose(index, mixture(languages=("en", "fr")))
    with pytest.raises(ValueError, match=r"no image records in language 'en'"):
        choose(index, mixture(sources=("made/c",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"en_ratio": 1.1}, r"en_ratio must lie in \[0, 1\], not 1.1"),
        ({"text_ratio": -0.1}, r"text_ratio must lie in \[0, 1\]"),
        ({"num_examples": 0}, "num_examples must be positive"),
        ({"languages": ("es", "sw")}, "English is not in"),
        ({"languages": ("en",)}, "English is the only language"),
        ({"languages": ("en", "he", "iw")}, "names a language twice"),
    ],
)
def test_a_mixture_that_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        mixture(**changes)


def test_the_sample_in_38_languages(emoji_store):
    whole = Mixture(
        num_examples=9_999,
        en_ratio=0.4,
        languages=languages.EMOJI,
        sources=("emoji/noto", "emoji/fluent"),
        text_ratio=0.1,
    )
    choice = choose(emoji_store.index, whole)
    assert len(choice.rows) == 9_999
    assert choice.examples_per_language["en"] == 4_000
    assert {n for code, n in choice.examples_per_language.items() if code != "en"} == {162, 163}
    assert len(choice.examples_per_language) == 38
