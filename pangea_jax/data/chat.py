"""ChatML: a conversation to tokens, loss mask and picture places. Training, evaluation and chat all come here.

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    <image>
    {question}<|im_end|>
    <|im_start|>assistant
    {answer}<|im_end|>

The template is `qwen_1_5` of LLaVA-NeXT's conversation.py; every message is tokenised on its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from pangea_jax.data.record import IMAGE_MARKER, Turn
from pangea_jax.data.tokenizer import Tokenizer

SYSTEM_PROMPT = "You are a helpful assistant."
LOSS_MASKS = ("answer", "pangea")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    Attributes:
      tokens: ids; places of picture features hold the `<image>` id.
      trained: true where predicting this token is what the model is trained for.
      image_index: -1 for words, else the feature to put here (see `pangea_jax.model.Pangea`),
        counted over all tiles of this conversation.
    """

    tokens: Int[np.ndarray, "T"]
    trained: Bool[np.ndarray, "T"]
    image_index: Int[np.ndarray, "T"]


def render(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    layouts: Sequence[Int[np.ndarray, "_"]] = (),
    *,
    tiles_per_image: Sequence[int] = (),
    patches: int = 0,
    loss_mask: str = "answer",
    system: str = SYSTEM_PROMPT,
    answer_next: bool = False,
    move_marker_first: bool = False,
) -> Rendered:
    """Renders turns, each `<image>` marker replaced by the picture's layout.

    Args:
      turns: user and assistant in alternation; `<image>` markers in the order of `layouts`.
      layouts: per picture, `image_index` counted from its own first tile.
      tiles_per_image, patches: how many tiles each picture has, and patches a tile; what shifts a
        later picture's index past those before it.
      loss_mask: "answer": the assistant's words and the end token. "pangea": what LLaVA-NeXT's
        `preprocess_qwen` leaves: the whole assistant message with its header, and every newline,
        <|im_start|> and <|im_end|> anywhere.
      answer_next: end with the header of an assistant message to be generated.
      move_marker_first: put a message's only marker before its words, see `marker_first`.

    Raises:
      ValueError: markers and layouts differ in number, or the mask is unknown.
    """
    if loss_mask not in LOSS_MASKS:
        raise ValueError(f"loss_mask {loss_mask!r} is not one of {LOSS_MASKS}")
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(layouts):
        raise ValueError(
            f"{markers} {IMAGE_MARKER} markers in the turns, but {len(layouts)} pictures"
        )
    if move_marker_first:
        turns = [Turn(turn.role, marker_first(turn.text)) for turn in turns]
    layouts = iter(_shifted(layouts, tiles_per_image, patches))
    messages = [_message("system", system, tokenizer, layouts, loss_mask)] if system else []
    messages += [_message(turn.role, turn.text, tokenizer, layouts, loss_mask) for turn in turns]
    if answer_next:
        header = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        messages.append((header, [False] * len(header), [-1] * len(header)))
    tokens, trained, image_index = (
        np.concatenate([np.asarray(message[part]) for message in messages]) for part in range(3)
    )
    trained = trained.astype(bool)
    if loss_mask == "pangea":
        marks = [tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.newline_ids]
        trained |= np.isin(tokens, marks) & (image_index < 0)
    return Rendered(tokens.astype(np.int32), trained, image_index.astype(np.int32))


def from_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Turn], list[Any]]:
    """Messages in the form of transformers and OpenAI, as (system prompt, turns, pictures).

    >>> from_messages([{"role": "user", "content": [{"type": "image", "image": "cat.png"},
    ...                                             {"type": "text", "text": "What is this?"}]}])
    ('You are a helpful assistant.', [Turn(role='user', text='<image>\\nWhat is this?')], ['cat.png'])

    Pictures keep their place among the text; each stands on a line of its own, as in training.

    Raises:
      ValueError: a role or a content type that is not known, naming the message.
    """
    system, turns, pictures = SYSTEM_PROMPT, [], []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"messages[{i}].role is {role!r}, not system, user or assistant")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        lines = []
        for j, part in enumerate(parts or ()):
            if part.get("type") == "text":
                # Spelled out in somebody's words the marker is no picture.
                lines.append(part["text"].replace(IMAGE_MARKER, "<image\u200b>"))
            elif part.get("type") == "image" and part.get("image") is not None:
                lines.append(IMAGE_MARKER)
                pictures.append(part["image"])
            else:
                raise ValueError(
                    f"messages[{i}].content[{j}] is neither a text nor an image: {sorted(part)}; expected "
                    '{"type": "text", "text": ...} or {"type": "image", "image": PIL image, path or bytes}'
                )
        if not lines:
            raise ValueError(f"messages[{i}].content is empty")
        text = "\n".join(lines)
        if role == "system" and i == 0:
            system = text
        elif role == "system":
            raise ValueError(f"messages[{i}]: only the first message may be the system's")
        else:
            turns.append(Turn(role, text))
    if not turns:
        raise ValueError("there is no message of a user")
    return system, turns, pictures


def marker_first(text: str) -> str:
    """The text with its only `<image>` in front, as LLaVA-NeXT's `preprocess_multimodal` moves it.

    Texts with no marker, with several, or that begin with one stay as they are.

    >>> marker_first("What is this?\\n<image>")
    '<image>\\nWhat is this?'
    """
    if text.count(IMAGE_MARKER) != 1 or text.startswith(IMAGE_MARKER):
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


def _shifted(layouts, tiles_per_image, patches):
    """Each picture's index moved behind the tiles of the pictures before it; newlines (0) stay."""
    first_tile = 0
    for i, layout in enumerate(layouts):
        yield np.where(layout > 0, layout + first_tile * patches, layout)
        first_tile += tiles_per_image[i] if len(layouts) > 1 else 0


def _message(role, text, tokenizer, layouts, loss_mask):
    """Tokens, trained flags and image_index of one message, as lists."""
    header = [tokenizer.im_start_id, *tokenizer.encode(f"{role}\n")]
    tokens, image_index = [tokenizer.im_start_id], [-1]
    # Header and text go through the tokenizer as one string, as in the reference: a text that
    # starts with a newline shares a token with the header's.
    for i, piece in enumerate(f"{role}\n{text}".split(IMAGE_MARKER)):
        if i:
            layout = next(layouts)
            tokens += [tokenizer.image_id] * len(layout)
            image_index += layout.tolist()
        words = tokenizer.encode(piece) if piece else []
        tokens += words
        image_index += [-1] * len(words)
    end = len(tokens) + 1
    tail = [tokenizer.im_end_id, *tokenizer.newline_ids]
    tokens += tail
    image_index += [-1] * len(tail)
    trained = [role == "assistant"] * len(tokens)
    if loss_mask == "answer" and role == "assistant":
        start = next(
            (i for i, pair in enumerate(zip(header, tokens)) if pair[0] != pair[1]), len(header)
        )
        trained = [start <= i < end for i in range(len(tokens))]
    return tokens, trained, image_index
