"""Conversations that are too long for a row, records that cannot be read, unknown settings."""

import dataclasses

import jax
import numpy as np
import pytest

from pangea_jax.data import image, pipeline
from pangea_jax.data.build.write_store import write_shard, write_store
from pangea_jax.data.feed import BadRecordsError
from pangea_jax.data.pipeline import PipelineConfig, RowSource, measure, render_example
from pangea_jax.data.record import Conversation, RecordError, Turn
from pangea_jax.data.store import RecordStore, StoreError
from tests.data.made import (
    BALANCED,
    CONFIG,
    CONFIGS,
    CONVERSATIONS,
    PACKED,
    PLANNED,
    SIZES,
    conversations,
    dataset,
    picture,
    reader_of,
    rows,
)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"row_tokens": 40}, r"\d+ tokens, a row holds 40"),
        ({"row_tiles": 1}, r"\d+ tiles, a row holds 1"),
        ({"max_targets": 2}, r"5 targets, a row holds 2"),
    ],
)
def test_a_conversation_that_does_not_fit_a_row_is_an_error(reader, letters, changes, what):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(RecordError, match=f"'c2', field conversations: does not fit a row .{what}"):
        render_example(CONVERSATIONS[2], None, reader, config)


@pytest.mark.parametrize("config", [PACKED, BALANCED, PLANNED], ids=lambda c: c.packing)
def test_no_packed_row_has_more_targets_than_the_head_computes(source, reader, letters, config):
    limit = 20
    free = [row for batch in dataset(source, reader, config) for row in rows(batch)]
    bounded = dataclasses.replace(config, max_targets=limit)
    batches = list(dataset(source, reader, bounded))
    assert max(row.weights.sum() for batch in batches for row in rows(batch)) <= limit
    assert jax.tree.structure(batches[0]) == jax.tree.structure(free[0])
    if config is PACKED:
        assert max(row.weights.sum() for row in free) > limit


def test_a_balanced_batch_that_does_not_fit_is_an_error(source, reader, letters):
    config = dataclasses.replace(BALANCED, max_targets=8)
    with pytest.raises(ValueError, match=r"6 conversations do not fit 2 rows .* raise pipeline"):
        list(dataset(source, reader, config))


def test_a_long_conversation_is_cut_before_a_picture_not_within_it(reader, letters):
    turns = (
        Turn("user", "<image>one"),
        Turn("assistant", "first"),
        Turn("user", "and <image> this"),
        Turn("assistant", "second"),
    )
    long = Conversation("long", "made", "en", "", ("made/1", "made/2"), turns)
    config = dataclasses.replace(CONFIG, row_tokens=400)
    whole = render_example(long, None, reader, config)
    places = np.flatnonzero(whole.image_index >= 0)
    gap = np.flatnonzero(np.diff(places) > 1)[0]
    second, end = places[gap + 1], places[-1] + 1
    with pytest.raises(RecordError, match="does not fit a row"):
        render_example(long, None, reader, dataclasses.replace(config, row_tokens=end))
    tiles = [len(reader.pictures.stored(key, several=True).cut()) for key in long.images]

    def cut(**changes):
        return render_example(
            long, None, reader, dataclasses.replace(config, overlong="truncate", **changes)
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
        assert len(example.tokens) == length
        assert np.array_equal(example.tokens, whole.tokens[:length])
        assert len(example.tiles) == sum(tiles[:kept])
        assert np.array_equal(example.weights[:-1], whole.weights[: length - 1])
        assert example.weights[-1] == 0
        size = (len(example.tokens), len(example.tiles), int(example.weights.sum()))
        measured = measure(
            [long],
            reader,
            dataclasses.replace(config, overlong="truncate", row_tokens=int(limit)),
        )
        assert measured.tolist() == [list(size)]
    assert len(cut(row_tiles=tiles[0]).tokens) == second
    assert cut(max_targets=3).weights.sum() == 3
    # If the cut is before the first picture, no trained token is left.
    with pytest.raises(RecordError, match="does not fit a row"):
        cut(row_tokens=int(places[3]))


@pytest.mark.parametrize("packing", ["none", "best_fit", "planned"])
def test_conversations_that_do_not_fit_are_left_out_or_cut(
    source, reader, letters, examples, packing
):
    base = PipelineConfig(rows=1, row_tokens=150, row_tiles=10, packing=packing)
    short = [text for text, e in examples.items() if len(e.tokens) <= 150]
    assert 0 < len(short) < len(examples)

    def run(overlong):
        """The texts in the batches, and the numbers of cut and dropped examples."""
        feed = dataset(source, reader, dataclasses.replace(base, overlong=overlong))
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
        list(dataset(source, reader, base))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """24 conversations. The pictures of 4 are truncated or missing."""
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
    reader = reader_of(tiny_config, letters, damaged)
    source = RowSource(damaged, np.arange(24))
    lenient = dataclasses.replace(config, rows=1, max_bad_fraction=0.1)
    data = iter(dataset(source, reader, lenient))
    texts = conversations(list(data), letters)
    assert len(texts) == 20
    told = data.counters.flush()
    assert sum(told["bad_records"].values()) == 4
    assert len(told["bad_records"]) == 2
    assert told["total_examples"] == 20
    with pytest.raises(image.ImageError, match=r"picture 'made/(0|nothing)'"):
        list(dataset(source, reader, dataclasses.replace(lenient, max_bad_fraction=0.0)))
    # The limit is a share of at least a thousand records: 3 of them here.
    with pytest.raises(
        BadRecordsError, match=r"4 of \d+ records are bad, more than .*=0.003: .* x "
    ):
        list(dataset(source, reader, dataclasses.replace(lenient, max_bad_fraction=0.003)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlong": "wrap"}, r"overlong 'wrap' is not one of \('error', 'drop', 'truncate'\)"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction must be in \[0, 1\], not 2.0"),
        ({"rows": 0}, "pipeline.rows must be positive, not 0"),
        ({"max_targets": 0}, "pipeline.max_targets must be positive, not 0"),
    ],
)
def test_a_policy_that_is_unknown(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_an_impossible_packing_is_an_error():
    with pytest.raises(ValueError, match=r"packing 'dense' is not one of \('none', 'bal"):
        PipelineConfig(rows=1, row_tokens=8, row_tiles=1, packing="dense")
    with pytest.raises(ValueError, match="examples_per_row needs"):
        PipelineConfig(rows=1, row_tokens=8, row_tiles=1, examples_per_row=2)


NESTED = "<ima<image>ge> what?"


def stored(directory, faulty):
    """A store of 24 conversations, of which number 7 has been replaced."""
    records = [*CONVERSATIONS[:7], faulty, *CONVERSATIONS[8:]]
    pictures = {"made": iter([picture(i, size) for i, size in enumerate(SIZES)])}
    with pytest.MonkeyPatch.context() as patch:  # as an earlier version wrote it, without checks
        patch.setattr(Conversation, "validate", lambda self: self)
        write_store(
            directory,
            name="made",
            build="python launch/build_data.py made",
            records={"train": ((record, {}) for record in records)},
            images=pictures,
        )
    return RecordStore(directory)


@CONFIGS
def test_a_marker_within_a_marker_is_a_bad_record(tmp_path, tiny_config, letters, config):
    turns = (Turn("user", NESTED), Turn("assistant", "a"))
    faulty = dataclasses.replace(CONVERSATIONS[1], id="faulty", turns=turns)
    with pytest.raises(RecordError, match=r"'faulty', .*\[0\]\.value: marker within a marker"):
        faulty.validate()
    store = stored(tmp_path, faulty)
    reader = reader_of(tiny_config, letters, store, marker_first=True)
    source = RowSource(store, np.arange(24))
    lenient = dataclasses.replace(config, rows=1, max_bad_fraction=0.1)
    data = iter(dataset(source, reader, lenient))
    assert len(conversations(list(data), letters)) == 23
    assert data.counters.flush()["bad_records"] == {"cannot be rendered": 1}
    with pytest.raises(
        RecordError, match=r"'faulty'.* cannot be rendered .an <image> marker within"
    ):
        list(dataset(source, reader, dataclasses.replace(lenient, max_bad_fraction=0.0)))


@CONFIGS
def test_what_ends_an_iterator_does_not_end_the_epoch(source, reader, monkeypatch, config):
    sizes = measure(source, reader, config)
    render = pipeline._render

    def ending(conversation, *args):
        return next(iter(())) if conversation.id == "c5" else render(conversation, *args)

    monkeypatch.setattr(pipeline, "_render", ending)
    with pytest.raises(RuntimeError, match="ended an iterator"):
        list(dataset(source, reader, config, sizes=sizes))


def test_a_stream_that_is_shorter_than_its_plan_is_an_error(source, reader):
    feed = dataset(source, reader)
    assert len(list(feed)) == feed.num_batches == 12
    feed.num_batches += 1
    with pytest.raises(RuntimeError, match="the data ended after 12 of 13 planned batches"):
        list(feed)


def test_an_unknown_loss_mask():
    with pytest.raises(ValueError, match=r"loss_mask 'all' is not one of \('answer', 'pangea'\)"):
        dataclasses.replace(CONFIG, loss_mask="all")


def test_a_record_that_does_not_parse_names_its_shard(tmp_path):
    stored(tmp_path, CONVERSATIONS[7])
    (shard,) = (tmp_path / "records").rglob("*.array_record-*")
    shard.unlink()
    write_shard(shard, [b"\xff\xff", *[b""] * 23], "uncompressed")
    for position, problem in ((0, "DecodeError"), (1, "IndexError")):
        with pytest.raises(
            StoreError, match=rf"damaged at position {position}: no example .{problem}"
        ):
            RecordStore(tmp_path).records("train")[position]
