"""Validation losses equal sums computed from the logits, overall and per language, on one device and on eight."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import finetune
from pangea_jax import experiment, sharding
from pangea_jax.batch import Batch
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.pipeline import RowSource
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.experiment import Experiment, ValidationConfig
from pangea_jax.model import params as model_params
from pangea_jax.train.optimizer import make_optimizer
from pangea_jax.train.state import TrainState, abstract_state
from pangea_jax.train.validation import Validator, make_score
from pangea_jax.typed_config import build

ROWS, T, LANGUAGES = 3, 16, ("sw", "en")


def batch(seed):
    """Three rows of words, a part of which is trained."""
    random = np.random.default_rng(seed)
    tokens = random.integers(4, 100, (ROWS, T), np.int32)
    return Batch(
        tokens=tokens,
        image_index=np.full_like(tokens, -1),
        positions=np.tile(np.arange(T, dtype=np.int32), (ROWS, 1)),
        segment_ids=np.ones_like(tokens),
        tiles=np.zeros((ROWS, 1, 16, 16, 3), np.uint8),
        targets=np.roll(tokens, -1, axis=1),
        weights=(random.random((ROWS, T)) < 0.4).astype(np.float32),
    )


BATCHES = [(batch(0), np.array([0, 1, 0], np.int32)), (batch(1), np.array([1, 1, 1], np.int32))]


@pytest.fixture(scope="module")
def wanted(tiny_model):
    """(loss, trained tokens, hits) of each language, in float64 from the logits."""
    forward, sums = jax.jit(lambda rows: tiny_model(rows)), np.zeros((2, 3))
    for rows, languages in BATCHES:
        logits = np.asarray(forward(rows), np.float64)
        right = np.take_along_axis(logits, rows.targets[..., None], -1)[..., 0]
        losses = np.log(np.exp(logits).sum(-1)) - right
        hits = logits.argmax(-1) == rows.targets
        for row, language in enumerate(languages):
            weights = rows.weights[row]
            sums[language] += (losses[row] @ weights, weights.sum(), hits[row] @ weights)
    return sums


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_sums_are_those_of_the_logits(tiny_model, wanted, sizes):
    devices = jax.devices()[: np.prod(sizes)]
    mesh = sharding.make_mesh(*sizes, devices=devices)
    graphdef, params = model_params.split(tiny_model)
    placed = sharding.param_shardings(params, mesh)
    names = [name for name in params if name.startswith("vision.")]
    frozen = {name: params[name] for name in names}
    trainable = {name: value for name, value in params.items() if name not in frozen}
    step = NamedSharding(mesh, P())
    shardings = TrainState(
        step, {n: placed[n] for n in trainable}, {n: placed[n] for n in frozen}, ()
    )
    state = TrainState(
        np.int32(0),
        jax.device_put(trainable, shardings.trainable),
        jax.device_put(frozen, shardings.frozen),
        (),
    )
    score = make_score(graphdef, shardings, mesh, 2, max_targets=12)
    validator = Validator(score, BATCHES, LANGUAGES, mesh, every=2)
    found = validator.run(state, -1)
    total = wanted.sum(axis=0)
    expected = {"validation/loss": total[0] / total[1], "validation/accuracy": total[2] / total[1]}
    for code, (loss, count, hits) in zip(LANGUAGES, wanted, strict=True):
        expected |= {f"validation/loss/{code}": loss / count}
        expected |= {f"validation/accuracy/{code}": hits / count}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_the_best_step_is_remembered(tiny_model):
    losses = iter([4.0, 3.0, 3.5])

    def score(trainable, frozen, rows, language):
        return np.array([[10 * next(losses), 10.0, 5.0]])

    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    one = [(BATCHES[0][0], np.zeros(ROWS, np.int32))]
    validator = Validator(score, one, ("sw",), mesh, every=2)
    assert [validator.due(step) for step in range(4)] == [False, True, False, True]
    state = TrainState(np.int32(0), {}, {}, ())
    before = validator.run(state, -1)
    assert validator.best_step is None
    assert (
        validator.describe(before)
        == "before training: validation loss 4.0000, token accuracy 50.0%"
    )
    assert validator.describe(validator.run(state, 1)).endswith("the best so far")
    assert validator.advice("runs/mine", adapters=True) is None
    assert "the best was 3.0000 after step 2" in validator.describe(validator.run(state, 3))
    advice = validator.advice("runs/mine", adapters=True)
    assert advice.startswith("The validation loss was 3.0000 after step 2, and 3.5000 at the end.")
    assert advice.endswith("--from=runs/mine/checkpoints/2 --to=DIR --format=peft")
    assert validator.advice("runs/mine", adapters=False).endswith("checkpoints/2 --to=DIR")
    assert validator.best_step == 2
    resumed = Validator(score, one, ("sw",), mesh, every=2)
    resumed.set_state(validator.results())
    assert resumed.best_step == 2 and resumed.results()["before"]["validation/loss"] == 4.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fraction": 1.0}, "fraction is 1.0; expected a share"),
        ({"number": -1}, "number -1 must be 0 or more"),
        ({"number": 5, "every": 0}, "every 0 1 or more"),
        ({"ids": "abc"}, "must be a tuple of ids"),
        ({"fraction": 0.1, "store": "DIR"}, "fraction and store are both set; unset one"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**values)
    assert not ValidationConfig().is_on


def test_another_store_is_validated_and_its_pictures_do_not_train(emoji_store, tmp_path):
    """The other store has one picture of the sample, under the same key, and one of its own."""
    key = next(k for k in emoji_store.image_index["key"].to_pylist() if k.endswith("1f32d"))
    shared, own = (
        emoji_store.image(key),
        emoji_store.image(next(k for k in emoji_store.image_index["key"].to_pylist() if k != key)),
    )
    collection = key.split("/")[0]
    pictures = {
        collection: [Picture(key, shared, 128, 128)],
        "made": [Picture("made/1", own, 128, 128)],
    }
    turns = Turn("user", "<image>Hii ni nini?"), Turn("assistant", "Ndege")
    records = [
        (Conversation(f"r{i}", "made", code, "", (k,), turns), {})
        for i, (code, k) in enumerate([("sw", key), ("en", "made/1"), ("sw", "made/1")])
    ]
    write_store(tmp_path, name="made", build="none", records={"train": records}, images=pictures)
    config = finetune.get_config("model=sample,data=emoji,validation=0")
    config.validation.store = str(tmp_path)
    config.mixture.languages = ("sw",)
    exp = build(Experiment, config)
    store, tokenizer = experiment.open_data(exp)
    choice = experiment.choose_records(exp, store)
    trained = {k for one in RowSource(store, choice.rows) for k in one.images}
    assert key not in trained and len(trained) > 1000
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    reader = experiment.make_reader(exp, store, tokenizer)
    optimizer = make_optimizer(exp.optimizer, 10)
    graphdef, _, shardings = abstract_state(exp.model, optimizer, mesh)
    validator = experiment.make_validator(
        exp, store, choice, reader, graphdef, shardings, mesh, steps=100
    )
    assert (validator.languages, validator.every) == (("sw", "en"), 10)
    ((rows, languages),) = validator.batches
    assert rows.segment_ids.max(axis=1).sum() == 3
    assert languages[:2].tolist() == [0, 1] and rows.tiles.any()
