"""Writes the prepared form that `pangea_jax.data.store` reads.

TFDS writes the ArrayRecord shards and their description; then every shard is written again with
larger groups and in a canonical order of bytes, so that equal input gives equal files. TFDS makes
every record a group of its own, compressed alone: the records of the sample would take 9 MB
instead of 3. The examples and their order stay the same, and TFDS reads the result unchanged.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import absl.logging
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from pangea_jax.data import store
from pangea_jax.data.record import Conversation

VERSION = "1.0.0"

# A random read decompresses a whole group, so groups are about this large: 128 records of the
# sample, which read in 25 us each and take a third of the room of groups of one; one photograph.
_GROUP_BYTES, _MAX_GROUP = 32_768, 128
# zstd 9 is within 4 % of zstd 19 and 28 times as fast; encoded pictures do not compress.
_RECORD_CODEC, _PICTURE_CODEC = "zstd:9", "uncompressed"
_INDEX_BATCH = 65_536


@dataclass(frozen=True)
class Picture:
    """An encoded picture under its key `<collection>/<name>`; width and height in pixels."""

    key: str
    encoded: bytes
    width: int
    height: int


Row = tuple[Conversation, Mapping[str, str | None]]


def write_store(
    directory: Path,
    *,
    name: str,
    build: str,
    records: Mapping[str, Iterable[Row]],
    images: Mapping[str, Iterable[Picture]],
    columns: tuple[str, ...] = (),
    extra_files: Iterable[Path] = (),
) -> None:
    """Writes a store; nothing of an earlier one is left in its place.

    Args:
      directory: made if absent. Files other than the store's own are left alone.
      name: TFDS name of the data set, snake_case.
      build: command that rebuilds it, quoted in the errors of the reader.
      records: split -> stream of (conversation, values of `columns`).
      images: collection -> stream of pictures, whose keys begin with `<collection>/`.
      columns: text columns of the index beyond the common ones.
      extra_files: further files inside `directory` to put under the manifest's checksums.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {"format": store.FORMAT_VERSION, "name": name, "build": build}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".incomplete-") as scratch:
        work = Path(scratch)
        with _IndexWriter(work / store.INDEX, _record_schema(columns)) as index:
            builder = _RecordsBuilder(name, records, index, work)
            manifest["records"] = _prepare(builder, work, _RECORD_CODEC)
        manifest["images"] = {}
        with _IndexWriter(work / store.IMAGE_INDEX, _PICTURE_SCHEMA) as index:
            for collection, pictures in images.items():
                builder = _ImagesBuilder(name, collection, pictures, index, work)
                manifest["images"] |= _prepare(builder, work, _PICTURE_CODEC)
        made = [store.INDEX, store.IMAGE_INDEX, "records", *(f"images_{c}" for c in images)]
        files = sorted(p for part in made for p in _files(work / part))
        manifest["files"] = {p.relative_to(work).as_posix(): _fingerprint(p) for p in files}
        for path in sorted(extra_files):
            manifest["files"][path.relative_to(directory).as_posix()] = _fingerprint(path)
        _replace(made, work, directory)
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (directory / store.MANIFEST).write_text(text, encoding="utf-8")


class _IndexWriter:
    """Writes rows to a Parquet file in batches, so that millions of rows need little memory."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema, self._rows = schema, []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _INDEX_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> "_IndexWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()


def _record_schema(columns: tuple[str, ...]) -> pa.Schema:
    # Dictionary columns keep the table a few bytes a row in memory, too.
    label = pa.dictionary(pa.int32(), pa.string())
    fields = [("split", label), ("position", pa.int64()), ("id", pa.string())]
    fields += [(name, label) for name in ("source", "language", "category", "kind")]
    fields += [("num_images", pa.int32()), ("num_turns", pa.int32())]
    return pa.schema(fields + [(name, label) for name in columns])


_PICTURE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("collection", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
    ]
)


class _Builder(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder fed by streams given at run time instead of by a download."""

    VERSION = tfds.core.Version(VERSION)
    FEATURES: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, name: str, config: str, data_dir: Path):
        self.name = name
        config = tfds.core.BuilderConfig(name=config, version=VERSION)
        with _quiet_tfds():
            super().__init__(data_dir=data_dir, config=config, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)


class _RecordsBuilder(_Builder):
    FEATURES: ClassVar = {
        "id": tfds.features.Text(),
        "source": tfds.features.Text(),
        "language": tfds.features.Text(),
        "category": tfds.features.Text(),
        "images": tfds.features.Sequence(tfds.features.Text()),
        "roles": tfds.features.Sequence(tfds.features.Text()),
        "texts": tfds.features.Sequence(tfds.features.Text()),
    }

    def __init__(self, name, records, index, data_dir):
        self._records, self._index = records, index
        super().__init__(name, "records", data_dir)

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(split, rows) for split, rows in self._records.items()
        }

    def _generate_examples(self, split, rows):
        for position, (conversation, extra) in enumerate(rows):
            conversation.validate()
            self._index.add(_index_row(split, position, conversation) | dict(extra))
            yield position, _example(conversation)


class _ImagesBuilder(_Builder):
    FEATURES: ClassVar = {
        "key": tfds.features.Text(),
        "encoded": tfds.features.Text(),
        "width": tfds.features.Scalar(np.int32),
        "height": tfds.features.Scalar(np.int32),
    }

    def __init__(self, name, collection, pictures, index, data_dir):
        self._collection, self._pictures, self._index = collection, pictures, index
        super().__init__(name, f"images_{collection}", data_dir)

    def _split_generators(self, dl_manager):
        return {self._collection: self._generate_examples()}

    def _generate_examples(self):
        for position, picture in enumerate(self._pictures):
            if not picture.key.startswith(f"{self._collection}/"):
                raise ValueError(f"key {picture.key!r} is not of collection {self._collection!r}")
            size = {"width": picture.width, "height": picture.height}
            row = {"key": picture.key, "collection": self._collection, "position": position}
            self._index.add(row | size | {"num_bytes": len(picture.encoded)})
            yield position, {"key": picture.key, "encoded": picture.encoded} | size


def _index_row(split: str, position: int, conversation: Conversation) -> dict[str, Any]:
    return {
        "split": split,
        "position": position,
        "id": conversation.id,
        "source": conversation.source,
        "language": conversation.language,
        "category": conversation.category,
        "kind": conversation.kind,
        "num_images": len(conversation.images),
        "num_turns": len(conversation.turns),
    }


def _example(conversation: Conversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "source": conversation.source,
        "language": conversation.language,
        "category": conversation.category,
        "images": list(conversation.images),
        "roles": [turn.role for turn in conversation.turns],
        "texts": [turn.text for turn in conversation.turns],
    }


def _prepare(builder: _Builder, work: Path, codec: str) -> dict[str, list[dict[str, Any]]]:
    """Runs a builder, moves its folder up to `work` and regroups its shards."""
    with _quiet_tfds():
        builder.download_and_prepare()
    folder = work / builder.builder_config.name
    os.replace(Path(builder.data_dir).parent, folder)
    shards = {}
    for split, info in builder.info.splits.items():
        paths = [folder / VERSION / Path(name).name for name in info.filenames]
        mean_bytes = max(1, info.num_bytes // max(1, info.num_examples))
        group = min(_MAX_GROUP, max(1, _GROUP_BYTES // mean_bytes))
        for path in paths:
            _regroup(path, f"group_size:{group},{codec}")
        shards[split] = [
            {"path": path.relative_to(work).as_posix(), "num_records": length}
            for path, length in zip(paths, info.shard_lengths, strict=True)
        ]
    return shards


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """TFDS speaks of downloads to the terminal, of which there are none here."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()


def _regroup(path: Path, options: str) -> None:
    """Writes a shard again: same examples, same order."""
    regrouped = path.with_name(f"{path.name}.regrouped")
    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
    writer = array_record_module.ArrayRecordWriter(str(regrouped), options)
    step = 4096
    for start in range(0, reader.num_records(), step):
        for raw in reader.read(start, min(start + step, reader.num_records())):
            # Protocol buffers write the features in an order that changes from run to run.
            example = tf_example_pb2.Example.FromString(raw)
            writer.write(example.SerializeToString(deterministic=True))
    writer.close()
    reader.close()
    os.replace(regrouped, path)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": store.sha256(path)}


def _replace(made: list[str], work: Path, directory: Path) -> None:
    (directory / store.MANIFEST).unlink(missing_ok=True)
    for part in made:
        target = directory / part
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(work / part, target)
