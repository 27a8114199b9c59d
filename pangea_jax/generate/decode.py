"""Decoding in one `lax.while_loop` with static shapes, greedy or sampled, until every row has ended."""

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
    """How each row chooses its next token. All settings are arrays, so a new value does not recompile.

    Attributes:
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_k: only the k likeliest tokens, and others as likely as the k-th, are drawn; 0 means all.
      top_p: of these, only the likeliest tokens that together have this probability (Holtzman et al. 2020).
      seed: seed of the random draws. They do not depend on the rest of the batch, so equal prompts need different seeds
        to get different answers.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    seed: UInt32[Array, " B"]

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
        """Takes one value for all rows, or one value per row.

        Raises:
          ValueError: a value is out of range, or the number of values is not the number of rows.
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
class Likely:
    """Log-probabilities of the answers' tokens under the model, before temperature and filters.

    Attributes:
      chosen: of each token of the answer.
      ids, values: the K likeliest tokens at its place, and their log-probabilities, the likeliest first.
    """

    chosen: Float[Array, " B *M"]
    ids: Int[Array, "B *M K"]
    values: Float[Array, "B *M K"]


@struct.dataclass
class Decoding:
    """State of a batch that is being decoded. Rows may have begun at different times.

    Attributes:
      tokens: tokens of the answers, at most M per row; the first stop id fills the rest.
      chosen: number of tokens of each row, at least one. The last one is not in the cache yet.
      done: whether each row has ended.
      lengths: lengths of the prompts.
      cache: the prompts, and the answers in the last M slots. A step writes the same slot of every row. After the last
        slot follows the first of the M. No row chooses more than M tokens, so none overwrites its own.
      likely: log-probabilities of the tokens, for a batch that keeps them; zeros in rows that did not want them.
    """

    tokens: Int[Array, "B M"]
    chosen: Int[Array, " B"]
    done: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    cache: KVCache
    likely: Likely | None = None


def last_hidden(
    hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B D"], Int[Array, " B"]]:
    """Hidden state at each right-padded prompt's last token, and the prompts' lengths."""
    lengths = jnp.sum(segment_ids > 0, axis=1)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], lengths


def keep_likely(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """The logits, with -inf for all but the likeliest tokens: at most `top_k`, then up to the probability `top_p`.

    The likeliest token is always kept. Tokens as likely as the last one kept are kept too.
    """
    V = logits.shape[-1]
    sorted_ = jnp.sort(logits, axis=-1, descending=True)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    kth = jnp.take_along_axis(sorted_, k[:, None] - 1, axis=-1)
    sorted_ = jnp.where(sorted_ >= kth, sorted_, -jnp.inf)
    probabilities = jax.nn.softmax(sorted_, axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = top_p[:, None]
    # Rounding may change the sum of all a little from 1. This must not cut any token.
    kept = (likelier < top_p) | (top_p >= 1) | (jnp.arange(V) == 0)
    least = jnp.min(jnp.where(kept, sorted_, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= jnp.maximum(least, kth), logits, -jnp.inf)


def choose(
    logits: Float[Array, "B V"], sampling: Sampling | None, step: Int[Array, "*B"] | int
) -> Int[Array, " B"]:
    """The next token of each row, its `step`-th; the likeliest one without `sampling`."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling is None:
        return likeliest
    sampled = sampling.temperature > 0
    filtered = sampled & ((sampling.top_k > 0) | (sampling.top_p < 1))

    def draw():
        scaled = logits / jnp.where(sampled, sampling.temperature, 1.0)[:, None]
        # Sorting the vocabulary takes longer than the rest of the step.
        kept = jax.lax.cond(
            jnp.any(filtered),
            lambda: keep_likely(scaled, sampling.top_k, sampling.top_p),
            lambda: scaled,
        )
        steps = jnp.broadcast_to(step, sampling.seed.shape)
        keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(
            sampling.seed, steps
        )
        drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(sampled, drawn, likeliest)

    return jax.lax.cond(jnp.any(sampled), draw, lambda: likeliest)


def likelihoods(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], top: int, wants: Bool[Array, " B"]
) -> Likely:
    """The log-probabilities of one token a row, and of the `top` likeliest; zeros if no row wants them."""

    def find():
        values = jax.nn.log_softmax(logits, axis=-1)
        best, ids = jax.lax.top_k(values, top)
        return Likely(jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0], ids, best)

    def none():
        B = len(logits)
        return Likely(jnp.zeros(B), jnp.zeros((B, top), jnp.int32), jnp.zeros((B, top)))

    return jax.lax.cond(jnp.any(wants), find, none)


def begin(
    model: Pangea,
    hidden: Float[Array, "B D"],
    lengths: Int[Array, " B"],
    cache: KVCache,
    *,
    max_new_tokens: int,
    limit: Int[Array, "*B"] | int,
    stop_ids: Int[Array, " Z"],
    sampling: Sampling | None = None,
    top: int = 0,
    wants: Bool[Array, " B"] | None = None,
) -> Decoding:
    """Chooses the first tokens after a prefill. Empty rows are done at once.

    It has ten parameters: the results of a prefill, and what each answer may set.

    Args:
      hidden, lengths: from `last_hidden`.
      cache: from `Pangea.prefill`. `advance` needs a free slot for every token but the last.
      max_new_tokens: M, the number of places for an answer; another value compiles again.
      limit: largest number of tokens of an answer, at most M, for all rows or for each; another value does not compile
        again.
      stop_ids: a row ends with the first of these.
      top: K, if the batch keeps log-probabilities (`Likely`); 0 if not.
      wants: which rows want them.
    """
    logits = model.language.logits(hidden)
    token = choose(logits, sampling, 0)
    token = jnp.where(lengths == 0, stop_ids[0], token)
    tokens = jnp.full((len(token), max_new_tokens), stop_ids[0], jnp.int32).at[:, 0].set(token)
    done = (lengths == 0) | jnp.isin(token, stop_ids) | (jnp.asarray(limit) <= 1)
    likely = None
    if top:
        first = likelihoods(logits, jnp.maximum(token, 0), top, wants)
        likely = jax.tree.map(
            lambda x: (
                jnp.zeros((x.shape[0], max_new_tokens, *x.shape[1:]), x.dtype).at[:, 0].set(x)
            ),
            first,
        )
    return Decoding(tokens, jnp.ones_like(lengths), done, lengths, cache, likely)


def advance(
    model: Pangea,
    decoding: Decoding,
    *,
    steps: Int[Array, ""] | int,
    limit: Int[Array, "*B"] | int,
    stop_ids: Int[Array, " Z"],
    sampling: Sampling | None = None,
    wants: Bool[Array, " B"] | None = None,
) -> Decoding:
    """Adds at most `steps` tokens to each row. A row ends with a stop id or when it has `limit` tokens.

    `wants`: which rows want log-probabilities, if the batch keeps them.
    """
    decoder, dtype = model.language, model.config.dtype
    M, slots = decoding.tokens.shape[1], decoding.cache.segment_ids.shape[1]
    places = jnp.arange(M)

    def unfinished(carry):
        step, now = carry
        return (step < steps) & ~jnp.all(now.done)

    def body(carry):
        step, now = carry
        last = jnp.take_along_axis(now.tokens, now.chosen[:, None] - 1, axis=1)
        # A row that has ended continues with a stop id, which may be outside the vocabulary.
        last = jnp.clip(last, 0, model.config.language.vocab_size - 1)
        positions = (now.lengths + now.chosen - 1)[:, None]
        x = decoder.embed(last, dtype)
        x, cache = decoder.extend(x, positions, jnp.ones_like(positions), now.cache)
        cache = cache.replace(length=jnp.where(cache.length == slots, slots - M, cache.length))
        logits = decoder.logits(x[:, 0])
        token = choose(logits, sampling, now.chosen)
        likely = now.likely
        if likely is not None:
            here = likelihoods(logits, token, likely.ids.shape[-1], wants)
            rows = jnp.arange(len(token))
            likely = jax.tree.map(
                lambda kept, x: kept.at[rows, now.chosen].set(x, mode="drop"), likely, here
            )
        token = jnp.where(now.done, stop_ids[0], token)
        tokens = jnp.where(places == now.chosen[:, None], token[:, None], now.tokens)
        chosen = now.chosen + ~now.done
        done = now.done | jnp.isin(token, stop_ids) | (chosen >= limit)
        return step + 1, Decoding(tokens, chosen, done, now.lengths, cache, likely)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), decoding))[1]


def idle(cache: KVCache, max_new_tokens: int, stop_id: int, top: int = 0) -> Decoding:
    """A batch in which all rows have ended; `insert` fills it.

    Args:
      cache: an empty cache with room for the widest prompt and the new tokens.
      top: see `begin`.
    """
    rows, slots = cache.segment_ids.shape
    zeros = jnp.zeros(rows, jnp.int32)
    likely, places = None, (rows, max_new_tokens)
    if top:
        ids = jnp.zeros((*places, top), jnp.int32)
        likely = Likely(jnp.zeros(places), ids, jnp.zeros((*places, top)))
    return Decoding(
        jnp.full((rows, max_new_tokens), stop_id, jnp.int32),
        zeros + 1,
        zeros == 0,
        zeros,
        cache.replace(length=jnp.int32(slots - max_new_tokens)),
        likely,
    )


def insert(decoding: Decoding, begun: Decoding, rows: Int[Array, " A"]) -> Decoding:
    """The batch with A of its rows replaced by new ones.

    Args:
      begun: from `begin`, after a prefill without free slots. Its prompts are no wider than those of the batch.
      rows: indices of the rows to replace. An index beyond the batch drops that row of `begun`.
    """
    old, new = decoding.cache, begun.cache
    slots, width = old.segment_ids.shape[1], new.segment_ids.shape[1]

    def put(into, values):
        return into.at[rows].set(values, mode="drop")

    def put_slots(into, values):  # empties all other slots of the row
        return put(into, jnp.pad(values, ((0, 0), (0, slots - width))))

    def put_tokens(into, values, axis):
        def places(slots):
            index = [..., rows, slice(None), slice(None), slice(None)]
            index[axis] = slots
            return tuple(index)

        # A masked slot has weight 0, but a NaN or infinity of an earlier prompt times 0 is NaN.
        into = into.at[places(slice(width, None))].set(0, mode="drop")
        return into.at[places(slice(width))].set(values, mode="drop")

    cache = KVCache(
        *old.map(put_tokens, new),
        put_slots(old.segment_ids, new.segment_ids),
        put_slots(old.positions, new.positions),
        old.length,
    )
    names = ("tokens", "chosen", "done", "lengths")
    replaced = {name: put(getattr(decoding, name), getattr(begun, name)) for name in names}
    likely = jax.tree.map(put, decoding.likely, begun.likely)
    return Decoding(**replaced, cache=cache, likely=likely)


def fork(
    decoding: Decoding, row: Int[Array, ""], shared: Int[Array, ""], *, copies: int, rest: int
) -> KVCache:
    """Copies of the cache of a row's prompt, for prompts that share a prefix with it.

    Args:
      row: the row. Its first slots hold the first `shared` tokens of its prompt, even after it has ended.
      rest: number of slots for other tokens; they are the last ones of a prompt.
    """
    width = decoding.cache.segment_ids.shape[1] - decoding.tokens.shape[1]

    def of_row(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, row, 1, axis)

    ids, positions = (
        of_row(x, 0)[:, :width] for x in (decoding.cache.segment_ids, decoding.cache.positions)
    )
    kept = (jnp.arange(width) < shared) & (ids > 0)

    def of_tokens(x, axis):
        # Zeros elsewhere, for the same reason as in `insert`.
        x = jax.lax.slice_in_dim(of_row(x, x.ndim - 4), 0, width, axis=axis)
        return jnp.where(kept[:, None, None] if axis == -1 else kept[:, None, :, None], x, 0)

    k, v = decoding.cache.map(of_tokens)
    cache = KVCache(k, v, jnp.where(kept, ids, 0), positions, jnp.int32(width - rest))
    return cache.repeat(copies)


def follow(
    model: Pangea,
    decoding: Decoding,
    row: Int[Array, ""],
    shared: Int[Array, ""],
    tokens: Int[Array, "A T"],
    segment_ids: Int[Array, "A T"],
) -> tuple[Float[Array, "A D"], Int[Array, " A"], KVCache]:
    """Prefills prompts that share a prefix with the prompt of a row, from the cache of that row.

    Args:
      row, shared: see `fork`.
      tokens, segment_ids: the rest of the A prompts, right-padded text. It takes the last T slots of a prompt.

    Returns:
      What `begin` needs: last hidden states, lengths of the whole prompts, and a cache with the slots of a prompt.
    """
    decoder, (A, T) = model.language, tokens.shape
    cache = fork(decoding, row, shared, copies=A, rest=T)
    places = jnp.broadcast_to(shared + jnp.arange(T), (A, T))
    x = decoder.embed(tokens, model.config.dtype)
    hidden, cache = decoder.extend(x, places, segment_ids, cache)
    last, lengths = last_hidden(hidden, segment_ids)
    return last, jnp.where(lengths > 0, shared + lengths, 0), cache


def read_on(
    model: Pangea,
    last: Float[Array, "A D"],
    cache: KVCache,
    x: Float[Array, "A C D"],
    positions: Int[Array, "A C"],
    segment_ids: Int[Array, "A C"],
) -> tuple[Float[Array, "A D"], KVCache]:
    """Reads the next C tokens of right-padded prompts into their cache.

    Args:
      last: hidden state of the last token of each prompt that was read before.
    """
    hidden, cache = model.language.extend(x, positions, segment_ids, cache)
    newest, lengths = last_hidden(hidden, segment_ids)
    return jnp.where(lengths[:, None] > 0, newest, last), cache


def complete(
    model: Pangea,
    hidden: Float[Array, "B D"],
    lengths: Int[Array, " B"],
    cache: KVCache,
    *,
    max_new_tokens: int,
    stop_ids: Int[Array, " Z"],
    sampling: Sampling | None = None,
) -> Int[Array, "B {max_new_tokens}"]:
    """The tokens of the answers up to and including a stop id, then `stop_ids[0]`; arguments as for `begin`."""
    settings = {"limit": max_new_tokens, "stop_ids": stop_ids, "sampling": sampling}
    begun = begin(model, hidden, lengths, cache, max_new_tokens=max_new_tokens, **settings)
    return advance(model, begun, steps=max_new_tokens - 1, **settings).tokens


def until(tokens: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first of `stop_ids`."""
    return list(itertools.takewhile(lambda token: token not in stop_ids, tokens))
