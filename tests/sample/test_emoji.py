import hashlib
import io
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pangea_jax import languages
from pangea_jax.sample import emoji, sources
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.sample.sources import SourceError, clean_name, clean_names
from tests.sample.packages import write_package


@pytest.fixture(scope="module")
def store():
    return SampleStore()


@pytest.fixture(scope="module")
def concepts():
    return emoji.load_concepts()


def test_shipped_files_are_intact(store):
    store.verify()


@pytest.mark.parametrize("language", languages.EMOJI)
def test_names_are_clean_distinct_and_in_their_script(concepts, language, in_script):
    names = [concept.names[language] for concept in concepts]
    assert len(set(names)) == len(names)
    assert all(
        name == " ".join(name.split()) == unicodedata.normalize("NFC", name) for name in names
    )
    assert np.mean([in_script(name, language) for name in names]) > 0.98


def test_names_known_from_dictionaries(concepts):
    cat = next(concept for concept in concepts if concept.char == "🐱")
    banana = next(concept for concept in concepts if concept.char == "🍌")
    assert (cat.codepoint, cat.category, banana.category) == ("1f431", "animals", "food")
    expected = {"en": "banana", "de": "Banane", "ru": "банан", "hi": "केला", "ja": "バナナ"}
    expected |= {"ar": "موز", "zh": "香蕉", "sw": "ndizi", "ko": "바나나", "el": "μπανάνα"}
    assert {language: banana.names[language] for language in expected} == expected


@pytest.mark.parametrize("language", languages.EMOJI)
def test_keywords_are_clean_other_words(concepts, language, in_script):
    given = [concept.keywords[language] for concept in concepts]
    for concept, words in zip(concepts, given, strict=True):
        folded = [word.casefold() for word in words]
        assert len(set(folded)) == len(words) <= sources.MAX_KEYWORDS
        assert concept.names[language].casefold() not in folded
        assert not any(set(word) & set(",،、，;↑") for word in words)
        assert all(
            word == " ".join(word.split()) == unicodedata.normalize("NFC", word) for word in words
        )
    assert np.mean([bool(words) for words in given]) > 0.9
    assert np.mean([in_script(word, language) for words in given for word in words]) > 0.95


def test_categories_are_animals_plants_and_food(concepts):
    of = {concept.char: concept.category for concept in concepts}
    assert Counter(of.values()) == {"food": 129, "animals": 127, "plants": 27}
    assert {char for char in of if of[char] == "plants"} == sources.PLANTS
    assert [of[char] for char in "🐈🌷🌵🌽🪺"] == ["animals", "plants", "plants", "food", "animals"]


def test_drawings_are_whole_and_distinct(store):
    seen = set()
    for key in store.image_index["key"].to_pylist():
        image = Image.open(io.BytesIO(store.image(key)))
        assert (image.format, image.mode, image.size) == ("WEBP", "RGBA", (64, 64))
        pixels = np.asarray(image)
        assert 0.02 < (pixels[..., 3] > 128).mean() <= 1, key
        seen.add(hashlib.sha256(pixels.tobytes()).digest())
    assert len(seen) == store.image_index.num_rows


def test_licences_travel_with_the_drawings():
    notice = (emoji.DIRECTORY / "NOTICE.md").read_text(encoding="utf-8")
    for artist in sources.ARTISTS:
        licence = emoji.DIRECTORY / f"images_{artist.id}" / "LICENSE.md"
        for text in (notice, licence.read_text(encoding="utf-8")):
            assert artist.spdx in text
            assert artist.author in text
            assert artist.url in text
    unicode_licence = emoji.DIRECTORY / "LICENSE-Unicode-3.0.txt"
    assert "UNICODE LICENSE V3" in unicode_licence.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "language", "clean"),
    [
        ("लाल सेब, सेवफल, लाल, फल", "hi", "लाल सेब"),
        ("টার্কি ,টার্কি মোরগ", "bn", "টার্কি"),
        ("миска, з якої піднімається пара", "uk", "миска, з якої піднімається пара"),
        ("tai (ndege)", "sw", "tai"),
        ("آب\u200cنبات\u200c", "fa", "آب\u200cنبات"),
        (" e\u0301  x ", "fr", "é x"),
    ],
)
def test_clean_name(name, language, clean):
    assert clean_name(name, language) == clean


def test_keywords_lose_the_name_copies_and_lists():
    words = ["feline", "Cat", "Feline", "pet, animal", "pet (dear)", "a", "b", "c", "d"]
    assert sources.clean_keywords(words, "cat", "en") == ("feline", "pet", "a", "b")
    assert sources.clean_keywords(["केला, फल", "फल"], "केला", "hi") == ("फल",)
    assert sources.clean_keywords(["cat"], "cat", "en") == ()


def test_names_are_not_cleaned_if_two_would_become_equal():
    names = {"1": "फूल, एक", "2": "फूल, दो", "3": "केला, फल"}
    assert clean_names(names, "hi") == {"1": "फूल, एक", "2": "फूल, दो", "3": "केला"}


def test_missing_and_wrong_packages_are_named(tmp_path):
    artist = sources.ARTISTS[0]
    with pytest.raises(SourceError, match=r"iconify-json-noto-.*is missing"):
        sources.Artwork(artist, tmp_path)
    path = tmp_path / sources.archive_name(artist.package, artist.version)
    path.write_bytes(b"no archive")
    with pytest.raises(SourceError, match="cannot be read as an npm package"):
        sources.Artwork(artist, tmp_path)


def test_package_of_another_version_or_licence_is_refused(tmp_path):
    artist = sources.ARTISTS[0]
    path = tmp_path / sources.archive_name(artist.package, artist.version)
    stated = {"name": artist.package, "version": artist.version}
    info = {"license": {"spdx": "GPL-3.0"}}
    write_package(path, {"package.json": stated | {"version": "9.9.9"}, "info.json": info})
    with pytest.raises(SourceError, match=r"holds .* 9\.9\.9, expected .*noto 1\.2\.9"):
        sources.Artwork(artist, tmp_path)
    write_package(path, {"package.json": stated, "info.json": info})
    with pytest.raises(SourceError, match=r"states licence GPL-3\.0, expected Apache-2\.0"):
        sources.Artwork(artist, tmp_path)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The npm archives: from EMOJI_PACKAGES, else downloaded."""
    if given := os.environ.get("EMOJI_PACKAGES"):
        return Path(given)
    folder = tmp_path_factory.mktemp("packages")
    try:
        sources.fetch(folder)
    except SourceError as error:
        pytest.skip(f"the npm packages cannot be downloaded: {error}")
    return folder


def test_rebuilding_gives_the_shipped_concepts_and_drawings(packages, store, concepts):
    artworks = {a.id: sources.Artwork(a, packages) for a in sources.ARTISTS}
    annotations = sources.Annotations(packages)
    rebuilt = sources.select_concepts(annotations, artworks)
    assert tuple(rebuilt) == concepts
    names = artworks["noto"].name_of_codepoint
    drawings = set(store.image_index["key"].to_pylist())
    for artist, artwork in artworks.items():
        for concept in rebuilt[::40]:
            icon = artwork.icon(concept.codepoint, names[concept.codepoint])
            key = emoji.image_key(artist, concept.codepoint)
            assert (icon is not None) == (key in drawings)
            if icon is not None:
                drawn = np.asarray(sources.rasterise(artwork.svg(icon)), np.int16)
                shipped = np.asarray(Image.open(io.BytesIO(store.image(key))), np.int16)
                # The colours of fully transparent pixels are not stored.
                visible = shipped[..., 3:] > 0
                assert np.abs((drawn - shipped) * visible).max() <= 1, key
