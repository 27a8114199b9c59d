"""One conversation record: parse it, validate it, say exactly what is wrong with it.

The form is that of PangeaIns (LLaVA's JSON): turns of "human" and "gpt", and one `<image>` marker
in the text for every picture. The embedded sample and PangeaIns share this one type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pangea_jax import languages

IMAGE_MARKER = "<image>"

_ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant"}
_SPEAKER_OF_ROLE = {role: speaker for speaker, role in _ROLE_OF_SPEAKER.items()}


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
      reason: a short fixed phrase, the same for the same fault, so that faults can be counted.
      field: the field at fault, e.g. `conversations[2].value`.
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
    """A conversation about zero or more pictures, in one language.

    Attributes:
      id: unique within its data set.
      source: where it comes from, e.g. `emoji/noto` or a PangeaIns source folder.
      language: canonical code (`pangea_jax.languages`).
      category: free label used for reports, may be empty.
      images: keys of the image store, in the order of the `<image>` markers.
      turns: user and assistant in alternation, user first, assistant last.
    """

    id: str
    source: str
    language: str
    category: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]

    @property
    def kind(self) -> Literal["image", "text"]:
        return "image" if self.images else "text"

    def validate(self) -> "Conversation":
        """Returns the record itself.

        Raises:
          RecordError: language, order of the turns, empty text or number of markers is wrong.
        """
        if self.language not in languages.LANGUAGES:
            raise RecordError("unknown language", "language", repr(self.language), self.id)
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
        default_language: str | None = None,
    ) -> "Conversation":
        """Parses and validates one record of PangeaIns.json.

        Args:
          record: `{"id", "image", "conversations": [{"from", "value"}, ...], "language"}`. `image`
            is a path, a list of paths, or absent for text. Other fields are not kept.
          source: overrides the record's own `source`; default the first two folders of its image
            below `images/`, which in PangeaIns name the data set.
          category: overrides the record's own `category`.
          default_language: tag for records without one. In PangeaIns those are English; without
            this argument they are an error.

        Raises:
          RecordError: a field is missing, of the wrong type, or fails `validate`.
        """
        if record.get("id") in (None, ""):
            raise RecordError("field is missing", "id")
        record_id = str(record["id"])
        images = _image_keys(record.get("image"), record_id)
        return cls(
            id=record_id,
            source=source or str(record.get("source", _data_set(images))),
            language=_language(record.get("language") or default_language, record_id),
            category=category or str(record.get("category", "")),
            images=images,
            turns=_turns(record.get("conversations"), record_id),
        ).validate()

    def to_pangeains(self) -> dict[str, Any]:
        """The record as PangeaIns writes it; `from_pangeains` restores it exactly."""
        record: dict[str, Any] = {"id": self.id}
        if self.images:
            record["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        record["conversations"] = [
            {"from": _SPEAKER_OF_ROLE[turn.role], "value": turn.text} for turn in self.turns
        ]
        # PangeaIns itself writes Hebrew with the tag of its time.
        record["language"] = "iw" if self.language == "he" else self.language
        record["source"] = self.source
        record["category"] = self.category
        return record


def _image_keys(value: Any, record_id: str) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    keys = (value,) if isinstance(value, str) else value
    if not isinstance(keys, list | tuple) or not all(isinstance(k, str) and k for k in keys):
        detail = f"expected a path or a list of paths, got {value!r:.80}"
        raise RecordError("wrong type", "image", detail, record_id)
    return tuple(keys)


def _language(tag: Any, record_id: str) -> str:
    if tag is None:
        detail = "pass default_language if it is known"
        raise RecordError("field is missing", "language", detail, record_id)
    try:
        return languages.get(str(tag)).code
    except KeyError as error:
        detail = str(error.args[0])
        raise RecordError("unknown language", "language", detail, record_id) from None


def _data_set(images: tuple[str, ...]) -> str:
    folders = images[0].removeprefix("images/").split("/")[:-1] if images else []
    return "/".join(folders[:2])


def _turns(value: Any, record_id: str) -> tuple[Turn, ...]:
    if not isinstance(value, list | tuple):
        detail = f"expected a list of turns, got {type(value).__name__}"
        raise RecordError("wrong type", "conversations", detail, record_id)
    turns = []
    for position, turn in enumerate(value):
        where = f"conversations[{position}]"
        if not isinstance(turn, Mapping):
            detail = f"expected an object, got {type(turn).__name__}"
            raise RecordError("wrong type", where, detail, record_id)
        if turn.get("from") not in _ROLE_OF_SPEAKER:
            detail = f"expected 'human' or 'gpt', got {turn.get('from')!r}"
            raise RecordError("unknown speaker", f"{where}.from", detail, record_id)
        if not isinstance(turn.get("value"), str):
            detail = f"expected text, got {type(turn.get('value')).__name__}"
            raise RecordError("wrong type", f"{where}.value", detail, record_id)
        turns.append(Turn(_ROLE_OF_SPEAKER[turn["from"]], turn["value"]))
    return tuple(turns)
