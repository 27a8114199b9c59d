"""The records of a build: read once in their order, validated, and written with their rows of the index."""

import dataclasses
import io
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.progress import Progress

from pangea_jax import languages
from pangea_jax.data import chat
from pangea_jax.data.build import (
    archives,
    embedded,
    json_records,
    own_files,
    own_records,
    rejections,
    write_store,
)
from pangea_jax.data.build.parts import RECORDS, SPLIT
from pangea_jax.data.build.pictures import PLACE, Pictures
from pangea_jax.data.build.plan import Build, BuildError, digest_key
from pangea_jax.data.build.rejections import Reasons
from pangea_jax.data.record import (
    Conversation,
    RecordError,
    data_set,
    identify_language,
    identify_or_und,
)
from pangea_jax.work.atomic import (
    REMOVE,
    partial_path,
    read_json,
    read_parquet,
    write_json,
    write_parquet,
)

KEPT_EXAMPLES = 1_000
"""The number of rejected records that are written out, from the first on."""
_MAX_NOTES = 50
_LONGEST_LINE = 6 * json_records.MAX_BYTES  # six bytes of JSON for one of the file: \u0001
_LONGEST_EXAMPLE = 1 << 16

_PARSED = pa.schema(
    [
        ("file", pa.string()),
        ("number", pa.int64()),
        *((name, pa.string()) for name in ("id", "source", "language", "category", "kind")),
        *((name, pa.int32()) for name in ("num_images", "num_turns", "num_tokens")),
        ("identified", pa.bool_()),
        ("notes", pa.list_(pa.string())),
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
        if done.is_file() and self._all_raw():
            task = progress.add_task("checking records", total=build.chunks, unit="shards")
            for number in range(build.chunks):
                yield number
                progress.advance(task)
            return
        files = build.record_files()
        size = sum(path.stat().st_size for path in files)
        task = progress.add_task("reading records", total=size, unit="bytes")

        def on_bytes(count: int) -> None:
            progress.advance(task, count)

        columns = _Columns(build.columns)
        records = (
            {"file": _readable(path.name), "number": number, "record": record}
            for path in files
            for number, record in enumerate(
                own_files.read_records(path, on_bytes, build.columns.values()), 1
            )
        )
        pictures = embedded.Writer(build.embedded)
        lines = (
            _line(columns.seen(pictures.take(r))) for r in itertools.islice(records, build.limit)
        )
        total = number = 0
        # One line is in memory at a time, as a line may be long.
        for first in lines:
            chunk = itertools.chain([first], itertools.islice(lines, build.records_per_shard - 1))
            total, number = total + self._write_raw(number, chunk), number + 1
            progress.update(task, records=total)
            yield number - 1
        if not total:
            raise BuildError(f"{files[0]} holds no records; correct --source")
        columns.check(files[0])
        pictures.close()
        found = {"records": total, "chunks": number, "embedded": build.embedded.is_file()}
        write_json(done, found)

    def _all_raw(self) -> bool:
        """Whether nothing that reading wrote has been removed, for example because it was damaged."""
        done = read_json(self.build.work / "raw.json")
        files = [self.build.path("raw", number, "jsonl.zst") for number in range(done["chunks"])]
        files += [self.build.embedded] if done["embedded"] else []
        return all(path.is_file() for path in files)

    def _write_raw(self, chunk: int, lines: Iterable[bytes]) -> int:
        """Writes the lines of a chunk, unless they are there; returns their number."""
        path, count, crc = self.build.path("raw", chunk, "jsonl.zst"), 0, 0
        if path.is_file():
            return sum(1 for _ in lines)
        partial = partial_path(path)
        with pa.output_stream(partial, compression="zstd", buffer_size=1 << 20) as stream:
            for line in lines:
                stream.write(line)
                count, crc = count + 1, zlib.crc32(line, crc)
            stream.write(b"%d\n" % crc)
        os.replace(partial, path)
        return count

    def _raw(self, chunk: int) -> Iterator[dict[str, Any]]:
        """The records of a chunk: `file`, `number` in this file from 1 on, and `record`.

        Raises:
          BuildError: the chunk is damaged. All its records may have been yielded before.
        """
        path = self.build.path("raw", chunk, "jsonl.zst")
        crc, last = 0, b""
        try:
            with pa.input_stream(path, compression="zstd") as stream:
                for line in io.BufferedReader(stream):
                    if last:
                        yield json.loads(last)
                        crc = zlib.crc32(last, crc)
                    last = line
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise BuildError(f"{path} is damaged ({error}); {REMOVE}") from None
        if last != b"%d\n" % crc:
            raise BuildError(f"{path} is damaged; {REMOVE}")

    def parse(self, chunk: int) -> None:
        """Validates the records of a chunk and finds their pictures, without reading the pictures."""
        path = self.build.path("parsed", chunk, "parquet")
        if path.is_file():
            return
        rows = []
        for entry in self._raw(chunk):
            raw, place = entry["record"], {name: entry[name] for name in ("file", "number")}
            default_id = f"{Path(entry['file']).stem}:{entry['number']}"
            read = own_records.Read({})
            try:
                read = own_records.as_pangeains(raw, self.build.rules, default_id)
                row = self._parsed(read)
            except RecordError as error:
                row = rejections.describe(raw, error)
                row["field"] = read.name(row["field"])
            rows.append(place | row)
        write_parquet(path, rows, _PARSED)

    def _parsed(self, read: own_records.Read) -> dict[str, Any]:
        raw, default = read.record, self.build.default_language
        identify = identify_language if self.build.strict_language else identify_or_und
        conversation = Conversation.from_pangeains(raw, default_language=default or identify)
        found = [self._find(path, read, conversation.id) for path in conversation.images]
        keys = tuple(key for key, _ in found)
        # The place where a picture was found names its data set better than an absolute path does.
        source = self.build.own or data_set(keys, conversation.id)
        source = conversation.source if raw.get("source") else source
        category = conversation.category if raw.get("category") else source.partition("/")[0]
        conversation = dataclasses.replace(
            conversation, images=keys, source=source, category=category
        )
        row = write_store.index_row(SPLIT, 0, conversation)
        return {name: row[name] for name in _PARSED.names if name in row} | {
            "num_tokens": self._count_tokens(conversation),
            "identified": (
                not raw.get("language")
                and default is None
                and conversation.language != languages.UNDETERMINED
            ),
            "notes": read.notes[:_MAX_NOTES],
            "keys": keys,
            "places": [place._asdict() for _, place in found],
            "example": write_store.serialize(conversation),
        }

    def _find(
        self, path: str, read: own_records.Read, record_id: str
    ) -> tuple[str, archives.Place]:
        if path in read.embedded:
            digest, size = read.embedded[path]
            return digest_key(digest), archives.Place(embedded.ARCHIVE, digest, 0, size, 0)
        try:
            return self.build.find_picture(path)
        except RecordError as error:
            raise RecordError(error.reason, error.field, error.detail, record_id) from None
        except OSError as error:
            detail = f"{path}: {error}"
            raise RecordError("picture cannot be read", "image", detail, record_id) from None

    def _count_tokens(self, conversation: Conversation) -> int | None:
        """Tokens of the rendered conversation, without those of its pictures."""
        tokenizer = self.build.load_tokenizer()
        if tokenizer is None:
            return None
        nothing = [np.zeros(0, np.int32)] * len(conversation.images)
        rendered = chat.render(
            conversation.turns,
            tokenizer,
            nothing,
            tiles_per_image=[0] * len(nothing),
            system=conversation.system or chat.SYSTEM_PROMPT,
        )
        return len(rendered.tokens)

    def store(self, chunk: int) -> None:
        """Writes the shard of a chunk, and its rows of the index."""
        if RECORDS.is_stored(self.build, chunk):
            return
        parsed = read_parquet(self.build.path("parsed", chunk, "parquet"))
        pictures, faults = Pictures(self.build), Pictures(self.build).faults()
        sizes = pictures.sizes({key for row in parsed for key in row["keys"] or ()})
        rows = []
        for row in parsed:
            row |= _fault_of_picture(row, faults)
            if not row["reason"]:
                image_sizes = [sizes[key] for key in row["keys"]]
                rows.append(row | {"split": SPLIT, "row": len(rows), "image_sizes": image_sizes})
        facts = {
            "identified": sum(row["identified"] for row in rows),
            "undetermined": sum(row["language"] == languages.UNDETERMINED for row in rows),
        }
        RECORDS.store(self.build, chunk, (row["example"] for row in rows), rows, facts)

    def _rejected(self, chunk: int, faults: Mapping[str, tuple[str, str]]) -> Iterator[dict]:
        """The rows of a chunk that parsing has rejected, or of which a picture has a fault.

        They have their place in the chunk as `row`.
        """
        columns = ["file", "number", "id", "reason", "field", "detail", "keys"]
        path = self.build.path("parsed", chunk, "parquet")
        for position, row in enumerate(read_parquet(path, columns)):
            row |= _fault_of_picture(row, faults)
            if row["reason"]:
                yield row | {"row": position}

    def examples(self, faults: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
        """The first rejected records, as they were read and why they were rejected, for `rejected.jsonl`.

        Args:
          faults: see `Pictures.faults`.
        """
        left = KEPT_EXAMPLES
        for chunk in range(self.build.chunks):
            rejected = list(itertools.islice(self._rejected(chunk, faults), left))
            left -= len(rejected)
            wanted = {row["row"]: row for row in rejected}
            for position, entry in enumerate(self._raw(chunk) if wanted else ()):
                if row := wanted.get(position):
                    names = ("file", "number", "id", "reason", "field", "detail")
                    remedy = {"remedy": rejections.remedy(row["reason"])}
                    yield {n: row[n] for n in names} | remedy | {"record": _cut(entry["record"])}

    def rejected(self, faults: Mapping[str, tuple[str, str]]) -> Reasons:
        """Counts the records that parsing has rejected, or of which a picture has a fault.

        Args:
          faults: see `Pictures.faults`.
        """
        chunks = range(self.build.chunks)
        return rejections.count(row for n in chunks for row in self._rejected(n, faults))

    def notes(self) -> dict[str, int]:
        """What was put in another place or not used -> the number of records, the most frequent first."""
        counts: Counter[str] = Counter()
        ids: set[str] = set()
        twice, first = 0, ""
        for chunk in range(self.build.chunks):
            path = self.build.path("parsed", chunk, "parquet")
            for row in read_parquet(path, ["notes", "id", "file", "number"]):
                counts.update(row["notes"] or ())
                if self.build.own and row["id"] in ids:
                    place = f"{row['file']}, record {row['number']:,} ({row['id']!r:.80})"
                    twice, first = twice + 1, first or place
                ids.add(row["id"])
        if twice:
            note = f"field id is that of an earlier record, such as {first}; both are kept; give each its own id"
            counts[note] = twice
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_NOTES])

    def forget_rejected(self) -> None:
        """Removes the chunks in which parsing rejected a record, so that the next run parses them again."""
        for path in (self.build.work / "parsed").glob("*.parquet"):
            if any(row["reason"] for row in read_parquet(path, ["reason"])):
                path.unlink()


def _fault_of_picture(
    row: Mapping[str, Any], faults: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
    """The reason to reject a parsed row for its first picture with a fault; empty if there is none."""
    if not row["reason"]:
        for key in row["keys"]:
            if key in faults:
                fault, detail = faults[key]
                return {"reason": fault, "field": "image", "detail": detail}
    return {}


def _cut(record: Any) -> Any:
    """A record for `rejected.jsonl`: the beginning of its JSON, if it is long."""
    text = json.dumps(record)
    return record if len(text) <= _LONGEST_EXAMPLE else text[:_LONGEST_EXAMPLE]


class _Columns:
    """Checks that the names of `--columns` occur in the records."""

    def __init__(self, columns: Mapping[str, str]):
        self._missing, self._known = dict(columns), {}

    def seen(self, entry: dict[str, Any]) -> dict[str, Any]:
        if self._missing and isinstance(entry["record"], Mapping):
            self._known |= dict.fromkeys(list(entry["record"])[:20])
            for ours, theirs in list(self._missing.items()):
                if theirs in entry["record"]:
                    del self._missing[ours]
        return entry

    def check(self, path: Path) -> None:
        """
        Raises:
          BuildError: no record has one of the names.
        """
        for ours, theirs in self._missing.items():
            names = ", ".join(map(str, list(self._known)[:20]))
            raise BuildError(
                f"{path}: no record has the field {theirs!r} of --columns={ours}={theirs}; "
                f"the fields are {names}"
            )


def _line(entry: dict[str, Any]) -> bytes:
    """An entry of a chunk. A record of a table may be too long, as one of JSON may be."""
    line = json.dumps(entry, default=str).encode() + b"\n"
    if len(line) > _LONGEST_LINE:
        stand_in = json_records.stand_in(entry["record"], json_records.TOO_LONG)
        return _line(entry | {"record": stand_in})
    return line


def _readable(name: str) -> str:
    """The name of a file, which may hold bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
