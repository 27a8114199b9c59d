"""From chosen rows to batches: read, shuffle, shard, render, pack or pad, batch. One direction, restartable."""

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from jaxtyping import Int, Shaped

from pangea_jax import anyres
from pangea_jax.data import chat, image
from pangea_jax.data.record import Conversation, RecordError
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import Tokenizer

PACKINGS = ("none", "balanced", "best_fit")
_TOKEN_FIELDS = ("tokens", "targets", "weights", "image_index")


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """The shape of a batch.

    Attributes:
      rows: rows of the global batch.
      row_tokens, row_tiles: capacity of a row (T and N).
      max_targets: most trained tokens in a row; bounds the work of the output head. None: row_tokens.
      packing: "none": a row holds one conversation. "balanced": a batch holds exactly `rows` *
        `examples_per_row` of them, spread evenly over its rows, so that steps and examples are in a
        fixed ratio. "best_fit": rows take as many as fit, for lengths that vary.
      examples_per_row: for "balanced".
      packing_bins: for "best_fit", rows packed at a time; more waste less and mix the order more.
      loss_mask, move_marker_first: see `pangea_jax.data.chat.render`.
      threads: reading threads a process.
    """

    rows: int
    row_tokens: int
    row_tiles: int
    max_targets: int | None = None
    packing: str = "none"
    examples_per_row: int = 1
    packing_bins: int = 64
    loss_mask: str = "answer"
    move_marker_first: bool = False
    threads: int = 2

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise ValueError(f"pipeline.packing {self.packing!r} is not one of {PACKINGS}")
        if self.examples_per_row != 1 and self.packing != "balanced":
            raise ValueError('pipeline.examples_per_row needs pipeline.packing="balanced"')

    @property
    def examples(self) -> int | None:
        """Conversations in a batch, where that is fixed."""
        return None if self.packing == "best_fit" else self.rows * self.examples_per_row


class RowSource(Sequence[Conversation]):
    """The conversations at some rows of a store's index; a Grain source."""

    def __init__(self, store: RecordStore, rows: Int[np.ndarray, "_"]):
        self._sources = {split: store.records(split) for split in store.splits}
        self._splits = np.asarray(store.index["split"].to_pylist())[rows]
        self._positions = np.asarray(store.index["position"])[rows]

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, i) -> Conversation:
        return self._sources[self._splits[i]][self._positions[i]]

    def __repr__(self) -> str:
        return f"RowSource(len={len(self)})"


class Views:
    """Pictures as the model takes them: uint8 tiles, from a store and an any-resolution geometry."""

    field = "tiles"

    def __init__(self, store: RecordStore, pinpoints, tile_size: int, patches_per_side: int):
        self._store, self._pinpoints = store, tuple(map(tuple, pinpoints))
        self._tile_size, self._side = tile_size, patches_per_side
        self.patches = patches_per_side**2
        self.shape, self.dtype = (tile_size, tile_size, 3), np.uint8

    def __call__(self, key: str, rng: np.random.Generator | None):
        """(tiles [n, S, S, 3], image_index) of one picture; `rng` is for views that are random."""
        picture = image.decode(self._store.image(key), name=key, background=(255, 255, 255))
        layout = anyres.layout(picture.size, self._pinpoints, self._tile_size, self._side)
        return image.views(picture, self._pinpoints, self._tile_size), layout.image_index


class CachedViews:
    """Pictures as features of a frozen tower, computed before training (`pangea_jax.train.features`).

    One of the `features[key]` views [views, P, E] is drawn at random; view 0 is the picture as it is.
    """

    field = "features"

    def __init__(self, features: Mapping[str, Shaped[np.ndarray, "views P E"]]):
        self._features = features
        first = next(iter(features.values()))
        self.patches, self.shape, self.dtype = first.shape[1], first.shape[1:], first.dtype
        side = round(self.patches**0.5)
        self._image_index = anyres.layout((side, side), (), side, side).image_index

    def __call__(self, key: str, rng: np.random.Generator | None):
        views = self._features[key]
        view = 0 if rng is None else rng.integers(len(views))
        return views[view : view + 1], self._image_index


def render_example(
    conversation: Conversation,
    rng: np.random.Generator | None,
    tokenizer: Tokenizer,
    views: Views | CachedViews,
    config: PipelineConfig,
) -> dict[str, np.ndarray]:
    """One conversation, unpadded: `tokens`, `targets` (the next token), `weights`, `image_index` [t],
    and `tiles` or `features` [n, ...].

    Raises:
      RecordError: it does not fit a row.
    """
    pictures = [views(key, rng) for key in conversation.images]
    rendered = chat.render(
        conversation.turns,
        tokenizer,
        [index for _, index in pictures],
        tiles_per_image=[len(tiles) for tiles, _ in pictures],
        patches=views.patches,
        loss_mask=config.loss_mask,
        move_marker_first=config.move_marker_first,
    )
    example = {
        "tokens": rendered.tokens,
        "targets": np.append(rendered.tokens[1:], np.int32(tokenizer.pad_id)),
        "weights": np.append(rendered.trained[1:], False).astype(np.float32),
        "image_index": rendered.image_index,
        views.field: np.concatenate(
            [tiles for tiles, _ in pictures] or [np.zeros((0, *views.shape), views.dtype)]
        ),
    }
    sizes = {
        "tokens": (len(rendered.tokens), config.row_tokens),
        "tiles": (len(example[views.field]), config.row_tiles),
        "targets": (int(example["weights"].sum()), config.max_targets or config.row_tokens),
    }
    for name, (size, limit) in sizes.items():
        if size > limit:
            detail = f"{size} {name}, a row holds {limit}"
            raise RecordError("does not fit a row", "conversations", detail, conversation.id)
    return example


def _pad(x: np.ndarray, size: int, value=0) -> np.ndarray:
    return np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=value)


def pad_row(
    example: dict[str, np.ndarray], row_tokens: int, row_tiles: int
) -> dict[str, np.ndarray]:
    """One conversation as a row of its own."""
    field = "tiles" if "tiles" in example else "features"
    length = len(example["tokens"])
    row = {name: _pad(example[name], row_tokens) for name in ("tokens", "targets", "weights")}
    row["image_index"] = _pad(example["image_index"], row_tokens, -1)
    row["positions"] = _pad(np.arange(length, dtype=np.int32), row_tokens)
    row["segment_ids"] = _pad(np.ones(length, np.int32), row_tokens)
    row[field] = _pad(example[field], row_tiles)
    return row


def pack_balanced(
    examples: Sequence[dict[str, np.ndarray]], rows: int, config: PipelineConfig
) -> dict[str, np.ndarray]:
    """All of `examples` in `rows` rows, each to the row with most room left, the longest first.

    Raises:
      ValueError: they do not fit.
    """
    field = "tiles" if "tiles" in examples[0] else "features"
    limits = np.array(
        [config.row_tokens, config.row_tiles, config.max_targets or config.row_tokens]
    )
    room = np.tile(limits, (rows, 1))
    bins: list[list[dict[str, np.ndarray]]] = [[] for _ in range(rows)]
    for example in sorted(examples, key=lambda e: -len(e["tokens"])):
        size = np.array(
            [len(example["tokens"]), len(example[field]), int(example["weights"].sum())]
        )
        fits = (room >= size).all(axis=1)
        if not fits.any():
            raise ValueError(
                f"{len(examples)} conversations do not fit {rows} rows of {limits.tolist()} (tokens, {field}, "
                "targets); raise pipeline.row_tokens, row_tiles or max_targets, or lower examples_per_row"
            )
        place = int(np.argmax(np.where(fits, room[:, 0], -1)))
        room[place] -= size
        bins[place].append(example)
    packed = [_concatenate(parts, field, config) for parts in bins]
    return {name: np.stack([row[name] for row in packed]) for name in packed[0]}


def _concatenate(parts, field, config):
    """One row in the form that Grain's packing has, so that both end in `finish_packed`."""
    joined = {
        name: np.concatenate([part[name] for part in parts]) for name in (*_TOKEN_FIELDS, field)
    }
    for name in ("tokens", field):
        lengths = [len(part[name]) for part in parts]
        joined[f"{name}_segment_ids"] = np.repeat(
            np.arange(1, len(parts) + 1, dtype=np.int32), lengths
        )
    joined["tokens_positions"] = np.concatenate(
        [np.arange(len(p["tokens"]), dtype=np.int32) for p in parts]
    )
    capacity = {field: config.row_tiles, f"{field}_segment_ids": config.row_tiles}
    return {
        name: _pad(value, capacity.get(name, config.row_tokens)) for name, value in joined.items()
    }


def finish_packed(packed: dict[str, np.ndarray], field: str, patches: int) -> dict[str, np.ndarray]:
    """A packed row in the batch's form: each segment's `image_index` moved to where its tiles lie."""
    segments, tile_segments = packed["tokens_segment_ids"], packed[f"{field}_segment_ids"]
    # Tiles of earlier segments come first; padding (0) behind all of them must not count.
    before = (tile_segments[..., None, :] < segments[..., :, None]) & (
        tile_segments[..., None, :] > 0
    )
    first_tile = before.sum(-1)
    index = packed["image_index"]
    index = np.where(index > 0, index + first_tile.astype(np.int32) * patches, index)
    return {
        "tokens": packed["tokens"],
        "targets": packed["targets"],
        "weights": packed["weights"],
        "image_index": np.where(segments > 0, index, -1),
        "positions": packed["tokens_positions"],
        "segment_ids": segments,
        field: packed[field],
    }


def train_dataset(
    source: Sequence[Conversation],
    tokenizer: Tokenizer,
    views: Views | CachedViews,
    config: PipelineConfig,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Batches of this process's rows, an epoch of `source` in shuffled order.

    The order depends on the seed, the process count and the config, on nothing else.
    """
    if config.rows % process_count:
        raise ValueError(
            f"pipeline.rows={config.rows} does not divide over {process_count} processes"
        )

    def render(conversation, rng):
        return render_example(conversation, rng, tokenizer, views, config)

    dataset = grain.MapDataset.source(source).seed(seed).shuffle()
    dataset = dataset[process_index::process_count].random_map(render)
    if config.packing == "none":
        dataset = dataset.map(lambda e: pad_row(e, config.row_tokens, config.row_tiles))
    rows = config.rows // process_count
    read = grain.ReadOptions(
        num_threads=config.threads, prefetch_buffer_size=4 * rows * config.examples_per_row
    )
    dataset = dataset.to_iter_dataset(read)
    if config.packing == "balanced":
        dataset = dataset.batch(rows * config.examples_per_row, drop_remainder=True, batch_fn=list)
        dataset = dataset.map(lambda examples: pack_balanced(examples, rows, config))
        return dataset.map(lambda batch: finish_packed(batch, views.field, views.patches))
    if config.packing == "best_fit":
        lengths = dict.fromkeys(_TOKEN_FIELDS, config.row_tokens) | {views.field: config.row_tiles}
        if config.max_targets is not None:
            # Grain bounds lengths: one element a target keeps a row within what the head computes.
            lengths["target_slots"] = config.max_targets
            dataset = dataset.map(
                lambda e: e | {"target_slots": np.zeros(int(e["weights"].sum()), np.int8)}
            )
        dataset = grain.experimental.BestFitPackIterDataset(
            dataset, length_struct=lengths, num_packing_bins=config.packing_bins, seed=seed
        )
        dataset = dataset.map(lambda row: finish_packed(row, views.field, views.patches))
    # A smaller last batch would have another shape: one more compilation for a fraction of a step.
    return dataset.batch(rows, drop_remainder=True)
