"""A stopped iterator continues at the same position, or says why it cannot."""

import asyncio
import contextlib
import dataclasses
import json

import numpy as np
import pytest

from pangea_jax.data.feed import RestartError
from pangea_jax.data.pipeline import RowSource
from tests.data.made import (
    ALL,
    BALANCED,
    CONFIG,
    CONFIGS,
    CONVERSATIONS,
    PACKED,
    PLANNED,
    conversations,
    dataset,
    reader_of,
    same,
)


@CONFIGS
def test_a_restored_iterator_gives_the_same_bytes(source, reader, letters, config):
    """After a stop at any step. The saved position is JSON."""
    batches = dataset(source, reader, dataclasses.replace(config, rows=1))
    straight = iter(batches)
    states, expected = [], []
    for _ in range(4):
        states.append(json.loads(json.dumps(straight.get_state())))
        expected.append(next(straight))
    counted = straight.counters.get_state()
    for start, state in enumerate(states):
        again = iter(dataset(source, reader, dataclasses.replace(config, rows=1)))
        next(again)
        again.set_state(state)
        assert all(same(next(again), batch) for batch in expected[start:])
        assert again.counters.get_state() == counted


@pytest.mark.parametrize("config", [PACKED, PLANNED], ids=lambda c: c.packing)
def test_workers_change_nothing_and_restore_to_the_byte(
    store, tiny_config, emoji_tokenizer, config
):
    """The same batches with 0, 1 and 4 worker processes, also if the number changes at a restart."""
    source = RowSource(store, np.arange(len(CONVERSATIONS)))
    reader = reader_of(tiny_config, emoji_tokenizer, store)

    def batches(workers):
        changed = dataclasses.replace(config, rows=1, workers=workers)
        return contextlib.closing(iter(dataset(source, reader, changed)))

    with batches(0) as data:
        expected = [next(data)]
        state = data.get_state()
        expected += list(data)
    assert len(expected) > 2
    if config is PACKED:
        # The position of a stream depends on its number of workers.
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


def test_another_order_is_refused(source, reader, letters):
    state = iter(dataset(source, reader)).get_state()
    with pytest.raises(RestartError, match=r"seed was 5 and is 6. Set the old values again"):
        iter(dataset(source, reader, seed=6)).set_state(state)
    shorter = RowSource(source._store, np.arange(20))
    with pytest.raises(RestartError, match="source was '"):
        iter(dataset(shorter, reader)).set_state(state)
    with pytest.raises(RestartError, match="packing was 'none' and is 'planned'"):
        iter(dataset(source, reader, PLANNED)).set_state(state)
    with pytest.raises(RestartError, match="format None"):
        iter(dataset(source, reader)).set_state({})
    # Settings of speed do not change the order.
    faster = dataclasses.replace(CONFIG, threads=7)
    iter(dataset(source, reader, faster)).set_state(state)


@pytest.mark.parametrize("config", [CONFIG, BALANCED, PLANNED], ids=lambda c: c.packing)
def test_continuing_with_another_number_of_processes_is_exact(
    source, reader, letters, examples, config
):
    """Two processes stop and one continues. Every conversation comes exactly once."""
    one = dataclasses.replace(config, examples_per_row=2 if config is BALANCED else 1)
    pair = [iter(dataset(source, reader, one, process_index=i, process_count=2)) for i in range(2)]
    seen = []
    for _ in range(2):
        seen += conversations([next(process) for process in pair], letters)
    alone = iter(dataset(source, reader, one))
    alone.set_state(pair[1].get_state())
    seen += conversations(list(alone), letters)
    assert len(seen) == len(set(seen))
    whole = conversations(list(dataset(source, reader, one)), letters)
    assert sorted(seen) == sorted(whole)
    assert set(whole) <= set(examples)


def test_a_stream_refuses_another_number_of_processes(source, reader, letters):
    config = dataclasses.replace(PACKED, packing_bins=1)

    def make(count, **changes):
        return iter(dataset(source, reader, config, process_count=count, **changes))

    two = make(2)
    next(two)
    state = two.get_state()
    with pytest.raises(RestartError, match=r"process_count was 2 and is 1.*approximate_restart"):
        make(1).set_state(state)
    near = make(1, approximate_restart=True)
    near.set_state(state)
    left = conversations(list(near), letters)
    # After two processes have each given out `n` conversations, one continues after about 2 n.
    handed_out = 2 * state["counters"]["examples"]
    assert 0 < len(left) <= len(CONVERSATIONS) - handed_out


@pytest.mark.parametrize("now", ALL, ids=lambda c: c.packing)
@pytest.mark.parametrize("was", ALL, ids=lambda c: c.packing)
def test_near_the_same_place_with_another_packing(source, reader, letters, was, now):
    before = iter(dataset(source, reader, was))
    next(before)
    after = iter(dataset(source, reader, now, approximate_restart=True))
    after.set_state(before.get_state())
    assert 0 < len(conversations(list(after), letters)) < len(CONVERSATIONS)


def test_a_checkpoint_of_two_processes_is_read_by_one(tmp_path, source, reader, letters):
    batches = [
        iter(dataset(source, reader, PLANNED, process_index=i, process_count=2)) for i in range(2)
    ]
    for i, process in enumerate(batches):
        next(process)
        (tmp_path / f"process_{i}-of-2.json").write_text(json.dumps(process.get_state()))
    alone = iter(dataset(source, reader, PLANNED))

    async def load(directory):
        await (await alone.load(directory))

    with pytest.raises(RestartError, match="has no saved position of the data"):
        asyncio.run(load(tmp_path / "empty"))
    asyncio.run(load(tmp_path))
    whole = iter(dataset(source, reader, PLANNED))
    next(whole)
    counted, wanted = (data.counters.flush() for data in (alone, whole))
    assert counted == wanted
    expected = list(whole)
    assert expected
    assert all(map(same, alone, expected))
