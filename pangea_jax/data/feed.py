"""The end of the pipeline: gives out batches, counts what is in them, and saves the position."""

import asyncio
import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import logging

from pangea_jax.batch import Batch
from pangea_jax.work.atomic import json_sum
from pangea_jax.work.untrusted import parse_json

_STATE_FORMAT = 3
# Format 2 had no checksum, and these fields.
_FORMAT_2 = {"format", "identity", "batches", "stream", "counters"}
# The limit is a share of at least this many records, so that one early bad record does not exceed it.
_BUDGET_FROM = 1_000
# Largest number of bad records that the log names, per run and process.
_NAMED = 20


class RestartError(RuntimeError):
    """A saved position does not belong to this pipeline; the message says what differs."""


class DamagedState(ValueError):
    """A saved position is not what was written."""


class BadRecordsError(RuntimeError):
    """More bad records than `max_bad_fraction` allows; the message lists the reasons."""


@dataclasses.dataclass
class Notes:
    """Statistics of a batch that only the host needs.

    Attributes:
      languages, sources: number of examples by canonical code, and by record source.
      language_tokens: number of tokens by canonical code, image tokens included.
      tiles: number of used tiles.
      cut: number of examples that were cut to fit a row.
      dropped: number of examples that fit no row and were left out.
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
    """A fixed phrase for each kind of fault."""
    for name in ("fault", "reason"):
        if hasattr(error, name):
            return getattr(error, name)
    return type(error).__name__


_NUMBERS = ("batches", "examples", "tokens", "slots", "tiles", "tile_slots", "cut", "dropped")
_GROUPS = ("languages", "language_tokens", "sources", "bad")


def _sums(state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A copy of the sums in a state; without a state, zeros."""
    if state is None:
        state = dict.fromkeys(_NUMBERS, 0) | {name: {} for name in _GROUPS}
    numbers = {name: state[name] for name in _NUMBERS}
    return numbers | {name: collections.Counter(state[name]) for name in _GROUPS}


class Counters:
    """Sums of this process's `Notes`, since the start of training and since the last `flush`."""

    def __init__(self):
        self._total, self._shown = _sums(), _sums()

    def add(self, batch: Batch, notes: Notes) -> None:
        total, segments = self._total, batch.segment_ids
        rows, tiles = batch.pictures.shape[:2]
        total["batches"] += 1
        total["examples"] += notes.languages.total()
        total["tokens"] += int(np.count_nonzero(segments))
        total["slots"] += segments.size
        total["tiles"] += notes.tiles
        total["tile_slots"] += rows * tiles
        total["cut"] += notes.cut
        total["dropped"] += notes.dropped
        total["languages"].update(notes.languages)
        total["language_tokens"].update(notes.language_tokens)
        total["sources"].update(notes.sources)
        total["bad"].update(reason for reason, _ in notes.bad)

    def flush(self) -> dict[str, Any]:
        """The totals of the batches since the last call, for a log line.

        Returns:
          `padding` and `tile_fill` as shares of the slots; `examples_per_language`,
          `tokens_per_language`, `examples_per_source`, `bad_records` by reason, `cut`, `dropped`;
          and, since the start of training, `total_tokens` and `total_examples`.
        """
        total, shown = self._total, self._shown
        new = {name: total[name] - shown[name] for name in total}
        self._shown = _sums(total)
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

    def seen(self) -> dict[str, int]:
        """Number of examples per language since the start of training."""
        return dict(sorted(self._total["languages"].items()))

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
        """The sums, and `shown`: the totals at the last log line.

        With `shown`, the first log line after a restart covers the same batches as without one.
        """
        return _sums(self._total) | {"shown": _sums(self._shown)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._total, self._shown = _sums(state), _sums(state["shown"])

    @classmethod
    def of_all(cls, states: Sequence[Mapping[str, Any]]) -> "Counters":
        """The sums over the states of several processes."""
        counters = cls()
        for state in states:
            for sums, part in ((counters._total, state), (counters._shown, state["shown"])):
                for name, value in _sums(part).items():
                    sums[name] += value
        return counters


class Feed(grain.IterDataset):
    """The batches of one process, from a stream of (batch, Notes).

    Args:
      open_stream: makes the stream that starts at batch n if `seekable`, else at example n.
      num_batches: number of batches, None if it is not known beforehand.
      dropped: number of examples that were left out before the first batch.
      identity: everything on which the order of the examples depends. It is part of the state; a
        state with another identity is refused.
      seekable: whether the stream can start at batch n directly. Otherwise the stream's own state
        holds the position.
      max_bad_fraction: allowed share of bad records, see `Counters.check`.
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
    """Iterator of `Feed`.

    Attributes:
      counters: totals of all batches so far, including those before a restart.
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
        try:
            batch, notes = next(self._stream)
        except StopIteration:
            planned = self._feed.num_batches
            if planned is not None and self._batches < planned:
                message = f"the data ended after {self._batches} of {planned} planned batches"
                raise RuntimeError(message) from None
            raise
        self._batches += 1
        for _, message in notes.bad[: _NAMED - self._named]:
            self._named += 1
            logging.warning("skipped a bad record: %s", message)
        self.counters.add(batch, notes)
        self.counters.check(self._feed._max_bad_fraction)
        return batch

    def get_state(self) -> dict[str, Any]:
        stream = None if self._feed._seekable else self._stream.get_state()
        state = {
            "format": _STATE_FORMAT,
            "identity": self._feed._identity,
            "batches": self._batches,
            "stream": stream,
            "counters": self.counters.get_state(),
        }
        return state | {"sha256": json_sum(state)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at the position of `state`.

        Raises:
          RestartError: `state` comes from a pipeline with another order of examples.
          DamagedState: see `check_state`.
        """
        check_state(state)
        feed = self._feed
        differing = [
            f"{name} was {state['identity'].get(name)!r} and is {feed._identity.get(name)!r}"
            for name in sorted(state["identity"].keys() | feed._identity.keys())
            if state["identity"].get(name) != feed._identity.get(name)
        ]
        if differing and not feed._approximate:
            raise RestartError(
                "the order of the examples is not the saved one: "
                + "; ".join(differing)
                + ". Set the old values again, or pass --approximate_restart, which repeats some "
                "examples and leaves others out"
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
            # Other packings do not store the number of processes; then assume the present one.
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
        """Part of Orbax's protocol: loads the state that any number of processes saved.

        Each process writes its own state. If the number of processes has changed, all take the
        position of the first one, and the first process continues with the summed counts of all.
        """

        async def read():
            index, count = _process()
            mine = directory / f"process_{index}-of-{count}.json"
            paths = sorted(directory.glob("process_*-of-*.json"))
            if not paths:
                raise RestartError(f"{directory} has no saved position of the data")
            if mine in paths:
                paths = [mine]
            states = [parse_json(await asyncio.to_thread(path.read_text)) for path in paths]
            self.set_state(states[0])
            if mine not in paths:
                counts = [state["counters"] for state in states]
                self.counters = Counters() if index else Counters.of_all(counts)

        return read()


def check_state(state: Any) -> None:
    """
    Raises:
      DamagedState: a saved position is not what was written.
      RestartError: another version wrote it.
    """
    if not isinstance(state, Mapping):
        raise DamagedState(f"the position of the data is a {type(state).__name__}")
    format = state.get("format")
    if format == 2 and state.keys() == _FORMAT_2:
        return  # it cannot be checked
    written = {name: value for name, value in state.items() if name != "sha256"}
    if "sha256" in state and state["sha256"] != json_sum(written):
        raise DamagedState("the position of the data does not have its checksum")
    if format != _STATE_FORMAT:
        raise RestartError(
            f"the data state has format {format!r}; this version reads {_STATE_FORMAT}"
        )
    if "sha256" not in state:
        raise DamagedState("the position of the data has no checksum")


def check_saved(directory: Path) -> None:
    """Checks the positions that all processes saved into a folder, without using them.

    Raises:
      DamagedState: one is missing, or not what was written.
      RestartError: another version wrote them.
      ValueError, OSError: one is not JSON, or cannot be read.
    """
    names = sorted(path.name for path in directory.glob("process_*-of-*.json"))
    wanted = sorted(f"process_{index}-of-{len(names)}.json" for index in range(len(names)))
    if not names or names != wanted:
        found = ", ".join(names) or "none"
        raise DamagedState(f"the positions of the data are not those of all processes: {found}")
    for name in names:
        check_state(parse_json((directory / name).read_text(encoding="utf-8")))


def _process() -> tuple[int, int]:
    # Worker processes import this module but do not need JAX.
    import jax

    return jax.process_index(), jax.process_count()


# These metrics are shares; the others are counts.
SHARES = ("data/padding", "data/tile_fill")


def metrics(counts: Mapping[str, Any]) -> dict[str, float]:
    """The result of `Counters.flush` as metrics, with one number per language and source."""
    found = {"examples": counts["total_examples"]}
    for name in ("padding", "tile_fill", "cut", "dropped"):
        found[f"data/{name}"] = counts[name]
    groups = ("examples_per_language", "tokens_per_language", "examples_per_source", "bad_records")
    for group in groups:
        found |= {f"data/{group}/{label}": n for label, n in counts[group].items()}
    return found
