import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from pangea_jax import languages
from pangea_jax.data.mixture import (
    Mixture,
    apportion,
    choose,
    column_codes,
    counts,
    read_ids,
    shares,
)

CODES = ("en", "es", "sw", "ko")
PICTURES, TEXTS = 50, 20


@pytest.fixture(scope="module")
def index():
    """For each language, 50 pictures by each of two artists, and 20 texts."""
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
        (0.4, 101, {"en": 40, "es": 21, "sw": 20, "ko": 20}),
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


MANY = tuple(languages.EMOJI)
UNEVEN = {code: 3.0 ** (-i / 5) for i, code in enumerate(MANY)}


@pytest.mark.parametrize("en_ratio", [None, 0.0, 0.2, 0.37, 0.4, 0.8, 0.95])
@pytest.mark.parametrize("codes", [("en", "sw"), CODES, MANY[:8], MANY])
@pytest.mark.parametrize("weights", [None, UNEVEN])
def test_no_language_shrinks_when_the_total_grows(en_ratio, codes, weights):
    drawn = mixture(en_ratio=en_ratio, languages=codes, weights=weights)
    table = shares(drawn)
    found = [counts(drawn, total, {}) for total in range(600)]
    found = np.array([[one[code] for code in table] for one in found])
    assert (np.diff(found, axis=0) >= 0).all()
    assert (found.sum(axis=1) == np.arange(600)).all()
    exact = np.outer(np.arange(600), list(table.values()))
    if en_ratio is not None:
        assert (np.abs(found[:, 0] - exact[:, 0]) <= 0.5 + 1e-6).all()
    # Webster's method may differ from the exact share by slightly more than one.
    assert (np.abs(found - exact) < 1.6).all()


def test_apportionment_is_websters_divisor_method():
    """By the definition, the language with the largest share / (count + 1/2) gets the next example."""
    table = np.random.default_rng(0).dirichlet(np.full(9, 0.5))
    dealt = np.zeros(9, int)
    for total in range(1, 400):
        dealt[np.argmax(table / (dealt + 0.5))] += 1
        assert apportion(total, table) == dealt.tolist()


def test_the_seed_decides(index):
    def rows(seed):
        return choose(index, mixture(num_examples=60), seed).rows

    assert np.array_equal(rows(3), rows(3))
    assert not np.array_equal(np.sort(rows(3)), np.sort(rows(4)))


def test_the_draws_of_a_language_do_not_depend_on_the_others(index):
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
        ({"en_ratio": 1.1}, r"en_ratio must be in \[0, 1\], not 1.1"),
        ({"text_ratio": -0.1}, r"text_ratio must be in \[0, 1\]"),
        ({"num_examples": 0}, "num_examples must be positive"),
        ({"languages": ("es", "sw")}, "English is not in"),
        ({"languages": ("en",)}, "English is the only language"),
        ({"languages": ("en", "he", "iw")}, "names a language twice"),
        ({"languages": ("en", "xx")}, "mixture.languages: unknown language tag 'xx'"),
        ({"weights": {"xx": 1.0}}, "mixture.weights: unknown language tag 'xx'"),
        ({"languages": "es"}, "languages must be a tuple of names, not 'es'"),
        ({"exclude_categories": "ocr"}, "exclude_categories must be a tuple of names, not 'ocr'"),
        ({"exclude_ids": "exclude_ids.txt"}, "exclude_ids must be a tuple of names"),
        ({"exclude_categories": ("ocr,cultural",)}, r"write \('ocr', 'cultural'\)\. If a name"),
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


@pytest.fixture(scope="module")
def uneven():
    """160 records in English, 80 in Spanish, 40 in Korean, in four sources and three categories."""
    made = {
        "general/a": "general",
        "general/b": "general",
        "ocr/web": "ocr",
        "text-only/code": "text",
    }
    rows = [
        {
            "id": f"{code}{i}",
            "language": code,
            "source": list(made)[i % 4],
            "category": list(made.values())[i % 4],
            "kind": "text" if i % 4 == 3 else "image",
        }
        for code, count in (("en", 160), ("es", 80), ("ko", 40))
        for i in range(count)
    ]
    return pa.Table.from_pylist(rows)


def natural(**changes):
    return Mixture(**({"num_examples": None, "language_alpha": 1.0, "text_ratio": None} | changes))


def test_the_natural_mixture_is_every_record_once(uneven):
    choice = choose(uneven, natural())
    assert sorted(choice.rows.tolist()) == list(range(280))
    assert choice.examples_per_language == {"en": 160, "es": 80, "ko": 40}
    assert choice.kinds == {"image": 210, "text": 70}
    assert choice.repeat_factor == {"en/all": 1.0, "es/all": 1.0, "ko/all": 1.0}


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, {"en": 40, "es": 20, "ko": 10}),
        (0.5, {"en": 32, "es": 22, "ko": 16}),  # 1 : sqrt(1/2) : 1/2
        (0.0, {"en": 24, "es": 23, "ko": 23}),
    ],
)
def test_popularity_is_a_power_of_the_number_of_records(uneven, alpha, expected):
    choice = choose(uneven, natural(num_examples=70, language_alpha=alpha))
    assert choice.examples_per_language == expected


def test_weights_and_english(uneven):
    weights = {"es": 3, "ko": 1}
    choice = choose(
        uneven, natural(num_examples=100, language_alpha=None, weights=weights, en_ratio=0.6)
    )
    assert choice.examples_per_language == {"en": 60, "es": 30, "ko": 10}
    only = natural(num_examples=20, languages=("ko", "es"))
    assert choose(uneven, only).examples_per_language == {"ko": 7, "es": 13}


def test_rotating_gives_every_language_every_share(uneven):
    drawn = [
        choose(uneven, natural(num_examples=70, rotate=k, max_repeat=2)).examples_per_language
        for k in range(4)
    ]
    assert drawn[3] == drawn[0]
    for code in ("en", "es", "ko"):
        assert {one[code] for one in drawn} == {40, 20, 10}
    english = natural(num_examples=60, en_ratio=0.5, rotate=1)
    assert choose(uneven, english).examples_per_language == {"en": 30, "es": 10, "ko": 20}


def test_added_english_does_not_change_the_other_languages(uneven):
    def draw(en_ratio):
        added = natural(num_examples=60, en_ratio=en_ratio, design="fixed_multilingual")
        choice = choose(uneven, added)
        mine = column(uneven, "language", choice.rows) != "en"
        return choice, sorted(choice.rows[mine].tolist())

    none, others = draw(0.0)
    assert none.examples_per_language == {"en": 0, "es": 40, "ko": 20}
    for en_ratio, english in ((0.2, 15), (0.4, 40), (0.5, 60), (0.7, 140)):
        choice, same = draw(en_ratio)
        assert same == others
        assert choice.examples_per_language["en"] == english
        assert len(choice.rows) == 60 + english


def test_sources_categories_and_ids_in_and_out(uneven):
    def sources(**changes):
        return choose(uneven, natural(**changes)).examples_per_source

    each = 280 // 4
    assert sources() == dict.fromkeys(("general/a", "general/b", "ocr/web", "text-only/code"), each)
    assert sources(sources=("general/*",)) == {"general/a": each, "general/b": each}
    assert sources(exclude_sources=("general/b", "text*")) == {"general/a": each, "ocr/web": each}
    assert sources(categories=("ocr", "text")) == {"ocr/web": each, "text-only/code": each}
    assert sources(exclude_categories=("general",)) == {"ocr/web": each, "text-only/code": each}
    left_out = tuple(f"en{i}" for i in range(0, 160, 4))
    assert sources(exclude_ids=left_out)["general/a"] == each - 40
    kept = choose(uneven, natural(exclude_ids=left_out)).rows
    assert not set(column(uneven, "id", kept)) & set(left_out)


def test_counts_are_those_of_the_rows(uneven):
    choice = choose(uneven, natural(num_examples=123, language_alpha=0.3, max_repeat=2), seed=4)
    for name, told in (
        ("language", choice.examples_per_language),
        ("source", choice.examples_per_source),
        ("kind", choice.kinds),
    ):
        assert Counter(column(uneven, name, choice.rows).tolist()) == told
    assert choice.summary()["examples_per_source"] == choice.examples_per_source


def test_subsets_are_nested_in_the_natural_mixture(uneven):
    draws = [set(choose(uneven, natural(num_examples=n)).rows.tolist()) for n in range(28, 281, 28)]
    assert [len(draw) for draw in draws] == list(range(28, 281, 28))
    assert all(smaller < larger for smaller, larger in itertools.pairwise(draws))


def test_asking_for_too_many_examples_is_an_error(uneven):
    with pytest.raises(
        ValueError, match=r"100 examples in 'es' repeat each of its 80 records 1\.2"
    ):
        choose(uneven, natural(num_examples=300, language_alpha=0.0, max_repeat=1))
    repeated = choose(uneven, natural(num_examples=300, language_alpha=0.0))
    assert repeated.repeat_factor == {"en/all": 0.625, "es/all": 1.25, "ko/all": 2.5}
    with pytest.raises(ValueError, match="no records from sources"):
        choose(uneven, natural(sources=("nowhere/*",)))


def test_ids_of_a_file(tmp_path):
    (tmp_path / "ids.txt").write_text("# of an evaluation set\na1\n\n  2433684022797.0 \n")
    assert read_ids(tmp_path / "ids.txt") == ("a1", "2433684022797.0")


def test_labels_as_numbers():
    text = pa.chunked_array([["b", None], ["a", "b"]])
    for column in (text, text.dictionary_encode()):
        codes, labels = column_codes(pa.table({"x": column}), "x")
        assert [labels[code] if code >= 0 else None for code in codes] == ["b", None, "a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"es": 1}, "language_alpha": 1.0}, "exclude each other"),
        ({"weights": {"es": -1.0}, "language_alpha": None}, "must be positive"),
        ({"design": "fixed"}, "design 'fixed' is not one of"),
        ({"design": "fixed_multilingual"}, r"en_ratio must be in \[0, 1\), not None"),
    ],
)
def test_a_popularity_that_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        natural(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"es": 1, "sw": 2}}, "no records in language 'sw' from sources"),
        ({"weights": {"es": float("inf")}}, "weights gives no finite shares"),
        ({"language_alpha": float("nan")}, "language_alpha gives no finite shares"),
        ({"language_alpha": 1e9}, "language_alpha gives no finite shares"),
    ],
)
def test_a_popularity_that_these_records_cannot_have(uneven, changes, message):
    with pytest.raises(ValueError, match=message):
        choose(uneven, natural(**({"num_examples": 10, "language_alpha": None} | changes)))
