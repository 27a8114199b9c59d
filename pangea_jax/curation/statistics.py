"""Counts a data set by language, source and kind, measures lengths, and finds overlap with benchmarks.

It reads a pipeline's results, the released PangeaIns, other records in its form, or a store that
launch/build_data.py made. It needs about 20 bytes of memory for each record.
"""

import dataclasses
import functools
import itertools
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pangea_jax import languages
from pangea_jax.curation import near_duplicates
from pangea_jax.curation.accounting import provenance
from pangea_jax.curation.contamination import Benchmarks, Findings, Overlap
from pangea_jax.data import image
from pangea_jax.data.build import archives, release
from pangea_jax.data.record import Conversation, RecordError, identify_language
from pangea_jax.data.store import MANIFEST, RecordStore
from pangea_jax.figures.markdown import table
from pangea_jax.work.restart import WorkError

_CHUNK = 512
_PICTURES_REMEMBERED = 65_536
_MEASURES = ("turns", "question characters", "answer characters")


@dataclasses.dataclass
class Statistics:
    """Counts over a data set.

    Attributes:
      total: number of records read.
      rejected: reason -> number of records that cannot be used, and the id of the first.
      identified: number of records without a language, which was identified from their words.
      cells: (category, source, language) -> number of records.
      lengths: language -> three lists with a number for each record: turns, characters of questions,
        characters of answers.
      pictures: pictures per record -> number of records.
      faults: fault of a picture -> number of pictures that could not be compared.
      task_types: task type (the paper has 13, section 2.2) -> number of pairs, from the provenance.
      findings: overlaps with benchmarks; None without benchmarks.
    """

    total: int = 0
    rejected: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    identified: int = 0
    cells: Counter[tuple[str, str, str]] = dataclasses.field(default_factory=Counter)
    lengths: dict[str, tuple[array, ...]] = dataclasses.field(default_factory=dict)
    pictures: Counter[int] = dataclasses.field(default_factory=Counter)
    faults: Counter[str] = dataclasses.field(default_factory=Counter)
    task_types: Counter[str] = dataclasses.field(default_factory=Counter)
    findings: Findings | None = None

    @property
    def kept(self) -> int:
        return self.cells.total()

    def add(self, conversation: Conversation) -> None:
        cell = conversation.category, conversation.source, conversation.language
        self.cells[cell] += 1
        self.pictures[len(conversation.images)] += 1
        of = self.lengths.setdefault(conversation.language, tuple(array("I") for _ in _MEASURES))
        characters = Counter()
        for turn in conversation.turns:
            characters[turn.role] += len(turn.text)
        measures = len(conversation.turns), characters["user"], characters["assistant"]
        for numbers, measure in zip(of, measures, strict=True):
            numbers.append(measure)

    def reject(self, reason: str, id: str, count: int = 1) -> None:
        before, first = self.rejected.get(reason, (0, id))
        self.rejected[reason] = before + count, first

    def merge(self, other: "Statistics") -> None:
        """Adds the counts of later records."""
        self.total += other.total
        self.identified += other.identified
        for name in ("cells", "pictures", "faults", "task_types"):
            getattr(self, name).update(getattr(other, name))
        for reason, (count, first) in other.rejected.items():
            self.reject(reason, first, count)
        for code, numbers in other.lengths.items():
            if code not in self.lengths:
                self.lengths[code] = numbers
                continue
            for ours, theirs in zip(self.lengths[code], numbers, strict=True):
                ours.extend(theirs)

    def index(self) -> pa.Table:
        """`category`, `source` and `language`, one row for each record, as in the index of a store."""
        columns = zip(*self.cells, strict=True) if self.cells else ((), (), ())
        counts = np.fromiter(self.cells.values(), np.int64, len(self.cells))
        rows = np.repeat(np.arange(len(counts)), counts)
        encoded = [pa.array(column, pa.string()).dictionary_encode() for column in columns]
        names = ["category", "source", "language"]
        return pa.table(dict(zip(names, encoded, strict=True))).take(pa.array(rows))

    def markdown(self, composition: Sequence[str]) -> str:
        """The report; `composition` are the lines of pangea_jax/figures/composition.py."""
        usable = f"{self.kept:,} of {self.total:,} records can be used."
        if self.identified:  # a store does not say which records these were
            usable += f" The language of {self.identified:,} was identified from their words."
        lines = ["# What is in this data set", "", usable]
        if self.rejected:
            rejected = sorted(self.rejected.items(), key=lambda item: (-item[1][0], item[0]))
            rows = [(why, f"{count:,}", f"`{first}`") for why, (count, first) in rejected]
            lines += ["", *table(("cannot be used", "records", "first"), rows)]
        lines += ["", *composition, "", "## Lengths", "", *self._lengths(), ""]
        lines += _counts("pictures", "records", sorted(self.pictures.items()))
        if self.task_types:
            types = self.task_types.most_common()
            lines += ["", "## Task types", "", *_counts("task type", "pairs", types)]
        if self.findings is not None:
            lines += ["", "## Overlap with benchmarks", "", *self._overlaps()]
        return "\n".join(lines) + "\n"

    def _lengths(self) -> list[str]:
        rows = []
        for code, measures in sorted(self.lengths.items(), key=lambda item: -len(item[1][0])):
            row = [f"{languages.name(code)} ({code})"]
            for numbers in measures:
                median, high = np.percentile(np.frombuffer(numbers, np.uint32), (50, 95))
                row.append(f"{median:,.0f} / {high:,.0f} / {max(numbers):,}")
            rows.append(row)
        explained = "Median, 95th percentile and maximum of a record."
        return [explained, "", *table(("language", *_MEASURES), rows)]

    def _overlaps(self) -> list[str]:
        found = self.findings.by_benchmark()
        ids = len({id for id, _ in self.findings.records()})
        lines = [
            f"{ids:,} ids overlap: `exclude_ids.txt` lists them for `config.mixture.exclude_ids`, "
            "`contamination.jsonl` says with what."
        ]
        if found:
            rows = [(*name, *(f"{count:,}" for count in counts)) for name, counts in found.items()]
            head = "benchmark", "the same", "records", "documents"
            lines += ["", *table(head, rows, words=2)]
        if self.faults:
            lines += ["", *_counts("pictures not compared", "", self.faults.most_common())]
        return lines


def _counts(what: str, counted: str, counts: Iterable[tuple[Any, int]]) -> list[str]:
    return table((what, counted), [(name, f"{count:,}") for name, count in counts])


class _Result(NamedTuple):
    """A worker's result for a chunk."""

    statistics: Statistics
    overlaps: list[tuple[str, list[Overlap]]]


@dataclasses.dataclass(frozen=True)
class _Records:
    """The records and pictures of a data set, and whether pictures are compared; picklable."""

    source: Path
    pictures: Path
    compared: bool
    database: Path
    benchmarks: Benchmarks | None

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def store(self) -> RecordStore:
        return RecordStore(self.source)

    @functools.cached_property
    def released(self) -> archives.Pictures:
        return archives.Pictures(self.pictures, self.database)

    @property
    def is_store(self) -> bool:
        return (self.source / MANIFEST).is_file()

    def chunks(self) -> Iterator[Any]:
        """Pieces of work: positions in a store, or raw records."""
        if self.is_store:
            for split in self.store.splits:
                total = len(self.store.records(split))
                for start in range(0, total, _CHUNK):
                    yield split, range(start, min(total, start + _CHUNK))
            return
        paths = release.record_files(self.source)
        records = itertools.chain.from_iterable(map(release.read_records, paths))
        yield from near_duplicates.batched(records, _CHUNK)

    def measure(self, chunk: Any) -> _Result:
        found, overlaps = Statistics(), []
        for conversation in self._conversations(chunk, found):
            found.add(conversation)
            if self.benchmarks is not None:
                same = self.benchmarks.in_texts(turn.text for turn in conversation.turns)
                same += self.benchmarks.in_pictures(self._hashes(conversation, found))
                if same:
                    overlaps.append((conversation.id, same))
        return _Result(found, overlaps)

    def _conversations(self, chunk: Any, found: Statistics) -> Iterator[Conversation]:
        if self.is_store:
            split, positions = chunk
            records = self.store.records(split)
            found.total += len(positions)
            yield from (records[position] for position in positions)
            return
        for raw in chunk:
            found.total += 1
            try:
                conversation = Conversation.from_pangeains(raw, default_language=identify_language)
            except RecordError as error:
                found.reject(error.reason, error.record_id)
                continue
            found.identified += not raw.get("language")
            yield conversation

    def _hashes(self, conversation: Conversation, found: Statistics) -> Iterator[int]:
        if not self.compared:
            return
        for name in conversation.images:
            hash, fault = self._hash_once(name)
            if fault:
                found.faults[fault] += 1
            else:
                yield hash

    @functools.cached_property
    def _hash_once(self) -> Callable[[str], tuple[int, str]]:
        # Translated records share their pictures.
        return functools.lru_cache(_PICTURES_REMEMBERED)(self._hash)

    def _hash(self, name: str) -> tuple[int, str]:
        """The perceptual hash of a picture, and the fault if it has none."""
        try:
            picture, _ = image.preview(self._read(name), name=name)
        except image.ImageError as error:
            return 0, error.fault
        except RecordError as error:
            return 0, error.reason
        except (OSError, KeyError):
            return 0, "picture is missing"
        return near_duplicates.perceptual_hash(picture), ""

    def _read(self, name: str) -> bytes:
        if self.is_store:
            return self.store.image(name)
        found = self.released.find(name)
        if found is None:
            raise KeyError(name)
        return self.released.read(found[1])


_RECORDS: list[_Records] = []  # of this worker


def _start_worker(records: _Records) -> None:
    _RECORDS.append(records)


def _measure_in_worker(chunk: Any) -> _Result:
    return _RECORDS[-1].measure(chunk)


def measure(
    folder: Path,
    *,
    benchmarks: Benchmarks | None = None,
    pictures: bool = True,
    images: Path | None = None,
    work: Path,
    workers: int = 1,
    progress: Callable[[int], None] = lambda records: None,
) -> Statistics:
    """Counts a data set and compares it with benchmarks.

    Args:
      folder: a pipeline's results, a release, a file of records or a store.
      pictures: whether pictures are compared, too; then each of them is decoded.
      images: folder of the pictures; by default that of the records.
      work: folder for the index of archives.
      workers: number of processes.
      progress: called with the number of records done since the last call.

    Raises:
      ReleaseError, StoreError: the data set cannot be read.
      WorkError: a worker was killed.
    """
    source = folder / "records" if (folder / "provenance").is_dir() else folder
    lying = images or (source.parent if source.is_file() else source)
    compared = benchmarks is not None and pictures and len(benchmarks.pictures) > 0
    database = work / "archives.sqlite"
    records = _Records(source, lying, compared, database, benchmarks)
    if compared and not records.is_store:
        work.mkdir(parents=True, exist_ok=True)
        records.released.index()
    whole = Statistics(findings=None if benchmarks is None else Findings())
    for result in _results(records, workers):
        whole.merge(result.statistics)
        progress(result.statistics.total)
        for id, overlaps in result.overlaps:
            whole.findings.add(id, overlaps)
    for row in provenance(folder):
        whole.task_types.update(row.get("task_types", ()))
    return whole


def _results(records: _Records, workers: int) -> Iterator[_Result]:
    """The results of all chunks in order, with only a few chunks in memory at a time."""
    if workers == 1:
        yield from map(records.measure, records.chunks())
        return
    # Spawned, since Arrow's threads do not survive a fork.
    pool = futures.ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(records,)
    )
    pending: deque[futures.Future] = deque()
    try:
        with pool:
            for chunk in records.chunks():
                pending.append(pool.submit(_measure_in_worker, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except futures.process.BrokenProcessPool:
        problem = "a worker was killed, perhaps because memory ran out; try fewer --workers"
        raise WorkError(problem) from None


def write(found: Statistics, composition: Iterable[str], out: Path) -> Path:
    """Writes `report.md` and, if benchmarks were compared, the two lists; returns the report's path."""
    out.mkdir(parents=True, exist_ok=True)
    if found.findings is not None:
        found.findings.write(out)
    path = out / "report.md"
    path.write_text(found.markdown(list(composition)), encoding="utf-8")
    return path
