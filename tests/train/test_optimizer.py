import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pangea_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule

PARAMS = {
    "vision.blocks.o_kernel_hcd": (2, 3),
    "vision.position_embedding_sd": (3,),
    "language.embedding_vd": (4, 2),
    "language.blocks.q_bias_hc": (3,),
    "language.final_norm.scale": (2,),
    "newline_d": (2,),
}
DECAYED = {name for name in PARAMS if "kernel" in name or "embedding" in name}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in PARAMS.items()
    }


def run(config, params, gradients, total_steps):
    optimizer = make_optimizer(config, total_steps)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params


def adamw(config, params, gradients, total_steps, lr_of):
    """Textbook AdamW (Loshchilov and Hutter, 2019) with global clipping, float64 NumPy."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    warmup = max(1, round(config.warmup_ratio * total_steps))
    for step, grads in enumerate(gradients):
        norm = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in grads.values()))
        if step < warmup:
            lr = config.learning_rate * step / warmup
        else:
            done = (step - warmup) / (total_steps - warmup)
            cosine = 0.5 * (1 + np.cos(np.pi * done))
            lr = config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * cosine)
        for name in params:
            g = np.asarray(grads[name], np.float64) * min(1, config.clip_norm / norm)
            first[name] = config.b1 * first[name] + (1 - config.b1) * g
            second[name] = config.b2 * second[name] + (1 - config.b2) * g * g
            m = first[name] / (1 - config.b1 ** (step + 1))
            v = second[name] / (1 - config.b2 ** (step + 1))
            update = m / (np.sqrt(v) + config.eps)
            if name in DECAYED:
                update += config.weight_decay * params[name]
            params[name] = params[name] - lr * lr_of(name) * update
    return params


def gradients(params, steps, scale):
    rng = np.random.default_rng(1)
    return [
        {n: jnp.asarray(scale * rng.normal(size=v.shape), jnp.float32) for n, v in params.items()}
        for _ in range(steps)
    ]


@pytest.mark.parametrize("scale", [0.01, 5.0], ids=["unclipped", "clipped"])
def test_ten_steps_equal_textbook_adamw(params, scale):
    config = OptimizerConfig(
        learning_rate=1e-2,
        warmup_ratio=0.3,
        final_ratio=0.1,
        weight_decay=0.2,
        lr_scale={r"vision\..*": 0.1},
    )
    grads = gradients(params, 10, scale)
    expected = adamw(
        config, params, grads, 10, lambda name: 0.1 if name.startswith("vision") else 1
    )
    for name, value in run(config, params, grads, 10).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_decay_acts_on_kernels_and_embeddings_alone(params):
    config = OptimizerConfig(learning_rate=0.5, warmup_ratio=0, weight_decay=0.1)
    zero = {name: jnp.zeros_like(value) for name, value in params.items()}
    # In the first step of a warm-up the learning rate is 0; in the second it is at its peak.
    after = run(config, params, [zero, zero], 100)
    for name, value in params.items():
        factor = 0.95 if name in DECAYED else 1.0
        np.testing.assert_allclose(after[name], factor * value, rtol=1e-6, err_msg=name)


def test_the_first_matching_scale_counts(params):
    grads = gradients(params, 2, 1.0)
    base = {"learning_rate": 0.1, "warmup_ratio": 0, "clip_norm": 1e9}

    def change(name, **scales):
        after = run(OptimizerConfig(**base, **scales), params, grads, 100)
        return np.asarray(after[name] - params[name])

    scales = {r"vision\..*kernel_\w+": 0.5, r"vision\..*": 0.0}
    for name, factor in {
        "vision.blocks.o_kernel_hcd": 0.5,
        "vision.position_embedding_sd": 0.0,
        "newline_d": 1.0,
    }.items():
        scaled = change(name, lr_scale=scales)
        np.testing.assert_allclose(scaled, factor * change(name), rtol=1e-4, atol=1e-6)


def test_a_scale_that_fits_no_parameter_is_an_error(params):
    optimizer = make_optimizer(OptimizerConfig(lr_scale={r"visoin\..*": 0.1}), 10)
    with pytest.raises(ValueError, match=r"optimizer\.lr_scale.* matches no parameter"):
        optimizer.init(params)


@pytest.mark.parametrize(("total", "ratio"), [(1000, 0.03), (100, 0.0), (7, 0.5)])
def test_schedule_end_points(total, ratio):
    config = OptimizerConfig(learning_rate=3e-4, warmup_ratio=ratio, final_ratio=0.1)
    schedule = make_schedule(config, total)
    warmup = max(1, round(ratio * total))
    middle = (warmup + total) / 2
    np.testing.assert_allclose(schedule(0), 0, atol=1e-12)
    np.testing.assert_allclose(schedule(warmup), 3e-4, rtol=1e-6)
    np.testing.assert_allclose(schedule(total), 3e-5, rtol=1e-5)
    np.testing.assert_allclose(schedule(middle), (3e-4 + 3e-5) / 2, rtol=1e-5)
    np.testing.assert_allclose(schedule(total + 50), 3e-5, rtol=1e-5)


def test_defaults_are_the_papers_fine_tuning_stage():
    config = OptimizerConfig()
    assert (config.learning_rate, config.warmup_ratio, config.weight_decay) == (2e-5, 0.03, 0)
    schedule = make_schedule(config, 12_000)
    assert float(schedule(12_000)) == 0
    assert float(schedule(360)) == pytest.approx(2e-5)
    assert make_schedule(config, 1)(0) == 0


def test_adafactor_keeps_rows_and_columns_and_learns():
    """It keeps D + F numbers for a kernel [D, F]; on a quadratic it ends where Adam ends."""
    shape = (256, 384)
    goal = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    params = {"language.blocks.up_kernel_df": jnp.zeros(shape)}
    config = OptimizerConfig(0.1, warmup_ratio=0.0, clip_norm=1e9, name="adafactor")
    optimizer = make_optimizer(config, 200)
    state = optimizer.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * sum(shape)

    @jax.jit
    def step(params, state):
        grads = {name: value - goal for name, value in params.items()}
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(200):
        params, state = step(params, state)
    error = jnp.square(params["language.blocks.up_kernel_df"] - goal).mean()
    assert error < 1e-3 * jnp.square(goal).mean()


def test_muon_steps_are_orthogonal_and_as_large_as_adams():
    """Kernels of stacked layers step with equal singular values and RMS 0.2; the others as with Adam."""
    rng = np.random.default_rng(0)
    shapes = {
        "language.blocks.q_kernel_dhc": (2, 64, 2, 16),
        "language.blocks.o_kernel_hcd": (2, 2, 16, 64),
        "vision.patch_kernel_hwcd": (4, 4, 3, 64),
        "language.head_kernel_dv": (64, 100),
        "language.blocks.attention_norm.scale": (2, 64),
    }
    grads = {name: jnp.asarray(rng.normal(size=shape), "float32") for name, shape in shapes.items()}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    steps = {}
    for kind in ("muon", "adamw"):
        optimizer = make_optimizer(OptimizerConfig(1.0, warmup_ratio=0.0, name=kind), 10**6)
        state = optimizer.init(params)
        _, state = optimizer.update(grads, state, params)
        steps[kind], _ = optimizer.update(grads, state, params)
    matrices = {
        "language.blocks.q_kernel_dhc": (2, 64, 32),
        "language.blocks.o_kernel_hcd": (2, 32, 64),
        "vision.patch_kernel_hwcd": (48, 64),
    }
    for name, step in steps["muon"].items():
        if name in matrices:
            values = np.linalg.svd(np.reshape(step, matrices[name]), compute_uv=False)
            assert (
                values.max() < 2 * values.min()
            )  # five Newton-Schulz steps leave them between 0.7 and 1.2
            # Of a step of rank r, the mean square is r / (in * out) if singular values are 1.
            rows, columns = matrices[name][-2:]
            expected = 0.2 * (min(rows, columns) / rows / columns * max(rows, columns)) ** 0.5
            assert np.sqrt(np.mean(np.square(step))) == pytest.approx(expected, rel=0.25)
        else:
            np.testing.assert_allclose(step, steps["adamw"][name], rtol=1e-5, err_msg=name)


def test_first_moments_in_bfloat16(params):
    """The moments need half the bytes, and the steps are the same up to the precision of bfloat16."""
    grads = [params, params]
    found, exact = (
        run(OptimizerConfig(1e-2, mu_dtype=dtype), params, grads, 10)
        for dtype in ("bfloat16", None)
    )
    state = make_optimizer(OptimizerConfig(mu_dtype="bfloat16"), 10).init(params)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert kinds == {"bfloat16", "float32"}
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, atol=2e-4, err_msg=name)


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(ValueError, match="'adam' is not one of adamw, adafactor, muon"):
        make_optimizer(OptimizerConfig(name="adam"), 10)


@pytest.mark.parametrize("bad", [{"clip_norm": 0.0}, {"clip_norm": -1.0}, {"warmup_ratio": 3.0}])
def test_values_with_which_nothing_is_learned_are_errors(bad):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(bad))} "):
        OptimizerConfig(**bad)


def test_no_clipping(params):
    large = [jax.tree.map(lambda x: 1e3 * jnp.ones_like(x), params)] * 3
    free = run(OptimizerConfig(learning_rate=1e-3, clip_norm=float("inf")), params, large, 10)
    wide = run(OptimizerConfig(learning_rate=1e-3, clip_norm=1e9), params, large, 10)
    for name, value in wide.items():
        np.testing.assert_array_equal(free[name], value)
        assert np.abs(value - params[name]).max() > 1e-4
