"""Batches for the model tests. They are made here, independently of the data pipeline."""

import numpy as np
import pytest

from pangea_jax.anyres import layout
from pangea_jax.batch import Batch
from pangea_jax.data.image import views
from pangea_jax.model.attention import AttentionImpl

# The kernels run on every machine. Their blocks are so small that a short row has several.
IMPLS = (
    AttentionImpl("xla"),
    AttentionImpl("splash", 128, 128, interpret=True),
    AttentionImpl("triton", 64, 64, interpret=True),
    AttentionImpl("blockwise", 48, 64, interpret=True),
)


class Examples:
    """Rows of word ids and pictures for a config, in our form."""

    def __init__(self, config, image_id: int, rounding: str = "transformers"):
        self.config, self.image_id, self.rounding = config, image_id, rounding

    def row(self, *pieces):
        """tokens, image_index and tiles of one row; pieces are lists of ids and pictures."""
        vision, pinpoints = self.config.vision, self.config.pinpoints
        tokens, index, tiles = [], [], []
        for piece in pieces:
            if isinstance(piece, list):
                tokens += piece
                index += [-1] * len(piece)
                continue
            found = layout(
                piece.size,
                pinpoints,
                vision.image_size,
                vision.grid,
                self.rounding,
                newline=self.config.newline,
            )
            shift = vision.patches * len(tiles)
            tokens += [self.image_id] * len(found.image_index)
            index += [place + shift if place else 0 for place in found.image_index.tolist()]
            tiles += list(views(piece, pinpoints, vision.image_size))
        return tokens, index, tiles

    def batch(self, rows, length: int, num_tiles: int):
        """Right-padded batch of `row`s with fixed shapes."""
        side = self.config.vision.image_size
        B = len(rows)
        batch = Batch(
            tokens=np.zeros((B, length), np.int32),
            image_index=np.full((B, length), -1, np.int32),
            segment_ids=np.zeros((B, length), np.int32),
            positions=np.tile(np.arange(length, dtype=np.int32), (B, 1)),
            tiles=np.zeros((B, num_tiles, side, side, 3), np.uint8),
        )
        for b, (tokens, index, tiles) in enumerate(rows):
            batch.tokens[b, : len(tokens)] = tokens
            batch.image_index[b, : len(tokens)] = index
            batch.segment_ids[b, : len(tokens)] = 1
            if tiles:
                batch.tiles[b, : len(tiles)] = tiles
        return batch


@pytest.fixture(scope="session")
def make_examples():
    return Examples


@pytest.fixture(scope="session")
def impls():
    return IMPLS


@pytest.fixture(scope="session", params=IMPLS, ids=lambda impl: impl.name)
def impl(request):
    """Every attention backend, in a form that runs on this machine."""
    return request.param
