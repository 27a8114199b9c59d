"""Reads the released records of PangeaIns, one JSON array of 12 GB, as a stream; also JSONL and Parquet.

The memory that is needed does not depend on the size of the file. `archives` finds the pictures.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.work.restart import WorkError

RECORD_SUFFIXES = (".json", ".jsonl", ".parquet")
RELEASED_NAME = "PangeaIns.json"
_BLOCK = 1 << 18
_PARQUET_BATCH = 1024
_MAX_NESTING = 100  # records of PangeaIns have 3 levels
_TOO_DEEP = f"nested more than {_MAX_NESTING} levels deep"


class ReleaseError(WorkError):
    """The release cannot be read.

    Attributes:
      path: the file with the fault.
      offset: the byte of the fault; None if that has no meaning.
    """

    def __init__(self, path: Path | str, problem: str, offset: int | None = None):
        self.path, self.problem, self.offset = str(path), problem, offset
        place = "" if offset is None else f", byte {offset:,}"
        super().__init__(f"{path}{place}: {problem}")

    def __reduce__(self):
        return type(self), (self.path, self.problem, self.offset)


def record_files(source: Path) -> list[Path]:
    """The files of the records: `source` itself, or the files in the folder `source`.

    In a folder that is PangeaIns.json; without it, the Parquet, JSONL or JSON files, but not those in subfolders.

    Raises:
      ReleaseError: there are none, or files of two kinds.
    """
    if source.is_file():
        return [source]
    if (source / RELEASED_NAME).is_file():
        return [source / RELEASED_NAME]
    found = sorted(p for p in source.glob("*") if p.suffix in RECORD_SUFFIXES and p.is_file())
    if not found:
        raise ReleaseError(source, f"holds no {RELEASED_NAME}, nor *.json, *.jsonl or *.parquet")
    if len({path.suffix for path in found}) > 1 or (len(found) > 1 and found[0].suffix == ".json"):
        names = ", ".join(path.name for path in found[:5])
        raise ReleaseError(source, f"holds several sets of records ({names}); name one of them")
    return found


def read_records(path: Path, on_bytes: Callable[[int], Any] = lambda count: None) -> Iterator[Any]:
    """Streams the records of one file in their order.

    Args:
      path: `.json` (one array), `.jsonl` (one object a line) or `.parquet`.
      on_bytes: called with the number of bytes read since the last call.

    Yields:
      the values in the file, also those that are not records. A text instead of a value that is nested too deeply.

    Raises:
      ReleaseError: the file is broken or ends too early; names the byte.
    """
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ReleaseError(path, f"is not one of {', '.join(RECORD_SUFFIXES)}")
    return readers[path.suffix](path, on_bytes)


def _json_parser():
    # By itself ijson would use a parser in Python, 20 times slower, if the C parser is missing.
    try:
        return ijson.get_backend("yajl2_c")
    except ImportError as error:
        raise ReleaseError("ijson", f"has no C parser here ({error}); reinstall ijson") from None


class _Counted:
    """A file that reports the number of bytes read, and knows where the last block began."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], Any]):
        self._file, self._on_bytes, self.start, self.end = file, on_bytes, 0, 0

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        if block:
            self.start, self.end = self.end, self.end + len(block)
            self._on_bytes(len(block))
        return block


def _read_json(path, on_bytes):
    parser = _json_parser()
    with path.open("rb") as file:
        first = file.read(4096).lstrip()[:1]
        if first != b"[":
            raise ReleaseError(path, f"expected an array of records, found {first!r}", 0)
        file.seek(0)
        counted, number = _Counted(file, on_bytes), 0
        try:
            for record in parser.items(counted, "item", use_float=True, buf_size=_BLOCK):
                yield record if _is_shallow(record) else _TOO_DEEP
                number += 1
        except ijson.JSONError as error:
            offset = _offset_of_error(path, counted.start)
            ended = offset == path.stat().st_size
            problem = "ends inside the array" if ended else f"is not JSON ({_line(error)})"
            raise ReleaseError(path, f"{problem}, after {number:,} records", offset) from None


def _offset_of_error(path: Path, block: int) -> int:
    """Parses the file again, the last block byte by byte, since the parser does not say where the error is."""
    parser = _json_parser()
    events = _Sink()
    feed = parser.basic_parse_coro(events, use_float=True)
    with path.open("rb") as file:
        while file.tell() < block:
            feed.send(file.read(min(_BLOCK, block - file.tell())))
        while byte := file.read(1):
            try:
                feed.send(byte)
            except ijson.JSONError:
                return file.tell() - 1
        return file.tell()


class _Sink:
    def send(self, event: Any) -> None:
        pass


def _read_jsonl(path, on_bytes):
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            on_bytes(len(line))
            if line.strip():
                try:
                    yield _loaded(line)
                except json.JSONDecodeError as error:
                    place = offset + len(error.doc[: error.pos].encode("utf-8", "surrogatepass"))
                    raise ReleaseError(path, f"line {number}: {error.msg}", place) from None
                except UnicodeDecodeError as error:
                    problem = f"line {number}: not UTF-8 ({error.reason})"
                    raise ReleaseError(path, problem, offset + error.start) from None
            offset += len(line)


def _loaded(line: bytes) -> Any:
    """The value of a line of JSON. If it is nested too deeply: a text with its beginning, which is not a record."""
    try:
        record = json.loads(line)
        if line.count(b"[") + line.count(b"{") <= _MAX_NESTING or _is_shallow(record):
            return record
    except RecursionError:
        pass
    return f"{_TOO_DEEP}: {line[:40].decode('utf-8', 'replace')}"


def _is_shallow(record: Any) -> bool:
    """Whether a record is nested so little that every writer and worker can handle it."""
    level = [record]
    for _ in range(_MAX_NESTING + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return True
        level = [
            part
            for value in level
            for part in (value.values() if isinstance(value, dict) else value)
        ]
    return False


def _read_parquet(path, on_bytes):
    try:
        with pq.ParquetFile(path) as file:
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(_PARQUET_BATCH):
                on_bytes(round(share * len(batch)))
                # A record has null in the columns of the fields that it lacks.
                for row in batch.to_pylist():
                    yield {name: value for name, value in row.items() if value is not None}
    except (pa.ArrowInvalid, OSError) as error:
        raise ReleaseError(path, f"is not a complete Parquet file ({_line(error)})") from None


def _line(error: Exception) -> str:
    text = str(error)
    # If a text cannot be decoded, ijson gives the message of the C parser as the repr of bytes.
    text = text[2:] if text.startswith("b'") else text
    return re.split(r"\n|\\n", text.strip())[0][:120]
