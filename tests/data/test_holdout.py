"""Records held back for validation: no picture on both sides, exactly the wanted ids, rows of one language."""

import dataclasses
import re

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangea_jax.data import holdout, mixture
from pangea_jax.data.mixture import Mixture
from pangea_jax.data.pipeline import PipelineConfig, RowSource, render_example
from pangea_jax.data.reader import CachedFeatures, Reader

SOURCES = Mixture(None, sources=("emoji/noto",), languages=("en", "sw", "th"))


@pytest.fixture(scope="module")
def usable(emoji_store):
    return mixture.usable(emoji_store.index, SOURCES)


@pytest.fixture(scope="module")
def pictured(emoji_store, usable):
    return usable & np.array(pc.equal(emoji_store.index["kind"], "image"))


def pictures(store, rows):
    return {key for conversation in RowSource(store, rows) for key in conversation.images}


def test_no_picture_is_on_both_sides(emoji_store, usable):
    total = int(usable.sum())
    held = holdout.draw(emoji_store, usable, number=total // 10, seed=0)
    assert 0.97 * (total // 10) <= len(held.rows) <= total // 10
    assert usable[held.rows].all() and held.left_out[held.rows].all()
    rest = np.flatnonzero(usable & ~held.left_out)
    assert len(rest) + len(held.rows) + held.dropped == total
    # Conversations about two drawings chain all of them into one group, of which a tenth is drawn.
    assert 0 < held.dropped < len(held.rows)
    assert pictures(emoji_store, held.rows).isdisjoint(pictures(emoji_store, rest))
    again = holdout.draw(emoji_store, usable, number=total // 10, seed=0)
    np.testing.assert_array_equal(held.rows, again.rows)
    other = holdout.draw(emoji_store, usable, number=total // 10, seed=1)
    assert set(other.rows.tolist()) != set(held.rows.tolist())


@pytest.mark.parametrize("number", [9, 60, 170, 600])
@pytest.mark.parametrize("seed", [0, 1])
def test_texts_and_large_groups_give_their_share(monkeypatch, number, seed):
    # Four sets of 250 records, 8 for a picture, each set chained by pairs of pictures; 250 texts.
    records = [
        tuple(f"{n // 250}/{picture}" for picture in range(n // 8, n // 8 + 1 + (n % 8 == 7)))
        for n in range(1000)
    ] + [()] * 250
    monkeypatch.setattr(holdout, "_pictures", lambda *_: iter(records))
    held = holdout.draw(None, np.ones(1250, bool), number=number, seed=seed)
    *sets, texts = np.bincount(held.rows // 250, minlength=5).tolist()
    assert texts == round(number / 5)
    assert 0.95 * number - 8 <= len(held.rows) <= number
    if number >= 170:  # also where a whole set would have room
        assert min(sets) > 0.1 * number and max(sets) < 0.3 * number


@st.composite
def shown(draw):
    """The pictures of each of some records: chains, copies, pairs, texts."""
    number = draw(st.integers(1, 12))
    pictures = st.lists(st.integers(0, number).map(str), max_size=3).map(tuple)
    return draw(st.lists(pictures, min_size=2, max_size=40))


@given(shown(), st.integers(1, 30), st.integers(0, 3))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_records_are_split_without_a_common_picture(monkeypatch, records, number, seed):
    def read(_, usable):
        return (records[row] for row in np.flatnonzero(usable))

    monkeypatch.setattr(holdout, "_pictures", read)
    usable = np.random.default_rng(seed).random(len(records)) < 0.9
    try:
        held = holdout.draw(None, usable, number=number, seed=seed)
    except ValueError as error:
        fewest = re.search("they show the same pictures, are (\\d+);", str(error))
        refused = "no others are left" in str(error) or not fewest or int(fewest[1]) > number
    else:
        refused = None
    if refused is not None:
        assert refused
        return
    assert 0 < len(held.rows) <= number and len(set(held.rows.tolist())) == len(held.rows)
    assert usable[held.rows].all() and not held.left_out[~usable].any()
    seen = {picture for row in held.rows for picture in records[row]}
    rest = np.flatnonzero(usable & ~held.left_out)
    assert len(rest) and len(rest) + len(held.rows) + held.dropped == usable.sum()
    assert all(seen.isdisjoint(records[row]) for row in rest)
    dropped = np.setdiff1d(np.flatnonzero(held.left_out), held.rows)
    assert all(not seen.isdisjoint(records[row]) for row in dropped)


def test_records_of_one_picture_and_disjoint_pairs_lose_none(monkeypatch):
    records = [(f"a{n // 5}",) for n in range(500)] + [(f"b{n}", f"c{n}") for n in range(500)]
    monkeypatch.setattr(holdout, "_pictures", lambda *_: iter(records))
    held = holdout.draw(None, np.ones(1000, bool), number=100, seed=0)
    assert (len(held.rows), held.dropped) == (100, 0)
    assert (
        30 < np.sum(held.rows < 500) < 95
    )  # groups are drawn evenly: 100 of one kind, 500 of the other


def test_training_draws_none_of_them(emoji_store, usable):
    held = holdout.draw(emoji_store, usable, number=60, seed=0)
    chosen = mixture.choose(emoji_store.index, SOURCES, left_out=held.left_out)
    assert not held.left_out[chosen.rows].any()
    assert len(chosen.rows) == int((usable & ~held.left_out).sum())


def test_epochs_draw_every_record_so_often(emoji_store):
    twice = mixture.choose(
        emoji_store.index, dataclasses.replace(SOURCES, epochs=2, text_ratio=None)
    )
    counts = np.unique(twice.rows, return_counts=True)[1]
    assert set(counts.tolist()) == {2}
    with pytest.raises(ValueError, match="and 1 beside num_examples"):
        dataclasses.replace(SOURCES, num_examples=5, epochs=2)


def test_ids_are_held_back_with_their_pictures(emoji_store, usable):
    first = emoji_store.index["id"].to_pylist()[int(np.flatnonzero(usable)[0])]
    held = holdout.by_ids(emoji_store, usable, (first,))
    assert [emoji_store.index["id"][int(row)].as_py() for row in held.rows] == [first]
    # Its picture has records in the two other languages, which train on neither side.
    assert held.left_out.sum() >= 3
    with pytest.raises(ValueError, match=r"1 of 2 are no record of .*'nothing'"):
        holdout.by_ids(emoji_store, usable, (first, "nothing"))


def test_too_few_and_too_many_are_refused(emoji_store, usable, pictured):
    fewest = 3 * emoji_store.plan.varieties  # a drawing in three languages
    with pytest.raises(ValueError, match=r"they show the same pictures, are \d+; raise") as told:
        holdout.draw(emoji_store, pictured, number=2, seed=0)
    named = int(re.search(r"are (\d+);", str(told.value))[1])
    assert 2 < named <= fewest
    assert len(holdout.draw(emoji_store, pictured, number=named, seed=0).rows) == named
    with pytest.raises(ValueError, match="no others are left to train on"):
        holdout.draw(emoji_store, usable, number=int(usable.sum()), seed=0)


def test_pictures_of_another_store_are_found(emoji_store, usable, pictured):
    mask = holdout.shared_with(emoji_store, usable, emoji_store)
    np.testing.assert_array_equal(mask, pictured)


def test_rows_have_one_language_and_all_records(emoji_store, emoji_tokenizer, pictured):
    rows = holdout.draw(emoji_store, pictured, number=80, seed=0).rows
    views = {key: np.zeros((1, 4, 8), np.float16) for key in pictures(emoji_store, rows)}
    reader = Reader(emoji_tokenizer, CachedFeatures(views))
    config = PipelineConfig(rows=2, row_tokens=512, row_tiles=8)
    found = list(holdout.HeldBack(emoji_store, rows, reader, config))
    names = holdout.HeldBack(emoji_store, rows, reader, config).languages
    assert set(names) == {"en", "sw", "th"}
    examples = [render_example(one, None, reader, config) for one in RowSource(emoji_store, rows)]
    wanted = sorted(tuple(example.tokens.tolist()) for example in examples)
    seen, per_language = [], dict.fromkeys(names, 0)
    for batch, labels in found:
        assert batch.tokens.shape == (2, 512)
        for r in range(2):
            for segment in range(1, int(batch.segment_ids[r].max()) + 1):
                seen.append(tuple(batch.tokens[r][batch.segment_ids[r] == segment].tolist()))
                per_language[names[labels[r]]] += 1
    assert sorted(seen) == wanted
    table = emoji_store.index["language"].to_pylist()
    assert per_language == {name: sum(table[row] == name for row in rows) for name in names}
    # Two processes have the same rows between them.
    halves = [
        list(holdout.HeldBack(emoji_store, rows, reader, config, process_index=p, process_count=2))
        for p in (0, 1)
    ]
    for (batch, labels), *parts in zip(found, *halves, strict=True):
        joined = np.concatenate([part.tokens for part, _ in parts])
        np.testing.assert_array_equal(joined, batch.tokens)
        np.testing.assert_array_equal(np.concatenate([label for _, label in parts]), labels)
