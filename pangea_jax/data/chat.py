"""ChatML: turns a conversation into tokens, loss mask and image positions.

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    <image>
    {question}<|im_end|>
    <|im_start|>assistant
    {answer}<|im_end|>

Training, evaluation and chat all use this module. The template is `qwen_1_5` of LLaVA-NeXT's
conversation.py; every message is tokenised separately.
"""

import base64
import dataclasses
import functools
import itertools
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from pangea_jax.data.record import IMAGE_MARKER, LITERAL_MARK, Turn
from pangea_jax.data.tokenizer import Tokenizer

SYSTEM_PROMPT = "You are a helpful assistant."
LOSS_MASKS = ("answer", "pangea")

# Short messages often repeat, such as questions and names; long messages do not.
_CACHED_CHARACTERS, _CACHED_MESSAGES = 256, 16_384


class _Short(reprlib.Repr):
    def repr_int(self, value, level):
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python writes no number of thousands of digits
            return f"<a number of {value.bit_length():,} bits>"


shown = _Short().repr
"""Any value in an error message: short, and without raising an error itself."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    Attributes:
      tokens: ids; positions of image features hold the `<image>` id.
      trained: true for each token that the model is trained to predict.
      image_index: -1 for words, else the index of the feature at this position among the features
        of all tiles of this conversation (see `pangea_jax.model.Pangea`).
    """

    tokens: Int[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]
    image_index: Int[np.ndarray, " T"]


def render(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    layouts: Sequence[Int[np.ndarray, " _"]] = (),
    *,
    tiles_per_image: Sequence[int] = (),
    patches: int = 0,
    loss_mask: str = "answer",
    system: str = SYSTEM_PROMPT,
    answer_next: bool = False,
    move_marker_first: bool = False,
) -> Rendered:
    """Renders turns and replaces each `<image>` marker by the layout of its image.

    The parameters are many because images, loss mask and template vary independently.

    Args:
      turns: user and assistant in alternation; `<image>` markers in the order of `layouts`.
      layouts: for each image, `image_index` counted from its own first tile.
      tiles_per_image, patches: number of tiles of each image, and of patches per tile. Only needed
        for several images, because the index of each image starts after the images before it.
      loss_mask: "answer" trains the assistant's words and the end token. "pangea" trains what
        LLaVA-NeXT's `preprocess_qwen` trains: the whole assistant message with its header, and
        every newline, <|im_start|> and <|im_end|> anywhere.
      answer_next: end with the header of the assistant message that is generated next.
      move_marker_first: put the only marker of a message before its words, see `marker_first`.

    Raises:
      ValueError: the numbers of markers and layouts differ, a marker is within another one, or the
        loss mask is unknown.
    """
    if loss_mask not in LOSS_MASKS:
        raise ValueError(f"loss_mask {loss_mask!r} is not one of {LOSS_MASKS}")
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(layouts):
        raise ValueError(
            f"{markers} {IMAGE_MARKER} markers in the turns, but {len(layouts)} images"
        )
    if move_marker_first:
        turns = [Turn(turn.role, marker_first(turn.text)) for turn in turns]
    # A marker in the system prompt is a text: no image belongs to it.
    messages = [("system", system.replace(IMAGE_MARKER, LITERAL_MARK))] if system else []
    messages += [(turn.role, turn.text) for turn in turns]
    spans = []
    for role, text in messages:
        message = _cached_message if len(text) <= _CACHED_CHARACTERS else _message
        spans.append(message(tokenizer, role, text, loss_mask))
    if answer_next:
        spans.append(_answer_header(tokenizer, loss_mask))
    return _assemble(spans, _shifted(layouts, tiles_per_image, patches), tokenizer.image_id)


def from_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Turn], list[Any]]:
    """Converts messages in the format of transformers and OpenAI to (system prompt, turns, images).

    >>> from_messages([{"role": "user", "content": [{"type": "image", "image": "cat.png"},
    ...                                             {"type": "text", "text": "What is this?"}]}])
    ('You are a helpful assistant.', [Turn(role='user', text='<image>\\nWhat is this?')], ['cat.png'])

    An image part of a message is one of
      `{"type": "image", "image": PIL image, path or bytes}` (or "path", or "base64": text),
      `{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`.
    It keeps its place in the text, on a line of its own, as in training.

    In `{"role": "user", "content": text, "images": [...]}` the text has an `<image>` marker at the
    place of each image. Without markers, the images come first, in one line, as in Pangea's
    evaluation (`lmms_eval/models/pangea.py`). One image then gives the same prompt as the image
    part above.

    Raises:
      ValueError: a role or a content type is unknown; the message names its place.
    """
    system, turns, pictures = SYSTEM_PROMPT, [], []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"messages[{i}].role is {shown(role)}, not system, user or assistant")
        read = _parts if _is_empty(message.get("images")) else _marked
        text, found = read(message, f"messages[{i}]")
        if not text:
            raise ValueError(f"messages[{i}].content is empty")
        pictures += found
        if role == "system" and i == 0:
            system = text
        elif role == "system":
            raise ValueError(f"messages[{i}].role is system; only messages[0] may be")
        else:
            turns.append(Turn(role, text))
    if not turns:
        raise ValueError("messages has no user message; add one")
    return system, turns, pictures


def _is_empty(images: Any) -> bool:
    return images is None or (isinstance(images, Sequence) and len(images) == 0)


def _parts(message: Mapping[str, Any], name: str) -> tuple[str, list[Any]]:
    """The text with markers, and the images, of a message that consists of parts."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    if not (isinstance(parts, Sequence) and all(isinstance(part, Mapping) for part in parts)):
        raise ValueError(f"{name}.content must be a text or a list of parts, not {shown(content)}")
    lines, pictures = [], []
    for j, part in enumerate(parts):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            # The user wrote this marker as text. It is not an image.
            lines.append(part["text"].replace(IMAGE_MARKER, LITERAL_MARK))
        else:
            pictures.append(_picture(part, f"{name}.content[{j}]"))
            lines.append(IMAGE_MARKER)
    return "\n".join(lines), pictures


def _marked(message: Mapping[str, Any], name: str) -> tuple[str, list[Any]]:
    """The text with markers, and the images, of a message with `images`."""
    text, pictures = message.get("content"), message["images"]
    if not isinstance(text, str):
        raise ValueError(f"{name} has images, so its content must be a text")
    if isinstance(pictures, str | bytes | bytearray) or not isinstance(pictures, Sequence):
        raise ValueError(f"{name}.images must be a list of images, not {shown(pictures)}")
    pictures = list(pictures)
    marks = text.count(IMAGE_MARKER)
    if not marks:
        text = " ".join([IMAGE_MARKER] * len(pictures)) + "\n" + text
    elif marks != len(pictures):
        raise ValueError(f"{name} has {marks} {IMAGE_MARKER} markers, but {len(pictures)} images")
    return text, pictures


def _picture(part: Mapping[str, Any], name: str) -> Any:
    """The image of a message part, in a form that `pangea_jax.data.image.decode` takes."""
    kind = part.get("type")
    if kind == "image_url" and part.get("image_url"):
        url = part["image_url"]
        return _from_data_url(url.get("url") if isinstance(url, Mapping) else url, name)
    if kind == "image":
        if part.get("base64") is not None:
            return _from_base64(part["base64"], name)
        found = next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)
        if isinstance(found, str) and re.match(r"(data|https?):", found):
            return _from_data_url(found, name)
        if found is not None:
            return found
    raise ValueError(
        f"{name} is neither a text nor an image: {shown(sorted(map(str, part)))}; expected "
        '{"type": "text", "text": ...}, {"type": "image", "image": PIL image, path or bytes} or '
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
    )


def _from_data_url(url: str, name: str) -> bytes:
    header, comma, data = str(url).partition(",")
    if not (comma and header.startswith("data:") and header.endswith(";base64")):
        raise ValueError(
            f"{name}: expected an image as data:image/...;base64,..., got {header[:60]!r}; "
            "download it first"
        )
    return _from_base64(data, name)


def _from_base64(data: str, name: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError) as error:  # binascii.Error is a ValueError
        raise ValueError(f"{name}: the image is not valid base64 ({error})") from None


def marker_first(text: str) -> str:
    """Moves the only `<image>` of a text to its start, as LLaVA-NeXT's `preprocess_multimodal`.

    A text with no marker, with several, or with one at its start does not change.

    Raises:
      ValueError: what is left without the marker makes another one, as `<ima<image>ge>` does.

    >>> marker_first("What is this?\\n<image>")
    '<image>\\nWhat is this?'
    """
    if text.count(IMAGE_MARKER) != 1 or text.startswith(IMAGE_MARKER):
        return text
    rest = text.replace(IMAGE_MARKER, "").strip()
    if IMAGE_MARKER in rest:
        raise ValueError(f"an {IMAGE_MARKER} marker within another one")
    return f"{IMAGE_MARKER}\n{rest}".strip()


class _Span(NamedTuple):
    """Words between images: their ids, and which are trained. Read-only, because it is shared."""

    tokens: Int[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]


def _message(tokenizer, role, text, loss_mask) -> tuple[_Span, ...]:
    """One message as spans. Between two neighbouring spans there is one image."""
    # Header and text are tokenised as one string, as in the reference: if the text starts with a
    # newline, it shares a token with the newline of the header.
    texts = f"{role}\n{text}".split(IMAGE_MARKER)
    pieces = [tokenizer.encode(piece) if piece else [] for piece in texts]
    pieces[0] = [tokenizer.im_start_id, *pieces[0]]
    newline = list(tokenizer.newline_ids)
    pieces[-1] = [*pieces[-1], tokenizer.im_end_id, *newline]
    trained = [np.full(len(piece), role == "assistant") for piece in pieces]
    if loss_mask == "answer" and role == "assistant":
        header = [tokenizer.im_start_id, *tokenizer.encode(f"{role}\n")]
        start = sum(1 for _ in itertools.takewhile(bool, map(int.__eq__, header, pieces[0])))
        trained[0][:start] = False
        trained[-1][len(pieces[-1]) - len(newline) :] = False
    return tuple(_span(tokenizer, loss_mask, *piece) for piece in zip(pieces, trained, strict=True))


_cached_message = functools.lru_cache(maxsize=_CACHED_MESSAGES)(_message)


@functools.lru_cache(maxsize=64)
def _answer_header(tokenizer, loss_mask) -> tuple[_Span, ...]:
    tokens = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
    return (_span(tokenizer, loss_mask, tokens, np.zeros(len(tokens), bool)),)


def _span(tokenizer, loss_mask, tokens, trained) -> _Span:
    tokens = np.asarray(tokens, np.int32)
    if loss_mask == "pangea":
        marks = [tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.newline_ids]
        trained = trained | np.isin(tokens, marks)
    for array in (tokens, trained):
        array.setflags(write=False)
    return _Span(tokens, trained)


def _assemble(messages, layouts, image_id) -> Rendered:
    """Joins the spans of all messages, with the images between them, into new arrays."""
    places = sum(len(spans) - 1 for spans in messages)
    if places != len(layouts):
        raise ValueError(f"{places} {IMAGE_MARKER} markers in all messages, {len(layouts)} images")
    layouts = iter(layouts)
    tokens, trained, image_index = [], [], []
    for spans in messages:
        for i, span in enumerate(spans):
            if i:
                layout = next(layouts)
                tokens.append(np.full(len(layout), image_id, np.int32))
                trained.append(np.zeros(len(layout), bool))
                image_index.append(layout)
            tokens.append(span.tokens)
            trained.append(span.trained)
            image_index.append(np.full(len(span.tokens), -1, np.int32))
    return Rendered(
        np.concatenate(tokens),
        np.concatenate(trained),
        np.concatenate(image_index, dtype=np.int32, casting="same_kind"),
    )


def _shifted(layouts, tiles_per_image, patches):
    """Adds the patches of earlier images to each image's index; newlines (0) stay 0."""
    if len(layouts) < 2:
        return layouts
    first_tiles = np.cumsum([0, *tiles_per_image[:-1]])
    return [
        np.where(layout > 0, layout + first_tile * patches, layout)
        for layout, first_tile in zip(layouts, first_tiles, strict=True)
    ]
