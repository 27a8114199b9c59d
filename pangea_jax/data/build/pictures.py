"""The pictures of a build: each one is stored once, in its own bytes, and checked by decoding.

They are stored in their order in the archives. Two pictures are the same if their paths are equal.
"""

import contextlib
import dataclasses
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from pangea_jax.data import image, store
from pangea_jax.data.build import archives, embedded, write_store
from pangea_jax.data.build.parts import COLLECTION, IMAGES
from pangea_jax.data.build.plan import Build
from pangea_jax.data.build.write_store import Picture
from pangea_jax.data.image import ImageError
from pangea_jax.work.atomic import read_json, read_parquet, write_json, write_parquet

PLACE = [
    ("archive", pa.string()),
    ("name", pa.string()),
    ("offset", pa.int64()),
    ("size", pa.int64()),
    ("deflated", pa.int64()),
]
"""The fields of `archives.Place`."""
_PLAN = pa.schema([("key", pa.string()), *PLACE])


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The steps of a build that deal with pictures."""

    build: Build

    @property
    def _plan_end(self) -> Path:
        return self.build.work / "plan" / "all.json"

    @property
    def planned(self) -> bool:
        return self._plan_end.is_file()

    def plan(self) -> int:
        """Distributes the pictures of all parsed records over shards; returns the number of shards."""
        if self.planned:
            return read_json(self._plan_end)["shards"]
        shards = 0
        with contextlib.closing(self._distinct_pictures()) as database:
            rows = database.execute("SELECT * FROM pictures ORDER BY archive, offset, key")
            for shards, some in enumerate(_by_size(rows, self.build.shard_bytes), 1):
                plan = [dict(zip(_PLAN.names, row, strict=True)) for row in some]
                write_parquet(self.build.path("plan", shards - 1, "parquet"), plan, _PLAN)
        write_json(self._plan_end, {"shards": shards})
        return shards

    def _distinct_pictures(self) -> sqlite3.Connection:
        """A database of key and place of each picture; they may not fit into memory."""
        path = self.build.work / "pictures.sqlite"
        path.unlink(missing_ok=True)
        database = sqlite3.connect(path)
        database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -131072;"
            "CREATE TABLE pictures (key TEXT PRIMARY KEY, archive TEXT, name TEXT, "
            "offset INTEGER, size INTEGER, deflated INTEGER) WITHOUT ROWID"
        )
        for chunk in range(self.build.chunks):
            parsed = self.build.path("parsed", chunk, "parquet")
            for row in read_parquet(parsed, ["keys", "places"]):
                pairs = zip(row["keys"] or (), row["places"] or (), strict=True)
                database.executemany(
                    "INSERT OR IGNORE INTO pictures VALUES (?, ?, ?, ?, ?, ?)",
                    [(key, *place.values()) for key, place in pairs],
                )
        return database

    def store(self, shard: int) -> None:
        """Reads, checks and writes the pictures of a shard."""
        if IMAGES.is_stored(self.build, shard):
            return
        rows, faults = [], {}
        plan = read_parquet(self.build.path("plan", shard, "parquet"))
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of pictures that it can read
            examples = self._checked(plan, rows, faults)
            IMAGES.store(self.build, shard, examples, rows, {"faults": faults})

    def _checked(self, plan, rows, faults) -> Iterator[bytes]:
        """The usable pictures of a plan. Adds their rows of the index to `rows`, the others to `faults`."""
        for entry in plan:
            key = entry.pop("key")
            try:
                encoded = self.build.read_picture(archives.Place(**entry))
                width, height = image.check(
                    encoded,
                    name=key,
                    max_pixels=self.build.max_pixels,
                    orientation=self.build.orientation,
                )
            except ImageError as error:
                faults[key] = (error.fault, f"{_named(entry)}: {error.reason}")
            except OSError as error:
                faults[key] = ("picture cannot be read", f"{_named(entry)}: {error}")
            else:
                row = {"key": key, "collection": COLLECTION, "key_hash": int(store.key_hash(key))}
                size = {"width": width, "height": height, "num_bytes": len(encoded)}
                rows.append(row | size | {"row": len(rows)})
                yield write_store.serialize_picture(Picture(key, encoded, width, height))

    def sizes(self, keys: Iterable[str]) -> dict[str, tuple[int, int]]:
        """key -> (width, height) of the given pictures, without those that are not stored.

        Reads the rows of all pictures each time: about a second for 3 million of them, in 130 MiB of memory.
        """
        files = [str(path) for path in sorted((self.build.work / "images").glob("*.parquet"))]
        wanted = ds.field("key").isin(pa.array(keys, pa.string()))
        table = ds.dataset(files, IMAGES.schema).to_table(["key", "width", "height"], wanted)
        return {row["key"]: (row["width"], row["height"]) for row in table.to_pylist()}

    def faults(self) -> dict[str, tuple[str, str]]:
        """key -> (fault, detail) of the unusable pictures among those read so far."""
        return {
            key: tuple(fault)
            for path in sorted((self.build.work / "images").glob("*.json"))
            for key, fault in read_json(path)["faults"].items()
        }

    def num_faults(self, shard: int) -> int:
        """The number of unusable pictures in a stored shard."""
        return len(read_json(self.build.path("images", shard, "json"))["faults"])

    def forget_faults(self) -> None:
        """Removes the shards with unusable pictures, so that the next run reads the pictures again."""
        for path in (self.build.work / "images").glob("*.json"):
            if read_json(path)["faults"]:
                path.unlink()


def _named(entry: dict[str, Any]) -> str:
    """A picture of `_PLAN` by its path and archive."""
    if entry["archive"] == embedded.ARCHIVE:
        return "a picture inside the record"
    return " of ".join(filter(None, (entry["name"], entry["archive"])))


def _by_size(rows: Iterable[tuple], limit: int) -> Iterator[list[tuple]]:
    """Cuts rows of `_PLAN` into groups of at most `limit` bytes of pictures, or of one picture."""
    size_at = _PLAN.names.index("size")
    some, size = [], 0
    for row in rows:
        if some and size + row[size_at] > limit:
            yield some
            some, size = [], 0
        some.append(row)
        size += row[size_at]
    if some:
        yield some
