"""The embedded sample: emoji drawings named by people in 38 languages, as instruction records.

    image   "<image>" and a question in language L -> the CLDR short name in L
    text    a question in language L about a name in another language -> the name in L

Splits: `train` (drawings of `TRAIN_ARTISTS` and all text records), `dev_artwork` (OpenMoji, to
choose settings) and `unseen_artwork` (Twemoji, the test; do not use it to choose settings).
A hash chooses phrasings and languages, so a record does not depend on other records.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from pangea_jax import assets, languages
from pangea_jax.data.record import IMAGE_MARKER, Conversation, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.sample import questions

DIRECTORY = assets.EMOJI
TRAIN_ARTISTS = ("noto", "fluent", "emojione")
SPLIT_OF_ARTIST = dict.fromkeys(TRAIN_ARTISTS, "train") | {
    "openmoji": "dev_artwork",
    "twemoji": "unseen_artwork",
}
TEST_ARTIST = "twemoji"
CONCEPTS, TOKENIZER = "concepts.json", "tokenizer.model"
SIZE = 64
"""Width and height of a stored drawing, pixels."""

INDEX_COLUMNS = ("concept", "source_language")
"""Extra columns of the index: the code point, and the language of the name in a text question."""

Row = tuple[Conversation, dict[str, str | None]]


@dataclass(frozen=True)
class Concept:
    """One base emoji.

    Attributes:
      codepoint: such as `1f408`.
      char: the emoji itself.
      category: `animals` or `food`.
      names: its cleaned CLDR short name in each of `languages.EMOJI`.
    """

    codepoint: str
    char: str
    category: str
    names: dict[str, str]


def open_store() -> RecordStore:
    """The sample that the package contains."""
    return RecordStore(DIRECTORY)


@lru_cache
def load_concepts(directory: Path = DIRECTORY) -> tuple[Concept, ...]:
    """The concept table, ordered by code point."""
    rows = json.loads((directory / CONCEPTS).read_text(encoding="utf-8"))
    return tuple(Concept(**row) for row in rows)


def dump_concepts(concepts: Collection[Concept]) -> str:
    """The concept table as JSON, one concept a line."""
    rows = [json.dumps(asdict(concept), ensure_ascii=False) for concept in concepts]
    return "[\n" + ",\n".join(rows) + "\n]\n"


def image_key(artist: str, codepoint: str) -> str:
    """The key of a drawing in the image store, such as `noto/1f408`."""
    return f"{artist}/{codepoint}"


def picture_keys(store: RecordStore, artists: Collection[str]) -> list[str]:
    """Keys of all drawings by the artists, in the order of the store."""
    keys = store.image_index["key"].to_pylist()
    return [key for key in keys if key.split("/")[0] in artists]


def image_record(artist: str, concept: Concept, language: str) -> Row:
    """A drawing and its name. The phrasing depends on artist, concept and language."""
    phrasings = questions.IMAGE[language]
    question = phrasings[_hash("image", artist, concept.codepoint, language) % len(phrasings)]
    key = image_key(artist, concept.codepoint)
    record = Conversation(
        id=f"{key}/{language}",
        source=f"emoji/{artist}",
        language=language,
        category=concept.category,
        images=(key,),
        turns=(
            Turn("user", f"{IMAGE_MARKER}\n{question}"),
            Turn("assistant", concept.names[language]),
        ),
    )
    return record, {"concept": concept.codepoint, "source_language": None}


class Translations(Sequence[Conversation]):
    """Translations of every concept's name between every two languages, in every phrasing; text only.

    It also has the image questions with a name in place of the picture. They teach the meaning of
    "What is this?" in each language. The records are made when they are read, because there are far
    more than in the store. A source for Grain.
    """

    def __init__(self, codes: Sequence[str]):
        self._concepts = load_concepts()
        self._pairs = [
            (one, other, phrasing)
            for one in codes
            for other in codes
            if one != other
            for phrasing in (
                *questions.TEXT[other],
                *(f"{{name}}\n{question}" for question in questions.IMAGE[other]),
            )
        ]

    def __len__(self) -> int:
        return len(self._concepts) * len(self._pairs)

    def __getitem__(self, i) -> Conversation:
        place, pair = divmod(int(i), len(self._pairs))
        one, other, phrasing = self._pairs[pair]
        return _translation(self._concepts[place], one, other, phrasing)

    def __repr__(self) -> str:
        return f"Translations(len={len(self)})"


def text_record(concept: Concept, language: str) -> Row:
    """The question for a concept's name in `language`, given its name in another language.

    A hash orders the other languages. The first one whose name is spelled differently is chosen.
    """
    answer = concept.names[language]
    others = sorted(
        (code for code in concept.names if concept.names[code] != answer),
        key=lambda code: _hash("from", concept.codepoint, language, code),
    )
    phrasings = questions.TEXT[language]
    phrasing = phrasings[_hash("text", concept.codepoint, language) % len(phrasings)]
    record = _translation(concept, others[0], language, phrasing)
    return record, {"concept": concept.codepoint, "source_language": others[0]}


def _translation(concept: Concept, one: str, other: str, phrasing: str) -> Conversation:
    question = phrasing.replace("{name}", concept.names[one])
    return Conversation(
        id=f"text/{concept.codepoint}/{one}-{other}",
        source="emoji/cldr",
        language=other,
        category=concept.category,
        images=(),
        turns=(Turn("user", question), Turn("assistant", concept.names[other])),
    )


def split_records(
    split: str, concepts: Collection[Concept], drawings: Collection[str]
) -> Iterator[Row]:
    """All records of a split in their stored order.

    Args:
      drawings: keys of the images that exist. Some artists have not drawn every concept.
    """
    for artist, artist_split in SPLIT_OF_ARTIST.items():
        for concept in concepts if artist_split == split else ():
            if image_key(artist, concept.codepoint) in drawings:
                for language in languages.EMOJI:
                    yield image_record(artist, concept, language)
    if split == "train":
        for concept in concepts:
            for language in languages.EMOJI:
                yield text_record(concept, language)


def _hash(*parts: str) -> int:
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")
