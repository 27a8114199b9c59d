"""Batches of the pipeline: their contents and order, with one or more processes."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from pangea_jax import anyres
from pangea_jax.batch import Batch, Example
from pangea_jax.data import image
from pangea_jax.data.feed import Counters
from pangea_jax.data.pipeline import PipelineConfig, RowSource, render_example, train_dataset
from pangea_jax.data.reader import CachedFeatures, Reader
from pangea_jax.model import params as model_params
from pangea_jax.train.loss import cross_entropy
from tests.data.made import (
    BALANCED,
    CONFIG,
    CONFIGS,
    CONVERSATIONS,
    PACKED,
    PLANNED,
    conversations,
    dataset,
    reader_of,
    rows,
    same,
    text_of,
)


def test_row_source_reads_across_splits(store):
    chosen = np.array([23, 0, 20, 0])
    assert list(RowSource(store, chosen)) == [CONVERSATIONS[i] for i in chosen]


def test_views_are_the_tiles_and_their_order(store, reader, tiny_config):
    look = reader.pictures.stored("made/1", several=False)
    tiles, (count, index) = look.cut(), look.place
    decoded = image.decode(store.image("made/1"))
    layout = anyres.layout((40, 20), tiny_config.pinpoints, 16, 4)
    assert np.array_equal(tiles, image.views(decoded, tiny_config.pinpoints, 16))
    assert np.array_equal(index, layout.image_index)
    assert tiles.shape == (count, 16, 16, 3) == (layout.num_tiles, 16, 16, 3)
    assert tiles.dtype == np.uint8


def test_an_example_predicts_the_next_token(examples, letters):
    for example in examples.values():
        tokens, targets, weights = example.tokens, example.targets, example.weights
        assert np.array_equal(targets[:-1], tokens[1:])
        trained = letters.decode(targets[weights > 0].tolist())
        number = int(trained[1:].rstrip("b"))
        assert trained == CONVERSATIONS[number].turns[1].text
        # The answer and its end token; nothing after it.
        assert weights.sum() == len(trained) + 1
        assert targets[np.flatnonzero(weights)[-1]] == letters.im_end_id


def test_two_pictures_of_one_conversation_use_their_own_tiles(reader, letters):
    example = render_example(CONVERSATIONS[2], None, reader, CONFIG)
    assert CONVERSATIONS[2].images == ("made/2", "made/3")
    looks = [reader.pictures.stored(name, several=True) for name in ("made/2", "made/3")]
    first, second = (look.cut() for look in looks)
    first_index, second_index = (look.place[1] for look in looks)
    index = example.image_index[example.image_index >= 0]
    assert np.array_equal(example.tiles, np.concatenate([first, second]))
    moved = np.where(second_index > 0, second_index + 16 * len(first), 0)
    assert index.tolist() == [*first_index.tolist(), *moved.tolist()]


def test_a_padded_row_field_by_field():
    example = Example(
        tokens=np.array([7, 8, 3], np.int32),
        targets=np.array([8, 3, 0], np.int32),
        weights=np.array([0, 1, 0], np.float32),
        image_index=np.array([-1, -1, 0], np.int32),
        features=np.ones((1, 2, 2), np.float16),
    )
    row = Batch.fill([[example]], 5, 2, patches=2)[0]
    expected = {
        "tokens": [7, 8, 3, 0, 0],
        "targets": [8, 3, 0, 0, 0],
        "weights": [0, 1, 0, 0, 0],
        "image_index": [-1, -1, 0, -1, -1],
        "positions": [0, 1, 2, 0, 0],
        "segment_ids": [1, 1, 1, 0, 0],
        "features": [[[1, 1], [1, 1]], [[0, 0], [0, 0]]],
    }
    assert {
        name: value.tolist() for name, value in vars(row).items() if name != "tiles"
    } == expected
    assert row.tiles is None
    assert row.features.dtype == np.float16


@CONFIGS
def test_an_epoch_holds_every_conversation_once(source, reader, letters, examples, config):
    batches = list(dataset(source, reader, dataclasses.replace(config, rows=1)))
    assert sorted(conversations(batches, letters)) == sorted(examples)
    if config in (PACKED, PLANNED):
        assert len(batches) < len(examples) / 2
    else:
        assert len(batches) * config.examples // config.rows == len(examples)


def check_segment(row, segment, example, patches=16):
    """A segment has the example's tokens, weights and positions, and points at the right patches."""
    inside = row.segment_ids == segment
    for name in ("tokens", "targets", "weights"):
        assert np.array_equal(getattr(row, name)[inside], getattr(example, name))
    assert np.array_equal(row.positions[inside], np.arange(inside.sum()))
    packed, alone = row.image_index[inside], example.image_index
    assert np.array_equal(np.minimum(packed, 1), np.minimum(alone, 1))
    for there, here in zip(packed[alone > 0], alone[alone > 0], strict=True):
        assert (there - 1) % patches == (here - 1) % patches
        tile = row.tiles[(there - 1) // patches]
        assert np.array_equal(tile, example.tiles[(here - 1) // patches])


@CONFIGS
def test_every_picture_place_points_at_its_own_tile(source, reader, letters, examples, config):
    later = 0
    for batch in dataset(source, reader, config):
        for row in rows(batch):
            padding = row.segment_ids == 0
            assert (row.image_index[padding] == -1).all()
            assert not row.weights[padding].any()
            for segment in range(1, row.segment_ids.max() + 1):
                text = text_of(letters, row.tokens[row.segment_ids == segment])
                check_segment(row, segment, examples[text])
                later += segment > 1 and len(examples[text].tiles) > 0
    assert (later > 0) == (config.packing != "none")


@pytest.fixture(scope="module", params=[PACKED, BALANCED, PLANNED], ids=lambda c: c.packing)
def packed_row(request, source, reader, letters, examples):
    """A row of several conversations, some with pictures, and each conversation alone."""
    batches = dataset(source, reader, request.param)
    candidates = [row for batch in batches for row in rows(batch)]
    row = max(candidates, key=lambda row: len(set(row.segment_ids[row.image_index > 0])))
    texts = [
        text_of(letters, row.tokens[row.segment_ids == segment])
        for segment in range(1, row.segment_ids.max() + 1)
    ]
    assert len(texts) > 2
    assert sum(len(examples[text].tiles) > 0 for text in texts) > 1
    return row, Batch.fill([[examples[text]] for text in texts], 256, 10, 16)


def test_a_packed_row_equals_its_parts_run_alone(packed_row, tiny_model):
    row, parts = packed_row
    graphdef, params = model_params.split(tiny_model)

    @jax.jit
    def run(params, batch):
        def loss(params):
            model = model_params.merge(graphdef, params)
            hidden = model.hidden(batch)
            total = cross_entropy(model.language, hidden, batch.targets, batch.weights)[0]
            return total, hidden

        return jax.value_and_grad(loss, has_aux=True)(params)

    together = jax.device_get(run(params, row[None]))
    (loss, hidden), grads = together
    (loss_alone, hidden_alone), grads_alone = jax.device_get(run(params, parts))
    for number, segments in enumerate(parts.segment_ids):
        inside = row.segment_ids == number + 1
        np.testing.assert_allclose(hidden[0, inside], hidden_alone[number, segments > 0], atol=1e-5)
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    scale = max(np.abs(g).max() for g in grads_alone.values())
    for name, grad in grads.items():
        error = np.abs(grad - grads_alone[name]).max()
        assert error <= 1e-5 * scale, f"{name}: {error} of {scale}"
    # Otherwise a model that ignores pictures would pass.
    assert np.abs(grads["vision.patch_kernel_hwcd"]).max() > 1e-3 * scale


def test_a_plan_gives_every_process_its_part_of_the_same_batches(source, reader, letters):
    whole = list(dataset(source, reader, PLANNED))
    parts = [
        list(dataset(source, reader, PLANNED, process_index=i, process_count=2)) for i in range(2)
    ]
    for batch, *halves in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
        assert same(joined, batch)


@pytest.mark.parametrize("config", [CONFIG, BALANCED, PLANNED], ids=lambda c: c.packing)
@pytest.mark.parametrize("process_count", [1, 2])
def test_the_number_of_steps_is_known(source, reader, letters, config, process_count):
    chosen = RowSource(source._store, np.arange(23))
    for index in range(process_count):
        batches = dataset(chosen, reader, config, process_index=index, process_count=process_count)
        assert len(list(batches)) == batches.num_batches > 0
    if config.examples:
        assert batches.num_batches == 23 // config.examples


@CONFIGS
def test_counters_are_those_of_the_batches(source, reader, letters, examples, config):
    data = iter(dataset(source, reader, config))
    batches = [next(data)]
    first = data.counters.flush()
    batches.append(next(data))
    second = data.counters.flush()
    for batch, told in zip(batches, (first, second), strict=True):
        texts = conversations([batch], letters)
        assert told["examples_per_language"] == {"en": len(texts)}
        assert told["examples_per_source"] == {"made": len(texts)}
        assert told["tokens_per_language"] == {"en": np.count_nonzero(batch.segment_ids)}
        assert told["padding"] == pytest.approx((batch.segment_ids == 0).mean())
        tiles = sum(len(examples[text].tiles) for text in texts)
        slots = batch.tiles.shape[0] * batch.tiles.shape[1]
        assert told["tile_fill"] == pytest.approx(tiles / slots)
        assert told["bad_records"] == {}
    assert second["total_tokens"] == sum((b.segment_ids > 0).sum() for b in batches)
    assert second["total_examples"] == len(conversations(batches, letters))
    assert data.counters.flush()["examples_per_language"] == {}


def test_the_seed_decides_the_order(source, reader, letters):
    def order(seed):
        return conversations(dataset(source, reader, seed=seed), letters)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_processes_share_the_epoch(source, reader, letters, examples):
    parts = [
        conversations(dataset(source, reader, process_index=i, process_count=2), letters)
        for i in range(2)
    ]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(examples)
    batch = next(iter(dataset(source, reader, process_index=0, process_count=2)))
    assert len(batch.tokens) == CONFIG.rows // 2
    with pytest.raises(ValueError, match="rows=2 does not divide over 3 processes"):
        dataset(source, reader, process_count=3)


def test_cached_views_are_drawn_at_random_but_not_in_evaluation(letters):
    features = {f"made/{i}": np.full((3, 4, 2), i, np.float16) for i in range(5)}
    for value in features.values():
        value += np.arange(3, dtype=np.float16)[:, None, None] / 4
    pictures = CachedFeatures(features)
    look = pictures.stored("made/2", several=False)
    clean, (count, index) = look.cut(), look.place
    assert count == 1
    assert index.tolist() == [1, 2, 3, 4, 0]
    assert clean.shape == (1, 4, 2)
    assert (clean == 2).all()
    source = [CONVERSATIONS[i] for i in (1, 4, 7, 10, 13, 16, 19, 22)] * 8
    config, reader = PipelineConfig(rows=1, row_tokens=80, row_tiles=1), Reader(letters, pictures)
    batches = list(train_dataset(source, reader, config, seed=0))
    drawn = {float(batch.features[0, 0, 0, 0]) % 1 for batch in batches}
    assert drawn == {0, 0.25, 0.5}
    again = list(train_dataset(source, reader, config, seed=0))
    assert all(np.array_equal(a.features, b.features) for a, b in zip(batches, again))


def test_several_pictures_are_padded_squares_where_asked(store, tiny_config, letters):
    """As in the reference: one view, with the picture in the middle of a square of CLIP's mean colour."""
    reader = reader_of(tiny_config, letters, store, multi_image="padded")
    two = dataclasses.replace(CONVERSATIONS[2], images=("made/1", "made/2"))
    example = render_example(two, None, reader, CONFIG)
    assert len(example.tiles) == 2
    assert (example.image_index >= 0).sum() == 2 * (16 + 1)
    for key, tile in zip(two.images, example.tiles, strict=True):
        pixels = np.asarray(image.decode(store.image(key)))
        height, width = pixels.shape[:2]
        side = max(height, width)
        square = np.full((side, side, 3), (122, 116, 104), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        expected = Image.fromarray(square).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.array_equal(tile, np.asarray(expected))
    alone = dataclasses.replace(CONVERSATIONS[1], images=("made/1",))
    assert len(render_example(alone, None, reader, CONFIG).tiles) > 1


def test_a_state_that_lacks_a_sum_is_an_error():
    """Zero in its place would lose counts quietly."""
    state = Counters().get_state()
    del state["cut"]
    with pytest.raises(KeyError, match="cut"):
        Counters().set_state(state)
