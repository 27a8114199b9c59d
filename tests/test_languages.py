import pytest

from pangea_jax import languages


def test_pangeains_has_the_39_languages_and_the_total_of_table_5():
    assert len(languages.PANGEAINS) == 39
    counts = {code: languages.get(code).pangeains_thousands for code in languages.PANGEAINS}
    # The paper prints 2554.6 English and 4389.5 multilingual; its rows are rounded to 0.1.
    assert counts["en"] == 2554.6
    assert sum(counts.values()) - counts["en"] == pytest.approx(4389.5, abs=38 * 0.05)


def test_pangeabench_has_47_languages():
    assert len(languages.XM100) == len(set(languages.XM100)) == 36
    assert len(languages.PANGEABENCH) == 47
    assert set(languages.PANGEABENCH) == {*languages.PANGEAINS, *languages.XM100}


def test_sundanese_is_the_only_language_without_emoji_names():
    assert set(languages.PANGEAINS) - set(languages.EMOJI) == {"su"}
    assert len(languages.EMOJI) == 38


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("iw", "he"),
        ("he", "he"),
        ("zh_simplified", "zh"),
        ("zh-CN", "zh"),
        ("urdu", "ur"),
        ("kr", "ko"),
        ("jp", "ja"),
        ("EN", "en"),
    ],
)
def test_aliases(tag, code):
    assert languages.get(tag).code == code


def test_no_tag_stands_for_two_languages():
    tags = [
        tag.lower()
        for language in languages.LANGUAGES.values()
        for tag in (language.code, *language.aliases)
    ]
    assert len(tags) == len(set(tags))


def test_unknown_tag_names_the_nearest():
    with pytest.raises(KeyError, match="'swahilli'; did you mean sw"):
        languages.get("swahilli")
