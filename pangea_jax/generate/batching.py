"""Continuous batching (Yu et al. 2022): a row whose answer has ended takes the next prompt.

A prompt is prefilled alone or with a few prompts of the same shape. Its cache then moves into a free row of the batch.
The batch decodes a few steps at a time. A prompt that begins like the prompt of a row (a question about the same
picture) reuses the cache of that row, even after the row's answer has ended, until another prompt takes the row.

`run` is the one loop: `Engine.generate`, `serve` and `stream` all use it, and so does the evaluation.
"""

import collections
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from pangea_jax.generate.decode import Likely, Sampling
from pangea_jax.generate.programs import Programs
from pangea_jax.generate.prompt import Prompt

# The host looks for ended answers after so many steps. With a larger number rows stay idle for longer.
STEPS = 16
# A prefill of this many tokens keeps a device busy. With more tokens the time per token does not fall.
PREFILL_TOKENS = 512
# Largest number of prompts that a shard prefills at once, because a prompt is padded to 64 tokens or more.
AT_ONCE = PREFILL_TOKENS // 64
# A prompt reuses a prefix only if it has at least this many tokens and is at least half of the prompt.
_LEAST_SHARED = 128


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt to answer.

    Attributes:
      name: any value, for the caller.
      sampling: for one row.
      limit: largest number of new tokens; at most the batch's `max_new_tokens`.
      ends: texts that end the answer.
      wants: whether log-probabilities are wanted; the batch must keep them (`top`).
      cancelled: set it, from any thread, and the request gives up its row after the next steps.
    """

    name: Any
    prompt: Prompt
    sampling: Sampling
    limit: int
    ends: "StopStrings | None" = None
    wants: bool = False
    cancelled: bool = False


class Progress(NamedTuple):
    """What a request got in the last steps.

    Attributes:
      tokens: all tokens of the answer until now; a stop id is the last one.
      new: how many of them are new.
      ended: "" while it goes on; "stop" after a stop id or a stop string, "length" at the limit.
      text: the answer until now, cut at a stop string; None if nobody has looked at it yet.
      likely: for the new tokens, if they were wanted: arrays [new], [new, K], [new, K].
    """

    request: Request
    tokens: list[int]
    new: int
    ended: str
    text: str | None
    likely: Likely | None


def run(
    batch: "Batch",
    take: Callable[[int, bool], Iterable[Request]],
    *,
    chunk: int | None = None,
    pace: float | None = None,
) -> Iterator[Progress]:
    """Answers requests, which join and leave between steps, and yields how each of them goes on.

    Args:
      take: (most, wait) -> at most `most` more requests. If `wait` is true, nothing is left to do: no request then ends
        the loop.
      chunk: read about so many tokens of prompts between the steps of the answers under way. By default prompts are
        read whole and all free rows are filled first: best for the rate, but running answers wait.
      pace: seconds between two looks at the answers, if the device is fast enough for several steps in that time. By
        default there are `STEPS` steps. The clocks of several processes differ, so give none there.
    """
    waiting = collections.deque(take(batch.rows, True))
    steps = 1 if pace else STEPS
    while waiting or batch.busy:
        batch.release()
        read = batch.admit(waiting, chunk)
        begun = time.monotonic()
        batch.advance(steps)
        waiting.extend(take(batch.rows - len(waiting), False))
        yield from batch.leave()
        if pace and not read:
            each = (time.monotonic() - begun) / steps
            steps = max(1, min(STEPS, 2 * steps, int(pace / max(each, 1e-6))))
        if not (waiting or batch.busy):
            waiting.extend(take(batch.rows, True))


class Batch:
    """Rows that decode together. Prompts enter free rows and leave when their answers end.

    It has nine parameters: these are all facts about the answers and the engine's own functions.

    Args:
      rows: largest number of answers at once; the device computes `Programs.row_bucket(rows)`.
      width: tokens of the longest prompt after padding.
      max_new_tokens: number of slots for the tokens of an answer.
      stop_ids: what ends an answer.
      decode: token ids -> text.
      shape: prompt -> tokens and tiles after padding.
      lay: prompts -> their batch on the devices.
      top: number of likeliest tokens whose log-probabilities are kept for requests that want them; 0: none are kept.

    Raises:
      ValueError: `rows` is less than 1.
    """

    def __init__(
        self,
        programs: Programs,
        rows: int,
        width: int,
        *,
        max_new_tokens: int,
        stop_ids: Int[np.ndarray, " Z"],
        decode: Callable[[Sequence[int]], str],
        shape: Callable[[Prompt], tuple[int, int]],
        lay: Callable[[Sequence[Prompt]], Any],
        top: int = 0,
    ):
        if rows < 1:
            raise ValueError(f"rows must be at least 1, not {rows}")
        self._programs, self._decode, self.width = programs, decode, width
        self._room, self.stop_ids, self._top = max_new_tokens, stop_ids, top
        self._shape, self._lay = shape, lay
        self._asked: list[Request | None] = [None] * rows
        self._told: list[int] = [0] * rows
        # The prompt of each row, and how many of its tokens are in the first slots.
        self._read: list[tuple[Prompt, int] | None] = [None] * rows
        self._reading: _Reading | None = None
        computed = programs.row_bucket(rows)
        zeros = np.zeros(computed, np.int32)
        sampling = jax.tree.map(np.array, Sampling.make(computed))
        self._settings = sampling, zeros, zeros.astype(bool)
        self._state = programs.idle(computed, width, max_new_tokens, stop_ids[0], top)

    @property
    def rows(self) -> int:
        return len(self._asked)

    @property
    def free(self) -> list[int]:
        return [row for row, request in enumerate(self._asked) if request is None]

    @property
    def busy(self) -> bool:
        return any(request is not None for request in self._asked)

    @property
    def _live(self) -> np.ndarray:
        """Which of the computed rows decode."""
        reading = self._reading.rows if self._reading else ()
        live = np.zeros(len(self._settings[1]), bool)
        live[: self.rows] = [request is not None for request in self._asked]
        live[list(reading)] = False
        return live

    def release(self) -> None:
        """Frees the rows of requests that were cancelled."""
        for row, request in enumerate(self._asked):
            if request is not None and request.cancelled:
                self._asked[row] = None
        reading = self._reading
        if reading and not any(self._asked[row] for row in reading.rows):
            self._reading = None

    def admit(self, waiting: "collections.deque[Request]", chunk: int | None = None) -> int:
        """Reads what waits into free rows: everything that fits, or about `chunk` tokens of it.

        Of a long prompt that is being read, it reads the next piece of at most `chunk` tokens, too.

        Returns:
          Number of tokens that were read, with padding.
        """
        # A piece of a long prompt does not count: short prompts go on between its pieces.
        piece, read = self._read_on(chunk) if self._reading else 0, 0
        while chunk is None or read < chunk:
            while waiting and waiting[0].cancelled:
                waiting.popleft()
            if not (waiting and self.free):
                break
            kinds = self.kinds(request.prompt for request in waiting)
            size = part_size(kinds, len(self.free), self._programs.shards)
            first = waiting[0].prompt
            is_long = chunk is not None and self._rest(first)[0] > chunk
            if self._reading and (is_long or self._reading.serves(first, self._from)):
                break
            part = [waiting.popleft() for _ in range(size)]
            if is_long:
                self._start_reading(part)
                read += self._read_on(chunk)
            else:
                read += self.enter(part)
        return piece + read

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

    def enter(self, part: Sequence[Request]) -> int:
        """Prefills requests of one kind into free rows; returns the number of tokens, with padding.

        Raises:
          ValueError: the prompts are wider than the batch.
        """
        rows, source, batch = self._seat(part)
        sampling, *others = self._settings_of(part)
        settings = sampling, self.stop_ids, *others
        if source is None:
            sizes = {"max_new_tokens": self._room, "top": self._top}
            begun = self._programs.begin(batch, *settings, **sizes)
        else:
            source = tuple(map(np.int32, source))
            begun = self._programs.follow(self._state, source, batch, *settings)
        self._state = self._programs.insert(self._state, begun, rows)
        return batch.tokens.size

    def _seat(self, part: Sequence[Request]):
        """Gives requests of one kind their rows; returns rows, source, and the batch to read."""
        prompts = [request.prompt for request in part]
        source = self._source(prompts[0])
        shared = 0 if source is None else source[1]
        batch = self._lay([prompt.rest(shared) if shared else prompt for prompt in prompts])
        width = batch.tokens.shape[1]
        if width > self.width:
            raise ValueError(
                f"a prompt of {width} tokens, as padded, enters a batch of width {self.width}"
            )
        rows = np.array(self.free[: len(part)], np.int32)
        for row, request, prompt in zip(rows, part, prompts, strict=True):
            self._asked[row], self._told[row] = request, 0
            self._read[row] = prompt, shared or len(prompt.tokens)
        for ours, theirs in zip(*map(jax.tree.leaves, (self._settings, _settings(part)))):
            ours[rows] = theirs
        return rows, source, batch

    def _settings_of(self, part: Sequence[Request]):
        return self._programs.place(_settings(part))

    def _start_reading(self, part: Sequence[Request]) -> None:
        """Begins to read long prompts of one kind, chunk by chunk."""
        rows, source, batch = self._seat(part)
        self._reading = _Reading.begin(self._programs, self._state, part, rows, source, batch)
        for row in rows:
            self._read[row] = None  # there is nothing to reuse yet

    def _read_on(self, chunk: int) -> int:
        """Reads the next chunk of the long prompts; after the last one they enter their rows."""
        reading = self._reading
        read = reading.read_on(self._programs, chunk)
        if reading.is_whole:
            sampling, *others = self._settings_of(reading.part)
            limit, wants = others
            begun = self._programs.start(
                reading.last,
                reading.lengths,
                reading.cache,
                sampling=sampling,
                stop_ids=self.stop_ids,
                limit=limit,
                wants=wants,
                max_new_tokens=self._room,
                top=self._top,
            )
            self._state = self._programs.insert(self._state, begun, reading.rows)
            for row, request in zip(reading.rows, reading.part, strict=True):
                self._read[row] = request.prompt, reading.shared or len(request.prompt.tokens)
            self._reading = None
        return read

    def _rest(self, prompt: Prompt) -> tuple[int, int]:
        """The shape of what has to be read of a prompt."""
        source = self._source(prompt)
        return self._shape(prompt if source is None else prompt.rest(source[1]))

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
        if shared < max(pictures, _LEAST_SHARED) or self._shape(prompt)[0] > self.width:
            return 0
        # Rounded, so that more prompts share one length and can be prefilled together.
        shared = max(shared - shared % 64, pictures)
        # The last slots of the width are for the rest of the prompt.
        shared = min(shared, self.width - self._shape(prompt.rest(shared))[0])
        return shared if shared >= max(pictures, _LEAST_SHARED, length / 2) else 0

    def advance(self, steps: int = STEPS) -> None:
        """Starts so many more steps and does not wait for them."""
        live = self._live
        if live.any():
            sampling, *others = self._programs.place(self._settings)
            settings = sampling, self.stop_ids, *others
            self._state = self._programs.advance(
                self._state, *settings, live=live, steps=np.int32(steps)
            )

    def leave(self) -> Iterator[Progress]:
        """Yields how each row has gone on, and frees the rows that have ended."""
        live = self._live
        if not live.any():
            return
        now = self._state
        # Copied, because the next step donates the arrays.
        tokens, chosen, done = (np.array(x) for x in (now.tokens, now.chosen, now.done))
        for row in np.flatnonzero(live):
            request, told = self._asked[row], self._told[row]
            ids = tokens[row, : chosen[row]].tolist()
            stopped = bool(done[row]) and ids[-1] in self.stop_ids
            ended = "stop" if stopped else "length" if done[row] else ""
            text = None
            if request.ends:
                text = self._decode(ids[: len(ids) - stopped])
                if request.ends.surely_in(text):
                    ended = "stop"
                if ended:
                    cut = request.ends.cut(text)
                    ended, text = "stop" if cut != text else ended, cut
            likely = None
            if request.wants and told < len(ids):
                piece = slice(told, len(ids))
                likely = jax.tree.map(lambda x: np.asarray(x[row, piece]), now.likely)  # noqa: B023
            self._told[row] = len(ids)
            if ended:
                self._asked[row] = None
            if ended or len(ids) > told:
                yield Progress(request, ids, len(ids) - told, ended, text, likely)


def _settings(part: Sequence[Request]) -> tuple[Sampling, np.ndarray, np.ndarray]:
    """Sampling, limits, and which want log-probabilities, by row."""
    sampling = jax.tree.map(lambda *each: np.concatenate(each), *(r.sampling for r in part))
    limits = np.array([request.limit for request in part], np.int32)
    return sampling, limits, np.array([request.wants for request in part])


class _Reading:
    """Long prompts of one kind that are read chunk by chunk, and the cache of what was read.

    Attributes:
      rows: where they will go.
      shared: number of tokens that came from another row.
      last: hidden state of the last token that was read [A, D].
      lengths: of the whole prompts [A].
    """

    def __init__(self, part, rows, shared, x, positions, segment_ids, cache):
        self.part, self.rows, self.shared, self.cache = part, rows, shared, cache
        self._x, self._positions, self._segment_ids = x, positions, segment_ids
        lengths = np.sum(np.asarray(segment_ids) > 0, axis=1, dtype=np.int32)
        self.lengths = np.where(lengths > 0, lengths + np.int32(shared), 0)
        self.last, self._start = x[:, 0], 0

    @classmethod
    def begin(cls, programs, state, part, rows, source, batch) -> "_Reading":
        A, T = batch.tokens.shape
        shared = 0
        if source is None:
            cache = programs.empty(A, T)
        else:
            row, shared = map(np.int32, source)
            cache = programs.fork(state, row, shared, copies=A, rest=T)
        x = programs.embed(batch)
        return cls(part, rows, int(shared), x, batch.positions + shared, batch.segment_ids, cache)

    @property
    def is_whole(self) -> bool:
        return self._start == self._x.shape[1]

    def read_on(self, programs, chunk: int) -> int:
        A, T = self._x.shape[:2]
        # Equal pieces of at most `chunk` tokens, so that there is one program for each T.
        size = T // next(n for n in range(-(-T // chunk), T + 1) if T % n == 0)
        places = self._x, self._positions, self._segment_ids, np.int32(self._start)
        self.last, self.cache = programs.read_on(self.last, self.cache, *places, size=size)
        self._start += size
        return A * size

    def serves(self, prompt: Prompt, shared: Callable[[Prompt, Prompt, int], int]) -> bool:
        """Whether a prompt can soon reuse what is being read, so that it waits."""
        read = [request.prompt for request in self.part]
        return any(shared(first, prompt, self.shared or len(first.tokens)) > 0 for first in read)


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

    def safe(self, text: str) -> str:
        """The part of a growing text that `cut` will surely keep: what cannot be in a stop string any more."""
        text = self.cut(text.rstrip("\ufffd"))
        longest = max(map(len, self._texts)) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._texts):
                return text[:start]
        return text

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
    full = shards * max(1, 1 << (PREFILL_TOKENS // first[0]).bit_length() >> 1)
    following = itertools.islice(kinds, full - 1)
    alike = 1 + sum(1 for _ in itertools.takewhile(lambda kind: kind == first, following))
    size = min(alike, free, full)
    return size if size == full else min(size, shards)
