"""A batch: rows of tokens and their pictures. It is the only input of the model."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Float32, Int32, UInt8

from pangea_jax.sharding import BATCH_SPEC, row_shards

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation as the model reads it, before it is put into a row.

    Attributes:
      tokens, image_index, tiles, features, targets, weights: see `Batch`, without the dimension B.
    """

    tokens: Int32[np.ndarray, " T"]
    image_index: Int32[np.ndarray, " T"]
    tiles: UInt8[np.ndarray, "N S S 3"] | None = None
    features: Float[np.ndarray, "N P E"] | None = None
    targets: Int32[np.ndarray, " T"] | None = None
    weights: Float32[np.ndarray, " T"] | None = None

    @property
    def pictures(self) -> np.ndarray:
        """The tiles or the features."""
        return self.tiles if self.features is None else self.features

    @property
    def size(self) -> tuple[int, int, int]:
        """(tokens, tiles, targets)."""
        targets = 0 if self.weights is None else int(np.count_nonzero(self.weights))
        return len(self.tokens), len(self.pictures), targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens. A row holds one or more conversations, one after the other, and then padding.

    Attributes:
      tokens: token ids.
      image_index: -1 for a word, else the index of the feature at this position among the features
        of the row, see `pangea_jax.anyres.layout`.
      positions: the position of each token in its conversation.
      segment_ids: the number of each token's conversation in its row, from 1; 0 for padding.
      tiles: the pictures of each row; None if `features` is given.
      features: output of a frozen tower that ran before; None if `tiles` is given.
      targets: the next token; None outside training.
      weights: 1 where the target is trained, else 0; None outside training.
    """

    tokens: Int32[Array, "B T"]
    image_index: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]
    segment_ids: Int32[Array, "B T"]
    tiles: UInt8[Array, "B N S S 3"] | None = None
    features: Float[Array, "B N P E"] | None = None
    targets: Int32[Array, "B T"] | None = None
    weights: Float32[Array, "B T"] | None = None

    @classmethod
    def fill(
        cls,
        rows: Sequence[Sequence[Example]],
        row_tokens: int,
        row_tiles: int,
        patches: int,
        template: Example | None = None,
    ) -> "Batch":
        """A batch of NumPy arrays: row r holds the examples `rows[r]`, one after the other.

        Args:
          row_tokens, row_tiles: capacity of a row (T and N).
          patches: patches per tile, to shift each `image_index` to the tiles of its example.
          template: an example that gives dtypes and shapes; required if all rows are empty.
        """
        template = template or next(example for row in rows for example in row)
        shape = (len(rows), row_tokens)
        trained = [name for name in ("targets", "weights") if getattr(template, name) is not None]
        field = "tiles" if template.features is None else "features"
        pictures = np.zeros(
            (len(rows), row_tiles, *template.pictures.shape[1:]), template.pictures.dtype
        )
        batch = cls(
            tokens=np.zeros(shape, np.int32),
            image_index=np.full(shape, -1, np.int32),
            positions=np.zeros(shape, np.int32),
            segment_ids=np.zeros(shape, np.int32),
            **{name: np.zeros(shape, getattr(template, name).dtype) for name in trained},
            **{field: pictures},
        )
        for r, examples in enumerate(rows):
            token = tile = 0
            for segment, example in enumerate(examples, 1):
                here = slice(token, token + len(example.tokens))
                for name in ("tokens", *trained):
                    getattr(batch, name)[r, here] = getattr(example, name)
                index = example.image_index
                shifted = np.where(index > 0, index + tile * patches, index) if tile else index
                batch.image_index[r, here] = shifted
                batch.positions[r, here] = np.arange(len(index), dtype=np.int32)
                batch.segment_ids[r, here] = segment
                pictures[r, tile : tile + len(example.pictures)] = example.pictures
                token, tile = here.stop, tile + len(example.pictures)
        return batch

    @property
    def pictures(self) -> Array:
        """The tiles or the features."""
        return self.tiles if self.features is None else self.features

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    def __getitem__(self, rows) -> "Batch":
        """Some rows, or one row without the dimension B."""
        return jax.tree.map(lambda x: x[rows], self)

    def place(self, mesh: Mesh) -> "Batch":
        """Puts this process's rows on its devices, as part of one global batch.

        Adds rows of padding until the devices share the rows evenly. They have no weight in the loss.
        """
        sharding = NamedSharding(mesh, BATCH_SPEC)
        missing = -len(self) % max(1, row_shards(mesh) // jax.process_count())

        def place(x):
            padded = np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
            return jax.make_array_from_process_local_data(sharding, padded)

        return jax.tree.map(place, self)

    def split(self, count: int, mesh: Mesh) -> "Batch":
        """Splits the rows into parts [count, B / count, ...]. No row moves to another device.

        Raises:
          ValueError: `count` does not divide the rows of a device.
        """
        rows, devices = len(self), row_shards(mesh)
        if rows % (devices * count):
            raise ValueError(
                f"{rows} rows on {devices} devices cannot be split into accumulation={count} parts; "
                "change config.accumulation or config.pipeline.rows"
            )
        sharding = NamedSharding(mesh, jax.sharding.PartitionSpec(None, *BATCH_SPEC))

        def split(x):
            # A device holds neighbouring rows; each part takes some rows of every device.
            x = x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x, sharding)

        return jax.tree.map(split, self)
