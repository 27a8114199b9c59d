"""How the model sees pictures: uint8 tiles for a tower that trains, cached features for one that does not.

Both are called as `views(key, rng)` and give (tiles or features, `image_index`) of one picture.
"""

import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image

from pangea_jax import anyres
from pangea_jax.data import image
from pangea_jax.data.store import RecordStore

# LLaVA-NeXT pads with CLIP's mean colour, `int(255 * mean)`.
PADDING_COLOUR = (122, 116, 104)


class Views:
    """Pictures as the model takes them: uint8 tiles, from a store and an any-resolution geometry.

    Args:
      pinpoints: canvases as (width, height), see `pangea_jax.anyres.layout`.
      background: shown through transparent parts; None drops the alpha channel, as the reference does.
    """

    field = "tiles"

    def __init__(
        self,
        store: RecordStore,
        pinpoints,
        tile_size: int,
        patches_per_side: int,
        background: tuple[int, int, int] | None = (255, 255, 255),
    ):
        self._store, self._pinpoints = store, tuple(map(tuple, pinpoints))
        self._tile_size, self._side, self._background = tile_size, patches_per_side, background
        self.patches = patches_per_side**2
        self.shape, self.dtype = (tile_size, tile_size, 3), np.uint8

    def __call__(self, key: str, rng: np.random.Generator | None, *, padded: bool = False):
        """(tiles [n, S, S, 3], image_index) of one picture; `rng` is for views that are random.

        Args:
          padded: one view, the picture padded to a square with `PADDING_COLOUR`, instead of tiles.

        Raises:
          ImageError: the picture is not there or cannot be decoded.
        """
        try:
            encoded = self._store.image(key)
        except KeyError:
            raise image.ImageError(key, "is not in the store", "picture is missing") from None
        picture = image.decode(encoded, name=key, background=self._background)
        index = self._layout(picture.size, padded).image_index
        if padded:
            return image.views(_squared(picture), (), self._tile_size), index
        return image.views(picture, self._pinpoints, self._tile_size), index

    def layout(self, key: str, *, padded: bool = False) -> tuple[int, Int[np.ndarray, " T"]]:
        """(number of tiles, image_index) of one picture, from the index alone."""
        if key not in self._sizes:
            raise image.ImageError(key, "is not in the store", "picture is missing")
        layout = self._layout(self._sizes[key], padded)
        return layout.num_tiles, layout.image_index

    def cost(self, size: anyres.Size, *, padded: bool = False) -> tuple[int, int]:
        """(tiles, tokens) of a picture of (width, height)."""
        layout = self._layout(size, padded)
        return layout.num_tiles, len(layout.image_index)

    def _layout(self, size, padded):
        pinpoints = () if padded else self._pinpoints
        return anyres.layout(size, pinpoints, self._tile_size, self._side)

    @functools.cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        table = self._store.image_index
        sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
        return dict(zip(table["key"].to_pylist(), sizes, strict=True))

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_sizes"}


def _squared(picture):
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), PADDING_COLOUR)
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


class CachedViews:
    """Pictures as features of a frozen tower, computed before training (`pangea_jax.sample.features`).

    One of the `features[key]` views [views, P, E] is drawn at random; view 0 is the picture as it is.
    """

    field = "features"

    def __init__(self, features: Mapping[str, Shaped[np.ndarray, "views P E"]]):
        self._features = features
        first = next(iter(features.values()))
        self.patches, self.shape, self.dtype = first.shape[1], first.shape[1:], first.dtype
        side = round(self.patches**0.5)
        self._image_index = anyres.layout((side, side), (), side, side).image_index

    def __call__(self, key: str, rng: np.random.Generator | None, *, padded: bool = False):
        """(features [1, P, E], image_index); padded or not is the tower's business."""
        views = self._features[key]
        view = 0 if rng is None else rng.integers(len(views))
        return views[view : view + 1], self._image_index

    def layout(self, key: str, *, padded: bool = False) -> tuple[int, Int[np.ndarray, " T"]]:
        """(number of tiles, image_index) of one picture."""
        return 1, self._image_index

    def cost(self, size: anyres.Size, *, padded: bool = False) -> tuple[int, int]:
        """(tiles, tokens) of a picture of any size."""
        return 1, len(self._image_index)
