"""The guard detects steps that are not finite, and losses far above the others."""

import logging
from pathlib import Path

import numpy as np
import pytest

from pangea_jax.batch import Batch
from pangea_jax.train.guards import BadStepsError, Guard, GuardConfig, dump_batch

GOOD = {"loss": 2.0, "grad_norm": 1.0, "skipped": 0.0}
BAD = {"loss": np.nan, "grad_norm": np.inf, "skipped": 1.0}


def make():
    dumped = []

    def dump(step, rows):
        dumped.append((step, rows))
        return Path("somewhere.npz")

    return Guard(GuardConfig(max_bad_steps=3), dump), dumped


def test_only_bad_steps_in_a_row_end_the_run(caplog):
    guard, dumped = make()
    for step, metrics in enumerate([BAD, BAD, GOOD, BAD, BAD]):
        guard.check(step, metrics, {"rows": step})
    assert caplog.text.count("no update") == 4
    assert not dumped
    message = (
        r"not finite in 3 steps in a row, the last of them step 5 \(loss nan, gradient norm inf\)"
    )
    with pytest.raises(BadStepsError, match=message + r"; its batch is in somewhere\.npz"):
        guard.check(5, BAD, {"rows": 5})
    assert dumped == [(5, {"rows": 5})]


def test_bad_steps_are_counted_across_a_restart():
    guard, _ = make()
    guard.check(0, BAD, {})
    guard.check(1, BAD, {})
    again, _ = make()
    again.set_state(guard.get_state())
    with pytest.raises(BadStepsError, match="3 steps in a row, the last of them step 2"):
        again.check(2, BAD, {})


def losses(count, seed=0):
    return np.random.default_rng(seed).normal(2.0, 0.1, count)


def test_a_spike_is_noted_and_noise_is_not(caplog):
    guard, _ = make()
    caplog.set_level(logging.WARNING)
    for step, loss in enumerate(losses(200)):
        assert not guard.check(step, GOOD | {"loss": loss}, {})
    assert not caplog.text
    # The standard deviation is 0.1: 2.6 is 6 of them above the mean, 3.2 is 12.
    assert not guard.check(200, GOOD | {"loss": 2.6}, {})
    assert guard.check(201, GOOD | {"loss": 3.2}, {})
    assert "step 201: the loss is 3.200, 1" in caplog.text
    assert "robust standard deviations above the median" in caplog.text
    assert not guard.check(202, GOOD | {"loss": 0.1}, {})


def test_spikes_are_those_of_a_run_without_a_restart():
    values = np.where(np.arange(120) % 31 == 30, 3.5, losses(120))
    whole, _ = make()
    expected = [whole.check(step, GOOD | {"loss": loss}, {}) for step, loss in enumerate(values)]
    assert sum(expected) == 3
    first, _ = make()
    found = [first.check(step, GOOD | {"loss": loss}, {}) for step, loss in enumerate(values[:50])]
    second, _ = make()
    second.set_state(first.get_state())
    found += [
        second.check(step, GOOD | {"loss": loss}, {}) for step, loss in enumerate(values[50:], 50)
    ]
    assert found == expected


def test_a_constant_loss_is_no_reason_to_call_a_little_more_a_spike():
    guard, _ = make()
    assert not any(guard.check(step, GOOD, {}) for step in range(50))
    assert not guard.check(50, GOOD | {"loss": 2.01}, {})
    assert guard.check(51, GOOD | {"loss": 2.5}, {})


def test_the_batch_can_be_looked_at(letters, tmp_path):
    words = letters.encode("hello")
    rows = Batch(
        tokens=np.array([words]),
        weights=np.array([[0, 0, 1, 1, 0]], np.float32),
        image_index=np.full((1, 5), -1),
        segment_ids=np.ones((1, 5), np.int32),
        positions=np.arange(5)[None],
        tiles=np.zeros((1, 1, 4, 4, 3), np.uint8),
    )
    path = dump_batch(rows, 7, letters, 4, tmp_path)
    assert path == tmp_path / "bad_batch_7.npz"
    found = np.load(path, allow_pickle=False)
    kept = {name: value for name, value in vars(rows).items() if value is not None}
    assert found.files == list(kept)
    for name, value in kept.items():
        np.testing.assert_array_equal(found[name], value)
    text = (tmp_path / "bad_batch_7.html").read_text()
    assert "hel" in text
    assert "lo" in text
    assert (tmp_path / "bad_batch_7.png").is_file()
