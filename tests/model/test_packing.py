"""Outputs, loss and gradients of a packed row equal those of its parts, each run alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pangea_jax.model import LanguageConfig, Pangea, PangeaConfig, VisionConfig

IMAGE_ID = 96
CONFIG = PangeaConfig(
    vision=VisionConfig(image_size=28, patch_size=7, width=32, layers=2, heads=2, mlp=48),
    language=LanguageConfig(
        vocab_size=97, width=32, layers=2, heads=4, kv_heads=2, head_width=64, mlp=48
    ),
    pinpoints=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)),
    dtype="float32",
)
LENGTH, TILES = 256, 16


@pytest.fixture(scope="module")
def parts(make_examples, picture):
    examples = make_examples(CONFIG, IMAGE_ID)
    rows = [
        examples.row([1, 2], picture(300, 200), [3, 4, 5]),
        examples.row([6, 7, 8, 9]),
        examples.row([10], picture(30, 90), [11, 12], picture(40, 40), [13]),
    ]
    return examples, rows


def packed_batch(examples, rows):
    """A single row with all rows one after another, then padding."""
    batch = examples.batch([([], [], [])], LENGTH, TILES)
    start = tile = 0
    for segment, (tokens, index, tiles) in enumerate(rows, start=1):
        stop = start + len(tokens)
        index = np.array(index)
        batch.tokens[0, start:stop] = tokens
        shifted = np.where(index > 0, index + tile * CONFIG.vision.patches, index)
        batch.image_index[0, start:stop] = shifted
        batch.segment_ids[0, start:stop] = segment
        batch.positions[0, start:stop] = np.arange(len(tokens))
        if tiles:
            batch.tiles[0, tile : tile + len(tiles)] = tiles
        start, tile = stop, tile + len(tiles)
    return batch


def summed_loss(graph, state, batch, impl):
    """Sum of next-token cross-entropies within segments, and the logits."""
    logits = nnx.merge(graph, state)(batch, impl=impl)
    tokens, segments = batch.tokens, batch.segment_ids
    scores = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    trained = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    return -(scores[..., 0] * trained).sum(), logits


@pytest.fixture(scope="module")
def model():
    return nnx.split(Pangea(CONFIG, rngs=nnx.Rngs(0)))


def test_packed_row_equals_its_parts(model, parts, impl):
    graph, state = model
    examples, rows = parts
    run = jax.jit(jax.value_and_grad(lambda s, b: summed_loss(graph, s, b, impl), has_aux=True))
    (packed_loss, packed_logits), packed_grads = run(state, packed_batch(examples, rows))
    alone = [run(state, examples.batch([row], LENGTH, TILES)) for row in rows]
    start = 0
    for (_, logits), _ in alone:
        length = len(rows[0][0])
        rows = rows[1:]
        np.testing.assert_allclose(
            packed_logits[0, start : start + length], logits[0, :length], atol=2e-5
        )
        start += length
    np.testing.assert_allclose(packed_loss, sum(loss for (loss, _), _ in alone), rtol=1e-6)
    summed = jax.tree.map(lambda *grads: sum(grads), *(grads for _, grads in alone))
    for (path, packed), (_, expected) in zip(
        nnx.to_flat_state(packed_grads), nnx.to_flat_state(summed), strict=True
    ):
        scale = jnp.abs(expected[...]).max()
        np.testing.assert_allclose(
            packed[...], expected[...], atol=2e-5 * scale + 1e-6, err_msg=str(path)
        )
