"""One attention for every use: packed rows, padded rows, and decoding from a KV cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BACKENDS = ("xla",)


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    *,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    impl: str = "xla",
) -> Float[Array, "B T H C"]:
    """Scaled dot-product attention with grouped keys; softmax in float32.

    A query sees a key when both carry the same segment id (0 marks padding, which nobody sees) and, if
    positions are given, the key's position is not after the query's. Positions count from 0 within each
    segment, so one rule serves packed training rows, right-padded prompts and a KV cache alike.
    Without ids every query sees every key (the vision tower).

    Args:
      q: queries; H = K * G heads, query head h reads key head h // G.
      k, v: keys and values; S = T in training, the number of cache slots when decoding.
      impl: one of `BACKENDS`.

    Returns:
      The mixed values. Rows of padding queries are finite but meaningless.
    """
    if impl not in BACKENDS:
        raise ValueError(f"attention impl {impl!r} is not one of {BACKENDS}")
    B, T, H, C = q.shape
    K = k.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} key heads evenly")
    q = q.reshape(B, T, K, H // K, C) * C**-0.5
    logits = jnp.einsum("BTKGC,BSKC->BKGTS", q, k, preferred_element_type=jnp.float32)
    mask = _visible(q_segment_ids, kv_segment_ids, q_positions, kv_positions)
    if mask is not None:
        # A finite minimum keeps the softmax of a padding query (which sees nothing) free of NaN.
        logits += jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min / 2)[:, None, None]
    # Normalised after the values are mixed, as flash attention does: one division a channel, not a
    # key, which halves the passes over the largest array.
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - highest)
    mixed = jnp.einsum(
        "BKGTS,BSKC->BKGTC", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def _visible(q_segment_ids, kv_segment_ids, q_positions, kv_positions):
    """Which keys a query may see, bool [B, T, S]; None means all."""
    mask = None
    if q_segment_ids is not None:
        mask = (q_segment_ids[:, :, None] == kv_segment_ids[:, None]) & (
            kv_segment_ids[:, None] > 0
        )
    if q_positions is not None:
        causal = kv_positions[:, None] <= q_positions[:, :, None]
        mask = causal if mask is None else mask & causal
    return mask
