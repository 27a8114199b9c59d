"""Constants and the ranges of segments that the attention kernels share."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

# `keep=` (`layers.KEEP`) chooses by this name what the backward pass needs of the forward pass.
RESIDUALS = "attention"
# The logit of a key that is not seen. It is finite: a block in which a query sees nothing then gives weights that
# the next block wipes out, not NaN.
UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def ranges(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Index of the first and of the last token of every token's segment; a run of padding is a segment."""
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones_like(change[:, :1])
    first, last = jnp.concatenate([edge, change], 1), jnp.concatenate([change, edge], 1)
    starts = lax.cummax(jnp.where(first, place, 0), axis=1)
    ends = lax.cummin(jnp.where(last, place, segment_ids.shape[1]), axis=1, reverse=True)
    return starts.astype(jnp.int32), ends.astype(jnp.int32)
