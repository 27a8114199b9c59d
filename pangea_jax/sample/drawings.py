"""What the vision tower learns from: every emoji that enough artists draw, far more than the sample holds.

Several of the sets have no code points. Their icons are found by name (`match`).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from pangea_jax.sample import sources
from pangea_jax.sample.sources import Artist, Artwork

ARTISTS_A_CLASS = 3
"""So many artists must draw an emoji that is not in the sample."""

# Icons whose squashed name means another emoji: artist -> name -> the name that the others give it. `cricket` is the
# game. FxEmoji calls an animal's head `cat` and the whole animal `catside`.
_MEANT = {
    **{id: {"cricket": "cricketgame"} for id in ("emojione", "emojione_mono", "noto_v1")},
    "fxemoji": {
        **{animal: f"{animal}face" for animal in ("cat", "dog", "mouse", "pig", "tiger")},
        **{
            f"{animal}side": animal for animal in ("cat", "dog", "leopard", "mouse", "pig", "tiger")
        },
        **{"bunny": "rabbitface", "bunnyside": "rabbit"},
        **{"dragonhead": "dragonface", "dragonside": "dragon"},
        **{"evergreen": "evergreentree", "chilipepper": "hotpepper", "hampster": "hamster"},
    },
}


@dataclass(frozen=True)
class Drawings:
    """Drawings by several artists.

    Attributes:
      classes: the code points that can be told apart, sorted.
      pixels: RGBA, `sources.SIZE` pixels a side.
      labels: of each drawing the place in `classes`.
      artists: of each drawing the id of its artist.
    """

    classes: tuple[str, ...]
    pixels: UInt8[np.ndarray, "N H W 4"]
    labels: Int[np.ndarray, " N"]
    artists: tuple[str, ...]

    def where(self, keep: Sequence[bool]) -> "Drawings":
        """Those drawings for which `keep` is true, with the same classes."""
        keep = np.asarray(keep)
        artists = tuple(a for a, wanted in zip(self.artists, keep, strict=True) if wanted)
        return Drawings(self.classes, self.pixels[keep], self.labels[keep], artists)

    def by(self, artist: str) -> "Drawings":
        return self.where([name == artist for name in self.artists])

    def of(self, codepoints: Collection[str]) -> "Drawings":
        """The drawings of some emoji."""
        return self.where(np.isin(self.labels, class_places(self.classes, codepoints)))


def class_places(classes: Sequence[str], codepoints: Collection[str]) -> list[int]:
    """The places of the code points among the classes."""
    place = {codepoint: i for i, codepoint in enumerate(classes)}
    return [place[codepoint] for codepoint in codepoints]


def load(packages: Path, artists: Sequence[Artist], concepts: Collection[str]) -> Drawings:
    """Draws every emoji that is in `concepts` or drawn by `ARTISTS_A_CLASS` of the artists. Half a minute.

    Raises:
      SourceError: a package is missing, of another version or under another licence, or no artist
        draws a concept.
    """
    artworks = [Artwork(artist, packages) for artist in artists]
    names = names_by_codepoint(artworks)
    icons = {artwork.artist.id: match(artwork, names) for artwork in artworks}
    drawn = Counter(codepoint for found in icons.values() for codepoint in found)
    if missing := set(concepts) - drawn.keys():
        known = ", ".join(sorted(missing))
        raise sources.SourceError(f"no artist draws {known}; add an artist or leave out the emoji")
    classes = tuple(sorted({c for c, n in drawn.items() if n >= ARTISTS_A_CLASS} | set(concepts)))
    found = [
        (artwork.artist.id, label, sources.rasterise(artwork.svg(icons[artwork.artist.id][code])))
        for artwork in artworks
        for label, code in enumerate(classes)
        if code in icons[artwork.artist.id]
    ]
    ids, labels, pictures = zip(*found, strict=True)
    return Drawings(classes, np.stack([np.asarray(p) for p in pictures]), np.asarray(labels), ids)


def names_by_codepoint(artworks: Collection[Artwork]) -> dict[str, list[str]]:
    """The names of each single code point, squashed: those of the sets with code points, then Unicode's.

    A name that two emoji have belongs to the one that the sets call so.
    """
    names: dict[str, list[str]] = {}
    for artwork in artworks:
        for codepoint, name in artwork.name_of_codepoint.items():
            if "-" not in codepoint and not 0xE000 <= int(codepoint, 16) < 0xF900:  # private use
                names.setdefault(codepoint, []).append(squash(name))
    taken = {name for some in names.values() for name in some}
    for codepoint, some in names.items():
        name = squash(unicodedata.name(chr(int(codepoint, 16)), ""))
        if name and name not in taken:
            some.append(name)
    return names


def match(artwork: Artwork, names: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Code point -> icon name of one artist; by code point if the set has them, else by name."""
    icons = {*artwork.icons["icons"], *artwork.icons["aliases"]}
    icons = {icon for icon in icons if not artwork.is_transformed(icon)}
    if artwork.name_of_codepoint:
        found = {code: artwork.name_of_codepoint.get(code) for code in names}
        return {code: icon for code, icon in found.items() if icon in icons}
    meant = _MEANT.get(artwork.artist.id, {})
    by_name = {squash(icon): icon for icon in sorted(icons)}
    # An icon with another meaning must not stay under its own name.
    by_name = {name: icon for name, icon in by_name.items() if name not in meant} | {
        meant[name]: icon for name, icon in by_name.items() if name in meant
    }
    found = {code: next((n for n in some if n in by_name), None) for code, some in names.items()}
    return {code: by_name[name] for code, name in found.items() if name is not None}


def squash(name: str) -> str:
    """A name without case, blanks and hyphens: "Cat Face" and "cat-face" become "catface"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
