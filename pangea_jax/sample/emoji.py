"""The things that the embedded sample names: 283 emoji, with names and keywords in 38 languages.

`concepts.parquet` has them, made by `pangea_jax.sample.sources` from Unicode CLDR. Artists drew them
(`image_key`). Conversations about them are made by `pangea_jax.sample.conversations`.

Splits: `train` (drawings of `TRAIN_ARTISTS` and all text records), `dev_artwork` (OpenMoji: settings
were chosen with it; the shipped configs train on it, too) and `unseen_artwork` (Twemoji, the test; do
not use it to choose settings).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax import assets
from pangea_jax.data.store import RecordStore

DIRECTORY = assets.EMOJI
TRAIN_ARTISTS = ("noto", "fluent", "emojione")
SPLIT_OF_ARTIST = dict.fromkeys(TRAIN_ARTISTS, "train") | {
    "openmoji": "dev_artwork",
    "twemoji": "unseen_artwork",
}
TEST_ARTIST = "twemoji"
CONCEPTS, TOKENIZER = "concepts.parquet", "tokenizer.model"
SIZE = 64
"""Width and height of a stored drawing, pixels."""

_TEXT = pa.string()
_SCHEMA = pa.schema(
    {
        "codepoint": _TEXT,
        "char": _TEXT,
        "category": _TEXT,
        "names": pa.map_(_TEXT, _TEXT),
        "keywords": pa.map_(_TEXT, pa.list_(_TEXT)),
    }
)


@dataclass(frozen=True)
class Concept:
    """One base emoji.

    Attributes:
      codepoint: such as `1f408`.
      char: the emoji itself.
      category: `animals`, `plants` or `food`.
      names: its cleaned CLDR short name in each of `languages.EMOJI`.
      keywords: other words for it in each of them, without the name; for a few there are none.
    """

    codepoint: str
    char: str
    category: str
    names: dict[str, str]
    keywords: dict[str, tuple[str, ...]]


@lru_cache
def load_concepts(directory: Path = DIRECTORY) -> tuple[Concept, ...]:
    """The concept table, ordered by code point."""
    rows = pq.read_table(directory / CONCEPTS).to_pylist()
    for row in rows:
        row["names"] = dict(row["names"])
        row["keywords"] = {code: tuple(words) for code, words in row["keywords"]}
    return tuple(Concept(**row) for row in rows)


def save_concepts(concepts: Sequence[Concept], directory: Path) -> None:
    """Writes the concept table. Parquet is a quarter of the size of JSON."""
    table = pa.Table.from_pylist([vars(concept) for concept in concepts], schema=_SCHEMA)
    pq.write_table(table, directory / CONCEPTS, compression="zstd", compression_level=19)


def image_key(artist: str, codepoint: str) -> str:
    """The key of a drawing in the image store, such as `noto/1f408`."""
    return f"{artist}/{codepoint}"


def picture_keys(store: RecordStore, artists: Collection[str]) -> list[str]:
    """Keys of all drawings by the artists, in the order of the store."""
    keys = store.image_index["key"].to_pylist()
    return [key for key in keys if key.split("/")[0] in artists]
