"""Writes the attribution and licence files that the embedded sample must contain."""

from pathlib import Path

from pangea_jax.sample.emoji import SIZE
from pangea_jax.sample.sources import ARTISTS, CLDR_PACKAGE, CLDR_VERSION, TOWER_ARTISTS, Artist

LICENCES = {
    "Apache-2.0": ("Apache License, Version 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    "MIT": ("MIT License", "https://opensource.org/license/mit"),
    "CC-BY-4.0": (
        "Creative Commons Attribution 4.0 International",
        "https://creativecommons.org/licenses/by/4.0/",
    ),
    "CC-BY-SA-4.0": (
        "Creative Commons Attribution-ShareAlike 4.0 International",
        "https://creativecommons.org/licenses/by-sa/4.0/",
    ),
}

# The licence of Fluent Emoji requires its notice in every copy.
_MIT = """\
Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

_TERMS = {
    "Apache-2.0": "The text of the licence is the file `LICENSE` at the root of this project.\n",
    "MIT": _MIT,
    "CC-BY-4.0": "Offered as is, without warranties of any kind. You may share and adapt the "
    "drawings for any purpose if you\ngive this credit, link the licence and say what you "
    "changed.\n",
    "CC-BY-SA-4.0": "Offered as is, without warranties of any kind. You may share and adapt the "
    "drawings for any purpose if you\ngive this credit, link the licence and say what you changed; "
    "what you make from them must be\nshared under the same licence. It covers the files of this "
    "folder, not the rest of the project.\n",
}


IN_SAMPLE = f"a selection, rasterised from SVG to {SIZE} x {SIZE} pixels, lossless WebP."
_IN_TOWER = "rasterised from SVG, trained on as random views; the weights hold no drawing."


def credit(artist: Artist, changed: str = IN_SAMPLE) -> str:
    """The attribution of one set: title, author, source, licence and changes."""
    name, url = LICENCES[artist.spdx]
    return (
        f"{artist.title} by {artist.author} ({artist.url}).\n"
        f"Licence: {name} ({artist.spdx}, {url}).\n"
        f"Source: npm package {artist.package} {artist.version}.\n"
        f"Changed: {changed}\n"
    )


def write(directory: Path, cldr_licence: str) -> None:
    """Writes `NOTICE.md`, a `LICENSE.md` beside each artist's drawings, and `cldr_licence`."""
    for artist in ARTISTS:
        text = f"# {artist.title}\n\n{credit(artist)}\n{_TERMS[artist.spdx]}"
        (directory / f"images_{artist.id}" / "LICENSE.md").write_text(text, encoding="utf-8")
    (directory / "LICENSE-Unicode-3.0.txt").write_text(cldr_licence, encoding="utf-8")
    credits = "\n".join(f"## `images_{a.id}/`\n\n{credit(a)}" for a in ARTISTS)
    learned = "\n".join(f"### {a.title}\n\n{credit(a, _IN_TOWER)}" for a in TOWER_ARTISTS)
    notice = f"""\
# Sources of the embedded sample

The drawings keep the licences of their artists; each `images_*` folder has its own `LICENSE.md`.
Only `images_openmoji/` is share-alike.

{credits}
## `concepts.parquet`, `tokenizer.model`

Emoji names and keywords: Unicode CLDR annotations, Copyright © Unicode, Inc., licensed under the Unicode
License v3 (Unicode-3.0, `LICENSE-Unicode-3.0.txt`). Taken from the npm package {CLDR_PACKAGE}
{CLDR_VERSION}; changed: a selection, names and keywords cleaned. The vocabulary is trained on them and
on the questions, which are part of this project (Apache-2.0).

## The vision tower, `../sample_model/tower.safetensors`

`launch/pretrain_tower.py` trained it to recognise the drawings of ten sets. Six of them are not part
of this project and were used for this only. OpenMoji and EmojiOne 1.5 are share-alike.

{learned.rstrip()}
"""
    (directory / "NOTICE.md").write_text(notice, encoding="utf-8")
