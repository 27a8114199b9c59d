"""The pictures of a build: every one that is referred to once, in its own bytes, checked by decoding.

They are stored in the order in which they lie in the archives, and told apart by their paths.
"""

import contextlib
import dataclasses
import os
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.data.build import archives, write_store
from pangea_jax.data import image
from pangea_jax.work.atomic import partial_path, read_json, write_json, write_parquet
from pangea_jax.data.image import ImageError
from pangea_jax.data.build.folder import Build
from pangea_jax.data.build.write_store import Picture

PLACE = [
    ("archive", pa.string()),
    ("name", pa.string()),
    ("offset", pa.int64()),
    ("size", pa.int64()),
    ("deflated", pa.bool_()),
]
"""The fields of `archives.Place`."""
_PLAN = pa.schema([("key", pa.string()), *PLACE])
_RESULT = pa.schema(
    [
        ("key", pa.string()),
        ("row", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("fault", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The steps of a build that deal with pictures."""

    build: Build

    def plan(self) -> int:
        """Shares the pictures of all parsed records out among shards; returns how many shards there are."""
        build, done = self.build, self._planned
        if done.is_file():
            return read_json(done)["shards"]
        path = build.work / "pictures.sqlite"
        path.unlink(missing_ok=True)
        with _scratch_database(path) as database:
            database.execute(
                "CREATE TABLE pictures (key TEXT PRIMARY KEY, archive TEXT, name TEXT, "
                "offset INTEGER, size INTEGER, deflated INTEGER) WITHOUT ROWID"
            )
            for chunk in range(build.chunks):
                parsed = build.path("parsed", chunk, "parquet")
                for row in pq.read_table(parsed, columns=["keys", "places"]).to_pylist():
                    pairs = zip(row["keys"] or (), row["places"] or (), strict=True)
                    database.executemany(
                        "INSERT OR IGNORE INTO pictures VALUES (?, ?, ?, ?, ?, ?)",
                        [(key, *place.values()) for key, place in pairs],
                    )
            ordered = database.execute("SELECT * FROM pictures ORDER BY archive, offset, key")
            shards = 0
            for shards, rows in enumerate(_by_size(ordered, build.shard_bytes), 1):
                rows = [dict(zip(_PLAN.names, row, strict=True)) for row in rows]
                for row in rows:
                    row["deflated"] = bool(row["deflated"])
                write_parquet(build.path("plan", shards - 1, "parquet"), rows, _PLAN)
        write_json(done, {"shards": shards})
        return shards

    @property
    def planned(self) -> bool:
        return self._planned.is_file()

    @property
    def _planned(self) -> Path:
        return self.build.work / "plan_pictures.json"

    def store(self, shard: int) -> None:
        """Reads, checks and writes the pictures of a shard."""
        build = self.build
        done = build.path("images", shard, "json")
        if done.is_file():
            return
        results: list[dict[str, Any]] = []
        path = build.path("images", shard, "array_record")
        plan = pq.read_table(build.path("plan", shard, "parquet")).to_pylist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of pictures that it reads nevertheless
            count, num_bytes = write_store.write_shard(
                path, self._checked(plan, results), write_store.PICTURE_CODEC
            )
        write_parquet(build.path("images", shard, "parquet"), results, _RESULT)
        faults = len(results) - count
        sizes = {"count": count, "num_bytes": num_bytes, "faults": faults}
        write_json(done, sizes | write_store.fingerprint(path))

    def _checked(self, plan, results) -> Iterator[bytes]:
        """The pictures of a plan that can be used; adds what is known of each to `results`."""
        row = 0
        for entry in plan:
            key = entry.pop("key")
            result = {"key": key}
            try:
                encoded = self.build.pictures().read(archives.Place(**entry))
                width, height = image.check(encoded, name=key, max_pixels=self.build.max_pixels)
            except ImageError as error:
                results.append(result | {"fault": error.fault, "detail": error.reason})
                continue
            except OSError as error:
                results.append(result | {"fault": "picture cannot be read", "detail": str(error)})
                continue
            size = {"width": width, "height": height}
            results.append(result | size | {"row": row, "num_bytes": len(encoded)})
            row += 1
            yield write_store.serialize_picture(Picture(key, encoded, width, height))

    def collect(self, shards: int) -> None:
        """Puts what is known of every picture where `open_sizes` finds it."""
        path = self._sizes
        partial = partial_path(path)
        if path.is_file():
            return
        with _scratch_database(partial) as database:
            database.execute(
                "CREATE TABLE sizes (key TEXT PRIMARY KEY, width INTEGER, height INTEGER, "
                "fault TEXT, detail TEXT) WITHOUT ROWID"
            )
            for shard in range(shards):
                table = pq.read_table(self.build.path("images", shard, "parquet"))
                rows = table.select(["key", "width", "height", "fault", "detail"]).to_pylist()
                database.executemany(
                    "INSERT INTO sizes VALUES (:key, :width, :height, :fault, :detail)", rows
                )
        os.replace(partial, path)

    def open_sizes(self) -> "Sizes":
        """What `collect` has put together."""
        return Sizes(self._sizes)

    @property
    def _sizes(self) -> Path:
        return self.build.work / "sizes.sqlite"

    def faults(self, shard: int) -> list[tuple[str, str]]:
        """(key, fault) of the pictures of a shard that cannot be used; empty while it is not stored."""
        path = self.build.path("images", shard, "parquet")
        if not path.is_file():
            return []
        rows = pq.read_table(path, columns=["key", "fault"]).to_pylist()
        return [(row["key"], row["fault"]) for row in rows if row["fault"]]

    def num_faults(self, shard: int) -> int:
        """How many pictures of a stored shard cannot be used."""
        return read_json(self.build.path("images", shard, "json"))["faults"]

    def forget_faults(self) -> None:
        """Removes what was made of files with faults, so that the next run looks at them again."""
        self._sizes.unlink(missing_ok=True)
        for path in (self.build.work / "images").glob("*.json"):
            if read_json(path)["faults"]:
                path.unlink()


class Sizes:
    """Width, height and fault of every picture by its key; read-only, for any number of processes."""

    def __init__(self, path: Path):
        uri = f"{path.resolve().as_uri()}?immutable=1"
        self._database = sqlite3.connect(uri, uri=True)

    def __getitem__(self, key: str) -> tuple[int, int, str | None, str | None]:
        """(width, height, fault, detail); no width and height if there is a fault."""
        query = "SELECT width, height, fault, detail FROM sizes WHERE key = ?"
        return self._database.execute(query, (key,)).fetchone()


@contextlib.contextmanager
def _scratch_database(path: Path) -> Iterator[sqlite3.Connection]:
    """A database that is made anew if the making of it is killed."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -131072"
        )
        yield database
        database.commit()


def _by_size(rows: Iterable[tuple], limit: int) -> Iterator[list[tuple]]:
    """Consecutive rows of `_PLAN`, as many as take `limit` bytes together."""
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
