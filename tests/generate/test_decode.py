import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pangea_jax.batch import Batch
from pangea_jax.generate.decode import (
    Sampling,
    advance,
    begin,
    choose,
    complete,
    idle,
    insert,
    keep_likely,
    last_hidden,
)
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
    return Batch(
        tokens=rng.integers(4, 100, shape, np.int32) * inside,
        image_index=index,
        positions=np.arange(PROMPT, dtype=np.int32) * inside,
        segment_ids=inside.astype(np.int32),
        tiles=rng.integers(0, 256, (len(LENGTHS), 1, 16, 16, 3), np.uint8),
    )


@pytest.fixture(scope="module")
def decode(tiny_model, batch):
    graphdef, params = model_params.split(tiny_model)

    @jax.jit
    def run(stop_id):
        model = model_params.merge(graphdef, params)
        hidden, cache = model.prefill(batch, PROMPT + NEW)
        last, lengths = last_hidden(hidden, batch.segment_ids)
        settings = {"max_new_tokens": NEW, "stop_ids": jnp.array([stop_id])}
        return complete(model, last, lengths, cache, **settings), lengths

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
    room = ((0, 0), (0, NEW))
    grown = Batch(
        tokens=np.pad(batch.tokens, room),
        image_index=np.pad(batch.image_index, room, constant_values=-1),
        positions=np.tile(np.arange(PROMPT + NEW, dtype=np.int32), (len(LENGTHS), 1)),
        segment_ids=np.pad(batch.segment_ids, room),
        tiles=batch.tiles,
    )
    found = []
    for step in range(NEW):
        token = np.asarray(next_tokens(grown, lengths + step - 1))
        grown.tokens[rows, lengths + step] = token
        grown.segment_ids[rows, lengths + step] = 1
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


def make_sampling(rows, **settings):
    return jax.tree.map(jnp.asarray, Sampling.make(rows, **settings))


FILTERS = [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.6), (0, 0.05), (0, 0.0), (7, 0.9), (500, 0.99)]


@pytest.fixture(scope="module")
def logits():
    """Float32 logits of 64 rows and 200 tokens, no two of a row alike."""
    rng = np.random.default_rng(1)
    values = np.stack([rng.permutation(200) for _ in range(64)]) / 20 * rng.uniform(0.2, 3, (64, 1))
    return values.astype(np.float32)


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_filters_equal_numpy(logits, top_k, top_p):
    found = np.asarray(
        keep_likely(jnp.asarray(logits), jnp.full(64, top_k), jnp.full(64, top_p, jnp.float32))
    )
    for row, ours in zip(logits.astype(np.float64), found, strict=True):
        order = np.argsort(-row)[: top_k or None]
        probabilities = np.exp(row[order]) / np.exp(row[order]).sum()
        likelier = np.cumsum(probabilities) - probabilities
        kept = order[(likelier < top_p) | (np.arange(len(order)) == 0)]
        assert set(np.flatnonzero(np.isfinite(ours))) == set(kept)
        assert (ours[kept] == row[kept].astype(np.float32)).all()


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_filters_equal_transformers(logits, top_k, top_p):
    torch = pytest.importorskip("torch", reason="torch is in requirements-parity.txt")
    warpers = pytest.importorskip(
        "transformers.generation.logits_process",
        reason="transformers is in requirements-parity.txt",
    )
    expected = warpers.TemperatureLogitsWarper(0.7)(None, torch.tensor(logits))
    if top_k:
        expected = warpers.TopKLogitsWarper(top_k)(None, expected)
    expected = warpers.TopPLogitsWarper(top_p)(None, expected).softmax(-1).numpy()
    scaled = jnp.asarray(logits) / jnp.float32(0.7)
    kept = keep_likely(scaled, jnp.full(64, top_k), jnp.full(64, top_p, jnp.float32))
    np.testing.assert_allclose(jax.nn.softmax(kept, axis=-1), expected, atol=1e-6)


def test_ties_at_the_edge_all_stay():
    logits = jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for top_k, top_p in ((2, 1.0), (0, 0.6)):
        kept = keep_likely(logits, jnp.array([top_k]), jnp.array([top_p], jnp.float32))
        assert np.isfinite(kept).tolist() == [[True, True, True, True, False]]


def test_draws_follow_the_filtered_distribution():
    draws = 20_000
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    sampling = make_sampling(
        draws, temperature=0.5, top_k=3, top_p=0.95, seed=np.arange(draws, dtype=np.uint32)
    )
    drawn = jax.jit(choose)(jnp.tile(logits, (draws, 1)), sampling, 0)
    # Temperature 0.5 squares: 16 : 9 : 4 of the three that stay.
    expected = np.array([16, 9, 4, 0]) / 29
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(np.bincount(drawn, minlength=4) / draws - expected) <= 4 * deviation).all()


def test_each_row_has_its_own_settings(logits):
    settings = {
        "temperature": [0.0, 1.0, 1.0, 1.0],
        "top_k": [0, 1, 0, 0],
        "top_p": [1.0, 1.0, 0.0, 1.0],
        "seed": [1, 2, 3, 4],
    }
    draw = jax.jit(jax.vmap(choose, in_axes=(None, None, 0)))
    drawn = np.asarray(draw(logits[:4], make_sampling(4, **settings), np.arange(40)))
    likeliest = logits[:4].argmax(axis=1)
    assert (drawn[:, :3] == likeliest[:3]).all()
    assert len(set(drawn[:, 3].tolist())) > 5


@pytest.fixture(scope="module")
def sample_rows(tiny_model, batch):
    """Sampled tokens of some of the batch's rows, by seed."""
    graphdef, params = model_params.split(tiny_model)

    @jax.jit
    def run(batch, sampling):
        model = model_params.merge(graphdef, params)
        hidden, cache = model.prefill(batch, PROMPT + NEW)
        last, lengths = last_hidden(hidden, batch.segment_ids)
        stop_ids = jnp.array([NO_STOP])
        return complete(
            model, last, lengths, cache, max_new_tokens=NEW, stop_ids=stop_ids, sampling=sampling
        )

    def rows(which, seeds):
        chosen = batch[np.array(which)]
        sampling = make_sampling(len(which), temperature=1.5, top_k=50, seed=seeds)
        return np.asarray(run(chosen, sampling)).tolist()

    return rows


def test_a_row_draws_the_same_in_any_batch(sample_rows):
    together = sample_rows((0, 1, 2, 3), (10, 11, 12, 10))
    assert sample_rows((3, 2), (10, 12)) == [together[3], together[2]]
    assert sample_rows((1,), (11,)) == [together[1]]
    assert sample_rows((1,), (12,)) != [together[1]]
    assert sample_rows((1, 1), (5, 6))[0] != sample_rows((1, 1), (5, 6))[1]


def test_steps_one_by_one_equal_all_at_once(tiny_model, batch, expected):
    """Several stop ids, a limit below the shape, and a row that is empty."""
    batch = jax.tree.map(lambda rows: np.concatenate([rows, np.zeros_like(rows[:1])]), batch)
    stop_ids = jnp.array([expected[0, 3], expected[2, 1]])
    limit = NEW - 2
    graphdef, params = model_params.split(tiny_model)
    model = functools.partial(model_params.merge, graphdef)

    @jax.jit
    def prefill(params):
        hidden, cache = model(params).prefill(batch, PROMPT + NEW)
        return *last_hidden(hidden, jnp.asarray(batch.segment_ids)), cache

    settings = {"limit": limit, "stop_ids": stop_ids}
    first = jax.jit(
        lambda params, *start: begin(model(params), *start, max_new_tokens=NEW, **settings)
    )
    step = jax.jit(lambda params, state: advance(model(params), state, steps=1, **settings))
    run = jax.jit(lambda params, state: advance(model(params), state, steps=NEW, **settings))
    state = first(params, *prefill(params))
    at_once = np.asarray(run(params, state).tokens)

    def end_of(free):
        ends = [i + 1 for i, token in enumerate(free[:limit]) if token in stop_ids]
        return min(ends, default=limit)

    for row, free in zip(at_once, expected, strict=False):
        end = end_of(free)
        assert row[:end].tolist() == free[:end].tolist()
        assert (row[end:] == stop_ids[0]).all()
    assert (at_once[-1] == stop_ids[0]).all()
    steps = 1
    while not state.done.all():
        state = step(params, state)
        steps += 1
    assert steps == limit
    assert np.array_equal(state.tokens, at_once)
    assert state.chosen.tolist()[:-1] == [end_of(row) for row in expected.tolist()]


def test_rows_take_turns(tiny_model, batch, expected):
    """Five prompts through two rows, which never begin together: each enters where another has ended."""
    graphdef, params = model_params.split(tiny_model)
    model = functools.partial(model_params.merge, graphdef)
    settings = {"limit": NEW, "stop_ids": jnp.array([NO_STOP])}

    @jax.jit
    def read(params, row):
        hidden, cache = model(params).prefill(row, PROMPT)
        start = *last_hidden(hidden, jnp.asarray(row.segment_ids)), cache
        return begin(model(params), *start, max_new_tokens=NEW, **settings)

    step = jax.jit(lambda params, state: advance(model(params), state, steps=3, **settings))
    cache = tiny_model.language.empty_cache(2, PROMPT + 4 + NEW, tiny_model.config.dtype)
    state = idle(cache, NEW, NO_STOP)
    waiting, rows, found, rounds = [0, 1, 2, 3, 0], [None, None], [], 0
    while waiting or any(row is not None for row in rows):
        for place, row in enumerate(rows):
            if row is None and waiting and (place == 0 or rounds):
                rows[place] = waiting.pop(0)
                begun = read(params, batch[rows[place]][None])
                # The second of the two is no row of the batch.
                begun = jax.tree.map(
                    lambda x: jnp.concatenate([x, x], x.ndim == 5) if x.ndim else x, begun
                )
                state = insert(state, begun, jnp.array([place, 2]))
        state = step(params, state)
        rounds += 1
        for place, row in enumerate(rows):
            if row is not None and state.done[place]:
                found.append((row, state.tokens[place].tolist()))
                rows[place] = None
    assert sorted(row for row, _ in found) == [0, 0, 1, 2, 3]
    for row, tokens in found:
        assert tokens == expected[row].tolist()


def test_nothing_of_a_rows_former_occupant_is_left(tiny_model, batch, expected):
    """Neither its NaN, nor that of a stop id beyond the vocabulary, which an idle row goes on with."""
    graphdef, params = model_params.split(tiny_model)
    beyond = 10**6
    settings = {"limit": NEW, "stop_ids": jnp.array([beyond])}

    @jax.jit
    def answer(params, row, state):
        model = model_params.merge(graphdef, params)
        hidden, cache = model.prefill(row, PROMPT)
        start = *last_hidden(hidden, jnp.asarray(row.segment_ids)), cache
        begun = begin(model, *start, max_new_tokens=NEW, **settings)
        return advance(model, insert(state, begun, jnp.array([1])), steps=NEW, **settings)

    cache = tiny_model.language.empty_cache(2, PROMPT + 4 + NEW, tiny_model.config.dtype)
    k, v = (x.at[..., 1, :, :, :].set(jnp.nan) for x in (cache.k, cache.v))
    state = idle(cache.replace(k=k, v=v), NEW, beyond)
    found = answer(params, batch[1][None], state)
    assert found.tokens[1].tolist() == expected[1].tolist()
    assert np.isfinite(found.cache.k).all() and np.isfinite(found.cache.v).all()


def test_unstacked_layers_compute_the_same(tiny_config, tiny_model):
    copy = model_params.merge(*model_params.split(jax.tree.map(jnp.copy, tiny_model)))
    copy.language.unstack()
    assert len(copy.language.blocks) == tiny_config.language.layers
    tokens = jnp.arange(4, 20)[None]
    where = (jnp.arange(16)[None], jnp.ones((1, 16), jnp.int32))
    run = jax.jit(lambda decoder: decoder(decoder.embed(tokens, jnp.float32), *where))
    ours, theirs = run(copy.language), run(tiny_model.language)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_copies_no_cache(tiny_config, tiny_model, rows):
    """On a CPU, where reading a long cache takes longer than all the rest of one row's step."""
    model = model_params.merge(*model_params.split(jax.tree.map(jnp.copy, tiny_model)))
    model.language.unstack()
    graphdef, params = model_params.split(model)
    state = idle(model.language.empty_cache(rows, 1024 + NEW, tiny_config.dtype), NEW, NO_STOP)
    settings = {"steps": NEW, "limit": NEW, "stop_ids": jnp.array([NO_STOP])}

    def step(params, state):
        return advance(model_params.merge(graphdef, params), state, **settings)

    program = jax.jit(step, donate_argnums=1).lower(params, state).compile().as_text()
    assert f",{1024 + NEW}," in program
    assert not re.findall(rf"= f32\[[\d,]*{1024 + NEW}[\d,]*\]\S* copy\(", program)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature -1 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature nan must be"),
        ({"temperature": "hot"}, "temperature 'hot' is not a number"),
        ({"top_p": 1.5}, "top_p 1.5 must be within 0 and 1"),
        ({"top_k": -3}, "top_k -3 must be 0"),
        ({"top_k": 1.5}, "top_k 1.5 is not whole"),
        ({"seed": -1}, "seed -1 must be within"),
        ({"seed": [1, 2]}, "seed: 2 values for 3 rows"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling.make(3, **settings)
