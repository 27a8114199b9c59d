"""Decoding in one `lax.while_loop`: static shapes, greedy or sampled, until every row has ended."""

import itertools
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from pangea_jax.model import KVCache, Pangea


@struct.dataclass
class Sampling:
    """How each row chooses its next token. All are values, so no setting compiles anything anew.

    Attributes:
      temperature: 0 takes the likeliest token; above, logits are divided by it.
      top_k: only the k likeliest tokens and those equal to the k-th; 0 for all.
      top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2020),
        after `top_k`.
      seed: decides what is drawn. A row draws the same whatever else is in the batch, so equal
        prompts need different seeds to be answered differently.
    """

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    top_k: Int[Array, "B"]
    seed: UInt32[Array, "B"]

    @classmethod
    def make(
        cls,
        rows: int,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_p: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        seed: int | Sequence[int] = 0,
    ) -> "Sampling":
        """One value for all rows, or one a row.

        Raises:
          ValueError: a value out of range, or another number of values than rows.
        """
        return cls(
            _column("temperature", temperature, rows, np.float32, 0, np.inf, "0 or more"),
            _column("top_p", top_p, rows, np.float32, 0, 1, "within 0 and 1"),
            _column("top_k", top_k, rows, np.int32, 0, 2**31 - 1, "0 (all tokens) or more"),
            _column("seed", seed, rows, np.uint32, 0, 2**32 - 1, "within 0 and 2**32 - 1"),
        )

    def rows(self, which: slice) -> "Sampling":
        return jax.tree.map(lambda column: column[which], self)


def _column(name, value, rows, dtype, low, high, range_in_words) -> np.ndarray:
    values = np.asarray(value)
    if values.shape not in ((), (rows,)):
        raise ValueError(f"{name}: {values.size} values for {rows} rows; give one, or one a row")
    whole = np.issubdtype(values.dtype, np.integer)
    if not (whole or (np.issubdtype(values.dtype, np.floating) and dtype is np.float32)):
        raise ValueError(
            f"{name} {value!r} is not {'a number' if dtype is np.float32 else 'whole'}"
        )
    if not ((values >= low) & (values <= high) & (values < np.inf)).all():
        raise ValueError(f"{name} {value} must be {range_in_words}")
    return np.broadcast_to(values.astype(dtype), (rows,))


@struct.dataclass
class Decoding:
    """Where the decoding of a batch stands; `step` tokens a row have been chosen."""

    step: Int[Array, ""]
    token: Int[Array, "B"]  # the last one chosen, not yet in the cache
    done: Bool[Array, "B"]
    lengths: Int[Array, "B"]  # of the prompts
    cache: KVCache


def last_hidden(
    hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B D"], Int[Array, "B"]]:
    """Hidden state at each right-padded prompt's last token, and the prompts' lengths."""
    lengths = jnp.sum(segment_ids > 0, axis=1)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], lengths


def keep_likely(
    logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """-inf for all but the likeliest tokens, first by number, then by joint probability.

    The likeliest token always stays, and so do tokens as likely as the last one kept.
    """
    V = logits.shape[-1]
    sorted_ = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    kth = jnp.take_along_axis(sorted_, k[:, None] - 1, axis=-1)
    sorted_ = jnp.where(sorted_ >= kth, sorted_, -jnp.inf)
    probabilities = jax.nn.softmax(sorted_, axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = top_p[:, None]
    # The sum of all may come out a little under or over 1, which must not cut anything off.
    kept = (likelier < top_p) | (top_p >= 1) | (jnp.arange(V) == 0)
    least = jnp.min(jnp.where(kept, sorted_, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.maximum(least, kth), logits, -jnp.inf)


def choose(
    logits: Float[Array, "B V"], sampling: Sampling | None, step: Int[Array, ""]
) -> Int[Array, "B"]:
    """Each row's next token, its `step`-th; greedy without `sampling`."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling is None:
        return likeliest
    sampled = sampling.temperature > 0
    filtered = sampled & ((sampling.top_k > 0) | (sampling.top_p < 1))

    def draw():
        scaled = logits / jnp.where(sampled, sampling.temperature, 1.0)[:, None]
        # Sorting a vocabulary takes longer than all the rest.
        kept = jax.lax.cond(
            jnp.any(filtered),
            lambda: keep_likely(scaled, sampling.top_k, sampling.top_p),
            lambda: scaled,
        )
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(sampling.seed)
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(sampled, drawn, likeliest)

    return jax.lax.cond(jnp.any(sampled), draw, lambda: likeliest)


def begin(
    model: Pangea,
    hidden: Float[Array, "B D"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    *,
    stop_ids: Int[Array, "Z"],
    sampling: Sampling | None = None,
) -> Decoding:
    """Chooses the first tokens after a prefill; empty rows are done before they begin.

    Args:
      hidden, lengths: from `last_hidden`.
      cache: from `Pangea.prefill`, with a free slot for every token to come but the last.
      stop_ids: a row ends with the first of these.
    """
    token = choose(model.language.logits(hidden), sampling, jnp.int32(0))
    done = (lengths == 0) | jnp.isin(token, stop_ids)
    return Decoding(jnp.int32(1), token, done, lengths, cache)


def advance(
    model: Pangea,
    decoding: Decoding,
    *,
    steps: int,
    limit: Int[Array, ""] | int,
    stop_ids: Int[Array, "Z"],
    sampling: Sampling | None = None,
) -> tuple[Int[Array, "B {steps}"], Decoding]:
    """At most `steps` more tokens, until `limit` are chosen in all or every row has ended.

    Returns:
      The tokens, `stop_ids[0]` where a row has ended before, and where the decoding stands.
    """
    decoder = model.language
    dtype = model.config.dtype
    start = decoding.step
    tokens = jnp.full((len(decoding.token), steps), stop_ids[0], jnp.int32)

    if not steps:  # an answer of one token is done with the prefill
        return tokens, decoding

    def unfinished(carry):
        now, _ = carry
        return (now.step < jnp.minimum(start + steps, limit)) & ~jnp.all(now.done)

    def body(carry):
        now, tokens = carry
        positions = (now.lengths + now.step - 1)[:, None]
        x = decoder.embed(now.token[:, None], dtype)
        x, cache = decoder.extend(x, positions, jnp.ones_like(positions), now.cache)
        token = choose(decoder.logits(x[:, 0]), sampling, now.step)
        token = jnp.where(now.done, stop_ids[0], token)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, now.step - start))
        done = now.done | jnp.isin(token, stop_ids)
        return Decoding(now.step + 1, token, done, now.lengths, cache), tokens

    decoding, tokens = jax.lax.while_loop(unfinished, body, (decoding, tokens))
    return tokens, decoding


def complete(
    model: Pangea,
    hidden: Float[Array, "B D"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    *,
    max_new_tokens: int,
    stop_ids: Int[Array, "Z"],
    sampling: Sampling | None = None,
    limit: Int[Array, ""] | int | None = None,
) -> Int[Array, "B {max_new_tokens}"]:
    """All tokens of an answer: up to and including a stop id, then `stop_ids[0]` over and over.

    Args:
      hidden, lengths, cache, stop_ids: as of `begin`.
      limit: most tokens to choose, where that changes more often than the shape may.
    """
    limit = max_new_tokens if limit is None else limit
    begun = begin(model, hidden, lengths, cache, stop_ids=stop_ids, sampling=sampling)
    more, _ = advance(
        model, begun, steps=max_new_tokens - 1, limit=limit, stop_ids=stop_ids, sampling=sampling
    )
    first = jnp.where(lengths == 0, stop_ids[0], begun.token)
    return jnp.concatenate([first[:, None], more], axis=1)


def greedy(
    model: Pangea,
    hidden: Float[Array, "B D"],
    lengths: Int[Array, "B"],
    cache: KVCache,
    *,
    max_new_tokens: int,
    stop_id: Int[Array, ""] | int,
) -> Int[Array, "B {max_new_tokens}"]:
    """`complete` of the likeliest tokens, up to one stop id."""
    stop_ids = jnp.asarray(stop_id, jnp.int32)[None]
    return complete(model, hidden, lengths, cache, max_new_tokens=max_new_tokens, stop_ids=stop_ids)


def until(tokens: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first of `stop_ids`."""
    return list(itertools.takewhile(lambda token: token not in stop_ids, tokens))
