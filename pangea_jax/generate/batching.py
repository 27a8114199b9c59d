"""Continuous batching (Yu et al. 2022): a row whose answer has ended takes the next prompt.

A prompt is read alone or with a few of its shape, which keeps any machine busy; then its cache moves into a free row of
the batch that decodes, a few steps at a time. What a row has read serves other prompts that begin likewise (a question
about the same picture), also after its answer has ended, until the row is taken.
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

# Steps before the host looks for answers that have ended. More leave rows idle for longer.
STEPS = 16
# Tokens whose prefill keeps a device's arithmetic busy; more at once take longer, not less a token.
_PREFILL_TOKENS = 512
# Most prompts that are read at once on a shard: none is padded to less than 64 tokens.
AT_ONCE = _PREFILL_TOKENS // 64
# Prompts share what is read if it is so many tokens at least, and half of the prompt.
_LEAST_SHARED = 128


class Batch:
    """Rows that decode together; prompts enter and leave.

    Args:
      rows: most answers under way; the device computes `Programs.row_bucket` of it.
      width: tokens of the longest prompt to come, padded.
      limit, max_new_tokens: most tokens of an answer, and the room for them.
      stop_ids, stop_strings: what ends an answer.
      decode: token ids -> text.
      shape: prompt -> tokens and tiles that it is padded to alone.
      lay: prompts -> a batch of them on the devices.

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
        stop_ids: Int[np.ndarray, "Z"],
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
        # What each row has read, and how much of it lies in its first slots.
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
        """What prompts to come have to be alike in to be read together: the tokens and tiles that are read,
        padded, and the row they are read after with its part of the tokens."""
        first = None
        for prompt in prompts:
            source = self._source(prompt)
            if source is None:
                # One that can be read after the first waits for it.
                waits = first is not None and self._from(first, prompt, len(first.tokens)) > 0
                yield (*self._shape(prompt), waits)
            else:
                yield (*self._shape(prompt.rest(source[1])), *source)
            first = first or prompt

    def enter(self, names: Sequence[Any], prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Reads prompts of one kind into free rows, under names that their answers will have.

        Raises:
          ValueError: they are wider than the batch.
        """
        source = self._source(prompts[0])
        shared = 0 if source is None else source[1]
        batch = self._lay([prompt.rest(shared) if shared else prompt for prompt in prompts])
        width = batch["tokens"].shape[1]
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
            begun = self._programs.follow(
                self._state,
                *map(np.int32, source),
                *settings,
                width=self._width,
                max_new_tokens=self._room,
            )
        self._state = self._programs.insert(self._state, begun, rows)

    def _source(self, prompt: Prompt) -> tuple[int, int] | None:
        """The row that has read most of the prompt, and how many tokens of it."""
        found = [
            (self._from(read[0], prompt, read[1]), -row)
            for row, read in enumerate(self._read)
            if read is not None
        ]
        shared, row = max(found, default=(0, 0))
        return (-row, shared) if shared else None

    def _from(self, read: Prompt, prompt: Prompt, most: int) -> int:
        """How many tokens of `prompt`, of the first `most`, need not be read after `read`; 0 if too few are alike."""
        length = len(prompt.tokens)
        shared, pictures = min(read.shared(prompt), most, length - 1), prompt.pictures_end
        if shared < max(pictures, _LEAST_SHARED) or self._shape(prompt)[0] > self._width:
            return 0
        # Prompts that are read together part at one place: after the pictures, or at a round number.
        shared = max(shared - shared % 64, pictures)
        # The last slots of the width are for the rest.
        shared = min(shared, self._width - self._shape(prompt.rest(shared))[0])
        return shared if shared >= max(pictures, _LEAST_SHARED, length / 2) else 0

    def advance(self) -> None:
        """Starts `STEPS` more steps; does not wait for them."""
        live = np.zeros(self._computed, bool)
        live[: len(self._names)] = [name is not None for name in self._names]
        self._state = self._programs.advance(
            self._state,
            self._programs.place(self._sampling),
            self._stop_ids,
            self._limit,
            live,
            steps=STEPS,
        )

    def leave(self) -> Iterator[tuple[Any, str]]:
        """(name, answer) of the rows that have ended, which are free from then on."""
        now = self._state
        # Copies: the next step takes the arrays over.
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
    """Texts that end an answer and are no part of it."""

    def __init__(self, texts: Collection[str]):
        if isinstance(texts, str) or not all(isinstance(t, str) and t for t in texts):
            raise ValueError(f"stop_strings {texts!r} is not a list of texts")
        self._texts = tuple(texts)
        self._pattern = re.compile("|".join(map(re.escape, texts)))

    def cut(self, text: str) -> str:
        """The text before the first of them."""
        return self._pattern.split(text, maxsplit=1)[0]

    def surely_in(self, text: str) -> bool:
        """Whether `cut` is the same for everything that begins with `text`: no other one that starts
        before the first can still come to its end."""
        text = text.rstrip("\ufffd")  # a character that lacks bytes
        found = self._pattern.search(text)
        return found is not None and not any(
            stop.startswith(text[start:])
            for stop in self._texts
            for start in range(max(0, len(text) - len(stop) + 1), found.start())
        )


def part_size(kinds: Iterable[tuple], free: int, shards: int) -> int:
    """How many of the prompts to read at once, by what they have to be alike in: padded tokens and more.

    As many alike as keep every shard busy; else one, or one for each shard, so that a shape is compiled
    for two sizes at most.
    """
    kinds = iter(kinds)
    first = next(kinds)
    full = shards * max(1, 1 << (_PREFILL_TOKENS // first[0]).bit_length() >> 1)
    following = itertools.islice(kinds, full - 1)
    alike = 1 + sum(1 for _ in itertools.takewhile(lambda kind: kind == first, following))
    size = min(alike, free, full)
    return size if size == full else min(size, shards)
