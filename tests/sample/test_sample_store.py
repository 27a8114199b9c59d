import pickle
import time
from collections import Counter

import numpy as np
import pytest

from pangea_jax import languages
from pangea_jax.data import mixture
from pangea_jax.data.pipeline import RowSource
from pangea_jax.sample import emoji
from pangea_jax.sample.conversations import Plan
from pangea_jax.sample.sample_store import SampleStore

SMALL = Plan(varieties=2)


@pytest.fixture(scope="module")
def store():
    return SampleStore(SMALL)


@pytest.fixture(scope="module")
def concepts():
    return emoji.load_concepts()


def test_files_are_intact(store):
    store.verify()


def test_splits_hold_the_artists_they_name(store):
    artists = {"train": set(emoji.TRAIN_ARTISTS) | {"cldr"}}
    artists |= {"dev_artwork": {"openmoji"}, "unseen_artwork": {"twemoji"}}
    pairs = store.index.group_by(["split", "source"]).aggregate([]).to_pylist()
    found = {split: set() for split in store.splits}
    for pair in pairs:
        found[pair["split"]].add(pair["source"].removeprefix("emoji/"))
    assert found == artists


def test_every_drawing_has_all_varieties_in_every_language(store, concepts):
    index, drawings = store.index, store.image_index.num_rows
    assert len(index["id"].unique()) == len(index)
    counts = index.group_by(["language", "kind"]).aggregate([("id", "count")]).to_pylist()
    found = {(row["language"], row["kind"]): row["id_count"] for row in counts}
    others = len(languages.EMOJI) - 1
    assert found == {
        (code, kind): number
        for code in languages.EMOJI
        for kind, number in (
            ("image", drawings * SMALL.varieties),
            ("text", len(concepts) * others),
        )
    }


def test_records_say_what_the_index_says(store, concepts):
    by_codepoint = {concept.codepoint: concept for concept in concepts}
    for split in store.splits:
        rows = store.index.filter(np.array(store.index["split"]) == split)
        source = store.records(split)
        assert rows["position"].to_pylist() == list(range(len(source)))
        places = [*range(0, len(source), 4999), len(source) - 1]
        for row in rows.take(places).to_pylist():
            record, concept = source[row["position"]].validate(), by_codepoint[row["concept"]]
            for name in ("id", "source", "language", "category", "kind"):
                assert getattr(record, name) == row[name]
            assert record.category == concept.category
            if record.images:
                artist = record.source.removeprefix("emoji/")
                assert f"{artist}/{concept.codepoint}" in record.images
                assert record.id.endswith(f"/{row['variety']}")
                assert all(len(store.image(key)) for key in record.images)
            else:
                question, answer = (turn.text for turn in record.turns)
                assert answer == concept.names[record.language]
                assert concept.names[row["source_language"]] in question
                assert row["source_language"] != record.language


def test_positions_count_from_both_ends(store):
    records = store.records("dev_artwork")
    assert records[-1] == records[len(records) - 1]
    assert records[np.int64(5)] == records[5]
    with pytest.raises(IndexError, match="split 'dev_artwork', which has"):
        records[len(records)]
    with pytest.raises(KeyError, match="no split 'test'"):
        store.records("test")


def test_a_reading_worker_gets_little_and_reads_the_same(store):
    rows = np.arange(0, len(store.index), 30_011)
    source = RowSource(store, rows)
    first = source[0]  # what is looked up on first use does not travel
    packed = pickle.dumps(source)
    assert len(packed) < 100_000
    copy = pickle.loads(packed)
    assert copy[0] == first
    assert [copy[i] for i in range(len(rows))] == [source[i] for i in range(len(rows))]
    assert pickle.loads(pickle.dumps(store)).index.equals(store.index)


def test_the_index_is_made_in_well_under_a_second():
    store = SampleStore()
    start = time.process_time()  # other work on the machine does not count
    rows = len(store.index)
    assert time.process_time() - start < 2
    assert rows > 800_000


def test_repeated_drawing_gives_other_conversations():
    store = SampleStore()
    wanted = mixture.Mixture(
        num_examples=2 * 283, languages=("sw",), sources=("emoji/noto",), text_ratio=0.0
    )
    choice = mixture.choose(store.index, wanted, seed=1)
    source = RowSource(store, choice.rows)
    assert len({source[i].id for i in range(len(source))}) == 2 * 283
    repeated = Counter(source[i].images[0] for i in range(len(source)))
    assert max(repeated.values()) > 1


def test_the_plan_decides():
    short = SampleStore(Plan(varieties=1, two_pictures=0, other_words=0, is_it=0, letter=0, kind=0))
    records = short.records("unseen_artwork")
    assert len(records) == 283 * 38
    assert all(len(records[i].turns) == 2 for i in range(0, len(records), 97))
