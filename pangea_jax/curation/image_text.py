"""Pictures with alt text as crawls publish them: read, filtered by rule, rid of near-duplicates.

Read are Parquet files (LAION's metadata, which has the addresses of pictures, or any with the pictures
themselves in a column) and tar files of the webdataset form that img2dataset writes. What cannot be
read is a `Fault` with a reason, never an exception: crawls are never whole.

The thresholds of `Filters` are those of the paper (section 2.2).
"""

import dataclasses
import functools
import hashlib
import importlib
import io
import ipaddress
import json
import math
import re
import socket
import sys
import time
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64, UInt32, UInt64
from PIL import Image

from pangea_jax import languages
from pangea_jax.data import image
from pangea_jax.data.release import ReleaseError, tar_members

MAX_PICTURE_BYTES, MAX_TEXT_BYTES, MAX_JSON_BYTES = 32 << 20, 4 << 20, 1 << 20
MAX_HASH_DISTANCE, MIN_TEXT_SIMILARITY = 4, 0.8

# Field of a `Pair` -> columns that hold it, in LAION's files, img2dataset's and the hub's.
_COLUMNS = {
    "id": ("sample_id", "key", "id", "uid"),
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
_SHINGLE, _PERMUTATIONS, _TEXT_BANDS, _SEED = 4, 96, 16, 0
_SKETCHED_AT_ONCE, _COMPARED_AT_ONCE = 4096, 65_536
_MAX_REDIRECTS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A picture and its alt text.

    Attributes:
      id: as the source has it, or made of file and row where it has none.
      text: the alt text.
      url: address of the picture, may be empty.
      language: tag of the alt text as the source has it, may be empty.
      nsfw: LAION's tag `UNLIKELY`, `UNSURE` or `NSFW`, may be empty.
      similarity: CLIP's cosine similarity of picture and text, None if unknown.
      width, height: of the picture in pixels as the source states them, None if it does not.
      encoded: the bytes of the picture, None where only its address is known.
      place: where those bytes lie as they are, None where they lie in a column.
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
    """Where the bytes of a picture lie: a file, and which of its bytes."""

    path: str
    offset: int
    size: int

    def read(self, folder: Path) -> bytes:
        """The bytes; a relative path counts from `folder`.

        Raises:
          OSError: they are not there any more.
        """
        with (folder / self.path).open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.path} ends inside of a picture; it has changed since it was read")
        return data


class Fault(NamedTuple):
    """A row that could not be read, and why, in a short fixed phrase."""

    id: str
    reason: str


class Part(NamedTuple):
    """What is read at a time: a tar file, or so many rows of a row group of a Parquet file.

    Attributes:
      row_group: None for a tar file.
      first_row: within its row group; those of LAION have a million rows.
    """

    path: str
    row_group: int | None = None
    first_row: int = 0


def find_parts(source: Path) -> list[Part]:
    """The parts of a file or of a folder with all below it, in the order of their names.

    A Parquet file beside a tar file of its name is img2dataset's list of what the tar file holds, and
    not read.

    Raises:
      FileNotFoundError: there are none.
    """
    source = source.resolve()  # workers may be started elsewhere
    paths = [source] if source.is_file() else sorted(source.rglob("*"))
    tars = {path for path in paths if path.suffix == ".tar"}
    parts: list[Part] = []
    for path in paths:
        if path in tars:
            parts.append(Part(str(path)))
        elif path.suffix == ".parquet" and path.with_suffix(".tar") not in tars:
            parts += _parquet_parts(path)
    if not parts:
        raise FileNotFoundError(f"{source} holds no *.parquet and no *.tar")
    return parts


# A damaged footer surfaces as whatever Arrow trips over.
_PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, LookupError)


def _parquet_parts(path: Path) -> list[Part]:
    try:
        groups = _group_sizes(pq.read_metadata(path))
    except _PARQUET_ERRORS:
        return [Part(str(path), 0)]  # reading it then says what is wrong
    return [
        Part(str(path), group, first)
        for group, total in enumerate(groups)
        for first in range(0, total, PART_ROWS)
    ]


def read(part: Part) -> Iterator[Pair | Fault]:
    """The rows of a part. Every row of a Parquet file comes out, as one or the other."""
    if part.row_group is None:
        yield from _read_tar(Path(part.path))
    else:
        yield from _read_parquet(Path(part.path), part.row_group, part.first_row)


def _read_parquet(path: Path, group: int, first: int) -> Iterator[Pair | Fault]:
    name = f"{path.stem}-{group}"
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True, buffer_size=1 << 20)
        columns = _columns(file.schema_arrow.names)
        last = min(_group_sizes(file.metadata)[group], first + PART_ROWS)
    except _PARQUET_ERRORS:
        yield Fault(path.name, "Parquet file cannot be read")
        return
    with file:
        if "text" not in columns:
            yield from (
                Fault(f"{name}-{row}", "no column of alt text") for row in range(first, last)
            )
            return
        number = first
        for row in _parquet_rows(file, group, columns, first, last, name):
            yield row
            number += 1
        # Damage may also end the rows early without an error.
        yield from (Fault(f"{name}-{n}", "row group is damaged") for n in range(number, last))


def _parquet_rows(file, group, columns, first, last, name) -> Iterator[Pair | Fault]:
    """The rows from `first` to `last`, or up to the first damage."""
    number = 0
    try:
        for batch in file.iter_batches(_PARQUET_BATCH, [group], columns=list(columns.values())):
            for row in range(max(0, first - number), min(len(batch), last - number)):
                yield _parquet_row(batch, row, columns, f"{name}-{number + row}")
            number += len(batch)
            if number >= last:
                return
    except _PARQUET_ERRORS:
        return


def _group_sizes(metadata: pq.FileMetaData) -> list[int]:
    """The rows of each row group.

    Raises:
      ValueError: they do not add up, so that none can be trusted.
    """
    # Not checked against the columns: their metadata, if damaged, makes pyarrow end the process.
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


def _parquet_row(batch: pa.RecordBatch, row: int, columns, name: str) -> Pair | Fault:
    try:
        values = {field: batch[column][row].as_py() for field, column in columns.items()}
    except UnicodeDecodeError:
        return Fault(name, "text is not UTF-8")
    encoded = values.get("encoded")
    if isinstance(encoded, Mapping):  # the hub's form of a picture: {"bytes", "path"}
        values["encoded"] = encoded.get("bytes")
    return _pair(values, name)


def _read_tar(path: Path) -> Iterator[Pair | Fault]:
    key, fields = None, {}
    try:
        with path.open("rb") as file:
            for member, offset, size, _ in tar_members(file, path):
                folder, _, rest = member.rpartition("/")
                stem, _, suffix = rest.partition(".")
                if (folder, stem) != key:
                    if key is not None:
                        yield _tar_row(fields, path, key)
                    key, fields = (folder, stem), {}
                position = file.tell()
                _add_member(fields, suffix.lower(), file, Place(str(path), offset, size))
                file.seek(position)
    except (ReleaseError, OSError):
        name = f"{path.name}:{key[1]}" if key else path.name
        yield Fault(name, "tar file is damaged or cut off")
        return
    if key is not None:
        yield _tar_row(fields, path, key)


def _add_member(fields: dict[str, Any], suffix: str, file, place: Place) -> None:
    """Reads a file of a sample into its fields; what is not of use is passed over."""
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


def _tar_row(fields: dict[str, Any], path: Path, key: tuple[str, str]) -> Pair | Fault:
    name = f"{path.stem}-{key[1]}"
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
    """Whether texts can be written: JSON can hold half a surrogate pair."""
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
    except OverflowError:  # JSON has whole numbers of any length
        return None


def _id(value: Any) -> str:
    """As text; LAION's ids are floats, written `2433684022797.0` in the release."""
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


# Filters by rule.


@dataclasses.dataclass(frozen=True)
class Filters:
    """What a pair must be. The defaults are the paper's (section 2.2).

    Attributes:
      min_side, max_side: of the picture in pixels, both sides.
      min_aspect, max_aspect: width / height.
      min_chars, max_chars: characters of the alt text.
      nsfw: tags that may pass; (): any, also none.
      languages: canonical codes that may pass; a pair without a tag is identified later.
      blocked: words and phrases (lower case) that no alt text may hold. The paper names no list.
      min_similarity: pairs pass above this CLIP score; None: any, also none.
    """

    min_side: int = 224
    max_side: int = 4096
    min_aspect: float = 0.25
    max_aspect: float = 3.0
    min_chars: int = 5
    max_chars: int = 5000
    nsfw: tuple[str, ...] = ("UNLIKELY",)
    languages: tuple[str, ...] | None = None
    blocked: frozenset[str] = frozenset()
    min_similarity: float | None = 0.3

    def reason(self, pair: Pair) -> str | None:
        """Why a pair does not pass, None if it does. Of the picture its header alone is read."""
        if not self.min_chars <= len(pair.text) <= self.max_chars:
            return f"text is too {'short' if len(pair.text) < self.min_chars else 'long'}"
        if self.nsfw and pair.nsfw.upper() not in self.nsfw:
            return "NSFW tag" if pair.nsfw else "no NSFW tag"
        wanted = self.languages is None or not pair.language
        if not wanted and language_code(pair.language) not in self.languages:
            return "language is not wanted"
        if self.is_blocked(pair.text):
            return "offensive text"
        if pair.encoded is not None:
            return self.reason_of_size(pair.encoded)
        return self._of_size(pair.width, pair.height)

    def reason_of_size(self, encoded: bytes) -> str | None:
        """Why a picture does not pass, from its header."""
        try:
            return self._of_size(*image.header_size(encoded))
        except image.ImageError as error:
            return error.fault

    def _of_size(self, width: int | None, height: int | None) -> str | None:
        if not width or not height:
            return "size is not known"
        if min(width, height) < self.min_side:
            return "picture is too small"
        if max(width, height) > self.max_side:
            return "picture is too large"
        if not self.min_aspect <= width / height <= self.max_aspect:
            return "aspect ratio"
        return None

    def is_blocked(self, text: str) -> bool:
        if not self.blocked:
            return False
        found = words(text)
        if not self._blocked_words.isdisjoint(found):
            return True
        line = f" {' '.join(found)} "
        return any(f" {phrase} " in line for phrase in self._blocked_phrases)

    @functools.cached_property
    def _blocked_words(self) -> frozenset[str]:
        split = (words(entry) for entry in self.blocked)
        return frozenset(some[0] for some in split if len(some) == 1)

    @functools.cached_property
    def _blocked_phrases(self) -> tuple[str, ...]:
        split = (words(entry) for entry in self.blocked)
        return tuple(sorted(" ".join(some) for some in split if len(some) > 1))


def language_code(tag: str) -> str | None:
    """Canonical code of a tag, None if it is none of ours."""
    try:
        return languages.get(tag).code
    except KeyError:
        return None


# Han, kana, Thai, Lao, Burmese and Khmer put no spaces between words: a character is a word there.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation; in scripts without spaces its characters.

    >>> words("Ｔokyo's Skytree, 東京!")
    ['tokyo', 's', 'skytree', '東', '京']
    """
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_separators())
    return _WORD.findall(plain)


@functools.cache
def _separators() -> dict[int, str]:
    """Every character that is no letter, mark or number -> a space."""
    characters = (c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    return {c: " " for c in characters if unicodedata.category(chr(c))[0] not in "LMN"}


# Near-duplicates.


def perceptual_hash(picture: Image.Image) -> int:
    """The 64-bit DCT hash of imagehash (`phash`): near for pictures that look the same."""
    bits = _import("imagehash").phash(picture).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def unlike_earlier_pictures(
    hashes: UInt64[np.ndarray, "n"], max_distance: int = MAX_HASH_DISTANCE
) -> Bool[np.ndarray, "n"]:
    """Which pictures are not within `max_distance` bits of an earlier one; exact.

    Hashes that differ in d bits agree in one of d + 1 groups of bits, and are compared where they do.
    Memory is some 100 bytes a picture.
    """
    bands = max_distance + 1
    # Every d-th bit: bits side by side are of like frequency, and some of those hardly vary.
    masks = [np.uint64(sum(1 << bit for bit in range(b, 64, bands))) for b in range(bands)]

    def alike(earlier, later):
        return np.bitwise_count(hashes[earlier] ^ hashes[later]) <= max_distance

    return _unlike_earlier(len(hashes), (hashes & mask for mask in masks), alike)


def unlike_earlier_texts(
    texts: Iterable[str], min_similarity: float = MIN_TEXT_SIMILARITY
) -> Bool[np.ndarray, "n"]:
    """Which texts are not like an earlier one, by MinHash of their character 4-grams (rensa).

    Of two texts at the threshold (Jaccard 0.8) 99 % are found, and the estimate of how alike they are is
    off by 0.04. Memory is some 0.8 kB a text, less than half of what rensa's own index needs and a fifth of
    datasketch's (benchmarks/curation.py).
    """
    sketches = _sketches(texts)
    rows = _PERMUTATIONS // _TEXT_BANDS
    bands = (
        _hash_rows(sketches[:, first : first + rows]) for first in range(0, _PERMUTATIONS, rows)
    )

    def alike(earlier, later):
        found = np.empty(len(later), bool)
        for first in range(0, len(later), _COMPARED_AT_ONCE):
            some = slice(first, first + _COMPARED_AT_ONCE)
            same = (sketches[earlier[some]] == sketches[later[some]]).mean(1)
            found[some] = same >= min_similarity
        return found

    return _unlike_earlier(len(sketches), bands, alike)


def _unlike_earlier(
    count: int,
    bands: Iterable[UInt64[np.ndarray, "n"]],
    alike: Callable[[Int64[np.ndarray, "m"], Int64[np.ndarray, "m"]], Bool[np.ndarray, "m"]],
) -> Bool[np.ndarray, "n"]:
    """Which items no earlier one is like, of those that share a key in some band."""
    stays = np.ones(count, bool)
    for keys in bands:
        order = np.argsort(keys, kind="stable")  # within a group the earliest comes first
        keys = keys[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        start = np.repeat(first, np.diff(np.append(first, count)))
        places = np.arange(count)
        later, step = places[(places > start) & stays[order]], 0
        # A great many alike ones cost little: they go when they are compared with the first of them.
        while len(later):
            found = alike(order[start[later] + step], order[later])
            stays[order[later[found]]] = False
            later, step = later[~found], step + 1
            later = later[start[later] + step < later]
    return stays


def _sketches(texts: Iterable[str]) -> UInt32[np.ndarray, "n permutations"]:
    rensa = _import("rensa")
    parts, some = [np.zeros((0, _PERMUTATIONS), np.uint32)], []

    def sketch() -> None:
        found = rensa.RMinHash.digest_matrix_from_token_sets(some, _PERMUTATIONS, _SEED)
        parts.append(np.array(found.to_rows(), np.uint32))
        some.clear()

    for text in texts:
        some.append(shingles(text))
        if len(some) == _SKETCHED_AT_ONCE:
            sketch()
    if some:
        sketch()
    return np.concatenate(parts)


def _hash_rows(rows: UInt32[np.ndarray, "n r"]) -> UInt64[np.ndarray, "n"]:
    hashes = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def shingles(text: str) -> list[str]:
    """Runs of four characters, without case and punctuation; a shorter text is one of its own."""
    plain = " ".join(words(text)) or text
    return list({plain[i : i + _SHINGLE] for i in range(max(1, len(plain) - _SHINGLE + 1))})


def _import(name: str) -> Any:
    """A package that curation alone needs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"{name} is missing; run: pip install -r requirements-curation.txt"
        ) from None


# CLIP scores and pictures that are still to be fetched.


class Scorer(Protocol):
    """Scores how well texts describe pictures: cosine similarities, in order."""

    def __call__(
        self, pictures: Sequence[Image.Image], texts: Sequence[str]
    ) -> Float32[np.ndarray, "B"]: ...


class ClipScorer:
    """A two-tower model of transformers (CLIP, SigLIP, ...): needs torch.

    Args:
      name: its name on the hub or its folder. Alt text in many languages needs a multilingual one.
    """

    def __init__(self, name: str):
        try:
            import torch
            import transformers
        except ImportError:
            raise ImportError(
                f"scoring with {name} needs torch and transformers; run: "
                "pip install -r requirements-parity.txt"
            ) from None
        self._torch = torch
        self._model = transformers.AutoModel.from_pretrained(name).eval()
        self._processor = transformers.AutoProcessor.from_pretrained(name)

    def __call__(self, pictures, texts):
        inputs = self._processor(
            images=list(pictures),
            text=list(texts),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
        )
        with self._torch.inference_mode():
            out = self._model(**inputs)
        cosine = self._torch.nn.functional.cosine_similarity
        return cosine(out.image_embeds, out.text_embeds).float().numpy()


class FetchError(Exception):
    """A picture that could not be fetched; the message is a short fixed phrase."""


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Gets pictures by their addresses.

    Attributes:
      timeout: seconds for a whole picture.
      max_bytes: larger files are given up.
      private: whether addresses of private networks may be asked; a crawl can hold any address.
    """

    timeout: float = 20.0
    max_bytes: int = MAX_PICTURE_BYTES
    private: bool = False
    user_agent: str = "pangea_jax"

    def __call__(self, url: str) -> bytes:
        """The bytes behind an address.

        Raises:
          FetchError: there are none, they are too many or come too slowly.
        """
        requests, urllib3 = _import("requests"), _import("urllib3")
        deadline = time.monotonic() + self.timeout
        try:
            with requests.Session() as session:
                session.headers["User-Agent"] = self.user_agent
                target_of = session.get_redirect_target
                # Where requests sees a redirection, it reads all of the page that tells of it, however long.
                session.get_redirect_target = lambda reply: None
                for _ in range(_MAX_REDIRECTS + 1):
                    self._check(url)
                    with session.get(
                        url, stream=True, allow_redirects=False, timeout=self.timeout
                    ) as reply:
                        target = target_of(reply)
                        if target is None:
                            return self._body(reply, deadline)
                        url = urllib.parse.urljoin(url, target)
            raise FetchError("address leads in circles")
        # Addresses of crawls are of every broken kind, which surfaces as errors of several libraries.
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError):
            raise FetchError("address cannot be reached") from None

    def _body(self, reply, deadline: float) -> bytes:
        if reply.status_code != 200:
            raise FetchError(f"address answers {reply.status_code}")
        body = bytearray()
        # What has come so far, not a block filled up: a byte a second must not go on for days.
        while block := reply.raw.read1(1 << 16, decode_content=True):
            body += block
            if len(body) > self.max_bytes:
                raise FetchError("picture file is too large")
            if time.monotonic() > deadline:
                raise FetchError("address is too slow")
        return bytes(body)

    def _check(self, url: str) -> None:
        """Refuses what is not the public web; called for every redirection, too."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FetchError("address is not of the web")
        if self.private:
            return
        found = socket.getaddrinfo(parts.hostname, parts.port or 443)
        if not all(ipaddress.ip_address(entry[4][0]).is_global for entry in found):
            raise FetchError("address is private")
