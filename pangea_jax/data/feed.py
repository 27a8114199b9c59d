"""The end of the pipeline: batches with their bookkeeping, and where to go on after a restart."""

import asyncio
import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

_STATE_FORMAT = 2
# A budget says nothing about the first few records.
_BUDGET_FROM = 1_000
# Bad records that the log names, of each run and process.
_NAMED = 20


class RestartError(RuntimeError):
    """A saved position does not belong to this pipeline; says what differs and what can be done."""


class BadRecordsError(RuntimeError):
    """More bad records than `max_bad_fraction` allows; lists the reasons."""


@dataclasses.dataclass
class Notes:
    """What the host wants to know of a batch and the device does not.

    Attributes:
      languages, sources: examples by canonical code and by record source.
      language_tokens: their tokens, places of pictures included.
      tiles: tiles in use.
      cut: examples that were cut to fit a row.
      dropped: examples left out because they do not fit one.
      bad: (reason, message) of every record that could not be used.
    """

    languages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sources: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    language_tokens: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tiles: int = 0
    cut: int = 0
    dropped: int = 0
    bad: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, language: str, source: str, *, tokens: int, tiles: int, cut: bool) -> None:
        self.languages[language] += 1
        self.language_tokens[language] += tokens
        self.sources[source] += 1
        self.tiles += tiles
        self.cut += cut

    def add_missing(self, error: Exception | None, *, dropped: bool) -> None:
        if dropped:
            self.dropped += 1
        else:
            self.bad.append((_fault(error), str(error)))


def _fault(error: Exception) -> str:
    """A phrase that is the same for the same fault."""
    for name in ("fault", "reason"):
        if hasattr(error, name):
            return getattr(error, name)
    return type(error).__name__


class Counters:
    """Sums of `Notes` since the start of training, and since the last look; of this process's rows."""

    def __init__(self):
        self._total = self._zero()
        self._shown = self._zero()

    @staticmethod
    def _zero() -> dict[str, Any]:
        numbers = (
            "batches",
            "examples",
            "tokens",
            "slots",
            "tiles",
            "tile_slots",
            "cut",
            "dropped",
        )
        groups = ("languages", "language_tokens", "sources", "bad")
        return dict.fromkeys(numbers, 0) | {name: collections.Counter() for name in groups}

    def add(self, batch: Mapping[str, np.ndarray], notes: Notes) -> None:
        total, segments = self._total, batch["segment_ids"]
        tiles = batch["tiles" if "tiles" in batch else "features"]
        total["batches"] += 1
        total["examples"] += notes.languages.total()
        total["tokens"] += int(np.count_nonzero(segments))
        total["slots"] += segments.size
        total["tiles"] += notes.tiles
        total["tile_slots"] += tiles.shape[0] * tiles.shape[1]
        total["cut"] += notes.cut
        total["dropped"] += notes.dropped
        total["languages"].update(notes.languages)
        total["language_tokens"].update(notes.language_tokens)
        total["sources"].update(notes.sources)
        total["bad"].update(reason for reason, _ in notes.bad)

    def flush(self) -> dict[str, Any]:
        """What the batches since the last call held, for a log line.

        Returns:
          `padding` and `tile_fill` as shares of the slots; `examples_per_language`,
          `tokens_per_language`, `examples_per_source`, `bad_records` by reason, `cut`, `dropped`; and since the
          start of training `total_tokens` and `total_examples`.
        """
        total, shown = self._total, self._shown
        new = {name: total[name] - shown[name] for name in total}
        self._shown = _copies(total)
        return {
            "padding": 1 - new["tokens"] / max(new["slots"], 1),
            "tile_fill": new["tiles"] / max(new["tile_slots"], 1),
            "examples_per_language": dict(sorted(new["languages"].items())),
            "tokens_per_language": dict(sorted(new["language_tokens"].items())),
            "examples_per_source": dict(sorted(new["sources"].items())),
            "bad_records": dict(sorted(new["bad"].items())),
            "cut": new["cut"],
            "dropped": new["dropped"],
            "total_tokens": total["tokens"],
            "total_examples": total["examples"],
        }

    def check(self, max_bad_fraction: float) -> None:
        """Raises BadRecordsError once more than this fraction of the records was bad."""
        total = self._total
        bad = total["bad"].total()
        read = total["examples"] + bad
        if bad > max_bad_fraction * max(read, _BUDGET_FROM):
            table = "; ".join(f"{n} x {reason}" for reason, n in total["bad"].most_common())
            raise BadRecordsError(
                f"{bad} of {read} records are bad, more than pipeline.max_bad_fraction="
                f"{max_bad_fraction}: {table}"
            )

    def get_state(self) -> dict[str, Any]:
        """The sums, and as `shown` what the last look saw: the next one then tells of as many batches as
        it would have without a restart."""
        return _copies(self._total) | {"shown": _copies(self._shown)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._total = {name: _copy(state[name]) for name in self._zero()}
        self._shown = {name: _copy(state["shown"][name]) for name in self._zero()}

    @classmethod
    def of_all(cls, states: Sequence[Mapping[str, Any]]) -> "Counters":
        """The sums over the states of several processes."""
        counters = cls()
        for state in states:
            for sums, part in ((counters._total, state), (counters._shown, state["shown"])):
                for name in sums:
                    sums[name] = sums[name] + _copy(part[name])
        return counters


def _copies(counts):
    return {name: _copy(value) for name, value in counts.items()}


def _copy(value):
    return collections.Counter(value) if isinstance(value, Mapping) else value


class Feed(grain.IterDataset):
    """Batches of one process, from a stream of (batch, Notes).

    Args:
      open_stream: makes the stream from batch n on if `seekable`, else from example n on.
      num_batches: how many there are, None where only the end tells.
      dropped: examples that were left out before the first batch.
      identity: all that the order of the examples depends on. It is part of the state; a state of
        another identity is refused.
      seekable: whether batch n can be reached without those before it; else the stream's own state
        says where it is.
      max_bad_fraction: of the records read, see `Counters.check`.
    """

    def __init__(
        self,
        open_stream: Callable[[int], grain.IterDataset],
        *,
        num_batches: int | None,
        dropped: int,
        identity: Mapping[str, Any],
        seekable: bool,
        max_bad_fraction: float,
        approximate_restart: bool = False,
    ):
        super().__init__()
        self._open_stream = open_stream
        self.num_batches, self.dropped = num_batches, dropped
        self._identity = json.loads(json.dumps(identity))
        self._seekable, self._max_bad_fraction = seekable, max_bad_fraction
        self._approximate = approximate_restart

    def __iter__(self) -> "FeedIterator":
        return FeedIterator(self)

    def __str__(self) -> str:
        return f"Feed(num_batches={self.num_batches})"


class FeedIterator(grain.DatasetIterator):
    """Iterator of `Feed`: a batch a time, the counters beside it.

    Attributes:
      counters: of the batches handed out, and of those before a restart.
    """

    def __init__(self, feed: Feed):
        super().__init__()
        self._feed = feed
        self.counters = Counters()
        self._named = 0
        self._stream = None
        self._open(0)

    def _open(self, start: int) -> None:
        self._batches = start
        self._stream = iter(self._feed._open_stream(start))

    def __next__(self) -> dict[str, np.ndarray]:
        batch, notes = next(self._stream)
        self._batches += 1
        for _, message in notes.bad[: _NAMED - self._named]:
            self._named += 1
            logging.warning("skipped a bad record: %s", message)
        self.counters.add(batch, notes)
        self.counters.check(self._feed._max_bad_fraction)
        return batch

    def get_state(self) -> dict[str, Any]:
        stream = None if self._feed._seekable else self._stream.get_state()
        return {
            "format": _STATE_FORMAT,
            "identity": self._feed._identity,
            "batches": self._batches,
            "stream": stream,
            "counters": self.counters.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
          RestartError: it was taken from a pipeline with another order of examples.
        """
        if state.get("format") != _STATE_FORMAT:
            raise RestartError(
                f"the data state has format {state.get('format')!r}, this version reads {_STATE_FORMAT}"
            )
        feed = self._feed
        differing = [
            f"{name} was {state['identity'].get(name)!r} and is {feed._identity.get(name)!r}"
            for name in sorted(state["identity"].keys() | feed._identity.keys())
            if state["identity"].get(name) != feed._identity.get(name)
        ]
        if differing and not feed._approximate:
            raise RestartError(
                "the order of the examples is not the one that was saved: "
                + "; ".join(differing)
                + ". Restore that, or accept that some examples are repeated and others left out "
                "(--approximate_restart)"
            )
        self.close_stream()
        self.counters.set_state(state["counters"])
        if differing:
            logging.warning("approximate restart of the data: %s", "; ".join(differing))
        if feed._seekable:
            self._open(state["batches"])
        elif not differing:
            self._open(0)
            self._stream.set_state(state["stream"])
        else:
            # Another packing's identity does not say how many processes there were: as many as now.
            now = feed._identity["process_count"]
            was = state["identity"].get("process_count", now)
            self._open(state["counters"]["examples"] * was // now)
        self._batches = state["batches"]

    def close_stream(self) -> None:
        """Ends the worker processes, if there are any."""
        if self._stream is not None:
            self._stream.close()

    def close(self) -> None:
        self.close_stream()
        super().close()

    async def load(self, directory):
        """Orbax's protocol: sets the state that `save` wrote, by however many processes.

        Each process writes its state. With another number of processes than then, the first one's
        position is taken, and the first process goes on with the counts of all.
        """

        async def read():
            index, count = _process()
            mine = directory / f"process_{index}-of-{count}.json"
            paths = sorted(directory.glob("process_*-of-*.json"))
            if not paths:
                raise RestartError(f"{directory} holds no state of the data")
            if mine in paths:
                paths = [mine]
            states = [json.loads(await asyncio.to_thread(path.read_text)) for path in paths]
            self.set_state(states[0])
            if mine not in paths:
                counts = [state["counters"] for state in states]
                self.counters = Counters() if index else Counters.of_all(counts)

        return read()


def _process() -> tuple[int, int]:
    # Worker processes import this module and have no use for JAX.
    import jax

    return jax.process_index(), jax.process_count()
