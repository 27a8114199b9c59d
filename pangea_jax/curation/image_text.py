"""Reads pictures with alt text from the files of crawls.

The files are Parquet files (LAION's metadata with addresses of pictures, or files with the pictures in a column) or
tar files that img2dataset wrote. A row that cannot be read gives a `Fault` with a reason, not an exception, since
every crawl has such rows.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pangea_jax.data import image
from pangea_jax.data.build.archives import tar_members
from pangea_jax.data.build.release import ReleaseError

MAX_PICTURE_BYTES, MAX_TEXT_BYTES, MAX_JSON_BYTES = 32 << 20, 4 << 20, 1 << 20

# Field of a `Pair` -> names of its column in files of LAION, img2dataset and the Hub.
_COLUMNS = {
    "id": ("sample_id", "id", "uid"),
    "key": ("key",),  # of img2dataset; unique only within one of its outputs
    "text": ("text", "caption", "alt_text", "alt", "txt"),
    "url": ("url", "image_url"),
    "language": ("language", "lang"),
    "nsfw": ("nsfw",),
    "similarity": ("similarity", "clip_score", "clip_similarity"),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "encoded": ("image", "jpg", "jpeg", "png", "webp", "image_bytes"),
}
_PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
PART_ROWS, _PARQUET_BATCH = 65_536, 128


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A picture and its alt text.

    Attributes:
      id: id in the source. If it has none or only img2dataset's key: the path of the file in the source, and the
        key, the name in the tar file, or the row.
      text: the alt text.
      url: address of the picture; may be empty.
      language: language tag of the source; may be empty.
      nsfw: LAION's tag `UNLIKELY`, `UNSURE` or `NSFW`; may be empty.
      similarity: CLIP's cosine similarity of picture and text; None if unknown.
      width, height: pixels of the picture as the source says; None if it does not say.
      encoded: the bytes of the picture; None if only its address is known.
      place: where these bytes are in a file; None if they are in a column.
    """

    id: str
    text: str
    url: str = ""
    language: str = ""
    nsfw: str = ""
    similarity: float | None = None
    width: int | None = None
    height: int | None = None
    encoded: bytes | None = None
    place: "Place | None" = None


class Place(NamedTuple):
    """Where the bytes of a picture are: a file, and the range of its bytes."""

    path: str
    offset: int
    size: int

    def read(self, folder: Path) -> bytes:
        """The bytes. A relative path begins at `folder`.

        Raises:
          OSError: the file is gone or too short.
        """
        with (folder / self.path).open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.path} ends inside a picture; it has changed since it was read")
        return data


class Fault(NamedTuple):
    """A row that could not be read; the reason is a short fixed phrase."""

    id: str
    reason: str


class Part(NamedTuple):
    """A piece of work: a tar file, or `PART_ROWS` rows of a row group of a Parquet file.

    Attributes:
      row_group: number of the row group; None: a tar file.
      first_row: number of the first row in its row group. Row groups of LAION have a million rows.
      name: path of the file in the source, for ids; empty: the name of the file.
    """

    path: str
    row_group: int | None = None
    first_row: int = 0
    name: str = ""


def find_parts(source: Path) -> list[Part]:
    """The parts of a file, or of all files in a folder and its subfolders, in the order of their names.

    A Parquet file beside a tar file of the same name is img2dataset's list of its contents, and is not read.

    Raises:
      FileNotFoundError: there are no parts.
    """
    source = source.resolve()  # workers may run in another folder
    paths = [source] if source.is_file() else sorted(source.rglob("*"))
    tars = {path for path in paths if path.suffix == ".tar"}
    parts: list[Part] = []
    for path in paths:
        name = "" if path == source else _text(path.relative_to(source))
        if path in tars:
            parts.append(Part(str(path), name=name))
        elif path.suffix == ".parquet" and path.with_suffix(".tar") not in tars:
            parts += [part._replace(name=name) for part in _parquet_parts(path)]
    if not parts:
        raise FileNotFoundError(f"{source} holds no *.parquet and no *.tar")
    return parts


def _text(path: Path) -> str:
    """A path for use in ids: these are UTF-8, but names of files need not be."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


# A damaged footer can raise any of these in Arrow.
_PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, LookupError)


def _parquet_parts(path: Path) -> list[Part]:
    try:
        groups = _group_sizes(pq.read_metadata(path))
    except _PARQUET_ERRORS:
        return [Part(str(path), 0)]  # `read` then gives the fault
    return [
        Part(str(path), group, first)
        for group, total in enumerate(groups)
        for first in range(0, total, PART_ROWS)
    ]


def read(part: Part) -> Iterator[Pair | Fault]:
    """The rows of a part. Every row of a Parquet file gives a pair or a fault."""
    path = Path(part.path)
    label = part.name or _text(Path(path.name))
    if part.row_group is None:
        yield from _read_tar(path, label)
    else:
        yield from _read_parquet(path, label, part.row_group, part.first_row)


def _read_parquet(path: Path, label: str, group: int, first: int) -> Iterator[Pair | Fault]:
    stem = label.removesuffix(".parquet")
    name = f"{stem}-{group}"
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True, buffer_size=1 << 20)
        columns = _columns(file.schema_arrow.names)
        last = min(_group_sizes(file.metadata)[group], first + PART_ROWS)
    except _PARQUET_ERRORS:
        yield Fault(label, "Parquet file cannot be read")
        return
    with file:
        if "text" not in columns:
            yield from (
                Fault(f"{name}-{row}", "no column of alt text") for row in range(first, last)
            )
            return
        number = first
        for row in _parquet_rows(file, group, columns, first, last, stem):
            yield row
            number += 1
        # Damage may also end the rows too early, without an error.
        yield from (Fault(f"{name}-{n}", "row group is damaged") for n in range(number, last))


def _parquet_rows(file, group, columns, first, last, stem) -> Iterator[Pair | Fault]:
    """The rows from `first` to `last`, or up to the first damage."""
    number = 0
    try:
        for batch in file.iter_batches(_PARQUET_BATCH, [group], columns=list(columns.values())):
            for row in range(max(0, first - number), min(len(batch), last - number)):
                yield _parquet_row(batch, row, columns, stem, f"{stem}-{group}-{number + row}")
            number += len(batch)
            if number >= last:
                return
    except _PARQUET_ERRORS:
        return


def _group_sizes(metadata: pq.FileMetaData) -> list[int]:
    """The number of rows of each row group.

    Raises:
      ValueError: their sum is wrong, so that no number can be trusted.
    """
    # The columns are not checked: if their metadata are damaged, pyarrow ends the process.
    sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows, row groups of {sizes[:5]}")
    return sizes


def _columns(names: Sequence[str]) -> dict[str, str]:
    """Field of a `Pair` -> name of its column."""
    there = {name.lower(): name for name in names}
    found = {}
    for field, spellings in _COLUMNS.items():
        column = next((there[s] for s in spellings if s in there), None)
        if column is not None:
            found[field] = column
    return found


def _parquet_row(batch: pa.RecordBatch, row: int, columns, stem: str, name: str) -> Pair | Fault:
    try:
        values = {field: batch[column][row].as_py() for field, column in columns.items()}
    except UnicodeDecodeError:
        return Fault(name, "text is not UTF-8")
    encoded = values.get("encoded")
    if isinstance(encoded, Mapping):  # the form of the Hub: {"bytes", "path"}
        values["encoded"] = encoded.get("bytes")
    key = _id(values.pop("key", None))
    return _pair(values, f"{stem}-{key}" if key else name)


def _read_tar(path: Path, label: str) -> Iterator[Pair | Fault]:
    stem = label.removesuffix(".tar")
    key, fields = None, {}
    try:
        with path.open("rb") as file:
            for member, offset, size, _ in tar_members(file, path):
                folder, slash, rest = member.rpartition("/")
                sample, _, suffix = rest.partition(".")
                sample = f"{folder}{slash}{sample}"
                if sample != key:
                    if key is not None:
                        yield _tar_row(fields, f"{stem}-{key}")
                    key, fields = sample, {}
                position = file.tell()
                _add_member(fields, suffix.lower(), file, Place(str(path), offset, size))
                file.seek(position)
    except (ReleaseError, OSError):
        if "encoded" in fields and fields.keys() & {
            "txt",
            "json",
        }:  # it was whole before the damage
            yield _tar_row(fields, f"{stem}-{key}")
        yield Fault(f"{label}:{key}" if key else label, "tar file is damaged or cut off")
        return
    if key is not None:
        yield _tar_row(fields, f"{stem}-{key}")


def _add_member(fields: dict[str, Any], suffix: str, file, place: Place) -> None:
    """Reads a file of a sample into its fields; ignores files of other kinds."""
    limits = {"txt": MAX_TEXT_BYTES, "json": MAX_JSON_BYTES}
    limits |= dict.fromkeys(_PICTURE_SUFFIXES, MAX_PICTURE_BYTES)
    if suffix not in limits:
        return
    field = suffix if suffix in ("txt", "json") else "encoded"
    if place.size > limits[suffix]:
        fields["fault"] = f"{'picture' if field == 'encoded' else field} file is too large"
        return
    file.seek(place.offset)
    fields[field] = file.read(place.size)
    if len(fields[field]) != place.size:
        raise OSError("cut off")
    if field == "encoded":
        fields["place"] = place


def _tar_row(fields: dict[str, Any], name: str) -> Pair | Fault:
    if "fault" in fields:
        return Fault(name, fields["fault"])
    try:
        stated = json.loads(fields.get("json", b"{}"))
    except (ValueError, RecursionError):
        return Fault(name, "metadata is not JSON")
    if not isinstance(stated, dict):
        return Fault(name, "metadata is not JSON")
    values = {field: stated[column] for field, column in _columns(list(stated)).items()}
    try:
        if "txt" in fields:
            values["text"] = fields["txt"].decode()
    except UnicodeDecodeError:
        return Fault(name, "text is not UTF-8")
    return _pair(values | {"encoded": fields.get("encoded")}, name, fields.get("place"))


def _pair(values: Mapping[str, Any], name: str, place: Place | None = None) -> Pair | Fault:
    text, encoded = values.get("text"), values.get("encoded")
    if not isinstance(text, str) or not text.strip():
        return Fault(name, "no alt text")
    tags = {field: values.get(field) or "" for field in ("url", "language", "nsfw")}
    if not all(isinstance(tag, str) for tag in tags.values()):
        return Fault(name, "field is of the wrong type")
    if encoded is not None and not isinstance(encoded, bytes):
        return Fault(name, "picture is not bytes")
    if encoded is not None and len(encoded) > MAX_PICTURE_BYTES:
        return Fault(name, "picture file is too large")
    if not encoded and not tags["url"]:
        return Fault(name, "neither picture nor address")
    if not is_unicode(text, *tags.values()):
        return Fault(name, "text is not UTF-8")
    numbers = {field: _number(values.get(field)) for field in ("similarity", "width", "height")}
    sizes = {k: None if numbers[k] is None else int(numbers[k]) for k in ("width", "height")}
    return Pair(
        id=_id(values.get("id")) or name,
        text=text.strip(),
        similarity=numbers["similarity"],
        encoded=encoded or None,
        place=place,
        **tags,
        **sizes,
    )


def is_unicode(*texts: str) -> bool:
    """Whether texts can be written as UTF-8, which half a surrogate pair of JSON cannot."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has integers of any length
        return None


def _id(value: Any) -> str:
    """An id as text. LAION's ids are floats, written `2433684022797.0` in the release."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if value.is_integer() else "" if math.isnan(value) else str(value)
    return " ".join(str(value).split()) if is_unicode(str(value)) else ""


def file_name(id: str, encoded: bytes) -> str:
    """A safe file name for the picture of an id, with the suffix of its format."""
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", id, re.ASCII)
    stem = id if plain else hashlib.sha256(id.encode()).hexdigest()[:24]
    with Image.open(io.BytesIO(encoded), formats=image.FORMATS) as opened:
        return (
            f"{stem}.{ {'JPEG': 'jpg', 'TIFF': 'tif'}.get(opened.format, opened.format.lower()) }"
        )
