"""Attention of packed rows, of padded rows, and of new tokens to a KV cache: one rule for all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pangea_jax.model.attention import kernels
from pangea_jax.model.attention.segments import RESIDUALS

BACKENDS = ("xla", *kernels.KERNELS)
# Largest number of queries with logits in memory at once. With 8192 keys and 28 heads, 1024 queries take 0.9 GB per row
# in float32; all 8192 would take 7.5 GB.
QUERY_CHUNK = 1024
# Packed rows are cut into smaller chunks, but into at most MAX_UNROLLED of them, unless QUERY_CHUNK requires more.
PACKED_CHUNK, MAX_UNROLLED = 128, 8


@dataclasses.dataclass(frozen=True)
class AttentionImpl:
    """Which code computes the attention. All give the same result, up to rounding.

    Attributes:
      name: `xla` (plain JAX, serves every call, and the reference of the tests), `splash` (a Pallas
        kernel for TPU), `triton` (a Pallas kernel for NVIDIA GPUs), `blockwise` (loops for CPU), or `auto`:
        the kernel of the device where it can serve the call, else `xla`. What `auto` chose is logged once.
      block_q, block_kv: queries and keys a kernel works on at once, one of its `blocks`; None is its default
        (`kernels.KERNELS`). Rows are padded to a multiple of both, so on unusual row lengths smaller blocks waste less.
      interpret: run a kernel's arithmetic without its accelerator, slowly. For tests.
    """

    name: str = "auto"
    block_q: int | None = None
    block_kv: int | None = None
    interpret: bool = False

    def __post_init__(self):
        if self.name not in ("auto", *BACKENDS):
            raise ValueError(f"attention impl {self.name!r} is not one of {('auto', *BACKENDS)}")


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    impl: AttentionImpl | str = "auto",
) -> Float[Array, "B T H C"]:
    """Scaled dot-product attention with grouped keys; softmax in float32.

    A query sees a key if both have the same segment id (0 marks padding, which no token sees) and, if positions are
    given, the key's position is not after the query's. Positions count from 0 within each segment, so one rule serves
    packed training rows and right-padded prompts alike. Without ids every query sees every key (the vision tower).

    Args:
      q: queries; H = K * G heads, query head h reads key head h // G.
      k, v: keys and values of the same tokens.
      segment_ids, positions: of all tokens. Within a segment positions must increase along the row: the kernels
        compare indices instead.
      impl: a backend, or its name alone.

    Returns:
      The mixed values. Rows of padding queries are finite but meaningless.

    Raises:
      ValueError: the named backend cannot serve this call; it says why.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly")
    impl = AttentionImpl(impl) if isinstance(impl, str) else impl
    packed = segment_ids is not None and positions is not None
    impl = _choose(impl, q, k, packed)
    if impl.name != "xla":
        return kernels.run(impl, q, k, v, segment_ids)
    k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    if packed and q.shape[1] > PACKED_CHUNK:
        mixed = _mix_packed(q, k, v, segment_ids, positions)
    else:
        mixed = _mix_all(q, k, v, segment_ids, positions, segment_ids, positions)
    return checkpoint_name(mixed, RESIDUALS)


def cached_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B K C S"],
    v: Float[Array, "B K S C"],
    *,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    kv_positions: Int[Array, "B S"],
) -> Float[Array, "B T H C"]:
    """`attention` of T tokens to the S slots of a KV cache: the same rule, in plain JAX."""
    return _mix_all(q, k, v, segment_ids, positions, kv_segment_ids, kv_positions)


def _choose(impl: AttentionImpl, q: Array, k: Array, packed: bool) -> AttentionImpl:
    """`auto` resolved; a named kernel that cannot serve the call is an error."""
    if impl.name == "xla":
        return impl
    if impl.name != "auto":
        obstacle = kernels.obstacle(impl, q, k, packed)
        if obstacle:
            raise ValueError(f"attention impl {impl.name!r}: {obstacle}; use impl 'auto' or 'xla'")
        return impl
    platform = kernels.platform()
    plain = dataclasses.replace(impl, name="xla")
    name = next((n for n, kernel in kernels.KERNELS.items() if kernel.platform == platform), None)
    if name is None:
        _log_choice("xla", f"there is no kernel for {platform}")
        return plain
    chosen = dataclasses.replace(impl, name=name)
    obstacle = kernels.obstacle(chosen, q, k, packed) or kernels.unknown_placement()
    if q.shape[1] < kernels.KERNELS[name].shortest:
        obstacle = obstacle or f"plain JAX is faster for rows of {q.shape[1]} tokens"
    if obstacle:
        _log_choice("xla", f"{name} does not serve it: {obstacle}")
        return plain
    _log_choice(name, f"packed causal rows on {platform}")
    return chosen


@functools.cache
def _log_choice(name: str, reason: str):
    logging.info("attention: impl 'auto' is %r here (%s)", name, reason)


def _mix_packed(q, k, v, segment_ids, positions):
    """For packed rows, in which no query sees a later index.

    A chunk of queries reads only the keys up to its own end. This halves the work. On a CPU the logits of a chunk also
    stay in the processor's cache.
    """
    T = q.shape[1]
    chunks = max(-(-T // QUERY_CHUNK), min(-(-T // PACKED_CHUNK), MAX_UNROLLED))
    length = -(-T // chunks)
    # Recomputed in the backward pass. Otherwise the weights of every chunk would be kept.
    mix = jax.checkpoint(_mix)
    mixed = []
    for start in range(0, T, length):
        here, seen = slice(start, start + length), slice(0, start + length)
        ids = (segment_ids[:, here], positions[:, here], segment_ids[:, seen], positions[:, seen])
        mixed.append(mix(q[:, here], k[..., seen], v[:, :, seen], *ids))
    return jnp.concatenate(mixed, axis=1)


def _mix_all(q, k, v, q_segment_ids, q_positions, kv_segment_ids, kv_positions):
    """For any mask: all keys, and if there are many queries, a chunk of them at a time."""
    B, T, H, C = q.shape
    if T <= QUERY_CHUNK:
        return _mix(q, k, v, q_segment_ids, q_positions, kv_segment_ids, kv_positions)
    chunks = -(-T // QUERY_CHUNK)
    length = -(-T // chunks)

    def split(x):
        """[B, T, ...] to [chunks, B, length, ...]; the padding has segment and position 0."""
        x = jnp.pad(x, [(0, 0), (0, chunks * length - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, chunks, length, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint  # as in `_mix_packed`
    def mix(chunk):
        q, segment_ids, positions = chunk
        return _mix(q, k, v, segment_ids, positions, kv_segment_ids, kv_positions)

    mixed = jax.lax.map(mix, jax.tree.map(split, (q, q_segment_ids, q_positions)))
    return mixed.swapaxes(0, 1).reshape(B, chunks * length, H, C)[:, :T]


def _mix(q, k, v, q_segment_ids, q_positions, kv_segment_ids, kv_positions):
    """Attention of all queries at once.

    Keys are [B, K, C, S] and values [B, K, S, C], so neither product transposes them. On XLA's CPU backend that would
    double its time.
    """
    B, T, H, C = q.shape
    K, S = v.shape[1:3]
    # One product for each key head: XLA's CPU backend takes twice as long for an einsum over five axes.
    q = (q * C**-0.5).reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    # Not -1, which cannot be inferred for an array without rows (text without tiles).
    q = q.reshape(B, K, H // K * T, C)
    logits = jnp.einsum("BKQC,BKCS->BKQS", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(B, K, H // K, T, S)
    mask = _visible(q_segment_ids, q_positions, kv_segment_ids, kv_positions)
    if mask is not None:
        # The minimum is finite, so the softmax of a padding query, which sees nothing, is not NaN.
        logits += jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min / 2)[:, None, None]
    # As in flash attention, the division by the sum follows the product with the values: one division per channel
    # instead of one per key. This halves the passes over the largest array.
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - highest)
    if (B, T) == (1, 1) and kernels.platform() == "cpu":
        # For a matrix product XLA's CPU backend would copy the values of a cache four times at every step.
        mixed = (weights[..., None] * v[:, :, None, None].astype(jnp.float32)).sum(axis=-2)
    else:
        mixed = jnp.einsum(
            "BKQS,BKSC->BKQC",
            weights.astype(v.dtype).reshape(B, K, H // K * T, S),
            v,
            preferred_element_type=jnp.float32,
        )
    mixed = mixed.reshape(B, K, H // K, T, C) / weights.sum(axis=-1, keepdims=True)
    return mixed.astype(v.dtype).transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def _visible(q_segment_ids, q_positions, kv_segment_ids, kv_positions):
    """Which keys a query may see, bool [B, T, S]; None means all."""
    mask = None
    if q_segment_ids is not None:
        of_keys = kv_segment_ids[:, None]
        mask = (q_segment_ids[:, :, None] == of_keys) & (of_keys > 0)
    if q_positions is not None:
        causal = kv_positions[:, None] <= q_positions[:, :, None]
        mask = causal if mask is None else mask & causal
    return mask
