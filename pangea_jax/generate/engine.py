"""A model, its tokenizer and its picture geometry behind two calls: `generate` and `logits`."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pangea_jax import anyres
from pangea_jax.checkpoints import config_from_folder, load, load_model
from pangea_jax.data import chat, emoji, image
from pangea_jax.data.pipeline import pad_row
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer
from pangea_jax.generate.decode import greedy, last_hidden
from pangea_jax.model import Pangea
from pangea_jax.model import params as model_params

PROMPT_BUCKET = 64
SAMPLE_MODEL = Path(__file__).parents[1] / "assets" / "sample_model"


class Engine:
    """Answers conversations.

    Args:
      background: what shows through transparent pictures; None as the reference does (the colour
        hidden under the transparency).
      rounding: how the picture geometry rounds, see `pangea_jax.anyres.layout`.
    """

    def __init__(
        self,
        model: Pangea,
        tokenizer: Tokenizer,
        *,
        background: tuple[int, int, int] | None = None,
        rounding: str = "llava",
    ):
        self.config, self.tokenizer = model.config, tokenizer
        self._background, self._rounding = background, rounding
        graphdef, self.params = model_params.split(model)
        merge = functools.partial(model_params.merge, graphdef)
        self._forward = jax.jit(lambda params, batch: merge(params)(batch))
        self._generate = jax.jit(
            functools.partial(_generate, merge, stop_id=tokenizer.im_end_id),
            static_argnames="max_new_tokens",
        )

    def generate(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, max_new_tokens: int = 64
    ) -> list[str]:
        """The model's next message in each conversation, decoded greedily.

        Args:
          conversations: lists of messages in the form of transformers and OpenAI:
            `{"role": "user", "content": text or [{"type": "image", "image": picture}, {"type":
            "text", "text": ...}]}`; a picture is a PIL image, a path or encoded bytes.

        Raises:
          ValueError: a message that cannot be read, or a prompt longer than the model's context.
        """
        if not conversations:
            return []
        batch = self._batch([self._render(messages, True) for messages in conversations])
        width = batch["tokens"].shape[1] + max_new_tokens
        if width > self.config.language.max_positions:
            raise ValueError(
                f"{width - max_new_tokens} prompt tokens and {max_new_tokens} new ones exceed the model's "
                f"context of {self.config.language.max_positions}"
            )
        tokens = np.asarray(self._generate(self.params, batch, max_new_tokens=max_new_tokens))
        return [
            self.tokenizer.decode(_until(row, self.tokenizer.im_end_id)) for row in tokens.tolist()
        ]

    def logits(self, messages: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "T V"]:
        """float32 logits at every token of one conversation; the header of the next answer is
        added if the last message is the user's."""
        rendered = self._render(messages, messages[-1]["role"] == "user")
        length = len(rendered[0].tokens)
        return np.asarray(self._forward(self.params, self._batch([rendered]))[0, :length])

    def _render(self, messages, answer_next):
        """(rendered tokens, tiles) of a conversation."""
        vision = self.config.vision
        system, turns, pictures = chat.from_messages(messages)
        decoded = [image.decode(picture, background=self._background) for picture in pictures]
        layouts = [
            anyres.layout(
                picture.size,
                self.config.pinpoints,
                vision.image_size,
                vision.grid,
                self._rounding,
                newline=self.config.newline,
            )
            for picture in decoded
        ]
        rendered = chat.render(
            turns,
            self.tokenizer,
            [layout.image_index for layout in layouts],
            tiles_per_image=[layout.num_tiles for layout in layouts],
            patches=vision.patches,
            system=system,
            answer_next=answer_next,
        )
        tiles = [image.views(p, self.config.pinpoints, vision.image_size) for p in decoded]
        empty = np.zeros((0, vision.image_size, vision.image_size, 3), np.uint8)
        return rendered, np.concatenate([*tiles, empty])

    def _batch(self, rows) -> dict[str, np.ndarray]:
        """Right-padded rows; the width in steps of 64, so that few shapes are compiled."""
        width = max(len(rendered.tokens) for rendered, _ in rows)
        width += -width % PROMPT_BUCKET
        most_tiles = max([1, *(len(tiles) for _, tiles in rows)])
        padded = []
        for rendered, tiles in rows:
            unused = np.zeros_like(rendered.tokens)
            row = {"tokens": rendered.tokens, "image_index": rendered.image_index, "tiles": tiles}
            padded.append(pad_row(row | {"targets": unused, "weights": unused}, width, most_tiles))
        wanted = ("tokens", "image_index", "positions", "segment_ids", "tiles")
        return {name: np.stack([row[name] for row in padded]) for name in wanted}


def _generate(merge, params, batch, *, max_new_tokens: int, stop_id: int) -> Int[Array, "B M"]:
    model = merge(params)
    hidden, cache = model.prefill(batch, batch["tokens"].shape[1] + max_new_tokens)
    last, lengths = last_hidden(hidden, jnp.asarray(batch["segment_ids"]))
    return greedy(model, last, lengths, cache, max_new_tokens=max_new_tokens, stop_id=stop_id)


def _until(tokens: list[int], stop_id: int) -> list[int]:
    return tokens[: tokens.index(stop_id)] if stop_id in tokens else tokens


def load_folder(path: str | os.PathLike) -> Engine:
    """A checkpoint in a public layout, with the tokenizer beside it."""
    config = config_from_folder(path)
    tokenizer = load_tokenizer(Path(path))
    return Engine(load_model(path, config, dtype=jnp.dtype(config.dtype)), tokenizer)


def load_sample() -> Engine:
    """The sample model: the shipped tower and the default point of the English-share ablation."""
    config = config_from_folder(SAMPLE_MODEL)
    parts = {"tower": ("vision",), "model": ("projector", "newline", "language")}
    params = {}
    for file, only in parts.items():
        state = load(SAMPLE_MODEL / f"{file}.safetensors", config, only=only, dtype=jnp.float32)
        params |= model_params.flatten(state)
    graphdef, _ = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))
    tokenizer = load_tokenizer(emoji.DIRECTORY)
    return Engine(model_params.merge(graphdef, params), tokenizer, background=(255, 255, 255))
