"""`keep` changes only memory, not results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pangea_jax.batch import Batch
from pangea_jax.model import AttentionImpl
from pangea_jax.model import params as model_params
from pangea_jax.model.layers import KEEP

B, T = 2, 24


@pytest.fixture(scope="module")
def batch(tiny_config):
    rng = np.random.default_rng(0)
    place = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    patches = tiny_config.vision.patches
    return Batch(
        tokens=rng.integers(0, tiny_config.language.vocab_size, (B, T), np.int32),
        positions=place % 20,
        segment_ids=1 + place // 20,  # two packed sequences
        image_index=np.where(place <= patches, place, -1),
        tiles=rng.integers(0, 256, (B, 1, 16, 16, 3), np.uint8),
    )


@pytest.fixture(scope="module")
def loss_of(tiny_model, batch):
    """(parameters, function keep -> loss). The loss has no symmetry that could hide a mistake."""
    graphdef, params = model_params.split(tiny_model)
    impl = AttentionImpl("xla")

    def make(keep):
        def loss(params):
            hidden = model_params.merge(graphdef, params).hidden(batch, keep=keep, impl=impl)
            return jnp.sin(hidden).sum()

        return loss

    return params, make


@pytest.mark.parametrize("keep", [name for name in KEEP if name != "all"])
def test_gradients_are_those_of_keeping_everything(loss_of, keep):
    params, make = loss_of
    expected, found = (jax.jit(jax.grad(make(name)))(params) for name in ("all", keep))
    for name, value in expected.items():
        # The gradient of a bias that all keys share is only rounding noise.
        tolerance = 1e-5 * (1 + np.abs(value).max())
        np.testing.assert_allclose(found[name], value, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("keep", "queries", "keys"),
    [("none", 0, 0), ("attention", 1, 0), ("qkv", 2, 2), ("products", 2, 2)],
)
def test_a_policy_keeps_what_it_says(tiny_config, loss_of, keep, queries, keys):
    """Each decoder layer keeps queries and mixed values [B, T, H, C], keys and values [B, T, K, C]."""
    params, make = loss_of
    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(make(keep), params)[1], params))
    shapes = [leaf.shape for leaf in kept]
    language = tiny_config.language
    for heads, expected in ((language.heads, queries), (language.kv_heads, keys)):
        shape = (language.layers, B, T, heads, language.head_width)
        assert shapes.count(shape) == expected, shapes


def test_an_unknown_policy_is_an_error(loss_of):
    params, make = loss_of
    with pytest.raises(ValueError, match="keep 'nothin' is not one of none, attention"):
        jax.eval_shape(make("nothin"), params)
