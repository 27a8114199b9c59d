"""Rows of a batch on the mesh, and parts of a batch. tests/data/test_pipeline.py tests how rows are filled."""

import jax
import numpy as np
import pytest

from pangea_jax import sharding
from pangea_jax.batch import Batch, Example


def batch_of(rows, trained=True):
    numbers = np.arange(3 * rows, dtype=np.int32).reshape(rows, 3)
    tiles = np.arange(rows * 4, dtype=np.uint8).reshape(rows, 1, 2, 2, 1).repeat(3, axis=-1)
    train = dict(targets=numbers, weights=np.ones((rows, 3), np.float32)) if trained else {}
    return Batch(numbers, numbers, numbers, 1 + numbers, tiles=tiles, **train)


@pytest.mark.parametrize("trained", [True, False])
def test_rows_keep_their_order_on_a_mesh(trained):
    batch = batch_of(8, trained)
    placed = batch.place(sharding.make_mesh(2, 2, 2))
    assert jax.tree.structure(placed) == jax.tree.structure(batch)
    for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert {len(shard.data) for shard in ours.addressable_shards} == {2}


def test_rows_of_padding_fill_the_devices():
    placed = batch_of(5).place(sharding.make_mesh(2, 4, 1))
    assert len(placed) == 8
    np.testing.assert_array_equal(placed.tokens[:5], batch_of(5).tokens)
    assert not placed.segment_ids[5:].any() and not placed.weights[5:].any()


def test_parts_are_all_rows_once_and_no_row_moves():
    mesh, batch = sharding.make_mesh(4, 1, 1, devices=jax.devices()[:4]), batch_of(16)
    placed = batch.place(mesh)
    parts = jax.jit(lambda batch: batch.split(2, mesh))(placed)
    assert parts.tokens.shape == (2, 8, 3)
    rows = np.sort(np.asarray(parts.tokens).reshape(16, 3), axis=0)
    np.testing.assert_array_equal(rows, batch.tokens)
    where = {
        shard.device: set(np.asarray(shard.data)[:, 0])
        for shard in placed.tokens.addressable_shards
    }
    for shard in parts.tokens.addressable_shards:
        assert set(np.asarray(shard.data)[..., 0].ravel()) == where[shard.device]


def test_parts_that_do_not_divide_are_an_error():
    mesh = sharding.make_mesh(4, 1, 1, devices=jax.devices()[:4])
    with pytest.raises(
        ValueError, match="12 rows on 4 devices cannot be split into accumulation=2"
    ):
        batch_of(12).split(2, mesh)


def test_some_rows():
    batch = batch_of(4)
    assert len(batch[1:3]) == 2
    assert batch[2].tokens.tolist() == [6, 7, 8]
    assert batch[2][None].tiles.shape == (1, 1, 2, 2, 3)
    assert batch.pictures is batch.tiles


def test_a_batch_to_answer_has_no_targets():
    words = np.array([5, 6], np.int32)
    example = Example(words, np.array([-1, 0], np.int32), np.ones((1, 2, 2, 3), np.uint8))
    assert example.size == (2, 1, 0)
    batch = Batch.fill([[example], []], 3, 1, patches=4)
    assert batch.targets is None and batch.weights is None and batch.features is None
    assert batch.tokens.tolist() == [[5, 6, 0], [0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert batch.tiles.sum(axis=(1, 2, 3, 4)).tolist() == [12, 0]
