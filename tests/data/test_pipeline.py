import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from pangea_jax import anyres
from pangea_jax.data import image
from pangea_jax.data.pipeline import (
    CachedViews,
    PipelineConfig,
    RowSource,
    Views,
    pad_row,
    render_example,
    train_dataset,
)
from pangea_jax.data.record import Conversation, RecordError, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.data.write_store import Picture, write_store
from pangea_jax.model import params as model_params
from pangea_jax.train.loss import cross_entropy

SIZES = [(16, 16), (40, 20), (12, 50), (30, 31), (9, 16)]
CONFIG = PipelineConfig(rows=2, row_tokens=256, row_tiles=10)
PACKED = PipelineConfig(rows=2, row_tokens=512, row_tiles=20, packing="best_fit", packing_bins=4)
BALANCED = dataclasses.replace(
    PACKED, row_tokens=640, row_tiles=30, packing="balanced", examples_per_row=3
)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, PACKED, BALANCED], ids=lambda c: c.packing)


def picture(number, size):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return Picture(f"made/{number}", file.getvalue(), *size)


def conversation(number):
    """With no, one or two pictures; every text is different, so that a row tells what is in it."""
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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    write_store(
        directory,
        name="made",
        build="python launch/build_data.py made",
        records={
            "train": ((c, {}) for c in CONVERSATIONS[:20]),
            "extra": ((c, {}) for c in CONVERSATIONS[20:]),
        },
        images={"made": iter([picture(i, size) for i, size in enumerate(SIZES)])},
        columns=(),
    )
    return RecordStore(directory)


@pytest.fixture(scope="module")
def views(store, tiny_config):
    vision = tiny_config.vision
    return Views(store, tiny_config.pinpoints, vision.image_size, vision.grid)


@pytest.fixture(scope="module")
def source(store):
    return RowSource(store, np.arange(len(CONVERSATIONS)))


@pytest.fixture(scope="module")
def examples(views, letters):
    """Every conversation on its own, by the words that only it has."""
    rendered = [render_example(c, None, letters, views, CONFIG) for c in CONVERSATIONS]
    return {key(letters, example["tokens"]): example for example in rendered}


def key(letters, tokens):
    return letters.decode(tokens.tolist())


def dataset(source, letters, views, config=CONFIG, **changes):
    return train_dataset(source, letters, views, config, **({"seed": 5} | changes))


def conversations(batches, letters):
    """The text of every segment of every row."""
    return [
        key(letters, tokens[segments == segment])
        for batch in batches
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
        for segment in range(1, segments.max() + 1)
    ]


def rows(batch):
    return [
        {name: values[i] for name, values in batch.items()} for i in range(len(batch["tokens"]))
    ]


def test_row_source_reads_across_splits(store):
    chosen = np.array([23, 0, 20, 0])
    assert list(RowSource(store, chosen)) == [CONVERSATIONS[i] for i in chosen]


def test_views_are_the_tiles_and_their_order(store, views, tiny_config):
    tiles, index = views("made/1", None)
    decoded = image.decode(store.image("made/1"))
    layout = anyres.layout((40, 20), tiny_config.pinpoints, 16, 4)
    assert np.array_equal(tiles, image.views(decoded, tiny_config.pinpoints, 16))
    assert np.array_equal(index, layout.image_index)
    assert tiles.shape == (layout.num_tiles, 16, 16, 3)
    assert tiles.dtype == np.uint8


def test_an_example_predicts_the_next_token(examples, letters):
    for example in examples.values():
        tokens, targets, weights = (example[name] for name in ("tokens", "targets", "weights"))
        assert np.array_equal(targets[:-1], tokens[1:])
        trained = letters.decode(targets[weights > 0].tolist())
        number = int(trained[1:].rstrip("b"))
        assert trained == CONVERSATIONS[number].turns[1].text
        # The answer and its end token; nothing after it.
        assert weights.sum() == len(trained) + 1
        assert targets[np.flatnonzero(weights)[-1]] == letters.im_end_id


def test_two_pictures_of_one_conversation_use_their_own_tiles(views, letters):
    example = render_example(CONVERSATIONS[2], None, letters, views, CONFIG)
    assert CONVERSATIONS[2].images == ("made/2", "made/3")
    (first, first_index), (second, second_index) = (
        views(name, None) for name in ("made/2", "made/3")
    )
    index = example["image_index"][example["image_index"] >= 0]
    assert np.array_equal(example["tiles"], np.concatenate([first, second]))
    moved = np.where(second_index > 0, second_index + 16 * len(first), 0)
    assert index.tolist() == [*first_index.tolist(), *moved.tolist()]


def test_a_padded_row_field_by_field():
    example = {
        "tokens": np.array([7, 8, 3], np.int32),
        "targets": np.array([8, 3, 0], np.int32),
        "weights": np.array([0, 1, 0], np.float32),
        "image_index": np.array([-1, -1, 0], np.int32),
        "features": np.ones((1, 2, 2), np.float16),
    }
    row = pad_row(example, 5, 2)
    expected = {
        "tokens": [7, 8, 3, 0, 0],
        "targets": [8, 3, 0, 0, 0],
        "weights": [0, 1, 0, 0, 0],
        "image_index": [-1, -1, 0, -1, -1],
        "positions": [0, 1, 2, 0, 0],
        "segment_ids": [1, 1, 1, 0, 0],
        "features": [[[1, 1], [1, 1]], [[0, 0], [0, 0]]],
    }
    assert {name: value.tolist() for name, value in row.items()} == expected
    assert row["features"].dtype == np.float16


@CONFIGS
def test_an_epoch_holds_every_conversation_once(source, views, letters, examples, config):
    batches = list(dataset(source, letters, views, dataclasses.replace(config, rows=1)))
    assert sorted(conversations(batches, letters)) == sorted(examples)
    if config is PACKED:
        assert len(batches) < len(examples) / 2
    else:
        assert len(batches) * config.examples // config.rows == len(examples)


def check_segment(row, segment, example, patches=16):
    """Tokens, weights, positions are the example's own, and every picture place its own patch."""
    inside = row["segment_ids"] == segment
    for name in ("tokens", "targets", "weights"):
        assert np.array_equal(row[name][inside], example[name])
    assert np.array_equal(row["positions"][inside], np.arange(inside.sum()))
    packed, alone = row["image_index"][inside], example["image_index"]
    assert np.array_equal(np.minimum(packed, 1), np.minimum(alone, 1))
    for there, here in zip(packed[alone > 0], alone[alone > 0], strict=True):
        assert (there - 1) % patches == (here - 1) % patches
        tile = row["tiles"][(there - 1) // patches]
        assert np.array_equal(tile, example["tiles"][(here - 1) // patches])


@CONFIGS
def test_every_picture_place_points_at_its_own_tile(source, views, letters, examples, config):
    later = 0
    for batch in dataset(source, letters, views, config):
        for row in rows(batch):
            padding = row["segment_ids"] == 0
            assert (row["image_index"][padding] == -1).all()
            assert not row["weights"][padding].any()
            for segment in range(1, row["segment_ids"].max() + 1):
                text = key(letters, row["tokens"][row["segment_ids"] == segment])
                check_segment(row, segment, examples[text])
                later += segment > 1 and len(examples[text]["tiles"]) > 0
    assert (later > 0) == (config.packing != "none")


@pytest.fixture(scope="module", params=[PACKED, BALANCED], ids=lambda c: c.packing)
def packed_row(request, source, views, letters, examples):
    """A row of several conversations, of which several have pictures, and its parts alone."""
    batches = dataset(source, letters, views, request.param)
    candidates = [row for batch in batches for row in rows(batch)]
    row = max(candidates, key=lambda row: len(set(row["segment_ids"][row["image_index"] > 0])))
    texts = [
        key(letters, row["tokens"][row["segment_ids"] == segment])
        for segment in range(1, row["segment_ids"].max() + 1)
    ]
    assert len(texts) > 2
    assert sum(len(examples[text]["tiles"]) > 0 for text in texts) > 1
    parts = [pad_row(examples[text], 256, 10) for text in texts]
    return row, {name: np.stack([part[name] for part in parts]) for name in row}


def test_a_packed_row_equals_its_parts_run_alone(packed_row, tiny_model):
    row, parts = packed_row
    graphdef, params = model_params.split(tiny_model)

    @jax.jit
    def run(params, batch):
        def loss(params):
            model = model_params.merge(graphdef, params)
            hidden = model.hidden(batch)
            total = cross_entropy(model.language, hidden, batch["targets"], batch["weights"])[0]
            return total, hidden

        return jax.value_and_grad(loss, has_aux=True)(params)

    together = jax.device_get(run(params, {name: value[None] for name, value in row.items()}))
    (loss, hidden), grads = together
    (loss_alone, hidden_alone), grads_alone = jax.device_get(run(params, parts))
    for number, segments in enumerate(parts["segment_ids"]):
        inside = row["segment_ids"] == number + 1
        np.testing.assert_allclose(hidden[0, inside], hidden_alone[number, segments > 0], atol=1e-5)
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    scale = max(np.abs(g).max() for g in grads_alone.values())
    for name, grad in grads.items():
        error = np.abs(grad - grads_alone[name]).max()
        assert error <= 1e-5 * scale, f"{name}: {error} of {scale}"
    # Without this the comparison would hold for a model that never looks at a picture.
    assert np.abs(grads["vision.patch_kernel_hwcd"]).max() > 1e-3 * scale


@CONFIGS
def test_a_restored_iterator_goes_on_byte_for_byte(source, views, letters, config):
    batches = dataset(source, letters, views, dataclasses.replace(config, rows=1))
    straight = iter(batches)
    for _ in range(2):
        next(straight)
    state = straight.get_state()
    expected = [next(straight) for _ in range(3)]
    again = iter(dataset(source, letters, views, dataclasses.replace(config, rows=1)))
    again.set_state(state)
    for batch in expected:
        restored = next(again)
        assert restored.keys() == batch.keys()
        assert all(restored[name].tobytes() == batch[name].tobytes() for name in batch)


def test_the_seed_decides_the_order(source, views, letters):
    def order(seed):
        return conversations(dataset(source, letters, views, seed=seed), letters)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_processes_share_the_epoch(source, views, letters, examples):
    parts = [
        conversations(dataset(source, letters, views, process_index=i, process_count=2), letters)
        for i in range(2)
    ]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(examples)
    batch = next(iter(dataset(source, letters, views, process_index=0, process_count=2)))
    assert len(batch["tokens"]) == CONFIG.rows // 2
    with pytest.raises(ValueError, match="rows=2 does not divide over 3 processes"):
        dataset(source, letters, views, process_count=3)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"row_tokens": 40}, r"\d+ tokens, a row holds 40"),
        ({"row_tiles": 1}, r"\d+ tiles, a row holds 1"),
        ({"max_targets": 2}, r"5 targets, a row holds 2"),
    ],
)
def test_what_does_not_fit_a_row_is_an_error(views, letters, changes, what):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(RecordError, match=f"'c2', field conversations: does not fit a row .{what}"):
        render_example(CONVERSATIONS[2], None, letters, views, config)


@pytest.mark.parametrize("config", [PACKED, BALANCED], ids=lambda c: c.packing)
def test_no_packed_row_has_more_targets_than_the_head_computes(source, views, letters, config):
    limit = 20
    free = [row for batch in dataset(source, letters, views, config) for row in rows(batch)]
    bounded = dataclasses.replace(config, max_targets=limit)
    batches = list(dataset(source, letters, views, bounded))
    assert max(row["weights"].sum() for batch in batches for row in rows(batch)) <= limit
    assert batches[0].keys() == free[0].keys()
    if config is PACKED:
        assert max(row["weights"].sum() for row in free) > limit


def test_a_balanced_batch_that_does_not_fit_is_an_error(source, views, letters):
    config = dataclasses.replace(BALANCED, max_targets=8)
    with pytest.raises(ValueError, match=r"6 conversations do not fit 2 rows .* raise pipeline"):
        list(dataset(source, letters, views, config))


def test_an_impossible_packing_is_an_error():
    with pytest.raises(ValueError, match=r"packing 'dense' is not one of \('none', 'bal"):
        PipelineConfig(rows=1, row_tokens=8, row_tiles=1, packing="dense")
    with pytest.raises(ValueError, match="examples_per_row needs"):
        PipelineConfig(rows=1, row_tokens=8, row_tiles=1, examples_per_row=2)


def test_cached_views_are_drawn_at_random_but_not_in_evaluation(letters):
    features = {f"made/{i}": np.full((3, 4, 2), i, np.float16) for i in range(5)}
    for value in features.values():
        value += np.arange(3, dtype=np.float16)[:, None, None] / 4
    views = CachedViews(features)
    clean, index = views("made/2", None)
    assert index.tolist() == [1, 2, 3, 4, 0]
    assert clean.shape == (1, 4, 2)
    assert (clean == 2).all()
    source = [CONVERSATIONS[i] for i in (1, 4, 7, 10, 13, 16, 19, 22)] * 8
    config = PipelineConfig(rows=1, row_tokens=80, row_tiles=1)
    batches = list(train_dataset(source, letters, views, config, seed=0))
    drawn = {float(batch["features"][0, 0, 0, 0]) % 1 for batch in batches}
    assert drawn == {0, 0.25, 0.5}
    again = list(train_dataset(source, letters, views, config, seed=0))
    assert all(np.array_equal(a["features"], b["features"]) for a, b in zip(batches, again))
