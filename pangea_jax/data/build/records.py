"""The records of a build: read once in their order, validated, and written with their rows of the index."""

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.data.build import archives, rejections, release, write_store
from pangea_jax.data import chat
from pangea_jax.work.atomic import partial_path, read_json, write_json, write_parquet
from pangea_jax.data.build.folder import Build, BuildError, Progress
from pangea_jax.data.build.pictures import PLACE, Pictures, Sizes
from pangea_jax.data.record import Conversation, RecordError, data_set, identify_language
from pangea_jax.data.build.rejections import Reasons

SPLIT = "train"
KEPT_EXAMPLES = 20
"""How many rejected records are written out, from the first on."""

_COUNT_EVERY = 256
_TEXTS = [(name, pa.string()) for name in ("id", "source", "language", "category", "kind")]
_REJECTED = [(name, pa.string()) for name in ("reason", "field", "detail", "raw")]
_PARSED = pa.schema(
    [
        ("number", pa.int64()),
        *_TEXTS,
        *((name, pa.int32()) for name in ("num_images", "num_turns", "num_tokens")),
        ("identified", pa.bool_()),
        ("keys", pa.list_(pa.string())),
        ("places", pa.list_(pa.struct(PLACE))),
        ("example", pa.binary()),
        *_REJECTED,
    ]
)
_OWN_COLUMNS = pa.schema(
    [
        ("num_tokens", pa.int32()),
        ("image_sizes", pa.list_(pa.list_(pa.int32()))),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)
INDEX_SCHEMA = pa.schema([*write_store.record_schema(), *_OWN_COLUMNS])


@dataclasses.dataclass(frozen=True)
class Records:
    """The steps of a build that deal with records."""

    build: Build

    def split(self, progress: Progress) -> Iterator[int]:
        """Cuts the records into chunks; yields a chunk's number when it is on disk.

        Raises:
          BuildError: there are none.
          ReleaseError: the file is broken.
        """
        build = self.build
        done = build.work / "raw.json"
        if done.is_file():
            progress.start("checking records", build.chunks, "shards")
            for number in range(build.chunks):
                yield number
                progress.advance(1)
            return
        files = release.record_files(build.source)
        progress.start("reading records", sum(p.stat().st_size for p in files), "bytes")
        records = _counted(
            (r for path in files for r in release.read_records(path, progress.advance)), progress
        )
        total = number = 0
        while chunk := _take(records, self._room(total)):
            path = build.path("raw", number, "jsonl.zst")
            first, chunk = chunk
            count = _write_lines(path, first, chunk, skip=path.is_file())
            total, number = total + count, number + 1
            yield number - 1
        if not total:
            raise BuildError(f"{files[0]} holds no records")
        write_json(done, {"records": total, "chunks": number})

    def _room(self, total: int) -> int:
        build = self.build
        left = build.records_per_shard if build.limit is None else build.limit - total
        return max(0, min(build.records_per_shard, left))

    def _lines(self, chunk: int) -> Iterator[tuple[int, str]]:
        """(number in the release, JSON) of the records of a chunk."""
        path = self.build.path("raw", chunk, "jsonl.zst")
        with pa.input_stream(path, compression="zstd") as stream:
            lines = io.TextIOWrapper(stream, encoding="utf-8")
            yield from enumerate(lines, chunk * self.build.records_per_shard)

    def parse(self, chunk: int) -> None:
        """Validates the records of a chunk and finds their pictures: all of a record but its pixels."""
        path = self.build.path("parsed", chunk, "parquet")
        if path.is_file():
            return
        rows, kept = [], 0
        for number, line in self._lines(chunk):
            raw = json.loads(line)
            try:
                row = self._parsed(raw)
            except RecordError as error:
                kept += 1
                row = rejections.describe(raw, error)
                row["raw"] = line if kept <= KEPT_EXAMPLES else None
            rows.append({"number": number} | row)
        write_parquet(path, rows, _PARSED)

    def _parsed(self, raw: Any) -> dict[str, Any]:
        default = self.build.default_language
        conversation = Conversation.from_pangeains(
            raw, default_language=default or identify_language
        )
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
            "identified": not raw.get("language") and default is None,
            "keys": keys,
            "places": [place._asdict() for _, place in found],
            "example": write_store.serialize(conversation),
        }

    def _find(self, path: str, record_id: str) -> tuple[str, archives.Place]:
        try:
            found = self.build.pictures().find(path)
        except RecordError as error:
            raise RecordError(error.reason, error.field, error.detail, record_id) from None
        if found is None:
            raise RecordError("picture is missing", "image", path, record_id)
        return found

    def _count_tokens(self, conversation: Conversation) -> int | None:
        """Tokens of the rendered conversation, each picture taking none."""
        tokenizer = self.build.load_tokenizer()
        if tokenizer is None:
            return None
        nothing = [np.zeros(0, np.int32)] * len(conversation.images)
        rendered = chat.render(
            conversation.turns, tokenizer, nothing, tiles_per_image=[0] * len(nothing)
        )
        return len(rendered.tokens)

    def store(self, chunk: int) -> None:
        """Writes the shard of a chunk, its rows of the index and what was rejected."""
        build = self.build
        done = build.path("records", chunk, "json")
        if done.is_file():
            return
        sizes = Pictures(build).open_sizes()
        parsed = pq.read_table(build.path("parsed", chunk, "parquet"))
        index, rejected = [], []
        for row in parsed.to_pylist():
            row = _with_sizes(row, sizes)
            if row["reason"]:
                rejected.append(row)
            else:
                index.append(row | {"row": len(index), "split": SPLIT})
        path = build.path("records", chunk, "array_record")
        examples = (row["example"] for row in index)
        count, num_bytes = write_store.write_shard(path, examples, write_store.RECORD_CODEC)
        schema = pa.schema([f for f in INDEX_SCHEMA if f.name not in ("position", "shard")])
        write_parquet(build.path("records", chunk, "parquet"), index, schema)
        summary = {
            "count": count,
            "num_bytes": num_bytes,
            "identified": sum(row["identified"] for row in index),
            "reasons": rejections.count(rejected),
            "examples": [self._example(row, chunk) for row in rejected[:KEPT_EXAMPLES]],
        }
        write_json(done, summary | write_store.fingerprint(path))

    def _example(self, row: dict[str, Any], chunk: int) -> dict[str, Any]:
        """A rejected record as it was, for `rejected.jsonl`."""
        raw = row["raw"]
        if raw is None:
            raw = next(line for number, line in self._lines(chunk) if number == row["number"])
        fields = {name: row[name] for name in ("number", "id", "reason", "field", "detail")}
        return fields | {"record": json.loads(raw)}

    def rejected_while_parsing(self, faults: Mapping[str, str] | None = None) -> Reasons:
        """Of all parsed records; with `faults` (key of a picture -> fault) also those with such a picture."""
        faults = faults or {}
        found = []
        for chunk in range(self.build.chunks):
            path = self.build.path("parsed", chunk, "parquet")
            for row in pq.read_table(path, columns=["reason", "id", "keys"]).to_pylist():
                of_pictures = (faults[key] for key in row["keys"] or () if key in faults)
                if reason := row["reason"] or next(of_pictures, None):
                    found.append({"reason": reason, "id": row["id"]})
        return rejections.count(found)

    def rejected(self) -> Reasons:
        """Of all stored chunks."""
        build = self.build
        return rejections.merge(
            read_json(build.path("records", chunk, "json"))["reasons"]
            for chunk in range(build.chunks)
        )

    def forget_stored(self) -> None:
        """Removes what was made of the parsed records, so that the next run looks at it again."""
        for path in (self.build.work / "records").glob("*.json"):
            path.unlink()

    def forget_rejected(self) -> None:
        """Removes the chunks in which parsing rejected a record, so that the next run parses them again."""
        for path in (self.build.work / "parsed").glob("*.parquet"):
            reasons = pq.read_table(path, columns=["reason"])["reason"]
            if reasons.null_count < len(reasons):
                path.unlink()


def _with_sizes(row: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """A parsed row with the sizes of its pictures, or with the fault of the first that has one."""
    if row["reason"]:
        return row
    seen = {key: sizes[key] for key in row["keys"]}
    for key, (_, _, fault, detail) in seen.items():
        if fault:
            return row | {"reason": fault, "field": "image", "detail": f"{key}: {detail}"}
    return row | {"image_sizes": [seen[key][:2] for key in row["keys"]]}


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
