"""Finds and reads the records of a data set in any of the common forms of files.

The form is recognised by the content, not by the name: one JSON array, JSON lines, Parquet, Arrow (a folder of
`Dataset.save_to_disk`), or a table with a header (CSV with commas or semicolons, TSV). `release` reads the first two.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.data.build import json_records, release
from pangea_jax.data.build.own_records import FAULT, FIELDS
from pangea_jax.data.build.release import ReleaseError
from pangea_jax.work import untrusted

SUFFIXES = (*release.RECORD_SUFFIXES, ".ndjson", ".csv", ".tsv")
EXPECTED = (
    "expected an array of records in JSON, JSON lines, Parquet, Arrow, or a table (CSV, TSV) whose first line has the "
    "names of its columns"
)
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Descriptions of data sets beside the records: of `datasets`, and of LLaMA-Factory.
_NO_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
_OTHER = "other"  # the split of files whose names do not say it
_HEAD = 1 << 16
_COMPRESSED = {
    b"\x1f\x8b": "gzip; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "Zstandard; unpack it with unzstd",
    b"BZh": "bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "xz; unpack it with unxz",
    b"PK\x03\x04": "zip; unpack it, or export an Excel sheet as CSV",
}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MOST_DESCRIPTION = 64 << 20  # bytes of a state.json
_MOST_HEADER = 1 << 20
_DELIMITERS = ",\t;"


def record_files(source: Path, split: str | None = None) -> list[Path]:
    """The files of the records: `source` itself, or those of a folder.

    In a folder these are, the first that is there: PangeaIns.json; what `Dataset.save_to_disk` has written; a metadata
    file beside pictures, as in `datasets`' ImageFolder; the files of records; those in the subfolder `data`.

    Args:
      split: the split to take if there are several.

    Raises:
      ReleaseError: there are none, or those of several sets or splits.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ReleaseError(source, "there is no such file or folder; correct --source")
    if (source / release.RELEASED_NAME).is_file():
        return [source / release.RELEASED_NAME]
    splits = _saved_splits(source) or _splits(_candidates(source) or _candidates(source / "data"))
    if not splits:
        raise ReleaseError(source, _nothing_in(source))
    if split is None and len(splits) > 1:
        first = {name: files[0].relative_to(source) for name, files in sorted(splits.items())}
        names = ", ".join(f"{name}: {path}" for name, path in first.items())
        raise ReleaseError(source, f"holds several splits ({names}); choose one with --split")
    if split is not None and split not in splits:
        names = ", ".join(sorted(splits))
        raise ReleaseError(source, f"has no split {split!r}, it has {names}; correct --split")
    found = next(iter(splits.values())) if split is None else splits[split]
    kinds = {_kind(path) for path in found}
    if len(kinds) > 1 or (len(found) > 1 and found[0].suffix == ".json"):
        raise ReleaseError(source, _several(found))
    return found


def _nothing_in(source: Path) -> str:
    below = sorted(p for name in _METADATA for p in source.glob(f"*/{name}"))
    if below:
        return f"holds no records, but {below[0].parent.name} does; pass --source={below[0].parent}"
    names = ", ".join(sorted(p.name for p in source.iterdir())[:5]) or "nothing"
    return (
        f"holds no {release.RELEASED_NAME}, no file of records ({', '.join(SUFFIXES)}), no metadata.jsonl or "
        f"metadata.csv beside pictures, and is not from Dataset.save_to_disk; it has {names}; correct --source"
    )


def _kind(path: Path) -> str:
    return {".ndjson": ".jsonl", ".tsv": ".csv"}.get(path.suffix, path.suffix)


def _candidates(folder: Path) -> list[Path]:
    """The files of records in a folder, by their suffixes. A metadata file must be alone."""
    files = sorted(p for p in folder.glob("*") if p.is_file() and p.name not in _NO_RECORDS)
    files = [p for p in files if p.suffix in SUFFIXES and not p.name.startswith(".")]
    if len(files) > 1 and any(p.name in _METADATA for p in files):
        raise ReleaseError(folder, _several(files))
    return files


def _several(files: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in files[:5])
    return f"holds several sets of records ({names}); name one of them"


def _splits(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Split -> its files, by their names."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        match = _SPLIT.match(path.name)
        groups.setdefault(match[1].lower() if match else _OTHER, []).append(path)
    return groups


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, in a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`; else empty."""
    if (listed := folder / "dataset_dict.json").is_file():
        return {name: _saved_files(folder / name) for name in _described(listed, "splits")}
    state = folder / "state.json"
    is_saved = state.is_file() and b"_data_files" in _read_description(state)
    return {_OTHER: _saved_files(folder)} if is_saved else {}


def _saved_files(folder: Path) -> list[Path]:
    names = _described(folder / "state.json", "_data_files", "filename")
    files = [folder / name for name in names]
    for path in files:
        if not path.is_file():
            raise ReleaseError(path, f"is missing, but {folder}/state.json names it; copy it again")
    return files


def _read_description(path: Path) -> bytes:
    try:
        return untrusted.read_regular(path, _MOST_DESCRIPTION)
    except OSError as error:
        raise ReleaseError(path, f"cannot be read ({error})") from None


def _described(path: Path, field: str, part: str | None = None) -> list[str]:
    """The names in a list of a description; with `part`, those under this key of its objects."""
    try:
        listed = untrusted.parse_json(_read_description(path))[field]
        names = [entry if part is None else entry[part] for entry in listed]
        if not all(isinstance(name, str) and "\0" not in name for name in names):
            raise TypeError(f"{field} does not list names")
        return names
    except (ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read ({error!r:.80}); save the data set again with save_to_disk"
        raise ReleaseError(path, problem) from None


def read_records(
    path: Path, on_bytes: Callable[[int], Any] = lambda count: None, columns: Iterable[str] = ()
) -> Iterator[Any]:
    """Streams the records of one file in their order.

    Args:
      on_bytes: called with the number of bytes read since the last call.
      columns: names of columns that a table may have, besides those of `own_records.FIELDS`.

    Yields:
      the values in the file, also those that are not records. Pictures in the file are bytes. What cannot be read
        gives an object, see `json_records`.

    Raises:
      ReleaseError: the file has no known form, is broken or ends too early.
    """
    with _opened(path) as file:
        head = file.read(_HEAD)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _read_arrow(path, on_bytes)
    _check_encoding(path, head)
    if head.startswith(b"PAR1"):
        return _read_parquet(path, on_bytes)
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"[":
        return _read_json(path, on_bytes, ".json")
    if first == b"{":
        _check_lines(path)
        return _read_json(path, on_bytes, ".jsonl")
    return _read_table(path, on_bytes, {*columns, *(n for names in FIELDS.values() for n in names)})


def _opened(path: Path) -> BinaryIO:
    try:
        return untrusted.open_regular(path)
    except OSError as error:
        raise ReleaseError(path, f"cannot be read ({error})") from None


def _check_encoding(path: Path, head: bytes) -> None:
    if not head.strip():
        raise ReleaseError(path, f"is empty; {EXPECTED}", 0)
    for magic, how in _COMPRESSED.items():
        if head.startswith(magic):
            raise ReleaseError(path, f"is compressed with {how}", 0)
    nulls = max(head[start:400:2].count(0) for start in (0, 1))
    if head.startswith(_UTF_16) or nulls > 0.4 * len(head[:400]):
        problem = (
            "is text in UTF-16, expected UTF-8; save it again in UTF-8 (iconv -f UTF-16 -t UTF-8)"
        )
        raise ReleaseError(path, problem, 0)
    if b"\0" in head and not head.startswith(b"PAR1"):
        raise ReleaseError(path, f"is of no known form; {EXPECTED}", head.index(b"\0"))


def _check_lines(path: Path) -> None:
    """An object may go over several lines in JSON, but not in JSON lines."""
    with _opened(path) as file:
        line = file.readline(json_records.MAX_BYTES)
        if not line.endswith(b"\n"):  # the last one, or one that is too long
            return
        line, rest = line.removeprefix(codecs.BOM_UTF8).strip(), file.readline(_HEAD).strip()
    if line == b"{" or (rest and not line.endswith(b"}") and not rest.startswith(b"{")):
        problem = (
            "line 1: an object over several lines; expected an array of records or one record a line; "
            "put the records between [ and ], with commas between them"
        )
        raise ReleaseError(path, problem, 0)


def _read_json(path, on_bytes, form):
    try:
        yield from release.read_records(path, on_bytes, form)
    except ReleaseError as error:
        problem = f"{error.problem}; correct the file there, or copy it again"
        raise ReleaseError(path, problem, error.offset) from None


# Arrow and Parquet.

_ROWS = 1024
_SLICE_BYTES = 64 << 20


def _read_arrow(path, on_bytes):
    """An Arrow file, or a stream as `save_to_disk` writes it."""
    try:
        with pa.memory_map(str(path)) as file:
            is_file, before = file.read(6) == b"ARROW1", 0
            file.seek(0)
            for batch in _arrow_batches(file, is_file):
                batch.validate(full=True)  # a damaged one may point out of its memory
                yield from _rows(batch, _class_names(batch.schema))
                on_bytes(0 if is_file else file.tell() - before)
                before = file.tell()
    except (pa.ArrowException, OSError) as error:
        raise _incomplete(path, "Arrow", error) from None


def _arrow_batches(file, is_file) -> Iterator[pa.RecordBatch]:
    if is_file:
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(file)


def _read_parquet(path, on_bytes):
    try:
        with pq.ParquetFile(path) as file:
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            classes = _class_names(file.schema_arrow)
            # A row with pictures may have megabytes.
            size = min(_ROWS, max(1, int(_SLICE_BYTES / max(1, share))))
            for batch in file.iter_batches(size):
                on_bytes(round(share * len(batch)))
                yield from _rows(batch, classes)
    except (pa.ArrowException, OSError) as error:
        raise _incomplete(path, "Parquet", error) from None


def _incomplete(path: Path, form: str, error: Exception) -> ReleaseError:
    said = (str(error).strip().splitlines() or [""])[0][:120]
    return ReleaseError(path, f"is not a complete {form} file ({said}); copy or write it again")


def _rows(batch: pa.RecordBatch, classes: Mapping[str, list[str]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch, each without the columns in which it has null.

    Args:
      classes: see `_class_names`; a number becomes its name.
    """
    step = max(1, _SLICE_BYTES * len(batch) // max(1, batch.nbytes))
    for start in range(0, len(batch), step):
        for row in _read_rows(batch.slice(start, step)):
            for name in classes.keys() & row.keys():
                if isinstance(row[name], int) and 0 <= row[name] < len(classes[name]):
                    row[name] = classes[name][row[name]]
            # A record has null in the columns of the fields that it lacks.
            record = {name: value for name, value in row.items() if value is not None}
            yield json_records.within_depth(record)


def _read_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch. Those with a value that Python cannot hold have a fault instead."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, KeyError) as error:
        # Text that is not UTF-8, a date after the year 9999, a time zone that does not exist (a KeyError).
        if len(batch) == 1:
            return [{FAULT: _fault(batch, error)}]
        return [row for n in range(len(batch)) for row in _read_rows(batch.slice(n, 1))]


def _fault(batch: pa.RecordBatch, error: Exception) -> list[str]:
    """The fault of a batch of one row, see `own_records`."""
    if isinstance(error, UnicodeDecodeError):
        return ["not valid Unicode", "row", f"not UTF-8 ({error.reason})"]
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except (ValueError, OverflowError, KeyError) as found:
            return ["cannot be read", name, f"a {column.type} out of range ({found!s:.80})"]
    return ["cannot be read", "row", f"{error!s:.80}"]


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> names of its numbers, for each ClassLabel that `datasets` describes in a schema."""
    described = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(described)["info"]["features"]
        return {
            name: list(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # another program has written the file


# Tables.


def _read_table(path, on_bytes, known):
    csv.field_size_limit(json_records.MAX_BYTES)
    lines = _decoded(path, on_bytes)
    delimiter, header = _header(path, next(lines), known)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    begin = 2
    try:
        for row in reader:
            if any(row):  # not an empty row
                yield _row(header, row, begin)
            begin = reader.line_num + 2
    except csv.Error as error:
        problem = (
            f"the row that begins in line {begin}: {error}; close every quote, write a quote inside a cell "
            f"twice, and keep a cell below {json_records.MAX_BYTES:,} letters"
        )
        raise ReleaseError(path, problem) from None


def _decoded(path: Path, on_bytes: Callable[[int], Any]) -> Iterator[str]:
    """The lines of a table. Bytes that are not UTF-8 become halves of surrogate pairs, see `_row`."""
    offset = number = 0
    with _opened(path) as file:
        while line := file.readline(json_records.MAX_BYTES + 1):
            number += 1
            if len(line) > json_records.MAX_BYTES:
                problem = f"line {number}: {json_records.TOO_LONG}; shorten it"
                raise ReleaseError(path, problem, offset)
            on_bytes(len(line))
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
            offset += len(line)


def _header(path: Path, line: str, known: set[str]) -> tuple[str, list[str]]:
    """The delimiter of a table and the names of its columns."""
    if len(line) > _MOST_HEADER:
        raise ReleaseError(path, f"is of no known form; {EXPECTED}", 0)
    if not _is_unicode([line]):
        raise ReleaseError(path, "line 1: not UTF-8; save the file again in UTF-8", 0)
    found = [(sep, next(csv.reader([line], delimiter=sep), [])) for sep in _DELIMITERS]
    delimiter, names = max(found, key=lambda one: (len(known & set(one[1])), len(one[1])))
    names = [name.strip() for name in names]
    # Programs for tables like capital letters.
    names = [name if name in known or name.lower() not in known else name.lower() for name in names]
    if not known & set(names):
        if len(names) == 1:
            raise ReleaseError(
                path, f"is of no known form; {EXPECTED}; it begins with {line[:60]!r}", 0
            )
        problem = (
            f"line 1: none of the columns {', '.join(names)[:200]} is known; if they are names, say which is which, "
            "such as --columns=image=YOURS,question=YOURS,answer=YOURS; else put a line with the names of the columns "
            "(image,question,answer) in front"
        )
        raise ReleaseError(path, problem, 0)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ReleaseError(
            path, f"line 1: two columns are called {twice[0]!r}; rename one of them", 0
        )
    return delimiter, names


def _is_unicode(texts: Iterable[str]) -> bool:
    try:
        return all(text.encode() is not None for text in texts)
    except UnicodeEncodeError:
        return False


def _row(header: list[str], cells: list[str], line: int) -> dict[str, Any]:
    if not _is_unicode(cells):
        names = [name for name, cell in zip(header, cells) if not _is_unicode([cell])]
        return {FAULT: ["not valid Unicode", (names or ["row"])[0], f"line {line}: not UTF-8"]}
    if sum(map(len, cells)) > json_records.MAX_BYTES:
        return json_records.stand_in({}, f"{json_records.TOO_LONG}, in line {line}")
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    detail = f"line {line} has {len(cells)} cells, the header has {len(header)}: {cells!r:.80}"
    return {FAULT: ["wrong number of cells", "row", detail]}
