"""Finds training records that overlap with a benchmark: in whole texts, in 13 words in a row, or in pictures.

A benchmark is any folder of rows (JSONL, JSON, TSV, also gzipped) and pictures: the folder that
`eval/run.py --data_dir` reads, or the published files of a data set. Every text of at least eight words in a row
counts as its question, answer or context, as in GPT-3's check (Brown et al. 2020, appendix C). Rows do not contain
templates of prompts. A text in many documents, or a run of words in many documents or records, is common wording
and does not count.

In scripts without spaces, each character is a word (`filters.words`).
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt64

from pangea_jax.curation import filters, near_duplicates
from pangea_jax.data import image
from pangea_jax.work import untrusted

NGRAM, MIN_WORDS = 13, 8
BOILERPLATE = 10
"""A run of words in more documents, or in more records, than this is common wording."""

_ROWS = (".jsonl", ".json", ".tsv")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# A picture within a row: thousands of characters, but no words.
_BASE64 = re.compile(r"[A-Za-z0-9+/]{1000,}={0,2}")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MOST_LINE = 64 << 20  # bytes; a row of a benchmark with pictures in base64 has a few megabytes
_MOST_FILE = 1 << 30  # bytes of a .json file, which is read at once
# Plain text is at most 50 times as long as its gzip.
_MOST_RATIO, _ANY_SIZE = 250, 256 << 20
# Pictures with little contrast have few bits in their hashes, and many of them have the same hash.
_MIN_BITS = 24

_log = logging.getLogger(__name__)

Kind = Literal["exact", "13-gram", "picture"]


class BenchmarkError(ValueError):
    """A benchmark file that cannot be read; names the file and the row."""


class Overlap(NamedTuple):
    """What a record has in common with a document.

    Attributes:
      kind: the same text, the same 13 words in a row, or a picture that looks the same.
      document: `<file>:<id or line>`, or the path of the picture.
      detail: number of the run of words among all runs, or the number of bits in which the pictures' hashes differ.
    """

    kind: Kind
    document: str
    detail: int


@dataclasses.dataclass(frozen=True)
class Benchmarks:
    """The texts and pictures of benchmarks, as hashes.

    Attributes:
      documents: names of the documents, in the order of reading.
      words: word of the texts -> its hash of 64 bits.
      texts, text_documents: hashes of whole texts, ascending, and their documents.
      ngrams, ngram_documents: the same for runs of 13 words.
      pictures: perceptual hashes, ascending, without those of pictures with little contrast.
      picture_names: names of the pictures.
    """

    documents: tuple[str, ...]
    words: Mapping[str, int]
    texts: UInt64[np.ndarray, " texts"]
    text_documents: Int32[np.ndarray, " texts"]
    ngrams: UInt64[np.ndarray, " ngrams"]
    ngram_documents: Int32[np.ndarray, " ngrams"]
    pictures: UInt64[np.ndarray, " pictures"]
    picture_names: tuple[str, ...]

    @classmethod
    def read(cls, folders: Iterable[Path], *, pictures: bool = True) -> "Benchmarks":
        """Reads all files of rows and all pictures in folders and their subfolders. A folder may also be a file.

        Raises:
          BenchmarkError: a file cannot be read.
          FileNotFoundError: a folder is missing, or no folder has rows.
        """
        names, rows, texts = [], [], []
        words: dict[str, int] = {}
        picture_hashes: dict[int, str] = {}
        for folder in folders:
            for path in _files(folder):
                name = path.relative_to(folder).as_posix() if path != folder else path.name
                if path.suffix.lower() in _PICTURES:
                    if pictures:
                        _add_picture(path, name, picture_hashes)
                    continue
                for id, row in _rows(path):
                    for text in dict.fromkeys(_leaves(row)):
                        split = filters.words(text)
                        if len(split) >= MIN_WORDS:
                            rows.append(len(names))
                            texts.append(np.array([_number(w, words) for w in split], np.uint64))
                    names.append(f"{name}:{id}")
        if not names:
            raise FileNotFoundError(f"no rows (*{', *'.join(_ROWS)}) of a benchmark in {folders}")
        ngrams = [_ngrams(text) for text in texts]
        found = sorted(picture_hashes.items())
        return cls(
            tuple(names),
            words,
            *_sorted(np.array([_whole(text) for text in texts], np.uint64), np.array(rows, int)),
            *_sorted(
                np.concatenate([np.zeros(0, np.uint64), *ngrams]),
                np.repeat(np.array(rows, int), [len(some) for some in ngrams]),
            ),
            np.array([hash for hash, _ in found], np.uint64),
            tuple(name for _, name in found),
        )

    def in_texts(self, texts: Iterable[str]) -> list[Overlap]:
        """The overlaps of texts, and of their single lines, with the documents."""
        found: dict[Overlap, None] = {}
        for text in texts:
            for part in dict.fromkeys((text, *text.splitlines())):
                split = filters.words(part)
                if len(split) < MIN_WORDS:
                    continue
                numbers = np.array([self.words.get(word, 0) for word in split], np.uint64)
                if numbers.all():
                    wanted = np.array([_whole(numbers)], np.uint64)
                    for _, document in _look_up(wanted, self.texts, self.text_documents):
                        found[Overlap("exact", self.documents[document], 0)] = None
                for place, document in _look_up(
                    _ngrams(numbers), self.ngrams, self.ngram_documents
                ):
                    found[Overlap("13-gram", self.documents[document], place)] = None
        return list(found)

    def in_pictures(self, hashes: Iterable[int]) -> list[Overlap]:
        """The pictures of the benchmarks that look like pictures with these hashes."""
        found = []
        for hash in hashes:
            if hash.bit_count() < _MIN_BITS:
                continue
            distances = np.bitwise_count(self.pictures ^ np.uint64(hash))
            alike = np.flatnonzero(distances <= near_duplicates.MAX_HASH_DISTANCE)
            for place in alike.tolist():
                found.append(Overlap("picture", self.picture_names[place], int(distances[place])))
        return found


class Findings:
    """The overlaps of records, without common wording, for reports and `Mixture.exclude_ids`."""

    def __init__(self):
        self._records: list[tuple[str, tuple[Overlap, ...]]] = []
        self._of_ngram: Counter[int] = Counter()

    def add(self, id: str, overlaps: Sequence[Overlap]) -> None:
        """Adds the overlaps of one record."""
        if overlaps:
            self._records.append((id, tuple(overlaps)))
            self._of_ngram.update({o.detail for o in overlaps if o.kind == "13-gram"})

    def records(self) -> Iterator[tuple[str, list[Overlap]]]:
        """(id, overlaps) of the records, in the order in which they were added."""
        for id, overlaps in self._records:
            kept = [
                o
                for o in overlaps
                if o.kind != "13-gram" or self._of_ngram[o.detail] <= BOILERPLATE
            ]
            if kept:
                yield id, kept

    def by_benchmark(self) -> dict[tuple[str, Kind], tuple[int, int]]:
        """(file or folder of the benchmark, kind) -> (records, documents) that overlap."""
        records: Counter[tuple[str, Kind]] = Counter()
        documents: dict[tuple[str, Kind], set[str]] = {}
        for _, overlaps in self.records():
            names = {(_benchmark(o), o.kind) for o in overlaps}
            records.update(names)
            for o in overlaps:
                documents.setdefault((_benchmark(o), o.kind), set()).add(o.document)
        return {name: (records[name], len(documents[name])) for name in sorted(records)}

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Writes `exclude_ids.txt`, for `pangea_jax.data.mixture.read_ids`, and `contamination.jsonl`."""
        ids, details = folder / "exclude_ids.txt", folder / "contamination.jsonl"
        found = list(self.records())
        lines = ["# records that overlap with benchmarks, for config.mixture.exclude_ids"]
        lines += (id for id in dict.fromkeys(id for id, _ in found) if _can_be_listed(id))
        ids.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with details.open("w", encoding="utf-8") as file:
            for id, overlaps in found:
                counts = Counter((o.kind, o.document) for o in overlaps)
                bits = {o.document: o.detail for o in overlaps if o.kind == "picture"}
                for (kind, document), count in counts.items():
                    more = {"bits": bits[document]} if kind == "picture" else {"times": count}
                    entry = {"id": id, "kind": kind, "document": document} | more
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return ids, details


def _can_be_listed(id: str) -> bool:
    fits = len(id.splitlines()) == 1 and not id.startswith("#")
    if not fits:
        _log.warning(
            "record %r overlaps with a benchmark, but exclude_ids.txt cannot hold its id", id
        )
    return fits


def _benchmark(overlap: Overlap) -> str:
    if overlap.kind == "picture":
        return overlap.document.rpartition("/")[0] or "."
    return overlap.document.rpartition(":")[0]


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of a benchmark")
    wanted = (*_ROWS, *_PICTURES)
    plain = {path: path.name.lower().removesuffix(".gz") for path in folder.rglob("*")}
    return sorted(path for path, name in plain.items() if name.endswith(wanted) and path.is_file())


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(id or line number, row) of a file."""
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    number = 0
    try:
        for number, row in enumerate(_parsed(path, kind), 1):
            id = row.get("id") if isinstance(row, dict) else None
            id = str(number if id is None else id)
            yield id.encode("utf-8", "replace").decode(), row
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise BenchmarkError(
            f"{path}, row {number + 1}: is not {kind[1:].upper()} in UTF-8 ({error})"
        ) from None


def _parsed(path: Path, kind: str) -> Iterator[Any]:
    with untrusted.open_regular(path) as stored, contextlib.ExitStack() as stack:
        file = stored
        if path.suffix == ".gz":
            most = max(_ANY_SIZE, _MOST_RATIO * path.stat().st_size)
            file = io.BufferedReader(_Inflated(stack.enter_context(gzip.open(stored)), most))
        if kind == ".json":
            whole = json.loads(_at_most(file.read(_MOST_FILE + 1), _MOST_FILE))
            yield from whole if isinstance(whole, list) else [whole]
            return
        while line := _at_most(file.readline(_MOST_LINE + 1), _MOST_LINE):
            text = line.decode("utf-8")
            if kind == ".tsv":
                yield text.rstrip("\r\n").split("\t")
            elif text.strip():
                yield json.loads(text)


def _at_most(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes; split it, or leave the file out")
    return data


class _Inflated(io.RawIOBase):
    """What a gzip holds, up to `most` bytes."""

    def __init__(self, file: gzip.GzipFile, most: int):
        super().__init__()
        self._file, self._left, self._most = file, most, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._file.read1(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"it inflates to more than {self._most:,} bytes; unpack it with gunzip if you trust it"
            )
        buffer[: len(data)] = data
        return len(data)


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a row, at any depth."""
    if isinstance(value, str):
        if not _BASE64.fullmatch(value):
            yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)


def _add_picture(path: Path, name: str, hashes: dict[int, str]) -> None:
    try:
        picture, _ = image.preview(path)
    except image.ImageError as error:
        raise BenchmarkError(str(error)) from None
    found = near_duplicates.perceptual_hash(picture)
    if found.bit_count() >= _MIN_BITS:
        hashes.setdefault(found, name)


def _number(word: str, words: dict[str, int]) -> int:
    if word not in words:
        # JSON can hold half a surrogate pair, which UTF-8 cannot.
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        words[word] = int.from_bytes(digest, "big") or 1
    return words[word]


def _ngrams(numbers: UInt64[np.ndarray, " words"]) -> UInt64[np.ndarray, " n"]:
    """Hashes of the distinct runs of 13 words, without runs that contain an unknown word (0)."""
    count = len(numbers) - NGRAM + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    hashes, known = np.zeros(count, np.uint64), np.ones(count, bool)
    for offset in range(NGRAM):
        window = numbers[offset : offset + count]
        hashes = hashes * _MULTIPLIER + window  # modulo 2 ** 64
        known &= window != 0
    return np.unique(hashes[known])


def _whole(numbers: UInt64[np.ndarray, " words"]) -> int:
    return int.from_bytes(hashlib.blake2b(numbers.tobytes(), digest_size=8).digest(), "big")


def _sorted(hashes, documents) -> tuple[UInt64[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
    """Sorts by hash, and leaves out hashes of more than `BOILERPLATE` documents."""
    order = np.argsort(hashes, kind="stable")
    hashes, documents = hashes[order], documents[order].astype(np.int32)
    _, place, count = np.unique(hashes, return_inverse=True, return_counts=True)
    keep = count[place] <= BOILERPLATE if len(hashes) else np.zeros(0, bool)
    return hashes[keep], documents[keep]


def _look_up(wanted, hashes, documents) -> list[tuple[int, int]]:
    """(place in `hashes`, document) of every wanted hash that is there; equal hashes have the place of the first."""
    first, last = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, "right")
    return [
        (int(a), int(document))
        for a, b in zip(first, last, strict=True)
        if b > a
        for document in documents[a:b]
    ]
