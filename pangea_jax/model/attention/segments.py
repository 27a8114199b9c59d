"""Constants and the ranges of segments that the attention kernels share."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

# The `checkpoint_name` of what the backward pass needs of the forward pass, see `layers.KEEP`.
RESIDUALS = "attention"
# The logit of a key that the query does not see. It is finite: if a query sees nothing in a block, its weights are not
# NaN, and the next block makes them zero.
UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def ranges(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Index of the first and of the last token of each token's segment. A run of padding is a segment too."""
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones_like(change[:, :1])
    first, last = jnp.concatenate([edge, change], 1), jnp.concatenate([change, edge], 1)
    starts = lax.cummax(jnp.where(first, place, 0), axis=1)
    ends = lax.cummin(jnp.where(last, place, segment_ids.shape[1]), axis=1, reverse=True)
    return starts.astype(jnp.int32), ends.astype(jnp.int32)
