import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pangea_jax.model import Decoder, LanguageConfig
from pangea_jax.model import params as model_params
from pangea_jax.train import loss as losses
from pangea_jax.train.loss import cross_entropy

B, T, D, V = 3, 21, 8, 29


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def decoder(request):
    config = LanguageConfig(V, D, 1, 2, 1, 4, 16, tied_head=request.param)
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = 3 * rng.normal(size=(B, T, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T), np.int32)
    weights = np.zeros((B, T), np.float32)
    for row, count in enumerate((7, 1, 0)):
        weights[row, rng.permutation(T)[:count]] = 1
    return hidden, targets, weights


def reference(decoder, hidden, targets, weights):
    """(sum, count, hits) in float64 NumPy."""
    table = decoder.embedding_vd if decoder.head_kernel_dv is None else decoder.head_kernel_dv
    kernel = np.asarray(table[...], np.float64)
    kernel = kernel.T if decoder.head_kernel_dv is None else kernel
    logits = hidden.astype(np.float64) @ kernel
    largest = logits.max(-1, keepdims=True)
    log_z = largest[..., 0] + np.log(np.exp(logits - largest).sum(-1))
    right = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    hits = logits.argmax(-1) == targets
    return ((log_z - right) * weights).sum(), weights.sum(), (hits * weights).sum()


def set_chunk(monkeypatch, places):
    """Sets the number of places for the head at a time; the real number is too large for these rows."""
    monkeypatch.setattr(losses, "chunk_places", lambda vocab_size: places)


@pytest.mark.parametrize("chunk", [1, 4, 21, 512])
@pytest.mark.parametrize("max_targets", [None, 7, 12, 100])
def test_equals_float64(decoder, inputs, chunk, max_targets, monkeypatch):
    set_chunk(monkeypatch, chunk)
    sums = cross_entropy(decoder, *inputs, max_targets=max_targets)
    np.testing.assert_allclose(sums, reference(decoder, *inputs), rtol=2e-6)


def test_fractional_weights(decoder, inputs, monkeypatch):
    set_chunk(monkeypatch, 5)
    hidden, targets, weights = inputs
    weights = weights * np.linspace(0.1, 2, T, dtype=np.float32)
    sums = cross_entropy(decoder, hidden, targets, weights)
    np.testing.assert_allclose(sums, reference(decoder, hidden, targets, weights), rtol=2e-6)


def test_right_guesses_are_counted(decoder, inputs, monkeypatch):
    set_chunk(monkeypatch, 8)
    hidden, targets, weights = inputs
    best = np.asarray(decoder.logits(jnp.asarray(hidden)).argmax(-1), np.int32)
    targets = np.where(np.arange(T) % 2, best, (best + 1) % V)
    hits = cross_entropy(decoder, hidden, targets, np.ones_like(weights))[2]
    assert float(hits) == B * (T // 2)


@pytest.mark.parametrize(("max_targets", "chunk"), [(None, 4), (7, 3)])
def test_gradients_equal_those_of_plain_cross_entropy(
    decoder, inputs, max_targets, chunk, monkeypatch
):
    set_chunk(monkeypatch, chunk)
    hidden, targets, weights = inputs
    graphdef, params = model_params.split(decoder)

    def ours(params, hidden):
        merged = model_params.merge(graphdef, params)
        return cross_entropy(merged, hidden, targets, weights, max_targets=max_targets)[0]

    def plain(params, hidden):
        log_probs = jax.nn.log_softmax(model_params.merge(graphdef, params).logits(hidden))
        return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0] * weights)

    for a, b in zip(
        jax.tree.leaves(jax.grad(ours, (0, 1))(params, hidden)),
        jax.tree.leaves(jax.grad(plain, (0, 1))(params, hidden)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5)


def test_no_logits_of_the_whole_row_exist(decoder, monkeypatch):
    set_chunk(monkeypatch, 8)
    # The widest array of the model would be [B, T, V]. The program must not have it.
    T = 64
    shapes = (
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
        jax.ShapeDtypeStruct((B, T), jnp.float32),
    )
    graphdef, params = model_params.split(decoder)

    def loss(params, hidden, targets, weights):
        merged = model_params.merge(graphdef, params)
        return cross_entropy(merged, hidden, targets, weights)[0]

    program = jax.jit(jax.value_and_grad(loss)).lower(params, *shapes).as_text()
    assert f"tensor<{B}x8x{V}xf32>" in program
    assert f"{B}x{T}x{V}xf32" not in program
    assert f"8x{B}x8x{V}xf32" not in program
