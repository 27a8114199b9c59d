"""Decodes images to RGB within limits, and cuts them into tiles for the vision tower."""

import io
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from pangea_jax.anyres import Size, best_resolution
from pangea_jax.work import untrusted

MAX_PIXELS = 89_478_485  # above it, Pillow warns of decompression bombs
MAX_BYTES = 512 << 20  # of a file; an uncompressed one of MAX_PIXELS has less
ORIENTATIONS = ("stored", "upright")
# Pillow also opens formats that run other programs, such as EPS with Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(ValueError):
    """An image that cannot be used; the message names the file or key, and the reason.

    Attributes:
      name: the file or store key, empty if unknown.
      reason: what is wrong with it.
      fault: a short fixed phrase for each kind of fault, so that faults can be counted.
    """

    def __init__(self, name: str, reason: str, fault: str = "picture is damaged"):
        self.name, self.reason, self.fault = name, reason, fault
        super().__init__(f"picture {name!r}: {reason}" if name else f"picture: {reason}")

    def __reduce__(self):
        return type(self), (self.name, self.reason, self.fault)


def decode(
    source: bytes | str | os.PathLike | Image.Image,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] | None = None,
    orientation: str = "stored",
) -> Image.Image:
    """Decodes an image to 8-bit RGB as the reference does, `Image.open(...).convert("RGB")`.

    Of an animation, it takes the first frame. It scales 16-bit grey, because `convert` would clip it
    to white.

    Args:
      source: encoded bytes, a path, or an opened image.
      name: the image's name in errors; the path by default.
      max_pixels: larger images are refused after reading the header, before decoding.
      background: the colour behind transparent parts. None drops the alpha channel, as the
        reference does, and so shows the colour of transparent pixels.
      orientation: "stored" keeps the pixels as they are in the file, as the reference does. "upright"
        rotates them as the EXIF tag says.

    Raises:
      ImageError: the image is unreadable, truncated, too large or of an unsupported kind.
    """
    image, _ = _load(source, name, max_pixels)
    return _to_rgb(_upright(image, name) if orientation == "upright" else image, background)


def check(
    source: bytes | str | os.PathLike,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    orientation: str = "stored",
) -> Size:
    """Checks that `decode` can decode an image, and returns its (width, height).

    It reads every byte, but decodes a JPEG at an eighth of its size. This is 2 to 4 times as fast.

    Args:
      orientation: see `decode`.

    Raises:
      ImageError: see `decode`.
    """
    return _turned(*_load(source, name, max_pixels, least=1), name, orientation)


def preview(
    source: bytes | str | os.PathLike, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, Size]:
    """A reduced image as RGB, and the (width, height) of the full image.

    It reads every byte. It decodes a JPEG at a half, a quarter or an eighth of its size, as long as
    both sides have at least 128 pixels.

    Raises:
      ImageError: see `decode`.
    """
    image, size = _load(source, name, max_pixels, least=128)
    return _to_rgb(image, None), size


def header_size(
    source: bytes | str | os.PathLike, *, name: str = "", orientation: str = "stored"
) -> Size:
    """The (width, height) in an image's header, without decoding.

    Args:
      orientation: see `decode`.

    Raises:
      ImageError: the header has no known format.
    """
    return _turned(*_load(source, name, math.inf, header=True), name, orientation)


def _turned(image: Image.Image, size: Size, name: str, orientation: str) -> Size:
    """The size that an image of `size` in the file has as it is seen."""
    # Pillow turns a TIFF by itself, and its size, too.
    if orientation != "upright" or image.format == "TIFF":
        return size
    try:
        return size[::-1] if image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE else size
    except Exception as error:  # as in `_upright`
        raise ImageError(name, f"its EXIF data cannot be read: {error}") from None


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises many types on broken data
        raise ImageError(name, f"its EXIF data cannot be read: {error}") from None


# The EXIF tag, and its values that exchange width and height.
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)


def _load(source, name, max_pixels, least=0, header=False) -> tuple[Image.Image, Size]:
    """The image with its pixels, and its size in the file."""
    if not name and isinstance(source, str | os.PathLike):
        name = os.fspath(source)
    try:
        image = source if isinstance(source, Image.Image) else _open(source)
        width, height = image.size
        if width * height > max_pixels:
            raise _too_large(name, f"{width} x {height} is over the limit of {max_pixels:,} pixels")
        if header:
            return image, (width, height)
        if least:
            image.draft(None, (least, least))
        image.load()
    except (ImageError, FileNotFoundError, PermissionError):
        raise
    except UnidentifiedImageError:
        reason = f"cannot be decoded: not a whole file of {', '.join(FORMATS)}"
        raise ImageError(name, reason, "picture of no known format") from None
    except Image.DecompressionBombError as error:
        raise _too_large(name, f"over the limit of Pillow: {error}") from None
    # Decoders raise many types on broken data: struct.error, IndexError, SyntaxError.
    except Exception as error:
        raise ImageError(name, f"cannot be decoded: {error}") from error
    if image.mode in ("I", "F"):
        reason = f"32-bit grey (mode {image.mode}); store it with 8 or 16 bits"
        raise ImageError(name, reason, "picture of 32-bit grey")
    return image, (width, height)


def _too_large(name: str, reason: str) -> ImageError:
    return ImageError(name, reason, "picture is too large")


def _open(source) -> Image.Image:
    if not isinstance(source, bytes | bytearray | memoryview):
        source = untrusted.read_regular(source, MAX_BYTES)
    stream = io.BytesIO(source)
    return Image.open(stream, formats=FORMATS)


def _to_rgb(image: Image.Image, background) -> Image.Image:
    if image.mode.startswith("I;16"):
        # In 16-bit grey, one grey level can be marked as transparent. The mark is dropped, because
        # without the low byte several levels become equal.
        high_bytes = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(high_bytes.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    if background is None:
        return rgba.convert("RGB")
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, rgba).convert("RGB")


def resize_and_pad(image: Image.Image, canvas: Size) -> Image.Image:
    """Fits the whole image into the middle of a black canvas, and keeps its aspect ratio."""
    (width, height), (canvas_width, canvas_height) = image.size, canvas
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        fitted = canvas_width, min(math.ceil(height * scale_width), canvas_height)
    else:
        fitted = min(math.ceil(width * scale_height), canvas_width), canvas_height
    padded = Image.new("RGB", canvas)
    corner = (canvas_width - fitted[0]) // 2, (canvas_height - fitted[1]) // 2
    padded.paste(image.resize(fitted, Image.Resampling.BICUBIC), corner)
    return padded


def views(
    image: Image.Image, pinpoints: Sequence[Size], tile_size: int
) -> UInt8[np.ndarray, "N {tile_size} {tile_size} 3"]:
    """The tiles of an image in the order of `pangea_jax.anyres.layout`.

    Tile 0, the base view, is the whole image stretched to a square (without its aspect ratio, as in
    the reference `process_anyres_image`). The other tiles are cut from the padded canvas, row by
    row.

    Args:
      image: RGB.
      pinpoints: canvases as (width, height); empty for the base view alone.
      tile_size: side of a tile in pixels.
    """
    if image.mode != "RGB":
        raise ValueError(f"views() takes RGB images, not mode {image.mode}; call decode() first")
    base = np.asarray(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))[None]
    if not pinpoints:
        return base
    canvas = np.asarray(resize_and_pad(image, best_resolution(image.size, pinpoints)))
    rows, columns = canvas.shape[0] // tile_size, canvas.shape[1] // tile_size
    tiles = canvas.reshape(rows, tile_size, columns, tile_size, 3).swapaxes(1, 2)
    return np.concatenate([base, tiles.reshape(-1, tile_size, tile_size, 3)])
