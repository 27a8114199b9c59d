"""Flash attention (Dao 2023) of packed rows for CPUs, in plain JAX: loops over blocks that fit the processor's cache.

A query sees a range of keys: from the first token of its segment to itself. A block of queries reads only the blocks of
keys in the ranges of its queries, so a packed row costs what its conversations cost. The number of these blocks depends
on the data: on an accelerator such a loop would wait for the host at every step.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pangea_jax.model.attention.segments import RESIDUALS, UNSEEN, ranges

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"],
    *,
    block_q: int,
    block_kv: int,
) -> Float[Array, "B T H C"]:
    """Attention of every token to itself and to the tokens before it in its segment.

    Args:
      segment_ids: tokens of a segment are neighbours. A padding token (0) sees only itself: its result is its own
        value.
      block_q, block_kv: tokens of a block; both divide T.
    """
    B, T, H, C = q.shape
    K = k.shape[2]
    # Otherwise padding would cost as much as a conversation of its length, and nobody reads its results.
    starts = jnp.where(segment_ids == 0, jnp.arange(T, dtype=jnp.int32), ranges(segment_ids)[0])
    starts = starts.reshape(B, T // block_q, block_q).swapaxes(0, 1)

    def split(x, size):
        """[B, T, heads, C] to [blocks, B, K, heads / K * size, C]: one product for each key head."""
        heads = x.shape[2]
        x = x.reshape(B, T // size, size, K, heads // K, C).transpose(1, 0, 3, 4, 2, 5)
        return x.reshape(T // size, B, K, heads // K * size, C)

    mixed = _attention(split(q * C**-0.5, block_q), split(k, block_kv), split(v, block_kv), starts)
    mixed = mixed.reshape(T // block_q, B, K, H // K, block_q, C)
    return mixed.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, H, C)


@jax.custom_vjp
def _attention(q, k, v, starts):
    """Attention of split arrays. Queries are scaled; `starts` [blocks, B, block_q] is the first key that each sees."""
    return _attention_fwd(q, k, v, starts)[0]


def _attention_fwd(q, k, v, starts):
    def mix(_, block):
        i, q, starts = block

        def body(j, carry):
            mixed, highest, total = carry
            logits = _logits(q, k[j], starts, i, j)
            higher = jnp.maximum(highest, logits.max(-1, keepdims=True))
            weights, shrink = jnp.exp(logits - higher), jnp.exp(highest - higher)
            mixed = mixed * shrink + _dot("BKQS,BKSC->BKQC", weights.astype(v.dtype), v[j])
            return mixed, higher, total * shrink + weights.sum(-1, keepdims=True)

        zero = jnp.zeros((*q.shape[:3], 1), jnp.float32)
        start = (jnp.zeros(q.shape, jnp.float32), zero - jnp.inf, zero)
        mixed, highest, total = lax.fori_loop(*_key_blocks(starts, i, k), body, start)
        return None, ((mixed / total).astype(v.dtype), highest + jnp.log(total))

    kept = lax.scan(mix, None, (jnp.arange(len(q)), q, starts))[1]
    # Names by which `keep` can choose them.
    mixed, log_total = (checkpoint_name(x, RESIDUALS) for x in kept)
    return mixed, (q, k, v, starts, mixed, log_total)


def _attention_bwd(kept, cotangent):
    q, k, v, starts, mixed, log_total = kept

    def pull(grads, block):
        i, q, starts, mixed, log_total, cotangent = block
        # Subtracted from the gradient of every weight in the softmax: "D" in the paper.
        shared = _dot("BKQC,BKQC->BKQ", mixed, cotangent)[..., None]

        def body(j, grads):
            dq, dk, dv = grads
            weights = jnp.exp(_logits(q, k[j], starts, i, j) - log_total)
            slope = weights * (_dot("BKQC,BKSC->BKQS", cotangent, v[j]) - shared)
            weights, slope = weights.astype(v.dtype), slope.astype(v.dtype)
            dv = dv.at[j].add(_dot("BKQS,BKQC->BKSC", weights, cotangent))
            dk = dk.at[j].add(_dot("BKQS,BKQC->BKSC", slope, q))
            return dq + _dot("BKQS,BKSC->BKQC", slope, k[j]), dk, dv

        start = (jnp.zeros(q.shape, jnp.float32), *grads)
        dq, *grads = lax.fori_loop(*_key_blocks(starts, i, k), body, start)
        return grads, dq.astype(q.dtype)

    zero = jnp.zeros(k.shape, jnp.float32)
    blocks = (jnp.arange(len(q)), q, starts, mixed, log_total, cotangent)
    (dk, dv), dq = lax.scan(pull, [zero, zero], blocks)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _key_blocks(starts, i, k):
    """The range of key blocks that some query of block i sees: first, and last + 1."""
    size, block_kv = starts.shape[1], k.shape[3]
    return starts.min() // block_kv, ((i + 1) * size - 1) // block_kv + 1


def _logits(q, k, starts, i, j):
    """Logits of queries [B, K, G * block_q, C] of block i and keys [B, K, block_kv, C] of block j."""
    (B, size), block_kv = starts.shape, k.shape[2]
    queries, keys = i * size + jnp.arange(size), j * block_kv + jnp.arange(block_kv)
    seen = (keys <= queries[:, None]) & (keys >= starts[:, :, None])
    logits = _dot("BKQC,BKSC->BKQS", q, k)
    by_head = logits.reshape(B, k.shape[1], -1, size, block_kv)
    return jnp.where(seen[:, None, None], by_head, UNSEEN).reshape(logits.shape)
