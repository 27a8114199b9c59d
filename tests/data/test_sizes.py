"""The sizes of examples, measured without decoding them, to plan rows."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from pangea_jax.data import chat
from pangea_jax.data.pipeline import RowSource, measure
from tests.data.made import (
    CONFIG,
    CONVERSATIONS,
    PLANNED,
    SIZES,
    conversations,
    dataset,
    reader_of,
)


def test_sizes_are_measured_without_decoding(reader, letters, examples):
    sizes = measure(CONVERSATIONS, reader, CONFIG)
    assert sizes.shape == (24, 3)
    for (tokens, tiles, targets), example in zip(sizes, examples.values(), strict=True):
        assert tokens == len(example.tokens)
        assert tiles == len(example.tiles)
        assert targets == example.weights.sum()


@pytest.fixture(scope="module")
def indexed(store, letters):
    """A source whose index has the columns of PangeaIns."""

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
def test_the_index_plans_without_reading(indexed, store, tiny_config, letters, multi_image):
    reader = reader_of(tiny_config, letters, store, multi_image=multi_image)
    sizes = indexed().indexed_sizes(reader, PLANNED)
    measured = measure(CONVERSATIONS[::-1], reader, PLANNED)
    assert np.array_equal(sizes[:, :2], measured[:, :2])
    planned = list(dataset(indexed(), reader, PLANNED))
    assert len(conversations(planned, letters)) > 15


def test_an_index_of_another_tokenizer_is_noticed(indexed, reader, letters):
    with pytest.raises(
        ValueError, match=r"up to 3 tokens more than num_tokens .* another tokenizer"
    ):
        dataset(indexed(-3), reader, PLANNED)


def test_examples_larger_than_planned_are_dropped_and_counted(source, reader, letters):
    """If the planned sizes are too small, rows still have the right shape."""
    sizes = measure(source, reader, PLANNED)
    sizes[:, 0] //= 2
    data = iter(dataset(source, reader, dataclasses.replace(PLANNED, rows=1), sizes=sizes))
    batches = list(data)
    counted = data.counters.get_state()
    assert counted["dropped"] > 0
    assert counted["dropped"] + counted["examples"] == len(CONVERSATIONS)
    assert len(set(conversations(batches, letters))) == counted["examples"]
