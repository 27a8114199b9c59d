"""From chosen records to batches: read, shuffle, shard, render, pack or pad, batch. It can be restarted.

The order of the examples depends on the source, the seed, and the `PipelineConfig` without
`threads`, `workers` and `max_bad_fraction`. Only with packing "best_fit" it also depends on the
numbers of processes and workers. All of these are in the saved state, see `pangea_jax.data.feed`.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence

import grain
import numpy as np
import pyarrow.compute as pc
from absl import flags, logging
from jaxtyping import Int

from pangea_jax.batch import Batch, Example
from pangea_jax.data import chat, image
from pangea_jax.data.feed import Feed, Notes
from pangea_jax.data.mixture import column_codes
from pangea_jax.data.packing import plan_batches, plan_rows
from pangea_jax.data.reader import Reader
from pangea_jax.data.record import Conversation, RecordError
from pangea_jax.data.store import RecordStore, StoreError

PACKINGS = ("none", "balanced", "best_fit", "planned")
OVERLONG = ("error", "drop", "truncate")
# Fields that must be at least 1.
_POSITIVE = (
    "rows",
    "row_tokens",
    "max_targets",
    "examples_per_row",
    "packing_bins",
    "packing_window",
)
DOES_NOT_FIT = "does not fit a row"
# Moving the image marker of a message to its front adds at most this number of tokens.
_SLACK = 2
# Number of examples that are measured to check the sizes in the index.
_CHECKED = 64
_BAD_RECORD = (RecordError, image.ImageError, StoreError)


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The shape of a batch.

    Attributes:
      rows: rows of the global batch.
      row_tokens, row_tiles: capacity of a row (T and N).
      max_targets: largest number of trained tokens in a row, which limits the work of the output
        head. None: row_tokens.
      packing: how rows are filled.
        "none": one conversation per row.
        "balanced": exactly `rows` * `examples_per_row` conversations per batch, spread evenly over
        its rows. So the ratio of examples to steps is fixed.
        "planned": rows are filled as tightly as possible. For "balanced" and "planned" all lengths
        are measured first, see `measure`, and the number of steps is known.
        "best_fit": rows are filled while records are read, without measuring first. The number of
        steps is not known.
      examples_per_row: for "balanced".
      packing_bins: for "best_fit", number of rows that are open at the same time. More rows mean
        less padding, but move examples further from their place in the order.
      packing_window: for "planned", number of examples that are sorted by length together.
      loss_mask: see `pangea_jax.data.chat.render`.
      overlong: what happens to a conversation larger than a row. "error": it is a bad record.
        "drop": it is left out. "truncate": it is cut, but never within a picture.
      max_bad_fraction: bad records are skipped and counted, up to this fraction. With 0, the first
        bad record is an error.
      threads: reading threads per process or worker. More than one helps only with pictures.
      workers: number of extra reading processes; 0: this process reads.
    """

    rows: int
    row_tokens: int
    row_tiles: int
    max_targets: int | None = None
    packing: str = "none"
    examples_per_row: int = 1
    packing_bins: int = 64
    packing_window: int = 4096
    loss_mask: str = "answer"
    overlong: str = "error"
    max_bad_fraction: float = 0.0
    threads: int = 2
    workers: int = 0

    def __post_init__(self):
        choices = {"packing": PACKINGS, "overlong": OVERLONG, "loss_mask": chat.LOSS_MASKS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"pipeline.{name} {getattr(self, name)!r} is not one of {known}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"pipeline.{name} must be positive, not {value}")
        if self.examples_per_row != 1 and self.packing != "balanced":
            raise ValueError('pipeline.examples_per_row needs pipeline.packing="balanced"')
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"pipeline.max_bad_fraction must be in [0, 1], not {self.max_bad_fraction}"
            )

    @property
    def examples(self) -> int | None:
        """Number of conversations in a batch, None if it varies."""
        fixed = self.packing in ("none", "balanced")
        return self.rows * self.examples_per_row if fixed else None

    @property
    def capacity(self) -> tuple[int, int, int]:
        """The largest (tokens, tiles, targets) of a row."""
        return self.row_tokens, self.row_tiles, self.max_targets or self.row_tokens


class RowSource(Sequence[Conversation]):
    """The conversations at some rows of a store's index; a source for Grain."""

    def __init__(self, store: RecordStore, rows: Int[np.ndarray, " n"]):
        self._sources = {split: store.records(split) for split in store.splits}
        codes, self._splits = column_codes(store.index, "split")
        self._codes = codes[rows].astype(np.int8)
        self._positions = np.asarray(store.index["position"])[rows]
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, i) -> Conversation:
        return self._sources[self._splits[self._codes[i]]][self._positions[i]]

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the rows and their order."""
        digest = hashlib.sha256(self._positions.tobytes())
        digest.update(self._codes.tobytes())
        return digest.hexdigest()[:16]

    def indexed_sizes(
        self, reader: Reader, config: PipelineConfig
    ) -> Int[np.ndarray, "n 3"] | None:
        """(tokens, tiles, 0) of every example from the index alone; None if the index lacks them.

        The index counts tokens before image markers are moved. The move may add tokens, so examples
        with pictures count as `_SLACK` tokens longer.
        """
        index = self._store.index
        known = {"num_tokens", "image_sizes"} <= set(index.column_names)
        # The index has the sizes of pictures as the store means them to be seen.
        if not known or not reader.pictures.sizes_are_indexed:
            return None
        chosen = index.select(["num_tokens", "image_sizes"]).take(self._rows)
        if chosen["num_tokens"].null_count or config.max_targets is not None:
            return None
        tokens = chosen["num_tokens"].to_numpy().astype(np.int64)
        pictures = chosen["image_sizes"].combine_chunks()
        counts = pc.list_value_length(pictures).fill_null(0).to_numpy()
        owner = np.repeat(np.arange(len(counts)), counts)
        flat = pictures.flatten().flatten().to_numpy().reshape(-1, 2)
        kinds, kind = np.unique(np.c_[flat, (counts > 1)[owner]], axis=0, return_inverse=True)
        places = [reader.pictures.place((int(w), int(h)), bool(many)) for w, h, many in kinds]
        cost = [(tiles, len(image_index)) for tiles, image_index in places]
        cost = np.array(cost, np.int64).reshape(-1, 2)[kind.ravel()]
        tiles = np.bincount(owner, cost[:, 0], len(counts)).astype(np.int64)
        tokens += np.bincount(owner, cost[:, 1], len(counts)).astype(np.int64)
        tokens += _SLACK * (counts > 0) * reader.policy.marker_first
        return np.stack([tokens, tiles, np.zeros_like(tokens)], axis=1)

    def __getstate__(self):
        # Workers only read records. They do not need the index, which may have millions of rows.
        return self.__dict__ | {"_store": None, "_rows": None}

    def __repr__(self) -> str:
        return f"RowSource(len={len(self)})"


def render_example(
    conversation: Conversation,
    rng: np.random.Generator | None,
    reader: Reader,
    config: PipelineConfig,
) -> Example:
    """One conversation as an example to train on.

    Raises:
      RecordError: it does not fit a row and `config.overlong` is not "truncate", or no trained
        token is left after the cut.
    """
    return _render(conversation, rng, reader, config)[0]


def _render(conversation, rng, reader, config):
    """`render_example`, and whether the example was cut."""
    looks = reader.look(conversation, rng)
    words, num_tiles, cut = _words(conversation, [look.place for look in looks], reader, config)
    pictures = {reader.pictures.field: reader.cut(looks)[:num_tiles]}
    return Example(**words, **pictures), cut


def measure(
    conversations: Iterable[Conversation],
    reader: Reader,
    config: PipelineConfig,
) -> Int[np.ndarray, "n 3"]:
    """(tokens, tiles, targets) of every example, for planning rows. Decodes no picture.

    A dropped example has 0 tokens. A bad record that may be skipped has 1 token, so that the
    pipeline reads and counts it later. It takes 20 us for a short conversation and half a
    millisecond for one of PangeaIns.

    Raises:
      RecordError, ImageError, StoreError: at the first record that may not be skipped.
    """
    sizes = []
    for conversation in conversations:
        try:
            places = reader.places(conversation)
            words, tiles, _ = _words(conversation, places, reader, config)
            sizes.append((len(words["tokens"]), tiles, np.count_nonzero(words["weights"])))
        except _BAD_RECORD as error:
            if not (_is_dropped(error, config) or config.max_bad_fraction):
                raise
            sizes.append((0 if _is_dropped(error, config) else 1, 0, 0))
    return np.array(sizes, np.int64).reshape(-1, 3)


def _words(conversation, places, reader, config):
    """An example without pictures, the number of tiles that it keeps, and whether it was cut."""
    system = conversation.system or chat.SYSTEM_PROMPT
    try:
        rendered = reader.words(
            conversation.turns, places, loss_mask=config.loss_mask, system=system
        )
    except ValueError as error:
        id = conversation.id
        raise RecordError("cannot be rendered", "conversations", str(error), id) from None
    length = len(rendered.tokens)
    targets = np.empty_like(rendered.tokens)
    targets[:-1], targets[-1] = rendered.tokens[1:], reader.tokenizer.pad_id
    weights = np.zeros(length, np.float32)
    weights[:-1] = rendered.trained[1:]
    num_tiles = sum(count for count, _ in places)
    needed = length, num_tiles, int(np.count_nonzero(weights))
    cut = any(n > limit for n, limit in zip(needed, config.capacity, strict=True))
    if cut:
        if config.overlong != "truncate":
            raise _does_not_fit(conversation, needed, config)
        length, num_tiles = _cut(rendered, weights, places, config.capacity)
        # The token after the cut is gone, so nothing predicts it.
        weights[length - 1 : length] = 0
        if not weights[:length].any():
            raise _does_not_fit(conversation, needed, config)
    words = {
        "tokens": rendered.tokens,
        "targets": targets,
        "weights": weights,
        "image_index": rendered.image_index,
    }
    return {name: values[:length] for name, values in words.items()}, num_tiles, cut


def _cut(rendered, weights, places, capacity):
    """The (tokens, tiles) that fit `capacity`, without cutting a picture."""
    max_tokens, max_tiles, max_targets = capacity
    # The last token of a cut example has no target, so it may come after the last target.
    over = np.flatnonzero(np.cumsum(weights) > max_targets)
    end = min(len(weights), max_tokens, over[0] + 1 if len(over) else len(weights))
    pictured = np.flatnonzero(rendered.image_index >= 0)
    first = tiles = 0
    for count, index in places:
        start, stop = pictured[first], pictured[first + len(index) - 1] + 1
        if start < end and (stop > end or tiles + count > max_tiles):
            end = start
        if start >= end:
            break
        first, tiles = first + len(index), tiles + count
    return int(end), tiles


def _does_not_fit(conversation, needed, config) -> RecordError:
    names = ("tokens", "tiles", "targets")
    name, n, limit = next(
        one for one in zip(names, needed, config.capacity, strict=True) if one[1] > one[2]
    )
    detail = f"{n} {name}, a row holds {limit}"
    return RecordError(DOES_NOT_FIT, "conversations", detail, conversation.id)


def _is_dropped(error, config) -> bool:
    """Whether the example is left out for its length, which does not make it a bad record."""
    too_long = isinstance(error, RecordError) and error.reason == DOES_NOT_FIT
    return too_long and config.overlong != "error"


@dataclasses.dataclass(frozen=True)
class _Read:
    """An example, or the reason why there is none. Not a pytree, so that Grain does not take it apart."""

    example: Example | None
    language: str = ""
    source: str = ""
    cut: bool = False
    error: Exception | None = None
    dropped: bool = False


def _never_ends(method: Callable) -> Callable:
    """Turns StopIteration into an error. Grain would take it for the end of the data, and training would end early."""

    @functools.wraps(method)
    def guarded(self, *args):
        try:
            return method(self, *args)
        except StopIteration as error:
            # A fault of ours: an iterator that ended too early.
            raise RuntimeError(f"{method.__name__}{args!r:.200} ended an iterator") from error

    return guarded


class _Batcher:
    """Reads, renders and batches. Every worker process has a copy."""

    def __init__(self, source, reader, config):
        self.source, self.reader, self.config = source, reader, config

    @_never_ends
    def read(self, position: int, rng: np.random.Generator) -> _Read:
        try:
            conversation = self.source[position]
            example, cut = _render(conversation, rng, self.reader, self.config)
        except _BAD_RECORD as error:
            dropped = _is_dropped(error, self.config)
            if not (dropped or self.config.max_bad_fraction):
                raise
            return _Read(None, error=error, dropped=dropped)
        return _Read(example, conversation.language, conversation.source, cut)

    @_never_ends
    def planned_row(self, positions: Sequence[int], seed: int) -> list[_Read]:
        """Reads the examples of a row. If the planned sizes were wrong, drops those that do not fit."""
        row, room = [], np.asarray(self.config.capacity)
        for position in positions:
            read = self.read(position, np.random.default_rng((seed, position)))
            needed = 0 if read.example is None else read.example.size
            if np.all(room >= needed):
                room = room - needed
            else:
                read = _Read(None, dropped=True)
            row.append(read)
        return row

    @_never_ends
    def batch(self, rows: Sequence[Sequence[_Read]]) -> tuple[Batch, Notes]:
        config, notes = self.config, Notes()
        for read in (read for row in rows for read in row):
            if read.example is None:
                notes.add_missing(read.error, dropped=read.dropped)
            else:
                tokens, tiles, _ = read.example.size
                notes.add(read.language, read.source, tokens=tokens, tiles=tiles, cut=read.cut)
        examples = [[read.example for read in row if read.example is not None] for row in rows]
        batch = Batch.fill(
            examples, config.row_tokens, config.row_tiles, self.reader.pictures.patches, self._empty
        )
        return batch, notes

    @functools.cached_property
    def _empty(self) -> Example:
        none = np.zeros(0, np.int32)
        pictures = {self.reader.pictures.field: self.reader.no_tiles}
        return Example(none, none, targets=none, weights=none.astype(np.float32), **pictures)


def train_dataset(
    source: Sequence[Conversation],
    reader: Reader,
    config: PipelineConfig,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    sizes: Int[np.ndarray, "n 3"] | None = None,
    approximate_restart: bool = False,
) -> Feed:
    """One epoch of `source` in batches; each process gets its own rows. The seed decides the order.

    Except with "best_fit", batch n has the same examples for every number of processes and workers.
    So a run can continue with other numbers. The process is a parameter, not read from JAX, so that
    one machine can test several processes.

    Args:
      sizes: the result of `measure` on `source`, for packing "planned" and "balanced". None: from the
        store's index if it has them, else measured here.
      approximate_restart: accept a saved position in another order, see `Feed`.

    Returns:
      A Grain dataset. `num_batches` is the number of steps in the epoch (None for "best_fit");
      `dropped` is the number of examples that a plan leaves out because they do not fit a row.
    """
    if config.rows % process_count:
        raise ValueError(
            f"pipeline.rows={config.rows} does not divide over {process_count} processes"
        )
    batcher = _Batcher(source, reader, config)
    part = _Part(process_index, process_count, config.rows // process_count)
    planned = config.packing in ("planned", "balanced")
    if planned and sizes is None:
        sizes = _sizes(source, reader, config)
    dropped = 0 if sizes is None else int(np.count_nonzero(sizes[:, 0] == 0))
    if dropped:
        logging.warning("%d of %d examples do not fit a row and are left out", dropped, len(sizes))
    identity = _identity(source, reader, sizes, config, seed, process_count)
    if config.packing == "best_fit":
        num_batches, open_stream = None, _streamed(batcher, part, seed)
    else:
        batches = (
            _planned(batcher, part, seed, sizes) if planned else _one_per_row(batcher, part, seed)
        )
        num_batches = len(batches)

        def open_stream(start: int) -> grain.IterDataset:
            return _in_workers(batches[start:], config, buffer=max(1, config.threads))

    return Feed(
        open_stream,
        num_batches=num_batches,
        dropped=dropped,
        identity=identity,
        seekable=config.packing != "best_fit",
        max_bad_fraction=config.max_bad_fraction,
        approximate_restart=approximate_restart,
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """This process's share of a batch."""

    index: int
    count: int
    rows: int


def _sizes(source, reader, config) -> Int[np.ndarray, "n 3"]:
    sizes = source.indexed_sizes(reader, config) if isinstance(source, RowSource) else None
    if sizes is None:
        logging.info("measuring %d examples", len(source))
        return measure(source, reader, config)
    _check_index(source, sizes, reader, config)
    return _within_capacity(sizes, config)


def _check_index(source, sizes, reader, config) -> None:
    """Raises ValueError if examples are longer than the index says."""
    few = np.unique(np.linspace(0, len(source) - 1, _CHECKED).astype(int)).tolist()
    anything = dataclasses.replace(
        config, row_tokens=1 << 30, row_tiles=1 << 30, max_bad_fraction=1.0
    )
    measured = measure((source[i] for i in few), reader, anything)
    worst = int((measured[:, 0] - sizes[few, 0]).max(initial=0))
    if worst > 0:
        raise ValueError(
            f"examples have up to {worst} tokens more than num_tokens in the store's index: the store was "
            "built with another tokenizer. Build it with this one, or pass sizes=measure(...)"
        )


def _within_capacity(sizes, config):
    """The sizes after `config.overlong`: as `measure` gives them."""
    capacity = np.asarray(config.capacity)
    if config.overlong == "truncate":
        return np.minimum(sizes, capacity)
    too_large = (sizes > capacity).any(axis=1)
    if config.overlong == "drop":
        return np.where(too_large[:, None], 0, sizes)
    return np.where(too_large[:, None] & (config.max_bad_fraction > 0), [1, 0, 0], sizes)


def _identity(source, reader, sizes, config, seed, process_count):
    """Everything on which the order of the examples depends."""
    free = ("threads", "workers", "max_bad_fraction")
    identity = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    identity |= {"reading": dataclasses.asdict(reader.policy)}
    identity |= {"seed": seed, "source": getattr(source, "digest", len(source))}
    if sizes is not None:
        identity["sizes"] = hashlib.sha256(np.ascontiguousarray(sizes)).hexdigest()[:16]
    if config.packing == "best_fit":
        identity |= {"process_count": process_count, "workers": config.workers}
    return identity


def _one_per_row(batcher, part, seed) -> grain.MapDataset:
    """Batches of rows with one example each."""
    batches = _shuffled(batcher, part, seed).batch(part.rows, drop_remainder=True, batch_fn=list)
    # The first processes may have one batch more than the last; a step needs all of them.
    batches = batches.map(lambda reads: batcher.batch([[read] for read in reads]))
    return batches[: len(batcher.source) // batcher.config.rows]


def _planned(batcher, part, seed, sizes) -> grain.MapDataset:
    """Batches of planned rows. Process p of P gets the p-th of P equal parts of every batch."""
    config = batcher.config
    if config.packing == "balanced":
        plan = plan_batches(
            sizes, config.capacity, rows=config.rows, examples=config.examples, seed=seed
        )
    else:
        plan = plan_rows(sizes, config.capacity, seed=seed, window=config.packing_window)

    def batch(number):
        first = number * config.rows + part.index * part.rows
        rows = range(first, first + part.rows)
        return batcher.batch([batcher.planned_row(plan[row].tolist(), seed) for row in rows])

    return grain.MapDataset.source(range(len(plan) // config.rows)).map(batch)


def _streamed(batcher, part, seed):
    """Rows that Grain packs while examples are read."""
    config = batcher.config
    examples = _shuffled(batcher, part, seed)
    capacity = dict(zip(("tokens", "tiles", "targets"), config.capacity, strict=True))

    def measured(read):
        # Grain packs arrays: these have the right lengths, and the example is attached to them.
        lengths = (0, 0, 0) if read.example is None else read.example.size
        lengths = zip(capacity, lengths, strict=True)
        return {name: np.zeros(n, np.int8) for name, n in lengths} | {"read": read}

    def open_stream(start: int) -> grain.IterDataset:
        stream = _in_workers(examples[start:], config, buffer=4 * part.rows).map(measured)
        rows = grain.experimental.BestFitPackIterDataset(
            stream,
            length_struct=capacity,
            num_packing_bins=config.packing_bins,
            seed=seed,
            meta_features=["read"],
        )
        # A smaller last batch would have another shape, and need another compilation.
        batches = rows.batch(part.rows, drop_remainder=True, batch_fn=list)
        return batches.map(lambda rows: batcher.batch([row["read"] for row in rows]))

    return open_stream


def _shuffled(batcher, part, seed) -> grain.MapDataset:
    positions = grain.MapDataset.source(range(len(batcher.source))).seed(seed).shuffle()
    return positions[part.index :: part.count].random_map(batcher.read)


def _in_workers(dataset: grain.MapDataset, config, buffer: int) -> grain.IterDataset:
    """Reads ahead in threads, and in other processes if `config.workers` says so. Keeps the order."""
    _import_parser()
    threads = grain.ReadOptions(config.threads, buffer if config.threads else 0)
    stream = dataset.to_iter_dataset(threads)
    if not config.workers:
        return stream
    if not flags.FLAGS.is_parsed():
        # Grain reads absl's flags when it starts workers, even if the program does not use absl.
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=1)
    return stream.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(index: int, count: int) -> None:
    # If a worker imports JAX, it must not take the accelerator from the trainer.
    os.environ["JAX_PLATFORMS"] = "cpu"
    _import_parser()


def _import_parser() -> None:
    # If two reading threads import TFDS first, they can wait for each other without end.
    from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401
