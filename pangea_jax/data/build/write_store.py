"""Writes the store that `pangea_jax.data.store` reads.

The shards are written without TensorFlow. TFDS's metadata describe them, so that `tfds.builder_from_directory` reads
them. TFDS itself would compress every record alone: the records of the sample would take 9 MB instead of 3. Equal
input gives equal files.
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from pangea_jax.data import store
from pangea_jax.data.record import Conversation
from pangea_jax.work.atomic import partial_path, write_json

VERSION = "1.0.0"

# A random read decompresses a whole group of examples, so a group has about this size: 128 records of the sample, which
# then take 25 us each to read and a third of the space, or one photograph. The first `_HEAD` examples of a shard decide
# the number of examples in its groups.
_GROUP_BYTES, _MAX_GROUP, _HEAD = 32_768, 128, 512
# Files of zstd 9 are at most 4 % larger than those of zstd 19, and it is 28 times as fast.
# Encoded pictures do not compress.
RECORD_CODEC, PICTURE_CODEC = "zstd:9", "uncompressed"
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
    """Writes a store, and replaces an earlier one.

    Args:
      directory: made if missing. Other files in it are kept.
      name: TFDS name of the data set, snake_case.
      build: command that rebuilds it; the reader's errors quote it.
      records: split -> stream of (conversation, values of `columns`); empty: the store has only
        pictures, and neither `index.parquet` nor `records/`.
      images: collection -> stream of pictures, whose keys begin with `<collection>/`.
      columns: further text columns of the index.
      extra_files: further files in `directory` whose checksums the manifest holds.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {"format": store.FORMAT_VERSION, "name": name, "build": build}
    with tempfile.TemporaryDirectory(dir=directory, prefix=".incomplete-") as scratch:
        work = Path(scratch)
        manifest["records"], manifest["images"] = {}, {}
        if records:
            with IndexWriter(work / store.INDEX, record_schema(columns)) as index:
                examples = {
                    split: _record_examples(split, rows, index) for split, rows in records.items()
                }
                manifest["records"] = _write_folder(
                    work, "records", name, examples, RECORD_FEATURES
                )
        with IndexWriter(work / store.IMAGE_INDEX, PICTURE_SCHEMA) as index:
            for collection, pictures in images.items():
                examples = {collection: _picture_examples(collection, pictures, index)}
                manifest["images"] |= _write_folder(
                    work, f"images_{collection}", name, examples, PICTURE_FEATURES
                )
        made = [store.IMAGE_INDEX, *(f"images_{c}" for c in images)]
        made += [store.INDEX, "records"] if records else []
        files = sorted(p for part in made for p in _files(work / part))
        manifest["files"] = {p.relative_to(work).as_posix(): fingerprint(p) for p in files}
        for path in sorted(extra_files):
            manifest["files"][path.relative_to(directory).as_posix()] = fingerprint(path)
        _replace(made, work, directory)
    write_manifest(directory, manifest)


class IndexWriter:
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

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._flush()
        self._writer.close()


def record_schema(columns: tuple[str, ...] = ()) -> pa.Schema:
    """The columns of `index.parquet`; `columns` are further text columns."""
    # With dictionary columns, a row takes only a few bytes of memory.
    label = pa.dictionary(pa.int32(), pa.string())
    fields = [("split", label), ("position", pa.int64()), ("id", pa.string())]
    fields += [(name, label) for name in ("source", "language", "category", "kind")]
    fields += [("num_images", pa.int32()), ("num_turns", pa.int32())]
    return pa.schema(fields + [(name, label) for name in columns])


PICTURE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("collection", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
    ]
)


_TEXTS = tfds.features.Sequence(tfds.features.Text())
RECORD_FEATURES = {
    **{name: tfds.features.Text() for name in ("id", "source", "language", "category")},
    **dict.fromkeys(("images", "roles", "texts"), _TEXTS),
}
PICTURE_FEATURES = {
    **{name: tfds.features.Text() for name in ("key", "encoded")},
    **{name: tfds.features.Scalar(np.int32) for name in ("width", "height")},
}


def _record_examples(split, rows, index) -> Iterator[bytes]:
    for position, (conversation, extra) in enumerate(rows):
        index.add(index_row(split, position, conversation.validate()) | dict(extra))
        yield serialize(conversation)


def _picture_examples(collection, pictures, index) -> Iterator[bytes]:
    for position, picture in enumerate(pictures):
        if not picture.key.startswith(f"{collection}/"):
            raise ValueError(f"key {picture.key!r} is not of collection {collection!r}")
        size = {"width": picture.width, "height": picture.height}
        row = {"key": picture.key, "collection": collection, "position": position}
        index.add(row | size | {"num_bytes": len(picture.encoded)})
        yield serialize_picture(picture)


def index_row(split: str, position: int, conversation: Conversation) -> dict[str, Any]:
    """The common columns of a row of `index.parquet`."""
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


def serialize(conversation: Conversation) -> bytes:
    """A conversation as the `tf.train.Example` that `store.parse_example` reads.

    A system prompt is the first of the texts, with the role "system".
    """
    turns = [(turn.role, turn.text) for turn in conversation.turns]
    if conversation.system:
        turns.insert(0, ("system", conversation.system))
    return _example(
        {
            "id": [conversation.id],
            "source": [conversation.source],
            "language": [conversation.language],
            "category": [conversation.category],
            "images": conversation.images,
            "roles": [role for role, _ in turns],
            "texts": [text for _, text in turns],
        }
    )


def serialize_picture(picture: Picture) -> bytes:
    """A picture as the `tf.train.Example` that `store.parse_picture` reads."""
    size = {"width": [picture.width], "height": [picture.height]}
    return _example({"key": [picture.key], "encoded": [picture.encoded]} | size)


def _example(features: Mapping[str, Sequence[str | bytes | int]]) -> bytes:
    example = tf_example_pb2.Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        if values and isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        else:
            encoded = (v.encode() if isinstance(v, str) else v for v in values)
            feature.bytes_list.value.extend(encoded)
    # Otherwise the order of the features in the file changes from run to run.
    return example.SerializeToString(deterministic=True)


def write_shard(path: Path, examples: Iterable[bytes], codec: str) -> tuple[int, int]:
    """Writes one ArrayRecord shard. `path` appears only when the shard is complete.

    Returns:
      the number of examples, and their number of bytes before compression.

    Raises:
      OSError: it cannot be written, for example if the disk is full.
    """
    partial = partial_path(path)
    examples, head = iter(examples), []
    for example in examples:
        head.append(example)
        if len(head) == _HEAD:
            break
    mean_bytes = max(1, sum(map(len, head)) // max(1, len(head)))
    group = min(_MAX_GROUP, max(1, _GROUP_BYTES // mean_bytes))
    writer = array_record_module.ArrayRecordWriter(str(partial), f"group_size:{group},{codec}")
    count = num_bytes = 0
    try:
        try:
            for some in (head, examples):
                for example in some:
                    writer.write(example)
                    count, num_bytes = count + 1, num_bytes + len(example)
        finally:
            writer.close()
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # raised by `examples`
            raise
        raise OSError(f"{path} cannot be written: {error}") from None
    os.replace(partial, path)
    return count, num_bytes


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
    """The file name that TFDS gives a shard."""
    return f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def write_metadata(
    folder: Path, features: Mapping[str, Any], splits: Mapping[str, tuple[Sequence[int], int]]
) -> None:
    """Writes TFDS's description of the shards in a folder, whose names are those of `shard_name`.

    Args:
      folder: `<anything>/<version>`.
      splits: split -> (number of examples of each shard, number of bytes of all shards).
    """
    infos = [
        tfds.core.SplitInfo(name=split, shard_lengths=list(lengths), num_bytes=num_bytes)
        for split, (lengths, num_bytes) in splits.items()
    ]
    # TFDS prints that it does not check the data.
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=tfds.features.FeaturesDict(features),
            split_infos=infos,
            version=VERSION,
            check_data=False,
            disable_shuffling=True,
        )


def _write_folder(work, part, name, examples, features) -> dict[str, list[dict[str, Any]]]:
    """Writes one shard for each split into `work/part`; returns the shards by split, for the manifest."""
    folder = work / part / VERSION
    folder.mkdir(parents=True)
    codec = RECORD_CODEC if features is RECORD_FEATURES else PICTURE_CODEC
    splits, shards = {}, {}
    for split, stream in examples.items():
        path = folder / shard_name(name, split, 0, 1)
        count, num_bytes = write_shard(path, stream, codec)
        splits[split] = ([count], num_bytes)
        shards[split] = [{"path": path.relative_to(work).as_posix(), "num_records": count}]
    write_metadata(folder, features, splits)
    return shards


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest at once. Only with this file a folder counts as a store."""
    write_json(directory / store.MANIFEST, manifest, ensure_ascii=False)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, for the manifest."""
    return {"bytes": path.stat().st_size, "sha256": store.sha256(path)}


def _replace(made: list[str], work: Path, directory: Path) -> None:
    (directory / store.MANIFEST).unlink(missing_ok=True)
    if store.INDEX not in made:  # an earlier store may have had records
        (directory / store.INDEX).unlink(missing_ok=True)
        shutil.rmtree(directory / "records", ignore_errors=True)
    for part in made:
        target = directory / part
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(work / part, target)
