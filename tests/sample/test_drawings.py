import numpy as np
import pytest

from pangea_jax.sample import drawings, emoji, sources
from pangea_jax.sample.sources import Artist, Artwork, SourceError
from tests.sample.packages import write_package

CAT, CAT_FACE, CRICKET, GAME, FLAG = "1f408", "1f431", "1f997", "1f3cf", "1f1e9-1f1ea"
SQUARE = '<rect width="16" height="16" fill="{}"/>'
CHARS = {CAT: "cat", CAT_FACE: "cat-face", CRICKET: "cricket", GAME: "cricket-game", FLAG: "flag"}


@pytest.fixture
def draw(tmp_path):
    """Writes the package of an artist, whose icons are squares, and returns the artist."""

    def make(id, names, chars=None, aliases=None):
        artist = Artist(id, f"@test/{id}", "1.0.0", id, "nobody", "https://example.org", "MIT")
        files = {
            "package.json": {"name": artist.package, "version": artist.version},
            "info.json": {"license": {"spdx": "MIT"}},
            "icons.json": {
                "icons": {name: {"body": SQUARE.format("red")} for name in names},
                "aliases": aliases or {},
            },
            "chars.json": chars or {},
        }
        write_package(tmp_path / sources.archive_name(artist.package, "1.0.0"), files)
        return artist

    return make


def matched(tmp_path, *artists):
    artworks = [Artwork(artist, tmp_path) for artist in artists]
    names = drawings.names_by_codepoint(artworks)
    return [drawings.match(artwork, names) for artwork in artworks]


def test_icons_are_matched_by_code_point_else_by_name(draw, tmp_path):
    coded = draw("coded", CHARS.values(), CHARS)
    named = draw("named", ["CatFace", "cat", "unknown"])
    by_code, by_name = matched(tmp_path, coded, named)
    assert by_code == {CAT: "cat", CAT_FACE: "cat-face", CRICKET: "cricket", GAME: "cricket-game"}
    assert by_name == {CAT: "cat", CAT_FACE: "CatFace"}


def test_icons_are_also_matched_by_the_name_of_unicode(draw, tmp_path):
    # CLDR's "camel" is Unicode's DROMEDARY CAMEL.
    coded = draw(
        "coded", ["camel", "two-hump-camel"], {"1f42a": "camel", "1f42b": "two-hump-camel"}
    )
    named = draw("named", ["dromedarycamel", "bactrian-camel"])
    assert matched(tmp_path, coded, named)[1] == {
        "1f42a": "dromedarycamel",
        "1f42b": "bactrian-camel",
    }


def test_a_name_of_unicode_that_another_emoji_has_is_not_used(draw, tmp_path):
    # 1f601 is GRINNING FACE WITH SMILING EYES in Unicode, but CLDR gives this name to 1f604.
    chars = {"1f601": "beaming-face", "1f604": "grinning-face-with-smiling-eyes"}
    coded = draw("coded", chars.values(), chars)
    named = draw("named", ["grinning-face-with-smiling-eyes"])
    assert matched(tmp_path, coded, named)[1] == {"1f604": "grinning-face-with-smiling-eyes"}


def test_icons_with_another_meaning(draw, tmp_path):
    coded = draw("coded", CHARS.values(), CHARS)
    mozilla = draw("fxemoji", ["cat", "catside"])
    game = draw("noto_v1", ["cricket"])
    _, heads, games = matched(tmp_path, coded, mozilla, game)
    assert heads == {CAT_FACE: "cat", CAT: "catside"}
    assert games == {GAME: "cricket"}


def test_flipped_icons_are_left_out_and_aliases_are_followed(draw, tmp_path):
    aliases = {"cat-face": {"parent": "cat"}, "cricket": {"parent": "cat", "hFlip": True}}
    coded = draw("coded", CHARS.values(), CHARS)
    named = draw("named", ["cat"], aliases=aliases)
    assert matched(tmp_path, coded, named)[1] == {CAT: "cat", CAT_FACE: "cat-face"}


def test_classes_are_what_enough_artists_draw_and_the_concepts(draw, tmp_path):
    artists = [draw("coded", CHARS.values(), CHARS), draw("one", ["cat"]), draw("two", ["cat"])]
    found = drawings.load(tmp_path, artists, [GAME])
    assert found.classes == (GAME, CAT)
    assert found.artists == ("coded", "coded", "one", "two")
    assert found.labels.tolist() == [0, 1, 1, 1]
    assert found.pixels.shape == (4, sources.SIZE, sources.SIZE, 4)
    assert (found.pixels[0, 8, 8] == (255, 0, 0, 255)).all()
    assert found.of([GAME]).artists == ("coded",)
    assert found.by("two").labels.tolist() == [1]
    assert isinstance(found.by("two").pixels, np.ndarray)


def test_a_concept_that_nobody_draws_is_named(draw, tmp_path):
    with pytest.raises(SourceError, match="no artist draws 1f34c; add an artist"):
        drawings.load(tmp_path, [draw("coded", CHARS.values(), CHARS)], ["1f34c"])


def test_the_test_artist_is_not_learned_from():
    assert not any("twemoji" in artist.package for artist in sources.TOWER_ARTISTS)
    ids = [artist.id for artist in sources.TOWER_ARTISTS]
    assert len(set(ids)) == len(ids) == 10


def test_the_notice_credits_every_artist_of_the_tower():
    notice = (emoji.DIRECTORY / "NOTICE.md").read_text(encoding="utf-8")
    learned = notice.split("## The vision tower")[1]
    for artist in sources.TOWER_ARTISTS:
        (entry,) = (part for part in learned.split("### ") if part.startswith(f"{artist.title}\n"))
        assert artist.author in entry
        assert artist.spdx in entry
        assert f"{artist.package} {artist.version}" in entry
