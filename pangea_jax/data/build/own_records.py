"""A record in any of the common forms, as a record of PangeaIns.

The forms are those of LLaVA and ShareGPT (`from` and `value`), those of OpenAI and LLaMA-Factory (`role` and `content`,
as text or as parts), and rows of a table with `image`, `question` and `answer`. A record of PangeaIns does not change.
What is put in another place or left out is noted, so that the build can count it.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pangea_jax.data.build import embedded, json_records
from pangea_jax.data.record import IMAGE_MARKER, LITERAL_MARK, UNREADABLE, RecordError

FIELDS = {
    "id": ("id",),
    "image": (
        *("image", "images", "image_path", "image_paths", "file_name", "file_names", "img"),
        *("image_file", "image_files"),
    ),
    "conversations": ("conversations", "messages", "conversation"),
    "question": ("question", "prompt", "instruction", "query"),
    "input": ("input",),
    "answer": ("answer", "response", "output", "caption", "text"),
    "system": ("system", "system_prompt"),
    "language": ("language", "lang"),
    "source": ("source",),
    "category": ("category",),
}
"""Our name of a field -> the names that it has in the common forms, the first that is there counts."""

UNMARKED = ("front", "reject")
FAULT = "\0fault"
"""The key of a row that a reader could not read: (reason, field, detail)."""

_SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}
_SPEAKER, _CONTENT = ("from", "role"), ("value", "content")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_NOT_SEEN = ("videos", "video", "audios", "audio")  # no model of ours sees or hears them


@dataclasses.dataclass(frozen=True)
class Rules:
    """How records are read.

    Attributes:
      columns: our name of a field -> the name that it has in these records.
      question: of records that have only an answer, such as captions; None: they are rejected.
      unmarked: what becomes of pictures without a mark in the text: "front" of the words, or "reject".
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    question: str | None = None
    unmarked: str = UNMARKED[0]

    def names(self, field: str) -> tuple[str, ...]:
        """The names under which a record may have a field."""
        return (self.columns[field],) if field in self.columns else FIELDS[field]


@dataclasses.dataclass
class Read:
    """A record of PangeaIns, and what was noted when it was made.

    Attributes:
      embedded: path in `record["image"]` -> digest and size of a picture that stood inside the record.
      notes: what was put in another place or not used, such as `field url is not used`.
      names: field of `record` -> its name where it was read; a turn is `conversations[1]`.
    """

    record: dict[str, Any]
    notes: list[str] = dataclasses.field(default_factory=list)
    embedded: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    names: dict[str, str] = dataclasses.field(default_factory=dict)

    def name(self, field: str) -> str:
        """The name under which the reader of `record` calls a field -> the name where it was read."""
        turn, dot, part = field.partition("].")
        turn += "]" if dot else ""
        if turn not in self.names:
            return field
        found = self.names[turn]
        if not dot or "[" not in found:
            return found
        return f"{found}.{self.names.get(f'{turn}.{part}', part)}"


def as_pangeains(raw: Any, rules: Rules, default_id: str) -> Read:
    """Converts one record.

    Args:
      raw: as it was read, with references in the place of pictures (`embedded.Writer.take`).
      default_id: the id of a record that has none.

    Raises:
      RecordError: the record has no conversation, or one that cannot be understood.
    """
    if not isinstance(raw, Mapping):
        said = f": {raw:.80}" if isinstance(raw, str) else ""
        detail = f"expected an object with fields, found {type(raw).__name__}{said}"
        raise RecordError("wrong type", "record", detail)
    if UNREADABLE in raw:
        found = raw.get("id") or default_id
        raise RecordError("cannot be read", "record", str(raw[UNREADABLE])[:200], str(found)[:200])
    if (fault := raw.get(FAULT)) and _is_fault(fault):
        raise RecordError(*fault)
    found = {field: _first(raw, rules.names(field)) for field in FIELDS}
    id = default_id if _is_empty(found["id"][1]) else found["id"][1]
    return _Conversion(raw, rules, found, id).read()


class _Conversion:
    """One record on its way. `found` is field -> (its name in the record, its value)."""

    def __init__(self, raw, rules, found, id):
        self.raw, self.rules, self.found, self.id = raw, rules, found, id
        self.used = {name for name, value in found.values() if not _is_empty(value)}
        self.read_ = Read({"id": id})
        self.given = self._paths(found["image"][1], found["image"][0] or "image")
        self.placed: list[str] = []  # the pictures that have a mark, in its order
        self.of_parts: list[str] = []  # those of them that a part of a message names

    def read(self) -> Read:
        for name in _NOT_SEEN:
            if not _is_empty(self.raw.get(name)):
                raise self._error("video or audio", name, "expected pictures and texts alone")
        turns = self._turns()
        system = self._system(turns)
        self._place_unmarked(turns)
        if turns and turns[0]["from"] == "gpt":
            self.read_.notes.append("first turn is an answer without a question; left out")
        turns = ([{"from": "system", "value": system}] if system else []) + turns
        self._name_turns(turns)
        record = self.read_.record
        record |= {"image": self.placed + self.given, "conversations": turns}
        for field in ("language", "source", "category"):
            if not _is_empty(self.found[field][1]):
                record[field] = self.found[field][1]
        for name, value in self.raw.items():
            if name not in self.used and not _is_empty(value):
                note = f"field {_readable(name)} is not used"
                if not record["image"] and _is_picture(value):
                    note += f", but has a picture; read it with --columns=image={_readable(name)}"
                self.read_.notes.append(note)
        name, value = self.found["image"]
        if name and not record["image"] and isinstance(value, str):
            self.read_.notes.append(f"field {name} is empty; the record is a text")
        return self.read_

    def _name_turns(self, turns: list[dict[str, str]]) -> None:
        """Notes what the fields of the record are called where it was read."""
        names = self.read_.names
        names |= {field: name for field, (name, _) in self.found.items() if name}
        conversation = self.found["conversations"]
        if _is_empty(conversation[1]):
            speakers = {"human": "question", "gpt": "answer", "system": "system"}
            for position, turn in enumerate(turns):
                field = speakers[turn["from"]]
                names[f"conversations[{position}]"] = self.found[field][0] or field
            return
        read = _parsed_list(conversation[1])
        moved = len(turns) - len(read)  # by one if the system prompt is a field
        for position in range(len(turns)):
            here = f"conversations[{position}]"
            if position < moved:
                names[here] = self.found["system"][0]
                continue
            there = read[position - moved]
            names[here] = f"{conversation[0]}[{position - moved}]"
            names[f"{here}.from"] = _first(there, _SPEAKER)[0] or _SPEAKER[0]
            names[f"{here}.value"] = _first(there, _CONTENT)[0] or _CONTENT[0]

    def _error(self, reason: str, field: str, detail: str = "") -> RecordError:
        return RecordError(reason, field, detail, str(self.id))

    def _turns(self) -> list[dict[str, str]]:
        name, value = self.found["conversations"]
        if _is_empty(value) and (name is None or self.found["answer"][0]):
            return self._question_and_answer()
        for field in ("question", "input", "answer"):
            self.used.discard(self.found[field][0])
        return list(self._read_turns(name, _parsed_list(value)))

    def _question_and_answer(self) -> list[dict[str, str]]:
        (_, question), (_, more), (answer_name, answer) = (
            self.found[field] for field in ("question", "input", "answer")
        )
        if _is_empty(question) and self.rules.question:
            question = self.rules.question
        missing = [f for f, v in (("question", question), ("answer", answer)) if v is None]
        if missing:
            detail = (
                f"no {' and no '.join(missing)}, and no conversations or messages; "
                f"the record has {_names(self.raw)}"
            )
            raise self._error("field is missing", missing[0], detail)
        if _is_blank(question) and _is_blank(more):
            raise self._error("empty question", self.found["question"][0] or "question")
        if not _is_empty(more):
            question = f"{question}\n{more}"
        texts = (question, self.found["question"][0] or "question"), (answer, answer_name)
        return [
            {"from": speaker, "value": self._string(_as_text(text), field, speaker)}
            for speaker, (text, field) in zip(("human", "gpt"), texts, strict=True)
        ]

    def _read_turns(self, name: str, turns: Any) -> Iterator[dict[str, str]]:
        if not isinstance(turns, list | tuple):
            detail = f"expected a list of turns, found {_shown(turns)}"
            raise self._error("wrong type", name, detail)
        for position, turn in enumerate(turns):
            where = f"{name}[{position}]"
            if not isinstance(turn, Mapping):
                detail = f"expected an object, found {_shown(turn)}"
                raise self._error("wrong type", where, detail)
            by, speaker = _first(turn, _SPEAKER)
            of, content = _first(turn, _CONTENT)
            if not isinstance(speaker, str) or speaker not in _SPEAKERS:
                detail = f"expected one of {', '.join(_SPEAKERS)}, found {_shown(speaker)}"
                raise self._error("unknown speaker", f"{where}.{by or 'from'}", detail)
            where = f"{where}.{of or 'value'}"
            speaker = _SPEAKERS[speaker]
            if isinstance(content, list | tuple):
                yield {"from": speaker, "value": self._joined(content, where, speaker)}
            else:
                yield {"from": speaker, "value": self._string(content, where, speaker)}

    def _string(self, text: Any, where: str, speaker: str) -> str:
        """A text in which each mark of a question takes the next picture of the record."""
        if not isinstance(text, str):
            detail = f"expected a text, found {_shown(text)}"
            raise self._error("wrong type", where, detail)
        if speaker == "human":
            self._take(text.count(IMAGE_MARKER))
        return text

    def _joined(self, parts: Sequence[Any], where: str, speaker: str) -> str:
        """The text of a message of parts: a line for each part, a mark for each picture."""
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        if self.given and all(isinstance(text, str) for text in texts):
            # The pictures are in a field of the record, so these texts have the marks.
            return self._string("\n".join(texts), where, speaker)
        lines = []
        for position, part in enumerate(parts):
            here = f"{where}[{position}]"
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            if not isinstance(part, Mapping):
                raise self._error("wrong type", here, f"expected a part, found {_shown(part)}")
            text = part.get("text")
            if isinstance(text, str) and part.get("type", "text") in ("text", "input_text", None):
                lines.append(text.replace(IMAGE_MARKER, LITERAL_MARK))
            else:
                self._take_part(part, here)
                lines.append(IMAGE_MARKER)
        return "\n".join(lines)

    def _take_part(self, part: Mapping[str, Any], where: str) -> None:
        kind = part.get("type", "image")
        if kind not in ("image", "image_url", "input_image", None):
            detail = f"expected a text or an image, found a part of type {_shown(kind)}"
            raise self._error("unknown part", f"{where}.type", detail)
        _, value = _first(part, ("image", "image_url", "path", "url", "file_name"))
        if _is_empty(value):
            self._take(1)  # a mark for the next picture of the record
        else:
            paths = self._paths(value, where)
            self.placed += paths
            self.of_parts += paths

    def _take(self, count: int) -> None:
        self.placed += self.given[:count]
        self.given = self.given[count:]

    def _place_unmarked(self, turns: list[dict[str, str]]) -> None:
        """Puts the pictures in front of the first question if the text has no mark at all."""
        if self.given and self.given == self.of_parts:
            self.given = []  # the parts and a field of the record name the same pictures
        first = next((turn for turn in turns if turn["from"] == "human"), None)
        if not self.given or self.placed or first is None:
            return
        if self.rules.unmarked == "reject":
            detail = f"{len(self.given)} in {self.found['image'][0]}, no {IMAGE_MARKER} in the text"
            raise self._error("pictures without a mark", self.found["image"][0], detail)
        first["value"] = " ".join([IMAGE_MARKER] * len(self.given)) + "\n" + first["value"]
        # A row of a table has no place for a mark, so nothing is odd about it.
        if not _is_empty(self.found["conversations"][1]):
            self.read_.notes.append(f"pictures without {IMAGE_MARKER} in the text; put in front")

    def _system(self, turns: list[dict[str, str]]) -> str:
        name, field = self.found["system"]
        if not _is_empty(field):
            field = self._string(field, name, "system")
        begins = bool(turns) and turns[0]["from"] == "system"
        first = turns.pop(0)["value"] if begins else ""
        for position, turn in enumerate(turns, int(begins)):
            if turn["from"] == "system":
                where = f"{self.found['conversations'][0]}[{position}]"
                raise self._error("system prompt is not first", where, _shown(turn["value"]))
        if first and not _is_empty(field) and field != first:
            self.used.discard(name)
        return first or field or ""

    def _paths(self, value: Any, where: str) -> list[str]:
        """The paths of a field or part that names one picture or several."""
        if _is_empty(value):
            return []
        if reference := embedded.reference_of(value):
            path = f"embedded/{reference[0]}"
            self.read_.embedded[path] = reference
            return [path]
        if isinstance(value, Mapping):
            _, inner = _first(value, ("path", "url", "image", "file_name"))
            return self._paths(inner, where)
        value = _parsed_list(value)
        if isinstance(value, list | tuple) and not any(map(_is_empty, value)):
            return [path for one in value for path in self._paths(one, where)]
        if not isinstance(value, str):
            detail = f"expected a path or a list of paths, found {_shown(value)}"
            raise self._error("wrong type", where, detail)
        if value.startswith("data:"):  # a whole one has become a reference
            detail = f"expected base64 after the comma, found {_shown(value)}"
            raise self._error("picture is damaged", where, detail)
        if value.startswith(("http://", "https://")):
            raise self._error("picture is an address", where, _shown(value))
        return [value.removeprefix("file://")]


def _first(record: Mapping[str, Any], names: Sequence[str]) -> tuple[str | None, Any]:
    """The first of some fields that has a value, else the first that is there, else (None, None)."""
    there = [name for name in names if name in record]
    filled = [name for name in there if not _is_empty(record[name])]
    name = next(iter(filled or there), None)
    return name, record.get(name)


def _is_picture(value: Any) -> bool:
    """Whether a value of an unknown field is a picture, or looks like the path of one."""
    if isinstance(value, str):
        return value.lower().endswith(_SUFFIXES)
    return embedded.reference_of(value) is not None


def _as_text(value: Any) -> Any:
    """A number as text: a table of answers may hold them. Anything else does not change."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and math.isfinite(value) else value


def _is_blank(value: Any) -> bool:
    return _is_empty(value) or (isinstance(value, str) and not value.strip())


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _parsed_list(value: Any) -> Any:
    """A list: also one that a table holds as JSON, or as `datasets` holds a sequence of objects."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value, object_hook=embedded.without_reference)
        except (ValueError, RecursionError):
            return value
        if not json_records.is_shallow(parsed):
            return value
        value = parsed
    if isinstance(value, Mapping) and all(isinstance(part, list) for part in value.values()):
        lengths = {len(part) for part in value.values()}
        if len(lengths) == 1:
            return [
                dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)
            ]
    return value


def _names(raw: Mapping[str, Any]) -> str:
    names = ", ".join(map(_readable, list(raw)[:12]))
    return f"the fields {names}" if names else "no fields"


def _is_fault(value: Any) -> bool:
    """Whether a value is what a reader writes under `FAULT`; a record may have the key, too."""
    is_list = isinstance(value, list) and len(value) == 3
    return is_list and all(isinstance(part, str) for part in value)


def _readable(name: Any) -> str:
    """The name of a field, cut, as text that can be written."""
    return str(name)[:60].encode("utf-8", "backslashreplace").decode()


def _shown(value: Any) -> str:
    """A value, cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
