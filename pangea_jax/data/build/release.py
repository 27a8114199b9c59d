"""Reads the released records of PangeaIns, one JSON array of 12 GB, as a stream; also JSONL and Parquet.

The memory that is needed does not depend on the size of the file. `archives` finds the pictures.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.data.build import json_records
from pangea_jax.work import untrusted
from pangea_jax.work.restart import WorkError

RECORD_SUFFIXES = (".json", ".jsonl", ".parquet")
RELEASED_NAME = "PangeaIns.json"
_PARQUET_BATCH = 1024


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


def read_records(
    path: Path, on_bytes: Callable[[int], Any] = lambda count: None, form: str | None = None
) -> Iterator[Any]:
    """Streams the records of one file in their order.

    Args:
      path: `.json` (one array), `.jsonl` (one object a line) or `.parquet`.
      on_bytes: called with the number of bytes read since the last call.
      form: one of these suffixes, if the name of the file does not say its form.

    Yields:
      the values in the file, also those that are not records. What cannot be read gives an object, see `json_records`.

    Raises:
      ReleaseError: the file is broken or ends too early; names the byte.
    """
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    form = form or path.suffix
    if form not in readers:
        raise ReleaseError(path, f"is not one of {', '.join(RECORD_SUFFIXES)}")
    return readers[form](path, on_bytes)


def _read_json(path, on_bytes):
    number = 0
    with _opened(path) as file:
        try:
            for record in json_records.read_array(file, on_bytes):
                yield record
                number += 1
        except json_records.Malformed as error:
            if error.offset or error.ended:
                problem = (
                    "ends inside the array" if error.ended else f"is not JSON ({error.problem})"
                )
                raise ReleaseError(
                    path, f"{problem}, after {number:,} records", error.offset
                ) from None
            raise ReleaseError(path, error.problem, 0) from None


def _read_jsonl(path, on_bytes):
    with _opened(path) as file:
        try:
            for _, record in json_records.read_lines(file, on_bytes):
                yield record
        except json_records.Malformed as error:
            raise ReleaseError(path, error.problem, error.offset) from None


def _opened(path: Path) -> BinaryIO:
    try:
        return untrusted.open_regular(path)
    except untrusted.NotRegular as error:
        raise ReleaseError(path, str(error).partition(" is ")[2]) from None


def _read_parquet(path, on_bytes):
    try:
        with pq.ParquetFile(path) as file:
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(_PARQUET_BATCH):
                on_bytes(round(share * len(batch)))
                # A record has null in the columns of the fields that it lacks.
                for row in batch.to_pylist():
                    record = {name: value for name, value in row.items() if value is not None}
                    yield json_records.within_depth(record)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise ReleaseError(path, f"is not a complete Parquet file ({_line(error)})") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
