"""The log-likelihood, under a model, of several continuations of one prompt."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pangea_jax.batch import Batch
from pangea_jax.generate.decode import Likely, last_hidden
from pangea_jax.model import KVCache, Pangea


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The continuations of a prompt, split after the tokens that all of them share.

    Attributes:
      shared: number of shared tokens; they are part of the prompt, at least one.
      tails: for each continuation, the tokens after the shared ones.
      unscored: number of first tokens of a tail that belong to the prompt. It is more than 0 if
        tokenising prompt and continuation together changes the last tokens of the prompt.
    """

    shared: int
    tails: tuple[tuple[int, ...], ...]
    unscored: int

    @classmethod
    def make(cls, wholes: Sequence[Sequence[int]], prompt: int) -> "Candidates":
        """Splits sequences of prompt and continuation; the first `prompt` ids are the prompt.

        Raises:
          ValueError: there is no continuation, one has no tokens, or they share no token.
        """
        if not wholes:
            raise ValueError("there are no continuations to score; give at least one")
        for i, whole in enumerate(wholes):
            if len(whole) <= prompt:
                raise ValueError(f"continuation {i} has no tokens after the prompt")
        columns = zip(*(whole[:prompt] for whole in wholes))
        differs = [len(set(column)) > 1 for column in columns]
        shared = differs.index(True) if True in differs else prompt
        # The model must read one token before it can predict the next.
        if not shared:
            raise ValueError(
                "the continuations change the prompt's only token; score them one by one"
            )
        return cls(shared, tuple(tuple(whole[shared:]) for whole in wholes), prompt - shared)


class LogLikelihood(NamedTuple):
    """The score of a continuation.

    Attributes:
      total: sum over its tokens of the natural logarithm of their probability.
      tokens: number of its tokens.
      greedy: whether every token was the most likely one.
    """

    total: float
    tokens: int
    greedy: bool


def pad_candidates(
    candidates: Sequence[Candidates],
) -> tuple[Int[np.ndarray, "B A S"], Bool[np.ndarray, "B A S"]]:
    """The padded tails of a batch, A per prompt with S tokens each, and which tokens are scored.

    S is rounded up to a power of two and A to an even number, so that few shapes are compiled.
    """
    A = max(len(c.tails) for c in candidates)
    S = max(len(tail) for c in candidates for tail in c.tails)
    shape = len(candidates), A + A % 2, 1 << (S - 1).bit_length()
    tokens, scored = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for b, candidate in enumerate(candidates):
        for a, tail in enumerate(candidate.tails):
            tokens[b, a, : len(tail)] = tail
            scored[b, a, candidate.unscored : len(tail)] = True
    return tokens, scored


def score(
    model: Pangea,
    batch: Batch,
    tails: Int[Array, "B A S"],
    scored: Bool[Array, "B A S"],
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """Summed log-likelihoods of tails, and whether all their scored tokens were the most likely.

    The model reads each prompt once; every tail then continues from a copy of its cache.
    """
    hidden, cache = model.prefill(batch, batch.tokens.shape[1] + tails.shape[-1] - 1)
    last, lengths = last_hidden(hidden, jnp.asarray(batch.segment_ids))
    return score_tails(model, last, lengths, cache, tails, scored)


def score_tails(
    model: Pangea,
    last: Float[Array, "B D"],
    lengths: Int[Array, " B"],
    cache: KVCache,
    tails: Int[Array, "B A S"],
    scored: Bool[Array, "B A S"],
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """`score` of prompts that have been read.

    Args:
      last, lengths: see `pangea_jax.generate.decode.last_hidden`.
      cache: of the prompts, with at least S - 1 free slots.
    """
    B, A, S = tails.shape
    before = jnp.broadcast_to(last[:, None, None], (B, A, 1, last.shape[-1]))
    if S > 1:
        cache = cache.repeat(A)
        read = tails[..., :-1].reshape(B * A, S - 1)
        positions = jnp.repeat(lengths, A)[:, None] + jnp.arange(S - 1)
        x = model.language.embed(read, last.dtype)
        x, _ = model.language.extend(x, positions, jnp.ones_like(positions), cache)
        before = jnp.concatenate([before, x.reshape(B, A, S - 1, -1)], axis=2)

    def of_one_prompt(row):  # the logits of all prompts at once would be by far the largest array
        before, tails, scored = row
        logits = model.language.logits(before)
        chosen = jnp.take_along_axis(logits, tails[..., None], axis=-1)[..., 0]
        log_probabilities = chosen - jax.nn.logsumexp(logits, axis=-1)
        total = jnp.sum(jnp.where(scored, log_probabilities, 0.0), axis=-1)
        return total, jnp.all(~scored | (logits.argmax(-1) == tails), axis=-1)

    return jax.lax.map(of_one_prompt, (before, tails, scored))


# Places whose logits are computed at once: those of a whole prompt would be by far the largest array.
_AT_ONCE = 64


def echo(model: Pangea, batch: Batch, *, top: int) -> Likely:
    """The log-probability of each token of the prompts after those before it, and the `top` likeliest there.

    Place t of the result is about token t; place 0 is about no token.
    """
    hidden = model.hidden(batch)
    B, T, D = hidden.shape
    after = jnp.roll(jnp.asarray(batch.tokens), -1, axis=1)
    pad = -T % _AT_ONCE
    x = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, _AT_ONCE, D).swapaxes(0, 1)
    tokens = jnp.pad(after, ((0, 0), (0, pad))).reshape(B, -1, _AT_ONCE).swapaxes(0, 1)

    def of_some(piece):
        x, tokens = piece
        values = jax.nn.log_softmax(model.language.logits(x), axis=-1)
        best, ids = jax.lax.top_k(values, top)
        return Likely(jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0], ids, best)

    found = jax.lax.map(of_some, (x, tokens))

    def joined(x):
        x = x.swapaxes(0, 1).reshape(B, T + pad, *x.shape[3:])[:, :T]
        return jnp.roll(x, 1, axis=1)

    return jax.tree.map(joined, found)
