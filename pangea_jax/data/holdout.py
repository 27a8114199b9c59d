"""Holds back a part of the records for validation, so that no picture is on both sides.

Records that show a held-back picture beside another one are on neither side.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
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

    @property
    def dropped(self) -> int:
        """Number of records on neither side: they show a picture of a held-back record."""
        return int(self.left_out.sum()) - len(self.rows)


def draw(
    store: RecordStore,
    usable: Bool[np.ndarray, " index"],
    *,
    number: int,
    seed: int,
) -> Holdout:
    """Draws at most `number` of the usable records, so that no picture is on both sides.

    Texts give their share of `number`. Records that share pictures, also through others, are one
    group. A group of at most a quarter of `number` is held back whole or not at all. Of a larger
    one, whole pictures are drawn with all records that show no others, so that it gives its share;
    records that show a drawn picture beside another one are on neither side.

    It reads all usable records: a minute for millions.

    Raises:
      ValueError: `number` is too small for any group, or nothing would be left to train on.
    """
    shown = _Shown(store, usable)
    groups = shown.groups()
    size = np.bincount(groups)
    random = np.random.default_rng((seed, 1))
    order = random.permutation(len(size))
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(size)[:-1])
    is_text = np.array([not shown.pictures[places[0]] for places in members])
    texts, pictured = order[is_text[order]], order[~is_text[order]]
    small = pictured[size[pictured] <= number // 4]
    large = pictured[size[pictured] > number // 4]
    parts = [_Part(shown, random.permutation(members[group])) for group in large]

    of_texts = round(number * len(texts) / len(groups))
    of_small = number * int(size[small].sum()) // len(groups) if parts else number - of_texts
    held = _whole(groups, texts, size, of_texts) | _whole(groups, small, size, of_small)
    for part in parts:
        held[part.draw(number * len(part.places) // len(groups))] = True
    room = number - of_texts - int(held[~is_text[groups]].sum())
    for part in parts if room else ():  # what rounding and groups that did not fit have left
        more = part.draw(room)
        held[more], room = True, room - len(more)
    if not held.any():
        held = _whole(groups, order, size, number)
    if not held.any():
        fewest = min((part.fewest() for part in parts), default=0)
        raise ValueError(
            f"config.validation asks for {number} records, but the fewest that stay together, because "
            f"they show the same pictures, are {fewest}; raise config.validation.fraction or number"
        )
    return shown.holdout(held)


def _whole(groups, order, size, number: int) -> Bool[np.ndarray, " places"]:
    """Whole groups in the given order, of at most `number` places together."""
    chosen, taken = np.zeros(len(size), bool), 0
    for group in order:
        if taken + size[group] <= number:
            chosen[group], taken = True, taken + size[group]
    return chosen[groups]


def by_ids(store: RecordStore, usable: Bool[np.ndarray, " index"], ids: Sequence[str]) -> Holdout:
    """Holds back the records with these ids. Others that show their pictures do not train.

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
    wanted = np.isin(np.array(column, object), list(set(ids)))
    shown = _Shown(store, usable | wanted)
    return shown.holdout(wanted[shown.rows])


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


class _Shown:
    """Which pictures some records show. A place is the number of a record among them.

    Attributes:
      rows: their rows of the index.
      pictures: numbers of the pictures of each place.
      places: the places that show a picture, for each picture.
    """

    def __init__(self, store: RecordStore, usable: Bool[np.ndarray, " index"]):
        self.rows, self._usable = np.flatnonzero(usable), usable
        numbers: dict[str, int] = {}
        self.pictures = [
            tuple(numbers.setdefault(key, len(numbers)) for key in dict.fromkeys(images))
            for images in _pictures(store, usable)
        ]
        self.places: list[list[int]] = [[] for _ in numbers]
        for place, pictures in enumerate(self.pictures):
            for picture in pictures:
                self.places[picture].append(place)

    def groups(self) -> Int[np.ndarray, " places"]:
        """A number for each place, equal if they share pictures, also through other records."""
        groups = np.full(len(self.pictures), -1, np.int64)
        number = 0
        for start in range(len(groups)):
            if groups[start] >= 0:
                continue
            groups[start], open_places = number, [start]
            while open_places:
                for picture in self.pictures[open_places.pop()]:
                    for place in self.places[picture]:
                        if groups[place] < 0:
                            groups[place] = number
                            open_places.append(place)
            number += 1
        return groups

    def holdout(self, held: Bool[np.ndarray, " places"]) -> Holdout:
        left_out = held.copy()
        for place in np.flatnonzero(held):
            for picture in self.pictures[place]:
                left_out[self.places[picture]] = True
        result, rows = np.zeros(len(self._usable), bool), self.rows
        result[rows] = left_out
        if left_out.all():
            raise ValueError(
                f"config.validation holds back {held.sum()} records, and no others are left to train on "
                f"({left_out.sum() - held.sum()} more show their pictures); lower it"
            )
        return Holdout(rows[held], result)


class _Part:
    """A large group of records, of which pictures are drawn in the order of its `places`."""

    def __init__(self, shown: _Shown, places: Int[np.ndarray, " n"]):
        self.places, self._shown = places.tolist(), shown
        self._open = {place: len(shown.pictures[place]) for place in self.places}
        self._drawn: set[int] = set()
        alone = (shown.pictures[place] for place in self.places)
        self._alone = collections.Counter(
            p for pictures in alone if len(pictures) == 1 for p in pictures
        )

    def draw(self, number: int) -> list[int]:
        """At most `number` more records: those that show no other pictures than drawn ones."""
        found: list[int] = []
        for place in self.places:
            room = number - len(found)
            if not room:
                break
            new = set(self._shown.pictures[place]) - self._drawn
            # The sum is quick, and no more than the number of records that would come with it.
            if not new or sum(self._alone[picture] for picture in new) > room:
                continue
            whole, changed = self._with(new)
            if len(whole) <= room:
                self._drawn |= new
                found += whole
                for other, count in changed.items():
                    self._open[other] -= count
        return found

    def fewest(self) -> int:
        """The smallest number of records, above 0, that `draw` can give before any is drawn."""
        sets = {self._shown.pictures[place] for place in self.places}
        return min(len(self._with(pictures)[0]) for pictures in sets)

    def _with(self, new: Collection[int]) -> tuple[list[int], Mapping[int, int]]:
        """The places that show only drawn pictures and `new` ones; how many new ones each place shows."""
        changed = collections.Counter(place for one in new for place in self._shown.places[one])
        return [place for place, count in changed.items() if count == self._open[place]], changed


def _pictures(store, usable) -> Iterator[tuple[str, ...]]:
    rows = np.flatnonzero(usable)
    return (conversation.images for conversation in RowSource(store, rows))


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
