"""Generated conversations and pictures for the tests of the pipeline, and functions to find them in a batch."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from pangea_jax.data.build.write_store import Picture
from pangea_jax.data.pipeline import PipelineConfig, train_dataset
from pangea_jax.data.reader import Geometry, Reader, ReadingPolicy, Tiles
from pangea_jax.data.record import Conversation, Turn

SIZES = [(16, 16), (40, 20), (12, 50), (30, 31), (9, 16)]
CONFIG = PipelineConfig(rows=2, row_tokens=256, row_tiles=10)
PACKED = PipelineConfig(rows=2, row_tokens=512, row_tiles=20, packing="best_fit", packing_bins=4)
BALANCED = dataclasses.replace(
    PACKED, row_tokens=640, row_tiles=30, packing="balanced", examples_per_row=3
)
PLANNED = dataclasses.replace(PACKED, packing="planned", packing_window=16)
ALL = [CONFIG, PACKED, BALANCED, PLANNED]
CONFIGS = pytest.mark.parametrize("config", ALL, ids=lambda c: c.packing)


def picture(number, size):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return Picture(f"made/{number}", file.getvalue(), *size)


def conversation(number):
    """A conversation with no, one or two pictures. Its text is unique, so that tests can find it in a row."""
    keys = tuple(f"made/{(number + i) % len(SIZES)}" for i in range(number % 3))
    return Conversation(
        id=f"c{number}",
        source="made",
        language="en",
        category="",
        images=keys,
        turns=(
            Turn("user", "<image> " * len(keys) + f"q{number}?"),
            Turn("assistant", f"a{number}" + "b" * (number % 5)),
        ),
    )


CONVERSATIONS = [conversation(number) for number in range(24)]


def text_of(letters, tokens):
    """The text of some tokens."""
    return letters.decode(tokens.tolist())


def dataset(source, reader, config=CONFIG, **changes):
    return train_dataset(source, reader, config, **({"seed": 5} | changes))


def reader_of(model, tokenizer, store, **policy):
    """A reader with the geometry of a model; `policy` are fields of `ReadingPolicy`."""
    return Reader(tokenizer, Tiles(Geometry.of(model), ReadingPolicy(**policy), store))


def conversations(batches, letters):
    """The text of every segment of every row."""
    return [
        text_of(letters, tokens[segments == segment])
        for batch in batches
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True)
        for segment in range(1, segments.max() + 1)
    ]


def rows(batch):
    return [batch[i] for i in range(len(batch))]


def same(batch, other):
    return jax.tree.structure(batch) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True)
    )
