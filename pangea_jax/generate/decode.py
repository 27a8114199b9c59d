"""Greedy decoding in one `lax.while_loop`: static shapes, stops when every row has ended."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pangea_jax.model import KVCache, Pangea


def last_hidden(
    hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B D"], Int[Array, "B"]]:
    """Hidden state at each right-padded prompt's last token, and the prompts' lengths."""
    lengths = jnp.sum(segment_ids > 0, axis=1)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], lengths


def greedy(
    model: Pangea,
    hidden: Float[Array, "B D"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    *,
    max_new_tokens: int,
    stop_id: int,
) -> Int[Array, "B M"]:
    """The most likely next tokens after a prefill.

    Args:
      hidden, lengths: from `last_hidden`.
      cache: from `Pangea.prefill`, with at least `max_new_tokens` - 1 free slots.

    Returns:
      Tokens up to and including `stop_id`; after it, `stop_id` again.
    """
    decoder = model.language
    first = jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)
    tokens = jnp.full((first.shape[0], max_new_tokens), stop_id, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        step, _token, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def body(carry):
        step, token, done, tokens, cache = carry
        x = decoder.embed(token[:, None], hidden.dtype)
        positions = (lengths + step - 1)[:, None]
        x, cache = decoder.extend(x, positions, jnp.ones_like(positions), cache)
        token = jnp.argmax(decoder.logits(x[:, 0]), axis=-1).astype(jnp.int32)
        token = jnp.where(done, stop_id, token)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        return step + 1, token, done | (token == stop_id), tokens, cache

    start = (jnp.int32(1), first, first == stop_id, tokens, cache)
    return jax.lax.while_loop(unfinished, body, start)[3]
