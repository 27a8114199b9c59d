"""Captions pictures in the language of their alt text, and makes instructions of the captions (section 2.2).

The model's answers are data: they are checked and put into prompts and records, but never followed or run.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from pangea_jax import languages
from pangea_jax.curation import image_text, language_check, llm, markup
from pangea_jax.curation.accounting import Added, Kept, Outcome, Unfit
from pangea_jax.curation.asking import Unusable, ask, choice
from pangea_jax.curation.balance import share
from pangea_jax.curation.filters import words
from pangea_jax.curation.image_text import Place
from pangea_jax.curation.prompts import INSTRUCTIONS, PROMPTS, RECAPTION, TASK_TYPES
from pangea_jax.curation.workflow import Job
from pangea_jax.data import image
from pangea_jax.data.record import IMAGE_MARKER, Conversation, Turn

CATEGORY = "cultural"

_CAPTION_CHARS, _INSTRUCTION_CHARS, _RESPONSE_CHARS = (20, 10_000), (5, 2_000), (20, 12_000)
_MAX_REPETITION = 0.5
_OPENING = re.compile(r"[\[{]")
_OF_CAPTION = re.compile(r"\b(?:caption|alt[- ]text)s?\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class _Captioned:
    """A picture with its new caption; `variant` is the prompt's number."""

    row: Mapping[str, Any]
    encoded: bytes
    caption: str
    variant: int


@dataclasses.dataclass(frozen=True)
class MakeInstructions:
    """Captions pictures and makes instructions of the captions.

    Attributes:
      job: the run, in whose folder pictures are read and replies are stored.
      source: source of the records.
      scoring_model: name of the scoring model, for the provenance.
      caption_share: share of the pictures whose caption also becomes a record.
      side: maximum side in pixels of the pictures that the model sees.
      seed: decides the variants of prompts and the places of markers.
    """

    llm: llm.ClientConfig
    job: Job
    source: str
    scoring_model: str
    caption_share: float
    side: int
    seed: int

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        client = llm.client(self.llm, self.job.replies)
        for _, outcomes in client.map(functools.partial(self._make, client), rows):
            yield from outcomes

    def _make(self, client: llm.Client, row: Mapping[str, Any]) -> list[Outcome]:
        id, code, stage = row["id"], row["language"], "recaption"
        language = languages.get(code).english_name
        outcomes: list[Outcome] = []
        try:
            captioned = self._captioned(client, row, language)
            if share(id, self.seed, "caption") < self.caption_share:
                question = f"What are the main elements of the image? Describe them in {language}."
                pairs, more = [(question, captioned.caption)], {"task_types": ["Captioning"]}
                outcomes.append(Added("captions kept", 1))
                outcomes.append(self._kept(captioned, f"{id}-caption", pairs, more))
            stage = "instructions"
            prompt = INSTRUCTIONS.format(
                task_types="; ".join(TASK_TYPES), language=language, caption=captioned.caption
            )
            read = functools.partial(read_pairs, code=code)
            found, faults = ask(client, prompt, "instructions", read)
        except Unfit as error:
            return [*outcomes, error.dropped(id, stage)]
        pairs = [(pair["instruction"], pair["response"]) for pair in found]
        more = {"task_types": [pair["task type"] for pair in found], "dropped_pairs": faults}
        return [*outcomes, self._kept(captioned, id, pairs, more)]

    def _captioned(self, client: llm.Client, row: Mapping[str, Any], language: str) -> _Captioned:
        encoded = Place(*row["place"]).read(self.job.out)
        variant = int(share(row["id"], self.seed, "recaption") * len(RECAPTION))
        values = {name: row[name] for name in ("text", "country", "subject")}
        prompt = RECAPTION[variant].format(language=language, **values)
        shown = {"type": "image_url", "image_url": {"url": data_url(encoded, self.side)}}
        content = [shown, {"type": "text", "text": prompt}]
        read = functools.partial(read_caption, code=row["language"])
        return _Captioned(row, encoded, ask(client, content, "recaption", read), variant)

    def _kept(
        self,
        captioned: _Captioned,
        id: str,
        pairs: Sequence[tuple[str, str]],
        more: Mapping[str, Any],
    ) -> Kept:
        """The record `id` with pairs of question and answer; `more` is added to its provenance."""
        row, source_id = captioned.row, captioned.row["id"]
        folder = hashlib.blake2b(source_id.encode(), digest_size=1).hexdigest()
        name = f"images/{folder}/{image_text.file_name(source_id, captioned.encoded)}"
        (question, answer), *rest = pairs
        # In the release the marker stands before or after the first question.
        is_first = share(source_id, self.seed, "marker") < 0.5
        marked = f"{IMAGE_MARKER}\n{question}" if is_first else f"{question}\n{IMAGE_MARKER}"
        turns = []
        for asked, answered in [(marked, answer), *rest]:
            turns += [Turn("user", asked), Turn("assistant", answered)]
        record = Conversation(id, self.source, row["language"], CATEGORY, (name,), tuple(turns))
        provenance = {
            "id": id,
            "source_id": source_id,
            "url": row["url"],
            "alt_text": row["text"],
            "language": row["language"],
            "filters": {key: row[key] for key in ("size", "nsfw", "similarity", "hash")},
            **{key: row[key] for key in ("quality", "subject", "country")},
            "models": {"scoring": self.scoring_model, "captions": self.llm.model},
            "prompts": {"version": PROMPTS, "recaption": f"P{captioned.variant + 1}"},
            "caption": captioned.caption,
        }
        return Kept(record, provenance | more, {name: captioned.encoded})


def data_url(encoded: bytes, side: int) -> str:
    """A picture as a data URL. Large pictures, and other formats than JPEG, PNG and WebP, become JPEG."""
    with Image.open(io.BytesIO(encoded), formats=image.FORMATS) as opened:
        kind, size = opened.format.lower(), opened.size
    if kind not in ("jpeg", "png", "webp") or max(size) > side:
        picture = image.decode(encoded)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        encoded, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def read_caption(answer: str, code: str) -> str:
    """The caption.

    Raises:
      Unusable: see `text_fault`.
    """
    text = answer.strip()
    fault = text_fault(text, code, *_CAPTION_CHARS)
    if fault:
        raise Unusable(f"caption {fault}", text[:80])
    return text


def read_pairs(answer: str, code: str) -> tuple[list[dict[str, str]], list[str]]:
    """Two usable pairs of instruction and response, and the faults of the other pairs.

    Raises:
      Unusable: there are fewer than two pairs; its `rest` has the usable one.
    """
    faults, pairs = [], []
    for found in _objects(answer):
        try:
            pair = _pair(found, code)
        except Unusable as error:
            faults.append(error.reason)
            continue
        if pair["task type"] in (other["task type"] for other in pairs):
            faults.append("both pairs are of one task type")
        elif len(pairs) < 2:
            pairs.append(pair)
    if not pairs:
        raise Unusable(faults[0] if faults else "no JSON of pairs", answer[:80])
    if len(pairs) == 1:
        rest = pairs, faults or ["there was only one pair"]
        raise Unusable("only one pair can be used", "; ".join(rest[1]), rest)
    return pairs, faults


def _objects(answer: str) -> list[dict[str, Any]]:
    """The JSON objects with an instruction, also inside other text or lists."""
    decoder, found, place = json.JSONDecoder(), [], 0
    if len(answer) > 2 * sum((_INSTRUCTION_CHARS[1], _RESPONSE_CHARS[1])):
        raise Unusable("answer is too long", f"{len(answer):,} characters")
    while (start := _OPENING.search(answer, place)) is not None:
        try:
            value, place = decoder.raw_decode(answer, start.start())
        except ValueError:
            place = start.end()
            continue
        except RecursionError:
            raise Unusable("no JSON of pairs", "nested too deeply") from None
        stack = [value]
        while stack:
            value = stack.pop(0)
            if isinstance(value, dict) and "instruction" in map(str.lower, value):
                found.append({key.lower().replace("_", " "): v for key, v in value.items()})
            elif isinstance(value, dict | list):
                stack += value.values() if isinstance(value, dict) else value
    return found


def _pair(found: Mapping[str, Any], code: str) -> dict[str, str]:
    pair = {key: found.get(key) for key in ("task type", "instruction", "response")}
    if not all(isinstance(value, str) for value in pair.values()):
        raise Unusable("a key is missing or not a text")
    pair = {key: value.strip() for key, value in pair.items()}
    pair["task type"] = choice(pair["task type"], TASK_TYPES, "task type is not among the 13")
    limits = {"instruction": _INSTRUCTION_CHARS, "response": _RESPONSE_CHARS}
    for key, (least, most) in limits.items():
        fault = text_fault(pair[key], code, least, most)
        if fault:
            raise Unusable(f"{key} {fault}")
        if _OF_CAPTION.search(pair[key]):
            raise Unusable(f"{key} speaks of a caption")
    if words(pair["instruction"]) == words(pair["response"]):
        raise Unusable("response is the instruction")
    return pair


def text_fault(text: str, code: str, least: int, most: int) -> str | None:
    """The fault of a text that a model wrote for a record; None if it has no fault."""
    if not least <= len(text) <= most:
        return f"is too {'short' if len(text) < least else 'long'}"
    if not image_text.is_unicode(text):
        return "holds half a character"
    if IMAGE_MARKER in text:
        return "holds a marker"
    if markup.repetition(text) > _MAX_REPETITION:
        return "repeats itself"
    try:
        prose = markup.prose(text)
    except ValueError:
        return "holds every kind of bracket"
    faults = language_check.language_faults(prose, code)
    return f"is in {faults[0].reason}" if faults else None
