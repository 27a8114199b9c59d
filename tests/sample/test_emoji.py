import hashlib
import io
import json
import os
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pangea_jax import languages
from pangea_jax.sample import emoji, questions, sources
from pangea_jax.sample.sources import SourceError, clean_name, clean_names

# Beginnings of the Unicode character names of each script (ISO 15924).
SCRIPT_NAMES = {
    "Arab": ("ARABIC",),
    "Beng": ("BENGALI",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Ethi": ("ETHIOPIC",),
    "Grek": ("GREEK",),
    "Hans": ("CJK",),
    "Hebr": ("HEBREW",),
    "Jpan": ("CJK", "HIRAGANA", "KATAKANA"),
    "Kore": ("HANGUL",),
    "Latn": ("LATIN", "MODIFIER LETTER"),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Thai": ("THAI",),
}


@pytest.fixture(scope="module")
def store():
    return emoji.open_store()


@pytest.fixture(scope="module")
def concepts():
    return emoji.load_concepts()


def in_script(text, language):
    names = SCRIPT_NAMES[languages.get(language).script]
    letters = [char for char in text if char.isalpha()]
    return bool(letters) and all(unicodedata.name(char).startswith(names) for char in letters)


def test_shipped_files_are_intact(store):
    store.verify()


@pytest.mark.parametrize("language", languages.EMOJI)
def test_questions_are_in_their_script(language):
    image, text = questions.IMAGE[language], questions.TEXT[language]
    assert len(set(image)) == 3
    assert len(set(text)) == 2
    assert all(phrasing.count("{name}") == 1 for phrasing in text)
    for phrasing in (*image, *text):
        assert in_script(phrasing.replace("{name}", ""), language), phrasing
        assert phrasing == unicodedata.normalize("NFC", phrasing)


@pytest.mark.parametrize("language", languages.EMOJI)
def test_names_are_clean_distinct_and_in_their_script(concepts, language):
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


def test_splits_hold_the_artists_they_name(store):
    artists = {"train": set(emoji.TRAIN_ARTISTS) | {"cldr"}}
    artists |= {"dev_artwork": {"openmoji"}, "unseen_artwork": {"twemoji"}}
    found = {split: set() for split in store.splits}
    for split, source in zip(
        store.index["split"].to_pylist(), store.index["source"].to_pylist(), strict=True
    ):
        found[split].add(source.removeprefix("emoji/"))
    assert found == artists


def test_every_drawing_is_asked_about_in_every_language(store, concepts):
    rows = store.index.select(["id", "language", "kind", "concept"]).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    by_language = Counter(row["language"] for row in rows if row["kind"] == "image")
    assert by_language == dict.fromkeys(languages.EMOJI, store.image_index.num_rows)
    texts = Counter((row["concept"], row["language"]) for row in rows if row["kind"] == "text")
    expected = [(c.codepoint, language) for c in concepts for language in languages.EMOJI]
    assert texts == Counter(expected)


@pytest.mark.parametrize("split", ["train", "dev_artwork", "unseen_artwork"])
def test_records_say_what_the_index_and_the_concepts_say(store, concepts, split):
    by_codepoint = {concept.codepoint: concept for concept in concepts}
    source, rows = store.records(split), store.index.to_pylist()
    rows = [row for row in rows if row["split"] == split]
    assert len(source) == len(rows)
    for row in rows[::101]:
        record, concept = source[row["position"]].validate(), by_codepoint[row["concept"]]
        question, answer = (turn.text for turn in record.turns)
        assert (record.id, record.language) == (row["id"], row["language"])
        assert answer == concept.names[record.language]
        if record.images:
            artist = record.source.removeprefix("emoji/")
            assert record.images == (f"{artist}/{concept.codepoint}",)
            assert question.removeprefix("<image>\n") in questions.IMAGE[record.language]
        else:
            name = concept.names[row["source_language"]]
            assert name != answer
            phrasings = questions.TEXT[record.language]
            assert question in [phrasing.replace("{name}", name) for phrasing in phrasings]


def test_phrasings_and_source_languages_are_spread_evenly(store):
    questions = Counter()
    source = store.records("unseen_artwork")
    for record in source:
        if record.language == "en":
            questions[record.turns[0].text] += 1
    assert len(questions) == 3
    assert min(questions.values()) > 283 / 3 * 0.75
    languages_from = Counter(store.index["source_language"].drop_null().to_pylist())
    assert set(languages_from) == set(languages.EMOJI)
    assert max(languages_from.values()) < 1.5 * min(languages_from.values())


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


def package(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_package_of_another_version_or_licence_is_refused(tmp_path):
    artist = sources.ARTISTS[0]
    path = tmp_path / sources.archive_name(artist.package, artist.version)
    stated = {"name": artist.package, "version": artist.version}
    info = {"license": {"spdx": "GPL-3.0"}}
    package(path, {"package.json": stated | {"version": "9.9.9"}, "info.json": info})
    with pytest.raises(SourceError, match=r"holds .* 9\.9\.9, expected .*noto 1\.2\.9"):
        sources.Artwork(artist, tmp_path)
    package(path, {"package.json": stated, "info.json": info})
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


def test_rebuilding_gives_the_shipped_concepts_drawings_and_records(packages, store, concepts):
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
    for split in store.splits:
        records = store.records(split)
        made = (record for record, _ in emoji.split_records(split, concepts, drawings))
        assert all(a == b for a, b in zip(made, list(records)[:2_000], strict=False))
