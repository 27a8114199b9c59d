import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pangea_jax.generate.decode import greedy, last_hidden
from pangea_jax.model import params as model_params

LENGTHS, PROMPT, NEW = (20, 5, 24, 1), 24, 8
NO_STOP = -1  # the id of no token


@pytest.fixture(scope="module")
def batch(tiny_config):
    """Right-padded prompts of different length; the first and third begin with a picture."""
    rng = np.random.default_rng(3)
    shape = (len(LENGTHS), PROMPT)
    inside = np.arange(PROMPT) < np.array(LENGTHS)[:, None]
    index = np.full(shape, -1, np.int32)
    index[[0, 2], :17] = [*range(1, 17), 0]
    return {
        "tokens": rng.integers(4, 100, shape, np.int32) * inside,
        "image_index": index,
        "positions": np.arange(PROMPT, dtype=np.int32) * inside,
        "segment_ids": inside.astype(np.int32),
        "tiles": rng.integers(0, 256, (len(LENGTHS), 1, 16, 16, 3), np.uint8),
    }


@pytest.fixture(scope="module")
def decode(tiny_model, batch):
    graphdef, params = model_params.split(tiny_model)

    @jax.jit
    def run(stop_id):
        model = model_params.merge(graphdef, params)
        hidden, cache = model.prefill(batch, PROMPT + NEW)
        last, lengths = last_hidden(hidden, batch["segment_ids"])
        return greedy(model, last, lengths, cache, max_new_tokens=NEW, stop_id=stop_id), lengths

    return run


@pytest.fixture(scope="module")
def expected(tiny_model, batch):
    """The most likely next token by a full forward pass for every token, no cache."""
    graphdef, params = model_params.split(tiny_model)

    @jax.jit
    def next_tokens(batch, last):
        logits = model_params.merge(graphdef, params)(batch)
        return jnp.argmax(jnp.take_along_axis(logits, last[:, None, None], 1)[:, 0], axis=-1)

    rows, lengths = np.arange(len(LENGTHS)), np.array(LENGTHS)
    grown = {name: np.pad(batch[name], ((0, 0), (0, NEW))) for name in ("tokens", "segment_ids")}
    grown["image_index"] = np.pad(batch["image_index"], ((0, 0), (0, NEW)), constant_values=-1)
    grown["positions"] = np.tile(np.arange(PROMPT + NEW, dtype=np.int32), (len(LENGTHS), 1))
    grown["tiles"] = batch["tiles"]
    found = []
    for step in range(NEW):
        token = np.asarray(next_tokens(grown, lengths + step - 1))
        grown["tokens"][rows, lengths + step] = token
        grown["segment_ids"][rows, lengths + step] = 1
        found.append(token)
    return np.stack(found, axis=1)


def test_equals_repeated_full_passes(decode, expected):
    tokens, lengths = decode(NO_STOP)
    assert np.array_equal(tokens, expected)
    assert lengths.tolist() == list(LENGTHS)
    assert len({tuple(row) for row in expected.tolist()}) == len(LENGTHS)


@pytest.mark.parametrize("place", [0, 2, NEW - 1])
def test_stops_at_the_stop_token_and_goes_on_elsewhere(decode, expected, place):
    stop_id = int(expected[1, place])
    tokens = np.asarray(decode(stop_id)[0])
    for row, free in zip(tokens, expected, strict=True):
        length = free.tolist().index(stop_id) + 1 if stop_id in free else NEW
        assert row[:length].tolist() == free[:length].tolist()
        assert (row[length:] == stop_id).all()


def test_last_hidden_of_an_empty_row_is_finite():
    hidden = jnp.arange(12.0).reshape(2, 3, 2)
    last, lengths = last_hidden(hidden, jnp.array([[1, 1, 0], [0, 0, 0]]))
    assert last.tolist() == [[2, 3], [6, 7]]
    assert lengths.tolist() == [2, 0]
