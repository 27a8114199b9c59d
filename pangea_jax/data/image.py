"""Pictures: bytes to RGB within limits, and RGB to the tiles that the tower sees."""

import io
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from pangea_jax.anyres import Size, best_resolution

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
# Formats of pictures only: Pillow also opens containers that run other programs (EPS, Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(ValueError):
    """A picture that cannot be used; names the file or key and the reason.

    Attributes:
      name: the file or store key, empty if unknown.
      reason: what is wrong with it.
      fault: a short fixed phrase, the same for the same fault, so that faults can be counted.
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
) -> Image.Image:
    """Decodes a picture to 8-bit RGB as the reference does, `Image.open(...).convert("RGB")`.

    EXIF orientation is not applied. Of an animation the first frame is taken. 16-bit grey, which
    `convert` would clip to white, is scaled.

    Args:
      source: encoded bytes, a path, or a picture already opened.
      name: what errors call the picture; a path by default.
      max_pixels: larger pictures are refused from their header, before anything is decoded.
      background: colour shown through transparent parts. None, as in the reference, drops the alpha
        channel and so shows whatever colour lies beneath it.

    Raises:
      ImageError: unreadable, truncated, too large or of an unsupported kind.
    """
    image, _ = _load(source, name, max_pixels)
    return _to_rgb(image, background)


def check(
    source: bytes | str | os.PathLike, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> Size:
    """The (width, height) of a picture that `decode` can decode.

    Every byte is read, but a JPEG is decoded at an eighth of its size: 2 to 4 times as fast.

    Raises:
      ImageError: what `decode` raises.
    """
    return _load(source, name, max_pixels, least=1)[1]


def preview(
    source: bytes | str | os.PathLike,
    *,
    least: int = 128,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, Size]:
    """A picture as RGB, and its (width, height) in the file.

    Every byte is read, but a JPEG is decoded at a half, a quarter or an eighth of its size where both
    sides then still have `least` pixels.

    Raises:
      ImageError: what `decode` raises.
    """
    image, size = _load(source, name, max_pixels, least=least)
    return _to_rgb(image, None), size


def header_size(source: bytes | str | os.PathLike, *, name: str = "") -> Size:
    """The (width, height) that a picture's header states; nothing is decoded.

    Raises:
      ImageError: the header is not one of a known format.
    """
    return _load(source, name, math.inf, header=True)[1]


def _load(source, name, max_pixels, least=0, header=False) -> tuple[Image.Image, Size]:
    """The picture with its pixels, and its size in the file."""
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
        raise _too_large(name, f"over the limit of pixels: {error}") from None
    # Decoders of broken data raise whatever they trip over: struct.error, IndexError, SyntaxError.
    except Exception as error:
        raise ImageError(name, f"cannot be decoded: {error}") from error
    if image.mode in ("I", "F"):
        reason = f"32-bit grey (mode {image.mode}); store it with 8 or 16 bits"
        raise ImageError(name, reason, "picture of 32-bit grey")
    return image, (width, height)


def _too_large(name: str, reason: str) -> ImageError:
    return ImageError(name, reason, "picture is too large")


def _open(source) -> Image.Image:
    stream = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
    return Image.open(stream, formats=FORMATS)


def _to_rgb(image: Image.Image, background) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Transparency of 16-bit grey is one grey level, which the loss of the low byte blurs.
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
    """The whole picture, aspect ratio kept, in the middle of a black canvas of (width, height)."""
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
    """The tiles of a picture in the order of `pangea_jax.anyres.layout`.

    Tile 0, the base view, is the whole picture stretched to a square (aspect ratio not kept, as in
    the reference `process_anyres_image`); the others cut the padded canvas row by row.

    Args:
      image: RGB.
      pinpoints: canvases as (width, height); none for the base view alone.
      tile_size: side of a tile in pixels.
    """
    if image.mode != "RGB":
        raise ValueError(f"views() takes RGB pictures, not mode {image.mode}; call decode() first")
    base = np.asarray(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))[None]
    if not pinpoints:
        return base
    canvas = np.asarray(resize_and_pad(image, best_resolution(image.size, pinpoints)))
    rows, columns = canvas.shape[0] // tile_size, canvas.shape[1] // tile_size
    tiles = canvas.reshape(rows, tile_size, columns, tile_size, 3).swapaxes(1, 2)
    return np.concatenate([base, tiles.reshape(-1, tile_size, tile_size, 3)])
