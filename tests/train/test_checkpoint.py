import dataclasses

import jax
import numpy as np
import pytest

from pangea_jax import sharding
from pangea_jax.data.pipeline import CachedViews, PipelineConfig, train_dataset
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.train.checkpoint import Checkpoints
from pangea_jax.train.optimizer import OptimizerConfig, make_optimizer
from pangea_jax.train.state import init_state
from pangea_jax.train.step import make_train_step

STEPS, SAVED_AT = 6, 3
CLOCK = {"compile": 1.5, "steps": 20.25}


def conversation(number):
    turns = (Turn("user", f"<image>{number}?"), Turn("assistant", f"a{number}"))
    return Conversation(f"c{number}", "made", "en", "", (f"made/{number % 5}",), turns)


class Run:
    """Everything a training process builds from its configuration."""

    def __init__(self, config, letters, sizes=(1, 8, 1)):
        config = dataclasses.replace(config, pinpoints=())
        self.mesh = sharding.make_mesh(*sizes)
        rng = np.random.default_rng(0)
        views = {f"made/{i}": rng.normal(size=(4, 16, 32)).astype(np.float16) for i in range(5)}
        self.data = iter(
            train_dataset(
                [conversation(number) for number in range(8 * STEPS)],
                letters,
                CachedViews(views),
                PipelineConfig(rows=8, row_tokens=96, row_tiles=1),
                seed=0,
            )
        )
        optimizer = make_optimizer(OptimizerConfig(1e-2, weight_decay=0.1), STEPS)
        graphdef, self.state, self.shardings = init_state(
            config, optimizer, self.mesh, seed=0, frozen=(r"vision\..*",)
        )
        self._step = make_train_step(graphdef, optimizer, self.shardings, self.mesh)
        self.batches = []

    @property
    def abstract(self):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.state,
            self.shardings,
        )

    def train(self, steps):
        for _ in range(steps):
            self.batches.append(next(self.data))
            batch = sharding.to_global(self.batches[-1], self.mesh)
            self.state, self.metrics = self._step(self.state, batch)
        return self


def equal(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def interrupted(tiny_config, letters, tmp_path_factory):
    """A run that saves half-way and goes on at once, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.latest_step is None
    run = Run(tiny_config, letters).train(SAVED_AT)
    half = jax.device_get(run.state)
    checkpoints.save(run.state, run.data, CLOCK)
    # The file is still being written while the state is donated and the iterator moves on.
    run.train(STEPS - SAVED_AT)
    checkpoints.close()
    return run, half, folder


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(interrupted, tiny_config, letters):
    straight, _, folder = interrupted
    resumed = Run(tiny_config, letters)
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.latest_step == SAVED_AT
    resumed.state, clock = checkpoints.restore(resumed.abstract, resumed.data)
    checkpoints.close()
    assert clock == CLOCK
    assert int(resumed.state.step) == SAVED_AT
    resumed.train(STEPS - SAVED_AT)
    for ours, theirs in zip(resumed.batches, straight.batches[SAVED_AT:], strict=True):
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert equal(resumed.state, straight.state)
    assert equal(resumed.metrics, straight.metrics)
    with pytest.raises(StopIteration):
        next(resumed.data)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_another_mesh_restores_the_same_values(interrupted, tiny_config, letters, sizes):
    _, half, folder = interrupted
    other = Run(tiny_config, letters, sizes)
    checkpoints = Checkpoints(folder, keep=2)
    state, _ = checkpoints.restore(other.abstract, other.data)
    checkpoints.close()
    assert equal(state, half)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(other.abstract), strict=True):
        assert leaf.sharding == wanted.sharding


def test_only_the_newest_are_kept(tmp_path, tiny_config, letters):
    run = Run(tiny_config, letters)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 4):
        run.state = run.state.replace(step=jax.device_put(np.int32(step), run.shardings.step))
        checkpoints.save(run.state, run.data, CLOCK)
    checkpoints.save(run.state, run.data, CLOCK)  # the same step again is no error
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 3]
    assert Checkpoints(tmp_path, keep=2).latest_step == 3
