import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from pangea_jax import sharding
from pangea_jax.checkpoints import CheckpointError
from pangea_jax.data.feed import RestartError
from pangea_jax.data.pipeline import PipelineConfig, train_dataset
from pangea_jax.data.reader import CachedFeatures, Reader
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.train.optimizer import OptimizerConfig, make_optimizer
from pangea_jax.train.resume import Checkpoints, bit_sums
from pangea_jax.train.state import init_state
from pangea_jax.train.step import make_train_step

STEPS, SAVED_AT = 6, 3
PROGRESS = {"clock": {"compile": 1.5, "steps": 20.25}, "window": [None, 1]}


def conversation(number):
    turns = (Turn("user", f"<image>{number}?"), Turn("assistant", f"a{number}"))
    return Conversation(f"c{number}", "made", "en", "", (f"made/{number % 5}",), turns)


class Run:
    """Everything a training process builds from its configuration."""

    def __init__(self, config, letters, sizes=(1, 8, 1), examples=8 * STEPS):
        config = dataclasses.replace(config, pinpoints=())
        self.mesh = sharding.make_mesh(*sizes)
        rng = np.random.default_rng(0)
        views = {f"made/{i}": rng.normal(size=(4, 16, 32)).astype(np.float16) for i in range(5)}
        self.data = iter(
            train_dataset(
                [conversation(number) for number in range(examples)],
                Reader(letters, CachedFeatures(views)),
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
            batch = self.batches[-1].place(self.mesh)
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
    checkpoints.save(run.state, run.data, PROGRESS)
    # The file is still being written while the state is donated and the iterator moves on.
    run.train(STEPS - SAVED_AT)
    checkpoints.close()
    return run, half, folder


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(interrupted, tiny_config, letters):
    straight, _, folder = interrupted
    resumed = Run(tiny_config, letters)
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.latest_step == SAVED_AT
    resumed.state, progress = checkpoints.restore(resumed.abstract, resumed.data)
    checkpoints.close()
    assert progress == PROGRESS
    assert int(resumed.state.step) == SAVED_AT
    resumed.train(STEPS - SAVED_AT)
    for ours, theirs in zip(resumed.batches, straight.batches[SAVED_AT:], strict=True):
        assert equal(ours, theirs)
    assert equal(resumed.state, straight.state)
    assert equal(resumed.metrics, straight.metrics)
    with pytest.raises(StopIteration):
        next(resumed.data)


def test_a_checkpoint_without_the_base_resumes_bit_for_bit_on_it(
    interrupted, tiny_config, letters, tmp_path
):
    straight, _, _ = interrupted
    run = Run(tiny_config, letters).train(SAVED_AT)
    with Checkpoints(tmp_path, keep=2, base="a tower") as checkpoints:
        checkpoints.save(run.state, run.data, PROGRESS)
    resumed = Run(tiny_config, letters)
    checkpoints = Checkpoints(tmp_path, keep=2, base="a tower")
    frozen = resumed.state.frozen
    resumed.state, _ = checkpoints.restore(resumed.abstract, resumed.data, frozen)
    resumed.train(STEPS - SAVED_AT)
    assert equal(resumed.state, straight.state)
    sizes = [
        sum(f.stat().st_size for f in d.rglob("*") if f.is_file())
        for d in (tmp_path, interrupted[2])
    ]
    assert sizes[0] < sizes[1]
    changed = {name: value + 1 for name, value in Run(tiny_config, letters).state.frozen.items()}
    with pytest.raises(
        CheckpointError, match="was trained on a tower, whose weights are now others"
    ):
        checkpoints.restore(resumed.abstract, resumed.data, changed)
    assert checkpoints.latest_step == SAVED_AT  # it is not set aside as damaged


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


def save_steps(run, folder, steps, **kept):
    checkpoints = Checkpoints(folder, **kept)
    for step in steps:
        run.state = run.state.replace(step=jax.device_put(np.int32(step), run.shardings.step))
        checkpoints.save(run.state, run.data, PROGRESS)
    checkpoints.save(run.state, run.data, PROGRESS)  # the same step again is no error
    checkpoints.close()


@pytest.mark.parametrize(
    ("keep_every", "left"), [(None, [5, 6]), (2, [2, 4, 5, 6]), (4, [4, 5, 6])]
)
def test_the_newest_and_every_nth_are_kept(run, tmp_path, keep_every, left):
    save_steps(run, tmp_path, range(1, 7), keep=2, keep_every=keep_every)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == left
    assert Checkpoints(tmp_path, keep=2).latest_step == 6


def test_the_best_is_kept_until_another_is(run, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 7):
        run.state = run.state.replace(step=jax.device_put(np.int32(step), run.shardings.step))
        checkpoints.keep_best(2 if step < 5 else 5)
        checkpoints.save(run.state, run.data, PROGRESS)
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [5, 6]


@pytest.fixture(scope="module")
def run(tiny_config, letters):
    return Run(tiny_config, letters)


@pytest.fixture(scope="module")
def two_steps(run, tmp_path_factory):
    """A folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save_steps(run, folder, (1, 2), keep=2)
    return folder


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(file):
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    half = slice(len(content) // 2, None)
    content[half] = np.random.default_rng(0).integers(0, 256, content[half].size, np.uint8)
    file.write_bytes(content.tobytes())


def largest(pattern):
    return lambda folder: max(folder.glob(pattern), key=lambda file: file.stat().st_size)


ARRAYS = largest("state/ocdbt.process_0/d/*")
PARTS = {
    "arrays": ARRAYS,
    "index of arrays": lambda folder: folder / "state" / "manifest.ocdbt",
    "metadata": lambda folder: folder / "state" / "_METADATA",
    "data": lambda folder: folder / "data" / "process_0-of-1.json",
    "progress": largest("progress/_strings.json"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("hurt", [truncate, garble, lambda file: file.unlink()])
def test_the_one_before_a_damaged_checkpoint_is_taken(run, two_steps, tmp_path, part, hurt, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    file = PARTS[part](folder / "2")
    hurt(file)
    there = sorted(path.relative_to(folder / "2") for path in (folder / "2").rglob("*"))
    checkpoints = Checkpoints(folder, keep=2)
    state, progress = checkpoints.restore(run.abstract, run.data)
    assert int(state.step) == 1
    assert progress == PROGRESS
    assert f"checkpoint {folder / '2'} is damaged" in caplog.text
    aside = folder / "2.damaged"
    assert sorted(path.relative_to(aside) for path in aside.rglob("*")) == there
    # The step is saved again beside it, and that one is sound.
    run.state = run.state.replace(step=jax.device_put(np.int32(2), run.shardings.step))
    checkpoints.save(run.state, run.data, PROGRESS)
    checkpoints.close()
    assert int(Checkpoints(folder, keep=2).restore(run.abstract, run.data)[0].step) == 2
    assert aside.exists()


def test_a_changed_value_is_damage_even_if_all_of_it_decodes(run, two_steps, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    context = ocp.Context()
    found = ocp.load_checkpointables(folder / "2", {"state": run.abstract})["state"]
    name = "projector.in_kernel_ed"
    changed = found.trainable | {name: found.trainable[name].at[0, 0].multiply(1 + 2**-20)}
    other = tmp_path / "other"
    with context:
        ocp.save_checkpointables(other, {"state": found.replace(trainable=changed)})
    shutil.rmtree(folder / "2" / "state")
    shutil.move(other / "state", folder / "2" / "state")
    state, _ = Checkpoints(folder, keep=2).restore(run.abstract, run.data)
    assert int(state.step) == 1
    assert "sums of its arrays' bits differ" in caplog.text


def test_without_a_sound_checkpoint_nothing_starts_again(run, two_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    for step in ("1", "2"):
        truncate(ARRAYS(folder / step))
    for _ in range(2):  # nor the second time
        with pytest.raises(
            CheckpointError, match=r"is damaged: 1\.damaged, 2\.damaged; restore an intact"
        ):
            Checkpoints(folder, keep=2).restore(run.abstract, run.data)
    assert Checkpoints(tmp_path / "new", keep=2).restore(run.abstract, run.data) is None


def test_another_model_is_no_damage(run, two_steps, tiny_config, letters):
    vision = dataclasses.replace(tiny_config.vision, mlp=128)
    other = Run(dataclasses.replace(tiny_config, vision=vision), letters)
    with pytest.raises(CheckpointError, match=r"another model or optimiser: .* give another"):
        Checkpoints(two_steps, keep=2).restore(other.abstract, other.data)
    assert sorted(path.name for path in two_steps.iterdir()) == ["1", "2"]


def test_other_data_are_no_damage(run, two_steps, tiny_config, letters):
    other = Run(tiny_config, letters, examples=8)
    with pytest.raises(RestartError, match="order of the examples is not the saved one"):
        Checkpoints(two_steps, keep=2).restore(other.abstract, other.data)
    assert sorted(path.name for path in two_steps.iterdir()) == ["1", "2"]


def test_an_interrupted_write_is_no_checkpoint(run, two_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    torn = folder / "3.orbax-checkpoint-tmp"
    (folder / "2").rename(torn)
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.latest_step == 1
    run.state = run.state.replace(step=jax.device_put(np.int32(3), run.shardings.step))
    checkpoints.save(run.state, run.data, PROGRESS)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3"]


def test_bit_sums_are_those_of_the_bits(run):
    state = jax.device_get(run.state)
    expected = [
        int(np.sum(np.atleast_1d(x).view(f"u{x.dtype.itemsize}"), dtype=np.uint32))
        for x in jax.tree.leaves(state)
    ]
    assert [int(n) for n in bit_sums(run.state)] == expected
    assert [int(n) for n in bit_sums(state)] == expected
    half = {"x": jnp.arange(7, dtype=jnp.bfloat16), "y": jnp.arange(300, dtype=jnp.int8)}
    assert [int(n) for n in bit_sums(half)] == [
        int(np.asarray(x).view(f"u{x.dtype.itemsize}").sum()) for x in half.values()
    ]


def one_bit(text):
    return lambda content: content.replace(text, bytes([text[0] ^ 1]) + text[1:], 1)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("data", one_bit(b'0,\n    "stream"')),  # the number of batches
        ("data", one_bit(b"batches")),
        ("data", one_bit(b"source")),
        ("data", one_bit(b"sha256")),
        ("data", one_bit(b"3,")),  # the format
        ("data", lambda content: b"null"),
        ("data", lambda content: b"[" * 100_000),
        ("progress", one_bit(b"20.25")),
        ("progress", one_bit(b"clock")),
        ("progress", one_bit(b"bit_sums")),
    ],
)
def test_one_bit_of_position_or_progress_is_damage(run, two_steps, tmp_path, part, change, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    file = PARTS[part](folder / "2")
    changed = change(file.read_bytes())
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    state, progress = Checkpoints(folder, keep=2).restore(run.abstract, run.data)
    assert (int(state.step), progress) == (1, PROGRESS)
    assert f"checkpoint {folder / '2'} is damaged" in caplog.text


@pytest.mark.parametrize("named", ["process_0-of-2.json", "process_1-of-1.json"])
def test_a_position_of_another_process_alone_is_damage(run, two_steps, tmp_path, named):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    file = PARTS["data"](folder / "2")
    file.rename(file.with_name(named))
    assert int(Checkpoints(folder, keep=2).restore(run.abstract, run.data)[0].step) == 1


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_in_place_of_a_file_is_damage(run, two_steps, tmp_path, part):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    file = PARTS[part](folder / "2")
    file.unlink()
    file.mkdir()
    assert int(Checkpoints(folder, keep=2).restore(run.abstract, run.data)[0].step) == 1


def test_checkpoints_of_the_version_before_are_read(run, two_steps, tmp_path):
    """Without checksums of position and progress."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    file = PARTS["data"](folder / "2")
    state = json.loads(file.read_text())
    del state["sha256"]
    file.write_text(json.dumps(state | {"format": 2}))
    assert int(Checkpoints(folder, keep=2).restore(run.abstract, run.data)[0].step) == 2
