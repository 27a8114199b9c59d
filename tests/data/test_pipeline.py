import asyncio
import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pangea_jax import anyres
from pangea_jax.data import chat, image
from pangea_jax.data.feed import BadRecordsError, RestartError
from pangea_jax.data.pipeline import (
    CachedViews,
    PipelineConfig,
    RowSource,
    Views,
    measure,
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
PLANNED = dataclasses.replace(PACKED, packing="planned", packing_window=16)
ALL = [CONFIG, PACKED, BALANCED, PLANNED]
CONFIGS = pytest.mark.parametrize("config", ALL, ids=lambda c: c.packing)


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
    if config in (PACKED, PLANNED):
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


@pytest.fixture(scope="module", params=[PACKED, BALANCED, PLANNED], ids=lambda c: c.packing)
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


def same(batch, other):
    return batch.keys() == other.keys() and all(
        batch[name].dtype == other[name].dtype and batch[name].tobytes() == other[name].tobytes()
        for name in batch
    )


@CONFIGS
def test_a_restored_iterator_goes_on_byte_for_byte(source, views, letters, config):
    """Stopped at any step; what a checkpoint holds of the position is JSON."""
    batches = dataset(source, letters, views, dataclasses.replace(config, rows=1))
    straight = iter(batches)
    states, expected = [], []
    for _ in range(4):
        states.append(json.loads(json.dumps(straight.get_state())))
        expected.append(next(straight))
    counted = straight.counters.get_state()
    for start, state in enumerate(states):
        again = iter(dataset(source, letters, views, dataclasses.replace(config, rows=1)))
        next(again)
        again.set_state(state)
        assert all(same(next(again), batch) for batch in expected[start:])
        assert again.counters.get_state() == counted


@pytest.mark.parametrize("config", [PACKED, PLANNED], ids=lambda c: c.packing)
def test_workers_change_nothing_and_restore_to_the_byte(
    store, tiny_config, emoji_tokenizer, config
):
    """The same batches with 0, 1 and 4 worker processes, also where one number takes over from another."""
    vision = tiny_config.vision
    source = RowSource(store, np.arange(len(CONVERSATIONS)))
    views = Views(store, tiny_config.pinpoints, vision.image_size, vision.grid)

    def batches(workers):
        changed = dataclasses.replace(config, rows=1, workers=workers)
        return contextlib.closing(iter(dataset(source, emoji_tokenizer, views, changed)))

    with batches(0) as data:
        expected = [next(data)]
        state = data.get_state()
        expected += list(data)
    assert len(expected) > 2
    if config is PACKED:
        # Where a stream stands does depend on the number of its workers.
        with batches(1) as data:
            assert same(next(data), expected[0])
            state = data.get_state()
        with batches(0) as data, pytest.raises(RestartError, match="workers was 1 and is 0"):
            data.set_state(state)
    for workers in (1,) if config is PACKED else (1, 4):
        with batches(workers) as data:
            data.set_state(state)
            rest = list(data)
        assert len(rest) == len(expected) - 1
        assert all(map(same, rest, expected[1:]))


def test_another_order_is_refused(source, views, letters):
    state = iter(dataset(source, letters, views)).get_state()
    with pytest.raises(RestartError, match=r"seed was 5 and is 6. Restore that, or accept"):
        iter(dataset(source, letters, views, seed=6)).set_state(state)
    shorter = RowSource(source._store, np.arange(20))
    with pytest.raises(RestartError, match="source was '"):
        iter(dataset(shorter, letters, views)).set_state(state)
    with pytest.raises(RestartError, match="packing was 'none' and is 'planned'"):
        iter(dataset(source, letters, views, PLANNED)).set_state(state)
    with pytest.raises(RestartError, match="format None"):
        iter(dataset(source, letters, views)).set_state({})
    # How fast it is read is nobody's business.
    faster = dataclasses.replace(CONFIG, threads=7)
    iter(dataset(source, letters, views, faster)).set_state(state)


@pytest.mark.parametrize("config", [CONFIG, BALANCED, PLANNED], ids=lambda c: c.packing)
def test_going_on_with_another_number_of_processes_is_exact(
    source, views, letters, examples, config
):
    """Two processes stop, one goes on: every conversation once, none twice."""
    one = dataclasses.replace(config, examples_per_row=2 if config is BALANCED else 1)
    pair = [
        iter(dataset(source, letters, views, one, process_index=i, process_count=2))
        for i in range(2)
    ]
    seen = []
    for _ in range(2):
        seen += conversations([next(process) for process in pair], letters)
    alone = iter(dataset(source, letters, views, one))
    alone.set_state(pair[1].get_state())
    seen += conversations(list(alone), letters)
    assert len(seen) == len(set(seen))
    whole = conversations(list(dataset(source, letters, views, one)), letters)
    assert sorted(seen) == sorted(whole)
    assert set(whole) <= set(examples)


def test_a_stream_refuses_another_number_of_processes(source, views, letters):
    config = dataclasses.replace(PACKED, packing_bins=1)

    def make(count, **changes):
        return iter(dataset(source, letters, views, config, process_count=count, **changes))

    two = make(2)
    next(two)
    state = two.get_state()
    with pytest.raises(RestartError, match=r"process_count was 2 and is 1.*approximate_restart"):
        make(1).set_state(state)
    near = make(1, approximate_restart=True)
    near.set_state(state)
    left = conversations(list(near), letters)
    # Where two processes had each handed out `n` conversations, one goes on after about 2 n.
    handed_out = 2 * state["counters"]["examples"]
    assert 0 < len(left) <= len(CONVERSATIONS) - handed_out


def test_a_checkpoint_of_two_processes_is_read_by_one(tmp_path, source, views, letters):
    batches = [
        iter(dataset(source, letters, views, PLANNED, process_index=i, process_count=2))
        for i in range(2)
    ]
    for i, process in enumerate(batches):
        next(process)
        (tmp_path / f"process_{i}-of-2.json").write_text(json.dumps(process.get_state()))
    alone = iter(dataset(source, letters, views, PLANNED))

    async def load(directory):
        await (await alone.load(directory))

    with pytest.raises(RestartError, match="holds no state of the data"):
        asyncio.run(load(tmp_path / "empty"))
    asyncio.run(load(tmp_path))
    whole = iter(dataset(source, letters, views, PLANNED))
    next(whole)
    counted, wanted = (data.counters.flush() for data in (alone, whole))
    assert counted == wanted
    expected = list(whole)
    assert expected
    assert all(map(same, alone, expected))


def test_a_plan_gives_every_process_its_part_of_the_same_batches(source, views, letters):
    whole = list(dataset(source, letters, views, PLANNED))
    parts = [
        list(dataset(source, letters, views, PLANNED, process_index=i, process_count=2))
        for i in range(2)
    ]
    for batch, *halves in zip(whole, *parts, strict=True):
        joined = {name: np.concatenate([half[name] for half in halves]) for name in batch}
        assert same(joined, batch)


@pytest.mark.parametrize("config", [CONFIG, BALANCED, PLANNED], ids=lambda c: c.packing)
@pytest.mark.parametrize("process_count", [1, 2])
def test_the_number_of_steps_is_known(source, views, letters, config, process_count):
    chosen = RowSource(source._store, np.arange(23))
    for index in range(process_count):
        batches = dataset(
            chosen, letters, views, config, process_index=index, process_count=process_count
        )
        assert len(list(batches)) == batches.num_batches > 0
    if config.examples:
        assert batches.num_batches == 23 // config.examples


@CONFIGS
def test_counters_are_those_of_the_batches(source, views, letters, examples, config):
    data = iter(dataset(source, letters, views, config))
    batches = [next(data)]
    first = data.counters.flush()
    batches.append(next(data))
    second = data.counters.flush()
    for batch, told in zip(batches, (first, second), strict=True):
        texts = conversations([batch], letters)
        assert told["examples_per_language"] == {"en": len(texts)}
        assert told["examples_per_source"] == {"made": len(texts)}
        assert told["tokens_per_language"] == {"en": np.count_nonzero(batch["segment_ids"])}
        assert told["padding"] == pytest.approx((batch["segment_ids"] == 0).mean())
        tiles = sum(len(examples[text]["tiles"]) for text in texts)
        slots = batch["tiles"].shape[0] * batch["tiles"].shape[1]
        assert told["tile_fill"] == pytest.approx(tiles / slots)
        assert told["bad_records"] == {}
    assert second["total_tokens"] == sum((b["segment_ids"] > 0).sum() for b in batches)
    assert second["total_examples"] == len(conversations(batches, letters))
    assert data.counters.flush()["examples_per_language"] == {}


def test_sizes_are_measured_without_decoding(store, tiny_config, views, letters, examples):
    sizes = measure(CONVERSATIONS, letters, views, CONFIG)
    assert sizes.shape == (24, 3)
    for (tokens, tiles, targets), example in zip(sizes, examples.values(), strict=True):
        assert tokens == len(example["tokens"])
        assert tiles == len(example["tiles"])
        assert targets == example["weights"].sum()


@pytest.fixture(scope="module")
def indexed(store, letters, tmp_path_factory):
    """A source whose index has what that of PangeaIns has."""

    class Indexed:
        def __init__(self, tokens):
            sizes = [
                [list(SIZES[int(key.split("/")[1])]) for key in c.images] for c in CONVERSATIONS
            ]
            nested = pa.list_(pa.list_(pa.int32()))
            self.index = store.index.append_column(
                "num_tokens", pa.array(tokens, pa.int32())
            ).append_column("image_sizes", pa.array(sizes, nested))
            self.splits, self.records = store.splits, store.records

    def make(change=0):
        empty = np.zeros(0, np.int32)
        tokens = [
            len(
                chat.render(
                    c.turns,
                    letters,
                    [empty] * len(c.images),
                    tiles_per_image=[0] * len(c.images),
                ).tokens
            )
            + change
            for c in CONVERSATIONS
        ]
        return RowSource(Indexed(tokens), np.arange(len(CONVERSATIONS))[::-1])

    return make


@pytest.mark.parametrize("multi_image", ["anyres", "padded"])
def test_the_index_plans_without_reading(indexed, views, letters, multi_image):
    config = dataclasses.replace(PLANNED, multi_image=multi_image)
    sizes = indexed().indexed_sizes(views, config)
    measured = measure(CONVERSATIONS[::-1], letters, views, config)
    assert np.array_equal(sizes[:, :2], measured[:, :2])
    planned = list(dataset(indexed(), letters, views, config))
    assert len(conversations(planned, letters)) > 15


def test_an_index_of_another_tokenizer_is_noticed(indexed, views, letters):
    with pytest.raises(
        ValueError, match=r"up to 3 tokens more than num_tokens .* another tokenizer"
    ):
        dataset(indexed(-3), letters, views, PLANNED)


def test_what_a_plan_has_no_room_for_is_dropped_and_counted(source, views, letters):
    """A plan from sizes that are too small still makes rows of the right shape."""
    sizes = measure(source, letters, views, PLANNED)
    sizes[:, 0] //= 2
    data = iter(dataset(source, letters, views, dataclasses.replace(PLANNED, rows=1), sizes=sizes))
    batches = list(data)
    counted = data.counters.get_state()
    assert counted["dropped"] > 0
    assert counted["dropped"] + counted["examples"] == len(CONVERSATIONS)
    assert len(set(conversations(batches, letters))) == counted["examples"]


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


@pytest.mark.parametrize("config", [PACKED, BALANCED, PLANNED], ids=lambda c: c.packing)
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


def test_a_long_conversation_is_cut_before_a_picture_not_within_it(views, letters):
    turns = (
        Turn("user", "<image>one"),
        Turn("assistant", "first"),
        Turn("user", "and <image> this"),
        Turn("assistant", "second"),
    )
    long = Conversation("long", "made", "en", "", ("made/1", "made/2"), turns)
    config = dataclasses.replace(CONFIG, row_tokens=400)
    whole = render_example(long, None, letters, views, config)
    places = np.flatnonzero(whole["image_index"] >= 0)
    gap = np.flatnonzero(np.diff(places) > 1)[0]
    second, end = places[gap + 1], places[-1] + 1
    with pytest.raises(RecordError, match="does not fit a row"):
        render_example(long, None, letters, views, dataclasses.replace(config, row_tokens=end))
    tiles = [len(views(key, None)[0]) for key in long.images]

    def cut(**changes):
        return render_example(
            long, None, letters, views, dataclasses.replace(config, overlong="truncate", **changes)
        )

    for limit, length, kept in (
        (end + 3, end + 3, 2),
        (end, end, 2),
        (end - 1, second, 1),
        (second + 1, second, 1),
        (second, second, 1),
        (second - 2, second - 2, 1),
    ):
        example = cut(row_tokens=int(limit))
        assert len(example["tokens"]) == length
        assert np.array_equal(example["tokens"], whole["tokens"][:length])
        assert len(example["tiles"]) == sum(tiles[:kept])
        assert np.array_equal(example["weights"][:-1], whole["weights"][: length - 1])
        assert example["weights"][-1] == 0
        size = (len(example["tokens"]), len(example["tiles"]), int(example["weights"].sum()))
        measured = measure(
            [long],
            letters,
            views,
            dataclasses.replace(config, overlong="truncate", row_tokens=int(limit)),
        )
        assert measured.tolist() == [list(size)]
    assert len(cut(row_tiles=tiles[0])["tokens"]) == second
    assert cut(max_targets=3)["weights"].sum() == 3
    # Cut within its first picture nothing is left to learn from.
    with pytest.raises(RecordError, match="does not fit a row"):
        cut(row_tokens=int(places[3]))


@pytest.mark.parametrize("packing", ["none", "best_fit", "planned"])
def test_conversations_that_do_not_fit_are_left_out_or_cut(
    source, views, letters, examples, packing
):
    base = PipelineConfig(rows=1, row_tokens=150, row_tiles=10, packing=packing)
    short = [text for text, e in examples.items() if len(e["tokens"]) <= 150]
    assert 0 < len(short) < len(examples)

    def run(overlong):
        """What comes out; how many were cut, and how many dropped, by a plan or on the way."""
        feed = dataset(source, letters, views, dataclasses.replace(base, overlong=overlong))
        data = iter(feed)
        texts = conversations(list(data), letters)
        told = data.counters.flush()
        return texts, told["cut"], told["dropped"] + feed.dropped

    texts, cut, dropped = run("drop")
    assert sorted(texts) == sorted(short)
    assert (cut, dropped) == (0, len(examples) - len(short))
    texts, cut, dropped = run("truncate")
    assert cut + dropped == len(examples) - len(short)
    assert len(texts) == len(short) + cut
    with pytest.raises(RecordError, match="does not fit a row"):
        list(dataset(source, letters, views, base))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """24 conversations, of which 4 have a picture that is cut off or not there."""
    directory = tmp_path_factory.mktemp("damaged")
    pictures = [picture(i, size) for i, size in enumerate(SIZES)]
    cut_off = dataclasses.replace(pictures[0], encoded=pictures[0].encoded[:60])
    bad = {
        5: dataclasses.replace(CONVERSATIONS[1], images=("made/0",)),
        11: dataclasses.replace(CONVERSATIONS[1], images=("made/0",)),
        16: dataclasses.replace(CONVERSATIONS[1], images=("made/nothing",)),
        20: dataclasses.replace(CONVERSATIONS[1], images=("made/0",)),
    }
    good = {
        i: dataclasses.replace(c, images=("made/1",) * len(c.images))
        for i, c in enumerate(CONVERSATIONS)
    }
    write_store(
        directory,
        name="damaged",
        build="python launch/build_data.py made",
        records={"train": ((bad.get(i, good[i]), {}) for i in range(24))},
        images={"made": iter([cut_off, *pictures[1:]])},
        columns=(),
    )
    return RecordStore(directory)


@CONFIGS
def test_bad_records_are_skipped_and_counted_up_to_a_limit(damaged, tiny_config, letters, config):
    vision = tiny_config.vision
    views = Views(damaged, tiny_config.pinpoints, vision.image_size, vision.grid)
    source = RowSource(damaged, np.arange(24))
    lenient = dataclasses.replace(config, rows=1, max_bad_fraction=0.1)
    data = iter(dataset(source, letters, views, lenient))
    texts = conversations(list(data), letters)
    assert len(texts) == 20
    told = data.counters.flush()
    assert sum(told["bad_records"].values()) == 4
    assert len(told["bad_records"]) == 2
    assert told["total_examples"] == 20
    with pytest.raises(image.ImageError, match=r"picture 'made/(0|nothing)'"):
        list(dataset(source, letters, views, dataclasses.replace(lenient, max_bad_fraction=0.0)))
    # The limit is a share of at least a thousand records: 3 of them here.
    with pytest.raises(
        BadRecordsError, match=r"4 of \d+ records are bad, more than .*=0.003: .* x "
    ):
        list(dataset(source, letters, views, dataclasses.replace(lenient, max_bad_fraction=0.003)))


def test_several_pictures_are_padded_squares_where_asked(store, views, letters):
    """Against the reference: a square of CLIP's mean colour, the picture in the middle, one view."""
    config = dataclasses.replace(CONFIG, multi_image="padded")
    two = dataclasses.replace(CONVERSATIONS[2], images=("made/1", "made/2"))
    example = render_example(two, None, letters, views, config)
    assert len(example["tiles"]) == 2
    assert (example["image_index"] >= 0).sum() == 2 * (16 + 1)
    for key, tile in zip(two.images, example["tiles"], strict=True):
        pixels = np.asarray(image.decode(store.image(key)))
        height, width = pixels.shape[:2]
        side = max(height, width)
        square = np.full((side, side, 3), (122, 116, 104), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        expected = Image.fromarray(square).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.array_equal(tile, np.asarray(expected))
    alone = dataclasses.replace(CONVERSATIONS[1], images=("made/1",))
    assert len(render_example(alone, None, letters, views, config)["tiles"]) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlong": "wrap"}, r"overlong 'wrap' is not one of \('error', 'drop', 'truncate'\)"),
        ({"multi_image": "grid"}, "multi_image 'grid' is not one of"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction must lie in \[0, 1\], not 2.0"),
    ],
)
def test_a_policy_that_is_unknown(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
