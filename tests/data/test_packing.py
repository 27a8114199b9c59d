"""Plans of rows are complete, within capacity and tight. tests/data/test_pipeline.py tests how rows are filled."""

import numpy as np
import pytest

from pangea_jax.data.packing import balance, plan_batches, plan_rows

CAPACITY = (8192, 20, 8192)


# Quantiles of the number of tokens in the official sample of PangeaIns.
SHARES, TOKENS = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1), (151, 1208, 1738, 2354, 2703, 2986, 4015)


def lengths(count, seed=0):
    """Random (tokens, tiles, targets); the tokens are distributed as in PangeaIns."""
    rng = np.random.default_rng(seed)
    tokens = np.interp(rng.random(count), SHARES, TOKENS).astype(int)
    tiles = np.where(tokens < 1000, 0, np.where(tokens < 2000, 3, 5))
    return np.stack([tokens, tiles, rng.integers(1, 150, count)], axis=1)


def rows_of(plan):
    return [plan[row].tolist() for row in range(len(plan))]


@pytest.mark.parametrize("window", [1, 64, 4096])
def test_a_plan_holds_every_example_once_and_no_row_overflows(window):
    sizes = lengths(3000)
    sizes[::50] = 0
    rows = rows_of(plan_rows(sizes, CAPACITY, seed=1, window=window))
    assert sorted(i for row in rows for i in row) == np.flatnonzero(sizes[:, 0]).tolist()
    assert all((sizes[row].sum(axis=0) <= CAPACITY).all() for row in rows)
    assert all(rows)


def test_a_plan_uses_97_percent_of_the_tokens():
    sizes = lengths(8192)
    plan = plan_rows(sizes, CAPACITY, seed=0, window=4096)
    assert sizes[:, 0].sum() / (len(plan) * CAPACITY[0]) > 0.97


def test_best_fit_by_brute_force():
    """In one window: the longest first, each to the open row with the fewest tokens left after it."""
    sizes = lengths(200, seed=3)
    capacity = (6200, 9, 200)
    order = np.random.default_rng(7).permutation(200)
    room, expected = [], []
    for i in sorted(order, key=lambda i: -sizes[i, 0]):
        fitting = [r for r, left in enumerate(room) if (left >= sizes[i]).all()]
        if not fitting:
            room.append(np.array(capacity))
            expected.append([])
            fitting = [len(room) - 1]
        best = min(fitting, key=lambda r: (*room[r].tolist(), r))
        room[best] = room[best] - sizes[i]
        expected[best].append(i)
    plan = plan_rows(sizes, capacity, seed=7, window=1000)
    assert sorted(rows_of(plan)) == sorted(expected)


def test_the_seed_decides_and_a_window_keeps_the_order_loose():
    sizes = lengths(2000)

    def members(seed, window=100):
        return plan_rows(sizes, CAPACITY, seed=seed, window=window).members

    assert np.array_equal(members(1), members(1))
    assert not np.array_equal(members(1), members(2))
    shuffled = np.random.default_rng(1).permutation(2000)
    place = np.empty(2000, int)
    place[shuffled] = np.arange(2000)
    assert np.abs(place[members(1)] - np.arange(2000)).max() < 100
    # The rows of a window are shuffled, so long and short examples are mixed.
    tokens = sizes[members(1, window=2000), 0].reshape(20, 100).mean(axis=1)
    assert tokens.std() < 0.25 * tokens.mean()


def test_an_example_larger_than_a_row_is_an_error():
    sizes = lengths(10)
    sizes[4] = (9000, 3, 5)
    with pytest.raises(ValueError, match=r"1 examples are larger .* number 4 with \[9000, 3, 5\]"):
        plan_rows(sizes, CAPACITY, seed=0, window=8)


def test_balanced_rows_by_hand():
    sizes = [(n, 1, n) for n in (9, 5, 4, 8, 1, 3)]
    # The longest first, each to the row with the most room.
    assert balance(sizes, 2, (16, 4, 16)) == [[0, 2, 5], [3, 1, 4]]
    assert balance([(5, 1, 5)] * 6, 2, (16, 2, 16)) is None


def test_planned_batches_have_the_right_number_of_examples_and_fit():
    rng = np.random.default_rng(0)
    tokens = rng.integers(30, 90, 1603)
    tokens[::101] = 0  # left out
    sizes = np.stack([tokens, rng.integers(0, 2, 1603), tokens // 4], axis=1)
    capacity = (150, 3, 36)
    plan = plan_batches(sizes, capacity, rows=4, examples=8, seed=3)
    used = np.flatnonzero(tokens > 0)
    assert len(plan) == 4 * (len(used) // 8)
    assert len(set(plan.members.tolist())) == len(plan.members) == len(used) // 8 * 8
    assert set(plan.members.tolist()) <= set(used.tolist())
    for batch in range(len(plan) // 4):
        rows = [plan[row] for row in range(4 * batch, 4 * batch + 4)]
        assert sum(map(len, rows)) == 8
        for row in rows:
            assert (sizes[row].sum(axis=0) <= capacity).all()
    # Without exchanges, some batches do not fit.
    shuffled = np.random.default_rng(3).permutation(used)[: len(plan.members)].reshape(-1, 8)
    assert any(balance(sizes[batch].tolist(), 4, capacity) is None for batch in shuffled)
    again = plan_batches(sizes, capacity, rows=4, examples=8, seed=3)
    np.testing.assert_array_equal(again.members, plan.members)


def test_batches_that_cannot_fit_are_an_error():
    with pytest.raises(ValueError, match=r"6 conversations do not fit 2 rows .* raise pipeline"):
        plan_batches(np.full((24, 3), 6), (16, 16, 16), rows=2, examples=6, seed=0)
