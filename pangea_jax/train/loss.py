"""Next-token cross-entropy as (sum, count). The step divides them once, over the global batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pangea_jax.model import Decoder

# Largest number of bytes for the float32 logits of a row at once. With Qwen2's 152,064 words these are 832 places:
# reading the head from memory once per chunk then takes a third of the time of the products.
LOGITS_BYTES = 512 << 20


def chunk_places(vocab_size: int) -> int:
    """Places of a row whose logits are computed at once, a multiple of 64."""
    places = LOGITS_BYTES // (4 * vocab_size)
    return max(64, places - places % 64)


def cross_entropy(
    decoder: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    max_targets: int | None = None,
    per_row: bool = False,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Sum of weighted losses, sum of weights, and weighted number of correct top-1 predictions.

    The head runs on `chunk_places` of every row at a time and is recomputed in the backward pass, so no [B, T, V] array
    ever exists.

    Args:
      max_targets: the head, the widest layer of the model, runs on at most this many places of a row. Most places of a
        multimodal row are picture features, which are never targets. The result is exact if no row has more targets;
        the data pipeline guarantees this.
      per_row: give the sums of each row, [B], instead of one sum.
    """
    if max_targets is not None and max_targets < targets.shape[1]:
        order = jnp.argsort(weights == 0, axis=1, stable=True)[:, :max_targets]
        hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
        targets, weights = (jnp.take_along_axis(x, order, axis=1) for x in (targets, weights))
    axis, start = (1, jnp.zeros(len(hidden))) if per_row else (None, jnp.float32(0))
    chunk = min(chunk_places(decoder.config.vocab_size), targets.shape[1])
    # The head is gathered once, and its gradient scattered once, not for every chunk: together 2 GiB for Qwen2.
    head = decoder.head(hidden.dtype)

    def split(x):
        """[B, T, ...] to [chunks, B, chunk, ...], padded with zeros."""
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(len(x), -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def body(sums, piece):
        hidden, targets, weights = piece
        logits = decoder.logits(hidden, head)
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - right
        # The true token is at the maximum: cheaper than argmax, and ties count as right.
        hits = right >= logits.max(axis=-1)
        added = (jnp.sum(x * weights, axis=axis) for x in (losses, jnp.ones_like(losses), hits))
        return tuple(map(jnp.add, sums, added)), None

    chunks = tuple(map(split, (hidden, targets, weights)))
    # The logits of a single chunk are small enough to keep.
    body = jax.checkpoint(body) if len(chunks[0]) > 1 else body
    return jax.lax.scan(body, (start,) * 3, chunks)[0]
