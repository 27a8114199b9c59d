"""The two parts of a built store, records and pictures: their shards are made by workers, then put in place."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pangea_jax.data import store
from pangea_jax.data.build import write_store
from pangea_jax.data.build.plan import WORK, Build
from pangea_jax.work import paths
from pangea_jax.work.atomic import read_json, read_parquet, write_json, write_parquet

NAME, SPLIT, COLLECTION = "pangeains", "train", "images"


@dataclasses.dataclass(frozen=True)
class Part:
    """Shards of one kind, and how the store describes them.

    Attributes:
      name: their folder, in the work folder and in the store.
      split: their name in TFDS.
      index: the file with one row for each example.
    """

    name: str
    split: str
    features: Mapping[str, Any]
    codec: str
    index: str
    schema: pa.Schema

    def is_stored(self, build: Build, number: int) -> bool:
        return build.path(self.name, number, "json").is_file()

    def store(
        self,
        build: Build,
        number: int,
        examples: Iterable[bytes],
        rows: list[dict[str, Any]],
        facts: Mapping[str, Any],
    ) -> None:
        """Writes one shard into the work folder: the examples, their rows of the index, and a summary.

        Args:
          rows: all columns but `shard` and `position`. May be filled while `examples` are read.
          facts: further entries of the summary. May be filled while `examples` are read.
        """
        path = build.path(self.name, number, "array_record")
        count, num_bytes = write_store.write_shard(path, examples, self.codec)
        write_parquet(build.path(self.name, number, "parquet"), rows, self.schema)
        summary = {"count": count, "num_bytes": num_bytes, **facts} | write_store.fingerprint(path)
        if build.target:
            paths.store(build.target).put_file(str(path), f"{self._waiting(build)}/{path.name}")
            path.unlink()
        write_json(build.path(self.name, number, "json"), summary)

    def _waiting(self, build: Build) -> Path:
        """The folder of the shards that have no place yet."""
        return (build.target or build.out) / WORK / self.name

    def summaries(self, build: Build, shards: int) -> list[dict[str, Any]]:
        """What `store` has written about each shard."""
        return [read_json(build.path(self.name, n, "json")) for n in range(shards)]

    def place(self, build: Build, shards: int, files: dict[str, Any]) -> list[dict[str, Any]]:
        """Moves the shards into the store, leaving out empty ones, and describes them to TFDS and the index.

        Args:
          files: gets the fingerprint of every file placed, for the manifest.

        Returns:
          the shards as the manifest lists them.
        """
        made = self.summaries(build, shards)
        folder = f"{self.name}/{write_store.VERSION}"
        (build.out / folder).mkdir(parents=True, exist_ok=True)
        waiting = self._waiting(build)
        there = paths.children(waiting)
        used = [number for number, shard in enumerate(made) if shard["count"]]
        placed, positions = [], itertools.count()
        with write_store.IndexWriter(build.out / self.index, self.schema) as index:
            for new, old in enumerate(used):
                path = f"{folder}/{write_store.shard_name(NAME, self.split, new, len(used))}"
                shard = build.path(self.name, old, "array_record").name
                if shard in there:  # else a killed run has moved it already
                    paths.move(waiting / shard, (build.target or build.out) / path)
                placed.append({"path": path, "num_records": made[old]["count"]})
                files[path] = {key: made[old][key] for key in ("bytes", "sha256")}
                for row in read_parquet(build.path(self.name, old, "parquet")):
                    index.add(row | {"shard": new, "position": next(positions)})
        written = [self.index]
        if placed:
            sizes = [shard["num_records"] for shard in placed]
            splits = {self.split: (sizes, sum(shard["num_bytes"] for shard in made))}
            with _stand_ins(build, placed):
                write_store.write_metadata(build.out / folder, self.features, splits)
            written += [f"{folder}/dataset_info.json", f"{folder}/features.json"]
        files |= {path: write_store.fingerprint(build.out / path) for path in written}
        return placed


@contextlib.contextmanager
def _stand_ins(build: Build, placed: Iterable[Mapping[str, Any]]) -> Iterator[None]:
    """Empty files instead of the shards that are in a bucket: TFDS looks for their names."""
    files = [build.out / shard["path"] for shard in placed] if build.target else []
    for file in files:
        file.touch()
    yield
    for file in files:
        file.unlink()


_SHARD_AND_ROW = (pa.field("shard", pa.int32()), pa.field("row", pa.int32()))
RECORDS = Part(
    name="records",
    split=SPLIT,
    features=write_store.RECORD_FEATURES,
    codec=write_store.RECORD_CODEC,
    index=store.INDEX,
    schema=pa.schema(
        [
            *write_store.record_schema(),
            pa.field("num_tokens", pa.int32()),
            pa.field("image_sizes", pa.list_(pa.list_(pa.int32()))),
            *_SHARD_AND_ROW,
        ]
    ),
)
IMAGES = Part(
    name="images",
    split=COLLECTION,
    features=write_store.PICTURE_FEATURES,
    codec=write_store.PICTURE_CODEC,
    index=store.IMAGE_INDEX,
    schema=pa.schema(
        [
            *write_store.PICTURE_SCHEMA,
            pa.field("key_hash", pa.uint64()),
            *_SHARD_AND_ROW,
        ]
    ),
)
