"""The records of a build: read once in their order, validated, and written with their rows of the index."""

import dataclasses
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from pangea_jax.data import chat
from pangea_jax.data.build import archives, rejections, release, write_store
from pangea_jax.data.build.parts import RECORDS, SPLIT
from pangea_jax.data.build.pictures import PLACE, Pictures
from pangea_jax.data.build.plan import Build, BuildError
from pangea_jax.data.build.rejections import Reasons
from pangea_jax.data.record import Conversation, RecordError, data_set, identify_language
from pangea_jax.work.atomic import partial_path, write_json, write_parquet

KEPT_EXAMPLES = 20
"""The number of rejected records that are written out, from the first on."""

_PARSED = pa.schema(
    [
        ("number", pa.int64()),
        *((name, pa.string()) for name in ("id", "source", "language", "category", "kind")),
        *((name, pa.int32()) for name in ("num_images", "num_turns", "num_tokens")),
        ("identified", pa.bool_()),
        ("keys", pa.list_(pa.string())),
        ("places", pa.list_(pa.struct(PLACE))),
        ("example", pa.binary()),
        *((name, pa.string()) for name in ("reason", "field", "detail")),
    ]
)


@dataclasses.dataclass(frozen=True)
class Records:
    """The steps of a build that deal with records."""

    build: Build

    def split(self, progress: Progress) -> Iterator[int]:
        """Cuts the records into chunks; yields a chunk's number when the chunk is on disk.

        Raises:
          BuildError: there are no records.
          ReleaseError: the file is broken.
        """
        build, done = self.build, self.build.work / "raw.json"
        if done.is_file():
            task = progress.add_task("checking records", total=build.chunks, unit="shards")
            for number in range(build.chunks):
                yield number
                progress.advance(task)
            return
        files = release.record_files(build.source)
        size = sum(path.stat().st_size for path in files)
        task = progress.add_task("reading records", total=size, unit="bytes")

        def on_bytes(count: int) -> None:
            progress.advance(task, count)

        records = (r for path in files for r in release.read_records(path, on_bytes))
        lines = map(_line, itertools.islice(records, build.limit))
        total = number = 0
        while chunk := list(itertools.islice(lines, build.records_per_shard)):
            path = build.path("raw", number, "jsonl.zst")
            if not path.is_file():
                partial = partial_path(path)
                with pa.output_stream(partial, compression="zstd", buffer_size=1 << 20) as stream:
                    stream.writelines(chunk)
                os.replace(partial, path)
            total, number = total + len(chunk), number + 1
            progress.update(task, records=total)
            yield number - 1
        if not total:
            raise BuildError(f"{files[0]} holds no records")
        write_json(done, {"records": total, "chunks": number})

    def _lines(self, chunk: int) -> Iterator[tuple[int, str]]:
        """(number in the release, JSON) of the records of a chunk."""
        path = self.build.path("raw", chunk, "jsonl.zst")
        with pa.input_stream(path, compression="zstd") as stream:
            lines = io.TextIOWrapper(stream, encoding="utf-8")
            yield from enumerate(lines, chunk * self.build.records_per_shard)

    def parse(self, chunk: int) -> None:
        """Validates the records of a chunk and finds their pictures, without reading the pictures."""
        path = self.build.path("parsed", chunk, "parquet")
        if path.is_file():
            return
        rows = []
        for number, line in self._lines(chunk):
            raw = json.loads(line)
            try:
                row = self._parsed(raw)
            except RecordError as error:
                row = rejections.describe(raw, error)
            rows.append({"number": number} | row)
        write_parquet(path, rows, _PARSED)

    def _parsed(self, raw: Any) -> dict[str, Any]:
        default = self.build.default_language
        conversation = Conversation.from_pangeains(
            raw, default_language=default or identify_language
        )
        found = [self._find(path, conversation.id) for path in conversation.images]
        keys = tuple(key for key, _ in found)
        # The place where a picture was found names its data set better than an absolute path does.
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
        """Tokens of the rendered conversation, without those of its pictures."""
        tokenizer = self.build.load_tokenizer()
        if tokenizer is None:
            return None
        nothing = [np.zeros(0, np.int32)] * len(conversation.images)
        rendered = chat.render(
            conversation.turns, tokenizer, nothing, tiles_per_image=[0] * len(nothing)
        )
        return len(rendered.tokens)

    def store(self, chunk: int) -> None:
        """Writes the shard of a chunk, its rows of the index, and the first rejected records."""
        if RECORDS.is_stored(self.build, chunk):
            return
        parsed = pq.read_table(self.build.path("parsed", chunk, "parquet")).to_pylist()
        pictures, faults = Pictures(self.build), Pictures(self.build).faults()
        sizes = pictures.sizes({key for row in parsed for key in row["keys"] or ()})
        rows, rejected = [], []
        for row in parsed:
            row |= _fault_of_picture(row, faults)
            if row["reason"]:
                rejected.append(row)
            else:
                image_sizes = [sizes[key] for key in row["keys"]]
                rows.append(row | {"split": SPLIT, "row": len(rows), "image_sizes": image_sizes})
        facts = {
            "identified": sum(row["identified"] for row in rows),
            "examples": self._examples(chunk, rejected[:KEPT_EXAMPLES]),
        }
        RECORDS.store(self.build, chunk, (row["example"] for row in rows), rows, facts)

    def _examples(self, chunk: int, rejected: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rejected records as they were released, for `rejected.jsonl`."""
        if not rejected:
            return []
        wanted = {row["number"] for row in rejected}
        raw = {number: line for number, line in self._lines(chunk) if number in wanted}
        names = ("number", "id", "reason", "field", "detail")
        return [
            {name: row[name] for name in names} | {"record": json.loads(raw[row["number"]])}
            for row in rejected
        ]

    def rejected(self, faults: Mapping[str, tuple[str, str]]) -> Reasons:
        """Counts the records that parsing has rejected, or of which a picture has a fault.

        Args:
          faults: see `Pictures.faults`.
        """
        rows = (
            row | _fault_of_picture(row, faults)
            for chunk in range(self.build.chunks)
            for row in pq.read_table(
                self.build.path("parsed", chunk, "parquet"), columns=["reason", "id", "keys"]
            ).to_pylist()
        )
        return rejections.count(row for row in rows if row["reason"])

    def forget_rejected(self) -> None:
        """Removes the chunks in which parsing rejected a record, so that the next run parses them again."""
        for path in (self.build.work / "parsed").glob("*.parquet"):
            reasons = pq.read_table(path, columns=["reason"])["reason"]
            if reasons.null_count < len(reasons):
                path.unlink()


def _fault_of_picture(
    row: Mapping[str, Any], faults: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
    """The reason to reject a parsed row for its first picture with a fault; empty if there is none."""
    if not row["reason"]:
        for key in row["keys"]:
            if key in faults:
                fault, detail = faults[key]
                return {"reason": fault, "field": "image", "detail": f"{key}: {detail}"}
    return {}


def _line(record: Any) -> bytes:
    return json.dumps(record, default=str).encode() + b"\n"
