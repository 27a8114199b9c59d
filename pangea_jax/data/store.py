"""A data set on disk, ready for training: conversations, pictures, and an index of both.

A store is a directory written by `pangea_jax.data.build.write_store`:

    manifest.json            the list of its files, each with size and SHA-256
    index.parquet            one row per conversation, to select records without reading them
    images.parquet           one row per picture: key, position, width, height, bytes
    records/<version>/       TFDS ArrayRecord, one TFDS split per split
    images_<collection>/<version>/   TFDS ArrayRecord, one folder per collection of pictures
                             (`images/<version>/` in PangeaIns, whose pictures are one collection)

A store of pictures alone has neither index nor records.

A picture is stored once, and records refer to it by its key `<collection>/<name>`, because
translations of a record share its picture. Each collection has its own folder, with the licence
beside the files. The record folders are ordinary TFDS data sets
(`tfds.builder_from_directory(...).as_data_source()`). The reader here parses the same bytes
directly into `Conversation`.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt64

from pangea_jax.data.record import Conversation, Turn
from pangea_jax.work import paths
from pangea_jax.work.untrusted import parse_json

MANIFEST = "manifest.json"
INDEX = "index.parquet"
IMAGE_INDEX = "images.parquet"
FORMAT_VERSION = 1
# Records are read alone, in the thread that asks. So as many requests to a bucket run at once as threads read.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class StoreError(RuntimeError):
    """A store cannot be read. The message names the file, the problem and the command to repair it."""

    def __init__(self, path: Path | str, problem: str, remedy: str = ""):
        self.path, self.problem, self.remedy = str(path), problem, remedy
        super().__init__(f"{path} {problem}{f'; {remedy}' if remedy else ''}")

    def __reduce__(self):
        return type(self), (self.path, self.problem, self.remedy)


def parse_example(raw: bytes) -> Conversation:
    """Parses one serialised `tf.train.Example` of the `records` set; about 10 us."""
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(raw).features.feature
    values = {name: feature[name].bytes_list.value for name in ("images", "roles", "texts")}
    text = {
        name: feature[name].bytes_list.value[0].decode()
        for name in ("id", "source", "language", "category")
    }
    turns = [
        Turn(role.decode(), message.decode())
        for role, message in zip(values["roles"], values["texts"], strict=True)
    ]
    system = turns.pop(0).text if turns and turns[0].role == "system" else ""
    images = tuple(key.decode() for key in values["images"])
    return Conversation(**text, images=images, turns=tuple(turns), system=system)


def parse_picture(raw: bytes) -> tuple[str, bytes]:
    """Parses one serialised example of an `images_*` set into (key, encoded picture)."""
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(raw).features.feature
    key = feature["key"].bytes_list.value[0].decode()
    return key, feature["encoded"].bytes_list.value[0]


class ShardReader:
    """Random access to the raw records of some ArrayRecord shards. Picklable; opens files on first use.

    `ArrayRecordDataSource` needs files with one record per group. Such files of short records are
    several times larger, so this class replaces it.

    ArrayRecord reads buckets of Google itself: one request opens a shard, and one reads a record. It repeats requests
    that fail for a time.
    """

    def __init__(self, shards: Sequence[Path], lengths: Sequence[int], remedy: str):
        self._paths, self._remedy = [paths.path(shard) for shard in shards], remedy
        self._ends = np.cumsum(np.asarray(lengths, np.int64))
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def read(self, position: int) -> bytes:
        """The raw bytes of a record; 0 <= position < len(self)."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        local = position - (int(self._ends[shard - 1]) if shard else 0)
        reader = self._readers.get(shard) or self._open(shard)
        try:
            return reader.read([local])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            self._refuse(shard, error, f" at record {local}")

    def parsed(self, position: int, parse: Callable[[bytes], Any]) -> Any:
        """`parse` of a record. Bytes that it cannot parse are a damaged shard."""
        raw = self.read(position)
        try:
            return parse(raw)
        except ImportError:  # the installation is incomplete, not the file
            raise
        except Exception as error:  # protobuf has its own base class
            shard = int(np.searchsorted(self._ends, position, side="right"))
            problem = (
                f"is damaged at position {position}: no {parse.__name__.removeprefix('parse_')}"
            )
            problem += f" ({type(error).__name__}: {_first_line(error)})"
            raise StoreError(self._paths[shard], problem, self._remedy) from None

    def _open(self, shard: int) -> Any:
        from array_record.python import array_record_module

        path = self._paths[shard]
        expected = int(self._ends[shard]) - (int(self._ends[shard - 1]) if shard else 0)
        remote = paths.is_remote(path)
        if remote and not str(path).startswith("gs://"):
            raise StoreError(path, "cannot be read: ArrayRecord knows only gs://", "copy the store")
        if not remote and not path.is_file():
            raise StoreError(path, "is missing", self._remedy)
        try:
            reader = array_record_module.ArrayRecordReader(str(path), _OPTIONS)
            found = reader.num_records()
            if not reader.ok():  # only reading says why
                reader.read([0])
        except (RuntimeError, ValueError) as error:
            self._refuse(shard, error)
        if found != expected:
            raise StoreError(path, f"has {found} records, expected {expected}", self._remedy)
        self._readers[shard] = reader
        return reader

    def _refuse(self, shard: int, error: Exception, where: str = "") -> NoReturn:
        """Raises the error of a read with the name of its shard. An unreachable bucket is no damage."""
        path = self._paths[shard]
        fault = paths.explain(error) if paths.is_remote(path) else None
        if fault is None:
            raise StoreError(
                path, f"is damaged{where} ({_first_line(error)})", self._remedy
            ) from None
        if fault.is_missing:
            raise StoreError(path, "is missing", self._remedy) from None
        raise paths.BucketError(fault) from None


class RecordSource(Sequence[Conversation]):
    """The conversations of one split by position; a source for `grain.MapDataset`."""

    def __init__(self, shards: ShardReader, split: str):
        self._shards, self.split = shards, split

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, position: SupportsIndex) -> Conversation:
        index = position.__index__()
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of split {self.split!r}, which has {len(self)}")
        return self._shards.parsed(index % len(self), parse_example)

    def __repr__(self) -> str:
        return f"RecordSource(split={self.split!r}, len={len(self)})"


class RecordStore:
    """Reads a prepared data set.

    Attributes:
      directory: the folder of the store.
      index: one row per conversation (`split, position, id, source, language, category, kind,
        num_images, num_turns`, and columns of the data set, such as those in
        `pangea_jax.data.build.pangeains`).

    Raises:
      StoreError: the folder has no store of this version.
    """

    def __init__(self, directory: str | Path):
        self.directory = paths.path(directory)
        path = self.directory / MANIFEST
        build = "build the store with `python launch/build_data.py`"
        try:
            self._manifest = parse_json(paths.read_bytes(path).decode("utf-8"))
            version, self._build = self._manifest["format"], self._manifest["build"]
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise StoreError(path, "is missing", build) from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(path, f"is not a manifest ({_first_line(error)})", build) from None
        if version != FORMAT_VERSION:
            raise StoreError(path, f"has format {version}, expected {FORMAT_VERSION}", self._remedy)
        self._pictures: dict[str, ShardReader] = {}

    @property
    def _remedy(self) -> str:
        return f"rebuild the store with `{self._build} --out={self.directory}`"

    @property
    def orientation(self) -> str:
        """How the pictures are meant to be seen, see `pangea_jax.data.image.ORIENTATIONS`.

        The widths and heights in the index are those of pictures that are seen so.
        """
        return self._manifest.get("orientation", "stored")

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._manifest["records"])

    @property
    def collections(self) -> tuple[str, ...]:
        return tuple(self._manifest["images"])

    @cached_property
    def index(self) -> pa.Table:
        # Each part of the file has its own dictionaries, and Arrow groups only by one.
        return self._table(INDEX).unify_dictionaries()

    @cached_property
    def image_index(self) -> pa.Table:
        return self._table(IMAGE_INDEX)

    def records(self, split: str) -> RecordSource:
        """The conversations of a split, in the order of `position` in the index."""
        if split not in self._manifest["records"]:
            raise KeyError(f"no split {split!r} in {self.directory}; it has {self.splits}")
        return RecordSource(self._reader("records", split), split)

    def image(self, key: str) -> bytes:
        """The encoded picture (WebP, JPEG or PNG as stored) of a key `<collection>/<name>`."""
        collection = key.split("/", 1)[0]
        hashes, positions = self._positions
        wanted = key_hash(key)
        first, last = (np.searchsorted(hashes, wanted, side) for side in ("left", "right"))
        stored = None
        for position in positions[first:last] if collection in self.collections else ():
            if collection not in self._pictures:
                self._pictures[collection] = self._reader("images", collection)
            shards = self._pictures[collection]
            stored, encoded = shards.parsed(int(position), parse_picture)
            if stored == key:
                return encoded
        if stored is None or key_hash(stored) == wanted:
            raise KeyError(f"no picture {key!r} in {self.directory / IMAGE_INDEX}")
        problem = f"does not match its shard: picture {key!r} is {stored!r} there"
        raise StoreError(self.directory / IMAGE_INDEX, problem, self._remedy)

    def verify(self) -> None:
        """Checks size and SHA-256 of every file against the manifest; about 5 ms for 3 MB.

        Raises:
          StoreError: at the first file that is missing or differs.
        """
        for name, expected in self._manifest["files"].items():
            path = self.directory / name
            if not path.is_file():
                raise StoreError(path, "is missing", self._remedy)
            size = paths.size(path)
            if size != expected["bytes"]:
                problem = f"has {size} bytes, expected {expected['bytes']}"
                raise StoreError(path, problem, self._remedy)
            if sha256(path) != expected["sha256"]:
                raise StoreError(path, "differs from the SHA-256 in the manifest", self._remedy)

    @cached_property
    def _positions(self) -> tuple[UInt64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
        """Hashes of all keys, ascending, and the positions of their pictures.

        They take 16 bytes per picture. A dict of the five million keys of PangeaIns would take a
        gigabyte in every process.
        """
        table = self._table(IMAGE_INDEX, ["key_hash", "position"])
        if "key_hash" in table.column_names:
            hashes = table["key_hash"].to_numpy()
        else:  # a small store
            keys = self._table(IMAGE_INDEX, ["key"])["key"].to_pylist()
            hashes = np.array([key_hash(key) for key in keys], np.uint64)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], table["position"].to_numpy()[order]

    def _reader(self, part: str, name: str) -> ShardReader:
        shards = self._manifest[part][name]
        paths = [self.directory / shard["path"] for shard in shards]
        return ShardReader(paths, [shard["num_records"] for shard in shards], self._remedy)

    def _table(self, name: str, columns: Collection[str] | None = None) -> pa.Table:
        """Reads a Parquet file of the store, with those of `columns` that it has."""
        path = self.directory / name
        try:
            with pq.ParquetFile(paths.for_arrow(path)) as file:
                names = file.schema_arrow.names
                return file.read([n for n in names if columns is None or n in columns])
        except FileNotFoundError:
            raise StoreError(path, "is missing", self._remedy) from None
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(path, f"is damaged ({_first_line(error)})", self._remedy) from None

    def __getstate__(self) -> dict[str, Any]:
        derived = ("index", "image_index", "_positions")
        kept = {name: value for name, value in self.__dict__.items() if name not in derived}
        return kept | {"_pictures": {}}

    def __repr__(self) -> str:
        return f"RecordStore({str(self.directory)!r}, splits={self.splits})"


def key_hash(key: str) -> np.uint64:
    """A 64-bit hash of a picture's key."""
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
