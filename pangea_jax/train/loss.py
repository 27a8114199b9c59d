"""Next-token cross-entropy as (sum, count): one division, over the global batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pangea_jax.model import Decoder

# Most bytes that a row's float32 logits take at once. With Qwen2's 152,064 words these are 832 places: reading the
# head from memory once per chunk then takes a third of the time of the products.
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
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Sum of weighted losses, sum of weights, and weighted number of correct top-1 predictions.

    Most tokens of a multimodal row are picture features, which are never targets. With `max_targets` the output head,
    the widest layer of the model, runs on at most that many places a row. This is exact as long as no row has more
    targets, which the data pipeline guarantees.

    The head runs on `chunk_places` of every row at a time and is recomputed in the backward pass, so that no
    [B, T, V] array ever exists.
    """
    if max_targets is not None and max_targets < targets.shape[1]:
        order = jnp.argsort(weights == 0, axis=1, stable=True)[:, :max_targets]
        hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
        targets = jnp.take_along_axis(targets, order, axis=1)
        weights = jnp.take_along_axis(weights, order, axis=1)
    B, T, _D = hidden.shape
    chunk = min(chunk_places(decoder.config.vocab_size), T)
    pad = -T % chunk
    hidden, targets, weights = (
        jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        for x in (hidden, targets, weights)
    )

    # The head is gathered once, and its gradient scattered once, not for every chunk: together 2 GiB for Qwen2.
    head = decoder.head(hidden.dtype)

    def body(sums, piece):
        hidden, targets, weights = piece
        logits = decoder.logits(hidden, head)
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - right
        # Ties count as right only for the true token at the maximum: argmax equality without argmax.
        hits = right >= logits.max(axis=-1)
        return tuple(
            total + jnp.sum(x * weights)
            for total, x in zip(sums, (losses, jnp.ones_like(losses), hits))
        ), None

    chunks = [
        x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1) for x in (hidden, targets, weights)
    ]
    # A single chunk's logits are small enough to be kept.
    body = jax.checkpoint(body) if len(chunks[0]) > 1 else body
    zero = jnp.float32(0)
    sums, _ = jax.lax.scan(body, (zero, zero, zero), tuple(chunks))
    return sums
