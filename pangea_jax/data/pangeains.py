"""Makes a store of PangeaIns: streamed from the release, in parallel, restartable.

    raw        the records, read once in their order, in chunks of `records_per_shard`
    parsed     per chunk: validated, languages settled, tokens counted, pictures located
    images     every picture that is referred to, once, in its original bytes, checked by decoding
    records    per chunk: the shard, its rows of the index, and what was rejected

Every step writes whole files into `OUT/work` and skips those that are there: what was killed goes
on. A chunk depends on the records in it alone and a picture shard on the list of all pictures, so
the bytes of the store do not depend on how many workers made it, nor on whether Beam ran them.

The index has, beyond the columns of every store: `num_tokens` (of the rendered conversation without
its pictures; null if no tokenizer was given), `image_sizes` (list of [width, height] in pixels),
`shard` and `row` (of that shard).
"""

import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import os
import shutil
import sqlite3
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.data import chat, image, rejections, release, store, write_store
from pangea_jax.data.atomic import partial_path, read_json, write_json
from pangea_jax.data.image import ImageError
from pangea_jax.data.record import Conversation, RecordError, data_set, identify_language
from pangea_jax.data.rejections import Reasons
from pangea_jax.data.runners import Run
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.data.write_store import Picture

NAME, SPLIT, COLLECTION = "pangeains", "train", "images"
WORK, ARCHIVES, SUMMARY, REJECTED = "work", "archives.sqlite", "summary.json", "rejected.jsonl"
KEPT_EXAMPLES = 20
"""How many rejected records are written out, from the first on."""

_COUNT_EVERY = 256
_TEXT_LIST = pa.list_(pa.string())
_PLACE = [
    ("archive", pa.string()),
    ("name", pa.string()),
    ("offset", pa.int64()),
    ("size", pa.int64()),
    ("deflated", pa.bool_()),
]
_PARSED = pa.schema(
    [
        ("number", pa.int64()),
        *((name, pa.string()) for name in ("id", "source", "language", "category", "kind")),
        *((name, pa.int32()) for name in ("num_images", "num_turns", "num_tokens")),
        ("identified", pa.bool_()),
        ("keys", _TEXT_LIST),
        ("places", pa.list_(pa.struct(_PLACE))),
        ("example", pa.binary()),
        *((name, pa.string()) for name in ("reason", "field", "detail", "raw")),
    ]
)
_PICTURE_PLAN = pa.schema([("key", pa.string()), *_PLACE])
_PICTURE_RESULT = pa.schema(
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
INDEX_SCHEMA = write_store.record_schema()
for _field in (
    pa.field("num_tokens", pa.int32()),
    pa.field("image_sizes", pa.list_(pa.list_(pa.int32()))),
    pa.field("shard", pa.int32()),
    pa.field("row", pa.int32()),
):
    INDEX_SCHEMA = INDEX_SCHEMA.append(_field)
PICTURE_SCHEMA = write_store.PICTURE_SCHEMA
for _field in (
    pa.field("key_hash", pa.uint64()),
    pa.field("shard", pa.int32()),
    pa.field("row", pa.int32()),
):
    PICTURE_SCHEMA = PICTURE_SCHEMA.append(_field)


class BuildError(RuntimeError):
    """The store cannot be made; says what to do."""


class TooManyRejected(BuildError):
    """More records were rejected than allowed.

    Attributes:
      reasons: reason -> (records, id of the first one).
      total: records read.
    """

    def __init__(self, reasons: Reasons, total: int, allowed: float):
        self.reasons, self.total = dict(reasons), total
        rejected = sum(count for count, _ in self.reasons.values())
        super().__init__(
            f"{rejected:,} of {total:,} records ({rejected / max(1, total):.1%}) cannot be used, more "
            f"than --max_bad_fraction={allowed:g}:\n{rejections.table(self.reasons)}\n"
            "put right what is wrong, or raise --max_bad_fraction; the same command then goes on"
        )


class Progress(Protocol):
    """Where the build tells how far it is."""

    def start(self, stage: str, total: int | None, unit: str) -> None: ...

    def advance(self, amount: int) -> None: ...

    def count(self, records: int) -> None: ...


class Silent:
    """Tells nothing."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def count(self, records: int) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Build:
    """One build, and its steps. Every field but `out` decides what is in the store.

    Attributes:
      source: folder of the release, or a file of records.
      out: folder of the store.
      images: folder of the pictures, by default that of the records.
      tokenizer: for the token counts: a tokenizer.json, a .model or their folder.
      image_id: see `load_tokenizer`.
      default_language: of records that name none; None: identified from their words.
      limit: only so many records from the first on.
      records_per_shard: records of the release in one shard, those rejected included.
      shard_bytes: about how large a shard of pictures becomes.
      max_pixels: larger pictures are rejected.
    """

    source: Path
    out: Path
    images: Path | None = None
    tokenizer: Path | None = None
    image_id: int | None = None
    default_language: str | None = None
    limit: int | None = None
    records_per_shard: int = 16_384
    shard_bytes: int = 256 << 20
    max_pixels: int = image.MAX_PIXELS

    @property
    def work(self) -> Path:
        return self.out / WORK

    @property
    def picture_folder(self) -> Path:
        return self.images or (self.source.parent if self.source.is_file() else self.source)

    def _path(self, part: str, number: int, suffix: str) -> Path:
        return self.work / part / f"{number:05d}.{suffix}"

    def start(self) -> None:
        """Claims the folder for this build.

        Raises:
          BuildError: it holds another build, finished or not.
          FileNotFoundError: there is no such tokenizer.
        """
        if self.tokenizer is not None:
            _tokenizer(self.tokenizer, self.image_id)
        files = release.record_files(self.source)
        described = dataclasses.asdict(self) | {
            "out": None,
            "records": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        }
        plan = json.loads(json.dumps(described, default=str))
        for path in (self.out / SUMMARY, self.work / "plan.json"):
            if path.is_file():
                theirs = read_json(path)["plan" if path.name == SUMMARY else "build"]
                differing = [name for name in plan if theirs.get(name) != plan[name]]
                if differing:
                    problem = f"{self.out} holds a build of other {', '.join(differing)}"
                    raise BuildError(f"{problem}; give another --out or remove it")
        for part in ("raw", "parsed", "plan", "images", "records"):
            (self.work / part).mkdir(parents=True, exist_ok=True)
        for half_written in (*self.work.rglob("*.partial"), *self.out.glob("*.partial")):
            half_written.unlink(missing_ok=True)
        write_json(self.work / "plan.json", {"build": plan})

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """While in it, no other process may build here; a killed one leaves no claim behind."""
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BuildError(f"another process is writing {self.out}") from None
            yield

    @property
    def finished(self) -> bool:
        """Whether the store is whole; what is left of the work is then not needed."""
        return (self.out / store.MANIFEST).is_file() and (self.out / SUMMARY).is_file()

    def pictures(self) -> release.Pictures:
        # Beam's runners have threads, which must not share open files.
        return _pictures(self.picture_folder, self.out / ARCHIVES, threading.get_ident())

    # 1. raw: the only step that must go through the release in order.

    def split(self, progress: Progress) -> Iterator[int]:
        """Cuts the records into chunks; yields a chunk's number when it is on disk."""
        done = self.work / "raw.json"
        if done.is_file():
            progress.start("checking records", self.chunks, "shards")
            for number in range(self.chunks):
                yield number
                progress.advance(1)
            return
        files = release.record_files(self.source)
        progress.start("reading records", sum(p.stat().st_size for p in files), "bytes")
        records = _counted(
            (r for path in files for r in release.read_records(path, progress.advance)), progress
        )
        total = number = 0
        while chunk := _take(records, self._room(total)):
            path = self._path("raw", number, "jsonl.zst")
            first, chunk = chunk
            count = _write_lines(path, first, chunk, skip=path.is_file())
            total, number = total + count, number + 1
            yield number - 1
        if not total:
            raise BuildError(f"{files[0]} holds no records")
        write_json(done, {"records": total, "chunks": number})

    def _room(self, total: int) -> int:
        left = self.records_per_shard if self.limit is None else self.limit - total
        return max(0, min(self.records_per_shard, left))

    @property
    def chunks(self) -> int:
        return read_json(self.work / "raw.json")["chunks"]

    @property
    def total(self) -> int:
        return read_json(self.work / "raw.json")["records"]

    # 2. parsed: everything about a record but the pixels.

    def parse(self, chunk: int) -> None:
        """Validates the records of a chunk and finds their pictures."""
        path = self._path("parsed", chunk, "parquet")
        if path.is_file():
            return
        rows, kept = [], 0
        first = chunk * self.records_per_shard
        with pa.input_stream(self._path("raw", chunk, "jsonl.zst"), compression="zstd") as stream:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), first):
                raw = json.loads(line)
                try:
                    row = self._parsed(raw)
                except RecordError as error:
                    kept += 1
                    row = rejections.describe(raw, error)
                    row["raw"] = line if kept <= KEPT_EXAMPLES else None
                rows.append({"number": number} | row)
        _write_parquet(path, rows, _PARSED)

    def _parsed(self, raw: Any) -> dict[str, Any]:
        missing = self.default_language or identify_language
        conversation = Conversation.from_pangeains(raw, default_language=missing)
        found = [self._find(path, conversation.id) for path in conversation.images]
        keys = tuple(key for key, _ in found)
        # Where a picture was found says more than an absolute path does.
        source = conversation.source if raw.get("source") else data_set(keys, conversation.id)
        category = conversation.category if raw.get("category") else source.partition("/")[0]
        conversation = dataclasses.replace(
            conversation, images=keys, source=source, category=category
        )
        row = write_store.index_row(SPLIT, 0, conversation)
        return {name: row[name] for name in _PARSED.names if name in row} | {
            "num_tokens": self._count_tokens(conversation),
            "identified": not raw.get("language") and self.default_language is None,
            "keys": keys,
            "places": [place._asdict() for _, place in found],
            "example": write_store.serialize(conversation),
        }

    def _find(self, path: str, record_id: str) -> tuple[str, release.Place]:
        try:
            found = self.pictures().find(path)
        except RecordError as error:
            raise RecordError(error.reason, error.field, error.detail, record_id) from None
        if found is None:
            raise RecordError("picture is missing", "image", path, record_id)
        return found

    def _count_tokens(self, conversation: Conversation) -> int | None:
        """Tokens of the rendered conversation, each picture taking none."""
        if self.tokenizer is None:
            return None
        tokenizer = _tokenizer(self.tokenizer, self.image_id)
        nothing = [np.zeros(0, np.int32)] * len(conversation.images)
        rendered = chat.render(
            conversation.turns, tokenizer, nothing, tiles_per_image=[0] * len(nothing)
        )
        return len(rendered.tokens)

    # 3. images: every picture once, in the order in which they lie in the archives.

    def plan_pictures(self) -> int:
        """Shares the pictures out among shards; returns how many shards there are."""
        done = self.work / "plan_pictures.json"
        if done.is_file():
            return read_json(done)["shards"]
        path = self.work / "pictures.sqlite"
        path.unlink(missing_ok=True)
        with _scratch_database(path) as database:
            database.execute(
                "CREATE TABLE pictures (key TEXT PRIMARY KEY, archive TEXT, name TEXT, "
                "offset INTEGER, size INTEGER, deflated INTEGER) WITHOUT ROWID"
            )
            for chunk in range(self.chunks):
                parsed = self._path("parsed", chunk, "parquet")
                for row in pq.read_table(parsed, columns=["keys", "places"]).to_pylist():
                    pairs = zip(row["keys"] or (), row["places"] or (), strict=True)
                    database.executemany(
                        "INSERT OR IGNORE INTO pictures VALUES (?, ?, ?, ?, ?, ?)",
                        [(key, *place.values()) for key, place in pairs],
                    )
            ordered = database.execute("SELECT * FROM pictures ORDER BY archive, offset, key")
            shards = 0
            for shards, rows in enumerate(_by_size(ordered, self.shard_bytes), 1):
                rows = [dict(zip(_PICTURE_PLAN.names, row, strict=True)) for row in rows]
                for row in rows:
                    row["deflated"] = bool(row["deflated"])
                _write_parquet(self._path("plan", shards - 1, "parquet"), rows, _PICTURE_PLAN)
        write_json(done, {"shards": shards})
        return shards

    def store_pictures(self, shard: int) -> None:
        """Reads, checks and writes the pictures of a shard."""
        done = self._path("images", shard, "json")
        if done.is_file():
            return
        results: list[dict[str, Any]] = []
        path = self._path("images", shard, "array_record")
        plan = pq.read_table(self._path("plan", shard, "parquet")).to_pylist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of pictures that it reads nevertheless
            count, num_bytes = write_store.write_shard(
                path, self._checked(plan, results), write_store.PICTURE_CODEC
            )
        _write_parquet(self._path("images", shard, "parquet"), results, _PICTURE_RESULT)
        faults = len(results) - count
        sizes = {"count": count, "num_bytes": num_bytes, "faults": faults}
        write_json(done, sizes | write_store.fingerprint(path))

    def _checked(self, plan, results) -> Iterator[bytes]:
        row = 0
        for entry in plan:
            key = entry.pop("key")
            result = {"key": key}
            try:
                encoded = self.pictures().read(release.Place(**entry))
                width, height = image.check(encoded, name=key, max_pixels=self.max_pixels)
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

    def collect_pictures(self, shards: int) -> None:
        """Puts what is known of every picture where the last step can look it up."""
        path = self.work / "sizes.sqlite"
        partial = partial_path(path)
        if path.is_file():
            return
        with _scratch_database(partial) as database:
            database.execute(
                "CREATE TABLE sizes (key TEXT PRIMARY KEY, width INTEGER, height INTEGER, "
                "fault TEXT, detail TEXT) WITHOUT ROWID"
            )
            for shard in range(shards):
                table = pq.read_table(self._path("images", shard, "parquet"))
                rows = table.select(["key", "width", "height", "fault", "detail"]).to_pylist()
                database.executemany(
                    "INSERT INTO sizes VALUES (:key, :width, :height, :fault, :detail)", rows
                )
        os.replace(partial, path)

    # 4. records

    def store_records(self, chunk: int) -> None:
        """Writes the shard of a chunk, its rows of the index and what was rejected."""
        done = self._path("records", chunk, "json")
        if done.is_file():
            return
        sizes = _sizes(self.work / "sizes.sqlite")
        parsed = pq.read_table(self._path("parsed", chunk, "parquet"))
        index, examples, rejected = [], [], []
        for row in parsed.to_pylist():
            seen = {} if row["reason"] else {key: _size_of(sizes, key) for key in row["keys"]}
            fault = next(((k, *s[2:]) for k, s in seen.items() if s[2]), None)
            if fault:
                key, reason, detail = fault
                row |= {"reason": reason, "field": "image", "detail": f"{key}: {detail}"}
            if row["reason"]:
                rejected.append(row)
                continue
            image_sizes = [seen[key][:2] for key in row["keys"]]
            index.append(row | {"image_sizes": image_sizes, "row": len(index), "split": SPLIT})
            examples.append(row["example"])
        path = self._path("records", chunk, "array_record")
        count, num_bytes = write_store.write_shard(path, examples, write_store.RECORD_CODEC)
        schema = pa.schema([f for f in INDEX_SCHEMA if f.name not in ("position", "shard")])
        _write_parquet(self._path("records", chunk, "parquet"), index, schema)
        summary = {
            "count": count,
            "num_bytes": num_bytes,
            "identified": sum(row["identified"] for row in index),
            "reasons": rejections.count(rejected),
            "examples": [self._example(row, chunk) for row in rejected[:KEPT_EXAMPLES]],
        }
        write_json(done, summary | write_store.fingerprint(path))

    def _example(self, row: Mapping[str, Any], chunk: int) -> dict[str, Any]:
        """A rejected record as it was, for `rejected.jsonl`."""
        raw = row["raw"]
        if raw is None:
            local = row["number"] - chunk * self.records_per_shard
            path = self._path("raw", chunk, "jsonl.zst")
            with pa.input_stream(path, compression="zstd") as stream:
                lines = io.TextIOWrapper(stream, encoding="utf-8")
                raw = next(line for place, line in enumerate(lines) if place == local)
        fields = {name: row[name] for name in ("number", "id", "reason", "field", "detail")}
        return fields | {"record": json.loads(raw)}

    # Counting what was rejected.

    def rejected_while_parsing(self) -> Reasons:
        found = []
        for chunk in range(self.chunks):
            table = pq.read_table(
                self._path("parsed", chunk, "parquet"), columns=["reason", "id", "number"]
            )
            found += [row for row in table.to_pylist() if row["reason"]]
        return rejections.count(found)

    def rejected(self) -> Reasons:
        return rejections.merge(
            read_json(self._path("records", c, "json"))["reasons"] for c in range(self.chunks)
        )

    def forget_rejected(self) -> None:
        """Removes what was made of files with faults, so that the next run looks at them again."""
        sizes = self.work / "sizes.sqlite"
        shards = [p for p in (self.work / "images").glob("*.json") if read_json(p)["faults"]]
        records = list((self.work / "records").glob("*.json"))
        for path in (sizes, *shards, *records):
            path.unlink(missing_ok=True)
        if not (self.work / "plan_pictures.json").is_file():
            for path in (self.work / "parsed").glob("*.parquet"):
                reasons = pq.read_table(path, columns=["reason"])["reason"]
                if reasons.null_count < len(reasons):
                    path.unlink()

    # 5. the store

    def finish(self, shards: int) -> dict[str, Any]:
        """Puts the shards in their places and describes them; returns the summary."""
        chunks = [read_json(self._path("records", c, "json")) for c in range(self.chunks)]
        pictures = [read_json(self._path("images", s, "json")) for s in range(shards)]
        files: dict[str, Any] = {}
        records, record_numbers = self._place("records", SPLIT, chunks, files)
        images, image_numbers = self._place("images", COLLECTION, pictures, files)
        self._write_index(record_numbers, files)
        self._write_image_index(image_numbers, files)
        for part, split, features, parts in (
            ("records", SPLIT, write_store.RECORD_FEATURES, chunks),
            ("images", COLLECTION, write_store.PICTURE_FEATURES, pictures),
        ):
            folder = self.out / part / write_store.VERSION
            lengths = [one["count"] for one in parts if one["count"]]
            if lengths:
                num_bytes = sum(one["num_bytes"] for one in parts)
                write_store.write_metadata(folder, features, {split: (lengths, num_bytes)})
                for name in ("dataset_info.json", "features.json"):
                    files[f"{part}/{write_store.VERSION}/{name}"] = write_store.fingerprint(
                        folder / name
                    )
        examples = [example for chunk in chunks for example in chunk["examples"]]
        lines = [json.dumps(e, ensure_ascii=True) + "\n" for e in examples[:KEPT_EXAMPLES]]
        (self.out / REJECTED).write_text("".join(lines), encoding="utf-8")
        summary = {
            "plan": read_json(self.work / "plan.json")["build"],
            "total": self.total,
            "kept": sum(chunk["count"] for chunk in chunks),
            "rejected": self.rejected(),
            "languages_identified": sum(chunk["identified"] for chunk in chunks),
            "pictures": sum(one["count"] for one in pictures),
            "picture_bytes": sum(one["num_bytes"] for one in pictures),
        }
        write_json(self.out / SUMMARY, summary)
        write_store.write_manifest(
            self.out,
            {
                "format": store.FORMAT_VERSION,
                "name": NAME,
                "build": f"python launch/build_data.py pangeains --source={self.source}",
                "records": {SPLIT: records},
                "images": {COLLECTION: images} if images else {},
                "files": dict(sorted(files.items())),
            },
        )
        shutil.rmtree(self.work)
        return summary

    def _place(self, part, split, parts, files) -> tuple[list[dict[str, Any]], dict[int, int]]:
        """Moves shards into `OUT/part`, without empty ones; for the manifest, and old -> new number."""
        folder = self.out / part / write_store.VERSION
        folder.mkdir(parents=True, exist_ok=True)
        used = [number for number, one in enumerate(parts) if one["count"]]
        shards = []
        for new, old in enumerate(used):
            name = write_store.shard_name(NAME, split, new, len(used))
            made = self._path(part, old, "array_record")
            if made.is_file():  # else a killed run has moved it already
                os.replace(made, folder / name)
            path = f"{part}/{write_store.VERSION}/{name}"
            shards.append({"path": path, "num_records": parts[old]["count"]})
            files[path] = {key: parts[old][key] for key in ("bytes", "sha256")}
        return shards, {old: new for new, old in enumerate(used)}

    def _write_index(self, numbers: Mapping[int, int], files: dict[str, Any]) -> None:
        position = 0
        with write_store.IndexWriter(self.out / store.INDEX, INDEX_SCHEMA) as index:
            for old, new in numbers.items():
                for row in pq.read_table(self._path("records", old, "parquet")).to_pylist():
                    index.add(row | {"position": position, "shard": new})
                    position += 1
        files[store.INDEX] = write_store.fingerprint(self.out / store.INDEX)

    def _write_image_index(self, numbers: Mapping[int, int], files: dict[str, Any]) -> None:
        position = 0
        with write_store.IndexWriter(self.out / store.IMAGE_INDEX, PICTURE_SCHEMA) as index:
            for old, new in numbers.items():
                for row in pq.read_table(self._path("images", old, "parquet")).to_pylist():
                    if row["fault"] is None:
                        place = {"position": position, "shard": new, "collection": COLLECTION}
                        index.add(row | place | {"key_hash": int(store.key_hash(row["key"]))})
                        position += 1
        files[store.IMAGE_INDEX] = write_store.fingerprint(self.out / store.IMAGE_INDEX)


def build(
    build: Build, run: Run, *, max_bad_fraction: float = 0.01, progress: Progress | None = None
) -> dict[str, Any]:
    """Makes the store, or goes on with making it.

    Args:
      run: `runners.Local` or `runners.Beam`.
      max_bad_fraction: rejected records are counted and left out up to this share of all.

    Returns:
      the contents of `summary.json`.

    Raises:
      TooManyRejected: with the table of reasons.
      BuildError: the folder holds another build.
      ReleaseError: the release is broken.
      RunnerError: a worker was killed.
    """
    with build.claimed():
        return _build(build, run, max_bad_fraction, progress or Silent())


def _build(build: Build, run: Run, max_bad_fraction: float, progress: Progress) -> dict[str, Any]:
    build.start()
    if build.finished:
        shutil.rmtree(build.work, ignore_errors=True)
        return read_json(build.out / SUMMARY)
    progress.start("listing archives", None, "members")
    _pictures.cache_clear()  # of an earlier build in this process
    build.pictures().index(progress.count)
    for _ in run(build.parse, build.split(progress)):
        pass
    allowed = max_bad_fraction * build.total
    _check(build, build.rejected_while_parsing(), max_bad_fraction)
    shards = build.plan_pictures()
    progress.start("storing pictures", shards, "shards")
    faults = 0
    for shard in run(build.store_pictures, range(shards)):
        progress.advance(1)
        faults += read_json(build._path("images", shard, "json"))["faults"]
        if faults > allowed:  # every one costs a record at least
            _check(build, _picture_faults(build, shards), max_bad_fraction)
    build.collect_pictures(shards)
    progress.start("storing records", build.chunks, "shards")
    for _ in run(build.store_records, range(build.chunks)):
        progress.advance(1)
    _check(build, build.rejected(), max_bad_fraction)
    return build.finish(shards)


def _check(build: Build, reasons: Reasons, allowed: float) -> None:
    if sum(count for count, _ in reasons.values()) > allowed * build.total:
        total = build.total
        build.forget_rejected()
        raise TooManyRejected(reasons, total, allowed)


def _picture_faults(build: Build, shards: int) -> Reasons:
    """Reasons why pictures stored so far cannot be used, besides those found while parsing."""
    found = []
    for shard in range(shards):
        path = build._path("images", shard, "parquet")
        if path.is_file():
            table = pq.read_table(path, columns=["fault", "key"]).to_pylist()
            found += [{"reason": r["fault"], "id": r["key"]} for r in table if r["fault"]]
    return rejections.merge([build.rejected_while_parsing(), rejections.count(found)])


@functools.cache
def _pictures(source: Path, database: Path, thread: int) -> release.Pictures:
    return release.Pictures(source, database)


@functools.cache
def _tokenizer(path: Path, image_id: int | None):
    return load_tokenizer(path, image_id)


@contextlib.contextmanager
def _scratch_database(path: Path) -> Iterator[sqlite3.Connection]:
    """A database that is made anew if the making of it is killed."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -131072"
        )
        yield database
        database.commit()


def _sizes(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)


def _size_of(sizes: sqlite3.Connection, key: str) -> tuple[int, int, str | None, str | None]:
    query = "SELECT width, height, fault, detail FROM sizes WHERE key = ?"
    return sizes.execute(query, (key,)).fetchone()


def _counted(records: Iterable[Any], progress: Progress) -> Iterator[Any]:
    for number, record in enumerate(records, 1):
        if number % _COUNT_EVERY == 0:
            progress.count(_COUNT_EVERY)
        yield record


def _take(records: Iterator[Any], count: int) -> tuple[Any, Iterator[Any]] | None:
    """The next record and the `count` - 1 after it, None at the end; nothing is held in memory."""
    if count == 0:
        return None
    for first in records:
        return first, (record for _, record in zip(range(count - 1), records))
    return None


def _write_lines(path: Path, first: Any, rest: Iterator[Any], skip: bool) -> int:
    """Writes records as lines of JSON; with `skip` only counts them."""
    count = 1
    if skip:
        return count + sum(1 for _ in rest)
    partial = partial_path(path)
    with pa.output_stream(partial, compression="zstd", buffer_size=1 << 20) as stream:
        stream.write(_line(first))
        for record in rest:
            stream.write(_line(record))
            count += 1
    os.replace(partial, path)
    return count


def _line(record: Any) -> bytes:
    return json.dumps(record, default=str).encode() + b"\n"


def _by_size(rows: Iterable[tuple], limit: int) -> Iterator[list[tuple]]:
    """Consecutive rows, as many as take `limit` bytes together (their fifth field)."""
    some, size = [], 0
    for row in rows:
        if some and size + row[4] > limit:
            yield some
            some, size = [], 0
        some.append(row)
        size += row[4]
    if some:
        yield some


def _write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    partial = partial_path(path)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial, compression="zstd")
    os.replace(partial, path)
