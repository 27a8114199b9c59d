"""The store of the embedded sample: drawings on disk, conversations made when they are read.

A row of its index is a drawing, a language and a variety; or, for a text record, a concept and two
languages. The conversation follows from these alone (`pangea_jax.sample.conversations`), so the
package contains no records.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from pangea_jax import languages
from pangea_jax.data.record import Conversation
from pangea_jax.data.store import RecordStore
from pangea_jax.sample import emoji
from pangea_jax.sample.conversations import DEFAULT_PLAN, Plan, picture_record, text_record

_LABEL = pa.dictionary(pa.int32(), pa.string())


class SampleRecords(Sequence[Conversation]):
    """The conversations of one split by position; a source for `grain.MapDataset`.

    Args:
      drawings: (artist, code point) of each drawing of the split.
      texts: whether the split has text records, after those with pictures.
    """

    def __init__(self, split: str, drawings: Sequence[tuple[str, str]], texts: bool, plan: Plan):
        self.split, self.drawings, self._plan = split, tuple(drawings), plan
        several = len(languages.EMOJI)
        concepts = len(emoji.load_concepts()) if texts else 0
        self._pictures = (len(self.drawings), several, plan.varieties)
        self._texts = (concepts, several, several - 1)

    @property
    def num_pictured(self) -> int:
        """Number of records with pictures; they come first."""
        return int(np.prod(self._pictures))

    def __len__(self) -> int:
        return self.num_pictured + int(np.prod(self._texts))

    def pictured(self, position):
        """(drawing, language, variety) as numbers, of one or many positions."""
        return np.unravel_index(position, self._pictures)

    def text(self, position):
        """(concept, language, source language) as numbers, of one or many positions."""
        concept, language, source = np.unravel_index(position - self.num_pictured, self._texts)
        return concept, language, source + (source >= language)  # never from itself

    def __getitem__(self, position: SupportsIndex) -> Conversation:
        index = position.__index__()
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of split {self.split!r}, which has {len(self)}")
        index, codes = index % len(self), languages.EMOJI
        if index >= self.num_pictured:
            concept, language, source = self.text(index)
            return text_record(emoji.load_concepts()[concept], codes[source], codes[language])
        drawing, language, variety = self.pictured(index)
        artist, codepoint = self.drawings[drawing]
        return picture_record(
            artist,
            self._concepts[codepoint],
            codes[language],
            int(variety),
            self._plan,
            self._drawn[artist],
        )

    @cached_property
    def _concepts(self) -> dict[str, emoji.Concept]:
        return {concept.codepoint: concept for concept in emoji.load_concepts()}

    @cached_property
    def _drawn(self) -> dict[str, list[emoji.Concept]]:
        """What each artist of the split has drawn."""
        drawn: dict[str, list[emoji.Concept]] = {}
        for artist, codepoint in self.drawings:
            drawn.setdefault(artist, []).append(self._concepts[codepoint])
        return drawn

    def __getstate__(self):
        # Workers read the concepts of the package themselves.
        return {n: v for n, v in self.__dict__.items() if n not in ("_concepts", "_drawn")}

    def __repr__(self) -> str:
        return f"SampleRecords(split={self.split!r}, len={len(self)})"


class SampleStore(RecordStore):
    """The embedded sample as a `RecordStore`.

    Attributes:
      index: `split, position, id, source, language, category, kind`, and `concept` (code point),
        `source_language` (of the name in a text record) and `variety` (of a record with pictures).
        It is made in memory in a fraction of a second.

    Args:
      plan: which conversations are made.
    """

    def __init__(self, plan: Plan = DEFAULT_PLAN):
        super().__init__(emoji.DIRECTORY)
        self.plan = plan

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(emoji.SPLIT_OF_ARTIST.values()))

    def records(self, split: str) -> SampleRecords:
        """The conversations of a split, in the order of `position` in the index."""
        if split not in self.splits:
            raise KeyError(f"no split {split!r} in {self.directory}; it has {self.splits}")
        drawings = [tuple(key.split("/")) for key in self.image_index["key"].to_pylist()]
        here = [drawing for drawing in drawings if emoji.SPLIT_OF_ARTIST[drawing[0]] == split]
        return SampleRecords(split, here, split == "train", self.plan)

    @cached_property
    def index(self) -> pa.Table:
        parts = [
            table
            for split in self.splits
            for records in [self.records(split)]
            for table in (_picture_rows(records), _text_rows(records))
        ]
        # Each part has its own dictionaries, and Arrow groups only by one.
        return pa.concat_tables(parts).unify_dictionaries().combine_chunks()

    def __repr__(self) -> str:
        return f"SampleStore(splits={self.splits}, plan={self.plan})"


def _picture_rows(records: SampleRecords) -> pa.Table:
    """The rows of the index with pictures."""
    positions = np.arange(records.num_pictured)
    drawing, language, variety = records.pictured(positions)
    concepts = {concept.codepoint: concept for concept in emoji.load_concepts()}
    artists, codepoints = zip(*records.drawings, strict=True)
    codes = _labels(language, languages.EMOJI)
    keys = _labels(drawing, [emoji.image_key(*names) for names in records.drawings])
    return _rows(
        records.split,
        positions,
        kind="image",
        id=pc.binary_join_element_wise(
            *(column.cast(pa.string()) for column in (keys, codes, pa.array(variety))), "/"
        ),
        source=_labels(drawing, [f"emoji/{artist}" for artist in artists]),
        language=codes,
        category=_labels(drawing, [concepts[codepoint].category for codepoint in codepoints]),
        concept=_labels(drawing, codepoints),
        source_language=pa.nulls(len(positions), _LABEL),
        variety=pa.array(variety.astype(np.int32)),
    )


def _text_rows(records: SampleRecords) -> pa.Table:
    """The rows of the index without pictures."""
    positions = np.arange(records.num_pictured, len(records))
    concept, language, source = records.text(positions)
    concepts = emoji.load_concepts()
    codes, sources = _labels(language, languages.EMOJI), _labels(source, languages.EMOJI)
    codepoints = _labels(concept, [each.codepoint for each in concepts])
    names = [column.cast(pa.string()) for column in (codepoints, sources, codes)]
    pairs = pc.binary_join_element_wise(*names[1:], "-")
    return _rows(
        records.split,
        positions,
        kind="text",
        id=pc.binary_join_element_wise(pa.scalar("text"), names[0], pairs, "/"),
        source=_labels(np.zeros_like(concept), ["emoji/cldr"]),
        language=codes,
        category=_labels(concept, [each.category for each in concepts]),
        concept=codepoints,
        source_language=sources,
        variety=pa.nulls(len(positions), pa.int32()),
    )


def _rows(split: str, positions: Int[np.ndarray, " n"], kind: str, **columns) -> pa.Table:
    """Rows of the index, with the same split and kind."""
    once = np.zeros_like(positions)
    return pa.table(
        {
            "split": _labels(once, [split]),
            "position": pa.array(positions),
            "id": columns.pop("id"),
            "kind": _labels(once, [kind]),
            **columns,
        }
    )


def _labels(codes: Int[np.ndarray, " n"], labels: Sequence[str]) -> pa.DictionaryArray:
    """A column of `labels[code]`; equal labels share a code."""
    distinct = list(dict.fromkeys(labels))
    code_of = {label: code for code, label in enumerate(distinct)}
    shared = np.array([code_of[label] for label in labels], np.int32)
    return pa.DictionaryArray.from_arrays(shared[codes], pa.array(distinct, pa.string()))
