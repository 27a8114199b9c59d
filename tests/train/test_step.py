import dataclasses

import jax
import numpy as np
import pytest

from pangea_jax import sharding
from pangea_jax.batch import Batch
from pangea_jax.model import AttentionImpl
from pangea_jax.model import params as model_params
from pangea_jax.train.optimizer import OptimizerConfig, make_optimizer
from pangea_jax.train.state import init_state
from pangea_jax.train.step import make_train_step

ROWS, TOKENS, STEPS = 8, 24, 3
FROZEN = (r"vision\.patch_kernel_hwcd", r"language\.blocks\.[qkv]_bias_\w+")
# The tower's last norm does not change patch features; a bias that all keys share cancels in the softmax.
STILL = ("vision.post_norm.scale", "vision.post_norm.bias", "vision.blocks.k_bias_hc")
# A large epsilon, because Adam divides rounding errors by the root of tiny gradients.
OPTIMIZER = make_optimizer(OptimizerConfig(1e-2, warmup_ratio=0, eps=1e-3, weight_decay=0.1), 10)


@pytest.fixture(scope="module")
def batches(tiny_config):
    """Rows with a picture each; their lengths and numbers of targets differ."""
    rng = np.random.default_rng(0)
    patches = tiny_config.vision.patches
    lengths = rng.integers(patches + 4, TOKENS + 1, (STEPS, ROWS))
    inside = np.arange(TOKENS) < lengths[..., None]
    place = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), inside.shape)
    index = np.where(place <= patches + 1, place % (patches + 1), -1)  # 0 is the newline vector
    tokens = rng.integers(4, tiny_config.language.vocab_size, inside.shape, np.int32)
    batch = Batch(
        tokens=tokens * inside,
        targets=np.roll(tokens, -1, axis=-1) * inside,
        weights=(inside & (place > TOKENS - 2 - np.arange(ROWS)[:, None] % 7)).astype(np.float32),
        image_index=np.where(inside, index, -1).astype(np.int32),
        positions=place * inside,
        segment_ids=inside.astype(np.int32),
        tiles=rng.integers(0, 256, (STEPS, ROWS, 1, 16, 16, 3), np.uint8),
    )
    return [batch[step] for step in range(STEPS)]


def run(config, batches, mesh, **options):
    """(initial parameters, final state, metrics of every step), on the host."""
    graphdef, state, shardings = init_state(config, OPTIMIZER, mesh, seed=0, frozen=FROZEN)
    start = jax.device_get(state.params)
    step = make_train_step(graphdef, OPTIMIZER, shardings, mesh, **options)
    metrics = []
    for batch in batches:
        state, scalars = step(state, batch.place(mesh))
        metrics.append({name: float(value) for name, value in scalars.items()})
    return start, jax.device_get(state), metrics


@pytest.fixture(scope="module")
def one_device(tiny_config, batches):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return run(tiny_config, batches, mesh)


def test_a_mesh_trains_as_one_device_does(tiny_config, batches, one_device):
    """A mesh with all three axes, and every option that must not change the result."""
    assert max(batch.weights.sum(axis=1).max() for batch in batches) == 7
    options = {"max_targets": 7, "keep": "none", "accumulation": 2}
    start, state, metrics = run(tiny_config, batches, sharding.make_mesh(2, 2, 2), **options)
    expected_start, expected_state, expected_metrics = one_device
    for name, value in expected_start.items():
        assert np.array_equal(start[name], value), name
    for ours, expected in zip(metrics, expected_metrics, strict=True):
        assert ours == pytest.approx(expected, rel=2e-5)
    for name, value in expected_state.params.items():
        np.testing.assert_allclose(state.params[name], value, atol=2e-5, err_msg=name)
    for name, value in state.trainable.items():
        moved = np.abs(value - start[name]).max()
        assert (moved > 1e-3) != (name in STILL), name


def test_parts_that_do_not_divide_are_an_error(tiny_config, batches):
    with pytest.raises(ValueError, match="8 rows on 8 devices cannot be split into accumulation=3"):
        run(tiny_config, batches[:1], sharding.make_mesh(1, 8, 1), accumulation=3)


def test_attention_kernels_split_themselves_over_the_mesh(tiny_config, batches):
    """The step puts the mesh into the context, where kernels find it."""
    language = dataclasses.replace(tiny_config.language, head_width=64)
    config = dataclasses.replace(tiny_config, language=language)
    impl = AttentionImpl("splash", interpret=True)
    _, state, metrics = run(config, batches[:1], sharding.make_mesh(2, 2, 2), impl=impl)
    one_device = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    _, expected_state, expected = run(config, batches[:1], one_device, impl="xla")
    assert metrics[0] == pytest.approx(expected[0], rel=2e-5)
    for name, value in expected_state.params.items():
        np.testing.assert_allclose(state.params[name], value, atol=2e-5, err_msg=name)


def test_metrics_by_hand(tiny_config, batches, one_device):
    start, _, metrics = one_device
    graphdef = model_params.abstract(lambda: _model(tiny_config))[0]
    batch = batches[0]
    logits = jax.jit(lambda params: model_params.merge(graphdef, params)(batch))(start)
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    losses = log_z - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    weights, count = batch.weights, batch.weights.sum()
    hits = (logits.argmax(-1) == batch.targets) * weights
    expected = {
        "loss": (losses * weights).sum() / count,
        "accuracy": hits.sum() / count,
        "target_tokens": count,
        "tokens": (batch.segment_ids > 0).sum(),
        "examples": ROWS,
    }
    found = {name: metrics[0][name] for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)


def test_gradient_norms_of_parts_make_up_that_of_all(one_device):
    parts = ("language", "newline", "projector", "vision")
    for step in one_device[2]:
        assert {name for name in step if "/" in name} == {f"grad_norm/{part}" for part in parts}
        total = sum(step[f"grad_norm/{part}"] ** 2 for part in parts) ** 0.5
        assert step["grad_norm"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("value", "accumulation"), [(np.nan, 1), (np.inf, 2)])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(
    tiny_config, batches, one_device, value, accumulation
):
    """One batch has a bad row. The other steps are the same as in a run without that batch."""
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    bad = dataclasses.replace(batches[1], weights=batches[1].weights.copy())
    row, place = np.argwhere(bad.weights)[-1]
    bad.weights[row, place] = value
    options = dict(accumulation=accumulation)
    _, without, expected = run(tiny_config, [batches[0], batches[2]], mesh, **options)
    _, state, metrics = run(tiny_config, [batches[0], bad, batches[2]], mesh, **options)
    assert [step["skipped"] for step in metrics] == [0, 1, 0]
    assert not np.isfinite(metrics[1]["loss"])
    assert [metrics[0], metrics[2]] == expected
    assert int(state.step) == int(without.step) + 1
    for ours, theirs in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((without.params, without.opt_state)),
        strict=True,
    ):
        assert np.array_equal(ours, theirs)


def _model(config):
    from flax import nnx

    from pangea_jax.model import Pangea

    return Pangea(config, rngs=nnx.Rngs(0))


def test_frozen_parameters_stay_and_have_no_optimiser_state(one_device):
    start, state, _ = one_device
    assert len(state.frozen) == 4
    for name, value in state.frozen.items():
        assert np.array_equal(value, start[name]), name
    adam = state.opt_state[1]
    for moments in (adam.mu, adam.nu):
        assert moments.keys() == state.trainable.keys()
    assert not state.frozen.keys() & state.trainable.keys()
    assert int(state.step) == int(adam.count) == STEPS


def test_frozen_parameters_are_kept_in_their_own_type(tiny_config):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    config = dataclasses.replace(tiny_config, dtype="bfloat16")
    _, state, _ = init_state(config, OPTIMIZER, mesh, seed=0, frozen=(r"vision\..*",))
    assert {str(value.dtype) for value in state.frozen.values()} == {"bfloat16"}
    assert {str(value.dtype) for value in state.trainable.values()} == {"float32"}
    assert all(name.startswith("vision.") for name in state.frozen)


def test_pretrained_parameters_replace_random_ones(tiny_config, one_device):
    start = one_device[0]
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    newline = np.arange(32, dtype=np.float16)
    _, state, _ = init_state(
        tiny_config, OPTIMIZER, mesh, seed=0, frozen=FROZEN, pretrained={"newline_d": newline}
    )
    for name, value in state.params.items():
        assert np.array_equal(value, newline if name == "newline_d" else start[name]), name
    assert state.params["newline_d"].dtype == np.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": ("visoin.*",)}, "'visoin.*' matches no parameter; they begin with"),
        ({"pretrained": {"newline": np.zeros(32)}}, r"does not have: \['newline'\]"),
        ({"pretrained": {"newline_d": np.zeros(31)}}, r"newline_d has shape \(31,\), the model's"),
    ],
)
def test_what_fits_no_parameter_is_an_error(tiny_config, options, message):
    mesh = sharding.make_mesh(1, 8, 1)
    with pytest.raises(ValueError, match=message):
        init_state(tiny_config, OPTIMIZER, mesh, seed=0, **options)


def test_another_seed_is_another_model(tiny_config, one_device):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    small = dataclasses.replace(tiny_config, newline=True)
    state = init_state(small, OPTIMIZER, mesh, seed=1, frozen=FROZEN)[1]
    assert not np.array_equal(state.params["newline_d"], one_device[0]["newline_d"])
