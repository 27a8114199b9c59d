"""Holds back a part of the records for validation, so that no picture is on both sides."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from absl import logging
from jaxtyping import Bool, Int, Int32

from pangea_jax.batch import Batch, Example
from pangea_jax.data.image import ImageError
from pangea_jax.data.mixture import column_codes
from pangea_jax.data.packing import plan_rows
from pangea_jax.data.pipeline import PipelineConfig, RowSource, measure, render_example
from pangea_jax.data.reader import Reader
from pangea_jax.data.record import RecordError
from pangea_jax.data.store import RecordStore, StoreError


@dataclasses.dataclass(frozen=True)
class Holdout:
    """The result of a draw.

    Attributes:
      rows: rows of the index that are held back.
      left_out: a mask of the rows that may not train: those held back, and all that show one of
        their pictures.
    """

    rows: Int[np.ndarray, " n"]
    left_out: Bool[np.ndarray, " index"]


def draw(
    store: RecordStore,
    usable: Bool[np.ndarray, " index"],
    *,
    number: int,
    seed: int,
) -> Holdout:
    """Draws at most `number` of the usable records: whole groups of records that share pictures.

    Raises:
      ValueError: no group is that small, or nothing would be left to train on.
    """
    groups = picture_groups(store, usable)
    size = np.bincount(groups[groups >= 0])
    order = np.random.default_rng((seed, 1)).permutation(len(size))
    chosen, taken = np.zeros(len(size), bool), 0
    for group in order:
        if taken + size[group] <= number:
            chosen[group], taken = True, taken + size[group]
    if not taken:
        raise ValueError(
            f"config.validation asks for {number} records, but the fewest that share no picture with "
            f"others are {min(size, default=0)}; raise config.validation.fraction or number"
        )
    left_out = (groups >= 0) & chosen[groups]
    _check_rest(usable & ~left_out, taken)
    return Holdout(np.flatnonzero(left_out), left_out)


def by_ids(store: RecordStore, usable: Bool[np.ndarray, " index"], ids: Sequence[str]) -> Holdout:
    """Holds back the records with these ids.

    Raises:
      ValueError: the store has no such record, or nothing would be left to train on.
    """
    column = store.index["id"].to_pylist()
    missing = sorted(set(ids) - set(column))
    if missing:
        raise ValueError(
            f"config.validation.ids: {len(missing)} of {len(set(ids))} are no record of {store.directory}, "
            f"the first is {missing[0]!r}"
        )
    held = np.isin(np.array(column, object), list(set(ids)))
    groups = picture_groups(store, usable | held)
    left_out = np.isin(groups, np.unique(groups[held]))
    _check_rest(usable & ~left_out, int(held.sum()))
    return Holdout(np.flatnonzero(held), left_out)


def shared_with(
    store: RecordStore, usable: Bool[np.ndarray, " index"], other: RecordStore
) -> Bool[np.ndarray, " index"]:
    """A mask of the usable records that show a picture of another store: the same key and the same bytes."""
    keys = set(other.image_index["key"].to_pylist()) & set(store.image_index["key"].to_pylist())
    same = {key for key in keys if store.image(key) == other.image(key)}
    found = np.zeros(len(usable), bool)
    if same:
        shown = _pictures(store, usable)
        found[usable] = [not same.isdisjoint(images) for images in shown]
    return found


def picture_groups(
    store: RecordStore, usable: Bool[np.ndarray, " index"]
) -> Int[np.ndarray, " index"]:
    """A number for each usable record, equal for records that share pictures, also through others; else -1.

    It reads all usable records: a minute for millions.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    rows = np.flatnonzero(usable)
    first = []
    for row, images in zip(rows, _pictures(store, usable), strict=True):
        keys = images or (f"record {row}",)
        first.append(keys[0])
        for key in keys[1:]:
            parent[root(key)] = root(keys[0])
    numbers: dict[str, int] = {}
    groups = np.full(len(usable), -1, np.int64)
    groups[rows] = [numbers.setdefault(root(key), len(numbers)) for key in first]
    return groups


def _pictures(store, usable) -> Iterator[tuple[str, ...]]:
    rows = np.flatnonzero(usable)
    return (conversation.images for conversation in RowSource(store, rows))


def _check_rest(rest, taken) -> None:
    if not rest.any():
        raise ValueError(
            f"config.validation holds back {taken} records, and no others are left to train on; lower it"
        )


class HeldBack:
    """The batches of held-back records. A row has one language, so that sums per language are exact.

    Args:
      index_rows: rows of the store's index.
      process_index, process_count: each process gets its part of every batch.

    Raises:
      RecordError, ImageError: a record cannot be used and `config` does not skip it.
    """

    def __init__(
        self,
        store: RecordStore,
        index_rows: Int[np.ndarray, " n"],
        reader: Reader,
        config: PipelineConfig,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._source = RowSource(store, index_rows)
        self._reader, self._config = reader, config
        self._rows = config.rows // process_count
        self._first = process_index * self._rows
        sizes = measure(self._source, reader, config)
        self.examples = int(np.count_nonzero(sizes[:, 0] > 1))
        codes, names = _languages(store.index, index_rows)
        self.languages: Sequence[str] = tuple(names)
        self._plan: list[tuple[int, list[int]]] = []  # (language, places in the source) of each row
        for code in range(len(names)):
            here = np.flatnonzero((codes == code) & (sizes[:, 0] > 1))
            plan = plan_rows(sizes[here], config.capacity, seed=0, window=config.packing_window)
            self._plan += [(code, here[plan[row]].tolist()) for row in range(len(plan))]

    def __iter__(self) -> Iterator[tuple[Batch, Int32[np.ndarray, " B"]]]:
        """This process's rows of each batch, and the number of each row's language."""
        for start in range(0, len(self._plan), self._config.rows):
            mine = self._plan[start + self._first :][: self._rows]
            mine = mine[: max(0, len(self._plan) - start - self._first)]
            with ThreadPoolExecutor(max(1, self._config.threads)) as pool:
                read = iter(list(pool.map(self._read, [p for _, places in mine for p in places])))
            examples = [[next(read) for _ in places] for _, places in mine]
            examples = [[example for example in row if example] for row in examples]
            examples += [[] for _ in range(self._rows - len(mine))]
            labels = np.zeros(self._rows, np.int32)
            labels[: len(mine)] = [code for code, _ in mine]
            yield self._fill(examples), labels

    def _read(self, place: int) -> Example | None:
        try:
            return render_example(self._source[place], None, self._reader, self._config)
        except (RecordError, ImageError, StoreError) as error:
            if not self._config.max_bad_fraction:
                raise
            logging.warning("left a record out of the validation: %s", error)
            return None

    def _fill(self, examples: Sequence[Sequence[Example]]) -> Batch:
        config, pictures, none = self._config, self._reader.pictures, np.zeros(0, np.int32)
        empty = Example(
            none,
            none,
            targets=none,
            weights=none.astype(np.float32),
            **{pictures.field: self._reader.no_tiles},
        )
        return Batch.fill(examples, config.row_tokens, config.row_tiles, pictures.patches, empty)


def _languages(index: pa.Table, rows) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """The language of some rows as numbers, and the names of those that occur, most records first."""
    codes, labels = column_codes(index, "language")
    found: Mapping[int, int] = collections.Counter(codes[rows].tolist())
    order = sorted(found, key=lambda code: (-found[code], labels[code]))
    numbers = {code: number for number, code in enumerate(order)}
    return np.array([numbers[code] for code in codes[rows].tolist()], np.int64), [
        labels[code] for code in order
    ]
