"""A conversation record: parses and validates it, and reports exactly what is wrong.

The format is that of PangeaIns (LLaVA's JSON): turns of "human" and "gpt", and one `<image>` marker
in the text for every image. The embedded sample and PangeaIns use the same type.

Values in PangeaIns.json, and how each field is read:

    id            a text or a number; not changed, so `2433684022797.0` keeps its `.0`
    image         absent, null or "" (text-only record), a path, or a list of paths; the builder
                  resolves absolute paths
    language      `iw`, `zh_simplified`, `urdu`, `kr` are aliases; if absent or null, see
                  `Conversation.from_pangeains`
    conversations a first turn of "system" is the system prompt; another first turn that is not
                  "human" is dropped, as in LLaVA-NeXT's `preprocess_qwen`; the text is not changed
    source        if absent, the first two folders of the image, else the start of the id
    others        (`url`, `model`) are not kept
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, Literal

from pangea_jax import language_id, languages

IMAGE_MARKER = "<image>"
UNREADABLE = "<unreadable>"
"""The key that marks a record of which a reader of files could read no more than the id; its value says why."""
LITERAL_MARK = "<image\u200b>"
"""The marker where it is part of a text, and stands for no image."""

_ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant"}
_SPEAKER_OF_ROLE = {role: speaker for speaker, role in _ROLE_OF_SPEAKER.items()}
_SYSTEM = "system"
_TEXT_ONLY = "text-only"
# With less confidence, the identifier only guesses (it says that "42" is English with 0.12).
_MIN_CONFIDENCE = 0.4


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
      reason: a short fixed phrase for each kind of fault, so that faults can be counted.
      field: the field with the fault, e.g. `conversations[2].value`.
      record_id: the record's id, empty if it has none.
    """

    def __init__(self, reason: str, field: str, detail: str = "", record_id: str = ""):
        self.reason, self.field, self.detail, self.record_id = reason, field, detail, record_id
        name = f"record {record_id!r}" if record_id else "record"
        super().__init__(f"{name}, field {field}: {reason}{f' ({detail})' if detail else ''}")

    def __reduce__(self):
        return type(self), (self.reason, self.field, self.detail, self.record_id)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation about zero or more images, in one language.

    Attributes:
      id: as in the dataset. In PangeaIns several records may share an id.
      source: such as `emoji/noto` or a PangeaIns source folder.
      language: canonical code (`pangea_jax.languages`), or "und" if it is not known.
      category: any label for reports; may be empty.
      images: keys of the image store, in the order of the `<image>` markers.
      turns: user and assistant in alternation, user first, assistant last.
      system: system prompt; empty: the one of the chat template.
    """

    id: str
    source: str
    language: str
    category: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    system: str = ""

    @property
    def kind(self) -> Literal["image", "text"]:
        return "image" if self.images else "text"

    def validate(self) -> "Conversation":
        """Returns the record itself if it is valid.

        Raises:
          RecordError: the language is unknown, the turns are in the wrong order, a text is empty,
            the number of markers is wrong, or one is within another.
        """
        if self.language not in (*languages.LANGUAGES, languages.UNDETERMINED):
            raise RecordError("unknown language", "language", repr(self.language), self.id)
        if IMAGE_MARKER in self.system:
            where = "conversations[0].value"
            raise RecordError("marker in the system prompt", where, record_id=self.id)
        self._validate_turns()
        markers = sum(turn.text.count(IMAGE_MARKER) for turn in self.turns)
        if markers != len(self.images):
            detail = f"{markers} {IMAGE_MARKER} in the turns, {len(self.images)} in `image`"
            raise RecordError("markers and images differ in number", "image", detail, self.id)
        return self

    def _validate_turns(self) -> None:
        if not self.turns:
            raise RecordError("no turns", "conversations", record_id=self.id)
        for position, turn in enumerate(self.turns):
            expected = ("user", "assistant")[position % 2]
            where = f"conversations[{position}]"
            if turn.role != expected:
                detail = f"expected {_SPEAKER_OF_ROLE[expected]!r}, got {turn.role!r}"
                raise RecordError("roles do not alternate", f"{where}.from", detail, self.id)
            if not turn.text.strip():
                kind = "answer" if expected == "assistant" else "question"
                raise RecordError(f"empty {kind}", f"{where}.value", record_id=self.id)
            if turn.role == "assistant" and IMAGE_MARKER in turn.text:
                detail = f"{IMAGE_MARKER} in an answer"
                raise RecordError("marker in an answer", f"{where}.value", detail, self.id)
            if IMAGE_MARKER in turn.text.replace(IMAGE_MARKER, ""):
                raise RecordError("marker within a marker", f"{where}.value", record_id=self.id)
        if self.turns[-1].role != "assistant":
            where = f"conversations[{len(self.turns) - 1}].from"
            raise RecordError("last turn is not an answer", where, record_id=self.id)

    @classmethod
    def from_pangeains(
        cls,
        record: Mapping[str, Any],
        *,
        source: str = "",
        category: str = "",
        default_language: str | Callable[[str], str | None] | None = None,
    ) -> "Conversation":
        """Parses and validates one record of PangeaIns.json.

        Args:
          record: `{"id", "image", "conversations": [{"from", "value"}, ...], "language"}`, see the
            top of this file.
          source: replaces the record's own `source`. If both are missing, it is `data_set`.
          category: replaces the record's own `category`. If both are missing, it is the first
            folder of the source (in PangeaIns `general`, `cultural`, `doc+chart`, `text-only`,
            ...).
          default_language: for records without a language: a tag, or a function from the words of
            the record to a tag, such as `identify_language`. With None such records are an error.

        Raises:
          RecordError: a field is missing or has the wrong type, or `validate` fails.
        """
        if not isinstance(record, Mapping):
            said = f": {record:.80}" if isinstance(record, str) else ""
            detail = f"expected an object, got {type(record).__name__}{said}"
            raise RecordError("wrong type", "record", detail)
        if UNREADABLE in record:
            detail, id = str(record[UNREADABLE])[:200], str(record.get("id", ""))[:200]
            raise RecordError("cannot be read", "record", detail, id)
        record_id = _id(record.get("id"))
        images = image_paths(record.get("image"), record_id)
        system, turns = _turns(record.get("conversations"), record_id)
        source = source or str(record.get("source") or data_set(images, record_id))
        category = category or str(record.get("category") or source.partition("/")[0])
        return cls(
            id=record_id,
            source=_text(source, "source", record_id),
            language=_language(record.get("language") or default_language, turns, record_id),
            category=_text(category, "category", record_id),
            images=images,
            turns=turns,
            system=system,
        ).validate()

    def to_pangeains(self) -> dict[str, Any]:
        """The record in the format of PangeaIns. `from_pangeains` restores it exactly."""
        record: dict[str, Any] = {"id": self.id}
        if self.images:
            record["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        record["conversations"] = [
            *([{"from": _SYSTEM, "value": self.system}] if self.system else []),
            *({"from": _SPEAKER_OF_ROLE[turn.role], "value": turn.text} for turn in self.turns),
        ]
        # PangeaIns uses the older tag of Hebrew.
        record["language"] = "iw" if self.language == "he" else self.language
        record["source"] = self.source
        record["category"] = self.category
        return record


def _id(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return _text(value.strip(), "id", "")
    if value in (None, "") or isinstance(value, str):
        raise RecordError("field is missing", "id")
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not number or (not isinstance(value, int) and not math.isfinite(value)):
        raise RecordError("wrong type", "id", f"expected a text or a number, got {value!r:.80}")
    # Python writes 1e16 and more with an exponent; the release has all digits.
    return f"{value:.1f}" if isinstance(value, float) and value.is_integer() else str(value)


def image_paths(value: Any, record_id: str = "") -> tuple[str, ...]:
    """The normalised paths of an `image` field: folder names with `/` between them.

    >>> image_paths("./general//cambrian/1.jpg"), image_paths(None)
    (('general/cambrian/1.jpg',), ())

    Raises:
      RecordError: the value is neither a path nor a list of paths, or a path contains `..`.
    """
    if value is None or value == "":
        return ()
    paths = (value,) if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not all(isinstance(p, str) and p for p in paths):
        detail = f"expected a path or a list of paths, got {value!r:.80}"
        raise RecordError("wrong type", "image", detail, record_id)
    clean = [PurePosixPath(_text(path.strip(), "image", record_id)) for path in paths]
    for path in clean:
        if ".." in path.parts or not path.name or "\0" in path.name:
            detail = f"expected the path of a file, got {str(path)!r:.80}"
            raise RecordError("path is not allowed", "image", detail, record_id)
    return tuple(str(path) for path in clean)


def data_set(images: tuple[str, ...], record_id: str) -> str:
    """The dataset of a record of PangeaIns.

    If the record has an image, it is the first two folders of the image. Otherwise it is the part of
    the id before the number.

    >>> data_set(("images/general/cambrian/a/1.jpg",), "x"), data_set((), "NuminaMath-CoT_54842")
    ('general/cambrian', 'text-only/NuminaMath-CoT')
    """
    if images:
        return "/".join(images[0].removeprefix("images/").strip("/").split("/")[:-1][:2])
    named = re.fullmatch(r"([A-Za-z][\w.-]*?)_\d+", record_id, re.ASCII)
    return f"{_TEXT_ONLY}/{named[1]}" if named else _TEXT_ONLY


def identify_language(text: str) -> str | None:
    """The language of a text by `pangea_jax.language_id`; None if the identifier is not sure."""
    (best,) = language_id.identify(text.replace(IMAGE_MARKER, " ").strip())
    return best.label if best.score >= _MIN_CONFIDENCE else None


def identify_or_und(text: str) -> str:
    """The language of a text as `identify_language` finds it; "und" if it finds none of ours."""
    found = identify_language(text)
    return found if found in languages.LANGUAGES else languages.UNDETERMINED


def _language(tag: Any, turns: tuple[Turn, ...], record_id: str) -> str:
    if tag is None:
        detail = "pass default_language if it is known"
        raise RecordError("field is missing", "language", detail, record_id)
    if callable(tag):
        found = tag("\n".join(turn.text for turn in turns))
        if found not in (*languages.LANGUAGES, languages.UNDETERMINED):
            detail = f"the field is missing and the text looks like {found or 'no known language'}"
            raise RecordError("language not identified", "language", detail, record_id)
        return found
    if tag == languages.UNDETERMINED:
        return tag
    try:
        return languages.get(str(tag)).code
    except KeyError as error:
        detail = str(error.args[0])
        raise RecordError("unknown language", "language", detail, record_id) from None


def _text(value: str, field: str, record_id: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ord(value[error.start])
        detail = f"half a surrogate pair at character {error.start}"
        if 0xDC80 <= half <= 0xDCFF:  # how a byte is read that is not UTF-8
            before = value[max(0, error.start - 20) : error.start]
            detail = f"not UTF-8: the byte 0x{half - 0xDC00:X} after {before!r}"
        raise RecordError("not valid Unicode", field, detail, record_id) from None
    return value


def _turns(value: Any, record_id: str) -> tuple[str, tuple[Turn, ...]]:
    """The system prompt (empty if there is none) and the turns."""
    if not isinstance(value, list | tuple):
        detail = f"expected a list of turns, got {type(value).__name__}"
        raise RecordError("wrong type", "conversations", detail, record_id)
    system, turns = "", []
    for position, turn in enumerate(value):
        where = f"conversations[{position}]"
        if not isinstance(turn, Mapping):
            detail = f"expected an object, got {type(turn).__name__}"
            raise RecordError("wrong type", where, detail, record_id)
        speaker = turn.get("from")
        is_system = speaker == _SYSTEM and position == 0
        if not is_system and (not isinstance(speaker, str) or speaker not in _ROLE_OF_SPEAKER):
            detail = f"expected 'human' or 'gpt', got {speaker!r:.80}"
            raise RecordError("unknown speaker", f"{where}.from", detail, record_id)
        if not isinstance(turn.get("value"), str):
            detail = f"expected text, got {type(turn.get('value')).__name__}"
            raise RecordError("wrong type", f"{where}.value", detail, record_id)
        text = _text(turn["value"], f"{where}.value", record_id)
        if is_system:
            system = text
        else:
            turns.append(Turn(_ROLE_OF_SPEAKER[speaker], text))
    return system, tuple(turns[1:] if turns and turns[0].role != "user" else turns)
