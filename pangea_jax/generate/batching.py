"""Continuous batching (Yu et al. 2022): a row whose answer has ended takes the next prompt.

A prompt is prefilled alone or with a few prompts of the same shape. Its cache then moves into a free row of the batch.
The batch decodes a few steps at a time. A prompt that begins like the prompt of a row (a question about the same
picture) reuses the cache of that row, even after the row's answer has ended, until another prompt takes the row.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from pangea_jax.generate.decode import Sampling, until
from pangea_jax.generate.programs import Programs
from pangea_jax.generate.prompt import Prompt

# The host looks for ended answers after so many steps. With a larger number rows stay idle for longer.
STEPS = 16
# A prefill of this many tokens keeps a device busy. With more tokens the time per token does not fall.
_PREFILL_TOKENS = 512
# Largest number of prompts that a shard prefills at once, because a prompt is padded to 64 tokens or more.
AT_ONCE = _PREFILL_TOKENS // 64
# A prompt reuses a prefix only if it has at least this many tokens and is at least half of the prompt.
_LEAST_SHARED = 128


class Batch:
    """Rows that decode together. Prompts enter free rows and leave when their answers end.

    It has ten parameters: these are all facts about one call of `Engine.generate` and the engine's own functions.

    Args:
      rows: largest number of answers at once; the device computes `Programs.row_bucket(rows)`.
      width: tokens of the longest prompt after padding.
      limit, max_new_tokens: largest number of tokens of an answer, and the number of slots for them.
      stop_ids, stop_strings: what ends an answer.
      decode: token ids -> text.
      shape: prompt -> tokens and tiles after padding.
      lay: prompts -> their batch on the devices.

    Raises:
      ValueError: `rows` is less than 1.
    """

    def __init__(
        self,
        programs: Programs,
        rows: int,
        width: int,
        *,
        limit: int,
        max_new_tokens: int,
        stop_ids: Int[np.ndarray, " Z"],
        stop_strings: Collection[str],
        decode: Callable[[Sequence[int]], str],
        shape: Callable[[Prompt], tuple[int, int]],
        lay: Callable[[Sequence[Prompt]], dict[str, Any]],
    ):
        if rows < 1:
            raise ValueError(f"rows must be at least 1, not {rows}")
        self._programs, self._decode, self._width = programs, decode, width
        self._limit, self._room, self._stop_ids = np.int32(limit), max_new_tokens, stop_ids
        self._ends = StopStrings(stop_strings) if stop_strings else None
        self._shape, self._lay = shape, lay
        self._names: list[Any] = [None] * rows
        # The prompt of each row, and how many of its tokens are in the first slots.
        self._read: list[tuple[Prompt, int] | None] = [None] * rows
        self._computed = programs.row_bucket(rows)
        self._sampling = jax.tree.map(np.array, Sampling.make(self._computed))
        self._state = programs.idle(self._computed, width, max_new_tokens, stop_ids[0])

    @property
    def free(self) -> list[int]:
        return [row for row, name in enumerate(self._names) if name is None]

    @property
    def busy(self) -> bool:
        return any(name is not None for name in self._names)

    def kinds(self, prompts: Iterable[Prompt]) -> Iterator[tuple]:
        """Yields a key for each of the next prompts. Prompts with equal keys can be prefilled together.

        A key holds the padded tokens and tiles, and if a row has a shared prefix, that row and the prefix's length.
        """
        first = None
        for prompt in prompts:
            source = self._source(prompt)
            if source is None:
                # A prompt that can reuse the first one waits for it.
                waits = first is not None and self._from(first, prompt, len(first.tokens)) > 0
                yield (*self._shape(prompt), waits)
            else:
                yield (*self._shape(prompt.rest(source[1])), *source)
            first = first or prompt

    def enter(self, names: Sequence[Any], prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Prefills prompts of one kind into free rows. `leave` returns the answers with these `names`.

        Raises:
          ValueError: the prompts are wider than the batch.
        """
        source = self._source(prompts[0])
        shared = 0 if source is None else source[1]
        batch = self._lay([prompt.rest(shared) if shared else prompt for prompt in prompts])
        width = batch.tokens.shape[1]
        if width > self._width:
            raise ValueError(
                f"a prompt of {width} tokens, as padded, enters a batch of width {self._width}"
            )
        rows = np.array(self.free[: len(names)], np.int32)
        for row, name, prompt in zip(rows, names, prompts, strict=True):
            self._names[row], self._read[row] = name, (prompt, shared or len(prompt.tokens))
        for ours, theirs in zip(jax.tree.leaves(self._sampling), jax.tree.leaves(sampling)):
            ours[rows] = theirs
        settings = batch, self._programs.place(sampling), self._stop_ids, self._limit
        if source is None:
            begun = self._programs.begin(*settings, room=0, max_new_tokens=self._room)
        else:
            begun = self._programs.follow(self._state, tuple(map(np.int32, source)), *settings)
        self._state = self._programs.insert(self._state, begun, rows)

    def _source(self, prompt: Prompt) -> tuple[int, int] | None:
        """The row that shares the longest prefix with the prompt, and the length of the prefix in tokens."""
        found = [
            (self._from(read[0], prompt, read[1]), -row)
            for row, read in enumerate(self._read)
            if read is not None
        ]
        shared, row = max(found, default=(0, 0))
        return (-row, shared) if shared else None

    def _from(self, read: Prompt, prompt: Prompt, most: int) -> int:
        """How many of the first `most` tokens of `read` the prompt can reuse; 0 if they are too few."""
        length = len(prompt.tokens)
        shared, pictures = min(read.shared(prompt), most, length - 1), prompt.pictures_end
        if shared < max(pictures, _LEAST_SHARED) or self._shape(prompt)[0] > self._width:
            return 0
        # Rounded, so that more prompts share one length and can be prefilled together.
        shared = max(shared - shared % 64, pictures)
        # The last slots of the width are for the rest of the prompt.
        shared = min(shared, self._width - self._shape(prompt.rest(shared))[0])
        return shared if shared >= max(pictures, _LEAST_SHARED, length / 2) else 0

    def advance(self) -> None:
        """Starts `STEPS` more steps and does not wait for them."""
        live = np.zeros(self._computed, bool)
        live[: len(self._names)] = [name is not None for name in self._names]
        settings = self._programs.place(self._sampling), self._stop_ids, self._limit
        self._state = self._programs.advance(self._state, *settings, live, steps=STEPS)

    def leave(self) -> Iterator[tuple[Any, str]]:
        """Yields (name, answer) of the rows that have ended and frees these rows."""
        now = self._state
        # Copied, because the next step donates the arrays.
        tokens, chosen, done = (np.array(x) for x in (now.tokens, now.chosen, now.done))
        for row, name in enumerate(self._names):
            if name is None or not (done[row] or self._ends):
                continue
            text = self._decode(until(tokens[row, : chosen[row]].tolist(), self._stop_ids))
            if self._ends:
                if not (done[row] or self._ends.surely_in(text)):
                    continue
                text = self._ends.cut(text)
            self._names[row] = None
            yield name, text


class StopStrings:
    """Texts that end an answer; the answer does not include them."""

    def __init__(self, texts: Collection[str]):
        if isinstance(texts, str) or not (
            isinstance(texts, Collection) and all(isinstance(t, str) and t for t in texts)
        ):
            raise ValueError(f"stop_strings {texts!r:.80} is not a list of texts")
        self._texts = tuple(texts)
        self._pattern = re.compile("|".join(map(re.escape, texts)))

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return self._pattern.split(text, maxsplit=1)[0]

    def surely_in(self, text: str) -> bool:
        """Whether `cut` stays the same when the text grows.

        It does if the text has a stop string, and no stop string that begins earlier can still become complete.
        """
        text = text.rstrip("\ufffd")  # an incomplete character
        found = self._pattern.search(text)
        return found is not None and not any(
            stop.startswith(text[start:])
            for stop in self._texts
            for start in range(max(0, len(text) - len(stop) + 1), found.start())
        )


def part_size(kinds: Iterable[tuple], free: int, shards: int) -> int:
    """How many of the next prompts to prefill at once, given their keys (`Batch.kinds`).

    These are as many equal ones as keep every shard busy, or else at most one per shard. So each shape is compiled for
    at most two sizes.
    """
    kinds = iter(kinds)
    first = next(kinds)
    full = shards * max(1, 1 << (_PREFILL_TOKENS // first[0]).bit_length() >> 1)
    following = itertools.islice(kinds, full - 1)
    alike = 1 + sum(1 for _ in itertools.takewhile(lambda kind: kind == first, following))
    size = min(alike, free, full)
    return size if size == full else min(size, shards)
