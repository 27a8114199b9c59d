"""Any-resolution geometry of LLaVA-NeXT: the canvas, the tiles, and the place of each feature.

All of this depends only on the size of the image. So the host computes it in NumPy, and the device
gets one int32 index per token. Reference: `llava/mm_utils.py` and `llava/model/llava_arch.py` of
LLaVA-NeXT.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

Size = tuple[int, int]

ROUNDINGS = {
    "llava": int,
    # transformers rounds first: 27.999999999999996 is 28 rows there and 27 in LLaVA. About 3 sizes
    # in 100,000 differ.
    "transformers": lambda x: int(round(x, 7)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The places of the features of one image.

    Attributes:
      canvas: (width, height) in pixels into which the image is fitted; None for a single view.
      grid: (columns, rows) of tiles on the canvas; (0, 0) for a single view.
      features: (columns, rows) of patch features that remain after the padding is cut off.
      image_index: for each image token, 0 means the newline vector and 1 + n * P + p means patch p
        (row-major within its tile) of tile n. Tile 0 is the base view; the others follow row by
        row.
    """

    canvas: Size | None
    grid: Size
    features: Size
    image_index: Int[np.ndarray, " T"]

    @property
    def num_tiles(self) -> int:
        """Number of tiles, including the base view."""
        return 1 + self.grid[0] * self.grid[1]


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The canvas that keeps most of the image's pixels; among equals, the one that wastes least.

    Args:
      size: (width, height) of the image.
      pinpoints: canvases as (width, height). If several are equally good, the first is taken.
    """
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(pinpoints, key=merit)


def layout(
    size: Size,
    pinpoints: Sequence[Size],
    tile_size: int,
    patches_per_side: int,
    rounding: str = "llava",
    *,
    newline: bool = True,
) -> Layout:
    """Tiles and token order of an image: the base view, then the canvas without its padding.

    The canvas follows row by row, and each row ends with the newline vector; the base view has
    none. Without pinpoints, an image is the base view and one newline.

    Args:
      size: (width, height) of the image in pixels.
      pinpoints: canvases as (width, height), multiples of `tile_size`; empty for a single view.
      tile_size: side of the vision tower's input in pixels.
      patches_per_side: a tile has P = patches_per_side ** 2 features.
      rounding: how a fitted side is rounded, one of `ROUNDINGS`.
      newline: False for models without the newline vector (LLaVA-1.5); needs empty `pinpoints`.

    Raises:
      ValueError: an argument is not allowed.
    """
    pinpoints = tuple((int(width), int(height)) for width, height in pinpoints)
    return _layout(tuple(map(int, size)), pinpoints, tile_size, patches_per_side, rounding, newline)


@functools.lru_cache(maxsize=4096)
def _layout(size, pinpoints, tile_size, side, rounding, newline):
    if min(size) < 1:
        raise ValueError(f"image size {size} must be at least 1 x 1")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding {rounding!r} is not one of {tuple(ROUNDINGS)}")
    for canvas in pinpoints:
        if min(canvas) < 1 or canvas[0] % tile_size or canvas[1] % tile_size:
            raise ValueError(
                f"pinpoint {canvas}: each side must be a multiple of tile_size={tile_size}"
            )
    P = side * side
    base = np.arange(1, P + 1)
    if not pinpoints:
        image_index = np.append(base, 0) if newline else base
        return Layout(None, (0, 0), (0, 0), _frozen(image_index))
    if not newline:
        raise ValueError("newline=False works only without tiles; pass pinpoints=()")
    canvas = best_resolution(size, pinpoints)
    columns, rows = canvas[0] // tile_size, canvas[1] // tile_size
    places = np.arange(1 + P, 1 + P + rows * columns * P).reshape(rows, columns, side, side)
    places = places.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    places = _without_padding(places, size, ROUNDINGS[rounding])
    newlines = np.zeros((places.shape[0], 1), places.dtype)
    lines = np.concatenate([places, newlines], axis=1).ravel()
    image_index = np.concatenate([base, lines])
    return Layout(canvas, (columns, rows), places.shape[::-1], _frozen(image_index))


def _without_padding(places, size, rounded):
    """Cuts off the same number of padding rows (or columns) on both sides, as the reference.

    If the number of padding rows is odd, one of them stays.
    """
    width, height = size
    rows, columns = places.shape
    if width / height > columns / rows:
        pad = (rows - rounded(height * (columns / width))) // 2
        return places[pad : rows - pad]
    pad = (columns - rounded(width * (rows / height))) // 2
    return places[:, pad : columns - pad]


def _frozen(image_index):
    """int32 and read-only, because the cache gives the same array to every caller."""
    image_index = image_index.astype(np.int32)
    image_index.setflags(write=False)
    return image_index
